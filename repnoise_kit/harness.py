"""Run public benchmarks: EleutherAI's harness on a model in memory, one row a question."""

import contextlib
import copy
import difflib
import io
import logging
import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.model import provenance, quiet, seeded
from repnoise_kit.reading import evaluating
from repnoise_kit.results import Result
from repnoise_kit.store import fingerprint

PAPER_TASKS = (
    *("truthfulqa_mc1", "truthfulqa_mc2", "mmlu", "hellaswag", "winogrande", "arc_easy"),
    *("hendrycks_ethics", "crows_pairs_english"),
)
"""Table 3 of the paper by the harness's names. The paper gives neither shots, nor metrics, nor the
harness's version, nor which TruthfulQA it is: both are here. ETHICS is five tasks."""

# The harness's own, of its command line, so that the examples shown are those that others see.
_RANDOM_SEED, _OTHER_SEED = 0, 1234


def benchmarks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] = PAPER_TASKS,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    include: str | Path | None = None,
    seed: int = 0,
) -> Result:
    """Ask a model the questions of public benchmarks, in the harness's own words.

    Needs `pip install "repnoise-kit[eval]"`, and a network for data that is not in the cache.
    Prompts are the harness's, without a chat template; answers are scored as it scores them. Kept
    is each metric that is a mean over questions (`acc`, `acc_norm`, `exact_match`, …; `name,filter`
    where a task filters answers in several ways), so that `summary(by=("group", "metric"))` is over
    questions, as the harness weighs MMLU. Left out are metrics of a corpus (F1, perplexity, BLEU).
    CrowS-Pairs is `pct_stereotype`: the share of pairs whose stereotype is the likelier sentence.

    Args:
        model: Left as it is, on its device and in its precision; so is the process's randomness.
        tokenizer: The model's; left as it is.
        tasks: Names of tasks, groups or tags of the harness.
        limit: Questions of each task at most, its first ones; by default all of them.
        shots: Examples before each question; by default each task's own. A task that is defined
            with none keeps none.
        batch_size: Texts at a time.
        include: A folder with YAMLs of your own tasks, which come before the harness's. What else
            is in it is run as Python where a YAML says `!function`.
        seed: The seed of the model's training, noted in each row; the harness draws with its own.

    Returns:
        One row a question and metric: `task, group, metric, value, seed, prompt`; `group` is the
        name that was asked for, `prompt` is the task and the question's number in it. In
        `made_with`: versions, shots, the questions' fingerprint, and what the harness warned of,
        such as prompts that were cut because they are longer than the model's context.

    Raises:
        KitError: lm-eval is missing, a task is not known, its data cannot be had, it has no metric
            that is a mean, or the harness refuses it.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, include, limit=limit, shots=shots, batch_size=batch_size, seed=seed)
    with _silent() as told, _fixed_seeds(), evaluating(model):
        loaded, groups = _load(_manager(names, include), names)
        for task in loaded.values():
            _set_shots(task, shots)
        lm = _wrapped(model, tokenizer, batch_size)
        # Until here it warned of its own defaults; from here on, of these questions.
        told.seen.clear()
        found = _run(lm, names, loaded, limit)
    rows = [
        {"task": name, "group": groups[name], "seed": seed} | row
        for name, task in loaded.items()
        for row in _rows(name, task, found["samples"][name])
    ]
    frame = pd.DataFrame(rows)[["task", "group", "metric", "value", "seed", "prompt"]]
    asked = {name: [row["doc_hash"] for row in found["samples"][name]] for name in loaded}
    made_with = {
        "tasks": names,
        "limit": limit,
        "shots": found["n-shot"],
        "batch_size": batch_size,
        "include": include and str(include),
        "seed": seed,
        "lm-eval": version("lm-eval"),
        "datasets": version("datasets"),
        "task_versions": found["versions"],
        "questions": fingerprint(asked),
        "warnings": [f"{line} ({count} times)" for line, count in told.seen.values()],
    }
    return Result(frame, made_with | provenance(model))


def _check(names: list[str], include: str | Path | None, **numbers: int | None) -> None:
    given = {name: number for name, number in numbers.items() if number is not None}
    check_whole(**given)
    for name in ("limit", "batch_size"):
        if given.get(name) == 0:
            raise KitError(f"{name} must be 1 or more, not 0")
    if not names:
        raise KitError("there are no tasks to run; give the name of one")
    if include is not None and not Path(include).is_dir():
        raise KitError(f"{include} is no folder; include=… takes the folder of your tasks' YAMLs")


def _manager(names: list[str], include: str | Path | None) -> Any:
    """Return the harness's index of tasks, with its own 14,000 only where they are needed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise KitError('benchmarks need lm-eval; pip install "repnoise-kit[eval]"') from error

    path = None if include is None else Path(include)
    if path is not None:
        own = TaskManager(include_path=path, include_defaults=False)
        if not any(_missing(own.task_index, name) for name in names):
            return own
    manager = TaskManager(include_path=path)
    for missing in (part for name in names for part in _missing(manager.task_index, name)):
        if isinstance(missing, str):
            near = difflib.get_close_matches(missing, manager.all_tasks, n=3)
            raise KitError(
                f"there is no task {missing!r} in the harness{f' or in {path}' if path else ''}; "
                + (f"near it: {', '.join(near)}; " if near else "")
                + "`lm-eval ls tasks` lists all, and skips a YAML that it cannot read"
            )
    return manager


