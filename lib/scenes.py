"""The Miniature: a small ray-cast world with exact ground truth (lesson 00).

A scene is plain data (rooms, a sun, a camera, things) made from a seed; `render` turns one or many scenes
into pictures, metric depth, ids and soft alpha, on any torch device. Because the world is ours, it can answer
what a photograph cannot: the same scene without the chair, the chair alone under another sun, two rooms
joined at a depth.

Axes: x right, y up, z into the room, metres. The camera stands at (0, height, 0) and looks down by `pitch`.
Depth is the distance along the optical axis ("metric z"), not along the ray.
"""
from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import torch

SIZE = 128                       # pixels per side of the mini models' pictures
NEAR, FAR = 1.0, 8.0             # metres; our depth convention maps them to 0 and 1
KINDS = ("ball", "box", "vase", "cone", "chair", "table", "lamp", "plant", "glass")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "white")
RGB = {"red": (.78, .09, .08), "orange": (.96, .45, .05), "yellow": (.96, .82, .12), "green": (.13, .55, .15),
       "teal": (.05, .60, .60), "blue": (.10, .22, .80), "purple": (.48, .14, .66), "white": (.93, .92, .90)}
FLOORS = ("plain", "checks", "stripes", "wood", "noise")
WALLS = ("plain", "stripes", "panels", "noise")
SPLITS = {"train": range(0, 10_000_000), "val": range(10_000_000, 20_000_000),
          "test": range(20_000_000, 30_000_000)}
#: One colour of every kind, and a band of light directions, that only test scenes use.
HELD_OUT_PAIRS = frozenset((kind, COLOURS[(3 * i + 1) % len(COLOURS)]) for i, kind in enumerate(KINDS))
HELD_OUT_AZIMUTH = (72.0, 92.0)  # degrees from straight ahead, either side
SMALL = ("ball", "box", "vase", "cone", "plant", "glass")  # kinds that may stand on a table
_EPS = 1e-3


# ---------------------------------------------------------------------------------------------- plain data
@dataclass(frozen=True)
class Camera:
    """Pinhole camera: height above the floor (m), pitch down and vertical field of view (degrees)."""
    height: float = 1.5
    pitch: float = 13.0
    fov: float = 50.0


@dataclass(frozen=True)
class Sun:
    """Directional light. azimuth: degrees from straight ahead, positive = from the right; elevation above the
    horizon; radius: half angle of the sun's disc (0.3 hard ... 4 soft); strength and ambient are
    radiances."""
    azimuth: float
    elevation: float
    radius: float = 1.5
    strength: float = 2.0
    ambient: float = 0.5
    warmth: float = 0.1

    def direction(self) -> tuple[float, float, float]:
        """Unit vector from a surface towards the sun."""
        a, e = math.radians(self.azimuth), math.radians(self.elevation)
        return (math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a))


@dataclass(frozen=True)
class Room:
    """A box of a room: half width, depth of the back wall, height (m), materials and their colours (sRGB)."""
    half_width: float = 2.1
    back: float = 5.8
    height: float = 2.8
    floor: str = "wood"
    wall: str = "plain"
    floor_rgb: tuple = ((.62, .45, .30), (.50, .35, .22))
    wall_rgb: tuple = ((.80, .77, .70), (.72, .69, .62))
    window_z: float = 4.2
    salt: int = 0


@dataclass(frozen=True)
class Thing:
    """One object. (x, y, z) is the centre of its base; size scales it; turn is about the vertical, degrees;
    `on` is the index of the table it stands on; `shape` varies its proportions in [0, 1]."""
    kind: str
    colour: str
    x: float
    z: float
    y: float = 0.0
    size: float = 1.0
    turn: float = 0.0
    shape: float = 0.5
    on: int | None = None
    rgb: tuple | None = None

    @property
    def name(self) -> str:
        """Words for captions: 'red chair', 'blue glass ball'."""
        return f"{self.colour} glass ball" if self.kind == "glass" else f"{self.colour} {self.kind}"

    @property
    def footprint(self) -> float:
        """Radius of the circle it stands on, metres."""
        base = {"ball": .36, "box": .45, "vase": .30, "cone": .36, "chair": .40, "table": .72, "lamp": .30,
                "plant": .38, "glass": .36}
        return base[self.kind] * self.size


@dataclass(frozen=True)
class Scene:
    seed: int
    room: Room
    sun: Sun
    camera: Camera
    things: tuple[Thing, ...] = field(default_factory=tuple)

    def without(self, index: int) -> "Scene":
        """The same scene without thing `index` (and without what stands on it)."""
        _check_index(self, index)
        keep = [i for i, t in enumerate(self.things) if i != index and t.on != index]
        new = {old: k for k, old in enumerate(keep)}
        things = tuple(replace(self.things[i], on=new.get(self.things[i].on)) for i in keep)
        return replace(self, things=things)

    def insert(self, thing: Thing, at: float, x: float | None = None) -> "Scene":
        """Add `thing` on the floor so that its front is `at` metres deep (NEAR..back wall)."""
        if not NEAR < at < self.room.back:
            raise ValueError(f"at={at} m is outside the scene: choose a depth "
                             f"between {NEAR} and {self.room.back:.1f} m")
        z = _world_z(self.camera, at + thing.footprint, 0.0)
        placed = replace(thing, x=thing.x if x is None else x, y=0.0, z=z, on=None)
        return replace(self, things=self.things + (placed,))

    def lit_by(self, sun: Sun) -> "Scene":
        return replace(self, sun=sun)

    def depth_of(self, index: int) -> float:
        """Depth in metres of the middle of a thing's base."""
        t = self.things[index]
        return _axis_depth(self.camera, t.y, t.z)

    def front_of(self, index: int) -> float:
        """Depth in metres of the front of a thing (its footprint's near rim)."""
        return self.depth_of(index) - self.things[index].footprint * math.cos(math.radians(self.camera.pitch))

    def caption(self) -> str:
        """Words with spatial relations: 'a red chair behind a white table, light from the left'."""
        return caption(self)


@dataclass
class Render:
    """What `render` returns, all on the device asked for.

    rgb (B,3,H,W) in [0,1]; depth (B,1,H,W) metric z in metres, of the nearest surface (glass counts);
    ids (B,1,H,W) int64, -1 = room, else index into scene.things; alpha (B,N,H,W) soft coverage by the visible
    part of each thing, N = most things in a scene; kind, colour (B,1,H,W) int64, 0 = room, else 1 + index.
    """
    rgb: torch.Tensor
    depth: torch.Tensor
    ids: torch.Tensor
    alpha: torch.Tensor
    kind: torch.Tensor
    colour: torch.Tensor


def _check_index(scene: Scene, index: int) -> None:
    if not 0 <= index < len(scene.things):
        raise ValueError(f"the scene has {len(scene.things)} things, so the index must be 0 to "
                         f"{len(scene.things) - 1}, not {index}")


def _axis_depth(camera: Camera, y: float, z: float) -> float:
    p = math.radians(camera.pitch)
    return (camera.height - y) * math.sin(p) + z * math.cos(p)


