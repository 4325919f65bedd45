"""Near-duplicates: the fast way finds what comparing each with each finds, no more and no less."""

import random
import re
import string
import time
from fractions import Fraction

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repnoise_kit import overlap
from repnoise_kit.errors import KitError
from repnoise_kit.overlap import check_no_near_duplicates, near_duplicates

quietly = settings(derandomize=True, deadline=None, max_examples=60)
# Few words, so that many texts are alike.
WORDS = st.sampled_from(["red", "Red", "box", "bed", "a", "the", "?", "--", "!"])
TEXTS = st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=12)


def pieces(text):
    kept = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    if len(kept) < 3:
        return set(kept)
    return {" ".join(kept[start : start + 3]) for start in range(len(kept) - 2)}


def likeness(one, other):
    mine, yours = pieces(one), pieces(other)
    return Fraction(len(mine & yours), len(mine | yours)) if mine | yours else Fraction(1)


def slowly(one, other, threshold):
    """Each with each, in whole numbers."""
    return [
        (i, j, float(likeness(a, b)))
        for i, a in enumerate(one)
        for j, b in enumerate(other)
        if likeness(a, b) >= threshold
    ]


def found(*arguments):
    return list(near_duplicates(*arguments).itertuples(index=False, name=None))


@quietly
@given(
    one=TEXTS,
    other=TEXTS,
    threshold=st.sampled_from([Fraction(n, 10) for n in range(1, 11)] + [Fraction(1, 3)]),
    cells=st.sampled_from([1, 20, 10**6]),
)
def test_it_finds_what_comparing_each_with_each_finds(one, other, threshold, cells):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_CELLS", cells)
        assert found(one, other, float(threshold)) == slowly(one, other, threshold)


@quietly
@given(one=TEXTS, other=TEXTS)
def test_likeness_goes_both_ways_and_each_text_is_like_itself(one, other):
    assert {(j, i, x) for i, j, x in found(one, other, 0.3)} == set(found(other, one, 0.3))
    assert {(i, i, 1.0) for i in range(len(one))} <= set(found(one, one, 1.0))


def test_the_likeness_of_texts_counted_by_hand():
    # 4 shingles and 4 shingles, 3 in common: 3 of 5.
    assert found(["a b c d e f"], ["b c d e f g"], 0.6) == [(0, 0, 0.6)]
    assert found(["a b c d e f"], ["b c d e f g"], 0.61) == []
    assert found(["red box"], ["box"], 0.5) == [(0, 0, 0.5)]
    assert found(["one two three"], ["three two one"], 0.01) == []


@pytest.mark.parametrize(
    "twin",
    [
        "WHERE is the red box",
        "  where\tis the\nred box ",
        "Where is the red box?!",
        "'where' is: the (red) box.",
        "where_is_the_red_box",
        "ｗｈｅｒｅ is the red box",
    ],
)
def test_case_punctuation_and_space_do_not_count(twin):
    assert found(["where is the red box"], [twin], 1.0) == [(0, 0, 1.0)]


def test_accents_count_however_they_are_written():
    assert found(["a naïve box"], ["a nai\u0308ve box"], 1.0) == [(0, 0, 1.0)]
    assert found(["a naïve box"], ["a naive box"], 0.01) == []


def test_texts_without_words_are_like_one_another_only():
    assert found(["?", "box"], ["", "...", "box"], 0.8) == [(0, 0, 1), (0, 1, 1), (1, 2, 1)]


def test_empty_lists_give_an_empty_table_of_the_same_columns():
    for one, other in (([], []), (["a"], []), ([], ["a"]), (["a"], ["b"])):
        table = near_duplicates(one, other)
        assert len(table) == 0
        assert table.dtypes.astype(str).to_dict() == {
            "one": "int64",
            "other": "int64",
            "likeness": "float64",
        }


def test_places_are_those_of_the_rows_whatever_a_column_is_indexed_by():
    column = pd.Series(["nothing alike", "the red box"], index=[7, 3])
    assert found(column, ["the red box"], 0.8) == [(1, 0, 1.0)]
    with pytest.raises(KitError, match="place 1, 'the red box'"):
        check_no_near_duplicates(column, ["the red box"], "here", "there")


def test_planted_twins_among_five_thousand_prompts_are_found_in_seconds():
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(2000)]
    # All begin alike, as questions do: the hard case for whatever counts shared shingles.
    start = ["what", "is", "the", "best", "way", "to"]
    one, other = (
        [" ".join(start + draw.choices(vocabulary, k=14)) for _ in range(5000)] for _ in range(2)
    )
    planted = {draw.randrange(5000): draw.randrange(5000) for _ in range(50)}
    for place, twin in planted.items():
        words = one[place].split()
        other[twin] = " ".join([*words[:-1], "changed"]).upper() + "?"
    began = time.perf_counter()
    table = near_duplicates(one, other)
    assert time.perf_counter() - began < 20
    expected = {(p, t) for p, t in planted.items() if likeness(one[p], other[t]) >= 0.8}
    assert len(expected) >= 45
    assert {(i, j) for i, j, _ in table.itertuples(index=False)} == expected
    assert set(table["likeness"]) == {17 / 19}


def test_the_check_names_how_many_and_the_first():
    evaluated = ["where is the pink box now", "what is a box", "Where is the red box now?"]
    with pytest.raises(KitError) as caught:
        check_no_near_duplicates(
            ["how are you", "where is the red box now", "what is a box?"],
            [*evaluated, "what is a box"],
            "the attack",
            "the evaluation",
        )
    said = str(caught.value)
    assert said.startswith("2 texts of the attack are nearly the same as texts of the evaluation")
    assert "place 1, 'where is the red box now', and place 2, 'Where is the red box now?'" in said
    assert re.search(r"1\.00\); remove them", said)
    check_no_near_duplicates(["how are you"], evaluated, "the attack", "the evaluation")


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan"), "much", None])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(KitError, match="threshold must be"):
        near_duplicates(["a"], ["a"], threshold)


def test_what_is_not_a_list_of_texts_is_refused():
    with pytest.raises(KitError, match="one is a text"):
        near_duplicates("abc", ["abc"])
    with pytest.raises(KitError, match="other, place 1: None is not a text"):
        near_duplicates(["abc"], ["abc", None])
