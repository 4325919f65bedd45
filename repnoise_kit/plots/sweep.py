"""Draw a sweep: one trial under attack, all trials against one another, what matters."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from repnoise_kit.errors import KitError
from repnoise_kit.plots.canvas import (
    AXIS_WORDS,
    Table,
    axes_of,
    budget_words,
    frame_of,
    in_order,
    points,
    rows_of,
)
from repnoise_kit.results import need
from repnoise_kit.stats import SHARES
from repnoise_kit.style import COLOURS, look, looks

_OTHER = {"resistance": "utility", "utility": "resistance"}
_COLOURS = {"resistance": COLOURS["repnoise"], "utility": COLOURS["everyday"]}
_FEW = 200
"""Of more trials the marks are smaller."""
_EDGE = 0.03
"""Where trials without a resistance stand: a share of the panel's width."""


def plot_trial(rows: Table, *, metric: str, group: str = "seen", ax: Axes | None = None) -> Axes:
    """Plot one metric of a trial and of the undefended model after each attack, with intervals.

    Args:
        rows: What `trial_rows` returns, of a trial and of the undefended model, stacked.
        metric: Which one.
        group: `seen` or `unseen`.
        ax: Where; by default a new figure.
    """
    ax = axes_of(ax)
    table = need(frame_of(rows), "defence", "lr", "examples", "group", "metric")
    cells = rows_of(need(table, "value", "low", "high"), metric, group)
    cells = cells.sort_values(["lr", "examples"])
    budgets = list(dict.fromkeys(zip(cells["lr"], cells["examples"], strict=True)))
    names = in_order(cells["defence"].unique())
    for place, (name, chosen) in enumerate(looks(names).items()):
        own = cells[cells["defence"] == name]
        shift = 0.06 * (place - (len(names) - 1) / 2)
        at = [budgets.index(key) + shift for key in zip(own["lr"], own["examples"], strict=True)]
        points(ax, at, own, chosen, {})
    ax.set_xticks(range(len(budgets)), [budget_words(*budget) for budget in budgets])
    ax.set_xlim(-0.4, len(budgets) - 0.6)
    ax.set_xlabel("learning rate, examples of the attack")
    ax.set_ylabel(AXIS_WORDS.get(metric, metric))
    if metric in SHARES:
        ax.set_ylim(-0.03, 1.03)
    ax.legend(title=f"{group} things", fontsize=8, title_fontsize=8)
    return ax


def plot_front(
    trials: Table,
    *,
    front: Collection[int] = (),
    start: int | None = None,
    chosen: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot resistance against utility, a mark a trial.

    Trials that were given up have no resistance: they stand at the left edge, open.

    Args:
        trials: What `studies.trials` returns.
        front: Numbers of the trials on the Pareto front (`studies.front`), joined by a line.
        start: The number of the trial of the settings that a sweep starts from, marked as such.
        chosen: The number of the trial to mark.
        ax: Where; by default a new figure.
    """
    ax = axes_of(ax)
    table = need(frame_of(trials), "trial", "state", "resistance", "utility")
    done = table[table["state"] == "finished"]
    lost = table[table["state"] == "given up"]
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4}
    faint: dict[str, Any] = {"color": COLOURS["repnoise"], "alpha": 0.3, "markeredgewidth": 0}
    ax.plot(done["resistance"], done["utility"], **dots, **faint, label="trials")
    best = done[done["trial"].isin(front)].sort_values("resistance")
    line: dict[str, Any] = {"color": "black", "marker": ".", "linewidth": 1}
    if len(best):
        ax.plot(best["resistance"], best["utility"], **line, label="Pareto front")
    if len(lost):
        hollow: dict[str, Any] = {"color": COLOURS["none"], "markerfacecolor": "none"}
        hollow |= {"transform": ax.get_yaxis_transform(), "label": "given up\n(no resistance)"}
        ax.plot(np.full(len(lost), _EDGE), lost["utility"], **dots | hollow)
        left, right = ax.get_xlim()
        ax.set_xlim(left - 2.5 * _EDGE * (right - left), right)
    if start != chosen:
        _mark(ax, table, start, _HOLLOW | {"label": f"trial {start}, the start"})
    words = f"trial {chosen}, the start" if start == chosen else f"trial {chosen}"
    _mark(ax, table, chosen, _STRONG | {"label": words})
    ax.set_xlabel("resistance (share not given away)")
    ax.set_ylabel(AXIS_WORDS["utility"])
    ax.legend(fontsize=8)
    return ax


def plot_importance(importance: Table, *, ax: Axes | None = None) -> Axes:
    """Plot how much each parameter matters for either objective, the most telling one on top.

    Args:
        importance: What `studies.importance` returns; without a row a word says why.
        ax: Where; by default a new figure.
    """
    ax = axes_of(ax)
    table = need(frame_of(importance), "parameter", "objective", "value")
    if table.empty:
        ax.text(0.5, 0.5, "known after ten finished trials", ha="center", va="center", fontsize=9)
        ax.set_axis_off()
        return ax
    wide = table.pivot_table(index="parameter", columns="objective", values="value")
    names = [name for name in _OTHER if name in wide]
    wide = wide[names].sort_values(names, kind="stable")
    for place, name in enumerate(names):
        at = np.arange(len(wide)) + 0.38 * ((len(names) - 1) / 2 - place)
        ax.barh(at, wide[name], height=0.36, color=_COLOURS[name], label=name)
    ax.set_yticks(range(len(wide)), wide.index)
    ax.set_xlabel("share of importance for the best tenth")
    ax.legend(fontsize=8, loc="lower right")
    return ax


def plot_slices(
    trials: Table,
    parameters: Sequence[str],
    *,
    objective: str = "resistance",
    chosen: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot parameters against one objective, a mark a finished trial: darker is better.

    Each parameter has a strip of its own: numbers on a logarithmic scale from the least to the
    most, choices beside one another with a jitter that a trial keeps. Shades are ranks by the
    other objective. One panel for all, since ticks and frames are most of the time a figure takes.

    Args:
        trials: What `studies.trials` returns.
        parameters: Some of its columns; `trial` is the order in which they were tried.
        objective: `resistance` or `utility`.
        chosen: The number of the trial to mark.
        ax: Where; by default a new figure.
    """
    if objective not in _OTHER:
        raise KitError(f"the objectives are resistance and utility, not {objective!r}")
    ax = axes_of(ax)
    table = need(frame_of(trials), "trial", "state", *parameters, "resistance", "utility")
    rows = table[table["state"] == "finished"].sort_values(_OTHER[objective])
    shades = rows[_OTHER[objective]].rank()  # One that is far off would leave the rest alike.
    mine = (rows["trial"] == chosen).to_numpy()
    style: dict[str, Any] = {"cmap": "cividis_r", "s": 6, "linewidths": 0}
    if len(rows) <= _FEW:
        style |= {"s": 14, "edgecolors": "#777777", "linewidths": 0.3}
    below: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8}
    below |= {"transform": ax.get_xaxis_transform()}
    across, ticks = [], {}
    for place, name in enumerate(parameters):
        at, named = _strip(rows, name)
        across.append(place + at)
        ticks |= {place + where: word for where, word in named.items()}
        words = "trials as they were tried" if name == "trial" else name
        ax.text(place + 0.5, -0.2, words, **below)
    height = rows[objective].to_numpy()
    ax.scatter(across, [height] * len(across), c=[shades] * len(across), **style)
    ax.plot(np.ravel([at[mine] for at in across]), np.tile(height[mine], len(across)), **_STRONG)
    ax.vlines(
        range(1, len(across)), 0, 1, transform=ax.get_xaxis_transform(), colors="#cccccc", lw=0.8
    )
    ax.set_xlim(0, max(1, len(parameters)))
    ax.set_xticks([*ticks], [*ticks.values()])
    ax.set_ylabel(f"{objective} (darker: more {_OTHER[objective]})")
    return ax


