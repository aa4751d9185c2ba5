"""Lesson 14 in a real JupyterLab in a real browser: the planner follows its sliders and its dropdown."""
import pytest
from browser import choose, drag

from lib.widgets_14 import WAYS

pytestmark = pytest.mark.browser


def test_the_planner_follows_sliders_and_dropdown(lab):
    with lab.lesson("14", STEPS=1) as page:
        before, after = drag(page, "batch-planner", slider=1, by=90)
        assert before != after and "sessions" in after
        _, after = choose(page, "batch-planner", WAYS[2])
        assert "2.00 times as fast as one device" in after
