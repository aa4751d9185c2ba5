"""Filling: known pixels exact, classical methods against grey, both kinds of model on random pipelines."""
import pytest
import torch

from lib import diffusion, inpaint, latents, masks


def gen(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture(scope="module")
def smooth():
    """Three smooth waves (2, 3, 48, 64), and a box each."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 64), indexing="ij")
    one = torch.stack([0.5 + 0.4 * torch.sin(3 * x + 1), 0.2 + 0.6 * y, 0.5 + 0.4 * torch.cos(2 * x + 3 * y)])
    return torch.stack([one, one.flip(-1)]), masks.random_box(2, (48, 64), gen(2), area=(0.1, 0.2))


def rmse(a, b, m):
    return float((((a - b) ** 2 * m).sum() / (3 * m.sum())).sqrt())


@pytest.mark.parametrize("name", list(inpaint.METHODS))
def test_known_pixels_are_exact_and_the_hole_is_not_looked_at(smooth, name):
    image, m = smooth
    out = inpaint.fill(image, m, name)
    assert out.shape == image.shape and out.dtype == image.dtype and 0 <= out.min() and out.max() <= 1
    assert torch.equal(out * (1 - m), image * (1 - m))
    other = torch.where(m > 0, torch.rand(image.shape, generator=gen()), image)
    assert torch.equal(inpaint.fill(other, m, name), out)


def test_classical_fillings_beat_grey_and_biharmonic_wins_on_smooth(smooth):
    image, m = smooth
    grey, telea, bi = (rmse(inpaint.fill(image, m, k), image, m) for k in ("grey", "telea", "biharmonic"))
    print(f"rmse: grey {grey:.4f}, telea {telea:.4f}, biharmonic {bi:.4f}")
    assert telea < 0.5 * grey and bi < 0.5 * telea


def test_one_mask_serves_many_images_and_batch_equals_single(smooth):
    image, m = smooth
    together = inpaint.telea(image, m[:1])
    assert torch.equal(together[1:], inpaint.telea(image[1:], m[:1]))


def test_soft_masks_blend(smooth):
    image, m = smooth
    half = inpaint.grey(image, m * 0.5, value=1.0)
    inside = m.expand_as(image) > 0
    assert torch.allclose(half[inside], (image * 0.5 + 0.5)[inside], atol=1e-6)
    assert torch.equal(half[~inside], image[~inside])


def test_a_function_may_fill_and_cannot_touch_known_pixels(smooth):
    image, m = smooth
    out = inpaint.fill(image, m, lambda picture, hole: torch.zeros_like(picture))
    assert torch.equal(out, torch.where(m > 0, torch.zeros_like(image), image))
    with pytest.raises(ValueError, match="must return images"):
        inpaint.fill(image, m, lambda picture, hole: picture[:1])


@pytest.mark.parametrize("call, words", [
    (lambda i, m: inpaint.fill(i, m, "magic"), "Unknown filling method 'magic'"),
    (lambda i, m: inpaint.fill(i, m, 3), "a name, a function or a pipeline"),
    (lambda i, m: inpaint.telea(i, m * 0), "empty"),
    (lambda i, m: inpaint.biharmonic(i, m * 0 + 1), "whole picture"),
    (lambda i, m: inpaint.telea(i[..., :40], m), "48x64 but the image is 48x40"),
    (lambda i, m: inpaint.telea(i * 255, m), r"\[0, 1\]"),
    (lambda i, m: inpaint.with_model(object(), i, m), "4 or 9 channels"),
])
def test_errors_say_what_is_wrong(smooth, call, words):
    with pytest.raises(ValueError, match=words):
        call(*smooth)


# --- models -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def picture():
    image = torch.rand(2, 3, 128, 128, generator=gen(1))
    return image, masks.free_form(2, 128, gen(3))


@pytest.mark.parametrize("nine", [True, False])
def test_model_fills_several_samples_and_keeps_known_pixels(make_pipe, picture, nine):
    image, m = picture
    pipe = make_pipe(inpaint=nine)
    call = lambda seed: inpaint.with_model(pipe, image, m, ["a ball", "a box"], steps=3, guidance_scale=3.0,
                                           generator=gen(seed), samples=2)
    out = call(0)
    assert out.shape == (4, 3, 128, 128) and 0 <= out.min() and out.max() <= 1
    twice, holes = image.repeat_interleave(2, 0), m.repeat_interleave(2, 0)
    assert torch.equal(out * (1 - holes), twice * (1 - holes))
    assert not torch.equal(out[0], out[1])                 # samples differ
    assert torch.equal(out, call(0)) and not torch.equal(out, call(1))


@pytest.mark.parametrize("nine", [True, False])
def test_model_does_not_look_into_the_hole(make_pipe, picture, nine):
    image, m = picture
    pipe, other = make_pipe(inpaint=nine), torch.where(m > 0, 1 - image, image)
    a, b = (inpaint.with_model(pipe, x, m, steps=2, guidance_scale=1.0, generator=gen()) for x in (image, other))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("nine", [True, False])
@pytest.mark.parametrize("size", [(100, 130), (300, 260)])
def test_model_takes_any_size(make_pipe, nine, size):
    image, m = torch.rand(1, 3, *size, generator=gen()), masks.centre_box(1, size)
    out = inpaint.with_model(make_pipe(inpaint=nine), image, m, steps=2, guidance_scale=1.0, generator=gen())
    assert out.shape == image.shape and torch.equal(out * (1 - m), image * (1 - m))


def test_samples_follow_their_picture(make_pipe, picture):
    """Two pictures with two samples each: each sample gets its own picture's mask."""
    image, m = picture
    pipe = make_pipe(inpaint=True)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda mod, args: seen.append(args[0]))
    inpaint.with_model(pipe, image, m, steps=1, guidance_scale=1.0, generator=gen(), samples=2)
    hook.remove()
    mask_in = seen[0][:, 4:5]
    small = torch.nn.functional.interpolate(m, (16, 16))
    assert torch.equal(mask_in, small.repeat_interleave(2, 0))


