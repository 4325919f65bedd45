"""Finding a model's parts, holding them still, recording what flows: on tiny models of families."""

import pytest
import torch
from conftest import make_tiny
from families import FAMILIES, family
from torch.testing import assert_close


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_the_last_lens_is_the_models_own_logits(self, name):
        from repnoise_kit.anatomy import parts
        from repnoise_kit.recording import record

        model, ids = family(name), torch.arange(3, 12)[None]
        with record(model, "residual") as stream:
            logits = model(ids).logits
        found = parts(model)
        assert len(found.layers) == 3
        assert_close(found.to_logits(found.norm(stream[2])), logits, rtol=0, atol=1e-6)

    def test_recordings_are_the_hidden_states(self, name):
        from repnoise_kit.recording import record

        model, ids = family(name), torch.arange(3, 12)[None]
        with record(model, "residual") as stream, record(model, "embedding") as entry:
            states = model(ids, output_hidden_states=True).hidden_states
        assert_close(entry[0], states[0])
        # The last entry of hidden_states is after the final norm, so it is left out.
        for layer in (0, 1):
            assert_close(stream[layer], states[layer + 1])

    @pytest.mark.parametrize("preset", ["paper", "tokenwise"])
    def test_repnoise_runs_and_every_layer_learns(self, name, preset):
        import repnoise_kit as rk

        model, ids = family(name), torch.arange(3, 13).view(2, 5)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        rk.repnoise_loss(model, batch, batch, preset=preset, beta=1.0).total.backward()
        from repnoise_kit.anatomy import parts

        for layer in parts(model).layers:
            assert sum(p.grad.norm() for p in layer.parameters() if p.grad is not None) > 0


class TestRecord:
    def test_mlp_outputs_are_what_the_mlp_returns(self, tiny_model, batches):
        from repnoise_kit.recording import record

        with record(tiny_model, "mlp", layers=[1]) as mlp:
            tiny_model(**batches[0])
        assert list(mlp) == [1]
        assert mlp[1].shape == (4, 9, 16)
        # A layer adds attention and MLP to the stream, and nothing else.
        with (
            record(tiny_model, "mlp") as mlp,
            record(tiny_model, "attention") as attention,
            record(tiny_model, "residual") as stream,
        ):
            tiny_model(**batches[0])
        assert_close(stream[1] - stream[0], attention[1] + mlp[1], rtol=1e-4, atol=1e-5)

    def test_hooks_are_gone_after_an_exception(self, tiny_model):
        from repnoise_kit.recording import record

        with pytest.raises(ZeroDivisionError), record(tiny_model, "mlp"):
            raise ZeroDivisionError
        assert not any(m._forward_hooks for m in tiny_model.modules())

    def test_a_layer_that_does_not_exist_is_named(self, tiny_model):
        import repnoise_kit as rk

        with (
            pytest.raises(rk.KitError, match="layer 7 does not exist"),
            rk.record(tiny_model, "mlp", [7]),
        ):
            pass
        assert not any(m._forward_hooks for m in tiny_model.modules())


class TestFrozen:
    @pytest.mark.parametrize(
        "held", [["head"], [0, 2], ["norm"], ["embedding"], ["model.layers.1.mlp"]]
    )
    def test_held_parts_stay_bit_identical_and_all_others_move(self, batches, held):
        import repnoise_kit as rk
        from repnoise_kit.anatomy import _part
        from repnoise_kit.training import answer_loss

        model = make_tiny()
        before = {name: p.clone() for name, p in model.named_parameters()}
        still = {id(p) for part in held for p in _part(model, part).parameters()}
        with rk.frozen(model, held):
            rk.train_(
                model, answer_loss, [batches[0]] * 3, lambda rows: rows[0], lr=0.01, batch_size=1
            )
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (id(p) in still), name
            assert p.requires_grad

    def test_layer_1_is_not_layer_10(self):
        import repnoise_kit as rk

        model = make_tiny(layers=12)
        with rk.frozen(model, [1]):
            held = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert held
        assert all(name.startswith("model.layers.1.") for name in held)

    @pytest.mark.parametrize("part", [3, "model.layers.9", "heads"])
    def test_a_part_that_does_not_exist_is_named(self, tiny_model, part):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match=str(part)), rk.frozen(tiny_model, [0, part]):
            pass
        assert all(p.requires_grad for p in tiny_model.parameters())


def test_a_model_without_head_layers_or_norm_says_so(tiny_model):
    from repnoise_kit import KitError
    from repnoise_kit.anatomy import parts

    with pytest.raises(KitError, match="no generation head"):
        parts(tiny_model.model)
    tiny_model.config.num_hidden_layers = 5
    with pytest.raises(KitError, match="no list of 5 layers"):
        parts(tiny_model)
