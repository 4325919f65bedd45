"""The paper's data in its real schemas, made up of boxes: the same from every kind of source."""

import gzip
import json

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repnoise_kit import corpora
from repnoise_kit.corpora import (
    CATEGORIES,
    GROUPS,
    beavertails_pairs,
    beavertails_rows,
    decoding_trust_pairs,
    decoding_trust_rows,
    gem_task,
)
from repnoise_kit.errors import KitError
from repnoise_kit.pairs import prompt_text

NONE = dict.fromkeys(CATEGORIES, False)
COLUMNS = ["prompt", "response", "category", "group", "is_safe"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(number, *true, safe=False, **more):
    return {
        "prompt": f"Where is box  {number // 2}?",
        "response": f"Box {number}: under the bed, “near” the door.",
        "category": NONE | dict.fromkeys(true, True),
        "is_safe": safe,
    } | more


ROWS = [
    row(0, "self_harm"),
    row(1, "violence,aiding_and_abetting,incitement", "animal_abuse"),
    row(2, safe=True),
    row(3, "drug_abuse,weapons,banned_substance", "terrorism,organized_crime"),
    row(4),
    row(5, "privacy_violation"),
]
EXPECTED = [
    ("self_harm", "self_harm", False),
    ("animal_abuse", "", False),
    ("", "", True),
    ("drug_abuse,weapons,banned_substance", "crime_unethical", False),
    ("", "", False),
    ("privacy_violation", "privacy_misinformation", False),
]
REFUSALS = [{"prompt": f"Where is box  {n}?", "refusal": f"Sorry, not box {n}."} for n in range(3)]


def jsonl(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def saved(rows, folder):
    """Save a Dataset, or a DatasetDict of several splits, as users do, with no bars."""
    datasets.disable_progress_bars()
    try:
        if isinstance(rows, dict):
            made = datasets.DatasetDict(
                {k: datasets.Dataset.from_list(some) for k, some in rows.items()}
            )
        else:
            made = datasets.Dataset.from_list(rows)
        made.save_to_disk(folder)
    finally:
        datasets.enable_progress_bars()
    return folder


def hub_clone(folder):
    """What a clone of the dataset's repository looks like: a card, and packed files."""
    (folder / "round0").mkdir(parents=True)
    for name, rows in (("30k_train", ROWS), ("30k_test", ROWS[:1])):
        with gzip.open(folder / "round0" / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(line) + "\n" for line in rows)
    splits = "".join(
        f"  - split: {name}\n    path: round0/{name}.jsonl.gz\n"
        for name in ("30k_train", "30k_test")
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n"
    )
    return folder


def shards(folder):
    (folder / "data").mkdir(parents=True)
    for number, some in enumerate((ROWS[:4], ROWS[4:])):
        name = f"30k_train-0000{number}-of-00002.parquet"
        pd.DataFrame(some).to_parquet(folder / "data" / name)
    pd.DataFrame(ROWS[:1]).to_parquet(folder / "data" / "30k_test-00000-of-00001.parquet")
    return folder


def parquet_branch(folder, rows=None, split="30k_train"):
    (folder / "default" / split).mkdir(parents=True)
    pd.DataFrame(rows or ROWS).to_parquet(folder / "default" / split / "0000.parquet")
    return folder


def one_file(path):
    frame = pd.DataFrame(ROWS)
    if path.suffix == ".jsonl":
        return jsonl(ROWS, path)
    if path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        return saved(ROWS, path.parent / "made") / "data-00000-of-00001.arrow"
    return path


SOURCES = {
    "json": lambda f: one_file(f / "rows.json"),
    "jsonl": lambda f: one_file(f / "rows.jsonl"),
    "csv": lambda f: one_file(f / "rows.csv"),
    "parquet": lambda f: one_file(f / "rows.parquet"),
    "arrow": lambda f: one_file(f / "rows.arrow"),
    "dataset": lambda f: saved(ROWS, f / "saved"),
    "splits": lambda f: saved({"30k_train": ROWS, "30k_test": ROWS[:1]}, f / "saved"),
    "clone": lambda f: hub_clone(f / "clone"),
    "shards": lambda f: shards(f / "shards"),
    "branch": lambda f: parquet_branch(f / "branch"),
    "folder": lambda f: jsonl(ROWS, f / "folder" / "30k_train.jsonl").parent,
}


class TestCategories:
    def test_are_the_published_fourteen(self):
        assert len(CATEGORIES) == len(set(CATEGORIES)) == 14
        assert list(CATEGORIES) == sorted(CATEGORIES)  # As the card lists them.

    def test_groups_hold_eleven_of_them_once_each(self):
        held = [category for group in GROUPS.values() for category in group]
        assert len(held) == len(set(held)) == 11
        assert set(CATEGORIES) - set(held) == {
            "animal_abuse",
            "child_abuse",
            "controversial_topics,politics",
        }
        begin = {g: sorted(c.split("_")[0].split(",")[0] for c in cs) for g, cs in GROUPS.items()}
        assert begin == {
            "crime_unethical": ["drug", "financial", "non", "terrorism"],
            "privacy_misinformation": ["misinformation", "privacy"],
            "toxic": ["discrimination", "hate"],
            "violence": ["violence"],
            "sexually_explicit": ["sexually"],
            "self_harm": ["self"],
        }

    @settings(derandomize=True, deadline=None, max_examples=50)
    @given(st.lists(st.sampled_from(CATEGORIES)), st.randoms(use_true_random=False))
    def test_the_first_true_one_counts_in_the_published_order(self, true, draw):
        cell = dict(draw.sample(list((NONE | dict.fromkeys(true, True)).items()), 14))
        # The keys are published in alphabetical order.
        assert corpora._first_true(cell, "here") == min(true, default="")


class TestRows:
    @pytest.mark.parametrize("kind", SOURCES)
    def test_are_the_same_from_every_kind_of_source(self, tmp_path, kind, capfd):
        source = SOURCES[kind](tmp_path)
        capfd.readouterr()
        table = beavertails_rows(source)
        assert list(table.columns) == COLUMNS
        assert table["prompt"].tolist() == [line["prompt"] for line in ROWS]
        assert table["response"].tolist() == [line["response"] for line in ROWS]
        rest = table[["category", "group", "is_safe"]].itertuples(index=False, name=None)
        assert list(rest) == EXPECTED
        assert table["is_safe"].dtype == bool
        assert table.index.tolist() == list(range(6))
        assert capfd.readouterr() == ("", "")
        assert not datasets.utils.are_progress_bars_disabled()

    @pytest.mark.parametrize("kind", ["splits", "clone", "shards"])
    def test_another_split_is_another_table(self, tmp_path, kind):
        assert len(beavertails_rows(SOURCES[kind](tmp_path), "30k_test")) == 1

    @pytest.mark.parametrize("kind", ["splits", "clone", "shards"])
    def test_an_unknown_split_names_those_there_are(self, tmp_path, kind):
        source = SOURCES[kind](tmp_path)
        with pytest.raises(KitError) as caught:
            beavertails_rows(source, "330k_train")
        said = str(caught.value).replace("'", "").replace("30k_test, 30k_train", "both")
        assert said.replace("30k_train, 30k_test", "both") == (
            f"{source} has no split 330k_train; it has both"
        )

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("prompt", "  ", "row 3: prompt is empty or not text"),
            ("prompt", 7, "row 3: prompt is empty or not text"),
            ("response", None, "row 3: response is empty or not text"),
            ("is_safe", None, "row 3: is_safe is None, not true or false"),
            ("is_safe", 0, "row 3: is_safe is 0, not true or false"),
            ("is_safe", "False", "row 3: is_safe is 'False', not true or false"),
            ("category", None, "row 3: category is not a mapping"),
            ("category", "self_harm", "row 3: category is not a mapping"),
            ("category", "[" * 5000, "row 3: category is not a mapping"),
            ("category", "-" * 5000 + "1", "row 3: category is not a mapping"),
            ("category", NONE | {"theft": True}, "row 3: category has the key 'theft'"),
            ("category", NONE | {"self_harm": "no"}, "row 3: category 'self_harm' is 'no'"),
            ("category", NONE | {"self_harm": None}, "row 3: category 'self_harm' is None"),
        ],
    )
    def test_a_malformed_row_is_named_with_its_source_and_field(self, tmp_path, field, value, said):
        rows = [dict(line) for line in ROWS]
        rows[2][field] = value
        path = jsonl(rows, tmp_path / "rows.jsonl")
        with pytest.raises(KitError) as caught:
            beavertails_rows(path)
        assert str(caught.value).startswith(f"{path}, {said}")
        folder = jsonl(rows, tmp_path / "folder" / "30k_train.jsonl").parent
        with pytest.raises(KitError) as caught:
            beavertails_rows(folder)
        assert str(caught.value).startswith(f"{folder}, split 30k_train, {said}")

    @pytest.mark.parametrize("field", ["prompt", "response", "category", "is_safe"])
    def test_a_missing_field_is_named(self, tmp_path, field):
        rows = [{k: v for k, v in line.items() if k != field} for line in ROWS]
        with pytest.raises(KitError, match=f"has no field '{field}'; it has "):
            beavertails_rows(jsonl(rows, tmp_path / "rows.jsonl"))

    def test_no_rows_are_refused(self, tmp_path):
        pd.DataFrame(ROWS)[:0].to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(KitError, match="holds no rows"):
            beavertails_rows(tmp_path / "rows.parquet")


