"""Several processes that train one model: what each must know of the batch that they share.

`accelerate launch` or `torchrun` runs one script in each. In `sharing`, a batch is cut into one
part a process; `total` and `gathered` then give each process what the whole batch has, and
gradients flow back so that their mean over the processes, which data-parallel training takes, is
that of the whole batch. Outside of it, and in one process, they change nothing.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import synchronize_rng_states
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from repnoise_kit.errors import KitError

_idle: bool | None = None
"""None outside of `sharing`. A batch of fewer rows than there are processes leaves some idle: each
of them stands by with a row of another's, which counts nowhere."""


def count() -> int:
    """Return how many processes run this script together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0; the first is the one that writes."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def sharded() -> bool:
    """Whether `accelerate` will cut models up among the processes (FSDP)."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_sharding() -> None:
    """Refuse the ways to cut models up in which parts of them cannot be read by themselves."""
    wanted = {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    for name, value in wanted.items():
        if sharded() and os.environ.get(name, "").lower() != value:
            raise KitError(f"set {name.lower()}: {value} in accelerate's configuration of FSDP")


def rows_of(batch: Any) -> int:
    """Return how many rows the tensors of a batch have.

    Raises:
        KitError: no tensors, or some of different lengths.
    """
    lengths = _lengths(batch)
    if len(lengths) != 1:
        raise KitError(
            f"the tensors of a batch have {', '.join(map(str, sorted(lengths))) or 'no'} rows; a "
            "batch that is cut into parts needs one row an example in each"
        )
    return lengths.pop()


def device() -> torch.device:
    """Return where this process computes: on a GPU of its own where there are GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_alone(what: object) -> None:
    """Refuse to train together what one process makes while the others wait for it."""
    if count() > 1:
        raise KitError(
            f"{what} is not there yet, and one process makes it; run the same without the launcher "
            "once, then with it"
        )


@contextmanager
def sharing(batch: Any) -> Generator[Any]:
    """Yield this process's rows of a batch that all processes hold, and let them be its parts.

    All processes enter with the random state of the first, so that each draws the same.

    Args:
        batch: A tensor, or a dictionary, list or tuple of such, of which each tensor has one row
            an example. Process r of n takes the r-th of n consecutive parts, as even as can be.
    """
    global _idle
    if count() == 1:
        yield batch
        return
    synchronize_rng_states(["torch", "cuda"] if torch.cuda.is_available() else ["torch"])
    rows = rows_of(batch)
    first, last = rows * rank() // count(), rows * (rank() + 1) // count()
    _idle = first == last
    try:
        yield _taken(batch, slice(0, 1) if _idle else slice(first, last))
    finally:
        _idle = None


def total(part: Tensor) -> Tensor:
    """Return the sum over processes of a tensor of one shape, with gradients to each one's part.

    Example:
        >>> mean = total(values.sum()) / total(torch.tensor(len(values)))
    """
    if _idle is None:
        return part
    return _Total.apply(part * 0 if _idle else part)


def gathered(rows: Tensor) -> Tensor:
    """Return the rows (row, …) of all processes, in their order, with gradients to one's own.

    Processes may have different numbers of rows, of one shape otherwise.
    """
    if _idle is None:
        return rows
    own = rows[:0] if _idle else rows
    before, number = _placed(own)
    others = rows.new_zeros(number - len(own), *rows.shape[1:])
    return _Total.apply(torch.cat([others[:before], own, others[before:]]))


def mean(value: Tensor) -> Tensor:
    """Return the mean over processes of a scalar that each has of its own rows, with gradients."""
    return value if _idle is None else total(value) / total(torch.ones_like(value))


def length(parts: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean length of tensors of which each process holds its rows."""
    own = torch.nn.utils.get_total_norm(parts)
    return own if _idle is None else total(own**2).sqrt()


def agreed(terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean over processes of some scalars; of whole numbers, which count, the sum."""
    found = {name: term.detach() for name, term in terms.items()}
    if _idle is None:
        return found
    said = torch.stack([term.double() for term in found.values()])
    said = torch.cat([said, said.new_ones(1)])
    if _idle:
        said = torch.zeros_like(said)
    distributed.all_reduce(said)
    *values, speakers = said
    return {
        name: value / speakers if found[name].is_floating_point() else value.long()
        for name, value in zip(found, values, strict=True)
    }


def working(loss: Tensor) -> Tensor:
    """Return a loss whose slope is zero where this process only stands by."""
    return loss * 0 if _idle else loss


def any_says(yes: bool, device: torch.device) -> bool:
    """Return whether any process says so; all of them must ask."""
    if count() == 1:
        return yes
    said = torch.tensor(int(yes), device=device)
    distributed.all_reduce(said)
    return bool(said)


def wait() -> None:
    """Go on only when all processes have come here."""
    if count() > 1:
        distributed.barrier()


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        # All processes go on alike from the sum, so that each holds the same slope; the training
        # divides by their number when it takes the mean.
        return slope * distributed.get_world_size()


def _placed(own: Tensor) -> tuple[int, int]:
    """Return how many rows the processes before this one have, and how many all have."""
    rows = torch.zeros(count(), dtype=torch.long, device=own.device)
    rows[rank()] = len(own)
    distributed.all_reduce(rows)
    return int(rows[: rank()].sum()), int(rows.sum())


def _lengths(batch: Any) -> set[int]:
    if isinstance(batch, Tensor):
        return {len(batch)}
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    found = map(_lengths, batch) if isinstance(batch, list | tuple) else ()
    return set().union(*found)


def _taken(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        return {name: _taken(part, rows) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_taken(part, rows) for part in batch)
    return batch[rows] if isinstance(batch, Tensor) else batch
