"""Lesson 08: its form, the promises its text makes, its exercises, its explorer, and its build-it versions."""
import ast
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lib import attention, checks, checks_08, diffusion, featglac, latents, metrics, scenes, setup, show
from lib import widgets_08 as draw

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "08_feature_injection.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "decoder_self_attention": "return [n for n in names if n.split('_')[0] == 'up' and n.endswith('attn1.processor')]",
    "recorder": "B = hidden_states.shape[0] // 2\n    k, v = attn.to_k(hidden_states), attn.to_v(hidden_states)\n"
                "    split = lambda y: y.reshape(*y.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)\n"
                "    q = split(attn.to_q(hidden_states))\n"
                "    w = (q @ split(k).mT / q.shape[-1] ** 0.5).softmax(-1)\n"
                "    return attn.to_out[0]((w @ split(v)).permute(0, 2, 1, 3).flatten(2)), k[B:], v[B:]",
    "blend_two": "m = torch.nn.functional.interpolate(mask, size, mode='area').flatten(2).mT\n"
                 "    return (1 - strength) * own + strength * (m * near + (1 - m) * far)",
    "shared_attention": "d = q.shape[-1] ** 0.5\n    a, b = (q @ k.mT / d).exp(), weight * (q @ k_ref.mT / d).exp()\n"
                        "    return (a @ v + b @ v_ref) / (a.sum(-1, True) + b.sum(-1, True))",
    "inverse_step": "clean = (z - torch.sqrt(1 - abar_below) * eps) / torch.sqrt(abar_below)\n"
                    "    return torch.sqrt(abar_t) * clean + torch.sqrt(1 - abar_t) * eps",
}


@pytest.fixture(scope="module")
def task(tiny_pipe):
    """The lesson's task for a random pipeline, two steps."""
    return draw.case(tiny_pipe, steps=2, refine=0)


def run_cells(*names, **space):
    """Run cells of the notebook one after another in one namespace."""
    space = {"torch": torch, "attention": attention, "diffusion": diffusion, "latents": latents, "scenes": scenes,
             "metrics": metrics, "show": show, "draw": draw, "display": lambda x: x, "contextmanager": contextmanager,
             "nullcontext": nullcontext, "replace": draw.replace, "run": setup.configure("mini", 0, True),
             "steps": 3, "tolerance": 1e-3, "STEPS": 20, "FROM": draw.PAIR["FROM"], "TO": draw.PAIR["TO"], **space}
    for name in names:
        exec(CODE[name], space)
    return space


@pytest.fixture(scope="module")
def opened(tiny_pipe):
    """Sections 2 to 6 of the notebook, run with a random pipeline."""
    return run_cells("task", "processor", "processor-equal", "names", "install", "recorder", "installed", "record",
                     "inject", "inject-own", "inject-other", pipe=tiny_pipe, unet=tiny_pipe.unet)


# ---------------------------------------------------------------- form and promises

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "## 1 · Settings", "## 2 · A task",
             "## 3 · The door", "## 4 · A recorder", "## 5 · An injector", "## 6 · The patch that does nothing",
             "## 7 · Inversion", "## 8 · Two sources", "## 9 · A map", "## 10 · Replace", "## 11 · The relatives",
             "## 12 · What it costs", "## 13 · The same layers", "## 14 · Your turn", "## 15 · Recap",
             "## 16 · The same with Stable Diffusion", "## 17 · Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


def test_what_a_source_gets_wrong_is_said():
    """COURSE 4: replacing everything everywhere is not soft; the guidance runs at the generation's own noise level."""
    said = re.findall(r"\*\*\(!\)\*\*.+", WORDS)
    assert len(said) == 2 and "clean" in said[0] and "timestep $t$" in said[0] and "soft constraint" in said[1]


@pytest.mark.parametrize("bad", [{"FROM": 5}, {"TO": 10_000_001}, {"STEPS": 1}, {"STEPS": 1000},
                                 {"STEPS": 2.5}, {"ROOMS": 5}, {"ROOMS": 1.5}, {"GUIDANCE": 0.5}, {"GUIDANCE": "3"}])
def test_wrong_parameters_are_refused_before_anything_is_loaded(bad):
    from types import SimpleNamespace
    asked = SimpleNamespace(configure=lambda *given: SimpleNamespace(smoke=True))
    with pytest.raises(ValueError, match=next(iter(bad))):
        exec(CODE["configure"], {**setup.notebook_parameters(PATH), **bad, "setup": asked})