def _world_z(camera: Camera, depth: float, y: float) -> float:
    p = math.radians(camera.pitch)
    return (depth - (camera.height - y) * math.sin(p)) / math.cos(p)


def to_depth01(z: torch.Tensor) -> torch.Tensor:
    """Metric z in metres -> the course's depth in [0, 1], 0 = near, 1 = far."""
    return ((z - NEAR) / (FAR - NEAR)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------- sampling
def split_of(seed: int) -> str:
    for name, span in SPLITS.items():
        if seed in span:
            return name
    raise ValueError(f"seed {seed} is in no split: use 0 to {SPLITS['test'].stop - 1}")


def seeds(split: str, n: int, start: int = 0) -> list[int]:
    """The first n seeds of a split after `start`; splits never meet."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    found = list(SPLITS[split][start:start + n]) if n >= 0 <= start else []
    if len(found) != n:
        raise ValueError(f"{split} has seeds 0 to "
                         f"{len(SPLITS[split]) - 1}: {n} from {start} on are not there")
    return found


def _tint(rng: random.Random, low: float, high: float, spread: float) -> tuple:
    v = rng.uniform(low, high)
    return tuple(min(1.0, max(0.0, v + rng.uniform(-spread, spread))) for _ in range(3))


def _second(rng: random.Random, rgb: tuple, gap: float) -> tuple:
    g = rng.choice((-1, 1)) * gap
    return tuple(min(1.0, max(0.03, c * (1 + g))) for c in rgb)


def _sample_room(rng: random.Random) -> Room:
    floor, wall = rng.choice(FLOORS), rng.choice(WALLS)
    if floor == "wood":
        v = rng.uniform(.35, .75)
        f0 = (v, v * rng.uniform(.68, .80), v * rng.uniform(.42, .60))
    else:
        f0 = _tint(rng, .30, .72, .09)
    w0 = _tint(rng, .50, .85, .10)
    return Room(half_width=rng.uniform(1.8, 2.35), back=rng.uniform(5.0, 6.4), height=rng.uniform(2.6, 3.0),
                floor=floor, wall=wall, floor_rgb=(f0, _second(rng, f0, rng.uniform(.15, .35))),
                wall_rgb=(w0, _second(rng, w0, rng.uniform(.06, .16))), window_z=rng.uniform(3.9, 4.6),
                salt=rng.randrange(1 << 20))


def _sample_sun(rng: random.Random, test: bool) -> Sun:
    low, high = HELD_OUT_AZIMUTH
    while True:
        azimuth = rng.uniform(38, 140)
        held = low < azimuth < high
        if test and rng.random() < .5 and not held:
            azimuth = rng.uniform(low, high)
        elif held and not test:
            continue
        break
    return Sun(azimuth=azimuth * rng.choice((-1, 1)), elevation=rng.uniform(20, 46),
               radius=rng.uniform(.4, 3.0), strength=rng.uniform(1.7, 2.3), ambient=rng.uniform(.46, .66),
               warmth=rng.uniform(0, .22))


def _sample_camera(rng: random.Random) -> Camera:
    return Camera(height=rng.uniform(1.35, 1.65), pitch=rng.uniform(11, 15.5), fov=rng.uniform(47, 52))


def _pick_pair(rng: random.Random, kinds: tuple, test: bool) -> tuple[str, str]:
    if test and rng.random() < .4:
        return rng.choice([p for p in sorted(HELD_OUT_PAIRS) if p[0] in kinds])
    while True:
        pair = (rng.choice(kinds), rng.choice(COLOURS))
        if pair not in HELD_OUT_PAIRS:
            return pair


_SIZES = {"ball": (1.0, 1.45), "box": (1.0, 1.4), "vase": (1.1, 1.5), "cone": (1.1, 1.6),
          "chair": (1.1, 1.35), "table": (.95, 1.15), "lamp": (1.0, 1.2), "plant": (1.1, 1.45),
          "glass": (1.0, 1.4)}


def _place(rng: random.Random, thing: Thing, placed: list[Thing], camera: Camera, room: Room) -> Thing | None:
    """A free spot on the floor, often near the line of sight of an earlier thing so that they occlude."""
    for _ in range(40):
        z = rng.uniform(2.7, min(4.7, room.back - thing.footprint - .15))
        seen = z * math.tan(math.radians(camera.fov / 2)) - .75 * thing.footprint
        reach = min(seen, room.half_width - thing.footprint)
        x = rng.uniform(-reach, reach)
        if placed and rng.random() < .65:
            other = rng.choice(placed)
            x = other.x * z / max(other.z, 1.) + rng.gauss(0, .35)
        if abs(x) > reach:
            continue
        standing = [o for o in placed if o.on is None]
        if all(math.hypot(x - o.x, z - o.z) > thing.footprint + o.footprint + .05 for o in standing):
            return replace(thing, x=x, z=z)
    return None


def _on_table(rng: random.Random, kind: str, colour: str, table: Thing, index: int) -> Thing:
    size = rng.uniform(.62, .82)
    r = .22 * table.size
    return Thing(kind, colour, x=table.x + rng.uniform(-r, r), z=table.z + rng.uniform(-.12, .12),
                 y=.74 * table.size, size=size, turn=rng.uniform(0, 360), shape=rng.random(), on=index)


def sample(seed: int, things: int | None = None, camera: Camera | None = None, wild: bool = False,
           held_out: bool = False) -> Scene:
    """The scene of a seed: always the same one. things: how many (1-4, default: by the seed).

    wild: random colours everywhere (domain randomisation for the depth model; captions then make no sense).
    held_out: pairs and lights as in the test split, whatever the seed's own (for the judge, which has to know
    them).
    """
    if things is not None and not 1 <= things <= 4:
        raise ValueError(f"a room holds 1 to 4 things, not {things}; "
                         "an empty one is replace(scene, things=())")
    test = held_out or split_of(seed) == "test"
    rng = random.Random(seed * 1_000_003 + 17)
    room, sun, cam = _sample_room(rng), _sample_sun(rng, test), _sample_camera(rng)
    cam = camera or cam
    if wild:
        room = replace(room, floor_rgb=(_tint(rng, .1, .9, .4), _tint(rng, .1, .9, .4)),
                       wall_rgb=(_tint(rng, .1, .9, .4), _tint(rng, .1, .9, .4)))
    n = things or rng.choices((1, 2, 3, 4), (.18, .40, .28, .14))[0]
    placed: list[Thing] = []
    tables: set[int] = set()
    while len(placed) < n:
        free = [i for i, t in enumerate(placed) if t.kind == "table" and i not in tables]
        if free and rng.random() < .55:
            kind, colour = _pick_pair(rng, SMALL, test)
            new = _on_table(rng, kind, colour, placed[free[0]], free[0])
            tables.add(free[0])
        else:
            kinds = tuple(k for k in KINDS if not (k == "table" and any(t.kind == "table" for t in placed)))
            kind, colour = _pick_pair(rng, kinds, test)
            low, high = _SIZES[kind]
            new = _place(rng, Thing(kind, colour, 0, 0, size=rng.uniform(low, high), turn=rng.uniform(0, 360),
                                    shape=rng.random()), placed, cam, room)
            if new is None:
                n = max(1, n - 1)
                continue
        if wild:
            new = replace(new, rgb=_tint(rng, .1, .9, .4))
        placed.append(new)
    return Scene(seed, room, sun, cam, tuple(placed))


# ---------------------------------------------------------------------------------------------- captions
def relation(scene: Scene, i: int, j: int) -> str:
    """How thing i stands to thing j: 'on', 'behind', 'in front of', 'left of' or 'right of'."""
    a, b = scene.things[i], scene.things[j]
    if a.on == j:
        return "on"
    if b.on == i:
        return "under"
    da, db = scene.depth_of(i), scene.depth_of(j)
    side, deep = a.x / da - b.x / db, da - db
    if abs(side) < .16 or abs(deep) > 4.5 * abs(side):
        return "behind" if deep > 0 else "in front of"
    return "left of" if side < 0 else "right of"


def caption(scene: Scene) -> str:
    things = scene.things
    if not things:
        text = "an empty room"
    else:
        text = f"a {things[0].name}"
        if len(things) > 1:
            text += f" {relation(scene, 0, 1)} a {things[1].name}"
        for k in range(2, len(things)):
            text += f" and a {things[k].name}"
    text = text.replace("a orange", "an orange")
    return f"{text} light from the {'right' if scene.sun.azimuth > 0 else 'left'}"


def vocabulary() -> list[str]:
    """Every word a caption can hold."""
    words = "a an and room empty light from the left right of behind in front on under glass ball".split()
    return sorted(set(words) | set(KINDS) | set(COLOURS))


# ---------------------------------------------------------------------------------------------- shapes
BOX, BALL, FRUSTUM = 0, 1, 2
# materials: how much specular light, and whether light passes
_MATTE, _SHINY, _GLASS, _GLOW = 0, 1, 2, 3


@dataclass
class _Part:
    """One primitive in its thing's frame: type, centre, half sizes (r_bottom, half height, r_top), colour."""
    type: int
    centre: tuple
    dims: tuple
    rgb: tuple
    material: int = _MATTE
    axes: tuple | None = None    # rotation of the part in the thing's frame, rows = axes


