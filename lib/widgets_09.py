"""Lesson 09's interactive parts: an object, or a cut between two scenes, moved through depth; drawings, figures.

`journey_view` and `journey_text` are plain functions of (journey, depth, method); `journey_explorer` is the
shell. Every stop is edited beforehand, so moving the slider is instant; a journey knows the truth at each stop.
"""
import csv
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lib import attention, benchmark, depth, diffusion, featglac, latents, light, metrics, scenes, show
from lib.widgets import panel

EXAMPLE = {"SCENE": 20005057, "PAIR": 20005008, "ROOM": 20005025}   # the lesson's own; a test compares them
OBJECT = scenes.Thing("vase", "orange", x=0, z=0, size=1.3, turn=20)      # what is moved through ROOM
DEPTHS = (2.0, 2.3, 2.6, 2.9, 3.2, 3.5, 3.8, 4.1, 4.4)                    # metres, of its front
CUTS = (2.7, 3.0, 3.4, 3.9, 4.3, 4.7)                                     # metres, of the cut between two scenes
MARKED = {"inject": "#e45756", "guide": "#8b1a1a"}
ZONE_COLOURS = {"shading": "#f58518", "shadow": "#4c78a8", "floor": "#54a24b", "hole": "#b279a2"}
METRIC = {"near": scenes.NEAR, "far": scenes.FAR}


# ---------------------------------------------------------------- drawings

def tint(picture, mask, colour, amount=0.55):
    """A picture (1, 3, H, W) with the pixels under a mask (1, 1, H, W) mixed with a colour "#rrggbb"."""
    rgb = torch.tensor([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]).view(1, 3, 1, 1)
    return picture * (1 - amount * mask) + rgb * amount * mask


def zones_picture(truth, zones):
    """The zones on a faint truth: shading orange, shadow blue; in compositing also floor green, hole purple."""
    out = truth.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.6 + 0.3
    for name, colour in ZONE_COLOURS.items():
        out = tint(out, zones[name], colour, 0.7)
    return out


def light_change(after, before, mask=None):
    """log2 of how many times lighter `after` is than `before` (1, 1, H, W): +1 = twice, -1 = half, 0 = same."""
    grey = lambda x: x.mean(1, keepdim=True).clamp(min=0) + 0.02
    ratio = (grey(after) / grey(before)).log2()
    return ratio if mask is None else ratio * mask


def cost_plot(means, title, zones=("shadow", "shading")):
    """Error against U-Net passes, a panel for each zone. means: of `board_means`, with "vae" and "plain-cfg" too.

    Lines: half of the depth-aware paste's error (the goal), perfect latents (the VAE's bound), the cost of
    plain sampling. One marker for each method; FeatGLaC's are large and red.
    """
    view = show.View(figsize=(10.4, 4.2), dpi=show.DPI, facecolor="white", layout="constrained")
    axes = view.subplots(1, len(zones), squeeze=False)[0]
    for ax, zone in zip(axes, zones):
        for i, (name, words) in enumerate((n, w) for n, w in NAMES.items() if n in means):
            colour = MARKED.get(name) or show.ID_COLOURS[(0, 2, 4, 5, 6, 7, 1)[i % 7]]
            ax.plot(means[name]["passes"], means[name][f"rmse_{zone}"], "sDo^vP*Xd"[i % 9], color=colour, ls="",
                    ms=11 if name in MARKED else 8, alpha=0.85, label=words)
        ax.axhline(means["alpha"][f"rmse_{zone}"] / 2, color="#54a24b", lw=1.2, ls="--",
                   label="goal: half the depth-aware paste")
        ax.axhline(means["vae"][f"rmse_{zone}"], color="0.5", lw=1.2, ls="-.", label="bound: perfect latents")
        ax.axvline(means["plain-cfg"]["passes"], color="0.6", lw=1.2, ls=":", label="cost of plain sampling")
        ax.set_ylim(0, 1.12 * max(means[n][f"rmse_{zone}"] for n in NAMES if n in means))
        ax.margins(x=0.08)
        ax.set_title(f"{zone} zone", fontsize=11)
        ax.set_xlabel("U-Net passes for one picture (0 = no model)")
        ax.set_ylabel("RMSE against the truth")
        ax.grid(alpha=0.3)
    view.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    view.suptitle(title, fontsize=11.5)
    view.alt = title
    return view


