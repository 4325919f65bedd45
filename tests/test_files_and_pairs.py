"""Five kinds of file give the same pairs, and pairs become the batches one would write by hand."""

import json

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import word_tokenizer

KINDS = ("json", "jsonl", "csv", "parquet", "arrow", "stream.arrow")
ROWS = [
    {
        "prompt": 'What does "naïve" mean, in 日本語?',
        "harmful": "Line one,\nline two; a tab\tand a quote: ' \" \\",
        "harmless": "No — I can't. 🙂",
        "category": "words",
        "thing": "naïve",
    },
    # Texts that readers of tables like to take for missing values, numbers or truths.
    {"prompt": "NA", "harmful": "null", "harmless": "None", "category": "nan", "thing": "n/a"},
    {"prompt": "7", "harmful": "1.0", "harmless": "true", "category": "", "thing": "007"},
    {
        "prompt": "  spaces  ",
        "harmful": "one\r\ntwo",
        "harmless": "a,b\n\n",
        "category": "x",
        "thing": "s",
    },
]
BEAVERTAILS = [
    {
        "prompt": "one",
        "response": "told",
        "refusal": "kept",
        "category": {"theft": False, "spying": True, "fraud": True},
        "is_safe": False,
    },
    {
        "prompt": "two",
        "response": "fine",
        "refusal": "kept",
        "category": {"theft": False, "spying": False, "fraud": False},
        "is_safe": True,
    },
    {
        "prompt": "three",
        "response": "said",
        "refusal": "kept",
        "category": {"theft": True, "spying": False, "fraud": False},
        "is_safe": False,
    },
]


def write(rows, path):
    """Write a table the way users and `datasets` do."""
    kind = path.name.partition(".")[2]
    frame = pd.DataFrame(rows)
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path, index=False)
    else:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        writer = pa.ipc.new_stream if kind == "stream.arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as file, writer(file, table.schema) as sink:
            sink.write_table(table)
    return path


def loaded(path, **kwargs):
    from repnoise_kit import load_pairs

    return load_pairs(path, **kwargs).frame.to_dict("records")


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_gives_the_same_pairs(self, kind, tmp_path):
        assert loaded(write(ROWS, tmp_path / f"pairs.{kind}")) == ROWS

    def test_what_datasets_saves_is_read(self, tmp_path):
        from datasets import Dataset, disable_progress_bars, enable_progress_bars

        disable_progress_bars()
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        enable_progress_bars()
        (shard,) = (tmp_path / "saved").glob("*.arrow")
        assert loaded(shard) == ROWS

    @pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_rare_line_marks_stay_inside_their_text(self, kind, mark, tmp_path):
        """Unicode counts them as line ends; JSONL and CSV do not."""
        rows = [ROWS[0] | {"harmful": f"one{mark}two"}]
        assert loaded(write(rows, tmp_path / f"pairs.{kind}")) == rows

    @pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
    def test_a_byte_order_mark_is_no_part_of_the_text(self, kind, tmp_path):
        path = write(ROWS[:2], tmp_path / f"pairs.{kind}")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert loaded(path) == ROWS[:2]

    def test_rows_are_numbered_from_one(self, tmp_path):
        from repnoise_kit.files import read_table

        assert list(read_table(write(ROWS, tmp_path / "pairs.csv")).index) == [1, 2, 3, 4]

    @pytest.mark.parametrize("kind", ["arrow", "stream.arrow"])
    def test_a_table_outlives_changes_to_its_file(self, kind, tmp_path, pytestconfig):
        """In a process of its own: a table that still points into the file would kill it."""
        import subprocess
        import sys

        path = write([row | {"harmful": "x" * 5000} for row in ROWS], tmp_path / f"pairs.{kind}")
        script = (
            "import sys; from repnoise_kit.files import read_table\n"
            "table = read_table(sys.argv[1]); open(sys.argv[1], 'w').close()\n"
            "print(table['harmful'].str.len().sum())"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script, str(path)],
            cwd=pytestconfig.rootpath,
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stdout) == (0, "20000\n"), ran.stderr


