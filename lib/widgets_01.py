"""Lesson 01's interactive part, the latent cell editor, and the lesson's stored pictures.

`cell_view` and `cell_text` are plain functions of the settings; `latent_cells` is the shell around them.
"""
from pathlib import Path

import torch
from matplotlib import colormaps

from lib import latents, show
from lib.widgets import panel, slider

WHAT = ("one cell", "whole channel")
LIMIT = 3.0                  # latents are shown from -LIMIT to LIMIT: three standard deviations
CHANGE = 8                   # the map of the change is shown this many times stronger
MARK = torch.tensor([1.0, 1.0, 0.0]).view(1, 3, 1, 1)


def colour(values, limit=LIMIT):
    """Signed values (B, 1, h, w) -> colours (B, 3, h, w): blue below zero, white at zero, red above."""
    place = (values[:, 0].detach().float().cpu() / (2 * limit) + 0.5).clamp(0, 1)
    return torch.from_numpy(colormaps["RdBu_r"](place.numpy()))[..., :3].float().movedim(-1, 1).contiguous()


def heat(values):
    """Sizes (B, 1, H, W) in [0, 1] -> colours (B, 3, H, W), black to bright."""
    return torch.from_numpy(colormaps["inferno"](values[:, 0].detach().float().cpu().clamp(0, 1).numpy())
                            )[..., :3].float().movedim(-1, 1).contiguous()


def channel_pictures(z, size, limit=LIMIT):
    """The channels of one latent (1, C, h, w) as C colour pictures (1, 3, size, size), every cell crisp."""
    _one(z)
    return [enlarge(colour(channel, limit), size) for channel in z.split(1, dim=1)]


def enlarge(picture, size):
    """(1, C, h, w) -> (1, C, H, W) without smoothing: every cell stays a square; size: a side, or (H, W)."""
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.nn.functional.interpolate(picture, size=size, mode="nearest")


def _one(z):
    if z.ndim != 4 or z.shape[0] != 1:
        raise ValueError(f"Give one latent (1, C, h, w); this is {tuple(z.shape)}.")


def _place(what, x, y):
    if what not in WHAT:
        raise ValueError(f"what is one of {', '.join(map(repr, WHAT))}, not {what!r}.")
    return {"x": x, "y": y} if what == WHAT[0] else {}


def _frame(picture, x, y, cell):
    """Draw a yellow frame around cell (x, y); `cell` is its side in pixels."""
    out = picture.clone()
    top, left = y * cell, x * cell
    out[..., top:top + cell, left:left + cell] = MARK
    inner = (slice(None), slice(None), slice(top + 1, top + cell - 1), slice(left + 1, left + cell - 1))
    out[inner] = picture[inner]
    return out


def cell_change(pipe, z, what, channel, x, y, amount):
    """The widget's edit: (edited latent, picture before, after, change (1, 1, H, W) before clamping)."""
    _one(z)
    edited = latents.change_cell(z, channel, amount, **_place(what, x, y))
    both = latents.decode(pipe, torch.cat([z, edited]), clamp=False).cpu()
    change = (both[1:] - both[:1]).abs().mean(1, keepdim=True)
    return edited, both[:1].clamp(0, 1), both[1:].clamp(0, 1), change


def cell_view(pipe, z, what=WHAT[0], channel=0, x=8, y=8, amount=2.0):
    """Four pictures of one edit of a latent: the channel, the picture before and after, and the change.

    z (1, C, h, w) scaled; amount in standard deviations of the latent, about. Returns a PIL picture.
    Raises ValueError for a batch, a place outside the latent, or another `what`.
    """
    return _tiles(cell_change(pipe, z, what, channel, x, y, amount), what, channel, x, y)


