"""Lesson 03: its form beyond the common one, its built pieces, its exercises, its widgets and its promises."""
import ast
import contextlib
import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn

from lib import checks, diffusion, setup, widgets_03

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "03_ddpm_from_scratch.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
EXERCISES = ("q_sample", "posterior", "ddpm_step", "ddim_step", "guide")


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- form
def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "1 · Settings", "2 · Into the noise",
             "3 · Schedules", "4 · The way back", "5 · What to train for", "6 · A problem with a known answer",
             "7 · The network", "8 · Train it", "9 · Out of the noise", "10 · Classifier-free guidance",
             "11 · The same in latents", "12 · Your turn", "13 · Recap", "14 · The same with Stable Diffusion",
             "15 · Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3
    assert re.search(r"\*\*\(!\)\*\*.+at sampling time \$x_0\$ is unknown", WORDS)


def test_nothing_but_the_exercises_uses_the_exercises():
    """The lesson's own pieces have other names, so that a wrong answer cannot break a cell that is run again."""
    for name, source in CODE.items():
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        assert name.endswith("-code") or not names & (set(EXERCISES) - {"guide"}), name


@pytest.mark.parametrize("wrong", [{"STEPS": 501}, {"STEPS": 0}, {"TRAIN_STEPS": 0}, {"SIZE": 60}, {"TRAIN_SIZE": 20},
                                   {"KIND": "sofa"}])
def test_a_parameter_that_cannot_be_is_refused_before_anything_runs(wrong):
    space = {"setup": setup}
    exec(CODE["parameters"], space)
    exec(CODE["configure"], {**space, "SMOKE": True})
    with pytest.raises(ValueError, match="STEPS must be 1 to 500"):
        exec(CODE["configure"], {**space, **wrong})


def test_the_parts_that_are_swapped_are_the_skip_and_what_comes_from_below():
    """The picture's own noise reaches the output by the finest skip alone; the hooks are gone afterwards."""
    (changed,) = lifted("changed", shipped=(net := diffusion.load_teach()), contextmanager=contextlib.contextmanager)
    seen = []
    handle = net.up0.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    x, fine = rand(2, 3, 16, 16), net.config["channels"][0]
    skip = []
    other = net.down0.register_forward_hook(lambda m, i, o: skip.append(o))
    plain = net(x, 400)
    assert torch.equal(seen[0][:, -fine:], skip[0])                      # the last `fine` channels are the skip
    with changed("up0", before=lambda x: torch.cat([x[:, :-fine], x[:, -fine:].roll(1, 0)], dim=1)):
        assert not torch.allclose(net(x, 400), plain, atol=1e-2)
    with changed("mid_attention", after=lambda x, y: x):
        assert not torch.equal(net(x, 400), plain)
    assert torch.equal(net(x, 400), plain)
    handle.remove(), other.remove()


def test_the_table_of_swapped_parts_shows_what_is_said_of_it():
    """A stranger's finest skip brings a stranger's noise (error 2); a stranger's coarse features still let most be found."""
    class Seen:
        def table(self, rows, head):
            self.rows = {name: numbers for name, *numbers in rows}
    class Seeds:
        device = "cpu"
        generator = staticmethod(lambda k: torch.Generator().manual_seed(k))
    rooms, _ = diffusion.teach_pictures(3, 64, "val")
    space = {"shipped": diffusion.load_teach(), "rooms": rooms, "cosine": diffusion.teach_scheduler(), "run": Seeds(),
             "show": (seen := Seen()), "torch": torch, "diffusion": diffusion}
    for cell in ("ablate", "noise-error", "ablate-table"):
        exec(CODE[cell], space)
    rows = {name.split()[-1]: numbers for name, numbers in seen.rows.items()}
    assert all(1.7 < error < 2.5 for error in rows["skip"])
    for plain, coarse, told in zip(rows["network"], rows["features"], rows["high)"]):
        assert 2 * plain < coarse < 0.9 and told > 2 * plain


# ---------------------------------------------------------------- the pieces that are built in the notebook
def lifted(*names, **space):
    """Functions and classes of the notebook by name, in a namespace of their own."""
    space = {"torch": torch, "nn": nn, "math": math, "diffusion": diffusion, **space}
    found = {}
    for source in CODE.values():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names and node.name not in found:
                exec(compile(ast.Module([node], []), "notebook", "exec"), space)
                found[node.name] = space[node.name]
    assert set(found) == set(names)
    return [found[name] for name in names]


@pytest.fixture
def linear():
    from diffusers import DDPMScheduler
    return DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)


