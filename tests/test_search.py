"""The search: so many trials and no more, whoever is stopped, killed or wrong on the way."""

import json
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from contextlib import suppress

import optuna
import psutil
import pytest
import sweeps
from cells import note, notes
from joblib.externals.loky import backend as loky
from optuna.trial import TrialState
from sweeps import HOW, age, bench_of, states, tally

from repnoise_kit import __main__ as command
from repnoise_kit import archive, choosing, database, search, steps, studies, trying
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.search import Errand, search_settings, work

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cheap_collections", "pretending"),
    # What Optuna says of asking for trials, and of what it calls experimental.
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
ONE = {"attacks": HOW["attacks"][:1], "seeds": [7]}


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return sweeps.tiny(tmp_path_factory.mktemp("own"))


@pytest.fixture
def bench(bed, tmp_path):
    return bench_of(bed, tmp_path / "store")


@pytest.fixture
def where(tmp_path):
    return tmp_path / "x.db"


@pytest.fixture
def pretending(monkeypatch):
    """Trials take no time, and workers are copies of this process, which need not start afresh."""
    sweeps.pretend(monkeypatch)
    monkeypatch.setattr(search, "get_context", lambda name: multiprocessing.get_context("fork"))
    # A copy has the other workers' pipes too, and would not be told of an end.
    monkeypatch.setattr(search.Worker, "join", _joined)


def _joined(worker, seconds=20):
    worker.process.join(seconds)
    assert not worker.process.is_alive(), "a worker did not stop"


def silent(message):
    pass


def worked(bed, bench, where, until, *, seconds=None, **more):
    """Work in this process until there are so many; return the study, opened anew."""
    ends = None if seconds is None else time.time() + seconds
    errand = Errand(bed, where, **ONE, store=bench.store, until=until, ends=ends, **more)
    work(errand.study(), bench, errand, silent)
    return errand.study()


def searched(bed, bench, where, trials, **more):
    return search_settings(bed, trials, where, **ONE, store=bench.store, **more)


def params(study):
    return [trial.params for trial in study.trials]


def nothing_runs():
    """Whether no worker is left that this process started."""
    left = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    return not [c for c in left if "resource_tracker" not in " ".join(c.cmdline())]