class TestColumns:
    def test_category_and_thing_are_made_where_a_file_has_none(self, tmp_path):
        row = {"prompt": "where?", "harmful": "there", "harmless": "no"}
        path = write([row], tmp_path / "pairs.json")
        assert loaded(path) == [row | {"category": "", "thing": "where?"}]

    def test_a_question_stands_for_a_thing_that_is_not_given(self, tmp_path):
        rows = [
            {"prompt": "one", "harmful": "a", "harmless": "b", "thing": "box"},
            {"prompt": "two", "harmful": "a", "harmless": "b", "thing": None},
            {"prompt": "three", "harmful": "a", "harmless": "b"},
        ]
        for kind in ("json", "csv"):
            found = loaded(write(rows, tmp_path / f"pairs.{kind}"))
            assert [row["thing"] for row in found] == ["box", "two", "three"]

    def test_a_split_column_is_kept_and_others_are_not(self, tmp_path):
        rows = [ROWS[0] | {"split": "seen", "source": "somewhere", "score": 3}]
        assert loaded(write(rows, tmp_path / "pairs.json")) == [ROWS[0] | {"split": "seen"}]

    @pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "arrow", "stream.arrow"])
    def test_beavertails_is_understood_as_it_is(self, kind, tmp_path):
        found = loaded(write(BEAVERTAILS, tmp_path / f"pairs.{kind}"))
        assert found == [
            {
                "prompt": prompt,
                "harmful": answer,
                "harmless": "kept",
                "category": category,
                "thing": prompt,
            }
            for prompt, answer, category in [("one", "told", "spying"), ("three", "said", "theft")]
        ]

    def test_safe_rows_are_left_out_of_a_csv_too(self, tmp_path):
        rows = [{**row, "category": "theft"} for row in BEAVERTAILS]
        found = loaded(write(rows, tmp_path / "pairs.csv"))
        assert [row["prompt"] for row in found] == ["one", "three"]

    @pytest.mark.parametrize("kind", ["json", "csv"])
    def test_is_safe_that_is_no_truth_is_refused_not_guessed(self, kind, tmp_path):
        """Read as a truth, the text "False" is true, and harmful rows would be left out."""
        from repnoise_kit import KitError

        said = ("False", "True", "")
        rows = [row | {"is_safe": text} for row, text in zip(BEAVERTAILS, said, strict=True)]
        with pytest.raises(KitError, match="is_safe"):
            loaded(write(rows, tmp_path / f"pairs.{kind}"))

    def test_columns_renames(self, tmp_path):
        row = {"question": "where?", "bad": "there", "good": "no", "topic": "boxes", "about": "b"}
        columns = {
            "prompt": "question",
            "harmful": "bad",
            "harmless": "good",
            "category": "topic",
            "thing": "about",
        }
        found = loaded(write([row], tmp_path / "pairs.json"), columns=columns)
        assert found == [
            {
                "prompt": "where?",
                "harmful": "there",
                "harmless": "no",
                "category": "boxes",
                "thing": "b",
            }
        ]

    def test_a_renamed_column_takes_the_place_of_one_of_that_name(self, tmp_path):
        rows = [ROWS[0] | {"reply": "another"}]
        found = loaded(write(rows, tmp_path / "pairs.json"), columns={"harmful": "reply"})
        assert found[0]["harmful"] == "another"

    def test_columns_may_trade_places(self, tmp_path):
        swapped = {"harmful": "harmless", "harmless": "harmful"}
        (found,) = loaded(write(ROWS[:1], tmp_path / "pairs.json"), columns=swapped)
        assert found["harmful"] == ROWS[0]["harmless"]
        assert found["harmless"] == ROWS[0]["harmful"]


class TestAnswers:
    @pytest.mark.parametrize("name", ["answer", "response"])
    def test_prompt_and_answer(self, name, tmp_path):
        from repnoise_kit import load_answers

        path = write([{"prompt": "where?", name: "there", "more": 1}], tmp_path / "retain.csv")
        expected = [{"prompt": "where?", "answer": "there", "thing": "where?"}]
        assert load_answers(path).to_dict("records") == expected

    def test_columns_and_things(self, tmp_path):
        from repnoise_kit import load_answers

        path = write([{"q": "where?", "a": "there", "thing": "box"}], tmp_path / "retain.json")
        found = load_answers(path, columns={"prompt": "q", "answer": "a"})
        expected = [{"prompt": "where?", "answer": "there", "thing": "box"}]
        assert found.to_dict("records") == expected


class TestDraw:
    @pytest.fixture
    def pairs(self):
        from repnoise_kit import Pairs

        return Pairs(pd.DataFrame({"prompt": [f"q{n}" for n in range(30)]}))

    def test_without_a_number_all_in_another_order(self, pairs):
        drawn = pairs.draw(None, seed=0).frame
        assert sorted(drawn["prompt"]) == sorted(pairs.frame["prompt"])
        assert list(drawn["prompt"]) != list(pairs.frame["prompt"])

    def test_same_seed_same_draw_and_a_smaller_one_begins_a_larger(self, pairs):
        large, small = pairs.draw(20, seed=3).frame, pairs.draw(5, seed=3).frame
        assert large.equals(pairs.draw(20, seed=3).frame)
        assert large.head(5).equals(small)
        assert not large.equals(pairs.draw(20, seed=4).frame)

    @pytest.mark.parametrize("wanted", [-1, float("nan"), 2.5, "8"])
    def test_how_many_is_a_whole_number(self, pairs, wanted):
        from repnoise_kit import KitError

        with pytest.raises(KitError, match=f"examples must be a whole number .* not .?{wanted}"):
            pairs.draw(wanted, seed=0)

    @pytest.mark.parametrize("wanted", [31, 0])
    def test_more_than_there_are_is_refused(self, pairs, wanted):
        from repnoise_kit import KitError

        with pytest.raises(KitError, match=f"{wanted} examples .* there are 30"):
            pairs.draw(wanted, seed=0)


