"""Lesson 06: its form beyond the common one, the promises its text makes, its exercises, its probe and its points."""
import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import checks, checks_06, depth, scenes, setup, show
from lib import widgets_06 as draw

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "06_monocular_depth.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "inverse_to_depth": "return ((high - inverse) / (high - low)).clamp(0, 1)",
    "fit_scale_shift": "out = []\n    for p, y, m in zip(prediction, target, valid):\n        p, y = p[m > 0], y[m > 0]\n"
                       "        A = torch.stack([p, torch.ones_like(p)], 1)\n"
                       "        out.append(torch.linalg.lstsq(A, y[:, None]).solution[:, 0])\n"
                       "    return torch.stack(out).unbind(1)",
    "two_scores": "each = [(abs(z - t) / t)[m > 0].mean() for z, t, m in zip(metres, truth, valid)]\n"
                  "    return torch.stack(each), (metres - truth)[valid > 0].square().mean().sqrt()",
    "delta_one": "good = (metres < 1.25 * truth) & (truth < 1.25 * metres)\n"
                 "    return (good * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))",
    "unproject_pixel": "import math\n    t = math.tan(math.radians(fov / 2))\n    H, W = size\n"
                       "    return (2 * (column + 0.5) - W) / H * t * z, (H - 2 * (row + 0.5)) / H * t * z, "
                       "z",
}


class FakeEstimator:
    """A perfect model with the mini's habits: predicts 10 / z of the scene it was given."""

    def __init__(self, z):
        self.z = z

    def predict(self, image):
        from types import SimpleNamespace
        return SimpleNamespace(predicted_depth=(10 / self.z)[:, 0])

    def __call__(self, image):
        return depth.mini(self.predict(image), 10.0, tuple(image.shape[-2:]), scenes.NEAR, scenes.FAR)


@pytest.fixture(scope="module")
def room():
    """(scene, its rendering at 64 x 64)."""
    return draw.example(64)


@pytest.fixture(scope="module")
def probe(room):
    """(picture, estimate, raw output), as the probe wants them."""
    model = FakeEstimator(room[1].depth)
    return room[1].rgb, model(room[1].rgb), 10 / room[1].depth


# ---------------------------------------------------------------- form and promises

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "## 1 · Settings", "## 2 · Three ways",
             "## 3 · The sign trap", "## 4 · Two missing numbers", "## 5 · Four scores", "## 6 · Against the truth",
             "## 7 · What a sensor says", "### Photographs", "## 8 · Every model", "## 9 · Why a threshold",
             "## 10 · Where it fails", "### Shadows", "### A picture of a picture", "## 11 · Into space",
             "## 12 · What wrong alignment", "## 13 · Your turn", "## 14 · Recap", "## 15 · The same with Stable Diffusion",
             "## 16 · Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


def test_markdown_has_no_broken_escapes():
    assert not re.search(r"[\a\b\f\v\t\r]", WORDS) and WORDS.count("$") % 2 == 0


def test_no_measured_figure_is_typed():
    assert not re.search(r"\d+(\.\d+)? (dB|ms|seconds)\b", WORDS)
    assert set(re.findall(r"\d+ %", WORDS)) <= {"100 %", "10 %", "3 %", "50 %", "30 %"}     # of the definitions


def test_the_figures_show_the_lessons_own_room():
    parameters = setup.notebook_parameters(PATH)
    assert parameters["ROOM"] == draw.EXAMPLE["ROOM"] and f'd = {draw.EXAMPLE["d"]}\n' in CODE["trap-cut"]
    for name in ("ROOM", "FIRST"):
        assert scenes.split_of(parameters[name]) == "test"
    scene = scenes.sample(parameters["ROOM"])
    assert {t.kind for t in scene.things} == {"chair", "ball"}                  # "a chair behind a ball"
    by_depth = sorted(range(2), key=scene.depth_of)
    assert [scene.things[i].kind for i in by_depth] == ["ball", "chair"]
    glass = scenes.sample(int(re.search(r"sample\((\d{8})\)", CODE["sensor-make"]).group(1)))
    assert {t.kind for t in glass.things} == {"vase", "glass"}                  # "vases and a ball of glass"


def test_every_item_of_the_contract_runs_as_code():
    code = "\n".join(CODE.values())
    for word in ("ordinal_error", "align_scale_shift", "abs_rel", "rmse", "delta1", "depth.dpt", "depth.depth_anything",
                 "depth.zoedepth", "depth.mini", "depth.given", "depth.RANDOM", "imitate_sensor", "photographs", "groups",
                 "shadow_zone", "poster", "unproject", "project", "draw.cloud", "depth_probe", "eight"):
        assert word in code, word


