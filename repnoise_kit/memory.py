"""What a training will hold in memory, told before it begins."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

LARGE = 256 << 20
"""Bytes of weights from which on a training says what it needs."""

LESS = (
    "use lora=16, gradient_checkpointing=True, a smaller max_length or a smaller batch_size, "
    "in this order"
)


class Memory(NamedTuple):
    """Bytes that a training holds at once."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments."""
    activations: int
    """What the loss of one batch keeps for its gradient."""

    def __str__(self) -> str:
        """Write it in gigabytes: `31.2 GB (weights 5.9, gradients 5.9, …)`."""
        parts = (f"{name} {size / 1e9:.1f}" for name, size in self._asdict().items())
        return f"{sum(self) / 1e9:.1f} GB ({', '.join(parts)})"


def memory_needed(
    model: nn.Module, loss: Callable[[], Tensor], rows: int, examples: int = 1
) -> Memory:
    """Return what training a model holds at once.

    Activations are counted, not guessed: everything that autograd keeps of the loss of a few
    examples, times the rest of the batch. What a backward pass needs in passing is not in it, nor
    are the layers' inputs that gradient checkpointing holds.

    Args:
        model: As it will be trained: parts held still need no gradients.
        loss: Computes the loss of `examples` rows.
        rows: Of a batch in the training.
        examples: Rows that the loss is computed on.
    """
    moving = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return Memory(
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=moving,
        optimizer=2 * moving,
        activations=_kept(model, loss) * rows // examples,
    )


def announce(needed: Memory, device: torch.device) -> str:
    """Say what a training needs, what is free, and what to change where it may not fit."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free()
    more = sum(needed) - needed.weights  # The weights are there already.
    said = f"this training needs about {needed}; {free / 1e9:.1f} GB are free beside the weights"
    return said if more < free else f"{said}: it may not fit; {LESS}"


def largest(examples: Sequence[Any]) -> Any:
    """Return the example that holds most, so that an estimate is none too small."""
    return max(examples, key=_size)


def _free() -> int:
    return psutil.virtual_memory().available


def _size(example: Any) -> int:
    if isinstance(example, dict):
        return sum(_size(value) for value in example.values())
    if isinstance(example, list | tuple):
        return (
            sum(map(_size, example))
            if example and not isinstance(example[0], int)
            else len(example)
        )
    return 1


def _kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the bytes that autograd keeps of a loss, each storage once, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()  # Alive to the end, so that no address is used twice.
    del held
    return sum(kept.values())
