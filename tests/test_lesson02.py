"""Lesson 02: its form, the promises its text makes, its exercises, its explorer, what it builds."""
import ast
import math
import re
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import attention, checks, checks_02, diffusion, latents, models, scenes, setup, show
from lib import widgets_02 as draw

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "02_self_attention.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "softmax": "e = (scores - scores.amax(dim, keepdim=True)).exp()\n    return e / e.sum(dim, keepdim=True)",
    "scaled_attention": "return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v",
    "multi_head": "B, N, C = q.shape\n"
                  "    cut = lambda x: x.view(B, -1, heads, C // heads).permute(0, 2, 1, 3)\n"
                  "    out = F.scaled_dot_product_attention(cut(q), cut(k), cut(v))\n"
                  "    return out.permute(0, 2, 1, 3).reshape(B, N, C)",
    "attention_cost": "return tokens * tokens * heads, 2 * tokens * tokens * heads * head_width",
    "blend_tokens": "m = F.adaptive_avg_pool2d(mask, size).flatten(2).mT\n"
                    "    return own + m * (source - own)",
}


@pytest.fixture(scope="module")
def looked():
    """(picture, self-attention weights at two timesteps, the layers) of a random pipeline."""
    from lib.train import tiny_pipeline
    pipe = tiny_pipeline()
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return picture, draw.record_looks(pipe, picture, "a red chair", (701, 41)), attention.layers(pipe.unet)


# ---------------------------------------------------------------- form and promises

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "## 1 · Settings",
             "## 2 · The idea", "## 3 · From scratch", "## 4 · Why divide", "## 5 · Several heads",
             "## 6 · Attention does not know", "## 7 · The bill", "## 8 · Where the layers sit",
             "## 9 · The attention explorer", "## 10 · Cross-attention", "## 11 · What keys carry",
             "## 12 · Your turn", "## 13 · Recap", "## 14 · The same with Stable Diffusion",
             "## 15 · Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


def test_what_a_source_gets_wrong_is_said():
    (said,) = re.findall(r"\*\*\(!\)\*\*.+", WORDS)
    assert r"\sqrt{64}" in said and "forgets" in said
    assert "not a claim about any model" in WORDS


def test_markdown_has_no_broken_escapes():
    assert not re.search(r"[\a\b\f\v\t\r]", WORDS)
    assert WORDS.count("$") % 2 == 0


def test_the_figures_show_the_lessons_own_rooms():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in draw.PAIR} == draw.PAIR and parameters["PICTURE"] == draw.PICTURE
    for seed in (*draw.PAIR.values(), draw.PICTURE):
        assert scenes.split_of(seed) == "test"
    assert len({t.colour for t in scenes.sample(draw.PICTURE).things}) == 4    # "four chairs in four colours"
    assert {t.kind for t in scenes.sample(draw.PICTURE).things} == {"chair"}
    assert [t.kind for t in scenes.sample(draw.PAIR["FROM"]).things] == ["ball", "chair"]


@pytest.mark.parametrize("given", [
    {"STEPS": 0}, {"STEPS": 1000}, {"STEPS": 2.5}, {"TOKENS": 10**6}, {"TOKENS": "many"}, {"PICTURE": 5}, {"FROM": 5}, {"TO": 7},
    {"TO": 10**9}, {"TO": draw.PAIR["FROM"]}])
def test_wrong_parameters_are_refused_before_anything_runs(given):
    with pytest.raises(ValueError, match="STEPS must be 1 to 999"):
        exec(CODE["configure"], {"setup": setup, **setup.notebook_parameters(PATH), **given})


def test_the_explorer_starts_on_the_ball():
    x, y = map(float, re.search(r"x=(0\.\d+), y=(0\.\d+)", CODE["explorer"]).groups())
    scene = scenes.sample(draw.PAIR["FROM"])
    ids = scenes.render(scene).ids[0, 0]
    assert scene.things[int(ids[int(y * 128), int(x * 128)])].kind == "ball"


def test_nothing_shared_is_stored_about_time_or_quality():
    """No measured figure is typed: percentages, dB and seconds of this lesson come from its code."""
    assert not re.search(r"\d+(\.\d+)? (dB|ms|seconds)\b", WORDS)
    assert set(re.findall(r"\d+ %", WORDS)) <= {"0 %", "100 %"}


# ---------------------------------------------------------------- what the text says, run

