"""How sure are we: intervals and paired differences over seeds and questions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from repnoise_kit.errors import KitError
from repnoise_kit.results import need

LEVEL = 0.95

_ROUNDING = 1e-12

SHARES = (
    *("recall", "harmfulness", "refusal", "utility", "degenerate", "degenerate_everyday"),
    *("accuracy", "chance", "shuffled", "cka", "rouge1", "exact"),
    # Of the evaluation harness.
    *("acc", "acc_norm", "acc_bytes", "exact_match", "pct_stereotype"),
)
"""Metrics that lie in [0, 1]; a testbed without a judge gives `utility` in nats, below 0."""


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write it as in a table: `0.79 [0.71, 0.87]`."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(table: np.ndarray) -> Interval:
    """Return the mean of a seeds × questions table with a 95 % confidence interval.

    All seeds share the questions, so the two are crossed: the variance of the mean is
    σ²_seed/S + σ²_question/Q + σ²_rest/(S·Q), estimated from the mean squares of the two-way
    table and put on Student's t with Satterthwaite's degrees of freedom. Of one seed, the interval
    is over questions only. Where every value is 0, or every value 1, no spread can be seen, and
    the bound is the exact binomial one over questions.

    Args:
        table: (seeds, questions), no value missing.
    """
    mean = float(table.mean())
    if np.all(table == table.flat[0]) and mean in (0.0, 1.0):
        edge = (1 - LEVEL) / 2
        far = edge ** (1 / table.shape[1])
        return Interval(mean, far if mean else 0.0, 1.0 if mean else 1 - far)
    variance, freedom = _spread(table)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
    return Interval(mean, mean - float(half), mean + float(half))


def p_value(gaps: np.ndarray) -> float:
    """Return the two-sided p of a mean of 0, of a seeds × questions table of paired differences.

    The test that goes with `interval`: the same variance, the same Student's t. Where nothing
    varies, a sign test over the questions.

    Args:
        gaps: (seeds, questions), no value missing.
    """
    if np.ptp(gaps) <= _ROUNDING:
        return 1.0 if abs(gaps.flat[0]) <= _ROUNDING else min(1.0, 2 * 0.5 ** gaps.shape[1])
    variance, freedom = _spread(gaps)
    return float(2 * stats.t.sf(abs(gaps.mean()) / np.sqrt(variance), freedom))


def holm(p: Sequence[float]) -> np.ndarray:
    """Return Holm's (1979) adjusted p of a family of tests, in the order they were given.

    To call those below 0.05 different errs in one of them or more in at most 5 % of families.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def compare_cells(
    frame: pd.DataFrame,
    treated: dict[str, object],
    control: dict[str, object],
    by: Sequence[str] = ("lr", "examples"),
) -> pd.DataFrame:
    """Compare two cells under each of several conditions, with Holm's correction across them.

    Args:
        frame: Per-question rows of one metric and group.
        treated: Columns and the values they have in the one cell: `{"defence": "repnoise"}`.
        control: The same for the other.
        by: Columns that tell the conditions apart: the budgets of an attack.

    Returns:
        One row a condition: the columns of `by`, then `value, low, high` (treated minus control,
        paired by seed and question), `p`, `p_holm`, and `words`: `lower`, `higher` only where both
        the interval and the corrected test say so.
    """
    if need(frame, *by).empty:
        raise KitError("there are no rows to compare")
    rows = []
    for _, cell in frame.groupby(list(by), sort=False):
        gaps, found = _paired(cell, treated, control)
        keys = {name: cell[name].iloc[0] for name in by}
        rows.append(keys | found._asdict() | {"p": p_value(gaps.to_numpy())})
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    cells = table[["value", "low", "high", "p_holm"]].to_numpy()
    table["words"] = [verdict(Interval(*cell[:3]), sure=cell[3] < 1 - LEVEL) for cell in cells]
    return table


def summary(
    frame: pd.DataFrame, by: Sequence[str] = ("defence", "attack", "group", "metric")
) -> pd.DataFrame:
    """Return one row for each cell and seed, and one over all seeds where there are several.

    Args:
        frame: Per-question rows: the columns of `by`, `metric`, `value`, `seed` and `prompt`. Where
            there are no prompts, splits (of a probe, `split`) stand for them, or each seed is one
            measurement.
        by: What tells cells apart.

    Returns:
        The columns of `by`, then `value, low, high, n` (questions), `seed` (`all` where pooled) and
        `over` (what the interval is over: `prompts`, or `seeds and prompts`). Perplexities are
        averaged as logarithms.
    """
    need(frame, *by, "value", "seed")
    unit = "prompts" if "prompt" in frame else "splits" if "split" in frame else ""
    frame, rows = _asked(frame), []
    for _, cell in frame.groupby(list(by), sort=False):
        keys = cell[list(by)].iloc[0].to_dict()
        table = _table(cell)
        pooled = [("all", table)] if len(table) > 1 else []
        for seed, part in [*pooled, *((seed, table.loc[[seed]]) for seed in table.index)]:
            found = _of_metric(part.to_numpy(), keys.get("metric", ""), unit)
            over = " and ".join(["seeds"] * (seed == "all") + [unit] * bool(unit)) or "nothing"
            rows.append(
                keys | found._asdict() | {"n": part.shape[1], "seed": str(seed), "over": over}
            )
    return pd.DataFrame(rows)


