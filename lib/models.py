"""The registry of models: one logical name, several places where it may lie (lesson 00).

`load("mini")` and `load("sd15")` give the same kind of object, a diffusers Stable Diffusion pipeline, so that
one parameter swaps the model and no other line changes. Weights on the web vanish
(`runwayml/stable-diffusion-v1-5` did in 2024), so each name has candidates; a folder on this machine always
comes first:

    1. the name itself, when it is a folder
    2. $LAYERS_MODELS/<name>, $LAYERS_MODELS/<owner>/<repo>, $LAYERS_MODELS/<repo>
    3. <data>/models/<name>, where the small models of this course lie
    4. the candidates on the Hugging Face hub, in order; the hub keeps what it fetched in its cache ($HF_HOME)

Safetensors only, never a pickle. What was used stands in `.loaded_from`.
"""
from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lib import depth, setup

SD_FILES = ("model_index.json", "scheduler/*", "tokenizer/*", "text_encoder/config.json",
            "text_encoder/model.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json", "vae/diffusion_pytorch_model.safetensors")  # fp32 once; not the single files
DEPTH_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
SD_SIZE = "4 bytes x parameters of U-Net, VAE, text encoder"
OPENRAIL = "CreativeML Open RAIL-M (use-based restrictions)"
OURS = "MIT (made by this course's `python -m lib.train`)"


class ModelUnavailable(RuntimeError):
    """No candidate could be loaded; the message lists what was tried and the ways out."""


@dataclass(frozen=True)
class Spec:
    """What is known of a model before it is here.

    kind        "pipeline", "depth", "judge" or "vae"
    candidates  hub repositories, in the order they are tried: (owner/repo, revision or None where none is
                known)
    files       what is needed of a repository (patterns of snapshot_download)
    size        bytes to fetch; None: it ships with the course
    size_from   where that number comes from
    convention  of a depth model's raw output
    """
    kind: str
    licence: str
    candidates: tuple[tuple[str, str | None], ...] = ()
    files: tuple[str, ...] = ()
    size: int | None = None
    size_from: str = ""
    convention: str = ""


INVERSE = "relative inverse depth, near = high"
METRES = "metres, near = low"
REGISTRY = {
    "mini": Spec("pipeline", OURS),
    "mini-inpaint": Spec("pipeline", OURS),
    "sd15": Spec(
        "pipeline", OPENRAIL,
        (("stable-diffusion-v1-5/stable-diffusion-v1-5", None), ("sd-legacy/stable-diffusion-v1-5", None),
         ("Jiali/stable-diffusion-1.5", None), ("botp/stable-diffusion-v1-5", None)),
        SD_FILES, 4 * (859_520_964 + 83_653_863 + 123_060_480), SD_SIZE),
    "sd15-inpaint": Spec(
        "pipeline", OPENRAIL,
        (("stable-diffusion-v1-5/stable-diffusion-inpainting", None),
         ("sd-legacy/stable-diffusion-inpainting", None),
         ("benjamin-paine/stable-diffusion-v1-5-inpainting", None)),
        SD_FILES, 4 * (859_535_364 + 83_653_863 + 123_060_480), SD_SIZE),
    "mini-depth": Spec("depth", OURS, convention="inverse depth in a known unit (card.json), near = high"),
    "dpt": Spec("depth", "Apache-2.0", (("Intel/dpt-large", None), ("Intel/dpt-hybrid-midas", "refs/pr/5")),
                DEPTH_FILES, 1_370_000_000, "file list of Intel/dpt-large", INVERSE),
    "zoedepth": Spec("depth", "MIT", (("Intel/zoedepth-nyu-kitti", None),), DEPTH_FILES, 1_380_000_000,
                     "file list of the repository", METRES),
    "depth-anything-v2": Spec("depth", "Apache-2.0 (Small; Base and Large are CC-BY-NC-4.0)",
                              (("depth-anything/Depth-Anything-V2-Small-hf", None),), DEPTH_FILES, 99_200_000,
                              "file list of the metric sibling", INVERSE),
    "depth-anything-v2-metric": Spec("depth", "Apache-2.0 (Small; Base and Large are CC-BY-NC-4.0)",
                                     (("depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf", None),),
                                     DEPTH_FILES, 99_200_000, "file list of the repository", METRES),
    "judge": Spec("judge", OURS),
    "taesd": Spec("vae", "MIT", (("madebyollin/taesd", None),),
                  ("config.json", "diffusion_pytorch_model.safetensors")),
}
DEPTH_ALIASES = {"mini": "mini-depth"}


