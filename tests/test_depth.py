"""Every source of depth ends as 0 = near, 1 = far; scores and files behave."""
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib import depth as D

TESTDATA = Path(os.environ.get("LAYERS_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
NAMES = ("room_chair", "desk", "motorcycle")


def ramp(height=24, width=32, near=1.0, far=5.0):
    """True metres that grow from left (near) to right (far): (1, 1, H, W)."""
    return torch.linspace(near, far, width).expand(1, 1, height, width).contiguous()


def seen_through(source, z, tmp_path):
    """What each source would hand us for true metres z, brought in by its adapter."""
    inverse, size = 1 / z[:, 0], z.shape[-2:]
    mm = (z[0, 0] * 1000).round().numpy().astype(np.uint16)
    bytes01 = ((z - z.min()) / (z.max() - z.min()) * 255).round().numpy().astype(np.uint8)[0, 0]
    if source == "dpt":
        return D.dpt(SimpleNamespace(predicted_depth=37 * inverse + 4), size)
    if source == "depth-anything":
        return D.depth_anything(SimpleNamespace(predicted_depth=3 * inverse), size)
    if source == "depth-anything-metric":
        return D.depth_anything(SimpleNamespace(predicted_depth=z[:, 0]), size, "metric", 20)
    if source == "zoedepth":
        from transformers import ZoeDepthImageProcessor
        pad = [int((n / 2) ** 0.5 * 3) for n in size]
        padded = torch.nn.functional.pad(z, (pad[1], pad[1], pad[0], pad[0]), mode="reflect")
        return D.zoedepth(SimpleNamespace(predicted_depth=padded[:, 0]), ZoeDepthImageProcessor(), size)
    if source == "mini":
        return D.mini(SimpleNamespace(predicted_depth=2 * inverse), inverse_scale=2.0, near=1, far=8)
    if source == "png16":
        Image.fromarray(mm).save(tmp_path / "mm.png")
        return D.given(tmp_path / "mm.png", size=size)
    if source == "npy":
        np.save(tmp_path / "m.npy", z[0, 0].numpy())
        return D.given(str(tmp_path / "m.npy"))
    if source == "tiff":
        Image.fromarray(z[0, 0].numpy()).save(tmp_path / "m.tiff")
        return D.given(tmp_path / "m.tiff")
    if source == "8-bit-dark-near":
        Image.fromarray(bytes01).save(tmp_path / "a.png")
        return D.given(tmp_path / "a.png", near_is="low")
    if source == "8-bit-bright-near":
        Image.fromarray(255 - bytes01).convert("RGB").save(tmp_path / "b.png")
        return D.given(tmp_path / "b.png", near_is="high")
    if source == "inverse-array":
        return D.given(inverse[0].numpy(), kind="inverse-relative")
    return D.given(z)


METRIC = ("depth-anything-metric", "zoedepth", "mini", "png16", "npy", "tiff", "tensor")
RELATIVE = ("dpt", "depth-anything", "8-bit-dark-near", "8-bit-bright-near", "inverse-array")


@pytest.mark.parametrize("source", METRIC + RELATIVE)
def test_a_ramp_through_every_adapter_ends_near_0_far_1(source, tmp_path):
    z = ramp()
    found = seen_through(source, z, tmp_path)
    v = found.values
    assert v.shape == z.shape and v.dtype == torch.float32 and v.min() >= 0 and v.max() <= 1
    assert (v[..., 1:] - v[..., :-1]).min() >= -1e-3, "must grow from near to far"
    end = (5 - 1) / (8 - 1) if source == "mini" else 1.0  # mini: 5 m on the Miniature's scale of 1 to 8 m
    assert v[..., 0].max() < 0.02 and v[..., -1].min() > end - 0.02
    assert D.ordinal_error(v, z) < 0.01
    assert found.kind == ("metric" if source in METRIC else
                          "relative" if source.startswith("8-bit") else "inverse-relative")
    if source in METRIC:
        assert (found.metres() - z).abs().max() < 0.02
        assert found.at("3m") == pytest.approx((3 - found.near) / (found.far - found.near))
    else:
        with pytest.raises(ValueError, match="metres"):
            found.metres()


def test_raw_midas_without_an_adapter_is_the_wrong_way_round():
    z = ramp()
    assert D.ordinal_error(1 / z, z) > 0.99


@pytest.mark.parametrize("seed", range(12))
def test_properties_on_random_maps(seed):
    """Order survives, metres come back, and scale and shift of a relative map do not matter."""
    g = torch.Generator().manual_seed(seed)
    h, w, b = (int(torch.randint(3, 40, (), generator=g)) for _ in range(3))
    b = 1 + b % 3
    z = 0.3 + 9 * torch.rand(b, 1, h, w, generator=g) ** 2
    metric = D.from_metric(z)
    assert torch.allclose(metric.metres(), z, atol=1e-4)
    s, t = 0.1 + 50 * torch.rand((), generator=g), 5 * torch.rand((), generator=g)
    one, two = D.from_inverse(1 / z), D.from_inverse(s / z + t)
    assert torch.allclose(one.values, two.values, atol=2e-3)
    assert D.ordinal_error(one.values, z).max() <= 0.06  # only what lies outside the percentiles may tie
    for i in range(b):  # each image of a batch is scaled on its own
        assert torch.allclose(one.values[i], D.from_inverse(1 / z[i:i + 1]).values[0], atol=1e-6)


def test_percentiles_ignore_a_few_wild_pixels():
    z = ramp(50, 64)
    inverse = 1 / z
    wild = inverse.clone()
    wild[..., 0, :3] = 1e4
    assert (D.from_inverse(wild).values - D.from_inverse(inverse).values)[..., 1:, :].abs().max() < 0.02


# ------------------------------------------------------------------ AT

@pytest.mark.parametrize("text, expected", [(0.5, 0.5), ("0.5", 0.5), (" 0.25 ", 0.25), ("3m", 0.5),
                                            ("3.0 M", 0.5), (0, 0.0), (1, 1.0), ("1m", 0.0), ("5m", 1.0)])
def test_at_reads_numbers_and_metres(text, expected):
    assert D.given(ramp()).at(text) == pytest.approx(expected)


@pytest.mark.parametrize("text, words", [
    (1.5, "outside the scene.*'1.5m'"), (-0.1, "outside the scene"),
    ("9m", "1.00m to 5.00m"), ("0.2m", "outside"), (True, "not a depth"),
    ("near", "not a depth"), ("", "not a depth"), ("nan", "not a depth"), (None, "not a depth"),
    ("inf", "not a depth"), ("m", "not a depth")])
def test_at_says_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        D.given(ramp()).at(text)


def test_a_scale_that_is_the_wrong_way_round_is_refused():
    with pytest.raises(ValueError, match="far .* must be more metres than near"):
        D.from_metric(ramp(), near=8.0, far=1.0)


def test_metres_are_refused_on_a_relative_map():
    with pytest.raises(ValueError, match="metres.*from 0"):
        D.from_inverse(1 / ramp()).at("2.4m")


def test_at_gives_one_threshold_per_image_when_ranges_differ():
    t = D.from_metric(torch.cat([ramp(near=1, far=5), ramp(near=2, far=6)])).at("3m")
    assert t.shape == (2, 1, 1, 1) and t.flatten().tolist() == pytest.approx([0.5, 0.25])


# ------------------------------------------------------------------ files, holes, errors

def test_holes_take_the_nearest_measurement_and_stay_marked():
    z = ramp(20, 40)
    z[..., :20], z[..., 20:36], z[..., 36:] = 1.0, 3.0, 6.0  # steps between three surfaces
    mm = (z[0, 0] * 1000).numpy().astype(np.uint16)
    mm[5:9, 10:30] = 0
    raw, filled = D.given(mm, fill=False), D.given(mm)
    assert (raw.values[..., 5:9, 10:30] == 1).all()
    assert torch.equal(filled.values, D.given(z).values)  # the edge is sharp again and in its place
    assert filled.valid.sum() == mm.size - 80 and torch.equal(D.fill_holes(filled).values, filled.values)
    assert set(filled.values.unique().tolist()) == set(raw.values.unique().tolist())  # no depth was invented


def in_shadow(z, focal, baseline=0.075):
    """What a depth camera of that baseline measures of metres z (1, 1, H, W), and the mask of what it cannot see."""
    seen = D.imitate_sensor(z, focal, baseline, step=1e-3, reach=1e3, margin=0)
    return torch.where(seen > 0, z, 0.0), seen == 0


def nearest(seen, near, far):
    """The metres that the nearest measurement gives: what `fill_holes` does where it knows no metres."""
    found = D.from_metric(seen, near, far)
    filled = D.fill_holes(D.DepthMap(found.values, "relative", found.near, found.far, found.valid))
    return near + filled.values * (far - near)


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_stereo_shadow_is_filled_with_what_lies_behind(mirrored):
    turn = lambda x: x.flip(-1) if mirrored else x
    fill = lambda x: turn(D.fill_holes(D.from_metric(turn(x), near=1.0, far=5.0)).metres())
    z = torch.full((1, 1, 12, 200), 4.0)
    z[..., 100:140] = 1.5
    seen, shadow = in_shadow(z, focal=0.82 * 200)
    width = int(shadow[0, 0, 0].sum())
    assert shadow[..., 100 - width:100].all() and width > 3 and shadow.sum() == 12 * width   # beside the box, left
    assert nearest(seen, 1.0, 5.0)[shadow].min() < 1.6             # half of it would go to the box
    seen[..., 2:9, 138:144] = 0                                    # a hole on the box's other side
    seen[..., 2:9, 20:30] = 0                                      # and one on the wall
    filled = fill(seen)
    assert torch.allclose(filled[shadow], torch.tensor(4.0), atol=1e-5)
    assert torch.allclose(filled[..., 5, 138:144], torch.tensor([1.5, 1.5, 1.5, 4, 4, 4]), atol=1e-5)
    assert torch.allclose(filled[..., 20:30], torch.tensor(4.0), atol=1e-5)
    seen[..., 90:110] = 0                                          # wider than a shadow of that box can be
    assert torch.allclose(fill(seen)[..., 90:100], torch.tensor(4.0), atol=1e-5)
    assert torch.allclose(fill(seen)[..., 100:110], torch.tensor(1.5), atol=1e-5)


def test_a_wide_hole_that_ends_where_the_camera_ends_is_the_wall():
    z = torch.full((1, 1, 12, 200), 4.0)
    z[..., 100:140] = 1.5
    z[..., 40:120] = 0
    filled = D.fill_holes(D.from_metric(z, near=1.0, far=9.0)).metres()[..., 40:120]
    assert torch.allclose(filled, torch.tensor(4.0), atol=1e-5)
    z[..., 180:] = 8.0                                             # the camera sees farther than that wall
    filled = D.fill_holes(D.from_metric(z, near=1.0, far=9.0)).metres()[..., 40:120]
    assert (filled[..., :40] > 3.9).all() and (filled[..., 40:] < 1.6).all()


def test_in_rendered_rooms_shadows_lie_behind_and_other_holes_lose_little():
    from lib import scenes
    error = {"shadow": [], "nearest": [], "dots": [], "dots, nearest": [], "reach": [], "reach, nearest": []}
    for seed in scenes.seeds("val", 10, start=500):
        scene = scenes.sample(seed)
        z = scenes.render(scene, size=160, samples=1, shadow_rays=1).depth
        seen, shadow = in_shadow(z, D.pinhole((160, 160), scene.camera.fov)[0])
        rows, columns = ((z[..., 1:] / z[..., :-1]).log().abs() > 0.1)[0, 0].nonzero().T
        pick = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:8]
        dots = torch.zeros_like(shadow)                   # small holes on outlines that have another cause
        dots[0, 0, rows[pick], columns[pick]] = True
        dots = torch.nn.functional.max_pool2d(dots.float(), 5, 1, 2) > 0
        seen[dots] = 0
        mine, other = D.fill_holes(D.from_metric(seen, 1.0, 8.0)).metres(), nearest(seen, 1.0, 8.0)
        dots = dots & ~shadow
        for name, x, where in (("shadow", mine, shadow), ("nearest", other, shadow), ("dots", mine, dots),
                               ("dots, nearest", other, dots)):
            error[name].append(((x - z).abs() / z)[where])
        seen = torch.where(z < 5.3, z, 0.0)
        for name, x in (("reach", D.fill_holes(D.from_metric(seen, 1.0, 8.0)).metres()),
                        ("reach, nearest", nearest(seen, 1.0, 8.0))):
            error[name].append(((x - z).abs() / z)[seen == 0])
    mean = {name: float(torch.cat(x).mean()) for name, x in error.items()}
    assert mean["shadow"] < 0.7 * mean["nearest"] and mean["dots"] < 1.2 * mean["dots, nearest"], mean
    assert mean["reach"] < 0.8 * mean["reach, nearest"], mean


@pytest.mark.parametrize("name", NAMES)
def test_shadows_cut_into_real_depth_are_filled_with_what_lies_behind(name):
    """Measured pixels that another camera would not have seen are taken away, and guessed again."""
    path = TESTDATA / "rgbd" / f"{name}_depth_mm.png"
    if not path.exists():
        pytest.skip(f"no test data at {path}; set LAYERS_TESTDATA")
    found = D.given(path)
    _, shadow = in_shadow(found.metres(), focal=D.SENSOR_FOCAL * found.size[1])
    held_out = shadow & (found.valid > 0.5)
    seen = torch.where(shadow | (found.valid < 0.5), 0.0, found.metres())
    mine = D.fill_holes(D.from_metric(seen, found.near, found.far)).metres()
    other = nearest(seen, found.near, found.far)
    error = [float(((x / found.metres() - 1).abs())[held_out].mean()) for x in (mine, other)]
    assert held_out.sum() > 2000 and error[0] < 0.6 * error[1], error


def test_trim_keeps_stray_pixels_from_stretching_the_scale():
    z = ramp(50, 40)
    z[..., 0, 0] = 60.0
    loose, tight = D.given(z), D.given(z, trim=2)
    assert loose.far == 60 and tight.far < 5.01
    assert loose.values.median() < 0.05 and 0.4 < tight.values.median() < 0.6


@pytest.mark.parametrize("bad, words", [
    (np.full((8, 8), 1200, np.uint16), "one value everywhere"),
    (np.zeros((8, 8), np.uint16), "no measured pixel"),
    (np.full((8, 8), np.nan, np.float32), "no measured pixel"),
    (np.random.default_rng(0).random((8, 8)).astype(np.float32), "say kind"),
    (np.full((8, 8), 1500.0) + np.arange(8), "too much for metres"),
    (np.arange(64, dtype=np.uint8).reshape(8, 8), "near_is"),
    (np.ones((1, 3, 8, 8), np.float32) * 2, "one channel"),
    (np.zeros((0, 8), np.float32), "shape"),
    (np.zeros(8, np.float32), "shape"),
    (np.zeros((8, 8), bool), "not depth"),
    (np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8), "colour picture")])
