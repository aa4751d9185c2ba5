"""Lesson 07: its form beyond the common one, its pictures, its exercises, its widgets, and its promises."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lib import checks, deglad, depth, inpaint, masks, scenes, setup, show, widgets_07

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "07_deglad.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "two_layers": "m = (depth < d).float()\n    return torch.cat([image * m, m], 1), torch.cat([image * (1 - m), 1 - m], 1)",
    "lay_over": "return layer[:, 3:] * layer[:, :3] + (1 - layer[:, 3:]) * below",
    "otsu": "p, x = count.double() / count.sum(), torch.arange(len(count)).double()\n    def between(k):\n"
            "        w, v = p[:k].sum(), p[k:].sum()\n"
            "        return w * v * ((p[:k] * x[:k]).sum() / w - (p[k:] * x[k:]).sum() / v) ** 2\n"
            "    return max(range(1, len(p)), key=between)",
    "ramp_alpha": "return ((d - z) / slope + 0.5).clamp(0, 1)",
    "three_alphas": "m = (nearer_or_middle - near) / (1 - near)\n    return near, m.nan_to_num(0, 0, 0), torch.ones_like(near)",
}


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "The four steps, by hand",
             "The sign, once more", "The threshold, live", "Choosing d", "The near floor", "## 6 · Edges", "### Fringes",
             "## 7 · The hole", "Three layers and more", "What a wrong depth map does", "Depth from a sensor, with holes",
             "Your turn", "Recap", "The same with Stable Diffusion", "Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3
    assert WORDS.count("**(!)**") >= 2


def test_the_figures_show_the_lessons_own_room():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in widgets_07.EXAMPLE} == widgets_07.EXAMPLE
    assert scenes.split_of(parameters["FIRST"]) == "test"
    with pytest.raises(ValueError, match="FIRST must be a test seed"):
        widgets_07.cases(1, first=5)


def test_all_fillings_are_asked_of_the_library():
    assert "list(inpaint.METHODS)" in CODE["hole-methods"]
    assert not [name for name in inpaint.METHODS if f'"{name}"' in CODE["hole-run"] + CODE["hole-table"]]
    random = list(inpaint.METHODS)[list(inpaint.METHODS).index("ddpm-clean"):]
    assert {"repaint", "latent"} <= set(random) and not {"telea", "patchmatch", "fillnet"} & set(random)


def test_no_cell_writes_again_what_the_library_has():
    defined = set(re.findall(r"^def (\w+)", "\n".join(CODE.values()), re.M))
    assert defined == {"ready", "use_folder", "install", "find_course", "separation", "best_d", "suggestions", "floor_of",
                       "alpha_errors", "options", "told_and_clicked", "farther_neighbour", *ANSWERS}


# ---------------------------------------------------------------- exercises

def test_the_exercises_answers_are_the_librarys():
    """Each reference against lib.deglad (Otsu: on a picture's own histogram)."""
    g = torch.Generator().manual_seed(3)
    image, z = torch.rand(2, 3, 24, 24, generator=g), torch.rand(2, 1, 24, 24, generator=g)
    cut = deglad.split(image, z, 0.4)
    fg, bg = checks.find("two_layers").reference(image, z, 0.4)
    assert torch.equal(fg, cut.foreground) and torch.equal(bg, cut.background)
    layer = torch.rand(2, 4, 24, 24, generator=g)
    assert torch.allclose(checks.find("lay_over").reference(layer, image), deglad.over(layer, image), atol=1e-6)
    values = torch.cat([0.2 + 0.05 * torch.randn(700, generator=g), 0.7 + 0.1 * torch.randn(324, generator=g)]).clamp(0, 1)
    count, edges = np.histogram(values.numpy().astype(np.float64), 128, (float(values.min()), float(values.max())))
    k = checks.find("otsu").reference(torch.from_numpy(count))
    assert deglad.suggest(values.view(1, 1, 32, 32)) == pytest.approx(edges[k], abs=1e-6)
    ramp = torch.linspace(0, 1, 33).expand(1, 1, 24, 33)
    alpha = checks.find("ramp_alpha").reference(ramp, torch.full_like(ramp, 1 / 32), 0.52)
    assert torch.allclose(alpha, deglad.soft_edges(torch.rand(1, 3, 24, 33, generator=g), ramp, 0.52, 1), atol=1e-4)
    near, both = (deglad.blur((ramp < d).float(), 1.0) for d in (0.3, 0.7))
    parts = checks.find("three_alphas").reference(near, both)
    picture = torch.rand(1, 3, 24, 33, generator=g)
    stack = [torch.cat([picture, a], 1) for a in parts]
    assert torch.allclose(deglad.recompose(stack), picture, atol=1e-6)


# ---------------------------------------------------------------- what the text says

@pytest.fixture(scope="module")
def room():
    """The lesson's first room in small: (Case, picture, DepthMap, d, ids)."""
    case = widgets_07.cases(1)[0]
    r = scenes.render(case.scene, size=64)
    z = depth.from_metric(r.depth, near=scenes.NEAR, far=scenes.FAR)
    return case, r.rgb, z, z.at(f"{case.at}m"), r.ids


@pytest.mark.parametrize("bad", [{"ROOMS": 0}, {"STEPS": 0}])
def test_wrong_parameters_are_refused_before_anything_is_loaded(bad):
    from types import SimpleNamespace
    asked = SimpleNamespace(configure=lambda *given: SimpleNamespace(smoke=True))
    with pytest.raises(ValueError, match=next(iter(bad))):
        exec(CODE["configure"], {**setup.notebook_parameters(PATH), **bad, "setup": asked})


def test_each_room_has_a_thing_in_front_and_a_gap_behind():
    for case in widgets_07.cases(2, first=20000500):
        r = scenes.render(case.scene, size=64)
        mine, others = widgets_07.both(case, r.ids)
        assert r.depth[mine > 0].max() < case.at < r.depth[others > 0].min()
        assert case.scene.things[case.index].kind in widgets_07.THIN and case.index in case.picked
        assert len(case.without().things) == len(case.scene.things) - len(case.picked)


def test_the_cells_of_the_four_steps_hold_for_another_room():
    cases = widgets_07.cases(1, first=20000500)
    world = scenes.render(cases[0].scene, size=64)
    space = {"torch": torch, "deglad": deglad, "inpaint": inpaint, "masks": masks, "images": world.rgb, "world": world,
             "show": show, "draw": widgets_07, "cases": cases, "scenes": scenes, "depth": depth}
    for name in ("step-depth", "step-masks", "step-fill", "recompose"):
        exec(CODE[name], space)
    assert space["changed"].any()


def test_best_d_separates_and_the_floor_is_floor(room):
    case, image, z, d, ids = room
    space = {"torch": torch, "draw": widgets_07, "depth": depth}
    exec(CODE["choose-curve"], space)
    exec(CODE["near-floor"].split("\n\n\n")[0], space)
    best, iou = space["best_d"](z.values, ids, case)
    assert iou == 1 and space["separation"](z.values, ids, case, d) == 1
    assert space["separation"](z.values, ids, case, best) == 1
    floor = space["floor_of"](z.metres(), case.scene.camera)
    assert floor.mean() > 0.2 and (ids[floor > 0] < 0).float().mean() > 0.98


def test_holes_beside_a_thing_belong_to_what_is_behind():
    space = {"torch": torch}
    exec(CODE["sensor-guess"], space)
    z = torch.tensor([0.9, 0.9, 0.2, 0.2, 0.0, 0.0, 0.8, 0.0]).view(1, 1, 1, 8)
    ok = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 0]).view(1, 1, 1, 8)
    filled = space["farther_neighbour"](depth.DepthMap(z, "relative", 0.0, 1.0, ok))
    assert torch.equal(filled.flatten(), torch.tensor([0.9, 0.9, 0.2, 0.2, 0.8, 0.8, 0.8, 0.8]))


