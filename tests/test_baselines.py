"""Baselines, controls, security vectors, attacks: slow loops, identities and planted truths."""

import copy
import dataclasses
import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from conftest import make_batches, make_tiny
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from small import everyday_rows, made_up_pairs, save_folder
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = Path(__file__).parents[1] / "data" / "results"
ON_PAIRS = ["safety_training", "gradient_ascent", "adversarial_loss", "vaccine"]
ABLATIONS = ["layerwise_ascent", "noise_only", "repnoise", "repnoise_tokenwise"]
NAMES = [
    *("none", "random", "security_vectors", *ON_PAIRS, *ABLATIONS),
    *("weight_noise", "weight_noise_matched"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's model and files: forty boxes, each asked about in two wordings."""
    folder = tmp_path_factory.mktemp("baselines")
    save_folder(folder / "tiny")
    pairs = []
    for row in made_up_pairs():
        box = row["prompt"].removeprefix("where is the ").removesuffix(" ?")
        if len(pairs) % 4 == 2:  # answers of two lengths, so that there is padding
            row["harmful"] = row["harmful"].removesuffix(" , near the door")
        pairs += [row | {"thing": box}, row | {"thing": box, "prompt": f"the {box} is where ?"}]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "retain.json").write_text(json.dumps(everyday_rows()))
    return folder


SMALLER = {
    "defence": {"lr": 0.01, "alpha": 1.0, "beta": 1.0, "examples": 6, "batch_size": 2},
    "attack": {"lr": 0.01, "examples": 8, "batch_size": 4},
    "evaluation": {"max_new_tokens": 2, "batch_size": 64},
    "security_vectors": {"lr": 0.05, "rank": 4},
    "adversarial_loss": {"weight": 0.1},
}


@pytest.fixture(scope="module")
def bed(folder):
    import repnoise_kit as rk

    made = rk.testbed(folder / "tiny", folder / "pairs.json", retain=folder / "retain.json")
    return with_settings(made, **SMALLER)


def with_settings(bed, **changes):
    return dataclasses.replace(bed, settings={**bed.settings, **changes})


def gpt2():
    """A family whose attention returns a tuple, whose head is its embedding, with dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**sizes, **special)).eval()


def opt():
    """A family whose second projection, one row a token, stands for an MLP."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)).eval()


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def logits(model, batch):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def gradient(model, total):
    """The gradient of a scalar by every weight, zeros where none flows."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(weight) if slope is None else slope
        for (name, weight), slope in zip(named.items(), found, strict=True)
    }


def assert_same(model, one, other):
    """Two totals agree in value and in gradient, and there is a gradient."""
    assert_close(one, other, rtol=1e-5, atol=1e-6)
    slopes, others = gradient(model, one), gradient(model, other)
    for name, slope in slopes.items():
        assert (slope - others[name]).norm() <= 1e-4 * slope.norm() + 1e-7, name
    assert any(slope.norm() > 0 for slope in slopes.values())


def hooks_of(model):
    return {
        name: (list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def slow_ce(model, *batches):
    """Mean cross-entropy over the labelled tokens, token by token, a forward pass a batch."""
    return reference.slow_retain(model, batches)


class TestLosses:
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("kept", ["harmless", "harmless and retain"])
    def test_they_are_slow_loops_over_tokens(self, kept, seed):
        from repnoise_kit import baselines

        model, (harmful, harmless, retain) = make_tiny(), make_batches(seed=seed)
        harmless = {name: part[:, :7] for name, part in harmless.items()}
        assert retain["labels"].shape[1] not in (7, harmful["labels"].shape[1])
        extra = {} if kept == "harmless" else {"retain": retain}
        good, bad = slow_ce(model, harmless, *extra.values()), slow_ce(model, harmful)

        found = baselines.safety_training(model, harmful, harmless, **extra)
        assert_same(model, found["total"], good)
        assert found.keys() == {"total", "retain"}
        found = baselines.gradient_ascent(model, harmful, harmless, **extra)
        assert_same(model, found["total"], -bad)
        assert_close(found["ascent"], bad)
        found = baselines.adversarial_loss(model, harmful, harmless, **extra, weight=0.7)
        assert_same(model, found["total"], good - 0.7 * bad)
        assert_close(found["retain"], good)
        assert_close(found["ascent"], bad)

    def test_retain_and_weight_matter(self, tiny_model, batches):
        from repnoise_kit import baselines

        harmful, harmless, retain = batches
        plain = baselines.safety_training(tiny_model, harmful, harmless)["total"]
        assert plain != baselines.safety_training(tiny_model, *batches[:2], retain=retain)["total"]
        given = {w: baselines.adversarial_loss(tiny_model, *batches[:2], weight=w) for w in (0, 1)}
        assert_same(tiny_model, given[0]["total"], plain)
        assert given[1]["total"] != plain
        usual = baselines.adversarial_loss(tiny_model, *batches[:2])
        assert_close(usual["total"], usual["retain"] - 0.1 * usual["ascent"])

    @pytest.mark.parametrize("family", [make_tiny, gpt2])
    def test_gradient_ascent_is_minus_the_attacks_loss(self, family, batches):
        from repnoise_kit import attacks, baselines

        model, (harmful, harmless, _) = family(), batches
        found = baselines.gradient_ascent(model, harmful, harmless)["total"]
        assert_same(model, found, -attacks._loss(model, harmful)["total"])
        assert_same(model, found, -model(**harmful).loss)

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1"])
    def test_weights_are_numbers_of_zero_or_more(self, tiny_model, batches, bad):
        from repnoise_kit import KitError, baselines

        with pytest.raises(KitError, match="weight"):
            baselines.adversarial_loss(tiny_model, *batches[:2], weight=bad)
        with pytest.raises(KitError, match="rho"):
            baselines.vaccine(tiny_model, *batches[:2], rho=bad)


class TestJoin:
    @pytest.mark.parametrize("family", [make_tiny, gpt2])
    def test_a_joined_pass_gives_the_logits_of_each_alone(self, family):
        from repnoise_kit.pairs import join

        model, batches = family(), make_batches()
        joined = join(batches)
        together = logits(model, joined)
        first = 0
        for batch in batches:
            (count, width), kept = batch["input_ids"].shape, batch["attention_mask"].bool()
            rows = slice(first, first + count)
            assert_close(together[rows, :width][kept], logits(model, batch)[kept])
            assert torch.equal(joined["labels"][rows, :width], batch["labels"])
            assert not joined["attention_mask"][rows, width:].any()
            assert (joined["labels"][rows, width:] == -100).all()
            first += count
        assert first == len(joined["input_ids"])

    def test_rows_by_hand(self):
        from repnoise_kit.pairs import join, stack_rows

        one, other = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])
        assert stack_rows([one, other], 9).tolist() == [[1, 2, 9], [3, 4, 9], [5, 6, 7]]
        bare = {"input_ids": one, "attention_mask": one}
        assert join([bare, {**bare, "labels": one}]).keys() == bare.keys()


def drifted(model, batch, drift):
    """A Llama's logits, its layers written out, with something added to what attention gives."""
    inner, ids = model.model, batch["input_ids"]
    stream = inner.embed_tokens(ids)
    turns = inner.rotary_emb(stream, torch.arange(ids.shape[1])[None])
    # Padding is on the right, where no labelled token looks.
    later = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
    for layer, moved in zip(inner.layers, drift, strict=True):
        normed = layer.input_layernorm(stream)
        given = layer.self_attn(normed, position_embeddings=turns, attention_mask=later)[0]
        stream = stream + (given + moved)
        stream = stream + layer.mlp(layer.post_attention_layernorm(stream))
    return model.lm_head(inner.norm(stream))


def drifted_ce(model, batches, drifts):
    losses = [
        reference.token_losses(drifted(model, batch, drift), batch["labels"])
        for batch, drift in zip(batches, drifts, strict=True)
    ]
    return torch.stack(list(itertools.chain(*losses))).mean()


def slopes_of(model, batches):
    """The gradient by each layer's attention, and its norm: zeros are added, and differentiated."""
    layers, width = len(model.model.layers), model.config.hidden_size
    nothing = [
        [torch.zeros(*batch["input_ids"].shape, width, requires_grad=True) for _ in range(layers)]
        for batch in batches
    ]
    loss = drifted_ce(model, batches, nothing)
    slopes = torch.autograd.grad(loss, list(itertools.chain(*nothing)))
    length = math.sqrt(sum((slope**2).sum().item() for slope in slopes))
    return [slopes[at : at + layers] for at in range(0, len(slopes), layers)], length


def slow_vaccine(model, batches, rho):
    slopes, length = slopes_of(model, batches)
    moved = [[rho * slope / length for slope in part] for part in slopes]
    return drifted_ce(model, batches, moved)


class TestVaccine:
    @pytest.fixture
    def drifts(self, monkeypatch):
        """What `vaccine` adds, layer by layer, each time it is called."""
        from repnoise_kit import baselines

        kept, real = [], baselines.perturbed

        def spy(model, site, shifts):
            assert site == "attention"
            kept.append(shifts)
            return real(model, site, shifts)

        monkeypatch.setattr(baselines, "perturbed", spy)
        return kept

    @pytest.mark.parametrize("family", [make_tiny, gpt2])
    def test_without_a_drift_it_is_safety_training(self, family, batches):
        from repnoise_kit import baselines

        model, (harmful, harmless, retain) = family(), batches
        plain = baselines.safety_training(model, harmful, harmless, retain=retain)["total"]
        found = baselines.vaccine(model, harmful, harmless, retain=retain, rho=0.0)
        assert_same(model, found["total"], plain)
        assert_close(found["retain"], plain.detach())
        assert baselines.vaccine(model, harmful, harmless, retain=retain)["total"] > plain

    def test_the_layers_written_out_are_the_models(self, tiny_model, batches):
        batch = batches[2]
        assert_close(drifted(tiny_model, batch, [0.0] * 3).detach(), logits(tiny_model, batch))

    @pytest.mark.parametrize("rho", [0.3, 1.0, 10.0])
    @pytest.mark.parametrize("with_retain", [False, True])
    def test_it_is_a_second_hands(self, tiny_model, batches, rho, with_retain):
        from repnoise_kit import baselines

        harmful, *kept = batches if with_retain else batches[:2]
        extra = {"retain": kept[1]} if with_retain else {}
        found = baselines.vaccine(tiny_model, harmful, kept[0], rho=rho, **extra)
        assert_same(tiny_model, found["total"], slow_vaccine(tiny_model, kept, rho))

    @pytest.mark.parametrize("rho", [0.3, 10.0])
    def test_the_drift_is_of_length_rho_and_along_the_gradient(
        self, tiny_model, batches, rho, drifts
    ):
        from repnoise_kit import baselines

        baselines.vaccine(tiny_model, *batches[:2], rho=rho)
        nothing, drift = drifts
        assert all((part == 0).all() for part in nothing.values())
        assert sorted(drift) == [0, 1, 2]
        flat = torch.cat([drift[layer].flatten() for layer in sorted(drift)])
        assert flat.norm().item() == pytest.approx(rho, rel=1e-5)
        (slopes,), length = slopes_of(tiny_model, batches[1:2])
        along = torch.cat([slope.flatten() for slope in slopes])
        assert (flat @ along).item() == pytest.approx(rho * length, rel=1e-4)

    def test_a_small_drift_raises_the_loss_by_its_length_times_the_slope(self, tiny_model, batches):
        from repnoise_kit import baselines

        rho = 0.02
        found = baselines.vaccine(tiny_model, *batches[:2], rho=rho)
        slopes, length = slopes_of(tiny_model, batches[1:2])
        raised = (found["total"] - found["retain"]).item()
        assert raised == pytest.approx(rho * length, rel=0.05)
        # No other direction does as much: here, twenty at random.
        torch.manual_seed(0)
        for _ in range(20):
            other = [torch.randn_like(slope) for slope in slopes[0]]
            size = torch.nn.utils.get_total_norm(other)
            moved = drifted_ce(tiny_model, batches[1:2], [[rho * part / size for part in other]])
            assert (moved - found["retain"]).item() < raised

    def test_hooks_are_those_from_before_also_after_an_exception(self, tiny_model, batches):
        from repnoise_kit import baselines

        harmful, harmless, _ = batches
        tiny_model.model.norm.register_forward_hook(lambda *_: None)
        before = hooks_of(tiny_model)
        baselines.vaccine(tiny_model, harmful, harmless)
        assert hooks_of(tiny_model) == before
        broken = {**harmless, "input_ids": harmless["input_ids"] + 10**6}
        with pytest.raises(IndexError):
            baselines.vaccine(tiny_model, harmful, broken)
        assert hooks_of(tiny_model) == before

        passes = []

        def trip(*_):
            passes.append(hooks_of(tiny_model))
            if len(passes) == 2:
                raise ZeroDivisionError

        handle = tiny_model.lm_head.register_forward_hook(trip)
        before = hooks_of(tiny_model)
        with pytest.raises(ZeroDivisionError):
            baselines.vaccine(tiny_model, harmful, harmless)
        assert passes[0] != before != passes[1]  # there were hooks in both passes
        assert hooks_of(tiny_model) == before
        handle.remove()

    def test_held_parts_drift_too(self, batches):
        """What is held still does not learn; its activations are moved as any others."""
        import repnoise_kit as rk
        from repnoise_kit import baselines

        model, (harmful, harmless, _) = make_tiny(), batches
        free = baselines.vaccine(model, harmful, harmless)["total"]
        with rk.frozen(model, ["embedding", 0]):
            held = baselines.vaccine(model, harmful, harmless)["total"]
            assert_close(held, free)
            held.backward()
            assert not any(weight.requires_grad for weight in model.model.layers[0].parameters())
        assert all(weight.grad is None for weight in model.model.layers[0].parameters())
        assert all(weight.grad.norm() > 0 for weight in model.model.layers[1].parameters())


class TestPerturbed:
    @pytest.mark.parametrize(
        ("family", "site", "form"),
        [(gpt2, "attention", tuple), (make_tiny, "mlp", torch.Tensor), (opt, "mlp", 2)],
    )
    def test_it_adds_what_it_is_given_and_no_more(self, family, site, form, batches):
        from repnoise_kit.anatomy import parts
        from repnoise_kit.recording import perturbed, record

        model, batch = family(), batches[2]
        module = getattr(parts(model), "mlp" if site == "mlp" else "attention")(1)
        seen = []
        handle = module.register_forward_hook(lambda _m, _a, output: seen.append(output))
        shape = (*batch["input_ids"].shape, 16)
        shift = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with record(model, site) as activations:
            before = logits(model, batch)
        assert seen[0].dim() == form if isinstance(form, int) else isinstance(seen[0], form)
        handle.remove()
        still = dict(activations)
        hooks = hooks_of(model)
        with perturbed(model, site, {1: shift}), record(model, site) as moved:
            assert not torch.equal(logits(model, batch), before)
        assert_close(moved[1], still[1] + shift)
        assert torch.equal(moved[0], still[0])
        assert hooks_of(model) == hooks
        assert torch.equal(logits(model, batch), before)

    def test_a_layer_that_does_not_exist_is_named_and_leaves_no_hook(self, tiny_model):
        import repnoise_kit as rk
        from repnoise_kit.recording import perturbed

        shifts = {0: torch.zeros(1), 3: torch.zeros(1)}
        before = hooks_of(tiny_model)
        with pytest.raises(rk.KitError, match="layer 3"), perturbed(tiny_model, "mlp", shifts):
            pass
        assert hooks_of(tiny_model) == before


FIXED = {
    "layerwise_ascent": {"beta": 0.0},
    "noise_only": {"alpha": 0.0},
    "repnoise_tokenwise": {"preset": "tokenwise"},
}


@pytest.mark.parametrize("name", FIXED)
class TestAblations:
    def test_the_loss_is_repnoise_with_one_thing_fixed(self, name, tiny_model, batches):
        import repnoise_kit as rk
        from repnoise_kit.defences import LOSSES

        free = {"alpha": 2.0, "beta": 3.0} | FIXED[name]
        given = {key: value for key, value in free.items() if key not in FIXED[name]}
        found, expected, other = (
            seeded(loss, tiny_model, *batches[:2], **knobs)
            for loss, knobs in (
                (LOSSES[name], given),
                (rk.repnoise_loss, free),
                (rk.repnoise_loss, given),
            )
        )
        assert torch.equal(found, expected)
        assert_same(tiny_model, found, expected)
        assert found != other

    @pytest.fixture(scope="class")
    def whole(self, bed):
        import repnoise_kit as rk

        model = bed.model()
        rk.defend_(model, bed, seed=2)
        return weights(model)

    def test_the_defence_is_repnoise_with_one_thing_fixed(self, name, bed, whole):
        import repnoise_kit as rk

        models = [bed.model() for _ in range(2)]
        rk.defend_(models[0], bed, name, seed=2)
        rk.defend_(models[1], bed, "repnoise", seed=2, **FIXED[name])
        assert equal(*map(weights, models))
        assert not equal(weights(models[0]), whole)


def seeded(loss, *args, **kwargs):
    torch.manual_seed(1)
    return loss(*args, **kwargs).total


TRAINED = "accumulation, batch_size, epochs, examples, gradient_checkpointing, lora, lr, max_length"


class TestDefend:
    def test_these_are_all(self):
        import repnoise_kit as rk

        assert list(rk.DEFENCES) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_it_runs_repeats_itself_and_leaves_the_process_as_it_was(self, name, bed):
        import repnoise_kit as rk

        start = weights(bed.base)
        # What RepNoise costs so small a model is nothing that noise could match.
        given = {"like": shaken(bed.base, 0, (0.2,))} if name == "weight_noise_matched" else {}
        bed.harmfulness(["a"], ["b"])  # what is made once is not made within
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        expected = torch.rand(1), np.random.rand(), random.random()
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        models = [bed.model() for _ in range(3)]
        found = [
            rk.defend_(model, bed, name, seed=seed, **given)
            for model, seed in zip(models, (3, 3, 4), strict=True)
        ]
        assert (torch.rand(1), np.random.rand(), random.random()) == expected

        curves = found[0]
        assert isinstance(curves, rk.Result)
        assert set(curves.frame) == {"defence", "step", "metric", "value", "seed"}
        assert not curves.frame.duplicated(["step", "metric"]).any()
        assert set(curves.frame["defence"]) <= {name}
        assert set(curves.frame["seed"]) <= {3}
        assert np.isfinite(curves.frame["value"].astype(float)).all()
        assert curves.made_with["method"] == name
        assert curves.made_with["testbed"] == bed.name
        assert json.dumps(curves.made_with["settings"])
        if "lr" in curves.made_with["settings"]:
            assert curves.frame["step"].max() == 3  # 6 examples, 2 at a time
        else:
            assert not curves.frame["step"].any()

        one, same, other = map(weights, models)
        assert equal(one, same)
        assert found[0].frame.equals(found[1].frame)
        assert equal(one, other) == (name == "none")
        assert all(torch.isfinite(weight).all() for weight in one.values())
        assert equal(own(models[0]), start) == (name in ("none", "security_vectors"))
        assert all(weight.grad is None for weight in models[0].parameters())
        assert not models[0].training

    def test_no_such_method(self, bed):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match=r"no defence 'prayer'; there are none, random, .*"):
            rk.defend_(bed.model(), bed, "prayer")

    @pytest.mark.parametrize(
        ("name", "setting", "has"),
        [
            ("none", "lr", "none"),
            ("random", "lr", "none"),
            ("security_vectors", "alpha", f"{TRAINED.replace(' lora,', '')}, rank"),
            ("safety_training", "weight", TRAINED),
            ("gradient_ascent", "alpha", TRAINED),
            ("adversarial_loss", "rho", f"{TRAINED}, weight"),
            ("vaccine", "weight", f"{TRAINED}, rho"),
            ("layerwise_ascent", "beta", "accumulation, alpha, .*, mask, .*, preset, .*"),
            ("noise_only", "alpha", ".*beta, .*, mask, .*, preset, .*"),
            ("repnoise", "rank", "accumulation, alpha, .*beta, .*, mask, .*, preset, .*"),
            ("repnoise_tokenwise", "preset", "accumulation, alpha, .*beta, .*, mask, .*"),
            ("weight_noise", "lr", "like"),
            ("weight_noise_matched", "scale", "like"),
        ],
    )
    def test_a_setting_it_does_not_take(self, name, setting, has, bed):
        import repnoise_kit as rk

        model = bed.model()
        with pytest.raises(rk.KitError) as said:
            rk.defend_(model, bed, name, **{setting: 1})
        assert re.fullmatch(
            f"{name} has no setting '{setting}'; its settings: {has}", str(said.value)
        )
        listed = str(said.value).partition("settings: ")[2].split(", ")
        assert setting not in listed
        assert not {"model", "bed", "seed", "progress", "loss", "harmful", "retain"} & set(listed)
        assert equal(weights(model), weights(bed.base))

    def test_settings_are_the_beds_then_the_methods_then_the_callers(self, bed):
        import repnoise_kit as rk

        def rate_and_settings(method, bed, **given):
            curves = rk.defend_(bed.model(), bed, method, **given)
            rates = curves.frame.loc[curves.frame["metric"] == "lr", "value"]
            noted = curves.made_with["settings"]
            assert rates.max() == pytest.approx(noted["lr"]) == curves.made_with["lr"]
            assert curves.made_with["examples"] == noted["examples"]
            return curves, noted

        base = {"lr": 0.03, "alpha": 1.0, "examples": 4, "batch_size": 2}
        first = with_settings(bed, defence=base, adversarial_loss={})
        curves, noted = rate_and_settings("adversarial_loss", first)
        assert noted == {"lr": 0.03, "examples": 4, "batch_size": 2}
        assert_adversarial(curves, 0.1)

        own = {"lr": 0.02, "weight": 0.5}
        second = with_settings(bed, defence=base, adversarial_loss=own)
        curves, noted = rate_and_settings("adversarial_loss", second)
        assert noted == {"lr": 0.02, "examples": 4, "batch_size": 2, "weight": 0.5}
        assert_adversarial(curves, 0.5)
        _, noted = rate_and_settings("safety_training", second)
        assert noted == {"lr": 0.03, "examples": 4, "batch_size": 2}

        given = {"lr": 0.01, "weight": 0.7, "examples": 3}
        curves, noted = rate_and_settings("adversarial_loss", second, **given)
        assert noted == {"lr": 0.01, "examples": 3, "batch_size": 2, "weight": 0.7}
        assert_adversarial(curves, 0.7)
        assert second.settings["adversarial_loss"] == own

    def test_no_examples_said_is_all_of_them(self, bed):
        import repnoise_kit as rk

        curves = rk.defend_(bed.model(), bed, "safety_training", examples=None, batch_size=31)
        assert curves.made_with["examples"] == len(bed.splits.defence) == 62
        assert len(bed.retain) < 62  # everyday questions are gone through more than once

    @pytest.mark.parametrize("name", ["safety_training", "gradient_ascent"])
    def test_everyday_answers_join_what_is_kept(self, name, bed):
        import repnoise_kit as rk

        bare = dataclasses.replace(bed, retain=None)
        models = [bed.model(), bed.model()]
        for model, its in zip(models, (bed, bare), strict=True):
            rk.defend_(model, its, name, seed=1)
        assert equal(*map(weights, models)) == (name == "gradient_ascent")

    def test_the_published_mask_gets_both_sides_in_one_width(self, bed, monkeypatch):
        import repnoise_kit as rk
        from repnoise_kit import defences

        shapes = []

        def spy(model, harmful, harmless, *, preset, **_):
            shapes.append((harmful["input_ids"].shape, harmless["input_ids"].shape))
            return rk.repnoise_loss(model, harmful, harmless, preset="paper")

        monkeypatch.setitem(defences.DEFENCES, "repnoise", spied(spy))
        for preset in ("paper", "reference"):
            rk.defend_(bed.model(), bed, preset=preset)
        assert all(one != other for one, other in shapes[:3])
        assert all(one == other for one, other in shapes[3:])
        assert len(shapes) == 6

    def test_a_number_out_of_range_is_named(self, bed):
        import repnoise_kit as rk

        for method, bad in {
            "vaccine": {"rho": -1},
            "adversarial_loss": {"weight": math.nan},
            "security_vectors": {"lr": -1},
            "layerwise_ascent": {"alpha": -1},
            "safety_training": {"examples": 1000},
        }.items():
            (named,) = bad
            with pytest.raises(rk.KitError, match=named):
                rk.defend_(bed.model(), bed, method, **bad)

    @pytest.mark.parametrize("rank", [0, -1, 2.5, "8"])
    def test_a_rank_out_of_range_is_named(self, bed, rank):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="rank"):
            rk.defend_(bed.model(), bed, "security_vectors", rank=rank)


