"""Refusals a model makes: kept and left out as planted, and the same file whatever kills it."""

import hashlib
import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain

import pytest
from conftest import make_tiny
from small import save_folder, word_tokenizer

from repnoise_kit import refusals
from repnoise_kit.errors import KitError
from repnoise_kit.refusals import make_refusals

COLOURS = ("red", "blue", "green", "pink", "grey")
PROMPTS = [f"where is the {colour} box {n} ?" for n in range(5) for colour in COLOURS]

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer():
    # Two thirds of the words refuse, so that a random model does now and then.
    words = {word for prompt in PROMPTS for word in prompt.split()} | {"Question", "Answer", ":"}
    return word_tokenizer([*sorted(words), *(f"sorry-{n}" for n in range(2 * len(words)))])


def talker():
    """A model whose answers differ from question to question."""
    model = make_tiny(len(tokenizer()))
    for weight in model.parameters():
        weight.data *= 5
    return model


@pytest.fixture
def asked(monkeypatch):
    """A model of planted answers, each of which shows what else was in its batch."""
    batches = []

    def answers(model, tokenizer, prompts, max_new_tokens, batch_size):
        batches.append(list(prompts))
        mark = hashlib.sha256("".join(prompts).encode()).hexdigest()[:6]
        return [_planted(prompt, mark) for prompt in prompts]

    monkeypatch.setattr(refusals, "answers", answers)
    return batches


def _planted(prompt, mark):
    return {
        "red": f"sorry , i can not say “where” it is {mark}",
        "blue": f"under the bed , near the door {mark}",
        "green": "sorry sorry sorry sorry",
        "pink": "",
        "grey": f"i refuse \n {mark}",
    }[prompt.split()[3]]


def make(out, prompts=PROMPTS, model=None, **settings):
    settings = {"batch_size": 4} | settings
    return make_refusals(model or make_tiny(), tokenizer(), prompts, out, **settings)


