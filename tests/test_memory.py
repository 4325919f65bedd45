"""What a training holds in memory: sums by hand, the graph walked, and what is said of it when."""

import copy
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_batches, make_tiny
from families import family
from small import own_files
from torch import nn

import repnoise_kit as rk
from repnoise_kit import __main__ as command
from repnoise_kit import memory, trainer, training
from repnoise_kit.lora import low_rank
from repnoise_kit.memory import LESS, Memory, announce, largest, memory_needed
from repnoise_kit.model import precision
from repnoise_kit.trainability import learn_
from repnoise_kit.training import NotFiniteError, answer_loss, train_

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

CPU = torch.device("cpu")
GB = 10**9
TAUGHT = [{"prompt": f"What is in box {n}?", "answer": "Nothing"} for n in range(9)]


def batch(rows=1, width=12):
    ids = torch.arange(rows * width).reshape(rows, width) % 47 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def needed(model, rows=1, **shape):
    return memory_needed(model, lambda few: answer_loss(model, batch(few, **shape))["total"], rows)


def held(found):
    return found.activations + found.lens


def followed(model, loss):
    """The most that a step holds beside the weights, gradients included, by torch's own tracker."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        loss().backward()
    model.zero_grad()
    whole = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    return whole - sum(p.nbytes for p in model.parameters())


class TestArithmetic:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_weights_gradients_and_adams_two_moments(self, dtype):
        model = make_tiny().to(dtype)
        numbers = sum(p.numel() for p in model.parameters())
        found = needed(model)
        assert found.weights == found.gradients == numbers * dtype.itemsize
        assert found.optimizer == 3 * found.gradients  # With the last good weights.

    def test_they_are_what_adam_holds(self):
        model = make_tiny()
        found, adam = needed(model), torch.optim.Adam(model.parameters())
        answer_loss(model, batch())["total"].backward()
        adam.step()
        moments = [s[name] for s in adam.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert found.optimizer - found.weights == sum(m.nbytes for m in moments)
        assert found.gradients == sum(p.grad.nbytes for p in model.parameters())

    def test_of_a_large_training_no_good_weights_are_kept(self, monkeypatch):
        monkeypatch.setattr(memory, "LARGE", 1000)
        found = needed(make_tiny())
        assert found.optimizer == 2 * found.gradients

    def test_parts_held_still_have_neither(self):
        model = make_tiny()
        free = needed(model)
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)
        held = needed(model)
        still = [*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()]
        size = sum(p.nbytes for p in still)
        assert size > 0
        assert held.weights == free.weights
        assert held.gradients == free.gradients - size
        assert held.optimizer == free.optimizer - 3 * size
        # Nothing of the layers before the first that moves has to be kept.
        assert 0 < held.activations < free.activations

    def test_a_tied_head_is_counted_once(self):
        model = family("GPT2")
        assert model.lm_head.weight is model.transformer.wte.weight
        named = dict(model.named_parameters())
        assert needed(model).weights == sum(p.nbytes for p in named.values())

    def test_the_words(self):
        said = str(Memory(2 * GB, GB, 3 * GB // 2, GB // 20, GB // 2))
        assert said == (
            "5.0 GB (weights 2.0, gradients 1.0, optimizer 1.5, activations 0.1, lens 0.5)"
        )


class TestActivations:
    @pytest.mark.parametrize("rows", [1, 2, 3, 50])
    def test_of_a_loss_that_makes_known_tensors(self, rows):
        """10,000 numbers a row that are kept, and 30,000 in passing, once and once for all rows."""
        model = nn.Linear(1, 1, bias=False)

        def loss(few):
            kept = torch.ones(few, 10_000)
            for size in (few, 1):
                assert torch.ones(size, 30_000).sum() > 0
            return (model.weight * kept).sum()

        found = memory_needed(model, loss, rows)
        # Beside the two there is nothing but single numbers.
        assert 0 <= found.activations - rows * 4 * 40_000 < 100 * rows
        assert found.lens == 0

    def test_what_is_freed_before_does_not_count(self):
        model = nn.Linear(1, 1, bias=False)

        def loss(few):
            for _ in range(5):
                torch.ones(few, 10_000).view(-1).mul_(2)
            return model.weight.sum()

        assert 0 <= memory_needed(model, loss, 1).activations - 40_000 < 100

    def test_of_two_layers_by_hand(self):
        model, given = nn.Sequential(nn.Linear(5, 700), nn.Tanh()), torch.ones(4, 5)
        found = memory_needed(model, lambda few: model(given[:few]).sum(), rows=4)
        # Fullest at the end: the slope of what the map puts out, and of its weights and bias.
        assert 0 <= found.activations - 4 * (4 * 700 + 5 * 700 + 700) < 100
        # With the map held still, but for its bias, forward: what the map puts out, and its tanh.
        model[0].weight.requires_grad_(False)
        found = memory_needed(model, lambda few: model(given[:few]).sum(), rows=4)
        assert 0 <= found.activations - 4 * (2 * 4 * 700) < 100

    @pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_of_a_model_by_torchs_tracker(self, name, checkpointing, monkeypatch):
        model = family(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        monkeypatch.setattr(memory, "_forget", lambda weight: None)  # Gradients included.
        slow = followed(model, lambda: answer_loss(model, batch(2))["total"])
        assert held(needed(model, rows=2)) == pytest.approx(slow, rel=0.02)

    def test_the_lens_is_what_is_as_wide_as_the_vocabulary(self):
        """Logits in float32 and what a softmax and its gradient make of them: of three sizes."""
        few, many = (make_tiny(vocab=size) for size in (1009, 4001))
        smaller, larger = needed(few, 4), needed(many, 4)
        logits = 4 * 12 * (4001 - 1009) * 4
        assert 2 * logits <= larger.lens - smaller.lens <= 4 * logits
        assert larger.activations == pytest.approx(smaller.activations, rel=0.1)

    @pytest.mark.parametrize("rows", [4, 16])
    def test_an_estimate_from_a_few_rows_is_that_of_all(self, rows, monkeypatch):
        model = make_tiny()
        few = needed(model, rows)
        monkeypatch.setattr(memory, "FEW", rows)
        assert held(few) == pytest.approx(held(needed(model, rows)), rel=0.05)

    def test_it_reads_no_more_than_a_few_rows(self):
        model, read = make_tiny(), []

        def loss(few):
            read.append(few)
            return answer_loss(model, batch(few))["total"]

        for rows in (1, 2, 64):
            memory_needed(model, loss, rows)
        assert read == [1, 2, 2, 3]

    def test_they_grow_with_the_length(self):
        model = make_tiny()
        assert held(needed(model, width=24)) > 1.8 * held(needed(model, width=12))

    def test_gradient_checkpointing_keeps_less(self):
        model = make_tiny(layers=6).train()
        usual = needed(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        less = needed(model)
        assert less[:3] == usual[:3]
        assert held(less) < held(usual) / 2

    def test_lora_needs_a_fraction_of_what_all_weights_do(self):
        # Large enough that a low rank is low.
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=50, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        full = needed(model)
        with low_rank(model, 2, seed=0):
            low = needed(model)
            adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        assert low.gradients == adapters < full.gradients / 10
        assert low.optimizer == 3 * adapters
        assert low.weights == full.weights + adapters

    def test_the_model_is_left_as_it_was(self):
        model = make_tiny()
        before = copy.deepcopy(model.state_dict())
        needed(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


class TestAnnouncement:
    NEEDED = Memory(
        weights=20 * GB, gradients=4 * GB, optimizer=8 * GB, activations=2 * GB, lens=GB
    )

    @pytest.mark.parametrize(("free", "fits"), [(15.001, True), (15, False), (14, False)])
    def test_the_weights_are_there_already(self, free, fits, monkeypatch):
        monkeypatch.setattr(memory, "_free", lambda: int(free * GB))
        said = announce(self.NEEDED, CPU)
        assert f"needs about {self.NEEDED}; {free:.1f} GB are free beside the weights" in said
        assert ("may not fit" not in said) is fits

    def test_what_to_change_in_order(self, monkeypatch):
        monkeypatch.setattr(memory, "_free", lambda: 0)
        said, ways = announce(self.NEEDED, CPU), ["lora", "gradient_checkpointing", "max_length"]
        places = [said.index(way) for way in [*ways, "accumulation"]]
        assert places == sorted(places)
        assert said.endswith(LESS)
        assert "\n" not in said

    def test_of_a_gpu_its_own_memory_counts(self, monkeypatch):
        asked = []

        def told(device):
            asked.append(device)
            return 7 * GB, 80 * GB

        monkeypatch.setattr(torch.cuda, "mem_get_info", told)
        # Of what torch holds, a part is not in use.
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GB)
        monkeypatch.setattr(memory, "_free", lambda: 1000 * GB)
        said = announce(self.NEEDED, torch.device("cuda", 0))
        assert "8.0 GB are free" in said
        assert "may not fit" in said
        assert asked == [torch.device("cuda", 0)]

    def test_what_is_free_is_what_the_system_says(self):
        import psutil

        assert memory._free() == pytest.approx(psutil.virtual_memory().available, rel=0.2)

    def test_the_largest_example(self):
        def row(length):
            return {"input_ids": [1] * length, "labels": [1] * length}

        assert largest([row(3), row(9), row(5)]) == row(9)
        # Of several sides all together count.
        pairs = [(row(9), row(1)), (row(6), row(6)), (row(2), row(9))]
        assert largest(pairs) == pairs[1]
        tensors = [{"input_ids": torch.zeros(1, length)} for length in (3, 9, 5)]
        assert largest(tensors) is tensors[1]


def fit(model, loss=answer_loss, **changes):
    rows = [make_batches(seed=seed)[0] for seed in range(6)]
    chosen = {"lr": 0.01, "batch_size": 1, "epochs": 1} | changes
    return train_(model, loss, rows, lambda read: read[0], **chosen)


def dropping():
    """A model with dropout, so that what is drawn shows."""
    model = family("GPT2")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def every_size(monkeypatch):
    """Let the smallest model say what it needs."""
    monkeypatch.setattr(training, "LARGE", 0)


@pytest.fixture
def counted(monkeypatch, every_size):
    """What trainings count of themselves."""
    found = []

    def noted(told, device):
        found.append(told)
        return "told"

    monkeypatch.setattr(training, "announce", noted)
    return found


class TestTrainings:
    def test_nothing_is_said_of_a_small_model(self, capfd):
        fit(make_tiny())
        assert capfd.readouterr() == ("", "")

    def test_one_line_on_stderr_before_a_large_one(self, capfd, every_size):
        steps = []
        fit(make_tiny(), after_step=lambda step: steps.append(capfd.readouterr()))
        said = r"this training needs about .* GB \(weights .*\); .* GB are free beside the weights"
        assert re.fullmatch(said + "\n", steps[0].err)
        assert not any(read.out + read.err for read in steps[1:])
        assert steps[0].out == ""

    def test_where_memory_is_short_it_says_what_to_change(self, capfd, every_size, monkeypatch):
        monkeypatch.setattr(memory, "_free", lambda: 1000)
        fit(make_tiny())
        assert capfd.readouterr().err.strip().endswith(f"it may not fit; {LESS}")

    @pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}])
    def test_it_changes_no_weight_and_no_draw(self, how, monkeypatch):
        """Dropout, the noise of the loss and the process's own state are those of a silent one."""
        from repnoise_kit.repnoise import repnoise_loss

        def loss(model, read):
            return repnoise_loss(model, read, read)._asdict()

        silent, told, states = dropping(), dropping(), []
        curves = [fit(silent, loss, **how).frame]
        monkeypatch.setattr(training, "LARGE", 0)
        torch.manual_seed(5)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        curves.append(fit(told, loss, **how).frame)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        assert torch.equal(weights(silent), weights(told))
        assert curves[0].equals(curves[1])
        assert before[:2] == states[:2]
        assert torch.equal(before[2], states[2])
        assert not told.training
        # Dropout was there to be drawn.
        assert not torch.equal(weights(told), weights(dropping()))

    def test_of_a_defence_the_ways_out_help(self, counted, bed):
        """Each of them counts less than the training without it."""
        ways = [{}, {"gradient_checkpointing": True}, {"lora": 1}, {"batch_size": 2}]
        ways.append({"max_length": 8})
        for way in ways:
            rk.defend_(bed.model(), bed, **{"examples": 4, "batch_size": 4} | way)
        usual, checkpointed, low, few, short = counted
        for less in (checkpointed, few, short):
            assert less[:3] == usual[:3]
            assert held(less) < 0.8 * held(usual)
        assert held(few) == pytest.approx(held(usual) / 2, rel=0.2)
        assert low.gradients < usual.gradients / 2
        assert low.optimizer == 3 * low.gradients

    def test_the_testbeds_settings_reach_the_training(self, counted, own):
        """Low rank and checkpointing, given once, hold in defence and attack, and can be undone."""
        options = {"budget": "lab", "retain": own / "retain.json"}
        bed = rk.testbed(
            own / "model", own / "pairs.json", lora=1, gradient_checkpointing=True, **options
        )
        found = []
        for act in (rk.defend_, rk.attack_):
            model = bed.model()
            before = weights(model)
            found.append(act(model, bed, examples=4, batch_size=4))
            act(bed.model(), bed, examples=4, batch_size=4, gradient_checkpointing=False)
            # Merged: the model has its own parts again, and they have moved.
            assert [n for n, _ in model.named_parameters()] == [
                n for n, _ in bed.base.named_parameters()
            ]
            assert not torch.equal(weights(model), before)
        assert all(told.gradients < told.weights / 2 for told in counted)
        assert held(counted[0]) < 0.8 * held(counted[1])
        assert held(counted[2]) < 0.8 * held(counted[3])
        assert found[0].made_with["settings"]["lora"] == found[1].made_with["lora"] == 1

    def test_every_training_takes_a_batch_in_the_testbeds_parts(self, own):
        lesson = rk.Task("boxes", pd.DataFrame(TAUGHT[:8]), pd.DataFrame(TAUGHT[8:]))
        options = {"budget": "lab", "retain": own / "retain.json", "tasks": [lesson]}
        bed = rk.testbed(own / "model", own / "pairs.json", accumulation=4, **options)

        def rows(act, *told, **more):
            """How many rows go through the model at once, of batches of eight."""
            model, seen = bed.model(), set()
            model.model.layers[0].register_forward_pre_hook(
                lambda _, given: seen.add(len(given[0]))
            )
            act(model, bed, *told, **more)
            return seen

        assert rows(rk.attack_, examples=8) == {2}
        assert rows(rk.attack_, examples=8, accumulation=1) == {8}
        assert rows(learn_, lesson) == {2}
        assert rows(rk.defend_, "security_vectors", examples=8) == {2}
        assert rows(rk.defend_, "gradient_ascent", examples=8, accumulation=2) == {4}
        assert max(rows(rk.defend_, examples=8)) < max(rows(rk.defend_, examples=8, accumulation=1))

    def test_the_command_line_says_the_same(self, own):
        words = ["grid", "cost", "--model", own / "model", "--pairs", own / "pairs.json"]
        words += ["--lora", 3, "--gradient-checkpointing", "--accumulation", 2]
        told = command._bed(command._parser().parse_args([*map(str, words)])).settings
        saved = {"lora": 3, "gradient_checkpointing": True, "accumulation": 2}
        for name in ("defence", "attack", "trainability"):
            assert told[name] == told[name] | saved

    def test_parts_that_do_not_divide_are_told_before_anything_is_trained(self, own):
        with pytest.raises(rk.KitError, match=r"accumulation=8 .* batch of 4 \(attack, .*'paper'"):
            rk.testbed(own / "model", own / "pairs.json", accumulation=8)

    @pytest.mark.parametrize("parts", [0, -1, 1.5, "x"])
    def test_parts_that_are_no_number(self, own, parts):
        with pytest.raises(rk.KitError, match="accumulation must be"):
            rk.testbed(own / "model", own / "pairs.json", accumulation=parts)

    @pytest.mark.parametrize("method", ["repnoise", "vaccine", "security_vectors"])
    def test_checkpointing_trains_the_same_weights(self, bed, method):
        models = [bed.model(), bed.model()]
        for model, way in zip(models, (False, True), strict=True):
            rk.defend_(model, bed, method, examples=4, gradient_checkpointing=way)
        assert not torch.equal(weights(models[0]), weights(bed.base))
        assert torch.allclose(weights(models[0]), weights(models[1]), atol=1e-6)
        assert not models[1].is_gradient_checkpointing


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def bed(own):
    options = {"budget": "lab", "retain": own / "retain.json"}
    return rk.testbed(own / "model", own / "pairs.json", **options)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
]