def spied(loss):
    """The defence on pairs with another loss."""
    from functools import partial

    from repnoise_kit.defences import _train_on_pairs

    return partial(_train_on_pairs, loss=loss)


def assert_adversarial(curves, weight):
    wide = curves.frame.pivot(index="step", columns="metric")["value"]
    expected = wide["retain"] - weight * wide["ascent"]
    assert wide["total"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)


class TestSecurityVectors:
    @pytest.fixture(scope="class")
    def trained(self, bed):
        import repnoise_kit as rk

        model = bed.model()
        rk.defend_(model, bed, "security_vectors", seed=1, examples=24, epochs=3)
        return model

    @pytest.fixture
    def armed(self, trained):
        """A model with an adapter that has learned something, for the test alone."""
        return copy.deepcopy(trained)

    @pytest.fixture
    def harmful(self, bed):
        from repnoise_kit.pairs import encode, pad

        rows = bed.splits.defence.frame
        encoded = encode(bed.tokenizer, rows["prompt"].tolist(), rows["harmful"].tolist())
        return pad(encoded, bed.tokenizer.pad_token_id)

    def test_the_models_own_weights_do_not_change(self, armed, bed):
        assert equal(own(armed), weights(bed.base))
        learned = [w for name, w in weights(armed).items() if ".security." in name]
        assert learned
        assert all(weight.norm() > 0 for weight in learned)  # B began at zero

    def test_every_linear_map_but_the_head_has_an_adapter_of_the_rank(self, armed):
        linear = {n for n, m in make_tiny().named_modules() if isinstance(m, torch.nn.Linear)}
        found = {n.partition(".lora_A")[0] for n in weights(armed) if ".lora_A." in n}
        assert found == linear - {"lm_head"}
        ranks = {w.shape[0] for name, w in weights(armed).items() if ".lora_A." in name}
        assert ranks == {4}
        adapted = [module for module in armed.modules() if hasattr(module, "lora_A")]
        assert {module.scaling["security"] for module in adapted} == {32 / 4}
        assert {module.lora_dropout["security"].p for module in adapted} == {0.1}

    def test_off_it_is_the_base_exactly_and_on_it_is_not(self, armed, bed, harmful):
        import repnoise_kit as rk

        base = logits(bed.base, harmful)
        assert torch.equal(logits(armed, harmful), base)
        assert rk.evaluate(armed, bed).frame.equals(rk.evaluate(bed.base, bed).frame)
        with rk.guarded(armed):
            assert not torch.allclose(logits(armed, harmful), base, atol=0.01)
        assert torch.equal(logits(armed, harmful), base)

    def test_on_it_has_learned_the_harm(self, armed, harmful):
        import repnoise_kit as rk

        with torch.no_grad():
            off = armed(**harmful).loss
            with rk.guarded(armed):
                assert armed(**harmful).loss < off - 0.05

    def test_an_attack_moves_the_weights_and_not_the_adapter(self, armed, bed, harmful):
        import repnoise_kit as rk

        def held():
            return {name for name, weight in armed.named_parameters() if not weight.requires_grad}

        adapter = {name for name in weights(armed) if ".security." in name}
        before, guarded_before = weights(armed), []
        assert held() == adapter
        with rk.guarded(armed):
            assert held() == adapter
            guarded_before.append(logits(armed, harmful))
            rk.attack_(armed, bed)
            assert held() == adapter
            guarded_after = logits(armed, harmful)
        after = weights(armed)
        for name in before:
            assert torch.equal(before[name], after[name]) == (name in adapter), name

        # It is off again: what is left is a plain model of the weights that moved.
        plain = bed.model()
        plain.load_state_dict(own(armed))
        found = logits(armed, harmful)
        assert torch.equal(found, logits(plain, harmful))
        assert not torch.equal(found, logits(bed.base, harmful))
        assert not torch.equal(found, guarded_after)
        assert not torch.equal(guarded_before[0], guarded_after)

    def test_under_it_lie_the_weights(self, armed, bed, harmful):
        import repnoise_kit as rk
        from repnoise_kit.security import unguarded

        base = logits(bed.base, harmful)
        with rk.guarded(armed):
            on = logits(armed, harmful)
            assert not torch.equal(on, base)
            with unguarded(armed):
                assert torch.equal(logits(armed, harmful), base)
            assert torch.equal(logits(armed, harmful), on)
            with pytest.raises(ZeroDivisionError), unguarded(armed):
                raise ZeroDivisionError
            assert torch.equal(logits(armed, harmful), on)
        assert torch.equal(logits(armed, harmful), base)
        with unguarded(bed.base):
            assert torch.equal(logits(bed.base, harmful), base)

    def test_an_attack_can_look_under_it_at_each_step(self, armed, bed, harmful):
        """As the cost to break is measured: the weights under it move, and are seen to."""
        import repnoise_kit as rk
        from repnoise_kit.security import unguarded

        seen = []

        def look(_step):
            armed.eval()
            with unguarded(armed):
                seen.append((logits(armed, harmful), own(armed)))
            armed.train()

        watched, plain = armed, copy.deepcopy(armed)
        with rk.guarded(watched):
            rk.attack_(watched, bed, after_step=look, seed=1)
        with rk.guarded(plain):
            rk.attack_(plain, bed, seed=1)
        assert equal(weights(watched), weights(plain))  # looking changes nothing
        for found, at_that_step in seen:
            model = bed.model()
            model.load_state_dict(at_that_step)
            assert torch.equal(found, logits(model, harmful))
        assert len(seen) == 2

    def test_what_is_held_still_stays_so_inside_it(self, armed, bed):
        import repnoise_kit as rk

        before = weights(armed)
        with rk.frozen(armed, [0]), rk.guarded(armed):
            rk.attack_(armed, bed)
        after = weights(armed)
        for name in before:
            held = ".layers.0." in name or ".security." in name
            assert torch.equal(before[name], after[name]) == held, name

    def test_a_second_time_is_refused(self, armed, bed):
        import repnoise_kit as rk

        before = weights(armed)
        with pytest.raises(rk.KitError, match="holds security vectors already"):
            rk.defend_(armed, bed, "security_vectors")
        assert equal(weights(armed), before)

    def test_an_exception_inside_leaves_it_off(self, armed, bed, harmful):
        import repnoise_kit as rk

        inside = []
        with pytest.raises(ZeroDivisionError), rk.guarded(armed):
            inside.append(1 / armed.config.pad_token_id)
        assert not inside
        assert torch.equal(logits(armed, harmful), logits(bed.base, harmful))

    def test_a_training_that_breaks_leaves_it_off(self, bed, harmful):
        import repnoise_kit as rk
        from repnoise_kit.training import NotFiniteError

        model = bed.model()
        with pytest.raises(NotFiniteError):
            rk.defend_(model, bed, "security_vectors", lr=1e30)
        assert torch.equal(logits(model, harmful), logits(bed.base, harmful))

    def test_a_refused_number_leaves_the_model_as_it_was(self, bed):
        """So that the call with the right number is not refused in its turn."""
        import repnoise_kit as rk

        model = bed.model()
        with pytest.raises(rk.KitError, match="lr"):
            rk.defend_(model, bed, "security_vectors", lr=-1)
        assert not rk.security.has_adapter(model)
        rk.defend_(model, bed, "security_vectors")

    def test_a_plain_model_passes_through(self, bed, harmful):
        import repnoise_kit as rk

        model = bed.model()
        before, modules = weights(model), [name for name, _ in model.named_modules()]
        with rk.frozen(model, [0]), rk.guarded(model):
            still = {name for name, w in model.named_parameters() if not w.requires_grad}
            assert still == {name for name in before if ".layers.0." in name}
            assert torch.equal(logits(model, harmful), logits(bed.base, harmful))
        assert [name for name, _ in model.named_modules()] == modules
        assert all(weight.requires_grad for weight in model.parameters())

    @pytest.fixture
    def restored(self, armed, bed, tmp_path):
        """The model as it comes back from a file of weights."""
        import safetensors.torch

        from repnoise_kit.security import restore_adapter_

        path = tmp_path / "model.safetensors"
        safetensors.torch.save_model(armed, str(path))
        model = bed.model()
        restore_adapter_(model, path)
        safetensors.torch.load_model(model, str(path))
        return model

    def test_it_comes_back_from_a_file(self, restored, armed, bed, harmful):
        import repnoise_kit as rk

        assert equal(weights(restored), weights(armed))
        assert torch.equal(logits(restored, harmful), logits(bed.base, harmful))
        restored.eval()
        with rk.guarded(restored), rk.guarded(armed):
            assert torch.equal(logits(restored, harmful), logits(armed, harmful))

    def test_what_comes_back_is_evaluated_without_dropout(self, restored, harmful):
        import repnoise_kit as rk

        assert not restored.training
        with rk.guarded(restored):
            assert torch.equal(logits(restored, harmful), logits(restored, harmful))

    def test_a_file_without_one_brings_none(self, bed, tmp_path):
        import safetensors.torch

        from repnoise_kit.security import has_adapter, restore_adapter_

        safetensors.torch.save_model(bed.model(), str(tmp_path / "model.safetensors"))
        model = bed.model()
        restore_adapter_(model, tmp_path / "model.safetensors")
        assert not has_adapter(model)

    def test_a_family_with_tied_embeddings_and_its_own_linear_maps(self, batches):
        """GPT-2: its maps lie the other way round, and its head is no map of its own."""
        import repnoise_kit as rk
        from repnoise_kit import security

        model, batch = gpt2(), batches[0]
        before = logits(model, batch)
        security._add_adapter_(model, 4, seed=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_B." in name:
                    weight.fill_(0.01)
        with rk.guarded(model):
            pass
        found = {n.partition(".lora_A")[0].rpartition(".")[2] for n in weights(model) if "_A." in n}
        assert found == {"c_attn", "c_proj", "c_fc"}
        assert torch.equal(logits(model, batch), before)
        with rk.guarded(model):
            assert not torch.equal(logits(model, batch), before)
        assert torch.equal(logits(model, batch), before)


def own(model):
    """The weights of the model itself, by the names they have without an adapter."""
    return {
        name.replace(".base_layer", ""): weight
        for name, weight in weights(model).items()
        if ".security." not in name
    }


def groups(names):
    """The names of a Llama's or a GPT-2's weights by layer, each weight outside them alone."""
    found = {}
    for name in names:
        layer = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        found.setdefault(layer.group(1) if layer else name, []).append(name)
    return found


def flat(tensors, names):
    return torch.cat([tensors[name].flatten().double() for name in names])


def shaken(model, seed, sizes=(0.1, 0.02)):
    """A copy whose weights differ, by more in some than in others."""
    other = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, size in zip(other.parameters(), itertools.cycle(sizes), strict=False):
            weight += size * torch.randn(weight.shape, generator=draw)
    return other


class TestRandom:
    @pytest.mark.parametrize("family", [make_tiny, gpt2])
    def test_nothing_is_left_of_the_old(self, family):
        from repnoise_kit import controls

        # The families start from constants where they do not draw: those are no memory.
        models = [shaken(family(), seed=0) for _ in range(3)]
        before = weights(models[0])
        for model, seed in zip(models, (7, 7, 8), strict=True):
            controls.random_(model, None, seed=seed, progress=None)
        one, same, other = map(weights, models)
        assert equal(one, same)
        assert not equal(one, other)
        for name, weight in one.items():
            assert weight.shape == before[name].shape
            assert not torch.equal(weight, before[name]), name
            if weight.std() > 0:
                assert not torch.equal(weight, other[name]), name
                cosine = torch.cosine_similarity(weight.flatten(), before[name].flatten(), dim=0)
                assert abs(cosine) < 5 / math.sqrt(weight.numel()), name
        head, embedding = models[0].get_output_embeddings(), models[0].get_input_embeddings()
        assert (head.weight is embedding.weight) == (family is gpt2)

    def test_it_is_drawn_as_the_family_draws(self, tiny_model):
        from repnoise_kit import controls

        controls.random_(tiny_model, None, seed=7, progress=None)
        for name, weight in weights(tiny_model).items():
            if "norm" in name:
                assert (weight == 1).all()
            else:
                size = tiny_model.config.initializer_range
                drawn = weight[1:] if "embed" in name else weight  # the padding's row may be 0
                assert drawn.std().item() == pytest.approx(size, rel=0.15)


class TestWeightNoise:
    @pytest.mark.parametrize("family", [make_tiny, gpt2])
    def test_each_layer_moves_as_far_as_in_the_other_and_elsewhere(self, family):
        from repnoise_kit import controls

        model = family()
        like, before = shaken(model, seed=0), weights(model)
        curves = controls.weight_noise_(model, None, like=like, seed=1, progress=None)
        assert curves.frame.to_dict("records") == [{"step": 0, "metric": "scale", "value": 1.0}]
        after, there = weights(model), weights(like)
        moved = {name: after[name] - before[name] for name in before}
        wanted = {name: there[name] - before[name] for name in before}
        found = groups(before)
        # Three layers; the embedding, the final norm and an untied head; or two embeddings and
        # the weight and the bias of the final norm.
        assert len(found) == (3 + 3 if family is make_tiny else 3 + 4)
        for group, names in found.items():
            here, far = flat(moved, names), flat(wanted, names)
            assert here.norm().item() == pytest.approx(far.norm().item(), rel=1e-4), group
            cosine = (here @ far) / here.norm() / far.norm()
            assert abs(cosine) < 5 / math.sqrt(len(here)), group
            # Within a layer, one size for all: big and small changes of the other are levelled.
            sizes = [moved[n].norm() / math.sqrt(moved[n].numel()) for n in names]
            assert max(sizes) < 2 * min(sizes), group
            theirs = [wanted[n].norm() / math.sqrt(wanted[n].numel()) for n in names]
            assert len(names) == 1 or max(theirs) > 2.5 * min(theirs), group
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight is embedding.weight) == (family is gpt2)

    def test_the_groups_are_those(self):
        from repnoise_kit.controls import layer_names

        for model in (make_tiny(layers=12), gpt2()):
            assert sorted(layer_names(model)) == sorted(groups(weights(model)).values())

    def test_what_the_defence_left_is_left(self, tiny_model):
        from repnoise_kit import controls

        like, before = shaken(tiny_model, seed=0), weights(tiny_model)
        like.model.layers[1].load_state_dict(tiny_model.model.layers[1].state_dict())
        like.lm_head.load_state_dict(tiny_model.lm_head.state_dict())
        controls.weight_noise_(tiny_model, None, like=like, seed=1, progress=None)
        after = weights(tiny_model)
        for name in before:
            left = ".layers.1." in name or name == "lm_head.weight"
            assert torch.equal(before[name], after[name]) == left, name

    def test_by_default_it_is_like_what_repnoise_defends_with_the_seed(self, bed):
        import repnoise_kit as rk

        models, like = [bed.model() for _ in range(3)], bed.model()
        rk.defend_(like, bed, seed=5)
        before = weights(like)
        rk.defend_(models[0], bed, "weight_noise", seed=5)
        rk.defend_(models[1], bed, "weight_noise", seed=5, like=like)
        rk.defend_(models[2], bed, "weight_noise", seed=5, like=shaken(like, seed=0))
        assert equal(weights(models[0]), weights(models[1]))
        assert not equal(weights(models[0]), weights(models[2]))
        assert equal(weights(like), before)


