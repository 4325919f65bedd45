"""A released model: it reads back as it was, and its card says what was done and what was found."""

import json
import re

import pandas as pd
import pytest
import torch
import yaml
from families import family
from small import everyday_rows, made_up_pairs, own_files, save_folder, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import repnoise_kit as rk
from repnoise_kit.pairs import format_of
from repnoise_kit.results import stack

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

TEMPLATE = "{% for m in messages %}Question : {{ m['content'] }} Answer :{% endfor %}"
CHANGES = {"lr": 0.01, "examples": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = own_files(tmp_path_factory.mktemp("own"))
    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


def open_bed(own, model="model", **options):
    options = {"retain": own / "retain.json", "budget": "lab"} | options
    return rk.testbed(own / model, own / "pairs.json", **options)


@pytest.fixture(scope="module")
def bed(own):
    return open_bed(own, name="boxes")


@pytest.fixture(scope="module")
def made(bed):
    """A defended and then attacked model, and what it was told by each step and by evaluation."""
    model = bed.model()
    history = [rk.defend_(model, bed, seed=3, **CHANGES), rk.attack_(model, bed, seed=4, **CHANGES)]
    found = [rk.evaluate(model, bed, max_new_tokens=3, seed=seed) for seed in (3, 5)]
    tagged = [part.tagged(defence="repnoise", attack="small") for part in found]
    # Seeds that differ, so that there is an interval over them.
    tagged[1].frame["value"] *= 0.9
    return model, history, stack(*tagged)


@pytest.fixture(scope="module")
def released(bed, made, tmp_path_factory):
    model, history, evidence = made
    return rk.save_model(model, bed, tmp_path_factory.mktemp("out") / "mine", history, evidence)


@pytest.fixture(scope="module")
def card(released):
    return (released / "README.md").read_text(encoding="utf-8")


def same(one, other):
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[n], right[n]) for n in left)


class TestWeights:
    def test_from_pretrained_reads_the_very_weights(self, bed, made, released):
        loaded = AutoModelForCausalLM.from_pretrained(released, dtype="auto")
        assert same(loaded, made[0])
        assert not same(loaded, bed.base)
        ids = torch.arange(3, 12)[None]
        assert torch.equal(loaded.eval()(ids).logits, made[0](ids).logits)

    def test_safetensors_only(self, released):
        kinds = {path.suffix for path in released.rglob("*") if path.is_file()}
        assert kinds <= {".safetensors", ".json", ".jinja", ".md"}
        assert (released / "model.safetensors").exists()

    def test_the_tokenizer_is_with_it(self, bed, released):
        loaded = AutoTokenizer.from_pretrained(released)
        assert loaded.get_vocab() == bed.tokenizer.get_vocab()
        assert loaded.chat_template == TEMPLATE
        text = made_up_pairs(3)[2]["prompt"]
        assert loaded(text)["input_ids"] == bed.tokenizer(text)["input_ids"]

    def test_a_testbed_opens_it(self, own, made, released):
        again = rk.testbed(released, own / "pairs.json", retain=own / "retain.json", budget="lab")
        assert same(again.model(), made[0])
        assert again.name == "mine"

    def test_a_low_rank_defence_leaves_a_plain_model(self, bed, tmp_path):
        model = bed.model()
        history = [rk.defend_(model, bed, lora=2, **CHANGES)]
        folder = rk.save_model(model, bed, tmp_path / "low", history)
        assert not list(folder.glob("adapter*"))
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert same(loaded, model)
        assert [*loaded.state_dict()] == [*bed.base.state_dict()]
        assert not same(loaded, bed.base)
        assert _history(folder)[0]["settings"]["lora"] == 2

    def test_a_tied_head_stays_tied(self, own, tmp_path):
        tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
        save_folder(own / "gpt", family("GPT2", len(tokenizer)), tokenizer)
        bed = open_bed(own, "gpt")
        model = bed.model()
        folder = rk.save_model(model, bed, tmp_path / "gpt", [rk.defend_(model, bed, **CHANGES)])
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert same(loaded, model)
        assert not same(loaded, bed.base)

    def test_its_own_precision(self, own, tmp_path):
        bed = open_bed(own, dtype="bfloat16")
        model = bed.model()
        folder = rk.save_model(model, bed, tmp_path / "half", [rk.defend_(model, bed, **CHANGES)])
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert loaded.dtype == torch.bfloat16
        assert same(loaded, model)


