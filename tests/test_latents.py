"""The latent space: shapes, scaling, errors, interpolation."""

import pytest
import torch

from lib import latents


@pytest.fixture
def picture():
    return torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


def test_encode_has_48_times_fewer_values_and_is_scaled(tiny_pipe, picture):
    z = latents.encode(tiny_pipe, picture)
    assert z.shape == (2, 4, 8, 16) and picture.numel() == 48 * z.numel()
    raw = tiny_pipe.vae.encode(picture * 2 - 1).latent_dist.mode()
    assert torch.allclose(z, raw * tiny_pipe.vae.config.scaling_factor)
    assert latents.factor(tiny_pipe) == tiny_pipe.vae_scale_factor == 8


def test_decode_equals_the_pipelines_own_decoding(tiny_pipe):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = latents.decode(tiny_pipe, z)
    with torch.no_grad():
        theirs = tiny_pipe.image_processor.postprocess(
            tiny_pipe.vae.decode(z / tiny_pipe.vae.config.scaling_factor).sample, output_type="pt"
        )
    assert torch.allclose(ours, theirs, atol=1e-6) and 0 <= ours.min() and ours.max() <= 1
    loose = latents.decode(tiny_pipe, z, clamp=False)
    assert torch.equal(loose.clamp(0, 1), ours)


def test_a_posterior_sample_follows_its_generator(tiny_pipe, picture):
    draw = lambda seed: latents.encode(
        tiny_pipe, picture, sample=True, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert not torch.equal(draw(3), latents.encode(tiny_pipe, picture))


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.rand(3, 64, 64), "must be a tensor"),
        (torch.rand(1, 4, 64, 64), "must be a tensor"),
        (torch.rand(1, 3, 60, 64), "multiples of 8"),
        (torch.rand(1, 3, 64, 64) * 255, "must lie in"),
        (torch.rand(1, 3, 64, 64) * 2 - 1, "must lie in"),
        (torch.full((1, 3, 64, 64), float("nan")), "NaN"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "must be float"),
        ("a.png", "must be a tensor"),
    ],
)
def test_bad_pictures_are_named(tiny_pipe, bad, words):
    with pytest.raises(ValueError, match=words):
        latents.encode(tiny_pipe, bad)


def test_decode_refuses_a_picture(tiny_pipe):
    with pytest.raises(ValueError, match="latent has shape"):
        latents.decode(tiny_pipe, torch.rand(1, 3, 64, 64))


def test_slerp_keeps_the_norm_of_noise_and_lerp_does_not():
    a, b = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.allclose(latents.slerp(a, b, 0.0), a, atol=1e-5) and torch.allclose(
        latents.slerp(a, b, 1.0), b, atol=1e-5
    )
    assert latents.slerp(a, b, 0.5).std() > 0.95 and latents.lerp(a, b, 0.5).std() < 0.75
    assert torch.isfinite(latents.slerp(a, a, 0.5)).all()
    stats = latents.statistics(a)
    assert stats["mean"].shape == (4,) and abs(stats["all_std"] - 1) < 0.05
