"""Exercises of lesson 04: composite, PSNR in the hole, distance of patches, RePaint's two steps."""
import torch
import torch.nn.functional as F

from lib import masks
from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. composite with a mask

def composite_hole(image, filled, fill_mask):
    """filled where fill_mask (B, 1, H, W) is 1, image where it is 0, else a blend; pictures (B, 3, H, W)."""
    return image * (1 - fill_mask) + filled * fill_mask


def _composite_cases(g):
    return [(torch.rand(b, 3, 12, 10, generator=g), torch.rand(b, 3, 12, 10, generator=g),
             F.avg_pool2d(masks.random_box(b, (12, 10), g), 3, 1, 1)) for b in (1, 2)]    # soft edges


register(Check(
    name="composite_hole", reference=composite_hole, cases=_composite_cases,
    source="lib.checks_04:composite_hole lib.inpaint:composite",
    praise="Right: 1 means to fill, known pixels stay what they are, and a soft mask blends.",
    hints=["What must the result be where fill_mask is 0? And where it is 1?",
           "Two terms: one picture times fill_mask, the other times what is left of 1.",
           "image * (1 - fill_mask) + filled * fill_mask"],
    wrongs=[
        Wrong("mask inverted", lambda image, filled, m: image * m + filled * (1 - m),
              "the mask is inverted: you keep the picture where it should be filled. Here 1 = TO FILL; in "
              "the papers' formulas m is 1 where the picture is KNOWN, which is 1 - fill_mask."),
        Wrong("hole only", lambda image, filled, m: filled * m,
              "outside the hole your result is black: add the known part, image * (1 - fill_mask)."),
        Wrong("added on top", lambda image, filled, m: image + filled * m,
              "you add the filling on top of what stands in the hole: the picture must be multiplied by 1 - "
              "fill_mask first."),
        Wrong("filled everywhere", lambda image, filled, m: filled,
              "you return the filling everywhere: known pixels must stay exactly as they were."),
        Wrong("known only", lambda image, filled, m: image * (1 - m),
              "inside the hole your result is black: add the filling, filled * fill_mask."),
        Wrong("both in full", lambda image, filled, m: image + filled,
              "you add the two pictures: each must be multiplied by its share first, fill_mask and 1 - fill_mask."),
        Wrong("hard mask, inverted", lambda image, filled, m: torch.where(m > 0.5, image, filled),
              "the mask is inverted (1 = TO FILL: take `filled` there), and it is cut to 0 or 1: soft values at its "
              "edge should blend the two pictures."),
        Wrong("hard mask", lambda image, filled, m: torch.where(m > 0.5, filled, image),
              "you cut the mask to 0 or 1: soft values at its edge should blend the two pictures."),
        Wrong("hard mask, all of its edge", lambda image, filled, m: torch.where(m > 0, filled, image),
              "you take every value above 0 for 1: soft values at the mask's edge should blend the two pictures."),
        Wrong("hard mask, none of its edge", lambda image, filled, m: torch.where(m >= 1, filled, image),
              "you take every value below 1 for 0: soft values at the mask's edge should blend the two pictures."),
    ]))


# ---------------------------------------------------------------- 2. PSNR in the hole

def hole_psnr(filled, truth, fill_mask):
    """PSNR in dB over the pixels of the hole, one for each picture: (B,). Pictures (B, 3, H, W) in [0, 1]."""
    square = (filled - truth).square().mean(1, keepdim=True)              # mean over the channels
    mse = (square * fill_mask).sum((1, 2, 3)) / fill_mask.sum((1, 2, 3))
    return -10 * mse.log10()


def _psnr_cases(g):
    cases = []
    for b in (2, 3):
        truth, m = torch.rand(b, 3, 16, 16, generator=g), masks.random_box(b, 16, g, area=(0.1, 0.3))
        noise = 0.3 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(b, 3, 16, 16, generator=g)
        cases.append((truth + noise * (m + 0.1), truth, m))          # the surroundings are a little off
    return cases


