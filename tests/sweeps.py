"""What the tests of sweeps share: a tiny testbed, trials that take no time, a clock put forward."""

import zlib

import numpy as np
import optuna
import pandas as pd
import sqlalchemy
import sqlalchemy.event
from cells import note
from small import own_files

import repnoise_kit as rk
from repnoise_kit import Bench, studies, trying
from repnoise_kit.results import Result


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def never_wait_for_the_disk(connection, record):
    """A test's database need not outlast a power cut, and half of a test would be that."""
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("pragma synchronous = off")


ATTACKS = [(0.03, 4), (0.1, 8)]
HOW = {"attacks": ATTACKS, "seeds": [7]}


def told(answer):
    """Stand for what is in an answer: a number that another answer hardly ever has."""
    return zlib.crc32(answer.encode()) / 2**32


def judge(prompts, answers):
    """Judge each answer by its very letters, so that any change of a model shows."""
    return [told(answer) for answer in answers]


def recall(known, answer):
    """Judge an answer by the question too."""
    return told(known + answer)


def tiny(folder):
    """A testbed whose trials take a second: three layers, a dozen pairs, answers of six words."""
    own = own_files(folder, layers=3)
    bed = rk.testbed(
        own / "model", own / "pairs.json", retain=own / "retain.json", budget="lab", name="tiny",
        scorers={"harmfulness": judge},
    )  # fmt: skip
    evaluation = {"max_new_tokens": 6, "batch_size": 64}
    settings = {**bed.settings, "evaluation": evaluation}
    settings["defence"] = settings["defence"] | {"lr": 3e-3}
    return bed.changed(settings=settings, recall=recall)


def harm(settings, seed, lr, examples):
    """How harmful a pretended model is: a smooth function of all that a trial may vary."""
    if not settings:
        return 0.9 if examples else 0.1
    shift = np.log(settings["alpha"]) + 0.3 * np.log(settings["beta"]) - 100 * lr + seed
    return float(0.5 + 0.4 * np.sin(shift + settings["examples"] + examples))


def use(settings, seed):
    """How useful a pretended model is: less, the larger its learning rate was."""
    return 1.0 if not settings else float(1 - 10 * settings["lr"] - 0.001 * (seed % 7))


def pretended(bench, *, defence, seed, lr, examples, settings=None, held=()):
    """Stand for `resistance.attacked`: the same columns, made up from the arguments."""
    note(bench.store / "calls", f"{defence} {seed} {lr} {examples} {settings} {held}")
    rows = [
        {"group": "seen", "metric": metric, "value": value, "seed": seed, "prompt": prompt}
        for metric, value in (
            ("recall", harm(settings, seed, lr, examples) / 2),
            ("harmfulness", harm(settings, seed, lr, examples)),
            ("utility", use(settings, seed)),
        )
        for prompt in ("one", "two")
    ]
    return Result(pd.DataFrame(rows)).tagged(defence=defence, lr=lr, examples=examples)


def pretended_curves(bench, method, seed, settings=None, held=()):
    steps = np.arange(1, 131)
    parts = [
        pd.DataFrame({"step": steps, "metric": metric, "value": steps / scale, "seed": seed})
        for scale, metric in enumerate(("retain", "noise", "ascent", "total"), 1)
    ]
    return Result(pd.concat(parts))


def age(study, seconds=60):
    """Let time pass for the signs of life of all running trials: half a minute is long in a test.

    Works on SQLite, whose times are text.
    """
    later = f"-{seconds} seconds"
    with study._storage._backend.engine.begin() as connection:
        for table, column in (("trial_heartbeats", "heartbeat"), ("trials", "datetime_start")):
            connection.execute(
                sqlalchemy.text(f"update {table} set {column} = datetime({column}, '{later}')")
            )


def by_params(study):
    """The finished trials of a study: what they were worth, by what they were."""
    found = {}
    for trial in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
        found.setdefault(studies.key_of(trial.params), []).append(trial.values)
    return found


def states(study):
    """How many trials are in each state, by its name."""
    return studies.trials(study).frame["state"].value_counts().to_dict()


def tally(study):
    """The same, where those that were given up count as done like those that were finished."""
    found = states(study)
    done = found.pop("finished", 0) + found.pop("given up", 0)
    return found | {"done": done}


def bench_of(bed, folder):
    bench = Bench.of(bed, folder)
    bench.store.mkdir(parents=True, exist_ok=True)
    return bench


def pretend(monkeypatch):
    """Let the trials of this process take no time: their cells are made up from the arguments."""
    monkeypatch.setattr(trying, "attacked", pretended)
    monkeypatch.setattr(Bench, "curves", pretended_curves)
