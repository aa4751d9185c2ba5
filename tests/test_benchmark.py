"""lib.benchmark on its smallest sizes: zones by hand, a whole run with tiny random models, resuming, tables,
cards."""
import csv
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from lib import benchmark, metrics, scenes, train

FEW = dict(scenes=1, steps=2, mechanisms=("alpha", "inject"))


remembered = functools.lru_cache(benchmark.case)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "case", remembered)  # rendering again would only cost time
    monkeypatch.setenv("LAYERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return dict(pipe=train.tiny_pipeline(), inpaint=train.tiny_pipeline(inpaint=True),
                judge=metrics.Judge().eval().requires_grad_(False), device="cpu")


@pytest.fixture(scope="module")
def cases():
    return {task: benchmark.case(task, scenes.seeds("test", 1)[0]) for task in benchmark.TASKS}


def settings(**change):
    return benchmark.Settings(**{**FEW, **change})


# ---------------------------------------------------------------------------------------------- zones

def test_insertion_zones_by_hand():
    without = torch.full((1, 3, 1, 4), 0.5)
    truth = without.clone()
    truth[..., 0] = 0.9                      # the object
    truth[..., 1] = 0.46                     # its shadow
    truth[..., 2] = 0.48                     # too faint to count
    visible = torch.tensor([1, 0, 0, 0]).view(1, 1, 1, 4)
    zones = {k: v.flatten().tolist() for k, v in benchmark.insertion_zones(truth, without, visible).items()}
    assert zones == dict(shading=[1, 0, 0, 0], shadow=[0, 1, 0, 0], outside=[0, 0, 1, 1], hole=[0, 0, 0, 0],
                         floor=[0, 0, 0, 0])


def test_compositing_zones_by_hand():
    def row(*values):
        return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)

    # A's thing | its shadow on A's floor | A's floor | its shadow on B | hidden in B | B, lit now | B
    truth, without = row(.9, .3, .5, .2, .6, .7, .5).expand(1, 3, 1, 7), row(.5, .5, .5, .4, .6, .7,
                                                                             .5).expand(1, 3, 1, 7)
    background = row(.1, .1, .1, .4, .1, .4, .5).expand(1, 3, 1, 7)
    zones = benchmark.compositing_zones(truth, without, background, row(1, 0, 0, 0, 0, 0, 0),
                                        row(1, 1, 1, 0, 0, 0, 0),
                                        row(0, 0, 0, 1, 0, 1, 1))
    assert {k: v.flatten().nonzero().flatten().tolist() for k, v in zones.items()} == dict(
        shading=[0], shadow=[1, 3], floor=[2], hole=[4, 5], outside=[6])


def test_the_mean_of_the_channels_decides():
    without = torch.zeros(1, 3, 1, 1)
    truth = torch.tensor([0.08, 0.0, 0.0]).view(1, 3, 1, 1)  # max 0.08, mean 0.027
    assert benchmark.insertion_zones(truth, without, torch.zeros(1, 1, 1, 1))["outside"].item() == 1


@pytest.mark.parametrize("task", benchmark.TASKS)
def test_real_cases_have_their_zones_and_know_the_truth(task, cases, parts):
    c = cases[task]
    total = sum(c.zones.values())
    assert torch.equal(total, torch.ones_like(total))
    assert c.zones["shadow"].mean() > 0.005 and c.zones["shading"].mean() > 0.01
    assert float(metrics.rmse(c.truth, c.truth, c.zones["shadow"])) == 0
    perfect = benchmark.scores(parts["judge"], c.truth, c)
    assert [perfect[k] for k in ("rmse_shadow", "rmse_shading", "rmse_outside", "feat_dist")] == [0] * 4
    pasted = benchmark.scores(parts["judge"], c.paste, c)
    assert pasted["rmse_shadow"] > 0.02 and pasted["rmse_shading"] > 0.02  # wrong light, no shadow
    assert pasted["rmse_outside"] < pasted["rmse_shadow"]
    assert torch.equal(remembered.__wrapped__(task, c.seed).truth, c.truth)


def test_the_judges_regions_are_the_truths(cases):
    found = scenes.insertion_case(cases["insertion"].seed)
    ids = scenes.render(found["scene"]).ids
    assert torch.equal(cases["insertion"].zones["shading"] > 0, ids == found["index"])
    for c in cases.values():
        if c.order:
            visible, hidden, _, _ = c.order
            assert not (visible & hidden).any()


