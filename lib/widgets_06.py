"""Interactive parts of lesson 06: a probe that says how far a place is, a cloud of points to turn; its pictures.

The plain functions (`probe_view`, `seen_from`, `cloud`, `groups`, `poster`, ...) are what lesson and tests call.
"""
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib import depth, masks, scenes, show
from lib.widgets import panel, slider

EXAMPLE = {"ROOM": 20000006, "POINT": (0.35, 0.45), "d": 0.33}       # the lesson's own; a test compares them
MARK = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)      # cyan: the place that is asked
DEPTH_CUT, RAW_CUT = "depth < d (0 = near)", "raw output < d (the trap)"
PHOTOS = {"room_chair": "room with a chair", "desk": "desk", "motorcycle": "motorcycle"}


def stretch(x):
    """Each picture of (B, 1, H, W) between its own lowest and highest value, in [0, 1]: what an 8-bit picture does."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    if not (high > low).all():
        raise ValueError("One of the maps is one value everywhere, so it cannot be stretched.")
    return (x - low) / (high - low)


# ---------------------------------------------------------------- the probe

def _check_probe(image, estimate, raw, x, y):
    size = tuple(image.shape[-2:])
    if image.ndim != 4 or image.shape[:2] != (1, 3) or estimate.size != size or tuple(raw.shape) != (1, 1, *size):
        raise ValueError(f"Give one picture (1, 3, H, W) and its depth and raw output in the same size; these are "
                         f"{tuple(image.shape)}, {estimate.size} and {tuple(raw.shape)}.")
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"x and y are places from 0 to 1, not {x} and {y}.")


def _pixel(size, x, y):
    return min(size[0] - 1, int(y * size[0])), min(size[1] - 1, int(x * size[1]))


def cross(picture, row, column):
    """The picture (1, 3, H, W) with a cyan cross whose middle is left free."""
    out, arm, gap = picture.clone(), max(4, picture.shape[-1] // 18), max(1, picture.shape[-1] // 64)
    for step in [*range(-arm, -gap), *range(gap + 1, arm + 1)]:
        for r, c in ((row + step, column), (row, column + step)):
            if 0 <= r < out.shape[-2] and 0 <= c < out.shape[-1]:
                out[0, :, r, c] = MARK.flatten()
    return out


def probe_cut(estimate, raw, x, y, what=DEPTH_CUT):
    """(mask (1, 1, H, W), d): everything "smaller than d", with d read at the place, in depth or in the raw output."""
    if what not in (DEPTH_CUT, RAW_CUT):
        raise ValueError(f"what is {DEPTH_CUT!r} or {RAW_CUT!r}, not {what!r}.")
    values = estimate.values if what == DEPTH_CUT else raw
    row, column = _pixel(estimate.size, x, y)
    d = float(values[0, 0, row, column])
    return (values < d).float(), d


def probe_view(image, estimate, raw, x, y, what=DEPTH_CUT):
    """Picture, depth, and the layer of everything "smaller than" the place (x, y), as one PIL picture.

    image (1, 3, H, W) in [0, 1]; estimate: a DepthMap of the same size; raw (1, 1, H, W): the model's own numbers,
    near = high. x, y in [0, 1]. what: DEPTH_CUT, or RAW_CUT, which falls into the sign trap.
    """
    _check_probe(image, estimate, raw, x, y)
    mask, d = probe_cut(estimate, raw, x, y, what)
    at = _pixel(estimate.size, x, y)
    name = "depth" if what == DEPTH_CUT else "raw output"
    labels = ["the place that is asked", "depth, bright = near", f"{name} < {d:.2f}"]
    scale = max(1, round(256 / image.shape[-2]))
    views = [cross(image, *at), cross(show.colour_depth(estimate), *at), torch.cat([image, mask], 1)]
    return show.tile(views, labels, columns=3, scale=scale)


def probe_text(image, estimate, raw, x, y, what=DEPTH_CUT):
    """The line above the pictures: the place's depth in every unit, and what the cut selects."""
    _check_probe(image, estimate, raw, x, y)
    mask, d = probe_cut(estimate, raw, x, y, what)
    row, column = _pixel(estimate.size, x, y)
    number = f"raw output {float(raw[0, 0, row, column]):.2f}, depth {float(estimate.values[0, 0, row, column]):.2f}"
    if estimate.kind == "metric":
        z = float(estimate.metres()[0, 0, row, column])
        number = f"{z:.2f} m, inverse depth {1 / z:.2f} per metre, {number}"
    name = "depth" if what == DEPTH_CUT else "raw output"
    return f"row {row}, column {column}: {number}. {name} &lt; {d:.2f} selects {mask.mean():.0%} of the picture."


