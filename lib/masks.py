"""Masks for inpainting (lesson 04): what is to be filled, and what is kept.

One convention, everywhere: a `fill_mask` is float32 (B, 1, H, W) with **1 = to fill**, 0 = known.
The papers' m (1 = known) is `1 - fill_mask`. Stable Diffusion's pipelines use white = fill, as we do.

The five kinds of the course: random box, centre box, hybrid, irregular, free-form; and a sixth that
editing needs most, the shape of an object. All take a `torch.Generator` on the CPU: same seed, same masks.
"""
import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

KINDS = ("random_box", "centre_box", "hybrid", "irregular", "free_form")


def known(fill_mask):
    """The papers' m: 1 = known, 0 = to fill."""
    return 1.0 - fill_mask


def coverage(fill_mask):
    """Share of the picture to fill, per picture: (B,) in [0, 1]."""
    return fill_mask.mean(dim=(1, 2, 3))


def check_fill_mask(fill_mask, image=None):
    """Raise ValueError unless fill_mask is (B, 1, H, W) in [0, 1], not empty, and fits the image."""
    if not torch.is_tensor(fill_mask) or fill_mask.dim() != 4 or fill_mask.shape[1] != 1:
        raise ValueError(f"fill_mask must be a tensor (B, 1, H, W), 1 = to fill; got {_shape(fill_mask)}.")
    if image is not None:
        if not torch.is_tensor(image) or image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image must be a tensor (B, 3, H, W) with values in [0, 1]; got {_shape(image)}.")
        if image.shape[-2:] != fill_mask.shape[-2:]:
            raise ValueError(f"fill_mask is {_hw(fill_mask)} but the image is {_hw(image)} (height x width): "
                             "make the mask at the image's size.")
        if fill_mask.shape[0] not in (1, image.shape[0]):
            raise ValueError(f"{fill_mask.shape[0]} masks do not fit {image.shape[0]} images: "
                             "give one mask, or one for each image.")
    low, high = float(fill_mask.min()), float(fill_mask.max())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"fill_mask must lie in [0, 1]; its values span {low:.3g}..{high:.3g}.")
    full = fill_mask.amin(dim=(1, 2, 3)) >= 1.0
    if (fill_mask.amax(dim=(1, 2, 3)) <= 0.0).any():
        raise ValueError("fill_mask is empty: no pixel is marked 1 (= to fill).")
    if full.any():
        raise ValueError("fill_mask covers the whole picture: nothing is left to fill from. "
                         "1 means to fill; if yours means known, give 1 - mask.")


# --- the five kinds ---------------------------------------------------------------------------------------

def random_box(n, size, generator, area=(0.08, 0.35)):
    """n boxes anywhere inside the picture -> (n, 1, H, W). `area`: range of the share to fill."""
    h, w = _size(size)
    _check_area(area)
    bh, bw = _box_sides(n, h, w, generator, area)
    top = (torch.rand(n, generator=generator) * (h - bh + 1)).floor()
    left = (torch.rand(n, generator=generator) * (w - bw + 1)).floor()
    return _boxes(h, w, top, left, bh, bw)


