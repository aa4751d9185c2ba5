"""The edit from end to end on small random pipelines: every mechanism, restored pixels, clean traces, clear
errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lib import attention, deglad, depth, diffusion, featglac, latents, light
from lib.depth import DepthMap

STEPS = 5


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scene():
    """A smooth background, a grey square object, and something nearer that covers its lower left corner."""
    ramp = torch.linspace(0.2, 0.8, 128)
    background = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), torch.full((128, 128), 0.5)]
    )[None]
    foreground = torch.zeros(1, 4, 128, 128)
    foreground[:, :, 40:90, 40:80] = torch.tensor([0.9, 0.1, 0.1, 1.0]).view(1, 4, 1, 1)
    occluder = torch.zeros(1, 1, 128, 128)
    occluder[..., 70:, :60] = 1
    return background, foreground, occluder


# One fixed base, so that a test says all that it depends on; the shipped defaults are tuned to the weights.
BASE = {
    "steps": STEPS, "guidance_scale": 1.0, "noise_level": 0.7, "start": "composite", "free": 0.3,
    "inner_steps": 3,
    "step_size": 0.05, "decode": "residual", "smooth": 0.02, "samples": 1,
}


class Elsewhere(torch.Tensor):
    """A tensor that says that it lies on a GPU."""

    device = torch.device("cuda", 0)

    def __new__(cls, x):
        return x.as_subclass(cls)


def edit(pipe, scene, mechanism="inject", **options):
    if mechanism == "geometry":  # needs metres: a floor that leads away, the object three metres from the camera
        metres = torch.linspace(9, 1, 128).view(1, 1, 128, 1).expand(1, 1, 128, 128)
        options["space"] = light.Space(
            scene[0], metres, metres, torch.full_like(metres, 3.0), scene[1][:, 3:], colour=scene[1][:, :3]
        )
    return featglac.compose_layers(
        pipe, *scene, "a red box", mechanism, **{**BASE, "generator": gen(), **options}
    )


# ---------------------------------------------------------------- whole edits
@pytest.mark.parametrize("mechanism", featglac.MECHANISMS)
def test_every_mechanism_twice_and_after_an_exception(tiny_pipe, scene, mechanism, monkeypatch):
    unet, noise = tiny_pipe.unet, torch.randn(1, 4, 16, 16, generator=gen(1))
    before, processors = diffusion.sample(tiny_pipe, "a box", 3, latents=noise), dict(unet.attn_processors)
    first = edit(tiny_pipe, scene, mechanism)
    total, real = [], unet.conv_out.forward
    with monkeypatch.context() as patch:
        patch.setattr(unet.conv_out, "forward", lambda x: total.append(1) or real(x))
        second = edit(tiny_pipe, scene, mechanism)
    assert torch.equal(first.image, second.image) and first.passes == second.passes
    assert first.image.shape == (1, 3, 128, 128) and torch.isfinite(first.image).all()
    assert (
        0 <= first.image.min()
        and first.image.max() <= 1
        and first.seconds > 0
        and first.mechanism == mechanism
    )

    for stop_at in {1, len(total)} if total else ():  # the first call, and the last on the way down
        calls = []
        broken = lambda x: calls.append(1) or (1 / 0 if len(calls) == stop_at else real(x))
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(unet.conv_out, "forward", broken)
            edit(tiny_pipe, scene, mechanism)
    assert all(processors[n] is p for n, p in unet.attn_processors.items())
    assert not unet._forward_pre_hooks and not unet._forward_hooks
    assert not any(b._forward_hooks for b in unet.up_blocks) and not any(
        p.requires_grad for p in unet.parameters()
    )
    assert torch.equal(diffusion.sample(tiny_pipe, "a box", 3, latents=noise), before)  # bit for bit
    if first.passes:
        assert torch.equal(edit(tiny_pipe, scene, mechanism).image, first.image)


def test_inject_costs_at_most_twice_classifier_free_sampling(tiny_pipe, scene):
    for options in ({}, {"noise_level": 1.0}, {"noise_level": 1.0, "guidance_scale": 3.0}):
        result = edit(tiny_pipe, scene, steps=10, **options)
        climb = round(result.settings["noise_level"] * 10)
        assert result.passes == climb * (2 + (1 if result.settings["guidance_scale"] == 1 else 2))
        assert result.passes <= 2.0 * (2 * 10) and result.backward == 0 and result.bank_bytes > 0
    shipped = featglac.compose_layers(tiny_pipe, *scene, "a red box", "inject", steps=10, generator=gen())
    assert 0 < shipped.passes <= 2.0 * (2 * 10)


def test_guide_counts_its_backward_passes(tiny_pipe, scene):
    result = edit(tiny_pipe, scene, "guide", steps=10, noise_level=1.0, inner_steps=2, guide_window=(0, 0.5))
    assert result.backward == 5 * 2
    assert result.passes == 10 * 2 + 10 + 5 * 2 * (1 + 2)  # inversion of 2 layers, way down, inner steps


@pytest.mark.parametrize("start", featglac.CHOICES["start"])
@pytest.mark.parametrize("sources", featglac.CHOICES["sources"])
def test_starts_and_sources(tiny_pipe, scene, start, sources):
    results = [
        edit(tiny_pipe, scene, start=start, sources=sources, call=call).image
        for call in ("recorded", "batched")
    ]
    assert torch.isfinite(results[0]).all()
    assert (results[0] - edit(tiny_pipe, scene).image).abs().max() > 1e-4 or (start, sources) == (
        "composite",
        "inverted",
    )
    if (
        sources == "noised"
    ):  # with layers noised to the level itself, one batched call is the same computation
        assert torch.allclose(results[0], results[1], atol=1e-3)


@pytest.mark.parametrize(
    "option",
    [
        dict(mode="query"),
        dict(mode="concat"),
        dict(parts="k"),
        dict(decode="plain"),
        dict(decode="blend"),
        dict(decode="relight"),
        dict(layers="up"),
        dict(window=(0.0, 0.6)),
        dict(anchor=0.0),
        dict(guidance_scale=3.0),
        dict(strength=1.0),
        dict(free=1.0),
        dict(ring=0.2),
        dict(noise_level=0.4),
        dict(refine=1),
        dict(background_prompt="a ball"),
    ],
)
def test_every_option_matters(tiny_pipe, scene, option):
    plain = edit(tiny_pipe, scene, noise_level=0.8)
    assert (edit(tiny_pipe, scene, **{"noise_level": 0.8, **option}).image - plain.image).abs().max() > 1e-4


def test_the_masks_of_the_layers_share_no_weight(tiny_pipe, scene):
    job = featglac._Job(
        tiny_pipe, *scene, "a red box", featglac.Settings(strength=1.0, keep=1.0, free=0.0, ring=0.5)
    )
    masks = featglac.layer_masks(job)
    assert masks.shape == (2, 1, 128, 128) and masks.min() >= 0 and masks.sum(0).max() <= 1
    assert masks[0, 0, 60, 70] == 0 and masks[1, 0, 60, 70] == 1  # on the visible object
    assert masks[0, 0, 5, 5] == 1 and masks[1, 0, 5, 5] == 0  # far away
    assert masks[:, 0, 60, 85].sum() == 0  # beside it: the generation's own
    assert masks[1, 0, 80, 50] == 0  # hidden by the occluder


def test_outside_the_ring_the_edit_is_the_background(tiny_pipe, scene):
    result = edit(tiny_pipe, scene, ring=0.0, restore="outside")
    outside = result.layers["ring"] == 0
    assert outside.float().mean() > 0.5
    assert torch.equal(result.image[outside.expand(-1, 3, -1, -1)], scene[0][outside.expand(-1, 3, -1, -1)])
    # anchored latents: outside the ring the final latent is E(background) itself
    far = featglac.F.adaptive_max_pool2d(result.layers["ring"], (16, 16)) == 0
    gap = (result.z - latents.encode(tiny_pipe, scene[0])).abs()
    assert gap[far.expand(-1, 4, -1, -1)].max() < 1e-5 and gap.max() > 1e-3


def test_residual_decoding_changes_nothing_where_the_latent_did_not_change(tiny_pipe, scene):
    job = featglac._Job(tiny_pipe, *scene, "a", featglac.Settings(decode="residual"))
    same = featglac._decode(job, job.latent("composite"))
    assert torch.allclose(same, job.composite, atol=1e-5)
    job.set = featglac.Settings(decode="plain")
    both = latents.encode(tiny_pipe, torch.cat([job.background, job.composite]))  # alone, its last bits differ
    assert torch.equal(featglac._decode(job, job.latent("composite")), latents.decode(tiny_pipe, both[1:]))


def test_only_the_occluder_over_the_object_is_restored(tiny_pipe, scene):
    background, foreground, occluder = scene
    image = edit(tiny_pipe, scene).image
    over_object = (occluder * foreground[:, 3:]).expand(-1, 3, -1, -1) > 0
    assert torch.equal(image[over_object], background[over_object])
    rest = (occluder * (featglac.F.max_pool2d(foreground[:, 3:], 3, 1, 1) == 0)).expand(-1, 3, -1, -1) > 0
    assert (image - background).abs()[rest].max() > 1e-3  # a shadow may fall on the near floor


def test_nothing_to_blend_gives_plain_sampling(tiny_pipe, scene):
    """All strengths 0, no anchor, from the inverted composite: the way down is ordinary DDIM sampling."""
    result = edit(tiny_pipe, scene, strength=0.0, keep=0.0, free=0.0, anchor=0.0, noise_level=1.0)
    z = latents.encode(tiny_pipe, result.composite)
    path = diffusion.invert(tiny_pipe, z, "a red box", STEPS)
    assert torch.allclose(
        result.z, diffusion.sample(tiny_pipe, "a red box", STEPS, 1.0, latents=path.noise), atol=1e-3
    )


def test_half_precision_banks_and_averaging(tiny_pipe, scene):
    full, half = edit(tiny_pipe, scene), edit(tiny_pipe, scene, bank_dtype=torch.float16, bank_device="cpu")
    assert half.bank_bytes * 2 == full.bank_bytes and torch.allclose(full.image, half.image, atol=0.02)
    mean = edit(tiny_pipe, scene, start="noised", samples=2)
    assert mean.passes == edit(tiny_pipe, scene, start="noised").passes + mean.passes // 4


# ---------------------------------------------------------------- guide
def test_feature_loss_by_hand():
    now, wanted = torch.randn(1, 6, 8, 8, generator=gen()), torch.randn(2, 6, 8, 8, generator=gen(1))
    masks = torch.zeros(2, 1, 64, 64)
    masks[0, ..., :32], masks[1, ..., 32:] = 1, 1
    left, right = (now - wanted[:1])[..., :4].abs().mean(), (now - wanted[1:])[..., 4:].abs().mean()
    loss = featglac.feature_loss([now, now], [wanted, wanted], masks, (0.0, 3.0))
    assert torch.allclose(loss, 3 * (left + right), atol=1e-5)
    assert featglac.feature_loss([now], [now.expand(2, -1, -1, -1)], masks, (1.0,)) == 0


def test_guiding_lowers_the_feature_loss(tiny_pipe, scene, monkeypatch):
    seen = []
    real = featglac.feature_loss
    monkeypatch.setattr(featglac, "feature_loss", lambda *a: seen.append(real(*a).detach()) or real(*a))
    edit(tiny_pipe, scene, "guide", inner_steps=6, start="noise", guide_window=(0, 0.2), step_size=0.03)
    assert len(seen) == 6 and seen[-1] < 0.97 * seen[0]
    plain = edit(tiny_pipe, scene, "guide", normalise=False, step_size=0.01)
    assert torch.isfinite(plain.image).all()


def test_guide_blocks_of_the_tiny_unet_and_of_stable_diffusion_15(tiny_pipe):
    from diffusers import UNet2DConditionModel

    assert featglac.guide_blocks(tiny_pipe.unet) == ["up_blocks.0", "up_blocks.1", "up_blocks.2"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        with attention.record_features(unet, featglac.guide_blocks(unet), dtype=torch.float16) as heard:
            unet(torch.zeros(1, 4, 64, 64), 501, torch.zeros(1, 77, 768))
        outs = [heard.at(501, n)["out"] for n in featglac.guide_blocks(unet)]
    shapes = [tuple(x.shape) for x in outs]
    assert {x.dtype for x in outs} == {torch.float16} and heard.bytes == 2 * sum(x.numel() for x in outs)
    assert featglac.guide_blocks(unet) == ["up_blocks.1", "up_blocks.2", "up_blocks.3"]
    assert shapes == [(1, 1280, 32, 32), (1, 640, 64, 64), (1, 320, 64, 64)]


def test_recording_and_injecting_on_stable_diffusion_15s_shape():
    """Every attn1 of SD 1.5's own config takes the tap, at its own resolution, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        with attention.record(unet, dtype=torch.float16) as bank:
            unet(torch.zeros(2, 4, 64, 64), 501, torch.zeros(2, 77, 768))
        masks = torch.zeros(2, 1, 512, 512)
        pooled = {
            f: attention.pool_mask(masks, (int(64 * f), int(64 * f))).shape[1] for f in (1, 0.5, 0.25, 0.125)
        }
    tokens = {x.name: bank.at(501, x.name)["k"].shape[1] for x in attention.layers(unet)}
    assert all(tokens[x.name] == pooled[x.fraction] for x in attention.layers(unet))
    assert abs(bank.bytes / 2 / 2 - 23e6) < 2e6  # about 23 M values a step and picture (DESIGN 7)


