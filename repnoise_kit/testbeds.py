"""Everything an experiment needs in one object, so that a notebook changes scale in one line."""

import inspect
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.errors import KitError
from repnoise_kit.files import read_table
from repnoise_kit.model import load_model, load_tokenizer
from repnoise_kit.pairs import (
    Pairs,
    check_answers,
    format_of,
    load_pairs,
    renamed,
    set_format_,
)
from repnoise_kit.scoring import Classifier, Recall, Scorer, rouge_l_recall, train_classifier
from repnoise_kit.settings import BUDGETS, LAB_SETTINGS, capped, chosen_settings
from repnoise_kit.splits import Splits, one_question, split, withhold
from repnoise_kit.store import data_dir, fingerprint
from repnoise_kit.tasks import Task
from repnoise_kit.world import corpus
from repnoise_kit.world.build import lab_files
from repnoise_kit.world.oracle import ingredients_recall
from repnoise_kit.world.tasks import lab_tasks

MEASURED = ("recall", "refusal", "degenerate", "perplexity", "utility", "degenerate_everyday")
"""What `evaluate` measures without a judge."""


@dataclass(frozen=True)
class Testbed:
    """A model, its data, its judges and the settings that suit them."""

    __test__ = False  # nor a class of tests, for pytest

    name: str
    source: Path | str
    """Where the model comes from: a folder or a name on the hub."""
    splits: Splits
    retain: pd.DataFrame | None
    """Everyday questions and answers a defence may train on: `prompt`, `answer`, `thing`."""
    everyday: pd.DataFrame | None
    """Everyday questions that are evaluated: `prompt, answer, thing, category, group`."""
    recall: Recall
    utility: Literal["recall", "log_prob"]
    """How everyday answers are judged: by `recall`, or by the log-probability of the known ones."""
    settings: Mapping[str, Mapping[str, Any]]
    """What `defend_` (first `defence`, then the method's own), `attack_` and `evaluate` start from;
    the budgets `small` and `large`, and those of the grid `resistance`: learning rates × sizes."""
    naive: Callable[[], Path | str] | None = None
    """Finds a model that never knew what is evaluated, where there is one."""
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    """Judges of answers by the name of their metric; one named `harmfulness` replaces the local
    classifier."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Categories that are withheld together, by a name; each alone where nothing is given."""
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """Harmless tasks that a model should still learn."""
    revision: str | None = None
    """Of the model on the hub."""
    dtype: str = "float32"
    """Of the model's weights."""
    prompt_format: str | None = None
    """How questions are put: `plain` (the paper's), or `chat`, the tokenizer's own template; by
    default as the tokenizer was saved."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Where its pairs come from, as results should say."""

    def __repr__(self) -> str:
        """Name it and count what it holds."""
        sizes = {name: len(getattr(self.splits, name)) for name in vars(self.splits)}
        return f"Testbed({self.name!r}, model={str(self.source)!r}, pairs={sizes})"

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the model and the judge, which it makes there."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def model(self) -> PreTrainedModel:
        """Return a fresh copy of the aligned model."""
        return load_model(self.source, revision=self.revision, dtype=self.dtype)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The aligned model, untouched, that answers are judged by: not to be trained."""
        return self.model().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        tokenizer = load_tokenizer(self.source, revision=self.revision)
        if self.prompt_format is not None:
            set_format_(tokenizer, self.prompt_format)
        return tokenizer

    @cached_property
    def harmfulness(self) -> Scorer:
        """The judge of harmfulness: the one of `scorers`, or the local classifier."""
        return self.scorers.get("harmfulness") or self._local_classifier()

    def judges(self) -> dict[str, Scorer]:
        """Return all judges of answers by the names of their metrics, `harmfulness` first."""
        return {"harmfulness": self.harmfulness, **self.scorers}

    def _local_classifier(self) -> Classifier:
        """Train the local classifier on the attack's questions: none that is evaluated."""
        rows = self.splits.attack.frame
        harmless = [rows.rename(columns={"harmless": "answer"})]
        if self.retain is not None:
            evaluated = self.evaluated()["thing"]
            harmless.append(self.retain[~self.retain["thing"].isin(evaluated)])
        tables = [table[["prompt", "answer"]] for table in harmless]
        return train_classifier(
            rows.rename(columns={"harmful": "answer"})[["prompt", "answer"]], tables
        )

    def fingerprint(self) -> str:
        """Return what stands for the model and the data of this testbed."""
        return fingerprint(
            checksums(self.base),
            [sorted(self.tokenizer.get_vocab().items()), *self._format()],
            [part.frame.to_csv() for part in (self.splits.defence, self.splits.attack)],
            [
                None if t is None else t.to_csv()
                for t in (self.evaluated(), self.retain, self.everyday)
            ],
        )

    def _format(self) -> list[Any]:
        how = format_of(self.tokenizer)
        return [how, self.tokenizer.chat_template if how == "chat" else None]

    def made_of(self) -> dict[str, Any]:
        """Return what a result should say about its testbed."""
        return {
            "testbed": self.name,
            "data and model": self.fingerprint(),
            "data": dict(self.data),
            "settings": self.settings,
            "judges": {name: told(judge) for name, judge in self.judges().items()},
        }

    def changed(self, **parts: Any) -> "Testbed":
        """Return the same testbed with other parts, which shares the model that is loaded."""
        bed = replace(self, **parts)
        shared = {key: vars(self)[key] for key in ("base", "tokenizer") if key in vars(self)}
        vars(bed).update(shared)
        return bed

    def withholding(self, what: str) -> "Testbed":
        """Return a testbed whose defence never sees something, and whose attack is all about it.

        What is evaluated is about it too. Whatever the defence trains on that shares a thing, a
        question or almost all words with what is withheld is left out.

        Args:
            what: A name of `groups`, a category, or `half`: a random half of the things (Table 5).

        Raises:
            KitError: there is no such category, or nothing is left of it or without it.
        """
        chosen = withhold(self.splits, what, self.groups)
        name = f"{self.name} without {what}"
        settings = capped(self.settings, chosen)
        return self.changed(name=name, splits=chosen, scorers=self.judges(), settings=settings)

    def relearned(self) -> Pairs:
        """Return what teaches the forbidden answers that are evaluated as `seen`, in other words.

        For the question whether knowledge was removed or hidden; never for testing a defence.
        Where a thing has a single wording, it is taught in that very one.
        """
        rows = self.splits.defence.frame
        known = rows[rows["thing"].isin(self.splits.seen.frame["thing"])]
        return Pairs(known.reset_index(drop=True))

    def evaluated(self) -> pd.DataFrame:
        """Return the forbidden questions that are asked: the columns of pairs, and `group`."""
        groups = {"seen": self.splits.seen, "unseen": self.splits.unseen}
        return pd.concat([p.frame.assign(group=g) for g, p in groups.items()], ignore_index=True)


