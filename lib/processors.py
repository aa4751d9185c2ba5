"""What a batch does to one picture. lib.batch decides when, where and how often; these classes decide what.

    tint    a seeded tint with NumPy and Pillow: no torch, milliseconds; for drills and for learning the job
    itself
    layers  reads as the course reads, depth (given or estimated), DeGLaD: the foreground as RGBA
    edit    the whole method: depth, DeGLaD layers, an object put in at a depth by FeatGLaC, and how well its
    depth fits

A processor of your own is a subclass of `Processor`, named to lib.batch as "module:Class" or "file.py:Class".
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import math
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.jobs import BadInput, Refused


class Output(NamedTuple):
    """picture: float array (H, W, 3 | 4) in [0, 1]; metrics: numbers for the row."""
    picture: np.ndarray
    metrics: dict


class Processor(ABC):
    """decode (in loader threads) -> infer (a few at a time) -> check -> encode (in the writer thread).

    `infer` may raise out-of-memory errors: it is called again with fewer pictures. It must give the same
    picture for the same input and seed, whatever else is in the batch (the last bits may differ).
    """
    defaults: dict = {"seed": 0}
    suffix = ".png"
    batch = 32
    half = False            # does it run in half precision, so that a NaN is worth a try in full?

    @staticmethod
    def alive():
        """Call it while `infer` gets on (a picture done, a pass of the model): whoever runs a job puts its sign of
        life here, so that work that takes long is told from a worker that hangs."""

    def __init__(self, settings: dict, device="cpu"):
        self.settings, self.device = self.complete(settings), device

    @classmethod
    def complete(cls, settings: dict) -> dict:
        """The settings with defaults; Refused for an unknown name or a value of another type."""
        unknown = sorted(set(settings) - set(cls.defaults))
        if unknown:
            raise Refused(f"No setting '{unknown[0]}'; known: {', '.join(cls.defaults) or 'none'}.")
        return {name: _typed(name, settings.get(name, default), default)
                for name, default in cls.defaults.items()}

    @classmethod
    def identity(cls, settings: dict) -> dict:
        """What else decides the output (weights, say), for the fingerprint."""
        return {}

    @abstractmethod
    def decode(self, item: dict):
        """item: id, path, bytes, depth? -> anything `infer` takes. BadInput, or whatever a decoder raises."""

    @abstractmethod
    def infer(self, inputs: list, seeds: list[int], precise: bool = False) -> list[Output]:
        """One result for each input, made with its seed; precise: in full precision."""

    def check(self, output: Output, decoded) -> str:
        """What is wrong with a result, or ""."""
        picture = np.asarray(output.picture)
        if not np.isfinite(picture).all():
            return f"{1 - np.isfinite(picture).mean():.1%} of the values are NaN or infinite"
        return ""

    def encode(self, picture) -> bytes:
        from PIL import Image
        buffer = io.BytesIO()
        Image.fromarray(to_bytes(picture)).save(buffer, "PNG", compress_level=3)
        return buffer.getvalue()

    def free(self):
        """Give memory back after an out-of-memory error."""

    def spare(self) -> bool:
        """Go on with less memory, if more slowly (the pictures stay the same); False: there is no other
        way."""
        return False


def to_bytes(picture) -> np.ndarray:
    """uint8 from values in [0, 1]. ValueError for 0 to 255, which would all be white."""
    picture = np.asarray(picture)
    if picture.dtype.kind in "ui" or (picture.size and picture.max() > 16):
        raise ValueError(f"the picture is {picture.dtype} with values up to {picture.max()}; floats in [0, 1] are "
                         "wanted")
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def _typed(name, value, default):
    """A setting given as text (on the command line) as the type of its default."""
    kind = type(default)
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if kind in (int, float) and isinstance(value, str):
            value = kind(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is str and not isinstance(value, str):
            return str(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError
        return value
    except (KeyError, ValueError):
        raise Refused(f"Setting {name} is of type {kind.__name__} (such as {default!r}); "
                      f"it got {value!r}.") from None


class Tint(Processor):
    """A tint and some noise that depend on the seed: cheap, and wrong at once if seeds depend on the
    order."""
    defaults = {"seed": 0, "size": 0, "amount": 0.25}

    def decode(self, item):
        from PIL import Image
        with Image.open(item["path"]) as picture:
            picture = picture.convert("RGB")
            side = self.settings["size"]
            return np.asarray(picture.resize((side, side)) if side else picture, dtype=np.float32) / 255

    def infer(self, inputs, seeds, precise=False):
        out = []
        for picture, seed in zip(inputs, seeds):
            rng, amount = np.random.default_rng(seed), self.settings["amount"]
            colour, noise = rng.random(3, np.float32), rng.random(picture.shape[:2], np.float32)[..., None]
            tinted = picture * (1 - amount) + amount * (0.8 * colour + 0.2 * noise)
            out.append(Output(tinted, {"rmse": float(np.sqrt(np.mean((tinted - picture) ** 2)))}))
        return out


class Layers(Processor):
    """The course's own reader, depth (from item["depth"], else a model) and DeGLaD: the foreground layer."""
    defaults = {"seed": 0, "at": "0.5", "depth_model": "mini", "near_is": "", "max_side": 768}
    batch, known_as = 8, "layers"

    def __init__(self, settings, device="cpu"):
        super().__init__(settings, device)
        self._estimator = None

    @classmethod
    def complete(cls, settings):
        from lib import kaggle
        chosen = super().complete(settings)
        words = {name.upper(): value for name, value in chosen.items()} | {"DEPTH_NEAR": chosen["near_is"]}
        try:
            kaggle.check_parameters(words | {"PROCESS": cls.known_as})
        except ValueError as error:                               # before there is a job, which would keep them
            raise Refused(str(error)) from None
        return chosen

    @classmethod
    def identity(cls, settings):
        return {"weights.depth": weights_of(settings["depth_model"], "depth")}

    def decode(self, item):
        from lib import depth, edit, show
        if item.get("depth") == "":
            raise BadInput("there is no depth file for this picture")
        full = show.read_image(item["path"],
                               max_side=self.settings["max_side"] if not item.get("depth") else None)
        if min(full.shape[-2:]) < 32:
            raise BadInput(f"the picture is {full.shape[-1]} x {full.shape[-2]} pixels; at least 32 x 32 are "
                           "needed")
        found = None
        if item.get("depth"):
            found = depth.given(item["depth"], near_is=self.settings["near_is"] or None,
                                size=tuple(full.shape[-2:]),
                                trim=2.0)
        return {"image": full, "depth": found, "focal": edit._focal(item["path"], full), "name": item["id"]}

    def estimate(self, image):
        """Depth of a picture on the CPU, by the model (loaded at the first call)."""
        from lib import models
        if self._estimator is None:
            self._estimator = models.load_depth(self.settings["depth_model"], self.device, quiet=True)
        return self._estimator(image.to(self.device)).to("cpu")

    def depth(self, entry):
        return entry["depth"] if entry["depth"] is not None else self.estimate(entry["image"])

    def infer(self, inputs, seeds, precise=False):
        """One by one; the next picture is prepared (another thread) while the device is at this one."""
        outputs, following = [], None
        with ThreadPoolExecutor(1, "ahead") as ahead:
            for k, seed in enumerate(seeds):
                self.alive()
                ready = following.result() if following else self._named(self.prepare, inputs[k])
                following = ahead.submit(self._named, self.prepare, inputs[k + 1]) if k + 1 < len(inputs) else None
                outputs.append(self._named(self.one, ready, seed, precise))
        return outputs

    @staticmethod
    def _named(function, *arguments):
        """The library says with ValueErrors what is wrong with a picture for these settings."""
        try:
            return function(*arguments)
        except ValueError as error:
            raise BadInput(str(error)) from error

    def prepare(self, entry):
        """What needs no seed and no large model: here, the picture and its depth."""
        return entry["image"], self.depth(entry)

    def one(self, prepared, seed, precise):
        """prepared: what `prepare` gave -> Output."""
        from lib import deglad
        image, found = prepared
        cut = deglad.split(image, found, self.settings["at"], soft=1.5)
        facts = {"fg_share": float(cut.mask.mean()), "measured": float(found.valid.mean())}
        return Output(cut.foreground[0].permute(1, 2, 0).numpy(), facts)

    def free(self):
        import gc

        import torch
        gc.collect()                                              # tensors in circles of references
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fitted_depth(found, given):
    """The values of one `DepthMap` after the best scale and shift towards another's, (B, 1, H, W) in [0, 1].

    Where one has metres and the other inverse depth, the line is fitted in inverse depth: no other is
    straight. Raises ValueError where no line can be fitted (a constant map)."""
    from lib import depth
    if given.kind == "metric" and found.kind == "inverse-relative":
        metres = depth.metres_from(found, given.metres())
        return ((metres - given.near) / (given.far - given.near)).clamp(0, 1)
    return depth.align_scale_shift(found.values, given.values)[0]


