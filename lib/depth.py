"""Depth maps of every kind, brought to one convention on the way in (lesson 06).

Models and sensors do not agree on what a depth map is. ZoeDepth and depth cameras give metres (near = low),
MiDaS, DPT and the relative Depth Anything give *inverse* depth (near = **high**) with an unknown scale and
shift. Whoever mixes them up swaps foreground and background. Here every source ends as a `DepthMap`:

    values in [0, 1], **0 = near, 1 = far**, whatever went in.

    kind                 what values are                                   near, far (raw, at 0 and at 1)
    "metric"             (z - near) / (far - near)                         metres
    "inverse-relative"   1 - inverse depth, scaled between its percentiles inverse depth, arbitrary unit
    "relative"           a picture of depth, e.g. 8-bit                    the file's own numbers

Shapes: depth (B, 1, H, W) float32; a mask of valid pixels (B, 1, H, W), 1 = measured.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

KINDS = ("metric", "inverse-relative", "relative")
PERCENTILES = (2.0, 98.0)  # of inverse depth; robust against the few extreme pixels that min-max would follow


@dataclass(frozen=True)
class DepthMap:
    """Depth in the course's one convention.

    values  (B, 1, H, W) float32 in [0, 1], 0 = near, 1 = far
    kind    "metric", "inverse-relative" or "relative"
    near    raw number that became 0: a float, or one per image as a (B, 1, 1, 1) tensor (metres when metric)
    far     raw number that became 1
    valid   (B, 1, H, W) float32, 1 = measured; None means that every pixel is
    source  one line that says where the depth comes from
    """
    values: torch.Tensor
    kind: str
    near: float | torch.Tensor
    far: float | torch.Tensor
    valid: torch.Tensor | None = None
    source: str = ""

    def __post_init__(self):
        v = self.values
        if self.kind not in KINDS:
            raise ValueError(f"Unknown kind of depth {self.kind!r}; known: {', '.join(KINDS)}.")
        if v.ndim != 4 or v.shape[1] != 1:
            raise ValueError(f"A DepthMap needs values (B, 1, H, W); got shape {tuple(v.shape)}.")
        if not torch.isfinite(v).all() or v.min() < 0 or v.max() > 1:
            raise ValueError("The values of a DepthMap are finite and in [0, 1]; use an adapter.")
        if self.valid is None:
            object.__setattr__(self, "valid", torch.ones_like(v))
        elif self.valid.shape != v.shape:
            raise ValueError(f"valid {tuple(self.valid.shape)} and values {tuple(v.shape)} differ in shape.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return tuple(self.values.shape[-2:])

    def metres(self) -> torch.Tensor:
        """(B, 1, H, W) metres; only a metric map knows them."""
        if self.kind != "metric":
            raise ValueError(f"This depth map is {self.kind}: it has an order but no metres. Use a metric "
                             f"source (a sensor file, 'mini', 'zoedepth'), or align_scale_shift first.")
        return self.near + self.values * (self.far - self.near)

    def at(self, value) -> float | torch.Tensor:
        """A user's depth as a threshold in [0, 1]: 0.5, "0.5" or, for a metric map, "2.4m".

        Gives a float, or a (B, 1, 1, 1) tensor where the images of a batch have ranges of their own.
        Raises ValueError when the depth lies outside the scene or metres are asked of a map without metres.
        """
        number, metres = parse_at(value)
        if not metres:
            if not 0 <= number <= 1:
                hint = f" Did you mean '{number:g}m'?" if self.kind == "metric" and number > 0 else ""
                raise ValueError(f"AT={value} is outside the scene: 0 is the nearest depth, 1 the farthest."
                                 + hint)
            return number
        if self.kind != "metric":
            raise ValueError(f"AT={value} asks for metres, but this depth map is {self.kind} and has none; "
                             f"give a number from 0 (near) to 1 (far) instead.")
        t = (number - self.near) / (self.far - self.near)
        if torch.as_tensor(t).min() < -1e-6 or torch.as_tensor(t).max() > 1 + 1e-6:
            near, far = (float(torch.as_tensor(x).reshape(-1)[0]) for x in (self.near, self.far))
            raise ValueError(f"AT={value} is outside the scene, which lies {near:.2f}m to {far:.2f}m away.")
        return t.clamp(0, 1) if isinstance(t, torch.Tensor) else min(max(t, 0.0), 1.0)

    def resize(self, size: tuple[int, int]) -> DepthMap:
        """The same depth at (height, width), nearest pixel: averaging across an edge invents depths."""
        if tuple(size) == self.size:
            return self
        return replace(self, values=F.interpolate(self.values, size=size, mode="nearest-exact"),
                       valid=F.interpolate(self.valid, size=size, mode="nearest-exact"))

    def crop(self, top: int, left: int, height: int, width: int) -> DepthMap:
        """A window of it, on the same scale (near and far stay)."""
        box = (..., slice(top, top + height), slice(left, left + width))
        return replace(self, values=self.values[box], valid=self.valid[box])

    def to(self, device) -> DepthMap:
        near, far = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (self.near, self.far))
        return replace(self, values=self.values.to(device), valid=self.valid.to(device), near=near, far=far)

    def statistics(self) -> dict:
        """For a report: kind, range, share measured, percentiles and histogram of the measured pixels."""
        measured = self.values[self.valid > 0.5].cpu().double().numpy()
        names = ("p02", "p25", "median", "p75", "p98")
        marks = dict(zip(names, np.percentile(measured, [2, 25, 50, 75, 98])))
        out = {"kind": self.kind, "source": self.source, "height": self.size[0], "width": self.size[1],
               "measured_share": round(float(self.valid.float().mean()), 4),
               "percentiles_01": {k: round(float(v), 4) for k, v in marks.items()},
               "histogram_01": np.histogram(measured, bins=20, range=(0, 1))[0].tolist()}
        if self.kind == "metric" and not isinstance(self.near, torch.Tensor):
            out |= {"near_m": round(float(self.near), 4), "far_m": round(float(self.far), 4),
                    "percentiles_m": {k: round(float(self.near + v * (self.far - self.near)), 3)
                                      for k, v in marks.items()}}
        return out


def parse_at(value) -> tuple[float, bool]:
    """(number, is it in metres). Accepts 0.5, "0.5", "2.4m", "2.4 m"; anything else is a ValueError."""
    text = str(value).strip().lower()
    metres = text.endswith("m")
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(text[:-1] if metres else text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"AT={value!r} is not a depth; write a number from 0 (near) to 1 (far) such as 0.5, "
                         f"or metres such as 2.4m.")
    return number, metres


# ---------------------------------------------------------------- from raw numbers to the one convention

def from_metric(metres, near=None, far=None, valid=None, trim=0.0, source="metres") -> DepthMap:
    """Metres, near = low: (z - near) / (far - near), clamped to [0, 1].

    metres  (H, W), (B, H, W) or (B, 1, H, W), > 0; pixels that are not finite or not > 0 count as unmeasured
    near    metres that become 0; default: each image's nearest measured pixel (so nothing is lost), or,
    far     with `trim` in percent, that percentile, so that a few stray pixels do not stretch the scale
    """
    z = _as_4d(metres)
    ok = torch.isfinite(z) & (z > 0)
    ok = ok if valid is None else ok & (_as_4d(valid) > 0.5)
    low, high = (near, far) if near is not None and far is not None else _ranges(z, ok, (trim, 100 - trim))
    near, far = _constant(low if near is None else near), _constant(high if far is None else far)
    if not (torch.as_tensor(far) > torch.as_tensor(near)).all():
        raise ValueError(f"far ({far}) must be more metres than near ({near}).")
    return _finish((z - near) / (far - near), ok, "metric", near, far, source)


def from_inverse(prediction, valid=None, size=None, source="inverse depth") -> DepthMap:
    """Relative **inverse** depth, near = high, any scale and shift (MiDaS, DPT, relative Depth Anything).

    1 - inverse depth scaled between its 2nd and 98th percentile, image by image. `size` (H, W) resizes first,
    in the unit the model predicts. The order of depths is right, distances between them are not: they stay
    unknown until align_scale_shift has seen something metric.
    """
    inverse = _resize(_as_4d(prediction), size)
    ok = torch.isfinite(inverse)
    ok = ok if valid is None else ok & (_as_4d(valid) > 0.5)
    low, high = (_constant(x) for x in _ranges(inverse, ok, PERCENTILES))
    return _finish(1 - (inverse - low) / (high - low), ok, "inverse-relative", high, low, source)


def from_relative(picture, near_is: str, valid=None, source="relative depth") -> DepthMap:
    """A picture of depth without a unit (0..255 or 0..1), stretched between its lowest and highest value.

    near_is  "low" (dark = near, as in this course) or "high" (bright = near, as MiDaS-style pictures)
    """
    if near_is not in ("low", "high"):
        raise ValueError("This depth has no unit, so its sign must be said: near_is='low' when dark is near, "
                         "near_is='high' when bright is near (pictures from MiDaS, DPT or Depth Anything).")
    x = _as_4d(picture)
    ok = torch.isfinite(x)
    ok = ok if valid is None else ok & (_as_4d(valid) > 0.5)
    low, high = (_constant(v) for v in _ranges(x, ok, (0.0, 100.0)))
    near, far = (low, high) if near_is == "low" else (high, low)
    return _finish((x - near) / (far - near), ok, "relative", near, far, source)


def _finish(values, ok, kind, near, far, source) -> DepthMap:
    values = torch.where(ok, values, torch.ones_like(values)).clamp(0, 1).float()  # unmeasured: far
    return DepthMap(values, kind, near, far, ok.float(), source)


def _as_4d(x) -> torch.Tensor:
    """Arrays and tensors of shape (H, W), (B, H, W), (B, 1, H, W) or (H, W, 1) as float32 (B, 1, H, W)."""
    t = torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else torch.as_tensor(x)
    t = t.detach().float()
    if t.ndim == 3 and t.shape[-1] == 1:
        t = t[..., 0]
    t = t[None, None] if t.ndim == 2 else t[:, None] if t.ndim == 3 else t
    if t.ndim != 4 or t.shape[1] != 1 or 0 in t.shape:
        raise ValueError(f"A depth map has one channel, (H, W) or (B, 1, H, W); got {tuple(np.shape(x))}.")
    return t


def _ranges(x, ok, percentiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Two percentiles of the valid pixels of each image, as (B, 1, 1, 1); errors on flat depth."""
    pairs = []
    for image, mask in zip(x, ok):
        numbers = image[mask].cpu().double().numpy()
        if numbers.size == 0:
            raise ValueError("The depth map has no measured pixel; give another one, or leave it out.")
        low, high = np.percentile(numbers, percentiles)
        if not high - low > 1e-6 * max(abs(low), abs(high)):
            low, high = numbers.min(), numbers.max()  # nearly all one value: what differs still counts
        if not high - low > 1e-6 * max(abs(low), abs(high)):
            raise ValueError(f"The depth map is one value everywhere ({low:g}), so nothing is nearer "
                             f"than anything else; give a depth map of this picture, or leave it out.")
        pairs.append((low, high))
    return tuple(torch.tensor(v, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1) for v in zip(*pairs))


