"""Interactive parts of lesson 07: the threshold with live layers, depth under a click, a depth map gone wrong; its pictures."""
import functools
import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from lib import deglad, depth, scenes, show, widgets
from lib.masks import dilate, erode
from lib.scenes import Scene
from lib.widgets_06 import clickable, holes_shown  # noqa: F401  (the lesson draws holes with it)

EXAMPLE = {"FIRST": 20000214}                              # the lesson's own parameter; a test compares them
THIN = ("chair", "table", "lamp", "plant")                 # kinds with legs, poles and leaves
LIVE = ("telea", "biharmonic", "grey", "patchmatch")       # fillings quick enough to follow a slider
RANGES = {"shift": 0.15, "scale": 0.4, "blur": 4.0, "noise": 0.1}     # the largest error of each kind that is shown


# ---------------------------------------------------------------- the rooms of the lesson

@dataclass(frozen=True)
class Case:
    """A room, the thing to cut out (its index, and what stands on it), and a depth between it and the rest, in metres."""
    scene: Scene
    index: int
    at: float

    @property
    def picked(self):
        """Indices of the thing and of what stands on it."""
        return [i for i, t in enumerate(self.scene.things) if i == self.index or t.on == self.index]

    def without(self):
        """The room without them: what is truly behind."""
        return self.scene.without(self.index)


def cases(n, first=EXAMPLE["FIRST"]):
    """n rooms from test seed `first` on in which a thing with thin parts stands in front of all others: Cases."""
    if scenes.split_of(first) != "test":
        raise ValueError(f"FIRST must be a test seed, 20000000 to 29999999; it is {first}.")
    found, seed = [], first
    while len(found) < n:
        if (case := _case(scenes.sample(seed))) is not None:
            found.append(case)
        seed += 1
    return found


def _case(scene):
    floor = [i for i, t in enumerate(scene.things) if t.on is None]
    index = min(floor, key=scene.front_of)
    if len(floor) < 2 or scene.things[index].kind not in THIN:
        return None
    case, r = Case(scene, index, 0.0), scenes.render(scene, size=64, samples=1, shadow_rays=1)
    mine, others = both(case, r.ids)
    if mine.mean() < 0.05 or others.mean() < 0.02:
        return None
    back, front = float(r.depth[mine > 0].max()), float(r.depth[others > 0].min())
    return Case(scene, index, (back + front) / 2) if front - back > 0.25 else None


def both(case, ids):
    """Masks (1, 1, H, W) of the thing to cut out (with what stands on it) and of all other things."""
    mine = functools.reduce(torch.logical_or, [ids == i for i in case.picked])
    return mine.float(), ((ids >= 0) & ~mine).float()


def true_cover(cases, size, times=4):
    """The exact share of each pixel that is nearer than the case's depth, (N, 1, size, size), and where it is thin.

    From a picture `times` as large with one ray a pixel. Thin: things that an opening by 2 pixels loses."""
    fine = scenes.render([c.scene for c in cases], size=size * times, samples=1, shadow_rays=1)
    near = (fine.depth < torch.tensor([c.at for c in cases]).view(-1, 1, 1, 1)).float()
    things = near * (fine.ids >= 0)
    r = 2 * times
    lost = F.avg_pool2d(things * (1 - dilate(erode(things, r), r)), times)
    return F.avg_pool2d(near, times), dilate((lost > 0.1).float(), 1)


def innermost(mask):
    """(x, y) of the pixel of a mask (1, 1, H, W) farthest from its edge: where a hand would click."""
    from scipy.ndimage import distance_transform_edt
    far = torch.from_numpy(distance_transform_edt(F.pad(mask[0, 0], (1, 1, 1, 1)).numpy()))[1:-1, 1:-1]
    y, x = divmod(int(far.argmax()), far.shape[1])
    return x, y


# ---------------------------------------------------------------- pictures

def outlined(image, mask, colour=(0.0, 0.9, 1.0)):
    """The picture with the edge of a mask drawn on it."""
    hard = (mask > 0.5).float()
    edge = dilate(hard, 1) - hard
    return image * (1 - edge) + torch.tensor(colour).view(1, 3, 1, 1) * edge


