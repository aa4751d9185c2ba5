"""Lesson 02 in a real JupyterLab in a real browser: sliders, choices and clicks move the explorer."""
import pytest
from browser import changed, choose, panel, picture, shot, text

pytestmark = pytest.mark.browser
PANEL = "attention-explorer"


def drag_x(page, by):
    """Drag the first slider. The panel is tall: with its picture in view it is not, so scroll to it."""
    old = shot(picture(page, PANEL), f"{PANEL}_before")
    handle = panel(page, PANEL).locator(".noUi-handle, .ui-slider-handle").first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + by, y, steps=4)
    page.mouse.up()
    return changed(page, PANEL, old, f"{PANEL}_after")


def test_the_attention_explorer_follows_sliders_dropdowns_and_clicks(lab):
    with lab.lesson("02", TOKENS=512, STEPS=2) as page:
        picture(page, PANEL)
        before = text(page, PANEL)
        after = drag_x(page, by=-90)
        assert before != after and "of its attention" in after
        _, after = choose(page, PANEL, "1: down, 16 x 16")
        assert after.startswith("layer 1 of 10")
        _, after = choose(page, PANEL, "all layers, heads averaged", dropdown=2)
        old = shot(picture(page, PANEL), f"{PANEL}_unclicked")
        clickable = page.locator(".click-picture").first
        clickable.scroll_into_view_if_needed()
        box = clickable.bounding_box()
        page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.9 * box["height"])
        clicked = changed(page, PANEL, old, f"{PANEL}_clicked")
        assert clicked != after and f"token {14 * 16 + 12}" in clicked      # row 14, column 12 of 16 x 16
        assert text(page, PANEL) == clicked