def test_the_forward_pieces_are_the_librarys(linear):
    betas = diffusion.make_betas("linear")
    names = {"betas": betas, "abar": diffusion.alphas_cumprod(betas)}
    step, jump, back = lifted("forward_step", "jump", "way_back", **names)
    x0, x, noise = rand(1, 3, 8, 8), rand(1, 3, 8, 8, seed=1), rand(1, 3, 8, 8, seed=2)
    for t in (1, 300, 999):
        assert torch.equal(step(x, betas[t], noise), diffusion.q_step(x, betas[t], noise))
        assert torch.allclose(jump(x0, t, noise), diffusion.q_sample(linear, x0, t, noise), atol=1e-6)
        for ours, library in zip(back(x0, x, t), diffusion.posterior(linear, x0, x, t)):
            assert torch.allclose(ours, library, atol=1e-3)


def test_the_samplers_steps_are_the_librarys():
    ddim, ddpm, guide = lifted("ddim_down", "ddpm_down", "guide")
    scheduler = diffusion.ddim(diffusion.teach_scheduler(), 20)
    eps, x = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
    make = lambda: torch.Generator().manual_seed(3)
    for t in scheduler.timesteps[[0, 9, 18, 19]].tolist():
        a, a_prev = (diffusion.alpha_at(scheduler, k) for k in (t, diffusion.previous(scheduler, t)))
        assert torch.allclose(ddim(eps, x, a, a_prev), diffusion.ddim_step(scheduler, eps, t, x), atol=1e-5)
        noise = torch.randn(x.shape, generator=make())
        assert torch.allclose(ddpm(eps, x, a, a_prev, noise), diffusion.ddpm_step(scheduler, eps, t, x, make()), atol=1e-5)
    assert torch.equal(guide(eps, x, 3.0), diffusion.cfg(eps, x, 3.0))


def test_the_networks_pieces_are_the_librarys():
    embedding, norm = lifted("timestep_embedding", "AdaGN")
    t = torch.tensor([0, 17, 999])
    assert torch.equal(embedding(t, 32), diffusion.timestep_embedding(t, 32))
    ours, library = norm(16, 24), diffusion.AdaGN(16, 24)
    nn.init.normal_(library.affine.weight)
    ours.load_state_dict(library.state_dict())
    assert torch.equal(ours(rand(2, 16, 4, 4), rand(2, 24)), library(rand(2, 16, 4, 4), rand(2, 24)))


