"""Exercises of lesson 01: compression, the reparametrised sample, KL, decoding with the factor, slerp."""
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. how many times fewer values

def compression_factor(image_shape, latent_shape):
    """Shapes (B, C, H, W), (B, c, h, w) -> how many times fewer values the latent has: 48 for SD 1.5."""
    return math.prod(image_shape) / math.prod(latent_shape)


def _shape_cases(g):
    return [((1, 3, 512, 512), (1, 4, 64, 64)), ((2, 3, 128, 192), (2, 4, 16, 24)),
            ((1, 3, 256, 256), (1, 16, 32, 32))]


register(Check(
    name="compression_factor", reference=compression_factor, cases=_shape_cases,
    source="lib.checks_01:compression_factor lib.latents:compression",
    praise="Right: 48 for four latent channels, and only 12 for the sixteen channels of newer models.",
    hints=["How many numbers does a tensor of shape (1, 3, 512, 512) hold?",
           "The number of values is the product of the whole shape, channels too. math.prod((2, 3)) is 6.",
           "math.prod(image_shape) / math.prod(latent_shape)"],
    wrongs=[
        Wrong("per side", lambda i, z: i[-1] / z[-1],
              "this is the factor of one side, 8. A picture has two sides, and the number of channels "
              "changes too: compare all values."),
        Wrong("channels forgotten", lambda i, z: i[-1] * i[-2] / (z[-1] * z[-2]),
              "this counts places (64 times fewer), not values: the latent has more channels than RGB, so "
              "count the channels too."),
        Wrong("inverted", lambda i, z: math.prod(z) / math.prod(i),
              "this is latent / picture, the share that is left. How many times FEWER is picture / latent."),
        Wrong("difference", lambda i, z: math.prod(i) - math.prod(z),
              "this is how many values fewer, a difference; the question is how many TIMES fewer: divide."),
        Wrong("wrong channel factor", lambda i, z: i[-1] * i[-2] / (z[-1] * z[-2]) * z[1] / i[1],
              "the channels work the other way round: more latent channels mean LESS compression. Multiply "
              "by 3/4 here, not by 4/3."),
    ]))


# ---------------------------------------------------------------- 2. the reparametrised sample

def sample_posterior(mean, logvar, noise):
    """mean, logvar, noise (B, 4, h, w) -> z = mean + sigma * noise, sigma = exp(logvar / 2)."""
    return mean + torch.exp(0.5 * logvar) * noise


def _gaussian(g, *shape):
    return torch.randn(*shape, generator=g)


def _sample_cases(g):
    return [tuple(_gaussian(g, *s) for _ in range(3)) for s in ((1, 4, 5, 6), (2, 4, 3, 3))]


register(Check(
    name="sample_posterior", reference=sample_posterior, cases=_sample_cases,
    source="lib.checks_01:sample_posterior lib.latents:draw",
    praise="Right: mean plus sigma times noise, and gradients flow through both mean and logvar.",
    hints=["A Gaussian with mean m and standard deviation s is m + s * (standard Gaussian noise).",
           "logvar is the logarithm of the VARIANCE sigma^2. What is sigma?",
           "sigma = sqrt(exp(logvar)) = exp(0.5 * logvar)"],
    wrongs=[
        Wrong("variance for std", lambda mean, logvar, noise: mean + logvar.exp() * noise,
              "you multiply the noise by the variance, exp(logvar). It needs the standard deviation, its "
              "square root: the 0.5 in exp(0.5 * logvar) is missing."),
        Wrong("logvar not exponentiated", lambda mean, logvar, noise: mean + logvar * noise,
              "you use logvar itself as the standard deviation: it is a logarithm (and often negative). Take "
              "exp(0.5 * logvar)."),
        Wrong("half, not exponentiated", lambda mean, logvar, noise: mean + 0.5 * logvar * noise,
              "0.5 * logvar is the logarithm of sigma: the exp is missing."),
        Wrong("sign of the logarithm", lambda mean, logvar, noise: mean + torch.exp(-0.5 * logvar) * noise,
              "the sign is wrong: exp(-0.5 * logvar) is 1/sigma, large where the encoder is sure."),
        Wrong("root of the logarithm", lambda mean, logvar, noise: mean + logvar.sqrt() * noise,
              "you take the square root of logvar, which is a logarithm and often negative (hence the NaN): "
              "take exp first. sigma = exp(logvar).sqrt() = exp(0.5 * logvar)."),
        Wrong("the mode", lambda mean, logvar, noise: mean,
              "this is the mode of the Gaussian, not a sample: the noise is not used."),
        Wrong("mean forgotten", lambda mean, logvar, noise: torch.exp(0.5 * logvar) * noise,
              "the noise has the right size, but it must be added to the mean."),
        Wrong("mean scaled too", lambda mean, logvar, noise: torch.exp(0.5 * logvar) * (mean + noise),
              "sigma multiplies the noise only, not the mean."),
    ]))


