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


@pytest.fixture(scope="module")
def eps():
    """A stand-in for a trained network: it believes that every picture is grey."""
    schedule = diffusion.teach_scheduler()
    return lambda x, t: x / (1 - schedule.alphas_cumprod[int(t)]).sqrt()


@pytest.fixture
def options(make_pipe, eps):
    """Options of the methods that would otherwise load a database or a model of the course."""
    pixels = dict(steps=4, generator=gen(1), model=(eps, diffusion.teach_scheduler()))
    return {"scenes": dict(library=inpaint.SceneLibrary(4)), "ddpm-clean": pixels, "ddpm-noised": pixels,
            "repaint": dict(jump=(1, 2), **pixels), "fillnet": dict(net=inpaint.FillNet((4, 4, 8), (2,))),
            "latent": dict(pipe=make_pipe(inpaint=True), steps=2, generator=gen(1), guidance_scale=1.0)}


SIMPLE = ("grey", "telea", "biharmonic", "patchmatch")


@pytest.mark.parametrize("name", SIMPLE)
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


@pytest.mark.parametrize("name", [n for n in inpaint.METHODS if n not in SIMPLE])
def test_the_other_methods_keep_the_same_promises(smooth, options, name):
    """Known pixels exact, the hole not looked at, the same generator gives the same filling; here with stand-ins."""
    image, m = smooth
    out = inpaint.fill(image, m, name, **options[name])
    assert out.shape == image.shape and 0 <= out.min() and out.max() <= 1
    assert torch.equal(out * (1 - m), image * (1 - m))
    for key in options[name].keys() & {"generator"}:
        options[name][key] = gen(1)
    other = torch.where(m > 0, torch.rand(image.shape, generator=gen()), image)
    assert torch.allclose(inpaint.fill(other, m, name, **options[name]), out, atol=1e-5)


# --- PatchMatch -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def patches():
    """All 5x5 patches of a smooth picture of 40x44 pixels: (patches, grid, wanted, allowed)."""
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 10, 11, generator=gen(2)), (40, 44), mode="bicubic")[0]
    hole = masks.centre_box(1, (40, 44), area=0.2)[0, 0] > 0
    allowed = inpaint.clear_patches(hole, 5)
    return inpaint.windows(picture, 5), allowed.shape, ~allowed.flatten(), allowed.flatten()


def test_windows_are_the_patches_row_by_row():
    picture = torch.rand(3, 9, 12, generator=gen())
    rows = inpaint.windows(picture, 4)
    assert rows.shape == (6 * 9, 48)
    for y, x in ((0, 0), (3, 5), (5, 8)):
        assert torch.equal(rows[y * 9 + x].view(3, 4, 4), picture[:, y:y + 4, x:x + 4])


def test_clear_patches_hold_no_hole():
    hole = torch.zeros(8, 10, dtype=torch.bool)
    hole[3, 4] = True
    clear = inpaint.clear_patches(hole, 3)
    assert clear.shape == (6, 8) and not clear[1:4, 2:5].any() and clear.sum() == 48 - 9


def test_exhaustive_search_is_exhaustive(patches):
    values, _, wanted, allowed = patches
    nearest, distance = inpaint.nearest_exhaustive(values, wanted, allowed)
    assert allowed[nearest].all()
    every = (values[wanted][:, None] - values[allowed][None]).square().sum(-1)
    assert torch.allclose(distance, every.min(1).values, atol=1e-4)


def test_patchmatch_comes_close_to_exhaustive_search_and_never_gets_worse(patches):
    values, grid, wanted, allowed = patches
    _, best = inpaint.nearest_exhaustive(values, wanted, allowed)
    match, before = inpaint.PatchMatch(values, grid, wanted, allowed, gen()), float("inf")
    for _ in range(8):
        match.run(1)
        now = float(match.distance.mean())
        assert now <= before
        before = now
    assert allowed[match.field[match.places]].all()
    assert (match.distance >= best - 1e-4).all() and now < 1.35 * float(best.mean())
    again = values[match.places] - values[match.field[match.places]]
    assert torch.allclose(match.distance, again.square().sum(1))


