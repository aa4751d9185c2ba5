"""Filling holes (lesson 04): smooth, by copying, by another picture, by one network, and by diffusion.

`fill(image, fill_mask, method)` is the face of all of them (METHODS).

All functions take an image (B, 3, H, W) in [0, 1] and a fill_mask (B or 1, 1, H, W), 1 = to fill, and
return images in [0, 1] in which every known pixel (fill_mask == 0) is **exactly** the input's.
Soft mask values blend the filling with the image; what stands where fill_mask is 1 is never looked at.
"""
import functools
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from skimage.restoration import inpaint_biharmonic

from lib import diffusion, latents
from lib.masks import check_fill_mask, dilate


def composite(image, filled, fill_mask):
    """filled where fill_mask is 1, image where it is 0 (both bit for bit), a blend between."""
    return torch.lerp(image, filled.to(image), fill_mask.to(image).expand_as(image))


def telea(image, fill_mask, radius=3):
    """Fast marching: colours grow inwards along the border's level lines (Telea 2004, OpenCV).

    radius: pixels around a point that it looks at. 8-bit inside the hole, exact outside.
    """
    return _each(image, fill_mask, lambda picture, hole: _telea(picture, hole, radius))


def biharmonic(image, fill_mask):
    """The smoothest surface through the hole, Laplacian^2 = 0 (Damelin and Hoang 2018, scikit-image)."""
    return _each(image, fill_mask, _biharmonic)


def grey(image, fill_mask, value=0.5):
    """The hole painted one grey: the floor that every method has to beat."""
    _check(image, fill_mask)
    return composite(image, torch.full_like(image, value), fill_mask)