def _in_db(mse):
    """A mistaken version: another mean, of the squared errors in the hole, of the mask and of all squared errors."""
    def answer(filled, truth, m):
        square = (filled - truth).square()
        return -10 * mse(square * m, m, square).log10()
    return answer


_ONE_FOR_ALL = ("you give one number for all pictures together: it is wanted for each. Sum over (1, 2, 3) and keep the "
                "batch axis")


def _mse(filled, truth, m):
    return ((filled - truth).square() * m).sum((1, 2, 3)) / (3 * m.sum((1, 2, 3)))


register(Check(
    name="hole_psnr", reference=hole_psnr, cases=_psnr_cases,
    source="lib.checks_04:hole_psnr lib.metrics:psnr lib.metrics:rmse",
    praise="Right: the mean runs over the hole alone, so a small hole cannot hide behind a large known part.",
    hints=["PSNR = -10 log10(MSE) for pictures with values up to 1. Which pixels belong into this MSE?",
           "Sum (squared error * fill_mask), then divide by how many values that were.",
           "The mask has one channel, the picture three: average over the channels first, or divide by 3 * "
           "mask.sum()."],
    wrongs=[
        Wrong("whole picture", lambda f, t, m: -10 * (f - t).square().mean((1, 2, 3)).log10(),
              "you average over the WHOLE picture, so known pixels, which are right anyway, dilute the "
              "error: a small hole then always looks good. Divide by the pixels of the hole."),
        Wrong("hole over all", lambda f, t, m: -10 * ((f - t).square() * m).mean((1, 2, 3)).log10(),
              "the error is summed over the hole but divided by all pixels of the picture: divide by "
              "fill_mask.sum()."),
        Wrong("mask inverted", lambda f, t, m: -10 * _mse(f, t, 1 - m).log10(),
              "you measure the known part: 1 means to fill, so weight with fill_mask, not with 1 - "
              "fill_mask."),
        Wrong("one for all", _in_db(lambda e, m, _: e.sum() / (3 * m.sum())), _ONE_FOR_ALL + "."),
        Wrong("one for all, over all", _in_db(lambda e, m, _: e.mean()),
              _ONE_FOR_ALL + "; and divide by the pixels of the hole, not by all of them."),
        Wrong("one for all, whole picture", _in_db(lambda e, m, square: square.mean()),
              _ONE_FOR_ALL + "; and only the hole's pixels count: weight with fill_mask."),
        Wrong("all holes counted", _in_db(lambda e, m, _: e.sum((1, 2, 3)) / (3 * m.sum())),
              "each picture's error is divided by the pixels of ALL holes together: count those of its own, "
              "fill_mask.sum((1, 2, 3))."),
        Wrong("absolute", lambda f, t, m: -10 * (((f - t).abs() * m).sum((1, 2, 3)) / (3 * m.sum((1, 2, 3)))).log10(),
              "you average ABSOLUTE errors: MSE is the mean of the squared ones."),
        Wrong("no logarithm", _mse,
              "this is the MSE itself; the PSNR is -10 log10 of it, in decibels."),
        Wrong("channels", lambda f, t, m: -10 * (3 * _mse(f, t, m)).log10(),
              "you sum over the three channels but divide by the number of PIXELS: that is 4.77 dB too low. "
              "Divide by 3 * fill_mask.sum(), or average over the channels first."),
        Wrong("no square", lambda f, t, m: -10 * _mse(f, t, m).sqrt().log10(),
              "this is half of the PSNR: the logarithm is of the mean SQUARED error, without the root (or "
              "take -20 log10 of the root)."),
        Wrong("natural logarithm", lambda f, t, m: -10 * _mse(f, t, m).log(),
              "decibels use the logarithm to base 10: log10, not log."),
        Wrong("sign", lambda f, t, m: 10 * _mse(f, t, m).log10(),
              "the sign is wrong: a small error should give a LARGE value, so there is a minus before the "
              "logarithm."),
    ]))


# ---------------------------------------------------------------- 3. how far is every patch