def test_markdown_has_no_broken_escapes_and_no_measured_number():
    assert not re.search(r"[\a\b\f\v\t\r]", WORDS) and WORDS.count("$") % 2 == 0
    assert not re.search(r"\d+(\.\d+)? (dB|ms|seconds)\b", WORDS) and not re.search(r"\d+ ?%", WORDS)


def test_the_figures_show_the_lessons_own_rooms():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in draw.PAIR} == draw.PAIR
    for seed in map(int, re.findall(r"\b2\d{7}\b", CODE["parameters"] + CODE["map-cases"])):
        assert scenes.split_of(seed) == "test"


# ---------------------------------------------------------------- what the text says, run

def test_the_task_is_the_librarys_and_the_zones_share_out_the_picture(opened, task):
    assert torch.equal(opened["A"], task.a) and torch.equal(opened["B"], task.b) and torch.equal(opened["truth"], task.truth)
    assert torch.equal(opened["things"], task.things) and tuple(opened["words"]) == task.words
    zones = draw.zones(task.truth, task.b, task.things)
    assert torch.equal(sum(zones.values()), torch.ones(1, 1, 128, 128)) and zones["shadow"].sum() > 100
    errors = task.errors(task.a * task.things + task.b * (1 - task.things))       # what the text says of paste
    assert errors["room"] < errors["things"] and errors["room"] < errors["shadow"] / 3
    changed = (task.truth - task.b).abs().mean(1, keepdim=True) > 0.03
    assert bool(changed[zones["shadow"] > 0].all()) and not bool(changed[zones["room"] > 0].any())


def test_built_in_the_lesson_equals_the_library(opened, tiny_pipe):
    """The notebook's processor, recorder and injector against diffusers and lib: its cells assert it, too."""
    from diffusers.models.attention_processor import AttnProcessor2_0
    names = set(tiny_pipe.unet.attn_processors)
    assert all(isinstance(p, AttnProcessor2_0) for p in tiny_pipe.unet.attn_processors.values()) and len(names) == 20
    assert len(opened["store"]) == 3 * 10 and len(opened["store_other"]) == 3 * 20
    assert max(opened["drifts"].values()) < 1e-4                                    # own K and V, all modes
    assert not tiny_pipe.unet._forward_pre_hooks
    assert torch.equal(opened["sample"](), opened["sample"]())


def test_silent_patches_do_nothing_and_the_counter_says_so(opened, tiny_pipe):
    space = run_cells("nothing-run", "nothing-more", "counter", "counter-run", "counter-table", **{
        k: v for k, v in opened.items() if k != "__builtins__"})
    right, *wrong = space["tried"].values()
    assert right > 1e-3 and max(wrong) < 1e-5 and space["ignored"]
    said = space["said"]
    assert "fits" in said["a name that is not there"] and "attn1" in said["cross-attention"]
    assert "fired 0 times" in said["replaced afterwards"] and "fired 0 times" in said["fused"]
    assert "never applied" in said["a window without a step"]
    assert not any(isinstance(p, attention.TapProcessor) for p in tiny_pipe.unet.attn_processors.values())


def test_the_relatives_of_the_lesson_are_the_librarys(opened):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 8, generator=g) for _ in range(3))
    src = {part: torch.randn(2, 6, 8, generator=g) for part in "qkv"}
    run = lambda k, v, bias=None, q=q: attention.attention(q, k, v, bias)
    space = run_cells("kin-rules")
    for name in ("masactrl", "plug_and_play", "style_aligned"):
        assert torch.equal(space[name](q, k, v, src, run), getattr(attention, name)(q, k, v, src, run))


def test_stable_diffusions_layers_are_named_as_the_text_says(capsys):
    space = run_cells("sd-shape", "sd-memory")
    there = space["there"]
    assert there["features"] == "up_blocks.1.resnets.1" and there["masactrl"][0].name.startswith("up_blocks.2.attentions.0")
    assert [x.name.split(".")[1] for x in there["pnp"]] == list("11222333")
    said = capsys.readouterr().out
    assert "16 layers" in said and space["count"](space["rows"]) == pytest.approx(23e6, rel=0.05)


