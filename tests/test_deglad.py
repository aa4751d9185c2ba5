"""DeGLaD: disjoint layers that sum to the picture, soft edges against the renderer's truth, choosing d, errors."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import deglad, depth, scenes
from lib.depth import DepthMap

TESTDATA = Path(os.environ.get("LAYERS_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))


def gen(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


@pytest.fixture(scope="module")
def rooms():
    """Four rooms: image, metric DepthMap, one threshold each (behind the nearest thing), true coverage."""
    drawn, cover, ats = [], [], []
    for seed in scenes.seeds("val", 4):
        scene = scenes.sample(seed)
        at = min(scene.depth_of(i) + t.footprint for i, t in enumerate(scene.things)) + 0.1
        fine = scenes.render(scene, size=512, samples=1, shadow_rays=1)
        drawn.append(scenes.render(scene))
        cover.append(F.avg_pool2d((fine.depth < at).float(), 4))
        ats.append((at - scenes.NEAR) / (scenes.FAR - scenes.NEAR))
    z = depth.from_metric(torch.cat([r.depth for r in drawn]), near=scenes.NEAR, far=scenes.FAR)
    return torch.cat([r.rgb for r in drawn]), z, torch.tensor(ats), torch.cat(cover)


@pytest.fixture
def ramp():
    """Depth grows evenly from left (0) to right (1): (1, 1, 24, 33), and a picture."""
    z = torch.linspace(0, 1, 33).expand(1, 1, 24, 33).clone()
    return torch.rand(1, 3, 24, 33, generator=gen()), z


# --- the split --------------------------------------------------------------------------------------------

def test_hard_layers_are_disjoint_and_sum_to_the_picture_bit_for_bit(rooms):
    image, z, ats, _ = rooms
    cut = deglad.split(image, z, ats)
    fg, bg = cut.foreground[:, 3:], cut.background[:, 3:]
    assert not (fg * bg).any() and torch.equal(fg + bg, torch.ones_like(fg)) and torch.equal(fg, cut.mask)
    assert torch.equal(cut.foreground[:, :3] * fg + cut.background[:, :3] * bg, image)
    assert torch.equal(deglad.recompose(cut), image)
    assert not cut.foreground[:, :3][(fg == 0).expand_as(image)].any()     # nothing hides under alpha 0
    assert torch.equal(cut.fill_mask, cut.mask) and not cut.filled and not cut.holes.any()


def test_near_is_foreground_and_the_threshold_itself_is_background(ramp):
    image, z = ramp
    cut = deglad.split(image, z, 0.5)
    assert torch.equal(cut.mask, (z < 0.5).float())
    assert cut.mask[..., :16].min() == 1 and cut.mask[..., 16:].max() == 0 and z[0, 0, 0, 16] == 0.5


def test_metres_and_numbers_mean_the_same_cut(ramp):
    image, z = ramp
    metric = DepthMap(z, "metric", 1.0, 5.0)
    assert torch.equal(deglad.split(image, metric, "3m").mask, deglad.split(image, metric, 0.5).mask)
    assert deglad.split(image, metric, "3m").depth_value == 0.5


def test_one_threshold_per_picture(ramp):
    image, z = (torch.cat([x, x]) for x in ramp)
    cut = deglad.split(image, z, torch.tensor([0.25, 0.75]))
    assert cut.mask[0].sum() == 24 * 8 and cut.mask[1].sum() == 24 * 24


def test_foreground_grows_with_d(rooms):
    image, z, _, _ = rooms
    shares = [deglad.split(image, z, d, allow_empty=True).mask.mean() for d in (0.2, 0.3, 0.45, 0.6)]
    assert all(a < b for a, b in zip(shares, shares[1:]))


def test_sensor_holes_are_filled_and_flagged(ramp):
    image, z = ramp
    torn = z.clone()
    torn[..., 5:9, 3:7] = float("nan")
    cut = deglad.split(image, torn, 0.5)
    assert torch.equal(cut.holes, torch.isnan(torn).float())
    assert torch.equal(cut.mask, deglad.split(image, z, 0.5).mask)         # surrounded by near: near
    assert torch.equal(deglad.recompose(cut), image)


def test_real_sensor_depth():
    from lib.show import read_image
    if not TESTDATA.is_dir():
        pytest.skip("no test photographs (shared/testdata, or LAYERS_TESTDATA)")
    image = read_image(TESTDATA / "rgbd" / "room_chair.jpg")
    z = depth.given(TESTDATA / "rgbd" / "room_chair_depth_mm.png", size=image.shape[-2:])
    cut = deglad.split(image, z, deglad.suggest(z), soft=2, fill="telea")
    facts = deglad.statistics(cut, z)
    print(facts)
    assert 0.02 < facts["fg_share"] < 0.98 and facts["unmeasured_share"] > 0
    assert facts["fg_depth_m"][2] < facts["bg_depth_m"][2]
    assert torch.allclose(deglad.recompose(cut), image, atol=1e-5)


# --- soft edges -------------------------------------------------------------------------------------------

def test_soft_layers_sum_to_the_picture(rooms):
    image, z, ats, _ = rooms
    cut = deglad.split(image, z, ats, soft=1)
    assert 0 <= cut.mask.min() and cut.mask.max() <= 1 and ((cut.mask > 0) & (cut.mask < 1)).any()
    assert torch.allclose(deglad.recompose(cut), image, atol=1e-6)
    assert torch.allclose(cut.foreground[:, 3:] + cut.background[:, 3:], torch.ones_like(cut.mask), atol=1e-6)


def test_soft_edges_halve_the_error_against_the_true_coverage(rooms):
    image, z, ats, true = rooms
    hard = deglad.split(image, z, ats).mask
    soft = deglad.split(image, z, ats, soft=1).mask
    band = (F.max_pool2d(true, 3, 1, 1) > 0) & (F.max_pool2d(1 - true, 3, 1, 1) > 0)
    rmse = lambda a: float(((a - true)[band] ** 2).mean().sqrt())
    blurred = deglad.blur(hard, 0.5)
    print(f"alpha RMSE at edges: hard {rmse(hard):.3f}, blurred {rmse(blurred):.3f}, soft {rmse(soft):.3f}")
    assert rmse(soft) < 0.6 * rmse(hard) and rmse(soft) < 0.8 * rmse(blurred)


def test_soft_edges_change_only_the_band(rooms):
    image, z, ats, _ = rooms
    hard, soft = (deglad.split(image, z, ats, soft=s).mask for s in (0, 2))
    changed = hard != soft
    near_edge = (F.max_pool2d(hard, 5, 1, 2) > 0) & (F.max_pool2d(1 - hard, 5, 1, 2) > 0)
    assert changed.any() and not (changed & ~near_edge).any()


def test_a_surface_that_runs_through_d_gets_its_share_from_depth(ramp):
    """Columns are 1/32 apart; the one whose centre lies a quarter pixel before d is 3/4 nearer."""
    image, z = ramp
    cut = deglad.split(image, z, float(z[0, 0, 0, 12]) + 0.25 / 32, soft=1)
    assert torch.allclose(cut.mask[..., 12], torch.tensor(0.75), atol=1e-4)
    assert cut.mask[..., 11].min() == 1 and cut.mask[..., 13].max() == 0


def test_colour_decides_where_depth_jumps():
    """A dark square on a bright wall, mixed 30 % at one column of its rim."""
    z = torch.full((1, 1, 32, 32), 0.8)
    z[..., 8:24, 8:24] = 0.2
    image = torch.where(z < 0.5, 0.1, 0.9).expand(1, 3, 32, 32).clone()
    image[..., 8:24, 8] = 0.3 * 0.1 + 0.7 * 0.9
    cut = deglad.split(image, z, 0.5, soft=1)
    assert abs(float(cut.mask[0, 0, 16, 8]) - 0.3) < 0.08
    clean = deglad.fill_background(cut, "telea").foreground
    before, after = (abs(float(x[0, 0, 16, 8]) - 0.1) for x in (cut.foreground, clean))
    assert after < 0.2 * before                                            # the wall's white is out of the rim


# --- filling and more layers ------------------------------------------------------------------------------

@pytest.mark.parametrize("soft", [0, 1])
def test_filled_background_has_no_hole_and_recomposes(rooms, soft):
    image, z, ats, _ = rooms
    cut = deglad.split(image[:3], DepthMap(z.values[:3], "metric", 1.0, 8.0), ats[:3], soft=soft, fill="telea", grow=0)
    assert cut.filled and cut.background.shape == image[:3].shape
    outside = (cut.fill_mask == 0).expand_as(cut.background)
    assert torch.equal(cut.background[outside], image[:3][outside])
    assert torch.allclose(deglad.recompose(cut), image[:3], atol=1e-6)


def test_filling_comes_nearer_to_what_is_behind_than_grey():
    """A ball before a wall: the renderer knows the wall."""
    room = scenes.sample(scenes.seeds("val", 1)[0], things=1)
    with_it, without = scenes.render([room, room.without(0)]).rgb.split(1)
    hole = (scenes.render(room).ids == 0).float()
    z = torch.where(hole > 0, 0.2, 0.8)
    def error(method, grow=None):
        cut = deglad.split(with_it, z, 0.5, fill=method, grow=grow)
        return float(((cut.background - without) ** 2 * hole).sum() / (3 * hole.sum())) ** 0.5
    found = {m: error(m) for m in ("grey", "telea", "biharmonic")}
    print(found, "not grown:", error("biharmonic", 0))
    assert found["telea"] < found["grey"] and found["biharmonic"] < found["grey"]
    assert found["biharmonic"] < error("biharmonic", 0)                    # mixed pixels at the rim spread


def test_filling_by_function_and_by_model(make_pipe):
    z = torch.full((1, 1, 128, 128), 0.8)
    z[..., 40:80, 30:90] = 0.3
    image = torch.rand(1, 3, 128, 128, generator=gen())
    seen = []
    cut = deglad.split(image, z, 0.5, fill=lambda i, m: seen.append(m) or torch.zeros_like(i), grow=2)
    assert seen[0].sum() > cut.mask.sum() and not (cut.background * cut.mask).any()
    cut = deglad.split(image, z, 0.5, fill=make_pipe(inpaint=True), prompt="a room", steps=2, generator=gen())
    seen = 1 - cut.fill_mask
    assert torch.isfinite(cut.background).all() and torch.equal(cut.background * seen, image * seen)
    with pytest.raises(ValueError, match="one filling"):
        deglad.split(image, z, 0.5, fill=make_pipe(inpaint=True), samples=3)


@pytest.mark.parametrize("soft", [0, 1.5])
@pytest.mark.parametrize("ats", [[0.5], [0.3, 0.45], [0.25, 0.35, 0.45, 0.6]])
def test_many_layers_recompose_to_the_picture(rooms, soft, ats):
    image, z, _, _ = rooms
    parts = deglad.layers(image, z, ats, soft)
    assert len(parts) == len(ats) + 1 and all(p.shape == (4, 4, 128, 128) for p in parts)
    out = deglad.recompose(parts)
    assert torch.equal(out, image) if not soft else torch.allclose(out, image, atol=1e-5)
    if not soft:
        assert torch.equal(sum(p[:, 3:] for p in parts), torch.ones_like(z.values))
        for k, p in enumerate(parts):
            inside = z.values[p[:, 3:] == 1]
            assert (k == 0 or inside.min() >= ats[k - 1]) and (k == len(ats) or inside.max() < ats[k])


def test_last_of_many_layers_can_be_filled(rooms):
    image, z, _, _ = rooms
    parts = deglad.layers(image, z, [0.3, 0.45], fill="telea")
    assert parts[-1].shape == image.shape
    assert torch.allclose(deglad.recompose(parts), image, atol=1e-6)


# --- choosing d -------------------------------------------------------------------------------------------

def two_humps():
    z = torch.cat([torch.rand(600, generator=gen()) * 0.1 + 0.2, torch.rand(1000, generator=gen()) * 0.2 + 0.7])
    return z.view(1, 1, 40, 40)


@pytest.mark.parametrize("method", ["otsu", "valley"])
def test_suggestions_find_the_gap(method):
    d = deglad.suggest(two_humps(), method)
    assert 0.29 < d < 0.71 and (two_humps() < d).sum() == 600


def test_otsu_agrees_with_scikit_image(rooms):
    from skimage.filters import threshold_multiotsu, threshold_otsu
    for z in rooms[1].values[:3]:
        z = z[None]
        step = float(z.max() - z.min()) / 128
        assert abs(deglad.suggest(z) - threshold_otsu(z.numpy(), 128)) <= step
        assert np.abs(np.array(deglad.suggest(z, n=2)) - threshold_multiotsu(z.numpy(), 3, 128)).max() <= step


def test_quantiles_share_the_pixels(rooms):
    z = rooms[1].values[:1]
    for k, d in enumerate(deglad.suggest(z, "quantile", n=3), 1):
        assert abs(float((z < d).float().mean()) - k / 4) < 0.01


def test_every_suggestion_splits(rooms):
    image, z, _, _ = rooms
    for i in range(4):
        for method in ("otsu", "quantile"):
            one = z.values[i:i + 1]
            deglad.split(image[i:i + 1], one, deglad.suggest(one, method))
    two = torch.tensor([0.25, 0.75]).repeat(32).view(1, 1, 8, 8)
    for method in ("otsu", "quantile"):
        assert deglad.split(torch.rand(1, 3, 8, 8), two, deglad.suggest(two, method)).mask.mean() == 0.5


def test_holes_do_not_count_for_suggestions(ramp):
    z = ramp[1].clone()
    z[..., 20:] = float("nan")
    assert deglad.suggest(z, "quantile") < 0.5
    one_hump = torch.special.ndtri(torch.linspace(0.01, 0.99, 1600)) * 0.1 + 0.5
    with pytest.raises(ValueError, match="one peak"):
        deglad.suggest(one_hump.view(1, 1, 40, 40), "valley")


def test_depth_under_a_click(ramp):
    image, z = ramp
    assert abs(deglad.depth_at(z, x=8, y=5) - 0.25) < 1e-6
    torn = z.clone()
    torn[..., 3:9, 6:11] = float("nan")
    assert 0.1 < deglad.depth_at(torn, 8, 5) < 0.4
    d = deglad.depth_at(z, 8, 5)
    assert deglad.split(image, z, d).mask[0, 0, 5, 8] == 0 and deglad.split(image, z, d + 0.02).mask[0, 0, 5, 8] == 1


def test_statistics(ramp):
    image, z = ramp
    facts = deglad.statistics(deglad.split(image, DepthMap(z, "metric", 1.0, 5.0), "3m"), DepthMap(z, "metric", 1.0, 5.0))
    assert facts["fg_share"] == pytest.approx(16 / 33) and facts["pieces"] == 1 and facts["edge_pixels"] == 24
    assert facts["threshold"] == 0.5 and facts["fg_depth_m"][0] == 1.0 and facts["bg_depth_m"] == [3.0, 4.0, 5.0]


# --- errors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (dict(at=0.0), r"nothing is nearer than d=0.00; the scene's depths span 0.00\.\.1.00, choose d between"),
    (dict(at=1.5), "outside the scene"),
    (dict(at="2m"), "no metres|has none"),
    (dict(at="near"), "is not a depth"),
    (dict(depth=torch.full((1, 1, 24, 33), 0.4)), "one value everywhere"),
    (dict(depth=torch.full((1, 1, 24, 33), float("nan"))), "no measured pixel"),
    (dict(depth=torch.rand(1, 1, 24, 30)), "24x30 but the image is 24x33"),
    (dict(depth=torch.rand(2, 1, 24, 33)), "2 depth maps do not fit 1 images"),
    (dict(depth=torch.rand(24, 33)), r"\(B, 1, H, W\)"),
    (dict(depth=torch.rand(1, 1, 24, 33) * 5), "DepthMap by lib.depth.from_metric"),
    (dict(image=torch.rand(1, 3, 24, 33) * 255), r"\[0, 1\]"),
    (dict(image=torch.rand(3, 24, 33)), r"\(B, 3, H, W\)"),
    (dict(soft=-1), "soft must be"),
    (dict(at=torch.tensor([0.1, 0.2])), "2 thresholds do not fit 1"),
    (dict(fill="magic"), "Unknown filling method"),
    (dict(fill="telea", grow=30), "covers the whole picture"),
])
def test_errors_say_what_is_wrong_and_what_to_do(ramp, change, words):
    image, z = ramp
    with pytest.raises(ValueError, match=words):
        deglad.split(**{"image": image, "depth": z, "at": 0.5, **change})


def test_a_cut_outside_the_scene_names_its_metres(ramp):
    image, z = ramp
    metric = DepthMap(z * 0.5 + 0.25, "metric", 1.0, 5.0)                  # surfaces from 2 m to 4 m
    with pytest.raises(ValueError, match=r"everything is nearer than d=0.88 \(4.50m\).*\(2.00m..4.00m\)"):
        deglad.split(image, metric, "4.5m")
    empty = deglad.split(image, metric, "1.5m", allow_empty=True, fill="telea")
    assert not empty.mask.any() and torch.equal(empty.background, image)


def test_errors_of_many_layers_and_suggestions(ramp):
    image, z = ramp
    with pytest.raises(ValueError, match="must rise"):
        deglad.layers(image, z, [0.5, 0.3])
    with pytest.raises(ValueError, match="one layer would be empty"):
        deglad.layers(image, z, [0.51, 0.52])
    with pytest.raises(ValueError, match="Unknown method 'best'"):
        deglad.suggest(z, "best")
    with pytest.raises(ValueError, match="one value everywhere"):
        deglad.suggest(torch.full((1, 1, 8, 8), 0.5))
    with pytest.raises(ValueError, match=r"outside the picture: x is 0..32"):
        deglad.depth_at(z, 40, 2)
    with pytest.raises(ValueError, match="no layers"):
        deglad.recompose([])


# --- thin parts, and depth gone wrong -----------------------------------------------------------------------

def test_closed_form_matting_solves_a_known_mixture():
    """Two flat colours mixed by a known alpha: the only unknown is alpha, and the linear model is exact."""
    true = torch.linspace(-0.5, 1.5, 40).clamp(0, 1).expand(1, 1, 24, 40).clone()
    a, b = (torch.tensor(c).view(1, 3, 1, 1) for c in ((0.9, 0.2, 0.1), (0.1, 0.3, 0.8)))
    image = true * a + (1 - true) * b
    unknown = ((true > 0) & (true < 1)).float()
    start = torch.where(unknown > 0, torch.full_like(true, 0.5), true)
    found = deglad.matte(image, start, unknown)
    assert (found - true).abs().max() < 0.01 and torch.equal(found[unknown == 0], true[unknown == 0])
    assert torch.equal(deglad.matte(image, start, torch.zeros_like(unknown)), start)


def test_matting_laplacian_is_levins():
    """Against the formula written out window by window: rows sum to 0, symmetric, positive semidefinite."""
    picture, eps = torch.rand(3, 5, 6, generator=gen()), 1e-4
    mine = deglad._matting_laplacian(picture, torch.ones(5, 6, dtype=torch.bool), eps).toarray()
    want, colours = np.zeros((30, 30)), picture.double().permute(1, 2, 0).numpy().reshape(-1, 3)
    for top in range(3):
        for left in range(4):
            at = [(top + i) * 6 + left + j for i in range(3) for j in range(3)]
            mean, cov = colours[at].mean(0), np.cov(colours[at].T, bias=True)
            inverse = np.linalg.inv(cov + eps / 9 * np.eye(3))
            for p in at:
                for q in at:
                    want[p, q] += (p == q) - (1 + (colours[p] - mean) @ inverse @ (colours[q] - mean)) / 9
    assert np.allclose(mine, want, atol=1e-6) and np.allclose(mine.sum(1), 0, atol=1e-5)
    assert np.linalg.eigvalsh(mine).min() > -1e-8


def test_thin_parts_are_found_and_thick_ones_are_not():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 4:14, 4:14] = 1                                              # thick
    mask[..., 2:30, 22] = 1                                                # a pole
    thin = deglad.thin_parts(mask)
    assert thin[0, 0, 5:27, 22].all() and not thin[0, 0, 7:11, 7:11].any() and not thin[0, 0, 20:, :18].any()


def test_refine_thin_changes_only_thin_jumps_and_helps_there(rooms):
    image, z, ats, true = rooms
    d = ats.view(-1, 1, 1, 1)
    soft, fine = deglad.soft_edges(image, z, d, 1), deglad.refine_thin(image, z, d, 1)
    changed, thin = soft != fine, deglad.thin_parts(deglad.nearer(z, d))
    assert changed.any() and not (changed & (thin == 0)).any()
    error = lambda a: float(((a - true)[changed] ** 2).mean())
    assert error(fine) < error(soft) and 0 <= fine.min() and fine.max() <= 1


@pytest.mark.parametrize("kind, amount", [("shift", 0.1), ("shift", -0.1), ("scale", 0.2), ("blur", 2.0), ("noise", 0.05)])
def test_spoilt_depth_is_off_by_what_was_asked(rooms, kind, amount):
    z = rooms[1]
    wrong = deglad.spoil(z, kind, amount, gen(1))
    error = wrong.values - z.values
    assert wrong.kind == z.kind and wrong.near == z.near and wrong.values.min() >= 0 and wrong.values.max() <= 1
    inside = (wrong.values > 0) & (wrong.values < 1)
    if kind == "shift":
        assert torch.allclose(error[inside], torch.tensor(amount), atol=1e-6)
    if kind == "scale":
        assert torch.allclose(wrong.values[inside], 1.2 * z.values[inside], atol=1e-6)
    if kind == "noise":
        assert abs(float(error.std()) - amount) < 0.005 and abs(float(error.mean())) < 0.005
        assert torch.equal(wrong.values, deglad.spoil(z, kind, amount, gen(1)).values)
    assert torch.equal(deglad.spoil(z, kind, 0.0).values, z.values)


def test_spoil_says_what_it_knows(ramp):
    with pytest.raises(ValueError, match="choose one of shift, scale, blur, noise"):
        deglad.spoil(ramp[1], "twist", 1)
    with pytest.raises(ValueError, match="must be 0 or more"):
        deglad.spoil(ramp[1], "blur", -1)
