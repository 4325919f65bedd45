"""A slow, independent second opinion on the RepNoise loss (arXiv 2405.14577), for the tests.

Written from the paper's equations (section 3, Algorithm 1 in Appendix B.1) and from a description
of what the authors' published code computes, operation by operation; by another hand than the code
it checks, which it was neither taken from nor compared with while it was written.

Loops are preferred over cleverness, except in `published_loss` and `published_mmd`, which do the
work in the published form (full logits of every layer, pairwise differences) so it can be timed.
Models are Llama-like `transformers` models: `model.model.layers`, `model.model.norm`,
`model.lm_head`. Batches are dicts of tensors of shape (batch, seq).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORE = -100

Batch = Mapping[str, Tensor]


class Terms(NamedTuple):
    """The loss and its three terms; `ascent` is the value before the log."""

    total: Tensor
    retain: Tensor
    noise: Tensor
    ascent: Tensor


def slow_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Biased five-kernel MMD between the rows of x and of y, as published, pair by pair."""
    rows = list(x) + list(y)
    n = len(rows)
    distances = [[((a - b) ** 2).sum() for b in rows] for a in rows]
    apart = [distances[i][j].detach() for i in range(n) for j in range(n) if i != j]
    bandwidth = sum(apart) / (n * n - n)

    def kernel(i: int, j: int) -> Tensor:
        return sum(torch.exp(-distances[i][j] / (bandwidth / 2**2 * 2**k)) for k in range(5))

    def mean_kernel(left: Sequence[int], right: Sequence[int]) -> Tensor:
        return sum(kernel(i, j) for i in left for j in right) / (len(left) * len(right))

    xs, ys = range(len(x)), range(len(x), n)
    return mean_kernel(xs, xs) + mean_kernel(ys, ys) - mean_kernel(xs, ys) - mean_kernel(ys, xs)


def published_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The same MMD from one (2B, 2B, D) tensor of differences; B rows a side."""
    rows = torch.cat([x, y])
    n, half = len(rows), len(x)
    distances = ((rows[None] - rows[:, None]) ** 2).sum(dim=2)
    bandwidth = distances.detach().sum() / (n * n - n) / 2 ** (5 // 2)
    kernels = sum(torch.exp(-distances / (bandwidth * 2**k)) for k in range(5))
    xx, yy = kernels[:half, :half], kernels[half:, half:]
    xy, yx = kernels[:half, half:], kernels[half:, :half]
    return (xx + yy - xy - yx).mean()


def token_losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """-log softmax of every kept label (only -100 is ignored), position t predicting t + 1."""
    losses = []
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = int(labels[b, t + 1])
            if label != IGNORE:
                losses.append(-torch.log_softmax(logits[b, t], dim=-1)[label])
    return losses


def slow_masked_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the kept labels of the whole batch."""
    return torch.stack(token_losses(logits, labels)).mean()


