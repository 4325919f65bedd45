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
from repnoise_kit.style import WORDS, look, looks
from repnoise_kit.survival import cost_to_break

Table = Result | pd.DataFrame

_KEYS = ["defence", "attack", "group", "metric"]
ATTACKS = ("none", "small", "large")
_LUMINANCE = (0.2126, 0.7152, 0.0722)
_FEW = 6
"""More intervals than this over one another are mud."""
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
    names = _in_order(cells["defence"].unique())
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
        curves: Columns `step, metric, value, seed`, as `defend_` returns them. Of several defences
            (`defence`) each has its own line, where it has the term.
        axes: Three panels: retain, noise, ascent.
        window: Steps the thick line is a running mean of.
        kwargs: For the thick line's `Axes.plot`.
    """
    table = need(_frame(curves), "step", "metric", "value", "seed")
    several = list(table["defence"].unique()) if "defence" in table else []
    names = several if len(several) > 1 else [None]
    panels = _panels(axes, 3)
    for ax, term in zip(panels, ("retain", "noise", "ascent"), strict=True):
        rows = table[table["metric"] == term]
        for name in names:
            own = rows if name is None else rows[rows["defence"] == name]
            wide = own.pivot_table(index="step", columns="seed", values="value")
            chosen = look(term if name is None else name)
            line = {key: chosen[key] for key in ("color", "linestyle") if name or key == "color"}
            ax.plot(wide.index, wide.to_numpy(), color=line["color"], alpha=0.25, linewidth=0.6)
            smooth = wide.mean(axis=1).rolling(window, min_periods=1).mean()
            label = {} if name is None or smooth.empty else {"label": chosen["label"]}
            ax.plot(smooth.index, smooth, **_merged(line | label | {"linewidth": 2}, kwargs))
        ax.set_xlabel("step of the defence")
        ax.set_ylabel(AXIS_WORDS[term])
    # One legend, where most lines are.
    counts = [len(ax.get_legend_handles_labels()[0]) for ax in panels]
    if max(counts):
        panels[len(counts) - 1 - counts[::-1].index(max(counts))].legend(fontsize=8)
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
        for name in _in_order(table["defence"].unique())
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


def plot_budgets(
    result: Table,
    metric: str = "recall",
    *,
    group: str = "seen",
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot one metric as a table: a row for each defence, a column for each budget (Table 1).

    Each cell holds its mean and 95 % interval; what was not measured is left blank.

    Args:
        result: Per-question rows (`defence, lr, examples, group, metric, value, seed, prompt`), 0
            examples being before any attack.
        metric: Which one.
        group: `seen` or `unseen`.
        ax: Where; by default a new figure.
        kwargs: For `Axes.pcolormesh`.
    """
    table = need(_frame(result), "defence", "lr", "examples", "group", "metric", "value")
    keys = ["defence", "lr", "examples"]
    cells = summary(_of(table, metric, group), by=(*keys, "metric"))
    cells = cells[(cells["seed"] == "all") | ~cells.duplicated(keys, keep=False)]
    names = _in_order(cells["defence"].unique())
    budgets = sorted({*zip(cells["lr"], cells["examples"], strict=True)})
    if ax is None:
        size = (1.0 * len(budgets) + 2.4, 0.45 * len(names) + 1.2)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    places = pd.MultiIndex.from_tuples([(name, *budget) for name in names for budget in budgets])
    placed = cells.set_index(keys)[["value", "low", "high"]].reindex(places)
    wide = placed.to_numpy().reshape(len(names), len(budgets), 3)
    chosen: dict[str, Any] = {"cmap": "cividis", "edgecolor": "white", "linewidth": 1.5}
    chosen |= {} if "norm" in kwargs else {"vmin": 0.0, "vmax": 1.0}
    mesh = ax.pcolormesh(wide[..., 0], **chosen | normalize_kwargs(kwargs, QuadMesh))
    for row, column in np.argwhere(~np.isnan(wide[..., 0])):
        value, low, high = wide[row, column]
        # At 0.46 white and black are read equally well.
        colour = "white" if np.dot(mesh.to_rgba(value)[:3], _LUMINANCE) < 0.46 else "black"
        centred: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
        ax.text(column + 0.5, row + 0.36, f"{value:.2f}", fontsize=9, **centred)
        edges = f"[{low:.2f}, {high:.2f}]"
        ax.text(column + 0.5, row + 0.73, edges, fontsize=6.5, **centred)
    ax.set_yticks(np.arange(len(names)) + 0.5, [look(name)["label"] for name in names])
    ax.set_xticks(np.arange(len(budgets)) + 0.5, [_budget_words(*budget) for budget in budgets])
    ax.set_ylim(len(names), 0)  # Not inverted: panels that share the axis would turn it back.
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("learning rate, examples")
    ax.set_title(f"{metric}, {group} things", fontsize=10)
    return ax


