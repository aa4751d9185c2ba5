"""The scoreboard: edits of unseen scenes against exact truth (lesson 12).

    python -m lib.benchmark [--scenes 32] [--smoke] [--out DIR] [--mechanisms inject alpha ...] [--model mini]
    python -m lib.benchmark readme      # the README's tables, from the newest stored result
    python -m lib.benchmark models      # measured quality into each mini model's card
    python -m lib.benchmark ablate      # one choice of FeatGLaC changed at a time, on validation rooms
    python -m lib.benchmark gpu         # an SD-1.5-sized pipeline with random weights on this machine's card

Two tasks. *Insertion*: a cut-out, lit from elsewhere, is put behind what is nearer than `at`. *Compositing*:
scene A nearer than `at` in front of scene B. The scene list is a rule, not a file: the first N seeds of the
test split.

Zones are masks of the *truth* (`Case.zones`), the same for every method; the object is what was put in
(compositing: A's things nearer than `at`):
* shading: the object's visible pixels.
* shadow:  pixels outside it where the truth with and without the object differ by more than 0.03 (mean of the
  channels).
* outside: the rest of the background that the given picture shows as it must be.
* floor (compositing only): the rest of A's layer, near floor and walls, whose light has to become B's.
* hole (compositing only): background that B's picture does not show as it must be (more than 0.03 off),
  because something nearer than `at` stood there or threw a shadow there. Not part of the shadow zone.
A score in a zone is the root of the mean square error over all its pixels and channels of one scene; tables
give the mean over scenes. A scene whose zone has fewer than 16 pixels does not count in that zone.
"""
from __future__ import annotations

import argparse
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import platform
import statistics
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from lib import diffusion, latents, metrics, scenes

TASKS = ("insertion", "compositing")
LIGHT = 0.03            # a pixel belongs to the shadow zone above this mean difference of its channels
LEAST = 16              # pixels a zone needs to count
ZONES = ("shadow", "shading", "outside", "floor", "hole")
BASELINES = ("paste2d", "alpha", "geometry", "poisson", "blended-latent", "latent-paste", "inpaint")
MECHANISMS = ("inject", "guide")
WITH_DEPTH = "inject-rgbd"
RGBD = {"geometry-rgbd": "geometry", WITH_DEPTH: "inject"}   # insertion only: the cut-out brings its own depth along
SCORES = tuple(f"rmse_{z}" for z in ZONES) + ("psnr", "ssim", "feat_dist")
SHEET_SCENES = 2        # scenes of each task on the picture sheet, if 150 kB hold them


# ------------------------------------------------------------------------------------- cases with their truth

@dataclass
class Case:
    """One task: what an editor is given, and the truth it is scored against. Pictures (1, 3, H, W) in [0, 1].

    background, background_depth: the scene edited (insertion) or scene B; foreground, RGBA: the cut-out, or
    scene A's layer nearer than `at`; a, a_depth: scene A (compositing). Depths in metres. paste: the
    depth-aware composite of the given pixels, for the bounds. prompts: background, foreground, edit. order:
    arguments of `metrics.occlusion_order` after the maps, or None. thing: (kind, colour), 1-based, of what
    was put in. foreground_depth: of the cut-out alone (insertion); only the rows `RGBD` are given it."""
    task: str
    seed: int
    at: float
    background: torch.Tensor
    background_depth: torch.Tensor
    foreground: torch.Tensor
    truth: torch.Tensor
    zones: dict
    paste: torch.Tensor
    prompts: tuple
    a: torch.Tensor | None = None
    a_depth: torch.Tensor | None = None
    foreground_depth: torch.Tensor | None = None
    order: tuple | None = None
    thing: tuple | None = None


def case(task, seed, size=scenes.SIZE):
    """The case of a task and a test seed, always the same one, in pictures of `size` pixels a side."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")
    return _insertion(seed, size) if task == "insertion" else _compositing(seed, size)


def insertion_zones(truth, without, visible):
    """Zones of object insertion. truth, without (B, 3, H, W): the scene with and without the object;
    visible (B, 1, H, W) bool: pixels that show the object. Returns dict of float masks that sum to 1."""
    visible, none = visible.bool(), torch.zeros_like(visible).bool()
    changed = _differ(truth, without) & ~visible
    return _zones(shading=visible, shadow=changed, outside=~changed & ~visible, floor=none, hole=none)


def compositing_zones(truth, without, background, visible, layer, same):
    """Zones of scene compositing. without: the composite without A's things; background: B's picture;
    visible, layer, same (B, 1, H, W) bool: the truth shows one of A's things there; it shows anything of A's
    layer; B's picture shows the same surface as the truth."""
    visible, layer, same = visible.bool(), layer.bool() | visible.bool(), same.bool()
    by_object = _differ(truth, without)
    hole = ~layer & (~same | (_differ(truth, background) & ~by_object))
    shadow = ~visible & ~hole & by_object
    return _zones(shading=visible, shadow=shadow, outside=~layer & ~hole & ~shadow,
                  floor=layer & ~visible & ~shadow,
                  hole=hole)


def _differ(a, b):
    return (a - b).abs().mean(1, keepdim=True) > LIGHT


def _zones(**zones):
    return {k: v.float() for k, v in zones.items()}


def _insertion(seed, size):
    found = scenes.insertion_case(seed)
    scene, i = found["scene"], found["index"]
    alone = replace(scene, things=(replace(scene.things[i], on=None),))
    r = scenes.render([scene, found["background"], alone], size=size)
    cutout = scenes.only(scene, i, sun=found["sun"], size=size)
    truth, without, z = r.rgb[:1], r.rgb[1:2], r.depth[1:2]
    visible = r.ids[:1] == i
    hidden = (cutout[:, 3:] > 0.5) & ~visible & (r.ids[:1] >= 0)
    thing = scene.things[i]
    kind, colour = scenes.KINDS.index(thing.kind) + 1, scenes.COLOURS.index(thing.colour) + 1
    alpha = cutout[:, 3:] * (z >= found["at"])
    return Case("insertion", seed, found["at"], without, z, cutout, truth,
                insertion_zones(truth, without, visible),
                without * (1 - alpha) + cutout[:, :3] * alpha,
                (found["background"].caption(), f"a {thing.name}".replace("a orange", "an orange"),
                 found["caption"]),
                foreground_depth=r.depth[2:],
                order=_order(visible, hidden, kind, r.kind[:1]), thing=(kind, colour))


