"""Lesson 12's interactive parts: damage a true picture and read every score; compare two methods, room by room.

`damage_view` and `pairs_view` are plain functions of their settings; the shells only add sliders and
dropdowns. Also here: examples with their truth, the stored scoreboard as arrays, the lesson's stored pictures.
"""
import csv
import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

from lib import benchmark, metrics, scenes, show, widgets

EXAMPLE = {"FIRST": 20000001, "ROOMS": 4}            # the lesson's own parameters; a test compares them
ZONE_COLOURS = {"shading": (0.96, 0.52, 0.09), "shadow": (0.30, 0.47, 0.90), "outside": (0.45, 0.45, 0.45)}
ERROR_TOP = 0.3          # an error of 0.3 or more is the brightest yellow of an error map


# ---------------------------------------------------------------- a case with everything its truth knows

@dataclass
class Example:
    """One insertion case of the board, and more of its truth. depth (1, 1, H, W): metres of the true picture;
    valid: 1 where no glass is; whole (1, 4, H, W): the object with nothing in front, in the right light."""
    case: benchmark.Case
    depth: torch.Tensor
    valid: torch.Tensor
    whole: torch.Tensor


def example(seed, size=scenes.SIZE):
    """The insertion case of a test seed as an `Example`, always the same one."""
    if scenes.split_of(seed) != "test":
        raise ValueError(f"FIRST must be a test seed, 20000000 to 29999999; it is {seed}.")
    found = scenes.insertion_case(seed)
    r = scenes.render(found["scene"], size=size)
    glass = scenes.KINDS.index("glass") + 1
    return Example(benchmark.case("insertion", seed, size), r.depth, (r.kind != glass).float(),
                   scenes.only(found["scene"], found["index"], size=size))


# ---------------------------------------------------------------- damage of a known kind and amount

def _shift(x, amount, e):
    k = round(8 * amount)
    return torch.cat([x[..., :1].expand(*x.shape[:-1], k), x[..., :x.shape[-1] - k]], -1) if k else x


def _blur(x, amount, e):
    sigma = 3 * amount
    if sigma < 0.05:
        return x
    at = torch.arange(-10, 11).float()
    g = torch.exp(-(at / sigma).square() / 2)
    g = (g / g.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (10, 10, 0, 0), mode="replicate"), g, groups=3)
    return F.conv2d(F.pad(x, (0, 0, 10, 10), mode="replicate"), g.mT, groups=3)


def _noise(x, amount, e):
    return x + 0.3 * amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def _cast(x, amount, e):
    return x + 0.3 * amount * torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1)


def _no_shadow(x, amount, e):
    m = amount * e.case.zones["shadow"]
    return x * (1 - m) + e.case.background * m


def _no_object(x, amount, e):
    m = amount * e.case.zones["shading"]
    return x * (1 - m) + e.case.background * m


def _in_front(x, amount, e):
    m = amount * e.whole[:, 3:]
    return x * (1 - m) + e.whole[:, :3] * m


#: name -> (function of picture, amount in [0, 1] and Example; what an amount is in words)
DAMAGES = {"shift": (_shift, lambda a: f"{round(8 * a)} pixels to the right"),
           "blur": (_blur, lambda a: f"Gaussian, sigma {3 * a:.2f} pixels"),
           "noise": (_noise, lambda a: f"Gaussian, standard deviation {0.3 * a:.3f}"),
           "brightness": (lambda x, a, e: x + 0.3 * a, lambda a: f"all values {0.3 * a:+.3f}"),
           "colour cast": (_cast, lambda a: f"red {0.3 * a:+.3f}, blue {-0.3 * a:+.3f}"),
           "shadow removed": (_no_shadow, lambda a: f"{a:.0%} of it"),
           "object removed": (_no_object, lambda a: f"faded by {a:.0%}"),
           "object in front": (_in_front, lambda a: f"over what hides it, opaque to {a:.0%}")}
#: the amounts of the lesson's table and of its strip: one pixel, sigma 1, 0.05, 0.05, 0.05, all, all, all
TYPICAL = {"shift": 1 / 8, "blur": 1 / 3, "noise": 1 / 6, "brightness": 1 / 6, "colour cast": 1 / 6,
           "shadow removed": 1.0, "object removed": 1.0, "object in front": 1.0}


def damage(e, kind, amount):
    """The true picture of an `Example` with one kind of damage, (1, 3, H, W). amount in [0, 1], 0 = none."""
    if kind not in DAMAGES:
        raise ValueError(f"unknown damage {kind!r}: use one of {', '.join(DAMAGES)}.")
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must lie between 0 (none) and 1, not {amount}.")
    return DAMAGES[kind][0](e.case.truth, amount, e).clamp(0, 1)


