"""Sweeps whose processes are really killed: what is finished stays, and means what it meant.

The real command on a tiny model; minutes long. As in `test_kill_storms`, moments are drawn with a
seed, though what a process is doing then is never the same twice.
"""

import contextlib
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import psutil
import pytest
import sweeps
import test_kill_storms as storms
from test_kill_storms import LIMIT, ROOT, said, strike, wait_until, workers_of

import repnoise_kit as rk
from repnoise_kit import archive, choosing, studies
from repnoise_kit.grid import DEATHS

pytestmark = pytest.mark.slow

own, start = storms.own, storms.start
TRIALS = 30
ATTACK, SEED = (0.03, 4), 100
STOPPED = "repnoise_kit: stopped; the same command goes on from here"


def words_of(own, folder, storage, out="out", trials=TRIALS, store="store"):
    given = ["--model", own / "model", "--pairs", own / "pairs.json", "--budget", "lab"]
    given += ["--retain", own / "retain.json", "--trials", trials, "--storage", storage]
    given += ["--attack", f"{ATTACK[0]}:{ATTACK[1]}", "--seeds", 1, "--report-seeds", 1]
    return ["-m", "repnoise_kit", "sweep", *given, "--store", folder / store, "--out", folder / out]


@pytest.fixture
def sweep(start, own, tmp_path):
    """Start the command on what a user brings."""

    def of(*more, storage=None, **named):
        storage = storage or tmp_path / "x.db"
        return start(*words_of(own, tmp_path, storage, **named), *more)

    return of


@pytest.fixture(scope="module")
def bed(own):
    files = own / "model", own / "pairs.json"
    return rk.testbed(*files, retain=own / "retain.json", budget="lab")


