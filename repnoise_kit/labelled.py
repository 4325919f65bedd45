"""Train the local classifier on labelled answers of any file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from repnoise_kit.errors import KitError, check_whole
from repnoise_kit.files import read_table
from repnoise_kit.pairs import check_answers, renamed
from repnoise_kit.scoring import Classifier, train_classifier

# By how a cell is written; a whole number may have been read as a decimal one.
_LABELS = {
    "is_safe": {"True": False, "False": True},
    "label": {"1": True, "1.0": True, "0": False, "0.0": False, "harmful": True, "harmless": False},
}


def load_labelled(
    source: Path | str, *, columns: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read labelled answers from a JSON, JSONL, CSV, Parquet or Arrow file.

    Args:
        source: The file. Columns `prompt`, `answer` (or `response`), and either `is_safe` (true or
            false) or `label` (1 or `harmful`, 0 or `harmless`).
        columns: Names in the file, where they differ: `{"prompt": "question"}`.

    Returns:
        The harmful and the harmless ones: tables of `prompt` and `answer`.

    Raises:
        KitError: what is wrong, in which file, row and column; or one of the two is missing.
    """
    table = renamed(read_table(source), columns, source)
    rows = check_answers(table, source)[["prompt", "answer"]]
    harmful = _harmful(table, source)
    if harmful.all() or not harmful.any():
        missing = "harmless" if harmful.all() else "harmful"
        raise KitError(f"{source} has no {missing} answer; a classifier learns from both kinds")
    tables = (rows[harmful], rows[~harmful])
    return tables[0].reset_index(drop=True), tables[1].reset_index(drop=True)


def local_classifier(
    source: Path | str, *, columns: Mapping[str, str] | None = None, seed: int = 0
) -> Classifier:
    """Train the local classifier on labelled answers: none that it will judge should be in them.

    Args:
        source: A file that `load_labelled` reads.
        columns: Names in the file, where they differ from the kit's.
        seed: Draws what is emptied, swapped and held out (`train_classifier`).
    """
    check_whole(seed=seed)
    harmful, harmless = load_labelled(source, columns=columns)
    try:
        return train_classifier(harmful, [harmless], seed)
    except KitError:
        raise
    except ValueError as error:
        raise KitError(
            f"{source}: {len(harmful)} harmful and {len(harmless)} harmless answers are too few "
            "to learn from and to hold some out; give more"
        ) from error


def _harmful(table: pd.DataFrame, source: Path | str) -> np.ndarray:
    """Return which rows are labelled harmful, or say which row's label cannot be read."""
    given = [name for name in _LABELS if name in table]
    if len(given) != 1:
        raise KitError(
            f"{source} needs one column of labels, is_safe or label, and has "
            f"{' and '.join(given) or 'neither'}; it has {', '.join(map(str, table.columns))}"
        )
    name = given[0]
    meant = table[name].map(lambda cell: _LABELS[name].get(str(cell)))
    if meant.isna().any():
        row = meant.isna().idxmax()
        wanted = {"is_safe": "true or false", "label": "1, 0, 'harmful' or 'harmless'"}[name]
        raise KitError(
            f"{source}, row {row}: {name} is {table[name].astype(object)[row]!r}, not {wanted}"
        )
    return meant.to_numpy(dtype=bool)
