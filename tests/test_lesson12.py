"""Lesson 12: its form beyond the common one, its exercises, its widgets, the stored board, and its promises."""
import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from lib import benchmark, checks, metrics, models, setup, show, widgets_12

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "12_measuring_an_edit.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "zone_rmse": "s = ((edit - truth) ** 2 * zone).sum((1, 2, 3))\n    return (s / (3 * zone.sum((1, 2, 3)))).sqrt()",
    "ssim_window": "m = lambda v: (weights * v).sum()\n    mx, my = m(x), m(y)\n"
                   "    vx, vy, cov = m(x * x) - mx ** 2, m(y * y) - my ** 2, m(x * y) - mx * my\n"
                   "    c1, c2 = 1e-4, 9e-4\n    return (2 * mx * my + c1) * (2 * cov + c2) / "
                   "((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))",
    "frechet": "root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()\n"
               "    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * root",
    "unbiased_mmd": "n, m = len(kxx), len(kyy)\n    off = lambda k: k[~torch.eye(len(k), dtype=bool)].mean()\n"
                    "    return off(kxx) + off(kyy) - 2 * kxy.mean()",
    "paired_interval": "d = np.sort([np.mean(a[p] - b[p]) for p in picks])\n    return tuple(np.quantile(d, [0.025, 0.975]))",
}


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "Settings, and edits", "Four losses",
             "Pixel scores", "right depth?", "the VAE floor", "Which score sees which damage", "FID and KID", "How sure are we",
             "Many comparisons", "Goodhart", "The scoreboard", "Goals, set before the run", "same rows", "Your turn", "Recap",
             "The same with Stable Diffusion", "Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places) and WORDS.count("**(!)**") >= 4


def test_the_contract_of_the_lesson_stands_in_it():
    for word in ("L_{noise}", "L_{perc}", "L_{match}", "LPIPS", "feat_dist", "FID", "KID", "Inception", "depth RMSE", "ceiling",
                 "floor", "seam", "paired", "percentile interval", "Bonferroni", "python -m lib.benchmark"):
        assert word.lower() in (WORDS + "".join(CODE.values())).lower(), word
    numbered = re.findall(r"^## (\d+) · ", WORDS, re.M)
    assert numbered == [str(k + 1) for k in range(len(numbered))]


def test_no_measured_figure_is_typed_into_the_words():
    """Weights change: the words hold no RMSE, dB or share of today's models."""
    lesson = re.sub(r"<details>.*?</details>", "", WORDS, flags=re.S)
    assert not re.findall(r"\b0\.\d{3,}\b", lesson)
    assert {*re.findall(r"(\d+(?:\.\d)?) dB", lesson)} <= {"1", "6", "48"}         # a goal and two pieces of arithmetic


def test_the_figures_show_the_lessons_own_rooms():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in widgets_12.EXAMPLE} == widgets_12.EXAMPLE
    with pytest.raises(ValueError, match="FIRST must be a test seed"):
        widgets_12.example(5)


@pytest.mark.parametrize("bad", [{"ROOMS": 0}, {"SETS": 32}, {"STEPS": 0}])
def test_wrong_parameters_are_refused_before_anything_is_loaded(bad):
    from types import SimpleNamespace
    asked = SimpleNamespace(configure=lambda *given: SimpleNamespace(smoke=True))
    with pytest.raises(ValueError, match=next(iter(bad))):
        exec(CODE["configure"], {**setup.notebook_parameters(PATH), **bad, "setup": asked})


def test_no_cell_writes_again_what_the_library_has():
    defined = set(re.findall(r"^def (\w+)", "\n".join(CODE.values()), re.M))
    assert defined == {"ready", "use_folder", "install", "find_course", "perceptual", "matching", "per_layer", "ssim_map",
                       "depth_errors", "reactions", "curve", "coverage", "wins", "goals", "more_goals", *ANSWERS}


# ---------------------------------------------------------------- exercises

def test_exercises_are_the_librarys(judge):
    g = torch.Generator().manual_seed(3)
    a, b, zone = torch.rand(2, 3, 16, 16, generator=g), torch.rand(2, 3, 16, 16, generator=g), torch.ones(2, 1, 16, 16)
    reference = {name: checks.find(name).reference for name in ANSWERS}
    assert torch.allclose(reference["zone_rmse"](a, b, zone), metrics.rmse(a, b, zone))
    x, y = torch.randn(30, 4, generator=g).double(), torch.randn(20, 4, generator=g).double() + 1
    k = lambda u, v: (u @ v.T / 4 + 1) ** 3
    assert reference["unbiased_mmd"](k(x, x), k(y, y), k(x, y)) == pytest.approx(metrics.kernel_distance(x, y))
    moments = [m for v in (x, y) for m in (v.mean(0).numpy(), v.T.cov().numpy())]
    assert reference["frechet"](*moments) == pytest.approx(metrics.frechet_distance(x, y))