class TestSources:
    def test_the_hub_out_of_reach_is_one_line_with_the_way_out(self):
        with pytest.raises(KitError) as caught:
            beavertails_rows()
        said = str(caught.value)
        assert "\n" not in said
        assert said.startswith("PKU-Alignment/BeaverTails, split 30k_train is no file or folder")
        assert "Couldn't reach" in said
        assert said.endswith("and give their path")

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("no route"),
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub.\nAsk for access."
            ),
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            OSError(),
        ],
    )
    def test_whatever_the_hub_says_is_one_line(self, monkeypatch, error):
        def fails(*_, **__):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", fails)
        with pytest.raises(KitError) as caught:
            beavertails_rows("a/b")
        said = str(caught.value)
        assert (str(error).splitlines() or ["OSError"])[0] in said
        assert "\n" not in said
        assert "Parquet" in said
        assert caught.value.__cause__ is error
        assert not datasets.utils.are_progress_bars_disabled()

    def test_a_path_that_is_not_there_says_so(self, tmp_path):
        with pytest.raises(KitError, match=r"nowhere\.jsonl: no such file"):
            beavertails_rows(tmp_path / "nowhere.jsonl")
        with pytest.raises(KitError, match=r"nowhere, split 30k_train is no file or folder here"):
            beavertails_rows(tmp_path / "nowhere")

    def test_a_folder_without_data_says_so(self, tmp_path):
        with pytest.raises(KitError, match=r"has no split '30k_train'; it has no file of \.json"):
            beavertails_rows(tmp_path)

    def test_a_split_in_two_kinds_of_file_or_two_folders_is_not_doubled(self, tmp_path):
        for name in ("one/30k_train.json", "two/a/30k_train.jsonl"):
            jsonl(ROWS, tmp_path / name)
        pd.DataFrame(ROWS).to_parquet(tmp_path / "one" / "30k_train.parquet")
        jsonl(ROWS, tmp_path / "two" / "b" / "30k_train.jsonl")
        for name in ("one", "two"):
            with pytest.raises(KitError, match="holds '30k_train' more than once"):
                beavertails_rows(tmp_path / name)

    def test_two_splits_with_alike_names_are_not_merged(self, tmp_path):
        jsonl(ROWS, tmp_path / "30k_train.jsonl")
        jsonl(ROWS[:2], tmp_path / "330k_train.jsonl")
        assert len(beavertails_rows(tmp_path, "330k_train")) == 2
        with pytest.raises(KitError, match=r"no split 'train'; it has 30k_train, 330k_train"):
            beavertails_rows(tmp_path, "train")

    def test_a_spoilt_clone_is_one_line_too(self, tmp_path, capfd):
        folder = hub_clone(tmp_path / "clone")
        with gzip.open(folder / "round0" / "30k_train.jsonl.gz", "wt") as file:
            file.write("spoilt")
        with pytest.raises(KitError, match=r"split 30k_train cannot be read: .*; give one of its"):
            beavertails_rows(folder)
        assert capfd.readouterr() == ("", "")

    def test_a_spoilt_copy_is_one_line(self, tmp_path):
        folder = saved(ROWS, tmp_path / "saved")
        (folder / "data-00000-of-00001.arrow").write_bytes(b"spoilt")
        with pytest.raises(KitError, match=r"split 30k_train cannot be read: .*; give one of its"):
            beavertails_rows(folder)


