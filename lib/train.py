"""Recipes of the mini models: `python -m lib.train corpus|adopt|vae|decoder|depth|judge|unet|inpaint|fillnet|teach|export|pack|unpack|all`.

Every recipe is resumable (checkpoints in .cache/train), keeps an exponential moving average, logs to CSV and runs
on a CPU or a GPU; `--minutes` and `--steps` bound one call. The corpus is rendered once from training seeds and kept
as uint8 chunks, so that several recipes can read it while it still grows. `adopt` makes the shipped weights the
checkpoints from which the recipes go on (without an optimiser's state). `export` writes the folders that diffusers
and transformers load, with a model card each (data/models/*).
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from . import scenes

CACHE = Path(os.environ.get("LAYERS_TRAIN", Path(__file__).resolve().parents[1] / ".cache" / "train"))
SHIPPED = Path(__file__).resolve().parents[1] / "data" / "models"
CHUNK = 256
MAX_TOKENS = 32


# ---------------------------------------------------------------------------------------------- corpus
def _chunk(job: tuple) -> str:
    """Render one chunk of scenes to a .npz; atomic, skipped when it is there."""
    path, ids, how, device = job
    if path.exists():
        return path.name
    some = [scenes.sample(i, **how) for i in ids]
    r = scenes.render(some, device=device)
    arrays = {"rgb": (r.rgb * 255).round().byte(), "mm": (r.depth * 1000).round().clamp(0, 65535).to(torch.int32),
              "ids": r.ids.to(torch.int8), "kind": r.kind.byte(), "colour": r.colour.byte()}
    arrays = {k: v.cpu().numpy() for k, v in arrays.items()}
    arrays["mm"] = arrays["mm"].astype(np.uint16)
    captions = np.array([s.caption() for s in some])
    tmp = path.with_suffix(".tmp.npz")
    np.savez(tmp, captions=captions, **arrays)
    os.replace(tmp, path)
    return path.name


def corpus(n: int, device: str = "cpu", wild_share: float = .2) -> None:
    """Render n training scenes into chunks; every fifth chunk has random colours (for depth and the VAE)."""
    CACHE.mkdir(parents=True, exist_ok=True)
    every = round(1 / wild_share)
    for k in tqdm(range(math.ceil(n / CHUNK)), desc="corpus", mininterval=5):
        wild = k % every == every - 1
        ids = scenes.seeds("train", CHUNK, start=k * CHUNK)
        _chunk((CACHE / f"corpus_{k:04d}{'w' if wild else ''}.npz", ids, {"wild": wild}, device))


def ruler(n: int, device: str = "cpu") -> None:
    """Render rooms for the judge alone, with the pairs and lights that are held out from all other training: it is
    the ruler, and a ruler that has never seen a purple vase cannot tell whether a picture shows one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for k in tqdm(range(math.ceil(n / CHUNK)), desc="ruler", mininterval=5):
        ids = scenes.seeds("train", CHUNK, start=100_000 + k * CHUNK)
        _chunk((CACHE / f"ruler_{k:04d}.npz", ids, {"held_out": True}, device))


