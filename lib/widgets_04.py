"""Interactive parts of lesson 04: a mask to play with, RePaint's walk, the results; its pictures."""
from pathlib import Path

import torch

from lib import inpaint, masks, show, widgets

EXAMPLE = {"FIRST": 20000040, "SEED": 0}             # the lesson's own parameters; a test compares them
AREAS = (0.05, 0.5)                                  # what the slider of the mask widget offers


# ---------------------------------------------------------------- the rooms and holes of the lesson

def rooms(n, first=EXAMPLE["FIRST"]):
    """n of lesson 03's simple rooms, from a test seed on: Scenes that no model has seen."""
    from lib import diffusion, scenes
    if {scenes.split_of(first), scenes.split_of(first + n - 1)} != {"test"}:
        raise ValueError(f"FIRST must be a test seed, 20000000 to {30_000_000 - n}; it is {first}.")
    return [diffusion.teach_scene(first + k) for k in range(n)]


def holes(n, size, generator):
    """n holes of each of the five kinds, kind by kind: (kinds (5 n), masks (5 n, 1, H, W))."""
    drawn = [masks.make(kind, n, size, generator) for kind in masks.KINDS]
    return [kind for kind in masks.KINDS for _ in range(n)], torch.cat(drawn)


# ---------------------------------------------------------------- one mask

def one_mask(kind, area, seed, size):
    """A mask (1, 1, H, W) of a kind that fills about `area` of the picture."""
    if not AREAS[0] <= area <= AREAS[1]:
        raise ValueError(f"area must lie between {AREAS[0]} and {AREAS[1]}, not {area}.")
    generator = torch.Generator("cpu").manual_seed(seed)
    around = {"centre_box": area, "random_box": (area, area), "irregular": (area, area),
              "hybrid": (0.7 * area, 1.3 * area)}                         # room for a box *and* strokes
    return masks.make(kind, 1, size, generator, area=around.get(kind, (0.85 * area, 1.15 * area)))


def with_hole(image, fill_mask, colour=1.0):
    """The picture with its hole painted over, for the eye: (B, 3, H, W)."""
    return image * (1 - fill_mask) + colour * fill_mask


def _framed(x):
    """A grey frame of one pixel, so that white ends somewhere on a white page."""
    x = x.clone()
    x[..., 0, :] = x[..., -1, :] = x[..., :, 0] = x[..., :, -1] = 0.6
    return x


def mask_view(image, kind, area, seed):
    """(PIL picture, text): the picture with the hole, what is known, and the mask itself."""
    m = one_mask(kind, area, seed, image.shape[-2:])
    labels = ["the picture with its hole", "fill_mask: white = 1 = to fill",
              "m = 1 - fill_mask (papers):\nwhite = 1 = known"]
    drawn = show.tile([with_hole(image, m), _framed(m), _framed(masks.known(m))], labels, columns=3)
    full = int((m > 0).sum())
    share = f"{full:,} of {m.numel():,} pixels to fill ({full / m.numel():.0%})"
    return drawn, f"{kind.replace('_', ' ')}: {share}"


def _dropdown(options, value, label):
    """A choice that stands flush with `widgets.slider`."""
    import ipywidgets
    return ipywidgets.Dropdown(options=options, value=value, description=label,
                               style={"description_width": "110px"})


def mask_explorer(image):
    """Choose kind, share and seed, and see the hole in one picture (1, 3, H, W)."""
    return widgets.panel(
        lambda kind, area, seed: mask_view(image, kind, area, seed), "mask-explorer",
        kind=_dropdown([(k.replace("_", " "), k) for k in masks.KINDS], "free_form", "kind"),
        area=widgets.slider(0.2, *AREAS, 0.01, "share to fill"), seed=widgets.slider(0, 0, 30, 1, "seed"))


# ---------------------------------------------------------------- RePaint's walk

def walk_levels(steps, length, times):
    """The noise level (0 = clean end) after each move of RePaint's walk, from the top: list of integers."""
    walk = inpaint.repaint_times(list(range(steps)), length, times)
    return [steps] + [i if way == "down" else i + 1 for way, i in walk]


def walk_view(steps, length, times):
    """(PIL picture, text): the walk over the noise levels, and what it costs."""
    levels = walk_levels(steps, length, times)
    view = show.View(figsize=(7.6, 2.9), dpi=show.DPI, facecolor="white")
    axes = view.add_axes((0.09, 0.19, 0.89, 0.75))
    axes.plot(levels, color="#4c78a8", linewidth=1.4)
    axes.set(xlabel="move", ylabel="noise level (0 = clean)", xlim=(0, len(levels) - 1),
             ylim=(0, steps + 0.5))
    axes.grid(alpha=0.3)
    passes = sum(b < a for a, b in zip(levels, levels[1:]))
    return _pil(view), (f"jump length {length}, walked {times} times: {passes} passes through the network "
                        f"instead of {steps} ({passes / steps:.1f} times the cost)")


def _pil(view):
    import io

    from PIL import Image
    return Image.open(io.BytesIO(view.png())).convert("RGB")


