"""Go on with a training that was killed: what has to be kept, and when it may be believed."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from repnoise_kit.steps import stop_asked
from repnoise_kit.store import written_whole

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
        if due and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs) -> None:
        """Add the curves, which make it whole, and drop the one before."""
        fresh = self.folder / f"checkpoint-{state.global_step}"
        plain = [{name: float(value) for name, value in row.items()} for row in self.rows]
        with written_whole(fresh / _ROWS) as file:
            file.write_text(json.dumps(plain))
        for other in self.folder.glob("checkpoint-*"):
            if other != fresh:
                shutil.rmtree(other, ignore_errors=True)
        self.last = time.monotonic()


def go_on(trainer: Trainer, folder: Path | None, rows: list[dict[str, Any]]) -> None:
    """Train to the end, from the last whole checkpoint in the folder if there is one."""
    whole = [] if folder is None else [path.parent for path in folder.glob(f"*/{_ROWS}")]
    last = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    if last is None:
        trainer.train()
        return
    rows += json.loads((last / _ROWS).read_text())
    trainer.train(resume_from_checkpoint=str(last))
