"""Where a defence changed a model, and which parts of it may not move: sums, twins, bit by bit."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_tiny
from families import FAMILIES, NAMES, family
from small import everyday_rows, made_up_pairs, own_files, save_folder, tokenizer_of

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections", "short_answers")


KINDS = ("attention", "mlp", "norm")


@pytest.fixture(scope="module")
def short_answers():
    """Evaluations are most of the time, and what they say is not what is tested."""
    from repnoise_kit import settings

    with pytest.MonkeyPatch.context() as patch:
        short = {**settings.PAPER_SETTINGS["evaluation"], "max_new_tokens": 4}
        patch.setitem(settings.PAPER_SETTINGS, "evaluation", short)
        yield


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"), layers=3)


@pytest.fixture(scope="module")
def bed(own, short_answers):
    import repnoise_kit as rk

    return rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json")


@pytest.fixture
def bench(bed, tmp_path):
    from repnoise_kit import Bench

    return Bench.of(bed, tmp_path / "store")


@pytest.fixture
def work(monkeypatch):
    """What is computed: a word for each defence, attack and evaluation."""
    from repnoise_kit import bench, resistance

    done = []

    def noting(room, name):
        real = getattr(room, name)

        def noted(*args, **how):
            done.append(name)
            return real(*args, **how)

        monkeypatch.setattr(room, name, noted)

    noting(bench, "defend_")
    noting(bench, "attack_")
    noting(resistance, "evaluate")
    return done


def shifted(model, scale=0.1, seed=1):
    """A copy, each weight of which has moved."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            weight += scale * torch.randn(weight.shape, generator=draw)
    return other


def norm(tensors):
    """The Euclidean norm of all numbers of some tensors, by numpy."""
    flat = [np.asarray(t.detach(), dtype=np.float64).ravel() for t in tensors]
    return float(np.linalg.norm(np.concatenate(flat)))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def moved(model, before):
    return {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}


def whole(store):
    """The finished folders of a store, and what would change if one were made again."""
    from repnoise_kit.store import is_whole

    stats = {folder: folder.stat() for folder in store.glob("*/*") if is_whole(folder)}
    return {folder: (stat.st_ino, stat.st_mtime_ns) for folder, stat in stats.items()}


def cell(frame, part, layer=None, kind="all", metric="l2"):
    rows = frame[(frame["part"] == part) & (frame["kind"] == kind) & (frame["metric"] == metric)]
    rows = rows[rows["layer"].isna() if layer is None else rows["layer"] == layer]
    (value,) = rows["value"]
    return value


# --- How far a part has moved ---

# A weight, and where a change of it alone is seen.
ALONE = {
    "model.embed_tokens.weight": {("embedding", None, "all")},
    "model.layers.0.self_attn.k_proj.weight": {("layer", 0, "attention"), ("layer", 0, "all")},
    "model.layers.1.mlp.down_proj.weight": {("layer", 1, "mlp"), ("layer", 1, "all")},
    "model.layers.2.input_layernorm.weight": {("layer", 2, "norm"), ("layer", 2, "all")},
    "model.layers.2.post_attention_layernorm.weight": {("layer", 2, "norm"), ("layer", 2, "all")},
    "model.norm.weight": {("norm", None, "all")},
    "lm_head.weight": {("head", None, "all")},
}


@pytest.mark.parametrize("name", ALONE)
def test_one_changed_weight_is_seen_in_its_part_and_kind_alone(tiny_model, name):
    from repnoise_kit import weight_distance

    other = copy.deepcopy(tiny_model)
    other.get_parameter(name).data[..., 0] += 0.5
    rows = weight_distance(other, tiny_model).frame
    rows = rows[rows["value"] != 0].astype(object).where(rows.notna(), None)
    seen = set(rows[["part", "layer", "kind"]].itertuples(index=False, name=None))
    assert seen == ALONE[name]
    size = other.get_parameter(name)[..., 0].numel()
    lengths = rows.loc[rows["metric"] == "l2", "value"].astype(float)
    assert lengths.to_numpy() == pytest.approx(0.5 * size**0.5)


