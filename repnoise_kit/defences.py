"""Defend a model before its release: every method by name, all of one shape."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from repnoise_kit import (
    baselines,
    controls,
    head,
    knobs,
    losses,
    processes,
    repnoise,
    trainer,
    training,
)
from repnoise_kit.errors import KitError
from repnoise_kit.knobs import Knobs
from repnoise_kit.lora import low_rank
from repnoise_kit.model import provenance
from repnoise_kit.pairs import draw, encode, format_of, pad
from repnoise_kit.repnoise import repnoise_loss
from repnoise_kit.results import Result
from repnoise_kit.security import security_vectors_
from repnoise_kit.store import check_writable, code_of, fingerprint
from repnoise_kit.testbeds import Testbed, checksums
from repnoise_kit.training import train_

Defence = Callable[..., Result]
"""`(model, bed, *, seed, progress, **settings)`: changes the model, returns its curves."""


def defend_(
    model: PreTrainedModel,
    bed: Testbed,
    method: str = "repnoise",
    *,
    seed: int = 0,
    progress: str | None = None,
    checkpoints: Path | str | None = None,
    **settings: Any,
) -> Result:
    """Defend a model in place and return the curves of its training.

    Args:
        model: Changed in place. To hold parts still while a method trains, call this inside
            `frozen(model, parts)`; the controls, which train nothing, change all of it.
        bed: The testbed; its `settings["defence"]`, and after it `settings[method]`, are what the
            method starts from.
        method: A name of `DEFENCES`.
        seed: Draws the pairs, their order and the noise.
        progress: Words for a progress bar; no bar without.
        checkpoints: A folder in which a long training is kept every five minutes: the same call,
            after whatever killed it, goes on from there to the same weights.
        settings: Changes to the testbed's settings: `lr`, `examples` (None: all), `batch_size`,
            `epochs`, `max_length`, `gradient_checkpointing`, `accumulation` (parts that a batch
            goes through the model in; the loss is the mean of theirs), `lora` (the rank of a
            low-rank change that is trained in place of all weights, and merged), and what the
            loss takes: `alpha`, `beta`, `preset` and the knobs of `repnoise_loss`, `weight` of
            `adversarial_loss`, `rho` of `vaccine`, `rank` of `security_vectors`. The two kinds of
            weight noise take `like`, the defended model whose change they match; by default one
            that RepNoise defends with this seed.

    Returns:
        One row a step and metric: `defence, step, metric, value, seed`.

    Raises:
        KitError: an unknown method, a setting it does not take, or one out of its range.
    """
    if method not in DEFENCES:
        raise KitError(f"there is no defence {method!r}; there are {', '.join(DEFENCES)}")
    taken = _settings_of(method)
    if unknown := sorted(set(settings) - taken):
        listed = ", ".join(sorted(taken)) or "none"
        raise KitError(f"{method} has no setting {unknown[0]!r}; its settings: {listed}")
    start = {**bed.settings["defence"], **bed.settings.get(method, {})}
    chosen = {name: value for name, value in start.items() if name in taken} | settings
    if method in NEED_A_MODEL and "like" not in chosen:
        chosen["like"] = bed.model()
        defend_(chosen["like"], bed, seed=seed, progress=progress, checkpoints=checkpoints)
    kept = {}
    if checkpoints is not None and method in LOSSES:
        moving = [name for name, weight in model.named_parameters() if weight.requires_grad]
        named = (method, seed, chosen, bed.fingerprint(), checksums(model), moving)
        check_writable(Path(checkpoints))
        code = code_of(repnoise, baselines, head, knobs, losses, processes, trainer, training)
        kept["checkpoints"] = Path(checkpoints) / fingerprint(*named, code, torch.__version__)
    curves = DEFENCES[method](model, bed, seed=seed, progress=progress, **chosen, **kept)
    noted = {name: value for name, value in chosen.items() if name != "like"}
    made_with = curves.made_with | {"method": method, "testbed": bed.name, "settings": noted}
    made_with |= {"prompt_format": format_of(bed.tokenizer)} | provenance(model)
    return Result(curves.frame, made_with).tagged(defence=method, seed=seed)


def _train_on_pairs(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    loss: Callable[..., Any],
    seed: int,
    progress: str | None,
    lr: float,
    examples: int | None,
    batch_size: int = 8,
    epochs: float = 1,
    max_length: int = 256,
    lora: int | None = None,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    checkpoints: Path | None = None,
    **weights: Any,
) -> Result:
    """Train with a loss of harmful, harmless and retain batches, on pairs shuffled as pairs.

    The retain set, where the testbed has one, gives each pair an everyday question and answer.
    """
    pairs = bed.splits.defence.draw(examples, seed).frame
    parts = [(pairs["prompt"], pairs["harmful"]), (pairs["prompt"], pairs["harmless"])]
    names = ["harmful", "harmless"]
    if bed.retain is not None:
        rounds = -(-len(pairs) // len(bed.retain))
        everyday = draw(bed.retain.loc[bed.retain.index.repeat(rounds)], len(pairs), seed)
        parts.append((everyday["prompt"], everyday["answer"]))
        names.append("retain")
    sides = [
        encode(bed.tokenizer, prompts.tolist(), answers.tolist(), max_length=max_length)
        for prompts, answers in parts
    ]
    # The published mask compares ids place by place, so both sides of a pair get one width.
    one_width = weights.get("preset") == "reference" or weights.get("mask") == "unequal"

    def collate(rows: list[tuple]) -> dict[str, Any]:
        columns = [list(column) for column in zip(*rows, strict=True)]
        least = max(len(row["input_ids"]) for row in columns[0] + columns[1]) if one_width else 0
        batches = [pad(column, bed.tokenizer.pad_token_id, least=least) for column in columns]
        return dict(zip(names, batches, strict=True))

    def terms(inner: Any, batch: dict[str, Any]) -> dict[str, Any]:
        found = loss(inner, **batch, **weights)
        return found if isinstance(found, dict) else found._asdict()

    with low_rank(model, lora, seed):
        return train_(
            model,
            terms,
            list(zip(*sides, strict=True)),
            collate,
            lr=lr,
            batch_size=batch_size,
            epochs=epochs,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            accumulation=accumulation,
            counted=_COUNTED.get(loss, ()),
            checkpoints=checkpoints,
            progress=progress,
        )


LOSSES: dict[str, Callable[..., Any]] = {
    "safety_training": baselines.safety_training,
    "gradient_ascent": baselines.gradient_ascent,
    "adversarial_loss": baselines.adversarial_loss,
    "vaccine": baselines.vaccine,
    "layerwise_ascent": partial(repnoise_loss, beta=0.0),
    "noise_only": partial(repnoise_loss, alpha=0.0),
    "repnoise": repnoise_loss,
    "repnoise_tokenwise": partial(repnoise_loss, preset="tokenwise"),
}
"""The defences that are a loss on pairs: three of Table 1, Vaccine, RepNoise and its parts."""

# Cross-entropies: in parts they stay what they are of the whole batch.
_COUNTED = {
    baselines.safety_training: ("harmless", "retain"),
    baselines.gradient_ascent: ("harmful",),
}

DEFENCES: dict[str, Defence] = {
    "none": controls.untouched_,
    "random": controls.random_,
    "security_vectors": security_vectors_,
    **{name: partial(_train_on_pairs, loss=loss) for name, loss in LOSSES.items()},
    "weight_noise": controls.weight_noise_,
    "weight_noise_matched": controls.weight_noise_matched_,
}

NEED_A_MODEL = ("weight_noise", "weight_noise_matched")
"""The controls that need the model RepNoise defends, to be as far from the base, or as useful."""


def able(bed: Testbed, names: Sequence[str] | None = None) -> list[str]:
    """Return these defences, RepNoise first and those made like it last; by default all there are.

    Raises:
        KitError: an unknown name, or one that the testbed cannot do; by default that is left out.
    """
    for name in names or ():
        if name not in DEFENCES:
            raise KitError(f"there is no defence {name!r}; there are {', '.join(DEFENCES)}")
    if bed.everyday is None and "weight_noise_matched" in (names or ()):
        raise KitError(controls.NO_UTILITY)
    chosen = list(names or DEFENCES)
    if bed.everyday is None and names is None:
        chosen.remove("weight_noise_matched")
    return sorted(chosen, key=lambda name: (name != "repnoise", name in NEED_A_MODEL))


def _settings_of(method: str) -> set[str]:
    """Return what a method takes, beside the model, the testbed, the seed and the bar's words."""
    loss = LOSSES.get(method, lambda: None)
    taken = {*inspect.signature(DEFENCES[method]).parameters, *inspect.signature(loss).parameters}
    # What an ablation fixes is not to be chosen.
    taken -= set(getattr(loss, "keywords", {}))
    if "knobs" in taken:
        taken |= set(Knobs.__annotations__)
    apart = ("model", "bed", "seed", "progress", "checkpoints", "loss", "weights", "knobs")
    return taken - {*apart, "harmful", "harmless", "retain"}
