"""Lesson 06 in a real JupyterLab in a real browser: the probe follows sliders, dropdown and clicks; the cloud turns."""
import browser
import pytest
from browser import changed, choose, drag, panel, picture, shot, text

pytestmark = pytest.mark.browser
PANEL = "depth-probe"


def test_the_probe_and_the_cloud(lab, monkeypatch):
    monkeypatch.setattr(browser, "FLAGS", [*browser.FLAGS, "--enable-unsafe-swiftshader", "--use-angle=swiftshader"])
    with lab.lesson("06", ROOMS=4, PHOTOS="") as page:
        before, after = drag(page, PANEL, slider=0, by=60)
        assert " m, inverse depth" in after and before != after
        _, trapped = choose(page, PANEL, "raw output < d (the trap)")
        assert "raw output <" in trapped and trapped != after
        old = shot(picture(page, PANEL), f"{PANEL}_unclicked")
        clickable = page.locator(".click-picture").first
        clickable.scroll_into_view_if_needed()
        box = clickable.bounding_box()
        page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 0.9 * box["height"])
        assert "row 115, column 25" in changed(page, PANEL, old, f"{PANEL}_clicked")
        assert panel(page, PANEL).count() == 1 and text(page, PANEL)
        _turn_the_cloud(page)


def _turn_the_cloud(page):
    """The 3-D view is drawn by JupyterLab from plotly's own format; dragging turns it, a button changes the cloud."""
    plot = page.locator(".js-plotly-plot").first
    plot.scroll_into_view_if_needed()
    page.wait_for_timeout(2000)
    views = [shot(plot, "cloud")]
    box = plot.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y + 20, steps=6)
    page.mouse.up()
    page.wait_for_timeout(1000)
    views.append(shot(plot, "cloud_turned"))
    plot.locator(".updatemenu-button").nth(1).click()
    page.wait_for_timeout(1000)
    views.append(shot(plot, "cloud_estimate"))
    assert len(set(views)) == 3, "the view did not change"
