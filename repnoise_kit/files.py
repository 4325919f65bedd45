"""Read a table from any of five kinds of file, or say in one line why not."""

import json
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
    if not path.is_file():
        raise KitError(f"{path}: no such file")
    if path.suffix not in KINDS:
        raise KitError(f"{path} is not one of {', '.join(KINDS)}")
    if not path.stat().st_size:
        raise KitError(f"{path} is empty")
    try:
        table = _READERS[path.suffix](path)
    except KitError:
        raise
    except (ValueError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KitError(f"{path} is not a readable {path.suffix} file: {reason}") from error
    table.index = pd.RangeIndex(1, len(table) + 1)
    return table


def _jsonl(path: Path) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
    rows = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise KitError(f"{path}: not a list of objects with named fields")
    return pd.DataFrame(rows)


def _csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, encoding="utf-8", keep_default_na=False)


def _arrow(path: Path) -> pd.DataFrame:
    with pa.memory_map(str(path)) as file:
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
