"""Activations of answers, one vector a layer and text, pooled as the texts pass."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.anatomy import check_layers, parts
from repnoise_kit.errors import KitError
from repnoise_kit.losses import IGNORE
from repnoise_kit.model import hidden_forward
from repnoise_kit.pairs import Pairs
from repnoise_kit.reading import SIDES, batches, evaluating, texts
from repnoise_kit.recording import Site, record


class Activations(NamedTuple):
    """One vector a layer and text."""

    values: Float[Tensor, "layer sample d_model"]
    """On the CPU, in float32."""
    layers: tuple[int, ...]
    """The layer of each row, counted from 0."""
    frame: pd.DataFrame
    """The texts, one row each: `prompt, answer, label, category, thing, company`."""


def answer_activations(
    model: PreTrainedModel,
    pairs: Pairs | pd.DataFrame,
    site: Site = "residual",
    *,
    sides: Sequence[str] = SIDES[:2],
    layers: Iterable[int] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    seed: int = 0,
) -> Activations:
    """Return the mean activation over the tokens of each answer, at each layer.

    Each layer's is pooled as the batch passes it, so that memory grows with what is returned and
    no more: 4 · layers · texts · width bytes.

    Args:
        model: A causal LM, left as it is.
        pairs: Questions with both answers; or a table of other texts: `prompt, answer, label`.
        site: `residual`, `mlp`, `attention`, or `embedding`.
        sides: Which answers, of `harmful`, `harmless`, `harmful of another`.
        layers: Which layers, counted from 0; by default all.
        tokenizer: By default the one that lies with the model.
        batch_size: Texts at a time.
        max_length: Tokens of a question with its answer.
        seed: Draws which other question lends its answer.
    """
    table = texts(pairs, sides, seed)
    chosen = _chosen(model, site, layers)
    through = batches(model, table, tokenizer, batch_size=batch_size, max_length=max_length)

    def mean(inside: Tensor, _place: slice) -> Tensor:
        return inside / inside.sum(1, keepdim=True)

    values = pooled(model, through, len(table), site, chosen, mean)
    return Activations(values, chosen, table)


def _chosen(model: PreTrainedModel, site: Site, layers: Iterable[int] | None) -> tuple[int, ...]:
    if site == "embedding":
        return (0,)
    found = range(len(parts(model).layers)) if layers is None else check_layers(model, layers)
    if not found:
        raise KitError("there are no layers to record; give at least one, or leave layers out")
    return tuple(found)


@torch.no_grad()
def pooled(
    model: PreTrainedModel,
    through: Iterable[tuple[slice, dict[str, Tensor]]],
    count: int,
    site: Site,
    layers: Sequence[int] | None,
    weigh: Callable[[Tensor, slice], Tensor],
) -> Float[Tensor, "layer sample d_model"]:
    """Return weighted means over answer tokens, by layer and text.

    `weigh` makes weights of a mask (batch, seq) and the place of the batch among the texts.
    """
    values = None
    with evaluating(model):
        for place, batch in through:
            weights = weigh((batch["labels"] != IGNORE).float(), place).unsqueeze(1)

            def pool(tensor: Tensor, weights: Tensor = weights) -> Tensor:
                return (weights.to(tensor.device) @ tensor.float()).squeeze(1).cpu()

            with record(model, site, layers, pool=pool) as found:
                hidden_forward(model, batch["input_ids"], batch["attention_mask"])
            rows = sorted(found) if layers is None else layers
            if values is None:
                values = torch.empty(len(rows), count, found[rows[0]].shape[-1])
            for row, layer in enumerate(rows):
                values[row, place] = found[layer]
    assert values is not None  # There is no table without rows.
    return values
