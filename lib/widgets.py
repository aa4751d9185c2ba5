"""Interactive parts of the lessons. Each is a plain function of its settings plus a thin ipywidgets shell.

The plain function is what the tests call and what draws the static strip in figures/, so that a lesson reads without
a kernel. The shell uses only what ipywidgets 7.7 and 8 share; an error in it reaches the notebook (no Output widget).
"""
import io
from pathlib import Path

import torch

from lib import show

CUT = torch.tensor([0.0, 0.9, 1.0]).view(1, 3, 1, 1)      # colour of the cut line on the depth map


# ---------------------------------------------------------------- the shell

def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def slider(value, low, high, step, label):
    """A wide slider, of whole numbers where value and step are whole, that reports while it is dragged."""
    import ipywidgets
    whole = isinstance(value, int) and isinstance(step, int)
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(value=value, min=low, max=high, step=step, description=label, continuous_update=True,
                readout_format="d" if whole else ".2f", layout=ipywidgets.Layout(width="480px"),
                style={"description_width": "110px"})


def panel(draw, css_class, **controls):
    """Controls, a line of text and a picture, which `draw(**values)` makes: a VBox with these children in that order.

    draw takes the controls' values by name and returns (PIL picture, HTML text). css_class marks the picture, so that
    a browser test finds it. An error in `draw` reaches the notebook (there is no Output widget to hide it).
    Works in JupyterLab, Notebook, VS Code, Colab and Kaggle, with ipywidgets 7.7 and 8.
    """
    import ipywidgets

    text, picture = ipywidgets.HTML(), ipywidgets.Image(format="png")
    picture.layout = ipywidgets.Layout(align_self="flex-start", max_width="100%")    # at its own size: not stretched
    picture.add_class(css_class)

    def update(change=None):
        drawn, text.value = draw(**{name: control.value for name, control in controls.items()})
        picture.value = _png(drawn)

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), text, picture])


# ---------------------------------------------------------------- lesson 00: the depth threshold

def _values(depth):
    return depth if isinstance(depth, torch.Tensor) else depth.values


def _check_pair(image, depth, at):
    if image.ndim != 4 or image.shape[:2] != (1, 3) or _values(depth).shape != (1, 1, *image.shape[-2:]):
        raise ValueError(f"Give one picture (1, 3, H, W) and its depth (1, 1, H, W); these are {tuple(image.shape)} "
                         f"and {tuple(_values(depth).shape)}.")
    if not 0 <= at <= 1:
        raise ValueError(f"The threshold is a depth between 0 (near) and 1 (far), not {at}.")


def threshold_layers(image, depth, at):
    """Cut one picture at depth `at`: (foreground RGBA, background RGBA, fg_mask), each (1, C, H, W). Empty is allowed."""
    _check_pair(image, depth, at)
    mask = (_values(depth) < at).float()
    return torch.cat([image, mask], 1), torch.cat([image, 1 - mask], 1), mask


def threshold_text(depth, at):
    """The line under the pictures: how many pixels are foreground, and, for a metric DepthMap, the cut in metres."""
    mask = _values(depth) < at
    metres = ""
    if getattr(depth, "kind", "") == "metric":
        metres = f" = {float(depth.near + at * (depth.far - depth.near)):.2f} m"
    return f"d = {at:.2f}{metres}: {int(mask.sum()):,} of {mask.numel():,} pixels are foreground ({mask.float().mean():.0%})"


def threshold_view(image, depth, at):
    """Four pictures of one cut: image, depth with the cut line, foreground layer, background with its hole.

    image (1, 3, H, W) in [0, 1]; depth (1, 1, H, W) in [0, 1] or a DepthMap; at in [0, 1]. Returns a PIL picture.
    Raises ValueError for other shapes or a threshold outside [0, 1].
    """
    foreground, background, mask = threshold_layers(image, depth, at)
    edge = torch.nn.functional.max_pool2d(mask, 3, 1, 1) - mask
    line = show.colour_depth(depth) * (1 - edge) + CUT * edge
    labels = ["image", "depth (bright = near)\nand the cut at d", f"foreground layer\ndepth < {at:.2f}",
              f"background layer\ndepth >= {at:.2f}"]
    return show.tile([image, line, foreground, background], labels, columns=4)


def depth_threshold(image, depth, at=0.5):
    """A slider for d beside the two layers that it makes: a `panel` of slider, line of text and picture."""
    _check_pair(image, depth, at)
    return panel(lambda d: (threshold_view(image, depth, d), threshold_text(depth, d)), "depth-threshold",
                 d=slider(at, 0.0, 1.0, 0.01, "d (depth)"))


# ---------------------------------------------------------------- lesson 00: its stored pictures

EXAMPLE = {"SCENE": 20003468, "AT": 3.55}            # the lesson's own parameters; a test compares them


def example(size=128):
    """The lesson's case: (room, room with the chair, index of the chair, the cut-out in foreign light (1, 4, H, W))."""
    from lib import scenes
    room = scenes.sample(EXAMPLE["SCENE"])
    whole = room.insert(scenes.Thing("chair", "red", x=-0.8, z=0, size=1.5, turn=20), at=EXAMPLE["AT"])
    index = len(whole.things) - 1
    return room, whole, index, scenes.only(whole, index, sun=scenes.other_sun(room.sun), size=size)


def threshold_strip(image, depth, ats=(0.22, 0.33, 0.60)):
    """The widget without a kernel: one row of layers for each threshold. Returns (pictures, labels) for show.sheet."""
    images, labels = [], []
    for at in ats:
        foreground, background, mask = threshold_layers(image, depth, at)
        edge = torch.nn.functional.max_pool2d(mask, 3, 1, 1) - mask
        images += [show.colour_depth(depth) * (1 - edge) + CUT * edge, foreground, background]
        labels += [f"cut at d = {at:.2f}", f"foreground ({mask.mean():.0%})", "background with its hole"]
    return images, labels


def edit_strip(pipe, steps=50, seed=0, size=128):
    """The edit of lesson 00 beside its baselines and the truth. Returns (pictures, labels) for show.sheet."""
    from lib import depth, featglac, scenes
    room, whole, _, cutout = example(size)
    world = scenes.render([room, whole], size=size)
    room_depth = depth.from_metric(world.depth[:1], near=scenes.NEAR, far=scenes.FAR)
    images = [world.rgb[:1], cutout]
    for mechanism in ("paste2d", "alpha", "inject"):
        edit = featglac.insert_object(pipe, world.rgb[:1], room_depth, cutout, whole.caption(), mechanism=mechanism,
                                      at=f"{EXAMPLE['AT']}m", steps=steps,
                                      generator=torch.Generator("cpu").manual_seed(seed))
        images.append(edit.image.float().cpu())
    labels = ["the room", "a chair cut out elsewhere", "2-D paste", "depth-aware paste", "FeatGLaC (inject)", "the truth"]
    return images + [world.rgb[1:]], labels


def make_figures(folder):
    """Draw the stored pictures of lesson 00 (needs the mini model). Returns their paths."""
    from lib import depth, models, scenes
    folder = Path(folder)
    r = scenes.render(example()[1])
    values = depth.from_metric(r.depth, near=scenes.NEAR, far=scenes.FAR)
    paths = [show.sheet(*threshold_strip(r.rgb, values), folder / "00_threshold_strip.png", columns=3)]
    return paths + [show.sheet(*edit_strip(models.load("mini", quiet=True)), folder / "00_edit.png", columns=3)]
