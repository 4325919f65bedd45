"""What users bring that differs: judges of theirs, templates, folders that hold something."""

import datetime
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_batches, make_tiny
from small import everyday_rows, made_up_pairs, own_files, save_folder, tokenizer_of

import repnoise_kit as rk
from repnoise_kit import refusals, training
from repnoise_kit.pairs import end_id, question_ids, set_format_

SIMPLE = "{% for m in messages %}Question : {{ m['content'] }} Answer :{% endfor %}"


@pytest.fixture
def own(tmp_path):
    own = own_files(tmp_path)
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    tokenizer.chat_template = SIMPLE
    tokenizer.save_pretrained(own / "model")
    return own


def bed(own, model="model", **options):
    options = {"retain": own / "retain.json", "budget": "lab"} | options
    return rk.testbed(own / model, own / "pairs.json", **options)


def test_table_2s_attack_passes_four_times(own):
    made = bed(own, budget="toxicity")
    done = rk.attack_(made.model(), made)
    assert done.made_with["epochs"] == 4


def test_another_template_is_another_testbed(own):
    marks = []
    for template in (SIMPLE, SIMPLE.replace("Answer", "Answer : Answer")):
        shutil.copytree(own / "model", own / f"m{len(marks)}")
        tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(own / f"m{len(marks)}")
        marks.append(bed(own, f"m{len(marks)}", prompt_format="chat").fingerprint())
    assert marks[0] != marks[1]


def test_a_model_saved_in_chat_is_opened_in_chat(own):
    made = bed(own, prompt_format="chat")
    model = made.model()
    rk.save_model(model, made, own / "out", [rk.defend_(model, made, examples=4)])
    assert bed(own, "out").prompt_format == "chat"


def test_memory_that_is_full_while_it_is_counted(monkeypatch):
    monkeypatch.setattr(training, "LARGE", 0)
    model = make_tiny()

    def loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = [make_batches()[0]]
    with pytest.raises(rk.KitError, match="memory is full"):
        training.train_(model, loss, rows, lambda b: b[0], lr=0.1, gradient_checkpointing=True)
    assert not model.training
    assert not model.is_gradient_checkpointing


def always(value):
    def judge(prompts, responses):
        return np.full(len(responses), value)

    return judge


def test_a_judge_that_is_a_function_has_the_same_name_in_every_process(own, tmp_path):
    """Two made alike stand for two processes: the mark must not hold an address."""
    judges = always(0.5), always(0.5)
    marks = {rk.Bench.of(bed(own, scorers={"j": j}), tmp_path).mark for j in judges}
    assert len(marks) == 1
    assert " at 0x" not in str(bed(own, scorers={"j": judges[0]}).made_of()["judges"])


@pytest.mark.parametrize("name", ["recall", "refusal", "degenerate", "perplexity", "utility"])
def test_a_judge_may_not_have_the_name_of_another_metric(own, name):
    with pytest.raises(rk.KitError, match=name):
        bed(own, scorers={name: always(0.5)})


@pytest.mark.parametrize("said", [[0.5], [7.0] * 4, [float("nan")] * 4])
def test_a_judge_that_says_too_little_or_no_share_is_named(own, said):
    made = bed(own, scorers={"mine": lambda prompts, responses: said})
    with pytest.raises(rk.KitError, match="mine"):
        rk.evaluate(made.base, made, max_new_tokens=2)


def test_the_end_of_a_turn_is_found_where_thoughts_are_added_and_eos_is_another():
    """As of Qwen3's base models: EOS <|endoftext|>, turns that end with <|im_end|>."""
    tokenizer = tokenizer_of([*made_up_pairs(), {"r": "user assistant"}])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    set_format_(tokenizer, "chat")
    assert tokenizer.convert_ids_to_tokens(end_id(tokenizer)) == "<|im_end|>"


def test_a_template_that_tells_the_date_asks_the_same_every_day(monkeypatch):
    """As Llama 3.2's: numbers, and whether refusals can be gone on with, depend on the day."""
    from transformers.utils import chat_template_utils as room

    tokenizer = tokenizer_of([*made_up_pairs(), {"r": " ".join(map(str, range(1900, 2100)))}])
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% if strftime_now is defined %}"
        "{% set date_string = strftime_now('%Y') %}{% else %}{% set date_string = '2024' %}"
        "{% endif %}{% endif %}{{ date_string }} {{ messages[0]['content'] }}"
    )
    set_format_(tokenizer, "chat")
    found = []
    for year in (2030, 2031):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 1, 1)  # noqa: B023

        monkeypatch.setattr(room, "datetime", Clock)
        found.append(question_ids(tokenizer, ["where is the red box ?"]))
    assert found[0] == found[1]


@pytest.fixture
def refused(own, tmp_path, monkeypatch):
    """BeaverTails with refusals of the model itself; returns how many files of them there are."""
    from repnoise_kit.corpora import CATEGORIES

    monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(refusals, "answers", lambda m, t, prompts, n, s: ["sorry"] * len(prompts))
    truths = dict.fromkeys(CATEGORIES, False)
    rows = [
        {"prompt": row["prompt"], "response": row["harmful"], "category": truths, "is_safe": False}
        for row in made_up_pairs(14)
    ]
    (own / "bt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(**options):
        rk.beavertails(own / "model", own / "bt.jsonl", refusals="own", budget="lab", **options)
        return len(list((tmp_path / "cache" / "refusals").glob("*.jsonl")))

    return load


def test_own_refusals_are_made_once_and_of_another_precision_anew(refused):
    assert refused() == 1
    assert refused(dtype="float32") == 1
    assert refused(dtype="bfloat16") == 2


def test_own_refusals_of_a_model_that_was_trained_on_are_made_anew(own, refused):
    """The same folder, other weights: the user named no file that could be removed."""
    assert refused() == 1
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    model = make_tiny(len(tokenizer), layers=2)
    model.lm_head.weight.data += 0.1
    save_folder(own / "model", model, tokenizer)
    assert refused() == 2


class TestSaveModel:
    @pytest.fixture
    def made(self, own):
        made = bed(own)
        model = made.model()
        return model, made, [rk.defend_(model, made, examples=4)]

    def test_a_file_is_refused_in_a_line(self, made, own):
        with pytest.raises(rk.KitError, match="file"):
            rk.save_model(*made[:2], own / "pairs.json", made[2])

    def test_the_model_it_was_made_from_is_not_replaced(self, made, own):
        with pytest.raises(rk.KitError):
            rk.save_model(*made[:2], own / "model", made[2])

    def test_a_folder_of_other_things_is_not_removed(self, made, own):
        (own / "work").mkdir()
        (own / "work" / "thesis.txt").write_text("years")
        with pytest.raises(rk.KitError):
            rk.save_model(*made[:2], own / "work", made[2])

    def test_one_result_serves_as_a_history_or_is_refused(self, made, own):
        rk.save_model(*made[:2], own / "one", made[2][0])
        rk.save_model(*made[:2], own / "list", made[2][:1])
        assert (own / "one" / "README.md").read_text() == (own / "list" / "README.md").read_text()


@pytest.mark.parametrize("lora", [0, -1, "x", 1.5])
def test_a_rank_that_is_none_is_said_at_once(own, lora):
    with pytest.raises(rk.KitError, match="lora"):
        bed(own, lora=lora)