def difference(
    frame: pd.DataFrame, treated: dict[str, object], control: dict[str, object]
) -> Interval:
    """Return the mean of treated minus control, paired by seed and question.

    Args:
        frame: Per-question rows of one metric.
        treated: Columns and the values they have in the one cell: `{"defence": "repnoise"}`.
        control: The same for the other.
    """
    return _paired(frame, treated, control)[1]


def _paired(
    frame: pd.DataFrame, treated: dict[str, object], control: dict[str, object]
) -> tuple[pd.DataFrame, Interval]:
    need(frame, *treated, *control, "value", "seed")
    frame = _asked(frame)
    tables = [_table(_cell(frame, cell)) for cell in (treated, control)]
    gaps = tables[0] - tables[1]
    if gaps.size == 0 or gaps.isna().any(axis=None):
        raise KitError(f"{treated} and {control} do not have the same seeds and prompts")
    found = interval(gaps.to_numpy())
    if np.ptp(gaps.to_numpy()) <= _ROUNDING:
        # Nothing varies: the exact bound of a share, on either side.
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / gaps.shape[1])
        found = Interval(found.value, found.value - reach, found.value + reach)
    return gaps, _within(found, -1, 1) if _are_shares(*tables) else found


def verdict(found: Interval, *, sure: bool = True) -> str:
    """Say a difference in words: `lower, by 0.41 [0.33, 0.49]`, `higher, by …`, `within noise`.

    Args:
        found: The difference.
        sure: A corrected test calls it different too.
    """
    if np.isnan(found.low) or np.isnan(found.high):
        return f"too few questions to say ({found.value:+.2f})"
    if found.low > 0 and sure:
        return f"higher, by {found}"
    if found.high < 0 and sure:
        return f"lower, by {Interval(-found.value, -found.high, -found.low)}"
    return f"within noise ({found.value:+.2f} [{found.low:.2f}, {found.high:.2f}])"


def _spread(table: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean of a seeds × questions table, and its degrees of freedom."""
    if min(table.shape) > 1:
        return _crossed(table)
    return (table.var(ddof=1) / table.size if table.size > 1 else np.nan), table.size - 1


def _crossed(table: np.ndarray) -> tuple[float, float]:
    seeds, questions = table.shape
    by_seed, by_question = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - by_seed - by_question + table.mean()
    freedoms = np.array([seeds - 1, questions - 1, (seeds - 1) * (questions - 1)])
    squares = np.array(
        [
            questions * by_seed.var(ddof=1),
            seeds * by_question.var(ddof=1),
            (rest**2).sum() / freedoms[2],
        ]
    )
    # The estimate may fall below either part alone, or below 0: never claim less than a part.
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    if total <= 1e-12 * squares[2]:
        # Seeds and questions that all have the same mean: what is left is all there is.
        return squares[2] / table.size, freedoms[2]
    freedom = total**2 / (squares**2 / freedoms).sum()
    return total / table.size, max(freedom, 1.0)


def _of_metric(table: np.ndarray, metric: str, unit: str) -> Interval:
    if unit != "prompts" and not np.ptp(table):
        # Splits that all reach 1.0 do so on many texts each: not one success in ten.
        value = float(table.mean())
        return Interval(value, value, value) if table.size > 1 else Interval(value, np.nan, np.nan)
    if metric == "perplexity":
        return Interval(*(float(np.exp(bound)) for bound in interval(np.log(table))))
    found = interval(table)
    return _within(found, 0, 1) if metric in SHARES and _are_shares(table) else found


def _are_shares(*tables: np.ndarray | pd.DataFrame) -> bool:
    return all(bool(((table >= 0) & (table <= 1)).all(axis=None)) for table in tables)


def _within(found: Interval, least: float, most: float) -> Interval:
    return Interval(found.value, *(float(np.clip(bound, least, most)) for bound in found[1:]))


def _table(cell: pd.DataFrame) -> pd.DataFrame:
    """Return the seeds × questions table of one cell, which has each of them once."""
    if cell.duplicated(["seed", "prompt"]).any():
        raise KitError(
            "a prompt comes twice in one seed of a cell; add to `by` what tells them apart"
        )
    table = cell.pivot(index="seed", columns="prompt", values="value")
    if table.isna().any(axis=None):
        raise KitError("each seed of a cell needs a value for the same prompts")
    return table


def _asked(frame: pd.DataFrame) -> pd.DataFrame:
    return frame if "prompt" in frame else frame.assign(prompt=frame.get("split", ""))


def _cell(frame: pd.DataFrame, cell: dict[str, object]) -> pd.DataFrame:
    for column, value in cell.items():
        frame = frame[frame[column] == value]
    return frame
