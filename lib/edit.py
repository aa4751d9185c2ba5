"""The job behind `make edit`: one real photograph, one object, one depth (notebooks/edit.ipynb).

    photo = read_photo("room.jpg", "depth.png")   any size; depth measured, or estimated by a depth model
    place = stand(photo, at, cutout)              where the object's foot is, and how large it is there
    shot = composites(photo, place, cutout)       DeGLaD layers; 2-D paste; depth-aware paste; full size
    final = with_model(shot, pipe)                FeatGLaC in a window at the model's size, brought back
    save(final, "out")                            pictures, layers, statistics, report; all or nothing

The large picture stays as it is: only what the edit *changed* at the model's size is enlarged and added,
inside the ring around the object. Every other pixel is the photograph's own, bit for bit.
"""
from __future__ import annotations

import base64
import contextlib
import html
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lib import deglad, depth, featglac, light, models, scenes, setup, show

WORK_SIDE = 1536       # masks of larger pictures are made at this size and enlarged; the pictures are not
VIEW = 0.82            # focal length / picture width where the file does not say: about a phone's view
TOLERANCE = 0.03       # what is nearer than the object by less than this share of its depth does not hide it
SINK = 0.06            # seen from above, a thing reaches this share of its height below its middle's foot
METRES = {"cut-out": 0.45, "chair": 0.9, "table": 0.75, "lamp": 1.25, "plant": 0.7, "ball": 0.5, "box": 0.5,
        "vase": 0.7, "cone": 0.8, "glass": 0.5}  # metres, when nobody says


# ---------------------------------------------------------------- reading

@dataclass(frozen=True)
class Photo:
    """image (1, 3, H, W) full size; small: at most WORK_SIDE; depth: of small's size; focal in widths."""
    image: torch.Tensor
    small: torch.Tensor
    depth: depth.DepthMap
    focal: float
    name: str
    origin: dict


def read_photo(image, depth_file="", near_is="", depth_model="mini", device="cpu") -> Photo:
    """Read a photograph and its depth. `depth_file`: see `lib.depth.given`; empty: `depth_model` estimates.

    image: a path, or "" for a room of the Miniature with its exact depth. Errors: as show.read_image,
    depth.given.
    """
    if not str(image):
        return _miniature_photo()
    full = show.read_image(image)
    size = tuple(full.shape[-2:])
    if min(size) < 32:
        raise ValueError(f"The picture is {size[1]} x {size[0]} pixels, "
                         "too small to edit; give at least 32 x 32.")
    small, warning = _shrink(full, WORK_SIDE), {}
    if str(depth_file):
        found = depth.given(depth_file, near_is=near_is or None, size=size, trim=2.0).resize(small.shape[-2:])
        where = f"measured or given: {Path(depth_file).name}"
    else:
        found = models.load_depth(depth_model, device)(small.to(device)).to("cpu")
        where = f"estimated from the picture by the depth model '{depth_model}'"
        if depth_model in ("mini", "mini-depth"):
            warning = {"read this first": "the depth is a guess by a model "
                                          "that was trained on the Miniature only: "
                       "of a photograph it knows neither the things nor the metres, so this edit shows the "
                       "steps, not what they can do. Give DEPTH, or "
                       "DEPTH_MODEL=depth-anything-v2-metric (fetched once)"}
    focal, said = _focal(image, full)
    origin = {"photograph": Path(image).name, "depth": where, "focal length": said} | warning
    return Photo(full, small, found, focal, Path(image).name, origin)


EXAMPLE = scenes.SPLITS["test"].start + 16  # a room with a table and a lamp in low light


def _miniature_photo() -> Photo:
    scene = scenes.sample(EXAMPLE)
    made = scenes.render(scene, size=256)
    found = depth.from_metric(made.depth, near=scenes.NEAR, far=scenes.FAR, source="the renderer (exact)")
    origin = {"photograph": "none given: a room of the Miniature, rendered here",
              "depth": "exact, by the renderer", "focal length": "the renderer's camera"}
    focal = float(0.5 / np.tan(np.radians(scene.camera.fov) / 2))
    return Photo(made.rgb, made.rgb, found, focal, "miniature", origin)


