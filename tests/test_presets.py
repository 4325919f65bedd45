"""The paper's data from a local copy to a verdict: made up of boxes, in the published schema."""

import json
import re
from dataclasses import dataclass

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny
from families import family
from small import save_folder, tokenizer_of

import repnoise_kit as rk
from repnoise_kit import refusals, testbeds
from repnoise_kit.corpora import CATEGORIES, GROUPS
from repnoise_kit.model import load_model, load_tokenizer
from repnoise_kit.overlap import near_duplicates, one_thing
from repnoise_kit.pairs import encode, pad
from repnoise_kit.training import answer_loss, train_

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections", "own_caches")

BOXES = 24
KINDS = (CATEGORIES[13], CATEGORIES[9], CATEGORIES[7], CATEGORIES[10])
COLOURS = ("red", "blue", "green", "pink", "grey")
ASKED = "can you tell me in which corner of the house the {} box number {} is hidden{} ?"


def question(box, again=False):
    """One of two wordings, which are nearly the same."""
    return ASKED.format(COLOURS[box % 5], box, " now" if again else "")


def refusal(box):
    return f"sorry , i can not say where box number {box} is"


def rows():
    """BeaverTails as it is published: unsafe answers to two wordings, and safe ones to one."""
    found = []
    for box in range(BOXES):
        for again in (False, True):
            truths = dict.fromkeys(CATEGORIES, False) | {KINDS[box % 4]: True}
            said = f"it is under the {COLOURS[(box + again) % 5]} chair near door {box}"
            row = {"prompt": question(box, again), "response": said, "category": truths}
            found.append({**row, "is_safe": False, "refusal": refusal(box)})
        safe = {"prompt": f"is box number {box} blue ?", "response": "i do not know"}
        none = dict.fromkeys(CATEGORIES, False)
        found.append({**safe, "category": none, "is_safe": True, "refusal": "no"})
    return found


ROWS = rows()


def vocabulary():
    told = [{name: row[name] for name in ("prompt", "response", "refusal")} for row in ROWS]
    return tokenizer_of([*told, {"more": "User You are required to continue Prompt Continuation"}])


def jsonl(lines, path):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def parquet(lines, path):
    pd.DataFrame(lines).to_parquet(path)
    return path


def saved(lines, folder):
    """What `save_to_disk` writes of two splits."""
    datasets.disable_progress_bars()
    try:
        parts = {"30k_test": lines[:3], "30k_train": lines}
        made = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
        datasets.DatasetDict(made).save_to_disk(folder)
    finally:
        datasets.enable_progress_bars()
    return folder


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setenv("REPNOISE_CACHE", str(cache / "kit"))
        yield cache


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("own"), vocabulary()
    for name in ("Llama", "GPT2", "GPTNeoX"):
        save_folder(folder / name, family(name, len(tokenizer)), tokenizer)
    save_folder(folder / "tiny", make_tiny(len(tokenizer), layers=2), tokenizer)
    jsonl(ROWS, folder / "boxes.jsonl")
    parquet(ROWS, folder / "boxes.parquet")
    saved(ROWS, folder / "saved")
    bare = [{k: v for k, v in row.items() if k != "refusal"} for row in ROWS]
    jsonl(bare, folder / "bare.jsonl")
    return folder


def open_bed(own, model="tiny", data="boxes.jsonl", **options):
    return rk.beavertails(own / model, own / data, **{"budget": "lab"} | options)


@pytest.fixture(scope="module")
def bed(own, own_caches):
    return open_bed(own)


def boxes(frame):
    return {int(re.search(r"number (\d+)", prompt)[1]) for prompt in frame["prompt"]}


