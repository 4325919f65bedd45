"""Linear probes: what can be read off a layer by a straight line, and what a probe makes up."""

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm.auto import tqdm

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result

HELD_OUT = 0.2
"""The share of the groups that a probe is judged on, as in the paper (Appendix G)."""


def probe(
    activations: Float[Tensor, "layer sample d_model"],
    labels: Sequence[str],
    groups: Sequence[object],
    *,
    seeds: Sequence[int] = range(10),
    progress: str | None = None,
) -> Result:
    """Train a linear probe on each layer and judge it on groups it never saw (Figures 5 and 6).

    Logistic regression on standardised activations, by scikit-learn. A fifth of the *groups* is
    held out, so that no text of theirs is trained on. Beside each probe stands one whose labels
    were dealt out at random: what that reaches, a probe makes up (Hewitt and Liang, 2019).

    Args:
        activations: One vector a layer and text: `answer_activations(…).values`.
        labels: Two kinds: `harmful` and `harmless`; or `harmful` and `harmful of another`, which
            have the same words, so that only knowing the answer tells them apart.
        groups: By row, what no split divides: `company` or `thing` of `answer_activations(…)`'s
            table. A split by rows would show the probe each answer in other words.
        seeds: Each draws a split and a deal.
        progress: Words for a bar; no bar without.

    Returns:
        One row a layer, split and metric: `layer`, `split` (its seed), `metric` (`accuracy` on the
        held-out groups; `chance`, the share of their commonest label; `shuffled`, the accuracy of
        the control; `selectivity`, accuracy minus shuffled), `value`. Splits share texts, so that
        they vary less than fresh texts would.

    Raises:
        KitError: not two kinds of labels, numbers of rows that differ, or too few groups.
    """
    truth, members = np.asarray(labels), np.asarray(groups)
    _check(len(activations[0]), truth, members)
    rows = []
    # Fits this small lose more by dividing their work between threads than they win.
    with threadpool_limits(1, "blas"):
        for seed in tqdm(seeds, desc=progress, disable=progress is None, unit="seed"):
            rows += _of_one_split(activations, truth, members, seed)
    return Result(pd.DataFrame(rows), {"analysis": "probe", "seeds": list(seeds)})


def _of_one_split(
    activations: Float[Tensor, "layer sample d_model"],
    truth: np.ndarray,
    members: np.ndarray,
    seed: int,
) -> list[dict[str, str | float]]:
    train, test = _split(truth, members, seed)
    dealt = _dealt(truth, members, seed)
    chance = float(np.unique(truth[test], return_counts=True)[1].max() / len(test))
    rows: list[dict[str, str | float]] = []
    for layer, values in enumerate(activations):
        accuracy, shuffled = (_accuracy(values.numpy(), y, train, test) for y in (truth, dealt))
        found = {"accuracy": accuracy, "chance": chance, "shuffled": shuffled}
        found["selectivity"] = accuracy - shuffled
        tags = {"layer": layer, "split": seed}
        rows += [tags | {"metric": name, "value": value} for name, value in found.items()]
    return rows


def _check(samples: int, truth: np.ndarray, members: np.ndarray) -> None:
    if not samples == len(truth) == len(members):
        raise KitError(
            f"{samples} activations have {len(truth)} labels and {len(members)} groups; "
            "give as many of each"
        )
    kinds = np.unique(truth)
    if len(kinds) != 2:
        raise KitError(
            f"a probe tells 2 labels apart, not {len(kinds)}: {', '.join(map(str, kinds))}"
        )
    if len(np.unique(members)) < 5:
        raise KitError("a probe needs 5 groups, to hold a fifth of them out; give more")


def _split(truth: np.ndarray, groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    splitter = GroupShuffleSplit(1, test_size=HELD_OUT, random_state=seed)
    train, test = next(splitter.split(truth, groups=groups))
    if len(np.unique(truth[train])) < 2:
        raise KitError(
            f"with seed {seed} all texts to train on have one label; give more groups of each"
        )
    return train, test


def _dealt(truth: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return labels dealt out at random: within each group that has several, else among groups.

    The second so that the control has it as easy as a probe that learns groups.
    """
    draw = np.random.default_rng(seed)
    dealt = truth.copy()
    of_one_label = []
    for group in np.unique(groups):
        mine = np.flatnonzero(groups == group)
        if len(np.unique(truth[mine])) > 1:
            dealt[mine] = draw.permutation(truth[mine])
        else:
            of_one_label.append(mine)
    for mine, lent in zip(of_one_label, draw.permutation(len(of_one_label)), strict=True):
        dealt[mine] = truth[of_one_label[lent][0]]
    return dealt


def _accuracy(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    # Newton's steps reach the same optimum as the default's in a third of the time.
    fitted = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg"))
    if len(np.unique(y[train])) < 2:  # A deal may leave one label only.
        return float((y[test] == y[train][0]).mean())
    with warnings.catch_warnings():
        # Labels that cannot be separated never converge to the last digit, and need not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit(x[train], y[train])
    return float(fitted.score(x[test], y[test]))
