"""Who lends whom a wrong answer: never oneself, always within a company, and all equally often."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from small import ragged_pairs

from repnoise_kit.errors import KitError
from repnoise_kit.pairs import Pairs, partners
from repnoise_kit.probes import HELD_OUT
from repnoise_kit.reading import texts

few = settings(max_examples=60, deadline=None, derandomize=True)
counts = st.lists(st.integers(1, 5), min_size=2, max_size=9)
seeds = st.integers(0, 2**32 - 1)


def mixed(rows, seed=0):
    """A table of so many rows of each thing, in no order, whose index is not their places."""
    things = np.repeat([f"thing {place}" for place in range(len(rows))], rows)
    order = np.random.default_rng(seed).permutation(len(things))
    return pd.DataFrame({"thing": things[order]}, index=order)


@few
@given(counts, seeds)
def test_nobody_lends_itself_an_answer_and_all_lending_is_within_a_company(rows, seed):
    table = mixed(rows)
    other, company = partners(table, seed)
    things = table["thing"].to_numpy()
    assert (things[other] != things).all()
    assert (company[other] == company).all()


@few
@given(counts, seeds)
def test_companies_are_two_things_and_one_is_three_where_the_number_is_odd(rows, seed):
    table = mixed(rows)
    _, company = partners(table, seed)
    of_thing = table.assign(company=company).groupby("thing")["company"].unique()
    assert (of_thing.map(len) == 1).all()
    sizes = Counter(of_thing.str[0])
    odd = [3] if len(rows) % 2 else []
    assert sorted(sizes.values()) == [2] * (len(rows) // 2 - len(odd)) + odd
    assert sorted(sizes) == list(range(len(sizes)))


@few
@given(st.integers(2, 9), st.integers(1, 5), seeds)
def test_with_as_many_rows_each_every_answer_is_wrong_as_often_as_right(things, each, seed):
    other, _ = partners(mixed([each] * things), seed)
    assert sorted(other) == list(range(things * each))


@few
@given(counts, seeds)
def test_a_thing_has_one_lender_whose_answers_are_used_evenly(rows, seed):
    table = mixed(rows)
    other, _ = partners(table, seed)
    lenders = table["thing"].to_numpy()[other]
    for thing, places in table.reset_index().groupby("thing").indices.items():
        (lender,) = set(lenders[places])
        answers = np.flatnonzero(table["thing"] == lender)
        used = [list(other[places]).count(answer) for answer in answers]
        assert max(used) - min(used) <= 1, thing
    # And a thing lends to one thing, so that in a ring of three no answer is wrong twice as often.
    borrowers = pd.Series(lenders).groupby(table["thing"].to_numpy()).first()
    assert borrowers.is_unique


@few
@given(counts, seeds)
def test_a_seed_draws_the_same_again(rows, seed):
    one, again = (partners(mixed(rows), seed) for _ in range(2))
    assert all(np.array_equal(*both) for both in zip(one, again, strict=True))


def test_each_pairing_of_four_things_is_as_likely():
    drawn = Counter(partners(mixed([1] * 4), seed)[0].tobytes() for seed in range(300))
    assert len(drawn) == 3
    assert scipy_stats.chisquare(list(drawn.values())).pvalue > 0.001


def test_one_thing_has_no_partner():
    with pytest.raises(KitError, match="one thing"):
        partners(mixed([4]), 0)


@pytest.mark.parametrize("of_each", [1, 2, 3])
def test_a_split_by_company_has_no_answer_on_both_sides_and_one_by_thing_has(of_each):
    from sklearn.model_selection import GroupShuffleSplit

    table = texts(ragged_pairs(18, of_each)[0], ["harmful", "harmful of another"])

    def shared(groups):
        split = GroupShuffleSplit(20, test_size=HELD_OUT, random_state=0)
        sides = (
            (table["answer"].iloc[side] for side in sides)
            for sides in split.split(table, groups=table[groups])
        )
        return sum(len(set(train) & set(test)) for train, test in sides)

    assert shared("company") == 0
    assert shared("thing") > 0


def test_a_table_of_texts_has_both_answers_right_and_wrong():
    given_pairs, _ = ragged_pairs(10, of_each=2)
    table = texts(given_pairs, seed=4).set_index("label")
    right, wrong = table.loc["harmful"], table.loc["harmful of another"]
    assert Counter(right["answer"]) == Counter(wrong["answer"])
    assert right["prompt"].tolist() == wrong["prompt"].tolist()
    thing_of = given_pairs.frame.set_index("harmful")["thing"]
    assert (thing_of[right["answer"]].to_numpy() == right["thing"]).all()
    assert (thing_of[wrong["answer"]].to_numpy() != wrong["thing"]).all()


# Pairs that do not say what they are about are each about a thing of its own.
def test_without_things_each_question_is_one():
    given_pairs, _ = ragged_pairs(9, of_each=3)
    bare = Pairs(given_pairs.frame.drop(columns=["thing", "category"]))
    table = texts(bare, seed=2)
    assert (table["thing"] == table["prompt"]).all()
    as_told = Pairs(given_pairs.frame.assign(thing=given_pairs.frame["prompt"]))
    same = ["prompt", "answer", "label", "thing", "company"]
    pd.testing.assert_frame_equal(table[same], texts(as_told, seed=2)[same])
    wrong = table[table["label"] == "harmful of another"]
    right_of = given_pairs.frame.set_index("prompt")["harmful"]
    assert (right_of[wrong["prompt"]].to_numpy() != wrong["answer"].to_numpy()).all()


class TestOtherTexts:
    """A table of `prompt, answer, label` is read as it is."""

    def table(self, **columns):
        told = {"prompt": ["q", "r", "s"], "answer": ["a", "b", "c"], "label": ["x", "y", "x"]}
        return pd.DataFrame(told | columns, index=[7, 3, 5])

    def test_rows_and_columns_are_kept_in_their_order(self):
        found = texts(self.table(more=[3, 1, 2]))
        assert list(found) == ["prompt", "answer", "label", "more"]
        assert found.index.tolist() == [0, 1, 2]
        assert found["more"].tolist() == [3, 1, 2]
        assert found["label"].tolist() == ["x", "y", "x"]

    def test_the_table_itself_is_left_alone(self):
        table = self.table()
        found = texts(table)
        found.loc[:, "label"] = "z"
        pd.testing.assert_frame_equal(table, self.table())

    @pytest.mark.parametrize("column", ["prompt", "answer", "label"])
    def test_a_column_that_is_missing_is_named(self, column):
        with pytest.raises(KitError, match=f"column '{column}'"):
            texts(self.table().drop(columns=column))

    @pytest.mark.parametrize("column", ["prompt", "answer", "label"])
    @pytest.mark.parametrize("cell", ["", "  ", None, np.nan, 3])
    def test_what_is_no_text_is_named_by_its_row(self, column, cell):
        table = self.table().astype(object)
        table.loc[3, column] = cell
        with pytest.raises(KitError, match=f"row 3: {column} "):
            texts(table)

    def test_an_empty_table_is_refused(self):
        with pytest.raises(KitError, match="no rows"):
            texts(self.table()[:0])
