"""Diffusion in a few functions: schedules, q_sample, the posterior, DDPM and DDIM steps, guidance, sampling,
inversion; and the teaching U-Net of lesson 03 with its simple rooms.

Time is diffusers' integer timestep t; `alphas_cumprod` comes from the pipeline's scheduler, never re-derived.
Noise levels of 50 steps ("leading" spacing, offset 1): 981, 961, ..., 21, 1 and, after the last
step, the clean end, whose alpha is `final_alpha_cumprod`.
Sources: Ho et al. 2020 (DDPM); Nichol and Dhariwal 2021 (cosine schedule); Song et al. 2021 (DDIM, eq. 12);
Dhariwal and Nichol 2021 (AdaGN); Ho and Salimans 2022 (guidance).
"""

import json
import math
import random
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .attention import attention, split_heads


# ---------------------------------------------------------------- schedules of beta
#: name -> (beta of the first step, beta of the last): DDPM's linear, Stable Diffusion's scaled-linear.
BETA_RANGE = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
SCHEDULES = ("linear", "scaled_linear", "cosine")


def make_betas(schedule: str = "linear", n: int = 1000) -> torch.Tensor:
    """(n,) the share of variance that each step replaces by noise, in (0, 1).

    "linear": DDPM. "scaled_linear": linear in sqrt(beta), as in Stable Diffusion. "cosine": from
    abar(s) = cos^2((s + 0.008) / 1.008 * pi / 2), at most 0.999 (Nichol and Dhariwal, eq. 17). Equal to the
    betas of diffusers' schedulers, where the cosine one is called "squaredcos_cap_v2".
    """
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"n, the number of steps, must be a whole number of at least 2, but it is {n!r}.")
    if schedule == "cosine":
        s = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        abar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999).float()
    if schedule not in BETA_RANGE:
        raise ValueError(f"Unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}.")
    first, last = BETA_RANGE[schedule]
    if schedule == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, n) ** 2
    return torch.linspace(first, last, n)


def alphas_cumprod(betas) -> torch.Tensor:
    """abar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t): the share of x_0's variance that is left at t."""
    return (1 - torch.as_tensor(betas)).cumprod(dim=0)


def snr(abar) -> torch.Tensor:
    """Signal-to-noise ratio of x_t: abar / (1 - abar), of variances."""
    return abar / (1 - abar)


def q_step(x, beta, noise) -> torch.Tensor:
    """One step of the forward process: x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. (DDPM eq. 2.)"""
    beta = torch.as_tensor(beta)
    return (1 - beta).sqrt() * x + beta.sqrt() * noise


# ---------------------------------------------------------------- schedule
def ddim(pipe, steps: int):
    """A DDIMScheduler of `steps` steps with the pipeline's configuration (its own is left alone)."""
    from diffusers import DDIMScheduler

    source = getattr(pipe, "scheduler", pipe)
    total = source.config.num_train_timesteps
    if not isinstance(steps, int) or not 1 <= steps <= total:
        raise ValueError(f"steps must be a whole number from 1 to {total}, but it is {steps!r}.")
    scheduler = DDIMScheduler.from_config(source.config)
    scheduler.set_timesteps(steps)
    if int(scheduler.timesteps.max()) >= total:  # every timestep, and the offset of this scheduler on top
        raise ValueError(f"{steps} steps reach beyond the last timestep, {total - 1}, of this schedule: take fewer.")
    return scheduler


def alpha_at(scheduler, t: int) -> torch.Tensor:
    """abar_t; below timestep 0 (after the last step) `final_alpha_cumprod` (1 for a DDPMScheduler)."""
    if t >= 0:
        return scheduler.alphas_cumprod[t]
    return scheduler.final_alpha_cumprod if hasattr(scheduler, "final_alpha_cumprod") else scheduler.one


def previous(scheduler, t: int) -> int:
    """The next lower noise level of this run: t - 1000 // steps. Negative means the clean end.

    Without `set_timesteps` (training, teaching) the run is the whole chain: t - 1.
    """
    total = scheduler.config.num_train_timesteps
    return int(t) - total // (scheduler.num_inference_steps or total)