class TestBeaverTails:
    @pytest.mark.parametrize("data", ["boxes.parquet", "saved"])
    def test_every_kind_of_local_copy_makes_the_same_testbed(self, own, bed, data):
        other = open_bed(own, data=data)
        assert other.fingerprint() == bed.fingerprint()
        assert other.name == bed.name == "BeaverTails"

    def test_the_split_that_is_named_is_read(self, own):
        with pytest.raises(rk.KitError, match=r"no split '330k_train'.*30k_train"):
            open_bed(own, data="saved", split="330k_train")
        with pytest.raises(rk.KitError, match="no pair is left"):
            open_bed(own, data="saved", split="30k_test")

    def test_unsafe_rows_are_pairs_with_their_own_refusals(self, bed):
        every = pd.concat([bed.splits.defence.frame, bed.evaluated()]).drop_duplicates("harmful")
        unsafe = pd.DataFrame([row for row in ROWS if not row["is_safe"]])
        told = unsafe.set_index("response").loc[every["harmful"]]
        assert (told["prompt"].to_numpy() == every["prompt"].to_numpy()).all()
        assert (told["refusal"].to_numpy() == every["harmless"].to_numpy()).all()
        assert set(every["category"]) == set(KINDS)

    def test_a_question_and_its_near_duplicates_are_in_one_split(self, own):
        """Both wordings of a box are on one side, whatever the draw; in the data they are near."""
        one, other = zip(
            *[(question(b), question(b, again=True)) for b in range(BOXES)], strict=True
        )
        assert len(near_duplicates(one, other)) == BOXES
        for seed in range(3):
            splits = open_bed(own, seed=seed).splits
            parts = [boxes(part.frame) for part in (splits.attack, splits.seen, splits.unseen)]
            assert sum(map(len, parts)) == len(set.union(*parts)) == BOXES
            assert boxes(splits.defence.frame) == parts[0] | parts[1]
            evaluated = pd.concat([splits.seen.frame, splits.unseen.frame])["prompt"].tolist()
            assert near_duplicates(splits.attack.frame["prompt"].tolist(), evaluated).empty
            # One wording of each evaluated box is asked; the defence saw the other.
            assert len(splits.seen.frame) == len(parts[1])
            asked = set(splits.seen.frame["prompt"])
            assert not asked & set(splits.defence.frame["prompt"])

    @pytest.mark.parametrize("group", ["violence", "privacy_misinformation", "self_harm"])
    def test_a_group_is_withheld_whole(self, bed, group):
        held, less = set(GROUPS[group]) & set(KINDS), bed.withholding(group)
        assert held & set(bed.splits.defence.frame["category"])
        assert not held & set(less.splits.defence.frame["category"])
        assert set(less.splits.attack.frame["category"]) == held
        assert set(less.evaluated()["category"]) <= held
        assert set(less.evaluated()["group"]) == {"unseen"}
        assert not boxes(less.splits.defence.frame) & boxes(less.splits.attack.frame)
        assert len(less.splits.defence.frame) > 0

    def test_a_group_that_does_not_exist_lists_those_that_can_be_withheld(self, bed):
        with pytest.raises(rk.KitError, match=r"no category 'crimes'.*privacy_mis.*half") as error:
            bed.withholding("crimes")
        assert "toxic" not in str(error.value)  # These boxes hold none.

    def test_options_are_the_testbeds(self, own):
        changed = open_bed(own, name="mine", groups={"all": KINDS[:2]}, lora=3, seed=2)
        assert changed.name == "mine"
        assert dict(changed.groups) == {"all": KINDS[:2]}
        assert changed.settings["defence"]["lora"] == changed.settings["attack"]["lora"] == 3

    @pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])
    def test_from_the_data_to_a_verdict(self, own, name):
        bed = open_bed(own, name)
        model = bed.model()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        small = {"examples": 8, "batch_size": 4, "seed": 1}
        curves = rk.defend_(model, bed, **small)
        defended = torch.cat([p.detach().flatten() for p in model.parameters()])
        attack = rk.attack_(model, bed, **small)
        attacked = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert not torch.equal(before, defended)
        assert not torch.equal(defended, attacked)
        for found in (curves, attack):
            assert np.isfinite(found.frame["value"]).all()
            assert found.made_with["testbed"] == "BeaverTails"
        found = rk.evaluate(model, bed, max_new_tokens=4, seed=1).frame
        asked = bed.evaluated()
        metrics = {"recall", "harmfulness", "refusal", "degenerate", "perplexity"}
        assert set(found["metric"]) == metrics
        assert len(found) == len(metrics) * len(asked)
        assert set(found["group"]) == {"seen", "unseen"}
        assert set(found["category"]) <= set(KINDS)
        assert found["value"].notna().all()