def centre_box(n, size, generator=None, area=0.25):
    """The same box in the middle of n pictures -> (n, 1, H, W). `area`: share to fill."""
    h, w = _size(size)
    _check_area((area, area))
    side = math.sqrt(area)
    bh, bw = max(1, round(h * side)), max(1, round(w * side))
    one = torch.ones(n)
    return _boxes(h, w, one * ((h - bh) // 2), one * ((w - bw) // 2), one * bh, one * bw)


def irregular(n, size, generator, area=(0.08, 0.35)):
    """n masks of ragged islands: smooth noise, cut at the quantile that gives the wanted share.

    Two octaves of noise on coarse grids (4 and 8 cells a side), so islands are large and edges ragged.
    """
    h, w = _size(size)
    _check_area(area)
    noise = sum(a * F.interpolate(torch.randn(n, 1, c, c, generator=generator), (h, w), mode="bicubic")
                for c, a in ((4, 1.0), (8, 0.5), (24, 0.12)))
    share = _uniform(n, generator, area)
    keep = (share * h * w).round().long().clamp(1, h * w - 1)[:, None]
    level = noise.flatten(1).sort(dim=1, descending=True).values.gather(1, keep)
    return (noise > level.view(n, 1, 1, 1)).float()


def free_form(n, size, generator, area=(0.05, 0.35)):
    """n masks of brush strokes -> (n, 1, H, W); after the free-form masks of gated convolution (Yu 2019).

    Each stroke is a chain of segments that keeps turning, with round ends. Strokes are added until the
    drawn share lies in `area`; a stroke that would go above it is left out.
    """
    h, w = _size(size)
    _check_area(area)
    seeds = torch.randint(0, 2**31 - 1, (n,), generator=generator)
    low = _uniform(n, generator, area)
    out = np.stack([_strokes(h, w, np.random.default_rng(int(s)), float(a), area[1])
                    for s, a in zip(seeds, low)]) if n else np.zeros((0, h, w), np.uint8)
    return torch.from_numpy(out).float()[:, None]


def hybrid(n, size, generator, area=(0.10, 0.40)):
    """n masks of a box *and* brush strokes -> (n, 1, H, W); the share to fill lies in `area`."""
    low, high = area
    _check_area(area)
    box = random_box(n, size, generator, (low, (low + high) / 2))
    brush = free_form(n, size, generator, (low / 4, high / 3))
    both = torch.maximum(box, brush)
    too_much = coverage(both)[:, None, None, None] > high
    return torch.where(too_much, box, both)


# --- the shape of an object -------------------------------------------------------------------------------

def dilate(mask, radius):
    """Grow the 1s of a mask (B, 1, H, W) by a disc of `radius` pixels (0 = no change)."""
    if radius <= 0:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * int(radius) + 1,) * 2)
    planes = [cv2.dilate(np.ascontiguousarray(m), kernel) for m in mask[:, 0].float().cpu().numpy()]
    return torch.from_numpy(np.stack(planes))[:, None].to(mask)


def erode(mask, radius):
    """Shrink the 1s of a mask by a disc of `radius` pixels; the picture's border does not eat into it."""
    return 1.0 - dilate(1.0 - mask, radius)


def object_mask(ids, index, radius=2):
    """The visible pixels of one object as a fill_mask (B, 1, H, W), grown by `radius` pixels.

    ids: integers (B, 1, H, W) as the renderer gives them (-1 = room). index: one object's number.
    Growing takes in the mixed pixels of the border; without it their colour leaks into the filling.
    """
    if not torch.is_tensor(ids) or ids.dim() != 4 or ids.shape[1] != 1 or ids.is_floating_point():
        raise ValueError(f"ids must be an integer tensor (B, 1, H, W), as Render.ids; got {_shape(ids)}.")
    hit = ids == index
    if not hit.flatten(1).any(dim=1).all():
        seen = sorted(int(i) for i in ids.unique() if i >= 0)
        raise ValueError(f"object {index} is not visible in every picture; objects seen: {seen}.")
    return dilate(hit.float(), radius)


def random_object_masks(ids, generator, radius=(0, 4), borrow=0.5, min_pixels=30):
    """One object-shaped mask for each picture of a batch, fast: (B, 1, H, W).

    With chance `borrow` the shape comes from *another* picture of the batch. Without that a model learns
    "a chair-shaped hole held a chair" and puts the object back instead of filling what is behind it.
    Pictures that show no object of at least `min_pixels` get a random box. radius: range of the growing.
    """
    b, _, h, w = ids.shape
    host = torch.arange(b)
    swap = torch.rand(b, generator=generator) < borrow
    host = torch.where(swap, torch.randint(0, b, (b,), generator=generator), host)
    ids = ids.cpu()[host]
    grow = torch.randint(radius[0], radius[1] + 1, (b,), generator=generator)
    pick = torch.rand(b, generator=generator)
    out = random_box(b, (h, w), generator)
    for k in range(b):
        flat = ids[k].flatten()
        count = torch.bincount(flat[flat >= 0], minlength=1)
        good = (count >= min_pixels).nonzero()[:, 0]
        if len(good):
            thing = good[int(pick[k] * len(good))]
            mask = dilate((ids[k:k + 1] == thing).float(), int(grow[k]))
            if float(mask.mean()) < 0.95:
                out[k] = mask[0]
    return out


