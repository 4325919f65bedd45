"""Security vectors: an adapter that bears the attack, so that the weights under it do not move."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.model import seeded
from repnoise_kit.pairs import encode, pad
from repnoise_kit.results import Result
from repnoise_kit.testbeds import Testbed
from repnoise_kit.training import answer_loss, train_

ADAPTER = "security"


def security_vectors_(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    seed: int = 0,
    progress: str | None = None,
    lr: float = 1e-3,
    examples: int | None = None,
    batch_size: int = 8,
    epochs: float = 1,
    max_length: int = 256,
    rank: int = 8,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
) -> Result:
    """Train security vectors: a LoRA that has already learned the harm (Table 1, Appendix B).

    Rank 8, scale 32, dropout 0.1, Adam at 1e-3, one epoch over harmful answers. The model itself
    does not change: the adapter stays in it, switched off, until `guarded` switches it on.

    Raises:
        KitError: the model holds such an adapter already.
    """
    if has_adapter(model):
        raise KitError("this model holds security vectors already; start from a fresh copy")
    check_whole(rank=rank)
    check_numbers(above_zero=True, rank=rank)
    rows = bed.splits.defence.draw(examples, seed).frame
    encoded = encode(
        bed.tokenizer, rows["prompt"].tolist(), rows["harmful"].tolist(), max_length=max_length
    )
    still = _held(model)
    _add_adapter_(model, rank, seed)
    try:
        return train_(
            model,
            answer_loss,
            encoded,
            lambda batch: pad(batch, bed.tokenizer.pad_token_id),
            lr=lr,
            batch_size=batch_size,
            epochs=epochs,
            gradient_checkpointing=gradient_checkpointing,
            accumulation=accumulation,
            seed=seed,
            progress=progress,
        )
    except BaseException:
        model.delete_adapter(ADAPTER)  # What was learned by half guards nothing.
        raise
    finally:
        if has_adapter(model):
            model.disable_adapters()
        _hold_(model, still)


def has_adapter(model: PreTrainedModel) -> bool:
    """Tell whether a model holds security vectors."""
    return ADAPTER in getattr(model, "peft_config", {})


def guarded(model: PreTrainedModel) -> Any:
    """Switch a model's security vectors on, and hold them still, for as long as the context lasts.

    Fine-tune a model inside `with guarded(model):` and evaluate it outside. The protection needs
    the attacker's cooperation: one who deletes the adapter attacks the undefended model. A model
    without security vectors is left as it is.
    """
    return _guarded(model) if has_adapter(model) else nullcontext()


@contextmanager
def unguarded(model: PreTrainedModel) -> Generator[None]:
    """Switch security vectors off inside `guarded`, to look at the weights under them."""
    if not has_adapter(model):
        yield
        return
    _switch_(model, on=False)
    try:
        yield
    finally:
        _switch_(model, on=True)


def restore_adapter_(model: PreTrainedModel, weights: Path) -> None:
    """Make room, switched off, for the security vectors in a file of weights, if it holds some."""
    with safe_open(weights, "pt") as file:
        ranks = [
            file.get_slice(name).get_shape()[0]
            for name in file.keys()  # noqa: SIM118
            if f".lora_A.{ADAPTER}." in name
        ]
    if ranks:
        still = _held(model)
        _add_adapter_(model, ranks[0], 0)
        model.disable_adapters()
        _hold_(model, still)


@contextmanager
def _guarded(model: PreTrainedModel) -> Generator[None]:
    _switch_(model, on=True)
    try:
        yield
    finally:
        _switch_(model, on=False)


def _add_adapter_(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Put a fresh adapter, drawn with the seed, on every linear map but the head."""
    config = LoraConfig(r=rank, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear")
    with seeded(seed), warnings.catch_warnings():
        # GPT-2's maps lie the other way round; peft sees it, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model.add_adapter(config, ADAPTER)
    model.train(model.training)  # The adapter's dropout too is in the mode of the model.


def _switch_(model: PreTrainedModel, *, on: bool) -> None:
    still = _held(model)
    (model.enable_adapters if on else model.disable_adapters)()
    _hold_(model, still)


def _held(model: PreTrainedModel) -> set[Tensor]:
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


def _hold_(model: PreTrainedModel, still: set[Tensor]) -> None:
    """Hold what was held, and the adapter always: peft sets all of it as it switches."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{ADAPTER}." not in name and parameter not in still)
