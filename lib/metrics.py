"""Measuring an edit (lesson 12): the judge, picture scores, zones, and intervals.

Images are float32 (B, 3, H, W) in [0, 1]; masks (B, 1, H, W); metric depth in metres.
The *judge* is a small timm network of another architecture and seed than the models it scores,
so that no model grades itself.
"""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lib.depth import abs_rel, align_scale_shift, delta1, ordinal_error
from lib.depth import rmse as depth_rmse

__all__ = ["Judge", "JudgeFeatures", "abs_rel", "align_scale_shift", "delta1", "depth_rmse", "feat_dist", "fid",
           "frechet_distance", "frechet_gaussians", "judge_maps", "kernel_distance", "kid", "lpips", "mean_iou",
           "object_present", "occlusion_order", "ordinal_error", "paired_bootstrap", "psnr", "rmse", "seam", "ssim",
           "unpaired_bootstrap"]


# ------------------------------------------------------------------------------------------ the judge

class Judge(nn.Module):
    """Depth, kind and colour of every pixel, from a timm backbone with a light top-down decoder.

    `backbone` is any timm name that offers `features_only` with strides 2, 4, 8, 16; nothing is fetched.
    The decoder works at half resolution, where it also sees the picture's own pixels folded 2x2 into
    channels (`pixel_unshuffle`), and unfolds its answer to full resolution: thin legs stay sharp at a
    quarter of the cost. `kinds` and `colours` are the class names without "background" (class 0).

    Sides of the image must be multiples of 16. About 0.8 M parameters; forward and backward of a 128x128
    picture take about 11 ms in bf16 autocast and 15 ms in fp32 on one CPU core.
    """

    def __init__(self, kinds=None, colours=None, backbone="resnet18", width=48, backbone_args=None):
        super().__init__()
        import timm
        if kinds is None or colours is None:
            from lib.scenes import COLOURS, KINDS
            kinds, colours = kinds or KINDS, colours or COLOURS
        if backbone_args is None:
            backbone_args = (dict(channels=[32, 64, 128, 128], stem_type="deep", stem_width=16)
                             if backbone == "resnet18" else {})
        self.config = dict(kinds=list(kinds), colours=list(colours), backbone=backbone, width=width,
                           backbone_args=backbone_args)
        self.backbone = timm.create_model(backbone, features_only=True, pretrained=False,
                                          out_indices=(0, 1, 2, 3), **backbone_args)
        if list(self.backbone.feature_info.reduction()) != [2, 4, 8, 16]:
            raise ValueError(f"backbone {backbone!r} has no features at strides 2, 4, 8, 16; choose another")
        chans = self.backbone.feature_info.channels()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in chans)
        self.context = nn.Conv2d(width, width, 1)
        self.fuse = nn.ModuleList(_conv(width, width) for _ in chans[1:])
        self.last = _conv(width + 12, width)
        self.outputs = 1 + (1 + len(kinds)) + (1 + len(colours))
        self.head = nn.Conv2d(width, 4 * self.outputs, 1)
        self.to(memory_format=torch.channels_last)  # about 1.5x faster on a CPU

    def features(self, image):
        """image (B, 3, H, W) [0, 1] -> four feature maps at strides 2, 4, 8, 16."""
        x = ((image - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)
        return self.backbone(x)

    def forward(self, image):
        """image (B, 3, H, W) [0, 1] -> dict: depth (B, 1, H, W) metres; kind and colour logits (B, C, H,
        W)."""
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[-1] % 16 or image.shape[-2] % 16:
            raise ValueError(f"the judge takes (B, 3, H, W), sides multiples of 16, not {tuple(image.shape)}")
        top = None
        maps = self.features(image)
        for i in range(len(maps) - 1, -1, -1):
            y = self.lateral[i](maps[i])
            if top is None:  # the room as a whole: a mean over the picture, added everywhere
                y = y + self.context(y.mean((-2, -1), keepdim=True))
            else:
                y = y + F.interpolate(top, size=y.shape[-2:], mode="nearest")
            top = self.fuse[i - 1](y) if i else y
        folded = F.pixel_unshuffle((image - 0.5) / 0.25, 2).to(top.dtype)
        out = F.pixel_shuffle(self.head(self.last(torch.cat([top, folded], 1))), 2).float()
        kinds = 1 + len(self.config["kinds"])
        # metres = 3 exp(x): starts inside the room, always positive; bounded so that a step cannot overflow
        depth = 3.0 * torch.exp(out[:, :1].clamp(-4, 4))
        return dict(depth=depth, kind=out[:, 1:1 + kinds], colour=out[:, 1 + kinds:])

    def save(self, folder):
        """Writes model.safetensors and config.json (each by a temporary file and a rename)."""
        from safetensors.torch import save_file
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(state, folder / "model.safetensors.tmp")
        os.replace(folder / "model.safetensors.tmp", folder / "model.safetensors")
        (folder / "config.json.tmp").write_text(json.dumps(self.config, indent=2) + "\n")
        os.replace(folder / "config.json.tmp", folder / "config.json")

    @classmethod
    def load(cls, folder, device="cpu"):
        """The judge of a folder with model.safetensors and config.json, in eval mode, frozen.

        Raises FileNotFoundError when a file is missing, ValueError when the weights do not fit the config."""
        from safetensors.torch import load_file
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}: train one with `python -m lib.train judge`")
        judge = cls(**json.loads((folder / "config.json").read_text()))
        try:
            judge.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as e:
            raise ValueError(f"the weights in {folder} do not fit it: {str(e).splitlines()[0]}") from e
        return judge.to(device).eval().requires_grad_(False)