def test_distances_are_those_of_numpy(tiny_model):
    from repnoise_kit import weight_distance

    other = shifted(tiny_model)
    frame = weight_distance(other, tiny_model).frame
    groups = {
        ("embedding", None, "all"): lambda n: n.startswith("model.embed"),
        ("norm", None, "all"): lambda n: n == "model.norm.weight",
        ("head", None, "all"): lambda n: n.startswith("lm_head"),
    }
    inside = {"attention": "self_attn", "mlp": ".mlp.", "norm": "layernorm", "all": ""}
    for layer in range(3):
        for kind, word in inside.items():
            groups["layer", layer, kind] = lambda n, start=f"model.layers.{layer}.", word=word: (
                n.startswith(start) and word in n
            )
    assert len(frame) == 2 * len(groups)
    there = dict(tiny_model.named_parameters())
    for place, belongs in groups.items():
        names = [name for name in there if belongs(name)]
        assert names
        gap = norm([dict(other.named_parameters())[name] - there[name] for name in names])
        assert cell(frame, *place) == pytest.approx(gap, rel=1e-5)
        ratio = gap / norm([there[name] for name in names])
        assert cell(frame, *place, metric="relative") == pytest.approx(ratio, rel=1e-5)


# Half precision: the distance of what was rounded to what it was rounded from.
def test_a_model_in_half_precision_is_compared_in_full(tiny_model):
    from repnoise_kit import weight_distance

    rounded = copy.deepcopy(tiny_model).to(torch.bfloat16)
    found = cell(weight_distance(rounded, tiny_model).frame, "layer", 1)
    layers = (model.model.layers[1].parameters() for model in (rounded, tiny_model))
    gaps = [a.float() - b for a, b in zip(*layers, strict=True)]
    assert found == pytest.approx(norm(gaps), rel=1e-5)
    assert found > 0


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    def test_nothing_lies_between_a_model_and_itself(self, name):
        from repnoise_kit import weight_distance

        model = family(name)
        frame = weight_distance(model, copy.deepcopy(model)).frame
        assert (frame["value"] == 0).all()
        assert not (weight_distance(model, shifted(model)).frame["value"] == 0).any()

    def test_every_weight_is_counted_exactly_once(self, name):
        """Squares of random changes: a weight too many, or too few, would show in their sum."""
        from repnoise_kit import weight_distance

        model = family(name)
        other = shifted(model)
        frame = weight_distance(other, model).frame
        parts = frame[(frame["kind"] == "all") & (frame["metric"] == "l2")]
        assert not parts.duplicated(["part", "layer"]).any()
        pairs = list(zip(other.parameters(), model.parameters(), strict=True))
        total = norm([a - b for a, b in pairs])
        assert np.linalg.norm(parts["value"]) == pytest.approx(total, rel=1e-5)
        # And of what it is relative to: the norm of the reference's own weights.
        ratios = frame[(frame["kind"] == "all") & (frame["metric"] == "relative")]
        sizes = parts["value"].to_numpy() / ratios["value"].to_numpy()
        assert np.linalg.norm(sizes) == pytest.approx(norm(model.parameters()), rel=1e-5)

    def test_attention_mlp_and_norms_make_up_a_layer(self, name):
        from repnoise_kit import weight_distance

        model = family(name)
        frame = weight_distance(shifted(model), model).frame
        for layer in range(3):
            kinds = [cell(frame, "layer", layer, kind) for kind in KINDS]
            assert min(kinds) > 0
            assert np.linalg.norm(kinds) == pytest.approx(cell(frame, "layer", layer), rel=1e-6)

    def test_kinds_are_what_the_source_of_transformers_says(self, name):
        """What lies in the attention's module is attention's; of the rest, vectors are norms'."""
        from repnoise_kit import weight_distance

        model = family(name)
        other = shifted(model)
        frame = weight_distance(other, model).frame
        layers, last, _, attention = NAMES[name]
        start, gaps = f"{layers}.1.", {kind: [] for kind in KINDS}
        for (n, b), a in zip(model.named_parameters(), other.parameters(), strict=True):
            if not n.startswith(start):
                continue
            inside = n.removeprefix(start)
            heard = inside.startswith(f"{attention}.")
            kind = "attention" if heard else "norm" if "norm" in n or "ln_" in n else "mlp"
            gaps[kind].append(a - b)
        for kind in KINDS:
            assert cell(frame, "layer", 1, kind) == pytest.approx(norm(gaps[kind]), rel=1e-5)
        final = (one.get_submodule(last).parameters() for one in (other, model))
        gaps = [a - b for a, b in zip(*final, strict=True)]
        assert cell(frame, "norm") == pytest.approx(norm(gaps), rel=1e-5)

    def test_a_head_that_is_the_embedding_is_told_once(self, name):
        from repnoise_kit import weight_distance

        model = family(name)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        parts = set(weight_distance(shifted(model), model).frame["part"])
        assert {"embedding", "layer", "norm"} <= parts
        assert ("head" in parts) == (not tied)


