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
import test_plots_inside as inside
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex, to_rgb, to_rgba
from test_plots_criteria import DRAWINGS as CRITERIA
from test_plots_inside import legend, panels, ticks
from test_plots_sweep import DRAWINGS as SWEEP

import repnoise_kit
from repnoise_kit import plots, style
from repnoise_kit.defences import DEFENCES
from repnoise_kit.errors import KitError
from repnoise_kit.released import LOOKED_AT
from repnoise_kit.results import Result
from repnoise_kit.stats import Interval, summary
from repnoise_kit.survival import cost_to_break

ATTACKS = ["none", "small", "large"]
METRICS = ["recall", "harmfulness", "refusal", "utility", "degenerate", "perplexity"]
TERMS = ["retain", "noise", "ascent"]
MEANINGS = ["none", "repnoise", "harmful", "harmless", "everyday"]
BLACK = ("total", "security_vectors")


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


def attacked() -> pd.DataFrame:
    """Rows as `resistance_grid` makes them, in no order: three defences, four budgets."""
    draw = np.random.default_rng(sum(map(ord, "attacked")))
    budgets = [(6e-4, 64), (2.5e-4, 512), (0.0, 0), (2.5e-4, 64)]
    names = ["repnoise", "mine", "none"]
    cells = itertools.product(["seen", "unseen"], names, budgets, METRICS[:2], range(2))
    frame = pd.DataFrame(
        {
            "defence": defence,
            "lr": lr,
            "examples": examples,
            "group": group,
            "metric": metric,
            "value": draw.random() ** (1 + 2 * (defence == "repnoise")),
            "seed": seed,
            "prompt": f"question {question}",
        }
        for group, defence, (lr, examples), metric, seed in cells
        for question in range(4)
    )
    return frame.sample(frac=1, random_state=0)


# How many of four questions a seed gives away, at each moment. The second of repnoise never breaks.
MOMENTS = [0, 1, 2, 4, 8]
ALONG = {
    ("repnoise", 0): [0, 0, 0, 1, 3],
    ("repnoise", 1): [0, 0, 0, 0, 1],
    ("none", 0): [0, 1, 3, 3, 4],
    ("none", 1): [0, 0, 1, 4, 3],
    ("random", 0): [0, 0, 0, 0, 0],
    ("random", 1): [0, 0, 0, 0, 0],
}
BREAKS = {"none": [2, 4], "random": [8, 8], "repnoise": [8, 8]}
BROKEN = {"none": [True, True], "random": [False, False], "repnoise": [True, False]}


def along(told: dict[tuple[str, int], list[int]] = ALONG, attack: str = "a") -> pd.DataFrame:
    """Rows as `cost_grid` makes them, the last defence first; unseen things are given away."""
    rows = [
        {"defence": defence, "attack": attack, "lr": 3e-4, "seed": seed, "step": step}
        | {"tokens": 100.0 * step, "flops": 1e9 * step, "group": group, "metric": "recall"}
        | {"value": float(group == "unseen" or q < count), "prompt": f"question {q}"}
        for (defence, seed), counts in told.items()
        for step, count in zip(MOMENTS, counts, strict=True)
        for group in ("seen", "unseen")
        for q in range(4)
    ]
    return pd.DataFrame(rows)


