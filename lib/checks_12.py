"""Exercises of lesson 12: RMSE in a zone, SSIM of a window, Frechet distance, unbiased MMD, paired interval."""
import numpy as np
import torch

from lib.checks import Check, Wrong, register


# ---------------------------------------------------------------- 1. RMSE in a zone

def zone_rmse(edit, truth, zone):
    """Root of the mean square error over the zone's pixels and all channels, one for each picture: (B,)."""
    square = (edit - truth).square().mean(1, keepdim=True)          # mean over the channels, (B, 1, H, W)
    return ((square * zone).sum((1, 2, 3)) / zone.sum((1, 2, 3))).sqrt()


def _zone_cases(g):
    cases = []
    for b in (2, 3):
        zone = (torch.rand(b, 1, 12, 10, generator=g) < 0.3).float()
        truth = torch.rand(b, 3, 12, 10, generator=g)
        scale = torch.rand(b, 1, 1, 1, generator=g) + 0.1
        cases.append((truth + scale * torch.randn(b, 3, 12, 10, generator=g), truth, zone))
    return cases


def _square(edit, truth):
    return (edit - truth).square().mean(1, keepdim=True)


register(Check(
    name="zone_rmse", reference=zone_rmse, cases=_zone_cases,
    source="lib.checks_12:zone_rmse lib.metrics:rmse",
    praise="Right: the zone's pixels alone, pooled before the root.",
    hints=["Which pixels belong into the mean? Only those where zone is 1. What do you divide by?",
           "Mean over the channels first, so that everything has one channel like the zone; then sum(square "
           "* zone) over sum(zone), picture by picture.",
           "square = (edit - truth).square().mean(1, keepdim=True); "
           "((square * zone).sum((1, 2, 3)) / zone.sum((1, 2, 3))).sqrt()"],
    wrongs=[
        Wrong("whole picture", lambda e, t, z: _square(e, t).mean((1, 2, 3)).sqrt(),
              "this is the RMSE of the WHOLE picture; zone is not used. A wrong shadow on 4 % of the "
              "pixels nearly vanishes in it: count the zone's pixels alone."),
        Wrong("divided by all pixels", lambda e, t, z: (_square(e, t) * z).mean((1, 2, 3)).sqrt(),
              "you sum over the zone but divide by ALL pixels (a mean of square * zone does that), so "
              "small zones look good. Divide by zone.sum()."),
        Wrong("mean of roots", lambda e, t, z: (_square(e, t).sqrt() * z).sum((1, 2, 3)) / z.sum((1, 2, 3)),
              "you take the root of every pixel and then the mean: the root comes LAST, after the mean, or "
              "a few large errors count too little."),
        Wrong("channels forgotten",
              lambda e, t, z: ((e - t).square() * z).sum((1, 2, 3)).div(z.sum((1, 2, 3))).sqrt(),
              "too large by sqrt(3): you sum three channels, but divide by the number of pixels. The zone "
              "has one channel: divide by 3 * zone.sum(), or take the mean over the channels first."),
        Wrong("one number for the batch",
              lambda e, t, z: ((_square(e, t) * z).sum() / z.sum()).sqrt().expand(len(e)),
              "you pool the pictures of the batch into one number: one value for each picture, so sum over "
              "the axes (1, 2, 3)."),
        Wrong("one number", lambda e, t, z: ((_square(e, t) * z).sum() / z.sum()).sqrt(),
              "you give one number for the whole batch: one value for each picture is wanted, so sum over "
              "the axes (1, 2, 3)."),
        Wrong("root forgotten", lambda e, t, z: (_square(e, t) * z).sum((1, 2, 3)) / z.sum((1, 2, 3)),
              "this is the mean SQUARE error: the root is missing."),
    ]))


# ---------------------------------------------------------------- 2. SSIM of one window

def ssim_window(x, y, weights):
    """SSIM of one window: x, y, weights (n,), weights that sum to 1, values in [0, 1] -> a 0-d tensor."""
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    mx, my = (weights * x).sum(), (weights * y).sum()
    vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
    cov = (weights * (x - mx) * (y - my)).sum()
    return (2 * mx * my + c1) / (mx ** 2 + my ** 2 + c1) * (2 * cov + c2) / (vx + vy + c2)


def _window_cases(g):
    cases = []
    for n, size in ((25, 1.0), (121, 0.2), (49, 0.02)):   # the last is nearly flat: the constants matter
        w = torch.rand(n, generator=g).double() + 0.1
        x = 0.3 + size * 0.5 * torch.rand(n, generator=g).double()
        y = 0.8 * x + 0.1 + 0.2 * size * torch.rand(n, generator=g).double()
        cases.append((x, y, w / w.sum()))
    return cases


