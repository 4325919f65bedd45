"""Everything in which published RepNoise losses differ, and the presets: named settings of it."""

from typing import Literal, TypedDict, get_args, get_origin, get_type_hints

from repnoise_kit.errors import KitError


class Knobs(TypedDict, total=False):
    """Everything in which published RepNoise losses differ, besides `alpha` and `beta`."""

    mask: Literal["answer", "unequal", "none"]
    """Tokens that count: the labelled ones, those that differ from the partner's, or all."""
    pads: bool
    """Padding may count too, where the mask is not `"answer"`."""
    retain_on: Literal["mask", "answer", "all"]
    """Tokens of the harmless sequence that the retain term is taken on."""
    zero_logits: bool
    """Logits at tokens outside the mask become 0: the first token inside is then a constant."""
    drop_token_zero: bool
    """Token id 0 is never predicted."""
    lens: Literal["layers", "published", "final", "mlp"]
    """What is read through the head: the output of each layer; the embedding, each layer and the
    logits once more; the last layer; the output of each MLP."""
    lens_layers: int | None
    """Read only so many of these, drawn anew at each step: cheaper. Their mean is right on average,
    its logarithm a little too small."""
    norm_last_twice: bool
    """The last layer's output passes the final norm twice, as `hidden_states[-1]` then does."""
    normalise: Literal["mean", "published", "sum"]
    """What becomes of the n terms of the lens, of sum S: S/n, S/(n - 1) + 1, or S."""
    log: bool
    """The ascent term is -alpha · log(ascent), else -alpha · ascent."""
    noise_on: Literal["mlp", "residual", "attention"]
    """The activations that are turned to noise."""
    rows: Literal["sequence", "token"]
    """A row of the MMD: a masked sequence, flattened; or a token inside the mask, of which at
    most 128 a batch are drawn."""
    unbiased: bool
    """Leave each row's kernel with itself out of the MMD."""
    bandwidth: float | None
    """A fixed kernel bandwidth in place of the mean squared distance."""
    noise_across: bool
    """Among several processes the MMD is of all their rows, else the mean of each one's own."""
    noise_seed: int | None
    """Draw the same noise at each step."""


PAPER: Knobs = {
    "mask": "answer",
    "pads": False,
    "retain_on": "mask",
    "zero_logits": False,
    "drop_token_zero": False,
    "lens": "layers",
    "lens_layers": None,
    "norm_last_twice": False,
    "normalise": "mean",
    "log": True,
    "noise_on": "mlp",
    "rows": "sequence",
    "unbiased": False,
    "bandwidth": None,
    "noise_across": True,
    "noise_seed": None,
}
REFERENCE: Knobs = {
    **PAPER,
    "mask": "unequal",
    "pads": True,
    "zero_logits": True,
    "drop_token_zero": True,
    "lens": "published",
    "norm_last_twice": True,
    "normalise": "published",
}
TOKENWISE: Knobs = {**PAPER, "noise_on": "residual", "rows": "token"}
PRESETS = {"paper": PAPER, "reference": REFERENCE, "tokenwise": TOKENWISE}


def choose(preset: str, knobs: Knobs) -> Knobs:
    """Return a preset with these knobs changed.

    Raises:
        KitError: an unknown preset or knob, or a value that it does not take.
    """
    if preset not in PRESETS:
        raise KitError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if unknown := sorted(set(knobs) - set(PAPER)):
        raise KitError(f"repnoise_loss has no knob {unknown[0]!r}; it has {', '.join(PAPER)}")
    given: dict[str, object] = {**knobs}
    for name, kind in get_type_hints(Knobs).items():
        allowed = get_args(kind) if get_origin(kind) is Literal else ()
        if kind is bool:
            allowed = (False, True)
        if name in given and allowed and given[name] not in allowed:
            raise KitError(
                f"{name} must be one of {', '.join(map(str, allowed))}, not {given[name]!r}"
            )
    return {**PRESETS[preset], **knobs}
