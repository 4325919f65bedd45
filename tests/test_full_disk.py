"""A full disk and one that may only be read: one line that names the folder, and no harm done.

On small disks of memory, really filled, where root may mount them; what libraries say of a full
disk, and writers that are made to fail, everywhere. After room is made the same call ends as if
nothing had happened.
"""

import contextlib
import errno
import multiprocessing
import os
import shutil
import sqlite3
import subprocess

import pandas as pd
import pytest
import safetensors.torch
import sweeps
import test_grid
import torch
from conftest import make_tiny
from small import own_files, word_tokenizer
from test_grid import contents

import repnoise_kit as rk
from repnoise_kit import checkpoints, search, store
from repnoise_kit.resistance import resistance_grid
from repnoise_kit.search import Errand
from repnoise_kit.world import build

pytestmark = pytest.mark.usefixtures("one_thread", "cheap_collections")

two_defences = test_grid.two_defences
FULL, READ_ONLY = os.strerror(errno.ENOSPC), os.strerror(errno.EROFS)
CAPACITY = 2 << 20
HISTORY = rk.Result(pd.DataFrame({"a": [1]}), {"method": "none"})


class Disk:
    """A disk of two megabytes that a test may fill, or forbid to be written."""

    def __init__(self, folder):
        self.folder, self.filler = folder, folder / "filler"

    def fill(self, leave=0):
        """Leave room for so many bytes."""
        free = shutil.disk_usage(self.folder).free
        self.filler.write_bytes(b"x" * (free - leave))
        assert shutil.disk_usage(self.folder).free <= leave

    def forbid(self):
        self._mount("ro")

    def free(self):
        self._mount("rw")
        self.filler.unlink(missing_ok=True)

    def _mount(self, how):
        subprocess.run(["mount", "-o", f"remount,{how}", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    kind = ["mount", "-t", "tmpfs", "-o", f"size={CAPACITY}", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(kind, capture_output=True).returncode:
        pytest.skip("no disk of its own: only root may mount one, and not everywhere")
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(params=["full", "read-only"])
def trouble(request, disk):
    """Bring the disk into trouble; return what the system says of it."""

    def of(leave=0):
        if request.param == "full":
            disk.fill(leave)
            return FULL
        disk.forbid()
        return READ_ONLY

    return of


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    return sweeps.tiny(tmp_path_factory.mktemp("own"))


@contextlib.contextmanager
def refused(folder, reason):
    """Expect one line that names a folder, why nothing can be written there, and the way out."""
    with pytest.raises(rk.KitError) as error:
        yield
    line = str(error.value)
    assert f"cannot write to {folder} ({reason}); " in line, line
    assert "choose another folder" in line
    assert "\n" not in line


def left(folder):
    """What lies in a folder but for locks: nothing by halves, if all was taken back."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return sorted(p.name for p in found if p.name != "filler")


class TestSaving:
    def test_a_model(self, bed, disk, trouble):
        reason, model = trouble(), bed.model()
        with refused(disk.folder, reason):
            rk.save_model(model, bed, disk.folder / "model", HISTORY)
        assert left(disk.folder) == []
        disk.free()
        folder = rk.save_model(model, bed, disk.folder / "model", HISTORY)
        again = rk.load_model(folder).state_dict()
        assert all(torch.equal(part, again[name]) for name, part in model.state_dict().items())

    @pytest.mark.parametrize("leave", [0, 4096, 12288, 32768])
    def test_an_older_model_stays_wherever_the_room_ends(self, bed, disk, leave):
        folder, model = disk.folder / "model", bed.model()
        rk.save_model(model, bed, folder, HISTORY)
        before = contents(folder)
        next(model.parameters()).data += 1
        disk.fill(leave)
        with refused(disk.folder, FULL):
            rk.save_model(model, bed, folder, HISTORY)
        assert contents(folder) == before
        assert {path.name for path in disk.folder.iterdir()} == {"model", "filler"}

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_a_result(self, disk, trouble, suffix):
        rows = rk.Result(pd.DataFrame({"a": range(9)}), {"seed": 1})
        reason, path = trouble(), disk.folder / f"rows{suffix}"
        with refused(disk.folder, reason):
            rows.save(path)
        assert left(disk.folder) == []
        disk.free()
        again = rk.Result.load(rows.save(path))
        assert again.frame.equals(rows.frame)
        assert again.made_with == rows.made_with


class TestGrid:
    @pytest.mark.usefixtures("two_defences")
    def test_the_command_says_it_and_goes_on(self, disk, trouble, tmp_path, capsys):
        from repnoise_kit.__main__ import main

        own = own_files(tmp_path)
        words = ["grid", "resistance", "--model", own / "model", "--pairs", own / "pairs.json"]
        words += ["--retain", own / "retain.json", "--seeds", 1, "--out", tmp_path / "out"]

        def run(where):
            code = main([*map(str, words), "--store", str(where)])
            return code, capsys.readouterr().err

        assert run(tmp_path / "calm")[0] == 0
        calm = contents(tmp_path / "calm")
        reason = trouble(60_000)
        code, said = run(disk.folder / "store")
        assert code == 2
        line = said.replace("\r", "\n").splitlines()[-1]
        assert line.startswith(f"repnoise_kit: cannot write to {disk.folder / 'store'}")
        assert f"({reason}); " in line
        assert "Traceback" not in said
        made = contents(disk.folder / "store") if reason == FULL else {}
        assert all(calm[name] == content for name, content in made.items())
        disk.free()
        assert run(disk.folder / "store")[0] == 0
        assert contents(disk.folder / "store") == calm

    def test_what_is_finished_is_read_from_a_disk_that_may_only_be_read(self, bed, disk, capsys):
        cells = {"defences": ["none"]}
        rows = resistance_grid(bed, [0], disk.folder / "store", **cells)
        disk.forbid()
        assert resistance_grid(bed, [0], disk.folder / "store", **cells).frame.equals(rows.frame)


class Enough(Exception):  # noqa: N818
    """There was room for all."""


class TestCheckpoints:
    @pytest.fixture(autouse=True)
    def at_every_step(self, monkeypatch):
        monkeypatch.setattr(checkpoints, "EVERY", 0.0)

    def defended(self, bed, folder):
        model = bed.model()
        curves = rk.defend_(model, bed, batch_size=4, seed=1, checkpoints=folder)
        return model.state_dict(), curves.frame

    def test_a_folder_that_may_only_be_read_is_told_before_anything_is_trained(self, bed, disk):
        disk.forbid()
        model = bed.model()
        before = {name: part.clone() for name, part in model.state_dict().items()}
        with refused(disk.folder / "kept", READ_ONLY):
            rk.defend_(model, bed, checkpoints=disk.folder / "kept")
        assert all(part.equal(before[name]) for name, part in model.state_dict().items())

    def test_wherever_the_room_ends_it_is_said_and_gone_on_with(self, bed, disk, tmp_path):
        weights, curves = self.defended(bed, tmp_path)
        said = 0
        for leave in range(0, 400_000, 20_000):
            disk.fill(leave)
            with contextlib.suppress(Enough), refused(disk.folder / "kept", FULL):
                self.defended(bed, disk.folder / "kept")
                raise Enough
            said += left(disk.folder) != []
            disk.free()
        assert 3 < said < 20  # Some, but not all, found room enough.
        disk.fill(20_000)
        with refused(disk.folder / "kept", FULL):
            self.defended(bed, disk.folder / "kept")
        disk.free()
        again, path = self.defended(bed, disk.folder / "kept")
        assert all(torch.equal(part, again[name]) for name, part in weights.items())
        assert path.equals(curves)
        assert left(disk.folder) == []


class TestStudy:
    def errand(self, bed, disk, tmp_path):
        how = {**sweeps.HOW, "store": tmp_path / "store", "until": 2}
        return Errand(bed, disk.folder / "x.db", **how)

    def test_a_new_one(self, bed, disk, trouble, tmp_path):
        reason, errand = trouble(), self.errand(bed, disk, tmp_path)
        with pytest.raises(rk.KitError) as error:
            errand.study()
        assert str(error.value).startswith("cannot write to ")
        assert str(disk.folder) in str(error.value)
        assert f"({reason}); " in str(error.value)
        disk.free()
        assert sweeps.tally(errand.study()) == {"done": 0}

    @pytest.mark.parametrize("leave", [0, 4096, 16384])
    def test_a_worker_says_it_in_one_line_and_another_goes_on(
        self, bed, disk, tmp_path, monkeypatch, leave
    ):
        sweeps.pretend(monkeypatch)
        errand = self.errand(bed, disk, tmp_path)
        (tmp_path / "store").mkdir()
        errand.study()
        disk.fill(leave)
        line, said = served(errand, tmp_path / "errors")
        assert line == (
            f"cannot write to the study in {disk.folder / 'x.db'} ({FULL}); make room there or "
            "choose another file, and run the same again"
        )
        assert said == ""
        disk.free()
        assert served(errand, tmp_path / "errors") == (None, "")
        assert sweeps.tally(errand.study())["done"] == 2


def served(errand, errors):
    """Let a worker do an errand; return the error that it tells, and what it prints."""
    ours, theirs = multiprocessing.Pipe()

    def run():
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
        search._serve(theirs, errand)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    heard = {}
    with contextlib.suppress(EOFError):
        while "end" not in heard:
            heard = ours.recv()
    ours.close()
    process.join(60)
    return heard.get("error"), errors.read_text()


class TestCache:
    @pytest.fixture
    def tiny(self, disk, monkeypatch):
        """A cache on the small disk, and a lab that takes no time."""
        monkeypatch.setenv("REPNOISE_CACHE", str(disk.folder / "cache"))
        made = make_tiny(), word_tokenizer(["Question", ":"])
        monkeypatch.setattr(build, "_build", lambda seed, naive: made)

    def test_the_lab(self, tiny, disk, trouble, capsys):
        from repnoise_kit.__main__ import main

        reason = trouble(4096)
        assert main(["lab"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"repnoise_kit: cannot write to {disk.folder / 'cache' / 'lab'} (")
        assert f"({reason}); " in said
        assert said.count("\n") == 1
        assert left(disk.folder) == []
        disk.free()
        assert store.is_whole(build.lab_files(0))

    def test_a_lab_that_is_there_is_used_from_a_disk_that_may_only_be_read(
        self, tiny, disk, capsys
    ):
        folder = build.lab_files(0)
        disk.forbid()
        assert build.lab_files(0) == folder
        assert capsys.readouterr().err == ""

    def test_refusals(self, bed, disk):
        """A file that grows: what was written stays, and it ends as if nothing had happened."""
        asked, settings = bed.evaluated()["prompt"].tolist(), {"max_new_tokens": 2, "batch_size": 1}
        rk.make_refusals(bed.base, bed.tokenizer, asked, disk.folder / "calm.jsonl", **settings)
        disk.fill(0)
        with refused(disk.folder, FULL):
            rk.make_refusals(bed.base, bed.tokenizer, asked, disk.folder / "x.jsonl", **settings)
        disk.free()
        rk.make_refusals(bed.base, bed.tokenizer, asked, disk.folder / "x.jsonl", **settings)
        one, other = ((disk.folder / f"{name}.jsonl").read_bytes() for name in ("calm", "x"))
        assert one == other


class TestWords:
    """What needs no disk of its own: how libraries say it, and what is none of the disk's."""

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(errno.ENOSPC, FULL), FULL),
            (OSError(errno.EDQUOT, "x"), os.strerror(errno.EDQUOT)),
            (OSError(errno.EROFS, READ_ONLY), READ_ONLY),
            (safetensors.SafetensorError(f"I/O error: {FULL} (os error 28)"), FULL),
            (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), FULL),
            (RuntimeError("basic_ios::clear: iostream error"), FULL),
            (sqlite3.OperationalError("database or disk is full"), FULL),
            (sqlite3.OperationalError("attempt to write a readonly database"), READ_ONLY),
            (OSError(errno.ENOENT, "No such file or directory"), None),
            (PermissionError(errno.EACCES, "Permission denied"), None),
            (RuntimeError("CUDA out of memory"), None),
            (KeyError("x"), None),
        ],
    )
    def test_of_an_error_and_of_what_came_of_it(self, error, reason, tmp_path):
        other = ValueError("while saving")
        other.__cause__ = error
        for raised in (error, other):
            assert store.disk_trouble(raised) == reason
            caught = rk.KitError if reason else type(raised)
            with pytest.raises(caught) as found, store.writing(tmp_path):
                raise raised
            assert reason is None or f"cannot write to {tmp_path} ({reason}); " in str(found.value)

    def test_a_full_disk_elsewhere_is_named_as_what_it_is(self, tmp_path):
        """Inside a cell, say, whose model is looked for in a cache on another disk."""
        cell, cache = tmp_path / "store" / "cell", tmp_path / "cache"
        with refused(cache, FULL), store.written_whole(cell), store.writing(cache):
            raise OSError(errno.ENOSPC, FULL)

    def test_what_is_written_for_a_folder_names_that_folder(self, tmp_path, monkeypatch):
        def full(frame, path, **how):
            raise OSError(errno.ENOSPC, FULL)

        monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
        with refused(tmp_path, FULL), store.written_whole(tmp_path / "cell") as fresh:
            HISTORY.save(fresh / "rows.parquet")
        assert list(tmp_path.iterdir()) == []