def published_ce(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published masked CE: logits and labels times mask, label 0 ignored."""
    logits = (logits * mask.unsqueeze(-1))[:, :-1]
    labels = (ids * mask)[:, 1:]
    labels = labels.masked_fill(labels == 0, IGNORE)
    vocabulary = logits.shape[-1]
    return cross_entropy(logits.reshape(-1, vocabulary), labels.reshape(-1), ignore_index=IGNORE)


def forward_with_outputs(
    model: Any, modules: Iterable[nn.Module], batch: Batch, **options: Any
) -> tuple[Any, list[Tensor]]:
    """One forward pass, and the outputs of the given modules in their order (hooks removed)."""
    seen: dict[int, Tensor] = {}
    handles = []

    def keep(i: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[i] = output[0] if isinstance(output, tuple) else output

        return hook

    try:
        for i, module in enumerate(modules):
            handles.append(module.register_forward_hook(keep(i)))
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
            **options,
        )
    finally:
        for handle in handles:
            handle.remove()
    return out, [seen[i] for i in range(len(handles))]


def published_loss(
    model: Any, harmful: Batch, harmless: Batch, alpha: float = 1.0, beta: float = 0.001
) -> Terms:
    """What the authors' code computes, S / (L + 1) + 1 included; equal shapes only."""
    ids_h, ids_s = harmful["input_ids"], harmless["input_ids"]
    if ids_h.shape != ids_s.shape:
        raise ValueError("the published mask is defined on equal shapes only")
    mask = (ids_h != ids_s).long()

    # Harmful pass. The last of the L + 1 hidden states is already normalised: normed twice below.
    mlps = [layer.mlp for layer in model.model.layers]
    out_h, activations = forward_with_outputs(model, mlps, harmful, output_hidden_states=True)

    # Noise (item 2): one flattened row a sequence, fresh noise for each layer.
    per_layer = []
    kept = mask.unsqueeze(-1)
    for activation in activations:
        gauss = torch.randn_like(activation)
        per_layer.append(published_mmd((activation * kept).flatten(1), (gauss * kept).flatten(1)))
    noise = torch.stack(per_layer).mean()

    # Ascent (item 4): final logits, then every hidden state, the embedding's output included.
    total_ce = published_ce(out_h.logits, ids_h, mask)
    for hidden in out_h.hidden_states:
        lens = model.lm_head(model.model.norm(hidden))
        total_ce = total_ce + published_ce(lens, ids_h, mask)
    ascent = total_ce / len(out_h.hidden_states) + 1

    # Stability (item 5), with the same mask; then the sum (item 6).
    out_s = model(
        input_ids=ids_s,
        attention_mask=harmless["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
    )
    retain = published_ce(out_s.logits, ids_s, mask)
    total = retain + beta * noise - alpha * torch.log(ascent)
    return Terms(total, retain, noise, ascent)


def slow_retain(model: Any, batches: Sequence[Batch]) -> Tensor:
    """L_retain: one mean over the answer tokens of all the batches together."""
    losses = []
    for batch in batches:
        out, _ = forward_with_outputs(model, [], batch)
        losses += token_losses(out.logits, batch["labels"])
    return torch.stack(losses).mean()


def slow_noise(model: Any, harmful: Batch) -> Tensor:
    """(1/L) sum_l MMD(m a_l, m eps_l): MLP outputs, one flattened row a sequence."""
    mlps = [layer.mlp for layer in model.model.layers]
    _, activations = forward_with_outputs(model, mlps, harmful)
    per_layer = []
    for activation in activations:
        gauss = torch.randn_like(activation)
        x, y = [], []
        for b, labels in enumerate(harmful["labels"]):
            kept = (labels != IGNORE).to(activation.dtype).unsqueeze(-1)
            x.append((activation[b] * kept).flatten())
            y.append((gauss[b] * kept).flatten())
        per_layer.append(slow_mmd(torch.stack(x), torch.stack(y)))
    return torch.stack(per_layer).mean()


def slow_ascent(model: Any, harmful: Batch) -> Tensor:
    """Mean over the L layers of the CE of head(norm(raw output of the layer))."""
    _, residuals = forward_with_outputs(model, model.model.layers, harmful)
    per_layer = []
    for residual in residuals:
        lens = model.lm_head(model.model.norm(residual))
        per_layer.append(slow_masked_ce(lens, harmful["labels"]))
    return torch.stack(per_layer).mean()


def slow_paper_loss(
    model: Any,
    harmful: Batch,
    harmless: Batch,
    retain: Batch | None = None,
    alpha: float = 1.0,
    beta: float = 0.001,
) -> Terms:
    """Algorithm 1 as the preset `paper` reads it, a forward pass for each part."""
    kept = slow_retain(model, [harmless] if retain is None else [harmless, retain])
    noise = slow_noise(model, harmful)
    ascent = slow_ascent(model, harmful)
    total = kept + beta * noise - alpha * torch.log(ascent)
    return Terms(total, kept, noise, ascent)


def slow_tokenwise_noise(
    model: Any, harmful: Batch, noise_rows: Sequence[Tensor] | None = None
) -> Tensor:
    """Mean over layers of the MMD with a row an answer token (preset `tokenwise`), no row limit.

    `noise_rows` gives the noise instead of drawing it: one (answer tokens, d_model) tensor a layer.
    """
    _, residuals = forward_with_outputs(model, model.model.layers, harmful)
    labels = harmful["labels"]
    answer = [(b, t) for b, row in enumerate(labels) for t in range(len(row)) if row[t] != IGNORE]
    per_layer = []
    for i, residual in enumerate(residuals):
        x = torch.stack([residual[b, t] for b, t in answer])
        if noise_rows is None:
            gauss = torch.randn_like(residual)
            y = torch.stack([gauss[b, t] for b, t in answer])
        else:
            y = noise_rows[i]
        per_layer.append(slow_mmd(x, y))
    return torch.stack(per_layer).mean()
