"""Everything an experiment needs in one object, so that a notebook changes scale in one line."""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
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
from repnoise_kit.pairs import Pairs, check_answers, load_pairs, renamed
from repnoise_kit.scoring import Classifier, Recall, rouge_l_recall, train_classifier
from repnoise_kit.splits import Splits, one_question, split
from repnoise_kit.store import data_dir, fingerprint
from repnoise_kit.world import corpus
from repnoise_kit.world.build import lab_files
from repnoise_kit.world.oracle import ingredients_recall

# What differs in the lab from the paper: a small model learns with larger steps, and at this size
# a noise weight of 0.001 does nothing.
LAB_SETTINGS = {
    "defence": {"lr": 3e-4, "alpha": 1.0, "beta": 1.0, "examples": None, "batch_size": 8},
    "attack": {"lr": 3e-4, "examples": 512, "batch_size": 8},
    "small": {"examples": 64},
    "large": {"examples": 512},
    # Ten times the paper's learning rates. Fixed by the undefended model alone, on seeds that are
    # not reported: it gives away more than half at each; at 1e-4, 64 examples did not undo it.
    "resistance": {"lr": (3e-4, 6e-4, 8e-4), "examples": (64, 512)},
    "evaluation": {"max_new_tokens": 24, "batch_size": 64},
    # The paper's own for security vectors; for the others those that `tuning` chose.
    "security_vectors": {"lr": 1e-3, "rank": 8},
    "safety_training": {"lr": 1e-3},
    "gradient_ascent": {"lr": 3e-6},
    "adversarial_loss": {"lr": 3e-4, "weight": 0.1},
    "vaccine": {"lr": 1e-3, "rho": 1.0},
}

# Section 4 and Appendix B of the paper; sizes are the most a file may hold.
PAPER_SETTINGS = {
    "defence": {
        "lr": 2e-5, "alpha": 1.0, "beta": 0.001, "examples": 10_000, "batch_size": 8,
        "max_length": 128,
    },
    "attack": {"lr": 3e-5, "examples": 1_000, "batch_size": 4},
    "small": {"lr": 3e-5, "examples": 1_000},
    "large": {"lr": 8e-5, "examples": 10_000},
    "resistance": {"lr": (3e-5, 6e-5, 8e-5), "examples": (1_000, 10_000)},
    "evaluation": {"max_new_tokens": 50, "batch_size": 8},
    "security_vectors": {"lr": 1e-3, "rank": 8},
    "adversarial_loss": {"lr": 1e-5, "weight": 0.1},
    "vaccine": {"rho": 1.0},
}  # fmt: skip


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

    def __repr__(self) -> str:
        """Name it and count what it holds."""
        sizes = {name: len(getattr(self.splits, name)) for name in vars(self.splits)}
        return f"Testbed({self.name!r}, model={str(self.source)!r}, pairs={sizes})"

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the model and the judge, which it makes there."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    def model(self) -> PreTrainedModel:
        """Return a fresh copy of the aligned model."""
        return load_model(self.source)

    @cached_property
    def base(self) -> PreTrainedModel:
        """The aligned model, untouched, that answers are judged by: not to be trained."""
        return self.model().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return load_tokenizer(self.source)

    @cached_property
    def harmfulness(self) -> Classifier:
        """The local classifier, trained on the attack's questions: none that is evaluated."""
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
            [(name, _checksum(part)) for name, part in self.base.named_parameters()],
            sorted(self.tokenizer.get_vocab().items()),
            [part.frame.to_csv() for part in (self.splits.defence, self.splits.attack)],
            [
                None if t is None else t.to_csv()
                for t in (self.evaluated(), self.retain, self.everyday)
            ],
        )

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

    Built on first use in about a minute of two cores, then kept in the cache folder.

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
    )


def testbed(
    model: str | Path,
    pairs: str | Path | Pairs,
    *,
    retain: str | Path | pd.DataFrame | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    name: str | None = None,
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
        seed: Draws the splits.
        name: What results call this testbed; by default the name of the model.

    Raises:
        KitError: what is wrong with the model, the file or their contents.
    """
    names = _known(columns or {})
    own = {ours: theirs for ours, theirs in names.items() if ours != "answer"}
    loaded = pairs if isinstance(pairs, Pairs) else load_pairs(pairs, columns=own)
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
        settings=_capped(splits),
    )
    # Whatever is wrong with the model is said now, not after an hour of training.
    held = bed.base.config.get_text_config().vocab_size
    if len(bed.tokenizer) > held:
        raise KitError(
            f"the tokenizer of {model} has {len(bed.tokenizer)} tokens and the model {held}; give "
            "the folder of a model with its own tokenizer"
        )
    return bed


# Not a test, though pytest would take its name for one.
setattr(testbed, "__test__", False)  # noqa: B010


def _checksum(weight: Tensor) -> int:
    # Of the bytes: a sum depends on how many threads have added it up.
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


def _capped(splits: Splits) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = {n: dict(values) for n, values in PAPER_SETTINGS.items()}
    for name, values in settings.items():
        if "examples" in values:
            most = len(splits.defence if name == "defence" else splits.attack)
            sizes = values["examples"]
            if isinstance(sizes, tuple):
                values["examples"] = tuple(dict.fromkeys(min(size, most) for size in sizes))
            else:
                values["examples"] = min(sizes, most)
    return settings