def intervals(rows, title, x_label):
    """Differences with intervals: rows of (name, difference, low, high); green and red = 0 is excluded."""
    size = 8.2, 0.9 + 0.27 * len(rows)
    view = show.View(figsize=size, dpi=show.DPI, facecolor="white", layout="constrained")
    axes = view.add_subplot()
    for i, (name, d, low, high) in enumerate(rows):
        colour = "0.55" if low <= 0 <= high else "#e45756" if d > 0 else "#54a24b"
        axes.plot([low, high], [i, i], color=colour, lw=2)
        axes.plot(d, i, "o", color=colour, ms=6)
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9)
    axes.invert_yaxis()
    view.suptitle(title, fontsize=11)                    # over names and lines: longer than the axes are wide
    axes.set_xlabel(x_label, fontsize=9.5)
    axes.grid(alpha=0.3, axis="x")
    view.alt = title
    return view


# ---------------------------------------------------------------- the stored board and ablation

def board(folder=None, model="mini"):
    """Rows of the largest stored scoreboard MODEL-<N>.csv, and N. FileNotFoundError when there is none."""
    from lib import setup
    folder = Path(folder) if folder else setup.data_dir() / "benchmark"
    named = [(re.fullmatch(rf"{model}-(\d+)", p.stem), p) for p in folder.glob(f"{model}-*.csv")]
    found = [(int(m[1]), p) for m, p in named if m]
    if not found:
        raise FileNotFoundError(
            f"There is no {model}-<N>.csv in {folder.name}/: run `python -m lib.benchmark`.")
    n, path = max(found)
    with open(path) as file:
        return list(csv.DictReader(file)), n


def number(row, key):
    """A figure of a stored row; NaN where the cell is empty."""
    return float(row.get(key) or "nan")


def board_means(rows, task, keys):
    """{mechanism: {key: mean over the scenes}} of a stored board, empty cells left out."""
    means = {}
    for name in dict.fromkeys(r["mechanism"] for r in rows if r["task"] == task):
        mine = [r for r in rows if (r["task"], r["mechanism"]) == (task, name)]
        values = {k: [v for r in mine if (v := number(r, k)) == v] for k in keys}
        means[name] = {k: sum(v) / len(v) if v else float("nan") for k, v in values.items()}
    return means


def worst(rows, task, key, mechanism="inject", baseline="alpha", skip=()):
    """(seed, its score, the baseline's) where the mechanism loses most against the baseline, by a board's rows.

    skip: seeds that have been shown already.
    """
    by = {name: {r["seed"]: number(r, key) for r in rows if (r["task"], r["mechanism"]) == (task, name)}
          for name in (mechanism, baseline)}
    loss = {s: by[mechanism][s] - by[baseline][s] for s in by[mechanism]}
    seed = max((s for s in loss if loss[s] == loss[s] and int(s) not in skip), key=loss.get)
    return int(seed), by[mechanism][seed], by[baseline][seed]


def flips(rows, task, mechanism):
    """(lost, won, seen): rooms whose order the judge finds right in the truth and wrong in the edit, the other way
    round, and all rooms that have an order."""
    mine = [r for r in rows if (r["task"], r["mechanism"]) == (task, mechanism)]
    said = [(number(r, "order"), number(r, "order_truth")) for r in mine]
    said = [(edit, truth) for edit, truth in said if edit == edit and truth == truth]
    return sum(edit < truth for edit, truth in said), sum(edit > truth for edit, truth in said), len(said)


def differences(rows, task, key, against=None):
    """All names of a stored table against one (or the first): (name, difference, low, high) for `intervals`."""
    by = {}
    for r in (r for r in rows if r["task"] == task):
        by.setdefault(r["mechanism"], {})[r["seed"]] = number(r, key)
    first = against or next(iter(by))
    out = []
    for name in (n for n in by if n != first):
        seeds = sorted(by[first])
        d = metrics.paired_bootstrap([by[name][s] for s in seeds], [by[first][s] for s in seeds])
        out.append((name, d["diff"], d["low"], d["high"]))
    return out


# ---------------------------------------------------------------- an edit with one choice changed

ALONE = {"samples": 1, "cast": 0.0, "shade": 0.0, "tint": 1.0}      # one sample, and no light but the model's own