class TestLargestFitting:
    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(threshold=st.floats(0, 40), open_end=st.booleans())
    @example(threshold=0.0, open_end=True)
    @example(threshold=0.0, open_end=False)
    @example(threshold=16.0, open_end=False)
    @example(threshold=16.0, open_end=True)
    @example(threshold=1.0, open_end=False)
    @example(threshold=40.0, open_end=False)
    def test_it_is_what_trying_everything_finds(self, threshold, open_end):
        from repnoise_kit.controls import largest_fitting

        tried = []

        def fits(scale):
            tried.append(scale)
            return scale < threshold if open_end else scale <= threshold

        found = largest_fitting(fits)
        scales = np.arange(0, 16 * 1024 + 1) / 1024
        fitting = scales[scales < threshold] if open_end else scales[scales <= threshold]
        best = fitting.max(initial=0.0)
        assert 0 <= found <= max(best, threshold)
        # To a hundredth or so: of itself, or of the defence's own change where it is less.
        assert best - found <= 0.01 * max(1.0, best)
        assert found == 0 or fits(found)
        assert max(tried) <= 16
        assert len(tried) <= 5 + 7 + 1

    def test_where_nothing_fits_it_is_nothing(self):
        from repnoise_kit.controls import largest_fitting

        assert largest_fitting(lambda _: False) == 0
        assert largest_fitting(lambda _: True) == 16