def test_the_exercises_answers_equal_the_library(tiny_pipe):
    g = torch.Generator().manual_seed(3)
    own, near, far = (torch.randn(1, 12, 5, generator=g) for _ in range(3))
    mask = (torch.rand(1, 1, 24, 32, generator=g) > 0.5).float()
    m = 0.6 * attention.pool_mask(torch.cat([mask, 1 - mask]), (3, 4))
    wanted = attention._blend(own, torch.cat([near, far]), m)
    assert torch.allclose(checks_08.blend_two(own, near, far, mask, 0.6, (3, 4)), wanted, atol=1e-5)
    q, k, v, kr, vr = (torch.randn(1, 12, 8, generator=g) for _ in range(5))
    run = lambda k, v, bias=None, q=q: attention.attention(q, k, v, bias[0])
    wanted = attention._concat(q, k, v, kr, vr, torch.full((1, 12, 1), 0.4), run)
    assert torch.allclose(checks_08.shared_attention(q, k, v, kr, vr, 0.4), wanted, atol=1e-5)
    s = diffusion.ddim(tiny_pipe, 10)
    z, eps = torch.randn(2, 1, 4, 3, 3, generator=g)
    for t in (901, 401, 1):
        below = diffusion.alpha_at(s, diffusion.previous(s, t))
        ours = checks_08.inverse_step(z, eps, below, diffusion.alpha_at(s, t))
        assert torch.allclose(ours, diffusion.ddim_inverse_step(s, eps, t, z), atol=1e-6)
    names = list(tiny_pipe.unet.attn_processors)
    assert [n.removesuffix(".processor") for n in checks_08.decoder_self_attention(names)] == [
        x.name for x in attention.select(tiny_pipe.unet, "up")]


def test_the_blend_of_the_lesson_is_featglacs(task):
    """The same bank and masks, one source at a time: lib.featglac injects through the same function."""
    assert featglac.attention.inject is attention.inject
    assert torch.equal(task.masks.sum(0), torch.ones(1, 128, 128))


# ---------------------------------------------------------------- the explorer

def test_callbacks_at_min_default_max(task):
    plain, seen = task.plain(), []
    for strength, window in ((0.0, (0.0, 1.0)), (1.0, (0.0, 1.0)), (0.5, (0.0, 0.6)), (1.0, (0.5, 0.5))):
        picture, drawn = draw.explorer_view(task, strength, "all layers", window, "keys and values", list(draw.MODES)[0])
        assert np.asarray(picture).std() > 10 and picture.width > 700
        seen.append(drawn)
        text = draw.explorer_text(task, drawn, strength, window)
        assert "RMSE: things" in text and ("nothing injected" in text) == (strength == 0 or window == (0.5, 0.5))
    assert torch.allclose(seen[0], plain, atol=1e-4) and torch.equal(seen[3], plain)
    assert (seen[1] - plain).abs().max() > 1e-3


def test_every_choice_of_the_pickers_draws(task):
    unet, mode = task.pipe.unet, list(draw.MODES)[0]
    choices = draw.layer_choices(unet)
    assert len(choices) == 4 + 3 + 10
    for layers in list(choices)[:7:3] + list(choices)[-1:]:
        assert draw.explorer_view(task, 1.0, layers, (0.0, 1.0), "values only", mode)[1].shape == (1, 3, 128, 128)
    for other in list(draw.MODES)[1:]:
        draw.explorer_view(task, 1.0, "up blocks", (0.0, 1.0), "keys only", other)
    for bad in ({"layers": "decoder"}, {"parts": "q"}, {"mode": "swap"}):
        good = {"layers": "all layers", "parts": "keys only", "mode": mode}
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is one of"):
            draw.explorer_view(task, 1.0, window=(0.0, 1.0), **{**good, **bad})
    with pytest.raises(ValueError, match="strength"):
        draw.redraw(task, strength=1.5)


def test_controls_move_the_picture(task):
    strength, window, layers, parts, mode, text, picture = draw.injection_explorer(task).children
    seen = {bytes(picture.value)}
    for control, value in ((strength, 0.0), (strength, 0.7), (window, (0.0, 0.6)), (layers, "up blocks"), (parts, "keys only")):
        control.value = value
        seen.add(bytes(picture.value))
    assert len(seen) == 6 and "in 1 of 2 steps" in text.value and not strength.continuous_update