def amount_for(e, kind, rmse, rounds=24):
    """The amount at which a damage has this RMSE over the picture, by bisection; 1.0 where all of it has less."""
    low, high = 0.0, 1.0
    if float(metrics.rmse(damage(e, kind, 1.0), e.case.truth)) < rmse:
        return 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        less = float(metrics.rmse(damage(e, kind, middle), e.case.truth)) < rmse
        low, high = (middle, high) if less else (low, middle)
    return high


def error_map(image, truth):
    """|image - truth|, mean of the channels, as colours (1, 3, H, W): black 0, yellow ERROR_TOP and more."""
    off = ((image - truth).abs().mean(1) / ERROR_TOP).clamp(0, 1)
    return torch.from_numpy(colormaps["inferno"](off.numpy()))[..., :3].float().movedim(-1, 1)


def zone_map(c):
    """The zones of a case over its faint picture, (1, 3, H, W): orange shading, blue shadow, grey outside."""
    colours = sum(c.zones[z] * torch.tensor(rgb).view(1, 3, 1, 1) for z, rgb in ZONE_COLOURS.items())
    return 0.65 * colours + 0.35 * c.truth.mean(1, keepdim=True)


def damage_view(judge, e, kind, amount):
    """(PIL picture, text): a damaged picture, where it is off, the zones, and every score."""
    c, image = e.case, damage(e, kind, amount)
    s, (order, _) = benchmark.scores(judge, image, c), benchmark.judged(judge, image, c)
    labels = [f"{kind}:\n{DAMAGES[kind][1](amount)}", f"where it is off\n(black 0, yellow {ERROR_TOP}+)",
              "the zones: orange shading,\nblue shadow, grey outside", "the truth"]
    drawn = show.tile([image, error_map(image, c.truth), zone_map(c), c.truth], labels, columns=4)
    zones = ", ".join(f"{z} {s[f'rmse_{z}']:.3f}" for z in ZONE_COLOURS)
    seen = {1.0: "right", 0.0: "WRONG"}.get(order, "no occluder")
    return drawn, (f"<b>RMSE</b> {zones} &nbsp; <b>PSNR</b> {s['psnr']:.1f} dB &nbsp; <b>SSIM</b> {s['ssim']:.3f} "
                   f"&nbsp; <b>feat_dist</b> {s['feat_dist']:.3f} &nbsp; <b>order</b> {seen}")


def damage_explorer(judge, e, kind="blur", amount=1 / 3):
    """Choose a damage and how much of it: a `panel` of picture, error, zones and scores."""
    import ipywidgets as w
    return widgets.panel(lambda kind, amount: damage_view(judge, e, kind, amount), "damage-explorer",
                         kind=w.Dropdown(options=list(DAMAGES), value=kind, description="damage"),
                         amount=widgets.slider(round(amount, 2), 0.0, 1.0, 0.01, "amount"))


# ---------------------------------------------------------------- the stored scoreboard

#: measure -> (column of the CSV, words, is more better?)
MEASURES = {"shadow": ("rmse_shadow", "RMSE in the shadow zone", False),
            "shading": ("rmse_shading", "RMSE in the shading zone", False),
            "outside": ("rmse_outside", "RMSE outside", False), "PSNR": ("psnr", "PSNR (dB)", True),
            "SSIM": ("ssim", "SSIM", True), "feat_dist": ("feat_dist", "feat_dist", False),
            "order": ("order", "occlusion order right", True), "present": ("present", "object present", True),
            "U-Net passes": ("passes", "U-Net passes", False)}


@lru_cache(maxsize=4)
def board(folder=None):
    """(summary, rows): the newest stored scoreboard, the README's, and its CSV as a tuple of dicts.

    Numbers are floats, NaN where there is none. Raises FileNotFoundError when no result is stored."""
    path, summary = benchmark.newest(folder)
    words = ("task", "mechanism")
    rows = [{k: v if k in words else float(v or "nan") for k, v in row.items()}
            for row in csv.DictReader(io.StringIO(path.with_suffix(".csv").read_text()))]
    return summary, tuple(rows)


def column(rows, task, mechanism, key):
    """One score of one method in every room of a task, in the order of the seeds: a float array (N,)."""
    mine = {int(r["seed"]): r[key] for r in rows if (r["task"], r["mechanism"]) == (task, mechanism)}
    if not mine:
        raise ValueError(f"the scoreboard has no {mechanism!r} for {task!r}.")
    return np.array([mine[s] for s in sorted(mine)])


