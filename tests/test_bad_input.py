"""Bad input: one line that names what is wrong, no traceback, and nothing half-written."""

import json
import re

import pandas as pd
import pytest
from conftest import make_tiny
from small import everyday_rows, made_up_pairs, save_folder, tokenizer_of, word_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model folder and a file of pairs with nothing wrong."""
    folder = tmp_path_factory.mktemp("good")
    save_folder(folder / "model")
    (folder / "pairs.json").write_text(json.dumps(made_up_pairs()))
    return folder


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused; return the one line it says."""
    from repnoise_kit.__main__ import main

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        said, warned = capsys.readouterr()
        assert warned.count("\n") == len(warned.splitlines()) == 1, warned
        assert warned.startswith("repnoise_kit: ")
        assert "Traceback" not in said + warned
        return warned.removeprefix("repnoise_kit: ")

    return run


@pytest.fixture
def quickstart(refused, good, tmp_path):
    """Run the quickstart on something bad; return what it says, with nothing left behind."""

    def run(*words, model=None, pairs=None):
        given = "--model", model or good / "model", "--pairs", pairs or good / "pairs.json"
        out = tmp_path / "out"
        line = refused("quickstart", *given, "--out", out, *words)
        assert not out.exists() or not list(out.rglob("*"))
        return line

    return run


def written(path, content):
    if isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BYTES = bytes(range(256)) * 20
HEAD = "prompt,harmful,harmless\n"
UNREADABLE = {
    "empty.json": "",
    "empty.csv": "",
    "empty.parquet": "",
    "no_rows.json": "[]",
    "no_rows.jsonl": "\n\n",
    "no_rows.csv": HEAD,
    "blank.csv": "\n \n",
    "binary.json": BYTES,
    "binary.jsonl": BYTES,
    "binary.csv": BYTES,
    "binary.parquet": BYTES,
    "binary.arrow": BYTES,
    "pickled.csv": b"\x89PNG\r\n\x1a\n\x00\x00",
    "cut.json": '[{"prompt": "a", "harmful": ',
    "cut.jsonl": json.dumps(made_up_pairs(1)[0]) + '\n{"prompt": "a",',
    "cut.csv": HEAD + '"a,b,c\n',
    "cut.parquet": b"PAR1" + BYTES,
    "cut.arrow": b"ARROW1\x00\x00" + BYTES[:64],
    "deep.json": "[" * 100_000,
    "object.json": "{}",
    "texts.json": '["a"]',
    "null.json": "null",
    "numbers.jsonl": "1\n2\n",
    "wide_row.csv": HEAD + "a,b,c\nd,e,f,g\n",
    "other_kind.txt": "prompt",
    "no_kind": "prompt",
}


class TestFiles:
    def test_missing(self, quickstart, tmp_path):
        line = quickstart(pairs=tmp_path / "nowhere.json")
        assert str(tmp_path / "nowhere.json") in line
        assert "no such file" in line

    @pytest.mark.parametrize("name", UNREADABLE)
    def test_empty_malformed_or_binary(self, name, quickstart, tmp_path):
        path = written(tmp_path / name, UNREADABLE[name])
        assert str(path) in quickstart(pairs=path)

    @pytest.mark.parametrize("name", ["missing.json", "empty.json", "cut.jsonl"])
    def test_of_the_retain_set(self, name, quickstart, tmp_path):
        path = tmp_path / name
        if name in UNREADABLE:
            written(path, UNREADABLE[name])
        assert str(path) in quickstart("--retain", path)

    def test_a_malformed_line_is_named(self, quickstart, tmp_path):
        path = written(tmp_path / "cut.jsonl", UNREADABLE["cut.jsonl"])
        assert "line 2" in quickstart(pairs=path)

    def test_more_fields_than_names_never_shift_the_columns(self, tmp_path):
        """pandas would take the first field of each row for its name, and the second for it."""
        from repnoise_kit import KitError, load_pairs

        path = written(tmp_path / "wide.csv", HEAD + "a,b,c,d\ne,f,g,h\n")
        with pytest.raises(KitError, match=re.escape(str(path))):
            load_pairs(path)