def short(value: Any) -> str:
    """Write a number in three digits as briefly as may be (3e-5, 0.25, 960), a word as it is."""
    if not isinstance(value, (float, np.floating)):
        return str(value)
    words = f"{value:.3g}"
    if "e" in words or 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return words


_HOLLOW = {"marker": "D", "color": "black", "markerfacecolor": "white", "markersize": 7}
_STRONG: dict[str, Any] = {
    "linestyle": "none",
    **{key: look("repnoise")[key] for key in ("color", "marker")},
    "markersize": 9,
    "markeredgecolor": "black",
    "markeredgewidth": 1.2,
    "zorder": 5,
}


def _mark(ax: Axes, table: pd.DataFrame, number: int | None, style: dict[str, Any]) -> None:
    """Mark a trial where it stands, if it has been measured."""
    for row in table[table["trial"] == number].to_dict("records"):
        known = row["state"] == "finished"
        if not known and row["state"] != "given up":
            continue
        whole: dict[str, Any] = {"linestyle": "none", "zorder": 4} | style
        whole |= {} if known else {"transform": ax.get_yaxis_transform()}
        ax.plot([row["resistance"] if known else _EDGE], [row["utility"]], **whole)


def _strip(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, dict[float, str]]:
    """Return where trials stand along a parameter, from 0 to 1, and its ticks."""
    values = rows[name].infer_objects()
    if not pd.api.types.is_numeric_dtype(values):
        kinds = pd.Categorical(values)
        count = max(1, len(kinds.categories))
        # Multiples of the golden ratio fill the width evenly, however many trials there are.
        jitter = 0.5 * (rows["trial"].to_numpy() * 0.618034 % 1 - 0.5)
        words = [str(kind).replace(" ", "\n") for kind in kinds.categories]
        named = {(place + 0.5) / count: word for place, word in enumerate(words)}
        return (kinds.codes + 0.5 + jitter) / count, named
    numbers = values.to_numpy(dtype=float)
    if not len(numbers):
        return numbers, {}
    low, high = numbers.min(), numbers.max()
    if name == "trial":
        at, scaled = MaxNLocator(5, integer=True).tick_values(low, high), np.asarray
    else:
        subs = (1.0,) if high > 100 * low else (1.0, 3.0)
        at, scaled = LogLocator(subs=subs).tick_values(low, high), np.log
    inside = at[(at >= low) & (at <= high)]
    start, reach = scaled(low), max(scaled(high) - scaled(low), 1e-9)

    def across(numbers: np.ndarray) -> np.ndarray:
        return 0.08 + 0.84 * (scaled(numbers) - start) / reach

    words = [short(value) for value in inside]
    return across(numbers), dict(zip(across(inside).tolist(), words, strict=True))
