"""What a training will hold in memory, told before it begins."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 256 << 20
"""Bytes of weights from which on a training says what it needs."""

FEW = 2
"""Rows that are counted, and one more: what they differ by is what each further row needs."""

LESS = (
    "use lora=16, gradient_checkpointing=True, a smaller max_length or accumulation=2 (a batch in "
    "two parts) or more, in this order"
)


class Memory(NamedTuple):
    """Bytes that a training holds at once."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's two moments, and of a small training the copy of the last good weights."""
    activations: int
    """What forward and backward pass of one batch hold at their fullest, beside the lens."""
    lens: int
    """What is as wide as the vocabulary then: logits, their gradients, and the head's."""

    def __str__(self) -> str:
        """Write it in gigabytes: `31.2 GB (weights 5.9, gradients 5.9, …)`."""
        parts = (f"{name} {size / 1e9:.1f}" for name, size in self._asdict().items())
        return f"{sum(self) / 1e9:.1f} GB ({', '.join(parts)})"


def memory_needed(model: nn.Module, loss: Callable[[int], Tensor], rows: int) -> Memory:
    """Return what training a model holds at once.

    Counted, not guessed: a few rows go forward and backward, and every tensor is followed from
    its making to its end. The gradients are given up as they come, so that the count itself needs
    little. Not in it is what several processes hold for one another, nor, on a CPU, what the C
    library's heap keeps of freed tensors: under a tenth of a model of 58 million weights, and as
    much again, or more, of models so small that nothing is said of them.

    Args:
        model: As it will be trained: parts held still need no gradients.
        loss: Computes the loss of so many rows.
        rows: Of a batch in the training.
    """
    moving = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.nbytes for p in moving)
    few = min(rows, FEW)
    fullest = _fullest(model, moving, lambda: loss(few))
    if rows > few:
        more = _fullest(model, moving, lambda: loss(few + 1))
        fullest = [a + (b - a) * (rows - few) for a, b in zip(fullest, more, strict=True)]
    return Memory(
        weights=sum(p.nbytes for p in model.parameters()),
        gradients=size,
        optimizer=2 * size + (size if size < LARGE else 0),
        activations=fullest[0] - fullest[1],
        lens=fullest[1],
    )


def announce(needed: Memory, device: torch.device) -> str:
    """Say what a training needs, what is free, and what to change where it may not fit."""
    free = _free_on(device) if device.type == "cuda" else _free()
    more = sum(needed) - needed.weights  # The weights are there already.
    said = f"this training needs about {needed}; {free / 1e9:.1f} GB are free beside the weights"
    return said if more < free else f"{said}: it may not fit; {LESS}"


def largest(examples: Sequence[Any]) -> Any:
    """Return the example that holds most, so that an estimate is none too small."""
    return max(examples, key=_size)


def _free_on(gpu: torch.device) -> int:
    """Return what the driver has left, and what torch holds of it without using it."""
    unused = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return torch.cuda.mem_get_info(gpu)[0] + unused


def _free() -> int:
    return psutil.virtual_memory().available


def _size(example: Any) -> int:
    if isinstance(example, Tensor):
        return example.numel()
    if isinstance(example, Mapping):
        return sum(_size(value) for value in example.values())
    if isinstance(example, list | tuple):
        return (
            sum(map(_size, example))
            if example and not isinstance(example[0], int)
            else len(example)
        )
    return 1


def _fullest(model: nn.Module, moving: Sequence[Tensor], loss: Callable[[], Tensor]) -> list[int]:
    """Return the most bytes that a step holds at once, and those as wide as the vocabulary then."""
    words = getattr(getattr(model, "config", None), "vocab_size", 0)
    hooks = [p.register_post_accumulate_grad_hook(_forget) for p in moving]
    try:
        with _Watch(words) as watch:
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return watch.fullest


def _forget(weight: Tensor) -> None:
    weight.grad = None


class _Watch(TorchDispatchMode):
    """Follows each storage that is made, from then until nothing holds it."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = words
        self.held, self.fullest = [0, 0], [0, 0]
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._follow(tensor, given)
        if self.held[0] > self.fullest[0]:
            self.fullest = list(self.held)
        return made

    def _follow(self, tensor: Tensor, given: list[Tensor]) -> None:
        storage = tensor.untyped_storage()
        # A view, or one changed in place, is held already: by the model, if by nothing followed.
        if storage in self.known or any(part.untyped_storage() is storage for part in given):
            return
        self.known.add(storage)
        wide = storage.nbytes() if self.words in tensor.shape else 0
        self._add(storage.nbytes(), wide)
        weakref.finalize(storage, self._add, -storage.nbytes(), -wide)

    def _add(self, size: int, wide: int) -> None:
        self.held[0] += size
        self.held[1] += wide
