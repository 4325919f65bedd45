"""Draw what a model's layers know: logit mass, components, probes, noise, likeness."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.collections import PathCollection
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from repnoise_kit.errors import KitError
from repnoise_kit.plots.canvas import (
    AXIS_WORDS,
    Table,
    attack_words,
    band,
    beside,
    by_attack,
    by_model,
    cells_of,
    frame_of,
    in_order,
    merged,
)
from repnoise_kit.results import need
from repnoise_kit.style import looks

_NULLS = {
    "chance": "chance",
    "shuffled": "shuffled",
    "null_95": "true noise, 95 % below",
}


def plot_logit_mass(result: Table, *, axes: Any = None, **kwargs: Any) -> np.ndarray:
    """Plot the log-probability of answers by layer: a panel a model, a line a kind of answer.

    Args:
        result: What `logit_mass` returns (`group, layer, value, prompt`), of one model or of
            several (`defence`, `attack`, `seed`): columns of panels are defences, rows attacks
            (Figures 3 and 7).
        axes: As many panels as there are models; by default a new figure with shared axes.
        kwargs: For the lines' `Axes.plot`.
    """
    table = need(frame_of(result), "group", "layer", "value", "prompt")
    panels = by_model(table, axes)
    for (name, attack), ax in panels.items():
        rows = table[(table["defence"] == name) & (table["attack"] == attack)]
        for side, chosen in looks(rows["group"].unique()).items():
            cells = cells_of(rows[rows["group"] == side], ["layer"]).sort_values("layer")
            band(ax, cells["layer"], cells, {"markersize": 3} | merged(chosen, kwargs))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(panels, "layer (0: embedding)", AXIS_WORDS["log_prob"], new=axes is None)
    return np.array(list(panels.values()), dtype=object)


def plot_densities(
    result: Table, *, layer: int | None = None, axes: Any = None, bins: int = 30, **kwargs: Any
) -> np.ndarray:
    """Plot how one layer's log-probabilities of answers are spread (Figure 9): a panel a model.

    Args:
        result: As for `plot_logit_mass`.
        layer: By default the last: the model's own log-probabilities.
        axes: As many panels as there are models; by default a new figure with shared axes.
        bins: Of the histograms, the same in every panel.
        kwargs: For `Axes.hist`.
    """
    table = need(frame_of(result), "group", "layer", "value")
    chosen_layer = table["layer"].max() if layer is None else layer
    table = table[table["layer"] == chosen_layer]
    if table.empty:
        raise KitError(f"the table has no layer {layer}; look at its column layer")
    edges = np.linspace(table["value"].min(), table["value"].max(), bins + 1)
    panels = by_model(table, axes)
    for (name, attack), ax in panels.items():
        rows = table[(table["defence"] == name) & (table["attack"] == attack)]
        for side, chosen in looks(rows["group"].unique()).items():
            options: dict[str, Any] = {"bins": edges, "density": True, "histtype": "step"}
            options |= {key: chosen[key] for key in ("color", "linestyle", "label")}
            values = rows.loc[rows["group"] == side, "value"]
            ax.hist(values, **options | normalize_kwargs(kwargs, Patch))
    _label(panels, "log-probability\n(nats a token)", "density", new=axes is None)
    return np.array(list(panels.values()), dtype=object)


def plot_pca(result: Table, *, axes: Any = None, **kwargs: Any) -> np.ndarray:
    """Plot activations on their first two components, a panel a model, a mark a text.

    Args:
        result: What `pca` returns (`group, pc1, pc2`), of one model or of several (`defence`,
            `attack`, `seed`): columns of panels are defences, rows attacks (Figures 4 and 8).
            Panels can be compared where all were projected on one fit.
        axes: As many panels as there are models; by default a new figure with shared axes.
        kwargs: For `Axes.scatter`.
    """
    table = need(frame_of(result), "group", "pc1", "pc2")
    panels = by_model(table, axes)
    for (name, attack), ax in panels.items():
        rows = table[(table["defence"] == name) & (table["attack"] == attack)]
        for side, chosen in looks(rows["group"].unique()).items():
            mine = rows[rows["group"] == side]
            look: dict[str, Any] = {"s": 12, "alpha": 0.5, "linewidth": 0}
            look |= {key: chosen[key] for key in ("color", "marker", "label")}
            given = normalize_kwargs(kwargs, PathCollection)
            if "c" in given:  # Of one name only, or Matplotlib would refuse both.
                look.pop("color")
            ax.scatter(mine["pc1"], mine["pc2"], **look | given)
        if "explained" in rows and len(rows):
            share = f"{rows['explained'].mean():.0%} of variance"
            ax.text(0.98, 0.02, share, transform=ax.transAxes, ha="right", fontsize=7)
    _label(panels, "PC 1", "PC 2", new=axes is None)
    return np.array(list(panels.values()), dtype=object)


def plot_probe(
    result: Table, metric: str = "accuracy", *, axes: Any = None, **kwargs: Any
) -> np.ndarray:
    """Plot what linear probes read off each layer, a line a defence, a panel an attack (Figure 5).

    The black dashes are chance (the share of the commonest label), the black dots the probes whose
    labels were dealt out at random; of `selectivity`, chance is 0.

    Args:
        result: What `probe` returns (`layer, split, metric, value`), of one model or of several
            (`defence`, `attack`, `seed`).
        metric: `accuracy` or `selectivity`.
        axes: As many panels as there are attacks; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = need(frame_of(result), "layer", "split", "metric", "value")
    nulls = {} if metric == "selectivity" else {"chance": "--", "shuffled": ":"}
    panels = _layered(table, metric, nulls, axes, kwargs)
    if metric == "selectivity":
        for ax in panels:
            ax.axhline(0, color="black", linestyle="--", linewidth=1)
    return panels


