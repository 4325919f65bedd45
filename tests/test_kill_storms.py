"""Grids whose processes are really killed, at random moments: the same table, nothing done twice.

The real command on a tiny model; minutes long. Moments are drawn with a seed, though what a process
is doing then is never the same twice.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from small import own_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LIMIT = 300
"""Seconds until what is waited for counts as hanging."""
CELLS, DEFENDED = 13 * 4, 13
"""Thirteen defences, three learning rates and none; a defended model for each defence."""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


@pytest.fixture
def start(own, tmp_path):
    """Start commands, each in a group of processes of its own; in the end nothing is left."""
    begun = []

    def of(*words, kit=ROOT, **variables):
        paths = os.pathsep.join(map(str, (kit, ROOT / "tests")))
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": paths} | variables
        log = tmp_path / f"err {len(begun)}"
        with log.open("w") as errors:
            begun.append(
                subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    cwd=tmp_path,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                    # Heard, even where these tests run in the background of a shell.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            )
        begun[-1].log = log
        return begun[-1]

    yield of
    for process in begun:
        strike(process, "all")
        process.wait(LIMIT)


@pytest.fixture
def grid(start, own, tmp_path):
    """Start the command on what a user brings."""

    def of(store, out, *words):
        given = ["--model", own / "model", "--pairs", own / "pairs.json"]
        given += ["--retain", own / "retain.json", "--seeds", 1]
        given += ["--store", tmp_path / store, "--out", tmp_path / out, *words]
        return start("-m", "repnoise_kit", "grid", "resistance", *given)

    return of


@pytest.fixture(scope="module")
def calm(own, tmp_path_factory):
    """The files that an undisturbed run of one process writes."""
    folder = tmp_path_factory.mktemp("calm")
    words = ["--model", own / "model", "--pairs", own / "pairs.json"]
    words += ["--retain", own / "retain.json", "--seeds", 1]
    words += ["--store", folder / "store", "--out", folder / "out"]
    subprocess.run(
        [sys.executable, "-m", "repnoise_kit", "grid", "resistance", *map(str, words)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=ROOT, check=True, timeout=LIMIT,
        capture_output=True,
    )  # fmt: skip
    check_store(folder / "store")
    return tables(folder / "out")


def tables(out):
    """What a command wrote: tables byte for byte, and how they were made, but for the command."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(found) == {
        f"resistance{rest}" for rest in (".csv", ".json", "_questions.parquet", "_questions.json")
    }
    for name in ("resistance.json", "resistance_questions.json"):
        found[name] = json.loads(found[name])
        assert found[name].pop("command")
    return found


def folders(store):
    """What lies in a store under its own name, of cells and of defended models."""
    return [p for p in store.glob("*/*") if p.is_dir() and not p.name.startswith(".")]


def whole(store):
    """The finished ones, and what would be another if one were made again."""
    from repnoise_kit.store import is_whole

    stats = {folder: folder.stat() for folder in folders(store) if is_whole(folder)}
    return {folder: (stat.st_ino, stat.st_mtime_ns) for folder, stat in stats.items()}


def check_store(store, before=()):
    """All is there and whole, and what was finished `before` was never made again."""
    found = whole(store)
    assert set(found) == set(folders(store))
    kinds = [folder.parent.name for folder in found]
    assert (kinds.count("attacked"), kinds.count("defended")) == (CELLS, DEFENDED)
    for folder, stamp in dict(before).items():
        assert found[folder] == stamp, f"{folder} was made twice"


def wait_until(come, seconds=LIMIT):
    """Wait until something is so, and say whether it came to that in time."""
    ends = time.monotonic() + seconds
    while not (there := come()) and time.monotonic() < ends:
        time.sleep(0.02)
    return there


def workers_of(command):
    """The worker processes of a command."""
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(command.pid).children(recursive=True)
        return [c for c in children if "LokyProcess" in " ".join(c.cmdline())]
    return []


def strike(command, whom, draw=random):
    """Kill, as the system does that is out of memory: no process is asked first."""
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        if whom == "a worker" and (workers := workers_of(command)):
            draw.choice(workers).kill()
        elif whom == "the command":
            command.kill()
            command.wait(LIMIT)
        elif whom == "all":
            os.killpg(command.pid, signal.SIGKILL)
            command.wait(LIMIT)


def at_random_moment(command, store, draw):
    """Wait, while a command runs, for some more cells to be finished, and a little longer."""
    wanted = len(folders(store)) + draw.randrange(6)
    wait_until(lambda: len(folders(store)) >= wanted or command.poll() is not None)
    time.sleep(draw.uniform(0, 0.6))


def said(command):
    return command.log.read_text()


def check_words(command):
    """It ended well, or one line says how to go on; it never met anything by halves."""
    assert "damaged" not in said(command)
    assert "Traceback" not in said(command)
    if command.returncode == 2:
        last = said(command).splitlines()[-1]
        assert last.startswith("repnoise_kit: worker processes")
        assert last.endswith("again")
    else:
        assert command.returncode in (0, -signal.SIGKILL)