def depth_probe(image, estimate, raw, x=0.5, y=0.5):
    """Slide (or click, where anywidget is installed) to a place; read its depth in every unit, cut there.

    A `panel` of sliders x and y, a choice of what is compared with d, a line of text and three pictures."""
    import ipywidgets
    _check_probe(image, estimate, raw, x, y)
    choice = ipywidgets.Dropdown(options=(DEPTH_CUT, RAW_CUT), value=DEPTH_CUT, description="select",
                                 layout=ipywidgets.Layout(width="480px"), style={"description_width": "110px"})
    return clickable(lambda x, y, what: (probe_view(image, estimate, raw, x, y, what),
                                         probe_text(image, estimate, raw, x, y, what)),
                     "depth-probe", image, x, y, what=choice)


def clickable(draw, css_class, image, x=0.5, y=0.5, **controls):
    """A `panel` with sliders x and y and more controls; where anywidget is installed, beside a picture to click on."""
    import ipywidgets

    from lib.widgets_02 import click_picture
    controls = {"x": slider(float(x), 0.0, 1.0, 0.01, "x (left-right)"),
                "y": slider(float(y), 0.0, 1.0, 0.01, "y (top-down)"), **controls}
    box = panel(draw, css_class, **controls)
    text, drawn = box.children[-2:]
    drawn.layout = ipywidgets.Layout(align_self="flex-start", max_width="100%")      # its own size, not stretched
    clicker = click_picture(image, x, y)
    if clicker is None:
        return box
    for name in ("x", "y"):
        ipywidgets.link((clicker, name), (controls[name], "value"))
    return ipywidgets.VBox([ipywidgets.HBox([clicker, ipywidgets.VBox(box.children[:-2])]), text, drawn])


# ---------------------------------------------------------------- points in space

def _flat(points, rgb, valid=None):
    """Points (1, 3, H, W) and colours -> two arrays (N, 3)."""
    if points.shape != rgb.shape or points.ndim != 4 or points.shape[:2] != (1, 3):
        raise ValueError("Give points and colours of one picture, both (1, 3, H, W); these are "
                         f"{tuple(points.shape)} and {tuple(rgb.shape)}.")
    xyz, colour = (x[0].flatten(1).T.double().cpu().numpy() for x in (points, rgb))
    keep = np.isfinite(xyz).all(1)
    if valid is not None:
        keep &= valid.flatten().cpu().numpy() > 0.5
    return xyz[keep], colour[keep]