def walk_explorer(steps=50):
    """Two sliders for RePaint's jumps, and the walk that they make."""
    return widgets.panel(
        lambda length, times: walk_view(steps, length, times), "repaint-walk",
        length=widgets.slider(min(10, steps), 1, max(2, steps // 2), 1, "jump length"),
        times=widgets.slider(3, 1, 10, 1, "times walked"))


# ---------------------------------------------------------------- the results

def result_view(truth, fill_mask, filled, kind, method, number):
    """(PIL picture, text) of one filling: hole, filling, its error, the truth; all (1, C, H, W)."""
    from lib import metrics
    error = ((filled - truth).abs().mean(1, keepdim=True) * 3).clamp(0, 1)
    labels = ["the hole", f"{method}, sample {number}",
              "distance from the truth, x 3\n(black 0, white 1/3 or more)", "the truth"]
    drawn = show.tile([with_hole(truth, fill_mask), filled, error, truth], labels, columns=4)
    db, edge = metrics.psnr(filled, truth, fill_mask).item(), metrics.seam(filled, fill_mask).item()
    return drawn, f"{kind.replace('_', ' ')}, {method}: PSNR in the hole {db:.1f} dB, seam {edge:+.3f}"


def results_explorer(truth, fill_mask, kinds, results):
    """Look at every filling of the table: choose mask, method and sample.

    truth (N, 3, H, W), fill_mask (N, 1, H, W), kinds: N names; results: method -> (N, samples, 3, H, W)."""
    if not results or any(r.shape[0] != len(truth) for r in results.values()):
        raise ValueError("give the fillings of each method as (N, samples, 3, H, W) with "
                         f"N = {len(truth)} pictures.")
    most = max(r.shape[1] for r in results.values())

    def draw(hole, method, sample):
        made = results[method][hole]
        number = min(sample, len(made))                 # one-answer methods have only sample 1
        return result_view(truth[hole:hole + 1], fill_mask[hole:hole + 1], made[number - 1:number],
                           kinds[hole], method, number)
    names = [(f"{k + 1} {kind.replace('_', ' ')}", k) for k, kind in enumerate(kinds)]
    return widgets.panel(draw, "results-explorer", hole=_dropdown(names, 0, "hole"),
                         method=_dropdown(list(results), list(results)[-1], "method"),
                         sample=widgets.slider(1, 1, max(most, 2), 1, "sample"))


# ---------------------------------------------------------------- pictures in one row each

def error_curve(rows, labels, xlabel, ylabel, low=0):
    """Lines of values over x as a figure: rows = list of (x, y); the y axis begins at `low` (None: fits)."""
    view = show.View(figsize=(7.6, 3.1), dpi=show.DPI, facecolor="white")
    axes = view.add_axes((0.1, 0.18, 0.87, 0.78))
    for (x, y), label, colour in zip(rows, labels, show.ID_COLOURS):
        axes.plot(x, y, marker="o", markersize=3.5, color=colour, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(low, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    view.alt = f"{ylabel} over {xlabel}: " + "; ".join(labels)
    return view


def offsets(field, grid):
    """A nearest-neighbour field as colours (1, 3, h, w): red = how far to the right each match lies, green =
    how far down; grey = right here."""
    h, w = grid
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    dy, dx = field.view(h, w) // w - y, field.view(h, w) % w - x
    return torch.stack([0.5 + dx / (2 * w), 0.5 + dy / (2 * h), torch.full((h, w), 0.5)])[None]


# ---------------------------------------------------------------- its stored pictures

def mask_strip(image, share=0.2, seeds=(2, 6)):
    """The mask widget without a kernel: every kind with two seeds. Returns (pictures, labels)."""
    images, labels = [], []
    for seed in seeds:
        for kind in masks.KINDS:
            m = one_mask(kind, share, seed, image.shape[-2:])
            images.append(with_hole(image, m))
            labels.append(f"{kind.replace('_', ' ')} ({m.mean():.0%})")
    return images, labels


def method_strip(image, fill_mask, methods, seed=0):
    """The same hole filled by several methods: (pictures, labels) with hole and truth.

    methods: label -> (name, options); options None: a method without randomness."""
    images, labels = [with_hole(image, fill_mask)], ["the hole"]
    for label, (name, options) in methods.items():
        more = {"generator": torch.Generator("cpu").manual_seed(seed)} if options is not None else {}
        images.append(inpaint.fill(image, fill_mask, name, **(options or {}), **more))
        labels.append(label)
    return images + [image], labels + ["the truth"]


PROMISE = {"telea": ("telea", None), "PatchMatch": ("patchmatch", None), "scene completion": ("scenes", None),
           "context network": ("fillnet", None), "RePaint (64 x 64)": ("repaint", {"steps": 50}),
           "latent diffusion": ("latent", {"steps": 50, "guidance_scale": 1.0})}


def make_figures(folder):
    """Draw the stored pictures of lesson 04 (needs the shipped models). Returns their paths."""
    from lib import scenes
    folder, image = Path(folder), scenes.render(rooms(1)).rgb
    paths = [show.sheet(*mask_strip(image), folder / "04_masks.png", columns=5)]
    walk = show.to_tensor(walk_view(50, 10, 3)[0])
    paths.append(show.sheet([walk], [""], folder / "04_repaint_walk.png", columns=1))
    hole = one_mask("hybrid", 0.2, 2, 128)
    paths.append(show.sheet(*method_strip(image, hole, PROMISE), folder / "04_methods.png", columns=4))
    return paths
