"""Draw what attacks bring back, and what it costs them."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.collections import QuadMesh

from repnoise_kit.errors import KitError
from repnoise_kit.plots.canvas import (
    AXIS_WORDS,
    KEYS,
    Table,
    attack_words,
    axes_of,
    budget_words,
    counted,
    frame_of,
    in_order,
    merged,
    ordered_attacks,
    panels_of,
    points,
    rows_of,
    summarised,
)
from repnoise_kit.results import need
from repnoise_kit.stats import SHARES, summary
from repnoise_kit.style import look, looks
from repnoise_kit.survival import cost_to_break

_LUMINANCE = (0.2126, 0.7152, 0.0722)
_FEW = 6
"""More intervals than this over one another are mud."""


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
    ax = axes_of(ax)
    cells = summarised(result, metric, group)
    attacks = ordered_attacks(cells["attack"].unique())
    names = in_order(cells["defence"].unique())
    for place, (name, chosen) in enumerate(looks(names).items()):
        rows = cells[cells["defence"] == name].set_index("attack").reindex(attacks)
        rows = rows.dropna(subset="value")
        shift = 0.06 * (place - (len(names) - 1) / 2)
        points(ax, [attacks.index(a) + shift for a in rows.index], rows, chosen, kwargs)
    ax.set_xticks(range(len(attacks)), [attack_words(name) for name in attacks])
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
    panels = panels_of(axes, 2)
    for ax, metric in zip(panels, ("recall", "harmfulness"), strict=True):
        plot_metric(result, metric, group=group, ax=ax, **kwargs)
    return panels


def plot_price(
    result: Table, *, group: str = "seen", axes: Sequence[Axes] | None = None, **kwargs: Any
) -> np.ndarray:
    """Plot what a defence costs and whether it broke the model: refusal, utility, degenerate."""
    panels = panels_of(axes, 3)
    measured = set(need(frame_of(result), "metric")["metric"])
    for ax, metric in zip(panels, ("refusal", "utility", "degenerate"), strict=True):
        if metric in measured:
            plot_metric(result, metric, group=group, ax=ax, **kwargs)
        else:
            ax.text(0.5, 0.5, f"{metric}: not measured", ha="center", va="center")
            ax.set_axis_off()
    return panels


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
    ax = axes_of(ax)
    table = need(frame_of(result), "defence", "attack", "group", "metric", "value", "prompt")
    table = rows_of(table, metric, group)
    wide = table.pivot_table(index=["defence", "attack"], columns="prompt", values="value")
    rows = [
        (name, attack)
        for name in in_order(table["defence"].unique())
        for attack in ordered_attacks(table["attack"].unique())
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
        np.arange(len(rows)) + 0.5, [f"{look(n)['label']}, {attack_words(a)}" for n, a in rows]
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
    table = need(frame_of(result), *KEYS, "lr", "examples", "value", "seed", "prompt")
    keys = ["defence", "lr", "examples"]
    cells = summary(rows_of(table, metric, group), by=(*keys, "metric"))
    cells = cells[(cells["seed"] == "all") | ~cells.duplicated(keys, keep=False)]
    names = in_order(cells["defence"].unique())
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
    ax.set_xticks(np.arange(len(budgets)) + 0.5, [budget_words(*budget) for budget in budgets])
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
    table = rows_of(need(frame_of(curves), *KEYS, "step", "value", "seed", "prompt"), metric, group)
    if table["attack"].nunique() > 1:
        raise KitError("these curves are of several attacks; choose the rows of one")
    costs = cost_to_break(frame_of(curves), metric, threshold, group)
    if axes is None:
        size = (11, max(4, 0.32 * table["defence"].nunique() + 1))
        axes = plt.subplots(1, 2, figsize=size, width_ratios=[1.2, 1], layout="constrained")[1]
    left, right = panels = counted(axes, 2)
    names = in_order(table["defence"].unique())
    few = len(names) <= _FEW
    cells = summary(table[table["step"] > 0], by=("defence", "step", "metric"))
    cells = cells[cells["seed"] == "all"] if (cells["seed"] == "all").any() else cells
    for place, (name, chosen) in enumerate(looks(names).items()):
        line = cells[cells["defence"] == name].sort_values("step")
        style = {"markersize": 4} | merged(chosen, kwargs)
        left.plot(line["step"], line["value"], **style)
        if few:
            between = (line["step"], line["low"], line["high"])
            left.fill_between(*between, color=style["color"], alpha=0.1)
        _lifelines(right, place, costs[costs["defence"] == name], style)
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