def test_strips_and_small_drawings(task, tiny_pipe):
    images, labels = draw.explorer_strip(task, strengths=(1.0,))
    assert len(images) == len(labels) == 3
    images, labels = draw.grid_strip(task, ("up",), ((0.0, 1.0),))
    assert len(images) == 1 and "RMSE" in labels[0]
    images, labels = draw.relatives_strip(tiny_pipe, steps=2)
    assert labels[2:] == ["no injection", "MasaCtrl", "Plug-and-Play", "StyleAligned"]
    assert all((images[2] - x).abs().max() > 1e-4 for x in images[3:])
    images, labels = draw.token_masks(task.things, tiny_pipe.unet, (16, 16))
    assert labels[1:] == ["16 x 16 = 256 tokens", "8 x 8 = 64 tokens", "4 x 4 = 16 tokens"]
    assert all(abs(float(x.mean() - task.things.mean())) < 1e-5 for x in images)          # pooling loses no area
    view = draw.heat_maps({"a": [[0.1, 0.2], [0.3, 0.4]]}, ["x", "y"], ["p", "q"], "errors")
    assert len(view.png()) > 3000 and "errors" in view.alt
    plain, levels = (draw.lines([("t", "x", "y", {"a": ([1, 2], [3, 4])}, *more)], marker="o").png()
                     for more in ((), ({"floor": 5},)))
    assert plain != levels and len(plain) > 3000


def test_recoloured_changes_every_colour_and_nothing_else():
    scene = scenes.sample(draw.PAIR["FROM"])
    new = draw.recoloured(scene)
    assert all(s.colour != n.colour and s.kind == n.kind and s.x == n.x for s, n in zip(scene.things, new.things))
    assert new.room == scene.room and new.sun == scene.sun


def test_a_round_trip_goes_up_once_and_down_at_each_scale(tiny_pipe):
    picture = scenes.render(scenes.sample(draw.PAIR["FROM"])).rgb
    with diffusion.count_passes(tiny_pipe.unet) as passes:
        (plain, guided), noise = draw.round_trip(tiny_pipe, picture, ["a table"], 4, refine=1, scales=(1.0, 3.0))
    assert passes.total == 4 * 2 + 4 + 4 * 2 and noise.shape == (1, 4, 16, 16) and guided != plain
    back = latents.decode(tiny_pipe, diffusion.sample(tiny_pipe, "a table", 4, 1.0, latents=noise))
    assert plain == pytest.approx(metrics.psnr(back, picture).item(), abs=1e-4)


# ---------------------------------------------------------------- exercises

def test_the_usual_mistakes_are_named():
    """The mistakes that issue and lesson speak of, written as a student would."""
    from torch.nn.functional import interpolate

    def nearest(own, near, far, mask, strength, size):
        m = interpolate(mask, size=size).flatten(2).transpose(1, 2)
        return own * (1 - strength) + strength * (near * m + far * (1 - m))

    def two_softmaxes(q, k, v, k_ref, v_ref, weight):
        a, b = (attention.attention(q, x, y) for x, y in ((k, v), (k_ref, v_ref)))
        return a / (1 + weight) + b * weight / (1 + weight)

    for name, answer, mistake in [
        ("decoder_self_attention", lambda names: [n for n in names if "up_blocks" in n and "attn2" in n], "cross-attention"),
        ("recorder", lambda attn, x: (checks_08.recorder(attn, x)[0], *(f(x).chunk(2)[0] for f in (attn.to_k, attn.to_v))),
         "unconditional half"),
        ("blend_two", nearest, "mask sampled"),
        ("blend_two", lambda o, n, f, m, s, size: checks_08.blend_two(o, n, f, m, 1 - s, size), "strength reversed"),
        ("shared_attention", two_softmaxes, "blended after the softmax"),
        ("inverse_step", lambda z, e, a, b: (a / b).sqrt() * (z - (1 - b).sqrt() * e) + (1 - a).sqrt() * e, "levels swapped"),
    ]:
        assert checks.find(name).run(answer).mistake == mistake
    broken = checks.find("recorder").run(lambda attn, x: attn.to_keys(x))
    assert broken.status == "fail" and "AttributeError" in broken.message and broken.mistake == ""


def _recorder(scale=lambda attn, x: (x.shape[-1] / attn.heads) ** 0.5, keep=lambda k: k.chunk(2)[1], go_on=lambda o: o):
    def answer(attn, x):
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        q_, k_, v_ = (attention.split_heads(y, attn.heads) for y in (q, k, v))
        out = attention.merge_heads((q_ @ k_.mT / scale(attn, x)).softmax(-1) @ v_)
        return go_on(attn.to_out[0](out)), keep(k), keep(v)
    return answer


def _blended(share, mix=lambda o, g, s: (1 - s) * o + s * g):
    def answer(own, near, far, mask, strength, size):
        m = share(mask, size)
        return mix(own, m * near + (1 - m) * far, strength)
    return answer


def _pooled(mask, size):
    return torch.nn.functional.adaptive_avg_pool2d(mask, size).flatten(2).mT


