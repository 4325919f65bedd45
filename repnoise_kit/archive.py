"""Studies as tables that can be read, committed, and made studies again."""

from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, need
from repnoise_kit.store import fingerprint
from repnoise_kit.studies import (
    CELLS,
    PARAMETERS,
    key_of,
    space_of,
    trial_curves,
    trial_rows,
    trials,
)


def save_study(study: optuna.Study, path: Path | str, **made_with: Any) -> Path:
    """Write a study as tables: `NAME.csv`, a row a trial, `NAME_cells` and `NAME_curves.parquet`.

    Args:
        study: Its finished trials, and those given up, are written.
        path: Of the first table.
        made_with: Noted with it, beside what the study says of itself.
    """
    path = Path(path)
    table = trials(study)
    rows = table.frame[table.frame["state"].isin(["finished", "given up"])]
    if rows.empty:
        raise KitError("the study has no finished trial to save yet")
    Result(rows, table.made_with | made_with).save(path)
    for part, read in (("cells", trial_rows), ("curves", trial_curves)):
        parts = [read(study, number).tagged(trial=number) for number in rows["trial"]]
        whole = pd.concat([part.frame for part in parts])
        Result(whole).save(path.with_name(f"{path.stem}_{part}.parquet"))
    return path


def read_study(path: Path | str, into: optuna.Study | None = None) -> optuna.Study:
    """Return a study that `save_study` wrote, in memory; or add its trials to another.

    Args:
        path: `NAME.csv`.
        into: A study under the same attacks and seeds, of the same data. Trials that it has are
            not added again.
    """
    path = Path(path)
    table = Result.load(path)
    need(table.frame, "trial", "state", *PARAMETERS)
    if "study" not in table.made_with:
        raise KitError(f"{path.with_suffix('.json')} is not there; it says what {path.name} is of")
    fresh = into is None
    if into is None:
        into = optuna.create_study(study_name=table.made_with["study"], directions=["maximize"] * 2)
        for key, value in table.made_with.items():
            into.set_user_attr(key, value)
    if not comparable(into, path):
        raise KitError(
            f"{path} is a study under other attacks, seeds or data than the one it is to be added "
            "to; read it by itself, or open the study under the same"
        )
    if "cells" not in into.user_attrs and "cells" in table.made_with:
        into.set_user_attr("cells", table.made_with["cells"])
    known = {key_of(trial.params) for trial in into.get_trials(deepcopy=False)}
    rows = table.frame.to_dict("records")
    cells, curves = (
        Result.load(path.with_name(f"{path.stem}_{part}.parquet")).frame
        for part in ("cells", "curves")
    )
    found = {row["trial"]: _frozen(row, into, cells, curves) for row in rows}
    if fresh:  # Each keeps its number: in the place of those that were not written stands nothing.
        for number in range(max(found)):
            found.setdefault(number, optuna.create_trial(state=TrialState.FAIL))
    added = [found[number] for number in sorted(found)]
    into.add_trials([trial for trial in added if key_of(trial.params) not in known])
    return into


def comparable(study: optuna.Study, path: Path | str) -> bool:
    """Whether a study that `save_study` wrote is under the same attacks and seeds, on this data."""
    about = Result.load(path).made_with
    return all(
        fingerprint(study.user_attrs.get(key)) == fingerprint(about.get(key))
        for key in ("attacks", "seeds", "data")
    )


def _frozen(
    row: dict[str, Any], study: optuna.Study, cells: pd.DataFrame, curves: pd.DataFrame
) -> FrozenTrial:
    """Make a trial of its row of the three tables."""
    space = space_of(study)
    own = cells[cells["trial"] == row["trial"]]
    terms = curves[curves["trial"] == row["trial"]].groupby(["seed", "metric"], sort=False)
    done = row["state"] == "finished"
    attrs = {
        "cells": own[CELLS].to_numpy().tolist(),
        "curves": [
            [int(seed), metric, part["step"].tolist(), part["value"].tolist()]
            for (seed, metric), part in terms
        ],
        "utility": row["utility"],
        "seconds": row["seconds"],
        "note": row["note"],
    }
    params = {name: row[name] for name in space}
    for name, kind in space.items():  # A trial by hand may lie outside.
        if isinstance(kind, FloatDistribution):
            low, high = min(kind.low, row[name]), max(kind.high, row[name])
            space[name] = FloatDistribution(low, high, log=True)
    return optuna.create_trial(
        state=TrialState.COMPLETE if done else TrialState.PRUNED,
        params=params,
        distributions=space,
        values=[row["resistance"], row["utility"]] if done else None,
        user_attrs=attrs,
    )