def test_patchmatch_finds_copies_exactly():
    """A picture that repeats: every hidden patch has an exact copy, and filling restores the picture."""
    tile = torch.rand(1, 3, 8, 8, generator=gen(4))
    image = tile.repeat(1, 1, 6, 6)
    m = torch.zeros(1, 1, 48, 48)
    m[..., 20:28, 21:29] = 1
    out = inpaint.patchmatch(image, m, coarsest=48, near=0.0, iterations=6, rounds=6)
    assert rmse(out, image, m) < 0.25 * rmse(inpaint.telea(image, m), image, m)


def test_vote_of_perfect_matches_is_the_picture():
    picture = torch.rand(3, 12, 12, generator=gen(5))
    values, everywhere = inpaint.windows(picture, 3), torch.ones(100, dtype=torch.bool)
    match = inpaint.PatchMatch(values, (10, 10), everywhere, everywhere, gen(), field=torch.arange(100))
    assert float(match.distance.max()) == 0
    assert torch.allclose(inpaint.vote(values, match, (10, 10), 3), picture, atol=1e-5)


def test_shrink_averages_known_pixels_only():
    image, hole = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)
    hole[..., 0, 0], hole[..., 2:, 2:] = 1, 1
    image = torch.where(hole > 0, torch.full_like(image, 9.0), image)
    small, small_hole = inpaint.shrink(image, hole)
    assert torch.allclose(small[:, :, 0], torch.full((1, 3, 2), 0.5)) and small_hole[0, 0].tolist() == [[0, 0], [0, 1]]


def test_a_hole_that_leaves_no_patch_is_still_filled():
    m = torch.ones(1, 1, 16, 16)
    m[..., ::4, ::4] = 0                                   # only single pixels are known
    out = inpaint.patchmatch(torch.full((1, 3, 16, 16), 0.3), m)
    assert torch.allclose(out, torch.full_like(out, 0.3), atol=1e-5)


# --- scene completion -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def library():
    return inpaint.SceneLibrary(12)


def test_a_picture_of_the_library_finds_itself_also_mirrored(library):
    assert len(library) == 24 and library.thumbs.shape == (24, 3, 32, 32)
    for index in (3, 17):
        picture = library.picture(index, (64, 64))
        order, gap = inpaint.similar_scenes(picture, masks.centre_box(1, 64, area=0.1), library, k=3)
        assert int(order[0]) == index and gap[0] < 0.5 * gap[1]
    with pytest.raises(ValueError, match="at least one room"):
        inpaint.SceneLibrary(0)


def test_align_finds_the_shift(library):
    picture = library.picture(2, (64, 64))
    m = masks.centre_box(1, 64, area=0.1)
    moved = torch.roll(picture, (4, -6), (2, 3))
    shifted, error, shift = inpaint.align(moved, picture, m)
    assert shift == (-4, 6) and error < 1e-6


def test_cheapest_seam_holds_the_hole_and_is_no_dearer_than_its_edge(library):
    a, b = library.picture(1, (64, 64)), library.picture(5, (64, 64))
    m = masks.centre_box(1, 64, area=0.1)
    take = inpaint.cheapest_seam(a, b, m, band=8)
    assert set(take.unique().tolist()) == {0.0, 1.0}
    assert (take >= m).all() and (take <= masks.dilate(m, 8)).all()
    gap = (a - b).abs().sum(1, keepdim=True) * (1 - m)
    cost = lambda r: sum(float(((g[..., 1:] + g[..., :-1]) * (q[..., 1:] != q[..., :-1])).sum())
                         for g, q in ((gap, r), (gap.mT, r.mT)))
    assert cost(take) <= cost(m) + 1e-2
    assert torch.equal(inpaint.cheapest_seam(a, a, m, band=3), inpaint.cheapest_seam(a, a, m, band=3))


def test_poisson_takes_gradients_from_one_and_the_border_from_the_other(smooth):
    image, m = smooth[0][:1], smooth[1][:1]
    other = (image * 0.5 + 0.2).flip(1).contiguous()
    assert torch.allclose(inpaint.poisson(image, image * 0.5 + 0.3, m * 0 + m), inpaint.poisson(image, image * 0.5, m), atol=1e-5)
    free = inpaint.poisson(image, other, m, clamp=False)
    cross = torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]])
    laplace = torch.nn.functional.conv2d((free - other).transpose(0, 1), cross)
    assert laplace.masked_select(m[..., 1:-1, 1:-1] > 0).abs().max() < 1e-4
    assert torch.equal(free * (1 - m), image * (1 - m))
    assert torch.allclose(inpaint.poisson(image, image, m), image, atol=1e-5)