def plot_noise_test(
    result: Table, *, group: str = "harmful", axes: Any = None, **kwargs: Any
) -> np.ndarray:
    """Plot how far each layer's activations are from Gaussian noise, a line a defence.

    Below the black dashes (the 95th percentile of the null) they cannot be told from it.

    Args:
        result: What `noise_test` returns (`group, layer, metric, value`), of one model or of
            several (`defence`, `attack`, `seed`).
        group: `harmful` or `harmless`.
        axes: As many panels as there are attacks; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = need(frame_of(result), "group", "layer", "metric", "value")
    return _layered(_of_group(table, group), "mmd", {"null_95": "--"}, axes, kwargs)


def plot_cka(result: Table, *, axes: Any = None, **kwargs: Any) -> np.ndarray:
    """Plot how alike two models are layer by layer, a line a defence, a panel an attack.

    The black dots are the null: the texts of one model in a random order.

    Args:
        result: What `cka` returns (`layer, metric, value`), of one model or of several.
        axes: As many panels as there are attacks; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = need(frame_of(result), "layer", "metric", "value")
    panels = _layered(table, "cka", {"shuffled": ":"}, axes, kwargs)
    for ax in panels:
        ax.set_ylim(-0.03, 1.03)
    return panels


def _of_group(table: pd.DataFrame, group: str) -> pd.DataFrame:
    rows = table[table["group"] == group]
    if rows.empty:
        raise KitError(f"the table has no group {group!r}, only {sorted(set(table['group']))}")
    return rows


def _layered(
    table: pd.DataFrame,
    metric: str,
    nulls: dict[str, str],
    axes: Sequence[Axes] | None,
    kwargs: dict[str, Any],
) -> np.ndarray:
    """Draw a metric by layer, a panel an attack, a line a defence; nulls in black, over all."""
    if metric not in set(table["metric"]):
        raise KitError(f"the table has no {metric!r}, only {sorted(set(table['metric']))}")
    panels = by_attack(table, axes)
    for attack, ax in panels.items():
        rows = table[table["attack"] == attack]
        for null, line in nulls.items():
            known = rows[rows["metric"] == null]
            if len(known):
                cells = cells_of(known, ["layer", "metric"]).sort_values("layer")
                black: dict[str, Any] = {"color": "black", "linestyle": line, "label": _NULLS[null]}
                ax.plot(cells["layer"], cells["value"], **black)
        for name, chosen in looks(in_order(rows["defence"].unique())).items():
            mine = rows[(rows["defence"] == name) & (rows["metric"] == metric)]
            cells = cells_of(mine, ["layer", "metric"]).sort_values("layer")
            band(ax, cells["layer"], cells, {"markersize": 4} | merged(chosen, kwargs))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("layer")
    drawn = np.array(list(panels.values()), dtype=object)
    drawn[0].set_ylabel(AXIS_WORDS.get(metric, metric))
    beside(drawn, -1, new=axes is None)
    return drawn


def _label(panels: dict[tuple[str, str], Axes], across: str, up: str, *, new: bool) -> None:
    """Name the axes at the edges of a grid of panels, and the lines beside it."""
    attacks = list(dict.fromkeys(attack for _, attack in panels))
    left, right = next(iter(panels))[0], [*panels][-1][0]
    for (name, attack), ax in panels.items():
        if attack == attacks[-1]:
            ax.set_xlabel(across)
        if name == left:
            words = "before the attack" if attack == "none" else f"after the {attack_words(attack)}"
            ax.set_ylabel(f"{words}\n{up}" if len(attacks) > 1 else up)
    beside([*panels.values()], [*panels].index((right, attacks[0])), new=new)
