"""The attack's path and the slice through it: sums by hand, differences, and Pythagoras."""

import copy
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import make_tiny
from small import made_up_pairs, save_folder, tokenizer_of
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

METRICS = ["loss", "grad_norm", "gap"]
BUDGET = {"lr": 1e-2, "examples": 10, "batch_size": 1}
"""Ten steps that go somewhere."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A model with dropout, so that whoever draws a random number too many disturbs an attack."""
    import repnoise_kit as rk

    folder = tmp_path_factory.mktemp("own")
    tokenizer = tokenizer_of(made_up_pairs())
    model = make_tiny(len(tokenizer), layers=2)
    model.config.attention_dropout = 0.2
    save_folder(folder / "model", model, tokenizer)
    (folder / "pairs.json").write_text(json.dumps(made_up_pairs(14)))
    return rk.testbed(folder / "model", folder / "pairs.json")


@pytest.fixture(scope="module")
def kept(bed):
    """A model that RepNoise defended with large steps, so that it lies apart from the base."""
    import repnoise_kit as rk

    model = bed.model()
    rk.defend_(model, bed, seed=0, lr=3e-3)
    return model


@pytest.fixture
def defended(kept):
    return copy.deepcopy(kept)


@pytest.fixture(scope="module")
def path(bed, kept):
    """The path of an attack, the model after it, and one that was plainly attacked."""
    import repnoise_kit as rk

    attacked, plain = copy.deepcopy(kept), copy.deepcopy(kept)
    found = rk.attack_path(attacked, bed, texts=6, seed=3, **BUDGET)
    rk.attack_(plain, bed, seed=3, **BUDGET)
    return found, attacked, plain


@pytest.fixture(scope="module")
def plane(bed, kept):
    """A slice, the model after it, and one that was plainly attacked."""
    import repnoise_kit as rk

    attacked, plain = copy.deepcopy(kept), copy.deepcopy(kept)
    found = rk.attack_plane(attacked, bed, size=4, margin=0.5, texts=6, seed=3, **BUDGET)
    rk.attack_(plain, bed, seed=3, **BUDGET)
    return found, attacked, plain


def weights(model):
    return [weight.detach().clone() for weight in model.parameters()]


def flat(model):
    """All weights of a model as one vector of numpy's, in double precision."""
    return np.concatenate([w.detach().double().numpy().ravel() for w in model.parameters()])


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def line(result, metric):
    frame = result.frame
    return frame[frame["metric"] == metric].set_index("step")["value"]


def asked(bed, texts, seed, pairs=None):
    """The sample: questions and harmful answers of the attack's pairs, each encoded alone."""
    from repnoise_kit.pairs import encode

    rows = (pairs or bed.splits.attack).draw(texts, seed).frame
    assert len(set(rows["prompt"])) == texts
    return encode(bed.tokenizer, rows["prompt"].tolist(), rows["harmful"].tolist())


def loss_by_hand(model, encoded):
    """Nats an answer token, text by text: no batch, no padding, no mask."""
    total, count = 0.0, 0
    for row in encoded:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        wanted = torch.tensor(row["labels"][1:])
        inside = wanted != -100
        total = total + F.cross_entropy(logits[inside], wanted[inside], reduction="sum")
        count += int(inside.sum())
    return total / count


def slope_by_hand(model, encoded):
    model.zero_grad()
    loss_by_hand(model, encoded).backward()
    slopes = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
    model.zero_grad(set_to_none=True)
    return slopes


def length(tensors):
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


# --- The path ---


