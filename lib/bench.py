"""`python -m lib.batch bench`: what the job itself costs on this machine, measured, with the load beside it.

    bench                  scaling of two workers against one, cost of the commits, the parent's share
    bench --memory 25000   a worker's memory from its 100th image to its last, with a cheap processor
    bench --edits 12       the same with the real pipeline, on frames of the sample video
    bench --edits 24 --device cuda --model random-sd15
                           one and two processes on one card: images/s, how busy it was, its memory

The last part counts the operations of an image too (`operations`), so that images/s become the share of the
card's peak that is reached: the one number that the budget of lesson 15 has to assume.
"""
from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import batch, engines, jobs, report
from lib.processors import Output, Tint


class Work(Tint):
    """As much NumPy as `rounds` says, so that a picture takes some tens of milliseconds, as on a fast GPU;
    and `wait` seconds more that need no core, as on a slow one."""
    defaults = {**Tint.defaults, "rounds": 12, "wait": 0.0}
    batch = 8

    def infer(self, inputs, seeds, precise=False):
        out = []
        time.sleep(self.settings["wait"] * len(inputs))
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
        picture = Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / f"{n:05d}.png", compress_level=1)
    return folder


def rate(job) -> float:
    """Images a second: the sum of the workers' own rates between their first and last commit (no
    start-up)."""
    stamps = defaultdict(list)
    for row in job.rows():
        stamps[row["worker"]].append(row["time"])
    total = 0.0
    for times in stamps.values():
        times.sort()
        first = sum(t == times[0] for t in times)  # the first batch's own work lies before its stamp
        total += (len(times) - first) / (times[-1] - times[0]) if times[-1] > times[0] else 0.0
    return total


def timed_run(job, workers: int, device="cpu", pin=True) -> dict:
    """Run a job; rate, the parent's share of a core, commits' share of the workers' time, memory."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    plan = batch.Plan(batch.Options(loaders=1), workers, pin=pin, quiet=True, device=device)
    code = batch.run(job, plan)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    parent = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / wall
    spent, rows = report.time_spent(job), sorted(job.rows(), key=lambda row: row["time"])
    share = {name: spent.get(key, 0) / spent["wall"] for name, key in (
        ("busy", "infer"), ("commit", "commit"), ("wait", "wait_commit"))}
    return {"code": code, "rate": rate(job), "parent": parent, "wall": wall, "rows": rows, **share}


# ---------------------------------------------------------------- memory

def memory(rows) -> list[list[tuple[int, float]]]:
    """For each worker: [(how many images it had done, its peak memory in MB until then), ...], at 100,
    1,000 and so on and at its last (for a short run: from a third of it on)."""
    peaks = defaultdict(list)
    for row in rows:
        peaks[row["worker"]].append(row["peak_mb"])
    found = []
    for p in peaks.values():
        marks = [n for n in (100, 1_000, 10_000, 100_000) if n < len(p)] or [max(1, len(p) // 3)]
        found.append([(n, p[n - 1]) for n in (*marks, len(p))])
    return found


def show_memory(rows, say, what):
    for marks in memory(rows):
        says = ", ".join(f"{used:.1f} MB at image {n:,}" for n, used in marks)
        say(f"memory      {what}, one worker: {says} ({marks[-1][1] / marks[0][1] - 1:+.1%})")


def _long_run(folder, count, say):
    """One worker, `count` small pictures, a processor that costs next to nothing: does anything pile up?"""
    source = make_inputs(Path(folder) / "many", count, 16)
    begin = time.perf_counter()
    found = timed_run(jobs.open_or_create(Path(folder) / "long", source, "tint"), 1)
    say(f"{count:,} pictures with a cheap processor (tint, 16 x 16 pixels): "
        f"{time.perf_counter() - begin:.0f} s")
    show_memory(found["rows"], say, "cheap processor")


# ---------------------------------------------------------------- operations

class Operations(NamedTuple):
    """Multiplications and additions, in units of 10^12 (TFLOP): of one pass of the U-Net for one sample, of
    the VAE's encoder and decoder for one picture, of one depth estimate."""
    unet: float
    encode: float
    decode: float
    depth: float

    def image(self, passes, encodes=2, decodes=3, depths=2) -> float:
        """TFLOP of one edited image. The defaults are the calls of `insert_object` with mechanism
        "inject" and of the score, as a test counts them: two encodings, three decodings, depth before and
        after."""
        return passes * self.unet + encodes * self.encode + decodes * self.decode + depths * self.depth


