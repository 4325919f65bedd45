"""The panel, moved from Python as a hand would move it; it really trains, in another process."""

import os
import signal
import sys
import threading
import time
from types import ModuleType

import ipywidgets
import pytest
from made_up import made_up
from small import own_files

import repnoise_kit as rk
from repnoise_kit.archive import save_study
from repnoise_kit.studies import trials
from repnoise_kit.widgets import NEAREST, Panel, sweep

PATIENCE = 120


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A tiny model of its own, whose trials take a second or two."""
    room = own_files(tmp_path_factory.mktemp("own"))
    made = rk.testbed(
        room / "model", room / "pairs.json", retain=room / "retain.json", budget="lab", name="tiny"
    )
    made.settings["evaluation"]["max_new_tokens"] = 4
    return made


@pytest.fixture
def panel(bed, tmp_path):
    return sweep(bed, tmp_path / "study.db", attacks=[(1e-3, 2)], seeds=[7], store=tmp_path)


@pytest.fixture
def looked_at(bed, tmp_path):
    """A panel over forty trials that are known."""
    found = sweep(bed, tmp_path / "study.db", attacks=[(1e-3, 2)], seeds=[7], store=tmp_path)
    for trial in made_up(40).get_trials():
        if trial.params["pairs"] == 1920:
            found.study.add_trial(fitted(trial, found))
    found.refresh()
    return found


def fitted(trial, panel):
    """The same trial with the number of pairs and the bounds that this testbed's study has."""
    import optuna

    from repnoise_kit.studies import space_of

    space = space_of(panel.study)
    params = dict(trial.params)
    params["pairs"] = space["pairs"].choices[-1]
    for name in ("alpha", "beta", "lr"):
        params[name] = min(max(params[name], space[name].low), space[name].high)
    return optuna.create_trial(
        state=trial.state, params=params, distributions=space, values=trial.values,
        user_attrs=trial.user_attrs,
    )  # fmt: skip


def wait_until(come):
    ends = time.monotonic() + PATIENCE
    while not come():
        assert time.monotonic() < ends
        time.sleep(0.05)


def states(panel):
    return trials(panel.study).frame["state"].tolist()


def test_before_any_trial_it_says_so_and_offers_the_settings_one_starts_from(panel, bed):
    assert isinstance(panel, ipywidgets.VBox)
    assert "no trial yet" in panel.status.value
    start = bed.settings["defence"]
    assert panel.params()["alpha"] == start["alpha"]
    assert panel.params()["pairs"] == len(bed.splits.defence)
    assert bytes(panel.figure.value).startswith(b"\x89PNG")
    assert panel.error.value == ""


def test_moving_a_slider_draws_the_trial_that_is_nearest(looked_at):
    before = looked_at.figure.value
    looked_at.lr.value = 10**looked_at.lr.min
    low = looked_at.figure.value
    assert low != before
    looked_at.lr.value = 10**looked_at.lr.max
    assert looked_at.figure.value != low


def test_choosing_a_trial_moves_the_sliders_to_it_and_a_slider_lets_go_of_it(looked_at):
    table = trials(looked_at.study).frame.set_index("trial")
    number = int(table[table["state"] == "finished"].index[3])
    looked_at.trial.value = number
    assert looked_at.params() == table.loc[number, list(looked_at.params())].to_dict()
    looked_at.alpha.value = looked_at.alpha.value * 1.3
    assert looked_at.trial.value == NEAREST


def test_each_thing_to_show_is_another_figure(looked_at):
    drawn = set()
    for show in looked_at.show.options:
        looked_at.show.value = show
        drawn.add(looked_at.figure.value)
    assert len(drawn) == len(looked_at.show.options) == 3


def test_run_trains_in_another_process_and_shows_the_new_trial(panel, monkeypatch):
    panel.run_button.click()
    assert panel.run_button.disabled
    assert not panel.stop_button.disabled
    worker = panel.worker.process.pid
    assert worker != os.getpid()
    panel.join(PATIENCE)
    assert panel.error.value == ""
    assert states(panel) in (["finished"], ["given up"])
    assert panel.trial.value == 0
    assert not panel.run_button.disabled
    assert panel.stop_button.disabled
    panel.run_button.click()
    assert panel.worker is None
    assert "already" in panel.status.value


