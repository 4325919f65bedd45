"""The one way to train: a loss, some examples, `transformers.Trainer`."""

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
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from repnoise_kit.checkpoints import Keep, go_on
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.losses import masked_ce
from repnoise_kit.memory import LARGE, LESS, announce, largest, memory_needed
from repnoise_kit.model import precision, quiet
from repnoise_kit.results import Result
from repnoise_kit.steps import check, taken

Loss = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""From a model and a batch to named scalars, of which `total` is the one that is minimised."""


class NotFiniteError(KitError):
    """A loss or a gradient became infinite or NaN; the model holds the last good weights."""

    curves: Result
    """What was logged until then."""


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
    checkpoints: Path | None = None,
    progress: str | None = None,
    after_step: Callable[[int], None] | None = None,
) -> Result:
    """Train a model in place, as all of the paper was trained, and return its curves.

    Adam without weight decay and without clipping of gradients; the learning rate warms up over
    the first tenth of the steps and follows a cosine to zero (section 4). The order of the
    examples is drawn with the seed; the process's own random state is left as it was. On a GPU it
    computes in bf16 where the hardware has it, else in fp16; float32 weights stay float32.

    Args:
        model: Changed in place; parameters that do not require gradients are held still.
        loss: Called with the model and a collated batch; every scalar it names is logged.
        examples: What `collate` makes batches of.
        collate: From a list of examples to a batch, nested dictionaries of tensors included.
        lr: Peak learning rate.
        batch_size: Examples a step.
        epochs: Passes over the examples; a fraction is a part of one.
        schedule: `"cosine"`, `"constant"` or another name that `transformers` knows.
        warmup: Share of the steps over which the learning rate rises from zero.
        betas: Adam's memories of the gradient and of its square.
        seed: Draws the order, the noise and everything else random.
        gradient_checkpointing: Compute activations again rather than hold them: less memory for
            about a third more time, and the same weights.
        checkpoints: A folder of this very training, in which it is kept every five minutes. A
            training that was killed goes on from there, to the same weights; one that ends
            removes it.
        progress: Words for a progress bar; no bar without.
        after_step: Called with the number of each step once it is taken.

    Returns:
        One row a step and metric (`step`, `metric`, `value`): the terms of the loss, the norm of
        the gradient, and the learning rate.

    Raises:
        NotFiniteError: the loss or its gradient is not finite; the weights are the last good ones.
        KitError: no examples, a hyper-parameter that is negative or not a number, or too little
            memory.
    """
    check_numbers(lr=lr, warmup=warmup)
    for beta in betas:
        check_numbers(betas=beta)
    check_numbers(above_zero=True, batch_size=batch_size, epochs=epochs)
    check_whole(batch_size=batch_size, seed=seed)
    if not len(examples):
        raise KitError("there is nothing to train on; give at least one example")
    device = next(model.parameters()).device
    computes_in = precision(device)
    if computes_in == "fp16" and any(_is_half(p) for p in model.parameters() if p.requires_grad):
        raise KitError("float16 weights cannot be trained; use lora=16, or load them as float32")
    steps = math.ceil(epochs * math.ceil(len(examples) / batch_size))
    was_training = model.training
    with tempfile.TemporaryDirectory() as folder, _own_randomness():
        arguments = TrainingArguments(
            output_dir=str(checkpoints or folder),
            learning_rate=lr,
            per_device_train_batch_size=batch_size,
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
        )
        trainer = _LossTrainer(
            model=model, args=arguments, train_dataset=_Listed(examples), data_collator=collate
        )
        trainer.loss = loss
        trainer.rows, trainer.good = [], {}
        trainer.remove_callback(PrinterCallback)
        watch = _Watch(trainer, progress, steps, after_step)
        trainer.add_callback(watch)
        if checkpoints is not None:
            trainer.add_callback(Keep(checkpoints, trainer.rows))
        try:
            if sum(p.nbytes for p in model.parameters()) >= LARGE:
                _tell_memory(trainer, model, collate([largest(examples)]))
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
            if gradient_checkpointing:
                cast("PreTrainedModel", model).gradient_checkpointing_disable()
            model.train(was_training)
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    made_with = {
        **{"lr": lr, "batch_size": batch_size, "epochs": epochs, "schedule": schedule},
        **{"warmup": warmup, "seed": seed, "examples": len(examples), "steps": steps},
        **{"computes_in": computes_in, "gradient_checkpointing": gradient_checkpointing},
    }
    return Result(_tidy(trainer.rows), made_with)


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return plain fine-tuning's loss (equation 1): cross-entropy of the labelled tokens."""
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return {"total": masked_ce(logits, batch["labels"])}


