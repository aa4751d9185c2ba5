"""Exercises of lesson 09: layers by depth, a mask for latent cells, a guidance step, relighting, the bill."""
import torch
import torch.nn.functional as F

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. who hides whom

def stack_by_depth(background, layers, depths):
    """Composite layers (N, 4, H, W), straight alpha, over a background (1, 3, H, W): the nearest is on top.

    depths (N,): of each layer, 0 near, 1 far. out = alpha * colour + (1 - alpha) * what is farther.
    """
    out = background
    for i in depths.argsort(descending=True):                     # the farthest first, the nearest last
        colour, alpha = layers[i:i + 1, :3], layers[i:i + 1, 3:]
        out = alpha * colour + (1 - alpha) * out
    return out


def _stack_cases(g):
    # the nearest is the first here, the last there: neither the given order nor its reverse is always right
    return [(torch.rand(1, 3, 6, 7, generator=g), torch.rand(n, 4, 6, 7, generator=g), torch.tensor(d))
            for n, d in ((3, [0.2, 0.9, 0.5]), (2, [0.7, 0.3]), (4, [0.6, 0.1, 0.8, 0.4]))]


def _stack(order, blend=lambda colour, alpha, out: alpha * colour + (1 - alpha) * out):
    """A mistaken stack: another order, or another way to lay one layer over the rest."""
    def answer(background, layers, depths):
        out = background
        for i in order(depths):
            out = blend(layers[i:i + 1, :3], layers[i:i + 1, 3:], out)
        return out
    return answer


_far_first = lambda depths: depths.argsort(descending=True)

register(Check(
    name="stack_by_depth", reference=stack_by_depth, cases=_stack_cases,
    source="lib.checks_09:stack_by_depth lib.featglac:over",
    praise="Right: paint the far things first, and whatever is nearer covers them.",
    hints=["A painter without an eraser: which layer must go onto the canvas first?",
           "0 is near, 1 is far. depths.argsort(descending=True) lists the layers from far to near.",
           "For each i in that order: out = alpha * colour + (1 - alpha) * out, starting from the "
           "background."],
    wrongs=[
        Wrong("near first", _stack(lambda depths: depths.argsort()),
              "the depth sign is reversed: you paint the NEAREST layer first, so what is far ends up in "
              "front. Here 0 is near: start with the largest depth."),
        Wrong("order as given", _stack(lambda depths: range(len(depths))),
              "you take the layers in the order of the list: their depths must decide who hides whom."),
        Wrong("given order reversed", _stack(lambda depths: range(len(depths) - 1, -1, -1)),
              "you take the layers in the list's order backwards: their depths must decide who hides whom."),
        Wrong("added", _stack(_far_first, lambda colour, alpha, out: out + alpha * colour),
              "you add each layer on top, like a double exposure: what lies below must be multiplied by 1 "
              "- alpha."),
        Wrong("premultiplied", _stack(_far_first, lambda colour, alpha, out: colour + (1 - alpha) * out),
              "you treat the colour as premultiplied: with straight alpha it is multiplied by alpha."),
        Wrong("hard edge",
              _stack(_far_first, lambda colour, alpha, out: torch.where(alpha > 0.5, colour, out)),
              "you cut alpha to all or nothing, which gives jagged edges: half-covered pixels mix both "
              "colours."),
        Wrong("nearest only", lambda background, layers, depths: _stack(_far_first)(
            background, layers[depths.argmin()][None], depths[:1]),
              "you paste the nearest layer only: the others show beside it and through its soft edge."),
    ]))


# ---------------------------------------------------------------- 2. a mask for the latent grid

def mask_to_cells(mask, size):
    """mask (B, 1, H, W) in [0, 1] -> two masks of a grid (h, w): (share of each cell, 1 where touched).

    The share weighs keys, values and losses; the touched cells are those that an edit may change. H and W are
    multiples of h and w.
    """
    return F.adaptive_avg_pool2d(mask, size), (F.adaptive_max_pool2d(mask, size) > 0).float()


def _cells_cases(g):
    mask = torch.zeros(2, 1, 64, 64)
    mask[0, 0, 5:50, 11] = 1                                      # a lamp's pole, one pixel wide
    mask[0, 0, 8:20, 4:19] = 1
    mask[1, 0, 30:60, 22:23] = 0.4                                # a soft, thin thing
    mask[1, 0, 40:60, 40:60] = torch.rand(20, 20, generator=g)
    return [(mask, (8, 8)), (mask[:1], (16, 16))]


def _pair(share, touched):
    return lambda mask, size: (share(mask, size), touched(mask, size))