def _shrink(image, side):
    scale = side / max(image.shape[-2:])
    if scale >= 1:
        return image
    size = [max(1, round(s * scale)) for s in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


def _focal(path, image) -> tuple[float, str]:
    """Focal length in picture widths, from EXIF's 35 mm equivalent, else VIEW."""
    from PIL import Image
    with contextlib.suppress(Exception), Image.open(path) as picture:  # EXIF is often broken, and only a help
        mm = picture.getexif().get_ifd(0x8769).get(41989)
        if mm and 5 < float(mm) < 1000:
            diagonal = float(np.hypot(*image.shape[-2:]))
            return float(mm) / 43.27 * diagonal / image.shape[-1], f"{mm} mm (35 mm equivalent), in the file"
    return VIEW, f"not in the file; {VIEW} picture widths assumed"


def read_cutout(insert, model="mini", seed=0, device="cpu") -> tuple[torch.Tensor | None, str, str]:
    """(RGBA (1, 4, h, w) or None, kind, where it comes from) of a cut-out file, or of words ("red chair").

    Words with the mini: "red chair" is rendered by the Miniature, "draw red chair" is drawn by the mini's own
    diffusion model and cut out by the judge (rough). Other models paint the object into the picture
    themselves (None). "": a blue chair, rendered.
    """
    if not str(insert):
        origin = "none given: a blue chair of the Miniature, rendered in a light of its own"
        return _rendered("chair", "blue"), "chair", origin
    path = Path(insert)
    if path.is_file() or path.suffix:
        rgba = featglac.check_rgba(show.read_image(path, mode="rgba"), path.name)
        if rgba[:, 3].min() > 0.5:
            raise ValueError(f"{path.name} has no transparent pixel, so it is a picture and not a cut-out; "
                             "give an RGBA PNG whose background is transparent.")
        return _trim(rgba), "cut-out", f"the cut-out file {path.name}, in the light it was photographed in"
    words = words_of(insert)
    if not Path(model).name.startswith("mini"):
        return None, "cut-out", f"painted by {model} from the words '{words}'"
    kind, colour = _words(words)
    if "draw" not in words.split():
        origin = f"rendered by the Miniature from '{words}', in a light of its own (no model)"
        return _rendered(kind, colour, turn=25 + 40 * seed), kind, origin
    origin = f"drawn by the mini from '{words}' (128 pixels), cut out by the judge"
    return _drawn(kind, colour, seed, device), kind, origin


def words_of(insert) -> str:
    """The words in INSERT; `make edit` turns every INSERT into a path, whose last part is what was typed."""
    return Path(insert).name.strip().lower()


def _words(words) -> tuple[str, str]:
    found = [[w for w in words.split() if w in known] for known in (scenes.KINDS, scenes.COLOURS)]
    if not all(found):
        raise ValueError(f"INSERT='{words}' is neither a file nor words the mini knows; write a colour and a "
                         "thing, such as 'red chair' (colours: "
                         f"{', '.join(scenes.COLOURS)}; things: {', '.join(scenes.KINDS)}).")
    return found[0][0], found[1][0]


def _rendered(kind, colour, turn=25.0):
    """A thing of the Miniature alone, seen from 3 m under another sun than the example room's."""
    room = scenes.sample(EXAMPLE)
    alone = replace(room, things=()).insert(scenes.Thing(kind, colour, x=0, z=0, turn=turn), at=3.0)
    return _trim(scenes.only(alone, 0, sun=scenes.other_sun(room.sun), size=640))


def _drawn(kind, colour, seed, device, tries=8):
    """The mini draws "a red chair" a few times; the judge's best view of it becomes a cut-out."""
    from lib.metrics import judge_maps
    pipe, judge = models.load("mini", device, quiet=True), models.load_judge(device, quiet=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    name = f"{colour} glass ball" if kind == "glass" else f"{colour} {kind}"
    drawn = pipe([f"a {name}"] * tries, num_inference_steps=30, generator=generator, output_type="pt").images
    drawn = drawn.float().cpu()
    maps = judge_maps(judge, drawn)
    mine = (maps["kind"] == scenes.KINDS.index(kind) + 1).float()
    right = mine * (maps["colour"] == scenes.COLOURS.index(colour) + 1)
    edge = torch.ones_like(mine)
    edge[..., 1:-1, 1:-1] = 0
    score = right.flatten(1).sum(1) - 20 * (mine * edge).flatten(1).sum(1)  # whole objects only
    best = int(score.argmax())
    alpha = _largest_piece(mine[best:best + 1])
    if score[best] < 60 or alpha.sum() < 60:
        raise ValueError(f"The mini drew no whole {name} in {tries} tries; choose another SEED or other "
                         "words, or give a cut-out file.")
    layer = torch.cat([drawn[best:best + 1], alpha], 1)
    big = F.interpolate(layer, scale_factor=3, mode="bicubic").clamp(0, 1)
    alpha = ((F.avg_pool2d(big[:, 3:], 5, 1, 2) - 0.5) * 3 + 0.5).clamp(0, 1)  # smooth, and a pixel soft
    return _trim(torch.cat([big[:, :3], alpha], 1))


def _largest_piece(mask):
    from scipy import ndimage
    labels, n = ndimage.label(mask[0, 0].numpy() > 0.5)
    if n == 0:
        return torch.zeros_like(mask)
    biggest = np.bincount(labels.ravel())[1:].argmax() + 1
    return torch.from_numpy(ndimage.binary_fill_holes(labels == biggest)).float()[None, None]


def _trim(rgba):
    """The box of its opaque part."""
    featglac.check_rgba(rgba, "cut-out")
    rows, columns = (rgba[0, 3] > 0.05).any(1).nonzero(), (rgba[0, 3] > 0.05).any(0).nonzero()
    return rgba[..., rows.min():rows.max() + 1, columns.min():columns.max() + 1].clone()


# ---------------------------------------------------------------- standing

@dataclass(frozen=True)
class Floor:
    """The floor's plane: inverse depth = a u + b v + c, with u, v in [0, 1] across and down the picture.

    (A plane in space is a plane in inverse depth, for metres and for MiDaS-like relative depth alike.)"""
    a: float
    b: float
    c: float

    def row(self, u, inverse):
        """Where in the picture (v) the floor has this inverse depth, in column u."""
        return (inverse - self.a * u - self.c) / self.b

    def at(self, u, v):
        return self.a * u + self.b * v + self.c

    def over(self, size) -> torch.Tensor:
        """Its inverse depth on a picture of (H, W): (1, 1, H, W)."""
        v, u = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in size), indexing="ij")
        return self.at(u, v)[None, None]


