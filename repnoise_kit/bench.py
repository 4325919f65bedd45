"""A testbed with a store on disk, where each piece of work is done once: defended models first."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from repnoise_kit import (
    attacks,
    baselines,
    controls,
    defences,
    evaluation,
    losses,
    model,
    pairs,
    recording,
    repnoise,
    scoring,
    security,
    splits,
    testbeds,
    training,
)
from repnoise_kit.defences import NEED_A_MODEL, defend_
from repnoise_kit.errors import KitError
from repnoise_kit.model import load_model
from repnoise_kit.results import Result
from repnoise_kit.security import restore_adapter_
from repnoise_kit.store import (
    cache_dir,
    code_of,
    fingerprint,
    is_whole,
    one_maker,
    seal,
    written_whole,
)
from repnoise_kit.testbeds import Testbed
from repnoise_kit.world import oracle

# What the numbers depend on. Read now: a file that is edited while this process runs must not put
# its name on these results.
CODE = code_of(
    attacks, baselines, controls, defences, evaluation, losses, model, pairs, recording, repnoise,
    scoring, security, splits, testbeds, training, oracle,
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
        mark = fingerprint(bed.fingerprint(), bed.settings, CODE, torch.__version__)
        where = Path(store or cache_dir() / "grid").absolute()
        return cls(bed, where, mark, fingerprint(CODE))

    def folder(self, kind: str, arguments: Any) -> Path:
        """Return where a piece of work lies, or will."""
        return self.store / kind / fingerprint(self.mark, kind, arguments)

    def keep(self, folder: Path, make: Callable[[Path], None]) -> Path:
        """Return the folder, after `make(folder)` if it is not there: by one process, once."""
        if is_whole(folder):
            return folder
        with one_maker(folder):
            if is_whole(folder):
                return folder
            if folder.exists():
                print(f"{folder} is damaged; it is made again", file=sys.stderr)
            with written_whole(folder) as fresh:
                fresh.mkdir()
                make(fresh)
                seal(fresh)
        return folder

    def defended(
        self, method: str, seed: int, settings: dict[str, Any] | None = None
    ) -> tuple[PreTrainedModel, Result]:
        """Return a fresh copy of the model that a method defends, and the curves of its training.

        Made once and kept, however many cells wait for it. `naive` is the model that never knew.
        """
        if method == "naive":
            return self._naive(), controls.noted()
        settings = settings or {}

        def make(folder: Path) -> None:
            fresh = self.bed.model()
            like = {"like": self.defended("repnoise", seed)[0]} if method in NEED_A_MODEL else {}
            curves = defend_(fresh, self.bed, method, seed=seed, **settings, **like)
            curves.save(folder / "curves.parquet")
            safetensors.torch.save_model(fresh, str(folder / "model.safetensors"))

        folder = self.keep(self.folder("defended", [method, seed, settings]), make)
        released = self.bed.model()
        weights = folder / "model.safetensors"
        restore_adapter_(released, weights)
        safetensors.torch.load_model(released, str(weights), device=str(released.device))
        return released, Result.load(folder / "curves.parquet")

    def _naive(self) -> PreTrainedModel:
        if self.bed.naive is None:
            raise KitError(f"there is no naive model of {self.bed.name}, only of the lab")
        return load_model(self.bed.naive())
