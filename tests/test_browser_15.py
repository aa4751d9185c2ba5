"""Lesson 15 in a real JupyterLab in a real browser: both panels follow their sliders and dropdowns."""
import pytest
from browser import choose, drag

from lib.widgets_15 import PLANS

pytestmark = pytest.mark.browser


def test_both_panels_follow_sliders_and_dropdowns(lab):
    with lab.lesson("15", PROCESS="tint") as page:
        before, after = drag(page, "gpu-budget", slider=0, by=90)
        assert before != after and "passes" in after
        _, after = choose(page, "gpu-budget", "A100")
        assert "of the A100's" in after
        before, after = drag(page, "hand-out", slider=0, by=60)
        assert before != after and "shards" in after
        _, after = choose(page, "hand-out", PLANS[2])
        assert PLANS[2] in after