# ---------------------------------------------------------------- what the text says, run

def run_cells(*names, **space):
    space = {"torch": torch, "F": F, "depth": depth, "scenes": scenes, "draw": draw, "show": show, "display": lambda x: x,
             "math": __import__("math"), "replace": __import__("dataclasses").replace, "DEPTH": "mini",
             "run": setup.Run("mini", 0, True, "cpu", torch.float32, 64), "ROOM": draw.EXAMPLE["ROOM"], **space}
    for name in names:
        exec(CODE[name], space)
    return space


@pytest.fixture(scope="module")
def told(room):
    """The cells of sections 2 to 5 and 11 to 12 that need no trained model, run with a perfect one."""
    return run_cells("units-column", "units-planes", "units-map", "units-refuse", estimator=FakeEstimator(room[1].depth))


def test_a_column_of_the_room_is_made_of_straight_lines_in_inverse_depth(told, capsys):
    bend = lambda x: float(x.diff().diff().abs()[40:].max())                   # the floor's rows
    assert bend(1 / told["z"]) < 1e-4 < 1e-3 < bend(told["z"])


def test_other_rooms_have_these_lines_too():
    for k in (0, 3, 7):
        run_cells("units-column", "units-planes", ROOM=20000100 + k)


@pytest.mark.parametrize("bad", [{"ROOM": 5}, {"FIRST": 5}, {"ROOMS": 1}, {"ROOMS": 3}, {"FIRST": 29999950}])
def test_wrong_parameters_are_refused_before_anything_is_loaded(bad):
    from types import SimpleNamespace
    asked = SimpleNamespace(configure=lambda *given: SimpleNamespace(smoke=True))
    with pytest.raises(ValueError, match="ROOMS must be at least 4"):
        exec(CODE["configure"], {**setup.notebook_parameters(PATH), **bad, "setup": asked})


def test_the_trap_selects_the_background_and_the_order_tells(told, room, capsys):
    space = run_cells("trap-raw", "trap-cut", "trap-order", world=room[1], estimator=FakeEstimator(room[1].depth))
    said = capsys.readouterr().out
    assert "taken as depth 100.0%, converted 0.0%" in said and "near is HIGH" in said
    mean = lambda mask: float(room[1].depth[space[mask] > 0].mean())
    assert mean("wrong") > float(room[1].depth.mean()) > mean("right")


def test_alignment_in_the_right_space_is_exact_and_in_the_wrong_one_is_not(told, room):
    space = run_cells("align-hand", "align-wrong", "align-curve", world=room[1], z=told["z"], rows=told["rows"])
    right, wrong = (float(x.abs().mean()) for x in space["off"])
    assert right < 1e-4 and wrong > 0.02


def test_scores_by_formula_and_what_they_see(room):
    found = FakeEstimator(room[1].depth * 1.07 + 0.1)(room[1].rgb)
    space = run_cells("scores-formula", "scores-order", "scores-spoil", world=room[1], found=found, scene=room[0])
    rows = {name: values for name, *values in space["table"]}
    assert rows["the truth"] == [0, 0, 1, 0]
    assert rows["everything 10 % too far"] == pytest.approx([0.1, rows["everything 10 % too far"][1], 1, 0], abs=1e-5)
    assert rows["sign flipped"][3] == 1
    assert rows["noise, 10 % of the depth"][3] > 0.01
    unseen, noise = rows["the nearest thing not seen"], rows["noise, 10 % of the depth"]
    assert unseen[0] <= noise[0]                                               # "costs no more AbsRel than that haze"


def test_ramps_and_random_models_through_every_adapter(room):
    space = run_cells("adapters-raw", "adapters-run", "adapters-table", "adapters-docs", "adapters-zoe",
                      "adapters-models", image=room[1].rgb)
    ramp = space["ramp"]
    for name, found in space["through"].items():
        assert depth.ordinal_error(found.values, ramp) < 0.01, name
    middle = float(space["through"]["Depth Anything v2 Metric"].values[..., 32].mean())
    assert middle == pytest.approx(0.5, abs=1e-3)
    assert float(space["through"]["DPT, MiDaS"].values[..., 32].mean()) == pytest.approx(0.83, abs=0.02)
    assert float((space["careless"] - ramp).abs().max()) > 0.5                 # "shifts everything"


