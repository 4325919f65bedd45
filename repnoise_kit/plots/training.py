"""Draw what happened while a defence was trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from repnoise_kit.plots.canvas import AXIS_WORDS, Table, frame_of, merged, panels_of
from repnoise_kit.results import need
from repnoise_kit.style import look


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
    table = need(frame_of(curves), "step", "metric", "value", "seed")
    several = list(table["defence"].unique()) if "defence" in table else []
    names = several if len(several) > 1 else [None]
    panels = panels_of(axes, 3)
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
            ax.plot(smooth.index, smooth, **merged(line | label | {"linewidth": 2}, kwargs))
        ax.set_xlabel("step of the defence")
        ax.set_ylabel(AXIS_WORDS[term])
    # One legend, where most lines are.
    counts = [len(ax.get_legend_handles_labels()[0]) for ax in panels]
    if max(counts):
        panels[len(counts) - 1 - counts[::-1].index(max(counts))].legend(fontsize=8)
    return panels
