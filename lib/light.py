"""Where the light of a picture comes from, and what it cannot reach: shadows from a depth map (lesson 09).

A diffusion model knows *that* a thing in a room throws a shadow; on a grid of 16 x 16 cells, or 64 x 64, it
knows only roughly *where*. A depth map in metres knows where a shadow can fall, once the direction of the
light is known. That direction is looked for in three witnesses, and the best few of a grid of directions are
kept, each with its chance:
* the picture's floor: does it get darker where its own things, seen by the depth map, would hide the light?
* neighbouring pixels of one colour: is the one that faces the light, and is not hidden from it, the brighter
  one?
* the model's edit: did it darken the surroundings of the new thing where that thing would hide the light?
`change` turns what was found into a factor: shadows on the surroundings, another shading of the thing
(Lambert's law on normals from its depth, or from its outline blown up), and a layer's own old shadows lifted.

It believes in one sun, in matt surfaces, and in an ambient light that is the middle of the Miniature's own:
knowledge of the world that it is measured in, which a photograph need not share.

Coordinates are the camera's: x to the right, y up, z into the picture; metres. A depth map shows only front
sides, so a thing is taken to have a thickness, and rays are followed through the map: screen-space shadows.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from . import deglad, depth
from .scenes import Camera

# What the light of a room may be, and how a picture tells of it. A number without a source is a choice.
AZIMUTHS = tuple(range(-180, 180, 12))   # degrees from straight ahead, positive = from the right
ELEVATIONS = (18, 27, 36, 48)            # degrees above the camera's horizon
AMBIENT = 0.28   # of the sun's light: what stands in shadow gets this much (the Miniature's middle)
USUAL = 0.43     # log of lit / shadowed floor on a screen: AMBIENT under a sun 26 degrees high
HEARSAY = 0.3    # what the model's edit weighs as a witness: it tells of the light at second hand
ALIKE = 0.05     # log colour ratio (brightness apart) within which two pixels are of one paint
LEVEL = 0.85     # cosine to the camera's up from which a surface is floor (32 degrees: the camera looks down)
THING = 0.6      # metres: how thick the picture's own things are taken to be
SKIN = 0.04      # metres: a ray starts so far off its surface, and hits what it is so far behind
SEARCH = 48      # pixels on the shorter side while directions are compared


@dataclass(frozen=True)
class Light:
    """directions (D, 3) and chances (D,), summing to 1: where the light may come from, likeliest first;
    azimuth, elevation: of the first, degrees; evidence: by how many nats it explains the witnesses better
    than no light at all (on validation rooms, nine in ten directions with more than 8 are right within 30
    degrees: tests/test_light.py)."""
    directions: torch.Tensor
    chances: torch.Tensor
    azimuth: float
    elevation: float
    evidence: float


@dataclass(frozen=True)
class Space:
    """What is known in metres about a picture and what is put into it. Maps (1, 1, H, W), all of one size.

    picture (1, 3, H, W), metres: the picture whose light counts, and its depth; receiver: depth of what the
    shadow falls on; caster, opaque: depth and opacity of what is put in; thickness: of that, metres (None: as
    wide as it is); fov: vertical field of view, degrees; centre: where the camera's axis meets the picture,
    (x, y) in parts of it. enclosed: the caster's map holds floor and walls too (see `shadows`). already (1,
    1, H, W): shadow that the layer put in brings along on its own floor, 0..1 (see `shown`), or None. shape
    (1, 3, H, W): unit normals of what is put in (None: `inflate`d from its outline); colour (1, 3, H, W):
    what it looks like in the light it came in; before: that light, where it is known.
    """
    picture: torch.Tensor
    metres: torch.Tensor
    receiver: torch.Tensor
    caster: torch.Tensor
    opaque: torch.Tensor
    fov: float = 50.0
    centre: tuple = (0.5, 0.5)
    thickness: float | None = None
    enclosed: bool = False
    already: torch.Tensor | None = None
    shape: torch.Tensor | None = None
    colour: torch.Tensor | None = None
    before: Light | None = None

    def __post_init__(self):
        size = tuple(self.metres.shape[-2:])
        for name, channels in (("picture", 3), ("metres", 1), ("receiver", 1), ("caster", 1), ("opaque", 1),
                               ("already", 1), ("shape", 3), ("colour", 3)):
            x = getattr(self, name)
            if x is not None and tuple(x.shape) != (1, channels, *size):
                raise ValueError(f"{name} must be (1, {channels}, {size[0]}, "
                                 f"{size[1]}) like metres, not {tuple(x.shape)}.")
        for name in ("metres", "receiver", "caster"):
            z = getattr(self, name)
            if not torch.isfinite(z).all() or z.min() < 0:
                raise ValueError(f"{name} must be finite metres from the camera; "
                                 "fill the holes first (depth.fill_holes).")

    def thick(self) -> float:
        """The given thickness, or 0.8 of the caster's width."""
        if self.thickness is not None:
            return self.thickness
        seen = self.opaque[0, 0] > 0.5
        at = float(self.caster[0, 0][seen].median()) if seen.any() else 0.0
        return max(0.05, 0.8 * int(seen.any(0).sum()) * at / depth.pinhole(seen.shape, self.fov)[0])


