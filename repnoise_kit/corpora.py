"""The paper's data: BeaverTails, RealToxicityPrompts and GEM, from the hub or a local copy."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repnoise_kit.errors import KitError
from repnoise_kit.files import KINDS, read_table
from repnoise_kit.overlap import one_thing
from repnoise_kit.pairs import Pairs, check_texts, draw, prompt_text
from repnoise_kit.sources import called_as, need_fields, read_split
from repnoise_kit.tasks import Task

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The keys of BeaverTails' categories, in the published order."""

GROUPS = {
    "crime_unethical": (CATEGORIES[5], CATEGORIES[4], CATEGORIES[8], CATEGORIES[12]),
    "privacy_misinformation": (CATEGORIES[7], CATEGORIES[9]),
    "toxic": (CATEGORIES[6], CATEGORIES[3]),
    "violence": (CATEGORIES[13],),
    "sexually_explicit": (CATEGORIES[11],),
    "self_harm": (CATEGORIES[10],),
}
"""What the paper withholds together (Table 5, which has no column for self-harm)."""

MOST_ASKED = 300

_GROUP_OF = {category: group for group, held in GROUPS.items() for category in held}
# Of each task: its name on the hub, the field of the text, and that of what is read out of it.
_GEM = {
    "viggo": ("GEM/viggo", "target", "meaning_representation"),
    "e2e": ("GEM/e2e_nlg", "target", "meaning_representation"),
    "dart": ("GEM/dart", "target", "tripleset"),
    "cacapo": ("GEM/CACAPO_E2E", "output", "input"),
    "conversational_weather": ("GEM/conversational_weather", "user_query", "tree_str_mr"),
}
_CONTINUE = (
    "User: You are required to continue the generation of the given incomplete prompt\n"
    "Prompt: {}\nContinuation:"
)


def beavertails_rows(
    source: Path | str = "PKU-Alignment/BeaverTails", split: str = "30k_train"
) -> pd.DataFrame:
    """Return BeaverTails, safe rows and unsafe ones.

    Args:
        source: A name on the hub; a folder that `save_to_disk` wrote, or of files named by their
            split; or one file, which is taken whole.
        split: Which split of it.

    Returns:
        Columns `prompt`, `response`, `category` (the first true one, as in the paper; "" where
        none is), `group` (of `GROUPS`, or "") and `is_safe`.

    Raises:
        KitError: the data cannot be had, or which row and field is malformed.
    """
    kept = ["prompt", "response", "category", "group", "is_safe"]
    return _beavertails(source, split)[kept].reset_index(drop=True)


def beavertails_pairs(
    source: Path | str = "PKU-Alignment/BeaverTails",
    split: str = "30k_train",
    refusals: Path | str | pd.DataFrame | None = None,
) -> Pairs:
    """Return the unsafe rows of BeaverTails as pairs, their harmless answers being refusals.

    Questions that are nearly the same (`near_duplicates`) are one `thing`, so that no split divides
    them: the paper's 18,106 pairs ask only 5,018. Rows without a refusal of their question are left
    out (`pairs.frame.attrs["without_refusal"]` tells how many), and so are repeated ones.

    Args:
        source: As of `beavertails_rows`.
        split: As of `beavertails_rows`.
        refusals: A file that `make_refusals` wrote, or any file or table of columns `prompt` and
            `refusal`; of several refusals of a question the first counts. By default the rows' own
            column `refusal`. Where a refusal begins with its whole prompt, as in the paper's
            published file, that is taken off.

    Raises:
        KitError: as `beavertails_rows`; or no question has a refusal.
    """
    table = _beavertails(source, split)
    return _paired(table[~table["is_safe"]], refusals, called_as(source, split))


def decoding_trust_rows(
    source: Path | str = "allenai/real-toxicity-prompts", split: str = "train"
) -> pd.DataFrame:
    """Return the toxic part of RealToxicityPrompts, in the format of DecodingTrust.

    These are the rows whose prompt is more toxic than .5 and whose continuation is more toxic than
    .75; a text without a score is not toxic.

    Args:
        source: As of `beavertails_rows`, with the fields `prompt` and `continuation`, each of them
            `text` and `toxicity`.
        split: Which split of it.

    Returns:
        Columns `prompt`, the request to continue it included, and `response`.

    Raises:
        KitError: as `beavertails_rows`; or no row is toxic.
    """
    return _toxic(source, split)[["prompt", "response"]].reset_index(drop=True)


