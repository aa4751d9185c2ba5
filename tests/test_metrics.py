"""lib.metrics: every score against a value worked out by hand or by another route."""
import math

import numpy as np
import pytest
import torch

from lib import metrics

KINDS, COLOURS = ("ball", "box", "chair"), ("red", "blue")


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    return metrics.Judge(KINDS, COLOURS).eval().requires_grad_(False)


def pictures(n=2, size=64, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------- the judge

def test_judge_shapes_size_and_features(judge):
    out = judge(pictures())
    assert out["depth"].shape == (2, 1, 64, 64) and (out["depth"] > 0).all()
    assert out["kind"].shape == (2, 4, 64, 64) and out["colour"].shape == (2, 3, 64, 64)
    assert [f.shape[-1] for f in judge.features(pictures())] == [32, 16, 8, 4]
    assert sum(p.numel() for p in judge.parameters()) <= 1.5e6
    with pytest.raises(ValueError, match="multiples of 16"):
        judge(torch.rand(1, 3, 60, 64))


def test_judge_knows_the_miniatures_classes():
    from lib.scenes import COLOURS as colours, KINDS as kinds
    full = metrics.Judge()
    assert full.config["kinds"] == list(kinds) and full.config["colours"] == list(colours)
    assert sum(p.numel() for p in full.parameters()) <= 1.5e6


def test_judge_learns():
    torch.manual_seed(0)
    judge = metrics.Judge(KINDS, COLOURS)
    image = pictures(4, 32)
    target = (image[:, :1] > 0.5).long()[:, 0]
    step = torch.optim.Adam(judge.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(judge(image)["kind"], target)
        step.zero_grad(), loss.backward(), step.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_judge_is_saved_and_loaded(judge, tmp_path):
    judge.save(tmp_path / "judge")
    again = metrics.Judge.load(tmp_path / "judge")
    files = sorted(p.name for p in (tmp_path / "judge").iterdir())
    assert not again.training and files == ["config.json", "model.safetensors"]
    torch.testing.assert_close(again(pictures())["kind"], judge(pictures())["kind"], rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="lib.train judge"):
        metrics.Judge.load(tmp_path / "nowhere")
    config = tmp_path / "judge" / "config.json"
    config.write_text(config.read_text().replace("48", "40"))
    with pytest.raises(ValueError, match="do not fit"):
        metrics.Judge.load(tmp_path / "judge")


def test_judge_maps_are_labels(judge):
    maps = metrics.judge_maps(judge, pictures(3), batch=2)
    assert maps["kind"].shape == (3, 1, 64, 64) and maps["kind"].dtype == torch.int64
    torch.testing.assert_close(maps["depth"], judge(pictures(3))["depth"], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------- picture scores

def test_rmse_pools_pixels_of_the_zone_before_the_root():
    a, b = torch.zeros(1, 3, 1, 4), torch.tensor([0.0, 0.3, 0.4, 0.9]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    zone = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 1, 4)
    assert float(metrics.rmse(a, b, zone)) == pytest.approx(math.sqrt((0.09 + 0.16) / 2), rel=1e-6)
    assert float(metrics.rmse(a, b, zone)) != pytest.approx((0.3 + 0.4) / 2,
                                                            rel=1e-3)  # not the mean of roots
    assert float(metrics.rmse(a, b)) == pytest.approx(math.sqrt((0.09 + 0.16 + 0.81) / 4), rel=1e-6)


def test_an_empty_zone_is_no_perfect_score():
    a = pictures(1)
    assert torch.isnan(metrics.rmse(a, a, torch.zeros(1, 1, 64, 64))).all()
    with pytest.raises(ValueError, match="zone must be"):
        metrics.rmse(a, a, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="one shape"):
        metrics.rmse(a, pictures(1, 32))


def test_psnr_agrees_with_rmse_and_scores_each_picture():
    a, b = pictures(2, seed=0), pictures(2, seed=1)
    b[1] = a[1] * 0.9
    expected = [-20 * math.log10(float(((x - y) ** 2).mean().sqrt())) for x, y in zip(a, b)]
    assert metrics.psnr(a, b).tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics.psnr(a, b, torch.ones(2, 1, 64, 64)).tolist() == pytest.approx(expected, rel=1e-5)


def test_ssim_is_skimages():
    from skimage.metrics import structural_similarity
    a = pictures(2)
    b = (a + 0.1 * pictures(2, seed=2)).clamp(0, 1)
    theirs = [structural_similarity(x.permute(1, 2, 0).numpy(), y.permute(1, 2, 0).numpy(), channel_axis=-1,
                                    sigma=1.5,
                                    gaussian_weights=True, use_sample_covariance=False, data_range=1.0)
              for x, y in zip(a, b)]
    assert metrics.ssim(a, b).tolist() == pytest.approx(theirs, abs=5e-3)
    assert metrics.ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)


def test_feat_dist_is_the_formula(judge):
    a, b = pictures(1), pictures(1, seed=3)
    by_hand = []
    for fa, fb in zip(judge.features(a), judge.features(b)):
        fa, fb = (f[0].flatten(1).double().numpy() for f in (fa, fb))
        fa, fb = fa / np.maximum(np.linalg.norm(fa, axis=0),
                                 1e-6), fb / np.maximum(np.linalg.norm(fb, axis=0), 1e-6)
        by_hand.append(((fa - fb) ** 2).sum(0).mean())
    assert float(metrics.feat_dist(judge, a, b)) == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert float(metrics.feat_dist(judge, a, a)) == 0.0


def test_feat_dist_grows_with_the_change_and_keeps_to_its_zone(judge):
    a = pictures(1)
    near, far = (a + 0.02 * pictures(1, seed=4)).clamp(0, 1), (a + 0.3 * pictures(1, seed=4)).clamp(0, 1)
    assert 0 < float(metrics.feat_dist(judge, a, near)) < float(metrics.feat_dist(judge, a, far))
    zone = torch.zeros(1, 1, 64, 64)
    zone[..., :, :16] = 1
    assert float(metrics.feat_dist(judge, a, far, zone)) != pytest.approx(float(metrics.feat_dist(judge, a,
                                                                                                  far)),
                                                                          rel=1e-3)


# ---------------------------------------------------------------------------------------------- sets

class Means(torch.nn.Module):
    num_features = 3

    def forward(self, image):
        return image.mean((-2, -1))


def test_fid_is_the_frechet_distance_of_the_features():
    from scipy.linalg import sqrtm
    real, made = pictures(40, 16), pictures(40, 16, seed=5) * 0.8
    x, y = (p.mean((-2, -1)).double().numpy() for p in (real, made))
    cx, cy = np.cov(x.T), np.cov(y.T)
    by_hand = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * np.real(sqrtm(cx @ cy)))
    assert metrics.fid(real, made, Means()) == pytest.approx(by_hand, rel=1e-3)
    assert metrics.fid(real, real, Means()) == pytest.approx(0, abs=1e-5)


def test_kid_tells_equal_sets_from_different_ones(judge):
    features = metrics.JudgeFeatures(judge)
    real, same, other = pictures(24, 32), pictures(24, 32, seed=6), pictures(24, 32, seed=7) * 0.3
    near, _ = metrics.kid(real, same, features)
    far, spread = metrics.kid(real, other, features)
    assert far > abs(near) * 2 and spread >= 0
    assert metrics.kid(real, other, features) == (far, spread)  # same seed, same subsets
    with pytest.raises(ValueError, match="subset"):
        metrics.kid(real, same, features, subset=99)


# ---------------------------------------------------------------------------------------------- contents

def test_mean_iou_by_hand():
    target = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    found = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 2]])
    counts = metrics.confusion(found, target, 3)
    # class 0: 4 hits of a union of 5; class 1: 2 of 4; class 2 is not in the truth, so it is left out
    assert metrics.mean_iou(counts) == pytest.approx((4 / 5 + 2 / 4) / 2)
    assert counts.sum() == 8 and counts[1, 2] == 1


