"""The report of a batch, made from its manifests alone, at any moment, also of half a run.

    python -m lib.batch report FOLDER        report.html (reads offline: every picture is inside it),
                                             metrics.csv, summary.json, and the charts and contact sheets as
                                             PNG

Per-image scores are *pooled* in two ways that are not the same, so both are given, in words: the mean of the
images' RMSEs, and the root of the mean of their squares, which is the RMSE over all pixels and weighs bad
images more.
"""
from __future__ import annotations

import base64
import csv
import html
import io
import json
import random
import time
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lib.jobs import FINAL, Job, read_json, read_rows, write_atomic, writing

# what a processor may have measured, the first found counts
SCORES = {"depth_rmse": "depth RMSE", "rmse": "RMSE"}
COLOURS = {"ok": "#54a24b", "bad_input": "#f58518", "nan": "#b279a2", "oom": "#e45756", "error": "#9d2d2d",
           "left": "#d9d9d9"}
TILE, CELLS = 112, 12                       # contact sheets: pixels of a picture, images a sheet
MAP_SCALE = 0.3                             # error that is white on every error map
GAP = 120.0                                 # seconds without a row: the job stood still between two sessions


# ---------------------------------------------------------------- numbers

def table(job: Job) -> list[dict]:
    """One flat line for each input of the list, in order; `status` is "left" where there is no final row
    yet."""
    rows = {row["id"]: row for row in job.rows()}
    times = _frame_times(job)
    flat = []
    for place, item in enumerate(job.items):
        row = rows.get(item["id"], {"status": "left",
                                    "shard": place // job.facts["fingerprint"]["shard_size"]})
        line = {"place": place, "id": item["id"], "frame_time": times.get(item["id"]), **row}
        line |= {f"seconds_{k}": v for k, v in line.pop("seconds", {}).items()}
        line |= {f"metric_{k}": v for k, v in line.pop("metrics", {}).items()
                 if k not in SCORES or isinstance(v, (int, float))}
        flat.append(line)
    return flat


def _frame_times(job) -> dict:
    """id -> seconds into the video, where the inputs are frames of one."""
    rows = read_rows(Path(job.facts["root"]) / "frames.jsonl")[1:]
    return {row["file"]: row["time"] for row in rows if row["dup_of"] is None}


def score_name(lines) -> str:
    return next((n for n in SCORES if any(f"metric_{n}" in line for line in lines)), "")


def pooled(values) -> dict:
    """The summary of per-image scores: both poolings, median, percentiles. {} for none."""
    v = np.asarray(values, float)
    if not len(v):
        return {}
    return {"images": len(v), "mean of the images' RMSE": v.mean(),
            "root of the mean square": np.sqrt((v ** 2).mean()),
            "median": np.median(v), "5th percentile": np.percentile(v, 5),
            "95th percentile": np.percentile(v, 95),
            "largest": v.max()}


def throughput(lines, bins=60) -> dict:
    """Images a second over the time the job ran (pauses between sessions taken out), and what lowered it."""
    done = sorted((line for line in lines if "time" in line), key=lambda line: line["time"])
    if len(done) < 2:
        return {"seconds": 0.0, "rate": 0.0, "times": [], "rates": [], "oom": [], "batch": {}}
    stamps = np.array([line["time"] for line in done])
    clock = np.concatenate([[0.0], np.cumsum(np.minimum(np.diff(stamps), GAP))])
    commits = len(np.unique(stamps))  # a bin narrower than a batch would jump up and down
    edges = np.linspace(0, max(clock[-1], 1e-6), min(bins, max(2, commits // 4)) + 1)
    batch = {}
    for t, line in zip(clock, done):
        batch.setdefault(line["worker"], []).append((t, line["batch"]))
    counts, width = np.histogram(clock, edges)[0], edges[1] - edges[0]
    first = int((clock == 0).sum())  # the work of the first batch lies before its stamp
    return {"seconds": float(clock[-1]), "rate": (len(done) - first) / max(clock[-1], 1e-6),
            "times": edges[:-1] + width / 2, "rates": counts / width,
            "oom": [(t, line["oom"]) for t, line in zip(clock, done) if line.get("oom")], "batch": batch}


def time_spent(job: Job) -> dict:
    """Seconds of all workers by kind, from the done marks."""
    total = Counter()
    for number in job.shards:
        total.update((read_json(job.shard(number).done) or {}).get("timing", {}))
    return dict(total)


def summary(job: Job, lines=None) -> dict:
    """Everything that the report says in numbers, as plain data."""
    lines = lines or table(job)
    counts, name = Counter(line["status"] for line in lines), score_name(lines)
    values = [line[f"metric_{name}"] for line in lines if line.get(f"metric_{name}") is not None]
    flow = throughput(lines)
    messages = Counter((line["status"], line["message"]) for line in lines
                       if line["status"] not in ("ok", "left"))
    return {"job": job.folder.resolve().name, "created": job.facts["created"], "inputs": len(lines),
            "counts": {k: counts[k] for k in (*FINAL, "left")}, "score": name,
            "pooled": {k: round(float(v), 6) for k, v in pooled(values).items()},
            "images_per_second": round(flow["rate"], 4), "seconds": round(flow["seconds"], 1),
            "workers": sorted({line["worker"] for line in lines if "worker" in line}),
            "oom_events": sum(n for _, n in flow["oom"]),
            "in_full_precision": sum(bool(line.get("precise")) for line in lines),
            "peak_mb": max((line.get("peak_mb", 0) for line in lines), default=0),
            "time_spent": {k: round(v, 2) for k, v in time_spent(job).items()},
            "top_messages": [[status, text, n] for (status, text), n in messages.most_common(5)],
            "fingerprint": job.facts["fingerprint"]}


def as_csv(lines) -> bytes:
    """The table as CSV; error maps stay out."""
    names = list(dict.fromkeys(name for line in lines for name in line if name != "metric_error_map"))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue().encode("utf8", "backslashreplace")


# ---------------------------------------------------------------- charts

def _chart(width=7.4, height=2.7):
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(round(width)))       # labels that do not run into each other
    return figure, axes


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def chart_over_time(lines, name) -> bytes:
    """The score along the list (or the video): each image a thin line, and a rolling median."""
    figure, axes = _chart()
    some = [line for line in lines if line.get(f"metric_{name}") is not None]
    seconds = all(line["frame_time"] is not None for line in some)
    x = np.array([line["frame_time"] if seconds else line["place"] for line in some])
    y = np.array([line[f"metric_{name}"] for line in some])
    axes.plot(x, y, color="#9ecae9", linewidth=0.8, label="each image")
    window = max(1, min(51, len(y) // 8) | 1)
    if window > 1:
        padded = np.pad(y, window // 2, mode="edge")
        middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, window), axis=1)
        axes.plot(x, middle, color="#1f4e79", linewidth=1.6, label=f"median of {window}")
    axes.set_xlabel("seconds into the video" if seconds else "place in the list")
    axes.set_ylabel(SCORES[name])
    axes.set_ylim(0, 1.15 * y.max() or 1)
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    return _png(figure)


def chart_histogram(values, name) -> bytes:
    figure, axes = _chart(3.7)
    axes.hist(values, bins=min(40, max(5, len(values) // 4)), color="#4c78a8")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.axvline(np.median(values), color="#e45756", linewidth=1.2, label="median")
    axes.set_xlabel(SCORES[name])
    axes.set_ylabel("images")
    axes.legend(frameon=False, fontsize=8.5)
    return _png(figure)


def chart_ecdf(values, name) -> bytes:
    """Share of the images that are at least as good."""
    figure, axes = _chart(3.7)
    axes.ecdf(values, color="#4c78a8", linewidth=1.6)
    for share in (0.5, 0.95):
        at = np.quantile(values, share)
        axes.plot([0, at, at], [share, share, 0], color="#999999", linewidth=0.8, linestyle=":")
        side = "left" if at < max(values) / 2 else "right"
        axes.text(at, share, f" {share:.0%} below {at:.3f} ", fontsize=8, va="top", ha=side)
    axes.set_xlabel(SCORES[name])
    axes.set_ylabel("share of images")
    axes.set_xlim(0, 1.05 * max(values) or 1)
    return _png(figure)


def chart_throughput(flow) -> bytes:
    """Images a second, batch size, and the moments when memory ran out."""
    figure, axes = _chart()
    axes.plot(flow["times"], flow["rates"], color="#4c78a8", linewidth=1.4, label="images a second")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of work (pauses between sessions taken out)")
    axes.set_ylabel("images a second")
    other = axes.twinx()
    for steps in flow["batch"].values():
        other.step(*zip(*steps), where="post", color="#bbbbbb", linewidth=1.0)
    other.set_ylabel("batch size of each worker", color="#888888")
    other.set_ylim(0, 1.3 * max(b for steps in flow["batch"].values() for _, b in steps))
    for k, (t, _) in enumerate(flow["oom"]):
        axes.axvline(t, color="#e45756", linewidth=0.8, alpha=0.6, label=None if k else "out of memory")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return _png(figure)


def chart_status(counts) -> bytes:
    """One bar: what became of all inputs."""
    figure, axes = _chart(7.4, 0.95)
    left, total = 0, max(1, sum(counts.values()))
    for name, n in counts.items():
        if n:
            axes.barh(0, n, left=left, color=COLOURS[name], label=f"{name} {n:,} ({n / total:.1%})")
            left += n
    axes.set_axis_off()
    axes.legend(ncols=6, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return _png(figure)


# ---------------------------------------------------------------- contact sheets

def choose(lines, name, seed=0) -> dict:
    """{"worst" | "best" | "random": lines}, at most CELLS each."""
    some = [line for line in lines if line["status"] == "ok"
            and (not name or line.get(f"metric_{name}") is not None)]
    picked = random.Random(seed).sample(some, min(CELLS, len(some)))
    sheets = {"random": sorted(picked, key=lambda line: line["place"])}
    if name:
        ordered = sorted(some, key=lambda line: (line[f"metric_{name}"], line["place"]))
        sheets = {"worst": ordered[::-1][:CELLS], "best": ordered[:CELLS], **sheets}
    return sheets


def _thumb(source) -> Image.Image:
    """A picture from bytes or a path, as a tile on grey; what cannot be read is an empty tile."""
    tile = Image.new("RGB", (TILE, TILE), "#eeeeee")
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes)
                                                     else source))
        picture.thumbnail((TILE, TILE))
        picture = picture.convert("RGBA" if "A" in picture.getbands() else "RGB")
        place = ((TILE - picture.width) // 2, (TILE - picture.height) // 2)
        tile.paste(picture, place, picture if picture.mode == "RGBA" else None)
    except Exception:                                             # a report never fails for one picture
        ImageDraw.Draw(tile).text((8, TILE // 2 - 6), "not here", fill="#888888")
    return tile


def _error_tile(line, before, after) -> Image.Image:
    """Where the depth is off; without depth, how much each pixel changed. One scale: 0 black, MAP_SCALE
    white."""
    from lib.processors import unpack_map
    if line.get("metric_error_map"):
        error = unpack_map(line["metric_error_map"])
    else:
        error = np.abs(np.asarray(after, np.float32) - np.asarray(before, np.float32)).mean(2) / 255
    coloured = colormaps["magma"](np.clip(error / MAP_SCALE, 0, 1))[..., :3]
    return Image.fromarray((coloured * 255).astype(np.uint8)).resize((TILE, TILE), Image.Resampling.BILINEAR)


def sheet(job: Job, lines, name) -> bytes:
    """Input | output | error map of each line, with its place, score and id under it."""
    wide, high, font = 3 * TILE + 14, TILE + 34, ImageFont.load_default(11)
    rows = -(-len(lines) // 2)
    canvas = Image.new("RGB", (2 * wide + 6, rows * high + 6), "white")
    pen = ImageDraw.Draw(canvas)
    for k, line in enumerate(lines):
        x, y = 6 + (k % 2) * wide, 6 + (k // 2) * high
        before = _thumb(Path(job.facts["root"], job.items[line["place"]]["path"]))
        after = _thumb(job.shard(line["shard"]).read_output(line) or b"")
        for j, tile in enumerate((before, after, _error_tile(line, before, after))):
            canvas.paste(tile, (x + j * (TILE + 2), y))
        score = f"{SCORES[name]} {line[f'metric_{name}']:.4f}   " if name else ""
        text = f"{score}{line['id']}".encode("ascii", "replace").decode()
        pen.text((x, y + TILE + 3), text[:58] + ("..." if len(text) > 58 else ""), fill="black", font=font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---------------------------------------------------------------- the files

def make(job: Job, to=None) -> Path:
    """Write the report of a job as it is now; returns the path of report.html. `to`: a folder (default
    job/report)."""
    folder = Path(to or job.folder / "report")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lines = table(job)
    facts = summary(job, lines)
    name, flow = facts["score"], throughput(lines)
    values = [line[f"metric_{name}"] for line in lines if line.get(f"metric_{name}") is not None]
    pictures = {"status": chart_status(facts["counts"])}
    if len(values) > 1:
        pictures |= {"over_time": chart_over_time(lines, name), "histogram": chart_histogram(values, name),
                     "ecdf": chart_ecdf(values, name)}
    if flow["seconds"]:                                           # one batch, or one at each worker at once: no rate
        pictures["throughput"] = chart_throughput(flow)
    pictures |= {which: sheet(job, some, name) for which, some in choose(lines, name).items() if some}
    for which, data in pictures.items():
        write_atomic(folder / f"{which}.png", data)
    write_atomic(folder / "metrics.csv", as_csv(lines))
    write_atomic(folder / "summary.json", json.dumps(facts, indent=1).encode())
    page = as_html(facts, pictures, [line for line in lines if line["status"] not in ("ok", "left")])
    write_atomic(folder / "report.html", page.encode("utf8", "backslashreplace"))
    return folder / "report.html"


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:58em;margin:2em auto;padding:0 1em;color:#222}
h1{margin-bottom:0}h2{margin:1.8em 0 .4em}img{max-width:100%}table{border-collapse:collapse}
td,th{border-bottom:1px solid #ddd;padding:.15em 1em .15em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}.note{color:#666}"""


def as_html(facts, pictures, bad) -> str:
    """One file, no script, no link outwards."""
    safe = lambda text: html.escape(str(text))
    data = {which: base64.b64encode(picture).decode() for which, picture in pictures.items()}
    image = lambda which, words: (f"<img alt='{safe(words)}' src='data:image/png;base64,{data[which]}'>"
                                  if which in data else "")
    counts, left = facts["counts"], facts["counts"]["left"]
    done = facts["inputs"] - left
    state = "finished" if not left else f"{left:,} left when this report was made"
    parts = [f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{safe(facts['job'])}</title>",
             f"<style>{STYLE}</style><h1>{safe(facts['job'])}</h1>",
             f"<p class='note'>{done:,} of {facts['inputs']:,} inputs, {state}. Job begun "
             f"{safe(facts['created'])}, report of {time.strftime('%Y-%m-%d %H:%M')}. "
             f"{_speed(facts)}, "
             f"{len(facts['workers'])} worker processes in all, at most {facts['peak_mb']:,.0f} MB of memory "
             "in one.</p>",
             "<h2>What became of the inputs</h2>", image("status", "status of all inputs"),
             _rows([(n, f"{c:,}") for n, c in counts.items()], safe)]
    if facts["top_messages"]:
        parts += ["<p>The commonest reasons:</p>",
                  _rows([(f"{s}: {t}", f"{n:,}") for s, t, n in facts["top_messages"]], safe),
                  f"<details><summary>all {len(bad):,} inputs that are not ok (at most 200 are "
                  "listed)</summary>",
                  _rows([(row["id"], f"{row['status']}: {row['message']}") for row in bad[:200]], safe),
                  "</details>"]
    if facts["pooled"]:
        parts += _score_section(facts, image, safe)
    for which, words in (("worst", "The worst"), ("best", "The best"), ("random", "Some by lot")):
        if which in pictures:
            parts += [f"<h2>{words}</h2><p class='note'>Input, output, error map. All error maps share one "
                      f"scale: black is 0, white is {MAP_SCALE} or more.</p>", image(which, words)]
    parts += ["<h2>Speed</h2>", image("throughput", "images a second over time"),
              f"<p>{facts['oom_events']} times memory ran out and the batch was halved; "
              f"{facts['in_full_precision']} images were done again in full precision.</p>",
              _rows([(_SPENT[k], f"{v:,.1f} s") for k, v in facts["time_spent"].items() if k in _SPENT],
                    safe),
              "<h2>Settings</h2>", _rows(facts["fingerprint"].items(), safe), "</html>\n"]
    return "\n".join(part for part in parts if part)


def _speed(facts) -> str:
    if not facts["seconds"]:
        return "Too few batches to tell a speed"
    return f"{facts['images_per_second']:.3g} images a second over {_hours(facts['seconds'])} of work"


_SPENT = {"wall": "all workers' time, shard by shard", "load": "decoding (in threads)",
          "wait_load": "waiting for decoding", "infer": "inference", "encode": "encoding (in a thread)",
          "commit": "writing and committing (in a thread)", "wait_commit": "waiting for commits"}


def _score_section(facts, image, safe) -> list:
    name = SCORES[facts["score"]]
    meaning = ("Depth, estimated again on each output, against the depth that the edit intended (the input's "
               "own, with the object's surface at its depth), after the best scale and shift; unit: the "
               "course's depth, 0 to 1."
               if facts["score"] == "depth_rmse" else
               "Of the output against the input, for values from 0 to 1.")
    return [f"<h2>{safe(name)}</h2><p>{meaning}</p>",
            _rows([(k, f"{v:,.0f}" if k == "images" else f"{v:.4f}") for k, v in facts["pooled"].items()],
                  safe),
            "<p><b>How images are pooled.</b> Each image gives one RMSE over its pixels. The <i>mean</i> "
            "treats every image alike. The <i>root of the mean square</i> is the RMSE over all pixels of all "
            "images (of one size) together; it is never smaller, and a few bad images raise it. They answer "
            "different questions; do not compare one with the other.</p>",
            image("over_time", f"{name} over time"),
            image("histogram", f"histogram of {name}"), image("ecdf", f"ECDF of {name}")]


def _rows(pairs, safe) -> str:
    cells = "".join(f"<tr><td>{safe(k)}</td><td class='n'>{safe(v)}</td></tr>" for k, v in pairs)
    return f"<table>{cells}</table>"


def _hours(seconds) -> str:
    if seconds < 300:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