def patch_distances(patch, picture, allowed):
    """Squared distance of one patch (3, s, s) to every patch of a picture (3, H, W): (h, w), h = H - s + 1, w
    = W - s + 1.

    Entry (y, x) is the sum over channels and pixels of (patch - picture[:, y:y+s, x:x+s])^2; infinite where
    allowed (h, w) is False."""
    s = patch.shape[-1]
    every = F.unfold(picture[None], s)[0]                                 # (3 s s, h w)
    distance = (every - patch.reshape(-1, 1)).square().sum(0).view(allowed.shape)
    return distance.masked_fill(~allowed, float("inf"))


def _distance_cases(g):
    cases = []
    for h, w, s in ((9, 11, 3), (12, 8, 5)):
        hole = masks.random_box(1, (h, w), g, area=(0.1, 0.15))[0, 0] > 0
        allowed = F.max_pool2d(hole[None, None].float(), s, 1)[0, 0] == 0
        if allowed.all() or not allowed.any():
            allowed = torch.rand(h - s + 1, w - s + 1, generator=g) > 0.4
        cases.append((torch.rand(3, s, s, generator=g), torch.rand(3, h, w, generator=g), allowed))
    return cases


def _distances(gap, where=None, channels=3):
    """A mistaken version: another `gap` between values, another treatment of `allowed`, fewer channels."""
    def answer(patch, picture, allowed):
        s = patch.shape[-1]
        every = F.unfold(picture[None, :channels], s)[0]
        d = gap(every - patch[:channels].reshape(-1, 1)).view(allowed.shape)
        return d if where is None else where(d, allowed)
    return answer


def _without_last(distance):
    distance[-1], distance[:, -1] = float("inf"), float("inf")
    return distance


_inf = lambda d, allowed: d.masked_fill(~allowed, float("inf"))
_ssd = lambda e: e.square().sum(0)

register(Check(
    name="patch_distances", reference=patch_distances, cases=_distance_cases,
    source="lib.checks_04:patch_distances lib.inpaint:windows lib.inpaint:nearest_exhaustive",
    praise="Right: the smallest entry of this map is the best patch to copy from, and no hole can be copied.",
    hints=["Start with two loops over y and x, and picture[:, y:y + s, x:x + s]. How many places are there?",
           "F.unfold(picture[None], s)[0] has one column (3 * s * s values) for every place, in reading "
           "order; the patch flattened, patch.reshape(-1, 1), can be subtracted from all columns at once.",
           "(every - patch.reshape(-1, 1)).square().sum(0).view(allowed.shape).masked_fill(~allowed, "
           "float('inf'))"],
    wrongs=[
        Wrong("allowed ignored", _distances(_ssd),
              "you ignore `allowed`: patches that touch the hole are offered as sources, so the hole would "
              "be filled with itself. Make them infinitely far."),
        Wrong("allowed inverted", _distances(_ssd, lambda d, a: d.masked_fill(a, float("inf"))),
              "allowed is inverted: True marks the places that MAY be copied from; the others must be "
              "infinite."),
        Wrong("zero", _distances(_ssd, lambda d, a: d * a),
              "a forbidden place gets distance 0, which makes it the best of all: it must be infinite."),
        Wrong("not a number", _distances(_ssd, lambda d, a: d + (~a) * float("inf")),
              "0 * infinity is NaN, so the places that are allowed are spoilt: use masked_fill or torch.where."),
        Wrong("minus infinity", _distances(_ssd, lambda d, a: d.masked_fill(~a, -float("inf"))),
              "a forbidden place is infinitely NEAR in your map, so it would win: it must be plus infinity."),
        Wrong("last places", _distances(_ssd, lambda d, a: _without_last(_inf(d, a))),
              "the last row and the last column of places are missing: y runs to H - s and includes it, "
              "range(H - s + 1)."),
        Wrong("summed, then squared", _distances(lambda e: e.sum(0).square(), _inf),
              "you square the sum of the differences, in which plus and minus cancel out: square each one first."),
        Wrong("absolute", _distances(lambda e: e.abs().sum(0), _inf),
              "you sum absolute differences; the task asks for SQUARED differences (a few large errors count "
              "more)."),
        Wrong("root", _distances(lambda e: e.square().sum(0).sqrt(), _inf),
              "you take the root; the task asks for the SQUARED distance (the order is the same, the numbers "
              "are not)."),
        Wrong("mean", _distances(lambda e: e.square().mean(0), _inf),
              "you take the mean over the patch; the task asks for the sum (the order is the same, the "
              "numbers are not)."),
        Wrong("one channel", _distances(_ssd, _inf, channels=1),
              "you compare only the first channel (red): sum over all three."),
    ]))


