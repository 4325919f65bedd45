"""Grids: a cell is a pure function of its arguments, its result a file named by their fingerprint.

A cell that has its file is never run again, a lock keeps two workers off one cell, and a file is
written whole or not at all. So to go on after any interruption is to run the same thing again.
"""

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm.auto import tqdm

from repnoise_kit.bench import CODE, Bench
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.steps import check
from repnoise_kit.store import code_of, fingerprint, is_whole

DEATHS = 3
"""So many times in a row may workers die without a cell being finished."""


@functools.cache
def _code(module: str) -> str:
    return fingerprint(code_of(sys.modules[module]))


@dataclass(frozen=True)
class Cell:
    """One piece of work: `function(bench, **arguments)`, which returns a `Result`."""

    function: FunctionType
    arguments: dict[str, Any]
    code: str = field(init=False)

    def __post_init__(self) -> None:
        """Note the code of the function's module as it is now, not as a worker may find it."""
        object.__setattr__(self, "code", _code(self.function.__module__))

    def folder(self, bench: Bench) -> Path:
        """Return where the result lies, or will."""
        return bench.folder(self.function.__name__, [self.arguments, self.code])

    def compute(self, bench: Bench) -> Path:
        """Return where the result lies, after computing it now if it is not there."""

        def make(folder: Path) -> None:
            self.function(bench, **self.arguments).save(folder / "rows.parquet")

        return bench.keep(self.folder(bench), make)


def run(
    cells: Sequence[Cell],
    bench: Bench,
    *,
    workers: int = 1,
    scheduler: str | None = None,
    progress: str | None = None,
) -> list[Result]:
    """Compute what is missing of a grid and return the result of each cell, in order.

    Args:
        cells: The grid.
        bench: Testbed and store. Several processes, commands and machines may share a store.
        workers: Processes. More than one runs each with one thread.
        scheduler: Address of a Dask scheduler, in place of processes of this machine; its workers
            must see the store under the same path.
        progress: Words for a bar of cells done, with the time left; no bar without.

    Raises:
        KitError: a worker process dies again and again, or no scheduler answers or has workers.
    """
    done = {place for place, cell in enumerate(cells) if is_whole(cell.folder(bench))}
    bar = tqdm(
        desc=progress, total=len(cells), initial=len(done), unit="cell", mininterval=0.5,
        disable=progress is None,
    )  # fmt: skip
    fruitless = 0
    with bar:
        while missing := [place for place in range(len(cells)) if place not in done]:
            before = len(done)
            try:
                for place in _computed(cells, missing, bench, workers, scheduler):
                    done.add(place)
                    bar.update()
            except TerminatedWorkerError as error:
                fruitless = 0 if len(done) > before else fruitless + 1
                if fruitless == DEATHS:
                    raise KitError(
                        f"worker processes died {DEATHS} times (killed, or out of memory) and no "
                        "cell was finished; use fewer workers. What is done is kept: run it again"
                    ) from error
                print("a worker process died; its cell is run again", file=sys.stderr)
    return [Result.load(cell.folder(bench) / "rows.parquet") for cell in cells]


def _computed(
    cells: Sequence[Cell], missing: Sequence[int], bench: Bench, workers: int, scheduler: str | None
) -> Iterator[int]:
    """Compute cells and yield the place of each as it is finished."""
    if scheduler is not None:
        yield from _on_cluster(cells, missing, bench, scheduler)
        return
    if workers == 1:
        for place in missing:
            check()
            cells[place].compute(bench)
            yield place
        return
    tasks = (joblib.delayed(_alone)(place, cells[place], bench) for place in missing)
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        yield from joblib.Parallel(return_as="generator_unordered", batch_size=1)(tasks)


def _on_cluster(
    cells: Sequence[Cell], missing: Sequence[int], bench: Bench, scheduler: str
) -> Iterator[int]:
    """Compute cells on a Dask cluster: by Dask itself, for joblib waits forever for a lost task."""
    try:
        import distributed
    except ImportError as error:
        raise KitError("--scheduler needs Dask: pip install 'repnoise-kit[cluster]'") from error
    with _client(scheduler) as client:
        tasks = [client.submit(_alone, n, cells[n], bench, pure=False) for n in missing]
        for task in distributed.as_completed(tasks):
            try:
                yield task.result()
            except distributed.KilledWorker as error:
                raise KitError(
                    "worker processes of the cluster died (killed, or out of memory) again and "
                    "again at one cell. What is finished is kept: run the same again"
                ) from error
            except distributed.CancelledError as error:
                raise KitError(
                    f"the Dask scheduler at {scheduler} is gone. What is finished is kept: run the "
                    "same again"
                ) from error


def _client(scheduler: str) -> Any:
    from distributed import Client
    from distributed.comm import get_address_host_port
    from distributed.core import coerce_to_address

    try:
        # A client of what is no address would wait a minute for itself, and fail once more at exit.
        get_address_host_port(coerce_to_address(scheduler), strict=True)
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise KitError(f"no Dask scheduler answers at {scheduler}; check the address") from error
    try:
        client.wait_for_workers(1, timeout=60)
    except TimeoutError as error:
        client.close()
        raise KitError(f"the Dask scheduler at {scheduler} has no workers; start some") from error
    return client


# Each worker opens a testbed once: its model, tokenizer and classifier serve all of its cells.
_OPEN: dict[tuple[str, Path], Bench] = {}
# A Dask worker may have several threads, and training draws from the process's random state.
_ONE_AT_A_TIME = threading.Lock()


def _alone(place: int, cell: Cell, bench: Bench) -> int:
    if (bench.code, cell.code) != (fingerprint(CODE), _code(cell.function.__module__)):
        raise KitError(
            "a worker has another version of the kit or of Python than the command that sent it "
            "work; start the workers again with the same"
        )
    with _ONE_AT_A_TIME:
        torch.set_num_threads(1)
        cell.compute(_OPEN.setdefault((bench.mark, bench.store), bench))
    return place