def _constant(x):
    """A float where one number holds for the whole batch, else the (B, 1, 1, 1) tensor."""
    return float(x.reshape(-1)[0]) if isinstance(x, torch.Tensor) and (x == x.reshape(-1)[0]).all() else x


def _resize(x, size):
    return x if size is None or tuple(x.shape[-2:]) == tuple(size) else F.interpolate(
        x, size=tuple(size), mode="bicubic", align_corners=False)


# ---------------------------------------------------------------- adapters: a model's output -> DepthMap

def dpt(outputs, size=None) -> DepthMap:
    """DPT and MiDaS (`Intel/dpt-*`): `predicted_depth` (B, h, w), relative inverse depth, near = **high**."""
    return from_inverse(_predicted(outputs), size=size, source="DPT (relative inverse depth, near = high)")


def depth_anything(outputs, size=None, estimation="relative", max_depth=None) -> DepthMap:
    """Depth Anything v1 / v2. `estimation` is the model's `config.depth_estimation_type`.

    "relative": inverse depth, near = **high** (transformers' docstring says metres: wrong here).
    "metric": metres, near = low, at most `max_depth`.
    """
    prediction = _predicted(outputs)
    if estimation == "relative":
        return from_inverse(prediction, size=size, source="Depth Anything (inverse depth, near = high)")
    if estimation != "metric":
        raise ValueError(f"Depth Anything is 'relative' or 'metric', not {estimation!r}; see config.json.")
    metres = _resize(_as_4d(prediction), size).clamp(1e-3, max_depth)
    return from_metric(metres, source="Depth Anything metric (metres)")