def inverse_depth(values, found: depth.DepthMap):
    """Normalised depth (number or tensor) as inverse depth: 1 / metres, or 1 - value where no metres are."""
    return 1 / (found.near + values * (found.far - found.near)) if found.kind == "metric" else 1 - values


def find_floor(found: depth.DepthMap, seed: int = 0, tries: int = 600) -> Floor | None:
    """The lowest plane that rises away from the camera, by RANSAC on inverse depth. None: there is none."""
    h, w = found.size
    rng = np.random.default_rng(seed)
    inverse = inverse_depth(found.values, found)[0, 0].double().numpy()
    rows, columns = np.nonzero(found.valid[0, 0].numpy() > 0.5)
    if len(rows) < 50:
        return None
    pick = rng.integers(0, len(rows), min(6000, len(rows)))
    u, v = (columns[pick] + 0.5) / w, (rows[pick] + 0.5) / h
    q = inverse[rows[pick], columns[pick]]
    low = np.flatnonzero(v > 0.5)
    if len(low) < 20:
        return None
    points, scale = np.stack([u, v, np.ones_like(u)], 1), float(np.median(q))
    best, best_score = None, 0.25  # real floors reach 0.5 and more, planes through noise 0.12
    for _ in range(tries):
        three = rng.choice(low, 3, replace=False)
        with contextlib.suppress(np.linalg.LinAlgError):
            plane = np.linalg.solve(points[three], q[three])
            score = _floor_score(plane, points, q, scale)
            if score > best_score:
                best, best_score = plane, score
    if best is None:
        return None
    for _ in range(3):  # least squares over its own points
        near = np.abs(points @ best - q) < 0.02 * np.maximum(q, 0.2 * scale)
        if near.sum() < 20:
            return None
        best = np.linalg.lstsq(points[near], q[near], rcond=None)[0]
    share = near.mean()
    return Floor(*map(float, best)) if share > 0.04 and best[1] > 0 else None


def _floor_score(plane, points, q, scale) -> float:
    """How much of the lower picture lies on it; 0 for no floor (too upright, tilted, things below it)."""
    a, b, _ = plane
    if b < 0.25 * scale or abs(a) > 0.5 * b:
        return 0.0
    expected = points @ plane
    off = (q - expected) / np.maximum(expected, 0.2 * scale)
    weight = points[:, 1] ** 2
    below = ((off < -0.06) & (expected > 0.2 * scale)).mean()  # farther than the floor could be: through it
    on = (weight * (np.abs(off) < 0.02)).sum() / weight.sum()
    return 0.0 if below > 0.25 else float(on * (1 - below))


@dataclass(frozen=True)
class Place:
    """Where the object stands: (x, y) its foot and `height` its size, all as parts of the picture.

    at: its depth in [0, 1]; metres: the same (None without metres); notes: what was assumed."""
    x: float
    y: float
    height: float
    at: float
    metres: float | None
    floor: Floor | None
    notes: tuple[str, ...] = ()


def stand(photo: Photo, at, cutout, kind="cut-out", where="auto", height="auto") -> Place:
    """Put the object's foot on the floor at depth `at`, as large as it looks from there.

    where   "auto" (a column where it is well seen, partly behind something if possible), "0.4" (that
            column), or "0.4,0.8" (foot exactly there: on a table, say)
    height  "auto" (METRES for its kind), "0.9m" (its real height), or "0.3" (part of the picture's height)
    """
    found, notes = photo.depth, []
    d = found.at(at)
    deglad.split(photo.small, found, d)  # says clearly when nothing or everything is nearer
    metres = found.near + d * (found.far - found.near) if found.kind == "metric" else None
    size = _height(photo, d, metres, height, kind, notes)
    floor = find_floor(found)
    x, y = _where(where)
    if y is None:
        foot = _foot_of(floor, found, d, notes)
        x = _best_column(photo, d, foot, size, cutout, floor) if x is None else x
        y = foot(x)
    if y > 1:
        notes.append("the floor at this depth is below the picture's edge, so the object's foot is cut off")
    if not 0 < y - 0.5 * size < 1:
        raise ValueError(f"At AT={at} the object would stand outside the "
                         "picture; choose another AT, or WHERE='x,y'.")
    return Place(x, y, size, d, metres, floor, tuple(notes))


def _where(where):
    text = str(where).strip().lower()
    if text in ("", "auto"):
        return None, None
    try:
        numbers = [float(t) for t in text.split(",")]
        if len(numbers) not in (1, 2) or not all(0 <= n <= 1 for n in numbers):
            raise ValueError
    except ValueError:
        raise ValueError(f"WHERE='{where}' is not a place; write 'auto', a column such as '0.4', or a foot "
                         "such as '0.4,0.8', each from 0 to 1.") from None
    return numbers[0], numbers[1] if len(numbers) == 2 else None