# ---------------------------------------------------------------- the two tasks
def ramp_depth():
    values = torch.linspace(1, 0, 128).view(1, 1, 128, 1).expand(1, 1, 128, 128).contiguous()
    return DepthMap(values, "metric", 1.0, 5.0)  # the floor: far at the top, near at the bottom


def test_a_cutout_with_its_depth_has_the_shape_that_the_depth_says():
    """Half a ball and a box front of one outline: flat without depth, told apart with it, moved to where they stand."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    inside = (x**2 + y**2 < 0.5)[None, None].float()
    cutout = torch.cat([torch.full((1, 3, 64, 64), 0.5), inside], 1)
    room = depth.from_metric(torch.full((1, 1, 64, 64), 4.0), near=0.5, far=8.0)
    own = lambda z: depth.from_metric(z, valid=inside, near=0.5, far=8.0)
    ball = own(torch.where(inside > 0, 2 - (0.5 - x**2 - y**2).clamp(min=0).sqrt(), torch.full_like(inside, 2.0)))
    board = own(torch.full_like(inside, 2.0))
    made = lambda shape: featglac._thing_space(cutout[:, :3], room, 3.0, cutout, shape, 50.0)
    assert made(None).shape is None and (made(None).caster == 3).all()
    solid = inside > 0
    for known in (ball, board):
        assert abs(float(made(known).caster[solid].median()) - 3) < 1e-3
    core = (x**2 + y**2 < 0.35)[None, None]
    assert made(board).shape[:, 2:][core].max() < -0.99                     # faces the camera everywhere
    assert made(ball).shape[:, :1][core & (x > 0.4)].min() > 0.3 > -0.3 > made(ball).shape[:, :1][core & (x < -0.4)].max()
    small = depth.from_metric(torch.linspace(1, 2, 1024).view(1, 1, 32, 32), near=0.5, far=8.0)
    with pytest.raises(ValueError, match="same canvas"):
        featglac._thing_space(cutout[:, :3], room, 3.0, cutout, small, 50.0)


def test_insert_object_trusts_a_known_shape_more(tiny_pipe, scene):
    z = torch.linspace(1, 6, scene[0].shape[-2]).view(1, 1, -1, 1).expand(1, 1, *scene[0].shape[-2:]).contiguous()
    room = depth.from_metric(z, near=0.5, far=8.0)
    run = lambda **more: featglac.insert_object(
        tiny_pipe, scene[0], room, scene[1], "a red box", "3m", steps=STEPS, generator=torch.Generator().manual_seed(0), **more)
    plain, known = run(), run(cutout_depth=room)
    assert (plain.settings["shade"], plain.settings["own"]) == (featglac.Settings.shade, featglac.Settings.own)
    assert {k: known.settings[k] for k in featglac.RGBD} == featglac.RGBD
    with pytest.raises(ValueError, match="cutout_depth needs a picture whose depth is in metres"):
        featglac.insert_object(tiny_pipe, scene[0], replace(ramp_depth(), kind="relative"), scene[1], "a red box", 0.5,
                               cutout_depth=room)
    assert run(cutout_depth=room, own=0.0).settings["own"] == 0.0           # what is asked for counts
    assert not torch.equal(plain.image, known.image) and torch.equal(plain.composite, known.composite)


def test_insert_object_hides_it_behind_what_is_nearer(tiny_pipe, scene):
    background, foreground, _ = scene
    alpha = featglac.insert_object(
        tiny_pipe, background, ramp_depth(), foreground, "a red box", "2.6m", "alpha"
    )
    rows = torch.arange(128)[(ramp_depth().values[0, 0, :, 0] < 0.4)]  # nearer than 2.6 m
    assert torch.equal(alpha.image[..., rows, :], background[..., rows, :])
    assert (alpha.image - background).abs().max() > 0.1
    full = featglac.insert_object(
        tiny_pipe, background, ramp_depth(), foreground, "a red box", 0.4, steps=STEPS
    )
    assert full.passes > 0 and torch.equal(full.composite, alpha.composite)


def test_an_object_from_the_prompt_alone(make_pipe, tiny_pipe, scene):
    inpainter = make_pipe(inpaint=True)
    where = scene[1][:, 3:]
    with pytest.raises(ValueError, match="where"):
        featglac.insert_object(tiny_pipe, scene[0], ramp_depth(), None, "a red box", 0.4, steps=STEPS)
    made = [
        featglac.insert_object(
            tiny_pipe,
            scene[0],
            ramp_depth(),
            None,
            "a red box",
            0.4,
            m,
            where=where,
            steps=STEPS,
            inpaint_pipe=inpainter,
            generator=gen(),
        )
        for m in ("inpaint", "inject")
    ]
    assert made[0].passes == 2 * STEPS and made[1].passes > made[0].passes
    assert torch.equal(made[0].composite, made[1].composite)
    outside = (where == 0).expand(-1, 3, -1, -1)
    assert torch.equal(made[0].image[outside], scene[0][outside])


def test_painting_is_paid_for_and_obeys_the_settings(make_pipe, scene):
    pipe, where = make_pipe(), scene[1][:, 3:]
    make = lambda **more: featglac.insert_object(
        pipe, scene[0], ramp_depth(), None, "a red box", 0.4, "inpaint", where=where, generator=gen(), **more
    )
    by_word, by_settings = make(steps=3), make(settings=featglac.Settings(steps=3))
    assert torch.equal(by_word.image, by_settings.image) and by_word.passes == by_settings.passes == 2 * 3
    assert by_word.mechanism == "inpaint" and by_word.seconds > 0.01  # the paste alone: a millisecond
    with pytest.raises(ValueError, match="wholly hidden"):
        featglac.paint_object(pipe, scene[0], torch.ones_like(where), where, "a red box", steps=3)


def test_a_background_filled_by_a_model_follows_the_seed(make_pipe):
    a, b = torch.rand(1, 3, 128, 128, generator=gen(1)), torch.rand(1, 3, 128, 128, generator=gen(2))
    pipe = make_pipe()
    made = [
        featglac.compose(pipe, a, ramp_depth(), b, ramp_depth(), 0.4, "a room", "alpha", fill=pipe, steps=3,
                         generator=gen(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0].image, made[1].image) and made[0].passes == 2 * 3
    assert not torch.equal(made[0].layers["background"], made[2].layers["background"])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_inpainting_baseline_uses_the_guidance_that_was_asked_for(tiny_pipe, scene, guidance_scale):
    made = edit(tiny_pipe, scene, "inpaint", steps=4, guidance_scale=guidance_scale)
    assert made.passes == 4 * (1 if guidance_scale == 1 else 2)


def test_a_small_gradient_guides_in_half_precision_too(make_pipe, scene):
    """Features' gradients of 5e-8 are float16's last step, and the square of the latent's is 0 there."""
    from lib import models

    moved = {}
    for dtype in (torch.float32, torch.float16):
        pipe = make_pipe()
        models._cast(pipe, "cpu", dtype)
        options = {"steps": 4, "inner_steps": 1, "decode": "plain", "weights": (0.0, 2e-5, 8.5e-4)}
        z = [edit(pipe, scene, "guide", **options, step_size=size).z.float() for size in (0.05, 0.0)]
        moved[dtype] = (z[0] - z[1]).flatten()
    half, whole = moved[torch.float16], moved[torch.float32]
    assert F.cosine_similarity(half, whole, dim=0) > 0.97 and 0.9 < half.norm() / whole.norm() < 1.1