def test_an_object_needs_thirty_connected_pixels_of_its_kind_and_colour():
    kind, colour = torch.zeros(1, 1, 16, 16, dtype=torch.long), torch.zeros(1, 1, 16, 16, dtype=torch.long)
    kind[..., :5, :6] = 2
    colour[..., :5, :6] = 1
    assert metrics.object_present(kind, colour, 2, 1)
    assert not metrics.object_present(kind, colour, 2, 3) and not metrics.object_present(kind, colour, 1, 1)
    kind[..., 2, :] = 0  # cut in two parts of 12 pixels
    assert not metrics.object_present(kind, colour, 2, 1)
    kind[...] = 0
    kind[..., ::2, ::2] = 2  # 64 pixels that do not touch
    colour[...] = 1
    assert not metrics.object_present(kind, colour, 2, 1)
    assert metrics.components(torch.ones(16, 16), torch.ones(16, 16), 1, 1) == 1


def occlusion_case():
    """The object (kind 1) shows on the left and is hidden by a thing of kind 2 on the right."""
    visible, hidden = torch.zeros(1, 1, 8, 16), torch.zeros(1, 1, 8, 16)
    visible[..., :8], hidden[..., 8:] = 1, 1
    kind = torch.where(visible > 0, 1, 2)
    return dict(kind=kind, depth=torch.where(visible > 0, 4.0, 2.0)), visible, hidden