def test_one_threshold_means_other_metres_in_every_picture(room):
    worlds = scenes.render([scenes.sample(20002000 + k) for k in range(4)], size=64)
    space = run_cells("bits-pipeline", "bits-pair", "bits-table", "bits-steps", image=room[1].rgb, scene=room[0],
                      worlds=worlds, FIRST=20002000)
    stretched, fixed = space["stretched"], space["fixed"]
    ids = scenes.render(space["crowded"], size=64).ids
    same = (ids != len(room[0].things))                                        # all that the new ball does not cover
    assert not torch.equal(stretched[:1][same], stretched[1:][same])
    assert torch.equal(fixed[:1][same], fixed[1:][same])
    metres = [space["means_in_metres"](x, 0.5)[0] for x in space["pair"].depth]
    assert metres[0] > metres[1] + 0.3
    assert {space["means_in_metres"](x, 0.5)[2] for x in worlds.depth} == {4.5}


def test_floor_points_lie_on_the_floor_and_planes_bend_only_in_the_wrong_space(told, capsys):
    space = run_cells("space-floor", "space-back", "planes-fit", "planes-table", "planes-show", bare=told["bare"],
                      sharp=told["sharp"])
    rows = {name: (float(tilt[:-1]), float(cm[:-3])) for name, tilt, cm in space["table"]}
    assert rows["right"] == (0, 0) and rows["wrong scale of 1/z (x 1.3)"] == (0, 0)
    shift, bent = rows["wrong shift in 1/z (+ 0.08)"], rows["aligned in depth"]
    assert shift[0] > 1 and shift[1] < 0.05 < 1 < bent[1]


def test_a_hole_counted_as_a_number_spoils_the_fit():
    space = run_cells("sensor-make", "sensor-steps")
    space["estimator"] = FakeEstimator(space["sensed"].depth)
    exec(CODE["sensor-holes"], space)
    (_, good, _), (_, bad, _) = space["table"]
    assert good < 0.02 and bad > 3 * good
    assert 0.5 < float(space["ok"].mean()) < 0.95
    assert (space["ok"] * space["glass"]).sum() == 0


# ---------------------------------------------------------------- exercises

STYLES = [("delta_one", lambda z, t, v: (((z / t).log().abs() < math.log(1.25)) * v).sum((1, 2, 3)) / v.sum((1, 2, 3))),
          ("delta_one", lambda z, t, v: (((z / t < 1.25) & (z / t > 0.8)) * v).sum((1, 2, 3)) / v.sum((1, 2, 3))),
          ("two_scores", lambda z, t, v: (((z - t).abs() / t * v).sum((1, 2, 3)) / v.sum((1, 2, 3)),
                                          math.sqrt(float((z - t)[v > 0].square().mean())))),
          ("inverse_to_depth", lambda x, low, high: (high - x.clamp(low, high)) / (high - low))]


@pytest.mark.parametrize("name, answer", STYLES)
def test_a_right_answer_in_another_style_passes(name, answer):
    assert checks.find(name).run(answer).status == "pass"


def test_the_exercises_answers_equal_the_library(room):
    g = torch.Generator().manual_seed(1)
    z, t = (1 + 4 * torch.rand(2, 1, 9, 8, generator=g) for _ in range(2))
    valid = (torch.rand(2, 1, 9, 8, generator=g) > 0.3).float()
    inverse = depth.from_inverse(1 / z[:1])
    assert torch.allclose(checks_06.inverse_to_depth(1 / z[:1], inverse.far, inverse.near), inverse.values, atol=1e-5)
    s, shift = checks_06.fit_scale_shift(z, t, valid)
    _, s_lib, t_lib = depth.align_scale_shift(z, t, valid)
    assert torch.allclose(s, s_lib.flatten(), atol=1e-4) and torch.allclose(shift, t_lib.flatten(), atol=1e-4)
    each, pooled = checks_06.two_scores(z, t, valid)
    assert torch.allclose(each, depth.abs_rel(z, t, valid)) and pooled > 0
    assert torch.allclose(checks_06.two_scores(z[:1], t[:1], valid[:1])[1], depth.rmse(z[:1], t[:1], valid[:1])[0])
    assert torch.allclose(checks_06.delta_one(z, t, valid), depth.delta1(z, t, valid))
    camera = scenes.Camera(height=0, pitch=0, fov=50)
    points = depth.unproject(z[:1], camera)[0]
    ours = checks_06.unproject_pixel(3, 6, float(z[0, 0, 6, 3]), (9, 8), 50)
    assert ours == pytest.approx(points[:, 6, 3].tolist(), rel=1e-5)


# ---------------------------------------------------------------- the probe