def variant(pipe, c, steps, generator=None, mechanism="inject", grey=False, hard=False, clean=False,
            **options):
    """An insertion case with one choice changed, the model alone: (picture, U-Net passes).

    options: of `featglac.Settings`. Three choices of `inject` are not the library's: grey: the object's layer is
    shown on mid-grey instead of in the filled background; hard: masks are cut to 0 and 1; clean: K/V of the clean
    layers at every step, not of layers at the edit's own noise level.
    """
    if grey or hard or clean:
        return injected(pipe, c, steps, generator, grey, hard, clean, **options)
    given = depth.from_metric(c.background_depth, **METRIC)
    edit = featglac.insert_object(pipe, c.background, given, c.foreground, c.prompts[2], f"{c.at:.6f}m",
                                  mechanism, steps=steps, generator=generator, **{**ALONE, **options})
    return edit.image.float().cpu(), edit.passes


def injected(pipe, c, steps, generator=None, grey=False, hard=False, clean=False, **options):
    """`variant` by the lesson's own way down; without grey, hard, clean it is the library's (a test says so)."""
    s = replace(featglac.Settings(), **{"steps": steps, **ALONE, **options})
    given = depth.from_metric(c.background_depth, **METRIC)
    occluder = (given.values < given.at(f"{c.at:.6f}m")).float()
    visible = c.foreground[:, 3:] * (1 - occluder)
    paste, ring = featglac.over(c.foreground[:, :3], visible, c.background), featglac.ring(visible, s.ring)
    object_mask, ring_mask = ((visible > 0.5).float(), (ring > 0.5).float()) if hard else (visible, ring)
    around = s.keep * (1 - ring_mask) + s.free * ring_mask
    masks = torch.cat([(1 - object_mask) * around, object_mask * s.strength])
    shown = featglac.over(c.foreground[:, :3], visible, torch.full_like(paste, 0.5)) if grey else paste
    device, prompt = pipe.unet.device, c.prompts[2]
    z_layers = latents.encode(pipe, torch.cat([c.background, shown]).to(device))
    z_paste = latents.encode(pipe, paste.to(device))
    text, uncond = (diffusion.embed(pipe, p) for p in (prompt, featglac.opposite_light(prompt)))
    levels, climb = diffusion.ddim(pipe, steps), max(1, round(s.noise_level * steps))
    down, both = levels.timesteps.tolist()[steps - climb:], torch.cat([diffusion.embed(pipe, ""), text])
    cells = torch.nn.functional.adaptive_avg_pool2d(ring_mask, z_paste.shape[-2:]).to(z_paste)
    with diffusion.count_passes(pipe.unet) as passes, torch.no_grad():
        with attention.record(pipe.unet) as bank:
            path = diffusion.invert(pipe, z_layers, ["", prompt], steps, upto=climb)
            for t in down if clean else ():            # a second call at a timestep replaces what was recorded
                diffusion.predict(pipe, z_layers, t, both)
        noise = torch.randn(z_paste.shape, generator=generator, dtype=torch.float32).to(z_paste)
        z = diffusion.q_sample(levels, z_paste, down[0], noise)
        with attention.inject(pipe.unet, bank, masks):
            for t in down:
                out = diffusion.predict(pipe, z, t, text, uncond, s.guidance_scale)
                z = diffusion.ddim_step(levels, out, t, z)
                z = z + (1 - cells) * (path.at(diffusion.previous(levels, t))[:1] - z)
    after, before = latents.decode(pipe, torch.cat([z, z_paste]), clamp=False).float().cpu().split(1)
    picture = featglac.relight(paste, after, before, visible, s.smooth, s.quiet)
    in_front = occluder * (torch.nn.functional.max_pool2d(c.foreground[:, 3:], 3, 1, 1) > 0)
    return featglac.over(paste, in_front, picture), passes.total


def small_sd():
    """A tiny pipeline of SD 1.5's architecture (four levels), random weights; no words of diffusers on dtypes."""
    from diffusers.utils import logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return benchmark.random_sd(benchmark.TINY)
    finally:
        logging.set_verbosity(before)


# ---------------------------------------------------------------- what the depth map's light does not know

def toward(sun, camera):
    """A scene's sun as a `light.Light` known for sure, in the camera's coordinates (it looks down by its pitch)."""
    (x, y, z), p = sun.direction(), math.radians(camera.pitch)
    to = torch.tensor([x, y * math.cos(p) + z * math.sin(p), z * math.cos(p) - y * math.sin(p)]).float()
    azimuth, elevation = math.degrees(math.atan2(to[0], to[2])), math.degrees(math.asin(to[1]))
    return light.Light(to[None], torch.ones(1), azimuth, elevation, math.inf)


