"""Lesson 14's charts, its planner (a panel), and its stored pictures."""
import contextlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lib import show, widgets

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d", "#72b7b2", "#ff9da6")


def _view(width=7.2, height=3.0, alt="chart"):
    view = show.View(figsize=(width, height), dpi=show.DPI, facecolor="white", layout="constrained")
    view.alt = alt
    axes = view.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return view, axes


def _pil(view) -> Image.Image:
    return Image.open(io.BytesIO(view.png())).convert("RGB")


# ---------------------------------------------------------------- frames and memory

def timestamps(times, shown, step=0.1):
    """Each frame's timestamp as a tick, the grid as lines, and which frame is shown at each grid time."""
    view, axes = _view(8.4, 1.9, "timestamps of the frames and the grid times that show them")
    times = np.asarray(times, float)
    axes.vlines(times, 0, 0.35, color="#4c78a8", linewidth=1.1, label="a frame's timestamp")
    grid = times[0] + step * np.arange(len(shown))
    axes.vlines(grid, 0.6, 1, color="#999999", linewidth=0.8, label=f"grid time, every {step:g} s")
    axes.plot([grid, times[shown]], [np.full(len(grid), 0.6), np.full(len(grid), 0.35)], color="#e45756",
              linewidth=0.8, label=["the frame shown then"] + [None] * (len(grid) - 1))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.35), ncols=3, frameon=False, fontsize=8.5)
    return view


def curves(x, series, xlabel, ylabel, alt="chart", bottom=0):
    """A few labelled curves on one pair of axes: {label: values}."""
    view, axes = _view(6.4, 2.8, alt)
    for colour, (label, y) in zip(COLOURS, series.items()):
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.4, label=label)
    axes.set_xticks(x)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=bottom)
    axes.legend(frameon=False, fontsize=8.5)
    return view


# ---------------------------------------------------------------- a job that was killed

def timeline(rows, kills, total, start):
    """Each input's final row as a dot: when (seconds since `start`), which place, which process."""
    view, axes = _view(8.4, 3.2, "each finished image over time, in its process's colour; kills as lines")
    workers = list(dict.fromkeys(row["worker"] for row in sorted(rows, key=lambda row: row["time"])))
    places = {row["id"]: k for k, row in enumerate(rows)}
    for k, worker in enumerate(workers):
        mine = [row for row in rows if row["worker"] == worker]
        axes.scatter([row["time"] - start for row in mine], [places[row["id"]] for row in mine], s=9,
                     color=COLOURS[k % len(COLOURS)], label=f"process {k + 1}")
    for k, t in enumerate(kills):
        axes.axvline(t - start, color="black", linewidth=1, linestyle="--", label=None if k else "kill -9")
    axes.set_xlabel("seconds since the first start")
    axes.set_ylabel("place in the list")
    axes.set_xlim(left=0)
    axes.set_ylim(-2, total + 2)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return view


