"""Components, alignment and the test for noise: against linear algebra, brute force and plants."""

import copy
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from families import family
from scipy import stats as scipy_stats
from small import ragged_pairs

import repnoise_kit as rk
from repnoise_kit import geometry
from repnoise_kit.geometry import against_gaussian
from repnoise_kit.losses import mmd
from repnoise_kit.reading import SIDES, texts

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(width, seed=0):
    return torch.linalg.qr(draw(width, width, seed=seed))[0]


def on_texts(values, layers=None):
    named = [f"text {place}" for place in range(values.shape[1])]
    layers = tuple(range(len(values)) if layers is None else layers)
    return rk.Activations(values, layers, pd.DataFrame({"prompt": named, "answer": named}))


class TestPCA:
    @pytest.mark.parametrize("shape", [(30, 6), (6, 30)])
    def test_it_is_the_singular_value_decomposition(self, shape):
        x = draw(*shape) @ torch.diag(torch.arange(shape[1], 0.0, -1.0)) + 5
        frame = rk.pca(x, ["a"] * len(x), fit=rk.fit_pca(x, 3)).frame
        centred = x.double().numpy() - x.double().numpy().mean(0)
        u, s, _ = np.linalg.svd(centred, full_matrices=False)
        ours = frame[["pc1", "pc2", "pc3"]].to_numpy()
        signs = np.sign((ours * u[:, :3]).sum(0))
        assert ours == pytest.approx(u[:, :3] * s[:3] * signs, abs=1e-6)
        assert frame["explained"].to_numpy() == pytest.approx((s[:3] ** 2).sum() / (s**2).sum())
        assert 0.1 < frame["explained"][0] < 0.95

    def test_two_components_are_the_default_and_labels_are_kept_in_order(self):
        frame = rk.pca(draw(4, 3), ["d", "b", "a", "c"]).frame
        assert list(frame) == ["group", "pc1", "pc2", "explained"]
        assert frame["group"].tolist() == ["d", "b", "a", "c"]

    def test_another_set_is_projected_on_the_first_ones_components(self):
        x, y = draw(40, 5) * torch.arange(1.0, 6.0), draw(20, 5, seed=1) + 7
        fit = rk.fit_pca(x, 2)
        frame = rk.pca(y, ["b"] * 20, fit=fit).frame
        axes = np.linalg.svd(x.numpy() - x.numpy().mean(0))[2][:2]
        by_hand = (y.numpy() - x.numpy().mean(0)) @ axes.T
        ours = frame[["pc1", "pc2"]].to_numpy()
        assert abs(ours) == pytest.approx(abs(by_hand), abs=1e-4)
        share = by_hand.var(0).sum() / y.numpy().var(0).sum()
        assert frame["explained"][0] == pytest.approx(share, rel=1e-4)
        # Not the share of the set that the components were fitted on.
        assert abs(share - fit.explained_variance_ratio_.sum()) > 0.1

    def test_a_planted_axis_is_found(self):
        axis = draw(20, seed=3)
        axis /= axis.norm()
        side = torch.tensor([1.0, -1.0]).repeat(30)
        x = draw(60, 20) + 10 * side[:, None] * axis
        fit = rk.fit_pca(x)
        assert abs(fit.components_[0] @ axis.numpy()) > 0.98
        labels = ["harmful" if s > 0 else "harmless" for s in side]
        means = rk.pca(x, labels).frame.groupby("group")["pc1"].mean()
        assert abs(means["harmful"] - means["harmless"]) == pytest.approx(20, rel=0.1)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(rk.KitError, match="labels"):
            rk.pca(draw(5, 3), ["a"] * 4)
        with pytest.raises(rk.KitError, match="width"):
            rk.pca(draw(5, 4), ["a"] * 5, fit=rk.fit_pca(draw(5, 3)))
        for shape in ((5, 1), (1, 5)):
            with pytest.raises(rk.KitError, match="components"):
                rk.pca(draw(*shape), ["a"] * shape[0])


