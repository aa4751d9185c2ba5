"""Lesson 07 in a real JupyterLab in a real browser: its three widgets move their pictures."""
import pytest

from browser import choose, drag

pytestmark = pytest.mark.browser


def test_the_widgets_of_lesson_07(lab):
    with lab.lesson("07", seconds=500) as page:
        before, after = drag(page, "deglad-layers", slider=0, by=60)
        assert "of the picture is foreground" in after and before != after
        _, after = choose(page, "deglad-layers", "grey")
        assert "filled by grey" in after
        before, after = drag(page, "deglad-choose", slider=1, by=90)
        assert "depth under" in after and before != after
        _, after = choose(page, "deglad-spoil", "noise")
        assert "noise" in after
        before, after = drag(page, "deglad-spoil", slider=0, by=90)
        assert "IoU of the masks" in after and before != after