# ---------------------------------------------------------------- 4. the known part at the right noise level

def put_known_back(x_prev, x0, fill_mask, t, alphas_cumprod, noise):
    """After the step t -> t-1: x_{t-1} with its known part replaced by x_0, noised to level t-1.

    x_prev, x0, noise (B, 3, H, W); fill_mask (B, 1, H, W), 1 = to fill; alphas_cumprod (T,); t >= 1, one
    integer. With m = 1 - fill_mask: m (sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) noise) + (1 - m)
    x_prev."""
    abar, m = alphas_cumprod[t - 1], 1 - fill_mask
    known = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
    return m * known + (1 - m) * x_prev


def _known_cases(g):
    abar = torch.linspace(0.98, 0.05, 20).sort(descending=True).values
    return [(torch.randn(b, 3, 8, 8, generator=g), torch.rand(b, 3, 8, 8, generator=g) * 2 - 1,
             masks.random_box(b, 8, g), t, abar, torch.randn(b, 3, 8, 8, generator=g))
            for b, t in ((1, 12), (2, 5), (1, 1))]                        # t = 1 arrives at level 0, not at clean


def _known(level=lambda t: t - 1, scale=None, mix=lambda m, known, x: m * known + (1 - m) * x):
    """A mistaken version: other level, other noising, other mixing."""
    noised = lambda a, x0, noise: a.sqrt() * x0 + (1 - a).sqrt() * noise

    def answer(x_prev, x0, fill_mask, t, alphas_cumprod, noise):
        return mix(1 - fill_mask, (scale or noised)(alphas_cumprod[level(t)], x0, noise), x_prev)
    return answer


def _at_the_end(last):
    """A mistaken version that treats t = 1 as the step to the clean picture."""
    def answer(x_prev, x0, fill_mask, t, alphas_cumprod, noise):
        spread = (1 - alphas_cumprod[t - 1]).sqrt() * noise
        known = alphas_cumprod[t - 1].sqrt() * x0 + spread
        known = last(x0, known, spread) if t == 1 else known
        return (1 - fill_mask) * known + fill_mask * x_prev
    return answer


_LAST_LEVEL = ("The papers count levels from 1, so that 0 is clean; in code the step from t = 1 arrives at timestep 0, "
               "and alphas_cumprod[0] still holds a little noise.")

