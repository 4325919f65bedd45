"""Published numbers are handed out safely, and planted results are judged as they were planted."""

import itertools
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from repnoise_kit.errors import KitError
from repnoise_kit.paper import ALIKE, SMALL, compare, table, tables
from repnoise_kit.resistance import in_words, means
from repnoise_kit.results import Result
from repnoise_kit.stats import Interval, compare_cells
from repnoise_kit.store import data_dir

OURS = list(itertools.product([3e-4, 6e-4, 8e-4], [64, 512]))
THEIRS = list(itertools.product([3e-5, 6e-5, 8e-5], [1000, 10_000]))
METRICS = ("recall", "harmfulness")
SEEDS, QUESTIONS = 3, 12
COLUMNS = [
    *("metric", "treated", "control", "lr", "examples", "paper_lr", "paper_examples", "theirs"),
    *("claim", "value", "low", "high", "p_holm", "words", "verdict"),
]

# Table 1 as it stands in the file: Vaccine with the first of its two strengths.
_FILE = pd.read_csv(data_dir() / "paper" / "resistance.csv")
_FIRST = _FILE[(_FILE["rho"] != 10) & (_FILE["examples"] > 0)]
TABLE_1 = _FIRST.set_index(["defence", "lr", "examples"])["value"].to_dict()
NAMES = list(dict.fromkeys(_FIRST["defence"]))


def planted(
    worth: Callable[[str, int], float],
    names: list[str] = NAMES,
    *,
    rest: float = 0.003,
    budgets: list[tuple[float, int]] = OURS,
    **columns: object,
) -> pd.DataFrame:
    """Rows as `resistance_grid` makes them: each defence at each budget has a planted mean."""
    draw = np.random.default_rng(sum(map(ord, "planted")))
    shared = 0.1 * draw.normal(size=(SEEDS, 1)) + 0.1 * draw.normal(size=(1, QUESTIONS))
    frames = []
    for name, (place, (lr, examples)) in itertools.product(names, enumerate(budgets)):
        noise = rest * draw.normal(size=(SEEDS, QUESTIONS))
        values = worth(name, place) + shared + noise - noise.mean()
        seeds, questions = np.indices(values.shape).reshape(2, -1)
        cell = {"defence": name, "lr": lr, "examples": examples, "value": values.ravel()}
        prompts = [f"question {question}" for question in questions]
        frames.append(pd.DataFrame({**cell, "seed": seeds, "prompt": prompts}))
    before = frames[0].assign(lr=0.0, examples=0, value=0.0)
    rows = pd.concat([before, *frames], ignore_index=True)
    return rows.assign(**{"group": "seen", "metric": "harmfulness"} | columns)


def printed(name: str, place: int) -> float:
    return TABLE_1[(name, *THEIRS[place])]


def judged(frame: pd.DataFrame, **how: str) -> pd.DataFrame:
    return compare(frame, **how).frame


@pytest.fixture(scope="module")
def faithful() -> pd.DataFrame:
    """A result in which Table 1 holds to the letter."""
    return planted(printed)


@pytest.fixture(scope="module")
def found(faithful: pd.DataFrame) -> pd.DataFrame:
    return judged(faithful)


# --- The tables ---


def test_the_list_has_every_table_and_each_can_be_had():
    listed = tables()
    assert list(listed.columns) == ["name", "number", "title", "setting", "metric"]
    for name in listed["name"]:
        mine, plain = table(name), pd.read_csv(data_dir() / "paper" / f"{name}.csv")
        assert {"metric", "value", "note"} <= set(mine.columns)
        assert mine["value"].tolist() == plain["value"].tolist()
        # A defence called none is not a gap, and a note that says nothing is empty.
        assert mine["note"].map(type).eq(str).all()
        assert mine["note"].tolist() == plain["note"].fillna("").tolist()


def test_no_defence_is_none():
    assert table("resistance")["defence"].tolist()[:8] == ["none"] * 7 + ["random"]