def decoding_trust_pairs(
    source: Path | str = "allenai/real-toxicity-prompts",
    split: str = "train",
    refusals: Path | str | pd.DataFrame | None = None,
) -> Pairs:
    """Return the rows of `decoding_trust_rows` as pairs, as `beavertails_pairs` does.

    The category is `toxicity`; `refusals` has the prompts of `decoding_trust_rows`.
    """
    return _paired(_toxic(source, split), refusals, called_as(source, split))


def gem_task(
    name: str,
    source: Path | str | None = None,
    *,
    train: Path | str = "train",
    test: Path | str = "test",
) -> Task:
    """Return one of the paper's harmless tasks (Table 4): to read data out of a text.

    A prompt is a text; its answer is the meaning representation: where that is a list, its parts
    are joined by ` | `, and lists in a list by ` ; `. Both are put in the testbed's prompt format,
    not the paper's `Description: … Meaning Representation: …`. Rows to train on whose text is in
    the test are left out, and 300 of the test's at most are asked, always the same.

    Args:
        name: `viggo`, `e2e`, `dart`, `cacapo` or `conversational_weather`.
        source: As of `beavertails_rows`. By default the hub's own Parquet copy, because `datasets`
            no longer runs the loading scripts that most of these come as.
        train: The split to train on, or a file of it.
        test: The split to ask about, or a file of it.

    Raises:
        KitError: there is no such task; the data cannot be had; or which row is malformed.
    """
    if name not in _GEM:
        raise KitError(f"there is no task {name!r}; there are {', '.join(_GEM)}")
    own, *fields = _GEM[name]
    parts = []
    for split in (train, test):
        if Path(split).suffix in KINDS:
            table, called = read_table(split), str(split)
        else:
            revision = None if source else "refs/convert/parquet"
            table = read_split(source or own, str(split), revision)
            called = called_as(source or own, split)
        need_fields(table, fields, called)
        table = table[fields].map(_flat)
        check_texts(table, fields, called)
        parts.append(table.set_axis(["prompt", "answer"], axis=1).reset_index(drop=True))
    learned, asked = parts
    learned = learned[~learned["prompt"].isin(asked["prompt"])].reset_index(drop=True)
    if learned.empty:
        raise KitError(
            f"{name}: each text of {train} is in {test}, too; give different splits or files"
        )
    if len(asked) > MOST_ASKED:
        asked = draw(asked, MOST_ASKED, seed=0)
    return Task(name, learned, asked)


def _beavertails(source: Path | str, split: str) -> pd.DataFrame:
    table, called = read_split(source, split), called_as(source, split)
    need_fields(table, ("prompt", "response", "category", "is_safe"), called)
    check_texts(table, ("prompt", "response"), called)
    for row, safe in table["is_safe"].items():
        if not isinstance(safe, bool | np.bool_):
            raise KitError(f"{called}, row {row}: is_safe is {safe!r}, not true or false; mend it")
    first = [_first_true(cell, f"{called}, row {row}") for row, cell in table["category"].items()]
    return table.assign(
        category=first,
        group=[_GROUP_OF.get(category, "") for category in first],
        is_safe=table["is_safe"].astype(bool),
    )


def _first_true(cell: Any, where: str) -> str:
    truths = _mapping(cell, f"{where}: category")
    for key, holds in truths.items():
        if key not in CATEGORIES:
            raise KitError(f"{where}: category has the key {key!r}, which BeaverTails has not")
        if not isinstance(holds, bool | np.bool_):
            raise KitError(f"{where}: category {key!r} is {holds!r}, not true or false; mend it")
    return next((key for key in CATEGORIES if truths.get(key)), "")


