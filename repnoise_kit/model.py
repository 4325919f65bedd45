"""Load a causal language model and find its parts: the only room that knows model families."""

import inspect
import platform
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from repnoise_kit.errors import KitError

# Names of a decoder layer's MLP and attention, family by family; OPT has no MLP module of its
# own, and its second projection is what the residual stream receives.
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")


def load_model(name: str | Path) -> PreTrainedModel:
    """Load a causal LM from a folder or the hub in float32, on the GPU where there is one.

    Only safetensors are read, and no code that comes with a model is run.

    Raises:
        KitError: there is no such model, or it has no generation head.
    """
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        # Whatever a loader trips over: transformers, safetensors and torch each raise their own.
        except Exception as error:
            raise KitError(_why_not(name, error)) from error
    model, report = loaded
    inner = f"{model.base_model_prefix}."
    if any(not key.startswith(inner) for key in report["missing_keys"]):
        raise KitError(f"{name} has no generation head; give a causal language model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def load_tokenizer(name: str | Path) -> transformers.PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; without a padding token it pads with its EOS.

    Raises:
        KitError: there is no tokenizer, or it has no EOS token to end an answer with.
    """
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise KitError(_why_not(name, error, "tokenizer")) from error
    if tokenizer.eos_token_id is None:
        raise KitError(
            f"the tokenizer of {name} has no EOS token, so that no answer could end; set "
            "tokenizer.eos_token to one of its tokens and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def provenance(model: PreTrainedModel) -> dict[str, str]:
    """Return what a number depends on besides its arguments: versions, device and precision."""
    packages = ("repnoise-kit", "torch", "transformers", "numpy")
    return {name: version(name) for name in packages} | {
        "python": platform.python_version(),
        "device": str(model.device),
        "dtype": str(model.dtype),
    }


@contextmanager
def quiet() -> Generator[None]:
    """Hold back the progress bars and warnings of transformers for as long as the context lasts."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
    """Logits are squashed into ±this by a tanh (Gemma 2)."""

    def to_logits(self, normed: Tensor) -> Tensor:
        """Return the logits (…, vocab) of a stream (…, d_model) that `norm` has been applied to."""
        logits = self.head(normed) * self.scale
        return (
            logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)
        )

    def mlp(self, layer: int) -> nn.Module:
        """Return the module whose output a layer's MLP adds to the residual stream."""
        return _child(self.layers[layer], _MLP, "MLP")

    def attention(self, layer: int) -> nn.Module:
        """Return the module whose output a layer's attention adds to the residual stream."""
        return _child(self.layers[layer], _ATTENTION, "attention")


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
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not lists:
        raise KitError(f"{type(model).__name__} shows no list of {config.num_hidden_layers} layers")
    name, layers = min(lists, key=lambda found: found[0].count("."))
    parent = model.get_submodule(name.rpartition(".")[0])
    norms = [m for label, m in parent.named_children() if "norm" in label or label == "ln_f"]
    if not norms:
        raise KitError(f"{type(model).__name__} shows no norm after its layers ({name})")
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )
    return Parts(layers, norms[-1], head, scale, getattr(config, "final_logit_softcapping", None))


def hidden_forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> None:
    """Run a model for the sake of its hooks, with as little work in the head as it allows."""
    inner = getattr(model, "module", model)
    least = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(inner) else {}
    model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **least)


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw from a seed for as long as the context lasts; the process's own state is given back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


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


def _why_not(name: str | Path, error: Exception, what: str = "causal language model") -> str:
    """Say in one line why a model or tokenizer could not be loaded, and what would."""
    if not Path(name).is_dir():
        return (
            f"{name} is no folder here and could not be had from the hub; check the name and the "
            "network, or give the folder of a local copy"
        )
    if not (Path(name) / "config.json").exists():
        return f"{name} holds no model (no config.json); give a folder made by save_pretrained"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{name} does not load as a {what}: {reason}"


def _part(model: PreTrainedModel, part: int | str) -> nn.Module:
    if isinstance(part, int):
        return parts(model).layers[check_layers(model, [part])[0]]
    named = {"head": model.get_output_embeddings, "embedding": model.get_input_embeddings}
    if part in named:
        return named[part]()
    if part == "norm":
        return parts(model).norm
    try:
        return model.get_submodule(part)
    except AttributeError:
        raise KitError(
            f"the model has no part {part!r}: use a layer's number, 'head', 'norm', 'embedding' "
            "or the exact name of a module"
        ) from None


def _child(layer: nn.Module, names: Iterable[str], what: str) -> nn.Module:
    for name in names:
        if isinstance(found := getattr(layer, name, None), nn.Module):
            return found
    raise KitError(
        f"no {what} found in {type(layer).__name__}, whose modules are "
        + ", ".join(name for name, _ in layer.named_children())
    )


def _arguments(model: nn.Module) -> Iterable[str]:
    return inspect.signature(model.forward).parameters
