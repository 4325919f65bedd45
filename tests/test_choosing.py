"""Choosing: the winner is the best that is of use, and is reported on seeds that did not choose."""

import numpy as np
import optuna
import pandas as pd
import pytest
import sweeps
from cells import notes
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import ABOUT, SPACE, made_up, trial_of
from optuna.trial import TrialState
from sweeps import bench_of

import repnoise_kit as rk
from repnoise_kit import archive, choosing, studies, trying
from repnoise_kit.errors import KitError
from repnoise_kit.search import Errand, work

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cheap_collections"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]
PARAMS = trial_of(0).params


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    bed = sweeps.tiny(tmp_path_factory.mktemp("own"))
    return bed.changed(settings={**bed.settings, "resistance": {"lr": (0.03,), "examples": (8,)}})


@pytest.fixture(scope="module")
def found(bed, tmp_path_factory):
    """A study of a real trial, the settings it starts from, and the folder of its cells."""
    folder = tmp_path_factory.mktemp("found")
    bench = bench_of(bed, folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trying, "LOST", 100)  # What a tiny model tells is chance.
        errand = Errand(bed, folder / "x.db", [(0.03, 8)], [7], bench.store, until=1)
        work(errand.study(), bench, errand, lambda message: None)
    return errand.study(), bench.store


OUTCOMES = st.tuples(
    st.integers(0, 4).map(lambda n: n / 4), st.integers(0, 20).map(lambda n: n / 20)
)


