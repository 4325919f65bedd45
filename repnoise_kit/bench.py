"""A testbed with a store on disk, where each piece of work is done once: defended models first."""

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from repnoise_kit import (
    anatomy,
    attacks,
    baselines,
    checkpoints,
    controls,
    defences,
    evaluation,
    head,
    knobs,
    lora,
    losses,
    model,
    overlap,
    pairs,
    processes,
    recording,
    repnoise,
    scoring,
    security,
    splits,
    testbeds,
    trainer,
    training,
)
from repnoise_kit.anatomy import frozen
from repnoise_kit.attacks import attack_
from repnoise_kit.defences import LOSSES, NEED_A_MODEL, defend_
from repnoise_kit.errors import KitError
from repnoise_kit.model import load_model
from repnoise_kit.pairs import Pairs
from repnoise_kit.processes import check_alone
from repnoise_kit.results import Result
from repnoise_kit.security import guarded, restore_adapter_
from repnoise_kit.store import (
    cache_dir,
    code_of,
    fingerprint,
    is_whole,
    one_maker,
    seal,
    written_whole,
)
from repnoise_kit.tasks import Task
from repnoise_kit.testbeds import Testbed, told
from repnoise_kit.training import NotFiniteError
from repnoise_kit.world import oracle

_WEIGHTS = "model.safetensors"

# What the numbers depend on. Read now: a file that is edited while this process runs must not put
# its name on these results.
CODE = code_of(
    anatomy, attacks, baselines, checkpoints, controls, defences, evaluation, head, knobs, lora,
    losses, model, overlap, pairs, processes, recording, repnoise, scoring, security, splits,
    testbeds, trainer, training, oracle,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where cells are computed: a testbed, a store, and what stands for the code and the data."""

    bed: Testbed
    store: Path
    mark: str
    code: str

    @classmethod
    def of(cls, bed: Testbed, store: Path | str | None = None) -> "Bench":
        """Return the bench of a testbed; other data, other settings or other code make another.

        The store is a folder that processes and machines may share; by default `grid` in the kit's
        cache.
        """
        judges = {name: told(judge) for name, judge in bed.scorers.items()}
        tasks = [[name, *_texts(task)] for name, task in bed.tasks.items()]
        what = (bed.fingerprint(), bed.settings, judges, tasks, bed.groups)
        mark = fingerprint(*what, CODE, torch.__version__)
        where = Path(store or cache_dir() / "grid").absolute()
        return cls(bed, where, mark, fingerprint(CODE))

    def folder(self, kind: str, arguments: Any) -> Path:
        """Return where a piece of work lies, or will."""
        return self.store / kind / fingerprint(self.mark, kind, arguments)

    def keep(self, folder: Path, make: Callable[[Path], None]) -> Path:
        """Return the folder, after `make(folder)` if it is not there: by one process, once."""
        if is_whole(folder):
            return folder
        check_alone(folder)
        with one_maker(folder):
            if is_whole(folder):
                return folder
            if folder.exists():
                print(f"{folder} is damaged; it is made again", file=sys.stderr)
            for left in folder.parent.glob(f".{folder.name}-*"):  # by makers that were killed
                shutil.rmtree(left, ignore_errors=True)
            with written_whole(folder) as fresh:
                fresh.mkdir()
                make(fresh)
                seal(fresh)
        return folder

    def defended(
        self,
        method: str,
        seed: int,
        settings: dict[str, Any] | None = None,
        held: Sequence[int | str] = (),
        without: str | None = None,
    ) -> tuple[PreTrainedModel, Result]:
        """Return a fresh copy of the model that a method defends, and the curves of its training.

        Made once and kept, however many cells wait for it. `naive` is the model that never knew.

        Args:
            method: A name of `DEFENCES`, or `naive`.
            seed: Of the defence.
            settings: Changes to the testbed's.
            held: Parts that do not move while it trains, as `frozen` takes them.
            without: What the defence never sees, as `Testbed.withholding` takes it.
        """
        if method == "naive":
            return self._naive(), controls.noted()
        folder = self._defended(method, seed, settings or {}, held, without)
        return self._released(folder), Result.load(folder / "curves.parquet")

    def curves(
        self,
        method: str,
        seed: int,
        settings: dict[str, Any] | None = None,
        held: Sequence[int | str] = (),
    ) -> Result:
        """Return the curves of a defence's training alone, as `defended` does."""
        return Result.load(
            self._defended(method, seed, settings or {}, held, None) / "curves.parquet"
        )

    def _defended(
        self,
        method: str,
        seed: int,
        settings: dict[str, Any],
        held: Sequence[int | str],
        without: str | None,
    ) -> Path:
        """Return the folder of a defended model, after defending it now if it is not there."""
        check_held(method, held)

        def make(folder: Path) -> None:
            bed = self.bed if without is None else self.bed.withholding(without)
            fresh, extra = bed.model(), dict(settings)
            if method in NEED_A_MODEL:
                extra["like"] = self.defended("repnoise", seed)[0]
            kept = self.store / "unfinished"
            with frozen(fresh, held):
                curves = defend_(fresh, bed, method, seed=seed, checkpoints=kept, **extra)
            curves.save(folder / "curves.parquet")
            safetensors.torch.save_model(fresh, str(folder / _WEIGHTS))

        named = [method, seed, settings, *([list(held)] if held else [])]
        named += [{"without": without}] if without else []
        return self.keep(self.folder("defended", named), make)

    def attacked(self, method: str, seed: int, *, lr: float, examples: int) -> PreTrainedModel:
        """Return a fresh copy of a defended model after an attack; made once and kept."""

        def make(folder: Path) -> None:
            model, _ = self.defended(method, seed)
            self.attack_(model, lr=lr, examples=examples, seed=seed)
            safetensors.torch.save_model(model, str(folder / _WEIGHTS))

        return self._released(
            self.keep(self.folder("attacked-models", [method, seed, lr, examples]), make)
        )

    def attack_(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        examples: int,
        seed: int,
        pairs: Pairs | None = None,
    ) -> None:
        """Attack a model that bears its guard, if it has one; one that diverges is left as it was.

        It keeps its last good weights then, and is judged by them.
        """
        with guarded(model), suppress(NotFiniteError):
            attack_(model, self.bed, lr=lr, examples=examples, seed=seed, pairs=pairs)

    def _released(self, folder: Path) -> PreTrainedModel:
        released, weights = self.bed.model(), folder / _WEIGHTS
        restore_adapter_(released, weights)
        safetensors.torch.load_model(released, str(weights), device=str(released.device))
        return released

    def _naive(self) -> PreTrainedModel:
        if self.bed.naive is None:
            raise KitError(f"there is no naive model of {self.bed.name}, only of the lab")
        return load_model(self.bed.naive())


def _texts(task: Task) -> list[str]:
    return [table[["prompt", "answer"]].to_csv() for table in (task.train, task.test)]


def check_held(method: str, held: Sequence[int | str]) -> None:
    """Refuse to hold parts still while a method works that trains no weight of the model."""
    if held and method not in LOSSES:
        raise KitError(f"{method} does not train the model, so that no part can be held still")
