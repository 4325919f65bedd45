"""The notebooks as they lie in the repository: numbered, short, clean, run top to bottom."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
HEADINGS = ("What should happen", "Run", "Look", "Check", "The paper", "What this does not show")
TAGS = {"nbval-ignore-output"}


def code_of(book):
    return [c for c in book.cells if c.cell_type == "code" and c.source.strip()]


@pytest.fixture(params=BOOKS, ids=[path.stem for path in BOOKS])
def book(request):
    return nbformat.read(request.param, 4)


def test_there_are_notebooks_and_they_are_numbered():
    assert [path.stem[:3] for path in BOOKS][:2] == ["01_", "02_"]
    assert all(re.fullmatch(r"\d\d_[a-z]+(_[a-z]+)*", path.stem) for path in BOOKS)


def test_has_the_agreed_shape(book):
    text = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    places = [text.find(f"## {heading}") for heading in HEADINGS]
    assert -1 not in places, HEADINGS[places.index(-1)]
    assert places == sorted(places)
    assert text.startswith("# ")


def test_is_short_and_defines_nothing(book):
    cells = code_of(book)
    lines = [len([line for line in c.source.splitlines() if line]) for c in cells]
    assert max(lines) <= 15
    assert sum(lines) <= 90
    for cell in cells:
        source = re.sub(r"^\s*%.*$", "", cell.source, flags=re.M)
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef}


def test_carries_its_claims_in_asserts_that_nbval_compares(book):
    checks = [c for c in code_of(book) if "assert " in c.source]
    assert checks
    assert all("tags" not in c.metadata for c in checks)


def test_the_lab_may_be_built_in_it_which_shows_a_bar(book):
    building = [c for c in code_of(book) if "rk.lab(" in c.source]
    assert all(c.metadata.get("tags") == ["nbval-ignore-output"] for c in building)


def test_was_run_once_from_top_to_bottom_and_is_clean(book):
    assert book.metadata == {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    cells = code_of(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            assert "image/svg+xml" not in output.get("data", {})


def test_shows_its_figures(book):
    shown = [cell for cell in code_of(book) if "plot_" in cell.source]
    assert shown
    for cell in shown:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])
def test_is_light(path):
    assert path.stat().st_size < 1_000_000