def zoedepth(outputs, processor, size) -> DepthMap:
    """ZoeDepth: metres, near = low. Its processor pads the picture by reflection, so its own
    `post_process_depth_estimation` must take that off again; plain resizing shifts everything. size: (H, W)
    of the picture that went in.
    """
    sizes = [tuple(size)] * len(_predicted(outputs))
    done = processor.post_process_depth_estimation(outputs, source_sizes=sizes)
    metres = torch.stack([d["predicted_depth"] for d in done])
    return from_metric(_as_4d(metres).clamp_min(1e-3), source="ZoeDepth (metres)")


def mini(outputs, inverse_scale: float, size=None, near=None, far=None) -> DepthMap:
    """The course's small DPT: inverse depth, near = **high**; metres = inverse_scale / prediction.

    The constant lies in the model's card.json; near and far are the Miniature's, in metres."""
    inverse = _resize(_as_4d(_predicted(outputs)), size)
    metres = inverse_scale / inverse.clamp_min(1e-6 * inverse_scale)
    return from_metric(metres if far is None else metres.clamp_max(2 * far), near=near, far=far,
                       source="mini-depth (metres; trained on the Miniature only)")


def _predicted(outputs) -> torch.Tensor:
    return outputs.predicted_depth if hasattr(outputs, "predicted_depth") else outputs


