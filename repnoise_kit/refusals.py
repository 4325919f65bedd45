"""Let a model refuse: the harmless answers of pairs, made by the aligned model itself."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.evaluation import answers
from repnoise_kit.files import read_table
from repnoise_kit.pairs import check_texts, end_id, question_ids
from repnoise_kit.reading import evaluating
from repnoise_kit.scoring import degenerate, refuses
from repnoise_kit.store import fingerprint, one_maker
from repnoise_kit.testbeds import checksum

# Where a model was loaded from, and by which version, changes no answer.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def make_refusals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    out: Path | str,
    *,
    max_new_tokens: int = 100,
    batch_size: int = 8,
    progress: str | None = None,
) -> pd.DataFrame:
    """Ask a model each question once, greedily, and keep the answers that refuse.

    So the paper made the harmless answers of its pairs, with the chat model that it defends (it
    kept what a classifier called harmless). Kept is what `refuses` and is not `degenerate`; of the
    other questions only the fact that they were asked. The file grows by a batch at a time. Killed
    at any moment and called again, this goes on after the last whole batch, and the file ends as
    if nothing had happened, byte for byte on one machine; a second process waits for the first.

    Args:
        model: Left as it is.
        tokenizer: Its tokenizer, with the prompt format set that is to be used.
        prompts: The questions; one that comes again is asked once.
        out: The .jsonl file: columns `made_with` (what stands for model, questions and settings),
            `prompt`, `refusal` (null where the model did not refuse). `beavertails_pairs` reads it.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Questions at a time.
        progress: Words for a progress bar; no bar without.

    Returns:
        Columns `prompt` and `refusal`, one row a refused question, in the order of the questions.

    Raises:
        KitError: no questions, or one that is not text; or `out` was made with other questions,
            another model or other settings.
    """
    out = Path(out)
    if out.suffix != ".jsonl" or out.is_dir():
        raise KitError(f"{out} is not a .jsonl file; name one")
    check_whole(max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_numbers(above_zero=True, max_new_tokens=max_new_tokens, batch_size=batch_size)
    asked = _distinct(prompts)
    made_with = _fingerprint(model, tokenizer, asked, max_new_tokens, batch_size)
    starts = [_start(made_with, prompt) for prompt in asked]
    with one_maker(out):
        done = _resume(out, starts, batch_size)
        with (
            evaluating(model),
            out.open("ab") as file,
            tqdm(desc=progress, total=len(asked), initial=done, disable=progress is None) as bar,
        ):
            for first in range(done, len(asked), batch_size):
                batch = slice(first, first + batch_size)
                said = answers(model, tokenizer, asked[batch], max_new_tokens, batch_size)
                file.write(b"".join(map(_line, starts[batch], said)))
                file.flush()
                bar.update(len(said))
        table = read_table(out)
    return table.loc[table["refusal"].notna(), ["prompt", "refusal"]].reset_index(drop=True)


def _distinct(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str):
        raise KitError("prompts is a text; give a list of texts")
    table = pd.DataFrame({"prompt": list(prompts)}, index=range(1, len(prompts) + 1), dtype=object)
    check_texts(table, ("prompt",), "prompts")
    return table["prompt"].drop_duplicates().tolist()


def _fingerprint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: list[str],
    *settings: int,
) -> str:
    parts = [model.config.to_dict()]
    if model.generation_config is not None:
        parts.append(model.generation_config.to_dict())
    told = [{k: v for k, v in part.items() if k not in _NOT_THE_MODEL} for part in parts]
    weights = [[name, checksum(weight)] for name, weight in model.state_dict().items()]
    # How a question is read and an answer ends, with the chat template or without.
    ids = [question_ids(tokenizer, asked), end_id(tokenizer), tokenizer.get_vocab()]
    return fingerprint(told, weights, ids, asked, settings)


def _start(made_with: str, prompt: str) -> bytes:
    return f'{{"made_with": "{made_with}", "prompt": {json.dumps(prompt)}, "refusal": '.encode()


def _line(start: bytes, said: str) -> bytes:
    kept = said if refuses(said) and not degenerate(said) else None
    return start + json.dumps(kept).encode() + b"}\n"


def _resume(out: Path, starts: list[bytes], batch_size: int) -> int:
    """Cut a file behind its last whole batch, and return how many questions were asked."""
    if not out.exists():
        return 0
    *lines, rest = out.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if number > len(starts) or not _ours(line, starts[number - 1]):
            raise _strange(out, number)
    if rest and (len(lines) == len(starts) or not _begun(rest, starts[len(lines)])):
        raise _strange(out, len(lines) + 1)
    # A batch's other questions decide how a question is padded, so that none is asked without them.
    done = len(lines) if len(lines) == len(starts) else len(lines) // batch_size * batch_size
    os.truncate(out, sum(len(line) + 1 for line in lines[:done]))
    return done


def _ours(line: bytes, start: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.startswith(start)


def _begun(rest: bytes, start: bytes) -> bool:
    return rest.startswith(start) or start.startswith(rest)


def _strange(out: Path, line: int) -> KitError:
    return KitError(
        f"{out}, line {line}: made with other prompts, another model or other settings, or not by "
        "make_refusals; name another file, or remove this one"
    )
