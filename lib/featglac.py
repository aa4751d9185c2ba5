"""FeatGLaC: feature-guided layer compositing, its baselines, and what they cost (lesson 09).

    insert_object(pipe, image, depth, cutout, prompt, at)    put an object at a depth of a picture
    compose(pipe, image_a, depth_a, image_b, depth_b, at)    A's near layer in front of B's far layer
    compose_layers(pipe, background, foreground, occluder)   what both do once the layers are there

Two mechanisms, both called FeatGLaC by somebody, both training-free:
  "inject"  keys and values of the layers, recorded while the layers are inverted, take the place of the
            generation's own in self-attention where a mask says so, at the same timestep (COURSE 4)
  "guide"   the latent is moved at each step by the gradient of a masked L1 between the generation's U-Net
            features (last three up-blocks with attention) and the layers' (Parihar et al., ICCV 2025;
            METHOD 1.2). Written from the description of the method, not from its code.

The pasted picture ("composite") has the right things in the right order, in the wrong light, without shadows.
The edit climbs from it (or from the background, or from noise) to `noise_level`, and comes down again held by
the layers' features: tightly to the background far from the object, softly around it, for a shadow to fall.
"""

import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F

from . import attention, deglad, diffusion, inpaint, latents, light
from .depth import fill_holes


@dataclass(frozen=True)
class Settings:
    """All that may be chosen; every field is an argument of `compose_layers`, `insert_object` and `compose`.

    steps, guidance_scale, negative_prompt: as in sampling. Scale 1 needs one U-Net pass per step, not two.
        Where the prompt names its light, the negative prompt is the same words in the opposite light (see
        `opposite_light`), so that guidance pulls away from the light that the cut-out may have come in.
    background_prompt: describes the background alone ("" fits any); its inversion uses it.
    noise_level: how far up the edit goes, 0..1 of the steps. Low keeps the pasted light, 1 forgets it.
    start: where the way down begins: "background" or "composite" (inverted), "noised" (composite + fresh
        noise), "mixed" (noised composite in the ring, inverted background outside), "noise" (pure; level 1).
    sources: where the layers' features come from: "inverted" or "noised" layers.
    strength, keep, free: 0..1, share of foreign K/V on the object, outside the ring (the background's), and
        in the ring (the background's; 0 = a shadow may do what it likes).
    ring: width of the ring around the object, in units of the object's larger side (at most 40 % of the
        picture's smaller side).
    layers, window, parts, mode: as in `attention.inject`; window from noise (0) to picture (1).
    call: "recorded" reuses K/V recorded once; "batched" runs [layers, generation] in one call per step.
    refine: fixed-point passes of the inversion (each costs as much as the inversion again).
    anchor: 0..1, how firmly the latent outside the ring is put back on the background's path at each step.
    weights, inner_steps, step_size, normalise, guide_window: of "guide". weights: per up-block, coarse to
        fine. With normalise an update has RMS step_size x the noise level's sigma, else it is the paper's
        plain step_size x gradient.
    hole: what a 9-channel inpainting U-Net is to paint: the whole "ring", or only "around" the object.
    decode: "residual" (composite + D(z) - D(E(composite))), "plain" (D(z)), "blend" (by size of the change),
        "relight" (composite x the smoothed ratio D(z) / D(E(composite)): see `relight`, `smooth`, `quiet`).
    cast, faint, shade, own, fov: of "relight", where the depth is in metres: shares of what the depth map
        says and of what the model says, about shadows around the object (cast, faint) and light on it (shade,
        own); see `lib.light`. cast = shade = 0, faint = own = 1 leaves it to the model alone. tint: share of
        the *colour* of the model's change on the object: light has little, and the object shall keep its hue.
        fov: the camera's vertical field of view, degrees.
    restore: "occluder" puts back what is in front of the object, "outside" all outside the ring too, "none".
    fill, soft: of `compose`: how the hole behind B's foreground is filled (`lib.inpaint.fill`), and the half
        width in pixels of the cut's soft edge (`deglad.split`).
    paste_at: progress (0 noise .. 1 picture) of the one step of "latent-paste".
    samples: edits averaged into one picture (more than 1 helps only where the start is noised).
    bank_device, bank_dtype: where recorded K/V and features are kept ("cpu", torch.float16 for large models).
    """

    steps: int = 50
    guidance_scale: float = 8.0
    negative_prompt: str | None = None
    background_prompt: str = ""
    noise_level: float = 0.5
    start: str = "noised"
    sources: str = "inverted"
    strength: float = 0.5
    keep: float = 1.0
    free: float = 0.0
    ring: float = 1.2
    layers: object = "all"
    window: tuple = (0.0, 1.0)
    parts: str = "kv"
    mode: str = "replace"
    call: str = "recorded"
    refine: int = 0
    anchor: float = 1.0
    weights: tuple = (0.0, 0.2, 8.5)
    inner_steps: int = 1
    step_size: float = 0.02
    normalise: bool = True
    guide_window: tuple = (0.0, 0.8)
    hole: str = "ring"
    decode: str = "relight"
    smooth: float = 0.03
    quiet: float = 0.0
    cast: float = 1.0
    faint: float = 0.3
    shade: float = 0.6
    own: float = 0.6
    tint: float = 0.5
    fov: float = 50.0
    restore: str = "occluder"
    fill: object = "telea"
    soft: float = 0.0
    paste_at: float = 0.8
    samples: int = 2
    bank_device: object = None
    bank_dtype: object = None


CHOICES = {
    "start": ("background", "composite", "noised", "mixed", "noise"),
    "sources": ("inverted", "noised"),
    "decode": ("residual", "plain", "blend", "relight"),
    "restore": ("occluder", "outside", "none"),
    "call": ("recorded", "batched"),
    "hole": ("ring", "around"),
    "mode": tuple(attention.MODES),
}
UNIT = ("noise_level", "strength", "keep", "free", "anchor", "paste_at",
        "cast", "faint", "shade", "own", "tint")


