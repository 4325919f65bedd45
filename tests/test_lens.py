"""The logit lens against slow loops and the models' own logits, on tiny models of all families."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny
from families import FAMILIES, NAMES, family
from small import hooks_of, ragged_pairs, save_folder
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM

import repnoise_kit as rk
from repnoise_kit import lens
from repnoise_kit.reading import texts

pytestmark = pytest.mark.usefixtures("one_thread")

# Tokens of the question and of the answer.
LENGTHS = ((3, 6), (5, 1), (1, 2), (4, 4))


def ragged():
    """A batch padded on the right, whose last answer has a token that does not count."""
    draw = torch.Generator().manual_seed(0)
    width = max(map(sum, LENGTHS))
    ids = torch.randint(3, 50, (len(LENGTHS), width), generator=draw)
    mask, labels = torch.zeros_like(ids), ids.clone()
    for row, (asked, said) in enumerate(LENGTHS):
        mask[row, : asked + said] = 1
        labels[row, :asked] = -100
    labels[mask == 0] = -100
    labels[3, 6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(batch, row):
    """One sequence, without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: part[row : row + 1, :length] for name, part in batch.items()}


def slow_rows(model, name, ids, labels):
    """Each layer's mean log-probability of one sequence's labels, token by token."""
    norm, head = model.get_submodule(NAMES[name][1]), model.get_output_embeddings()
    sizes, found = FAMILIES[name], []
    with torch.no_grad():
        output = model(ids[None], output_hidden_states=True)
        # The last of the hidden states is past the norm already: there the model's own word counts.
        for hidden in output.hidden_states[:-1]:
            logits = head(norm(hidden[0]))
            logits = logits * sizes.get("logit_scale", 1.0) / sizes.get("logits_scaling", 1.0)
            if cap := sizes.get("final_logit_softcapping"):
                logits = cap * torch.tanh(logits / cap)
            found.append(logits)
        found.append(output.logits[0])
    rows = []
    for logits in found:
        spread = logits.double().log_softmax(-1)
        told = [t for t in range(1, len(ids)) if labels[t] != -100]
        rows.append(np.mean([spread[t - 1, labels[t]].item() for t in told]))
    return rows


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_the_last_row_is_the_models_own(self, name):
        model, batch = family(name), ragged()
        found = rk.layer_log_probs(model, batch)
        with torch.no_grad():
            output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        spread, labels = output.logits.log_softmax(-1)[:, :-1], batch["labels"][:, 1:]
        inside = labels != -100
        each = spread.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * inside
        assert_close(found[-1], each.sum(1) / inside.sum(1))

    def test_each_row_is_the_slow_loop_over_each_sequence_alone(self, name):
        model, batch = family(name), ragged()
        found = rk.layer_log_probs(model, batch)
        assert found.shape == (4, len(LENGTHS))
        for row in range(len(LENGTHS)):
            one = alone(batch, row)
            slow = slow_rows(model, name, one["input_ids"][0], one["labels"][0])
            assert found[:, row].tolist() == pytest.approx(slow, abs=1e-4)
            # Layers that all said the same would hide a layer too many.
            assert min(abs(np.diff(slow))) > 1e-3

    def test_order_and_padding_do_not_matter(self, name):
        model, batch = family(name), ragged()
        found = rk.layer_log_probs(model, batch)
        other = rk.layer_log_probs(model, {n: part.flip(0) for n, part in batch.items()})
        assert_close(other.flip(1), found)
        for row in range(len(LENGTHS)):
            assert_close(rk.layer_log_probs(model, alone(batch, row)), found[:, row : row + 1])