def test_compose_puts_the_near_of_a_before_the_far_of_b(tiny_pipe):
    a, b = torch.rand(1, 3, 128, 128, generator=gen(1)), torch.rand(1, 3, 128, 128, generator=gen(2))
    result = featglac.compose(tiny_pipe, a, ramp_depth(), b, ramp_depth(), 0.4, "a room", "alpha")
    near = deglad.nearer(ramp_depth(), 0.4).expand(-1, 3, -1, -1) > 0
    far = ~(featglac.F.max_pool2d(near.float(), 5, 1, 2) > 0)  # deglad fills a pixel more than the near layer
    assert torch.equal(result.image[near], a[near]) and torch.equal(result.image[far], b[far])
    z = ramp_depth().values  # a plain tensor will do
    same = featglac.compose(tiny_pipe, a, z, b, z, 0.4, "a room", "alpha")
    assert torch.equal(same.image, result.image)
    full = featglac.compose(tiny_pipe, a, ramp_depth(), b, ramp_depth(), 0.4, "a room", steps=STEPS, soft=1.0)
    assert full.passes > 0 and torch.isfinite(full.image).all()


def test_place_keeps_proportion_and_colour():
    cutout = torch.zeros(1, 4, 40, 40)
    cutout[:, :, 10:30, 5:15] = torch.tensor([0.2, 0.6, 0.4, 1.0]).view(1, 4, 1, 1)
    canvas = featglac.place(cutout, (96, 128), x=0.5, y=1.0, height=0.5)
    opaque = canvas[0, 3] > 0.5
    assert canvas.shape == (1, 4, 96, 128) and opaque.any(1).sum() == 48 and opaque.any(0).sum() == 24
    assert opaque[-1].any() and torch.allclose(
        canvas[0, :3, 70, 64], torch.tensor([0.2, 0.6, 0.4]), atol=1e-3
    )
    half_out = featglac.place(cutout, (96, 128), x=0.0, y=0.5, height=0.5)
    assert (half_out[0, 3] > 0.5).any(0).sum() == 12
    with pytest.raises(ValueError, match="outside the picture"):
        featglac.place(cutout, (96, 128), x=3.0)


