"""DeGLaD: depth-guided layer decomposition (lesson 07; Parihar et al., ICCV 2025).

    depth map -> M_fg = depth < d, M_bg = depth >= d -> layer_fg, layer_bg -> fill the hole in the background

Depth is the course's: 0 = near, 1 = far (lib.depth). The comparison is strict, so a surface exactly at d is
background, and the two masks never share a pixel. What the paper leaves hard we can make soft: edges as the
picture shows them, more than two layers, sensor depth with holes, and help with choosing d.

Mind the near floor: it is nearer than d too, so it is in the foreground layer. That is right for occlusion,
and wrong for anybody who then restores "the foreground" over a shadow that the edit has thrown on that floor.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from lib import inpaint
from lib.depth import DepthMap, fill_holes
from lib.latents import check_image
from lib.masks import dilate, erode


@dataclass(frozen=True)
class Layers:
    """A picture cut at a depth.

    foreground   RGBA (B, 4, H, W), straight alpha; what is nearer than depth_value
    background   with its hole: RGBA (B, 4, H, W), alpha = 1 - mask; filled: RGB (B, 3, H, W)
    mask         fg_mask (B, 1, H, W), 1 = foreground, soft values where the edge crosses a pixel
    fill_mask    (B, 1, H, W), 1 = pixels of the background that nobody has seen
    depth_value  the threshold in [0, 1]: a float, or (B, 1, 1, 1) for one per picture
    holes        (B, 1, H, W), 1 = no depth was measured here, so its layer is a guess
    """
    foreground: torch.Tensor
    background: torch.Tensor
    mask: torch.Tensor
    fill_mask: torch.Tensor
    depth_value: float | torch.Tensor
    holes: torch.Tensor

    @property
    def filled(self) -> bool:
        return self.background.shape[1] == 3


def split(image, depth, at, soft=0.0, fill=None, grow=None, allow_empty=False, **fill_options) -> Layers:
    """Cut a picture in two at a depth: foreground = depth < at (strict), background = the rest.

    image   (B, 3, H, W) in [0, 1]
    depth   a DepthMap, or a tensor (B, 1, H, W) in [0, 1], 0 = near (NaN = not measured); the image's size
    at      0.5, "0.5", "2.4m" (metric DepthMap only), or a tensor with one threshold per picture
    soft    0: hard masks. Else the half width in pixels of the band around the edge in which alpha is
            estimated (`soft_edges`): 1 for exact depth, 2 to 3 for a model's or a sensor's
    fill    None: the background keeps its hole. Else "telea", "biharmonic", a function(image, fill_mask) or a
            pipeline (lib.inpaint.fill); fill_options go to it (prompt, steps, generator, ...)
    grow    pixels by which the hole is made larger before filling (see `fill_background`; default 1 or 0)

    Without filling, the layers sum to the picture: fg * alpha + bg * (1 - alpha) = image, bit for bit with
    hard masks. Raises ValueError when nothing, or everything, is nearer than `at` (unless allow_empty).
    """
    depth = as_depth_map(depth)
    _check_pair(image, depth)
    d = threshold(depth, at)
    mask = nearer(depth, d)
    if not allow_empty:
        _check_split(mask, depth, d)
    if soft:
        mask = soft_edges(image, depth, d, soft)
    foreground = torch.cat([image * (mask > 0), mask], 1)
    background = torch.cat([image * (mask < 1), 1 - mask], 1)
    cut = Layers(foreground, background, mask, (mask > 0).float(), d, 1 - depth.valid)
    if fill is None:
        return cut
    return fill_background(cut, fill, grow, **fill_options)


def nearer(depth, d) -> torch.Tensor:
    """The hard fg_mask (B, 1, H, W): depth < d, a sensor's holes filled (`depth.fill_holes`)."""
    return (fill_holes(as_depth_map(depth)).values < d).float()