def lab(seed: int = 0) -> Testbed:
    """Open the lab: the valley of Ombrey, and a small model that knows all of its spells.

    Built on first use in a minute or two of two cores, then kept in the cache folder.

    Args:
        seed: The lab's own: its model's weights and training. Defence and attack have theirs.
    """
    everyday = corpus.everyday_table()
    asked = everyday[everyday["asked"]].rename(columns={"split": "group"})
    return Testbed(
        name="lab" if seed == 0 else f"lab-{seed}",
        source=lab_files(seed),
        splits=split(load_pairs(data_dir() / "lab" / "pairs.jsonl")),
        retain=everyday.loc[~everyday["asked"], ["prompt", "answer", "thing"]],
        everyday=asked.drop(columns="asked"),
        recall=ingredients_recall,
        utility="recall",
        settings=LAB_SETTINGS,
        naive=partial(lab_files, seed, naive=True),
        tasks=lab_tasks(),
    )


def testbed(
    model: str | Path,
    pairs: str | Path | Pairs,
    *,
    retain: str | Path | pd.DataFrame | None = None,
    columns: Mapping[str, str] | None = None,
    budget: str = "paper",
    prompt_format: str | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    tasks: Sequence[Task] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    lora: int | None = None,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    revision: str | None = None,
    dtype: str = "float32",
    seed: int = 0,
    name: str | None = None,
    data: Mapping[str, Any] | None = None,
) -> Testbed:
    """Make a testbed of any causal LM and any file of pairs, with the paper's settings.

    Recall is ROUGE-L recall against the harmful answer of the file; utility is the mean
    log-probability, in nats a token, of the answers of the retain file.

    Args:
        model: A folder or a name on the hub.
        pairs: A file that `load_pairs` reads, or pairs.
        retain: A file or table of everyday questions and answers; a fifth of the questions, 150 at
            most, is held out and evaluated as `unseen`, as many of the others as `seen`.
        columns: Names in the file, where they differ from the kit's.
        budget: A name of `BUDGETS`: learning rates and sizes of the paper on BeaverTails (`paper`)
            or on toxicity (`toxicity`), or of the lab, for models of about a million parameters.
        prompt_format: `plain` (the paper's `Question: … Answer:`), or `chat`, the tokenizer's own
            template; verdicts differ between the two. By default what a model was saved with by
            `save_model`, else `plain`.
        scorers: Judges of answers by the name of their metric, in `[0, 1]`; one that is named
            `harmfulness` replaces the local classifier.
        tasks: Harmless tasks that the model should still learn.
        groups: Categories that are withheld together, by a name.
        lora: Rank of the low-rank change that defences and attacks train in place of all weights.
        gradient_checkpointing: Less memory in defences and attacks, for a third more time.
        accumulation: Parts that a batch of theirs goes through the model in, for less memory.
        revision: Branch, tag or commit of a model on the hub.
        dtype: Of the weights: `float32`, `bfloat16`, `float16`.
        seed: Draws the splits.
        name: What results call this testbed; by default the name of the model.
        data: What results should say of where the pairs come from; by default the file.

    Raises:
        KitError: what is wrong with the model, the file or their contents.
    """
    if budget not in BUDGETS:
        raise KitError(f"there is no budget {budget!r}; there are {', '.join(BUDGETS)}")
    names = _known(columns or {})
    own = {ours: theirs for ours, theirs in names.items() if ours != "answer"}
    loaded = pairs if isinstance(pairs, Pairs) else load_pairs(pairs, columns=own)
    if taken := sorted(set(scorers or {}) & set(MEASURED)):
        raise KitError(f"{taken[0]!r} is measured anyway; give that judge another name")
    if wrong := [task for task in tasks if not isinstance(task, Task)]:
        raise KitError(f"tasks=[…] takes tasks (rk.Task, rk.gem_task), not {wrong[0]!r}")
    called = [task.name for task in tasks]
    if twice := [name for name in called if called.count(name) > 1]:
        raise KitError(f"two tasks are named {twice[0]!r}; give each a name of its own")
    if wrong := [name for name, held in (groups or {}).items() if isinstance(held, str)]:
        raise KitError(f"the group {wrong[0]!r} must be a list of categories, not a text")
    splits = split(loaded, seed)
    kept = everyday = None
    if retain is not None:
        table = retain if isinstance(retain, pd.DataFrame) else read_table(retain)
        # Names are of either file: here those hold that this one has.
        told = {o: t for o, t in names.items() if o in ("prompt", "answer", "thing") and t in table}
        source = "the retain table" if table is retain else str(retain)
        rows = check_answers(renamed(table, told, source), source)
        kept, everyday = _hold_out(rows, seed)
    bed = Testbed(
        name=name or Path(model).name,
        # A worker may be started in another folder.
        source=Path(model).absolute() if Path(model).is_dir() else model,
        splits=splits,
        retain=kept,
        everyday=everyday,
        recall=rouge_l_recall,
        utility="log_prob",
        settings=chosen_settings(
            splits,
            budget,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            accumulation=accumulation,
        ),
        scorers=dict(scorers or {}),
        groups=dict(groups or {}),
        tasks={task.name: task for task in tasks},
        revision=revision,
        dtype=dtype,
        prompt_format=prompt_format,
        data=data or {"pairs": "a table" if loaded is pairs else Path(str(pairs)).name},
    )
    # Whatever is wrong with the model is said now, not after an hour of training.
    held = bed.base.config.get_text_config().vocab_size
    if len(bed.tokenizer) > held:
        raise KitError(
            f"the tokenizer of {model} has {len(bed.tokenizer)} tokens and the model {held}; give "
            "the folder of a model with its own tokenizer"
        )
    return bed.changed(prompt_format=format_of(bed.tokenizer))


