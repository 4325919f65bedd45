"""The equations against slow loops, against Hugging Face, and against known magnitudes."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

# The mean of the biased estimate at 40,000 dimensions (two Gaussians, one scaled by s).
MAGNITUDES = {
    4: {0.01: 3.285, 0.1: 3.18, 0.5: 1.99, 1: 1.55, 2: 1.99, 10: 3.18},
    8: {0.01: 2.798, 0.1: 2.68, 0.5: 1.29, 1: 0.774, 2: 1.29, 10: 2.68},
}
FAST = settings(max_examples=25, deadline=None, derandomize=True)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def losses():
    from repnoise_kit import losses

    return losses


class TestMMD:
    def test_equals_the_double_loop_and_the_published_form(self, losses):
        x, y = draw(5, 7), 1.5 * draw(5, 7, seed=1)
        assert_close(losses.mmd(x, y), reference.slow_mmd(x, y))
        assert_close(losses.mmd(x, y), reference.published_mmd(x, y))

    def test_of_samples_without_spread_or_rows_it_is_nothing(self, losses):
        for x in (torch.zeros(4, 6), torch.zeros(0, 6)):
            x.requires_grad_()
            found = losses.mmd(x, x.detach().clone())
            found.backward()
            assert found == 0
            assert torch.equal(x.grad, torch.zeros_like(x))

    def test_mixed_precision_leaves_its_distances_in_float32(self, losses):
        x, y = draw(5, 64), 1.5 * draw(5, 64, seed=1)
        plain = losses.mmd(x, y)
        with torch.autocast("cpu", torch.bfloat16):
            assert losses.mmd(x, y) == plain

    def test_so_do_its_gradients(self, losses):
        grads = []
        for form in (losses.mmd, reference.slow_mmd):
            x = draw(4, 6).requires_grad_()
            form(x, 2 * draw(4, 6, seed=1)).backward()
            grads.append(x.grad)
        assert_close(*grads)

    @pytest.mark.parametrize("rows", [4, 8])
    def test_has_the_known_magnitudes(self, losses, rows):
        for scale, expected in MAGNITUDES[rows].items():
            value = losses.mmd(scale * draw(rows, 40_000), draw(rows, 40_000, seed=1))
            assert value.item() == pytest.approx(expected, abs=0.01), scale

    @FAST
    @given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
    def test_is_symmetric_bounded_and_blind_to_order(self, rows, width, seed):
        from repnoise_kit.losses import mmd

        x, y = draw(rows, width, seed=seed), draw(rows, width, seed=seed + 100)
        value = mmd(x, y)
        assert_close(value, mmd(y, x))
        assert_close(value, mmd(x[torch.randperm(rows)], y), rtol=1e-4, atol=1e-5)
        assert 0 <= value <= 10

    def test_is_zero_for_a_sample_with_itself(self, losses):
        x = draw(6, 9)
        assert losses.mmd(x, x).item() == pytest.approx(0, abs=1e-6)

    def test_without_bias_it_is_zero_on_average_for_one_distribution(self, losses):
        pairs = [(draw(8, 50, seed=s), draw(8, 50, seed=s + 1000)) for s in range(200)]
        values = torch.stack([losses.mmd(x, y, unbiased=True) for x, y in pairs])
        assert abs(values.mean()) < 3 * values.std() / len(pairs) ** 0.5
        # The biased form is far from it.
        assert losses.mmd(*pairs[0]) > 0.5

    def test_a_fixed_bandwidth_is_the_one_used(self, losses):
        x, y = torch.zeros(2, 1), torch.full((2, 1), 3.0)
        kernels = sum(torch.exp(torch.tensor(-9.0 / (2.0 * 2.0**k))) for k in range(-2, 3))
        assert_close(losses.mmd(x, y, bandwidth=2.0), 2 * (5 - kernels))


class TestCrossEntropy:
    def test_masked_ce_equals_the_loop_and_hugging_face(self, losses, tiny_model, batches):
        harmful = batches[0]
        output = tiny_model(**harmful)
        assert_close(losses.masked_ce(output.logits, harmful["labels"]), output.loss)
        assert_close(output.loss, reference.slow_masked_ce(output.logits, harmful["labels"]))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, losses, tiny_model, batches, side):
        retain = batches[2]
        wide = {
            name: torch.nn.functional.pad(
                part, (3, 0) if side == "left" else (0, 3), value=-100 if name == "labels" else 0
            )
            for name, part in retain.items()
        }
        values = [
            losses.masked_ce(
                tiny_model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits,
                b["labels"],
            )
            for b in (retain, wide)
        ]
        assert_close(*values)

    def test_lens_ce_is_masked_ce_of_all_logits(self, losses, tiny_model, batches):
        hidden, labels = draw(4, 9, 16), batches[0]["labels"]
        assert_close(
            losses.lens_ce(hidden, labels, tiny_model.lm_head),
            losses.masked_ce(tiny_model.lm_head(hidden), labels),
        )

    def test_zeroed_logits_cost_log_vocabulary(self, losses, tiny_model, batches):
        hidden, labels = draw(4, 9, 16), batches[0]["labels"]
        value = losses.lens_ce(hidden, labels, tiny_model.lm_head, torch.zeros(4, 9))
        assert_close(value, torch.tensor(50.0).log())
