"""Open and redraw a study in one figure, beside the same figure drawn by hand, on one machine.

    python tests/benchmarks/panel.py          # 1,000 trials in SQLite, medians of 7
    python tests/benchmarks/panel.py --trials 30 --times 1

By hand: the same axes, points and words in plain Matplotlib, from arrays that lie ready. The study
is opened in a process of its own, as a person would after a restart. What to quote is the ratio
within a run: the seconds are this machine's.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]


def main() -> None:
    arguments = _arguments()
    if arguments.open:
        print(json.dumps(opened(arguments.open)))
        return
    from made_up import made_up

    with tempfile.TemporaryDirectory() as folder:
        address = f"sqlite:///{folder}/study.db"
        made_up(arguments.trials, address)
        command = [sys.executable, __file__, "--open", address]
        firsts = [json.loads(subprocess.check_output(command)) for _ in range(arguments.times)]
        imports, first = (statistics.median(part) for part in zip(*firsts, strict=True))
        print(f"{'':22}{'seconds':>9}{'by hand':>9}{'ratio':>7}")
        print(f"{'imports':22}{imports:9.3f}")
        print(f"{'open and first draw':22}{first:9.3f}")
        for show, ours, hand in redrawn(address, arguments.times):
            print(f"{'redraw, ' + show:22}{ours:9.3f}{hand:9.3f}{ours / hand:7.2f}")


def opened(address: str) -> tuple[float, float]:
    """Return the seconds of imports, and from opening a study to its first picture."""
    start = time.perf_counter()
    import optuna
    from made_up import NAME

    from repnoise_kit.overview import draw, png

    ready = time.perf_counter()
    png(draw(optuna.load_study(study_name=NAME, storage=address)))
    return ready - start, time.perf_counter() - ready


def redrawn(address: str, times: int) -> list[tuple[str, float, float]]:
    """Return for each `show` the median seconds of a redraw with another trial, and by hand."""
    import optuna
    from made_up import NAME

    from repnoise_kit.overview import SHOWS, draw, png

    study = optuna.load_study(study_name=NAME, storage=address)
    found = []
    for show in SHOWS:
        panels = seen(draw(study, trial=0, show=show))
        # The first of each is not counted: fonts and the study are read once.
        ours, hand = [], []
        for trial in range(times + 1):
            ours.append(seconds(lambda: png(draw(study, trial=trial, show=show))))  # noqa: B023
            hand.append(seconds(lambda: by_hand(panels)))  # noqa: B023
        found.append((show, statistics.median(ours[1:]), statistics.median(hand[1:])))
    return found


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def seen(figure) -> list[dict]:
    """Read back from a figure what there is to draw, panel by panel."""
    from matplotlib.collections import LineCollection, PathCollection

    return [
        {
            "place": ax.get_position().bounds,
            "scale": ax.get_xscale(),
            "words": (ax.get_title(loc="left"), ax.get_xlabel()),
            "lines": [
                (part.get_xdata(), part.get_ydata(), part.get_marker(), part.get_linestyle())
                for part in ax.lines
                if part.get_transform() == ax.transData
            ],
            "edge": [
                (part.get_xdata(), part.get_ydata())
                for part in ax.lines
                if part.get_transform() != ax.transData
            ],
            "marks": [
                (part.get_offsets().T, part.get_array())
                for part in ax.collections
                if isinstance(part, PathCollection)
            ],
            "reaches": [
                [(x, low, high) for (x, low), (_, high) in part.get_segments()]
                for part in ax.collections
                if isinstance(part, LineCollection) and part.get_segments()
            ],
            "bars": [(bar.get_y(), bar.get_width()) for bar in ax.patches],
            "legend": bool(ax.get_legend()),
        }
        for ax in figure.axes
    ]


def by_hand(panels: list[dict]) -> bytes:
    """Draw these panels as one would who has the numbers, and nothing else to take care of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.8, 5.6), dpi=100)
    for panel in panels:
        ax = figure.add_axes(panel["place"])
        ax.set_xscale(panel["scale"])
        for place, (x, y, marker, line) in enumerate(panel["lines"]):
            ax.plot(x, y, marker=marker, linestyle=line, label=f"line {place}")
        for x, y in panel["edge"]:
            ax.plot(x, y, "o", transform=ax.get_yaxis_transform())
        for reaches in panel["reaches"]:
            ax.vlines(*zip(*reaches, strict=True))
        for (x, y), shades in panel["marks"]:
            ax.scatter(x, y, s=6, c=shades)
        for y, width in panel["bars"]:
            ax.barh(y, width, height=0.36)
        title, across = panel["words"]
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(across, fontsize=8)
        ax.tick_params(labelsize=8)
        if panel["legend"] and panel["lines"]:
            ax.legend(fontsize=8, loc="upper left")
    figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--open", help="open this study only, and say the seconds as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
