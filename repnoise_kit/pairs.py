"""Questions with a harmful and a harmless answer: what a pair is, and how pairs become batches."""

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.files import read_table
from repnoise_kit.losses import IGNORE

Encoded = dict[str, list[int]]
"""One sequence: `input_ids` and `labels`."""

FORMATS = ("plain", "chat")
_FORMAT = "repnoise_format"
_MARK = "anansweritself"
_NEEDED = ("prompt", "harmful", "harmless")
# The columns of PKU-Alignment/BeaverTails and of the paired refusals made for it.
_BEAVERTAILS = {"harmful": "response", "harmless": "refusal"}


@dataclass(frozen=True)
class Pairs:
    """Questions, each with its harmful and its harmless answer."""

    frame: pd.DataFrame
    """Columns `prompt`, `harmful`, `harmless`, `category`, and `thing`: what a question is about,
    which no split divides (the question itself where a file does not say)."""

    def __len__(self) -> int:
        """Return how many pairs there are."""
        return len(self.frame)

    def draw(self, examples: int | None, seed: int) -> "Pairs":
        """Return that many pairs in an order drawn with the seed, or all of them.

        Raises:
            KitError: more are asked for than there are.
        """
        return Pairs(draw(self.frame, examples, seed))


def load_pairs(source: Path | str, *, columns: Mapping[str, str] | None = None) -> Pairs:
    """Read pairs from a JSON, JSONL, CSV, Parquet or Arrow file.

    Args:
        source: The file. Columns `prompt`, `harmful`, `harmless`, optionally `category`, `thing`
            and `split` (`attack`, `seen` or `unseen`). The columns of BeaverTails (`response`,
            `refusal`, `category` as a dictionary of truths, `is_safe`) are understood as they
            are: rows that are safe are left out, and a row's category is its first true one.
        columns: Names in the file, where they differ: `{"prompt": "question"}`.

    Raises:
        KitError: what is wrong, in which file, row and column.
    """
    table = renamed(read_table(source), columns, source)
    for ours, theirs in _BEAVERTAILS.items():
        if ours not in table and theirs in table:
            table = table.rename(columns={theirs: ours})
    if "is_safe" in table:
        truths = table["is_safe"].map(lambda cell: isinstance(cell, bool | np.bool_))
        if not truths.all():
            raise KitError(
                f"{source}, row {(~truths).idxmax()}: is_safe is not true or false; mend it"
            )
        table = table[~table["is_safe"].astype(bool)]
    check_texts(table, _NEEDED, source)
    same = table["harmful"].str.strip() == table["harmless"].str.strip()
    if same.any():
        raise KitError(
            f"{source}, row {same.idxmax()}: harmful and harmless are the same text; "
            "give two different answers or remove the row"
        )
    table = table.assign(
        category=[_category(value) for value in table.get("category", [""] * len(table))],
        thing=_things(table),
    )
    kept = [*_NEEDED, "category", "thing"] + (["split"] if "split" in table else [])
    return Pairs(table[kept].set_axis(table.index - 1))