def q_sample(scheduler, z0, t, noise) -> torch.Tensor:
    """Forward process in closed form: z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise. (DDPM eq. 4.)

    z0, noise: (B, C, h, w). t: one integer, or (B,) integers; a negative one means the clean end.
    """
    if torch.is_tensor(t) and t.ndim:
        below, t = (t < 0).to(z0.device), t.clamp(min=0).to(z0.device)
        a = scheduler.alphas_cumprod.to(z0.device)[t]
        a = torch.where(below, alpha_at(scheduler, -1).to(z0.device), a).view(-1, 1, 1, 1)
    else:
        a = alpha_at(scheduler, int(t))
    a = a.to(z0.device)
    return (a.sqrt() * z0 + (1 - a).sqrt() * noise).to(z0.dtype)


def split_prediction(scheduler, output, a, z) -> tuple:
    """The model's output at level `a` = abar -> (predicted z_0, predicted noise), any prediction type."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (z - (1 - a).sqrt() * output) / a.sqrt(), output
    if kind == "v_prediction":
        return a.sqrt() * z - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * z
    if kind == "sample":
        return output, (z - a.sqrt() * output) / (1 - a).sqrt()
    raise ValueError(f"Unknown prediction_type {kind!r}; known: epsilon, v_prediction, sample.")


def _move(scheduler, output, z, a_from, a_to, sigma=0.0, noise=None):
    """One deterministic jump between two noise levels (DDIM eq. 12), with optional fresh noise."""
    z0, eps = split_prediction(scheduler, output, a_from, z)
    if scheduler.config.clip_sample:
        limit = scheduler.config.clip_sample_range
        z0 = z0.clamp(-limit, limit)
    moved = a_to.sqrt() * z0 + (1 - a_to - sigma**2).sqrt() * eps
    return moved if noise is None else moved + sigma * noise


def ddim_step(scheduler, output, t, z, eta=0.0, generator=None) -> torch.Tensor:
    """z_t -> z at the next lower level. Equal to `DDIMScheduler.step(output, t, z, eta).prev_sample`.

    scheduler: from `ddim(pipe, steps)`. output: the U-Net's prediction at (z, t). eta: 0 (no fresh noise) to
    1 (as much as DDPM adds); any other is a ValueError, for its variance would be below 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (DDIM) and 1 (DDPM), but it is {eta}.")
    t = int(t)
    a, a_prev = alpha_at(scheduler, t).to(z.device), alpha_at(scheduler, previous(scheduler, t)).to(z.device)
    if eta == 0:
        return _move(scheduler, output, z, a, a_prev)
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    noise = torch.randn(z.shape, generator=generator, dtype=torch.float32).to(z)
    return _move(scheduler, output, z, a, a_prev, sigma, noise)


def posterior(scheduler, x0, x_t, t) -> tuple:
    """q(x_prev | x_t, x_0) = N(mean, variance I) at the next lower level of the run. (DDPM eq. 6 and 7.)

    mean = sqrt(abar_prev) beta / (1 - abar) x_0 + sqrt(alpha) (1 - abar_prev) / (1 - abar) x_t,
    variance = (1 - abar_prev) / (1 - abar) beta, where alpha = abar / abar_prev and beta = 1 - alpha.
    """
    a, a_prev = (alpha_at(scheduler, k).to(x_t.device) for k in (int(t), previous(scheduler, t)))
    alpha, beta = a / a_prev, 1 - a / a_prev
    mean = (a_prev.sqrt() * beta * x0 + alpha.sqrt() * (1 - a_prev) * x_t) / (1 - a)
    return mean, (1 - a_prev) / (1 - a) * beta


def ddpm_step(scheduler, output, t, x, generator=None) -> torch.Tensor:
    """x_t -> a draw of x_prev, with the *predicted* x_0 in the posterior. Equal to `DDPMScheduler.step`.

    The variance is the posterior's ("fixed_small"), or beta with `variance_type="fixed_large"`, DDPM's other
    choice. No noise is added in the step to timestep 0's clean end.
    """
    t = int(t)
    a = alpha_at(scheduler, t).to(x.device)
    x0, _ = split_prediction(scheduler, output, a, x)
    if scheduler.config.clip_sample:
        limit = scheduler.config.clip_sample_range
        x0 = x0.clamp(-limit, limit)
    mean, variance = posterior(scheduler, x0, x, t)
    if t == 0:
        return mean
    if getattr(scheduler.config, "variance_type", "fixed_small") == "fixed_large":
        variance = 1 - a / alpha_at(scheduler, previous(scheduler, t)).to(x.device)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    return mean + variance.sqrt() * noise


