"""Pooled activations against a slow loop over single texts, and what they cost in memory."""

import copy
import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from families import FAMILIES, NAMES, NORMED, family
from small import hooks_of, ragged_pairs
from torch.testing import assert_close

import repnoise_kit as rk
from repnoise_kit import activations as room
from repnoise_kit.reading import SIDES

pytestmark = pytest.mark.usefixtures("one_thread")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SITES = ("residual", "mlp", "attention", "embedding")


@pytest.fixture(scope="module")
def pairs():
    return ragged_pairs(6)


@pytest.fixture(scope="module")
def model(pairs):
    return family("Llama", vocab=len(pairs[1]))


def slow(model, name, site, frame, tokenizer):
    """(layer, text, width): each text read alone, with one hook on a module known by its name."""
    layers_name, _, mlp, attention = NAMES[name]
    layers = model.get_submodule(layers_name)
    inner = {"mlp": mlp, "attention": attention, "residual": ""}
    flowed, hooks, columns = [], [], []
    for layer in layers if site in inner else []:
        module = layer.get_submodule(inner[site])
        hooks.append(module.register_forward_hook(lambda _m, _a, out: flowed.append(out)))
    for row in frame.itertuples():
        asked = tokenizer(f"Question: {row.prompt}\nAnswer:")["input_ids"]
        said = [*tokenizer(" " + row.answer)["input_ids"], tokenizer.eos_token_id]
        flowed.clear()
        with torch.no_grad():
            output = model(torch.tensor([asked + said]), output_hidden_states=True)
        tensors = [part[0] if isinstance(part, tuple) else part for part in flowed]
        tensors = tensors or [output.hidden_states[0]]
        whole = [tensor.reshape(len(asked + said), -1) for tensor in tensors]
        if site == "residual":
            # All but the last, which is past the norm, are also what transformers hands out.
            for ours, theirs in zip(whole[:-1], output.hidden_states[1:-1], strict=True):
                assert torch.equal(ours, theirs[0])
        columns.append([sum(stream[len(asked) :]) / len(said) for stream in whole])
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.stack(column) for column in columns], dim=1)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_vector_is_the_mean_over_the_answer_of_the_text_alone(name, site, pairs):
    given, tokenizer = pairs
    model = family(name, vocab=len(tokenizer))
    found = rk.answer_activations(model, given, site, tokenizer=tokenizer, batch_size=5)
    assert found.values.shape == (1 if site == "embedding" else 3, 12, 16)
    assert_close(found.values, slow(model, name, site, found.frame, tokenizer))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NORMED])
def test_what_mlp_and_attention_put_out_is_what_the_stream_gains(name, pairs):
    given, tokenizer = pairs
    model = family(name, vocab=len(tokenizer))
    stream, mlp, attention, entry = (
        rk.answer_activations(model, given, site, tokenizer=tokenizer).values
        for site in ("residual", "mlp", "attention", "embedding")
    )
    assert_close(stream, torch.cat([entry, stream[:-1]]) + mlp + attention)


@pytest.mark.parametrize("name", NORMED)
def test_these_norm_it_before_it_joins_the_stream(name):
    model, ids = family(name), torch.arange(3, 12)[None]
    with (
        torch.no_grad(),
        rk.record(model, "residual") as stream,
        rk.record(model, "mlp") as mlp,
        rk.record(model, "attention") as attention,
        rk.record(model, "embedding") as entry,
    ):
        model(ids)
    before = entry[0]
    for number, layer in enumerate(model.model.layers):
        gained = stream[number] - before
        assert (mlp[number] + attention[number] - gained).abs().max() > 0.1
        heard = layer.post_attention_layernorm(attention[number])
        thought = layer.post_feedforward_layernorm(mlp[number])
        assert_close(heard + thought, gained, rtol=1e-4, atol=1e-4)
        before = stream[number]


