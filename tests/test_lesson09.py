"""Lesson 09: its form beyond the common one, its promises, its build-it versions, exercises, journeys and board."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lib import attention, benchmark, diffusion, edit, featglac, scenes, setup, show
from lib import widgets_09 as draw

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "09_featglac.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "stack_by_depth": "out = background\n    for i in sorted(range(len(depths)), key=lambda i: -float(depths[i])):\n"
                      "        a = layers[i:i + 1, 3:]\n        out = layers[i:i + 1, :3] * a + out * (1 - "
                      "a)\n    return out",
    "mask_to_cells": "kh, kw = mask.shape[-2] // size[0], mask.shape[-1] // size[1]\n"
                     "    blocks = mask.unfold(2, kh, kh).unfold(3, kw, kw).flatten(-2)\n"
                     "    return blocks.mean(-1), (blocks > 0).any(-1).float()",
    "guide_step": "n = gradient[0].numel()\n    length = gradient.flatten(1).norm(dim=1) / n ** 0.5\n"
                  "    return z - gradient * (step_size * sigma / length).view(-1, 1, 1, 1)",
    "relight_ratio": "light = (low_pass(after, radius) + 0.05) / (low_pass(before, radius) + 0.05)\n"
                     "    return (paste * light).clamp(0, 1)",
    "count_edit_passes": "per = 2 if guidance_scale != 1 else 1\n"
                         "    return climb * (2 + samples * per) + 3 * guided_steps * inner_steps * samples",
}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- form and promises

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "## 1 · Settings", "## 2 · The task",
             "### Zones", "## 3 · Pasting", "## 4 · The idea", "## 5 · Inject", "### How soft?", "## 6 · Guide",
             "## 7 · Back to pixels", "### Where can the shadow fall?", "## 8 · What is in front", "## 9 · Move it",
             "## 10 · Everything", "### Is it still", "## 11 · Scene compositing", "## 12 · Which choices", "## 13 · Cost beside",
             "## 14 · Where it fails", "## 15 · Your turn", "## 16 · Recap", "## 17 · The same with Stable Diffusion",
             "## 18 · Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)


def test_what_the_accounts_get_wrong_is_said():
    traps = re.findall(r"\*\*\(!\)\*\*.+", WORDS)
    assert len(traps) >= 2
    for words in ("does the second, and no attention is touched", "noise level", "neither layer shows the shadow"):
        assert any(words in trap for trap in traps)


def test_all_methods_zones_and_scores_have_their_place():
    assert set(draw.NAMES) == set(featglac.MECHANISMS)
    for cell in ("sheet", "compose"):
        assert "draw.NAMES" in CODE[cell]
    for word in ("identity", "order", "passes", "rmse_shadow", "rmse_shading", "rmse_outside"):
        assert word in CODE["sheet-table"]
    for name in ("window", "layers", "strength", "inner_steps", "weights", "hard", "clean", "grey", "sources", "anchor"):
        assert name in CODE["ablation-list"], name


def test_the_figures_show_the_lessons_own_rooms_which_no_board_and_no_training_has_seen():
    given = setup.notebook_parameters(PATH)
    assert {k: given[k] for k in draw.EXAMPLE} == draw.EXAMPLE
    board = set(scenes.seeds("test", 1000))
    assert all(scenes.split_of(seed) == "test" and seed not in board for seed in draw.EXAMPLE.values())


@pytest.mark.parametrize("bad", [{"SCENE": 5}, {"PAIR": 5}, {"ROOM": 5}, {"STEPS": 3}, {"ROOMS": 0}])
def test_wrong_parameters_are_refused_before_anything_is_loaded(bad):
    from types import SimpleNamespace
    asked = SimpleNamespace(configure=lambda *given: SimpleNamespace(smoke=True))
    with pytest.raises(ValueError, match=next(iter(bad))):
        exec(CODE["configure"], {**setup.notebook_parameters(PATH), **bad, "setup": asked})


def test_markdown_has_no_broken_escapes():
    assert not re.search(r"[\a\b\f\v\t\r]", WORDS)


# ---------------------------------------------------------------- exercises

# ---------------------------------------------------------------- build it: the notebook's versions are the library's

class FakeRun:
    model, smoke, size, device, dtype, seed = "random", True, 128, "cpu", torch.float32, 7

    def generator(self, offset=0):
        return gen(7 + offset)


@pytest.fixture(scope="module")
def space(tiny_pipe):
    """The cells that build both mechanisms, on a random pipeline, another room and other noise. They assert themselves."""
    from lib import depth, latents, light, metrics, models
    found = dict(torch=torch, F=torch.nn.functional, attention=attention, benchmark=benchmark, depth=depth,
                 diffusion=diffusion, edit=edit, featglac=featglac, latents=latents, light=light, metrics=metrics,
                 scenes=scenes, show=show, draw=draw, run=FakeRun(), steps=8, pipe=tiny_pipe, inpainter=None,
                 display=lambda shown: None, judge=models.load_judge(quiet=True), tolerance=1e-4, SCENE=20005010,
                 PAIR=draw.EXAMPLE["PAIR"], cell=str, measure=lambda image: {"rmse_shadow": 0.0})
    for name in ("case", "zones", "rmse", "paste", "climb", "masks", "record", "come-down", "inject-equal", "listen",
                 "features", "push", "guide-equal", "relight"):
        exec(CODE[name], found)
    return found


def test_both_mechanisms_are_the_librarys_and_hold_the_latent(space):
    assert torch.allclose(space["z_inject"], space["library"].z, atol=1e-4)
    assert torch.allclose(space["z_guide"], space["library_guide"].z, atol=1e-4)
    assert (space["z_inject"] - space["z_guide"]).abs().max() > 1e-3
    assert (space["z_inject"] - space["z_free"]).abs().max() > 1e-3


def test_the_free_ring_is_where_the_latent_moves(space):
    """Outside the ring the edited latent is the background's own; inside it is not."""
    gap = (space["z_inject"] - space["z_layers"][:1]).abs()
    outside = (space["cells"] == 0).expand_as(gap)
    assert outside.any() and gap[outside].max() < 1e-4 < gap[~outside].max()


