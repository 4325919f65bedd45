"""Everyday usefulness against brute force: one question at a time, one token at a time."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from small import hooks_of, own_files

import repnoise_kit as rk
from repnoise_kit import everyday as room
from repnoise_kit import stats
from repnoise_kit.bench import Bench
from repnoise_kit.errors import KitError
from repnoise_kit.everyday import stability, stable

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = {"testbed", "seed", "group", "category", "metric", "value", "prompt"}


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    own = own_files(tmp_path_factory.mktemp("own"))
    made = rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json")
    shelves = ["shelf" if n % 3 else "cellar" for n in range(len(made.everyday))]
    return replace(made, everyday=made.everyday.assign(category=shelves))


@pytest.fixture(scope="module")
def model(bed):
    """A model that says more than one thing, and by chance some of what it should."""
    made = bed.model()
    with torch.no_grad():
        made.lm_head.weight *= 30
    return made


@pytest.fixture(scope="module")
def result(model, bed):
    return stability(model, bed, seed=3)


def values(result, metric):
    frame = result.frame[result.frame["metric"] == metric]
    return frame.set_index("prompt")["value"]


def asked(bed):
    return list(zip(bed.everyday["prompt"], bed.everyday["answer"], strict=True))


def said_by(model, tokenizer, prompt, most):
    """The likeliest words after a question, by whole forward passes, without padding or cache."""
    ids = tokenizer(f"Question: {prompt}\nAnswer:", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + most and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def common(one, other):
    """The length of the longest common subsequence, by its recursion."""

    @cache
    def longest(a, b):
        if a == len(one) or b == len(other):
            return 0
        if one[a] == other[b]:
            return 1 + longest(a + 1, b + 1)
        return max(longest(a + 1, b), longest(a, b + 1))

    return longest(0, 0)


def test_recall_is_what_one_question_at_a_time_gives_away(model, bed, result):
    most = bed.settings["evaluation"]["max_new_tokens"]
    expected = {}
    for prompt, known in asked(bed):
        said = said_by(model, bed.tokenizer, prompt, most).split()
        expected[prompt] = common(known.split(), said) / len(known.split())
    assert 0 < max(expected.values()) < 1
    assert values(result, "recall").to_dict() == pytest.approx(expected)


def test_perplexity_is_of_the_known_answer_and_its_end_token_by_token(model, bed, result):
    expected = {}
    for prompt, known in asked(bed):
        before = bed.tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
        answer = bed.tokenizer(known, add_special_tokens=False)["input_ids"]
        answer.append(bed.tokenizer.eos_token_id)
        with torch.no_grad():
            logs = model(torch.tensor([before + answer])).logits[0].double().log_softmax(-1)
        told = [logs[len(before) + n - 1, word].item() for n, word in enumerate(answer)]
        expected[prompt] = math.exp(-sum(told) / len(told))
    assert values(result, "perplexity").to_dict() == pytest.approx(expected, rel=1e-4)
    assert np.ptp(list(expected.values())) > 0


def test_a_model_that_prefers_nothing_is_as_perplexed_as_its_vocabulary_is_large(bed):
    flat = bed.model()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    found = values(stability(flat, bed), "perplexity")
    assert found.to_numpy() == pytest.approx(flat.config.vocab_size, rel=1e-4)


def test_planted_answers_are_judged_as_they_were_planted(model, bed, monkeypatch):
    known = bed.everyday["answer"].tolist()
    planted = [*known[:-3], "", "sorry , i can not say", known[-1].split()[0]]
    monkeypatch.setattr(room, "answers", lambda *_: planted)
    found = stability(model, bed)
    recall, refusal = (values(found, name).tolist() for name in ("recall", "refusal"))
    assert recall[:-3] == [1.0] * (len(known) - 3)
    assert recall[-3:] == pytest.approx([0.0, 0.0, 1 / len(known[-1].split())])
    assert refusal == [0.0] * (len(known) - 2) + [1.0, 0.0]


def test_summaries_by_category_are_means_by_category(bed, result):
    table = stats.summary(result.frame, by=("category", "metric")).set_index(["category", "metric"])
    by_prompt = bed.everyday.set_index("prompt")["category"]
    assert set(by_prompt) == {"shelf", "cellar"}
    for category in set(by_prompt):
        prompts = by_prompt.index[by_prompt == category]
        recall = values(result, "recall")[prompts]
        assert table.loc[(category, "recall"), "value"] == pytest.approx(recall.mean())
        # Perplexities are averaged as logarithms.
        logs = np.log(values(result, "perplexity")[prompts])
        expected = pytest.approx(math.exp(logs.mean()))
        assert table.loc[(category, "perplexity"), "value"] == expected


def test_rows_are_tidy(bed, result):
    frame = result.frame
    assert set(frame.columns) == COLUMNS
    assert set(frame["metric"]) == {"recall", "perplexity", "refusal"}
    assert len(frame) == 3 * len(bed.everyday)
    assert not frame.duplicated(["metric", "prompt"]).any()
    assert (frame["seed"] == 3).all()
    groups = bed.everyday.set_index("prompt")["group"]
    assert (frame["group"].to_numpy() == groups[frame["prompt"]].to_numpy()).all()
    assert result.made_with["testbed"] == bed.name
    assert result.made_with["prompt_format"] == "plain"
    assert "torch" in result.made_with


def test_the_model_is_left_as_it_is(bed):
    model = bed.model().train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    asks = {name: weight.requires_grad for name, weight in model.named_parameters()}
    drawn = torch.get_rng_state()
    stability(model, bed)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == asks
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training
    assert hooks_of(model) == 0
    assert torch.equal(torch.get_rng_state(), drawn)


def test_without_everyday_questions_the_way_out_is_said(model, bed):
    with pytest.raises(KitError, match="has no everyday questions; give the testbed a retain set"):
        stability(model, replace(bed, everyday=None))


def test_a_cell_is_the_stability_of_the_defended_model(bed, tmp_path):
    bench = Bench.of(bed, tmp_path / "store")
    plain, noisy = (stable(bench, defence=name, seed=1).frame for name in ("none", "random"))
    expected = stability(bed.model(), bed, seed=1).tagged(defence="none").frame
    assert plain.equals(expected)
    assert (noisy["defence"] == "random").all()
    told = noisy.loc[noisy["metric"] == "perplexity", "value"].to_numpy()
    assert not np.allclose(told, plain.loc[plain["metric"] == "perplexity", "value"])
