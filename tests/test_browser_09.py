"""Lesson 09 in a real JupyterLab in a real browser: both journeys through depth follow their slider and their choice."""
import pytest
from browser import choose, drag

pytestmark = pytest.mark.browser


def test_the_journeys_of_lesson_09(lab):
    with lab.lesson("09", seconds=500) as page:
        before, after = drag(page, "depth-journey", by=-220)
        assert before != after and "of the object is hidden" in after
        _, after = choose(page, "depth-journey", "truth")
        assert after.startswith("truth at")
        before, after = drag(page, "scene-journey", by=-220)
        assert before != after and "of the picture is scene A" in after
        _, after = choose(page, "scene-journey", "alpha")
        assert after.startswith("alpha at")