def pairs_view(rows, task, measure, first, second):
    """(PIL picture, text): two methods room by room, their differences, the paired and unpaired interval."""
    key, words, more = MEASURES[measure]
    missing = {first, second} - {r["mechanism"] for r in rows if r["task"] == task}
    if missing:
        return _message(f"{words}: {task} was not done by {', '.join(missing)}."), "nothing to compare"
    a, b = (column(rows, task, m, key) for m in (first, second))
    keep = np.isfinite(a) & np.isfinite(b)
    a, b = a[keep], b[keep]
    if len(a) < 2:
        return _message(f"{words}: fewer than 2 rooms have this score."), "nothing to compare"
    paired, loose = (f(a, b, resamples=1999) for f in (metrics.paired_bootstrap, metrics.unpaired_bootstrap))
    view = show.View(figsize=(9.6, 3.9), dpi=show.DPI, facecolor="white")
    _scatter(view.add_axes((0.075, 0.15, 0.3, 0.75)), a, b, words, first, second)
    _histogram(view.add_axes((0.46, 0.15, 0.52, 0.75)), a - b, paired, loose, first, second)
    return _pil(view), _verdict(paired, first, second, words, more)


def _scatter(axes, a, b, words, first, second):
    low, high = min(a.min(), b.min()), max(a.max(), b.max())
    pad = 0.05 * (high - low) or 0.5
    axes.plot([low - pad, high + pad], [low - pad, high + pad], color="#999999", linewidth=1)
    axes.scatter(b, a, s=22, color="#4c78a8", alpha=0.75, linewidths=0)
    axes.set(xlabel=second, ylabel=first, xlim=(low - pad, high + pad), ylim=(low - pad, high + pad))
    axes.set_title(f"{words}: one dot a room", fontsize=10)