def test_a_perfect_judge_scores_the_truth_and_not_a_wrong_order():
    seed = next(s for s in scenes.seeds("test", 30) if (c := benchmark.case("insertion", s)).order
                and c.order[0].sum() > 50 and c.order[1].sum() > 50 and c.order[2] != c.order[3])
    c, found = benchmark.case("insertion", seed), scenes.insertion_case(seed)
    r = scenes.render(found["scene"])
    truth = dict(kind=r.kind, colour=r.colour, depth=r.depth)
    assert metrics.occlusion_order(truth, *c.order) == 1.0 and metrics.object_present(r.kind, r.colour,
                                                                                      *c.thing)
    on_top = dict(truth, kind=torch.where(c.foreground[:, 3:] > 0.5, c.order[2], r.kind))
    assert metrics.occlusion_order(on_top, *c.order) == 0.0


def test_settings_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown mechanism 'magic'"):
        settings(mechanisms=("magic",))
    with pytest.raises(ValueError, match="at least 1"):
        settings(scenes=0)
    with pytest.raises(ValueError, match="unknown task"):
        benchmark.case("nonsense", scenes.seeds("test", 1)[0])


# ---------------------------------------------------------------------------------------------- a run

def fake_edit(log=None, fail_at=None):
    """Stands for lib.featglac: `inject` is nearly the truth, `alpha` is the paste."""
    def edit(models, c, mechanism):
        if log is not None:
            log.append((c.task, c.seed, mechanism))
        if fail_at == (c.task, c.seed):
            raise KeyboardInterrupt
        image = c.paste if mechanism == "alpha" else 0.1 * c.paste + 0.9 * c.truth
        return SimpleNamespace(passes=0 if mechanism == "alpha" else 8, seconds=0.01), image, image
    return edit


def test_a_run_writes_rows_tables_and_pictures(parts, tmp_path):
    s = settings(scenes=2)
    summary = benchmark.run(s, benchmark.Models(s, **parts), tmp_path / "out", fake_edit(), progress=False)
    out = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert out == ["mini-2-compositing.png", "mini-2-insertion.png", "mini-2.csv", "mini-2.json", "mini-2.md"]
    rows = list(csv.DictReader((tmp_path / "out" / "mini-2.csv").open()))
    names = ["vae", "vae-residual", "plain-cfg", "alpha", "inject"]
    mine = {task: sorted(r["mechanism"] for r in rows if r["task"] == task) for task in benchmark.TASKS}
    assert mine == {"insertion": sorted(2 * [*names, benchmark.WITH_DEPTH]), "compositing": sorted(2 * names)}  # no geometry here
    inject = [r for r in rows if r["mechanism"] == "inject" and r["task"] == "insertion"]
    mean = sum(float(r["rmse_shading"]) for r in inject) / 2
    assert summary["tasks"]["insertion"]["means"]["inject"]["rmse_shading"] == pytest.approx(mean, abs=1e-5)
    assert all(float(r["floor_shading"]) > 0 and float(r["peak_mb"]) > 10 for r in inject)
    d = summary["tasks"]["insertion"]["differences"]["inject"]["alpha"]["rmse_shading"]
    assert d["diff"] < 0 and d["n"] == 2
    stored = json.loads((tmp_path / "out" / "mini-2.json").read_text(),
                        parse_constant=lambda x: pytest.fail(f"{x} in JSON"))
    assert benchmark.markdown(stored) == (tmp_path / "out" / "mini-2.md").read_text()
    assert stored["seeds"] == scenes.seeds("test", 2)
    assert all((tmp_path / "out" / f).stat().st_size <= 150_000 for f in out if f.endswith("png"))
    text = (tmp_path / "out" / "mini-2.md").read_text()
    assert "Bound, plain decoding" in text and "| inject - alpha |" in text and "x its time" in text