@dataclass
class Estimator:
    """A depth model ready to use: estimator(image (B, 3, H, W) in [0, 1]) -> DepthMap of the same size."""
    name: str
    model: torch.nn.Module
    processor: object
    adapter: object  # (outputs, size) -> DepthMap
    used: str = ""   # the folder or repository that it came from

    @torch.no_grad()
    def predict(self, image: torch.Tensor):
        """The model's own outputs, as it gives them: `.predicted_depth` (B, h, w) float32, in the model's
        unit, sign and size. What it means is the adapter's business."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"A depth model needs an image of shape (B, 3, H, W); got {tuple(image.shape)}.")
        pixels = self.processor(images=list(image.float().cpu()), do_rescale=False, return_tensors="pt")
        weights = next(self.model.parameters())
        outputs = self.model(pixels["pixel_values"].to(weights.device, weights.dtype))
        outputs.predicted_depth = outputs.predicted_depth.float().cpu()
        return outputs

    def __call__(self, image: torch.Tensor) -> DepthMap:
        return self.adapter(self.predict(image), tuple(image.shape[-2:])).to(image.device)


# ---------------------------------------------------------------- small random models, for proofs

RANDOM = ("dpt", "depth-anything-v2", "depth-anything-v2-metric", "zoedepth")


def random_estimator(name: str, seed: int = 0) -> Estimator:
    """One of RANDOM as a very small model with random weights: the real architecture, processor and adapter.

    Its depth means nothing, but its output has the shape, range and post-processing of the real thing, so
    that an adapter can be proven without a download. Raises ValueError for another name.
    """
    if name not in RANDOM:
        raise ValueError(f"No random model is called {name!r}; known: {', '.join(RANDOM)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor, adapter = _random_parts(name)
        with torch.no_grad():  # default weights of a net this small give a flat picture (and dead ReLUs)
            for key, weight in model.named_parameters():
                if weight.ndim > 1:
                    torch.nn.init.xavier_normal_(weight, gain=1.5)
                elif "head" in key and key.endswith("bias"):
                    weight.fill_(0.3)
    return Estimator(name, model.eval().requires_grad_(False), processor, adapter, used="random weights")


def _random_parts(name):
    import transformers as t
    vit = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
    neck = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5])
    if name == "dpt":
        config = t.DPTConfig(image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], **vit, **neck)
        return t.DPTForDepthEstimation(config), t.DPTImageProcessor(size={"height": 32, "width": 32}), dpt
    if name == "zoedepth":
        beit = t.BeitConfig(image_size=64, patch_size=16, out_features=[f"stage{i}" for i in (1, 2, 3, 4)],
                            reshape_hidden_states=False, use_relative_position_bias=True, **vit)
        config = t.ZoeDepthConfig(
            backbone_config=beit, bottleneck_features=8, bin_embedding_dim=8, num_relative_features=4,
            bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
            num_attractors=[4, 4, 2, 1], **neck)
        processor = t.ZoeDepthImageProcessor(size={"height": 64, "width": 64}, keep_aspect_ratio=False)
        return t.ZoeDepthForDepthEstimation(config), processor, lambda o, size: zoedepth(o, processor, size)
    metric = name.endswith("metric")
    dino = t.Dinov2Config(image_size=28, patch_size=14, out_indices=[1, 2, 3, 4], apply_layernorm=True,
                          reshape_hidden_states=False, **vit)
    config = t.DepthAnythingConfig(backbone_config=dino, reassemble_hidden_size=32, **neck,
                                    head_hidden_size=8,
                                   **(dict(depth_estimation_type="metric", max_depth=20) if metric else {}))
    processor = t.DPTImageProcessor(size={"height": 28, "width": 28})
    return t.DepthAnythingForDepthEstimation(config), processor, lambda o, size: depth_anything(
        o, size, config.depth_estimation_type, config.max_depth)


# ---------------------------------------------------------------- depth that is given: sensors and files

def given(source, kind: str | None = None, near_is: str | None = None, size: tuple[int, int] | None = None,
          trim: float = 0.0, fill: bool = True) -> DepthMap:
    """Depth from a file or an array.

    16-bit PNG or uint16     millimetres, 0 = no measurement (depth cameras)
    float .npy/.tiff/array   metres; not finite or <= 0 = no measurement. kind="relative" for a unit-free one
    8-bit picture or uint8   no unit: say near_is="low" (dark = near) or near_is="high" (bright = near)

    size  (H, W) of the picture that it must fit
    trim  percent cut off at both ends of the scale (see from_metric)
    fill  holes get a depth measured nearby (see fill_holes); `valid` still says which were measured
    """
    array, name = _read(source)
    if array.ndim == 3 and array.shape[-1] in (3, 4) and array.dtype == np.uint8:
        array = _grey(array, name)
    shape = tuple(array.shape[-2:]) if array.ndim == 4 or array.shape[-1] != 1 else array.shape[:2]
    if size is not None and shape != tuple(size):
        raise ValueError(f"The depth is {shape[1]} x {shape[0]} pixels but the picture {size[1]} x "
                         f"{size[0]}; give a depth map that fits the picture pixel for pixel.")
    found = _from_array(array, kind, near_is, trim, name)
    return fill_holes(found) if fill else found


def _from_array(array, kind, near_is, trim, name) -> DepthMap:
    if kind not in (None, "metric", "relative", "inverse-relative"):
        raise ValueError(f"Unknown kind of depth {kind!r}; known: {', '.join(KINDS)}.")
    if kind == "inverse-relative":
        return from_inverse(array.astype(np.float32), source=f"{name} (inverse depth, near = high)")
    if kind == "relative" or (kind is None and array.dtype == np.uint8):
        return from_relative(array.astype(np.float32), near_is, source=f"{name} (near is {near_is})")
    if array.dtype == np.uint8:
        raise ValueError(f"{name} has 8 bits, too few for metres; save 16-bit millimetres or float metres.")
    if np.issubdtype(array.dtype, np.integer):
        return from_metric(array.astype(np.float32) / 1000, trim=trim, source=f"{name} (millimetres, sensor)")
    top = np.nanmax(np.where(np.isfinite(array), array, np.nan)) if np.isfinite(array).any() else np.nan
    if top > 1000:
        raise ValueError(f"{name} holds floats up to {top:g}, too much for metres; give metres, or "
                         f"millimetres as 16-bit whole numbers.")
    if kind is None and 0 < top <= 1:
        raise ValueError(f"{name} holds floats in [0, 1]: say kind='metric' if these are metres, or "
                         f"kind='relative' with near_is='low' or 'high'.")
    return from_metric(array, trim=trim, source=f"{name} (metres)")


def _read(source) -> tuple[np.ndarray, str]:
    """(array, name) of a path, array or tensor."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _check_array(source, "the depth array"), "given array"
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"No depth file at {path}; check the path, or leave it out.")
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            from PIL import Image
            with Image.open(path) as picture:
                picture.load()
                array = _pixels(picture)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read as depth ({type(error).__name__}); give a 16-bit "
                         f"PNG in millimetres, .npy or .tiff in metres, or an 8-bit picture.") from error
    return _check_array(array, path.name), path.name


