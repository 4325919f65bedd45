"""Keep work on disk: named by fingerprint, written whole or not at all, by one maker at a time."""

import ast
import errno
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock

from repnoise_kit.errors import KitError


def cache_dir() -> Path:
    """Return the kit's cache folder: `REPNOISE_CACHE`, or `repnoise_kit` in the user's cache."""
    if chosen := os.environ.get("REPNOISE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repnoise_kit"


def fingerprint(*values: Any) -> str:
    """Return 16 hexadecimal digits that stand for some JSON-like values, in this order."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_of(*rooms: ModuleType) -> list[str]:
    """Return what modules compute, as text that comments, docstrings and layout do not change."""
    return [ast.dump(_without_docstrings(ast.parse(inspect.getsource(room)))) for room in rooms]


@contextmanager
def written_whole(target: Path | str) -> Generator[Path]:
    """Yield a temporary path beside `target`; what is there on leaving becomes the target.

    The path may be filled as a file or as a folder. After an exception the target is as it was. Of
    several processes that a launcher started, the first one's is kept.

    Raises:
        KitError: the folder cannot be written to, or its disk is full.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise KitError(
            f"cannot write to {target.parent} ({error.strerror}); choose another folder"
        ) from error
    try:
        fresh = room / target.name
        with writing(target.parent, room):
            yield fresh
            if _somebody_else_writes():
                return
            if target.is_dir() and fresh.exists():
                target.rename(room / f"{target.name}-before")  # Never there by halves.
            fresh.replace(target)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _somebody_else_writes() -> bool:
    """Whether this is one of several processes that write the same, and not the first of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


_FULL, _READ_ONLY = (os.strerror(code) for code in (errno.ENOSPC, errno.EROFS))
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# What says so in words alone: safetensors and database servers, SQLite, PyTorch's writer.
_IN_WORDS = {
    _FULL: _FULL,
    _READ_ONLY: _READ_ONLY,
    "database or disk is full": _FULL,
    "readonly database": _READ_ONLY,
    "inline_container": _FULL,
    "iostream error": _FULL,
    "PytorchStreamWriter failed writing": _FULL,
}


@contextmanager
def writing(folder: Path, room: Path | None = None) -> Generator[None]:
    """Say in one line that the disk of a folder is full or read-only; let other errors pass.

    Args:
        folder: What the user knows it by.
        room: Where else in it is written; a line that names this is said anew of the folder.

    Raises:
        KitError: nothing more can be written to the folder.
    """
    try:
        yield
    except Exception as error:
        said = isinstance(error, KitError) and not (room and str(room) in str(error))
        reason = None if said else disk_trouble(error)
        if reason is None:
            raise
        raise KitError(
            f"cannot write to {folder} ({reason}); make room there or choose another folder, and "
            "run the same again"
        ) from error


def disk_trouble(error: BaseException | None) -> str | None:
    """Return why a disk took no more, if an error, or what it came from, is about that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            return os.strerror(error.errno)
        for words, reason in _IN_WORDS.items():
            if words in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None


def check_writable(folder: Path) -> None:
    """Refuse a folder, made now where it is not there, that cannot be written to."""
    with written_whole(folder / ".writable") as probe:
        probe.touch()
    (folder / ".writable").unlink(missing_ok=True)


@contextmanager
def one_maker(target: Path) -> Generator[None]:
    """Let one process at a time make `target`; the system frees the lock of one that dies."""
    check_writable(target.parent)
    with writing(target.parent), FileLock(target.with_name(target.name + ".lock")):
        yield


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def seal(folder: Path) -> None:
    """Note what is in a folder, for `is_whole`."""
    (folder / "whole.json").write_text(json.dumps(digests(folder)))


def is_whole(folder: Path) -> bool:
    """Whether each file of a sealed folder is, byte for byte, the one that was written."""
    try:
        written = json.loads((folder / "whole.json").read_text())
        there = digests(folder)
    except (OSError, ValueError):
        return False
    if not isinstance(written, dict) or not written:
        return False
    return all(there.get(name) == digest for name, digest in written.items())


def data_dir() -> Path:
    """Return the folder of the kit's data: the checkout's, or the copy in a wheel."""
    package = Path(__file__).parent
    in_checkout = (package.parent / "pyproject.toml").is_file()
    return package.parent / "data" if in_checkout else package / "_data"


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return tree


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
