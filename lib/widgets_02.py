"""Lesson 02's interactive part, the attention explorer, its small drawings, and the lesson's stored pictures.

`explorer_view` and `explorer_text` are plain functions of the settings; `attention_explorer` is the shell:
sliders, and a picture to click on where anywidget is installed. All weights are recorded beforehand.
"""
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image

from lib import attention, show
from lib.widgets import panel, slider

HEAT = "inferno"             # black = no weight, bright yellow = the largest weight of the map
MARK = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
PAIR = {"FROM": 20000006, "TO": 20000007}         # the lesson's own parameters; a test compares them
PICTURE, TIMES = 20000003, (701, 401, 201, 41)
HEADS, LAYERS = "the heads of one layer", "all layers, heads averaged"


# ---------------------------------------------------------------- maps over a picture

def heat(picture, weights, top=None):
    """Weights (1, 1, h, w) as colours over a faint grey picture (1, 3, H, W) -> (1, 3, H, W).

    Black is 0, bright yellow is `top`, by default the map's own largest weight; every token is a square.
    """
    if picture.ndim != 4 or picture.shape[:2] != (1, 3) or weights.ndim != 4 or weights.shape[:2] != (1, 1):
        raise ValueError("Give one picture (1, 3, H, W) and one map (1, 1, h, w), not "
                         f"{tuple(picture.shape)} and {tuple(weights.shape)}.")
    weights = weights.detach().float().cpu()
    share = (weights / (weights.max() if top is None else top).clamp_min(1e-12)).clamp(0, 1)
    share = F.interpolate(share, size=picture.shape[-2:], mode="nearest")[:, 0]
    colours = torch.from_numpy(colormaps[HEAT](share.numpy()))[..., :3].float().movedim(-1, 1)
    return 0.75 * colours + 0.25 * picture.mean(1, keepdim=True)