@dataclass
class Edit:
    """What came out. image: (1, 3, H, W); composite: the depth-aware paste it started from; layers: a dict
    with background, foreground (RGBA), occluder, object (visible alpha), ring (where the edit may act); z:
    the final latent (None for pixel baselines); passes: U-Net passes per sample, a backward counts 2;
    seconds; peak_memory: bytes on the GPU, or of the process; bank_bytes: recorded features; settings: a
    dict; light: where the light was found to come from (`light.Light`), or None."""

    image: torch.Tensor
    composite: torch.Tensor
    layers: dict
    z: torch.Tensor | None
    passes: int
    backward: int
    seconds: float
    peak_memory: int | None
    bank_bytes: int
    mechanism: str
    settings: dict
    light: object = None


@dataclass
class _Job:
    """One edit on its way: pictures, masks, text features and settings."""

    pipe: object
    background: torch.Tensor
    foreground: torch.Tensor
    occluder: torch.Tensor
    prompt: str
    set: Settings
    generator: object = None
    inpaint_pipe: object = None
    space: object = None
    light: object = None
    bank_bytes: int = 0
    cache: dict = field(default_factory=dict)

    def __post_init__(self):
        self.alpha = self.foreground[:, 3:]
        self.visible = self.alpha * (1 - self.occluder)
        self.composite = over(self.foreground[:, :3], self.visible, self.background)
        self.ring = ring(self.visible, self.set.ring)
        self.scheduler = diffusion.ddim(self.pipe, self.set.steps)

    def latent(self, name) -> torch.Tensor:
        """E of "background" or "composite", encoded once, on the model's device."""
        if "z" not in self.cache:
            both = latents.encode(self.pipe, torch.cat([self.background, self.composite]))
            self.cache["z"] = dict(zip(("background", "composite"), both.to(self.pipe.unet.dtype).split(1)))
        return self.cache["z"][name]

    def grid(self, mask, hard=False) -> torch.Tensor:
        """A pixel mask on the latent grid: the share of each cell, or (hard) 1 for every cell it touches."""
        size = self.latent("background").shape[-2:]
        pooled = F.adaptive_max_pool2d(mask, size) if hard else F.adaptive_avg_pool2d(mask, size)
        return pooled.to(self.latent("background"))

    def parts(self) -> dict:
        """The pictures and masks of the edit, as `Edit.layers` holds them."""
        return {"background": self.background, "foreground": self.foreground, "occluder": self.occluder,
                "object": self.visible, "ring": self.ring}

    def climb(self) -> int:
        """Number of steps between the picture and the edit's noise level."""
        return max(1, round(self.set.noise_level * self.set.steps))

    @property
    def extra(self):
        """What a 9-channel inpainting U-Net takes besides the latent (else None). Hole = the ring."""
        if self.pipe.unet.config.in_channels == 4:
            return None
        if "extra" not in self.cache:
            hole = (self.ring > 0).to(self.background)
            seen = self.background
            if self.set.hole == "around":  # the pasted object is known, what surrounds it is to be painted
                hole, seen = hole * (self.visible < 0.5), self.composite
            known = latents.encode(self.pipe, over(0.5, hole, seen))
            cells = F.interpolate(hole, known.shape[-2:]).to(known)  # as the inpainting pipeline makes them
            self.cache["extra"] = torch.cat([cells, known], 1)
        return self.cache["extra"]

    def predict(self, z, t, text, uncond=None) -> torch.Tensor:
        """The U-Net on a batch of latents; one text for all, or one each."""
        expand = lambda x: x if x is None or len(x) == len(z) else x.expand(len(z), -1, -1)
        return diffusion.predict(
            self.pipe, z, t, expand(text), expand(uncond), self.set.guidance_scale, self.extra
        )

    def times(self) -> list:
        """The timesteps of the way down, descending."""
        return self.scheduler.timesteps.tolist()[self.set.steps - self.climb() :]

    def noise_like(self, z) -> torch.Tensor:
        return torch.randn(z.shape, generator=self.generator, dtype=torch.float32).to(z)

    def text(self, prompt) -> torch.Tensor:
        key = ("text", prompt)
        if key not in self.cache:
            self.cache[key] = diffusion.embed(self.pipe, prompt)
        return self.cache[key]

    def uncond(self):
        return self.text(self.set.negative_prompt or "") if self.set.guidance_scale != 1.0 else None


# ---------------------------------------------------------------- pictures and masks
def over(colour, alpha, below) -> torch.Tensor:
    """Straight-alpha compositing: alpha * colour + (1 - alpha) * below."""
    return alpha * colour + (1 - alpha) * below


def object_size(mask) -> float:
    """The larger side, in pixels, of the box around a mask (1, 1, H, W)."""
    rows, columns = (mask[0, 0] >= 0.5).any(1).nonzero(), (mask[0, 0] >= 0.5).any(0).nonzero()
    return float(max(rows.max() - rows.min(), columns.max() - columns.min()) + 1)


def ring(mask, width) -> torch.Tensor:
    """Where the edit may act (1, 1, H, W): 1 on the object and around it, 0 from `width` object sizes on."""
    from scipy.ndimage import distance_transform_edt

    inside = (mask[0, 0] >= 0.5).cpu().numpy()
    distance = torch.from_numpy(distance_transform_edt(~inside)).float()[None, None].to(mask)
    radius = width * min(object_size(mask), 0.4 * min(mask.shape[-2:]))  # a near layer may span the picture
    if radius < 1:
        return torch.maximum((distance < 1).to(mask), mask)
    return ((radius - distance) / (0.4 * radius)).clamp(0, 1)


def opposite_light(prompt) -> str:
    """The prompt in the opposite light ("... light from the left" -> "... right"), or "" if it names none."""
    if "light from the " not in prompt:
        return ""
    scene, side = prompt.rsplit("light from the ", 1)
    turned = {"left": "right", "right": "left"}
    words = side.split(" ")
    return f"{scene}light from the {' '.join([turned[words[0]], *words[1:]])}" if words[0] in turned else ""


