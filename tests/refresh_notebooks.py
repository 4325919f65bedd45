"""Run notebooks in place and store small, clean outputs: `python tests/refresh_notebooks.py`."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
FOLDER = Path(__file__).parents[1] / "notebooks"


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
    book = nbformat.read(path, 4)
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
