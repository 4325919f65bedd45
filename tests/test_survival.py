"""Planted first crossings are found, censored runs stay censored, ratios are those planted."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.survival import cost_ratios, cost_to_break

MOMENTS = (0, 1, 2, 3, 4, 6, 8)
COLUMNS = ["defence", "attack", "lr", "seed", "steps", "tokens", "flops", "broken"]
NEEDED = ["defence", "attack", "lr", "seed", "step", "tokens", "flops", "group", "metric", "value"]

few = settings(max_examples=40, deadline=None, derandomize=True)
quarters = st.lists(st.integers(0, 4), min_size=1, max_size=len(MOMENTS))
"""A curve: how many of four questions are given away, moment by moment."""


def said(ratio):
    """One digit after the point, and two below 1."""
    return f"{ratio:.2f}" if ratio < 1 else f"{ratio:.1f}"


def run(told: list[int], **columns: object) -> pd.DataFrame:
    """The rows of one run: at each moment, so many of four questions are given away."""
    usual = {"defence": "none", "attack": "fine-tuning", "lr": 3e-4, "seed": 0}
    usual |= {"group": "seen", "metric": "recall"} | columns
    rows = [
        # Not in proportion: none of the three may stand for another.
        {"step": step, "tokens": 100.0 * step**2, "flops": 1e9 * step**3, "prompt": f"q{question}"}
        | {"value": float(question < count)}
        for step, count in zip(MOMENTS, told, strict=False)
        for question in range(4)
    ]
    return pd.DataFrame(rows).assign(**usual)


def found(curves: pd.DataFrame, *where: object, **how: object) -> tuple[int, bool]:
    row = cost_to_break(curves, *where, **how).iloc[0]
    return row["steps"], row["broken"]


def costs(table: dict[str, list[float]], **columns: object) -> pd.DataFrame:
    """What `cost_to_break` returns: the steps of each defence, a seed each, all broken."""
    rows = [
        {"defence": name, "seed": seed, "steps": steps, "tokens": steps**2, "flops": steps**3}
        for name, by_seed in table.items()
        for seed, steps in enumerate(by_seed)
    ]
    return pd.DataFrame(rows).assign(**{"attack": "a", "lr": 3e-4, "broken": True} | columns)


def ratio(frame: pd.DataFrame, name: str = "repnoise", **how: str) -> pd.Series:
    return cost_ratios(frame, **how).set_index("defence").loc[name]


# --- When a threshold is first reached ---


@pytest.mark.parametrize("place", range(len(MOMENTS)))
def test_a_planted_crossing_is_found(place):
    told = [1] * place + [3] * (len(MOMENTS) - place)
    assert found(run(told)) == (MOMENTS[place], True)


# Falling back under it later, or crossing again, changes nothing.
def test_the_first_crossing_counts():
    assert found(run([0, 0, 3, 0, 0, 4, 0])) == (2, True)


def test_to_reach_is_enough():
    assert found(run([0, 1, 2, 3, 4])) == (2, True)
    assert found(run([0, 1, 2, 3, 4]), "recall", 0.51) == (3, True)
    assert found(run([0, 1, 2, 3, 4]), "recall", 1.0) == (4, True)


def test_what_is_never_reached_costs_more_than_the_whole_attack():
    assert found(run([0, 1, 1, 1, 1, 1, 1])) == (8, False)


# An attack that diverged ends early, and is censored there.
def test_each_run_is_censored_at_its_own_end():
    both = pd.concat([run([0, 1, 1], seed=0), run([0, 1, 1, 1, 1], seed=1)])
    assert cost_to_break(both)[["steps", "broken"]].to_numpy().tolist() == [[2, False], [4, False]]


def test_what_is_given_away_before_the_attack_costs_nothing():
    row = cost_to_break(run([4, 0, 0])).iloc[0]
    assert row[["steps", "tokens", "flops"]].tolist() == [0, 0, 0]


def test_tokens_and_flops_are_those_of_that_step():
    row = cost_to_break(run([0, 0, 0, 0, 2, 4])).iloc[0]
    assert row[["steps", "tokens", "flops"]].tolist() == [4, 1600, 64e9]


# The definition, slowly: look at each moment in turn.
@few
@given(st.lists(quarters, min_size=1, max_size=4), st.sampled_from([0.25, 0.5, 0.6, 1.0]))
def test_it_is_the_definition_run_by_run(runs, threshold):
    curves = pd.concat([run(told, seed=seed) for seed, told in enumerate(runs)])
    expected = []
    for told in runs:
        crossed = [s for s, count in zip(MOMENTS, told, strict=False) if count / 4 >= threshold]
        expected.append([crossed[0], True] if crossed else [MOMENTS[len(told) - 1], False])
    table = cost_to_break(curves, threshold=threshold)
    assert table[["steps", "broken"]].to_numpy().tolist() == expected


@few
@given(quarters, st.integers(0, 2**32 - 1))
def test_the_order_of_rows_does_not_matter(told, seed):
    curves = pd.concat([run(told, seed=0), run(told[::-1], seed=1)])
    mixed = cost_to_break(curves.sample(frac=1, random_state=seed)).sort_values("seed")
    pd.testing.assert_frame_equal(mixed.reset_index(drop=True), cost_to_break(curves))


# A higher threshold is never reached earlier, nor by more runs.
@few
@given(quarters)
def test_to_give_away_more_takes_longer(told):
    steps, broken = zip(*(found(run(told), threshold=t / 4) for t in range(1, 5)), strict=True)
    order = [step if was else np.inf for step, was in zip(steps, broken, strict=True)]
    assert order == sorted(order)


# The share of runs not yet broken, against Kaplan and Meier's estimate of it.
@few
@given(st.lists(st.lists(st.integers(0, 4), min_size=7, max_size=7), min_size=1, max_size=8))
def test_the_share_unbroken_is_kaplan_and_meiers(runs):
    curves = pd.concat([run([0, *told[1:]], seed=seed) for seed, told in enumerate(runs)])
    table = cost_to_break(curves)
    whole = table["broken"].to_numpy(dtype=bool)
    sample = scipy_stats.CensoredData(
        uncensored=table["steps"][whole], right=table["steps"][~whole]
    )
    survival = scipy_stats.ecdf(sample).sf
    for step in MOMENTS:
        reached = curves[curves["step"] <= step].groupby(["seed", "step"])["value"].mean() >= 0.5
        unbroken = 1 - reached.groupby("seed").any().mean()
        assert survival.evaluate(step) == pytest.approx(unbroken)


# --- Which runs, which rows ---


def test_runs_are_told_apart_and_come_in_order():
    kinds = itertools.product(["repnoise", "none"], ["relearning", "fine-tuning"], [6e-4], [1, 0])
    names = ["defence", "attack", "lr", "seed"]
    cells = [dict(zip(names, kind, strict=True)) for kind in kinds]
    curves = pd.concat([run([0] * place + [4], **cell) for place, cell in enumerate(cells)][:7])
    table = cost_to_break(curves)
    assert list(table.columns) == COLUMNS
    assert table[names].to_dict("records") == cells[:7]
    assert table["steps"].tolist() == list(MOMENTS)


def test_only_the_rows_asked_for_are_looked_at():
    curves = pd.concat(
        [
            run([0, 4, 4, 4], metric="recall", group="seen"),
            run([0, 0, 4, 4], metric="recall", group="unseen"),
            run([0, 0, 0, 4], metric="harmfulness", group="seen"),
        ]
    )
    assert found(curves) == (1, True)
    assert found(curves, group="unseen") == (2, True)
    assert found(curves, "harmfulness") == (3, True)


def test_a_result_and_its_table_are_the_same():
    curves = run([0, 1, 2])
    before = curves.copy()
    pd.testing.assert_frame_equal(cost_to_break(Result(curves)), cost_to_break(curves))
    pd.testing.assert_frame_equal(curves, before)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, np.nan, np.inf, "half"])
def test_a_threshold_is_a_share(threshold):
    with pytest.raises(KitError, match="threshold"):
        cost_to_break(run([0, 4]), threshold=threshold)


@pytest.mark.parametrize(("column", "value"), [("metric", "recal"), ("group", "sen")])
def test_a_slip_of_the_pen_is_told(column, value):
    with pytest.raises(KitError, match=value):
        cost_to_break(run([0, 4]), **{column: value})


@pytest.mark.parametrize("column", NEEDED)
def test_a_missing_column_is_named(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        cost_to_break(run([0, 4]).drop(columns=column))


# --- How many times the control's ---


@pytest.mark.parametrize("by", ["steps", "tokens", "flops"])
@pytest.mark.parametrize("times", [0.5, 1, 2, np.e, 48])
def test_a_constant_ratio_is_that_ratio(times, by):
    slow = [2.0, 3.0, 8.0]
    row = ratio(costs({"none": slow, "repnoise": [times * s for s in slow]}), by=by)
    power = {"steps": 1, "tokens": 2, "flops": 3}[by]
    assert row[["ratio", "low", "high"]].to_numpy(float) == pytest.approx(times**power)
    assert row[["n", "broken"]].tolist() == [3, 3]


@few
@given(st.lists(st.tuples(*[st.integers(1, 999)] * 2), min_size=2, max_size=6))
def test_it_is_the_paired_t_interval_of_logarithms(pairs):
    none, ours = np.array(pairs, dtype=float).T
    row = ratio(costs({"none": none, "repnoise": ours}))
    assert row["ratio"] == pytest.approx(scipy_stats.gmean(ours / none))
    assert row["cost"] == pytest.approx(scipy_stats.gmean(ours))
    if np.ptp(logs := np.log(ours / none)) > 1e-9:
        plain = scipy_stats.ttest_1samp(logs, 0).confidence_interval(0.95)
        assert np.log([row["low"], row["high"]]) == pytest.approx(tuple(plain))
        assert (
            row["words"] == f"{said(row['ratio'])} times [{said(row['low'])}, {said(row['high'])}]"
        )


def test_the_control_is_once_itself():
    row = ratio(costs({"none": [2, 9, 4], "repnoise": [7, 7, 7]}), "none")
    assert row[["ratio", "low", "high"]].tolist() == [1, 1, 1]


@few
@given(st.lists(st.tuples(*[st.integers(1, 999)] * 2), min_size=2, max_size=6))
def test_the_other_way_round_it_is_the_reciprocal(pairs):
    frame = costs(dict(zip(["none", "repnoise"], zip(*pairs, strict=True), strict=True)))
    there, back = ratio(frame), ratio(frame, "none", control="repnoise")
    bounds = there[["ratio", "low", "high"]].to_numpy(float)
    assert 1 / back[["ratio", "high", "low"]].to_numpy(float) == pytest.approx(bounds)


# Seeds are matched by their number, not by the order of rows.
def test_ratios_do_not_depend_on_the_order_of_rows():
    frame = costs({"none": [2, 9, 4], "repnoise": [7, 8, 30]})
    mixed = frame.sample(frac=1, random_state=1)
    pd.testing.assert_series_equal(ratio(mixed), ratio(frame))


def test_each_attack_has_its_own_control():
    frame = pd.concat(
        [
            costs({"none": [2, 4], "repnoise": [6, 12]}, attack="fine-tuning"),
            costs({"none": [1, 5], "naive": [2, 10], "repnoise": [4, 20]}, attack="relearning"),
        ]
    )
    table = cost_ratios(frame)
    assert table[["attack", "defence"]].to_numpy().tolist() == [
        ["fine-tuning", "none"],
        ["fine-tuning", "repnoise"],
        ["relearning", "none"],
        ["relearning", "naive"],
        ["relearning", "repnoise"],
    ]
    assert table["ratio"].tolist() == pytest.approx([1, 3, 1, 2, 4])


# The promise of a 95 % interval at five seeds: paired seeds share their luck.
def test_the_interval_covers_the_planted_ratio_as_often_as_it_says():
    draw = np.random.default_rng(sum(map(ord, "ratios")))
    cells = []
    for attack in range(400):
        luck = draw.normal(3, 1, size=5)
        steps = np.exp([luck, luck + np.log(6) + draw.normal(0, 0.4, size=5)])
        cells.append(costs(dict(zip(["none", "repnoise"], steps, strict=True)), attack=attack))
    table = cost_ratios(pd.concat(cells)).query("defence == 'repnoise'")
    assert 0.92 <= table.eval("low <= 6 <= high").mean() <= 0.98


# --- Ratios where something is not known ---


def cut(frame: pd.DataFrame, name: str, seed: int = 0) -> pd.DataFrame:
    """The same costs, but this run was never broken."""
    run_of_it = (frame["defence"] == name) & (frame["seed"] == seed)
    return frame.assign(broken=frame["broken"] & ~run_of_it)


def test_a_run_that_was_never_broken_makes_it_a_lower_bound():
    frame = costs({"none": [2, 4, 8], "repnoise": [20, 20, 20]})
    known, open_ended = ratio(frame), ratio(cut(frame, "repnoise"))
    assert open_ended[["broken", "n"]].tolist() == [2, 3]
    assert open_ended["high"] == np.inf
    assert open_ended[["ratio", "low"]].tolist() == known[["ratio", "low"]].tolist()
    assert (
        open_ended["words"] == f"at least {said(known['ratio'])} times (from {said(known['low'])})"
    )


# The bound holds: whatever the run would have cost, the ratio is no smaller.
@pytest.mark.parametrize("truth", [20, 50, 10_000])
def test_the_lower_bound_holds(truth):
    seen = cut(costs({"none": [2, 4, 8], "repnoise": [20, 20, 20]}), "repnoise")
    whole = costs({"none": [2, 4, 8], "repnoise": [truth, 20, 20]})
    assert ratio(seen)["ratio"] <= ratio(whole)["ratio"]


# A control that was never broken would have cost more: the defence takes fewer times its cost.
def test_a_control_that_was_never_broken_makes_it_an_upper_bound():
    frame = costs({"none": [20, 20, 20], "repnoise": [2, 4, 8]})
    known, bounded = ratio(frame), ratio(cut(frame, "none"))
    assert bounded["low"] == 0
    assert bounded[["ratio", "high"]].tolist() == known[["ratio", "high"]].tolist()
    assert bounded["words"] == f"at most {said(known['ratio'])} times (to {said(known['high'])})"


def test_where_neither_was_broken_nothing_is_claimed():
    frame = cut(cut(costs({"none": [20, 20], "repnoise": [20, 10]}), "none"), "repnoise")
    row = ratio(frame)
    assert row[["low", "high"]].tolist() == [0, np.inf]
    assert "cannot tell" in row["words"]


def test_the_control_is_once_itself_broken_or_not():
    row = ratio(cut(costs({"none": [20, 20], "repnoise": [20, 10]}), "none"), "none")
    assert row[["ratio", "low", "high"]].tolist() == [1, 1, 1]
    assert row[["broken", "n"]].tolist() == [1, 2]


# One pair shows no spread, which is not the same as none.
def test_one_seed_has_no_interval():
    row = ratio(costs({"none": [2], "repnoise": [6]}))
    assert row["ratio"] == pytest.approx(3)
    assert np.isnan(row["low"])
    assert np.isnan(row["high"])
    assert row["words"].startswith("3.0 times")
    assert "nan" not in row["words"]


def test_seeds_without_a_partner_are_told():
    with pytest.raises(KitError, match="seeds"):
        cost_ratios(costs({"none": [2, 4, 8], "repnoise": [20, 20]}))


def test_a_seed_that_comes_twice_is_told():
    frame = costs({"none": [2, 4], "repnoise": [20, 20]})
    with pytest.raises(KitError, match="twice"):
        cost_ratios(pd.concat([frame, frame.assign(lr=1e-3)]))


def test_a_missing_control_is_told():
    with pytest.raises(KitError, match="'none'"):
        cost_ratios(costs({"repnoise": [20, 20]}))
    with pytest.raises(KitError, match="'nobody'"):
        cost_ratios(costs({"none": [20, 20]}), control="nobody")


@pytest.mark.parametrize("column", ["defence", "attack", "lr", "seed", "steps", "broken"])
def test_ratios_name_the_missing_column(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        cost_ratios(costs({"none": [2, 4]}).drop(columns=column))


# From curves to words, one seed by another four times as slow.
def test_from_curves_to_ratios():
    undefended = [run([0, 0, 4], seed=0), run([0, 4], seed=1)]
    slower = [run([0] * zeros + [4], defence="repnoise", seed=s) for s, zeros in enumerate((6, 4))]
    row = ratio(cost_to_break(pd.concat([*undefended, *slower])))
    assert row["words"] == "4.0 times [4.0, 4.0]"