@pytest.fixture(scope="module")
def calm(own, bed, tmp_path_factory):
    """What an undisturbed command of one worker finds: values by parameters, and its tables."""
    folder = tmp_path_factory.mktemp("calm")
    done = subprocess.run(
        [sys.executable, *map(str, words_of(own, folder, folder / "x.db"))],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=ROOT, timeout=LIMIT, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    study = opened(bed, folder / "x.db")
    check_done(study)
    return worth(study), folder / "out", done.stdout


def opened(bed, where):
    return studies.open_study(bed, where, attacks=[ATTACK], seeds=[SEED])


def worth(study):
    """What each trial that is done came to, by its parameters: nothing where it was given up."""
    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    found = [(studies.key_of(t.params), t.values) for t in study.get_trials(states=done)]
    assert len(dict(found)) == len(found), "a trial was finished twice"
    return dict(found)


def check_done(study, trials=TRIALS):
    """So many are done, nothing runs or waits, and nobody was followed by two."""
    assert sweeps.tally(study)["done"] == trials
    assert set(sweeps.states(study)) <= {"finished", "given up", "stopped"}
    before = [t.system_attrs["failed_by"] for t in study.trials if "failed_by" in t.system_attrs]
    before += [
        history[-1] for t in study.trials if (history := t.system_attrs.get("retry_history"))
    ]
    assert len(set(before)) == len(before), "a trial was tried again twice"
    assert studies.holds(study.trials[0], study.user_attrs["start"])


class Seen:
    """What a study has had that is done: it may only grow."""

    def __init__(self, bed, where):
        self.study, self.done = opened(bed, where), {}

    def look(self):
        now = {
            t.number: (t.params, t.values, t.state)
            for t in self.study.get_trials(deepcopy=False)
            if t.state.is_finished() and t.state.name != "FAIL"
        }
        assert (
            now.items() >= self.done.items()
            if not self.done
            else all(now.get(number) == kept for number, kept in self.done.items())
        )
        self.done = now
        return len(now)


def agree(study, calm):
    """The same parameters came to the same values as in the undisturbed search."""
    mine = worth(study)
    both = set(mine) & set(calm)
    assert len(both) >= 5
    assert all(mine[key] == calm[key] for key in both)


def check_words(command):
    assert "Traceback" not in said(command)
    assert "damaged" not in said(command)


def all_work(commands):
    """Wait until each command has begun with its trials."""

    def ended():
        return [said(command) for command in commands if command.poll() is not None]

    wait_until(lambda: all(workers_of(command) for command in commands) or ended())
    assert not ended()


def gone(processes):
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_command_from_end_to_end(calm, own, bed):
    _, out, printed = calm
    study = archive.read_study(out / "sweep.csv")
    report = rk.Result.load(out / "sweep_report.csv").frame
    best = choosing.winner(study)
    assert set(report["trial"]) == {choosing.UNDEFENDED, 0, best}
    assert set(report["seed"]) == {0}
    assert set(report["lr"]) == {0, ATTACK[0]}
    assert "chosen on seeds 100" in printed
    assert str(out) in printed
    # By hand, what the winner is worth on the seed that it is reported on.
    params = study.trials[best].params
    model = bed.model()
    told = {name: params[name] for name in ("alpha", "beta", "lr", "preset")}
    rk.defend_(model, bed, examples=params["pairs"], seed=0, **told)
    rk.attack_(model, bed, lr=ATTACK[0], examples=ATTACK[1], seed=0)
    frame = rk.evaluate(model, bed).frame
    for metric in ("harmfulness", "utility", "recall"):
        mine = frame[(frame["metric"] == metric) & (frame["group"] == "seen")]["value"].mean()
        rows = report[(report["trial"] == best) & (report["metric"] == metric)]
        rows = rows[(rows["group"] == "seen") & (rows["examples"] == ATTACK[1])]
        assert rows["value"].tolist() == pytest.approx([mine], abs=1e-5)


BLOWS = ["a worker", "the command", "a worker", "all", "a worker"]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_commands_that_are_killed(sweep, calm, bed, tmp_path, workers):
    draw, seen, commands = random.Random(workers), Seen(bed, tmp_path / "x.db"), []
    for whom in draw.sample(BLOWS, len(BLOWS)):
        if not commands or commands[-1].poll() is not None:
            commands.append(sweep("--workers", workers))
        wanted = min(seen.look() + 1 + draw.randrange(4), TRIALS - 1)
        wait_until(lambda n=wanted: seen.look() >= n or commands[-1].poll() is not None)
        time.sleep(draw.uniform(0, 1.5))
        children = workers_of(commands[-1])
        strike(commands[-1], whom, draw)
        if whom == "the command":
            assert wait_until(lambda c=children: gone(c), 60), "workers outlived their command"
    assert seen.look() < TRIALS
    if commands[-1].poll() is not None:
        commands.append(sweep("--workers", workers))
    wait_until(lambda: seen.look() is None or commands[-1].poll() is not None)
    assert commands[-1].returncode == 0
    for command in commands:
        check_words(command)
    study = opened(bed, tmp_path / "x.db")
    check_done(study)
    assert sweeps.states(study)["stopped"] >= 3
    agree(study, calm[0])


def test_three_commands_on_one_file_of_which_two_are_killed(sweep, calm, bed, tmp_path):
    """They begin at the same moment, and none of them has made the file yet."""
    draw = random.Random(0)
    commands = [sweep(out=f"out {n}") for n in range(3)]
    all_work(commands)
    seen = Seen(bed, tmp_path / "x.db")
    for place in (0, 1):
        wanted = seen.look() + 3
        assert wait_until(lambda n=wanted: seen.look() >= n)
        time.sleep(draw.uniform(0, 1.5))
        assert commands[place].poll() is None, said(commands[place])
        strike(commands[place], "all")
    assert wait_until(lambda: seen.look() is None or commands[2].poll() is not None)
    assert commands[2].returncode == 0, said(commands[2])
    check_words(commands[2])
    study = opened(bed, tmp_path / "x.db")
    check_done(study)
    agree(study, calm[0])


@pytest.mark.parametrize("whom", ["the command", "the group"])
@pytest.mark.parametrize("moment", ["a worker begins", "trials run", "a report is made"])
def test_stopped_from_the_keyboard_it_says_so_and_goes_on(sweep, bed, tmp_path, whom, moment):
    command, few = sweep("--workers", 2, trials=6), Seen(bed, tmp_path / "x.db")
    if moment == "a worker begins":
        assert wait_until(lambda: workers_of(command))
        time.sleep(1)  # What it imports takes longer.
    elif moment == "trials run":
        assert wait_until(lambda: few.look() >= 2)
    else:
        assert wait_until(lambda: few.look() >= 6)
        assert wait_until(lambda: "report" in said(command))
    children = workers_of(command)
    assert command.poll() is None
    kill = os.kill if whom == "the command" else os.killpg
    kill(command.pid, signal.SIGINT)
    assert command.wait(90) == 130
    assert wait_until(lambda: gone(children), 5)
    lines = [line for line in said(command).replace("\r", "\n").splitlines() if line.strip()]
    assert lines[-1] == STOPPED
    assert all(line == STOPPED or "trial" in line or "cell" in line for line in lines), lines
    assert "running" not in sweeps.states(few.study)
    few.look()
    command = sweep("--workers", 2, trials=6)
    assert command.wait(LIMIT) == 0, said(command)
    few.look()
    check_done(opened(bed, tmp_path / "x.db"), 6)


def test_what_is_finished_and_more_wanted(sweep, calm, bed, tmp_path):
    """A search that goes on tries what one in one go tries."""
    for trials in (3, 3, 8):
        command = sweep(trials=trials)
        assert command.wait(LIMIT) == 0, said(command)
        study = opened(bed, tmp_path / "x.db")
        check_done(study, trials)
        assert len(study.trials) == trials
    assert worth(study).items() <= calm[0].items()


JUDGED = """
import sys
from pathlib import Path

import repnoise_kit as rk

own, folder = map(Path, sys.argv[1:])
bed = rk.testbed(
    own / "model", own / "pairs.json", retain=own / "retain.json", budget="lab",
    scorers={"harmfulness": lambda prompts, answers: [min(1, len(a) / 99) for a in answers]},
)
study = rk.search_settings(
    bed, 3, folder / "x.db", attacks=[(0.03, 4)], seeds=[1], workers=2, store=folder / "store"
)
print(len(rk.trials(study).frame))
raise SystemExit(0)
"""


def test_a_judge_that_is_a_lambda_travels_and_a_script_is_not_run_again(start, own, tmp_path):
    """No script needs a guard against the processes that are started for it."""
    (tmp_path / "script.py").write_text(JUDGED)
    command = start(tmp_path / "script.py", own, tmp_path)
    assert command.wait(LIMIT) == 0, said(command)
    assert "Traceback" not in said(command)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'x.db'}")
    assert sweeps.tally(study) == {"done": 3}