def _height(photo, d, metres, height, kind, notes) -> float:
    """The object's height as part of the picture's height."""
    text, ratio = str(height).strip().lower(), photo.image.shape[-1] / photo.image.shape[-2]
    if text in ("", "auto"):
        if metres is None:
            notes.append("no metres in this depth map, so the object's size is a rule of thumb; say HEIGHT")
            return 0.45 * (1 - 0.6 * d)
        text = f"{METRES[kind]}m"
        notes.append(f"its real height is taken as {text}; say HEIGHT for another")
    number = 0.0
    with contextlib.suppress(ValueError):
        number, real = depth.parse_at(text)
    if number <= 0 or (not real and number > 2):
        raise ValueError(f"HEIGHT={height} is no height; write "
                         "metres (0.9m), or a part of the picture (0.3).")
    if not real:
        return number
    if metres is None:
        raise ValueError(f"HEIGHT={height} needs metric depth; this is "
                         f"{photo.depth.kind}: give a part such as 0.3.")
    return photo.focal * ratio * number / metres


def _foot_of(floor, found, d, notes):
    """column -> row of the foot at this depth."""
    if floor is None:
        notes.append("no floor was found, so the object stands at four fifths of the height; say WHERE='x,y'")
        return lambda x: 0.8
    inverse = float(inverse_depth(d, found))
    return lambda x: float(floor.row(x, inverse))


def _best_column(photo, d, foot, height, cutout, floor) -> float:
    """The column where the object stands on floor, runs into nothing, and is mostly but not wholly seen.

    Its weights are a taste, not a measurement; WHERE overrules them.
    """
    side = 192 / max(photo.depth.size)
    found = photo.depth.resize([max(8, round(s * side)) for s in photo.depth.size])
    h, w = found.size
    hides = _hides(found, d, floor)[0, 0]
    solid = ((found.values - d).abs() < 0.06)[0, 0].float() * (1 - on_floor(found, floor)[0, 0])
    floor_here, scores, sizes = on_floor(found, floor)[0, 0], {}, {}
    for x in np.linspace(0.08, 0.92, 43):
        y = foot(x)
        if not 0.1 < y <= 1.02:
            continue
        try:
            alpha = _box(h, w, x, y, height) if cutout is None else \
                featglac.place(cutout, (h, w), x, y, height)[0, 3]
        except ValueError:
            continue
        sizes[x] = float(alpha.sum())
        upper = alpha * (torch.arange(h)[:, None] < (y - 0.6 * height) * h)  # a hidden head looks odd
        seen = [float((a * (1 - hides)).sum() / a.sum().clamp_min(1e-6)) for a in (alpha, upper)]
        seen, clash = 0.6 * seen[0] + 0.4 * seen[1], float((alpha * solid).sum() / max(sizes[x], 1e-6))
        row, column = min(h - 1, int(y * h)), min(w - 1, int(x * w))
        ground = float(max(floor_here[row, column], 0.8 * hides[row, column]))
        wanted = 1 - abs(seen - 0.75) * (1.2 if seen < 0.75 else 0.6)
        scores[x] = ground + 1.5 * wanted - 1.5 * clash - 0.3 * abs(x - 0.5)
    whole = max(sizes.values(), default=1.0)  # what the picture's edge cuts off counts against a column
    return float(max(scores, key=lambda x: scores[x] + 3 * sizes[x] / whole)) if scores else 0.5


def _box(h, w, x, y, height) -> torch.Tensor:
    """A plain upright box as the place for something not drawn yet."""
    mask = torch.zeros(h, w)
    bottom, top, half = round(y * h), round((y - height) * h), max(1, round(0.4 * height * h))
    mask[max(0, top):max(0, bottom), max(0, round(x * w) - half):round(x * w) + half] = 1
    return mask


# ---------------------------------------------------------------- hiding

def on_floor(found: depth.DepthMap, floor: Floor | None, tolerance=0.03) -> torch.Tensor:
    """(1, 1, H, W): 1 where the surface is the floor itself."""
    if floor is None:
        return torch.zeros_like(found.values)
    expected = floor.over(found.size)
    off = (inverse_depth(found.values, found) - expected).abs()
    return (off < tolerance * expected.clamp_min(1e-3)).float()


def _hides(found, d, floor) -> torch.Tensor:
    """Hard mask of what hides an object at d: nearer than it, and not the floor it stands on."""
    if found.kind == "metric":
        metres = (found.near + d * (found.far - found.near)) * (1 - TOLERANCE)
        limit = max(0.0, (metres - found.near) / (found.far - found.near))
    else:
        limit = max(0.0, d - TOLERANCE)
    return (found.values < limit).float() * (1 - on_floor(found, floor))


def occluder(photo: Photo, place: Place) -> torch.Tensor:
    """fg_mask (1, 1, h, w) of what stands in front of the object, with edges from the picture's colours.

    Not the whole foreground layer: the near floor is nearer too, but hides nothing that stands on it.
    """
    hard = _hides(photo.depth, place.at, place.floor)
    kernel = max(3, round(min(hard.shape[-2:]) / 240) * 2 + 1)
    hard = _median(hard, kernel)
    if hard.min() == 1 or hard.max() == 0:
        return hard
    # soft_edges wants a depth and a cut: the mask itself is one (0.25 in front, 0.75 behind)
    as_depth = replace(photo.depth, values=0.75 - 0.5 * hard, valid=torch.ones_like(hard))
    return deglad.soft_edges(photo.small, as_depth, 0.5, 2.0)


def _median(mask, kernel):
    """Majority vote in a window: takes a sensor's specks away, keeps straight edges."""
    pad = kernel // 2
    padded = F.pad(mask, (pad,) * 4, mode="replicate")
    return (F.avg_pool2d(padded, kernel, 1) > 0.5).float()


