"""A real JupyterLab in a real browser, for tests of the lessons' widgets.

    def test_x(lab):                                   # one server for all browser tests (tests/conftest.py)
        with lab.lesson("01") as page:                 # opened, run top to bottom at its SMOKE size, without an error
            drag(page, "latent-cells", slider=0, by=90)        # a slider of the panel whose picture has this class

Needs playwright (`pip install playwright`) and a Chromium (Debian: `apt install chromium`); the tests skip without
them. The screenshots stay in build/browser/.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
TOKEN = "layers-in-depth-test"


class Lab:
    """A JupyterLab server on a free port, with its own settings, and one browser."""

    def __init__(self, folder):
        self.folder, home = folder / "work", folder / "home"
        self.folder.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
               "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
               "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
        quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        quiet.parent.mkdir(parents=True)
        quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        self.log = open(folder / "server.log", "w+")
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={self.folder}"],
            env=env, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder)
        self._wait()

    def _wait(self, seconds=90):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.server.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/api?token={TOKEN}", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        self.log.seek(0)
        pytest.fail(f"JupyterLab did not start:\n{self.log.read()[-2000:]}")

    def close(self):
        self.server.terminate()
        try:
            self.server.wait(20)
        except subprocess.TimeoutExpired:
            self.server.kill()
        self.log.close()

    @contextmanager
    def lesson(self, number, seconds=280, **parameters):
        """The page of a lesson that has run from top to bottom with SMOKE (and other parameters), without an error."""
        import nbformat
        from playwright.sync_api import sync_playwright
        (source,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        notebook = nbformat.read(source, as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                given = {"SMOKE": True, **parameters}
                cell.source += "".join(f"\n{name} = {value!r}" for name, value in given.items())
        path = self.folder / source.name
        nbformat.write(notebook, path)
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1400, "height": 1100})
            page.set_default_timeout(60_000)
            page.goto(f"{self.address}/lab/tree/{path.name}?token={TOKEN}&reset")
            errors = [o for c in _run_all(page, path, seconds) for o in c["outputs"] if o["output_type"] == "error"]
            assert not errors, errors[0]["evalue"]
            yield page
            browser.close()
        kernels = f"{self.address}/api/sessions?token={TOKEN}"
        with urllib.request.urlopen(kernels) as answer:                # the kernel's memory is wanted by the next one
            for session in json.load(answer):
                urllib.request.urlopen(urllib.request.Request(
                    f"{self.address}/api/sessions/{session['id']}?token={TOKEN}", method="DELETE"))


def _run_all(page, path, seconds):
    """Run > Run All Cells, then save until every code cell of the saved file has run."""
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()         # before that, Run All is silently ignored
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(2000)
        idle.wait_for(timeout=1000 * seconds)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        if all(c["execution_count"] for c in code):
            return code
    shot(page, f"{path.stem}_not_finished")
    pytest.fail(f"{sum(not c['execution_count'] for c in code)} of {len(code)} cells had not run after {seconds} s.")


def shot(target, name):
    """A screenshot of a page or an element, as bytes and as build/browser/<name>.png."""
    out = ROOT / "build" / "browser"
    out.mkdir(parents=True, exist_ok=True)
    return target.screenshot(path=out / f"{name}.png")


def picture(page, css_class):
    """The picture of a panel, scrolled into view and loaded."""
    found = page.locator(f"img.{css_class}")
    found.scroll_into_view_if_needed()
    page.wait_for_function(f"() => document.querySelector('img.{css_class}').naturalWidth > 100")
    return found


def panel(page, css_class):
    """The box of a panel: its controls, its text and its picture."""
    return page.locator(".widget-vbox, .jupyter-widget-vbox").filter(has=page.locator(f"img.{css_class}")).last


def text(page, css_class):
    """The line of text of a panel, now."""
    return panel(page, css_class).locator(".widget-html-content").first.inner_text()


def drag(page, css_class, slider=0, by=90):
    """Drag one of a panel's sliders by so many pixels; the picture must change. Returns its text before and after."""
    seen, before = picture(page, css_class), text(page, css_class)
    old, name = shot(seen, f"{css_class}_before"), f"{css_class}_after"
    handle = panel(page, css_class).locator(".noUi-handle, .ui-slider-handle").nth(slider)
    handle.scroll_into_view_if_needed()                                # a panel may be taller than the window
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=8)
    page.mouse.up()
    return before, changed(page, css_class, old, name)


def choose(page, css_class, option, dropdown=0):
    """Choose an option of one of a panel's dropdowns; the picture must change. Returns its text before and after."""
    seen, before = picture(page, css_class), text(page, css_class)
    old = shot(seen, f"{css_class}_before")
    panel(page, css_class).locator("select").nth(dropdown).select_option(option)
    return before, changed(page, css_class, old, f"{css_class}_{option}".replace(" ", "_"))


def changed(page, css_class, old, name, seconds=30):
    """Wait until the picture differs from `old` and holds still; its screenshot is kept. Returns the text."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        page.wait_for_timeout(500)
        now = shot(picture(page, css_class), name)
        if now != old and now == last:
            shot(page, f"{name}_page")
            return text(page, css_class)
        last = now
    pytest.fail(f"The picture of {css_class} did not change within {seconds} s.")
