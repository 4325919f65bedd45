"""Record what flows through a model, leaving it as it was."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor, nn

from repnoise_kit.errors import KitError
from repnoise_kit.model import Parts, check_layers, parts

Site = Literal["mlp", "attention", "residual", "embedding"]
"""Where activations are taken: what a layer's MLP or attention adds to the residual stream, the
stream as it leaves a layer, or (one entry, key 0) the stream as it enters the first."""


@contextmanager
def record(
    model: nn.Module, site: Site, layers: Iterable[int] | None = None
) -> Generator[dict[int, Tensor]]:
    """Record activations (batch, seq, d_model) by layer while the context lasts.

    Each forward pass replaces the last one's. Gradients flow through what is recorded. On leaving,
    also by an exception, the hooks are those from before: the model's own are never touched.

    Example:
        >>> with record(model, "mlp") as activations:
        ...     model(**batch)
        >>> activations[0].shape
    """
    if site not in get_args(Site):
        raise KitError(f"site must be one of {', '.join(get_args(Site))}, not {site!r}")
    found = parts(model)
    chosen = range(len(found.layers)) if layers is None else check_layers(model, layers)
    activations: dict[int, Tensor] = {}
    entry: dict[int, Tensor] = activations if site == "embedding" else {}
    hooks = []
    try:
        hooks.append(_hook_entry(found.layers[0], entry))
        if site != "embedding":
            hooks += [_hook_exit(_module(found, site, i), i, activations, entry) for i in chosen]
        yield activations
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def perturbed(model: nn.Module, site: Site, shifts: Mapping[int, Tensor]) -> Generator[None]:
    """Add a constant (batch, seq, d_model) to what a site puts out at each of some layers.

    Raises:
        KitError: a site that is not a layer's, or a layer that does not exist.
    """
    if site not in get_args(Site)[:3]:
        raise KitError(f"site must be one of {', '.join(get_args(Site)[:3])}, not {site!r}")
    found = parts(model)
    hooks = []
    try:
        for layer in check_layers(model, shifts):
            module = _module(found, site, layer)
            hooks.append(module.register_forward_hook(_adder(shifts[layer])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adder(shift: Tensor):
    def add(_module, _args, output):
        if isinstance(output, tuple):
            return (output[0] + shift.view_as(output[0]), *output[1:])
        return output + shift.view_as(output)

    return add


def _module(found: Parts, site: Site, layer: int) -> nn.Module:
    if site == "residual":
        return found.layers[layer]
    return found.mlp(layer) if site == "mlp" else found.attention(layer)


def _hook_exit(module: nn.Module, layer: int, into: dict[int, Tensor], entry: dict[int, Tensor]):
    def keep(_module, _args, output) -> None:
        # Blocks return a tensor or a tuple, depending on the family and the version, and some
        # MLPs (OPT) one row a token.
        tensor = output[0] if isinstance(output, tuple) else output
        into[layer] = tensor if tensor.dim() == 3 else tensor.reshape(*entry[0].shape[:2], -1)

    return module.register_forward_hook(keep)


def _hook_entry(module: nn.Module, into: dict[int, Tensor]):
    def keep(_module, args, kwargs) -> None:
        into[0] = args[0] if args else kwargs["hidden_states"]

    return module.register_forward_pre_hook(keep, with_kwargs=True)
