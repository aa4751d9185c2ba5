"""`python -m lib.batch bench`: what the job itself costs on this machine, measured, with the load beside it.

Scaling: the same inputs with one worker, then with two, each pinned to a core with one thread. Commits: their share of
the workers' time. Memory: a worker's peak at its 100th image and at its last. Parent: its share of one core.
"""
from __future__ import annotations

import os
import resource
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from lib import batch, jobs, report
from lib.processors import Output, Tint


class Work(Tint):
    """As much NumPy as `rounds` says, so that a picture takes some tens of milliseconds, as on a fast GPU."""
    defaults = {**Tint.defaults, "rounds": 12}
    batch = 8

    def infer(self, inputs, seeds, precise=False):
        out = []
        for given, (picture, metrics) in zip(inputs, super().infer(inputs, seeds)):
            for _ in range(self.settings["rounds"]):
                picture = np.sqrt(np.abs(picture) + 1e-3) ** 2 - 1e-3
            out.append(Output(picture, metrics))
        return out


def make_inputs(folder: Path, count: int, size=192) -> Path:
    """Smooth pictures of noise."""
    from PIL import Image
    folder.mkdir(parents=True)
    for n in range(count):
        cells = np.random.default_rng(n).integers(0, 255, (12, 12, 3), np.uint8)
        Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{n:05d}.png", compress_level=1)
    return folder


def rate(job) -> float:
    """Images a second: the sum of the workers' own rates between their first and last commit (no start-up)."""
    stamps = defaultdict(list)
    for row in job.rows():
        stamps[row["worker"]].append(row["time"])
    total = 0.0
    for times in stamps.values():
        times.sort()
        first = sum(t == times[0] for t in times)                 # the first batch's own work lies before its stamp
        total += (len(times) - first) / (times[-1] - times[0]) if times[-1] > times[0] else 0.0
    return total


def timed_run(job, workers: int) -> dict:
    """Run a job; rate, the parent's share of a core, commits' share of the workers' time, memory."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    plan = batch.Plan(batch.Options(loaders=1), workers, pin=True, quiet=True, device="cpu")
    code = batch.run(job, plan)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    parent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / wall
    spent = report.time_spent(job)
    peaks = defaultdict(list)
    for row in sorted(job.rows(), key=lambda row: row["time"]):
        peaks[row["worker"]].append(row["peak_mb"])
    memory = [(p[min(99, len(p) - 1)], p[-1], len(p)) for p in peaks.values()]
    return {"code": code, "rate": rate(job), "parent": parent, "wall": wall, "memory": memory,
            "commit": spent["commit"] / spent["wall"], "wait": spent.get("wait_commit", 0) / spent["wall"]}


def run(images=600, edits=0, steps=50, say=print) -> int:
    """Print all of it; returns an exit code (0 also where a number is bad: the reader judges)."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    say(f"{cores} cores, load {load:.1f} at the start" + (" (this machine is busy: ratios suffer)" if load > 0.5 else ""))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        source = make_inputs(Path(folder) / "in", images)
        one, two = (timed_run(_job(folder, source, f"workers{n}"), n) for n in (1, 2))
        say(f"one worker  {one['rate']:7.1f} images/s\ntwo workers {two['rate']:7.1f} images/s: "
            f"{two['rate'] / one['rate']:.2f} x")
        say(f"parent      {two['parent']:7.1%} of a core while two workers run")
        for early, late, count in two["memory"]:
            say(f"memory      {early:.0f} MB at a worker's 100th image, {late:.0f} MB at its last ({count})")
        say(f"commits     {two['commit']:7.1%} of the workers' time here, in a thread beside the work "
            f"({two['wait']:.1%} waited for)")
        if edits:
            _edits(folder, edits, steps, say)
    return 0


def _job(folder, source, name):
    return jobs.open_or_create(Path(folder) / name, source, "lib.bench:Work", shard_size=32)


def _edits(folder, count, steps, say):
    """The real pipeline on frames of the sample video."""
    from lib import setup
    source = setup.data_dir() / "scenes" / "walk.mp4"
    job = jobs.open_or_create(Path(folder) / "edits", source, "edit", {"steps": steps}, limit=count, shard_size=count)
    found = timed_run(job, 1)
    states = batch.status(job)
    say(f"the real pipeline, {steps} steps: {found['rate']:.3f} images/s, {states['ok']} of {count} ok; commits "
        f"{found['commit']:.2%} of the time ({found['wait']:.2%} waited for)")
