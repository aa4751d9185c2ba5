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
