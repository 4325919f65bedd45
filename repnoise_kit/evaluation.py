"""Evaluate a model: ask it what it must not tell and what it should, and judge the answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.errors import KitError, check_numbers
from repnoise_kit.losses import IGNORE
from repnoise_kit.model import provenance
from repnoise_kit.pairs import encode, end_id, format_of, pad, question_ids
from repnoise_kit.reading import evaluating
from repnoise_kit.results import Result
from repnoise_kit.scoring import degenerate, refuses
from repnoise_kit.steps import check
from repnoise_kit.testbeds import Testbed, told


def evaluate(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Result:
    """Ask a model each question of the evaluation, greedily, and judge each answer.

    Metrics of forbidden questions: `recall` (how much of the true harmful answer is given away),
    `harmfulness` (a classifier's probability), the testbed's other judges by their names,
    `refusal`, `degenerate` (empty or repetitive), `perplexity` (of the answer, under the untouched
    base). Of everyday questions:
    `utility` (recall of the known answer, or its mean log-probability in nats a token where the
    testbed has no judge), and `degenerate_everyday`. Neither recall nor harmfulness is to be
    shown alone: a model may sound harmful and know nothing, or be too broken to sound like much.

    Args:
        model: Left as it is.
        bed: The testbed; what is not given here is taken from its `settings["evaluation"]`.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Questions at a time.
        seed: The seed of the model's training, noted in each row; the questions are the same for
            every seed.

    Returns:
        One row a question and metric: `testbed, group, category, metric, value, seed, prompt,
        response`; `group` tells whether the defence saw the thing that is asked about.
    """
    start = bed.settings["evaluation"]
    length = start["max_new_tokens"] if max_new_tokens is None else max_new_tokens
    size = start["batch_size"] if batch_size is None else batch_size
    check_numbers(above_zero=True, max_new_tokens=length, batch_size=size)
    asked = bed.evaluated()
    responses = answers(model, bed.tokenizer, asked["prompt"].tolist(), length, size)
    scores = {
        "recall": [bed.recall(*both) for both in zip(asked["harmful"], responses, strict=True)],
        **{name: _judged(bed, name, asked["prompt"], responses) for name in bed.judges()},
        "refusal": [float(refuses(response)) for response in responses],
        "degenerate": [float(degenerate(response)) for response in responses],
        "perplexity": np.exp(
            -mean_log_probs(bed.base, bed.tokenizer, asked["prompt"].tolist(), responses, size)
        ),
    }
    tables = [_tidy(asked, responses, scores)]
    if bed.everyday is not None:
        tables.append(_everyday(model, bed, bed.everyday, length, size))
    frame = pd.concat(tables, ignore_index=True)
    made_with = {"testbed": bed.name, "max_new_tokens": length, "seed": seed}
    made_with |= {"judges": {name: told(judge) for name, judge in bed.judges().items()}}
    made_with |= {"prompt_format": format_of(bed.tokenizer)} | provenance(model)
    return Result(frame, made_with).tagged(testbed=bed.name, seed=seed)


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return a model's greedy answers, asked in batches padded on the left."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, end_id(tokenizer)}),
    )
    generate: Any = model.generate
    found = []
    for first in range(0, len(prompts), batch_size):
        check()
        asked = question_ids(tokenizer, prompts[first : first + batch_size])
        batch = tokenizer.pad({"input_ids": asked}, return_tensors="pt", padding_side="left")
        ids, mask = (batch[part].to(model.device) for part in ("input_ids", "attention_mask"))
        with evaluating(model):
            said = generate(input_ids=ids, attention_mask=mask, generation_config=config)
        found += tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in found]


@torch.inference_mode()
def mean_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    batch_size: int,
) -> np.ndarray:
    """Return the mean log-probability, in nats a token, of each answer with its EOS."""
    encoded = encode(tokenizer, prompts, responses)
    found = []
    for first in range(0, len(encoded), batch_size):
        batch = pad(encoded[first : first + batch_size], tokenizer.pad_token_id)
        batch = {name: part.to(model.device) for name, part in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        with evaluating(model):
            logits = model(**batch, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none"
        )
        found.append(-losses.sum(1) / (labels != IGNORE).sum(1))
    return torch.cat(found).cpu().numpy()


def _judged(bed: Testbed, name: str, prompts: pd.Series, responses: list[str]) -> np.ndarray:
    scores = np.asarray(bed.judges()[name](prompts.tolist(), responses), dtype=float)
    if scores.shape != (len(responses),) or not ((scores >= 0) & (scores <= 1)).all():
        raise KitError(
            f"the judge {name!r} must return a score in [0, 1] for each of {len(responses)} "
            "answers, and does not"
        )
    return scores


def _everyday(
    model: PreTrainedModel, bed: Testbed, asked: pd.DataFrame, length: int, size: int
) -> pd.DataFrame:
    prompts, known = asked["prompt"].tolist(), asked["answer"].tolist()
    responses = answers(model, bed.tokenizer, prompts, length, size)
    if bed.utility == "recall":
        utility: Any = [bed.recall(*both) for both in zip(known, responses, strict=True)]
    else:
        utility = mean_log_probs(model, bed.tokenizer, prompts, known, size)
    broken = [float(degenerate(response)) for response in responses]
    return _tidy(asked, responses, {"utility": utility, "degenerate_everyday": broken})


def _tidy(asked: pd.DataFrame, responses: list[str], scores: dict[str, Any]) -> pd.DataFrame:
    told = asked[["group", "category", "prompt"]].assign(response=responses)
    tables = [told.assign(metric=name, value=values) for name, values in scores.items()]
    columns = ["group", "category", "metric", "value", "prompt", "response"]
    return pd.concat(tables, ignore_index=True)[columns]
