"""Drawings of the four criteria: what is drawn are the table's numbers, read back from the axes."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from repnoise_kit import plots, style
from repnoise_kit.errors import KitError
from repnoise_kit.headlines import HEADLINES
from repnoise_kit.results import Result
from repnoise_kit.stats import interval

SEEDS, PROMPTS = range(3), [f"question {n}" for n in range(4)]


def made(columns: str, rows) -> pd.DataFrame:
    """A table of these rows, for each seed and prompt, each with a random value, in no order."""
    rows = [(*row, seed, prompt) for row in rows for seed in SEEDS for prompt in PROMPTS]
    table = pd.DataFrame(rows, columns=[*columns.split(), "seed", "prompt"])
    draw = np.random.default_rng(sum(map(ord, columns)))
    table = table.assign(value=draw.uniform(0.3, 0.7, len(table)))
    return table.sample(frac=1, random_state=2).reset_index(drop=True)


NAMES = ["weight_noise_matched", "repnoise", "none"]


def headlines() -> pd.DataFrame:
    """What `criteria_table` returns, the undefended model last."""
    draw = np.random.default_rng(4)
    rows = [
        {"criterion": criterion, "defence": name, "metric": metric, "value": value}
        | {"low": value - 0.1 * draw.random(), "high": value + 0.1 * draw.random()}
        for criterion in reversed(HEADLINES)
        for metric in HEADLINES[criterion]
        for name in NAMES
        for value in [draw.uniform(0.2, 0.8)]
    ]
    return pd.DataFrame(rows)


def withheld() -> pd.DataFrame:
    models = [("repnoise", "all"), ("repnoise", "the rest"), ("none", "all")]
    cells = itertools.product(models, ["b", "half", "a"], ["recall", "harmfulness"], [1e-3, 3e-3])
    rows = [(*model, *rest) for model, *rest in cells]
    return made("defence saw withheld metric lr", rows)


STEPS = [0, 1, 2, 4, 8, 11]


def learning() -> pd.DataFrame:
    rows = itertools.product(["repnoise", "none"], ["letters", "diaries"], ["learning"], STEPS)
    curve = made("defence task stage step", rows).assign(metric="rouge1")
    after = made("defence task stage step", [("none", "diaries", "learned", 11)])
    return pd.concat([curve, after.assign(metric="recall", value=0.9)], ignore_index=True)


PAIRS = [(0, "one pass"), (4, "one pass"), (4, "as of all"), (8, "one pass"), (8, "as of all"),
         (16, "one pass")]  # fmt: skip


def samples() -> pd.DataFrame:
    budgets = [(0.0, 0), (1e-3, 4), (3e-3, 8)]
    cells = itertools.product(PAIRS, budgets, ["recall", "harmfulness"], ["seen", "unseen"])
    rows = [(*pairs, *budget, *rest) for pairs, budget, *rest in cells]
    return made("pairs steps lr examples metric group", rows)


CELLS, WITHHELD, LEARNING, SAMPLES = headlines(), withheld(), learning(), samples()
# As in `test_plots`: what each drawing is given, and how many panels it has; what it cannot lack.
DRAWINGS = {
    "plot_criteria": (CELLS, 4),
    "plot_withheld": (WITHHELD, 1),
    "plot_learning": (LEARNING, 2),
    "plot_samples": (SAMPLES, 1),
}
NEEDED = {
    "plot_criteria": (CELLS, ["criterion", "metric", "value", "high"]),
    "plot_withheld": (WITHHELD, ["withheld", "saw", "metric", "value", "seed"]),
    "plot_learning": (LEARNING, ["task", "stage", "step", "metric", "value", "seed"]),
    "plot_samples": (SAMPLES, ["pairs", "steps", "examples", "metric", "group", "value", "seed"]),
}
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name, data=None, **kwargs):
    return getattr(plots, name)(DRAWINGS[name][0] if data is None else data, **kwargs)


def where(name):
    count = DRAWINGS[name][1]
    panels = plt.subplots(1, count, squeeze=False)[1][0]
    return ({"ax": panels[0]} if count == 1 else {"axes": panels}), list(panels)


def words(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def marks(ax):
    """Of each set of marks with intervals: its line, and (x, y, low, high) of each mark."""
    found = []
    for part in ax.containers:
        line, (bars,) = part.lines[0], part.lines[2]
        across = line.get_marker() and all(
            np.ptp([y for _, y in s]) == 0 for s in bars.get_segments() if len(s)
        )
        ends = [sorted(point[0 if across else 1] for point in s) for s in bars.get_segments()]
        found.append((line, np.column_stack([line.get_xdata(), line.get_ydata(), ends])))
    return found


def chosen(frame, **tags):
    for name, value in tags.items():
        frame = frame[frame[name] == value]
    return frame


def cell_of(rows):
    """Mean and interval of a seeds × questions table, rows of one of both averaged first."""
    table = rows.groupby(["seed", "prompt"])["value"].mean().unstack()
    return interval(table.to_numpy())


# --- All of them ---


@every_drawing
def test_it_draws_in_a_new_figure_or_where_it_is_told_to(name):
    count = DRAWINGS[name][1]
    found = np.atleast_1d(drawn(name))
    assert [type(ax) for ax in found] == [Axes] * count
    assert plt.get_fignums() == [1]
    given, axes = where(name)
    plt.figure()
    found = np.atleast_1d(drawn(name, **given))
    assert all(one is other for one, other in zip(found, axes, strict=True))
    assert all(ax.has_data() for ax in axes)
    assert plt.get_fignums() == [1, 2, 3]


@every_drawing
def test_a_result_is_drawn_as_its_table_which_it_leaves_alone(name):
    before = DRAWINGS[name][0].copy()
    both = [np.atleast_1d(drawn(name, data)) for data in (before, Result(before))]
    pd.testing.assert_frame_equal(before, DRAWINGS[name][0])
    for one, other in zip(*both, strict=True):
        assert len(one.lines) == len(other.lines) > 0
        for ours, theirs in zip(one.lines, other.lines, strict=True):
            np.testing.assert_array_equal(ours.get_xydata(), theirs.get_xydata())


@pytest.mark.parametrize("name", ["plot_criteria", "plot_learning"])
def test_a_wrong_number_of_panels_is_told(name):
    count = DRAWINGS[name][1]
    for wrong in (1, count + 1):
        axes = plt.subplots(1, wrong, squeeze=False)[1][0]
        with pytest.raises(KitError, match=f"has {count} panels, and {wrong} axes were given"):
            drawn(name, axes=axes)


@pytest.mark.parametrize(("name", "column"), [(n, c) for n in NEEDED for c in NEEDED[n][1]])
def test_it_names_the_column_it_lacks(name, column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        drawn(name, NEEDED[name][0].drop(columns=column))


@every_drawing
@pytest.mark.parametrize("key", ["c", "color"])
def test_the_callers_colour_wins_under_either_name(name, key):
    for ax in np.atleast_1d(drawn(name, **{key: "#123456"})):
        assert {to_hex(line.get_color()) for line in ax.lines} == {"#123456"}


# --- The four criteria ---

ORDER = ["none", "repnoise", "weight_noise_matched"]
SAID = ["undefended", "RepNoise", "weight noise, matched"]


@pytest.mark.parametrize("new", [True, False])
def test_each_headline_is_a_mark_in_its_panel_and_row(new):
    panels = plots.plot_criteria(CELLS, **({} if new else where("plot_criteria")[0]))
    # Panels of our own share their rows, which are named at the first.
    assert [words(ax.yaxis) for ax in panels] == [SAID, *[[] if new else SAID] * 3]
    assert [ax.get_title() for ax in panels] == list(HEADLINES)
    for ax, (criterion, metrics) in zip(panels, HEADLINES.items(), strict=True):
        bottom, top = ax.get_ylim()
        assert bottom > top  # the first row is above
        found = {}
        for line, points in marks(ax):
            ((x, y, low, high),) = points
            row = round(y - 0.04)
            hollow = line.get_markerfacecolor() == "white"
            assert abs(y - row) < 0.3
            assert to_hex(line.get_color()) == to_hex(style.look(ORDER[row])["color"])
            assert line.get_marker() == style.look(ORDER[row])["marker"]
            found[ORDER[row], "open" if hollow else "full"] = (x, low, high)
        second = "exact" if criterion == "trainability" else "harmfulness"
        kinds = {"full": metrics[0], "open": second}
        cells = CELLS[CELLS["criterion"] == criterion].set_index(["defence", "metric"])
        expected = {
            (name, kind): tuple(cells.loc[(name, metric), ["value", "low", "high"]])
            for kind, metric in kinds.items()
            for name in NAMES
            if metric in metrics
        }
        assert found.keys() == expected.keys()
        for key, numbers in expected.items():
            assert found[key] == pytest.approx(numbers)


def test_the_band_is_the_interval_of_the_undefended():
    for ax, (criterion, metrics) in zip(plots.plot_criteria(CELLS), HEADLINES.items(), strict=True):
        (band,) = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
        cells = CELLS.set_index(["criterion", "defence", "metric"])
        low, high = cells.loc[(criterion, "none", metrics[0]), ["low", "high"]]
        assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((low, high))


def test_of_the_criteria_those_that_were_measured_are_drawn():
    rows = CELLS[CELLS["criterion"].isin(["trainability", "resistance"])]
    rows = rows[(rows["defence"] != "none") | (rows["criterion"] == "resistance")]
    panels = plots.plot_criteria(rows)
    assert [ax.get_title() for ax in panels] == ["resistance", "trainability"]
    assert [len(marks(ax)) for ax in panels] == [6, 4]
    assert [len(ax.patches) for ax in panels] == [1, 0]
    # A row for each defence, measured there or not.
    assert words(panels[0].yaxis) == SAID
    assert {ax.get_ylim() for ax in panels} == {(2.5, -0.5)}


def test_rows_of_questions_are_summarised_first():
    from repnoise_kit.headlines import criteria_table

    rows = made("criterion defence metric", [("stability", n, "recall") for n in NAMES])
    rows = rows.assign(examples=1, group="seen", saw="all", withheld="a", stage="", step=0, task="")
    one, other = (plots.plot_criteria(table)[0] for table in (rows, criteria_table(rows)))
    assert len(marks(one)) == 3
    for (_, ours), (_, theirs) in zip(marks(one), marks(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("plot_criteria", lambda t: t["criterion"] == "resistence"),
        ("plot_learning", lambda t: t["stage"] == "learned"),
    ],
)
def test_a_table_without_anything_to_draw_is_told(name, wrong):
    rows = DRAWINGS[name][0]
    try:
        drawn(name, rows[wrong(rows)])
    except KitError:
        return


# --- What was withheld ---


@pytest.mark.parametrize("metric", ["recall", "harmfulness"])
def test_each_withheld_category_has_its_three_models(metric):
    ax = plots.plot_withheld(WITHHELD, metric)
    there = words(ax.yaxis)
    assert sorted(there) == ["a", "b", "half"]
    said = {
        "undefended": ("none", "all"),
        "RepNoise, saw all": ("repnoise", "all"),
        "RepNoise, saw the rest": ("repnoise", "the rest"),
    }
    assert legend(ax) == list(said)
    heights = []
    for (line, points), (defence, saw) in zip(marks(ax), said.values(), strict=True):
        assert (line.get_markerfacecolor() == "white") == (saw == "the rest")
        assert to_hex(line.get_color()) == to_hex(style.look(defence)["color"])
        heights.append(points[:, 1])
        for what, (x, y, low, high) in zip(there, points, strict=True):
            assert round(y) == there.index(what)
            rows = chosen(WITHHELD, defence=defence, saw=saw, withheld=what, metric=metric)
            assert (x, low, high) == pytest.approx(tuple(cell_of(rows)))
    assert (np.diff(heights, axis=0) > 0).all()  # side by side, in this order
    assert metric in ax.get_xlabel()


def test_a_category_that_was_not_measured_of_one_model_is_left_blank():
    rows = WITHHELD[(WITHHELD["saw"] == "all") | (WITHHELD["withheld"] != "a")]
    ax = plots.plot_withheld(rows)
    blank = [np.isnan(points[:, 0]).sum() for _, points in marks_or_blank(ax)]
    assert blank == [0, 0, 1]


def marks_or_blank(ax):
    return [(part.lines[0], np.asarray(part.lines[0].get_xydata())) for part in ax.containers]


def test_several_defences_at_once_are_refused():
    more = pd.concat([WITHHELD, WITHHELD.assign(defence="vaccine")])
    with pytest.raises(KitError, match="has the defences vaccine, repnoise; choose"):
        plots.plot_withheld(more)


def test_a_metric_that_is_not_there_is_told():
    with pytest.raises(KitError):
        plots.plot_withheld(WITHHELD, "recal")


@pytest.mark.parametrize("name", ["plot_withheld", "plot_learning", "plot_samples"])
def test_no_interval_of_a_share_leaves_its_range(name):
    rows = DRAWINGS[name][0]
    rows = rows[rows["prompt"].isin(PROMPTS[:2]) & (rows["seed"] == 0)]
    rows = rows.assign(value=(rows["prompt"] == PROMPTS[0]).astype(float))
    for ax in np.atleast_1d(drawn(name, rows)):
        bars = [s for part in ax.containers for s in part.lines[2][0].get_segments()]
        bands = [path.vertices for part in ax.collections for path in part.get_paths()]
        place = 0 if name == "plot_withheld" else 1
        ends = np.concatenate(bars or bands)[:, place]
        assert ends.min() >= 0
        assert ends.max() <= 1


# --- Learning ---


def test_each_task_has_a_line_a_defence_through_its_steps():
    panels = plots.plot_learning(LEARNING)
    tasks = list(dict.fromkeys(LEARNING["task"]))
    assert [ax.get_title() for ax in panels] == tasks
    for ax, task in zip(panels, tasks, strict=True):
        assert [line.get_label() for line in ax.lines] == ["undefended", "RepNoise"]
        bands = [part.get_paths()[0].vertices for part in ax.collections]
        for line, band, name in zip(ax.lines, bands, ["none", "repnoise"], strict=True):
            assert line.get_xdata().tolist() == STEPS
            for step, y in line.get_xydata():
                rows = chosen(LEARNING, defence=name, task=task, step=step, stage="learning")
                value, low, high = cell_of(rows)
                assert y == pytest.approx(value)
                edges = band[band[:, 0] == step][:, 1]
                assert (edges.min(), edges.max()) == pytest.approx((low, high))
        assert ax.get_xscale() == "symlog"
    assert legend(panels[-1]) == ["undefended", "RepNoise"]


def test_a_lesson_of_one_seed_that_ended_early_is_drawn_as_far_as_it_goes():
    early = (LEARNING["seed"] == 1) & (LEARNING["step"] == 11) & (LEARNING["stage"] == "learning")
    for ax in plots.plot_learning(LEARNING[~early]):
        assert [line.get_xdata().tolist() for line in ax.lines] == [STEPS] * 2


# --- Fewer pairs ---


@pytest.mark.parametrize(("metric", "group"), [("recall", "seen"), ("harmfulness", "unseen")])
def test_a_mark_is_a_number_of_pairs_over_all_budgets(metric, group):
    ax = plots.plot_samples(SAMPLES, metric, group=group)
    assert legend(ax) == ["one pass over them", "as many steps as of all"]
    for (_, points), steps in zip(marks(ax), ["one pass", "as of all"], strict=True):
        assert points[:, 0].tolist() == [0, 4, 8, 16]
        for pairs, y, low, high in points:
            tags = {"pairs": pairs, "steps": steps if pairs in (4, 8) else "one pass"}
            rows = chosen(SAMPLES, **tags, metric=metric, group=group)
            rows = rows[rows["examples"] > 0]  # before an attack nothing is given away
            assert (y, low, high) == pytest.approx(tuple(cell_of(rows)))
    assert ax.get_xticks().tolist() == [0, 4, 8, 16]
    assert words(ax.xaxis) == ["none", "4", "8", "16"]
    assert metric in ax.get_ylabel()


@pytest.mark.parametrize("how", [{"metric": "recal"}, {"group": "sean"}])
def test_samples_of_what_is_not_there_are_told(how):
    with pytest.raises(KitError, match="the table has no"):
        plots.plot_samples(SAMPLES, **how)