def believed(found, sun, camera, within=30.0):
    """(degrees from the likeliest direction of a found `light.Light` to a scene's sun, the chance that it gives
    to all directions within so many degrees of that sun)."""
    degrees = (found.directions @ toward(sun, camera).directions[0]).clamp(-1, 1).acos().rad2deg()
    return float(degrees[0]), float(found.chances[degrees <= within].sum())


def told(c):
    """The depth map's light, told more and more of the truth: ({what it is told: picture}, degrees, nats).

    c: an insertion case of `benchmark.case`. Each picture (1, 3, H, W) is the depth-aware paste times what
    `light.change` says, no model in it; the first is the mechanism "geometry". degrees: how far off the direction
    was that was found there, and nats: the evidence for it.
    """
    found, s = scenes.insertion_case(c.seed), featglac.Settings()
    scene, z, alpha = found["scene"], c.background_depth, c.foreground[:, 3:]
    new, old = (toward(sun, scene.camera) for sun in (scene.sun, found["sun"]))
    flat = light.Space(c.background, z, z, torch.full_like(z, c.at), alpha, s.fov, colour=c.foreground[:, :3])
    own = scenes.render(replace(scene, things=(scene.things[found["index"]],)), size=z.shape[-1]).depth
    solid = replace(flat, before=old, shape=light.normals(light.points(own, scene.camera.fov)))
    dark = c.zones["shadow"] * (c.truth.mean(1, keepdim=True) < c.background.mean(1, keepdim=True))
    guess, occluder = light.find(flat), (z < c.at).float()
    room = light.normals(light.points(z, s.fov))
    lost = (light.shading(room, new, hidden=1.0) - light.shading(room, new)) * dark
    shading = lambda share: light.change(solid, new, 0.0, share)
    changes = {"nothing: it looks for the light": light.change(flat, guess, s.cast, s.shade),
               "where the sun stands": light.change(flat, new, s.cast, s.shade),
               "and the object's shape and old light": light.change(flat, new, s.cast, 0.0) + shading(s.shade),
               "and the outline of its shadow": s.cast * lost + shading(s.shade),
               "all of it, believed in full": lost + shading(1.0)}
    in_front = occluder * (torch.nn.functional.max_pool2d(alpha, 3, 1, 1) > 0)
    relit = {name: featglac.over(c.paste, in_front, (c.paste * change.exp()).clamp(0, 1))
             for name, change in changes.items()}
    return relit, believed(guess, scene.sun, scene.camera)[0], guess.evidence


# ---------------------------------------------------------------- journeys through depth

@dataclass
class Journey:
    """Edits at several depths. ats: metres, ascending; pictures: {method: (N, 3, H, W)}, "truth" among them;
    shown (N, 3, H, W): the given picture with what is nearer than each depth tinted; zones: {name: (N, 1, H, W)};
    hidden: share of the object that is covered, or of the picture that is A; what: words for that; passes:
    {method: U-Net passes a stop}."""
    ats: tuple
    pictures: dict
    shown: torch.Tensor
    zones: dict
    hidden: list
    what: str
    passes: dict = field(default_factory=dict)

    def index(self, at):
        """The stop at this depth. Raises ValueError for a depth without a stop."""
        near = [i for i, a in enumerate(self.ats) if abs(a - at) < 1e-6]
        if not near:
            stops = ", ".join(f"{a:.1f}" for a in self.ats)
            raise ValueError(f"There is no stop at {at} m; the stops are {stops} m.")
        return near[0]


def _path(d):
    """The moving object's x, metres: straight on, then behind the plant."""
    return -0.15 + 0.33 * max(0.0, d - 3.5)


