"""The notebooks in a folder of the user's own, and JupyterLab over it."""

import subprocess
import sys
from pathlib import Path

from repnoise_kit.errors import KitError
from repnoise_kit.store import check_writable, written_whole


def notebooks_dir() -> Path:
    """Return the folder of the kit's notebooks: the checkout's, or the copy in a wheel."""
    package = Path(__file__).parent
    # A folder of this name in site-packages would be somebody else's.
    in_checkout = (package.parent / "pyproject.toml").is_file()
    return package.parent / "notebooks" if in_checkout else package / "_notebooks"


def copy_notebooks(folder: Path | str) -> list[Path]:
    """Copy the notebooks into a folder and return those of it that are the kit's now.

    One that is there already and differs is kept, and a printed line says so.

    Raises:
        KitError: the folder is a file or cannot be written to.
    """
    folder = Path(folder)
    check_writable(folder)
    copied = []
    for ours in sorted(notebooks_dir().glob("*.ipynb")):
        target = folder / ours.name
        if not target.exists():
            with written_whole(target) as fresh:
                fresh.write_bytes(ours.read_bytes())
        elif not target.is_file() or target.read_bytes() != ours.read_bytes():
            print(f"{target} is not the kit's and is kept; rename or remove it to get the kit's")
            continue
        copied.append(target)
    return copied


def open_notebooks(folder: Path | str, *, browser: bool = True) -> None:
    """Run JupyterLab over a folder until it is stopped.

    Raises:
        KitError: JupyterLab did not start, or ended with an error.
    """
    words = [sys.executable, "-m", "jupyterlab", str(folder), "-y"]
    server = subprocess.Popen(words if browser else [*words, "--no-browser"])
    try:
        code = server.wait()
    finally:
        server.terminate()
        server.wait()
    if code:
        raise KitError(
            f"JupyterLab ended with code {code}; try `{Path(sys.executable).name} -m jupyterlab "
            f"{folder}` and the options it asks for"
        )