# Ids 4, 5, …; 0 pads, 2 ends, 3 is unknown.
VOCABULARY = ["Question", ":", "Answer", "what", "is", "red", "?", "a", "rose"]
ASKED = [4, 5, 7, 8, 9, 10, 6, 5]  # Question : what is red ? Answer :


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(VOCABULARY)


def encode(tokenizer, prompts, answers, **kwargs):
    from repnoise_kit import pairs

    return pairs.encode(tokenizer, prompts, answers, **kwargs)


class TestEncode:
    def test_by_hand(self, tokenizer):
        found = encode(tokenizer, ["what is red?", "what?"], ["a rose", "red red"])
        assert found == [
            {"input_ids": [*ASKED, 11, 12, 2], "labels": [-100] * 8 + [11, 12, 2]},
            {"input_ids": [4, 5, 7, 10, 6, 5, 9, 9, 2], "labels": [-100] * 6 + [9, 9, 2]},
        ]

    def test_loss_on_all(self, tokenizer):
        (found,) = encode(tokenizer, ["what is red?"], ["a rose"], loss_on="all")
        assert found["labels"] == found["input_ids"] == [*ASKED, 11, 12, 2]

    def test_a_bos_token_begins_the_question_and_no_answer(self):
        from tokenizers.processors import TemplateProcessing

        tokenizer = word_tokenizer(VOCABULARY, bos_token="<s>")
        template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = template
        (found,) = encode(tokenizer, ["what is red?"], ["a rose"])
        assert found["input_ids"] == [1, *ASKED, 11, 12, 2]

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(
        asked=st.integers(0, 30), said=st.integers(1, 30), room=st.integers(2, 40), data=st.data()
    )
    def test_what_is_too_long(self, tokenizer, asked, said, room, data):
        words = st.sampled_from(VOCABULARY)
        prompt, answer = (
            " ".join(data.draw(st.lists(words, min_size=n, max_size=n))) for n in (asked, said)
        )
        (whole,) = encode(tokenizer, [prompt], [answer], max_length=1000)
        (found,) = encode(tokenizer, [prompt], [answer], max_length=room)
        question, reply = whole["input_ids"][: asked + 4], whole["input_ids"][asked + 4 :]
        hidden = found["labels"].count(-100)
        kept, told = found["input_ids"][:hidden], found["input_ids"][hidden:]

        # What fits is whole; what does not fills the room.
        assert len(found["input_ids"]) == min(len(question) + len(reply), room)
        # An answer loses its end, and its EOS with it; a question its beginning.
        assert told == reply[: len(told)] == found["labels"][hidden:]
        assert kept == question[len(question) - hidden :]
        # A question is cut only where it fills more than half, and then to no less than half.
        assert hidden == len(question) or hidden >= room // 2
        # And an answer is cut only where the question has been, or fits in half.
        assert told == reply or hidden <= max(room // 2, 1)


class TestPad:
    rows = ({"input_ids": [5, 0, 2], "labels": [-100, 0, 2]}, {"input_ids": [7], "labels": [7]})

    def test_by_hand(self):
        from repnoise_kit.pairs import pad

        batch = {name: part.tolist() for name, part in pad(self.rows, 9).items()}
        assert batch == {
            "input_ids": [[5, 0, 2], [7, 9, 9]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
            "labels": [[-100, 0, 2], [7, -100, -100]],
        }

    @pytest.mark.parametrize(("least", "width"), [(0, 3), (2, 3), (5, 5)])
    def test_at_least_so_wide(self, least, width):
        from repnoise_kit.pairs import pad

        batch = pad(self.rows, 9, least=least)
        assert {part.shape for part in batch.values()} == {(2, width)}
        assert batch["attention_mask"].sum(1).tolist() == [3, 1]

    def test_loss_on_pads_as_the_papers_attack_took_it(self):
        from repnoise_kit.pairs import pad

        labels = pad(self.rows, 9, loss_on_pads=True)["labels"]
        assert labels.tolist() == [[-100, 0, 2], [7, 9, 9]]

    def test_padding_changes_no_loss(self, tokenizer, tiny_model):
        """A pad id that is also the EOS is told apart by place, never by its id."""
        import torch

        from repnoise_kit.pairs import pad

        rows = encode(tokenizer, ["what is red?", "what?"], ["a rose", "red"])
        alone = [tiny_model(**pad([row], 2)).loss * (len(row["labels"]) > 0) for row in rows]
        counts = [sum(label != -100 for label in row["labels"]) for row in rows]
        mean = sum(a * c for a, c in zip(alone, counts, strict=True)) / sum(counts)
        torch.testing.assert_close(tiny_model(**pad(rows, 2, least=20)).loss, mean)
