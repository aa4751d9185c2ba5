"""A folder of broken, odd and hostile inputs, made by code: name -> what must become of it ("ok" or a
bad_input)."""
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (64, 48)         # width, height


def good(seed=0, mode="RGB", size=SIZE):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(base).resize(size, Image.Resampling.BILINEAR).convert(mode)


def encoded(picture, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def deep(top=65535):
    ramp = np.linspace(0, top, SIZE[0], dtype=np.uint16)[None].repeat(SIZE[1], 0)
    return encoded(Image.fromarray(ramp))


def with_exif(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(good(number), "JPEG", exif=exif.tobytes())


def broken_exif():
    return encoded(good(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xfe" * 40)


def huge_header():
    """A PNG of 200,000 x 200,000 pixels, whose file is 60 bytes: memory must not be taken for it."""
    head = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    number = lambda n: struct.pack(">I", n)
    chunk = lambda name, data: number(len(data)) + name + data + number(zlib.crc32(name + data))
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def animated():
    return encoded(good(), "GIF", save_all=True, append_images=[good(1), good(2)], duration=100)


def bad_crc():
    data = bytearray(encoded(good()))
    data[data.index(b"IDAT") + 20] ^= 0xFF
    return bytes(data)


def float_tiff():
    return encoded(Image.fromarray(np.full((48, 64), 7.5, np.float32)), "TIFF")


#: name -> (bytes, expected status)
FILES = {
    "plain.png": (encoded(good()), "ok"),
    "plain.jpg": (encoded(good(), "JPEG"), "ok"),
    "plain.webp": (encoded(good(), "WEBP"), "ok"),
    "plain.bmp": (encoded(good(), "BMP"), "ok"),
    "plain.tiff": (encoded(good(), "TIFF"), "ok"),
    "upper.PNG": (encoded(good()), "ok"),
    "png_named.jpg": (encoded(good()), "ok"),
    "jpg_named.png": (encoded(good(), "JPEG"), "ok"),
    "grey.png": (encoded(good(mode="L")), "ok"),
    "one_bit.png": (encoded(good(mode="1")), "ok"),
    "grey_alpha.png": (encoded(good(mode="LA")), "ok"),
    "alpha.png": (encoded(good(mode="RGBA")), "ok"),
    "palette.png": (encoded(good().quantize(16)), "ok"),
    "palette_transparent.png": (encoded(good().quantize(16), transparency=3), "ok"),
    "cmyk.jpg": (encoded(good(mode="CMYK"), "JPEG"), "ok"),
    "ycbcr.tiff": (encoded(good(mode="YCbCr"), "TIFF"), "ok"),
    "lab.tiff": (encoded(good(mode="RGB").convert("LAB"), "TIFF"), "ok"),
    "sixteen_bit.png": (deep(), "ok"),
    "progressive.jpg": (encoded(good(), "JPEG", progressive=True), "ok"),
    "animated.gif": (animated(), "ok"),
    "broken_exif.jpg": (broken_exif(), "ok"),
    **{f"exif_{n}.jpg": (with_exif(n), "ok") for n in range(1, 9)},
    "unicode_Đào_tạo_深度_🪑.png": (encoded(good()), "ok"),
    "spaces and 'quotes' \"double\".png": (encoded(good()), "ok"),
    "new\nline.png": (encoded(good()), "ok"),
    "-rf.png": (encoded(good()), "ok"),
    "a" * 240 + ".png": (encoded(good()), "ok"),
    "same.name.png": (encoded(good(5)), "ok"),
    "deep/er/folder/same.name.png": (encoded(good(6)), "ok"),
    ".hidden.png": (encoded(good()), "ok"),
    "black.png": (encoded(Image.new("RGB", SIZE)), "ok"),
    "empty.png": (b"", "bad_input"),
    "empty.jpg": (b"", "bad_input"),
    "text.png": (b"this is no picture\n" * 20, "bad_input"),
    "html.jpg": (b"<html><body>404 not found</body></html>", "bad_input"),
    "zeros.png": (bytes(5000), "bad_input"),
    "cut_head.png": (encoded(good())[:20], "bad_input"),
    "cut_half.png": (encoded(good())[:len(encoded(good())) // 2], "bad_input"),
    "cut_half.jpg": (encoded(good(), "JPEG")[:700], "bad_input"),
    "bad_crc.png": (bad_crc(), "bad_input"),
    "huge_header.png": (huge_header(), "bad_input"),
    "one_pixel.png": (encoded(good(size=(1, 1))), "bad_input"),
    "thin.png": (encoded(good(size=(400, 3))), "bad_input"),
    "float_values.tiff": (float_tiff(), "bad_input"),
    "pdf.png": (b"%PDF-1.7\n" + bytes(100), "bad_input"),
    "zip.png": (b"PK\x03\x04" + bytes(100), "bad_input"),
    "video.gif": (b"\0\0\0\x18ftypmp42" + bytes(400), "bad_input"),
}


def make(folder: Path) -> dict:
    """Write them all; returns {id: expected status}."""
    expected = {}
    for name, (data, status) in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = status
    (folder / "directory.png").mkdir()
    expected["directory.png"] = "bad_input"
    if os.name == "posix":
        raw = os.fsencode(str(folder)) + b"/not_utf8_\xff\xfe.png"
        Path(os.fsdecode(raw)).write_bytes(encoded(good()))
        expected[os.fsdecode(b"not_utf8_\xff\xfe.png")] = "ok"
        (folder / "loop.png").symlink_to("loop.png")
        (folder / "dangling.png").symlink_to("nowhere.png")
        (folder / "link.png").symlink_to("plain.png")
        (folder / "circle").symlink_to(".")                       # a folder that holds itself
        os.mkfifo(folder / "pipe.png")                            # opening it would wait for ever
        expected |= {"loop.png": "bad_input", "dangling.png": "bad_input", "link.png": "ok",
                     "pipe.png": "bad_input"}
    (folder / "Thumbs.db").write_bytes(b"not a picture, and not named like one")
    return expected


def depth_cases() -> dict:
    """name -> (depth file's suffix and bytes, or None; expected status) for pictures that come with depth."""
    w, h = SIZE
    ramp = np.linspace(1, 5, w, dtype=np.float32)[None].repeat(h, 0)
    holes, nan = ramp.copy(), ramp.copy()
    holes[10:20] = 0
    nan[5:9] = np.nan
    millimetres = Image.fromarray((ramp * 1000).astype(np.uint16))

    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()
    return {
        "depth_good": (".npy", npy(ramp), "ok"),
        "depth_millimetres": (".png", encoded(millimetres), "ok"),
        "depth_holes": (".npy", npy(holes), "ok"),
        "depth_nan": (".npy", npy(nan), "ok"),
        "depth_inf": (".npy", npy(np.where(ramp > 4, np.inf, ramp)), "ok"),
        "depth_all_nan": (".npy", npy(np.full_like(ramp, np.nan)), "bad_input"),
        "depth_all_zero": (".npy", npy(np.zeros_like(ramp)), "bad_input"),
        "depth_constant": (".npy", npy(np.full_like(ramp, 2)), "bad_input"),
        "depth_negative": (".npy", npy(-ramp), "bad_input"),
        "depth_wrong_size": (".npy", npy(ramp[:-3]), "bad_input"),
        "depth_turned": (".npy", npy(np.ascontiguousarray(ramp.T)), "bad_input"),
        "depth_text": (".npy", b"no array", "bad_input"),
        "depth_pickle": (".npy", npy(np.array([{"a": 1}], dtype=object)), "bad_input"),  # never unpickled
        "depth_eight_bit": (".png", encoded(good(mode="L")), "bad_input"),
        "depth_colour_map": (".png", encoded(good()), "bad_input"),
        "depth_missing": (None, b"", "bad_input"),
        "mask_empty": (".npy", npy(np.where(np.arange(w) < 1, 1, 9).astype(np.float32)[None].repeat(h, 0)
                                   + ramp * 0),
                       "ok"),
        "mask_full": (".npy", npy(np.where(np.arange(w) < w - 2, 1, 9).astype(np.float32)[None].repeat(h, 0)),
                      "ok"),
    }


def make_depth(folder: Path) -> dict:
    """Pictures and depth files side by side; returns {id: expected status}."""
    (folder / "rgb").mkdir(parents=True)
    (folder / "depth").mkdir()
    expected = {}
    for k, (name, (suffix, data, status)) in enumerate(depth_cases().items()):
        good(k).save(folder / "rgb" / f"{name}.png")
        if suffix:
            (folder / "depth" / f"{name}{suffix}").write_bytes(data)
        expected[f"{name}.png"] = status
    return expected
