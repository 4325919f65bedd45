"""Fifty SIGKILLs at random moments: each time the run goes on, and ends as if undisturbed.

Five kinds of work, ten kills each, of the whole group of processes. Where a moment falls in the
work is drawn with a seed; a kill before the work begins or after its end is drawn again. After each
kill every file of the store is read that bears a name of its own, and every temporary one is filled
with nonsense: had anybody read it, the numbers would differ.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import pytest
import safetensors.torch
import sweeps
import torch
import tqdm.auto
from cells import wait_until
from test_grid import contents
from test_kill_storms import whole
from test_sweep_storms import gone

import repnoise_kit as rk
from repnoise_kit import checkpoints, results, store, studies
from repnoise_kit.cost import cost_grid
from repnoise_kit.resistance import resistance_grid
from repnoise_kit.store import is_whole, written_whole

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cheap_collections"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork"),
]

KILLS, LIMIT = 10, 300
ROUNDS = 10
"""Epochs of the defence."""
IN_A_RUN = 5
"""So many times at most is one run killed; then it is let end, and the next begins."""
TRIALS = 4
"""Of a sweep. The undisturbed one has one more for each kill, and so all that a storm can come to:
the first twenty are drawn by their numbers alone, and one that is tried again takes a number."""
HOW = {"attacks": [(0.03, 4)], "seeds": [100]}


@dataclass(frozen=True)
class Work:
    """Something that a user runs on a folder, and runs again after it was killed."""

    do: Callable[[Path], object]
    """It works in `folder / "store"`, and writes there once it has really begun."""
    numbers: Callable[[Path], dict[str, pd.DataFrame]]
    """All that came of it, by name."""
    pieces: Callable[[Path], int]
    """How many cells, steps or trials were done; fails if one is missing or there twice."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return sweeps.tiny(tmp_path_factory.mktemp("own"))


def released(bed, folder):
    """Give a user eight models to evaluate."""
    for seed in range(8):
        model = bed.model()
        history = rk.attack_(model, bed, lr=0.03, examples=4, seed=seed)
        rk.save_model(model, bed, folder / f"model {seed}", history)
    return folder


def defends(bed, folder):
    """Defend, with a checkpoint every few steps."""
    checkpoints.EVERY = 0.05
    model, kept = bed.model(), folder / "store"
    curves = rk.defend_(model, bed, batch_size=1, epochs=ROUNDS, checkpoints=kept, seed=3)
    rk.save_model(model, bed, folder / "model", curves)
    curves.save(folder / "curves.parquet")


def of_a_defence(folder):
    weights = safetensors.torch.load_file(folder / "model" / "model.safetensors")
    found = {name: pd.DataFrame(part.reshape(-1).numpy()) for name, part in weights.items()}
    return found | {"curves": rk.Result.load(folder / "curves.parquet").frame}


def steps_of(bed, folder):
    last = ROUNDS * len(bed.splits.defence)
    for _, taken in rk.Result.load(folder / "curves.parquet").frame.groupby("metric")["step"]:
        assert list(taken) == list(range(1, last + 1))
    assert not list((folder / "store").iterdir())
    return last


def attacks(bed, folder):
    cells = {"defences": ["none"], "attacks": ["fine-tuning"]}
    cost_grid(bed, range(3), folder / "store", **cells).save(folder / "rows.parquet")


def grids(bed, folder):
    cells = {"defences": ["none", "repnoise"], "workers": 2}
    resistance_grid(bed, range(2), folder / "store", **cells).save(folder / "rows.parquet")


def of_a_grid(folder):
    return {"rows": rk.Result.load(folder / "rows.parquet").frame}


def cells_of(folder, **kinds):
    """Count a store's cells, each there once and whole, with no other beside them."""
    found = list(whole(folder / "store"))
    assert {kind: sum(f.parent.name == kind for f in found) for kind in kinds} == kinds
    assert len(found) == sum(kinds.values())
    return len(found)


def evaluates(bed, models, folder):
    """Evaluate each model whose result is not there yet, as a script of a user's does."""
    out, found = folder / "store", []
    out.mkdir(parents=True, exist_ok=True)
    (out / f"begun at {time.time()}.txt").touch()
    for seed in range(8):
        for tokens in (4, 8, 12):
            path = out / f"{seed} {tokens}.parquet"
            if not path.exists():
                model = rk.load_model(models / f"model {seed}")
                rk.evaluate(model, bed, max_new_tokens=tokens, seed=seed).save(path)
            found.append(rk.Result.load(path))
            assert found[-1].made_with["max_new_tokens"] == tokens
    rk.stack(*found).save(folder / "rows.parquet")