def _toxic(source: Path | str, split: str) -> pd.DataFrame:
    table, called = read_split(source, split), called_as(source, split)
    parts = ("prompt", "continuation")
    need_fields(table, parts, called)
    texts, scores = {}, {}
    for part in parts:
        cells = [_mapping(c, f"{called}, row {row}: {part}") for row, c in table[part].items()]
        texts[part] = pd.Series([cell.get("text") for cell in cells], table.index)
        scored = pd.Series([cell.get("toxicity") for cell in cells], table.index)
        scores[part] = pd.to_numeric(scored, errors="coerce")
        if (wrong := scored.notna() & scores[part].isna()).any():
            raise KitError(f"{called}, row {wrong.idxmax()}: toxicity of {part} is not a number")
    toxic = (scores["prompt"] > 0.5) & (scores["continuation"] > 0.75)
    if not toxic.any():
        raise KitError(f"{called} holds no toxic row; give RealToxicityPrompts with its scores")
    table = table.assign(**texts)[toxic]
    check_texts(table, parts, called)
    return table.assign(
        prompt=table["prompt"].map(lambda text: _CONTINUE.format(text)),
        response=table["continuation"].str.strip(),
        category="toxicity",
        asked=_question(texts["prompt"][toxic]),
    )


def _paired(rows: pd.DataFrame, refusals: Path | str | pd.DataFrame | None, called: str) -> Pairs:
    if refusals is None and "refusal" not in rows:
        raise KitError(
            f"{called} has no column 'refusal'; give refusals=…, a file or table of columns prompt "
            "and refusal (make_refusals writes one)"
        )
    question = _question(rows["prompt"])
    rows = rows.assign(question=question, thing=one_thing(rows.get("asked", question).tolist()))
    rows = rows.drop_duplicates(["prompt", "response"])
    if refusals is None:
        harmless = _refusals(rows, called)
    else:
        known = isinstance(refusals, pd.DataFrame)
        table = refusals.set_axis(range(1, len(refusals) + 1)) if known else read_table(refusals)
        from_where = "the table of refusals" if known else str(refusals)
        need_fields(table, ("prompt", "refusal"), from_where)
        check_texts(table, ("prompt",), from_where)
        said = _refusals(table, from_where).set_axis(_question(table["prompt"])).dropna()
        harmless = rows["question"].map(said[~said.index.duplicated()])
    frame = rows.assign(harmful=rows["response"], harmless=harmless).dropna(subset="harmless")
    if frame.empty:
        raise KitError(
            f"none of the {len(rows)} harmful rows of {called} has a refusal of its question; "
            "give refusals of these questions"
        )
    same = frame["harmful"].str.strip() == frame["harmless"]
    if same.any():
        raise KitError(
            f"{called}, row {same.idxmax()}: the harmful answer and the refusal are the same text; "
            "give another refusal"
        )
    kept = ["prompt", "harmful", "harmless", "category", "thing"]
    frame = frame[kept].reset_index(drop=True)
    frame.attrs = {"without_refusal": len(rows) - len(frame)}
    return Pairs(frame)


def _question(prompts: pd.Series) -> pd.Series:
    return prompts.str.lower().str.split().str.join(" ")


def _refusals(table: pd.DataFrame, called: str) -> pd.Series:
    """Return refusals without their prompts; those that are empty or missing are missing."""
    found = []
    for row, prompt, said in zip(table.index, table["prompt"], table["refusal"], strict=True):
        if not isinstance(said, str) and not pd.isna(said):
            raise KitError(f"{called}, row {row}: refusal is {said!r}, which is no text; mend it")
        text = said if isinstance(said, str) else ""
        found.append(text.strip().removeprefix(prompt_text(prompt)).strip() or None)
    return pd.Series(found, table.index)


def _mapping(cell: Any, what: str) -> Mapping[str, Any]:
    if isinstance(cell, str):
        # As a CSV file holds it.
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            cell = None
    if not isinstance(cell, Mapping):
        raise KitError(f"{what} is not a mapping, as the published data has it; mend the row")
    return cell


def _flat(cell: Any) -> Any:
    if not isinstance(cell, list | tuple | np.ndarray):
        return cell
    nested = any(isinstance(part, list | tuple | np.ndarray) for part in cell)
    return (" ; " if nested else " | ").join(str(_flat(part)) for part in cell)