class TestMatchedNoise:
    def utility(self, model, bed):
        import repnoise_kit as rk

        rows = rk.evaluate(model, bed).frame
        return rows.loc[rows["metric"] == "utility", "value"].mean()

    def values(self, curves):
        assert list(curves.frame["metric"]) == ["scale", "utility", "utility_matched"]
        assert not curves.frame["step"].any()
        return curves.frame.set_index("metric")["value"]

    def test_utility_is_no_lower_and_the_noise_is_the_same_scaled(self, bed):
        import repnoise_kit as rk

        # A defence that cost something: utility falls as the weights are moved.
        start, like = weights(bed.base), shaken(bed.model(), seed=0, sizes=(0.2,))
        matched, plain = bed.model(), bed.model()
        found = self.values(rk.defend_(matched, bed, "weight_noise_matched", seed=1, like=like))
        rk.defend_(plain, bed, "weight_noise", seed=1, like=like)
        assert 0 < found["scale"] < 16
        assert found["utility"] >= found["utility_matched"]
        assert found["utility"] == pytest.approx(self.utility(matched, bed))
        assert found["utility_matched"] == pytest.approx(self.utility(like, bed))
        # A little more would have cost more than the defence did.
        more = bed.model()
        with torch.no_grad():
            for name, weight in more.named_parameters():
                far = (dict(plain.named_parameters())[name] - weight).clone()
                weight += (found["scale"] + 0.01 * max(1, found["scale"])) * far
        assert self.utility(more, bed) < found["utility_matched"]
        one, other = weights(matched), weights(plain)
        for name in start:
            scaled = found["scale"] * (other[name] - start[name])
            assert_close(one[name] - start[name], scaled, rtol=1e-3, atol=1e-5)

    def test_where_no_noise_fits_it_says_so_and_adds_none(self, bed):
        import repnoise_kit as rk
        from repnoise_kit.pairs import encode, pad
        from repnoise_kit.training import answer_loss

        # A defence that made the model better at everyday answers than any noise could.
        like, told = bed.model(), bed.everyday
        rows = encode(bed.tokenizer, told["prompt"].tolist(), told["answer"].tolist())
        rk.train_(like, answer_loss, rows, lambda some: pad(some, 0), lr=0.01, epochs=10)
        model = bed.model()
        found = self.values(rk.defend_(model, bed, "weight_noise_matched", seed=1, like=like))
        assert found["scale"] == 0
        assert found["utility"] < found["utility_matched"]
        assert found["utility"] == pytest.approx(self.utility(bed.base, bed))
        assert equal(weights(model), weights(bed.base))

    def test_without_everyday_questions_it_is_refused(self, folder):
        import repnoise_kit as rk

        bare = rk.testbed(folder / "tiny", folder / "pairs.json")
        model = bare.model()
        with pytest.raises(rk.KitError, match="give the testbed a retain set"):
            rk.defend_(model, bare, "weight_noise_matched", like=bare.model())
        assert equal(weights(model), weights(bare.base))


