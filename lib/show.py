"""Pictures in, pictures out: one robust reader, one atomic writer, and crisp labelled views.

Everything in the course reads pictures through `read_image` and shows them through `pictures`, `depth`,
`figure` or `sheet`. Tensors follow the course's convention: float32, (B, C, H, W), RGB, [0, 1]; RGBA has
straight alpha.
"""
import importlib
import io
import pkgutil
import math
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_PIXELS = 100_000_000  # as float32 that is 1.2 GB: above it we ask for a smaller one
MAX_FIGURE_BYTES = 150_000      # limit of every file in figures/
DEPTH_CMAP = "magma_r"          # near = bright, far = dark
ID_COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d",
              "#ff9da6")
DPI = 100


# ---------------------------------------------------------------- tensors and arrays

def to_tensor(picture):
    """PIL picture, array or tensor -> float32 tensor (B, C, H, W) in [0, 1].

    uint8 is divided by 255, uint16 by 65535; floats are taken as they are. Arrays are (H, W), (H, W, C) or
    (B, H, W, C); tensors are (H, W), (C, H, W) or (B, C, H, W). Raises ValueError for any other shape.
    """
    if isinstance(picture, torch.Tensor):
        x = picture.detach().cpu().float() / (255 if picture.dtype == torch.uint8 else 1)
        x = x[None, None] if x.ndim == 2 else x[None] if x.ndim == 3 else x
    else:
        array = np.asarray(picture)
        scale = {np.dtype("uint8"): 255.0, np.dtype("uint16"): 65535.0}.get(array.dtype, 1.0)
        x = torch.from_numpy(array.astype(np.float32) / np.float32(scale))
        x = x[None, :, :, None] if x.ndim == 2 else x[None] if x.ndim == 3 else x
        x = x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x
    if x.ndim != 4 or x.shape[1] not in (1, 3, 4) or 0 in x.shape:
        raise ValueError("A picture has 1, 3 or 4 channels and shape (B, "
                         f"C, H, W); this one has {tuple(x.shape)}.")
    return x