def test_bad_arrays_say_what_to_do(bad, words):
    with pytest.raises(ValueError, match=words):
        D.given(bad)


def test_bad_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="No depth file"):
        D.given(tmp_path / "no.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "pickle.npy").write_bytes(b"junk")
    for name in ("broken.png", "pickle.npy"):
        with pytest.raises(ValueError, match="cannot be read as depth"):
            D.given(tmp_path / name)
    np.save(tmp_path / "d.npy", ramp()[0, 0].numpy())
    with pytest.raises(ValueError, match="32 x 24 pixels but the picture 64 x 48"):
        D.given(tmp_path / "d.npy", size=(48, 64))


def test_a_depth_map_checks_itself():
    z = ramp()
    for values in (z, torch.full_like(z, torch.nan), z[0], -z / 5):
        with pytest.raises(ValueError):
            D.DepthMap(values, "metric", 1.0, 5.0)
    with pytest.raises(ValueError, match="kind"):
        D.DepthMap(z / 5, "disparity", 1.0, 5.0)


def test_crop_and_resize_keep_the_scale():
    found = D.given(ramp(24, 32))
    part = found.crop(4, 8, 10, 12)
    assert part.size == (10, 12) and torch.equal(part.metres(), found.metres()[..., 4:14, 8:20])
    small = found.resize((12, 16))
    assert small.size == (12, 16)
    assert set(small.values.unique().tolist()) <= set(found.values.unique().tolist())  # none invented


@pytest.mark.parametrize("name", NAMES)
def test_real_sensor_depth(name):
    path = TESTDATA / "rgbd" / f"{name}_depth_mm.png"
    if not path.exists():
        pytest.skip(f"no test data at {path}; set LAYERS_TESTDATA")
    raw = np.asarray(Image.open(path))
    found = D.given(path, size=raw.shape)
    assert found.kind == "metric" and found.near == pytest.approx(raw[raw > 0].min() / 1000)
    assert torch.equal(found.valid[0, 0] > 0.5, torch.as_tensor(raw > 0))
    measured = found.valid > 0.5
    metres = torch.as_tensor(raw / 1000.0).float()[None, None]
    assert (found.metres() - metres)[measured].abs().max() < 1e-3
    facts = found.statistics()
    assert facts["measured_share"] == pytest.approx((raw > 0).mean(), abs=1e-4)
    assert facts["percentiles_m"]["median"] == pytest.approx(np.median(raw[raw > 0]) / 1000, abs=0.01)
    floor, top = found.values[..., -20:, :].median(), found.values[..., 30:60, :].median()
    assert floor < top, "the floor at our feet is nearer than what is above it"


# ------------------------------------------------------------------ alignment and scores

def test_alignment_undoes_scale_and_shift_and_ignores_holes():
    inverse = 1 / ramp()
    moved = (inverse - 0.2) / 7
    truth, valid = inverse.clone(), torch.ones_like(inverse)
    truth[..., :5, :], valid[..., :5, :] = 99, 0
    aligned, s, t = D.align_scale_shift(moved, truth, valid)
    assert torch.allclose(aligned, inverse, atol=1e-5) and s.item() == pytest.approx(7, rel=1e-4)
    assert t.item() == pytest.approx(0.2, rel=1e-4)
    with pytest.raises(ValueError, match="one value"):
        D.align_scale_shift(torch.ones_like(truth), truth)


def test_scores_by_hand():
    truth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])[None, None]  # 0: not measured
    guess = torch.tensor([[1.1, 2.0], [6.0, 3.0]])[None, None]
    assert D.abs_rel(guess, truth).item() == pytest.approx((0.1 + 0 + 0.5) / 3, rel=1e-5)
    assert D.delta1(guess, truth).item() == pytest.approx(2 / 3)
    assert D.rmse(guess, truth, truth > 0).item() == pytest.approx(((0.01 + 4) / 3) ** 0.5, rel=1e-5)
    assert D.ordinal_error(truth, truth).item() == 0 and D.ordinal_error(-truth, truth).item() == 1
    assert D.ordinal_error(torch.ones_like(truth), truth).item() == 0.5
    with pytest.raises(ValueError, match="same shape"):
        D.abs_rel(guess[..., :1], truth)