def fill_background(cut: Layers, method="telea", grow=None, clean=True, **options) -> Layers:
    """Fill the hole that the foreground leaves in the background: RGBA with a hole -> RGB without.

    method: "telea", "biharmonic", a function(image, fill_mask), or a pipeline; see lib.inpaint.fill.
    grow: hard masks leave pixels along the edge that are part foreground, and a filling that starts from
    those spreads their colour. One pixel more takes them into the hole (default; biharmonic's error falls
    from 0.25 to 0.10), at the price that `recompose` no longer gives these pixels back. Soft masks hold them
        already: default 0.
    clean: take the background's colour out of soft edges, by solving image = alpha F + (1 - alpha) B for F;
    alpha is raised where no colour F could do that. The layers then recompose to the image also after
    filling. A shadow that the foreground throws is background, and stays.
    """
    if options.get("samples", 1) != 1:
        raise ValueError("a background has one filling: leave samples at 1, or call lib.inpaint.with_model.")
    image = recompose(cut)
    if grow is None:
        grow = 0 if ((cut.mask > 0) & (cut.mask < 1)).any() else 1
    hole = dilate((cut.mask > 0).float(), grow)
    if (hole.amin(dim=(1, 2, 3)) == 1).any():
        raise ValueError("the hole covers the whole picture: nothing is left to fill "
                         "from; use a smaller d or a smaller grow.")
    filled = image.clone()
    some = hole.amax(dim=(1, 2, 3)) > 0                  # all of them, unless allow_empty let others through
    if some.any():
        filled[some] = inpaint.fill(image[some], hole[some], method, **options)
    a, colour = cut.mask, cut.foreground[:, :3]
    if clean:
        rim = (a > 0) & (a < 1)
        a = torch.where(rim, torch.maximum(a, _least_alpha(image, filled)), a)
        solved = ((image - (1 - a) * filled) / a.clamp(min=1e-6)).clamp(0, 1)
        colour = torch.where(rim, solved, colour)
    return replace(cut, foreground=torch.cat([colour, a], 1), background=filled, mask=a, fill_mask=hole)


def _least_alpha(image, behind):
    """The smallest alpha with which some colour in [0, 1] over `behind` gives the image (B, 1, H, W)."""
    lighter = (image - behind) / (1 - behind).clamp(min=1e-6)
    darker = (behind - image) / behind.clamp(min=1e-6)
    return torch.maximum(lighter, darker).amax(1, keepdim=True).clamp(0, 1)


def recompose(cut) -> torch.Tensor:
    """Put layers together again -> RGB (B, 3, H, W).

    A `Layers` with a hole: the sum of the premultiplied layers. Filled, or a list of RGBA layers front to
    back (the last one may be RGB): each *over* what lies behind it.
    """
    if isinstance(cut, Layers):
        if not cut.filled:
            return sum(layer[:, :3] * layer[:, 3:] for layer in (cut.foreground, cut.background))
        cut = [cut.foreground, cut.background]
    if not cut:
        raise ValueError("no layers to recompose: give a Layers, or a list of RGBA layers, front to back.")
    out = torch.zeros_like(cut[-1][:, :3])
    for layer in reversed(cut):
        out = over(layer, out)
    return out


def over(layer, below) -> torch.Tensor:
    """RGBA with straight alpha over RGB (Porter and Duff 1984). An RGB layer hides everything."""
    if layer.shape[1] == 3:
        return layer
    return layer[:, :3] * layer[:, 3:] + below * (1 - layer[:, 3:])