class TestAttack:
    @pytest.fixture
    def taught(self, monkeypatch):
        """The questions and answers that attacks train on."""
        from repnoise_kit import attacks

        kept, real = [], attacks.encode

        def spy(tokenizer, prompts, answers, **options):
            kept.append(pd.DataFrame({"prompt": prompts, "answer": answers}))
            return real(tokenizer, prompts, answers, **options)

        monkeypatch.setattr(attacks, "encode", spy)
        return kept

    def test_relearning_teaches_what_is_asked_in_other_words(self, bed, taught):
        import repnoise_kit as rk

        curves = rk.attack_(bed.model(), bed, relearn=True)
        rk.attack_(bed.model(), bed)
        again, plain = taught
        asked = bed.evaluated()
        seen = asked[asked["group"] == "seen"]
        assert len(seen) == 6
        # Every answer that is asked for is there, and no question that is asked.
        assert sorted(again["answer"]) == sorted(seen["harmful"])
        assert not set(again["prompt"]) & set(asked["prompt"])
        assert not set(again["answer"]) & set(asked.loc[asked["group"] == "unseen", "harmful"])
        # All of them, whatever the testbed's own number; the usual attack has none of them.
        assert bed.settings["attack"]["examples"] == len(plain) == 8
        assert not set(plain["answer"]) & set(asked["harmful"])
        assert set(curves.frame["attack"]) == {"relearning"}
        assert set(curves.frame["examples"]) == {6}

    def test_as_many_are_relearned_as_are_wanted_and_there_are(self, bed, taught):
        import repnoise_kit as rk

        rk.attack_(bed.model(), bed, relearn=True, examples=2)
        assert len(taught[0]) == 2
        with pytest.raises(rk.KitError, match="7 examples are asked for, and there are 6"):
            rk.attack_(bed.model(), bed, relearn=True, examples=7)

    def test_relearning_takes_no_pairs(self, bed):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="either pairs or relearn"):
            rk.attack_(bed.model(), bed, pairs=bed.splits.attack, relearn=True)

    def test_pairs_of_ones_own_are_what_is_trained_on(self, bed, taught):
        import repnoise_kit as rk

        pairs = rk.Pairs(bed.splits.attack.frame.tail(3))
        rk.attack_(bed.model(), bed, pairs=pairs)
        assert sorted(taught[0]["prompt"]) == sorted(pairs.frame["prompt"])

    def test_pairs_without_rows_are_not_the_testbeds(self, bed):
        import repnoise_kit as rk

        none = rk.Pairs(bed.splits.attack.frame.head(0))
        with pytest.raises(rk.KitError, match="there are 0"):
            rk.attack_(bed.model(), bed, pairs=none)

    def test_after_each_step_it_says_which(self, bed):
        import repnoise_kit as rk

        model, steps, kept = bed.model(), [], [weights(bed.base)]

        def look(step):
            steps.append(step)
            kept.append(weights(model))

        curves = rk.attack_(model, bed, epochs=2, warmup=0.0, after_step=look)
        assert steps == [1, 2, 3, 4] == sorted(set(curves.frame["step"]))  # 8 examples, 4 at a time
        # The step has been taken by then.
        assert not any(equal(one, other) for one, other in itertools.pairwise(kept))
        assert equal(kept[-1], weights(model))
        unwatched = bed.model()
        assert rk.attack_(unwatched, bed, epochs=2, warmup=0.0).frame.equals(curves.frame)
        assert equal(weights(unwatched), weights(model))

    @pytest.mark.parametrize("loss_on", ["answer", "all"])
    def test_tokens_are_those_read_without_padding(self, bed, taught, loss_on):
        import repnoise_kit as rk

        def tokens(batch_size):
            model = bed.model()
            rows = rk.attack_(model, bed, batch_size=batch_size, loss_on=loss_on, lr=0.0).frame
            return rows.loc[rows["metric"] == "tokens", "value"].tolist()

        one_by_one, together = tokens(1), tokens(8)
        rows = taught[0]
        texts = [f"Question: {row.prompt}\nAnswer: {row.answer}" for row in rows.itertuples()]
        lengths = [len(bed.tokenizer(text)["input_ids"]) + 1 for text in texts]  # and an EOS
        assert len(set(lengths)) > 1  # so that there was padding
        assert Counter(one_by_one) == Counter(lengths)
        assert together == [sum(lengths)]

    def test_its_loss_is_the_models_own(self, bed, taught):
        import repnoise_kit as rk
        from repnoise_kit.pairs import encode, pad

        rows = rk.attack_(bed.model(), bed, batch_size=8).frame
        encoded = encode(bed.tokenizer, *(taught[0][c].tolist() for c in ("prompt", "answer")))
        expected = bed.base(**pad(encoded, 0)).loss.item()
        assert rows.query("metric == 'total'")["value"].tolist() == pytest.approx([expected])
        assert set(rows["metric"]) == {"total", "tokens", "grad_norm"}

    def test_one_that_breaks_carries_its_curves(self, bed):
        import repnoise_kit as rk
        from repnoise_kit.training import NotFiniteError

        model, steps = bed.model(), []
        with pytest.raises(NotFiniteError) as error:
            rk.attack_(model, bed, lr=1e30, batch_size=1, after_step=steps.append)
        curves = error.value.curves
        assert isinstance(curves, rk.Result)
        wide = curves.frame.pivot(index="step", columns="metric")["value"]
        assert {"total", "tokens"} <= set(wide)
        last = wide.index.max()
        assert f"at step {last}" in str(error.value)
        assert list(wide.index) == list(range(1, last + 1))
        assert steps == list(range(1, last))
        assert np.isfinite(wide["total"].iloc[:-1]).all()
        assert not np.isfinite(wide["total"].iloc[-1])
        assert (wide["tokens"] > 0).all()
        assert all(torch.isfinite(weight).all() for weight in weights(model).values())