@pytest.mark.parametrize("name, answer, mistake", [
    ("decoder_self_attention", lambda names: filter(lambda n: n.startswith("up_blocks.") and ".attn1." in n, names), "no list"),
    ("decoder_self_attention", lambda names: [n for n in names if "down" not in n and ".attn1." in n], "the middle, too"),
    ("decoder_self_attention", lambda names: [n for n in names if "up_blocks.1." in n and "attn1" in n], "one block only"),
    ("decoder_self_attention", lambda names: [n for n in names if "up" in n and ".attn1." in n][:-1], "names"),
    ("recorder", _recorder(), ""),
    ("recorder", _recorder(keep=lambda k: k[:, k.shape[1] // 2:]), "half the tokens"),
    ("recorder", _recorder(go_on=lambda out: out.chunk(2)[1]), "output of one half"),
    ("recorder", _recorder(scale=lambda attn, x: x.shape[-1] ** 0.5), "sqrt of the layer's width"),
    ("blend_two", _blended(_pooled), ""),
    ("blend_two", _blended(_pooled, lambda o, g, s: torch.lerp(o, g, s)), ""),
    ("blend_two", _blended(lambda mask, size: _pooled((mask > 0.5).float(), size)), "mask rounded first"),
    ("blend_two", _blended(lambda mask, size: _pooled(mask, size).mT), "mask not transposed"),
    ("blend_two", _blended(lambda mask, size: _pooled(mask[:1], size)), "one mask for all pictures"),
    ("blend_two", _blended(_pooled, lambda o, g, s: o + s * g), "added"),
    ("blend_two", _blended(_pooled, lambda o, g, s: s * g), "own tokens lost"),
    ("shared_attention", lambda q, k, v, k_ref, v_ref, w: attention.attention(
        q, torch.cat([k, k_ref], 1), torch.cat([v, v_ref], 1),
        bias=torch.tensor([0.0] * k.shape[1] + [float(np.log(w))] * k.shape[1]) / q.shape[-1] ** 0.5), "log divided, too"),
    ("inverse_step", lambda z, e, a, b: b**0.5 * (z - (1 - a)**0.5 * e) / a**0.5 + (1 - a)**0.5 * e, "noise of the level below"),
    ("inverse_step", lambda z, e, a, b: (z - (1 - a)**0.5 * e) / a**0.5 + (1 - b)**0.5 * e, "z_0 not shrunk"),
])
def test_more_usual_mistakes_are_named(name, answer, mistake):
    """An empty mistake: the answer is right, in another style."""
    result = checks.find(name).run(answer)
    assert (result.status, result.mistake) == ("fail" if mistake else "pass", mistake), result.message


def test_a_best_that_is_no_better_to_the_digits_shown_is_not_called_better(capsys):
    space = {"torch": torch, "curve": {0.0: {"things": 0.1112, "room": 0.24}}, "zones": ("things", "room"),
             "sets": ("up",), "names": ["up"], "thirds": [(0.0, 1.0)] * 4, "heat": [[{"things": 0.1109, "room": 0.13}] * 4]}
    exec(CODE["map-verdict"], space)
    things, room = capsys.readouterr().out.splitlines()
    assert things.endswith("and no choice is better") and "best 0.130 with layers up" in room


def test_nothing_depends_on_a_stub():
    at = list(CODE).index("checks-import")
    trees = [ast.parse(CODE[f"ex{i}-code"]) for i in range(1, 6)]
    made = {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}
    later = "\n".join(CODE[name] for name in list(CODE)[at:] if not name.startswith("ex"))
    assert made == set(ANSWERS) and not any(re.search(rf"\b{name}\b", later) for name in made)


@pytest.mark.slow
def test_lesson_08_runs_with_other_parameters_and_another_pipeline(tmp_path, tiny_pipe):
    """Another seed, other rooms, and an SD-shaped pipeline from a folder, by MODEL alone; quality does not matter."""
    tiny_pipe.save_pretrained(tmp_path / "random-pipeline")
    given = {"MODEL": str(tmp_path / "random-pipeline"), "SMOKE": True, "SEED": 3, "FROM": 20000027, "TO": 20000003,
             "STEPS": 3, "GUIDANCE": 2.0}
    out = setup.run_notebook(PATH, tmp_path / "08.ipynb", given, timeout=300)
    cells = nbformat.read(out, 4).cells
    assert any("SEED = 3" in c.source for c in cells if "injected-parameters" in c.metadata.get("tags", []))
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 12
    with pytest.raises(ValueError, match="has no parameter ROOM"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"ROOM": 3})