def _compositing(seed, size):
    a, b, at = scenes.composite_case(seed)
    r = scenes.render([a, replace(b, camera=a.camera)], size=size)
    whole = scenes.composite_truth(a, b, at, size=size)
    without = scenes.composite_truth(replace(a, things=()), b, at, size=size).rgb
    front, things = whole.depth < at, (whole.ids >= 0) & (whole.ids < len(a.things))
    same = (r.depth[1:] - whole.depth).abs() < 0.02
    near = (r.depth[:1] < at).float()
    layer = torch.cat([r.rgb[:1], near], 1)
    behind = _filled(r.rgb[1:], r.depth[1:], at)
    case_ = Case("compositing", seed, at, r.rgb[1:], r.depth[1:], layer, whole.rgb,
                 compositing_zones(whole.rgb, without, r.rgb[1:], things, front, same),
                 r.rgb[:1] * near + behind * (1 - near),
                 (b.caption(), a.caption(), _joint_caption(a, b, whole)), a=r.rgb[:1], a_depth=r.depth[:1])
    hiding = [(int(((r.ids[1:] == j) & things).sum()), j) for j in range(len(b.things))]
    if hiding:
        j = max(hiding)[1]
        visible = whole.ids == len(a.things) + j
        hidden = (r.ids[1:] == j) & things & (r.depth[1:] >= at)
        case_.order = _order(visible, hidden, scenes.KINDS.index(b.things[j].kind) + 1, whole.kind)
    shown = [(int((whole.ids == i).sum()), i) for i in range(len(a.things))]
    if shown:
        thing = a.things[max(shown)[1]]
        case_.thing = scenes.KINDS.index(thing.kind) + 1, scenes.COLOURS.index(thing.colour) + 1
    return case_


def _filled(image, z, at):
    """Scene B without what is nearer than the cut, the hole filled as `featglac.compose` fills it by
    default."""
    from lib import deglad, depth
    near_map = depth.from_metric(z, near=scenes.NEAR, far=scenes.FAR)
    return deglad.split(image, near_map, f"{at:.6f}m", allow_empty=True, fill="telea").background


def _order(visible, hidden, kind, kinds):
    """Arguments for `metrics.occlusion_order`: the thing that hides most is the one in front."""
    if not hidden.any():
        return None
    return visible, hidden, kind, int(torch.bincount(kinds[hidden]).argmax())


def _joint_caption(a, b, whole):
    """The caption of the composite: what of A and B shows on at least 30 pixels, in B's light."""
    things = a.things + b.things
    shown = [replace(t, on=None) for i, t in enumerate(things) if int((whole.ids == i).sum()) >= 30]
    return replace(b, camera=a.camera, things=tuple(shown[:4])).caption()


# ----------------------------------------------------------------------------------------- one edit, measured

def _return_freed_memory():
    """Pages that glibc keeps of freed blocks go back to the system: what is built in them would not be seen."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library: nothing to ask
        pass


class Peak:
    """Peak memory within a `with` block, MB: the card's own count on CUDA, else this process's resident
    memory (looked at every 10 ms, so the programs and models that are loaded anyway are in it)."""

    def __enter__(self):
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _return_freed_memory()
        self.mb, self._stop = self._now(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self.mb = max(self.mb, self._now())

    def _watch(self):
        while not self._stop.wait(0.01):
            self.mb = max(self.mb, self._now())

    def _now(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2 ** 20
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
        except OSError:  # not Linux: the highest ever, the best there is without another package
            import resource
            unit = 1 if platform.system() == "Darwin" else 2 ** 10
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


@dataclass
class Settings:
    """What makes two runs comparable; part of the fingerprint."""
    model: str = "mini"
    scenes: int = 32
    steps: int = 50
    guidance_scale: float = 3.0
    seed: int = 0
    mechanisms: tuple = BASELINES + MECHANISMS
    tasks: tuple = TASKS
    options: dict = field(default_factory=dict)     # further arguments of one mechanism: {"guide": {...}}
    smoke: bool = False

    def __post_init__(self):
        unknown = [m for m in self.mechanisms if m not in BASELINES + MECHANISMS]
        if unknown:
            raise ValueError(f"unknown mechanism {unknown[0]!r}: use {', '.join(BASELINES + MECHANISMS)}")
        if self.scenes < 1 or self.steps < 2:
            raise ValueError(f"at least 1 scene and 2 steps are needed; got {self.scenes} and {self.steps}")

    @property
    def name(self):
        return f"{Path(self.model).name}-{'smoke' if self.smoke else self.scenes}"


class Models:
    """Pipeline, inpainting pipeline and judge, loaded when first asked for; any of them can be given."""

    def __init__(self, settings, pipe=None, inpaint=None, judge=None, device="cpu", dtype=None):
        self.settings, self.device, self.dtype = settings, device, dtype
        self._pipe, self._inpaint, self._judge = pipe, inpaint, judge

    @property
    def pipe(self):
        if self._pipe is None:
            self._pipe = self._load(self.settings.model)
        return self._pipe

    @property
    def inpaint(self):
        if self._inpaint is None:
            self._inpaint = self._load(f"{self.settings.model}-inpaint")
        return self._inpaint

    def _load(self, name):
        from lib import models
        return models.load(name, device=self.device, dtype=self.dtype)

    @property
    def judge(self):
        if self._judge is None:
            from lib import models
            self._judge = models.load_judge("cpu")
        return self._judge

    @property
    def size(self):
        """Side of the pictures that the pipeline makes: edits are made at this size, scored at
        scenes.SIZE."""
        return self.pipe.unet.config.sample_size * latents.factor(self.pipe)


def shrink(image):
    """To the size at which everything is scored, by area averages."""
    image = image.detach().float().cpu()
    if image.shape[-1] == scenes.SIZE:
        return image
    return torch.nn.functional.interpolate(image, (scenes.SIZE, scenes.SIZE), mode="area")


def edit_case(models, c, mechanism):
    """Run one mechanism of lib.featglac on a case, with its own settings but the steps: (Edit, before,
    after).

    before: the mechanism's picture as it is; after: untouched pixels put back (occluder, and all that lies
    outside the ring around what was put in). The 2-D paste knows no depth, so nothing is put back for it."""
    from lib import depth, featglac
    s, rgbd = models.settings, mechanism in RGBD
    mechanism = RGBD.get(mechanism, mechanism)
    generator = torch.Generator("cpu").manual_seed(s.seed * 1_000_003 + c.seed)
    options = {"steps": s.steps, **s.options.get(mechanism, {}), "restore": "none"}
    shared = dict(at=f"{c.at:.6f}m", prompt=c.prompts[2], mechanism=mechanism, generator=generator,
                  inpaint_pipe=models.inpaint if mechanism == "inpaint" else None, **options)
    metric = {"near": scenes.NEAR, "far": scenes.FAR}
    behind = depth.from_metric(c.background_depth, **metric)
    if rgbd:
        shared["cutout_depth"] = depth.from_metric(c.foreground_depth, **metric)
    if c.task == "insertion":
        edit = featglac.insert_object(models.pipe, c.background, behind, c.foreground, **shared)
    else:
        front = depth.from_metric(c.a_depth, **metric)
        edit = featglac.compose(models.pipe, c.a, front, c.background, behind, **shared)
    return edit, edit.image, edit.image if mechanism == "paste2d" else featglac.restored(edit)


def scores(judge, image, c):
    """All scores of one picture against a case's truth: dict by the names in SCORES."""
    out = {f"rmse_{z}": float(metrics.rmse(image, c.truth, m)) if m.sum() >= LEAST else float("nan")
           for z, m in c.zones.items()}
    out["psnr"], out["ssim"] = float(metrics.psnr(image, c.truth)), float(metrics.ssim(image, c.truth))
    out["feat_dist"] = float(metrics.feat_dist(judge, image, c.truth))
    return out