def killed_run(folder, source, times=3, process="tint", settings=()):
    """Start a job, `kill -9` parent and worker after a part of its rows, start it again, and so on `times`
    times; then let it finish. Returns (kill times, start, exit code of the last run)."""
    from lib import setup
    words = [sys.executable, "-m", "lib.batch", "run", str(folder), "--input", str(source), "--process",
             process, "--workers", "1", "--batch", "2", "--quiet", "--device", "cpu", *settings]
    home = setup.root() if (setup.root() / "lib").is_dir() else setup.root().parent
    env = {**os.environ, "PYTHONPATH": str(home)}
    options = dict(env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    begin, kills = time.time(), []
    for share in np.arange(1, times + 1) / (times + 1):
        parent = subprocess.Popen(words, **options)
        while parent.poll() is None and _share_done(folder) < share:
            time.sleep(0.02)
        for pid in [parent.pid, *_children(parent.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kills.append(time.time())
        parent.communicate()
    return kills, begin, subprocess.run(words, **options).returncode


def _share_done(folder) -> float:
    from lib import jobs
    if not (Path(folder) / "run.json").exists():
        return 0.0
    job = jobs.open_job(folder)
    return len(job.rows()) / len(job.items)


def _children(pid) -> list[int]:
    import psutil
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


# ---------------------------------------------------------------- how long it takes

WAYS = ("one loop", "one loop, overlapped", "a process each, overlapped")


def seconds_an_image(serial, shared, devices, way="one loop") -> float:
    """How long an image takes. serial: loading, encoding, writing, committing; shared: the device's work;
    seconds each.

    "one loop": load, hand out, wait for the devices, write: serial + shared / devices. "one loop,
    overlapped": loading and writing go on meanwhile, the slower of the two sets the pace. "a process each,
    overlapped": every device has its own loader and writer, so nothing is left that they do not share (as
    long as there are cores for them).
    """
    if way not in WAYS:
        raise ValueError(f"Unknown way {way!r}; known: {', '.join(WAYS)}.")
    if way == WAYS[0]:
        return serial + shared / devices
    return max(serial, shared / devices) if way == WAYS[1] else max(serial, shared) / devices


def fit(devices, seconds) -> tuple[float, float]:
    """(serial, shared) of seconds = serial + shared / devices, by least squares; neither below 0."""
    return nonnegative([[1, 1 / d] for d in devices], seconds)


def nonnegative(rows, values) -> tuple[float, ...]:
    """Least squares with coefficients that are not below 0: times are never negative."""
    from scipy.optimize import nnls
    return tuple(float(x) for x in nnls(np.asarray(rows, float), np.asarray(values, float))[0])


def sessions(images, seconds, hours=12.0, margin=0.7) -> int:
    """How many sessions of so many hours a job needs, each stopped `margin` hours before its end."""
    return math.ceil(images * seconds / 3600 / (hours - margin))


def plan_view(thousands=25, serial=1.1, shared=1.4, devices=2, way=WAYS[0]):
    """Left: seconds an image by part, for 1 to 4 devices. Right: the speed-up. Returns a PIL picture.

    thousands of images; serial, shared: seconds an image; devices 1 to 4; way: one of WAYS. ValueError else.
    """
    if thousands <= 0 or serial < 0 or shared <= 0 or devices not in (1, 2, 3, 4):
        raise ValueError("Give more than 0 images and shared seconds, "
                         "serial seconds >= 0, and 1 to 4 devices.")
    counts = np.arange(1, 5)
    total = np.array([seconds_an_image(serial, shared, n, way) for n in counts])
    parts = np.full(4, float(serial)) / (counts if way == WAYS[2] else 1), shared / counts
    view = show.View(figsize=(9.2, 2.9), dpi=show.DPI, facecolor="white", layout="constrained")
    left, right = view.subplots(1, 2)
    edge = ["black" if n == devices else "none" for n in counts]
    width, shift = (0.7, 0) if way == WAYS[0] else (0.34, 0.18)
    left.bar(counts - shift, parts[1], width, color="#4c78a8", edgecolor=edge, label="device")
    left.bar(counts + shift, parts[0], width, bottom=0 if shift else parts[1], color="#f58518",
             edgecolor=edge, label="load, write, commit" + (" (meanwhile)" if shift else ""))
    left.set_ylim(0, 1.3 * (serial + shared))           # the same for all ways: their bars can be compared
    left.set_title(f"{way}: {total[devices - 1]:.2f} s an image on {devices} device{'s' * (devices > 1)}",
                   fontsize=9.5)
    left.set_ylabel("seconds an image")
    right.plot(counts, counts, ":", color="#333333", zorder=3, label="ideal")
    right.plot(counts, total[0] / total, "o-", color="#4c78a8", label=way)
    right.plot([devices], [total[0] / total[devices - 1]], "o", color="#e45756", markersize=9)
    right.set_title(f"{total[0] / total[devices - 1]:.2f} times as fast as one", fontsize=9.5)
    right.set_ylim(0.8, 4.3)
    right.set_ylabel("times as fast as one device")
    for axes in (left, right):
        axes.set_xlabel("devices")
        axes.set_xticks(counts)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5, loc="upper right" if axes is left else "upper left")
    return _pil(view)


def plan_text(thousands=25, serial=1.1, shared=1.4, devices=2, way=WAYS[0]) -> str:
    """The planner's line: seconds an image, hours, sessions of 12 h."""
    seconds, one = (seconds_an_image(serial, shared, n, way) for n in (devices, 1))
    hours, need = thousands * 1000 * seconds / 3600, sessions(thousands * 1000, seconds)
    return (f"{seconds:.2f} s an image, {one / seconds:.2f} times as fast as one device; "
            f"{thousands},000 images take {hours:.1f} h: {need} session{'s' if need > 1 else ''} of 12 h")


def planner():
    """Sliders for the arithmetic of a batch: a `panel`."""
    import ipywidgets
    ways = ipywidgets.Dropdown(options=WAYS, value=WAYS[0], description="arrangement",
                               style={"description_width": "110px"}, layout=ipywidgets.Layout(width="480px"))
    return widgets.panel(
        lambda **values: (plan_view(**values), plan_text(**values)), "batch-planner", way=ways,
        thousands=widgets.slider(25, 1, 100, 1, "images x 1000"),
        serial=widgets.slider(1.1, 0.0, 3.0, 0.05, "load + write, s"),
        shared=widgets.slider(1.4, 0.1, 5.0, 0.05, "device, s"),
        devices=widgets.slider(2, 1, 4, 1, "devices"))


# ---------------------------------------------------------------- the stored pictures

def plan_strip():
    """The planner without a kernel: as in the source, and as lib.batch works. Returns a PIL picture."""
    pictures = [plan_view(), plan_view(way=WAYS[2])]
    canvas = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures) + 8), "white")
    canvas.paste(pictures[0], (0, 0))
    canvas.paste(pictures[1], (0, pictures[0].height + 8))
    return canvas


def make_figures(folder):
    """Draw the stored pictures of lesson 14 (some seconds: one is a real job that is killed)."""
    from lib import bench, jobs
    folder, paths = Path(folder), []
    with tempfile.TemporaryDirectory() as base:
        source = bench.make_inputs(Path(base) / "in", 80, 64)
        job = Path(base) / "job"
        kills, begin, _ = killed_run(job, source, process="lib.bench:Work", settings=("--set", "wait=0.1"))
        drawn = _pil(timeline(jobs.open_job(job).rows(), kills, 80, begin))
    for name, picture in (("14_killed", drawn), ("14_plan", plan_strip())):
        data = io.BytesIO()
        picture.quantize(64, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        paths.append(show._atomic(folder / f"{name}.png", data.getvalue()))
    return paths