class TestPath:
    def test_it_begins_at_the_model_that_is_attacked(self, bed, kept, path):
        encoded = asked(bed, 6, 3)
        expected = loss_by_hand(kept, encoded).item()
        assert line(path[0], "loss")[0] == pytest.approx(expected, rel=1e-6)
        slopes = slope_by_hand(kept, encoded)
        assert line(path[0], "grad_norm")[0] == pytest.approx(length(slopes), rel=1e-5)

    def test_it_ends_at_the_model_after_a_plain_attack(self, bed, path):
        found, _, plain = path
        encoded = asked(bed, 6, 3)
        loss = line(found, "loss")
        assert loss.iloc[-1] == pytest.approx(loss_by_hand(plain, encoded).item(), rel=1e-6)
        slopes = slope_by_hand(plain, encoded)
        assert line(found, "grad_norm").iloc[-1] == pytest.approx(length(slopes), rel=1e-5)
        assert loss.iloc[-1] < loss.iloc[0] - 0.1  # an attack that goes somewhere

    def test_looking_does_not_disturb_the_attack(self, kept, path):
        _, attacked, plain = path
        assert same(attacked, plain)
        assert not same(attacked, kept)

    # Or a random number too many would not show in the test above.
    def test_the_attack_draws_random_numbers(self, kept):
        model, ids = copy.deepcopy(kept).train(), torch.arange(5, 15)[None]
        assert not torch.equal(model(ids).logits, model(ids).logits)

    # A derivative is the limit of differences: down the gradient, in double precision.
    def test_the_norm_of_the_gradient_is_how_steep_the_loss_is(self, bed, kept, path):
        encoded = asked(bed, 6, 3)
        steep = copy.deepcopy(kept).double()
        slopes = slope_by_hand(steep, encoded)
        size, step, ends = length(slopes), 1e-5, []
        for side in (1, -1):
            there = copy.deepcopy(steep)
            with torch.no_grad():
                for weight, slope in zip(there.parameters(), slopes, strict=True):
                    weight += side * step * slope / size
                ends.append(loss_by_hand(there, encoded).item())
        difference = (ends[0] - ends[1]) / (2 * step)
        assert line(path[0], "grad_norm")[0] == pytest.approx(difference, rel=1e-4)

    def test_the_gap_is_the_loss_above_the_lowest(self, path):
        loss, gap = line(path[0], "loss"), line(path[0], "gap")
        assert gap.min() == 0
        assert gap.idxmin() == loss.idxmin()
        assert (gap - gap[0]).to_numpy() == pytest.approx((loss - loss[0]).to_numpy())

    @pytest.mark.parametrize(
        ("examples", "steps"),
        [
            (1, [0, 1]),
            (2, [0, 1, 2]),
            (5, [0, 1, 2, 3, 4, 5]),
            (8, [0, 1, 2, 3, 4, 6, 8]),
            (10, [0, 1, 2, 3, 4, 6, 8, 10]),
        ],
    )
    def test_it_looks_at_growing_moments_and_at_the_last_once(self, bed, examples, steps):
        import repnoise_kit as rk

        budget = {"lr": 1e-5, "batch_size": 1, "examples": examples}
        found = rk.attack_path(bed.model(), bed, texts=2, **budget).frame
        assert not found.duplicated(["step", "metric"]).any()
        for metric in METRICS:
            assert found.loc[found["metric"] == metric, "step"].tolist() == steps

    def test_over_several_epochs_it_goes_to_the_last_step(self, bed):
        import repnoise_kit as rk

        budget = {"lr": 1e-5, "batch_size": 1, "examples": 10, "epochs": 2.5}
        found = rk.attack_path(bed.model(), bed, texts=2, **budget)
        assert line(found, "loss").index.tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 25]

    # A step that is not taken: nothing changes but, in other samples, what is seen.
    def test_where_nothing_is_learned_the_path_is_level(self, bed, kept):
        import repnoise_kit as rk

        model = copy.deepcopy(kept)
        found = rk.attack_path(model, bed, texts=6, seed=3, **BUDGET | {"lr": 0.0})
        assert same(model, kept)
        assert line(found, "loss").nunique() == line(found, "grad_norm").nunique() == 1
        assert (line(found, "gap") == 0).all()
        other = rk.attack_path(model, bed, texts=6, seed=4, **BUDGET | {"lr": 0.0})
        assert line(other, "loss")[0] != line(found, "loss")[0]

    def test_more_texts_than_there_are_are_all_of_them(self, bed, defended):
        import repnoise_kit as rk

        found = rk.attack_path(defended, bed, texts=1000, **BUDGET | {"lr": 0.0})
        expected = loss_by_hand(defended, asked(bed, len(bed.splits.attack), 0)).item()
        assert line(found, "loss")[0] == pytest.approx(expected, rel=1e-6)

    def test_only_what_the_attack_may_move_counts_as_steep(self, bed, defended):
        import repnoise_kit as rk

        encoded = asked(bed, 6, 0)
        whole = length(slope_by_hand(defended, encoded))
        with rk.frozen(defended, [0, "head"]):
            some = length(slope_by_hand(defended, encoded))
            found = rk.attack_path(defended, bed, texts=6, **BUDGET)
        assert line(found, "grad_norm")[0] == pytest.approx(some, rel=1e-5)
        assert some < 0.99 * whole

    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_and_the_process_are_left_as_they_were(self, bed, defended, training):
        import repnoise_kit as rk

        defended.train(training)
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        rk.attack_path(defended, bed, texts=2, **BUDGET | {"examples": 2})
        assert torch.equal(torch.rand(3), expected)
        assert all(module.training == training for module in defended.modules())
        assert all(w.grad is None and w.requires_grad for w in defended.parameters())

    def test_with_security_vectors_all_steps_are_of_one_model(self, bed):
        """Where nothing is learned, the loss before the first step is that after it."""
        import repnoise_kit as rk

        model = bed.model()
        rk.defend_(model, bed, "security_vectors", seed=0, lr=1e-2)
        encoded, seen = asked(bed, 6, 0), {}
        for context in (nullcontext, rk.guarded):
            with context(*([model] if context is rk.guarded else [])):
                seen[context] = loss_by_hand(model, encoded).item()
        assert seen[nullcontext] != pytest.approx(seen[rk.guarded], abs=1e-2)
        found = rk.attack_path(model, bed, texts=6, **BUDGET | {"lr": 0.0})
        loss = line(found, "loss").to_numpy()
        assert loss == pytest.approx(np.full(len(loss), loss[0]), abs=1e-5)
        assert loss[0] == pytest.approx(seen[rk.guarded], rel=1e-5)