def points(metres: torch.Tensor, fov: float, centre=(0.5, 0.5)) -> torch.Tensor:
    """Metres along the camera's axis (B, 1, H, W) -> points (B, 3, H, W). fov, centre: as in `Space`."""
    f = depth.pinhole(metres.shape[-2:], fov)[0]
    p = depth.unproject(metres, Camera(height=0.0, pitch=0.0, fov=fov))
    (h, w), (x, y) = metres.shape[-2:], centre
    aside = torch.tensor([(0.5 - x) * w / f, (y - 0.5) * h / f, 0.0])
    return p + aside.to(p).view(1, 3, 1, 1) * metres


def normals(p: torch.Tensor) -> torch.Tensor:
    """Unit normals (B, 3, H, W) of points, turned towards the camera. Of the two differences at each pixel
    the smaller is taken: the other may reach across an edge."""
    p = F.pad(p, (1, 1, 1, 1), mode="replicate")
    c = p[..., 1:-1, 1:-1]
    dx = _smaller_step(p[..., 1:-1, 2:] - c, c - p[..., 1:-1, :-2])
    dy = _smaller_step(p[..., 2:, 1:-1] - c, c - p[..., :-2, 1:-1])
    n = torch.linalg.cross(dx, dy, dim=1)
    n = n / n.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return n * -(n * c).sum(1, keepdim=True).sign()


def _smaller_step(a, b):
    """Per pixel, the step with the smaller change of depth; never one of length 0 (at the border)."""
    la, lb = (x[:, 2:].abs() + 9 * (x.abs().sum(1, keepdim=True) == 0) for x in (a, b))
    return torch.where(la <= lb, a, b)


