"""Lesson 08 in a real JupyterLab in a real browser: sliders and pickers draw the injected picture anew."""
import pytest
from browser import choose, drag, panel, picture

pytestmark = pytest.mark.browser
PANEL = "injection-explorer"


def test_the_injection_explorer_follows_sliders_and_pickers(lab):
    with lab.lesson("08", STEPS=3) as page:
        picture(page, PANEL)
        assert panel(page, PANEL).locator("select").count() == 3
        _, weaker = drag(page, PANEL, slider=0, by=-150)                         # strength
        assert "K and V injected in 3 of 3 steps" in weaker and "RMSE: things" in weaker
        _, fewer = drag(page, PANEL, slider=1, by=150)                           # where the steps begin
        assert "of 3 steps" in fewer and "in 3 of 3" not in fewer
        _, chosen = choose(page, PANEL, "up blocks")
        _, values = choose(page, PANEL, "values only", dropdown=1)
        _, joined = choose(page, PANEL, "concat (own tokens stay)", dropdown=2)
        assert len({fewer, chosen, values, joined}) == 4
