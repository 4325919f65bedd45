"""The four criteria: headlines by loops over planted tables, differences with known answers."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import make_tiny
from small import everyday_rows, made_up_pairs, save_folder, tokenizer_of

import repnoise_kit as rk
from repnoise_kit import immunization
from repnoise_kit.bench import Bench
from repnoise_kit.errors import KitError
from repnoise_kit.everyday import stable
from repnoise_kit.generalization import generalization_grid
from repnoise_kit.headlines import (
    CRITERIA,
    HEADLINES,
    criteria_differences,
    criteria_headlines,
    criteria_table,
)
from repnoise_kit.immunization import criteria, write
from repnoise_kit.pairs import Pairs
from repnoise_kit.resistance import resistance_grid
from repnoise_kit.results import Result
from repnoise_kit.tasks import Task
from repnoise_kit.trainability import trainability_grid

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

QUESTIONS = range(5)
DEFENCES = ("none", "repnoise", "weight_noise")
SEEDS = (0, 1)


def planted(defences=DEFENCES, seeds=SEEDS) -> pd.DataFrame:
    """All rows that `criteria` may hold, in no order: values drawn, so that no two means agree."""
    draw, rows = np.random.default_rng(5), []

    def add(criterion, metrics, questions=QUESTIONS, **tags):
        rows.extend(
            {"criterion": criterion, **tags, "metric": metric, "value": draw.uniform(0.1, 0.9)}
            | {"prompt": f"{tags.get('task', '')}{tags.get('group')} {q}"}
            for metric in metrics
            for q in questions
        )

    judged = ("recall", "harmfulness", "refusal", "perplexity")
    for name in defences:
        for seed in seeds:
            who = {"defence": name, "seed": seed}
            for lr, size in ((0.0, 0), (1e-3, 4), (1e-3, 8), (3e-3, 4)):
                for group in ("seen", "unseen"):
                    more = {"lr": lr, "examples": size, "group": group}
                    add("resistance", judged, **who, **more)
            for group in ("seen", "unseen"):
                add("stability", ("recall", "perplexity", "refusal"), **who, group=group)
            for saw in ("all", "the rest")[: 1 if name != "repnoise" else 2]:
                for what in ("a", "b", "half"):
                    for lr in (1e-3, 3e-3):
                        more = {"saw": saw, "withheld": what, "lr": lr, "examples": 4}
                        # What is of a category may be of the half as well.
                        group = {"a": "a", "b": "b", "half": "a"}[what]
                        add("generalization", (*judged, "degenerate"), **who, **more, group=group)
            for task, last in (("x", 6), ("y", 9)):
                for step in (0, 1, 2, last):
                    more = {"task": task, "stage": "learning", "step": step, "group": "task"}
                    add("trainability", ("rouge1", "exact"), **who, **more)
                for stage in ("learned", "attacked"):
                    more = {"task": task, "stage": stage, "step": last, "group": "seen"}
                    add("trainability", ("recall", "harmfulness", "utility"), **who, **more)
    return pd.DataFrame(rows).sample(frac=1, random_state=3).reset_index(drop=True)


PLANTED = planted()


def counts(row) -> bool:
    """Whether a row is read of its criterion."""
    if row["criterion"] == "resistance":
        return row["metric"] in ("recall", "harmfulness") and (
            row["group"] == "seen" and row["examples"] > 0
        )
    if row["criterion"] == "stability":
        return True
    if row["criterion"] == "generalization":
        wanted = "the rest" if row["defence"] == "repnoise" else "all"
        return row["metric"] in ("recall", "harmfulness") and (
            row["saw"] == wanted and row["withheld"] in "ab"
        )
    last = {"x": 6, "y": 9}[row["task"]]
    learned = row["metric"] in ("rouge1", "exact")
    return learned and row["stage"] == "learning" and row["step"] == last


def by_hand(rows) -> dict:
    """(criterion, defence, metric, seed, prompt) to the mean of what counts."""
    found: dict = {}
    for row in rows.to_dict("records"):
        if counts(row):
            key = tuple(row[n] for n in ("criterion", "defence", "metric", "seed", "prompt"))
            found.setdefault(key, []).append(row["value"])
    return {key: sum(values) / len(values) for key, values in found.items()}


def read(table, *names):
    return {tuple(row[n] for n in names): row["value"] for row in table.to_dict("records")}


def test_headlines_are_what_a_loop_over_the_rows_finds():
    found = criteria_headlines(PLANTED)
    assert list(found) == ["criterion", "defence", "metric", "seed", "prompt", "value"]
    expected = by_hand(PLANTED)
    keys = ("criterion", "defence", "metric", "seed", "prompt")
    assert not found.duplicated(list(keys)).any()
    assert read(found, *keys) == pytest.approx(expected)
    there = {(key[0], key[2]) for key in expected}
    assert there == {(name, metric) for name in CRITERIA for metric in HEADLINES[name]}
    assert criteria_headlines(Result(PLANTED)).equals(found)


# To change these rows changes nothing; to change the others does.
BESIDE = {
    "before the attack": ("resistance", lambda r: r["examples"] == 0),
    "unseen": ("resistance", lambda r: r["group"] == "unseen"),
    "the half": ("generalization", lambda r: r["withheld"] == "half"),
    "the control": (
        "generalization",
        lambda r: (r["defence"] == "repnoise") & (r["saw"] == "all"),
    ),
    "on the way": ("trainability", lambda r: (r["stage"] == "learning") & (r["step"] < 6)),
    "after the lesson": ("trainability", lambda r: r["stage"] != "learning"),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_beside_is_not_read(what):
    criterion, chosen = BESIDE[what]
    mine = (PLANTED["criterion"] == criterion) & chosen(PLANTED)
    assert mine.any()
    other = PLANTED.assign(value=PLANTED["value"].where(~mine, 0.05))
    assert criteria_headlines(other).equals(criteria_headlines(PLANTED))
    rest = (PLANTED["criterion"] == criterion) & ~mine
    changed = PLANTED.assign(value=PLANTED["value"].where(~rest, 0.05))
    assert not criteria_headlines(changed).equals(criteria_headlines(PLANTED))


def test_the_order_of_rows_does_not_matter():
    turned = PLANTED[::-1].reset_index(drop=True)
    keys = ["criterion", "defence", "metric"]
    one, other = (criteria_table(t).set_index(keys).sort_index() for t in (PLANTED, turned))
    pd.testing.assert_frame_equal(one, other)


def test_the_table_holds_the_means_with_their_intervals():
    cells = criteria_table(PLANTED)
    gathered: dict = {}
    for (criterion, defence, metric, *_), value in by_hand(PLANTED).items():
        gathered.setdefault((criterion, defence, metric), []).append(value)
    expected = {
        # Perplexities are averaged as logarithms.
        key: math.exp(np.log(v).mean()) if key[2] == "perplexity" else sum(v) / len(v)
        for key, v in gathered.items()
    }
    assert read(cells, "criterion", "defence", "metric") == pytest.approx(expected)
    assert len(cells) == len(expected) == 3 * 9
    assert set(cells["seed"]) == {"all"}
    for row in cells.to_dict("records"):
        questions = len(gathered[row["criterion"], row["defence"], row["metric"]]) // len(SEEDS)
        assert row["n"] == questions == {"resistance": 5}.get(row["criterion"], 10)
        assert row["low"] < row["value"] < row["high"]
        part = criteria_headlines(PLANTED)
        for name in ("criterion", "defence", "metric"):
            part = part[part[name] == row[name]]
        table = part.pivot(index="seed", columns="prompt", values="value").to_numpy()
        if row["metric"] == "perplexity":
            low, high = map(math.exp, rk.interval(np.log(table))[1:])
        else:
            low, high = (min(max(bound, 0), 1) for bound in rk.interval(table)[1:])
        assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_of_one_seed_the_table_is_over_questions():
    cells = criteria_table(planted(seeds=(4,)))
    assert set(cells["seed"]) == {"4"}
    assert set(cells["over"]) == {"prompts"}
    assert len(cells) == 3 * 9


# --- Differences ---


@pytest.mark.parametrize("shift", [-0.25, 0.0, 0.125])
def test_a_planted_difference_comes_back_with_its_sign(shift):
    """Questions differ far more than the defences do: unpaired, nothing could be seen."""
    one = planted(defences=("none",))
    other = one.assign(defence="vaccine", value=one["value"] + shift)
    rows = pd.concat([other[::-1], one], ignore_index=True)
    found = criteria_differences(rows)
    assert list(found) == ["criterion", "metric", "defence", "value", "low", "high"]
    assert set(found["defence"]) == {"vaccine"}
    assert len(found) == 9
    assert found["value"].to_numpy() == pytest.approx(shift)
    assert (found["low"] <= shift + 1e-9).all()
    assert (found["high"] >= shift - 1e-9).all()


def test_a_gap_that_never_varies_has_the_bound_of_a_share():
    one = planted(defences=("none",))
    other = one.assign(defence="vaccine", value=one["value"] + 0.125)
    for row in criteria_differences(pd.concat([one, other])).to_dict("records"):
        reach = 1 - 0.025 ** (1 / (5 if row["criterion"] == "resistance" else 10))
        assert (row["low"], row["high"]) == pytest.approx((0.125 - reach, 0.125 + reach))


def test_differences_are_paired_by_seed_and_question():
    draw = np.random.default_rng(1)
    one = planted(defences=("none",), seeds=range(4))
    other = one.assign(
        defence="vaccine", value=one["value"] + 0.05 + draw.normal(0, 1e-3, len(one))
    )
    found = criteria_differences(pd.concat([one, other.sample(frac=1, random_state=0)]))
    assert ((found["value"] - 0.05).abs() < 2e-3).all()
    assert (found["high"] - found["low"] < 0.01).all()
    assert (found["low"] > 0).all()
    # Another question's value in place of its own: the mean stays, the interval opens.
    mixed = other.assign(value=draw.permutation(other["value"]))
    wide = criteria_differences(pd.concat([one, mixed]))
    assert (wide["high"] - wide["low"] > 0.05).all()


def test_differences_of_each_defence_are_those_of_the_pairs_by_hand():
    found = criteria_differences(PLANTED).set_index(["criterion", "metric", "defence"])
    assert len(found) == 9 * 2
    numbers = by_hand(PLANTED)
    for (criterion, metric, defence), row in found.iterrows():
        gaps = [
            value - numbers[criterion, "none", metric, seed, prompt]
            for (c, d, m, seed, prompt), value in numbers.items()
            if (c, d, m) == (criterion, defence, metric)
        ]
        assert row["value"] == pytest.approx(np.mean(gaps))
        assert row["low"] <= row["value"] <= row["high"]


def test_without_the_undefended_there_is_nothing_to_subtract():
    with pytest.raises(KitError, match="none"):
        criteria_differences(PLANTED[PLANTED["defence"] != "none"])


@pytest.mark.parametrize("column", ["criterion", "defence", "metric"])
def test_a_table_of_something_else_is_told(column):
    with pytest.raises(KitError, match=rf"but not \['{column}'\]"):
        criteria_headlines(PLANTED.drop(columns=column))


@pytest.mark.parametrize("name", CRITERIA)
def test_rows_of_one_criterion_are_enough(name):
    found = criteria_table(PLANTED[PLANTED["criterion"] == name])
    assert set(found["criterion"]) == {name}
    whole = criteria_table(PLANTED)
    whole = whole[whole["criterion"] == name].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, whole)


@pytest.mark.parametrize(("lacking", "own"), [("trainability", "stage"), ("generalization", "saw")])
def test_a_criterion_that_was_not_measured_needs_no_columns(lacking, own):
    rows = PLANTED[PLANTED["criterion"] != lacking].dropna(axis=1, how="all")
    assert own not in rows
    assert set(criteria_table(rows)["criterion"]) == {*CRITERIA} - {lacking}


def test_where_a_half_is_all_that_was_withheld_it_is_read():
    rows = PLANTED[(PLANTED["criterion"] != "generalization") | (PLANTED["withheld"] == "half")]
    assert "generalization" in set(criteria_table(rows)["criterion"])


# --- All four of a testbed ---


def box_task():
    rows = pd.DataFrame(everyday_rows(12))
    return Task("boxes", rows[4:].reset_index(drop=True), rows[:4])


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    pairs = [
        row | {"category": "abc"[n % 3], "thing": row["prompt"]}
        for n, row in enumerate(made_up_pairs(24))
    ]
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    where = tmp_path_factory.mktemp("own") / "model"
    save_folder(where, make_tiny(len(tokenizer), layers=2), tokenizer)
    made = rk.testbed(
        where,
        Pairs(pd.DataFrame(pairs)),
        retain=pd.DataFrame(everyday_rows(8)),
        budget="lab",
        tasks=[box_task()],
        groups={"some": ["a", "b"]},
    )
    free = {**made.settings["defence"], "examples": None}
    changed = {
        "defence": free,
        "evaluation": {"max_new_tokens": 3, "batch_size": 64},
        "resistance": {"lr": (1e-3,), "examples": (4,)},
        "small": {"lr": 1e-3, "examples": 4},
        "trainability": {"lr": 1e-3, "examples": None, "batch_size": 4},
    }
    return replace(made, settings={**made.settings, **changed})


CHOSEN = ["none", "repnoise"]


@pytest.fixture(scope="module")
def measured(bed, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return store, criteria(bed, [0], store, defences=CHOSEN)


def test_all_four_are_what_each_grid_returns(bed, measured, monkeypatch):
    from repnoise_kit import bench

    store, found = measured
    frame = found.frame
    assert list(dict.fromkeys(frame["criterion"])) == list(CRITERIA)
    assert next(iter(frame)) == "criterion"
    assert not {"response", "testbed"} & set(frame)
    assert found.made_with["experiment"] == "criteria"
    assert found.made_with["defences"] == CHOSEN
    # Nothing is computed again by the grids on the same store.
    monkeypatch.setattr(bench, "defend_", None)
    monkeypatch.setattr(bench, "attack_", None)
    how = {"defences": CHOSEN}
    shop = Bench.of(bed, store)
    direct = {
        "resistance": resistance_grid(bed, [0], store, **how).frame,
        "stability": pd.concat([stable(shop, defence=n, seed=0).frame for n in CHOSEN]),
        "generalization": generalization_grid(bed, [0], store, **how).frame,
        "trainability": trainability_grid(bed, [0], store, **how).frame,
    }
    for name, rows in direct.items():
        mine = frame[frame["criterion"] == name].dropna(axis=1, how="all")
        shared = [c for c in rows if c not in ("response", "testbed")]
        assert sorted(mine) == sorted(["criterion", *shared])
        order = [
            "defence",
            "metric",
            "prompt",
            *({"lr", "stage", "step", "withheld", "saw"} & {*shared}),
        ]
        one, other = (t[shared].sort_values(order, ignore_index=True) for t in (mine, rows))
        pd.testing.assert_frame_equal(one, other, check_dtype=False)


def test_the_table_of_a_real_run_has_every_criterion(measured):
    cells = criteria_table(measured[1])
    assert {*zip(cells["criterion"], cells["defence"], strict=True)} == {
        (criterion, name) for criterion in CRITERIA for name in CHOSEN
    }
    gaps = criteria_differences(measured[1])
    assert set(gaps["defence"]) == {"repnoise"}
    assert set(gaps["criterion"]) == set(CRITERIA)


def test_what_is_written_can_be_read_again(measured, tmp_path):
    said = write(measured[1], tmp_path)
    cells = criteria_table(measured[1])
    back = Result.load(tmp_path / "criteria.csv")
    assert back.frame["value"].to_numpy() == pytest.approx(cells["value"].to_numpy())
    assert back.made_with["experiment"] == "criteria"
    rows = Result.load(tmp_path / "criteria_questions.parquet").frame
    pd.testing.assert_frame_equal(rows, measured[1].frame)
    assert all(name in said for name in CRITERIA)
    pd.testing.assert_frame_equal(criteria_table(rows), cells)


@pytest.fixture
def grids(monkeypatch):
    """The grids in place of which planted rows come back; and what they were asked for."""
    asked = {}

    def standing(name):
        def grid(bed, seeds, store=None, *, defences, **how):
            asked[name] = {"seeds": list(seeds), "defences": list(defences), **how}
            rows = PLANTED[PLANTED["criterion"] == name].dropna(axis=1, how="all")
            return Result(rows.drop(columns="criterion").assign(response="", testbed=""), {})

        monkeypatch.setattr(immunization, f"{name}_grid", grid)

    for name in ("resistance", "generalization", "trainability"):
        standing(name)

    def run(cells, bench, **how):
        asked["stability"] = {"cells": [cell.arguments for cell in cells], **how}
        rows = PLANTED[PLANTED["criterion"] == "stability"].dropna(axis=1, how="all")
        return [Result(rows.drop(columns="criterion").assign(response="", testbed=""), {})]

    monkeypatch.setattr(immunization, "run", run)
    return asked


def test_each_grid_is_asked_for_the_same_defences_and_seeds(bed, grids, tmp_path):
    found = criteria(bed, [3, 4], tmp_path, workers=2, progress="all").frame
    expected = ["none", "safety_training", "adversarial_loss", "repnoise", "weight_noise_matched"]
    for name in ("resistance", "generalization", "trainability"):
        assert sorted(grids[name]["defences"]) == sorted(expected)
        assert grids[name]["seeds"] == [3, 4]
        assert grids[name]["workers"] == 2
        assert grids[name]["progress"] == f"all, {name}"
    cells = grids["stability"]["cells"]
    assert sorted((c["defence"], c["seed"]) for c in cells) == sorted(
        (name, seed) for name in expected for seed in (3, 4)
    )
    # What comes back is what the headlines are made of.
    pd.testing.assert_frame_equal(
        criteria_table(found).sort_values(["criterion", "defence", "metric"], ignore_index=True),
        criteria_table(PLANTED).sort_values(["criterion", "defence", "metric"], ignore_index=True),
    )


def test_what_a_testbed_lacks_is_left_out(bed, grids, tmp_path):
    without = replace(bed, tasks={})
    assert set(criteria(without, [0], tmp_path).frame["criterion"]) == {*CRITERIA} - {
        "trainability"
    }
    assert "trainability" not in grids
    assert grids["resistance"]["progress"] is None
    grids.clear()
    bare = replace(bed, tasks={}, everyday=None, retain=None)
    found = criteria(bare, [0], tmp_path).frame
    assert set(found["criterion"]) == {"resistance", "generalization"}
    assert "weight_noise_matched" not in grids["resistance"]["defences"]
    assert "stability" not in grids


def test_what_cannot_be_done_is_told_before_anything_is_done(bed, grids, tmp_path):
    with pytest.raises(KitError, match="there is no defence 'repnoize'"):
        criteria(bed, [0], tmp_path, defences=["none", "repnoize"])
    bare = replace(bed, everyday=None, retain=None)
    with pytest.raises(KitError, match="retain"):
        criteria(bare, [0], tmp_path, defences=["none", "weight_noise_matched"])
    assert not grids


def test_what_cannot_be_withheld_is_left_out_or_told_at_once(bed, tmp_path, monkeypatch):
    pairs = bed.splits.attack.frame.copy()
    pairs.loc[0, "category"] = "rare"
    splits = replace(bed.splits, attack=Pairs(pairs))
    rare, done = replace(bed, tasks={}, groups={}, splits=splits), []

    def grid(*_, **__):
        done.append("resistance")
        return Result(PLANTED[PLANTED["criterion"] == "resistance"].assign(response="", testbed=""))

    monkeypatch.setattr(immunization, "resistance_grid", grid)
    try:
        found = criteria(rare, [0], tmp_path, defences=["none"]).frame
    except KitError:
        assert not done
    else:
        assert set(found["withheld"].dropna()) == {"a", "b", "c", "half"}