def run_cells(*names, **space):
    space = {"torch": torch, "F": F, "math": math, "draw": draw, "lib_attention": attention,
             "diffusion": diffusion, "scenes": scenes, "show": show, "run": setup.configure("mini", 0, True),
             "display": lambda x: x, "tolerance": 1e-5, **space}
    for name in names:
        exec(CODE[name], space)
    return space


def test_it_looks_at_the_cat_and_then_at_the_dog(capsys):
    space = run_cells("toy-vectors", "toy-change")
    said = capsys.readouterr().out.splitlines()
    assert "cat" in said[0] and "dog" in said[1]
    row = space["weights"][space["words"].index("it")]
    order = [space["words"][i] for i in row.argsort(descending=True)[:2]]
    assert order == ["cat", "dog"]
    assert torch.allclose(space["weights"].sum(-1), torch.ones(9))
    assert torch.allclose(space["weights"][0], torch.tensor(1 / 9))


def test_the_worked_example_has_the_shapes_of_the_course(capsys):
    space = run_cells("shapes-qkv", "shapes-attention", "own-attention", "mixture")
    names = ("features", "tokens", "Q", "K", "V", "scores", "weights", "out")
    shapes = {n: tuple(space[n].shape) for n in names}
    assert shapes == {"features": (1, 256, 64, 64), "tokens": (4096, 256), "Q": (4096, 64), "K": (4096, 64),
                      "V": (4096, 256), "scores": (4096, 4096), "weights": (4096, 4096), "out": (4096, 256)}
    by_hand = space["Q"][7] @ space["K"][9] / 8                              # token 7 asks, token 9 answers
    assert space["scores"][7, 9] == pytest.approx(float(by_hand), rel=1e-4)
    assert torch.equal(space["back"][0, :, 1, 2], space["out"][64 + 2])      # row by row


def test_the_scale_keeps_the_scores_at_one():
    space = run_cells("scale-measure", "scale-jacobian")
    for d, std, root, scaled, top_raw, top, *_ in space["rows"]:
        assert std == pytest.approx(root, rel=0.1) and scaled == pytest.approx(1, rel=0.1)
    tops = [row[4] for row in space["rows"]]
    assert tops == sorted(tops) and tops[-1] > 0.8 and max(row[5] for row in space["rows"]) < 0.1


def test_built_in_the_lesson_equals_the_library(tiny_pipe):
    space = run_cells("shapes-qkv", "own-attention", "heads", "heads-torch")
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, 12, generator=g)
    assert torch.equal(space["split_heads"](x, 3), attention.split_heads(x, 3))
    assert torch.equal(space["merge_heads"](space["split_heads"](x, 3)), x)
    assert torch.equal(attention.merge_heads(attention.split_heads(x, 3)), x)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=g) for _ in range(3))
    assert torch.equal(space["attention"](q, k, v), attention.attention(q, k, v))
    built = {n: space[n] for n in ("attention", "split_heads", "merge_heads")}
    run_cells("heads-mini", "position-shuffle", pipe=tiny_pipe, **built)


def test_the_exercises_answers_equal_the_library():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 5, 8, generator=g) for _ in range(3))
    assert torch.allclose(checks_02.scaled_attention(q, k, v), attention.attention(q, k, v), atol=1e-6)
    heads = [attention.split_heads(x, 2) for x in (q, k, v)]
    merged = attention.merge_heads(attention.attention(*heads))
    assert torch.allclose(checks_02.multi_head(q, k, v, 2), merged, atol=1e-6)
    assert checks_02.attention_cost(64, 4, 16) == tuple(attention.cost(64, 4, 16).values())
    assert torch.allclose(checks_02.softmax(q * 90, 1), (q * 90).softmax(1), atol=1e-6)
    own, source = torch.randn(2, 1, 12, 4, generator=g)
    mask = torch.rand(1, 1, 24, 32, generator=g)
    blended = checks_02.blend_tokens(own, source, mask, (3, 4))
    theirs = attention._blend(own, source, attention.pool_mask(mask, (3, 4)))
    assert torch.allclose(blended, theirs, atol=1e-6)