def inflate(opaque: torch.Tensor) -> torch.Tensor:
    """Unit normals (1, 3, H, W) of a thing of which only the outline (1, 1, H, W) is known: it is blown up.

    The square of its height u solves Poisson's equation, laplace u = -4 within the outline and u = 0 on it: a
    disc becomes a ball exactly, a strip a rounded bar. A flat face or an edge inside the outline is missed.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import spsolve
    inside = (opaque[0, 0] >= 0.5).cpu().numpy()
    number = np.pad(np.where(inside, np.cumsum(inside).reshape(inside.shape) - 1, -1), 1, constant_values=-1)
    me, n = number[1:-1, 1:-1], int(inside.sum())
    rows, columns = [], []
    for mate in (number[:-2, 1:-1], number[2:, 1:-1], number[1:-1, :-2], number[1:-1, 2:]):
        both = inside & (mate >= 0)
        rows.append(me[both])
        columns.append(mate[both])
    off = coo_matrix((-np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns))), (n, n))
    u = np.zeros(inside.shape)
    if n:
        four = np.full(n, 4.0)
        u[inside] = spsolve((off + coo_matrix((four, (np.arange(n),) * 2), (n, n))).tocsc(), four)
    u = _blur(torch.from_numpy(u).float()[None, None], 0.006)
    uy, ux = torch.gradient(F.pad(u, (1, 1, 1, 1), mode="replicate")[0, 0])
    shape = torch.stack([-ux[1:-1, 1:-1] / 2, uy[1:-1, 1:-1] / 2, -u[0, 0].clamp(min=0).sqrt()])[None]
    return shape / shape.norm(dim=1, keepdim=True).clamp(min=1e-6)


def shading(shape: torch.Tensor, light: Light, hidden=0.0) -> torch.Tensor:
    """Log brightness on a screen (1, 1, H, W) of a white surface with these normals (1, 3, H, W): sun and
    ambient light by Lambert's law, in gamma 2.2, mean over the directions that the light may come from.
    hidden: the part of the sun, 0..1, that something stands in the way of."""
    each = _lambert(shape, light.directions, hidden)
    return (each * light.chances.to(each)[:, None, None, None]).sum(0, True)


def _lambert(shape, to_light, hidden=0.0):
    """For each direction (D, 1, h, w); hidden: the part of the sun that something stands in the way of."""
    sun = (shape * to_light[:, :, None, None]).sum(1, keepdim=True).clamp(min=0)
    return (sun * (1 - hidden) + AMBIENT * (0.55 + 0.225 * (shape[:, 1:2] + 1))).log() / 2.2


def shaded_by(colour, shape, weight, most: int = 6, temperature: float = 2.0) -> Light:
    """The light that a thing seems to have stood in, from which of its sides are bright. colour (1, 3, H, W),
    shape its normals, weight (1, 1, H, W): where it is opaque."""
    angles, to_light = _grid()
    bright = colour.mean(1, keepdim=True).clamp(min=0.03).log()
    nats = explained(bright, -_lambert(shape, to_light), weight)
    return _likeliest(nats, angles, to_light, most, temperature)


def direction(azimuth: float, elevation: float) -> torch.Tensor:
    """Unit vector (3,) towards a light at these angles (degrees)."""
    a, e = math.radians(azimuth), math.radians(elevation)
    return torch.tensor([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])


def shadows(p, caster, alpha, to_light, fov, thickness, centre=(0.5, 0.5), steps=28, reach=3.0,
            out_again=False) -> torch.Tensor:
    """How much of the light a caster hides from points p, for several directions: (D, 1, h, w) in [0, 1].

    p (1, 3, h, w); caster, alpha (1, 1, H, W): depth in metres and opacity of what hides the light, any size;
    to_light (D, 3); thickness: metres behind its front within which the caster is solid. Each ray is followed
    for `reach` metres in `steps` growing steps; a step counts when it lies behind the caster's front and not
        too far.
    out_again: only what a ray enters *and leaves* counts: things do, the walls that enclose a room do not
    (they have windows, or the room would be dark).
    """
    h, w = caster.shape[-2:]
    f = depth.pinhole((h, w), fov)[0]
    both = torch.cat([caster, alpha], 1).expand(len(to_light), -1, -1, -1)
    out = torch.zeros(len(to_light), 1, *p.shape[-2:])
    inside = torch.zeros_like(out)
    for k in range(steps):
        s = SKIN + reach * (k / steps) ** 1.5
        q = p + s * to_light[:, :, None, None]
        z = q[:, 2].clamp(min=0.05)
        u, v = f * q[:, 0] / z / w + centre[0], centre[1] - f * q[:, 1] / z / h
        uv = torch.stack([2 * u - 1, 2 * v - 1], -1)
        met = F.grid_sample(both, uv, mode="nearest", align_corners=False)
        front, opaque = met[:, :1], met[:, 1:]
        gap = z[:, None] - front
        hit = opaque * ((gap > SKIN) & (gap < thickness) & (q[:, 2:] > 0.05))
        if not out_again:
            out = torch.maximum(out, hit)
            continue
        free = (gap < 0) & (uv.abs().amax(-1)[:, None] < 1)
        out = torch.maximum(out, inside * free)
        inside = torch.maximum(inside * ~free, hit)
    return out


def explained(change, pattern, weight):
    """How well `pattern` (D, 1, h, w) in [0, 1] explains a darkening: nats (D,).

    change, weight (1, 1, h, w): log brightness and how much a pixel counts. A line change = a - b * pattern
    is fitted; a pattern that would have to brighten explains nothing. 60 independent pixels are taken to
    speak, however many there are: neighbours say the same.
    """
    total = weight.sum().clamp(min=1e-6)
    centred = lambda x: x - (x * weight).sum((1, 2, 3), keepdim=True) / total
    c, s = centred(change), centred(pattern)
    return _nats(*((x * weight).sum((1, 2, 3)) for x in (-c * s, s * s, c * c)))


def neighbours(picture, expected, steps=(1, 2, 4)):
    """How well `expected` explains the differences between neighbouring pixels of one colour: nats (D,).

    picture (1, 3, h, w) in [0, 1]; expected (D, 1, h, w): log brightness that white surfaces would have. Two
    pixels some `steps` apart in a row or a column, whose colours are the same but for their brightness
    (`ALIKE`), are taken to be of one paint: then they differ in their light alone. Counted as in `explained`,
    but differences forget what changes slowly, so that four times as many pixels are taken to speak (tuned on
    validation rooms).
    """
    tint = picture.clamp(min=0.02).log()
    bright = tint.mean(1, keepdim=True)
    tint, both, own, all_ = tint - bright, 0.0, 0.0, 0.0
    for axis in (-1, -2):
        for step in steps:
            left = picture.shape[axis] - step
            pair = lambda x: (x.narrow(axis, step, left), x.narrow(axis, 0, left))
            (a, b), (high, low), (e, f) = pair(tint), pair(bright), pair(expected)
            same = ((a - b).abs().amax(1, keepdim=True) < ALIKE).to(tint)
            seen, due = (high - low).clamp(-1, 1) * same, (e - f) * same
            both, own = both + (seen * due).sum((1, 2, 3)), own + (due**2).sum((1, 2, 3))
            all_ = all_ + (seen**2).sum()
    return _nats(both, own, all_, independent=240)


def _nats(both, own, all_, independent=60):
    """Log likelihood ratio of a fitted factor that is not below 0, as if `independent` pixels had spoken."""
    share = both.clamp(min=0) ** 2 / (own + 0.5) / all_.clamp(min=1e-6)
    return -independent / 2 * torch.log1p(-share.clamp(0, 0.95))


def find(space: Space, change=None, weight=None, most: int = 6, temperature: float = 4.0) -> Light:
    """The directions from which the light may come, each with its chance.

    change, weight (1, 1, H, W): the third witness, log brightness that a model's edit gave and took around
    the new thing, and where to look (None: the picture alone speaks). temperature: how much the witnesses are
    doubted.
    """
    angles, to_light = _grid()
    metres = _to_side(space.metres, SEARCH)
    p = points(metres, space.fov, space.centre)
    shape = normals(p)
    own = _own(space, p, to_light, metres)
    picture = _mean_side(space.picture, SEARCH).clamp(min=0.02)
    nats = explained(picture.mean(1, keepdim=True).log(), own, (shape[:, 1:2] > LEVEL).to(metres))
    nats = nats + neighbours(picture, _lambert(shape, to_light, own))
    if change is not None:
        where = _mean_side(weight, SEARCH)
        share = _blur(where).clamp(min=0.05)
        same = torch.equal(space.receiver, space.metres)
        thrown = _thrown(space, to_light, SEARCH, own=own if same else None)
        thrown = _blur(thrown * where) / share
        nats = nats + HEARSAY * explained(_blur(_mean_side(change, SEARCH) * where) / share, thrown, where)
    return _likeliest(nats, angles, to_light, most, temperature)


def _grid():
    angles = [(a, e) for a in AZIMUTHS for e in ELEVATIONS]
    return angles, torch.stack([direction(*x) for x in angles])


def _likeliest(nats, angles, to_light, most, temperature):
    top = nats.topk(most)
    best = angles[int(top.indices[0])]
    return Light(to_light[top.indices], (top.values / temperature).softmax(0), *best, float(top.values[0]))


def cast(space: Space, light: Light, side: int = 128) -> torch.Tensor:
    """The shadow to expect (1, 1, H, W) in [0, 1]: the mean over the directions that the light may come from,
    soft by 1 % of the picture, since the sun is no point. Worked out on `side` pixels at most."""
    return _cast(space, light, side)[0]


def _cast(space, light, side=128):
    """`cast`, and the log factor (1, 1, H, W) that goes with it: what faced the sun has more to lose."""
    each = _thrown(space, light.directions, side, 40)
    shape = normals(points(_to_side(space.receiver, side), space.fov, space.centre))
    loss = _lambert(shape, light.directions, hidden=1.0) - _lambert(shape, light.directions)
    chances = light.chances.to(each)[:, None, None, None]
    mean = lambda x: _blur((x * chances).sum(0, True), 0.01)
    return tuple(F.interpolate(mean(x), space.metres.shape[-2:], mode="bilinear", align_corners=False)
                 for x in (each, each * loss))


def change(space: Space, light: Light, shadow_share=1.0, shading_share=0.6) -> torch.Tensor:
    """What the geometry does to the light (1, 1, H, W), as a log factor on the pasted picture: the thing
    turns from the light it came in to the room's, new shadows fall on what is not the thing itself, and, on a
    layer's own floor, the old ones go."""
    (shadow, loss), thing = _cast(space, light), (space.opaque >= 0.5).to(space.metres)
    out = shading_share * thing * _turned(space, light, thing)
    if not space.enclosed:
        return out + shadow_share * loss * (1 - thing)
    floor = thing * _level(space.receiver, space)
    old = torch.zeros_like(shadow) if space.already is None else space.already
    out = out + USUAL * floor * old * (1 - shadow)
    return out + shadow_share * loss * (1 - thing + floor) * (1 - floor * old)