def evaluated(folder):
    found = sorted((folder / "store").glob("*.parquet"))
    assert [path.stem for path in found] == sorted(f"{s} {t}" for s in range(8) for t in (4, 8, 12))
    return len(found)


def searches(bed, folder, trials=TRIALS):
    how = {**HOW, "store": folder / "store"}
    rk.search_settings(bed, trials, folder / "x.db", **how)


def of_a_sweep(folder):
    """What each trial that is done came to, by its parameters."""
    found = {}
    for trial in opened(folder).get_trials(states=studies_done()):
        key = studies.key_of(trial.params)
        assert key not in found, "a trial was finished twice"
        measured = trial.user_attrs["cells"]
        found[key] = pd.DataFrame([[str(trial.values), *row] for row in measured])
    return found


def studies_done():
    return tuple(s for s, word in studies.STATES.items() if word in ("finished", "given up"))


def opened(folder):
    import optuna

    name, *_ = optuna.get_all_study_names(f"sqlite:///{folder / 'x.db'}")
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'x.db'}")


def trials_of(folder):
    assert sweeps.tally(opened(folder))["done"] == TRIALS
    assert set(sweeps.states(opened(folder))) <= {"finished", "given up", "stopped"}
    return TRIALS


@pytest.fixture(scope="module")
def works(bed, tmp_path_factory):
    def of(kind):
        if kind == "defence":
            return Work(partial(defends, bed), of_a_defence, partial(steps_of, bed))
        if kind == "attack":
            cells = partial(cells_of, path=3, defended=3)
            return Work(partial(attacks, bed), of_a_grid, cells)
        if kind == "evaluation":
            models = released(bed, tmp_path_factory.mktemp("models"))
            return Work(partial(evaluates, bed, models), of_a_grid, evaluated)
        if kind == "grid":
            sizes = len(bed.settings["resistance"]["examples"]) * 3 + 1
            cells = partial(cells_of, attacked=4 * sizes, defended=4)
            return Work(partial(grids, bed), of_a_grid, cells)
        return Work(partial(searches, bed), of_a_sweep, trials_of)

    return of


BEGUN = []


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    yield
    while BEGUN:
        BEGUN.pop().strike()


