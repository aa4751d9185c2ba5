"""Lesson 03 in a real JupyterLab in a real browser: its two panels follow their controls."""
import pytest
from browser import choose, drag

pytestmark = pytest.mark.browser


def test_the_panels_of_lesson_03_follow_their_controls(lab):
    with lab.lesson("03") as page:
        before, after = drag(page, "noise-schedules", slider=0, by=120)
        assert before != after and "alpha-bar" in after
        _, after = choose(page, "noise-schedules", "cosine")
        assert after.startswith("cosine")
        before, after = drag(page, "denoising-walk", slider=0, by=120)
        assert before != after and "away from the result" in after