class TestWork:
    def test_so_many_trials_of_which_the_first_is_where_it_starts(self, bed, bench, where):
        study = worked(bed, bench, where, 4)
        assert [trial.number for trial in study.trials] == [*range(4)]
        assert sum(states(study).values()) == 4
        assert set(states(study)) <= {"finished", "given up"}
        assert params(study)[0] == study.user_attrs["start"]
        assert len({studies.key_of(found) for found in params(study)}) == 4
        assert {found["held"] for found in params(study)} == {"nothing"}
        assert choosing.started_from(study) == 0

    def test_run_again_it_does_nothing(self, bed, bench, where):
        first = worked(bed, bench, where, 3)
        before, calls = (
            [(t.number, t.params, t.values) for t in first.trials],
            bench.store / "calls",
        )
        said = notes(calls)
        for until in (3, 2, 0):
            again = worked(bed, bench, where, until)
            assert [(t.number, t.params, t.values) for t in again.trials] == before
        assert notes(calls) == said

    def test_a_search_in_three_parts_tries_what_one_in_one_tries(self, bed, bench, tmp_path):
        """A process that begins anew does not draw the same again."""
        for until in (1, 2, 4):
            parts = worked(bed, bench, tmp_path / "parts.db", until)
        whole = worked(bed, bench, tmp_path / "whole.db", 4)
        assert params(parts) == params(whole)
        assert [t.values for t in parts.trials] == [t.values for t in whole.trials]

    def test_what_waits_comes_first(self, bed, bench, where):
        study = studies.open_study(bed, where, **ONE)
        wanted = [study.user_attrs["start"] | {"alpha": alpha} for alpha in (2.0, 3.0)]
        for one in wanted:
            study.enqueue_trial(one)
        study = worked(bed, bench, where, 4)
        assert params(study)[:3] == [*wanted, study.user_attrs["start"]]

    def test_those_given_up_count(self, bed, bench, where):
        study = studies.open_study(bed, where, **ONE)
        study.enqueue_trial(study.user_attrs["start"] | {"lr": 0.0119})
        assert states(worked(bed, bench, where, 2)) == {"given up": 1, "finished": 1}

    def test_those_that_failed_do_not_count(self, bed, bench, where):
        study = studies.open_study(bed, where, **ONE)
        trying.measure_undefended(study, bench)
        trial = study.ask()
        trial.set_user_attr("error", "RuntimeError: no")
        study.tell(trial, state=TrialState.FAIL)
        study = worked(bed, bench, where, 2)
        assert states(study)["failed"] == 1
        assert len(study.trials) == 3

    def test_no_trial_begins_when_time_is_up_and_none_is_cut_short(
        self, bed, bench, where, monkeypatch
    ):
        monkeypatch.setattr(trying, "attacked", slow)
        study = worked(bed, bench, where, 50, seconds=1.5)
        assert 1 <= len(study.trials) <= 3
        assert set(states(study)) <= {"finished", "given up"}

    def test_with_no_time_at_all_nothing_is_tried(self, bed, bench, where):
        assert worked(bed, bench, where, 2, seconds=0.0).trials == []

    def test_asked_to_stop_it_stops_and_goes_on_another_time(self, bed, bench, where):
        errand = Errand(bed, where, **ONE, store=bench.store, until=4)

        def say(message):
            if message.get("trial") == 2:
                steps.ask_to_stop()

        with pytest.raises(KeyboardInterrupt):
            work(errand.study(), bench, errand, say)
        study = errand.study()
        assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2 + ["FAIL", "WAITING"]
        calls = notes(bench.store / "calls")
        study = worked(bed, bench, where, 4)
        assert tally(study) == {"done": 4, "stopped": 1}
        assert params(study)[3] == params(study)[2]
        new = notes(bench.store / "calls")
        assert new[: len(calls)] == calls
        assert len(set(new)) == len(new)

    def test_another_testbed_of_the_same_file_is_left_alone(self, bed, bench, where):
        mine = worked(bed, bench, where, 2)
        other = studies.open_study(bed, where, attacks=HOW["attacks"], seeds=[8])
        other.enqueue_trial(other.user_attrs["start"])
        before = params(mine)
        assert params(worked(bed, bench, where, 2)) == before
        assert states(other) == {"waiting": 1}


def slow(bench, *, defence, seed, lr, examples, settings=None, held=()):
    time.sleep(0.4)
    told = {"defence": defence, "seed": seed, "lr": lr, "examples": examples}
    return sweeps.pretended(bench, **told, settings=settings, held=held)


class TestTheDead:
    """Workers whose machine is gone: they told nobody."""

    @pytest.fixture
    def soon(self, monkeypatch):
        """Find the dead after two seconds."""
        monkeypatch.setattr(database, "HEARTBEAT", 1)
        monkeypatch.setattr(database, "GRACE", 2)

    def dead(self, bed, bench, where, lived, parts=6):
        """A trial of a process that died: `lived`, after its first sign of life."""
        study = studies.open_study(bed, where, **ONE)
        trying.measure_undefended(study, bench)
        trial = study.ask()
        if lived:
            study._storage.record_heartbeat(trial._trial_id)
        for name, kind in list(studies.space_of(study).items())[:parts]:
            trial._suggest(name, kind)
        return trial

    @pytest.mark.parametrize("parts", [0, 3, 6])
    def test_their_trial_is_tried_again(self, bed, bench, where, parts):
        trial = self.dead(bed, bench, where, True, parts)
        age(studies.open_study(bed, where, **ONE))
        study = worked(bed, bench, where, 3, seconds=20)
        assert tally(study) == {"stopped": 1, "done": 3}
        again = [t.params for t in study.trials if t.number != trial.number]
        assert any(found.items() >= trial.params.items() for found in again)
        assert len({studies.key_of(found) for found in again}) == 3

    @pytest.mark.parametrize("ago", [0, 60])
    def test_one_that_died_before_its_first_sign_of_life_holds_up_nobody(
        self, bed, bench, where, soon, ago
    ):
        trial = self.dead(bed, bench, where, False)
        age(studies.open_study(bed, where, **ONE), ago)
        study = worked(bed, bench, where, 1, seconds=12)
        assert study.trials[trial.number].state == TrialState.FAIL
        assert tally(study)["done"] == 1

    def test_one_that_lives_is_left_to_its_worker(self, bed, bench, where, soon):
        study = studies.open_study(bed, where, **ONE)
        trying.measure_undefended(study, bench)
        alive = study.ask()
        with trying.get_heartbeat_thread(alive._trial_id, study._storage):
            found = worked(bed, bench, where, 2, seconds=4)
        assert found.trials[alive.number].state == TrialState.RUNNING
        assert tally(found) == {"running": 1, "done": 1}

    def test_what_kills_each_worker_is_not_tried_for_ever(self, bed, bench, where):
        study = studies.open_study(bed, where, **ONE)
        study.enqueue_trial(study.user_attrs["start"])
        for _ in range(9):
            trial = study.ask()
            study._storage.record_heartbeat(trial._trial_id)
            trying._suggested(trial, study)
            age(study)
            optuna.storages.fail_stale_trials(study)
            if not states(study).get("waiting"):
                break
        assert states(study) == {"stopped": 1 + database.RETRIES}


