"""Logit mass: how likely each layer, read through the model's own head, makes an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.anatomy import check_lens, parts
from repnoise_kit.errors import KitError
from repnoise_kit.losses import IGNORE
from repnoise_kit.model import hidden_forward, provenance
from repnoise_kit.pairs import Pairs
from repnoise_kit.reading import SIDES, batches, evaluating, texts
from repnoise_kit.recording import record
from repnoise_kit.results import Result

AT_ONCE = 2**26
"""So many logits are held at a time."""


@torch.no_grad()
def layer_log_probs(model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "layer sample"]:
    """Return the mean log-probability of each sequence's labelled tokens, layer by layer.

    What each layer leaves in the residual stream goes through the model's own final norm and head
    (the logit lens), soft-caps and logit scales included. Row 0 is the embedding, row l + 1 the
    output of layer l, and the last row the model's own distribution.

    Args:
        model: A causal LM, in evaluation mode.
        batch: `input_ids`, `attention_mask`, `labels` (-100 outside the answer), each (batch, seq).

    Returns:
        (layers + 1, batch), in nats a token.

    Raises:
        KitError: a sequence has no labelled token; parts of the model are not to be found, or its
            logits are made in another way.
    """
    labels = batch["labels"][:, 1:]
    inside = labels != IGNORE
    if not inside.any(dim=1).all():
        raise KitError("a sequence has no labelled token after its first; look at its labels")
    rows, places = inside.nonzero(as_tuple=True)

    # Only the positions that predict a label are kept and read: a head may have 100,000 rows.
    def predicting(hidden: Tensor) -> Tensor:
        return hidden[rows, places]

    last = len(parts(model).layers) - 1
    with (
        record(model, "embedding", pool=predicting) as entry,
        record(model, "residual", pool=predicting) as stream,
        record(model, "residual", [last], pool=lambda hidden: hidden[:, -1]) as end,
    ):
        own = hidden_forward(model, batch["input_ids"], batch["attention_mask"])
    check_lens(model, end[last], own)
    layers = [entry[0], *(stream[layer] for layer in sorted(stream))]
    each = torch.stack([_log_probs(model, hidden, labels[rows, places]) for hidden in layers])
    sums = each.new_zeros(len(layers), len(labels)).index_add_(1, rows.to(each.device), each)
    return sums / inside.sum(dim=1).to(each.device)


def _log_probs(
    model: nn.Module, hidden: Float[Tensor, "token d_model"], wanted: Tensor
) -> Float[Tensor, " token"]:
    found = parts(model)
    unembedding: Any = found.head.weight
    size = max(1, AT_ONCE // len(unembedding))
    return torch.cat(
        [
            -F.cross_entropy(found.to_logits(found.norm(few)).float(), labels, reduction="none")
            for few, labels in zip(hidden.split(size), wanted.split(size), strict=True)
        ]
    )


def logit_mass(
    model: PreTrainedModel,
    pairs: Pairs | pd.DataFrame,
    *,
    sides: Sequence[str] = SIDES,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    seed: int = 0,
) -> Result:
    """Return how likely every layer makes harmful and harmless answers (Figures 3, 7 and 9).

    Besides the two answers of each question stands the harmful answer of *another* one: what the
    right answer has over a wrong one is *knowledge*, what both have is *style*.

    Args:
        model: A causal LM, left as it is.
        pairs: Questions with both answers; or a table of other texts: `prompt, answer, label`.
        sides: Which answers.
        tokenizer: By default the one that lies with the model.
        batch_size: Texts at a time.
        max_length: Tokens of a question with its answer.
        seed: Draws which other question lends its answer: one about another thing.

    Returns:
        One row a text and layer: `group` (`harmful`, `harmless`, `harmful of another`), `layer`
        (0: the embedding; l + 1: the output of layer l, counted from 0), `metric` (`log_prob`),
        `value` in nats a token, `prompt`, `seed`.
    """
    table = texts(pairs, sides, seed)
    found = []
    with evaluating(model):
        for _, batch in batches(
            model, table, tokenizer, batch_size=batch_size, max_length=max_length
        ):
            found.append(layer_log_probs(model, batch).cpu())
    values = torch.cat(found, dim=1).numpy()
    count = len(values)
    rows = table.loc[np.tile(table.index, count), ["label", "prompt"]].reset_index(drop=True)
    rows = rows.rename(columns={"label": "group"}).assign(
        layer=np.repeat(np.arange(count), len(table)),
        metric="log_prob",
        value=values.ravel(),
        seed=seed,
    )
    made_with = {"analysis": "logit mass", "sides": list(table["label"].unique()), "seed": seed}
    made_with |= provenance(model)
    return Result(rows[["group", "layer", "metric", "value", "prompt", "seed"]], made_with)
