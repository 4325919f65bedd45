"""Draw where a defence changed a model, which parts of it count, and the way an attack takes."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from repnoise_kit.errors import KitError
from repnoise_kit.plots.canvas import (
    AXIS_WORDS,
    Table,
    axes_of,
    band,
    beside,
    budget_words,
    cells_of,
    frame_of,
    in_order,
    merged,
    one_attack,
    panels_of,
    points,
    rows_of,
)
from repnoise_kit.results import need
from repnoise_kit.stats import SHARES
from repnoise_kit.style import looks

_BUDGETS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
"""Colours of budgets, which are no meanings of `style`: the first is before any attack."""


def plot_layers(result: Table, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Plot a value by layer, a line a model: columns `model, layer, value`."""
    ax = axes_of(ax)
    table = need(frame_of(result), "model", "layer", "value")
    for name, chosen in looks(table["model"].unique()).items():
        means = table[table["model"] == name].groupby("layer")["value"].mean()
        ax.plot(means.index, means, **merged(chosen, kwargs))
    ax.set_xlabel("layer")
    ax.set_ylabel("value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def plot_weight_distance(
    result: Table,
    metric: str = "l2",
    *,
    kind: str = "all",
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot how far each layer's weights lie from a reference's, a line a defence (Figure 2).

    The layers are joined by a line; embedding, norm and head stand apart at its sides.

    Args:
        result: What `weight_distance` returns (`part, layer, kind, metric, value`), of one model,
            or of several (`defence`, `seed`).
        metric: `l2` or `relative`.
        kind: `all`, `attention`, `mlp` or `norm`.
        ax: Where; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = one_attack(need(frame_of(result), "part", "layer", "kind", "metric", "value"))
    table = table[(table["metric"] == metric) & (table["kind"] == kind)]
    if table.empty:
        raise KitError(f"the table has no {metric!r} of {kind!r}; look at its metric and kind")
    numbers = table["layer"].map(lambda layer: "" if pd.isna(layer) else str(int(layer)))
    table = table.assign(place=numbers.where(numbers != "", table["part"]))
    layers = sorted({place for place in table["place"] if place.isdigit()}, key=int)
    others = [place for place in dict.fromkeys(table["place"]) if place not in layers]
    before = [place for place in others if place == "embedding"]
    order = [*before, *layers, *(place for place in others if place not in before)]
    ax = axes_of(ax)
    names = in_order(table["defence"].unique())
    for number, (name, chosen) in enumerate(looks(names).items()):
        cells = cells_of(table[table["defence"] == name], ["place"]).set_index("place")
        inside = [place for place in layers if place in cells.index]
        style = merged(chosen, kwargs)
        band(ax, [order.index(place) for place in inside], cells.loc[inside], style)
        apart = [place for place in others if place in cells.index]
        shift = 0.1 * (number - (len(names) - 1) / 2)
        alone = style | {"linestyle": "none", "label": None}
        points(ax, [order.index(place) + shift for place in apart], cells.loc[apart], alone, {})
    ax.set_xticks(range(len(order)), order)
    ax.tick_params(axis="x", labelrotation=45 if len(order) > 12 else 0)
    ax.set_xlabel("layer")
    ax.set_ylabel(AXIS_WORDS.get(metric, metric))
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax


def plot_freezing(
    result: Table,
    metric: str = "recall",
    *,
    group: str = "seen",
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot what attacks bring back of a model that was defended with parts held still (Table 6).

    A row for each held part, in the order of the table, the undefended model first; a mark with
    its 95 % interval for each budget.

    Args:
        result: What `ablate_layers` returns (`held, lr, examples, group, metric, value`).
        metric: Which one.
        group: `seen` or `unseen`.
        ax: Where; by default a new figure.
        kwargs: For `Axes.errorbar`.
    """
    table = need(frame_of(result), "held", "lr", "examples", "group", "metric", "value")
    table = rows_of(table, metric, group)
    if table.loc[table["defence"] != "none", "defence"].nunique() > 1:
        raise KitError("this table has several defences; choose the rows of one")
    held = list(dict.fromkeys(table["held"]))
    budgets = sorted({*zip(table["lr"], table["examples"], strict=True)})
    cells = cells_of(table, ["held", "lr", "examples", "metric"])
    new = ax is None
    if ax is None:
        ax = plt.subplots(figsize=(7, 0.4 * len(held) + 1), layout="constrained")[1]
    for place, (lr, examples) in enumerate(budgets):
        rows = cells[(cells["lr"] == lr) & (cells["examples"] == examples)].set_index("held")
        rows = rows.reindex([name for name in held if name in rows.index])
        at = [held.index(n) + 0.18 * (place - (len(budgets) - 1) / 2) for n in rows.index]
        words = budget_words(lr, examples).replace("\n", ", ") if examples else "before any attack"
        chosen = {
            "color": _BUDGETS[place % len(_BUDGETS)], "marker": "osD^v"[place % 5],
            "linestyle": "none", "label": words, "capsize": 3,
        }  # fmt: skip
        reach = np.array([rows["value"] - rows["low"], rows["high"] - rows["value"]]).clip(min=0)
        ax.errorbar(rows["value"], at, xerr=reach, **merged(chosen, kwargs))
    ax.set_yticks(range(len(held)), held)
    ax.set_ylim(len(held) - 0.5, -0.5)
    ax.set_ylabel("held still during the defence")
    ax.set_xlabel(AXIS_WORDS.get(metric, metric))
    if metric in SHARES and cells["value"].min() >= 0:
        ax.set_xlim(-0.03, 1.03)
    beside([ax], 0, new=new, title="attack: rate, examples")
    return ax


def plot_attack_path(
    result: Table, *, axes: Sequence[Axes] | None = None, **kwargs: Any
) -> np.ndarray:
    """Plot Theorem 1's two parts along an attack: the loss still to go, and the gradient's norm.

    Over seeds, losses are averaged as they are and norms as logarithms.

    Args:
        result: What `attack_path` returns (`step, metric, value`), of one model or of several
            (`defence`, `seed`).
        axes: Two panels; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = one_attack(need(frame_of(result), "step", "metric", "value"))
    if missing := {"gap", "grad_norm"} - set(table["metric"]):
        raise KitError(f"the table has no {missing.pop()!r} among its metrics")
    panels = panels_of(axes, 2)
    for ax, metric in zip(panels, ("gap", "grad_norm"), strict=True):
        for name, chosen in looks(in_order(table["defence"].unique())).items():
            rows = table[(table["defence"] == name) & (table["metric"] == metric)]
            cells = _positive(rows, log=metric == "grad_norm").sort_values("step")
            band(ax, cells["step"], cells, {"markersize": 4} | merged(chosen, kwargs))
        ax.set_xscale("symlog", base=2, linthresh=1)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlim(left=-0.1)
        ax.set_xlabel("steps of the attack")
        ax.set_ylabel(AXIS_WORDS[metric])
    panels[1].set_yscale("log")
    beside(panels, 1, new=axes is None)
    return panels


def _positive(rows: pd.DataFrame, *, log: bool) -> pd.DataFrame:
    """Return cells by step of what cannot be negative; of logarithms, the geometric mean."""
    if not log:
        cells = cells_of(rows, ["step"])
        return cells.assign(low=cells["low"].clip(lower=0))
    cells = cells_of(rows.assign(value=np.log(rows["value"])), ["step"])
    return cells.assign(**{name: np.exp(cells[name]) for name in ("value", "low", "high")})


def plot_attack_plane(result: Table, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Plot the harmful loss on a slice through base, defended and attacked, and the attack's path.

    Args:
        result: What `attack_plane` returns (`x, y, step, metric, value`), of one attack.
        ax: Where; by default a new figure.
        kwargs: For `Axes.contourf`.
    """
    table = one_attack(need(frame_of(result), "x", "y", "step", "metric", "value"))
    runs = table.assign(seed=table.get("seed", 0)).groupby(["defence", "seed"]).ngroups
    if runs != 1 or not {"loss", "path"} <= set(table["metric"]):
        raise KitError("a slice is drawn of one defence and one seed, with its loss and its path")
    ax = axes_of(ax)
    wide = table[table["metric"] == "loss"].pivot(index="y", columns="x", values="value")
    # From the lowest loss to the highest in equal ratios: the valley is what is looked for.
    low, high = max(wide.to_numpy().min(), 1e-6), wide.to_numpy().max()
    chosen: dict[str, Any] = {"levels": np.geomspace(low * 0.999, high * 1.001, 13)}
    chosen |= {} if "norm" in kwargs else {"norm": "log"}
    chosen |= {} if "colors" in kwargs else {"cmap": "cividis"}
    drawn = ax.contourf(wide.columns, wide.index, wide, **chosen | kwargs)
    path = table[table["metric"] == "path"].sort_values("step")
    ax.plot(path["x"], path["y"], color="white", marker=".", markersize=4, linewidth=1)
    ends = {"base": (0.0, 0.0), "defended": path.iloc[0][["x", "y"]]}
    ends["attacked"] = path.iloc[-1][["x", "y"]]
    for (name, (x, y)), marker in zip(ends.items(), "os^", strict=True):
        ax.plot(x, y, marker=marker, color="white", markeredgecolor="black", linestyle="none")
        ax.annotate(
            name, (x, y), xytext=(0, 8), textcoords="offset points", color="white", ha="center",
            bbox={"facecolor": "black", "alpha": 0.5, "linewidth": 0, "pad": 1.5},
        )  # fmt: skip
    bar = ax.figure.colorbar(drawn, ax=ax, label="harmful loss (nats a token)", format="{x:.2g}")
    bar.minorticks_off()
    ax.set_xlabel("towards the defended model (L2 in the weights)")
    ax.set_ylabel("at right angles, in the attack's plane")
    return ax