def place(cutout, size, x=0.5, y=0.9, height=0.4) -> torch.Tensor:
    """Put a cut-out RGBA (1, 4, h, w) on an empty canvas, its bottom centre at (x, y) (parts of it).

    size: (H, W) of the canvas; height: of the object's own box (its opaque part). Straight alpha in and out.
    """
    check_rgba(cutout, "cutout")
    opaque = cutout[0, 3] > 0.05
    top, bottom = opaque.any(1).nonzero()[[0, -1], 0].tolist()
    left, right = opaque.any(0).nonzero()[[0, -1], 0].tolist()
    cutout = cutout[..., top : bottom + 1, left : right + 1]
    h = max(1, round(height * size[0]))
    w = max(1, round(h * cutout.shape[-1] / cutout.shape[-2]))
    premultiplied = torch.cat(
        [cutout[:, :3] * cutout[:, 3:], cutout[:, 3:]], 1
    )  # so that no hidden colour bleeds
    small = F.interpolate(premultiplied, (h, w), mode="bilinear", antialias=True, align_corners=False)
    canvas = torch.zeros(1, 4, *size)
    top, left = round(y * size[0]) - h, round(x * size[1] - w / 2)
    rows, columns = slice(max(top, 0), min(top + h, size[0])), slice(max(left, 0), min(left + w, size[1]))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        raise ValueError(f"At x={x}, y={y} the object lies outside the picture; choose both between 0 and 1.")
    canvas[..., rows, columns] = small[
        ..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]
    alpha = canvas[:, 3:].clamp(0, 1)
    return torch.cat([(canvas[:, :3] / alpha.clamp(min=1e-4)).clamp(0, 1) * (alpha > 0), alpha], 1)


def check_rgba(x, name="foreground"):
    """(1, 4, H, W) float in [0, 1] with something opaque in it."""
    latents.check_image(x, name, channels=4)
    if x[:, 3].max() < 0.5:
        raise ValueError(f"The alpha channel of {name} is empty: nothing to insert.")
    return x


# ---------------------------------------------------------------- the entries
def compose_layers(
    pipe,
    background,
    foreground,
    occluder=None,
    prompt="",
    mechanism="inject",
    generator=None,
    inpaint_pipe=None,
    settings=None,
    space=None,
    **options,
) -> Edit:
    """Put a layer into a picture, between what is nearer than it and what is farther.

    background (1, 3, H, W) [0, 1]: the whole picture without the object. foreground (1, 4, H, W):
    straight-alpha layer of the same size. occluder (1, 1, H, W): 1 = nearer than the object (the near floor
    too). prompt: describes the finished picture. mechanism: one of `MECHANISMS`. settings: a `Settings`;
    options: single fields of it.
    inpaint_pipe: the 9-channel pipeline for mechanism "inpaint" (else `pipe` fills in by blended latents).
    space: a `light.Space`, for a shadow cast by the depth map; `insert_object` and `compose` make it where
    the depth is metric.
    Raises ValueError for wrong shapes, ranges, names, an empty layer, or an object that is wholly hidden;
    TypeError for an option that is no field of `Settings`.
    """
    if mechanism not in MECHANISMS:
        raise ValueError(f"Unknown mechanism {mechanism!r}; known: {', '.join(MECHANISMS)}.")
    own = {} if settings or mechanism in OURS else BASELINE
    chosen = _settings(settings, {**own, **options})
    if chosen.negative_prompt is None:
        chosen = replace(chosen, negative_prompt=opposite_light(prompt))
    layers = _check_layers(pipe, background, foreground, occluder)
    job = _Job(pipe, *layers, prompt, chosen, generator, inpaint_pipe, space)
    with metered(pipe, inpaint_pipe) as cost:
        image, z = MECHANISMS[mechanism](job)
        image = _restore(image, job.composite, job.parts(), job.set.restore)
    return Edit(image, job.composite, job.parts(), z, **vars(cost), bank_bytes=job.bank_bytes,
                mechanism=mechanism, settings=asdict(job.set), light=job.light)


@dataclass
class Cost:
    """passes: U-Net passes per sample, a backward counts 2; backward: how many of those; seconds;
    peak_memory: bytes on the GPU, or of the process so far (None where nobody says)."""

    passes: int = 0
    backward: int = 0
    seconds: float = 0.0
    peak_memory: int | None = None


@contextmanager
def metered(*pipes):
    """What the `with` block costs on the pipelines' U-Nets and the first one's device: a `Cost`, in the end.

    On a GPU it waits for the card before and after, and sets the card's peak-memory statistics back.
    """
    cost, device = Cost(), pipes[0].unet.device
    with ExitStack() as stack:
        unets = {id(p.unet): p.unet for p in pipes if p is not None}.values()
        counted = [stack.enter_context(diffusion.count_passes(unet)) for unet in unets]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        yield cost
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.perf_counter() - begin
    cost.passes, cost.backward = sum(c.total for c in counted), sum(c.backward for c in counted)
    cost.peak_memory = _peak_memory(device)


def and_cost(edit, cost) -> Edit:
    """The same edit, with what was spent before it began added to its cost."""
    peak = max((m for m in (edit.peak_memory, cost.peak_memory) if m is not None), default=None)
    return replace(edit, passes=edit.passes + cost.passes, backward=edit.backward + cost.backward,
                   seconds=edit.seconds + cost.seconds, peak_memory=peak)