def test_scene_completion_may_cut_outside_the_hole_only_when_told(library):
    image, m = library.picture(7, (64, 64)), masks.centre_box(1, 64, area=0.1)
    kept = inpaint.scene_completion(image, m, library, k=2)
    assert torch.equal(kept * (1 - m), image * (1 - m)) and rmse(kept, image, m) < 0.05     # it finds the room itself
    wide = inpaint.scene_completion(image.flip(1).contiguous(), m, library, k=2, band=6)
    assert wide.shape == image.shape


# --- the context network ----------------------------------------------------------------------------------

def test_context_network_saves_loads_and_says_what_is_missing(tmp_path):
    torch.manual_seed(0)
    net = inpaint.FillNet((4, 8, 8), (2,)).eval()
    net.save(tmp_path / "net")
    again = inpaint.FillNet.load(tmp_path / "net")
    image, m = torch.rand(1, 3, 32, 40, generator=gen()), masks.random_box(1, (32, 40), gen())
    assert torch.allclose(net(image, m), again(image, m), atol=1e-2) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    with pytest.raises(FileNotFoundError, match="lib.train fillnet"):
        inpaint.FillNet.load(tmp_path)
    with pytest.raises(ValueError, match="multiples of 8"):
        net(image[..., :30], m[..., :30])


def test_shipped_context_network_is_small_and_beats_grey():
    from lib import scenes, setup
    net = inpaint.load_fillnet()
    assert sum(p.numel() for p in net.parameters()) <= 350_000
    assert (setup.data_dir() / "models" / "fillnet" / "model.safetensors").stat().st_size < 1e6
    room = scenes.render([scenes.sample(s) for s in scenes.seeds("test", 4)]).rgb
    m = masks.free_form(4, 128, gen(1))
    assert rmse(inpaint.fillnet(room, m), room, m) < 0.7 * rmse(inpaint.grey(room, m), room, m)


def test_gated_convolution():
    layer, x = inpaint.Gated(3, 5, 2), torch.rand(1, 3, 8, 8)
    feature, gate = layer.conv(x).chunk(2, 1)
    assert torch.equal(layer(x), torch.nn.functional.silu(feature) * gate.sigmoid()) and layer(x).shape == (1, 5, 4, 4)


# --- diffusion in pixels ----------------------------------------------------------------------------------

def repaint_scheduler(steps, jump=(10, 10)):
    from diffusers import RePaintScheduler
    base = diffusion.teach_scheduler()
    base.register_to_config(steps_offset=0)                               # as theirs: all 1000 levels can be walked
    theirs = RePaintScheduler(trained_betas=base.betas.numpy(), eta=1.0)
    theirs.set_timesteps(steps, *jump)
    return diffusion.ddim(base, steps), theirs


@pytest.mark.parametrize("steps", [50, 1000])
def test_repaint_step_and_jump_equal_diffusers(steps):
    ours, theirs = repaint_scheduler(steps)
    x, output, x0 = (torch.randn(2, 3, 16, 16, generator=gen(i)) for i in range(3))
    m, x0 = masks.random_box(2, 16, gen(4)), x0.clamp(-1, 1)
    for t in (980, 501, 21, 1, 0):
        a = inpaint.repaint_step(ours, output, t, x, x0, m, gen(7))
        assert torch.equal(a, theirs.step(output, t, x, x0, 1 - m, gen(7)).prev_sample)
    stride = 1000 // steps
    for t in (0, 300):
        assert torch.equal(inpaint.forward_jump(ours, x, range(t, t + stride), gen(7)), theirs.undo_step(x, t, gen(7)))