def zoom(image, x, y, side):
    """The window of `side` pixels around (x, y), moved inside the picture: (B, C, side, side)."""
    h, w = image.shape[-2:]
    top, left = (min(max(0, c - side // 2), end - side) for c, end in ((y, h), (x, w)))
    return image[..., top:top + side, left:left + side]


def framed(x, grey=0.55):
    """A grey frame of one pixel, so that a white mask ends somewhere on a white page."""
    x = x.clone()
    x[..., 0, :] = x[..., -1, :] = x[..., :, 0] = x[..., :, -1] = grey
    return x


def busiest(weight, side):
    """(picture, x, y): the middle of the place, about `side` pixels wide, that holds most of a weight (B, 1, H, W)."""
    sums = deglad.blur(weight.float(), side / 4)
    k, _, y, x = (int(i) for i in torch.unravel_index(sums.argmax(), sums.shape))
    return k, x, y


def _pil(view):
    from PIL import Image
    return Image.open(io.BytesIO(view.png())).convert("RGB")


def curves(rows, xlabel, ylabel, marks=(), low=0.0):
    """A row of small charts: rows = name -> {label: (x, y)}; the first line of each is drawn thick. A show.View.

    All share one y axis, which begins at `low` (None: where the lines do)."""
    view = show.View(figsize=(3.1 * len(rows) + 0.4, 3.2), dpi=show.DPI, facecolor="white", layout="constrained")
    axes = None
    for k, (name, lines) in enumerate(rows.items(), 1):
        axes = view.add_subplot(1, len(rows), k, sharey=axes)
        for i, (label, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, lw=2.2 if i == 0 else 0.9, color=show.ID_COLOURS[0] if i == 0 else "#b0b0b0",
                      label=label if i == 0 else "single rooms" if i == 1 else None,
                      marker="o" if i == 0 else "", markersize=4, zorder=3 - min(i, 1))
        for label, y in marks:
            axes.axhline(y, color=show.ID_COLOURS[3], ls="--", lw=1.2, label=label)
        axes.set(title=name, xlabel=xlabel[name])
        axes.grid(alpha=0.3)
        if k == 1:
            axes.set_ylabel(ylabel)
            handles, labels = axes.get_legend_handles_labels()
            axes.legend(*zip(*{b: (a, b) for a, b in zip(handles, labels)}.values()), fontsize=8.5, loc="best")
    if low is not None:
        axes.set_ylim(bottom=low)
    view.alt = f"{ylabel} for {', '.join(rows)}"
    return view


def histogram(depth_map, marks, bins=64, height=2.9):
    """Histogram of the measured pixels of one depth map, thresholds marked: marks = name -> d. A show.View."""
    depth_map = deglad.as_depth_map(depth_map)
    values = depth_map.values[depth_map.valid > 0.5].numpy()
    view = show.View(figsize=(7.8, height), dpi=show.DPI, facecolor="white", layout="constrained")
    axes = view.add_subplot()
    axes.hist(values, bins=bins, range=(float(values.min()), float(values.max())), color="#b8c4d6")
    dashes = ("-", "--", ":", "-.", (0, (1, 1)), (0, (6, 1)))
    for i, (name, d) in enumerate(marks.items()):
        metres = f" = {float(depth_map.near + d * (depth_map.far - depth_map.near)):.2f} m" if depth_map.kind == "metric" else ""
        axes.axvline(d, color=show.ID_COLOURS[(i + 1) % len(show.ID_COLOURS)], lw=2.2, ls=dashes[i % len(dashes)],
                     label=f"{name}: {d:.2f}{metres}")
    axes.set(xlabel="depth (0 = near, 1 = far)", ylabel="pixels")
    axes.grid(alpha=0.25)
    if marks:
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    view.alt = "histogram of depth with " + ", ".join(marks)
    return view


# ---------------------------------------------------------------- the threshold, live

def _check_one(image, depth_map):
    if image.ndim != 4 or image.shape[:2] != (1, 3) or depth_map.values.shape != (1, 1, *image.shape[-2:]):
        raise ValueError(f"Give one picture (1, 3, H, W) and its DepthMap; these are {tuple(image.shape)} and "
                         f"{tuple(depth_map.values.shape)}.")


def layers_view(image, depth_map, at, soft=0, fill="telea"):
    """(PIL picture, text): depth with the cut, foreground, background with its hole, and filled, for d = at.

    soft: radius of the soft edge in pixels (0: hard). fill: one of LIVE."""
    _check_one(image, depth_map)
    cut = deglad.split(image, depth_map, float(at), soft=soft, allow_empty=True)
    share = float((cut.mask > 0).float().mean())
    filled, took = image, f"nothing to fill with {fill}"
    if 0 < share and float(dilate((cut.mask > 0).float(), 1).mean()) < 1:
        cut = deglad.fill_background(cut, fill)
        filled, took = cut.background, f"filled by {fill}"
    hole = torch.cat([image * (cut.mask < 1), 1 - cut.mask], 1)
    labels = [f"depth, cut at d = {at:.2f}\n(bright = near)", f"foreground layer\ndepth < {at:.2f}",
              f"background layer\ndepth >= {at:.2f}", took.replace(" by ", "\nby ")]
    drawn = show.tile([outlined(show.colour_depth(depth_map), cut.mask), cut.foreground, hole, filled], labels, columns=4)
    metres = f" = {float(depth_map.near + at * (depth_map.far - depth_map.near)):.2f} m" if depth_map.kind == "metric" else ""
    return drawn, f"d = {at:.2f}{metres}: {share:.0%} of the picture is foreground; {took}"


def layers_explorer(image, depth_map, at=0.4):
    """Sliders for d and the soft edge and a choice of fillings, beside the layers that they make."""
    import ipywidgets as w
    _check_one(image, depth_map)
    return widgets.panel(
        lambda d, soft, fill: layers_view(image, depth_map, d, soft, fill), "deglad-layers",
        d=widgets.slider(round(float(at), 2), 0.0, 1.0, 0.01, "d (depth)"),
        soft=widgets.slider(0, 0, 4, 1, "soft edge (px)"),
        fill=w.Dropdown(options=list(LIVE), description="filling"))


# ---------------------------------------------------------------- depth under a click

def choose_view(image, depth_map, x, y, margin=0.03):
    """(PIL picture, text): the click (x, y in 0..1), the histogram with the depth under it, and the layer it gives.

    margin: added to the depth under the click, so that the surface clicked on becomes foreground."""
    _check_one(image, depth_map)
    h, w = image.shape[-2:]
    column, row = min(w - 1, int(x * w)), min(h - 1, int(y * h))
    here = deglad.depth_at(depth_map, column, row)
    d = min(1.0, here + margin)
    mask = deglad.nearer(depth_map, d)
    marked = image.clone()
    r = max(5, w // 12)
    for box in ((slice(row, row + 1), slice(max(0, column - r), column + r + 1)),
                (slice(max(0, row - r), row + r + 1), slice(column, column + 1))):
        marked[(..., *box)] = torch.tensor([1.0, 0.0, 0.8]).view(1, 3, 1, 1)
    layer = torch.cat([image * mask, mask], 1)
    picture = show.to_tensor(show.tile([marked, layer], ["the click", f"depth < {d:.2f}"], columns=2))
    chart = show.to_tensor(_pil(histogram(depth_map, {"under the click": here, "d": d}, height=2.6)))
    width = max(picture.shape[-1], chart.shape[-1])
    wide = [F.pad(p, (0, width - p.shape[-1], 0, 0), value=1.0) for p in (picture, chart)]
    from PIL import Image
    drawn = Image.fromarray(show.to_uint8(torch.cat(wide, 2)))
    unit = f" = {float(depth_map.near + here * (depth_map.far - depth_map.near)):.2f} m" if depth_map.kind == "metric" else ""
    return drawn, f"depth under ({column}, {row}): {here:.2f}{unit}; d = {d:.2f} takes {float(mask.mean()):.0%} of the picture"


def choose_explorer(image, depth_map, x=0.5, y=0.5):
    """Click on the picture (or slide): the depth there, its place in the histogram, and the cut it gives."""
    _check_one(image, depth_map)
    return clickable(lambda x, y, margin: choose_view(image, depth_map, x, y, margin), "deglad-choose", image, x, y,
                     margin=widgets.slider(0.03, 0.0, 0.2, 0.01, "behind by"))


# ---------------------------------------------------------------- a depth map gone wrong

def overlap(a, b):
    """Intersection over union of two masks, one number for each picture: (B,)."""
    a, b = a > 0.5, b > 0.5
    return (a & b).sum((1, 2, 3)) / (a | b).sum((1, 2, 3)).clamp(min=1)


def layer_error(image, mask, truth):
    """RMSE between two foreground layers over the picture, colours multiplied by alpha: (B,)."""
    return (image * mask - image * truth).square().mean((1, 2, 3)).sqrt()


def spoil_view(image, depth_map, at, kind, amount, seed=0):
    """(PIL picture, text): the spoilt depth, the layer cut from it, and where it is wrong (red: too much, blue: missing).

    amount: share of the largest error of that kind, in [0, 1] (RANGES)."""
    _check_one(image, depth_map)
    if not 0 <= amount <= 1:
        raise ValueError(f"amount is a share of the largest error, from 0 to 1, not {amount}.")
    size = amount * RANGES[kind]
    wrong = deglad.spoil(depth_map, kind, size, torch.Generator("cpu").manual_seed(seed))
    mask, truth = deglad.nearer(wrong, at), deglad.nearer(depth_map, at)
    error = torch.stack([mask * (1 - truth), 0 * mask, truth * (1 - mask)], 2)[:, 0]
    shown = torch.where(error.amax(1, keepdim=True) > 0, error, 0.35 + 0.5 * image.mean(1, keepdim=True).expand_as(image))
    labels = [f"depth with {kind} {size:.2f}", f"foreground layer\ndepth < {float(at):.2f}",
              "red: too much\nblue: missing"]
    drawn = show.tile([show.colour_depth(wrong), torch.cat([image * mask, mask], 1), shown], labels, columns=3)
    return drawn, (f"{kind} {size:.2f}: IoU of the masks {float(overlap(mask, truth)):.3f}, "
                   f"RMSE of the layer {float(layer_error(image, mask, truth)):.3f}")


def spoil_explorer(image, depth_map, at):
    """Choose an error and its size, and see what the cut makes of it."""
    import ipywidgets as w
    _check_one(image, depth_map)
    return widgets.panel(
        lambda kind, amount, seed: spoil_view(image, depth_map, at, kind, amount, seed), "deglad-spoil",
        kind=w.Dropdown(options=list(deglad.SPOILS), value="blur", description="error"),
        amount=widgets.slider(0.5, 0.0, 1.0, 0.05, "size"), seed=widgets.slider(0, 0, 20, 1, "seed"))


# ---------------------------------------------------------------- its stored pictures

@functools.lru_cache(maxsize=2)
def example(size=scenes.SIZE):
    """The lesson's first room: (Case, Render, DepthMap, d)."""
    case = cases(1)[0]
    r = scenes.render(case.scene, size=size)
    z = depth.from_metric(r.depth, near=scenes.NEAR, far=scenes.FAR)
    return case, r, z, z.at(f"{case.at}m")


def layers_strip():
    """The promise: one picture, its depth, two layers, the hole filled, the truth. (pictures, labels)."""
    case, r, z, d = example()
    cut = deglad.split(r.rgb, z, d, soft=1)
    full = deglad.fill_background(cut, "patchmatch")
    images = [r.rgb, outlined(show.colour_depth(z), cut.mask), cut.foreground, cut.background, full.background,
              scenes.render(case.without()).rgb]
    return images, ["a picture", f"its depth (bright = near), cut at d = {d:.2f}", "the foreground layer (RGBA)",
                    "the background with its hole", "the hole filled (PatchMatch)", "the truth behind the thing"]


def threshold_strip(ats=(0.30, 0.39, 0.55)):
    """The layer widget without a kernel: a row for each threshold. (pictures, labels)."""
    _, r, z, _ = example()
    images, labels = [], []
    for at in ats:
        cut = deglad.split(r.rgb, z, at)
        full = deglad.fill_background(cut, "telea")
        images += [outlined(show.colour_depth(z), cut.mask), cut.foreground, cut.background, full.background]
        labels += [f"cut at d = {at:.2f}", f"foreground ({cut.mask.mean():.0%})", "background", "filled by telea"]
    return images, labels


def spoil_strip(share=0.5):
    """The spoil widget without a kernel: one column for each kind of error. (pictures, labels)."""
    _, r, z, d = example()
    images, labels = [], []
    for row in range(2):
        for kind in deglad.SPOILS:
            size = share * RANGES[kind]
            wrong = deglad.spoil(z, kind, size, torch.Generator("cpu").manual_seed(0))
            mask = deglad.nearer(wrong, d)
            images.append(show.colour_depth(wrong) if row == 0 else torch.cat([r.rgb * mask, mask], 1))
            labels.append(f"{kind} {size:.2f}" if row == 0 else "its foreground layer")
    return images, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 07 (no model needed). Returns their paths."""
    folder = Path(folder)
    case, r, z, _ = example()
    x, y = innermost(both(case, r.ids)[0])
    side = r.rgb.shape[-1]
    click = show.to_tensor(choose_view(r.rgb, z, (x + 0.5) / side, (y + 0.5) / side)[0])
    return [show.sheet(*layers_strip(), folder / "07_layers.png", columns=3),
            show.sheet(*threshold_strip(), folder / "07_threshold.png", columns=4),
            show.sheet([click], [""], folder / "07_choose.png", columns=1, scale=1),
            show.sheet(*spoil_strip(), folder / "07_spoil.png", columns=4)]