def kl_normal(mean_p, var_p, mean_q, var_q):
    """KL(N(mean_p, var_p) || N(mean_q, var_q)) of one-dimensional Gaussians, in nats, elementwise."""
    return 0.5 * ((var_q / var_p).log() + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)


def ddim_inverse_step(scheduler, output, t, z) -> torch.Tensor:
    """z at the level below t -> z_t. Equal to `DDIMInverseScheduler.step(output, t, z).prev_sample`.

    The off-by-one of DDIM inversion: undoing the step t -> t-20 exactly needs the prediction at (z_t, t), and
    z_t is what we are looking for. So `output` is predicted at timestep t from the latent a level *below* t.
    """
    t = int(t)
    a, a_below = alpha_at(scheduler, t).to(z.device), alpha_at(scheduler, previous(scheduler, t)).to(z.device)
    return _move(scheduler, output, z, a_below, a)


# ---------------------------------------------------------------- the model
@torch.no_grad()
def embed(pipe, prompt) -> torch.Tensor:
    """Prompt (str or list of str) -> text features (B, L, C), as the pipeline's encode_prompt makes them.

    A prompt with more tokens than the text encoder reads (77 in SD 1.x) is cut off, with a warning.
    """
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, (list, tuple)) or not prompt or not all(isinstance(p, str) for p in prompt):
        raise ValueError(f"A prompt is a text or a list of texts, not {prompt!r}.")
    tokenizer, encoder, most = pipe.tokenizer, pipe.text_encoder, pipe.tokenizer.model_max_length
    for text in prompt:
        if len(text) > most and (count := len(tokenizer.tokenize(text)) + 2) > most:  # with its start and end
            warnings.warn(f"The prompt has {count} tokens and the model reads {most}: the end of "
                          f"'{text[:40]}...' is cut off.", stacklevel=2)
    tokens = tokenizer(
        list(prompt), padding="max_length", max_length=most, truncation=True, return_tensors="pt"
    )
    wants_mask = getattr(encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(encoder.device) if wants_mask else None
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0].to(pipe.unet.dtype)