def _window(c=(0.01 ** 2, 0.03 ** 2), mean=lambda v, w: (w * v).sum(), root=False, light=True,
            structure=True):
    def answer(x, y, w):
        mx, my = mean(x, w), mean(y, w)
        vx, vy, cov = mean((x - mx) ** 2, w), mean((y - my) ** 2, w), mean((x - mx) * (y - my), w)
        if root:
            vx, vy = vx.sqrt(), vy.sqrt()
        out = (2 * mx * my + c[0]) / (mx ** 2 + my ** 2 + c[0]) if light else torch.ones_like(mx)
        return out * ((2 * cov + c[1]) / (vx + vy + c[1]) if structure else 1)
    return answer


register(Check(
    name="ssim_window", reference=ssim_window, cases=_window_cases,
    source="lib.checks_12:ssim_window lib.metrics:ssim",
    praise="Right: means, variances and the covariance under one set of weights, and two small constants.",
    tolerance=1e-6,
    hints=["Three ingredients: weighted means, weighted variances (NOT standard deviations), weighted covariance.",
           "mean(v) = (weights * v).sum(); variance = mean((x - mx)^2); covariance = mean((x - mx) * (y - "
           "my)).",
           "(2 mx my + c1) / (mx^2 + my^2 + c1) * (2 cov + c2) / (vx + vy + c2), with c1 = 0.01^2 and c2 = "
           "0.03^2."],
    wrongs=[
        Wrong("peak 255", _window(c=(2.55 ** 2, 7.65 ** 2)),
              "your constants are (0.01 * 255)^2 and (0.03 * 255)^2: those belong to values from 0 to 255. "
              "With pictures in [0, 1] they drown everything, and all pictures look alike: the peak is 1."),
        Wrong("no constants", _window(c=(0.0, 0.0)),
              "the constants are missing: on a flat window you divide by nearly 0, and invisible noise "
              "decides. c1 = 0.01^2, c2 = 0.03^2."),
        Wrong("luminance only", _window(structure=False),
              "this is the luminance term alone (it compares means): multiply by the "
              "contrast-and-structure term (2 cov + c2) / (vx + vy + c2)."),
        Wrong("structure only", _window(light=False),
              "the luminance term is missing: a picture that is too bright everywhere would be perfect. "
              "Multiply by (2 mx my + c1) / (mx^2 + my^2 + c1)."),
        Wrong("means not taken off", lambda x, y, w: _window(structure=False)(x, y, w) * (
            2 * (w * x * y).sum() + 0.03 ** 2) / ((w * x * x).sum() + (w * y * y).sum() + 0.03 ** 2),
              "variances and covariance are about the MEANS: take mx and my off before you multiply."),
        Wrong("weights forgotten", _window(mean=lambda v, w: v.mean()),
              "you use plain means: SSIM's window has weights (a Gaussian), so mean(v) = (weights * "
              "v).sum()."),
        Wrong("standard deviations", _window(root=True),
              "below the line stand the VARIANCES, vx + vy; you have put standard deviations there (their "
              "root)."),
    ]))


# ---------------------------------------------------------------- 3. Frechet distance of two Gaussians