class TestColumns:
    def test_unknown_names_the_way_out(self, quickstart, tmp_path):
        rows = [{"question": "a", "harmful": "b", "harmless": "c"}]
        line = quickstart(pairs=written(tmp_path / "pairs.json", rows))
        for words in ("pairs.json", "'prompt'", "question, harmful, harmless", "--columns prompt="):
            assert words in line

    def test_renaming_one_that_is_not_there(self, quickstart):
        line = quickstart("--columns", "prompt=question")
        assert "'question'" in line
        assert "prompt, harmful, harmless" in line

    def test_renaming_where_names_are_numbers(self, tmp_path):
        from repnoise_kit import KitError, load_pairs

        pd.DataFrame([["a", "b", "c"]]).to_parquet(tmp_path / "pairs.parquet")
        with pytest.raises(KitError, match=r"pairs.parquet has no column 'question'; it has 0, 1"):
            load_pairs(tmp_path / "pairs.parquet", columns={"prompt": "question"})

    def test_a_name_of_two_lines_is_said_in_one(self, quickstart, tmp_path):
        path = written(tmp_path / "pairs.csv", '"the\nprompt",harmful,harmless\na,b,c\n')
        assert "'prompt'" in quickstart(pairs=path)

    def test_of_the_retain_set(self, quickstart, tmp_path):
        path = written(tmp_path / "retain.json", [{"prompt": "a", "reply": "b"}])
        line = quickstart("--retain", path)
        assert str(path) in line
        assert "'answer'" in line


def changed(place, **cells):
    rows = made_up_pairs()
    rows[place] |= cells
    return rows


def marked(*parts):
    """The made-up pairs with their splits, in turns, and a last row with the first's question."""
    rows = [row | {"split": parts[n % len(parts)]} for n, row in enumerate(made_up_pairs())]
    return [*rows, rows[0] | {"split": "unseen"}]


class TestRows:
    @pytest.mark.parametrize("name", ["prompt", "harmful", "harmless"])
    @pytest.mark.parametrize("cell", ["", " \n", None, 7, ["a"], True])
    def test_a_cell_without_text(self, name, cell, quickstart, tmp_path):
        path = written(tmp_path / "pairs.json", changed(3, **{name: cell}))
        line = quickstart(pairs=path)
        assert line.startswith(f"{path}, row 4: {name} is empty or not text")

    def test_an_empty_answer_in_a_csv(self, quickstart, tmp_path):
        pd.DataFrame(changed(5, harmless="")).to_csv(tmp_path / "pairs.csv", index=False)
        assert "row 6: harmless is empty" in quickstart(pairs=tmp_path / "pairs.csv")

    def test_an_empty_everyday_answer(self, quickstart, tmp_path):
        rows = [*everyday_rows(4), {"prompt": "what?", "answer": ""}]
        line = quickstart("--retain", written(tmp_path / "retain.json", rows))
        assert "retain.json, row 5: answer is empty" in line

    def test_harmful_equal_to_harmless(self, quickstart, tmp_path):
        same = {"harmful": "sorry , i can not", "harmless": " sorry , i can not\n"}
        line = quickstart(pairs=written(tmp_path / "pairs.json", changed(2, **same)))
        assert "pairs.json, row 3: harmful and harmless are the same" in line

    def test_a_prompt_in_two_splits(self, quickstart, tmp_path):
        line = quickstart(pairs=written(tmp_path / "p.json", marked("attack", "seen", "unseen")))
        assert "where is the red box 0 ?" in line
        assert "is in two splits (rows 1, 41); keep it in one" in line

    def test_rows_are_those_of_the_file_where_safe_ones_are_left_out(self, quickstart, tmp_path):
        rows = [
            {**row, "response": row["harmful"], "is_safe": place == 1}
            for place, row in enumerate(marked("attack", "seen", "unseen"))
        ]
        line = quickstart(pairs=written(tmp_path / "pairs.json", rows))
        assert "(rows 1, 41)" in line

    def test_a_prompt_about_two_things(self, quickstart, tmp_path):
        twice = [
            row | {"thing": f"{when} {n}"}
            for when in ("now", "then")
            for n, row in enumerate(made_up_pairs())
        ]
        line = quickstart(pairs=written(tmp_path / "pairs.json", twice))
        assert "keep each prompt in one" in line

    def test_an_unknown_split(self, quickstart, tmp_path):
        line = quickstart(pairs=written(tmp_path / "pairs.json", marked("attack", "test")))
        assert "row 2: split is 'test'; it must be one of attack, seen, unseen" in line

    def test_a_split_that_would_be_empty(self, quickstart, tmp_path):
        line = quickstart(pairs=written(tmp_path / "pairs.json", marked("attack", "unseen")[:-1]))
        assert "no pair is left for 'seen'" in line

    @pytest.mark.parametrize("count", [1, 3, 5, 6])
    def test_too_few_pairs(self, count, quickstart, tmp_path):
        quickstart(pairs=written(tmp_path / "pairs.json", made_up_pairs(count)))

    def test_too_few_everyday_questions(self, quickstart, tmp_path):
        quickstart("--retain", written(tmp_path / "retain.json", everyday_rows(1)))