def test_occlusion_order_right_wrong_and_undefined():
    maps, visible, hidden = occlusion_case()
    assert metrics.occlusion_order(maps, visible, hidden, 1, 2) == 1.0
    on_top = dict(maps, kind=torch.ones_like(maps["kind"]))
    assert metrics.occlusion_order(on_top, visible, hidden, 1, 2) == 0.0
    gone = dict(maps, kind=torch.full_like(maps["kind"], 2))
    assert metrics.occlusion_order(gone, visible, hidden, 1, 2) == 0.0
    nearer = dict(maps, depth=-maps["depth"])
    assert metrics.occlusion_order(nearer, visible, hidden, 1, 2) == 0.0
    assert math.isnan(metrics.occlusion_order(maps, visible, hidden * 0, 1, 2))
    alike = dict(maps, kind=torch.ones_like(maps["kind"]))
    assert metrics.occlusion_order(alike, visible, hidden, 1, 1) == 1.0  # one kind: depth decides


# ---------------------------------------------------------------------------------------------- intervals

def test_the_interval_is_paired():
    rng = np.random.default_rng(0)
    scene = rng.normal(0, 5, 40)  # scenes differ far more than the methods do
    a, b = scene + 1.0 + rng.normal(0, 0.2, 40), scene
    result = metrics.paired_bootstrap(a, b)
    assert result["excludes_zero"] and result["low"] < 1.0 < result["high"]
    assert result["high"] - result["low"] < 0.3
    assert result == metrics.paired_bootstrap(a, b)
    flipped = metrics.paired_bootstrap(b, a)
    assert flipped["diff"] == pytest.approx(-result["diff"])


def test_the_interval_of_no_difference_holds_zero():
    rng = np.random.default_rng(1)
    a = rng.normal(0, 1, 30)
    assert not metrics.paired_bootstrap(a, a + rng.normal(0, 1, 30) * np.tile([1, -1], 15))["excludes_zero"]
    assert not metrics.paired_bootstrap(a, a)["excludes_zero"]


def test_scenes_without_a_score_are_left_out_of_both():
    result = metrics.paired_bootstrap([1, 2, float("nan"), 4], [0, 1, 2, 3])
    assert result["n"] == 3 and result["diff"] == 1.0 and result["low"] == result["high"] == 1.0
    assert math.isnan(metrics.paired_bootstrap([1.0], [0.0])["low"])
    with pytest.raises(ValueError, match="same scenes"):
        metrics.paired_bootstrap([1, 2], [1])


# ---------------------------------------------------------------------------------------------- the seam

def test_seam_by_hand_and_on_typical_fillings():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 10:22, 10:22] = 1
    flat = torch.full((1, 3, 32, 32), 0.4)
    assert float(metrics.seam(flat, mask)) == 0
    assert float(metrics.seam(flat + 0.2 * mask, mask)) == pytest.approx(0.2)     # only the edge jumps, by 0.2
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    assert abs(float(metrics.seam(ramp, mask))) < 2e-3                            # the same slope everywhere
    noise = pictures(1, 32)
    assert abs(float(metrics.seam(noise, mask))) < 0.06                           # no edge among jumps everywhere
    assert float(metrics.seam(noise * (1 - mask) + 2 * mask, mask)) > 0.5


def test_seam_of_batches_and_its_errors():
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 4:9] = 1
    two = pictures(2, 16)
    assert torch.allclose(metrics.seam(two, mask), torch.cat([metrics.seam(x[None], mask) for x in two]))
    assert torch.isnan(metrics.seam(two[:1], mask * 0)).all()
    with pytest.raises(ValueError, match="masks"):
        metrics.seam(two, mask[..., :8])


# ---------------------------------------------------------------------------------------------- lesson 12's parts

def features(n, c=6, seed=0, scale=1.0):
    return scale * torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def test_frechet_of_gaussians_by_scipy_and_by_hand():
    from scipy.linalg import sqrtm
    x, y = features(50), features(40, seed=1, scale=1.4) + 0.3
    (ma, a), (mb, b) = (((v.mean(0), v.T.cov())) for v in (x, y))
    by_scipy = ((ma - mb) ** 2).sum() + np.trace(a + b - 2 * sqrtm((a @ b).numpy()).real)
    assert metrics.frechet_gaussians(ma, a, mb, b) == pytest.approx(float(by_scipy), rel=1e-8)
    assert metrics.frechet_distance(x, y) == pytest.approx(float(by_scipy), rel=1e-8)
    # one dimension: (m1 - m2)^2 + (s1 - s2)^2
    one = metrics.frechet_gaussians([1.0], [[4.0]], [3.0], [[9.0]])
    assert one == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="of one C"):
        metrics.frechet_gaussians(ma, a, mb, b[:3])