# ---------------------------------------------------------------- 3. KL to N(0, 1)

def kl_to_normal(mean, logvar):
    """mean, logvar (B, 4, h, w) -> KL(N(mean, sigma^2) || N(0, 1)) in nats, for each picture: (B,)."""
    return 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def _kl_cases(g):
    return [tuple(_gaussian(g, *s) for _ in range(2)) for s in ((3, 4, 2, 3), (2, 4, 4, 4))]


def _kl(per_value, reduce=lambda x: x.flatten(1).sum(1)):
    """A mistaken KL: `per_value(mean, logvar)`, then a sum over each picture's values."""
    return lambda mean, logvar: reduce(per_value(mean, logvar))


_right_kl = lambda m, v: 0.5 * (m ** 2 + v.exp() - 1 - v)

register(Check(
    name="kl_to_normal", reference=kl_to_normal, cases=_kl_cases,
    source="lib.checks_01:kl_to_normal lib.latents:kl",
    praise="Right: zero exactly when mean = 0 and sigma = 1, and positive everywhere else.",
    hints=["Begin with one value: 0.5 * (mean^2 + sigma^2 - 1 - log sigma^2). What are sigma^2 and log "
           "sigma^2 here?",
           "sigma^2 = logvar.exp(), log sigma^2 = logvar. Then add up all values of a picture, but not the "
           "batch.",
           "x.flatten(1).sum(1) adds up everything but the batch axis."],
    wrongs=[
        Wrong("0.5 missing", _kl(lambda m, v: m ** 2 + v.exp() - 1 - v),
              "your KL is twice the right one: the factor 0.5 in front is missing."),
        Wrong("sign", _kl(lambda m, v: -_right_kl(m, v)),
              "the sign is wrong: a KL divergence is never negative. Books write -0.5 * (1 + logvar - mean^2 "
              "- exp(logvar)): look at each sign."),
        Wrong("std for variance", _kl(lambda m, v: 0.5 * (m ** 2 + (0.5 * v).exp() - 1 - v)),
              "you put the standard deviation exp(logvar / 2) where the variance exp(logvar) belongs."),
        Wrong("logvar not exponentiated", _kl(lambda m, v: 0.5 * (m ** 2 + v - 1 - v)),
              "sigma^2 is exp(logvar): without the exp, the two variance terms cancel and the KL no longer "
              "sees it."),
        Wrong("logarithm of the logarithm", _kl(lambda m, v: 0.5 * (m ** 2 + v.exp() - 1 - v.abs().log())),
              "logvar already is the logarithm of the variance: take no log again."),
        Wrong("mean not squared", _kl(lambda m, v: 0.5 * (m + v.exp() - 1 - v)),
              "the mean enters squared: a mean of -1 is as far from 0 as a mean of +1."),
        Wrong("one missing", _kl(lambda m, v: 0.5 * (m ** 2 + v.exp() - v)),
              "the -1 is missing: the KL of N(0, 1) with itself must be 0, yours is 0.5 for each value."),
        Wrong("mean of the values", _kl(_right_kl, lambda x: x.flatten(1).mean(1)),
              "you take the mean over a picture's values; the KL of independent values is their SUM."),
        Wrong("batch added up", _kl(_right_kl, lambda x: x.sum()),
              "you add up the whole batch; give one number for each picture, shape (B,)."),
        Wrong("not added up", _kl(_right_kl, lambda x: x),
              "each value is right; add them up for each picture, so that the shape becomes (B,)."),
    ]))