def _turned(space, light, thing):
    """Shading in the new light over shading in the old, log."""
    shape = inflate(space.opaque) if space.shape is None else space.shape
    before = space.before
    if before is None and space.colour is None:
        return torch.zeros_like(thing)
    if before is None:
        inner = -F.max_pool2d(-thing, 5, 1, 2)
        before = shaded_by(space.colour, shape, inner if inner.sum() >= 30 else thing)
    return (shading(shape, light) - shading(shape, before)).clamp(-0.8, 0.8)


def shown(space: Space, light: Light) -> torch.Tensor:
    """The shadow that a picture shows on its own floor (1, 1, H, W) in [0, 1]: where its things throw it in
    that light, *and* the floor is darker than the lit floor around."""
    floor = _level(space.metres, space)
    thrown = cast(space, light) * floor
    dark = space.picture.mean(1, keepdim=True).clamp(min=0.02).log()
    lit = floor * (thrown < 0.15)
    around = _blur(dark * lit, 0.2) / _blur(lit, 0.2).clamp(min=1e-3)
    return thrown * _blur(((around - dark) / USUAL).clamp(0, 1), 0.01)


def _level(metres, space):
    """1 where the surface is level, like a floor."""
    return (normals(points(metres, space.fov, space.centre))[:, 1:2] > LEVEL).to(metres)