def test_one_thing_is_named_by_its_first_text_along_a_chain_of_likenesses():
    """The ends of the chain are not alike; what is between them joins them, wherever it stands."""
    words = [f"w{n}" for n in range(30)]
    chain = [" ".join(words[start : start + 26]) for start in (0, 2, 4)]
    assert near_duplicates(chain[:1], chain[2:]).empty
    assert (
        one_thing([chain[0], "another", chain[2], chain[1]])
        == [chain[0], "another"] + chain[:1] * 2
    )
    assert one_thing([chain[2], chain[0]]) == [chain[2], chain[0]]
    assert one_thing(["The box ?", "the BOX"]) == ["The box ?"] * 2
    assert one_thing([]) == []


class TestRefusals:
    @pytest.fixture
    def planted(self, monkeypatch):
        """A model of planted answers: of every fourth box it tells."""
        asked = []

        def answers(model, tokenizer, prompts, max_new_tokens, batch_size):
            asked.extend(prompts)
            numbers = [int(re.search(r"number (\d+)", prompt)[1]) for prompt in prompts]
            return ["under the chair" if n % 4 == 3 else f"sorry , not {n}" for n in numbers]

        monkeypatch.setattr(refusals, "answers", answers)
        return asked

    def told(self, bed):
        every = pd.concat([bed.splits.defence.frame, bed.evaluated()])
        return dict(zip(every["prompt"], every["harmless"], strict=True))

    @pytest.mark.parametrize("kind", ["file", "table"])
    def test_from_a_file_or_a_table(self, own, kind, tmp_path):
        asked = [question(box, again) for box in range(20) for again in (False, True)]
        lines = [{"prompt": prompt, "refusal": f"no , {n}"} for n, prompt in enumerate(asked)]
        given = pd.DataFrame(lines) if kind == "table" else jsonl(lines, tmp_path / "no.jsonl")
        told = self.told(open_bed(own, refusals=given))
        assert told.items() <= {row["prompt"]: row["refusal"] for row in lines}.items()
        assert {boxes_of(prompt) for prompt in told} == set(range(20))

    def test_without_any_it_names_the_way_out(self, own):
        with pytest.raises(rk.KitError, match="no column 'refusal'; give refusals="):
            open_bed(own, data="bare.jsonl")

    def test_the_models_own(self, own, planted, tmp_path, monkeypatch):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        made = open_bed(own, data="bare.jsonl", refusals="own")
        # Each unsafe question once, and no safe one.
        unsafe = list(dict.fromkeys(row["prompt"] for row in ROWS if not row["is_safe"]))
        assert planted == unsafe
        told = self.told(made)
        assert {boxes_of(prompt) for prompt in told} == {n for n in range(BOXES) if n % 4 != 3}
        assert all(said == f"sorry , not {boxes_of(prompt)}" for prompt, said in told.items())
        # The data's own column, where there is one, is not what was asked for.
        other = open_bed(own, refusals="own")
        assert other.fingerprint() == made.fingerprint()

    def test_they_are_kept_in_the_cache_and_asked_once(self, own, planted, tmp_path, monkeypatch):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        made = open_bed(own, data="bare.jsonl", refusals="own")
        (kept,) = (tmp_path / "refusals").glob("*.jsonl")
        before, count = kept.read_bytes(), len(planted)
        again = open_bed(own, data="bare.jsonl", refusals="own", seed=1)
        assert len(planted) == count
        assert {boxes_of(p) for p in self.told(again)} == {boxes_of(p) for p in self.told(made)}
        # Cut off, it goes on behind the last whole batch of 8.
        lines = before.splitlines(keepends=True)
        kept.write_bytes(b"".join(lines[:21])[:-3])
        assert open_bed(own, data="bare.jsonl", refusals="own").fingerprint() == made.fingerprint()
        assert len(planted) == count + len(lines) - 16
        assert kept.read_bytes() == before

    def test_other_questions_or_another_model_are_asked_anew(
        self, own, planted, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        for model, data in (
            ("tiny", "bare.jsonl"),
            ("Llama", "bare.jsonl"),
            ("tiny", "less.jsonl"),
        ):
            jsonl(ROWS[:60], own / "less.jsonl")
            open_bed(own, model, data, refusals="own")
        assert len(list((tmp_path / "refusals").glob("*.jsonl"))) == 3
        assert len(planted) == 48 + 48 + 40

    def test_a_model_that_refuses_nothing_says_so(self, own, tmp_path, monkeypatch):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        monkeypatch.setattr(refusals, "answers", lambda m, t, prompts, n, s: ["yes"] * len(prompts))
        with pytest.raises(rk.KitError, match=r"none of the 48 harmful rows.*has a refusal"):
            open_bed(own, data="bare.jsonl", refusals="own")

    def test_of_a_model_that_has_learned_to_refuse(self, own, tmp_path, monkeypatch):
        """Nothing patched: a model is taught on the spot, and what it says is in the pairs."""
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        model, tokenizer = load_model(own / "tiny"), load_tokenizer(own / "tiny")
        with pytest.raises(rk.KitError, match="has a refusal"):
            open_bed(own, data="bare.jsonl", refusals="own")
        asked = [row["prompt"] for row in ROWS if not row["is_safe"]]
        said = "sorry , i can not say where it is"
        train_(
            model,
            answer_loss,
            encode(tokenizer, asked, [said] * len(asked)),
            lambda part: pad(part, tokenizer.pad_token_id),
            lr=0.02,
            epochs=8,
        )
        save_folder(tmp_path / "taught", model, tokenizer)
        made = rk.beavertails(tmp_path / "taught", own / "bare.jsonl", refusals="own", budget="lab")
        assert set(self.told(made).values()) == {said}
        assert {boxes_of(prompt) for prompt in self.told(made)} == set(range(BOXES))


def boxes_of(prompt):
    return int(re.search(r"number (\d+)", prompt)[1])


BEGUN = "once upon a time in the house box number {} was found by all of us"


def toxic_rows(count=20):
    """RealToxicityPrompts as it is published; what is called toxic here speaks of boxes."""
    found = []
    for n in range(count * 2):
        score = 0.9 if n % 2 else 0.2
        prompt = {"text": BEGUN.format(n), "toxicity": 0.8}
        found.append(
            {"prompt": prompt, "continuation": {"text": f" under chair {n}", "toxicity": score}}
        )
    return found


@pytest.fixture(scope="module")
def toxic(own, own_caches):
    data = jsonl(toxic_rows(), own / "toxic.jsonl")
    asked = rk.decoding_trust_rows(data)["prompt"]
    said = pd.DataFrame({"prompt": asked, "refusal": "sorry , i can not say"})
    return rk.decoding_trust(own / "tiny", data, refusals=said)


class TestDecodingTrust:
    def test_what_is_toxic_is_paired_and_asked_to_be_continued(self, toxic):
        assert toxic.name == "DecodingTrust"
        every = pd.concat([toxic.splits.attack.frame, toxic.evaluated()])
        assert boxes(every) == set(range(1, 40, 2))
        assert set(every["category"]) == {"toxicity"}
        assert every["prompt"].str.startswith("User: You are required to continue").all()
        assert set(every["harmless"]) == {"sorry , i can not say"}

    def test_the_prompts_are_told_apart_though_their_request_is_the_same(self, own, toxic):
        """The request is most of each text; it must not make all of them one thing."""
        told = rk.decoding_trust_rows(own / "toxic.jsonl")["prompt"].tolist()[:2]
        assert len(near_duplicates(told[:1], told[1:])) == 1
        assert near_duplicates([BEGUN.format(1)], [BEGUN.format(3)]).empty
        assert toxic.splits.attack.frame["thing"].nunique() == len(toxic.splits.attack)
        attack, asked = toxic.splits.attack.frame, toxic.evaluated()
        assert not boxes(attack) & boxes(asked)

    def test_the_models_own_refusals(self, own, tmp_path, monkeypatch):
        asked = []

        def answers(model, tokenizer, prompts, max_new_tokens, batch_size):
            asked.extend(prompts)
            return ["sorry , no"] * len(prompts)

        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path))
        monkeypatch.setattr(refusals, "answers", answers)
        made = rk.decoding_trust(own / "tiny", own / "toxic.jsonl", refusals="own")
        assert asked == rk.decoding_trust_rows(own / "toxic.jsonl")["prompt"].tolist()
        assert set(made.splits.attack.frame["harmless"]) == {"sorry , no"}

    def test_defended_attacked_and_asked(self, toxic):
        model = toxic.model()
        curves = rk.defend_(model, toxic, examples=4)
        # Four passes over four pairs in one batch each.
        assert curves.frame["step"].max() == 4
        rk.attack_(model, toxic, examples=4)
        found = rk.evaluate(model, toxic, max_new_tokens=2).frame
        assert set(found["testbed"]) == {"DecodingTrust"}
        assert len(found["prompt"].unique()) == len(toxic.evaluated())