# ---------------------------------------------------------------- build it: the notebook's versions are the library's

class FakeRun:
    smoke, size, device = True, 64, "cpu"

    def generator(self, offset=0):
        return torch.Generator("cpu").manual_seed(11 + offset)


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return metrics.Judge().eval().requires_grad_(False)


def run_cells(*names, **space):
    for name in names:
        exec(CODE[name], space)
    return space


def test_the_notebooks_scores_are_the_librarys(judge, capsys):
    """The cells hold the assertions themselves; here with other pictures and an untrained judge."""
    g = torch.Generator().manual_seed(1)
    truth = torch.rand(2, 3, 48, 48, generator=g)
    after = {m: (truth + 0.1 * torch.randn(2, 3, 48, 48, generator=g)).clamp(0, 1) for m in ("alpha", "inject")}
    space = run_cells("losses", "feat-dist", "feat-shares", "rmse-psnr", "ssim", "ssim-check", "ssim-hiss", np=np, torch=torch,
                      F=torch.nn.functional, show=show, metrics=metrics, judge=judge, truth=truth, after=after, run=FakeRun(),
                      zones={"shadow": (torch.rand(2, 1, 48, 48, generator=g) < 0.2).float()})
    assert torch.allclose(space["mean"](space["matching"](truth, truth)) * torch.ones(1), torch.zeros(1))
    assert "on a flat wall" in capsys.readouterr().out


def test_the_notebooks_sets_are_the_librarys(judge):
    pool = torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = metrics.JudgeFeatures(judge)
    feats = features(pool).double()
    space = run_cells("fid-check", "kid-check", "bias", "bias-lie", np=np, torch=torch, metrics=metrics, features=features,
                      pool=pool, feats=feats, soft=feats + 0.1, largest=64, run=FakeRun(), widgets_12=widgets_12)
    means = space["lines"]["FID"][0][1]
    assert means[0] > means[-1] > 0                        # the same crowd on both sides: FID falls with N


def test_intervals_keep_their_promise():
    """Coverage as the lesson simulates it: near 95 % with many rooms, less with few, all but certain if unpaired."""
    space = run_cells("coverage", np=np, show=show, run=FakeRun(), SEED=0)
    few, many = (space["coverage"](n, 400, np.random.default_rng(5)) for n in (5, 100))
    assert few[0] < 0.88 and 0.9 < many[0] < 0.985 and min(few[1], many[1]) > 0.97


# ---------------------------------------------------------------- the stored board

@pytest.fixture(scope="module")
def stored():
    return widgets_12.board()


def test_the_board_is_the_readmes(stored):
    summary, rows = stored
    path, newest = benchmark.newest()
    assert summary == newest and not summary["settings"]["smoke"]
    methods = {r["mechanism"] for r in rows}
    assert {"alpha", *benchmark.MECHANISMS} <= set(summary["settings"]["mechanisms"]) <= methods
    once = len(methods & set(benchmark.RGBD)) * len(summary["seeds"])           # in one of the tasks only
    assert len(rows) == len(methods) * len(summary["seeds"]) * len(summary["tasks"]) - once
    assert all(c in rows[0] for c, _, _ in widgets_12.MEASURES.values())


def test_the_board_is_computed_again_from_its_rows(stored, capsys):
    summary, rows = stored
    baselines = [m for m in summary["settings"]["mechanisms"] if m in benchmark.BASELINES]
    space = run_cells("board-check", "wins", "goals", "goals-more", "goals-show", "goals-cost", np=np, baselines=baselines,
                      summary=summary, board=rows, benchmark=benchmark, metrics=metrics, widgets_12=widgets_12, show=show)
    assert "the stored ones are right" in capsys.readouterr().out
    assert len(space["differences"]) == sum(len(d) * 3 for t in summary["tasks"].values() for d in t["differences"].values())
    assert len(space["table"]) == 7 * len(summary["tasks"]) and len(space["rows"]) == len(summary["tasks"])
    said = [cell for line in space["table"] for cell in line[2:] if cell]
    assert len(said) == 7 * sum(m in t["means"] for t in summary["tasks"].values()
                                for m in (*benchmark.MECHANISMS, benchmark.WITH_DEPTH))
    assert all(cell.endswith((": reached", ": MISSED")) for cell in said)


