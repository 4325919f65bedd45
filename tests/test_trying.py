"""A trial: its numbers are those of a defence and attacks by hand, however it was stopped."""

import copy
from itertools import pairwise

import numpy as np
import optuna
import pandas as pd
import pytest
import sweeps
import torch
from cells import notes
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from sweeps import HOW, age, bench_of, states

import repnoise_kit as rk
from repnoise_kit import bench as bench_room
from repnoise_kit import database, steps, studies, trying
from repnoise_kit.anatomy import frozen, parts
from repnoise_kit.search import Errand, work

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cheap_collections"),
    # What Optuna says of asking for trials, and of what it calls experimental.
    pytest.mark.filterwarnings("ignore:Heartbeat of storage"),
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return sweeps.tiny(tmp_path_factory.mktemp("own"))


@pytest.fixture
def bench(bed, tmp_path):
    return bench_of(bed, tmp_path / "store")


@pytest.fixture
def study(bed, tmp_path):
    return studies.open_study(bed, tmp_path / "x.db", **HOW)


@pytest.fixture
def pretending(monkeypatch):
    sweeps.pretend(monkeypatch)


def silent(message):
    pass


def asked(study, **params):
    """A trial with these parameters, for the rest those that the testbed starts from."""
    study.enqueue_trial(study.user_attrs["start"] | params)
    return study.ask()


def tried(study, bench, say=silent, **params):
    """Run such a trial and return what the study has of it."""
    trying.measure_undefended(study, bench)
    trial = asked(study, **params)
    trying.run_trial(study, trial, bench, say)
    return study.trials[trial.number]