@torch.no_grad()
def with_model(pipe, image, fill_mask, prompt="", steps=50, guidance_scale=7.5, generator=None, samples=1,
               negative_prompt="", max_side=None):
    """Fill with a diffusion model: `samples` different fillings of each picture.

    pipe: a Stable-Diffusion-shaped pipeline. With a 9-channel U-Net (noisy latent 4, mask 1, masked latent 4)
    it must be a StableDiffusionInpaintPipeline and is called as it is; with a 4-channel U-Net the fill is
    made by `blended_latents`. prompt: a text, or one for each picture, that says what the *whole* picture
    shows. max_side: pictures with a longer side are worked on in small and only the filling is enlarged
    (default: 1.5 x the size the model was made for). Any size is padded to what the U-Net needs.

    Returns (B * samples, 3, H, W): all samples of picture 0 first. Known pixels are exact.
    """
    _check(image, fill_mask)
    channels = getattr(getattr(pipe, "unet", None), "config", {}).get("in_channels")
    if channels not in (4, 9):
        raise ValueError("with_model needs a pipeline whose U-Net "
                         f"takes 4 or 9 channels; this takes {channels}.")
    if channels == 9 and not hasattr(pipe, "mask_processor"):
        raise ValueError("a 9-channel U-Net needs its StableDiffusionInpaintPipeline: load 'mini-inpaint' "
                         "or 'sd15-inpaint'.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}.")
    prompts = _prompts(prompt, len(image))
    # Repeated here, picture by picture: the pipeline's own num_images_per_prompt tiles its masks in another
    # order than its prompts, which mixes pictures up as soon as there are two of them.
    prompts = [p for p in prompts for _ in range(samples)]
    image = image.repeat_interleave(samples, 0)
    fill_mask = fill_mask.expand(len(image) // samples, -1, -1, -1).repeat_interleave(samples, 0)
    small, hole = _to_model_size(pipe, image, fill_mask, max_side)
    h, w = small.shape[-2:]
    small, hole = _pad(pipe, small, hole)
    if channels == 9:
        out = pipe(prompt=prompts, negative_prompt=[negative_prompt] * len(prompts), image=small,
                   mask_image=(hole > 0).float(), height=small.shape[-2], width=small.shape[-1], strength=1.0,
                   num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator,
                   output_type="pt").images
    else:
        out = blended_latents(pipe, small, hole, prompts, steps, guidance_scale, generator, negative_prompt)
    out = out.to(image)[..., :h, :w]
    if not torch.isfinite(out).all():
        raise ValueError("the model gave values that are not finite; run it in float32.")
    if out.shape[-2:] != image.shape[-2:]:
        out = F.interpolate(out, image.shape[-2:], mode="bicubic", align_corners=False)
    return composite(image, out.clamp(0, 1), fill_mask)


@torch.no_grad()
def blended_latents(pipe, image, fill_mask, prompt="", steps=50, guidance_scale=7.5, generator=None,
                    negative_prompt=""):
    """Fill with an ordinary text-to-image model: after each step the known part is put back, re-noised.

    Blended latent diffusion (Avrahami et al. 2023), with the known latents noised to the level that the step
    has *arrived* at (the next timestep; clean after the last one), which is where the unknown part is too.
    image: (B, 3, H, W), sides multiples of the VAE's factor. Returns the decoded pictures, known part not
    yet put back in pixels.
    """
    # The hole is emptied first: the encoder looks a few pixels past a latent cell's edge.
    known = latents.encode(pipe, telea(image, (fill_mask > 0).float()))
    hole = F.adaptive_max_pool2d(fill_mask, known.shape[-2:]).to(known)   # any cell that the hole touches
    z = noise = torch.randn(known.shape, generator=generator).to(known)
    scheduler, text = diffusion.ddim(pipe, steps), diffusion.embed(pipe, _prompts(prompt, len(image)))
    none = diffusion.embed(pipe, [negative_prompt] * len(image)) if guidance_scale != 1.0 else None
    for t in scheduler.timesteps.tolist():
        output = diffusion.predict(pipe, z, t, text, none, guidance_scale)
        z, below = diffusion.ddim_step(scheduler, output, t, z), diffusion.previous(scheduler, t)
        z = put_back(scheduler, z, known, hole, below, "noised" if below >= 0 else "clean", noise)
    return latents.decode(pipe, z)


# --- PatchMatch: the picture repairs itself -----------------------------------------------------------------

def windows(picture, size):
    """(C, H, W) -> its patches (h * w, C * size * size), row by row; h = H - size + 1, w = W - size + 1."""
    return F.unfold(picture[None], size)[0].T.contiguous()


def clear_patches(hole, size):
    """(H, W) bool, True = hole -> (h, w) bool: which patches hold no hole at all, and may be copied from."""
    return F.max_pool2d(hole[None, None].float(), size, 1)[0, 0] == 0


def nearest_exhaustive(patches, wanted, allowed):
    """The true nearest allowed patch of every wanted one: (index (n,), squared distance (n,)). Cost: n times
    m.

    patches (N, D); wanted, allowed (N,) bool. PatchMatch is measured against this."""
    mine, others = patches[wanted], allowed.nonzero()[:, 0]
    best = [torch.cdist(some, patches[others]).min(dim=1) for some in mine.split(512)]
    nearest = others[torch.cat([b.indices for b in best])]
    return nearest, (mine - patches[nearest]).square().sum(1)


class PatchMatch:
    """Approximate nearest patches (Barnes et al. 2009), all places at once with array operations.

    patches (h * w, D): `windows` of one picture on a grid (h, w); wanted (h * w,) bool: places that look for
    a match; allowed (h * w,) bool: places that may be one. `field` holds the index of each place's match,
    `distance` the squared distance of the wanted ones. trust (h * w, D): weights of the values of a patch, or
    None. near: what a match from the other end of the picture costs more than one from nearby, as a squared
    difference per value. The original goes over the picture pixel by pixel; here every place asks its
    neighbours at the same moment, which needs longer strides (1 and 4) to carry a good match as far.
    """

    def __init__(self, patches, grid, wanted, allowed, generator, field=None, trust=None, near=0.0):
        self.patches, self.grid, self.allowed, self.generator = patches, grid, allowed, generator
        self.places = wanted.nonzero()[:, 0]
        self.y, self.x = self.places // grid[1], self.places % grid[1]
        self.mine = patches[self.places]
        self.trust = None if trust is None else trust[self.places]
        self.near = near * patches.shape[1] / (grid[0] ** 2 + grid[1] ** 2)
        self.others = allowed.nonzero()[:, 0]
        if not len(self.others):
            raise ValueError("no patch is free of the hole: use a smaller patch size or a smaller hole.")
        drawn = self.others[torch.randint(len(self.others), (len(patches),), generator=generator)]
        self.field = drawn if field is None else torch.where(allowed[field], field, drawn)
        self.distance = self._distance(self.field[self.places])

    def _distance(self, candidate):
        far = (self.mine - self.patches[candidate]).square_()
        far = (far if self.trust is None else far.mul_(self.trust)).sum(1)
        if self.near:
            y, x = candidate // self.grid[1], candidate % self.grid[1]
            far += self.near * ((y - self.y) ** 2 + (x - self.x) ** 2)
        return far.masked_fill(~self.allowed[candidate], float("inf"))

    def _try(self, y, x):
        """Take the candidates (y, x) wherever they are better."""
        h, w = self.grid
        candidate = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
        far = self._distance(candidate)
        better = far < self.distance
        self.field[self.places[better]] = candidate[better]
        self.distance = torch.where(better, far, self.distance)

    def propagate(self, stride):
        """My neighbour's match, moved by the way from it to me, is a good guess for mine."""
        h, w = self.grid
        for dy, dx in ((stride, 0), (-stride, 0), (0, stride), (0, -stride)):
            beside = (self.y + dy).clamp(0, h - 1) * w + (self.x + dx).clamp(0, w - 1)
            theirs = self.field[beside]
            self._try(theirs // w - dy, theirs % w - dx)

    def search(self):
        """Random places around my match, in windows that halve from the whole picture to one pixel."""
        h, w = self.grid
        radius = max(h, w)
        while radius >= 1:
            now = self.field[self.places]
            offset = (torch.rand(2, len(now), generator=self.generator) * 2 - 1) * radius
            dy, dx = offset.round().long()
            self._try(now // w + dy, now % w + dx)
            radius //= 2

    def run(self, iterations=3):
        for _ in range(iterations):
            for stride in (4, 1):
                self.propagate(stride)
            self.search()
        return self


def vote(patches, match, grid, size, trust=None, sharp=2.0):
    """Every pixel becomes the weighted mean of what the matches of all patches over it propose: (C, H, W).

    Weights fall with the distance, exp(-sharp d / q) with q the 75 % quantile of the distances (Wexler et al.
    2007), and with a patch's own trust (h * w,)."""
    h, w = grid[0] + size - 1, grid[1] + size - 1
    usual = match.distance.quantile(0.75).clamp(min=1e-8)
    weight = torch.exp(-sharp * match.distance / usual).clamp(min=1e-6)
    weight = weight if trust is None else weight * trust[match.places]
    ones = torch.ones(len(weight), size * size)
    columns = torch.zeros(len(patches), patches.shape[1] + size * size)
    columns[match.places] = torch.cat([patches[match.field[match.places]], ones], 1) * weight[:, None]
    summed = F.fold(columns.T[None], (h, w), size)[0]
    return summed[:-1] / summed[-1:].clamp(min=1e-20)


def shrink(image, hole, factor=2):
    """Half the size without looking into the hole: means over known pixels. A pixel is hole where less than
    half of it is known, so that thin holes do not swallow a small picture."""
    known = 1 - hole
    size = [max(1, -(-s // factor)) for s in image.shape[-2:]]
    total = F.adaptive_avg_pool2d(image * known, size)
    share = F.adaptive_avg_pool2d(known, size)
    return total / share.clamp(min=1e-6), (share < 0.5).to(hole)


def patchmatch(image, fill_mask, size=5, iterations=2, rounds=4, coarsest=32, near=0.15, generator=None):
    """Fill with patches of the picture itself: PatchMatch on an image pyramid, with voting.

    The smallest picture is filled ring by ring (`peel`). Then, from small to large: find for each patch that
    touches the hole the most similar patch of the known part, let all matches vote on the hole's pixels,
    `rounds` times. The small levels settle what goes where, the large ones the detail (Barnes et al. 2009,
    Wexler et al. 2007). generator: for the random search (seed 0 by default).
    """
    _check(image, fill_mask)
    generator = generator or torch.Generator("cpu").manual_seed(0)
    masks = (fill_mask > 0).float().expand(len(image), -1, -1, -1)
    out = [_patchmatch_one(i[None], m[None], size, iterations, rounds, coarsest, near, generator)
           for i, m in zip(image.cpu().float(), masks.cpu())]
    return composite(image, torch.cat(out).to(image), fill_mask)


def _patchmatch_one(image, hole, size, iterations, rounds, coarsest, near, generator):
    levels = [(image * (1 - hole), hole)]
    while min(levels[-1][0].shape[-2:]) >= 2 * coarsest:
        levels.append(shrink(*levels[-1]))
    while size > 1 and not _clear(levels[0][1], size):
        size -= 2
    levels = [level for level in levels if _clear(level[1], size)]
    now, match = peel(*levels[-1], size, near), None
    for picture, mask in reversed(levels):
        if match is not None:                                             # found in small, twice as large
            now = F.interpolate(now, picture.shape[-2:], mode="bilinear")
            match = _Level(now, picture, mask, size, near, generator, match.larger(picture.shape[-2:]))
            match.vote(2.0)
        else:
            match = _Level(now, picture, mask, size, near, generator)
        for turn in range(rounds):
            match.search(iterations)
            now = match.vote(8.0 if turn == rounds - 1 else 2.0)
    return now.clamp(0, 1)


def _clear(hole, size):
    return min(hole.shape[-2:]) >= size and bool(clear_patches(hole[0, 0] > 0, size).any())


class _Level:
    """One picture of the pyramid: the current filling, and every patch's match."""

    def __init__(self, now, picture, mask, size, near, generator, field=None):
        self.now, self.mask, self.field = composite(picture, now, mask), mask, field
        self.size, self.near, self.generator = size, near, generator
        allowed = clear_patches(mask[0, 0] > 0, size)
        self.grid, self.allowed = allowed.shape, allowed.flatten()
        # Known pixels count 1, those of the hole less and less towards its middle: what is known leads.
        depth = cv2.distanceTransform((mask[0, 0].numpy() > 0).astype(np.uint8), cv2.DIST_L2, 3)
        trust = torch.from_numpy(np.maximum(1.3 ** -depth, 1e-3).astype(np.float32))
        self.trust = windows(trust[None], size)
        self.match = self._match()

    def _match(self):
        return PatchMatch(windows(self.now[0], self.size), self.grid, ~self.allowed, self.allowed,
                          self.generator, self.field, self.trust.repeat(1, 3), self.near)

    def search(self, iterations):
        self.match = self._match().run(iterations)
        self.field = self.match.field

    def vote(self, sharp):
        voted = vote(self.match.patches, self.match, self.grid, self.size, self.trust.mean(1), sharp)
        self.now = composite(self.now, voted[None], self.mask)
        return self.now

    def larger(self, size):
        """The field for a picture of this size (H, W), about twice as large: match of the parent, doubled."""
        h, w = size[0] - self.size + 1, size[1] - self.size + 1
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        parent = (y // 2).clamp(max=self.grid[0] - 1) * self.grid[1] + (x // 2).clamp(max=self.grid[1] - 1)
        to = self.field[parent]
        to_y, to_x = (to // self.grid[1]) * 2 + y % 2, (to % self.grid[1]) * 2 + x % 2
        return (to_y.clamp(max=h - 1) * w + to_x.clamp(max=w - 1)).flatten()


def peel(image, hole, size, near=0.0):
    """Fill one small picture ring by ring from the hole's edge: each pixel is copied from the centre of the
    known patch that agrees best with what is known around it (Efros and Leung 1999). Exhaustive: for small
    pictures."""
    image, unknown = image.clone(), hole[0, 0] > 0
    allowed = clear_patches(unknown, size)
    h, w = allowed.shape
    source, spots = windows(image[0], size)[allowed.flatten()], allowed.nonzero().float()
    while unknown.any():
        ring = (unknown & (F.max_pool2d((~unknown)[None, None].float(), 3, 1, 1)[0, 0] > 0)).nonzero()
        top, left = (ring - size // 2).clamp(min=0).minimum(torch.tensor([h - 1, w - 1])).T
        patch = windows(image[0], size)[top * w + left]
        known = windows((~unknown)[None].float(), size)[top * w + left].repeat(1, 3)
        gap = known @ source.square().T - 2 * (known * patch) @ source.T
        away = torch.cdist(torch.stack([top, left], 1).float(), spots).square() / (h * h + w * w)
        gap += near * known.sum(1, keepdim=True) * away
        place = (ring[:, 0] - top) * size + ring[:, 1] - left
        best = source[gap.argmin(1)].view(len(ring), 3, -1)
        image[0, :, ring[:, 0], ring[:, 1]] = best[torch.arange(len(ring)), :, place].T
        unknown[ring[:, 0], ring[:, 1]] = False
    return image


# --- scene completion: another picture repairs this one ---------------------------------------------------

class SceneLibrary:
    """A database of pictures, kept as plain data and thumbnails: rooms of the Miniature's *training* split.

    thumbs (2 n, 3, size, size): n rooms, then the same rooms in a mirror. A room is rendered at full size
    only when it is chosen. make(seed) -> Scene; by default ordinary rooms and lesson 03's simple ones in
    turn."""

    def __init__(self, n=1000, size=32, make=None, start=0):
        from lib import scenes
        if n < 1:
            raise ValueError(f"a library needs at least one room; n is {n}.")
        make = make or (lambda seed: (diffusion.teach_scene if seed % 2 else scenes.sample)(seed))
        self.rooms, self.size = [make(seed) for seed in scenes.seeds("train", n, start)], size
        thumbs = scenes.render(self.rooms, size=size, samples=1, shadow_rays=1).rgb
        self.thumbs = torch.cat([thumbs, thumbs.flip(-1)])

    def __len__(self):
        return len(self.thumbs)

    def picture(self, index, size):
        """Entry `index` (mirrored from len / 2 on), rendered at size (H, W): (1, 3, H, W)."""
        from lib import scenes
        mirrored, index = divmod(int(index), len(self.rooms))
        x = scenes.render(self.rooms[index], size=size).rgb
        return x.flip(-1) if mirrored else x


def descriptor(image):
    """What a scene looks like from afar, (B, 9, H, W): colour, and how light changes across and down."""
    grey = image.mean(1, keepdim=True)
    gx = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1))
    gy = F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    ways = (gx, -gx, gy, -gy, gx + gy, -gx - gy)
    return torch.cat([image, *(2 * way.clamp(min=0) for way in ways)], 1)


def similar_scenes(image, fill_mask, library, k=4):
    """The k entries of the library most like a picture's known part: (indices (k,), distances (k,))."""
    small, hole = image, (fill_mask > 0).float()
    factor = max(1, max(image.shape[-2:]) // library.size)
    small, hole = shrink(small, hole, factor)
    small = F.interpolate(small, (library.size,) * 2, mode="bilinear")
    hole = F.adaptive_max_pool2d(hole, (library.size,) * 2)
    inside = F.max_pool2d(hole, 3, 1, 1)                                  # gradients at the rim look inside
    known = (1 - inside) if (inside < 1).any() else (1 - hole)
    gap = (descriptor(library.thumbs) - descriptor(small)).square() * known
    distance = gap.sum((1, 2, 3)) / known.sum().clamp(min=1)
    order = distance.argsort()[:k]
    return order, distance[order]


def align(candidate, image, fill_mask, reach=12, context=12):
    """Shift a candidate so that it fits best around the hole: (shifted (1, 3, H, W), error, (dy, dx))."""
    hole = (fill_mask > 0).float()
    ring = dilate(hole, context) - hole
    ring = ring if ring.any() else 1 - hole
    best = (None, float("inf"), (0, 0))
    wide = F.pad(candidate, (reach,) * 4, mode="replicate")
    h, w = image.shape[-2:]
    for dy in range(-reach, reach + 1, 2):
        for dx in range(-reach, reach + 1, 2):
            moved = wide[..., reach - dy:reach - dy + h, reach - dx:reach - dx + w]
            error = float(((moved - image).square() * ring).sum() / (3 * ring.sum()))
            if error < best[1]:
                best = (moved, error, (dy, dx))
    return best[0].clone(), best[1], best[2]


def cheapest_seam(image, candidate, fill_mask, band=8):
    """Where to cut over from the picture to the candidate: (1, 1, H, W), 1 = take the candidate.

    A minimum cut in the graph of the pixels within `band` of the hole: going over between two neighbours
    costs how much the two pictures differ there, so the cut runs where it shows least (Kwatra et al. 2003;
    Hays and Efros 2007). It lies *around* the hole: up to `band` known pixels may be replaced.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow
    hole = fill_mask[0, 0].cpu().numpy() > 0
    near = (dilate((fill_mask > 0).float(), band)[0, 0].cpu().numpy() > 0)
    cost = (image - candidate).abs().sum(1)[0].cpu().numpy()
    cost[hole] = 0
    number = np.cumsum(near & ~hole).reshape(hole.shape) + 1              # 0: all that stays, 1: the hole
    number[~near], number[hole] = 0, 1
    pairs = [(number[:, 1:], number[:, :-1], cost[:, 1:] + cost[:, :-1]),
             (number[1:], number[:-1], cost[1:] + cost[:-1])]
    a, b, c = (np.concatenate([p[i].ravel() for p in pairs]) for i in range(3))
    keep = a != b
    a, b, c = a[keep], b[keep], 1 + np.rint(1000 * c[keep]).astype(np.int64)
    n = int(number.max()) + 1
    graph = coo_matrix((np.r_[c, c], (np.r_[a, b], np.r_[b, a])), (n, n)).tocsr().astype(np.int32)
    rest = graph - maximum_flow(graph, 1, 0).flow
    rest.data = np.maximum(rest.data, 0)
    rest.eliminate_zeros()
    taken = np.zeros(n, bool)
    taken[breadth_first_order(rest, 1, return_predecessors=False)] = True
    return torch.from_numpy(taken[number])[None, None].float()


def poisson(image, candidate, fill_mask, clamp=True):
    """Inside the mask the candidate's *gradients*, on its border the image's colours (Perez et al. 2003).

    One picture each; solves the discrete Poisson equation for each colour. Takes the candidate's light and
    colour away and keeps its detail."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import splu
    inside = fill_mask[0, 0].cpu().numpy() > 0
    h, w = inside.shape
    number = np.full((h, w), -1)
    number[inside] = np.arange(inside.sum())
    ys, xs = np.nonzero(inside)
    known, source = (_hwc(t[0]) for t in (image, candidate))
    degree, right = np.zeros(len(ys)), np.zeros((len(ys), 3))
    rows, columns = [], []
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        y, x = ys + dy, xs + dx
        there = (y >= 0) & (y < h) & (x >= 0) & (x < w)
        me, y, x = np.nonzero(there)[0], y[there], x[there]
        degree[me] += 1
        right[me] += source[ys[me], xs[me]] - source[y, x]
        unknown = inside[y, x]
        rows.append(me[unknown])
        columns.append(number[y, x][unknown])
        right[me[~unknown]] += known[y, x][~unknown]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    n = np.arange(len(ys))
    system = coo_matrix((np.r_[degree, -np.ones(len(rows))], (np.r_[n, rows], np.r_[n, columns]))).tocsc()
    out = known.copy()
    out[inside] = splu(system).solve(right)
    solved = torch.from_numpy(out).permute(2, 0, 1)[None].to(image)
    return solved.clamp(0, 1) if clamp else solved


def scene_completion(image, fill_mask, library=None, k=4, band=0):
    """Fill from the most similar picture of a database (Hays and Efros 2007): find, align, cut, blend.

    library: a `SceneLibrary` (default: one of 1000 rooms, made once). k: how many entries are tried; the one
    that fits best around the hole is taken. band: how far the cut may go *outside* the hole
    (`cheapest_seam`); with the default, 0, it stays at the hole's edge and every known pixel is kept.
    """
    _check(image, fill_mask)
    library = library or default_library()
    pictures, masks = image.cpu().float(), fill_mask.cpu().expand(len(image), -1, -1, -1)
    out = []
    for one, mask in zip(pictures.split(1), masks.split(1)):
        empty = telea(one, (mask > 0).float())                            # nothing looks into the hole
        order, _ = similar_scenes(one, mask, library, k)
        tries = [align(library.picture(i, one.shape[-2:]), empty, mask) for i in order]
        best = min(tries, key=lambda t: t[1])[0]
        take = cheapest_seam(empty, best, mask, band) if band else (mask > 0).float()
        out.append(poisson(empty, best, take))
    made = torch.cat(out).to(image)
    return made if band else composite(image, made, fill_mask)


@functools.lru_cache(maxsize=1)
def default_library():
    """The database of `scene_completion`: 1000 rooms (a few seconds)."""
    return SceneLibrary()

# --- the network of before diffusion: one look, one answer --------------------------------------------------

class Gated(nn.Module):
    """Gated convolution (Yu et al. 2019): feature * sigmoid(gate), so that the network learns per place and
    channel how far to trust what it sees: nothing in the hole at first, more layer by layer."""

    def __init__(self, cin, cout, stride=1, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(cin, 2 * cout, 3, stride, dilation, dilation)

    def forward(self, x):
        feature, gate = self.conv(x).chunk(2, dim=1)
        return F.silu(feature) * torch.sigmoid(gate)


class FillNet(nn.Module):
    """A context network: a small U-Net of gated convolutions that fills a hole in one pass.

    forward(image (B, 3, H, W) in [0, 1], fill_mask (B, 1, H, W)) -> (B, 3, H, W) in [0, 1]; sides multiples
    of 8. What stands in the hole is not looked at. Dilated convolutions at 1/8 of the size see the whole
    picture. 0.34 M parameters. Trained by `python -m lib.train fillnet` with reconstruction losses and two
    discriminators, one for the whole picture and one for a window at the hole (Iizuka et al. 2017: globally
    and locally consistent).
    """

    def __init__(self, widths=(16, 32, 64), dilations=(2, 4, 8)):
        super().__init__()
        self.config = {"widths": list(widths), "dilations": list(dilations)}
        a, b, c = widths
        self.enter = Gated(16, a)                                         # 2x2 pixels folded into channels
        self.down = nn.ModuleList([Gated(a, b, 2), Gated(b, c, 2)])
        self.middle = nn.ModuleList(Gated(c, c, 1, d) for d in dilations)
        self.up = nn.ModuleList([Gated(c + b, b), Gated(b + a, a)])
        self.leave = nn.Conv2d(a, 12, 3, 1, 1)

    def forward(self, image, fill_mask):
        if image.shape[-1] % 8 or image.shape[-2] % 8:
            raise ValueError("FillNet takes sides that are multiples of "
                             f"8; this picture is {tuple(image.shape)}.")
        hole = (fill_mask > 0).to(image).expand(len(image), -1, -1, -1)
        x = F.pixel_unshuffle(torch.cat([(image * 2 - 1) * (1 - hole), hole], 1), 2)
        half = self.enter(x)
        quarter = self.down[0](half)
        x = self.down[1](quarter)
        for layer in self.middle:
            x = x + layer(x)
        x = self.up[0](torch.cat([F.interpolate(x, scale_factor=2.0), quarter], 1))
        x = self.up[1](torch.cat([F.interpolate(x, scale_factor=2.0), half], 1))
        return torch.sigmoid(F.pixel_shuffle(self.leave(x).float(), 2))

    def save(self, folder):
        """Write model.safetensors (half precision) and config.json."""
        from safetensors.torch import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().half().contiguous() for k, v in self.state_dict().items()},
                  folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")

    @classmethod
    def load(cls, folder, device="cpu"):
        """The network of a folder, float32, frozen. FileNotFoundError, with the way out, if it is missing."""
        from safetensors.torch import load_file
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}: get the whole repository again, or make it "
                                        "with `python -m lib.train fillnet export --only fillnet`")
        net = cls(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return net.to(device).eval().requires_grad_(False)


# --- diffusion in pixels: one unconditional network, three ways to hold the known part --------------------

def put_back(scheduler, x, x0, fill_mask, t, known="noised", noise=None):
    """x at noise level t with its known part replaced: m * x_0' + (1 - m) * x, with m = 1 - fill_mask.

    known="clean": x_0' = x_0, for networks that were trained so. known="noised": x_0' = q_sample(x_0, t,
    noise), which is what a network trained on fully noised pictures expects. A negative t is the clean
    end."""
    if known not in ("clean", "noised"):
        raise ValueError(f'known must be "clean" or "noised", not {known!r}.')
    there = x0 if known == "clean" else diffusion.q_sample(scheduler, x0, t, noise)
    m = 1 - fill_mask.to(x)
    return m * there + (1 - m) * x


def repaint_step(scheduler, output, t, x, x0, fill_mask, generator=None, eta=1.0, known="noised"):
    """One reverse step with the known part put back at the level it arrives at. (RePaint eq. 8.)

    Equal to `RePaintScheduler.step(output, t, x, x0, 1 - fill_mask, generator).prev_sample`, which draws one
    noise and uses it for both parts, with known="noised". scheduler: from `diffusion.ddim`; x, x0 in [-1, 1];
    eta=1 is DDPM."""
    below = diffusion.previous(scheduler, int(t))
    a, a_prev = diffusion.alpha_at(scheduler, int(t)).to(x), diffusion.alpha_at(scheduler, below).to(x)
    clean, eps = diffusion.split_prediction(scheduler, output, a, x)
    if scheduler.config.clip_sample:
        clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    noise = torch.randn(x.shape, generator=generator).to(x)
    unknown = a_prev.sqrt() * clean + (1 - a_prev - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
    return put_back(scheduler, unknown, x0, fill_mask, below, known, noise)


def forward_jump(scheduler, x, levels, generator=None):
    """Diffuse x on: for each t of `levels`, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. (RePaint eq.
    1.)

    Equal to `RePaintScheduler.undo_step(x, t, generator)` with levels = t, ..., t + stride - 1."""
    for t in levels:
        x = diffusion.q_step(x, scheduler.betas[t].to(x), torch.randn(x.shape, generator=generator).to(x))
    return x


def repaint_times(timesteps, length=10, times=3):
    """RePaint's walk over the noise levels: ("down", i) steps from level i, ("up", i) goes back up to level
    i.

    timesteps: the run's n levels, high to low; index i counts from the lowest, 0. Every `length` steps the
    walk goes back up `length` levels, until each stretch has been walked `times` times. times=1: straight
    down."""
    n = len(timesteps)
    left = {j: times - 1 for j in range(0, n - length, length)}
    walk, i = [], n - 1
    while i >= 0:
        walk.append(("down", i))
        if left.get(i, 0) > 0:
            left[i] -= 1
            walk += [("up", i + k) for k in range(length)]
            i += length
        i -= 1
    return walk


@torch.no_grad()
def fill_pixels(eps, scheduler, image, fill_mask, steps=50, known="noised", jump=(10, 1), eta=1.0,
                generator=None, on_step=None):
    """Fill with an unconditional pixel-space network, at its own size.

    eps: function (x (B, 3, H, W) in about [-1, 1], t) -> predicted noise. known: "clean" or "noised"
    (`put_back`). jump: (length, times) of RePaint's resampling; times=1 is none. on_step(t, x) sees every
    reverse step. Returns pictures in [0, 1], known pixels exact.
    """
    _check(image, fill_mask)
    length, times = jump
    if length < 1 or times < 1:
        raise ValueError(f"jump is (length, times), both at least 1; got {jump}.")
    scheduler = diffusion.ddim(scheduler, steps)
    levels = scheduler.timesteps.tolist()[::-1]                           # levels[0] is the lowest
    x0, hole = image * 2 - 1, (fill_mask > 0).to(image)
    x0 = x0 * (1 - hole)                                                  # nothing looks into the hole
    x = torch.randn(image.shape, generator=generator).to(image)
    x = put_back(scheduler, x, x0, hole, levels[-1], known, x)
    for way, i in repaint_times(levels, length, times):
        t = levels[i]
        if way == "down":
            output = eps(x, t)
            x = repaint_step(scheduler, output, t, x, x0, hole, generator, eta, known)
            if on_step:
                on_step(t, x)
        else:
            below = max(diffusion.previous(scheduler, t), -1)
            x = forward_jump(scheduler, x, range(below + 1, t + 1), generator)
    return composite(image, (x / 2 + 0.5).clamp(0, 1), fill_mask)


def with_pixels(eps, scheduler, image, fill_mask, size=64, samples=1, generator=None, **options):
    """`fill_pixels` for any picture: shrunk to the network's size, filled `samples` times, and the filling
    enlarged.

    Returns (B * samples, 3, H, W), all samples of picture 0 first; known pixels are exact, the filling has
    only the detail of size x size pixels."""
    _check(image, fill_mask)
    if samples < 1:
        raise ValueError(f"samples must be at least 1; got {samples}.")
    image = image.repeat_interleave(samples, 0)
    fill_mask = fill_mask.expand(len(image) // samples, -1, -1, -1).repeat_interleave(samples, 0)
    small, hole = _to_side(image, (fill_mask > 0).float(), size)
    out = fill_pixels(eps, scheduler, small, hole, generator=generator, **options)
    out = F.interpolate(out, image.shape[-2:], mode="bicubic", align_corners=False)
    return composite(image, out.clamp(0, 1), fill_mask)


def _to_side(image, hole, size):
    """To size x size without looking into the hole."""
    emptied = telea(image, hole)
    if image.shape[-2:] == (size, size):
        return emptied, hole
    return (F.interpolate(emptied, (size, size), mode="bilinear", antialias=True).clamp(0, 1),
            F.adaptive_max_pool2d(hole, size))

# --- all of them by name ----------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def load_fillnet(folder=None):
    """The shipped context network (data/models/fillnet), or that of a folder; read once."""
    from lib import setup
    return FillNet.load(folder or setup.data_dir() / "models" / "fillnet")


@torch.no_grad()
def fillnet(image, fill_mask, net=None):
    """One pass through the context network, where it lies (the shipped one: on the CPU): one answer. Any size
    (padded to a multiple of 8)."""
    _check(image, fill_mask)
    net = net or load_fillnet()
    weight = next(net.parameters())
    h, w = image.shape[-2:]
    extra = (0, -w % 8, 0, -h % 8)
    hole = F.pad((fill_mask > 0).to(weight).expand(len(image), -1, -1, -1), extra)
    out = net(F.pad(image.to(weight), extra, mode="replicate"), hole)[..., :h, :w]
    return composite(image, out, fill_mask)


@functools.lru_cache(maxsize=1)
def teaching_model():
    """(eps(x, t), scheduler) of lesson 03's U-Net, unconditional, 64 x 64: on the CPU, wherever x lies."""
    net = diffusion.load_teach()
    return (lambda x, t: net(x.cpu().float(), int(t)).to(x)), diffusion.teach_scheduler()


def _pixels(known, jump):
    """A filling method with the teaching U-Net."""
    def method(image, fill_mask, steps=50, samples=1, generator=None, jump=jump, model=None):
        eps, scheduler = model or teaching_model()
        return with_pixels(eps, scheduler, image, fill_mask, steps=steps, samples=samples,
                           generator=generator, known=known, jump=jump)
    return method


@functools.lru_cache(maxsize=1)
def _latent_model(name):
    from lib import models
    return models.load(name, quiet=True)


def latent(image, fill_mask, pipe="mini-inpaint", **options):
    """`with_model` by the name of a pipeline (read once) or with the pipeline itself."""
    return with_model(_latent_model(pipe) if isinstance(pipe, str) else pipe, image, fill_mask, **options)


#: Methods by name. The first three need nothing; "patchmatch" the picture alone; "scenes" a database; the
#: others a model that ships with the course. Those from "ddpm-clean" on are random and take samples=,
#: generator=, steps=.
METHODS = {"grey": grey, "telea": telea, "biharmonic": biharmonic, "patchmatch": patchmatch,
           "scenes": scene_completion, "fillnet": fillnet, "ddpm-clean": _pixels("clean", (10, 1)),
           "ddpm-noised": _pixels("noised", (10, 1)), "repaint": _pixels("noised", (10, 3)), "latent": latent}


def fill(image, fill_mask, method="telea", **options):
    """Fill by a method's name (METHODS), by a callable(image, fill_mask), or by a diffusers pipeline.

    image (B, 3, H, W) in [0, 1], fill_mask (B or 1, 1, H, W), 1 = to fill -> (B, 3, H, W), or (B * samples,
    ...) from the random methods. Known pixels are exact. options go to the method. ValueError says what does
    not fit.
    """
    _check(image, fill_mask)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"Unknown filling method {method!r}; choose one of {', '.join(METHODS)}, "
                             "or give a pipeline or a function(image, fill_mask).")
        return METHODS[method](image, fill_mask, **options)
    if hasattr(method, "unet"):
        return with_model(method, image, fill_mask, **options)
    if not callable(method):
        raise ValueError(f"method must be a name, a function or a pipeline; got {type(method).__name__}.")
    filled = method(image, fill_mask, **options)
    if not torch.is_tensor(filled) or filled.shape != image.shape:
        raise ValueError(f"the filling function must return images like its input {tuple(image.shape)}.")
    return composite(image, filled.to(image), fill_mask)


# --- parts ------------------------------------------------------------------------------------------------

def _check(image, fill_mask):
    latents.check_image(image)
    check_fill_mask(fill_mask, image)


def _each(image, fill_mask, method):
    _check(image, fill_mask)
    masks = (fill_mask > 0).expand(len(image), -1, -1, -1)
    # Emptied first: OpenCV lets what stands in the hole change its result a little.
    out = [torch.from_numpy(method(_hwc(i * ~m), m[0].cpu().numpy())) for i, m in zip(image, masks)]
    out = torch.stack(out).permute(0, 3, 1, 2).to(image)
    return composite(image, out, fill_mask)


def _hwc(image):
    return np.ascontiguousarray(image.detach().float().cpu().permute(1, 2, 0).numpy())


def _telea(picture, hole, radius):
    eight = np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)
    return cv2.inpaint(eight, hole.astype(np.uint8), radius, cv2.INPAINT_TELEA).astype(np.float32) / 255


def _biharmonic(picture, hole):
    return inpaint_biharmonic(picture, hole, channel_axis=-1).clip(0, 1).astype(np.float32)


def _prompts(prompt, n):
    prompts = [prompt] * n if isinstance(prompt, str) else list(prompt)
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts do not fit {n} pictures: give one, or one for each.")
    return prompts


def _to_model_size(pipe, image, fill_mask, max_side):
    own = pipe.unet.config.sample_size
    own = (own if isinstance(own, int) else max(own)) * pipe.vae_scale_factor
    limit, longest = max_side or int(own * 1.5), max(image.shape[-2:])
    if longest <= limit:
        return image, fill_mask
    # Down to the model's own size, where it is best, not just below the limit.
    scale = (max_side or own) / longest
    size = [max(8, round(s * scale)) for s in image.shape[-2:]]
    hole = F.adaptive_max_pool2d(fill_mask, size)
    # What stands in the hole must not bleed into known pixels when the picture shrinks.
    clean = telea(image, (fill_mask > 0).float())
    return F.interpolate(clean, size, mode="bicubic", antialias=True).clamp(0, 1), hole


def _pad(pipe, image, fill_mask):
    step = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    h, w = image.shape[-2:]
    extra = (0, -w % step, 0, -h % step)
    if not any(extra):
        return image, fill_mask
    return F.pad(image, extra, mode="replicate"), F.pad(fill_mask, extra)