def _pixels(picture) -> np.ndarray:
    if picture.mode in ("P", "1", "CMYK", "LA"):
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    array = np.asarray(picture)
    # older Pillow hands 16-bit PNGs over as int32
    is_16_bit = array.dtype == np.int32 and array.min() >= 0 and array.max() < 65536
    return array.astype(np.uint16) if is_16_bit else array


def _check_array(array, name) -> np.ndarray:
    if array.dtype.kind not in "uif":
        raise ValueError(f"{name} holds {array.dtype}, not depth; give whole millimetres or float metres.")
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; a depth map is (H, W) or (B, 1, H, W).")
    return array


def _grey(array, name) -> np.ndarray:
    rgb = array[..., :3]
    if (rgb != rgb[..., :1]).any():
        raise ValueError(f"{name} is a colour picture, not depth (colour maps cannot be undone); give grey.")
    return rgb[..., 0]


SENSOR_BASELINE = 0.1   # metres between the two eyes of a depth camera, at most (common ones: 0.03 to 0.075)
SENSOR_FOCAL = 0.82     # its focal length in picture widths, about: 63 degrees across


def fill_holes(depth: DepthMap) -> DepthMap:
    """Give every unmeasured pixel a depth measured nearby: the nearest one, or the one that must lie behind.

    A copied depth keeps edges sharp and invents nothing; averaging would put a ramp between an object and the
    wall behind it, and a threshold on that ramp cuts out a halo. Two kinds of holes tell by their shape that
    they lie on the farther surface (`_lies_behind`, in metric maps only): the *stereo shadow*, which only one
    of a depth camera's two eyes sees, and the wall beyond its reach. Other holes (dark, shiny, glass) tell
    nothing. Either way it is a guess: `valid` keeps saying which pixels were measured.
    """
    from scipy.ndimage import distance_transform_edt
    if (depth.valid > 0.5).all():
        return depth
    filled = depth.values.clone()
    for i, (values, valid) in enumerate(zip(filled[:, 0], depth.valid[:, 0])):
        holes = (valid <= 0.5).cpu().numpy()
        if holes.all():
            raise ValueError("The depth map has no measured pixel; give another one, or leave it out.")
        rows, columns = distance_transform_edt(holes, return_distances=False, return_indices=True)
        if depth.kind == "metric":
            near, far = (float(x[i] if isinstance(x, torch.Tensor) else x) for x in (depth.near, depth.far))
            behind, column = _lies_behind(near + values.cpu().numpy() * (far - near), ~holes)
            rows = np.where(behind, np.arange(len(holes))[:, None], rows)
            columns = np.where(behind, column, columns)
        values.copy_(values[torch.from_numpy(rows).long(), torch.from_numpy(columns).long()])
    return replace(depth, values=filled)