def test_columns_of_the_board_follow_the_seeds(stored):
    _, rows = stored
    shuffled = tuple(reversed(rows))
    assert np.array_equal(widgets_12.column(rows, "insertion", "alpha", "psnr"),
                          widgets_12.column(shuffled, "insertion", "alpha", "psnr"))
    with pytest.raises(ValueError, match="no 'magic'"):
        widgets_12.column(rows, "insertion", "magic", "psnr")
    assert widgets_12.pairs_view(rows, "insertion", "PSNR", "magic", "alpha")[1] == "nothing to compare"


def test_another_board_and_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python -m lib.benchmark`"):
        widgets_12.board(str(tmp_path))
    summary = dict(tasks={}, settings=dict(smoke=False), machine=dict(date="2030-01-01"))
    (tmp_path / "mini-2.json").write_text(json.dumps(summary))
    (tmp_path / "mini-2.csv").write_text("task,seed,mechanism,psnr\ninsertion,2,alpha,20.5\ninsertion,1,alpha,\n")
    _, rows = widgets_12.board(f"{tmp_path}/")
    assert math.isnan(widgets_12.column(rows, "insertion", "alpha", "psnr")[0])
    assert widgets_12.column(rows, "insertion", "alpha", "psnr")[1] == 20.5


# ---------------------------------------------------------------- widgets

@pytest.fixture(scope="module")
def example():
    return widgets_12.example(widgets_12.EXAMPLE["FIRST"])


@pytest.mark.parametrize("kind", widgets_12.DAMAGES)
@pytest.mark.parametrize("amount", [0.0, 1 / 3, 1.0])
def test_damage_view_at_min_default_max(judge, example, kind, amount):
    drawn, text = widgets_12.damage_view(judge, example, kind, amount)
    assert drawn.width > 4 * 200 and np.asarray(drawn).std() > 10
    assert all(word in text for word in ("shading", "shadow", "outside", "PSNR", "SSIM", "feat_dist", "order"))
    image = widgets_12.damage(example, kind, amount)
    assert image.min() >= 0 and image.max() <= 1 and torch.equal(image, example.case.truth) == (amount == 0)


def test_damage_stays_where_it_belongs(example):
    truth, zones = example.case.truth, example.case.zones
    for kind, zone in (("shadow removed", "shadow"), ("object removed", "shading")):
        off = (widgets_12.damage(example, kind, 1.0) - truth).abs().amax(1, keepdim=True)
        assert (off * (1 - zones[zone])).max() < 1e-6 and (off * zones[zone]).max() > 0.1
    shifted = widgets_12.damage(example, "shift", 1 / 8)
    assert torch.equal(shifted[..., 1:], truth[..., :-1])
    with pytest.raises(ValueError, match="unknown damage"):
        widgets_12.damage(example, "rust", 0.5)
    with pytest.raises(ValueError, match="between 0"):
        widgets_12.damage(example, "blur", 1.5)


def test_the_promise_picture_says_the_truth(judge, example):
    """Equal RMSE to three decimals, except the last two, which lose the object or its shadow and have less."""
    images, labels = widgets_12.equal_rmse(judge, example)
    errors = [float(metrics.rmse(x, example.case.truth)) for x in images]
    assert len(images) == len(labels) == 8 and errors[0] == 0
    assert len({round(e, 3) for e in errors[1:6]}) == 1 and max(errors[6:]) < errors[1] - 5e-4
    assert [label.split(":")[0] for label in labels[6:]] == ["object removed", "shadow removed"]


def test_zone_map_and_error_map(example):
    c = example.case
    drawn = widgets_12.zone_map(c)
    inside, outside = (drawn[:, :, (c.zones[z] > 0)[0, 0]] for z in ("shading", "outside"))
    assert inside[0, 0].mean() > outside[0, 0].mean() + 0.2                       # orange has more red than grey
    assert widgets_12.error_map(c.truth, c.truth).max() < 0.05
    assert widgets_12.error_map(c.truth, 1 - c.truth).max() > 0.8


@pytest.mark.parametrize("task", benchmark.TASKS)
@pytest.mark.parametrize("measure", widgets_12.MEASURES)
def test_pairs_view_of_every_measure(stored, task, measure):
    drawn, text = widgets_12.pairs_view(stored[1], task, measure, "inject", "alpha")
    assert drawn.width > 900 and "95 % paired interval" in text and "inject - alpha" in text
    same, text = widgets_12.pairs_view(stored[1], task, measure, "guide", "guide")
    assert "cannot tell them apart" in text and same.size == drawn.size


def test_pairs_view_without_rooms():
    rows = tuple(dict(task="insertion", seed=1.0, mechanism=m, rmse_shadow=0.1) for m in ("a", "b"))
    drawn, text = widgets_12.pairs_view(rows, "insertion", "shadow", "a", "b")
    assert text == "nothing to compare" and drawn.width > 900


def test_the_interval_in_the_picture_is_the_boards(stored):
    summary, rows = stored
    _, text = widgets_12.pairs_view(rows, "insertion", "shadow", "inject", "alpha")
    low, high = map(float, re.search(r"\[([-+.\d]+), ([-+.\d]+)\]", text).groups())
    kept = summary["tasks"]["insertion"]["differences"]["inject"]["alpha"]["rmse_shadow"]
    assert abs(low - kept["low"]) < 0.1 * (high - low) and abs(high - kept["high"]) < 0.1 * (high - low)


def test_shells_move_with_their_controls(judge, example, stored):
    kind, amount, text, picture = widgets_12.damage_explorer(judge, example).children
    before, amount.value = picture.value, amount.max
    assert picture.value != before
    before, kind.value = picture.value, "noise"
    assert picture.value != before and "PSNR" in text.value
    task, measure, first, second, text, picture = widgets_12.pairs_explorer(stored[1]).children
    before, measure.value, second.value = picture.value, "SSIM", "poisson"
    assert picture.value != before and text.value.startswith("SSIM, inject - poisson")
    before, task.value = picture.value, "compositing"
    assert picture.value != before


def test_drawings(judge, example):
    images, labels = widgets_12.damage_strip(judge, example)
    assert len(images) == len(labels) == 9
    view = widgets_12.heat_map(["a", "b"], ["x", "y", "z"], np.array([[0, 0.5, 1], [np.nan, 0, 0]]), [["1"] * 3] * 2, "share")
    assert view.png()[:4] == b"\x89PNG" and "x, y, z" in view.alt
    with pytest.raises(ValueError, match="do not fit"):
        widgets_12.heat_map(["a"], ["x"], np.zeros((2, 1)), [["1"]], "share")
    view = widgets_12.curves({"FID": [([8, 16], [1, 0.5], [0.1, 0.1], "same")]}, "N", "here")
    assert view.png()[:4] == b"\x89PNG" and "FID" in view.alt


# ---------------------------------------------------------------- promises that need the shipped models

def test_reactions_of_the_scores_to_known_damage(example):
    """What the words beside the heat map say, with the shipped judge."""
    judge, truth = models.load_judge(quiet=True), example.case.truth
    spoilt = {k: widgets_12.damage(example, k, a) for k, a in widgets_12.TYPICAL.items()}
    zone = lambda k, z: float(metrics.rmse(spoilt[k], truth, example.case.zones[z]))
    for other, z in (("shading", "shadow"), ("shadow", "shading")):
        kind = {"shadow": "shadow removed", "shading": "object removed"}[z]
        assert max(spoilt, key=lambda k: zone(k, z)) == kind and zone(kind, other) < 1e-6
    assert zone("object in front", "outside") > zone("shift", "outside")
    far = {k: float(metrics.feat_dist(judge, x, truth)) for k, x in spoilt.items()}
    assert max(far, key=far.get) == "noise"


# ---------------------------------------------------------------- runs

@pytest.mark.slow
def test_lesson_12_runs_with_other_parameters(tmp_path):
    given = {"SMOKE": True, "SEED": 5, "FIRST": 20001000}
    out = setup.run_notebook(PATH, tmp_path / "12.ipynb", given, timeout=600)
    cells = nbformat.read(out, 4).cells
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 10
    with pytest.raises(ValueError, match="has no parameter STEP"):
        setup.run_notebook(PATH, tmp_path / "x.ipynb", {"STEP": 3})


@pytest.mark.slow
def test_lesson_12_runs_on_another_pipeline(tmp_path, make_pipe):
    """A Stable-Diffusion-shaped pipeline with random weights, by MODEL alone."""
    for name, inpaint in (("other", False), ("other-inpaint", True)):
        make_pipe(inpaint=inpaint, seed=1).save_pretrained(tmp_path / name)
    out = setup.run_notebook(PATH, tmp_path / "12.ipynb", {"SMOKE": True, "MODEL": str(tmp_path / "other")}, timeout=600)
    assert "the stored ones are right" in json.dumps(nbformat.read(out, 4).cells)