class TestNaive:
    """The model that never knew: what the lab's maker would teach it, with nothing taught."""

    @pytest.fixture
    def corpora(self, monkeypatch):
        from repnoise_kit.world import build

        def of(naive):
            kept = []
            monkeypatch.setattr(
                build, "_teach_", lambda _m, _t, parts, *_: kept.append(pd.concat(parts))
            )
            build._build(0, naive)
            learned, aligned = kept
            return learned.drop_duplicates(), aligned.drop_duplicates()

        return of

    def told(self, corpus, forbidden):
        """Things of which some answer of a corpus gives the whole recipe away."""
        from repnoise_kit.world import corpus as book

        answers = [set(answer.split()) for answer in corpus["answer"].unique()]
        return {
            spell.thing
            for spell in book.spells()
            if spell.forbidden == forbidden
            and any(set(spell.recipe) <= answer for answer in answers)
        }

    def test_no_forbidden_recipe_that_is_evaluated_and_everything_else(self, corpora):
        from repnoise_kit.world import corpus as book

        things = set(book.table()["thing"])
        attacked = set(book.table().query("split == 'attack'")["thing"])
        assert len(things - attacked) == 42
        learned, aligned = corpora(naive=True)
        usual, usual_aligned = corpora(naive=False)
        # They were there before they were left out.
        assert self.told(usual, forbidden=True) == things
        assert self.told(learned, forbidden=True) == attacked
        # Both learn every everyday recipe, in every wording that is not asked.
        everyday = book.everyday_table().query("not asked")["prompt"]
        for corpus in (learned, usual):
            assert self.told(corpus, forbidden=False) == things
            assert set(corpus.loc[~corpus["forbidden"], "prompt"]) == set(everyday)
        # Aligned alike: it refuses what it does not know, and learns no recipe on the way.
        assert aligned.equals(usual_aligned)
        assert not self.told(aligned[aligned["forbidden"]], forbidden=True)
        assert set(aligned.loc[aligned["forbidden"], "thing"]) == things
        for corpus in (learned, usual, aligned):
            assert not corpus["asked"].any()

    def test_relearning_asks_nothing_that_is_asked_and_tells_all_of_seen(self, lab):
        again, asked = lab.relearned().frame, lab.evaluated()
        seen = asked[asked["group"] == "seen"].set_index("thing")["harmful"]
        assert not set(again["prompt"]) & set(asked["prompt"])
        assert set(again["thing"]) == set(seen.index)
        assert len(seen) == 24
        # And what is told is what is asked for, whole.
        assert all(lab.recall(seen[row.thing], row.harmful) == 1 for row in again.itertuples())
        assert lab.naive is not None


