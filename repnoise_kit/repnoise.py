"""RepNoise: retain, ascend, noise. The paper on one screen.

`total = retain + beta · noise - alpha · log(ascent)` (Algorithm 1, Appendix B.1; equation 5 swaps
the two letters, and every published value is in the naming used here).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from repnoise_kit import processes
from repnoise_kit.anatomy import Parts, check_lens, parts
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.knobs import Knobs, choose
from repnoise_kit.losses import IGNORE, lens_ce, mmd
from repnoise_kit.model import hidden_forward
from repnoise_kit.pairs import join, stack_rows
from repnoise_kit.recording import Site, record

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels` (-100 outside the answer), each (batch, seq)."""

MAX_ROWS = 128


class RepNoiseLoss(NamedTuple):
    """The terms of one batch, each a scalar that gradients flow through where it has a weight."""

    total: Tensor
    retain: Tensor
    """Cross-entropy of the harmless answers, nats a token (the paper's stability term)."""
    noise: Tensor
    """MMD between harmful activations and Gaussian noise, mean over layers, in [0, 10]."""
    ascent: Tensor
    """Cross-entropy of the harmful answers read through the head, mean over layers, in nats a
    token; before its logarithm is taken."""


def repnoise_loss(
    model: nn.Module,
    harmful: Batch,
    harmless: Batch,
    *,
    retain: Batch | None = None,
    alpha: float = 1.0,
    beta: float = 0.001,
    preset: str = "paper",
    **knobs: Unpack[Knobs],
) -> RepNoiseLoss:
    """Return the RepNoise loss of a batch of pairs, from one forward pass over all of it.

    Batches are dictionaries of `input_ids`, `attention_mask` and `labels` (-100 outside the
    answer), each (batch, seq), padded on the right: where a row of the noise term is a sequence,
    its columns are places in it.

    Args:
        model: A causal LM; it is run in whatever mode and precision it is in.
        harmful: The questions with their harmful answers.
        harmless: The same questions, in the same order, with their harmless answers (refusals).
        retain: Everyday questions and answers that must stay as they are. They join the retain
            term only, token by token; the paper has none.
        alpha: Weight of the ascent term (the paper: 1).
        beta: Weight of the noise term (the paper: 0.001 on BeaverTails, 4 on DecodingTrust).
        preset: `"paper"`, the method as written; `"reference"`, what the authors' published code
            computes, from ids of equal shape and no labels; `"tokenwise"`, noise on the residual
            stream, one row a token.
        knobs: Departures from the preset, each described in `Knobs`.

    Returns:
        `(total, retain, noise, ascent)`: scalars; retain and ascent in nats a token, noise an MMD
        in [0, 10].

    Raises:
        KitError: an unknown preset or knob, a negative or non-finite weight, batches that are not
            partners, lack a part, or have no token that counts, or a model whose logits are made
            otherwise than by its last norm and head.
    """
    check_numbers(alpha=alpha, beta=beta)
    chosen = choose(preset, knobs)
    if chosen["bandwidth"] is not None:
        check_numbers(above_zero=True, bandwidth=chosen["bandwidth"])
    if chosen["lens_layers"] is not None:
        check_whole(lens_layers=chosen["lens_layers"])
    if chosen["noise_seed"] is not None:
        check_whole(noise_seed=chosen["noise_seed"])
    _check_partners(harmful, harmless, chosen)
    bad, bad_inside = _labels(harmful, harmless, chosen, chosen["mask"])
    scope = chosen["mask"] if chosen["retain_on"] == "mask" else chosen["retain_on"]
    good, good_inside = _labels(harmless, harmful, chosen, scope)
    batches = [harmful, harmless]
    if retain is not None:
        _check_keys("retain", retain, ["input_ids", "attention_mask", "labels"])
        batches.append(retain)
    count, width = bad.shape
    answers = [good] if retain is None else [good, retain["labels"]]
    inside = [good_inside] if retain is None else [good_inside, torch.ones_like(retain["labels"])]
    kept = stack_rows(answers, IGNORE)
    _check_counts(bad, kept)

    with ExitStack() as recording:
        recorded = {site: recording.enter_context(record(model, site)) for site in _sites(chosen)}
        joined = join(batches)
        own = hidden_forward(model, joined["input_ids"], joined["attention_mask"])

    found = parts(model)
    last = recorded["residual"][len(found.layers) - 1]
    if own.isfinite().all():  # Of a spoiled model the loss itself tells.
        check_lens(model, last[:, -1], own)
    retain_term = lens_ce(
        last[count:, : kept.shape[1]],
        kept,
        found.reader(),
        stack_rows(inside, 1) if chosen["zero_logits"] else None,
    )

    with _graded(alpha):
        streams = [(part[:count, :width], norms) for part, norms in _readings(chosen, recorded)]
        ascent = _ascent(found, streams, bad, bad_inside, chosen)
    with _graded(beta):
        noisy = [part[:count, :width] for _, part in sorted(recorded[chosen["noise_on"]].items())]
        if chosen["noise_across"]:
            inside = processes.gathered(bad_inside)
            noise = _noise([processes.gathered(part) for part in noisy], inside, chosen)
        else:
            noise = processes.mean(_noise(noisy, bad_inside, chosen))

    total = retain_term + beta * noise - alpha * (ascent.log() if chosen["log"] else ascent)
    return RepNoiseLoss(total, retain_term, noise, ascent)


