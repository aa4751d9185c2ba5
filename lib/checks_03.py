"""Exercises of lesson 03: q_sample, the posterior, the DDPM step, the DDIM step, and classifier-free guidance."""
import torch

from lib.checks import Check, Wrong, register


def _rand(g, *shape):
    return torch.randn(*shape, generator=g)


def _betas(g, n=60):
    """A schedule that no library has: rising, with every step a little different."""
    return torch.linspace(0.01, 0.09, n) * (0.9 + 0.2 * torch.rand(n, generator=g))


# ---------------------------------------------------------------- 1. the forward process in one jump

def q_sample(x0, t, noise, betas):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise, with abar_t = product of (1 - beta_i), i = 0 ... t (DDPM eq. 4)."""
    abar = (1 - betas).cumprod(dim=0)[t]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def _q_sample_cases(g):
    return [(_rand(g, 2, 3, 4, 5), t, _rand(g, 2, 3, 4, 5), _betas(g)) for t in (0, 1, 17, 55)]


def _jump(share, signal=torch.sqrt, spread=lambda a: (1 - a).sqrt()):
    """A mistaken q_sample: `share(betas, t)` in the place of abar, and other coefficients."""
    return lambda x0, t, noise, betas: (
        signal(share(betas, t)) * x0 + spread(share(betas, t)) * noise)


_abar = lambda betas, t: (1 - betas).cumprod(0)[t]

register(Check(
    name="q_sample", reference=q_sample, cases=_q_sample_cases, source="lib.checks_03:q_sample lib.diffusion:q_sample",
    praise="Right: any noise level in one jump, and the variances abar and 1 - abar add up to 1.",
    hints=["How much of x_0's variance is left after t + 1 steps, if step i keeps the share 1 - beta_i?",
           "abar_t is a product: (1 - betas).cumprod(dim=0)[t]. Its first factor belongs to timestep 0.",
           "Variances are abar and 1 - abar; you multiply pictures by standard deviations, so take square roots."],
    wrongs=[
        Wrong("alpha for alpha-bar", _jump(lambda betas, t: (1 - betas)[t]),
              "you use alpha_t = 1 - beta_t, the share that ONE step keeps. A jump from x_0 needs alpha-bar, the "
              "product over all steps from 0 to t."),
        Wrong("sqrt forgotten", _jump(_abar, lambda a: a, lambda a: 1 - a),
              "abar and 1 - abar are variances; a picture is multiplied by standard deviations. Take the square root "
              "of both."),
        Wrong("sqrt forgotten on the noise", _jump(_abar, torch.sqrt, lambda a: 1 - a),
              "the noise is multiplied by 1 - abar, which is its variance: the square root is missing there."),
        Wrong("shares of one", _jump(_abar, torch.sqrt, lambda a: 1 - a.sqrt()),
              "your two weights add up to 1, as in a cross-fade. It is the variances that add up to 1: the noise gets "
              "sqrt(1 - abar), not 1 - sqrt(abar)."),
        Wrong("off by one", _jump(lambda betas, t: (1 - betas)[:t].prod()),
              "you are one step short: [:t] ends at t - 1. Timestep 0 has already had one step of noise, so abar_t "
              "includes beta_t."),
        Wrong("first beta left out", _jump(lambda betas, t: (1 - betas)[1:t + 1].prod()),
              "your product begins at index 1, so beta_0 is left out. The papers call the first step 1, code calls it 0: "
              "abar_t has the t + 1 factors (1 - betas)[:t + 1]."),
        Wrong("one index low", _jump(lambda betas, t: (1 - betas).cumprod(0)[t - 1]),
              "you take abar[t - 1], one step short; and at t = 0 the index -1 is the LAST entry, almost pure noise. "
              "abar[t] is the level of timestep t."),
        Wrong("one step too far", _jump(lambda betas, t: (1 - betas).cumprod(0)[t + 1]),
              "you take abar[t + 1], one step of noise too many: abar[t] already includes the step of timestep t."),
        Wrong("sum of the betas", _jump(lambda betas, t: 1 - betas[:t + 1].sum()),
              "you subtract the sum of the betas. Each step keeps a share of what is LEFT, so the shares 1 - beta are "
              "multiplied."),
        Wrong("not shrunk", _jump(_abar, torch.ones_like),
              "x_0 is not shrunk: it is multiplied by sqrt(abar), or else the numbers would grow with every step."),
        Wrong("swapped", _jump(_abar, lambda a: (1 - a).sqrt(), torch.sqrt),
              "signal and noise are swapped: at small t the picture should be almost clean, so sqrt(abar) belongs to "
              "x_0."),
        Wrong("product of betas", _jump(lambda betas, t: betas.cumprod(0)[t]),
              "you multiply the betas themselves: abar is the product of what is KEPT, 1 - beta."),
    ]))


# ---------------------------------------------------------------- 2. the way back, if x_0 were known

def posterior(x0, x_t, t, betas):
    """q(x_{t-1} | x_t, x_0) = N(mean, variance I), for t >= 1. (DDPM eq. 7.)"""
    alpha, abar = 1 - betas, (1 - betas).cumprod(dim=0)
    mean = (abar[t - 1].sqrt() * betas[t] * x0 + alpha[t].sqrt() * (1 - abar[t - 1]) * x_t) / (1 - abar[t])
    return mean, (1 - abar[t - 1]) / (1 - abar[t]) * betas[t]


def _in_numbers(x0, x_t, t, betas):
    """`posterior` with a plain number for the variance: then a number and a tensor of one value are both right."""
    mean, variance = posterior(x0, x_t, t, betas)
    return mean, float(variance)


def _posterior_cases(g):
    return [(_rand(g, 2, 3, 4, 5), _rand(g, 2, 3, 4, 5), t, _betas(g)) for t in (1, 12, 50)]


def _back(mean=None, variance=None, shift=0, late=0):
    """A mistaken posterior: another mean or variance, both as functions of (x0, x_t, beta, abar, abar before).

    shift: how much too high the index of abar before is; late: how much too low all indices are.
    """
    def answer(x0, x_t, t, betas):
        abar, t = (1 - betas).cumprod(0), t - late
        given = x0, x_t, betas[t], abar[t], abar[t - 1 + shift]
        return (mean or _right_mean)(*given), float((variance or _right_variance)(*given))
    return answer


_right_mean = lambda x0, x, b, a, p: (p.sqrt() * b * x0 + (1 - b).sqrt() * (1 - p) * x) / (1 - a)
_right_variance = lambda x0, x, b, a, p: (1 - p) / (1 - a) * b

register(Check(
    name="posterior", reference=_in_numbers, cases=_posterior_cases,
    source="lib.checks_03:posterior lib.diffusion:posterior",
    praise="Right: a weighted mean of where we are and where we come from, and a variance smaller than beta.",
    hints=["Two values to return: the mean (a picture) and the variance (one number). Compute alpha_t = 1 - beta_t and "
           "abar first; abar_{t-1} is abar[t - 1].",
           "variance = (1 - abar[t-1]) / (1 - abar[t]) * betas[t]. The mean has x_0 and x_t over the same 1 - abar[t].",
           "x_0 is multiplied by sqrt(abar[t-1]) * betas[t], x_t by sqrt(alpha[t]) * (1 - abar[t-1])."],
    wrongs=[
        Wrong("beta for the variance", _back(variance=lambda x0, x, b, a, p: b),
              "the mean is right; the variance is beta_t, that of the step FORWARD. Knowing x_0 makes the way back "
              "more certain: multiply by (1 - abar[t-1]) / (1 - abar[t])."),
        Wrong("off by one", _back(shift=1),
              "you use abar[t] where abar[t - 1] belongs, so the factor (1 - abar[t-1]) / (1 - abar[t]) has become 1."),
        Wrong("counted from 1", _back(late=1),
              "all your indices are one too low: you count the steps from 1, as the papers do. In code timestep t has "
              "betas[t] and abar[t], and the level before it has abar[t - 1]."),
        Wrong("not divided", _back(lambda x0, x, b, a, p: (1 - a) * _right_mean(x0, x, b, a, p)),
              "the mean is not divided by 1 - abar[t]: without it the two weights are far too small."),
        Wrong("standard deviation", _back(variance=lambda *v: _right_variance(*v).sqrt()),
              "the second value is the standard deviation; the task asks for the variance (do not take the root)."),
        Wrong("swapped", _back(lambda x0, x, b, a, p: _right_mean(x, x0, b, a, p)),
              "x_0 and x_t have changed places. Close to the end (t small) the mean should be almost x_0: its weight is "
              "sqrt(abar[t-1]) beta_t / (1 - abar[t])."),
        Wrong("alpha-bar for alpha", _back(lambda x0, x, b, a, p: (p.sqrt() * b * x0 + a.sqrt() * (1 - p) * x) / (1 - a)),
              "x_t is multiplied by sqrt(abar_t); it should be sqrt(alpha_t) = sqrt(1 - beta_t), the ONE step between "
              "t - 1 and t."),
        Wrong("sqrt forgotten", _back(lambda x0, x, b, a, p: (p * b * x0 + (1 - b) * (1 - p) * x) / (1 - a)),
              "the square roots are missing: x_0 gets sqrt(abar[t-1]), x_t gets sqrt(alpha[t])."),
    ]))


# ---------------------------------------------------------------- 3. one step of DDPM sampling

def ddpm_step(eps, t, x, noise, betas):
    """x_t -> x_{t-1} = (x - beta / sqrt(1 - abar) eps) / sqrt(alpha) + sqrt(beta) noise; no noise at t = 0 (Algorithm 2)."""
    alpha, abar = 1 - betas, (1 - betas).cumprod(dim=0)
    mean = (x - betas[t] / (1 - abar[t]).sqrt() * eps) / alpha[t].sqrt()
    return mean if t == 0 else mean + betas[t].sqrt() * noise


def _ddpm_cases(g):
    return [(_rand(g, 2, 3, 4, 5), t, _rand(g, 2, 3, 4, 5), _rand(g, 2, 3, 4, 5), _betas(g)) for t in (0, 1, 9, 48)]


def _down(mean=lambda eps, x, b, a: (x - b / (1 - a).sqrt() * eps) / (1 - b).sqrt(), spread=torch.sqrt, quiet=(0,)):
    """A mistaken DDPM step; no noise is added at the timesteps of `quiet`."""
    def answer(eps, t, x, noise, betas):
        a = (1 - betas).cumprod(0)[t]
        return mean(eps, x, betas[t], a) + spread(betas[t]) * noise * (t not in quiet)
    return answer


def _surer(eps, t, x, noise, betas):
    """The DDPM step with the variance of the posterior."""
    if t == 0:
        return ddpm_step(eps, t, x, noise, betas)
    _, variance = posterior(eps, x, t, betas)
    return ddpm_step(eps, t, x, 0 * noise, betas) + variance.sqrt() * noise


register(Check(
    name="ddpm_step", reference=ddpm_step, cases=_ddpm_cases, source="lib.checks_03:ddpm_step lib.diffusion:ddpm_step",
    praise="Right: this line, a thousand times over, is Algorithm 2 of the DDPM paper.",
    hints=["First the mean: take the predicted noise away from x in the right amount, then undo the shrinking of one "
           "step by dividing by sqrt(alpha_t).",
           "The right amount is beta_t / sqrt(1 - abar_t). Then add sqrt(beta_t) * noise.",
           "At t = 0 there is no further level to be at: return the mean alone."],
    wrongs=[
        Wrong("noise at the last step", _down(quiet=()),
              "you add noise in the last step (t = 0) too. Nothing comes after it that could take that noise away "
              "again: return the mean there."),
        Wrong("quiet one step early", _down(quiet=(0, 1)),
              "you add no noise at t = 1. The papers' last step has the number 1; in code the last step is t = 0, and "
              "only that one is without noise."),
        Wrong("posterior variance", _surer,
              "your noise has the variance of the posterior, beta (1 - abar[t-1]) / (1 - abar[t]). That is DDPM's other "
              "choice, the one of section 9; here sigma^2 = beta is asked for."),
        Wrong("variance for standard deviation", _down(spread=lambda b: b),
              "the noise is multiplied by beta, the variance: it should be its square root."),
        Wrong("adds the noise", _down(lambda eps, x, b, a: (x + b / (1 - a).sqrt() * eps) / (1 - b).sqrt()),
              "you ADD the predicted noise to x; we walk towards the picture, so it is taken away."),
        Wrong("alpha-bar for alpha", _down(lambda eps, x, b, a: (x - b / (1 - a).sqrt() * eps) / a.sqrt()),
              "you divide by sqrt(abar_t), which undoes ALL the steps at once; one step back is a division by "
              "sqrt(alpha_t)."),
        Wrong("alpha for alpha-bar", _down(lambda eps, x, b, a: (x - b / b.sqrt() * eps) / (1 - b).sqrt()),
              "under the fraction stands sqrt(1 - alpha_t); x_t carries the noise of all steps so far, so it is "
              "sqrt(1 - abar_t)."),
        Wrong("sqrt forgotten", _down(lambda eps, x, b, a: (x - b / (1 - a) * eps) / (1 - b).sqrt()),
              "eps is divided by 1 - abar_t: the square root under the fraction is missing."),
        Wrong("not divided", _down(lambda eps, x, b, a: x - b / (1 - a).sqrt() * eps),
              "the division by sqrt(alpha_t) is missing: it undoes the shrinking of the step forward."),
        Wrong("fresh noise divided", _down(spread=lambda b: (b / (1 - b)).sqrt()),
              "the fresh noise is divided by sqrt(alpha_t) as well. Add it after the division, to the mean."),
        Wrong("all noise at once", _down(lambda eps, x, b, a: (x - (1 - a).sqrt() * eps) / (1 - b).sqrt()),
              "you take all the predicted noise away in one step. One step takes beta_t / sqrt(1 - abar_t) of it."),
        Wrong("no noise", _down(spread=lambda b: 0 * b),
              "no noise is added at all: the mean alone, step after step, runs into an average, too smooth picture. "
              "(The deterministic way down is DDIM, with another formula.)"),
    ]))


# ---------------------------------------------------------------- 4. one step of DDIM

def ddim_step(eps, x, abar, abar_prev):
    """x_t -> x at the level abar_prev: the predicted x_0 with the predicted noise put back (DDIM eq. 12, eta = 0)."""
    x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
    return abar_prev.sqrt() * x0 + (1 - abar_prev).sqrt() * eps


def _ddim_cases(g):
    return [(_rand(g, 2, 3, 4, 5), _rand(g, 2, 3, 4, 5), torch.tensor(a), torch.tensor(p))
            for a, p in ((0.1, 0.35), (0.6, 0.8), (0.97, 1.0))]


def _jump_down(x0=lambda eps, x, a: (x - (1 - a).sqrt() * eps) / a.sqrt(),
               again=lambda x0, eps, a, p: p.sqrt() * x0 + (1 - p).sqrt() * eps):
    return lambda eps, x, abar, abar_prev: again(x0(eps, x, abar), eps, abar, abar_prev)


register(Check(
    name="ddim_step", reference=ddim_step, cases=_ddim_cases, source="lib.checks_03:ddim_step lib.diffusion:ddim_step",
    praise="Right: guess the picture, put the same noise back at the next lower level. No dice, so few steps are enough.",
    hints=["Solve x = sqrt(abar) x_0 + sqrt(1 - abar) eps for x_0.",
           "Now use the same forward formula again, with that x_0 and the same eps, at the level abar_prev.",
           "x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()"],
    wrongs=[
        Wrong("not moved", _jump_down(again=lambda x0, eps, a, p: a.sqrt() * x0 + (1 - a).sqrt() * eps),
              "you return x itself: the second line should use abar_prev, the level we go to."),
        Wrong("stops at x_0", _jump_down(again=lambda x0, eps, a, p: x0),
              "that is the predicted x_0, the end of the way in one leap. Put the noise back, at the level abar_prev."),
        Wrong("not divided", _jump_down(lambda eps, x, a: x - (1 - a).sqrt() * eps),
              "x minus its noise is sqrt(abar) x_0: the division by sqrt(abar) is missing."),
        Wrong("sqrt forgotten", _jump_down(lambda eps, x, a: (x - (1 - a) * eps) / a,
                                           lambda x0, eps, a, p: p * x0 + (1 - p) * eps),
              "abar and 1 - abar are variances: take square roots in both lines."),
        Wrong("noise of the old level", _jump_down(again=lambda x0, eps, a, p: p.sqrt() * x0 + (1 - a).sqrt() * eps),
              "x_0 is at the new level, but the noise is put back as strong as before: sqrt(1 - abar_prev)."),
        Wrong("no noise put back", _jump_down(again=lambda x0, eps, a, p: p.sqrt() * x0),
              "x_0 is at the new level, but the noise is gone: put the same eps back, sqrt(1 - abar_prev) of it."),
        Wrong("clipped", _jump_down(lambda eps, x, a: ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)),
              "you clip the predicted x_0 to [-1, 1]. For pictures that helps (section 9 does it), but a latent has no "
              "such limits, and here the step without clipping is asked for."),
        Wrong("upwards", lambda eps, x, abar, abar_prev: ddim_step(eps, x, abar_prev, abar),
              "abar and abar_prev are swapped: this walks UP, towards the noise. (It is DDIM inversion, lesson 09.)"),
    ]))


# ---------------------------------------------------------------- 5. classifier-free guidance

def guide(uncond, cond, scale):
    """uncond + scale (cond - uncond): the prediction without a label, pushed towards the one with it (Ho and Salimans)."""
    return uncond + scale * (cond - uncond)


def _guide_cases(g):
    return [(_rand(g, 2, 3, 4, 5), _rand(g, 2, 3, 4, 5), scale) for scale in (0.0, 1.0, 3.0, 7.5)]


register(Check(
    name="guide", reference=guide, cases=_guide_cases, source="lib.checks_03:guide lib.diffusion:cfg",
    praise="Right: scale 0 ignores the label, 1 is the plain condition, and above 1 it exaggerates.",
    hints=["Which scale should give `uncond`, and which should give `cond`? Draw the straight line through both.",
           "The direction 'more like the label' is cond - uncond.",
           "Start at uncond and walk scale times that direction."],
    wrongs=[
        Wrong("sign", lambda uncond, cond, scale: uncond + scale * (uncond - cond),
              "the sign is wrong: uncond - cond points AWAY from the label (that is what a negative prompt is for)."),
        Wrong("offset", lambda uncond, cond, scale: cond + scale * (cond - uncond),
              "your scale is one too large: you start at cond. Here scale 1 must give exactly cond, so start at uncond. "
              "(Some papers write 1 + w; diffusers and this course do not.)"),
        Wrong("swapped", lambda uncond, cond, scale: cond + scale * (uncond - cond),
              "uncond and cond have changed places: scale 0 should ignore the label, and yours obeys it."),
        Wrong("only the condition", lambda uncond, cond, scale: scale * cond,
              "you scale the whole prediction, so it is no longer unit noise: scale only the difference cond - uncond."),
        Wrong("sum", lambda uncond, cond, scale: uncond + scale * cond,
              "you add the whole condition; only the difference cond - uncond belongs there."),
        Wrong("only the difference", lambda uncond, cond, scale: scale * (cond - uncond),
              "the difference alone is a direction, not a prediction: add it to uncond."),
    ]))
