"""Who may see which question: defence, attack and evaluation, told apart by thing."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.overlap import near_duplicates
from repnoise_kit.pairs import Pairs

PARTS = ("attack", "seen", "unseen")
MOST_EVALUATED = 150
"""Things of each group that are evaluated, where a file does not say: 300 in all, as the paper."""


@dataclass(frozen=True)
class Splits:
    """Pairs by who sees them. No attack ever sees a thing that is evaluated."""

    defence: Pairs
    """What the defence trains on: the things of `attack` and of `seen`, as in the paper."""
    attack: Pairs
    """What the attacker trains on."""
    seen: Pairs
    """Evaluated, one question a thing; the defence saw these things, in another wording where
    there is one."""
    unseen: Pairs
    """Evaluated, one question a thing; the defence never saw these things."""

    def __post_init__(self) -> None:
        """Refuse any overlap beyond what `seen` allows."""
        evaluated = pd.concat([self.seen.frame, self.unseen.frame])
        check_apart(self.attack.frame, evaluated, "the attack", "the evaluation")
        check_apart(self.defence.frame, self.unseen.frame, "the defence", "the group 'unseen'")


def split(pairs: Pairs, seed: int = 0) -> Splits:
    """Split pairs by thing: those the file marks, or a draw (70 % attack, 15 % seen, 15 % unseen).

    Of an evaluated thing with several questions one, drawn with the seed, is asked and never
    trained on.

    Raises:
        KitError: a thing or question in two splits, or a split that would be empty.
    """
    check_whole(seed=seed)
    frame = pairs.frame
    part = _marked(frame) if "split" in frame else _drawn(frame, seed)
    chosen = {name: frame[part == name] for name in PARTS}
    for name, rows in chosen.items():
        if rows.empty:
            raise KitError(
                f"no pair is left for {name!r} of {frame['thing'].nunique()} things; give more"
            )
    asked = {name: one_question(chosen[name], seed) for name in ("seen", "unseen")}
    others = chosen["seen"][~chosen["seen"]["prompt"].isin(asked["seen"]["prompt"])]
    # A thing with a single wording is one the defence has seen in that very wording.
    only = asked["seen"][~asked["seen"]["thing"].isin(others["thing"])]
    defence = pd.concat([chosen["attack"], others, only])
    return Splits(*(Pairs(_clean(f)) for f in (defence, chosen["attack"], *asked.values())))


def withhold(
    splits: Splits, what: str, groups: Mapping[str, Sequence[str]] | None = None
) -> Splits:
    """Return splits whose defence never sees something, and whose other parts are all about it.

    Args:
        splits: Of all there is.
        what: A name of `groups`, a category, or `half`: a random half of the things that any
            training may see, and what is evaluated as unseen.
        groups: Categories that are withheld together, by a name.

    Raises:
        KitError: there is no such category, or a part would be empty.
    """
    seen, unseen = splits.seen.frame, splits.unseen.frame
    evaluated = pd.concat([seen, unseen], ignore_index=True)
    every = pd.concat([splits.defence.frame, splits.attack.frame, evaluated])
    if what == "half":
        things = pd.concat([splits.attack.frame, seen])["thing"].drop_duplicates()
        order = np.random.default_rng(0).permutation(len(things))
        chosen = {*things.iloc[order[: len(things) // 2]], *unseen["thing"]}
        wanted = set(every["category"])
    else:
        wanted = {*(groups or {}).get(what, [what])}
        if not wanted & set(every["category"]):
            there = set(every["category"])
            named = [name for name, held in (groups or {}).items() if there & set(held)]
            listed = ", ".join([*named, *sorted(there - {""}), "half"])
            raise KitError(f"there is no category {what!r} to withhold; there are {listed}")
        chosen = set(every.loc[every["category"].isin(wanted), "thing"])
    told = splits.defence.frame[~splits.defence.frame["thing"].isin(chosen)]
    attack, asked = (
        rows[rows["thing"].isin(chosen) & rows["category"].isin(wanted)]
        for rows in (splits.attack.frame, evaluated)
    )
    parts = {"the defence": told, "the attack": attack, "the evaluation": asked}
    for name, rows in parts.items():
        if rows.empty:
            raise KitError(f"withholding {what!r} leaves nothing for {name}; give more pairs")
    # In other words it is the same question; what all questions begin with is no part of them.
    start = len(_common_start(every["prompt"].tolist()))
    others = [prompt[start:] for prompt in [*attack["prompt"], *asked["prompt"]]]
    close = near_duplicates([prompt[start:] for prompt in told["prompt"]], others)["one"]
    told = told.drop(index=told.index[close.unique()])
    if told.empty:
        raise KitError(f"everything left is nearly the same as what is withheld as {what!r}")
    left = (told, attack, evaluated[:0], asked)
    return Splits(*(Pairs(rows.reset_index(drop=True)) for rows in left))


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    alike = [one == other for one, other in zip(first, last, strict=False)]
    return first[: [*alike, False].index(False)]


def one_question(frame: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return one row of each thing, drawn with the seed: the same whatever else the table holds."""
    marks = [hashlib.sha256(f"{seed} {prompt}".encode()).digest() for prompt in frame["prompt"]]
    order = sorted(range(len(frame)), key=marks.__getitem__)
    return frame.iloc[order].drop_duplicates("thing").drop_duplicates("prompt").sort_index()


def check_apart(one: pd.DataFrame, other: pd.DataFrame, here: str, there: str) -> None:
    """Refuse two tables that share a question or a thing, naming the first rows that do."""
    for column in ("prompt", "thing"):
        shared = one[one[column].isin(other[column])]
        if len(shared):
            rows = ", ".join(map(str, shared.index[:5])) + (", …" if len(shared) > 5 else "")
            raise KitError(
                f"{here} and {there} share {len(shared)} rows by {column} (rows {rows}; first: "
                f"{shared[column].iloc[0]!r}); keep each {column} in one of them"
            )


def _marked(frame: pd.DataFrame) -> pd.Series:
    unknown = frame[~frame["split"].isin(PARTS)]
    if len(unknown):
        raise KitError(
            f"row {unknown.index[0] + 1}: split is {unknown['split'].iloc[0]!r}; it must be one of "
            + ", ".join(PARTS)
        )
    for column in ("thing", "prompt"):
        several = frame.groupby(column)["split"].nunique()
        if (several > 1).any():
            name = several[several > 1].index[0]
            rows = ", ".join(str(row + 1) for row in frame.index[frame[column] == name][:5])
            raise KitError(f"{column} {name!r} is in two splits (rows {rows}); keep it in one")
    return frame["split"]


def _drawn(frame: pd.DataFrame, seed: int) -> pd.Series:
    things = frame["thing"].drop_duplicates().to_numpy()
    order = np.random.default_rng(seed).permutation(things)
    each = min(MOST_EVALUATED, round(0.15 * len(things)))
    part = dict.fromkeys(order, "attack")
    part |= dict.fromkeys(order[:each], "seen") | dict.fromkeys(order[each : 2 * each], "unseen")
    return frame["thing"].map(part)


def _clean(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="split", errors="ignore").reset_index(drop=True)
