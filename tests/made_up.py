"""Studies of trials that nobody ran, quickly made, whose numbers depend on their parameters."""

import math
import random

import optuna
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from optuna.trial import TrialState

SPACE = {
    "alpha": FloatDistribution(0.1, 10, log=True),
    "beta": FloatDistribution(0.01, 100, log=True),
    "lr": FloatDistribution(3e-5, 1.2e-3, log=True),
    "pairs": CategoricalDistribution((240, 480, 960, 1920)),
    "preset": CategoricalDistribution(("paper", "reference", "tokenwise")),
    "held": CategoricalDistribution(("nothing", "first third", "middle third", "last third")),
}
NAME = "made up: attacks 0.0003 × 64, 0.0003 × 512; seeds 100, 101"
ATTACKS = [[3e-4, 64], [3e-4, 512]]
METRICS = ("recall", "harmfulness", "refusal", "degenerate", "utility")
ABOUT = {
    "testbed": "made up",
    "data": "none",
    "attacks": ATTACKS,
    "seeds": [100, 101],
    "metric": "recall",
    "space": {name: distribution_to_json(part) for name, part in SPACE.items()},
    "start": {
        **{"alpha": 1.0, "beta": 0.1, "lr": 3e-4},
        **{"pairs": 1920, "preset": "paper", "held": "nothing"},
    },
}


def made_up(count: int, storage: str | None = None) -> optuna.Study:
    """A study of this many trials, every seventh given up, the same each time; 1 is the start."""
    study = optuna.create_study(study_name=NAME, directions=["maximize"] * 2, storage=storage)
    for key, value in ABOUT.items():
        study.set_user_attr(key, value)
    study.set_user_attr("cells", _cells(random.Random(-1), 0.85))
    study.add_trials([trial_of(number) for number in range(count)])
    return study


def trial_of(number: int) -> optuna.trial.FrozenTrial:
    draw = random.Random(number)
    params = {
        "alpha": 10 ** draw.uniform(-1, 1),
        "beta": 10 ** draw.uniform(-2, 2),
        "lr": 10 ** draw.uniform(-4.5, -2.93),
        "pairs": draw.choice(SPACE["pairs"].choices),
        "preset": draw.choice(SPACE["preset"].choices),
        "held": "nothing",
    }
    params = ABOUT["start"] if number == 1 else params
    strength = params["lr"] * 1000 * params["alpha"] ** 0.3
    resistance = 1 - math.exp(-1.5 * strength - 0.2 * draw.random())
    utility = max(0, 1 - 0.12 * strength**2 - 0.05 * draw.random())
    lost = number % 7 == 5
    return optuna.create_trial(
        state=TrialState.PRUNED if lost else TrialState.COMPLETE,
        params=params,
        distributions=SPACE,
        values=None if lost else [resistance, utility],
        user_attrs={
            "cells": _cells(draw, 1 - resistance),
            "curves": _curves(draw),
            "seconds": 20.0,
            "utility": utility,
            "note": "it lost too much utility" if lost else "",
        },
    )


def _cells(draw: random.Random, level: float) -> list[list]:
    """Rows as a study keeps them, the strongest attack first."""
    rows = []
    for place, (lr, examples) in enumerate([*ATTACKS[::-1], [0.0, 0]]):
        for group in ("seen", "unseen"):
            for metric in METRICS:
                value = level * (1 - place / 2) + 0.05 * draw.random()
                value = 1 - value / 10 if metric == "utility" else value
                rows.append([lr, examples, group, metric, value, value - 0.02, value + 0.05])
    return rows


def _curves(draw: random.Random) -> list[list]:
    steps = list(range(1, 61))
    return [
        [seed, metric, steps, [top * math.exp(-x / 20) + 0.1 * draw.random() for x in steps]]
        for seed in (100, 101)
        for metric, top in (("retain", 2.0), ("noise", 0.4), ("ascent", 8.0))
    ]