def _conv(cin, cout):
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(True))


@torch.no_grad()
def judge_maps(judge, image, batch=16):
    """The judge's answer as maps: dict of depth (B, 1, H, W) metres, kind and colour (B, 1, H, W) int64, 0 =
    room."""
    parts = [judge(x.to(next(judge.parameters()).device).float()) for x in image.split(batch)]
    maps = dict(depth=torch.cat([p["depth"] for p in parts]).cpu())
    for name in ("kind", "colour"):
        maps[name] = torch.cat([p[name].argmax(1, keepdim=True) for p in parts]).cpu()
    return maps


# ------------------------------------------------------------------------------------------ picture scores

def _check_pair(a, b):
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"both must be (B, C, H, W) of one shape; got {tuple(a.shape)}, {tuple(b.shape)}")


def rmse(a, b, zone=None):
    """Root mean square error of each picture, over the pixels of a zone: (B,) in the units of the pictures.

    zone: (B or 1, 1, H, W), weights in [0, 1] (1 = counts), all pixels when None. Within a picture all pixels
    and channels are pooled *before* the root (the mean of per-pixel roots would be smaller); over scenes,
    take the mean of these values. NaN where the zone is empty, so that a missing zone is never a perfect
    score."""
    _check_pair(a, b)
    square = (a.float() - b.float()).square().mean(1, keepdim=True)
    if zone is None:
        return square.mean((1, 2, 3)).sqrt()
    if zone.shape[1] != 1 or zone.shape[-2:] != a.shape[-2:]:
        raise ValueError(f"the zone must be (B, 1, {a.shape[-2]}, {a.shape[-1]}); got {tuple(zone.shape)}")
    zone = zone.to(square).expand_as(square)
    return ((square * zone).sum((1, 2, 3)) / zone.sum((1, 2, 3))).sqrt()


def psnr(a, b, zone=None):
    """Peak signal-to-noise ratio of each picture, (B,) in dB, peak 1; within a zone when given (see
    `rmse`)."""
    if zone is not None:
        return -20 * rmse(a, b, zone).log10()
    _check_pair(a, b)
    from torchmetrics.functional.image import peak_signal_noise_ratio
    return peak_signal_noise_ratio(a.float(), b.float(), data_range=1.0, dim=(1, 2, 3), reduction="none")


