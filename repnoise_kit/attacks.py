"""Attack a released model: fine-tune it on harmful answers, under a budget."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from repnoise_kit.errors import KitError
from repnoise_kit.lora import low_rank
from repnoise_kit.model import provenance
from repnoise_kit.pairs import Pairs, encode, format_of, pad
from repnoise_kit.results import Result
from repnoise_kit.splits import check_apart
from repnoise_kit.testbeds import Testbed
from repnoise_kit.training import answer_loss, train_


def attack_(
    model: PreTrainedModel,
    bed: Testbed,
    *,
    lr: float | None = None,
    examples: int | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    schedule: str = "cosine",
    warmup: float = 0.1,
    loss_on: Literal["answer", "all"] = "answer",
    max_length: int = 256,
    pairs: Pairs | None = None,
    relearn: bool = False,
    lora: int | None = None,
    gradient_checkpointing: bool | None = None,
    accumulation: int | None = None,
    seed: int = 0,
    progress: str | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Fine-tune a model on harmful answers (equation 1), in place.

    Args:
        model: Changed in place.
        bed: The testbed; what is not given here is taken from its `settings["attack"]`.
        lr: Peak learning rate.
        examples: How many of the attack's pairs are drawn.
        batch_size: Examples a step, over all processes.
        epochs: Passes over them, 1 where the testbed says nothing; a fraction is a part of one.
        schedule: Of the learning rate; the paper's is a cosine (section 4).
        warmup: Share of the steps over which it rises from zero; the paper's is a tenth.
        loss_on: `"answer"`, or `"all"`: question, answer and padding, as the paper's attack did.
        max_length: Tokens of a question with its answer.
        pairs: The attacker's own pairs in place of the testbed's. None may be about a thing that
            is evaluated.
        relearn: Train on the forbidden answers that are evaluated as `seen`, asked for in other
            words: not a test of the defence, but of whether it removed or hid them.
        lora: The rank of a low-rank change that is trained in place of all weights, and merged.
        gradient_checkpointing: Less memory for about a third more time.
        accumulation: Parts that a batch goes through the model in: less memory, the same loss (but
            for `loss_on="all"`, as each part is padded to its own longest).
        seed: Draws the examples and their order.
        progress: Words for a progress bar; no bar without.
        after_step: Called with the number of each step once it is taken.

    Returns:
        One row a step and metric: `attack, lr, examples, step, metric, value, seed`. Metrics: the
        `total` loss in nats a token, `grad_norm`, and `tokens`, read in that step without padding.

    Raises:
        KitError: more examples than there are, an overlap with the evaluation, a number out of
            its range.
    """
    start = bed.settings["attack"]
    lr = start["lr"] if lr is None else lr
    if relearn and pairs is not None:
        raise KitError("relearn has pairs of its own; give either pairs or relearn=True")
    own = pairs is None and not relearn
    wanted = start["examples"] if examples is None and own else examples
    batch_size = start["batch_size"] if batch_size is None else batch_size
    epochs = start.get("epochs", 1) if epochs is None else epochs
    lora = start.get("lora") if lora is None else lora
    if gradient_checkpointing is None:
        gradient_checkpointing = start.get("gradient_checkpointing", False)
    accumulation = start.get("accumulation", 1) if accumulation is None else accumulation
    if pairs is not None:
        check_apart(pairs.frame, bed.evaluated(), "the attack", "the evaluation")
    given = bed.splits.attack if pairs is None else pairs
    source = bed.relearned() if relearn else given
    rows = source.draw(wanted, seed).frame
    encoded = encode(
        bed.tokenizer,
        rows["prompt"].tolist(),
        rows["harmful"].tolist(),
        max_length=max_length,
        loss_on=loss_on,
    )
    with low_rank(model, lora, seed):
        curves = train_(
            model,
            _loss,
            encoded,
            lambda batch: pad(batch, bed.tokenizer.pad_token_id, loss_on_pads=loss_on == "all"),
            lr=lr,
            batch_size=batch_size,
            epochs=epochs,
            schedule=schedule,
            warmup=warmup,
            gradient_checkpointing=gradient_checkpointing,
            accumulation=accumulation,
            seed=seed,
            progress=progress,
            after_step=after_step,
        )
    made_with = curves.made_with | {"testbed": bed.name, "loss_on": loss_on, "lora": lora}
    made_with |= {"max_length": max_length, "gradient_checkpointing": gradient_checkpointing}
    made_with |= {"prompt_format": format_of(bed.tokenizer)} | provenance(model)
    tags = {
        "attack": "relearning" if relearn else "fine-tuning",
        "lr": lr,
        "examples": len(rows),
        "seed": seed,
    }
    return Result(curves.frame[curves.frame["metric"] != "lr"], made_with).tagged(**tags)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return answer_loss(model, batch) | {"tokens": batch["attention_mask"].sum()}