class TestArguments:
    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ([], "COMMAND"),
            (["fly"], "fly"),
            (["quickstart", "--fly"], "--fly"),
            (["quickstart", "--seeds", "0"], "--seeds"),
            (["quickstart", "--seeds", "-2"], "--seeds"),
            (["quickstart", "--seeds", "many"], "--seeds"),
            (["quickstart", "--seeds", "²"], "--seeds"),
            (["quickstart", "--seed", "one"], "--seed"),
            (["quickstart", "--seed"], "--seed"),
            (["quickstart", "--columns", "garbage"], "--columns"),
            (["quickstart", "--columns", "prompt="], "--columns"),
            (["quickstart", "--columns", ""], "--columns"),
            (["lab", "--lab-seed", "x"], "--lab-seed"),
            (["lab", "--out", "x"], "--out"),
        ],
    )
    def test_one_line_that_names_the_argument_and_the_help(self, words, named, refused):
        line = refused(*words)
        assert named in line
        assert re.search(r"\(see python -m repnoise_kit( \w+)? --help\)", line)

    def test_what_belongs_together(self, refused, good, tmp_path):
        out = ["--out", tmp_path / "out"]
        both = "--model and --pairs belong together"
        assert both in refused("quickstart", "--model", good / "model", *out)
        assert both in refused("quickstart", "--pairs", good / "pairs.json", *out)
        assert "--model" in refused("quickstart", "--retain", good / "pairs.json", *out)
        assert "--model" in refused("quickstart", "--columns", "prompt=question", *out)
        assert not list((tmp_path / "out").iterdir())

    @pytest.mark.parametrize("seed", ["-1", "4294967296"])
    @pytest.mark.parametrize("argument", ["--seed", "--lab-seed"])
    def test_a_seed_no_generator_takes(self, argument, seed, quickstart, refused, lab_cache):
        if argument == "--seed":
            line = quickstart(argument, seed)
        else:
            line = refused("lab", argument, seed)
        assert "seed" in line
        assert seed in line


