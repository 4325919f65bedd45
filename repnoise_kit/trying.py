"""One trial of a study: defend with its settings, attack, evaluate, and write down what came out.

The work is that of the grids' cells, so that a trial that was stopped goes on where it was, and one
with known settings is done at once.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._heartbeat import get_heartbeat_thread
from optuna.trial import TrialState

from repnoise_kit.bench import Bench
from repnoise_kit.freezing import thirds
from repnoise_kit.grid import Cell
from repnoise_kit.resistance import attacked
from repnoise_kit.results import Result
from repnoise_kit.stats import summary
from repnoise_kit.steps import Step, check, hearing
from repnoise_kit.studies import CELLS, space_of
from repnoise_kit.training import NotFiniteError

LOST = 0.1
"""A trial is given up once it has lost more utility than this before any attack (a share; nats a
token where utility is a log-probability)."""

POINTS = 60
"""Points that are kept of a curve."""

Say = Callable[[dict[str, Any]], None]
"""Takes what there is to tell of a trial: `trial, params`, `share` done, and of a
step its `seed`, `step` and `terms`."""


def run_trial(study: optuna.Study, trial: optuna.Trial, bench: Bench, say: Say) -> None:
    """Run one trial to its end and tell the study, whatever the end is.

    Raises:
        KeyboardInterrupt: it was stopped; the study has it as one to be tried again.
        Exception: what went wrong, which the study has as the trial's `error`.
    """
    start, values, state = time.monotonic(), None, TrialState.COMPLETE
    with get_heartbeat_thread(trial._trial_id, study._storage):
        try:
            params = _suggested(trial, study)
            say({"trial": trial.number, "params": params})
            values = _judged(study, trial, bench, params, say)
        except UpdateFinishedTrialError:
            return  # Taken for dead before it began, it has a successor by now.
        except (optuna.TrialPruned, NotFiniteError) as given_up:
            state = TrialState.PRUNED
            _note(trial, note=str(given_up).partition(";")[0])
        except KeyboardInterrupt:
            if _failed(study, trial):
                _try_again(study, trial)
            raise
        except Exception as error:
            _note(trial, error=" ".join(f"{type(error).__name__}: {error}".split()))
            _failed(study, trial)
            raise
    _note(trial, seconds=round(time.monotonic() - start, 1))
    # Taken for dead, as after a long sleep of the machine, it is finished already: its successor
    # finds all of its cells.
    study.tell(trial, values, state=state, skip_if_finished=True)


def measure_undefended(study: optuna.Study, bench: Bench) -> None:
    """Let the study know what its attacks do to the undefended model, if it does not yet."""
    if "cells" not in study.user_attrs:
        found = [_measured(bench, undefended_cell(*place)) for place in _plan(study)]
        study.set_user_attr("cells", _summed(found))


def lost(undefended: float, utility: Any) -> Any:
    """Whether so much utility, of one trial or of a column of them, is gone."""
    return (undefended - utility) > LOST + 1e-9  # A tenth of ten questions is not more than .1.


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters as settings of `defend_`, but for what is held still."""
    named = {name: params[name] for name in ("alpha", "beta", "lr", "preset")}
    return named | {"examples": params["pairs"]}


def undefended_cell(seed: int, lr: float, examples: int) -> Cell:
    """Return the grid's cell of the undefended model under this attack."""
    return Cell(attacked, {"defence": "none", "seed": seed, "lr": lr, "examples": examples})


def cell_of(bench: Bench, params: Mapping[str, Any], seed: int, lr: float, examples: int) -> Cell:
    """Return the grid's cell for these parameters, seed and attack."""
    held = thirds(bench.bed.base)[params["held"]]
    how = {"settings": settings_of(params), "held": held}
    told = {"defence": "repnoise", "seed": seed, "lr": lr, "examples": examples}
    return Cell(attacked, told | how)