@given(st.lists(st.one_of(OUTCOMES, st.none()), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_winner_is_the_best_of_those_that_are_of_use(outcomes):
    study = made_up(0)
    kept = [[0.0, 0, "seen", "utility", 0.8, 0.7, 0.9], [1e-3, 8, "seen", "utility", 0.1, 0, 0.2]]
    study.set_user_attr("cells", kept)
    study.add_trials(
        [
            optuna.create_trial(
                state=TrialState.PRUNED if values is None else TrialState.COMPLETE,
                params=PARAMS, distributions=SPACE, values=values,
            )
            for values in outcomes
        ]
    )  # fmt: skip
    done = {number: values for number, values in enumerate(outcomes) if values}
    if not done:
        with pytest.raises(KitError, match="no finished trial"):
            choosing.winner(study)
        return
    useful = {n: v for n, v in done.items() if v[1] >= 0.8 - trying.LOST - 1e-12} or done
    best = max(useful.values())
    assert choosing.winner(study) == min(n for n, values in useful.items() if values == best)
    assert choosing.undefended_utility(study) == 0.8


def test_the_trial_it_started_from_is_the_finished_one():
    study = made_up(5)
    assert choosing.started_from(study) == 1
    other = made_up(1)
    assert choosing.started_from(other) is None
    for state in (TrialState.PRUNED, TrialState.WAITING):
        told = {} if state == TrialState.WAITING else {"distributions": SPACE}
        told |= {"params": ABOUT["start"]} if told else {}
        other.add_trial(optuna.create_trial(state=state, **told))
    other.enqueue_trial(ABOUT["start"])
    assert choosing.started_from(other) is None
    other.add_trial(trial_of(1))
    assert choosing.started_from(other) == len(other.trials) - 1


def test_its_rows_are_those_of_the_grid(bed, found, tmp_path):
    """The settings that a testbed starts from are the grid's RepNoise."""
    study, store = found
    report = rk.report_trials(bed, study, [0], [3], store)
    grid = rk.resistance_grid(bed, [3], tmp_path / "store", defences=["none", "repnoise"])
    keys = ["defence", "examples", "lr", "group", "metric", "prompt", "seed"]
    mine, theirs = (rows.frame.sort_values(keys).reset_index(drop=True) for rows in (report, grid))
    expected = {"none": choosing.UNDEFENDED, "repnoise": 0}
    assert (mine["trial"] == mine["defence"].map(expected)).all()
    columns = [*keys, "value", "response"]
    pd.testing.assert_frame_equal(mine[columns], theirs[columns], check_exact=True)
    assert report.made_with["seeds"] == [3]
    assert report.made_with["study"] == study.study_name


@pytest.mark.parametrize("seeds", [[7], [3, 7], range(8)])
def test_seeds_that_chose_are_refused(bed, found, seeds):
    study, store = found
    before = sorted(store.glob("*/*"))
    with pytest.raises(KitError, match="seed 7 chooses the trials"):
        rk.report_trials(bed, study, [0], seeds, store)
    assert sorted(store.glob("*/*")) == before


@pytest.mark.parametrize("number", [-1, 1, 99])
def test_a_trial_that_is_not_there_is_said(bed, found, number):
    with pytest.raises(KitError, match=f"no trial {number}, only 0 to 0"):
        rk.report_trials(bed, found[0], [0, number], [3], found[1])


class TestPretended:
    @pytest.fixture
    def study(self, bed, tmp_path, monkeypatch):
        sweeps.pretend(monkeypatch)
        bench = bench_of(bed, tmp_path / "store")
        errand = Errand(bed, tmp_path / "x.db", **sweeps.HOW, store=bench.store, until=2)
        work(errand.study(), bench, errand, lambda message: None)
        return errand.study()

    @pytest.fixture
    def calls(self, tmp_path):
        return lambda: notes(tmp_path / "store" / "calls")

    def test_a_trial_is_measured_with_its_very_settings(self, bed, study, calls, tmp_path):
        """Though another trial of the study was cut short while its parameters were drawn."""
        half = study.ask()
        half.suggest_float("alpha", *_bounds(study, "alpha"), log=True)
        study.tell(half, state=TrialState.FAIL)
        before = calls()
        rows = rk.report_trials(bed, study, [0, 1], [3, 4], tmp_path / "store").frame
        new = calls()[len(before) :]
        assert len(new) == len(set(new)) == 3 * 2 * (1 + len(sweeps.ATTACKS))
        assert set(map(_without_seed, before)) == set(map(_without_seed, new))
        for trial in study.trials[:2]:
            told = trying.settings_of(trial.params)
            for seed in (3, 4):
                for attack in sweeps.ATTACKS:
                    own = (rows["trial"] == trial.number) & (rows["seed"] == seed)
                    own &= (rows["lr"] == attack[0]) & (rows["examples"] == attack[1])
                    values = rows[own & (rows["metric"] == "harmfulness")]["value"]
                    assert np.allclose(values, sweeps.harm(told, seed, *attack))

    def test_one_without_parameters_is_refused_in_one_line(self, bed, study, tmp_path):
        trial = study.ask()
        study.tell(trial, state=TrialState.FAIL)
        with pytest.raises(KitError) as told:
            rk.report_trials(bed, study, [trial.number], [3], tmp_path / "store")
        assert "\n" not in str(told.value)

    def test_it_is_written_with_what_it_is_worth_in_words(self, bed, study, tmp_path):
        rows = rk.report_trials(bed, study, [0, 1], [3, 4], tmp_path / "store")
        said = choosing.write(study, rows, tmp_path / "out", "the command")
        assert "chosen on seeds 7\n" in said
        assert "measured on seeds 3, 4\n" in said
        words = choosing.in_words(rows.frame)
        assert words.shape == (3 * 3, 1 + len(sweeps.ATTACKS))
        for (metric, trial), texts in words.iterrows():
            number = choosing.UNDEFENDED if trial == "undefended" else trial
            for (lr, examples), text in texts.items():
                own = rows.frame[
                    (rows.frame["metric"] == metric) & (rows.frame["group"] == "seen")
                    & (rows.frame["trial"] == number) & (rows.frame["examples"] == examples)
                    & (rows.frame["lr"] == lr)
                ]  # fmt: skip
                assert text.startswith(f"{own['value'].mean():.2f}")
        kept = rk.Result.load(tmp_path / "out" / "sweep_report.csv")
        assert kept.made_with["command"] == "the command"
        seen = (kept.frame["trial"] == 1) & (kept.frame["metric"] == "utility")
        assert set(kept.frame[seen]["seed"]) == {3, 4}
        settled = trying.settings_of(study.trials[1].params)
        assert kept.frame[seen]["value"].min() == pytest.approx(sweeps.use(settled, 4))
        again = archive.read_study(tmp_path / "out" / "sweep.csv")
        assert choosing.winner(again) == choosing.winner(study)


def _without_seed(line):
    defence, _, rest = line.split(" ", 2)
    return defence, rest


def _bounds(study, name):
    kind = studies.space_of(study)[name]
    return kind.low, kind.high