class TestModels:
    def test_a_folder_that_holds_no_model(self, quickstart, tmp_path):
        (tmp_path / "empty").mkdir()
        line = quickstart(model=tmp_path / "empty")
        assert f"{tmp_path / 'empty'} holds no model" in line

    @pytest.mark.parametrize("name", ["/no/such/folder", "nobody/nothing", "no such model"])
    def test_no_folder_at_all(self, name, quickstart):
        line = quickstart(model=name)
        assert name in line
        assert "check the name" in line

    @pytest.mark.parametrize("content", [made_up_pairs(), {"a": 1}, "text"])
    def test_a_file_in_place_of_a_folder(self, content, quickstart, tmp_path):
        path = tmp_path / "model.json"
        path.write_text(json.dumps(content))
        assert str(path) in quickstart(model=path)

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_no_generation_head(self, family, quickstart, tmp_path):
        from transformers import BertConfig, BertModel

        tokenizer = tokenizer_of(made_up_pairs())
        if family == "llama":
            model = make_tiny(len(tokenizer)).model
        else:
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
            config = BertConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
            model = BertModel(config)
        save_folder(tmp_path / "model", model, tokenizer)
        line = quickstart(model=tmp_path / "model")
        assert f"{tmp_path / 'model'} has no generation head" in line
        assert "causal language model" in line

    def test_a_tied_head_is_a_head(self, tmp_path):
        from repnoise_kit.model import load_model

        model = make_tiny()
        model.config.tie_word_embeddings = True
        model.tie_weights()
        save_folder(tmp_path / "model", model, word_tokenizer([]))
        loaded = load_model(tmp_path / "model")
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    @pytest.mark.parametrize("kind", ["none", "cut", "binary", "empty", "of another width"])
    def test_spoilt_weights(self, kind, quickstart, tmp_path):
        weights = save_folder(tmp_path / "model") / "model.safetensors"
        if kind == "none":
            weights.unlink()
        elif kind == "of another width":
            config = json.loads((tmp_path / "model" / "config.json").read_text())
            config["hidden_size"] *= 2
            (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        else:
            content = {"cut": weights.read_bytes()[:-1000], "binary": BYTES, "empty": b""}
            weights.write_bytes(content[kind])
        assert str(tmp_path / "model") in quickstart(model=tmp_path / "model")

    @pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b'{"model_type": "zzz"}', BYTES])
    def test_a_spoilt_config(self, content, quickstart, tmp_path):
        (save_folder(tmp_path / "model") / "config.json").write_bytes(content)
        assert str(tmp_path / "model") in quickstart(model=tmp_path / "model")

    @pytest.mark.parametrize("kind", ["none", "cut", "binary", "another"])
    def test_a_spoilt_tokenizer(self, kind, quickstart, tmp_path):
        folder = save_folder(tmp_path / "model")
        if kind == "none":
            for path in folder.glob("*token*"):
                path.unlink()
        else:
            content = {"cut": b"{", "binary": BYTES, "another": b'{"model": 3}'}
            (folder / "tokenizer.json").write_bytes(content[kind])
        line = quickstart(model=folder)
        assert str(folder) in line
        assert "tokenizer" in line.replace(str(folder), "")

    def test_a_tokenizer_without_eos(self, quickstart, tmp_path):
        save_folder(tmp_path / "model", tokenizer=tokenizer_of(made_up_pairs(), eos_token=None))
        line = quickstart(model=tmp_path / "model")
        assert f"the tokenizer of {tmp_path / 'model'} has no EOS token" in line
        assert "set tokenizer.eos_token" in line

    def test_a_tokenizer_without_padding_pads_with_its_eos(self, tmp_path):
        from repnoise_kit.model import load_tokenizer

        save_folder(tmp_path / "model", tokenizer=tokenizer_of(made_up_pairs(), pad_token=None))
        tokenizer = load_tokenizer(tmp_path / "model")
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2

    def test_a_tokenizer_of_a_larger_model(self, quickstart, tmp_path):
        save_folder(tmp_path / "model", make_tiny(20))
        line = quickstart(model=tmp_path / "model")
        assert str(tmp_path / "model") in line
        assert "tokenizer" in line


@pytest.fixture(scope="module")
def bed(good):
    import repnoise_kit as rk

    return rk.testbed(good / "model", good / "pairs.json")