def test_the_tables_of_layers(tiny_pipe):
    space = run_cells("where", pipe=tiny_pipe)
    rows = space["layer_rows"](space["sd15"])
    assert len(rows) == 16 and rows[0][2:6] == ["64 x 64", 4096, 8, 40]
    assert rows[6][1:4] == ["mid", "8 x 8", 64]
    assert rows[0][6] == pytest.approx(134.217728)
    assert len(space["layer_rows"](tiny_pipe.unet)) == 10


def test_time_and_memory_measures_what_is_allocated():
    def run():
        held = torch.ones(50 * 2**18) + 1                   # 50 MB, for longer than the meter's 10 ms
        time.sleep(0.1)
        return held

    seconds, extra = draw.time_and_memory(run, repeats=2)
    assert 0 < seconds < 30 and extra > 40


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_memory_built_in_freed_blocks_is_measured_too():
    torch.ones(7 * 2**20)                                   # freed: from now on glibc keeps 28 MB blocks on its heap
    blocks = [torch.ones(5 * 2**20) for _ in range(12)]
    pin = blocks.pop()                                      # beyond them, so that the heap can't shrink
    blocks.clear()
    _, extra = draw.time_and_memory(lambda: (torch.ones(50 * 2**18) + 1, time.sleep(0.1))[0], repeats=1)
    assert extra > 40 and pin.any()


def test_the_slope_of_a_power_is_its_exponent():
    source = CODE["cost-curves"].split("seconds, memory")[0]
    space = {"torch": torch}
    exec(source, space)
    sizes = [256, 512, 1024, 2048]
    assert space["slope"](sizes, [n**2 * 3e-6 for n in sizes]) == pytest.approx(2)


def test_lift_is_one_by_chance_and_more_on_purpose():
    space = run_cells("lift")
    ids = torch.full((1, 1, 16, 16), -1)
    ids[..., :8, :8] = 0
    inside = (ids == 0).float().flatten()
    even = torch.full((2, 256, 256), 1 / 256)
    assert space["lift"](even, ids, (16, 16)) == [pytest.approx(1.0, rel=1e-4)]
    own = torch.where(inside[:, None] > 0, inside[None] / inside.sum(), even[0]).expand(2, -1, -1)
    assert space["lift"](own, ids, (16, 16)) == [pytest.approx(4.0, rel=1e-4)]


def test_distances_tell_colour_from_structure():
    a = scenes.render(scenes.sample(draw.PAIR["FROM"])).rgb
    tinted = (a * torch.tensor([0.5, 1.0, 0.6]).view(1, 3, 1, 1))
    shifted = a.roll(16, -1)
    assert draw.colour_distance(a, a) == 0 and abs(draw.structure_distance(a, a)) < 1e-5
    assert draw.structure_distance(a, tinted) < 0.1 < draw.structure_distance(a, shifted)
    assert draw.colour_distance(a, tinted) > draw.colour_distance(a, shifted)
    assert draw.colour_towards(a, a, tinted) == 0
    assert draw.colour_towards(tinted, a, tinted) == pytest.approx(1, rel=1e-4)
    assert draw.colour_towards((a + tinted) / 2, a, tinted) == pytest.approx(0.5, rel=1e-4)


def test_swapping_runs_on_any_pipeline(tiny_pipe):
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    before = dict(tiny_pipe.unet.attn_processors)
    results = draw.swapped(tiny_pipe, pictures, ["a red chair", "a blue ball"], steps=2)
    assert list(results) == ["own", "other", "k", "v", "kv"]
    assert all(x.shape == (1, 3, 128, 128) and torch.isfinite(x).all() for x in results.values())
    names = list(results)
    assert all((results[a] - results[b]).abs().max() > 1e-5 for i, a in enumerate(names) for b in names[:i])
    assert all(before[n] is p for n, p in tiny_pipe.unet.attn_processors.items())


def test_words_are_found_with_their_places(tiny_pipe):
    assert draw.words_of(tiny_pipe, "a red chair") == [(1, "a"), (2, "red"), (3, "chair")]


# ---------------------------------------------------------------- the explorer

@pytest.mark.parametrize("what", (draw.HEADS, draw.LAYERS))
@pytest.mark.parametrize("x, y, number, t", [(0.0, 0.0, 1, 41), (0.66, 0.6, 10, 701), (1.0, 1.0, 5, 41)])
def test_explorer_at_min_default_max(looked, x, y, number, t, what):
    view = draw.explorer_view(*looked, x, y, number, t, what)
    assert view.width >= 3 * 256 and np.asarray(view).std() > 10
    said = draw.explorer_text(looked[1], looked[2], x, y, number, t)
    assert said.startswith(f"layer {number} of 10") and f"t = {t}" in said