@pytest.fixture
def postgres():
    """A server of PostgreSQL of its own, from Debian's package; return its URL."""
    pytest.importorskip("psycopg")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    programs, folder, user = found[-1].parent, Path(tempfile.mkdtemp()), []
    if os.geteuid() == 0:  # It refuses to be run by root.
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("there is no user postgres to run PostgreSQL's server as")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

    def run(program, *rest):
        subprocess.run(
            [*user, programs / program, "-D", folder / "data", *rest],
            check=True, cwd=folder, timeout=LIMIT, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    try:
        run("initdb", "-A", "trust", "-U", "kit", "-E", "UTF8")
        socket = f"-c listen_addresses='' -c unix_socket_directories={folder}"
        run("pg_ctl", "-w", "-l", folder / "log", "-o", socket, "start")
        yield f"postgresql+psycopg://kit:geheim@/postgres?host={folder}"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


class TestPostgres:
    @pytest.mark.parametrize("stores", [("store", "store"), ("mine", "theirs")])
    def test_two_commands_of_which_one_is_killed(self, sweep, calm, bed, postgres, stores):
        """On one machine, and as on two: with a store each nothing but the server is shared."""
        trials = 12
        commands = [
            sweep(storage=postgres, out=f"out {n}", store=store, trials=trials)
            for n, store in enumerate(stores)
        ]
        all_work(commands)
        seen = Seen(bed, postgres)
        assert wait_until(lambda: seen.look() >= 4)
        time.sleep(random.Random(0).uniform(0, 1.5))
        strike(commands[0], "all")
        assert wait_until(lambda: seen.look() is None or commands[1].poll() is not None)
        assert commands[1].returncode == 0, said(commands[1])
        check_words(commands[1])
        assert "geheim" not in said(commands[1])
        study = opened(bed, postgres)
        # Two machines may both begin the last one.
        assert trials <= sweeps.tally(study)["done"] <= trials + (stores[0] != stores[1])
        check_done(study, sweeps.tally(study)["done"])
        agree(study, calm[0])

    def test_a_study_of_it_is_saved_and_read_as_from_a_file(self, sweep, bed, postgres, tmp_path):
        command = sweep("--workers", 2, storage=postgres, trials=4)
        assert command.wait(LIMIT) == 0, said(command)
        study = opened(bed, postgres)
        check_done(study, 4)
        again = archive.read_study(tmp_path / "out" / "sweep.csv")
        assert studies.trials(again).frame.equals(
            studies.trials(study).frame.reset_index(drop=True)
        )


def test_dying_again_and_again_is_said(sweep, bed, tmp_path):
    """The machine is too small: each worker is killed as soon as it is there."""
    command = sweep()
    killed = set()
    while command.poll() is None and len(killed) < 20:
        for worker in workers_of(command):
            if worker.pid not in killed:
                worker.kill()
                killed.add(worker.pid)
        time.sleep(0.2)
    assert command.wait(LIMIT) == 2
    assert len(killed) == DEATHS
    line = said(command).splitlines()[-1]
    assert line.startswith("repnoise_kit: worker processes died")
    check_words(command)