class TestLayerLogProbs:
    def test_row_0_sees_the_embedding_and_nothing_else(self, tiny_model):
        batch = ragged()
        before = rk.layer_log_probs(tiny_model, batch)
        for layer in tiny_model.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        after = rk.layer_log_probs(tiny_model, batch)
        assert_close(after[0], before[0])
        assert_close(after, after[:1].expand_as(after))
        assert (before[1:] - before[:1]).abs().min() > 1e-5

    def test_few_logits_at_a_time_give_the_same(self, tiny_model, monkeypatch):
        batch = ragged()
        whole = rk.layer_log_probs(tiny_model, batch)
        sizes = []
        tiny_model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
        own = len(LENGTHS) * 50
        for at_once in (1, 50, 149, 150):
            monkeypatch.setattr(lens, "AT_ONCE", at_once)
            sizes.clear()
            assert_close(rk.layer_log_probs(tiny_model, batch), whole)
            # The model's own pass, and the check of the lens, read one position of each sequence.
            assert sizes[:2] == [own, own]
            assert max(sizes[2:]) <= max(at_once, 50)

    def test_a_model_in_bfloat16_is_read_in_float32(self):
        model, batch = family("Llama"), ragged()
        exact = rk.layer_log_probs(model, batch)
        found = rk.layer_log_probs(model.to(torch.bfloat16), batch)
        assert found.dtype == torch.float32
        assert_close(found, exact, rtol=0.05, atol=0.1)
        slow = slow_rows(model, "Llama", *(alone(batch, 0)[n][0] for n in ("input_ids", "labels")))
        assert found[-1, 0].item() == pytest.approx(slow[-1], abs=0.03)

    @pytest.mark.parametrize("first", [True, False])
    def test_a_sequence_without_labels_is_refused(self, tiny_model, first):
        batch, before = ragged(), hooks_of(tiny_model)
        batch["labels"][2] = -100
        if first:  # What no position predicts.
            batch["labels"][2, 0] = 7
        with pytest.raises(rk.KitError, match="no labelled token"):
            rk.layer_log_probs(tiny_model, batch)
        assert hooks_of(tiny_model) == before

    def test_only_its_own_hooks_go_also_by_an_exception(self, tiny_model):
        seen = []
        tiny_model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
        rk.layer_log_probs(tiny_model, ragged())
        assert hooks_of(tiny_model) == 1
        tiny_model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rk.layer_log_probs(tiny_model, ragged())
        assert hooks_of(tiny_model) == 2
        assert len(seen) == 2

    def test_a_wrapped_model_is_read_as_the_model(self, tiny_model):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = tiny_model

            def forward(self, *args, **kwargs):
                return self.module(*args, **kwargs)

        batch = ragged()
        assert_close(rk.layer_log_probs(Wrapped(), batch), rk.layer_log_probs(tiny_model, batch))

    @pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
    def test_a_lora_is_read_as_its_merged_model(self, targets):
        from peft import LoraConfig, get_peft_model

        batch, plain = ragged(), rk.layer_log_probs(make_tiny(), ragged())
        with torch.random.fork_rng():
            torch.manual_seed(0)
            given = LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
            model = get_peft_model(make_tiny(), given).eval()
        found = rk.layer_log_probs(model, batch)
        assert_close(found, rk.layer_log_probs(model.merge_and_unload(), batch))
        assert (found - plain).abs().max() > 0.01