def insert_object(pipe, image, depth, cutout, prompt, at, mechanism="inject", where=None, cutout_depth=None,
                  **options) -> Edit:
    """Object insertion at a user depth: what is nearer than `at` stays in front of the object.

    image (1, 3, H, W); depth: a `DepthMap` of the same size; at: as in `DepthMap.at` (0.5, "2.4m").
    cutout: RGBA canvas (1, 4, H, W) with the object in its place (see `place`), or None: then the object is
    made from the prompt inside the mask `where` (1, 1, H, W) by the inpainting model and edited from there.
    cutout_depth: a `DepthMap` in metres of the cut-out on its canvas, if it has one (from an RGB-D picture,
    or from a depth model): then its shape is known, which else is guessed from its outline. It is moved to
    `at`.
    """
    latents.check_image(image)
    depth = deglad.as_depth_map(depth)
    if depth.size != tuple(image.shape[-2:]):
        raise ValueError(
            f"The depth map is {depth.size[0]}x{depth.size[1]}, the picture {image.shape[-2]}x"
            f"{image.shape[-1]}: resize one of them."
        )
    if cutout_depth is not None and depth.kind != "metric":
        raise ValueError("cutout_depth needs a picture whose depth is in metres too; this map is "
                         f"{depth.kind}: use a metric source, or leave cutout_depth out.")
    occluder = ((depth.values < depth.at(at)) & (depth.valid > 0.5)).float().to(image)
    spent, asked = None, mechanism
    if cutout is None:
        cutout, spent = paint_object(pipe, image, occluder, where, prompt, options.get("inpaint_pipe"),
                                     _steps(options), options.get("generator"))
        if mechanism == "inpaint":  # it was just made; only the occluder is left to put back
            mechanism = "alpha"
    if depth.kind == "metric":
        metres = depth.near + depth.at(at) * (depth.far - depth.near)
        space = _thing_space(image, depth, float(metres), cutout, cutout_depth, _fov(options))
        options = {"space": space, **options}
        if cutout_depth is not None and mechanism in OURS and not options.get("settings"):
            options = {**RGBD, **options}
    edit = compose_layers(pipe, image, cutout, occluder, prompt, mechanism, **options)
    return edit if spent is None else replace(and_cost(edit, spent), mechanism=asked)


def _thing_space(image, depth, at, cutout, cutout_depth, fov):
    """A cut-out that stands at `at` metres: a flat one, unless its own depth is known."""
    cutout, metres = cutout.float().cpu(), _metres(depth)
    caster, shape, solid = torch.full_like(metres, at), None, cutout[:, 3:] >= 0.5
    if cutout_depth is not None:
        if cutout_depth.size != depth.size:
            raise ValueError(f"cutout_depth is {cutout_depth.size[0]}x{cutout_depth.size[1]}, the picture "
                             f"{depth.size[0]}x{depth.size[1]}: put both on the same canvas.")
        own = _metres(cutout_depth)
        shape = light.normals(light.points(own, fov))
        caster = torch.where(solid, (own + at - own[solid].median()).clamp(min=0.05), caster)
    return light.Space(image.float().cpu(), metres, metres, caster, cutout[:, 3:], fov, colour=cutout[:, :3],
                       shape=shape)


def compose(
    pipe, image_a, depth_a, image_b, depth_b, at, prompt="", mechanism="inject", fill_prompt=None, **options
) -> Edit:
    """Scene compositing at a depth: A's surfaces nearer than `at` in front of B's beyond it.

    Both pictures (1, 3, H, W) of one size, each with its `DepthMap`. at: metres are the same in both; a
    number in [0, 1] is a place on each map's own scale, so their near and far should agree. prompt describes
    the result. B's own near things are taken away and the hole filled by `fill` (Settings) before A's layer
    covers most of it; fill_prompt describes that filling, where a pipeline makes it.
    """
    for name, image in (("image_a", image_a), ("image_b", image_b)):
        latents.check_image(image, name)
    depth_a, depth_b = deglad.as_depth_map(depth_a), deglad.as_depth_map(depth_b)
    if image_a.shape != image_b.shape:
        raise ValueError(
            f"image_a is {tuple(image_a.shape)} and image_b {tuple(image_b.shape)}: resize one of them."
        )
    if mechanism in OURS and not options.get("settings"):
        options = {**COMPOSE, **options}
    chosen = _settings(options.get("settings"), {k: v for k, v in options.items() if k in NAMES})
    front = deglad.split(image_a, depth_a, at, chosen.soft)
    extra = {} if fill_prompt is None else {"prompt": fill_prompt}
    filler = chosen.fill if hasattr(chosen.fill, "unet") else None
    if filler:
        extra |= {"steps": chosen.steps, "generator": options.get("generator")}
    with metered(filler) if filler else nullcontext() as spent:
        behind = deglad.split(image_b, depth_b, at, allow_empty=True, fill=chosen.fill, **extra).background
    if depth_a.kind == depth_b.kind == "metric":
        options = {"space": _joint_space(front, image_a, depth_a, image_b, depth_b, chosen.fov), **options}
    edit = compose_layers(pipe, behind, front.foreground, None, prompt, mechanism, **options)
    return and_cost(edit, spent) if filler else edit


def _joint_space(front, image_a, depth_a, image_b, depth_b, fov):
    """A's layer throws shadows on itself and on B beside it, in B's light; those it threw before go."""
    a, b, near = _metres(depth_a), _metres(depth_b), front.foreground[:, 3:].float().cpu()
    both = torch.where(near > 0.5, a, b)
    box = dict(fov=fov, thickness=light.THING, enclosed=True)
    own = light.Space(image_a.float().cpu(), a, a, a, torch.ones_like(a), **box)
    before = light.find(own)
    return light.Space(
        image_b.float().cpu(), b, both, both, near, already=light.shown(own, before) * near,
        shape=light.normals(light.points(a, fov)), before=before, **box,
    )


def _metres(depth):
    """Metres without holes."""
    return fill_holes(depth).metres().float().cpu()


def _fov(options):
    return options.get("fov", getattr(options.get("settings"), "fov", Settings.fov))


def _steps(options):
    return options.get("steps", getattr(options.get("settings"), "steps", Settings.steps))


NAMES = {f.name for f in fields(Settings)}
OURS = ("inject", "guide", "geometry")  # the mechanisms that the defaults of `Settings` are for
#: What the latent baselines do best with; the defaults of `Settings` are those of inject and guide. The depth
#: map's light is this course's addition, not theirs.
BASELINE = {"guidance_scale": 2.0, "negative_prompt": "", "cast": 0.0, "shade": 0.0, "faint": 1.0, "own": 1.0,
            "tint": 1.0}
#: Where the shape of what is put in is known from its depth, Lambert's law is trusted more, and the model
#: less.
RGBD = {"shade": 0.8, "own": 0.4}
#: `compose` starts lower and smoother: a layer of many things is less wrong in its light than one cut-out.
COMPOSE = {"noise_level": 0.35, "guidance_scale": 6.0, "smooth": 0.08, "ring": 0.8, "shade": 0.8, "own": 0.3}