@pytest.mark.parametrize("x, y", [(0, 0), (0.35, 0.45), (1, 1)])
@pytest.mark.parametrize("what", [draw.DEPTH_CUT, draw.RAW_CUT])
def test_probe_at_min_default_max(probe, x, y, what):
    drawn, text = draw.probe_view(*probe, x, y, what), draw.probe_text(*probe, x, y, what)
    assert drawn.width > 3 * 200 and np.asarray(drawn).std() > 10
    z = float(re.search(r"([\d.]+) m, inverse", text).group(1))
    found = re.search(r"depth ([\d.]+) per metre, raw output ([\d.]+), depth (\d\.\d+)", text)
    per_metre, raw, number = map(float, found.groups())
    assert per_metre == pytest.approx(1 / z, abs=0.01) and raw == pytest.approx(10 / z, abs=0.05)
    assert number == pytest.approx((z - 1) / 7, abs=0.01)


def test_the_two_cuts_of_the_probe_are_opposite(probe):
    near, _ = draw.probe_cut(probe[1], probe[2], 0.5, 0.6)
    far, _ = draw.probe_cut(probe[1], probe[2], 0.5, 0.6, draw.RAW_CUT)
    assert (near * far).sum() == 0 and 0.9 < float((near + far).mean()) < 1     # only the place's equals are in neither


def test_probe_shell_follows_its_controls(probe):
    box = draw.depth_probe(*probe)
    found = {}

    def walk(w):
        for child in getattr(w, "children", ()):
            found.setdefault(type(child).__name__, []).append(child)
            walk(child)
    walk(box)
    (x, y), (what,), (text,), (image,) = found["FloatSlider"], found["Dropdown"], found["HTML"], found["Image"]
    seen = {(image.value, text.value)}
    for control, value in ((x, 0.9), (y, 0.1), (what, draw.RAW_CUT)):
        control.value = value
        seen.add((image.value, text.value))
    assert len(seen) == 4 and "raw output &lt;" in text.value
    if "ClickPicture" in found:
        found["ClickPicture"][0].x = 0.25
        assert x.value == 0.25


@pytest.mark.parametrize("change, words", [
    ({"x": 1.5}, "places from 0 to 1"), ({"raw": torch.ones(1, 1, 8, 8)}, "same size"), ({"what": "nearer"}, "what is")])
def test_probe_says_what_is_wrong(probe, change, words):
    given = dict(image=probe[0], estimate=probe[1], raw=probe[2], x=0.5, y=0.5, what=draw.DEPTH_CUT) | change
    with pytest.raises(ValueError, match=words):
        draw.probe_view(**given)


# ---------------------------------------------------------------- points in space

def test_seen_from_its_own_place_the_cloud_is_the_picture(room):
    scene, world = room
    same = draw.seen_from(depth.unproject(world.depth, scene.camera), world.rgb, scene.camera, size=64, dot=0)
    assert float((same - world.rgb).abs().mean()) < 0.02
    moved = draw.seen_from(depth.unproject(world.depth, scene.camera), world.rgb, scene.camera, turn=-35, size=64)
    assert float((moved == 0.55).all(1).float().mean()) > 0.05                 # what was hidden is a hole


def test_cloud_is_drawn_without_a_network_and_has_a_still(room):
    scene, world = room
    points = depth.unproject(world.depth, scene.camera)
    turnable = draw.cloud({"true": (points, world.rgb), "other": (points * 1.1, world.rgb)}, scene.camera, every=2)
    bundle = turnable._repr_mimebundle_()
    assert bundle["text/html"].startswith("<img") and "script" not in bundle["text/html"]
    assert "image/png" not in bundle                       # JupyterLab's plotly extension would show it and stop there
    plot = json.loads(json.dumps(bundle["application/vnd.plotly.v1+json"]))
    assert [t["type"] for t in plot["data"]] == ["scatter3d"] * 2 and len(plot["data"][0]["marker"]["color"]) == 32 * 32
    assert [b["label"] for b in plot["layout"]["updatemenus"][0]["buttons"]] == ["true", "other"]
    with pytest.raises(ValueError, match="at least one cloud"):
        draw.cloud({}, scene.camera)
    with pytest.raises(ValueError, match="of one picture"):
        draw.cloud({"x": (points, world.rgb[..., :8])}, scene.camera)


def test_elsewhere_the_cloud_is_html(room, monkeypatch):
    monkeypatch.setattr(setup, "where", lambda: "colab")
    points = depth.unproject(room[1].depth, room[0].camera)
    bundle = draw.cloud({"true": (points, room[1].rgb)}, room[0].camera, every=8)._repr_mimebundle_()
    assert "plotly" in bundle["text/html"] and len(bundle["text/html"]) < 300_000