# ---------------------------------------------------------------- baselines
def test_poisson_solves_its_equation():
    """On a constant rim, a gradient-free object takes the rim's colour; a ramp keeps its slope."""
    background, foreground = torch.full((1, 3, 48, 48), 0.4), torch.zeros(1, 4, 48, 48)
    foreground[:, :3, 10:30, 10:30], foreground[:, 3, 10:30, 10:30] = 0.9, 1
    none = torch.zeros(1, 1, 48, 48)
    assert (featglac.poisson(background, foreground, none) - 0.4).abs().max() < 0.05
    foreground[:, :3, 10:30, 10:30] = torch.linspace(0, 0.4, 20).view(1, 1, 1, 20)
    middle = featglac.poisson(background, foreground, none)[0, 0, 20, 14:26]
    assert (middle.diff() > 0).all()


def test_poisson_at_the_border_and_beside_an_occluder():
    background, foreground = torch.full((1, 3, 32, 32), 0.5), torch.zeros(1, 4, 32, 32)
    foreground[:, 0, :16, 8:32], foreground[:, 3, :16, 8:32] = 0.5, 1  # touches two borders
    occluder = torch.zeros(1, 1, 32, 32)
    background[..., 16:, :], occluder[..., 16:, :] = 0.0, 1  # a black thing in front, below
    out = featglac.poisson(background, foreground, occluder)
    assert torch.isfinite(out).all() and torch.equal(out[..., 16:, :], background[..., 16:, :])
    assert (out[0, 0, 2:16, 12:] - 0.5).abs().max() < 0.05  # no black bleeds in
    foreground[:, 3] = 1  # no rim at all: the object itself
    assert torch.allclose(
        featglac.poisson(background, foreground, torch.zeros_like(occluder)), foreground[:, :3], atol=1e-6
    )


