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


def test_a_defence_that_spoils_the_weights_says_so():
    """Not that its model's logits are strange, which they are by then."""
    from repnoise_kit import repnoise_loss
    from repnoise_kit.training import NotFiniteError

    def loss(model, batch):
        return repnoise_loss(model, *make_batches()[:2])._asdict()

    with pytest.raises(NotFiniteError, match=r"became (nan|inf)"):
        fit(make_tiny(), loss, lr=1e30, warmup=0.0)


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
        ({"warmup": 5}, "warmup is a share"),
        ({"betas": (0.9, 1.0)}, "betas must be smaller than 1"),
        ({"schedule": "cosinus"}, "no schedule 'cosinus'.*cosine"),
    ],
)
def test_numbers_out_of_range_are_named(changes, name):
    from repnoise_kit import KitError

    with pytest.raises(KitError, match=name):
        fit(make_tiny(), **changes)


def test_every_schedule_that_is_named_trains():
    from repnoise_kit.training import SCHEDULES

    rates = {
        name: tuple(
            fit(make_tiny(), schedule=name, epochs=1).frame.query("metric == 'lr'")["value"]
        )
        for name in SCHEDULES
    }
    assert all(max(found) > 0 for found in rates.values())
    assert len(set(rates.values())) >= len(SCHEDULES) - 1  # One restart is none.


@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_of_the_users_own_stays(before):
    model = make_tiny()
    if before:
        model.gradient_checkpointing_enable()
    fit(model, epochs=1, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing is before


def test_a_model_held_still_is_refused():
    from repnoise_kit import KitError

    with pytest.raises(KitError, match="every weight of the model is held still"):
        fit(make_tiny().requires_grad_(False))


def test_of_a_model_too_large_for_a_copy_no_good_weights_are_promised(monkeypatch):
    from repnoise_kit import trainer
    from repnoise_kit.training import NotFiniteError

    monkeypatch.setattr(trainer, "LARGE", 0)
    with pytest.raises(NotFiniteError, match=r"loss became nan .* may have spoiled it"):
        fit(make_tiny(), lr=1e30, warmup=0.0)


def test_a_part_without_labels_counts_for_nothing():
    """Of a batch in two parts one of which has nothing to learn, the other is all."""
    from repnoise_kit import KitError
    from repnoise_kit.training import answer_loss, train_

    learnt = make_batches(seed=0)[0]
    empty = learnt | {"labels": torch.full_like(learnt["labels"], -100)}

    def trained(*rows, parts):
        model, (lr, size) = make_tiny(), (0.01, len(rows))

        def collate(some):
            return {name: torch.cat([row[name] for row in some]) for name in learnt}

        how = {"batch_size": size, "accumulation": parts, "lr": lr, "epochs": 2, "warmup": 0.0}
        return model, train_(model, answer_loss, rows, collate, **how)

    alone, curves = trained(learnt, parts=1)
    for rows in ((learnt, empty), (empty, learnt, empty)):
        model, its_curves = trained(*rows, parts=len(rows))
        assert torch.allclose(weights(alone), weights(model), atol=1e-7)
        total = [found.frame.query("metric == 'total'")["value"] for found in (curves, its_curves)]
        assert total[0].to_numpy() == pytest.approx(total[1].to_numpy(), rel=1e-6)
    with pytest.raises(KitError, match="no token to learn"):
        trained(empty, empty, parts=2)


class TestMixedPrecision:
    """As on a GPU: accelerate wraps the model's forward in bf16."""

    @pytest.fixture(autouse=True)
    def bf16(self, monkeypatch):
        from repnoise_kit import training

        monkeypatch.setattr(training, "precision", lambda device: "bf16")

    def test_the_head_is_run_in_it_too(self):
        from repnoise_kit import repnoise_loss

        seen = []

        def loss(model, batch):
            return repnoise_loss(model, *make_batches()[:2], beta=5.0)._asdict()

        model = make_tiny()
        model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        fit(model, loss, epochs=1)
        assert set(seen) == {torch.bfloat16}

    def test_a_trained_model_computes_as_it_did(self):
        """With a learning rate of 0 nothing moves, so that nothing may differ."""
        import copy

        model, batch = make_tiny(), make_batches()[0]
        before = model(**batch).logits
        for _ in range(2):
            fit(model, lr=0.0, epochs=1)
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, before)

    def test_a_forward_of_the_users_own_is_kept(self):
        model, calls = make_tiny(), []
        inner = model.forward

        def own(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        model.forward = own
        fit(model, epochs=1)
        assert model.forward is own
        assert len(calls) == 6


def test_a_batch_is_never_spread_over_the_gpus_of_one_process(monkeypatch, tmp_path):
    from transformers import TrainingArguments

    from repnoise_kit.trainer import OneDevice

    for there, expected in ((0, 0), (1, 1), (4, 1)):
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self, there=there: there))
        assert OneDevice(output_dir=str(tmp_path), use_cpu=True).n_gpu == expected


class TestOfACopyThatIsCutUp:
    """What FSDP cuts up is a copy; its weights come back when every process is done."""

    def test_what_befalls_one_process_leaves_its_model_alone(self, monkeypatch):
        from repnoise_kit import processes, training

        monkeypatch.setattr(processes, "sharded", lambda: True)
        model = make_tiny()
        start = weights(model).clone()

        def fail(error):
            with training._in_one_piece(model) as cut, torch.no_grad():
                next(cut.parameters()).add_(1.0)
                raise error

        for error, back in ((MemoryError(), False), (training.NotFiniteError(), True)):
            with pytest.raises(type(error)):
                fail(error)
            assert torch.equal(weights(model), start) is not back


def test_nothing_to_train_on_is_said():
    import repnoise_kit as rk
    from repnoise_kit.training import answer_loss

    with pytest.raises(rk.KitError, match="nothing to train on"):
        rk.train_(make_tiny(), answer_loss, [], lambda rows: rows, lr=0.1)