def to_uint8(picture):
    """One picture -> uint8 array (H, W) or (H, W, 3 | 4), clamped. ValueError for NaN or a batch > 1."""
    x = to_tensor(picture)
    if x.shape[0] != 1:
        raise ValueError(f"One picture at a time, please: this tensor holds {x.shape[0]}.")
    if not torch.isfinite(x).all():
        raise ValueError("The picture holds NaN or infinite values, so it cannot be shown or saved.")
    array = (x[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return array[:, :, 0] if array.shape[2] == 1 else array


def checkerboard(height, width, cell=8):
    """Grey checkerboard (1, 3, H, W): what a transparent layer is shown on."""
    rows = torch.arange(height)[:, None] // cell
    columns = torch.arange(width)[None, :] // cell
    return (0.92 - 0.17 * ((rows + columns) % 2).float()).expand(1, 3, height, width).clone()


def over(layer, background=None):
    """RGBA layer (B, 4, H, W), straight alpha, over a picture (B, 3, H, W) or over a checkerboard."""
    layer = to_tensor(layer)
    background = checkerboard(*layer.shape[-2:]) if background is None else to_tensor(background)
    return layer[:, :3] * layer[:, 3:] + background * (1 - layer[:, 3:])


def colour_depth(values):
    """Depth (B, 1, H, W) in [0, 1] or a DepthMap -> colour picture (B, 3, H, W), near = bright."""
    values = values if isinstance(values, torch.Tensor) else values.values
    rgba = torch.from_numpy(colormaps[DEPTH_CMAP](values[:, 0].detach().cpu().clamp(0, 1).numpy()))
    return rgba[..., :3].float().permute(0, 3, 1, 2).contiguous()


def ids(values):
    """Object ids (B, 1, H, W), -1 = room -> a colour picture (B, 3, H, W); one colour for each object."""
    values = torch.as_tensor(values).long().cpu()
    values = values[None, None] if values.ndim == 2 else values[None] if values.ndim == 3 else values
    table = torch.tensor([[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in ID_COLOURS])
    colours = table[values[:, 0] % len(table)].permute(0, 3, 1, 2)
    return torch.where(values >= 0, colours, torch.full_like(colours, 0.85))


# ---------------------------------------------------------------- files

def _open(path):
    """Open and decode the first frame; every failure becomes one clear error."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture: give the path of one picture file.")
    if not path.exists():
        where = "" if path.is_absolute() else f" (it is read from {Path.cwd()})"
        raise FileNotFoundError(f"No picture at {path}: check the path{where}.")
    if not path.is_file():
        raise ValueError(f"{path} is not an ordinary file: give the path of one picture file.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes): copy or download it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning: our limit is stricter
            picture = Image.open(path)
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture ({_reason(error)}): "
                         "use PNG, JPEG, WebP, TIFF, BMP or GIF.") from None
    if picture.width * picture.height > MAX_PIXELS:
        picture.close()
        raise _too_large(path, picture.size)
    return picture


def _reason(error):
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text[:80]}" if text and "identify" not in text else "unknown format"


def _too_large(path, size=None):
    what = f"{size[0]} x {size[1]} pixels" if size else "far too many pixels"
    return ValueError(f"{path} has {what}, and the limit is "
                      f"{MAX_PIXELS // 1_000_000} megapixels: make it smaller first.")


def _upright(picture):
    """Apply the camera's rotation (EXIF 1-8); a broken EXIF block is no reason to refuse a good picture."""
    try:
        return ImageOps.exif_transpose(picture)
    except (OSError, RuntimeError):
        raise
    except Exception:
        return picture


def _as_srgb(picture):
    """The colours as sRGB: a phone's Display P3 or a camera's Adobe RGB, taken for sRGB, would look dull."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK"):
        return picture
    try:
        from PIL import ImageCms
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():    # as it is, bit for bit
            return picture
        mode = "RGBA" if picture.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), 1, outputMode=mode)
    except Exception:                                # a broken profile is no reason to refuse a good picture
        return picture


def _shrink(picture, max_side):
    if not max_side or max(picture.size) <= max_side:
        return picture
    scale = max_side / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _deep_to_float(picture, path):
    """16-bit and float greyscale pictures -> float32 picture in [0, 1]."""
    array = np.asarray(picture)
    if picture.mode == "F":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError(f"{path} holds floating-point values outside [0, 1], so it is not a picture: "
                             "if it is a depth file, read it with lib.depth.given.")
        return Image.fromarray(array.astype(np.float32))
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"{path} holds integers outside 0-65535, so it is not a picture.")
    return Image.fromarray(array.astype(np.float32) / np.float32(65535))


def read_image(path, mode="rgb", max_side=None):
    """Read any ordinary picture file -> float32 (1, 3, H, W), or (1, 4, H, W) for mode="rgba", in [0, 1].

    Handles EXIF rotation, grey, alpha, CMYK, palette, 16-bit (65535 = 1.0) and animated files (first frame).
    Colours of another ICC profile become sRGB.
    With mode="rgb" transparent parts are laid over white; with mode="rgba" a picture without alpha gets alpha
        1.
    max_side: pictures larger than this (pixels) are made smaller, aspect kept.
    Raises FileNotFoundError (no such file) or ValueError (folder, empty, broken, too large), each with one
    sentence.
    """
    if mode not in ("rgb", "rgba"):
        raise ValueError(f'mode is "rgb" or "rgba", not {mode!r}.')
    if max_side is not None and max_side < 1:
        raise ValueError(f"max_side is a number of pixels >= 1, not {max_side}.")
    picture = _open(path)
    try:
        picture.load()
        picture = _as_srgb(_upright(picture))
        if picture.mode[0] in "IF":
            deep = _shrink(_deep_to_float(picture, path), max_side)
            grey = to_tensor(np.asarray(deep)).clamp(0, 1).expand(1, 3, -1, -1)
            return torch.cat([grey, torch.ones_like(grey[:, :1])], 1) if mode == "rgba" else grey.clone()
        has_alpha = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
        picture = _shrink(picture.convert("RGBA" if has_alpha or mode == "rgba" else "RGB"), max_side)
    except ValueError:
        raise
    except Exception as error:                       # Pillow's decoders raise many types on a damaged file
        raise ValueError(f"{path} is damaged or cut short "
                         f"({_reason(error)}): copy or download it again.") from None
    finally:
        picture.close() if hasattr(picture, "fp") else None
    x = to_tensor(np.array(picture))
    return over(x, torch.ones(1, 3, 1, 1)) if x.shape[1] == 4 and mode == "rgb" else x


def _atomic(path, data):
    """Write bytes so that a crash never leaves a half-written file: temp file beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temp, 0o666 & ~_umask())
        os.replace(temp, path)
    except BaseException:
        Path(temp).unlink(missing_ok=True)
        raise
    return path


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_image(picture, path, bits=8):
    """Save one picture (1, 1 | 3 | 4, H, W) in [0, 1] as .png, .jpg or .webp, atomically. Returns the path.

    bits=16 keeps a one-channel picture (a depth map) in 16-bit PNG. Values outside [0, 1] are clamped.
    Raises ValueError for NaN, a batch, an unknown suffix, or alpha in a JPEG.
    """
    path = Path(path).expanduser()
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path.name} should end in .png, .jpg or .webp.")
    array = to_uint8(picture)
    if kind == "JPEG" and array.ndim == 3 and array.shape[2] == 4:
        raise ValueError("A JPEG has no transparency: save an RGBA layer as .png.")
    if bits == 16:
        if kind != "PNG" or array.ndim != 2:
            raise ValueError("bits=16 is for one-channel PNG files.")
        array = (to_tensor(picture)[0, 0].clamp(0, 1).numpy() * 65535).round().astype(np.uint16)
    buffer = io.BytesIO()
    png = {"optimize": array.size < 3_000_000}  # a large one: a few per cent smaller, 5x as slow
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, png)
    Image.fromarray(array).save(buffer, kind, **options)
    return _atomic(path, buffer.getvalue())


