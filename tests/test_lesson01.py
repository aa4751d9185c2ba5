"""Lesson 01: its form beyond the common one, its promises, its exercises, its widget, its stored pictures."""
import io
import os
import re
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from lib import checks, latents, scenes, setup, show, widgets_01

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "01_latent_space.ipynb"
TESTDATA = Path(os.environ.get("LAYERS_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ALL = WORDS + "\n".join(CODE.values())
ANSWERS = {
    "compression_factor": "import math\n    return math.prod(image_shape) / math.prod(latent_shape)",
    "sample_posterior": "return mean + (logvar / 2).exp() * noise",
    "kl_to_normal": "return -0.5 * (1 + logvar - mean ** 2 - logvar.exp()).sum((1, 2, 3))",
    "decode_latent": "return (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)",
    "slerp": "unit = [v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True) for v in (a, b)]\n"
             "    t = torch.arccos((unit[0] * unit[1]).sum(1)).view(-1, 1, 1, 1)\n"
             "    return ((t - w * t).sin() * a + (w * t).sin() * b) / t.sin()",
}


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    titles = ["Settings", "How many numbers", "Into the latent space", "Not a point", "The scaling factor",
              "What one latent value", "Between two latents", "What is lost", "Train your own",
              "What it buys",
              "The real sizes", "Your turn", "Recap", "The same with Stable Diffusion", "Further reading"]
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**",
             *(f"## {k} · {title}" for k, title in enumerate(titles, 1)), "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


def test_the_places_where_sources_mislead_are_named():
    marked = " ".join(c.source for c in LESSON.cells if "**(!)**" in c.source)
    assert WORDS.count("**(!)**") == 2
    for claim in ("1.5 billion", "hundreds of values", "4 to 8 times smaller"):
        assert claim in marked
    for claim in ("8 times faster", "4 to 8 times cheaper", "10 billion parameters"):
        assert claim in WORDS


def test_the_figures_show_the_lessons_own_case():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in widgets_01.EXAMPLE} == widgets_01.EXAMPLE
    assert {scenes.split_of(parameters[name]) for name in ("SCENE", "OTHER")} == {"test"}
    thing = re.search(r"scenes\.Thing\((.+?)\)", CODE["load"]).group(0)
    room = scenes.sample(parameters["SCENE"]).insert(eval(thing, {"scenes": scenes}), at=parameters["AT"])
    assert torch.equal(scenes.render(room, size=32).rgb, widgets_01.example(32))


@pytest.mark.parametrize("given", [{"TRAIN_STEPS": 0}, {"KL_WEIGHT": -1.0}, {"SCENE": 5}, {"OTHER": 7}])
def test_wrong_parameters_are_refused_before_anything_runs(given):
    with pytest.raises(ValueError, match="TRAIN_STEPS must be at least 1"):
        exec(CODE["configure"], {"setup": setup, **setup.notebook_parameters(PATH), **given})


def test_no_split_is_mixed():
    """The VAE learns on train rooms, statistics come from validation, what is measured from test rooms."""
    assert 'scenes.seeds("train"' in CODE["small-data"] and 'scenes.seeds("val"' in CODE["scale-measure"]
    assert 'scenes.seeds("test"' in CODE["lost-zones"] and 'scenes.seeds("test"' in CODE["rivals"]


# ---------------------------------------------------------------- exercises

@pytest.mark.parametrize("name", ANSWERS)
def test_the_usual_mistakes_are_many_and_the_answer_is_not_in_the_lesson(name):
    assert len(checks.find(name).wrongs) >= 4
    body = ANSWERS[name].split("return ")[-1]
    assert body not in ALL


def test_the_answers_agree_with_the_library(tiny_pipe):
    g = torch.Generator().manual_seed(0)
    a, b, noise = torch.randn(3, 2, 4, 8, 8, generator=g).unbind(0)
    find = lambda name: checks.find(name).reference
    assert torch.allclose(find("slerp")(a, b, 0.3), latents.slerp(a, b, 0.3), atol=1e-5)
    assert torch.allclose(find("kl_to_normal")(a, b), latents.kl(a, b))
    assert torch.allclose(find("sample_posterior")(a, b, noise), latents.draw(a, b, noise))
    with torch.no_grad():
        picture = find("decode_latent")(tiny_pipe.vae, a)
        assert torch.allclose(picture, latents.decode(tiny_pipe, a), atol=1e-6)
    image = torch.rand(2, 3, 64, 64)
    assert find("compression_factor")(image.shape, a.shape) == latents.compression(image, a) == 48


# ---------------------------------------------------------------- what the lesson builds

def built(*names, **space):
    """The names that these cells of the lesson define."""
    space = {"torch": torch, "latents": latents, "scenes": scenes, **space}
    for name in names:
        exec(CODE[name], space)
    return space


@pytest.fixture(scope="module")
def small():
    from types import SimpleNamespace
    space = built("small-block", "small-vae", "small-loss", "small-data", "small-train",
                  run=SimpleNamespace(smoke=True, device="cpu"))
    torch.manual_seed(0)
    return space | {"vae": space["SmallVAE"]()}


def test_the_small_vae_has_the_format_of_the_shipped_one(small):
    x = torch.rand(2, 3, 64, 96)
    mean, logvar = small["vae"].encode(x)
    assert mean.shape == logvar.shape == (2, 4, 8, 12) and latents.compression(x, mean) == 48
    assert small["vae"].decoder(mean).shape == x.shape


def test_the_small_vaes_loss_is_the_formula(small):
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    loss, parts = small["vae_loss"](small["vae"], x, 0.5, torch.Generator().manual_seed(1))
    mean, logvar = small["vae"].encode(x)
    kl = (0.5 * (mean ** 2 + logvar.exp() - 1 - logvar)).mean()
    epsilon = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    back = small["vae"].decoder(mean + (logvar / 2).exp() * epsilon)
    rebuilt = ((back - x).abs() + 2 * (back - x) ** 2).mean()
    assert parts == pytest.approx({"KL": kl.item(), "reconstruction": rebuilt.item()}, rel=1e-4)
    assert loss.item() == pytest.approx((rebuilt + 0.5 * kl).item(), rel=1e-4)


def test_crops_are_crops(small):
    picture = torch.rand(1, 3, 80, 90)
    part = small["crops"](picture, 2, torch.Generator().manual_seed(0))
    assert part.shape == (2, 3, 64, 64) and -1 <= part.min() and part.max() <= 1
    windows = (picture * 2 - 1).unfold(2, 64, 1).unfold(3, 64, 1)[0]              # (3, 17, 27, 64, 64)
    same = lambda x: (windows - x[:, None, None]).abs().amax((0, 3, 4)).min() < 1e-6
    assert same(part[0]) or same(part[0].flip(-1))


def test_a_few_steps_of_training_help(small):
    import copy
    vae = copy.deepcopy(small["vae"])
    log = small["train"](vae, 12, 1e-4, torch.Generator().manual_seed(0))
    assert len(log) == 12 and log[-1]["reconstruction"] < 0.8 * log[0]["reconstruction"]


def test_the_reach_of_a_decoder_is_that_of_its_convolutions(tiny_pipe):
    """By hand: 1 + 4 + 4 convolutions at 8 pixels a place, then 1 + 4 at 4 and at 2, and 1 + 4 + 1 at 1."""
    space = built("reach")
    plain = space["convolutions_only"](tiny_pipe.vae.decoder)
    z = torch.zeros(1, 4, 32, 2)
    with torch.no_grad():
        moved = (plain(latents.change_cell(z, 0, 1.0, x=0, y=0)) - plain(z)).abs().amax((0, 1, 3)) > 0
    blocks = len(tiny_pipe.vae.decoder.up_blocks[0].resnets) * 2
    at_8 = 1 + len(tiny_pipe.vae.decoder.mid_block.resnets) * 2 + blocks
    assert int(moved.sum()) == 8 + 8 * at_8 + (4 + 2) * (1 + blocks) + (1 + blocks + 1)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in tiny_pipe.vae.decoder.modules())     # as it was