def test_an_interrupted_run_goes_on_where_it_stopped(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "sheet", lambda *_: None)  # drawn in the test above
    s = settings(scenes=2)
    first, second = scenes.seeds("test", 2)
    models = benchmark.Models(s, **parts)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run(s, models, tmp_path / "out", fake_edit(fail_at=("insertion", second)), progress=False)
    assert list((tmp_path / "out").iterdir()) == []  # nothing half-written
    log = []
    summary = benchmark.run(s, models, tmp_path / "out", fake_edit(log), progress=False)
    assert {seed for _, seed, _ in log} == {second} and summary["tasks"]["insertion"]["scenes"] == 2
    log.clear()
    benchmark.run(s, models, tmp_path / "out", fake_edit(log), progress=False)
    assert log == []
    benchmark.run(settings(scenes=2, seed=1), benchmark.Models(settings(scenes=2, seed=1), **parts),
                  tmp_path / "out",
                  fake_edit(log), progress=False)
    assert {seed for _, seed, _ in log} == {first, second}  # other settings: nothing is reused


def test_other_weights_are_another_run(parts):
    s = settings()
    a = benchmark.fingerprint(s, benchmark.Models(s, **parts))
    assert a == benchmark.fingerprint(s, benchmark.Models(s, **parts))
    other = dict(parts, pipe=train.tiny_pipeline(seed=5))
    assert a != benchmark.fingerprint(s, benchmark.Models(s, **other))


def test_every_mechanism_of_featglac_runs_on_both_tasks(parts):
    s = benchmark.Settings(scenes=1, steps=8, smoke=True)
    for task in benchmark.TASKS:
        rows, pictures = benchmark.run_case(benchmark.Models(s, **parts), task, scenes.seeds("test", 1)[0])
        by = {r["mechanism"]: r for r in rows}
        more = set(benchmark.RGBD) if task == "insertion" else set()
        assert set(by) == {"vae", "vae-residual", "plain-cfg", *benchmark.BASELINES, *benchmark.MECHANISMS, *more}
        assert by["guide"]["passes"] > by["inject"]["passes"] > 0 == by["alpha"]["passes"]
        assert by["plain-cfg"]["passes"] == 16
        for r in by.values():
            assert r["mechanism"] == "plain-cfg" or math.isfinite(r["rmse_shading"])
        assert by["inject"]["rmse_outside"] <= by["inject"]["rmse_outside_before"] + 1e-6
        assert list(pictures)[-1] == "truth" and len(pictures) == 4 + len(benchmark.BASELINES + benchmark.MECHANISMS) + len(more)


def test_a_larger_pipeline_edits_large_and_is_scored_at_one_size(parts, monkeypatch):
    monkeypatch.setattr(benchmark.Models, "size", 256)
    monkeypatch.setattr(benchmark, "case", remembered.__wrapped__)
    s, seen = settings(mechanisms=("alpha",)), []

    def edit(models, c, mechanism):
        seen.append(c.truth.shape[-1])
        return SimpleNamespace(passes=0, seconds=0.01), c.truth, c.truth
    seed = scenes.seeds("test", 1)[0]
    rows, pictures = benchmark.run_case(benchmark.Models(s, **parts), "insertion", seed, edit)
    assert seen == [256] and pictures["alpha"].shape[-1] == scenes.SIZE
    assert rows[-1]["mechanism"] == "alpha" and rows[-1]["psnr"] > 25 and rows[0]["mechanism"] == "vae"


def test_alpha_pastes_what_the_case_pastes(parts):
    s = settings()
    models = benchmark.Models(s, **parts)
    for task in benchmark.TASKS:
        c = benchmark.case(task, scenes.seeds("test", 1)[0])
        _, before, after = benchmark.edit_case(models, c, "alpha")
        assert (before - c.paste).abs().max() < 1e-3 and (after - c.paste).abs().max() < 1e-3


# ------------------------------------------------------------------------------------------- README and cards

def test_the_readme_is_regenerated_between_its_markers(parts, tmp_path):
    s = settings()
    benchmark.run(s, benchmark.Models(s, **parts), tmp_path / "data" / "benchmark", fake_edit(),
                  progress=False)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n")
    assert benchmark.readme(readme).name == "mini-1.json"
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "| alpha |" in text
    assert "none was at hand" in text
    benchmark.readme(readme)
    assert readme.read_text() == text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmark:begin"):
        benchmark.readme(readme)