class TestOutOfMemory:
    @pytest.mark.parametrize("trouble", FULL, ids=["gpu", "cpu", "cublas", "driver"])
    def test_it_is_said_in_one_line_with_the_ways_out(self, trouble):
        model, steps = make_tiny(), []

        def loss(inner, read):
            if len(steps) == 2:
                raise trouble
            steps.append(1)
            return answer_loss(inner, read)

        with pytest.raises(rk.KitError, match=r"memory is full.*\(cpu\).*lora=16") as caught:
            fit(model, loss, gradient_checkpointing=True)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is trouble
        # The next training can be tried at once: nothing is held, and the mode is as it was.
        assert all(p.grad is None for p in model.parameters())
        assert not model.training
        assert not model.is_gradient_checkpointing

    def test_the_systems_own_words(self):
        """Ask for more than any machine has."""
        with pytest.raises(rk.KitError, match="memory is full"):
            fit(make_tiny(), lambda *_: {"total": torch.zeros(1 << 50)})

    def test_another_trouble_is_not_called_so(self):
        with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
            fit(make_tiny(), lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
        assert not isinstance(caught.value, rk.KitError)


class TestPrecision:
    @pytest.mark.parametrize(
        ("device", "has_bf16", "expected"),
        [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")],
    )
    def test_by_hardware(self, device, has_bf16, expected, monkeypatch):
        asked = []

        def supported(including_emulation=True):
            asked.append(including_emulation)
            return has_bf16

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert precision(torch.device(device)) == expected
        # A T4 emulates bf16, slowly.
        assert asked == ([False] if device == "cuda" else [])

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("held", [False, True])
    def test_half_weights_are_refused_where_fp16_computes_unless_they_are_still(
        self, held, dtype, monkeypatch
    ):
        monkeypatch.setattr(training, "precision", lambda device: "fp16")

        class FurtherError(Exception):
            pass

        def further(**arguments):
            assert arguments["fp16"]
            assert not arguments["bf16"]
            raise FurtherError

        monkeypatch.setattr(training, "OneDevice", further)
        model = make_tiny().to(getattr(torch, dtype))
        if held:
            model.requires_grad_(False)
            model.lm_head.float().requires_grad_(True)
        expected, said = (
            (FurtherError, None) if held else (rk.KitError, f"{dtype} .*lora=16.*float32")
        )
        with pytest.raises(expected, match=said):
            fit(model)

    def test_where_precisions_are_mixed_the_one_in_the_way_is_named(self, monkeypatch):
        monkeypatch.setattr(training, "precision", lambda device: "fp16")
        model = make_tiny()
        model.lm_head.bfloat16()
        with pytest.raises(rk.KitError, match="bfloat16 weights cannot"):
            fit(model)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_a_testbeds_models_have_its_dtype(self, own, dtype):
        bed = rk.testbed(own / "model", own / "pairs.json", dtype=dtype, budget="lab")
        assert {p.dtype for p in bed.model().parameters()} == {getattr(torch, dtype)}
        assert bed.base.dtype == getattr(torch, dtype)
        plain = rk.testbed(own / "model", own / "pairs.json", budget="lab")
        assert bed.fingerprint() != plain.fingerprint()

    def test_a_dtype_that_does_not_exist_is_named(self, own):
        with pytest.raises(rk.KitError, match=r"no dtype 'int4'.*float32, bfloat16, float16"):
            rk.testbed(own / "model", own / "pairs.json", dtype="int4")

    def test_a_revision_is_what_is_asked_of_the_hub(self, own, monkeypatch):
        from repnoise_kit import model as room

        asked = []
        for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
            load = getattr(room, kind).from_pretrained

            def noting(name, *, revision, load=load, kind=kind, **options):
                asked.append((kind, revision))
                return load(name, **options)

            monkeypatch.setattr(room, kind, SimpleNamespace(from_pretrained=noting))
        bed = rk.testbed(own / "model", own / "pairs.json", revision="v1", budget="lab")
        bed.model()
        assert {kind for kind, _ in asked} == {"AutoModelForCausalLM", "AutoTokenizer"}
        assert {revision for _, revision in asked} == {"v1"}


def watched(gradient, scale=None):
    """What a step notes of a gradient under a scaler of this scale."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([gradient])
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.25}])
    if scale is not None:
        optimizer.scaler = SimpleNamespace(get_scale=lambda: scale)
    base = SimpleNamespace(rows=[{"total": torch.tensor(1.0)}], good={})
    watch = trainer.Watch(base, None, 1, None)
    try:
        watch.on_pre_optimizer_step(None, None, None, model=model, optimizer=optimizer)
    finally:
        watch.bar.close()
    (kept,) = base.good.items()
    assert kept[0] is model.weight
    assert kept[0].equal(kept[1])
    return {name: float(value) for name, value in base.rows[0].items()}


class TestScaler:
    """In fp16 the loss is scaled up, and a step whose gradient overflows is left out."""

    @pytest.mark.parametrize("scale", [None, 1.0, 1024.0, 65536.0])
    def test_the_norm_is_that_of_the_unscaled_gradient(self, scale):
        factor = scale or 1.0
        assert watched([3 * factor, 4 * factor], scale) == {"total": 1, "grad_norm": 5, "lr": 0.25}

    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_an_overflow_is_no_step_and_so_no_end(self, bad):
        assert watched([bad, 1.0], 65536.0)["grad_norm"] == 0

    @pytest.mark.parametrize("scale", [None, 1.0, 0.5])
    @pytest.mark.parametrize("bad", [float("inf"), float("nan")])
    def test_where_no_scale_is_left_it_is_the_gradient_that_is_wrong(self, bad, scale):
        with pytest.raises(NotFiniteError, match="gradient became"):
            watched([bad, 1.0], scale)

    def test_a_whole_training_under_torchs_own(self, monkeypatch):
        """Three steps overflow and are left out; the others' gradients are those without it."""
        from accelerate.optimizer import AcceleratedOptimizer
        from transformers import Trainer

        scaler, usual = torch.amp.GradScaler("cpu", init_scale=2.0**16), Trainer.training_step
        before, model = [], make_tiny()

        def scaled(self, inner, inputs, num_items_in_batch=None):
            if not before:
                AcceleratedOptimizer.__init__(
                    self.optimizer, self.optimizer.optimizer, device_placement=False, scaler=scaler
                )
            inner.train()
            before.append(weights(inner))
            loss = self.compute_loss(inner, self._prepare_inputs(inputs))
            scaler.scale(loss).backward()
            if len(before) <= 3:
                inner.lm_head.weight.grad[7, 2] = float("inf")
            return loss.detach()

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "training_step", scaled)
            rows = fit(model, epochs=4, warmup=0, schedule="constant").frame
        curves = rows.pivot(index="step", columns="metric")["value"]
        moved = [not torch.equal(a, b) for a, b in pairwise([*before, weights(model)])]
        assert Trainer.training_step is usual
        assert moved == [False] * 3 + [True] * 21
        assert scaler.get_scale() == 2.0**13
        assert np.isfinite(curves.to_numpy()).all()
        assert ((curves["grad_norm"] == 0) == ~np.array(moved)).all()
        # The fourth is the first that is not left out: its gradient is that of an untouched model.
        without = fit(make_tiny(), epochs=4, warmup=0, lr=0.0).frame
        norms = without[without["metric"] == "grad_norm"]["value"].to_numpy()
        assert curves["grad_norm"].iloc[3] == pytest.approx(norms[3], rel=1e-4)