def _missing(index: dict[str, Any], name: Any) -> list[Any]:
    """Return what an index lacks of a task and its parts, and parts that are no mere names."""
    if not isinstance(name, str) or name not in index:
        return [name]
    parts = (index[name].cfg or {}).get("task")
    # Of a task that is no group it is the name.
    return [p for part in parts for p in _missing(index, part)] if isinstance(parts, list) else []


def _load(manager: Any, names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return each task, and the name of those that were asked for which it belongs to."""
    tasks: dict[str, Any] = {}
    groups: dict[str, str] = {}
    for name in names:
        try:
            loaded = manager.load([name])["tasks"]
        except OSError as error:
            raise KitError(
                f"task {name}: its data could not be had ({_line(error)}); unset HF_HUB_OFFLINE "
                "where there is a network, or give a YAML of local files in a folder, by include=…"
            ) from error
        # Making a task runs its YAML, its templates and its functions, which raise anything.
        except Exception as error:
            raise KitError(
                f"task {name} could not be made ({_line(error)}); mend its YAML, or leave it out"
            ) from error
        for part, task in loaded.items():
            if part in groups:
                raise KitError(f"{part} is in {groups[part]} and in {name}; ask for one of them")
            held = task.aggregation()
            if not any(_is_mean(task, metric) for metric in held):
                raise KitError(
                    f"task {part} has no metric that is a mean over questions, but "
                    f"{', '.join(held)}; leave it out"
                )
            tasks[part], groups[part] = task, name
    return tasks, groups


def _set_shots(task: Any, shots: int | None) -> None:
    """Set a task's examples as the harness's command line does."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _is_mean(task: Any, metric: str) -> bool:
    """Whether a metric of a task is a mean over questions, as one is that it does not list."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(metric, mean) is mean


def _wrapped(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    weights = [(part, dict(part.named_parameters(recurse=False))) for part in model.modules()]
    own: Any = copy.deepcopy(tokenizer)  # It may be given a padding token.
    lm = HFLM(pretrained=model, tokenizer=own, batch_size=batch_size)
    # It ties the head to the embedding where the config says so, though they may have gone apart.
    for part, held in weights:
        for name, weight in held.items():
            if getattr(part, name) is not weight:
                setattr(part, name, weight)
    return lm


def _run(lm: Any, names: list[str], tasks: dict[str, Any], limit: int | None) -> Any:
    from lm_eval.evaluator import evaluate

    try:
        return evaluate(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=0, log_samples=True)
    except (AssertionError, ValueError) as error:
        raise KitError(
            f"the harness cannot run {', '.join(names)} on this model: {_line(error)}"
        ) from error


def _rows(name: str, task: Any, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "metric": metric if sample["filter"] == "none" else f"{metric},{sample['filter']}",
            "value": float(sample[metric]),
            "prompt": f"{name}/{sample['doc_id']}",
        }
        for sample in samples
        for metric in sample["metrics"]
        if _is_mean(task, metric)
    ]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Told(logging.Handler):
    """Keep the first words and the count of what is logged, by where in the code that is."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: dict[tuple[str, int], tuple[str, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place = (record.pathname, record.lineno)
        line, count = self.seen.get(place, (record.getMessage(), 0))
        self.seen[place] = (line, count + 1)


@contextmanager
def _silent() -> Generator[_Told]:
    """Hold back logs, bars and prints of the harness and of datasets; yield what it warned of."""
    told = _Told()
    harness, others = logging.getLogger("lm_eval"), datasets.logging.get_verbosity()
    before, bars = harness.propagate, not datasets.are_progress_bars_disabled()
    harness.addHandler(told)
    harness.propagate = False
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    hole = io.StringIO()
    try:
        with quiet(), contextlib.redirect_stdout(hole), contextlib.redirect_stderr(hole):
            yield told
    finally:
        harness.removeHandler(told)
        harness.propagate = before
        datasets.logging.set_verbosity(others)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _fixed_seeds() -> Generator[None]:
    """Seed all that the harness may draw from; the process's own states are given back."""
    plain, arrays = random.getstate(), np.random.get_state()
    random.seed(_RANDOM_SEED)
    np.random.seed(_OTHER_SEED)
    try:
        with seeded(_OTHER_SEED):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
