"""What all drawings share: panels, words, order, and cells with their intervals."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, need
from repnoise_kit.stats import summary
from repnoise_kit.style import WORDS, look

Table = Result | pd.DataFrame

KEYS = ["defence", "attack", "group", "metric"]
ATTACKS = ("none", "small", "large")
AXIS_WORDS = {
    "recall": "recall (share of the answer given away)",
    "harmfulness": "harmfulness (local classifier)",
    "refusal": "refusal (share of questions)",
    "utility": "utility (everyday questions)",
    "degenerate": "degenerate answers (share)",
    "perplexity": "perplexity under the base",
    "retain": "retain (nats a token)",
    "noise": "noise (MMD)",
    "ascent": "ascent (nats a token)",
    "total": "total loss",
    "l2": "distance (L2)",
    "relative": "distance, relative to the norm",
    "log_prob": "log-probability (nats a token)",
    "accuracy": "held-out accuracy",
    "selectivity": "selectivity (accuracy - shuffled)",
    "mmd": "MMD to its Gaussian",
    "cka": "linear CKA",
    "gap": "loss above the lowest (nats a token)",
    "grad_norm": "norm of the gradient",
}


def points(
    ax: Axes,
    at: Sequence[float],
    rows: pd.DataFrame,
    chosen: dict[str, Any],
    kwargs: dict[str, Any],
) -> ErrorbarContainer:
    """Draw cells as marks with their intervals."""
    reach = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(min=0)
    chosen = {"capsize": 3} | merged(chosen, kwargs)
    return ax.errorbar(at, rows["value"], yerr=reach, **chosen)


def merged(chosen: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Put the caller's keywords over ours, whichever alias they use."""
    return chosen | normalize_kwargs(kwargs, Line2D)


def frame_of(result: Table) -> pd.DataFrame:
    """Return the table; what `evaluate` alone returns is one model, as it is."""
    table = result.frame if isinstance(result, Result) else result
    untold = {"defence": table.get("model", "this model"), "attack": "as it is"}
    return table.assign(**{name: word for name, word in untold.items() if name not in table})


def summarised(result: Table, metric: str, group: str) -> pd.DataFrame:
    """Return one row a defence and attack, of per-question rows or of their summary."""
    table = rows_of(need(frame_of(result), *KEYS, "value"), metric, group)
    cells = table if {"low", "high"} <= set(table.columns) else summary(need(table, "prompt"))
    if "seed" in cells:
        # One row a cell: over all seeds, or of its only one.
        pooled = cells["seed"].astype(str) == "all"
        cells = cells[pooled | ~cells.duplicated(KEYS, keep=False)]
    if len(cells) < len(table.drop_duplicates(KEYS)):
        raise KitError("a cell has several seeds and no row over all; give per-question rows")
    return cells


def rows_of(table: pd.DataFrame, metric: str, group: str) -> pd.DataFrame:
    """Return the rows of one metric and group, or say which there are."""
    rows = table[(table["metric"] == metric) & (table["group"] == group)]
    if rows.empty:
        there = sorted({*zip(table["metric"], table["group"], strict=True)})
        raise KitError(f"the table has no {metric!r} of group {group!r}, only {there}")
    return rows


def axes_of(ax: Axes | None) -> Axes:
    """Return the axes that were given, or those of a new figure."""
    return plt.subplots()[1] if ax is None else ax


def panels_of(axes: Sequence[Axes] | None, count: int) -> np.ndarray:
    """Return the panels that were given, or those of a new figure, side by side."""
    if axes is None:
        size = (4.2 * count, 3.4)
        return plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")[1][0]
    return counted(axes, count)


def counted(axes: Any, count: int) -> np.ndarray:
    """Return the panels that were given, or say how many there should be."""
    panels = np.asarray(axes, dtype=object).ravel()
    if len(panels) != count:
        raise KitError(f"this drawing has {count} panels, and {len(panels)} axes were given")
    return panels