def seen_from(points, rgb, camera, turn=0.0, size=256, rise=0.0, about=3.5, dot=1):
    """The points as a camera elsewhere sees them: (1, 3, size, size); grey where no point is.

    points (1, 3, H, W) in the world's metres, rgb (1, 3, H, W). The camera walks `turn` degrees round the point
    `about` metres ahead on the floor (positive = to the right) and goes up by `rise` metres. The nearest point wins.
    """
    xyz, colour = _flat(points, rgb)
    a = math.radians(turn)
    x, z = xyz[:, 0], xyz[:, 2] - about
    moved = np.stack([x * math.cos(a) + z * math.sin(a), xyz[:, 1], z * math.cos(a) - x * math.sin(a) + about], 1)
    eye = replace(camera, height=camera.height + rise, pitch=camera.pitch + math.degrees(math.atan2(rise, about)))
    place, far = depth.project(torch.from_numpy(moved), eye, (size, size))
    order = far.argsort(descending=True)                                   # far first, so that near is drawn over it
    order = order[far[order] > 0.1]
    column, row = place[order].floor().long().unbind(-1)
    out = np.full((size, size, 3), 0.55, np.float32)
    for dy in range(-dot, dot + 1):
        for dx in range(-dot, dot + 1):                                    # first the rims of the dots ...
            if (dy, dx) != (0, 0):
                _dots(out, row + dy, column + dx, colour[order.numpy()])
    _dots(out, row, column, colour[order.numpy()])                         # ... then their middles
    return torch.from_numpy(out).permute(2, 0, 1)[None]


def _dots(out, row, column, colour):
    inside = ((row >= 0) & (row < len(out)) & (column >= 0) & (column < len(out))).numpy()
    out[row.numpy()[inside], column.numpy()[inside]] = colour[inside]      # numpy writes in order: the last one stays


class Turnable:
    """A plotly figure that turns in the notebook, with a still picture where the front end knows no plotly.

    JupyterLab, Notebook 7 and VS Code draw plotly's own format without a network; others show the still, as HTML.
    (Not as image/png: beside one, JupyterLab's plotly extension shows the PNG and never draws the figure.) Kaggle and
    Colab do not know the format, and get plotly's HTML.
    """

    def __init__(self, figure, still):
        self.figure, self.still = figure, still

    def html(self):
        """The still picture as an <img> that needs no file."""
        import base64
        buffer = io.BytesIO()
        self.still.save(buffer, "PNG")
        alt = "points in space, seen from several sides"
        return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

    def _repr_mimebundle_(self, include=None, exclude=None):
        import json

        from lib import setup
        if setup.where() != "local":
            return {"text/html": self.figure.to_html(include_plotlyjs="cdn", full_html=False), "text/plain": "<points>"}
        plot = json.loads(self.figure.to_json()) | {"config": {}}
        return {"application/vnd.plotly.v1+json": plot, "text/html": self.html(), "text/plain": "<points>"}


def cloud(clouds, camera, every=1, height=560):
    """Points to turn with the mouse: a Turnable. clouds: name -> (points (1, 3, H, W), rgb (1, 3, H, W)).

    every: keep each `every`-th row and column. Buttons show one cloud at a time. Axes in metres, one scale for all.
    """
    import plotly.graph_objects as go
    if not clouds or every < 1:
        raise ValueError("Give at least one cloud, and every >= 1.")
    figure, stills, labels = go.Figure(), [], []
    for k, (name, (points, rgb)) in enumerate(clouds.items()):
        xyz, colour = _flat(points[..., ::every, ::every], rgb[..., ::every, ::every])
        paint = ["#%02x%02x%02x" % tuple(c) for c in (colour.clip(0, 1) * 255).round().astype(int)]
        x, y, z = xyz.astype(np.float32).round(3).T
        figure.add_trace(go.Scatter3d(x=x, y=z, z=y, mode="markers", name=name, visible=k == 0, hovertemplate=(
            "x %{x:.2f} m<br>ahead %{y:.2f} m<br>up %{z:.2f} m"), marker={"size": 2.2, "color": paint}))
        for turn, rise in ((0, 0), (-35, 0.3), (0, 2.2)):
            stills.append(seen_from(points, rgb, camera, turn, rise=rise))
            labels.append(f"{name}\n{'from the camera' if not rise else 'from above' if not turn else 'from the left'}")
    buttons = [{"label": name, "method": "update", "args": [{"visible": [i == k for i in range(len(clouds))]}]}
               for k, name in enumerate(clouds)]
    axis = {"x": "x (m)", "y": "ahead (m)", "z": "up (m)"}
    figure.update_layout(
        height=height, margin={"l": 0, "r": 0, "t": 0, "b": 0}, showlegend=False,
        scene={**{f"{a}axis": {"title": {"text": t}} for a, t in axis.items()}, "aspectmode": "data",
               "camera": {"eye": {"x": -0.9, "y": -1.5, "z": 0.7}}},
        updatemenus=[{"type": "buttons", "direction": "right", "x": 0, "y": 1, "xanchor": "left", "buttons": buttons}])
    return Turnable(figure, show.tile(stills, labels, columns=3, scale=1))


