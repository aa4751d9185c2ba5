"""Lesson 00 in a real JupyterLab in a real browser: it runs, the slider moves the picture.

Needs playwright (`pip install playwright`) and a Chromium (Debian: `apt install chromium`); skips without them.
The screenshots stay in build/browser/.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
TOKEN = "layers-in-depth-test"
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with lesson 00, prepared at its SMOKE size."""
    nbformat = pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("lab")
    lesson = nbformat.read(ROOT / "notebooks" / "00_start_here.ipynb", as_version=4)
    for cell in lesson.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nSMOKE = True"
    nbformat.write(lesson, folder / "lesson.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(folder):
    """A JupyterLab server on a free port, with its own settings; yields its address."""
    pytest.importorskip("jupyterlab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = folder.parent / f"{folder.name}-home"
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
           "PYTHONPATH": str(ROOT), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
           "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = open(folder.parent / f"{folder.name}.log", "w+")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={folder}"],
        env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, server, log)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def _wait_for(address, server, log, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"JupyterLab did not start:\n{log.read()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab, folder):
    """A browser page with the lesson open."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1100})
        page.set_default_timeout(60_000)
        page.goto(f"{lab}/lab/tree/lesson.ipynb?token={TOKEN}")
        yield page
        browser.close()


def _shot(target, name):
    out = ROOT / "build" / "browser"
    out.mkdir(parents=True, exist_ok=True)
    return target.screenshot(path=out / f"{name}.png")


def _run_all(page, folder, seconds=280):
    """Run > Run All Cells, then save until every code cell of the saved file has run."""
    idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()      # before that, Run All is silently ignored
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        page.wait_for_timeout(2000)
        idle.wait_for(timeout=1000 * seconds)
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        code = [c for c in json.loads((folder / "lesson.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
        if all(c["execution_count"] for c in code):
            return code
    _shot(page, "not_finished")
    pytest.fail(f"{sum(not c['execution_count'] for c in code)} of {len(code)} cells had not run after {seconds} s.")


def test_the_lesson_runs_and_the_slider_moves_the_picture(page, folder):
    code = _run_all(page, folder)
    errors = [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert not errors, errors[0]["evalue"]
    picture = page.locator("img.depth-threshold")
    picture.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('img.depth-threshold').naturalWidth > 300")
    before = _shot(picture, "threshold_before")
    _shot(page, "page_before")
    text = page.locator(".widget-html, .jupyter-widget-html, .widget-html-content").first.inner_text()
    handle = page.locator(".noUi-handle, .ui-slider-handle").first
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 90, y, steps=8)
    page.mouse.up()
    page.wait_for_function(
        "old => document.querySelector('.widget-html-content').innerText !== old", arg=text, timeout=20_000)
    page.wait_for_timeout(600)
    after = _shot(picture, "threshold_after")
    _shot(page, "page_after")
    assert before != after
    assert "pixels are foreground" in page.locator(".widget-html-content").first.inner_text()