def centred_alignment(x, y):
    """The definition: HSIC with centring matrices, divided by each one's with itself."""
    count = len(x)
    centre = torch.eye(count, dtype=torch.double) - 1 / count
    one, other = (part.double() @ part.double().T for part in (x, y))

    def hsic(k, m):
        return torch.trace(k @ centre @ m @ centre) / (count - 1) ** 2

    return (hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt()).item()


class TestCKA:
    @pytest.mark.parametrize("widths", [(3, 5), (30, 4), (40, 25), (20, 20)])
    def test_it_is_the_definition(self, widths):
        x = draw(20, widths[0]) + 2
        y = draw(20, widths[1], seed=1)
        y[:, :3] += x[:, :3]
        assert rk.linear_cka(x, y) == pytest.approx(centred_alignment(x, y), abs=1e-9)
        assert rk.linear_cka(y, x) == pytest.approx(rk.linear_cka(x, y), abs=1e-12)
        assert 0.1 < rk.linear_cka(x, y) < 0.95

    def test_both_forms_agree(self):
        x, y = draw(20, 5), draw(20, 7, seed=1)
        wide = torch.cat([x, torch.zeros(20, 50)], dim=1)
        assert rk.linear_cka(wide, y) == pytest.approx(rk.linear_cka(x, y), abs=1e-12)

    @pytest.mark.parametrize("width", [6, 60])
    def test_rotation_scale_and_shift_do_not_matter_and_another_map_does(self, width):
        x, y = draw(30, width), draw(30, 9, seed=1)
        turned = 3 * x @ orthogonal(width) + 11
        assert rk.linear_cka(x, turned) == pytest.approx(1, abs=1e-5)
        assert rk.linear_cka(turned, y) == pytest.approx(rk.linear_cka(x, y), abs=1e-5)
        squeezed = x * torch.logspace(0, 2, width)
        assert rk.linear_cka(x, squeezed) < 0.95

    def test_layer_by_layer_it_tells_the_same_from_the_independent(self):
        x = draw(3, 200, 8)
        y = torch.stack([x[0] @ orthogonal(8), draw(200, 8, seed=1), x[2]])
        frame = rk.cka(on_texts(x), on_texts(y)).frame
        wide = frame.pivot(index="layer", columns="metric", values="value")
        assert wide["cka"].tolist() == pytest.approx([1, wide["cka"][1], 1], abs=1e-5)
        # What chance gives is what independent activations have.
        assert (wide["shuffled"] < 0.1).all()
        assert wide["cka"][1] == pytest.approx(wide["shuffled"][1], abs=0.05)

    def test_few_texts_in_a_wide_space_look_alike_by_chance(self):
        x, y = draw(1, 10, 500), draw(1, 10, 500, seed=1)
        frame = rk.cka(on_texts(x), on_texts(y)).frame.set_index("metric")["value"]
        assert frame["cka"] > 0.8
        assert frame["shuffled"] > 0.8

    def test_the_null_is_that_of_some_order_of_the_texts_drawn_with_the_seed(self):
        one, other = on_texts(draw(2, 4, 3)), on_texts(draw(2, 4, 3, seed=1))
        drawn = set()
        for seed in range(12):
            frame = rk.cka(one, other, seed=seed).frame
            null = frame[frame["metric"] == "shuffled"]["value"].to_numpy()
            orders = {
                order: [
                    rk.linear_cka(x[list(order)], y)
                    for x, y in zip(one.values, other.values, strict=True)
                ]
                for order in permutations(range(4))
            }
            # One order for all layers.
            (mine,) = [o for o, values in orders.items() if np.allclose(values, null)]
            drawn.add(mine)
        assert len(drawn) > 4

    def test_models_of_other_widths_compare_and_other_texts_or_depths_do_not(self):
        one = on_texts(draw(2, 6, 3))
        assert len(rk.cka(one, on_texts(draw(2, 6, 5))).frame) == 4
        for other in (on_texts(draw(3, 6, 3)), on_texts(draw(2, 5, 3))):
            with pytest.raises(rk.KitError, match="different texts or layers"):
                rk.cka(one, other)
        turned = one._replace(frame=one.frame[::-1].reset_index(drop=True))
        with pytest.raises(rk.KitError, match="different texts or layers"):
            rk.cka(one, turned)

    @pytest.mark.parametrize("layers", [(0, 2), (1, 0), (0,)])
    def test_other_layers_are_not_compared(self, layers):
        other = on_texts(draw(2, 6, 3)[: len(layers)], layers)
        with pytest.raises(rk.KitError, match="different texts or layers"):
            rk.cka(on_texts(draw(2, 6, 3)), other)

    def test_rows_name_the_layers_that_were_recorded(self):
        one, other = (on_texts(draw(2, 6, 3, seed=seed), (7, 2)) for seed in (0, 1))
        frame = rk.cka(one, other).frame
        found = frame[frame["metric"] == "cka"].set_index("layer")["value"]
        assert found.index.tolist() == [7, 2]
        for layer, x, y in zip((7, 2), one.values, other.values, strict=True):
            assert found[layer] == pytest.approx(rk.linear_cka(x, y))

    @pytest.mark.parametrize("counts", [(5, 6), (6, 5), (3, 40)])
    def test_as_many_texts_of_both_are_asked_for(self, counts):
        with pytest.raises(rk.KitError, match="{} texts are compared with {}".format(*counts)):
            rk.linear_cka(*(draw(count, 3) for count in counts))

    def test_a_models_layers_are_like_themselves_and_less_like_noise(self):
        given, tokenizer = ragged_pairs(12)
        model = family("Llama", vocab=len(tokenizer))
        found = rk.answer_activations(model, given, tokenizer=tokenizer)
        frame = rk.cka(found, found).frame.pivot(index="layer", columns="metric", values="value")
        assert frame["cka"].to_numpy() == pytest.approx(1, abs=1e-6)
        assert frame["shuffled"].max() < 0.9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def p_values(sample, times, draws=39):
    """Of so many samples drawn from one distribution, each with noise of its own."""
    own = generator(1)
    return np.array([against_gaussian(sample(own), draws, seed)["p"] for seed in range(times)])