def plot_cost_to_break(
    curves: Table,
    metric: str = "recall",
    threshold: float = 0.5,
    *,
    group: str = "seen",
    axes: Sequence[Axes] | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Plot what is given away along an attack, and the step at which each run breaks.

    Left: the mean over seeds and questions, with its 95 % interval where there are six defences at
    most. Right, which is the legend too: a row a defence, a mark a seed at the step where the
    threshold is first reached; an open mark at the end of the attack with an arrow is a run that
    was never broken (censored).

    Args:
        curves: What `cost_grid` returns, of one attack.
        metric: `recall` or `harmfulness`.
        threshold: The share at which a run counts as broken.
        group: `seen` or `unseen`.
        axes: Two panels; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = _of(need(_frame(curves), *_KEYS, "step", "value"), metric, group)
    if table["attack"].nunique() > 1:
        raise KitError("these curves are of several attacks; choose the rows of one")
    costs = cost_to_break(_frame(curves), metric, threshold, group)
    if axes is None:
        size = (11, max(4, 0.32 * table["defence"].nunique() + 1))
        axes = plt.subplots(1, 2, figsize=size, width_ratios=[1.2, 1], layout="constrained")[1]
    left, right = panels = np.asarray(axes, dtype=object)
    names = _in_order(table["defence"].unique())
    few = len(names) <= _FEW
    cells = summary(table[table["step"] > 0], by=("defence", "step", "metric"))
    cells = cells[cells["seed"] == "all"] if (cells["seed"] == "all").any() else cells
    for place, (name, chosen) in enumerate(looks(names).items()):
        line = cells[cells["defence"] == name].sort_values("step")
        merged = {"markersize": 4} | _merged(chosen, kwargs)
        left.plot(line["step"], line["value"], **merged)
        if few:
            between = (line["step"], line["low"], line["high"])
            left.fill_between(*between, color=merged["color"], alpha=0.1)
        _lifelines(right, place, costs[costs["defence"] == name], merged)
    left.axhline(threshold, color="black", linewidth=0.6)
    left.set_ylabel(AXIS_WORDS.get(metric, metric))
    left.set_ylim(-0.03, 1.03)
    right.set_yticks(range(len(names)), [look(name)["label"] for name in names])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.set_title(f"steps until {metric} reaches {threshold:g}", fontsize=10)
    for ax in panels:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("steps of the attack")
    right.set_xlim(0.9, 2.2 * max(1, costs["steps"].max()))  # Room for the arrows.
    for label, name in zip(right.get_yticklabels(), names, strict=True):
        label.set_color(look(name)["color"])
    return panels


def _lifelines(ax: Axes, row: int, costs: pd.DataFrame, chosen: dict[str, Any]) -> None:
    """Draw one defence's runs: a mark a seed where it broke, an arrow where it did not."""
    steps = costs["steps"].clip(lower=1).to_numpy()  # A logarithmic axis has no step 0.
    # Seeds that break at the same step stand above one another.
    rows = row + np.linspace(-0.25, 0.25, len(steps)) if len(steps) > 1 else np.array([row])
    whole: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    whole |= {name: chosen[name] for name in ("color", "marker")}
    ax.plot([1, steps.max()], [row, row], color=chosen["color"], linewidth=0.8, alpha=0.5)
    broken = costs["broken"].to_numpy(dtype=bool)
    ax.plot(steps[broken], rows[broken], **whole)
    ax.plot(steps[~broken], rows[~broken], **whole, markerfacecolor="white")
    for at, height in zip(steps[~broken], rows[~broken], strict=True):
        ax.annotate(
            "", (at * 1.5, height), (at, height), arrowprops={"arrowstyle": "->", "lw": 0.8}
        )


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


def _in_order(names: Iterable[str]) -> list[str]:
    """Return defences as they are always listed, the undefended first and unknown ones last."""
    known = list(WORDS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _ordered(attacks: Iterable[str]) -> list[str]:
    known = {name: place for place, name in enumerate(ATTACKS)}
    return sorted(attacks, key=lambda name: (known.get(name, len(known)), name))


def _budget_words(lr: float, examples: int) -> str:
    if not examples:
        return "before"
    return np.format_float_scientific(lr, trim="-", exp_digits=1) + f"\n{examples:,}"


def _attack_words(name: str) -> str:
    words = {"none": "before", "small": "small attack", "large": "large attack"}
    return words.get(name, name)
