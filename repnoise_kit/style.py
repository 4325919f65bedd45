"""What colours mean, everywhere in the kit; and styles that last as long as their context."""

from collections.abc import Iterable
from contextlib import ContextDecorator
from typing import Any

import matplotlib as mpl

# Okabe and Ito's colours, and two of Tol's: told apart under every common colour blindness. Each
# meaning has a marker and a line of its own too, so that it survives grey print; a defence's
# markers can be filled or open, which says something where costs are drawn.
COLOURS = {
    "none": "#555555",
    "random": "#555555",
    "naive": "#882255",
    "security_vectors": "#000000",
    "safety_training": "#8C564B",
    "gradient_ascent": "#CC79A7",
    "adversarial_loss": "#D55E00",
    "vaccine": "#009E73",
    "layerwise_ascent": "#E69F00",
    "noise_only": "#56B4E9",
    "repnoise": "#0072B2",
    "repnoise_tokenwise": "#0072B2",
    "weight_noise": "#999933",
    "weight_noise_matched": "#999933",
    "harmful": "#D55E00",
    "harmless": "#009E73",
    "everyday": "#CC79A7",
    "harmful of another": "#E69F00",
    "retain": "#009E73",
    "noise": "#0072B2",
    "ascent": "#D55E00",
    "total": "#000000",
}
MARKERS = {
    "none": "o",
    "base": "o",
    "random": "X",
    "naive": "8",
    "security_vectors": "P",
    "safety_training": "v",
    "gradient_ascent": "<",
    "adversarial_loss": "^",
    "vaccine": "D",
    "layerwise_ascent": "h",
    "noise_only": "*",
    "repnoise": "s",
    "repnoise_tokenwise": "d",
    "weight_noise": ">",
    "weight_noise_matched": "p",
    "harmful": "^",
    "harmless": "v",
    "everyday": "D",
    "harmful of another": "<",
}
LINES = {
    "none": "--",
    "base": "--",
    "random": ":",
    "naive": ":",
    "layerwise_ascent": "-.",
    "noise_only": "-.",
    "repnoise": "-",
    "repnoise_tokenwise": "-.",
    "weight_noise": ":",
    "weight_noise_matched": "-.",
    "harmful": "-",
    "harmless": "-.",
    "everyday": ":",
    "harmful of another": "--",
}
WORDS = {
    "none": "undefended",
    "random": "random weights",
    "naive": "never knew",
    "security_vectors": "security vectors",
    "safety_training": "safety training",
    "gradient_ascent": "gradient ascent",
    "adversarial_loss": "adversarial loss",
    "vaccine": "Vaccine",
    "layerwise_ascent": "layer-wise ascent",
    "noise_only": "noise only",
    "repnoise": "RepNoise",
    "repnoise_tokenwise": "RepNoise, tokenwise",
    "weight_noise": "weight noise",
    "weight_noise_matched": "weight noise, matched",
    "harmful of another": "harmful, of another question",
}

_REST = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#D55E00")


def look(name: str, place: int = 0) -> dict[str, str]:
    """Return colour, marker, line and label of a meaning, or the next free of an unknown name."""
    meaning = "none" if name == "base" else name
    return {
        "color": COLOURS.get(meaning, _REST[place % len(_REST)]),
        "marker": MARKERS.get(meaning, "PX*dh"[place % 5]),
        "linestyle": LINES.get(meaning, "-"),
        "label": WORDS.get(name, name),
    }


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the look of each name; unknown names get colours that no known one here has."""
    names = list(names)
    used = {COLOURS.get(name) for name in names}
    free = [place for place, colour in enumerate(_REST) if colour not in used]
    free = free or list(range(len(_REST)))
    unknown = [name for name in names if name not in COLOURS and name != "base"]
    places = {name: free[place % len(free)] for place, name in enumerate(unknown)}
    return {name: look(name, places.get(name, 0)) for name in names}


class Style(dict, ContextDecorator):
    """Matplotlib settings that hold inside `with style:` or a decorated function, and no longer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._contexts: list[Any] = []

    def __enter__(self) -> "Style":
        """Set them."""
        context = mpl.rc_context(self)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *error: Any) -> None:
        """Put back what was set before."""
        self._contexts.pop().__exit__(*error)


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