def test_explorer_shows_the_recorded_weights(looked):
    picture, bank, layers = looked
    token, maps = draw.looks_from(bank, layers[0], 41, 0.99, 0.01)
    assert token == 15 and maps.shape == (4, 16, 16)
    assert torch.allclose(maps.flatten(1), bank.at(41, layers[0].name)["w"][0, :, 15])
    assert torch.allclose(maps.sum((1, 2)), torch.ones(4), atol=1e-5)


def test_explorer_names_what_is_not_there(looked):
    for words, place in (("layers 1 to 10", (0.5, 0.5, 11, 41)), ("timestep 7", (0.5, 0.5, 1, 7)),
                         ("run from 0", (1.5, 0.5, 1, 41))):
        with pytest.raises(ValueError, match=words):
            draw.explorer_view(*looked, *place)
    with pytest.raises(ValueError, match="all layers"):
        draw.explorer_view(*looked, 0.5, 0.5, 1, 41, "nothing")
    with pytest.raises(ValueError, match="one map"):
        draw.heat(looked[0], torch.rand(1, 4, 8, 8))


def test_controls_and_clicks_move_the_maps(looked):
    pytest.importorskip("anywidget")
    beside, text, picture = draw.attention_explorer(*looked, x=0.2, y=0.3).children
    clicker, controls = beside.children
    x, y, number, t, what = controls.children
    assert (x.value, y.value, number.value, t.value, what.value) == (0.2, 0.3, 10, 41, draw.HEADS)
    seen = {picture.value}
    for control, value in ((x, 0.9), (y, 1.0), (number, 1), (t, 701), (what, draw.LAYERS)):
        control.value = value
        seen.add(picture.value)
    assert len(seen) == 6 and "layer 1 of 10" in text.value and "t = 701" in text.value
    clicker.x, clicker.y = 0.5, 0.25                                   # what a click in the browser does
    assert (x.value, y.value) == (0.5, 0.25) and picture.value not in seen
    assert clicker.source.startswith("data:image/png;base64,")


def test_explorer_works_without_anywidget(looked, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "anywidget", None)
    assert len(draw.attention_explorer(*looked).children) == 7


def test_strips_of_the_explorer_and_of_the_words(tiny_pipe):
    images, labels = draw.explorer_strip(tiny_pipe, times=(41,), numbers=(1, 10))
    assert len(images) == len(labels) == 3 and labels[1].startswith("layer 1: down, 16x16\nbrightest = ")
    images, labels = draw.words_strip(tiny_pipe, times=(401,))
    assert labels == ["t = 401", *(f'"chair" after "{c}"' for c in ("orange", "white", "red", "blue"))]
    assert all(x.shape == (1, 3, 128, 128) for x in images)


def test_each_noun_of_the_stored_picture_is_read_at_its_own_thing():
    """What text and alt say of the shipped weights: a failure means that they must be rewritten."""
    pipe = models.load("mini", quiet=True)
    scene = scenes.sample(draw.PICTURE)
    made, prompt = scenes.render(scene), scene.caption()
    bank = draw.record_looks(pipe, made.rgb, prompt, (801, 41), kind="cross")
    layers = [x for x in attention.layers(pipe.unet, "cross") if x.fraction >= 0.5]
    listed, names = draw.words_of(pipe, prompt), [thing.name.split() for thing in scene.things]
    nouns = draw.noun_places(listed, names)
    colours = [dict((w, p) for p, w in listed)[name[0]] for name in names]

    def lift(place, thing, t):
        m = draw.word_map(bank, layers, t, place, bank.size)
        inside = F.adaptive_avg_pool2d((made.ids == thing).float(), m.shape[-2:])
        return float((m * inside).sum() / inside.sum() / m.mean())

    for i, (noun, colour) in enumerate(zip(nouns, colours)):
        assert lift(noun, i, 41) > 3 and lift(noun, i, 41) > lift(noun, i, 801)
        others = [*nouns[:i], *nouns[i + 1:], colour]
        assert all(lift(noun, i, 41) > 1.5 * lift(other, i, 41) for other in others)


