"""Where the lab's time goes: our trainings beside the same steps in a bare loop, on one machine.

    python tests/benchmarks/lab.py            # one thread, medians of 5
    python tests/benchmarks/lab.py --times 1

The bare loop has batches that lie ready, the same loss, `backward` and Adam, and nothing else: no
trainer, no check of what is finite, no curve, no copy of the last good weights. Both are run in
turns. What to quote is the ratio, and the share of a bare step in matrix products, whose rate is
that of the processor; the seconds are this machine's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import repnoise_kit as rk
from repnoise_kit.pairs import encode, pad
from repnoise_kit.training import answer_loss

SIZE, EXAMPLES = 8, 256
SETTINGS = {"batch_size": SIZE, "examples": EXAMPLES, "lr": 3e-4, "epochs": 1}


def main() -> None:
    """Print a line for an attack, and one for a defence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    torch.set_num_threads(1)
    bed = rk.lab()
    print(f"{'ms a step':12}{'ours':>8}{'bare':>8}{'ratio':>8}{'products':>10}")
    for name, ours, steps in (
        ("attack", rk.attack_, attack_steps(bed)),
        ("defence", rk.defend_, defence_steps(bed)),
    ):
        bare = partial(run, *steps)
        spent = [
            (ms(partial(ours, bed.model(), bed, **SETTINGS)), ms(partial(bare, bed.model())))
            for _ in range(times)
        ]
        here, there = map(statistics.median, zip(*spent, strict=True))
        share = products(partial(bare, bed.model()))
        print(f"{name:12}{here:8.1f}{there:8.1f}{here / there:8.2f}{share:10.0%}")


Steps = tuple[Callable[[Any, Any], torch.Tensor], list[Any]]
"""A loss of a model and a batch, and the batches."""


def attack_steps(bed: rk.Testbed) -> Steps:
    rows = bed.splits.attack.draw(EXAMPLES, 0).frame
    return lambda model, batch: answer_loss(model, batch)["total"], list(
        batches(bed, rows["prompt"], rows["harmful"])
    )


def defence_steps(bed: rk.Testbed) -> Steps:
    rows = bed.splits.defence.draw(EXAMPLES, 0).frame
    retain = bed.retain.sample(EXAMPLES, random_state=0)
    given = {
        "harmful": batches(bed, rows["prompt"], rows["harmful"]),
        "harmless": batches(bed, rows["prompt"], rows["harmless"]),
        "retain": batches(bed, retain["prompt"], retain["answer"]),
    }
    weights = {name: bed.settings["defence"][name] for name in ("alpha", "beta")}
    return (
        lambda model, sides: rk.repnoise_loss(model, **sides, **weights).total,
        [dict(zip(given, sides, strict=True)) for sides in zip(*given.values(), strict=True)],
    )


def batches(bed: rk.Testbed, prompts: Any, answers: Any) -> Iterator[dict[str, torch.Tensor]]:
    encoded = encode(bed.tokenizer, prompts.tolist(), answers.tolist())
    for first in range(0, EXAMPLES, SIZE):
        yield pad(encoded[first : first + SIZE], bed.tokenizer.pad_token_id)


def run(loss: Callable[[Any, Any], torch.Tensor], given: list[Any], model: Any) -> None:
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=3e-4, fused=True)
    for batch in given:
        loss(model, batch).backward()
        adam.step()
        adam.zero_grad()


def products(take: Callable[[], object]) -> float:
    """Return the share of the time that is spent in matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        take()
    spent = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    named = ("mm", "addmm", "bmm", "addbmm", "baddbmm")
    return sum(spent.get(f"aten::{name}", 0) for name in named) / sum(spent.values())


def ms(take: Callable[[], object]) -> float:
    start = time.perf_counter()
    take()
    return (time.perf_counter() - start) * 1000 / (EXAMPLES // SIZE)


if __name__ == "__main__":
    main()