class _Listed(torch.utils.data.Dataset):
    """A list as the dataset Trainer asks for."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class _LossTrainer(Trainer):
    """Trainer with any loss: each step's terms go to `rows`."""

    loss: Loss
    rows: list[dict[str, Any]]
    good: dict[Tensor, Tensor]
    last: Any
    # The loss is a mean over the batch: without these two (the first needs transformers 5.19, the
    # second serves older ones) gradient accumulation would multiply it by the number of parts.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        terms = self.loss(model, inputs)
        self.rows.append({name: term.detach() for name, term in terms.items()})
        if not torch.isfinite(terms["total"]):
            self._take_back_what_spoiled(model)
        _require_finite(terms["total"], "loss", len(self.rows))
        self.last = inputs
        return (terms["total"], None) if return_outputs else terms["total"]

    @torch.no_grad()
    def _take_back_what_spoiled(self, model) -> None:
        """Undo the last update if the batch before it, which went well, no longer does."""
        if self.good and not torch.isfinite(self.loss(model, self.last)["total"]):
            for weight, good in self.good.items():
                weight.copy_(good)


class _Watch(TrainerCallback):
    """Note each step's gradient and learning rate, refuse what is not finite, move the bar."""

    def __init__(
        self,
        trainer: _LossTrainer,
        progress: str | None,
        steps: int,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.trainer, self.after_step = trainer, after_step
        self.bar = tqdm(
            desc=progress, total=steps, leave=False, mininterval=0.5, disable=progress is None
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None:  # fp16: the scaler leaves out steps until its scale fits.
            norm = norm / scaler.get_scale()
            if scaler.get_scale() > 1 and not torch.isfinite(norm):
                norm = torch.zeros_like(norm)
        # Before the optimizer's step, so that what it would spoil is still good.
        _require_finite(norm, "gradient", len(self.trainer.rows))
        moving = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if sum(p.nbytes for p in moving) < LARGE:  # Of more there is no room for a copy.
            self.trainer.good = {p: p.detach().clone() for p in moving}
        self.trainer.rows[-1] |= {
            "grad_norm": norm,
            "lr": kwargs["optimizer"].param_groups[0]["lr"],
        }

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        check()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()
        taken(state.global_step, state.max_steps, self.trainer.rows[-1])
        if self.after_step is not None:
            self.after_step(state.global_step)


def _require_finite(value: Tensor, what: str, step: int) -> None:
    if not torch.isfinite(value):
        raise NotFiniteError(
            f"the {what} became {value.item()} at step {step}; the model keeps the weights from "
            "before it went wrong: use a smaller learning rate or smaller weights of the terms"
        )


def _tell_memory(trainer: _LossTrainer, model: nn.Module, few: Any) -> None:
    """Print what the training needs, counted on one example."""
    model.train()
    if trainer.args.gradient_checkpointing:
        cast("PreTrainedModel", model).gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
        )
    few, rows = trainer._prepare_inputs(few), trainer.args.per_device_train_batch_size
    with trainer.compute_loss_context_manager(), torch.random.fork_rng():
        needed = memory_needed(model, lambda: trainer.loss(model, few)["total"], rows)
    print(announce(needed, next(model.parameters()).device), file=sys.stderr)


def _is_half(weight: Tensor) -> bool:
    return weight.dtype == torch.float16


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    wide = pd.DataFrame([{name: float(value) for name, value in row.items()} for row in rows])
    wide.insert(0, "step", np.arange(1, len(wide) + 1))
    return wide.melt(id_vars="step", var_name="metric", value_name="value")


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