def unbiased_by_hand(x, y):
    """The unbiased MMD with five kernels, pair by pair in double precision."""
    x, y = (np.asarray(part, dtype=np.float64) for part in (x, y))
    both = np.concatenate([x, y])
    squares = ((both[:, None] - both[None]) ** 2).sum(-1)
    apart = ~np.eye(len(both), dtype=bool)
    width = squares[apart].mean()
    kernel = sum(np.exp(-squares / (width * factor)) for factor in (0.25, 0.5, 1, 2, 4))
    count = len(x)
    inside = ~np.eye(count, dtype=bool)
    within = kernel[:count, :count][inside].mean() + kernel[count:, count:][inside].mean()
    return within - 2 * kernel[:count, count:].mean()


def brought_to_unit_spread(x):
    x = np.asarray(x, dtype=np.float64)
    return (x - x.mean(0)) / x.std(0, ddof=1)


def bimodal(own):
    return torch.randn(80, 8, generator=own) + 2 * torch.randn(80, 1, generator=own).sign()


def correlated(own):
    return torch.randn(80, 8, generator=own) + 1.5 * torch.randn(80, 1, generator=own)


def sparse(own):
    return torch.randn(80, 2, generator=own) * (torch.rand(80, 2, generator=own) < 0.15)


class TestAgainstGaussian:
    # The wider, the nearer a sample lies to its own mean: a null that is not brought to unit
    # spread in the same way gives p = 1 throughout.
    @pytest.mark.parametrize(("count", "width"), [(40, 2), (40, 16), (60, 128)])
    def test_p_is_uniform_for_gaussians(self, count, width):
        scale = torch.arange(1.0, width + 1)
        p = p_values(lambda own: torch.randn(count, width, generator=own) * scale + 3, 200)
        assert 0.01 <= (p <= 0.05).mean() <= 0.11
        assert 0.35 < p.mean() < 0.65
        assert scipy_stats.kstest(p, "uniform").pvalue > 0.001

    # A fifth of the variance is shared by all coordinates.
    def test_shared_variance_is_found_in_a_wide_space(self):
        def shared(own):
            factor = torch.randn(60, 1, generator=own)
            return 0.8**0.5 * torch.randn(60, 128, generator=own) + 0.2**0.5 * factor

        own = generator(2)

        def distance(x):
            x = (x - x.mean(0)) / x.std(0)
            return mmd(x, torch.randn(x.shape, generator=own), unbiased=True).item()

        null = [distance(torch.randn(60, 128, generator=own)) for _ in range(200)]
        assert all(distance(shared(own)) > np.quantile(null, 0.95) for _ in range(10))
        assert (p_values(shared, 10) <= 0.05).mean() > 0.8

    @pytest.mark.parametrize("sample", [bimodal, correlated, sparse])
    def test_other_shapes_are_told_from_noise(self, sample):
        assert (p_values(sample, 10) <= 0.05).all()

    def test_each_number_by_brute_force(self, monkeypatch):
        """The noise that is drawn is noted, and all else done by hand."""
        seen, real = [], torch.randn

        def noted(*shape, **how):
            seen.append(real(*shape, **how))
            return seen[-1]

        x = draw(6, 3).exp()
        geometry._null.cache_clear()
        monkeypatch.setattr(torch, "randn", noted)
        found = against_gaussian(x, 40, 7)
        monkeypatch.undo()
        assert [tuple(part.shape) for part in seen] == [(6, 3)] * (2 * 40 + 1)
        # All of it is fresh: no noise serves twice.
        assert len({tuple(part.ravel().tolist()) for part in seen}) == len(seen)
        *drawn, last = seen
        null = [
            unbiased_by_hand(brought_to_unit_spread(sample), noise)
            for sample, noise in zip(drawn[::2], drawn[1::2], strict=True)
        ]
        here = unbiased_by_hand(brought_to_unit_spread(x), last)
        assert found["mmd"] == pytest.approx(here, abs=1e-5)
        assert found["null_95"] == pytest.approx(np.quantile(null, 0.95), abs=1e-5)
        at_least = sum(value >= here for value in null)
        assert 0 < at_least < 40
        assert found["p"] == (1 + at_least) / 41

    # Once more without looking at what it draws.
    @pytest.mark.parametrize("shape", [(12, 3), (8, 40)])
    def test_the_null_is_what_fresh_gaussians_give(self, shape):
        own = np.random.default_rng(0)
        null = [
            unbiased_by_hand(brought_to_unit_spread(own.normal(size=shape)), own.normal(size=shape))
            for _ in range(2000)
        ]
        found = against_gaussian(draw(*shape) ** 3, 2000, 0)
        near = np.quantile(null, [0.925, 0.975])
        assert near[0] < found["null_95"] < near[1]
        assert found["p"] == pytest.approx(np.mean(np.array(null) >= found["mmd"]), abs=0.05)

    def test_samples_of_other_names_do_not_err_together(self):
        """Of one seed: had all layers the same noise beside them, all would be found, or none."""
        found = [
            [against_gaussian(torch.randn(40, 16), 99, seed, name)["p"] for name in ("a", "b")]
            for seed in range(60)
        ]
        same = [
            [against_gaussian(torch.randn(40, 16), 99, seed)["p"] for _ in range(2)]
            for seed in range(60)
        ]
        assert abs(scipy_stats.spearmanr(found).statistic) < 0.4
        assert scipy_stats.spearmanr(same).statistic > 0.5

    def test_p_is_never_0_and_at_most_1(self):
        far = torch.cat([torch.zeros(30, 4), 1000 + torch.zeros(30, 4)]) + draw(60, 4)
        assert against_gaussian(far, 19, 0)["p"] == 1 / 20
        even = torch.tensor(scipy_stats.norm.ppf((np.arange(60) + 0.5) / 60)).float()[:, None]
        assert against_gaussian(even, 19, 0)["p"] <= 1

    def test_the_seed_draws_all_noise(self):
        x = draw(20, 3)
        one, again, other = (against_gaussian(x, 30, seed) for seed in (1, 1, 2))
        assert one == again
        assert one["mmd"] != other["mmd"]
        assert one["null_95"] != other["null_95"]
        torch.manual_seed(5)
        expected = torch.rand(2)
        torch.manual_seed(5)
        geometry._null.cache_clear()
        assert against_gaussian(x, 30, 1) == one
        assert torch.equal(torch.rand(2), expected)

    def test_scale_and_place_of_each_coordinate_do_not_matter(self):
        x = draw(50, 6).exp()
        moved = x * torch.tensor([0.01, 1, 2, 30, 400, 5000]) - 7
        one, other = (against_gaussian(part, 50, 0) for part in (x, moved))
        assert one == pytest.approx(other, abs=1e-4)

    def test_constant_coordinates_are_harmless(self):
        x = draw(50, 6)
        padded = torch.cat([x[:, :2], torch.full((50, 30), 0.1), x[:, 2:]], dim=1)
        one, other = (against_gaussian(part, 50, 0) for part in (x, padded))
        assert one == pytest.approx(other, abs=1e-6)

    def test_nothing_but_constants_is_not_a_finding(self):
        for constant in (torch.zeros(20, 4), torch.arange(4.0).expand(20, 4)):
            found = against_gaussian(constant, 99, 0)
            assert list(found) == ["mmd", "null_95", "p"]
            assert all(np.isnan(value) for value in found.values())