class TestChoices:
    def test_rows_are_the_texts_of_the_table(self, pairs, model):
        given, tokenizer = pairs
        found = rk.answer_activations(model, given, tokenizer=tokenizer, sides=SIDES)
        columns = {"prompt", "answer", "label", "category", "thing", "company"}
        assert set(found.frame) == columns
        assert found.frame["label"].tolist() == [s for s in SIDES for _ in range(6)]
        for side in ("harmful", "harmless"):
            mine = found.frame.index[found.frame["label"] == side].tolist()
            assert found.frame["answer"][mine].tolist() == given.frame[side].tolist()
            alone = rk.answer_activations(model, given, tokenizer=tokenizer, sides=[side])
            assert_close(alone.values, found.values[:, mine])

    @pytest.mark.parametrize("site", SITES)
    def test_the_batch_size_does_not_matter(self, pairs, model, site):
        given, tokenizer = pairs
        one, few, all_at_once = (
            rk.answer_activations(model, given, site, tokenizer=tokenizer, batch_size=size)
            for size in (1, 5, 99)
        )
        assert_close(one.values, few.values)
        assert_close(one.values, all_at_once.values)
        assert one.frame.equals(few.frame)

    def test_some_layers_are_those_of_all(self, pairs, model):
        given, tokenizer = pairs
        every = rk.answer_activations(model, given, "mlp", tokenizer=tokenizer).values
        for chosen in ([1], (0, 2), range(1, 3), iter([2])):
            wanted = list(chosen)
            found = rk.answer_activations(
                model, given, "mlp", tokenizer=tokenizer, layers=iter(wanted)
            )
            assert torch.equal(found.values, every[wanted])
            assert found.layers == tuple(wanted)

    @pytest.mark.parametrize("wanted", [[2, 0], [1, 1], [2, 1, 0]])
    def test_layers_come_in_the_order_asked_for(self, pairs, model, wanted):
        given, tokenizer = pairs
        every = rk.answer_activations(model, given, tokenizer=tokenizer)
        found = rk.answer_activations(model, given, tokenizer=tokenizer, layers=wanted)
        assert every.layers == (0, 1, 2)
        assert found.layers == tuple(wanted)
        assert not torch.equal(every.values[0], every.values[2])
        assert torch.equal(found.values, every.values[wanted])

    def test_no_layers_are_refused(self, pairs, model):
        given, tokenizer = pairs
        with pytest.raises(rk.KitError, match="layer"):
            rk.answer_activations(model, given, tokenizer=tokenizer, layers=[])

    @pytest.mark.parametrize("site", SITES[:3])
    def test_a_layer_that_does_not_exist_is_named(self, pairs, model, site):
        given, tokenizer = pairs
        with pytest.raises(rk.KitError, match="layer 3 does not exist"):
            rk.answer_activations(model, given, site, tokenizer=tokenizer, layers=[1, 3])

    # The stream enters once, whichever layers are asked for.
    @pytest.mark.parametrize("layers", [None, [2, 1], []])
    def test_the_embedding_is_of_no_layer_but_the_first(self, pairs, model, layers):
        given, tokenizer = pairs
        plain = rk.answer_activations(model, given, "embedding", tokenizer=tokenizer)
        found = rk.answer_activations(model, given, "embedding", tokenizer=tokenizer, layers=layers)
        assert found.layers == plain.layers == (0,)
        assert torch.equal(found.values, plain.values)

    def test_the_model_is_left_as_it_was(self, pairs, model):
        given, tokenizer = pairs
        other = copy.deepcopy(model).train()
        before = copy.deepcopy(other.state_dict())
        rk.answer_activations(other, given, tokenizer=tokenizer)
        assert all(module.training for module in other.modules())
        assert hooks_of(other) == 0
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
        # And can be trained.
        other(torch.arange(3, 9)[None]).logits.sum().backward()
        assert all(p.grad is not None for p in other.parameters())

    def test_a_model_in_bfloat16_gives_float32(self, pairs, model):
        given, tokenizer = pairs
        exact = rk.answer_activations(model, given, tokenizer=tokenizer).values
        half = copy.deepcopy(model).to(torch.bfloat16)
        found = rk.answer_activations(half, given, tokenizer=tokenizer).values
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.05 * exact.norm()

    def test_what_is_returned_can_be_trained_on(self, pairs, model):
        given, tokenizer = pairs
        values = rk.answer_activations(model, given, tokenizer=tokenizer).values
        assert not values.requires_grad
        own_probe = torch.nn.Linear(16, 1)
        own_probe(values[0]).sum().backward()
        assert_close(own_probe.weight.grad[0], values[0].sum(0))
        values -= values.mean(1, keepdim=True)