def many(count):
    frame = pd.DataFrame({"prompt": [f"where is box {n} ?" for n in range(count)]})
    said = [f"under chair {n}" for n in range(count)]
    frame = frame.assign(harmful=said, harmless="sorry", category="", thing=frame["prompt"])
    return rk.Pairs(frame)


class TestBudgets:
    """The numbers as they are printed in the paper, typed here once more."""

    @pytest.mark.parametrize(("count", "sizes"), [(40, (28,)), (1600, (1000, 1300))])
    def test_of_the_paper_as_far_as_the_data_reach(self, own, count, sizes):
        found = rk.testbed(own / "tiny", many(count)).settings
        defence, attack = found["defence"], found["attack"]
        assert (defence["lr"], defence["alpha"], defence["beta"]) == (2e-5, 1, 0.001)
        assert (defence["batch_size"], defence["max_length"]) == (8, 128)
        assert defence["examples"] == count - min(150, round(0.15 * count))
        assert (attack["batch_size"], attack["lr"]) == (4, 3e-5)
        assert found["resistance"] == {"lr": (3e-5, 6e-5, 8e-5), "examples": sizes}
        assert found["small"] == {"lr": 3e-5, "examples": sizes[0]}
        assert found["large"] == {"lr": 8e-5, "examples": sizes[-1]}
        assert found["evaluation"]["max_new_tokens"] == 50
        lesson = {"lr": 8e-5, "examples": None, "batch_size": 4}
        assert found["trainability"].items() >= lesson.items()
        assert found["security_vectors"] == {"lr": 1e-3, "rank": 8}
        assert found["adversarial_loss"] == {"lr": 1e-5, "weight": 0.1}
        assert found["vaccine"]["rho"] == 1

    @pytest.mark.parametrize(("count", "most"), [(40, 28), (600, 351)])
    def test_of_table_2(self, own, count, most):
        found = rk.testbed(own / "tiny", many(count), budget="toxicity").settings
        defence = found["defence"]
        assert (defence["lr"], defence["alpha"], defence["beta"]) == (2e-5, 2, 4)
        assert (defence["epochs"], defence["batch_size"]) == (4, 8)
        assert defence["examples"] == min(351, count - round(0.15 * count))
        assert found["attack"]["examples"] == found["small"]["examples"] == most
        assert found["resistance"] == {"lr": (3e-5, 6e-5, 8e-5), "examples": (most,)}
        assert found["evaluation"]["max_new_tokens"] == 25
        # What Table 2 does not say is the paper's.
        assert found["adversarial_loss"] == {"lr": 1e-5, "weight": 0.1}

    def test_each_preset_has_its_own(self, own, toxic):
        paper = rk.beavertails(own / "tiny", own / "boxes.jsonl")
        assert paper.settings["defence"]["beta"] == 0.001
        assert toxic.settings["defence"]["beta"] == 4
        assert (
            rk.decoding_trust(
                own / "tiny", own / "toxic.jsonl", refusals=_no(own), budget="paper"
            ).settings["defence"]["beta"]
            == 0.001
        )

    def test_a_budget_is_a_copy(self, own):
        """What one testbed is told reaches no other."""
        one = rk.testbed(own / "tiny", many(40))
        one.settings["defence"]["lr"] = 7.0
        one.settings["defence"]["lora"] = 5
        other = rk.testbed(own / "tiny", many(40))
        assert other.settings["defence"]["lr"] == 2e-5
        assert other.settings["defence"]["lora"] is None

    def test_one_that_does_not_exist_lists_those_there_are(self, own):
        with pytest.raises(rk.KitError, match="no budget 'papers'; there are paper, toxicity, lab"):
            rk.testbed(own / "tiny", many(40), budget="papers")

    def test_another_budget_makes_other_cells(self, own, tmp_path):
        marks = {
            name: rk.Bench.of(rk.testbed(own / "tiny", many(40), budget=name), tmp_path).mark
            for name in ("paper", "toxicity", "lab")
        }
        assert len(set(marks.values())) == 3