@pytest.mark.parametrize("seed, strays", [(0, True), (1, False)])
def test_which_word_goes_astray_depends_on_the_noise(seed, strays):
    """"In the noisiest maps above, and in the stored ones, the orange chair's word still points at another chair."""
    pipe = models.load("mini", quiet=True)
    scene = scenes.sample(draw.PICTURE)
    made, prompt = scenes.render(scene), scene.caption()
    layers = [x for x in attention.layers(pipe.unet, "cross") if x.fraction >= 0.5]
    names = [thing.name.split() for thing in scene.things]
    place = draw.noun_places(draw.words_of(pipe, prompt), names)[0]
    bank = draw.record_looks(pipe, made.rgb, prompt, (701,), kind="cross", seed=seed)
    m = draw.word_map(bank, layers, 701, place, bank.size)
    inside = [F.adaptive_avg_pool2d((made.ids == i).float(), m.shape[-2:]) for i in range(4)]
    on = [float((m * x).sum() / x.sum()) for x in inside]
    assert names[0] == ["orange", "chair"] and (max(on) != on[0]) == strays


def test_the_words_behind_a_noun_are_read_with_it(capsys):
    """The lines below the table: each thing's three words hold its noun; some word behind a noun gets as much."""
    pipe = models.load("mini", quiet=True)
    run_cells("cross-record", "cross-maps", "cross-most", pipe=pipe, PICTURE=draw.PICTURE,
              times=(701, 401, 201, 41), latents=latents, scheduler=diffusion.ddim(pipe, 50))
    said = capsys.readouterr().out.strip().splitlines()[-4:]
    nouns = {"orange": 3, "white": 9, "red": 13, "blue": 17}
    behind = 0
    for line, (colour, place) in zip(said, nouns.items()):
        assert line.startswith(f"the {colour} chair looks most at") and f"chair ({place})" in line
        shares = {int(p): int(v) for p, v in re.findall(r"\((\d+)\) (\d+)%", line)}
        behind += shares.get(place + 1, 0) >= shares[place] > 0 or shares.get(place + 2, 0) >= shares[place]
    assert behind >= 1


def test_nouns_are_found_behind_their_own_colour():
    listed = list(enumerate("a red chair behind a blue chair".split(), 1))
    assert draw.noun_places(listed, [["blue", "chair"], ["red", "chair"], ["red", "ball"]]) == [7, 3, None]
    glass = list(enumerate("a red glass ball".split(), 1))                       # else its room has no word map
    assert draw.noun_places(glass, [["red", "glass", "ball"], ["red", "ball"]]) == [4, None]


def test_a_frame_is_drawn_around_the_right_token():
    framed = draw.mark(torch.zeros(1, 3, 128, 128), (16, 16), 18)                # row 1, column 2
    lit = framed[0, 1].nonzero()
    assert lit.min(0).values.tolist() == [8, 16] and lit.max(0).values.tolist() == [15, 23]


# ---------------------------------------------------------------- exercises

def test_the_usual_mistakes_are_named():
    """The mistakes that issue and lesson speak of, written as a student would."""
    for answer, mistake in [
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, "no scale"),
        (lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(1) @ v, "softmax over the queries"),
        (lambda q, k, v: (q @ k / q.shape[-1] ** 0.5).softmax(-1) @ v, "K not transposed"),
    ]:
        assert checks.find("scaled_attention").run(answer).mistake == mistake
    wide = lambda q, k, v, heads: attention.merge_heads(
        attention.attention(*(attention.split_heads(x, heads) for x in (q / heads**0.5, k, v))))
    assert checks.find("multi_head").run(wide).mistake == "sqrt of the model width"
    broken = checks.find("scaled_attention").run(lambda q, k, v: q.no_such_thing())
    assert broken.status == "fail" and "AttributeError" in broken.message and broken.mistake == ""


_look = lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


def _pooled(mask, size):
    return F.adaptive_avg_pool2d(mask, size).flatten(2)


