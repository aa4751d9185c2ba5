"""The latent space of a Stable-Diffusion-shaped pipeline: pictures in [0, 1] <-> scaled latents.

The one place where pictures become [-1, 1], and where the VAE's `scaling_factor` (0.18215 in SD 1.x) is
applied: forget it and the U-Net sees latents about five times too large. Source: Rombach et al., CVPR 2022.

`pipe` is a pipeline or its VAE alone: an `AutoencoderKL`, or an `AutoencoderTiny`, which has no posterior.
"""

import math

import torch


def _vae(pipe):
    return getattr(pipe, "vae", pipe)


def factor(pipe) -> int:
    """How many pixels one latent cell covers per side (8 in SD 1.x and in the mini)."""
    return 2 ** (len(_vae(pipe).config.block_out_channels) - 1)


def check_image(image, name="image", channels=3) -> torch.Tensor:
    """Return `image` if it is a float tensor (B, channels, H, W) in [0, 1]; else raise a ValueError."""
    if not torch.is_tensor(image) or image.ndim != 4 or image.shape[1] != channels:
        shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(
            f"{name} must be a tensor (B, {channels}, H, W), but it is {shape}; see lib.show.read_image."
        )
    if not image.is_floating_point():
        raise ValueError(
            f"{name} must be float in [0, 1], but it is {image.dtype}; divide 8-bit values by 255."
        )
    if not torch.isfinite(image).all():
        raise ValueError(f"{name} holds NaN or infinite values; repair them before the edit.")
    low, high = image.min().item(), image.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(f"{name} must lie in [0, 1], but it runs from {low:.3g} to {high:.3g}.")
    return image


def _shift(vae) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def _encoded(pipe, image):
    """What the VAE's own `encode` gives for a picture in [0, 1]; refuses other pictures."""
    check_image(image)
    vae, f = _vae(pipe), factor(pipe)
    if image.shape[-1] % f or image.shape[-2] % f:
        raise ValueError(
            f"The picture is {image.shape[-2]}x{image.shape[-1]}; both sides must be multiples of {f}: "
            "resize or crop it first."
        )
    return vae.encode(image.to(vae.device, vae.dtype) * 2 - 1)


@torch.no_grad()
def posterior(pipe, image) -> tuple:
    """Picture (B, 3, H, W) in [0, 1] -> (mean, logvar) of q(z | x), each (B, 4, H/8, W/8), NOT yet scaled.

    An `AutoencoderTiny` gives a latent and no Gaussian: ValueError.
    """
    out = _encoded(pipe, image)
    if not hasattr(out, "latent_dist"):
        raise ValueError(
            f"{type(_vae(pipe)).__name__} has no posterior, only one latent per picture: use latents.encode."
        )
    return out.latent_dist.mean, out.latent_dist.logvar


@torch.no_grad()
def encode(pipe, image, sample=False, generator=None) -> torch.Tensor:
    """Picture (B, 3, H, W) in [0, 1] -> scaled latent (B, 4, H/8, W/8), float of the VAE's dtype.

    The mode (mean) of the posterior by default; `sample=True` draws from it with `generator` (on the CPU).
    H and W must be multiples of the VAE's factor (ValueError otherwise).
    """
    vae = _vae(pipe)
    if sample:
        mean, logvar = posterior(pipe, image)
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float32)
        z = draw(mean, logvar, noise.to(mean))
    else:
        out = _encoded(pipe, image)
        z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
    return (z - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(pipe, z, clamp=True) -> torch.Tensor:
    """Scaled latent (B, 4, h, w) -> float32 picture (B, 3, 8h, 8w) in [0, 1].

    `clamp=False` keeps what the decoder puts outside [0, 1]: differences of two decodings need it.
    """
    vae = _vae(pipe)
    if z.ndim != 4 or z.shape[1] != vae.config.latent_channels:
        raise ValueError(
            f"A latent has shape (B, {vae.config.latent_channels}, h, w), this is {tuple(z.shape)}."
        )
    z = z.to(vae.device, vae.dtype) / vae.config.scaling_factor + _shift(vae)
    image = vae.decode(z).sample.float() / 2 + 0.5
    return image.clamp(0, 1) if clamp else image


def round_trip(pipe, image) -> torch.Tensor:
    """D(E(image)): the picture after the VAE alone. The floor under every latent edit's error."""
    return decode(pipe, encode(pipe, image))


def statistics(z) -> dict:
    """Mean and standard deviation of a latent, per channel and in all (well scaled: std near 1)."""
    return {"mean": z.mean(dim=(0, 2, 3)), "std": z.std(dim=(0, 2, 3)), "all_std": z.std().item()}


# ---------------------------------------------------------------- the posterior, in formulas


def compression(image, z) -> float:
    """How many times fewer values the latent has than the picture (48 in SD 1.x and in the mini)."""
    return image.numel() / z.numel()


def draw(mean, logvar, noise) -> torch.Tensor:
    """The reparametrised sample: mean + sigma * noise, sigma = exp(logvar / 2). (Kingma and Welling 2014.)"""
    return mean + (0.5 * logvar).exp() * noise


def kl(mean, logvar) -> torch.Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) in nats, summed over each latent's values -> (B,).

    0.5 * sum(mean^2 + sigma^2 - 1 - log sigma^2); equals diffusers' `DiagonalGaussianDistribution.kl()`.
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


