"""Filling holes (lesson 04): classical methods, and diffusion models.

All functions take an image (B, 3, H, W) in [0, 1] and a fill_mask (B or 1, 1, H, W), 1 = to fill, and
return images in [0, 1] in which every known pixel (fill_mask == 0) is **exactly** the input's.
Soft mask values blend the filling with the image; what stands where fill_mask is 1 is never looked at.
"""
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from skimage.restoration import inpaint_biharmonic

from lib import diffusion, latents
from lib.masks import check_fill_mask


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


METHODS = {"telea": telea, "biharmonic": biharmonic, "grey": grey}


def fill(image, fill_mask, method="telea", **options):
    """Fill by a method's name, by a callable(image, fill_mask), or by a diffusers pipeline."""
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
        raise ValueError(f"with_model needs a pipeline whose U-Net takes 4 or 9 channels; this takes {channels}.")
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
    hole = F.adaptive_max_pool2d(fill_mask, known.shape[-2:]).to(known)   # a latent touched by the hole is hole
    noise = torch.randn(known.shape, generator=generator).to(known)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps, device=known.device)
    times = scheduler.timesteps
    text = diffusion.embed(pipe, _prompts(prompt, len(image))).to(known)
    if guidance_scale != 1.0:
        none = diffusion.embed(pipe, [negative_prompt] * len(image)).to(known)
        text = torch.cat([none, text])
    z = noise * scheduler.init_noise_sigma
    for i, t in enumerate(times):
        x = scheduler.scale_model_input(torch.cat([z, z]) if guidance_scale != 1.0 else z, t)
        eps = pipe.unet(x, t, encoder_hidden_states=text).sample
        if guidance_scale != 1.0:
            without, with_text = eps.chunk(2)
            eps = without + guidance_scale * (with_text - without)
        z = scheduler.step(eps, t, z).prev_sample
        last = i + 1 == len(times)
        there = known if last else scheduler.add_noise(known, noise, times[i + 1:i + 2].expand(len(z)))
        z = hole * z + (1 - hole) * there
    return latents.decode(pipe, z)


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

    forward(image (B, 3, H, W) in [0, 1], fill_mask (B, 1, H, W)) -> (B, 3, H, W) in [0, 1]; sides multiples of 8.
    What stands in the hole is not looked at. Dilated convolutions at 1/8 of the size see the whole picture.
    0.34 M parameters. Trained by `python -m lib.train fillnet` with reconstruction losses and two discriminators, one
    for the whole picture and one for a window at the hole (Iizuka et al. 2017: globally and locally consistent).
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
            raise ValueError(f"FillNet takes sides that are multiples of 8; this picture is {tuple(image.shape)}.")
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
        """The network of a folder, float32, frozen. FileNotFoundError when it is not there, with the way out."""
        from safetensors.torch import load_file
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}: get the whole repository again, or make it with "
                                        "`python -m lib.train fillnet export --only fillnet`")
        net = cls(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return net.to(device).eval().requires_grad_(False)


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