def ssim(a, b):
    """Structural similarity of each picture, (B,), 1 = equal (Wang et al. 2004; Gaussian window,
    torchmetrics)."""
    _check_pair(a, b)
    from torchmetrics.functional.image import structural_similarity_index_measure
    return structural_similarity_index_measure(a.float(), b.float(), data_range=1.0,
                                               reduction="none").reshape(-1)


@torch.no_grad()
def feat_dist(judge, a, b, zone=None):
    """Distance of two pictures in the judge's eyes: (B,), 0 = equal, never above 4.

    The LPIPS formula (Zhang et al. 2018, eq. 1) without its learned channel weights and on the judge's
    features instead of VGG's or AlexNet's: at every layer the feature vectors of a pixel are scaled to length
    1, their squared difference is summed over channels and averaged over pixels, and the layers are averaged.
    It is *not* LPIPS: its values compare only with its own. zone: average over a zone's pixels only (pooled
    to each layer's size)."""
    _check_pair(a, b)
    total = 0.0
    pairs = list(zip(judge.features(a.float()), judge.features(b.float())))
    for fa, fb in pairs:
        fa, fb = (f.float() / f.float().norm(dim=1, keepdim=True).clamp(min=1e-6) for f in (fa, fb))
        square = (fa - fb).square().sum(1, keepdim=True)
        if zone is None:
            total = total + square.mean((1, 2, 3))
        else:
            w = F.adaptive_avg_pool2d(zone.float(), square.shape[-2:]).expand_as(square)
            total = total + (square * w).sum((1, 2, 3)) / w.sum((1, 2, 3))
    return total / len(pairs)


def lpips(a, b, net="alex", fetch=False):
    """The real LPIPS (Zhang et al. 2018), by torchmetrics: (B,), 0 = equal. Pictures (B, 3, H, W) in [0, 1].

    net: "alex", "vgg" or "squeeze". The learned channel weights come with torchmetrics; the network's own ImageNet
    weights are torchvision's and have to be in torch's cache. fetch=True lets torchvision fetch them (once, needs a
    connection). Raises `models.ModelUnavailable` with what is missing otherwise: nothing is put in its place."""
    _check_pair(a, b)
    model = _lpips_net(net, fetch).to(a.device)
    with torch.no_grad():
        return model(a.float().clamp(0, 1), b.float().clamp(0, 1), normalize=True).reshape(-1)


def lpips_weights(net="alex"):
    """Where torchvision keeps the ImageNet weights that LPIPS needs: (Path, URL). The file may not be there."""
    from torchvision import models as vision
    names = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}
    if net not in names:
        raise ValueError(f"LPIPS has the networks {', '.join(names)}; not {net!r}.")
    url = getattr(vision, names[net]).IMAGENET1K_V1.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1], url


@lru_cache(maxsize=2)
def _lpips_net(net, fetch):
    from lib.models import ModelUnavailable
    path, _ = lpips_weights(net)
    if not path.is_file() and not fetch:
        raise ModelUnavailable(f"LPIPS needs the file {path.name} (torchvision's ImageNet weights), which is not in torch's "
                               f"cache: call metrics.lpips(a, b, net={net!r}, fetch=True) once with a connection. "
                               "Without it use feat_dist, which is not LPIPS.")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torchvision says that "pretrained" is now called "weights"
            return LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True).net.eval().requires_grad_(False)
    except OSError as error:                        # no connection: URLError is an OSError
        raise ModelUnavailable(f"LPIPS needs {path.name}, and fetching it failed ({error}): try again with a connection, "
                               "or use feat_dist, which is not LPIPS.") from None


