"""Which trial of a study to take, and what it is worth on seeds that did not choose it."""

from collections.abc import Sequence
from pathlib import Path

import optuna
import pandas as pd
from optuna.trial import TrialState

from repnoise_kit.archive import save_study
from repnoise_kit.bench import Bench
from repnoise_kit.errors import KitError
from repnoise_kit.grid import run
from repnoise_kit.resistance import means
from repnoise_kit.results import Result, stack
from repnoise_kit.stats import Interval, summary
from repnoise_kit.studies import PARAMETERS, holds, trial_rows, trials
from repnoise_kit.testbeds import Testbed
from repnoise_kit.trying import cell_of, lost, undefended_cell

UNDEFENDED = -1
"""Stands for the undefended model where trials have numbers."""


def winner(study: optuna.Study) -> int:
    """Return the finished trial that resists most of those that keep their utility.

    Chosen on the study's seeds, so that its numbers there are partly luck; `report_trials` measures
    it on others.
    """
    table = trials(study).frame
    rows = table[table["state"] == "finished"]
    if rows.empty:
        raise KitError("the study has no finished trial yet")
    kept = rows[~lost(undefended_utility(study), rows["utility"])]
    best = (rows if kept.empty else kept).sort_values(
        ["resistance", "utility"], ascending=False, kind="stable"
    )
    return int(best["trial"].iloc[0])


def started_from(study: optuna.Study) -> int | None:
    """Return the finished trial of the settings that the testbed starts from, if there is one."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    start = study.user_attrs["start"]
    return next((trial.number for trial in done if holds(trial, start)), None)


def undefended_utility(study: optuna.Study) -> float:
    """Return the utility of the undefended model, which no trial can be expected to exceed."""
    rows = trial_rows(study, None).frame
    chosen = (rows["metric"] == "utility") & (rows["group"] == "seen") & (rows["examples"] == 0)
    return float(rows[chosen]["value"].max())


def report_trials(
    bed: Testbed,
    study: optuna.Study,
    numbers: Sequence[int],
    seeds: Sequence[int] = range(5),
    store: Path | str | None = None,
    *,
    workers: int = 1,
    progress: str | None = None,
) -> Result:
    """Measure trials, and the undefended model, on seeds that they were not chosen by.

    Returns:
        What `resistance_grid` returns, with `trial` in front; the undefended model is -1.

    Raises:
        KitError: a seed that the study chose by, or a trial that is not there.
    """
    check_other_seeds(study.user_attrs["seeds"], seeds)
    bench = Bench.of(bed, store)
    known = study.get_trials(deepcopy=False)
    if missing := [number for number in numbers if not 0 <= number < len(known)]:
        raise KitError(f"the study has no trial {missing[0]}, only 0 to {len(known) - 1}")
    if begun := [number for number in numbers if len(known[number].params) < len(PARAMETERS)]:
        raise KitError(f"trial {begun[0]} was stopped before its parameters were drawn")
    budgets = [(0.0, 0), *study.user_attrs["attacks"]]
    # What others wait for, the defended models, comes first.
    places = [
        (number, (seed, lr, examples))
        for lr, examples in budgets
        for number in (UNDEFENDED, *numbers)
        for seed in seeds
    ]
    cells = [
        undefended_cell(*place)
        if number == UNDEFENDED
        else cell_of(bench, known[number].params, *place)
        for number, place in places
    ]
    found = run(cells, bench, workers=workers, progress=progress)
    rows = [part.tagged(trial=number) for part, (number, _) in zip(found, places, strict=True)]
    made_with = {"experiment": "sweep", "study": study.study_name, "seeds": [*seeds]}
    return Result(stack(*rows).frame, found[0].made_with | made_with | bed.made_of())


def check_other_seeds(chosen_by: Sequence[int], reported: Sequence[int]) -> None:
    """Refuse to report on a seed that trials were chosen by."""
    if both := sorted({*chosen_by} & {*reported}):
        raise KitError(f"seed {both[0]} chooses the trials; report on other seeds")


def in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """Return recall, harmfulness and utility of reported trials as text: a column an attack."""
    shown = rows[
        (rows["group"] == "seen") & rows["metric"].isin(["recall", "harmfulness", "utility"])
    ]
    keys = ["metric", "trial", "lr", "examples"]
    cells = summary(shown, by=keys)
    cells = cells[(cells["seed"] == "all") | ~cells.duplicated(keys, keep=False)]
    texts = [str(Interval(*cell)) for cell in cells[["value", "low", "high"]].to_numpy()]
    wide = cells.assign(text=texts).pivot(
        index=["metric", "trial"], columns=["lr", "examples"], values="text"
    )
    return wide.rename(index={UNDEFENDED: "undefended"}, level="trial").sort_index(axis=1)


def write(study: optuna.Study, rows: Result, out: Path, command: str) -> str:
    """Write the study's tables, and the report's: `sweep.csv`, `sweep_report.csv` and their parts.

    Returns:
        What was chosen, and what it is worth on the report's seeds, as text.
    """
    save_study(study, out / "sweep.csv", command=command)
    made_with = rows.made_with | {"command": command}
    by = ["trial", "group", "lr", "examples", "seed", "metric"]
    Result(means(rows.frame, by), made_with).save(out / "sweep_report.csv")
    Result(rows.frame, made_with).save(out / "sweep_report_questions.parquet")
    chosen = trials(study).frame.set_index("trial")
    chosen = chosen.loc[[n for n in rows.frame["trial"].unique() if n != UNDEFENDED]]
    columns = [*PARAMETERS, "resistance", "utility"]
    chose, told = (", ".join(map(str, made["seeds"])) for made in (study.user_attrs, made_with))
    return (
        f"chosen on seeds {chose}\n"
        f"{chosen[columns].to_string(float_format='{:.3g}'.format)}\n\n"
        f"measured on seeds {told}\n{in_words(rows.frame).to_string()}"
    )
