"""Find a model's parts and hold them still: the only room that knows model families."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from repnoise_kit.errors import KitError

# Names of a decoder layer's MLP and attention, family by family; OPT has no MLP module of its
# own, and its second projection is what the residual stream receives.
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_TOLD = "repnoise_parts"


@dataclass(frozen=True)
class Parts:
    """Where a model keeps what RepNoise works on."""

    layers: nn.ModuleList
    """The decoder layers, first to last."""
    norm: nn.Module
    """The norm between the last layer and the head."""
    head: nn.Module
    """The unembedding, from the width of the model to its vocabulary."""
    scale: float
    """What the head's output is multiplied by (Cohere, Granite)."""
    soft_cap: float | None
    """Logits are squashed into ±this by a tanh (Gemma 2, RecurrentGemma)."""
    mlp_names: tuple[str, ...] = _MLP
    """What a layer may call its MLP; the first that it has counts."""
    attention_names: tuple[str, ...] = _ATTENTION
    """What a layer may call its attention."""
    root: nn.Module | None = None
    """The model itself."""

    def to_logits(self, normed: Tensor) -> Tensor:
        """Return the logits (…, vocab) of a stream (…, d_model) that `norm` has been applied to."""
        logits = _run(self.head, normed) * self.scale
        return (
            logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
        )

    def reader(self, norms: int = 1) -> nn.Module:
        """Return what reads a stream (…, d_model) as logits: the norm, so many times, and head."""
        return _Reader(self, norms)

    def mlp(self, layer: int) -> nn.Module:
        """Return a layer's MLP; its output joins the residual stream, in some families normed."""
        return _child(self.layers[layer], self.mlp_names, "mlp")

    def attention(self, layer: int) -> nn.Module:
        """Return a layer's attention; its output joins the stream, in some families normed."""
        return _child(self.layers[layer], self.attention_names, "attention")


class _Reader(nn.Module):
    def __init__(self, found: Parts, norms: int) -> None:
        super().__init__()
        self.norm, self.head = found.norm, found.head  # Their parameters are the reader's.
        self.found, self.norms = found, norms
        for module in (found.root, found.norm, found.head):
            if isinstance(module, FSDPModule):
                module.unshard()  # To the end of the step; what is cut up has no gradient here.

    def forward(self, stream: Tensor) -> Tensor:
        for _ in range(self.norms):
            stream = _run(self.norm, stream)
        return self.found.to_logits(stream)


def _run(module: nn.Module, stream: Tensor) -> Tensor:
    """Run a module without the hooks by which FSDP would take its use here for a whole step."""
    return module.forward(stream) if isinstance(module, FSDPModule) else module(stream)


def parts(model: nn.Module) -> Parts:
    """Find the decoder layers, final norm and unembedding of a causal LM, wrapped or not.

    Raises:
        KitError: the model has no output embedding, or its layers or norm are not to be found.
    """
    model: Any = getattr(model, "module", model)
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        raise KitError(
            f"{type(model).__name__} has no generation head; load a causal language model instead"
        )
    told: dict[str, str] = getattr(config, _TOLD, {})
    name = told.get("layers") or _layers_name(model, getattr(config, "num_hidden_layers", None))
    layers = model.get_submodule(name)
    if not isinstance(layers, nn.ModuleList):
        raise KitError(f"{name} is no list of layers but a {type(layers).__name__}")
    norm = told.get("norm") or _norm_name(model, name)
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )
    return Parts(
        layers=layers,
        norm=model.get_submodule(norm),
        head=head,
        scale=scale,
        soft_cap=getattr(config, "final_logit_softcapping", None)
        or getattr(config, "logits_soft_cap", None),
        mlp_names=(told["mlp"],) if "mlp" in told else _MLP,
        attention_names=(told["attention"],) if "attention" in told else _ATTENTION,
        root=model,
    )


@torch.no_grad()
def check_lens(
    model: nn.Module, hidden: Float[Tensor, "batch d_model"], own: Float[Tensor, "batch vocab"]
) -> None:
    """Refuse a model whose own logits are not its norm and head on what its last layer leaves.

    Raises:
        KitError: they differ by more than rounding.
    """
    ours = parts(model).reader()(hidden).float()
    size = own.float().abs().max()
    exact = own.dtype == torch.float32 and not torch.is_autocast_enabled(own.device.type)
    if not (ours - own.float()).abs().max() <= (1e-3 if exact else 3e-2) * size:
        inner = getattr(model, "module", model)
        raise KitError(
            f"{type(inner).__name__} makes its logits otherwise than by its last norm and head, so "
            "that no layer can be read through them; look at rk.name_parts_"
        )