# ---------------------------------------------------------------- where it fails

def part(world, start, stop):
    """Scenes start to stop of a Render, as a Render."""
    return scenes.Render(*(getattr(world, name)[start:stop] for name in scenes.Render.__dataclass_fields__))


def groups(world, b=0, thin=2):
    """The pixels of one rendered scene by what they show: list of (name, mask (1, 1, H, W)).

    Every visible thing under its kind's name ("glass" and so on), "room" for the rest. And zones that cut across:
    "thin parts": pixels of things that vanish when their outline is opened with a disc of `thin` pixels (legs,
    poles, leaves' tips); "solid parts": what stays; "at an edge": within 2 pixels of a jump in depth of over 10 %.
    """
    ids, z = world.ids[b:b + 1], world.depth[b:b + 1]
    found = [("room", (ids < 0).float())]
    thin_parts, solid = torch.zeros_like(z), torch.zeros_like(z)
    for i in sorted(int(i) for i in ids.unique() if i >= 0):
        mine = (ids == i).float()
        found.append((scenes.KINDS[int(world.kind[b:b + 1][ids == i][0]) - 1], mine))
        opened = masks.dilate(masks.erode(mine, thin), thin) * mine
        solid, thin_parts = solid + opened, thin_parts + mine - opened
    high = F.max_pool2d(z, 3, 1, 1)
    low = -F.max_pool2d(-z, 3, 1, 1)
    edge = masks.dilate((high > 1.1 * low).float(), 1)
    return found + [("thin parts", thin_parts), ("solid parts", solid), ("at an edge", edge),
                    ("away from edges", 1 - edge)]


def shadow_zone(world, empty):
    """Pixels of the room that the things' shadows change by more than 0.03: (B, 1, H, W); empty: the room alone."""
    change = (world.rgb - empty.rgb).abs().mean(1, keepdim=True)
    return ((change > 0.03) & (world.ids < 0)).float()


def poster(scene, world, picture, left=-0.7, right=0.7, low=0.7, high=1.95):
    """Hang a picture (1, 3, h, w) on the back wall: (rgb (1, 3, H, W), mask (1, 1, H, W)); depth stays the wall's.

    Corners in metres. The wall's pixels are found by unprojecting the true depth; things in front keep hiding it.
    """
    x, y, z = depth.unproject(world.depth, scene.camera)[0]
    wall = (world.ids[0, 0] < 0) & ((z - scene.room.back).abs() < 0.02)
    on = wall & (x > left) & (x < right) & (y > low) & (y < high)
    across, down = 2 * (x - left) / (right - left) - 1, 2 * (high - y) / (high - low) - 1
    places = torch.stack([across, down], -1)[None]
    printed = F.grid_sample(picture, places, align_corners=False, padding_mode="border")
    frame = on & ((across.abs() > 0.94) | (down.abs() > 0.94))
    rgb = torch.where(on[None, None], printed, world.rgb)
    return torch.where(frame[None, None], torch.full_like(rgb, 0.12), rgb), (on & ~frame).float()[None, None]


# ---------------------------------------------------------------- small drawings

def mean_and_interval(values):
    """(mean, half width of its 95 % interval, how many): 1.96 standard errors; nan for fewer than two."""
    x = torch.as_tensor(values, dtype=torch.float64)
    half = float(1.96 * x.std() / len(x) ** 0.5) if len(x) > 1 else math.nan
    return float(x.mean()), half, len(x)