def test_the_flop_counter_counts_a_convolution(small):
    space = built("cost-measures")
    net = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False, device="meta")
    assert space["flops"](net, {"input": torch.empty(1, 3, 10, 10, device="meta")}) == 2 * 100 * 3 * 5 * 9


def test_memory_counts_activations_and_no_weights():
    from types import SimpleNamespace
    space = built("cost-memory")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1024, 1024)

        def forward(self, x):
            return SimpleNamespace(sample=self.layer(x).sin())
    kept = space["kept_for_training"](Net(), {"x": torch.rand(256, 1024)})
    assert kept == pytest.approx(2.0, abs=0.05)        # x and the input of sin: 1 MB each; the weight is 4 MB


# ---------------------------------------------------------------- the widget

@pytest.fixture(scope="module")
def latent():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("settings", [
    {"channel": 0, "x": 0, "y": 0, "amount": -4.0}, {}, {"channel": 3, "x": 15, "y": 15, "amount": 4.0},
    {"what": "whole channel", "channel": 3, "amount": -4.0}, {"what": "whole channel", "amount": 0.0}])
def test_cell_view_at_min_default_max(tiny_pipe, latent, settings):
    view = widgets_01.cell_view(tiny_pipe, latent, **settings)
    assert view.width > 4 * 200 and np.asarray(view).std() > 10
    assert "channel" in widgets_01.cell_text(tiny_pipe, latent, **settings)


