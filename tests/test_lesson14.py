"""Lesson 14: its form beyond the common one, its sums, its exercises, its planner and its promises."""
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from lib import checks, checks_14, jobs, setup, video
from lib import widgets_14 as w

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "14_video_to_batch.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {
    "shown_frames": "n = int((times[-1] - times[0]) / step)\n"
                    "    return [max(i for i, t in enumerate(times) if t <= times[0] + k * step) for k in range(n + 1)]",
    "shard_slices": "return [(s, min(s + size, count)) for s in range(0, count, size)]",
    "final_rows": "rows = [r for r in rows if r['status'] != 'start']\n    best = {}\n"
                  "    for r in sorted(rows, key=lambda r: -r['attempt']):\n        best.setdefault(r['id'], r['status'])\n"
                  "    return sorted(best.items())",
    "split_time": "return 2 * two - one, 2 * (one - two)",
}


# ---------------------------------------------------------------- form

def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "Settings", "Frames",
             "Arithmetic", "A loader that streams", "Splitting the work", "What can go wrong", "Kill it", "The real edit",
             "Why two GPUs gave 1.39", "Your turn", "Recap", "The same with Stable Diffusion",
             "Further reading", "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3


@pytest.mark.parametrize("words", [
    r"70\+ hours", "12-hour session", r"\*\"10 GB do not fit 32 GB", r"batch 32", r"\*\"6 GB\"", r"\*\*4\*\* virtual cores",
    "1.39 times", "CVPR 2024", "Nobody has the true picture", r"time x rate", "A score needs its control",
    "never \\*what\\* it is",
])
def test_every_trap_of_the_source_stands_in_the_lesson(words):
    assert WORDS.count("**(!)**") >= 10
    assert re.search(words, WORDS)


# ---------------------------------------------------------------- exercises

def run_cell(name):
    exec(CODE[name], {"check": checks.check, "hint": checks.hint, "reveal": checks.reveal})


def test_the_references_agree_with_the_library(tmp_path):
    from fractions import Fraction
    times = [Fraction(k, 16) for k in (4, 6, 8, 24, 25, 26, 34, 36)]
    assert checks_14.shown_frames([float(t) for t in times], 0.25) == [n for _, n in video.on_grid(times, Fraction(1, 4))]
    from PIL import Image
    (tmp_path / "in").mkdir()
    for n in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / f"{n}.png")
    job = jobs.open_or_create(tmp_path / "job", tmp_path / "in", "tint", shard_size=4)
    mine = [(job.shard(n).first, job.shard(n).first + len(job.shard(n).items)) for n in job.shards]
    assert mine == checks_14.shard_slices(10, 4)


# ---------------------------------------------------------------- the planner and the charts

@pytest.mark.parametrize("way", w.WAYS)
@pytest.mark.parametrize("values", [
    dict(thousands=1, serial=0.0, shared=0.1, devices=1), dict(), dict(thousands=100, serial=3.0, shared=5.0, devices=4)])
def test_planner_at_min_default_and_max(values, way):
    picture = w.plan_view(**values, way=way)
    assert picture.width > 600 and np.asarray(picture.convert("L")).std() > 5
    assert re.fullmatch(r"[\d.]+ s an image, [\d.]+ times as fast as one device; \d+,000 images take [\d.]+ h: \d+ sessions? "
                        r"of 12 h", w.plan_text(**values, way=way))


@pytest.mark.parametrize("values", [dict(devices=5), dict(devices=0), dict(serial=-1), dict(shared=0), dict(thousands=0),
                                    dict(way="magic")])
def test_planner_says_what_is_wrong(values):
    with pytest.raises(ValueError):
        w.plan_view(**values)


def test_the_source_s_figures():
    assert w.seconds_an_image(*checks_14.split_time(2.5, 1.8), 2) == pytest.approx(1.8)
    assert "12.5 h: 2 sessions" in w.plan_text() and "1.39 times" in w.plan_text()
    assert w.sessions(25_000, 1.8) == 2 and w.sessions(25_000, 0.7) == 1
    assert w.fit([1, 2, 4], [2.5, 1.8, 1.45]) == pytest.approx((1.1, 1.4))
    s, c = 1.4 * (1 / 1.9 - 1 / 2) / (1 - 1 / 1.9), 1.4
    assert (s + c) / (s + c / 2) == pytest.approx(1.9)     # the lesson's bound for 1.9 times


def test_overlap_never_slows_a_job_down():
    for serial, shared in np.random.default_rng(0).uniform(0, 3, (50, 2)):
        for d in (1, 2, 3, 4):
            loop, over, own = (w.seconds_an_image(serial, shared, d, way) for way in w.WAYS)
            assert own <= over + 1e-12 <= loop + 2e-12


def test_the_planner_widget_moves():
    box = w.planner()
    *controls, text, picture = box.children
    before, said = picture.value, text.value
    controls[0].value = w.WAYS[2]
    assert picture.value != before and text.value != said
    controls[-1].value = 4
    assert "4.00 times" in text.value


def test_timeline_draws_each_row(tmp_path):
    rows = [{"id": str(k), "time": 100 + k / 10, "worker": f"p{k // 10}"} for k in range(30)]
    view = w.timeline(rows, [101.0, 102.0], 30, 100)
    assert sum(len(c.get_offsets()) for c in view.axes[0].collections) == 30
    assert len(view.axes[0].lines) == 2


# ---------------------------------------------------------------- its promises

@pytest.mark.slow
def test_killed_and_finished_as_the_lesson_does(tmp_path):
    from lib import batch, bench
    source = bench.make_inputs(tmp_path / "in", 40, 48)
    kills, begin, code = w.killed_run(tmp_path / "job", source, 2, process="lib.bench:Work", settings=("--set", "wait=0.02"))
    job = jobs.open_job(tmp_path / "job")
    assert code == batch.DONE and len(kills) == 2 and len(job.rows()) == 40
    assert len({row["worker"] for row in job.rows()}) >= 2
    assert batch.status(job, verify=True)["damaged"] == []


@pytest.mark.slow
def test_the_lesson_runs_with_other_parameters(tmp_path):
    film = video.write(tmp_path / "own.mp4", *other_film())
    out = setup.run_notebook(PATH, tmp_path / "14.ipynb", {"SMOKE": True, "SEED": 3, "VIDEO": str(film), "STEP": 0.2,
                                                           "STEPS": 1}, timeout=600)
    cells = nbformat.read(out, 4).cells
    text = "\n".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert "own.mp4: 20 frames" in text and "pictures bit for bit the same; 0 missing, 0 twice" in text
    assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 9


def other_film():
    images, _ = video.walk(seconds=2, fps=10, size=(96, 128))
    return images, [k * 0.12 for k in range(len(images))]