def test_guidance_lowers_the_loss_it_follows(space):
    guided, plain = (list(space["losses"][k].values()) for k in ("guided", "not guided"))
    assert len(guided) == len(plain) == 2 and guided[0] == pytest.approx(plain[0])  # heard before the first step
    assert guided[1] < plain[1]


def test_the_bill_is_what_the_counter_counts(space, capsys):
    exec(CODE["bill-proof"], space)
    assert capsys.readouterr().out.count("and by the formula") == 2


def test_identity_is_one_for_the_cut_out_and_zero_for_the_empty_room(space):
    exec(CODE["identity"].split("\n\n\nedits")[0], space)
    assert space["identity"](space["paste"]) == pytest.approx(1) and space["identity"](space["c"].background) == pytest.approx(0)


def test_put_back_keeps_the_shadow_on_the_near_floor(space):
    exec(CODE["front"], space)
    assert torch.equal(space["kept"] * space["hidden"], space["composite"] * space["hidden"])
    floor = (space["occluder"] > 0) & (space["hidden"] == 0)
    assert (space["too_much"] - space["composite"])[floor.expand(-1, 3, -1, -1)].abs().max() == 0


def test_no_cell_writes_again_what_the_library_has():
    defined = set(re.findall(r"^def (\w+)", "\n".join(CODE.values()), re.M))
    assert defined == {"ready", "use_folder", "install", "find_course", "zone_error", "come_down", "with_strength", "listening",
                       "feature_loss", "push", "identity", "line", *ANSWERS}


def test_the_variants_way_down_is_the_librarys(tiny_pipe):
    c = benchmark.case("insertion", 20005011)
    before = {n: p for n, p in tiny_pipe.unet.attn_processors.items()}
    library, own = (f(tiny_pipe, c, 4, gen()) for f in (draw.variant, draw.injected))
    assert own[1] == library[1] and torch.allclose(own[0], library[0], atol=1e-4)
    for change in ("grey", "hard", "clean"):
        other, passes = draw.variant(tiny_pipe, c, 4, gen(), **{change: True})
        assert (other - own[0]).abs().max() > 1e-4 and passes == own[1] + (4 if change == "clean" else 0), change
    assert all(before[n] is p for n, p in tiny_pipe.unet.attn_processors.items())


# ---------------------------------------------------------------- journeys and their widgets