def test_the_view_follows_every_control(tiny_pipe, latent):
    views = {widgets_01.cell_view(tiny_pipe, latent, **s).tobytes() for s in (
        {}, {"channel": 1}, {"x": 3}, {"y": 3}, {"amount": 3.0}, {"what": "whole channel"})}
    assert len(views) == 6


def test_cell_change_is_what_the_library_says(tiny_pipe, latent):
    edited, before, after, change = widgets_01.cell_change(tiny_pipe, latent, "one cell", 2, 5, 6, 1.5)
    assert torch.equal(edited, latents.change_cell(latent, 2, 1.5, x=5, y=6))
    assert torch.allclose(change, latents.change_map(tiny_pipe, latent, edited), atol=1e-5)
    assert torch.allclose(after, latents.decode(tiny_pipe, edited), atol=1e-5)


def test_bad_input_gives_one_clear_error(tiny_pipe, latent):
    with pytest.raises(ValueError, match="Give one latent"):
        widgets_01.cell_view(tiny_pipe, latent.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="x must be from 0 to 15"):
        widgets_01.cell_view(tiny_pipe, latent, x=16)
    with pytest.raises(ValueError, match="what is one of"):
        widgets_01.cell_view(tiny_pipe, latent, what="row")
    with pytest.raises(ValueError, match="Give one latent"):
        widgets_01.latent_cells(tiny_pipe, latent[0])


def test_the_controls_move_picture_and_text(tiny_pipe, latent):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="lib")
        box = widgets_01.latent_cells(tiny_pipe, latent, x=4, y=6)
    what, channel, x, y, amount, text, picture = box.children
    assert (x.max, y.max, channel.max, amount.min, amount.max) == (15, 15, 3, -4.0, 4.0)
    assert "cell (4, 6) of channel 0 changed by +2.0" in text.value
    seen = {picture.value}
    for control, value in ((amount, -4.0), (x, 15), (y, 0), (channel, 3), (what, "whole channel")):
        control.value = value
        seen.add(picture.value)
    assert len(seen) == 6 and "all of channel 3 changed by -4.0" in text.value
    drawn = np.asarray(Image.open(io.BytesIO(picture.value)).convert("RGB"))
    wanted = widgets_01.cell_view(tiny_pipe, latent, "whole channel", 3, 15, 0, -4.0).convert("RGB")
    assert np.array_equal(drawn, np.asarray(wanted))


def test_colours_are_signed():
    shown = widgets_01.colour(torch.tensor([-3.0, 0.0, 3.0]).view(1, 1, 1, 3))
    blue, white, red = shown[0, :, 0].T
    assert blue[2] > blue[0] and red[0] > red[2] and white.min() > 0.95
    assert widgets_01.enlarge(shown, (4, 6)).shape == (1, 3, 4, 6)


def test_strips_for_the_stored_pictures(tiny_pipe, tmp_path):
    image = widgets_01.example()
    for strip, count in ((widgets_01.promise_strip, 8), (widgets_01.cell_strip, 9)):
        pictures, labels = strip(tiny_pipe, image)
        assert len(pictures) == len(labels) == count
        path = show.sheet(pictures, labels, tmp_path / "strip.png", columns=4, scale=2)
        assert path.stat().st_size <= show.MAX_FIGURE_BYTES


def test_curves_and_bars_draw():
    lines = widgets_01.curves({"a": [3.0, 2.0, 1.0]}, "step", "loss", log=True)
    bars = widgets_01.bars({"a": [0.1, 0.2], "b": [1.0, 0.5]}, ["fine", "coarse"], "lost")
    assert all(view.png().startswith(b"\x89PNG") for view in (lines, bars)) and "fine" in bars.alt


# ---------------------------------------------------------------- the whole lesson with other parameters

@pytest.mark.slow
def test_the_lesson_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 7, "SCENE": 20007548, "OTHER": 20000811, "TRAIN_STEPS": 6,
             "KL_WEIGHT": 0.01}
    if (TESTDATA / "taesd").is_dir():                # real SD latents of a real photograph, by the same lines
        given |= {"TINY": str(TESTDATA / "taesd"), "PHOTO": str(TESTDATA / "rgbd" / "room_chair.jpg")}
    out = setup.run_notebook(PATH, tmp_path / "01.ipynb", given, timeout=300)
    cells = {c.id: c for c in nbformat.read(out, 4).cells}
    printed = "".join(o.get("text", "") for o in cells["photo-trip"].outputs)
    assert "48x fewer" in printed and ("TAESD" in printed) == ("TINY" in given)
    assert any("image/png" in o.get("data", {}) for o in cells["compare"].outputs)
    with pytest.raises(ValueError, match="has no parameter STEPS"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"STEPS": 3})
