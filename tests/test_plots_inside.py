"""Drawings of what lies inside models and along attacks: read back from the axes, sum by sum."""

import itertools

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import LogNorm, to_hex
from matplotlib.patches import Patch

from repnoise_kit import plots, style
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.stats import interval, summary

# In each table the defended model and the attacked ones come first, and seeds last.
DEFENCES = ["repnoise", "none"]
ATTACKS = ["large", "none"]
MODELS = list(itertools.product(DEFENCES, ATTACKS))
SHOWN = [(defence, attack) for attack in ("none", "large") for defence in ("none", "repnoise")]
SIDES = ["harmful", "harmless", "harmful of another"]
SEEDS = range(2)
WORDS = {"none": "undefended", "repnoise": "RepNoise"}


def made(name: str, columns: str, rows: list[tuple]) -> pd.DataFrame:
    """A table of these rows, each with a random value."""
    draw = np.random.default_rng(sum(map(ord, name)))
    return pd.DataFrame(rows, columns=columns.split()).assign(value=draw.random(len(rows)))


def masses() -> pd.DataFrame:
    """Rows as `logit_mass` of several models makes them."""
    prompts = [f"question {number}" for number in range(4)]
    rows = itertools.product(MODELS, SIDES, range(3), prompts, SEEDS)
    rows = [(*model, *rest) for model, *rest in rows]
    table = made("masses", "defence attack group layer prompt seed", rows)
    return table.assign(metric="log_prob", value=-5 * table["value"])


def components() -> pd.DataFrame:
    """Rows as `pca` of several models makes them."""
    rows = itertools.product(MODELS, SEEDS, SIDES[:2], range(5))
    rows = [(*model, seed, side) for model, seed, side, _ in rows]
    one, other = (made(name, "defence attack seed group", rows) for name in ("pc1", "pc2"))
    return one.assign(pc2=other["value"], explained=0.5).rename(columns={"value": "pc1"})


def probed() -> pd.DataFrame:
    """Rows as `probe` of several models makes them."""
    metrics = ["accuracy", "chance", "shuffled", "selectivity"]
    rows = itertools.product(MODELS, range(3), range(3), metrics, SEEDS)
    rows = [(*model, *rest) for model, *rest in rows]
    return made("probed", "defence attack layer split metric seed", rows)


def noisy() -> pd.DataFrame:
    """Rows as `noise_test` of several models makes them."""
    metrics = ["mmd", "null_95", "p"]
    rows = itertools.product(MODELS, SIDES[:2], range(3), metrics, SEEDS)
    rows = [(*model, *rest) for model, *rest in rows]
    return made("noisy", "defence attack group layer metric seed", rows)


def alike() -> pd.DataFrame:
    """Rows as `cka` of several models makes them."""
    rows = itertools.product(MODELS, range(3), ["cka", "shuffled"], SEEDS)
    rows = [(*model, *rest) for model, *rest in rows]
    return made("alike", "defence attack layer metric seed", rows)


def distant(layers: int = 3) -> pd.DataFrame:
    """Rows as `weight_distance` of several models makes them."""
    places = [("embedding", None, "all"), *itertools.product(
        ["layer"], range(layers), ["all", "attention", "mlp", "norm"]
    ), ("norm", None, "all"), ("head", None, "all")]  # fmt: skip
    rows = itertools.product(DEFENCES, SEEDS, places, ["l2", "relative"])
    rows = [(defence, seed, *place, metric) for defence, seed, place, metric in rows]
    table = made("distant", "defence seed part layer kind metric", rows)
    return table.astype({"layer": "Int64"})


HELD = ["undefended", "nothing", "head", "first third"]
BUDGETS = [(3e-4, 64), (0.0, 0), (8e-4, 512)]


def held() -> pd.DataFrame:
    """Rows as `ablate_layers` makes them."""
    prompts = [f"question {number}" for number in range(4)]
    rows = itertools.product(
        BUDGETS, HELD, ["recall", "perplexity"], ["seen", "unseen"], prompts, SEEDS
    )
    rows = [
        (name, "none" if name == "undefended" else "repnoise", *budget, *rest)
        for budget, name, *rest in rows
    ]
    table = made("held", "held defence lr examples metric group prompt seed", rows)
    large = table["metric"] == "perplexity"
    return table.assign(value=table["value"].where(~large, np.exp(5 * table["value"])))


MOMENTS = [0, 1, 2, 3, 4, 6, 8, 12]


def passed() -> pd.DataFrame:
    """Rows as `attack_path` of several models makes them."""
    rows = itertools.product(DEFENCES, SEEDS, ["loss", "gap", "grad_norm"], MOMENTS)
    return made("passed", "defence seed metric step", list(rows))


XS, YS = np.linspace(-1.0, 5.0, 7), np.linspace(-1.0, 3.0, 5)
WAY = {0: (3.0, 0.0), 1: (3.2, 0.4), 2: (3.1, 1.1), 4: (2.5, 2.0)}


def sliced(loss=lambda x, y: np.exp(0.5 * x)) -> pd.DataFrame:
    """Rows as `attack_plane` makes them: here the loss grows along x alone."""
    way = [(x, y, step, "path", loss(x, y)) for step, (x, y) in WAY.items()]
    grid = [(x, y, None, "loss", loss(x, y)) for x in XS for y in YS]
    table = pd.DataFrame(way + grid, columns=["x", "y", "step", "metric", "value"])
    return table.astype({"step": "Int64"}).assign(seed=0)


MASSES, COMPONENTS, PROBED, NOISY = masses(), components(), probed(), noisy()
ALIKE, DISTANT, FROZEN, PASSED, SLICED = alike(), distant(), held(), passed(), sliced()

