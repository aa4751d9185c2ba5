"""Lesson 08's interactive part (injection, live), its task with an exact truth, small drawings, and its pictures.

The task: the things of room A, moved into the empty room B. The renderer knows the true picture, so every choice of
layers, window, strength and mode has an error. `redraw` and `explorer_view` are plain functions of the settings.
"""
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from lib import attention, diffusion, latents, metrics, scenes, show, widgets
from lib.widgets_06 import lines  # noqa: F401  (the lesson draws with it)

PAIR = {"FROM": 20000040, "TO": 20000077}         # the lesson's own parameters; a test compares them
WINDOWS = ((0.0, 1.0), (0.0, 0.34), (0.34, 0.67), (0.67, 1.0))
PARTS = {"keys and values": "kv", "keys only": "k", "values only": "v"}
MODES = {"replace (the mask sorts tokens)": "replace", "query (the mask sorts who looks)": "query",
         "concat (own tokens stay)": "concat"}
RECOLOURED = ("red", "blue", "yellow", "white")   # new colours of the things, in order, for the relatives


# ---------------------------------------------------------------- the task

def zones(truth, without, things):
    """The three parts of a picture that may fail apart: {"things", "shadow", "room"}, each (1, 1, H, W) of 0 and 1.

    shadow: outside the things, where the truth differs from the room `without` them by more than 0.03 (DESIGN 7).
    """
    thing = (things >= 0.5).float()
    changed = ((truth - without).abs().mean(1, keepdim=True) > 0.03).float() * (1 - thing)
    return {"things": thing, "shadow": changed, "room": 1 - thing - changed}


@dataclass
class Case:
    """One task. a, b, truth (1, 3, H, W): the room with its things, the other room, empty, and the things in it;
    things (1, 1, H, W): their exact soft mask; masks (2, 1, H, W): who provides K and V, a or b; words: the captions
    of all three; z (2, 4, h, w), path, bank: latents of a and b, their inversion, and K and V recorded on the way."""
    pipe: object
    steps: int
    a: torch.Tensor
    b: torch.Tensor
    truth: torch.Tensor
    things: torch.Tensor
    masks: torch.Tensor
    words: tuple
    z: torch.Tensor
    path: object
    bank: object

    def plain(self, start=None):
        """Drawn with no injection: a's inverted noise (or `start`), the truth's words."""
        z = diffusion.sample(self.pipe, self.words[2], self.steps, 1.0, latents=self.path.noise[:1] if start is None else start)
        return latents.decode(self.pipe, z).cpu()

    def errors(self, picture):
        """RMSE of a picture against the truth in each zone, and over all: {"things", "shadow", "room", "all"}."""
        parts = zones(self.truth, self.b, self.things)
        measured = {name: metrics.rmse(picture, self.truth, zone).item() for name, zone in parts.items()}
        return {**measured, "all": metrics.rmse(picture, self.truth).item()}


def rooms(first=PAIR["FROM"], second=PAIR["TO"]):
    """The three scenes of a task: first's room with its things, second's room without, first's things in it."""
    a = scenes.sample(first)
    b = replace(scenes.sample(second), things=(), camera=a.camera)
    return a, b, replace(b, things=a.things)


def case(pipe, first=PAIR["FROM"], second=PAIR["TO"], steps=20, size=128, refine=1):
    """Render a task, invert both pictures, and record their keys and values on the way: a `Case`."""
    some = rooms(first, second)
    seen = scenes.render(list(some), size=size)
    a, b, truth = seen.rgb.split(1)
    things = seen.alpha[:1].sum(1, keepdim=True).clamp(0, 1)
    z, words = latents.encode(pipe, torch.cat([a, b])), tuple(s.caption() for s in some)
    with attention.record(pipe.unet) as bank:
        path = diffusion.invert(pipe, z, list(words[:2]), steps, refine=refine)
    return Case(pipe, steps, a, b, truth, things, torch.cat([things, 1 - things]), words, z, path, bank)


