"""What an experiment found, and how it was made."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from repnoise_kit.errors import KitError
from repnoise_kit.store import data_dir, written_whole


@dataclass(frozen=True)
class Result:
    """A tidy table and how it was made: analyses return one, plots take one."""

    frame: pd.DataFrame
    """One row a measurement. Agreed columns: testbed, model, defence, held, attack, lr, examples,
    step, layer, part, kind, task, group, category, metric, value, seed, prompt, split."""
    made_with: dict[str, Any] = field(default_factory=dict)
    """Arguments, seeds, versions, fingerprints of data and model, device."""

    def need(self, *columns: str) -> pd.DataFrame:
        """Return the table, or say which column it lacks."""
        return need(self.frame, *columns)

    def tagged(self, **columns: Any) -> "Result":
        """Return the same result with constant columns added in front, or replaced."""
        rest = self.frame.drop(columns=[name for name in columns if name in self.frame])
        front = pd.DataFrame(columns, index=rest.index)
        return Result(pd.concat([front, rest], axis=1), self.made_with)

    def save(self, path: Path | str) -> Path:
        """Write the table (.csv or .parquet) and, beside it, how it was made (.json)."""
        path = Path(path)
        if path.suffix not in (".csv", ".parquet"):
            raise KitError(f"{path.name}: a result is saved as .csv or .parquet")
        if path.is_dir():
            raise KitError(f"{path} is a folder; choose another name")
        # The table comes last: where one is, how it was made is there too.
        with written_whole(path.with_suffix(".json")) as fresh:
            fresh.write_text(json.dumps(self.made_with, indent=1, default=str) + "\n")
        with written_whole(path) as fresh:
            if path.suffix == ".csv":
                self.frame.to_csv(fresh, index=False)
            else:
                self.frame.to_parquet(fresh, index=False, compression="zstd")
        return path

    @classmethod
    def load(cls, path: Path | str) -> "Result":
        """Read what `save` wrote; a table without its .json has no `made_with`."""
        path = Path(path)
        if not path.exists():
            raise KitError(f"{path}: no such file")
        beside = path.with_suffix(".json")
        try:
            if path.suffix == ".csv":
                frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
                texts = [c for c in ("prompt", "response", "category", "note") if c in frame]
                for name in texts:  # One that is empty throughout was read as numbers.
                    empty = frame[name].isna()
                    frame[name] = "" if empty.all() else frame[name].fillna("")
            else:
                frame = pd.read_parquet(path)
            made_with = json.loads(beside.read_text()) if beside.exists() else {}
        except (OSError, ValueError) as error:
            raise KitError(f"{path} is not a result that `save` wrote; check the file") from error
        return cls(frame, made_with)

    @classmethod
    def committed(cls, name: str) -> "Result":
        """Read a table of the kit's own results, as `committed` finds it."""
        return cls.load(committed(name))

    def __str__(self) -> str:
        return self.frame.to_string(index=False, max_rows=20, float_format="{:.3f}".format)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.frame.to_html(index=False, max_rows=20, float_format="{:.3f}".format)


def committed(name: str) -> Path:
    """Return the path of a table of `data/results`, of the checkout or of the installed kit.

    Raises:
        KitError: there is no table of this name.
    """
    tables = {path.name: path for path in sorted((data_dir() / "results").glob("*.*"))}
    names = [name for name in tables if name.endswith((".csv", ".parquet"))]
    if name not in names:
        raise KitError(f"the kit has no results {name!r}; there are {', '.join(names)}")
    return tables[name]


def need(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return a table, or say which of these columns it lacks."""
    if missing := [name for name in columns if name not in frame]:
        raise KitError(f"the table has columns {list(frame.columns)}, but not {missing}")
    return frame


def stack(*results: Result) -> Result:
    """Put results under one another, to compare them."""
    if not results:
        raise KitError("there is nothing to stack; give at least one result")
    frames = pd.concat([result.frame for result in results], ignore_index=True)
    return Result(frames, {"stacked": [result.made_with for result in results]})