def test_stopped_it_is_kept_and_a_panel_opened_later_goes_on_with_it(bed, tmp_path):
    where = {"attacks": [(1e-3, 2)], "seeds": [7, 8], "store": tmp_path}
    first = sweep(bed, tmp_path / "study.db", **where)
    first.run_button.click()
    wait_until(lambda: first.bar.value > 0)
    first.stop_button.click()
    assert "stopping" in first.status.value
    first.join(PATIENCE)
    if "running" in states(first) or "stopped" not in states(first):
        pytest.skip("it had finished before it could be stopped")
    assert sorted(states(first)) == ["stopped", "waiting"]
    assert "Run goes on" in first.status.value
    later = sweep(bed, tmp_path / "study.db", **where)
    assert "1 waiting" in later.status.value
    later.trial.value = states(later).index("stopped")
    later.run_button.click()
    later.join(PATIENCE)
    assert later.error.value == ""
    assert not any("stopped" in words for words, _ in later.trial.options)
    assert sorted(states(later))[-1] == "stopped"
    assert len(states(later)) == 2


def test_a_search_runs_as_many_as_are_asked_for(panel):
    panel.count.value = 2
    panel.search_button.click()
    panel.join(PATIENCE)
    assert panel.error.value == ""
    assert len(states(panel)) == 2
    assert set(states(panel)) <= {"finished", "given up"}
    assert panel.bar.value == pytest.approx(1)


def test_what_goes_wrong_in_a_trial_is_one_line_and_the_panel_stays_of_use(bed, tmp_path):
    strict = bed.changed(scorers={"harmfulness": lambda asked, answers: [2.0] * len(answers)})
    found = sweep(strict, tmp_path / "s.db", attacks=[(1e-3, 2)], seeds=[7], store=tmp_path)
    found.run_button.click()
    found.join(PATIENCE)
    assert "must return a score in [0, 1]" in found.error.value
    assert "\n" not in found.error.value
    assert not found.run_button.disabled
    held = bed.changed(scorers={"harmfulness": threading.Lock().acquire})
    panel = sweep(held, tmp_path / "h.db", attacks=[(1e-3, 2)], seeds=[7], store=tmp_path)
    panel.run_button.click()
    assert "cannot be handed to another process" in panel.error.value
    assert panel.worker is None


def test_a_database_that_fails_is_one_line(looked_at, monkeypatch):
    def gone(*args, **kwargs):
        raise OSError("the disk is gone")

    monkeypatch.setattr("repnoise_kit.widgets.draw", gone)
    looked_at.alpha.value = looked_at.alpha.value * 1.1
    assert "the disk is gone" in looked_at.error.value
    monkeypatch.undo()
    looked_at.alpha.value = looked_at.alpha.value * 1.1
    assert looked_at.error.value == ""


def test_a_process_that_dies_is_told(panel):
    panel.run_button.click()
    os.kill(panel.worker.process.pid, signal.SIGKILL)
    panel.join(PATIENCE)
    assert "died" in panel.status.value
    assert not panel.run_button.disabled


def test_other_attacks_and_seeds_are_another_study(panel):
    panel.seeds.value = "8"
    assert panel.study.user_attrs["seeds"] == [8]
    panel.attacks.value = panel.attacks.options[0][1:]
    assert len(panel.study.user_attrs["attacks"]) == 1
    panel.seeds.value = "eight"
    assert "whole numbers" in panel.error.value
    panel.seeds.value = "9"
    assert panel.error.value == ""
    panel.attacks.value = ()
    assert "at least one" in panel.error.value


def test_a_study_that_was_saved_is_put_in_first(bed, looked_at, tmp_path):
    path = save_study(looked_at.study, tmp_path / "saved.csv")
    how = {"attacks": [(1e-3, 2)], "store": tmp_path, "known": path}
    fresh = sweep(bed, tmp_path / "fresh.db", seeds=[7], **how)
    known = trials(looked_at.study).frame.drop(columns=["trial"])
    assert trials(fresh.study).frame.drop(columns=["trial"]).equals(known)
    again = sweep(bed, tmp_path / "fresh.db", seeds=[7], **how)
    assert len(states(again)) == len(known)
    assert states(sweep(bed, tmp_path / "fresh.db", seeds=[8], **how)) == []


def test_every_part_has_words_and_the_panel_is_told_in_a_line(looked_at):
    parts = [part for part in vars(looked_at).values() if isinstance(part, ipywidgets.Widget)]
    named = (ipywidgets.HTML, ipywidgets.Image, ipywidgets.FloatProgress)
    for part in [*parts, *looked_at.parts.values()]:
        if not isinstance(part, named):
            assert part.description
    assert len(repr(looked_at)) < 110


def test_in_colab_what_newer_widgets_need_is_turned_on(bed, tmp_path, monkeypatch):
    called = []
    colab, output = ModuleType("google.colab"), ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: called.append(1)
    colab.output = output
    for name, module in (("google", ModuleType("google")), ("google.colab", colab)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "google.colab.output", output)
    for version, times in (("7.7.1", 0), ("8.1.5", 1)):
        monkeypatch.setattr(ipywidgets, "__version__", version)
        assert isinstance(sweep(bed, tmp_path / "c.db", attacks=[(1e-3, 2)]), Panel)
        assert len(called) == times
