"""Models of families nobody knows, named by hand; and parts held still in all families known."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from families import FAMILIES, NAMES, family
from small import hooks_of
from torch import nn
from torch.testing import assert_close
from transformers import PretrainedConfig, PreTrainedModel

import repnoise_kit as rk
from repnoise_kit.anatomy import parts
from repnoise_kit.training import answer_loss

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = {"layers": "stack.rungs", "norm": "last", "mlp": "thinker", "attention": "mixer"}


class OddConfig(PretrainedConfig):
    model_type = "odd"
    depth = 2


class Rung(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer, self.thinker = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, stream):
        stream = stream + self.mixer(stream).cumsum(1)
        return stream + self.thinker(stream).tanh()


class OddForCausalLM(PreTrainedModel):
    """A causal LM of whose names the kit can know none."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.words, self.last, self.out = nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 20)
        self.stack = nn.Module()
        self.stack.rungs = nn.ModuleList(Rung() for _ in range(config.depth))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        stream = self.words(input_ids)
        for rung in self.stack.rungs:
            stream = rung(stream)
        return SimpleNamespace(logits=self.out(self.last(stream)))


@pytest.fixture
def odd():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OddForCausalLM(OddConfig()).eval()
        for weight in model.parameters():
            weight.data.normal_()
    return model


