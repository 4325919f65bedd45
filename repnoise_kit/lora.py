"""Train a low-rank change in place of all weights: for a fraction of the memory."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import peft
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.model import seeded
from repnoise_kit.training import NotFiniteError


@contextmanager
def low_rank(model: PreTrainedModel, rank: int | None, seed: int) -> Generator[None]:
    """Let a LoRA of every linear map but the head be trained; on leaving it is merged.

    What is released is then the model as it was, with other weights. Scale 2 (`lora_alpha` twice
    the rank), no dropout. After an exception the model is as it was before, unless the training
    stopped at its last good weights (`NotFiniteError`), which are merged.

    Args:
        model: Changed in place.
        rank: Of the change; None trains all weights.
        seed: Draws what the adapter starts from.

    Raises:
        KitError: the model holds an adapter already, or nothing of it may move.
    """
    if rank is None:
        yield
        return
    check_whole(lora=rank)
    if rank == 0:
        raise KitError("lora is the rank of a low-rank change: 1 or more, or None for all weights")
    if getattr(model, "peft_config", None):
        raise KitError("this model holds an adapter already; train all of it, or a fresh copy")
    names = _maps(model)
    if not names:
        raise KitError("no linear map of the model may move; hold fewer parts still")
    moving = {p for p in model.parameters() if p.requires_grad}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
    with seeded(seed), warnings.catch_warnings():
        # GPT-2's maps lie the other way round; peft sees it, and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        wrapped = peft.get_peft_model(model, config)
    merge = False
    try:
        yield
        merge = True
    except NotFiniteError:
        merge = True
        raise
    finally:
        (wrapped.merge_and_unload if merge else wrapped.unload)()
        for weight in model.parameters():
            weight.requires_grad_(weight in moving)


def _maps(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear maps that may move, the head left out."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and module.weight.requires_grad
    ]