# ------------------------------------------------------------------ real architectures, small and random

@pytest.mark.parametrize("name", D.RANDOM)
def test_real_architectures_run_through_their_adapters(name):
    estimator = D.random_estimator(name)
    model, processor = estimator.model, estimator.processor
    kind = "metric" if name in ("zoedepth", "depth-anything-v2-metric") else "inverse-relative"
    image = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    found = estimator(image)
    assert found.size == (40, 56) and found.values.shape[0] == 2 and found.kind == kind
    assert found.values.min() <= 0.01 and found.values.max() >= 0.99
    pixels = processor(images=list(image), do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        raw = model(pixels).predicted_depth
    raw = torch.nn.functional.interpolate(raw[:, None], size=(40, 56), mode="bicubic")
    truth = -raw if kind == "inverse-relative" else raw
    if name != "zoedepth":  # (zoedepth's raw output still has its padding)
        assert D.ordinal_error(found.values, truth - truth.min() + 1).max() < 0.1
    with pytest.raises(ValueError, match="shape"):
        estimator(image[0])


def test_random_estimators_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(D.random_estimator("dpt")(image).values, D.random_estimator("dpt")(image).values)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="known: dpt"):
        D.random_estimator("marigold")


@pytest.mark.parametrize("name", ("dpt", "depth-anything-v2", "depth-anything-v2-metric"))
def test_resizing_is_that_of_transformers(name):
    """The adapters resize as the models' own post-processing does."""
    estimator, size = D.random_estimator(name), (50, 70)
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    outputs = estimator.model(estimator.processor(images=list(image), do_rescale=False, return_tensors="pt")["pixel_values"])
    (theirs,) = estimator.processor.post_process_depth_estimation(outputs, target_sizes=[size])
    theirs = theirs["predicted_depth"][None, None]
    ours = estimator.adapter(outputs, size)
    again = D.from_inverse(theirs) if ours.kind == "inverse-relative" else D.from_metric(theirs.clamp(1e-3, 20))
    assert torch.equal(ours.values, again.values)