def test_paste_2d_ignores_depth_and_alpha_does_not(tiny_pipe, scene):
    background, foreground, occluder = scene
    both = (occluder * foreground[:, 3:]).expand(-1, 3, -1, -1) > 0
    assert torch.equal(edit(tiny_pipe, scene, "paste2d").image[both], foreground[:, :3][both])
    assert torch.equal(edit(tiny_pipe, scene, "alpha").image[both], background[both])


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda b, f, o: (b[0], f, o), "background must be"),
        (lambda b, f, o: (b * 255, f, o), "must lie in"),
        (lambda b, f, o: (b, f[:, :3], o), "foreground must be"),
        (lambda b, f, o: (b, f * 0, o), "alpha channel"),
        (lambda b, f, o: (b, f, torch.ones_like(o)), "wholly hidden"),
        (lambda b, f, o: (b, f, o[..., :64]), "one size"),
        (lambda b, f, o: (b[..., :120], f[..., :120], o[..., :120]), "multiples of 32"),
        (lambda b, f, o: (b.repeat(2, 1, 1, 1), f, o), "one picture each"),
        (lambda b, f, o: (b, f, Elsewhere(o)), "on one device"),
    ],
)
def test_bad_layers_are_named(tiny_pipe, scene, change, words):
    with pytest.raises(ValueError, match=words):
        edit(tiny_pipe, change(*scene))