def _histogram(axes, d, paired, loose, first, second):
    values, counts = np.unique(d, return_counts=True)
    if len(values) <= 3:                                 # yes or no: a bar for each value, not for each bin
        axes.bar(values, counts, width=0.12 * (np.ptp(d) or 1), color="#bcd0e5")
    else:
        axes.hist(d, bins=min(24, max(6, len(d) // 3)), color="#bcd0e5", edgecolor="white")
    top = axes.get_ylim()[1]
    axes.axvline(0, ymax=0.7, color="black", linewidth=1.2, linestyle="--", label="no difference")
    for k, (r, colour, name) in enumerate(((paired, "#e45756", "paired interval of the mean"),
                                           (loose, "#888888", "interval if the pairing is forgotten"))):
        y = top * (1.08 + 0.09 * k)
        axes.plot([r["low"], r["high"]], [y, y], color=colour, linewidth=4, solid_capstyle="butt", label=name)
        axes.plot([r["diff"]], [y], marker="o", color=colour, markersize=6)
    axes.set(ylim=(0, top * 1.75), xlabel=f"{first} minus {second}, one value a room", ylabel="rooms")
    axes.locator_params(axis="x", nbins=7)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=True, framealpha=1, edgecolor="white", fontsize=9, loc="upper right")


def _verdict(r, first, second, words, more):
    if not r["excludes_zero"]:
        said = "it holds 0: this board cannot tell them apart"
    else:
        said = f"<b>{first if (r['diff'] > 0) == more else second}</b> is better on the mean"
    return (f"{words}, {first} - {second}, {r['n']} rooms: {r['diff']:+.4f}, 95 % paired interval "
            f"[{r['low']:+.4f}, {r['high']:+.4f}]; {said}.")


def _message(text):
    view = show.View(figsize=(9.6, 3.9), dpi=show.DPI, facecolor="white")
    view.text(0.5, 0.5, text, ha="center", va="center", fontsize=12)
    return _pil(view)


def _pil(view):
    return Image.open(io.BytesIO(view.png())).convert("RGB")


def pairs_explorer(rows, first="inject", second="geometry"):
    """Choose task, measure and two methods of the board: a `panel` of dots, differences and intervals."""
    import ipywidgets as w
    bounds = ("vae", "vae-residual", "plain-cfg")
    names = [m for m in dict.fromkeys(r["mechanism"] for r in rows) if m not in bounds]
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    return widgets.panel(lambda **chosen: pairs_view(rows, **chosen), "pairs-explorer",
                         task=w.Dropdown(options=tasks, description="task"),
                         measure=w.Dropdown(options=list(MEASURES), description="measure"),
                         first=w.Dropdown(options=names, value=first, description="first"),
                         second=w.Dropdown(options=names, value=second, description="second"))


# ---------------------------------------------------------------- small drawings

def heat_map(rows, columns, shade, texts, label, width=None):
    """A table as colours. shade (R, C) in [0, 1]: white 0, dark red 1; texts (R, C): what is written there."""
    shade = np.asarray(shade, dtype=float)
    if shade.shape != (len(rows), len(columns)) or np.shape(texts) != shade.shape:
        raise ValueError(f"{len(rows)} rows, {len(columns)} columns: they do not fit values {shade.shape}.")
    size = width or 2.6 + 1.0 * len(columns), 0.75 + 0.42 * len(rows)
    view = show.View(figsize=size, dpi=show.DPI, facecolor="white")
    w, h = view.get_size_inches()
    axes = view.add_axes((1.75 / w, 0.1 / h, 1 - 2.65 / w, 1 - 0.65 / h))
    shown = axes.imshow(np.ma.masked_invalid(shade), cmap="Reds", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            colour = "white" if shade[i, j] > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color=colour)
    bar = view.colorbar(shown, cax=view.add_axes((1 - 0.8 / w, 0.1 / h, 0.16 / w, 1 - 0.65 / h)))
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    view.alt = f"table of {', '.join(columns)} for {', '.join(rows)}".replace("\n", " ")
    return view


def curves(panels, xlabel, title, width=4.6):
    """Lines with error bars over a logarithmic x, one axes for each entry of panels.

    panels: dict of y label -> list of (x, means, spreads, label); title follows the y label above an axes."""
    view = show.View(figsize=(width * len(panels), 3.4), dpi=show.DPI, facecolor="white")
    share = 1 / len(panels)
    for k, (ylabel, lines) in enumerate(panels.items()):
        axes = view.add_axes(((k + 0.17) * share, 0.16, 0.79 * share, 0.72))
        for (x, y, spread, label), colour in zip(lines, show.ID_COLOURS):
            axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=3, color=colour, label=label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"{ylabel} {title}", fontsize=10.5)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
        axes.set_xticks(lines[0][0], [f"{v:g}" for v in lines[0][0]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    view.alt = f"{', '.join(panels)} over {xlabel}"
    return view


# ---------------------------------------------------------------- its stored pictures

EQUAL = ("shift", "noise", "blur", "brightness", "colour cast", "object removed", "shadow removed")


def equal_rmse(judge, e, pixels=1):
    """Damages with the RMSE of a shift by so many pixels, or all that they can have: (pictures, labels)."""
    target = float(metrics.rmse(damage(e, "shift", pixels / 8), e.case.truth))
    images, labels = [e.case.truth], ["the truth\n\n"]
    for kind in EQUAL:
        image = damage(e, kind, pixels / 8 if kind == "shift" else amount_for(e, kind, target))
        s = benchmark.scores(judge, image, e.case)
        images.append(image)
        labels.append(f"{kind}: RMSE {float(metrics.rmse(image, e.case.truth)):.3f}\nSSIM {s['ssim']:.3f}, "
                      f"feat_dist {s['feat_dist']:.3f}\nPSNR {s['psnr']:.1f} dB")
    return images, labels


def damage_strip(judge, e, kinds=("blur", "shadow removed", "object in front")):
    """The damage widget without a kernel: three damages, where they are off, their scores in the labels."""
    images, labels = [], []
    for kind in kinds:
        image = damage(e, kind, TYPICAL[kind])
        s = benchmark.scores(judge, image, e.case)
        images += [image, error_map(image, e.case.truth), zone_map(e.case)]
        labels += [f"{kind}:\nPSNR {s['psnr']:.1f} dB, SSIM {s['ssim']:.3f}\nfeat_dist {s['feat_dist']:.3f}",
                   f"where it is off\n(black 0, yellow {ERROR_TOP}+)",
                   "RMSE:\n" + f"shading {s['rmse_shading']:.3f}, shadow {s['rmse_shadow']:.3f}\n"
                   f"outside {s['rmse_outside']:.3f}"]
    return images, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 12 (needs the judge and a stored board). Returns their paths."""
    from lib import models
    folder, judge, e = Path(folder), models.load_judge(quiet=True), example(EXAMPLE["FIRST"])
    paths = [show.sheet(*equal_rmse(judge, e), folder / "12_same_rmse.png", columns=4),
             show.sheet(*damage_strip(judge, e), folder / "12_damage.png", columns=3)]
    pairs = pairs_view(board()[1], "insertion", "shadow", "inject", "geometry")[0]
    return paths + [show.sheet([show.to_tensor(pairs)], [""], folder / "12_pairs.png", columns=1)]