# Each drawing: what it is given, how many panels it has, and the columns it needs.
DRAWINGS = {
    "plot_logit_mass": (MASSES, 4),
    "plot_densities": (MASSES, 4),
    "plot_pca": (COMPONENTS, 4),
    "plot_probe": (PROBED, 2),
    "plot_noise_test": (NOISY, 2),
    "plot_cka": (ALIKE, 2),
    "plot_weight_distance": (DISTANT, 1),
    "plot_freezing": (FROZEN, 1),
    "plot_attack_path": (PASSED, 2),
    "plot_attack_plane": (SLICED, 1),
}
NEEDED = {
    "plot_logit_mass": (MASSES, ["group", "layer", "value", "prompt"]),
    "plot_densities": (MASSES, ["group", "layer", "value"]),
    "plot_pca": (COMPONENTS, ["group", "pc1", "pc2"]),
    "plot_probe": (PROBED, ["layer", "split", "metric", "value"]),
    "plot_noise_test": (NOISY, ["group", "layer", "metric", "value"]),
    "plot_cka": (ALIKE, ["layer", "metric", "value"]),
    "plot_weight_distance": (DISTANT, ["part", "layer", "kind", "metric", "value"]),
    "plot_freezing": (FROZEN, ["held", "lr", "examples", "group", "metric", "value"]),
    "plot_attack_path": (PASSED, ["step", "metric", "value"]),
    "plot_attack_plane": (SLICED, ["x", "y", "step", "metric", "value"]),
}
NO_LINES = ("plot_densities", "plot_pca", "plot_attack_plane")
A_MODEL = ("plot_logit_mass", "plot_densities", "plot_pca")
"""A panel for each model, defence by attack."""
AN_ATTACK = ("plot_probe", "plot_noise_test", "plot_cka")
"""A panel for each attack, a line for each defence."""
LAYERED = {"plot_probe": "accuracy", "plot_noise_test": "mmd", "plot_cka": "cka"}

every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def drawn(name: str, data: Result | pd.DataFrame | None = None, **kwargs: object):
    return getattr(plots, name)(DRAWINGS[name][0] if data is None else data, **kwargs)


def panels(found: Axes | np.ndarray) -> list[Axes]:
    return list(np.atleast_1d(found))


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(axis: mpl.axis.Axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def lines(ax: Axes) -> dict[str, mpl.lines.Line2D]:
    """The named lines of a panel."""
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


def bands(ax: Axes) -> list[pd.DataFrame]:
    """The lower and upper edge of each band, by x."""
    found = []
    for part in ax.collections:
        if isinstance(part, PolyCollection):
            corners = np.vstack([np.empty((0, 2)), *(path.vertices for path in part.get_paths())])
            edges = pd.DataFrame(corners, columns=["x", "y"]).groupby("x")["y"]
            found.append(edges.agg(["min", "max"]))
    return found


def one_model(name: str) -> pd.DataFrame:
    """The rows of one model, which do not say which it is."""
    table = DRAWINGS[name][0]
    if name == "plot_freezing":  # whose rows say what was held
        return table.drop(columns="defence")
    for column, kept in {"defence": "repnoise", "attack": "none"}.items():
        if column in table:
            table = table[table[column] == kept].drop(columns=column)
    return table


def least(name: str) -> tuple[pd.DataFrame, dict[str, object]]:
    """One seed of one model, and where to draw it."""
    table, axes = one_model(name), plt.subplots(1, 2)[1]
    where = {"ax": axes[0]} if DRAWINGS[name][1] == 1 else {"axes": axes[:1]}
    return table[table["seed"] == 0], {"axes": axes} if name == "plot_attack_path" else where


def of_model(table: pd.DataFrame, defence: str, attack: str) -> pd.DataFrame:
    return table[(table["defence"] == defence) & (table["attack"] == attack)]


def intervals(rows: pd.DataFrame, by: str, question: str | None = None) -> pd.DataFrame:
    """Mean and interval of each cell, from its table of seeds × questions, by `stats.interval`."""
    rows = rows.assign(question=rows[question] if question else "all")
    found = {
        key: interval(cell.pivot(index="seed", columns="question", values="value").to_numpy())
        for key, cell in rows.groupby(by)
    }
    return pd.DataFrame(found.values(), index=list(found), columns=["value", "low", "high"])


# --- All of them ---


@every_drawing
def test_one_model_is_drawn_without_its_name(name):
    found = panels(drawn(name, one_model(name)))
    whole = panels(drawn(name))
    if name in A_MODEL + AN_ATTACK:
        assert len(found) == 1
        assert len(whole) > 1
        assert found[0].get_title() == ""
    words = [word for ax in found if ax.get_legend() for word in legend(ax)]
    if name in (*AN_ATTACK, "plot_weight_distance", "plot_attack_path"):
        assert words[-1] == "this model"
    assert not {"undefended", "RepNoise"} & set(words)


# The table of `evaluate` and its like may say which model it is.
def test_one_model_may_have_a_name_of_its_own():
    named = one_model("plot_cka").assign(model="pythia")
    assert legend(drawn("plot_cka", named)[0])[-1] == "pythia"


# Of one seed and one question there is no interval: a line, no band, no warning.
@every_drawing
def test_one_seed_is_drawn_without_a_warning(name):
    table = DRAWINGS[name][0]
    single = table[table["seed"] == 0]
    for data in (single, single.drop(columns="seed")):
        assert any(ax.has_data() for ax in panels(drawn(name, data)))


@pytest.mark.parametrize("name", ["plot_noise_test", "plot_cka", "plot_weight_distance"])
def test_of_one_measurement_there_is_a_line_and_no_band(name):
    table = DRAWINGS[name][0]
    single = table[table["seed"] == 0]
    for ax in panels(drawn(name, single)):
        assert ax.lines
        assert all(np.isfinite(line.get_ydata()).all() for line in lines(ax).values())
        for part in bands(ax):
            assert not np.isfinite(part.to_numpy()).any()


@pytest.mark.parametrize("seeds", [2, 1])
@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("plot_weight_distance", "l2", 0.0),
        ("plot_attack_path", "gap", 0.0),
        ("plot_cka", "cka", 1.0),
    ],
)
def test_what_is_exact_has_no_band(name, metric, value, seeds):
    """The base's distance to itself, the lowest point of a path, a model's likeness to itself."""
    table = DRAWINGS[name][0]
    exact = table.assign(value=table["value"].where(table["metric"] != metric, value))
    for part in bands(panels(drawn(name, exact[exact["seed"] < seeds]))[0]):
        assert not ((part["max"] - part["min"]) > 1e-9).any()