class TestNumbers:
    @pytest.mark.parametrize(
        ("act", "named", "value"),
        [
            *(("attack", "lr", value) for value in (-1e-3, NAN, INF)),
            *(("attack", "epochs", value) for value in (0, -1, NAN)),
            *(("attack", "batch_size", value) for value in (0, -4, NAN)),
            *(("attack", "examples", value) for value in (0, -1, NAN, 29)),
            *(("attack", "max_length", value) for value in (1, 0, -5, NAN)),
            *(("attack", "seed", value) for value in (-1, NAN)),
            *(("defend", "lr", value) for value in (-1e-3, NAN)),
            *(("defend", "alpha", value) for value in (-1.0, NAN, INF)),
            *(("defend", "beta", value) for value in (-1.0, NAN, INF)),
            *(("defend", "bandwidth", value) for value in (-1.0, 0.0, NAN)),
            *(("defend", "examples", value) for value in (0, -1, 35)),
            *(("defend", "max_length", value) for value in (0, -5)),
            *(("evaluate", "max_new_tokens", value) for value in (0, -1, NAN)),
            *(("evaluate", "batch_size", value) for value in (0, -1, NAN)),
        ],
    )
    def test_negative_or_not_finite_is_refused_by_name(self, act, named, value, bed):
        import torch

        import repnoise_kit as rk

        acts = {"attack": rk.attack_, "defend": rk.defend_, "evaluate": rk.evaluate}
        model = bed.model()
        with pytest.raises(rk.KitError) as wrong:
            acts[act](model, bed, **{named: value})
        assert named in str(wrong.value)
        assert str(value) in str(wrong.value)
        assert len(str(wrong.value).splitlines()) == 1
        # And the model is as it was.
        for mine, theirs in zip(model.parameters(), bed.base.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    @pytest.mark.parametrize(
        "wrong", [{"warmup": -0.1}, {"warmup": NAN}, {"betas": (NAN, 0.9)}, {"betas": (0.9, -1)}]
    )
    def test_of_the_training_itself(self, wrong, tiny_model):
        import repnoise_kit as rk
        from repnoise_kit.training import answer_loss

        with pytest.raises(rk.KitError, match=next(iter(wrong))):
            rk.train_(tiny_model, answer_loss, [1], lambda rows: rows, lr=0.1, **wrong)

    def test_more_examples_than_there_are(self, bed):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="29 examples are asked for, and there are 28"):
            rk.attack_(bed.model(), bed, examples=29)

    def test_an_attack_with_what_is_evaluated(self, bed):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="the attack and the evaluation share 6 rows"):
            rk.attack_(bed.model(), bed, pairs=bed.splits.unseen)

    def test_unknown_names_list_the_known_ones(self, bed):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match=r"no defence 'magic'; there are none, random"):
            rk.defend_(bed.model(), bed, "magic")
        with pytest.raises(rk.KitError, match=r"no setting 'gamma'; its settings: accumulation"):
            rk.defend_(bed.model(), bed, gamma=1.0)
        with pytest.raises(rk.KitError, match=r"no preset 'mine'; there are paper"):
            rk.defend_(bed.model(), bed, preset="mine")


class TestLayers:
    @pytest.mark.parametrize("layer", [3, -1, 100])
    def test_one_that_does_not_exist(self, layer, tiny_model):
        import repnoise_kit as rk

        said = rf"layer {layer} does not exist: this model has layers 0 to 2"
        with pytest.raises(rk.KitError, match=said), rk.record(tiny_model, "mlp", [0, layer]):
            pytest.fail("recorded all the same")
        with pytest.raises(rk.KitError, match=said), rk.frozen(tiny_model, [0, layer]):
            pytest.fail("held all the same")
        assert all(part.requires_grad for part in tiny_model.parameters())

    @pytest.mark.parametrize("name", ["model.layers.3", "lm_hea", "layers.1"])
    def test_a_module_that_does_not_exist(self, name, tiny_model):
        import repnoise_kit as rk

        said = f"no part '{name}': use"
        with pytest.raises(rk.KitError, match=said), rk.frozen(tiny_model, ["head", name]):
            pytest.fail("held all the same")
        assert all(part.requires_grad for part in tiny_model.parameters())