def test_some_families_tie_their_heads_and_some_do_not():
    heads = [family(name) for name in ("Llama", "Gemma2", "GPT2")]
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in heads]
    assert tied == [False, True, True]


# GPT-2's positions are no layer's: named as they are, after all others.
def test_what_is_no_known_part_has_its_own_name():
    from repnoise_kit import weight_distance

    model = family("GPT2")
    other = copy.deepcopy(model)
    other.transformer.wpe.weight.data += 0.25
    frame = weight_distance(other, model).frame
    assert frame.loc[frame["value"] != 0, "part"].unique() == ["transformer.wpe.weight"]
    assert frame["part"].iloc[-1] == "transformer.wpe.weight"


def test_parts_come_in_the_order_of_the_model(tiny_model):
    from repnoise_kit import weight_distance

    frame = weight_distance(shifted(tiny_model), tiny_model).frame
    places = frame[["part", "layer"]].drop_duplicates().to_numpy(dtype=object, na_value=None)
    layers = [["layer", number] for number in range(3)]
    assert places.tolist() == [["embedding", None], *layers, ["norm", None], ["head", None]]


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_tiny(51),
        lambda: make_tiny(layers=4),
        lambda: make_tiny(layers=2),
        lambda: family("GPT2"),
    ],
    ids=["more words", "more layers", "fewer layers", "another family"],
)
def test_models_of_another_shape_are_refused(tiny_model, other):
    from repnoise_kit import KitError, weight_distance

    for pair in [(tiny_model, other()), (other(), tiny_model)]:
        with pytest.raises(KitError, match="differ in shape"):
            weight_distance(*pair)


# --- Thirds ---


@pytest.fixture
def of_layers(monkeypatch):
    """The thirds of a model of so many layers, without the model."""
    from repnoise_kit import freezing

    monkeypatch.setattr(freezing, "parts", lambda count: SimpleNamespace(layers=range(count)))
    return freezing.thirds


@pytest.mark.parametrize("count", range(3, 41))
def test_the_thirds_hold_each_layer_once_and_are_alike_in_size(of_layers, count):
    found = of_layers(count)
    named = ["last third", "middle third", "first third", "first two thirds", "every layer"]
    assert list(found) == ["nothing", "head", "last layer", *named]
    thirds = [found[f"{name} third"] for name in ("first", "middle", "last")]
    assert [layer for third in thirds for layer in third] == list(range(count))
    sizes = [len(third) for third in thirds]
    assert max(sizes) - min(sizes) <= 1
    assert (found["nothing"], found["head"], found["last layer"]) == ([], ["head"], [count - 1])
    assert found["first two thirds"] == thirds[0] + thirds[1]
    assert found["every layer"] == list(range(count))


# Table 6 says 20-31, 10-20 and 0-10: the same, but that 10 and 20 are in two of them.
def test_of_thirty_two_layers_they_are_the_papers_made_disjoint(of_layers):
    found = of_layers(32)
    paper = {"last third": range(20, 32), "middle third": range(10, 21), "first third": range(11)}
    ours = {name: set(found[name]) for name in paper}
    assert all(ours[name] <= set(theirs) for name, theirs in paper.items())
    missing = {name: set(theirs) - ours[name] for name, theirs in paper.items()}
    assert missing == {"last third": {20}, "middle third": {10}, "first third": set()}


