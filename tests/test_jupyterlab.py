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
from contextlib import contextmanager
from pathlib import Path

import pytest

from repnoise_kit.store import cache_dir

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
    """A JupyterLab with a token, over a copy of the notebooks; studies of its own."""
    room = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", room / "root" / "notebooks")
    (room / "cache").mkdir()
    for name in ("lab", "grid"):  # What takes long to make is shared.
        cache_dir().joinpath(name).mkdir(parents=True, exist_ok=True)
        (room / "cache" / name).symlink_to(cache_dir().absolute() / name)
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
        "REPNOISE_CACHE": str(room / "cache"),
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
    with _opened(jupyter, name, tmp_path) as page:
        before = page.evaluate(f"() => {CELLS}.map({COUNT})")
        _run_all(page)
        # As many figures in each cell as the committed notebook shows.
        assert page.evaluate(f"() => {CELLS}.map({COUNT})") == before
        assert sum(before) >= 1
        figure = page.locator(".jp-Notebook img").last
        figure.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        assert figure.bounding_box()["width"] > 200


def test_the_panel_is_used_as_a_person_would(jupyter, tmp_path):
    """Look, run, stop, start the kernel again, find both trials, and finish the one stopped."""
    with _opened(jupyter, "10_sweep.ipynb", tmp_path) as page:
        _run_all(page)
        panel = _Panel(page)
        before = panel.drawn()
        panel.press("learning rate", "ArrowLeft", 20)
        panel.redrawn(before)

        panel.judge_by("0.0003 × 64", "100")
        panel.press("pairs", "Home")
        panel.button("Run").click()
        panel.says(r"trial 0, ")
        page.screenshot(path=_shots(tmp_path) / "10_sweep_runs.png")
        panel.says(r"1 finished|1 given up")
        assert panel.button("Stop").is_disabled()
        first = panel.drawn()

        panel.press("alpha", "ArrowRight", 3)
        panel.press("pairs", "End")
        panel.button("Run").click()
        panel.says(r"trial 1, ")
        panel.button("Stop").click()
        panel.says(r"stopped; Run goes on with it.*1 waiting")

        _restart(page)
        panel = _Panel(page)
        panel.judge_by("0.0003 × 64", "100")
        panel.says(r"1 (finished|given up).*1 stopped.*1 waiting|1 stopped.*1 waiting")
        page.screenshot(path=_shots(tmp_path) / "10_sweep_again.png")
        panel.choose("trial", "1: stopped")
        panel.button("Run").click()
        panel.says(
            r"2 finished|2 given up|1 finished, 1 given up|1 finished, 1 stopped, 1 given up"
        )
        assert panel.drawn() != first


class _Panel:
    """The panel as a person finds its parts: by their words."""

    def __init__(self, page):
        self.page = page
        self.box = page.locator(".jp-OutputArea-output .widget-vbox").first
        self.box.scroll_into_view_if_needed()

    def drawn(self):
        return self.page.locator("img.widget-image").first.get_attribute("src")

    def redrawn(self, before):
        self.page.wait_for_function(
            "before => document.querySelector('img.widget-image').src !== before", arg=before
        )

    def part(self, words):
        named = self.page.locator(".widget-inline-hbox", has_text=re.compile(f"^{words}"))
        return named.first

    def press(self, words, key, times=1):
        handle = self.part(words).locator(".noUi-handle")
        handle.focus()
        for _ in range(times):
            handle.press(key)

    def choose(self, words, starts_with):
        menu = self.part(words).locator("select")
        words = starts_with.replace(" ", r"\s")  # The page has spaces that do not break.
        found = menu.locator("option", has_text=re.compile(f"^{words}")).first
        menu.select_option(found.get_attribute("value"))

    def judge_by(self, attack, seeds):
        """Choose one attack and these seeds, as the study's own."""
        self.part("attacks").locator("select").select_option(label=attack)
        text = self.part("seeds").locator("input")
        text.fill(seeds)
        text.press("Enter")
        text.press("Tab")

    def button(self, words):
        return self.page.locator("button.jupyter-button", has_text=re.compile(f"^{words}$"))

    def says(self, pattern):
        from playwright.sync_api import expect

        expect(self.box).to_contain_text(re.compile(pattern), timeout=180_000)


@contextmanager
def _opened(jupyter, name, tmp_path):
    """Open a notebook in a fresh browser, and leave a picture of how it ended."""
    from playwright.sync_api import sync_playwright

    address, token = jupyter
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(60_000)
        try:
            page.goto(f"{address}/lab/tree/notebooks/{name}?token={token}&reset")
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
            # "Run All" before the status bar says so would ask for a kernel in a dialog.
            page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for()
            yield page
        finally:
            page.screenshot(path=_shots(tmp_path) / f"{Path(name).stem}.png")
            browser.close()


def _shots(tmp_path):
    return Path(os.environ.get("REPNOISE_SHOTS", tmp_path))


def _run_all(page):
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
    _finished(page)


def _restart(page):
    """Start the kernel again and run all cells, as the menu does it, with its question."""
    page.evaluate("() => window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:restart-run-all') }")
    page.locator(".jp-Dialog button.jp-mod-accept").click()
    _finished(page)


def _finished(page):
    page.wait_for_function(FINISHED, timeout=400_000)
    errors = page.evaluate(
        f"() => {CELLS}.flatMap(c => c.outputs.filter(o => o.output_type === 'error')"
        ".map(o => `${o.ename}: ${o.evalue}`))"
    )
    assert not errors


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
