r"""Our loss, the published one and a plain fine-tuning step, side by side on one machine.

    python tests/benchmarks/loss.py --growth 100 --save data/results/loss_cpu
    python tests/benchmarks/loss.py --device cuda --shape 7b --growth 100 --defence \
        --save data/results/loss_cuda

The first is 8 layers of 512, 32,000 words, 8 pairs of 256 tokens in float32; the second a random
Llama of 7B in bfloat16 on a GPU, 8 pairs of 128 and of 256 tokens, or, where the published form
does not fit, as many as do, and ours at 8. `--defence` adds the paper's whole defence, 10,000 pairs
of 128 tokens with Adam, from 50 steady steps.

Each form runs forward and backward in a process of its own, so that its peak memory is its own:
above the weights, gradients included. What to quote is the ratio within a run: the seconds are this
machine's. Efficiency is the operations that a form cannot do without, a second, over the plain
step's. Growth is what the peak of one pair rises by in so many further steps, where the C library
does not hold on to freed tensors.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from repnoise_kit.model import provenance
from repnoise_kit.repnoise import repnoise_loss
from repnoise_kit.results import Result

FORMS = ("plain step", "published", "paper", "reference")
OURS = {"layers": 8, "width": 512, "heads": 8, "vocab": 32_000, "pairs": 8, "tokens": [256]}
LLAMA = {"layers": 32, "width": 4096, "heads": 32, "vocab": 32_000, "pairs": 8}
SHAPES = {"512": OURS, "7b": {**LLAMA, "tokens": [128, 256]}}
WHOLE = {"pairs": 10_000, "tokens": 128}
"""The paper's defence."""


