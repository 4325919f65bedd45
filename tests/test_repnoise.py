"""RepNoise against the paper's equations and the published code's, and against identities."""

import math

import pytest
import reference
import torch
from conftest import make_batches, make_tiny
from torch.testing import assert_close


@pytest.fixture
def rk():
    import repnoise_kit as rk

    return rk


def run(form, model, *args, **kwargs):
    """The terms of a loss drawn with seed 1, and the gradient of its total."""
    torch.manual_seed(1)
    terms = form(model, *args, **kwargs)
    model.zero_grad()
    terms.total.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return terms, {n: g.clone() for n, g in grads.items()}


def assert_same(one, other, rtol=1e-4):
    for name in ("total", "retain", "noise", "ascent"):
        assert_close(getattr(one[0], name), getattr(other[0], name), rtol=rtol, atol=1e-6)
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= rtol * grad.norm() + 1e-7, name


class TestPresets:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("weights", [(1.0, 0.001), (2.0, 4.0)])
    def test_reference_is_what_the_published_code_computes(self, rk, tiny_model, seed, weights):
        harmful, harmless, _ = make_batches(seed=seed)
        chosen = dict(zip(("alpha", "beta"), weights, strict=True))
        ours = run(rk.repnoise_loss, tiny_model, harmful, harmless, preset="reference", **chosen)
        assert_same(run(reference.published_loss, tiny_model, harmful, harmless, **chosen), ours)

    def test_reference_needs_no_labels(self, rk, tiny_model, batches):
        bare = [{k: v for k, v in b.items() if k != "labels"} for b in batches[:2]]
        with_labels = run(rk.repnoise_loss, tiny_model, *batches[:2], preset="reference")
        assert_same(with_labels, run(rk.repnoise_loss, tiny_model, *bare, preset="reference"))

    @pytest.mark.parametrize("with_retain", [False, True])
    def test_paper_is_algorithm_1(self, rk, tiny_model, batches, with_retain):
        harmful, harmless, retain = batches
        extra = {"retain": retain} if with_retain else {}
        ours = run(rk.repnoise_loss, tiny_model, harmful, harmless, **extra)
        assert_same(run(reference.slow_paper_loss, tiny_model, harmful, harmless, **extra), ours)

    def test_paper_takes_sides_of_unequal_width(self, rk, tiny_model, batches):
        harmful, harmless, _ = batches
        narrow = {name: part[:, :7] for name, part in harmless.items()}
        ours = run(rk.repnoise_loss, tiny_model, harmful, narrow)
        assert_same(run(reference.slow_paper_loss, tiny_model, harmful, narrow), ours)

    def test_tokenwise_noise_has_a_row_a_token(self, rk, tiny_model, batches):
        torch.manual_seed(1)
        expected = reference.slow_tokenwise_noise(tiny_model, batches[0])
        torch.manual_seed(1)
        found = rk.repnoise_loss(tiny_model, *batches[:2], preset="tokenwise").noise
        assert_close(found, expected)

    def test_total_is_the_sum_it_says(self, rk, tiny_model, batches):
        terms = rk.repnoise_loss(tiny_model, *batches[:2], alpha=2.0, beta=0.5)
        assert_close(terms.total, terms.retain + 0.5 * terms.noise - 2.0 * terms.ascent.log())


class TestKnobs:
    def value(self, rk, model, batches, **knobs):
        torch.manual_seed(1)
        return rk.repnoise_loss(model, *batches[:2], **knobs)

    @pytest.mark.parametrize("preset", ["paper", "reference", "tokenwise"])
    @pytest.mark.parametrize(
        ("knob", "values"),
        [
            ("mask", ["answer", "unequal", "none"]),
            ("retain_on", ["answer", "all"]),
            ("zero_logits", [False, True]),
            ("lens", ["layers", "published", "final", "mlp"]),
            ("lens_layers", [None, 1]),
            ("norm_last_twice", [False, True]),
            ("normalise", ["mean", "published", "sum"]),
            ("log", [False, True]),
            ("noise_on", ["mlp", "residual", "attention"]),
            ("rows", ["sequence", "token"]),
            ("unbiased", [False, True]),
            ("bandwidth", [None, 3.0]),
        ],
    )
    def test_every_knob_changes_the_loss_whatever_the_preset(
        self, rk, tiny_model, batches, preset, knob, values
    ):
        # Without the mask, or with the answers for a mask, pads and equal tokens come and go.
        found = [
            self.value(rk, tiny_model, batches, preset=preset, beta=1.0, **{knob: value}).total
            for value in values
        ]
        assert len({round(total.item(), 6) for total in found}) == len(values)

    def test_the_reference_is_paper_with_its_knobs_turned(self, rk, tiny_model, batches):
        turned = {k: v for k, v in rk.PRESETS["reference"].items() if v != rk.PRESETS["paper"][k]}
        assert_close(
            self.value(rk, tiny_model, batches, **turned).total,
            self.value(rk, tiny_model, batches, preset="reference").total,
        )

    def test_pads_and_token_zero_count_only_when_told(self, rk, tiny_model, batches):
        base = self.value(rk, tiny_model, batches, mask="unequal")
        assert self.value(rk, tiny_model, batches, mask="unequal", pads=True).retain != base.retain
        dropped = self.value(rk, tiny_model, batches, mask="unequal", drop_token_zero=True)
        assert dropped.ascent != base.ascent

    def test_a_noise_seed_draws_the_same_noise_at_each_step(self, rk, tiny_model, batches):
        values = [rk.repnoise_loss(tiny_model, *batches[:2], noise_seed=3).noise for _ in range(2)]
        assert values[0] == values[1]
        free = [rk.repnoise_loss(tiny_model, *batches[:2]).noise for _ in range(2)]
        assert free[0] != free[1]

    @pytest.mark.parametrize("preset", ["paper", "reference"])
    def test_some_layers_are_right_on_average_and_their_logarithm_is_too_small(
        self, rk, batches, preset
    ):
        model = make_tiny(layers=5)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 5  # So that layers differ.

        def ascent(**knobs):
            with torch.no_grad():
                return rk.repnoise_loss(model, *batches[:2], preset=preset, **knobs).ascent

        torch.manual_seed(0)
        some = torch.stack([ascent(lens_layers=2) for _ in range(400)])
        whole = ascent()
        assert abs(some.mean() - whole) < 3 * some.std() / 20
        assert some.std() > 0
        assert some.log().mean() < whole.log()
        count = 5 if preset == "paper" else 7
        assert_close(ascent(lens_layers=count), whole)
        with pytest.raises(rk.KitError, match=f"from 1 to {count} here, not {count + 1}"):
            ascent(lens_layers=count + 1)

    def test_the_last_lens_is_the_models_own_distribution(self, rk, tiny_model, batches):
        last = self.value(rk, tiny_model, batches, lens="final").ascent
        assert_close(last, tiny_model(**batches[0]).loss)


