"""Studies: what sweeps have tried of RepNoise, in a database that Optuna takes.

A study holds trials of one testbed, judged by the same attacks on the same seeds, so that its
numbers can be compared; a database may hold many. All that is drawn of a trial is kept in it: where
the study is, nothing else is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState

from repnoise_kit.database import default_file, kept_in, storage, trusted
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.knobs import PRESETS
from repnoise_kit.resistance import named_budget
from repnoise_kit.results import Result
from repnoise_kit.store import fingerprint
from repnoise_kit.testbeds import Testbed

SEEDS = (100, 101)
"""What trials are judged on: seeds on which nothing is reported."""

HELD = ("nothing", "first third", "middle third", "last third")
PARAMETERS = ("alpha", "beta", "lr", "pairs", "preset", "held")
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "given up",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.FAIL: "stopped",
}
CELLS = ["lr", "examples", "group", "metric", "value", "low", "high"]
"""What is kept of an evaluation, for each attack, group and metric."""


def open_study(
    bed: Testbed,
    where: str | Path | None = None,
    *,
    attacks: Sequence[tuple[float, int]] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> optuna.Study:
    """Return the study of a testbed under these attacks and seeds, begun now if it is not there.

    Args:
        bed: The testbed. Utility must be measurable: it needs everyday questions.
        where: A file (SQLite), or the URL of a database that Optuna's `RDBStorage` takes, which
            several machines may share. By default a file in the kit's cache.
        attacks: Learning rate and number of examples of each attack a trial must hold against; by
            default the testbed's small and large one.
        seeds: Of the defences and attacks. Report on others: the best of many trials is partly
            the luckiest on these.

    Raises:
        KitError: the database cannot be opened, or holds a study of that name on other data.
    """
    if bed.everyday is None:
        raise KitError(
            f"a sweep weighs resistance against utility, and {bed.name} has no everyday questions "
            "to measure it by; give some (retain=)"
        )
    given = [_checked(attack, len(bed.splits.attack)) for attack in attacks or _both(bed)]
    check_whole(**{f"seed {seed}": seed for seed in seeds})
    if not seeds:
        raise KitError("a sweep needs at least one seed")
    name = f"{bed.name}: {attacks_in_words(given)}; seeds {', '.join(map(str, seeds))}"
    file = where or default_file(bed.name)
    with kept_in(file):
        study = optuna.create_study(
            study_name=name,
            storage=storage(file),
            directions=["maximize"] * 2,
            load_if_exists=True,
        )
    data = _data_of(bed)
    if study.user_attrs.setdefault("data", data) != data:
        raise KitError(
            f"{file} holds a study {name!r} of other data or settings; "
            "choose another file, or another name for the testbed"
        )
    about = {
        "testbed": bed.name,
        "data": data,
        "attacks": given,
        "seeds": list(seeds),
        "metric": "recall" if bed.utility == "recall" else "harmfulness",
        "space": {key: distribution_to_json(part) for key, part in _space_of(bed).items()},
        "start": _start_of(bed),
    }
    if new := [key for key in about if key not in study.user_attrs]:
        with trusted(), kept_in(file):
            study.set_metric_names(["resistance", "utility"])
            for key in new:
                study.set_user_attr(key, about[key])
    return study


def attacks_in_words(attacks: Sequence[tuple[float, int]]) -> str:
    """Write budgets as words: `attacks 0.0003 × 64, 0.0003 × 512`."""
    return "attacks " + ", ".join(f"{lr:g} × {examples}" for lr, examples in attacks)


def space_of(study: optuna.Study) -> dict[str, BaseDistribution]:
    """Return what a study varies, and within which bounds."""
    return {key: json_to_distribution(part) for key, part in study.user_attrs["space"].items()}


def trials(study: optuna.Study) -> Result:
    """Return one row a trial: `trial, state`, its parameters, `resistance, utility, seconds, note`.

    `resistance` is 1 less the recall (outside the lab: the harmfulness) after the worst of the
    attacks; `utility` the defended model's before any. A trial that was given up has the latter
    only. States: finished, given up, running, waiting, stopped (it is tried again), failed.
    """
    found = study.get_trials(deepcopy=False)
    table = pd.DataFrame([_row(trial) for trial in found], columns=[*_COLUMNS])
    table["pairs"] = table["pairs"].astype("Int64")  # A trial that just begins may have none yet.
    return Result(table, dict(study.user_attrs) | {"study": study.study_name})


def trial_rows(study: optuna.Study, number: int | None) -> Result:
    """Return what was measured of a trial, or with None of the undefended model.

    One row an attack, group and metric: `defence, lr, examples, group, metric, value, low, high`,
    over the study's seeds; 0 examples are before any attack.
    """
    attrs = study.user_attrs if number is None else _trial(study, number).user_attrs
    rows = pd.DataFrame(attrs.get("cells", []), columns=CELLS)
    return Result(rows).tagged(defence="none" if number is None else "repnoise")


def trial_curves(study: optuna.Study, number: int) -> Result:
    """Return the terms of a trial's loss along its steps: `step, metric, value, seed`, thinned."""
    kept = _trial(study, number).user_attrs.get("curves", [])
    columns = ["seed", "metric", "step", "value"]
    tables = [pd.DataFrame(dict(zip(columns, part, strict=True))) for part in kept]
    return Result(pd.concat(tables) if tables else pd.DataFrame(columns=columns))


def holds(trial: FrozenTrial, params: Mapping[str, Any]) -> bool:
    """Whether a trial has these parameters, or is to have them."""
    own = trial.system_attrs.get("fixed_params", {}) | trial.params
    return all(own.get(name) == params[name] for name in PARAMETERS)


