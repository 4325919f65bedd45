"""Search: workers that run the trials of a study, each in a process of its own.

A worker that dies takes its current trial with it, and nothing else: the trial is failed once it
has given no sign of life for half a minute, and tried again by whoever works on the study.
"""

import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import PicklingError
from typing import Any

import optuna
import torch
from filelock import FileLock
from joblib.externals.loky.backend import get_context
from optuna.samplers import PartialFixedSampler, TPESampler
from optuna.trial import TrialState
from tqdm.auto import tqdm

from repnoise_kit.bench import Bench
from repnoise_kit.database import default_file, kept_in, trusted
from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.grid import DEATHS
from repnoise_kit.steps import ask_to_stop, check, unheard
from repnoise_kit.store import check_writable, fingerprint
from repnoise_kit.studies import SEEDS, holds, open_study
from repnoise_kit.testbeds import Testbed
from repnoise_kit.trying import Say, measure_undefended, run_trial

RANDOM = 20
"""Trials at random before the sampler learns from those there are."""

_DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Errand:
    """What a worker is to do: trials until a study has so many, or one with given parameters."""

    bed: Testbed
    where: str | Path | None = None
    attacks: Sequence[tuple[float, int]] | None = None
    seeds: Sequence[int] = SEEDS
    store: Path | str | None = None
    until: int = 0
    ends: float | None = None
    """No trial begins later than this, in seconds since 1970."""
    params: Mapping[str, Any] | None = None
    threads: int | None = None

    def study(self) -> optuna.Study:
        """Open the study it is about."""
        return open_study(self.bed, self.where, attacks=self.attacks, seeds=self.seeds)


def search_settings(
    bed: Testbed,
    trials: int,
    where: str | Path | None = None,
    *,
    attacks: Sequence[tuple[float, int]] | None = None,
    seeds: Sequence[int] = SEEDS,
    workers: int = 1,
    seconds: float | None = None,
    store: Path | str | None = None,
    progress: str | None = None,
) -> optuna.Study:
    """Search for settings of RepNoise that resist attacks and keep the model of use.

    Trials are chosen by Optuna's TPE, the first of a study being the testbed's own settings; one
    that loses utility before any attack is given up there. What was stopped or has died is tried
    again, and nothing that is finished is run twice: to go on is to call this again.

    Args:
        bed: The testbed.
        trials: How many the study is to have in the end, those given up included.
        where: As `open_study` takes it; several calls and machines may work on one.
        attacks: Learning rate and number of examples of each; by default the small and the large.
        seeds: What trials are judged on.
        workers: Processes. More than one run each with one thread.
        seconds: No trial begins later than this.
        store: As grids have it: finished pieces of work, which trials share with them.
        progress: Words for a bar of trials, with the time left; no bar without.

    Returns:
        The study; `trials(study)` is its table; `winner` and `report_trials` say what came of it.

    Raises:
        KitError: a trial failed with an error, or workers die again and again.
    """
    check_whole(trials=trials, workers=workers)
    check_numbers(above_zero=True, trials=trials, workers=workers)
    if seconds is not None:
        check_numbers(seconds=seconds)
    ends = None if seconds is None else time.time() + seconds
    how: dict[str, Any] = {"ends": ends, "threads": 1 if workers > 1 else None, "store": store}
    errand = Errand(bed, where, attacks, seeds, until=trials, **how)
    study = errand.study()
    crew = [Worker(errand) for _ in range(workers)]
    bar = tqdm(
        desc=progress, total=trials, initial=_count(study), unit="trial", mininterval=0.5,
        disable=progress is None,
    )  # fmt: skip
    try:
        with bar:
            for count in _watched(crew, study, errand):
                if count > bar.n:
                    bar.update(count - bar.n)
    finally:
        for worker in crew:
            worker.stop()
        for worker in crew:
            worker.join()
    return study


class Worker:
    """A process that does an errand, tells how far it is, and can be stopped between two steps.

    It stops, too, when the process that started it is gone.
    """

    def __init__(self, errand: Errand) -> None:
        self.errand = errand
        context = get_context("loky")  # Starts afresh, and never runs the caller's script again.
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, errand), daemon=True)
        try:
            with unheard():
                self.process.start()
        except (TypeError, AttributeError, PicklingError) as error:
            raise KitError(
                f"the testbed cannot be handed to another process ({error}); its judges must be "
                "functions, or objects without locks, files and connections"
            ) from error
        theirs.close()
        self.ended = False
        """Whether it said that it is done, rather than died."""

    def heard(self) -> Iterator[dict[str, Any]]:
        """Yield what it has told since, without waiting: what `Say` takes, `error` or `end`."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                self.ended = self.ended or "end" in message
                yield message
        except (EOFError, OSError):
            return

    def alive(self) -> bool:
        """Whether the process is there."""
        return self.process.is_alive()

    def stop(self) -> None:
        """Let it end after the current step; its trial stays one to be tried again."""
        with suppress(OSError):
            self.pipe.send("stop")

    def join(self, seconds: float = 60) -> None:
        """Wait until it has ended, or else end it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work(study: optuna.Study, bench: Bench, errand: Errand, say: Say) -> None:
    """Run trials in this process until the errand is done."""
    measure_undefended(study, bench)
    _find_the_dead(study)
    if errand.params is not None:
        run_trial(study, _claimed(study, errand.params), bench, say)
        return
    check_writable(bench.store)
    # Between counting and asking, another worker of this machine might begin one too many.
    lock = FileLock(bench.store / f"{fingerprint(study.study_name)}.lock")
    while _count(study) < errand.until and (errand.ends is None or time.time() < errand.ends):
        check()
        with lock:
            trial = _next(study, errand.until)
        if trial is None:  # The others are at the last ones, and may die.
            time.sleep(1)
        else:
            run_trial(study, trial, bench, say)


