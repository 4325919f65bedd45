"""The shape of activations: are they noise, where do they lie, how alike are two models."""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from repnoise_kit.activations import Activations, pooled
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.losses import mmd
from repnoise_kit.model import provenance
from repnoise_kit.pairs import Pairs
from repnoise_kit.reading import SIDES, batches, texts
from repnoise_kit.recording import Site
from repnoise_kit.results import Result


def noise_test(
    model: PreTrainedModel,
    pairs: Pairs | pd.DataFrame,
    site: Site = "mlp",
    *,
    sides: Sequence[str] = SIDES[:2],
    draws: int = 200,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    max_length: int = 256,
    seed: int = 0,
) -> Result:
    """Test, layer by layer, whether the activations of answers have become Gaussian noise.

    The unbiased MMD between the activations at one token of each answer, drawn with the seed, and
    as many draws of independent Gaussians with the mean and spread of each coordinate. Coordinates
    are brought to unit spread first: the shape is judged, not the size.

    Args:
        model: A causal LM, left as it is.
        pairs: Questions with both answers; or a table of other texts: `prompt, answer, label`.
        site: `mlp`, which the loss works on, or another.
        sides: Which answers; the harmless ones are what the harmful ones are compared with.
        draws: Samples of true noise, for the null.
        tokenizer: By default the one that lies with the model.
        batch_size: Texts at a time.
        max_length: Tokens of a question with its answer.
        seed: Draws tokens and noise.

    Returns:
        One row a side, layer and metric: `group` (the side), `layer`, `metric` (`mmd`; `null_95`,
        the 95th percentile of what true noise gives; `p`, how often that is as large), `value`,
        `seed`. Where no coordinate varies there is nothing to test, and all are empty.

    Raises:
        KitError: a side has fewer than two texts.
    """
    check_whole(draws=draws, seed=seed)
    check_numbers(above_zero=True, draws=draws)
    rows = []
    for side, table in texts(pairs, sides, seed).groupby("label", sort=False):
        if len(table) < 2:
            raise KitError(f"noise cannot be told from one {side} text; give two or more")
        through = batches(model, table, tokenizer, batch_size=batch_size, max_length=max_length)
        values = pooled(model, through, len(table), site, None, _one_token(len(table), seed))
        for layer, x in enumerate(values):
            found = against_gaussian(x, draws, seed, f"{side} {layer}")
            tags = {"group": side, "layer": layer, "seed": seed}
            rows += [tags | {"metric": name, "value": value} for name, value in found.items()]
    frame = pd.DataFrame(rows)[["group", "layer", "metric", "value", "seed"]]
    made_with = {"analysis": "noise test", "site": site, "draws": draws, "seed": seed}
    return Result(frame, made_with | provenance(model))


def _one_token(count: int, seed: int) -> Callable[[Tensor, slice], Tensor]:
    """Return what weighs one token of each answer 1 and the others 0, however they are batched."""
    chances = torch.rand(count, generator=torch.Generator().manual_seed(seed))

    def weigh(inside: Tensor, place: slice) -> Tensor:
        nth = (chances[place].to(inside.device) * inside.sum(1)).floor() + 1
        return ((inside.cumsum(1) == nth[:, None]) & (inside > 0)).float()

    return weigh


def against_gaussian(
    x: Float[Tensor, "sample d"], draws: int, seed: int, name: str = ""
) -> dict[str, float]:
    """Return the unbiased MMD of a sample to its Gaussian, `null_95` and `p`.

    Samples of other names are compared with other noise, so that they do not err together.

    The null are samples of true noise, brought to unit spread in the same way. To deal the rows of
    sample and noise out anew would be too easy a test to pass: only one of the two is centred and
    scaled by itself.
    """
    x = x[:, x.std(0) > 0]  # A coordinate that does not vary says nothing of shape.
    if not x.shape[1]:
        return dict.fromkeys(("mmd", "null_95", "p"), float("nan"))
    null = _null(*x.shape, draws, seed)
    own = zlib.crc32(f"{seed} {name}".encode())
    here = _to_gaussian(x, torch.Generator().manual_seed(own))
    return {
        "mmd": here,
        "null_95": float(np.quantile(null, 0.95)),
        "p": (1 + sum(value >= here for value in null)) / (1 + draws),
    }