class Run:
    """A copy of this process at some work, with whatever processes it starts in one group."""

    def __init__(self, do, folder):
        folder.mkdir(exist_ok=True)
        self.store, self.errors = folder / "store", folder.with_suffix(".err")
        self.before = self.touched()
        copy = multiprocessing.get_context("fork").Process
        self.process = copy(target=self._run, args=(do, folder))
        self.process.start()
        BEGUN.append(self)

    def _run(self, do, folder):
        os.setsid()
        with self.errors.open("a") as file:
            os.dup2(file.fileno(), 2)
        # The lock of bars is shared by copies of a process, which take it to their graves.
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
            bar.set_lock(threading.RLock())
        try:
            do(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # An orderly end would wait for workers, which wait minutes for more work.

    def touched(self):
        """When anything in the store was last made, renamed or removed."""
        times = [0]
        for folder, *_ in os.walk(self.store):
            with suppress(OSError):  # Gone meanwhile.
                times.append(Path(folder).stat().st_mtime_ns)
        return max(times)

    def begins(self):
        """Wait until its work has begun, or it has ended; return when that was."""
        wait_until(lambda: self.touched() > self.before or self.ended(), "work begins")
        return time.monotonic()

    def ended(self):
        return not self.process.is_alive()

    def end(self):
        """Wait until it has ended well; then its workers, which would wait for more, end too."""
        self.process.join(LIMIT)
        self.strike()
        assert self.process.exitcode == 0, self.errors.read_text()[-3000:]

    def struck(self, seconds):
        """Kill all of it so many seconds after its work began, unless it has ended by then."""
        moment = self.begins() + seconds
        while time.monotonic() < moment and not self.ended():
            time.sleep(0.002)
        if self.ended():
            return False
        group = psutil.Process(self.process.pid).children(recursive=True)
        self.strike()
        wait_until(lambda: gone(group), "the group is gone")
        return self.process.exitcode == -signal.SIGKILL

    def strike(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join(LIMIT)


TEMPORARY = (".lock", ".db-journal")


def temporary(path, folder):
    """Whether a file's name says that it is nobody's result: a room of a writer, a lock, a cut-off
    checkpoint of Trainer's, which has no `rows.json`.
    """
    inner = path.relative_to(folder).parts
    if any(part.startswith(".") for part in inner) or path.suffix in TEMPORARY:
        return True
    checkpoint = next((p for p in path.parents if p.name.startswith("checkpoint-")), None)
    return checkpoint is not None and not (checkpoint / "rows.json").exists()


def in_sqlite(path):
    """Ask SQLite itself, which takes back what was not finished from the journal beside it."""
    with sqlite3.connect(path) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.close()


READERS = {
    ".json": lambda path: json.loads(path.read_text()),
    ".parquet": pd.read_parquet,
    ".safetensors": safetensors.torch.load_file,
    ".pt": partial(torch.load, weights_only=False),
    ".pth": partial(torch.load, weights_only=False),
    ".bin": partial(torch.load, weights_only=False),
    ".db": in_sqlite,
    ".txt": Path.read_text,
    ".md": Path.read_text,
}


def look(folder):
    """Read every file that bears a name of its own; return how many, and spoil all the others."""
    count = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not temporary(path, folder):
            try:
                READERS[path.suffix](path)
            except Exception as error:
                raise AssertionError(f"{path} is there by halves: {error}") from error
            count += 1
        elif path.suffix not in TEMPORARY:
            path.write_bytes(b"nonsense")
    for path in folder.glob("store/*/*"):
        if path.is_dir() and not path.name.startswith((".", "checkpoint-")):
            assert "unfinished" in path.parts or is_whole(path), f"{path} is there by halves"
    return count


def stormed(work, calm, seconds, folder, draw):
    """Kill `KILLS` times, letting each run end that is not struck; return what there was."""
    done = {"kills": 0, "starts": 0, "ends": 0, "numbers": 0, "pieces": 0, "files": 0}
    while done["kills"] < KILLS:
        place, made = folder / f"run {done['ends']}", {}
        for number in range(IN_A_RUN + 1):
            run = Run(work.do, place)
            done["starts"] += 1
            spared = number == IN_A_RUN or done["kills"] == KILLS
            if spared or not run.struck(draw.uniform(0, seconds)):
                break
            done["kills"] += 1
            done["files"] += look(place)
            found = whole(place / "store")
            assert found.items() >= made.items(), "a finished cell was lost, or made twice"
            made = found
            if (place / "x.db").exists():
                sweeps.age(opened(place))  # All of its workers are dead; nobody need wait for it.
        run.end()
        assert "damaged" not in run.errors.read_text()
        assert "Traceback" not in run.errors.read_text()
        look(place)
        assert whole(place / "store").items() >= made.items(), "a finished cell was made twice"
        done["ends"] += 1
        done["pieces"] += work.pieces(place)
        done["numbers"] += same(work.numbers(place), calm)
    return done


def same(found, calm):
    """Compare exactly; return how many values. The undisturbed sweep has trials beyond these."""
    assert found
    assert set(found) <= set(calm)
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, calm[name], check_exact=True)
    return sum(table.size for table in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["defence", "attack", "evaluation", "grid", "sweep"])
def test_killed_at_ten_random_moments(kind, works, bed, tmp_path, capsys):
    work, quiet = works(kind), tmp_path / "quiet"
    most = TRIALS + IN_A_RUN
    run = Run(partial(searches, bed, trials=most) if kind == "sweep" else work.do, quiet)
    began = run.begins()
    run.end()
    seconds, calm = time.monotonic() - began, work.numbers(quiet)
    if kind == "sweep":
        assert len(calm) == most
        seconds *= TRIALS / most
    else:
        work.pieces(quiet)
    done = stormed(work, calm, seconds, tmp_path, random.Random(kind))
    assert done["kills"] == KILLS
    with capsys.disabled():
        print(f"\n{kind}, {seconds:.1f} s undisturbed: ", end="")
        print(", ".join(f"{count} {name}" for name, count in done.items()))


@contextmanager
def in_place(target):
    """Write as `written_whole` does, but for the renaming: a writer that is to be found out."""
    target.parent.mkdir(parents=True, exist_ok=True)
    yield target


class TestItCanFail:
    """The storm's own checks, on writers and stores that are wrong."""

    @pytest.fixture
    def killed(self, tmp_path, monkeypatch):
        """Save a result with this writer, killed where half of its table is written."""

        def half(frame, path, **how):
            path.write_bytes(b"PAR1")
            os.kill(os.getpid(), signal.SIGKILL)

        def of(writer):
            monkeypatch.setattr(results, "written_whole", writer)
            monkeypatch.setattr(pd.DataFrame, "to_parquet", half)
            rows = rk.Result(pd.DataFrame({"a": range(9)}), {"seed": 0})
            process = multiprocessing.get_context("fork").Process(
                target=rows.save, args=(tmp_path / "store" / "rows.parquet",)
            )
            process.start()
            process.join(LIMIT)
            assert process.exitcode == -signal.SIGKILL
            return tmp_path

        return of

    def test_a_writer_that_does_not_rename_is_found_out(self, killed):
        with pytest.raises(AssertionError, match=r"rows\.parquet is there by halves"):
            look(killed(in_place))

    def test_the_kits_own_leaves_nothing_by_halves(self, killed):
        folder = killed(written_whole)
        assert look(folder) == 1  # How it was made, and no table yet.
        assert [path.name for path in (folder / "store").glob("[!.]*")] == ["rows.json"]

    def test_a_cell_that_is_not_whole_is_found_out(self, tmp_path):
        folder = tmp_path / "store" / "attacked" / "0123"
        with written_whole(folder) as fresh:
            fresh.mkdir()
            rk.Result(pd.DataFrame({"a": [1]})).save(fresh / "rows.parquet")
            store.seal(fresh)
        assert look(tmp_path) == 3
        (folder / "rows.parquet").unlink()
        with pytest.raises(AssertionError, match="0123 is there by halves"):
            look(tmp_path)

    def test_all_that_is_temporary_is_spoilt_and_nothing_else(self, tmp_path):
        names = [".a.json-left/a.json", "k/checkpoint-2/b.json", "k/checkpoint-3/b.json", "c.json"]
        for name in [*names, "k/checkpoint-3/rows.json"]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("2")
        assert look(tmp_path) == 3
        found = [(tmp_path / name).read_text() for name in names]
        assert found == ["nonsense", "nonsense", "2", "2"]

    def test_another_number_is_found_out(self):
        one, other = ({"a": pd.DataFrame({"x": [0.1, value]})} for value in (0.3, 0.1 + 0.2))
        assert same(one, one) == 2
        with pytest.raises(AssertionError):
            same(one, other)


class TestRemoving:
    """What is taken away is first taken out of sight: nothing is believed while it is removed."""

    @pytest.fixture
    def killed(self):
        """Do something in a process that is killed before it removes its so-manieth file."""

        def of(do, removals):
            def deadly(*args, **named):
                nonlocal removals
                removals -= 1
                if removals < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return remove(*args, **named)

            def run():
                os.unlink = deadly
                do()

            remove = os.unlink
            process = multiprocessing.get_context("fork").Process(target=run)
            process.start()
            process.join(LIMIT)
            assert process.exitcode in (0, -signal.SIGKILL)
            return process.exitcode != 0

        return of

    def test_a_released_model_is_the_old_one_or_the_new_one(self, bed, killed, tmp_path):
        history = rk.Result(pd.DataFrame({"a": [1]}), {"method": "none"})
        old, new, folder = tmp_path / "old", tmp_path / "new", tmp_path / "out" / "model"
        model = bed.model()
        rk.save_model(model, bed, old, history)
        next(model.parameters()).data += 1
        rk.save_model(model, bed, new, history)
        wanted = contents(old), contents(new)
        for removals in range(20):
            shutil.rmtree(folder.parent, ignore_errors=True)
            shutil.copytree(old, folder)
            again = killed(partial(rk.save_model, model, bed, folder, history), removals)
            assert not folder.exists() or contents(folder) in wanted
            if not again:
                break
        assert removals > len(contents(old)) / 2
        assert contents(folder) == wanted[1]

    def test_a_checkpoint_is_believed_while_all_of_it_is_there(
        self, bed, killed, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(checkpoints, "EVERY", 0.0)
        sizes = set()
        for removals in range(60):
            kept = tmp_path / str(removals)
            defend = partial(rk.defend_, bed.model(), bed, examples=2, batch_size=1)
            again = killed(partial(defend, checkpoints=kept), removals)
            sizes |= {len(list(rows.parent.iterdir())) for rows in kept.glob("*/*/rows.json")}
            if not again:
                break
        assert removals > 5
        assert len(sizes) == 1, f"of some that are believed files are gone: {sizes}"