# ---------------------------------------------------------------- what a lesson calls

def load(name: str = "mini", device="cpu", dtype=None, quiet: bool = False):
    """A Stable Diffusion pipeline (or inpainting pipeline), ready for this course's functions.

    name    a pipeline of the REGISTRY ("mini", "mini-inpaint", "sd15", "sd15-inpaint"), or a local pipeline
            folder
    dtype   of all weights; None: float32

    Comes with a DDIM scheduler, no safety checker, frozen weights, eval mode and no progress bar.
    `.loaded_from` says which place was used. Unknown name: ValueError. Nowhere to be had: ModelUnavailable.
    """
    folder, used = find(name, "pipeline")
    pipe = _pipeline(folder)
    _cast(pipe, device, dtype or torch.float32)
    pipe.loaded_from = used
    return _say(pipe, name, used, quiet)


def load_depth(name: str = "mini", device="cpu", dtype=None, quiet: bool = False) -> depth.Estimator:
    """A depth model as estimator(image) -> DepthMap: "mini", "dpt", "zoedepth", "depth-anything-v2",
    "depth-anything-v2-metric", or a folder. A depth file or array needs no model: lib.depth.given."""
    if name == "given":
        raise ValueError("'given' is no model: read the depth file or array with lib.depth.given(path).")
    folder, used = find(name, "depth")
    name = _full_name(name, "depth")
    estimator = _depth(folder, name, device, dtype or torch.float32)
    estimator.used = used
    return _say(estimator, name, used, quiet)


def load_judge(device="cpu", name: str = "judge", quiet: bool = False):
    """The judge: the network that scores edits, with its own seed and architecture (lib.metrics.Judge)."""
    from lib.metrics import Judge  # lesson 12; needed only here
    folder, used = find(name, "judge")
    judge = Judge.load(folder, device)
    judge.loaded_from = used
    return _say(judge, name, used, quiet)


def load_vae(name: str = "taesd", device="cpu", dtype=None, quiet: bool = False):
    """A tiny autoencoder of Stable Diffusion's latents (`AutoencoderTiny`): good for previews, not for
    inversion."""
    from diffusers import AutoencoderTiny
    folder, used = find(name, "vae")
    vae = AutoencoderTiny.from_pretrained(folder, use_safetensors=True)
    _cast(vae, device, dtype or torch.float32)
    vae.eval().requires_grad_(False)
    vae.loaded_from = used
    return _say(vae, name, used, quiet)


def catalogue() -> list[dict]:
    """One row per model: name, kind, licence, megabytes to fetch, where it is (None: it would have to be
    fetched)."""
    rows = []
    for name, spec in REGISTRY.items():
        here = next((f for f in _folders(name, spec) if _complete(f, spec)), None)
        rows.append({"name": name, "kind": spec.kind, "licence": spec.licence, "convention": spec.convention,
                     "fetch_mb": None if spec.size is None else round(spec.size / 1e6),
                     "here": None if here is None else str(here),
                     "candidates": [c[0] for c in spec.candidates]})
    return rows


def main():
    """`python -m lib.models`: what can be loaded, from where, and under which licence."""
    for row in catalogue():
        size = f", {row['fetch_mb']} MB" if row["fetch_mb"] else ""
        where = "here" if row["here"] else f"to be fetched from {' or '.join(row['candidates'])}{size}"
        print(f"{row['name']:25} {row['kind']:9} {row['licence']}; {where}")


def _say(thing, name, used, quiet):
    if not quiet:
        print(f"{name}: from {used}")
    return thing


# ---------------------------------------------------------------- finding

def check_name(name: str, kind: str) -> None:
    """ValueError unless it is the folder of a model of this kind or a name of the REGISTRY; fetches nothing."""
    if not isinstance(name, (str, os.PathLike)) or not str(name):
        raise ValueError(f"A model's name is text such as 'mini' or a folder; got {name!r}.")
    if Path(name).is_dir():
        if not _complete(Path(name), Spec(kind, "")):
            raise ValueError(f"The folder {name} is no {kind} model: {_marker(kind)} is missing in it.")
        return
    spec = REGISTRY.get(_full_name(name, kind))
    if spec is None or spec.kind != kind:
        known = ", ".join(_asked(n) for n, s in REGISTRY.items() if s.kind == kind)
        other = f" ({name} is a {spec.kind} model)" if spec else ""
        raise ValueError(f"Unknown {kind} model {name!r}{other}; "
                         f"known: {known}, or the path of a model folder.")