MEASURED, TRAINING, LAYERED = measured(), training(), layered()
ATTACKED, LONG = attacked(), along()
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
    "plot_budgets": (ATTACKED, 1),
    "plot_cost_to_break": (LONG, 2),
    **inside.DRAWINGS,
}
MAPS = ("plot_questions", "plot_budgets")
ROWS = ["defence", "attack", "group", "metric", "value", "seed", "prompt"]
NEEDED = {
    "plot_metric": (MEASURED, ROWS),
    "plot_resistance": (MEASURED, ROWS),
    "plot_price": (MEASURED, ROWS),
    "plot_terms": (TRAINING, ["step", "metric", "value", "seed"]),
    "plot_layers": (LAYERED, ["model", "layer", "value"]),
    "plot_questions": (MEASURED, [name for name in ROWS if name != "seed"]),
    "plot_budgets": (ATTACKED, [*ROWS, "lr", "examples"]),
    "plot_cost_to_break": (LONG, [*ROWS, "lr", "step", "tokens", "flops"]),
    **inside.NEEDED,
}
# What is neither lines nor a map is asked for its keywords where the rest of it is tested.
LINED = [name for name in DRAWINGS if name not in (*MAPS, *inside.NO_LINES)]
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name: str, data: Result | pd.DataFrame | None = None, **kwargs: object):
    words = ["recall"] if name == "plot_metric" else []
    data = DRAWINGS[name][0] if data is None else data
    return getattr(plots, name)(data, *words, **kwargs)


def empty_panels(name: str) -> tuple[dict[str, object], list[Axes]]:
    count = DRAWINGS[name][1]
    if count == 1:
        ax = plt.subplots()[1]
        return {"ax": ax}, [ax]
    axes = plt.subplots(1, count)[1]
    return {"axes": axes}, list(axes)


def numbers(found: Axes | np.ndarray) -> list[list[float]]:
    """All heights of lines, values of maps, marks and outlines, panel by panel."""
    seen = []
    for ax in panels(found):
        seen += [np.asarray(line.get_ydata(), float).tolist() for line in ax.lines]
        clouds = [part for part in ax.collections if isinstance(part, PathCollection)]
        seen += [np.asarray(part.get_offsets(), float).ravel().tolist() for part in clouds]
        seen += [np.asarray(part.get_xy(), float).ravel().tolist() for part in ax.patches]
        seen += [
            np.asarray(part.get_array(), float).ravel().tolist()
            for part in ax.collections
            if part.get_array() is not None
        ]
    return seen


def heights(ax: Axes) -> list[list[float]]:
    """The points of each line with intervals, in the order they were drawn."""
    return [np.asarray(part.lines[0].get_ydata(), float).tolist() for part in ax.containers]


def bars(ax: Axes) -> np.ndarray:
    """Both ends of each interval: (lines, points, 2)."""
    segments = [part.lines[2][0].get_segments() for part in ax.containers]
    return np.array(segments, dtype=float)[..., 1]


# --- All drawings ---


def test_every_drawing_of_the_kit_is_tested_here():
    assert {*DRAWINGS, *CRITERIA, *SWEEP} == {
        name for name in vars(plots) if name.startswith("plot_")
    }


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


# It says how many there should be.
@pytest.mark.parametrize("name", [name for name, (_, count) in DRAWINGS.items() if count > 1])
def test_a_wrong_number_of_panels_is_told(name):
    count = DRAWINGS[name][1]
    for wrong in (1, count + 1):
        axes = plt.subplots(1, wrong, squeeze=False)[1][0]
        with pytest.raises(KitError, match=str(count)):
            drawn(name, axes=axes)


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
        before = dict(mpl.rcParams)
        for name in DRAWINGS:
            # Of one seed of one model, where that is a table too: quicker.
            few, where = inside.least(name) if name in inside.DRAWINGS else (None, {})
            drawn(name, few, **where or empty_panels(name)[0])
            plt.close()
        assert dict(mpl.rcParams) == before


@every_drawing
def test_it_can_be_seen(name):
    figure = panels(drawn(name))[0].figure
    figure.savefig(file := io.BytesIO(), format="png", dpi=40)
    assert file.getbuffer().nbytes > 1000


@pytest.mark.parametrize("key", ["c", "color"])
@pytest.mark.parametrize("name", LINED)
def test_the_callers_colour_wins_under_either_name(name, key):
    for ax in panels(drawn(name, **{key: "#123456"})):
        assert to_hex(_last_line(ax).get_color()) == "#123456"


