"""Linear probes on planted truths: what is there is found, what is not is not, nothing leaks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit, cross_val_score

import repnoise_kit as rk
from repnoise_kit.probes import _dealt

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, WIDTH = 200, 12
LABELS = ["harmful", "harmless"] * (ROWS // 2)
SIGNS = np.array([1.0, -1.0] * (ROWS // 2))
GROUPS = np.arange(ROWS) // 4


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensor(*layers):
    return torch.tensor(np.stack(layers), dtype=torch.float32)


def means(activations, labels=LABELS, groups=GROUPS, **options):
    """Mean over splits: a row a layer, a column a metric."""
    frame = rk.probe(activations, labels, groups, **options).frame
    return frame.pivot_table(index="layer", columns="metric", values="value")


@pytest.fixture(scope="module")
def planted():
    """A layer along whose one direction the labels lie, and the same without that direction."""
    direction = noise(WIDTH, seed=1)
    direction /= np.linalg.norm(direction)
    x = noise(ROWS, WIDTH) + 5 * SIGNS[:, None] * direction
    return x, x - np.outer(x @ direction, direction)


class TestPlanted:
    def test_a_direction_is_found_and_gone_once_projected_out(self, planted):
        found = means(tensor(*planted))
        assert found["accuracy"][0] > 0.99
        assert found["selectivity"][0] > 0.4
        assert found["accuracy"][1] == pytest.approx(0.5, abs=0.1)
        assert abs(found["selectivity"][1]) < 0.1

    def test_the_control_is_at_chance_where_the_probe_is_not(self, planted):
        found = means(tensor(*planted))
        assert found["shuffled"].to_numpy() == pytest.approx(0.5, abs=0.1)
        assert found["chance"].to_numpy() == pytest.approx(0.5)

    def test_points_that_can_be_separated_are_told_apart_without_a_fault(self):
        x = noise(ROWS, WIDTH)
        x[:, 3] = SIGNS * (10 + abs(x[:, 3]))
        frame = rk.probe(tensor(x), LABELS, GROUPS).frame
        assert (frame[frame["metric"] == "accuracy"]["value"] == 1).all()

    def test_labels_at_random_are_at_chance(self):
        random = np.random.default_rng(5).permutation(LABELS)
        found = means(tensor(noise(ROWS, WIDTH)), random)
        assert found["accuracy"][0] == pytest.approx(0.5, abs=0.1)
        assert abs(found["selectivity"][0]) < 0.1

    def test_right_against_another_is_a_question_of_both_and_no_line_sees_it(self):
        # A question's thing and an answer's, one bit each; the answer is right where they agree.
        asked, said = np.random.default_rng(2).choice([-1.0, 1.0], size=(2, ROWS))
        right = asked * said
        labels = np.where(right > 0, "harmful", "harmful of another")
        words = np.column_stack([asked, said, noise(ROWS, 4)])
        knows = np.column_stack([words[:, :5], right])
        found = means(tensor(words, knows), labels)
        assert found["accuracy"][0] == pytest.approx(0.5, abs=0.12)
        assert found["accuracy"][1] == 1
        # What is asked and what is said are there to be read all the same.
        assert means(tensor(words), np.where(said > 0, "a", "b"))["accuracy"][0] == 1


class TestSplits:
    @pytest.fixture(scope="class")
    def fingerprints(self):
        """Each group has a mark of its own and a label at random: nothing to learn but the mark."""
        draw = np.random.default_rng(3)
        kinds = draw.permutation(["harmful", "harmless"] * 20)
        groups = np.arange(ROWS) // 5
        return 4 * np.eye(40)[groups] + 0.1 * noise(ROWS, 40), kinds[groups], groups

    def test_a_mark_of_held_out_groups_is_of_no_use_and_of_all_in_a_split_by_rows(
        self, fingerprints
    ):
        x, labels, groups = fingerprints
        by_rows = ShuffleSplit(10, test_size=0.2, random_state=0)
        assert cross_val_score(LogisticRegression(), x, labels, cv=by_rows).mean() > 0.95
        assert means(tensor(x), labels, np.arange(ROWS))["accuracy"][0] > 0.95
        assert means(tensor(x), labels, groups)["accuracy"][0] < 0.65

    # Names of groups are of no matter, where their order is the same.
    @pytest.mark.parametrize("kind", [str, int])
    def test_one_split_is_a_pipeline_made_by_hand(self, planted, kind):
        x, labels = planted[0] + 3 * noise(ROWS, WIDTH, seed=7), np.array(LABELS)
        groups = [kind(100 + group) for group in GROUPS]
        frame = rk.probe(tensor(x), LABELS, groups, seeds=[6]).frame
        value = frame.set_index("metric")["value"]
        split = GroupShuffleSplit(1, test_size=0.2, random_state=6).split(x, groups=GROUPS)
        train, test = next(split)
        centre, spread = x[train].mean(0), x[train].std(0)
        fitted = LogisticRegression(max_iter=5000).fit((x[train] - centre) / spread, labels[train])
        told = fitted.predict((x[test] - centre) / spread)
        assert value["accuracy"] == pytest.approx((told == labels[test]).mean())
        assert 0.55 < value["accuracy"] < 1
        share = (labels[test] == "harmful").mean()
        assert value["chance"] == pytest.approx(max(share, 1 - share))
        assert value["selectivity"] == pytest.approx(value["accuracy"] - value["shuffled"])

    def test_rows_are_tidy_and_repeat_with_the_seed(self, planted):
        one, again = (rk.probe(tensor(*planted), LABELS, GROUPS, seeds=[3, 8]) for _ in range(2))
        assert one.frame.equals(again.frame)
        assert list(one.frame) == ["layer", "split", "metric", "value"]
        keys = set(one.frame.set_index(["layer", "split", "metric"]).index)
        metrics = ("accuracy", "chance", "shuffled", "selectivity")
        assert keys == {(la, s, m) for la in (0, 1) for s in (3, 8) for m in metrics}
        # A layer's numbers do not hang on the layers beside it.
        alone = rk.probe(tensor(planted[1]), LABELS, GROUPS, seeds=[8]).frame["value"]
        beside = one.frame.query("layer == 1 and split == 8")["value"]
        assert alone.tolist() == beside.tolist()


class TestControl:
    def test_labels_mixed_within_groups_are_dealt_within_them(self):
        truth = np.array(LABELS)
        for seed in range(20):
            dealt = _dealt(truth, GROUPS, seed)
            for group in np.unique(GROUPS):
                assert sorted(dealt[group == GROUPS]) == sorted(truth[group == GROUPS])
            assert 0.3 < (dealt == truth).mean() < 0.7

    def test_labels_constant_within_groups_are_dealt_from_group_to_group(self):
        truth = np.array(["harmful", "harmless"])[GROUPS % 2]
        for seed in range(20):
            dealt = _dealt(truth, GROUPS, seed)
            of_group = [np.unique(dealt[group == GROUPS]) for group in np.unique(GROUPS)]
            assert all(len(kinds) == 1 for kinds in of_group)
            assert sum(kinds[0] == "harmful" for kinds in of_group) == 25
            assert 0.2 < (dealt == truth).mean() < 0.8

    def test_of_both_kinds_each_is_dealt_among_its_own(self):
        """Mixed groups within themselves; groups of one label exchange theirs, of any size."""
        groups = np.repeat(np.arange(40), np.arange(40) % 3 + 2)
        truth = np.array(["harmful", "harmless"])[(groups // 2) % 2]
        for group in range(0, 40, 4):  # Now some are mixed.
            truth[np.flatnonzero(groups == group)[0]] = "harmless"
        whole = [group for group in range(40) if len(set(truth[groups == group])) == 1]
        assert len(whole) == 30
        moved, exchanged = [], []
        for seed in range(20):
            dealt = _dealt(truth, groups, seed)
            for group in range(40):
                mine = groups == group
                if group in whole:
                    assert len(set(dealt[mine])) == 1
                else:
                    assert sorted(dealt[mine]) == sorted(truth[mine])
                    moved.append((dealt[mine] != truth[mine]).any())
            first = [np.flatnonzero(groups == group)[0] for group in whole]
            assert sorted(dealt[first]) == sorted(truth[first])
            exchanged.append((dealt[first] != truth[first]).mean())
        assert 0.3 < np.mean(moved) < 0.9
        assert 0.3 < np.mean(exchanged) < 0.7

    def test_one_mixed_group_among_constant_ones_does_not_spoil_the_control(self):
        truth = np.array(["harmful", "harmless"])[GROUPS % 2]
        truth[0], truth[1] = "harmful", "harmless"
        x = noise(ROWS, 3)
        x[:, 0] += 20 * (truth == "harmful")
        found = means(tensor(x), truth)
        assert found["accuracy"][0] > 0.95
        assert found["shuffled"][0] < 0.75


class TestRefused:
    @pytest.mark.parametrize(
        ("labels", "groups", "words"),
        [
            (["a", "b", "c", "a"] * 5, range(20), "2 labels apart, not 3"),
            (["a"] * 20, range(20), "2 labels apart, not 1"),
            (["a", "b"] * 9, range(20), "20 activations have 18 labels"),
            (["a", "b"] * 10, range(19), "19 groups"),
            (["a", "b"] * 10, [0, 1, 2, 3] * 5, "5 groups"),
        ],
    )
    def test_what_cannot_be_probed_is_named(self, labels, groups, words):
        with pytest.raises(rk.KitError, match=words):
            rk.probe(tensor(noise(20, 3)), labels, list(groups))

    def test_a_split_that_leaves_one_label_names_its_seed(self):
        labels = ["b"] + ["a"] * 19
        group, seeds = list(range(20)), range(30)
        splits = [GroupShuffleSplit(1, test_size=0.2, random_state=seed) for seed in seeds]
        held = [0 in next(split.split(group, groups=group))[1] for split in splits]
        unlucky = held.index(True)
        with pytest.raises(rk.KitError, match=f"seed {unlucky} "):
            rk.probe(tensor(noise(20, 3)), labels, group, seeds=[unlucky])
        lucky = held.index(False)
        assert len(rk.probe(tensor(noise(20, 3)), labels, group, seeds=[lucky]).frame) == 4