def layers(image, depth, ats, soft=0.0, fill=None, **fill_options) -> list[torch.Tensor]:
    """Cut a picture into len(ats) + 1 RGBA layers (B, 4, H, W), front to back, that recompose to the picture.

    ats: thresholds from near to far, as in `split`. Layer k holds ats[k-1] <= depth < ats[k]. With soft edges
    the coverages are cumulative, so that compositing one *over* the next still gives the picture.
    fill: fills what the layers in front hide of the last one, which then is RGB (B, 3, H, W). What they hide
    of the layers between stays unknown: nobody can say how far those reach.
    """
    ats = list(ats)
    depth = as_depth_map(depth)
    _check_pair(image, depth)
    values = [threshold(depth, a) for a in ats]
    if not values or any(float(torch.as_tensor(b - a).min()) <= 0 for a, b in zip(values, values[1:])):
        raise ValueError(f"the thresholds must rise from near to far, at least one; got {ats}.")
    cover, last = [torch.zeros_like(depth.values)], torch.zeros_like(depth.values)
    for d in values:
        hard = nearer(depth, d)
        _check_split(hard, depth, d)
        if (hard == last).flatten(1).all(1).any():
            raise ValueError("no surface lies between two of the "
                             f"thresholds {ats}: one layer would be empty.")
        cover.append(torch.maximum(cover[-1], soft_edges(image, depth, d, soft) if soft else hard))
        last = hard
    cover.append(torch.ones_like(depth.values))
    out = []
    for before, now in zip(cover, cover[1:]):
        alpha = torch.where(before < 1, (now - before) / (1 - before).clamp(min=1e-6), torch.zeros_like(now))
        out.append(torch.cat([image * (alpha > 0), alpha.clamp(0, 1)], 1))
    if fill is not None:
        out[-1] = inpaint.fill(image, (cover[-2] > 0).float(), fill, **fill_options)
    return out


# --- edges ------------------------------------------------------------------------------------------------

def soft_edges(image, depth, d, radius=1.0) -> torch.Tensor:
    """Alpha of the foreground (B, 1, H, W), estimated in a band of `radius` pixels around the hard edge.

    Two kinds of edges want two answers. Where a surface *runs through* d (the floor), depth itself says how
    much of the pixel is nearer: 1/2 + (d - z) / slope. Where depth *jumps* (an object's outline), depth has
    no value between, and colour must say: with F and B the mean colours well inside each side, alpha is where
    the pixel lies between them, (I - B).(F - B) / |F - B|^2. That is trusted as far as F and B differ and the
    pixel lies on their line; the rest is the hard mask with a blur of half a pixel.
    """
    if not 0 < radius <= 32:
        raise ValueError(f"soft must be 0 (hard edges) or a band of up to 32 pixels; got {radius}.")
    depth = fill_holes(as_depth_map(depth))
    z = depth.values
    hard = (z < d).float()
    r = max(1, round(radius))
    slope, jump = slope_and_jump(z, d, r)
    through = (0.5 + (d - z) / slope.clamp(min=1e-5)).clamp(0, 1)
    band = dilate(hard, r) - erode(hard, r)
    alpha = torch.where(jump, colour_alpha(image, hard, radius), through)
    return torch.where(band > 0, alpha, hard)


def thin_parts(mask, radius=1) -> torch.Tensor:
    """Where a mask (B, 1, H, W) is thinner than about 2 * radius + 1 pixels, grown by one: legs, poles.

    What an opening (shrink by `radius`, grow again) loses is thin, on both sides of the edge: a gap between
    two legs is as thin as a leg."""
    hard = (mask > 0.5).float()
    lost = hard - dilate(erode(hard, radius), radius).minimum(hard)
    gaps = erode(dilate(hard, radius), radius).maximum(hard) - hard
    return dilate((lost + gaps > 0).float(), 1)


def refine_thin(image, depth, d, radius=1.0) -> torch.Tensor:
    """`soft_edges`, with closed-form matting where something thin stands before a jump: alpha (B, 1, H, W).

    A part one or two pixels wide has no inside, so the mean colour "well inside" that soft_edges wants is not
    there. Matting needs none: it asks only that colours lie on a line in every 3 x 3 window.
    """
    soft = soft_edges(image, depth, d, radius)
    z = fill_holes(as_depth_map(depth)).values
    hard, r = (z < d).float(), max(1, round(radius))
    jump = slope_and_jump(z, d, r)[1]
    band = (dilate(hard, r) - erode(hard, r)) * (dilate(thin_parts(hard), r - 1) * jump)
    return torch.where(band > 0, matte(image, soft, band), soft)


