"""Drawings of a sweep: what is drawn are the tables' numbers, read back from the axes."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from made_up import ATTACKS, made_up
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from repnoise_kit import plots, studies, style
from repnoise_kit.errors import KitError
from repnoise_kit.plots.sweep import short
from repnoise_kit.results import Result, stack

STUDY = made_up(40)
TRIALS = studies.trials(STUDY).frame
DONE = TRIALS[TRIALS["state"] == "finished"]
LOST = TRIALS[TRIALS["state"] == "given up"]
ROWS = stack(studies.trial_rows(STUDY, 3), studies.trial_rows(STUDY, None)).frame
SHARES = pd.DataFrame(
    [("lr", 0.6, 0.3), ("alpha", 0.1, 0.6), ("held", 0.3, 0.1)],
    columns=["parameter", "resistance", "utility"],
).melt("parameter", var_name="objective")

# As in `test_plots`: what each drawing is given and how many panels it has; what it cannot lack.
DRAWINGS = {
    "plot_trial": (ROWS, 1),
    "plot_front": (TRIALS, 1),
    "plot_importance": (SHARES, 1),
    "plot_slices": (TRIALS, 1),
}
WANTED = {"plot_trial": {"metric": "recall"}, "plot_slices": {"parameters": ["lr"]}}
NEEDED = {
    "plot_trial": ["lr", "examples", "group", "metric", "value", "low", "high"],
    "plot_front": ["trial", "state", "resistance", "utility"],
    "plot_importance": ["parameter", "objective", "value"],
    "plot_slices": ["trial", "state", "lr", "resistance", "utility"],
}
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name, data=None, **kwargs):
    data = DRAWINGS[name][0] if data is None else data
    return getattr(plots, name)(data, **WANTED.get(name, {}), **kwargs)


def words(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The points of the line of this name."""
    (found,) = [part for part in ax.lines if part.get_label() == label]
    return found


def pairs(frame, *columns):
    return sorted(map(tuple, frame[[*columns]].to_numpy(dtype=float).tolist()))


def points(artist):
    return sorted(map(tuple, np.asarray(artist, dtype=float).tolist()))


def numbers(ax):
    shown = [part.get_xydata().tolist() for part in ax.lines]
    shown += [np.asarray(part.get_offsets()).tolist() for part in ax.collections]
    return shown + [part.get_bbox().bounds for part in ax.patches]


# --- All of them ---


@every_drawing
def test_it_draws_in_a_new_figure_or_where_it_is_told_to(name):
    assert isinstance(drawn(name), Axes)
    assert plt.get_fignums() == [1]
    ax = plt.subplots()[1]
    plt.figure()
    assert drawn(name, ax=ax) is ax
    assert ax.has_data()
    assert plt.get_fignums() == [1, 2, 3]


@every_drawing
def test_a_result_is_drawn_as_its_table_which_it_leaves_alone(name):
    before = DRAWINGS[name][0].copy()
    one, other = drawn(name, before), drawn(name, Result(before))
    pd.testing.assert_frame_equal(before, DRAWINGS[name][0])
    assert numbers(one) == numbers(other) != []