def _settings(settings, options) -> Settings:
    """Defaults, a whole `Settings`, single options; checked."""
    unknown = set(options) - NAMES
    if unknown:
        raise TypeError(f"Unknown option {sorted(unknown)[0]!r}; known: {', '.join(sorted(NAMES))}.")
    s = replace(settings or Settings(), **options)
    for name, known in CHOICES.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; not {getattr(s, name)!r}.")
    for name in UNIT:
        if not 0 <= getattr(s, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {getattr(s, name)}.")
    if s.start == "noise" and s.noise_level < 1:
        s = replace(s, noise_level=1.0)
    if s.samples < 1 or s.inner_steps < 1 or s.ring < 0:
        raise ValueError("samples and inner_steps must be at least 1, ring at least 0.")
    return s


def _check_layers(pipe, background, foreground, occluder):
    latents.check_image(background, "background")
    check_rgba(foreground, "foreground")
    occluder = torch.zeros_like(foreground[:, 3:]) if occluder is None else occluder
    latents.check_image(occluder, "occluder", channels=1)
    sizes = {tuple(x.shape[-2:]) for x in (background, foreground, occluder)}
    if len(sizes) > 1 or {len(x) for x in (background, foreground, occluder)} != {1}:
        raise ValueError(
            f"background, foreground and occluder must be one picture each, of one size; they are "
            f"{tuple(background.shape)}, {tuple(foreground.shape)}, {tuple(occluder.shape)}."
        )
    devices = {str(x.device) for x in (background, foreground, occluder)}
    if len(devices) > 1:
        raise ValueError("background, foreground and occluder must be on one device, not on "
                         f"{' and '.join(sorted(devices))}.")
    if (foreground[:, 3:] * (1 - occluder)).max() < 0.5:
        raise ValueError(
            "The object is wholly hidden by what is nearer; choose a smaller depth (nearer to the camera)."
        )
    unit = latents.factor(pipe) * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    h, w = background.shape[-2:]
    if h % unit or w % unit:
        raise ValueError(
            f"The picture is {h}x{w}; this pipeline needs multiples of {unit}: resize or crop it first."
        )
    return background, foreground, occluder


def paint_object(pipe, image, occluder, where, prompt, inpaint_pipe=None, steps=Settings.steps,
                 generator=None):
    """Paint an object from words: (RGBA layer (1, 4, H, W), its `Cost`).

    image (1, 3, H, W); occluder, where (1, 1, H, W): what hides it, and the place for it, which becomes its
    alpha; inpaint_pipe paints (else `pipe` fills in by blended latents). ValueError: no place, or an empty
    one.
    """
    if where is None:
        raise ValueError("Without a cut-out, give `where`: a mask (1, 1, H, W) of the place for the object.")
    latents.check_image(where, "where", channels=1)
    if where.shape[-2:] != image.shape[-2:] or where.max() < 0.5:
        raise ValueError(
            f"where must be a mask of the picture's size {tuple(image.shape[-2:])} that is not empty."
        )
    model, hole = inpaint_pipe or pipe, (where * (1 - occluder) > 0.5).float()
    if not hole.any():
        raise ValueError("The place for the object is wholly hidden "
                         "by what is nearer; choose a smaller depth.")
    with metered(model) as cost:
        filled = inpaint.with_model(model, image, hole, prompt, steps, generator=generator)
    return torch.cat([filled, where], 1), cost


def _peak_memory(device):
    """Bytes: the GPU's peak since the edit began; on the CPU the process's peak (not on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- from latents to the picture
def _decode(job, z) -> torch.Tensor:
    """The edited latent as a picture, by the chosen kind of decoding (DESIGN 7)."""
    target = job.composite
    if job.set.decode == "plain":
        return latents.decode(job.pipe, z).to(target).mean(0, keepdim=True)
    both = latents.decode(job.pipe, torch.cat([z, job.latent("composite")]), clamp=False).to(target)
    after, before = both[:-1].mean(0, keepdim=True), both[-1:]
    residual = (target + after - before).clamp(0, 1)
    if job.set.decode == "residual":
        return residual
    if job.set.decode == "relight":
        asked = job.space and job.set.cast + job.set.shade > 0
        geometry = _geometry(job, after, before).to(target) if asked else None
        shares = (1.0, 1.0) if geometry is None else (job.set.faint, job.set.own)
        return relight(target, after, before, job.visible, job.set.smooth, job.set.quiet, geometry, *shares,
                       job.set.tint)
    change = F.avg_pool2d((after - before).abs().mean(1, keepdim=True), 9, 1, 4, count_include_pad=False)
    weight = ((change - 0.04) / 0.12).clamp(0, 1)  # below 4 % change residual, above 16 % plain decoding
    return over(after.clamp(0, 1), weight, residual)


def _log_ratio(after, before):
    return ((after.clamp(min=0) + 0.05) / (before.clamp(min=0) + 0.05)).log()


def _geometry(job, after, before):
    """What the depth map does to the light that the picture and the model's edit speak of (log factor)."""
    around = _without_rim(1 - (job.visible >= 0.5).float()) * (job.ring > 0)
    change = _log_ratio(after, before).clamp(-2, 2).mean(1, keepdim=True)
    job.light = light.find(job.space, change.float().cpu(), around.float().cpu())
    return light.change(job.space, job.light, job.set.cast, job.set.shade)


def relight(picture, after, before, mask, smooth=0.02, quiet=0.0, geometry=None, faint=1.0, own=1.0,
            tint=1.0) -> torch.Tensor:
    """picture x after / before, the ratio smoothed inside and outside the mask apart: only the light changes.

    Light multiplies, and a shadow on a chequered floor leaves the chequers: a ratio keeps the picture's own
    detail, where a difference of two blurred decodings cannot. Inside the mask the ratio follows the edges of
    the picture (`guided`): light changes where a face of the object ends. Outside it only darkens, by one
    factor for all three channels: a thing that is put into a room takes light from its surroundings, (mirrors
    apart) gives none, and a shadow has hardly a colour of its own.
    smooth: sigma of the blur, as a part of the smaller side. quiet: how much darker (log ratio) around the
    object counts as nothing: a small model's doubts are many and faint, a shadow is one and plain. geometry
    (1, 1, H, W): a log factor on top (`light.change`); faint, own: shares of the model's own change outside
    and inside the mask; tint: of that inside, how much of its colour stays.
    """
    ratio = _log_ratio(after, before)
    inside = (mask >= 0.5).to(picture)
    grey = ratio.mean(1, keepdim=True).clamp(-2, 2)
    around = faint * (_blur_under(grey, _without_rim(1 - inside), smooth) + quiet).clamp(max=0)
    ratio = ratio.clamp(-0.8, 0.8)
    ratio = over(ratio, tint, ratio.mean(1, keepdim=True))
    inner = own * guided(ratio, picture, _without_rim(inside))
    change = over(inner, inside, around) + (0.0 if geometry is None else geometry)
    return (picture * change.exp()).clamp(0, 1)


def guided(change, picture, mask, smooth=0.05, least=0.003) -> torch.Tensor:
    """Smooth `change` under a mask along the edges of a picture (guided filter, He et al. 2010).

    Around each pixel the change is taken to be linear in the picture's log brightness: blurred cells of a
    small latent grid get the sharp faces of the thing back. least: variance of log brightness that counts as
    an edge.
    """
    brightness = (picture.mean(1, keepdim=True) + 0.05).log()
    blur = lambda x: _blur_under(x, mask, smooth)
    mean, mean_change = blur(brightness), blur(change)
    slope = (blur(brightness * change) - mean * mean_change) / (blur(brightness**2) - mean**2 + least)
    return blur(slope) * brightness + blur(mean_change - slope * mean)


def _without_rim(mask):
    """A mask whose outer two pixels hardly count: there the decoder mixes both sides."""
    return 0.95 * (1 - F.max_pool2d(1 - mask, 5, 1, 2)) + 0.05 * mask


def mean_under(x, mask, kernel) -> torch.Tensor:
    """Weighted mean of x (B, C, H, W) over pixels under a mask (B, 1, H, W) alone: normalised convolution.

    kernel: an odd number of weights, the same down and across. Where no pixel of the mask is in reach, about
    0.
    """
    both, reach = torch.cat([x * mask, mask], 1), len(kernel) // 2
    channels = both.shape[1]
    for shape, pad in (((1, 1, -1, 1), (reach, 0)), ((1, 1, 1, -1), (0, reach))):
        weights = kernel.to(both).view(shape).expand(channels, -1, -1, -1)
        both = F.conv2d(both, weights, padding=pad, groups=channels)
    return both[:, :-1] / both[:, -1:].clamp(min=1e-6)


def _blur_under(x, mask, smooth):
    """Gaussian `mean_under` with a sigma of `smooth` of the smaller side."""
    sigma = smooth * min(x.shape[-2:])
    if sigma < 0.3:
        return x
    reach = int(3 * sigma) + 1
    return mean_under(x, mask, torch.exp(-0.5 * (torch.arange(-reach, reach + 1).to(x) / sigma) ** 2))


def _restore(image, composite, layers, how) -> torch.Tensor:
    """Put back, bit for bit, occluder pixels over the object; with "outside" also what the ring excludes.

    layers: as in `Edit`. Not the whole occluder: near *floor* is nearer than d too, and the shadow falls on
    it."""
    if how == "none":
        return image
    in_front = layers["occluder"] * (F.max_pool2d(layers["foreground"][:, 3:], 3, 1, 1) > 0).to(image)
    image = over(composite, in_front, image)
    return over(image, layers["ring"], layers["background"]) if how == "outside" else image


def restored(edit, restore="outside") -> torch.Tensor:
    """The picture of an edit made with restore="none", with pixels put back as `restore` says."""
    if restore not in CHOICES["restore"]:
        raise ValueError(f"restore must be one of {', '.join(CHOICES['restore'])}; not {restore!r}.")
    return _restore(edit.image, edit.composite, edit.layers, restore)


# ---------------------------------------------------------------- mechanisms
def _layer_paths(job, listen=nullcontext()):
    """Bring both layers up to the edit's noise level, while `listen` records: (Trajectory, what listen gave).

    Row 0 is the background, row 1 the composite. Inverted: one U-Net pass per layer and step. The off-by-one
    of DDIM inversion (see `diffusion.ddim_inverse_step`) means that what is filed under t was seen in the
    latent one level below; `refine=1` or "noised" sources see z_t itself.
    """
    z0 = torch.cat([job.latent("background"), job.latent("composite")])
    prompts = [job.set.background_prompt, job.prompt]
    if job.set.sources == "inverted":
        with listen as heard:
            path = diffusion.invert(
                job.pipe, z0, prompts, job.set.steps, upto=job.climb(), refine=job.set.refine, extra=job.extra
            )
        return path, heard
    noise, text = job.noise_like(z0[:1]), torch.cat([job.text(p) for p in prompts])
    path = diffusion.Trajectory([z0], [])
    with listen as heard, torch.no_grad():
        for t in reversed(job.times()):
            path.latents.append(diffusion.q_sample(job.scheduler, z0, t, noise.expand_as(z0)))
            path.timesteps.append(t)
            if not isinstance(listen, nullcontext):
                job.predict(path.noise, t, text)
    return path, heard


def _start(job, path) -> torch.Tensor:
    """The latent from which the way down begins."""
    kind, top, n = job.set.start, job.times()[0], job.set.samples
    background, composite = path.at(top).split(1)
    if kind in ("background", "composite"):
        return {"background": background, "composite": composite}[kind].expand(n, -1, -1, -1)
    noise = job.noise_like(background.expand(n, -1, -1, -1))
    if kind == "noise":
        return noise
    noised = diffusion.q_sample(job.scheduler, job.latent("composite"), top, noise)
    return noised if kind == "noised" else _mix_noise(noised, background, job.grid(job.ring))


def _mix_noise(a, b, w):
    """w a + (1 - w) b of two equally noisy latents, without the loss of variance at soft edges."""
    return (w * a + (1 - w) * b) / (w**2 + (1 - w) ** 2).sqrt()


def _anchored(job, z, t_to, path):
    """Outside the ring, put the latent back on the background's own path, at the level just reached."""
    if job.set.anchor == 0:
        return z
    pull = (1 - job.grid(job.ring)) * job.set.anchor
    return z + pull * (path.at(t_to)[:1] - z)


def layer_masks(job) -> torch.Tensor:
    """Weights (2, 1, H, W) of [background, composite] in K/V: tight far away, loose in the ring."""
    around = 1 - job.visible
    background = around * (job.set.keep * (1 - job.ring) + job.set.free * job.ring)
    return torch.cat([background, job.visible * job.set.strength])


def _inject(job):
    """COURSE 4: K/V of the layers, masked, at the same timestep. Passes per step: 2 + 1 (CFG: 2 + 2)."""
    s, unet = job.set, job.pipe.unet
    window = dict(layers=s.layers, window=s.window)
    batched = s.call == "batched"
    listen = (
        nullcontext()
        if batched
        else attention.record(unet, **window, device=s.bank_device, dtype=s.bank_dtype)
    )
    path, bank = _layer_paths(job, listen)
    job.bank_bytes = 0 if batched else bank.bytes
    source = 2 if batched else bank
    with (
        torch.no_grad(),
        attention.inject(unet, source, layer_masks(job), parts=s.parts, mode=s.mode, **window),
    ):
        z = _descend(job, path, batched)
    return _decode(job, z), z


def _descend(job, path, batched=False, before_step=None):
    """The way down from `noise_level` to the picture, anchored: the final latent."""
    s = job.set
    z, text, uncond = _start(job, path), job.text(job.prompt), job.uncond()
    layers = torch.cat([job.text(p) for p in (s.background_prompt, job.prompt)])
    for t in job.times():
        if before_step:
            z = before_step(z, t)
        if batched:
            texts = [layers] + [x.expand(len(z), -1, -1) for x in (uncond, text) if x is not None]
            x = torch.cat([path.at(t)] + [z] * (len(texts) - 1))
            out = job.predict(x, t, torch.cat(texts))[2:]
            out = out if uncond is None else diffusion.cfg(*out.chunk(2), s.guidance_scale)
        else:
            out = job.predict(z, t, text, uncond)
        z = diffusion.ddim_step(job.scheduler, out, t, z)
        z = _anchored(job, z, diffusion.previous(job.scheduler, t), path)
    return z


def guide_blocks(unet) -> list:
    """Names of the last three up-blocks with attention, coarse to fine (SD 1.5: up_blocks.1 to 3)."""
    found = [f"up_blocks.{i}" for i, b in enumerate(unet.up_blocks) if getattr(b, "attentions", None)]
    if not found:
        raise ValueError("This U-Net has no up-block with attention to guide by.")
    return found[-3:]


def feature_loss(now, wanted, masks, weights) -> torch.Tensor:
    """sum_l w_l sum_i mean over cells under mask i, mean over channels, of |now_l - wanted_l[i]| (METHOD 1.2)

    now, wanted: lists of (B, C, h, w) and (S, C, h, w), coarse to fine; masks (S, 1, H, W), average-pooled to
    each grid: the share of a cell that is covered weighs its error. Summed over the B pictures, which stay
    independent. Worked out in float32.
    """
    loss = 0.0
    for mine, theirs, weight in zip(now, wanted, weights):
        if weight:
            mine = mine.float()
            m = F.adaptive_avg_pool2d(masks, mine.shape[-2:]).to(mine)
            error = (mine.unsqueeze(1) - theirs.to(mine)).abs().mean(2, keepdim=True) * m  # (B, S, 1, h, w)
            loss = loss + weight * (error.sum((2, 3, 4)) / m.sum((1, 2, 3)).clamp(min=1e-6)).sum()
    return loss


def _guide(job):
    """METHOD 1.2: gradient of the masked feature loss on the latent, before each step of its window."""
    s, unet = job.set, job.pipe.unet
    names = guide_blocks(unet)
    if len(s.weights) != len(names):
        raise ValueError(
            f"weights needs {len(names)} numbers (for {', '.join(names)}), not {len(s.weights)}."
        )
    listen = attention.record_features(unet, names, device=s.bank_device, dtype=s.bank_dtype)
    path, wanted = _layer_paths(job, listen)
    job.bank_bytes, masks, text = wanted.bytes, layer_masks(job), job.text(job.prompt)
    active = attention.in_window(s.guide_window)
    # float16's smallest step is 6e-8, and weight 0.2 over SD's 64 x 64 x 640 features is a gradient of 8e-8.
    scale = 64.0 if unet.dtype == torch.float16 else 1.0

    def push(z, t):
        if not active(t):
            return z
        theirs, now = [wanted.at(t, name)["out"] for name in names], {}
        for _ in range(s.inner_steps):
            clock = attention.Clock()
            with torch.enable_grad(), attention.hooked(unet, names, now.__setitem__, clock, "guide"):
                z = z.detach().requires_grad_()
                job.predict(z, t, text)
                loss = feature_loss([now[n] for n in names], theirs, masks, s.weights)
                (grad,) = torch.autograd.grad(scale * loss, z)
            z = (z - _step(job, grad.float() / scale, t).to(z)).detach()
        return z

    trained = [p for p in unet.parameters() if p.requires_grad]
    try:
        for p in trained:  # no gradient for weights that nobody will use
            p.requires_grad_(False)
        with torch.no_grad():
            z = _descend(job, path, before_step=push)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return _decode(job, z), z


def _step(job, grad, t):
    """How far the latent moves against a gradient (B, 4, h, w): see `Settings.normalise`. In float32, because
    in float16 the square of 1e-4 is 0."""
    if not torch.isfinite(grad).all():
        raise ValueError("The guidance gradient is not finite; run the pipeline in float32.")
    if not job.set.normalise:
        return job.set.step_size * grad
    sigma = (1 - diffusion.alpha_at(job.scheduler, t)).sqrt().item()
    size = grad.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-12)
    return job.set.step_size * sigma * grad / size


