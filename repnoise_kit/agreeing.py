"""How far do two judges of the same answers agree?"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.metrics import cohen_kappa_score

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, need


def agreement(
    result: Result | pd.DataFrame,
    one: str,
    other: str,
    threshold: float = 0.5,
    by: Sequence[str] = (),
) -> pd.DataFrame:
    """Tell how far two judges agree about the same answers.

    Args:
        result: Per-question rows: `metric, value, seed, prompt`, the columns of `by`, and `group`
            where there is one.
        one: A metric.
        other: Another metric.
        threshold: Above it an answer counts as harmful.
        by: What tells cells apart: `("defence", "attack")`.

    Returns:
        One row a cell: the columns of `by`, then `one, other, n, pearson, spearman, cohen_kappa,
        agree` (the share of answers on the same side of the threshold), `mean_one, mean_other`.
        A correlation with a constant, and the kappa of judges that both know one side only, are
        NaN.

    Raises:
        KitError: no such metric, or an answer that only one of them has judged.
    """
    frame = result.frame if isinstance(result, Result) else result
    need(frame, "metric", "value", "seed", "prompt", *by)
    for name in (one, other):
        if not (frame["metric"] == name).any():
            listed = ", ".join(map(str, frame["metric"].unique()))
            raise KitError(f"there is no metric {name!r}; there are {listed}")
    keys = list(dict.fromkeys([*by, "seed", "prompt", *(["group"] if "group" in frame else [])]))
    both = _paired(frame, one, other, keys)
    cells = [both] if not by else [c for _, c in both.groupby(list(by), sort=False, dropna=False)]
    rows = [
        {name: cell[name].iloc[0] for name in by}
        | {"one": one, "other": other}
        | _agreed(cell["value_one"].to_numpy(), cell["value_other"].to_numpy(), threshold)
        for cell in cells
    ]
    return pd.DataFrame(rows)


def _paired(frame: pd.DataFrame, one: str, other: str, keys: list[str]) -> pd.DataFrame:
    if one == other:
        raise KitError(f"{one!r} always agrees with itself; name two metrics")
    tables = []
    for name in (one, other):
        rows = frame.loc[frame["metric"] == name, [*keys, "value"]]
        if rows.duplicated(keys).any():
            raise KitError(
                f"{name}: a prompt comes twice in one seed; add to `by` what tells them apart"
            )
        if rows["value"].isna().any():
            raise KitError(f"{name} has no value in row {rows.index[rows['value'].isna()][0]}")
        tables.append(rows)
    every = tables[0].merge(tables[1], on=keys, how="outer", indicator=True)
    alone = every.loc[every["_merge"] != "both", "prompt"]
    if len(alone):
        raise KitError(
            f"{len(alone)} answers are judged by only one of {one} and {other} (the first has the "
            f"prompt {alone.iloc[0]!r}); compare metrics of the same answers"
        )
    return tables[0].merge(tables[1], on=keys, suffixes=("_one", "_other"))


def _agreed(one: np.ndarray, other: np.ndarray, threshold: float) -> dict[str, float]:
    sides = one > threshold, other > threshold
    mixed = len(np.unique(np.concatenate(sides))) > 1
    return {
        "n": len(one),
        "pearson": _correlation(one, other),
        "spearman": _correlation(rankdata(one), rankdata(other)),
        "cohen_kappa": float(cohen_kappa_score(*sides)) if mixed else np.nan,
        "agree": float((sides[0] == sides[1]).mean()),
        "mean_one": float(one.mean()),
        "mean_other": float(other.mean()),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if not np.ptp(one) or not np.ptp(other):
        return np.nan
    return float(np.corrcoef(one, other)[0, 1])
