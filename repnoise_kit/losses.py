"""The paper's equations as functions of tensors: nothing here knows a model, a mask or a file."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from repnoise_kit.errors import KitError
from repnoise_kit.head import summed_ce
from repnoise_kit.processes import total

IGNORE = -100
"""The label of a token no loss is taken on, as everywhere in Hugging Face."""

KERNELS = 5


def masked_ce(
    logits: Float[Tensor, "batch seq vocab"], labels: Int[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in nats a token, of predicting each label from the left.

    `labels[:, t]` is predicted by `logits[:, t - 1]`; labels of -100 are left out. This is the
    loss L of equations 1 and 3, and equals the `loss` of a Hugging Face causal LM.
    """
    predicted = labels[:, 1:].flatten()
    summed = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), predicted, ignore_index=IGNORE, reduction="sum"
    )
    return total(summed) / total((predicted != IGNORE).sum())


def lens_ce(
    hidden: Float[Tensor, "batch seq d_model"] | Sequence[Float[Tensor, "batch seq d_model"]],
    labels: Int[Tensor, "batch seq"],
    unembed: nn.Module,
    keep_logits: Num[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, ""]:
    """Return `masked_ce(unembed(hidden), labels)`; of several streams, the mean over them.

    The cross-entropy of layers read through the model's own head (Algorithm 1, line 9). Only
    positions that predict are unembedded, chunk by chunk (`head.summed_ce`). Logits are multiplied
    by `keep_logits`, where given: the published code zeroes some of them.
    """
    streams = [hidden] if isinstance(hidden, Tensor) else hidden
    at = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    rows = torch.cat([stream[at] for stream in streams])
    kept = None if keep_logits is None else keep_logits[at].repeat(len(streams))
    summed = summed_ce(rows, labels[:, 1:][at].repeat(len(streams)), unembed, kept)
    return total(summed) / total(torch.tensor(len(rows), device=rows.device))


def mmd(
    x: Float[Tensor, "sample d"],
    y: Float[Tensor, "sample d"],
    *,
    unbiased: bool = False,
    bandwidth: float | None = None,
) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy between two samples of equal size.

    Five Gaussian kernels exp(-d²/b) of bandwidths b·{¼, ½, 1, 2, 4} are summed, where b is the
    mean squared distance over all pairs of different rows, taken as a constant: the estimate of
    the noise term in section 3 and Appendix B of the paper. 0 for equal samples, and for empty
    ones; at most 10.
    The biased form counts each row against itself, so that it stays above 2·(5 - 1.907)/sample
    or so even for two samples of one distribution; `unbiased` leaves those pairs out and may be
    slightly negative.

    Distances come from one Gram matrix in float32: nothing pairwise of the width `d` is held.
    """
    count = len(x)
    if not count:
        return (x.sum() + y.sum()).float()
    if unbiased and count < 2:
        raise KitError(f"an unbiased MMD needs 2 rows or more, not {count}; use larger batches")
    rows = torch.cat([x, y]).float()
    with torch.autocast(rows.device.type, enabled=False):
        gram = rows @ rows.T
    norms = gram.diagonal()
    other = ~torch.eye(2 * count, dtype=torch.bool, device=rows.device)
    # Where a row meets itself the distance is 0 by definition, not by rounding.
    distances = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0) * other
    if bandwidth is None:
        mean = distances.detach().sum() / other.sum()
        scale = mean.clamp(min=torch.finfo(mean.dtype).tiny)
    else:
        scale = torch.tensor(bandwidth, device=rows.device)
    middle = KERNELS // 2
    widths = [scale * 2.0 ** (place - middle) for place in range(KERNELS)]
    kernel = torch.stack([torch.exp(-distances / width) for width in widths]).sum(0)
    within, across = kernel[:count, :count], kernel[:count, count:]
    within_y = kernel[count:, count:]
    if not unbiased:
        return within.mean() + within_y.mean() - 2 * across.mean()
    apart = other[:count, :count]
    return within[apart].mean() + within_y[apart].mean() - 2 * across.mean()
