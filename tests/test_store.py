"""Work on disk: named by what made it, whole or not there, made by one process at a time."""

import hashlib
import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repnoise_kit.errors import KitError
from repnoise_kit.store import (
    cache_dir,
    code_of,
    data_dir,
    digests,
    fingerprint,
    one_maker,
    written_whole,
)

ROOT = Path(__file__).parents[1]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


class TestFingerprint:
    def test_it_is_the_same_on_every_machine(self):
        text = b'["a", 1, {"b": [1.5, null]}]'
        assert fingerprint("a", 1, {"b": [1.5, None]}) == hashlib.sha256(text).hexdigest()[:16]
        assert fingerprint("a", 1, {"b": [1.5, None]}) == "d66bdef65ce79465"

    @settings(derandomize=True, deadline=None)
    @given(one=JSON, other=JSON)
    def test_equal_values_and_only_those_have_equal_fingerprints(self, one, other):
        same = repr(_ordered(one)) == repr(_ordered(other))
        assert (fingerprint(one) == fingerprint(other)) == same
        assert len(fingerprint(one)) == 16
        assert int(fingerprint(one), 16) >= 0

    def test_order_matters_in_lists_and_not_in_dictionaries(self):
        assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
        assert fingerprint([1, 2]) != fingerprint([2, 1])
        assert fingerprint(1, 2) != fingerprint(2, 1)
        assert len({fingerprint(v) for v in (1, "1", 1.5, [1], None, True, float("nan"))}) == 7

    def test_paths_count_by_their_text(self):
        assert fingerprint(Path("a")) == fingerprint("a") != fingerprint(Path("b"))


def _ordered(value):
    if isinstance(value, dict):
        return sorted((key, _ordered(inner)) for key, inner in value.items()), "dictionary"
    return [_ordered(inner) for inner in value] if isinstance(value, list) else value


CODE = '''
"""What a module is about."""

import math

SIZE = 3
"""What the constant means."""


class Shape:
    """A shape."""

    name: str
    """What it is called."""


def area(radius, scale=1.0):
    """Return an area."""
    # The reason why.
    return scale * math.pi * radius**2
'''
SAME = """
import math
SIZE = (3)  # of a thing
class Shape:
    name: str


def area(
    radius,
    scale=1.0,
):
    '''Say it otherwise.

    And longer.
    '''
    return (
        scale * math.pi * radius ** 2
    )
"""


class TestCodeOf:
    @pytest.fixture
    def code(self, tmp_path):
        def of(text):
            path = tmp_path / f"room_{len(list(tmp_path.iterdir()))}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            room = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(room)
            return code_of(room)

        return of

    def test_comments_docstrings_and_layout_do_not_count(self, code):
        assert code(CODE) == code(SAME)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("radius**2", "radius**3"),
            ("scale=1.0", "scale=2.0"),
            ("SIZE = 3", "SIZE = 4"),
            ("name: str", "name: int"),
            ("math.pi", "math.tau"),
            ("scale * math.pi", "math.pi * scale"),
            ("class Shape", "class Form"),
        ],
    )
    def test_code_counts(self, code, old, new):
        assert old in CODE
        assert code(CODE) != code(CODE.replace(old, new))

    def test_texts_that_are_used_count(self, code):
        assert code("WORDS = 'red'") != code("WORDS = 'blue'")
        assert code("def f():\n    return 'red'") != code("def f():\n    return 'blue'")

    def test_a_body_of_a_docstring_alone_is_an_empty_one(self, code):
        assert code('def f():\n    """Do nothing."""') == code("def f():\n    pass")

    def test_one_entry_a_module_in_order(self, code):
        one, other = code("A = 1"), code("B = 1")
        assert one != other
        assert [len(one), len(other)] == [1, 1]