def random_fill_masks(n, size, generator, ids=None):
    """n masks of all kinds mixed, for training: (n, 1, H, W), every share in (0, 0.95).

    Without ids: the five kinds in turn, shuffled. With ids (n, 1, H, W) of the pictures in the batch,
    half of the masks are object-shaped (`random_object_masks`). About 0.2 ms a mask at 128x128.
    """
    h, w = _size(size)
    if ids is not None and tuple(ids.shape) != (n, 1, h, w):
        raise ValueError(f"ids must be ({n}, 1, {h}, {w}) to go with the masks; got {_shape(ids)}.")
    kind = torch.randint(0, len(KINDS), (n,), generator=generator)
    out = torch.zeros(n, 1, h, w)
    for k, name in enumerate(KINDS):
        here = (kind == k).nonzero()[:, 0]
        if len(here) and name == "centre_box":
            share = float(_uniform(1, generator, (0.12, 0.4)))
            out[here] = centre_box(len(here), (h, w), area=share)
        elif len(here):
            out[here] = make(name, len(here), (h, w), generator)
    if ids is not None:
        shaped = torch.rand(n, generator=generator) < 0.5
        out = torch.where(shaped[:, None, None, None], random_object_masks(ids, generator), out)
    return out


def make(kind, n, size, generator, **options):
    """n masks of one kind by name (see KINDS)."""
    if kind not in KINDS:
        raise ValueError(f"Unknown mask kind {kind!r}; choose one of {', '.join(KINDS)}.")
    return globals()[kind](n, size, generator, **options)


# --- parts ------------------------------------------------------------------------------------------------

def _shape(x):
    return f"{tuple(x.shape)} {x.dtype}" if torch.is_tensor(x) else type(x).__name__


def _hw(x):
    return f"{x.shape[-2]}x{x.shape[-1]}"


def _size(size):
    h, w = (size, size) if isinstance(size, int) else size
    if h < 8 or w < 8:
        raise ValueError(f"masks need at least 8x8 pixels; got {h}x{w}.")
    return int(h), int(w)


def _check_area(area):
    if not 0.0 < area[0] <= area[1] < 1.0:
        raise ValueError(f"area must be a range of shares inside (0, 1), low first; got {area}.")


def _uniform(n, generator, bounds):
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(n, generator=generator)


def _box_sides(n, h, w, generator, area):
    share = _uniform(n, generator, area)
    ratio = torch.exp((torch.rand(n, generator=generator) * 2 - 1) * math.log(2.0))   # 1:2 ... 2:1
    ratio = torch.minimum(torch.maximum(ratio, share), 1 / share)      # so that both sides fit
    # One side is rounded first and the other follows, so that the share stays in its range.
    bh = (h * torch.sqrt(share * ratio)).round().clamp(1, h)
    bw = (share * h * w / bh).round().clamp(1, w)
    return bh, bw


def _boxes(h, w, top, left, bh, bw):
    y = torch.arange(h).view(1, 1, h, 1)
    x = torch.arange(w).view(1, 1, 1, w)
    top, left, bh, bw = (v.view(-1, 1, 1, 1) for v in (top, left, bh, bw))
    return ((y >= top) & (y < top + bh) & (x >= left) & (x < left + bw)).float()


def _strokes(h, w, rng, low, high):
    side, pixels = max(h, w), h * w
    mask = np.zeros((h, w), np.uint8)
    for trial in range(64):
        trial_mask = mask.copy()
        # Brushes get finer when broad ones have overshot, so that any range can be met.
        width = max(1, int(side * rng.uniform(0.06, 0.16) * 0.93 ** trial))
        x, y, angle = rng.uniform(0, w), rng.uniform(0, h), rng.uniform(0, 2 * math.pi)
        for _ in range(rng.integers(2, 8)):
            angle += rng.uniform(-1.2, 1.2)
            length = side * rng.uniform(0.08, 0.3)
            nx, ny = x + length * math.cos(angle), y + length * math.sin(angle)
            cv2.line(trial_mask, (int(x), int(y)), (int(nx), int(ny)), 1, width)
            cv2.circle(trial_mask, (int(nx), int(ny)), width // 2, 1, -1)
            x, y = nx, ny
        if trial_mask.sum() <= high * pixels:
            mask = trial_mask
        if mask.sum() >= low * pixels:
            return mask
    return mask if mask.any() else trial_mask