def _history(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")
    return json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL)[1])


class TestCard:
    def test_its_front_matter_is_yaml_that_the_hub_reads(self, card):
        from huggingface_hub import ModelCard

        _, front, _ = card.split("---\n", 2)
        told = yaml.safe_load(front)
        assert told["library_name"] == "transformers"
        assert "repnoise-kit" in told["tags"]
        assert ModelCard(card).data.to_dict() == told

    def test_every_step_with_settings_seed_and_versions(self, released, made):
        told, made_with = _history(released), [found.made_with for found in made[1]]
        assert told == json.loads(json.dumps(made_with, default=str))
        assert [step["seed"] for step in told] == [3, 4]
        assert [step["lr"] for step in told] == [0.01, 0.01]
        assert told[0]["settings"]["examples"] == 4
        assert all(step[name] for step in told for name in ("repnoise-kit", "torch", "dtype"))

    def test_which_model_and_data(self, card, bed):
        assert card.split("---\n", 2)[2].strip().startswith("# boxes, defended")
        assert "`model` after repnoise" in card
        assert f"`{bed.fingerprint()}`" in card
        sizes = len(bed.splits.defence), len(bed.splits.attack), len(bed.evaluated())
        one_line = " ".join(card.split())
        assert (
            f"{sizes[0]} pairs seen by the defence, {sizes[1]} by attacks, {sizes[2]}" in one_line
        )
        assert "Prompt format: plain." in one_line

    def test_the_evidence_with_its_intervals(self, card, made):
        """A row a cell, over both seeds: what `summary` says, number by number."""
        lines = [line.strip("| ").split(" | ") for line in card.splitlines() if line[:1] == "|"]
        header, _, *rows = lines
        assert header == ["defence", "attack", "group", "metric", "mean [95 %]", "questions"]
        cells = rk.summary(made[2].frame)
        cells = cells[cells["seed"] == "all"]
        wanted = {
            (c["group"], c["metric"]): (
                f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]",
                str(c["n"]),
            )
            for c in cells.to_dict("records")
        }
        assert {(row[2], row[3]): tuple(row[4:]) for row in rows} == wanted
        assert (
            len(rows)
            == len(wanted)
            == made[2].frame[["group", "metric"]].drop_duplicates().shape[0]
        )
        assert {row[0] for row in rows} == {"repnoise"}
        assert {"recall", "harmfulness", "utility", "degenerate"} <= {row[3] for row in rows}

    def test_one_seed_has_its_interval_over_questions(self, bed, made, tmp_path):
        found = made[2].frame
        one = rk.Result(found[found["seed"] == 3].reset_index(drop=True))
        folder = rk.save_model(made[0], bed, tmp_path / "one", made[1], one)
        cell = rk.summary(one.frame).query("metric == 'utility' and group == 'seen'").iloc[0]
        told = f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
        row = f"| repnoise | small | seen | utility | {told} | {cell['n']} |"
        assert row in (folder / "README.md").read_text()

    def test_an_evaluation_as_it_comes(self, bed, made, tmp_path):
        """Without the columns that stacking adds."""
        found = rk.evaluate(made[0], bed, max_new_tokens=2)
        folder = rk.save_model(made[0], bed, tmp_path / "bare", made[1], found)
        assert "| group | metric | mean [95 %] | questions |" in (folder / "README.md").read_text()

    def test_without_evidence_it_says_so(self, bed, made, tmp_path):
        folder = rk.save_model(made[0], bed, tmp_path / "none", made[1])
        text = (folder / "README.md").read_text()
        assert "None was given." in text
        assert "|" not in text

    def test_the_limits_are_told(self, card):
        one_line = " ".join(card.split())
        assert "it is no promise about others" in one_line
        assert "Low scores of a broken model are no defence" in one_line

    def test_the_chat_format_is_told_and_goes_with_the_tokenizer(self, own, tmp_path):
        bed = open_bed(own, prompt_format="chat")
        model = bed.model()
        folder = rk.save_model(model, bed, tmp_path / "chat", [rk.defend_(model, bed, **CHANGES)])
        assert "Prompt format:\nchat." in (folder / "README.md").read_text()
        assert _history(folder)[0]["prompt_format"] == "chat"
        assert format_of(AutoTokenizer.from_pretrained(folder)) == "chat"

    def test_a_name_of_any_letters(self, own, made, tmp_path):
        bed = open_bed(own, name="Kästen {boxes} & “co”")
        folder = rk.save_model(made[0], bed, tmp_path / "a folder", made[1])
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "# Kästen {boxes} & “co”, defended" in text
        assert yaml.safe_load(text.split("---\n", 2)[1])