@pytest.mark.parametrize(("name", "column"), [(n, c) for n in NEEDED for c in NEEDED[n]])
def test_it_names_the_column_it_lacks(name, column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        drawn(name, DRAWINGS[name][0].drop(columns=column))


# --- One trial under attack ---


@pytest.mark.parametrize("group", ["seen", "unseen"])
@pytest.mark.parametrize("metric", ["recall", "harmfulness", "utility"])
def test_both_models_stand_at_each_attack_with_their_intervals(metric, group):
    ax = plots.plot_trial(ROWS, metric=metric, group=group)
    assert words(ax.xaxis) == ["before", "3e-4\n64", "3e-4\n512"]
    assert legend(ax) == ["undefended", "RepNoise"]
    for part, defence in zip(ax.containers, ["none", "repnoise"], strict=True):
        rows = ROWS[(ROWS["defence"] == defence) & (ROWS["metric"] == metric)]
        rows = rows[rows["group"] == group].set_index(["lr", "examples"])
        mark, (bars,) = part.lines[0], part.lines[2]
        assert to_hex(mark.get_color()) == style.COLOURS[defence].lower()
        cells = [rows.loc[budget] for budget in [(0.0, 0), *map(tuple, ATTACKS)]]
        assert np.rint(mark.get_xdata().astype(float)).tolist() == [0, 1, 2]
        np.testing.assert_array_equal(mark.get_ydata(), [cell["value"] for cell in cells])
        ends = [sorted(y for _, y in segment) for segment in bars.get_segments()]
        np.testing.assert_allclose(ends, [[cell["low"], cell["high"]] for cell in cells])


def test_a_trial_that_met_no_attack_stands_before_it():
    before = (ROWS["defence"] == "none") | (ROWS["examples"] == 0)
    ax = plots.plot_trial(ROWS[before], metric="recall")
    assert np.rint(ax.containers[1].lines[0].get_xdata().astype(float)).tolist() == [0]


def test_a_metric_that_was_not_measured_is_told():
    with pytest.raises(KitError, match="no 'toxicity' of group 'seen'"):
        plots.plot_trial(ROWS, metric="toxicity")


# --- All trials ---


def beaten(table):
    """Whether another trial is as good in both objectives and better in one, one by one."""
    both = table[["resistance", "utility"]].to_numpy()
    return [any((b >= a).all() and (b > a).any() for b in both) for a in both]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_of_trials_that_no_other_betters(seed):
    draw = np.random.default_rng(seed)
    table = DONE.assign(
        resistance=draw.integers(0, 9, len(DONE)) / 9, utility=draw.integers(0, 9, len(DONE)) / 9
    )
    front = studies.front(table)
    best = table[~np.array(beaten(table))].drop_duplicates(["resistance", "utility"])
    assert pairs(front, "resistance", "utility") == pairs(best, "resistance", "utility")
    ax = plots.plot_front(table, front=front["trial"].tolist())
    joined = line(ax, "Pareto front").get_xydata()
    assert points(joined) == pairs(best, "resistance", "utility")
    # From left to right it falls.
    assert (np.diff(joined[:, 0]) > 0).all()
    assert (np.diff(joined[:, 1]) < 0).all()


def test_each_finished_trial_is_a_mark_and_each_given_up_an_open_one_at_the_edge():
    ax = plots.plot_front(TRIALS)
    done = line(ax, "trials")
    assert points(done.get_xydata()) == pairs(DONE, "resistance", "utility")
    lost = line(ax, "given up\n(no resistance)")
    assert sorted(lost.get_ydata()) == sorted(LOST["utility"])
    assert lost.get_markerfacecolor() == "none"
    # Left of every finished trial, whatever the numbers are.
    ax.figure.draw_without_rendering()
    across = lost.get_transform().transform(lost.get_xydata())[:, 0]
    inner = ax.transData.transform(done.get_xydata())[:, 0]
    assert ax.bbox.x0 < across.min() == across.max() < inner.min()


@pytest.mark.parametrize("chosen", [0, 3, 11])
def test_the_chosen_trial_is_the_one_marked(chosen):
    row = TRIALS.set_index("trial").loc[chosen]
    front = plots.plot_front(TRIALS, chosen=chosen)
    slices = plots.plot_slices(TRIALS, ["lr", "preset"], chosen=chosen)
    (mark,), (marks,) = (
        [part for part in ax.lines if part.get_markersize() == 9] for ax in (front, slices)
    )
    assert mark.get_xydata().tolist() == [[row["resistance"], row["utility"]]]
    places = [[x, y] for x, y in slices.collections[0].get_offsets() if y == row["resistance"]]
    assert marks.get_xydata().tolist() == places
    assert len(places) == 2


def test_the_trial_one_starts_from_is_marked_as_such():
    first = TRIALS.set_index("trial").loc[1, ["resistance", "utility"]].tolist()
    both = ["trial 1, the start", "trial 3"]
    for start, chosen, names in ((1, 3, both), (1, 1, both[:1]), (None, 3, both[1:])):
        ax = plots.plot_front(TRIALS, start=start, chosen=chosen)
        assert [name for name in legend(ax) if name.startswith("trial ")] == names
        if start:
            assert line(ax, "trial 1, the start").get_xydata().tolist() == [first]
    assert legend(plots.plot_front(DONE)) == ["trials"]


def test_a_chosen_trial_that_was_given_up_is_marked_at_the_edge():
    number = int(LOST["trial"].iloc[0])
    ax = plots.plot_front(TRIALS, chosen=number)
    mark, open_ones = line(ax, f"trial {number}"), line(ax, "given up\n(no resistance)")
    assert mark.get_xydata().tolist() == open_ones.get_xydata()[:1].tolist()


def test_a_trial_that_is_not_measured_yet_is_not_marked():
    running = TRIALS.assign(state=TRIALS["state"].where(TRIALS["trial"] != 3, "running"))
    assert "trial 3" not in legend(plots.plot_front(running, chosen=3))


# --- What matters ---


def test_bars_are_the_shares_and_the_most_telling_parameter_is_on_top():
    ax = plots.plot_importance(SHARES)
    assert words(ax.yaxis) == ["alpha", "held", "lr"]
    assert legend(ax) == ["resistance", "utility"]
    wide = SHARES.pivot_table(index="parameter", columns="objective", values="value")
    for bars, objective in zip(ax.containers, ["resistance", "utility"], strict=True):
        assert [bar.get_width() for bar in bars] == wide[objective].tolist()
        rows = [round(bar.get_y() + bar.get_height() / 2) for bar in bars]
        assert rows == [0, 1, 2]
    tops = [bars[0].get_y() for bars in ax.containers]
    assert tops[0] > tops[1]  # As the legend has them.


def test_without_a_share_a_word_says_why():
    ax = plots.plot_importance(SHARES.iloc[:0])
    assert [text.get_text() for text in ax.texts] == ["known after ten finished trials"]


# --- One parameter ---


def heights(ax):
    """Resistance (or utility) of each mark, and where it stands across."""
    return {height: across for across, height in np.asarray(ax.collections[0].get_offsets())}


@pytest.mark.parametrize("objective", ["resistance", "utility"])
@pytest.mark.parametrize("parameter", ["alpha", "lr", "trial"])
def test_each_finished_trial_stands_at_its_number(parameter, objective):
    ax = plots.plot_slices(TRIALS, ["beta", parameter], objective=objective)
    scaled = (lambda number: number) if parameter == "trial" else np.log
    strip = [(x - 1, y) for x, y in np.asarray(ax.collections[0].get_offsets()) if x > 1]
    across, height = map(np.array, zip(*sorted(strip, key=lambda mark: mark[1]), strict=True))
    rows = DONE.sort_values(objective)
    assert height.tolist() == rows[objective].tolist()
    numbers = scaled(rows[parameter].to_numpy(dtype=float))
    share = (numbers - numbers.min()) / (numbers.max() - numbers.min())
    assert across == pytest.approx(0.08 + 0.84 * share)
    # The ticks are of the same scale: what is written there stands there.
    ticks = zip(ax.get_xticks(), words(ax.xaxis), strict=True)
    named = {float(word): tick - 1 for tick, word in ticks if tick > 1}
    assert len(named) >= 2
    line_of = np.polyfit(numbers, across, 1)
    for word, tick in named.items():
        assert tick == pytest.approx(np.polyval(line_of, scaled(word)), abs=1e-6)


def test_each_parameter_has_its_name_and_its_strip():
    names = ["alpha", "preset", "trial"]
    ax = plots.plot_slices(TRIALS, names)
    across = np.asarray(ax.collections[0].get_offsets())[:, 0]
    assert np.histogram(across, bins=[0, 1, 2, 3])[0].tolist() == [len(DONE)] * 3
    said = {text.get_text(): text.get_position()[0] for text in ax.texts}
    assert said == {"alpha": 0.5, "preset": 1.5, "trials as they were tried": 2.5}
    assert ax.get_xlim() == (0, 3)


def test_choices_stand_side_by_side_in_their_order_with_a_jitter_that_stays():
    order = ["reference", "paper", "tokenwise", "another"]
    table = TRIALS.assign(preset=pd.Categorical(TRIALS["preset"], order))
    ax = plots.plot_slices(table, ["preset"])
    assert words(ax.xaxis) == order
    assert list(ax.get_xticks()) == [0.125, 0.375, 0.625, 0.875]
    rows = DONE.set_index("resistance")["preset"]
    places = heights(ax)
    assert len(set(places.values())) == len(DONE)
    for height, across in places.items():
        place = 4 * across - 0.5
        assert order[round(place)] == rows[height]
        assert abs(place - round(place)) <= 0.3
    few = heights(plots.plot_slices(table.head(20), ["preset"]))
    assert few.items() <= places.items()


def test_a_darker_mark_has_more_of_the_other_objective():
    ax = plots.plot_slices(TRIALS, ["lr", "alpha"])
    marks = ax.collections[0]
    marks.update_scalarmappable()
    light = marks.get_facecolors()[:, :3] @ [0.2126, 0.7152, 0.0722]
    utility = DONE.set_index("resistance")["utility"]
    known = [utility[height] for _, height in np.asarray(marks.get_offsets()).tolist()]
    assert (np.diff(light[np.argsort(known, kind="stable")]) <= 0).all()


def test_an_objective_that_is_none_is_told():
    with pytest.raises(KitError, match="resistance and utility, not 'recall'"):
        plots.plot_slices(TRIALS, ["lr"], objective="recall")


@pytest.mark.parametrize(
    ("value", "words"),
    [(1920, "1920"), (3e-5, "3e-5"), (0.25, "0.25"), (1.0, "1"), (1234.5, "1.23e3"), (0.0, "0"),
     (3.14159e-4, "3.14e-4"), (9.996e-4, "1e-3"), (0.01, "0.01"), ("paper", "paper")],
)  # fmt: skip
def test_numbers_are_written_briefly(value, words):
    assert short(value) == words