def in_order(names: Iterable[str]) -> list[str]:
    """Return defences as they are always listed, the undefended first and unknown ones last."""
    known = list(WORDS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def ordered_attacks(attacks: Iterable[str]) -> list[str]:
    """Return attacks by their strength, unknown ones last."""
    known = {name: place for place, name in enumerate(ATTACKS)}
    return sorted(attacks, key=lambda name: (known.get(name, len(known)), name))


def budget_words(lr: float, examples: int) -> str:
    """Write a budget on two lines; 0 examples are before any attack."""
    if not examples:
        return "before"
    return np.format_float_scientific(lr, trim="-", exp_digits=1) + f"\n{examples:,}"


def attack_words(name: str) -> str:
    """Say an attack as a reader would."""
    words = {"none": "before", "small": "small attack", "large": "large attack"}
    return words.get(name, name)


def cells_of(table: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Return one row a cell, over all its seeds and questions: `keys`, `value, low, high`.

    Rows of one seed and question are averaged first. Where there is one of each there is no
    interval.
    """
    if table.empty:
        raise KitError(f"there are no rows to draw by {', '.join(keys)}; look at the table")
    unit = [name for name in ("prompt", "split") if name in table][:1]
    full = table if "seed" in table else table.assign(seed=0)
    keys = list(keys)
    rows = full.groupby([*keys, "seed", *unit], sort=False, as_index=False)["value"].mean()
    cells = summary(rows, by=keys)
    return cells[(cells["seed"] == "all") | ~cells.duplicated(keys, keep=False)]


def band(ax: Axes, x: Any, cells: pd.DataFrame, chosen: dict[str, Any]) -> None:
    """Draw a line through cells, and their intervals as a band around it."""
    ax.plot(x, cells["value"], **chosen)
    ax.fill_between(x, cells["low"], cells["high"], color=chosen["color"], alpha=0.15, linewidth=0)


def beside(
    panels: Sequence[Axes] | np.ndarray, place: int, *, new: bool, title: str | None = None
) -> None:
    """Put one legend of all panels beside one of them in a new figure, which has room; else in it.

    Args:
        panels: All of them: what is drawn in several is named once.
        place: Which one has the legend.
        new: Whether the figure is ours.
        title: Of the legend.
    """
    named = {}
    for ax in panels:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    options: dict[str, Any] = {"handles": named.values(), "labels": named.keys()}
    options |= {"fontsize": 8, "title": title, "title_fontsize": 8}
    if new:
        options |= {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    panels[place].legend(**options)


def by_attack(table: pd.DataFrame, axes: Sequence[Axes] | None) -> dict[str, Axes]:
    """Return a panel for each attack, titled where there are several; a shared height if new."""
    attacks = ordered_attacks(table["attack"].unique())
    if axes is None:
        size = (4.0 * len(attacks) + 1.8, 3.4)
        axes = plt.subplots(
            1, len(attacks), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )[1][0]
    found = dict(zip(attacks, counted(axes, len(attacks)), strict=True))
    for name, ax in found.items():
        if len(attacks) > 1:
            ax.set_title(attack_words(name), fontsize=10)
    return found


def by_model(table: pd.DataFrame, axes: Any = None) -> dict[tuple[str, str], Axes]:
    """Return a panel for each defence (columns, titled) and attack (rows)."""
    names = in_order(table["defence"].unique())
    attacks = ordered_attacks(table["attack"].unique())
    if axes is None:
        size = (2.1 * len(names) + 2.2, 2.2 * len(attacks) + 0.6)
        options: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False}
        options |= {"layout": "constrained"}
        axes = plt.subplots(len(attacks), len(names), figsize=size, **options)[1]
    panels = counted(axes, len(attacks) * len(names)).reshape(len(attacks), len(names))
    found = {}
    for row, attack in enumerate(attacks):
        for column, name in enumerate(names):
            found[name, attack] = ax = panels[row, column]
            if row == 0 and len(names) > 1:
                ax.set_title(look(name)["label"], fontsize=10)
    return found


def one_attack(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table, or refuse one of several attacks."""
    if table["attack"].nunique() > 1:
        raise KitError("this table has several attacks; choose the rows of one")
    return table
