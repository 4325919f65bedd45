"""Draw results: `plot_x(result, *, ax=None, **kwargs) -> Axes`, and nothing but drawing.

A result, or a plain table of the same columns, comes first; `ax=None` means a new figure; several
panels take and return `axes=`. Nothing here shows, saves, fits, or sets a style.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.collections import QuadMesh
from matplotlib.container import ErrorbarContainer
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, need
from repnoise_kit.stats import SHARES, summary
from repnoise_kit.style import look, looks

Table = Result | pd.DataFrame

_KEYS = ["defence", "attack", "group", "metric"]
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
}


def plot_metric(
    result: Table, metric: str, *, group: str = "seen", ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Plot one metric against the strength of the attack, a line with intervals a defence.

    Args:
        result: Per-question rows (`defence, attack, group, metric, value, seed, prompt`) or their
            summary (`defence, attack, group, metric, value, low, high`).
        metric: Which one.
        group: `seen` or `unseen`.
        ax: Where; by default a new figure.
        kwargs: For `Axes.errorbar`.
    """
    ax = _axes(ax)
    cells = _summarised(result, metric, group)
    attacks = _ordered(cells["attack"].unique())
    names = _undefended_first(cells["defence"].unique())
    for place, (name, chosen) in enumerate(looks(names).items()):
        rows = cells[cells["defence"] == name].set_index("attack").reindex(attacks)
        rows = rows.dropna(subset="value")
        shift = 0.06 * (place - (len(names) - 1) / 2)
        _points(ax, [attacks.index(a) + shift for a in rows.index], rows, chosen, kwargs)
    ax.set_xticks(range(len(attacks)), [_attack_words(name) for name in attacks])
    ax.set_xlim(-0.4, len(attacks) - 0.6)
    ax.set_ylabel(AXIS_WORDS.get(metric, metric))
    if metric in SHARES and cells["value"].min() >= 0:
        ax.set_ylim(-0.03, 1.03)
    if names:
        ax.legend(title=f"{group} things")
    return ax


def plot_resistance(
    result: Table, *, group: str = "seen", axes: Sequence[Axes] | None = None, **kwargs: Any
) -> np.ndarray:
    """Plot recall and harmfulness, side by side, against the strength of the attack (Table 1)."""
    panels = _panels(axes, 2)
    for ax, metric in zip(panels, ("recall", "harmfulness"), strict=True):
        plot_metric(result, metric, group=group, ax=ax, **kwargs)
    return panels


def plot_price(
    result: Table, *, group: str = "seen", axes: Sequence[Axes] | None = None, **kwargs: Any
) -> np.ndarray:
    """Plot what a defence costs and whether it broke the model: refusal, utility, degenerate."""
    panels = _panels(axes, 3)
    measured = set(need(_frame(result), "metric")["metric"])
    for ax, metric in zip(panels, ("refusal", "utility", "degenerate"), strict=True):
        if metric in measured:
            plot_metric(result, metric, group=group, ax=ax, **kwargs)
        else:
            ax.text(0.5, 0.5, f"{metric}: not measured", ha="center", va="center")
            ax.set_axis_off()
    return panels


def plot_terms(
    curves: Table, *, axes: Sequence[Axes] | None = None, window: int = 15, **kwargs: Any
) -> np.ndarray:
    """Plot the terms of a defence's loss along its steps: each seed thin, their mean thick.

    Args:
        curves: Columns `step, metric, value, seed`, as `defend_` returns them.
        axes: Three panels: retain, noise, ascent.
        window: Steps the thick line is a running mean of.
        kwargs: For the thick line's `Axes.plot`.
    """
    table = need(_frame(curves), "step", "metric", "value", "seed")
    panels = _panels(axes, 3)
    for ax, term in zip(panels, ("retain", "noise", "ascent"), strict=True):
        rows = table[table["metric"] == term]
        wide = rows.pivot_table(index="step", columns="seed", values="value")
        colour = look(term)["color"]
        ax.plot(wide.index, wide.to_numpy(), color=colour, alpha=0.25, linewidth=0.6)
        smooth = wide.mean(axis=1).rolling(window, min_periods=1).mean()
        ax.plot(smooth.index, smooth, **_merged({"color": colour, "linewidth": 2}, kwargs))
        ax.set_xlabel("step of the defence")
        ax.set_ylabel(AXIS_WORDS[term])
    return panels