class TestOneWanted:
    def test_a_trial_with_given_parameters_is_run_and_no_other(self, bed, bench, where):
        wanted = worked(bed, bench, where, 0).user_attrs["start"] | {"held": "last third"}
        study = worked(bed, bench, where, 0, params=wanted)
        assert params(study) == [wanted]
        assert states(study) == {"finished": 1}

    def test_one_that_waits_with_them_is_taken(self, bed, bench, where):
        study = studies.open_study(bed, where, **ONE)
        for alpha in (2.0, 3.0):
            study.enqueue_trial(study.user_attrs["start"] | {"alpha": alpha})
        wanted = study.user_attrs["start"] | {"alpha": 3.0}
        study = worked(bed, bench, where, 0, params=wanted)
        assert [t.state for t in study.trials] == [TrialState.WAITING, TrialState.COMPLETE]
        assert params(study)[1] == wanted


def deadly(bench, *, defence, seed, lr, examples, settings=None, held=()):
    """Be killed at this place as often as the store says; half a minute then goes by at once."""
    told = {"defence": defence, "seed": seed, "lr": lr, "examples": examples}
    plan = json.loads((bench.store / "deaths").read_text())
    died = len(notes(bench.store / "died"))
    if settings and (examples > 0) == plan["after"] and died < plan["times"]:
        note(bench.store / "died", os.getpid())
        with sqlite3.connect(plan["file"], timeout=30) as connection:
            connection.execute(
                "update trial_heartbeats set heartbeat = datetime(heartbeat, '-60 seconds')"
            )
        os.kill(os.getpid(), signal.SIGKILL)
    return sweeps.pretended(bench, **told, settings=settings, held=held)


def wrong(bench, *, defence, seed, lr, examples, settings=None, held=()):
    """Fail at the third trial, wherever that is."""
    if settings:
        note(bench.store / "asked", examples)
        if len(notes(bench.store / "asked")) > 4:
            raise RuntimeError("no\n  room left")
    return slow(
        bench, defence=defence, seed=seed, lr=lr, examples=examples, settings=settings, held=held
    )


def pressing(bench, **told):
    """Press Ctrl-C in the process that started this one, at the third trial; be stopped there."""
    if told.get("settings") and len(notes(bench.store / "calls")) > 2 + 2 * 2:
        with suppress(FileExistsError):
            (bench.store / "pressed").touch(exist_ok=False)
            os.kill(int((bench.store / "whose").read_text()), signal.SIGINT)
        for _ in range(3000):  # Half a minute, in which the word must come.
            time.sleep(0.01)
            steps.check()
    return slow(bench, **told)


class Stuck:
    """A judge that holds what belongs to this process."""

    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, prompts, answers):
        return sweeps.judge(prompts, answers)


