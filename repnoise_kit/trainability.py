"""Trainability: can a defended model still learn what is harmless (Table 4)?"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from repnoise_kit.bench import Bench
from repnoise_kit.defences import able
from repnoise_kit.errors import KitError
from repnoise_kit.evaluation import answers, evaluate
from repnoise_kit.grid import Cell, run
from repnoise_kit.lora import low_rank
from repnoise_kit.model import provenance
from repnoise_kit.pairs import draw, encode, format_of, pad
from repnoise_kit.resistance import named_budget
from repnoise_kit.results import Result, stack
from repnoise_kit.security import guarded, unguarded
from repnoise_kit.tasks import Task
from repnoise_kit.testbeds import Testbed
from repnoise_kit.training import NotFiniteError, answer_loss, train_

COLUMNS = ["defence", "task", "stage", "step", "group", "metric", "value", "seed", "prompt"]


def trainability_grid(
    bed: Testbed,
    seeds: Sequence[int],
    store: Path | str | None = None,
    *,
    defences: Sequence[str] = ("none", "repnoise"),
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> Result:
    """Teach each defended model each harmless task of a testbed, then attack what came of it.

    Args:
        bed: The testbed, with `tasks`; its `settings["trainability"]` are the budget.
        seeds: Each varies the defence, the lessons, the attack, and the order of their data.
        store: A folder, which other processes and machines may share; by default in the cache.
        defences: Names of `DEFENCES`.
        workers: Processes.
        scheduler: Address of a Dask scheduler, in place of processes.
        progress: Words for a bar; no bar without.

    Returns:
        One row a question and metric: `defence, task, stage, step, group, metric, value, seed,
        prompt`. Of stage `learning`: `rouge1` and `exact` of the held-out inputs at several steps
        (group `task`). Of `learned` and `attacked` (the testbed's small attack on the model that
        has learned): what `evaluate` finds.

    Raises:
        KitError: the testbed has no tasks.
    """
    if not bed.tasks:
        raise KitError(f"{bed.name} has no tasks to learn; give the testbed some (tasks=[…])")
    cells = [
        Cell(learned, {"defence": name, "task": task, "seed": seed})
        for name in able(bed, defences)
        for task in bed.tasks
        for seed in seeds
    ]
    bench = Bench.of(bed, store)
    found = run(cells, bench, workers=workers, scheduler=scheduler, progress=progress)
    frame = stack(*found).frame
    made_with = found[0].made_with | {"experiment": "trainability", "seeds": list(seeds)}
    return Result(frame, made_with | bed.made_of())


def learned(bench: Bench, *, defence: str, task: str, seed: int) -> Result:
    """Return what one model learns of one task, and what it tells after that: a cell."""
    bed, lesson = bench.bed, bench.bed.tasks[task]
    model, _ = bench.defended(defence, seed)
    found = [ask(model, bed, lesson, seed=seed).tagged(step=0)]
    last = steps(bed, lesson)

    def look(step: int) -> None:
        if step == last or step & (step - 1) == 0:  # 1, 2, 4, 8, … and the last
            model.eval()
            with unguarded(model):
                found.append(ask(model, bed, lesson, seed=seed).tagged(step=step))
            model.train()

    with guarded(model), suppress(NotFiniteError):
        learn_(model, bed, lesson, seed=seed, after_step=look)
    if found[-1].frame["step"].iloc[0] != last:  # It diverged: judged by its last good weights.
        found.append(ask(model, bed, lesson, seed=seed).tagged(step=last))
    curve = stack(*found).tagged(stage="learning", group="task")
    after = evaluate(model, bed, seed=seed).tagged(stage="learned", step=last)
    bench.attack_(model, seed=seed, **named_budget(bed, "small"))
    attacked = evaluate(model, bed, seed=seed).tagged(stage="attacked", step=last)
    rows = stack(curve, after, attacked).tagged(defence=defence, task=task)
    return Result(rows.frame[COLUMNS], after.made_with)


def steps(bed: Testbed, task: Task) -> int:
    """Return how many steps a lesson takes."""
    start = bed.settings["trainability"]
    rows = min(start["examples"] or len(task.train), len(task.train))
    return -(-rows // start["batch_size"])


def learn_(
    model: PreTrainedModel,
    bed: Testbed,
    task: Task,
    *,
    lr: float | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    max_length: int = 256,
    seed: int = 0,
    progress: str | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Fine-tune a model on a harmless task, in place, as an attacker would on harm (Table 4).

    Args:
        model: Changed in place.
        bed: What is not given here is taken from its `settings["trainability"]`.
        task: What is learned.
        lr: Peak learning rate.
        examples: How many of the task's rows are drawn; as many as there are where None is set.
        batch_size: Examples a step.
        max_length: Tokens of an input with its output.
        seed: Draws the examples and their order.
        progress: Words for a progress bar; no bar without.
        after_step: Called with the number of each step once it is taken.

    Returns:
        The curves of the training: `step, metric, value`.
    """
    start = bed.settings["trainability"]
    wanted = start["examples"] if examples is None else examples
    rows = draw(task.train, None if wanted is None else min(wanted, len(task.train)), seed)
    encoded = encode(
        bed.tokenizer, rows["prompt"].tolist(), rows["answer"].tolist(), max_length=max_length
    )
    with low_rank(model, start.get("lora"), seed):
        return train_(
            model,
            answer_loss,
            encoded,
            lambda batch: pad(batch, bed.tokenizer.pad_token_id),
            lr=start["lr"] if lr is None else lr,
            batch_size=start["batch_size"] if batch_size is None else batch_size,
            gradient_checkpointing=start.get("gradient_checkpointing", False),
            accumulation=start.get("accumulation", 1),
            seed=seed,
            progress=progress,
            after_step=after_step,
        )


def ask(model: PreTrainedModel, bed: Testbed, task: Task, *, seed: int = 0) -> Result:
    """Give a model the task's held-out inputs and compare what it says with the known outputs.

    Returns:
        One row an input and metric: `task, metric, value, seed, prompt, response`. Metrics:
        `rouge1` (the F of ROUGE-1, the paper's; an output's fixed words count too, so that 0 is no
        floor) and `exact` (1 where every word is right).
    """
    settings = bed.settings["evaluation"]
    prompts = task.test["prompt"].tolist()
    # Room for the longest output: what is cut off cannot be right.
    most = max(
        len(row["input_ids"])
        for row in encode(bed.tokenizer, [""] * len(prompts), task.test["answer"].tolist())
    )
    said = answers(model, bed.tokenizer, prompts, most, settings["batch_size"])
    both = list(zip(task.test["answer"], said, strict=True))
    scores = {
        "rouge1": [rouge_1(known, answer) for known, answer in both],
        "exact": [float(known.split() == answer.split()) for known, answer in both],
    }
    told = pd.DataFrame({"prompt": prompts, "response": said})
    rows = pd.concat([told.assign(metric=name, value=v) for name, v in scores.items()])
    made_with = {
        "task": task.name,
        "max_new_tokens": most,
        "prompt_format": format_of(bed.tokenizer),
    }
    return Result(rows.reset_index(drop=True), made_with | provenance(model)).tagged(
        task=task.name, seed=seed
    )


def rouge_1(reference: str, response: str) -> float:
    """Return the F of ROUGE-1: words in common, over the mean length of the two, in [0, 1]."""
    return _scorer().score(reference, response)["rouge1"].fmeasure


@cache
def _scorer() -> Any:
    # Here, for it loads a whole language toolkit.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_Words())


class _Words:
    """Words of any script; the package's own tokenizer knows Latin letters only."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())
