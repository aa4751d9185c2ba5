"""Lesson 04: its form beyond the common one, its pictures, its exercises, its widgets, and its promises."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lib import checks, diffusion, inpaint, masks, scenes, setup, widgets_04

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "04_inpainting.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "composite_hole": "return image * (1 - fill_mask) + filled * fill_mask",
    "hole_psnr": "square = ((filled - truth) ** 2 * fill_mask).sum((1, 2, 3))\n"
                 "    return -10 * (square / (3 * fill_mask.sum((1, 2, 3)))).log10()",
    "patch_distances": "s = patch.shape[-1]\n    out = torch.full(allowed.shape, float('inf'))\n"
                       "    for y, x in allowed.nonzero().tolist():\n"
                       "        out[y, x] = ((patch - picture[:, y:y + s, x:x + s]) ** 2).sum()\n    return "
                       "out",
    "put_known_back": "a = alphas_cumprod[t - 1]\n    known = a ** 0.5 * x0 + (1 - a) ** 0.5 * noise\n"
                      "    return known * (1 - fill_mask) + x_prev * fill_mask",
    "jump_forward": "r = alphas_cumprod[t] / alphas_cumprod[s]\n"
                    "    return r ** 0.5 * x + (1 - r) ** 0.5 * noise",
}


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**",
             "Settings, rooms and holes", "Which value means", "How good is a filling", "Smooth it over",
             "Copy from the same picture", "Copy from another picture", "Learn it: one network",
             "hold the known part", "RePaint's jumps", "Diffusion in latents", "One table",
             "### Where each fails", "Your turn", "Recap", "The same with Stable Diffusion",
             "Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3
    assert WORDS.count("**(!)**") >= 4    # the convention, the clean paste, the cut, the confound, stride


def test_the_figures_show_the_lessons_own_rooms():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in widgets_04.EXAMPLE} == widgets_04.EXAMPLE
    assert scenes.split_of(parameters["FIRST"]) == "test"
    with pytest.raises(ValueError, match="FIRST must be a test seed"):
        widgets_04.rooms(1, first=5)
    with pytest.raises(ValueError, match="29999999"):
        widgets_04.rooms(10, first=29999995)


@pytest.mark.parametrize("given", [{"ROOMS": 0}, {"SAMPLES": 1}, {"STEPS": 9}, {"STEPS": 1000},
                                   {"STEPS": 501}, {"STEPS": 334}])
def test_wrong_parameters_are_refused_before_anything_runs(given):
    with pytest.raises(ValueError, match="ROOMS must be at least 1"):
        exec(CODE["configure"], {"setup": setup, **setup.notebook_parameters(PATH), **given})


@pytest.mark.parametrize("steps", [10, 30, 50, 500])
def test_allowed_steps_begin_near_pure_noise_and_walk_to_the_end(steps):
    """Beyond 500, and far from a divisor of 1000, a scheduler's first level still holds a good part of the picture."""
    jump = run_cells("configure", setup=setup, **{**setup.notebook_parameters(PATH), "STEPS": steps})["jump"]
    assert any(way == "up" for way, _ in inpaint.repaint_times(list(range(steps)), *jump))       # else (c) would be (b)
    levels = diffusion.ddim(diffusion.teach_scheduler(), steps)
    assert levels.alphas_cumprod[levels.timesteps[0]] < 0.03 < levels.alphas_cumprod[666]
    space = run_cells("jump", torch=torch, inpaint=inpaint, run=FakeRun(), levels=levels, steps=steps, jump=jump,
                      x=torch.randn(1, 3, 8, 8), ts=levels.timesteps.tolist(), theirs=_repaint_scheduler(steps))
    assert space["stride"] == 1000 // steps


def _repaint_scheduler(steps):
    from diffusers import RePaintScheduler
    theirs = RePaintScheduler(trained_betas=diffusion.teach_scheduler().betas.numpy(), eta=1.0)
    theirs.set_timesteps(steps)
    return theirs


def test_every_kind_and_every_method_is_in_the_table():
    for name in inpaint.METHODS:
        assert f'"{name}": ' in CODE["table-run"], name
    kinds, m = widgets_04.holes(2, 64, torch.Generator().manual_seed(0))
    assert len(kinds) == len(m) == 10 and set(kinds) == set(masks.KINDS)
    for word in ("PSNR", "SSIM", "feat_dist", "seam", "seconds"):
        assert word in CODE["table"] + CODE["measure"]