def applies(pipe, steps, window):
    """How many of the sampler's timesteps lie inside the window; 0 for a window without width."""
    if window[0] >= window[1]:
        return 0
    inside = attention.in_window(window)
    return sum(inside(t) for t in diffusion.ddim(pipe, steps).timesteps.tolist())


def redraw(task, strength=1.0, layers="all", window=(0.0, 1.0), parts="kv", mode="replace", start=None, bank=None):
    """Draw a's picture again, with K and V of a and b blended by the masks: (1, 3, H, W).

    The settings are those of `attention.inject`. start: a latent (a's inverted noise by default). bank: other recorded
    K and V. A window in which no step lies gives the plain drawing.
    """
    if not applies(task.pipe, task.steps, window):
        return task.plain(start)
    with attention.inject(task.pipe.unet, bank or task.bank, task.masks, strength, layers, window, parts, mode):
        return task.plain(start)


# ---------------------------------------------------------------- the explorer

def layer_choices(unet):
    """What the layer picker offers, label -> choice of `attention.select`: sets of layers, then each single layer."""
    known = attention.layers(unet)
    sets = {"all layers": "all", **{f"{place} blocks": place for place in ("down", "mid", "up")}}
    sets |= {f"grids of {name} of the latent's side": f for f, name in
             ((1.0, "1/1"), (0.5, "1/2"), (0.25, "1/4"), (0.125, "1/8")) if any(x.fraction == f for x in known)}
    return {**sets, **{f"layer {i}: {x.place}, 1/{round(1 / x.fraction)}": x.name for i, x in enumerate(known, 1)}}


def explorer_view(task, strength, layers, window, parts, mode):
    """Two sources, the drawing at these settings, its error and the truth, as one PIL picture. Labels as in the picker."""
    unet = task.pipe.unet
    for name, value, known in (("layers", layers, layer_choices(unet)), ("parts", parts, PARTS), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}; not {value!r}.")
    drawn = redraw(task, strength, layer_choices(unet)[layers], tuple(window), PARTS[parts], MODES[mode])
    error = ((drawn - task.truth).abs().mean(1, keepdim=True) * 3).clamp(0, 1)
    labels = ["A: its things", "B: its room", "drawn", "the truth", "distance from the truth, x 3\n(black 0, white 1/3 or more)"]
    picture = show.tile([task.a, task.b, drawn, task.truth, error], labels, columns=3,
                        scale=max(1, round(256 / task.a.shape[-1])))
    return picture, drawn


def explorer_text(task, drawn, strength, window):
    """The line above the picture: how many steps were touched, and the error in each zone."""
    count = applies(task.pipe, task.steps, tuple(window))
    how = f"K and V injected in {count} of {task.steps} steps" if count and strength else "nothing injected: the plain drawing"
    return f"{how}. RMSE: " + ", ".join(f"{name} {value:.3f}" for name, value in task.errors(drawn).items())


def injection_explorer(task, strength=1.0):
    """Sliders for strength and window, pickers for layers, parts and mode; the picture is drawn anew each time.

    The sliders report when they are let go, since each drawing is a whole run of the sampler.
    """
    import ipywidgets

    wide, style = ipywidgets.Layout(width="480px"), {"description_width": "110px"}

    def dropdown(options, label):
        return ipywidgets.Dropdown(options=list(options), description=label, layout=wide, style=style)

    power = widgets.slider(strength, 0.0, 1.0, 0.05, "strength")
    power.continuous_update = False
    window = ipywidgets.FloatRangeSlider(value=(0.0, 1.0), min=0.0, max=1.0, step=0.05, description="steps from, to",
                                         continuous_update=False, readout_format=".2f", layout=wide, style=style)

    def draw(strength, window, layers, parts, mode):
        picture, drawn = explorer_view(task, strength, layers, window, parts, mode)
        return picture, explorer_text(task, drawn, strength, window)

    return widgets.panel(draw, "injection-explorer", strength=power, window=window,
                         layers=dropdown(layer_choices(task.pipe.unet), "layers"), parts=dropdown(PARTS, "what"),
                         mode=dropdown(MODES, "how"))


