"""Testbeds of the paper's own data: BeaverTails, and the toxic part of RealToxicityPrompts."""

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from repnoise_kit import corpora
from repnoise_kit.model import load_model, load_tokenizer
from repnoise_kit.pairs import Pairs, format_of, set_format_
from repnoise_kit.refusals import make_refusals
from repnoise_kit.store import cache_dir, fingerprint
from repnoise_kit.testbeds import Testbed, checksums, testbed

Refusals = Path | str | pd.DataFrame | None

OWN = "own"
"""In place of refusals: those that the model itself gives."""


def beavertails(
    model: str | Path,
    data: str | Path = "PKU-Alignment/BeaverTails",
    *,
    split: str = "30k_train",
    refusals: Refusals = None,
    **options: Any,
) -> Testbed:
    """Make a testbed of any causal LM and BeaverTails, as in the paper's main experiments.

    A row's category is its first true one; the paper's groups are what `withholding` knows. No
    question, nor one that is nearly the same, is in two splits.

    Args:
        model: A folder or a name on the hub.
        data: A name on the hub; a folder that `save_to_disk` wrote, or of files named by their
            split; or one file of the same schema (`prompt, response, category, is_safe`).
        split: Which split of it.
        refusals: A file or table of `prompt, refusal`; `"own"`: those the model itself gives to
            these questions, made now in a few minutes to hours, kept in the cache, and gone on with
            where they were interrupted. By default the data's own column `refusal`.
        options: What `testbed` takes, `budget="paper"` being the default.

    Raises:
        KitError: the data cannot be had, or which row and field is malformed.
    """
    if isinstance(refusals, str) and refusals == OWN:
        rows = corpora.beavertails_rows(data, split)
        refusals = _own(model, rows.loc[~rows["is_safe"], "prompt"], options)
    pairs = corpora.beavertails_pairs(data, split, refusals)
    own: dict[str, Any] = {"groups": corpora.GROUPS, "name": "BeaverTails"}
    own["data"] = _noted(pairs, data, split, refusals)
    return testbed(model, pairs, **own | options)


def decoding_trust(
    model: str | Path,
    data: str | Path = "allenai/real-toxicity-prompts",
    *,
    split: str = "train",
    refusals: Refusals = None,
    **options: Any,
) -> Testbed:
    """Make a testbed of any causal LM and DecodingTrust's toxicity task (Table 2).

    Arguments are those of `beavertails`; the budget is that of Table 2, and a judge of toxicity
    (`scorers={"harmfulness": rk.toxicity_classifier()}`) stands in for Perspective.
    """
    if isinstance(refusals, str) and refusals == OWN:
        prompts = corpora.decoding_trust_rows(data, split)["prompt"]
        refusals = _own(model, prompts, options)
    pairs = corpora.decoding_trust_pairs(data, split, refusals)
    own: dict[str, Any] = {"budget": "toxicity", "name": "DecodingTrust"}
    own["data"] = _noted(pairs, data, split, refusals)
    return testbed(model, pairs, **own | options)


def _noted(pairs: Pairs, data: str | Path, split: str, refusals: Refusals) -> dict[str, Any]:
    """Return where pairs come from, and say how many rows had no refusal."""
    left = pairs.frame.attrs["without_refusal"]
    if left:
        print(f"{left} harmful rows have no refusal and are left out", file=sys.stderr)
    told = "a table" if isinstance(refusals, pd.DataFrame) else Path(str(refusals)).name
    source = Path(data).name if Path(data).exists() else str(data)
    return {"data": source, "split": split, "refusals": told, "left out": left}


def _own(model: str | Path, prompts: pd.Series, options: dict[str, Any]) -> Path:
    """Let the model refuse, and return the file of its refusals."""
    revision, how = options.get("revision"), options.get("prompt_format")
    tokenizer = load_tokenizer(model, revision=revision)
    if how is not None:
        set_format_(tokenizer, how)
    asked = list(dict.fromkeys(prompts))
    loaded = load_model(model, revision=revision, dtype=options.get("dtype", "float32"))
    named = fingerprint(checksums(loaded), format_of(tokenizer), tokenizer.chat_template, asked)
    out = cache_dir() / "refusals" / f"{named}.jsonl"
    make_refusals(loaded, tokenizer, asked, out, progress="refusals of the model itself")
    return out