def mark(picture, size, token):
    """The picture with a cyan frame around one token of a grid of size (h, w)."""
    (h, w), (height, width) = size, picture.shape[-2:]
    row, column = divmod(token, w)
    top, left = row * height // h, column * width // w
    low, right = max(top + 3, (row + 1) * height // h), max(left + 3, (column + 1) * width // w)
    out = picture.clone()
    out[..., top:low, left:right] = MARK
    edge = max(1, height // 128)
    inner = (..., slice(top + edge, low - edge), slice(left + edge, right - edge))
    out[inner] = picture[inner]
    return out


def word_map(bank, layers, t, key, size):
    """How strongly each place looks at word `key`: the mean over all heads and layers, (1, 1, h, w).

    bank: cross-attention weights from `record(kind="cross", what="w")`; size: (h, w) of the map.
    """
    maps = [attention.attention_map(bank, layer, t, key=key).float() for layer in layers]
    means = [F.interpolate(m.mean(1, keepdim=True), size=size, mode="nearest") for m in maps]
    return torch.stack(means).mean(0)


def noun_places(listed, names):
    """Where the noun of each name, a list such as ["red", "glass", "ball"], stands in `words_of` a prompt.

    None for a name that the prompt leaves out.
    """
    words, found = [word for _, word in listed], []
    for name in map(list, names):
        ends = [i + len(name) - 1 for i in range(len(words)) if words[i:i + len(name)] == name]
        found.append(listed[ends[-1]][0] if ends else None)
    return found


def words_of(pipe, prompt):
    """The tokens of a prompt as (place, text) pairs, without the start and end marks."""
    ids = pipe.tokenizer(prompt, truncation=True).input_ids
    words = [word.replace("</w>", "") for word in pipe.tokenizer.convert_ids_to_tokens(ids)]
    return list(enumerate(words))[1:-1]


# ---------------------------------------------------------------- the explorer

def _check(bank, layers, number, t):
    if not 1 <= number <= len(layers):
        raise ValueError(f"There are layers 1 to {len(layers)}, not {number}.")
    if t not in bank.timesteps:
        raise ValueError(f"Nothing was recorded at timestep {t}; recorded: {bank.timesteps}.")


def looks_from(bank, layer, t, x, y):
    """(the token under the point, its weights (heads, h, w)) in one layer; x, y in [0, 1]."""
    token = attention.token_at(attention.grid(layer, bank.size), x, y)
    return token, attention.attention_map(bank, layer, t, query=token)[0].float().cpu()


def explorer_view(picture, bank, layers, x, y, number, t, what=HEADS):
    """Where the place (x, y) of a picture looks, as one PIL picture.

    picture (1, 3, H, W); bank: weights "w" from `attention.record`; layers: the recorded `Layer`s; x, y in
    [0, 1]; number: which layer, from 1; t: a recorded timestep. what: HEADS (the heads of layer `number`) or
    LAYERS (each layer's mean over its heads). ValueError for a layer, timestep or place that is not there.
    """
    _check(bank, layers, number, t)
    if what not in (HEADS, LAYERS):
        raise ValueError(f"what is {HEADS!r} or {LAYERS!r}, not {what!r}.")
    layer = layers[number - 1]
    token, maps = looks_from(bank, layer, t, x, y)
    tokens = maps[0].numel()
    images = [mark(picture, attention.grid(layer, bank.size), token)]
    labels = [f"the place that looks\nt = {t}"]
    if what == HEADS:
        named = [("mean of the heads", maps.mean(0)), *((f"head {i}", m) for i, m in enumerate(maps, 1))]
    else:
        named = [(f"{i}: {one.place} {'x'.join(map(str, attention.grid(one, bank.size)))}",
                  looks_from(bank, one, t, x, y)[1].mean(0)) for i, one in enumerate(layers, 1)]
    for name, m in named:
        images.append(heat(picture, m[None, None]))
        labels.append(f"{name}\nbrightest = {float(m.max()) * m.numel():.1f} x even")
    scale = max(1, 256 // picture.shape[-1])
    columns = 3 if what == HEADS and len(images) <= 6 else 4
    return show.tile(images, labels, columns=columns, scale=scale)


def explorer_text(bank, layers, x, y, number, t):
    """The line above the maps: which layer this is, and how the weights are spread."""
    _check(bank, layers, number, t)
    layer = layers[number - 1]
    token, maps = looks_from(bank, layer, t, x, y)
    m = maps.mean(0).flatten()
    half = int((m.sort(descending=True).values.cumsum(0) < 0.5 * m.sum()).sum()) + 1
    h, w = attention.grid(layer, bank.size)
    return (f"layer {number} of {len(layers)} ({layer.place}, {h} x {w} = {h * w} tokens), t = {t}: "
            f"token {token} gives itself {float(m[token]):.1%} of its attention; half of it goes to {half} "
            f"of {h * w} tokens.")


CLICK = """
function render({ model, el }) {
  const box = document.createElement("div");
  box.className = "click-picture";
  box.style.cssText = "position:relative; display:inline-block; cursor:crosshair; line-height:0";
  const image = document.createElement("img");
  image.src = model.get("source");
  image.alt = "the picture; click on a place";
  image.style.width = model.get("width") + "px";
  const dot = document.createElement("div");
  dot.style.cssText = "position:absolute; width:12px; height:12px; margin:-8px 0 0 -8px;" +
                      "border:2px solid #0ff;" +
                      "border-radius:50%; box-shadow:0 0 2px #000; pointer-events:none";
  const place = () => {
    dot.style.left = 100 * model.get("x") + "%";
    dot.style.top = 100 * model.get("y") + "%";
  };
  box.addEventListener("click", event => {
    const r = image.getBoundingClientRect();
    const part = (v, size) => Math.round(100 * Math.min(1, Math.max(0, v / size))) / 100;
    model.set("x", part(event.clientX - r.left, r.width));
    model.set("y", part(event.clientY - r.top, r.height));
    model.save_changes();
  });
  model.on("change:x", place);
  model.on("change:y", place);
  box.append(image, dot);
  el.append(box);
  place();
}
export default { render };
"""


def click_picture(picture, x=0.5, y=0.5, width=256):
    """A picture to click on, with synchronised x and y in [0, 1]; None where anywidget is not installed."""
    try:
        import anywidget
        import traitlets
    except ImportError:
        return None
    import base64

    class ClickPicture(anywidget.AnyWidget):
        _esm = CLICK
        source = traitlets.Unicode().tag(sync=True)
        width = traitlets.Int(256).tag(sync=True)
        x = traitlets.Float(0.5).tag(sync=True)
        y = traitlets.Float(0.5).tag(sync=True)

    data = show._png(Image.fromarray(show.to_uint8(picture)))
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    return ClickPicture(source=source, width=width, x=x, y=y)


def attention_explorer(picture, bank, layers, x=0.5, y=0.5):
    """Click on the picture or slide x and y, choose layer and timestep, and see where this place looks.

    picture (1, 3, H, W); bank: self-attention weights "w" recorded at one or more timesteps; layers: those
    recorded. A `panel` of controls, text and maps; where anywidget is installed, a picture to click on stands
    beside the controls.
    """
    import ipywidgets

    wide, style = ipywidgets.Layout(width="480px"), {"description_width": "110px"}

    def dropdown(options, label, value):
        return ipywidgets.Dropdown(options=options, value=value, description=label, layout=wide, style=style)

    grids = [" x ".join(map(str, attention.grid(layer, bank.size))) for layer in layers]
    rows = [(f"{i}: {layer.place}, {size}", i) for i, (layer, size) in enumerate(zip(layers, grids), 1)]
    times = [(f"t = {t}", t) for t in bank.timesteps[::-1]]
    controls = {"x": slider(x, 0.0, 1.0, 0.01, "x (left-right)"),
                "y": slider(y, 0.0, 1.0, 0.01, "y (top-down)"),
                "number": dropdown(rows, "layer", len(layers)),
                "t": dropdown(times, "timestep", bank.timesteps[0]),
                "what": dropdown((HEADS, LAYERS), "show", HEADS)}

    def draw(x, y, number, t, what):
        return (explorer_view(picture, bank, layers, x, y, number, t, what),
                explorer_text(bank, layers, x, y, number, t))

    box, clicker = panel(draw, "attention-explorer", **controls), click_picture(picture, x, y)
    text, maps = box.children[-2:]
    if clicker is None:
        return box
    for name in ("x", "y"):
        ipywidgets.link((clicker, name), (controls[name], "value"))
    beside = ipywidgets.HBox([clicker, ipywidgets.VBox(box.children[:-2])])
    return ipywidgets.VBox([beside, text, maps])


# ---------------------------------------------------------------- small drawings

def matrix(values, rows, columns, title="", bold=None):
    """A table of weights (n, m) in [0, 1] as squares with names and numbers: a View. bold: a row to frame."""
    n, m = values.shape
    view = show.View(figsize=(1.9 + 0.62 * m, 1.1 + 0.42 * n), dpi=show.DPI, facecolor="white",
                     layout="constrained")
    axes = view.add_subplot()
    values, top = values.detach().float().cpu(), max(1e-6, float(values.max()))
    shown = axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(m), columns, fontsize=10)
    axes.set_yticks(range(n), rows, fontsize=10)
    axes.xaxis.tick_top()
    for i in range(n):
        for j in range(m):
            dark = values[i, j] > 0.6 * top
            axes.text(j, i, f"{float(values[i, j]):.2f}", ha="center", va="center", fontsize=8.5,
                      color="white" if dark else "black")
    if bold is not None:
        low, high, left, right = bold - 0.48, bold + 0.48, -0.5, m - 0.5
        axes.plot([left, right, right, left, left], [low, low, high, high, low], color="#e45756", lw=2,
                  clip_on=False)
    view.colorbar(shown, ax=axes, label="weight", shrink=0.9)
    axes.set_title(title, fontsize=11)
    view.alt = title or "a matrix of weights"
    return view


def curves(panels, height=3.2):
    """Line plots side by side: panels are (title, x label, y label, {name: (xs, ys)}, log?) -> a View."""
    view = show.View(figsize=(4.6 * len(panels), height), dpi=show.DPI, facecolor="white",
                     layout="constrained")
    for k, (title, x_label, y_label, lines, log) in enumerate(panels, 1):
        axes = view.add_subplot(1, len(panels), k)
        for style, (name, (xs, ys)) in zip(itertools.cycle(("-", "--", "-.")), lines.items()):
            axes.plot(xs, ys, style, marker="o", ms=4, label=name)
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    view.alt = "; ".join(title for title, *_ in panels)
    return view


def time_and_memory(run, repeats=3):
    """(best seconds, extra peak memory in MB) of run(): what it takes beyond what is there already.

    Memory is the card's own count on CUDA, else the process's, looked at every 10 ms.
    """
    from lib.benchmark import Peak

    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)

    seconds, extra = [], 0.0
    for _ in range(repeats):
        with Peak() as peak:
            before, start = peak.mb, time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
        extra = max(extra, peak.mb - before)
    return min(seconds), extra


# ---------------------------------------------------------------- keys and values swapped

def colour_distance(a, b):
    """RMSE of two pictures (1, 3, H, W), averaged over 8 x 8 large blocks: colours of areas, no detail."""
    return float((F.adaptive_avg_pool2d(a, 8) - F.adaptive_avg_pool2d(b, 8)).square().mean().sqrt())


def colour_towards(x, a, b):
    """How far x's large-area colours went from a's to b's: <x - a, b - a> / |b - a|^2 (0 = a, 1 = b)."""
    x, a, b = (F.adaptive_avg_pool2d(y, 8) for y in (x, a, b))
    return float(((x - a) * (b - a)).sum() / (b - a).square().sum().clamp_min(1e-12))


def structure_distance(a, b):
    """1 - cosine between the brightness steps from pixel to pixel: 0 = same outlines, about 1 = unrelated."""
    def steps(x):
        grey = x.float().mean(1, keepdim=True)
        return torch.cat([grey.diff(dim=-1).flatten(), grey.diff(dim=-2).flatten()])
    return max(0.0, 1 - float(F.cosine_similarity(steps(a), steps(b), dim=0)))


def swapped(pipe, pictures, prompts, steps=25, parts=("k", "v", "kv")):
    """Draw picture 0 again from its noise, with keys, values of picture 1: {"own", "other", "k", "v", "kv"}.

    pictures (2, 3, H, W), prompts: two texts. Both are inverted (DDIM, lesson 03). "own" and "other" are the
    two pictures drawn again without any change, and K and V are recorded while "other" is drawn.
    """
    from lib import diffusion, latents

    path = diffusion.invert(pipe, latents.encode(pipe, pictures), prompts, steps, refine=1)

    def draw(i):
        z = diffusion.sample(pipe, prompts[i], steps, 1.0, latents=path.noise[i:i + 1])
        return latents.decode(pipe, z).cpu()

    results = {"own": draw(0)}
    with attention.record(pipe.unet) as bank:
        results["other"] = draw(1)
    for part in parts:
        with attention.inject(pipe.unet, bank, parts=part):
            results[part] = draw(0)
    return results


# ---------------------------------------------------------------- the lesson's stored pictures

def record_looks(pipe, picture, prompt, times=TIMES, layers="all", kind="self", seed=0):
    """Attention weights of a picture noised to each of `times`: one U-Net call each -> Bank with "w"."""
    from lib import diffusion, latents

    z, text = latents.encode(pipe, picture), diffusion.embed(pipe, prompt)
    scheduler = diffusion.ddim(pipe, 50)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).to(z)
    with torch.no_grad(), attention.record(pipe.unet, layers, what="w", kind=kind) as bank:
        for t in times:
            diffusion.predict(pipe, diffusion.q_sample(scheduler, z, t, noise), t, text)
    return bank


