"""Recipes of the mini models: `python -m lib.train corpus|vae|decoder|depth|judge|unet|inpaint|export|all`.

Every recipe is resumable (checkpoints in .cache/train), keeps an exponential moving average, logs to CSV and runs
on a CPU or a GPU; `--minutes` and `--steps` bound one call. The corpus is rendered once from training seeds and kept
as uint8 chunks, so that several recipes can read it while it still grows. `export` writes the folders that diffusers
and transformers load, with a model card each (data/models/*).
"""
from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from . import scenes

CACHE = Path(os.environ.get("LAYERS_TRAIN", Path(__file__).resolve().parents[1] / ".cache" / "train"))
CHUNK = 256
MAX_TOKENS = 32


# ---------------------------------------------------------------------------------------------- corpus
def _chunk(job: tuple) -> str:
    """Render one chunk of scenes to a .npz; atomic, skipped when it is there."""
    path, ids, wild, device = job
    if path.exists():
        return path.name
    some = [scenes.sample(i, wild=wild) for i in ids]
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
        _chunk((CACHE / f"corpus_{k:04d}{'w' if wild else ''}.npz", ids, wild, device))


class Corpus:
    """All chunks rendered so far, as tensors; `refresh` picks up new ones. Items are drawn with a seeded generator."""

    def __init__(self, wild: bool = True, device="cpu", seed: int = 0):
        self.wild, self.device, self.seen = wild, device, set()
        self.parts: dict[str, list] = {k: [] for k in ("rgb", "mm", "ids", "kind", "colour")}
        self.captions: list[str] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.refresh()
        if not self.seen:
            raise FileNotFoundError(f"no corpus in {CACHE}: run `python -m lib.train corpus` first")

    def refresh(self) -> None:
        for path in sorted(CACHE.glob("corpus_*.npz")):
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
def make_vae(channels=(32, 64, 96, 128)):
    """f = 8, 4 latent channels, SD's class. No attention: it runs on any size alike."""
    from diffusers import AutoencoderKL
    n = len(channels)
    return AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * n,
                         up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=tuple(channels), layers_per_block=1,
                         norm_num_groups=16, sample_size=scenes.SIZE, mid_block_add_attention=False)


def make_unet(in_channels: int = 4, channels=(96, 160, 224), text: int = 128):
    """SD's U-Net with three levels, self- and cross-attention at each (latent fractions 1, 1/2, 1/4)."""
    from diffusers import UNet2DConditionModel
    return UNet2DConditionModel(sample_size=scenes.SIZE // 8, in_channels=in_channels, out_channels=4,
                                down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
                                block_out_channels=tuple(channels), layers_per_block=1, attention_head_dim=4,
                                cross_attention_dim=text, norm_num_groups=16)


def make_scheduler():
    from diffusers import DDIMScheduler
    return DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", num_train_timesteps=1000,
                         steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def make_tokenizer():
    """A CLIP tokenizer with one token for every caption word (asserted)."""
    from transformers import CLIPTokenizer
    words = scenes.vocabulary()
    base = CLIPTokenizer()
    tok = base.train_new_from_iterator([" ".join(words)] * 8 + words * 8, vocab_size=2000, show_progress=False)
    tok.model_max_length = MAX_TOKENS
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