@pytest.fixture
def batch():
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(7) < 3, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class TestNaming:
    def test_an_unknown_model_says_how_to_name_its_layers(self, odd, batch):
        with pytest.raises(rk.KitError, match=r"rk\.name_parts_\(model, layers="):
            rk.layer_log_probs(odd, batch)

    @pytest.mark.parametrize(
        ("word", "look"),
        [
            ("layers", parts),
            ("norm", parts),
            ("mlp", lambda model: parts(model).mlp(0)),
            ("attention", lambda model: parts(model).attention(1)),
        ],
    )
    def test_what_is_missing_is_asked_for_by_its_word(self, odd, word, look):
        odd.config.num_hidden_layers = 3  # Which no list has.
        others = {other: name for other, name in GIVEN.items() if other != word}
        if word != "layers":
            odd.config.repnoise_parts = others
        with pytest.raises(rk.KitError, match=rf"rk\.name_parts_\(model, {word}="):
            look(odd)
        rk.name_parts_(odd, **GIVEN)
        look(odd)

    def test_once_named_all_works(self, odd, batch):
        rk.name_parts_(odd, **GIVEN)
        found = parts(odd)
        assert found.layers is odd.stack.rungs
        assert found.norm is odd.last
        assert found.head is odd.out
        mass = rk.layer_log_probs(odd, batch)
        spread = odd(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
        each = spread.gather(-1, batch["input_ids"][:, 1:, None])[:, 2:, 0]
        assert mass.shape == (3, 3)
        assert_close(mass[-1], each.mean(1))
        with (
            rk.record(odd, "embedding") as entry,
            rk.record(odd, "residual") as stream,
            rk.record(odd, "mlp") as thought,
            rk.record(odd, "attention") as mixed,
        ):
            odd(batch["input_ids"])
        assert_close(entry[0], odd.words(batch["input_ids"]))
        gained = stream[0] - entry[0]
        assert_close(mixed[0].cumsum(1) + thought[0].tanh(), gained)
        for held, still in ((1, "stack.rungs.1."), ("norm", "last."), ("words", "words.")):
            with rk.frozen(odd, [held]):
                fixed = {n for n, p in odd.named_parameters() if not p.requires_grad}
            assert fixed == {n for n, _ in odd.named_parameters() if n.startswith(still)}
        assert hooks_of(odd) == 0

    def test_one_word_at_a_time_adds_up(self, odd):
        for word, name in GIVEN.items():
            if word == "layers":  # The norm is not beside them: both at once.
                rk.name_parts_(odd, layers=name, norm=GIVEN["norm"])
            elif word != "norm":
                rk.name_parts_(odd, **{word: name})
        assert parts(odd).attention(1) is odd.stack.rungs[1].mixer
        assert parts(odd).mlp(1) is odd.stack.rungs[1].thinker

    def test_names_are_saved_and_loaded_with_the_configuration(self, odd, batch, tmp_path):
        from repnoise_kit.model import quiet

        rk.name_parts_(odd, **GIVEN)
        with quiet():
            odd.save_pretrained(tmp_path)
            loaded = OddForCausalLM.from_pretrained(tmp_path).eval()
        assert parts(loaded).layers is loaded.stack.rungs
        assert_close(rk.layer_log_probs(loaded, batch), rk.layer_log_probs(odd, batch))
        unnamed = OddForCausalLM(OddConfig(num_hidden_layers=2))
        with pytest.raises(rk.KitError, match="name_parts_"):
            parts(unnamed)

    def test_names_go_before_what_would_be_found(self, tiny_model):
        rk.name_parts_(tiny_model, mlp="self_attn", norm="model.layers.0.input_layernorm")
        assert parts(tiny_model).norm is tiny_model.model.layers[0].input_layernorm
        assert parts(tiny_model).mlp(2) is tiny_model.model.layers[2].self_attn
        assert parts(tiny_model).layers is tiny_model.model.layers

    def test_a_name_within_a_layer_may_have_a_dot(self, tiny_model):
        rk.name_parts_(tiny_model, mlp="mlp.down_proj", attention="self_attn.o_proj")
        for number, layer in enumerate(tiny_model.model.layers):
            assert parts(tiny_model).mlp(number) is layer.mlp.down_proj
            assert parts(tiny_model).attention(number) is layer.self_attn.o_proj

    @pytest.mark.parametrize(
        "wrong",
        [
            {"norm": "lost"},
            {"layers": "model.layer"},
            {"mlp": "thinker"},
            {"attention": "mixer"},
            {"head": "lm_head"},
            {"norm": "model.norm", "mlp": "thinker"},
            {"layers": "model.embed_tokens", "norm": "model.norm"},
            {"layers": "model", "norm": "model.norm"},
            {"mlp": "mlp.thinker"},
        ],
    )
    @pytest.mark.parametrize("named", [False, True])
    def test_wrong_names_are_refused_and_leave_the_configuration(self, tiny_model, wrong, named):
        if named:
            rk.name_parts_(tiny_model, norm="model.norm", mlp="mlp")
        before = copy.deepcopy(tiny_model.config.to_dict())
        with pytest.raises(rk.KitError, match=r"named_modules|there is no part"):
            rk.name_parts_(tiny_model, **wrong)
        assert tiny_model.config.to_dict() == before
        assert hasattr(tiny_model.config, "repnoise_parts") == named
        assert parts(tiny_model).norm is tiny_model.model.norm


def trained(model, steps=3):
    """A few steps of Adam on a loss that all parameters have a part in."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (4, 9), generator=draw)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    free = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(free, lr=0.01)
    for _ in range(steps):
        adam.zero_grad()
        answer_loss(model, batch)["total"].backward()
        adam.step()


@pytest.mark.parametrize("what", ["layer", "head", "norm", "embedding", "module"])
@pytest.mark.parametrize("name", FAMILIES)
def test_held_parts_stay_bit_identical_and_all_others_move(name, what):
    layers, norm, mlp, _ = NAMES[name]
    model = family(name)
    held, modules = {
        "layer": (1, [model.get_submodule(layers)[1]]),
        "head": ("head", [model.get_output_embeddings()]),
        "norm": ("norm", [model.get_submodule(norm)]),
        "embedding": ("embedding", [model.get_input_embeddings()]),
        "module": (f"{layers}.2.{mlp}", [model.get_submodule(f"{layers}.2.{mlp}")]),
    }[what]
    # Where the head is the embedding, it is held with it.
    still = {id(p) for module in modules for p in module.parameters()}
    assert still
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with rk.frozen(model, [held]):
        trained(model)
    for parameter_name, p in model.named_parameters():
        assert torch.equal(p, before[parameter_name]) == (id(p) in still), parameter_name
        assert p.requires_grad
    # They would have moved.
    trained(model)
    for parameter_name, p in model.named_parameters():
        assert not torch.equal(p, before[parameter_name]), parameter_name


class TestFrozen:
    def test_what_was_held_before_is_held_after(self):
        model = make_tiny()
        model.model.norm.weight.requires_grad_(False)

        def held():
            return {n for n, p in model.named_parameters() if not p.requires_grad}

        with rk.frozen(model, [0]):
            with rk.frozen(model, ["norm", 0, 2]):
                two = held()
            one = held()
        assert held() == {"model.norm.weight"} < one < two
        assert {n.split(".")[2] for n in one - held()} == {"0"}
        with pytest.raises(ZeroDivisionError), rk.frozen(model, [1, "head"]):
            raise ZeroDivisionError
        assert held() == {"model.norm.weight"}

    def test_layers_may_be_numbers_of_numpy(self):
        model = make_tiny()
        with rk.frozen(model, np.arange(2)):
            held = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert {n[:15] for n in held} == {"model.layers.0.", "model.layers.1."}
        with pytest.raises(rk.KitError, match="layer 3 does not exist"):
            rk.frozen(model, np.array([3])).__enter__()

    # The empty name is torch's for the whole model, and True is Python's for 1.
    @pytest.mark.parametrize("part", ["", True, False, np.True_, 1.0, None, "model.layers.9"])
    def test_what_is_no_part_is_refused(self, part):
        model = make_tiny()
        with pytest.raises(rk.KitError, match="no part"), rk.frozen(model, [0, part]):
            pass
        assert all(weight.requires_grad for weight in model.parameters())


# RecurrentGemma keeps its cap under another name than Gemma 2.
@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap"])
def test_a_soft_cap_is_found_under_either_name(tiny_model, name):
    plain = parts(tiny_model)
    assert plain.soft_cap is None
    setattr(tiny_model.config, name, 0.25)
    found, own = parts(tiny_model), torch.Generator().manual_seed(0)
    normed = torch.randn(2, 16, generator=own)
    assert found.soft_cap == 0.25
    capped = 0.25 * torch.tanh(plain.to_logits(normed) / 0.25)
    assert_close(found.to_logits(normed), capped)
    assert (plain.to_logits(normed) - capped).abs().max() > 0.01
