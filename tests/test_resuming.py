"""A defence that is killed goes on to the same weights; low-rank changes; less memory."""

import json
import multiprocessing
import os
import signal
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from families import family
from small import own_files
from transformers import Trainer

import repnoise_kit as rk
from repnoise_kit import checkpoints, training
from repnoise_kit.lora import low_rank

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


def defended(own, out, deadly=0, place="never", lora=None):
    """Defend in a process of its own, which is killed at a checkpoint; return its exit code."""
    out.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(
        target=_defend, args=(own, out, deadly, place, lora)
    )
    child.start()
    child.join(120)
    return child.exitcode


def _defend(own, out, deadly, place, lora):
    saves = 0
    whole, optimizer = checkpoints.Keep.on_save, Trainer._save_optimizer_and_scheduler

    def on_save(self, *rest, **named):
        nonlocal saves
        whole(self, *rest, **named)
        saves += 1
        if place == "after" and saves == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def within(self, folder):
        if place == "within" and saves == deadly - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer(self, folder)

    checkpoints.EVERY = 0.0
    checkpoints.Keep.on_save, Trainer._save_optimizer_and_scheduler = on_save, within
    bed = opened(own)
    model = bed.model()
    kept = out / "kept"
    curves = rk.defend_(model, bed, batch_size=2, lora=lora, checkpoints=kept, seed=3)
    model.save_pretrained(out / "model")
    curves.save(out / "curves.parquet")


def opened(own):
    return rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json", budget="lab")


def weights(out):
    return safetensors.torch.load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("lora", [None, 2])
def test_killed_defences_end_as_undisturbed_ones(own, tmp_path, lora):
    assert defended(own, tmp_path / "whole", lora=lora) == 0
    broken = tmp_path / "broken"
    assert defended(own, broken, 2, "after", lora) == -signal.SIGKILL
    # The second time it dies while a checkpoint is half written.
    assert defended(own, broken, 2, "within", lora) == -signal.SIGKILL
    left = sorted(path.name for path in (broken / "kept").glob("*/checkpoint-*"))
    assert len(left) == 2  # a whole one, and what was cut off
    assert defended(own, broken, lora=lora) == 0
    one, other = weights(tmp_path / "whole"), weights(broken)
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    curves = [rk.Result.load(out / "curves.parquet") for out in (tmp_path / "whole", broken)]
    assert curves[0].frame.equals(curves[1].frame)
    assert not list((broken / "kept").glob("*"))  # nothing is left behind


def test_it_went_on_and_did_not_begin_again(own, tmp_path, monkeypatch):
    """The check above could pass by training all of it once more."""
    broken = tmp_path / "broken"
    defended(own, broken, 2, "after")
    rows = next((broken / "kept").glob("*/checkpoint-2/rows.json"))
    kept = json.loads(rows.read_text())
    assert len(kept) == 2
    kept[0]["noise"] = 77.0  # A mark that only a training which went on would show.
    rows.write_text(json.dumps(kept))
    assert defended(own, broken) == 0
    assert 77.0 in rk.Result.load(broken / "curves.parquet").frame["value"].to_numpy()


def test_another_training_does_not_go_on_from_this_ones(own, tmp_path):
    bed = opened(own)
    folders = []

    def note(trainer, folder, rows):
        folders.append(folder)
        trainer.train()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "go_on", note)
        for change in ({}, {"seed": 1}, {"alpha": 0.5}, {"lr": 1e-4}, {"method": "vaccine"}):
            rk.defend_(bed.model(), bed, batch_size=4, checkpoints=tmp_path, **change)
        shaken = bed.model()
        next(shaken.parameters()).data[0] += 1
        rk.defend_(shaken, bed, batch_size=4, checkpoints=tmp_path)
    assert len(set(folders)) == 6


def test_a_checkpoint_is_due_only_when_its_time_has_come(own, tmp_path, monkeypatch):
    bed = opened(own)
    saved = []
    monkeypatch.setattr(checkpoints.Keep, "on_save", lambda *a, **k: saved.append(1))
    rk.defend_(bed.model(), bed, batch_size=4, checkpoints=tmp_path)
    assert not saved
    monkeypatch.setattr(checkpoints, "EVERY", 0.0)
    curves = rk.defend_(bed.model(), bed, batch_size=4, checkpoints=tmp_path)
    assert len(saved) == curves.frame["step"].max() - 1  # none at the end