@lru_cache(maxsize=16)
def _null(count: int, width: int, draws: int, seed: int) -> list[float]:
    draw = torch.Generator().manual_seed(seed + 1)
    noise = (torch.randn(count, width, generator=draw) for _ in range(draws))
    return [_to_gaussian(sample, draw) for sample in noise]


def _to_gaussian(x: Float[Tensor, "sample d"], draw: torch.Generator) -> float:
    standard = (x - x.mean(0)) / x.std(0)
    return mmd(standard, torch.randn(x.shape, generator=draw), unbiased=True).item()


def fit_pca(activations: Float[Tensor, "sample d"], components: int = 2) -> PCA:
    """Return the principal components of some activations, by scikit-learn.

    Fitted on one model, they can be used to draw another (`pca(…, fit=…)`), so that both are seen
    along the same axes.
    """
    table = np.asarray(activations, dtype=np.float64)
    if components > min(table.shape):
        raise KitError(
            f"{table.shape[0]} activations of width {table.shape[1]} have no {components} "
            "components; ask for fewer, or give more texts"
        )
    return PCA(components, svd_solver="full").fit(table)


def pca(
    activations: Float[Tensor, "sample d"], labels: Sequence[str], *, fit: PCA | None = None
) -> Result:
    """Project activations on principal components (Figures 4 and 8).

    Args:
        activations: One row a text: a layer of `answer_activations(…).values`.
        labels: What each text is: `harmful`, `harmless`.
        fit: Components of another set, from `fit_pca`; by default these activations' own.

    Returns:
        One row a text: `group` (its label), `pc1`, `pc2`, …, and `explained`: the share of these
        activations' variance that lies along the components shown.

    Raises:
        KitError: labels of another number than activations, or components of another width.
    """
    table = np.asarray(activations, dtype=np.float64)
    if len(table) != len(labels):
        raise KitError(f"{len(table)} activations have {len(labels)} labels; give as many")
    fit: Any = fit or fit_pca(activations)
    if fit.n_features_in_ != table.shape[1]:
        raise KitError(
            f"the components are of width {fit.n_features_in_} and the activations of "
            f"{table.shape[1]}; fit them on a model of the same width"
        )
    placed = fit.transform(table)
    explained = float(placed.var(axis=0).sum() / table.var(axis=0).sum())
    columns = {f"pc{i + 1}": placed[:, i] for i in range(placed.shape[1])}
    frame = pd.DataFrame({"group": list(labels), **columns, "explained": explained})
    return Result(frame, {"analysis": "pca"})


def linear_cka(x: Float[Tensor, "sample d"], y: Float[Tensor, "sample e"]) -> float:
    """Return the linear centred kernel alignment of two sets of activations of the same texts.

    1 for equal up to rotation and scale (Kornblith et al., 2019). Few texts in a wide space look
    alike by chance: compare with `shuffled` of `cka`.
    """
    if len(x) != len(y):
        raise KitError(f"{len(x)} texts are compared with {len(y)}; take the same texts of both")
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    if len(x) < max(x.shape[1], y.shape[1]):
        one, other = x @ x.T, y @ y.T
        shared = (one * other).sum()
    else:
        one, other = x.T @ x, y.T @ y
        shared = (x.T @ y).square().sum()
    return float(shared / (one.norm() * other.norm()))


def cka(one: Activations, other: Activations, *, seed: int = 0) -> Result:
    """Compare two models layer by layer: linear CKA on the activations of the same texts.

    Args:
        one: Activations of one model.
        other: Of the other, of the same texts and layers; the widths may differ.
        seed: Draws the order of the null.

    Returns:
        One row a layer and metric: `layer`, `metric` (`cka`; `shuffled`: the same with the texts of
        one model in a random order, what chance alone gives), `value` in [0, 1].

    Raises:
        KitError: not the same texts, or not as many layers.
    """
    same = one.frame[["prompt", "answer"]].equals(other.frame[["prompt", "answer"]])
    if not same or one.layers != other.layers:
        raise KitError("the two sets are of different texts or layers; take both from the same")
    order = torch.randperm(len(one.frame), generator=torch.Generator().manual_seed(seed))
    rows = []
    for layer, x, y in zip(one.layers, one.values, other.values, strict=True):
        found = {"cka": linear_cka(x, y), "shuffled": linear_cka(x[order], y)}
        rows += [{"layer": layer, "metric": m, "value": value} for m, value in found.items()]
    return Result(pd.DataFrame(rows), {"analysis": "cka", "seed": seed})