def test_bad_requests_are_named(tiny_pipe, scene):
    with pytest.raises(ValueError, match="Unknown mechanism 'magic'; known: inject, guide"):
        edit(tiny_pipe, scene, "magic")
    with pytest.raises(TypeError, match="Unknown option 'strenght'; known: .*strength"):
        edit(tiny_pipe, scene, strenght=1.0)
    for words, option in [
        ("start must be one of", dict(start="middle")),
        ("strength must lie", dict(strength=2.0)),
        ("fits 'decoder'", dict(layers="decoder")),
        ("window is", dict(window=(1, 0))),
        ("steps must be", dict(steps=0)),
        ("at least 1", dict(samples=0)),
        ("at most 1000|from 1 to 1000", dict(steps=2000)),
    ]:
        with pytest.raises(ValueError, match=words):
            edit(tiny_pipe, scene, **option)
    with pytest.raises(ValueError, match="weights needs 3"):
        edit(tiny_pipe, scene, "guide", weights=(1.0,))
    with pytest.raises(ValueError, match="depth map is"):
        featglac.insert_object(
            tiny_pipe, scene[0], DepthMap(torch.rand(1, 1, 64, 64), "relative", 0, 1), scene[1], "", 0.5
        )
    with pytest.raises(ValueError, match="outside the scene"):
        featglac.insert_object(tiny_pipe, scene[0], ramp_depth(), scene[1], "", "9m")