def judged(judge, image, c):
    """(occlusion order, object present) of a picture by the judge: 1.0, 0.0 or NaN."""
    maps = metrics.judge_maps(judge, image)
    order = metrics.occlusion_order(maps, *c.order) if c.order else float("nan")
    present = float(metrics.object_present(maps["kind"], maps["colour"],
                                           *c.thing)) if c.thing else float("nan")
    return order, present


def bounds(pipe, c):
    """What perfect latents would give, with this VAE: dict of the pictures `vae` = D(E(truth)), plain
    decoding, and `vae-residual` = paste + D(E(truth)) - D(E(paste)), which keeps the paste's own
    sharpness."""
    device = pipe.vae.device
    true, pasted = (latents.decode(pipe, latents.encode(pipe, x.to(device)), clamp=False).cpu()
                    for x in (c.truth, c.paste))
    return {"vae": shrink(true.clamp(0, 1)), "vae-residual": shrink((c.paste + true - pasted).clamp(0, 1))}


def run_case(models, task, seed, edit=edit_case):
    """All mechanisms on one case. Returns (rows, pictures): a dict per mechanism, and pictures by name."""
    c, judge = case(task, seed), models.judge
    full = c if models.size == scenes.SIZE else case(task, seed, models.size)
    order_truth, present_truth = judged(judge, c.truth, c)
    shared = dict(task=task, seed=seed, order_truth=order_truth, present_truth=present_truth,
                  **{f"pixels_{z}": int(m.sum()) for z, m in c.zones.items()})
    shown = {"background": c.background, "object" if task == "insertion" else "scene A": _shown(c)}
    rows = []
    floors = bounds(models.pipe, full)
    for name, image in floors.items():
        rows.append(dict(shared, mechanism=name, **scores(judge, image, c)))
    floor = {f"floor_{z}": rows[0][f"rmse_{z}"] for z in ZONES}
    rows.append(dict(shared, mechanism="plain-cfg", **_plain(models, c)))
    more = [name for name, plain in RGBD.items() if task == "insertion" and plain in models.settings.mechanisms]
    for mechanism in (*models.settings.mechanisms, *more):
        with Peak() as peak:
            done, before, after = edit(models, full, mechanism)
        before, after = shrink(before), shrink(after)
        order, present = judged(judge, after, c)
        rows.append(dict(shared, mechanism=mechanism, **scores(judge, after, c),
                         **{f"{k}_before": v for k, v in scores(judge, before, c).items()},
                         order=order, present=present, **floor, passes=int(done.passes),
                         seconds=float(done.seconds),
                         peak_mb=peak.mb))
        shown[mechanism] = after
    shown["truth, VAE"] = floors["vae"]
    shown["truth"] = c.truth
    return rows, shown


def _shown(c):
    """The foreground as a picture: scene A, or the cut-out on mid-grey."""
    if c.a is not None:
        return c.a
    alpha = c.foreground[:, 3:]
    return c.foreground[:, :3] * alpha + 0.5 * (1 - alpha)


def _plain(models, c):
    """Cost of plain classifier-free sampling with the same number of steps, decoding included."""
    s, pipe = models.settings, models.pipe
    generator = torch.Generator("cpu").manual_seed(s.seed)
    with diffusion.count_passes(pipe.unet) as passes, Peak() as peak:
        start = time.perf_counter()
        z = diffusion.sample(pipe, c.prompts[2], steps=s.steps, guidance_scale=s.guidance_scale,
                             generator=generator)
        latents.decode(pipe, z).cpu()
        seconds = time.perf_counter() - start
    return dict(passes=passes.total, seconds=seconds, peak_mb=peak.mb)


# ------------------------------------------------------------------------------------------ the whole run

def run(settings, models=None, out=None, edit=edit_case, progress=True):
    """Run the benchmark, resuming what an interrupted run with the same settings, code and weights has
    finished.

    Writes NAME.csv (a row per scene and mechanism), NAME.json, NAME.md and NAME-<task>.png into `out`, each
    atomically, at the end. Returns the summary that the JSON holds."""
    from tqdm.auto import tqdm

    from lib import setup
    models = models or Models(settings)
    out = Path(out) if out else (setup.cache_dir() if settings.smoke else setup.data_dir()) / "benchmark"
    out.mkdir(parents=True, exist_ok=True)
    work = setup.cache_dir() / "benchmark" / fingerprint(settings, models)
    work.mkdir(parents=True, exist_ok=True)
    todo = [(task, seed) for task in settings.tasks for seed in scenes.seeds("test", settings.scenes)]
    todo.sort(key=lambda x: x[1])  # both tasks grow together, so an unfinished run is of use too
    rows, start = [], time.perf_counter()
    for task, seed in tqdm(todo, desc="benchmark", disable=not progress):
        rows += _stored(work, models, task, seed, edit)
    summary = summarise(rows, settings)
    summary["minutes"] = round((time.perf_counter() - start) / 60, 2)
    summary["machine"] = machine()
    previous = out / f"{settings.name}.json"
    if previous.is_file():  # the card's figures stay until they are measured again
        summary["gpu"] = json.loads(previous.read_text()).get("gpu")
    text = markdown(_clean(summary))  # the same figures as from the stored file
    _write(out / f"{settings.name}.csv", _csv(rows))
    _write(previous, json.dumps(_clean(summary), indent=1) + "\n")
    _write(out / f"{settings.name}.md", text)
    for task in settings.tasks:
        sheet(work, rows, settings, task, out / f"{settings.name}-{task}.png")
    if progress:
        print(text)
    return summary