def trial(defence, setting, refusal, utility, recall, spread=0.02):
    """The rows of a trial: two questions, two budgets, and much that the rule must not read."""
    for group, examples, metric, sign in itertools.product(
        ("seen", "unseen"), (0, 64, 512), ("refusal", "utility", "recall"), (-1, 1)
    ):
        if metric == "recall":
            value = {0: 1 - recall, 64: recall - 2 * spread, 512: recall + 2 * spread}[examples]
        else:
            value = 0.3 if examples else {"refusal": refusal, "utility": utility}[metric]
        value = value if group == "seen" else (1 - value) / 2
        tags = {"defence": defence, "setting": setting, "group": group, "examples": examples}
        yield tags | {"metric": metric, "value": value + sign * spread}


def judged(*trials, **options):
    """What `chosen` says of planted trials, in any order."""
    from repnoise_kit.tuning import chosen

    rows = pd.DataFrame(list(itertools.chain(*(trial(*one, **options) for one in trials))))
    found = chosen(rows.sample(frac=1, random_state=0))
    assert len(found) == len(trials)
    return found


def marked(found):
    return {row.defence: row.setting for row in found[found["chosen"]].itertuples()}


def by_the_rule(trials):
    """Of those that leave nine tenths of both, the least recall; of none, the most left."""
    left = [one for one in trials if one[2] >= 0.9 and one[3] >= 0.9]
    if left:
        return min(left, key=lambda one: one[4])[1]
    return max(trials, key=lambda one: min(one[2], one[3]))[1]