def matte(image, alpha, unknown, eps=1e-5) -> torch.Tensor:
    """Closed-form matting (Levin, Lischinski and Weiss 2008): alpha (B, 1, H, W) in the unknown pixels.

    alpha is kept where unknown (B, 1, H, W) is 0. In a 3 x 3 window the alphas should be a linear function of
    the colours; how far they are not, summed over all windows, is alpha^T L alpha, and its smallest value is
    one sparse linear system. Wants pixels of both kinds, known, beside the unknown ones.
    """
    from scipy.sparse.linalg import spsolve
    out = alpha.clone()
    for picture, a, free in zip(image, out[:, 0], (unknown[:, 0] > 0).cpu()):
        if free.any():
            i, j = free.flatten().numpy(), (~free).flatten().numpy()
            laplacian = _matting_laplacian(picture, free, eps)
            right = -laplacian[i][:, j] @ a.detach().cpu().flatten().double().numpy()[j]
            solved = np.atleast_1d(spsolve(laplacian[i][:, i].tocsc(), right))
            a[free.to(a.device)] = torch.from_numpy(solved).to(a).clamp(0, 1)
    return out


def _matting_laplacian(picture, free, eps):
    """L (H W, H W) of the windows that hold a free pixel; equations 12 and 13 of the paper."""
    from scipy.sparse import coo_matrix, eye
    colours = picture.detach().cpu().permute(1, 2, 0).double().numpy()
    h, w = colours.shape[:2]
    places = np.lib.stride_tricks.sliding_window_view(np.arange(h * w).reshape(h, w), (3, 3)).reshape(-1, 9)
    places = places[free.flatten().numpy()[places].any(1)]
    i = colours.reshape(-1, 3)[places]
    i = i - i.mean(1, keepdims=True)
    covariance = (np.einsum("kni,knj->kij", i, i) + eps * np.eye(3)) / 9
    each = np.eye(9) - (1 + np.einsum("kni,kij,kmj->knm", i, np.linalg.inv(covariance), i)) / 9
    pairs = np.repeat(places, 9, 1).ravel(), np.tile(places, (1, 9)).ravel()
    return coo_matrix((each.ravel(), pairs), (h * w, h * w)).tocsr() + 1e-7 * eye(h * w, format="csr")


def slope_and_jump(z, d, r):
    """How much depth changes per pixel along a surface (B, 1, H, W), and where it jumps across d instead.

    A jump, even one that a model has blurred over r pixels, is a range much larger than the smallest slope
    nearby explains; on a floor the two agree.
    """
    p = F.pad(z, (1, 1, 1, 1), mode="replicate")
    left, right, up, down = ((x - z).abs() for x in (p[..., 1:-1, :-2], p[..., 1:-1, 2:],
                                                     p[..., :-2, 1:-1], p[..., 2:, 1:-1]))
    slope = torch.minimum(left, right) + torch.minimum(up, down)     # the smaller side looks past a jump
    high, low = _highest(z, r), -_highest(-z, r)
    smallest = -_highest(-slope, r + 1)
    return slope, (high >= d) & (low < d) & (high - low > 4 * r * smallest + 0.03)


def _highest(x, r):
    return F.max_pool2d(F.pad(x, (r, r, r, r), mode="replicate"), 2 * r + 1, 1)


def colour_alpha(image, hard, radius, tau=0.05, off_line=5.0) -> torch.Tensor:
    """Alpha (B, 1, H, W) by colour alone: (I - B).(F - B) / |F - B|^2, trusted as far as F and B tell apart.

    F and B: mean colours of both sides of the hard mask, in a window of about `radius` pixels. tau: squared
    distance of F and B at which half is trusted; off_line: how much a colour off their line takes away.
    """
    # Pixels at the very edge are mixed, so they hardly count for F and B (but do where nothing else is near).
    wf, wb = (erode(m, 1) + 0.01 * m for m in (hard, 1 - hard))
    sigma = max(0.7, radius / 2)
    f, b = (blur(w * image, sigma) / blur(w, sigma).clamp(min=1e-6) for w in (wf, wb))
    line = f - b
    length2 = (line * line).sum(1, keepdim=True)
    alpha = (((image - b) * line).sum(1, keepdim=True) / length2.clamp(min=1e-6)).clamp(0, 1)
    miss = ((image - b - alpha * line) ** 2).sum(1, keepdim=True)
    trust = length2 / (length2 + tau + off_line * miss)
    return trust * alpha + (1 - trust) * blur(hard, 0.5)


