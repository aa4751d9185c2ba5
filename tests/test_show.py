"""The reader survives what people really have on disk; the views label and enlarge."""
import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from lib import show


@pytest.fixture
def picture():
    """A 6 x 4 picture (H, W, 3) without any symmetry."""
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def save(array, path, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, picture, orientation):
    stored = {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1],
              5: picture.transpose(1, 0, 2), 6: np.rot90(picture), 7: picture[::-1, ::-1].transpose(1, 0, 2),
              8: np.rot90(picture, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(np.ascontiguousarray(stored), tmp_path / "a.png", exif=exif)
    x = show.read_image(tmp_path / "a.png")
    assert x.dtype == torch.float32 and x.shape == (1, 3, 6, 4)
    assert torch.equal(x, show.to_tensor(picture))


def test_broken_exif_is_ignored(tmp_path, picture):
    save(picture, tmp_path / "a.png", exif=b"Exif\x00\x00garbage that is no EXIF block")
    assert torch.equal(show.read_image(tmp_path / "a.png"), show.to_tensor(picture))


def test_grey_and_one_bit(tmp_path, picture):
    x = show.read_image(save(picture[:, :, 0], tmp_path / "grey.png"))
    assert torch.equal(x, show.to_tensor(picture[:, :, 0]).expand(1, 3, 6, 4))
    Image.fromarray(picture[:, :, 0] > 127).save(tmp_path / "bits.png")
    assert set(show.read_image(tmp_path / "bits.png").unique().tolist()) == {0.0, 1.0}


def test_alpha_is_kept_or_laid_over_white(tmp_path, picture):
    rgba = np.dstack([picture, np.full((6, 4), 51, np.uint8)])
    save(rgba, tmp_path / "a.png")
    x = show.read_image(tmp_path / "a.png", "rgba")
    assert torch.equal(x, show.to_tensor(rgba))
    flat = show.read_image(tmp_path / "a.png")
    assert torch.allclose(flat, x[:, :3] * 0.2 + 0.8, atol=1e-6)
    opaque = show.read_image(save(picture, tmp_path / "b.png"), "rgba")
    assert opaque.shape == (1, 4, 6, 4) and (opaque[:, 3] == 1).all()


def test_grey_with_alpha(tmp_path, picture):
    Image.fromarray(picture[:, :, :2].copy(), "LA").save(tmp_path / "la.png")
    x = show.read_image(tmp_path / "la.png", "rgba")
    assert torch.equal(x[:, 3:], show.to_tensor(picture[:, :, 1])) and torch.equal(x[:, 0], x[:, 2])


def test_palette_with_and_without_transparency(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "P")
    indexed.putpalette([255, 0, 0, 0, 0, 255])
    indexed.save(tmp_path / "p.png")
    assert show.read_image(tmp_path / "p.png")[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]
    indexed.save(tmp_path / "t.png", transparency=1)
    x = show.read_image(tmp_path / "t.png", "rgba")
    assert x[0, 3].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert show.read_image(tmp_path / "t.png")[0, :, 0, 1].tolist() == [1.0, 1.0, 1.0]


def another_profile():
    """An ICC profile in which red and green have changed places, and whose name does not say sRGB."""
    from PIL import ImageCms
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(data[i:i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, green = table[b"rXYZ"], table[b"gXYZ"]
    data[red + 4:red + 8], data[green + 4:green + 8] = data[green + 4:green + 8], data[red + 4:red + 8]
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_colours_of_another_profile_become_srgb(tmp_path):
    from PIL import ImageCms
    plain = Image.new("RGB", (8, 6), (200, 40, 90))
    plain.save(tmp_path / "swapped.png", icc_profile=another_profile())
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain.save(tmp_path / "srgb.png", icc_profile=own)
    plain.save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    as_it_is = show.to_tensor(plain)
    assert torch.equal(show.read_image(tmp_path / "srgb.png"), as_it_is)      # bit for bit
    assert torch.equal(show.read_image(tmp_path / "broken.png"), as_it_is)
    assert (show.read_image(tmp_path / "swapped.png") - as_it_is[:, [1, 0, 2]]).abs().max() < 3 / 255
    seen = plain.convert("RGBA")
    seen.putalpha(100)
    seen.save(tmp_path / "layer.png", icc_profile=another_profile())
    layer = show.read_image(tmp_path / "layer.png", mode="rgba")
    assert (layer[:, :3] - as_it_is[:, [1, 0, 2]]).abs().max() < 3 / 255 and (layer[:, 3] * 255 == 100).all()


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    red = show.read_image(tmp_path / "c.jpg").mean((0, 2, 3))
    assert red[0] > 0.9 and red[1] < 0.1 and red[2] < 0.1


def test_sixteen_bit_is_scaled(tmp_path):
    deep = np.array([[0, 32768], [65535, 1000]], np.uint16)
    save(deep, tmp_path / "d.png")
    x = show.read_image(tmp_path / "d.png")
    assert torch.allclose(x[0, 0], torch.from_numpy(deep.astype(np.float32)) / 65535) and x.shape == (1, 3, 2, 2)
    assert show.read_image(tmp_path / "d.png", "rgba").shape == (1, 4, 2, 2)
    assert show.read_image(save(np.tile(deep, (8, 8)), tmp_path / "e.png"), max_side=4).shape == (1, 3, 4, 4)


def test_float_tiff(tmp_path):
    save(np.array([[0.0, 0.5]], np.float32), tmp_path / "f.tif")
    assert show.read_image(tmp_path / "f.tif")[0, 0].tolist() == [[0.0, 0.5]]
    save(np.array([[0.0, 3.5]], np.float32), tmp_path / "m.tif")
    with pytest.raises(ValueError, match="depth file"):
        show.read_image(tmp_path / "m.tif")


def test_animated_gives_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    x = show.read_image(tmp_path / "a.gif")
    assert x.shape == (1, 3, 3, 5) and x[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_max_side_keeps_aspect(tmp_path):
    save(np.zeros((40, 100, 3), np.uint8), tmp_path / "a.png")
    assert show.read_image(tmp_path / "a.png", max_side=50).shape == (1, 3, 20, 50)
    assert show.read_image(tmp_path / "a.png", max_side=500).shape == (1, 3, 40, 100)
    save(np.zeros((1, 400, 3), np.uint8), tmp_path / "thin.png")
    assert show.read_image(tmp_path / "thin.png", max_side=10).shape == (1, 3, 1, 10)


def test_huge_is_refused_before_decoding(tmp_path, picture):
    for size in ((20_000, 5_001), (60_000, 60_000)):         # above our limit; above Pillow's own
        data = bytearray((save(picture, tmp_path / "a.png")).read_bytes())
        data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        data[29:33] = _crc(bytes(data[12:29]))
        (tmp_path / "huge.png").write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="100 megapixels"):
                show.read_image(tmp_path / "huge.png")


def _crc(data):
    import zlib
    return zlib.crc32(data).to_bytes(4, "big")


def test_bad_files_give_one_clear_error(tmp_path, picture):
    with pytest.raises(FileNotFoundError, match="No picture at"):
        show.read_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="folder"):
        show.read_image(tmp_path)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        show.read_image(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("this is not a picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        show.read_image(tmp_path / "text.png")
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.gif"):
        data = save(big, tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:len(data) // 2])
        with pytest.raises(ValueError, match="damaged|cannot be read"):
            show.read_image(tmp_path / name)
    with pytest.raises(ValueError, match='"rgb" or "rgba"'):
        show.read_image(save(picture, tmp_path / "ok.png"), mode="bgr")
    for error in (ValueError, FileNotFoundError):
        assert issubclass(error, Exception)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not an ordinary file"):
        show.read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("channels", (1, 3, 4))
def test_save_and_read_again(tmp_path, channels):
    x = torch.rand(1, channels, 5, 7, generator=torch.Generator().manual_seed(0))
    path = show.save_image(x, tmp_path / "new" / "a.png")
    again = show.read_image(path, "rgba" if channels == 4 else "rgb")
    assert (again[:, :channels] - x).abs().max() <= 0.5 / 255 + 1e-6
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_save_sixteen_bit(tmp_path):
    x = torch.linspace(0, 1, 101).view(1, 1, 1, -1)
    again = show.read_image(show.save_image(x, tmp_path / "d.png", bits=16))
    assert (again[:, :1] - x).abs().max() < 1e-5


def test_save_refuses_and_leaves_nothing(tmp_path):
    good = torch.zeros(1, 3, 4, 4)
    cases = [(good * float("nan"), "a.png", "NaN"), (good, "a.bmp", "should end in"), (good, "noname", "should end in"),
             (torch.zeros(2, 3, 4, 4), "a.png", "One picture"), (torch.zeros(1, 4, 4, 4), "a.jpg", "no transparency"),
             (torch.zeros(1, 2, 4, 4), "a.png", "channels")]
    for picture, name, message in cases:
        with pytest.raises(ValueError, match=message):
            show.save_image(picture, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_is_atomic(tmp_path, monkeypatch):
    path = show.save_image(torch.zeros(1, 3, 4, 4), tmp_path / "a.png")
    before = path.read_bytes()

    def crash(*_):
        raise OSError("power cut")
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        show.save_image(torch.ones(1, 3, 4, 4), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 5)
    assert show.to_uint8(x).tolist() == [[0, 0, 128, 255, 255]]


def test_over_is_straight_alpha():
    layer = torch.cat([torch.full((1, 3, 2, 2), 0.8), torch.full((1, 1, 2, 2), 0.25)], 1)
    assert torch.allclose(show.over(layer, torch.zeros(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.2))


def test_ids_have_distinct_colours():
    x = show.ids(torch.tensor([[-1, 0, 1, 2, 3]]))
    assert x.shape == (1, 3, 1, 5) and len({tuple(c) for c in x[0, :, 0].T.tolist()}) == 5


def _array(view):
    return np.asarray(Image.open(io.BytesIO(view.png())).convert("RGB"))


def test_pictures_enlarge_crisply_and_exactly():
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    array = _array(show.pictures(x, "sixteen by sixteen", height=1.6))
    wanted = show.to_uint8(x).repeat(10, 0).repeat(10, 1)     # every pixel is exactly 10 x 10
    windows = [(i, j) for i in range(array.shape[0] - 159) for j in range(10, 16)
               if np.array_equal(array[i:i + 160, j:j + 160], wanted)]
    assert windows, "the enlarged picture is not in the figure pixel for pixel"


def test_pictures_of_every_kind_and_titles():
    batch = torch.rand(2, 3, 8, 8)
    view = show.pictures([batch, torch.rand(1, 1, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 1, 8, 8).long() - 1],
                         ["a", "b", "grey", "layer", "ids"], columns=3, height=0.8)
    assert [axes.get_title() for axes in view.axes] == ["a", "b", "grey", "layer", "ids"]
    data, metadata = view._repr_mimebundle_()
    assert data["image/png"][:4] == b"\x89PNG" and "layer" in metadata["image/png"]["alt"]
    with pytest.raises(ValueError, match="titles"):
        show.pictures(batch, ["only one"])
    with pytest.raises(ValueError, match="Nothing to show"):
        show.pictures([])


def test_large_pictures_are_reduced():
    view = show.pictures(torch.zeros(1, 3, 1000, 2000), height=2)
    assert view.get_figheight() < 2.5 and view.get_figwidth() < 4.5


def test_depth_near_is_bright_and_has_a_bar():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 1, 64).expand(1, 1, 64, 64)
    view = show.depth(ramp, "ramp")
    array = _array(view).astype(int)
    row = array[array.shape[0] // 2].sum(1)
    assert row[20] > row[200] + 200
    assert view.axes[-1].get_ylabel() == "depth: 0 near, 1 far"


def test_sheet_has_labels_and_a_size_limit(tmp_path):
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    path = show.sheet([noise, noise[:, :1]], ["noise", "grey"], tmp_path / "s.png", scale=2, title="A sheet")
    assert path.stat().st_size <= show.MAX_FIGURE_BYTES
    with pytest.raises(ValueError, match="more than"):
        show.sheet([noise], ["noise"], tmp_path / "t.png", max_bytes=2000)
    with pytest.raises(ValueError, match="labels"):
        show.sheet([noise], ["a", "b"], tmp_path / "u.png")
    assert [p.name for p in tmp_path.iterdir()] == ["s.png"]


def test_command_line_says_how(capsys):
    assert show.main([]) == 2 and "figures" in capsys.readouterr().err


def test_figures_command(tmp_path, monkeypatch, capsys):
    from lib import widgets
    drawn = tmp_path / "00_a.png"
    monkeypatch.setattr(widgets, "make_figures", lambda folder: [show.save_image(torch.zeros(1, 3, 4, 4), folder / drawn.name)])
    assert show.main(["figures", str(tmp_path)]) == 0 and "00_a.png" in capsys.readouterr().out and drawn.is_file()

    def missing(folder):
        raise RuntimeError("mini is not here: train it")
    monkeypatch.setattr(widgets, "make_figures", missing)
    assert show.main(["figures", str(tmp_path)]) == 1 and capsys.readouterr().err == "error: mini is not here: train it\n"


def test_png_metadata_text_does_not_matter(tmp_path, picture):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * 5000)
    save(picture, tmp_path / "a.png", pnginfo=info)
    assert torch.equal(show.read_image(tmp_path / "a.png"), show.to_tensor(picture))


def test_table_and_run_time_and_map(monkeypatch):
    from pathlib import Path

    from lib import setup
    assert show.table([["paste", 0.12345, 3]], ["method", "error", "n"]).data.endswith("| paste | 0.123 | 3 |")
    mixed = show.table([["a", "words", 0.5, "-"], ["b", "3 lost", -2, "~ 4 %"]], ["what", "said", "error", "share"]).data
    assert mixed.splitlines()[1] == "| --- | --- | ---: | ---: |"
    assert show.table([], ["what", "error"]).data == "| what | error |\n| --- | --- |"
    monkeypatch.setattr(setup, "times", dict)
    assert "not measured yet" in show.run_time("00").data
    monkeypatch.setattr(setup, "times", lambda: {"machine": {"cpu_cores": 2, "device": "cpu"},
                                                 "lessons": {"00": {"seconds": 41.6, "memory_gb": 1.23}}})
    assert "42 s and at most 1.2 GB of memory, on 2 CPU cores" in show.run_time("00").data
    monkeypatch.setattr(setup, "lessons", lambda: [Path("00_start_here.ipynb"), Path("07_deglad.ipynb")])
    text = show.course_map().data
    assert "(07_deglad.ipynb)" in text and "06 · Depth *(to come)*" in text and "(06" not in text


def test_a_missing_stored_picture_says_how_to_make_it(monkeypatch, tmp_path):
    from lib import setup
    monkeypatch.setattr(setup, "figures_dir", lambda: tmp_path)
    assert "make figures" in show.figure("00_nothing").data
    show.save_image(torch.rand(1, 3, 8, 8), tmp_path / "00_there.png")
    assert show.figure("00_there").data[:4] == b"\x89PNG"
