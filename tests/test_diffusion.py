"""Schedules, DDIM steps and inversion against diffusers' own classes; sampling against the pipeline;
counting."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from lib import diffusion


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheduler(kind="epsilon", **more):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        **{"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, **more},
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "more", [{}, {"set_alpha_to_one": True}, {"clip_sample": True}, {"timestep_spacing": "trailing"}]
)
def test_ddim_step_equals_the_schedulers(kind, more):
    ours = diffusion.ddim(scheduler(kind, **more), 50)
    theirs = scheduler(kind, **more)
    theirs.set_timesteps(50)
    z, out = rand(2, 4, 8, 8), rand(2, 4, 8, 8, seed=1)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for t in theirs.timesteps[[0, 20, 48, 49]]:
        assert torch.allclose(
            diffusion.ddim_step(ours, out, t, z), theirs.step(out, t, z).prev_sample, atol=1e-6
        )


def test_ddim_step_with_eta_equals_the_schedulers():
    ours = diffusion.ddim(scheduler(), 20)
    z, out = rand(1, 4, 8, 8), rand(1, 4, 8, 8, seed=1)
    make = lambda: torch.Generator().manual_seed(5)
    for t in ours.timesteps[[0, 9, 19]]:
        theirs = ours.step(out, t, z, eta=1.0, generator=make()).prev_sample
        assert torch.allclose(
            diffusion.ddim_step(ours, out, t, z, eta=1.0, generator=make()), theirs, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [10, 50])
def test_inverse_step_equals_the_inverse_schedulers(kind, steps):
    ours = diffusion.ddim(scheduler(kind), steps)
    theirs = DDIMInverseScheduler.from_config(scheduler(kind).config)
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist() == ours.timesteps.tolist()[::-1]
    z, out = rand(1, 4, 8, 8), rand(1, 4, 8, 8, seed=1)
    for t in theirs.timesteps.tolist():
        expected = theirs.step(out, t, z).prev_sample
        assert torch.allclose(diffusion.ddim_inverse_step(ours, out, t, z), expected, atol=1e-6)


def test_inverse_step_undoes_the_step_when_the_prediction_is_the_same():
    s = diffusion.ddim(scheduler(), 50)
    z, out = rand(1, 4, 8, 8), rand(1, 4, 8, 8, seed=1)
    for t in s.timesteps[[0, 25, 49]]:
        assert torch.allclose(
            diffusion.ddim_inverse_step(s, out, t, diffusion.ddim_step(s, out, t, z)), z, atol=1e-5
        )


def test_q_sample_equals_add_noise_and_keeps_the_clean_end():
    s = diffusion.ddim(scheduler(), 50)
    z, eps, t = rand(2, 4, 8, 8), rand(2, 4, 8, 8, seed=1), torch.tensor([981, 1])
    assert torch.allclose(diffusion.q_sample(s, z, t, eps), s.add_noise(z, eps, t), atol=1e-6)
    clean = diffusion.q_sample(s, z, -19, eps)
    assert torch.allclose(clean, s.final_alpha_cumprod.sqrt() * z + (1 - s.final_alpha_cumprod).sqrt() * eps)


def test_embed_equals_encode_prompt(tiny_pipe):
    theirs = tiny_pipe.encode_prompt("a red chair behind a white table", "cpu", 1, False)[0]
    assert torch.equal(diffusion.embed(tiny_pipe, "a red chair behind a white table"), theirs)
    assert diffusion.embed(tiny_pipe, ["a", "b"]).shape[0] == 2
    with pytest.raises(ValueError, match="prompt"):
        diffusion.embed(tiny_pipe, 3)


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_sampling_equals_the_pipeline(tiny_pipe, scale):
    config_before, steps_before = dict(tiny_pipe.scheduler.config), tiny_pipe.scheduler.timesteps.clone()
    z = rand(1, 4, 16, 16)
    ours = diffusion.sample(tiny_pipe, "a red chair", 6, scale, latents=z)
    assert dict(tiny_pipe.scheduler.config) == config_before
    assert torch.equal(tiny_pipe.scheduler.timesteps, steps_before)  # sampling leaves the scheduler alone
    theirs = tiny_pipe(
        "a red chair", num_inference_steps=6, guidance_scale=scale, latents=z, output_type="latent"
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_inversion_equals_a_loop_over_the_inverse_scheduler(tiny_pipe):
    theirs = DDIMInverseScheduler.from_config(tiny_pipe.scheduler.config)
    theirs.set_timesteps(8)
    z = z0 = rand(1, 4, 16, 16) * 0.5
    text = diffusion.embed(tiny_pipe, "a box")
    with torch.no_grad():
        for t in theirs.timesteps:
            z = theirs.step(tiny_pipe.unet(z, t, encoder_hidden_states=text).sample, t, z).prev_sample
    path = diffusion.invert(tiny_pipe, z0, "a box", 8)
    assert torch.allclose(path.noise, z, atol=1e-5) and path.timesteps == theirs.timesteps.tolist()
    assert torch.equal(path.at(-124), z0) and torch.equal(path.at(path.timesteps[2]), path.latents[3])


def test_inversion_then_sampling_returns_the_latent(tiny_pipe):
    z0 = rand(1, 4, 16, 16) * 0.5
    error = []
    for refine in (0, 4):
        path = diffusion.invert(tiny_pipe, z0, "a box", 25, refine=refine)
        back = diffusion.sample(tiny_pipe, "a box", 25, 1.0, latents=path.noise)
        error.append(((back - z0).norm() / z0.norm()).item())
    # (a random U-Net is far from smooth in t, so plain inversion fails on it: a trained one is tested below)
    assert error[1] < 0.2 and error[1] < error[0] / 4, error


def test_a_part_of_the_inversion_and_its_errors(tiny_pipe):
    z0 = rand(2, 4, 16, 16)
    path = diffusion.invert(tiny_pipe, z0, ["a box", "a ball"], 10, upto=4)
    assert path.timesteps == [1, 101, 201, 301] and len(path.latents) == 5
    one = diffusion.invert(tiny_pipe, z0[1:], "a ball", 10, upto=4)
    assert torch.allclose(path.noise[1:], one.noise, atol=1e-5)  # a batch is as good as one by one
    with pytest.raises(ValueError, match="no noise level 901"):
        path.at(901)
    with pytest.raises(ValueError, match="upto"):
        diffusion.invert(tiny_pipe, z0, "", 10, upto=11)
    with pytest.raises(ValueError, match="3 prompts for 2"):
        diffusion.invert(tiny_pipe, z0, ["a", "b", "c"], 10)
    with pytest.raises(ValueError, match="steps must be"):
        diffusion.sample(tiny_pipe, "a", steps=0)


def test_count_passes_counts_samples_and_backwards(tiny_pipe):
    with diffusion.count_passes(tiny_pipe.unet) as passes:
        diffusion.sample(tiny_pipe, "a box", 4, 7.5, latents=rand(1, 4, 16, 16))
    assert (passes.forward, passes.backward, passes.total) == (8, 0, 8)
    text = diffusion.embed(tiny_pipe, "a box")
    with diffusion.count_passes(tiny_pipe.unet) as passes:
        z = rand(1, 4, 16, 16).requires_grad_()
        for _ in range(3):  # the same leaf in three calls
            (grad,) = torch.autograd.grad(diffusion.predict(tiny_pipe, z, 501, text).square().sum(), z)
    assert (passes.forward, passes.backward, passes.total) == (3, 3, 9) and grad.abs().sum() > 0
    assert not tiny_pipe.unet._forward_pre_hooks and not tiny_pipe.unet._forward_hooks


def test_count_passes_sees_a_training_step(make_pipe):
    pipe = make_pipe(seed=1)
    pipe.unet.requires_grad_(True)
    with diffusion.count_passes(pipe.unet) as passes:
        diffusion.predict(
            pipe, rand(2, 4, 16, 16), 501, diffusion.embed(pipe, ["a", "b"])
        ).square().sum().backward()
    assert (passes.forward, passes.backward) == (2, 2)


def test_the_mini_inverts_and_comes_back():
    """With trained weights, 50 steps up and down at guidance 1 return the latent within 5 % (relative L2)."""
    from lib import latents, models, scenes, setup

    if not (setup.data_dir() / "models" / "mini" / "unet").is_dir():
        pytest.skip("data/models/mini is not there yet: train it with `python -m lib.train`")
    pipe = models.load("mini")
    scene = scenes.sample(scenes.seeds("val", 1)[0])
    z0 = latents.encode(pipe, scenes.render(scene).rgb)
    path = diffusion.invert(pipe, z0, scene.caption(), 50)
    back = diffusion.sample(pipe, scene.caption(), 50, 1.0, latents=path.noise)
    assert (back - z0).norm() / z0.norm() < 0.05