def swap_strip(pipe, steps=25):
    """The title picture: A, B, and A with B's keys, values, both: (pictures, labels) for show.sheet."""
    from lib import scenes

    pair = [scenes.sample(PAIR["FROM"]), scenes.sample(PAIR["TO"])]
    truth = scenes.render(pair).rgb
    r = swapped(pipe, truth, [s.caption() for s in pair], steps)
    labels = ["picture A", "picture B", "A drawn again",
              "A with B's keys (K)", "A with B's values (V)", "A with both (K and V)"]
    return [truth[:1], truth[1:], r["own"], r["k"], r["v"], r["kv"]], labels


def explorer_strip(pipe, at=(0.64, 0.6), times=(701, 201, 41), numbers=(1, 2, 9, 10)):
    """The explorer without a kernel: one place, some layers, three timesteps. Returns (pictures, labels)."""
    from lib import scenes

    scene = scenes.sample(PAIR["FROM"])
    picture = scenes.render(scene).rgb
    bank, layers = record_looks(pipe, picture, scene.caption(), times), attention.layers(pipe.unet)
    images, labels = [], []
    for t in times:
        token = attention.token_at(bank.size, *at)
        images.append(mark(picture, bank.size, token))
        labels.append(f"t = {t}")
        for i in numbers:
            layer = layers[i - 1]
            m = looks_from(bank, layer, t, *at)[1].mean(0)
            images.append(heat(picture, m[None, None]))
            labels.append(f"layer {i}: {layer.place}, {'x'.join(map(str, m.shape))}\n"
                          f"brightest = {float(m.max()) * m.numel():.1f} x even")
    return images, labels