def _dark(rgb: tuple, k: float) -> tuple:
    return tuple(c * k for c in rgb)


def _parts(t: Thing) -> list[_Part]:
    rgb, s = t.rgb or RGB[t.colour], t.shape
    metal, clay = (.25, .25, .27), (.55, .33, .22)
    if t.kind == "ball":
        return [_Part(BALL, (0, .33, 0), (.33, .33, .33), rgb, _SHINY)]
    if t.kind == "glass":
        return [_Part(BALL, (0, .34, 0), (.34, .34, .34), rgb, _GLASS)]
    if t.kind == "box":
        h = .24 + .16 * s
        return [_Part(BOX, (0, h, 0), (.32, h, .30 - .06 * s), rgb)]
    if t.kind == "cone":
        return [_Part(FRUSTUM, (0, .42, 0), (.33, .42, .0), rgb)]
    if t.kind == "vase":
        return [_Part(FRUSTUM, (0, .20, 0), (.15, .20, .27), rgb, _SHINY),
                _Part(FRUSTUM, (0, .50, 0), (.27, .10, .12), rgb, _SHINY),
                _Part(FRUSTUM, (0, .66, 0), (.12, .06, .17), rgb, _SHINY)]
    if t.kind == "table":
        legs = [_Part(BOX, (x, .345, z), (.035, .345, .035), _dark(rgb, .75))
                for x in (-.52, .52) for z in (-.32, .32)]
        return [_Part(BOX, (0, .715, 0), (.60, .028, .40), rgb)] + legs
    if t.kind == "chair":
        legs = [_Part(BOX, (x, .21, z), (.03, .21, .03), _dark(rgb, .8))
                for x in (-.20, .20) for z in (-.20, .20)]
        back = [_Part(BOX, (x, .70, -.21), (.03, .26, .025), _dark(rgb, .9)) for x in (-.20, .20)]
        slats = [_Part(BOX, (0, .86, -.21), (.20, .085, .02), rgb),
                 _Part(BOX, (0, .64, -.21), (.20, .045, .02), rgb)]
        return [_Part(BOX, (0, .445, 0), (.24, .03, .24), rgb)] + legs + back + slats
    if t.kind == "lamp":
        return [_Part(FRUSTUM, (0, .025, 0), (.19, .025, .17), metal),
                _Part(FRUSTUM, (0, .50, 0), (.02, .48, .02), metal),
                _Part(FRUSTUM, (0, 1.06, 0), (.26, .17, .16), rgb, _GLOW)]
    if t.kind == "plant":
        leaves = []
        for k in range(7):
            a, tilt = 2.4 * k + 6 * s, .35 + .13 * (k % 4)
            up = (math.cos(a) * math.sin(tilt), math.cos(tilt), math.sin(a) * math.sin(tilt))
            centre = tuple(p * .34 + q for p, q in zip(up, (0, .40, 0)))
            green = _dark(rgb, .8 + .05 * (k % 5))
            leaves.append(_Part(BALL, centre, (.085, .27, .035), green, _MATTE, _frame(up)))
        return [_Part(FRUSTUM, (0, .17, 0), (.15, .17, .20), clay)] + leaves
    raise ValueError(f"unknown kind {t.kind!r}: use one of {', '.join(KINDS)}")


def _frame(up: tuple) -> tuple:
    """Rows of an orthonormal frame whose second axis is `up`."""
    u = torch.tensor(up, dtype=torch.float64)
    x = torch.linalg.cross(u, torch.tensor([.3, .2, 1.], dtype=torch.float64))
    x = x / x.norm()
    return tuple(map(tuple, torch.stack([x, u, torch.linalg.cross(x, u)]).tolist()))


def _linear(rgb) -> torch.Tensor:
    return torch.as_tensor(rgb, dtype=torch.float32).pow(2.2)


class _World:
    """Scenes as padded tensors: rooms and primitives on one device. (A, B, cut): see composite_truth."""

    def __init__(self, jobs: list[tuple[Scene, Scene | None, float]], device) -> None:
        rows = [self._rows(*job) for job in jobs]
        p = max(1, max(len(r) for r in rows))
        table = torch.zeros(len(jobs), p, 26)
        table[:, :, 22] = -1                                         # thing index of padding
        for b, r in enumerate(rows):
            if r:
                table[b, :len(r)] = torch.tensor(r)
        table = table.to(device)
        self.type, self.centre, self.dims = table[..., 0].long(), table[..., 1:4], table[..., 4:7]
        self.axes, self.rgb = table[..., 7:16].unflatten(-1, (3, 3)), table[..., 16:19]
        self.material, self.bound, self.ao = table[..., 19].long(), table[..., 20], table[..., 21]
        self.thing, self.side = table[..., 22].long(), table[..., 23]
        self.used = self.thing >= 0
        self.bound = torch.where(self.used, self.bound, torch.full_like(self.bound, -1.))
        light = [s if other is None else other for s, other, _ in jobs]
        self.cut = torch.tensor([c for *_, c in jobs], device=device)
        self.rooms = [[s.room for s, *_ in jobs], [(o or s).room for s, o, _ in jobs]]
        self.suns = [s.sun for s in light]
        self.cameras = [s.camera for s, *_ in jobs]
        self.device = device

    @staticmethod
    def _rows(scene: Scene, other: Scene | None, cut: float) -> list[list[float]]:
        rows, offset = [], 0
        for layer, side in ((scene, 1. if other else 0.), (other, -1.)):
            if layer is None:
                continue
            for i, t in enumerate(layer.things):
                for part in _parts(t):
                    rows.append(_row(t, part, i + offset, side))
            offset += len(layer.things)
        return rows