def test_a_nine_channel_inpainting_unet_can_be_the_generator(make_pipe, scene):
    pipe = make_pipe(inpaint=True)
    for mechanism in ("inject", "guide", "blended-latent", "latent-paste", "inpaint"):
        result = edit(pipe, scene, mechanism, steps=3, inner_steps=1)
        assert torch.isfinite(result.image).all() and result.passes > 0
    hole = featglac._Job(pipe, *scene, "a", featglac.Settings(ring=0.6)).extra
    assert hole.shape == (1, 5, 16, 16) and hole[0, 0, 8, 7] == 1 and hole[0, 0, 0, 15] == 0


def test_restoring_afterwards_equals_restoring_at_once(tiny_pipe, scene):
    loose, tight = (edit(tiny_pipe, scene, steps=3, restore=how) for how in ("none", "outside"))
    assert torch.equal(featglac.restored(loose), tight.image) and not torch.equal(loose.image, tight.image)
    with pytest.raises(ValueError, match="restore must be one of"):
        featglac.restored(loose, "everything")


def test_without_tint_a_thing_keeps_its_hue():
    """A change that is redder than grey: with tint 0 the channels keep their ratios, with tint 1 they do not."""
    picture, mask = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1).expand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    before = torch.full((1, 3, 32, 32), 0.5)
    after = before * torch.tensor([1.0, 0.8, 0.7]).view(1, 3, 1, 1)
    hue = lambda x: x / x.mean(1, keepdim=True)
    off = [float((hue(featglac.relight(picture, after, before, mask, tint=tint)) - hue(picture)).abs().max())
           for tint in (0.0, 0.5, 1.0)]
    assert off[0] < 1e-4 < 0.01 < off[1] < off[2]
    assert featglac.relight(picture, after, before, mask, tint=0.0).mean() < 0.9 * picture.mean()