def main() -> None:
    """Measure what is asked for, print it as a table and save it."""
    arguments = _arguments()
    if arguments.form:
        try:
            print(json.dumps(measure(arguments)))
        except torch.OutOfMemoryError:
            print(json.dumps(None))
        return
    rows = []
    for tokens in arguments.tokens:
        rows += compare(arguments.pairs, tokens)
    if arguments.growth:
        rows.append(_measured("growth", 1, arguments.tokens[0]))
    if arguments.defence:
        rows.append(_measured("defence", arguments.pairs, WHOLE["tokens"]))
    found = pd.DataFrame(rows)
    print(found.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    if arguments.save:
        made_with = {"command": " ".join(["python", *sys.argv]), "machine": machine(arguments)}
        made_with |= {name: getattr(arguments, name) for name in (*SHAPES["7b"], "steps", "growth")}
        made_with |= {"threads": torch.get_num_threads()} | versions(arguments)
        Result(found, made_with).save(arguments.save.with_suffix(".csv"))


def compare(pairs: int, tokens: int) -> list[dict[str, Any]]:
    """Measure every form at the largest batch that fits the published one, and ours at the whole.

    Returns:
        A row a form, with its shares of the published form's time and peak.
    """
    rows = []
    fits = pairs
    while (published := _measured("published", fits, tokens))["seconds"] is None and fits > 1:
        fits //= 2
    for size in sorted({fits, pairs}):
        plain = _measured("plain step", size, tokens)
        for form in FORMS:
            known = {"plain step": plain, "published": published if size == fits else None}
            if form == "published" and size != fits:
                continue
            row = known.get(form) or _measured(form, size, tokens)
            if size == fits:
                row |= _shares(row, published)
            if row["seconds"] and plain["seconds"]:
                rate = row["floor"] / row["seconds"]
                row["efficiency"] = rate / (plain["floor"] / plain["seconds"])
            rows.append(row)
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one form in this process: seconds, peak in GB above the weights, growth in GB."""
    torch.manual_seed(0)
    model = made(arguments)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    weights = peak(arguments.device)
    step = defence_step if arguments.form == "defence" else plain_step
    take = step(model, arguments.form, sides(arguments))
    if arguments.form == "growth":
        timed([take] * arguments.steps, arguments.device)
        before = peak(arguments.device)
        timed([take] * arguments.growth, arguments.device)
        return {"growth": peak(arguments.device) - before}
    if arguments.form == "defence":
        timed([take] * 2, arguments.device)
        took = timed([take] * arguments.steady, arguments.device)
        seconds = statistics.mean(took)
        minutes = seconds * WHOLE["pairs"] / arguments.pairs / 60
        return {"seconds": seconds, "peak": peak(arguments.device) - weights, "minutes": minutes}
    took = timed([take] * arguments.steps, arguments.device)
    found = {"seconds": statistics.median(took), "peak": peak(arguments.device) - weights}
    shape = {name: getattr(arguments, name) for name in ("layers", "width", "vocab", "pairs")}
    return found | {"floor": floor(arguments.form, tokens=arguments.tokens[0], **shape)}


def plain_step(model: Any, form: str, pair: list[dict[str, torch.Tensor]]):
    """Return a step without an optimizer: forward, backward, gradients dropped."""

    def take() -> None:
        total(model, form, *pair).backward()
        model.zero_grad(set_to_none=True)

    return take


def defence_step(model: Any, form: str, pair: list[dict[str, torch.Tensor]]):
    """Return a step of the paper's defence, with Adam on the weights as they are."""
    adam = torch.optim.Adam(model.parameters(), lr=2e-5, fused=True)

    def take() -> None:
        total(model, "paper", *pair).backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return take


def total(model: Any, form: str, harmful: dict, harmless: dict) -> torch.Tensor:
    """Return the scalar that a form minimises."""
    if form == "plain step":
        both = {key: torch.cat([harmful[key], harmless[key]]) for key in harmful}
        return model(**both, use_cache=False).loss
    if form == "published":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import reference

        return reference.published_loss(model, harmful, harmless).total
    preset = "reference" if form == "reference" else "paper"
    return repnoise_loss(model, harmful, harmless, preset=preset).total


def floor(form: str, *, layers: int, width: int, vocab: int, pairs: int, tokens: int) -> float:
    """Return the floating-point operations that no way to compute a form can do without.

    Matrix products, each once forward and twice backward. Of the plain step the head is counted on
    every token, as it is run; of the loss, on the answers: the harmful ones at each layer, the
    harmless ones once.
    """
    read = 2 * pairs * tokens
    answers = pairs * (tokens - tokens // 4)
    maps = read * layers * (4 * width**2 + 3 * width * inner(width))
    attention = read * layers * 2 * tokens * width
    if form == "plain step":
        return 6.0 * (maps + attention + read * width * vocab)
    mmd = layers * (2 * pairs) ** 2 * tokens * width
    return 6.0 * (maps + attention + (layers + 1) * answers * width * vocab + mmd)


def inner(width: int) -> int:
    """Return the width of an MLP in Llama 2's proportion."""
    return width * 43 // 16


def made(arguments: argparse.Namespace) -> Any:
    """Make a random Llama on the device: float32 on a CPU, bfloat16 on a GPU."""
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.width,
        intermediate_size=inner(arguments.width),
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads,
    )
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def sides(arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Make random pairs, of which the first quarter is the question that they share."""
    shape = (arguments.pairs, arguments.tokens[0])
    harmful, harmless = (torch.randint(3, arguments.vocab, shape) for _ in range(2))
    question = shape[1] // 4
    harmless[:, :question] = harmful[:, :question]
    found = []
    for ids in (harmful.to(arguments.device), harmless.to(arguments.device)):
        labels = ids.clone()
        labels[:, :question] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def timed(steps: list, device: str) -> list[float]:
    """Take steps, and return the seconds of each."""
    found = []
    for take in steps:
        start = time.perf_counter()
        take()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def peak(device: str) -> float:
    """Return the most GB that there ever were: on a GPU of tensors, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def machine(arguments: argparse.Namespace) -> str:
    """Return the name of the card or the processor."""
    if arguments.device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the versions of what was measured."""
    tiny = argparse.Namespace(**{**vars(arguments), "layers": 1, "width": 32, "heads": 1})
    return provenance(made(tiny))


def _shares(row: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    if row["seconds"] is None or base["seconds"] is None:
        return {}
    shown = [name for name in ("seconds", "peak") if base[name]]
    return {f"{name} of published": row[name] / base[name] for name in shown}


def _measured(form: str, pairs: int, tokens: int) -> dict[str, Any]:
    """Measure a form in a process of its own; without seconds where it does not fit."""
    command = [sys.executable, *sys.argv, "--form", form, f"--pairs={pairs}", f"--tokens={tokens}"]
    heap = {"MALLOC_MMAP_THRESHOLD_": "65536"} if form == "growth" else {}
    found = json.loads(subprocess.check_output(command, env=os.environ | heap).splitlines()[-1])
    return {"form": form, "pairs": pairs, "tokens": tokens} | (found or {"seconds": None})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="512", help="what is not given is its")
    for name in ("layers", "width", "heads", "vocab", "pairs"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--tokens", type=int, nargs="+", help="of a pair's sides; several in turn")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--growth", type=int, default=0, help="further steps of ours")
    parser.add_argument("--defence", action="store_true", help="the paper's whole defence as well")
    parser.add_argument("--steady", type=int, default=50, help="steps of it that are timed")
    parser.add_argument("--save", type=Path, help="a table to write, without its ending")
    alone = [*FORMS, "growth", "defence"]
    parser.add_argument("--form", choices=alone, help="this one only, as JSON")
    arguments = parser.parse_args()
    for name, value in SHAPES[arguments.shape].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    main()