def _lies_behind(metres, measured) -> tuple[np.ndarray, np.ndarray]:
    """Which unmeasured pixels of a map (H, W) lie as far as their row's farther end, and that end's column.

    A stereo shadow lies between z_near and z_far, which differ by more than 3 %; it is at most
    focal * baseline * (1 / z_near - 1 / z_far) wide (and 2 pixels of doubt), and on the side of the near
    thing where most such gaps are. Out of reach is a gap of an eighth of the picture or more that ends as far
    away as the camera sees.
    """
    h, w = measured.shape
    column, row = np.broadcast_to(np.arange(w), (h, w)), np.arange(h)[:, None]
    left = np.maximum.accumulate(np.where(measured, column, -1), 1)
    right = np.minimum.accumulate(np.where(measured, column, w)[:, ::-1], 1)[:, ::-1]
    inside, width = ~measured & (left >= 0) & (right < w), right - left - 1
    z_left, z_right = (np.maximum(metres[row, c.clip(0, w - 1)], 1e-3) for c in (left, right))
    near, far, near_is_left = np.minimum(z_left, z_right), np.maximum(z_left, z_right), z_left < z_right
    widest = SENSOR_FOCAL * w * SENSOR_BASELINE * (1 / near - 1 / far) + 2
    shadow = inside & (far > 1.03 * near) & (width <= widest)
    begins = shadow & (column == left + 1)
    side = (begins & near_is_left).sum() > (begins & ~near_is_left).sum()
    beyond = inside & (width >= w / 8) & (far >= 0.9 * np.percentile(metres[measured], 98))
    return (shadow & (near_is_left == side)) | beyond, np.where(near_is_left, right, left)