def test_relighting_changes_light_and_keeps_detail():
    """A true shadow over chequers comes back from blurred decodings, not leaking over the mask's edge."""
    yy, xx = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    chequers = 0.3 + 0.4 * ((yy // 4 + xx // 4) % 2).float().expand(1, 3, 64, 64)
    mask = (xx >= 32).float()[None, None]
    light = torch.where(mask > 0, 1.2, 0.5)
    blur = lambda x: featglac.F.avg_pool2d(x, 9, 1, 4, count_include_pad=False)
    truth, before, after = chequers * light, blur(chequers), blur(chequers) * light
    relit = featglac.relight(chequers, after, before, mask, smooth=0.03)
    assert (relit - truth).abs().max() < 0.1 and (relit - truth).abs().mean() < 0.03
    assert (chequers + after - before - truth).abs().mean() > 0.06  # what a difference would have done
    assert torch.allclose(featglac.relight(chequers, before, before, mask), chequers, atol=1e-5)
    faint = featglac.relight(chequers, before * 0.95, before, mask, quiet=0.1)
    around = (mask == 0).expand_as(chequers)
    assert torch.allclose(faint[around], chequers[around], atol=1e-5)  # a faint doubt around the object is none
    assert (featglac.relight(chequers, before * 0.95, before, mask)[around] < chequers[around] - 5e-3).all()


def test_the_opposite_light():
    turned = featglac.opposite_light("a red chair behind a white table light from the left")
    assert turned == "a red chair behind a white table light from the right"
    assert featglac.opposite_light(turned).endswith("light from the left")
    for other in ("a photograph of a chair", "light from the moon"):
        assert featglac.opposite_light(other) == ""


def test_the_opposite_light_is_the_negative_prompt(tiny_pipe, scene):
    negative = lambda mechanism, **o: featglac.compose_layers(
        tiny_pipe, *scene, "a box light from the left", mechanism, steps=2, generator=gen(), **o
    ).settings["negative_prompt"]
    assert negative("inject") == "a box light from the right"
    assert negative("inject", negative_prompt="dark") == "dark"
    assert negative("blended-latent") == ""


def test_the_depth_maps_light_belongs_to_inject_and_guide_and_needs_metres(tiny_pipe, scene):
    """Published baselines must not borrow it, or the board would compare it with itself."""
    background, foreground, _ = scene
    ramp = torch.linspace(9, 1, 128).view(1, 1, 128, 1).expand(1, 1, 128, 128) / 9
    run = lambda mechanism, kind: featglac.insert_object(
        tiny_pipe, background, DepthMap(ramp, kind, 0.0, 9.0), foreground, "a red box", 0.3, mechanism,
        steps=2, generator=gen(), samples=1
    )
    for mechanism in featglac.MECHANISMS:
        if mechanism != "inpaint":
            assert (run(mechanism, "metric").light is not None) == (mechanism in ("inject", "guide", "geometry"))
    assert run("inject", "relative").light is None
    with pytest.raises(ValueError, match="depth in metres"):
        run("geometry", "relative")
