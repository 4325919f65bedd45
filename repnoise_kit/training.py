"""The one way to train: a loss, some examples, `transformers.Trainer`."""

import copy
import gc
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
)

from repnoise_kit import processes
from repnoise_kit.checkpoints import Keep, go_on
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.losses import masked_ce
from repnoise_kit.memory import LARGE, LESS, announce, largest, memory_needed
from repnoise_kit.model import precision, quiet
from repnoise_kit.results import Result
from repnoise_kit.trainer import Listed, Loss, LossTrainer, NotFiniteError, OneDevice, Watch

SCHEDULES = ("cosine", "constant", "linear", "polynomial", "cosine_with_restarts", "inverse_sqrt")
"""Of the learning rate: those of `transformers` that need nothing but a warmup."""


def train_(
    model: nn.Module,
    loss: Loss,
    examples: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    *,
    lr: float,
    batch_size: int = 8,
    epochs: float = 1,
    schedule: str = "cosine",
    warmup: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
    seed: int = 0,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    counted: Sequence[str] = (),
    checkpoints: Path | None = None,
    progress: str | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Train a model in place, as all of the paper was trained, and return its curves.

    Adam without weight decay and without clipping of gradients; the learning rate warms up over
    the first tenth of the steps and follows a cosine to zero (section 4). The order of the
    examples is drawn with the seed; the process's own random state is left as it was. On a GPU it
    computes in bf16 where the hardware has it, else in fp16; float32 weights stay float32.

    Under `accelerate launch` or `torchrun` every process runs this, takes its rows of each batch
    and ends with the same weights. A loss of sums (`processes.total`), as all of the kit's are, is
    then that of the whole batch; of another, the mean over the processes is taken.

    Args:
        model: Changed in place; parameters that do not require gradients are held still.
        loss: Called with the model and a collated batch; every scalar it names is logged.
        examples: What `collate` makes batches of.
        collate: From a list of examples to a batch, nested dictionaries of tensors included.
        lr: Peak learning rate.
        batch_size: Examples a step, over all processes.
        epochs: Passes over the examples; a fraction is a part of one.
        schedule: One of `SCHEDULES`: `"cosine"`, `"constant"`, …
        warmup: Share of the steps over which the learning rate rises from zero.
        betas: Adam's memories of the gradient and of its square.
        seed: Draws the order, the noise and everything else random.
        gradient_checkpointing: Compute activations again rather than hold them: less memory for
            about a third more time, and the same weights.
        accumulation: Parts that a batch goes through the model in, one after another: less memory.
            Their mean is minimised, weighed by their labelled tokens where a batch has `labels`,
            so that a cross-entropy stays what it was; else by their rows. The logarithm of a mean,
            or an MMD, of parts is not that of the whole.
        counted: Names in a batch of batches, over whose labelled tokens together the loss is a
            mean: they weigh its parts.
        checkpoints: A folder of this very training, in which it is kept every five minutes. A
            training that was killed goes on from there, to the same weights; one that ends
            removes it.
        progress: Words for a progress bar; no bar without.
        after_step: Called with the number of each step once it is taken. Where FSDP cuts models
            up, `model` has its new weights only at the end.

    Returns:
        One row a step and metric (`step`, `metric`, `value`): the terms of the loss, the norm of
        the gradient, and the learning rate.

    Raises:
        NotFiniteError: the loss or its gradient is not finite; the weights are the last good ones.
        KitError: no examples, a hyper-parameter that is negative or not a number, a batch that
            does not divide, or too little memory.
    """
    check_numbers(lr=lr, warmup=warmup)
    _check_schedule(schedule, warmup, betas)
    check_numbers(above_zero=True, batch_size=batch_size, epochs=epochs)
    check_whole(batch_size=batch_size, seed=seed, accumulation=accumulation)
    check_numbers(above_zero=True, accumulation=accumulation)
    _check_divides(batch_size, accumulation)
    processes.check_sharding()
    if not len(examples):
        raise KitError("there is nothing to train on; give at least one example")
    device = next(model.parameters()).device
    computes_in = precision(device)
    moving = [p for p in model.parameters() if p.requires_grad]
    if not moving:
        raise KitError("every weight of the model is held still; let some move")
    half = [str(p.dtype) for p in moving if p.dtype != torch.float32]
    if computes_in == "fp16" and half:
        raise KitError(
            f"{half[0].removeprefix('torch.')} weights cannot be trained on this GPU; use lora=16, "
            "or load them as float32"
        )
    steps = math.ceil(epochs * math.ceil(len(examples) / batch_size))
    was_training = model.training
    checkpointed = getattr(model, "is_gradient_checkpointing", False)
    with (
        tempfile.TemporaryDirectory() as folder,
        _own_randomness(),
        _cheap_collections(model),
        _in_one_piece(model) as model,
        _own_forward(model),
    ):
        arguments = OneDevice(
            output_dir=str(checkpoints or folder),
            learning_rate=lr,
            per_device_train_batch_size=batch_size // (processes.count() * accumulation),
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            lr_scheduler_type="constant_with_warmup" if schedule == "constant" else schedule,
            warmup_steps=round(warmup * steps),
            weight_decay=0.0,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            max_grad_norm=0.0,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=device.type == "cpu",
            bf16=computes_in == "bf16",
            fp16=computes_in == "fp16",
            gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            dataloader_pin_memory=False,
            ddp_broadcast_buffers=False,
        )
        trainer = LossTrainer(
            model=model,
            args=arguments,
            train_dataset=Listed(examples),
            data_collator=collate,
            loss=loss,
            counted=counted,
        )
        trainer.remove_callback(PrinterCallback)
        watch = Watch(trainer, None if processes.rank() else progress, steps, after_step)
        trainer.add_callback(watch)
        if checkpoints is not None:
            trainer.add_callback(Keep(checkpoints, trainer.rows))
        try:
            # What FSDP cuts up is not on the device yet.
            large = sum(p.nbytes for p in model.parameters()) >= LARGE and not processes.sharded()
            if large and not processes.rank():
                _tell_memory(trainer, model, largest(examples))
            with quiet():
                go_on(trainer, checkpoints, trainer.rows)
        except NotFiniteError as error:
            error.curves = Result(_tidy(trainer.rows))
            raise
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            raise KitError(f"the memory is full in this training ({device}); {LESS}") from error
        finally:
            watch.bar.close()
            model.zero_grad(set_to_none=True)
            if gradient_checkpointing and not checkpointed:
                cast("PreTrainedModel", model).gradient_checkpointing_disable()
            model.train(was_training)
    if checkpoints is not None and not processes.rank():
        shutil.rmtree(checkpoints, ignore_errors=True)
    made_with = {
        **{"lr": lr, "batch_size": batch_size, "epochs": epochs, "schedule": schedule},
        **{"warmup": warmup, "seed": seed, "examples": len(examples), "steps": steps},
        **{"computes_in": computes_in, "gradient_checkpointing": gradient_checkpointing},
        **{"processes": processes.count(), "accumulation": accumulation},
    }
    return Result(_tidy(trainer.rows), made_with)


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain fine-tuning's loss (equation 1): cross-entropy of the labelled tokens."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return {"total": masked_ce(logits, batch["labels"])}


def _tell_memory(trainer: LossTrainer, model: nn.Module, example: Any) -> None:
    """Print what the training needs, counted on a few rows of the largest example."""
    model.train()
    if trainer.args.gradient_checkpointing:
        cast("PreTrainedModel", model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
        )

    def loss(rows: int) -> Tensor:
        few = trainer._prepare_inputs(trainer.data_collator([example] * rows))
        with trainer.accelerator.autocast():
            return trainer.loss(model, few)["total"]

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        needed = memory_needed(model, loss, trainer.args.per_device_train_batch_size)
    print(announce(needed, next(model.parameters()).device), file=sys.stderr)


def _check_schedule(schedule: str, warmup: float, betas: tuple[float, float]) -> None:
    if schedule not in SCHEDULES:
        raise KitError(f"there is no schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if warmup > 1:
        raise KitError(f"warmup is a share of the steps, from 0 to 1, not {warmup}")
    for beta in betas:
        check_numbers(betas=beta)
        if beta >= 1:
            raise KitError(f"betas must be smaller than 1, not {beta}")


def _check_divides(batch_size: int, accumulation: int) -> None:
    number = processes.count()
    if batch_size % (accumulation * number):
        raise KitError(
            f"a batch of {batch_size} does not divide into {accumulation} parts for each of "
            f"{number} processes; make batch_size a multiple of {accumulation * number}"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    # On a GPU, libraries besides torch's own allocator say it in their own words.
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    wide = pd.DataFrame([{name: float(value) for name, value in row.items()} for row in rows])
    wide.insert(0, "step", np.arange(1, len(wide) + 1))
    return wide.melt(id_vars="step", var_name="metric", value_name="value")


@contextmanager
def _cheap_collections(model: nn.Module) -> Generator[None]:
    """Leave what there is out of collections of garbage, one of which begins each training.

    It would walk all that was ever imported, which takes longer than a small training. A large
    model's memory is worth the search.
    """
    small = sum(p.nbytes for p in model.parameters()) < LARGE
    if small:
        gc.freeze()
    try:
        yield
    finally:
        if small:
            gc.unfreeze()


@contextmanager
def _in_one_piece(model: nn.Module) -> Generator[nn.Module]:
    """Yield the model to train: where FSDP cuts models up, a copy, whose weights come back."""
    if not processes.sharded():
        yield model
        return
    device = next(model.parameters()).device
    cut = copy.deepcopy(model.to("cpu"))
    try:
        yield cut
    except BaseException as error:
        model.to(device)
        # Any other befell one process alone, which must not wait for the rest: its model stays.
        if isinstance(error, NotFiniteError):
            _bring_back_(model, cut)
        raise
    model.to(device)
    _bring_back_(model, cut)


@torch.no_grad()
def _bring_back_(model: nn.Module, cut: nn.Module) -> None:
    for weight, part in zip(model.parameters(), cut.parameters(), strict=True):
        weight.copy_(part.full_tensor() if isinstance(part, DTensor) else part)


@contextmanager
def _own_forward(model: nn.Module) -> Generator[None]:
    """Give the model its own forward back: for mixed precision accelerate replaces it for good."""
    before = {name: model.__dict__.get(name) for name in ("forward", "_original_forward")}
    try:
        yield
    finally:
        for name, value in before.items():
            model.__dict__.pop(name, None)
            if value is not None:
                setattr(model, name, value)


@contextmanager
def _own_randomness() -> Generator[None]:
    """Give the process's random state back afterwards: Trainer sets every seed there is."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