def _full_name(name, kind: str) -> str:
    """The REGISTRY's name of what is asked for: the depth model "mini" is "mini-depth" there."""
    return DEPTH_ALIASES.get(str(name), str(name)) if kind == "depth" else str(name)


def find(name: str, kind: str) -> tuple[Path, str]:
    """(folder, where it came from) of a model of this kind; fetches it when it is not on this machine."""
    check_name(name, kind)
    if Path(name).is_dir():
        return Path(name), str(name)
    name = _full_name(name, kind)
    spec, tried = REGISTRY[name], []
    for folder in _folders(name, spec):
        if _complete(folder, spec):
            return folder, str(folder)
        tried.append(f"folder {folder}: " + ("not complete" if folder.is_dir() else "not there"))
    for repo, revision in spec.candidates:
        try:
            folder = Path(snapshot(repo, revision, spec.files))
        except Exception as error:  # no network, removed (401), gated, disk full, ...
            tried.append(f"hub {repo}: {_reason(error)}")
            continue
        if _complete(folder, spec):
            return folder, f"hub {repo}" + (f" @ {revision}" if revision else "") + f" ({folder})"
        tried.append(f"hub {repo}: has no {_marker(kind)} or no safetensors weights")
    raise ModelUnavailable(_ways_out(name, spec, tried))


def snapshot(repo: str, revision: str | None, files) -> str:
    """Fetch the needed files of a hub repository, or find them in the hub's cache; the folder they lie in."""
    from huggingface_hub import snapshot_download
    return snapshot_download(repo, revision=revision, allow_patterns=list(files))


def _folders(name, spec):
    """Places on this machine, in order."""
    mine = os.environ.get("LAYERS_MODELS")
    if mine:
        for repo in (name, *(c[0] for c in spec.candidates), *(c[0].split("/")[-1] for c in spec.candidates)):
            yield Path(mine) / repo
    yield setup.data_dir() / "models" / name


def _marker(kind) -> str:
    return "model_index.json" if kind == "pipeline" else "config.json"


def _complete(folder: Path, spec: Spec) -> bool:
    """Does the folder hold a model of this kind with safetensors weights?"""
    if not (folder / _marker(spec.kind)).is_file():
        return False
    parts = [folder / p for p in ("unet", "vae", "text_encoder")] if spec.kind == "pipeline" else [folder]
    return all(any(p.glob("*.safetensors")) for p in parts)


def _asked(name) -> str:
    return {v: k for k, v in DEPTH_ALIASES.items()}.get(name, name)


def _reason(error) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _ways_out(name, spec, tried) -> str:
    lines = [f"The model {name!r} is not available. Tried:"] + [f"  - {t}" for t in tried] + ["Ways out:"]
    if not spec.candidates:
        recipe = {"mini": "unet", "mini-inpaint": "inpaint", "mini-depth": "depth"}.get(name, name)
        lines += [f"  - it ships with the course in data/models/{name}: get the whole repository again, or "
                  f"train it with `python -m lib.train {recipe}`",
                  "  - point LAYERS_DATA at a folder that has models/, or "
                  "LAYERS_MODELS at the folder of the models"]
        return "\n".join(lines)
    size = f" (about {spec.size / 1e9:.1f} GB)" if spec.size else ""
    instead = "DEPTH_MODEL = \"mini\"" if spec.kind == "depth" else "MODEL = \"mini\""
    lines += [f"  - {instead}: the small model that ships with the course and needs no network",
              f"  - with a network: it is fetched once{size} and kept in "
              "the hub's cache; HF_HOME moves that cache",
              f"  - without: on another machine `hf download {spec.candidates[0][0]} --local-dir {name}`, "
              "copy the folder here, and set LAYERS_MODELS to the folder that holds it",
              f"  - give the path of a model folder instead of the name {name!r}"]
    return "\n".join(lines)


