"""Plots draw the numbers they are given, where they are told to, and touch nothing else."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

import repnoise_kit
from repnoise_kit import plots, style
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.stats import summary

ATTACKS = ["none", "small", "large"]
METRICS = ["recall", "harmfulness", "refusal", "utility", "degenerate", "perplexity"]
TERMS = ["retain", "noise", "ascent"]
MEANINGS = ["none", "repnoise", "harmful", "harmless", "everyday"]


def measured(seeds: int = 2, questions: int = 4) -> pd.DataFrame:
    """Rows as `evaluate` makes them, the defended model and the large attack first."""
    draw = np.random.default_rng(sum(map(ord, "measured")))
    cells = itertools.product(
        ["seen", "unseen"], ["repnoise", "none"], ATTACKS[::-1], METRICS, range(seeds)
    )
    return pd.DataFrame(
        {
            "defence": defence,
            "attack": attack,
            "group": group,
            "metric": metric,
            "value": draw.random(),
            "seed": seed,
            "prompt": f"question {question}",
        }
        for group, defence, attack, metric, seed in cells
        for question in range(questions)
    )


def training(steps: int = 40) -> pd.DataFrame:
    draw = np.random.default_rng(sum(map(ord, "training")))
    cells = itertools.product(range(steps), [*TERMS, "total"], range(2))
    return pd.DataFrame(
        {"step": step, "metric": metric, "value": draw.random(), "seed": seed}
        for step, metric, seed in cells
    )


def layered() -> pd.DataFrame:
    draw = np.random.default_rng(sum(map(ord, "layered")))
    cells = itertools.product(["none", "repnoise", "someone's"], range(3), range(4))
    return pd.DataFrame(
        {"model": model, "layer": layer, "value": draw.random(), "prompt": prompt}
        for model, layer, prompt in cells
    )


MEASURED, TRAINING, LAYERED = measured(), training(), layered()
RECALL = MEASURED[MEASURED["metric"] == "recall"]
CELLS = summary(MEASURED)

# Each drawing: what it is given, and how many panels it has.
DRAWINGS = {
    "plot_metric": (CELLS, 1),
    "plot_resistance": (CELLS, 2),
    "plot_price": (CELLS, 3),
    "plot_terms": (TRAINING, 3),
    "plot_layers": (LAYERED, 1),
    "plot_questions": (MEASURED, 1),
}
ROWS = ["defence", "attack", "group", "metric", "value", "seed", "prompt"]
NEEDED = {
    "plot_metric": (MEASURED, ROWS),
    "plot_resistance": (MEASURED, ROWS),
    "plot_price": (MEASURED, ROWS),
    "plot_terms": (TRAINING, ["step", "metric", "value", "seed"]),
    "plot_layers": (LAYERED, ["model", "layer", "value"]),
    "plot_questions": (MEASURED, [name for name in ROWS if name != "seed"]),
}
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name: str, data: Result | pd.DataFrame | None = None, **kwargs: object):
    words = ["recall"] if name == "plot_metric" else []
    data = DRAWINGS[name][0] if data is None else data
    return getattr(plots, name)(data, *words, **kwargs)


def panels(found: Axes | np.ndarray) -> list[Axes]:
    return list(np.atleast_1d(found))


def empty_panels(name: str) -> tuple[dict[str, object], list[Axes]]:
    count = DRAWINGS[name][1]
    if count == 1:
        ax = plt.subplots()[1]
        return {"ax": ax}, [ax]
    axes = plt.subplots(1, count)[1]
    return {"axes": axes}, list(axes)


def numbers(found: Axes | np.ndarray) -> list[list[float]]:
    """All heights of lines and values of maps, panel by panel."""
    seen = []
    for ax in panels(found):
        seen += [np.asarray(line.get_ydata(), float).tolist() for line in ax.lines]
        seen += [
            np.asarray(part.get_array(), float).ravel().tolist()
            for part in ax.collections
            if part.get_array() is not None
        ]
    return seen


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis: mpl.axis.Axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def heights(ax: Axes) -> list[list[float]]:
    """The points of each line with intervals, in the order they were drawn."""
    return [np.asarray(part.lines[0].get_ydata(), float).tolist() for part in ax.containers]


def bars(ax: Axes) -> np.ndarray:
    """Both ends of each interval: (lines, points, 2)."""
    segments = [part.lines[2][0].get_segments() for part in ax.containers]
    return np.array(segments, dtype=float)[..., 1]


# --- All drawings ---


def test_every_drawing_of_the_kit_is_tested_here():
    assert set(DRAWINGS) == {name for name in vars(plots) if name.startswith("plot_")}


@every_drawing
def test_it_returns_its_axes_in_one_new_figure(name):
    plt.figure()
    found = drawn(name)
    assert [type(ax) for ax in panels(found)] == [Axes] * DRAWINGS[name][1]
    assert isinstance(found, Axes if DRAWINGS[name][1] == 1 else np.ndarray)
    assert {ax.figure.number for ax in panels(found)} == {2}
    assert plt.get_fignums() == [1, 2]


@every_drawing
def test_it_draws_where_it_is_told_to(name):
    where, axes = empty_panels(name)
    # Neither the current axes nor the current figure is what counts.
    plt.figure()
    found = drawn(name, **where)
    assert all(a is b for a, b in zip(panels(found), axes, strict=True))
    assert all(ax.has_data() for ax in axes)


@every_drawing
def test_it_opens_no_figure_when_told_where(name):
    where, _ = empty_panels(name)
    drawn(name, **where)
    assert plt.get_fignums() == [1]


@every_drawing
def test_a_result_and_its_table_look_the_same(name):
    data = DRAWINGS[name][0]
    assert numbers(drawn(name, Result(data, {"seed": 0}))) == numbers(drawn(name, data)) != []


@every_drawing
def test_it_leaves_the_table_alone(name):
    data = DRAWINGS[name][0].copy()
    drawn(name, data)
    pd.testing.assert_frame_equal(data, DRAWINGS[name][0])


@every_drawing
def test_a_new_figure_changes_no_setting(name):
    with plt.style.context("default"):
        before = dict(mpl.rcParams)
        drawn(name)
        assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("name", "column"),
    [(name, c) for name in NEEDED for c in NEEDED[name][1] if c not in ("defence", "attack")],
)
def test_it_names_the_column_it_lacks(name, column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        drawn(name, NEEDED[name][0].drop(columns=column))


# What `evaluate` returns tells of no defence and no attack, and is one model, as it is.
@pytest.mark.parametrize("name", ["plot_metric", "plot_resistance", "plot_price", "plot_questions"])
def test_an_evaluation_alone_is_drawn_as_one_model(name):
    rows = NEEDED[name][0]
    alone = rows[(rows["defence"] == "repnoise") & (rows["attack"] == "none")]
    panels = np.atleast_1d(drawn(name, alone.drop(columns=["defence", "attack"])))
    axis = panels[0].yaxis if name == "plot_questions" else panels[0].xaxis
    assert [text.split(", ")[-1] for text in ticks(axis)] == ["as it is"]


# Under each style of Matplotlib: settings the same before and after, and no warning on the way.
@pytest.mark.parametrize("chosen", plt.style.available)
def test_no_drawing_changes_a_setting(chosen):
    with plt.style.context(chosen):
        ax = plt.subplots()[1]
        before = dict(mpl.rcParams)
        # One over the other, which is quicker than a figure each; the two that are left are
        # `plot_metric` again.
        for name in ("plot_metric", "plot_layers", "plot_questions"):
            drawn(name, ax=ax)
        drawn("plot_terms", axes=[ax] * 3)
        assert dict(mpl.rcParams) == before


@every_drawing
def test_it_can_be_seen(name):
    figure = panels(drawn(name))[0].figure
    figure.savefig(file := io.BytesIO(), format="png", dpi=40)
    assert file.getbuffer().nbytes > 1000


@pytest.mark.parametrize("key", ["c", "color"])
@pytest.mark.parametrize("name", [name for name in DRAWINGS if name != "plot_questions"])
def test_the_callers_colour_wins_under_either_name(name, key):
    for ax in panels(drawn(name, **{key: "#123456"})):
        assert to_hex(_last_line(ax).get_color()) == "#123456"


@pytest.mark.parametrize("key", ["lw", "linewidth"])
@every_drawing
def test_the_callers_width_wins_under_either_name(name, key):
    for ax in panels(drawn(name, **{key: 3.5})):
        part = ax.collections[0] if name == "plot_questions" else _last_line(ax)
        assert np.atleast_1d(part.get_linewidth()).tolist() == [3.5]


def _last_line(ax: Axes) -> mpl.lines.Line2D:
    return ax.containers[-1].lines[0] if ax.containers else ax.lines[-1]


def test_plots_need_no_torch():
    code = "import repnoise_kit.plots, sys; print('torch' in sys.modules)"
    root = Path(repnoise_kit.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


# --- One metric against the attack ---


def test_metric_draws_the_summary_weakest_attack_first():
    pooled = summary(RECALL).query("seed == 'all' and group == 'seen'")
    wide = pooled.pivot(index="defence", columns="attack", values="value")
    expected = wide.loc[["none", "repnoise"], ATTACKS].to_numpy()
    assert heights(drawn("plot_metric")) == pytest.approx(expected)


def test_metric_draws_the_intervals_of_the_summary():
    pooled = summary(RECALL).query("seed == 'all' and group == 'seen'")
    ends = pooled.set_index(["defence", "attack"])[["low", "high"]]
    expected = [[ends.loc[(d, a)].tolist() for a in ATTACKS] for d in ("none", "repnoise")]
    assert bars(drawn("plot_metric")) == pytest.approx(np.array(expected))


def test_metric_of_one_seed_draws_the_means_over_questions():
    one = RECALL[RECALL["seed"] == 1]
    means = one[one["group"] == "seen"].groupby(["defence", "attack"])["value"].mean()
    expected = [[means[defence, attack] for attack in ATTACKS] for defence in ("none", "repnoise")]
    assert heights(drawn("plot_metric", one)) == pytest.approx(np.array(expected))


def test_metric_takes_rows_as_it_takes_their_summary():
    assert numbers(drawn("plot_metric", RECALL)) == numbers(drawn("plot_metric", summary(RECALL)))


def test_metric_draws_the_group_it_is_asked_for():
    unseen = CELLS[CELLS["group"] == "unseen"].assign(group="seen")
    assert heights(drawn("plot_metric", group="unseen")) == heights(drawn("plot_metric", unseen))


# The rows name the defended model first.
def test_metric_puts_the_undefended_first():
    assert legend(drawn("plot_metric")) == ["undefended", "RepNoise"]


def test_metric_has_english_labels():
    ax = drawn("plot_metric", group="unseen")
    assert ax.get_ylabel() == "recall (share of the answer given away)"
    assert ticks(ax.xaxis) == ["before", "small attack", "large attack"]
    assert ax.get_legend().get_title().get_text() == "unseen things"


def test_a_metric_the_kit_does_not_know_is_called_by_its_name():
    own = CELLS.replace({"metric": {"recall": "my own"}})
    assert plots.plot_metric(own, "my own").get_ylabel() == "my own"


@pytest.mark.parametrize("metric", METRICS[:-1])
def test_a_share_is_shown_from_zero_to_one(metric):
    low, high = plots.plot_metric(CELLS, metric).get_ylim()
    assert -0.1 < low <= 0 < 1 <= high < 1.1


def test_utility_in_nats_is_shown_whole():
    rows = MEASURED[MEASURED["metric"] == "utility"]
    ax = plots.plot_metric(rows.assign(value=rows["value"] - 5), "utility")
    low, high = ax.get_ylim()
    assert low < np.min(heights(ax)) <= np.max(heights(ax)) < high


# Intervals side by side, not over one another.
def test_lines_stand_apart():
    first, second = (part.lines[0].get_xdata() for part in drawn("plot_metric").containers)
    gaps = np.subtract(second, first)
    assert gaps == pytest.approx(np.full(3, gaps[0]))
    assert 0 < gaps[0] < 0.2


# Whatever attacks and defences there are, each has its line and its place.
def test_metric_draws_names_it_does_not_know():
    mine = CELLS.replace({"defence": {"repnoise": "mine"}, "attack": {"large": "larger"}})
    ax = drawn("plot_metric", mine)
    assert legend(ax) == ["undefended", "mine"]
    assert ticks(ax.xaxis) == ["before", "small attack", "larger"]


# The quickstart's summary.csv, read back: a note that says nothing is a gap there.
def test_a_gap_in_another_column_hides_no_point():
    noted = CELLS.assign(note=np.nan)
    assert heights(drawn("plot_metric", noted)) == heights(drawn("plot_metric"))


# One evaluation of the base among several seeds of everything else has no row over all seeds.
def test_a_cell_of_one_seed_among_several_is_drawn():
    once = RECALL[(RECALL["attack"] != "none") | (RECALL["seed"] == 0)]
    assert np.shape(heights(drawn("plot_metric", once))) == (2, 3)


def test_a_single_question_is_drawn_without_an_interval():
    single = RECALL[(RECALL["prompt"] == "question 0") & (RECALL["seed"] == 0)]
    with np.errstate(invalid="ignore"):
        assert np.shape(heights(drawn("plot_metric", single))) == (2, 3)


def test_a_summary_of_several_seeds_without_their_row_is_told():
    with pytest.raises(KitError, match="seed"):
        drawn("plot_metric", CELLS.query("seed != 'all'"))


# A slip of the pen is told, rather than drawn as nothing.
@pytest.mark.filterwarnings("ignore:No artists with labels")
@pytest.mark.parametrize("name", ["plot_metric", "plot_questions"])
def test_a_metric_that_is_not_there_is_told(name):
    with pytest.raises(KitError, match="recal"):
        getattr(plots, name)(RECALL, "recal")


# --- Several metrics side by side ---


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("plot_resistance", ["recall", "harmfulness"]),
        ("plot_price", ["refusal", "utility", "degenerate"]),
    ],
)
def test_panels_are_the_metrics_one_by_one(name, metrics):
    alone = [plots.plot_metric(CELLS, metric, group="unseen") for metric in metrics]
    beside = panels(drawn(name, group="unseen"))
    assert [heights(ax) for ax in beside] == [heights(ax) for ax in alone]
    assert [ax.get_ylabel() for ax in beside] == [ax.get_ylabel() for ax in alone]
    assert [ax.get_ylabel().split()[0] for ax in beside] == metrics


# --- The terms of a loss ---


def test_terms_are_thin_by_seed_and_thick_by_running_mean():
    for ax, term in zip(drawn("plot_terms", window=5), TERMS, strict=True):
        rows = TRAINING[TRAINING["metric"] == term]
        first, second = (rows[rows["seed"] == seed]["value"].to_numpy() for seed in (0, 1))
        means = (first + second) / 2
        running = [means[max(0, step - 4) : step + 1].mean() for step in range(len(means))]
        assert numbers(ax) == pytest.approx(np.array([first, second, running]))


def test_terms_run_along_the_steps():
    for ax in drawn("plot_terms"):
        assert all(list(line.get_xdata()) == list(range(40)) for line in ax.lines)


def test_terms_have_english_labels():
    axes = drawn("plot_terms")
    assert [ax.get_xlabel() for ax in axes] == ["step of the defence"] * 3
    assert [ax.get_ylabel() for ax in axes] == [
        "retain (nats a token)",
        "noise (MMD)",
        "ascent (nats a token)",
    ]


# The mean is what is to be seen, the seeds are what it is made of.
def test_the_mean_is_thicker_than_the_seeds():
    for ax in drawn("plot_terms"):
        *seeds, mean = (line.get_linewidth() for line in ax.lines)
        assert mean > 2 * max(seeds)


# --- Values by layer ---


def test_layers_draws_the_mean_of_each_layer():
    wide = LAYERED.pivot_table(index="model", columns="layer", values="value", sort=False)
    assert numbers(drawn("plot_layers")) == pytest.approx(wide.to_numpy())


def test_layers_labels_by_columns_and_models():
    ax = drawn("plot_layers")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "value")
    assert legend(ax) == ["undefended", "RepNoise", "someone's"]


# There is no layer 1.5.
def test_layers_are_whole_numbers():
    ax = drawn("plot_layers")
    ax.figure.draw_without_rendering()
    assert np.mod(ax.get_xticks(), 1) == pytest.approx(0)


# --- Question by question ---


def shown(**kwargs: object) -> tuple[Axes, np.ndarray]:
    ax = drawn("plot_questions", **kwargs)
    return ax, np.asarray(ax.collections[0].get_array())


def recall_by_question(group: str) -> pd.DataFrame:
    rows = RECALL[RECALL["group"] == group]
    return rows.pivot_table(index=["defence", "attack"], columns="prompt", values="value")


@pytest.mark.parametrize("group", ["seen", "unseen"])
def test_questions_maps_the_means_over_seeds(group):
    wide = recall_by_question(group)
    order = wide.loc["none"].sum().sort_values(ascending=False).index
    rows = list(itertools.product(["none", "repnoise"], ATTACKS))
    assert shown(group=group)[1] == pytest.approx(wide.loc[rows, order].to_numpy())


def test_questions_are_sorted_by_what_the_undefended_gives_away():
    undefended = shown()[1][:3].sum(0)
    assert list(undefended) == sorted(undefended, reverse=True)


def test_questions_names_its_rows_the_undefended_on_top():
    ax, _ = shown()
    places = [f"{who}, {when}" for who in ("undefended", "RepNoise") for when in
              ("before", "small attack", "large attack")]  # fmt: skip
    assert ticks(ax.yaxis) == places
    assert ax.yaxis_inverted()


def test_questions_says_how_many_there_are_and_what_is_measured():
    ax, _ = shown(group="unseen")
    assert ax.get_xlabel() == "the 4 questions about unseen things"
    assert ax.figure.axes[-1].get_ylabel() == "recall"


# A share has the same colour in every figure.
def test_questions_colours_run_from_zero_to_one():
    assert shown()[0].collections[0].get_clim() == (0, 1)


def test_questions_callers_colours_win():
    mesh = shown(cmap="viridis", vmax=0.5)[0].collections[0]
    assert (mesh.get_cmap().name, mesh.get_clim()) == ("viridis", (0, 0.5))


def test_questions_callers_width_wins_under_the_name_collections_use():
    assert shown(linewidths=3.5)[0].collections[0].get_linewidth() == [3.5]


def test_questions_takes_a_norm():
    assert shown(norm=mpl.colors.Normalize(0, 2))[0].collections[0].get_clim() == (0, 2)


# --- Colours and styles ---


# Printed grey, on a screen of few colours, to an eye that sees few: never colour alone.
@pytest.mark.parametrize("pair", itertools.combinations(MEANINGS, 2), ids="-".join)
def test_meanings_differ_in_more_than_colour(pair):
    first, second = map(style.look, pair)
    assert first["color"] != second["color"]
    assert first["marker"] != second["marker"]


# The two lines of nearly every figure differ in marker and in dash, since their greys are close.
def test_the_two_defences_are_told_apart_without_colour():
    first, second = (part.lines[0] for part in drawn("plot_metric").containers)
    assert first.get_marker() != second.get_marker()
    assert first.get_linestyle() != second.get_linestyle()


# Black text is read on no line, and white paper shows each: neither too pale nor too dark.
@pytest.mark.parametrize("name", [name for name in style.COLOURS if name != "total"])
def test_colours_show_on_white(name):
    grey = np.dot(to_rgb(style.COLOURS[name]), [0.2126, 0.7152, 0.0722])
    assert 0.2 < grey < 0.75


def test_unknown_names_look_unlike_one_another_and_the_known():
    found = style.looks(["none", "a", "repnoise", "b", "c", "d", "e"]).values()
    assert len({look["color"] for look in found}) == 7
    assert len({look["marker"] for look in found}) == 7


# A colour that means something in this figure means nothing else in it.
@pytest.mark.parametrize("known", MEANINGS)
def test_unknown_names_leave_the_colours_of_the_known_alone(known):
    looks = style.looks(["a", known, "b"])
    assert len({look["color"] for look in looks.values()}) == 3


def test_known_names_look_alike_in_every_company():
    looks = style.looks(["a", "repnoise", "b", "none"])
    assert looks["repnoise"] == style.looks(["repnoise"])["repnoise"] == style.look("repnoise")


# The base is what has no defence.
def test_the_base_looks_undefended_under_its_own_name():
    assert style.look("base") == style.look("none") | {"label": "base"}


def test_words_are_for_readers():
    assert style.look("none")["label"] == "undefended"
    assert style.look("something else")["label"] == "something else"


def test_a_style_holds_inside_its_context_and_no_longer():
    before = dict(mpl.rcParams)
    with style.clean_style():
        assert not mpl.rcParams["axes.spines.top"]
        assert not mpl.rcParams["legend.frameon"]
    assert dict(mpl.rcParams) == before


def test_a_style_ends_with_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError), style.clean_style():
        raise RuntimeError
    assert dict(mpl.rcParams) == before


def test_a_style_decorates_a_function_each_time_it_is_called():
    before = dict(mpl.rcParams)

    @style.clean_style()
    def box() -> bool:
        return mpl.rcParams["axes.spines.top"]

    assert [box(), box()] == [False, False]
    assert dict(mpl.rcParams) == before


# What is set inside ends with the context too.
def test_a_style_restores_what_was_set_inside():
    before = dict(mpl.rcParams)
    with style.clean_style():
        mpl.rcParams["font.size"] = 33
    assert dict(mpl.rcParams) == before


def test_a_style_goes_under_the_callers_own_settings():
    with plt.rc_context({"lines.linewidth": 7}), style.clean_style():
        assert mpl.rcParams["lines.linewidth"] == 7


def test_matplotlib_takes_a_style_as_one_of_its_own():
    with plt.style.context(style.clean_style()):
        assert not mpl.rcParams["axes.spines.right"]


# One style, kept in a variable, around a function that uses it too.
def test_a_style_within_itself_holds_to_the_end():
    quiet = style.clean_style()
    with quiet:
        with quiet:
            pass
        assert not mpl.rcParams["axes.spines.top"]