@pytest.mark.parametrize("key", ["lw", "linewidth"])
@pytest.mark.parametrize("name", [*LINED, *MAPS])
def test_the_callers_width_wins_under_either_name(name, key):
    # The marks of `plot_cost_to_break` on the right have no line.
    for ax in panels(drawn(name, **{key: 3.5}))[: 1 if name == "plot_cost_to_break" else None]:
        part = ax.collections[0] if name in MAPS else _last_line(ax)
        assert np.atleast_1d(part.get_linewidth()).tolist() == [3.5]


def _last_line(ax: Axes) -> mpl.lines.Line2D:
    """The last line of the data: not the threshold, which is its two ends."""
    lines = [line for line in ax.lines if list(line.get_xdata()) != [0, 1]]
    return ax.containers[-1].lines[0] if ax.containers else lines[-1]


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
ASKED = [
    *("plot_metric", "plot_questions", "plot_budgets", "plot_cost_to_break"),
    *("plot_freezing", "plot_weight_distance", "plot_probe"),
]


@pytest.mark.filterwarnings("ignore:No artists with labels")
@pytest.mark.parametrize("name", ASKED)
def test_a_metric_that_is_not_there_is_told(name):
    with pytest.raises(KitError, match="recal"):
        getattr(plots, name)(NEEDED[name][0], "recal")


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


# Of several defences each has its line, in its own colour, where it has the term.
def test_terms_of_several_defences_are_told_apart():
    noiseless = TRAINING[TRAINING["metric"] != "noise"].assign(defence="gradient_ascent")
    both = pd.concat([TRAINING.assign(defence="repnoise"), noiseless])
    retain, noise, ascent = drawn("plot_terms", both)
    assert legend(ascent) == ["RepNoise", "gradient ascent"]
    assert retain.get_legend() is noise.get_legend() is None
    assert len(noise.lines) < len(ascent.lines)
    for name in ("repnoise", "gradient_ascent"):
        own = [line for line in retain.lines if line.get_color() == style.look(name)["color"]]
        one = drawn("plot_terms", both[both["defence"] == name])[0]
        assert [line.get_ydata().tolist() for line in own] == numbers(one)


def test_a_term_that_none_has_is_an_empty_panel():
    rest = TRAINING[TRAINING["metric"] == "retain"]
    both = pd.concat([rest.assign(defence=name) for name in ("safety_training", "vaccine")])
    assert [ax.get_legend() is None for ax in drawn("plot_terms", both)] == [False, True, True]


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


# --- Budget by budget ---

BUDGETS = [(0.0, 0), (2.5e-4, 64), (2.5e-4, 512), (6e-4, 64)]
SHOWN = ["none", "repnoise", "mine"]


def cells_of(metric: str = "recall", group: str = "seen") -> pd.DataFrame:
    rows = ATTACKED[(ATTACKED["metric"] == metric) & (ATTACKED["group"] == group)]
    found = summary(rows, by=["defence", "lr", "examples", "metric"])
    return found[found["seed"] == "all"].set_index(["defence", "lr", "examples"])


def said(ax: Axes) -> dict[tuple[int, int], str]:
    """What is written in each cell, row and column, from the top down."""
    lines = sorted(ax.texts, key=lambda text: text.get_position()[1])
    places = [tuple(np.floor(text.get_position()).astype(int)[::-1].tolist()) for text in lines]
    return {
        place: " ".join(
            line.get_text() for line, at in zip(lines, places, strict=True) if at == place
        )
        for place in places
    }


@pytest.mark.parametrize("group", ["seen", "unseen"])
@pytest.mark.parametrize("metric", METRICS[:2])
def test_budgets_shows_the_numbers_it_is_given(metric, group):
    ax = plots.plot_budgets(ATTACKED, metric, group=group)
    cells = cells_of(metric, group)[["value", "low", "high"]]
    expected = np.array([[cells.loc[(name, *budget)] for budget in BUDGETS] for name in SHOWN])
    assert np.asarray(ax.collections[0].get_array()) == pytest.approx(expected[..., 0])
    assert said(ax) == {
        place: str(Interval(*expected[place])) for place in np.ndindex(expected.shape[:2])
    }