class Corpus:
    """All chunks rendered so far, as tensors; `refresh` picks up new ones. Items are drawn with a seeded generator.

    wild: the chunks of random colours too. names: pattern of the chunks' file names ("ruler_*.npz": see `ruler`)."""

    def __init__(self, wild: bool = True, device="cpu", seed: int = 0,
                 keys: tuple = ("rgb", "mm", "ids", "kind", "colour"), names: str = "corpus_*.npz"):
        self.wild, self.device, self.names, self.seen = wild, device, names, set()
        self.parts: dict[str, list] = {k: [] for k in keys}
        self.captions: list[str] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.refresh()
        if not self.seen:
            raise FileNotFoundError(f"no corpus in {CACHE}: run `python -m lib.train corpus` first")

    def refresh(self) -> None:
        for path in sorted(CACHE.glob(self.names)):
            if path.name in self.seen or path.name.endswith(".tmp.npz") or (not self.wild and path.stem.endswith("w")):
                continue
            with np.load(path) as data:
                for key in self.parts:
                    a = data[key]
                    self.parts[key].append(torch.from_numpy(a.astype(np.int32) if key == "mm" else a).to(self.device))
                self.captions += data["captions"].tolist()
            self.seen.add(path.name)

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: torch.Tensor, *keys: str) -> list[torch.Tensor]:
        out = []
        for key in keys:
            parts = self.parts[key]
            out.append(torch.stack([parts[i // CHUNK][i % CHUNK] for i in index.tolist()]))
        return out

    def draw(self, n: int, *keys: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        index = torch.randint(len(self), (n,), generator=self.generator)
        return index, self.take(index, *keys)


def textures(n: int, size: int, g: torch.Generator) -> torch.Tensor:
    """Pictures that are no rooms: dead leaves and 1/f noise, (n,3,size,size) in [0,1]; against collapse on photographs."""
    out = torch.empty(n, 3, size, size)
    f = torch.fft.fftfreq(size)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().clamp(min=1 / size)
    for k in range(n):
        spectrum = torch.fft.fft2(torch.randn(3, size, size, generator=g)) / radius ** (.8 + .6 * torch.rand(1, generator=g))
        noise = torch.fft.ifft2(spectrum).real
        noise = torch.einsum("ij,jhw->ihw", torch.randn(3, 3, generator=g) * .4 + torch.eye(3), noise)
        noise = noise / noise.std() * (.1 + .15 * torch.rand(1, generator=g)) + torch.rand(3, 1, 1, generator=g)
        if k % 2:
            yy, xx = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
            for _ in range(40):
                c, r = torch.rand(2, generator=g) * size, 3 + 22 * torch.rand(1, generator=g) ** 2
                spot = ((yy - c[0]) ** 2 + (xx - c[1]) ** 2 < r * r) if torch.rand(1, generator=g) < .6 else \
                    ((yy - c[0]).abs() < r) & ((xx - c[1]).abs() < r * .6)
                noise[:, spot] = torch.rand(3, 1, generator=g) + .15 * (noise[:, spot] - .5)
        out[k] = noise.clamp(0, 1)
    return out


# ---------------------------------------------------------------------------------------------- architectures
def make_vae(channels=(24, 48, 80, 112)):
    """f = 8, 4 latent channels, SD's class. No attention: it runs on any size alike."""
    from diffusers import AutoencoderKL
    n = len(channels)
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * n,
                         up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=tuple(channels), layers_per_block=1,
                         norm_num_groups=8, sample_size=scenes.SIZE, mid_block_add_attention=False)


def make_unet(in_channels: int = 4, channels=(64, 96, 128), text: int = 128):
    """SD's U-Net with three levels, self- and cross-attention at each (latent fractions 1, 1/2, 1/4)."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=scenes.SIZE // 8, in_channels=in_channels, out_channels=4,
                                down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
                                block_out_channels=tuple(channels), layers_per_block=1, attention_head_dim=4,
                                cross_attention_dim=text, norm_num_groups=16)


def plain_attention(unet, device):
    """On a CPU, two matrix products and a softmax: in bf16 the fused kernel's forward pass takes four times as long
    for heads this narrow (14 against 24 ms a sample, one core, forward and backward)."""
    if torch.device(device).type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor
        unet.set_attn_processor(AttnProcessor())
    return unet


def make_scheduler():
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                         steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def make_tokenizer():
    """The CLIP tokenizer of the mini models, with one token for every caption word (asserted).

    It is trained once and kept, in the cache or with the shipped model: the trainer breaks ties at random, so a second
    one numbers some words otherwise, and a U-Net that goes on with it has to learn them anew.
    """
    from transformers import CLIPTokenizer
    words, kept = scenes.vocabulary(), (CACHE / "tokenizer", SHIPPED / "mini" / "tokenizer")
    folder = next((f for f in kept if (f / "tokenizer.json").exists()), None)
    if folder:
        tok = CLIPTokenizer.from_pretrained(folder)
    else:
        tok = CLIPTokenizer().train_new_from_iterator([" ".join(words)] * 8 + words * 8, vocab_size=2000,
                                                      show_progress=False)
        tok.model_max_length = MAX_TOKENS
        tok.save_pretrained(kept[0])
    for word in words:
        ids = tok(word)["input_ids"]
        assert len(ids) == 3, f"{word!r} is {len(ids) - 2} tokens"
    return tok


def make_text(tokenizer, width: int = 128, layers: int = 2):
    from transformers import CLIPTextConfig, CLIPTextModel
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=width, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def make_depth(width: int = 128):
    """A small DPT on an 8-pixel-patch ViT: inverse depth, near = high, like MiDaS."""
    from transformers import DPTConfig, DPTForDepthEstimation
    model = DPTForDepthEstimation(DPTConfig(
        image_size=scenes.SIZE, patch_size=8, hidden_size=width, num_hidden_layers=5, num_attention_heads=4,
        intermediate_size=2 * width, backbone_out_indices=[1, 2, 3, 4], neck_hidden_sizes=[48, 64, 96, 128],
        fusion_hidden_size=48, reassemble_factors=[2, 1, .5, .25], head_in_index=-1, is_hybrid=False,
        readout_type="ignore", use_batch_norm_in_fusion_residual=False, use_auxiliary_head=False))
    with torch.no_grad():                                                 # a ReLU ends the head: start it alive
        [m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d)][-1].bias.fill_(1.)
    return model


def _pipeline(vae, text, tokenizer, unet, inpaint: bool):
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
    cls = StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline
    pipe = cls(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=make_scheduler(),
               safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline(inpaint: bool = False, seed: int = 0):
    """Random weights in the mini's exact shape family (f = 8, three levels, 128x128), narrow and fast: for tests."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    pipe = _pipeline(make_vae((16, 16, 16, 32)), make_text(tokenizer, 32, 1), tokenizer,
                     make_unet(9 if inpaint else 4, (32, 48, 64), 32), inpaint)
    torch.set_rng_state(state)
    for m in (pipe.vae, pipe.unet, pipe.text_encoder):
        m.requires_grad_(False).eval()
    return pipe


# ---------------------------------------------------------------------------------------------- the loop
class Run:
    """One resumable training run: optimiser, EMA, learning rate by the share of the budget used, CSV log."""

    def __init__(self, name: str, models: dict[str, torch.nn.Module], lr: float, minutes: float, steps: int, device="cpu",
                 trainable=None, ema_decay: float = .999):
        from diffusers.training_utils import EMAModel
        self.name, self.models, self.device, self.lr = name, models, torch.device(device), lr
        self.minutes, self.steps, self.step, self.before = minutes, steps, 0, 0.
        self.warm_from = 0                                                # the optimiser's own first step
        self.folder = CACHE / name
        self.folder.mkdir(parents=True, exist_ok=True)
        for m in models.values():
            m.to(self.device).train()
        self.params = list(trainable) if trainable is not None else [p for m in models.values() for p in m.parameters()]
        self.optimiser = torch.optim.AdamW(self.params, lr=lr, betas=(.9, .99), weight_decay=.01)
        self.ema = EMAModel(self.params, decay=ema_decay, use_ema_warmup=True, power=.75)
        self.start = self.saved = time.time()
        self._resume()

    def _resume(self) -> None:
        state = checkpoint(self.name, self.device)
        if state is None:
            return
        for key, model in self.models.items():
            if key in state["models"]:                                    # packed GANs have no discriminators
                model.load_state_dict(state["models"][key])
        if "optimiser" in state:                                          # a packed checkpoint has averaged weights only
            self.optimiser.load_state_dict(state["optimiser"])
            self.ema.load_state_dict(state["ema"])
        else:
            self.ema.shadow_params = [p.detach().clone() for p in self.params]
            self.warm_from = state["step"]
        self.step, self.before = state["step"], state["seconds"]
        print(f"{self.name}: resumed at step {self.step} after {self.before / 60:.1f} minutes")

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.start

    def progress(self) -> float:
        """Share of this call's budget that is used, 0 to 1."""
        by_time = (time.time() - self.start) / (60 * self.minutes) if self.minutes else 0.
        return min(1., max(by_time, self.step / self.steps if self.steps else 0.))

    def __iter__(self):
        """Yield the progress until the budget is spent; saves every two minutes and at the end."""
        self.start = self.saved = time.time()                             # loading and encoding do not count
        bar = tqdm(desc=self.name, total=100, mininterval=10, bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining} {postfix}")
        while (p := self.progress()) < 1:
            rate = self.lr * min(1., (self.step + 1 - self.warm_from) / 200) * (1. if p < .55 else max(.02, (1 - p) / .45))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            yield p
            self.step += 1
            bar.n = round(100 * p)
            bar.set_postfix_str(f"step {self.step}")
            if time.time() - self.saved > 120:
                self.save()
        self.save()
        bar.close()

    def update(self, loss: torch.Tensor, **log) -> None:
        """One optimiser step. A loss that is not finite is skipped and counted in the log, never applied."""
        self.optimiser.zero_grad(set_to_none=True)
        if torch.isfinite(loss):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.params, 1.)
            self.optimiser.step()
            self.ema.step(self.params)
        if self.step % 50 == 0:
            self._log({k: torch.as_tensor(v).detach() for k, v in {"loss": loss, **log}.items()})

    def _log(self, row: dict) -> None:
        path = self.folder / "log.csv"
        new = not path.exists()
        with open(path, "a", newline="") as f:
            w = csv.writer(f)
            if new:
                w.writerow(["step", "seconds", "lr", *row])
            w.writerow([self.step, round(self.seconds, 1), f"{self.optimiser.param_groups[0]['lr']:.2e}",
                        *(f"{float(v):.5f}" for v in row.values())])

    def save(self) -> None:
        state = {"models": {k: m.state_dict() for k, m in self.models.items()}, "optimiser": self.optimiser.state_dict(),
                 "ema": self.ema.state_dict(), "step": self.step, "seconds": self.seconds}
        tmp = self.folder / "last.tmp"
        torch.save(state, tmp)
        os.replace(tmp, self.folder / "last.pt")
        self.saved = time.time()


def _autocast(device):
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def checkpoint(name: str, device="cpu") -> dict | None:
    """The newest state of a run: last.pt (weights, optimiser, EMA), else packed.safetensors (averaged weights), else None."""
    path = CACHE / name / "last.pt"
    if path.exists():
        return torch.load(path, map_location=device, weights_only=True)
    path = CACHE / name / "packed.safetensors"
    if not path.exists():
        return None
    from safetensors import safe_open
    models: dict[str, dict] = {}
    with safe_open(path, "pt") as f:
        for key in f.keys():
            model, _, rest = key.partition("/")
            tensor = f.get_tensor(key).to(device)
            models.setdefault(model, {})[rest] = tensor.float() if tensor.is_floating_point() else tensor
        said = f.metadata()
    return {"models": models, "step": int(said["step"]), "seconds": float(said["seconds"])}


def averaged(name: str, **models: torch.nn.Module) -> tuple[dict, dict]:
    """Load a run's EMA weights into fresh models. Returns them (eval, frozen) and {step, seconds}.

    With several models, pass all that were trained together, in the order of the run; what the run held frozen must
    not require gradients."""
    from diffusers.training_utils import EMAModel
    state = checkpoint(name)
    if state is None:
        raise FileNotFoundError(f"no checkpoint of {name!r}: run `python -m lib.train {name}` first")
    for key, model in models.items():
        model.load_state_dict(state["models"][key])
    if "ema" in state:
        params = [p for m in models.values() for p in m.parameters() if p.requires_grad]
        ema = EMAModel(params)
        ema.load_state_dict(state["ema"])
        ema.copy_to(params)
    for m in models.values():
        m.requires_grad_(False).eval()
    return models, {"step": state["step"], "seconds": round(state["seconds"])}


def _fresh(name: str) -> dict[str, torch.nn.Module]:
    """Untrained models of a run, with the same parameters trainable as in the run."""
    from .diffusion import TeachUNet
    from .inpaint import FillNet
    from .metrics import Judge
    if name == "unet":
        return {"unet": make_unet(), "text": make_text(make_tokenizer())}
    if name == "decoder":
        vae = make_vae()
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return {"vae": vae}
    return {"vae": lambda: {"vae": make_vae()}, "depth": lambda: {"depth": make_depth()},
            "judge": lambda: {"judge": Judge()},
            "inpaint": lambda: {"unet": make_unet(9), "text": make_text(make_tokenizer()).requires_grad_(False)},
            "fillnet": lambda: {"gen": FillNet()}, "teach": lambda: {"teach": TeachUNet()}}[name]()


def pack(out: Path) -> None:
    """Every run's averaged weights in half precision, one small safetensors file each, and all logs in one JSON: what
    a machine that is lent for minutes can hand back. `unpack` puts them where the recipes go on from."""
    from safetensors.torch import save_file
    out.mkdir(parents=True, exist_ok=True)
    logs = {}
    for name in RECIPES:
        if checkpoint(name) is None:
            continue
        models, said = averaged(name, **_fresh(name))
        tensors = {f"{key}/{k}": (v.half() if v.is_floating_point() else v).contiguous()
                   for key, m in models.items() for k, v in m.state_dict().items()}
        save_file(tensors, out / f"{name}.safetensors", {k: str(v) for k, v in said.items()})
        log = CACHE / name / "log.csv"
        logs[name] = log.read_text() if log.exists() else ""
    (out / "logs.json").write_text(json.dumps(logs))


def adopt(root: Path) -> None:
    """Make the shipped weights the checkpoints of the runs that have none; steps, minutes and logs go on counting.

    The shipped VAE holds the decoder of a later `decoder` run: both count as one run of the VAE."""
    from safetensors.torch import load_file, save_file
    pipes = {name: root / name for name in ("mini", "mini-inpaint")}
    text = {k if k in make_text(make_tokenizer()).state_dict() else k.removeprefix("text_model."): v
            for k, v in load_file(pipes["mini"] / "text_encoder" / "model.safetensors").items()}
    weights = lambda folder: load_file(next(folder.glob("*model.safetensors")))
    runs = {"vae": ("mini", {"vae": weights(pipes["mini"] / "vae")}),
            "unet": ("mini", {"unet": weights(pipes["mini"] / "unet"), "text": text}),
            "inpaint": ("mini-inpaint", {"unet": weights(pipes["mini-inpaint"] / "unet"), "text": text}),
            "depth": ("mini-depth", {"depth": weights(root / "mini-depth")}),
            "judge": ("judge", {"judge": weights(root / "judge")}),
            "fillnet": ("fillnet", {"gen": weights(root / "fillnet")}),
            "teach": ("teach", {"teach": weights(root / "teach")})}
    for name, (model, parts) in runs.items():
        folder = CACHE / name
        if checkpoint(name):
            print(f"{name}: has a checkpoint already, which is kept")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads((root / model / "card.json").read_text())["runs"]
        earlier = [k for k in ((name, "decoder") if name == "vae" else (name,)) if k in before]
        total = {key: sum(before[k][key] for k in earlier) for key in ("step", "seconds")}
        save_file({f"{part}/{k}": v.contiguous() for part, state in parts.items() for k, v in state.items()},
                  folder / "packed.safetensors", {k: str(v) for k, v in total.items()})
        shutil.copy(root / model / f"log_{name}.csv", folder / "log.csv")
        print(f"{name}: goes on from {root / model}, step {total['step']}")


def unpack(source: Path) -> None:
    """Make packed weights the newest checkpoints (an older last.pt of the same run is removed)."""
    logs = json.loads((source / "logs.json").read_text())
    for name, log in logs.items():
        folder = CACHE / name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"{name}.safetensors", folder / "packed.safetensors")
        (folder / "last.pt").unlink(missing_ok=True)
        (folder / "log.csv").write_text(log)


# ---------------------------------------------------------------------------------------------- recipes
def _crops(rgb, ids, size, g):
    """One crop of each picture; three in four are centred near a pixel of an object."""
    n, _, h, w = rgb.shape
    out, objects = [], []
    for k in range(n):
        y, x = torch.randint(0, h - size + 1, (2,), generator=g).tolist()
        hits = torch.nonzero(ids[k, 0] >= 0)
        if len(hits) and torch.rand(1, generator=g) < .75:
            c = hits[torch.randint(len(hits), (1,), generator=g)][0]
            y, x = (int(min(max(int(v) - size // 2 + int(torch.randint(-12, 13, (1,), generator=g)), 0), h - size)) for v in c)
        out.append(rgb[k, :, y:y + size, x:x + size])
        objects.append(ids[k, :, y:y + size, x:x + size] >= 0)
    return torch.stack(out), torch.stack(objects)


def _gradients(x):
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def _vae_loss(target, output, objects):
    """L1 and squared error weighted by edges and objects, plus L1 of the picture's gradients; pictures in [-1, 1]."""
    gx, gy = _gradients(target)
    edge = F.pad(gx.abs().mean(1, keepdim=True), (0, 1)) + F.pad(gy.abs().mean(1, keepdim=True), (0, 0, 0, 1))
    weight = 1 + 6 * edge.clamp(max=1) + 1.5 * objects
    off = (output - target).abs()
    error = ((off + 3 * off ** 2) * weight).mean()                       # the square is what PSNR counts
    ox, oy = _gradients(output)
    return error + .7 * ((ox - gx).abs().mean() + (oy - gy).abs().mean())


def _vae_batch(data: Corpus, p: float, batch: int, extra: torch.Tensor):
    g = data.generator
    full = p > .8
    n = max(1, batch // 4) if full else batch
    _, (rgb, ids) = data.draw(n, "rgb", "ids")
    objects = ids >= 0
    if not full:
        rgb, objects = _crops(rgb, ids, 64, g)
    x = rgb.float() / 255
    if torch.rand(1, generator=g) < .1:                                   # a few pictures that are no rooms
        k = torch.randint(len(extra), (n,), generator=g)
        x, objects = extra[k][..., :x.shape[-2], :x.shape[-1]], torch.zeros_like(objects)
    if torch.rand(1, generator=g) < .5:
        x, objects = x.flip(-1), objects.flip(-1)
    return x * 2 - 1, objects.float()


def train_vae(minutes: float, steps: int, device="cpu", batch: int = 16, decoder_only: bool = False) -> None:
    """The autoencoder; with decoder_only the encoder is frozen (latents stay valid) and the decoder goes on alone."""
    torch.manual_seed(1 + decoder_only)
    vae = make_vae()
    name = "decoder" if decoder_only else "vae"
    if decoder_only:
        averaged("vae", vae=vae)
        vae.decoder.requires_grad_(True)
        vae.post_quant_conv.requires_grad_(True)
    run = Run(name, {"vae": vae}, 6e-4, minutes, steps, device, [p for p in vae.parameters() if p.requires_grad])
    data = Corpus(seed=run.step)
    extra = textures(192, scenes.SIZE, torch.Generator().manual_seed(5))
    for p in run:
        if run.step % 400 == 0:
            data.refresh()
        x, objects = _vae_batch(data, p, batch, extra)
        x, objects = x.to(device), objects.to(device)
        with _autocast(device):
            with torch.set_grad_enabled(not decoder_only):
                posterior = vae.encode(x).latent_dist
            z = posterior.mode() if decoder_only and run.step % 2 else posterior.sample()
            y = vae.decode(z.to(x.dtype)).sample
        kl = posterior.kl().float().mean() / z[0].numel()
        loss = _vae_loss(x, y.float(), objects)
        mse = F.mse_loss(y.detach().float(), x) / 4
        run.update(loss + 2e-4 * kl, psnr=-10 * mse.log10(), kl=kl, std=z.std())


def _photometric(x, g):
    """Brightness, gamma, channel gains, noise, blur: a photograph is never as clean as a render."""
    n = len(x)
    x = x.clamp(1e-4, 1) ** (.7 + .7 * torch.rand(n, 1, 1, 1, generator=g))
    x = x * (.75 + .4 * torch.rand(n, 1, 1, 1, generator=g)) * (.92 + .16 * torch.rand(n, 3, 1, 1, generator=g))
    if torch.rand(1, generator=g) < .3:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (x + .03 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).clamp(0, 1)


def _labelled(data: Corpus, batch: int, augment: float):
    g = data.generator
    _, (rgb, mm, kind, colour) = data.draw(batch, "rgb", "mm", "kind", "colour")
    x, z = rgb.float() / 255, mm.float() / 1000
    if torch.rand(1, generator=g) < augment:
        x = _photometric(x, g)
    if torch.rand(1, generator=g) < .5:
        x, z, kind, colour = x.flip(-1), z.flip(-1), kind.flip(-1), colour.flip(-1)
    return x, z, kind.long(), colour.long()


INVERSE_SCALE = 10.   # the depth model predicts INVERSE_SCALE / metres


def train_depth(minutes: float, steps: int, device="cpu", batch: int = 12) -> None:
    torch.manual_seed(2)
    model = make_depth()
    run = Run("depth", {"depth": model}, 6e-4, minutes, steps, device)
    data = Corpus(seed=100 + run.step)
    for _ in run:
        if run.step % 200 == 0:
            data.refresh()
        x, z, _, _ = (t.to(device) for t in _labelled(data, batch, .6))
        with _autocast(device):
            out = model(x * 2 - 1).predicted_depth.float()[:, None]
        log = out.clamp(min=.05).log() - (INVERSE_SCALE / z).log()
        dead = F.relu(.2 - out).mean()                                    # keeps the last ReLU alive
        gx, gy = _gradients(log)
        absrel = ((out.clamp(min=.05) * z / INVERSE_SCALE) ** -1 - 1).abs().mean()
        run.update(log.abs().mean() + .5 * (gx.abs().mean() + gy.abs().mean()) + dead, absrel=absrel)


def _recoloured(x, colour, g):
    """Permute the colour channels of half a batch: a kind must be told by its shape, or pairs never seen in training
    are misjudged. The colours' names no longer hold there: labels -100, which cross-entropy skips."""
    x, colour = x.clone(), colour.clone()
    orders = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    for k in range(len(x) // 2):
        x[k] = x[k][list(orders[int(torch.randint(len(orders), (1,), generator=g))])]
        colour[k] = torch.where(colour[k] > 0, torch.full_like(colour[k], -100), colour[k])
    return x, colour


def train_judge(minutes: float, steps: int, device="cpu", batch: int = 16) -> None:
    """The judge, in turns on the corpus and on its own rooms with the held-out pairs (`ruler`)."""
    from .metrics import Judge
    ruler(len(Corpus(wild=False)) // 3, str(device))
    torch.manual_seed(3)
    model = Judge()
    run = Run("judge", {"judge": model}, 2e-3, minutes, steps, device)
    both = [Corpus(wild=False, seed=200 + run.step, names=names) for names in ("corpus_*.npz", "ruler_*.npz")]
    for _ in run:
        data = both[run.step % 2]
        if run.step % 200 < 2:
            data.refresh()
        x, z, kind, colour = (t.to(device) for t in _labelled(data, batch, .3))
        x, colour = _recoloured(x, colour, data.generator)
        with _autocast(device):
            out = model(x)
        inside = 1 + 2 * (kind[:, 0] > 0).float()
        loss = sum((F.cross_entropy(out[k].float(), t[:, 0], reduction="none") * inside).mean()
                   for k, t in (("kind", kind), ("colour", colour)))
        depth = (out["depth"].log() - z.log()).abs().mean()
        hit = (out["kind"].argmax(1) == kind[:, 0])[kind[:, 0] > 0].float().mean()
        run.update(loss + depth, kind_accuracy=hit, depth=depth)


# ---------------------------------------------------------------------------------------------- diffusion recipes
_MIRROR = {"left": "right", "right": "left"}


def mirrored(text: str) -> str:
    """The caption of the picture seen in a mirror."""
    return " ".join(_MIRROR.get(w, w) for w in text.split())


class Latents:
    """The corpus (rooms in true colours) as latents, each picture also mirrored; encoded once for each encoder, and kept
    beside the checkpoints, so that every recipe that follows finds them."""

    def __init__(self, vae, device="cpu"):
        self.vae, self.device = vae, device
        self.data = Corpus(wild=False)
        weights = torch.stack([p.double().abs().sum().cpu() for p in vae.encoder.parameters()])
        self.path = CACHE / f"latents_{hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]}.pt"
        self.z = torch.load(self.path, weights_only=True) if self.path.exists() else [torch.empty(0, 4, 16, 16)] * 2
        if len(self.z[0]) > len(self.data):
            raise RuntimeError(f"{self.path.name} holds more pictures than the corpus: remove it, the corpus has changed")
        self.refresh()

    def refresh(self) -> None:
        self.data.refresh()
        new = range(len(self.z[0]), len(self.data))
        if not len(new):
            return
        made = [[], []]
        for i in tqdm(range(0, len(new), 64), desc="latents", mininterval=10):
            (rgb,) = self.data.take(torch.tensor(new[i:i + 64]), "rgb")
            for k, x in enumerate((rgb, rgb.flip(-1))):
                with torch.no_grad(), _autocast(self.device):
                    z = self.vae.encode((x.float() / 127.5 - 1).to(self.device)).latent_dist.mode()
                made[k].append(z.float().cpu())
        self.z = [torch.cat([old, *m]) for old, m in zip(self.z, made)]
        tmp = self.path.with_suffix(".tmp")
        torch.save(self.z, tmp)
        os.replace(tmp, self.path)

    def draw(self, n: int, g: torch.Generator):
        """Scaled latents (n,4,16,16), captions, indices, and whether each is mirrored."""
        index = torch.randint(len(self.z[0]), (n,), generator=g)
        flip = torch.rand(n, generator=g) < .5
        z = torch.stack([self.z[int(f)][i] for i, f in zip(index.tolist(), flip.tolist())])
        words = [mirrored(self.data.captions[i]) if f else self.data.captions[i] for i, f in zip(index.tolist(), flip.tolist())]
        return (z * self.vae.config.scaling_factor).to(self.device), words, index, flip


def frozen_vae(decoder: bool = True):
    """The trained VAE with its scaling factor (1 / standard deviation of training latents) in the config.

    Takes the decoder of the later `decoder` run when there is one."""
    vae = make_vae()
    averaged("vae", vae=vae)
    if decoder and checkpoint("decoder"):
        vae = _fresh("decoder")["vae"]
        averaged("decoder", vae=vae)
    with torch.no_grad():
        data = Corpus(wild=False)
        (rgb,) = data.take(torch.arange(min(256, len(data))), "rgb")
        z = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mode() for x in rgb.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(z.std()), 5))
    return vae


def _words(tokenizer, text, prompts, device):
    ids = tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    return text(ids.to(device))[0]


def _snr_weight(scheduler, t, gamma: float = 5.):
    """Min-SNR weighting for noise prediction (Hang et al. 2023)."""
    a = scheduler.alphas_cumprod.to(t.device)[t]
    snr = a / (1 - a)
    return snr.clamp(max=gamma) / snr


def train_unet(minutes: float, steps: int, device="cpu", batch: int = 32) -> None:
    """Text to image in latents: noise prediction, the text encoder trained along, captions dropped 10 % for CFG."""
    torch.manual_seed(4)
    tokenizer = make_tokenizer()
    text, unet, scheduler = make_text(tokenizer), plain_attention(make_unet(), device), make_scheduler()
    run = Run("unet", {"unet": unet, "text": text}, 8e-4, minutes, steps, device, ema_decay=.9995)
    latents = Latents(frozen_vae().to(device), device)
    g = torch.Generator().manual_seed(300 + run.step)
    for _ in run:
        if run.step % 500 == 0:
            latents.refresh()
        z, words, *_ = latents.draw(batch, g)
        words = ["" if torch.rand(1, generator=g) < .1 else w for w in words]
        noise = torch.randn(z.shape, generator=g).to(device)
        t = torch.randint(0, 1000, (batch,), generator=g).to(device)
        with _autocast(device):
            out = unet(scheduler.add_noise(z, noise, t), t, _words(tokenizer, text, words, device)).sample.float()
        each = ((out - noise) ** 2).mean((1, 2, 3))
        run.update((each * _snr_weight(scheduler, t)).mean(), mse=each.mean())


def widen(unet, extra: int = 5):
    """A 9-channel copy of a 4-channel U-Net: the new input weights start at zero, so it starts as the old one."""
    wide = make_unet(4 + extra)
    state = unet.state_dict()
    w = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([w, w.new_zeros(w.shape[0], extra, *w.shape[2:])], 1)
    wide.load_state_dict(state)
    return wide


def _holes(latents: Latents, index, flip, words, g):
    """Masks, masked pictures' latents, and captions for holes: a hole that touches no object may be told 'empty'."""
    from . import masks
    rgb, ids = latents.data.take(index, "rgb", "ids")
    rgb = torch.where(flip[:, None, None, None], rgb.flip(-1), rgb)
    ids = torch.where(flip[:, None, None, None], ids.flip(-1), ids)
    hole = masks.random_fill_masks(len(index), scenes.SIZE, g, ids=ids)
    touched = ((ids >= 0) & (hole > .5)).flatten(1).any(1)
    words = [("" if u < .15 else w) if t or u > .6 else "an empty room " + " ".join(w.split()[-4:])
             for w, t, u in zip(words, touched.tolist(), torch.rand(len(words), generator=g).tolist())]
    x = (rgb.float() / 127.5 - 1) * (hole < .5)
    with torch.no_grad(), _autocast(latents.device):
        seen = latents.vae.encode(x.to(latents.device)).latent_dist.mode().float() * latents.vae.config.scaling_factor
    small = F.interpolate(hole, size=(scenes.SIZE // 8,) * 2)             # nearest, as the pipeline does
    return small.to(latents.device), seen, words


def _where_it_paints(hole, outside: float = .2):
    """Weights (B,1,h,w) that sum to 1 in each picture: full in the hole and one latent around it, little elsewhere.

    What is outside is given to the U-Net as it is, so copying it costs capacity that the hole needs."""
    weight = F.max_pool2d(hole, 3, 1, 1).clamp(min=outside)
    return weight / weight.sum((1, 2, 3), keepdim=True)


def train_inpaint(minutes: float, steps: int, device="cpu", batch: int = 32) -> None:
    """The 9-channel U-Net, from the text-to-image weights; text encoder frozen; all mask kinds; the loss is the hole's."""
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    parts, _ = averaged("unet", unet=make_unet(), text=make_text(tokenizer))
    unet, text, scheduler = plain_attention(widen(parts["unet"]), device), parts["text"].to(device), make_scheduler()
    run = Run("inpaint", {"unet": unet, "text": text.requires_grad_(False)}, 6e-4, minutes, steps, device,
              list(unet.parameters()), ema_decay=.9995)
    latents = Latents(frozen_vae().to(device), device)
    g = torch.Generator().manual_seed(400 + run.step)
    for _ in run:
        z, words, index, flip = latents.draw(batch, g)
        hole, seen, words = _holes(latents, index, flip, words, g)
        noise = torch.randn(z.shape, generator=g).to(device)
        t = torch.randint(0, 1000, (batch,), generator=g).to(device)
        x = torch.cat([scheduler.add_noise(z, noise, t), hole, seen], 1)
        with _autocast(device):
            out = unet(x, t, _words(tokenizer, text, words, device)).sample.float()
        each = ((out - noise) ** 2).mean(1, keepdim=True).mul(_where_it_paints(hole)).sum((1, 2, 3))
        run.update((each * _snr_weight(scheduler, t)).mean(), mse=each.mean())


# ---------------------------------------------------------------------------------------------- before diffusion
class Critic(torch.nn.Module):
    """A discriminator on patches: pictures with their mask (B, 4, H, W) -> a map of scores, high = looks real.

    Spectral normalisation keeps it from winning too fast. fold: pixels folded into channels first."""

    def __init__(self, fold: int, widths=(32, 64, 64)):
        super().__init__()
        from torch.nn.utils.parametrizations import spectral_norm
        sizes, self.fold = (4 * fold * fold, *widths), fold
        self.layers = torch.nn.ModuleList(
            spectral_norm(torch.nn.Conv2d(a, b, 3, 1 + (k > 0), 1)) for k, (a, b) in enumerate(zip(sizes, sizes[1:])))
        self.score = spectral_norm(torch.nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, x):
        x = F.pixel_unshuffle(x, self.fold)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), .2)
        return self.score(x)


def _windows(hole, size: int, g):
    """One window (B,2: top, left) for each picture, around a random pixel of its hole."""
    h, w = hole.shape[-2:]
    spots = [torch.nonzero(one[0]) for one in hole]
    spots = torch.stack([s[torch.randint(len(s), (1,), generator=g)[0]] for s in spots])
    return (spots - size // 2).clamp(min=0).minimum(torch.tensor([h - size, w - size]))


def _cut(x, corners, size: int):
    return torch.stack([one[:, y:y + size, z:z + size] for one, (y, z) in zip(x, corners.tolist())])


def _fill_losses(out, x, hole):
    """Reconstruction: L1 in the hole and around it, at three scales, and of the gradients in the hole."""
    off = (out - x).abs()
    loss = 5 * (off * hole).sum() / (3 * hole.sum()) + off.mean()
    gx, gy = _gradients((out - x) * hole)
    loss = loss + 2 * (gx.abs().sum() + gy.abs().sum()) / (3 * hole.sum())
    for k in (4, 16):
        loss = loss + 2 * (F.avg_pool2d((out - x) * hole, k).abs().sum() * k * k) / (3 * hole.sum())
    return loss


def train_fillnet(minutes: float, steps: int, device="cpu", batch: int = 8) -> None:
    """The context network of lesson 04: reconstruction first; from 35 % of the budget on also two discriminators with
    the hinge loss, a global one and a local one at the hole (Iizuka et al. 2017, Yu et al. 2019)."""
    from .inpaint import FillNet
    from .masks import random_fill_masks
    torch.manual_seed(6)
    window, start = scenes.SIZE // 2 - 16, .35
    nets = {"gen": FillNet(), "whole": Critic(4), "local": Critic(2)}
    run = Run("fillnet", nets, 2e-3, minutes, steps, device, list(nets["gen"].parameters()))
    gen, critics = nets["gen"], [nets["whole"], nets["local"]]
    judging = [p for c in critics for p in c.parameters()]
    theirs = torch.optim.Adam(judging, 4e-4, betas=(0., .9))              # starts afresh when a run goes on
    data = Corpus(wild=False, seed=500 + run.step, keys=("rgb", "ids"))
    g = data.generator
    for p in run:
        _, (rgb, ids) = data.draw(batch, "rgb", "ids")
        if torch.rand(1, generator=g) < .5:
            rgb, ids = rgb.flip(-1), ids.flip(-1)
        hole = random_fill_masks(batch, scenes.SIZE, g, ids=ids)
        corners = _windows(hole, window, g)
        x, hole = rgb.to(device).float() / 255, hole.to(device)
        views = lambda y: (torch.cat([y * 2 - 1, hole], 1), _cut(torch.cat([y * 2 - 1, hole], 1), corners, window))
        with _autocast(device):
            out = gen(x, hole)
            made = x * (1 - hole) + out * hole
            fooled = hinge = out.new_zeros(())
            if p > start:
                for q in judging:
                    q.requires_grad_(True)
                hinge = sum(F.relu(1 - c(real)).mean() + F.relu(1 + c(fake)).mean()
                            for c, real, fake in zip(critics, views(x), views(made.detach())))
                theirs.zero_grad(set_to_none=True)
                hinge.backward()
                theirs.step()
                for q in judging:
                    q.requires_grad_(False)
                fooled = -sum(c(fake).mean() for c, fake in zip(critics, views(made)))
        weight = .04 * min(1., max(0., p - start) / .1)
        mse = ((out.detach() - x) ** 2 * hole).sum() / (3 * hole.sum())
        run.update(_fill_losses(out, x, hole) + weight * fooled, psnr=-10 * mse.log10(), hinge=hinge, fooled=fooled)


def teach_corpus(n: int = 2048, size: int = 64, device="cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Simple rooms of the train split for the teaching model, rendered once: uint8 (n,3,size,size) and labels (n,)."""
    from . import diffusion
    path = CACHE / f"teach_{size}_{n}.npz"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        parts = [diffusion.teach_pictures(min(CHUNK, n - k), size, start=k, device=device)
                 for k in tqdm(range(0, n, CHUNK), desc="simple rooms", mininterval=5)]
        rgb, labels = (torch.cat(p).cpu() for p in zip(*parts))
        tmp = path.with_suffix(".tmp.npz")
        np.savez(tmp, rgb=(rgb * 255).round().byte().numpy(), labels=labels.numpy())
        os.replace(tmp, path)
    with np.load(path) as data:
        return torch.from_numpy(data["rgb"]), torch.from_numpy(data["labels"])


def _shape_weight(scheduler, t):
    """Weights of the noise's error for short trainings in pixels: high noise counts much, for there it is decided what
    stands where. In units of the predicted picture's error the weight is min(SNR + 1, 5)."""
    snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).to(t.device)[t]
    return (snr + 1).clamp(max=5.) / snr.clamp(min=.05)


def train_teach(minutes: float, steps: int, device="cpu", batch: int = 16, rooms: int = 2048) -> None:
    """The teaching U-Net of lesson 03: noise prediction in pixels, the label dropped 15 % for CFG."""
    from . import diffusion
    torch.manual_seed(6)
    model, scheduler = diffusion.TeachUNet(), diffusion.teach_scheduler()
    run = Run("teach", {"teach": model}, 1.5e-3, minutes, steps, device)
    rgb, labels = teach_corpus(rooms, device=device)
    g = torch.Generator().manual_seed(500 + run.step)
    for _ in run:
        i = torch.randint(len(rgb), (batch,), generator=g)
        x0 = rgb[i].float() / 127.5 - 1
        x0 = torch.where(torch.rand(batch, 1, 1, 1, generator=g) < .5, x0.flip(-1), x0).to(device)
        label = (labels[i] * (torch.rand(batch, generator=g) > .15)).to(device)
        noise = torch.randn(x0.shape, generator=g).to(device)
        t = torch.randint(0, 1000, (batch,), generator=g).to(device)
        with _autocast(device):
            out = model(diffusion.q_sample(scheduler, x0, t, noise), t, label).float()
        each = ((out - noise) ** 2).mean((1, 2, 3))
        run.update((each * _shape_weight(scheduler, t)).mean(), mse=each.mean())


# ---------------------------------------------------------------------------------------------- export
def _replace_folder(new: Path, folder: Path) -> None:
    if folder.exists():
        keep = folder / "card.json"
        if keep.exists() and not (new / "card.json").exists():
            shutil.copy(keep, new / "card.json")
        shutil.rmtree(folder)
    os.replace(new, folder)


def _copy_log(name: str, folder: Path) -> None:
    path = CACHE / name / "log.csv"
    if path.exists():
        shutil.copy(path, folder / f"log_{name}.csv")


def _card(folder: Path, runs: dict, **more) -> None:
    """card.json: what was trained, for how long and on what; measured quality is added by `lib.benchmark models`."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    card = {"runs": runs, "hardware": gpu or f"CPU, {os.cpu_count()} cores, bf16 autocast", "corpus_seeds": "train split",
            "recipe": "python -m lib.train", "licence": "MIT", **more}
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (folder / "README.md").write_text(card_text(folder.name.strip(".").removesuffix(".tmp"), card))


_WHAT = {"mini": "Text to image in the Miniature, in the format of a `StableDiffusionPipeline` folder (f = 8, 4 latent channels, "
                 "128x128).",
         "mini-inpaint": "The 9-channel inpainting model, in the format of a `StableDiffusionInpaintPipeline` folder. The VAE "
                         "is that of `mini`; U-Net and text encoder began as `mini`'s were when this run began.",
         "mini-depth": "A small transformers `DPTForDepthEstimation`. It gives *inverse* depth, near = high, like MiDaS: "
                       "metres = inverse_scale / prediction (the constant is in card.json).",
         "judge": "A timm network that scores edits: depth, kind and colour of every pixel. Other architecture and seed than "
                  "the models it judges, and, unlike them, trained on the held-out pairs and lights too.",
         "fillnet": "The context network of lesson 04 (`lib.inpaint.FillNet`): fills a hole in one pass, with gated convolutions; "
                    "trained with reconstruction losses and a global and a local discriminator (not shipped).",
         "teach": "The teaching U-Net of lesson 03 (`lib.diffusion.TeachUNet`): noise prediction in the pixels of simple rooms, 64x64, "
                  "with a label for the kind of thing. Cosine schedule."}


def card_text(name: str, card: dict) -> str:
    """The model card in words; `lib.benchmark models` fills in the measured quality."""
    runs = "\n".join(f"| {k} | {r['step']} | {r['seconds'] / 60:.0f} | [log_{k}.csv](log_{k}.csv) |" for k, r in card["runs"].items())
    return (f"# {name}\n\n{_WHAT[name]} Made by `{card['recipe']}` from rooms of the Miniature's *train* split (the VAE also from made textures), rendered by "
            f"`lib.scenes`; no photograph, no other weights. For teaching: it knows nothing but the Miniature.\n\n"
            f"Parameters: {json.dumps(card['parameters'])}. Hardware: {card['hardware']}. Licence: {card['licence']}.\n\n"
            f"| run | steps | minutes | log |\n|---|---|---|---|\n{runs}\n\n## Measured quality\n\n"
            f"<!-- quality:begin -->\n<!-- quality:end -->\n")


def _half_but_text(pipe):
    pipe.vae.half()
    pipe.unet.half()
    return pipe


def export(root: Path, names=("mini", "mini-inpaint", "mini-depth", "judge")) -> None:
    """Write the shipped folders from the newest checkpoints. U-Net and VAE in fp16 files, the text encoder in fp32."""
    root.mkdir(parents=True, exist_ok=True)
    for name in names:
        tmp = root / f".{name}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        _EXPORT[name](tmp)
        _replace_folder(tmp, root / name)
        print(f"wrote {root / name}")


def prefix_text_keys(folder: Path) -> None:
    """Name the text encoder's tensors `text_model.…`: newer transformers save them without, and older ones would then
    load random weights in silence; both read them with the prefix."""
    from safetensors.torch import load_file, save_file
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}, path,
              {"format": "pt"})


def _export_pipeline(folder: Path, inpaint: bool) -> None:
    tokenizer = make_tokenizer()
    parts, info = averaged("unet", unet=make_unet(), text=make_text(tokenizer))
    runs = {"unet": info}
    if inpaint:
        parts["unet"] = make_unet(9)
        own, runs["inpaint"] = averaged("inpaint", unet=parts["unet"], text=make_text(tokenizer).requires_grad_(False))
        parts["text"] = own["text"]
    vae = frozen_vae()
    for name in ("vae", "decoder"):
        if state := checkpoint(name):
            runs[name] = {"step": state["step"], "seconds": round(state["seconds"])}
    pipe = _half_but_text(_pipeline(vae, parts["text"], tokenizer, parts["unet"], inpaint))
    pipe.save_pretrained(folder, safe_serialization=True)
    prefix_text_keys(folder / "text_encoder")
    for name in runs:
        _copy_log(name, folder)
    _card(folder, runs, parameters={k: sum(p.numel() for p in getattr(pipe, k).parameters()) for k in ("vae", "unet", "text_encoder")})


def _export_depth(folder: Path) -> None:
    model = make_depth()
    _, info = averaged("depth", depth=model)
    model.half().save_pretrained(folder, safe_serialization=True)
    _copy_log("depth", folder)
    _card(folder, {"depth": info}, inverse_scale=INVERSE_SCALE, convention="inverse depth, near = high; metres = inverse_scale / prediction",
          parameters=sum(p.numel() for p in model.parameters()))


def _export_judge(folder: Path) -> None:
    from .metrics import Judge
    model = Judge()
    _, info = averaged("judge", judge=model)
    model.save(folder)
    _copy_log("judge", folder)
    _card(folder, {"judge": info}, parameters=sum(p.numel() for p in model.parameters()))


def _export_teach(folder: Path) -> None:
    from . import diffusion
    models, info = averaged("teach", teach=diffusion.TeachUNet())
    diffusion.save_teach(models["teach"], folder)
    _copy_log("teach", folder)
    quality = _teach_quality(models["teach"])
    _card(folder, {"teach": info}, labels=["anything", *diffusion.TEACH_KINDS],
          parameters=sum(p.numel() for p in models["teach"].parameters()), quality=quality)
    rows = "".join(f"| noise at {k}: mean square of what is predicted wrong | {v} |\n" for k, v in quality.items() if k[0] == "t")
    text = (folder / "README.md").read_text().replace("<!-- quality:begin -->\n", "<!-- quality:begin -->\n| measured on "
                                                      f"{quality['scenes']} unseen rooms | value |\n| --- | --- |\n{rows}")
    (folder / "README.md").write_text(text)


@torch.no_grad()
def _teach_quality(model, n: int = 24) -> dict:
    """The simple loss on unseen simple rooms at three noise levels, with the right labels."""
    from . import diffusion
    rgb, labels = diffusion.teach_pictures(n, 64, "val")
    noise, scheduler = torch.randn(rgb.shape, generator=torch.Generator().manual_seed(0)), diffusion.teach_scheduler()
    wrong = {t: model(diffusion.q_sample(scheduler, rgb * 2 - 1, t, noise), t, labels) - noise for t in (100, 400, 800)}
    return {"scenes": n, **{f"t = {t}": round(float(d.square().mean()), 5) for t, d in wrong.items()}}


def _export_fillnet(folder: Path) -> None:
    from .inpaint import FillNet
    models, info = averaged("fillnet", gen=FillNet())
    models["gen"].save(folder)
    _copy_log("fillnet", folder)
    quality = fillnet_quality(models["gen"])
    _card(folder, {"fillnet": info}, parameters=sum(p.numel() for p in models["gen"].parameters()), quality=quality)
    rows = "\n".join(f"| {name} | {value} |" for name, value in quality.items())
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace(
        "<!-- quality:begin -->\n", f"<!-- quality:begin -->\n| measured on unseen rooms | value |\n| --- | --- |\n{rows}\n"))


def fillnet_quality(net, n: int = 64) -> dict:
    """PSNR in the hole (dB) of the network and of Telea on n validation rooms with all kinds of holes."""
    from . import inpaint, masks, metrics
    r = scenes.render([scenes.sample(s) for s in scenes.seeds("val", n)])
    hole = masks.random_fill_masks(n, scenes.SIZE, torch.Generator().manual_seed(0), ids=r.ids)
    psnr = lambda filled: round(float(metrics.psnr(filled, r.rgb, hole).mean()), 2)
    return {"scenes": n, "psnr_in_the_hole": psnr(inpaint.fillnet(r.rgb, hole, net)),
            "psnr_in_the_hole_of_telea": psnr(inpaint.telea(r.rgb, hole)),
            "psnr_in_the_hole_of_grey": psnr(inpaint.grey(r.rgb, hole))}


_EXPORT = {"mini": lambda f: _export_pipeline(f, False), "mini-inpaint": lambda f: _export_pipeline(f, True),
           "mini-depth": _export_depth, "judge": _export_judge, "teach": _export_teach, "fillnet": _export_fillnet}
#: Minutes of each recipe where neither --minutes nor --steps is given: a sensible evening on two cores.
MINUTES = {"vae": 60, "decoder": 45, "depth": 25, "judge": 25, "unet": 120, "inpaint": 60, "fillnet": 30, "teach": 60}
RECIPES = {"vae": train_vae, "decoder": lambda *a, **k: train_vae(*a, decoder_only=True, **k), "depth": train_depth,
           "judge": train_judge, "unet": train_unet, "inpaint": train_inpaint, "fillnet": train_fillnet, "teach": train_teach}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lib.train", description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="+", choices=["corpus", "adopt", "export", "pack", "unpack", "all", *RECIPES])
    parser.add_argument("--minutes", type=float, default=0, help="stop each recipe after so many minutes of this call")
    parser.add_argument("--steps", type=int, default=0, help="stop each recipe at this step")
    parser.add_argument("--scenes", type=int, default=12000, help="size of the corpus")
    parser.add_argument("--batch", type=int, default=0, help="batch size (default: the recipe's, made for a CPU)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    parser.add_argument("--packed", type=Path, default=CACHE / "packed", help="folder of pack and unpack")
    parser.add_argument("--only", nargs="*", default=list(_EXPORT), choices=list(_EXPORT), help="models to export")
    args = parser.parse_args(argv)
    jobs = ["corpus", *RECIPES, "export"] if "all" in args.what else args.what
    for job in jobs:
        if job == "corpus":
            corpus(args.scenes, args.device)
        elif job in ("pack", "unpack"):
            (pack if job == "pack" else unpack)(args.packed)
        elif job == "adopt":
            adopt(args.out)
        elif job == "export":
            export(args.out, args.only)
        else:
            minutes = args.minutes or (0 if args.steps else MINUTES[job])
            RECIPES[job](minutes, args.steps, args.device, **({"batch": args.batch} if args.batch else {}))


if __name__ == "__main__":
    main()
