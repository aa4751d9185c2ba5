"""The main job on real photographs: layers, composites and report, whole or not at all; one clear error for
bad input."""
import json
import os
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from lib import depth, edit, scenes, setup, show

TESTDATA = Path(os.environ.get("LAYERS_TESTDATA", Path(__file__).parents[2] / "shared" / "testdata"))
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "edit.ipynb"
PHOTOS = {"room_chair": "1.9m", "desk": "2.4m", "motorcycle": "2.8m"}


def real(*parts):
    path = TESTDATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no test data at {path}; set LAYERS_TESTDATA")
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_pipe):
    """The random pipeline as a folder: MODEL may be a path."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Files of a made-up photograph: a floor, a back wall, a post in front; millimetres with a hole; a
    cut-out."""
    folder = tmp_path_factory.mktemp("room")
    h, w = 150, 200
    v, u = np.mgrid[0:h, 0:w] / [[[h]], [[w]]]
    metres = np.minimum(1.0 / np.maximum(0.05 + 0.9 * (v - 0.4), 1e-3), 5.0) + 0.2 * u * (v < 0.55)
    metres[:120, 90:105] = 1.5
    mm = (metres * 1000).astype(np.uint16)
    mm[20:30, 20:60] = 0
    rgb = (np.stack([v, u, 1 - v], -1) * 200 + 20).astype(np.uint8)
    rgb[:120, 90:105] = [200, 40, 40]
    cutout = np.zeros((40, 30, 4), np.uint8)
    cutout[4:, 4:26] = [40, 160, 60, 255]
    Image.fromarray(rgb).save(folder / "room.png")
    Image.fromarray(mm).save(folder / "room_mm.png")
    Image.fromarray(cutout).save(folder / "toy.png")
    return folder