def object_journey(pipe, room_seed, depths=DEPTHS, size=128, methods=("alpha", "inject"), generator=None,
                   thing=OBJECT, **options):
    """Move an object, cut out under a foreign sun, through a room. options: of `featglac.insert_object`."""
    room = scenes.sample(room_seed)
    depths = [d for d in depths if d < room.room.back - thing.footprint * 2]
    placed = [room.insert(thing, at=d, x=_path(d)) for d in depths]
    world, i = scenes.render([room, *placed], size=size), len(room.things)
    image, truth, z = world.rgb[:1], world.rgb[1:], world.depth[:1]
    given = depth.from_metric(z, **METRIC)
    cutouts = [scenes.only(s, i, sun=scenes.other_sun(room.sun), size=size) for s in placed]
    pictures, passes = {}, {}
    for name in methods:
        more = {} if name in ("alpha", "paste2d") else options
        edits = [featglac.insert_object(pipe, image, given, cutout, s.caption(), f"{d}m", name,
                                        generator=generator, **more)
                 for cutout, s, d in zip(cutouts, placed, depths)]
        pictures[name] = torch.cat([e.image.float().cpu() for e in edits])
        passes[name] = sum(e.passes for e in edits) / len(edits)
    alpha, near = torch.cat(cutouts)[:, 3:], torch.cat([(z < d).float() for d in depths])
    visible = world.ids[1:] == i
    hidden = [1 - float((a * (1 - n)).sum() / a.sum()) for a, n in zip(alpha, near)]
    zones = benchmark.insertion_zones(truth, image.expand_as(truth), visible)
    shown = tint(image, near, "#00c8ff", 0.45)
    return Journey(tuple(depths), {**pictures, "truth": truth}, shown, zones, hidden, "of the object is hidden",
                   passes)


def scenes_journey(pipe, pair_seed, cuts=CUTS, size=128, methods=("alpha", "inject"), generator=None,
                   **options):
    """Move the cut between two scenes through depth: a Journey. options: of `featglac.compose`."""
    a, b, _ = scenes.composite_case(pair_seed)
    b = replace(b, camera=a.camera)
    both = scenes.render([a, b], size=size)
    cuts = [d for d in cuts if 0.02 < float((both.depth[:1] < d).float().mean()) < 0.98]
    wholes = [scenes.composite_truth(a, b, d, size=size) for d in cuts]
    bare = [scenes.composite_truth(replace(a, things=()), b, d, size=size).rgb for d in cuts]
    given = [depth.from_metric(both.depth[k:k + 1], **METRIC) for k in (0, 1)]
    pictures, passes = {}, {}
    for name in methods:
        more = {} if name in ("alpha", "paste2d") else options
        edits = [featglac.compose(pipe, both.rgb[:1], given[0], both.rgb[1:], given[1], f"{d}m",
                                  joint_caption(a, b, whole), name, generator=generator, **more)
                 for d, whole in zip(cuts, wholes)]
        pictures[name] = torch.cat([e.image.float().cpu() for e in edits])
        passes[name] = sum(e.passes for e in edits) / len(edits)
    truth, near = torch.cat([w.rgb for w in wholes]), torch.cat([(both.depth[:1] < d).float() for d in cuts])
    things = torch.cat([(w.ids >= 0) & (w.ids < len(a.things)) for w in wholes])
    front = torch.cat([w.depth < d for w, d in zip(wholes, cuts)])
    same = torch.cat([(both.depth[1:] - w.depth).abs() < 0.02 for w in wholes])
    zones = benchmark.compositing_zones(truth, torch.cat(bare), both.rgb[1:].expand_as(truth), things, front,
                                        same)
    shown = tint(both.rgb[:1], 1 - near, "#404040", 0.75)
    return Journey(tuple(cuts), {**pictures, "truth": truth}, shown, zones, [float(n.mean()) for n in near],
                   "of the picture is scene A", passes)


def joint_caption(a, b, whole, least=30):
    """The words for a composite: things of A and B that show on `least` pixels of 128 x 128, in B's light."""
    things, scale = a.things + b.things, (whole.ids.shape[-1] / scenes.SIZE) ** 2
    seen = [replace(t, on=None) for i, t in enumerate(things) if int((whole.ids == i).sum()) >= least * scale]
    return replace(b, camera=a.camera, things=tuple(seen[:4])).caption()


