"""Draw the four immunization criteria, and what each is made of."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from repnoise_kit.errors import KitError
from repnoise_kit.headlines import HEADLINES, criteria_table
from repnoise_kit.plots.canvas import (
    AXIS_WORDS,
    Table,
    axes_of,
    band,
    beside,
    cells_of,
    counted,
    frame_of,
    in_order,
    merged,
    points,
    rows_of,
)
from repnoise_kit.results import need
from repnoise_kit.style import look, looks

_SAYS = {
    "resistance": "given away after attacks\n← less is better",
    "stability": "everyday answers kept\nmore is better →",
    "generalization": "given away of what was\nwithheld, after attacks\n← less is better",
    "trainability": "learned of new tasks\nmore is better →",
}
_SECOND = {"resistance": "harmfulness", "generalization": "harmfulness", "trainability": "exact"}


def plot_criteria(
    result: Table, *, axes: Sequence[Axes] | None = None, **kwargs: Any
) -> np.ndarray:
    """Plot the four immunization criteria, a panel each, a row a defence, with 95 % intervals.

    Filled marks are recall (of new tasks ROUGE-1), open ones harmfulness by a classifier (of new
    tasks the share that is exactly right). The grey band is the interval of the undefended model,
    which a defence should leave in the first and third panel, and stay in in the others.

    Args:
        result: What `criteria` returns, or its `criteria_table`.
        axes: A panel for each criterion that was measured; by default a new figure.
        kwargs: For `Axes.errorbar`.
    """
    table = result.frame if not isinstance(result, pd.DataFrame) else result
    cells = table if "low" in table else criteria_table(table)
    cells = need(cells, "criterion", "defence", "metric", "value", "low", "high")
    there = [name for name in HEADLINES if name in set(cells["criterion"])]
    if not there:
        raise KitError("the table holds none of the four criteria; give what `criteria` returns")
    names = in_order(cells["defence"].unique())
    new = axes is None
    if axes is None:
        size = (2.8 * len(there) + 2.6, 0.5 * len(names) + 1.6)
        options: dict[str, Any] = {"sharey": True, "squeeze": False, "layout": "constrained"}
        axes = plt.subplots(1, len(there), figsize=size, **options)[1][0]
    panels = counted(axes, len(there))
    for ax, criterion in zip(panels, there, strict=True):
        part = cells[cells["criterion"] == criterion]
        first = HEADLINES[criterion][0]
        _grey_band(ax, part[(part["defence"] == "none") & (part["metric"] == first)])
        for metric, shift in ((first, -0.08), (_SECOND.get(criterion), 0.16)):
            shown = part[part["metric"] == metric].set_index("defence")
            _rows(ax, names, shown, shift, hollow=metric != first, kwargs=kwargs)
        ax.set_title(criterion, fontsize=11)
        ax.set_xlabel(_SAYS[criterion], fontsize=9)
        ax.set_xlim(-0.04, 1.04)
    for ax in panels:
        ax.set_yticks(range(len(names)), [look(name)["label"] for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
    _legend(panels[-1], new=new)
    return panels


def _legend(ax: Axes, *, new: bool) -> None:
    """Say what filled and open marks are, beside the panels where the figure has room for it."""
    filled: dict[str, Any] = {"color": "black", "linestyle": "none", "marker": "o"}
    marks = [Line2D([], [], **filled), Line2D([], [], **filled, markerfacecolor="white")]
    words = ["recall; ROUGE-1", "harmfulness;\nexactly right", "undefended"]
    handles = [*marks, Patch(color="#555555", alpha=0.15)]
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if new else {}
    ax.legend(handles, words, fontsize=8, **where)


def _grey_band(ax: Axes, cell: pd.DataFrame) -> None:
    for row in cell.to_dict("records"):
        ax.axvspan(row["low"], row["high"], color="#555555", alpha=0.15, linewidth=0)


def _rows(
    ax: Axes,
    names: list[str],
    shown: pd.DataFrame,
    shift: float,
    *,
    hollow: bool,
    kwargs: dict[str, Any],
) -> None:
    for place, name in enumerate(names):
        if name not in shown.index:
            continue
        row = shown.loc[[name]]
        style = look(name)
        chosen: dict[str, Any] = {"color": style["color"], "marker": style["marker"], "capsize": 2}
        chosen |= {"markerfacecolor": "white"} if hollow else {}
        reach = np.array([row["value"] - row["low"], row["high"] - row["value"]]).clip(min=0)
        ax.errorbar(row["value"], [place + shift], xerr=reach, **merged(chosen, kwargs))


def plot_withheld(
    result: Table, metric: str = "recall", *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Plot what is given away of each withheld category (Table 5), the control beside it.

    A mean over the attack's budgets and a category's questions: of the undefended model, of the
    defence that saw everything, and (open) of the one that never saw the category.

    Args:
        result: What `generalization_grid` returns, of one defence and none.
        metric: `recall` or `harmfulness`.
        ax: Where; by default a new figure.
        kwargs: For `Axes.errorbar`.
    """
    table = need(frame_of(result), "defence", "withheld", "saw", "metric", "value", "seed")
    table = _of_metric(table, metric)
    others = [name for name in in_order(table["defence"].unique()) if name != "none"]
    if len(others) > 1:
        raise KitError(f"this table has the defences {', '.join(others)}; choose the rows of one")
    withheld = list(table["withheld"].unique())
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 0.5 * len(withheld) + 1.2), layout="constrained")[1]
    ax = axes_of(ax)
    kinds = [("none", "all", -0.22), *((n, s, d) for n in others for s, d in _SAW)]
    for name, saw, shift in kinds:
        rows = table[(table["defence"] == name) & (table["saw"] == saw)]
        if rows.empty:
            continue
        cells = cells_of(rows, ["withheld", "metric"]).set_index("withheld").reindex(withheld)
        style = look(name)
        told = style["label"] if name == "none" else f"{style['label']}, saw {saw}"
        chosen: dict[str, Any] = {"color": style["color"], "marker": style["marker"], "capsize": 2}
        chosen |= {"linestyle": "none", "label": told}
        chosen |= {"markerfacecolor": "white"} if saw == "the rest" else {}
        reach = np.array([cells["value"] - cells["low"], cells["high"] - cells["value"]])
        places = np.arange(len(withheld)) + shift
        ax.errorbar(cells["value"], places, xerr=reach.clip(min=0), **merged(chosen, kwargs))
    ax.set_yticks(range(len(withheld)), withheld)
    ax.set_ylim(len(withheld) - 0.5, -0.5)
    ax.set_xlim(-0.03, 1.03)
    ax.set_xlabel(f"{AXIS_WORDS.get(metric, metric)} of what was withheld")
    ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds))
    return ax