def test_a_smoke_run_never_reaches_the_readme(parts, tmp_path):
    s = settings(smoke=True)
    benchmark.run(s, benchmark.Models(s, **parts), tmp_path / "data" / "benchmark", fake_edit(),
                  progress=False)
    with pytest.raises(FileNotFoundError, match="python -m lib.benchmark"):
        benchmark.newest()


def test_a_card_keeps_what_it_had(tmp_path):
    (tmp_path / "card.json").write_text('{"data": "rooms", "quality": {"old": 1}}')
    (tmp_path / "README.md").write_text("# mini-depth\n\nWords.\n")
    for _ in range(2):
        benchmark.write_card(tmp_path, dict(scenes=4, abs_rel=0.04, delta1=0.9, measured="2026-01-01"))
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["data"] == "rooms" and card["quality"]["old"] == 1 and card["quality"]["abs_rel"] == 0.04
    text = (tmp_path / "README.md").read_text()
    assert "Words." in text and text.count("AbsRel") == 1
    assert "| 0.04 | <= 0.05 (reached) |" in text and "| 0.9 | >= 0.97 (not reached) |" in text


def test_model_figures_on_tiny_models(parts):
    vae = metrics.vae_quality(parts["pipe"], 4)
    assert 0 < vae["psnr"] < 30 and 0 < vae["psnr_objects"] < 40
    judged = metrics.judge_quality(parts["judge"], 4)
    assert 0 <= judged["kind_miou"] < 0.5
    obeyed = metrics.prompts_obeyed(parts["pipe"], parts["judge"], 4, steps=2)
    assert obeyed["captions"] == 4 and 0 <= obeyed["obeyed"] <= obeyed["objects_present"] <= 1
    filled = metrics.inpaint_quality(parts["inpaint"], parts["judge"], 2, steps=2)
    diff, low, high = filled["feat_dist_over_telea"]
    assert filled["psnr_telea_objects"] > 5 and low <= diff <= high
    assert "not reached" in benchmark.quality_table(filled)


def test_depth_figures_are_of_metres_without_glass():
    class Oracle:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, image):
            seeds = scenes.seeds("test", 4, start=metrics.QUALITY_START)
            r = scenes.render([scenes.sample(s) for s in seeds])
            z = r.depth * self.factor
            z[r.kind == scenes.KINDS.index("glass") + 1] = 50.0
            return SimpleNamespace(metres=lambda: z)

    assert metrics.depth_quality(Oracle(1.0), 4) == dict(scenes=4, abs_rel=0.0, delta1=1.0)
    assert metrics.depth_quality(Oracle(1.1), 4)["abs_rel"] == pytest.approx(0.1, rel=1e-3)


def test_obeyed_counts_every_named_thing():
    thing = scenes.Thing("ball", "red", 0, 3)
    two = SimpleNamespace(things=(thing, thing))
    kind, colour = torch.zeros(1, 1, 32, 32, dtype=torch.long), torch.zeros(1, 1, 32, 32, dtype=torch.long)
    kind[..., :8, :8] = 1
    colour[..., :8, :8] = 1
    maps = dict(kind=kind, colour=colour)
    assert metrics._present(maps, 0, two) == [1.0, 0.0]  # one ball for two named
    kind[..., 20:28, 20:28] = 1
    colour[..., 20:28, 20:28] = 1
    assert metrics._present(maps, 0, two) == [1.0, 1.0]


# ---------------------------------------------------------------------------------------- the GPU measurement

def test_the_gpu_measurement_at_a_tiny_size(tmp_path):
    result = benchmark.gpu(benchmark.TINY, device="cpu", steps=4, repeats=1, peak_size=128)
    rows = result["rows"]
    assert rows["plain"]["passes"] == 8 and rows["guide"]["passes"] > rows["inject"]["passes"]
    assert all(r["seconds"] > 0 and r["share_of_peak"] > 0
               for r in rows.values()) and rows["plain"]["times_plain"] == 1
    line = benchmark.gpu_line(result)
    assert "| inject |" in line and "on CPU" in line
    benchmark.store_gpu(result, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"] == 4


def test_without_a_card_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.gpu()["card"] is None and "none was at hand" in benchmark.gpu_line(benchmark.gpu())


def test_sd15_config_has_its_real_size():
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        unet = UNet2DConditionModel(**benchmark.SD15["unet"])
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_the_command_line_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match="error: .*run `python -m lib.benchmark` first"):
        benchmark.main(["readme"])
    with pytest.raises(SystemExit, match="error: unknown mechanism"):
        benchmark.main(["--mechanisms", "nothing"])