# The lines are those of the table, whatever the order of its rows.
@pytest.mark.parametrize("name", [name for name in DRAWINGS if name not in NO_LINES])
def test_rows_may_come_in_any_order(name):
    table = DRAWINGS[name][0]
    if name == "plot_freezing":  # whose rows are drawn in the order of the table
        order = table.sample(frac=1, random_state=0).sort_values(
            "held", key=lambda held: held.map(HELD.index), kind="stable"
        )
    else:
        order = table.sample(frac=1, random_state=0)
    for one, other in zip(panels(drawn(name)), panels(drawn(name, order)), strict=True):
        straight, mixed = lines(one), lines(other)
        assert set(straight) == set(mixed)
        for label, line in straight.items():
            assert mixed[label].get_xydata() == pytest.approx(line.get_xydata())


@pytest.mark.parametrize("name", A_MODEL + AN_ATTACK)
def test_panels_may_be_a_grid_of_axes(name):
    count = DRAWINGS[name][1]
    grid = plt.subplots(count // 2, 2, squeeze=False)[1]
    found = drawn(name, axes=grid)
    assert list(found) == list(grid.ravel())


# In a new figure there is room: no legend lies on what is drawn, nor is cut off at the edge.
@pytest.mark.parametrize("name", [*A_MODEL, *AN_ATTACK, "plot_freezing", "plot_attack_path"])
def test_in_a_new_figure_the_legend_lies_beside_the_panels(name):
    axes = panels(drawn(name))
    figure = axes[0].figure
    figure.draw_without_rendering()
    (box,) = [ax.get_legend().get_window_extent() for ax in axes if ax.get_legend()]
    assert box.x0 >= max(ax.get_window_extent().x1 for ax in axes)
    assert box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


# What `Result.load` reads again from a .csv has no whole numbers where some are missing.
@pytest.mark.parametrize("name", ["plot_weight_distance", "plot_attack_plane", "plot_freezing"])
def test_a_table_that_was_saved_looks_the_same(name, tmp_path):
    again = Result.load(Result(DRAWINGS[name][0]).save(tmp_path / "rows.csv"))
    one, other = drawn(name), drawn(name, again)
    assert ticks(one.xaxis) == ticks(other.xaxis)
    assert ticks(one.yaxis) == ticks(other.yaxis)
    for a, b in zip(one.lines, other.lines, strict=True):
        assert a.get_xydata() == pytest.approx(b.get_xydata())


# --- A panel a model: defences are columns, attacks rows ---


@pytest.mark.parametrize("name", A_MODEL)
class TestPanelsByModel:
    def test_columns_are_titled_the_undefended_first(self, name):
        table = DRAWINGS[name][0]
        assert [ax.get_title() for ax in drawn(name)] == ["undefended", "RepNoise", "", ""]
        alone = drawn(name, table[table["attack"] == "none"])
        assert [ax.get_title() for ax in alone] == ["undefended", "RepNoise"]

    def test_rows_say_their_attack_the_weakest_first(self, name):
        axes = drawn(name)
        words = [axes[place].get_ylabel().partition("\n")[0] for place in (0, 2)]
        assert words == ["before the attack", "after the large attack"]
        table = DRAWINGS[name][0]
        (first, _) = drawn(name, table[table["attack"] == "none"])
        assert first.get_ylabel() == axes[0].get_ylabel().partition("\n")[2] != ""

    def test_in_a_new_figure_defences_are_columns_and_scales_are_shared(self, name):
        axes = drawn(name)
        places = [ax.get_subplotspec() for ax in axes]
        assert [(p.rowspan.start, p.colspan.start) for p in places] == [
            (0, 0), (0, 1), (1, 0), (1, 1)
        ]  # fmt: skip
        assert len({(ax.get_xlim(), ax.get_ylim()) for ax in axes}) == 1

    def test_only_the_edges_are_labelled(self, name):
        axes = drawn(name)
        assert [bool(ax.get_xlabel()) for ax in axes] == [False, False, True, True]
        assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, True, False]

    def test_one_panel_says_what_colours_mean(self, name):
        found = [legend(ax) for ax in drawn(name) if ax.get_legend()]
        words = ["harmful", "harmless", "harmful, of another question"]
        assert found == [words[: 2 if name == "plot_pca" else 3]]

    @pytest.mark.parametrize("lost", SHOWN, ids="-".join)
    def test_a_model_that_was_not_looked_at_is_an_empty_panel(self, name, lost):
        table = DRAWINGS[name][0]
        mine = (table["defence"] == lost[0]) & (table["attack"] == lost[1])
        axes = drawn(name, table[~mine])
        assert [ax.has_data() for ax in axes] == [model != lost for model in SHOWN]
        (words,) = [legend(ax) for ax in axes if ax.get_legend()]
        assert words == next(legend(ax) for ax in drawn(name) if ax.get_legend())

    # What is drawn in one panel only is named all the same, and nothing twice.
    def test_the_legend_is_that_of_all_panels(self, name):
        table = DRAWINGS[name][0]
        here = (table["defence"] == "none") & (table["attack"] == "large")
        axes = drawn(name, table[here | (table["group"] == "harmful")])
        (words,) = [legend(ax) for ax in axes if ax.get_legend()]
        assert words == next(legend(ax) for ax in drawn(name) if ax.get_legend())