def run_cells(**parameters):
    """Run the notebook's own cells (but the setup cell) in this process; returns what they defined."""
    cells = [c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code"][1:]
    unknown = set(parameters) - set(setup.notebook_parameters(NOTEBOOK))
    assert not unknown
    space = {"setup": setup}
    for cell in cells:
        exec(compile(cell.source, "edit.ipynb", "exec"), space)
        if "parameters" in cell.metadata.get("tags", []):
            space.update(parameters)
    return space


def settings(room, tiny, out, **changes):
    given = dict(IMAGE=str(room / "room.png"), DEPTH=str(room / "room_mm.png"), AT="2m", INSERT=str(room / "toy.png"),
                 MODEL=str(tiny), OUTPUT=str(out), SMOKE=True)
    return given | changes


# ------------------------------------------------------------------ whole runs

def test_the_notebook_runs_on_a_real_photograph(tiny, tmp_path):
    """Through the runner that `make edit` uses, on sensor depth with holes."""
    photo = real("rgbd", "room_chair.jpg")
    out = tmp_path / "out"
    setup.run_notebook(NOTEBOOK, tmp_path / "edit.ipynb", dict(
        IMAGE=str(photo), DEPTH=str(real("rgbd", "room_chair_depth_mm.png")), AT="1.9m", SMOKE=True,
        INSERT=str(real("objects", "husky.png")), MODEL=str(tiny), OUTPUT=str(out)), timeout=300)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names >= {"report.md", "report.html", "paste_2d.png", "paste_depth.png", "featglac.png", "overview.png",
                     "depth.png", "depth_01.png", "depth_statistics.json", "facts.json", "layers/foreground.png",
                     "layers/background.png", "layers/mask.png", "layers/object.png"}
    assert not [p for p in tmp_path.iterdir() if ".part-" in p.name]
    facts, report = json.loads((out / "facts.json").read_text()), (out / "report.md").read_text()
    stats = json.loads((out / "depth_statistics.json").read_text())
    assert stats["kind"] == "metric" and stats["measured_share"] == pytest.approx(0.87, abs=0.01)
    assert facts["at"]["metres"] == pytest.approx(1.9) and 0.3 < facts["object"]["visible_share"] < 1
    for words in ("room_chair.jpg, 640 x 480", "room_chair_depth_mm.png", "husky.png", "bit for bit", "87.0 % of the",
                  "a sun ", f"evidence {facts['model']['light']['evidence']} nats"):
        assert words in report
    assert "Read this first" not in report
    assert "data:image/png" in (out / "report.html").read_text() and "src='http" not in (out / "report.html").read_text()
    before, after = show.read_image(photo), show.read_image(out / "featglac.png")
    same = (before == after).all(1)
    assert after.shape == before.shape and same.float().mean() == pytest.approx(facts["untouched_share"], abs=1e-3)
    assert 0.3 < same.float().mean() < 0.99


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("toy", ["husky", "sloth"])
def test_depth_aware_paste_on_every_photograph(name, toy):
    """The object stands on the floor, is hidden only by what is measurably nearer, and hides only what is
    farther."""
    photo = edit.read_photo(real("rgbd", f"{name}.jpg"), real("rgbd", f"{name}_depth_mm.png"))
    cutout, kind, origin = edit.read_cutout(real("objects", f"{toy}.png"))
    place = edit.stand(photo, PHOTOS[name], cutout, kind)
    assert place.floor is not None and 0.5 < place.y <= 1.02
    shot = edit.composites(photo, place, cutout, origin)
    assert 0.4 < shot.facts["object"]["visible_share"] <= 1
    metres, alpha, hidden = photo.depth.metres(), shot.object_layer[:, 3:], shot.hidden_by
    measured = photo.depth.valid > 0.5
    assert (metres[measured & (hidden > 0.95)] < place.metres).float().mean() > 0.97
    off_floor = edit.on_floor(photo.depth, place.floor, 0.06) == 0
    much_nearer = measured & (metres < 0.85 * place.metres) & off_floor & (alpha > 0.5)
    if much_nearer.sum() > 100:
        assert hidden[much_nearer].mean() > 0.9
    foot = photo.depth.crop(min(photo.depth.size[0] - 1, int(place.y * photo.depth.size[0])),
                            int(place.x * photo.depth.size[1]), 1, 1)
    assert foot.metres().item() < 1.06 * place.metres, "what is under the foot is the floor at AT, or hides it"
    untouched = (alpha == 0).expand_as(photo.image)
    assert torch.equal(shot.paste[untouched], photo.image[untouched])
    assert (shot.paste2d - shot.paste).abs().max() > 0.1 or shot.facts["object"]["visible_share"] > 0.97


def test_untouched_notebook_runs_on_the_miniature(tiny, tmp_path):
    """No picture, no object, no depth: a room of the Miniature, so that the notebook runs clean as it is."""
    space = run_cells(MODEL=str(tiny), SMOKE=True, OUTPUT=str(tmp_path / "out"))
    assert space["place"].floor is not None and (tmp_path / "out" / "report.html").is_file()
    assert "renderer" in (tmp_path / "out" / "report.md").read_text()
    run_cells(MODEL=str(tiny), SMOKE=True, OUTPUT=str(tmp_path / "out"), AT="0.4")  # an older output is replaced
    assert "depth 0.40" in (tmp_path / "out" / "report.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_large_picture_keeps_its_size_and_pixels(room, tiny_pipe, tmp_path):
    """The model works at 128 pixels; the other pixels of a picture of 2.6 megapixels stay as they were."""
    big = np.random.default_rng(0).integers(0, 255, (1300, 2000, 3), dtype=np.uint8)
    Image.fromarray(big).save(tmp_path / "big.png")
    mm = Image.open(room / "room_mm.png").resize((2000, 1300), Image.NEAREST)
    mm.save(tmp_path / "mm.png")
    photo = edit.read_photo(tmp_path / "big.png", tmp_path / "mm.png")
    assert max(photo.small.shape[-2:]) == edit.WORK_SIDE == max(photo.depth.size)
    cutout, kind, _ = edit.read_cutout(room / "toy.png")
    shot = edit.composites(photo, edit.stand(photo, "2m", cutout, kind), cutout)
    final = edit.with_model(shot, tiny_pipe, steps=3, noise_level=1.0, generator=torch.Generator().manual_seed(0))
    assert final.result.shape == (1, 3, 1300, 2000)
    top, left, side = edit.window(shot, 128)
    outside = torch.ones(1, 1, 1300, 2000, dtype=torch.bool)
    outside[..., top:top + side, left:left + side] = False
    outside = outside.expand_as(photo.image)
    assert torch.equal(final.result[outside], photo.image[outside]) and side < 1300
    assert (final.result != shot.paste).any() and final.result.min() >= 0 and final.result.max() <= 1
    in_front = (shot.hidden_by == 1) & (shot.object_layer[:, 3:] > 0.5)
    if in_front.any():
        where = in_front.expand_as(photo.image)
        assert torch.equal(final.result[where], photo.image[where]), "what is in front of the object is not edited"


def test_a_batch_s_edit_without_layers_is_the_same(room, tiny_pipe):
    photo = edit.read_photo(room / "room.png", room / "room_mm.png")
    cutout, kind, _ = edit.read_cutout(room / "toy.png")
    place = edit.stand(photo, "2m", cutout, kind)
    both = [edit.composites(photo, place, cutout, layers=layers) for layers in (True, False)]
    assert both[0].cut is not None and both[1].cut is None and "layers" not in both[1].facts
    done = [edit.with_model(shot, tiny_pipe, steps=2, generator=torch.Generator().manual_seed(0)) for shot in both]
    for name in ("paste2d", "paste", "hidden_by", "object_layer", "result"):
        assert torch.equal(*(getattr(shot, name) for shot in done)), name


def test_a_noisy_sensor_makes_no_blotches_on_the_floor(room):
    """The shadow is thrown on the plane that was fitted to the floor, not on the sensor's noise."""
    metres = depth.given(room / "room_mm.png").metres()
    bumpy = metres * (1 + 0.01 * torch.randn(metres.shape, generator=torch.Generator().manual_seed(0)))
    photo = edit.read_photo(room / "room.png", room / "room_mm.png")
    photo = replace(photo, depth=depth.from_metric(bumpy, valid=photo.depth.valid))
    cutout, kind, _ = edit.read_cutout(room / "toy.png")
    shot = edit.composites(photo, edit.stand(photo, "2m", cutout, kind, where="0.25"), cutout)
    box = (..., slice(0, 150), slice(0, 150))
    seen = edit._space(shot, box, 150, shot.object_layer[box]).metres[0, 0, 130:, 10:140]
    error = (seen / metres[0, 0, 130:, 10:140] - 1).abs()
    assert error.median() < 0.004, "noise of 1 % is left on the floor"


def test_the_change_keeps_to_its_side_of_the_outline():
    """Enlarged, light on the object does not leak over its outline, nor shadow into it."""
    alpha = torch.zeros(1, 1, 16, 16)
    alpha[..., 4:12, 4:12] = 1
    change = torch.where(alpha > 0, 0.5, -0.5)
    inside, outside = edit._carried_on(change, alpha), edit._carried_on(change, 1 - alpha)
    assert torch.equal(inside[..., 2:14, 2:14], torch.full((1, 1, 12, 12), 0.5))
    assert torch.equal(outside[..., :6, :], torch.full((1, 1, 6, 16), -0.5)) and outside[..., 8, 8] == 0.5


def test_a_guessed_depth_is_the_first_thing_said(room, tiny, tmp_path):
    run_cells(**settings(room, tiny, tmp_path / "out", DEPTH="", AT="0.5"))
    text = (tmp_path / "out" / "report.md").read_text()
    assert "the depth is a guess" in text.splitlines()[2] and "DEPTH_MODEL=" in text


@pytest.mark.parametrize("mechanism, words", [("alpha", "computed; no diffusion model"),
                                              ("geometry", "for a sun"), ("blended-latent", "the model alone")])
def test_the_report_says_where_the_light_is_from(room, tiny, tmp_path, mechanism, words):
    run_cells(**settings(room, tiny, tmp_path / "out", MECHANISM=mechanism))
    text = (tmp_path / "out" / "report.md").read_text()
    assert words in text and ("from the model" in text) == (mechanism == "inject")


def test_words_are_painted_by_a_pipeline_that_is_not_the_mini(room, tiny, tmp_path):
    """INSERT as `make edit` hands it over: a path whose last part is the words."""
    space = run_cells(**settings(room, tiny, tmp_path / "out", INSERT=str(tmp_path / "red chair"), WHERE="0.25"))
    final = space["final"]
    assert space["prompt"] == "red chair" and final.facts["object"]["painted"]
    box = (final.object_layer[:, 3:] * (1 - final.hidden_by) > 0.99).expand_as(final.paste)
    assert (final.paste != final.photo.image)[box].float().mean() > 0.9
    assert torch.equal(final.paste[final.object_layer[:, 3:].expand_as(box) == 0],
                       final.photo.image[final.object_layer[:, 3:].expand_as(box) == 0])
    assert "painted by" in (tmp_path / "out" / "report.md").read_text()


# ------------------------------------------------------------------ pieces

@pytest.mark.parametrize("seed", range(4))
def test_the_floor_of_a_rendered_room_is_found(seed):
    made = scenes.render(scenes.sample(scenes.seeds("val", 4)[seed]), size=96)
    found = depth.from_metric(made.depth, near=scenes.NEAR, far=scenes.FAR)
    floor = edit.find_floor(found)
    assert floor is not None
    bottom = (made.ids[0, 0, -3] == -1) & (made.depth[0, 0, -3] < scenes.FAR)
    u = (torch.arange(96) + 0.5) / 96
    error = (floor.at(u, (96 - 2.5) / 96) * made.depth[0, 0, -3] - 1).abs()[bottom]
    assert error.median() < 0.02


def test_no_floor_is_said_and_a_wall_is_no_floor():
    wall = depth.from_metric(3 + torch.rand(1, 1, 60, 80, generator=torch.Generator().manual_seed(0)))
    assert edit.find_floor(wall) is None


def test_size_follows_depth_and_where_and_height_are_obeyed(room):
    photo = edit.read_photo(room / "room.png", room / "room_mm.png")
    cutout, kind, _ = edit.read_cutout(room / "toy.png")
    near, far = (edit.stand(photo, at, cutout, kind) for at in ("1.6m", "3.2m"))
    assert near.height == pytest.approx(2 * far.height, rel=1e-3) and near.y > far.y
    exact = edit.stand(photo, "2m", cutout, kind, where="0.3,0.7", height="0.25")
    assert (exact.x, exact.y, exact.height) == (0.3, 0.7, 0.25)
    assert edit.stand(photo, "2m", cutout, kind, where="0.6").x == 0.6
    assert edit.stand(photo, "2m", cutout, kind, height="0.9m").height == pytest.approx(
        2 * edit.stand(photo, "2m", cutout, kind, height="0.45m").height)


@pytest.mark.parametrize("words, kind", [("red chair", "chair"), ("a teal vase", "vase"), ("Glass ball green", "glass")])
def test_words_become_a_cutout_of_that_colour(words, kind):
    cutout, found, origin = edit.read_cutout(f"/anywhere/{words}", "mini")
    assert found == kind and "rendered" in origin and cutout.shape[1] == 4 and min(cutout.shape[-2:]) > 60
    rgb = scenes.RGB[next(w for w in words.lower().split() if w in scenes.COLOURS)]
    mean = (cutout[:, :3] * cutout[:, 3:]).sum((0, 2, 3)) / cutout[:, 3:].sum()
    assert mean.argmax() == torch.tensor(rgb).argmax() or kind == "vase"
    assert (cutout[0, 3, 0] > 0.05).any() and (cutout[0, 3, :, -1] > 0.05).any(), "trimmed to its opaque part"


def test_exif_gives_the_focal_length(room, tmp_path):
    picture = Image.open(room / "room.png").convert("RGB")
    exif = picture.getexif()
    exif.get_ifd(0x8769)[41989] = 26
    picture.save(tmp_path / "phone.jpg", exif=exif)
    focal, said = edit._focal(tmp_path / "phone.jpg", torch.zeros(1, 3, 150, 200))
    assert focal == pytest.approx(26 / 43.27 * 250 / 200, rel=1e-3) and "26" in said


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError):
        with edit.whole_folder(tmp_path / "out") as part:
            (part / "half.png").write_bytes(b"x")
            raise RuntimeError("power cut")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(ValueError, match="not the output of an earlier edit"):
        with edit.whole_folder(tmp_path / "mine"):
            pass
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["diary.txt"]


# ------------------------------------------------------------------ bad input: one clear error, nothing
# written

def bad_files(room, folder):
    (folder / "broken.jpg").write_bytes((room / "room.png").read_bytes()[:400])
    (folder / "text.png").write_text("no picture")
    Image.fromarray(np.full((150, 200), 2000, np.uint16)).save(folder / "constant.png")
    Image.fromarray(np.zeros((150, 200), np.uint16)).save(folder / "unmeasured.png")
    Image.fromarray(np.full((15, 20), 2000, np.uint16)).save(folder / "small.png")
    Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (150, 1))).save(folder / "8bit.png")
    Image.new("RGB", (10, 10)).save(folder / "stamp.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 0)).save(folder / "empty.png")
    Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "opaque.png")