register(Check(
    name="put_known_back", reference=put_known_back, cases=_known_cases,
    source="lib.checks_04:put_known_back lib.inpaint:put_back lib.inpaint:repaint_step",
    praise="Right: both parts now have the noise of level t-1, which is what the network was trained to see.",
    hints=["The step t -> t-1 is done: at which noise level is the unknown part now?",
           "q_sample for the known part: sqrt(abar) x_0 + sqrt(1 - abar) noise, with abar = alphas_cumprod[t "
           "- 1].",
           "m = 1 - fill_mask; return m * known + (1 - m) * x_prev: the hole gets no noise from here."],
    wrongs=[
        Wrong("clean at the end", _at_the_end(lambda x0, noised, noise: x0),
              "at t = 1 you paste the known part clean. " + _LAST_LEVEL),
        Wrong("no noise at the end", _at_the_end(lambda x0, noised, noise: noised - noise),
              "at t = 1 you leave the noise out. " + _LAST_LEVEL),
        Wrong("clean paste", _known(scale=lambda a, x0, noise: x0),
              "you paste the known part CLEAN, while the rest is noisy. That suits only a network trained "
              "that way; ours saw pictures that were noised everywhere: noise x_0 to level t-1 first."),
        Wrong("off by one", _known(level=lambda t: t),
              "off by one: you noise to level t, but after the step the unknown part is at level t-1: use "
              "alphas_cumprod[t - 1]."),
        Wrong("mask inverted", _known(mix=lambda m, known, x: (1 - m) * known + m * x),
              "the mask is inverted: you write the original into the HOLE. m = 1 - fill_mask is 1 where "
              "known."),
        Wrong("known only", _known(mix=lambda m, known, x: m * known),
              "the hole is empty: add the unknown part, (1 - m) * x_prev."),
        Wrong("known everywhere", _known(mix=lambda m, known, x: known),
              "you return the noised original everywhere, in the hole too: only the known part is put back."),
        Wrong("on top", _known(mix=lambda m, known, x: x + m * known),
              "you add the known part on top of what stands there: x_prev counts in the hole only, (1 - m) * x_prev."),
        Wrong("no noise", _known(scale=lambda a, x0, noise: a.sqrt() * x0),
              "the known part is shrunk, but gets no noise: add sqrt(1 - abar) * noise."),
        Wrong("not shrunk", _known(scale=lambda a, x0, noise: x0 + (1 - a).sqrt() * noise),
              "x_0 is not shrunk under its noise: multiply it by sqrt(abar)."),
        Wrong("noise not scaled", _known(scale=lambda a, x0, noise: a.sqrt() * x0 + noise),
              "the noise is not scaled: multiply it by sqrt(1 - abar)."),
        Wrong("swapped", _known(scale=lambda a, x0, noise: (1 - a).sqrt() * x0 + a.sqrt() * noise),
              "the two factors are swapped: sqrt(abar) belongs to x_0, sqrt(1 - abar) to the noise."),
        Wrong("off by one and inverted", _known(lambda t: t, mix=lambda m, known, x: (1 - m) * known + m * x),
              "two things: the mask is inverted (m = 1 - fill_mask), and you noise to level t instead of t - 1."),
        Wrong("sqrt forgotten", _known(scale=lambda a, x0, noise: a * x0 + (1 - a) * noise),
              "the square roots are missing: sqrt(abar) x_0 + sqrt(1 - abar) noise, so that the variances "
              "add up to 1."),
        Wrong("noise in the hole", lambda x, x0, f, t, abar, noise:
              (1 - f) * abar[t - 1].sqrt() * x0 + f * x + (1 - abar[t - 1]).sqrt() * noise,
              "you add the noise everywhere, also in the hole, whose x_prev already has its noise: only the "
              "known part gets it."),
        Wrong("as RePaint prints it", _known(lambda t: t, lambda a, x0, noise: a.sqrt() * x0 + (1 - a) * noise),
              "this is line 5 of RePaint's Algorithm 1 as it is printed, and the print is wrong twice: the level is t - 1, "
              "and the noise is scaled by the root, sqrt(1 - abar)."),
        Wrong("alpha for the noise", _known(scale=lambda a, x0, noise: a.sqrt() * x0 + (1 - a) * noise),
              "the noise is scaled by the variance 1 - abar; its standard deviation is the root of that."),
    ]))


# ---------------------------------------------------------------- 5. RePaint's jump, in one go

def jump_forward(x, s, t, alphas_cumprod, noise):
    """From noise level s up to level t > s in one jump.

    x_t = sqrt(abar_t / abar_s) x_s + sqrt(1 - abar_t / abar_s) noise."""
    ratio = alphas_cumprod[t] / alphas_cumprod[s]
    return ratio.sqrt() * x + (1 - ratio).sqrt() * noise


def _jump_cases(g):
    abar = torch.cumprod(1 - torch.linspace(0.01, 0.3, 20), 0)
    return [(torch.randn(1, 3, 6, 7, generator=g), s, t, abar, torch.randn(1, 3, 6, 7, generator=g))
            for s, t in ((2, 9), (7, 11), (0, 19))]                       # level 0 has noise, too


def _jump(ratio, noise_scale=lambda r: (1 - r).sqrt(), keep=lambda r: r.sqrt()):
    def answer(x, s, t, abar, noise):
        r = ratio(abar, s, t)
        return keep(r) * x + noise_scale(r) * noise
    return answer


_right = lambda abar, s, t: abar[t] / abar[s]

