"""Who sees what: no thing is both trained on and held out, whatever the table looks like."""

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

PARTS = ("attack", "seen", "unseen")
quietly = settings(derandomize=True, deadline=None, max_examples=40)


def pairs_of(wordings, marks=None):
    """A table of things with so many wordings each; one that is negative is one asked twice."""
    from repnoise_kit import Pairs

    rows = []
    for place, count in enumerate(wordings):
        for number in range(abs(count)):
            row = {
                "prompt": f"where is {place}?" if count < 0 else f"{place}, wording {number}?",
                "harmful": f"there {number}",
                "harmless": "no",
                "category": "",
                "thing": f"thing {place}",
            }
            rows.append(row | ({"split": marks[place]} if marks else {}))
    return Pairs(pd.DataFrame(rows))


@st.composite
def tables(draw):
    """Pairs of 7 to 40 things, several wordings or answers each, marked or not, in any order."""
    from repnoise_kit import Pairs

    counts = st.integers(-3, 4).filter(bool)
    wordings = draw(st.lists(counts, min_size=7, max_size=40))
    marks = None
    if draw(st.booleans()):
        some = st.sampled_from(PARTS)
        more = draw(st.lists(some, min_size=len(wordings) - 3, max_size=len(wordings) - 3))
        marks = [*PARTS, *more]
    frame = pairs_of(wordings, marks).frame
    order = draw(st.randoms(use_true_random=False)).sample(range(len(frame)), len(frame))
    return Pairs(frame.iloc[order].reset_index(drop=True))


def split(pairs, seed=0):
    from repnoise_kit import splits

    return splits.split(pairs, seed)


def things(pairs):
    return set(pairs.frame["thing"])


def prompts(pairs):
    return set(pairs.frame["prompt"])


class TestAnySplit:
    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_the_attack_never_sees_what_is_evaluated(self, pairs, seed):
        found = split(pairs, seed)
        for evaluated in (found.seen, found.unseen):
            assert not things(found.attack) & things(evaluated)
            assert not prompts(found.attack) & prompts(evaluated)

    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_the_defence_never_sees_what_is_unseen(self, pairs, seed):
        found = split(pairs, seed)
        assert not things(found.defence) & things(found.unseen)
        assert not prompts(found.defence) & prompts(found.unseen)
        assert things(found.defence) == things(found.attack) | things(found.seen)

    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_every_pair_lands_somewhere_or_is_asked(self, pairs, seed):
        found = split(pairs, seed)
        parts = (found.attack, found.seen, found.unseen)
        # Every thing is in one part.
        assert set.union(*map(things, parts)) == things(pairs)
        assert sum(len(things(part)) for part in parts) == len(things(pairs))
        # Every pair is one the defence trains on, or its question is asked, or it is unseen.
        asked = prompts(found.seen) | prompts(found.unseen)
        trained = found.defence.frame.merge(pairs.frame, how="right", indicator=True)["_merge"]
        kept = (trained == "both").to_numpy()
        other = pairs.frame["prompt"].isin(asked) | pairs.frame["thing"].isin(things(found.unseen))
        assert (kept | other).all()
        # Nothing is made up, and the attacker has all of its things' pairs.
        assert len(found.defence.frame.merge(pairs.frame)) >= len(found.defence)
        mine = pairs.frame[pairs.frame["thing"].isin(things(found.attack))]
        assert len(mine) == len(found.attack)

    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_one_question_a_thing_is_asked_and_never_trained_on(self, pairs, seed):
        found = split(pairs, seed)
        wordings = pairs.frame.groupby("thing")["prompt"].nunique()
        for evaluated in (found.seen, found.unseen):
            assert evaluated.frame["thing"].is_unique
        for row in found.seen.frame.itertuples():
            # A thing of a single wording is one the defence has seen in that very wording.
            assert (row.prompt in prompts(found.defence)) == (wordings[row.thing] == 1)

    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_same_seed_same_split(self, pairs, seed):
        one, other = split(pairs, seed), split(pairs, seed)
        for part in ("defence", "attack", "seen", "unseen"):
            pd.testing.assert_frame_equal(getattr(one, part).frame, getattr(other, part).frame)

    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3))
    def test_marks_are_honoured_and_not_passed_on(self, pairs, seed):
        found = split(pairs, seed)
        if "split" in pairs.frame:
            marks = pairs.frame.groupby("split")["thing"].agg(set)
            assert [things(getattr(found, part)) for part in PARTS] == [marks[p] for p in PARTS]
        for part in ("defence", "attack", "seen", "unseen"):
            assert "split" not in getattr(found, part).frame