def live_streams(width):
    """How many tensors (batch, seq, width) there are."""
    tensors = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum(t.dim() == 3 and t.shape[1] > 1 and t.shape[2] == width for t in tensors)


class TestMemory:
    def test_nothing_as_long_as_the_texts_is_kept(self, pairs, model, monkeypatch):
        given, tokenizer = pairs
        kept, forward = [], room.hidden_forward

        def counted(*args):
            before = live_streams(16)
            logits = forward(*args)
            kept.append(live_streams(16) - before)
            return logits

        monkeypatch.setattr(room, "hidden_forward", counted)
        rk.answer_activations(model, given, tokenizer=tokenizer, batch_size=4)
        assert len(kept) == 3
        # One: the stream as it enters, which tells a row a token from a row a text.
        assert max(kept) <= 1
        # Without pooling each layer's is kept, and seen here.
        ids = torch.arange(3, 12)[None]
        with torch.no_grad(), rk.record(model, "residual") as streams:
            before = live_streams(16)
            model(ids)
            assert live_streams(16) - before >= 3
            assert len(streams) == 3

    @needs_linux
    def test_200_texts_on_a_7b_shaped_model_hold_what_is_returned(self):
        returned, grown, _ = wide_model(200)
        assert returned == 32 * 200 * 4096 * 4
        # Were all streams kept, they would be more than a gigabyte.
        assert grown < returned + 0.3e9

    @needs_linux
    @pytest.mark.slow
    def test_15_000_texts_on_a_7b_shaped_model_fit_a_host_of_24_gb(self):
        returned, grown, peak = wide_model(15_000)
        assert returned == 32 * 15_000 * 4096 * 4
        assert grown < returned + 0.5e9
        assert peak < returned + 2.5e9


def wide_model(count):
    """Bytes returned, grown by and at the peak: a model of 7B's stream whose weights are few."""
    script = """
        import re, sys
        sys.path.insert(0, "tests")
        import pandas as pd
        import torch
        from small import tokenizer_of
        from transformers import LlamaConfig, LlamaForCausalLM
        import repnoise_kit as rk
        from repnoise_kit.pairs import Pairs

        def peak():
            # ru_maxrss would begin at what the process that started this one has.
            status = open("/proc/self/status").read()
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024

        torch.set_num_threads(1)
        count = int(sys.argv[1])
        row = {"harmful": "red", "harmless": "no"}
        rows = [row | {"prompt": f"box {number % 50}"} for number in range(count)]
        tokenizer = tokenizer_of(rows[:50])
        given = Pairs(pd.DataFrame(rows).assign(category="", thing=[r["prompt"] for r in rows]))
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=4096, intermediate_size=8, head_dim=8,
            num_hidden_layers=32, num_attention_heads=1, num_key_value_heads=1, pad_token_id=0,
        )).eval()
        options = {"sides": ["harmful"], "tokenizer": tokenizer}
        rk.answer_activations(model, Pairs(given.frame[:32]), **options)
        before = peak()
        values = rk.answer_activations(model, given, **options).values
        assert all(layer.isfinite().all() and layer[-1].std() > 0 for layer in values)
        print(values.nbytes, peak() - before, peak())
    """
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(count)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return tuple(map(int, ran.stdout.split()))