class TestLogitMass:
    @pytest.mark.parametrize(("place", "model"), enumerate(SHOWN))
    def test_it_draws_means_and_intervals_over_seeds_and_questions(self, place, model):
        ax, rows = drawn("plot_logit_mass")[place], of_model(MASSES, *model)
        found = lines(ax)
        for side, part in zip(SIDES, bands(ax), strict=True):
            expected = intervals(rows[rows["group"] == side], "layer", "prompt")
            line = found[style.look(side)["label"]]
            assert line.get_xdata().tolist() == [0, 1, 2]
            assert line.get_ydata() == pytest.approx(expected["value"].to_numpy())
            assert part.to_numpy() == pytest.approx(expected[["low", "high"]].to_numpy())
            assert to_hex(line.get_color()) == style.COLOURS[side].lower()

    # Two answers to one question in one seed are one measurement.
    def test_texts_of_one_question_are_averaged_first(self):
        twice = MASSES[MASSES["prompt"] == "question 0"].assign(value=-9.0)
        ax = drawn("plot_logit_mass", pd.concat([MASSES, twice]))[0]
        rows = of_model(MASSES, "none", "none").query("group == 'harmful'")
        halved = rows["value"].where(rows["prompt"] != "question 0", (rows["value"] - 9) / 2)
        means = halved.groupby(rows["layer"]).mean()
        assert lines(ax)["harmful"].get_ydata() == pytest.approx(means.to_numpy())

    def test_its_labels_say_what_layer_0_is(self):
        ax = drawn("plot_logit_mass", one_model("plot_logit_mass"))[0]
        assert ax.get_xlabel() == "layer (0: embedding)"
        assert ax.get_ylabel() == "log-probability (nats a token)"
        ax.figure.draw_without_rendering()
        assert np.mod(ax.get_xticks(), 1) == pytest.approx(0)


def dashes(outline: Patch) -> str:
    """The word for an outline's dashes, however Matplotlib keeps it."""
    dots = (0.0, tuple(mpl.rcParams["lines.dotted_pattern"]))
    found = outline.get_linestyle()
    return ":" if found in (":", "dotted", dots) else str(found)


class TestDensities:
    @pytest.mark.parametrize("layer", [None, 1])
    def test_it_draws_histograms_of_one_layer_over_all_seeds(self, layer):
        rows = MASSES[MASSES["layer"] == (2 if layer is None else layer)]
        edges = np.linspace(rows["value"].min(), rows["value"].max(), 8)
        axes = drawn("plot_densities", layer=layer, bins=7)
        for ax, model in zip(axes, SHOWN, strict=True):
            for outline, side in zip(ax.patches, SIDES, strict=True):
                mine = of_model(rows, *model).query("group == @side")["value"]
                corners = outline.get_xy()
                heights, at = corners[1:-1:2, 1], corners[1:-1:2, 0]
                assert len(mine) == 8
                assert heights == pytest.approx(np.histogram(mine, edges, density=True)[0])
                assert at == pytest.approx(edges[:-1])
                assert (heights * np.diff(edges)).sum() == pytest.approx(1)
                assert to_hex(outline.get_edgecolor()) == style.COLOURS[side].lower()

    def test_a_layer_that_is_not_there_is_told(self):
        with pytest.raises(KitError, match="no layer 9"):
            drawn("plot_densities", layer=9)

    @pytest.mark.parametrize(
        ("key", "value", "read"),
        [
            ("color", "#123456", lambda p: to_hex(p.get_edgecolor())),
            ("lw", 3.5, lambda p: p.get_linewidth()),
            ("linewidth", 3.5, lambda p: p.get_linewidth()),
            ("ls", ":", dashes),
            ("linestyle", ":", dashes),
        ],
    )
    def test_the_callers_keywords_win_under_either_name(self, key, value, read):
        for ax in drawn("plot_densities", **{key: value}):
            assert {read(outline) for outline in ax.patches} == {value}


class TestPCA:
    def test_it_draws_a_mark_for_each_text(self):
        for ax, model in zip(drawn("plot_pca"), SHOWN, strict=True):
            clouds = [part for part in ax.collections if isinstance(part, PathCollection)]
            for cloud, side in zip(clouds, SIDES[:2], strict=True):
                mine = of_model(COMPONENTS, *model).query("group == @side")
                assert len(mine) == 10
                assert np.asarray(cloud.get_offsets()) == pytest.approx(
                    mine[["pc1", "pc2"]].to_numpy()
                )
                assert to_hex(cloud.get_facecolor()[0]) == style.COLOURS[side].lower()

    # Printed grey, the two kinds have their own marks.
    def test_kinds_differ_in_their_marks(self):
        shapes = [part.get_paths()[0].vertices for part in drawn("plot_pca")[0].collections]
        assert shapes[0].shape != shapes[1].shape or not np.allclose(*shapes)

    @pytest.mark.parametrize(
        ("key", "value", "read"),
        [
            ("color", "#123456", lambda p: to_hex(p.get_facecolor()[0])),
            ("c", "#123456", lambda p: to_hex(p.get_facecolor()[0])),
            ("s", 33, lambda p: p.get_sizes()[0]),
            ("alpha", 0.25, lambda p: p.get_alpha()),
            ("lw", 3.5, lambda p: p.get_linewidth()[0]),
            ("linewidth", 3.5, lambda p: p.get_linewidth()[0]),
            ("linewidths", 3.5, lambda p: p.get_linewidth()[0]),
        ],
    )
    def test_the_callers_keywords_win_under_either_name(self, key, value, read):
        for ax in drawn("plot_pca", **{key: value}):
            assert {read(cloud) for cloud in ax.collections} == {value}

    # Of each model, in a corner of its panel, and nothing where it is not known.
    def test_it_says_how_much_is_seen(self):
        shares = {"none": 0.387, "repnoise": 1.0}
        told = COMPONENTS.assign(explained=COMPONENTS["defence"].map(shares))
        found = [[text.get_text() for text in ax.texts] for ax in drawn("plot_pca", told)]
        assert found == [["39% of variance"], ["100% of variance"]] * 2
        for ax in drawn("plot_pca", told):
            ax.figure.draw_without_rendering()
            box, inside = ax.texts[0].get_window_extent(), ax.get_window_extent()
            assert inside.x0 < box.x0 < box.x1 < inside.x1
            assert inside.y0 < box.y0 < box.y1 < inside.y0 + 0.3 * inside.height
        bare = drawn("plot_pca", told.drop(columns="explained"))
        assert not any(ax.texts for ax in bare)

    def test_a_panel_of_no_model_says_nothing(self):
        lost = (COMPONENTS["defence"] == "none") & (COMPONENTS["attack"] == "none")
        first, *rest = drawn("plot_pca", COMPONENTS[~lost])
        assert not first.texts
        assert all(ax.texts for ax in rest)