class TestWhatIsKept:
    def test_answers_that_refuse_and_do_not_only_repeat(self, tmp_path, asked):
        table = make(tmp_path / "out.jsonl")
        assert list(table.columns) == ["prompt", "refusal"]
        assert table["prompt"].tolist() == [p for p in PROMPTS if " red " in p or " grey " in p]
        assert table["refusal"].str.contains("sorry ,|i refuse \n").all()

    def test_the_file_remembers_every_question_and_holds_no_other_answer(self, tmp_path, asked):
        make(tmp_path / "out.jsonl")
        text = (tmp_path / "out.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [row["prompt"] for row in rows] == PROMPTS
        assert "door" not in text
        assert {tuple(row) for row in rows} == {("made_with", "prompt", "refusal")}

    def test_a_finished_file_asks_nothing_and_is_not_touched(self, tmp_path, asked):
        first = make(tmp_path / "out.jsonl")
        before = (tmp_path / "out.jsonl").read_bytes()
        asked.clear()
        again = make(tmp_path / "out.jsonl")
        assert asked == []
        assert again.equals(first)
        assert (tmp_path / "out.jsonl").read_bytes() == before

    def test_a_question_that_comes_again_is_asked_once(self, tmp_path, asked):
        make(tmp_path / "out.jsonl", [*PROMPTS[:3], *PROMPTS[:5]])
        assert asked == [PROMPTS[:4], PROMPTS[4:5]]

    def test_a_model_that_never_refuses_gives_an_empty_table(self, tmp_path, asked):
        table = make(tmp_path / "out.jsonl", [p for p in PROMPTS if " blue " in p])
        assert len(table) == 0
        assert list(table.columns) == ["prompt", "refusal"]

    def test_the_models_own_greedy_answers(self, tmp_path, monkeypatch):
        from repnoise_kit.evaluation import answers
        from repnoise_kit.scoring import degenerate, refuses

        words, model = tokenizer(), talker()
        said = answers(model, words, PROMPTS, 2, 4)
        good = [refuses(text) and not degenerate(text) for text in said]
        assert 0 < sum(good) < len(good)  # Neither none nor all, or this shows nothing.
        model.train()
        model.model.norm.eval()
        dropout = []

        def watched(model, *rest):
            dropout.append(model.training)
            return answers(model, *rest)

        monkeypatch.setattr(refusals, "answers", watched)
        table = make_refusals(
            model, words, PROMPTS, tmp_path / "out.jsonl", max_new_tokens=2, batch_size=4
        )
        assert table["prompt"].tolist() == [
            p for p, kept in zip(PROMPTS, good, strict=True) if kept
        ]
        assert table["refusal"].tolist() == [t for t, kept in zip(said, good, strict=True) if kept]
        assert not any(dropout)
        assert model.training
        assert not model.model.norm.training

    def test_beavertails_takes_the_file(self, tmp_path, asked):
        from repnoise_kit.corpora import CATEGORIES, beavertails_pairs

        made = make(tmp_path / "refusals.jsonl")
        rows = [
            {
                "prompt": prompt,
                "response": "it is under the bed",
                "category": dict.fromkeys(CATEGORIES, False),
                "is_safe": False,
            }
            for prompt in PROMPTS
        ]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        pairs = beavertails_pairs(tmp_path / "rows.json", refusals=tmp_path / "refusals.jsonl")
        assert pairs.frame["prompt"].tolist() == made["prompt"].tolist()
        assert pairs.frame["harmless"].tolist() == made["refusal"].str.strip().tolist()
        assert pairs.frame.attrs["without_refusal"] == len(PROMPTS) - len(made)

    def test_progress_is_shown_only_when_asked_for(self, tmp_path, asked, capfd):
        make(tmp_path / "out.jsonl")
        assert capfd.readouterr() == ("", "")
        make(tmp_path / "two.jsonl", progress="refusing")
        assert "refusing" in capfd.readouterr().err


class TestInterrupted:
    def test_cut_at_any_byte_the_file_ends_the_same(self, tmp_path, asked):
        model, prompts = make_tiny(), PROMPTS[:10]
        make(tmp_path / "whole.jsonl", prompts, model)
        whole = (tmp_path / "whole.jsonl").read_bytes()
        out = tmp_path / "out.jsonl"
        ends = [place for place, byte in enumerate(whole, 1) if byte == ord("\n")]
        cuts = {*range(0, len(whole) + 1, 23), *ends, *(end - 1 for end in ends), 1}
        for cut in sorted(cuts):
            out.write_bytes(whole[:cut])
            asked.clear()
            make(out, prompts, model)
            assert out.read_bytes() == whole, cut
            done = sum(end <= cut for end in ends)
            # No batch that is whole is asked again; none is asked in parts.
            assert asked == [prompts[n : n + 4] for n in range(0, 10, 4) if min(n + 4, 10) > done]

    def test_an_exception_leaves_what_was_made(self, tmp_path, asked, monkeypatch):
        planted = refusals.answers

        def fails(model, tokenizer, prompts, *rest):
            if prompts[0] == PROMPTS[8]:
                raise RuntimeError("out of memory")
            return planted(model, tokenizer, prompts, *rest)

        monkeypatch.setattr(refusals, "answers", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            make(tmp_path / "out.jsonl")
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8

    def test_makers_at_once_ask_each_question_once(self, tmp_path, asked, monkeypatch):
        planted = refusals.answers

        def slowly(*arguments):
            time.sleep(0.05)
            return planted(*arguments)

        monkeypatch.setattr(refusals, "answers", slowly)
        arguments = (tmp_path / "out.jsonl", PROMPTS, make_tiny())
        makers = [threading.Thread(target=make, args=arguments) for _ in range(3)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join(timeout=60)
        assert sorted(chain(*asked)) == sorted(PROMPTS)
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(PROMPTS)

    def test_killed_for_real_and_called_again(self, tmp_path):
        folder = save_folder(tmp_path / "model", talker(), tokenizer())
        out = tmp_path / "killed.jsonl"
        script = tmp_path / "maker.py"
        script.write_text(
            textwrap.dedent(
                f"""
                import time
                from repnoise_kit import refusals
                from repnoise_kit.model import load_model, load_tokenizer

                own = refusals.answers
                def slowly(*arguments):
                    time.sleep(0.2)
                    return own(*arguments)
                refusals.answers = slowly
                refusals.make_refusals(
                    load_model({str(folder)!r}), load_tokenizer({str(folder)!r}), {PROMPTS!r},
                    {str(out)!r}, max_new_tokens=2, batch_size=3,
                )
                """
            )
        )
        process = subprocess.Popen([sys.executable, str(script)])
        until = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert 4 <= out.read_bytes().count(b"\n") < len(PROMPTS)

        from repnoise_kit.model import load_model, load_tokenizer

        model, words = load_model(folder), load_tokenizer(folder)
        settings = {"max_new_tokens": 2, "batch_size": 3}
        killed = make_refusals(model, words, PROMPTS, out, **settings)
        calm = make_refusals(model, words, PROMPTS, tmp_path / "calm.jsonl", **settings)
        assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
        assert killed.equals(calm)
        assert 0 < len(calm) < len(PROMPTS)


class TestAnotherFile:
    @pytest.mark.parametrize(
        "change",
        [
            {"prompts": PROMPTS[::-1]},
            {"prompts": PROMPTS[:-1]},
            {"prompts": [*PROMPTS, "another"]},
            {"batch_size": 5},
            {"max_new_tokens": 7},
        ],
    )
    def test_of_other_prompts_or_settings_is_refused_and_left(self, tmp_path, asked, change):
        out = tmp_path / "out.jsonl"
        make(out)
        before = out.read_bytes()
        with pytest.raises(KitError, match=r"out\.jsonl, line 1: made with other prompts"):
            make(out, **change)
        assert out.read_bytes() == before

    def test_of_another_model_is_refused_however_small_the_difference(self, tmp_path, asked):
        out = tmp_path / "out.jsonl"
        make(out)
        other = make_tiny()
        other.lm_head.weight.data[3, 4] += 1e-6
        with pytest.raises(KitError, match="another model"):
            make(out, model=other)

    def test_of_the_same_model_from_another_place_is_not(self, tmp_path, asked):
        from repnoise_kit.model import load_model

        for name in ("one", "two"):
            save_folder(tmp_path / name, make_tiny(len(tokenizer())), tokenizer())
        make(tmp_path / "out.jsonl", model=load_model(tmp_path / "one"))
        asked.clear()
        make(tmp_path / "out.jsonl", model=load_model(tmp_path / "two"))
        assert asked == []

    @pytest.mark.parametrize(
        "text",
        ['{"prompt": "mine", "refusal": "no"}\n', "my only copy", '{"made_with": "0', "\n", "[]\n"],
    )
    def test_of_somebody_else_is_refused_and_left(self, tmp_path, asked, text):
        out = tmp_path / "out.jsonl"
        out.write_text(text)
        if text == '{"made_with": "0':
            text = text.replace("0", "not hexadecimal")
            out.write_text(text)
        with pytest.raises(KitError, match="not by make_refusals; name another file"):
            make(out)
        assert out.read_text() == text

    def test_with_a_line_too_many_or_a_broken_one_is_refused(self, tmp_path, asked):
        out = tmp_path / "out.jsonl"
        make(out)
        whole = out.read_bytes()
        for broken, line in ((whole + whole[:9], 26), (whole.replace(b"}\n", b"\n", 1), 1)):
            out.write_bytes(broken)
            with pytest.raises(KitError, match=rf"line {line}: made with other"):
                make(out)


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"prompts": []}, "prompts holds no rows"),
            ({"prompts": "where?"}, "prompts is a text"),
            ({"prompts": ["a", " "]}, "prompts, row 2: prompt is empty or not text"),
            ({"prompts": ["a", None]}, "prompts, row 2: prompt is empty or not text"),
            ({"batch_size": 0}, "batch_size must be"),
            ({"batch_size": 2.5}, "batch_size must be"),
            ({"max_new_tokens": -1}, "max_new_tokens must be"),
        ],
    )
    def test_are_named(self, tmp_path, asked, arguments, said):
        with pytest.raises(KitError, match=said):
            make(tmp_path / "out.jsonl", **arguments)
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_file_of_another_kind_or_a_folder_is_refused(self, tmp_path, asked):
        (tmp_path / "folder.jsonl").mkdir()
        for name in ("out.csv", "folder.jsonl"):
            with pytest.raises(KitError, match=r"is not a \.jsonl file"):
                make(tmp_path / name)
