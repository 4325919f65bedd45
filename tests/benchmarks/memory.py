"""What trainings are said to need in memory, and what they take, side by side on a CPU.

    MALLOC_MMAP_THRESHOLD_=65536 python tests/benchmarks/memory.py
    MALLOC_MMAP_THRESHOLD_=65536 python tests/benchmarks/memory.py defence "many words"

The variable keeps freed tensors out of the C library's heap, which holds on to them: without it
the measured peak grows by what no training asked for. Each training runs in a process of its own.
"""

import ctypes
import gc
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from repnoise_kit import memory, training
from repnoise_kit.lora import low_rank
from repnoise_kit.repnoise import repnoise_loss
from repnoise_kit.training import answer_loss, train_


class Shape(NamedTuple):
    layers: int
    width: int
    words: int
    rows: int
    tokens: int
    defence: bool = False
    checkpointing: bool = False
    lora: int | None = None


SHAPES = {
    "many words": Shape(2, 128, 32_000, 8, 32),
    "many layers": Shape(12, 192, 500, 8, 48),
    "long pairs": Shape(2, 128, 500, 4, 512),
    "checkpointing": Shape(8, 128, 500, 8, 256, checkpointing=True),
    "low rank": Shape(8, 192, 500, 8, 96, lora=4),
    "defence": Shape(4, 128, 4_000, 8, 96, defence=True),
    "defence, many words": Shape(3, 128, 32_000, 4, 48, defence=True),
    "defence, checkpointing": Shape(8, 128, 500, 8, 128, defence=True, checkpointing=True),
    "defence, low rank": Shape(6, 192, 500, 8, 96, defence=True, lora=4),
}


def main() -> None:
    """Print a line a shape, of all or of those named: bytes said and measured, and their ratio."""
    torch.set_num_threads(1)
    training.LARGE = memory.LARGE = 0  # The smallest model is trained as a large one is.
    trained(Shape(2, 32, 50, 2, 16))  # Imports what a training imports.
    print(f"{'':24}{'said MB':>9}{'measured':>10}{'ratio':>7}  parts")
    for name in sys.argv[1:] or SHAPES:
        said, measured = in_a_process(SHAPES[name])
        parts = ", ".join(f"{part} {size / 1e6:.0f}" for part, size in said.items())
        whole = sum(said.values())
        print(f"{name:24}{whole / 1e6:9.1f}{measured / 1e6:10.1f}{whole / measured:7.2f}  {parts}")


def in_a_process(shape: Shape) -> tuple[dict[str, int], int]:
    """Train in a fork of this process, and return what was said and what it took, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        child = os.fork()
        if not child:
            # Neither code read from its file nor the parent's leavings are a part of it.
            trained(shape._replace(layers=2, width=32, words=50, rows=2, tokens=16))
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            start = psutil.Process().memory_info().rss
            said = trained(shape)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            path.write_text(json.dumps([said, peak - start]))
            os._exit(0)
        os.waitpid(child, 0)
        return tuple(json.loads(path.read_text()))


def trained(shape: Shape) -> dict[str, int]:
    """Take three steps, and return what was said before the first."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.words,
            hidden_size=shape.width,
            intermediate_size=shape.width * 11 // 4,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    pairs = list(torch.randint(3, shape.words, (3 * shape.rows, 2, shape.tokens)))
    said = {}

    def noted(needed: Any, device: torch.device) -> str:
        said.update(needed._asdict())
        return str(needed)

    def loss(inner: Any, read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        harmful, harmless = (batch(ids) for ids in read["ids"].unbind(1))
        if not shape.defence:
            return answer_loss(inner, harmful)
        return repnoise_loss(inner, harmful, harmless)._asdict()

    training.announce = noted
    with low_rank(model, shape.lora, 0):
        train_(
            model,
            loss,
            pairs,
            lambda rows: {"ids": torch.stack(rows)},
            lr=1e-4,
            batch_size=shape.rows,
            gradient_checkpointing=shape.checkpointing,
        )
    return said


def batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make a batch whose first quarter is the question."""
    labels = ids.clone()
    labels[:, : ids.shape[1] // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


if __name__ == "__main__":
    main()