class Otherwise(LlamaForCausalLM):
    """Makes of its logits what no part of it and no word of its configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


def otherwise(change):
    plain = make_tiny()
    model = Otherwise(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    model.change = change
    return model


class TestTheLensFits:
    """What is read through norm and head at the last layer must be what the model itself says."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda logits: 2 * logits,
            lambda logits: 1.05 * logits,
            lambda logits: 5 * torch.tanh(logits / 5) - 0.01,
            lambda logits: logits + 0.1 * torch.arange(50),
            lambda logits: logits.roll(1, -1),
        ],
        ids=["twice", "a little more", "squashed", "with a bias", "of other words"],
    )
    def test_logits_made_otherwise_are_refused(self, change):
        model, batch = otherwise(change), ragged()
        with pytest.raises(rk.KitError, match=r"Otherwise.*logits otherwise.*name_parts_"):
            rk.layer_log_probs(model, batch)
        with pytest.raises(rk.KitError, match=r"Otherwise.*logits otherwise.*name_parts_"):
            rk.repnoise_loss(model, batch, batch)
        assert hooks_of(model) == 0

    def test_the_same_class_with_logits_of_its_head_is_read(self):
        found = rk.layer_log_probs(otherwise(lambda logits: logits), ragged())
        assert_close(found, rk.layer_log_probs(make_tiny(), ragged()))

    def test_what_the_configuration_says_is_read(self):
        model, batch = otherwise(lambda logits: 2 * logits), ragged()
        model.config.logit_scale = 2.0
        found, own = rk.layer_log_probs(model, batch), model(batch["input_ids"][:1, :9]).logits
        spread = own.log_softmax(-1)[0, 2:8]
        wanted = batch["input_ids"][0, 3:9, None]
        assert found[-1, 0].item() == pytest.approx(spread.gather(-1, wanted).mean().item())

    def test_a_spoiled_model_is_not_read(self):
        model = make_tiny()
        model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(rk.KitError, match="logits otherwise"):
            rk.layer_log_probs(model, ragged())

    # One sequence of a batch is enough.
    def test_it_looks_at_every_sequence(self):
        scales = torch.tensor([1.0, 1.0, 2.0, 1.0])[:, None, None]
        with pytest.raises(rk.KitError, match="logits otherwise"):
            rk.layer_log_probs(otherwise(lambda logits: scales * logits), ragged())

    def test_a_wrong_norm_is_told(self, tiny_model):
        rk.name_parts_(tiny_model, norm="model.layers.0.input_layernorm")
        with pytest.raises(rk.KitError, match="logits otherwise"):
            rk.layer_log_probs(tiny_model, ragged())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_no_precision_is_refused(self, name, dtype):
        assert rk.layer_log_probs(family(name).to(dtype), ragged()).isfinite().all()

    def test_a_head_that_says_nothing_is_read(self, tiny_model):
        tiny_model.lm_head.weight.data.zero_()
        found = rk.layer_log_probs(tiny_model, ragged())
        assert found.numpy() == pytest.approx(-np.log(50), abs=1e-5)


@pytest.fixture(scope="module")
def pairs():
    return ragged_pairs(9)


@pytest.fixture(scope="module")
def model(pairs):
    return family("Llama", vocab=len(pairs[1]))


def log_prob_of(model, tokenizer, prompt, answer):
    """Each layer's, of one answer to one question, put together by hand."""
    asked = tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
    said = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(asked + said)
    return slow_rows(model, "Llama", ids, torch.tensor([-100] * len(asked) + said))