def imitate_sensor(metres, focal, baseline=0.075, step=0.125, reach=6.0, no_return=None,
                   margin=6) -> torch.Tensor:
    """What a depth camera with a projector beside its lens would say: metres (B, 1, H, W), 0 = unmeasured.

    Such a camera finds depth by triangulation: a point at z is seen shifted by the disparity
    focal * baseline / z pixels, which is read in steps of `step` pixels (so the error grows with z squared).
    Holes: what the projector, `baseline` metres to the right of the lens, cannot light because something
    nearer stands in its way; what is farther than `reach` metres; `no_return` (B, 1, H, W) = 1, such as
    glass; and `margin` columns at the left, which the second view does not cover.

    metres (B, 1, H, W) > 0; focal in pixels. A sketch of structured light (Kinect), not a model of one
    product.
    """
    z = _as_4d(metres)
    if (z <= 0).any() or not focal > 0 or not baseline > 0 or not step > 0:
        raise ValueError("imitate_sensor wants metres > 0 at every pixel, and focal, baseline and step > 0.")
    disparity = focal * baseline / z
    column = torch.arange(z.shape[-1], dtype=z.dtype, device=z.device) - disparity  # as the projector sees it
    place = column.round().long() - column.min().floor().long()
    front = torch.zeros(*z.shape[:-1], int(place.max()) + 1, device=z.device)
    front = front.scatter_reduce(-1, place, disparity, "amax")  # the nearest thing in each of its columns
    hidden = front.gather(-1, place) > disparity + 1
    read = (disparity / step).round().clamp_min(1) * step
    measured = torch.where(hidden | (z > reach), torch.zeros_like(z), focal * baseline / read)
    if no_return is not None:
        measured = measured * (1 - _as_4d(no_return))
    measured[..., :margin] = 0
    return measured


# ---------------------------------------------------------------- alignment and scores

def align_scale_shift(prediction, target, valid=None):
    """The scale s and shift t that bring s * prediction + t closest to target (least squares, per image).

    Relative models are compared this way (as MiDaS is), **in their own space**: align predicted inverse depth
    with 1 / metres, then invert. Returns (aligned (B, 1, H, W), s (B, 1, 1, 1), t (B, 1, 1, 1)).
    """
    p, y, w = _scored(prediction, target, valid)
    p, y, w64 = p.double(), y.double(), w.double()
    n = w64.sum((1, 2, 3), keepdim=True)
    mp, my = ((x * w64).sum((1, 2, 3), keepdim=True) / n for x in (p, y))
    spread = (w64 * (p - mp) ** 2).sum((1, 2, 3), keepdim=True) / n
    if (spread <= 1e-12 * (mp ** 2 + 1e-12)).any():
        raise ValueError("The prediction is one value everywhere, so no scale fits; check the depth model.")
    s = (w64 * (p - mp) * (y - my)).sum((1, 2, 3), keepdim=True) / n / spread
    t = my - s * mp
    return (s * _as_4d(prediction).double() + t).float(), s.float(), t.float()


def metres_from(found: DepthMap, truth, valid=None, farthest: float = 100.0) -> torch.Tensor:
    """Metres (B, 1, H, W) of a metric or an inverse-relative map, to be scored against `truth` (metres).

    A metric map gives its own metres. A relative one has none: its inverse depth is aligned with 1 / truth
    first (two numbers per image are taken from the truth), and what comes out beyond `farthest`, or behind
    the camera, is set to `farthest`. A "relative" map (a picture of depth with an unknown curve in it) is a
    ValueError.
    """
    if found.kind == "metric":
        return found.metres()
    if found.kind != "inverse-relative":
        raise ValueError("Only inverse-relative maps can be aligned: a "
                         "picture of depth may have any curve in it.")
    t = _as_4d(truth)
    ok = (torch.isfinite(t) & (t > 0)).float() * found.valid * (1 if valid is None else _as_4d(valid))
    raw = found.near + found.values * (found.far - found.near)
    aligned, _, _ = align_scale_shift(raw, 1 / torch.where(ok > 0.5, t, torch.ones_like(t)), ok)
    return 1 / aligned.clamp_min(1 / farthest)


def abs_rel(metres, truth, valid=None) -> torch.Tensor:
    """Mean of |z - z*| / z* over the valid pixels, per image: (B,). Metres in, no unit out; 0 is perfect."""
    z, t, w = _scored(metres, truth, valid, positive=True)
    return _mean((z - t).abs() / t, w)


def rmse(metres, truth, valid=None) -> torch.Tensor:
    """Root of the mean squared error over the valid pixels, per image: (B,), in metres."""
    z, t, w = _scored(metres, truth, valid)
    return _mean((z - t) ** 2, w).sqrt()


def delta1(metres, truth, valid=None) -> torch.Tensor:
    """Share of valid pixels with max(z / z*, z* / z) < 1.25, per image: (B,). 1 is perfect."""
    z, t, w = _scored(metres, truth, valid, positive=True)
    z = z.clamp_min(1e-6)
    return _mean((torch.maximum(z / t, t / z) < 1.25).float(), w)