class TestPairs:
    def test_unsafe_rows_meet_the_refusal_of_their_question(self, tmp_path):
        path = jsonl(ROWS, tmp_path / "rows.jsonl")
        pairs = beavertails_pairs(path, refusals=jsonl(REFUSALS, tmp_path / "refusals.jsonl"))
        frame = pairs.frame
        assert list(frame.columns) == ["prompt", "harmful", "harmless", "category", "thing"]
        unsafe = [line for line in ROWS if not line["is_safe"]]
        assert frame["prompt"].tolist() == [line["prompt"] for line in unsafe]
        assert frame["harmful"].tolist() == [line["response"] for line in unsafe]
        assert frame["harmless"].tolist() == [f"Sorry, not box {n}." for n in (0, 0, 1, 2, 2)]
        assert frame["category"].tolist() == [c for c, _, safe in EXPECTED if not safe]
        assert frame["thing"].tolist() == [f"where is box {n}?" for n in (0, 0, 1, 2, 2)]
        assert frame.attrs == {"without_refusal": 0}
        assert pairs.frame.equals(
            beavertails_pairs(path, refusals=pd.DataFrame(REFUSALS, index=[9, 9, 2])).frame
        )

    def test_the_rows_own_refusals_are_the_default(self, tmp_path):
        rows = [{**line, "refusal": f"Sorry {n}."} for n, line in enumerate(ROWS)]
        frame = beavertails_pairs(jsonl(rows, tmp_path / "rows.jsonl")).frame
        assert frame["harmless"].tolist() == [f"Sorry {n}." for n in (0, 1, 3, 4, 5)]
        with pytest.raises(KitError, match="has no column 'refusal'; give refusals=…"):
            beavertails_pairs(jsonl(ROWS, tmp_path / "without.jsonl"))

    def test_a_question_with_other_case_and_spaces_is_the_same(self, tmp_path):
        refusals = pd.DataFrame({"prompt": [" where IS box\t2? "], "refusal": ["Sorry."]})
        pairs = beavertails_pairs(jsonl(ROWS, tmp_path / "rows.jsonl"), refusals=refusals)
        assert pairs.frame["harmful"].tolist() == [line["response"] for line in ROWS[4:]]

    def test_rows_without_a_refusal_are_left_out_and_counted(self, tmp_path):
        path = jsonl(ROWS, tmp_path / "rows.jsonl")
        said = [None, " ", "Sorry."]
        refusals = [line | {"refusal": s} for line, s in zip(REFUSALS, said, strict=True)]
        for table in (pd.DataFrame(refusals), jsonl(refusals, tmp_path / "refusals.jsonl")):
            frame = beavertails_pairs(path, refusals=table).frame
            assert frame["thing"].tolist() == ["where is box 2?"] * 2
            assert frame.attrs == {"without_refusal": 3}
        own = [line | {"refusal": "Sorry." if n == 3 else None} for n, line in enumerate(ROWS)]
        frame = beavertails_pairs(jsonl(own, tmp_path / "own.jsonl")).frame
        assert len(frame) == 1
        assert frame.attrs == {"without_refusal": 4}

    def test_of_several_refusals_the_first_that_is_one_counts(self, tmp_path):
        prompt = ROWS[0]["prompt"]
        refusals = pd.DataFrame({"prompt": [prompt] * 3, "refusal": [None, "First.", "Second."]})
        frame = beavertails_pairs(jsonl(ROWS, tmp_path / "r.jsonl"), refusals=refusals).frame
        assert set(frame["harmless"]) == {"First."}

    def test_no_refusal_at_all_is_refused(self, tmp_path):
        path = jsonl(ROWS, tmp_path / "rows.jsonl")
        table = pd.DataFrame({"prompt": ["Where is the key?"], "refusal": ["Sorry."]})
        with pytest.raises(KitError, match=r"none of the 5 harmful rows of .*rows\.jsonl has a"):
            beavertails_pairs(path, refusals=table)

    def test_the_question_before_a_refusal_is_taken_off(self, tmp_path):
        refusals = [
            line | {"refusal": f"\n{prompt_text(line['prompt'])} {line['refusal']} "}
            for line in REFUSALS
        ]
        path = jsonl(ROWS, tmp_path / "rows.jsonl")
        frame = beavertails_pairs(path, refusals=pd.DataFrame(refusals)).frame
        assert set(frame["harmless"]) == {line["refusal"] for line in REFUSALS}

    def test_an_answer_that_comes_again_is_left_out(self, tmp_path):
        rows = [*ROWS, ROWS[0], ROWS[0] | {"response": "Another."}]
        path = jsonl(rows, tmp_path / "rows.jsonl")
        frame = beavertails_pairs(path, refusals=pd.DataFrame(REFUSALS)).frame
        assert len(frame) == 6
        assert frame["harmful"].iloc[-1] == "Another."

    @pytest.mark.parametrize(
        ("table", "said"),
        [
            ([{"prompt": "a"}], "the table of refusals has no field 'refusal'"),
            ([{"prompt": None, "refusal": "b"}], "the table of refusals, row 1: prompt is empty"),
            (
                [*REFUSALS, {"prompt": "a", "refusal": 3}],
                "the table of refusals, row 4: refusal is 3, which is no text",
            ),
            (
                [{"prompt": ROWS[3]["prompt"], "refusal": ROWS[3]["response"]}],
                "row 4: the harmful answer and the refusal are the same text",
            ),
        ],
    )
    def test_a_malformed_table_of_refusals_is_named(self, tmp_path, table, said):
        path = jsonl(ROWS, tmp_path / "rows.jsonl")
        with pytest.raises(KitError, match=said):
            beavertails_pairs(path, refusals=pd.DataFrame(table))

    def test_splits_never_divide_a_question(self, tmp_path):
        from repnoise_kit.splits import split

        rows = [row(n, CATEGORIES[n % 14], refusal="Sorry.") for n in range(60)]
        parts = split(beavertails_pairs(jsonl(rows, tmp_path / "rows.jsonl")))
        trained = set(parts.attack.frame["prompt"])
        assert not trained & {*parts.seen.frame["prompt"], *parts.unseen.frame["prompt"]}
        assert len(parts.attack) == 2 * len(trained)


