"""The widgets' callbacks at minimum, default and maximum; the shells move with their sliders."""
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lib import show, widgets


@pytest.fixture
def pair():
    """A picture (1, 3, 32, 40) and a ramp of depth from 0 (left) to 1 (right)."""
    image = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    return image, torch.linspace(0, 1, 40).view(1, 1, 1, 40).expand(1, 1, 32, 40).clone()


@pytest.mark.parametrize("at, share", [(0.0, 0.0), (0.5, 0.5), (1.0, 39 / 40)])
def test_layers_at_min_default_max(pair, at, share):
    image, depth = pair
    foreground, background, mask = widgets.threshold_layers(image, depth, at)
    assert mask.mean() == pytest.approx(share)
    assert torch.equal(foreground[:, 3:] + background[:, 3:], torch.ones_like(mask))
    rebuilt = foreground[:, :3] * foreground[:, 3:] + background[:, :3] * background[:, 3:]
    assert torch.equal(rebuilt, image)


@pytest.mark.parametrize("at", (0.0, 0.5, 1.0))
def test_view_at_min_default_max(pair, at):
    view = widgets.threshold_view(*pair, at)
    array = np.asarray(view)
    assert view.width > 4 * 40 and array.std() > 10
    other = np.asarray(widgets.threshold_view(*pair, 0.25))
    assert array.shape == other.shape and not np.array_equal(array, other)


def test_view_shows_what_the_layers_hold(pair):
    """The third picture is the foreground on a checkerboard, enlarged by whole numbers, pixel for pixel."""
    image, depth = pair
    foreground, _, _ = widgets.threshold_layers(image, depth, 0.5)
    scale = 200 // 32
    wanted = show.to_uint8(show.over(foreground)).repeat(scale, 0).repeat(scale, 1)
    array = np.asarray(widgets.threshold_view(image, depth, 0.5).convert("RGB"))
    left = 8 + 2 * (40 * scale + 8)
    assert np.array_equal(array[-8 - 32 * scale:-8, left:left + 40 * scale], wanted)


def test_text_counts_pixels_and_metres(pair):
    assert "640 of 1,280 pixels are foreground (50%)" in widgets.threshold_text(pair[1], 0.5)
    from lib.depth import DepthMap
    metric = DepthMap(pair[1], kind="metric", near=1.0, far=8.0)
    assert "d = 0.50 = 4.50 m" in widgets.threshold_text(metric, 0.5)
    assert widgets.threshold_view(pair[0], metric, 0.5).width > 0


def test_bad_input_gives_one_clear_error(pair):
    image, depth = pair
    with pytest.raises(ValueError, match="between 0"):
        widgets.threshold_view(image, depth, 1.2)
    with pytest.raises(ValueError, match="its depth"):
        widgets.threshold_view(image, depth[..., :20], 0.5)
    with pytest.raises(ValueError, match="its depth"):
        widgets.depth_threshold(image[:, :1], depth)


def test_slider_moves_picture_and_text(pair):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="lib")           # what ipywidgets 8 took away shows here
        box = widgets.depth_threshold(*pair, at=0.4)
    slider, text, picture = box.children
    assert (slider.min, slider.value, slider.max) == (0.0, 0.4, 1.0)
    seen = {picture.value}
    for at in (0.0, 0.5, 1.0):
        slider.value = at
        assert f"d = {at:.2f}" in text.value
        seen.add(picture.value)
        drawn = Image.open(io.BytesIO(picture.value))
        assert np.array_equal(np.asarray(drawn), np.asarray(widgets.threshold_view(*pair, at)))
    assert len(seen) == 4


def test_an_error_in_the_callback_is_not_swallowed(pair, monkeypatch):
    slider = widgets.depth_threshold(*pair).children[0]

    def broken(*_):
        raise RuntimeError("broken view")
    monkeypatch.setattr(widgets, "threshold_view", broken)
    with pytest.raises(RuntimeError, match="broken view"):
        slider.value = 0.9


def test_callback_is_fast_enough_to_follow_the_slider():
    import time
    image, depth = torch.rand(1, 3, 128, 128), torch.rand(1, 1, 128, 128)
    widgets.threshold_view(image, depth, 0.5)
    times = []
    for at in (0.2, 0.4, 0.6, 0.8):
        start = time.thread_time()
        widgets._png(widgets.threshold_view(image, depth, at))
        times.append(time.thread_time() - start)
    assert min(times) < 0.25


def test_static_strip_has_one_row_for_each_threshold(pair, tmp_path):
    images, labels = widgets.threshold_strip(*pair, ats=(0.25, 0.5))
    assert len(images) == len(labels) == 6 and labels[3] == "cut at d = 0.50"
    assert show.sheet(images, labels, tmp_path / "strip.png", columns=3).stat().st_size <= show.MAX_FIGURE_BYTES


def test_panel_calls_draw_with_every_control_by_name():
    calls = []

    def draw(**values):
        calls.append(values)
        return Image.new("RGB", (values["k"], 4)), f"k = {values['k']}"

    box = widgets.panel(draw, "test-panel", k=widgets.slider(3, 1, 9, 1, "k"), w=widgets.slider(0.5, 0.0, 1.0, 0.1, "w"))
    k, w, text, picture = box.children
    w.value = 0.7
    k.value = 8
    assert calls == [{"k": 3, "w": 0.5}, {"k": 3, "w": 0.7}, {"k": 8, "w": 0.7}]
    assert text.value == "k = 8" and Image.open(io.BytesIO(bytes(picture.value))).width == 8


def test_an_error_in_draw_reaches_the_caller():
    def draw(k):
        if k > 5:
            raise ValueError("k is too large")
        return Image.new("RGB", (4, 4)), ""

    box = widgets.panel(draw, "test-panel", k=widgets.slider(3, 1, 9, 1, "k"))
    with pytest.raises(ValueError, match="too large"):
        box.children[0].value = 6
