"""Interactive parts and stored pictures of lesson 03: the schedules of noise, and the way from noise to a picture."""
import io
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from lib import diffusion, show, widgets

NAMES = {"linear": "linear (DDPM)", "scaled_linear": "scaled-linear (Stable Diffusion)", "cosine": "cosine"}
INK = {"linear": "#4c78a8", "scaled_linear": "#f58518", "cosine": "#54a24b"}
STEPS = 50                                       # of the stored pictures and of the widget
ROOM = 11                                        # which validation room the lesson's first pictures show


# ---------------------------------------------------------------- the schedules of noise

@lru_cache
def curves(schedule, n=1000):
    """beta, abar and log10 of the signal-to-noise ratio of a schedule, each (n,)."""
    betas = diffusion.make_betas(schedule, n)
    abar = diffusion.alphas_cumprod(betas)
    return {"beta": betas, "abar": abar, "log10 SNR": diffusion.snr(abar).log10()}


def noisy(picture, schedule, t, seed=0):
    """The picture (1, 3, H, W) in [0, 1] at noise level t of a schedule: x_t in about [-1, 1]; the same noise at every t."""
    abar = curves(schedule)["abar"][t]
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return abar.sqrt() * (picture * 2 - 1) + (1 - abar).sqrt() * noise


def check_level(schedule, t):
    """Raise a ValueError for a schedule or a timestep that is not there."""
    if schedule not in diffusion.SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}; known: {', '.join(diffusion.SCHEDULES)}.")
    if not isinstance(t, int) or not 0 <= t <= 999:
        raise ValueError(f"t is a whole number from 0 (almost clean) to 999 (almost noise), not {t!r}.")


def schedule_view(picture, schedule="linear", t=300):
    """Three curves of every schedule with a mark at t, and the picture at t. Returns a PIL picture.

    picture (1, 3, H, W) in [0, 1]; schedule: a name of diffusion.SCHEDULES; t: 0 to 999, else ValueError.
    """
    check_level(schedule, t)
    view = show.View(figsize=(11.6, 2.9), dpi=show.DPI, facecolor="white")
    for k, name in enumerate(curves(schedule)):
        axes = view.add_axes((0.045 + 0.248 * k, 0.17, 0.2, 0.71))
        for other in diffusion.SCHEDULES:
            chosen = other == schedule
            axes.plot(curves(other)[name].numpy(), color=INK[other], lw=2.4 if chosen else 1, alpha=1 if chosen else 0.45,
                      label=NAMES[other].split(" (")[0])
        axes.axvline(t, color="0.4", lw=1, ls=":")
        axes.plot([t], [float(curves(schedule)[name][t])], "o", color=INK[schedule], ms=7)
        axes.set_title({"beta": r"$\beta_t$", "abar": r"$\bar\alpha_t$"}.get(name, r"$\log_{10}$ SNR"), fontsize=10.5)
        axes.set_xlabel("timestep t", fontsize=9, labelpad=1)
        axes.tick_params(labelsize=8)
        axes.set_xticks([0, 500, 999])
        if name == "beta":
            axes.set_yscale("log")
        if name == "log10 SNR":
            axes.set_ylim(-6, 4.5)
    view.axes[0].legend(fontsize=7.5, loc="lower right", frameon=False)
    side = 0.75 * 2.9 / 11.6
    axes = view.add_axes((0.995 - side, 0.12, side, 0.75))
    axes.set_axis_off()
    axes.imshow(show.to_uint8((noisy(picture, schedule, t) + 1) / 2), interpolation="nearest")
    axes.set_title(f"x$_t$ at t = {t}", fontsize=10.5)
    return Image.open(io.BytesIO(view.png())).convert("RGB")


def schedule_text(schedule, t):
    """The line above the picture: what is left of the picture at t, in numbers."""
    check_level(schedule, t)
    c = curves(schedule)
    abar = float(c["abar"][t])
    return (f"{NAMES[schedule]}, t = {t}: beta = {float(c['beta'][t]):.2g}, alpha-bar = {abar:.3g}, SNR = "
            f"{abar / (1 - abar):.3g}; x_t is {abar ** 0.5:.3f} of the picture plus {(1 - abar) ** 0.5:.3f} of the noise")


def schedules(picture, schedule="linear", t=300):
    """A choice of schedule and a slider for t, beside the curves and the picture at t: a `panel`."""
    import ipywidgets
    choice = ipywidgets.Dropdown(options=[(NAMES[s], s) for s in diffusion.SCHEDULES], value=schedule,
                                 description="schedule", style={"description_width": "110px"})
    return widgets.panel(lambda schedule, t: (schedule_view(picture, schedule, t), schedule_text(schedule, t)),
                         "noise-schedules", schedule=choice, t=widgets.slider(t, 0, 999, 1, "timestep t"))


# ---------------------------------------------------------------- from noise to a picture

def predicted_x0(scheduler, x, output, t):
    """What the network believes the clean picture to be, from x_t and its prediction; clipped where the run clips."""
    a = diffusion.alpha_at(scheduler, int(t)).to(x.device)
    x0 = diffusion.split_prediction(scheduler, output, a, x)[0]
    return x0.clamp(-1, 1) if scheduler.config.clip_sample else x0