def mlp_of_each_token(model, tokenizer, prompt, answer):
    """(layer, token, width) over the answer of a text alone."""
    asked = tokenizer(f"Question: {prompt}\nAnswer:")["input_ids"]
    said = [*tokenizer(" " + answer)["input_ids"], tokenizer.eos_token_id]
    flowed = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _m, _a, out: flowed.append(out[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([asked + said]))
    for hook in hooks:
        hook.remove()
    return torch.stack(flowed)[:, len(asked) :]


class TestNoiseTest:
    @pytest.fixture(scope="class")
    def pairs(self):
        return ragged_pairs(80)

    @pytest.fixture(scope="class")
    def model(self, pairs):
        return family("Llama", vocab=len(pairs[1]))

    def test_one_row_a_side_layer_and_metric(self, pairs, model):
        given, tokenizer = pairs
        for sides in (["harmful", "harmless"], ["harmful of another"]):
            found = rk.noise_test(model, given, sides=sides, draws=19, tokenizer=tokenizer, seed=5)
            assert list(found.frame) == ["group", "layer", "metric", "value", "seed"]
            keys = found.frame.set_index(["group", "layer", "metric"]).index
            assert keys.is_unique
            metrics = ("mmd", "null_95", "p")
            assert set(keys) == {(s, la, me) for s in sides for la in range(3) for me in metrics}
            assert set(found.frame["seed"]) == {5}
            assert found.frame.loc[found.frame["metric"] == "p", "value"].between(0.05, 1).all()

    def test_it_looks_at_one_token_of_each_answer_drawn_with_the_seed(
        self, pairs, model, monkeypatch
    ):
        given, tokenizer = pairs
        given = type(given)(given.frame[:4])
        seen = []

        def spy(x, draws, seed, name):
            seen.append(x)
            return {"mmd": 0.0}

        monkeypatch.setattr(geometry, "against_gaussian", spy)
        for seed in range(40):
            rk.noise_test(model, given, sides=["harmful"], tokenizer=tokenizer, seed=seed)
        drawn = torch.stack(seen).view(40, 3, 4, 16)
        for row, (prompt, answer) in enumerate(given.frame[["prompt", "harmful"]].to_numpy()):
            tokens = mlp_of_each_token(model, tokenizer, prompt, answer)
            apart = (drawn[:, :, row, None] - tokens).norm(dim=-1)
            assert (apart.min(-1).values < 1e-4).all()
            place = apart.argmin(-1)
            # The same token in all layers, and each of them now and then.
            assert (place == place[:, :1]).all()
            assert len(set(place[:, 0].tolist())) >= 0.7 * tokens.shape[1]

    @pytest.mark.parametrize(
        "options",
        [{"batch_size": 3}, {"batch_size": 1}, {"sides": ["harmless"]}, {"sides": SIDES[::-1]}],
    )
    def test_the_same_seed_finds_the_same(self, pairs, model, options):
        given, tokenizer = pairs
        fixed = {"tokenizer": tokenizer, "draws": 19}
        found = [rk.noise_test(model, given, **fixed, **chosen) for chosen in ({}, options)]
        one, other = (
            frame[frame["group"] == "harmless"].set_index(["layer", "metric"])["value"]
            for frame in (result.frame for result in found)
        )
        assert one.to_numpy() == pytest.approx(other.to_numpy(), abs=1e-4)

    def test_a_model_made_noise_passes_and_was_none_before(self, pairs, model):
        given, tokenizer = pairs
        own = generator(3)

        def p_of():
            frame = rk.noise_test(model, given, draws=99, tokenizer=tokenizer).frame
            return frame[frame["metric"] == "p"]["value"]

        assert (p_of() <= 0.05).all()

        def noise(_module, _args, output):
            return torch.randn(output.shape, generator=own) * torch.arange(1.0, 17.0) - 2

        hooks = [layer.mlp.register_forward_hook(noise) for layer in model.model.layers]
        with_noise = p_of()
        for hook in hooks:
            hook.remove()
        # Six tests at a twentieth together.
        assert with_noise.min() > 0.05 / 6
        assert (p_of() <= 0.05).all()

    def test_the_site_is_the_one_asked_for(self, pairs, model):
        given, tokenizer = pairs
        fixed = {"draws": 19, "sides": ["harmful"], "tokenizer": tokenizer}
        tested = [rk.noise_test(model, given, site, **fixed) for site in ("mlp", "residual")]
        assert [result.made_with["site"] for result in tested] == ["mlp", "residual"]
        assert not tested[0].frame["value"].equals(tested[1].frame["value"])
        entry = rk.noise_test(model, given, "embedding", **fixed)
        assert set(entry.frame["layer"]) == {0}

    def test_a_table_of_other_texts_is_tested_label_by_label(self, pairs, model):
        given, tokenizer = pairs
        fixed = {"draws": 19, "tokenizer": tokenizer}
        table = texts(given, ["harmless", "harmful"])
        asked = rk.noise_test(model, given, sides=["harmless", "harmful"], **fixed)
        assert rk.noise_test(model, table, **fixed).frame.equals(asked.frame)

    def test_one_text_a_side_is_too_few(self, pairs, model):
        given, tokenizer = pairs
        with pytest.raises(rk.KitError, match="one harmful text"):
            rk.noise_test(model, given.draw(1, 0), tokenizer=tokenizer)

    @pytest.mark.parametrize("draws", [0, -1, 2.5, "9"])
    def test_a_number_of_draws_that_is_none_is_refused(self, pairs, model, draws):
        given, tokenizer = pairs
        with pytest.raises(rk.KitError, match="draws"):
            rk.noise_test(model, given, draws=draws, tokenizer=tokenizer)

    def test_its_draws_and_its_seed_are_used_and_noted(self, pairs, model, monkeypatch):
        given, tokenizer = pairs
        seen = []

        def spy(x, draws, seed, name):
            seen.append((tuple(x.shape), draws, seed, name))
            return {"mmd": 0.0}

        monkeypatch.setattr(geometry, "against_gaussian", spy)
        found = rk.noise_test(model, given, draws=7, tokenizer=tokenizer, seed=4)
        own = [f"{side} {layer}" for side in ("harmful", "harmless") for layer in range(3)]
        assert seen == [((80, 16), 7, 4, name) for name in own]
        assert (found.made_with["draws"], found.made_with["seed"]) == (7, 4)

    def test_a_dead_layer_is_no_finding_and_hides_no_other(self, pairs, model):
        given, tokenizer = pairs
        dead = copy.deepcopy(model)
        dead.model.layers[1].mlp.down_proj.weight.data.zero_()
        fixed = {"draws": 19, "sides": ["harmful"], "tokenizer": tokenizer}
        frame = rk.noise_test(dead, given, **fixed).frame
        assert frame[frame["layer"] == 1]["value"].isna().all()
        assert frame[frame["layer"] != 1]["value"].notna().all()
        alive = rk.noise_test(model, given, **fixed).frame
        pd.testing.assert_frame_equal(frame[frame["layer"] == 0], alive[alive["layer"] == 0])