def words_strip(pipe, times=(801, 401, 41)):
    """Which places look at each thing's own noun: one row for each timestep. Returns (pictures, labels)."""
    from lib import scenes

    scene = scenes.sample(PICTURE)
    picture, prompt = scenes.render(scene).rgb, scene.caption()
    bank = record_looks(pipe, picture, prompt, times, kind="cross")
    layers = [x for x in attention.layers(pipe.unet, "cross") if x.fraction >= 0.5]   # 4 x 4 says little
    names = [thing.name.split() for thing in scene.things]
    nouns = noun_places(words_of(pipe, prompt), names)
    images, labels = [], []
    for t in times:
        images += [picture, *(heat(picture, word_map(bank, layers, t, place, bank.size)) for place in nouns)]
        labels += [f"t = {t}", *(f'"{name[-1]}" after "{name[0]}"' for name in names)]
    return images, labels


def make_figures(folder):
    """Draw the stored pictures of lesson 02 (needs the mini model). Returns their paths."""
    from lib import models

    folder, pipe = Path(folder), models.load("mini", quiet=True)
    return [show.sheet(*swap_strip(pipe), folder / "02_swap.png", columns=3, scale=2),
            show.sheet(*explorer_strip(pipe), folder / "02_explorer.png", columns=5, scale=2),
            show.sheet(*words_strip(pipe), folder / "02_words.png", columns=5, scale=2)]