def bars(rows, label):
    """A table with bars: rows = (name, mean, half interval, count), shares; number and count beside each bar."""
    high = 0.75 + 0.36 * len(rows)
    view = show.View(figsize=(9.4, high), dpi=show.DPI, facecolor="white")
    axes = view.add_axes((0.16, 0.62 / high, 0.60, 1 - 0.68 / high))
    names, means, halves, counts = zip(*rows)
    halves = [0 if math.isnan(h) else h for h in halves]
    places, ends = range(len(rows)), [m + s * h for m, h in zip(means, halves) for s in (-1, 1)]
    axes.barh(places, means, color="#4c78a8", height=0.66)
    axes.errorbar(means, places, xerr=halves, fmt="none", ecolor="#222222", capsize=3, lw=1.2)
    axes.set_yticks(list(places), names, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(1.04 * min(0, *ends) if min(ends) < 0 else 0, 1.04 * max(0.01, *ends))
    axes.set_xlabel(label, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(0, color="black", lw=0.8)
    for y, m, h, n in zip(places, means, halves, counts):
        text = f"{m:.1%} ± {h:.1%}   (n = {n})" if n > 1 else f"{m:.1%}   (n = 1)"
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)
    axes.xaxis.set_major_formatter(lambda v, _: f"{round(100 * v, 2):g}%")      # every tick says where it stands
    view.alt = f"{label}: " + "; ".join(f"{n} {m:.1%}" for n, m in zip(names, means))
    return view


def lines(panels, height=3.2, marker="", equal=False):
    """Line plots side by side: a View. panels: (title, x label, y label, {name: (xs, ys)}, [{name: level}]).

    One point: a dot. A level is a dashed line across. equal: one scale for both axes, so that right angles are right.
    """
    width = 4.6 * len(panels) if len(panels) > 1 else 7.6
    view = show.View(figsize=(width, height), dpi=show.DPI, facecolor="white", layout="constrained")
    for k, (title, x_label, y_label, curves, *levels) in enumerate(panels, 1):
        axes = view.add_subplot(1, len(panels), k)
        for i, (name, (xs, ys)) in enumerate(curves.items()):
            style = {"marker": "o", "ls": ""} if len(xs) == 1 else {"ls": "-" if marker or i == 0 else "--"}
            axes.plot(xs, ys, lw=1.8, label=name, color=show.ID_COLOURS[i], **{"marker": marker, "ms": 4} | style)
        for name, y in (levels[0] if levels else {}).items():
            axes.axhline(y, color="black", ls="--", lw=1.2, label=name)
        if equal:
            axes.set_aspect("equal")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=9)
    view.alt = "; ".join(title for title, *_ in panels)
    return view


# ---------------------------------------------------------------- photographs with a sensor's depth

def photo_folder(name):
    """The folder of photographs with depth, or None: `name` from the project's root, or LAYERS_TESTDATA/rgbd."""
    import os

    from lib import setup
    places = [setup.root() / name] if name else []
    if os.environ.get("LAYERS_TESTDATA"):
        places.append(Path(os.environ["LAYERS_TESTDATA"]) / "rgbd")
    return next((p.resolve() for p in places if list(p.glob("*_depth_mm.png"))), None)


