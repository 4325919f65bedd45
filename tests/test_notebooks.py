"""The notebooks as they lie in the repository: numbered, short, clean, run top to bottom."""

import ast
import copy
import re
from pathlib import Path

import nbformat
import pytest
from refresh_notebooks import begin, public_address

FOLDER = Path(__file__).parents[1] / "notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
HEADINGS = ("What should happen", "Run", "Look", "Check", "The paper", "What this does not show")
TAGS = {"nbval-ignore-output"}


def code_of(book):
    return [c for c in book.cells if c.cell_type == "code" and c.source.strip()]


def tree_of(cell):
    return ast.parse(re.sub(r"^( *)%.*$", r"\1pass", cell.source, flags=re.M))


def texts_in(tree):
    """All literal texts, those in f-strings too."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {node.value for node in found if isinstance(node.value, str)}


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
    assert lines[0] <= 6  # the set-up
    assert sum(lines[1:]) <= 90
    for cell in cells:
        kinds = {type(node) for node in ast.walk(tree_of(cell))}
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
    drawing = ("plot_", "rk.draw(")
    shown = [cell for cell in code_of(book) if any(word in cell.source for word in drawing)]
    assert shown
    for cell in shown:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


@pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])
def test_begins_as_the_project_says(path):
    book = nbformat.read(path, 4)
    assert begin(copy.deepcopy(book), path.name, public_address()) == book
    assert [c.cell_type for c in book.cells[:2]] == ["markdown", "code"]
    assert "%pip" in book.cells[1].source
    assert ["import repnoise_kit" in c.source for c in code_of(book)].count(True) == 1


@pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])
def test_with_an_address_it_begins_with_badges_that_lead_to_it(path):
    book, there = nbformat.read(path, 4), "https://github.com/somebody/some-kit"
    public = begin(copy.deepcopy(book), path.name, there)
    title, badges = public.cells[0].source.split("\n\n")[:2]
    assert title == book.cells[0].source.split("\n\n")[0]
    colab, binder = re.findall(r"\)\]\((\S+?)\)", badges)
    main = f"somebody/some-kit/blob/main/notebooks/{path.name}"
    assert colab == f"https://colab.research.google.com/github/{main}"
    assert binder.startswith("https://mybinder.org/v2/gh/somebody/some-kit/main?labpath=")
    assert binder.endswith(f"=notebooks%2F{path.name}")
    assert f"repnoise-kit @ git+{there}" in public.cells[1].source
    assert public.cells[2:] == book.cells[2:]
    assert begin(copy.deepcopy(public), path.name, there) == public
    assert begin(public, path.name, None) == begin(book, path.name, None)


def test_the_set_up_is_put_in_where_there_is_none():
    bare = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# T"), nbformat.v4.new_code_cell("1 + 1")]
    )
    begun = begin(bare, "t.ipynb", None)
    assert ["%pip" in cell.source for cell in begun.cells] == [False, True, False]
    assert begun.cells[0].source == "# T"


@pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])
def test_reads_no_file_of_its_surroundings(path):
    own = {"pairs.jsonl", "/defended", "README.md"} if path.stem == "11_your_model" else set()
    for cell in code_of(nbformat.read(path, 4))[1:]:
        of_kit = r"rk\.(?:Result\.)?committed\(\"([\w.]+)\"\)"
        committed = set(re.findall(of_kit, cell.source))
        texts = texts_in(tree_of(cell)) - committed
        assert {text for text in texts if "/" in text or re.search(r"\.[a-z]+$", text)} <= own
        assert "Result.load" not in cell.source


@pytest.mark.parametrize("path", BOOKS, ids=[path.stem for path in BOOKS])
def test_is_light(path):
    assert path.stat().st_size < 1_000_000
