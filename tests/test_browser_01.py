"""Lesson 01 in a real JupyterLab in a real browser: it runs, and the cell editor changes the picture."""
import pytest
from browser import choose, drag

pytestmark = pytest.mark.browser


def test_the_cell_editor_moves_cells_and_whole_channels(lab):
    with lab.lesson("01") as page:
        before, after = drag(page, "latent-cells", slider=3, by=-150)          # the amount
        assert before != after and "of channel 0 changed by -" in after
        before, after = drag(page, "latent-cells", slider=1, by=120)           # x: another cell
        assert before != after and "cell (" in after
        _, after = choose(page, "latent-cells", "whole channel")
        assert "all of channel 0" in after