def test_budgets_names_its_rows_and_columns_the_weakest_first():
    ax = drawn("plot_budgets")
    assert ticks(ax.yaxis) == ["undefended", "RepNoise", "mine"]
    assert ticks(ax.xaxis) == ["before", "2.5e-4\n64", "2.5e-4\n512", "6e-4\n64"]
    assert ax.yaxis_inverted()
    assert ax.get_title() == "recall, seen things"


# Two panels that share their rows: the first stays on top in both.
def test_budgets_stay_upright_side_by_side():
    for ax in plt.subplots(1, 2, sharey=True)[1]:
        drawn("plot_budgets", ax=ax)
        assert ax.yaxis_inverted()


def test_budgets_of_one_seed_are_its_means_over_questions():
    one = ATTACKED[(ATTACKED["seed"] == 1) & (ATTACKED["group"] == "seen")]
    ax = plots.plot_budgets(one)
    means = one[one["metric"] == "recall"].groupby(["defence", "lr", "examples"])["value"].mean()
    expected = [[means[(name, *budget)] for budget in BUDGETS] for name in SHOWN]
    assert np.asarray(ax.collections[0].get_array()) == pytest.approx(np.array(expected))


# Black or white, whichever is read: the contrast that the web's guidelines ask of small text.
def test_numbers_are_read_on_every_shade():
    shades = np.linspace(0, 1, 101)
    table = pd.DataFrame({"defence": [f"d{i:03}" for i in range(101)], "value": shades})
    table = table.assign(lr=0.1, examples=1, group="seen", metric="recall", seed=0, prompt="q")
    with np.errstate(invalid="ignore"):
        ax = plots.plot_budgets(pd.concat([table, table.assign(prompt="r")]))
    mesh = ax.collections[0]
    for text in ax.texts:
        value = shades[int(text.get_position()[1])]
        lights = sorted(map(luminance, [mesh.to_rgba(value), to_rgba(text.get_color())]))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5


def luminance(colour: tuple[float, ...]) -> float:
    parts = np.array(colour[:3])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


# A share has the same colour in every figure, unless the caller says otherwise.
def test_budgets_colours_run_from_zero_to_one():
    assert drawn("plot_budgets").collections[0].get_clim() == (0, 1)
    assert drawn("plot_budgets", vmax=0.5).collections[0].get_clim() == (0, 0.5)
    norm = mpl.colors.Normalize(0, 2)
    assert drawn("plot_budgets", norm=norm).collections[0].get_clim() == (0, 2)


# Half a grid, or a base that was evaluated once among several seeds of everything else.
def test_what_was_not_measured_is_left_blank():
    lost = (ATTACKED["defence"] == "mine") & (ATTACKED["lr"] == 6e-4)
    once = (ATTACKED["defence"] == "none") & (ATTACKED["examples"] == 0) & (ATTACKED["seed"] == 1)
    ax = drawn("plot_budgets", ATTACKED[~lost & ~once])
    assert set(said(ax)) == set(np.ndindex(3, 4)) - {(2, 3)}
    assert np.ma.getmaskarray(np.ma.masked_invalid(ax.collections[0].get_array())).sum() == 1


# --- Along an attack ---


def marks(ax: Axes, row: int) -> list[mpl.lines.Line2D]:
    """The marks of runs in one row of the right panel."""
    lines = [line for line in ax.lines if line.get_linestyle() == "None"]
    return [
        line for line in lines if len(line.get_ydata()) and abs(line.get_ydata()[0] - row) < 0.5
    ]


def test_cost_draws_the_means_of_each_step():
    left, _ = drawn("plot_cost_to_break")
    lines = {line.get_label(): line for line in left.lines}
    for name, label in [("none", "undefended"), ("repnoise", "RepNoise")]:
        counts = np.array([ALONG[name, seed] for seed in (0, 1)])
        assert lines[label].get_xdata().tolist() == MOMENTS[1:]
        assert lines[label].get_ydata() == pytest.approx(counts[:, 1:].mean(0) / 4)