def fingerprint(settings, models):
    """16 hex digits of everything that could change a row: settings, the code it runs, the weights."""
    digest = hashlib.sha256(repr(settings).encode())
    here = Path(__file__).parent
    for name in ("attention", "benchmark", "deglad", "depth", "diffusion", "featglac", "inpaint", "latents",
                 "light", "masks", "metrics", "scenes"):
        path = here / f"{name}.py"
        digest.update(path.read_bytes() if path.is_file() else b"")
    needed = [models.pipe.unet, models.pipe.vae, models.pipe.text_encoder, models.judge]
    if "inpaint" in settings.mechanisms:
        needed.append(models.inpaint.unet)
    for module in needed:
        for key, value in module.state_dict().items():  # sums, not bytes: read once, on the model's device
            digest.update(f"{key}{float(value.float().sum())}{float(value.float().abs().sum())}".encode())
    digest.update(repr(sorted(models.pipe.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()[:16]


def _stored(work, models, task, seed, edit):
    path = work / f"{task}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    rows, pictures = run_case(models, task, seed, edit)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: (v[0].clamp(0, 1) * 255).round().byte().numpy() for k,
                                   v in pictures.items()})
    if seed in scenes.seeds("test", 4 * SHEET_SCENES):
        _write(work / f"{task}-{seed}.npz", buffer.getvalue())
    _write(path, json.dumps(rows))
    return rows


def _write(path, data):
    """Write text or bytes by a temporary file and a rename: never half a file."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(data if isinstance(data, bytes) else data.encode())
    os.replace(tmp, path)


def _csv(rows):
    columns = list(dict.fromkeys(k for row in rows for k in row))
    columns.sort(key=lambda k: ("task", "seed", "mechanism").index(k) if k in ("task", "seed", "mechanism")
                 else 9)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else round(v, 6)
                         if isinstance(v, float) else v
                         for k, v in row.items()})
    return text.getvalue()


def _clean(x):
    """NaN -> null and rounded, so that the JSON is valid and its diffs are short."""
    if isinstance(x, dict):
        return {k: _clean(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_clean(v) for v in x]
    if isinstance(x, float):
        return round(x, 5) if math.isfinite(x) else None
    return x


def machine():
    """Where it ran: device name, cores, threads, versions, without any path."""
    import diffusers
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(device=card or f"CPU, {cores} cores, {torch.get_num_threads()} threads",
                torch=torch.__version__,
                diffusers=diffusers.__version__, python=platform.python_version(),
                date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()))


# ------------------------------------------------------------------------------------------ summary

def _mean(values):
    values = [v for v in values if v is not None and not math.isnan(v)]
    return statistics.fmean(values) if values else float("nan")


def summarise(rows, settings):
    """Means per task and mechanism, paired differences of the mechanisms from every baseline, cost ratios."""
    summary = dict(name=settings.name, settings=dict(vars(settings)),
                   seeds=scenes.seeds("test", settings.scenes),
                   tasks={}, cost={})
    for task in settings.tasks:
        mine = [r for r in rows if r["task"] == task]
        names = list(dict.fromkeys(r["mechanism"] for r in mine))
        by = {n: {r["seed"]: r for r in mine if r["mechanism"] == n} for n in names}
        means = {n: {k: _mean([r.get(k, float("nan")) for r in by[n].values()])
                     for k in dict.fromkeys(k for r in by[n].values() for k in r)
                     if k not in ("task", "seed", "mechanism")}
                 for n in names}
        summary["tasks"][task] = dict(scenes=len(by[names[0]]), means=means,
                                      differences=_differences(by, settings),
                                      zone_scenes={z: sum(r[f"pixels_{z}"] >= LEAST
                                                          for r in by[names[0]].values())
                                                   for z in ZONES},
                                      order_scenes=sum(not math.isnan(r["order_truth"])
                                                       for r in by[names[0]].values()))
    summary["cost"] = _cost(rows, settings)
    return summary


def _differences(by, settings):
    """{mechanism: {baseline: {zone: interval}}}: paired over scenes, negative = the mechanism is better."""
    out = {}
    for m in (m for m in (*settings.mechanisms, WITH_DEPTH) if m in (*MECHANISMS, WITH_DEPTH) and m in by):
        out[m] = {}
        like = [name for name in RGBD if name in by] if m == WITH_DEPTH else []
        for b in (*settings.mechanisms, *like):
            if b == m or b in out:  # inject - guide once, not guide - inject too
                continue
            seeds = sorted(by[m])
            out[m][b] = {k: metrics.paired_bootstrap([by[m][s][k] for s in seeds],
                                                     [by[b][s][k] for s in seeds])
                         for k in ("rmse_shadow", "rmse_shading", "feat_dist")}
    return out


def _cost(rows, settings):
    """Seconds and passes of each mechanism against plain classifier-free sampling, medians of paired
    ratios."""
    plain = {(r["task"], r["seed"]): r for r in rows if r["mechanism"] == "plain-cfg"}
    out = {"plain-cfg": dict(seconds=statistics.median(r["seconds"] for r in plain.values()),
                             passes=statistics.median(r["passes"] for r in plain.values()))}
    for m in settings.mechanisms:
        mine = [r for r in rows if r["mechanism"] == m]
        pairs = [(r, plain[r["task"], r["seed"]]) for r in mine]
        out[m] = dict(seconds=statistics.median(r["seconds"] for r in mine),
                      passes=statistics.median(r["passes"] for r in mine),
                      times_plain=statistics.median(r["seconds"] / p["seconds"] for r, p in pairs))
    return out


def _f(x, digits=3):
    return "-" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def _db(x):
    return "-" if x is None or math.isnan(x) or x <= 0 else f"{-20 * math.log10(x):.1f}"


def markdown(summary):
    """The tables as Markdown, from a summary (fresh, or read back from its JSON)."""
    summary = _revive(summary)
    s = summary["settings"]
    lines = [f"Model `{s['model']}`, {s['steps']} steps, guidance {s['guidance_scale']}, "
             f"{s['scenes']} unseen scenes a task"
             + (f"; {summary['machine']['device']}, {summary['machine']['date']} UTC"
                if summary.get("machine") else "")
             + ".", ""]
    for task, t in summary["tasks"].items():
        lines += [f"**{_TITLES[task]}** ({t['scenes']} scenes)", "", *_score_table(t, s), "",
                  *_bound_lines(t), "", "<details><summary>Paired differences and their intervals</summary>", "",
                  *_difference_table(t), "", "</details>", ""]
    lines += [_cost_line(summary["cost"], s)]
    return "\n".join(lines) + "\n"


_TITLES = {"insertion": "Object insertion behind an occluder", "compositing": "Scene compositing at a depth"}
NOTE = ("RMSE against the true picture in the truth's zones, mean over scenes (lower is better). Scores are "
        "after putting untouched pixels back; where there is an arrow, before -> after. order, present: "
        "share of scenes in which the judge sees the object behind what hides it (of those where something "
        "does), and sees it at all; its own score on true pictures is in the last row. -rgbd: the cut-out "
        "brings its own depth along, as one from an RGB-D picture does. A backward pass counts 2. outside holds "
        "light that the truth changes by less than 0.03, so no paste reaches 0 there.")


def _revive(x):
    """null -> NaN, for numbers read back from JSON."""
    if isinstance(x, dict):
        return {k: _revive(v) for k, v in x.items() if k != "gpu"}
    return float("nan") if x is None else x


def _score_table(t, s):
    """A row per mechanism. Zones that a task does not have get no column."""
    m = t["means"]
    more = [z for z in ("floor", "hole") if t["zone_scenes"][z]]
    head = ["mechanism", "shadow", "shading", *more, "outside", "PSNR", "SSIM", "feat_dist", "order",
            "present", "passes", "seconds", "MB"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in (name for name in (*s["mechanisms"], *RGBD) if name in m):
        r = m[name]
        lines.append(_row([f"**{name}**" if name in (*MECHANISMS, WITH_DEPTH) else name, _f(r["rmse_shadow"]),
                           _f(r["rmse_shading"]),
                           *(_f(r[f"rmse_{z}"]) for z in more),
                           f"{_f(r['rmse_outside_before'], 4)} -> {_f(r['rmse_outside'], 4)}",
                           f"{_f(r['psnr_before'], 1)} -> {_f(r['psnr'], 1)}", _f(r["ssim"]),
                           _f(r["feat_dist"]),
                           _f(r["order"], 2), _f(r["present"], 2), f"{r['passes']:.0f}", _f(r["seconds"], 2),
                           f"{r['peak_mb']:.0f}"]))
    true = m["vae"]
    return lines + [_row(["*true picture*", "0", "0", *("0" for _ in more), "0", "", "1", "0",
                          f"{_f(true['order_truth'], 2)} (of {t['order_scenes']})",
                          _f(true["present_truth"], 2), "", "", ""])]


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _bound_lines(t):
    """What the VAE allows: perfect latents, decoded plainly (= the VAE floor) and as a residual."""
    m = t["means"]
    lines = []
    for name, words in (("vae", "plain decoding of perfect latents (the VAE floor)"),
                        ("vae-residual", "residual decoding of perfect latents")):
        zones = ", ".join(f"{z} {_f(m[name][f'rmse_{z}'])} ({_db(m[name][f'rmse_{z}'])} dB)" for z in ZONES
                          if not math.isnan(m[name][f"rmse_{z}"]))
        lines.append(f"Bound, {words}: {zones}.  ")
    return lines


def _difference_table(t):
    lines = ["| difference (95 % interval) | shadow | shading | feat_dist |", "| --- | --- | --- | --- |"]
    for m, others in t["differences"].items():
        for b, d in others.items():
            cells = [f"{d[k]['diff']:+.3f} [{d[k]['low']:+.3f}, {d[k]['high']:+.3f}]"
                     + ("" if d[k]["excludes_zero"] else " ~")
                     for k in ("rmse_shadow", "rmse_shading", "feat_dist")]
            lines.append(f"| {m} - {b} | " + " | ".join(cells) + " |")
    return lines + ["", "Negative: the first is better. ~ the interval holds 0."]


def _cost_line(cost, s):
    plain = cost["plain-cfg"]
    line = (f"Cost: plain classifier-free sampling, {s['steps']} steps: {plain['seconds']:.2f} s, "
            f"{plain['passes']:.0f} U-Net passes.")
    for m in MECHANISMS:
        if m in cost:
            goal = " (goal: <= 2.0)" if m == "inject" else ""
            line += (f" `{m}`, inversion included: {cost[m]['times_plain']:.2f} x its time{goal}, "
                     f"{cost[m]['passes']:.0f} passes.")
    return line


def sheet(work, rows, settings, task, path):
    """The picture sheet of a task, at most 150 kB: labelled pictures of the first scenes, those with
    something in front of the object before the others."""
    from lib import show
    clear = {r["seed"]: math.isnan(r["order_truth"]) for r in rows if r["task"] == task}
    seeds = sorted((s for s in clear if (work / f"{task}-{s}.npz").is_file()), key=lambda s: (clear[s], s))
    for count in range(min(SHEET_SCENES, len(seeds)), 0, -1):
        images, labels = [], []
        for seed in seeds[:count]:
            with np.load(work / f"{task}-{seed}.npz") as stored:
                images += [torch.from_numpy(stored[name])[None].float() / 255 for name in stored.files]
                labels += stored.files
                if len(stored.files) > 7 and len(stored.files) % 2:  # two rows a scene: fill the second
                    images.append(torch.ones_like(images[-1]))
                    labels.append("")
        columns = len(images) // count
        columns = columns if columns <= 7 else columns // 2
        try:
            return show.sheet(images, labels, path, columns=columns,
                              title=f"{_TITLES[task]} (model {Path(settings.model).name})")
        except ValueError:  # larger than 150 kB
            if count == 1:
                raise


# ---------------------------------------------------------------------------------------- the README's tables

def newest(folder=None):
    """The newest stored full result (never a smoke run), by the date inside: (Path, summary)."""
    from lib import setup
    folder = Path(folder) if folder else setup.data_dir() / "benchmark"
    found = [(json.loads(p.read_text()), p) for p in sorted(folder.glob("*.json"))]
    found = [(s["machine"]["date"], p, s) for s, p in found if "tasks" in s and not s["settings"]["smoke"]]
    if not found:
        raise FileNotFoundError(f"no stored benchmark in {folder.name}/: run `python -m lib.benchmark` first")
    return max(found, key=lambda f: (f[0], str(f[1])))[1:]


def readme(path=None, folder=None):
    """Rewrite what stands between the README's markers <!-- benchmark:begin --> and <!-- benchmark:end
    -->."""
    from lib import setup
    path = Path(path) if path else setup.root() / "README.md"
    source, summary = newest(folder)
    body = f"{verdict(summary)}\n\n{NOTE}\n\n{markdown(summary)}\n{gpu_line(summary.get('gpu'))}\n"
    _between(path, "benchmark", body)
    if "<!-- ablation:begin -->" in path.read_text():
        _between(path, "ablation", ablation_table(stored_ablation()))
    if "<!-- models:begin -->" in path.read_text():
        _between(path, "models", models_table())
    return source


def models_table(folder=None):
    """Every mini model's measured figures beside their goals, from the cards, as Markdown."""
    from lib import setup
    lines = [_row(["model", "training", "measured on unseen scenes", "value", "goal"]), _row(["---"] * 5)]
    for path in sorted((Path(folder) if folder else setup.data_dir() / "models").glob("*/card.json")):
        card = json.loads(path.read_text())
        spent = f"{sum(r['seconds'] for r in card['runs'].values()) / 60:.0f} min, {card['hardware']}"
        rows = [line for line in quality_table(card.get("quality", {})).splitlines() if line.startswith("| ")][2:]
        for k, row in enumerate(rows or ["| not measured | - | - |"]):
            lines.append(f"| {path.parent.name if k == 0 else ''} | {spent if k == 0 else ''} {row}")
    return "\n".join(lines)


def verdict(summary):
    """One sentence a task: FeatGLaC's error beside the depth-aware paste's, zone by zone, and the goal (half of it)."""
    lines = []
    for task, t in summary["tasks"].items():
        for name in [m for m in (*MECHANISMS, WITH_DEPTH) if m in t["means"] and "alpha" in t["means"]]:
            said = []
            for zone in ("shadow", "shading"):
                ours, paste = (t["means"][m][f"rmse_{zone}"] for m in (name, "alpha"))
                d = t["differences"][name]["alpha"][f"rmse_{zone}"]
                change = abs(ours / paste - 1)
                word = "smaller" if ours < paste else "larger"
                sure = "" if d["excludes_zero"] else ", which may be chance"
                said.append(f"{change:.0%} {word} in the {zone} zone{sure}"
                            + (" (goal of half: reached)" if ours <= .5 * paste else ""))
            lines.append(f"* {_TITLES[task]}: `{name}`'s error is {' and '.join(said)}.{_without_model(t, name)}")
    return "Beside the depth-aware paste (the goal is half its error):\n\n" + "\n".join(lines)


def _without_model(t, name):
    """How much of that the depth map's light alone does, and whether the model's share may be chance.

    Both are given the same: beside a cut-out that brings its depth along stands `geometry-rgbd`."""
    alone = "geometry-rgbd" if name == WITH_DEPTH else "geometry"
    told = " Here the cut-out brings its own depth." if name == WITH_DEPTH else ""
    if alone not in t["means"]:
        return told
    said = []
    for zone in ("shadow", "shading"):
        error, paste = (t["means"][m][f"rmse_{zone}"] for m in (alone, "alpha"))
        sure = t["differences"][name][alone][f"rmse_{zone}"]
        better = "the model adds to that" if sure["diff"] < 0 else "the model takes from that"
        said.append(f"{1 - error / paste:.0%} ({zone}; {better if sure['excludes_zero'] else 'what the model adds may be chance'})")
    return f"{told} Without a model (`{alone}`): {', '.join(said)}."


def _between(path, name, body):
    """Replace the text between <!-- NAME:begin --> and <!-- NAME:end --> of a file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} to write the {name} tables into")
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{path.name} needs a line {begin} and below it a line {end}, around its tables")
    before, rest = text.split(begin)
    _write(path, f"{before}{begin}\n{body.strip()}\n{end}{rest.split(end)[1]}")


# ------------------------------------------------------------------------------------------ ablation

#: One choice changed at a time against the defaults of `lib.featglac.Settings` (name -> what is changed).
VARIANTS = {
    "as shipped": {},
    "start: inverted composite": {"start": "composite", "samples": 1},
    "start: inverted background": {"start": "background", "samples": 1},
    "noise level 0.3": {"noise_level": 0.3},
    "noise level 0.7": {"noise_level": 0.7},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 5": {"guidance_scale": 5.0},
    "plain guidance (empty negative prompt)": {"negative_prompt": ""},
    "no foreign K/V at all": {"strength": 0.0, "keep": 0.0},
    "foreign K/V around the object too": {"free": 0.5},
    "K/V of the object at full strength": {"strength": 1.0},
    "K alone": {"parts": "k"},
    "V alone": {"parts": "v"},
    "one sample": {"samples": 1},
    "layers noised instead of inverted": {"sources": "noised"},
    "no anchor outside the ring": {"anchor": 0.0},
    "the model alone, without geometry": {"cast": 0.0, "shade": 0.0, "faint": 1.0, "own": 1.0, "tint": 1.0},
    "no cast shadow": {"cast": 0.0, "faint": 1.0},
    "shading not turned": {"shade": 0.0, "own": 1.0},
    "geometry alone around the object": {"faint": 0.0},
    "geometry alone on the object": {"own": 0.0},
    "the model's colour kept": {"tint": 1.0},
    "the model's colour left out": {"tint": 0.0},
    "faint darkening ignored": {"quiet": 0.1},
    "residual decoding": {"decode": "residual"},
    "plain decoding": {"decode": "plain"},
}


def ablate(models, variants=None, scenes_each=12, folder=None, mechanism="inject", tasks=TASKS, progress=True):
    """Every variant of a mechanism on validation rooms (never the board's): rows, also written to ablation.csv.

    variants: {name: options of `featglac.Settings`}; the first is what the others are compared with."""
    from tqdm.auto import tqdm

    from lib import setup
    variants = variants or VARIANTS
    rows, plain = [], models.settings
    for task, seed in tqdm([(t, s) for t in tasks for s in scenes.seeds("val", scenes_each)], desc="ablation",
                           disable=not progress):
        c = case(task, seed, models.size)
        for name, options in variants.items():
            models.settings = replace(plain, options={mechanism: options})
            done, _, after = edit_case(models, c, mechanism)
            error = {f"rmse_{z}": float(metrics.rmse(shrink(after), c.truth, c.zones[z])) for z in ("shadow", "shading", "outside")
                     if c.zones[z].sum() >= LEAST} if models.size == scenes.SIZE else {}
            rows.append(dict(task=task, seed=seed, mechanism=name, **error, passes=int(done.passes), seconds=float(done.seconds)))
    models.settings = plain
    folder = Path(folder) if folder else setup.data_dir() / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "ablation.csv", _csv(rows))
    return rows


def ablation_table(rows):
    """Mean error of each variant, and the paired interval of its difference from the first, as Markdown."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in rows):
        by = {}
        for r in (r for r in rows if r["task"] == task):
            by.setdefault(r["mechanism"], {})[r["seed"]] = r
        first = next(iter(by))
        lines += [f"**{_TITLES[task]}** ({len(by[first])} validation rooms)", "",
                  _row(["variant", "shadow", "shading", "outside", "passes", f"shadow: difference from *{first}*"]),
                  _row(["---"] * 6)]
        for name, mine in by.items():
            means = [_f(_mean([float(r.get(f"rmse_{z}") or "nan") for r in mine.values()]), 4)
                     for z in ("shadow", "shading", "outside")]
            seeds = sorted(mine)
            d = None if name == first else metrics.paired_bootstrap(
                *([float(x[s].get("rmse_shadow") or "nan") for s in seeds] for x in (mine, by[first])))
            lines.append(_row([name, *means, f"{_mean([float(r['passes']) for r in mine.values()]):.0f}",
                               "" if d is None else f"{d['diff']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]"
                               + ("" if d["excludes_zero"] else " ~")]))
        lines.append("")
    return "\n".join(lines)


def stored_ablation(folder=None):
    """The rows of ablation.csv, [] when there is none."""
    from lib import setup
    path = (Path(folder) if folder else setup.data_dir() / "benchmark") / "ablation.csv"
    return list(csv.DictReader(io.StringIO(path.read_text()))) if path.is_file() else []


# ------------------------------------------------------------------------------------------ the model cards

def measure_models(n=200, names=("mini", "mini-depth", "judge", "mini-inpaint"), folder=None, steps=50,
                   **options):
    """Measure the named models on n unseen scenes and write the figures into each folder's card.json
    ("quality") and README.md. Models that are not there are said and left out. Returns {name: figures}."""
    from lib import models, setup
    folder = Path(folder) if folder else setup.data_dir() / "models"
    done = {}
    for name in names:
        if not (folder / name).is_dir():
            print(f"{name}: not there, left out")
            continue
        start = time.perf_counter()
        done[name] = _quality_of(name, folder, models, n, steps, options)
        done[name].update(minutes=round((time.perf_counter() - start) / 60, 1),
                          measured=time.strftime("%Y-%m-%d", time.gmtime()))
        write_card(folder / name, done[name])
        print(f"{name}: {json.dumps(_clean(done[name]))}", flush=True)
    return done


def _quality_of(name, folder, models, n, steps, options):
    place = str(folder / name)
    if name == "mini-depth":
        return metrics.depth_quality(models.load_depth(place), n)
    if name == "judge":
        return metrics.judge_quality(metrics.Judge.load(place), n)
    pipe, judge = models.load(place), metrics.Judge.load(folder / "judge")
    if name == "mini-inpaint":
        return metrics.inpaint_quality(pipe, judge, n,
                                       **{"steps": max(2, steps // 2), **options.get(name, {})})
    return {**{f"vae_{k}": v for k, v in metrics.vae_quality(pipe, n).items()},
            **metrics.prompts_obeyed(pipe, judge, n, steps, **options.get(name, {}))}


#: figure, words, goal, and whether more is better: what a card shows of DESIGN 4's table
GOALS = {"vae_psnr": ("VAE, PSNR over the picture (dB)", 34, True),
         "vae_psnr_objects": ("VAE, PSNR inside objects (dB)", 28, True),
         "obeyed": ("prompts obeyed", .90, True), "obeyed_seen_pairs": ("... pairs seen in training", None,
                                                                        True),
         "obeyed_unseen_pairs": ("... pairs never seen", None, True),
         "obeyed_true_renders": ("the judge's score on true renders of the same prompts", None, True),
         "kind_miou": ("kind, mean IoU", .85, True), "colour_miou": ("colour, mean IoU", None, True),
         "abs_rel": ("depth, AbsRel", .05, False), "delta1": ("depth, delta1", .97, True),
         "feat_dist_model": ("feat_dist of one sample", None, False),
         "feat_dist_telea": ("... Telea", None, False),
         "feat_dist_biharmonic": ("... biharmonic", None, False),
         "psnr_model": ("PSNR in the hole, mean of four samples (dB)", None, True),
         "psnr_telea": ("... Telea", None, True), "psnr_biharmonic": ("... biharmonic", None, True),
         "psnr_in_the_hole": ("PSNR in the hole (dB)", None, True),
         "psnr_in_the_hole_of_telea": ("... Telea", None, True),
         "psnr_in_the_hole_of_grey": ("... grey", None, True),
         "t = 100": ("squared error of the predicted noise, t = 100", None, False),
         "t = 400": ("... t = 400", None, False), "t = 800": ("... t = 800", None, False)}


def quality_table(figures):
    """A card's figures beside the goals, as Markdown."""
    lines = ["| measured on unseen scenes | value | goal |", "| --- | --- | --- |"]
    for key, (words, goal, more) in GOALS.items():
        if key not in figures:
            continue
        judge_depth = key == "abs_rel" and "kind_miou" in figures
        goal = None if judge_depth else goal
        if goal is None and key in ("feat_dist_model", "psnr_model"):
            kind = key.split("_model")[0]
            others = [figures[f"{kind}_telea"], figures[f"{kind}_biharmonic"]]
            goal = max(others) if more else min(others)
        word = "" if goal is None else f"{'>=' if more else '<='} {goal:.4g}"
        if goal is not None:
            reached = figures[key] >= goal if more else figures[key] <= goal
            word += " (reached)" if reached else " (not reached)"
        lines.append(f"| {words} | {figures[key]:.4g} | {word} |")
    size = figures.get("scenes") or figures.get("captions")
    return "\n".join(lines
                     + ["",
                        f"{size} scenes; `python -m lib.benchmark models`, {figures.get('measured', '')}."])


def write_card(folder, figures):
    """Merge figures into card.json under "quality"; put the table between the README.md's quality markers
    (added at the end when they are missing). Atomic."""
    path, text = Path(folder) / "card.json", Path(folder) / "README.md"
    card = json.loads(path.read_text()) if path.is_file() else {}
    card["quality"] = {**card.get("quality", {}), **_clean(figures)}
    _write(path, json.dumps(card, indent=2) + "\n")
    old = text.read_text() if text.is_file() else f"# {Path(folder).name}\n"
    if "<!-- quality:begin -->" not in old:
        old = old.rstrip() + "\n\n## Measured quality\n\n<!-- quality:begin -->\n<!-- quality:end -->\n"
        _write(text, old)
    _between(text, "quality", quality_table(figures))


# --------------------------------------------------------------------------------- on a GPU, at SD 1.5's size

SD15 = dict(unet=dict(sample_size=64, cross_attention_dim=768),
            vae=dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                     sample_size=512,
                     down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            text=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                      vocab_size=49408, projection_dim=768))
TINY = dict(unet=dict(sample_size=8, cross_attention_dim=32, block_out_channels=(32, 32, 64, 64),
                      layers_per_block=1,
                      norm_num_groups=8),
            vae=dict(SD15["vae"], block_out_channels=(8, 8, 16, 16), layers_per_block=1, sample_size=64,
                     norm_num_groups=4),
            text=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                      vocab_size=49408,
                      projection_dim=32))


def random_sd(config=None, device="cpu", dtype=torch.float32, seed=0):
    """A StableDiffusionPipeline of SD 1.5's shape with random weights (speed does not depend on them).
    Nothing is fetched; the tokenizer is the mini's, whose ids are valid for the larger vocabulary too."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lib import train
    config = config or SD15
    torch.manual_seed(seed)
    with torch.device(device):
        unet = UNet2DConditionModel(**config["unet"])
        vae = AutoencoderKL(**config["vae"])
        text = CLIPTextModel(CLIPTextConfig(**config["text"]))
    parts = [m.to(device, dtype).eval().requires_grad_(False) for m in (unet, vae, text)]
    pipe = StableDiffusionPipeline(unet=parts[0], vae=parts[1], text_encoder=parts[2],
                                   tokenizer=train.make_tokenizer(),
                                   scheduler=train.make_scheduler(), safety_checker=None,
                                   feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def matrix_peak(device, dtype, size=8192, seconds=2.0):
    """Measured FLOP/s of one large matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    _wait(device)
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5):
            a @ b
        _wait(device)
        n += 5
    return 2 * size ** 3 * n / (time.perf_counter() - start)


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def unet_flops(pipe):
    """Floating-point operations of one U-Net pass of one sample, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode
    size = pipe.unet.config.sample_size
    z = torch.zeros(1, 4, size, size, device=pipe.unet.device, dtype=pipe.unet.dtype)
    text = diffusion.embed(pipe, "")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        diffusion.predict(pipe, z, 1, text)
    return counter.get_total_flops()


def gpu(config=None, device=None, steps=50, repeats=3, peak_size=8192):
    """Plain sampling, inject and guide on a random pipeline of SD 1.5's size at 512x512 in half precision.

    Returns a dict with the card's name, measured matrix peak and, for each, seconds per image (median), peak
    memory (MB), U-Net passes, and the share of the peak that the U-Net passes reach. Without a CUDA card (and
    no device given) it returns {"card": None} at once: this size is not for a CPU."""
    if device is None and not torch.cuda.is_available():
        return dict(card=None, note="no GPU was at hand", date=time.strftime("%Y-%m-%d", time.gmtime()))
    from lib import depth, featglac
    device = torch.device(device or "cuda")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe = random_sd(config, device, dtype)
    side = pipe.unet.config.sample_size * latents.factor(pipe)
    peak, flops = matrix_peak(device, dtype, peak_size), unet_flops(pipe)
    generator = torch.Generator("cpu").manual_seed(0)
    image = torch.rand(1, 3, side, side, generator=generator)
    ramp = depth.from_metric(torch.linspace(1, 8, side).view(1, 1, side, 1).expand(1, 1, side,
                                                                                   side).contiguous(),
                             near=1.0, far=8.0)
    cutout = torch.zeros(1, 4, side, side)
    cutout[..., side // 4:side // 2, side // 4:side // 2] = 1

    def plain():
        with diffusion.count_passes(pipe.unet) as passes:
            latents.decode(pipe, diffusion.sample(pipe, "a red chair", steps, 7.5, generator=generator))
        return passes.total

    def edit(mechanism):
        return lambda: featglac.insert_object(pipe, image, ramp, cutout, "a red chair", at="3m",
                                              mechanism=mechanism,
                                              steps=steps, generator=generator).passes

    rows = {}
    for name, work in (("plain", plain), ("inject", edit("inject")), ("guide", edit("guide"))):
        rows[name] = _timed(work, device, repeats, flops, peak)
        print(f"{name}: {json.dumps(_clean(rows[name]))}", flush=True)
    for row in rows.values():
        row["times_plain"] = row["seconds"] / rows["plain"]["seconds"]
    return dict(card=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
                dtype=str(dtype)[6:],
                size=side, steps=steps, matrix_peak_tflops=peak / 1e12, unet_gflops=flops / 1e9, rows=rows,
                torch=torch.__version__, date=time.strftime("%Y-%m-%d", time.gmtime()))


def _timed(work, device, repeats, flops, peak):
    """Median seconds of a job after one warm-up, its passes, peak memory, and the share of the matrix
    peak."""
    work()
    _wait(device)
    seconds = []
    with Peak() as memory:
        for _ in range(repeats):
            start = time.perf_counter()
            passes = work()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    return dict(seconds=middle, passes=passes, peak_mb=memory.mb,
                share_of_peak=passes * flops / middle / peak)


def gpu_line(result):
    """The GPU's figures as Markdown; says so when none was at hand."""
    if not result or not result.get("card"):
        return ("On a GPU (SD 1.5's size, 512x512, half precision, random weights): none was at hand when "
                "this table was made; `python -m lib.benchmark gpu` measures it.")
    lines = [f"SD 1.5's size, {result['size']}x{result['size']}, {result['dtype']}, random weights, "
             f"{result['steps']} steps, on {result['card']} (matrix peak measured: "
             f"{result['matrix_peak_tflops']:.0f} TFLOP/s):", "",
             _row(["", "seconds/image", "x plain", "U-Net passes", "peak memory", "share of matrix peak"]),
             _row(["---"] * 6)]
    for name, r in result["rows"].items():
        lines.append(_row([name, f"{r['seconds']:.2f}", f"{r['times_plain']:.2f}", str(r["passes"]),
                           f"{r['peak_mb'] / 1024:.1f} GiB", f"{100 * r['share_of_peak']:.0f} %"]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ command line

def _parser():
    p = argparse.ArgumentParser(prog="python -m lib.benchmark",
                                description="Measure edits against exact truth.")
    p.add_argument("what", nargs="?", default="run", choices=("run", "readme", "models", "gpu", "ablate"))
    p.add_argument("--scenes", type=int, default=32, help="unseen scenes for each task")
    p.add_argument("--steps", type=int, default=None, help="sampling steps (default 50; smoke 4)")
    p.add_argument("--smoke", action="store_true", help="2 scenes and few steps: does it run?")
    p.add_argument("--out", default=None, help="folder for the results (default: data/benchmark)")
    p.add_argument("--mechanisms", nargs="+", default=None,
                   help="some of: " + ", ".join(BASELINES + MECHANISMS))
    p.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    p.add_argument("--seed", type=int, default=0, help="of the noise; the scenes are always the same")
    p.add_argument("--model", default="mini")
    p.add_argument("--n", type=int, default=200, help="models: scenes for each figure")
    p.add_argument("--names", nargs="+", default=None, help="models: which (default: all)")
    return p


def main(words=None):
    from lib.models import ModelUnavailable
    args = _parser().parse_args(words)
    try:
        return _main(args)
    except (ValueError, FileNotFoundError, ModelUnavailable) as error:
        raise SystemExit(f"error: {error}") from None


def _main(args):
    from lib import setup
    if args.what == "readme":
        print(f"README written from {readme().name}")
    elif args.what == "models":
        measure_models(args.n, **({"names": tuple(args.names)} if args.names else {}), steps=args.steps or 50)
    elif args.what == "ablate":
        chosen = setup.configure(args.model, args.seed, args.smoke)
        settings = Settings(model=args.model, seed=args.seed, steps=args.steps or (4 if args.smoke else 25))
        rows = ablate(Models(settings, device=chosen.device, dtype=chosen.dtype), folder=args.out, tasks=args.tasks,
                      scenes_each=1 if args.smoke else args.scenes)
        print(ablation_table(rows))
    elif args.what == "gpu":
        store_gpu(gpu(steps=args.steps or 50), args.out)
    else:
        chosen = setup.configure(args.model, args.seed, args.smoke)
        settings = Settings(model=args.model, scenes=2 if args.smoke else args.scenes, smoke=args.smoke,
                            seed=args.seed,
                            steps=args.steps or (4 if args.smoke else 50), tasks=tuple(args.tasks),
                            mechanisms=tuple(args.mechanisms or BASELINES + MECHANISMS))
        run(settings, Models(settings, device=chosen.device, dtype=chosen.dtype), args.out)
    return 0


def store_gpu(result, folder=None):
    """Write gpu.json, and the figures into the newest stored benchmark so that the README's table names the
    card."""
    from lib import setup
    folder = Path(folder) if folder else setup.data_dir() / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "gpu.json", json.dumps(_clean(result), indent=1) + "\n")
    try:
        path, summary = newest(folder)
    except FileNotFoundError:
        path = None
    if path:
        summary["gpu"] = _clean(result)
        _write(path, json.dumps(summary, indent=1) + "\n")
    print(gpu_line(result))


if __name__ == "__main__":
    raise SystemExit(main())