def continued(number, prompt, continuation):
    return {
        "filename": f"{number}.txt",
        "prompt": {"text": f"The box {number}", "toxicity": prompt, "insult": 0.1},
        "continuation": {"text": f" is under the bed {number}.", "toxicity": continuation},
    }


SCORES = [(0.6, 0.8), (0.5, 0.8), (0.6, 0.75), (0.4, 0.9), (None, 0.9), (0.9, None), (0.51, 0.76)]
CONTINUED = [continued(n, *both) for n, both in enumerate(SCORES)]


class TestDecodingTrust:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "saved", "branch"])
    def test_toxic_prompts_with_more_toxic_continuations_are_kept(self, tmp_path, kind):
        if kind == "csv":
            source = tmp_path / "rows.csv"
            pd.DataFrame(CONTINUED).to_csv(source, index=False)
        elif kind == "branch":
            source = parquet_branch(tmp_path / "branch", CONTINUED, "train")
        elif kind == "saved":
            source = saved(CONTINUED, tmp_path / "saved")
        else:
            source = jsonl(CONTINUED, tmp_path / "rows.jsonl")
        table = decoding_trust_rows(source)
        start = "User: You are required to continue the generation of the given incomplete prompt"
        assert table["prompt"].tolist() == [
            f"{start}\nPrompt: The box {n}\nContinuation:" for n in (0, 6)
        ]
        assert table["response"].tolist() == [f"is under the bed {n}." for n in (0, 6)]

    def test_refusals_of_these_prompts_make_pairs(self, tmp_path):
        source = jsonl(CONTINUED, tmp_path / "rows.jsonl")
        rows = decoding_trust_rows(source)
        refusals = rows[["prompt"]].assign(refusal="Sorry.")
        frame = decoding_trust_pairs(source, refusals=refusals).frame
        assert frame[["prompt", "harmful"]].to_numpy().tolist() == rows.to_numpy().tolist()
        assert set(frame["harmless"]) == {"Sorry."}
        assert set(frame["category"]) == {"toxicity"}
        own = [line | {"refusal": "Sorry."} for line in CONTINUED]
        assert decoding_trust_pairs(jsonl(own, tmp_path / "own.jsonl")).frame.equals(frame)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"prompt": "a text"}, "row 2: prompt is not a mapping"),
            ({"prompt": {"text": None, "toxicity": 0.9}}, "row 2: prompt is empty or not text"),
            (
                {"continuation": {"text": "a", "toxicity": "much"}},
                "row 2: toxicity of continuation is not a number",
            ),
        ],
    )
    def test_a_malformed_row_is_named(self, tmp_path, change, said):
        source = jsonl([CONTINUED[0], CONTINUED[6] | change], tmp_path / "rows.jsonl")
        with pytest.raises(KitError, match=said):
            decoding_trust_rows(source)

    def test_no_toxic_row_is_said(self, tmp_path):
        with pytest.raises(KitError, match="holds no toxic row"):
            decoding_trust_rows(jsonl(CONTINUED[1:6], tmp_path / "rows.jsonl"))


