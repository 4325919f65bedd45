"""Go on with a training that was killed: what has to be kept, and when it may be believed."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from repnoise_kit import processes
from repnoise_kit.steps import stop_asked
from repnoise_kit.store import writing, written_whole

EVERY = 300.0
"""Seconds between two checkpoints: a killed training loses no more than these."""

_ROWS = "rows.json"


class Keep(TrainerCallback):
    """Let Trainer write a checkpoint every `EVERY` seconds, and keep the last whole one.

    Trainer's own files hold weights, optimizer, schedule and random state. The curves are written
    last: a checkpoint without them was cut off as it was written.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder, self.rows, self.last = folder, rows, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Ask for a checkpoint when it is time, or when the training is about to be stopped."""
        due = time.monotonic() - self.last >= EVERY or stop_asked()
        # All write or none: each has a random state of its own to keep, or a share of the weights.
        due = processes.any_says(due, args.device)
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """Add the curves, which make it whole, and drop the one before."""
        self.last = time.monotonic()
        processes.wait()
        if processes.rank():
            return
        fresh = self.folder / f"checkpoint-{state.global_step}"
        plain = [{name: float(value) for name, value in row.items()} for row in self.rows]
        with written_whole(fresh / _ROWS) as file:
            file.write_text(json.dumps(plain))
        for other in self.folder.glob("checkpoint-*"):
            if other != fresh:
                shutil.rmtree(other, ignore_errors=True)


def go_on(trainer: Trainer, folder: Path | None, rows: list[dict[str, Any]]) -> None:
    """Train to the end, from the last whole checkpoint in the folder if there is one.

    Raises:
        KitError: no checkpoint can be written to the folder.
    """
    if folder is None:
        trainer.train()
        return
    last = max(_whole(folder), key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is not None:
        rows += json.loads((last / _ROWS).read_text())
        _name_random_state(last)
    with writing(folder.parent, folder):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if processes.rank():
        return
    for path in _whole(folder):  # First of all, so that none is believed while it is removed.
        (path / _ROWS).unlink()


def _name_random_state(last: Path) -> None:
    """Let another number of processes go on: it is the first one's state that all draw from."""
    wanted = last / f"rng_state_{processes.rank()}.pth"
    if processes.count() == 1:
        wanted = last / "rng_state.pth"
    if not wanted.exists():
        shutil.copy(min(last.glob("rng_state*.pth")), wanted)


def _whole(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob(f"checkpoint-*/{_ROWS}")]