@torch.no_grad()
def walk(model, label=0, scale=1.0, steps=STEPS, seed=0, size=64):
    """One DDIM run of the teaching model: a list of (t, x_t, predicted x_0, predicted noise), the result last (t = -1)."""
    scheduler = diffusion.ddim(diffusion.teach_scheduler(), steps)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))
    seen = []

    def keep(i, t, x, output):
        seen.append((t, x.cpu(), predicted_x0(scheduler, x, output, t).cpu(), output.cpu()))

    device = next(model.parameters()).device
    x = diffusion.sample_loop(diffusion.guided(model, label, scale), scheduler, x.to(device), on_step=keep).cpu()
    return seen + [(-1, x, x, torch.zeros_like(x))]


def grey(x):
    """[-1, 1] -> [0, 1] to look at; noise beyond is cut off."""
    return ((x + 1) / 2).clamp(0, 1)


def walk_view(path, step):
    """Three pictures of one moment: x_t, the predicted x_0, the predicted noise. step: 0 ... steps (the result)."""
    if not isinstance(step, int) or not 0 <= step < len(path):
        raise ValueError(f"step is a whole number from 0 (noise) to {len(path) - 1} (the result), not {step!r}.")
    t, x, x0, output = path[step]
    level = f"t = {t}" if t >= 0 else "the result"
    return show.tile([grey(x), grey(x0), grey(output / 2)],
                     [f"x_t, {level}", "predicted x_0: the picture\nthe network has in mind", "predicted noise, halved\n(grey = 0)"],
                     columns=3, scale=max(1, 256 // x.shape[-1]))


def walk_text(path, step):
    """The line above: how far the run is, and how much the predicted picture still changes."""
    t, _, x0, _ = path[step]
    change = (x0 - path[-1][2]).square().mean().sqrt() / 2
    return f"step {step} of {len(path) - 1}: the predicted x_0 is {float(change):.3f} (RMSE) away from the result"


def denoising(model, seed=0, steps=STEPS, size=64):
    """Choose a kind and a guidance scale, and slide through the run: a `panel`. Each run is computed once and kept."""
    import ipywidgets
    kinds = [(kind, diffusion.teach_label(kind)) for kind in ("anything", *diffusion.TEACH_KINDS)]
    wide = {"description_width": "110px"}
    kind = ipywidgets.Dropdown(options=kinds, value=diffusion.teach_label("chair"), description="label", style=wide)
    scale = ipywidgets.Dropdown(options=[1.0, 2.0, 4.0, 8.0], value=2.0, description="guidance", style=wide)
    runs = lru_cache(maxsize=32)(lambda kind, scale: walk(model, kind, scale, steps, seed, size))

    def draw(label, guidance, step):
        path = runs(label, guidance)
        return walk_view(path, step), walk_text(path, step)

    return widgets.panel(draw, "denoising-walk", label=kind, guidance=scale,
                         step=widgets.slider(steps // 2, 0, steps, 1, "step"))


# ---------------------------------------------------------------- stored pictures

def example_room(size=64):
    """The simple room of the lesson's first pictures, (1, 3, size, size): a validation seed, so no model has seen it."""
    return diffusion.teach_pictures(1, size, "val", start=ROOM)[0]


def schedule_strip(picture, ts=(0, 100, 250, 500, 750, 999)):
    """One row of noisy pictures for each schedule. Returns (pictures, labels) for show.sheet."""
    images, labels = [], []
    for schedule in diffusion.SCHEDULES:
        for t in ts:
            images.append(grey(noisy(picture, schedule, t)))
            labels.append(f"{schedule}, t = {t}\nalpha-bar {float(curves(schedule)['abar'][t]):.4f}")
    return images, labels


def walk_strip(path, columns=6):
    """x_t above the predicted x_0, at evenly spaced moments of a run. Returns (pictures, labels)."""
    moments = [round(k * (len(path) - 1) / (columns - 1)) for k in range(columns)]
    at = [path[m] for m in moments]
    level = [f"t = {t}" if t >= 0 else "the result" for t, *_ in at]
    return ([grey(x) for _, x, _, _ in at] + [grey(x0) for _, _, x0, _ in at],
            [f"x_t, {name}" for name in level] + [f"predicted x_0, {name}" for name in level[:-1]] + ["the result"])


@torch.no_grad()
def samples(model, scale=2.0, steps=STEPS, seed=0, each=2, size=64, step=diffusion.ddim_step):
    """`each` pictures of every kind, (6 each, 3, size, size) in [0, 1]; the noise depends on seed, each and size only."""
    labels = torch.arange(1, 1 + len(diffusion.TEACH_KINDS)).repeat(each)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, size, size, generator=g).to(next(model.parameters()).device)
    scheduler = diffusion.ddim(diffusion.teach_scheduler(), steps)
    return grey(diffusion.sample_loop(diffusion.guided(model, labels, scale), scheduler, x, step, g)).cpu()


def make_figures(folder):
    """Draw the stored pictures of lesson 03 (needs the teaching model). Returns their paths."""
    folder, model = Path(folder), diffusion.load_teach()
    kinds = [f"label: {k}" for k in diffusion.TEACH_KINDS]
    made = list(samples(model, each=1).split(1))            # few enough to keep all their colours below the size limit
    return [show.sheet(made, kinds, folder / "03_samples.png", columns=3, scale=4),
            show.sheet(*schedule_strip(example_room()), folder / "03_schedules.png", columns=6, scale=3),
            show.sheet(*walk_strip(walk(model, diffusion.teach_label("chair"), 2.0), 5),
                       folder / "03_walk.png", columns=5, scale=4)]
