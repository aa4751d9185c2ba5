"""Exercises of lesson 06: the convention, alignment by least squares, two scores, delta1, and a pixel in space."""
import math

import torch

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. inverse depth -> the course's convention

def inverse_to_depth(inverse, low, high):
    """Inverse depth (B, 1, H, W), near = high -> depth in [0, 1]: 0 at `high` and above, 1 at `low` and below."""
    return (1 - (inverse - low) / (high - low)).clamp(0, 1)


def _inverse_cases(g):
    return [(0.1 + torch.rand(1, 1, 6, 8, generator=g), 0.2, 0.9),
            (3 + 40 * torch.rand(2, 1, 5, 5, generator=g), 6.0, 35.0)]


register(Check(
    name="inverse_to_depth", reference=inverse_to_depth, cases=_inverse_cases,
    source="lib.checks_06:inverse_to_depth lib.depth:from_inverse",
    praise="Right: near is 0, far is 1, and the few pixels beyond the percentiles stay at the ends of the scale.",
    hints=["Which inverse depth is the NEAREST place, `low` or `high`? That one must become 0.",
           "(inverse - low) / (high - low) is 1 at the nearest place. Turn it round.",
           "1 - (inverse - low) / (high - low), held in [0, 1] by .clamp(0, 1)."],
    wrongs=[
        Wrong("near is high", lambda i, low, high: ((i - low) / (high - low)).clamp(0, 1),
              "the sign trap: your result is 1 where it is NEAR. Inverse depth is high for what is near, "
              "and the course's depth must be 0 there: take 1 minus it."),
        Wrong("near is high, not clamped", lambda i, low, high: (i - low) / (high - low),
              "the sign trap: your result is 1 where it is NEAR; and it leaves [0, 1] beyond low and high."),
        Wrong("not clamped", lambda i, low, high: 1 - (i - low) / (high - low),
              "the line is right, but pixels beyond `low` and `high` (percentiles, so there are some) leave"
              " [0, 1]: clamp."),
        Wrong("own extremes", lambda i, low, high: 1 - (i - i.min()) / (i.max() - i.min()),
              "you stretch between the map's own smallest and largest value, so that one stray pixel moves "
              "all others: use `low` and `high`."),
        Wrong("reciprocal", lambda i, low, high: ((1 / i - 1 / high) / (1 / low - 1 / high)).clamp(0, 1),
              "you take 1 / inverse as if it were metres. A relative model's inverse depth has an unknown "
              "shift, so its reciprocal is no depth: stay in inverse depth and turn the sign."),
        Wrong("negated", lambda i, low, high: -i,
              "the order is right now, but the range is not: bring it to [0, 1] with `low` and `high`."),
    ]))


# ---------------------------------------------------------------- 2. scale and shift by least squares

def fit_scale_shift(prediction, target, valid):
    """The s and t, each (B,), that minimise sum of valid * (s * prediction + t - target)^2 in every image."""
    n = valid.sum((1, 2, 3))
    mean = lambda x: (x * valid).sum((1, 2, 3)) / n
    p, y = mean(prediction), mean(target)
    s = (mean(prediction * target) - p * y) / (mean(prediction ** 2) - p ** 2)
    return s, y - s * p


def _fit_cases(g):
    cases = []
    for b in (1, 3):
        p = 0.5 + torch.rand(b, 1, 8, 9, generator=g)
        scale, shift = 0.5 + 2 * torch.rand(b, 1, 1, 1, generator=g), torch.rand(b, 1, 1, 1, generator=g)
        valid = (torch.rand(b, 1, 8, 9, generator=g) > 0.3).float()
        target = scale * p + shift + 0.05 * torch.randn(p.shape, generator=g)
        cases.append((p, target * valid, valid))                # a hole reads 0, as sensors write it
    return cases


def _normal(prediction, target, weight):
    n = weight.sum((1, 2, 3))
    mean = lambda x: (x * weight).sum((1, 2, 3)) / n
    p, y = mean(prediction), mean(target)
    s = (mean(prediction * target) - p * y) / (mean(prediction ** 2) - p ** 2)
    return s, y - s * p


def _through_zero(p, y, w):
    s = (p * y * w).sum((1, 2, 3)) / (p * p * w).sum((1, 2, 3))
    return s, torch.zeros_like(s)