class TestWriting:
    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("part", ["model", "tokenizer"])
    def test_an_interruption_leaves_what_was_there(
        self, bed, made, tmp_path, monkeypatch, there, part
    ):
        model, history, _ = made
        folder = tmp_path / "mine"
        if there:
            rk.save_model(model, bed, folder, history)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        broken = {"model": model, "tokenizer": bed.tokenizer}[part]
        real = broken.save_pretrained

        def halfway(where, **options):
            real(where, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(broken, "save_pretrained", halfway)
        with pytest.raises(KeyboardInterrupt):
            rk.save_model(model, bed, folder, history)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before
        assert bool(before) is there
        assert not list(tmp_path.glob(".*"))

    def test_a_model_that_was_there_is_replaced_whole(self, bed, made, tmp_path):
        model, history, evidence = made
        folder = rk.save_model(bed.base, bed, tmp_path / "mine", history, evidence)
        (folder / "adapter_model.safetensors").write_bytes(b"of another model")
        assert rk.save_model(model, bed, str(folder), history) == folder
        assert same(AutoModelForCausalLM.from_pretrained(folder), model)
        assert not (folder / "adapter_model.safetensors").exists()
        assert "None was given." in (folder / "README.md").read_text()

    def test_saving_changes_nothing(self, bed, made, tmp_path):
        model, history, evidence = made
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        rows = evidence.frame.copy()
        mark = bed.fingerprint()
        rk.save_model(model, bed, tmp_path / "mine", history, evidence)
        assert all(torch.equal(weight, before[n]) for n, weight in model.state_dict().items())
        pd.testing.assert_frame_equal(evidence.frame, rows)
        assert bed.fingerprint() == mark


class TestRefused:
    def test_a_model_that_nothing_was_done_to(self, bed, tmp_path):
        with pytest.raises(rk.KitError, match="give what defend_ returned"):
            rk.save_model(bed.base, bed, tmp_path / "none", [])
        assert not list(tmp_path.iterdir())

    def test_security_vectors_which_a_plain_model_does_not_hold(self, bed, tmp_path):
        model = bed.model()
        done = rk.defend_(model, bed, "security_vectors", examples=4)
        with pytest.raises(rk.KitError, match="security vectors are an adapter"):
            rk.save_model(model, bed, tmp_path / "guarded", [done])
        assert not list(tmp_path.iterdir())

    def test_evidence_of_another_kind(self, bed, made, tmp_path):
        with pytest.raises(rk.KitError, match=r"columns \['step'\].*'value'"):
            rk.save_model(
                made[0], bed, tmp_path / "odd", made[1], rk.Result(pd.DataFrame({"step": [1]}))
            )
        assert not list(tmp_path.iterdir())

    def test_a_folder_that_cannot_be_made(self, bed, made, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(rk.KitError, match=r"cannot write to .*file"):
            rk.save_model(made[0], bed, tmp_path / "file" / "mine", made[1])