# --- A panel an attack: each defence its line, what chance gives in black ---

NULLS = {
    "plot_probe": {"chance": "--", "shuffled": ":"},
    "plot_noise_test": {"null_95": "--"},
    "plot_cka": {"shuffled": ":"},
}


def measured(name: str) -> pd.DataFrame:
    table = DRAWINGS[name][0]
    return table[table["group"] == "harmful"] if name == "plot_noise_test" else table


@pytest.mark.parametrize("name", AN_ATTACK)
class TestPanelsByAttack:
    def test_it_draws_means_and_intervals(self, name):
        """Over seeds, and over the splits of a probe, which stand for questions."""
        rows = measured(name)
        rows = rows[rows["metric"] == LAYERED[name]]
        question = "split" if name == "plot_probe" else None
        for ax, attack in zip(drawn(name), ["none", "large"], strict=True):
            for defence, part in zip(["none", "repnoise"], bands(ax), strict=True):
                expected = intervals(of_model(rows, defence, attack), "layer", question)
                if name != "plot_noise_test":  # shares, which end at 0 and 1
                    expected = expected.clip(0, 1)
                line = lines(ax)[WORDS[defence]]
                assert line.get_xdata().tolist() == [0, 1, 2]
                assert line.get_ydata() == pytest.approx(expected["value"].to_numpy())
                assert part.to_numpy() == pytest.approx(expected[["low", "high"]].to_numpy())

    def test_what_chance_gives_is_black_and_at_its_mean_over_all_models(self, name):
        rows = measured(name)
        for ax, attack in zip(drawn(name), ["none", "large"], strict=True):
            black = [line for line in ax.lines if line.get_color() == "black"]
            assert len(black) == len(NULLS[name])
            for line, (null, dashes) in zip(black, NULLS[name].items(), strict=True):
                mine = rows[(rows["metric"] == null) & (rows["attack"] == attack)]
                means = mine.groupby("layer")["value"].mean()
                assert line.get_ydata() == pytest.approx(means.to_numpy())
                assert line.get_linestyle() == dashes

    def test_each_defence_has_its_look(self, name):
        found = lines(drawn(name)[0])
        for defence in ("none", "repnoise"):
            look = style.look(defence)
            line = found[look.pop("label")]
            assert line.get_color() == look["color"]
            assert line.get_marker() == look["marker"]
            assert line.get_linestyle() == look["linestyle"]

    def test_panels_are_attacks_the_weakest_first(self, name):
        axes = drawn(name)
        assert [ax.get_title() for ax in axes] == ["before", "large attack"]
        assert [ax.get_xlabel() for ax in axes] == ["layer", "layer"]
        assert [bool(ax.get_ylabel()) for ax in axes] == [True, False]
        assert axes[0].get_ylim() == axes[1].get_ylim()

    def test_of_one_attack_there_is_no_title(self, name):
        table = DRAWINGS[name][0]
        (ax,) = drawn(name, table[table["attack"] == "large"])
        assert ax.get_title() == ""
        assert ax.get_legend() is not None

    def test_the_last_panel_names_the_lines_the_undefended_first(self, name):
        first, last = drawn(name)
        assert legend(last)[-2:] == ["undefended", "RepNoise"]
        assert len(legend(last)) == 2 + len(NULLS[name])
        assert first.get_legend() is None

    def test_a_metric_that_is_not_there_is_told(self, name):
        table = DRAWINGS[name][0]
        with pytest.raises(KitError, match=LAYERED[name]):
            drawn(name, table[table["metric"] != LAYERED[name]])

    def test_without_what_chance_gives_the_lines_are_still_drawn(self, name):
        table = DRAWINGS[name][0]
        axes = drawn(name, table[table["metric"] == LAYERED[name]])
        assert [list(lines(ax))[-2:] for ax in axes] == [["undefended", "RepNoise"]] * 2

    def test_layers_are_whole_numbers(self, name):
        for ax in drawn(name):
            ax.figure.draw_without_rendering()
            assert np.mod(ax.get_xticks(), 1) == pytest.approx(0)


def test_selectivity_is_drawn_against_0():
    for ax, attack in zip(plots.plot_probe(PROBED, "selectivity"), ["none", "large"], strict=True):
        (black,) = [line for line in ax.lines if line.get_color() == "black"]
        assert list(black.get_ydata()) == [0, 0]
        rows = of_model(PROBED, "none", attack).query("metric == 'selectivity'")
        means = rows.groupby("layer")["value"].mean()
        assert lines(ax)["undefended"].get_ydata() == pytest.approx(means.to_numpy())
        assert "chance" not in lines(ax)


@pytest.mark.parametrize("group", ["harmful", "harmless"])
def test_the_noise_test_draws_the_group_it_is_asked_for(group):
    rows = NOISY[(NOISY["group"] == group) & (NOISY["metric"] == "mmd")]
    means = of_model(rows, "repnoise", "none").groupby("layer")["value"].mean()
    drawn_ = lines(drawn("plot_noise_test", group=group)[0])["RepNoise"]
    assert drawn_.get_ydata() == pytest.approx(means.to_numpy())


def test_a_group_that_is_not_there_is_told():
    with pytest.raises(KitError, match="nothing of the kind"):
        drawn("plot_noise_test", group="nothing of the kind")


NULL_WORDS = {
    "plot_probe": ["chance", "shuffled"],
    "plot_noise_test": ["true noise, 95 % below"],
    "plot_cka": ["shuffled"],
}


@pytest.mark.parametrize("name", AN_ATTACK)
def test_words_of_legends_are_english(name):
    assert legend(drawn(name)[-1]) == [*NULL_WORDS[name], "undefended", "RepNoise"]