def _row(t: Thing, part: _Part, index: int, side: float) -> list[float]:
    a = math.radians(t.turn)
    turn = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]],
                        dtype=torch.float64)
    centre = turn @ torch.tensor(part.centre, dtype=torch.float64) * t.size
    centre = centre + torch.tensor([t.x, t.y, t.z]).double()
    axes = torch.tensor(part.axes, dtype=torch.float64) if part.axes else torch.eye(3, dtype=torch.float64)
    dims = [d * t.size for d in part.dims]
    if part.type == FRUSTUM:
        r = max(dims[0], dims[2])
        bound, ao = math.hypot(r, dims[1]), ((dims[0] + dims[2]) ** 2 / 4 * dims[1]) ** (1 / 3)
    elif part.type == BALL:
        bound, ao = max(dims), (dims[0] * dims[1] * dims[2]) ** (1 / 3)
    else:
        bound, ao = math.sqrt(sum(d * d for d in dims)), (dims[0] * dims[1] * dims[2]) ** (1 / 3) * 1.1
    frame = axes @ turn.T                                            # world -> part
    return [float(part.type), *centre.tolist(), *dims, *frame.flatten().tolist(), *_linear(part.rgb).tolist(),
            float(part.material), bound, ao, float(index), side, 0., 0.]


# ---------------------------------------------------------------------------------------------- intersection
def _hit_box(o, d, dims):
    inv = 1 / torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    a, b = (-dims - o) * inv, (dims - o) * inv
    near, far = torch.minimum(a, b).amax(-1), torch.maximum(a, b).amin(-1)
    return near, far, near < far


def _hit_ball(o, d, dims):
    o, d = o / dims, d / dims
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    return (-b - root) / a, (-b + root) / a, disc > 0


