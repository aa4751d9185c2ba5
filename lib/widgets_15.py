"""Lesson 15's charts, its two panels (what an image costs; who works on what), and its stored pictures."""
import io
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from lib import kaggle, show, widgets

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#9d755d")


def _axes(width, height, alt, count=1, **ratios):
    view = show.View(figsize=(width, height), dpi=show.DPI, facecolor="white", layout="constrained")
    view.alt = alt
    parts = np.atleast_1d(view.subplots(1, count, **ratios))
    for axes in parts:
        axes.spines[["top", "right"]].set_visible(False)
    return (view, *parts)


def _pil(view) -> Image.Image:
    return Image.open(io.BytesIO(view.png())).convert("RGB")


# ---------------------------------------------------------------- who did what, when

def lanes(sessions, marks=(), names=None):
    """A lane for each process, a bar for each batch that it worked on, in the colour of its session.

    sessions: one list of manifest rows for each; marks: [(time, text)] as dashed lines; names: theirs.
    """
    batches = {}                                                  # rows of one batch share a time stamp
    for k, rows in enumerate(sessions):
        for row in rows:
            if "infer" in row["seconds"]:
                batches.setdefault((k, row["worker"], row["time"]), []).append(row["seconds"]["infer"])
    start = min(end - sum(parts) for (_, _, end), parts in batches.items())
    ordered = sorted(batches, key=lambda key: (key[0], key[2]))
    workers = list(dict.fromkeys((k, worker) for k, worker, _ in ordered))
    view, axes = _axes(8.6, 1.1 + 0.42 * len(workers), "a lane for each process, a bar for each batch")
    free = dict.fromkeys(workers, 0.0)
    for (k, worker, end), parts in sorted(batches.items(), key=lambda item: item[0][2]):
        left = max(free[k, worker], end - start - sum(parts))
        axes.barh(workers.index((k, worker)), end - start - left, left=left, height=0.7,
                  color=COLOURS[k % len(COLOURS)], edgecolor="white", linewidth=0.8)
        free[k, worker] = end - start
    for moment, text in marks:
        axes.axvline(moment - start, color="black", linewidth=1, linestyle="--")
        axes.text(moment - start, -0.6, f" {text}", fontsize=8.5, va="center")
    names = names or [f"session {n + 1}" for n in range(len(sessions))]
    places = [sum(other == k for other, _ in workers[:n]) + 1 for n, (k, _) in enumerate(workers)]
    axes.set_yticks(range(len(workers)), [f"{names[k]}: process {n}" for (k, _), n in zip(workers, places)])
    axes.set_ylim(len(workers) - 0.4, -0.6 - 0.5 * bool(marks))
    axes.set_xlim(0, None)
    axes.set_xlabel("seconds since the first batch began")
    return view


# ---------------------------------------------------------------- what an image costs on a card

CARDS = {"T4": 65.0, "L4": 121.0, "A100": 312.0, "H100": 990.0}  # TFLOP/s, float16, dense: data sheets
USED = 0.12             # share of the peak that plain diffusers reached on a T4 (the lesson works it out)
BUDGET = 2.5            # seconds an image and a GPU
PASSES_A_STEP = 3       # of mechanism "inject"; the lesson counts them


def seconds_an_image(operations, passes, card="T4", used=USED) -> float:
    """Operations of an image divided by what a card does in a second: its peak, times the share reached."""
    if card not in CARDS or not 0 < used <= 1 or passes < 1:
        raise ValueError(f"Give 1 pass or more, a share in (0, 1] and a card of: {', '.join(CARDS)}.")
    return operations.image(passes) / (CARDS[card] * used)


def steps_within(operations, seconds=BUDGET, card="T4", used=USED) -> int:
    """How many denoising steps fit into `seconds`; 0: not even one."""
    steps = 0
    while seconds_an_image(operations, PASSES_A_STEP * (steps + 1), card, used) <= seconds and steps < 1000:
        steps += 1
    return steps


def sessions_of(hours, each=(kaggle.SESSION - kaggle.MARGIN) / 3600) -> int:
    return max(1, int(np.ceil(hours / each)))


def _operations(side):
    from lib import bench
    return bench.operations("sd15", side)