def test_a_whole_run_equals_repaint_with_all_levels_walked():
    """Stride 1, where diffusers' jumps are exact: the same walk, the same numbers, to the last bit."""
    base = diffusion.teach_scheduler()
    base.register_to_config(num_train_timesteps=20, steps_offset=0)
    base.betas, base.alphas_cumprod = base.betas[::50], torch.cumprod(1 - base.betas[::50], 0)
    from diffusers import RePaintScheduler
    theirs = RePaintScheduler(num_train_timesteps=20, trained_betas=base.betas.numpy(), eta=1.0)
    theirs.set_timesteps(20, 4, 3)
    base.set_timesteps(20)
    walk = inpaint.repaint_times(list(range(20)), 4, 3)
    x0, m = torch.rand(1, 3, 8, 8, generator=gen(2)) * 2 - 1, masks.random_box(1, 8, gen(3))
    guess = lambda x, t: torch.tanh(x + 0.01 * float(t))
    ours = reference = torch.randn(1, 3, 8, 8, generator=gen())
    g, r, last = gen(5), gen(5), 20
    for way, t in walk:
        if way == "down":
            ours = inpaint.repaint_step(base, guess(ours, t), t, ours, x0, m, g)
        else:
            ours = inpaint.forward_jump(base, ours, [t], g)
    for t in theirs.timesteps.tolist():
        if t < last:
            reference = theirs.step(guess(reference, t), t, reference, x0, 1 - m, r).prev_sample
        else:
            reference = theirs.undo_step(reference, last, r)
        last = t
    assert len(walk) == len(theirs.timesteps) and torch.equal(ours, reference)


def test_repaint_walk():
    assert inpaint.repaint_times([1, 2, 3], 10, 5) == [("down", 2), ("down", 1), ("down", 0)]
    walk = inpaint.repaint_times(list(range(4)), 2, 2)
    assert walk == [("down", 3), ("down", 2), ("down", 1), ("down", 0), ("up", 0), ("up", 1), ("down", 1), ("down", 0)]
    _, theirs = repaint_scheduler(50, (10, 10))
    assert len(inpaint.repaint_times(list(range(50)), 10, 10)) == len(theirs.timesteps)


def test_put_back_is_clean_or_noised_to_the_level():
    levels, _ = repaint_scheduler(50)
    x, x0, noise = (torch.randn(1, 3, 8, 8, generator=gen(i)) for i in range(3))
    m = masks.random_box(1, 8, gen(4))
    clean = inpaint.put_back(levels, x, x0, m, 500, "clean")
    assert torch.equal(clean * (1 - m), x0 * (1 - m)) and torch.equal(clean * m, x * m)
    noised = inpaint.put_back(levels, x, x0, m, 500, "noised", noise)
    assert torch.allclose(noised * (1 - m), diffusion.q_sample(levels, x0, 500, noise) * (1 - m))
    assert torch.equal(noised * m, x * m)
    assert torch.equal(inpaint.put_back(levels, x, x0, m, -1, "noised", noise), clean)
    with pytest.raises(ValueError, match='"clean" or "noised"'):
        inpaint.put_back(levels, x, x0, m, 1, "fresh")


def test_jumps_keep_the_noise_level():
    """Noise in, noise out: from the clean end up to a level, the spread is that of q_sample (own levels, not a stride more)."""
    levels, _ = repaint_scheduler(50)
    t = levels.timesteps.tolist()[-3]
    up = inpaint.forward_jump(levels, torch.zeros(50_000, 1, 1, 1), range(0, t + 1), gen())
    assert float(up.std()) == pytest.approx(float((1 - levels.alphas_cumprod[t]).sqrt()), rel=0.02)


def test_pixel_filling_gives_samples_and_any_size(eps):
    schedule = diffusion.teach_scheduler()
    image, m = torch.rand(2, 3, 96, 80, generator=gen()), masks.random_box(2, (96, 80), gen(1))
    seen = []
    out = inpaint.with_pixels(eps, schedule, image, m, size=32, samples=3, steps=5, generator=gen(2), jump=(2, 2),
                              on_step=lambda t, x: seen.append((t, tuple(x.shape))))
    assert out.shape == (6, 3, 96, 80) and seen[0][1] == (6, 3, 32, 32) and len(seen) == 5 + 2 * 2
    twice, holes = image.repeat_interleave(3, 0), m.repeat_interleave(3, 0)
    assert torch.equal(out * (1 - holes), twice * (1 - holes))
    for bad, words in ((dict(samples=0), "samples"), (dict(jump=(0, 1)), "jump is"), (dict(steps=0), "steps must be")):
        with pytest.raises(ValueError, match=words):
            inpaint.with_pixels(eps, schedule, image, m, **bad)


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