# ---------------------------------------------------------------- where it fails

def test_groups_cover_the_picture_once_and_thin_parts_are_legs():
    _, world = draw.example()
    found = draw.groups(world)
    things = [m for name, m in found if name in (*scenes.KINDS, "room")]
    assert torch.equal(sum(things), torch.ones_like(world.depth))
    named = dict(found)
    assert torch.equal(named["thin parts"] + named["solid parts"] + named["room"], torch.ones_like(world.depth))
    assert torch.equal(named["at an edge"] + named["away from edges"], torch.ones_like(world.depth))
    chair, ball = (next(m for n, m in found if n == kind) for kind in ("chair", "ball"))
    share = lambda m: float((named["thin parts"] * m).sum() / m.sum())
    assert share(chair) > 0.2 > 0.1 > share(ball)


def test_poster_changes_colours_on_the_wall_only(room):
    scene, world = draw.example(128)
    other = scenes.render(scenes.sample(20002000)).rgb
    rgb, mask = draw.poster(scene, world, other)
    changed = (rgb != world.rgb).any(1, keepdim=True)
    assert 0.02 < float(mask.mean()) < 0.3 and not (changed & (world.ids >= 0)).any()
    assert (changed | (mask == 0)).float().mean() > 0.95


def test_shadow_zone_is_room_and_darker():
    from dataclasses import replace
    scene, world = draw.example(64)
    empty = scenes.render(replace(scene, things=()), size=64)
    zone = draw.shadow_zone(world, empty)
    assert 0.005 < float(zone.mean()) < 0.5 and not (zone.bool() & (world.ids >= 0)).any()
    assert float(((world.rgb - empty.rgb).mean(1, keepdim=True) * zone).sum()) < 0


def test_small_drawings_and_statistics():
    mean, half, n = draw.mean_and_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, n) == (2.5, 4) and half == pytest.approx(1.96 * np.std([1, 2, 3, 4], ddof=1) / 2)
    assert np.isnan(draw.mean_and_interval([1.0])[1])
    assert draw.bars([("a", 0.1, 0.02, 9), ("b", -0.05, float("nan"), 1)], "x").png()[:4] == b"\x89PNG"
    axis = (view := draw.bars([("a", 0.187, 0.021, 9)], "x")).axes[0].xaxis
    view.png()
    ticks = [(axis.get_major_formatter()(place), place) for place in axis.get_ticklocs()]
    assert all(abs(float(said.rstrip("%")) / 100 - place) < 1e-9 for said, place in ticks), ticks
    with pytest.raises(ValueError, match="one value"):
        draw.stretch(torch.ones(1, 1, 4, 4))


# ---------------------------------------------------------------- photographs

def test_photographs_are_found_or_their_absence_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("LAYERS_TESTDATA", raising=False)
    assert draw.photo_folder("") is None and draw.photo_folder(str(tmp_path)) is None
    run_cells("photos-run", "photos-show", "photos-table", PHOTOS="nowhere", estimator=None)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "No photographs with depth in 'nowhere'" in said[0]
    with pytest.raises(ValueError, match="no pair"):
        draw.photographs(tmp_path)


def test_photographs_of_a_folder(tmp_path, monkeypatch):
    import cv2
    z = np.linspace(800, 4000, 40 * 30).reshape(30, 40).astype(np.uint16)
    z[:5] = 0
    cv2.imwrite(str(tmp_path / "hall_depth_mm.png"), z)
    show.save_image(torch.rand(1, 3, 30, 40), tmp_path / "hall.jpg")
    monkeypatch.setenv("LAYERS_TESTDATA", str(tmp_path.parent))
    assert draw.photo_folder(str(tmp_path)) == tmp_path.resolve()
    (name, (image, sensor)), = draw.photographs(tmp_path).items()
    assert name == "hall" and sensor.size == (30, 40) and float(sensor.valid.mean()) == pytest.approx(25 / 30)
    blue = draw.holes_shown(sensor)[0, :, 0, 0]
    assert torch.allclose(blue, torch.tensor([0.55, 0.8, 1.0]))
    assert draw.reduced(image, 15).shape == (1, 3, 15, 20)


# ---------------------------------------------------------------- runs

@pytest.mark.slow
def test_lesson_06_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 5, "ROOM": 20000021, "FIRST": 20003000, "ROOMS": 5, "PHOTOS": ""}
    out = setup.run_notebook(PATH, tmp_path / "06.ipynb", given, timeout=600)
    cells = nbformat.read(out, 4).cells
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) > 15
    with pytest.raises(ValueError, match="has no parameter ROOMZ"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"ROOMZ": 3})