# ------------------------------------------------------------------ an imitated sensor

def test_the_imitated_sensor_reads_in_steps_and_has_holes():
    z = torch.full((1, 1, 10, 60), 4.0)
    z[..., 30:40] = 2.0
    z[..., 50:] = 9.0
    glass = torch.zeros_like(z)
    glass[..., 5, :] = 1
    seen = D.imitate_sensor(z, focal=200, baseline=0.1, step=0.125, reach=6, no_return=glass, margin=6)
    assert (seen[..., :6] == 0).all() and (seen[..., 5, :] == 0).all() and (seen[..., 50:] == 0).all()
    row = seen[0, 0, 0]
    assert (row[30:40] == 2).all()                        # a disparity of 10 pixels exactly
    assert row[6:24].min() == 4 and row[41:50].min() == 4
    hidden = (row[24:30] == 0).sum()                      # the shadow is as wide as the disparities differ: 10 - 5
    assert hidden == 5 and row[24] == 4
    ramp_ = ramp(4, 500, 1.0, 5.5)
    error = (D.imitate_sensor(ramp_, 200, 0.1, margin=0) - ramp_).abs()
    assert (error <= ramp_ ** 2 / 20 / 8 / 2 * 1.3 + 1e-4).all()      # half a step of disparity, and z squared
    with pytest.raises(ValueError, match="metres > 0"):
        D.imitate_sensor(z * 0, 200)