def _mixed_counts(p, y, w):
    n = w.sum((1, 2, 3))
    s, _ = _normal(p, y, w)
    s, mean = s * (n - 1) / n, lambda x: (x * w).sum((1, 2, 3)) / n
    return s, mean(y) - s * mean(p)


def _of_the_batch(p, y, w):
    s, t = _normal(p.reshape(1, 1, 1, -1), y.reshape(1, 1, 1, -1), w.reshape(1, 1, 1, -1))
    return s.expand(len(p)), t.expand(len(p))


register(Check(
    name="fit_scale_shift", reference=fit_scale_shift, cases=_fit_cases, tolerance=1e-3,
    source="lib.checks_06:fit_scale_shift lib.depth:align_scale_shift",
    praise="Right: two numbers for each picture, from measured pixels alone.",
    hints=["The best line through points (prediction, target): slope = covariance / variance, and it passes "
           "through both means.",
           "Every mean runs over valid pixels: (x * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3)).",
           "s = (mean(p y) - mean(p) mean(y)) / (mean(p p) - mean(p)^2), then t = mean(y) - s mean(p)."],
    wrongs=[
        Wrong("holes count", lambda p, y, w: _normal(p, y, torch.ones_like(w)),
              "you align on invalid pixels too: a hole reads 0 and says nothing about depth, yet it pulls "
              "at your line. Every sum needs the factor `valid`."),
        Wrong("divided by all pixels", lambda p, y, w: _normal(p * w, y * w, torch.ones_like(w)),
              "your sums leave the holes out, but you divide by the number of ALL pixels: divide by "
              "valid.sum((1, 2, 3))."),
        Wrong("scale only", _through_zero,
              "you fit a scale without a shift, a line through 0. Relative models have an unknown shift as "
              "well."),
        Wrong("fitted backwards", lambda p, y, w: _normal(y, p, w),
              "you fit backwards, s * target + t = prediction. It is the prediction that must be "
              "scaled and shifted."),
        Wrong("one line for the batch", _of_the_batch,
              "you fit one line for all pictures together. Scale and shift are unknown anew in every "
              "picture: sum over (1, 2, 3) and keep the batch axis."),
        Wrong("ratio of the means", lambda p, y, w: ((y * w).sum((1, 2, 3)) / (p * w).sum((1, 2, 3)),
                                                     torch.zeros(len(p))),
              "you divide mean by mean, which matches the average only: least squares also asks how both "
              "vary together."),
        Wrong("shift first", lambda p, y, w: _normal(p, y, w)[::-1],
              "the two numbers are right and in the wrong order: return s, then t."),
        Wrong("n and n - 1 mixed", _mixed_counts,
              "your slope is a little too small: torch's .var() divides by n - 1, a mean of products by n. "
              "Use means in both (or .var(correction=0))."),
        Wrong("shift forgot the scale",
              lambda p, y, w: (_normal(p, y, w)[0], ((y - p) * w).sum((1, 2, 3)) / w.sum((1, 2, 3))),
              "the scale is right, the shift is not: t = mean(target) - s * mean(prediction), with the s in"
              " it."),
    ]))


# ---------------------------------------------------------------- 3. AbsRel of each picture, RMSE of all

def two_scores(metres, truth, valid):
    """(AbsRel of each picture (B,), RMSE over the valid pixels of all pictures together ())."""
    relative = ((metres - truth).abs() / truth.clamp_min(1e-6) * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))
    return relative, (((metres - truth) ** 2 * valid).sum() / valid.sum()).sqrt()


def _scores_in_numbers(metres, truth, valid):
    """`two_scores` with a plain number for the RMSE: then a number and a tensor of one value are both right."""
    relative, rmse = two_scores(metres, truth, valid)
    return relative, float(rmse)


def _score_cases(g):
    cases = []
    for b in (2, 3):
        truth = 1 + 5 * torch.rand(b, 1, 6, 7, generator=g)
        error = torch.randn(truth.shape, generator=g) * torch.tensor([0.1, 0.9, 0.3])[:b].view(-1, 1, 1, 1)
        valid = (torch.rand(truth.shape, generator=g) > torch.tensor([0.6, 0.1, 0.3])[:b].view(-1, 1, 1, 1)).float()
        holed = torch.where(valid > 0, truth, torch.full_like(truth, 0.5))
        cases.append(((truth + error).clamp_min(0.2), holed, valid))
    return cases


