"""The other losses of the paper's Table 1, of one shape with `repnoise_loss`.

Each takes a model and its batches (`input_ids`, `attention_mask`, `labels`, each (batch, seq),
padded on the right) and returns named scalars, of which `total` is minimised. Cross-entropies are
in nats a token, over labelled tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from repnoise_kit.anatomy import parts
from repnoise_kit.errors import check_numbers
from repnoise_kit.losses import masked_ce
from repnoise_kit.pairs import join
from repnoise_kit.processes import length
from repnoise_kit.recording import kept_whole, perturbed
from repnoise_kit.repnoise import Batch

Terms = dict[str, Tensor]


def safety_training(
    model: nn.Module, harmful: Batch, harmless: Batch, *, retain: Batch | None = None
) -> Terms:
    """Return the loss of additional safety training: cross-entropy of the refusals (Table 1).

    The harmful answers are not used. The paper does not state its learning rate.
    """
    term = _ce(model, *_kept(harmless, retain))
    return {"total": term, "retain": term}


def gradient_ascent(
    model: nn.Module, harmful: Batch, harmless: Batch, *, retain: Batch | None = None
) -> Terms:
    """Return minus the cross-entropy of the harmful answers (equation 3, the last layer only).

    Nothing else is held: neither the refusals nor a retain set is used, as in the paper's
    equation; its learning rate and length are not stated. `layerwise_ascent` is the form that
    reads every layer (Appendix J).
    """
    term = _ce(model, harmful)
    return {"total": -term, "ascent": term}


def adversarial_loss(
    model: nn.Module,
    harmful: Batch,
    harmless: Batch,
    *,
    retain: Batch | None = None,
    weight: float = 0.1,
) -> Terms:
    """Return the adversarial loss (equation 4): retain - weight · ascent, the last layer only.

    Args:
        model: A causal LM.
        harmful: The questions with their harmful answers.
        harmless: The same questions with their refusals.
        retain: Everyday questions and answers, which join the retain term; the paper has none.
        weight: Of the ascent term. The paper does not state it; 0.1 is the default of its code.
    """
    check_numbers(weight=weight)
    kept, ascent = _ce(model, *_kept(harmless, retain)), _ce(model, harmful)
    return {"total": kept - weight * ascent, "retain": kept, "ascent": ascent}


def vaccine(
    model: Any,
    harmful: Batch,
    harmless: Batch,
    *,
    retain: Batch | None = None,
    rho: float = 1.0,
) -> Terms:
    """Return Vaccine's loss (Huang et al., 2024): the refusals, under the worst small drift.

    The output of every layer's attention is moved along the gradient of the loss by `rho` in all
    (the norm over the batch and all layers), and the loss of the moved model is minimised; the
    harmful answers are not used. The paper runs it with `rho` 1 and 10 and states nothing else.

    Args:
        model: A causal LM.
        harmful: Not used.
        harmless: Questions with their refusals.
        retain: Everyday questions and answers, which are trained on in the same way.
        rho: Length of the drift, in units of the activations.

    The pass under the drift is taken without gradient checkpointing.
    """
    check_numbers(rho=rho)
    batch = join(_kept(harmless, retain))
    # Slopes are taken of a drift of 0, so that there are some under held parts too.
    inner = getattr(model, "module", model)
    shape = (*batch["input_ids"].shape, inner.config.get_text_config().hidden_size)
    weight = inner.get_input_embeddings().weight
    zeros = [
        torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
        for _ in parts(model).layers
    ]
    with perturbed(model, "attention", dict(enumerate(zeros))):
        still = _ce(model, batch)
    slopes = torch.autograd.grad(still, zeros)
    far = length(slopes)
    drift = {layer: rho * slope / (far + 1e-12) for layer, slope in enumerate(slopes)}
    with perturbed(model, "attention", drift), kept_whole(inner):
        moved = _ce(model, batch)
    return {"total": moved, "retain": still.detach()}


def _kept(harmless: Batch, retain: Batch | None) -> list[Batch]:
    return [harmless] if retain is None else [harmless, retain]


def _ce(model: nn.Module, *batches: Batch) -> Tensor:
    batch = join(batches)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return masked_ce(logits, batch["labels"])