def test_true_cover_agrees_with_the_hard_mask_inside(room):
    case, image, z, d, ids = room
    cover, thin = widgets_07.true_cover([case], 64)
    hard = deglad.nearer(z, d)
    assert ((cover > 0.5).float() == hard).float().mean() > 0.98 and 0 < thin.mean() < 0.2
    soft = deglad.soft_edges(image, z, d, 1)
    assert (soft - cover).square().mean() < 0.5 * (hard - cover).square().mean()


# ---------------------------------------------------------------- widgets

@pytest.mark.parametrize("at, soft, fill", [(0.0, 0, "telea"), (0.39, 0, "telea"), (0.39, 4, "grey"), (1.0, 4, "biharmonic")])
def test_layers_view_at_min_default_max(room, at, soft, fill):
    _, image, z, _, _ = room
    drawn, text = widgets_07.layers_view(image, z, at, soft, fill)
    assert drawn.width > 4 * 64 and np.asarray(drawn).std() > 10 and f"d = {at:.2f}" in text
    assert ("nothing to fill" in text) == (at in (0.0, 1.0))
    with pytest.raises(ValueError, match="Give one picture"):
        widgets_07.layers_view(image, depth.DepthMap(z.values[..., :32], "relative", 0.0, 1.0), 0.5)


