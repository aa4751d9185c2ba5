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
    mixed = latents.slerp(torch.cat([a, a]), torch.cat([a, b]), 0.5)  # a pair without an arc spoils no other
    assert torch.allclose(mixed[:3], a, atol=1e-6) and torch.equal(mixed[3:], latents.slerp(a, b, 0.5))
    half = latents.slerp(a.half(), b.half(), 0.5)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), latents.slerp(a, b, 0.5), atol=5e-3)
    stats = latents.statistics(a)
    assert stats["mean"].shape == (4,) and abs(stats["all_std"] - 1) < 0.05


# ---------------------------------------------------------------- the posterior, cells, colours, bands (lesson 01)


def test_posterior_draw_and_kl_equal_diffusers(tiny_pipe, picture):
    mean, logvar = latents.posterior(tiny_pipe, picture)
    theirs = tiny_pipe.vae.encode(picture * 2 - 1).latent_dist
    assert torch.equal(mean, theirs.mean) and torch.equal(logvar, theirs.logvar)
    assert torch.allclose(latents.kl(mean, logvar), theirs.kl(), rtol=1e-4)
    assert torch.equal(latents.kl(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)), torch.zeros(2))
    g = lambda: torch.Generator().manual_seed(5)
    noise = torch.randn(mean.shape, generator=g())
    scaled = latents.draw(mean, logvar, noise) * tiny_pipe.vae.config.scaling_factor
    assert torch.allclose(latents.encode(tiny_pipe, picture, sample=True, generator=g()), scaled, atol=1e-6)


def test_kl_equals_torch_distributions():
    from torch.distributions import Normal, kl_divergence

    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).unbind(0)
    theirs = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(latents.kl(mean, logvar), theirs, rtol=1e-5)


def test_a_vae_alone_is_as_good_as_its_pipeline(tiny_pipe, picture):
    assert torch.equal(latents.encode(tiny_pipe.vae, picture), latents.encode(tiny_pipe, picture))
    z = latents.encode(tiny_pipe, picture)
    assert torch.equal(latents.decode(tiny_pipe.vae, z), latents.decode(tiny_pipe, z))
    assert latents.factor(tiny_pipe.vae) == 8 and latents.compression(picture, z) == 48


def test_a_tiny_autoencoder_goes_through_the_same_lines(picture):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
                           num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()
    z = latents.encode(tiny, picture)
    assert z.shape == (2, 4, 8, 16) and latents.compression(picture, z) == 48
    assert latents.round_trip(tiny, picture).shape == picture.shape
    with torch.no_grad():
        assert torch.equal(z, tiny.encode(picture * 2 - 1).latents)
    with pytest.raises(ValueError, match="no posterior"):
        latents.posterior(tiny, picture)
    with pytest.raises(ValueError, match="no posterior"):
        latents.encode(tiny, picture, sample=True)


def test_change_cell_touches_one_value_or_one_channel():
    z = torch.zeros(2, 4, 3, 5)
    one = latents.change_cell(z, channel=2, amount=1.5, x=4, y=0)
    assert one[:, 2, 0, 4].tolist() == [1.5, 1.5] and one.count_nonzero() == 2 and not z.any()
    assert latents.change_cell(z, channel=1, amount=-1.0)[:, 1].eq(-1).all()
    for bad, words in (({"channel": 4}, "channel must be from 0 to 3"), ({"x": 5, "y": 0}, "x must be"),
                       ({"x": 0, "y": -1}, "y must be"), ({"x": 1}, "both x and y"),
                       ({"amount": float("nan")}, "finite")):
        with pytest.raises(ValueError, match=words):
            latents.change_cell(z, **{"channel": 0, "amount": 1.0, **bad})
    with pytest.raises(ValueError, match="B, C, h, w"):
        latents.change_cell(z[0], 0, 1.0)


def test_change_map_is_zero_without_a_change(tiny_pipe):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not latents.change_map(tiny_pipe, z, z).any()
    moved = latents.change_map(tiny_pipe, z, latents.change_cell(z, 0, 2.0, x=4, y=4))
    assert moved.shape == (1, 1, 64, 64) and moved.min() >= 0 and moved.max() > 0


def test_colour_fit_finds_a_linear_code():
    """When a latent is a linear function of the mean colours, the preview is exact."""
    g = torch.Generator().manual_seed(0)
    image = torch.rand(3, 3, 16, 24, generator=g)
    small = torch.nn.functional.avg_pool2d(image, 8)
    mix = torch.randn(4, 3, generator=g)
    z = torch.einsum("cr,brhw->bchw", mix, small) - 0.3
    noisy = z + 1e-3 * torch.randn(z.shape, generator=g)      # keeps the least squares of full rank
    shown = latents.colour_preview(noisy, latents.colour_fit(noisy, image))
    assert shown.shape == small.shape and (shown - small).abs().max() < 0.02


def test_bands_add_up_and_find_the_period():
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    parts = latents.bands(x)
    assert parts.shape == (5,) and torch.allclose(parts.sum(), x.square().mean(), rtol=1e-5)
    assert latents.bands(torch.ones(1, 1, 16, 16))[-1] == pytest.approx(1.0, rel=1e-5)
    for period, band in ((3.0, 0), (6.0, 1), (12.0, 2), (24.0, 3), (60.0, 4)):
        wave = torch.cos(2 * torch.pi * (torch.arange(240.0) + 0.5) / period).view(1, 1, 1, 240).expand(1, 1, 16, 240)
        assert latents.bands(wave)[band] / wave.square().mean() > 0.99, period
    with pytest.raises(ValueError, match="periods that grow"):
        latents.bands(x, periods=(8, 4))