# Beside the black lines of chance, which are broken and have no marks.
@pytest.mark.parametrize("name", AN_ATTACK)
def test_a_black_defence_is_told_from_chance(name):
    table = DRAWINGS[name][0].replace({"defence": {"repnoise": "security_vectors"}})
    for ax in drawn(name, table):
        found = lines(ax)
        mine = found.pop("security vectors")
        assert (mine.get_color(), mine.get_linestyle()) == ("#000000", "-")
        assert mine.get_marker() != "None"
        nulls = [line for line in found.values() if line.get_color() == "black"]
        assert len(nulls) == len(NULLS[name])
        assert all(line.get_marker() == "None" for line in nulls)
        assert all(line.get_linestyle() != "-" for line in nulls)


# A defence that was looked at before the attack only is named all the same, and none twice.
@pytest.mark.parametrize("name", AN_ATTACK)
def test_the_legend_names_the_lines_of_all_panels(name):
    table = DRAWINGS[name][0]
    lost = (table["defence"] == "none") & (table["attack"] == "large")
    axes = drawn(name, table[~lost])
    assert "undefended" not in lines(axes[1])
    (words,) = [legend(ax) for ax in axes if ax.get_legend()]
    assert sorted(words) == sorted([*NULL_WORDS[name], "undefended", "RepNoise"])


def test_cka_is_shown_from_0_to_1():
    for ax in drawn("plot_cka"):
        low, high = ax.get_ylim()
        assert -0.1 < low <= 0 < 1 <= high < 1.1


# --- Distances in the weights ---


class TestWeightDistance:
    @pytest.mark.parametrize("kind", ["all", "attention", "norm"])
    @pytest.mark.parametrize("metric", ["l2", "relative"])
    def test_layers_are_joined_at_their_means_and_intervals(self, metric, kind):
        ax = drawn("plot_weight_distance", metric=metric, kind=kind)
        rows = DISTANT[(DISTANT["metric"] == metric) & (DISTANT["kind"] == kind)].dropna()
        start = 1 if kind == "all" else 0
        for defence, part in zip(["none", "repnoise"], bands(ax), strict=True):
            expected = intervals(rows[rows["defence"] == defence], "layer")
            line = lines(ax)[WORDS[defence]]
            assert line.get_xdata().tolist() == [start, start + 1, start + 2]
            assert line.get_ydata() == pytest.approx(expected["value"].to_numpy())
            assert part.to_numpy() == pytest.approx(expected[["low", "high"]].to_numpy())
            assert line.get_color() == style.look(defence)["color"]

    def test_what_is_no_layer_stands_apart_with_its_interval(self):
        ax = drawn("plot_weight_distance")
        assert ticks(ax.xaxis) == ["embedding", "0", "1", "2", "norm", "head"]
        rows = DISTANT[(DISTANT["metric"] == "l2") & DISTANT["layer"].isna()]
        for defence, part in zip(["none", "repnoise"], ax.containers, strict=True):
            expected = intervals(rows[rows["defence"] == defence], "part")
            marks, _, (bars,) = part.lines
            assert marks.get_linestyle() == "None"
            assert marks.get_marker() == style.look(defence)["marker"]
            assert np.round(np.array(marks.get_xdata(), float)).tolist() == [0, 4, 5]
            expected = expected.loc[["embedding", "norm", "head"]]
            assert marks.get_ydata() == pytest.approx(expected["value"].to_numpy())
            ends = np.array(bars.get_segments())[..., 1]
            assert ends == pytest.approx(expected[["low", "high"]].to_numpy())

    # Intervals side by side, not over one another, and each nearest to its own name.
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_marks_beside_the_layers_stand_apart(self, count):
        one = DISTANT[DISTANT["defence"] == "none"]
        names = ["none", "vaccine", "repnoise", "mine", "yours"][:count]
        table = pd.concat([one.assign(defence=name) for name in names])
        ax = drawn("plot_weight_distance", table)
        shifts = np.array([part.lines[0].get_xdata() - [0, 4, 5] for part in ax.containers])
        assert shifts == pytest.approx(np.tile(shifts[:, :1], 3))
        assert shifts.sum(0) == pytest.approx(0)
        assert (np.diff(shifts[:, 0]) > 0.05).all()
        assert np.abs(shifts).max() < 0.4
        for part in ax.containers:
            (bars,) = part.lines[2]
            at = np.array(bars.get_segments())[:, 0, 0]
            assert at == pytest.approx(part.lines[0].get_xdata())

    # GPT-2's positions come first in a table that was sorted otherwise.
    def test_the_embedding_stands_first_and_what_has_no_name_after_the_layers(self):
        own = DISTANT[DISTANT["part"] == "norm"].assign(part="wpe.weight")
        ax = drawn("plot_weight_distance", pd.concat([own, DISTANT[::-1]]))
        assert ticks(ax.xaxis) == ["embedding", "0", "1", "2", "wpe.weight", "head", "norm"]

    def test_in_any_order_each_mark_stands_over_its_name(self):
        found = []
        for table in (DISTANT, DISTANT.sample(frac=1, random_state=1)):
            ax = drawn("plot_weight_distance", table)
            names = ticks(ax.xaxis)
            for part in ax.containers:
                at, heights = part.lines[0].get_data()
                found.append({names[round(x)]: y for x, y in zip(at, heights, strict=True)})
        assert found[:2] == [pytest.approx(marks) for marks in found[2:]]

    def test_each_defence_is_named_once(self):
        assert legend(drawn("plot_weight_distance")) == ["undefended", "RepNoise"]

    def test_heights_begin_at_0(self):
        assert drawn("plot_weight_distance").get_ylim()[0] == 0

    @pytest.mark.parametrize(("layers", "turned"), [(3, 0), (32, 45)])
    def test_many_layers_have_turned_names(self, layers, turned):
        ax = drawn("plot_weight_distance", distant(layers))
        assert {label.get_rotation() for label in ax.get_xticklabels()} == {turned}
        assert len(ticks(ax.xaxis)) == layers + 3

    def test_several_attacks_are_told(self):
        both = pd.concat([DISTANT.assign(attack=attack) for attack in ATTACKS])
        with pytest.raises(KitError, match="several attacks"):
            drawn("plot_weight_distance", both)

    @pytest.mark.parametrize("wrong", [{"metric": "l1"}, {"kind": "bias"}])
    def test_a_metric_or_kind_that_is_not_there_is_told(self, wrong):
        with pytest.raises(KitError, match=next(iter(wrong.values()))):
            drawn("plot_weight_distance", **wrong)