def frechet(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)): a float. mean (C,), cov (C, C), arrays."""
    from scipy.linalg import sqrtm
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def _gaussian_cases(g):
    cases = []
    for c in (2, 4):
        means = torch.randn(2, c, generator=g).double().numpy()
        a, b = torch.randn(2, c, 3 * c, generator=g).double().numpy()
        cases.append((means[0], np.cov(a), means[1], 2 * np.cov(b)))
    return cases


def _frechet(root, distance=lambda a, b: ((a - b) ** 2).sum(), twice=2):
    return lambda ma, a, mb, b: float(distance(ma, mb) + np.trace(a) + np.trace(b) - twice * root(a, b))


def _root(matrix):
    from scipy.linalg import sqrtm
    return np.real(sqrtm(matrix))


def _trace_root(a, b):
    return np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()


register(Check(
    name="frechet", reference=frechet, cases=_gaussian_cases,
    source="lib.checks_12:frechet lib.metrics:frechet_gaussians",
    praise="Right: a matrix root, not the root of every entry.",
    hints=["Two parts: how far the means are apart, squared; and how the covariances differ.",
           "(A B)^(1/2) is a MATRIX root: scipy.linalg.sqrtm(cov_a @ cov_b), of which you keep the real "
           "part.",
           "((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))"],
    wrongs=[
        Wrong("root of every entry", _frechet(lambda a, b: np.sqrt(np.diag(a @ b)).sum()),
              "you take the root of every ENTRY of the product. (A B)^(1/2) is the matrix whose product "
              "with itself is A B: scipy.linalg.sqrtm."),
        Wrong("product of every entry", _frechet(lambda a, b: np.sqrt(np.diag(a) * np.diag(b)).sum()),
              "you multiply entry by entry (a * b): it must be the matrix product, cov_a @ cov_b. Entry by "
              "entry is right only when no two features are correlated."),
        Wrong("product of the roots", _frechet(lambda a, b: np.trace(_root(a) @ _root(b))),
              "you multiply the roots of both covariances; that is the root of their product only when they "
              "commute. Take the root of cov_a @ cov_b."),
        Wrong("sum for trace", lambda ma, a, mb, b: float(((ma - mb) ** 2).sum() + (a + b - 2 * _root(a @ b)).sum()),
              "you sum ALL entries of the matrix: the trace is the sum of its diagonal, np.trace."),
        Wrong("root of all", lambda *four: frechet(*four) ** 0.5,
              "you take a root of the whole at the end: the Frechet distance of FID is left squared."),
        Wrong("distance not squared", _frechet(_trace_root, lambda a, b: np.sqrt(((a - b) ** 2).sum())),
              "the distance of the means must be SQUARED: |mean_a - mean_b|^2, without a root."),
        Wrong("factor 2 missing", _frechet(_trace_root, twice=1),
              "the factor 2 before (A B)^(1/2) is missing: two equal sets must give 0, and A + A - A does "
              "not."),
        Wrong("means only", lambda ma, a, mb, b: float(((ma - mb) ** 2).sum()),
              "you compare the means only: a generator that always makes the same average picture would be "
              "perfect. Add the trace term."),
        Wrong("covariances only", _frechet(_trace_root, lambda a, b: 0.0),
              "the distance of the means is missing: add |mean_a - mean_b|^2."),
    ]))


# ---------------------------------------------------------------- 4. the unbiased kernel distance

def unbiased_mmd(kxx, kyy, kxy):
    """MMD^2 without a feature's pair with itself. kxx (N, N), kyy (M, M), kxy (N, M) -> a float."""
    n, m = len(kxx), len(kyy)
    within_x = (kxx.sum() - kxx.trace()) / (n * (n - 1))
    within_y = (kyy.sum() - kyy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * kxy.mean())


def _kernel_cases(g):
    cases = []
    for n, m in ((6, 9), (12, 5)):
        x, y = torch.randn(n, 3, generator=g).double(), torch.randn(m, 3, generator=g).double() + 0.4
        k = lambda a, b: (a @ b.T / 3 + 1) ** 3
        cases.append((k(x, x), k(y, y), k(x, y)))
    return cases


def _off(k):
    return k.sum() - k.trace()


register(Check(
    name="unbiased_mmd", reference=unbiased_mmd, cases=_kernel_cases,
    source="lib.checks_12:unbiased_mmd lib.metrics:kernel_distance",
    praise="Right: nobody is compared with himself, so the mean over draws is the true distance at any N.",
    hints=["Which entries of kxx compare a picture with itself? How many entries are left?",
           "Take the diagonal out of the sum AND out of the count: N * (N - 1) pairs are left. kxy has no "
           "such pairs.",
           "(kxx.sum() - kxx.trace()) / (n * (n - 1)), the same for kyy, minus 2 * kxy.mean()."],
    wrongs=[
        Wrong("biased", lambda kxx, kyy, kxy: float(kxx.mean() + kyy.mean() - 2 * kxy.mean()),
              "this is the BIASED estimate: the diagonal, where a picture meets itself, is still in the "
              "means. It is above 0 even for two sets of the same kind, and more so the smaller the sets."),
        Wrong("count not reduced",
              lambda kxx, kyy, kxy: float(_off(kxx) / len(kxx) ** 2 + _off(kyy) / len(kyy) ** 2 - 2 * kxy.mean()),
              "the diagonal is out of the sum, but not out of the count: only N * (N - 1) pairs are left, "
              "not N * N."),
        Wrong("factor 2 missing",
              lambda kxx, kyy, kxy: float(_off(kxx) / (len(kxx) * (len(kxx) - 1))
                                          + _off(kyy) / (len(kyy) * (len(kyy) - 1)) - kxy.mean()),
              "the mean across the two sets comes TWICE (as in (a - b)^2 = a^2 + b^2 - 2 a b)."),
        Wrong("cross diagonal left out", lambda kxx, kyy, kxy: float(
            _off(kxx) / (len(kxx) * (len(kxx) - 1)) + _off(kyy) / (len(kyy) * (len(kyy) - 1))
            - 2 * (kxy.sum() - kxy.diagonal().sum()) / (kxy.numel() - min(kxy.shape))),
              "you leave the diagonal of kxy out as well. It pairs two DIFFERENT pictures, one of each "
              "set, like every other entry of kxy: keep it."),
        Wrong("clamped", lambda kxx, kyy, kxy: max(0.0, unbiased_mmd(kxx, kyy, kxy)),
              "you cut negative values off: then the mean over draws is above the true distance again. An "
              "unbiased estimate must be allowed to fall below 0."),
    ]))