def name_parts_(model: PreTrainedModel, **names: str) -> None:
    """Say where a model of an unknown family keeps its parts.

    Written into the model's configuration, so that it is saved and loaded with the model.

    Args:
        model: Its configuration is changed.
        names: `layers` and `norm` are names of modules of the model (`"transformer.blocks"`), the
            norm being the one before the head; `mlp` and `attention` are names within a layer.
            What is not named is looked for as before.

    Raises:
        KitError: another word than these four, or a module that does not exist.

    Example:
        >>> rk.name_parts_(model, layers="transformer.blocks", norm="transformer.ln_last")
    """
    config = model.config.get_text_config()
    if wrong := [what for what in names if what not in ("layers", "norm", "mlp", "attention")]:
        raise KitError(f"there is no part {wrong[0]!r}; name layers, norm, mlp or attention")
    before = getattr(config, _TOLD, {})
    setattr(config, _TOLD, before | names)
    try:
        found = parts(model)
        for layer in range(len(found.layers)):
            _ = "mlp" in names and found.mlp(layer), "attention" in names and found.attention(layer)
    except (AttributeError, KitError) as error:
        if before:
            setattr(config, _TOLD, before)
        else:
            delattr(config, _TOLD)
        raise KitError(f"{error}; names are those of model.named_modules()") from error


@contextmanager
def frozen(model: PreTrainedModel, held: Iterable[int | str]) -> Generator[None]:
    """Hold parts of a model still for as long as the context lasts.

    Args:
        model: The model about to be trained.
        held: Layers by number, `"head"`, `"norm"`, `"embedding"`, or exact module names. A module
            is held with all it contains, and nothing is ever held because its name *resembles*
            another's.

    Raises:
        KitError: a layer or module that does not exist.
    """
    still = {p for part in held for p in _part(model, part).parameters()}
    before = {p: p.requires_grad for p in still}
    try:
        for parameter in still:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def check_layers(model: nn.Module, layers: Iterable[int]) -> list[int]:
    """Return the layers as a list, or name the first that does not exist."""
    count = len(parts(model).layers)
    chosen = list(layers)
    for layer in chosen:
        if not 0 <= layer < count:
            raise KitError(f"layer {layer} does not exist: this model has layers 0 to {count - 1}")
    return chosen


def _part(model: PreTrainedModel, part: int | str) -> nn.Module:
    if isinstance(part, Integral) and not isinstance(part, bool):
        return parts(model).layers[check_layers(model, [int(part)])[0]]
    named = {"head": model.get_output_embeddings, "embedding": model.get_input_embeddings}
    if part in named:
        return named[part]()
    if part == "norm":
        return parts(model).norm
    try:
        if not isinstance(part, str) or not part:  # "" would be the whole model.
            raise AttributeError
        return model.get_submodule(part)
    except AttributeError:
        raise KitError(
            f"the model has no part {part!r}: use a layer's number, 'head', 'norm', 'embedding' "
            "or the exact name of a module"
        ) from None


def _layers_name(model: nn.Module, count: int | None) -> str:
    """Return the name of the list of as many modules as there are layers, the outermost one."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise KitError(
            f"{type(model).__name__} shows no list of {count or 'its'} layers; "
            "name it: rk.name_parts_(model, layers=…)"
        )
    return min(lists, key=lambda name: name.count("."))


def _norm_name(model: nn.Module, layers: str) -> str:
    """Return the name of the norm beside the layers, which comes after them."""
    parent = layers.rpartition(".")[0]
    beside = model.get_submodule(parent).named_children()
    norms = [name for name, _ in beside if "norm" in name or name == "ln_f"]
    if not norms:
        raise KitError(
            f"{type(model).__name__} shows no norm after its layers ({layers}); "
            "name it: rk.name_parts_(model, norm=…)"
        )
    return f"{parent}.{norms[-1]}".lstrip(".")


def _child(layer: nn.Module, names: Iterable[str], what: str) -> nn.Module:
    for name in names:
        try:
            return layer.get_submodule(name)
        except AttributeError:
            continue
    listed = ", ".join(name for name, _ in layer.named_children())
    raise KitError(
        f"no {what} found in {type(layer).__name__}, whose modules are {listed}; "
        f"name it: rk.name_parts_(model, {what}=…)"
    )