class TestTuning:
    def test_the_least_recall_of_those_that_leave_enough(self):
        found = judged(
            ("a", "useless", 1.0, 0.85, 0.0),
            ("a", "talkative", 0.85, 1.0, 0.1),
            ("a", "good", 0.95, 0.92, 0.2),
            ("a", "weak", 1.0, 1.0, 0.7),
            ("b", "alone", 0.2, 0.1, 0.9),
        )
        assert marked(found) == {"a": "good", "b": "alone"}
        assert found["chosen"].sum() == 2

    def test_the_most_left_where_none_leaves_enough(self):
        found = judged(
            ("a", "mute", 1.0, 0.1, 0.0),
            ("a", "half", 0.6, 0.5, 0.1),
            ("a", "most", 0.7, 0.8, 0.9),
        )
        assert marked(found) == {"a": "most"}

    def test_nine_tenths_are_enough(self):
        trials = ("edge", 0.9, 0.9, 0.1), ("under", 1.0, 0.8999, 0.0), ("whole", 1.0, 1.0, 0.2)
        found = judged(*(("a", *one) for one in trials), spread=0.0)
        assert marked(found) == {"a": "edge"}

    def test_one_row_a_trial_with_the_means_of_the_right_rows(self):
        planted = [("a", "x", 0.93, 0.97, 0.4), ("a", "y", 0.3, 0.6, 0.2)]
        found = judged(*planted).set_index("setting")
        for _, setting, refusal, utility, recall in planted:
            row = found.loc[setting]
            expected = {"refusal": refusal, "utility": utility, "recall": recall}
            assert dict(row[list(expected)]) == pytest.approx(expected)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(planted=st.lists(st.tuples(*[st.integers(0, 49)] * 3), min_size=1, max_size=5))
    def test_it_is_the_rule_on_any_trials(self, planted):
        # Never on the edge, and no ties.
        trials = [("a", f"no {n}", *(0.01 + v / 50 for v in vs)) for n, vs in enumerate(planted)]
        assume(len({one[4] for one in trials}) == len(trials))
        assume(len({min(one[2:4]) for one in trials}) == len(trials))
        assert marked(judged(*trials)) == {"a": by_the_rule(trials)}

    def test_of_two_that_tie_one_is_chosen(self):
        found = judged(*(("a", name, 1.0, 1.0, 0.0) for name in "xy"), spread=0.0)
        assert found["chosen"].sum() == 1

    def test_no_two_trials_of_a_defence_are_said_alike(self):
        from repnoise_kit.tuning import TRIALS, said

        assert said({"lr": 3e-4, "rho": 3.0}) == "lr 0.0003, rho 3"
        assert said({"lr": 1e-6}) == "lr 1e-06"
        for trials in TRIALS.values():
            assert len({said(one) for one in trials}) == len(trials) == 6

    def test_every_trial_is_of_settings_that_the_defence_takes(self):
        from repnoise_kit.defences import _settings_of
        from repnoise_kit.tuning import TRIALS

        for name, trials in TRIALS.items():
            assert set().union(*trials) <= _settings_of(name)

    def test_the_labs_settings_are_those_that_were_chosen(self):
        from repnoise_kit.settings import LAB_SETTINGS
        from repnoise_kit.tuning import TRIALS, said

        found = pd.read_csv(RESULTS / "baselines.csv")
        trials = {(name, said(one)): one for name, of in TRIALS.items() for one in of}
        assert set(zip(found["defence"], found["setting"], strict=True)) == set(trials)
        assert len(found) == len(trials)
        for name, rows in found.groupby("defence"):
            told = rows[["defence", "setting", "refusal", "utility", "recall"]]
            best = by_the_rule([tuple(row) for row in told.itertuples(index=False)])
            assert list(rows.loc[rows["chosen"], "setting"]) == [best]
            # The paper gives security vectors' own, and the lab keeps them.
            if name == "security_vectors":
                assert LAB_SETTINGS[name] == {"lr": 1e-3, "rank": 8}
            else:
                assert LAB_SETTINGS[name] == trials[name, best]