class Edit(Layers):
    """`make edit` for every frame: the object at depth `at`, by FeatGLaC.

    The score is depth_rmse: depth estimated again on the result against the *intended* depth of the edit (the
    frame's own, with the object's surface at `at`), after the best scale and shift, over the whole frame, in
    the unit of the course's [0, 1]. Home video has no true depth: this is the only reference there is, and it
    is relative.
    """
    defaults = {"seed": 0, "model": "mini", "at": "0.5", "insert": "", "prompt": "", "mechanism": "inject",
                "steps": 50,
                "where": "auto", "height": "auto", "depth_model": "mini", "near_is": "", "max_side": 768,
                "dtype": "auto"}
    batch, known_as = 4, "edit"

    def __init__(self, settings, device="cpu"):
        super().__init__(settings, device)
        import torch

        from lib import edit, models
        chosen = self.settings
        # half precision where it pays: large models on CUDA. The mini gains nothing from it.
        self.half = chosen["dtype"] == "float16" or (chosen["dtype"] == "auto"
                                                     and str(device).startswith("cuda")
                                                    and not Path(chosen["model"]).name.startswith("mini"))
        self.dtype, self.bank = torch.float16 if self.half else torch.float32, None
        edit.check_settings("", chosen["mechanism"])
        self.pipe = models.load(chosen["model"], device, self.dtype, quiet=True)
        self.pipe.unet.register_forward_hook(lambda *_: self.alive())
        self.cutout, self.kind, self.origin = edit.read_cutout(chosen["insert"], chosen["model"],
                                                               chosen["seed"], device)
        self.words = edit.words_of(chosen["insert"]) if self.cutout is None else ""

    @classmethod
    def complete(cls, settings):
        chosen = super().complete(settings)
        if chosen["dtype"] not in ("auto", "float16", "float32"):
            raise Refused(f"dtype is auto, float16 or float32, not {chosen['dtype']!r}.")
        if Path(chosen["insert"]).suffix and not Path(chosen["insert"]).is_file():
            raise Refused(f"There is no cut-out file at {chosen['insert']}.")
        from lib import models
        try:
            models.check_name(chosen["model"], "pipeline")
        except ValueError as error:
            raise Refused(str(error)) from None
        return chosen

    @classmethod
    def identity(cls, settings):
        found = {"weights.model": weights_of(settings["model"], "pipeline"), **super().identity(settings)}
        path = Path(settings["insert"])
        if path.is_file():
            found["insert"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        return found

    def prepare(self, entry):
        """A Shot before the model's part: depth, place, composites."""
        from lib import edit
        found, image, chosen = self.depth(entry), entry["image"], self.settings
        small = edit._shrink(image, edit.WORK_SIDE)
        photo = edit.Photo(image, small, found.resize(small.shape[-2:]), entry["focal"][0], entry["name"], {})
        place = edit.stand(photo, chosen["at"], self.cutout, self.kind, chosen["where"], chosen["height"])
        return edit.composites(photo, place, self.cutout, self.origin, layers=False)

    def one(self, shot, seed, precise):
        import torch

        from lib import edit
        chosen, place, generator = self.settings, shot.place, torch.Generator("cpu").manual_seed(seed)
        with self._precision(precise):
            shot = edit.with_model(shot, self.pipe, chosen["prompt"] or self.words, chosen["mechanism"],
                                   generator,
                                   steps=chosen["steps"], bank_device=self.bank)
        metrics = {"at": float(place.at), "passes": shot.facts["model"]["unet_passes"],
                   "visible": shot.facts["object"]["visible_share"],
                   "change": shot.facts["model"]["mean_change"], **self.depth_error(shot)}
        return Output(shot.result[0].float().cpu().permute(1, 2, 0).numpy(), metrics)

    def spare(self):
        """Keep the layers' keys and values (2 to 5 GB for SD 1.5, twice that in float32) in the host's
        memory."""
        before, self.bank = self.bank, "cpu"
        return before is None and str(self.device).startswith("cuda")

    @contextlib.contextmanager
    def _precision(self, precise):
        """The pipeline in float32 for one picture, then back, whatever happens: half a pipeline of each works
        for none."""
        from lib import models

        import torch
        try:
            if precise and self.half:
                models._cast(self.pipe, self.device, torch.float32)
            yield
        finally:
            if precise and self.half:
                models._cast(self.pipe, self.device, self.dtype)

    def depth_error(self, shot) -> dict:
        """depth_rmse and a small map of where the depth is off (24 x 24, for the report)."""
        import torch
        if not torch.isfinite(shot.result).all():
            return {}
        seen = (shot.object_layer[:, 3:] * (1 - shot.hidden_by) > 0.5).float()
        own = shot.photo.depth.resize(seen.shape[-2:])
        wanted = torch.where(seen > 0, own.values.clamp(max=float(shot.place.at)), own.values)
        again = self.estimate(shot.result).resize(seen.shape[-2:])
        try:
            fitted = fitted_depth(again, replace(own, values=wanted))
        except ValueError:
            return {}
        off = (fitted - wanted).abs()
        inside = float((off ** 2 * seen).sum().div(seen.sum().clamp_min(1)).sqrt())
        return {"depth_rmse": float((off ** 2).mean().sqrt()), "depth_rmse_object": inside,
                "error_map": pack_map(off)}

    def check(self, output, decoded):
        wrong = super().check(output, decoded)
        given = decoded["image"]
        if not wrong and float(np.ptp(output.picture)) < 1e-6 < float(given.max() - given.min()):
            return "the picture is one colour everywhere, though its input is not"
        return wrong


KNOWN = {"tint": Tint, "layers": Layers, "edit": Edit}
MAP_SIDE, MAP_TOP = 24, 0.5          # an error map's cells, and the error that is stored as 255


def pack_map(values) -> str:
    """(1, 1, H, W) tensor in [0, MAP_TOP] -> a 24 x 24 picture as text of some hundred bytes, for a row."""
    import base64
    import zlib

    import torch.nn.functional as F
    small = F.interpolate(values, (MAP_SIDE, MAP_SIDE), mode="area")[0, 0].clamp(0, MAP_TOP) / MAP_TOP
    return base64.b64encode(zlib.compress((small * 255).round().byte().numpy().tobytes(), 9)).decode()


def unpack_map(text: str) -> np.ndarray:
    """The reverse of `pack_map`: float array (24, 24)."""
    import base64
    import zlib
    cells = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return cells.reshape(MAP_SIDE, MAP_SIDE).astype(np.float32) / 255 * MAP_TOP


def weights_of(model: str, kind: str) -> str:
    """Short hash of a model's weight files: sizes, first and last megabyte (hashing 4 GB would take long).

    A model that is not on this machine yet is named, not hashed."""
    if kind == "depth" and model == "mini":
        model = "mini-depth"
    folder = Path(model) if Path(model).is_dir() else _shipped(model)
    if folder is None:
        return f"{model} (fetched)"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            file.seek(0)
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _shipped(model):
    from lib import setup
    folder = setup.data_dir() / "models" / model
    return folder if folder.is_dir() else None
