"""Release a defended model: plain `save_pretrained`, and a card that says what was done to it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from repnoise_kit.errors import KitError
from repnoise_kit.model import provenance, quiet
from repnoise_kit.pairs import format_of
from repnoise_kit.results import Result
from repnoise_kit.security import has_adapter
from repnoise_kit.stats import Interval, summary
from repnoise_kit.store import written_whole
from repnoise_kit.testbeds import Testbed

_CARD = """---
library_name: transformers
tags: [repnoise-kit, representation-noising]
---

# {name}, defended

`{source}` after {steps}, done with repnoise-kit {version}. It loads like any model:
`AutoModelForCausalLM.from_pretrained(folder)`.

## What was done

```json
{history}
```

## With which data

Testbed *{name}*: {pairs} pairs seen by the defence, {attack} by attacks, {evaluated} questions
evaluated; from {data}; fingerprint of data and base model `{fingerprint}`. Prompt format:
{prompt_format}.

## What the evidence is

{evidence}

A defence of this kind raises the cost of harmful fine-tuning under the attacks that were tried; it
is no promise about others. Low scores of a broken model are no defence: read utility and degenerate
answers beside them.
"""


def save_model(
    model: PreTrainedModel,
    bed: Testbed,
    folder: Path | str,
    history: Result | Sequence[Result],
    evidence: Result | None = None,
) -> Path:
    """Write a model, its tokenizer and a model card; `from_pretrained` reads it back.

    Args:
        model: What is released.
        bed: What it was made with.
        folder: Written whole or not at all; a model that this wrote there before is replaced.
        history: What `defend_` (and whatever else was done) returned, in order: settings, seeds
            and versions are taken from there.
        evidence: What `evaluate` returned, stacked as you like: shown with its intervals.

    Raises:
        KitError: nothing was done to the model, its guard would be lost with its adapter, or the
            folder holds something else.
    """
    folder = Path(folder)
    strange = folder.is_file() or (
        folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder)
    )
    if strange:
        raise KitError(
            f"{folder} holds something that save_model did not write; choose another folder"
        )
    if isinstance(history, Result):
        history = [history]
    if not history:
        raise KitError("the card says what was done to the model; give what defend_ returned")
    if has_adapter(model):
        raise KitError("security vectors are an adapter, which a plain model does not hold")
    done = [result.made_with for result in history]
    steps = ", then ".join(
        str(made.get("method", made.get("attack", "a training"))) for made in done
    )
    card = _CARD.format(
        name=bed.name,
        source=bed.source if isinstance(bed.source, str) else bed.source.name,
        steps=steps,
        version=provenance(model)["repnoise-kit"],
        history=json.dumps(done, indent=1, default=str),
        pairs=len(bed.splits.defence),
        attack=len(bed.splits.attack),
        evaluated=len(bed.evaluated()),
        data=", ".join(f"{name} {value}" for name, value in bed.data.items()) or "the kit",
        fingerprint=bed.fingerprint(),
        prompt_format=format_of(bed.tokenizer),
        evidence="None was given." if evidence is None else _table(evidence.frame),
    )
    with written_whole(folder) as fresh, quiet():
        model.save_pretrained(fresh)
        bed.tokenizer.save_pretrained(fresh)
        (fresh / "README.md").write_text(card, encoding="utf-8")
    return folder


def _is_ours(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and "repnoise-kit" in card.read_text(encoding="utf-8")


def _table(frame: pd.DataFrame) -> str:
    """Write the evidence as a table: a row a cell, its mean and 95 % interval."""
    keys = [k for k in ("defence", "attack", "lr", "examples", "group", "metric") if k in frame]
    cells = summary(frame, by=keys)
    cells = cells[cells["seed"] == "all"] if (cells["seed"] == "all").any() else cells
    rows = [[*keys, "mean [95 %]", "questions"], ["---"] * (len(keys) + 2)]
    for cell in cells.to_dict("records"):
        found = Interval(cell["value"], cell["low"], cell["high"])
        rows.append([*(str(cell[key]) for key in keys), str(found), str(cell["n"])])
    cells = [[text.replace("|", r"\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
