"""`transformers.Trainer` with any loss: parts of a batch weighed, what is not finite refused."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from repnoise_kit import processes
from repnoise_kit.errors import KitError
from repnoise_kit.losses import IGNORE
from repnoise_kit.memory import LARGE
from repnoise_kit.results import Result
from repnoise_kit.steps import check, taken

Loss = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""From a model and a batch to named scalars, of which `total` is the one that is minimised."""


class NotFiniteError(KitError):
    """A loss or a gradient became infinite or NaN; the model holds the last good weights.

    One of 256 MB and more holds those of the last step, which may be what went wrong.
    """

    curves: Result
    """What was logged until then."""


class Listed(torch.utils.data.Dataset):
    """A list as the dataset Trainer asks for."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class OneDevice(TrainingArguments):
    """Arguments of a training on one device a process, however many the machine has."""

    @property
    def n_gpu(self) -> int:
        """Else Trainer would spread a batch over all GPUs, and each overwrite what is recorded."""
        return min(1, super().n_gpu)


class LossTrainer(Trainer):
    """Trainer with any loss: each step's terms go to `rows`."""

    rows: list[dict[str, Any]]
    good: dict[Tensor, Tensor]
    last: Any
    weights: list[float]
    """Of the parts of the step that are still to come."""
    # The loss is a mean over the batch: without these two (the first needs transformers 5.19, the
    # second serves older ones) gradient accumulation would multiply it by the number of parts.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, loss: Loss, counted: Sequence[str], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.loss, self.counted = loss, counted
        self.rows, self.good = [], {}
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader:
        """Give each process all rows, of which it takes its own: so they are padded alike."""
        loader = DataLoader(
            cast("Listed", self.train_dataset),
            batch_size=self.args.per_device_train_batch_size * processes.count(),
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            use_seedable_sampler=True,
        )

    def get_batch_samples(self, *args, **kwargs):
        """Weigh the parts of a step, so that together they weigh 1."""
        parts, counted = super().get_batch_samples(*args, **kwargs)
        sizes = [1.0] if len(parts) == 1 else [_size(part, self.counted) for part in parts]
        if not sum(sizes):
            raise KitError("a whole batch has no token to learn; leave out such examples")
        # Those without weight first: the last part is the one at which processes meet.
        order = sorted(range(len(parts)), key=lambda at: sizes[at] > 0)
        self.weights = [sizes[at] / sum(sizes) for at in order]
        self.rows.append({})
        return [parts[at] for at in order], counted

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Note the terms, and return what the step's gradient is taken of."""
        weight, row = self.weights.pop(0), self.rows[-1]
        if not weight:  # Nothing to learn, and a mean over nothing is not a number.
            loss = torch.zeros((), device=self.args.device, requires_grad=True)
            return (loss, None) if return_outputs else loss
        loss, terms = self._compute(model, inputs)
        for name, term in terms.items():
            weighed = term * weight if term.is_floating_point() else term
            row[name] = row.get(name, 0) + weighed
        if not torch.isfinite(terms["total"]):
            self._take_back_what_spoiled(model)
        kept = bool(self.good) or len(self.rows) == 1
        _require_finite(terms["total"], "loss", len(self.rows), kept=kept)
        self.last = inputs
        # Trainer divides by the number of parts.
        loss = loss * (weight * self.current_gradient_accumulation_steps)
        return (loss, None) if return_outputs else loss

    def _compute(self, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this process's loss, with its slope, and the terms of the whole batch."""
        # The head is run by the loss too, outside of the model's own forward.
        with self.accelerator.autocast(), processes.sharing(inputs) as own:
            terms = self.loss(model, own)
            return processes.working(terms["total"]), processes.agreed(terms)

    @torch.no_grad()
    def _take_back_what_spoiled(self, model) -> None:
        """Undo the last update if the batch before it, which went well, no longer does."""
        if self.good and not torch.isfinite(self._compute(model, self.last)[1]["total"]):
            for weight, good in self.good.items():
                weight.copy_(good)


class Watch(TrainerCallback):
    """Note each step's gradient and learning rate, refuse what is not finite, move the bar."""

    def __init__(
        self,
        trainer: LossTrainer,
        progress: str | None,
        steps: int,
        after_step: Callable[[int], None] | None,
    ) -> None:
        self.trainer, self.after_step = trainer, after_step
        self.bar = tqdm(
            desc=progress, total=steps, leave=False, mininterval=0.5, disable=progress is None
        )

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Note the gradient; keep the weights that are still good."""
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        if scaler is not None:  # fp16: the scaler leaves out steps until its scale fits.
            norm = norm / scaler.get_scale()
            if scaler.get_scale() > 1 and not torch.isfinite(norm):
                norm = torch.zeros_like(norm)
        # Before the optimizer's step, so that what it would spoil is still good.
        _require_finite(norm, "gradient", len(self.trainer.rows))
        moving = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if sum(p.nbytes for p in moving) < LARGE:  # Of more there is no room for a copy.
            self.trainer.good.clear()  # First, so that there are never two.
            self.trainer.good.update({p: p.detach().clone() for p in moving})
        self.trainer.rows[-1] |= {
            "grad_norm": norm,
            "lr": kwargs["optimizer"].param_groups[0]["lr"],
        }

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Stop here if somebody asked for it."""
        check()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move the bar, and tell who listens."""
        self.bar.update()
        taken(state.global_step, state.max_steps, self.trainer.rows[-1])
        if self.after_step is not None:
            self.after_step(state.global_step)


def _require_finite(value: Tensor, what: str, step: int, *, kept: bool = True) -> None:
    if torch.isfinite(value):
        return
    weights = (
        "the model keeps the weights from before it went wrong"
        if kept
        else "the step before may have spoiled it, and there is no copy from before: load it again"
    )
    raise NotFiniteError(
        f"the {what} became {value.item()} at step {step}; {weights}, and use a smaller learning "
        "rate or smaller weights of the terms"
    )


def _size(part: Any, counted: Sequence[str]) -> int:
    """Return how many labelled tokens a part of a batch has; where it has no labels, its rows."""
    sides = [part[name] for name in counted if name in part] if counted else [part]
    if any(not isinstance(side, Mapping) or "labels" not in side for side in sides):
        return processes.rows_of(part)
    return sum(int((side["labels"][:, 1:] != IGNORE).sum()) for side in sides)
