"""What a defence never saw, row by row; and how many pairs it saw, step by step."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from conftest import make_tiny
from small import everyday_rows, made_up_pairs, save_folder, tokenizer_of

import repnoise_kit as rk
from repnoise_kit import attacks, bench, defences, generalization, resistance, testbeds
from repnoise_kit.bench import Bench
from repnoise_kit.errors import KitError
from repnoise_kit.generalization import blind, generalization_grid, names, samples_grid, write
from repnoise_kit.pairs import Pairs
from repnoise_kit.resistance import resistance_grid
from repnoise_kit.results import Result
from repnoise_kit.splits import Splits, split, withhold

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

PARTS = ("defence", "attack", "seen", "unseen")
LAB_CATEGORIES = [f"bound {kind}" for kind in ("birds", "hounds")]
LAB_CATEGORIES += [f"woken {kind}" for kind in ("bells", "lamps", "looms", "mirrors")]
CATEGORIES = "abcd"
LRS, SIZES = (1e-3, 3e-3), (4, 8)


def rows_of(count=40):
    """Made-up pairs of four categories, each question its own thing."""
    rows = made_up_pairs(count)
    return [row | {"category": CATEGORIES[n % 4], "thing": row["prompt"]} for n, row in
            enumerate(rows)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    where = tmp_path_factory.mktemp("own") / "model"
    return save_folder(where, make_tiny(len(tokenizer), layers=2), tokenizer)


def made_bed(folder, **more):
    bed = rk.testbed(
        folder, Pairs(pd.DataFrame(rows_of())), retain=pd.DataFrame(everyday_rows(8)), budget="lab"
    )
    settings = {
        **bed.settings,
        "defence": {**bed.settings["defence"], "examples": 32, "batch_size": 4},
        "evaluation": {"max_new_tokens": 3, "batch_size": 64},
        "resistance": {"lr": LRS, "examples": SIZES},
    }
    return replace(bed, settings=settings, **more)


@pytest.fixture(scope="module")
def bed(folder):
    """A tiny testbed of four categories; its defence takes what is left of any of them."""
    made = made_bed(folder)
    free = {**made.settings["defence"], "examples": None}
    return replace(made, settings={**made.settings, "defence": free})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def shingles(text):
    held = words(text)
    size = 3 if len(held) >= 3 else 1
    return {tuple(held[n : n + size]) for n in range(len(held) - size + 1)}


def alike(one, other):
    ours, theirs = shingles(one), shingles(other)
    return len(ours & theirs) / len(ours | theirs)


def records(pairs):
    return pairs.frame[["prompt", "harmful", "harmless", "category", "thing"]].to_dict("records")


def column(pairs, name):
    return [row[name] for row in records(pairs)]


# What is known to be wrong: mended, the mark goes.
fault = partial(pytest.mark.xfail, strict=True)


# --- What is withheld ---


@pytest.mark.parametrize("what", LAB_CATEGORIES)
def test_a_category_of_the_lab_is_withheld_row_by_row(lab, what):
    found = withhold(lab.splits, what)
    assert what in column(lab.splits.defence, "category")
    things = {row["thing"] for part in PARTS for row in records(getattr(lab.splits, part))
              if row["category"] == what}  # fmt: skip
    assert len(things) == 12
    kept = [row for row in records(lab.splits.defence) if row["thing"] not in things]
    taught = [row for row in records(lab.splits.attack) if row["category"] == what]
    evaluated = [*records(lab.splits.seen), *records(lab.splits.unseen)]
    asked = [row for row in evaluated if row["category"] == what]
    assert records(found.defence) == kept
    assert records(found.attack) == taught
    assert records(found.unseen) == asked
    assert [len(kept), len(taught), len(asked), len(found.seen)] == [1600, 180, 7, 0]


@pytest.mark.parametrize("what", [LAB_CATEGORIES[0], LAB_CATEGORIES[-1], "half"])
def test_no_text_of_the_lab_comes_near_what_is_withheld(lab, what):
    found = withhold(lab.splits, what)
    others = [*column(found.attack, "prompt"), *column(found.unseen, "prompt")]
    near = [(prompt, shingles(prompt)) for prompt in dict.fromkeys(others)]
    for prompt in column(found.defence, "prompt"):
        ours = shingles(prompt)
        for other, theirs in near:
            assert len(ours & theirs) < 0.8 * len(ours | theirs), (prompt, other)
    assert not set(column(found.defence, "thing")) & set(column(found.attack, "thing"))
    assert not set(column(found.defence, "thing")) & set(column(found.unseen, "thing"))


def test_a_half_is_half_of_the_things_and_all_that_is_unseen(lab):
    whole, found = lab.splits, withhold(lab.splits, "half")
    told, taught = set(column(found.defence, "thing")), set(column(found.attack, "thing"))
    asked, unseen = set(column(found.unseen, "thing")), set(column(whole.unseen, "thing"))
    trained = set(column(whole.defence, "thing"))
    assert unseen <= asked
    assert not (told | taught) & unseen
    withheld = taught | (asked - unseen)
    assert len(withheld) == len(trained) // 2 == 27
    assert told == trained - withheld
    assert taught == withheld & set(column(whole.attack, "thing"))
    assert records(found.defence) == [r for r in records(whole.defence) if r["thing"] in told]
    assert records(found.attack) == [r for r in records(whole.attack) if r["thing"] in taught]
    # A half goes through the categories, and is the same each time.
    assert set(column(found.attack, "category")) == set(LAB_CATEGORIES)
    again = withhold(lab.splits, "half")
    assert all(records(getattr(found, part)) == records(getattr(again, part)) for part in PARTS)


def test_the_splits_that_are_withheld_from_stay_as_they_are(bed):
    before = {part: getattr(bed.splits, part).frame.copy() for part in PARTS}
    bed.withholding("a")
    bed.withholding("half")
    for part, frame in before.items():
        pd.testing.assert_frame_equal(getattr(bed.splits, part).frame, frame)


def planted(splits, part, among, **changes):
    """The splits, with a row added to what the defence trains on and, of its part, the attack."""
    row = records(getattr(splits, part))
    row = next(r for r in row if r["category"] == among) | changes
    one = pd.DataFrame([row])
    parts = {name: getattr(splits, name).frame for name in PARTS}
    for name in ("defence", "attack"):
        parts[name] = pd.concat([parts[name], one], ignore_index=True)
    return Splits(**{name: Pairs(frame) for name, frame in parts.items()}), row


@pytest.mark.parametrize("part", ["attack", "seen", "unseen"])
def test_the_same_question_in_other_words_is_left_out(bed, part):
    first = records(getattr(bed.splits, part))[0]
    what, asked = first["category"], first["prompt"]
    other, third = [category for category in CATEGORIES if category != what][:2]
    twin = asked.replace("where", "WHERE,").replace(" ?", "!!")
    assert twin != asked
    assert alike(twin, asked) == 1
    more, row = planted(bed.splits, part, what, prompt=twin, thing=twin, category=other)
    plain, found = withhold(bed.splits, what), withhold(more, what)
    assert row["prompt"] in column(more.defence, "prompt")
    assert records(found.defence) == records(plain.defence)
    # Of what is not withheld it is a text like others.
    assert row["prompt"] in column(withhold(more, third).defence, "prompt")


def test_a_question_with_some_words_in_common_stays(bed):
    asked = next(r for r in records(bed.splits.attack) if r["category"] == "a")["prompt"]
    far = "tell me now " + asked
    assert 0 < alike(far, asked) < 0.8
    more, _ = planted(bed.splits, "attack", "a", prompt=far, thing=far, category="b")
    assert far in column(withhold(more, "a").defence, "prompt")


def test_of_a_thing_of_several_categories_the_defence_sees_none():
    """BeaverTails holds one question several times, with other answers and other categories."""
    rows = rows_of()
    twice = [row | {"category": "b", "harmful": row["harmful"] + " too"} for row in rows
             if row["category"] == "a"]  # fmt: skip
    splits = split(Pairs(pd.DataFrame(rows + twice)))
    both = {row["prompt"] for row in twice}
    assert len(both) == 10
    found = withhold(splits, "a")
    assert both & set(column(splits.defence, "thing"))
    assert not both & set(column(found.defence, "thing"))
    assert set(column(found.attack, "category")) == {"a"}
    assert set(column(found.attack, "thing")) == both & set(column(splits.attack, "thing"))
    assert set(column(found.unseen, "category")) <= {"a"}
    # And the other way round: what is of b alone is withheld with what is of both.
    other = withhold(splits, "b")
    known = {row["thing"] for part in PARTS for row in records(getattr(splits, part))
             if row["category"] == "b"}  # fmt: skip
    assert known & both
    assert known - both
    assert not known & set(column(other.defence, "thing"))
    assert set(column(other.attack, "category")) == {"b"}
    assert set(column(other.attack, "thing")) == known & set(column(splits.attack, "thing"))


def test_a_thing_is_withheld_whichever_of_its_questions_is_asked():
    """One of its wordings is of the category, and another one is asked."""
    rows = [row | {"split": "seen" if n < 8 else "unseen" if n < 12 else "attack"}
            for n, row in enumerate(rows_of())]  # fmt: skip
    thing = {**rows[0], "thing": "a far thing"}
    asked = (("who", "a"), ("how", "b"), ("when", "b"), ("why", "b"))
    told = [thing | {"prompt": f"{word} is it now ?", "category": kind} for word, kind in asked]
    splits = split(Pairs(pd.DataFrame(rows + told)), seed=1)
    mine = [row for row in records(splits.defence) if row["thing"] == "a far thing"]
    assert {row["category"] for row in mine} == {"a", "b"}
    assert "a far thing" not in column(withhold(splits, "a").unseen, "thing")
    assert "a far thing" not in column(withhold(splits, "a").defence, "thing")


def test_a_group_is_all_of_its_categories(bed):
    grouped = replace(bed, groups={"both": ["a", "c"], "alone": ["d"]})
    found, alone = grouped.withholding("both").splits, grouped.withholding("alone").splits
    assert set(column(found.defence, "category")) == {"b", "d"}
    assert set(column(found.attack, "category")) == {"a", "c"}
    assert set(column(found.unseen, "category")) == {"a", "c"}
    wanted = [r for r in records(bed.splits.attack) if r["category"] in "ac"]
    assert records(found.attack) == wanted
    assert records(alone.attack) == records(bed.withholding("d").splits.attack)
    assert names(grouped) == ["both", "alone", "half"]


def test_without_groups_each_category_and_a_half_is_withheld(bed, lab):
    assert names(bed) == ["a", "b", "c", "d", "half"]
    assert names(lab) == [*LAB_CATEGORIES, "half"]
    untold = Pairs(pd.DataFrame(rows_of()).assign(category=""))
    assert names(replace(bed, splits=split(untold))) == ["half"]


def test_no_such_category_is_told_with_those_that_there_are(bed):
    message = "there is no category 'e' to withhold; there are a, b, c, d, half"
    with pytest.raises(KitError, match=message):
        bed.withholding("e")
    with pytest.raises(KitError, match="there are both, a, b, c, d, half"):
        replace(bed, groups={"both": ["a", "c"]}).withholding("bath")
    with pytest.raises(KitError, match="there is no category 'e'"):
        generalization_grid(bed, [0], "nowhere", withheld=["a", "e"])


@pytest.mark.parametrize("part", ["defence", "attack", "evaluation"])
def test_what_would_be_empty_is_told(bed, part):
    parts = {name: getattr(bed.splits, name).frame for name in PARTS}
    if part == "defence":
        parts["defence"] = parts["defence"].query("category == 'a'")
    for name in {"attack": ["attack"], "evaluation": ["seen", "unseen"]}.get(part, []):
        parts[name] = parts[name].query("category != 'a'")
    less = Splits(**{name: Pairs(frame) for name, frame in parts.items()})
    with pytest.raises(KitError, match=f"withholding 'a' leaves nothing for the {part}; give more"):
        withhold(less, "a")


# --- The testbed of it ---


def test_the_withheld_testbed_shares_what_is_loaded_and_its_judges(bed, monkeypatch):
    base, tokenizer, judge = bed.base, bed.tokenizer, bed.harmfulness
    monkeypatch.setattr(testbeds, "load_model", None)
    monkeypatch.setattr(testbeds, "load_tokenizer", None)
    monkeypatch.setattr(testbeds, "train_classifier", None)
    found = bed.withholding("a")
    assert found.base is base
    assert found.tokenizer is tokenizer
    assert found.harmfulness is judge
    assert found.name == f"{bed.name} without a"
    assert found.settings["defence"]["examples"] is None
    assert found.settings["large"]["examples"] == len(found.splits.attack)
    assert found.fingerprint() != bed.fingerprint()


def test_the_evaluation_is_about_what_was_withheld_alone(bed):
    found = bed.withholding("b")
    asked = found.evaluated()
    assert set(asked["category"]) == {"b"}
    assert set(asked["group"]) == {"unseen"}
    assert set(asked["prompt"]) <= set(bed.evaluated()["prompt"])


# --- What a defence trained on ---


@pytest.fixture
def trained_on(bed, monkeypatch):
    """What every training is given, as text: ("defence" or "attack", its texts)."""
    noted = []

    def noting(room, who):
        def train_(model, loss, examples, collate, **how):
            sequences = [
                row["input_ids"]
                for example in examples
                for row in (example if isinstance(example, tuple) else [example])
            ]
            noted.append((who, bed.tokenizer.batch_decode(sequences)))
            return Result(pd.DataFrame({"step": [1], "metric": "total", "value": 0.0}))

        monkeypatch.setattr(room, "train_", train_)

    noting(defences, "defence")
    noting(attacks, "attack")
    return noted


def as_read(bed, prompts):
    read = bed.tokenizer.batch_decode(bed.tokenizer(list(prompts))["input_ids"])
    return dict(zip(prompts, (text.strip() for text in read), strict=True))


@pytest.mark.parametrize("what", ["a", "half"])
def test_no_defence_reads_a_withheld_text_unless_it_saw_all(bed, tmp_path, trained_on, what):
    found = bed.withholding(what).splits
    withheld = {*column(found.attack, "prompt"), *column(found.unseen, "prompt")}
    # All rows of a thing are withheld, also those that only the full defence holds.
    withheld &= set(column(bed.splits.defence, "prompt"))
    told = set(column(found.defence, "prompt"))
    assert withheld
    assert not withheld & told
    shop = Bench.of(bed, tmp_path / "store")
    for without, sees in ((what, told), (None, told | withheld)):
        trained_on.clear()
        shop.defended("repnoise", 0, without=without)
        ((who, texts),) = trained_on
        assert who == "defence"
        texts = [" ".join(text.split()) for text in texts]
        read = {p for p, text in as_read(bed, told | withheld).items()
                if any(text in other for other in texts)}  # fmt: skip
        assert read == sees


def test_a_cell_defends_attacks_and_asks_with_the_right_texts(bed, tmp_path, trained_on):
    found, shop = bed.withholding("c"), Bench.of(bed, tmp_path / "store")
    for saw in ("all", "the rest"):
        trained_on.clear()
        rows = blind(
            shop, defence="repnoise", without="c", saw=saw, seed=0, lr=1e-3, examples=4
        ).frame  # fmt: skip
        (_, told), (who, taught) = trained_on
        assert who == "attack"
        read = {}
        for part, texts in (("defence", told), ("attack", taught)):
            texts = [" ".join(text.split()) for text in texts]
            asked = as_read(bed, column(getattr(bed.splits, part), "prompt"))
            read[part] = {p for p, text in asked.items() if any(text in t for t in texts)}
        kinds = dict(zip(column(bed.splits.defence, "prompt"),
                         column(bed.splits.defence, "category"), strict=True))  # fmt: skip
        assert {kinds[p] for p in read["defence"]} == set("abcd" if saw == "all" else "abd")
        assert len(read["attack"]) == 4
        assert {kinds[p] for p in read["attack"]} == {"c"}
        assert set(rows["prompt"]) == set(column(found.splits.unseen, "prompt"))


# --- The grid ---

SEEDS = [0, 1]
JUDGED = {"recall", "harmfulness", "degenerate"}


@pytest.fixture(scope="module")
def grid(bed, store):
    return generalization_grid(
        bed, SEEDS, store, defences=["none", "repnoise", "weight_noise"], withheld=["a", "half"]
    )


def cell(frame, **tags):
    for name, value in tags.items():
        frame = frame[frame[name] == value]
    return frame


def test_the_rows_are_every_defence_budget_and_seed_with_its_control(bed, grid):
    frame = grid.frame
    wanted = ["defence", "withheld", "saw", "lr", "examples", "group", "category", "metric",
              "value", "seed", "prompt"]  # fmt: skip
    assert sorted(frame) == sorted(wanted)
    assert set(frame["metric"]) == JUDGED
    asked = {what: column(bed.withholding(what).splits.unseen, "prompt") for what in ("a", "half")}
    expected = {
        (defence, what, saw, lr, 4, seed, metric, prompt)
        for (defence, saw), what, lr, seed, metric in itertools.product(
            [("none", "all"), ("repnoise", "all"), ("repnoise", "the rest"),
             ("weight_noise", "all")],
            asked, LRS, SEEDS, JUDGED,
        )
        for prompt in asked[what]
    }  # fmt: skip
    keys = ["defence", "withheld", "saw", "lr", "examples", "seed", "metric", "prompt"]
    assert set(frame[keys].itertuples(index=False, name=None)) == expected
    assert len(frame) == len(expected)
    assert grid.made_with["experiment"] == "generalization"
    assert grid.made_with["seeds"] == SEEDS
    assert grid.made_with["testbed"] == bed.name


@pytest.mark.parametrize("saw", ["all", "the rest"])
def test_a_cell_is_what_the_calls_give_by_hand(bed, grid, saw):
    withheld, model = bed.withholding("a"), bed.model()
    rk.defend_(model, withheld if saw == "the rest" else bed, seed=1)
    pairs = withheld.splits.attack
    rk.attack_(model, bed, lr=LRS[1], examples=4, seed=1, pairs=pairs)
    direct = rk.evaluate(model, withheld, seed=1).frame
    direct = direct[direct["metric"].isin(JUDGED)].set_index(["metric", "prompt"])["value"]
    found = cell(grid.frame, defence="repnoise", withheld="a", saw=saw, lr=LRS[1], seed=1)
    pd.testing.assert_series_equal(found.set_index(["metric", "prompt"])["value"], direct)


def test_what_was_withheld_makes_a_difference(grid):
    harm = cell(grid.frame, defence="repnoise", withheld="half", metric="harmfulness")
    keys = ["lr", "seed", "prompt"]
    saw = [cell(harm, saw=name).set_index(keys)["value"] for name in ("all", "the rest")]
    assert saw[0].index.equals(saw[1].index)
    assert not np.allclose(*saw)


@pytest.fixture
def work(monkeypatch):
    """A word for each defence, attack and evaluation that is computed."""
    done = []

    def noting(room, name):
        real = getattr(room, name)

        def noted(*args, **how):
            done.append(name)
            return real(*args, **how)

        monkeypatch.setattr(room, name, noted)

    noting(bench, "defend_")
    noting(bench, "attack_")
    noting(generalization, "evaluate")
    noting(resistance, "evaluate")
    return done


def test_what_is_done_is_not_done_again(bed, store, grid, work):
    how = {"defences": ["none", "repnoise", "weight_noise"], "withheld": ["a", "half"]}
    again = generalization_grid(bed, SEEDS, store, **how)
    assert work == []
    pd.testing.assert_frame_equal(again.frame, grid.frame)
    assert again.made_with == grid.made_with
    # Another category: no defence that saw all is trained again, one that did not is.
    generalization_grid(bed, [0], store, defences=["repnoise"], withheld=["a", "b"])
    assert sorted(work) == ["attack_"] * 4 + ["defend_"] + ["evaluate"] * 4


def test_of_a_small_category_all_is_taken(bed, store):
    few = {**bed.settings, "resistance": {"lr": (1e-3,), "examples": (512, 1024)}}
    found = generalization_grid(
        replace(bed, settings=few), [0], store, defences=["none"], withheld=["a"]
    )
    assert set(found.frame["examples"]) == {len(bed.withholding("a").splits.attack)}


# --- Fewer pairs ---


@pytest.fixture(scope="module")
def sampled(folder):
    """A testbed whose defence takes 32 pairs, four a step, and whose attack has one budget."""
    made = made_bed(folder)
    return replace(
        made, settings={**made.settings, "resistance": {"lr": (1e-3,), "examples": (4,)}}
    )


@pytest.fixture
def trainings(monkeypatch):
    """What each defence was trained with: method, examples, steps and how many rows it read."""
    noted, real = [], bench.defend_

    def defend_(model, bed, method, **how):
        curves = real(model, bed, method, **how)
        if method != "none":
            made = curves.made_with
            assert curves.frame["step"].max() == made["steps"]
            noted.append((method, made["examples"], made["steps"]))
        return curves

    monkeypatch.setattr(bench, "defend_", defend_)
    return noted


def test_pairs_and_steps_are_as_promised(sampled, tmp_path, trainings):
    found = samples_grid(sampled, [0], tmp_path / "store").frame
    # An eighth, a quarter and a half, one pass or as many steps as of all; and all.
    expected = {(4, 1), (4, 8), (8, 2), (8, 8), (16, 4), (16, 8), (32, 8)}
    assert {(examples, steps) for _, examples, steps in trainings} == expected
    assert len(trainings) == len(expected)
    told = {*zip(found["pairs"], found["steps"], found["defence"], strict=True)}
    both = itertools.product((4, 8, 16), ("one pass", "as of all"), ["repnoise"])
    assert told == {*both, (32, "one pass", "repnoise"), (0, "one pass", "none")}
    assert {*zip(found["lr"], found["examples"], strict=True)} == {(0.0, 0), (1e-3, 4)}
    assert not found.duplicated(["pairs", "steps", "lr", "metric", "group", "prompt"]).any()


def test_all_pairs_are_the_cell_of_table_one(sampled, store, work):
    table = resistance_grid(sampled, [0, 1], store, defences=["none", "repnoise"])
    assert work.count("defend_") == 4
    work.clear()
    found = samples_grid(sampled, [0, 1], store, sizes=[32])
    assert work == []
    keys = ["defence", "lr", "examples", "seed", "metric", "group", "prompt"]
    one, other = (r.frame.set_index(keys)["value"].sort_index() for r in (table, found))
    pd.testing.assert_series_equal(one, other)
    assert found.made_with["experiment"] == "samples"
    # And another number of pairs is another model.
    more = samples_grid(sampled, [0], store, sizes=[16, 32], method="repnoise").frame
    assert work.count("defend_") == 2
    harm = cell(more, metric="perplexity", lr=1e-3, steps="one pass", seed=0)
    half, whole = (cell(harm, pairs=size)["value"].to_numpy() for size in (16, 32))
    assert not np.allclose(half, whole)


def test_another_method_is_sampled_by_its_name(sampled, store, trainings):
    found = samples_grid(sampled, [0], store, sizes=[8], method="safety_training").frame
    assert {name for name, *_ in trainings} == {"safety_training"}
    assert set(found["defence"]) == {"none", "safety_training"}
    with pytest.raises(KitError, match="there is no defence 'repnoize'"):
        samples_grid(sampled, [0], store, sizes=[8], method="repnoize")


def test_what_is_written_are_the_means(sampled, store, tmp_path):
    rows = samples_grid(sampled, [0, 1], store, sizes=[32])
    said = write(rows, tmp_path)
    table = pd.read_csv(tmp_path / "samples.csv")
    frame = rows.frame[rows.frame["metric"] == "harmfulness"]
    table = table[table["metric"] == "harmfulness"]
    expected = {}
    for row in frame.to_dict("records"):
        key = (row["pairs"], row["steps"], row["lr"], row["seed"], row["group"])
        expected.setdefault(key, []).append(row["value"])
    found = {
        (row["pairs"], row["steps"], row["lr"], row["seed"], row["group"]): row["value"]
        for row in table.to_dict("records")
    }
    assert found == pytest.approx({key: np.mean(all_) for key, all_ in expected.items()})
    assert len(found) == 2 * 2 * 2 * 2
    assert "0, one pass" in said
    assert "32, one pass" in said
    kept = Result.load(tmp_path / "samples_questions.parquet").frame
    assert len(kept) == len(rows.frame)


def test_more_pairs_than_there_are_is_told(sampled, store):
    with pytest.raises(KitError, match="examples are asked for, and there are 34"):
        samples_grid(sampled, [0], store, sizes=[64])


# --- Other data, other settings, wrong input ---


def test_other_categories_of_the_same_name_are_other_cells(bed, store):
    def asked(categories):
        grouped = replace(bed, groups={"some": categories})
        found = generalization_grid(grouped, [7], store, defences=["none"], withheld=["some"])
        return {*found.frame["category"]}

    assert asked(["a"]) == {"a"}
    assert asked(["b", "c"]) <= {"b", "c"}


def test_a_testbed_with_the_papers_budget_is_defended_without_a_category(folder, tmp_path):
    pairs = Pairs(pd.DataFrame(rows_of()))
    paper = rk.testbed(folder, pairs)
    assert len(paper.withholding("a").splits.defence) < paper.settings["defence"]["examples"]
    Bench.of(paper, tmp_path / "store").defended("repnoise", 0, without="a")


def test_whatever_trains_on_pairs_has_something_withheld(bed, store):
    found = generalization_grid(bed, [0], store, defences=["security_vectors"], withheld=["a"])
    assert set(found.frame["saw"]) == {"all", "the rest"}


def test_as_many_steps_as_of_all_for_any_number_of_pairs(sampled, store, trainings):
    samples_grid(sampled, [11], store, sizes=[10, 32])
    assert {(10, 3), (10, 8), (32, 8)} == {(n, steps) for _, n, steps in trainings}


def test_as_many_steps_as_of_all_in_several_epochs(sampled, store, trainings):
    four = {**sampled.settings["defence"], "epochs": 4}
    bed = replace(sampled, settings={**sampled.settings, "defence": four})
    samples_grid(bed, [0], store, sizes=[8, 32])
    assert {(8, 8), (8, 32), (32, 32)} == {(n, steps) for _, n, steps in trainings}


def test_a_cell_loads_no_second_base(bed, store, monkeypatch):
    shop, loaded = Bench.of(bed, store), []
    real = testbeds.load_model
    monkeypatch.setattr(
        testbeds, "load_model", lambda *a, **k: (loaded.append(a), real(*a, **k))[1]
    )
    shop.defended("none", 0)
    loaded.clear()
    blind(shop, defence="none", without="a", saw="all", seed=0, lr=1e-3, examples=4)
    assert len(loaded) == 1


@pytest.mark.parametrize("change", [("", ""), (" ?", "")])
def test_a_question_that_two_things_share_is_left_out(change):
    rows = [row | {"thing": f"thing of number {n}"} for n, row in enumerate(rows_of())]
    splits = split(Pairs(pd.DataFrame(rows)))
    asked = next(row for row in records(splits.attack) if row["category"] == "a")["prompt"]
    twin = asked.replace(*change)
    more, _ = planted(splits, "attack", "a", prompt=twin, thing="other", category="b")
    assert twin not in column(withhold(more, "a").defence, "prompt")


@pytest.mark.parametrize(
    "call",
    [
        lambda bed, store: generalization_grid(bed, [0], store, withheld=[]),
        lambda bed, store: generalization_grid(bed, [], store, withheld=["a"]),
        lambda bed, store: samples_grid(bed, [0], store, sizes=[0]),
    ],
    ids=["nothing withheld", "no seeds", "no pairs"],
)
def test_what_holds_nothing_is_told(bed, store, call):
    with pytest.raises(KitError):
        call(bed, store)
