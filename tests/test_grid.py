"""Grids: each piece of work is done once, whoever does it, and never shown as what it is not."""

import dataclasses
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from functools import partial

import cells
import numpy as np
import pandas as pd
import pytest
import torch
from cells import notes
from conftest import make_tiny
from small import made_up_pairs, own_files, save_folder, tokenizer_of

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return own_files(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def bed(own):
    import repnoise_kit as rk

    return rk.testbed(own / "model", own / "pairs.json", retain=own / "retain.json")


@pytest.fixture
def bench(bed, tmp_path):
    from repnoise_kit import Bench

    return Bench.of(bed, tmp_path / "store")


@pytest.fixture
def log(tmp_path):
    return str(tmp_path / "log")


def noted(log, names, **how):
    from repnoise_kit.grid import Cell

    return [Cell(cells.noted, {"log": log, "name": name, **how}) for name in names]


def run(*args, **how):
    from repnoise_kit.grid import run

    return run(*args, **how)


def same(one, other):
    return len(one) == len(other) and all(
        a.frame.equals(b.frame) and a.made_with == b.made_with
        for a, b in zip(one, other, strict=True)
    )


def contents(store):
    """Every finished file of a store, by its path: its bytes."""
    files = (p for p in store.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in files
        if not any(part.startswith(".") for part in p.relative_to(store).parts)
    }


def tables(out):
    """What a command writes: tables byte for byte, and how they were made, but for the command."""
    made_with = {path.name: json.loads(path.read_bytes()) for path in out.glob("*.json")}
    assert all(notes.pop("command") for notes in made_with.values())
    return made_with | {p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".json"}


def whole(store):
    """The finished folders of a store, and what would change if one were made again."""
    from repnoise_kit.store import is_whole

    stats = {folder: folder.stat() for folder in store.glob("*/*") if is_whole(folder)}
    return {folder: (stat.st_ino, stat.st_mtime_ns) for folder, stat in stats.items()}


class TestRun:
    def test_one_worker_two_workers_and_another_order_give_the_same(self, bench, log, tmp_path):
        names = "abcdef"
        grid = noted(log, names)
        found = run(grid, bench)
        assert [result.frame["name"][0] for result in found] == list(names)
        assert [result.made_with["name"] for result in found] == list(names)
        by_two = dataclasses.replace(bench, store=tmp_path / "by two")
        assert same(run(grid, by_two, workers=2), found)
        turned = dataclasses.replace(bench, store=tmp_path / "turned")
        assert same(run(grid[::-1], turned)[::-1], found)
        assert contents(bench.store) == contents(by_two.store) == contents(turned.store)
        assert len(contents(bench.store)) == 3 * len(names)
        assert sorted(notes(log)) == sorted(3 * names)

    def test_a_second_run_computes_nothing(self, bench, log):
        grid = noted(log, "abc")
        first, made = run(grid, bench), whole(bench.store)
        assert same(run(grid, bench), first)
        assert same(run(grid, bench, workers=2), first)
        # Who is asked for nothing need not be there.
        assert same(run(grid, bench, scheduler="tcp://127.0.0.1:1"), first)
        assert notes(log) == ["a", "b", "c"]
        assert whole(bench.store) == made

    def test_a_larger_grid_computes_what_is_new(self, bench, log):
        run(noted(log, "bd"), bench)
        found = run(noted(log, "abcde"), bench)
        assert [result.frame["name"][0] for result in found] == list("abcde")
        assert notes(log) == list("bdace")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_cell_that_is_asked_for_often_is_computed_once(self, bench, log, workers):
        found = run(4 * noted(log, "a"), bench, workers=workers)
        assert same(found, 4 * [cells.rows("a")])
        assert notes(log) == ["a"]

    def test_the_bar_counts_cells_and_starts_at_what_is_there(self, bench, log, capsys):
        run(noted(log, "ab"), bench)
        assert capsys.readouterr() == ("", "")
        run(noted(log, "abcd"), bench, progress="four cells")
        said, shown = capsys.readouterr()
        assert said == ""
        steps = shown.replace("\r", "\n").split("\n")
        assert "four cells" in steps[0] or "four cells" in steps[1]
        assert any("2/4" in step for step in steps)
        assert "4/4" in shown
        assert "0/4" not in shown
        assert "1/4" not in shown


SPOILS = {
    "a file cut short": lambda f: (f / "rows.parquet").write_bytes(
        (f / "rows.parquet").read_bytes()[:-9]
    ),
    "a file with one other byte": lambda f: _flip(f / "rows.parquet"),
    "an empty file": lambda f: (f / "rows.json").write_bytes(b""),
    "a file that is gone": lambda f: (f / "rows.parquet").unlink(),
    "no seal": lambda f: (f / "whole.json").unlink(),
    "an empty seal": lambda f: (f / "whole.json").write_text("{}"),
    "a seal cut short": lambda f: (f / "whole.json").write_text('{"rows.parquet": "'),
    "a seal that is none": lambda f: (f / "whole.json").write_text("[1]"),
    "an empty folder": lambda f: [path.unlink() for path in f.iterdir()],
}


def _flip(path):
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


class TestDamage:
    @pytest.mark.parametrize("kind", SPOILS)
    def test_a_damaged_cell_is_made_again_with_a_word(self, bench, log, capsys, kind):
        grid = noted(log, "abc")
        first, before = run(grid, bench), contents(bench.store)
        spoilt = grid[1].folder(bench)
        SPOILS[kind](spoilt)
        assert capsys.readouterr().err == ""
        assert same(run(grid, bench), first)
        assert contents(bench.store) == before
        assert capsys.readouterr().err == f"{spoilt} is damaged; it is made again\n"
        assert notes(log) == [*"abc", "b"]

    def test_what_a_killed_maker_left_beside_is_never_taken_for_a_result(self, bench, log, capsys):
        (cell,) = noted(log, "a")
        left = cell.folder(bench).with_name(f".{cell.folder(bench).name}-0123abcd")
        half = left / cell.folder(bench).name
        half.mkdir(parents=True)
        (half / "rows.parquet").write_bytes(b"PAR1")
        (half / ".rows.json-0123").mkdir()
        assert same(run([cell], bench), [cells.rows("a")])
        assert notes(log) == ["a"]
        assert capsys.readouterr().err == ""

    def test_a_folder_that_another_process_takes_away_is_not_whole(self, bench, log, monkeypatch):
        """One process replaces a damaged folder while another looks whether it is whole."""
        from repnoise_kit import store

        (cell,) = noted(log, "a")
        run([cell], bench)

        def gone(folder):
            shutil.rmtree(folder)
            raise FileNotFoundError(folder)

        monkeypatch.setattr(store, "digests", gone)
        assert not store.is_whole(cell.folder(bench))


CODE = '''
"""A room with a cell."""

import pandas as pd

from repnoise_kit.results import Result

SCALE = 2.0


def helper(value):
    """Say what it does."""
    return SCALE * value


def cell(bench, *, value):
    return Result(pd.DataFrame({"value": [helper(value)]}))
'''


class TestFingerprints:
    @pytest.fixture
    def cell(self, tmp_path, monkeypatch):
        """Make a cell of a module of its own, from its text."""
        from repnoise_kit.grid import Cell

        def of(text, **arguments):
            path = tmp_path / f"room_{tmp_path.name}_{len(list(tmp_path.glob('*.py')))}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, path.stem, module)
            spec.loader.exec_module(module)
            return Cell(module.cell, arguments or {"value": 1.0})

        return of

    @pytest.mark.parametrize(
        ("old", "new"),
        [("SCALE * value", "SCALE + value"), ("2.0", "3.0"), ("[helper(value)]", "[value]")],
    )
    def test_other_code_is_another_cell(self, bench, cell, old, new):
        assert old in CODE
        before, after = cell(CODE), cell(CODE.replace(old, new))
        assert before.folder(bench) != after.folder(bench)
        found = run([before, after], bench)
        assert found[0].frame["value"][0] == 2.0
        assert found[1].frame["value"][0] != 2.0

    def test_other_words_are_the_same_cell(self, bench, cell):
        said = CODE.replace("Say what it does", "Say it otherwise").replace(
            "SCALE = 2.0", "SCALE = 2.00  # twice"
        )
        assert said != CODE
        assert cell(CODE).folder(bench) == cell(said).folder(bench)

    def test_arguments_count_and_their_order_does_not(self, bench, cell):
        folders = {
            cell(CODE, value=value, other=other).folder(bench)
            for value in (1.0, 2.0)
            for other in (None, "a")
        }
        assert len(folders) == 4
        one, other = cell(CODE, value=1.0, other=2), cell(CODE, other=2, value=1.0)
        assert one.folder(bench) == other.folder(bench)

    def test_a_defended_model_is_one_of_method_seed_and_settings(self, bench):
        asked = [["repnoise", 0, {}], ["repnoise", 1, {}], ["vaccine", 0, {}]]
        asked.append(["repnoise", 0, {"beta": 1.0}])
        assert len({bench.folder("defended", each) for each in asked}) == 4

    @pytest.mark.parametrize(
        "name",
        [
            *("attacks", "baselines", "controls", "defences", "evaluation", "losses", "model"),
            *("pairs", "recording", "repnoise", "scoring", "security", "splits", "testbeds"),
            *("training", "world.oracle"),
        ],
    )
    def test_every_room_that_the_numbers_depend_on_counts(self, name):
        from repnoise_kit.bench import CODE
        from repnoise_kit.store import code_of

        (text,) = code_of(importlib.import_module(f"repnoise_kit.{name}"))
        assert text in CODE

    def test_other_code_of_the_kit_is_another_bench(self, bed, bench, monkeypatch):
        from repnoise_kit import Bench
        from repnoise_kit import bench as room

        monkeypatch.setattr(room, "CODE", [*room.CODE[:-1], "other"])
        changed = Bench.of(bed, bench.store)
        assert changed.mark != bench.mark
        assert changed.code != bench.code
        assert changed.folder("attacked", {}) != bench.folder("attacked", {})

    def test_other_settings_are_another_bench(self, bed, bench):
        from repnoise_kit import Bench

        marks = {bench.mark}
        for name, values in bed.settings.items():
            changed = {**bed.settings, name: {**values, "more": 1}}
            marks.add(Bench.of(dataclasses.replace(bed, settings=changed), bench.store).mark)
        assert len(marks) == 1 + len(bed.settings)

    def test_other_data_are_another_bench(self, own, bench):
        import repnoise_kit as rk

        given = own / "model", own / "pairs.json"
        retain = pd.read_json(own / "retain.json")
        assert rk.Bench.of(rk.testbed(*given, retain=retain), "store").mark == bench.mark
        spoken = pd.DataFrame(made_up_pairs(14))
        others = [rk.testbed(*given), rk.testbed(*given, retain=retain, seed=1)]
        for column in ("prompt", "harmful", "harmless"):
            changed = spoken.copy()
            changed.loc[13, column] += " ?"
            changed.to_json(own / "other.json", orient="records")
            others.append(rk.testbed(own / "model", own / "other.json", retain=retain))
        changed = retain.assign(answer=[*retain["answer"][:-1], "box 7 is red"])
        others.append(rk.testbed(*given, retain=changed))
        marks = {rk.Bench.of(other, "store").mark for other in others}
        assert len(marks - {bench.mark}) == len(others)

    def test_another_model_is_another_bench(self, own, bed, bench, tmp_path):
        from repnoise_kit import Bench

        model = bed.model()
        with torch.no_grad():
            model.get_output_embeddings().weight[3, 5] += 1e-3
        save_folder(tmp_path / "model", model, bed.tokenizer)
        other = dataclasses.replace(bed, source=tmp_path / "model")
        assert Bench.of(other, bench.store).mark != bench.mark

    def test_another_tokenizer_is_another_bench(self, own, bed, bench, tmp_path):
        """The same weights, whose rows now stand for other words."""
        from repnoise_kit import Bench

        words = tokenizer_of([*made_up_pairs()[::-1], {"more": "zebra"}])
        save_folder(tmp_path / "model", bed.model(), words)
        other = dataclasses.replace(bed, source=tmp_path / "model")
        assert Bench.of(other, bench.store).mark != bench.mark

    def test_the_number_of_threads_does_not_count(self, bed):
        """Machines that share a store may have any number of cores."""
        large = dataclasses.replace(bed)
        vars(large)["base"] = make_tiny(2**18 + 1, layers=1)
        marks = set()
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            marks.add(large.fingerprint())
        torch.set_num_threads(1)
        assert len(marks) == 1


class TestVersions:
    def test_a_worker_that_was_started_elsewhere_finds_the_model(self, own, tmp_path, monkeypatch):
        import repnoise_kit as rk

        monkeypatch.chdir(own)
        sent = pickle.dumps(rk.testbed("model", "pairs.json"))
        monkeypatch.chdir(tmp_path)
        assert pickle.loads(sent).model().num_parameters() > 0

    def test_a_worker_with_other_code_of_the_kit_refuses(self, bench, log):
        from repnoise_kit import KitError
        from repnoise_kit.grid import _alone

        (cell,) = noted(log, "a")
        with pytest.raises(KitError, match="another version"):
            _alone(0, cell, dataclasses.replace(bench, code="older"))
        assert notes(log) == []
        assert _alone(7, cell, bench) == 7
        assert notes(log) == ["a"]

    def test_a_worker_with_other_code_of_the_cell_refuses(self, bench, log):
        from repnoise_kit import KitError
        from repnoise_kit.grid import _alone

        (cell,) = noted(log, "a")
        object.__setattr__(cell, "code", "older")
        with pytest.raises(KitError, match="another version"):
            _alone(0, cell, bench)
        assert notes(log) == []


class TestDefended:
    def test_it_is_made_once_however_many_wait_for_it(self, bench, log):
        from repnoise_kit.grid import Cell

        asked = [{"method": "weight_noise"}, {"method": "repnoise"}] * 3
        grid = [
            Cell(cells.asking, {"log": log, "name": str(name), "together": 2, **each})
            for name, each in enumerate(asked)
        ]
        found = run(grid, bench, workers=2)
        made = [line for line in notes(log) if line.startswith("defend")]
        assert sorted(made) == ["defend repnoise", "defend weight_noise"]
        assert len(whole(bench.store)) == 2 + len(grid)
        assert same(found[::2], 3 * [found[0]])
        assert same(found[1::2], 3 * [found[1]])
        assert not same(found[:1], found[1:2])

    def test_it_is_a_fresh_copy_each_time(self, bench):
        import repnoise_kit as rk

        first, curves = bench.defended("repnoise", 0)
        before = {name: weight.detach().clone() for name, weight in first.named_parameters()}
        with torch.no_grad():
            for weight in first.parameters():
                weight.zero_()
        again, same_curves = bench.defended("repnoise", 0)
        assert curves.frame.equals(same_curves.frame)
        for name, weight in again.named_parameters():
            assert torch.equal(weight, before[name])
        by_hand = bench.bed.model()
        rk.defend_(by_hand, bench.bed, "repnoise", seed=0)
        for name, weight in by_hand.named_parameters():
            assert torch.equal(weight, before[name])
        assert again.device == by_hand.device
        assert not again.training
        assert [w.requires_grad for w in again.parameters()] == [
            w.requires_grad for w in by_hand.parameters()
        ]

    def test_a_damaged_one_is_made_again_with_a_word(self, bench, capsys):
        first, _ = bench.defended("safety_training", 0)
        (folder,) = whole(bench.store)
        _flip(folder / "model.safetensors")
        again, _ = bench.defended("safety_training", 0)
        assert capsys.readouterr().err == f"{folder} is damaged; it is made again\n"
        for one, other in zip(first.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)

    def test_there_is_no_naive_model_of_ones_own(self, bench):
        from repnoise_kit import KitError

        with pytest.raises(KitError, match="no naive model"):
            bench.defended("naive", 0)


class TestSecurityVectors:
    @pytest.fixture(scope="class")
    def kept(self, bed, tmp_path_factory):
        """One that has just been trained, and one that was stored and loaded."""
        import repnoise_kit as rk

        bench = rk.Bench.of(bed, tmp_path_factory.mktemp("vectors"))
        trained = bed.model()
        rk.defend_(trained, bed, "security_vectors", seed=0)
        bench.defended("security_vectors", 0)
        return trained, bench.defended("security_vectors", 0)[0]

    @pytest.fixture(scope="class")
    def ids(self, bed):
        ids = bed.tokenizer("where is the red box 3 ?", return_tensors="pt")["input_ids"]
        return ids

    @staticmethod
    @torch.no_grad()
    def logits(model, ids):
        return model(input_ids=ids).logits

    def test_the_weights_are_equal(self, kept):
        trained, loaded = (dict(model.named_parameters()) for model in kept)
        assert list(trained) == list(loaded)
        vectors = [name for name in trained if ".lora_" in name]
        assert vectors
        for name in trained:
            assert torch.equal(trained[name], loaded[name]), name
        assert any(trained[name].abs().sum() > 0 for name in vectors if ".lora_B." in name)

    def test_the_adapter_is_off_and_the_model_under_it_the_aligned_one(self, kept, bed, ids):
        aligned = self.logits(bed.model(), ids)
        for model in kept:
            assert torch.equal(self.logits(model, ids), aligned)

    def test_guarded_switches_it_on_and_off_again(self, kept, bed, ids):
        from repnoise_kit import guarded

        seen = []
        for model in kept:
            with guarded(model):
                seen.append(self.logits(model, ids))
            assert torch.equal(self.logits(model, ids), self.logits(bed.model(), ids))
        assert torch.equal(*seen)
        assert not torch.allclose(seen[0], self.logits(bed.model(), ids))

    def test_an_attack_moves_the_model_and_never_the_adapter(self, kept, bed, bench):
        import repnoise_kit as rk

        after = []
        for model in (kept[0], bench.defended("security_vectors", 0)[0]):
            before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            with rk.guarded(model):
                rk.attack_(model, bed, lr=1e-2, examples=4, seed=0)
            moved = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
            assert moved
            assert not [name for name in moved if ".lora_" in name]
            after.append(dict(model.named_parameters()))
            model.load_state_dict(before, strict=False)
        for name, weight in before.items():
            assert torch.equal(weight, dict(kept[0].named_parameters())[name])


def computed(grid, bench):
    # Without `run`, whose bar holds a lock that copies of a process share and take to their graves.
    for cell in grid:
        cell.compute(bench)


def forked(work, errors):
    """Do some work in a copy of this process, which ends with it."""
    child = os.fork()
    if child == 0:
        try:
            with open(errors, "a") as sys.stderr:  # noqa: PTH123
                work()
        finally:
            os._exit(0)
    return child


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork")
@pytest.mark.parametrize("processes", [1, 3])
def test_killed_thirty_times_it_ends_as_if_undisturbed(bench, log, tmp_path, processes):
    """Copies of this process run one grid in one store, until they are killed inside a cell."""
    grid = noted(log, [f"cell {number}" for number in range(12)], count=20_000)
    calm = dataclasses.replace(bench, store=tmp_path / "calm")
    began = time.monotonic()
    expected = run(grid, calm)
    each = (time.monotonic() - began) / len(grid)
    names = {cell.folder(bench): cell.arguments["name"] for cell in grid}
    errors = tmp_path / "errors"
    draw, kills, made = random.Random(processes), 0, {}
    while kills < 30 or len(made) < len(grid):
        if len(made) == len(grid):
            shutil.rmtree(bench.store)
            made = {}
        begun = len(notes(log))
        children = [forked(partial(computed, grid, bench), errors) for _ in range(processes)]
        cells.wait_until(lambda begun=begun: len(notes(log)) > begun, "a cell is begun")
        for child in children:
            time.sleep(draw.uniform(0, 2 * each))
            os.kill(child, signal.SIGKILL)
            kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert not {names[folder] for folder in made} & set(notes(log)[begun:])
        assert whole(bench.store).items() >= made.items()
        made = whole(bench.store)
    assert same(run(grid, bench), expected)
    assert contents(bench.store) == contents(calm.store)
    assert errors.read_text() == ""  # and no folder was ever found damaged


def command(own, folder, name, *words, workers=1):
    """Run a grid of the command line in this process, on what a user brings."""
    from repnoise_kit.__main__ import main

    given = ["--model", own / "model", "--pairs", own / "pairs.json"]
    given += ["--retain", own / "retain.json", "--seeds", 1, "--workers", workers]
    given += ["--store", folder / "store", "--out", folder / "out"]
    return main(["grid", name, *map(str, [*given, *words])])


@pytest.fixture
def two_defences(monkeypatch):
    """The grids of two defences, for there is no time for all."""
    from repnoise_kit import cost, resistance

    two = {"defences": ("none", "security_vectors")}
    monkeypatch.setattr(resistance, "resistance_grid", partial(resistance.resistance_grid, **two))
    monkeypatch.setattr(cost, "cost_grid", partial(cost.cost_grid, **two))


@pytest.mark.usefixtures("two_defences")
class TestResistance:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("resistance")

    @pytest.fixture
    def shown(self, own, folder, capsys):
        """Run the command; return its stdout and stderr."""
        assert command(own, folder, "resistance") == 0
        return capsys.readouterr()

    @pytest.fixture
    def table(self, shown, folder):
        return pd.read_csv(folder / "out" / "resistance.csv")

    def test_progress_is_shown_and_what_is_found_said(self, own, folder, capsys):
        assert command(own, folder, "resistance") == 0
        said, shown = capsys.readouterr()
        assert "grid resistance" in shown
        assert "0/8" in shown
        assert "8/8" in shown
        assert str(folder / "out") in said
        assert "security_vectors" in said

    def test_the_table_has_the_agreed_columns_and_every_cell(self, table, bed):
        agreed = ["defence", "group", "lr", "examples", "seed", "metric", "value"]
        assert list(table) == agreed
        assert not table.duplicated(agreed[:-1]).any()
        assert set(table["defence"]) == {"none", "security_vectors"}
        assert set(table["seed"]) == {0}
        budgets = {(0.0, 0), (3e-5, 10), (6e-5, 10), (8e-5, 10)}
        assert set(zip(table["lr"], table["examples"], strict=True)) == budgets
        metrics = {"recall", "harmfulness", "refusal", "degenerate", "perplexity", "utility"}
        assert set(table["metric"]) == metrics | {"degenerate_everyday"}
        assert len(table) == 2 * 2 * len(budgets) * table["metric"].nunique()
        assert np.isfinite(table["value"]).all()

    def test_before_any_attack_security_vectors_change_nothing_and_attacks_do(self, table):
        wide = table.pivot(index=["metric", "group"], columns=["defence", "lr"], values="value")
        assert (wide["none", 0.0] == wide["security_vectors", 0.0]).all()
        assert (wide["none", 8e-5] != wide["none", 0.0]).any()
        assert (wide["none", 8e-5] != wide["security_vectors", 8e-5]).any()

    def test_the_table_holds_the_means_of_the_questions(self, table, folder):
        rows = pd.read_parquet(folder / "out" / "resistance_questions.parquet")
        keys = ["defence", "group", "lr", "examples", "seed", "metric"]
        assert {*keys, "value", "prompt", "response", "category", "testbed"} <= set(rows)
        assert not rows.duplicated([*keys, "prompt"]).any()
        cells = table.set_index(keys)["value"]
        assert len(cells) == rows.groupby(keys).ngroups
        for cell, values in rows.groupby(keys)["value"]:
            mean = np.exp(np.log(values).mean()) if cell[-1] == "perplexity" else values.mean()
            assert cells[cell] == pytest.approx(mean)

    def test_it_is_noted_how_it_was_made(self, shown, folder, bed):
        noted = json.loads((folder / "out" / "resistance.json").read_text())
        assert noted["experiment"] == "resistance"
        assert noted["seeds"] == [0]
        assert noted["data and model"] == bed.fingerprint()
        assert noted["settings"]["resistance"]["examples"] == [10]

    def test_again_it_computes_nothing_and_writes_the_same(self, shown, own, folder, capsys):
        found, made = tables(folder / "out"), whole(folder / "store")
        shutil.rmtree(folder / "out")
        assert command(own, folder, "resistance") == 0
        assert tables(folder / "out") == found
        assert whole(folder / "store") == made
        again = capsys.readouterr().err
        assert "8/8" in again
        assert "0/8" not in again

    def test_two_workers_and_another_store_give_the_same_bytes(self, shown, own, folder, tmp_path):
        assert command(own, tmp_path, "resistance", workers=2) == 0
        assert tables(tmp_path / "out") == tables(folder / "out")
        assert contents(tmp_path / "store") == contents(folder / "store")

    def test_another_seed_keeps_what_is_there(self, shown, own, folder, tmp_path):
        made = whole(folder / "store")
        words = ["--first-seed", "7", "--out", tmp_path]
        assert command(own, folder, "resistance", *words) == 0
        assert set(pd.read_csv(tmp_path / "resistance.csv")["seed"]) == {7}
        assert whole(folder / "store").items() > made.items()


class TestCost:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        return tmp_path_factory.mktemp("cost")

    @pytest.fixture(autouse=True)
    def ran(self, own, folder, capsys, two_defences):
        assert command(own, folder, "cost") == 0
        assert "4/4" in capsys.readouterr().err

    def test_the_table_has_a_row_a_run_metric_and_group(self, folder):
        costs = pd.read_csv(folder / "out" / "cost_to_break.csv")
        run = ["defence", "attack", "lr", "seed"]
        told = ["steps", "tokens", "flops", "broken", "metric", "threshold", "group"]
        assert list(costs) == [*run, *told]
        assert len(costs) == len(costs.drop_duplicates([*run, "metric", "group"])) == 2 * 2 * 2 * 2
        held = costs[~costs["broken"]]
        assert len(held)
        # The file's ten attack pairs are three steps; the file's two seen pairs, one wording each.
        assert set(held.loc[held["attack"] == "fine-tuning", "steps"]) <= {30}
        assert set(held.loc[held["attack"] == "relearning", "steps"]) <= {12}

    def test_it_looks_at_growing_moments_up_to_ten_and_four_times_the_largest_budget(self, folder):
        rows = pd.read_parquet(folder / "out" / "cost_to_break_questions.parquet")
        moments = {name: sorted(set(way["step"])) for name, way in rows.groupby("attack")}
        assert moments["fine-tuning"] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 30]
        assert moments["relearning"] == [0, 1, 2, 3, 4, 6, 8, 12]
        assert set(rows["lr"]) == {3e-5}

    def test_tokens_and_flops_grow_with_the_steps(self, folder, bed):
        rows = pd.read_parquet(folder / "out" / "cost_to_break_questions.parquet")
        inner = sum(p.numel() for p in bed.base.parameters())
        inner -= bed.base.get_input_embeddings().weight.numel()
        for _, way in rows.groupby(["defence", "attack"]):
            read = way.drop_duplicates("step").sort_values("step")
            assert read["tokens"].iloc[0] == 0
            assert read["tokens"].is_monotonic_increasing
            assert read["tokens"].is_unique
        undefended = rows[rows["defence"] == "none"]
        assert (undefended["flops"] == 6 * undefended["tokens"] * inner).all()


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["baselines", "--model", "x", "--pairs", "y"], "leave out --model"),
            (["resistance", "--model", "x"], "--model and --pairs belong together"),
            (["resistance", "--retain", "x"], "give --model and --pairs too"),
            (["resilience"], "invalid choice: 'resilience'"),
            (["cost", "--workers", "0"], "at least 1"),
            (["cost", "--workers", "two"], "at least 1"),
            (["cost", "--seeds", "0"], "at least 1"),
            (["cost", "--first-seed", "-1"], "whole number"),
        ],
    )
    def test_in_one_line_before_anything_is_computed(self, words, said, tmp_path, capsys):
        from repnoise_kit.__main__ import main

        folders = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
        assert main(["grid", *words, *folders]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("repnoise_kit: ")
        assert shown.err.count("\n") == 1
        assert said in shown.err
        assert not (tmp_path / "store").exists()

    def test_a_cluster_without_dask(self, bench, log, monkeypatch):
        """Whoever has not installed it is told so, and not to check the address."""
        from repnoise_kit import KitError

        for name in ("dask", "distributed", "joblib._dask"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name in ("dask", "distributed"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(KitError, match=r"pip install 'repnoise-kit\[cluster\]'"):
            run(noted(log, "a"), bench, scheduler="tcp://127.0.0.1:8786")
        assert notes(log) == []

    @pytest.mark.parametrize("grid", ["resistance_grid", "cost_grid"])
    def test_what_cannot_be_done_without_a_retain_set(self, own, tmp_path, grid):
        """Said before others are computed; left out of what is done by default."""
        import repnoise_kit as rk
        from repnoise_kit.defences import able

        bare = rk.testbed(own / "model", own / "pairs.json")
        with pytest.raises(rk.KitError, match="give the testbed a retain set"):
            getattr(rk, grid)(bare, [0], tmp_path, defences=["none", "weight_noise_matched"])
        assert not list(tmp_path.iterdir())
        assert set(able(bare)) == set(rk.DEFENCES) - {"weight_noise_matched"}

    def test_an_unknown_defence_or_attack(self, bed, tmp_path):
        import repnoise_kit as rk

        with pytest.raises(rk.KitError, match="no defence 'nothing'"):
            rk.resistance_grid(bed, [0], tmp_path, defences=["nothing"])
        with pytest.raises(rk.KitError, match="no defence 'nothing'"):
            rk.cost_grid(bed, [0], tmp_path, defences=["nothing"])
        with pytest.raises(rk.KitError, match="no attack 'nothing'"):
            rk.cost_grid(bed, [0], tmp_path, attacks=["nothing"])
        assert not list(tmp_path.iterdir())


class TestDeaths:
    """Workers that are killed by the cells they run."""

    @pytest.fixture
    def lethal(self, log):
        from repnoise_kit.grid import Cell

        return lambda deaths: Cell(cells.lethal, {"log": log, "name": "x", "deaths": deaths})

    def test_one_that_dies_is_survived_and_its_cell_run_again(self, bench, log, lethal, capfd):
        assert same(run([lethal(1)], bench, workers=2), [cells.rows("x")])
        assert notes(log) == ["x", "x"]
        assert "its cell is run again" in capfd.readouterr().err

    @pytest.mark.slow
    def test_one_that_always_dies_is_said_and_what_is_finished_kept(self, bench, log, lethal):
        from repnoise_kit import KitError

        before = run(noted(log, "ab"), bench), whole(bench.store)
        grid = [lethal(99), *noted(log, "ab")]
        with pytest.raises(KitError, match=r"worker process(es)? died"):
            run(grid, bench, workers=2)
        assert same(run(grid[1:], bench), before[0])
        assert whole(bench.store) == before[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_leaves_what_is_finished_and_nothing_by_halves(bench, log, tmp_path, workers):
    from repnoise_kit import KitError
    from repnoise_kit.grid import Cell

    (tmp_path / "trouble").touch()
    arguments = {"log": log, "name": "x", "trouble": str(tmp_path / "trouble")}
    grid = [*noted(log, "ab"), Cell(cells.troubled, arguments), *noted(log, "cd")]
    run(grid[:2], bench)
    with pytest.raises(KitError, match="x is in trouble"):
        run(grid, bench, workers=workers)
    finished = whole(bench.store)
    assert {grid[0].folder(bench), grid[1].folder(bench)} <= set(finished)
    assert not grid[2].folder(bench).exists()
    for folder in (cell.folder(bench) for cell in grid):
        assert folder in finished or not folder.exists()
    (tmp_path / "trouble").unlink()
    found = run(grid, bench)
    assert [result.frame["name"][0] for result in found] == list("abxcd")
    assert whole(bench.store).items() >= finished.items()
    assert notes(log)[:2] == ["a", "b"]
    assert "a" not in notes(log)[2:]
    assert "b" not in notes(log)[2:]
    assert notes(log).count("x") == 2