def _next(study: optuna.Study, until: int) -> optuna.Trial | None:
    """Return the trial to be run now, unless those that are running make up the number."""
    with trusted():
        optuna.storages.fail_stale_trials(study)
        known = study.get_trials(deepcopy=False)
        busy = sum(trial.state == TrialState.RUNNING for trial in known)
        if _count(study) + busy >= until:
            return None
        start = study.user_attrs["start"]
        if not any(holds(trial, start) for trial in known):
            study.enqueue_trial(start)
        study.sampler = _sampler(0)
        trial = _alive(study, study.ask())
        # Seeded by the trial's number: a search that was stopped does not draw the same again, nor
        # do two machines. Parameters are drawn later, one by one.
        study.sampler = _sampler(trial.number)
        return trial


def _sampler(seed: int) -> PartialFixedSampler:
    inner = TPESampler(seed=seed, n_startup_trials=RANDOM, constant_liar=True)
    return PartialFixedSampler({"held": "nothing"}, inner)


def _claimed(study: optuna.Study, params: Mapping[str, Any]) -> optuna.Trial:
    """Return a trial with these parameters: one that waits to be tried again, or a new one."""
    for _ in range(2):
        for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            ours = holds(trial, params)
            if ours and study._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return _alive(study, optuna.Trial(study, trial._trial_id))
        study.enqueue_trial(dict(params))
    raise KitError("another process took this trial; look at the study again")


def _alive(study: optuna.Study, trial: optuna.Trial) -> optuna.Trial:
    """Give a trial its first sign of life at once: without one it could never be found dead."""
    study._storage.record_heartbeat(trial._trial_id)  # ty: ignore[missing-attribute]
    return trial


def _find_the_dead(study: optuna.Study) -> None:
    """Let trials that died between being asked for and their first sign of life be found dead.

    Such a one has its first sign from here; one that lives has another, and one that died lately is
    found so much later.
    """
    with trusted():
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.record_heartbeat(trial._trial_id)  # ty: ignore[missing-attribute]


def _count(study: optuna.Study) -> int:
    return len(study.get_trials(deepcopy=False, states=_DONE))


def _watched(crew: list[Worker], study: optuna.Study, errand: Errand) -> Iterator[int]:
    """Yield how many trials are done, now and then; put a new worker in a dead one's place."""
    fruitless, before = 0, _count(study)
    while crew:
        check()
        for worker in list(crew):
            there = worker.alive()
            for message in worker.heard():
                if "error" in message:
                    raise KitError(message["error"])
            if there:
                continue
            crew.remove(worker)
            if not worker.ended:
                now = _count(study)
                fruitless, before = 0 if now > before else fruitless + 1, now
                if fruitless == DEATHS:
                    raise KitError(
                        f"worker processes died {DEATHS} times (killed, or out of memory) and no "
                        "trial was finished; use fewer workers. What is done is kept"
                    )
                crew.append(Worker(errand))
        yield _count(study)
        time.sleep(0.3)


def _serve(pipe: Connection, errand: Errand) -> None:
    """Do an errand in a process made for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Who started it says when to stop.
    warnings.filterwarnings("ignore")
    threading.Thread(target=_obey, args=(pipe,), daemon=True).start()
    if errand.threads:
        torch.set_num_threads(errand.threads)
    end: dict[str, Any] = {"end": "done"}
    try:
        with kept_in(errand.where or default_file(errand.bed.name)):
            work(errand.study(), Bench.of(errand.bed, errand.store), errand, _Told(pipe))
    except KeyboardInterrupt:
        end = {"end": "stopped"}
    except KitError as error:
        end = {"end": "failed", "error": str(error)}
    except Exception as error:
        words = " ".join(f"a trial failed: {type(error).__name__}: {error}".split())
        end = {"end": "failed", "error": words}
    _Told(pipe)(end)


def _obey(pipe: Connection) -> None:
    """Wait for a word, or for the end of whoever could say one; either means to stop."""
    with suppress(EOFError, OSError):
        pipe.recv()
    ask_to_stop()


class _Told:
    """Send what is told to whoever started this process, if it is still there."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.last = pipe, 0.0

    def __call__(self, message: dict[str, Any]) -> None:
        # A hundred steps a second are more than anybody can look at.
        if "terms" in message and time.monotonic() - self.last < 0.1:
            return
        self.last = time.monotonic()
        with suppress(OSError):
            self.pipe.send(message)