def seam(image, fill_mask, width=5):
    """How much the edge of a filled hole shows: (B,), 0 = no more than its surroundings, in values per pixel.

    The mean jump between neighbouring pixels across the edge of the mask, minus the mean jump between other
    neighbours in a band of `width` pixels along it (METHOD 4: the jump at the edge against the same band
    elsewhere). The truth scores about 0, unless things happen to end at the edge: print it beside the
    others. A filling that is smoother than the picture lowers the second term, so blur shows as well.
    NaN where the mask has no edge."""
    if image.ndim != 4 or fill_mask.ndim != 4 or fill_mask.shape[1] != 1 \
            or fill_mask.shape[-2:] != image.shape[-2:] or len(fill_mask) not in (1, len(image)):
        raise ValueError(f"give images (B, C, H, W) and masks (B or 1, 1, H, W) of their size; got "
                         f"{tuple(image.shape)}, {tuple(fill_mask.shape)}")
    hole = (fill_mask > 0).float().expand(len(image), -1, -1, -1)
    reach = max(1, width // 2)
    grow = lambda m: F.max_pool2d(m, 2 * reach + 1, 1, reach)
    band = grow(hole) * grow(1 - hole)
    at = lambda x, axis: (x.narrow(axis, 1, x.shape[axis] - 1), x.narrow(axis, 0, x.shape[axis] - 1))
    across = beside = n_across = n_beside = 0
    for axis in (2, 3):
        (a, b), (m, n), (u, v) = at(image.float(), axis), at(hole, axis), at(band, axis)
        jump, edge, near = (a - b).abs().mean(1, keepdim=True), (m != n).float(), u * v
        total = lambda x: x.sum((1, 2, 3))
        across, n_across = across + total(jump * edge), n_across + total(edge)
        beside, n_beside = beside + total(jump * near * (1 - edge)), n_beside + total(near * (1 - edge))
    return across / n_across - beside / n_beside


# ------------------------------------------------------------------------------------------ sets of pictures

class JudgeFeatures(nn.Module):
    """(B, 3, H, W) [0, 1] -> (B, C): the judge's deepest feature map, averaged over the picture.

    The stated feature module of `fid` and `kid` here. Values compare only among results with the same judge;
    they are not the FID of papers, which uses Inception-v3 trained on ImageNet."""

    def __init__(self, judge):
        super().__init__()
        self.judge = judge
        self.num_features = judge.backbone.feature_info.channels()[-1]

    def forward(self, image):
        return self.judge.features(image.float())[-1].float().mean((-2, -1))


def frechet_gaussians(mean_a, cov_a, mean_b, cov_b):
    """Frechet distance of two Gaussians: |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), a float, 0 = equal.

    mean (C,), cov (C, C), symmetric. tr (A B)^(1/2) is taken as the trace of the root of the *symmetric* matrix
    A^(1/2) B A^(1/2), which has the same eigenvalues: no complex parts to throw away, even where a covariance has
    not full rank (Dowson and Landau 1982; Heusel et al. 2017)."""
    ma, a, mb, b = (torch.as_tensor(x).double() for x in (mean_a, cov_a, mean_b, cov_b))
    if ma.ndim != 1 or a.shape != (len(ma), len(ma)) or mb.shape != ma.shape or b.shape != a.shape:
        raise ValueError(f"give means (C,) and covariances (C, C) of one C; got {tuple(ma.shape)}, {tuple(a.shape)}, "
                         f"{tuple(mb.shape)}, {tuple(b.shape)}")
    values, vectors = torch.linalg.eigh(a)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ b @ half).clamp(min=0).sqrt().sum()
    return float((ma - mb).square().sum() + a.trace() + b.trace() - 2 * root)


def frechet_distance(x, y):
    """`fid` of features that are there already, x (N, C) and y (M, C): a float. See `frechet_gaussians`."""
    x, y = _check_features(x, y)
    return frechet_gaussians(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())