class TestWorkers:
    def test_they_do_so_many_trials_and_are_gone(self, bed, bench, where):
        study = searched(bed, bench, where, 5, workers=2)
        assert len(study.trials) == 5
        assert set(states(study)) <= {"finished", "given up"}
        assert len({studies.key_of(found) for found in params(study)}) == 5
        assert params(study)[0] == study.user_attrs["start"]
        assert nothing_runs()

    def test_one_that_is_killed_is_replaced_and_its_trial_tried_again(
        self, bed, bench, tmp_path, where, monkeypatch
    ):
        calm = worked(bed, bench_of(bed, tmp_path / "calm"), tmp_path / "calm.db", 3)
        monkeypatch.setattr(trying, "attacked", deadly)
        plan = {"after": True, "times": 1, "file": str(where)}
        (bench.store / "deaths").write_text(json.dumps(plan))
        study = searched(bed, bench, where, 3)
        assert len(notes(bench.store / "died")) == 1
        assert tally(study) == {"done": 3, "stopped": 1}
        assert params(study)[0] == study.user_attrs["start"]
        one, other = sweeps.by_params(study), sweeps.by_params(calm)
        both = set(one) & set(other)
        assert studies.key_of(study.user_attrs["start"]) in both
        assert all(one[key] == other[key] for key in both)
        calls = notes(bench.store / "calls")
        assert len(calls) == len(set(calls))

    def test_they_do_not_die_for_ever(self, bed, bench, where, monkeypatch):
        monkeypatch.setattr(trying, "attacked", deadly)
        plan = {"after": False, "times": 99, "file": str(where)}
        (bench.store / "deaths").write_text(json.dumps(plan))
        with pytest.raises(KitError, match="died 3 times") as told:
            searched(bed, bench, where, 2)
        assert "\n" not in str(told.value)
        assert len(notes(bench.store / "died")) == search.DEATHS
        assert nothing_runs()
        # It was the machine, which is mended now.
        (bench.store / "deaths").write_text(json.dumps(plan | {"times": 0}))
        assert tally(searched(bed, bench, where, 2))["done"] == 2

    def test_an_error_ends_all_of_them_with_one_line(self, bed, bench, where, monkeypatch):
        monkeypatch.setattr(trying, "attacked", wrong)
        with pytest.raises(KitError, match="room left") as told:
            searched(bed, bench, where, 9, workers=2)
        assert "\n" not in str(told.value)
        assert nothing_runs()
        study = studies.open_study(bed, where, **ONE)
        found = states(study)
        assert 1 <= found["failed"] <= 2  # The other may have failed in the same moment.
        assert "running" not in found
        assert found.get("stopped", 0) == found.get("waiting", 0)

    # Where Python loses it, as in a callback of the garbage collector, the next check raises it.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_stopped_from_the_keyboard_they_leave_nothing_behind(
        self, bed, bench, where, monkeypatch
    ):
        monkeypatch.setattr(trying, "attacked", pressing)
        (bench.store / "whose").write_text(str(os.getpid()))
        with pytest.raises(KeyboardInterrupt), steps.interruptible():
            searched(bed, bench, where, 30, workers=2)
        assert nothing_runs()
        study = studies.open_study(bed, where, **ONE)
        found = tally(study)
        assert 2 <= found["done"] < 10
        assert "running" not in found
        assert 1 <= found["stopped"] == found["waiting"] <= 2
        monkeypatch.setattr(trying, "attacked", sweeps.pretended)
        again = tally(searched(bed, bench, where, 10, workers=2))
        assert again == {"done": 10, "stopped": found["stopped"]}

    def test_an_interrupt_that_python_lost_is_heard(self, bed, bench, where, monkeypatch):
        monkeypatch.setattr(trying, "attacked", slow)
        threading.Timer(1.5, steps.ask_to_stop).start()
        with pytest.raises(KeyboardInterrupt), steps.interruptible():
            searched(bed, bench, where, 12)
        assert nothing_runs()
        assert tally(studies.open_study(bed, where, **ONE))["done"] < 12

    @pytest.mark.parametrize(("trials", "workers"), [(-1, 1), (1.5, 1), (2, -1), (2, 1.5), (2, 0)])
    def test_bad_numbers_are_one_line(self, bed, bench, where, trials, workers):
        with pytest.raises(KitError):
            searched(bed, bench, where, trials, workers=workers)

    def test_a_judge_that_cannot_travel_is_one_line(self, bed, where, bench, monkeypatch):
        monkeypatch.setattr(search, "get_context", loky.get_context)
        stuck = bed.changed(scorers={"harmfulness": Stuck()})
        with pytest.raises(KitError, match=r"harmfulness|pickle") as told:
            searched(stuck, bench, where, 2)
        assert "\n" not in str(told.value)
        assert nothing_runs()

    def test_a_bar_counts_trials_from_those_there_are(self, bed, bench, where, capsys):
        worked(bed, bench, where, 1)
        searched(bed, bench, where, 3, progress="three trials")
        shown = capsys.readouterr().err
        assert "three trials" in shown
        assert "1/3" in shown
        assert "3/3" in shown
        assert "0/3" not in shown


