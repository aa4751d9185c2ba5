"""Fixtures that several tests share."""
import pytest


@pytest.fixture(scope="session")
def make_pipe():
    """make_pipe(inpaint=False, seed=0): a random-weight Stable-Diffusion-shaped pipeline for 128x128 pictures."""
    from lib.train import tiny_pipeline
    return tiny_pipeline


@pytest.fixture(scope="session")
def tiny_pipe(make_pipe):
    """One shared random pipeline. Tests must leave it as they found it (that is what several of them check)."""
    return make_pipe()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """One JupyterLab for all browser tests (see tests/browser.py); skips without jupyterlab, playwright or Chromium."""
    import browser
    pytest.importorskip("jupyterlab")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    server = browser.Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


def pytest_collection_modifyitems(items):
    """nbval waits 5 s for a cell's outputs after its reply, and has no option for it: too short on a loaded machine."""
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = 60