def _scores(relative=lambda z, t: (z - t).abs() / t, pool=None, weight=lambda v: v):
    """A mistaken pair: another relative error, another way to pool the RMSE, other pixels."""
    def answer(z, t, v):
        w = weight(v)
        each = (relative(z, t) * w).sum((1, 2, 3)) / w.sum((1, 2, 3))
        right = (((z - t) ** 2 * w).sum() / w.sum()).sqrt()
        return each, float(right if pool is None else pool(z, t, w))
    return answer


_per_picture = lambda z, t, w: ((z - t) ** 2 * w).sum((1, 2, 3)) / w.sum((1, 2, 3))

register(Check(
    name="two_scores", reference=_scores_in_numbers, cases=_score_cases,
    source="lib.checks_06:two_scores lib.depth:abs_rel lib.depth:rmse",
    praise="Right: relative to the truth, over measured pixels, and the root comes last.",
    hints=["AbsRel: |metres - truth| / truth, averaged over the valid pixels of each picture.",
           "RMSE: first the mean of the squares over all valid pixels of all pictures, then one root.",
           "Two sums with `* valid`; the first over (1, 2, 3), the second over everything, each divided by "
           "the sum of valid."],
    wrongs=[
        Wrong("divided by the prediction", _scores(lambda z, t: (z - t).abs() / z),
              "AbsRel: you divide by the PREDICTION, so a model that says 'far' everywhere looks good. "
              "Divide by the truth."),
        Wrong("mean of RMSE", _scores(pool=lambda z, t, w: _per_picture(z, t, w).sqrt().mean()),
              "RMSE: you take each picture's root and then the mean of the roots, which is smaller. Pool "
              "the squares of all pictures first; the root comes last."),
        Wrong("mean of the pictures' MSE", _scores(pool=lambda z, t, w: _per_picture(z, t, w).mean().sqrt()),
              "RMSE: you average the pictures' mean squares, so that a picture with few measured pixels "
              "counts as much as a full one. Over the pixels of all pictures together means: one sum, "
              "divided by one count."),
        Wrong("RMSE first", lambda z, t, v: _scores_in_numbers(z, t, v)[::-1],
              "both scores are right and in the wrong order: return AbsRel of each picture, then the RMSE."),
        Wrong("ratio of the means", lambda z, t, v: (((z - t).abs() * v).sum((1, 2, 3)) / (t * v).sum((1, 2, 3)),
                                                     _scores_in_numbers(z, t, v)[1]),
              "AbsRel: you divide mean by mean. Each pixel's error is divided by its own truth first, then averaged."),
        Wrong("one AbsRel for all", lambda z, t, v: (((z - t).abs() / t * v).sum() / v.sum(),
                                                     _scores_in_numbers(z, t, v)[1]),
              "AbsRel: you give one number for all pictures together. It is wanted for each: sum over (1, "
              "2, 3) and keep the batch axis."),
        Wrong("an RMSE for each picture", lambda z, t, v: (two_scores(z, t, v)[0], _per_picture(z, t, v).sqrt()),
              "RMSE: you give one for each picture. Here it is asked for once, over the pixels of all "
              "pictures."),
        Wrong("root forgotten", _scores(pool=lambda z, t, w: ((z - t) ** 2 * w).sum() / w.sum()),
              "RMSE: the root is missing, so your number is in square metres."),
        Wrong("holes count", _scores(weight=torch.ones_like),
              "you count unmeasured pixels too: both scores need the factor `valid`, in the sum and in the "
              "count."),
        Wrong("no absolute value", _scores(lambda z, t: (z - t) / t),
              "AbsRel: without the absolute value, too near and too far cancel out."),
        Wrong("metres", _scores(lambda z, t: (z - t).abs()),
              "AbsRel: you average the error in metres; it has to be relative: divide by the truth."),
    ]))


# ---------------------------------------------------------------- 4. delta1

def delta_one(metres, truth, valid):
    """Share of valid pixels with max(z / z*, z* / z) < 1.25, for each picture: (B,)."""
    ratio = torch.maximum(metres / truth, truth / metres)
    return ((ratio < 1.25).float() * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))