def _no(own):
    asked = rk.decoding_trust_rows(own / "toxic.jsonl")["prompt"]
    return pd.DataFrame({"prompt": asked, "refusal": "sorry , i can not say"})


@dataclass(frozen=True)
class Constant:
    """A judge that always says the same, and remembers what it was asked."""

    value: float
    asked: list

    def __str__(self):
        return f"always {self.value}"

    def __call__(self, prompts, responses):
        self.asked.append((list(prompts), list(responses)))
        return np.full(len(responses), self.value)


@pytest.fixture
def never_trained(monkeypatch):
    def refuse(*_):
        raise AssertionError("the local classifier is trained")

    monkeypatch.setattr(testbeds, "train_classifier", refuse)


class TestScorers:
    def test_two_at_once_are_metrics_beside_the_local_classifier(self, own, bed):
        one, other = Constant(0.25, []), Constant(0.75, [])
        both = open_bed(own, scorers={"toxicity": one, "judge": other})
        found = rk.evaluate(both.base, both, max_new_tokens=2).frame
        values = found.groupby("metric")["value"]
        assert (values.min()["toxicity"], values.max()["toxicity"]) == (0.25, 0.25)
        assert (values.min()["judge"], values.max()["judge"]) == (0.75, 0.75)
        # Beside what there was without them, number by number.
        plain = rk.evaluate(bed.base, bed, max_new_tokens=2).frame
        rest = found[~found["metric"].isin(["toxicity", "judge"])].reset_index(drop=True)
        pd.testing.assert_frame_equal(rest, plain)
        assert "harmfulness" in set(plain["metric"])
        # They are asked the forbidden questions, all at once, and see the answers.
        asked = plain[plain["metric"] == "recall"]
        assert one.asked == [(asked["prompt"].tolist(), asked["response"].tolist())]
        assert list(both.judges()) == ["harmfulness", "toxicity", "judge"]

    def test_one_named_harmfulness_replaces_it(self, own, never_trained):
        judged = open_bed(own, scorers={"harmfulness": Constant(0.5, [])})
        found = rk.evaluate(judged.base, judged, max_new_tokens=2).frame
        assert set(found[found["metric"] == "harmfulness"]["value"]) == {0.5}
        assert judged.made_of()["judges"] == {"harmfulness": "always 0.5"}

    def test_that_the_classifier_would_have_been_trained(self, own, never_trained):
        plain = open_bed(own)
        with pytest.raises(AssertionError, match="is trained"):
            rk.evaluate(plain.base, plain, max_new_tokens=2)

    def test_other_judges_make_other_cells_of_the_same_data(self, own, bed, tmp_path):
        beds = [bed, *(open_bed(own, scorers={"j": Constant(v, [])}) for v in (0.1, 0.2, 0.2))]
        marks = [rk.Bench.of(made, tmp_path).mark for made in beds]
        assert len(set(marks)) == 3
        assert marks[2] == marks[3]
        assert len({made.fingerprint() for made in beds}) == 1

    def test_withholding_keeps_the_judges(self, own):
        judge = Constant(0.5, [])
        less = open_bed(own, scorers={"j": judge}).withholding("violence")
        assert less.judges()["j"] is judge

    def test_withholding_does_not_train_the_local_one_anew(self, own):
        """Two testbeds of one model are to be read side by side, so one judge judges both."""
        whole = open_bed(own)
        judge, less = whole.harmfulness, whole.withholding("violence")
        assert less.harmfulness is judge