@pytest.mark.parametrize("name", ["resistence", "", "tables", "../paper/resistance", "1"])
def test_an_unknown_table_is_refused_with_the_list(name):
    with pytest.raises(KitError) as error:
        table(name)
    assert all(known in str(error.value) for known in tables()["name"])


@pytest.mark.parametrize("read", [lambda: table("resistance"), tables], ids=["table", "tables"])
def test_what_is_handed_out_is_a_copy(read):
    first = read()
    before = first.copy()
    first.iloc[:, -1] = "spoilt"
    first.drop(index=0, inplace=True)
    first["more"] = 1
    pd.testing.assert_frame_equal(read(), before)


# --- Planted results ---


def test_a_result_in_which_all_holds_replicates_all(found):
    assert set(found["verdict"]) == {"replicates"}
    assert set(found["claim"]) == {"lower", "higher", "alike"}
    said = found["words"].str.split(",").str[0]
    clear = found["claim"] != "alike"
    assert (said[clear] == found["claim"][clear]).all()


# Turned upside down, each direction is refuted; what was alike is alike still.
def test_a_result_turned_upside_down_replicates_no_direction():
    found = judged(planted(lambda name, place: 1 - printed(name, place)))
    alike = found["claim"] == "alike"
    assert set(found["verdict"][~alike]) == {"does not"}
    assert set(found["verdict"][alike]) == {"replicates"}


# All the same to within a hundredth: a difference that is claimed is shown to be none.
def test_a_result_without_differences_refutes_each_that_is_claimed():
    found = judged(planted(lambda name, place: 0.5))
    alike = found["claim"] == "alike"
    assert set(found["verdict"][~alike]) == {"does not"}
    assert set(found["verdict"][alike]) == {"replicates"}


# Means equal, and so much noise around them that anything could be true.
def test_a_result_too_noisy_to_tell_tells_nothing():
    found = judged(planted(lambda name, place: 0.5, rest=1.5))
    assert set(found["verdict"]) == {"cannot tell"}


# Clear differences of ours, each defence from each other: what they call alike is not.
def test_a_difference_refutes_that_two_are_alike():
    found = judged(planted(lambda name, place: NAMES.index(name) / 4))
    assert set(found["verdict"][found["claim"] == "alike"]) == {"does not"}


# A difference that is certain, and too small to be of interest.
def test_a_small_difference_is_alike():
    found = judged(planted(lambda name, place: 0.01 * NAMES.index(name), rest=0.001))
    alike = found[found["claim"] == "alike"]
    assert not alike["words"].str.startswith("within noise").any()
    assert set(alike["verdict"]) == {"replicates"}


# --- Claims ---


def test_the_claims_are_each_against_none_and_repnoise_against_each(found):
    others = [name for name in NAMES if name not in ("none", "repnoise")]
    expected = {("repnoise", name) for name in ["none", *others]}
    expected |= {(name, "none") for name in others}
    assert set(zip(found["treated"], found["control"], strict=True)) == expected
    assert len(found) == len(expected) * len(OURS)
    keys = ["metric", "treated", "control", "lr", "examples"]
    assert not found.duplicated(keys).any()
    assert list(found.columns) == COLUMNS


def test_what_they_claim_is_as_printed(found):
    for row in found.to_dict("records"):
        budget = row["paper_lr"], row["paper_examples"]
        gap = TABLE_1[(row["treated"], *budget)] - TABLE_1[(row["control"], *budget)]
        assert row["theirs"] == pytest.approx(gap)
        size = round(abs(gap), 4)
        direction = "lower" if gap < 0 else "higher"
        assert row["claim"] == ("alike" if size <= ALIKE else direction)


