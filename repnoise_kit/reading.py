"""Read texts with a model: which texts, and how they go through it, batch by batch."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.errors import KitError, check_numbers
from repnoise_kit.model import load_tokenizer
from repnoise_kit.pairs import Pairs, check_texts, encode, pad, partners
from repnoise_kit.results import need

SIDES = ("harmful", "harmless", "harmful of another")
"""A question's two answers, and the harmful answer of a question about another thing."""


def texts(pairs: Pairs | pd.DataFrame, sides: Sequence[str] = SIDES, seed: int = 0) -> pd.DataFrame:
    """Return one row a question and side: `prompt, answer, label, category, thing, company`.

    `label` is the side; `company` says which things lend one another their answers, and is what no
    split into train and test may divide.

    Args:
        pairs: Questions with both answers; or a table of other texts, which is read as it is:
            `prompt, answer, label` and whatever else it holds.
        sides: Some of `SIDES`; of no meaning for a table.
        seed: Draws which other thing lends its answer.

    Raises:
        KitError: an unknown side, no pairs, or all about one thing where another is asked for; a
            table without these columns.
    """
    if isinstance(pairs, pd.DataFrame):
        check_texts(pairs, ("prompt", "answer", "label"), "the table of texts")
        return pairs.reset_index(drop=True)
    if wrong := [side for side in sides if side not in SIDES]:
        raise KitError(f"there is no side {wrong[0]!r}; there are {', '.join(SIDES)}")
    frame = need(pairs.frame, "prompt", "harmful", "harmless").reset_index(drop=True)
    if "thing" not in frame:
        frame = frame.assign(thing=frame["prompt"])
    if frame.empty or not sides:
        raise KitError("there are no texts to read; give pairs and a side of them")
    told = {"harmful": frame["harmful"], "harmless": frame["harmless"]}
    if SIDES[2] in sides or frame["thing"].nunique() > 1:
        other, company = partners(frame, seed)
        told[SIDES[2]] = frame["harmful"].iloc[other].reset_index(drop=True)
    else:
        company = 0
    kept = frame.reindex(columns=["prompt", "category", "thing"]).assign(company=company)
    tables = [kept.assign(answer=told[side], label=side) for side in sides]
    return pd.concat(tables, ignore_index=True)


def batches(
    model: PreTrainedModel,
    table: pd.DataFrame,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    batch_size: int = 32,
    max_length: int = 256,
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yield each batch of a table's prompts and answers, on the model's device, and its place.

    Args:
        model: The model that will read them.
        table: Columns `prompt` and `answer`.
        tokenizer: By default the one that lies with the model.
        batch_size: Texts at a time.
        max_length: Tokens of a question with its answer.
    """
    check_numbers(above_zero=True, batch_size=batch_size)
    if tokenizer is None:
        if not model.name_or_path:
            raise KitError("this model does not say where it came from; give tokenizer=… too")
        tokenizer = load_tokenizer(model.name_or_path)
    end = tokenizer.eos_token_id
    if end is None:
        raise KitError("the tokenizer has no EOS token to end an answer with; set its eos_token")
    fill = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts, answers = table["prompt"].tolist(), table["answer"].tolist()
    encoded = encode(tokenizer, prompts, answers, max_length=max_length)
    for first in range(0, len(encoded), batch_size):
        place = slice(first, min(first + batch_size, len(encoded)))
        batch = pad(encoded[place], fill)
        yield place, {name: part.to(model.device) for name, part in batch.items()}


@contextmanager
def evaluating(model: PreTrainedModel) -> Generator[None]:
    """Switch dropout off for as long as the context lasts."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