# ---------------------------------------------------------------- baselines, in the same call shape
def _paste2d(job):
    """A 2-D tool's paste: the object over everything."""
    job.set = replace(job.set, restore="none")
    return over(job.foreground[:, :3], job.alpha, job.background), None


def _alpha(job):
    """Depth-aware alpha compositing: right order, wrong light, no shadow. The baseline to beat."""
    return job.composite.clone(), None


def _geometry_alone(job):
    """No model at all: the depth map's shadows and shading on the depth-aware paste, in the light that the
    picture itself speaks of (`lib.light`). What a diffusion model adds is measured against this."""
    if job.space is None:
        raise ValueError(
            'Mechanism "geometry" needs depth in metres (and compose_layers a `space`); use a metric depth '
            'map.'
        )
    job.light = light.find(job.space)
    change = light.change(job.space, job.light, job.set.cast, job.set.shade).to(job.composite)
    return (job.composite * change.exp()).clamp(0, 1), None


def _poisson(job):
    """Poisson blending (Perez et al. 2003) of the visible part of the object."""
    return poisson(job.background, job.foreground, job.occluder), None


def poisson(background, foreground, occluder) -> torch.Tensor:
    """Solve for the picture inside the visible object whose gradients are the foreground's and whose rim is
    the background's. The picture's border and the occluder set no rim: colours must not bleed in from things
    in front.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve

    below = background[0].permute(1, 2, 0).cpu().double().numpy()
    above = foreground[0, :3].permute(1, 2, 0).cpu().double().numpy()
    alpha, front = (x[0, 0].cpu().numpy() for x in (foreground[:, 3:], occluder))
    inside = (alpha >= 0.5) & (front < 0.5)
    if not inside.any():
        return over(foreground[:, :3], foreground[:, 3:] * (1 - occluder), background)
    number = np.full(inside.shape, -1)
    number[inside] = np.arange(inside.sum())
    pull = 1e-4  # a weak wish for the pasted colour: islands without a rim need one
    diagonal, right = np.full(inside.sum(), pull), pull * above[inside]
    rows, columns = [], []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        shift = lambda x: _shift(x, dy, dx)
        known = shift(np.ones(inside.shape)) > 0  # the neighbour lies inside the picture
        mate = shift(inside.astype(float)) > 0
        same = inside & mate
        rim = inside & known & ~mate & (shift(front) < 0.5)
        rows.append(number[same])
        columns.append(shift(number.astype(float))[same].astype(int))
        diagonal[number[same]] += 1
        right[number[same]] += above[same] - shift(above)[same]
        diagonal[number[rim]] += 1
        right[number[rim]] += shift(below)[rim]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    every = np.arange(len(diagonal))
    matrix = coo_matrix(
        (
            np.concatenate([-np.ones(len(rows)), diagonal]),
            (np.concatenate([rows, every]), np.concatenate([columns, every])),
        )
    ).tocsc()
    result = below.copy()
    result[inside] = np.stack([spsolve(matrix, right[:, c]) for c in range(3)], 1)
    return torch.from_numpy(result).permute(2, 0, 1)[None].to(background).clamp(0, 1)


def _shift(x, dy, dx):
    """x at the neighbour (y + dy, x + dx); 0 outside the picture."""
    out = np.zeros_like(x)
    h, w = x.shape[:2]
    out[max(-dy, 0) : h - max(dy, 0), max(-dx, 0) : w - max(dx, 0)] = x[
        max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)
    ]
    return out


def _blended_latent(job):
    """Blended latent diffusion (Avrahami et al. 2023), from the noised composite: around the object the
    background, noised to the level *just reached*, is put back after every step. (Their code noises it to the
    level before.)"""
    hole, background, noise = (
        job.grid(job.visible, hard=True),
        job.latent("background"),
        job.noise_like(job.latent("background")),
    )
    z = diffusion.q_sample(job.scheduler, job.latent("composite"), job.times()[0], noise)
    text, uncond = job.text(job.prompt), job.uncond()
    with torch.no_grad():
        for t in job.times():
            out = job.predict(z, t, text, uncond)
            z = diffusion.ddim_step(job.scheduler, out, t, z)
            t_to = diffusion.previous(job.scheduler, t)
            known = background if t_to < 0 else diffusion.q_sample(job.scheduler, background, t_to, noise)
            z = hole * z + (1 - hole) * known
    return _decode(job, z), z


def _latent_paste(job):
    """One hard paste of the object's inverted latent into the background's, at one noise level (DesignEdit;
    METHOD 1.3); the remaining steps are left to harmonise it."""
    left = min(max(1, round((1 - job.set.paste_at) * job.set.steps)), job.set.steps)
    job.set = replace(job.set, noise_level=left / job.set.steps)
    path, _ = _layer_paths(job)
    background, composite = path.at(job.times()[0]).split(1)
    z = torch.where(job.grid(job.visible) > 0.5, composite, background)
    text, uncond = job.text(job.prompt), job.uncond()
    with torch.no_grad():
        for t in job.times():
            z = diffusion.ddim_step(job.scheduler, job.predict(z, t, text, uncond), t, z)
    return _decode(job, z), z


def _inpaint(job):
    """An inpainting model paints the visible object from the prompt alone; the cut-out gives the shape."""
    hole = (job.visible > 0.02).float()
    image = inpaint.with_model(
        job.inpaint_pipe or job.pipe, job.background, hole, job.prompt, job.set.steps, job.set.guidance_scale,
        job.generator, negative_prompt=job.set.negative_prompt or "",
    )
    return image.to(job.background), None


MECHANISMS = {
    "inject": _inject,
    "guide": _guide,
    "paste2d": _paste2d,
    "alpha": _alpha,
    "geometry": _geometry_alone,
    "poisson": _poisson,
    "blended-latent": _blended_latent,
    "latent-paste": _latent_paste,
    "inpaint": _inpaint,
}