# Some of them, read off the paper.
@pytest.mark.parametrize(
    ("treated", "control", "budget", "claim"),
    [
        ("repnoise", "none", (8e-5, 10_000), "lower"),
        ("random", "none", (8e-5, 10_000), "higher"),
        ("safety_training", "none", (3e-5, 1000), "higher"),
        ("vaccine", "none", (3e-5, 1000), "lower"),
        ("vaccine", "none", (8e-5, 1000), "alike"),
        ("repnoise", "security_vectors", (3e-5, 1000), "alike"),
        ("repnoise", "security_vectors", (3e-5, 10_000), "alike"),
        ("adversarial_loss", "none", (8e-5, 1000), "alike"),
    ],
)
def test_some_claims_by_hand(found, treated, control, budget, claim):
    rows = found[(found["treated"] == treated) & (found["control"] == control)]
    at = (rows["paper_lr"] == budget[0]) & (rows["paper_examples"] == budget[1])
    assert rows[at]["claim"].tolist() == [claim]


# The judge, case by case: within SMALL of 0, clear, or neither.
@pytest.mark.parametrize(
    ("claim", "value", "half", "verdict"),
    [
        ("lower", -0.3, 0.1, "replicates"),
        ("lower", 0.3, 0.1, "does not"),
        ("lower", 0.0, 0.05, "does not"),
        ("lower", 0.0, 0.3, "cannot tell"),
        ("lower", -0.05, 0.02, "replicates"),
        ("higher", 0.3, 0.1, "replicates"),
        ("higher", -0.3, 0.1, "does not"),
        ("alike", 0.0, 0.05, "replicates"),
        ("alike", 0.05, 0.02, "replicates"),
        ("alike", 0.3, 0.1, "does not"),
        ("alike", 0.0, 0.3, "cannot tell"),
        ("alike", 0.05, 0.06, "cannot tell"),
    ],
)
def test_a_claim_is_judged_by_the_interval(claim, value, half, verdict):
    # One seed, and two questions on either side of the mean: the interval is known beforehand.
    reach = half / scipy_stats.t.ppf(0.975, 11) * np.sqrt(11)
    gaps = value + reach * np.where(np.arange(QUESTIONS) % 2, 1, -1)
    treated, control = {"lower": ("repnoise", "none"), "higher": ("random", "none")}.get(
        claim, ("repnoise", "security_vectors")
    )
    # Random is higher with the larger size only, security vectors alike at the lowest rate only.
    place = 1 if claim != "alike" else 0
    names = list(dict.fromkeys(["none", "repnoise", treated, control]))
    frame = planted(lambda name, place: 0.0, names, rest=0.0)
    frame = frame[(frame["seed"] == 0) & (frame["examples"] > 0)]
    mine = (frame["defence"] == treated).to_numpy()
    frame.loc[mine, "value"] = frame["value"][mine] + np.tile(gaps, len(OURS))
    found = judged(frame)
    row = found[(found["treated"] == treated) & (found["control"] == control)].iloc[place]
    assert row["claim"] == claim
    assert row[["low", "high"]].tolist() == pytest.approx([value - half, value + half])
    assert row["verdict"] == verdict
    assert SMALL == 0.1


# --- Budgets ---


def test_budgets_are_matched_by_rank(found):
    ours = found[["lr", "examples", "paper_lr", "paper_examples"]].drop_duplicates()
    assert [tuple(row) for row in ours.to_numpy()] == [
        (*mine, *their) for mine, their in zip(OURS, THEIRS, strict=True)
    ]


# Whatever the units are, only their order counts.
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(1e-6, 1), min_size=3, max_size=3, unique=True),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=2, unique=True),
)
def test_any_rising_rates_and_sizes_give_the_same_verdicts(lrs, sizes):
    names = ["none", "repnoise", "vaccine"]
    budgets = list(itertools.product(sorted(lrs), sorted(sizes)))
    other = judged(planted(printed, names, budgets=budgets))
    plain = judged(planted(printed, names))
    units = ["lr", "examples"]
    assert [tuple(row) for row in other[units].to_numpy()[:6]] == budgets
    pd.testing.assert_frame_equal(other.drop(columns=units), plain.drop(columns=units))


@pytest.mark.parametrize(("column", "kept"), [("lr", [3e-4, 6e-4]), ("examples", [64])])
def test_as_many_budgets_are_needed_as_the_table_has(faithful, column, kept):
    with pytest.raises(KitError, match=f"values of {column}"):
        compare(faithful[faithful[column].isin([0, *kept])])


