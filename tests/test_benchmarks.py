"""The benchmarks run, on small shapes; what they measure is for a person to read."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from small import own_files

import repnoise_kit as rk

BENCHMARKS = Path(__file__).parent / "benchmarks"
TINY = ["--layers=2", "--width=32", "--vocab=200", "--pairs=2", "--tokens", "12", "16", "--steps=1"]


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loss():
    return loaded("loss")


def test_a_form_is_measured_in_a_process_of_its_own():
    command = [sys.executable, BENCHMARKS / "loss.py", *TINY, "--form=paper"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert set(found) == {"seconds", "peak", "floor"}
    assert found["seconds"] > 0


def test_the_loss_benchmark_measures_every_form_and_saves_how(loss, tmp_path, monkeypatch, capsys):
    def here(command, env):
        """What the process would print."""
        monkeypatch.setattr(sys, "argv", command[1:])
        found = loss.measure(loss._arguments())
        monkeypatch.setattr(sys, "argv", given)
        return json.dumps(found).encode()

    more = ["--growth=2", "--defence", "--steady=2", f"--save={tmp_path / 'found'}"]
    given = [str(BENCHMARKS / "loss.py"), *TINY, *more]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(loss.subprocess, "check_output", here)
    loss.main()
    found = rk.Result.load(tmp_path / "found.csv")
    rows = found.frame
    assert rows["form"].tolist() == [*loss.FORMS, *loss.FORMS, "growth", "defence"]
    assert rows["tokens"].tolist() == [12] * 4 + [16] * 4 + [12, 128]
    assert (rows[rows["form"] != "growth"]["seconds"] > 0).all()
    assert rows["growth"].notna().tolist() == (rows["form"] == "growth").tolist()
    ours = rows[rows["form"] == "paper"]
    published = rows[rows["form"] == "published"]["seconds"].to_numpy()
    shares = ours["seconds"].to_numpy() / published
    assert ours["seconds of published"].to_numpy() == pytest.approx(shares)
    plain = rows[rows["form"] == "plain step"]
    assert (plain["efficiency"] == 1).all()
    rate = (ours["floor"] / ours["seconds"]).to_numpy()
    usual = (plain["floor"] / plain["seconds"]).to_numpy()
    assert ours["efficiency"].to_numpy() == pytest.approx(rate / usual)
    last = rows.iloc[-1]
    assert last["minutes"] == pytest.approx(last["seconds"] * 10_000 / 2 / 60)
    assert "--layers=2" in found.made_with["command"]
    assert found.made_with["machine"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


@pytest.mark.parametrize("form", ["plain step", "paper"])
@pytest.mark.parametrize(("pairs", "tokens"), [(2, 32), (5, 64)])
def test_the_floor_is_what_torch_counts(loss, form, pairs, tokens):
    """On a model whose attention torch counts; what it counts more is a row of logits a text."""
    from torch.utils.flop_counter import FlopCounterMode

    class Anywhere(nullcontext):
        """Torch's tracker of modules cannot follow a gradient that is taken on the way forward."""

        parents = frozenset(["Global"])

    shape = {"layers": 3, "width": 64, "vocab": 500, "pairs": pairs}
    asked = argparse.Namespace(**shape, heads=2, tokens=[tokens], device="cpu")
    model = loss.made(asked)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Anywhere()
    with counter:
        loss.total(model, form, *loss.sides(asked)).backward()
    counted, floor = counter.get_total_flops(), loss.floor(form, tokens=tokens, **shape)
    assert floor <= counted <= 1.01 * floor


def test_a_published_form_that_does_not_fit_is_compared_where_it_does(loss, monkeypatch):
    """At 8 pairs only ours and the plain step are measured; at 2, all."""

    def measured(form, pairs, tokens):
        full = form == "published" and pairs > 2
        seconds = None if full else float(pairs)
        return {"form": form, "pairs": pairs, "tokens": tokens, "seconds": seconds} | (
            {} if full else {"peak": 2.0, "floor": 3.0}
        )

    monkeypatch.setattr(loss, "_measured", measured)
    rows = loss.compare(8, 128)
    ours = [form for form in loss.FORMS if form != "published"]
    assert [row["form"] for row in rows if row["pairs"] == 2] == list(loss.FORMS)
    assert [row["form"] for row in rows if row["pairs"] == 8] == ours
    assert all(("seconds of published" in row) is (row["pairs"] == 2) for row in rows)
    assert all(row["efficiency"] == 1 for row in rows)


def test_the_shape_of_the_paper_is_llamas(loss):
    """6.7 billion parameters, of which the norms alone are not in the floor's maps."""
    shape = {name: loss.LLAMA[name] for name in ("layers", "width", "vocab")}
    # Of one token alone: attention to itself and the head, besides the maps.
    forward = loss.floor("plain step", **shape, pairs=1, tokens=1) / 3 / 2
    own = forward - 4 * shape["layers"] * shape["width"]
    embedding = 2 * shape["vocab"] * shape["width"]
    norms = 2 * (2 * shape["layers"] + 1) * shape["width"]
    assert own + embedding + norms == 2 * 6_738_415_616


SHAPES = ["many words", "many layers", "checkpointing", "low rank", "defence, many words"]


def test_the_lab_benchmark_takes_the_same_steps_bare(tmp_path, monkeypatch, capsys, one_thread):
    own, lab = own_files(tmp_path), loaded("lab")
    bed = rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json", budget="lab")
    monkeypatch.setattr(lab, "SIZE", 1)
    monkeypatch.setattr(lab, "EXAMPLES", 2)
    monkeypatch.setattr(lab, "SETTINGS", lab.SETTINGS | {"batch_size": 1, "examples": 2})
    monkeypatch.setattr(rk, "lab", lambda: bed, raising=False)
    monkeypatch.setattr(sys, "argv", ["lab.py", "--times=1"])
    lab.main()
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[-1] == "products"
    assert [row[0] for row in rows] == ["attack", "defence"]
    for _, ours, bare, ratio, share in rows:
        assert float(ours) / float(bare) == pytest.approx(float(ratio), abs=0.1)
        assert 0 < int(share.rstrip("%")) < 100
    for steps in (lab.attack_steps(bed), lab.defence_steps(bed)):
        model, before = bed.model(), bed.base.lm_head.weight
        lab.run(*steps, model)
        assert len(steps[1]) == 2
        assert not model.lm_head.weight.equal(before)


def test_what_a_training_is_said_to_need_is_what_it_takes():
    """Within a fifth of the peak of a process of its own, on shapes of which each part is large."""
    command = [sys.executable, BENCHMARKS / "memory.py", *SHAPES]
    # Without this the C library's heap keeps freed tensors, and the peak is not the training's.
    apart = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=apart)
    assert ran.returncode == 0, ran.stderr
    lines = [line[24:].split() for line in ran.stdout.splitlines()[1:]]
    assert len(lines) == len(SHAPES)
    for name, (said, measured, *_) in zip(SHAPES, lines, strict=True):
        assert float(said) == pytest.approx(float(measured), rel=0.2), name


def test_the_panel_benchmark_measures_every_view_beside_one_drawn_by_hand():
    command = [sys.executable, BENCHMARKS / "panel.py", "--trials=30", "--times=1"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    _, imports, opening, *redraws = [line.split() for line in ran.stdout.splitlines()]
    assert imports[0] == "imports"
    assert opening[:-1] == ["open", "and", "first", "draw"]
    assert [line[1] for line in redraws] == ["terms", "importance", "slices"]
    for line in redraws:
        ours, hand, ratio = map(float, line[2:])
        assert abs(ratio - ours / hand) < 0.1 * ratio
