"""Near-duplicates: the same question in other words, on both sides of a split."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import csgraph

from repnoise_kit.errors import KitError, check_numbers

SHINGLE = 3
_WORDS = re.compile(r"[^\W_]+")
_CELLS = 4_000_000


def near_duplicates(
    one: Sequence[str], other: Sequence[str], threshold: float = 0.8
) -> pd.DataFrame:
    """Return every pair of texts, one from each list, that are nearly the same: all, and exactly.

    Their likeness is Jaccard's: of the three-word shingles (Broder 1997) that either text has, the
    part that both have. Case does not count, and punctuation is as good as a space; of a text with
    fewer than three words its words are compared. Texts that differ in nothing else have
    likeness 1.

    Args:
        one: Texts.
        other: Texts.
        threshold: The least likeness, above 0 and at most 1.

    Returns:
        Columns `one`, `other` (places in the lists, from 0) and `likeness`, in the order of places.

    Raises:
        KitError: an entry is not a text, or the threshold is out of range.
    """
    check_numbers(above_zero=True, threshold=threshold)
    if threshold > 1:
        raise KitError(f"threshold must be at most 1, not {threshold!r}")
    ours, theirs = _counted(_shingles(one, "one"), _shingles(other, "other"))
    our_sizes, their_sizes = (np.diff(held.indptr) for held in (ours, theirs))
    by_shingle = theirs.T.tocsr()
    step = max(1, _CELLS // max(1, theirs.shape[0]))
    found = []
    for first in range(0, ours.shape[0], step):
        shared = (ours[first : first + step] @ by_shingle).tocoo()
        row = shared.row + first
        likeness = shared.data / (our_sizes[row] + their_sizes[shared.col] - shared.data)
        near = likeness >= threshold
        columns = {"one": row, "other": shared.col, "likeness": likeness}
        found.append(pd.DataFrame({name: values[near] for name, values in columns.items()}))
    kinds = {"one": "int64", "other": "int64", "likeness": "float64"}
    table = pd.concat(found) if found else pd.DataFrame(columns=list(kinds))
    return table.astype(kinds).sort_values(["one", "other"], ignore_index=True)


def one_thing(texts: Sequence[str], threshold: float = 0.8) -> list[str]:
    """Return for each text the first of those that it is nearly the same as, over others or not.

    So texts get one name where a chain of near-duplicates joins them.
    """
    unique = list(dict.fromkeys(texts))
    near = near_duplicates(unique, unique, threshold)
    edges = (np.ones(len(near)), (near["one"].to_numpy(), near["other"].to_numpy()))
    graph = sparse.coo_matrix(edges, shape=(len(unique), len(unique)))
    company = csgraph.connected_components(graph, directed=False)[1]
    first: dict[int, str] = {}
    for number, text in zip(company, unique, strict=True):
        first.setdefault(number, text)
    name = {text: first[number] for text, number in zip(unique, company, strict=True)}
    return [name[text] for text in texts]


def check_no_near_duplicates(
    one: Sequence[str], other: Sequence[str], here: str, there: str, threshold: float = 0.8
) -> None:
    """Refuse two lists of texts that hold near-duplicates of one another.

    Args:
        one: Texts.
        other: Texts.
        here: What the first list is called.
        there: What the second list is called.
        threshold: The least likeness, as in `near_duplicates`.

    Raises:
        KitError: how many there are, the first, and what to do.
    """
    found = near_duplicates(one, other, threshold)
    if len(found):
        place, twin, likeness = found.iloc[0]
        place, twin = int(place), int(twin)
        raise KitError(
            f"{found['one'].nunique()} texts of {here} are nearly the same as texts of {there} "
            f"(likeness {threshold} or more; first: place {place}, {list(one)[place]!r}, and place "
            f"{twin}, {list(other)[twin]!r}, {likeness:.2f}); remove them from one of the two"
        )


def _shingles(texts: Sequence[str], name: str) -> list[set[tuple[str, ...]]]:
    if isinstance(texts, str):
        raise KitError(f"{name} is a text; give a list of texts")
    found = []
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise KitError(f"{name}, place {place}: {text!r} is not a text; remove it")
        words = _WORDS.findall(unicodedata.normalize("NFKC", text).lower())
        size = SHINGLE if len(words) >= SHINGLE else 1
        # A text without a word is like another one without: both hold the empty shingle.
        runs = zip(*(words[start:] for start in range(size)), strict=False)
        found.append(set(runs) if words else {()})
    return found


def _counted(*lists: list[set[tuple[str, ...]]]) -> list[sparse.csr_matrix]:
    """Return for each list a table of 0 and 1, (texts, shingles of all lists)."""
    number: dict[tuple[str, ...], int] = {}
    rows = [
        [[number.setdefault(run, len(number)) for run in held] for held in texts] for texts in lists
    ]
    tables = []
    for texts in rows:
        places = np.fromiter(chain.from_iterable(texts), dtype=np.int64)
        ends = np.cumsum([0, *map(len, texts)])
        ones = np.ones(len(places), dtype=np.int32)
        tables.append(sparse.csr_matrix((ones, places, ends), shape=(len(texts), len(number))))
    return tables
