"""The notebooks in a real JupyterLab, in a real (headless) browser, as a reader would run them."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
IN_CI = "01_quickstart.ipynb"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# The notebook's own model is asked, not the page: cells that scroll away leave the page.
CELLS = """window.jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells
    .filter(c => c.cell_type === 'code' && c.source.toString().trim())"""
COUNT = "c => c.outputs.filter(o => o.data && 'image/png' in o.data).length"
FINISHED = f"""() => {{
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel;
    const cells = {CELLS};
    return kernel?.status === 'idle' && (cells.every(c => c.execution_count)
        || cells.some(c => c.outputs.some(o => o.output_type === 'error'))); }}"""


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """A JupyterLab with a token, over a copy of the notebooks and of the data they read."""
    room = tmp_path_factory.mktemp("jupyter")
    for name in ("notebooks", "data"):
        shutil.copytree(ROOT / name, room / "root" / name)
    quiet = room / "settings" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"} | {
        "JUPYTER_CONFIG_DIR": str(room / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(room / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(room / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(room / "runtime"),
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--allow-root"),
        *(f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"),
        *(f"--ServerApp.root_dir={room / 'root'}", "--LabApp.expose_app_in_browser=True"),
    ]
    with (room / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(f"{address}/api?token={token}", server, room / "log")
        yield address, token
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.mark.parametrize(
    "name",
    [name if name == IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in BOOKS],
)
def test_runs_in_the_browser_and_shows_its_figures(jupyter, name, tmp_path):
    from playwright.sync_api import sync_playwright

    address, token = jupyter
    shots = Path(os.environ.get("REPNOISE_SHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(60_000)
        try:
            page.goto(f"{address}/lab/tree/notebooks/{name}?token={token}&reset")
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
            # "Run All" before the status bar says so would ask for a kernel in a dialog.
            page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for()
            before = page.evaluate(f"() => {CELLS}.map({COUNT})")
            page.evaluate(
                "() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')"
            )
            page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
            page.wait_for_function(FINISHED, timeout=400_000)
            errors = page.evaluate(
                f"() => {CELLS}.flatMap(c => c.outputs.filter(o => o.output_type === 'error')"
                ".map(o => `${o.ename}: ${o.evalue}`))"
            )
            assert not errors
            # As many figures in each cell as the committed notebook shows.
            assert page.evaluate(f"() => {CELLS}.map({COUNT})") == before
            assert sum(before) >= 1
            figure = page.locator(".jp-Notebook img").last
            figure.scroll_into_view_if_needed()
            page.wait_for_timeout(500)
            assert figure.bounding_box()["width"] > 200
        finally:
            page.screenshot(path=shots / f"{Path(name).stem}.png")
            browser.close()


def _wait(url, server, log):
    end = time.time() + 90
    while time.time() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()}")