def plot_layers(result: Table, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Plot a value by layer, a line a model: columns `model, layer, value`."""
    ax = _axes(ax)
    table = need(_frame(result), "model", "layer", "value")
    for name, chosen in looks(table["model"].unique()).items():
        means = table[table["model"] == name].groupby("layer")["value"].mean()
        ax.plot(means.index, means, **_merged(chosen, kwargs))
    ax.set_xlabel("layer")
    ax.set_ylabel("value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def plot_questions(
    result: Table,
    metric: str = "recall",
    *,
    group: str = "seen",
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot one metric as a map: a row for each defence and attack, a column for each question.

    Columns are sorted by how much the undefended model gives away; several seeds are averaged.
    Keywords go to `Axes.pcolormesh`.
    """
    ax = _axes(ax)
    table = need(_frame(result), "defence", "attack", "group", "metric", "value", "prompt")
    table = _of(table, metric, group)
    wide = table.pivot_table(index=["defence", "attack"], columns="prompt", values="value")
    rows = [
        (name, attack)
        for name in _undefended_first(table["defence"].unique())
        for attack in _ordered(table["attack"].unique())
        if (name, attack) in wide.index
    ]
    wide = wide.reindex(rows)
    first = [row for row in rows if row[0] == rows[0][0]]
    wide = wide[wide.loc[first].sum().sort_values(ascending=False, kind="stable").index]
    chosen: dict[str, Any] = {
        "cmap": "cividis",
        "edgecolor": "white",
        "linewidth": 0.5,
    }
    if "norm" not in kwargs:
        chosen |= {"vmin": 0.0, "vmax": 1.0}
    mesh: QuadMesh = ax.pcolormesh(wide.to_numpy(), **chosen | normalize_kwargs(kwargs, QuadMesh))
    ax.set_yticks(
        np.arange(len(rows)) + 0.5, [f"{look(n)['label']}, {_attack_words(a)}" for n, a in rows]
    )
    ax.invert_yaxis()
    ax.set_xticks([])
    ax.set_xlabel(f"the {wide.shape[1]} questions about {group} things")
    ax.figure.colorbar(mesh, ax=ax, label=metric)
    return ax


def _points(
    ax: Axes,
    at: Sequence[float],
    rows: pd.DataFrame,
    chosen: dict[str, Any],
    kwargs: dict[str, Any],
) -> ErrorbarContainer:
    reach = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(min=0)
    chosen = {"capsize": 3} | _merged(chosen, kwargs)
    return ax.errorbar(at, rows["value"], yerr=reach, **chosen)


def _merged(chosen: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Put the caller's keywords over ours, whichever alias they use."""
    return chosen | normalize_kwargs(kwargs, Line2D)


def _frame(result: Table) -> pd.DataFrame:
    """Return the table; what `evaluate` alone returns is one model, as it is."""
    table = result.frame if isinstance(result, Result) else result
    untold = {"defence": table.get("model", "this model"), "attack": "as it is"}
    return table.assign(**{name: word for name, word in untold.items() if name not in table})


def _summarised(result: Table, metric: str, group: str) -> pd.DataFrame:
    table = _of(need(_frame(result), *_KEYS, "value"), metric, group)
    cells = table if {"low", "high"} <= set(table.columns) else summary(table)
    if "seed" in cells:
        # One row a cell: over all seeds, or of its only one.
        pooled = cells["seed"].astype(str) == "all"
        cells = cells[pooled | ~cells.duplicated(_KEYS, keep=False)]
    if len(cells) < len(table.drop_duplicates(_KEYS)):
        raise KitError("a cell has several seeds and no row over all; give per-question rows")
    return cells


def _of(table: pd.DataFrame, metric: str, group: str) -> pd.DataFrame:
    rows = table[(table["metric"] == metric) & (table["group"] == group)]
    if rows.empty:
        there = sorted({*zip(table["metric"], table["group"], strict=True)})
        raise KitError(f"the table has no {metric!r} of group {group!r}, only {there}")
    return rows


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def _panels(axes: Sequence[Axes] | None, count: int) -> np.ndarray:
    if axes is None:
        return plt.subplots(1, count, figsize=(4.2 * count, 3.4), squeeze=False)[1][0]
    return np.asarray(axes, dtype=object)


def _undefended_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: name != "none")


def _ordered(attacks: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(ATTACKS)}
    return sorted(attacks, key=lambda name: (known.get(name, len(known)), name))


def _attack_words(name: str) -> str:
    words = {"none": "before", "small": "small attack", "large": "large attack"}
    return words.get(name, name)