class TestLowRank:
    @pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Gemma2"])
    def test_the_change_is_of_that_rank_and_the_rest_is_as_it_was(self, name):
        model = family(name).double()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        hooks = len(list(model.modules()))
        with low_rank(model, 2, seed=0):
            moving = [p for p in model.parameters() if p.requires_grad]
            assert sum(p.numel() for p in moving) < 0.5 * sum(p.numel() for p in before.values())
            for p in moving:
                p.data += torch.randn_like(p)
        after = dict(model.named_parameters())
        assert set(after) == set(before)
        assert len(list(model.modules())) == hooks
        assert all(p.requires_grad for p in after.values())
        ranks = {
            n: int(torch.linalg.matrix_rank(after[n] - before[n], tol=1e-9))
            for n in before
            if after[n].dim() == 2 and not torch.equal(after[n], before[n])
        }
        assert ranks
        assert set(ranks.values()) == {2}
        head = model.get_output_embeddings().weight
        assert all(after[n] is not head for n in ranks)

    def test_the_merged_model_says_what_the_adapted_one_said(self):
        model, ids = family("Llama"), torch.arange(10)[None]
        with torch.no_grad():
            with low_rank(model, 2, seed=0):
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.data += 0.1 * torch.randn_like(p)
                adapted = model(ids).logits
            torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)

    def test_parts_held_still_do_not_move(self):
        model = family("Llama")
        held = {n: p.detach().clone() for n, p in model.model.layers[1].named_parameters()}
        with rk.frozen(model, [1]), low_rank(model, 2, seed=0):
            for p in model.parameters():
                if p.requires_grad:
                    p.data += 1
        for name, p in model.model.layers[1].named_parameters():
            assert torch.equal(p, held[name])

    def test_after_an_error_the_model_is_as_before(self):
        model = family("Llama")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with suppress(KeyboardInterrupt), low_rank(model, 2, seed=0):
            for p in model.parameters():
                if p.requires_grad:
                    p.data += 1
            raise KeyboardInterrupt
        after = dict(model.named_parameters())
        assert set(after) == set(before)
        assert all(torch.equal(after[n], before[n]) for n in before)

    def test_defence_and_attack_by_adapters_learn(self, own):
        bed = opened(own)
        model = bed.model()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        rk.defend_(model, bed, lora=4, lr=1e-2, epochs=3, batch_size=2)
        middle = {n: p.detach().clone() for n, p in model.named_parameters()}
        curves = rk.attack_(model, bed, lora=4, lr=3e-2, epochs=20, batch_size=2)
        total = curves.frame[curves.frame["metric"] == "total"]["value"].to_numpy()
        assert total[-3:].mean() < total[:3].mean() - 0.1
        for one, other in ((start, middle), (middle, dict(model.named_parameters()))):
            moved = {n for n in one if not torch.equal(one[n], other[n])}
            assert moved
            assert not any("embed" in n or "lm_head" in n or "norm" in n for n in moved)
        assert curves.made_with["lora"] == 4

    @pytest.mark.parametrize("rank", [0, -1, 1.5, "8"])
    def test_a_rank_is_a_whole_number_from_1(self, rank):
        with pytest.raises(rk.KitError, match="lora"), low_rank(family("Llama"), rank, seed=0):
            pass

    def test_security_vectors_are_not_hidden_under_another_adapter(self, own):
        bed = opened(own)
        model = bed.model()
        rk.defend_(model, bed, "security_vectors", batch_size=4)
        with pytest.raises(rk.KitError, match="adapter"), rk.guarded(model):
            rk.attack_(model, bed, lora=2)

    def test_nothing_that_may_move(self):
        model = family("Llama")
        with (
            rk.frozen(model, [0, 1, 2]),
            pytest.raises(rk.KitError, match="linear"),
            low_rank(model, 2, seed=0),
        ):
            pass


class TestGradientCheckpointing:
    @pytest.mark.parametrize("preset", ["paper", "tokenwise"])
    def test_the_weights_are_the_same(self, own, preset):
        bed = opened(own)
        models = [bed.model(), bed.model()]
        for model, wanted in zip(models, (False, True), strict=True):
            rk.defend_(model, bed, batch_size=4, preset=preset, gradient_checkpointing=wanted)
            rk.attack_(model, bed, batch_size=4, gradient_checkpointing=wanted)
            assert not model.is_gradient_checkpointing
        for one, other in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_full_memory_is_one_line_with_what_to_change(tiny_model, monkeypatch):
    def full(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(rk.KitError, match=r"memory is full.*lora=16.*accumulation=2") as error:
        rk.train_(tiny_model, full, [1, 2], lambda rows: {"x": torch.zeros(1)}, lr=1e-3)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_called_full_memory(tiny_model):
    def wrong(model, batch):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        rk.train_(tiny_model, wrong, [1, 2], lambda rows: {"x": torch.zeros(1)}, lr=1e-3)
