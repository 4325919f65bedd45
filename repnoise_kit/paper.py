"""The published numbers, and ours beside them: what replicates, what does not, what is open."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, need
from repnoise_kit.stats import compare_cells
from repnoise_kit.store import data_dir

ALIKE = 0.05
"""Two published numbers that differ by no more are taken to claim no difference: the paper gives
no intervals, and its own seeds move by about this much (Table 19)."""

SMALL = 0.1
"""An interval of ours that lies wholly within this of 0 is taken to show no difference."""


def table(name: str) -> pd.DataFrame:
    """Return a published table as it was printed, one row a number.

    Columns: `defence` and others that tell its cells apart (`lr` and `examples` of the attack, 0
    examples before any), then `metric`, `value`, and `note`: what is known to be wrong with the
    number or unclear about it, else empty.

    Args:
        name: One of `tables()["name"]`: `resistance` is Table 1.

    Raises:
        KitError: there is no such table.
    """
    names = tables()["name"].tolist()
    if name not in names:
        raise KitError(f"the paper has no table {name!r} here; there are {', '.join(names)}")
    return _read(name).copy()


def tables() -> pd.DataFrame:
    """Return the list of published tables: `name, number, title, setting, metric`."""
    return _read("tables").copy()


def compare(result: Result | pd.DataFrame, name: str = "resistance", group: str = "seen") -> Result:
    """Judge each ordering of a published table by our own rows.

    A claim is the direction of a difference at one budget: of every defence against none, and of
    RepNoise against every other. Budgets are matched by rank (the lowest learning rate with the
    lowest, the larger size with the larger), for their units differ with the model.

    Args:
        result: What `resistance_grid` returns.
        name: `resistance`, the only table with a comparison so far.
        group: `seen`, the paper's main setting, or `unseen`.

    Returns:
        One row a claim and metric (`recall`, `harmfulness`; the paper's own is harmfulness):
        `metric, treated, control, lr, examples, paper_lr, paper_examples, theirs` (treated minus
        control), `claim` (`lower`, `higher`, `alike`), `value, low, high, p_holm, words` (ours,
        corrected over the budgets), and `verdict`: `replicates`, `does not`, `cannot tell`.
    """
    if name != "resistance":
        raise KitError(f"there is no comparison with table {name!r} yet; there is 'resistance'")
    frame = result.frame if isinstance(result, Result) else result
    need(frame, "defence", "group", "lr", "examples", "metric", "value", "seed", "prompt")
    ours = frame[(frame["group"] == group) & (frame["examples"] > 0)]
    if ours.empty:
        raise KitError(f"the result has no attack on group {group!r}")
    theirs = _printed(name, ours)
    found = []
    for metric in ("recall", "harmfulness"):
        rows = ours[ours["metric"] == metric]
        for treated, control in _claims(theirs, set(rows["defence"])):
            tested = compare_cells(rows, {"defence": treated}, {"defence": control})
            for row in tested.to_dict("records"):
                printed = theirs.loc[(row["lr"], row["examples"])]
                gap = round(printed[treated] - printed[control], 4)
                claim = "alike" if abs(gap) <= ALIKE else "lower" if gap < 0 else "higher"
                found.append(
                    {"metric": metric, "treated": treated, "control": control}
                    | {"lr": row["lr"], "examples": row["examples"]}
                    | {"paper_lr": printed["paper_lr"], "paper_examples": printed["paper_examples"]}
                    | {"theirs": gap, "claim": claim}
                    | {name: row[name] for name in ("value", "low", "high", "p_holm", "words")}
                    | {"verdict": _judged(claim, row)}
                )
    if not found:
        raise KitError("the result has no two defences of the table, or neither of its metrics")
    made_with: dict[str, Any] = {"table": name, "group": group}
    return Result(pd.DataFrame(found), made_with)


def _printed(name: str, ours: pd.DataFrame) -> pd.DataFrame:
    """Return the published numbers by our budgets: a row a budget, a column a defence."""
    printed = table(name)
    # Vaccine was run with two strengths that differ by nothing; the first stands for both.
    first = (printed["rho"].isna() | (printed["rho"] == 1)) & (printed["examples"] > 0)
    wide = printed[first].pivot(index=["lr", "examples"], columns="defence", values="value")
    wide = wide.reset_index().rename(columns={"lr": "paper_lr", "examples": "paper_examples"})
    for column in ("lr", "examples"):
        mine, their = np.sort(ours[column].unique()), np.sort(wide[f"paper_{column}"].unique())
        if len(mine) != len(their):
            raise KitError(
                f"Table 1 has {len(their)} values of {column} and the result {len(mine)}; a "
                "comparison by rank needs as many"
            )
        wide[column] = wide[f"paper_{column}"].map(dict(zip(their, mine, strict=True)))
    return wide.set_index(["lr", "examples"])


def _claims(theirs: pd.DataFrame, there: set[str]) -> list[tuple[str, str]]:
    names = [name for name in theirs.columns if name in there]
    by_repnoise = [("repnoise", name) for name in names if name != "repnoise"]
    against_none = [(name, "none") for name in names if name not in ("none", "repnoise")]
    return [
        *(by_repnoise if "repnoise" in names else []),
        *(against_none if "none" in names else []),
    ]


def _judged(claim: str, row: dict[str, Any]) -> str:
    said = row["words"].split(",")[0]
    none = row["low"] > -SMALL and row["high"] < SMALL
    if claim == "alike":
        return (
            "replicates" if none else "does not" if said in ("lower", "higher") else "cannot tell"
        )
    if said in ("lower", "higher"):
        return "replicates" if said == claim else "does not"
    return "does not" if none else "cannot tell"


@cache
def _read(name: str) -> pd.DataFrame:
    frame = pd.read_csv(data_dir() / "paper" / f"{name}.csv", keep_default_na=False, na_values=[""])
    return frame.assign(note=frame["note"].fillna("")) if "note" in frame else frame
