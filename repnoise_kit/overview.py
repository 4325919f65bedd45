"""Overview: a study in one figure, for a page that is drawn again whenever something changes."""

import io
import textwrap
from typing import Any
from weakref import WeakKeyDictionary

import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution

from repnoise_kit.choosing import started_from, undefended_utility, winner
from repnoise_kit.errors import KitError, check_numbers
from repnoise_kit.plots.canvas import Table, frame_of
from repnoise_kit.plots.sweep import (
    plot_front,
    plot_importance,
    plot_slices,
    plot_trial,
    short,
)
from repnoise_kit.plots.training import plot_terms
from repnoise_kit.results import Result, stack
from repnoise_kit.studies import (
    front,
    importance,
    nearest,
    space_of,
    trial_curves,
    trial_rows,
    trials,
)
from repnoise_kit.style import look

SHOWS = ("terms", "importance", "slices")

_METRICS = ("recall", "harmfulness", "degenerate")
_KNOWN: WeakKeyDictionary[optuna.Study, tuple[int, Result]] = WeakKeyDictionary()


def draw(
    study: optuna.Study,
    *,
    trial: int | None = None,
    show: str = "terms",
    live: Table | None = None,
    **wanted: Any,
) -> Figure:
    """Draw a study: one trial under attack, all trials, and below what `show` says.

    The figure is in no list of pyplot's, so that it may be drawn in any thread and forgotten.

    Args:
        study: What `open_study` or `read_study` returns.
        trial: The number of the trial to show. Without it and without parameters, the
            `winner`.
        show: `terms` of its loss, `importance` of the parameters, or `slices`: a panel a parameter.
        live: Terms of a training that runs now (`step, metric, value, seed`), drawn in place of
            the trial's own.
        wanted: Parameters: the finished trial nearest to them is shown.

    Raises:
        KitError: no such trial, parameter, choice or `show`.
    """
    if show not in SHOWS:
        raise KitError(f"show is one of {', '.join(SHOWS)}, not {show!r}")
    space = space_of(study)
    if trial is not None and wanted:
        raise KitError("give the number of a trial or the parameters of one, not both")
    _check(wanted, space)
    table = trials(study).frame
    rows = trial_rows(study, None)
    number = _number(study, table, trial, wanted)
    figure = Figure(figsize=(11.8, 5.6), dpi=100)
    _title(figure, study.study_name, table, number, list(space), wanted)
    if number is not None:
        rows = stack(rows, trial_rows(study, number))
    panels = _row(figure, [1.0, 1.0, 1.15], 0.865, 0.87)
    _attacked(panels[:2], rows.frame)
    _all(panels[2], study, table, number)
    if show == "terms":
        _terms(figure, study, number, live)
    elif show == "importance":
        _importance(figure, study, table, number)
    else:
        _slices(figure, table, space, number)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, of as many dots as the figure has."""
    file = io.BytesIO()
    # A fast picture rather than a small one: it is looked at once.
    FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 1})
    return file.getvalue()


def _check(wanted: dict[str, Any], space: dict[str, BaseDistribution]) -> None:
    for name, value in wanted.items():
        if name not in space:
            raise KitError(f"the study has no parameter {name!r}, only {', '.join(space)}")
        kind = space[name]
        if isinstance(kind, CategoricalDistribution):
            if value not in kind.choices:
                listed = ", ".join(map(str, kind.choices))
                raise KitError(f"{name} is one of {listed}, not {value!r}")
        else:
            check_numbers(above_zero=True, **{name: value})


def _number(
    study: optuna.Study, table: pd.DataFrame, trial: int | None, wanted: dict[str, Any]
) -> int | None:
    """Return which trial to show; None where none has finished."""
    if trial is not None:
        if trial not in set(table["trial"]):
            last = f"only 0 to {len(table) - 1}" if len(table) else "for none was tried yet"
            raise KitError(f"the study has no trial {trial}, {last}")
        return int(trial)
    if wanted:
        return nearest(study, table, **wanted)
    return winner(study) if (table["state"] == "finished").any() else None


def _title(
    figure: Figure,
    name: str,
    table: pd.DataFrame,
    number: int | None,
    space: list[str],
    wanted: dict[str, Any],
) -> None:
    """Say which trial is shown, and of what study."""
    counts = ", ".join(f"{n} {state}" for state, n in table["state"].value_counts().items())
    second = f"{counts or 'no trial'} in {name}"
    first = "no trial has finished yet"
    if number is not None:
        row = table.set_index("trial").loc[number]
        first = f"trial {number}: {_in_words({key: row[key] for key in space})}"
        if any(short(value) != short(row[key]) for key, value in wanted.items()):
            second = f"It is the finished trial nearest to {_in_words(wanted)}. {second}"
        if row["state"] != "finished":
            said = row["state"].capitalize() + (f": {row['note']}" if row["note"] else "")
            second = f"{textwrap.shorten(said, 90)}. {second}"
    # A dollar sign in a note is no formula.
    plain: dict[str, Any] = {"x": 0.05, "parse_math": False, "va": "top"}
    figure.text(y=0.985, s=first, fontsize=11, fontweight="bold", **plain)
    # As much as fits: the name of the study comes last.
    figure.text(
        y=0.945,
        s=textwrap.shorten(second, 185, placeholder=" …"),
        fontsize=8.5,
        color="#333333",
        **plain,
    )


def _in_words(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in parameters.items())


def _row(figure: Figure, widths: list[float], top: float, right: float) -> list[Axes]:
    """Return panels side by side, at fixed places: a layout that is worked out is slow."""
    bounds = {"left": 0.05, "right": right, "top": top, "bottom": top - 0.3}
    grid = GridSpec(1, len(widths), figure, width_ratios=widths, wspace=0.18, **bounds)
    panels = [figure.add_subplot(grid[0, place]) for place in range(len(widths))]
    for ax in panels:
        ax.yaxis.set_major_locator(_few(3))  # Ticks are most of the time a figure takes.
    return panels


def _few(ticks: int) -> MaxNLocator:
    return MaxNLocator(ticks, steps=[1, 2, 5, 10])


def _lower(figure: Figure, widths: list[float]) -> list[Axes]:
    return _row(figure, widths, 0.395, 0.985)


def _tidy(ax: Axes, title: str | None = None) -> None:
    """Make a panel small print: what its height is stands above it."""
    # A place worked out from the ticks is slow.
    ax.set_title(ax.get_ylabel() if title is None else title, fontsize=9, loc="left", y=1.0)
    ax.set_ylabel("")
    ax.xaxis.label.set_fontsize(8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _say(ax: Axes, words: str) -> None:
    ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=9, color="#555555")
    ax.set_axis_off()


def _attacked(panels: list[Axes], rows: pd.DataFrame) -> None:
    """Draw the first two metrics that were measured."""
    measured = set(rows.loc[rows["group"] == "seen", "metric"])
    shown = [name for name in _METRICS if name in measured]
    for place, ax in enumerate(panels):
        if place < len(shown):
            plot_trial(rows, metric=shown[place], ax=ax)
            _tidy(ax)
            if place and (legend := ax.get_legend()):  # The first one's tells both.
                legend.remove()
        else:
            _say(ax, "nothing was measured yet")


def _all(ax: Axes, study: optuna.Study, table: pd.DataFrame, number: int | None) -> None:
    """Draw all trials, and how useful the undefended model is."""
    if table["utility"].isna().all():
        _say(ax, "no trial was measured yet")
        return
    if "cells" in study.user_attrs:
        level = undefended_utility(study)
        style: dict[str, Any] = {key: look("none")[key] for key in ("color", "linestyle")}
        ax.axhline(level, linewidth=1, zorder=0, label="undefended", **style)
    best = set(front(table)["trial"])
    plot_front(table, front=best, start=started_from(study), chosen=number, ax=ax)
    ax.xaxis.set_major_locator(_few(5))
    ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.05), frameon=False)
    _tidy(ax)


def _terms(figure: Figure, study: optuna.Study, number: int | None, live: Table | None) -> None:
    panels = _lower(figure, [1.0] * 3)
    own = None if number is None else trial_curves(study, number)
    curves = own if live is None else live
    if curves is None or frame_of(curves).empty:
        for ax in panels:
            _say(ax, "no terms were kept")
        return
    plot_terms(curves, axes=panels, window=5)
    for ax in panels:
        ax.xaxis.set_major_locator(_few(4))
        _tidy(ax, ax.get_ylabel() + (", of the trial that runs now" if live is not None else ""))


def _importance(
    figure: Figure, study: optuna.Study, table: pd.DataFrame, number: int | None
) -> None:
    """Draw what matters, and whether later trials are better than earlier ones."""
    matters, order = _lower(figure, [1.0, 2.0])
    finished = (table["state"] == "finished").sum()
    plot_importance(_importance_of(study, finished), ax=matters)
    _tidy(matters, "which parameters matter")
    if not finished:
        _say(order, "no trial has finished yet")
        return
    plot_slices(table, ["trial"], chosen=number, ax=order)
    _tidy(order)


def _importance_of(study: optuna.Study, finished: int) -> Result:
    """Return the importance, which is worked out again when another trial has finished."""
    known = _KNOWN.get(study)
    if known is None or known[0] != finished:
        _KNOWN[study] = known = (finished, importance(study))
    return known[1]


def _slices(
    figure: Figure, table: pd.DataFrame, space: dict[str, BaseDistribution], number: int | None
) -> None:
    """Draw each parameter that was varied against resistance."""
    done = table[table["state"] == "finished"]
    varied = [name for name in space if done[name].nunique() > 1]
    (panel,) = _lower(figure, [1.0])
    if not varied:
        _say(panel, "no two finished trials differ yet")
        return
    for name, kind in space.items():
        if isinstance(kind, CategoricalDistribution):
            table = table.assign(**{name: pd.Categorical(table[name], kind.choices)})
    plot_slices(table, varied, chosen=number, ax=panel)
    _tidy(panel)
