"""Lesson 04 in a real JupyterLab in a real browser: its three widgets move their pictures."""
import pytest

from browser import choose, drag, text

pytestmark = pytest.mark.browser


def test_the_widgets_of_lesson_04(lab):
    with lab.lesson("04", seconds=500) as page:
        before, after = drag(page, "mask-explorer", slider=0, by=90)
        assert "pixels to fill" in after and before != after
        _, after = choose(page, "mask-explorer", "centre box")
        assert "centre box" in after
        before, after = drag(page, "repaint-walk", slider=1, by=60)
        assert "passes through the network" in after and before != after
        before, after = choose(page, "results-explorer", "telea", dropdown=1)
        assert "telea" in after and "telea" not in before and "seam" in text(page, "results-explorer")
