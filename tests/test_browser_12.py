"""Lesson 12 in a real JupyterLab in a real browser: damage and the comparison of two methods follow their controls."""
import pytest

from browser import choose, drag, text

pytestmark = pytest.mark.browser


def test_the_widgets_of_lesson_12(lab):
    with lab.lesson("12", seconds=500, ROOMS=1) as page:
        before, after = drag(page, "damage-explorer", slider=0, by=90)
        assert "PSNR" in after and "feat_dist" in after and before != after
        _, after = choose(page, "damage-explorer", "shadow removed")
        assert "shading 0.000" in after and "order" in after
        before, after = choose(page, "pairs-explorer", "guide", dropdown=2)
        assert "guide - geometry" in after and before != after
        _, after = choose(page, "pairs-explorer", "feat_dist", dropdown=1)
        assert after.startswith("feat_dist, guide - geometry") and after == text(page, "pairs-explorer")