def _hit_frustum(o, d, dims):
    """Cone or cylinder about y with radius r0 at the bottom and r1 at the top, both ends closed."""
    r0, h, r1 = dims.unbind(-1)
    m, k = (r0 + r1) / 2, (r1 - r0) / (2 * h)
    ox, oy, oz = o.unbind(-1)
    dx, dy, dz = d.unbind(-1)
    ro, rd = m + k * oy, k * dy
    a, b, c = dx * dx + dz * dz - rd * rd, ox * dx + oz * dz - ro * rd, ox * ox + oz * oz - ro * ro
    disc = b * b - a * c
    root = disc.clamp(min=0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    near, far = torch.full_like(ox, 1e9), torch.full_like(ox, -1e9)
    for t in ((-b - root) / a, (-b + root) / a):
        y = oy + t * dy
        ok = (disc > 0) & (y.abs() <= h) & (m + k * y >= 0)
        near, far = torch.where(ok & (t < near), t, near), torch.where(ok & (t > far), t, far)
    dy = torch.where(dy.abs() < 1e-9, torch.full_like(dy, 1e-9), dy)
    for end, r in ((-h, r0), (h, r1)):
        t = (end - oy) / dy
        ok = (ox + t * dx) ** 2 + (oz + t * dz) ** 2 <= r * r
        near, far = torch.where(ok & (t < near), t, near), torch.where(ok & (t > far), t, far)
    return near, far, near < far


_HITS = {BOX: _hit_box, BALL: _hit_ball, FRUSTUM: _hit_frustum}


def _one_more(x, *columns):
    return torch.cat([x, *columns], -1)


def _pairs(world: _World, o, d, allowed, asked=None):
    """Indices (scene, ray, primitive) whose ray's line meets the primitive's bounding sphere.  o, d: (B,R,3);
    allowed (B,P); asked (B,R) bool: rays that count. Two matrix products: |o-c|^2 - r^2 and ((c-o).d)^2."""
    c, ones = world.centre, torch.ones_like(world.centre[..., :1])
    along = _one_more(d, -(o * d).sum(-1, keepdim=True)) @ _one_more(c, ones).mT
    away = (o * o).sum(-1, keepdim=True)
    if asked is not None:
        away = torch.where(asked[..., None], away, torch.full_like(away, 1e12))
    rest = (c * c).sum(-1, keepdim=True) - (world.bound ** 2)[..., None] + 1e13 * (~allowed)[..., None]
    gap = _one_more(-2 * o, away, torch.ones_like(away)) @ _one_more(c, ones, rest).mT
    return torch.nonzero(along.square_() > gap, as_tuple=True)


def _intersect(world: _World, o, d, allowed, asked=None):
    """Entry distance of every (scene, ray, primitive) pair that truly meets. Returns b, r, p, t."""
    b, r, p = _pairs(world, o, d, allowed, asked)
    oo, dd = o[b, r], d[b, r]
    axes = world.axes[b, p]
    lo = torch.einsum("nij,nj->ni", axes, oo - world.centre[b, p])
    ld = torch.einsum("nij,nj->ni", axes, dd)
    kind, dims = world.type[b, p], world.dims[b, p]
    near, far = torch.full_like(lo[:, 0], 1e9), torch.full_like(lo[:, 0], -1e9)
    for code, hit in _HITS.items():
        i = torch.nonzero(kind == code)[:, 0]
        if len(i):
            n, f, ok = hit(lo[i], ld[i], dims[i])
            near[i], far[i] = torch.where(ok, n, 1e9), torch.where(ok, f, -1e9)
    side = world.side[b, p]
    if (side != 0).any():  # a world cut at a depth: which hits stand?
        axis, eye = _optical(world)
        def stands(t):
            z = ((oo + t[:, None] * dd - eye[b]) * axis[b]).sum(-1)
            return (t > _EPS) & (far > near) & ((side == 0) | (side * (world.cut[b] - z) > 0))
        t = torch.where(stands(near), near, torch.where(stands(far), far, 1e9))
    else:
        t = torch.where(near > _EPS, near, torch.where((far > _EPS) & (far > near), far, 1e9))
    keep = torch.nonzero(t < 1e8)[:, 0]
    return b[keep], r[keep], p[keep], t[keep]


def _nearest(world: _World, o, d, allowed):
    """Distance to the nearest primitive (1e9 = none) and its index (-1)."""
    shape = o.shape[:2]
    b, r, p, t = _intersect(world, o, d, allowed)
    flat = b * shape[1] + r
    best = torch.full((shape[0] * shape[1],), 1e9, device=o.device)
    best = best.scatter_reduce(0, flat, t, "amin")
    index = torch.full_like(best, -1, dtype=torch.long)
    win = t <= best[flat]
    index[flat[win]] = p[win]
    return best.view(shape), index.view(shape)


def _optical(world: _World):
    p = torch.tensor([math.radians(c.pitch) for c in world.cameras], device=world.device)
    axis = torch.stack([torch.zeros_like(p), -p.sin(), p.cos()], -1)
    eye = torch.tensor([[0., c.height, 0.] for c in world.cameras], device=world.device)
    return axis, eye


def _rays(world: _World, size: tuple[int, int], samples: int):
    """Origins and unit directions (B, H*W*S, 3), samples innermost; the cosine to the optical axis."""
    h, w = size
    sub = (torch.arange(samples, device=world.device) + .5) / samples
    y = (torch.arange(h, device=world.device)[:, None] + sub).flatten()
    x = (torch.arange(w, device=world.device)[:, None] + sub).flatten()
    yy, xx = (1 - 2 * y / h).view(h, 1, samples, 1), ((2 * x / w - 1) * w / h).view(1, w, 1, samples)
    grid = torch.stack([c.expand(h, w, samples, samples) for c in (xx, yy)], -1).reshape(-1, 2)
    axis, eye = _optical(world)
    scale = torch.tensor([math.tan(math.radians(c.fov / 2)) for c in world.cameras], device=world.device)
    u = grid[None] * scale[:, None, None]
    up = torch.stack([torch.zeros_like(axis[:, 0]), axis[:, 2], -axis[:, 1]], -1)
    d = axis[:, None] + u[..., 1:] * up[:, None]
    d = torch.cat([u[..., :1], d[..., 1:]], -1)
    d = d / d.norm(dim=-1, keepdim=True)
    return eye[:, None].expand_as(d), d, (d * axis[:, None]).sum(-1)


# ---------------------------------------------------------------------------------------------- the room
def _per_scene(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


def _shell(rooms: list[Room], o, d):
    """Distance to the room's box from inside, the inward normal's axis (0 x, 1 y, 2 z) and its sign. (B,R)"""
    dev = o.device
    high = _per_scene([[r.half_width, r.height, r.back] for r in rooms], dev)[:, None]
    low = _per_scene([[-r.half_width, 0., -1e4] for r in rooms], dev)[:, None]
    inv = 1 / torch.where(d.abs() < 1e-9, torch.full_like(d, 1e-9), d)
    far = torch.maximum((low - o) * inv, (high - o) * inv)
    t, axis = far.min(-1)
    sign = -torch.gather(d, -1, axis[..., None])[..., 0].sign()
    return t, axis, sign


def _hash(i, j, salt):
    """Pseudo-random numbers in [0, 1) from integer cells, by whole numbers: the same on every device."""
    n = (i.long() * 374761393 + j.long() * 668265263 + salt * 1442695041) & 0x7FFFFFFF
    n = ((n ^ (n >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((n ^ (n >> 16)) & 0xFFFF).float() / 65536


def _value_noise(u, v, salt):
    i, j = u.floor(), v.floor()
    fu, fv = u - i, v - j
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    a, b = _hash(i, j, salt), _hash(i + 1, j, salt)
    c, d = _hash(i, j + 1, salt), _hash(i + 1, j + 1, salt)
    return (a + (b - a) * fu) * (1 - fv) + (c + (d - c) * fu) * fv


def _pattern(name: str, u, v, salt, width):
    """Mix in [0, 1] between a material's two colours at (u, v) metres; detail below a pixel fades."""
    def fade(period):
        return (1.6 - 2.2 * width / period).clamp(0, 1)
    if name == "checks":
        cell = ((u / .6).floor() + (v / .6).floor()).long() % 2
        return .5 + (cell.float() - .5) * fade(.6)
    if name == "stripes":
        return .5 + (((u / .4).floor().long() % 2).float() - .5) * fade(.4)
    if name == "wood":
        plank = (u / .24).floor()
        shift = _hash(plank, torch.zeros_like(plank), salt)
        board = (v / 1.6 + shift * 3).floor()
        tone = _hash(plank, board, salt + 1)
        gap = ((u / .24 - plank) < .07).float() * fade(.24) * .9
        return .5 + (.75 * (tone - .5) + gap).clamp(-.5, .5) * fade(.2)
    if name == "panels":
        line = (((v - .95).abs() < .05) | ((u / .9 - (u / .9).floor()) < .06) & (v < .95)).float()
        return line * fade(.12)
    if name == "noise":
        fine = _value_noise(u / .15, v / .15, salt + 7)
        return .65 * _value_noise(u / .5, v / .5, salt) + .35 * fade(.2) * fine
    return torch.zeros_like(u)


def _room_colour(room: Room, sun: Sun, p, axis, width):
    """Linear albedo (R,3) and emission (R,3) of one room's surfaces at points p (R,3)."""
    x, y, z = p.unbind(-1)
    floor = (axis == 1) & (y < .5 * room.height)
    side = axis == 0
    mixes = {True: _pattern(room.floor, x, z, room.salt, width),
             False: _pattern(room.wall, torch.where(side, z, x), y, room.salt + 3, width)}
    albedo = torch.empty_like(p)
    for is_floor, (c0, c1) in ((True, room.floor_rgb), (False, room.wall_rgb)):
        pick = floor if is_floor else ~floor
        c0, c1 = _linear(c0).to(p), _linear(c1).to(p)
        albedo[pick] = c0 + (c1 - c0) * mixes[is_floor][pick][:, None]
    albedo[(axis == 1) & ~floor] = .75                               # ceiling
    albedo[(axis != 1) & (y < .11)] = .62                            # skirting board
    glow = torch.zeros_like(p)
    lit = side & (x.sign() == (1. if sun.azimuth > 0 else -1.))  # the window is where the light comes from
    du, dv = (z - room.window_z).abs(), (y - 1.45).abs()
    frame = lit & (du < .85) & (dv < .80)
    pane = lit & (du < .78) & (dv < .73) & (du > .035) & ((y - 1.5).abs() > .03)
    albedo[frame] = .8
    glow[pane] = torch.tensor([.75, .88, 1.0], device=p.device)
    return albedo, glow


# ---------------------------------------------------------------------------------------------- light
def _visibility(world: _World, p, n, lights, facing):
    """Share of sun light (B,R,3) that reaches points p: 1 lit, 0 in full shadow, tinted behind glass."""
    b_size, r_size = p.shape[:2]
    out = torch.zeros(b_size, r_size, 3, device=p.device)
    glass = world.material == _GLASS
    for k in range(lights.shape[2]):
        d = lights[:, :, k]
        b, r, q, _ = _intersect(world, p + n * 4e-3, d, world.used, facing)  # turned away: no ray
        pass_ = torch.ones(b_size * r_size, 3, device=p.device)
        none = torch.zeros(1, 3, device=p.device)
        tint = torch.where(glass[b, q][:, None], .35 + .5 * world.rgb[b, q].sqrt(), none)
        pass_ = pass_.scatter_reduce(0, (b * r_size + r)[:, None].expand(-1, 3), tint, "amin")
        out += pass_.view(b_size, r_size, 3)
    return out / lights.shape[2]


def _sun_samples(world: _World, rays: int, samples: int, per_ray: int):
    """Directions towards points of the sun's disc, (B,R,per_ray,3): each subsample sees other points."""
    n = samples * samples * per_ray
    k = torch.arange(n, device=world.device, dtype=torch.float32)
    rad, ang = ((k + .5) / n).sqrt(), k * 2.399963  # sunflower pattern: even over the disc
    order = torch.arange(n, device=world.device).view(per_ray, -1).T      # spread the rings over subsamples
    dirs = torch.tensor([s.direction() for s in world.suns], device=world.device)
    size = torch.tensor([math.tan(math.radians(s.radius)) for s in world.suns], device=world.device)
    up = torch.tensor([0., 1., 0.], device=world.device).expand_as(dirs)
    e1 = torch.linalg.cross(dirs, up)
    e1 = e1 / e1.norm(dim=-1, keepdim=True)
    e2 = torch.linalg.cross(dirs, e1)
    off = (rad * ang.cos())[None, :, None] * e1[:, None] + (rad * ang.sin())[None, :, None] * e2[:, None]
    out = dirs[:, None] + off * size[:, None, None]
    out = (out / out.norm(dim=-1, keepdim=True))[:, order]                # (B, S, per_ray, 3)
    return out.repeat(1, rays // (samples * samples), 1, 1)


def _openness(world: _World, p, n):
    """Ambient light left by nearby primitives (B,R), each taken as a sphere: 1 - n.c r^2 / d^2."""
    c, ones = world.centre, torch.ones_like(world.centre[..., :1])
    to = _one_more(n, -(n * p).sum(-1, keepdim=True)) @ _one_more(c, ones).mT
    own, theirs = (p * p).sum(-1, keepdim=True), (c * c).sum(-1, keepdim=True)
    d2 = _one_more(-2 * p, own, torch.ones_like(own)) @ _one_more(c, ones, theirs).mT
    axis, eye = _optical(world)
    z = ((c - eye[:, None]) * axis[:, None]).sum(-1)  # what a cut has taken away shades nothing
    there = world.used & ((world.side == 0) | (world.side * (world.cut[:, None] - z) > 0))
    r2 = (torch.where(there, world.ao, torch.zeros_like(world.ao)) ** 2)[:, None]
    d = torch.maximum(d2, r2 * 1.05 + 1e-6).rsqrt_()
    return (1 - to.clamp_(min=0).mul_(r2).mul_(d).mul_(d).mul_(d)).clamp_(.25, 1).prod(-1)


def _normals(world: _World, p, index):
    """Outward unit normal (B,R,3) of primitive `index` at p; zeros where index < 0."""
    out = torch.zeros_like(p)
    b, r = torch.nonzero(index >= 0, as_tuple=True)
    q = index[b, r]
    axes, dims, kind = world.axes[b, q], world.dims[b, q], world.type[b, q]
    x = torch.einsum("nij,nj->ni", axes, p[b, r] - world.centre[b, q])
    n = x / dims.clamp(min=1e-6) ** 2                                     # ball
    u = x / dims.clamp(min=1e-6)
    face = torch.nn.functional.one_hot(u.abs().argmax(-1), 3).to(x) * u.sign()
    n = torch.where((kind == BOX)[:, None], face, n)
    r0, h, r1 = dims.unbind(-1)
    slope = (r1 - r0) / (2 * h)
    ring = x[:, [0, 2]].norm(dim=-1)
    wall = torch.stack([x[:, 0], -slope * ring, x[:, 2]], -1)
    cap = torch.stack([torch.zeros_like(h), x[:, 1].sign(), torch.zeros_like(h)], -1)
    on_cap = (h - x[:, 1].abs() < 1e-4) & (ring < (r0 + r1) / 2 + slope * x[:, 1] - 1e-4)
    n = torch.where((kind == FRUSTUM)[:, None], torch.where(on_cap[:, None], cap, wall), n)
    n = n / n.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    out[b, r] = torch.einsum("nij,ni->nj", axes, n)
    return out


def _surface(world: _World, o, d, t, index, shells, pixel):
    """Point, normal, albedo, emission and thing index of what each ray sees."""
    t_room, axis, sign, layer = shells
    room_hit = t_room < t
    t = torch.where(room_hit, t_room, t)
    index = torch.where(room_hit, torch.full_like(index, -1), index)
    p = o + t[..., None] * d
    n = _normals(world, p, index)
    n_room = torch.nn.functional.one_hot(axis, 3).to(p) * sign[..., None]
    n = torch.where(room_hit[..., None], n_room, n)
    n = torch.where(((n * d).sum(-1) > 0)[..., None], -n, n)  # insides of cut things face the viewer
    width = pixel[:, None] * t / (n * d).sum(-1).abs().clamp(min=.12)
    albedo, glow = torch.zeros_like(p), torch.zeros_like(p)
    for b in range(len(p)):
        for k, rooms in enumerate(world.rooms):
            pick = torch.nonzero(room_hit[b] & (layer[b] == k))[:, 0]
            if len(pick):
                albedo[b, pick], glow[b, pick] = _room_colour(
                    rooms[b], world.suns[b], p[b, pick], axis[b, pick], width[b, pick])
    b, r = torch.nonzero(index >= 0, as_tuple=True)
    q = index[b, r]
    albedo[b, r] = world.rgb[b, q]
    glow[b, r] = world.rgb[b, q] * .35 * (world.material[b, q] == _GLOW)[:, None]
    return p, n, t, index, albedo, glow


def _shells(world: _World, o, d):
    """The room that a ray meets: A's, or B's beyond the cut. Adds which layer (0, 1) it was."""
    first = _shell(world.rooms[0], o, d)
    layer = torch.zeros_like(first[1])
    if not (world.cut < 1e8).any():
        return (*first, layer)
    second = _shell(world.rooms[1], o, d)
    axis, eye = _optical(world)
    z = ((o + first[0][..., None] * d - eye[:, None]) * axis[:, None]).sum(-1)
    far = z >= world.cut[:, None]
    return (*(torch.where(far, s, f) for f, s in zip(first, second)), far.long())


def _radiance(world: _World, o, d, allowed, lights, pixel):
    """Linear colour of rays (B,R,3), distance and primitive index; no reflection or refraction."""
    t, index = _nearest(world, o, d, allowed)
    p, n, t, index, albedo, glow = _surface(world, o, d, t, index, _shells(world, o, d), pixel)
    sun = torch.tensor([s.direction() for s in world.suns], device=p.device)[:, None]
    strength = _per_scene([[s.strength * k for k in (1 + s.warmth, 1, 1 - s.warmth)] for s in world.suns],
                          p.device)[:, None]
    ambient = _per_scene([s.ambient for s in world.suns], p.device)[:, None, None]
    cos = (n * sun).sum(-1)
    seen = _visibility(world, p, n, lights, cos > 0)
    direct = seen * cos.clamp(min=0)[..., None] * strength
    floor = _per_scene([[c ** 2.2 for c in r.floor_rgb[0]] for r in world.rooms[1]], p.device)[:, None]
    up = (n[..., 1:2] + 1) / 2
    sky = torch.tensor([.95, 1.0, 1.06], device=p.device)
    bounce = ambient * (up * sky + (1 - up) * (.35 + .65 * floor))
    light = direct + bounce * _openness(world, p, n)[..., None]
    colour = albedo * light * .74 + glow
    shine = _is(world, index, _SHINY)
    half = sun - d
    half = half / half.norm(dim=-1, keepdim=True)
    spec = ((n * half).sum(-1).clamp(min=0) ** 40)[..., None] * seen * .35 * strength
    return torch.where(shine[..., None], colour + spec, colour), t, index, p, n


def _is(world: _World, index, material):
    hit = torch.gather(world.material, 1, index.clamp(min=0).flatten(1)).view_as(index)
    return (index >= 0) & (hit == material)


def _refract(d, n, ratio):
    cos = -(d * n).sum(-1, keepdim=True)
    k = (1 - ratio * ratio * (1 - cos * cos)).clamp(min=0)
    out = ratio * d + (ratio * cos - k.sqrt()) * n
    return out / out.norm(dim=-1, keepdim=True)


def _glass(world: _World, o, d, lights, pixel, colour, index, p, n):
    """Colour of rays that meet a glass ball: what is seen through it (two refractions), glint, tint."""
    picked = _is(world, index, _GLASS)
    for b in torch.nonzero(picked.any(1))[:, 0].tolist():                 # few rays: scene by scene
        r = torch.nonzero(picked[b])[:, 0]
        one = _one(world, b)
        q = index[b, r]
        inside = _refract(d[b, r], n[b, r], 1 / 1.45)
        chord = -2 * ((p[b, r] - world.centre[b, q]) * inside).sum(-1, keepdim=True)
        leave = p[b, r] + chord * inside
        n2 = (world.centre[b, q] - leave) / world.dims[b, q]
        out = _refract(inside, n2, 1.45)
        behind, *_ = _radiance(one, leave[None], out[None], one.used & (one.material != _GLASS),
                               lights[b:b + 1, r], pixel[b:b + 1])
        cos = (-(d[b, r] * n[b, r]).sum(-1, keepdim=True)).clamp(0, 1)
        fresnel = .04 + .96 * (1 - cos) ** 5
        sun = torch.tensor(world.suns[b].direction(), device=d.device)
        half = torch.nn.functional.normalize(sun - d[b, r], dim=-1)
        glint = ((n[b, r] * half).sum(-1, keepdim=True).clamp(min=0) ** 120) * 1.6
        tint = .30 + .70 * world.rgb[b, q].sqrt()
        sky = torch.tensor([.75, .85, .95], device=d.device) * world.suns[b].ambient
        colour[b, r] = behind[0] * tint * (1 - fresnel) + fresnel * sky + glint
    return colour


def _one(world: _World, b: int) -> _World:
    new = object.__new__(_World)
    for key, value in vars(world).items():
        if isinstance(value, torch.Tensor):
            value = value[b:b + 1]
        elif key == "rooms":
            value = [[rooms[b]] for rooms in value]
        elif isinstance(value, list):
            value = [value[b]]
        setattr(new, key, value)
    return new


# ---------------------------------------------------------------------------------------------- render
def _develop(linear):
    """Linear light -> display sRGB in [0, 1], with a soft shoulder instead of hard clipping."""
    x = linear.clamp(min=0)
    x = torch.where(x > .7, .7 + .3 * (1 - torch.exp(-(x - .7) / .3)), x)
    return x.clamp(1e-6, 1).pow(1 / 2.2)


def _draw(jobs, size, samples, device, things: list[tuple[Thing, ...]], shadow_rays: int) -> Render:
    world = _World(jobs, device)
    h, w = size
    o, d, cosine = _rays(world, size, samples)
    lights = _sun_samples(world, o.shape[1], samples, shadow_rays)
    pixel = torch.tensor([2 * math.tan(math.radians(c.fov / 2)) / h for c in world.cameras], device=device)
    colour, t, index, p, n = _radiance(world, o, d, world.used, lights, pixel)
    colour = _glass(world, o, d, lights, pixel, colour, index, p, n)
    b, s = len(jobs), samples * samples
    rgb = _develop(colour).view(b, h, w, s, 3).mean(3).permute(0, 3, 1, 2).contiguous()
    thing = torch.gather(world.thing, 1, index.clamp(min=0))
    thing = torch.where(index >= 0, thing, torch.full_like(thing, -1)).view(b, h, w, s)
    depth = (t * cosine).view(b, h, w, s)
    count = max(1, max(len(x) for x in things))
    alpha = torch.stack([(thing == i).float().mean(-1) for i in range(count)], 1)
    room = (thing < 0).float().mean(-1, keepdim=True).permute(0, 3, 1, 2)
    ids = torch.cat([room, alpha], 1).argmax(1, keepdim=True) - 1  # the thing that covers most of the pixel
    mine = (thing == ids[:, 0, :, :, None]).float()
    depth = ((depth * mine).sum(-1) / mine.sum(-1).clamp(min=1))[:, None]  # never mix depths across an edge
    return Render(rgb, depth, ids, alpha, *_labels(ids, things))


def _labels(ids, things):
    """Kind and colour maps (0 = room) from thing ids."""
    width = max(1, max(len(x) for x in things)) + 1
    table = torch.zeros(2, len(things), width, dtype=torch.long)
    for b, row in enumerate(things):
        for i, thing in enumerate(row):
            table[0, b, i + 1] = KINDS.index(thing.kind) + 1
            table[1, b, i + 1] = COLOURS.index(thing.colour) + 1
    table = table.to(ids.device)
    flat = (ids + 1).flatten(1)
    return tuple(torch.gather(t, 1, flat).view_as(ids) for t in table)


def _pair(size) -> tuple[int, int]:
    h, w = (size, size) if isinstance(size, int) else size
    if h < 8 or w < 8 or h > 4096 or w > 4096:
        raise ValueError(f"size must be 8 to 4096 pixels a side, not {h}x{w}")
    return h, w


def _batches(jobs, size, samples, device):
    per = size[0] * size[1] * samples ** 2 * 40
    limit = 12e6 if torch.device(device).type == "cpu" else 6e8
    step = max(1, int(limit // per))
    return [jobs[i:i + step] for i in range(0, len(jobs), step)]


def _render_jobs(jobs, size, samples, device, shadow_rays) -> Render:
    if not 1 <= samples <= 8:
        raise ValueError(f"samples must be 1 to 8 per side of a pixel, not {samples}")
    size = _pair(size)
    parts = []
    with torch.no_grad():
        for some in _batches(jobs, size, samples, device):
            things = [a.things + (b.things if b else ()) for a, b, _ in some]
            parts.append(_draw(some, size, samples, device, things, shadow_rays))
    most = max(part.alpha.shape[1] for part in parts)
    for part in parts:
        part.alpha = torch.nn.functional.pad(part.alpha, (0, 0, 0, 0, 0, most - part.alpha.shape[1]))
    return Render(*(torch.cat([getattr(part, f) for part in parts]) for f in Render.__dataclass_fields__))


def render(scenes: Scene | list[Scene], size: int | tuple[int, int] = SIZE, samples: int = 2, device="cpu",
           shadow_rays: int = 2) -> Render:
    """Ray-cast one scene or many. size: side or (H, W); samples: rays per side of a pixel (2 = 2x2 per
    pixel); shadow_rays: points of the sun that each ray asks (x samples^2 per pixel). Deterministic."""
    scenes = [scenes] if isinstance(scenes, Scene) else list(scenes)
    if not scenes:
        raise ValueError("nothing to render: give at least one scene")
    return _render_jobs([(s, None, 1e9) for s in scenes], size, samples, device, shadow_rays)


def only(scene: Scene, index: int, sun: Sun | None = None, size=SIZE, samples: int = 2,
         device="cpu") -> torch.Tensor:
    """Thing `index` alone, unoccluded and without its cast shadow: RGBA (1,4,H,W), straight alpha.

    Lit by `sun` when given, which is what a cut-out from another photograph looks like. Colour is kept
    unmixed at the rim (each pixel averages its own samples of the thing only)."""
    _check_index(scene, index)
    alone = replace(scene, things=(replace(scene.things[index], on=None),), sun=sun or scene.sun)
    return cut_out(alone, 0, size, samples, device)


def cut_out(scene: Scene, index: int, size=SIZE, samples: int = 2, device="cpu") -> torch.Tensor:
    """The visible part of thing `index` as it stands in the scene: RGBA (1,4,H,W), straight alpha."""
    _check_index(scene, index)
    h, w = _pair(size)
    with torch.no_grad():
        world = _World([(scene, None, 1e9)], device)
        o, d, _ = _rays(world, (h, w), samples)
        lights = _sun_samples(world, o.shape[1], samples, 2)
        pixel = torch.tensor([2 * math.tan(math.radians(scene.camera.fov / 2)) / h], device=device)
        colour, _, prim, p, n = _radiance(world, o, d, world.used, lights, pixel)
        colour = _glass(world, o, d, lights, pixel, colour, prim, p, n)
        mine = (prim >= 0) & (torch.gather(world.thing, 1, prim.clamp(min=0)) == index)
    mine = mine.float().view(h, w, -1, 1)
    rgb = _develop(colour).view(h, w, -1, 3)
    flat = (rgb * mine).sum(2) / mine.sum(2).clamp(min=1)
    return torch.cat([flat, mine.mean(2)], -1).permute(2, 0, 1)[None].contiguous()


def composite_truth(a: Scene, b: Scene, at: float, size=SIZE, samples: int = 2, device="cpu") -> Render:
    """The true composite of two scenes: A's surfaces nearer than `at` metres (floor too), B's rest and sun.

    Both are seen by A's camera. Ids count A's things first, then B's."""
    if not NEAR < at < FAR:
        raise ValueError(f"at={at} m is outside the scene: choose a depth between {NEAR} and {FAR} m")
    return _render_jobs([(a, replace(b, camera=a.camera), float(at))], size, samples, device, 2)


# ---------------------------------------------------------------------------------------------- cases
def other_sun(sun: Sun) -> Sun:
    """A clearly different light: from the other side, higher and cooler or warmer."""
    return replace(sun, azimuth=-math.copysign(178 - abs(sun.azimuth), sun.azimuth),
                   elevation=66 - sun.elevation, warmth=.22 - sun.warmth)


def insertion_case(seed: int) -> dict:
    """One object-insertion task with its truth, found from a seed by a fixed rule.

    Returns scene (with the thing), index, background (scene without it), at (metres: the thing's front),
    sun (the light of the cut-out). Looks for a thing that is visible on 2.5 % of the picture, changes the
    light on 1.5 % around it, carries nothing, and is partly hidden by something nearer; takes the best of a
    few rooms."""
    best, best_score = None, -1.
    for k in range(64):
        scene = sample(_sibling(seed, k))
        for i, thing in enumerate(scene.things):
            if thing.kind == "glass" or thing.on is not None or any(t.on == i for t in scene.things):
                continue
            score = _insertion_score(scene, i)
            if score > best_score:
                best, best_score = (scene, i), score
        if best_score >= 3 or (best and k >= 7):
            break
    scene, index = best
    return {"seed": seed, "scene": scene, "index": index, "background": scene.without(index),
            "at": scene.front_of(index), "sun": other_sun(scene.sun), "caption": scene.caption()}


def _sibling(seed: int, k: int) -> int:
    """Another seed of the same split, far from the ones a caller walks through."""
    span = SPLITS[split_of(seed)]
    return span.start + (seed - span.start + 1_000_003 * k) % len(span)


def _insertion_score(scene: Scene, i: int) -> float:
    both = render([scene, scene.without(i)], size=48, samples=1, shadow_rays=1)
    visible = both.ids[0] == i
    alone = only(scene, i, size=48, samples=1)[:, 3] > .5
    shadow = ((both.rgb[0] - both.rgb[1]).abs().mean(0, keepdim=True) > .03) & ~visible
    hidden = 1 - (visible & alone).sum() / alone.sum().clamp(min=1)
    score = float(visible.float().mean() >= .025) + float(shadow.float().mean() >= .015)
    return score + float(.08 <= hidden <= .65) if score == 2 else score * .5


def composite_case(seed: int) -> tuple[Scene, Scene, float]:
    """One scene-compositing task: (a, b, at), one camera. A has a thing nearer than `at`, B one beyond."""
    for k in range(12):
        a = sample(seed if k == 0 else _sibling(seed, k))
        b = sample(_sibling(seed, 100 + k), camera=a.camera)
        near = sorted((a.depth_of(i) + t.footprint, i) for i, t in enumerate(a.things)
                      if t.on is None and t.kind != "glass")
        far = sorted((-b.front_of(i), i) for i, t in enumerate(b.things) if t.on is None)
        at = near[0][0] + .08 if near else FAR
        if far and at < 4.6 and -far[0][0] > at:
            return a, b, at
    return a, b, min(at, 4.4)


# ---------------------------------------------------------------------------------------------- data/scenes
EXAMPLE = 20003468               # the room of lesson 00: a white table


def write_examples(folder) -> list:
    """A room, its depth as a sensor would store it (16-bit millimetres) and a chair cut out under another
    sun, as files for `make edit`; made by the project, so nobody needs a photograph to try it. Returns the
    paths."""
    from pathlib import Path

    from lib import show
    folder, size = Path(folder), (480, 640)
    folder.mkdir(parents=True, exist_ok=True)
    room = sample(EXAMPLE)
    chair = Thing("chair", "red", x=-0.8, z=0, size=1.5, turn=20)
    seen = render(room, size, samples=4)
    cut = only(room.insert(chair, at=3.55), len(room.things), other_sun(room.sun), size, samples=4)
    rows, columns = (cut[0, 3] > 0).any(1).nonzero(), (cut[0, 3] > 0).any(0).nonzero()
    cut = cut[..., rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    return [show.save_image(seen.rgb, folder / "room.png"), show.save_image(cut, folder / "chair.png"),
            show.save_image((seen.depth * 1000).round() / 65535, folder / "room_depth_mm.png", bits=16)]


if __name__ == "__main__":
    import sys
    print(*write_examples(sys.argv[1] if len(sys.argv) > 1 else "data/scenes"), sep="\n")