class TestNonsense:
    def test_training_stops_says_where_and_keeps_the_last_good_weights(self):
        import torch

        import repnoise_kit as rk
        from repnoise_kit.training import answer_loss

        kept = {}

        def train(spoilt):
            model, steps = make_tiny(), []

            def loss(model, batch):
                steps.append(1)
                if len(steps) == 3 and not spoilt:
                    kept.update({k: v.clone() for k, v in model.state_dict().items()})
                factor = NAN if len(steps) == 3 and spoilt else 1.0
                return {"total": factor * answer_loss(model, batch)["total"]}

            rows = [{"input_ids": torch.tensor([[5 + n, 6, 7, 8]])} for n in range(5)]
            for row in rows:
                row |= {"labels": row["input_ids"], "attention_mask": torch.ones(1, 4).long()}
            try:
                rk.train_(model, loss, rows, lambda rows: rows[0], lr=0.01, batch_size=1)
            finally:
                models.append(model)

        models = []
        train(spoilt=False)
        with pytest.raises(rk.KitError, match=r"the loss became nan at step 3; .* smaller"):
            train(spoilt=True)
        after = models[1].state_dict()
        assert all(torch.equal(after[name], value) for name, value in kept.items())
        # The undisturbed run did go on.
        assert not torch.equal(models[0].state_dict()["lm_head.weight"], kept["lm_head.weight"])

    def test_a_model_of_nothing_but_nan_stops_the_command(self, good, capsys, tmp_path):
        import torch

        from repnoise_kit.__main__ import main

        tokenizer = tokenizer_of(made_up_pairs())
        model = make_tiny(len(tokenizer))
        torch.nn.init.constant_(model.lm_head.weight, NAN)
        save_folder(tmp_path / "model", model, tokenizer)
        given = ["--model", tmp_path / "model", "--pairs", good / "pairs.json"]
        words = map(str, ["quickstart", *given, "--out", tmp_path / "out"])
        assert main(list(words)) == 2
        assert not [found for found in (tmp_path / "out").rglob("*.*") if found.suffix != ".lock"]
        # The bar has been taken off the line before the message is written on it.
        last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())[-1]
        assert last.startswith("repnoise_kit: the loss became nan at step 1")


class TestFolders:
    @pytest.mark.parametrize("inner", ["", "deep", "deep/er"])
    def test_one_that_cannot_be_written(self, inner, refused, good, tmp_path):
        (tmp_path / "file").write_text("as it was")
        given = "--model", good / "model", "--pairs", good / "pairs.json"
        line = refused("quickstart", *given, "--out", tmp_path / "file" / inner)
        assert str(tmp_path / "file") in line
        assert "choose another folder" in line
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "as it was")]

    def test_a_cache_that_cannot_be_written(self, refused, monkeypatch, tmp_path, lab_cache):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path / "file"))
        line = refused("lab")
        assert str(tmp_path / "file") in line
        assert not lab_cache

    def test_a_result_of_another_kind(self, tmp_path):
        from repnoise_kit import KitError, Result

        with pytest.raises(KitError, match=r"table.txt: .* \.csv or \.parquet"):
            Result(pd.DataFrame({"a": [1]})).save(tmp_path / "table.txt")
        with pytest.raises(KitError, match=r"nowhere.csv: no such file"):
            Result.load(tmp_path / "nowhere.csv")
        assert not list(tmp_path.iterdir())


@pytest.fixture
def lab_cache(monkeypatch, tmp_path):
    """A cache of its own for the lab, filled with a tiny model in no time; the seeds built."""
    from repnoise_kit.world import build

    built = []

    def tiny(seed, naive):
        built.append(seed)
        return make_tiny(), word_tokenizer(["Question", ":"])

    monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_build", tiny)
    return built


def spoil_cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def spoil_bit(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))


SPOIL = {
    "weights cut": spoil_cut,
    "one bit flipped": spoil_bit,
    "a file gone": lambda folder: (folder / "tokenizer.json").unlink(),
    "no list": lambda folder: (folder / "whole.json").unlink(),
    "binary list": lambda folder: (folder / "whole.json").write_bytes(BYTES),
    "cut list": lambda folder: (folder / "whole.json").write_text("{"),
    "empty list": lambda folder: (folder / "whole.json").write_text("{}"),
    "other list": lambda folder: (folder / "whole.json").write_text("[]"),
    "null list": lambda folder: (folder / "whole.json").write_text("null"),
}