BAD = [
    (dict(IMAGE="no.jpg"), FileNotFoundError, "No picture at"),
    (dict(IMAGE="broken.jpg"), ValueError, "broken.jpg"),
    (dict(IMAGE="text.png"), ValueError, "cannot be read as a picture"),
    (dict(IMAGE="stamp.png", DEPTH=""), ValueError, "too small"),
    (dict(DEPTH="no.png"), FileNotFoundError, "No depth file"),
    (dict(DEPTH="text.png"), ValueError, "cannot be read as depth"),
    (dict(DEPTH="small.png"), ValueError, "20 x 15 pixels but the picture 200 x 150"),
    (dict(DEPTH="constant.png"), ValueError, "one value everywhere"),
    (dict(DEPTH="unmeasured.png"), ValueError, "no measured pixel"),
    (dict(DEPTH="8bit.png"), ValueError, "near_is"),
    (dict(DEPTH="8bit.png", DEPTH_NEAR="low", AT="2m"), ValueError, "asks for metres"),
    (dict(AT="9m"), ValueError, "outside the scene"),
    (dict(AT="1.5"), ValueError, "outside the scene"),
    (dict(AT="far"), ValueError, "not a depth"),
    (dict(AT="0"), ValueError, "nothing is nearer"),
    (dict(INSERT="no.png"), FileNotFoundError, "No picture at"),
    (dict(INSERT="empty.png"), ValueError, "alpha channel of empty.png is empty"),
    (dict(INSERT="opaque.png"), ValueError, "no transparent pixel"),
    (dict(INSERT="purple cow", MODEL="mini"), ValueError, "neither a file nor words"),
    (dict(WHERE="left"), ValueError, "WHERE='left'"),
    (dict(WHERE="0.5,0.05,3"), ValueError, "WHERE"),
    (dict(HEIGHT="tall"), ValueError, "HEIGHT=tall is no height"),
    (dict(HEIGHT="-1m"), ValueError, "no height"),
    (dict(WHERE="0.49,0.7", AT="3m", HEIGHT="0.05"), ValueError, "wholly hidden"),
    (dict(MODEL="sd16"), ValueError, "neither a known model nor a folder"),
    (dict(DEPTH="", DEPTH_MODEL="midas"), ValueError, "Unknown depth model 'midas'"),
    (dict(MECHANISM="magic"), ValueError, "Unknown MECHANISM"),
    (dict(SEED=-1), ValueError, "SEED"),
]