@pytest.fixture(scope="module")
def moved(tiny_pipe):
    return draw.object_journey(tiny_pipe, draw.EXAMPLE["ROOM"], (2.0, 3.2, 4.4), 64, ("paste2d", "alpha"))


@pytest.fixture(scope="module")
def cut(tiny_pipe):
    return draw.scenes_journey(tiny_pipe, draw.EXAMPLE["PAIR"], (3.4, 4.7), 64, ("alpha", "inject"), gen(), steps=2)


def test_the_object_passes_in_front_and_behind(moved):
    assert moved.hidden[0] < 0.02 and moved.hidden[-1] > 0.3                    # before everything; behind the plant
    flat, paste, truth = (moved.pictures[n] for n in ("paste2d", "alpha", "truth"))
    assert torch.equal(flat[0], paste[0]) or (flat[0] - paste[0]).abs().max() < 0.05
    assert (flat[-1] - truth[-1]).abs().mean() > (paste[-1] - truth[-1]).abs().mean()


def test_the_cut_takes_more_of_a_as_it_goes_back(cut):
    assert cut.hidden[0] < cut.hidden[1] and cut.passes["inject"] > 0 and cut.passes["alpha"] == 0
    assert set(cut.zones) == set(benchmark.ZONES)
    assert torch.allclose(sum(cut.zones.values()), torch.ones(1))               # every pixel lies in one zone
    assert cut.zones["floor"].sum() > 0


@pytest.mark.parametrize("which", ["moved", "cut"])
def test_view_and_text_at_min_default_max(which, request):
    journey = request.getfixturevalue(which)
    for at in journey.ats:
        for method in journey.pictures:
            drawn, words = draw.journey_view(journey, at, method), draw.journey_text(journey, at, method)
            assert drawn.width > 800 and np.asarray(drawn).std() > 10
            assert f"{at:.1f} m" in words and "RMSE" in words and ("0.000" in words or method != "truth")
    with pytest.raises(ValueError, match="no stop at 9 m; the stops are"):
        draw.journey_view(journey, 9, "alpha")
    with pytest.raises(ValueError, match="has no 'magic'; it has"):
        draw.journey_view(journey, journey.ats[0], "magic")


def test_the_shell_moves_with_its_controls(moved):
    at, method, words, picture = draw.journey_explorer(moved).children
    seen = {picture.value}
    for change in (lambda: setattr(at, "value", 4.4), lambda: setattr(method, "value", "truth"),
                   lambda: setattr(at, "value", 2.0)):
        change()
        seen.add(picture.value)
    assert len(seen) == 4 and "truth at 2.0 m" in words.value


def test_strips_have_a_row_for_each_method(moved):
    images, labels = draw.journey_strip(moved, ("alpha", "truth"), 2)
    assert len(images) == len(labels) == 4 and labels[0] == "alpha, 2.0 m" and labels[-1] == "truth, 4.4 m"


# ---------------------------------------------------------------- drawings

def test_zones_are_drawn_and_light_is_a_logarithm():
    truth, empty = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    zones = {z: empty.clone() for z in benchmark.ZONES}
    zones["shading"][..., :4] = 1
    drawn = draw.zones_picture(truth, zones)
    assert drawn[0, 0, 0, 0] > drawn[0, 2, 0, 0] + 0.3 and (drawn[0, :, 0, 7] == drawn[0, 0, 0, 7]).all()
    assert torch.allclose(draw.light_change(truth * 2, truth), torch.tensor((1.02 / 0.52)).log2().expand(1, 1, 8, 8))


def test_the_depth_maps_light_is_told_the_truth_step_by_step(tiny_pipe):
    """Told nothing it is the mechanism "geometry"; told all, the object is nearer to its true shading."""
    from lib import depth, metrics
    c = benchmark.case("insertion", scenes.seeds("val", 1)[0])
    relit, degrees, nats = draw.told(c)
    given = depth.from_metric(c.background_depth, **draw.METRIC)
    alone = featglac.insert_object(tiny_pipe, c.background, given, c.foreground, "", f"{c.at:.6f}m", "geometry")
    first, *_, last = relit.values()
    assert torch.allclose(first, alone.image, atol=1e-5) and nats == pytest.approx(alone.light.evidence, rel=1e-4)
    error = lambda x: float(metrics.rmse(x, c.truth, c.zones["shading"]))
    assert error(last) < error(first) < error(c.paste) and 0 <= degrees <= 180
    scene = scenes.insertion_case(c.seed)["scene"]
    known = draw.toward(scene.sun, scene.camera)
    off, chance = draw.believed(known, scene.sun, scene.camera)
    assert off < 0.1 and chance == 1 and draw.believed(known, scene.sun, scene.camera, within=-1.0)[1] == 0
    assert known.directions.norm() == pytest.approx(1, abs=1e-5) and abs(known.azimuth - scene.sun.azimuth) < 25