# ---------------------------------------------------------------- 4. decode with the scaling factor

def decode_latent(vae, z):
    """Scaled latent z (B, 4, h, w) of a diffusers VAE -> picture (B, 3, H, W) in [0, 1]."""
    image = vae.decode(z / vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1)


class ToyVAE:
    """Stands in for a diffusers VAE: `decode(z).sample` in about [-1, 1], and `config.scaling_factor`."""

    def __init__(self, scaling_factor, generator):
        self.config = SimpleNamespace(scaling_factor=scaling_factor, latent_channels=4)
        self.mix = torch.randn(3, 4, generator=generator) * 0.3

    def decode(self, z):
        colours = torch.einsum("cd,bdhw->bchw", self.mix, z)
        return SimpleNamespace(sample=colours.repeat_interleave(8, 2).repeat_interleave(8, 3))


def _decode_cases(g):
    return [(ToyVAE(factor, g), _gaussian(g, b, 4, 2, 3)) for factor, b in ((0.18215, 1), (0.63, 2))]


def _decoded(latent, picture=lambda x: (x / 2 + 0.5).clamp(0, 1)):
    """A mistaken decoding: `latent(z, factor)` goes into the decoder, `picture` is made of what comes out."""
    return lambda vae, z: picture(vae.decode(latent(z, vae.config.scaling_factor)).sample)


_right_latent = lambda z, f: z / f

register(Check(
    name="decode_latent", reference=decode_latent, cases=_decode_cases,
    source="lib.checks_01:decode_latent lib.latents:decode",
    praise="Right: unscale, decode, and bring [-1, 1] back to [0, 1].",
    hints=["encode MULTIPLIED by vae.config.scaling_factor. What must decode do first?",
           "vae.decode(...) returns an object; the picture is in its .sample, with values from about -1 to "
           "1.",
           "x / 2 + 0.5 brings [-1, 1] to [0, 1]; .clamp(0, 1) cuts what sticks out."],
    wrongs=[
        Wrong("scaling factor forgotten", _decoded(lambda z, f: z),
              "the scaling factor is forgotten: the decoder gets latents that are far too small, and gives "
              "grey, flat pictures. Divide z by vae.config.scaling_factor."),
        Wrong("scaling factor inverted", _decoded(lambda z, f: z * f),
              "you multiply by the scaling factor once more: encode multiplied, so decode must divide."),
        Wrong("scaled twice", _decoded(lambda z, f: z / f ** 2),
              "you divide by the scaling factor twice."),
        Wrong("another VAE's factor", lambda vae, z: _decoded(lambda z, f: z / 0.18215)(vae, z),
              "you divide by Stable Diffusion's 0.18215 whatever VAE you get; a factor belongs to ONE VAE: "
              "read vae.config.scaling_factor."),
        Wrong("left in [-1, 1]", _decoded(_right_latent, lambda x: x.clamp(-1, 1)),
              "your picture is still in [-1, 1]; in this course pictures are in [0, 1]: x / 2 + 0.5."),
        Wrong("clamped first", _decoded(_right_latent, lambda x: x.clamp(0, 1)),
              "you cut [-1, 1] at 0, so everything darker than middle grey becomes black: bring it to [0, 1] "
              "first, with x / 2 + 0.5."),
        Wrong("not clamped", _decoded(_right_latent, lambda x: x / 2 + 0.5),
              "the decoder goes a little beyond [-1, 1], so your picture leaves [0, 1]: end with .clamp(0, "
              "1)."),
        Wrong("halved too late", _decoded(_right_latent, lambda x: (x + 0.5).clamp(0, 1)),
              "the division by 2 is missing: [-1, 1] is two wide, [0, 1] is one wide."),
    ]))