def test_cost_draws_the_intervals_of_the_summary():
    left, _ = drawn("plot_cost_to_break")
    rows = LONG[(LONG["group"] == "seen") & (LONG["step"] > 0)]
    cells = summary(rows, by=["defence", "step", "metric"]).query("seed == 'all'")
    for name, part in zip(["none", "random", "repnoise"], left.collections, strict=True):
        own = cells[cells["defence"] == name]
        corners = {tuple(point) for point in np.round(part.get_paths()[0].vertices, 6)}
        edges = own[["low", "high"]].to_numpy().round(6)
        assert {(s, e) for s, ends in zip(own["step"], edges, strict=True) for e in ends} <= corners


@pytest.mark.parametrize("threshold", [0.25, 0.5, 1.0])
def test_cost_draws_the_threshold(threshold):
    left, right = drawn("plot_cost_to_break", threshold=threshold)
    flat = [line for line in left.lines if list(line.get_xdata()) == [0, 1]]
    assert [list(line.get_ydata()) for line in flat] == [[threshold, threshold]]
    assert right.get_title() == f"steps until recall reaches {threshold:g}"


# A mark a seed, where it broke: filled; where it did not, open.
@pytest.mark.parametrize(("row", "name"), enumerate(BREAKS))
def test_cost_marks_each_seed_once(row, name):
    right = drawn("plot_cost_to_break")[1]
    found = []
    for line in marks(right, row):
        filled = to_hex(line.get_markerfacecolor()) == style.look(name)["color"].lower()
        open_ = to_hex(line.get_markerfacecolor()) == "#ffffff"
        assert filled != open_
        found += [(step, filled) for step in line.get_xdata().tolist()]
    assert sorted(found) == sorted(zip(BREAKS[name], BROKEN[name], strict=True))


# Seeds that break at the same step hide one another nowhere.
def test_cost_marks_stand_apart():
    right = drawn("plot_cost_to_break")[1]
    for row in range(3):
        heights = [h for line in marks(right, row) for h in line.get_ydata().tolist()]
        assert len(set(heights)) == 2


def test_cost_has_an_arrow_for_each_run_that_was_never_broken():
    right = drawn("plot_cost_to_break")[1]
    assert len(right.texts) == 3
    assert all(text.xy[0] > text.xyann[0] == 8 for text in right.texts)
    # One that ends outside the panel would not be drawn.
    assert all(right.get_xlim()[1] >= text.xy[0] for text in right.texts)


def test_cost_has_no_arrow_where_all_are_broken():
    right = drawn("plot_cost_to_break", LONG[LONG["defence"] == "none"])[1]
    assert len(right.texts) == 0


# On a logarithmic axis step 0 is nowhere.
def test_what_is_broken_before_the_attack_is_seen():
    right = drawn("plot_cost_to_break", group="unseen")[1]
    low, high = right.get_xlim()
    for row in range(3):
        assert all(low <= at <= high for line in marks(right, row) for at in line.get_xdata())


def test_cost_names_its_rows_the_undefended_on_top():
    left, right = drawn("plot_cost_to_break")
    names = ["none", "random", "repnoise"]
    assert ticks(right.yaxis) == ["undefended", "random weights", "RepNoise"]
    for label, line, name in zip(right.get_yticklabels(), left.lines, names, strict=False):
        assert label.get_color() == line.get_color() == style.look(name)["color"]
    assert right.yaxis_inverted()
    assert [ax.get_xlabel() for ax in (left, right)] == ["steps of the attack"] * 2
    assert left.get_ylabel() == "recall (share of the answer given away)"


def test_cost_shows_what_cost_to_break_finds_in_order():
    shuffled = LONG.sample(frac=1, random_state=0)
    right = drawn("plot_cost_to_break", shuffled)[1]
    costs = cost_to_break(LONG).groupby("defence")["steps"].apply(sorted)
    for row, name in enumerate(["none", "random", "repnoise"]):
        steps = [at for line in marks(right, row) for at in line.get_xdata().tolist()]
        assert sorted(steps) == costs[name]