def _delta_cases(g):
    cases = []
    for b in (1, 2):
        truth = 1 + 5 * torch.rand(b, 1, 8, 9, generator=g)
        metres = truth * (0.55 + torch.rand(truth.shape, generator=g))
        valid = (torch.rand(truth.shape, generator=g) > 0.3).float()
        metres[:, 0, 0, 0], truth[:, 0, 0, 0], valid[:, 0, 0, 0] = 5, 4, 1
        cases.append((metres, truth, valid))                    # with a factor of exactly 1.25: not below it
    return cases


def _delta(inside, weight=lambda v: v):
    return lambda z, t, v: (inside(z, t).float() * weight(v)).sum((1, 2, 3)) / weight(v).sum((1, 2, 3))


_both = lambda z, t: torch.maximum(z / t, t / z)

register(Check(
    name="delta_one", reference=delta_one, cases=_delta_cases, source="lib.checks_06:delta_one lib.depth:delta1",
    praise="Right: a quarter too far and a quarter too near are both caught.",
    hints=["Two ratios for each pixel: z / truth and truth / z. The larger one is what counts.",
           "torch.maximum(a, b) takes the larger of two tensors, pixel by pixel; then compare with 1.25.",
           "((ratio < 1.25).float() * valid).sum((1, 2, 3)) / valid.sum((1, 2, 3))."],
    wrongs=[
        Wrong("one way", _delta(lambda z, t: z / t < 1.25),
              "you take the ratio one way only: whatever is too NEAR has z / truth below 1 and passes. Take"
              " the larger of z / truth and truth / z."),
        Wrong("the other way", _delta(lambda z, t: t / z < 1.25),
              "you take the ratio one way only: whatever is too FAR passes. Take the larger of z / truth "
              "and truth / z."),
        Wrong("the limit counts", _delta(lambda z, t: _both(z, t) <= 1.25),
              "a factor of exactly 1.25 does not count: the ratio must be below it, < and not <=."),
        Wrong("difference", _delta(lambda z, t: (z - t).abs() / t < 0.25),
              "|z - truth| / truth < 0.25 is close but not it: on the near side the limit is truth / 1.25, "
              "which is 20 % nearer, not 25 %. Use the two ratios."),
        Wrong("metres", _delta(lambda z, t: (z - t).abs() < 1.25),
              "1.25 is a ratio, not metres: compare z / truth and truth / z with it."),
        Wrong("share outside", _delta(lambda z, t: _both(z, t) >= 1.25),
              "this is the share of BAD pixels; delta1 is the share of good ones, 1 is perfect."),
        Wrong("holes count", _delta(lambda z, t: _both(z, t) < 1.25, torch.ones_like),
              "you count unmeasured pixels too: multiply by `valid` and divide by its sum."),
        Wrong("divided by all pixels", lambda z, t, v: ((_both(z, t) < 1.25).float() * v).mean((1, 2, 3)),
              "you leave the holes out of the sum, but divide by the number of ALL pixels: divide by the "
              "sum of `valid`."),
        Wrong("one number for the batch", lambda z, t, v: ((_both(z, t) < 1.25).float() * v).sum() / v.sum(),
              "you give one share for all pictures together: sum over (1, 2, 3) and keep the batch axis."),
        Wrong("smaller ratio", _delta(lambda z, t: torch.minimum(z / t, t / z) < 1.25),
              "you take the smaller of both ratios, which is never above 1: every pixel passes. Take the "
              "larger."),
    ]))


# ---------------------------------------------------------------- 5. one pixel in space

def unproject_pixel(column, row, z, size, fov):
    """(X, Y, Z) in metres in the camera's frame: X right, Y up, Z ahead; size (H, W), fov vertical, in degrees."""
    height, width = size
    f = height / 2 / math.tan(math.radians(fov) / 2)
    return (column + 0.5 - width / 2) / f * z, (height / 2 - row - 0.5) / f * z, z


def _pixel_cases(g):
    return [(3, 40, 2.5, (64, 96), 50.0), (80, 5, 4.0, (64, 96), 50.0), (10, 100, 3.0, (128, 128), 60.0)]