# ---------------------------------------------------------------- compositing at full size

@dataclass(frozen=True)
class Shot:
    """One edit. Pictures (1, 3, H, W) at full size: paste2d, paste, result (None before the model ran).

    object_layer (1, 4, H, W); hidden_by (1, 1, H, W); cut: DeGLaD layers at work size, for the report (None:
    not asked for); facts: of the report."""
    photo: Photo
    place: Place
    cut: deglad.Layers | None
    object_layer: torch.Tensor
    hidden_by: torch.Tensor
    paste2d: torch.Tensor
    paste: torch.Tensor
    result: torch.Tensor | None = None
    facts: dict = field(default_factory=dict)


def composites(photo: Photo, place: Place, cutout, origin="", layers=True) -> Shot:
    """Two plain composites: 2-D (over everything), depth-aware (behind what is nearer); and DeGLaD layers, which
    no composite needs: without a report, `layers=False` saves their time."""
    size = tuple(photo.image.shape[-2:])
    cut = deglad.split(photo.small, photo.depth, place.at, soft=1.5, fill="telea") if layers else None
    hidden_by = occluder(photo, place)
    if tuple(hidden_by.shape[-2:]) != size:
        hidden_by = F.interpolate(hidden_by, size, mode="bilinear", align_corners=False)
    if cutout is None:  # words for a large model: the place is known, the object is not painted yet
        box = _box(*size, place.x, place.y, place.height)[None, None]
        layer = torch.cat([torch.full((1, 3, *size), 0.5), box], 1)
    else:
        layer = featglac.place(cutout, size, place.x, place.y + SINK * place.height, place.height)
    alpha = layer[:, 3:]
    seen = alpha * (1 - hidden_by)
    if seen.max() < 0.5:
        raise ValueError("At this place the object is wholly hidden by what "
                         "is nearer; choose a smaller AT, or WHERE.")
    share = round(float(seen.sum() / alpha.sum()), 3)
    facts = {"object": {"from": origin, "height_px": round(place.height * size[0]),
                        "foot": [place.x, place.y], "visible_share": share, "painted": cutout is None}}
    if cut:
        facts["layers"] = deglad.statistics(cut, photo.depth)
    return Shot(photo, place, cut, layer, hidden_by, featglac.over(layer[:, :3], alpha, photo.image),
                featglac.over(layer[:, :3], seen, photo.image), facts=facts)


# ---------------------------------------------------------------- the model's part

def check_settings(output, mechanism):
    """Say what is wrong with OUTPUT or MECHANISM before anything slow starts."""
    if mechanism not in featglac.MECHANISMS:
        raise ValueError(f"Unknown MECHANISM {mechanism!r}; known: {', '.join(featglac.MECHANISMS)}.")
    if output:
        _check_output(Path(output))


def default_output() -> Path:
    """runs/edit in the course's folder; where that cannot be written (Kaggle's inputs), edit here."""
    home = setup.root()
    return home / "runs" / "edit" if os.access(home, os.W_OK) and home.name != "lib" else Path.cwd() / "edit"


def painter(run, needed: bool):
    """The model's inpainting sibling ("mini-inpaint", "sd15-inpaint") where it is needed and exists."""
    name = f"{run.model}-inpaint"
    return models.load(name, run.device, run.dtype) if needed and name in models.REGISTRY else None


def window(shot: Shot, model_size: int) -> tuple[int, int, int]:
    """(top, left, side) of the square that the model works on: the object with room for its shadow."""
    h, w = shot.photo.image.shape[-2:]
    rows = (shot.object_layer[0, 3] > 0.5).any(1).nonzero().flatten()
    columns = (shot.object_layer[0, 3] > 0.5).any(0).nonzero().flatten()
    top, bottom, left, right = int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])
    side = min(max(round(2.4 * max(bottom - top, right - left)), min(model_size, 128)), h, w)
    y = (top + bottom) / 2 + 0.1 * (bottom - top)  # a little more below: that is where shadows fall
    start = [int(min(max(0, round(c - side / 2)), s - side)) for c, s in ((y, h), ((left + right) / 2, w))]
    return start[0], start[1], side


def with_model(shot: Shot, pipe, prompt="", mechanism="inject", generator=None, inpaint_pipe=None,
               **settings) -> Shot:
    """Edit at the model's size in a window, and bring only the change back to the full picture.

    pipe: a Stable-Diffusion-shaped pipeline; settings: fields of featglac.Settings (steps, noise_level, ...).
    Unlike there, decode is "relight" unless you say otherwise: a photograph has more detail than a model of
    128 pixels can give back, and a factor keeps it.
    """
    settings = {"decode": "relight"} | settings
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor
    top, left, side = window(shot, size)
    box = (..., slice(top, top + side), slice(left, left + side))
    to_model = lambda x: _resize(x[box], (size, size))  # noqa: E731
    painted = shot.facts["object"]["painted"]
    colour, alpha = shot.object_layer.split([3, 1], 1)
    premultiplied = to_model(torch.cat([colour * alpha, alpha], 1))
    alpha = premultiplied[:, 3:].clamp(0, 1)
    layer = torch.cat([(premultiplied[:, :3] / alpha.clamp_min(1e-4)).clamp(0, 1) * (alpha > 0), alpha], 1)
    background, hidden_by = to_model(shot.photo.image).clamp(0, 1), to_model(shot.hidden_by).clamp(0, 1)
    device, cost = pipe.unet.device, featglac.Cost()
    space = _space(shot, box, size, layer)
    if painted:
        steps = settings.get("steps", featglac.Settings.steps)
        layer, cost = featglac.paint_object(pipe, background.to(device), hidden_by.to(device),
                                            alpha.to(device), prompt, inpaint_pipe, steps, generator)
        layer = layer.cpu()
    edit = featglac.compose_layers(
        pipe, background.to(device), layer.to(device), hidden_by.to(device), prompt, mechanism,
        generator=generator, inpaint_pipe=inpaint_pipe, space=space, **settings)
    start = _paint_in(shot, layer, box) if painted else shot.paste
    facts = _model_facts(featglac.and_cost(edit, cost), pipe, size, (top, left, side))
    result = _bring_back(start, edit, shot, box)
    return replace(shot, paste=start, result=result, facts=shot.facts | {"model": facts})