def blur(x, sigma) -> torch.Tensor:
    """Gaussian blur of (B, C, H, W); sigma in pixels."""
    r = max(1, int(3 * sigma + 0.5))
    k = torch.exp(-torch.arange(-r, r + 1, dtype=x.dtype, device=x.device) ** 2 / (2 * sigma * sigma))
    k, c = k / k.sum(), x.shape[1]
    x = F.pad(x, (r, r, r, r), mode="replicate" if min(x.shape[-2:]) > r else "constant")
    x = F.conv2d(x, k.view(1, 1, 1, -1).expand(c, 1, 1, -1), groups=c)
    return F.conv2d(x, k.view(1, 1, -1, 1).expand(c, 1, -1, 1), groups=c)


# --- a depth map gone wrong ---------------------------------------------------------------------------------

SPOILS = ("shift", "scale", "blur", "noise")


def spoil(depth, kind, amount, generator=None) -> DepthMap:
    """The same DepthMap with one error of a known size, so that its effect can be measured (lesson 07).

    "shift"  everything farther by `amount` (in units of the scale 0..1; negative: nearer)
    "scale"  distances from the camera's near end times 1 + amount
    "blur"   Gaussian, sigma = amount pixels: depth runs smoothly from a thing to the wall behind it
    "noise"  normal, standard deviation = amount, smooth over about two pixels, as a model's errors are
    """
    depth = as_depth_map(depth)
    z = depth.values
    if kind not in SPOILS:
        raise ValueError(f"Unknown error {kind!r}; choose one of {', '.join(SPOILS)}.")
    if kind in ("blur", "noise") and amount < 0:
        raise ValueError(f"the size of {kind} must be 0 or more; got {amount}.")
    if kind == "shift":
        z = z + amount
    elif kind == "scale":
        z = z * (1 + amount)
    elif kind == "blur" and amount > 0:
        z = blur(z, amount)
    elif kind == "noise":
        drawn = blur(torch.randn(z.shape, generator=generator or torch.Generator().manual_seed(0)), 1.0)
        z = z + amount * (drawn / drawn.std()).to(z)
    return replace(depth, values=z.clamp(0, 1), source=f"{depth.source} with {kind} {amount:g}".strip())


# --- choosing d -------------------------------------------------------------------------------------------

def suggest(depth, method="otsu", n=1):
    """A threshold for `split` (a float in [0, 1]), or n > 1 of them (a list, near to far).

    "otsu"      the cut that makes both sides most alike inside (Otsu 1979; n > 1: multi-Otsu)
    "quantile"  equal shares of pixels: the median for n = 1
    "valley"    the deepest gap between two peaks of the histogram: where there are few surfaces
    Only measured pixels count. Every suggestion leaves something on both sides.
    """
    if method not in ("otsu", "quantile", "valley"):
        raise ValueError(f"Unknown method {method!r}; choose otsu, quantile or valley.")
    depth = as_depth_map(depth)
    z = depth.values[depth.valid > 0.5].cpu().double().numpy()
    low, high = (z.min(), z.max()) if z.size else (0.0, 0.0)
    _check_constant(low, high)
    if n < 1 or n > 4 or (method == "valley" and n > 1):
        raise ValueError(f"suggest gives 1 to 4 thresholds (valley: one), not n={n}.")
    if method == "quantile":
        cuts = [float(np.quantile(z, (k + 1) / (n + 1))) for k in range(n)]
    else:
        count, edges = np.histogram(z, 128 if n < 3 else 48, (low, high))
        cuts = [float(edges[i + 1]) for i in (_otsu(count, n) if method == "otsu" else _valley(count))]
    cuts = [min(max(c, float(np.nextafter(np.float32(low), np.float32(1)))), float(high)) for c in cuts]
    return cuts[0] if n == 1 else cuts