# ---------------------------------------------------------------- views

class View(Figure):
    """A matplotlib Figure that shows itself once, with or without `%matplotlib inline`, and has alt text."""

    alt = "picture"

    def png(self):
        """The figure as PNG bytes."""
        buffer = io.BytesIO()
        FigureCanvasAgg(self).print_png(buffer)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None):
        return ({"image/png": self.png(), "text/plain": f"<{self.alt}>"}, {"image/png": {"alt": self.alt}})


def _flat(images):
    """A tensor, or a list of tensors / arrays / batches -> list of (1, C, H, W); integer ids are coloured."""
    flat = []
    for image in images if isinstance(images, (list, tuple)) else [images]:
        tensor = isinstance(image, torch.Tensor)
        whole = tensor and not image.is_floating_point() and image.dtype != torch.uint8
        image = ids(image) if whole else to_tensor(image)
        flat += list(image.split(1))
    return flat


def _grid(count, columns):
    columns = min(columns or min(count, 4), count)
    return math.ceil(count / columns), columns


def _fit(size, target):
    """Whole-number enlargement of a small picture (crisp, even pixels); any reduction of a large one."""
    return max(1, round(target / size)) if size <= target * 1.4 else target / size


def pictures(images, titles=None, columns=None, height=2.4, cmap="gray", vmin=0.0, vmax=1.0, bar=None):
    """Show pictures side by side, small ones enlarged by a whole number so that each pixel stays crisp.

    images: one tensor or a list; (B, C, H, W) batches are spread out. RGB as it is, RGBA on a checkerboard,
    one channel through `cmap` between vmin and vmax, integer ids in one colour for each object.
    titles: one for each picture. height: inches of one picture. bar: label of a colour bar, or None.
    Returns a matplotlib Figure. Raises ValueError when the titles do not match or nothing is given.
    """
    flat = _flat(images)
    if not flat:
        raise ValueError("Nothing to show: the list of pictures is empty.")
    titles = [titles] if isinstance(titles, str) else list(titles or [])
    if titles and len(titles) != len(flat):
        raise ValueError(f"{len(flat)} pictures but {len(titles)} titles.")
    rows, columns = _grid(len(flat), columns)
    scales = [_fit(x.shape[-2], height * DPI) for x in flat]
    cell_w = max(x.shape[-1] * s for x, s in zip(flat, scales))
    cell_h = max(x.shape[-2] * s for x, s in zip(flat, scales))
    lines = max((t.count("\n") + 1 for t in titles), default=0)
    top, gap, right = 16 * lines + (8 if lines else 0), 12, 80 if bar else 0
    width = columns * (cell_w + gap) + gap + right
    total = rows * (cell_h + top + gap) + gap
    view = View(figsize=(width / DPI, total / DPI), dpi=DPI, facecolor="white")
    for i, (x, scale) in enumerate(zip(flat, scales)):
        row, column = divmod(i, columns)
        w, h = x.shape[-1] * scale, x.shape[-2] * scale
        left = gap + column * (cell_w + gap) + (cell_w - w) // 2
        lower = total - (row + 1) * (cell_h + top + gap) + (cell_h - h) // 2
        axes = view.add_axes((left / width, lower / total, w / width, h / total))
        shown = _draw(axes, x, cmap, vmin, vmax, scale)
        if titles:
            axes.set_title(titles[i], fontsize=10.5, pad=5)
    if bar:
        _add_bar(view, shown, bar, (width - right + 4) / width, (gap + 4) / total, 14 / width,
                 (cell_h - 8) / total)
    view.alt = "pictures: " + "; ".join(t.replace("\n", " ") for t in titles) if titles else "pictures"
    return view