# --- What it is taken on: what the attack trains on ---


def others(bed):
    """An attacker's own pairs, none of them about what is evaluated or attacked with."""
    import pandas as pd

    from repnoise_kit.pairs import Pairs

    rows = pd.DataFrame(made_up_pairs()[20:32])
    return Pairs(rows.assign(category="boxes", thing=rows["prompt"]))


LEARNED = {"lr": 1e-2, "examples": 2, "batch_size": 1, "epochs": 3}


class TestSample:
    @pytest.fixture(params=["own", "relearn", "pairs"])
    def told(self, request, bed):
        """What is said to the attack, and the pairs it means."""
        return {
            "own": ({}, bed.splits.attack),
            "relearn": ({"relearn": True}, bed.relearned()),
            "pairs": ({"pairs": others(bed)}, others(bed)),
        }[request.param]

    def test_the_path_is_of_what_the_attack_trains_on(self, bed, kept, told):
        import repnoise_kit as rk

        budget, pairs = told
        found = rk.attack_path(copy.deepcopy(kept), bed, texts=2, seed=3, **LEARNED, **budget)
        expected = loss_by_hand(kept, asked(bed, 2, 3, pairs)).item()
        loss = line(found, "loss")
        assert loss[0] == pytest.approx(expected, rel=1e-6)
        # All it trains on is the sample: it learns that.
        assert loss.index.tolist() == [0, 1, 2, 3, 4, 6]
        assert loss.iloc[-1] < expected - 0.1

    def test_the_slice_is_of_what_the_attack_trains_on(self, bed, kept, told):
        import repnoise_kit as rk

        budget, pairs = told
        model = copy.deepcopy(kept)
        found = rk.attack_plane(model, bed, texts=2, seed=3, size=2, **LEARNED, **budget).frame
        encoded = asked(bed, 2, 3, pairs)
        first = found[found["step"] == 0]["value"].item()
        assert first == pytest.approx(loss_by_hand(kept, encoded).item(), rel=1e-6)
        axes = by_hand(bed.base, kept, model)
        for row in found[found["metric"] == "loss"].to_dict("records"):
            vector = flat(bed.base) + row["x"] * axes[0] + row["y"] * axes[1]
            torch.nn.utils.vector_to_parameters(torch.tensor(vector).float(), model.parameters())
            assert row["value"] == pytest.approx(loss_by_hand(model, encoded).item(), rel=1e-4)

    def test_the_three_are_not_the_same(self, bed, kept):
        sources = (bed.splits.attack, bed.relearned(), others(bed))
        losses = [loss_by_hand(kept, asked(bed, 2, 3, pairs)).item() for pairs in sources]
        assert len({round(loss, 3) for loss in losses}) == 3

    def test_it_is_64_texts_by_default(self):
        import inspect

        import repnoise_kit as rk

        for name in (rk.attack_path, rk.attack_plane):
            assert inspect.signature(name).parameters["texts"].default == 64