def test_the_notebooks_loss_trains():
    (simple_loss,) = lifted("simple_loss")
    torch.manual_seed(0)
    model = diffusion.TeachUNet((16, 16, 16), 16)
    x0, label = rand(4, 3, 16, 16).clamp(-1, 1), torch.tensor([0, 1, 2, 6])
    args = model, diffusion.teach_scheduler(), x0, label
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = simple_loss(*args, torch.Generator().manual_seed(1))
    for step in range(40):
        loss = simple_loss(*args, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert simple_loss(*args, torch.Generator().manual_seed(1)) < 0.8 * first


# ---------------------------------------------------------------- exercises
ANSWERS = {
    "q_sample": ("a = (1 - betas).cumprod(0)[t]\n    return a.sqrt() * x0 + (1 - a).sqrt() * noise",
                 "a = (1 - betas)[t]\n    return a.sqrt() * x0 + (1 - a).sqrt() * noise", "alpha for alpha-bar"),
    "posterior": ("a = (1 - betas).cumprod(0)\n    m = a[t - 1].sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * "
                  "(1 - a[t - 1]) * x_t\n    return m / (1 - a[t]), (1 - a[t - 1]) / (1 - a[t]) * betas[t]",
                  "a = (1 - betas).cumprod(0)\n    m = a[t - 1].sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * "
                  "(1 - a[t - 1]) * x_t\n    return m / (1 - a[t]), betas[t]", "beta for the variance"),
    "ddpm_step": ("a = (1 - betas).cumprod(0)[t]\n    m = (x - betas[t] / (1 - a).sqrt() * eps) / (1 - betas[t]).sqrt()\n"
                  "    return m + (t > 0) * betas[t].sqrt() * noise",
                  "a = (1 - betas).cumprod(0)[t]\n    m = (x - betas[t] / (1 - a).sqrt() * eps) / (1 - betas[t]).sqrt()\n"
                  "    return m + betas[t].sqrt() * noise", "noise at the last step"),
    "ddim_step": ("x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()\n"
                  "    return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * eps",
                  "return (x - (1 - abar).sqrt() * eps) / abar.sqrt()", "stops at x_0"),
    "guide": ("return (1 - scale) * uncond + scale * cond", "return cond + scale * (cond - uncond)", "offset")}


@pytest.mark.parametrize("number, name", enumerate(EXERCISES, 1))
def test_right_and_wrong_answers_written_into_the_cell(number, name, capsys):
    source = CODE[f"ex{number}-code"]
    assert source.count("    ...\n") == 1
    right, wrong, mistake = ANSWERS[name]
    exec(source.replace("    ...\n", f"    {right}\n"), {"check": checks.check})
    assert f"[ok] {name}" in capsys.readouterr().out
    exec(source.replace("    ...\n", f"    {wrong}\n"), {"check": checks.check})
    assert checks.RESULTS[name].mistake == mistake


def by_hand(x0, t, noise, betas):
    """The jump in plain Python: a loop and roots of floats."""
    left = 1.0
    for i in range(t + 1):
        left *= 1 - float(betas[i])
    return math.sqrt(left) * x0 + math.sqrt(1 - left) * noise


def precisions(x0, x_t, t, betas):
    """The posterior as a product of two Gaussians: precisions add up."""
    a = (1 - betas[:t]).prod()
    variance = 1 / ((1 - betas[t]) / betas[t] + 1 / (1 - a))
    return ((1 - betas[t]).sqrt() / betas[t] * x_t + a.sqrt() / (1 - a) * x0) * variance, variance


def through_x0(eps, t, x, noise, betas):
    """The DDPM step as section 9 has it, by the predicted picture, with the variance beta; picture by picture."""
    a = (1 - betas).cumprod(0)
    x0 = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
    mean = x0 if t == 0 else precisions(x0, x, t, betas)[0]
    return torch.stack([m + (betas[t].sqrt() * n if t else 0) for m, n in zip(mean, noise)])


def number(convert):
    return lambda *given: (precisions(*given)[0], convert(precisions(*given)[1]))


@pytest.mark.parametrize("name, answer", [
    ("q_sample", by_hand), ("q_sample", lambda x0, t, noise, betas: checks.find("q_sample").reference(x0, t, noise, betas.double())),
    ("posterior", precisions), ("posterior", number(float)), ("posterior", number(lambda v: v.view(1, 1, 1, 1))),
    ("posterior", number(lambda v: v.double())), ("posterior", number(lambda v: v.numpy())), ("ddpm_step", through_x0),
    ("ddim_step", lambda eps, x, abar, abar_prev: (abar_prev / abar) ** 0.5 * x + eps * (
        math.sqrt(1 - abar_prev) - math.sqrt(abar_prev * (1 - abar) / abar))),
    ("guide", torch.lerp), ("guide", lambda uncond, cond, scale: cond + (scale - 1) * (cond - uncond))])
def test_a_right_answer_in_another_style_passes(name, answer):
    assert checks.find(name).run(answer).status == "pass"


@pytest.mark.parametrize("name, answer", [
    ("ddpm_step", lambda eps, t, x, noise, betas: through_x0(eps, t, x, noise * (t > 1), betas)),       # wrong at t = 1 only
    ("guide", lambda uncond, cond, scale: uncond + (scale or 1.0) * (cond - uncond)),                  # wrong at scale 0 only
    ("q_sample", lambda x0, t, noise, betas: by_hand(x0, max(t, 1), noise, betas)),                    # wrong at t = 0 only
    ("posterior", number(lambda v: v * torch.ones(2, 3, 4, 5)))])
def test_an_answer_that_is_wrong_in_one_place_fails(name, answer):
    assert checks.find(name).run(answer).status == "fail"


# ---------------------------------------------------------------- widgets
@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return diffusion.TeachUNet((16, 16, 16), 16).eval().requires_grad_(False)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
@pytest.mark.parametrize("t", (0, 300, 999))
def test_schedule_view_at_min_default_max(schedule, t):
    picture = torch.rand(1, 3, 16, 16)
    view = widgets_03.schedule_view(picture, schedule, t)
    assert view.mode == "RGB" and view.width >= 1000 and f"t = {t}" in widgets_03.schedule_text(schedule, t)
    from diffusers import DDIMScheduler
    kind = {"cosine": {"beta_schedule": "squaredcos_cap_v2"}}.get(schedule) or {
        "beta_schedule": schedule, **dict(zip(("beta_start", "beta_end"), diffusion.BETA_RANGE[schedule]))}
    noise = rand(*picture.shape)
    theirs = DDIMScheduler(**kind).add_noise(picture * 2 - 1, noise, torch.tensor([t]))
    assert torch.allclose(widgets_03.noisy(picture, schedule, t), theirs, atol=1e-5)


@pytest.mark.parametrize("schedule, t, message", [("sine", 3, "known: linear"), ("linear", 1000, "0 .* to 999"),
                                                  ("linear", -1, "whole number"), ("linear", 2.5, "whole number")])
def test_a_level_that_is_not_there_is_one_clear_error(schedule, t, message):
    with pytest.raises(ValueError, match=message):
        widgets_03.schedule_view(torch.rand(1, 3, 8, 8), schedule, t)


def test_schedule_panel_moves():
    box = widgets_03.schedules(torch.rand(1, 3, 16, 16))
    choice, slider, text, picture = box.children
    before = picture.value
    slider.value = 900
    assert picture.value != before and "t = 900" in text.value
    choice.value = "cosine"
    assert text.value.startswith("cosine") and (slider.min, slider.max) == (0, 999)


def test_walk_is_the_librarys_sampling_and_is_shown_at_min_default_max(model):
    path = widgets_03.walk(model, 3, 2.0, steps=4, size=16)
    assert [t for t, *_ in path] == [751, 501, 251, 1, -1]
    scheduler = diffusion.ddim(diffusion.teach_scheduler(), 4)
    again = diffusion.sample_loop(diffusion.guided(model, 3, 2.0), scheduler, rand(1, 3, 16, 16))
    assert torch.allclose(path[-1][1], again, atol=1e-6)
    for step in (0, 2, 4):
        view = widgets_03.walk_view(path, step)
        assert view.width >= 600 and f"step {step} of 4" in widgets_03.walk_text(path, step)
    for step in (-1, 5, 1.5):
        with pytest.raises(ValueError, match="0 .* to 4"):
            widgets_03.walk_view(path, step)


def test_denoising_panel_moves_and_computes_each_run_once(model, monkeypatch):
    runs = []
    monkeypatch.setattr(widgets_03, "walk", lambda *args, real=widgets_03.walk: runs.append(args) or real(*args))
    label, guidance, step, text, picture = widgets_03.denoising(model, steps=3, size=16).children
    before = picture.value
    step.value = 3
    step.value = 0
    assert len(runs) == 1 and picture.value != before and "step 0 of 3" in text.value
    label.value, guidance.value = 0, 1.0
    assert len(runs) == 3
    assert [name for name, _ in label.options] == ["anything", *diffusion.TEACH_KINDS]


def test_strips_have_a_label_for_each_picture(model):
    for images, labels in (widgets_03.schedule_strip(torch.rand(1, 3, 16, 16), (0, 999)),
                           widgets_03.walk_strip(widgets_03.walk(model, steps=5, size=16), 3)):
        assert len(images) == len(labels) == 6 and all(0 <= x.min() and x.max() <= 1 for x in images)
    made = widgets_03.samples(model, 1.0, 2, each=1, size=16)
    assert made.shape == (6, 3, 16, 16) and torch.isfinite(made).all()


# ---------------------------------------------------------------- promises
def test_the_shipped_model_is_small_and_its_prediction_is_better_than_nothing():
    model = diffusion.load_teach()
    assert sum(p.numel() for p in model.parameters()) <= 700_000
    folder = setup.data_dir() / "models" / "teach"
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 3e6
    assert {"README.md", "card.json", "config.json", "log_teach.csv", "model.safetensors"} <= {f.name for f in folder.iterdir()}
    rooms, labels = diffusion.teach_pictures(2, 64, "val")
    scheduler, noise = diffusion.teach_scheduler(), rand(2, 3, 64, 64)
    for t in (200, 600):
        x_t = diffusion.q_sample(scheduler, rooms * 2 - 1, t, noise)
        assert (model(x_t, t, labels) - noise).square().mean() < 0.3


def test_the_rooms_of_the_lesson_are_never_of_the_train_split():
    assert '"val")' in CODE["rooms"] and '"train"' not in CODE["rooms"]
    assert f"rooms[{widgets_03.ROOM}:" in CODE["rooms"]


def test_the_recipe_trains_resumes_and_exports(tmp_path, monkeypatch):
    from lib import train
    monkeypatch.setattr(train, "CACHE", tmp_path / "cache")
    train.train_teach(0, 2, batch=2, rooms=3)
    train.train_teach(0, 3, batch=2, rooms=3)
    assert train.checkpoint("teach")["step"] == 3
    train.export(tmp_path / "models", ["teach"])
    model = diffusion.load_teach(tmp_path / "models" / "teach")
    assert torch.isfinite(model(rand(1, 3, 64, 64), 500)).all()
    assert (tmp_path / "models" / "teach" / "README.md").read_text().startswith("# teach")


@pytest.mark.slow
def test_the_lesson_runs_with_other_parameters(tmp_path):
    out = setup.run_notebook(PATH, tmp_path / "03.ipynb", {"SMOKE": True, "SEED": 5, "SIZE": 32, "TRAIN_SIZE": 24,
                                                          "KIND": "ball", "GUIDANCE": 1.0}, timeout=400)
    pictures = [o for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 15
    with pytest.raises(ValueError, match="has no parameter TRAIN_STEP"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"TRAIN_STEP": 3})