def test_a_budget_too_many_is_refused(faithful):
    more = pd.concat([faithful, faithful[faithful["examples"] == 64].assign(examples=9)])
    with pytest.raises(KitError, match="values of examples"):
        compare(more)


# --- Our side of it ---


def test_our_numbers_are_those_of_compare_cells(faithful, found):
    rows = faithful[faithful["examples"] > 0]
    for treated, control in [("repnoise", "none"), ("vaccine", "none"), ("repnoise", "random")]:
        plain = compare_cells(rows, {"defence": treated}, {"defence": control})
        ours = found[(found["treated"] == treated) & (found["control"] == control)]
        shared = ["lr", "examples", "value", "low", "high", "p_holm", "words"]
        pd.testing.assert_frame_equal(
            ours[shared].reset_index(drop=True), plain[shared], check_dtype=False
        )


def test_the_order_of_rows_does_not_matter(faithful, found):
    few = faithful["defence"].isin(["none", "repnoise", "vaccine"])
    keys = ["treated", "control", "lr", "examples"]
    mixed = judged(faithful[few].sample(frac=1, random_state=0))
    pairs = found["treated"].isin(mixed["treated"]) & found["control"].isin(mixed["control"])
    plain = found[pairs & found["treated"].isin(["repnoise", "vaccine"])]
    pd.testing.assert_frame_equal(
        mixed.sort_values(keys, ignore_index=True), plain.sort_values(keys, ignore_index=True)
    )


# Both of ours: by recall Table 1 holds, by harmfulness it is upside down.
def test_each_metric_is_judged_by_itself():
    names = ["none", "repnoise"]
    frames = [
        planted(printed, names, metric="recall"),
        planted(lambda name, place: 1 - printed(name, place), names, metric="harmfulness"),
        planted(printed, names, metric="utility"),
    ]
    found = judged(pd.concat(frames))
    assert dict(found.groupby("metric")["verdict"].unique().map(list)) == {
        "recall": ["replicates"],
        "harmfulness": ["does not"],
    }
    assert found["metric"].tolist() == ["recall"] * 6 + ["harmfulness"] * 6


def test_each_group_is_judged_by_itself():
    names = ["none", "repnoise"]
    upside_down = planted(lambda name, place: 1 - printed(name, place), names, group="unseen")
    frame = pd.concat([planted(printed, names), upside_down])
    assert set(judged(frame)["verdict"]) == {"replicates"}
    assert set(judged(frame, group="unseen")["verdict"]) == {"does not"}
    with pytest.raises(KitError, match="sen"):
        compare(frame, group="sen")


def test_defences_that_the_result_lacks_are_left_out(faithful, found):
    there = faithful[faithful["defence"].isin(["none", "repnoise", "vaccine"])]
    fewer = judged(there)
    pairs = {*zip(fewer["treated"], fewer["control"], strict=True)}
    assert pairs == {("repnoise", "none"), ("repnoise", "vaccine"), ("vaccine", "none")}
    same = [pair in pairs for pair in zip(found["treated"], found["control"], strict=True)]
    pd.testing.assert_frame_equal(fewer, found[same].reset_index(drop=True))


# What only we have, or the paper has no number for, has no claim.
def test_defences_that_the_table_lacks_are_left_out(found):
    more = pd.concat([planted(printed), planted(lambda name, place: 0.1, ["weight_noise"])])
    pd.testing.assert_frame_equal(judged(more), found)


# Without RepNoise the others still are against none, and without none RepNoise against them.
def test_half_of_the_claims_can_be_judged_alone(faithful):
    without = judged(faithful[faithful["defence"].isin(["none", "vaccine"])])
    assert set(zip(without["treated"], without["control"], strict=True)) == {("vaccine", "none")}
    only = judged(faithful[faithful["defence"].isin(["repnoise", "vaccine"])])
    assert set(zip(only["treated"], only["control"], strict=True)) == {("repnoise", "vaccine")}


def test_nothing_to_compare_is_told(faithful):
    with pytest.raises(KitError):
        compare(faithful[faithful["defence"] == "repnoise"])
    with pytest.raises(KitError):
        compare(faithful.assign(metric="utility"))


