"""Read a table from any of five kinds of file, or say in one line why not."""

import json
import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa

from repnoise_kit.errors import KitError

KINDS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")


def read_table(source: Path | str) -> pd.DataFrame:
    """Return the rows of a JSON, JSONL, CSV, Parquet or Arrow file, numbered from 1.

    Raises:
        KitError: the file is missing, empty, of another kind, or not what its name says.
    """
    path = Path(source)
    if path.is_dir():
        raise KitError(f"{path} is a folder; give one of its files ({', '.join(KINDS)})")
    if not path.is_file():
        raise KitError(f"{path}: no such file; check the path")
    if path.suffix not in KINDS:
        raise KitError(f"{path} is not one of {', '.join(KINDS)}; save it as one of them")
    if not path.stat().st_size:
        raise KitError(f"{path} is empty; give a file with rows")
    try:
        table = _READERS[path.suffix](path)
    except KitError:
        raise
    except (ValueError, pa.ArrowException, OSError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KitError(f"{path} is not a readable {path.suffix} file: {reason}") from error
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def _jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise KitError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise KitError(f"{path}, line {number}: not an object with named fields")
        rows.append(row)
    return pd.DataFrame(rows)


def _json(path: Path) -> pd.DataFrame:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise KitError(f"{path}: not a list of objects with named fields")
    return pd.DataFrame(rows)


def _csv(path: Path) -> pd.DataFrame:
    # Where rows have more fields than names, pandas would take the first for the rows' own names.
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, encoding="utf-8", keep_default_na=False, index_col=False)
        except pd.errors.ParserWarning as error:
            raise KitError(
                f"{path}: rows have more fields than there are names; quote them"
            ) from error


def _arrow(path: Path) -> pd.DataFrame:
    # Read, not mapped: a table must outlive changes to its file.
    with pa.OSFile(str(path)) as file:
        try:
            return pa.ipc.open_file(file).read_all().to_pandas()
        except pa.ArrowInvalid:
            # What `datasets` keeps on disk is the streaming kind of the same format.
            file.seek(0)
            return pa.ipc.open_stream(file).read_all().to_pandas()


_READERS = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": pd.read_parquet,
    ".arrow": _arrow,
}
