"""The one way to train: it learns, repeats bit for bit, stops at nonsense, and leaves no trace."""

import random

import numpy as np
import pytest
import torch
from conftest import make_batches, make_tiny


def fit(model, loss=None, **changes):
    from repnoise_kit.training import answer_loss, train_

    rows = [make_batches(seed=seed)[0] for seed in range(6)]
    chosen = {"lr": 0.01, "batch_size": 1, "epochs": 2} | changes
    return train_(model, loss or answer_loss, rows, lambda batch: batch[0], **chosen)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns():
    curves = fit(make_tiny(), epochs=10).frame.query("metric == 'total'")["value"]
    assert curves.iloc[-5:].mean() < 0.6 * curves.iloc[:5].mean()


def test_same_seed_same_weights_bit_for_bit_and_another_seed_others():
    models = [make_tiny() for _ in range(3)]
    results = [fit(model, seed=seed) for model, seed in zip(models, (0, 0, 1), strict=True)]
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert results[0].frame.equals(results[1].frame)
    assert not torch.equal(weights(models[0]), weights(models[2]))


def test_it_is_adam_with_the_papers_schedule():
    """One parameter and a loss that is its value: Adam moves by the learning rate each step."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self):
            return self.w

    model = One()
    curves = fit(
        model, lambda m, _: {"total": m()}, lr=0.1, epochs=10 / 6, warmup=0.1, batch_size=1
    )
    rates = curves.frame.query("metric == 'lr'")["value"].to_numpy()
    steps = np.arange(10)
    expected = np.where(steps < 1, steps / 1, 0.5 * (1 + np.cos(np.pi * (steps - 1) / 9))) * 0.1
    assert rates == pytest.approx(expected, abs=1e-9)
    assert model.w.item() == pytest.approx(-expected.sum(), rel=1e-3)


def test_gradient_is_logged_and_not_clipped():
    curves = fit(make_tiny(), lambda m, b: {"total": 1000 * m(**b).loss}, epochs=1)
    norms = curves.frame.query("metric == 'grad_norm'")["value"]
    model = make_tiny()
    (1000 * model(**make_batches(seed=0)[0]).loss).backward()
    first = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norms.max() > 0.5 * first


def test_every_named_term_is_logged_at_every_step():
    from repnoise_kit.repnoise import repnoise_loss

    def loss(model, batch):
        return repnoise_loss(model, batch, batch)._asdict()

    wide = fit(make_tiny(), loss, epochs=1).frame.pivot(index="step", columns="metric")["value"]
    assert list(wide.index) == [1, 2, 3, 4, 5, 6]
    assert {"total", "retain", "noise", "ascent", "grad_norm", "lr"} == set(wide)
    expected = wide["retain"] + 0.001 * wide["noise"] - np.log(wide["ascent"])
    assert wide["total"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-4)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonsense_stops_training_and_keeps_the_last_good_weights(where):
    from repnoise_kit.training import NotFiniteError, answer_loss

    def loss(model, batch):
        loss.step += 1
        value = answer_loss(model, batch)["total"]
        if loss.step == 4 and where == "loss":
            value = value * float("nan")
        if loss.step == 4 and where == "gradient":
            # Finite itself, and of an infinite slope.
            value = value + (model.lm_head.weight.sum() * 0).sqrt()
        return {"total": value}

    loss.step = 0
    good, broken = make_tiny(), make_tiny()
    # Twelve steps are planned in both; the good one is stopped after three.
    with pytest.raises(StopIteration):
        fit(good, stopping(3))
    with pytest.raises(NotFiniteError, match=rf"{where} became (nan|inf) at step 4"):
        fit(broken, loss)
    assert torch.equal(weights(good), weights(broken))
    assert torch.isfinite(weights(broken)).all()


def test_an_update_that_spoils_the_weights_is_taken_back():
    """Too large a step shows in the next loss only: the weights kept are those before it."""
    from repnoise_kit.training import NotFiniteError

    model = make_tiny()
    with pytest.raises(NotFiniteError, match="loss became nan"):
        fit(model, lr=1e30, warmup=0.0)
    assert torch.isfinite(model(**make_batches(seed=0)[0]).loss)


def stopping(steps):
    from repnoise_kit.training import answer_loss

    seen = []

    def loss(model, batch):
        if len(seen) == steps:
            raise StopIteration
        seen.append(1)
        return answer_loss(model, batch)

    return loss


def test_it_leaves_the_process_and_the_model_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_tiny()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    fit(model)
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": -2}, "batch_size"),
    ],
)
def test_numbers_out_of_range_are_named(changes, name):
    from repnoise_kit import KitError

    with pytest.raises(KitError, match=name):
        fit(make_tiny(), **changes)


def test_nothing_to_train_on_is_said():
    import repnoise_kit as rk
    from repnoise_kit.training import answer_loss

    with pytest.raises(rk.KitError, match="nothing to train on"):
        rk.train_(make_tiny(), answer_loss, [], lambda rows: rows, lr=0.1)
