"""The latent space of a Stable-Diffusion-shaped pipeline: pictures in [0, 1] <-> scaled latents.

The one place where pictures become [-1, 1], and where the VAE's `scaling_factor` (0.18215 in SD 1.x) is
applied: forget it and the U-Net sees latents about five times too large. Source: Rombach et al., CVPR 2022.
"""

import torch


def factor(pipe) -> int:
    """How many pixels one latent cell covers per side (8 in SD 1.x and in the mini)."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


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


@torch.no_grad()
def encode(pipe, image, sample=False, generator=None) -> torch.Tensor:
    """Picture (B, 3, H, W) in [0, 1] -> scaled latent (B, 4, H/8, W/8), float of the VAE's dtype.

    The mode (mean) of the posterior by default; `sample=True` draws from it with `generator` (on the CPU).
    H and W must be multiples of the VAE's factor (ValueError otherwise).
    """
    check_image(image)
    f = factor(pipe)
    if image.shape[-1] % f or image.shape[-2] % f:
        raise ValueError(
            f"The picture is {image.shape[-2]}x{image.shape[-1]}; both sides must be multiples of {f}: "
            "resize or crop it first."
        )
    vae = pipe.vae
    posterior = vae.encode(image.to(vae.device, vae.dtype) * 2 - 1).latent_dist
    z = posterior.mode()
    if sample:
        noise = torch.randn(z.shape, generator=generator, dtype=torch.float32)
        z = z + posterior.std * noise.to(z)
    return (z - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode(pipe, z, clamp=True) -> torch.Tensor:
    """Scaled latent (B, 4, h, w) -> float32 picture (B, 3, 8h, 8w) in [0, 1].

    `clamp=False` keeps what the decoder puts outside [0, 1]: differences of two decodings need it.
    """
    vae = pipe.vae
    if z.ndim != 4 or z.shape[1] != vae.config.latent_channels:
        raise ValueError(
            f"A latent has shape (B, {vae.config.latent_channels}, h, w), this is {tuple(z.shape)}."
        )
    z = z.to(vae.device, vae.dtype) / vae.config.scaling_factor + (
        getattr(vae.config, "shift_factor", None) or 0.0
    )
    image = vae.decode(z).sample.float() / 2 + 0.5
    return image.clamp(0, 1) if clamp else image


def round_trip(pipe, image) -> torch.Tensor:
    """D(E(image)): the picture after the VAE alone. The floor under every latent edit's error."""
    return decode(pipe, encode(pipe, image))


def statistics(z) -> dict:
    """Mean and standard deviation of a latent, per channel and in all (well scaled: std near 1)."""
    return {"mean": z.mean(dim=(0, 2, 3)), "std": z.std(dim=(0, 2, 3)), "all_std": z.std().item()}


def lerp(a, b, w) -> torch.Tensor:
    """Straight line from a (w=0) to b (w=1). Halfway between two noises it has too little variance."""
    return (1 - w) * a + w * b


def slerp(a, b, w) -> torch.Tensor:
    """Great-circle interpolation of two latents (per sample), which keeps the norm of Gaussian noise."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine).view(-1, 1, 1, 1)
    if (angle.sin().abs() < 1e-4).any():
        return lerp(a, b, w)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / angle.sin()