def _tiles(edit, what, channel, x, y):
    edited, before, after, change = edit
    size = before.shape[-1]
    shown = enlarge(colour(edited[:, channel:channel + 1]), size)
    pictures = [shown, before, after, heat(change * CHANGE)]
    if what == WHAT[0]:
        pictures = [_frame(p, x, y, size // edited.shape[-1]) for p in pictures]
    marked = "\n(yellow: the cell)" if what == WHAT[0] else ""
    labels = [f"channel {channel}, after the edit\nblue -{LIMIT:.0f} … red +{LIMIT:.0f}",
              f"decoded before{marked}", "decoded after",
              f"change x {CHANGE}\nblack 0 … bright {1 / CHANGE:.3f}"]
    return show.tile(pictures, labels, columns=4)


def cell_text(pipe, z, what=WHAT[0], channel=0, x=8, y=8, amount=2.0):
    """The line above the pictures: how large the change is, and how much lies in the cell's own square."""
    _, _, _, change = cell_change(pipe, z, what, channel, x, y, amount)
    return _sentence(z, change, what, channel, x, y, amount)


def _sentence(z, change, what, channel, x, y, amount):
    f = change.shape[-1] // z.shape[-1]
    seen = float((change > 1 / 255).float().mean())
    where = f"cell ({x}, {y}) of channel {channel}" if what == WHAT[0] else f"all of channel {channel}"
    text = f"{where} changed by {amount:+.1f}: {seen:.0%} of the pixels move by more than 1/255"
    total = float(change.square().sum())
    if what != WHAT[0] or total == 0:
        return text
    own = float(change[..., y * f:(y + 1) * f, x * f:(x + 1) * f].square().sum()) / total
    return f"{text}; {own:.0%} of the change (squared) lies in the cell's own {f} x {f} pixels"


def latent_cells(pipe, z, channel=0, x=8, y=8, amount=2.0):
    """The latent cell editor: what, channel, x, y and amount, and what the decoder makes of them."""
    import ipywidgets
    _one(z)
    c, h, w = z.shape[1:]

    def draw(what, channel, x, y, amount):
        edit = cell_change(pipe, z, what, channel, x, y, amount)     # one decoding for picture and text
        return _tiles(edit, what, channel, x, y), _sentence(z, edit[-1], what, channel, x, y, amount)

    choice = ipywidgets.Dropdown(options=WHAT, value=WHAT[0], description="what",
                                 style={"description_width": "110px"})
    return panel(draw, "latent-cells", what=choice, channel=slider(channel, 0, c - 1, 1, "channel"),
                 x=slider(min(x, w - 1), 0, w - 1, 1, "x (column)"),
                 y=slider(min(y, h - 1), 0, h - 1, 1, "y (row)"),
                 amount=slider(amount, -4.0, 4.0, 0.5, "amount"))


# ---------------------------------------------------------------- curves and bars of the lesson

def curves(lines, xlabel, ylabel, log=False):
    """Lines {name: values, one for each step} in one labelled figure."""
    view = show.View(figsize=(6.4, 3.0), dpi=100, facecolor="white", layout="constrained")
    axes = view.add_subplot()
    for name, values in lines.items():
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.4)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    view.alt = f"curves of {', '.join(lines)}"
    return view


def bars(groups, names, ylabel):
    """Bars {series: one value for each name} side by side; one or two series have values written on."""
    view = show.View(figsize=(7.4, 3.2), dpi=100, facecolor="white", layout="constrained")
    axes, width = view.add_subplot(), 0.8 / len(groups)
    for i, (series, values) in enumerate(groups.items()):
        places = [k + (i - (len(groups) - 1) / 2) * width for k in range(len(names))]
        drawn = axes.bar(places, values, width, label=series)
        if len(groups) <= 2:                             # more numbers would run into each other
            axes.bar_label(drawn, fmt="%.2f", fontsize=8.5, padding=2)
    axes.set(ylabel=ylabel, xticks=range(len(names)))
    axes.set_xticklabels(names, fontsize=9)
    axes.margins(y=0.18)
    axes.legend(frameon=False, fontsize=9)
    view.alt = f"bars of {', '.join(groups)} for {', '.join(names)}".replace("\n", " ")
    return view


# ---------------------------------------------------------------- stored pictures

EXAMPLE = {"SCENE": 20003468, "AT": 3.55}            # the lesson's own parameters; a test compares them
CELLS = (("one cell", 0, 4, 6, 3.0), ("one cell", 2, 10, 12, -3.0), ("whole channel", 1, 0, 0, 2.0))


def example(size=128):
    """The lesson's picture (1, 3, size, size): the room of lesson 00 with the chair behind the table."""
    from lib import scenes
    room = scenes.sample(EXAMPLE["SCENE"])
    chair = scenes.Thing("chair", "red", x=-0.8, z=0, size=1.5, turn=20)
    return scenes.render(room.insert(chair, at=EXAMPLE["AT"]), size=size).rgb


def promise_strip(pipe, image):
    """Picture, channels of its latent, the way back, what is lost: (pictures, labels) for show.sheet."""
    z = latents.encode(pipe, image)
    back = latents.decode(pipe, z).cpu()
    error = (back - image).abs().mean(1, keepdim=True)
    count = latents.compression(image, z)
    labels = [f"a picture:\n{image.numel():,} numbers"]
    labels += [f"latent, channel {i}\n(blue - … red +)" for i in range(z.shape[1])]
    labels += [f"back from {z.numel():,}\nnumbers, {count:.0f}x fewer",
               f"what is lost, x {CHANGE // 2}\n(bright = wrong)"]
    few = int((z.numel() / 3) ** 0.5)
    shrunk = torch.nn.functional.interpolate(image, size=(few, few), mode="area")
    shrunk = torch.nn.functional.interpolate(shrunk, size=image.shape[-2:], mode="bicubic").clamp(0, 1)
    labels += [f"for comparison: shrunk to\n{few} x {few} pixels, {3 * few * few} numbers"]
    channels = channel_pictures(z.cpu(), image.shape[-1])
    return [image, *channels, back, heat(error * CHANGE / 2), shrunk], labels


def cell_strip(pipe, image, cells=CELLS):
    """The widget without a kernel: one row for each edit. Returns (pictures, labels) for show.sheet."""
    z, pictures, labels = latents.encode(pipe, image), [], []
    for what, channel, x, y, amount in cells:
        edited, before, after, change = cell_change(pipe, z, what, channel, x, y, amount)
        size = before.shape[-1]
        row = [enlarge(colour(edited[:, channel:channel + 1]), size), after, heat(change * CHANGE)]
        one = what == WHAT[0]
        pictures += [_frame(p, x, y, size // z.shape[-1]) for p in row] if one else row
        where = f"cell ({x}, {y})" if one else "everywhere"
        labels += [f"channel {channel}, {where} {amount:+.0f}", "decoded", f"change x {CHANGE}"]
    return pictures, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 01 (needs the mini model). Returns their paths."""
    from lib import models
    pipe, image, folder = models.load("mini", quiet=True), example(), Path(folder)
    return [show.sheet(*promise_strip(pipe, image), folder / "01_latent.png", columns=4, scale=2),
            show.sheet(*cell_strip(pipe, image), folder / "01_latent_cells.png", columns=3, scale=2)]
