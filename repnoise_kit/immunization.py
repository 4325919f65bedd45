"""The four immunization criteria of each defence, in one table.

Resistance, stability, generalization, trainability (Rosati et al., 2024, Immunization against
harmful fine-tuning attacks): a defence that only resists is easy, for a broken model resists too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repnoise_kit.bench import Bench
from repnoise_kit.defences import able
from repnoise_kit.everyday import stable
from repnoise_kit.generalization import generalization_grid
from repnoise_kit.grid import Cell, run
from repnoise_kit.headlines import CRITERIA, criteria_table
from repnoise_kit.resistance import resistance_grid
from repnoise_kit.results import Result, stack
from repnoise_kit.testbeds import Testbed
from repnoise_kit.trainability import trainability_grid

DEFENCES = ("none", "safety_training", "adversarial_loss", "repnoise", "weight_noise_matched")


def criteria(
    bed: Testbed,
    seeds: Sequence[int] = range(5),
    store: Path | str | None = None,
    *,
    defences: Sequence[str] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Measure all four immunization criteria of each defence (Tables 1, 3, 4 and 5).

    What a testbed lacks is left out: without everyday questions stability and matched weight
    noise, without tasks trainability. Whatever the store holds already is not computed again.

    Args:
        bed: The testbed.
        seeds: Each varies the defence, the attack, and the order of their data.
        store: A folder, which other processes and machines may share; by default in the cache.
        defences: Names of `DEFENCES`; by default the undefended model, two other defences,
            RepNoise, and weight noise of the same utility.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for bars; no bars without.

    Returns:
        One row a question and metric, `criterion` first; then what the grid of that criterion
        returns: `resistance_grid`, `stability`, `generalization_grid`, `trainability_grid`.
    """
    able(bed, defences)
    chosen = [name for name in DEFENCES if name in able(bed)] if defences is None else defences
    how: dict[str, Any] = {"workers": workers, "scheduler": scheduler}

    def words(what: str) -> str | None:
        return None if progress is None else f"{progress}, {what}"

    made = {
        "resistance": resistance_grid(
            bed, seeds, store, defences=chosen, progress=words("resistance"), **how
        ),
        "generalization": generalization_grid(
            bed, seeds, store, defences=chosen, progress=words("generalization"), **how
        ),
    }
    if bed.everyday is not None:
        cells = [Cell(stable, {"defence": n, "seed": s}) for n in able(bed, chosen) for s in seeds]
        bench = Bench.of(bed, store)
        made["stability"] = stack(*run(cells, bench, progress=words("stability"), **how))
    if bed.tasks:
        made["trainability"] = trainability_grid(
            bed, seeds, store, defences=chosen, progress=words("trainability"), **how
        )
    parts = [made[name].tagged(criterion=name) for name in CRITERIA if name in made]
    frame = stack(*parts).frame.drop(columns=["response", "testbed"])
    made_with = made["resistance"].made_with | {"experiment": "criteria", "defences": list(chosen)}
    return Result(frame, made_with)


def write(rows: Result, out: Path) -> str:
    """Write `criteria.csv`, a row a headline, and the rows of every question.

    Returns:
        The headlines as text.
    """
    cells = criteria_table(rows)
    Result(cells, rows.made_with).save(out / "criteria.csv")
    rows.save(out / "criteria_questions.parquet")
    return cells.to_string(index=False)