def kernel_distance(x, y, biased=False):
    """Squared MMD of two sets of features, x (N, C) and y (M, C), with KID's kernel k(a, b) = (a.b / C + 1)^3.

    Unbiased by default: pairs of a feature with itself are left out, so the mean over draws is the true distance at
    any N, and single values may be negative. biased=True keeps them (Gretton et al. 2012; Binkowski et al. 2018)."""
    x, y = _check_features(x, y)
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    xx, yy, (n, m) = kernel(x, x), kernel(y, y), (len(x), len(y))
    if biased:
        return float(xx.mean() + yy.mean() - 2 * kernel(x, y).mean())
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def _check_features(x, y):
    x, y = (torch.as_tensor(v).double() for v in (x, y))
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"give features (N, C) and (M, C), at least 2 of each; got {tuple(x.shape)}, {tuple(y.shape)}")
    return x, y


def fid(real, made, features):
    """Frechet distance of two sets of pictures under a feature module: a float, 0 = same mean and covariance.

    real, made: (N, 3, H, W) in [0, 1]. Biased upwards at small N (it fits a covariance of C x C from N
    samples): below about ten times as many pictures as features, prefer `kid`. features: a module (B, 3, H,
    W) -> (B, C)."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    return _set_distance(FrechetInceptionDistance(feature=features, normalize=True), real, made)


def kid(real, made, features, subset=None, seed=0):
    """Kernel distance of two sets of pictures (polynomial MMD^2, unbiased): (mean, standard deviation over
    subsets).

    subset: pictures drawn for each of 50 subsets (default: half of the smaller set)."""
    from torchmetrics.image.kid import KernelInceptionDistance
    subset = subset or max(2, min(len(real), len(made)) // 2)
    if subset > min(len(real), len(made)):
        raise ValueError(f"subsets of {subset} need at least as many pictures on both sides; lower subset")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # it says that all features are kept in memory: small here
        metric = KernelInceptionDistance(feature=features, subsets=50, subset_size=subset, normalize=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchmetrics draws the subsets from the global generator
        mean, spread = _set_distance(metric, real, made, number=False)
    return float(mean), float(spread)


@torch.no_grad()
def _set_distance(metric, real, made, number=True, batch=32):
    if min(len(real), len(made)) < 2:
        raise ValueError("a distance of two sets needs at least 2 pictures in each")
    for pictures, is_real in ((real, True), (made, False)):
        for some in pictures.split(batch):
            metric.update(some.float(), real=is_real)
    value = metric.compute()
    return float(value) if number else value


# ------------------------------------------------------------------------------------- what is in the picture

def confusion(predicted, target, classes):
    """(classes, classes) int64 counts: rows = truth, columns = prediction. Add those of many batches."""
    index = target.reshape(-1).long() * classes + predicted.reshape(-1).long()
    return torch.bincount(index, minlength=classes * classes).view(classes, classes)


def mean_iou(counts):
    """Mean over the classes that occur in the truth of intersection / union, from `confusion` counts of *all*
    pictures together: a float in [0, 1]. Background counts as one class."""
    hit = counts.diag().double()
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    present = counts.sum(1) > 0
    if not present.any():
        raise ValueError("mean IoU of nothing: the truth holds no pixel")
    return float((hit[present] / union[present]).mean())


def components(kind_map, colour_map, kind, colour, pixels=30):
    """How many connected regions (4 neighbours) of at least `pixels` pixels have this kind and colour
    (1-based ids, as in a Render). Maps: (H, W), or with leading dimensions of size 1."""
    from scipy import ndimage
    mine = (kind_map == kind) & (colour_map == colour)
    labelled, n = ndimage.label(mine.reshape(mine.shape[-2:]).cpu().numpy())
    return int((np.bincount(labelled.ravel())[1:] >= pixels).sum()) if n else 0


def object_present(kind_map, colour_map, kind, colour, pixels=30):
    """True if the judge sees the object: at least 30 connected pixels of the right kind and colour (DESIGN
    4)."""
    return components(kind_map, colour_map, kind, colour, pixels) > 0


def occlusion_order(maps, visible, hidden, kind, front_kind, least=20):
    """Does the judge see the object pass behind the thing in front? 1.0 = yes, 0.0 = no, NaN = cannot be
    said.

    maps: of one picture (`judge_maps`); visible, hidden (1, 1, H, W): the object's pixels that must show, and
    those that the thing in front must cover, from the truth; kind, front_kind: 1-based kinds. Right means all
    of (a) where it must show, at least half of the pixels are judged to be of its kind;
    (b) where it must be hidden, less than half are (left out if both things are of one kind);
    (c) the median judged depth of the visible pixels is larger than that of the hidden ones.
    NaN if either region has fewer than `least` pixels."""
    visible, hidden = visible.bool(), hidden.bool()
    if visible.sum() < least or hidden.sum() < least:
        return float("nan")
    shows = (maps["kind"][visible] == kind).float().mean() >= 0.5
    covered = kind == front_kind or (maps["kind"][hidden] == kind).float().mean() < 0.5
    deeper = maps["depth"][visible].median() > maps["depth"][hidden].median()
    return float(bool(shows) and bool(covered) and bool(deeper))


# ------------------------------------------------------------------------------------------ intervals

def paired_bootstrap(a, b, level=0.95, resamples=9999, seed=0):
    """Interval of mean(a - b) when whole scenes are drawn again: dict(diff, low, high, n, excludes_zero).

    a, b: scores of two methods on the *same* scenes, in the same order; scenes where either is NaN are left
    out. Percentile bootstrap by scipy.stats.bootstrap(paired=True). With fewer than 2 scenes the bounds are
    NaN."""
    a, b = _scene_scores(a, b)
    return _bootstrap(a, b, True, level, resamples, seed)


def unpaired_bootstrap(a, b, level=0.95, resamples=9999, seed=0):
    """The same interval if one forgets that the scenes are the same: a and b are drawn again independently.

    For comparison only (lesson 12): how hard a scene is stays in the interval, which is usually far too wide."""
    a, b = _scene_scores(a, b)
    return _bootstrap(a, b, False, level, resamples, seed)


def _scene_scores(a, b):
    a, b = (np.asarray(x, dtype=float).ravel() for x in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"paired scores must be of the same scenes; got {len(a)} and {len(b)} values")
    keep = np.isfinite(a) & np.isfinite(b)
    return a[keep], b[keep]


def _bootstrap(a, b, paired, level, resamples, seed):
    from scipy import stats
    diff = float(np.mean(a - b)) if len(a) else float("nan")
    low = high = diff if len(a) > 1 else float("nan")
    if len(a) > 1 and (np.ptp(a - b) if paired else max(np.ptp(a), np.ptp(b))) > 0:
        difference = (lambda x, y, axis=-1: np.mean(x - y, axis=axis)) if paired else \
            (lambda x, y, axis=-1: np.mean(x, axis=axis) - np.mean(y, axis=axis))
        drawn = stats.bootstrap((a, b), difference, paired=paired, vectorized=True, n_resamples=resamples,
                                confidence_level=level, method="percentile",
                                random_state=np.random.default_rng(seed))
        low, high = map(float, drawn.confidence_interval)
    return dict(diff=diff, low=low, high=high, n=len(a), excludes_zero=bool(low > 0 or high < 0))


# ------------------------------------------------------------------------------------------ quality of models
# What the model cards say, measured on test scenes. Every function returns a flat dict of numbers.

QUALITY_START = 1_000_000  # the benchmark's scenes are the first test seeds; cards use others


def _renders(n, start=0, batch=16, size=None):
    from lib import scenes
    seeds = scenes.seeds("test", n, start=QUALITY_START + start)
    for i in range(0, n, batch):
        some = [scenes.sample(s) for s in seeds[i:i + batch]]
        yield some, scenes.render(some, size=size or scenes.SIZE)


@torch.no_grad()
def vae_quality(pipe, n=200):
    """Round trip of n unseen scenes: PSNR over the picture and inside objects, dB, means over pictures."""
    from lib import latents
    whole, inside = [], []
    for _, r in _renders(n):
        back = latents.round_trip(pipe, r.rgb.to(pipe.vae.device)).cpu()
        whole.append(psnr(back, r.rgb))
        inside.append(psnr(back, r.rgb, (r.ids >= 0).float()))
    return dict(scenes=n, psnr=float(torch.cat(whole).mean()),
                psnr_objects=float(torch.cat(inside).nanmean()))


@torch.no_grad()
def depth_quality(estimator, n=200):
    """Metric depth of n unseen scenes, unaligned, glass left out: AbsRel and delta1, means over pictures."""
    from lib import scenes
    glass = scenes.KINDS.index("glass") + 1
    errors, shares = [], []
    for _, r in _renders(n):
        metres, valid = estimator(r.rgb).metres(), (r.kind != glass).float()
        errors.append(abs_rel(metres, r.depth, valid))
        shares.append(delta1(metres, r.depth, valid))
    return dict(scenes=n, abs_rel=float(torch.cat(errors).mean()), delta1=float(torch.cat(shares).mean()))


@torch.no_grad()
def judge_quality(judge, n=200):
    """The judge on n unseen true pictures: mean IoU of kinds and of colours, AbsRel of depth, recall of
    objects."""
    kinds, colours = 1 + len(judge.config["kinds"]), 1 + len(judge.config["colours"])
    by_kind, by_colour, errors = torch.zeros(kinds, kinds).long(), torch.zeros(colours, colours).long(), []
    for _, r in _renders(n):
        maps = judge_maps(judge, r.rgb)
        by_kind += confusion(maps["kind"], r.kind, kinds)
        by_colour += confusion(maps["colour"], r.colour, colours)
        errors.append(abs_rel(maps["depth"], r.depth))
    return dict(scenes=n, kind_miou=mean_iou(by_kind), colour_miou=mean_iou(by_colour),
                abs_rel=float(torch.cat(errors).mean()))


def captioned_scenes(n, least=60):
    """n unseen scenes of one or two things, alternately, in which every thing shows on at least `least`
    pixels of the true picture (a caption that names a hidden thing cannot be obeyed). Returns (scenes,
    Render)."""
    from lib import scenes
    found, start = [], QUALITY_START
    while len(found) < n:
        batch = [scenes.sample(s, things=1 + k % 2) for k,
                 s in enumerate(scenes.seeds("test", 32, start=start))]
        start += 32
        ids = scenes.render(batch, size=64, samples=1, shadow_rays=1).ids
        found += [s for s, i in zip(batch, ids) if all((i == k).sum() * 4 >= least
                                                       for k in range(len(s.things)))]
    return found[:n], scenes.render(found[:n])


def _present(maps, b, scene):
    """Is each thing of the scene there (as often as it is named)? List of 0 or 1."""
    from lib import scenes
    out = []
    for i, t in enumerate(scene.things):
        twins = sum((o.kind, o.colour) == (t.kind, t.colour) for o in scene.things[:i])
        n = components(maps["kind"][b], maps["colour"][b], scenes.KINDS.index(t.kind) + 1,
                       scenes.COLOURS.index(t.colour) + 1)
        out.append(float(n > twins))
    return out


def prompts_obeyed(pipe, judge, n=200, steps=50, guidance_scale=3.0, batch=20):
    """Share of unseen captions (at most 2 objects) whose objects are all present in the picture made from
    them.

    Present: at least 30 connected pixels that the judge gives the right kind and colour. Fixed seeds.
    Captions with a kind-colour pair that the pipeline has never seen (the judge has) are also counted apart, and so
    is the judge's score on the true renders of the same captions, which is the most that could be reached."""
    from lib import diffusion, latents, scenes
    chosen, truth = captioned_scenes(n)
    made = []
    for i in range(0, n, batch):
        some = chosen[i:i + batch]
        start = torch.cat([diffusion.noise(pipe, scenes.SIZE, scenes.SIZE,
                                           torch.Generator("cpu").manual_seed(s.seed)) for s in some])
        z = diffusion.sample(pipe, [s.caption() for s in some], steps, guidance_scale, latents=start)
        made.append(latents.decode(pipe, z).cpu())
    result = dict(captions=n, steps=steps, guidance_scale=guidance_scale)
    for name, pictures in (("", torch.cat(made)), ("_true_renders", truth.rgb)):
        maps = judge_maps(judge, pictures)
        there = [_present(maps, b, s) for b, s in enumerate(chosen)]
        new = [any((t.kind, t.colour) in scenes.HELD_OUT_PAIRS for t in s.things) for s in chosen]
        result["obeyed" + name] = float(np.mean([min(x) for x in there]))
        result["objects_present" + name] = float(np.mean([v for x in there for v in x]))
        for word, flag in (("seen", False), ("unseen", True)):
            values = [min(x) for x, is_new in zip(there, new) if is_new == flag]
            result[f"obeyed_{word}_pairs{name}"] = float(np.mean(values)) if values else float("nan")
    result["unseen_pair_captions"] = sum(new)
    return result