class TestCommand:
    """`python -m repnoise_kit sweep`, in this process."""

    @pytest.fixture
    def words(self, bed, tmp_path, monkeypatch):
        own = bed.source.parent
        given = ["--model", own / "model", "--pairs", own / "pairs.json"]
        given += [
            "--retain",
            own / "retain.json",
            "--budget",
            "lab",
            "--storage",
            tmp_path / "x.db",
        ]
        given += ["--store", tmp_path / "store", "--out", tmp_path / "out", "--seeds", 1]
        return lambda *more: [*map(str, ["sweep", *given, *more])]

    def test_it_writes_tables_and_says_what_was_chosen(self, words, tmp_path, capsys):
        (tmp_path / "store").mkdir()
        asked = words("--trials", 3, "--report-seeds", 2, "--attack", "0.03:4", "--attack", "0.1:8")
        assert command.main(asked) == 0
        said = capsys.readouterr().out
        out = tmp_path / "out"
        study = archive.read_study(out / "sweep.csv")
        assert study.user_attrs["attacks"] == [[0.03, 4], [0.1, 8]]
        assert study.user_attrs["seeds"] == [100]
        assert len(study.trials) == 3
        best = choosing.winner(study)
        report = Result.load(out / "sweep_report.csv").frame
        assert set(report["trial"]) == {-1, 0, best}
        assert set(report["seed"]) == {0, 1}
        assert set(report["examples"]) == {0, 4, 8}
        assert str(out) in said
        assert str(tmp_path / "x.db") in said
        assert {path.name for path in out.iterdir()} == {
            *(f"sweep{part}.csv" for part in ("", "_report")),
            *(f"sweep{part}.json" for part in ("", "_cells", "_curves", "_report")),
            *("sweep_cells.parquet", "sweep_curves.parquet"),
            *("sweep_report_questions.parquet", "sweep_report_questions.json"),
        }
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        assert command.main(asked) == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files
        assert capsys.readouterr().out == said

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--first-seed", 4, "--report-seeds", 5], "seed 4 chooses"),
            (["--first-seed", 0], "seed 0 chooses"),
            (["--attack", "3e-4"], "3e-4:64"),
            (["--attack", "3e-4:64:1"], "3e-4:64"),
            (["--attack", "much:64"], "3e-4:64"),
            (["--attack", "nan:4"], "lr must be"),
            (["--attack", "-1:4"], ""),
            (["--attack", "3e-4:0"], "examples must be"),
            (["--attack", "3e-4:99999"], "99999"),
            (["--trials", 0], "at least 1"),
            (["--workers", 0], "at least 1"),
            (["--timeout", "long"], "timeout"),
        ],
    )
    def test_what_is_wrong_is_one_line_before_anything_runs(
        self, words, tmp_path, capsys, more, said
    ):
        assert command.main(words("--trials", 2, *more)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert said in err
        assert not (tmp_path / "store" / "calls").exists()
        assert not (tmp_path / "x.db").exists()

    def test_a_password_is_not_shown(self, words, capsys):
        url = "postgresql+psycopg://u:geheim@127.0.0.1:1/x"
        assert command.main([*words(), "--storage", url]) == 2
        shown = "".join(capsys.readouterr())
        assert "geheim" not in shown
        assert "127.0.0.1" in shown
