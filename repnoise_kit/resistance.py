"""The paper's Table 1: every defence, every budget of the attack, every seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repnoise_kit.bench import Bench
from repnoise_kit.defences import DEFENCES, able
from repnoise_kit.errors import KitError
from repnoise_kit.evaluation import evaluate
from repnoise_kit.grid import Cell, run
from repnoise_kit.results import Result, need, stack
from repnoise_kit.stats import Interval, summary
from repnoise_kit.testbeds import Testbed

CELL = ["defence", "group", "lr", "examples", "seed", "metric"]


def resistance_grid(
    bed: Testbed,
    seeds: Sequence[int],
    store: Path | str | None = None,
    *,
    defences: Sequence[str] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Defend, attack and evaluate: defence × budget × seed, as in Table 1.

    Budgets are the learning rates × sizes of `bed.settings["resistance"]`, and none at all.
    Whatever the store holds already is not computed again.

    Args:
        bed: The testbed.
        seeds: Each varies the defence, the attack, and the order of their data. Defences share the
            seeds and the data of the attack.
        store: A folder, which other processes and machines may share; by default in the cache.
        defences: Names of `DEFENCES`; by default all that the testbed can do (matched weight noise
            needs a retain set).
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        One row a question and metric: what `evaluate` returns, with `defence, lr, examples` (both
        0 before any attack), `seed`. An attack that diverged is judged by its last good weights.
    """
    # What others wait for comes first: the defended models, RepNoise's before those made like it.
    first = able(bed, defences)
    bench = Bench.of(bed, store)
    cells = [
        Cell(attacked, {"defence": name, "seed": seed, "lr": lr, "examples": examples})
        for lr, examples in [(0.0, 0), *budgets(bed)]
        for name in first
        for seed in seeds
    ]
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    rows = stack(*found)
    made_with = found[0].made_with | {"experiment": "resistance", "seeds": list(seeds)}
    made_with |= bed.made_of()
    return Result(rows.frame, made_with)


def budgets(bed: Testbed) -> list[tuple[float, int]]:
    """Return the attack's budgets, (learning rate, examples), the weakest first."""
    chosen = bed.settings["resistance"]
    return [(lr, examples) for lr in chosen["lr"] for examples in chosen["examples"]]


def named_budget(bed: Testbed, attack: str) -> dict[str, Any]:
    """Return learning rate and examples of the testbed's attack `small` or `large`."""
    if attack not in ("small", "large"):
        raise KitError(f"there is no attack {attack!r}; there are small and large")
    budget = {**bed.settings["attack"], **bed.settings[attack]}
    return {name: budget[name] for name in ("lr", "examples")}


def attacked(
    bench: Bench,
    *,
    defence: str,
    seed: int,
    lr: float,
    examples: int,
    settings: dict[str, Any] | None = None,
    held: Sequence[int | str] = (),
) -> Result:
    """Return the evaluation of one defended model after one attack: a cell of the grid."""
    model, _ = bench.defended(defence, seed, settings, held)
    if examples:
        bench.attack_(model, lr=lr, examples=examples, seed=seed)
    found = evaluate(model, bench.bed, seed=seed)
    return found.tagged(defence=defence, lr=lr, examples=examples)


def means(rows: pd.DataFrame, by: Sequence[str] = CELL) -> pd.DataFrame:
    """Return one row a cell, seed and metric, the mean over questions (perplexity: geometric)."""
    keys = list(by)
    need(rows, *keys, "value")
    logs = rows["metric"] == "perplexity"
    values = rows["value"].where(~logs, np.log(rows["value"].clip(lower=1e-12)))
    found = rows.assign(value=values).groupby(keys, sort=False, as_index=False)["value"].mean()
    back = found["metric"] == "perplexity"
    return found.assign(value=found["value"].where(~back, np.exp(found["value"])))


def write(rows: Result, out: Path) -> str:
    """Write `resistance.csv`, a row a cell, seed and metric, and the rows of every question.

    Returns:
        The recall of each defence at each budget, with intervals, as text.
    """
    Result(means(rows.frame), rows.made_with).save(out / "resistance.csv")
    rows.save(out / "resistance_questions.parquet")
    return in_words(rows.frame).to_string()


def in_words(
    rows: pd.DataFrame, metric: str = "recall", group: str = "seen", by: str = "defence"
) -> pd.DataFrame:
    """Return one metric as a table of text: a row a defence (or held part), a column a budget."""
    shown = rows[(rows["metric"] == metric) & (rows["group"] == group)]
    cells = summary(shown, by=(by, "lr", "examples", "metric"))
    cells = cells[cells["seed"] == "all"] if (cells["seed"] == "all").any() else cells
    texts = [str(Interval(*cell)) for cell in cells[["value", "low", "high"]].to_numpy()]
    wide = cells.assign(text=texts).pivot(index=by, columns=["lr", "examples"], values="text")
    order = DEFENCES if by == "defence" else rows[by].unique()
    return wide.reindex([name for name in order if name in wide.index]).sort_index(axis=1)