# ---------------------------------------------------------------- small drawings

def heat_maps(maps, rows, columns, title):
    """Tables of errors side by side as colours and numbers: maps {name: (n rows, m columns)} -> a View.

    Each map has its own scale, from its smallest (dark) to its largest value (bright); its smallest is framed.
    """
    view = show.View(figsize=(1.7 + 3.1 * len(maps), 1.35 + 0.4 * len(rows)), dpi=show.DPI, facecolor="white",
                     layout="constrained")
    for k, (name, values) in enumerate(maps.items()):
        values, axes = torch.as_tensor(values).float(), view.add_subplot(1, len(maps), k + 1)
        low, high = float(values.min()), max(float(values.max()), float(values.min()) + 1e-6)
        axes.imshow(values.numpy(), cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=9)
        axes.set_yticks(range(len(rows)), rows if k == 0 else [""] * len(rows), fontsize=9.5)
        for i, row in enumerate(values):
            for j, v in enumerate(row):
                axes.text(j, i, f"{float(v):.3f}", ha="center", va="center", fontsize=8.5,
                          color="black" if float(v) > 0.6 * high + 0.4 * low else "white")
        i, j = divmod(int(values.argmin()), len(columns))
        x, y = [j - 0.48, j + 0.48, j + 0.48, j - 0.48, j - 0.48], [i - 0.46, i - 0.46, i + 0.46, i + 0.46, i - 0.46]
        axes.plot(x, y, color="#e45756", lw=2)
        axes.set_title(f"{name} ({low:.3f} dark, {high:.3f} bright)", fontsize=10)
    view.suptitle(title, fontsize=11)
    view.alt = f"{title}: " + ", ".join(maps)
    return view


def token_masks(mask, unet, size):
    """The mask (1, 1, H, W) as each grid of the U-Net sees it, enlarged again: (pictures, labels), finest first."""
    pictures, labels = [mask], [f"the mask, {mask.shape[-2]} x {mask.shape[-1]} pixels"]
    for fraction in sorted({x.fraction for x in attention.layers(unet)}, reverse=True):
        layer = next(x for x in attention.layers(unet) if x.fraction == fraction)
        h, w = attention.grid(layer, size)
        pooled = attention.pool_mask(mask, (h, w)).transpose(1, 2).unflatten(2, (h, w))
        pictures.append(F.interpolate(pooled, mask.shape[-2:], mode="nearest"))
        labels.append(f"{h} x {w} = {h * w} tokens")
    return pictures, labels


# ---------------------------------------------------------------- inversion

def round_trip(pipe, pictures, words, steps, refine=0, scales=(1.0,)):
    """Picture -> noise -> picture: (mean PSNR in dB for each guidance scale of the way down, the noise).

    pictures (B, 3, H, W), words: one text for each. The way up has guidance scale 1, the way down the given ones.
    """
    noise = diffusion.invert(pipe, latents.encode(pipe, pictures), words, steps, refine=refine).noise
    back = lambda scale: latents.decode(pipe, diffusion.sample(pipe, words, steps, scale, latents=noise)).cpu()
    return [metrics.psnr(back(scale), pictures).mean().item() for scale in scales], noise


# ---------------------------------------------------------------- the relatives

def recoloured(scene):
    """The same scene with other colours, which is an edit by words whose true picture is known."""
    new = [next(c for c in (*RECOLOURED[i % 4:], *RECOLOURED) if c != t.colour) for i, t in enumerate(scene.things)]
    return replace(scene, things=tuple(replace(t, colour=c) for t, c in zip(scene.things, new)))


def places(unet):
    """Where the relatives reach in: {"masactrl": layers, "pnp": layers, "features": module name}.

    MasaCtrl: from layer 10 of SD's 16 on. Plug-and-Play: the decoder's self-attention without its first layer, and
    the output of the second residual block beside that first layer.
    """
    known, up = attention.layers(unet), attention.select(unet, "up")
    first = ".".join(up[0].name.split(".")[:2])
    return {"masactrl": known[int(len(known) * 10 / 16):], "pnp": up[1:], "features": f"{first}.resnets.1"}


