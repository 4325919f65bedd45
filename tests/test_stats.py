"""Intervals cover as often as they say, differences are paired, and words follow the numbers."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from scipy.optimize import brentq

from repnoise_kit.errors import KitError
from repnoise_kit.stats import (
    SHARES,
    Interval,
    compare_cells,
    difference,
    holm,
    interval,
    p_value,
    summary,
    verdict,
)

SEEDS, QUESTIONS, TRUTH = 5, 24, 0.3
MIXES = [(1, 0.5, 0.5), (0.3, 0.5, 1), (0.5, 1, 0.5), (0.5, 0.5, 0.5)]
"""Planted spreads: of seeds, of questions, of what is left."""

any_seed = given(st.integers(0, 2**32 - 1))
few = settings(max_examples=25, deadline=None, derandomize=True)


def crossed(draw: np.random.Generator, *spreads: float) -> np.ndarray:
    """A table around TRUTH: each seed and each question moves all its values together."""
    of_seed, of_question, rest = spreads
    return (
        TRUTH
        + of_seed * draw.normal(size=(SEEDS, 1))
        + of_question * draw.normal(size=(1, QUESTIONS))
        + rest * draw.normal(size=(SEEDS, QUESTIONS))
    )


def covered(found: Callable[[np.ndarray], Interval], *spreads: float, times: int = 1000) -> float:
    draw = np.random.default_rng(sum(map(ord, "coverage")))
    hits = [found(crossed(draw, *spreads)) for _ in range(times)]
    return float(np.mean([low <= TRUTH <= high for _, low, high in hits]))


def long(table: np.ndarray, **columns: object) -> pd.DataFrame:
    """The rows that a seeds × questions table is a pivot of."""
    seeds, questions = np.indices(table.shape).reshape(2, -1)
    prompts = [f"q{place}" for place in questions]
    return pd.DataFrame({**columns, "value": table.ravel(), "seed": seeds, "prompt": prompts})


def cell(table: np.ndarray, metric: str = "recall", **columns: str) -> pd.DataFrame:
    usual = {"defence": "none", "attack": "small", "group": "seen", "metric": metric}
    return long(np.asarray(table, dtype=float), **usual | columns)


def both(treated: np.ndarray, control: np.ndarray) -> pd.DataFrame:
    return pd.concat([long(treated, defence="repnoise"), long(control, defence="none")])


def treated_minus_control(frame: pd.DataFrame) -> Interval:
    return difference(frame, {"defence": "repnoise"}, {"defence": "none"})


# --- Intervals: coverage ---


# The promise of a 95 % interval, on data in which seeds and questions both matter.
@pytest.mark.parametrize("spreads", MIXES, ids=str)
def test_interval_covers_the_truth_as_often_as_it_says(spreads):
    assert 0.92 <= covered(interval, *spreads) <= 0.985


# The same data taken for independent values: what the crossed formula is there to mend.
@pytest.mark.parametrize("spreads", MIXES, ids=str)
def test_an_interval_over_all_values_alike_covers_too_seldom(spreads):
    assert covered(lambda table: interval(table.reshape(1, -1)), *spreads) < 0.85


# --- Intervals: second opinions ---


@few
@any_seed
def test_of_one_seed_it_is_the_plain_t_interval(seed):
    values = np.random.default_rng(seed).normal(size=(1, QUESTIONS))
    plain = scipy_stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert interval(values)[1:] == pytest.approx(tuple(plain))


# The analysis of variance as regression: what each factor explains beyond the ones before it.
@few
@any_seed
def test_the_spread_is_that_of_a_two_way_analysis_of_variance(seed):
    table = crossed(np.random.default_rng(seed), 1, 1, 1)
    rows = long(table)
    design = {
        "mean": np.ones((len(rows), 1)),
        "seed": pd.get_dummies(rows["seed"]).to_numpy(float),
        "question": pd.get_dummies(rows["prompt"]).to_numpy(float),
    }
    left = [_unexplained(rows["value"], *list(design.values())[: n + 1]) for n in range(3)]
    freedoms = np.array([SEEDS - 1, QUESTIONS - 1, (SEEDS - 1) * (QUESTIONS - 1)])
    squares = np.array([left[0] - left[1], left[1] - left[2], left[2]]) / freedoms
    # Elsewhere the estimate falls below a part: see the next test.
    assume(min(squares[:2]) > squares[2])
    variance = (squares[0] + squares[1] - squares[2]) / (SEEDS * QUESTIONS)
    freedom = (squares[0] + squares[1] - squares[2]) ** 2 / sum(squares**2 / freedoms)
    low, high = scipy_stats.t(freedom, table.mean(), variance**0.5).interval(0.95)
    assert interval(table) == pytest.approx((table.mean(), low, high))


def _unexplained(values: pd.Series, *columns: np.ndarray) -> float:
    design = np.hstack(columns)
    fit, *_ = np.linalg.lstsq(design, values, rcond=None)
    return float(((values - design @ fit) ** 2).sum())


# The estimate of a variance can fall below 0, where it would claim certainty.
@few
@any_seed
def test_it_is_never_narrower_than_either_part_alone(seed):
    # Two seeds that contradict each other on every question: the rest outweighs both parts.
    values = np.random.default_rng(seed).normal(size=(1, QUESTIONS))
    table = np.vstack([values, -values]) + np.arange(QUESTIONS) * 1e-3
    found = interval(table)
    of_questions = scipy_stats.sem(table.mean(0))
    of_seeds = scipy_stats.sem(table.mean(1))
    assert (found.high - found.low) / 2 >= 1.96 * max(of_questions, of_seeds)


# --- Intervals: exact properties ---


@few
@any_seed
def test_the_order_of_seeds_and_questions_does_not_matter(seed):
    draw = np.random.default_rng(seed)
    table = crossed(draw, 1, 1, 1)
    mixed = table[draw.permutation(SEEDS)][:, draw.permutation(QUESTIONS)]
    assert interval(mixed) == pytest.approx(interval(table))


@few
@any_seed
def test_seeds_and_questions_play_the_same_part(seed):
    table = crossed(np.random.default_rng(seed), 1, 1, 1)
    assert interval(table.T) == pytest.approx(interval(table))


@few
@any_seed
def test_it_moves_and_stretches_with_the_values(seed):
    table = crossed(np.random.default_rng(seed), 1, 1, 1)
    moved = [2 * bound + 3 for bound in interval(table)]
    assert interval(2 * table + 3) == pytest.approx(moved)


@few
@any_seed
def test_it_turns_round_with_the_sign(seed):
    table = crossed(np.random.default_rng(seed), 1, 1, 1)
    value, low, high = interval(table)
    assert interval(-table) == pytest.approx((-value, -high, -low))


# --- Intervals: where no spread can be seen ---


@pytest.mark.parametrize("value", [0, 1])
@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize("questions", [1, 4, 24, 100])
def test_all_alike_gives_the_exact_binomial_bound_over_questions(value, seeds, questions):
    exact = scipy_stats.binomtest(value * questions, questions).proportion_ci(method="exact")
    found = interval(np.full((seeds, questions), value))
    assert found == pytest.approx((value, exact.low, exact.high))


# In closed form, at the level of one side of 95 %.
def test_the_bound_of_n_out_of_n_is_a_root():
    assert interval(np.ones((1, 24))).low == pytest.approx(0.025 ** (1 / 24))


# More seeds of the same questions are not more questions.
def test_seeds_do_not_sharpen_the_bound():
    assert interval(np.ones((5, 24))) == interval(np.ones((1, 24)))


# 0.5 everywhere, and of differences -1 everywhere: 0 / 0 in Satterthwaite's formula.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.5, -1.0])
def test_any_value_everywhere_has_bounds(value):
    found = interval(np.full((5, 24), value))
    assert found.low <= value <= found.high


# Two seeds that take turns: each seed has the same mean, and each question, and still they differ.
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_spreads_that_cancel_are_no_certainty(step):
    turns = step * (np.indices((2, 6)).sum(0) % 2)
    value, low, high = interval(turns)
    assert low < value < high
    assert 0 < p_value(turns) < 1


# --- Differences ---


@few
@any_seed
def test_difference_is_the_interval_of_the_paired_gaps(seed):
    draw = np.random.default_rng(seed)
    treated, control = crossed(draw, 1, 1, 1), crossed(draw, 1, 1, 1)
    assert treated_minus_control(both(treated, control)) == pytest.approx(
        interval(treated - control)
    )


# What both share, whatever it is, says nothing about their difference.
@few
@any_seed
def test_what_seeds_and_questions_share_cancels(seed):
    draw = np.random.default_rng(seed)
    treated, control = crossed(draw, 0, 0, 1), crossed(draw, 0, 0, 1)
    shared = crossed(draw, 9, 9, 9)
    with_it = treated_minus_control(both(treated + shared, control + shared))
    assert with_it == pytest.approx(treated_minus_control(both(treated, control)))


# Pairs are found by seed and prompt, not by the order of rows.
def test_rows_may_come_in_any_order():
    draw = np.random.default_rng(0)
    frame = both(crossed(draw, 1, 1, 1), crossed(draw, 1, 1, 1))
    mixed = frame.sample(frac=1, random_state=0)
    assert treated_minus_control(mixed) == pytest.approx(treated_minus_control(frame))


@few
@any_seed
def test_the_other_way_round_is_the_mirror_image(seed):
    draw = np.random.default_rng(seed)
    frame = both(crossed(draw, 1, 1, 1), crossed(draw, 1, 1, 1))
    value, low, high = difference(frame, {"defence": "none"}, {"defence": "repnoise"})
    assert treated_minus_control(frame) == pytest.approx((-value, -high, -low))


# A cell may be named by several columns; rows of other cells are not looked at.
def test_difference_looks_at_its_two_cells_only():
    draw = np.random.default_rng(0)
    small = both(crossed(draw, 1, 1, 1), crossed(draw, 1, 1, 1)).assign(attack="small")
    large = both(crossed(draw, 1, 1, 1), crossed(draw, 1, 1, 1)).assign(attack="large")
    cells = [{"defence": name, "attack": "small"} for name in ("repnoise", "none")]
    assert difference(pd.concat([small, large]), *cells) == treated_minus_control(small)


# Nothing there: shared effects large, no effect of the defence. The defence's own luck in each
# seed and on each question is there too, as in a real run.
def test_nulls_are_called_different_about_one_time_in_twenty():
    draw = np.random.default_rng(sum(map(ord, "nulls")))
    called = 0
    for _ in range(300):
        shared = crossed(draw, 1, 1, 1)
        treated, control = (shared + crossed(draw, 0.3, 0.3, 0.5) for _ in range(2))
        called += "noise" not in verdict(treated_minus_control(both(treated, control)))
    assert 0.01 <= called / 300 <= 0.08


# Something there: the same data with an effect, which is found nearly always.
def test_an_effect_is_called_by_its_direction():
    draw = np.random.default_rng(sum(map(ord, "effects")))
    called = 0
    for _ in range(50):
        shared = crossed(draw, 1, 1, 1)
        treated, control = (shared + crossed(draw, 0.3, 0.3, 0.5) for _ in range(2))
        called += verdict(treated_minus_control(both(treated - 1.5, control))).startswith("lower")
    assert called / 50 >= 0.95


# The clearest result there is: everything without the defence, nothing with it.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_perfect_defence_is_lower():
    found = treated_minus_control(both(np.zeros((5, 24)), np.ones((5, 24))))
    assert verdict(found).startswith("lower, by 1.00")


# Two models that agree on every question differ by 0, give or take the same on either side.
def test_agreement_everywhere_leaves_room_on_both_sides():
    found = treated_minus_control(both(np.ones((5, 24)), np.ones((5, 24))))
    assert found.low == pytest.approx(-found.high)


@pytest.mark.parametrize("lost", [{"seed": 4}, {"prompt": "q3"}, {"defence": "none"}], ids=str)
def test_a_lost_partner_is_not_taken_for_noise(lost):
    draw = np.random.default_rng(0)
    frame = both(crossed(draw, 1, 1, 1) + 99, crossed(draw, 1, 1, 1))
    ((column, value),) = lost.items()
    partner = (frame["defence"] == "none") & (frame[column] == value)
    with pytest.raises(KitError):
        treated_minus_control(frame[~partner])


@pytest.mark.parametrize("column", ["defence", "value", "seed", "prompt"])
def test_difference_names_the_missing_column(column):
    frame = both(np.zeros((2, 3)), np.ones((2, 3))).drop(columns=column)
    with pytest.raises(KitError, match=column):
        treated_minus_control(frame)


# --- Tests of a mean of 0 ---


def spread(draw: np.random.Generator) -> np.ndarray:
    """A table of any shape, around a mean that may or may not be 0."""
    seeds, questions = draw.integers(1, 6), draw.integers(2, 13)
    parts = draw.normal(size=(seeds, 1)), draw.normal(size=(1, questions))
    rest = draw.normal(size=(seeds, questions))
    return draw.uniform(-2, 2) + sum(draw.uniform(0, 1) * part for part in (*parts, rest))


@settings(few, max_examples=200)
@any_seed
def test_p_is_below_a_twentieth_where_the_interval_leaves_zero_out(seed):
    table = spread(np.random.default_rng(seed))
    _, low, high = interval(table)
    assert (p_value(table) < 0.05) == (low > 0 or high < 0)


# Seen from either end of its interval, a mean is just on the edge.
@few
@any_seed
def test_the_ends_of_the_interval_have_a_p_of_a_twentieth(seed):
    table = spread(np.random.default_rng(seed))
    _, low, high = interval(table)
    assert [p_value(table - low), p_value(table - high)] == pytest.approx([0.05, 0.05])


@few
@any_seed
def test_of_one_seed_or_one_question_p_is_that_of_the_t_test(seed):
    values = np.random.default_rng(seed).normal(0.3, 1, size=QUESTIONS)
    plain = scipy_stats.ttest_1samp(values, 0).pvalue
    assert p_value(values[None]) == pytest.approx(plain)
    assert p_value(values[:, None]) == pytest.approx(plain)


@few
@any_seed
def test_p_knows_neither_sign_nor_scale_nor_order(seed):
    draw = np.random.default_rng(seed)
    table = spread(draw)
    mixed = table[draw.permutation(len(table))][:, draw.permutation(table.shape[1])]
    assert p_value(-3 * mixed) == pytest.approx(p_value(table))


# Nothing there, whatever moves together: seeds, questions, both, neither.
@pytest.mark.parametrize("spreads", [(1, 0, 0.5), (0, 1, 0.5), *MIXES], ids=str)
def test_p_is_below_a_twentieth_about_one_time_in_twenty(spreads):
    draw = np.random.default_rng(sum(map(ord, "false alarms")))
    called = [p_value(crossed(draw, *spreads) - TRUTH) < 0.05 for _ in range(1000)]
    assert 0.015 <= np.mean(called) <= 0.08


# Only what is left over: the parts are over-counted, which errs on the safe side.
def test_p_is_careful_where_seeds_and_questions_do_not_matter():
    draw = np.random.default_rng(sum(map(ord, "false alarms")))
    called = [p_value(crossed(draw, 0, 0, 1) - TRUTH) < 0.05 for _ in range(1000)]
    assert np.mean(called) <= 0.05


@pytest.mark.parametrize("questions", [1, 2, 5, 6, 24])
@pytest.mark.parametrize("gap", [-1.0, -0.2, 0.5, 1.0])
@pytest.mark.parametrize("seeds", [1, 5])
def test_gaps_all_alike_are_tested_by_their_sign(gap, seeds, questions):
    sign = scipy_stats.binomtest(questions, questions).pvalue
    assert p_value(np.full((seeds, questions), gap)) == pytest.approx(sign)


def test_no_gap_anywhere_is_no_evidence():
    assert p_value(np.zeros((5, 24))) == 1


# --- Families of tests ---

probabilities = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0, 0.01, 0.025, 0.05, 1])), min_size=1, max_size=6
)


# Closed testing: a hypothesis falls when every set that holds it does, by Bonferroni's test.
@settings(few, max_examples=100)
@given(probabilities)
def test_holm_is_the_closure_of_bonferroni(p):
    places = range(len(p))
    sets = [s for size in places for s in itertools.combinations(places, size + 1)]
    joint = {s: min(1.0, len(s) * min(p[place] for place in s)) for s in sets}
    closed = [max(joint[s] for s in sets if place in s) for place in places]
    assert holm(p) == pytest.approx(closed)


@few
@given(probabilities, st.randoms(use_true_random=False))
def test_holm_keeps_the_order_it_was_given(p, draw):
    places = draw.sample(range(len(p)), len(p))
    assert holm([p[place] for place in places]).tolist() == holm(p)[places].tolist()


@few
@given(probabilities)
def test_holm_raises_and_keeps_the_ranking(p):
    found = holm(p)
    assert np.all(found >= p)
    assert np.all(found <= 1)
    assert np.all(np.diff(found[np.argsort(p)]) >= 0)
    assert np.all(found <= np.minimum(1, len(p) * np.array(p)))


@few
@given(probabilities, st.integers(0, 5), st.floats(0, 1))
def test_holm_of_a_larger_p_is_no_smaller(p, place, larger):
    raised = [max(q, larger) if i == place else q for i, q in enumerate(p)]
    assert np.all(holm(raised) >= holm(p))


def test_holm_of_one_or_none_is_what_it_was_given():
    assert holm([0.03]).tolist() == [0.03]
    assert holm([]).tolist() == []


# The promise: one false alarm or more in at most one family in twenty, however the tests hang
# together, and whether or not some of the six effects are there.
@pytest.mark.parametrize("together", [0.0, 0.5])
@pytest.mark.parametrize("effects", [0, 3])
def test_holm_keeps_families_free_of_false_alarms(effects, together):
    draw = np.random.default_rng(sum(map(ord, "families")))
    shared, own = draw.normal(size=(4000, 1)), draw.normal(size=(4000, 6))
    scores = together**0.5 * shared + (1 - together) ** 0.5 * own
    scores[:, :effects] += 4
    families = 2 * scipy_stats.norm.sf(abs(scores))
    alarms = np.mean([(holm(family)[effects:] < 0.05).any() for family in families])
    assert alarms <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


# --- Two cells under several conditions ---

BUDGETS = list(itertools.product([3e-4, 6e-4, 8e-4], [64, 512]))
CELLS = {"defence": "repnoise"}, {"defence": "none"}


def attacked(effects: list[float], rest: float = 0.5) -> pd.DataFrame:
    """Both cells at each budget; the defence moves each by its effect."""
    draw = np.random.default_rng(sum(map(ord, "budgets")))
    frames = []
    for (lr, examples), effect in zip(BUDGETS, effects, strict=False):
        shared = crossed(draw, 1, 1, 1)
        ours, theirs = (shared + crossed(draw, 0.2, 0.2, rest) for _ in range(2))
        frames.append(both(ours + effect, theirs).assign(lr=lr, examples=examples))
    return pd.concat(frames, ignore_index=True)


def first_words(table: pd.DataFrame) -> list[str]:
    return [words.split(",")[0].split(" (")[0] for words in table["words"]]


def test_planted_differences_are_named_at_their_budgets():
    found = compare_cells(attacked([-2, 0, 2, 0, -2, 0]), *CELLS)
    none = "within noise"
    assert first_words(found) == ["lower", none, "higher", none, "lower", none]
    assert [tuple(row) for row in found[["lr", "examples"]].to_numpy()] == BUDGETS


def test_each_budget_is_its_own_difference():
    frame = attacked([-1, 0, 1, 0, -0.4, 0.2])
    found = compare_cells(frame, *CELLS)
    alone = [frame[(frame["lr"] == lr) & (frame["examples"] == n)] for lr, n in BUDGETS]
    expected = [difference(rows, *CELLS) for rows in alone]
    assert found[["value", "low", "high"]].to_numpy() == pytest.approx(np.array(expected))
    assert found["p_holm"].to_numpy() == pytest.approx(holm(found["p"]))
    gaps = [
        rows.pivot_table(index="seed", columns=["defence", "prompt"], values="value")
        for rows in alone
    ]
    tests = [p_value((gap["repnoise"] - gap["none"]).to_numpy()) for gap in gaps]
    assert found["p"].to_numpy() == pytest.approx(np.array(tests))


def test_a_comparison_has_these_columns_and_kinds():
    found = compare_cells(attacked([0] * 6), *CELLS)
    numbers = ["lr", "examples", "value", "low", "high", "p", "p_holm"]
    assert list(found.columns) == [*numbers, "words"]
    # A count stays a whole number.
    assert [kind.kind for kind in found[numbers].dtypes] == list("fifffff")


# Pairs and budgets are found by what rows say, not by where they stand.
def test_a_comparison_does_not_depend_on_the_order_of_rows():
    frame = attacked([-2, 0, 2, 0, -0.3, 0.3])
    mixed = compare_cells(frame.sample(frac=1, random_state=0), *CELLS)
    ordered = mixed.sort_values(["lr", "examples"], ignore_index=True)
    pd.testing.assert_frame_equal(ordered, compare_cells(frame, *CELLS))


# One of six at p = 0.03: alone it is a difference, among six looks it is one to be expected.
def test_one_weak_difference_among_six_is_noise():
    frame = attacked([0] * 6, rest=1)
    mine = frame["defence"] == "repnoise"
    for place, (lr, examples) in enumerate(BUDGETS):
        rows = (frame["lr"] == lr) & (frame["examples"] == examples)
        wide = frame[rows].pivot(index="seed", columns=["defence", "prompt"], values="value")
        gaps = (wide["repnoise"] - wide["none"]).to_numpy()
        gaps = gaps - gaps.mean()
        weak = brentq(lambda by, gaps=gaps: p_value(gaps + by) - 0.03, 1e-6, 9) if not place else 0
        frame.loc[rows & mine, "value"] += weak - difference(frame[rows], *CELLS).value
    found = compare_cells(frame, *CELLS)
    assert found["p"].to_numpy() == pytest.approx([0.03, 1, 1, 1, 1, 1])
    assert found["low"][0] > 0
    assert found["p_holm"][0] == pytest.approx(0.18)
    assert first_words(found) == ["within noise"] * 6
    alone = compare_cells(frame[(frame["lr"] == 3e-4) & (frame["examples"] == 64)], *CELLS)
    assert first_words(alone) == ["higher"]


def test_conditions_are_told_apart_by_what_the_caller_says():
    frame = attacked([-2, 2]).rename(columns={"examples": "dose"}).drop(columns="lr")
    found = compare_cells(frame, *CELLS, by=["dose"])
    assert found["dose"].tolist() == [64, 512]
    assert first_words(found) == ["lower", "higher"]


@pytest.mark.parametrize("column", ["lr", "examples", "defence", "value", "seed"])
def test_a_comparison_names_the_missing_column(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'"):
        compare_cells(attacked([0, 0]).drop(columns=column), *CELLS)


def test_a_comparison_of_nothing_is_told():
    with pytest.raises(KitError):
        compare_cells(attacked([0])[:0], *CELLS)
    with pytest.raises(KitError, match="vaccine"):
        compare_cells(attacked([0]), {"defence": "vaccine"}, {"defence": "none"})


# --- Words ---


def test_an_interval_is_written_as_in_a_table():
    assert str(Interval(0.789, 0.714, 0.868)) == "0.79 [0.71, 0.87]"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Interval(-0.41, -0.49, -0.33), "lower, by 0.41 [0.33, 0.49]"),
        (Interval(0.41, 0.33, 0.49), "higher, by 0.41 [0.33, 0.49]"),
        (Interval(0.05, -0.02, 0.12), "within noise (+0.05 [-0.02, 0.12])"),
        (Interval(-0.05, -0.12, 0.02), "within noise (-0.05 [-0.12, 0.02])"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_verdict_says_direction_size_and_interval(found, words):
    assert verdict(found) == words


# An interval that reaches 0 does not leave it out.
@pytest.mark.parametrize("found", [Interval(0.1, 0.0, 0.2), Interval(-0.1, -0.2, 0.0)])
def test_an_interval_that_touches_zero_is_noise(found):
    assert verdict(found).startswith("within noise")


# A corrected test may take a difference back, and never makes one.
@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Interval(-0.41, -0.49, -0.33), "within noise (-0.41 [-0.49, -0.33])"),
        (Interval(0.41, 0.33, 0.49), "within noise (+0.41 [0.33, 0.49])"),
        (Interval(0.05, -0.02, 0.12), "within noise (+0.05 [-0.02, 0.12])"),
        (Interval(0.9, np.nan, np.nan), "too few questions to say (+0.90)"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_a_corrected_test_does_not_find_is_noise(found, words):
    assert verdict(found, sure=False) == words


def test_what_cannot_be_told_is_not_called_noise():
    assert "noise" not in verdict(Interval(0.9, np.nan, np.nan))


# --- Summaries ---


def test_one_seed_is_one_row_over_prompts():
    found = summary(cell(np.random.default_rng(0).random((1, 6))))
    assert found[["seed", "over"]].to_numpy().tolist() == [["0", "prompts"]]


def test_several_seeds_are_a_row_over_all_first_and_a_row_each():
    found = summary(cell(np.random.default_rng(0).random((3, 6))))
    assert found[["seed", "over"]].to_numpy().tolist() == [
        ["all", "seeds and prompts"],
        ["0", "prompts"],
        ["1", "prompts"],
        ["2", "prompts"],
    ]


def test_the_numbers_of_a_row_are_the_interval_of_its_part():
    table = np.random.default_rng(0).normal(size=(3, 6))
    found = summary(cell(table, metric="some nats"))[["value", "low", "high"]].to_numpy()
    parts = [table, *(row[None] for row in table)]
    assert found == pytest.approx(np.array([interval(part) for part in parts]))


# Three seeds of six questions are six questions.
def test_n_counts_questions():
    assert set(summary(cell(np.random.default_rng(0).random((3, 6))))["n"]) == {6}


def test_cells_come_in_the_order_of_their_first_row():
    table = np.random.default_rng(0).random((1, 6))
    names = ["repnoise", "none", "another"]
    frame = pd.concat([cell(table, defence=name) for name in names])
    assert list(summary(frame)["defence"]) == names


def test_cells_are_told_apart_by_what_the_caller_says():
    small, large = np.random.default_rng(0).random((2, 1, 6))
    frame = pd.concat([cell(small, attack="small"), cell(large, attack="large")])
    found = summary(frame, by=["attack", "metric"])
    assert list(found.columns) == ["attack", "metric", "value", "low", "high", "n", "seed", "over"]
    assert list(found["value"]) == pytest.approx([small.mean(), large.mean()])


# One answer of perplexity 10⁶ must not drown the rest.
def test_perplexity_is_averaged_as_logarithms():
    table = np.exp(np.random.default_rng(0).normal(3, 2, size=(3, 6)))
    first = summary(cell(table, metric="perplexity")).iloc[0]
    assert first["value"] == pytest.approx(scipy_stats.gmean(table, axis=None))
    assert (first["low"], first["high"]) == pytest.approx(np.exp(interval(np.log(table))[1:]))


@pytest.mark.parametrize("metric", SHARES)
def test_the_interval_of_a_share_stays_in_zero_and_one(metric):
    # Two tables whose t intervals reach past 1, and below 0.
    high, low = np.array([[1, 1, 1, 0.2]]), np.array([[0, 0, 0, 0.8]])
    assert summary(cell(high, metric=metric))["high"].item() == 1
    assert summary(cell(low, metric=metric))["low"].item() == 0


def test_without_a_reason_nothing_is_clipped():
    assert summary(cell([[1, 1, 1, 0.2]], metric="some nats"))["high"].item() > 1


# A testbed without a judge gives utility in nats, below 0.
def test_utility_in_nats_is_not_clipped():
    assert summary(cell([[-3, -2, -1]], metric="utility"))["low"].item() < -2


@pytest.mark.parametrize("column", ["attack", "value", "seed"])
def test_summary_names_the_missing_column(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        summary(cell(np.ones((2, 3))).drop(columns=column))


# Seeds of different questions are not crossed, and their mean is nobody's.
def test_a_seed_that_lacks_a_question_is_told():
    with pytest.raises(KitError, match="seed"):
        summary(cell(np.random.default_rng(0).random((2, 3))).iloc[:-1])


# The same question twice in one cell means two cells were taken for one: two models, two rates.
def test_a_question_asked_twice_in_a_cell_is_told():
    frame = pd.concat([cell(np.zeros((2, 3))), cell(np.ones((2, 3)))])
    with pytest.raises(KitError, match="prompt"):
        summary(frame)


# Rows without a question: each seed is one measurement, and the interval is Student's over seeds.
def test_without_questions_the_interval_is_over_seeds():
    values = np.array([[0.3], [0.5], [0.4], [0.8]])
    pooled = summary(cell(values).drop(columns="prompt")).query("seed == 'all'").iloc[0]
    low, high = scipy_stats.t.interval(0.95, 3, values.mean(), scipy_stats.sem(values[:, 0]))
    assert (pooled["low"], pooled["high"]) == pytest.approx((low, high))
    assert pooled["over"] == "seeds"


def test_without_questions_several_rows_of_a_seed_are_told():
    with pytest.raises(KitError, match="prompt"):
        summary(cell(np.ones((2, 3))).drop(columns="prompt"))


# A probe's splits stand for questions, but one that is always right is not ten lucky draws.
def test_splits_stand_for_questions():
    table = np.random.default_rng(0).random((3, 5))
    asked, splits = cell(table), cell(table).rename(columns={"prompt": "split"})
    keys = ["value", "low", "high"]
    assert summary(splits)[keys].equals(summary(asked)[keys])
    sure = summary(cell(np.ones((3, 5))).rename(columns={"prompt": "split"})).iloc[0]
    assert (sure["low"], sure["value"], sure["high"]) == (1, 1, 1)
    assert summary(cell(np.ones((3, 5)))).iloc[0]["low"] < 1


def test_a_difference_without_questions_is_paired_by_seed():
    draw = np.random.default_rng(0)
    one, other = draw.random((4, 1)), draw.random((4, 1))
    frame = pd.concat([cell(one).assign(kind="a"), cell(other).assign(kind="b")])
    found = difference(frame.drop(columns="prompt"), {"kind": "a"}, {"kind": "b"})
    gaps = (one - other)[:, 0]
    expected = scipy_stats.t.interval(0.95, 3, gaps.mean(), scipy_stats.sem(gaps))
    assert (found.low, found.high) == pytest.approx(expected)
