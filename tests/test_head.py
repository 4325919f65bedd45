"""The head chunk by chunk against the head at once: values, gradients, what is held, bounds."""

import pytest
import torch
from conftest import make_batches, make_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from repnoise_kit import head, repnoise_loss
from repnoise_kit.anatomy import Parts
from repnoise_kit.head import summed_ce

WIDTH, WORDS = 6, 11


def reader(norms=1, scale=0.7, soft_cap=2.0, dtype=torch.float32):
    """A norm and a head with a bias, whose logits are scaled and squashed."""
    torch.manual_seed(0)
    norm, out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)
    nn.init.normal_(norm.weight)
    return Parts(nn.ModuleList(), norm, out, scale, soft_cap).reader(norms).to(dtype)


def given_rows(count, dtype=torch.float32):
    draw = torch.Generator().manual_seed(count)
    rows = torch.randn(count, WIDTH, generator=draw).to(dtype).requires_grad_()
    return rows, torch.randint(WORDS, (count,), generator=draw)


def at_once(rows, labels, unembed, keep=None):
    logits = unembed(rows).float()
    logits = logits if keep is None else logits * keep.unsqueeze(-1)
    return F.cross_entropy(logits, labels, reduction="sum")


def gradients(form, rows, labels, unembed, *keep):
    """The value of a form, and its gradients by the rows and by every weight."""
    value = 3 * form(rows, labels, unembed, *keep)
    return [value, *torch.autograd.grad(value, [rows, *unembed.parameters()])]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of as many rows as the model is wide."""
    monkeypatch.setattr(head, "LOGITS", 1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 2), st.booleans(), st.sampled_from([1, 90, 2**24]))
def test_value_and_gradients_are_those_of_all_logits_at_once(count, norms, kept, logits):
    rows, labels = given_rows(count)
    keep = (labels % 3 > 0).float() if kept else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LOGITS", logits)
        ours = gradients(summed_ce, rows, labels, reader(norms or 1), keep)
    for one, other in zip(
        ours, gradients(at_once, rows, labels, reader(norms or 1), keep), strict=True
    ):
        assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_no_chunk_is_larger_than_it_may_be_and_no_logits_are_kept(monkeypatch):
    rows, labels = given_rows(40)
    unembed, sizes, kept = reader(), [], []
    real = head._ce
    monkeypatch.setattr(head, "_ce", lambda u, x, *r: sizes.append(len(x)) or real(u, x, *r))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda part: kept.append(part.shape) or part, lambda part: part
    ):
        summed_ce(rows, labels, unembed)
    # A chunk's own graph is gone with the chunk: what stays is as large as rows and weights.
    assert sizes == [6] * 6 + [4]
    assert (40, WORDS) not in kept
    held = [shape for shape in kept if len(shape) == 2 and shape[0] == 40]
    assert held == [(40, WIDTH)]
    at_once(rows, labels, unembed)  # It would have been there.
    with torch.autograd.graph.saved_tensors_hooks(
        lambda part: kept.append(part.shape) or part, lambda part: part
    ):
        at_once(rows, labels, unembed)
    assert (40, WORDS) in kept


@pytest.mark.usefixtures("small_chunks")
def test_a_head_that_is_held_still_gets_no_gradient():
    rows, labels = given_rows(20)
    unembed = reader()
    unembed.head.weight.requires_grad_(False)
    summed_ce(rows, labels, unembed).backward()
    assert unembed.head.weight.grad is None
    other = rows.detach().requires_grad_()
    expected = at_once(other, labels, reader())
    expected.backward()
    assert_close(rows.grad, other.grad)
    assert unembed.head.bias.grad.norm() > 0


@pytest.mark.usefixtures("small_chunks")
def test_without_gradients_it_is_only_the_value():
    rows, labels = given_rows(20)
    with torch.no_grad():
        assert_close(summed_ce(rows, labels, reader()), at_once(rows, labels, reader()))
    still = reader().requires_grad_(False)
    assert not summed_ce(rows.detach(), labels, still).requires_grad
    none = summed_ce(rows[:0].detach(), labels[:0], still)
    assert none == 0


def test_twice_through_one_graph_and_no_gradient_of_a_gradient():
    rows, labels = given_rows(20)
    loss = summed_ce(rows, labels, reader())
    first, second = (torch.autograd.grad(loss, rows, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)
    (slope,) = torch.autograd.grad(loss**2, rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_half_precision_it_is_as_near_the_truth_as_all_at_once(how):
    """Sums over chunks are taken in float32, so that the error is that of bf16 itself."""
    half = torch.bfloat16 if how == "weights" else torch.float32
    rows, labels = given_rows(400)
    truth = gradients(at_once, rows, labels, reader())
    low = rows.detach().to(half).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        ours = gradients(summed_ce, low, labels, reader(dtype=half))
        plain = gradients(at_once, low, labels, reader(dtype=half))
    for one, other, true in zip(ours, plain, truth, strict=True):
        assert one.dtype == other.dtype
        error, usual = ((found.float() - true).detach().norm() for found in (one, other))
        assert error <= max(1.2 * usual, 0.01 * true.detach().norm())


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("preset", ["paper", "reference", "tokenwise"])
def test_the_whole_loss_is_the_same_in_chunks_and_at_once(preset, monkeypatch):
    found = []
    for form in (head.summed_ce, at_once):
        model = make_tiny()
        monkeypatch.setattr("repnoise_kit.losses.summed_ce", form)
        harmful, harmless, _ = make_batches()
        torch.manual_seed(3)
        terms = repnoise_loss(model, harmful, harmless, preset=preset, beta=1.0)
        terms.total.backward()
        found.append([*terms, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)