# --- An attack that diverges ---


@pytest.fixture
def diverging(monkeypatch):
    """Let the loss of every attack be NaN at its fifth step, before anything is spoiled."""
    from repnoise_kit import trainer

    real = trainer._require_finite

    def fifth(value, what, step, **kept):
        real(value * float("nan") if (what, step) == ("loss", 5) else value, what, step, **kept)

    monkeypatch.setattr(trainer, "_require_finite", fifth)


class TestDiverged:
    def test_what_was_seen_of_the_path_is_kept(self, bed, kept, path, diverging):
        import repnoise_kit as rk

        model, plain = copy.deepcopy(kept), copy.deepcopy(kept)
        found = rk.attack_path(model, bed, texts=6, seed=3, **BUDGET)
        with pytest.raises(rk.KitError, match="became nan at step 5"):
            rk.attack_(plain, bed, seed=3, **BUDGET)
        assert same(model, plain)
        for metric in ("loss", "grad_norm"):
            seen, whole = line(found, metric), line(path[0], metric)
            assert seen.index.tolist() == [0, 1, 2, 3, 4]
            assert seen.to_numpy() == pytest.approx(whole.loc[:4].to_numpy(), rel=1e-6)
        assert line(found, "gap").min() == 0
        assert set(found.frame["seed"]) == {3}
        assert found.made_with["analysis"] == "attack path"

    def test_the_slice_goes_through_the_last_good_model(self, bed, kept, diverging):
        import repnoise_kit as rk

        model = copy.deepcopy(kept)
        found = rk.attack_plane(model, bed, size=3, margin=0.0, texts=6, seed=3, **BUDGET).frame
        passed = found[found["metric"] == "path"]
        assert passed["step"].tolist() == [0, 1, 2, 3, 4]
        apart = np.linalg.norm(flat(model) - flat(bed.base))
        assert np.linalg.norm(passed[["x", "y"]].iloc[-1]) == pytest.approx(apart, rel=1e-4)
        assert found["value"].notna().all()
        assert (found["metric"] == "loss").sum() == 9

    # With the real thing, at a learning rate at which the second step spoils all weights.
    def test_the_model_keeps_its_last_good_weights(self, bed, kept):
        import repnoise_kit as rk

        model = copy.deepcopy(kept)
        found = rk.attack_path(model, bed, texts=6, seed=3, **BUDGET | {"lr": 1e20})
        assert all(weight.isfinite().all() for weight in weights(model))
        first = loss_by_hand(kept, asked(bed, 6, 3)).item()
        assert line(found, "loss")[0] == pytest.approx(first, rel=1e-6)
        assert line(found, "loss").index.max() < 10

    # What was looked at and taken back right afterwards is no point of the path.
    def test_its_path_can_be_drawn(self, bed, kept):
        import repnoise_kit as rk

        found = rk.attack_path(copy.deepcopy(kept), bed, texts=6, **BUDGET | {"lr": 1e20})
        assert np.isfinite(found.frame["value"]).all()
        steps = [line(found, metric).index.tolist() for metric in METRICS]
        assert steps[0] == steps[1] == steps[2]
        assert steps[0][:2] == [0, 1]
        for ax in rk.plots.plot_attack_path(found):
            assert ax.lines

    def test_it_is_noted_how_it_was_made(self, bed, kept, path, diverging):
        import repnoise_kit as rk

        found = rk.attack_path(copy.deepcopy(kept), bed, texts=6, seed=3, **BUDGET)
        for name, value in BUDGET.items():
            assert found.made_with[name] == path[0].made_with[name] == value
        assert found.made_with["seed"] == path[0].made_with["seed"] == 3