BLOWS = ["a worker", "a worker", "the command", "a worker", "all"]


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_and_commands_that_are_killed(grid, calm, tmp_path, workers):
    draw, store, made = random.Random(workers), tmp_path / "store", {}
    commands, landed = [], 0
    for whom in draw.sample(BLOWS, len(BLOWS)):
        if not commands or commands[-1].poll() is not None:
            commands.append(grid("store", "out", "--workers", workers))
        at_random_moment(commands[-1], store, draw)
        found = whole(store)
        assert found.items() >= made.items()
        made = found
        landed += commands[-1].poll() is None
        strike(commands[-1], whom, draw)
    assert landed >= 3
    assert 0 < len(made) < CELLS + DEFENDED
    # Killed workers of a command that lives may yet make it give up, with a word.
    if commands[-1].poll() is None:
        commands[-1].wait(LIMIT)
    if commands[-1].returncode != 0:
        commands.append(grid("store", "out", "--workers", workers))
        assert commands[-1].wait(LIMIT) == 0
    for command in commands:
        check_words(command)
    check_store(store, made)
    assert tables(tmp_path / "out") == calm


def test_two_commands_on_one_store_of_which_one_is_killed(grid, calm, tmp_path):
    draw, store = random.Random(0), tmp_path / "store"
    one, other = (grid("store", out, "--workers", 2) for out in ("one", "other"))
    assert wait_until(lambda: len(folders(store)) > 2)
    at_random_moment(one, store, draw)
    made = whole(store)
    assert one.poll() is None
    strike(one, "all")
    at_random_moment(other, store, draw)
    assert whole(store).items() >= made.items()
    made = whole(store)
    strike(other, "a worker", draw)
    if other.wait(LIMIT) == 2:
        check_words(other)
        other = grid("store", "other", "--workers", 2)
        assert other.wait(LIMIT) == 0
    check_words(other)
    check_store(store, made)
    assert tables(tmp_path / "other") == calm
    # The one that was killed finds all of it there.
    made = whole(store)
    one = grid("store", "one")
    assert one.wait(LIMIT) == 0
    assert f"{CELLS}/{CELLS}" in said(one)
    assert f" 0/{CELLS}" not in said(one)
    check_store(store, made)
    assert tables(tmp_path / "one") == calm


def test_two_commands_at_once_share_the_work(grid, calm, tmp_path):
    """Undisturbed: each cell is in the store once, and both write the same."""
    both = [grid("store", out) for out in ("one", "other")]
    seen = {}

    def ended():
        for folder, stamp in whole(tmp_path / "store").items():
            assert seen.setdefault(folder, stamp) == stamp, f"{folder} was made twice"
        return all(command.poll() is not None for command in both)

    assert wait_until(ended)
    for command in both:
        assert command.returncode == 0
        check_words(command)
    check_store(tmp_path / "store", seen)
    assert tables(tmp_path / "one") == tables(tmp_path / "other") == calm


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_from_the_keyboard_it_says_so_and_goes_on(grid, calm, tmp_path, workers):
    store = tmp_path / "store"
    command = grid("store", "out", "--workers", workers)
    assert wait_until(lambda: len(folders(store)) > 8)
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(60) == 130
    assert said(command).splitlines()[-1] == (
        "repnoise_kit: stopped; the same command goes on from here"
    )
    made = whole(store)
    assert grid("store", "out", "--workers", workers).wait(LIMIT) == 0
    check_store(store, made)
    assert tables(tmp_path / "out") == calm


SOME = """
import sys
from pathlib import Path
import repnoise_kit as rk

own, store, out = map(Path, sys.argv[1:])
bed = rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json")
rows = rk.resistance_grid(bed, [0], store, defences=["none", "safety_training"])
rows.save(out)
"""


def test_other_code_gives_another_result_and_the_old_code_the_old_one(start, own, tmp_path):
    """The kit is changed between two runs on one store, and changed back."""
    kit, store = tmp_path / "kit", tmp_path / "store"
    shutil.copytree(ROOT / "repnoise_kit", kit / "repnoise_kit")
    room = kit / "repnoise_kit" / "baselines.py"
    text = room.read_text()
    line = 'return {"total": term, "retain": term}'
    assert text.count(line) == 1

    def computed(name, code):
        room.write_text(code)
        before = len(folders(store))
        assert start("-c", SOME, own, store, tmp_path / name, kit=kit).wait(LIMIT) == 0
        return len(folders(store)) - before, (tmp_path / name).read_bytes()

    eight, first = computed("first.parquet", text)
    assert eight == 8 + 2
    again, other = computed("other.parquet", text.replace(line, line.replace("term,", "-term,")))
    assert again == 8 + 2
    assert other != first
    reworded = text.replace(line, f"{line}  # as the paper says").replace('"""Return', '"""Give')
    assert reworded != text
    assert computed("reworded.parquet", reworded) == (0, first)