def cfg(uncond, cond, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond). Scale 1 is the plain condition."""
    return uncond + guidance_scale * (cond - uncond)


def predict(pipe, z, t, text, uncond=None, guidance_scale=1.0, extra=None) -> torch.Tensor:
    """The U-Net's prediction at (z, t); with guidance, one batched call [uncond, cond].

    z (B, 4, h, w); text, uncond (B, L, C); extra (1 or B, 5, h, w): what a 9-channel inpainting U-Net also
    takes, the mask (1 = to fill) and the latent of the picture with the hole greyed.
    """
    guided = uncond is not None and guidance_scale != 1.0
    x = z if extra is None else torch.cat([z, extra.to(z).expand(len(z), -1, -1, -1)], dim=1)
    t = torch.as_tensor(int(t), device=z.device)
    if not guided:
        return pipe.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
    both = pipe.unet(
        torch.cat([x, x]), t, encoder_hidden_states=torch.cat([uncond, text]), return_dict=False
    )[0]
    return cfg(*both.chunk(2), guidance_scale)


def noise(pipe, height, width, generator=None, batch=1) -> torch.Tensor:
    """Gaussian latent for a height x width picture, drawn on the CPU: the same on every device."""
    from .latents import factor

    f = factor(pipe)
    shape = (batch, pipe.vae.config.latent_channels, height // f, width // f)
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(pipe.unet.device, pipe.unet.dtype)


@torch.no_grad()
def sample(
    pipe, prompt, steps=50, guidance_scale=7.5, latents=None, generator=None, negative_prompt="", on_step=None
) -> torch.Tensor:
    """Text -> latent (B, 4, h, w): the loop of StableDiffusionPipeline with DDIM, written out.

    latents: start noise; drawn from `generator` otherwise. on_step(i, t, z) may return a replaced z.
    """
    scheduler = ddim(pipe, steps)
    text = embed(pipe, prompt)
    uncond = embed(pipe, negative_prompt).expand_as(text) if guidance_scale != 1.0 else None
    if latents is None:
        from .latents import factor

        side = pipe.unet.config.sample_size * factor(pipe)
        latents = noise(pipe, side, side, generator, batch=len(text))
    z = latents.to(pipe.unet.device, pipe.unet.dtype)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        z = ddim_step(scheduler, predict(pipe, z, t, text, uncond, guidance_scale), t, z)
        changed = on_step(i, t, z) if on_step else None
        z = z if changed is None else changed
    return z


@torch.no_grad()
def sample_loop(predict, scheduler, x, step=ddim_step, generator=None, on_step=None) -> torch.Tensor:
    """Noise x -> a sample: for every timestep of the run, `step(scheduler, predict(x, t), t, x)`.

    predict(x, t) gives the noise prediction: any network, or `guided(model, label, scale)`. step: `ddim_step`
    or `ddpm_step` (which draws from `generator`). on_step(i, t, x, output) sees x_t *before* each step.
    """
    extra = {} if generator is None else {"generator": generator}
    for i, t in enumerate(scheduler.timesteps.tolist()):
        output = predict(x, t)
        if on_step:
            on_step(i, t, x, output)
        x = step(scheduler, output, t, x, **extra)
    return x


def guided(model, label, guidance_scale: float = 1.0):
    """A predict(x, t) of a labelled model such as `TeachUNet`, with classifier-free guidance against label 0.

    label: (B,) integers, or one for all. With guidance both predictions come from one batched call.
    """

    def predict(x, t):
        wanted = torch.as_tensor(label, device=x.device).expand(len(x))
        if guidance_scale == 1.0:
            return model(x, t, wanted)
        both = model(torch.cat([x, x]), t, torch.cat([torch.zeros_like(wanted), wanted]))
        return cfg(*both.chunk(2), guidance_scale)

    return predict


@dataclass
class Trajectory:
    """A DDIM inversion. `latents[0]` is the clean latent; `latents[k]` has noise level `timesteps[k - 1]`.

    timesteps ascend (1, 21, ...); generation runs through them downwards, so look things up by timestep:
    `at(t)`.
    """

    latents: list = field(default_factory=list)
    timesteps: list = field(default_factory=list)

    @property
    def noise(self) -> torch.Tensor:
        """The latent at the highest level reached."""
        return self.latents[-1]

    def at(self, t: int) -> torch.Tensor:
        """The latent at noise level t; any negative t is the clean end."""
        if t < 0:
            return self.latents[0]
        if t not in self.timesteps:
            raise ValueError(
                f"The inversion has no noise level {t}; it has {self.timesteps[0]} to "
                f"{self.timesteps[-1]} in {len(self.timesteps)} steps: use the same number of steps."
            )
        return self.latents[self.timesteps.index(t) + 1]


@torch.no_grad()
def invert(pipe, z0, prompt="", steps=50, on_step=None, upto=None, refine=0, extra=None) -> Trajectory:
    """DDIM inversion: clean latent (B, 4, h, w) -> the noise from which DDIM (guidance 1) leads back to it.

    prompt: one text, or one per latent. upto: how many of the `steps` levels to climb (all by default).
    refine: extra fixed-point passes per step; each predicts at the *found* z_t, which removes the off-by-one
    of `ddim_inverse_step` (and what a recorder keeps is then of z_t itself). on_step(i, t, z) sees each z.
    """
    scheduler = ddim(pipe, steps)
    upto = steps if upto is None else upto
    if not 1 <= upto <= steps:
        raise ValueError(f"upto must be a number of steps from 1 to {steps}, but it is {upto}.")
    z = z0.to(pipe.unet.device, pipe.unet.dtype)
    text = embed(pipe, prompt)
    text = text.expand(len(z), -1, -1) if len(text) == 1 else text
    if len(text) != len(z):
        raise ValueError(f"{len(text)} prompts for {len(z)} latents: give one prompt, or one for each.")
    path = Trajectory([z], [])
    for i, t in enumerate(scheduler.timesteps.tolist()[::-1][:upto]):
        z_next = ddim_inverse_step(scheduler, predict(pipe, z, t, text, extra=extra), t, z)
        for _ in range(refine):
            z_next = ddim_inverse_step(scheduler, predict(pipe, z_next, t, text, extra=extra), t, z)
        z = z_next
        path.latents.append(z)
        path.timesteps.append(t)
        if on_step:
            on_step(i, t, z)
    return path


# ---------------------------------------------------------------- cost
class Passes:
    """How many pictures went through the U-Net: `.forward`, `.backward`, `.total` = forward + 2 backward."""

    def __init__(self):
        self.forward, self.backward = 0, 0

    @property
    def total(self) -> int:
        return self.forward + 2 * self.backward


@contextmanager
def count_passes(unet):
    """Count U-Net passes per sample: a call with a batch of 3 is 3 passes, its backward counts 6 more."""
    passes = Passes()

    def before(module, args, kwargs):
        x = args[0] if args else kwargs["sample"]
        passes.forward += len(x)
        if torch.is_grad_enabled() and x.requires_grad:
            x = x.view_as(x)  # a node of its own, so that only this call's backward is counted
            x.register_hook(lambda grad, n=len(x): count_backward(n))
            return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "sample": x})

    def after(module, args, kwargs, output):
        x = args[0] if args else kwargs["sample"]
        y = output[0]
        if y.requires_grad and not x.requires_grad:  # training: only the weights get a gradient
            y.register_hook(lambda grad, n=len(y): count_backward(n))

    def count_backward(n):
        passes.backward += n

    handles = [
        unet.register_forward_pre_hook(before, with_kwargs=True),
        unet.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- the teaching U-Net
def timestep_embedding(t, width: int, max_period: float = 10_000.0) -> torch.Tensor:
    """(B,) timesteps -> (B, width): cosines, then sines, of t at width/2 frequencies from 1 to almost 1/max_period.

    Equal to diffusers' `Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0)`, as in SD.
    """
    half = width // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class AdaGN(nn.Module):
    """Adaptive group normalisation: GroupNorm(x) (1 + scale) + shift, read from the embedding of (t, label).

    The linear layer starts at zero, so that it begins as plain group normalisation.
    """

    def __init__(self, channels: int, width: int, groups: int = 8):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.affine = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, x, e):
        scale, shift = self.affine(e)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; AdaGN tells the second how noisy the picture is."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = AdaGN(c_out, width)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h, e)))
        return self.shortcut(x) + h


class SelfAttention(nn.Module):
    """Lesson 02's attention between all places of a feature map, added to it; at first nothing (out = 0)."""

    def __init__(self, channels: int, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (split_heads(y, self.heads) for y in self.qkv(tokens).chunk(3, dim=-1))
        mixed = attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class TeachUNet(nn.Module):
    """The teaching U-Net: noise prediction on RGB pictures at three resolutions; 0.7 M parameters.

    forward(x (B, 3, H, W) in about [-1, 1], t (B,) or one integer, label (B,) or None) -> noise (B, 3, H, W).
    label 0 (or None) says nothing; 1 + k asks for kind k of `TEACH_KINDS`. `patch` pixels a side are folded
    into channels first (patch=2: 64x64x3 -> 32x32x12), which makes it four times as fast. H, W: multiples of
    4 patch.
    """

    def __init__(self, channels=(48, 64, 80), width: int = 96, labels: int = 7, patch: int = 2):
        super().__init__()
        self.config = {"channels": list(channels), "width": width, "labels": labels, "patch": patch}
        c0, c1, c2 = channels
        self.patch, self.fourier = patch, c1
        self.time = nn.Sequential(nn.Linear(c1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(labels, width)
        self.conv_in = nn.Conv2d(3 * patch**2, c0, 3, padding=1)
        self.down0 = ResBlock(c0, c0, width)
        self.down1, self.down1_attention = ResBlock(c0, c1, width), SelfAttention(c1)
        self.down2, self.mid_attention = ResBlock(c1, c2, width), SelfAttention(c2)
        self.mid = ResBlock(c2, c2, width)
        self.up1, self.up1_attention = ResBlock(c2 + c1, c1, width), SelfAttention(c1)
        self.up0 = ResBlock(c1 + c0, c0, width)
        self.norm_out = nn.GroupNorm(8, c0)
        self.conv_out = nn.Conv2d(c0, 3 * patch**2, 3, padding=1)

    def embed(self, x, t, label=None) -> torch.Tensor:
        """(B, width): what AdaGN listens to, the noise level and the label."""
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        if label is None:
            label = torch.zeros(len(x), dtype=torch.long, device=x.device)
        return F.silu(self.time(timestep_embedding(t, self.fourier)) + self.label(label))

    def forward(self, x, t, label=None):
        side = 4 * self.patch
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % side or x.shape[3] % side:
            raise ValueError(
                f"x must be (B, 3, H, W) with sides that are multiples of {side}, but it is {tuple(x.shape)}."
            )
        e = self.embed(x, t, label)
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        s0 = self.down0(h, e)  # 1/1: kept for the way up
        s1 = self.down1_attention(self.down1(F.avg_pool2d(s0, 2), e))  # 1/2: kept as well
        h = self.mid_attention(self.down2(F.avg_pool2d(s1, 2), e))  # 1/4
        h = self.mid(h, e)
        h = self.up1(torch.cat([F.interpolate(h, scale_factor=2), s1], dim=1), e)
        h = self.up0(torch.cat([F.interpolate(self.up1_attention(h), scale_factor=2), s0], dim=1), e)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


def teach_scheduler():
    """The teaching model's DDIMScheduler: cosine, 1000 steps, clean pictures clipped to [-1, 1]."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", steps_offset=1, clip_sample=True, set_alpha_to_one=True
    )


def save_teach(model: TeachUNet, folder) -> None:
    """Write a folder: config.json and half-precision safetensors (about 1.4 MB)."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config, indent=1) + "\n")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def load_teach(folder=None, device="cpu") -> TeachUNet:
    """The shipped teaching model (or that of `folder`): eval, frozen, float32."""
    from safetensors.torch import load_file

    if folder is None:
        from . import setup

        folder = setup.data_dir() / "models" / "teach"
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no teaching model in {folder}: `python -m lib.train teach`, then export it")
    model = TeachUNet(**json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().requires_grad_(False).eval().to(device)


# ---------------------------------------------------------------- the teaching pictures
#: What the simple rooms hold; the label of kind k is 1 + k, and label 0 means "anything".
TEACH_KINDS = ("ball", "box", "vase", "cone", "chair", "table")
_TEACH_SIZE = {"ball": 1.75, "box": 1.6, "vase": 1.8, "cone": 1.75, "chair": 1.65, "table": 1.25}


def teach_scene(seed: int):
    """A simple room of the Miniature from a seed: one large thing, one camera, light from either side.

    Few things vary, so that a small network trained for minutes can learn all of it.
    """
    from . import scenes

    rng = random.Random(7919 * seed + 3)
    kind = rng.choice(TEACH_KINDS)
    colours = [c for c in scenes.COLOURS if (kind, c) not in scenes.HELD_OUT_PAIRS and c != "white"]
    floor = rng.uniform(0.5, 0.66)
    wall = rng.choice(((0.95, 0.86, 0.74), (0.76, 0.86, 0.95), (0.94, 0.78, 0.78), (0.80, 0.92, 0.80)))
    bright = rng.uniform(0.86, 1.0)
    wall = tuple(bright * c for c in wall)
    tiles = (floor, 0.77 * floor, 0.56 * floor)
    room = scenes.Room(
        floor="checks", wall="plain", floor_rgb=(tiles, tuple(0.7 * c for c in tiles)), wall_rgb=(wall, wall)
    )
    side = rng.choice((-1, 1))
    sun = scenes.Sun(azimuth=side * rng.uniform(50, 58), elevation=rng.uniform(28, 32), ambient=0.72)
    thing = scenes.Thing(
        kind, rng.choice(colours), x=rng.uniform(-0.45, 0.45), z=rng.uniform(3.0, 3.25),
        size=_TEACH_SIZE[kind], turn=rng.choice((-1, 1)) * rng.uniform(22, 42), shape=rng.uniform(0.3, 0.7),
    )  # fmt: skip
    return scenes.Scene(seed, room, sun, scenes.Camera(), (thing,))


def teach_label(kind: str) -> int:
    """The label of a kind: "anything" is 0, those of `TEACH_KINDS` are 1, 2, ...; else a ValueError."""
    known = ("anything", *TEACH_KINDS)
    if kind not in known:
        raise ValueError(f"The teaching model knows no {kind!r}; it knows {', '.join(known)}.")
    return known.index(kind)


def teach_pictures(n: int, size: int = 64, split: str = "train", start: int = 0, device="cpu") -> tuple:
    """n simple rooms -> (pictures (n, 3, size, size) in [0, 1], labels (n,): 1 + index in TEACH_KINDS)."""
    from . import scenes

    if n < 1 or size < 8:
        raise ValueError(f"n must be at least 1 and size at least 8, but they are {n} and {size}.")
    some = [teach_scene(s) for s in scenes.seeds(split, n, start)]
    labels = torch.tensor([1 + TEACH_KINDS.index(s.things[0].kind) for s in some])
    return scenes.render(some, size=size, device=device).rgb, labels