# ---------------------------------------------------------------- what a cell and a channel do


def change_cell(z, channel, amount, x=None, y=None) -> torch.Tensor:
    """A copy of the latent with `amount` added to one channel: in cell (x, y), or everywhere without x and y.

    z (B, C, h, w); x counts columns from the left, y rows from the top. A place outside raises a ValueError.
    """
    if z.ndim != 4:
        raise ValueError(f"A latent has shape (B, C, h, w), this is {tuple(z.shape)}.")
    for name, value, count in (("channel", channel, z.shape[1]), ("x", x, z.shape[3]), ("y", y, z.shape[2])):
        if value is not None and not 0 <= value < count:
            raise ValueError(f"{name} must be from 0 to {count - 1} for this latent, but it is {value}.")
    if (x is None) != (y is None):
        raise ValueError("Give both x and y for one cell, or neither for the whole channel.")
    if not math.isfinite(amount):
        raise ValueError(f"The amount must be a finite number, but it is {amount}.")
    out = z.clone()
    out[:, channel, slice(None) if y is None else y, slice(None) if x is None else x] += amount
    return out


def change_map(pipe, z, edited) -> torch.Tensor:
    """|D(edited) - D(z)|, mean of the colours, unclamped: (B, 1, H, W). z may be one latent for many."""
    difference = decode(pipe, edited, clamp=False) - decode(pipe, z, clamp=False)
    return difference.abs().mean(1, keepdim=True)


def _with_one(z):
    return torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).flatten(0, 2).float()


def colour_fit(z, image) -> torch.Tensor:
    """Least squares from a latent cell's C values (and a 1) to its pixels' mean colour: (C + 1, 3)."""
    small = torch.nn.functional.interpolate(image.to(z).float(), size=z.shape[-2:], mode="area")
    return torch.linalg.lstsq(_with_one(z), small.movedim(1, -1).flatten(0, 2)).solution


def colour_preview(z, weights) -> torch.Tensor:
    """A tiny picture (B, 3, h, w) straight from a latent, without the decoder: what fast previews show."""
    b, _, h, w = z.shape
    return (_with_one(z) @ weights.to(z).float()).view(b, h, w, 3).movedim(-1, 1)


# ---------------------------------------------------------------- what is lost


def bands(image, periods=(4, 8, 16, 32)) -> torch.Tensor:
    """Mean square of pictures (B, C, H, W), split by the size of detail, fine first: (bands,).

    Band 0 is all waves shorter than periods[0] pixels, the last all waves of periods[-1] pixels and longer,
    with the mean. They add up to mean(image**2) (Parseval). The picture is mirrored, so that its border makes
    no edge.
    """
    if image.ndim != 4 or list(periods) != sorted(set(periods)) or periods[0] <= 0:
        raise ValueError("bands wants pictures (B, C, H, W) and periods that grow, for example (4, 8, 16).")
    x = torch.cat([image, image.flip(-1)], -1)
    x = torch.cat([x, x.flip(-2)], -2)
    h, w = x.shape[-2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1)) / (h * w)
    fy, fx = torch.fft.fftfreq(h, device=x.device), torch.fft.fftfreq(w, device=x.device)
    frequency = (fy[:, None] ** 2 + fx[None] ** 2).sqrt()                      # cycles per pixel = 1 / period
    edges = [math.inf, *(1 / p for p in periods), -1.0]
    return torch.stack([power[(frequency <= a) & (frequency > b)].sum() for a, b in zip(edges, edges[1:])])


# ---------------------------------------------------------------- between two latents


def lerp(a, b, w) -> torch.Tensor:
    """Straight line from a (w=0) to b (w=1). Halfway between two noises it has too little variance."""
    return (1 - w) * a + w * b


def slerp(a, b, w) -> torch.Tensor:
    """Great-circle interpolation of two latents (per sample), which keeps the norm of Gaussian noise.

    Two latents on one line (a pair that is equal, or opposite) have no great circle: they are mixed by
    `lerp`.
    """
    flat_a, flat_b = a.float().flatten(1), b.float().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine).view(-1, 1, 1, 1)
    on_a_line = angle.sin().abs() < 1e-4
    sine = torch.where(on_a_line, 1.0, angle.sin())
    arc = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / sine
    return torch.where(on_a_line, lerp(a, b, w), arc).to(a.dtype)