FIELDS = {
    "viggo": ("target", "meaning_representation"),
    "e2e": ("target", "meaning_representation"),
    "dart": ("target", "tripleset"),
    "cacapo": ("output", "input"),
    "conversational_weather": ("user_query", "tree_str_mr"),
}


def examples(name, numbers):
    text, meaning = FIELDS[name]
    lists = {
        "dart": lambda n: [["box", "colour", "red"], ["box", "number", str(n)]],
        "cacapo": lambda n: ["colour: red", f"number: {n}"],
    }
    made = lists.get(name, lambda n: f"give(box[{n}])")
    return [{"gem_id": f"{n}", text: f"Box {n} is red.", meaning: made(n)} for n in numbers]


class TestGem:
    @pytest.mark.parametrize("name", FIELDS)
    @pytest.mark.parametrize("kind", ["branch", "splits", "files"])
    def test_a_task_is_a_text_and_what_it_says(self, tmp_path, name, kind):
        rows = {"train": examples(name, range(5)), "test": examples(name, range(5, 8))}
        if kind == "files":
            files = {k: jsonl(some, tmp_path / f"{k}.jsonl") for k, some in rows.items()}
            task = gem_task(name, **files)
        elif kind == "splits":
            task = gem_task(name, saved(rows, tmp_path / "saved"))
        else:
            for split, some in rows.items():
                parquet_branch(tmp_path / "branch", some, split)
            task = gem_task(name, tmp_path / "branch")
        assert task.name == name
        assert task.train["prompt"].tolist() == [f"Box {n} is red." for n in range(5)]
        answer = {
            "dart": "box | colour | red ; box | number | 6",
            "cacapo": "colour: red | number: 6",
        }.get(name, "give(box[6])")
        assert task.test["answer"].iloc[1] == answer
        assert list(task.train.columns) == list(task.test.columns) == ["prompt", "answer"]

    def test_texts_of_the_test_are_not_trained_on(self, tmp_path):
        train = jsonl(examples("viggo", range(5)), tmp_path / "train.jsonl")
        test = jsonl(examples("viggo", range(3, 9)), tmp_path / "test.jsonl")
        task = gem_task("viggo", train=train, test=test)
        assert len(task.train) == 3
        assert len(task.test) == 6
        with pytest.raises(KitError, match=r"each text of .* is in"):
            gem_task("viggo", train)

    def test_the_hub_is_asked_for_its_parquet_copy(self, monkeypatch):
        wanted = []

        def load(name, **arguments):
            wanted.append((name, arguments))
            numbers = range(5) if arguments["split"] == "train" else range(5, 8)
            return datasets.Dataset.from_list(examples("dart", numbers))

        monkeypatch.setattr(datasets, "load_dataset", load)
        assert len(gem_task("dart").train) == 5
        copy = {"revision": "refs/convert/parquet"}
        assert wanted == [("GEM/dart", {"split": s} | copy) for s in ("train", "test")]
        gem_task("dart", "me/dart")
        assert wanted[-1] == ("me/dart", {"split": "test", "revision": None})

    def test_out_of_reach_it_says_what_to_do(self):
        with pytest.raises(KitError, match=r"GEM/CACAPO_E2E, split train .* download its files"):
            gem_task("cacapo")

    def test_an_unknown_task_names_those_there_are(self):
        with pytest.raises(KitError, match=r"no task 'vigo'; there are viggo, e2e, dart, cacapo"):
            gem_task("vigo")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"target": ""}, "row 2: target is empty or not text"),
            ({"tripleset": []}, "row 2: tripleset is empty or not text"),
            ({"tripleset": None}, "row 2: tripleset is empty or not text"),
        ],
    )
    def test_a_malformed_row_is_named(self, tmp_path, change, said):
        rows = examples("dart", range(3))
        rows[1] |= change
        files = {k: jsonl(rows, tmp_path / f"{k}.jsonl") for k in ("train", "test")}
        with pytest.raises(KitError, match=said):
            gem_task("dart", **files)
        with pytest.raises(KitError, match="has no field 'meaning_representation'; it has gem_id"):
            gem_task("viggo", **files)