# ---------------------------------------------------------------- building

@contextlib.contextmanager
def _no_bars():
    """Loading a model takes a second or two; the bars of both libraries would fill a notebook."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers
    libraries = [of_diffusers, of_transformers]
    shown = [lib for lib in libraries if getattr(lib, "is_progress_bar_enabled", lambda: True)()]
    for lib in shown:
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib in shown:
            lib.enable_progress_bar()


def _cast(pipe, device, dtype):
    """pipe.to (or a model's), without diffusers' warning on every cast (it comes also when no module has to
    stay in float32)."""
    from diffusers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        pipe.to(device, dtype)
    finally:
        logging.set_verbosity(level)


def _pipeline(folder: Path):
    import diffusers
    made = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if made not in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        raise ValueError(f"{folder} holds a {made}; this course needs a StableDiffusionPipeline or a "
                         f"StableDiffusionInpaintPipeline (Stable Diffusion 1.x, or the mini).")
    # No dtype argument: its name changed between versions. local_files_only: the folder is all there is.
    with _no_bars():
        pipe = getattr(diffusers, made).from_pretrained(
            folder, use_safetensors=True, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, local_files_only=True, **_variant(folder))
    _check_text_encoder(folder / "text_encoder", pipe.text_encoder)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


def _variant(folder: Path) -> dict:
    """{"variant": "fp16"} for a folder that holds half-precision files alone
    (`diffusion_pytorch_model.fp16.safetensors`): without that word diffusers does not see them."""
    files = [f.name for f in (folder / "unet").glob("*.safetensors")]
    return {"variant": "fp16"} if files and all(".fp16" in name for name in files) else {}


def _check_text_encoder(folder: Path, encoder):
    """Put every stored tensor where it belongs, whatever version wrote the file.

    transformers >= 5.6 names keys without the prefix `text_model.`; older ones, given such a file, start with
    random weights and raise nothing. So we compare by name without the prefix, and refuse a file that does
    not fill it.
    """
    from safetensors.torch import load_file
    files = sorted(folder.glob("*.safetensors"))
    stored = {}
    for file in [f for f in files if ".fp16" not in f.name] or files:
        stored |= {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    own = {k: k.removeprefix("text_model.") for k in encoder.state_dict() if "position_ids" not in k}
    missing = [k for k, short in own.items() if short not in stored]
    if missing:
        raise ValueError(f"The text encoder in {folder} lacks {len(missing)} of {len(own)} tensors (first: "
                         f"{missing[0]}), so it would run on random weights; get the folder again.")
    encoder.load_state_dict({k: stored[short] for k, short in own.items()}, strict=False)


def _depth(folder: Path, name, device, dtype) -> depth.Estimator:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation
    with _no_bars():
        model = AutoModelForDepthEstimation.from_pretrained(folder, use_safetensors=True,
                                                            local_files_only=True)
    model = model.to(device, dtype).eval().requires_grad_(False)
    card = json.loads((folder / "card.json").read_text()) if (folder / "card.json").is_file() else {}
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    else:
        processor = _plain_processor(model.config)
    return depth.Estimator(name, model, processor, _adapter(model.config, processor, card))


def _plain_processor(config):
    """For a folder without its own: squeeze to the model's size, then (x - 0.5) / 0.5."""
    from transformers import DPTImageProcessor
    return DPTImageProcessor(size={"height": config.image_size, "width": config.image_size},
                             image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _adapter(config, processor, card):
    """(outputs, size) -> DepthMap for this architecture: the one place that knows which sign a model has."""
    if "inverse_scale" in card:
        from lib.scenes import FAR, NEAR
        return lambda outputs, size: depth.mini(outputs, card["inverse_scale"], size, NEAR, FAR)
    if config.model_type == "dpt":
        return depth.dpt
    if config.model_type == "zoedepth":
        return lambda outputs, size: depth.zoedepth(outputs, processor, size)
    if config.model_type == "depth_anything":
        kind, most = config.depth_estimation_type, config.max_depth
        return lambda outputs, size: depth.depth_anything(outputs, size, kind, most)
    raise ValueError(f"No adapter for depth models of type {config.model_type!r}; known: dpt, zoedepth, "
                     f"depth_anything. Convert its output with lib.depth.from_metric or from_inverse.")


if __name__ == "__main__":
    main()
