"""Get a split of public data through `datasets`: from the hub, or a local copy of any kind."""

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.utils as hub
import pandas as pd

from repnoise_kit.errors import KitError
from repnoise_kit.files import KINDS, read_table


def need_fields(table: pd.DataFrame, fields: Sequence[str], called: str) -> None:
    """Refuse a table that lacks one of these fields."""
    if missing := [name for name in fields if name not in table]:
        raise KitError(
            f"{called} has no field {missing[0]!r}; it has {', '.join(map(str, table.columns))}: "
            "give data of the published schema"
        )


def called_as(source: Path | str, split: Path | str) -> str:
    """Say which split of which source, as errors do."""
    return str(source) if Path(source).suffix in KINDS else f"{source}, split {split}"


def read_split(source: Path | str, split: str, revision: str | None = None) -> pd.DataFrame:
    """Return a split of a source, its rows numbered from 1."""
    path = Path(source)
    if path.is_file() or path.suffix in KINDS:
        return read_table(path)
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if path.is_dir() and not saved and (files := _files(path, split)):
        table = pd.concat([read_table(file) for file in files])
    else:
        with _quiet():
            try:
                table: Any = _loaded(path if saved else source, split, saved, revision).to_pandas()
            # datasets, the hub's client and what lies below them each raise their own.
            except Exception as error:
                raise KitError(_why_not(source, split, error)) from error
    return table.set_axis(range(1, len(table) + 1))


def _loaded(source: Path | str, split: str, saved: bool, revision: str | None) -> datasets.Dataset:
    if not saved:
        return datasets.load_dataset(str(source), split=split, revision=revision)
    found = datasets.load_from_disk(source)
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
    return found[split]


def _files(folder: Path, split: str) -> list[Path]:
    """Find a split's files: SPLIT.jsonl, SPLIT-00000-of-00002.parquet, SPLIT/0000.parquet."""
    names = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix in KINDS:
            stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
            names[file] = file.parent.name if stem.isdigit() else stem
    found = [file for file, name in names.items() if name == split]
    if len({(file.parent, file.suffix) for file in found}) > 1:
        raise KitError(
            f"{folder} holds {split!r} more than once ({found[0]} and {found[-1]}); give one file"
        )
    if not found and not (folder / "README.md").exists():
        listed = ", ".join(sorted(set(names.values()))) or f"no file of {', '.join(KINDS)}"
        raise KitError(f"{folder} has no split {split!r}; it has {listed}")
    return found


def _why_not(source: Path | str, split: str, error: Exception) -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if listed := re.match(r"Unknown split .* one of \[(.*)\]", reason):
        return f"{source} has no split {split!r}; it has {listed[1]}"
    if Path(source).is_dir():
        return f"{source}, split {split} cannot be read: {reason}; give one of its files"
    return (
        f"{source}, split {split} is no file or folder here and could not be had from the hub "
        f"({reason}); check the name, the network and your access, or download its files (Parquet "
        "where there is a loading script) and give their path"
    )


@contextmanager
def _quiet() -> Generator[None]:
    """Hold back the bars and messages of datasets and the hub for as long as the context lasts."""
    level = datasets.logging.get_verbosity()
    bars = [(part, part.are_progress_bars_disabled()) for part in (datasets.utils, hub)]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    for part, _ in bars:
        part.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        for part, were_off in bars:
            if not were_off:
                part.enable_progress_bars()
