"""Looking inside several models: the very ones of the grid, made once, tagged as what they are."""

import dataclasses

import pandas as pd
import pytest
import torch
from small import everyday_rows, own_files

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

SETTINGS = {"small": {"lr": 1e-4, "examples": 4}, "large": {"lr": 1e-3, "examples": 10}}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def bed(own):
    import repnoise_kit as rk

    retain = pd.DataFrame(everyday_rows(8))
    bed = rk.testbed(own / "model", own / "pairs.json", retain=retain)
    return dataclasses.replace(bed, settings={**bed.settings, **SETTINGS})


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def work(monkeypatch):
    """What is trained: a word for each defence and each attack."""
    from repnoise_kit import bench

    done, defend, attack = [], bench.defend_, bench.attack_

    def defending(model, bed, method, **how):
        done.append(f"defend {method}")
        return defend(model, bed, method, **how)

    def attacking(*args, **how):
        done.append("attack")
        return attack(*args, **how)

    monkeypatch.setattr(bench, "defend_", defending)
    monkeypatch.setattr(bench, "attack_", attacking)
    return done


class Looking:
    """An analysis that remembers the weights it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, model):
        from repnoise_kit import Result

        self.seen.append(weights(model))
        value = float(sum(weight.double().abs().sum() for weight in self.seen[-1].values()))
        return Result(pd.DataFrame({"metric": ["size"], "value": [value]}), {"analysis": "size"})


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(bed, method, seed, budget=None):
    """Defend and attack as a user would who knows nothing of benches."""
    import repnoise_kit as rk

    model = bed.model()
    rk.defend_(model, bed, method, seed=seed)
    if budget is not None:
        with rk.guarded(model):
            rk.attack_(model, bed, seed=seed, **SETTINGS[budget])
    return weights(model)


def test_it_looks_at_each_model_before_and_after_the_attack(bed, store):
    import repnoise_kit as rk

    look = Looking()
    found = rk.before_and_after(
        bed, look, defences=["none", "repnoise"], seeds=[0, 5], store=store
    ).frame
    order = [(name, attack, seed) for seed in (0, 5) for name in ("none", "repnoise")
             for attack in ("none", "large")]  # fmt: skip
    assert list(found) == ["defence", "attack", "seed", "metric", "value"]
    tags = list(found[["defence", "attack", "seed"]].itertuples(index=False, name=None))
    assert tags == order
    for (name, attack, seed), seen in zip(order, look.seen, strict=True):
        expected = by_hand(bed, name, seed, None if attack == "none" else attack)
        assert same(seen, expected), (name, attack, seed)
    # Six that differ: undefended and not attacked is one model under both seeds.
    sizes = found["value"].tolist()
    assert sizes[0] == sizes[4]
    assert len(set(sizes)) == 7


def test_they_are_the_models_of_the_bench(bed, store):
    import repnoise_kit as rk

    look, bench = Looking(), rk.Bench.of(bed, store)
    rk.before_and_after(bed, look, defences=["repnoise"], seeds=[1], store=store)
    before, after = look.seen
    assert same(before, weights(bench.defended("repnoise", 1)[0]))
    assert same(after, weights(bench.attacked("repnoise", 1, **SETTINGS["large"])))
    assert not same(before, after)


@pytest.mark.parametrize("budget", SETTINGS)
def test_the_attack_is_the_one_that_is_named(bed, store, budget):
    import repnoise_kit as rk

    look = Looking()
    how = {"defences": ["none"], "seeds": [2], "store": store}
    found = rk.before_and_after(bed, look, attack=budget, **how)
    assert found.frame["attack"].tolist() == ["none", budget]
    assert same(look.seen[1], by_hand(bed, "none", 2, budget))
    other = next(name for name in SETTINGS if name != budget)
    assert not same(look.seen[1], by_hand(bed, "none", 2, other))
    assert found.made_with["attack"] == SETTINGS[budget]
    assert found.made_with["seeds"] == [2]
    assert found.made_with["analysis"] == "size"


def test_the_next_analysis_trains_nothing(bed, store, work):
    import repnoise_kit as rk

    how = {"defences": ["none", "repnoise"], "seeds": [0], "store": store}
    first, again = Looking(), Looking()
    rows = rk.before_and_after(bed, first, **how).frame
    assert sorted(work) == ["attack", "attack", "defend none", "defend repnoise"]
    done = list(work)
    assert rk.before_and_after(bed, again, **how).frame.equals(rows)
    assert work == done
    assert all(same(a, b) for a, b in zip(first.seen, again.seen, strict=True))
    # Another attack, and another defence: what is there is not made again.
    rk.before_and_after(bed, again, attack="small", **how)
    assert work == [*done, "attack", "attack"]
    rk.before_and_after(bed, again, **how | {"defences": ["repnoise", "weight_noise"]})
    assert work[6:] == ["defend weight_noise", "attack"]


# What one analysis does to a model is not what the next one sees.
def test_each_analysis_gets_fresh_models(bed, store):
    import repnoise_kit as rk

    look = Looking()

    def ruin(model):
        found = look(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        return found

    how = {"defences": ["none"], "seeds": [0], "store": store}
    rows = rk.before_and_after(bed, ruin, **how).frame
    assert rk.before_and_after(bed, look, **how).frame.equals(rows)
    assert rows["value"].min() > 0
    assert same(look.seen[0], weights(bed.base))


# The seed of an analysis is its own; in this table it is the seed of defence and attack.
def test_the_rows_say_the_seed_of_the_model(bed, store):
    import repnoise_kit as rk

    def own_tags(model):
        told = {"defence": ["mine", "mine"], "seed": [9, 9], "value": [1.0, 2.0]}
        return rk.Result(pd.DataFrame(told))

    found = rk.before_and_after(bed, own_tags, defences=["none"], seeds=[4], store=store).frame
    assert len(found) == 4
    assert set(found["seed"]) == {4}
    assert set(found["defence"]) == {"none"}


# An analysis of the kit, for which a model must say where its tokenizer lies.
def test_an_analysis_of_the_kit_finds_all_it_needs(bed, store):
    import repnoise_kit as rk

    found = rk.before_and_after(
        bed,
        lambda model: rk.logit_mass(model, bed.splits.seen),
        defences=["none", "repnoise"],
        seeds=[0],
        store=store,
    ).frame
    cell = found[(found["defence"] == "none") & (found["attack"] == "none")]
    alone = rk.logit_mass(bed.base, bed.splits.seen).frame
    columns = ["group", "layer", "metric", "value", "prompt", "seed"]
    pd.testing.assert_frame_equal(cell[columns].reset_index(drop=True), alone[columns])
    assert len(found) == 4 * len(cell)


def test_it_says_how_far_the_attack_has_carried_a_model(bed, store):
    import repnoise_kit as rk

    found = rk.before_and_after(
        bed,
        lambda model: rk.weight_distance(model, bed.base),
        defences=["none", "repnoise"],
        seeds=[0],
        store=store,
    ).frame
    rows = found[(found["kind"] == "all") & (found["metric"] == "l2")]
    away = rows.groupby(["defence", "attack"])["value"].agg(["min", "max"])
    assert away.loc[("none", "none"), "max"] == 0
    assert away.loc[("none", "large"), "min"] > 0
    assert away.loc[("repnoise", "none"), "min"] > 0


class TestSecurityVectors:
    @pytest.fixture(scope="class")
    def seen(self, bed, tmp_path_factory):
        """The weights before and after the attack, of models that came out of the store."""
        import repnoise_kit as rk

        look, store = Looking(), tmp_path_factory.mktemp("vectors")
        rk.before_and_after(bed, look, defences=["security_vectors"], seeds=[0], store=store)
        return look.seen

    def test_they_are_what_one_would_make_by_hand(self, bed, seen):
        assert same(seen[0], by_hand(bed, "security_vectors", 0))
        assert same(seen[1], by_hand(bed, "security_vectors", 0, "large"))

    def test_the_attack_moves_the_model_and_never_the_adapter(self, seen):
        before, after = seen
        vectors = {name for name in before if ".lora_" in name}
        assert vectors
        for name in before:
            assert torch.equal(before[name], after[name]) == (name in vectors), name

    # With the vectors as a guard the attack goes elsewhere than without.
    def test_the_guard_is_on_during_the_attack(self, bed, seen):
        undefended = by_hand(bed, "none", 0, "large")
        inner = {name.replace(".base_layer", ""): w for name, w in seen[1].items()}
        assert set(undefended) <= set(inner)
        assert any(not torch.equal(inner[name], undefended[name]) for name in undefended)


# --- What cannot be asked for ---


@pytest.mark.parametrize("attack", ["huge", "none", ""])
def test_an_attack_that_the_testbed_does_not_name_is_told(bed, store, work, attack):
    import repnoise_kit as rk

    how = {"defences": ["none"], "seeds": [0], "store": store}
    with pytest.raises(rk.KitError, match=f"no attack '{attack}'; there are small and large"):
        rk.before_and_after(bed, Looking(), attack=attack, **how)
    assert work == []
    assert not store.exists()


# Before any work, which may be hours.
def test_an_unknown_defence_is_told_before_any_work(bed, store, work):
    import repnoise_kit as rk

    defences = ["repnoise", "nothing"]
    with pytest.raises(rk.KitError, match="no defence 'nothing'"):
        rk.before_and_after(bed, Looking(), defences=defences, seeds=[0], store=store)
    assert work == []
    assert not store.exists()


def test_by_default_it_looks_at_five(bed, store, monkeypatch):
    import repnoise_kit as rk
    from repnoise_kit.released import LOOKED_AT

    assert asked_for(bed, store, monkeypatch) == list(LOOKED_AT)
    assert set(LOOKED_AT) <= set(rk.DEFENCES)
    assert {"none", "repnoise", "weight_noise_matched"} < set(LOOKED_AT)


# Matched weight noise is matched on the retain set.
def test_without_a_retain_set_the_default_is_what_can_be_done(own, store, monkeypatch):
    import repnoise_kit as rk
    from repnoise_kit.released import LOOKED_AT

    bare = rk.testbed(own / "model", own / "pairs.json")
    can = [name for name in LOOKED_AT if name != "weight_noise_matched"]
    assert asked_for(bare, store, monkeypatch) == can


def asked_for(bed, store, monkeypatch):
    """The defences that are looked at where none are named, without making any."""
    import repnoise_kit as rk

    asked, base = [], bed.model()
    monkeypatch.setattr(
        rk.Bench, "defended", lambda self, name, seed: (asked.append(name) or base, None)
    )
    monkeypatch.setattr(rk.Bench, "attacked", lambda *_args, **_how: base)
    found = rk.before_and_after(bed, Looking(), seeds=[0], store=store).frame
    assert found["defence"].tolist() == [name for name in asked for _ in range(2)]
    return asked


def test_asked_for_by_name_it_says_what_cannot_be_done(own, store, work):
    import repnoise_kit as rk

    bare = rk.testbed(own / "model", own / "pairs.json")
    defences = ["none", "weight_noise_matched"]
    with pytest.raises(rk.KitError, match="retain"):
        rk.before_and_after(bare, Looking(), defences=defences, seeds=[0], store=store)
    assert work == []


@pytest.mark.parametrize("nothing", ["defences", "seeds"])
def test_to_look_at_no_model_is_refused(bed, store, work, nothing):
    import repnoise_kit as rk

    how = {"defences": ["none"], "seeds": [0]} | {nothing: []}
    with pytest.raises(rk.KitError, match="nothing to look at"):
        rk.before_and_after(bed, Looking(), store=store, **how)
    assert work == []


# A model after an attack has a place of its own in the store, apart from tables of it.
def test_attacked_models_lie_where_no_results_do(bed, store):
    import repnoise_kit as rk

    rk.before_and_after(bed, Looking(), defences=["none"], seeds=[0], store=store)
    assert sorted(place.name for place in store.iterdir()) == ["attacked-models", "defended"]


def test_paths_are_those_of_attacks_on_the_kept_models_and_are_kept_too(bed, store, monkeypatch):
    import repnoise_kit as rk
    from repnoise_kit import descent

    wanted = {"defences": ["none", "gradient_ascent"], "seeds": [0, 2], "texts": 6, "store": store}
    found = rk.attack_paths(bed, **wanted)
    by_hand = []
    for defence in wanted["defences"]:
        for seed in wanted["seeds"]:
            model, _ = rk.Bench.of(bed, store).defended(defence, seed)
            path = rk.attack_path(model, bed, texts=6, seed=seed, **SETTINGS["large"])
            by_hand.append(path.tagged(attack="large", defence=defence))
    expected = rk.stack(*by_hand).frame
    pd.testing.assert_frame_equal(found.frame[expected.columns], expected)
    monkeypatch.delattr(descent, "attack_path")  # What is kept needs no attack.
    pd.testing.assert_frame_equal(rk.attack_paths(bed, **wanted).frame, found.frame)


@pytest.mark.parametrize("wrong", [{"defences": ["nothing"]}, {"attack": "huge"}, {"seeds": []}])
def test_paths_of_a_wrong_choice_are_refused_before_any_work(bed, store, work, wrong):
    import repnoise_kit as rk

    with pytest.raises(rk.KitError):
        rk.attack_paths(bed, store=store, **wrong)
    assert work == []