LETHAL = """
import sys
from pathlib import Path

import cells
import repnoise_kit as rk
from repnoise_kit.grid import Cell, run

own, store, log = map(Path, sys.argv[1:4])
bed = rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json")
cell = Cell(cells.lethal, {"log": str(log), "name": "x", "deaths": 99})
try:
    run([cell], rk.Bench.of(bed, store), scheduler=sys.argv[4])
except rk.KitError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def cluster(start, tmp_path):
    """Start a Dask scheduler and workers with some threads each; return its address."""
    pytest.importorskip("distributed")

    def of(*threads, **variables):
        told = tmp_path / "scheduler.json"
        scheduler = start(
            *("-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard"),
            *("--no-show", "--idle-timeout", "120s", "--scheduler-file", told),
            **variables,
        )
        assert wait_until(told.exists)
        assert wait_until(lambda: told.read_text().endswith("}"))
        address = json.loads(told.read_text())["address"]
        workers = [
            start("-m", "dask", "worker", address, "--nthreads", count, "--no-nanny",
                  "--no-dashboard", "--host", "127.0.0.1", "--death-timeout", 30,
                  "--local-directory", tmp_path / "dask")
            for count in threads
        ]  # fmt: skip
        for worker in workers:
            assert wait_until(lambda worker=worker: "Registered to" in said(worker))
        return address, scheduler, workers

    return of


class TestDask:
    # Not a number of processes, which would share no random state: `2` is one with two threads.
    @pytest.mark.parametrize("threads", [(1, 1), (2,)])
    def test_its_table_is_that_of_one_process(self, grid, cluster, calm, tmp_path, threads):
        address, *_ = cluster(*threads)
        command = grid("store", "out", "--scheduler", address)
        assert command.wait(LIMIT) == 0
        check_words(command)
        check_store(tmp_path / "store")
        assert tables(tmp_path / "out") == calm
        assert f"{CELLS}/{CELLS}" in said(command)

    def test_a_worker_and_then_the_command_are_killed(self, grid, cluster, calm, tmp_path):
        address, _, (one, _) = cluster(1, 1)
        draw, store = random.Random(0), tmp_path / "store"
        command = grid("store", "out", "--scheduler", address)
        assert wait_until(lambda: len(folders(store)) > 4)
        at_random_moment(command, store, draw)
        made = whole(store)
        strike(one, "all")
        assert wait_until(lambda: len(folders(store)) > len(made) + 4)
        at_random_moment(command, store, draw)
        assert command.poll() is None
        assert whole(store).items() >= made.items()
        made = whole(store)
        strike(command, "all")
        command = grid("store", "out", "--scheduler", address)
        assert command.wait(LIMIT) == 0
        check_words(command)
        check_store(store, made)
        assert tables(tmp_path / "out") == calm

    def test_a_scheduler_that_is_killed_is_said_and_what_is_finished_kept(
        self, grid, cluster, calm, tmp_path
    ):
        address, scheduler, _ = cluster(1, 1)
        store = tmp_path / "store"
        command = grid("store", "out", "--scheduler", address)
        assert wait_until(lambda: len(folders(store)) > 4)
        strike(scheduler, "all")
        assert command.wait(LIMIT) == 2
        # Dask says much of its own before.
        assert said(command).splitlines()[-1].startswith("repnoise_kit: the Dask scheduler at")
        made = whole(store)
        assert grid("store", "out").wait(LIMIT) == 0
        check_store(store, made)
        assert tables(tmp_path / "out") == calm

    def test_a_cell_that_kills_its_workers_is_said(self, start, own, cluster, tmp_path):
        address, *_ = cluster(1, 1, DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0")
        command = start("-c", LETHAL, own, tmp_path / "store", tmp_path / "log", address)
        assert command.wait(LIMIT) == 2
        assert said(command).startswith("worker processes of the cluster died")
        assert (tmp_path / "log").read_text() == "x\n"

    def test_a_scheduler_without_workers_is_said_in_one_line(self, grid, cluster, tmp_path):
        address, *_ = cluster()
        command = grid("store", "out", "--scheduler", address)
        assert command.wait(LIMIT) == 2
        refused(command, "workers")

    @pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense", "http://127.0.0.1:9"])
    def test_a_wrong_address_is_said_in_one_line(self, grid, tmp_path, address):
        pytest.importorskip("distributed")
        began = time.monotonic()
        command = grid("store", "out", "--scheduler", address)
        assert command.wait(LIMIT) == 2
        assert time.monotonic() - began < 90
        refused(command, address)


def refused(command, words):
    """One line says what is wrong, after the bar."""
    assert "Traceback" not in said(command)
    lines = [line for line in said(command).splitlines() if "cell" not in line and line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("repnoise_kit: ")
    assert words in lines[0]