def photographs(folder):
    """name -> (picture (1, 3, H, W), sensor's DepthMap with holes left open), for every *_depth_mm.png in a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*_depth_mm.png")):
        stem = path.name.removesuffix("_depth_mm.png")
        choices = [path.with_name(f"{stem}{end}") for end in (".jpg", ".png")]
        picture = next((p for p in choices if p.is_file()), None)
        if picture is not None:
            image = show.read_image(picture)
            found[PHOTOS.get(stem, stem)] = image, depth.given(path, size=image.shape[-2:], fill=False)
    if not found:
        raise ValueError(f"{folder} holds no pair such as desk.jpg and desk_depth_mm.png (16-bit millimetres, "
                         "0 = hole).")
    return found


def reduced(image, height=200):
    """A picture or map made small for the eye, nearest pixel, so that holes stay holes."""
    width = round(height * image.shape[-1] / image.shape[-2])
    return F.interpolate(image, size=(height, width), mode="nearest-exact")


def holes_shown(found):
    """A DepthMap in colour (near = bright), unmeasured pixels light blue: (1, 3, H, W)."""
    holes = 1 - found.valid
    return show.colour_depth(found) * (1 - holes) + torch.tensor([0.55, 0.8, 1.0]).view(1, 3, 1, 1) * holes


# ---------------------------------------------------------------- its stored pictures

def example(size=scenes.SIZE):
    """The lesson's room: (scene, its rendering)."""
    scene = scenes.sample(EXAMPLE["ROOM"])
    return scene, scenes.render(scene, size=size)


def trap_strip(estimator):
    """The title picture: a room, its true depth, the estimate; raw output, raw < d, depth < d. (pictures, labels)."""
    _, world = example()
    found = estimator(world.rgb)
    raw = F.interpolate(estimator.predict(world.rgb).predicted_depth[:, None], size=found.size, mode="bicubic")
    d = EXAMPLE["d"]
    wrong, right = (stretch(raw) < d).float(), (found.values < d).float()
    images = [world.rgb, show.colour_depth(scenes.to_depth01(world.depth)), show.colour_depth(found),
              stretch(raw).expand(1, 3, -1, -1), *(torch.cat([world.rgb, mask], 1) for mask in (wrong, right))]
    return images, ["a room", "its true depth (bright = near)", "depth, estimated from the picture",
                    "the network's raw output", f"raw output < {d}: the background!",
                    f"depth < {d}: the foreground"]


def probe_strip(estimator, places=((0.35, 0.45), (0.72, 0.62), (0.5, 0.2))):
    """The probe without a kernel: three places, each with its cut, right and wrong. (pictures, labels)."""
    _, world = example()
    found = estimator(world.rgb)
    raw = F.interpolate(estimator.predict(world.rgb).predicted_depth[:, None], size=found.size, mode="bicubic")
    images, labels = [], []
    for x, y in places:
        row, column = _pixel(found.size, x, y)
        z = float(found.metres()[0, 0, row, column])
        images.append(cross(world.rgb, row, column))
        labels.append(f"{z:.2f} m = {1 / z:.2f} per metre = depth {float(found.values[0, 0, row, column]):.2f}")
        for what in (DEPTH_CUT, RAW_CUT):
            mask, d = probe_cut(found, raw, x, y, what)
            images.append(torch.cat([world.rgb, mask], 1))
            labels.append(f"{'depth' if what == DEPTH_CUT else 'raw output'} < {d:.2f}")
    return images, labels


def space_strip(estimator):
    """Points in space without a kernel: truth and estimate from the camera, from the left, from above."""
    scene, world = example()
    clouds = {"true depth": world.depth, "estimate": estimator(world.rgb).metres()}
    images, labels = [], []
    for name, z in clouds.items():
        points = depth.unproject(z, scene.camera)
        for turn, rise, where in ((0, 0, "from the camera"), (-35, 0.3, "from the left"), (0, 2.2, "from above")):
            images.append(seen_from(points, world.rgb, scene.camera, turn, rise=rise))
            labels.append(f"{name}: {where}")
    return images, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 06 (needs the mini depth model). Returns their paths."""
    from lib import models
    folder, estimator = Path(folder), models.load_depth("mini", quiet=True)
    return [show.sheet(*trap_strip(estimator), folder / "06_depth.png", columns=3),
            show.sheet(*probe_strip(estimator), folder / "06_probe.png", columns=3),
            show.sheet(*space_strip(estimator), folder / "06_space.png", columns=3, scale=1)]
