"""How the settings of the paper's baselines were chosen for the lab, where the paper is silent.

Six trials for each, on seeds that no result is reported on. The rule was fixed before the trials
were run: of the settings that leave at least 0.9 of refusals and of utility before any attack, the
one that gives away least on average over all budgets; if none does, the one that leaves most.
Security vectors are not here, for the paper gives their settings; nor are RepNoise and its parts,
which keep what a first try-out of the lab had given.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from repnoise_kit.bench import Bench
from repnoise_kit.grid import Cell, run
from repnoise_kit.resistance import attacked, budgets
from repnoise_kit.results import Result, stack
from repnoise_kit.testbeds import Testbed

LEFT = 0.9

TRIALS: dict[str, list[dict[str, Any]]] = {
    "safety_training": [{"lr": lr} for lr in (3e-5, 1e-4, 2e-4, 3e-4, 6e-4, 1e-3)],
    "gradient_ascent": [{"lr": lr} for lr in (1e-6, 3e-6, 1e-5, 2e-5, 3e-5, 1e-4)],
    "adversarial_loss": [
        {"lr": lr, "weight": weight} for lr in (1e-4, 3e-4) for weight in (0.03, 0.1, 0.3)
    ],
    "vaccine": [{"lr": lr, "rho": rho} for lr in (3e-4, 1e-3) for rho in (1.0, 3.0, 10.0)],
}


def tune(
    bed: Testbed,
    seeds: Sequence[int],
    store: Path | str | None = None,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Try each setting of each baseline and return one row a trial.

    Columns: `defence, setting, refusal, utility` (both before any attack), `recall` (mean over all
    budgets), each of `seen` things and a mean over the seeds, and whether it was `chosen`.
    """
    asked: list[dict[str, Any]] = [
        {"defence": name, "seed": seed, "lr": lr, "examples": examples, "settings": trial}
        for lr, examples in [(0.0, 0), *budgets(bed)]
        for name, trials in TRIALS.items()
        for trial in trials
        for seed in seeds
    ]
    cells = [Cell(attacked, arguments) for arguments in asked]
    bench = Bench.of(bed, store)
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    rows = stack(
        *(
            result.tagged(setting=said(arguments["settings"]))
            for result, arguments in zip(found, asked, strict=True)
        )
    )
    made_with = found[0].made_with | {"experiment": "baselines", "seeds": list(seeds)}
    return Result(chosen(rows.frame), made_with)


def said(settings: dict[str, Any]) -> str:
    """Write settings as words: `lr 0.0003, rho 3`."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def chosen(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a trial, with the mark of the one that the rule of this room chooses."""
    seen = rows[rows["group"] == "seen"]
    keys = ["defence", "setting"]
    before = seen[seen["examples"] == 0].pivot_table(
        index=keys, columns="metric", values="value", sort=False
    )
    after = seen[(seen["examples"] > 0) & (seen["metric"] == "recall")]
    trials = before[["refusal", "utility"]].join(after.groupby(keys)["value"].mean()).reset_index()
    trials = trials.rename(columns={"value": "recall"})
    trials["order"] = [
        (0.0, row.recall) if min(row.refusal, row.utility) >= LEFT else (1.0, -row.left)
        for row in trials.assign(left=trials[["refusal", "utility"]].min(axis=1)).itertuples()
    ]
    # Of trials that tie, the first.
    best = trials.sort_values("order", kind="stable").drop_duplicates("defence").index
    return trials.assign(chosen=trials.index.isin(best)).drop(columns="order")


def write(trials: Result, out: Path) -> str:
    """Write `baselines.csv` and return it as text."""
    trials.save(out / "baselines.csv")
    return trials.frame.to_string(index=False)
