"""Attack a released model: fine-tune it on harmful answers, under a budget."""

from typing import Literal

from transformers import PreTrainedModel

from repnoise_kit.model import provenance
from repnoise_kit.pairs import Pairs, encode, pad
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
    epochs: float = 1,
    loss_on: Literal["answer", "all"] = "answer",
    max_length: int = 256,
    pairs: Pairs | None = None,
    seed: int = 0,
    progress: str | None = None,
) -> Result:
    """Fine-tune all of a model on harmful answers (equation 1), in place.

    Args:
        model: Changed in place.
        bed: The testbed; what is not given here is taken from its `settings["attack"]`.
        lr: Peak learning rate; cosine, with a tenth of the steps as warm-up (section 4).
        examples: How many of the attack's pairs are drawn.
        batch_size: Examples a step.
        epochs: Passes over them.
        loss_on: `"answer"`, or `"all"`: question, answer and padding, as the paper's attack did.
        max_length: Tokens of a question with its answer.
        pairs: The attacker's own pairs in place of the testbed's. None may be about a thing that
            is evaluated.
        seed: Draws the examples and their order.
        progress: Words for a progress bar; no bar without.

    Returns:
        One row a step and metric: `attack, lr, examples, step, metric, value, seed`.

    Raises:
        KitError: more examples than there are, an overlap with the evaluation, a number out of
            its range.
    """
    start = bed.settings["attack"]
    lr = start["lr"] if lr is None else lr
    wanted = start["examples"] if examples is None and pairs is None else examples
    batch_size = start["batch_size"] if batch_size is None else batch_size
    if pairs is not None:
        check_apart(pairs.frame, bed.evaluated(), "the attack", "the evaluation")
    rows = (bed.splits.attack if pairs is None else pairs).draw(wanted, seed).frame
    encoded = encode(
        bed.tokenizer,
        rows["prompt"].tolist(),
        rows["harmful"].tolist(),
        max_length=max_length,
        loss_on=loss_on,
    )
    curves = train_(
        model,
        answer_loss,
        encoded,
        lambda batch: pad(batch, bed.tokenizer.pad_token_id, loss_on_pads=loss_on == "all"),
        lr=lr,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        progress=progress,
    )
    made_with = curves.made_with | {"testbed": bed.name, "loss_on": loss_on} | provenance(model)
    tags = {"attack": "fine-tuning", "lr": lr, "examples": len(rows), "seed": seed}
    return Result(curves.frame[curves.frame["metric"] != "lr"], made_with).tagged(**tags)