# ---------------------------------------------------------------- 5. the paired interval

def paired_interval(a, b, picks):
    """95 % percentile interval of mean(a - b): (low, high). a, b (N,); picks (R, N): the rooms of each draw."""
    means = (a - b)[picks].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _pair_cases(g):
    cases = []
    for n in (20, 33):
        room = 3 * torch.randn(n, generator=g).double().numpy()
        a = room + 0.5 + 0.4 * torch.randn(n, generator=g).double().numpy() ** 2
        picks = torch.randint(n, (400, n), generator=g).numpy()
        cases.append((a, room, picks))
    return cases


def _interval(means):
    def answer(a, b, picks):
        low, high = np.percentile(means(a, b, picks), [2.5, 97.5])
        return float(low), float(high)
    return answer


def _normal_of_draws(a, b, picks):
    means = (a - b)[picks].mean(1)
    return float(means.mean() - 1.96 * means.std()), float(means.mean() + 1.96 * means.std())


def _normal(a, b, picks):
    d = a - b
    half = 1.96 * d.std(ddof=1) / len(d) ** 0.5
    return float(d.mean() - half), float(d.mean() + half)


register(Check(
    name="paired_interval", reference=paired_interval, cases=_pair_cases,
    source="lib.checks_12:paired_interval lib.metrics:paired_bootstrap",
    praise="Right: whole rooms are drawn, the difference is taken inside a room, the mean is what varies.",
    hints=["Take the difference in every room FIRST. What is left is one array of N numbers.",
           "(a - b)[picks] has shape (R, N): one row of rooms for each draw. You want R means.",
           "means = (a - b)[picks].mean(1); np.percentile(means, [2.5, 97.5])"],
    wrongs=[
        Wrong("unpaired", _interval(lambda a, b, p: a[p].mean(1) - b[np.roll(p, 1, 0)].mean(1)),
              "you draw rooms for a and OTHER rooms for b. How hard a room is then stays in the interval, "
              "which gets far too wide: a and b must come from the same rooms, so use one set of picks for "
              "both."),
        Wrong("interval of the data", _interval(lambda a, b, p: a - b),
              "this is the interval of the DATA: where single rooms lie. It does not shrink with more "
              "rooms. You want the interval of the MEAN: percentiles of the R means of the draws."),
        Wrong("mean not taken", _interval(lambda a, b, p: (a - b)[p].ravel()),
              "the mean over the rooms of a draw is missing: percentiles of all drawn differences are the "
              "spread of the DATA, not of the mean. Use .mean(1) before the percentiles."),
        Wrong("90 per cent", lambda a, b, p: tuple(map(float, np.percentile((a - b)[p].mean(1), [5, 95]))),
              "5 and 95 leave out 5 % at EACH end: that is a 90 % interval. For 95 % take the percentiles "
              "2.5 and 97.5."),
        Wrong("shares for per cent", lambda a, b, p: tuple(
            map(float, np.percentile((a - b)[p].mean(1), [0.025, 0.975]))),
              "np.percentile counts in per cent: 2.5 and 97.5 (0.025 and 0.975 are for np.quantile)."),
        Wrong("normal formula on the draws", _normal_of_draws,
              "you take 1.96 standard deviations of the draws' means: sensible, but it is not the percentile "
              "interval, which may lean to one side. Take the percentiles."),
        Wrong("sign", _interval(lambda a, b, p: (b - a)[p].mean(1)),
              "you have b - a: the interval should be of a - b, so its sign is turned round."),
        Wrong("wrong axis", _interval(lambda a, b, p: (a - b)[p].mean(0)),
              "you average over the draws (axis 0), which gives N numbers near the mean: average over the "
              "rooms of each draw, axis 1."),
        Wrong("normal formula", _normal,
              "this is mean plus or minus 1.96 standard errors, a normal distribution's interval: "
              "sensible, but it does not use the draws. Take percentiles of the draws' means."),
    ]))
