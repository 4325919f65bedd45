"""Defend a model before its release: every method by name, all of one shape."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from repnoise_kit.errors import KitError
from repnoise_kit.model import provenance
from repnoise_kit.pairs import draw, encode, pad
from repnoise_kit.repnoise import repnoise_loss
from repnoise_kit.results import Result
from repnoise_kit.testbeds import Testbed
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
    **settings: Any,
) -> Result:
    """Defend a model in place and return the curves of its training.

    Args:
        model: Changed in place. To hold parts still, call this inside `frozen(model, parts)`.
        bed: The testbed; its `settings["defence"]` is what the method starts from.
        method: A name of `DEFENCES`.
        seed: Draws the pairs, their order and the noise.
        progress: Words for a progress bar; no bar without.
        settings: Changes to the testbed's settings: `alpha`, `beta`, `lr`, `examples` (None: all),
            `batch_size`, `epochs`, `max_length`, `preset`, and the knobs of `repnoise_loss`.

    Returns:
        One row a step and metric: `defence, step, metric, value, seed`.

    Raises:
        KitError: an unknown method or a setting out of its range.
    """
    if method not in DEFENCES:
        raise KitError(f"there is no defence {method!r}; there are {', '.join(DEFENCES)}")
    chosen = {**bed.settings["defence"], **settings}
    curves = DEFENCES[method](model, bed, seed=seed, progress=progress, **chosen)
    made_with = curves.made_with | {"method": method, "testbed": bed.name, "settings": chosen}
    made_with |= provenance(model)
    return Result(curves.frame, made_with).tagged(defence=method, seed=seed)


def repnoise_(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    seed: int = 0,
    progress: str | None = None,
    lr: float,
    examples: int | None,
    batch_size: int = 8,
    epochs: float = 1,
    max_length: int = 256,
    **loss: Any,
) -> Result:
    """RepNoise (section 3, Algorithm 1) on the testbed's defence pairs, shuffled as pairs.

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
    one_width = loss.get("preset") == "reference" or loss.get("mask") == "unequal"

    def collate(rows: list[tuple]) -> dict[str, Any]:
        columns = [list(column) for column in zip(*rows, strict=True)]
        least = max(len(row["input_ids"]) for row in columns[0] + columns[1]) if one_width else 0
        batches = [pad(column, bed.tokenizer.pad_token_id, least=least) for column in columns]
        return dict(zip(names, batches, strict=True))

    return train_(
        model,
        lambda inner, batch: repnoise_loss(inner, **batch, **loss)._asdict(),
        list(zip(*sides, strict=True)),
        collate,
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        progress=progress,
    )


DEFENCES: dict[str, Defence] = {"repnoise": repnoise_}