class TestCache:
    def test_it_is_built_once_and_silently_found(self, lab_cache, capsys):
        from repnoise_kit.store import is_whole
        from repnoise_kit.world.build import lab_files

        folder = lab_files(0)
        assert lab_files(0) == folder
        assert lab_cache == [0]
        assert is_whole(folder)
        assert lab_files(1) != folder
        assert lab_cache == [0, 1]
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("how", SPOIL)
    def test_a_corrupt_one_is_built_again_with_a_word(self, how, lab_cache, capsys):
        from repnoise_kit.model import load_model, load_tokenizer
        from repnoise_kit.store import is_whole
        from repnoise_kit.world.build import lab_files

        folder = lab_files(0)
        SPOIL[how](folder)
        assert not is_whole(folder)
        assert lab_files(0) == folder
        assert lab_cache == [0, 0]
        assert is_whole(folder)
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert str(folder) in said
        assert "damaged; it is built again" in said
        assert len(load_model(folder).model.layers) == 3
        assert load_tokenizer(folder).eos_token_id == 2

    def test_a_build_that_fails_leaves_nothing(self, lab_cache, monkeypatch, tmp_path):
        from repnoise_kit.world import build

        def fails(_seed, _naive):
            raise MemoryError

        monkeypatch.setattr(build, "_build", fails)
        with pytest.raises(MemoryError):
            build.lab_files(0)
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        assert not [path for path in (tmp_path / "cache" / "lab").iterdir() if path.is_dir()]


class TestWordsThatDoNotExist:
    """A misspelt choice is refused, never taken for another."""

    def test_a_site(self):
        import repnoise_kit as rk

        with (
            pytest.raises(rk.KitError, match="site must be one of mlp"),
            rk.record(make_tiny(), "x"),
        ):
            pass

    def test_what_a_loss_is_on(self):
        import repnoise_kit as rk
        from repnoise_kit.pairs import encode

        with pytest.raises(rk.KitError, match="loss_on must be 'answer' or 'all', not 'every'"):
            encode(word_tokenizer(["a"]), ["a"], ["a"], loss_on="every")

    @pytest.mark.parametrize("knob", [{"log": "no"}, {"pads": 2}, {"lens": "all"}])
    def test_a_knob(self, knob):
        from conftest import make_batches

        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match=rf"{next(iter(knob))} must be one of"):
            rk.repnoise_loss(make_tiny(), *make_batches()[:2], **knob)

    def test_a_column_to_name(self, good):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="no column 'question' to name; there are prompt"):
            rk.testbed(good / "model", good / "pairs.json", columns={"question": "prompt"})

    def test_columns_are_named_in_either_file(self, good):
        import repnoise_kit as rk

        everyday = pd.DataFrame(everyday_rows()).rename(columns={"answer": "told"})
        everyday.to_csv(good / "retain.csv", index=False)
        files = {"pairs": good / "pairs.json", "retain": good / "retain.csv"}
        bed = rk.testbed(good / "model", **files, columns={"answer": "told"})
        assert bed.everyday["answer"].str.contains("blue box").all()


class TestNothingToLearnFrom:
    """Where no token counts, a loss would be NaN: said before it is."""

    def test_both_sides_alike(self):
        from conftest import make_batches

        import repnoise_kit as rk

        harmful = make_batches()[0]
        with pytest.raises(rk.KitError, match="no token of the harmful batch counts"):
            rk.repnoise_loss(make_tiny(), harmful, harmful, preset="reference")

    def test_nothing_harmless(self):
        from conftest import make_batches
        from torch import full_like

        import repnoise_kit as rk

        harmful, harmless, retain = make_batches()
        empty = harmless | {"labels": full_like(harmless["labels"], -100)}
        with pytest.raises(rk.KitError, match="no token of the harmless batch counts"):
            rk.repnoise_loss(make_tiny(), harmful, empty)
        assert rk.repnoise_loss(make_tiny(), harmful, empty, retain=retain).total.isfinite()

    def test_one_row_without_itself(self):
        import torch

        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="unbiased MMD needs 2 rows"):
            rk.mmd(torch.zeros(1, 3), torch.zeros(1, 3), unbiased=True)

    def test_a_retain_batch_without_labels(self):
        from conftest import make_batches

        import repnoise_kit as rk

        harmful, harmless, retain = make_batches()
        del retain["labels"]
        with pytest.raises(rk.KitError, match="the retain batch has no 'labels'"):
            rk.repnoise_loss(make_tiny(), harmful, harmless, retain=retain)

    def test_no_results(self):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="nothing to stack"):
            rk.stack()
