"""Load a causal language model and its tokenizer, and run it."""

import inspect
import platform
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from repnoise_kit import processes
from repnoise_kit.errors import KitError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path, *, revision: str | None = None, dtype: str = "float32"
) -> PreTrainedModel:
    """Load a causal LM from a folder or the hub, on the GPU where there is one.

    Only safetensors are read, and no code that comes with a model is run.

    Args:
        name: A folder that `save_pretrained` made, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        dtype: Of the weights. Small steps are lost in half precision unless an adapter takes them.

    Raises:
        KitError: there is no such model, or it has no generation head.
    """
    if dtype not in DTYPES:
        raise KitError(f"there is no dtype {dtype!r} here; there are {', '.join(DTYPES)}")
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                revision=revision or "main",
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        # Whatever a loader trips over: transformers, safetensors and torch each raise their own.
        except Exception as error:
            raise KitError(why_not(name, error)) from error
    model, report = loaded
    inner = f"{model.base_model_prefix}."
    if any(not key.startswith(inner) for key in report["missing_keys"]):
        raise KitError(f"{name} has no generation head; give a causal language model")
    return model.to(processes.device()).eval()


def load_tokenizer(
    name: str | Path, *, revision: str | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; without a padding token it pads with its EOS.

    Raises:
        KitError: there is no tokenizer, or it has no EOS token to end an answer with.
    """
    with quiet():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                name, revision=revision or "main", trust_remote_code=False
            )
        except Exception as error:
            raise KitError(why_not(name, error, "tokenizer")) from error
    if tokenizer.eos_token_id is None:
        raise KitError(
            f"the tokenizer of {name} has no EOS token, so that no answer could end; set "
            "tokenizer.eos_token to one of its tokens and save it again"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def precision(device: torch.device) -> str:
    """Return what a training computes in: `bf16` where the hardware has it, else `fp16`, `fp32`.

    Weights stay what they are: of float32 ones this is mixed precision. A Colab T4 only emulates
    bf16, and a CPU trains in fp32.
    """
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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


def hidden_forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run a model for the sake of its hooks, with as little work in the head as it allows.

    Returns:
        The logits (batch, vocab) at the last position.
    """
    inner = getattr(model, "module", model)
    least = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(inner) else {}
    output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **least)
    return output.logits[:, -1]


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Draw from a seed for as long as the context lasts; the process's own state is given back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def why_not(name: str | Path, error: Exception, what: str = "causal language model") -> str:
    """Say in one line why a model or tokenizer could not be loaded, and what would."""
    if not Path(name).is_dir():
        return (
            f"{name} is no folder here and could not be had from the hub; check the name and the "
            "network (a gated model needs a login: hf auth login; only safetensors are read), or "
            "give the folder of a local copy"
        )
    if not (Path(name) / "config.json").exists():
        return f"{name} holds no model (no config.json); give a folder made by save_pretrained"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{name} does not load as a {what}: {reason}"


def _arguments(model: nn.Module) -> Iterable[str]:
    return inspect.signature(model.forward).parameters