def budget_view(steps=9, used=USED, card="T4", side=512, gpus=2, thousands=25):
    """Left: seconds an image against steps, by part. Right: hours of the job against GPUs. A PIL picture."""
    if gpus not in range(1, 9) or thousands < 1 or steps not in range(1, 51):
        raise ValueError("Give 1 to 50 steps, 1 to 8 GPUs, and 1 or more thousand images.")
    ops, each = _operations(side), np.arange(1, min(50, max(10, 2 * steps)) + 1)
    rate = CARDS[card] * used
    view, left, right = _axes(9.4, 3.1, "seconds an image against steps; hours against GPUs", 2)
    once = [3 * ops.decode + 2 * ops.encode, 2 * ops.depth]
    parts = [*(tera / rate + 0 * each for tera in once), PASSES_A_STEP * each * ops.unet / rate]
    left.stackplot(each, parts, labels=["VAE", "depth", "U-Net"], colors=["#f58518", "#b279a2", "#4c78a8"])
    here = seconds_an_image(ops, PASSES_A_STEP * steps, card, used)
    left.axhline(BUDGET, color="black", linestyle="--", linewidth=1, label=f"{BUDGET} s")
    left.plot([steps], [here], "o", color="#e45756", markersize=8, clip_on=False)
    left.set_title(f"{_count(steps, 'step')} (red dot): {here:.1f} s, worked out", fontsize=9.5)
    left.set_xlim(1, each[-1])
    left.set_ylim(bottom=0)
    left.set_xlabel("denoising steps")
    left.set_ylabel(f"seconds an image on one {card}")
    left.legend(frameon=False, fontsize=8.5, loc="upper left")
    counts = np.arange(1, 9)
    hours = thousands * 1000 * here / 3600 / counts
    right.bar(counts, hours, color=["#e45756" if n == gpus else "#c7d5e8" for n in counts])
    session = (kaggle.SESSION - kaggle.MARGIN) / 3600
    for k in range(1, int(min(hours.max() / session, 6)) + 1):
        right.axhline(k * session, color="#555555", linestyle=":", linewidth=1)
        right.text(9.8, k * session, _count(k, "session"), fontsize=8, ha="right", va="bottom",
                   color="#555555")
    right.set_title(f"{_count(gpus, 'GPU')} (red): {hours[gpus - 1]:.0f} hours", fontsize=9.5)
    right.set_xlim(0.4, 9.9)
    right.set_xlabel("GPUs")
    right.set_ylabel(f"hours for {thousands},000 images")
    return _pil(view)


def budget_text(steps=9, used=USED, card="T4", side=512, gpus=2, thousands=25) -> str:
    ops = _operations(side)
    here = seconds_an_image(ops, PASSES_A_STEP * steps, card, used)
    hours, fit = thousands * 1000 * here / 3600 / gpus, steps_within(ops, BUDGET, card, used)
    passes, word = PASSES_A_STEP * steps, "within" if here <= BUDGET else "over"
    return (f"{_count(steps, 'step')}: {passes} passes, {ops.image(passes):.0f} TFLOP an image. "
            f"At {used:.0%} of the {card}'s {CARDS[card]:.0f} TFLOP/s: {here:.2f} s, {word} {BUDGET} s "
            f"(into which {_count(fit, 'step')} would fit). {thousands},000 images on {_count(gpus, 'GPU')}: "
            f"{hours:.1f} h, {_count(sessions_of(hours), 'session')} of 12 h")


def _count(n, thing) -> str:
    return f"{n} {thing}{'' if n == 1 else 's'}"


def budget():
    """Sliders for the cost of an image of Stable Diffusion 1.5: a `panel`."""
    import ipywidgets
    wide = dict(style={"description_width": "110px"}, layout=ipywidgets.Layout(width="480px"))
    return widgets.panel(
        lambda **values: (budget_view(**values), budget_text(**values)), "gpu-budget",
        card=ipywidgets.Dropdown(options=list(CARDS), value="T4", description="card", **wide),
        side=ipywidgets.Dropdown(options=[512, 768], value=512, description="side, pixels", **wide),
        steps=widgets.slider(9, 1, 50, 1, "steps"),
        used=widgets.slider(USED, 0.04, 0.6, 0.01, "share of peak"),
        gpus=widgets.slider(2, 1, 8, 1, "GPUs"), thousands=widgets.slider(25, 1, 100, 1, "images x 1000"))


# ---------------------------------------------------------------- who works on what

PLANS = ("fixed halves", "every other", "next free takes next")