def load_answers(source: Path | str, *, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read a retain set: columns `prompt` and `answer` (or `response`), optionally `thing`."""
    return check_answers(renamed(read_table(source), columns, source), source)


def check_answers(table: pd.DataFrame, source: Path | str = "the retain table") -> pd.DataFrame:
    """Return a retain set's three columns, or say what is wrong with them."""
    if "answer" not in table and "response" in table:
        table = table.rename(columns={"response": "answer"})
    check_texts(table, ("prompt", "answer"), source)
    table = table.assign(thing=_things(table))
    return table[["prompt", "answer", "thing"]].reset_index(drop=True)


def draw(frame: pd.DataFrame, examples: int | None, seed: int) -> pd.DataFrame:
    """Return that many rows in an order drawn with the seed, or all of them."""
    wanted = len(frame) if examples is None else examples
    check_whole(examples=wanted, seed=seed)
    if not 0 < wanted <= len(frame):
        raise KitError(
            f"{wanted} examples are asked for, and there are {len(frame)}; ask for fewer"
        )
    order = np.random.default_rng(seed).permutation(len(frame))[:wanted]
    return frame.iloc[order].reset_index(drop=True)


def partners(frame: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Give each row a row about another thing, whose answer is wrong for it.

    Things are paired off at random (three of an odd number form a ring). Rows of one company give
    answers to one another and to nobody else, so that each answer is right as often as it is
    wrong, and a split that keeps companies whole has no answer on both sides.

    Returns:
        For each row the place of the other row, and the number of its company.

    Raises:
        KitError: all rows are about one thing.
    """
    things = np.random.default_rng(seed).permutation(frame["thing"].unique())
    if len(things) < 2:
        raise KitError("all questions are about one thing; give pairs about several")
    company = np.minimum(np.arange(len(things)) // 2, len(things) // 2 - 1)
    rows = [np.flatnonzero(frame["thing"] == thing) for thing in things]
    other, belongs = np.empty(len(frame), dtype=int), np.empty(len(frame), dtype=int)
    for place, mine in enumerate(rows):
        circle = np.flatnonzero(company == company[place])
        theirs = rows[circle[(place - circle[0] + 1) % len(circle)]]
        other[mine] = theirs[np.arange(len(mine)) % len(theirs)]
        belongs[mine] = company[place]
    return other, belongs


def prompt_text(prompt: str) -> str:
    """Return a question in the paper's format, without a chat template."""
    return f"Question: {prompt}\nAnswer:"


def set_format_(tokenizer: Any, how: str) -> None:
    """Choose how questions are put: `plain` (the paper's), or `chat`, the tokenizer's own template.

    Noted in the tokenizer, and saved with it: a model defended in one format may fail in another.

    Raises:
        KitError: there is no such format, or the tokenizer has no chat template.
    """
    if how not in FORMATS:
        raise KitError(f"there is no prompt format {how!r}; there are {', '.join(FORMATS)}")
    if how == "chat" and not tokenizer.chat_template:
        raise KitError("the tokenizer has no chat template; use the prompt format 'plain'")
    tokenizer.init_kwargs[_FORMAT] = how


def format_of(tokenizer: Any) -> str:
    """Return how questions are put: `plain` or `chat`."""
    return tokenizer.init_kwargs.get(_FORMAT, FORMATS[0])


def question_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of questions as the model reads them, up to where its answer begins."""
    if format_of(tokenizer) == "plain":
        return tokenizer([prompt_text(prompt) for prompt in prompts])["input_ids"]
    # The template writes the special tokens itself.
    texts = [_in_template(tokenizer, prompt) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def end_id(tokenizer: Any) -> int:
    """Return the token that ends an answer: EOS, or what the chat template puts after one."""
    if format_of(tokenizer) == "plain":
        return tokenizer.eos_token_id
    # The template's own words about thinking, or none, may stand before the answer.
    after = _in_template(tokenizer, "a", _MARK).partition(_MARK)[2]
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in added), tokenizer.eos_token_id)


def _in_template(tokenizer: Any, prompt: str, answer: str | None = None) -> str:
    turns = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    # Some templates tell the day, so that a number would change overnight.
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=answer is None, date_string="1 Jan 2025"
    )


def encode(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    max_length: int = 256,
    loss_on: Literal["answer", "all"] = "answer",
) -> list[Encoded]:
    """Return token ids and labels of questions with their answers, each ended by one EOS.

    Question and answer are tokenized apart, so that the answer begins at a token of its own. What
    is longer than `max_length` loses the end of its answer, and the beginning of its question
    where that alone fills more than half. Labels are -100 outside the answer, or nowhere. In the
    chat format what ends an answer is the template's own token.
    """
    if not max_length >= 2:
        raise KitError(f"max_length must be at least 2, not {max_length}")
    if loss_on not in ("answer", "all"):
        raise KitError(f"loss_on must be 'answer' or 'all', not {loss_on!r}")
    asked, end = question_ids(tokenizer, prompts), end_id(tokenizer)
    space = " " if format_of(tokenizer) == "plain" else ""
    said = tokenizer([space + answer for answer in answers], add_special_tokens=False)["input_ids"]
    encoded = []
    for question, answer in zip(asked, said, strict=True):
        answer = [*answer, end]
        question = question[-max(max_length - len(answer), max_length // 2) :]
        answer = answer[: max_length - len(question)]
        ids = question + answer
        hidden = 0 if loss_on == "all" else len(question)
        encoded.append({"input_ids": ids, "labels": [IGNORE] * hidden + ids[hidden:]})
    return encoded


def pad(
    rows: Sequence[Encoded], pad_id: int, *, least: int = 0, loss_on_pads: bool = False
) -> dict[str, Tensor]:
    """Return a batch of sequences, padded on the right to the longest, `least` tokens or more.

    `loss_on_pads` gives padding labels too, as `labels=input_ids` in the paper's attack did.
    """
    width = max(least, *(len(row["input_ids"]) for row in rows))

    def filled(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {
        "input_ids": filled("input_ids", pad_id),
        "attention_mask": (torch.arange(width)[None, :] < lengths[:, None]).long(),
        "labels": filled("labels", pad_id if loss_on_pads else IGNORE),
    }


def stack_rows(rows: Sequence[Tensor], fill: int) -> Tensor:
    """Put (batch, seq) tensors under one another, padding the narrower ones on the right."""
    width = max(part.shape[1] for part in rows)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in rows]
    )


def join(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Make one batch of several, of what all of them hold; padding is masked and unlabelled."""
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
    return {
        name: stack_rows([batch[name] for batch in batches], fill)
        for name, fill in fills.items()
        if all(name in batch for batch in batches)
    }


def renamed(
    table: pd.DataFrame, columns: Mapping[str, str] | None, source: Path | str
) -> pd.DataFrame:
    """Give columns the kit's names, where a file has others."""
    columns = columns or {}
    for theirs in columns.values():
        if theirs not in table:
            listed = ", ".join(map(str, table.columns))
            raise KitError(f"{source} has no column {theirs!r}; it has {listed}")
    replaced = [ours for ours in columns if ours not in columns.values()]
    table = table.drop(columns=replaced, errors="ignore")
    return table.rename(columns={theirs: ours for ours, theirs in columns.items()})


def check_texts(table: pd.DataFrame, needed: Sequence[str], source: Path | str) -> None:
    """Refuse a table without rows, a missing column, or a cell that holds no text, by its row."""
    if table.empty:
        raise KitError(f"{source} holds no rows; give at least a few")
    if missing := [name for name in needed if name not in table]:
        raise KitError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}: "
            f"name the one that serves (--columns {missing[0]}=NAME, or columns={{...}})"
        )
    for name in needed:
        text = table[name].map(lambda cell: isinstance(cell, str) and bool(cell.strip()))
        if not text.all():
            row = (~text).idxmax()
            raise KitError(f"{source}, row {row}: {name} is empty or not text; fill or remove it")


def _things(table: pd.DataFrame) -> pd.Series:
    given = table.get("thing", table["prompt"])
    said = given.notna() & (given.astype(str).str.strip() != "")
    return given.astype(str).where(said, table["prompt"])


def _category(value: Any) -> str:
    if isinstance(value, str) and value.startswith("{"):  # As a CSV file holds a dictionary.
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if isinstance(value, Mapping):
        return next((name for name, holds in value.items() if holds), "")
    return "" if value is None or value != value else str(value)