def fill_holes_cases(n, batch=8):
    """Yields (Render, captions, fill_mask) of n unseen scenes: one half object-shaped holes, the other holes
    of 25 to 40 % of the picture."""
    from lib import masks, scenes
    for k, (some, r) in enumerate(_renders(n, batch=batch)):
        generator = torch.Generator("cpu").manual_seed(k)
        shaped = masks.random_object_masks(r.ids, generator)
        large = masks.irregular(len(some), scenes.SIZE, generator, area=(0.25, 0.40))
        odd = (torch.arange(len(some)) % 2).view(-1, 1, 1, 1)
        yield r, [s.caption() for s in some], torch.where(odd == 1, large, shaped)


def inpaint_quality(pipe, judge, n=200, steps=25, guidance_scale=2.0):
    """The inpainting model against Telea and biharmonic on n unseen scenes with known truth.

    feat_dist: of *one* sample, over the picture. psnr: inside the hole, of the *mean of four* samples (the
    best guess under a square loss). Means over scenes, for object-shaped holes (`_objects`), large ones
    (`_large`) and all, and the paired bootstrap interval of the difference from each classical filling."""
    from lib import inpaint
    rows = {m: dict(feat_dist=[], psnr=[]) for m in ("model", "telea", "biharmonic")}
    for k, (r, captions, hole) in enumerate(fill_holes_cases(n)):
        generator = torch.Generator("cpu").manual_seed(k)
        made = inpaint.with_model(pipe, r.rgb, hole, captions, steps=steps, guidance_scale=guidance_scale,
                                  generator=generator, samples=4)
        made = made.view(len(r.rgb), 4, *made.shape[1:])
        filled = dict(model=(made[:, 0], made.mean(1)))
        for method in ("telea", "biharmonic"):
            filled[method] = (inpaint.fill(r.rgb, hole, method),) * 2
        for method, (one, mean) in filled.items():
            rows[method]["feat_dist"] += feat_dist(judge, one, r.rgb).tolist()
            rows[method]["psnr"] += psnr(mean, r.rgb, hole).tolist()
    result = dict(scenes=n, steps=steps, guidance_scale=guidance_scale)
    for method, scores in rows.items():
        for score, values in scores.items():
            for part, some in (("", values), ("_objects", values[::2]), ("_large", values[1::2])):
                result[f"{score}_{method}{part}"] = float(np.nanmean(some)) if some else float("nan")
            if method != "model":
                d = paired_bootstrap(rows["model"][score], values)
                result[f"{score}_over_{method}"] = [d["diff"], d["low"], d["high"]]
    return result