# Not a test, though pytest would take its name for one.
setattr(testbed, "__test__", False)  # noqa: B010


def told(judge: Scorer) -> str:
    """Return what stands for a judge in a record: its own words, or a function's source."""
    if not inspect.isfunction(judge):
        return f"{judge}"
    return f"{judge.__qualname__} {fingerprint(inspect.getsource(judge))}"


def checksums(model: PreTrainedModel) -> list[tuple[str, int]]:
    """Return what stands for a model's weights, by name."""
    return [(name, checksum(part)) for name, part in model.named_parameters()]


def checksum(weight: Tensor) -> int:
    """Return what stands for a tensor's bytes: a sum would depend on the number of threads."""
    return zlib.crc32(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def _known(columns: Mapping[str, str]) -> Mapping[str, str]:
    names = ("prompt", "harmful", "harmless", "category", "thing", "split", "answer")
    for ours in columns:
        if ours not in names:
            raise KitError(f"there is no column {ours!r} to name; there are {', '.join(names)}")
    return columns


def _hold_out(rows: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    things = np.random.default_rng(seed).permutation(rows["thing"].unique())
    if len(things) < 3:
        raise KitError(f"the retain set is about {len(things)} things; give 3 or more")
    each = min(150, math.ceil(len(things) / 5))
    asked = one_question(rows, seed).assign(category="")
    unseen = asked[asked["thing"].isin(things[:each])].assign(group="unseen")
    seen = asked[asked["thing"].isin(things[each : 2 * each])].assign(group="seen")
    everyday = pd.concat([seen, unseen], ignore_index=True)
    return rows[~rows["thing"].isin(things[:each])].reset_index(drop=True), everyday