def _otsu(count, n):
    """Bins after which to cut, so that the variance between the n + 1 classes is largest (exact, by DP)."""
    p, x = count / count.sum(), np.arange(len(count))
    mass, moment = np.r_[0, p.cumsum()], np.r_[0, (p * x).cumsum()]
    m = mass[None] - mass[:, None]
    between = np.where(m > 0, (moment[None] - moment[:, None]) ** 2 / np.where(m > 0, m, 1), -np.inf)
    between[np.tril_indices(len(between))] = -np.inf      # a class starts before it ends
    best, back = between[0], []
    for _ in range(n):
        table = best[:, None] + between
        back.append(table.argmax(0))
        best = table.max(0)
    cuts, end = [], len(count)
    for choice in reversed(back):
        end = choice[end]
        cuts.append(int(end) - 1)
    return cuts[::-1]


def _valley(count):
    k = np.exp(-np.arange(-6, 7) ** 2 / 8)
    h = np.convolve(np.pad(count.astype(float), 6, mode="edge"), k / k.sum(), mode="valid")
    # Depth of a valley: how far below the lower one of the highest peaks on its two sides.
    left, right = np.maximum.accumulate(h), np.maximum.accumulate(h[::-1])[::-1]
    gap = np.minimum(left, right) - h
    if gap.max() < 0.05 * h.max():
        raise ValueError("the histogram of depth has one peak only, so "
                         "there is no valley; use otsu or quantile.")
    low = np.flatnonzero(gap >= gap.max() - 1e-9 * h.max())
    return [int(low[len(low) // 2])]      # the middle of an empty gap


def depth_at(depth, x, y, radius=1) -> float:
    """The depth under a click: median of the measured pixels within `radius` of column x, row y.

    The comparison is strict, so `at=depth_at(...)` puts the surface under the click into the *background*;
    add a little (0.02) to have it in the foreground.
    """
    depth = as_depth_map(depth)
    h, w = depth.size
    if len(depth.values) != 1:
        raise ValueError("depth_at looks at one picture: give a depth map with B = 1.")
    if not (0 <= x < w and 0 <= y < h):
        raise ValueError(f"the point ({x}, {y}) is outside the picture: x is 0..{w - 1}, y is 0..{h - 1}.")
    window = (0, 0, slice(max(0, int(y) - radius), int(y) + radius + 1),
              slice(max(0, int(x) - radius), int(x) + radius + 1))
    good = depth.values[window][depth.valid[window] > 0.5]
    if not len(good):
        return float(fill_holes(depth).values[0, 0, int(y), int(x)])
    return float(good.median())


# --- numbers ----------------------------------------------------------------------------------------------

def statistics(cut: Layers, depth=None) -> dict:
    """What a report says about a cut: shares of the picture, edges, and with `depth` each layer's range.

    fg_share, soft_share (pixels neither 0 nor 1), hole_share (to fill), unmeasured_share (no depth),
    edge_pixels (per picture), pieces (connected parts of the foreground, first picture).
    """
    m, hard = cut.mask, (cut.mask > 0.5).float()
    pieces, _ = cv2.connectedComponents(hard[0, 0].cpu().numpy().astype(np.uint8))
    out = {"threshold": _number(cut.depth_value), "fg_share": float(m.mean()),
           "soft_share": float(((m > 0) & (m < 1)).float().mean()), "hole_share": float(cut.fill_mask.mean()),
           "unmeasured_share": float(cut.holes.mean()),
           "edge_pixels": float((hard - erode(hard, 1)).sum() / len(m)), "pieces": pieces - 1}
    if depth is not None:
        depth = fill_holes(as_depth_map(depth))
        metric = depth.kind == "metric"
        z = depth.metres() if metric else depth.values
        for name, pick in (("fg", hard > 0), ("bg", hard == 0)):
            some = z[pick]
            if len(some):
                out[f"{name}_depth{'_m' if metric else ''}"] = [round(float(v), 4) for v in
                                                               (some.min(), some.median(), some.max())]
    return out


# --- parts ------------------------------------------------------------------------------------------------

def as_depth_map(depth) -> DepthMap:
    """DepthMap as it is; a tensor (B, 1, H, W) in [0, 1], 0 = near, as a relative one (NaN: unmeasured)."""
    if isinstance(depth, DepthMap):
        return depth
    if not torch.is_tensor(depth) or depth.dim() != 4 or depth.shape[1] != 1:
        shape = tuple(depth.shape) if hasattr(depth, "shape") else type(depth).__name__
        raise ValueError("depth must be a DepthMap, or a tensor (B, 1, H, "
                         f"W) in [0, 1] with 0 = near; got {shape}.")
    valid = torch.isfinite(depth)
    values = torch.where(valid, depth, torch.ones_like(depth)).float()
    if not valid.flatten(1).any(1).all():
        raise ValueError("the depth map has no measured pixel at all; give another one, or estimate depth.")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(f"depth must lie in [0, 1], 0 = near; this spans {low:.3g}..{high:.3g}. Metres "
                         "become a DepthMap by lib.depth.from_metric, "
                         "inverse depth by lib.depth.from_inverse.")
    return DepthMap(values, "relative", 0.0, 1.0, valid.float(), "tensor")


def threshold(depth: DepthMap, at):
    """`at` as a threshold in [0, 1]: a float, or a (B, 1, 1, 1) tensor."""
    if torch.is_tensor(at) and at.numel() > 1:
        if at.numel() != len(depth.values):
            raise ValueError(f"{at.numel()} thresholds do not fit {len(depth.values)} pictures.")
        if not (at.min() >= 0 and at.max() <= 1):
            raise ValueError("thresholds for a batch are numbers from 0 (near) to 1 (far).")
        return at.to(depth.values).view(-1, 1, 1, 1)
    return depth.at(at.item() if torch.is_tensor(at) else at)


def _check_pair(image, depth):
    check_image(image)
    if image.shape[-2:] != depth.values.shape[-2:]:
        (h, w), (a, b) = image.shape[-2:], depth.size
        raise ValueError(f"the depth is {a}x{b} but the image is {h}x{w} (height x width): use the depth of "
                         "this picture, brought to its size by DepthMap.resize.")
    if len(image) != len(depth.values):
        raise ValueError(f"{len(depth.values)} depth maps do not fit {len(image)} images.")


def _check_constant(low, high):
    if not high - low > 1e-6:
        raise ValueError(f"the depth is one value everywhere ({low:.3g}), so no threshold can split the "
                         "picture; give a depth map of this picture, or estimate depth.")


def _check_split(mask, depth, d):
    """Clear words when one side of the cut is empty."""
    for i, (m, z, v) in enumerate(zip(mask, depth.values, depth.valid)):
        share = float(m.mean())
        if 0 < share < 1:
            continue
        low, high = float(z[v > 0.5].min()), float(z[v > 0.5].max())
        _check_constant(low, high)
        cut = float(d.flatten()[i]) if torch.is_tensor(d) else float(d)
        span, said = f"{low:.2f}..{high:.2f}", f"{cut:.2f}"
        if depth.kind == "metric":
            near, far = (float(torch.as_tensor(x).flatten()[i if torch.is_tensor(x) and x.numel() > 1 else 0])
                         for x in (depth.near, depth.far))
            metres = [near + x * (far - near) for x in (low, high, cut)]
            span, said = f"{span} ({metres[0]:.2f}m..{metres[1]:.2f}m)", f"{said} ({metres[2]:.2f}m)"
        which = f" in picture {i}" if len(mask) > 1 else ""
        what = "nothing" if share == 0 else "everything"
        raise ValueError(f"{what} is nearer than d={said}{which}; the scene's depths span {span}, "
                         "choose d between.")


def _number(d):
    return d if isinstance(d, float) else [round(float(x), 4) for x in torch.as_tensor(d).flatten()]