def key_of(params: Mapping[str, Any]) -> str:
    """Return what stands for a trial's parameters, of whatever else has them as keys."""
    return fingerprint([params.get(name) for name in PARAMETERS])


def front(table: pd.DataFrame) -> pd.DataFrame:
    """Return the finished trials that no other one betters in both resistance and utility."""
    rows = table[table["state"] == "finished"].sort_values(
        ["resistance", "utility"], ascending=False, kind="stable"
    )
    best = rows["utility"].cummax().shift(fill_value=-np.inf)
    return rows[rows["utility"] > best]


def nearest(study: optuna.Study, table: pd.DataFrame, **wanted: Any) -> int | None:
    """Return the number of the finished trial whose parameters lie nearest to those wanted.

    Distance: each parameter's share of its range (on its logarithm), 1 where a choice differs.
    """
    rows = table[table["state"] == "finished"]
    if rows.empty:
        return None
    gaps = np.zeros(len(rows))
    for name, kind in space_of(study).items():
        if name not in wanted:
            continue
        if isinstance(kind, FloatDistribution):
            reach = np.log(kind.high / kind.low)
            gaps += np.abs(np.log(rows[name].astype(float) / wanted[name])) / reach
        else:
            gaps += (rows[name] != wanted[name]).to_numpy()
    return int(rows["trial"].iloc[int(np.argmin(gaps))])


def importance(study: optuna.Study) -> Result:
    """Return how much each parameter matters for being among a study's best tenth of trials.

    PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), by Optuna: one row a parameter and
    objective, `parameter, objective, value`, which add up to 1 in each objective. With fewer than
    ten finished trials there is nothing to say, and no row.
    """
    rows = []
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    for place, objective in enumerate(("resistance", "utility") if len(done) >= 10 else ()):
        with trusted():
            found = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial, place=place: -(trial.values or [])[place],
            )
        rows += [
            {"parameter": name, "objective": objective, "value": float(value)}
            for name, value in found.items()
        ]
    return Result(pd.DataFrame(rows, columns=["parameter", "objective", "value"]))


_COLUMNS = ("trial", "state", *PARAMETERS, "resistance", "utility", "seconds", "note")


def _row(trial: FrozenTrial) -> dict[str, Any]:
    attrs = trial.user_attrs
    fixed = trial.system_attrs.get("fixed_params", {})
    # What a successor takes over from one that died is not its own.
    error = attrs.get("error") if trial.state == TrialState.FAIL else None
    note = attrs.get("note", "") if trial.state == TrialState.PRUNED else ""
    values = trial.values or [np.nan, attrs.get("utility", np.nan)]
    return {
        "trial": trial.number,
        "state": "failed" if error else STATES[trial.state],
        **{name: trial.params.get(name, fixed.get(name)) for name in PARAMETERS},
        **dict(zip(("resistance", "utility"), values, strict=True)),
        "seconds": attrs.get("seconds", np.nan),
        "note": error or note,
    }


def _trial(study: optuna.Study, number: int) -> FrozenTrial:
    known = study.get_trials(deepcopy=False)
    if not 0 <= number < len(known):
        raise KitError(f"the study has no trial {number}, only 0 to {len(known) - 1}")
    return known[number]


def _checked(attack: Any, most: int) -> tuple[float, int]:
    try:
        lr, examples = attack
    except (TypeError, ValueError) as error:
        raise KitError(
            f"an attack is a learning rate and a number of examples, (3e-4, 64), not {attack!r}"
        ) from error
    check_numbers(above_zero=True, lr=lr, examples=examples)
    check_whole(examples=examples)
    if examples > most:
        raise KitError(f"an attack of {examples} examples asks for more than the {most} there are")
    return lr, examples


def _both(bed: Testbed) -> list[tuple[float, int]]:
    budgets = [named_budget(bed, name) for name in ("small", "large")]
    return list(dict.fromkeys((budget["lr"], budget["examples"]) for budget in budgets))


def _space_of(bed: Testbed) -> dict[str, BaseDistribution]:
    start = bed.settings["defence"]
    most = start["examples"] or len(bed.splits.defence)
    sizes = sorted({max(1, most // share) for share in (8, 4, 2, 1)})
    return {
        "alpha": FloatDistribution(start["alpha"] / 10, start["alpha"] * 10, log=True),
        "beta": FloatDistribution(start["beta"] / 100, start["beta"] * 100, log=True),
        "lr": FloatDistribution(start["lr"] / 10, start["lr"] * 4, log=True),
        "pairs": CategoricalDistribution(sizes),
        "preset": CategoricalDistribution(tuple(PRESETS)),
        "held": CategoricalDistribution(HELD),
    }


def _start_of(bed: Testbed) -> dict[str, Any]:
    """Return the settings that a testbed starts from, as parameters."""
    start = bed.settings["defence"]
    most = start["examples"] or len(bed.splits.defence)
    named = {name: start[name] for name in ("alpha", "beta", "lr")}
    return named | {"pairs": most, "preset": "paper", "held": "nothing"}


def _data_of(bed: Testbed) -> str:
    """Return what stands for the data and the settings; a model's bits differ with the machine."""
    tables = [bed.splits.defence.frame, bed.splits.attack.frame, bed.evaluated()]
    tables += [table for table in (bed.retain, bed.everyday) if table is not None]
    return fingerprint([table.to_csv(index=False) for table in tables], bed.settings)