_LEARNED = {"rouge1": "ROUGE-1 of held-out texts", "exact": "held-out texts exactly right"}


def _of_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = table[table["metric"] == metric]
    if rows.empty:
        listed = ", ".join(map(str, table["metric"].unique())) or "no rows"
        raise KitError(f"the table has no {metric!r} to draw here, only {listed}")
    return rows


_SAW = (("all", 0.0), ("the rest", 0.22))


def plot_learning(
    result: Table,
    metric: str = "rouge1",
    *,
    axes: Sequence[Axes] | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Plot how defended models learn harmless tasks (Table 4), along the steps.

    Args:
        result: What `trainability_grid` returns.
        metric: `rouge1`, or `exact`: the share that is exactly right.
        axes: A panel a task; by default a new figure.
        kwargs: For the lines' `Axes.plot`.
    """
    table = need(frame_of(result), "defence", "task", "stage", "step", "metric", "value", "seed")
    table = _of_metric(table[table["stage"] == "learning"], metric)
    tasks = list(table["task"].unique())
    new = axes is None
    if axes is None:
        size = (3.2 * len(tasks) + 1.6, 3.2)
        options: dict[str, Any] = {"sharey": True, "squeeze": False, "layout": "constrained"}
        axes = plt.subplots(1, len(tasks), figsize=size, **options)[1][0]
    panels = counted(axes, len(tasks))
    for ax, task in zip(panels, tasks, strict=True):
        rows = table[table["task"] == task]
        for name, chosen in looks(in_order(rows["defence"].unique())).items():
            cells = cells_of(rows[rows["defence"] == name], ["step", "metric"]).sort_values("step")
            band(ax, cells["step"], cells, {"markersize": 3} | merged(chosen, kwargs))
        ax.set_xscale("symlog", base=2, linthresh=1)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_ylim(-0.03, 1.03)
        ax.set_title(task, fontsize=10)
        ax.set_xlabel("steps of fine-tuning")
    panels[0].set_ylabel(_LEARNED.get(metric, metric))
    beside(panels, -1, new=new)
    return panels


def plot_samples(
    result: Table, metric: str = "recall", *, group: str = "seen", ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:  # fmt: skip
    """Plot what is given away against the number of the defence's pairs (Table 20).

    A mean over the attack's budgets; one line for one pass over the pairs, one for as many steps
    as all of them give.

    Args:
        result: What `samples_grid` returns.
        metric: Which one.
        group: `seen` or `unseen`.
        ax: Where; by default a new figure.
        kwargs: For `Axes.errorbar`.
    """
    table = need(frame_of(result), "pairs", "steps", "examples", "metric", "group", "value", "seed")
    table = rows_of(table[table["examples"] > 0], metric, group)
    ax = axes_of(ax)
    most = table["pairs"].max()
    styles = {"one pass": look("repnoise"), "as of all": look("repnoise_tokenwise")}
    for steps, style in styles.items():
        ends = table["pairs"].isin([0, most])
        shown = table[ends | (table["steps"] == steps)]
        cells = cells_of(shown, ["pairs", "metric"]).sort_values("pairs")
        words = "one pass over them" if steps == "one pass" else "as many steps as of all"
        points(ax, cells["pairs"], cells, style | {"label": words}, kwargs)
    ax.set_xscale("symlog", base=2, linthresh=table.loc[table["pairs"] > 0, "pairs"].min() / 2)
    shown = sorted(table["pairs"].unique())
    ax.set_xticks(shown, [f"{pairs:,}" if pairs else "none" for pairs in shown])
    ax.minorticks_off()
    ax.set_xlabel("pairs of the defence")
    ax.set_ylabel(AXIS_WORDS.get(metric, metric))
    ax.set_ylim(-0.03, 1.03)
    ax.legend(fontsize=8)
    return ax
