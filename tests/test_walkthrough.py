"""The notebooks in any folder: copied, set up where the kit is missing, opened and closed."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from refresh_notebooks import begin
from traitlets.config import Config

import repnoise_kit
from repnoise_kit import walkthrough
from repnoise_kit.__main__ import main
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result
from repnoise_kit.store import data_dir

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What Google's Colab has installed: all of it must do, since an upgrade asks for a restart.
COLAB = {
    **{"ipywidgets": "7.7.1", "torch": "2.11.0", "transformers": "5.15.0", "datasets": "4.0.0"},
    **{"matplotlib": "3.10.0", "pandas": "2.2.3", "numpy": "2.1.3"},
}


# Results that come with the kit.


def test_committed_reads_what_lies_in_data_results():
    for name in ("quickstart.csv", "freezing_questions.parquet"):
        result = Result.committed(name)
        here = Result.load(ROOT / "data" / "results" / name)
        assert result.frame.equals(here.frame)
        assert result.made_with == here.made_with != {}


@pytest.mark.parametrize("name", ["quickstarts.csv", "../paper/models.csv", "quickstart.json", ""])
def test_a_wrong_name_is_told_with_the_right_ones(name):
    with pytest.raises(KitError) as error:
        Result.committed(name)
    assert "quickstart.csv" in str(error.value)
    assert "samples_questions.parquet" in str(error.value)
    assert ".json," not in str(error.value)


# The copies.


def test_all_notebooks_are_copied_byte_for_byte(tmp_path):
    copied = walkthrough.copy_notebooks(tmp_path / "a" / "b")
    assert copied == [tmp_path / "a" / "b" / name for name in NAMES]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == NAMES
    for path in copied:
        assert path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes()


def test_the_users_own_work_is_kept_and_said(tmp_path, capsys):
    walkthrough.copy_notebooks(tmp_path)
    assert capsys.readouterr().out == ""
    mine, folder, gone = (tmp_path / name for name in NAMES[:3])
    mine.write_text("my own work")
    folder.unlink()
    folder.mkdir()
    gone.unlink()
    other = tmp_path / NAMES[3]
    before = other.stat().st_mtime_ns
    copied = walkthrough.copy_notebooks(tmp_path)
    assert [path.name for path in copied] == NAMES[2:]
    assert mine.read_text() == "my own work"
    assert folder.is_dir()
    assert gone.is_file()
    assert other.stat().st_mtime_ns == before
    kept = capsys.readouterr().out.splitlines()
    assert [line.split(" is ")[0] for line in kept] == [str(mine), str(folder)]
    assert all("rename or remove it" in line for line in kept)


@pytest.mark.parametrize("inside", [(), ("deeper",)])
def test_a_folder_that_is_a_file_is_told_in_one_line(tmp_path, capsys, inside):
    (tmp_path / "taken").write_text("a file")
    target = (tmp_path / "taken").joinpath(*inside)
    with pytest.raises(KitError, match="taken"):
        walkthrough.copy_notebooks(target)
    assert main(["notebooks", str(target), "--copy-only"]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("repnoise_kit: cannot write to ")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert (tmp_path / "taken").read_text() == "a file"


def test_the_command_copies_into_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(walkthrough, "open_notebooks", lambda *a, **k: pytest.fail("opened"))
    assert main(["notebooks", "--copy-only"]) == 0
    assert sorted(path.name for path in Path("repnoise-notebooks").iterdir()) == NAMES
    assert f"{len(NAMES)} notebooks" in capsys.readouterr().out


def test_installed_from_a_wheel_the_kit_has_its_notebooks_and_results(tmp_path):
    """Laid out as the build does it, without the checkout around it."""
    site = tmp_path / "site"
    shutil.copytree(ROOT / "repnoise_kit", site / "repnoise_kit")
    added = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    for ours, theirs in added.items():
        shutil.copytree(ROOT / ours, site / theirs)
    (site / "notebooks").mkdir()  # of another package
    code = (
        "import repnoise_kit as rk\n"
        "from repnoise_kit.walkthrough import copy_notebooks\n"
        "print(rk.__file__)\n"
        "print(len(rk.Result.committed('quickstart.csv').frame))\n"
        "print(len(copy_notebooks('here')))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert Path(said[0]).is_relative_to(site)
    assert int(said[1]) == len(Result.load(data_dir() / "results" / "quickstart.csv").frame) > 0
    assert int(said[2]) == len(NAMES)


# The set-up cell.


def set_up(monkeypatch, folder, address, *, missing):
    """Run the set-up cell in a shell of `folder`; return the words of each `%pip`, and the kit."""
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("1")]
    )
    asked = []

    def pip(line):
        asked.append(shlex.split(line))
        monkeypatch.setitem(sys.modules, "repnoise_kit", repnoise_kit)

    monkeypatch.chdir(folder)
    monkeypatch.setenv("IPYTHONDIR", str(folder / "profile"))
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.register_magic_function(pip, "line", "pip")
    if missing:
        monkeypatch.setitem(sys.modules, "repnoise_kit", None)
    shell.run_cell(begin(book, "t.ipynb", address).cells[1].source).raise_error()
    assert shell.user_ns["rk"] is repnoise_kit
    return asked


def test_where_the_kit_is_missing_the_clone_is_installed(monkeypatch, tmp_path):
    assert set_up(monkeypatch, tmp_path, None, missing=True) == [["install", "-q", ".."]]


def test_or_the_wheel_beside_the_notebook(monkeypatch, tmp_path):
    wheel = "repnoise_kit-0.1.0-py3-none-any.whl"
    (tmp_path / wheel).touch()
    (tmp_path / "other_kit-1-py3-none-any.whl").touch()
    assert set_up(monkeypatch, tmp_path, None, missing=True) == [["install", "-q", wheel]]


def test_or_what_is_public(monkeypatch, tmp_path):
    there = "https://github.com/somebody/some-kit"
    ((*_, source),) = set_up(monkeypatch, tmp_path, there, missing=True)
    wanted = Requirement(source)
    assert wanted.name == PROJECT["project"]["name"]
    assert wanted.url == f"git+{there}"


@pytest.mark.parametrize("address", [None, "https://github.com/somebody/some-kit"])
def test_where_the_kit_is_there_nothing_is_installed(monkeypatch, tmp_path, address):
    assert set_up(monkeypatch, tmp_path, address, missing=False) == []


@pytest.mark.parametrize("name", COLAB)
def test_what_colab_has_is_new_enough(name):
    needs = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
    (wanted,) = (need for need in needs if need.name == name)
    assert wanted.specifier.contains(COLAB[name])
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains("3.13.0")


# JupyterLab: one that only says what it was asked for.

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
print("asked", *sys.argv[1:], flush=True)
if "--fails" in os.environ.get("STAND_IN", ""):
    sys.exit(3)
signal.signal(signal.SIGINT, lambda *_: print("Shut down? (y/n)", flush=True))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def start(folder, *words, **environment):
    (folder / "jupyterlab.py").write_text(STAND_IN)
    return subprocess.Popen(
        [sys.executable, "-m", "repnoise_kit", "notebooks", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("words", [["mine", "--no-browser"], ["mine"]])
def test_ctrl_c_ends_jupyterlab_and_says_so_in_a_line(tmp_path, words):
    command = start(tmp_path, *words)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    server = int((tmp_path / "pid").read_text())
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=20)
    assert command.returncode == 130
    assert err == "repnoise_kit: stopped; the same command goes on from here\n"
    asked = next(line for line in out.splitlines() if line.startswith("asked"))
    assert asked.split()[1] == "mine"
    assert ("--no-browser" in asked) == ("--no-browser" in words)
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_a_jupyterlab_that_fails_is_told_in_a_line(tmp_path):
    out, err = start(tmp_path, "mine", STAND_IN="--fails").communicate(timeout=30)
    assert "asked mine" in out
    assert err.startswith("repnoise_kit: JupyterLab ended with code 3; ")
    assert err.count("\n") == 1