def test_cost_of_one_seed_is_drawn():
    left, right = drawn("plot_cost_to_break", LONG[LONG["seed"] == 0])
    assert left.lines[0].get_ydata() == pytest.approx(np.array(ALONG["none", 0][1:]) / 4)
    assert len(marks(right, 0)) == 1


# An attack that diverged ends early; the others go on.
def test_a_run_that_ends_early_is_drawn():
    lost = (LONG["defence"] == "repnoise") & (LONG["seed"] == 1) & (LONG["step"] > 2)
    right = drawn("plot_cost_to_break", LONG[~lost])[1]
    assert sorted(at for line in marks(right, 2) for at in line.get_xdata().tolist()) == [2, 8]


def test_curves_of_several_attacks_are_told():
    with pytest.raises(KitError, match="several attacks"):
        drawn("plot_cost_to_break", pd.concat([LONG, along(attack="b")]))


# All that Table 1 has, and the model that never knew: each row named, each look once, no warning.
def test_all_defences_are_drawn_together():
    names = [*DEFENCES, "naive"]
    told = {(name, 0): [0, 1, 2, 3, 4] for name in names}
    left, right = drawn("plot_cost_to_break", along(told))
    assert ticks(right.yaxis)[0] == "undefended"
    assert set(ticks(right.yaxis)) == {style.look(name)["label"] for name in names}
    lines = [line for line in left.lines if list(line.get_xdata()) != [0, 1]]
    seen = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
    assert len(set(seen)) == len(names)


# When every colour is taken, a name the kit does not know still gets a line.
def test_an_unknown_name_beside_all_the_known_is_drawn():
    told = {(name, 0): [0, 1, 2, 3, 4] for name in (*DEFENCES, "mine")}
    assert ticks(drawn("plot_cost_to_break", along(told))[1].yaxis)[-1] == "mine"


# --- Colours and styles ---


@pytest.mark.parametrize("name", [*DEFENCES, "naive"])
def test_every_defence_has_a_look_and_words_of_its_own(name):
    for table in (style.COLOURS, style.MARKERS, style.WORDS):
        assert name in table
    assert style.look(name)["label"] != name or name in ("none",)


# In one figure with all others: no two share colour, marker and line, nor the words.
def test_no_two_defences_look_alike():
    looks = list(style.looks([*DEFENCES, "naive"]).values())
    seen = [(look["color"], look["marker"], look["linestyle"]) for look in looks]
    assert len(set(seen)) == len({look["label"] for look in looks}) == len(looks)


# Printed grey, they have their markers.
def test_no_two_defences_share_a_marker():
    looks = style.looks([*DEFENCES, "naive"]).values()
    assert len({look["marker"] for look in looks}) == len(looks)


# A filled mark is a broken run and an open one a run that was not: a cross can be neither.
@pytest.mark.parametrize("name", [*DEFENCES, "naive"])
def test_markers_of_defences_can_be_filled(name):
    assert style.look(name)["marker"] in mpl.lines.Line2D.filled_markers


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


# Black text is read on no line, and white paper shows each: neither too pale nor too dark. Two
# are black and mean it.
@pytest.mark.parametrize("name", [name for name in style.COLOURS if name not in BLACK])
def test_colours_show_on_white(name):
    grey = np.dot(to_rgb(style.COLOURS[name]), [0.2126, 0.7152, 0.0722])
    assert 0.2 < grey < 0.75


def test_two_are_black():
    assert {name for name, colour in style.COLOURS.items() if colour == "#000000"} == set(BLACK)


# Those that are looked into stand in one figure: each its own colour, and far from the others'.
@pytest.mark.parametrize("pair", itertools.combinations(LOOKED_AT, 2), ids="-".join)
def test_the_five_that_are_looked_at_differ_in_colour(pair):
    first, second = (np.array(to_rgb(style.look(name)["color"])) for name in pair)
    assert np.linalg.norm(first - second) > 0.25
    assert style.look(pair[0])["marker"] != style.look(pair[1])["marker"]


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