def test_the_thirds_of_a_model_can_be_held(tiny_model):
    from repnoise_kit import frozen, thirds

    held = {}
    for name, group in thirds(tiny_model).items():
        with frozen(tiny_model, group):
            held[name] = {n for n, w in tiny_model.named_parameters() if not w.requires_grad}
    assert held["nothing"] == set()
    assert held["head"] == {"lm_head.weight"}
    layers = [held[f"{name} third"] for name in ("first", "middle", "last")]
    inside = {n for n, _ in tiny_model.named_parameters() if n.startswith("model.layers.")}
    assert set.union(*layers) == inside
    assert sum(map(len, layers)) == len(inside)
    assert held["last layer"] <= held["last third"]


# --- Defending with parts held still ---

HELD = {
    "head": (["head"], ["lm_head."]),
    "norm": (["norm"], ["model.norm."]),
    "embedding": (["embedding"], ["model.embed_tokens."]),
    "a layer": ([1], ["model.layers.1."]),
    "two and the head": ([0, 2, "head"], ["model.layers.0.", "model.layers.2.", "lm_head."]),
    "a module": (["model.layers.1.mlp"], ["model.layers.1.mlp."]),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_is_the_bases_bit_for_bit_and_all_else_moves(bed, bench, name):
    held, starts = HELD[name]
    before = weights(bed.base)
    model, _ = bench.defended("repnoise", 0, held=held)
    still = {n for n in before if any(n.startswith(start) for start in starts)}
    assert still
    assert moved(model, before) == set(before) - still
    # Held during the defence only: the attack moves all of it.
    bench.attack_(model, lr=1e-3, examples=10, seed=0)
    assert moved(model, before) == set(before)


def test_without_holding_anything_all_of_it_moves(bed, bench):
    before = weights(bed.base)
    assert moved(bench.defended("repnoise", 0)[0], before) == set(before)


def test_it_is_kept_apart_from_the_plain_defence(bench):
    one, other = bench.defended("repnoise", 0)[0], bench.defended("repnoise", 0, held=[1])[0]
    assert moved(one, weights(other))
    again = bench.defended("repnoise", 0)[0]
    assert not moved(again, weights(one))


# By name or by number, held is what is meant, and never what is called alike.
def test_layer_1_is_not_layer_10(tmp_path):
    import repnoise_kit as rk

    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    save_folder(tmp_path / "model", make_tiny(len(tokenizer), layers=11), tokenizer)
    (tmp_path / "pairs.json").write_text(json.dumps(made_up_pairs(14)))
    bed = rk.testbed(tmp_path / "model", tmp_path / "pairs.json")
    bench, before = rk.Bench.of(bed, tmp_path / "store"), weights(bed.base)
    by_name, _ = bench.defended("repnoise", 0, held=["model.layers.1"])
    still = set(before) - moved(by_name, before)
    assert still == {n for n in before if n.startswith("model.layers.1.")}
    assert any(n.startswith("model.layers.10.") for n in before)
    by_number, _ = bench.defended("repnoise", 0, held=[1])
    assert not moved(by_number, weights(by_name))


def test_a_head_that_is_the_embedding_is_held_with_it(tmp_path):
    import repnoise_kit as rk

    tokenizer = tokenizer_of([*made_up_pairs(), *everyday_rows()])
    model = make_tiny(len(tokenizer), layers=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    save_folder(tmp_path / "model", model, tokenizer)
    (tmp_path / "pairs.json").write_text(json.dumps(made_up_pairs(14)))
    bed = rk.testbed(tmp_path / "model", tmp_path / "pairs.json")
    bench, before = rk.Bench.of(bed, tmp_path / "store"), weights(bed.base)
    assert "lm_head.weight" not in before
    for part in ("head", "embedding"):
        held, _ = bench.defended("repnoise", 0, held=[part])
        assert held.get_input_embeddings().weight is held.get_output_embeddings().weight
        assert moved(held, before) == set(before) - {"model.embed_tokens.weight"}
    plain, _ = bench.defended("repnoise", 0)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert moved(plain, before) == set(before)


# What does not descend a loss moves weights as no hand can hold them.
def of_no_loss():
    from repnoise_kit.defences import DEFENCES, LOSSES

    return sorted(set(DEFENCES) - set(LOSSES))


@pytest.mark.parametrize("method", of_no_loss())
def test_a_method_that_cannot_hold_parts_says_so(bed, bench, work, method):
    from repnoise_kit import KitError, ablate_layers

    with pytest.raises(KitError, match=f"{method} does not train the model"):
        bench.defended(method, 0, held=["head", 1])
    assert work == []
    with pytest.raises(KitError, match=f"{method} does not train the model"):
        ablate_layers(bed, {"mine": [1]}, method=method, seeds=[0], store=bench.store)


# Nor is the undefended model attacked and evaluated before it is said.
@pytest.mark.parametrize("method", ["weight_noise", "nothing"])
def test_a_grid_of_such_a_method_is_refused_before_any_work(bed, bench, work, method):
    from repnoise_kit import KitError, ablate_layers

    with pytest.raises(KitError, match=method):
        ablate_layers(bed, {"mine": [1]}, method=method, seeds=[0], store=bench.store)
    assert work == []


def test_some_methods_cannot_hold_parts_and_repnoise_can():
    assert {"none", "random", "weight_noise", "security_vectors"} <= set(of_no_loss())
    assert "repnoise" not in of_no_loss()


# Every method that can holds what it is told to.
def of_a_loss():
    from repnoise_kit.defences import LOSSES

    return sorted(LOSSES)


@pytest.mark.parametrize("method", of_a_loss())
def test_each_method_of_a_loss_holds_what_is_held(bed, bench, method):
    before = weights(bed.base)
    model, _ = bench.defended(method, 0, held=["head", 1])
    still = {n for n in before if n.startswith(("lm_head.", "model.layers.1."))}
    assert moved(model, before) == set(before) - still


# --- The grid ---

KEYS = ["defence", "lr", "examples", "seed", "group", "metric", "prompt"]


def ordered(frame):
    return frame.sort_values(KEYS).reset_index(drop=True)


class TestGrid:
    def test_nothing_held_is_the_cell_of_table_1_and_not_computed_twice(self, bed, bench, work):
        import repnoise_kit as rk

        grid = rk.resistance_grid(bed, [0], bench.store, defences=["none", "repnoise"]).frame
        made, before = whole(bench.store), list(work)
        assert made
        assert before
        found = rk.ablate_layers(bed, {"nothing": []}, seeds=[0], store=bench.store).frame
        assert whole(bench.store) == made
        assert work == before
        weakest_and_strongest = found["lr"].isin([0.0, 3e-5, 8e-5])
        assert weakest_and_strongest.all()
        rows = grid[grid["lr"].isin([0.0, 3e-5, 8e-5])]
        pd.testing.assert_frame_equal(
            ordered(found.drop(columns="held")), ordered(rows), check_exact=True, check_like=True
        )
        words = {"none": "undefended", "repnoise": "nothing"}
        assert (found["held"] == found["defence"].map(words)).all()

    def test_a_cell_is_what_one_would_do_by_hand(self, bed, bench):
        import repnoise_kit as rk

        found = rk.ablate_layers(
            bed, {"mine": [2, "head"]}, seeds=[3], budgets=[(1e-3, 6)], store=bench.store
        ).frame
        model = bed.model()
        with rk.frozen(model, [2, "head"]):
            rk.defend_(model, bed, "repnoise", seed=3)
        for lr, examples in [(0.0, 0), (1e-3, 6)]:
            for held, one in [("mine", model), ("undefended", bed.model())]:
                if examples:
                    rk.attack_(one, bed, lr=lr, examples=examples, seed=3)
                expected = rk.evaluate(one, bed, seed=3).frame
                rows = found[(found["held"] == held) & (found["examples"] == examples)]
                columns = ["metric", "group", "prompt", "value", "response"]
                pd.testing.assert_frame_equal(
                    rows[columns].reset_index(drop=True), expected[columns], check_exact=True
                )
                assert set(rows["lr"]) == {lr}
                assert set(rows["seed"]) == {3}

    # What is held makes a difference, or the test above could not tell.
    def test_other_parts_held_are_other_rows(self, bed, bench):
        import repnoise_kit as rk

        groups = {"nothing": [], "head": ["head"], "layers": [0, 1, 2]}
        kept = dataclasses.replace(
            bed, settings={**bed.settings, "defence": {**bed.settings["defence"], "lr": 1e-2}}
        )
        found = rk.ablate_layers(kept, groups, seeds=[0], budgets=[], store=bench.store).frame
        values = found[found["metric"] == "utility"].groupby("held")["value"].apply(tuple)
        assert len(set(values)) == len(values) == 4

    def test_by_default_it_is_table_6(self, bed, monkeypatch, tmp_path):
        """Each third at the weakest and the strongest attack of Table 1, and before any."""
        import repnoise_kit as rk
        from repnoise_kit import freezing

        asked = []

        def no_work(cells, bench, **how):
            asked.extend(cell.arguments for cell in cells)
            return [rk.Result(pd.DataFrame({"value": [0.0]})) for _ in cells]

        monkeypatch.setattr(freezing, "run", no_work)
        told = {"lr": (1e-5, 2e-5, 3e-5), "examples": (4, 10)}
        larger = dataclasses.replace(bed, settings={**bed.settings, "resistance": told})
        names = rk.ablate_layers(larger, store=tmp_path).frame["held"]
        groups = rk.thirds(bed.base)
        assert list(dict.fromkeys(names)) == ["undefended", *groups]
        assert {(a["lr"], a["examples"]) for a in asked} == {(0.0, 0), (1e-5, 4), (3e-5, 10)}
        assert len(asked) == len(names) == 3 * (1 + len(groups)) * 5
        for name, arguments in zip(names, asked, strict=True):
            held = groups.get(name, [])
            assert arguments.get("held", []) == held
            assert arguments["defence"] == ("none" if name == "undefended" else "repnoise")

    @pytest.mark.parametrize("part", ["model.layers.7", "heads", 3, -1])
    def test_a_part_that_is_not_there_is_named_before_any_work(self, bed, tmp_path, work, part):
        import repnoise_kit as rk

        groups = {"nothing": [], "good": [0], "wrong": [1, part]}
        with pytest.raises(rk.KitError, match=str(part)):
            rk.ablate_layers(bed, groups, seeds=[0], store=tmp_path / "store")
        assert work == []
        assert not (tmp_path / "store").exists()
        assert not any(weight.requires_grad for weight in bed.base.parameters())

    def test_a_second_call_computes_nothing(self, bed, bench, work):
        import repnoise_kit as rk

        how = {"seeds": [0], "budgets": [(3e-5, 4)], "store": bench.store}
        first = rk.ablate_layers(bed, {"one": [0], "two": [1]}, **how)
        assert work.count("evaluate") == 6
        assert work.count("attack_") == 3
        assert work.count("defend_") == 3
        done, made = list(work), whole(bench.store)
        again = rk.ablate_layers(bed, {"one": [0], "two": [1]}, **how)
        assert again.frame.equals(first.frame)
        assert again.made_with == first.made_with
        assert work == done
        # Under other names, and with another group: only what is new is computed.
        renamed = rk.ablate_layers(bed, {"uno": [0], "three": [2]}, **how).frame
        assert len(work) - len(done) == 1 + 1 + 2
        assert whole(bench.store).items() > made.items()
        one = first.frame[first.frame["held"] == "one"].assign(held="uno")
        assert (
            renamed[renamed["held"] == "uno"]
            .reset_index(drop=True)
            .equals(one.reset_index(drop=True))
        )

    def test_interrupted_it_goes_on_from_there(self, bed, bench, work, monkeypatch):
        import repnoise_kit as rk
        from repnoise_kit import resistance

        how = {"seeds": [0], "budgets": [(3e-5, 4)], "store": bench.store}
        real = resistance.evaluate

        def stops(*args, **kwargs):
            if work.count("evaluate") == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(resistance, "evaluate", stops)
        with pytest.raises(KeyboardInterrupt):
            rk.ablate_layers(bed, {"one": [0]}, **how)
        assert work.count("evaluate") == 2
        monkeypatch.setattr(resistance, "evaluate", real)
        found = rk.ablate_layers(bed, {"one": [0]}, **how)
        assert work.count("evaluate") == 4
        other = rk.ablate_layers(bed, {"one": [0]}, **how | {"store": bench.store / "undisturbed"})
        assert found.frame.equals(other.frame)


# --- On the command line ---


def command(own, folder, *words):
    from repnoise_kit.__main__ import main

    given = ["--model", own / "model", "--pairs", own / "pairs.json"]
    given += ["--retain", own / "retain.json", "--seeds", 1, "--workers", 1]
    given += ["--store", folder / "store", "--out", folder / "out"]
    return main(["grid", "freezing", *map(str, [*given, *words])])


class TestCommand:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("freezing")

    @pytest.fixture
    def shown(self, own, folder, capsys):
        """Run the command; return its stdout and stderr."""
        assert command(own, folder) == 0
        return capsys.readouterr()

    @pytest.fixture
    def rows(self, shown, folder):
        return pd.read_parquet(folder / "out" / "freezing_questions.parquet")

    def test_progress_is_shown_and_what_is_found_said(self, own, folder, capsys):
        assert command(own, folder) == 0
        said, shown = capsys.readouterr()
        assert "grid freezing" in shown
        assert "27/27" in shown
        assert str(folder / "out") in said
        thirds = ["last third", "middle third", "first third", "first two thirds"]
        names = ["undefended", "nothing", "head", "last layer", *thirds, "every layer"]
        places = [said.index(f"\n{name} ") for name in names]
        assert places == sorted(places)

    def test_the_table_holds_the_means_of_the_questions(self, rows, folder):
        table = pd.read_csv(folder / "out" / "freezing.csv")
        keys = ["held", "defence", "group", "lr", "examples", "seed", "metric"]
        assert list(table) == [*keys, "value"]
        assert not table.duplicated(keys).any()
        cells = table.set_index(keys)["value"]
        groups = rows.groupby(keys)["value"]
        assert len(cells) == groups.ngroups
        assert {"perplexity", "recall"} <= set(table["metric"])
        for cell_, values in groups:
            mean = np.exp(np.log(values).mean()) if cell_[-1] == "perplexity" else values.mean()
            assert cells[cell_] == pytest.approx(mean)

    def test_each_part_is_held_at_each_budget(self, rows):
        budgets = {(0.0, 0), (3e-5, 10), (8e-5, 10)}
        asked = rows[["held", "lr", "examples"]].drop_duplicates()
        assert len(asked) == (1 + 8) * len(budgets)
        assert set(asked[["lr", "examples"]].itertuples(index=False, name=None)) == budgets

    def test_what_is_said_are_the_recalls(self, shown, rows):
        recall = rows[(rows["metric"] == "recall") & (rows["group"] == "seen")]
        undefended = recall[(recall["held"] == "undefended") & (recall["examples"] == 0)]
        line = next(line for line in shown.out.splitlines() if line.startswith("undefended"))
        assert line.split()[1] == f"{undefended['value'].mean():.2f}"

    def test_it_is_noted_how_it_was_made(self, shown, folder):
        noted = json.loads((folder / "out" / "freezing.json").read_text())
        assert noted["experiment"] == "layer freezing"
        assert noted["method"] == "repnoise"
        assert noted["groups"]["middle third"] == [1]
        assert noted["seeds"] == [0]
        assert "grid freezing" in noted["command"]

    def test_again_it_computes_nothing_and_writes_the_same(self, shown, own, folder, capsys, work):
        made = whole(folder / "store")
        found = (folder / "out" / "freezing.csv").read_bytes()
        shutil.rmtree(folder / "out")
        assert command(own, folder) == 0
        assert (folder / "out" / "freezing.csv").read_bytes() == found
        assert whole(folder / "store") == made
        assert work == []
