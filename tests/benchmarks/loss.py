"""Our loss, the published one and a plain fine-tuning step, side by side on one machine.

    python tests/benchmarks/loss.py          # 8 layers of 512, 32,000 words, 8 pairs of 256 tokens
    python tests/benchmarks/loss.py --tokens 64 --layers 2

Each form runs forward and backward in a process of its own, so that its peak memory is its own.
What to quote is the ratio within a run: the seconds are this machine's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("plain step", "reference", "published", "paper")


def main() -> None:
    arguments = _arguments()
    if arguments.form:
        print(json.dumps(measure(arguments)))
        return
    found = {}
    for form in FORMS:
        command = [sys.executable, *sys.argv, "--form", form]
        found[form] = json.loads(subprocess.check_output(command))
    base = found["published"]
    print(f"{'':12}{'seconds':>9}{'of published':>14}{'peak GB':>9}{'of published':>14}")
    for form, (seconds, memory) in found.items():
        shares = f"{seconds / base[0]:14.2f}{memory:9.2f}{memory / base[1]:14.2f}"
        print(f"{form:12}{seconds:9.4f}{shares}")


def measure(arguments: argparse.Namespace) -> tuple[float, float]:
    """Return the median seconds of a step and the process's peak memory above the start, in GB."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import reference
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from repnoise_kit.repnoise import repnoise_loss

    torch.manual_seed(0)
    width = arguments.width
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config)
    shape = (arguments.pairs, arguments.tokens)
    harmful, harmless = (torch.randint(3, arguments.vocab, shape) for _ in range(2))
    prompt = arguments.tokens // 4
    harmless[:, :prompt] = harmful[:, :prompt]
    sides = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (harmful, harmless)
    ]
    for side in sides:
        side["labels"] = side["input_ids"].clone()
        side["labels"][:, :prompt] = -100
    both = {key: torch.cat([side[key] for side in sides]) for key in sides[0]}
    forms = {
        "plain step": lambda: model(**both).loss,
        "published": lambda: reference.published_loss(model, *sides).total,
        "reference": lambda: repnoise_loss(model, *sides, preset="reference").total,
        "paper": lambda: repnoise_loss(model, *sides).total,
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        forms[arguments.form]().backward()
        times.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.median(times), (peak - before) / 2**20


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {
        "layers": 8,
        "width": 512,
        "vocab": 32_000,
        "pairs": 8,
        "tokens": 256,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--form", choices=FORMS, help="measure this one only, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