def test_what_was_not_timed_has_no_time_and_fog_has_no_seam():
    rows = []
    run_cells("table", torch=torch, show=type("", (), {"table": lambda r, h: rows.extend(r)}), image=[0] * 10,
              results={"telea": 0, "truth": 0}, seconds={"telea": 0.5},
              scores={name: {c: torch.tensor([1.0, float("inf")]) for c in
                             ("PSNR", "of the mean", "best", "SSIM", "feat_dist", "its best", "seam")}
                      for name in ("telea", "truth")})
    assert [row[-1] for row in rows] == ["0.50", ""]
    image = scenes.render(widgets_04.rooms(10), size=128).rgb
    hole = widgets_04.holes(2, 128, torch.Generator().manual_seed(0))[1]
    from lib import metrics
    seam = {name: metrics.seam(inpaint.fill(image, hole, name), hole).mean() for name in ("telea", "biharmonic", "fillnet")}
    assert max(seam["telea"], seam["biharmonic"]) < seam["fillnet"]


def test_the_curve_of_errors_reaches_the_lowest_level():
    """The words speak of it, so it is drawn."""
    for steps in (10, 50, 125):
        ts = list(range(1000 - 1000 // steps + 1, 0, -(1000 // steps)))
        line = next(line for line in CODE["why"].splitlines() if "ts_seen" in line and "=" in line)
        space = {"ts": ts, "steps": steps}
        exec(line, space)
        assert space["ts_seen"][0] == ts[0] and space["ts_seen"][-1] == 1 and len(space["ts_seen"]) >= 10


# ---------------------------------------------------------------- exercises

def test_exercises_name_minutes_and_difficulty_and_have_four_wrong_answers():
    heads = re.findall(r"^### Exercise (\d) · .+\((\d+) minutes, (easy|medium|hard).*\)$", WORDS, re.M)
    assert [head[0] for head in heads] == ["1", "2", "3", "4", "5"]
    assert all(len(checks.find(name).wrongs) >= 4 for name in ANSWERS)


def _put_back(scale, spread):
    return lambda x, x0, f, t, abar, noise: f * x + (1 - f) * (scale(abar[t - 1]) * x0 + spread(abar[t - 1]) * noise)


STYLES = {
    "composite_hole": [lambda image, filled, m: image + (filled - image) * m,
                       lambda image, filled, m: torch.lerp(image, filled, m.expand_as(image))],
    "hole_psnr": [lambda f, t, m: torch.tensor([-10 * np.log10(float(((a - b) ** 2)[:, h[0] > 0].mean()))
                                                for a, b, h in zip(f, t, m)], dtype=torch.float32),
                  lambda f, t, m: -20 * (((f - t) ** 2 * m).sum((1, 2, 3)) / (3 * m.sum((1, 2, 3)))).sqrt().log10()],
    "patch_distances": [lambda p, x, a: torch.where(a, (p ** 2).sum() - 2 * torch.conv2d(x[None], p[None])[0, 0]
                                                    + torch.conv2d(x[None] ** 2, torch.ones_like(p)[None])[0, 0],
                                                    torch.tensor(float("inf"))),
                        lambda p, x, a: ((x.unfold(1, p.shape[1], 1).unfold(2, p.shape[2], 1) - p[:, None, None]) ** 2
                                         ).sum((0, 3, 4)) + torch.where(a, 0.0, float("inf"))],
    "put_known_back": [_put_back(lambda a: float(a) ** 0.5, lambda a: (1 - float(a)) ** 0.5),
                       _put_back(lambda a: a.item() ** 0.5, lambda a: float(np.sqrt(1 - a.numpy()))),
                       lambda x, x0, f, t, abar, noise: torch.where(f > 0, x, abar[t - 1] ** 0.5 * x0
                                                                    + (1 - abar[t - 1]) ** 0.5 * noise)],
    "jump_forward": [lambda x, s, t, abar, noise: (float(abar[t]) / float(abar[s])) ** 0.5 * x
                     + (1 - float(abar[t]) / float(abar[s])) ** 0.5 * noise,
                     lambda x, s, t, abar, noise: (abar[t] / abar[s]) ** 0.5 * x
                     + (1 - abar[t] - abar[t] / abar[s] * (1 - abar[s])).sqrt() * noise],
}


@pytest.mark.parametrize("name, style", [(name, k) for name in ANSWERS for k in range(len(STYLES[name]))])
def test_a_right_answer_in_another_style_passes(name, style):
    assert checks.find(name).run(STYLES[name][style]).status == "pass"


def test_the_lowest_level_is_asked_for():
    """Timestep 0 is not the clean picture: an answer that takes it for clean is wrong there and nowhere else."""
    g = torch.Generator().manual_seed(0)
    assert 1 in [t for *_, t, _, _ in checks.find("put_known_back").cases(g)]
    assert 0 in [s for _, s, *_ in checks.find("jump_forward").cases(g)]


# ---------------------------------------------------------------- its versions are the library's

class FakeRun:
    smoke, size = True, 64

    def generator(self, offset=0):
        return torch.Generator("cpu").manual_seed(11 + offset)


def run_cells(*names, **space):
    for name in names:
        exec(CODE[name], space)
    return space


def test_strokes_leave_known_pixels_nearer_than_boxes():
    from types import SimpleNamespace

    from lib import widgets_04
    space = run_cells("mask-reach", torch=torch, widgets_04=widgets_04, run=SimpleNamespace(size=128),
                      show=SimpleNamespace(table=lambda *_: None))
    far = {kind: float(mean) for kind, _, mean in space["rows"]}
    assert far["irregular"] < 0.8 * far["random box"] and far["free form"] < 0.5 * far["random box"]
    assert all(0.15 < float(share[:-1]) / 100 < 0.25 for _, share, _ in space["rows"])



def test_the_notebooks_patchmatch_is_the_librarys():
    """The cells hold the assertions themselves; here with another picture, seed and hole."""
    image = scenes.render(diffusion.teach_scene(20000123), size=64).rgb
    space = run_cells("pm-exhaustive", "pm-scratch", "pm-moves", "pm-run", torch=torch, F=torch.nn.functional,
                      masks=masks, inpaint=inpaint, run=FakeRun(), image=image)
    assert space["gaps"][-1] < space["gaps"][0] and space["gaps"][-1] < 2
    assert (space["d"] >= space["best"] - 1e-4).all()


def test_the_notebooks_repaint_step_and_jump_are_the_librarys():
    schedule = diffusion.teach_scheduler()
    space = run_cells("step", torch=torch, diffusion=diffusion, levels=diffusion.ddim(schedule, 25))
    exec(CODE["jump"].split("\n\nstride")[0], space)
    x, x0, output = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(3))
    hole, g = masks.random_box(2, 16, FakeRun().generator()), FakeRun().generator
    for t in (961, 481, 41, 1):
        mine = space["reverse_step"](output, t, x, x0, 1 - hole, g())
        assert torch.equal(mine, inpaint.repaint_step(space["levels"], output, t, x, x0, hole, g()))
    theirs = inpaint.forward_jump(space["levels"], x, range(9, 30), g())
    assert torch.equal(space["up"](x, range(9, 30), g()), theirs)


@pytest.mark.parametrize("size", [64, 128])
def test_the_object_shaped_hole_that_the_reader_is_sent_to_can_be_made(size):
    code = re.search(r"`(masks\.object_mask\(.+?\))`", WORDS).group(1)
    run = FakeRun()
    run.size = size
    hole = eval(code, {"masks": masks, "scenes": scenes, "rooms": widgets_04.rooms(1), "run": run})
    assert hole.shape[-2:] == (size, size) and 0.01 < hole.mean() < 0.5


def test_no_cell_writes_again_what_the_library_has():
    defined = set(re.findall(r"^def (\w+)", "\n".join(CODE.values()), re.M))
    assert defined == {"ready", "use_folder", "install", "find_course", "score", "row", "distance", "better",
                       "propagate", "random_search", "cut_cost", "reverse_step", "up", *ANSWERS}


# ---------------------------------------------------------------- widgets

@pytest.fixture(scope="module")
def room():
    return scenes.render(widgets_04.rooms(1), size=64).rgb


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("area, seed", [(0.05, 0), (0.2, 0), (0.5, 30)])
def test_mask_view_at_min_default_max(room, kind, area, seed):
    drawn, text = widgets_04.mask_view(room, kind, area, seed)
    share = float(re.search(r"\((\d+)%\)", text).group(1)) / 100
    assert drawn.width > 3 * 64 and np.asarray(drawn).std() > 10
    assert 0.7 * area - 0.01 <= share <= 1.3 * area + 0.01 and "pixels to fill" in text
    with pytest.raises(ValueError, match="area must lie"):
        widgets_04.mask_view(room, kind, 0.9, seed)


@pytest.mark.parametrize("length, times", [(1, 1), (10, 3), (25, 10)])
def test_walk_view_at_min_default_max(length, times):
    drawn, text = widgets_04.walk_view(50, length, times)
    levels = widgets_04.walk_levels(50, length, times)
    assert drawn.width > 600 and levels[0] == 50 and levels[-1] == 0
    assert all(abs(a - b) == 1 for a, b in zip(levels, levels[1:]))
    passes = sum(b < a for a, b in zip(levels, levels[1:]))
    assert f"{passes} passes" in text and (passes == 50) == (times == 1)


@pytest.fixture
def explorer(room):
    image, m = room.expand(3, -1, -1, -1), masks.random_box(3, 64, torch.Generator().manual_seed(0))
    results = {"grey": inpaint.grey(image, m)[:, None], "random": torch.rand(3, 4, 3, 64, 64)}
    return widgets_04.results_explorer(image, m, ["random_box"] * 3, results)


def test_results_explorer_follows_its_controls(explorer):
    hole, method, sample, text, picture = explorer.children
    seen = {picture.value}
    for change in (lambda: setattr(sample, "value", sample.max), lambda: setattr(hole, "value", 2),
                   lambda: setattr(method, "value", "grey")):
        change()
        seen.add(picture.value)
        assert "PSNR in the hole" in text.value
    assert len(seen) == 4 and "grey" in text.value
    with pytest.raises(ValueError, match="N = 2"):
        widgets_04.results_explorer(torch.rand(2, 3, 64, 64), torch.rand(2, 1, 64, 64), ["a"] * 2,
                                    {"x": torch.rand(3, 1, 3, 64, 64)})


def test_shells_move_with_their_controls(room):
    box = widgets_04.mask_explorer(room)
    kind, area, seed, text, picture = box.children
    before = picture.value
    kind.value, area.value, seed.value = "centre_box", 0.25, 3
    assert picture.value != before and "centre box" in text.value
    length, times, text, picture = widgets_04.walk_explorer().children
    before, times.value = picture.value, 1
    assert picture.value != before and "50 passes" in text.value


def test_mask_strip_and_offsets(room):
    images, labels = widgets_04.mask_strip(room)
    assert len(images) == len(labels) == 10
    field = torch.arange(30)
    assert torch.equal(widgets_04.offsets(field, (5, 6)), torch.full((1, 3, 5, 6), 0.5))


def test_method_strip_with_methods_that_need_no_model(room):
    hole = masks.centre_box(1, 64, area=0.1)
    images, labels = widgets_04.method_strip(room, hole, {"smear": ("telea", None)})
    assert labels == ["the hole", "smear", "the truth"] and len(images) == 3


# ---------------------------------------------------------------- the recipe of the context network

def test_the_recipe_runs_resumes_and_exports(tmp_path, monkeypatch):
    """Past a third of its budget the discriminators play, too; a second call goes on; FillNet loads it."""
    from lib import train
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(train, "CHUNK", 4)
    monkeypatch.setattr(train, "fillnet_quality", lambda net: {"scenes": 0})
    train.corpus(4)
    train.train_fillnet(0, 3, batch=2)
    first = train.checkpoint("fillnet")
    train.train_fillnet(0, 4, batch=2)
    second = train.checkpoint("fillnet")
    assert (first["step"], second["step"]) == (3, 4) and set(second["models"]) == {"gen", "whole", "local"}
    for part in second["models"]:
        a, b = first["models"][part], second["models"][part]
        assert any(not torch.equal(a[k], b[k]) for k in a)
        assert all(torch.isfinite(v).all() for v in b.values())
    train.export(tmp_path / "out", ["fillnet"])
    net = inpaint.FillNet.load(tmp_path / "out" / "fillnet")
    assert net.config["widths"] == [16, 32, 64]
    train.pack(tmp_path / "packed")
    train.unpack(tmp_path / "packed")
    train.train_fillnet(0, 5, batch=2)          # packed: the generator goes on, the discriminators are new
    assert train.checkpoint("fillnet")["step"] == 5


def test_windows_hold_a_pixel_of_the_hole():
    from lib import train
    m = masks.random_box(6, 64, torch.Generator().manual_seed(0), area=(0.02, 0.05))
    g = torch.Generator().manual_seed(1)
    corners = train._windows(m, 24, g)
    assert (corners >= 0).all() and (corners <= 40).all()
    assert (train._cut(m, corners, 24).amax((1, 2, 3)) == 1).all()


# ---------------------------------------------------------------- runs

@pytest.mark.slow
def test_lesson_04_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 5, "FIRST": 20001000}
    out = setup.run_notebook(PATH, tmp_path / "04.ipynb", given, timeout=600)
    cells = nbformat.read(out, 4).cells
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) > 10
    with pytest.raises(ValueError, match="has no parameter STEP"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"STEP": 3})