class TestDrawn:
    def test_other_seed_other_split(self):
        pairs = pairs_of([1] * 40)
        assert len({frozenset(things(split(pairs, seed).unseen)) for seed in range(6)}) == 6

    def test_other_seed_other_question(self):
        pairs = pairs_of([4] * 12, [*PARTS] * 4)
        assert len({frozenset(prompts(split(pairs, seed).unseen)) for seed in range(6)}) > 3

    @pytest.mark.parametrize(("count", "each"), [(7, 1), (40, 6), (100, 15), (1200, 150)])
    def test_fifteen_in_a_hundred_are_held_out_and_150_at_most(self, count, each):
        found = split(pairs_of([1] * count))
        assert len(found.seen) == len(found.unseen) == each
        assert len(found.attack) == count - 2 * each

    def test_too_few_things_are_refused(self):
        from repnoise_kit import KitError

        with pytest.raises(KitError, match="no pair is left for 'seen' of 2 things; give more"):
            split(pairs_of([3, 3]))


class TestOneQuestion:
    @quietly
    @given(pairs=tables(), seed=st.integers(0, 3), data=st.data())
    def test_it_does_not_depend_on_what_else_the_table_holds(self, pairs, seed, data):
        from repnoise_kit.splits import one_question

        frame = pairs.frame
        chosen = one_question(frame, seed).set_index("thing")["prompt"].to_dict()
        assert set(chosen) == things(pairs)
        some = data.draw(st.sets(st.sampled_from(sorted(chosen)), min_size=1))
        fewer = frame[frame["thing"].isin(some)]
        order = data.draw(st.permutations(range(len(fewer))))
        again = one_question(fewer.iloc[order], seed).set_index("thing")["prompt"].to_dict()
        assert again == {thing: chosen[thing] for thing in some}

    def test_rows_stay_in_their_order(self):
        from repnoise_kit.splits import one_question

        assert one_question(pairs_of([4] * 20).frame).index.is_monotonic_increasing


class TestRefused:
    def test_check_apart_names_the_rows(self):
        from repnoise_kit import KitError
        from repnoise_kit.splits import check_apart

        frame = pairs_of([1] * 9).frame
        check_apart(frame[:5], frame[5:], "here", "there")
        with pytest.raises(KitError) as refused:
            check_apart(frame[2:], frame[:4], "the defence", "the test")
        said = str(refused.value)
        for words in ("the defence", "the test", "share 2 rows by prompt", "(rows 2, 3;", "'2, w"):
            assert words in said
        with pytest.raises(KitError, match=r"share 9 rows .*\(rows 0, 1, 2, 3, 4, …;"):
            check_apart(frame, frame, "here", "there")

    def test_check_apart_looks_at_things_as_well_as_questions(self):
        from repnoise_kit import KitError
        from repnoise_kit.splits import check_apart

        frame = pairs_of([2] * 3).frame
        with pytest.raises(KitError, match="share 3 rows by thing"):
            check_apart(frame[::2], frame[1::2], "here", "there")

    def test_splits_made_by_hand_are_checked_too(self):
        from repnoise_kit import KitError, Pairs, Splits

        frame = pairs_of([1] * 8).frame
        one, two, three, four = (Pairs(frame[n : n + 2]) for n in range(0, 8, 2))
        Splits(defence=one, attack=two, seen=three, unseen=four)
        with pytest.raises(KitError, match="the attack and the evaluation share"):
            Splits(defence=one, attack=two, seen=two, unseen=four)
        with pytest.raises(KitError, match="the defence and the group 'unseen' share"):
            Splits(defence=four, attack=two, seen=three, unseen=four)

    @pytest.mark.parametrize("column", ["thing", "prompt"])
    def test_one_in_two_splits_is_named_with_its_rows(self, column):
        from repnoise_kit import KitError, Pairs

        frame = pairs_of([1] * 6, [*PARTS] * 2).frame
        frame.loc[4, column] = frame.loc[2, column]
        with pytest.raises(KitError) as refused:
            split(Pairs(frame))
        assert str(refused.value).startswith(f"{column} {frame.loc[2, column]!r} is in two splits")
        assert "(rows 3, 5)" in str(refused.value)

    @pytest.mark.parametrize("mark", ["train", None, ""])
    def test_an_unknown_split_is_named_with_its_row(self, mark):
        from repnoise_kit import KitError, Pairs

        frame = pairs_of([1] * 6, [*PARTS] * 2).frame
        frame["split"] = [*frame["split"][:4], mark, "seen"]
        with pytest.raises(KitError, match=r"row 5: split is .* one of attack, seen, unseen"):
            split(Pairs(frame))

    def test_a_question_about_two_things_is_refused_unmarked(self):
        from repnoise_kit import KitError, Pairs

        frame = pairs_of([1] * 30).frame
        twice = pd.concat([frame, frame.assign(thing=frame["thing"] + " again")])
        with pytest.raises(KitError, match="by prompt"):
            split(Pairs(twice.reset_index(drop=True)))