def _space(shot, box, size, layer) -> light.Space | None:
    """The window in metres, for the shadow that the depth map casts; None where the depth has no metres.

    The floor is laid flat: a sensor's noise on it would be read as bumps, and make a shadow blotchy.
    """
    photo, place = shot.photo, shot.place
    if photo.depth.kind != "metric" or place.metres is None:
        return None
    h, w = photo.image.shape[-2:]
    rows, columns = box[1], box[2]
    side = rows.stop - rows.start
    metres = depth.fill_holes(photo.depth).metres()
    if place.floor:
        flat = 1 / place.floor.over(photo.depth.size).clamp_min(1e-3)
        metres = torch.where(on_floor(photo.depth, place.floor) > 0, flat, metres)
    nearest = lambda x, to: F.interpolate(x, to, mode="nearest-exact")  # noqa: E731 (depth is never averaged)
    metres = nearest(nearest(metres, (h, w))[box], (size, size))
    fov = math.degrees(2 * math.atan(side / 2 / (photo.focal * w)))
    centre = ((w / 2 - columns.start) / side, (h / 2 - rows.start) / side)
    picture = _resize(photo.image[box], (size, size)).clamp(0, 1)
    caster = torch.full_like(metres, place.metres)
    return light.Space(picture, metres, metres, caster, layer[:, 3:], fov, centre, colour=layer[:, :3])


def _paint_in(shot, layer, box):
    """Words for a large model: what it painted, enlarged, is the object at full size."""
    side = shot.photo.image[box].shape[-2:]
    colour = F.interpolate(layer[:, :3], side, mode="bicubic", align_corners=False).clamp(0, 1)
    out = shot.photo.image.clone()
    seen = shot.object_layer[box][:, 3:] * (1 - shot.hidden_by[box])
    out[box] = featglac.over(colour, seen, out[box])
    return out


def _bring_back(start, edit, shot, box) -> torch.Tensor:
    """start with the enlarged change, inside the ring, not on what stands in front of the object.

    With decode="relight" the change is a factor (light multiplies, so the photograph keeps its texture under
    a shadow); else it is a difference. The two sides of the object's outline are enlarged apart, each with
    its own change, or the coarse pixels that hold some of both would leave a rim around the object.
    """
    side = shot.photo.image[box].shape[-2:]
    after, before = edit.image.float().cpu(), edit.composite.float().cpu()
    relit = edit.settings.get("decode") == "relight"
    change = ((after + 0.02) / (before + 0.02)).log() if relit else after - before
    alpha, thing = edit.layers["object"].float().cpu(), (shot.object_layer[:, 3:] * (1 - shot.hidden_by))[box]
    inside, outside = (F.interpolate(_carried_on(change, part), side, mode="bicubic", align_corners=False)
                       for part in ((alpha >= 0.5).float(), (alpha < 0.5).float()))
    big = featglac.over(inside, thing, outside)
    ring = F.interpolate(edit.layers["ring"].float().cpu(), side, mode="bilinear", align_corners=False)
    in_front = shot.hidden_by[box] * (F.max_pool2d(shot.object_layer[box][:, 3:], 3, 1, 1) > 0)
    weight = ring * (1 - in_front) * _fade(shot.photo.image, box)
    moved = start[box] * (weight * big).exp() if relit else start[box] + weight * big
    out = start.clone()
    out[box] = torch.where(weight > 0, moved.clamp(0, 1), start[box])
    return out