def _judged(
    study: optuna.Study, trial: optuna.Trial, bench: Bench, params: dict[str, Any], say: Say
) -> list[float]:
    """Return resistance and utility; what is measured on the way is written as it comes."""
    plan, found, curves = _plan(study), [], []
    known = _of(study.user_attrs["cells"], "utility")[0]
    for place, (seed, lr, examples) in enumerate(plan):

        def heard(step: Step, place: int = place, seed: int = seed) -> None:
            share = (place + step.number / step.of) / len(plan)
            say({"share": share, "seed": seed, "step": step.number, "terms": step.terms})

        with hearing(heard):
            cell = cell_of(bench, params, seed, lr, examples)
            found.append(_measured(bench, cell))
        if not examples:
            held = cell.arguments["held"]
            curves += _thinned(bench.curves("repnoise", seed, settings_of(params), held).frame)
        cells = _summed(found)
        utility = _of(cells, "utility")[0]
        _note(trial, cells=cells, curves=curves, utility=utility)
        say({"share": (place + 1) / len(plan)})
        if not examples and lost(known, utility):
            raise optuna.TrialPruned(f"utility {utility:.2f}, undefended {known:.2f}")
    worst = max(_of(cells, study.user_attrs["metric"])[1:])
    return [1 - worst, utility]


def _plan(study: optuna.Study) -> list[tuple[int, float, int]]:
    """Return what a trial measures: seed, learning rate and examples, each before any attack."""
    attrs = study.user_attrs
    budgets = [(0.0, 0), *attrs["attacks"]]
    return [(seed, lr, examples) for seed in attrs["seeds"] for lr, examples in budgets]


def _measured(bench: Bench, cell: Cell) -> pd.DataFrame:
    check()
    return Result.load(cell.compute(bench) / "rows.parquet").frame


def _suggested(trial: optuna.Trial, study: optuna.Study) -> dict[str, Any]:
    """Let the sampler, or who enqueued the trial, choose each parameter."""
    chosen = {}
    for name, kind in space_of(study).items():
        if isinstance(kind, FloatDistribution):
            chosen[name] = trial.suggest_float(name, kind.low, kind.high, log=True)
        elif isinstance(kind, CategoricalDistribution):
            chosen[name] = trial.suggest_categorical(name, kind.choices)
    return chosen


def _summed(found: list[pd.DataFrame]) -> list[list[Any]]:
    """Return one row a cell, over all seeds there are: what `studies.CELLS` names."""
    keys = ("lr", "examples", "group", "metric")
    cells = summary(pd.concat(found, ignore_index=True), by=keys)
    cells = cells[(cells["seed"] == "all") | ~cells.duplicated(list(keys), keep=False)]
    return cells[CELLS].round(6).to_numpy().tolist()


def _of(cells: list[list[Any]], metric: str) -> list[float]:
    """Return a metric of the seen things before and after each attack, in that order."""
    table = pd.DataFrame(cells, columns=CELLS)
    rows = table[(table["metric"] == metric) & (table["group"] == "seen")]
    return rows["value"].tolist()


def _thinned(curves: pd.DataFrame) -> list[list[Any]]:
    """Return `[seed, metric, steps, values]` of each term, the means of at most 60 stretches."""
    kept = []
    terms = curves[curves["metric"].isin(["retain", "noise", "ascent"])]
    for (seed, metric), rows in terms.groupby(["seed", "metric"], sort=False):
        parts = np.array_split(rows[["step", "value"]].to_numpy(), min(POINTS, len(rows)))
        middles = [part.mean(axis=0) for part in parts]
        steps, values = np.transpose(middles).round(5).tolist()
        kept.append([int(seed), metric, steps, values])
    return kept


def _failed(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Fail a trial, unless it is finished already; tell whether this did it."""
    with suppress(UpdateFinishedTrialError):
        return study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    return False


def _try_again(study: optuna.Study, trial: optuna.Trial) -> None:
    """Let a trial with these parameters wait. To be stopped is no death, of which it has few."""
    known = study.get_trials(deepcopy=False)[trial.number]
    again = optuna.create_trial(
        state=TrialState.WAITING,
        params=known.params,
        distributions=known.distributions,
        system_attrs=known.system_attrs,
    )
    study.add_trial(again)


def _note(trial: optuna.Trial, **attrs: Any) -> None:
    with suppress(UpdateFinishedTrialError):
        for key, value in attrs.items():
            trial.set_user_attr(key, value)