def _unprojected(column=lambda c: c + 0.5, row=lambda r: r + 0.5, focal=None, up=1.0, far=None, centre=None):
    def answer(c, r, z, size, fov):
        h, w = size
        f = h / 2 / math.tan(math.radians(fov) / 2) if focal is None else focal(size, fov)
        cx, cy = (w / 2, h / 2) if centre is None else centre(size)
        x, y = (column(c) - cx) / f, up * (cy - row(r)) / f
        z = z if far is None else far(x, y, z)
        return x * z, y * z, z
    return answer


register(Check(
    name="unproject_pixel", reference=unproject_pixel, cases=_pixel_cases, tolerance=1e-5,
    source="lib.checks_06:unproject_pixel lib.depth:pinhole lib.depth:unproject",
    praise="Right: similar triangles, from the middle of the pixel.",
    hints=["f = (H / 2) / tan(fov / 2), in pixels; math.tan wants radians (math.radians).",
           "The middle of pixel (column, row) lies at (column + 0.5, row + 0.5); the optical axis passes "
           "through (W / 2, H / 2).",
           "X = (column + 0.5 - W / 2) / f * z; Y points UP while rows count down: Y = (H / 2 - row - 0.5) "
           "/ f * z; Z = z."],
    wrongs=[
        Wrong("Y downwards", _unprojected(up=-1.0),
              "your Y points down: rows count downwards, but Y is up here. A place above the middle must "
              "have Y > 0."),
        Wrong("pixel corner", _unprojected(column=lambda c: c, row=lambda r: r),
              "you take the pixel's corner: the middle of pixel (column, row) lies half a pixel further, at"
              " column + 0.5."),
        Wrong("distance along the ray", _unprojected(far=lambda x, y, z: z / math.sqrt(1 + x * x + y * y)),
              "you treat z as the distance along the ray. Depth here is measured along the optical axis, so"
              " Z = z."),
        Wrong("whole angle", _unprojected(focal=lambda size, fov: size[0] / 2 / math.tan(math.radians(fov))),
              "you take the tangent of the whole field of view; half of it lies on each side of the axis: "
              "tan(fov / 2)."),
        Wrong("whole height", _unprojected(focal=lambda size, fov: size[0] / math.tan(math.radians(fov) / 2)),
              "your f is twice as long: half the height belongs to half the angle, f = (H / 2) / tan(fov / 2)."),
        Wrong("X mirrored", lambda c, r, z, size, fov: tuple(
            v * (1 if k else -1) for k, v in enumerate(unproject_pixel(c, r, z, size, fov))),
              "your X points left: columns count to the right, and so does X."),
        Wrong("from the corner", _unprojected(centre=lambda size: (0, 0)),
              "you measure from the picture's corner: the optical axis passes through its middle, (W / 2, H / 2)."),
        Wrong("times f", lambda c, r, z, size, fov: tuple(
            v * (1 if k == 2 else (size[0] / 2 / math.tan(math.radians(fov) / 2)) ** 2)
            for k, v in enumerate(unproject_pixel(c, r, z, size, fov))),
              "you multiply by f: pixels are divided by it, (column + 0.5 - W / 2) / f * z."),
        Wrong("degrees", _unprojected(focal=lambda size, fov: size[0] / 2 / math.tan(fov / 2)),
              "math.tan wants radians and gets degrees: math.radians(fov)."),
        Wrong("width for height", _unprojected(focal=lambda size, fov: size[1] / 2 / math.tan(math.radians(fov) / 2)),
              "you compute f from the width; this field of view is the VERTICAL one, so f comes from the "
              "height."),
        Wrong("swapped centre", _unprojected(centre=lambda size: (size[0] / 2, size[1] / 2)),
              "the centre is swapped: the axis passes through column W / 2 and row H / 2, and size is (H, "
              "W)."),
        Wrong("row for column", lambda c, r, z, size, fov: unproject_pixel(r, c, z, size, fov),
              "row and column are swapped: X goes with the column, Y with the row."),
        Wrong("not times z", lambda c, r, z, size, fov: tuple(
            v / (z if k < 2 else 1) for k, v in enumerate(unproject_pixel(c, r, z, size, fov))),
              "this is the ray at Z = 1: multiply by z."),
    ]))