_bilinear = lambda m, s: F.interpolate(m, s, mode="bilinear", align_corners=False)
_share = lambda m, s: F.adaptive_avg_pool2d(m, s)
_touched = lambda m, s: (F.adaptive_max_pool2d(m, s) > 0).float()
_nearest = lambda m, s: F.interpolate(m, s, mode="nearest")

register(Check(
    name="mask_to_cells", reference=mask_to_cells, cases=_cells_cases,
    source="lib.checks_09:mask_to_cells lib.attention:pool_mask lib.featglac:_Job.grid",
    praise="Right: the thin pole has a small share of its cells, and none of them is lost.",
    hints=["A cell of the grid stands for a block of pixels. What share of the block is under the mask?",
           "The mean over each block is F.adaptive_avg_pool2d(mask, size). Which pooling tells whether ANY "
           "pixel is > 0?",
           "(F.adaptive_avg_pool2d(mask, size), (F.adaptive_max_pool2d(mask, size) > 0).float())"],
    wrongs=[
        Wrong("nearest", _pair(_nearest, lambda m, s: (_nearest(m, s) > 0).float()),
              "the mask was downsampled with `nearest`: that looks at ONE pixel of each cell, and a pole "
              "that misses it vanishes. Pool over all pixels of the cell."),
        Wrong("nearest share", _pair(_nearest, _touched),
              "the touched cells are right, but the shares come from one pixel a cell (nearest): take the "
              "mean of the cell."),
        Wrong("half", _pair(_share, lambda m, s: (_share(m, s) > 0.5).float()),
              "touched means ANY pixel above 0: with `share > 0.5` thin parts and rims are lost. Take the "
              "maximum of each cell."),
        Wrong("rounded", _pair(lambda m, s: _share(m, s).round(), _touched),
              "you round the shares to 0 and 1: a soft share is wanted, so that rims count in part."),
        Wrong("bilinear", _pair(_bilinear, lambda m, s: (_bilinear(m, s) > 0).float()),
              "bilinear interpolation without antialiasing reads only the 2 x 2 pixels around a cell's "
              "middle: a thin part beside them is lost. Pool over the whole cell."),
        Wrong("maximum without test", _pair(_share, lambda m, s: F.adaptive_max_pool2d(m, s)),
              "the maximum of a soft mask is not yet 0 or 1: every cell with anything in it counts as "
              "touched, so compare with 0."),
        Wrong("swapped", _pair(_touched, _share),
              "the two masks are swapped: first the share, then the touched cells."),
        Wrong("sum",
              _pair(lambda m, s: _share(m, s) * (m.shape[-1] // s[1]) * (m.shape[-2] // s[0]), _touched),
              "you sum the pixels of a cell where the mean is meant: a share lies between 0 and 1."),
    ]))


# ---------------------------------------------------------------- 3. one step of feature guidance

def guide_step(z, gradient, sigma, step_size=0.02):
    """Move latents (B, 4, h, w) downhill: a step whose RMS, in each picture, is step_size * sigma.

    gradient: dL/dz, same shape; sigma: sqrt(1 - abar_t), the share of noise at this level.
    """
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return z - step_size * sigma * gradient / rms


def _step_cases(g):
    draw = lambda b, scale: (torch.randn(b, 4, 8, 8, generator=g),
                             torch.randn(b, 4, 8, 8, generator=g) * torch.tensor(scale).view(-1, 1, 1, 1))
    return [(*draw(2, [0.003, 0.4]), 0.9, 0.05), (*draw(3, [2.0, 0.1, 0.02]), 0.4, 0.1)]


_rms = lambda x, dims: x.square().mean(dims, keepdim=True).sqrt()

register(Check(
    name="guide_step", reference=guide_step, cases=_step_cases,
    source="lib.checks_09:guide_step lib.featglac:_step", tolerance=1e-5,
    praise="Right: downhill, and equally far in every picture, whatever the scale of its gradient.",
    hints=["The gradient points UPHILL. Which sign makes the loss smaller?",
           "Root mean square of each picture: gradient.square().mean((1, 2, 3), keepdim=True).sqrt().",
           "z - step_size * sigma * gradient / rms"],
    wrongs=[
        Wrong("uphill", lambda z, g, sigma, s: z + s * sigma * g / _rms(g, (1, 2, 3)),
              "the sign is wrong: the gradient points uphill, so adding it makes the loss LARGER. Subtract "
              "it."),
        Wrong("not normalised", lambda z, g, sigma, s: z - s * sigma * g,
              "the gradient is not normalised: its scale differs a lot between pictures and noise levels, "
              "so one step size cannot fit. Divide by its root mean square."),
        Wrong("norm",
              lambda z, g, sigma, s: z - s * sigma * g / g.square().sum((1, 2, 3), keepdim=True).sqrt(),
              "you divide by the length (root of the SUM of squares) where the root MEAN square is meant: "
              "the step gets smaller the larger the latent is."),
        Wrong("mean square",
              lambda z, g, sigma, s: z - s * sigma * g / g.square().mean((1, 2, 3), keepdim=True),
              "the root is missing: divide by the root of the mean square."),
        Wrong("standard deviation", lambda z, g, sigma, s: z - s * sigma * g / g.std((1, 2, 3), keepdim=True),
              "nearly: a standard deviation takes the mean off and divides by n - 1. The root MEAN SQUARE "
              "does neither."),
        Wrong("over the batch", lambda z, g, sigma, s: z - s * sigma * g / g.square().mean().sqrt(),
              "one root mean square for the whole batch: the picture with the largest gradient then "
              "decides for the others. Take the mean over dimensions 1, 2, 3 and keep the first."),
        Wrong("per channel", lambda z, g, sigma, s: z - s * sigma * g / _rms(g, (2, 3)),
              "each channel is normalised on its own, which changes the gradient's direction: take one "
              "mean over channels and places."),
        Wrong("sigma left out", lambda z, g, sigma, s: z - s * g / _rms(g, (1, 2, 3)),
              "sigma is missing: near the picture, where little noise is left, the step must be small too."),
        Wrong("sign only", lambda z, g, sigma, s: z - s * sigma * g.sign(),
              "you keep only the gradient's sign, so places that do not matter move as far as those that "
              "do."),
        Wrong("step returned", lambda z, g, sigma, s: -s * sigma * g / _rms(g, (1, 2, 3)),
              "you return the step alone: add it to z."),
    ]))


# ---------------------------------------------------------------- 4. light is a factor

def low_pass(x, radius):
    """Mean over (2 radius + 1) squares; pixels beyond the border do not count."""
    return F.avg_pool2d(x, 2 * radius + 1, 1, radius, count_include_pad=False)


def relight_ratio(paste, before, after, radius):
    """paste * shading, with shading = low-pass(after) / low-pass(before): only the light changes.

    All (B, 3, H, W). before, after: the model's decodings of the paste and of the edit; a 0.05 in both keeps
    black from dividing by 0. The result is held in [0, 1].
    """
    shading = (low_pass(after, radius) + 0.05) / (low_pass(before, radius) + 0.05)
    return (paste * shading).clamp(0, 1)


def _light_cases(g):
    cases = []
    for b, radius in ((1, 2), (2, 3)):
        paste = torch.rand(b, 3, 16, 18, generator=g) * 0.8 + 0.1
        light = 0.5 + 0.8 * torch.linspace(0, 1, 18).expand(b, 1, 16, 18)
        before = (paste + 0.05 * torch.randn(paste.shape, generator=g)).clamp(0, 1)
        cases.append((paste, before, (before * light).clamp(0, 1), radius))
    return cases


def _relit(combine):
    """A mistaken relight: combine(paste, low(after), low(before), after, before)."""
    def answer(paste, before, after, radius):
        return combine(paste, low_pass(after, radius), low_pass(before, radius), after, before)
    return answer


register(Check(
    name="relight_ratio", reference=relight_ratio, cases=_light_cases,
    source="lib.checks_09:relight_ratio lib.checks_09:low_pass lib.featglac:relight",
    praise="Right: the light is the model's, the detail is the photograph's.",
    hints=["How many times lighter did the edit become? That is a quotient of the two decodings.",
           "A small model's detail is blurry and its light is smooth: take low-pass(after) / "
           "low-pass(before).",
           "shading = (low_pass(after, radius) + 0.05) / (low_pass(before, radius) + 0.05); (paste * "
           "shading).clamp(0, 1)"],
    wrongs=[
        Wrong("upside down", _relit(lambda p, a, b, *_: (p * (b + 0.05) / (a + 0.05)).clamp(0, 1)),
              "the ratio is upside down: you make light what should become dark. It is after / before."),
        Wrong("difference", _relit(lambda p, a, b, *_: (p + a - b).clamp(0, 1)),
              "you add a difference (residual decoding): a shadow on a chequered floor would then flatten "
              "the chequers. Light multiplies."),
        Wrong("no low-pass",
              _relit(lambda p, a, b, after, before: (p * (after + 0.05) / (before + 0.05)).clamp(0, 1)),
              "the ratio is not smoothed: the decodings' errors at every edge are multiplied into the "
              "picture. Low-pass both first."),
        Wrong("blurred ratio times decoding", _relit(lambda p, a, b, after, before:
                                                     (before * (a + 0.05) / (b + 0.05)).clamp(0, 1)),
              "you relight the model's decoding, so its blur is all you get: the factor belongs on the "
              "paste."),
        Wrong("ratio smoothed",
              lambda p, before, after, r: (p * low_pass((after + 0.05) / (before + 0.05), r)).clamp(0, 1),
              "you smooth the ratio: where the decoding is dark its wild quotients count as much as any. "
              "Smooth both decodings first, then divide."),
        Wrong("guard below only", _relit(lambda p, a, b, *_: (p * a / (b + 0.05)).clamp(0, 1)),
              "the 0.05 stands in the denominator only, so that a picture which did not change gets "
              "darker: add it above as well."),
        Wrong("edit alone", _relit(lambda p, a, b, *_: (p * a).clamp(0, 1)),
              "you multiply by the edit instead of by the CHANGE it makes: divide by low-pass(before)."),
        Wrong("not held", _relit(lambda p, a, b, *_: p * (a + 0.05) / (b + 0.05)),
              "the shading is right, but a picture stays in [0, 1]: clamp it."),
        Wrong("no guard", _relit(lambda p, a, b, *_: (p * a / b).clamp(0, 1)),
              "without the 0.05 in numerator and denominator, dark pixels give wild factors (0 / 0 in the "
              "end)."),
    ]))


# ---------------------------------------------------------------- 5. the bill

def count_edit_passes(climb, samples, guidance_scale, guided_steps=0, inner_steps=0):
    """U-Net passes of one edit: inversion of two layers, the way down, and the guidance of `guide`.

    climb: steps up to the edit's noise level, and down again. samples: edits that come down together.
    guidance_scale: 1 needs the conditional prediction only, anything else the unconditional one too.
    guided_steps, inner_steps: of guide (0 for inject): a step is a forward and a backward, which counts 2.
    """
    inversion = 2 * climb
    down = climb * samples * (1 if guidance_scale == 1 else 2)
    guidance = guided_steps * inner_steps * samples * (1 + 2)
    return inversion + down + guidance


def _bill_cases(g):
    return [(12, 2, 8.0, 0, 0), (12, 1, 1.0, 0, 0), (25, 2, 7.5, 20, 3), (10, 3, 1.0, 8, 1)]


def _bill(layers=2, both=lambda s: 1 if s == 1 else 2, inner=3, samples=lambda n: n, gsamples=lambda n: n):
    """A mistaken bill: fewer layers inverted, another count of guidance, of a guided step, or of samples."""
    return lambda climb, n, scale, guided=0, steps=0: (
        layers * climb + climb * samples(n) * both(scale) + guided * steps * gsamples(n) * inner)


register(Check(
    name="count_edit_passes", reference=count_edit_passes, cases=_bill_cases,
    source="lib.checks_09:count_edit_passes lib.diffusion:count_passes",
    praise="Right: that is what lib.diffusion.count_passes counts while an edit runs.",
    hints=["Three parts: up (two layers, one pass a step each), down, and for guide the inner steps.",
           "On the way down each sample needs the conditional pass, and the unconditional one where the "
           "scale is not 1.",
           "2 * climb + climb * samples * (1 or 2) + guided_steps * inner_steps * samples * (1 + 2)"],
    wrongs=[
        Wrong("conditional only", _bill(both=lambda s: 1),
              "you count only the conditional pass: classifier-free guidance predicts twice at every step, "
              "with and without the prompt (unless the scale is 1)."),
        Wrong("always two", _bill(both=lambda s: 2),
              "at guidance scale 1 the unconditional prediction has weight 0, and nobody computes it: one "
              "pass a step."),
        Wrong("inversion forgotten", _bill(layers=0),
              "the inversion is missing: both layers are brought up to the noise level, one pass each and "
              "step. Papers like to leave it out."),
        Wrong("one layer", _bill(layers=1),
              "you invert one layer: the background AND the composite are brought up, so each step costs "
              "two passes."),
        Wrong("backward forgotten", _bill(inner=1),
              "a guided inner step is a forward and a BACKWARD pass, which counts 2 in this bill: 3 in all."),
        Wrong("backward as one", _bill(inner=2),
              "in this course's bill (`count_passes`) a backward pass counts 2, not 1: 3 with its forward."),
        Wrong("samples forgotten", _bill(samples=lambda n: 1, gsamples=lambda n: 1),
              "the samples come down together in one call, but each of them is a pass of its own."),
        Wrong("samples forgotten in guidance", _bill(gsamples=lambda n: 1),
              "every sample is guided on its own: the inner steps must be multiplied by `samples` too."),
    ]))
