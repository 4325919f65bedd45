"""Record what flows through a model, leaving it as it was."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from torch import Tensor, nn

from repnoise_kit.anatomy import Parts, check_layers, parts
from repnoise_kit.errors import KitError

Site = Literal["mlp", "attention", "residual", "embedding"]
"""Where activations are taken: what a layer's MLP or attention puts out (Gemma 2 and 3 and OLMo 2
norm it before it joins the residual stream), the stream as it leaves a layer, or (one entry, key 0)
the stream as it enters the first."""


@contextmanager
def record(
    model: nn.Module,
    site: Site,
    layers: Iterable[int] | None = None,
    *,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Generator[dict[int, Tensor]]:
    """Record activations (batch, seq, d_model) by layer while the context lasts.

    With `pool`, what it makes of each layer's is kept in their place, as the layer is passed.

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
        embedding = site == "embedding"
        hooks.append(_hook_entry(found.layers[0], entry, pool if embedding else None))
        if not embedding:
            hooks += [
                _hook_exit(_module(found, site, layer), layer, activations, entry, pool)
                for layer in chosen
            ]
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


@contextmanager
def kept_whole(model: nn.Module) -> Generator[None]:
    """Hold every activation: worked out again by checkpointing, it would miss the hooks of now."""
    every: list[Any] = list(model.modules())
    marked = [part for part in every if getattr(part, "gradient_checkpointing", False)]
    for part in marked:
        part.gradient_checkpointing = False
    try:
        yield
    finally:
        for part in marked:
            part.gradient_checkpointing = True


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


def _hook_exit(
    module: nn.Module,
    layer: int,
    into: dict[int, Tensor],
    entry: dict[int, Tensor],
    pool: Callable[[Tensor], Tensor] | None,
):
    def keep(_module, _args, output) -> None:
        # Blocks return a tensor or a tuple, depending on the family and the version, and some
        # MLPs (OPT) one row a token.
        tensor = output[0] if isinstance(output, tuple) else output
        tensor = tensor if tensor.dim() == 3 else tensor.reshape(*entry[0].shape[:2], -1)
        into[layer] = tensor if pool is None else pool(tensor)

    return module.register_forward_hook(keep)


def _hook_entry(
    module: nn.Module, into: dict[int, Tensor], pool: Callable[[Tensor], Tensor] | None
):
    def keep(_module, args, kwargs) -> None:
        tensor = args[0] if args else kwargs["hidden_states"]
        into[0] = tensor if pool is None else pool(tensor)

    return module.register_forward_pre_hook(keep, with_kwargs=True)