def ordinal_error(depth, truth, valid=None, pairs: int = 20000, margin: float = 0.03,
                  generator=None) -> torch.Tensor:
    """Share of random pixel pairs put in the wrong order, per image: (B,). 0 is perfect, 0.5 is guessing.

    Needs no unit and no alignment, so it also catches a swapped sign (then it is near 1). Only pairs whose
    true depths differ by more than `margin` (relative) count; a predicted tie counts half. After Chen et al.
    2016, "Single-image depth perception in the wild". `generator`: CPU torch.Generator; default seed 0.
    """
    z, t, w = _scored(depth, truth, valid)
    generator = generator or torch.Generator("cpu").manual_seed(0)
    errors = []
    for zi, ti, wi in zip(z.flatten(1).cpu(), t.flatten(1).cpu(), w.flatten(1).cpu()):
        where = torch.nonzero(wi > 0.5)[:, 0]
        a, b = where[torch.randint(len(where), (2, pairs), generator=generator)]
        differ = (ti[a] - ti[b]).abs() > margin * torch.minimum(ti[a].abs(), ti[b].abs()).clamp_min(1e-6)
        if not differ.any():
            raise ValueError("All true depths are (nearly) the same, so there is no order to compare.")
        order = torch.sign(zi[a] - zi[b])[differ] * torch.sign(ti[a] - ti[b])[differ]
        errors.append(((1 - order) / 2).mean())
    return torch.stack(errors)


def _scored(prediction, truth, valid, positive=False):
    """Both as (B, 1, H, W), and the mask of pixels that count (truth must be measured)."""
    p, t = _as_4d(prediction), _as_4d(truth)
    if p.shape != t.shape:
        raise ValueError(f"Prediction {tuple(p.shape)} and truth {tuple(t.shape)} must have the same shape.")
    w = torch.isfinite(t) & torch.isfinite(p) & ((t > 0) if positive else torch.isfinite(t))
    w = w if valid is None else w & (_as_4d(valid) > 0.5)
    if (w.sum((1, 2, 3)) == 0).any():
        raise ValueError("No valid pixel to compare; check the validity mask and the truth.")
    zero = torch.zeros_like(t)
    return torch.where(w, p, zero), torch.where(w, t, zero + positive), w.float()


def _mean(x, w) -> torch.Tensor:
    return (x * w).sum((1, 2, 3)) / w.sum((1, 2, 3))


# ---------------------------------------------------------------- depth and a camera: points in space

def pinhole(size, fov) -> tuple[float, float, float]:
    """(f, cx, cy) in pixels of a pinhole camera: size (H, W), fov = vertical field of view in degrees.

    f = (H / 2) / tan(fov / 2). The centre of pixel (column i, row j) lies at (i + 0.5, j + 0.5).
    """
    h, w = size
    if not 0 < fov < 180:
        raise ValueError(f"The field of view is an angle between 0 and 180 degrees, not {fov}.")
    return h / 2 / math.tan(math.radians(fov) / 2), w / 2, h / 2


def unproject(metres, camera) -> torch.Tensor:
    """Every pixel as a point of the world: (B, 3, H, W), x right, y up from the floor, z inwards, metres.

    metres  (B, 1, H, W): depth along the optical axis, not along the ray
    camera  anything with .height (m), .pitch (degrees, downwards) and .fov, such as lib.scenes.Camera

    In the camera's frame X = (u - cx) / f * Z and Y = (cy - v) / f * Z (up); then the camera's pitch and
    height.
    """
    z = _as_4d(metres)
    (h, w), p = z.shape[-2:], math.radians(camera.pitch)
    f, cx, cy = pinhole((h, w), camera.fov)
    u = (torch.arange(w, device=z.device) + 0.5).view(1, 1, 1, w)
    v = (torch.arange(h, device=z.device) + 0.5).view(1, 1, h, 1)
    x, y = (u - cx) / f * z, (cy - v) / f * z
    up, ahead = y * math.cos(p) - z * math.sin(p), y * math.sin(p) + z * math.cos(p)
    return torch.cat([x, camera.height + up, ahead], 1)


def project(points, camera, size) -> tuple[torch.Tensor, torch.Tensor]:
    """World points (..., 3) -> (pixel places (..., 2) as (u, v), depth (...)): `unproject` undone."""
    f, cx, cy = pinhole(size, camera.fov)
    p = math.radians(camera.pitch)
    x, up, ahead = points[..., 0], points[..., 1] - camera.height, points[..., 2]
    y, z = up * math.cos(p) + ahead * math.sin(p), ahead * math.cos(p) - up * math.sin(p)
    return torch.stack([cx + f * x / z, cy - f * y / z], -1), z