# --- Parts held still ---


def marks(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each budget: the places of its marks, (x, y), and the ends of their intervals."""
    found = {}
    for part in ax.containers:
        line, _, (bars,) = part.lines
        found[part.get_label()] = line.get_xydata(), np.array(bars.get_segments())[..., 0]
    return found


BUDGET_WORDS = {"before any attack": 0, "3e-4, 64": 64, "8e-4, 512": 512}


class TestFreezing:
    @pytest.mark.parametrize("group", ["seen", "unseen"])
    @pytest.mark.parametrize("metric", ["recall", "perplexity"])
    def test_it_draws_the_summary(self, metric, group):
        rows = FROZEN[(FROZEN["metric"] == metric) & (FROZEN["group"] == group)]
        cells = summary(rows, by=["held", "examples", "metric"]).query("seed == 'all'")
        found = marks(plots.plot_freezing(FROZEN, metric, group=group))
        assert list(found) == list(BUDGET_WORDS)
        for words, (places, ends) in found.items():
            mine = cells[cells["examples"] == BUDGET_WORDS[words]].set_index("held").loc[HELD]
            assert places[:, 0] == pytest.approx(mine["value"].to_numpy())
            assert np.round(places[:, 1]).tolist() == [0, 1, 2, 3]
            assert ends == pytest.approx(mine[["low", "high"]].to_numpy())

    def test_the_means_are_those_of_a_groupby(self):
        rows = FROZEN[(FROZEN["metric"] == "recall") & (FROZEN["group"] == "seen")]
        means = rows.groupby(["examples", "held"])["value"].mean()
        for words, (places, _) in marks(drawn("plot_freezing")).items():
            expected = means[BUDGET_WORDS[words]].loc[HELD]
            assert places[:, 0] == pytest.approx(expected.to_numpy())

    # Nothing given away in 4 questions: up to 60 % may still be.
    def test_a_share_of_0_has_its_exact_bound(self):
        for _, ends in marks(drawn("plot_freezing", FROZEN.assign(value=0.0))).values():
            assert ends == pytest.approx(np.tile([0, 1 - 0.025 ** (1 / 4)], (4, 1)))

    def test_rows_are_named_in_the_order_of_the_table_the_first_on_top(self):
        ax = drawn("plot_freezing")
        assert ticks(ax.yaxis) == HELD
        assert ax.yaxis_inverted()
        assert ax.get_ylabel() == "held still during the defence"

    def test_budgets_stand_apart_in_order_and_are_told_without_colour(self):
        ax = drawn("plot_freezing")
        heights = np.array([places[:, 1] for places, _ in marks(ax).values()])
        assert (np.diff(heights, axis=0) > 0.1).all()
        assert np.abs(heights - np.round(heights)).max() < 0.4
        lines_ = [part.lines[0] for part in ax.containers]
        assert len({line.get_marker() for line in lines_}) == 3
        assert len({to_hex(line.get_color()) for line in lines_}) == 3
        assert legend(ax) == list(BUDGET_WORDS)
        assert ax.get_legend().get_title().get_text() == "attack: rate, examples"

    def test_a_share_is_shown_from_0_to_1_and_a_perplexity_whole(self):
        low, high = drawn("plot_freezing").get_xlim()
        assert -0.1 < low <= 0 < 1 <= high < 1.1
        assert plots.plot_freezing(FROZEN, "perplexity").get_xlim()[1] > 10

    def test_what_was_not_measured_is_left_out(self):
        lost = (FROZEN["held"] == "head") & (FROZEN["examples"] == 512)
        found = marks(drawn("plot_freezing", FROZEN[~lost]))
        assert np.round(found["8e-4, 512"][0][:, 1]).tolist() == [0, 1, 3]
        assert len(found["3e-4, 64"][0]) == 4

    def test_a_metric_that_is_not_there_is_told(self):
        with pytest.raises(KitError, match="recal"):
            drawn("plot_freezing", metric="recal")

    def test_two_methods_in_one_table_are_told(self):
        other = FROZEN[FROZEN["defence"] == "repnoise"]
        other = other.assign(defence="vaccine", value=1 - other["value"])
        with pytest.raises(KitError, match="several defences"):
            drawn("plot_freezing", pd.concat([FROZEN, other]))


# --- Along an attack ---


class TestAttackPath:
    def test_it_draws_the_static_distance_at_its_means(self):
        """A distance is never below 0, whatever Student's t says."""
        self.check(drawn("plot_attack_path")[0], PASSED[PASSED["metric"] == "gap"])

    def test_it_draws_the_norm_of_the_gradient_at_its_geometric_means(self):
        rows = PASSED[PASSED["metric"] == "grad_norm"]
        self.check(drawn("plot_attack_path")[1], rows, np.log, np.exp)

    @staticmethod
    def check(ax, rows, there=np.asarray, back=lambda value: value.clip(lower=0)):
        for defence, part in zip(["none", "repnoise"], bands(ax), strict=True):
            mine = rows[rows["defence"] == defence]
            expected = back(intervals(mine.assign(value=there(mine["value"])), "step"))
            line = lines(ax)[WORDS[defence]]
            assert line.get_xdata().tolist() == MOMENTS
            assert line.get_ydata() == pytest.approx(expected["value"].to_numpy())
            assert part.to_numpy() == pytest.approx(expected[["low", "high"]].to_numpy())
            assert line.get_color() == style.look(defence)["color"]

    # On a plain logarithmic axis step 0 is nowhere.
    def test_step_0_is_seen_and_steps_double(self):
        for ax in drawn("plot_attack_path"):
            at = ax.transData.transform([(step, 1) for step in (0, 1, 2, 4, 8)])[:, 0]
            assert ax.get_window_extent().x0 <= at[0] < at[1]
            assert np.diff(at[1:]) == pytest.approx(np.full(3, at[2] - at[1]))

    def test_it_has_english_labels_and_one_legend(self):
        gap, norm = drawn("plot_attack_path")
        assert gap.get_ylabel() == "loss above the lowest (nats a token)"
        assert norm.get_ylabel() == "norm of the gradient"
        assert [ax.get_xlabel() for ax in (gap, norm)] == ["steps of the attack"] * 2
        assert [legend(ax) for ax in (gap, norm) if ax.get_legend()] == [["undefended", "RepNoise"]]
        assert (gap.get_yscale(), norm.get_yscale()) == ("linear", "log")

    def test_several_attacks_are_told(self):
        both = pd.concat([PASSED.assign(attack=attack) for attack in ATTACKS])
        with pytest.raises(KitError, match="several attacks"):
            drawn("plot_attack_path", both)

    @pytest.mark.parametrize("metric", ["gap", "grad_norm"])
    def test_a_metric_that_is_not_there_is_told(self, metric):
        with pytest.raises(KitError, match=metric):
            drawn("plot_attack_path", PASSED[PASSED["metric"] != metric])


def surface(ax: Axes) -> mpl.contour.QuadContourSet:
    (found,) = [part for part in ax.collections if isinstance(part, mpl.contour.QuadContourSet)]
    return found


class TestAttackPlane:
    # Each point of the grid lies within the shade of its value, and in no other.
    @pytest.mark.parametrize("along", ["x", "y"])
    def test_shades_are_the_losses(self, along):
        data = sliced(lambda x, y: np.exp(0.5 * (x if along == "x" else y)))
        drawn_ = surface(drawn("plot_attack_plane", data))
        edges, shades = drawn_.levels, drawn_.get_paths()
        assert len(shades) == len(edges) - 1
        inner = data[(data["metric"] == "loss") & data["x"].between(-0.9, 4.9)]
        for row in inner[inner["y"].between(-0.9, 2.9)].to_dict("records"):
            level = int(np.searchsorted(edges, row["value"], side="right")) - 1
            inside = [shade.contains_point((row["x"], row["y"])) for shade in shades]
            assert np.flatnonzero(inside).tolist() == [level]

    def test_shades_are_equal_ratios_of_the_loss(self):
        drawn_, loss = surface(drawn("plot_attack_plane")), SLICED.query("metric == 'loss'")
        ratios = drawn_.levels[1:] / drawn_.levels[:-1]
        assert ratios == pytest.approx(np.full(len(ratios), ratios[0]))
        low, high = loss["value"].agg(["min", "max"])
        # Wide enough for the lowest and the highest, and no wider.
        assert low * 0.99 < drawn_.levels[0] <= low < high <= drawn_.levels[-1] < high * 1.01
        assert isinstance(drawn_.norm, LogNorm)

    def test_the_lowest_losses_have_the_lowest_shade(self):
        low = sliced(lambda x, y: 1e-5 * np.exp(2.5 * (x + 1)))
        shown = surface(drawn("plot_attack_plane", low))
        lowest = shown.get_facecolor()[0]
        assert lowest[3] == 1
        assert lowest[:3] == pytest.approx(shown.get_cmap()(0.0)[:3], abs=0.1)
        # There is no arrow at either end of the colour bar: nothing lies beyond.
        assert shown.extend == "neither"

    def test_the_way_is_drawn_in_the_order_of_its_steps(self):
        shuffled = SLICED.sample(frac=1, random_state=0)
        for data in (SLICED, shuffled):
            way = drawn("plot_attack_plane", data).lines[0]
            assert way.get_xydata() == pytest.approx(np.array(list(WAY.values())))

    def test_base_defended_and_attacked_are_marked_and_named(self):
        ax = drawn("plot_attack_plane")
        places = {"base": (0, 0), "defended": WAY[0], "attacked": WAY[4]}
        assert {text.get_text(): text.xy for text in ax.texts} == {
            name: pytest.approx(place) for name, place in places.items()
        }
        marked = [line.get_xydata()[0] for line in ax.lines if len(line.get_xydata()) == 1]
        assert np.array(marked) == pytest.approx(np.array(list(places.values()), float))

    def test_it_has_english_labels(self):
        ax = drawn("plot_attack_plane")
        assert "defended model" in ax.get_xlabel()
        assert "L2" in ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.figure.axes[-1].get_ylabel() == "harmful loss (nats a token)"

    @pytest.mark.parametrize(
        ("key", "value", "read"),
        [
            ("cmap", "viridis", lambda s: s.get_cmap().name),
            ("levels", [0.5, 1.0, 2.0], lambda s: list(s.levels)),
            ("alpha", 0.5, lambda s: s.get_alpha()),
            ("colors", ["#123456"], lambda s: [to_hex(s.get_facecolor()[1])]),
        ],
    )
    def test_the_callers_keywords_win(self, key, value, read):
        assert read(surface(drawn("plot_attack_plane", **{key: value}))) == value

    def test_it_takes_a_norm(self):
        norm = mpl.colors.Normalize(0, 20)
        assert surface(drawn("plot_attack_plane", norm=norm)).norm is norm

    @pytest.mark.parametrize(
        ("column", "words"),
        [
            ("defence", "one defence and one seed"),
            ("seed", "one defence and one seed"),
            ("attack", "several attacks"),
        ],
    )
    def test_a_table_of_several_slices_is_told(self, column, words):
        both = pd.concat([SLICED.assign(**{column: value}) for value in (0, 1)])
        with pytest.raises(KitError, match=words):
            drawn("plot_attack_plane", both)

    @pytest.mark.parametrize("metric", ["loss", "path"])
    def test_a_metric_that_is_not_there_is_told(self, metric):
        with pytest.raises(KitError, match=metric):
            drawn("plot_attack_plane", SLICED[SLICED["metric"] != metric])