# ---------------------------------------------------------------- 5. slerp

def slerp(a, b, w):
    """From noise a (w=0) to noise b (w=1) on a great circle, each sample (B, C, h, w) with its own angle."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)).view(-1, 1, 1, 1)
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def _slerp_cases(g):
    return [(_gaussian(g, b, 4, 3, 3), _gaussian(g, b, 4, 3, 3), w)
            for b, w in ((1, 0.5), (3, 0.3), (2, 0.9))]


def _angle(a, b):
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)
    return torch.arccos(cosine.clamp(-1, 1)).view(-1, 1, 1, 1)


def _length(x):
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _lerp(a, b, w):
    return (1 - w) * a + w * b


def _arc(a, b, w, angle):
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


register(Check(
    name="slerp", reference=slerp, cases=_slerp_cases, source="lib.checks_01:slerp lib.latents:slerp",
    praise="Right: halfway between two noises is still noise of the full strength.",
    hints=["Flatten each sample to one long vector: a.flatten(1). The angle between two vectors comes from "
           "their cosine.",
           "cos(angle) = (a . b) / (|a| |b|) for each sample; angle = torch.arccos(...). Give it the shape "
           "(B, 1, 1, 1).",
           "(sin((1 - w) * angle) * a + sin(w * angle) * b) / sin(angle)"],
    wrongs=[
        Wrong("lerp", _lerp,
              "this is lerp, the straight line: halfway between two noises its standard deviation is only "
              "about 0.71. slerp goes around the sphere, with sines of the angle."),
        Wrong("right angle assumed", lambda a, b, w: _arc(a, b, w, torch.tensor(math.pi / 2)),
              "you take the angle to be 90 degrees. Two large noises come close to that, but not exactly, and these are "
              "small: measure the angle."),
        Wrong("ends swapped", lambda a, b, w: _arc(b, a, w, _angle(a, b)),
              "the ends are swapped: w = 0 must give a, and w = 1 must give b."),
        Wrong("sine of the angle missing",
              lambda a, b, w: _arc(a, b, w, _angle(a, b)) * torch.sin(_angle(a, b)),
              "the division by sin(angle) is missing: at w = 0 you get a * sin(angle) instead of a."),
        Wrong("cosine for the angle", lambda a, b, w: _arc(a, b, w, torch.cos(_angle(a, b))),
              "you use the cosine as if it were the angle: torch.arccos turns it into one."),
        Wrong("not normalised",
              lambda a, b, w: _arc(a, b, w, torch.arccos((a * b).flatten(1).sum(1)).view(-1, 1, 1, 1)),
              "a . b is not the cosine yet, it lies far outside [-1, 1], where arccos is NaN: divide it by "
              "|a| |b|."),
        Wrong("one angle for the batch",
              lambda a, b, w: _arc(a, b, w, torch.arccos((a * b).sum() / (a.norm() * b.norm()))),
              "you use one angle for the whole batch; each sample needs its own: flatten(1), then sum over "
              "axis 1."),
        Wrong("angle per pixel",
              lambda a, b, w: _arc(a, b, w, torch.arccos(F.cosine_similarity(a, b, dim=1))[:, None]),
              "you use an angle for every latent cell; the latent of one picture is ONE vector: flatten(1) "
              "first."),
        Wrong("made unit length", lambda a, b, w: _arc(a / _length(a), b / _length(b), w, _angle(a, b)),
              "your result has length 1: normalise for the angle only, and interpolate a and b themselves."),
        Wrong("lerp made as long",
              lambda a, b, w: _lerp(a, b, w) / _length(_lerp(a, b, w)) * _length(_arc(a, b, w, _angle(a, b))),
              "your result lies on the sphere, but the steps are uneven: a stretched straight line is not an "
              "even walk along the arc. Weight a and b with sin((1 - w) angle) and sin(w angle)."),
    ]))