def _draw(axes, x, cmap, vmin, vmax, scale):
    axes.set_axis_off()
    smooth = "nearest" if scale >= 1 else "antialiased"
    if x.shape[1] == 1:
        return axes.imshow(x[0, 0].numpy(), cmap=cmap, vmin=vmin, vmax=vmax, interpolation=smooth)
    return axes.imshow(to_uint8(over(x) if x.shape[1] == 4 else x), interpolation=smooth)


def _add_bar(view, shown, label, left, lower, width, height):
    bar = view.colorbar(shown, cax=view.add_axes((left, lower, width, height)))
    bar.set_label(label, fontsize=9.5)
    bar.ax.tick_params(labelsize=8.5)


def depth(values, titles=None, columns=None, height=2.4, vmin=0.0, vmax=1.0, label="depth: 0 near, 1 far"):
    """Show depth maps (B, 1, H, W), a DepthMap, or a list of them, near = bright, with a colour bar.

    For metres give vmin, vmax and a label such as "z (m)".
    """
    values = values if isinstance(values, (list, tuple)) else [values]
    values = [v if isinstance(v, torch.Tensor) else getattr(v, "values", v) for v in values]
    return pictures(values, titles, columns, height, DEPTH_CMAP, vmin, vmax, bar=label)


def figure(name, alt=None, width=None):
    """Show the stored picture figures/<name>.png; alt: the picture in words, for who cannot see it.

    Without the file, one line that says how to make it.
    """
    from IPython.display import Image as Shown
    from IPython.display import Markdown

    from lib import setup
    path = Path(setup.figures_dir()) / f"{name}.png"
    if not path.exists():
        return Markdown(f"*(The picture `figures/{name}.png` is not here; `make figures` draws it.)*")
    return Shown(filename=str(path), width=width, alt=alt or name.replace("_", " "))


def tile(images, labels, columns=None, scale=None, title=None):
    """Labelled pictures side by side as one PIL picture: as `pictures`, without matplotlib, in milliseconds.

    images: list of (1, C, H, W); labels: one for each (may be ""). scale: whole-number enlargement (chosen
    when None).
    """
    flat = _flat(images)
    if len(flat) != len(labels):
        raise ValueError(f"{len(flat)} pictures but {len(labels)} labels.")
    scale = scale or max(1, round(200 / max(x.shape[-2] for x in flat)))
    return _draw_sheet(flat, labels, columns, scale, title)