register(Check(
    name="jump_forward", reference=jump_forward, cases=_jump_cases,
    source="lib.checks_04:jump_forward lib.inpaint:forward_jump",
    praise="Right: alpha-bar from s to t is the quotient, and many small steps become one.",
    hints=["One step is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise. What do the factors sqrt(alpha) "
           "of all steps from s + 1 to t multiply to?",
           "abar_t is the product of all alphas up to t, abar_s of those up to s: divide.",
           "ratio = alphas_cumprod[t] / alphas_cumprod[s]; then as in q_sample, with ratio for abar."],
    wrongs=[
        Wrong("as if x were clean", _jump(lambda abar, s, t: abar[t]),
              "this is q_sample from a CLEAN picture. x already has the noise of level s: use the quotient "
              "abar_t / abar_s, or it gets too much."),
        Wrong("level 0 as clean", _jump(lambda abar, s, t: abar[t] / abar[s] if s else abar[t]),
              "you treat s = 0 as the clean picture. Timestep 0 has had its first step of noise: alphas_cumprod[0] is "
              "below 1, and the quotient abar_t / abar_0 holds there as everywhere."),
        Wrong("counted from 1", _jump(lambda abar, s, t: abar[t - 1] / abar[s - 1]),
              "both indices are one too low: level t is alphas_cumprod[t] here (and at s = 0 the index -1 is the LAST "
              "entry)."),
        Wrong("s one low", _jump(lambda abar, s, t: abar[t] / abar[s - 1]),
              "you divide by abar_{s-1}, one step too early (and at s = 0 the index -1 is the LAST entry): x is at "
              "level s."),
        Wrong("t one low", _jump(lambda abar, s, t: abar[t - 1] / abar[s]),
              "you stop one step short, at t - 1: use alphas_cumprod[t]."),
        Wrong("level t - s", _jump(lambda abar, s, t: abar[t - s]),
              "you take the level of t - s, as if every step added the same noise; each has its own beta. Divide: "
              "abar_t / abar_s."),
        Wrong("last step only", _jump(lambda abar, s, t: abar[t] / abar[t - 1]),
              "this is the last small step only, from t-1 to t: the jump starts at s."),
        Wrong("difference of variances",
              lambda x, s, t, abar, noise:
              (abar[t] / abar[s]).sqrt() * x + (abar[s] - abar[t]).sqrt() * noise,
              "the noise you add has variance abar_s - abar_t; x is shrunk at the same time, so it takes 1 - "
              "abar_t / abar_s to arrive at level t."),
        Wrong("all of level t's noise", lambda x, s, t, abar, noise:
              (abar[t] / abar[s]).sqrt() * x + (1 - abar[t]).sqrt() * noise,
              "you add the noise of level t as if x had none; it brings that of level s along: add sqrt(1 - "
              "abar_t / abar_s)."),
        Wrong("x not shrunk", _jump(_right, keep=torch.ones_like),
              "x is not multiplied by sqrt(abar_t / abar_s), so the picture stays too strong under the "
              "noise."),
        Wrong("variance for the noise", _jump(_right, noise_scale=lambda r: 1 - r),
              "the noise is scaled by its variance, 1 - ratio; its standard deviation is the root of that."),
        Wrong("sqrt forgotten for x", _jump(_right, keep=lambda r: r),
              "x is multiplied by the ratio itself: it should be the root, sqrt(abar_t / abar_s)."),
        Wrong("sqrt forgotten", _jump(_right, noise_scale=lambda r: 1 - r, keep=lambda r: r),
              "the square roots are missing: sqrt(ratio) x + sqrt(1 - ratio) noise."),
        Wrong("upside down", _jump(lambda abar, s, t: abar[s] / abar[t]),
              "the quotient is upside down (and 1 minus it is negative, so the root is NaN): abar falls with "
              "t, so abar_t / abar_s is below 1."),
        Wrong("noise not scaled", _jump(_right, noise_scale=lambda r: torch.ones_like(r)),
              "the noise is not scaled: multiply it by sqrt(1 - abar_t / abar_s)."),
    ]))