class TestConduct:
    def test_one_forward_pass(self, rk, tiny_model, batches):
        calls = []
        hook = tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
        rk.repnoise_loss(tiny_model, *batches[:2], retain=batches[2])
        hook.remove()
        assert len(calls) == 1

    def test_hooks_are_those_from_before_also_after_an_exception(self, rk, tiny_model, batches):
        tiny_model(**batches[0], output_hidden_states=True)  # transformers leaves hooks of its own
        mine = tiny_model.model.norm.register_forward_hook(lambda *_: None)
        before = hooks_of(tiny_model)
        rk.repnoise_loss(tiny_model, *batches[:2])
        assert hooks_of(tiny_model) == before
        broken = {**batches[0], "input_ids": batches[0]["input_ids"] + 10**6}
        with pytest.raises(IndexError):
            rk.repnoise_loss(tiny_model, broken, batches[1])
        assert hooks_of(tiny_model) == before
        mine.remove()

    @pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["alpha", "beta"])
    def test_weights_are_numbers_of_zero_or_more(self, rk, tiny_model, batches, name, bad):
        with pytest.raises(rk.KitError, match=name):
            rk.repnoise_loss(tiny_model, *batches[:2], **{name: bad})

    def test_what_does_not_exist_or_fit_is_named(self, rk, tiny_model, batches):
        harmful, harmless, retain = batches
        with pytest.raises(rk.KitError, match="no preset 'official'"):
            rk.repnoise_loss(tiny_model, harmful, harmless, preset="official")
        with pytest.raises(rk.KitError, match="no knob 'maks'"):
            rk.repnoise_loss(tiny_model, harmful, harmless, maks="none")
        with pytest.raises(rk.KitError, match="mask must be one of"):
            rk.repnoise_loss(tiny_model, harmful, harmless, mask="nonsense")
        with pytest.raises(rk.KitError, match="4 harmful rows have 3 harmless"):
            rk.repnoise_loss(tiny_model, harmful, retain)
        bare = {name: part for name, part in harmless.items() if name != "labels"}
        with pytest.raises(rk.KitError, match="harmless batch has no 'labels'"):
            rk.repnoise_loss(tiny_model, harmful, bare)
        narrow = {name: part[:, :7] for name, part in harmless.items()}
        with pytest.raises(rk.KitError, match="one shape"):
            rk.repnoise_loss(tiny_model, harmful, narrow, preset="reference")


def test_a_term_without_weight_has_no_gradient_and_changes_none(rk):
    """As if it were taken off the total, whose other parts stay as they are."""
    for weights, off in (({"alpha": 0.0}, "ascent"), ({"beta": 0.0}, "noise")):
        one = run(rk.repnoise_loss, make_tiny(), *make_batches()[:2], **weights)
        assert not getattr(one[0], off).requires_grad
        whole = {"alpha": 1.0, "beta": 0.001} | weights
        plain = reference.slow_paper_loss
        assert_same(one, run(plain, make_tiny(), *make_batches()[:2], **whole))


def hooks_of(model):
    return {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    }


def test_noise_reaches_every_layer_and_ascent_the_head(rk):
    model = make_tiny()
    harmful, harmless, _ = make_batches()
    terms = rk.repnoise_loss(model, harmful, harmless)
    terms.noise.backward(retain_graph=True)
    assert all(layer.mlp.down_proj.weight.grad.norm() > 0 for layer in model.model.layers)
    assert model.lm_head.weight.grad is None
    terms.ascent.backward()
    assert model.lm_head.weight.grad.norm() > 0