def table(rows, header):
    """Rows of text and numbers (floats get 3 decimals) -> a Markdown table for the notebook.

    A column of numbers stands to the right; the first one, and columns of words, to the left."""
    from IPython.display import Markdown
    rows = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    numbers = [all(re.match(r"\W*(\d|$)", cell) for cell in column) for column in zip(*rows)]
    sides = ["---:" if k and right else "---" for k, right in enumerate(numbers or [False] * len(header))]
    return Markdown("\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, sides, *rows]))


def sheet(images, labels, path, columns=None, scale=None, title=None, max_bytes=MAX_FIGURE_BYTES):
    """Write one labelled PNG of many pictures: the benchmark's sheets and the files in figures/.

    images: list of (1, C, H, W); labels: one for each (may be ""). scale: whole-number enlargement (chosen
    when None). A file above max_bytes is saved with 256 colours, then at a smaller scale. Returns the path.
    """
    scale = scale or max(1, round(200 / max(x.shape[-2] for x in _flat(images))))
    for step in range(scale, 0, -1):
        drawn = tile(images, labels, columns, step, title)
        fewer = drawn.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        for data in (_png(drawn), _png(fewer)):
            if max_bytes is None or len(data) <= max_bytes:
                return _atomic(Path(path), data)
    raise ValueError(f"{path} would be {len(data) // 1000} kB, more than "
                     f"{max_bytes // 1000} kB: show fewer pictures.")


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _draw_sheet(flat, labels, columns, scale, title):
    rows, columns = _grid(len(flat), columns)
    cell_w = max(x.shape[-1] for x in flat) * scale
    cell_h = max(x.shape[-2] for x in flat) * scale
    font, big = ImageFont.load_default(13), ImageFont.load_default(16)
    lines = max((text.count("\n") + 1 for text in labels if text), default=0)
    top, gap, head = 17 * lines + (5 if lines else 0), 8, 28 if title else 0
    size = columns * (cell_w + gap) + gap, head + rows * (cell_h + top + gap) + gap
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, gap), title, fill="black", font=big)
    for i, (x, label) in enumerate(zip(flat, labels)):
        row, column = divmod(i, columns)
        left, upper = gap + column * (cell_w + gap), head + gap + row * (cell_h + top + gap)
        pen.multiline_text((left + 1, upper), label, fill="black", font=font, spacing=2)
        array = to_uint8(over(x) if x.shape[1] == 4 else x)
        picture = Image.fromarray(array).convert("RGB")
        size = picture.width * scale, picture.height * scale
        canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (left, upper + top))
    return canvas


# ---------------------------------------------------------------- what every lesson's card and map say

COURSE = {"00": "Start here: the world, the convention, one edit", "01": "Latent space",
          "02": "Self-attention", "03": "Diffusion from scratch", "04": "Inpainting",
          "05": "Image completion, trained", "06": "Depth", "07": "Layers at a depth (DeGLaD)",
          "08": "Feature injection", "09": "FeatGLaC: composing the layers",
          "10": "Editing with a reference", "11": "Transparent layers", "12": "Measuring an edit",
          "14": "From video to a batch", "15": "25,000 images on two GPUs"}


def run_time(lesson):
    """The card's line on measured run time, from data/times.json (`make times` writes it)."""
    from IPython.display import Markdown

    from lib import setup
    measured = setup.times()
    row, machine = measured.get("lessons", {}).get(lesson), measured.get("machine", {})
    if not row:
        return Markdown("**Measured run time:** not measured yet (`make times` does it).")
    device = machine.get("device", "cpu")
    where = f"{machine.get('cpu_cores', '?')} CPU cores" if device == "cpu" else device
    return Markdown(f"**Measured run time:** {row['seconds']:.0f} s and at most "
                    f"{row['memory_gb']:.1f} GB of memory, on {where}.")


def course_map(here="00"):
    """The lessons: a link where the notebook exists now, plain words where it is still to come."""
    from IPython.display import Markdown

    from lib import setup
    files = {path.name[:2]: path.name for path in setup.lessons()}
    lines = []
    for number in sorted(set(COURSE) | set(files)):
        title = COURSE.get(number) or files[number][3:-6].replace("_", " ")
        words = f"{number} · {title}"
        link = f"[{words}]({files[number]})" if number in files else f"{words} *(to come)*"
        lines.append(f"* **{link}** you are here" if number == here else f"* {link}")
    return Markdown("\n".join(lines))


# ---------------------------------------------------------------- figures/

def figure_makers():
    """Names of the modules that draw stored pictures with `make_figures(folder)`: those of the widgets."""
    import lib
    names = (m.name for m in pkgutil.iter_modules(lib.__path__, "lib."))
    return sorted(name for name in names if name.startswith("lib.widgets"))


def make_figures(folder=None):
    """Draw every stored picture again (a few seconds each). Returns the paths."""
    from lib import setup
    folder = Path(folder or setup.figures_dir())
    return [path for name in figure_makers() for path in importlib.import_module(name).make_figures(folder)]


def main(arguments):
    if not arguments or arguments[0] != "figures" or len(arguments) > 2:
        print("usage: python -m lib.show figures [FOLDER]", file=sys.stderr)
        return 2
    try:
        paths = make_figures(*arguments[1:])
    except (RuntimeError, ValueError, OSError) as error:          # a missing model says itself what to do
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