def test_charts_are_drawn():
    each = {"rmse_shadow": 0.2, "rmse_shading": 0.1, "passes": 50}
    chart = draw.cost_plot({name: each for name in ("alpha", "inject", "vae", "plain-cfg")}, "t")
    bars = draw.intervals([("a", 0.1, 0.05, 0.2), ("b", -0.1, -0.2, 0.1)], "t", "x")
    assert chart.png()[:4] == bars.png()[:4] == b"\x89PNG"


# ---------------------------------------------------------------- the stored board

def write(folder, name, rows):
    keys = ("task", "seed", "mechanism", "rmse_shadow", "passes")
    text = "\n".join(",".join(map(str, row)) for row in (keys, *rows))
    (folder / name).write_text(text + "\n")


def test_the_largest_board_is_read_and_the_worst_room_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m lib.benchmark"):
        draw.board(tmp_path)
    write(tmp_path, "mini-8.csv", [])
    write(tmp_path, "mini-smoke.csv", [])
    rows = [("insertion", s, m, e, 7) for m, errors in (("alpha", (0.2, 0.2, "")), ("inject", (0.1, 0.3, 0.9)))
            for s, e in enumerate(errors, 1)]
    write(tmp_path, "mini-112.csv", rows)
    read, n = draw.board(tmp_path)
    assert n == 112 and len(read) == 6
    assert draw.worst(read, "insertion", "rmse_shadow") == (2, 0.3, 0.2)        # room 3 has no score to compare with
    assert draw.worst(read, "insertion", "rmse_shadow", skip={2})[0] == 1
    means = draw.board_means(read, "insertion", ("rmse_shadow", "passes"))
    assert means["alpha"] == {"rmse_shadow": pytest.approx(0.2), "passes": 7}
    ((name, d, low, high),) = draw.differences(read, "insertion", "rmse_shadow", against="alpha")
    assert name == "inject" and d == pytest.approx(0.0, abs=1e-9) and low <= d <= high


def test_rooms_whose_order_was_lost_or_won_are_counted():
    rows = [{"task": "insertion", "mechanism": m, "order": o, "order_truth": t}
            for m, o, t in (("inject", "0.0", "1.0"), ("inject", "1.0", "1.0"), ("inject", "1.0", "0.0"), ("inject", "", "1.0"),
                            ("alpha", "0.0", "1.0"))]
    assert draw.flips(rows, "insertion", "inject") == (1, 1, 3)


def test_the_repositorys_own_board_has_all_methods():
    rows, n = draw.board()
    assert n >= 8
    for task in benchmark.TASKS:
        assert {"alpha", "vae", "plain-cfg", *benchmark.MECHANISMS} <= set(draw.board_means(rows, task, ("passes",)))
        assert draw.worst(rows, task, "rmse_shadow")[0] in scenes.SPLITS["test"]


# ---------------------------------------------------------------- runs

@pytest.mark.slow
def test_lesson_09_runs_by_model_alone_on_a_small_stable_diffusion(tmp_path):
    """MODEL is a folder with a random pipeline of SD 1.5's architecture, at another size; other seeds and rooms too."""
    draw.small_sd().save_pretrained(tmp_path / "small")
    given = {"MODEL": str(tmp_path / "small"), "SMOKE": True, "SEED": 5, "SCENE": 20005010, "PAIR": 20005001}
    out = setup.run_notebook(PATH, tmp_path / "09.ipynb", given, timeout=600)
    cells = nbformat.read(out, 4).cells
    assert any("64 x 64 pixels" in o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) > 15
    with pytest.raises(ValueError, match="has no parameter STEP"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"STEP": 3})