def test_blended_latents_equals_diffusers_with_a_4_channel_unet(make_pipe):
    """The same loop as StableDiffusionInpaintPipeline's for ordinary U-Nets: re-noised to the *next* timestep."""
    from diffusers import StableDiffusionInpaintPipeline
    pipe = make_pipe()
    with torch.no_grad():                                  # make the posterior a point, so both encode alike
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -30
    m = torch.zeros(1, 1, 128, 128)
    m[..., 32:96, 40:88] = 1
    image = inpaint.telea(torch.rand(1, 3, 128, 128, generator=gen(5)), m)
    ours = inpaint.blended_latents(pipe, image, m, "a ball", steps=6, guidance_scale=4.0, generator=gen(7))
    theirs = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=gen(7))
    ref = theirs("a ball", image=image, mask_image=m, height=128, width=128, strength=1.0, num_inference_steps=6,
                 guidance_scale=4.0, latents=noise, generator=gen(9), output_type="pt").images
    assert torch.allclose(ours, ref, atol=1e-4)


def test_blended_latents_returns_the_known_latents_exactly(make_pipe, monkeypatch, picture):
    image, m = picture
    pipe, kept = make_pipe(), []
    decode = latents.decode
    monkeypatch.setattr(latents, "decode", lambda p, z: (kept.append(z), decode(p, z))[1])
    inpaint.blended_latents(pipe, image, m, steps=2, guidance_scale=1.0, generator=gen())
    known = latents.encode(pipe, inpaint.telea(image, m))
    outside = torch.nn.functional.adaptive_max_pool2d(m, 16).expand_as(known) == 0
    assert outside.any() and torch.equal(kept[0][outside], known[outside])


def test_pipelines_are_left_as_they_were(make_pipe, picture):
    image, m = picture
    pipe = make_pipe()
    a = diffusion.sample(pipe, "a ball", steps=3, guidance_scale=2.0, generator=gen())
    inpaint.with_model(pipe, image, m, steps=2, generator=gen())
    assert torch.equal(a, diffusion.sample(pipe, "a ball", steps=3, guidance_scale=2.0, generator=gen()))


def test_wrong_pipeline_and_prompts(make_pipe, picture):
    image, m = picture
    with pytest.raises(ValueError, match="3 prompts do not fit 2"):
        inpaint.with_model(make_pipe(), image, m, ["a", "b", "c"])
    with pytest.raises(ValueError, match="samples must be at least 1"):
        inpaint.with_model(make_pipe(), image, m, samples=0)
    from diffusers import StableDiffusionPipeline
    nine = StableDiffusionPipeline(**make_pipe(inpaint=True).components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="mini-inpaint"):
        inpaint.with_model(nine, image, m)