def _carried_on(change, part, reach=5) -> torch.Tensor:
    """`change` on `part`, and beside it the mean of what is near on that side; far from it as it was."""
    beside = (F.max_pool2d(part, reach, 1, reach // 2) > 0) & (part == 0)
    return torch.where(beside, featglac.mean_under(change, part, torch.ones(reach)), change)


def _fade(image, box) -> torch.Tensor:
    """(1, 1, side, side): 1 inside the window, 0 at those of its edges that are not the picture's own."""
    h, w = image.shape[-2:]
    (y0, y1), (x0, x1) = ((box[i].start, box[i].stop) for i in (1, 2))
    n = max(1, (y1 - y0) // 12)
    far = torch.full((1,), 1e9)
    def ramp(a, b, size):
        i = torch.arange(b - a).float()
        before, after = i + 0.5 if a > 0 else far, (b - a) - i - 0.5 if b < size else far
        return torch.minimum(before, after).div(n).clamp(0, 1)
    return ramp(y0, y1, h)[None, None, :, None] * ramp(x0, x1, w)[None, None, None, :]


def _resize(x, size):
    return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)


def _model_facts(edit, pipe, size, where) -> dict:
    change, sun = edit.image - edit.composite, edit.light
    found = sun and {"azimuth": sun.azimuth, "elevation": sun.elevation, "evidence": round(sun.evidence, 1)}
    origin = getattr(pipe, "loaded_from", "a pipeline in memory")
    return {"light": found, "mechanism": edit.mechanism, "from": origin,
            "window": {"top": where[0], "left": where[1], "side": where[2]}, "model_size": size,
            "unet_passes": edit.passes, "seconds": round(edit.seconds, 2),
            "mean_change": round(float(change.abs().mean()), 5),
            "settings": {k: v for k, v in edit.settings.items() if isinstance(v, (int, float, str, bool))}}


# ---------------------------------------------------------------- output: all of it, or none

@contextlib.contextmanager
def whole_folder(output):
    """A folder to write into; it gets its name when everything in it is written. An error leaves nothing."""
    output = Path(output)
    _check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    try:
        yield part
        os.chmod(part, 0o755)
        old = None
        if output.exists():
            old = part.with_name(part.name + ".old")
            os.replace(output, old)
        os.replace(part, output)
        if old:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _check_output(output: Path):
    earlier = output.is_dir() and (not any(output.iterdir()) or (output / "report.md").is_file())
    if output.exists() and not earlier:
        raise ValueError(f"OUTPUT={output} exists and is not the output of "
                         "an earlier edit; give a new folder name.")


def save(shot: Shot, output, settings: dict | None = None) -> Path:
    """Write composites, layers, depth, statistics, report.md and report.html into `output`, all or
    nothing."""
    with whole_folder(output) as folder:
        (folder / "layers").mkdir()
        show.save_image(shot.paste2d, folder / "paste_2d.png")
        show.save_image(shot.paste, folder / "paste_depth.png")
        if shot.result is not None:
            show.save_image(shot.result, folder / "featglac.png")
        named = {"foreground": shot.cut.foreground, "background": shot.cut.background, "mask": shot.cut.mask,
                 "object": shot.object_layer, "in_front_of_object": shot.hidden_by}
        for name, picture in named.items():
            show.save_image(picture, folder / "layers" / f"{name}.png")
        show.save_image(shot.photo.depth.values, folder / "depth_01.png", bits=16)
        show.save_image(show.colour_depth(shot.photo.depth), folder / "depth.png")
        overview(shot, folder / "overview.png")
        statistics = json.dumps(shot.photo.depth.statistics(), indent=1)
        (folder / "depth_statistics.json").write_text(statistics + "\n")
        facts = report_facts(shot, settings)
        (folder / "facts.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
        text = report_text(shot, facts)
        (folder / "report.md").write_text(text, encoding="utf8")
        (folder / "report.html").write_text(_as_html(text, folder), encoding="utf8")
    return Path(output)


def views(shot: Shot, side=480) -> tuple[list, list]:
    """(pictures, labels) of an overview, at most `side` pixels."""
    pairs = [(shot.photo.small, "photograph"), (show.colour_depth(shot.photo.depth), "depth: bright = near"),
             (show.over(shot.cut.foreground), "nearer than AT"), (shot.cut.background, "beyond AT, filled"),
             (shot.paste2d, "2-D paste"), (shot.paste, "depth-aware paste")]
    if shot.result is not None:
        change = (shot.result - shot.paste).abs().mean(1, keepdim=True) * 10
        name = shot.facts["model"]["mechanism"]
        pairs += [(shot.result, f"FeatGLaC ({name})" if name in ("inject", "guide") else name),
                  (change.clamp(0, 1).expand(-1, 3, -1, -1), "what it changed, x10")]
    return [_shrink(p, side) for p, _ in pairs], [label for _, label in pairs]


def overview(shot: Shot, path):
    """The overview as one PNG."""
    pictures, labels = views(shot)
    return show.sheet(pictures, labels, path, columns=2, scale=1, max_bytes=None)


def report_facts(shot: Shot, settings=None) -> dict:
    """Everything the report says, as plain data."""
    image = shot.photo.image
    final = shot.paste if shot.result is None else shot.result
    same = (_bytes(final) == _bytes(image)).all(1)
    return {"picture": {"name": shot.photo.name, "width": image.shape[-1], "height": image.shape[-2]},
            "at": {"value_01": round(float(shot.place.at), 4), "metres": shot.place.metres},
            "place": {"x": round(shot.place.x, 4), "y": round(shot.place.y, 4),
                      "notes": list(shot.place.notes), "floor_found": shot.place.floor is not None},
            "untouched_share": round(float(same.float().mean()), 4), "origin": shot.photo.origin,
            "settings": settings or {}} | shot.facts


def _bytes(x):
    return (x * 255).round().to(torch.uint8)


def report_text(shot: Shot, facts: dict) -> str:
    """The report in Markdown: what came from what, the numbers, and the limits."""
    stats, place, model = shot.photo.depth.statistics(), facts["place"], facts.get("model")
    metres = facts["at"]["metres"]
    at = f"{facts['at']['value_01']:.2f}" + (f" ({metres:.2f} m)" if metres else "")
    origin, found = facts["origin"], "found" if place["floor_found"] else "not found"
    span = f"{stats['near_m']:.2f} m to {stats['far_m']:.2f} m" if "near_m" in stats else "no metres"
    first = [f"Read this first: {origin['read this first']}.", ""] if "read this first" in origin else []
    lines = [f"# Edit of {facts['picture']['name']} at depth {at}", "", *first,
             "![overview](overview.png)", "", "## What came from what", "", "| part | from |", "|---|---|",
             f"| picture | {origin['photograph']}, {facts['picture']['width']} x "
             f"{facts['picture']['height']} |",
             f"| depth | {origin['depth']} |",
             f"| object | {facts['object']['from']} |",
             f"| its place and size | the floor's plane in the depth map, {found}; focal length "
             f"{origin['focal length']} |",
             "| 2-D paste, depth-aware paste | computed from these; no model |",
             f"| finished picture | {_model_words(model)} |", f"| its light | {_light_words(model)} |", "",
             "## Numbers", "", "| | |", "|---|---|",
             f"| depth | {stats['kind']}, {span}, "
             f"{100 * stats['measured_share']:.1f} % of the pixels measured |",
             f"| nearer than AT | {100 * facts['layers']['fg_share']:.1f} % of the picture |",
             f"| object | {facts['object']['height_px']} pixels high, foot at ({place['x']:.2f}, "
             f"{place['y']:.2f}), {100 * facts['object']['visible_share']:.0f} % of it visible |",
             f"| untouched | {100 * facts['untouched_share']:.1f} % of the "
             "pixels are the photograph's own, bit for bit |"]
    if model:
        lines += [f"| model | window of {model['window']['side']} pixels worked on at {model['model_size']}, "
                  f"{model['unet_passes']} U-Net passes, {model['seconds']} s |"]
    notes = (*place["notes"], *_limits(shot, model))
    lines += ["", "## What to keep in mind", ""] + [f"* {note}." for note in notes]
    return "\n".join(lines) + "\n"


def _model_words(model) -> str:
    if not model:
        return "not run"
    if not model["unet_passes"]:
        return f"{model['mechanism']}, computed; no diffusion model"
    own = "mini" in Path(str(model["from"]).split(" ")[0]).name
    taught = ", trained on the Miniature only: it has never seen a photograph" if own else ""
    name = Path(str(model["from"])).name
    return (f"{model['mechanism']} with the model from {name}{taught}; "
            "only its change went into the photograph")


def _light_words(model) -> str:
    if not model:
        return "not run"
    sun, drawn = model["light"], model["unet_passes"] > 0
    if not sun:
        whose = "the model alone" if drawn else "each part keeps its own"
        return f"{whose}; the depth map was not asked for a shadow"
    share, side = model["settings"], "right" if sun["azimuth"] > 0 else "left"
    said = ("the depth map says where the shadow falls and which side is bright, for a sun "
            f"{sun['elevation']} degrees high, {abs(sun['azimuth'])} degrees to the {side} of straight ahead "
            f"(evidence {sun['evidence']} nats; below 8 it is a guess)")
    if not drawn:
        return said
    return said + (f"; from the model, {share['faint']:.0%} of its change around the object and "
                   f"{share['own']:.0%} of its change on it")


def _limits(shot, model) -> list[str]:
    out = ["the filled background is a guess from its surroundings; nobody photographed what is behind"]
    if model and "mini" in str(model["from"]):
        out.append("light and shadow are worked out for one sun and matt surfaces, and by a model that has "
                   "seen rendered rooms only: on photographs read them as a hint, "
                   "and judge the method by the benchmark on "
                   "unseen Miniature scenes; MODEL=\"sd15\" uses a large model")
    if shot.facts["object"]["visible_share"] > 0.99:
        out.append("nothing nearer was found in front of the object; if something should hide it, this "
                   "depth map does not show it: give a DEPTH, a larger DEPTH_MODEL, or another WHERE")
    if shot.photo.depth.valid.mean() < 1:
        out.append("where the sensor measured nothing, a measurement "
                   "beside it stands in: edges there may be wrong")
    out.append("the object is flat: it stands at one depth, and turns neither to the camera nor to the light")
    return out


def _as_html(text: str, folder: Path) -> str:
    """The same report as one HTML file that reads offline (the overview is inside it)."""
    data = base64.b64encode((folder / "overview.png").read_bytes()).decode()
    body, table = [], False
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else None
        if cells and not set("".join(cells)) <= {"-"}:
            body.append("" if table else "<table>")
            body.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
            table = True
        elif not cells:
            body.append("</table>" if table else "")
            table = False
            body.append(_html_line(line, data))
    style = ("body{font:16px/1.5 sans-serif;max-width:62em;margin:2em auto;padding:0 1em}img{max-width:100%}"
             "td{border-bottom:1px solid #ddd;padding:.2em .8em .2em 0;vertical-align:top}")
    return (f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Edit</title><style>{style}</style>"
            + "\n".join(b for b in body if b) + "</html>\n")


def _html_line(line, data) -> str:
    if line.startswith("!["):
        return f"<img alt='overview' src='data:image/png;base64,{data}'>"
    for mark, tag in (("## ", "h2"), ("# ", "h1"), ("* ", "li")):
        if line.startswith(mark):
            return f"<{tag}>{html.escape(line[len(mark):])}</{tag}>"
    return f"<p>{html.escape(line)}</p>" if line.strip() else ""