# ------------------------------------------------------------------ points in space

def test_unprojected_floor_and_walls_are_planes_and_project_undoes_it():
    from lib import scenes
    scene = scenes.sample(20000006)
    seen = scenes.render(scene, size=(48, 64), samples=1)
    points = D.unproject(seen.depth, scene.camera)
    x, y, z = points[0]
    room = scene.room
    gap = torch.stack([y.abs(), (y - room.height).abs(), (x.abs() - room.half_width).abs(), (z - room.back).abs()]).amin(0)
    assert gap[seen.ids[0, 0] < 0].max() < 1e-3
    places, depth = D.project(points[0].permute(1, 2, 0), scene.camera, (48, 64))
    u, v = places.unbind(-1)
    assert torch.allclose(u, (torch.arange(64.0) + 0.5).expand(48, 64), atol=1e-3)
    assert torch.allclose(v, (torch.arange(48.0) + 0.5)[:, None].expand(48, 64), atol=1e-3)
    assert torch.allclose(depth, seen.depth[0, 0], atol=1e-4)
    f, cx, cy = D.pinhole((100, 50), 90)
    assert (f, cx, cy) == (pytest.approx(50), 25, 50)
    with pytest.raises(ValueError, match="angle"):
        D.pinhole((8, 8), 180)


def test_metres_of_any_map_that_has_them_or_can_be_aligned():
    z = ramp()
    assert torch.allclose(D.metres_from(D.from_metric(z), z), z, atol=1e-5)
    inner = slice(2, -2)                                   # beyond the 2nd and 98th percentile the map is cut
    relative = D.from_inverse(37 / z + 4)
    assert torch.allclose(D.metres_from(relative, z)[..., inner], z[..., inner], rtol=0.03)
    holed = z.clone()
    holed[..., :6, :] = 0                                  # a truth with holes
    assert torch.allclose(D.metres_from(relative, holed)[..., inner], z[..., inner], rtol=0.03)
    assert D.metres_from(relative, z, farthest=3).max() <= 3.0001
    with pytest.raises(ValueError, match="any curve"):
        D.metres_from(D.from_relative(z, near_is="low"), z)