def _graded(weight: float) -> torch.set_grad_enabled:
    """Work out no gradient of a term that has no weight."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0)


def _sites(chosen: Knobs) -> set[Site]:
    """Return where activations are needed."""
    sites: set[Site] = {"residual", chosen["noise_on"]}
    if chosen["lens"] == "published":
        sites.add("embedding")
    return sites | {"mlp"} if chosen["lens"] == "mlp" else sites


def _readings(chosen: Knobs, recorded: dict[Site, dict[int, Tensor]]) -> list[tuple[Tensor, int]]:
    """Return what is read through the head, first layer first, and how often it is normed."""
    if chosen["lens"] == "mlp":
        return [(mlp, 1) for _, mlp in sorted(recorded["mlp"].items())]
    stream = [residual for _, residual in sorted(recorded["residual"].items())]
    if chosen["lens"] == "final":
        return [(stream[-1], 1)]
    layers = [(residual, 1) for residual in stream]
    layers[-1] = (stream[-1], 2 if chosen["norm_last_twice"] else 1)
    if chosen["lens"] == "layers":
        return layers
    return [(recorded["embedding"][0], 1), *layers, (stream[-1], 1)]


def _ascent(
    found: Parts, read: list[tuple[Tensor, int]], labels: Tensor, inside: Tensor, chosen: Knobs
) -> Tensor:
    """Return the cross-entropy of what is read through the head, all in one."""
    some, sums = _some(read, chosen["lens_layers"]), []
    zeroed = inside if chosen["zero_logits"] else None
    for norms in {norms for _, norms in some}:
        own = [stream for stream, times in some if times == norms]
        sums.append(len(own) * lens_ce(own, labels, found.reader(norms), zeroed))
    total = torch.stack(sums).sum() * (len(read) / len(some))
    return _normalise(total, len(read), chosen["normalise"])


def _some(read: list[tuple[Tensor, int]], count: int | None) -> list[tuple[Tensor, int]]:
    """Return so many of the readings, drawn by the process's generator."""
    if count is None:
        return read
    if not 0 < count <= len(read):
        raise KitError(f"lens_layers must be from 1 to {len(read)} here, not {count}")
    return [read[place] for place in torch.randperm(len(read))[:count].tolist()]


def _normalise(total: Tensor, terms: int, how: str) -> Tensor:
    if how == "published":
        # The published code divides by L + 1 for its L + 2 terms, and adds 1 to the quotient.
        return total / (terms - 1) + 1
    return total / terms if how == "mean" else total


def _noise(activations: list[Tensor], inside: Tensor, chosen: Knobs) -> Tensor:
    """Return the mean over layers of the MMD between activations and noise, inside the mask."""
    draw = torch.Generator(inside.device)
    if (seed := chosen["noise_seed"]) is not None:
        draw.manual_seed(seed)
    if chosen["rows"] == "token":
        rows = inside.flatten().nonzero().squeeze(1)
        if len(rows) > MAX_ROWS:
            rows = rows[torch.randperm(len(rows), device=rows.device)[:MAX_ROWS]]
    terms = []
    for layer in activations:
        if seed is None:
            drawn = torch.randn_like(layer)
        else:
            drawn = torch.randn(layer.shape, generator=draw, device=layer.device, dtype=layer.dtype)
        if chosen["rows"] == "token":
            x, y = layer.flatten(0, 1)[rows], drawn.flatten(0, 1)[rows]
        else:
            within = inside.unsqueeze(-1)
            x, y = (layer * within).flatten(1), (drawn * within).flatten(1)
        terms.append(mmd(x, y, unbiased=chosen["unbiased"], bandwidth=chosen["bandwidth"]))
    return torch.stack(terms).mean()


def _labels(batch: Batch, partner: Batch, chosen: Knobs, scope: str) -> tuple[Tensor, Tensor]:
    """Return the labels of a batch, -100 outside the scope, and the scope as ones and zeros."""
    ids = batch["input_ids"]
    if scope == "answer":
        labels, inside = batch["labels"], batch["labels"] != IGNORE
    else:
        inside = ids != partner["input_ids"] if scope == "unequal" else torch.ones_like(ids).bool()
        if not chosen["pads"]:
            inside = inside & batch["attention_mask"].bool()
        labels = ids.masked_fill(~inside, IGNORE)
    if chosen["drop_token_zero"]:
        labels = labels.masked_fill(labels == 0, IGNORE)
    return labels, inside.long()


def _check_counts(bad: Tensor, kept: Tensor) -> None:
    counts = torch.stack([(labels[:, 1:] != IGNORE).sum() for labels in (bad, kept)])
    for name, count in zip(("harmful", "harmless"), processes.total(counts).tolist(), strict=True):
        if not count:
            raise KitError(f"no token of the {name} batch counts; look at its labels and the mask")


def _check_partners(harmful: Batch, harmless: Batch, chosen: Knobs) -> None:
    needed = ["input_ids", "attention_mask"]
    if "answer" in (chosen["mask"], chosen["retain_on"]):
        needed.append("labels")
    _check_keys("harmful", harmful, needed)
    _check_keys("harmless", harmless, needed)
    here, there = tuple(harmful["input_ids"].shape), tuple(harmless["input_ids"].shape)
    if here[0] != there[0]:
        raise KitError(f"{here[0]} harmful rows have {there[0]} harmless partners; give as many")
    if chosen["mask"] == "unequal" and here != there:
        raise KitError(
            f"a mask by unequal ids needs batches of one shape, not {here} and {there}; pad both "
            "to one width or use mask='answer'"
        )


def _check_keys(name: str, batch: Batch, needed: list[str]) -> None:
    if missing := [key for key in needed if key not in batch]:
        raise KitError(f"the {name} batch has no {missing[0]!r}; it needs {', '.join(needed)}")