def journey_view(journey, at, method):
    """One stop: what is nearer, the chosen method's picture, the truth, their difference: a PIL picture."""
    k = journey.index(at)
    if method not in journey.pictures:
        raise ValueError(f"This journey has no {method!r}; it has {', '.join(journey.pictures)}.")
    mine, truth = journey.pictures[method][k:k + 1], journey.pictures["truth"][k:k + 1]
    error = ((mine - truth).abs().mean(1, keepdim=True) * 3).clamp(0, 1).expand(-1, 3, -1, -1)
    seen = "nearer than the depth: blue" if "object" in journey.what else "scene A; grey = cut away"
    return show.tile([journey.shown[k:k + 1], mine, truth, error],
                     [seen, f"{method} at {at:.1f} m", "the truth", "difference x 3"], columns=4,
                     scale=max(1, 256 // mine.shape[-1]))


def journey_text(journey, at, method):
    """The line above the pictures: what is hidden, and the error in the two zones where light matters."""
    k = journey.index(at)
    mine, truth = journey.pictures[method][k:k + 1], journey.pictures["truth"][k:k + 1]
    said = []
    for zone in ("shadow", "shading"):
        mask = journey.zones[zone][k:k + 1]
        few, error = mask.sum() < benchmark.LEAST, float(metrics.rmse(mine, truth, mask))
        said.append(f"{zone} zone {'too small here' if few else f'{error:.3f}'}")
    return (f"{method} at {at:.1f} m: {journey.hidden[k]:.0%} {journey.what}. Error beside the truth (RMSE): "
            f"{', '.join(said)}; {journey.passes.get(method, 0):.0f} U-Net passes.")


def journey_explorer(journey, css_class="depth-journey", method=None):
    """A slider of depth over the journey's stops, and a choice of method, beside the truth: a `panel`."""
    import ipywidgets
    wide, style = ipywidgets.Layout(width="480px"), {"description_width": "110px"}
    stops = [(f"{a:.1f} m", a) for a in journey.ats]
    names = list(journey.pictures)
    at = ipywidgets.SelectionSlider(options=stops, value=journey.ats[len(stops) // 2], description="depth",
                                    layout=wide, style=style)
    choice = ipywidgets.Dropdown(options=names, value=method or names[0], description="method", layout=wide,
                                 style=style)
    draw = lambda at, method: (journey_view(journey, at, method), journey_text(journey, at, method))
    return panel(draw, css_class, at=at, method=choice)


def journey_strip(journey, methods, stops=5):
    """The journey without a kernel: one row for each method, `stops` columns. Returns (pictures, labels)."""
    n = len(journey.ats)
    pick = sorted({round(i * (n - 1) / max(1, stops - 1)) for i in range(min(stops, n))})
    images, labels = [], []
    for name in methods:
        for k in pick:
            images.append(journey.pictures[name][k:k + 1])
            labels.append(f"{name}, {journey.ats[k]:.1f} m")
    return images, labels


# ---------------------------------------------------------------- the lesson's stored pictures

NAMES = {"paste2d": "2-D paste", "alpha": "depth-aware paste", "poisson": "Poisson blending",
         "blended-latent": "blended latent", "latent-paste": "latent paste at one step",
         "inpaint": "inpainting model", "geometry": "depth's light, no model",
         "inject": "FeatGLaC, inject", "guide": "FeatGLaC, guide"}


def insertion_strip(pipe, inpainter, seed=EXAMPLE["SCENE"], steps=25):
    """All methods on one insertion case beside the truth. Returns (pictures, labels)."""
    c = benchmark.case("insertion", seed)
    given = depth.from_metric(c.background_depth, **METRIC)
    images, labels = [c.background, c.foreground], ["the room", "cut-out, lit from elsewhere"]
    for name, words in NAMES.items():
        edit = featglac.insert_object(pipe, c.background, given, c.foreground, c.prompts[2], f"{c.at:.6f}m",
                                      name, steps=steps, generator=torch.Generator().manual_seed(0),
                                      inpaint_pipe=inpainter if name == "inpaint" else None)
        images.append(edit.image.float().cpu())
        labels.append(words)
    return [*images, c.truth], [*labels, "the truth"]


def make_figures(folder):
    """Draw the stored pictures of lesson 09 (needs the mini models). Returns their paths."""
    from lib import models
    folder, pipe, g = Path(folder), models.load("mini", quiet=True), torch.Generator
    inpainter = models.load("mini-inpaint", quiet=True)
    moved = object_journey(pipe, EXAMPLE["ROOM"], DEPTHS[::2], steps=25, generator=g().manual_seed(0))
    cut = scenes_journey(pipe, EXAMPLE["PAIR"], CUTS, steps=25, generator=g().manual_seed(0))
    rows = ("alpha", "inject", "truth")
    return [show.sheet(*journey_strip(moved, rows), folder / "09_move.png", columns=5, scale=2),
            show.sheet(*insertion_strip(pipe, inpainter), folder / "09_methods.png", columns=4, scale=2),
            show.sheet(*journey_strip(cut, rows, 4), folder / "09_cut.png", columns=4, scale=2)]
