"""Lesson 00 in a real JupyterLab in a real browser: it runs, the slider moves the picture."""
import pytest
from browser import drag

pytestmark = pytest.mark.browser


def test_the_lesson_runs_and_the_slider_moves_the_picture(lab):
    with lab.lesson("00") as page:
        before, after = drag(page, "depth-threshold", slider=0, by=90)
    assert before != after and "pixels are foreground" in after
