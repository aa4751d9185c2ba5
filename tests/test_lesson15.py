"""Lesson 15: its form beyond the common one, its sums, its exercises, its two panels, `make batch`, and its promises."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest

from lib import bench, checks_15, jobs, kaggle, setup
from lib import widgets_15 as w

REPO = Path(__file__).resolve().parents[1]
PATH = REPO / "notebooks" / "15_two_gpus_on_kaggle.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "working_seconds": "left = limit - age - margin\n    return left if left > 0 else 0.0",
    "left_to_do": "done = {i for s in sessions for i, what in s if what != 'start'}\n    return [i for i in ids if i not in done]",
    "finish_time": "free = [0.0] * len(speeds)\n    for d in durations:\n        k = min(range(len(free)), key=lambda n: free[n])\n"
                   "        free[k] += d / speeds[k]\n    return max(free)",
    "image_seconds": "return steps * passes_a_step * unet / peak / used + rest / peak / used",
}
OPS = bench.Operations(0.8, 1.1, 2.5, 0.5)              # round figures, so that nothing here counts again


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "are the devices there?",
             "What does an image cost?", "The job", "The report", "A session ends", "On Kaggle, step by step", "Who takes what?",
             "The same job on a cluster", "Measure it on your card", "Your turn", "Recap", "The same with Stable Diffusion",
             "Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


@pytest.mark.parametrize("words", [
    r"four virtual cores", "20 GB of output", "decision about steps", r'"GPU T4 x2"', "is_available", "notebook_launcher",
    "DataParallel", r"hides a failure", r"datasets/<owner>/<slug>", "12 h of a session", "none is measured",
])
def test_every_trap_stands_in_the_lesson(words):
    assert WORDS.count("**(!)**") >= 7 and re.search(words, WORDS)


def test_everything_a_job_needs_is_a_parameter():
    given = setup.notebook_parameters(PATH)
    for name in ("INPUT", "OUTPUT", "MODEL", "DEPTH", "MECHANISM", "DEVICE", "WORKERS", "ENGINE", "ADDRESS", "SHARD", "PACK",
                 "MAX_SECONDS", "DONE_ROOT", "RETRY", "STEPS", "STEP", "LIMIT", "BATCH", "LOADERS", "GPUS", "JOB_ONLY"):
        assert name in given
    assert all(f"{name}" in "\n".join(s for i, s in CODE.items() if i != "parameters") for name in given)


# ---------------------------------------------------------------- exercises

def test_the_references_agree_with_the_library(monkeypatch):
    durations, speeds = [3.0, 1.0, 2.0, 5.0, 1.0], [1.0, 0.6]
    assert checks_15.finish_time(durations, speeds) == pytest.approx(max(e for *_, e in w.hand_out(durations, speeds)))
    rest = 2 * OPS.encode + 3 * OPS.decode + 2 * OPS.depth
    assert checks_15.image_seconds(9, 3, OPS.unet, rest, 65.0, 0.2) == pytest.approx(w.seconds_an_image(OPS, 27, "T4", 0.2))
    monkeypatch.setattr(kaggle, "here", lambda: True)
    monkeypatch.setattr(kaggle, "session_age", lambda: 3600.0)
    assert kaggle.working_seconds() == checks_15.working_seconds(kaggle.SESSION, 3600.0, kaggle.MARGIN)


# ---------------------------------------------------------------- the panels and the charts

@pytest.mark.parametrize("values", [dict(steps=1, used=0.05, card="H100", gpus=1, thousands=1), dict(),
                                    dict(steps=50, used=0.6, card="A100", gpus=8, thousands=100)])
def test_budget_at_min_default_and_max(values, monkeypatch):
    monkeypatch.setattr(w, "_operations", lambda side: OPS)
    picture, text = w.budget_view(**values), w.budget_text(**values)
    assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5
    assert re.match(r"\d+ steps?: \d+ passes, \d+ TFLOP an image\. At \d+% of the \w+'s \d+ TFLOP/s: [\d.]+ s, (within|over)",
                    text)
    assert re.search(r"000 images on \d GPUs?: [\d.]+ h, \d+ sessions? of 12 h$", text)


def test_the_budget_s_sums():
    assert w.seconds_an_image(OPS, 100, "T4", 0.5) == pytest.approx((80 + 2.2 + 7.5 + 1) / 32.5)
    steps = w.steps_within(OPS, 2.5, "T4", 0.2)
    assert w.seconds_an_image(OPS, 3 * steps, "T4", 0.2) <= 2.5 < w.seconds_an_image(OPS, 3 * (steps + 1), "T4", 0.2)
    assert w.steps_within(OPS, 0.01) == 0
    assert [w.sessions_of(h) for h in (0.1, 11.3, 11.4, 34.0)] == [1, 1, 2, 4]
    weeks = [25_000 * w.seconds_an_image(OPS, w.PASSES_A_STEP * steps) / 2 / 3600 / 30 for steps in (20, 50)]
    assert 0.8 < weeks[0] < 1 and 1.8 < weeks[1] < 2                 # "most of a week" and "two weeks", of 30 hours each
    for wrong in (dict(card="T5"), dict(used=0), dict(used=1.1), dict(passes=0)):
        with pytest.raises(ValueError, match="card of: T4"):
            w.seconds_an_image(OPS, **{"passes": 3, **wrong})


@pytest.mark.parametrize("plan", w.PLANS)
@pytest.mark.parametrize("values", [dict(shards=2, second=0.2), dict(), dict(shards=240, second=1.0)])
def test_hand_out_at_min_default_and_max(values, plan):
    picture = w.hand_out_view(**values, plan=plan)
    assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5
    assert re.match(rf"\d+ shards of about \d+ images, {plan}: \d+ s", w.hand_out_text(**values, plan=plan))


def test_the_next_free_one_is_never_later_than_fixed_parts_here():
    for shards in (2, 12, 60):
        last = [max(e for *_, e in w.hand_out(w._work(shards), [1.0, 0.6], plan)) for plan in w.PLANS]
        assert last[2] <= last[0] + 1e-9
    for wrong in (dict(plan="luck"), dict(speeds=[1.0, 0.0]), dict(speeds=[])):
        with pytest.raises(ValueError, match="next free takes next"):
            w.hand_out(**{"durations": [1.0], "speeds": [1.0], **wrong})
    with pytest.raises(ValueError, match="2 to 240 shards"):
        w.hand_out_view(shards=1)


@pytest.mark.parametrize("make", [w.shards, w.budget])
def test_the_panels_move(make, monkeypatch):
    monkeypatch.setattr(w, "_operations", lambda side: OPS)
    *controls, text, picture = make().children
    for control, value in ((controls[0], controls[0].options[-1]), (controls[-1], controls[-1].max)):
        before, said = picture.value, text.value
        control.value = value
        assert picture.value != before and text.value != said


def test_lanes_draw_each_batch_once():
    row = lambda worker, end, seconds: {"worker": worker, "time": end, "seconds": {"infer": seconds}}
    first = [row("a", 101.0, 0.4), row("a", 101.0, 0.4), row("b", 101.5, 1.0)]
    view = w.lanes([first, [row("c", 103.0, 0.5)]], [(102.0, "the end")])
    bars = [(round(float(p.get_x()), 2), round(float(p.get_width()), 2)) for p in view.axes[0].patches]
    assert bars == [(0.0, 0.8), (0.3, 1.0), (2.3, 0.5)]
    assert [t.get_text() for t in view.axes[0].get_yticklabels()] == ["session 1: process 1", "session 1: process 2",
                                                                     "session 2: process 1"]


# ---------------------------------------------------------------- make batch

def make(*words):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("INPUT", "OUTPUT", "STEPS", "PYTHON")}
    return subprocess.run(["make", "-n", *words], cwd=REPO, env=env, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_batch_hands_over_only_what_was_given(tmp_path):
    text = make("batch", "INPUT=my film.mp4", "OUTPUT=out", "STEPS=9").stdout
    assert re.search(r"run notebooks/15_two_gpus_on_kaggle.ipynb .*-p JOB_ONLY True .*--env INPUT OUTPUT STEPS\s", text, re.S)
    assert "my film" not in text and "which pictures" not in text
    assert "which pictures" in make("batch").stdout


@pytest.mark.slow
def test_a_real_batch_from_the_makefile_s_command_line(tmp_path):
    """What `make batch` runs, twice: the second time there is nothing to do. Paths are the caller's."""
    from PIL import Image
    (tmp_path / "in").mkdir()
    for n in range(6):
        Image.fromarray(np.full((40, 48, 3), 20 * n, np.uint8)).save(tmp_path / "in" / f"{n}.png")
    (tmp_path / "in" / "6.png").write_bytes(b"no picture")
    words = [sys.executable, "-m", "lib.setup", "run", str(PATH), str(tmp_path / "batch.ipynb"), "-p", "JOB_ONLY", "True", "--env",
             "INPUT", "OUTPUT", "PROCESS", "SHARD", "--paths", "INPUT", "OUTPUT", "--at", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(REPO), "INPUT": "in", "OUTPUT": "out", "PROCESS": "tint", "SHARD": "2"}
    for _ in range(2):
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    job = jobs.open_job(tmp_path / "out")
    assert sorted(row["status"] for row in job.rows()) == ["bad_input"] + ["ok"] * 6
    assert (tmp_path / "out" / "report" / "report.html").is_file()
    cells = nbformat.read(tmp_path / "batch.ipynb", 4).cells
    assert not any(c.get("execution_count") for c in cells if c.id in ("sessions", "ray-run", "ex1-code"))
    assert not {"count-real", "budget", "budget-words"} & {c.id for c in cells}   # a job waits for no lesson


# ---------------------------------------------------------------- its promises

@pytest.mark.slow
def test_the_lesson_runs_with_other_parameters(tmp_path):
    out = setup.run_notebook(PATH, tmp_path / "15.ipynb", {
        "SMOKE": True, "SEED": 3, "PROCESS": "layers", "STEP": 1.0, "WORKERS": 1, "PACK": "tar", "OUTPUT": str(tmp_path / "job"),
        "DONE_ROOT": "", "SHARD": 2, "MAX_SECONDS": 500}, timeout=600)
    text = "\n".join(o.get("text", "") for c in nbformat.read(out, 4).cells for o in c.get("outputs", []))
    assert "4 inputs in 2 shards" in text and "4 of 4 inputs have a final row" in text
    assert "16 of 16 pictures bit for bit as in one undisturbed session" in text
    assert "the largest difference from a run without a cluster" in text or "Ray is not installed" in text
    assert sorted(p.name for p in (tmp_path / "job" / "shards").iterdir()) == ["00000.tar", "00001.tar"]
    facts = json.loads((tmp_path / "job" / "run.json").read_text())
    assert facts["processor"] == "layers" and facts["settings"]["seed"] == 3