class TestLogitMass:
    def test_values_are_those_of_each_text_by_hand(self, pairs, model):
        given, tokenizer = pairs
        frame = rk.logit_mass(model, given, tokenizer=tokenizer, seed=3).frame
        assert len(frame) == 3 * 9 * 4
        assert set(frame["metric"]) == {"log_prob"}
        assert set(frame["seed"]) == {3}
        wide = frame.pivot(index=["group", "prompt"], columns="layer", values="value")
        assert list(wide) == [0, 1, 2, 3]
        for row in given.frame.itertuples():
            for side in ("harmful", "harmless"):
                slow = log_prob_of(model, tokenizer, row.prompt, getattr(row, side))
                assert wide.loc[side, row.prompt].tolist() == pytest.approx(slow, abs=1e-4)

    def test_the_answer_of_another_is_one_of_another_thing(self):
        given, tokenizer = ragged_pairs(8, of_each=2)
        model, frame = family("Llama", vocab=len(tokenizer)), given.frame
        found = rk.logit_mass(model, given, sides=["harmful of another"], tokenizer=tokenizer).frame
        last = found[found["layer"] == 3].set_index("prompt")["value"]
        for row in frame.itertuples():
            mass = [log_prob_of(model, tokenizer, row.prompt, a)[3] for a in frame["harmful"]]
            same = np.isclose(mass, last[row.prompt], atol=1e-5)
            assert same.sum() == 1
            assert frame["thing"][same.argmax()] != row.thing

    def test_the_seed_draws_the_other_and_nothing_else(self, pairs, model):
        given, tokenizer = pairs
        one, other = (
            rk.logit_mass(model, given, tokenizer=tokenizer, seed=s).frame.set_index("group")
            for s in (0, 1)
        )
        same = one["value"] == other["value"]
        assert same[["harmful", "harmless"]].all()
        assert not same["harmful of another"].all()

    @pytest.mark.parametrize("batch_size", [1, 4, 27])
    def test_the_batch_size_does_not_matter(self, pairs, model, batch_size):
        given, tokenizer = pairs
        one, other = (
            rk.logit_mass(model, given, tokenizer=tokenizer, batch_size=size).frame
            for size in (batch_size, 7)
        )
        assert one["value"].to_numpy() == pytest.approx(other["value"].to_numpy(), abs=1e-5)
        assert one.drop(columns="value").equals(other.drop(columns="value"))

    def test_it_leaves_the_model_as_it_was(self, pairs, model):
        given, tokenizer = pairs
        with_dropout = copy.deepcopy(model).train()
        for layer in with_dropout.model.layers:
            layer.self_attn.attention_dropout = 0.5
        ids = torch.arange(3, 12)[None]
        assert not torch.equal(with_dropout(ids).logits, with_dropout(ids).logits)
        before = copy.deepcopy(with_dropout.state_dict())
        hooks, config = hooks_of(with_dropout), with_dropout.config.to_dict()
        found = rk.logit_mass(with_dropout, given, tokenizer=tokenizer).frame
        assert all(module.training for module in with_dropout.modules())
        assert hooks_of(with_dropout) == hooks
        assert with_dropout.config.to_dict() == config
        assert all(torch.equal(v, before[k]) for k, v in with_dropout.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in with_dropout.parameters())
        # Dropout was off while it read.
        plain = rk.logit_mass(model, given, tokenizer=tokenizer).frame
        assert found["value"].equals(plain["value"])

    def test_parts_in_evaluation_mode_stay_so(self, pairs):
        given, tokenizer = pairs
        model = make_tiny(len(tokenizer)).train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        rk.logit_mass(model, given, tokenizer=tokenizer)
        assert [module.training for module in model.modules()] == modes

    # Also where the whole is in evaluation mode and a part is not, and by an exception.
    def test_parts_in_training_mode_stay_so(self, pairs):
        given, tokenizer = pairs
        model, seen = make_tiny(len(tokenizer)), []
        model.model.layers[1].mlp.train()
        modes = [module.training for module in model.modules()]
        assert len(set(modes)) == 2

        def look(module, _args, _output):
            seen.append(module.training)

        hook = model.model.layers[1].mlp.register_forward_hook(look)
        rk.logit_mass(model, given, tokenizer=tokenizer)
        assert seen
        assert not any(seen)
        assert [module.training for module in model.modules()] == modes
        hook.remove()
        model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rk.logit_mass(model, given, tokenizer=tokenizer)
        assert [module.training for module in model.modules()] == modes

    def test_a_head_of_zeros_makes_every_layer_guess(self, pairs, model):
        given, tokenizer = pairs
        blind = copy.deepcopy(model)
        blind.lm_head.weight.data.zero_()
        found = rk.logit_mass(blind, given, tokenizer=tokenizer).frame["value"]
        assert found.to_numpy() == pytest.approx(-np.log(len(tokenizer)), abs=1e-5)

    def test_swapping_two_words_in_the_head_moves_only_answers_with_them(self, pairs, model):
        given, tokenizer = pairs
        near, under = (tokenizer.convert_tokens_to_ids(word) for word in ("near", "under"))
        assert given.frame["harmful"].str.contains("near").all()
        assert not given.frame["harmless"].str.contains("near|under").any()
        swapped = copy.deepcopy(model)
        swapped.lm_head.weight.data[[near, under]] = model.lm_head.weight.data[[under, near]]
        both = (rk.logit_mass(m, given, tokenizer=tokenizer).frame for m in (model, swapped))
        before, after = (frame.set_index("group")["value"] for frame in both)
        moved = (before - after).abs()
        assert moved["harmless"].max() < 1e-5
        assert moved["harmful"].min() > 1e-5
        assert moved["harmful of another"].min() > 1e-5
        # The layers themselves are the same.
        stream = [rk.answer_activations(m, given, tokenizer=tokenizer)[0] for m in (model, swapped)]
        assert torch.equal(*stream)

    def test_the_tokenizer_that_lies_with_the_model_serves(self, pairs, model, tmp_path):
        from repnoise_kit.model import load_model

        given, tokenizer = pairs
        loaded = load_model(save_folder(tmp_path / "here", model, tokenizer))
        found, same = rk.logit_mass(loaded, given), rk.logit_mass(model, given, tokenizer=tokenizer)
        assert found.frame["value"].to_numpy() == pytest.approx(same.frame["value"].to_numpy())

    def test_a_model_from_nowhere_asks_for_its_tokenizer(self, pairs, tiny_model):
        with pytest.raises(rk.KitError, match="tokenizer="):
            rk.logit_mass(tiny_model, pairs[0])

    def test_a_tokenizer_without_a_padding_token_serves(self, pairs, model):
        given, bare = ragged_pairs(9)
        bare.pad_token = None
        whole = rk.logit_mass(model, given, tokenizer=pairs[1]).frame["value"]
        found = rk.logit_mass(model, given, tokenizer=bare).frame["value"]
        assert found.to_numpy() == pytest.approx(whole.to_numpy(), abs=1e-5)

    def test_a_tokenizer_without_an_eos_is_refused(self, model):
        given, endless = ragged_pairs(9)
        endless.eos_token = None
        with pytest.raises(rk.KitError, match="EOS"):
            rk.logit_mass(model, given, tokenizer=endless)

    def test_a_table_of_texts_is_read_as_it_is(self, pairs, model):
        given, tokenizer = pairs
        asked = rk.logit_mass(model, given, tokenizer=tokenizer).frame
        table = texts(given).set_index(pd.Index(range(50, 77)))
        assert rk.logit_mass(model, table, tokenizer=tokenizer).frame.equals(asked)
        turned = rk.logit_mass(model, table[::-1], tokenizer=tokenizer).frame
        keys = ["group", "layer", "prompt"]
        one, other = (frame.set_index(keys)["value"].sort_index() for frame in (asked, turned))
        assert one.to_numpy() == pytest.approx(other.to_numpy(), abs=1e-5)
        with pytest.raises(rk.KitError, match="label"):
            rk.logit_mass(model, table.drop(columns="label"), tokenizer=tokenizer)

    def test_one_thing_alone_has_no_other(self, model):
        given, tokenizer = ragged_pairs(4, of_each=4)
        with pytest.raises(rk.KitError, match="one thing"):
            rk.logit_mass(model, given, tokenizer=tokenizer)
        two = rk.logit_mass(model, given, sides=["harmful", "harmless"], tokenizer=tokenizer)
        assert len(two.frame) == 2 * 4 * 4

    @pytest.mark.parametrize("sides", [["harmfull"], [], "harmful"])
    def test_sides_that_do_not_exist_are_refused(self, pairs, model, sides):
        with pytest.raises(rk.KitError, match="side"):
            rk.logit_mass(model, pairs[0], sides=sides, tokenizer=pairs[1])