def test_frechet_distance_is_fid_even_with_fewer_pictures_than_features():
    real, made = pictures(40, 16), pictures(40, 16, seed=5) * 0.8
    x, y = (p.mean((-2, -1)) for p in (real, made))
    assert metrics.fid(real, made, Means()) == pytest.approx(metrics.frechet_distance(x, y), rel=1e-3, abs=1e-6)
    few = metrics.frechet_distance(features(4, 20), features(4, 20, seed=1))          # covariances of rank 3
    assert math.isfinite(few) and few > 0
    with pytest.raises(ValueError, match="at least 2"):
        metrics.frechet_distance(features(1), features(4))


def test_kernel_distance_is_its_definition_and_torchmetrics():
    from torchmetrics.image.kid import poly_mmd
    x, y = features(12), features(12, seed=1) + 0.5
    k = lambda a, b: (float(a @ b) / 6 + 1) ** 3
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(k(v[i], v[j]) for v in (x, y) for i, j in pairs if i != j) / (12 * 11)
    across = sum(k(x[i], y[j]) for i, j in pairs) / 144
    assert metrics.kernel_distance(x, y) == pytest.approx(within - 2 * across, rel=1e-10)
    assert metrics.kernel_distance(x, y) == pytest.approx(float(poly_mmd(x, y)), rel=1e-10)
    every = sum(k(v[i], v[j]) for v in (x, y) for i, j in pairs) / 144
    assert metrics.kernel_distance(x, y, biased=True) == pytest.approx(every - 2 * across, rel=1e-10)
    assert metrics.kernel_distance(x, y[:7]) == pytest.approx(metrics.kernel_distance(y[:7], x), rel=1e-10)


def test_kernel_distance_is_unbiased_and_frechet_is_not():
    draw = lambda n, k: (features(n, seed=2 * k), features(n, seed=2 * k + 1))
    small = [metrics.kernel_distance(*draw(10, k)) for k in range(200)]
    assert abs(np.mean(small)) < 3 * np.std(small) / 200 ** 0.5 and min(small) < 0
    assert np.mean([metrics.kernel_distance(*draw(10, k), biased=True) for k in range(50)]) > 0.05
    mean = lambda n: np.mean([metrics.frechet_distance(*draw(n, k)) for k in range(30)])
    assert mean(10) > 4 * mean(100) > 0


def test_the_unpaired_interval_keeps_what_differs_between_scenes():
    rng = np.random.default_rng(0)
    scene = rng.normal(0, 5, 40)
    a, b = scene + 1.0 + rng.normal(0, 0.2, 40), scene
    paired, loose = metrics.paired_bootstrap(a, b), metrics.unpaired_bootstrap(a, b)
    assert loose["diff"] == paired["diff"] and loose["n"] == 40
    assert loose["high"] - loose["low"] > 10 * (paired["high"] - paired["low"])
    assert paired["excludes_zero"] and not loose["excludes_zero"]
    with pytest.raises(ValueError, match="same scenes"):
        metrics.unpaired_bootstrap([1, 2], [1])


def test_lpips_says_what_is_missing(tmp_path, monkeypatch):
    from lib.models import ModelUnavailable
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics._lpips_net.cache_clear()
    with pytest.raises(ModelUnavailable, match=r"needs the file alexnet-\S+\.pth .* not in torch's cache.* not LPIPS"):
        metrics.lpips(pictures(), pictures(seed=1))
    with pytest.raises(ValueError, match="alex, vgg, squeeze"):
        metrics.lpips(pictures(), pictures(), net="inception")


def test_lpips_is_its_formula_where_the_weights_are(tmp_path, monkeypatch):
    """With AlexNet's weights in the cache (random ones here: the route, not the values, is tested)."""
    from torchvision.models import squeezenet1_1
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    metrics._lpips_net.cache_clear()
    path, url = metrics.lpips_weights("squeeze")
    assert url.endswith(path.name) and path.parent.name == "checkpoints"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), path)
    a, b = pictures(2), pictures(2, seed=1)
    try:
        ours = metrics.lpips(a, b, net="squeeze")
        net = metrics._lpips_net("squeeze", False)
        f, g = (net.net(net.scaling_layer(2 * x - 1)) for x in (a, b))
        unit = lambda v: v / (v.square().sum(1, keepdim=True).sqrt() + 1e-8)
        total = sum(lin(unit(p).sub(unit(q)).square()).mean((1, 2, 3)) for lin, p, q in zip(net.lins, f, g))
        torch.testing.assert_close(ours, total, rtol=1e-3, atol=1e-5)
        assert metrics.lpips(a, a, net="squeeze").tolist() == [0, 0]
    finally:
        metrics._lpips_net.cache_clear()
