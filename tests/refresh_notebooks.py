"""Run notebooks in place and store small, clean outputs: `python tests/refresh_notebooks.py`.

Each begins with the same set-up cell, and with badges where the project has a public address.
"""

import sys
import time
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
MISSING = 'if not find_spec("repnoise_kit"):'
THEN = "import repnoise_kit as rk"
BESIDE = f"""\
from importlib.util import find_spec
from pathlib import Path

{MISSING}
    source = next(Path().glob("repnoise_kit-*.whl"), "..")
    %pip install -q {{source}}
{THEN}"""
PUBLIC = f"""\
from importlib.util import find_spec

{MISSING}
    %pip install -q "repnoise-kit @ git+{{address}}"
{THEN}"""
GITHUB = "https://github.com/"
BADGES = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}) "
    "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
    "(https://mybinder.org/v2/gh/{repository}/main?labpath=notebooks%2F{name})"
)


def public_address() -> str | None:
    """Return where the project is public, `Repository` in pyproject.toml, or None."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository")


def begin(book: nbformat.NotebookNode, name: str, address: str | None) -> nbformat.NotebookNode:
    """Put badges under the title and the set-up cell after it, in place of what was there.

    Without an address the cell installs a wheel that lies beside the notebook, or the clone that
    the notebook lies in, and there are no badges. Badges exist for GitHub only.
    """
    title, *rest = book.cells[0].source.split("\n\n")
    rest = [text for text in rest if not text.startswith("[![")]
    if address and address.startswith(GITHUB):
        repository = address.removeprefix(GITHUB).removesuffix(".git").strip("/")
        rest.insert(0, BADGES.format(repository=repository, name=name))
    book.cells[0].source = "\n\n".join([title, *rest])
    if MISSING not in book.cells[1].source:
        book.cells.insert(1, nbformat.v4.new_code_cell(execution_count=1))
    book.cells[1].source = PUBLIC.format(address=address) if address else BESIDE
    return book


def clean(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop what differs from run to run: timings, widget state, ids, the kernel's version."""
    book.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for place, cell in enumerate(book.cells):
        cell["id"] = f"cell-{place:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return book


def refresh(path: Path) -> None:
    """Run one notebook where it lies and write it back."""
    start = time.time()
    book = begin(nbformat.read(path, 4), path.name, public_address())
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(
        book, timeout=600, kernel_name="python3", record_timing=False, resources=where
    ).execute()
    nbformat.write(clean(book), path)
    print(f"{path.name}: {time.time() - start:.0f} s, {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for notebook in chosen:
        refresh(notebook)