def relatives(pipe, picture, old_words, new_words, start=None, steps=20, guidance_scale=3.0):
    """The picture's words changed, by each relative: {"no injection", "MasaCtrl", "Plug-and-Play", "StyleAligned"}.

    picture (1, 3, H, W) is inverted with old_words, and Q, K, V and features are recorded on the way. The drawing
    begins from `start`, or from the inverted noise.
    """
    unet, where = pipe.unet, places(pipe.unet)
    with attention.record(unet, what="qkv") as bank, attention.record_features(unet, where["features"]) as features:
        path = diffusion.invert(pipe, latents.encode(pipe, picture), old_words, steps, refine=1)
    start = path.noise if start is None else start
    tools = {"no injection": [],
             "MasaCtrl": [attention.steer(unet, bank, attention.masactrl, where["masactrl"], (0.08, 1.0))],
             "Plug-and-Play": [attention.steer(unet, bank, attention.plug_and_play, where["pnp"], (0.0, 0.5)),
                               attention.inject_features(unet, features, (0.0, 0.8))],
             "StyleAligned": [attention.steer(unet, bank, attention.style_aligned)]}
    drawn = {}
    for name, some in tools.items():
        with ExitStack() as stack:
            for tool in some:
                stack.enter_context(tool)
            z = diffusion.sample(pipe, new_words, steps, guidance_scale, latents=start)
        drawn[name] = latents.decode(pipe, z).cpu()
    return drawn


# ---------------------------------------------------------------- the lesson's stored pictures

def blend_strip(task):
    """The title picture: both rooms, paste, no injection, injection, truth. Returns (pictures, labels)."""
    paste = task.a * task.things + task.b * (1 - task.things)
    made = {"A: its things": task.a, "B: its room": task.b, "A's things pasted on B": paste,
            "A drawn again, new words": task.plain(), "the same, K and V blended": redraw(task), "the truth": task.truth}
    return list(made.values()), list(made)


def grid_strip(task, layers=("down", "mid", "up", "all"), windows=WINDOWS[1:] + WINDOWS[:1]):
    """One row for each set of layers, one column for each window. Returns (pictures, labels)."""
    pictures, labels = [], []
    for chosen in layers:
        for window in windows:
            pictures.append(redraw(task, layers=chosen, window=window))
            labels.append(f"{chosen}, {window[0]:.2f} to {window[1]:.2f}\nRMSE {task.errors(pictures[-1])['all']:.3f}")
    return pictures, labels


def relatives_strip(pipe, first=PAIR["FROM"], steps=20, seed=1):
    """Source, truth, and the four drawings from fresh noise. Returns (pictures, labels)."""
    scene = scenes.sample(first)
    new = recoloured(scene)
    source, truth = scenes.render([scene, new]).rgb.split(1)
    fresh = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    drawn = relatives(pipe, source, scene.caption(), new.caption(), fresh, steps)
    return [source, truth, *drawn.values()], ["source", "new colours, the truth", *drawn]


def explorer_strip(task, strengths=(0.0, 0.5, 1.0)):
    """The explorer without a kernel: keys, values and both at three strengths. Returns (pictures, labels)."""
    pictures, labels = [], []
    for name, parts in PARTS.items():
        for strength in strengths:
            pictures.append(redraw(task, strength, parts=parts))
            labels.append(f"{name},\nstrength {strength:.1f}")
    return pictures, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 08 (needs the mini model). Returns their paths."""
    from lib import models

    folder, pipe = Path(folder), models.load("mini", quiet=True)
    task = case(pipe)
    return [show.sheet(*blend_strip(task), folder / "08_blend.png", columns=3, scale=2),
            show.sheet(*explorer_strip(task), folder / "08_explorer.png", columns=3, scale=2),
            show.sheet(*relatives_strip(pipe), folder / "08_relatives.png", columns=3, scale=2)]