# --- The slice ---


def by_hand(base, defended, attacked):
    """The two directions of the slice, by numpy: Gram and Schmidt."""
    first = flat(defended) - flat(base)
    first /= np.linalg.norm(first)
    second = flat(attacked) - flat(base)
    second -= (second @ first) * first
    return first, second / np.linalg.norm(second)


class TestPlane:
    def test_the_three_lie_as_far_apart_as_their_weights(self, bed, kept, plane):
        found, _, plain = plane
        passed = found.frame[found.frame["metric"] == "path"]
        places = np.array([[0, 0], passed[["x", "y"]].iloc[0], passed[["x", "y"]].iloc[-1]])
        models = [flat(bed.base), flat(kept), flat(plain)]
        assert np.linalg.norm(places[1]) == pytest.approx(places[1, 0])
        for one, other in [(0, 1), (0, 2), (1, 2)]:
            apart = np.linalg.norm(models[one] - models[other])
            assert apart > 0.01
            drawn = np.linalg.norm(places[one] - places[other])
            assert drawn == pytest.approx(apart, rel=1e-4)

    def test_the_loss_of_the_slice_at_the_three_is_their_own(self, bed, kept, plane):
        from repnoise_kit.descent import _axes, _sample, _slice

        found, _, plain = plane
        passed = found.frame[found.frame["metric"] == "path"]
        axes = _axes(bed.base, kept, plain)
        encoded, batch = asked(bed, 6, 3), _sample(bed, 6, 3, {})
        places = [(0.0, 0.0), *passed[["x", "y"]].iloc[[0, -1]].itertuples(index=False, name=None)]
        losses = []
        for model, (x, y) in zip([bed.base, kept, plain], places, strict=True):
            (row,) = _slice(bed, axes, [np.array([x]), np.array([y])], batch)
            losses.append(row["value"])
            assert row["value"] == pytest.approx(loss_by_hand(model, encoded).item(), rel=1e-5)
        assert len({round(loss, 2) for loss in losses}) == 3

    # Through the front door: without a margin, the slice's first corner is the base itself.
    def test_every_point_of_the_slice_is_the_loss_of_its_weights(self, bed, kept, plane):
        found, _, plain = plane
        first, second = by_hand(bed.base, kept, plain)
        encoded, model = asked(bed, 6, 3), copy.deepcopy(kept)
        slice_ = found.frame[found.frame["metric"] == "loss"]
        assert len(slice_) == 16
        for row in slice_.iloc[[0, 3, 6, 12, 15]].to_dict("records"):
            vector = flat(bed.base) + row["x"] * first + row["y"] * second
            torch.nn.utils.vector_to_parameters(torch.tensor(vector).float(), model.parameters())
            assert row["value"] == pytest.approx(loss_by_hand(model, encoded).item(), rel=1e-4)

    @pytest.mark.parametrize("margin", [0.0, 0.5])
    def test_the_slice_holds_the_three_and_reaches_beyond_by_its_margin(self, bed, kept, margin):
        import repnoise_kit as rk

        found = rk.attack_plane(
            copy.deepcopy(kept), bed, size=3, margin=margin, texts=2, **BUDGET
        ).frame
        passed, slice_ = (found[found["metric"] == metric] for metric in ("path", "loss"))
        assert len(slice_) == len(slice_.drop_duplicates(["x", "y"])) == 9
        for side in "xy":
            points = [0.0, *passed[side]]
            spare = margin * np.ptp(points)
            ends = [min(points) - spare, max(points) + spare]
            grid = np.linspace(*ends, 3)
            assert sorted(set(slice_[side])) == pytest.approx(grid.tolist(), abs=1e-9)

    def test_the_path_has_the_losses_of_the_attacks_path(self, path, plane):
        passed = plane[0].frame[plane[0].frame["metric"] == "path"].set_index("step")["value"]
        loss = line(path[0], "loss")
        assert passed.index.tolist() == loss.index.tolist()
        assert passed.to_numpy() == pytest.approx(loss.to_numpy(), abs=1e-6)

    # Off the slice a model is drawn at its foot: by hand from the weights on the way.
    def test_models_on_the_way_are_projected_on_the_slice(self, bed, kept, plane):
        import repnoise_kit as rk

        found, _, plain = plane
        axes = by_hand(bed.base, kept, plain)
        model, on_the_way = copy.deepcopy(kept), {}

        def keep(step):
            on_the_way[step] = flat(model)

        rk.attack_(model, bed, seed=3, after_step=keep, **BUDGET)
        passed = found.frame[found.frame["metric"] == "path"].set_index("step")
        off = []
        for step in (1, 3, 6, 10):
            away = on_the_way[step] - flat(bed.base)
            foot = np.array([away @ axis for axis in axes])
            scale = np.linalg.norm(away)
            assert passed.loc[step, ["x", "y"]].to_numpy(float) == pytest.approx(
                foot, abs=1e-4 * scale
            )
            off.append(1 - np.linalg.norm(foot) / scale)
        assert off[1] > 1e-3  # truly off the slice
        assert off[-1] == pytest.approx(0, abs=1e-6)

    def test_directions_are_of_length_one_and_at_right_angles(self, bed, kept, plane):
        from repnoise_kit.descent import _axes

        first, second = _axes(bed.base, kept, plane[2])
        vectors = [torch.cat([part.ravel() for part in axis]).double() for axis in (first, second)]
        products = [[float(a @ b) for a in vectors] for b in vectors]
        assert products == pytest.approx(np.eye(2), abs=1e-5)

    def test_the_model_is_attacked_and_the_base_left_as_it_was(self, bed, kept):
        import repnoise_kit as rk

        before = weights(bed.base)
        attacked, plain = copy.deepcopy(kept), copy.deepcopy(kept)
        rk.attack_plane(attacked, bed, size=2, texts=2, seed=3, **BUDGET)
        rk.attack_(plain, bed, seed=3, **BUDGET)
        assert same(attacked, plain)
        assert not same(attacked, kept)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(bed.base), strict=True))
        assert not any(weight.requires_grad for weight in bed.base.parameters())

    def test_an_undefended_model_has_no_slice(self, bed):
        import repnoise_kit as rk

        model = bed.model()
        with pytest.raises(rk.KitError, match="the base itself"):
            rk.attack_plane(model, bed, size=2, texts=2, **BUDGET)
        assert same(model, bed.base)

    def test_an_attack_that_goes_nowhere_has_no_slice(self, bed, defended):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="attack for longer"):
            rk.attack_plane(defended, bed, size=2, texts=2, **BUDGET | {"lr": 0.0})

    def test_a_model_of_another_shape_is_refused_before_it_is_attacked(self, bed):
        import repnoise_kit as rk

        model = make_tiny(50)
        before = weights(model)
        with pytest.raises(rk.KitError, match="not of the base's shape"):
            rk.attack_plane(model, bed, size=2, texts=2, **BUDGET)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))

    # As many points as are asked for, and a number of them that makes sense.
    @pytest.mark.parametrize("size", [-1, 2.5, "3"])
    def test_a_size_that_is_no_count_is_refused(self, bed, defended, size):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="size"):
            rk.attack_plane(defended, bed, size=size, texts=2, **BUDGET)