def by_hand(bed, params, attacks, seeds, metric):
    """Resistance and utility, without cells, studies and intervals."""
    after, before = {attack: [] for attack in attacks}, []
    for seed in seeds:
        model = bed.model()
        count = len(parts(model).layers)
        third = {"nothing": (0, 0), "first third": (0, 1), "last third": (2, 3)}[params["held"]]
        still = [*range(third[0] * count // 3, third[1] * count // 3)]
        told = {name: params[name] for name in ("alpha", "beta", "lr", "preset")}
        with frozen(model, still):
            rk.defend_(model, bed, examples=params["pairs"], seed=seed, **told)
        before.append(rk.evaluate(model, bed).frame)
        for lr, examples in attacks:
            other = copy.deepcopy(model)
            rk.attack_(other, bed, lr=lr, examples=examples, seed=seed)
            after[lr, examples].append(rk.evaluate(other, bed).frame)

    def mean(tables, name):
        rows = pd.concat(tables)
        chosen = (rows["group"] == "seen") & (rows["metric"] == name)
        return rows[chosen]["value"].mean()

    harm = [mean(tables, metric) for tables in after.values()]
    return [1 - max(harm), mean(before, "utility")], harm


@pytest.mark.parametrize(
    ("utility", "metric", "seeds", "params"),
    [
        ("log_prob", "harmfulness", [7, 8], {"preset": "paper", "held": "nothing", "pairs": 12}),
        ("recall", "recall", [9], {"preset": "tokenwise", "held": "last third", "pairs": 6}),
    ],
)
def test_its_objectives_are_those_of_a_defence_and_attacks_by_hand(
    bed, tmp_path, monkeypatch, utility, metric, seeds, params
):
    monkeypatch.setattr(trying, "LOST", 1)  # These judges call a model useful by chance.
    bed = bed.changed(utility=utility)
    bench = bench_of(bed, tmp_path / "store")
    study = studies.open_study(bed, tmp_path / "x.db", attacks=HOW["attacks"], seeds=seeds)
    trial = tried(study, bench, **params)
    values, harm = by_hand(bed, trial.params, HOW["attacks"], seeds, metric)
    assert trial.state == TrialState.COMPLETE
    assert trial.values == pytest.approx(values, abs=2e-6)
    rows = studies.trial_rows(study, trial.number).frame
    kept = rows[(rows["group"] == "seen") & (rows["metric"] == metric)]
    assert kept["examples"].tolist() == [0, *(examples for _, examples in HOW["attacks"])]
    assert kept["value"].tolist()[1:] == pytest.approx(harm, abs=2e-6)
    assert len(set(harm)) == len(harm)  # or it would not show which attack was the worst


def test_the_undefended_model_is_measured_by_the_same_attacks(bed, bench, study):
    trying.measure_undefended(study, bench)
    rows = studies.trial_rows(study, None).frame
    seen = rows[(rows["group"] == "seen") & (rows["metric"] == "harmfulness")]
    for lr, examples, value in seen[["lr", "examples", "value"]].to_numpy():
        model = bed.model()
        if examples:
            rk.attack_(model, bed, lr=lr, examples=int(examples), seed=HOW["seeds"][0])
        frame = rk.evaluate(model, bed).frame
        chosen = (frame["group"] == "seen") & (frame["metric"] == "harmfulness")
        assert value == pytest.approx(frame[chosen]["value"].mean(), abs=2e-6)
    assert len(seen) == 1 + len(HOW["attacks"])


MADE = []


def caught(bench, *, defence, seed, lr, examples, settings=None, held=()):
    """Stand for `resistance.attacked`, and keep the model that it would attack."""
    if not examples and defence != "none":
        MADE.append(bench.defended(defence, seed, settings, held)[0])
    told = {"defence": defence, "seed": seed, "lr": lr, "examples": examples}
    return sweeps.pretended(bench, **told, settings=settings, held=held)


@pytest.mark.parametrize("held", studies.HELD)
def test_what_is_held_does_not_move_and_the_rest_does(
    bed, bench, study, pretending, monkeypatch, held
):
    monkeypatch.setattr(trying, "attacked", caught)
    MADE.clear()
    tried(study, bench, held=held)
    (model,) = MADE
    for number, layers in enumerate(zip(parts(bed.base).layers, parts(model).layers, strict=True)):
        weights = zip(*(layer.parameters() for layer in layers), strict=True)
        still = all(torch.equal(one, other) for one, other in weights)
        assert still == (held == ("first third", "middle third", "last third")[number])


class TestGivenUp:
    def test_once_utility_is_lost_no_attack_is_run(self, bed, tmp_path, monkeypatch):
        """A learning rate that ruins the model without making it infinite."""
        start = bed.settings["defence"] | {"lr": 0.5}
        ruined = bed.changed(settings={**bed.settings, "defence": start}, utility="log_prob")
        bench = bench_of(ruined, tmp_path / "store")
        study = studies.open_study(ruined, tmp_path / "x.db", **HOW)
        trying.measure_undefended(study, bench)
        attacked = []
        monkeypatch.setattr(bench_room, "attack_", lambda *a, **k: attacked.append(k))
        trial = tried(study, bench)
        assert trial.state == TrialState.PRUNED
        assert attacked == []
        row = studies.trials(study).frame.iloc[trial.number]
        assert row["state"] == "given up"
        assert row["note"].startswith("utility ")
        known = _utility(studies.trial_rows(study, None).frame)
        assert row["utility"] < known - trying.LOST
        assert f"{row['utility']:.2f}, undefended {known:.2f}" in row["note"]
        assert np.isnan(row["resistance"])
        assert set(studies.trial_rows(study, trial.number).frame["examples"]) == {0}
        assert len(studies.trial_curves(study, trial.number).frame)

    def test_settings_that_diverge_are_given_up_with_a_note(self, bed, tmp_path):
        start = bed.settings["defence"] | {"lr": 1e30}
        wild = bed.changed(settings={**bed.settings, "defence": start})
        bench = bench_of(wild, tmp_path / "store")
        trial = tried(studies.open_study(wild, tmp_path / "x.db", **HOW), bench)
        assert trial.state == TrialState.PRUNED
        assert trial.user_attrs["note"].startswith("the loss became")
        assert "\n" not in trial.user_attrs["note"]
        assert trial.user_attrs["seconds"] > 0

    @pytest.mark.parametrize(("lr", "kept"), [(0.0095, True), (0.0105, False)])
    def test_a_tenth_may_be_lost_and_no_more(self, bench, study, pretending, lr, kept):
        trial = tried(study, bench, lr=lr)
        assert trial.state == (TrialState.COMPLETE if kept else TrialState.PRUNED)
        calls = [line for line in notes(bench.store / "calls") if line.startswith("repnoise")]
        assert len(calls) == (1 + len(HOW["attacks"]) if kept else 1)


def _utility(rows):
    chosen = (rows["group"] == "seen") & (rows["metric"] == "utility") & (rows["examples"] == 0)
    return rows[chosen]["value"].iloc[0]


@pytest.mark.parametrize("turned", [False, True])
def test_it_is_judged_by_its_worst_attack(bed, tmp_path, pretending, turned):
    attacks = HOW["attacks"][::-1] if turned else HOW["attacks"]
    bench = bench_of(bed, tmp_path / "store")
    study = studies.open_study(bed, tmp_path / "x.db", attacks=attacks, seeds=[7, 8])
    trial = tried(study, bench)
    settings = trying.settings_of(trial.params)
    harm = [np.mean([sweeps.harm(settings, s, *attack) for s in (7, 8)]) for attack in attacks]
    assert trial.values[0] == pytest.approx(1 - max(harm), abs=1e-6)
    assert trial.values[1] == pytest.approx(
        np.mean([sweeps.use(settings, s) for s in (7, 8)]), abs=1e-6
    )


def test_the_undefended_model_is_measured_once(bench, study, pretending):
    for _ in range(3):
        tried(study, bench)
    calls = [line for line in notes(bench.store / "calls") if line.startswith("none")]
    assert len(calls) == 1 + len(HOW["attacks"])


def test_a_second_trial_with_the_same_parameters_is_done_at_once(bench, study, pretending):
    first = tried(study, bench)
    before = notes(bench.store / "calls")
    second = tried(study, bench)
    assert notes(bench.store / "calls") == before
    assert second.values == first.values


def test_what_it_tells(bed, bench, study):
    """Which trial it is, each step with its terms, and a share that only grows, to 1."""
    heard = []
    trial = tried(study, bench, heard.append, pairs=6)
    assert heard[0] == {"trial": trial.number, "params": trial.params}
    shares = [message["share"] for message in heard if "share" in message]
    assert all(one <= other for one, other in pairwise(shares))
    assert shares[-1] == 1
    told = [message for message in heard if "terms" in message]
    curves = studies.trial_curves(study, trial.number).frame
    defending = [message for message in told if "noise" in message["terms"]]
    for metric in ("retain", "noise", "ascent"):
        rows = curves[curves["metric"] == metric]
        assert [message["step"] for message in defending] == rows["step"].tolist()
        values = [message["terms"][metric] for message in defending]
        assert values == pytest.approx(rows["value"].tolist(), abs=1e-5)
    assert {message["seed"] for message in told} == set(HOW["seeds"])


def failing(bench, *, defence, seed, lr, examples, settings=None, held=()):
    raise RuntimeError("no\n  room left")


def test_an_exception_is_the_trials_error_and_it_is_not_tried_again(
    bench, study, pretending, monkeypatch
):
    trying.measure_undefended(study, bench)
    monkeypatch.setattr(trying, "attacked", failing)
    with pytest.raises(RuntimeError, match="room"):
        tried(study, bench)
    assert states(study) == {"failed": 1}
    assert studies.trials(study).frame["note"][0] == "RuntimeError: no room left"
    age(study)
    optuna.storages.fail_stale_trials(study)
    assert states(study) == {"failed": 1}


class TestStopped:
    def stop(self, study, bench, at=1):
        """Run a trial that is asked to stop once so many of its cells are done."""
        done = []

        def say(message):
            done.extend([message] * ("share" in message and "terms" not in message))
            if len(done) == at:
                steps.ask_to_stop()
                done.append("asked")

        trying.measure_undefended(study, bench)
        trial = asked(study)
        with pytest.raises(KeyboardInterrupt):
            trying.run_trial(study, trial, bench, say)
        assert not steps.stop_asked()
        return trial

    def test_it_is_to_be_tried_again_once(self, bench, study, pretending):
        trial = self.stop(study, bench)
        assert states(study) == {"stopped": 1, "waiting": 1}
        again = study.trials[1]
        assert again.state == TrialState.WAITING
        assert again.params == trial.params
        table = studies.trials(study).frame
        one, other = table[[*studies.PARAMETERS]].to_dict("records")
        assert one == other == trial.params

    def test_what_was_done_of_it_is_not_done_again(self, bench, study, pretending):
        trial = self.stop(study, bench, at=2)
        work(study, bench, Errand(bench.bed, until=1), silent)
        assert states(study) == {"stopped": 1, "finished": 1}
        calls = notes(bench.store / "calls")
        assert len(calls) == len(set(calls)) == 2 * (1 + len(HOW["attacks"]))
        settings = trying.settings_of(trial.params)
        worst = max(sweeps.harm(settings, 7, *attack) for attack in HOW["attacks"])
        assert study.trials[1].values == pytest.approx(
            [1 - worst, sweeps.use(settings, 7)], abs=1e-6
        )

    def test_within_a_training_it_goes_on_to_the_same_values(self, bed, bench, tmp_path):
        """Asked between two steps of the defence, and of an attack."""
        one = {"attacks": HOW["attacks"][1:], "seeds": HOW["seeds"]}
        whole = studies.open_study(bed, tmp_path / "whole.db", **one)
        values = tried(whole, bench_of(bed, tmp_path / "other")).values
        study = studies.open_study(bed, tmp_path / "halves.db", **one)
        trying.measure_undefended(study, bench)
        trial = asked(study)
        for kind in ("noise", "tokens"):

            def say(message, kind=kind):
                if kind in message.get("terms", ()) and message["step"] == 1:
                    steps.ask_to_stop()

            with pytest.raises(KeyboardInterrupt):
                trying.run_trial(study, trial, bench, say)
            trial = study.ask()
        trying.run_trial(study, trial, bench, silent)
        assert states(study) == {"stopped": 2, "finished": 1}
        assert study.trials[2].values == values

    def test_stopped_more_often_than_the_dead_are_tried_it_still_waits(
        self, bench, study, pretending
    ):
        self.stop(study, bench)
        for _ in range(database.RETRIES + 1):
            trial = study.ask()
            steps.ask_to_stop()
            with pytest.raises(KeyboardInterrupt):
                trying.run_trial(study, trial, bench, silent)
        assert states(study) == {"stopped": database.RETRIES + 2, "waiting": 1}

    def test_and_one_that_was_stopped_often_is_still_found_dead(self, bench, study, pretending):
        """Each Ctrl-C is no death."""
        self.stop(study, bench)
        for _ in range(database.RETRIES):
            trial = study.ask()
            steps.ask_to_stop()
            with pytest.raises(KeyboardInterrupt):
                trying.run_trial(study, trial, bench, silent)
        trial = study.ask()
        study._storage.record_heartbeat(trial._trial_id)
        age(study)
        optuna.storages.fail_stale_trials(study)
        assert states(study)["waiting"] == 1

    def test_taken_for_dead_and_then_stopped_it_has_one_successor(self, bench, study, pretending):
        def say(message):
            if message.get("share"):
                age(study)
                optuna.storages.fail_stale_trials(study)
                steps.ask_to_stop()

        trying.measure_undefended(study, bench)
        with pytest.raises(KeyboardInterrupt):
            trying.run_trial(study, asked(study), bench, say)
        assert states(study) == {"stopped": 1, "waiting": 1}


class TestTakenForDead:
    """The machine slept, and another worker took a trial for dead whose worker goes on."""

    def test_its_worker_goes_on_and_its_successor_finds_the_cells(self, bench, study, pretending):
        done = []

        def say(message):
            if message.get("share") and not done:
                done.append(message)
                age(study)
                optuna.storages.fail_stale_trials(study)

        trying.measure_undefended(study, bench)
        trial = asked(study)
        trying.run_trial(study, trial, bench, say)
        assert states(study) == {"stopped": 1, "waiting": 1}
        before = notes(bench.store / "calls")
        trying.run_trial(study, study.ask(), bench, silent)
        assert notes(bench.store / "calls") == before
        assert states(study) == {"stopped": 1, "finished": 1}
        assert study.trials[1].params == trial.params

    def test_so_does_one_that_was_taken_before_its_parameters_were_drawn(
        self, bench, study, pretending
    ):
        trying.measure_undefended(study, bench)
        trial = asked(study)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        trying.run_trial(study, trial, bench, silent)
        assert states(study) == {"stopped": 1}

    def test_a_successor_has_no_error_of_who_came_before(self, bench, study, pretending):
        """A worker may be killed after it wrote the error, before it failed the trial."""
        trying.measure_undefended(study, bench)
        trial = asked(study)
        trying._suggested(trial, study)
        trial.set_user_attr("error", "OSError: the disk is full")
        study._storage.record_heartbeat(trial._trial_id)
        age(study)
        optuna.storages.fail_stale_trials(study)
        for waiting in study.get_trials(states=(TrialState.WAITING,)):
            trying.run_trial(study, study.ask(), bench, silent)
            row = studies.trials(study).frame.iloc[waiting.number]
            assert (row["state"], row["note"]) == ("finished", "")


LENGTHS = st.integers(1, 400)


@given(LENGTHS, st.integers(0, 2**16))
def test_a_thinned_curve_is_the_means_of_stretches(length, seed):
    draw = np.random.default_rng(seed)
    values = draw.normal(size=length)
    steps_ = np.arange(1, length + 1)
    table = pd.DataFrame({"seed": 7, "metric": "noise", "step": steps_, "value": values})
    other = table.assign(metric="total")
    ((kept_seed, metric, steps_kept, kept),) = trying._thinned(pd.concat([table, other]))
    assert (kept_seed, metric) == (7, "noise")
    count = min(length, trying.POINTS)
    assert len(steps_kept) == len(kept) == count
    sizes = [length // count + (place < length % count) for place in range(count)]
    ends = np.cumsum(sizes)
    for step, value, end, size in zip(steps_kept, kept, ends, sizes, strict=True):
        assert step == pytest.approx(end - (size - 1) / 2, abs=1e-5)
        assert value == pytest.approx(sum(values[end - size : end]) / size, abs=1e-5)