def _thrown(space, to_light, side, steps=28, own=None):
    """Shadow of the caster on surfaces that face the light and have it (D, 1, h, w)."""
    receiver = _to_side(space.receiver, side)
    p = points(receiver, space.fov, space.centre)
    facing = (normals(p) * to_light[:, :, None, None]).sum(1, keepdim=True) > 0.05
    if own is None:
        own = _own(space, p, to_light, _to_side(space.metres, side), steps)
    if space.enclosed:  # on a layer that was put in lie none of this picture's own shadows
        own = own * (1 - _to_side(space.opaque, side))
    itself = torch.equal(space.caster, space.metres)  # a picture's own shadows do not hide themselves
    lit = 1 if itself else 1 - own
    return lit * facing * shadows(p, space.caster, space.opaque, to_light, space.fov, space.thick(),
                                  space.centre, steps, out_again=space.enclosed)


def _own(space, p, to_light, metres, steps=28):
    """Shadow that the picture's own things throw on p."""
    return shadows(p, metres, torch.ones_like(metres), to_light, space.fov, THING, space.centre, steps,
                   out_again=True)


def _to_side(x, side):
    """Nearest pixels (depth must not be averaged), so that the shorter side has at most `side`."""
    return F.interpolate(x, _smaller(x, side), mode="nearest-exact")


def _mean_side(x, side):
    return F.interpolate(x, _smaller(x, side), mode="area")


def _smaller(x, side):
    scale = min(1.0, side / min(x.shape[-2:]))
    return tuple(max(1, round(n * scale)) for n in x.shape[-2:])


def _blur(x, share=0.05):
    """Gaussian blur with a sigma of `share` of the shorter side."""
    return deglad.blur(x, share * min(x.shape[-2:]))
