"""A study in one figure: which trial it shows, what it says, and that it leaves nothing behind."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
from made_up import NAME, SPACE, made_up, trial_of
from matplotlib.text import Text
from PIL import Image

from repnoise_kit import archive, choosing, overview, studies
from repnoise_kit.errors import KitError
from repnoise_kit.overview import SHOWS, draw, png

STUDY = made_up(60)
TABLE = studies.trials(STUDY).frame
DONE = TABLE[TABLE["state"] == "finished"]
PANELS = {"terms": 3, "importance": 2, "slices": 1}
every_show = pytest.mark.parametrize("show", SHOWS)


def title(figure):
    """The two lines above the panels."""
    return [text.get_text() for text in figure.texts]


def shown(figure):
    """The number of the trial that the title names."""
    return int(re.match(r"trial (\d+): ", title(figure)[0])[1])


def heights(ax):
    """The marks of each model in a panel of attacks."""
    return [np.asarray(part.lines[0].get_ydata(), float).tolist() for part in ax.containers]


def values(number, metric):
    rows = studies.trial_rows(STUDY, number).frame
    rows = rows[(rows["metric"] == metric) & (rows["group"] == "seen")]
    return rows.sort_values("examples")["value"].tolist()


def says(ax):
    return [text.get_text() for text in ax.texts]


# --- What is drawn ---


@every_show
@pytest.mark.parametrize("number", [0, 1, 5, 33])
def test_a_trial_stands_beside_the_undefended_model_and_among_all(show, number):
    figure = draw(STUDY, trial=number, show=show)
    recall, harmfulness, front, *lower = figure.axes
    assert len(lower) == PANELS[show]
    for ax, metric in ((recall, "recall"), (harmfulness, "harmfulness")):
        assert ax.get_title(loc="left").startswith(metric)
        assert heights(ax) == [values(None, metric), values(number, metric)]
    named = {part.get_label(): part for part in front.lines}
    assert sorted(named["trials"].get_ydata()) == sorted(DONE["utility"])
    best = studies.front(TABLE).sort_values("resistance")
    assert named["Pareto front"].get_ydata().tolist() == best["utility"].tolist()
    assert named["undefended"].get_ydata() == [choosing.undefended_utility(STUDY)] * 2
    mark = named["trial 1, the start" if number == 1 else f"trial {number}"]
    assert mark.get_ydata().tolist() == [TABLE["utility"][number]]
    assert "trial 1, the start" in named


def test_terms_are_those_of_the_trial():
    lower = draw(STUDY, trial=3).axes[3:]
    curves = studies.trial_curves(STUDY, 3).frame
    for ax, term in zip(lower, ("retain", "noise", "ascent"), strict=True):
        wide = curves[curves["metric"] == term].pivot(index="step", columns="seed", values="value")
        drawn = np.column_stack([line.get_ydata() for line in ax.lines[:2]])
        np.testing.assert_array_equal(drawn, wide)
        assert ax.get_title(loc="left").startswith(term)


def test_terms_of_what_runs_now_stand_in_their_place():
    rows = [(step, "noise", 9.0 - step, 7) for step in range(4)]
    live = pd.DataFrame(rows, columns=["step", "metric", "value", "seed"])
    for study in (STUDY, made_up(0)):
        lower = draw(study, live=live).axes[3:]
        assert lower[1].lines[0].get_ydata().tolist() == [9.0, 8.0, 7.0, 6.0]
        assert len(lower[0].lines[-1].get_ydata()) == 0
        assert all("runs now" in ax.get_title(loc="left") for ax in lower)


def test_importance_stands_beside_the_trials_in_their_order():
    bars, order = draw(STUDY, trial=3, show="importance").axes[3:]
    shares = studies.importance(STUDY).frame.set_index(["objective", "parameter"])["value"]
    for part in bars.containers:
        found = {
            name.get_text(): bar.get_width()
            for name, bar in zip(bars.get_yticklabels(), part, strict=True)
        }
        assert found == shares[part.get_label()].to_dict()
    marks = np.asarray(order.collections[0].get_offsets())
    in_order = DONE.sort_values("trial")["resistance"].tolist()
    assert marks[np.argsort(marks[:, 0]), 1].tolist() == in_order
    assert says(order) == ["trials as they were tried"]


def test_slices_are_of_what_was_varied():
    (panel,) = draw(STUDY, trial=3, show="slices").axes[3:]
    assert says(panel) == ["alpha", "beta", "lr", "pairs", "preset"]
    marks = np.asarray(panel.collections[0].get_offsets())
    for place in range(5):
        strip = marks[(place < marks[:, 0]) & (marks[:, 0] < place + 1)]
        assert sorted(strip[:, 1]) == sorted(DONE["resistance"])
    ticks = [text.get_text() for text in panel.get_xticklabels()]
    choices = [str(kind) for name in ("pairs", "preset") for kind in SPACE[name].choices]
    assert ticks[-len(choices) :] == choices


def test_a_trial_outside_the_bounds_is_seen_too():
    study = made_up(12)
    far = trial_of(50)
    far.params["alpha"] = 40.0
    far.distributions["alpha"] = optuna.distributions.FloatDistribution(0.1, 100, log=True)
    study.add_trial(far)
    (panel,) = draw(study, show="slices").axes[3:]
    across = np.asarray(panel.collections[0].get_offsets())[:, 0]
    assert across[across < 1].max() == pytest.approx(0.92)


# --- Which trial ---


def test_unasked_the_winner_is_shown():
    kept = DONE[DONE["utility"] >= choosing.undefended_utility(STUDY) - 0.1]
    assert len(kept) < len(DONE)
    best = max(kept.to_dict("records"), key=lambda row: row["resistance"])
    assert best["resistance"] < DONE["resistance"].max()
    assert shown(draw(STUDY)) == best["trial"]


@pytest.mark.parametrize(
    "wanted",
    [
        {"lr": 3e-5},
        {"lr": 1e-3, "alpha": 0.1},
        {"preset": "tokenwise", "pairs": 240, "beta": 100.0},
    ],
)
def test_parameters_show_the_finished_trial_nearest_to_them(wanted):
    def distance(row):
        gaps = [
            float(row[name] != value)
            if isinstance(value, str) or name == "pairs"
            else abs(np.log(row[name] / value)) / np.log(SPACE[name].high / SPACE[name].low)
            for name, value in wanted.items()
        ]
        return sum(gaps)

    figure = draw(STUDY, **wanted)
    assert shown(figure) == min(DONE.to_dict("records"), key=distance)["trial"]
    assert "It is the finished trial nearest to " in title(figure)[1]


def test_a_trial_that_has_what_is_wanted_is_not_called_the_nearest():
    own = TABLE[[*SPACE]].iloc[8].to_dict()
    figure = draw(STUDY, **own)
    assert shown(figure) == 8
    assert "nearest" not in title(figure)[1]
    assert f"lr {own['lr']:.2e}".replace("e-0", "e-") in title(figure)[0]
    assert title(figure)[0].endswith(f"pairs {own['pairs']}, preset {own['preset']}, held nothing")


def test_the_second_line_tells_of_the_study_and_of_a_trial_that_did_not_finish():
    assert title(draw(STUDY, trial=3))[1] == f"52 finished, 8 given up in {NAME}"
    said = title(draw(STUDY, trial=5))[1]
    assert said == f"Given up: it lost too much utility. 52 finished, 8 given up in {NAME}"


def test_a_trial_that_runs_is_shown_as_far_as_it_is():
    study = made_up(12)
    running = study.ask(fixed_distributions=SPACE)
    figure = draw(study, trial=running.number)
    assert title(figure)[1].startswith("Running. ")
    assert len(figure.axes[0].containers) == 1
    assert [says(ax) for ax in figure.axes[3:]] == [["no terms were kept"]] * 3


@every_show
def test_a_study_that_has_just_begun_says_so(show):
    study = made_up(0)
    figure = draw(study, show=show)
    assert title(figure) == ["no trial has finished yet", f"no trial in {NAME}"]
    assert heights(figure.axes[0]) == [values(None, "recall")]
    assert says(figure.axes[2]) == ["no trial was measured yet"]
    assert all(len(says(ax)) == 1 for ax in figure.axes[3:])
    png(figure)


@every_show
def test_a_study_without_the_undefended_model_is_drawn(show):
    study = optuna.create_study(directions=["maximize"] * 2)
    for key in ("space", "start"):
        study.set_user_attr(key, STUDY.user_attrs[key])
    figure = draw(study, show=show)
    assert [says(ax) for ax in figure.axes[:2]] == [["nothing was measured yet"]] * 2
    png(figure)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"show": "loss"}, "terms, importance, slices, not 'loss'"),
        ({"trial": 60}, "no trial 60, only 0 to 59"),
        ({"trial": -1}, "no trial -1"),
        ({"gamma": 1.0}, "no parameter 'gamma', only alpha, beta"),
        ({"preset": "mine"}, "preset is one of paper, reference, tokenwise, not 'mine'"),
        ({"lr": 0}, "lr must be a finite number greater than 0"),
        ({"lr": "high"}, "lr must be a finite number"),
        ({"trial": 3, "lr": 1e-4}, "not both"),
    ],
)
def test_what_cannot_be_shown_is_told(asked, told):
    with pytest.raises(KitError, match=re.escape(told)):
        draw(STUDY, **asked)


# --- Drawn hundreds of times ---


@every_show
def test_a_picture_has_its_size_and_nothing_is_left_open(show):
    before = dict(plt.rcParams)
    picture = Image.open(io.BytesIO(png(draw(STUDY, show=show))))
    assert (picture.format, picture.size) == ("PNG", (1180, 560))
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


@every_show
def test_no_words_leave_the_picture_or_lie_on_one_another(show):
    longest = {**TABLE[[*SPACE]].iloc[8].to_dict(), "lr": 1.11e-4, "alpha": 1.23, "beta": 0.0456}
    for asked in ({"trial": 5}, longest):
        figure = draw(STUDY, show=show, **asked)
        figure.draw_without_rendering()
        boxes = [
            (text.get_text(), text.get_window_extent())
            for text in written(figure)
            if text.get_visible() and text.get_text()
        ]
        assert len(boxes) > 50
        for place, (words, box) in enumerate(boxes):
            assert min(box.x0, box.y0, 1180 - box.x1, 560 - box.y1) >= 0, words
            assert not [other for other, its in boxes[:place] if box.overlaps(its)], words


def written(figure):
    """All texts of a figure but ticks beyond the limits, which are not drawn."""
    yield from figure.texts
    for ax in figure.axes:
        yield from (part for part in ax.get_children() if isinstance(part, Text))
        if ax.axison:
            yield from ax.get_legend().get_texts() if ax.get_legend() else ()
            for axis in (ax.xaxis, ax.yaxis):
                low, high = axis.get_view_interval()
                ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
                yield from (axis.label, *(tick.label1 for tick in ticks))


def test_threads_draw_what_one_alone_draws():
    asked = [{"trial": number, "show": show} for number in (3, 5) for show in SHOWS]
    alone = [png(draw(STUDY, **each)) for each in asked]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda each: png(draw(STUDY, **each)), asked)) == alone


def test_importance_is_worked_out_again_only_when_another_trial_has_finished(monkeypatch):
    study, counted = made_up(20), []
    monkeypatch.setattr(
        overview, "importance", lambda study: counted.append(1) or studies.importance(study)
    )
    for _ in range(3):
        before = draw(study, show="importance")
    assert len(counted) == 1
    study.add_trial(trial_of(21))
    after = draw(study, show="importance")
    assert len(counted) == 2
    widths = [[bar.get_width() for bar in one.axes[3].patches] for one in (before, after)]
    assert widths[0] != widths[1]


def test_a_study_read_from_its_tables_looks_the_same(tmp_path):
    again = archive.read_study(archive.save_study(STUDY, tmp_path / "study.csv"))
    for show in SHOWS:
        assert png(draw(again, trial=3, show=show)) == png(draw(STUDY, trial=3, show=show))