def tera(function) -> float:
    """TFLOP of a call, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops() / 1e12


@lru_cache
def operations(model="sd15", side=512) -> Operations:
    """Counted on the device `meta`, which knows shapes and holds no numbers: no weights, no GPU, a second.

    model: "sd15" (with DPT-Large for depth), or a pipeline's folder or name (with mini-depth). side: of its
    pictures.
    """
    import torch
    with torch.device("meta"):
        if model in ("sd15", "random-sd15"):
            unet, vae, words, depth = *_sd15_shapes(), 77, _dpt_large()
            eye = 384
        else:
            unet, vae, words, depth, eye = _shapes_of(model)
        latent = torch.empty(1, 4, side // 8, side // 8)
        text = torch.empty(1, words, unet.config.cross_attention_dim)
        return Operations(tera(lambda: unet(latent, torch.tensor(500), text)),
                          tera(lambda: vae.encode(torch.empty(1, 3, side, side))),
                          tera(lambda: vae.decode(latent)),
                          tera(lambda: depth(torch.empty(1, 3, eye, eye))))


def _sd15_shapes():
    """Stable Diffusion 1.5's U-Net and VAE, without weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    return (UNet2DConditionModel(64, cross_attention_dim=768),
            AutoencoderKL(3, 3, down, up, (128, 256, 512, 512), layers_per_block=2, sample_size=512))


def _dpt_large():
    from transformers import DPTConfig, DPTForDepthEstimation
    return DPTForDepthEstimation(DPTConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                           intermediate_size=4096, backbone_out_indices=[5, 11, 17, 23],
                                           neck_hidden_sizes=[256, 512, 1024, 1024]))


def _shapes_of(model):
    """(U-Net, VAE, words of a prompt, depth model, its picture's side) of a folder, without weights."""
    import json

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import DPTConfig, DPTForDepthEstimation

    from lib import setup
    home = setup.data_dir() / "models"
    folder = Path(model) if Path(model).is_dir() else home / model
    config = DPTConfig.from_pretrained(home / "mini-depth")
    words = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    return (UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")), words,
            DPTForDepthEstimation(config),
            config.image_size)


# ---------------------------------------------------------------- one card, one and two processes