@pytest.mark.parametrize("name, answer, mistake", [
    ("softmax", lambda s, dim: (s - s.max()).exp() / (s - s.max()).exp().sum(dim, keepdim=True),
     "one maximum for all rows"),
    ("softmax", lambda s, dim: s.exp() / s.exp().sum(dim), "no keepdim"),
    ("softmax", lambda s, dim: s.exp() / s.exp().sum(), "over everything, no maximum"),
    ("scaled_attention", lambda q, k, v: (q @ k.permute(2, 1, 0)).div(q.shape[-1] ** 0.5).softmax(-1) @ v,
     "k.T turns the batch, too"),                           # k.T itself: deprecated for three axes
    ("scaled_attention", lambda q, k, v: (q * k / q.shape[-1] ** 0.5).softmax(-1) * v, "multiplied place by place"),
    ("scaled_attention", lambda q, k, v: _look(q, k, v) * v, "weights times V place by place"),
    ("scaled_attention", lambda q, k, v: (q @ k.mT / q.shape[1] ** 0.5).softmax(-1) @ v,
     "sqrt of the number of queries"),
    ("multi_head", lambda q, k, v, heads: attention.attention(
        *(x.unflatten(-1, (heads, -1)) for x in (q, k, v))).flatten(2), "heads not moved"),
    ("multi_head", lambda q, k, v, heads: sum(attention.attention(*x) for x in zip(
        *(y.chunk(heads, -1) for y in (q, k, v)))), "heads added"),
    ("attention_cost", lambda n, heads, d: (heads * n * n, 2 * n * n * d), "heads forgotten in the products"),
    ("attention_cost", lambda n, heads, d: (2 * heads * n * n * d, heads * n * n), "other order"),
    ("blend_tokens", lambda own, src, mask, size: own + _pooled(mask, size) * (src - own), "mask not transposed"),
    ("blend_tokens", lambda own, src, mask, size: own + _pooled(mask.round(), size).mT * (src - own), "hard mask"),
    ("blend_tokens", lambda own, src, mask, size: own + _pooled(mask[:1], size).mT * (src - own),
     "one mask for all pictures"),
])
def test_more_usual_mistakes_are_named(name, answer, mistake):
    result = checks.find(name).run(answer)
    assert (result.status, result.mistake) == ("fail", mistake), result.message


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_mistakes_that_fit_no_shape_are_told_apart(name):
    item = checks.find(name)
    for wrong in getattr(item, "misfits", ()):
        result = item.run(wrong.answer)
        assert (result.status, result.mistake, result.message) == ("fail", wrong.name, wrong.message)


def test_right_answers_in_another_style_pass():
    for name, answer in [
        ("softmax", lambda s, dim: s.log_softmax(dim).exp()),
        ("softmax", lambda s, dim: (s.double() - s.double().logsumexp(dim, keepdim=True)).exp().float()),
        ("scaled_attention", F.scaled_dot_product_attention),
        ("scaled_attention", lambda q, k, v: torch.einsum("bqk,bkd->bqd", _look(q, k, v), v)),
        ("multi_head", lambda q, k, v, heads: torch.cat([attention.attention(*x) for x in zip(
            *(y.chunk(heads, -1) for y in (q, k, v)))], -1)),
        ("attention_cost", lambda n, heads, d: (torch.tensor(heads * n * n), 2.0 * heads * n * n * d)),
        ("attention_cost", lambda n, heads, d: [np.int64(heads * n * n), np.int64(2 * heads * n * n * d)]),
        ("blend_tokens", lambda own, src, mask, size: torch.lerp(own, src, _pooled(mask, size).mT)),
        ("blend_tokens", lambda own, src, mask, size: own + F.interpolate(
            mask, size, mode="area").reshape(len(own), -1, 1) * (src - own)),
    ]:
        result = checks.find(name).run(answer)
        assert result.status == "pass", result.message


def test_nothing_depends_on_a_stub():
    at = list(CODE).index("checks-import")
    trees = [ast.parse(CODE[f"ex{i}-code"]) for i in range(1, 6)]
    made = {n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}
    later = "\n".join(CODE[name] for name in list(CODE)[at:] if not name.startswith("ex"))
    assert made == set(ANSWERS) and not any(name in later for name in made)


@pytest.mark.slow
def test_lesson_02_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 3, "TOKENS": 1024, "STEPS": 3,
             "FROM": 20000027, "TO": 20000003, "PICTURE": 20000009}
    out = setup.run_notebook(PATH, tmp_path / "02.ipynb", given, timeout=300)
    cells = nbformat.read(out, 4).cells
    assert any("SEED = 3" in c.source for c in cells if "injected-parameters" in c.metadata.get("tags", []))
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 10
    with pytest.raises(ValueError, match="has no parameter TOKEN"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"TOKEN": 3})
