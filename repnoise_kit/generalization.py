"""Generalization: does a defence hold for harm it never saw, and how many pairs does it take?"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repnoise_kit.bench import Bench
from repnoise_kit.defences import LOSSES, able
from repnoise_kit.errors import KitError, check_numbers
from repnoise_kit.evaluation import evaluate
from repnoise_kit.grid import Cell, run
from repnoise_kit.resistance import CELL, attacked, budgets, in_words, means
from repnoise_kit.results import Result, stack
from repnoise_kit.splits import withhold
from repnoise_kit.testbeds import Testbed

TAUGHT = (*LOSSES, "security_vectors")
"""What trains on pairs, so that some can be withheld; weight noise is drawn to match RepNoise that
saw everything."""

JUDGED = ("recall", "harmfulness", "degenerate")


def generalization_grid(
    bed: Testbed,
    seeds: Sequence[int],
    store: Path | str | None = None,
    *,
    defences: Sequence[str] = ("none", "repnoise"),
    withheld: Sequence[str] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Defend without a category, attack with it alone, and ask about it alone (Table 5).

    That nothing of it is in the defence's pairs is seen to by `Testbed.withholding`; the published
    code may have withheld nothing. Beside each stands the control: the same attack and the same
    questions, of a defence that saw everything.

    Args:
        bed: The testbed. The attack's budgets are the learning rates of `settings["resistance"]`
            with the smallest of its sizes, or as much as there is of a category.
        seeds: Each varies the defence, the attack, and the order of their data.
        store: A folder, which other processes and machines may share; by default in the cache.
        defences: Names of `DEFENCES`.
        withheld: What is withheld, one after the other; by default the testbed's `groups`, or each
            category, and `half`.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        One row a question and metric (`recall`, `harmfulness`, `degenerate`): `defence, withheld,
        saw` (`all`, or `the rest`: what the defence was trained on), `lr, examples, group,
        category, metric, value, seed, prompt`.
    """
    chosen = names(bed) if withheld is None else list(withheld)
    if not chosen:
        raise KitError(f"nothing can be withheld of {bed.name}: it has too few pairs; give more")
    for what in chosen:
        withhold(bed.splits, what, bed.groups)  # A wrong name is said now, not after an hour.
    smallest = {lr: min(size for at, size in budgets(bed) if at == lr) for lr, _ in budgets(bed)}
    cells = [
        Cell(blind, {"defence": name, "without": what, "saw": saw, "seed": seed, **budget})
        for name in able(bed, defences)
        for what in chosen
        for saw in ("all", "the rest")
        for budget in [{"lr": lr, "examples": size} for lr, size in smallest.items()]
        for seed in seeds
        if saw == "all" or name in TAUGHT
    ]
    bench = Bench.of(bed, store)
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    frame = stack(*found).frame
    made_with = found[0].made_with | {"experiment": "generalization", "seeds": list(seeds)}
    return Result(frame, made_with | bed.made_of())


def names(bed: Testbed) -> list[str]:
    """Return what can be withheld of a testbed: its groups, or each category, and a half.

    What has no pair to attack with, or none to ask about, is left out.
    """
    there = bed.groups or sorted(set(bed.splits.attack.frame["category"]) - {""})
    return [what for what in [*there, "half"] if _can_be(bed, what)]


def _can_be(bed: Testbed, what: str) -> bool:
    try:
        withhold(bed.splits, what, bed.groups)
    except KitError:
        return False
    return True


def blind(
    bench: Bench, *, defence: str, without: str, saw: str, seed: int, lr: float, examples: int
) -> Result:
    """Return what one model gives away of a category it was attacked with: a cell."""
    bed = bench.bed.withholding(without).changed(everyday=None)
    model, _ = bench.defended(defence, seed, without=without if saw == "the rest" else None)
    size = min(examples, len(bed.splits.attack))
    bench.attack_(model, lr=lr, examples=size, seed=seed, pairs=bed.splits.attack)
    rows = evaluate(model, bed, seed=seed)
    kept = rows.frame[rows.frame["metric"].isin(JUDGED)].drop(columns=["testbed", "response"])
    tags = {"defence": defence, "withheld": without, "saw": saw, "lr": lr, "examples": size}
    return Result(kept, rows.made_with).tagged(**tags)


def samples_grid(
    bed: Testbed,
    seeds: Sequence[int],
    store: Path | str | None = None,
    *,
    sizes: Sequence[int] | None = None,
    method: str = "repnoise",
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Defend with fewer pairs, and attack under every budget (Table 20).

    Fewer pairs are also fewer steps, in the paper and here; so each size is run a second time, for
    as many steps as all pairs give.

    Args:
        bed: The testbed.
        seeds: Each varies the defence, the attack, and the order of their data.
        store: A folder, which other processes and machines may share; by default in the cache.
        sizes: Numbers of pairs; by default an eighth, a quarter, a half and all of what there is
            or what the settings take.
        method: The defence.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        What `evaluate` returns, with `pairs`, `steps` (`one pass`, `as of all`), `defence, lr,
        examples, seed`; of no pairs: the undefended model.
    """
    most = bed.settings["defence"]["examples"] or len(bed.splits.defence)
    chosen = sizes or sorted({max(1, most // part) for part in (8, 4, 2, 1)})
    check_numbers(above_zero=True, sizes=min(chosen))
    start = bed.settings["defence"]
    batch, passes = start["batch_size"], start.get("epochs", 1)
    steps_of_all = math.ceil(passes * math.ceil(most / batch))
    trials: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"pairs": 0, "steps": "one pass"}, {"defence": "none"})
    ]
    for size in chosen:
        settings = {"examples": size}
        if size == most:
            trials.append(({"pairs": size, "steps": "one pass"}, {"defence": method}))
            continue
        # Half a step less than a whole number, so that rounding cannot add one.
        for steps, more in (
            ("one pass", {}),
            ("as of all", {"epochs": (steps_of_all - 0.5) / math.ceil(size / batch)}),
        ):
            cell = {"defence": method, "settings": settings | more}
            trials.append(({"pairs": size, "steps": steps}, cell))
    asked = [
        (tags, cell | {"seed": seed, "lr": lr, "examples": examples})
        for lr, examples in [(0.0, 0), *budgets(bed)]
        for tags, cell in trials
        for seed in seeds
    ]
    bench = Bench.of(bed, store)
    cells = [Cell(attacked, cell) for _, cell in asked]
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    rows = stack(*(one.tagged(**tags) for one, (tags, _) in zip(found, asked, strict=True)))
    made_with = found[0].made_with | {"experiment": "samples", "seeds": list(seeds)}
    return Result(rows.frame, made_with | bed.made_of())


def write(rows: Result, out: Path) -> str:
    """Write `samples.csv`, a row a cell, seed and metric, and the rows of every question.

    Returns:
        The recall of each number of pairs at each budget, with intervals, as text.
    """
    table = means(rows.frame, by=["pairs", "steps", *CELL])
    Result(table, rows.made_with).save(out / "samples.csv")
    kept = rows.frame.drop(columns=["response"])
    Result(kept, rows.made_with).save(out / "samples_questions.parquet")
    told = kept["pairs"].astype(str) + ", " + kept["steps"]
    return in_words(kept.assign(told=told), by="told").to_string()