class Watch:
    """Samples a GPU with nvidia-smi, a few times a second, while the block runs.

    samples: [(time, busy share in %, memory in use in MB), ...]; the memory is the card's, of all that run on
    it.
    """
    EVERY = 0.25

    def __init__(self, card: str | None):
        self.card, self.samples, self.process = card, [], None

    def __enter__(self):
        if self.card is not None:
            query = ["nvidia-smi", "-i", self.card, "--query-gpu=timestamp,utilization.gpu,memory.used",
                     "--format=csv,noheader,nounits", "-lms", str(int(1000 * self.EVERY))]
            # or the last lines stay in its buffer
            by_line = ["stdbuf", "-oL"] if shutil.which("stdbuf") else []
            self.file = tempfile.TemporaryFile("w+")
            with contextlib.suppress(OSError):
                self.process = subprocess.Popen(by_line + query, stdout=self.file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.file.seek(0)
            self.samples = list(filter(None, map(self._sample, self.file.read().splitlines())))
            self.file.close()

    @staticmethod
    def _sample(line):
        """Such as "2026/11/25 21:30:00.125, 93, 9120"; None for another ("[N/A]", "No devices were
        found")."""
        with contextlib.suppress(ValueError):
            stamp, share, used = line.split(",")
            return datetime.strptime(stamp.strip(),
                                     "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(share), float(used)

    def words(self, rows=()) -> str:
        """The busy share between the first and the last image of `rows`: loading the model is no idling."""
        if not self.samples:
            return "device busy: not measured (nvidia-smi gave no numbers)"
        first = min((row["time"] - row["seconds"].get("infer", 0) for row in rows), default=0)
        last = max((row["time"] for row in rows), default=float("inf"))
        busy = [share for at, share, _ in self.samples if first <= at <= last] or [x[1] for x in self.samples]
        return (f"device busy {np.mean(busy):.0f} % of the time (nvidia-smi), "
                f"at most {max(used for _, _, used in self.samples):,.0f} MB on it")


def random_pipeline(folder: Path, like="sd15") -> Path:
    """A Stable Diffusion pipeline folder with random weights: as large as SD 1.5, or "tiny", for tests. Time
    and memory are those of real weights; the pictures are noise."""
    import torch

    from lib import models, train
    if like == "tiny":
        pipe = train.tiny_pipeline()
    else:
        tokenizer = train.make_tokenizer()
        unet, vae = _sd15_shapes()
        pipe = train._pipeline(vae, train.make_text(tokenizer, 768, 12), tokenizer, unet, False)
        for part in (pipe.unet, pipe.vae):
            models._cast(part, "cpu", torch.float16)
    with models._no_bars():
        pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def _edits(folder, count, steps, device, model, dtype, say):
    """The real pipeline on frames of the sample video: one worker and, on a GPU, two on the one card."""
    from lib import setup
    source, card = setup.data_dir() / "scenes" / "walk.mp4", (engines.gpus() or [None])[0]
    if model.startswith("random-"):
        model = str(random_pipeline(Path(folder) / f"{model}-weights", model.removeprefix("random-")))
    size = setup._picture_size(model)
    for workers in (1, 2) if str(device).startswith("cuda") else (1,):
        job = jobs.open_or_create(Path(folder) / f"edits{workers}", source, "edit",
                                  {"steps": steps, "model": model, "dtype": dtype}, limit=count,
                                  shard_size=max(1, count // (2 * workers)))
        with _only(card), Watch(card if str(device).startswith("cuda") else None) as watch:
            found = timed_run(job, workers, device, pin=device == "cpu")
        states, passes = batch.status(job), [row["metrics"].get("passes", 0) for row in found["rows"]]
        each = operations(model, size).image(float(np.mean(passes)))
        speed, words = found["rate"], ""
        if not speed:
            speed, words = len(passes) / found["wall"], " (the start of the process included: more edits tell more)"
        say(f"the real pipeline, {steps} steps, {size} x {size}, {workers} process{'es' * (workers > 1)} on "
            f"{device}: {speed:.3g} images/s{words}, {states['ok']} of {count} ok")
        say(f"            {np.mean(passes):.0f} passes and {each:.3g} TFLOP an image: "
            f"{each * speed:.3g} TFLOP/s; in inference {found['busy']:.0%} of a worker's time; "
            + watch.words(found["rows"]))
        say(f"            commits {found['commit']:.2%} of the time ({found['wait']:.2%} waited for)")
        show_memory(found["rows"], say, "real pipeline")


@contextlib.contextmanager
def _only(card):
    """All workers on this one card."""
    seen = engines.on_card(card)
    old = {name: os.environ[name] for name in seen if name in os.environ}
    os.environ.update(seen)
    try:
        yield
    finally:
        for name in seen:
            os.environ.pop(name)
        os.environ.update(old)


# ---------------------------------------------------------------- all of it

def run(images=600, edits=0, steps=50, memory_images=0, device="cpu", model="mini", dtype="auto",
        say=print) -> int:
    """Print all of it; returns an exit code (0 also where a number is bad: the reader judges)."""
    from lib import setup
    cores, load = setup.cpus(), os.getloadavg()[0]
    busy = " (this machine is busy: ratios suffer)" if load > 0.5 else ""
    say(f"{cores} cores, load {load:.1f} at the start{busy}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if images:
            _scaling(folder, images, say)
        if memory_images:
            _long_run(folder, memory_images, say)
        if edits:
            _edits(folder, edits, steps, device, model, dtype, say)
    return 0


def _scaling(folder, images, say):
    """The same inputs with one worker and with two, each pinned to a core with one thread."""
    source = make_inputs(Path(folder) / "in", images)
    make = lambda n: jobs.open_or_create(Path(folder) / f"workers{n}", source, "lib.bench:Work",
                                         shard_size=32)
    one, two = (timed_run(make(n), n) for n in (1, 2))
    say(f"one worker  {one['rate']:7.1f} images/s")
    say(f"two workers {two['rate']:7.1f} images/s: {two['rate'] / one['rate']:.2f} x")
    say(f"parent      {two['parent']:7.1%} of a core while two workers run")
    show_memory(two["rows"], say, "Work")
    say(f"commits     {two['commit']:7.1%} of the workers' time here, in a thread beside the work "
        f"({two['wait']:.1%} waited for)")