@pytest.mark.parametrize("x, y, margin", [(0.0, 0.0, 0.0), (0.5, 0.5, 0.03), (1.0, 1.0, 0.2)])
def test_choose_view_at_min_default_max(room, x, y, margin):
    _, image, z, _, _ = room
    drawn, text = widgets_07.choose_view(image, z, x, y, margin)
    assert drawn.height > 300 and "depth under" in text and " m; d = " in text


@pytest.mark.parametrize("kind", deglad.SPOILS)
@pytest.mark.parametrize("amount", [0.0, 0.5, 1.0])
def test_spoil_view_at_min_default_max(room, kind, amount):
    _, image, z, d, _ = room
    drawn, text = widgets_07.spoil_view(image, z, d, kind, amount)
    iou = float(re.search(r"masks ([\d.]+)", text).group(1))
    assert drawn.width > 3 * 64 and ((iou == 1) == (amount == 0)) and kind in text
    with pytest.raises(ValueError, match="share of the largest"):
        widgets_07.spoil_view(image, z, d, kind, 2.0)


def test_shells_move_with_their_controls(room):
    _, image, z, d, _ = room
    for box, change in ((widgets_07.layers_explorer(image, z, d), {0: 0.5, 1: 2, 2: "grey"}),
                        (widgets_07.choose_explorer(image, z), {0: 0.2, 1: 0.9, 2: 0.1}),
                        (widgets_07.spoil_explorer(image, z, d), {0: "noise", 1: 0.9, 2: 5})):
        *controls, text, picture = box.children
        if len(controls) == 1:                          # beside a picture to click on
            clicker, beside = controls[0].children
            controls, clicker.x = beside.children, 0.9
            assert controls[0].value == 0.9
        for k, value in change.items():
            before, controls[k].value = picture.value, value
            assert picture.value != before and text.value


def test_small_pictures_and_charts(room):
    _, image, z, d, ids = room
    x, y = widgets_07.innermost((ids == room[0].index).float())
    assert ids[0, 0, y, x] == room[0].index
    assert widgets_07.zoom(image, 0, 63, 16).shape[-2:] == (16, 16)
    assert widgets_07.busiest(torch.zeros(2, 1, 9, 9).index_put_((torch.tensor(1), torch.tensor(0), torch.tensor(2),
                                                                  torch.tensor(7)), torch.tensor(1.0)), 4) == (1, 7, 2)
    view = widgets_07.curves({"a": {"mean": ([0, 1], [1, 2]), "b": ([0, 1], [2, 1])}}, {"a": "x"}, "y", [("mark", 1.5)])
    assert view.png() and "y for a" in view.alt and widgets_07.histogram(z, {"d": d}).png()
    images, labels = widgets_07.spoil_strip()
    assert len(images) == len(labels) == 8


# ---------------------------------------------------------------- runs

@pytest.mark.slow
def test_lesson_07_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 5, "FIRST": 20001000, "PHOTOS": "nowhere"}
    out = setup.run_notebook(PATH, tmp_path / "07.ipynb", given, timeout=600)
    cells = nbformat.read(out, 4).cells
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) > 15
    said = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert "No photographs with depth in 'nowhere'" in said and said.count("not attempted yet") == 5
    with pytest.raises(ValueError, match="has no parameter STEP"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"STEP": 3})
