"""Read the lens at fewer layers each step: how much faster, and what becomes of resistance.

    python tests/benchmarks/lens_layers.py --workers 2  # the lab, 6, 3 and 1 layers, 5 seeds
    python tests/benchmarks/lens_layers.py --seeds 1    # a look

Writes `data/results/lens_layers.csv`: recall of seen things before and after the small and the
large attack, and utility, a row a cell, with intervals over seeds and questions; and for each
number of layers the difference from all of them, paired by seed and question.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

import repnoise_kit as rk
from repnoise_kit.bench import Bench
from repnoise_kit.grid import Cell, run
from repnoise_kit.resistance import attacked, named_budget
from repnoise_kit.results import Result, stack
from repnoise_kit.stats import difference, summary

READ = (None, 3, 1)
OUT = Path(__file__).parents[2] / "data" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = measured(rk.lab(), range(arguments.seeds), arguments.workers)
    found.made_with["command"] = " ".join(["python", *sys.argv])
    found.save(arguments.out / "lens_layers.csv")
    print(found.frame.to_string(index=False))


def measured(bed: rk.Testbed, seeds: range, workers: int = 1) -> Result:
    """Defend with the lens on so many layers a step, attack, and judge."""
    budgets = {"none": {"lr": 0.0, "examples": 0}}
    budgets |= {attack: named_budget(bed, attack) for attack in ("small", "large")}
    asked = [(count, attack, seed) for count in READ for attack in budgets for seed in seeds]
    cells = [
        Cell(
            attacked,
            {"defence": "repnoise", "seed": seed, "settings": settings_of(count)} | budgets[attack],
        )
        for count, attack, seed in asked
    ]
    made = run(cells, Bench.of(bed), workers=workers, progress="lens_layers")
    rows = stack(
        *(
            result.tagged(lens_layers=str(count or "all"), attack=attack)
            for result, (count, attack, _) in zip(made, asked, strict=True)
        )
    ).frame
    rows = rows[rows["metric"].isin(["recall", "utility"]) & (rows["group"] != "unseen")]
    cells_found = summary(rows, by=("lens_layers", "attack", "metric"))
    table = pd.concat([cells_found[cells_found["seed"].isin(["all"])], apart(rows)])
    columns = ["lens_layers", "attack", "metric", "value", "low", "high"]
    made_with = made[0].made_with | {"experiment": "lens_layers", "seeds": list(seeds)}
    return Result(table[columns], made_with | bed.made_of())


def settings_of(count: int | None) -> dict:
    return {} if count is None else {"lens_layers": count}


def apart(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the difference of each number of layers from all of them."""
    found = []
    for (attack, metric), cell in rows.groupby(["attack", "metric"], sort=False):
        for count in [str(count) for count in READ if count]:
            made = difference(cell, {"lens_layers": count}, {"lens_layers": "all"})
            name = {"lens_layers": f"{count} - all", "attack": attack, "metric": metric}
            found.append(name | made._asdict())
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()