@pytest.mark.parametrize("changes, error, words", BAD, ids=[" ".join(f"{k}={v}" for k, v in b[0].items()) for b in BAD])
def test_bad_input_is_one_clear_error_and_leaves_nothing(room, tiny, tmp_path, changes, error, words):
    files, home = tmp_path / "files", tmp_path / "home"
    files.mkdir()
    home.mkdir()
    bad_files(room, files)
    paths = {k: str(files / v) for k, v in changes.items() if k in ("IMAGE", "DEPTH", "INSERT") and v and "." in v}
    with pytest.raises(error, match=words) as caught:
        run_cells(**settings(room, tiny, home / "out", **(changes | paths)))
    text = str(caught.value)
    assert "\n" not in text.strip() and len(text) < 400
    assert list(home.iterdir()) == []


def test_the_command_prints_one_line_for_bad_input(tmp_path, capsys):
    """As `make edit` calls it: exit status 1, one line that says what to do, no output folder."""
    status = setup.main(["run", str(NOTEBOOK), str(tmp_path / "run.ipynb"), "-p", "IMAGE", str(tmp_path / "no.jpg"),
                         "-p", "OUTPUT", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 1 and "No picture at" in said.splitlines()[0] and "Traceback" not in said
    assert not (tmp_path / "out").exists()