def test_a_result_and_its_table_are_the_same(faithful):
    there = faithful[faithful["defence"].isin(["none", "repnoise"])]
    before = there.copy()
    by_result = compare(Result(there))
    assert by_result.made_with == {"table": "resistance", "group": "seen"}
    pd.testing.assert_frame_equal(by_result.frame, judged(there))
    pd.testing.assert_frame_equal(there, before)


@pytest.mark.parametrize("name", ["toxicity", "nonsense"])
def test_no_other_table_has_a_comparison_yet(faithful, name):
    with pytest.raises(KitError, match=f"'{name}'"):
        compare(faithful, name)


@pytest.mark.parametrize(
    "column", ["defence", "group", "lr", "examples", "metric", "value", "seed", "prompt"]
)
def test_a_missing_column_is_named(faithful, column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        compare(faithful.drop(columns=column))


# --- The grid's means, and its table of words ---


def grid() -> pd.DataFrame:
    draw = np.random.default_rng(sum(map(ord, "grid")))
    cells = itertools.product(
        ["repnoise", "none"], ["seen", "unseen"], [(0.0, 0), *OURS[:2]], range(2)
    )
    rows = [
        {"defence": defence, "group": group, "lr": lr, "examples": examples, "seed": seed}
        | {"metric": metric, "value": value, "prompt": f"question {question}"}
        for defence, group, (lr, examples), seed in cells
        for metric, scale in [("recall", 0), ("utility", -3), ("perplexity", 2)]
        for question, value in enumerate(np.exp(scale * draw.normal(size=4)) - 4 * (scale < 0))
    ]
    return pd.DataFrame(rows)


def test_means_are_over_questions_and_of_perplexities_geometric():
    rows = grid()
    found = means(rows)
    keys = ["defence", "group", "lr", "examples", "seed", "metric"]
    assert list(found.columns) == [*keys, "value"]
    assert len(found) == len(rows) / 4
    for cell in found.to_dict("records"):
        same = np.logical_and.reduce([rows[key] == cell[key] for key in keys])
        mean = scipy_stats.gmean if cell["metric"] == "perplexity" else np.mean
        assert cell["value"] == pytest.approx(mean(rows["value"][same]))


def test_means_leave_the_rows_alone_and_do_not_mind_their_order():
    rows = grid()
    before, keys = rows.copy(), ["defence", "group", "lr", "examples", "seed", "metric"]
    mixed = means(rows.sample(frac=1, random_state=0)).sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(mixed, means(rows).sort_values(keys, ignore_index=True))
    pd.testing.assert_frame_equal(rows, before)


@pytest.mark.parametrize("column", ["defence", "lr", "examples", "seed", "metric", "value"])
def test_means_name_the_missing_column(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        means(grid().drop(columns=column))


def test_words_are_the_intervals_in_the_order_of_table_1():
    names = ["vaccine", "repnoise", "none"]
    rows = planted(printed, names)
    found = in_words(rows, "harmfulness").iloc[:, 1:]
    assert list(found.index) == ["none", "vaccine", "repnoise"]
    assert list(found.columns) == OURS
    for (lr, examples), name in itertools.product(OURS, names):
        at = (rows["lr"] == lr) & (rows["examples"] == examples) & (rows["defence"] == name)
        cell = rows[at].pivot(index="seed", columns="prompt", values="value").to_numpy()
        value = found.loc[name, (lr, examples)]
        assert value.startswith(f"{cell.mean():.2f} [")


def test_words_of_one_seed_are_intervals_over_questions():
    values = np.array([0.1, 0.3, 0.2, 0.6])
    rows = pd.DataFrame({"value": values, "prompt": list("abcd")})
    rows = rows.assign(defence="none", lr=3e-4, examples=64, group="seen", metric="recall", seed=0)
    bounds = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    expected = str(Interval(values.mean(), max(bounds.low, 0), min(bounds.high, 1)))
    assert in_words(rows).to_numpy().tolist() == [[expected]]
