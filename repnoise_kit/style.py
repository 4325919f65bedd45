"""What colours mean, everywhere in the kit; and styles that last as long as their context."""

from contextlib import ContextDecorator
from typing import Any

import matplotlib as mpl

# Okabe and Ito's colours: told apart under every common colour blindness. Each meaning has a
# marker and a line of its own too, so that it survives grey print.
COLOURS = {
    "none": "#555555",
    "repnoise": "#0072B2",
    "harmful": "#D55E00",
    "harmless": "#009E73",
    "everyday": "#CC79A7",
    "retain": "#009E73",
    "noise": "#0072B2",
    "ascent": "#D55E00",
    "total": "#000000",
}
MARKERS = {"none": "o", "repnoise": "s", "harmful": "^", "harmless": "v", "everyday": "D"}
LINES = {"none": "--", "repnoise": "-", "harmful": "-", "harmless": "-.", "everyday": ":"}
WORDS = {"none": "undefended", "repnoise": "RepNoise"}

_REST = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00")


def look(name: str, place: int = 0) -> dict[str, str]:
    """Return colour, marker and line of a meaning, or the next free ones for an unknown name."""
    return {
        "color": COLOURS.get(name, _REST[place % len(_REST)]),
        "marker": MARKERS.get(name, "PX*dh"[place % 5]),
        "linestyle": LINES.get(name, "-"),
        "label": WORDS.get(name, name),
    }


class Style(dict, ContextDecorator):
    """Matplotlib settings that hold inside `with style:` or a decorated function, and no longer."""

    def __enter__(self) -> "Style":
        """Set them."""
        self._context = mpl.rc_context(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Put back what was set before."""
        self._context.__exit__(*error)


def clean_style() -> Style:
    """Return a quiet style: no box around a plot, no frame around its legend."""
    return Style(
        {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 100,
            "font.size": 10,
        }
    )