def hand_out(durations, speeds, plan=PLANS[2]) -> list[tuple[int, float, float]]:
    """(worker, start, end) of each piece of work, in order. durations: seconds at speed 1."""
    if plan not in PLANS or not len(speeds) or min(speeds) <= 0:
        raise ValueError(f"Give speeds above 0 and a plan of: {', '.join(PLANS)}.")
    free, out, count = [0.0] * len(speeds), [], len(durations)
    for k, seconds in enumerate(durations):
        fixed = {PLANS[0]: k * len(speeds) // count, PLANS[1]: k % len(speeds)}
        worker = fixed.get(plan, int(np.argmin(free)))
        end = free[worker] + seconds / speeds[worker]
        out.append((worker, free[worker], end))
        free[worker] = end
    return out


def _work(shards, images=240, setup=0.3, seed=3):
    """Seconds of each shard: `images` of 1 s each, more or less, cut into shards that cost `setup` s more."""
    seconds = np.random.default_rng(seed).gamma(4, 0.25, images)
    return [float(part.sum()) + setup for part in np.array_split(seconds, shards)]


def hand_out_view(shards=12, second=0.6, plan=PLANS[2]):
    """Two workers' lanes; the second has `second` of the first one's speed. Returns a PIL picture."""
    if not 2 <= shards <= 240:
        raise ValueError("Give 2 to 240 shards for the 240 images.")
    view, axes = _axes(9.0, 2.0, "two workers' lanes with their shards, and how long one waits at the end")
    done = hand_out(_work(shards), [1.0, second], plan)
    for k, (worker, start, end) in enumerate(done):
        axes.barh(worker, end - start, left=start, height=0.6, color=COLOURS[worker], edgecolor="white",
                  linewidth=0.8 if shards <= 60 else 0.2)
    last = max(end for *_, end in done)
    for worker in (0, 1):
        idle = max([end for w, _, end in done if w == worker], default=0.0)
        axes.barh(worker, last - idle, left=idle, height=0.6, color="#eeeeee", hatch="///",
                  edgecolor="#bbbbbb", linewidth=0)
    axes.set_yticks([0, 1], ["GPU 0", f"GPU 1 ({second:.0%} as fast)"])
    axes.set_ylim(1.5, -0.5)
    axes.set_xlim(0, 260)
    axes.set_xlabel("seconds (hatched: nothing to do)")
    axes.set_title(f"{plan}, {shards} shards", loc="left", fontsize=9)
    return _pil(view)


def hand_out_text(shards=12, second=0.6, plan=PLANS[2]) -> str:
    work = _work(shards)
    last = max(end for *_, end in hand_out(work, [1.0, second], plan))
    best = sum(_work(1, setup=0.0)) / (1 + second)
    return (f"{shards} shards of about {240 / shards:.0f} images, {plan}: {last:.0f} s, "
            f"{last / best - 1:.0%} more than the {best:.0f} s without waiting and without beginnings")


def shards():
    """How to hand out work to two workers of different speed: a `panel`."""
    import ipywidgets
    ways = ipywidgets.Dropdown(options=PLANS, value=PLANS[0], description="who takes what",
                               style={"description_width": "110px"}, layout=ipywidgets.Layout(width="480px"))
    return widgets.panel(lambda **values: (hand_out_view(**values), hand_out_text(**values)), "hand-out",
                         plan=ways, shards=widgets.slider(12, 2, 240, 1, "shards"),
                         second=widgets.slider(0.6, 0.2, 1.0, 0.05, "GPU 1's speed"))


# ---------------------------------------------------------------- the stored pictures

def stack(pictures, gap=8):
    """PIL pictures one above the other."""
    size = max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap
    canvas = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    return canvas


def two_sessions(base, images=40, wait=0.12):
    """A job that a session's end interrupts after a third of its pictures, and a second session elsewhere.

    The end comes as --max-seconds brings it: no new batch is begun. wait: seconds a picture, as a device
    would take. Returns ([rows of the first, rows that the second one added], the second job, when the end
    came).
    """
    from lib import batch, bench, jobs
    base = Path(base)
    source, settings = bench.make_inputs(base / "in", images, 64), {"rounds": 1, "wait": wait}
    make = lambda name: jobs.open_or_create(base / name, source, "lib.bench:Work", settings, shard_size=4)
    plan = lambda stop="": batch.Plan(batch.Options(batch=2, stop_file=stop), 2, quiet=True, device="cpu")
    first, ended = make("one"), []

    def end():
        while len(first.rows()) < images // 3:
            time.sleep(0.02)
        ended.append(time.time())
        (base / "the-end").touch()
    threading.Thread(target=end, daemon=True).start()
    batch.run(first, plan(str(base / "the-end")))
    second = make("two")
    jobs.adopt(second, [first.folder])
    batch.run(second, plan())
    before = {row["id"] for row in first.rows()}
    return [first.rows(), [row for row in second.rows() if row["id"] not in before]], second, ended[0]


def make_figures(folder):
    """Draw the stored pictures of lesson 15 (some seconds: one of them is a real job)."""
    folder, paths = Path(folder), []
    with tempfile.TemporaryDirectory() as base:
        parts, _, ended = two_sessions(base)
        drawn = _pil(lanes(parts, [(ended, "the first session's time is up")]))
    stills = {"15_sessions": drawn, "15_budget": stack([budget_view(), budget_view(steps=50)]),
              "15_hand_out": stack([hand_out_view(n, plan=plan) for n, plan in
                                    ((12, PLANS[0]), (12, PLANS[2]), (60, PLANS[2]))])}
    for name, picture in stills.items():
        data = io.BytesIO()
        picture.quantize(64, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
        paths.append(show._atomic(folder / f"{name}.png", data.getvalue()))
    return paths