def test_ablation_changes_one_choice_at_a_time_and_is_stored(tmp_path, make_pipe):
    models = benchmark.Models(benchmark.Settings(steps=4), pipe=make_pipe())
    variants = {"as shipped": {}, "guidance 1": {"guidance_scale": 1.0}}
    rows = benchmark.ablate(models, variants, 1, tmp_path, tasks=("insertion",), progress=False)
    assert [r["mechanism"] for r in rows] == ["as shipped", "guidance 1"]
    assert {scenes.split_of(r["seed"]) for r in rows} == {"val"} and models.settings.options == {}
    assert rows[1]["passes"] < rows[0]["passes"] and rows[1]["rmse_shadow"] != rows[0]["rmse_shadow"]
    stored = benchmark.stored_ablation(tmp_path)
    table = benchmark.ablation_table(stored)
    assert table == benchmark.ablation_table(rows) and "(1 validation rooms)" in table
    assert len([line for line in table.splitlines() if line.startswith("| guidance 1 |")]) == 1


def test_every_variant_is_a_setting_of_featglac():
    from dataclasses import replace

    from lib import featglac
    for options in benchmark.VARIANTS.values():
        assert replace(featglac.Settings(), **options)


def test_the_verdict_says_what_was_done_without_a_model():
    means = {m: {"rmse_shadow": s, "rmse_shading": s} for m, s in (("alpha", 0.2), ("geometry", 0.15), ("inject", 0.1))}
    sure = {"diff": -0.05, "excludes_zero": True}
    differences = {m: {"rmse_shadow": sure, "rmse_shading": {**sure, "excludes_zero": m == "alpha"}}
                   for m in ("alpha", "geometry")}
    said = benchmark.verdict({"tasks": {"insertion": {"means": means, "differences": {"inject": differences}}}})
    assert "50% smaller in the shadow zone (goal of half: reached)" in said
    assert "25% (shadow; the model adds to that), 25% (shading; what the model adds may be chance)" in said
    alike = {"rmse_shadow": 0.12, "rmse_shading": 0.08}
    rgbd = {"tasks": {"insertion": {"means": means | {benchmark.WITH_DEPTH: means["inject"], "geometry-rgbd": alike},
                                    "differences": {"inject": differences, benchmark.WITH_DEPTH: differences | {
                                        "geometry-rgbd": {z: {**sure, "diff": 0.02} for z in alike}}}}}}
    said = benchmark.verdict(rgbd).splitlines()[-1]  # the gain of the cut-out's depth is not the model's
    assert "Here the cut-out brings its own depth. Without a model (`geometry-rgbd`): 40% (shadow; the model takes" in said
    assert "(`geometry`): 25%" not in said
    del means["geometry"]
    assert "Without a model" not in benchmark.verdict({"tasks": {"insertion": {"means": means, "differences": {"inject": differences}}}})


@pytest.mark.parametrize("task, mechanism", [("insertion", "geometry"), ("insertion", benchmark.WITH_DEPTH),
                                             ("compositing", "inject")])
def test_the_stored_board_is_what_this_code_gives(task, mechanism, monkeypatch):
    """On the board's first room: a change of the method, its defaults or its weights asks for a new board."""
    monkeypatch.delenv("LAYERS_DATA")
    path, stored = benchmark.newest()
    seed = stored["seeds"][0]
    with path.with_suffix(".csv").open() as rows:
        (old,) = [r for r in csv.DictReader(rows) if (r["task"], int(r["seed"]), r["mechanism"]) == (task, seed, mechanism)]
    s = benchmark.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored["settings"].items()})
    models = benchmark.Models(s)
    done, _, after = benchmark.edit_case(models, benchmark.case(task, seed), mechanism)
    new = benchmark.scores(models.judge, after, benchmark.case(task, seed))
    assert done.passes == int(old["passes"])
    for zone in ("shadow", "shading", "outside"):  # another machine's rounding goes through the whole denoising
        assert new[f"rmse_{zone}"] == pytest.approx(float(old[f"rmse_{zone}"]), abs=0.004)