class TestWrittenWhole:
    def test_a_file_appears_when_it_is_whole_in_a_folder_made_for_it(self, tmp_path):
        target = tmp_path / "deep" / "er" / "table.csv"
        with written_whole(target) as fresh:
            fresh.write_text("a")
            assert not target.exists()
            assert fresh.name == "table.csv"
        assert target.read_text() == "a"
        assert list(target.parent.iterdir()) == [target]

    def test_a_file_takes_the_place_of_an_older_one(self, tmp_path):
        target = tmp_path / "table.csv"
        target.write_text("old")
        with written_whole(target) as fresh:
            fresh.write_text("new")
            assert target.read_text() == "old"
        assert target.read_text() == "new"
        assert list(tmp_path.iterdir()) == [target]

    def test_a_folder_takes_the_place_of_an_older_one_with_all_its_files(self, tmp_path):
        target = tmp_path / "seed"
        for name in ("old", "new"):
            with written_whole(target) as fresh:
                (fresh / "deep").mkdir(parents=True)
                (fresh / "deep" / name).write_text(name)
        assert [path.name for path in (target / "deep").iterdir()] == ["new"]
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
    def test_after_an_exception_all_is_as_it_was(self, kind, tmp_path):
        target = tmp_path / "target"
        _fill(target, kind)
        with pytest.raises(ZeroDivisionError):
            _interrupted(target, "file" if kind == "nothing" else kind)
        assert _content(target) == (None if kind == "nothing" else "old")
        assert list(tmp_path.iterdir()) == ([] if kind == "nothing" else [target])

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_a_body_that_writes_nothing_takes_nothing_away(self, kind, tmp_path):
        _fill(tmp_path / "target", kind)
        with pytest.raises(OSError, match="target"), written_whole(tmp_path / "target"):
            pass
        assert _content(tmp_path / "target") == "old"

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(KitError) as refused, written_whole(tmp_path / "file" / "table.csv"):
            pass
        assert str(tmp_path / "file") in str(refused.value)
        assert "choose another folder" in str(refused.value)


def _interrupted(target, kind):
    with written_whole(target) as fresh:
        _fill(fresh, kind, "half")
        raise ZeroDivisionError


def _fill(path, kind, text="old"):
    if kind == "folder":
        path.mkdir()
        path = path / "inner"
    if kind != "nothing":
        path.write_text(text)


def _content(path):
    if not path.exists():
        return None
    return (path / "inner" if path.is_dir() else path).read_text()


MAKER = """
import sys, time
from pathlib import Path
from repnoise_kit.store import one_maker, written_whole

target = Path(sys.argv[1])
with one_maker(target):
    if target.exists():
        print("found", target.read_text())
    else:
        time.sleep(0.5)
        with written_whole(target) as fresh:
            fresh.write_text("whole")
        print("made")
"""
DYING = """
import os, sys
from pathlib import Path
from repnoise_kit.store import one_maker

with one_maker(Path(sys.argv[1])):
    os._exit(9)
"""


def _start(script, target):
    words = [sys.executable, "-c", textwrap.dedent(script), str(target)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)


class TestOneMaker:
    def test_of_two_processes_one_makes_and_the_other_finds(self, tmp_path):
        both = [_start(MAKER, tmp_path / "cache" / "lab") for _ in range(2)]
        said = sorted(maker.communicate(timeout=30)[0].strip() for maker in both)
        assert said == ["found whole", "made"]

    def test_a_process_that_dies_leaves_no_lock(self, tmp_path):
        dying = _start(DYING, tmp_path / "lab")
        dying.communicate(timeout=30)
        assert dying.returncode == 9
        assert _start(MAKER, tmp_path / "lab").communicate(timeout=30)[0].strip() == "made"

    def test_a_folder_that_cannot_be_written_is_named_before_anything_is_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        refused = pytest.raises(KitError, match="choose another folder")
        with refused, one_maker(tmp_path / "file" / "lab"):
            pytest.fail("made all the same")


class TestFolders:
    def test_the_cache_is_where_the_user_says(self, monkeypatch, tmp_path):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path / "mine"))
        assert cache_dir() == tmp_path / "mine"
        monkeypatch.setenv("REPNOISE_CACHE", "~/mine")
        assert cache_dir() == Path.home() / "mine"

    def test_or_in_the_users_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("REPNOISE_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_dir() == tmp_path / "repnoise_kit"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == Path.home() / ".cache" / "repnoise_kit"

    def test_the_data_of_a_checkout_are_its_own(self):
        assert (data_dir() / "lab" / "pairs.jsonl").is_file()

    def test_digests_are_those_of_the_files_bytes(self, tmp_path):
        (tmp_path / "b.bin").write_bytes(b"\x00\xff")
        (tmp_path / "a.txt").write_text("text")
        (tmp_path / "folder").mkdir()
        expected = {
            "a.txt": hashlib.sha256(b"text").hexdigest(),
            "b.bin": hashlib.sha256(b"\x00\xff").hexdigest(),
        }
        assert digests(tmp_path) == expected
        assert list(digests(tmp_path)) == ["a.txt", "b.bin"]
        (tmp_path / "a.txt").write_text("texs")
        assert digests(tmp_path) != expected
