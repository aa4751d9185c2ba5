"""Frames of a video: the one shown at t = 0, 0.1, 0.2 ... seconds, by timestamp, in one forward pass (PyAV).

    for frame in frames("walk.mp4", step=0.1): frame.image, frame.time, frame.pts, frame.dup_of
    extract("walk.mp4", "frames/")                PNG files and frames.jsonl, for lib.batch

`index / fps` is wrong for phones, whose frame rate varies, and seeking finds the wrong frame there. The frame
*shown* at t is the last one with timestamp <= t, as a player does it. Rotation stored in the file is applied;
PyAV does not.
"""
from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from lib.jobs import Refused, read_rows, write_atomic, writing


@dataclass(frozen=True)
class Frame:
    """One frame on the grid.

    index   k of the grid time t = k * step
    time    seconds after the first frame at which it is shown on the grid
    pts     its own timestamp in the file, seconds (may be negative: edit lists)
    dup_of  index of an earlier grid frame that is the same source frame, else None
    image   uint8 (H, W, 3), upright
    """
    index: int
    time: float
    pts: float
    dup_of: int | None
    image: np.ndarray


def decoded(path):
    """Every frame of the first video stream, in the order shown: (timestamp as a Fraction, av.VideoFrame).

    A file that is cut short gives the frames before the cut. ValueError: not a video, or nothing in it
    decodes.
    """
    import av
    path, count = Path(path), 0
    if path.is_dir() or not path.exists():
        raise ValueError(f"There is no video file at {path}.")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path.name} cannot be opened as a video ({_reason(error)}).") from None
    with container:
        if not container.streams.video:
            raise ValueError(f"{path.name} holds no picture track.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        try:
            for frame in container.decode(stream):
                # a decoder invents what is missing at a cut
                if frame.pts is not None and not frame.is_corrupt:
                    count += 1
                    yield frame.pts * (frame.time_base or stream.time_base), frame
        except (av.error.FFmpegError, EOFError) as error:         # what was decoded before a cut is good
            if not count:
                why = _reason(error)
                raise ValueError(f"{path.name} holds no frame that can be decoded ({why}).") from None
    if not count:
        raise ValueError(f"{path.name} holds no frames.")


def pixel_aspect(path) -> Fraction:
    """Width of a pixel over its height, as players show it (old cameras stored pictures squeezed); 1 where
    nobody says."""
    import av
    with contextlib.suppress(av.error.FFmpegError, OSError), av.open(str(path)) as container:
        return next((Fraction(s.sample_aspect_ratio or 1) for s in container.streams.video), Fraction(1))
    return Fraction(1)


def _reason(error) -> str:
    first = str(error).splitlines()[:1]
    return ": ".join([type(error).__name__, *(line[:80] for line in first)])


def on_grid(times, step=Fraction(1, 10)):
    """Which frame is shown at each grid time: [(k, number of the frame)], for timestamps in the order shown.

    t_k = times[0] + k * step; the frame is the last one with timestamp <= t_k; the last t_k is <= the last
    timestamp.
    """
    shown, k = [], 0
    for number, t in enumerate(times):
        while times[0] + k * step < t:                            # these grid times lie before the next frame
            shown.append((k, number - 1))
            k += 1
    return shown + ([(k, len(times) - 1)] if times and times[0] + k * step == times[-1] else [])


def frames(path, step=0.1, max_side=None):
    """Yield the `Frame` shown at each grid time; memory holds two frames, however long the video is.

    step: seconds (exact: 0.1 is taken as 1/10). max_side: larger frames are made smaller, aspect kept.
    ValueError as in `decoded`, or for a step that is not positive.
    """
    step = Fraction(str(step))
    if step <= 0:
        raise ValueError(f"step is seconds between frames, more than 0; it is {float(step):g}.")
    k, first, held, given, aspect = 0, None, None, None, pixel_aspect(path)
    for t, frame in decoded(path):
        first = t if first is None else first
        while held is not None and first + k * step < t:
            given = _given(k, step, held, given, max_side, aspect)
            yield given
            k += 1
        if held is None or t >= held[0]:  # timestamps that run backwards are a broken file
            held = (t, frame)
    if first + k * step == held[0]:                               # the last frame lies on the grid
        yield _given(k, step, held, given, max_side, aspect)


def _given(k, step, held, before, max_side, aspect) -> Frame:
    t, frame = held
    if before is not None and before.pts == float(t):
        source = before.index if before.dup_of is None else before.dup_of
        return Frame(k, float(k * step), float(t), source, before.image)
    return Frame(k, float(k * step), float(t), None, _upright(frame, max_side, aspect))


def _upright(frame, max_side, aspect=1) -> np.ndarray:
    """RGB (10-bit is rounded to 8), with square pixels, turned as the file says, not larger than max_side."""
    picture = frame.to_ndarray(format="rgb24")
    if aspect != 1:
        picture = _resized(picture, (max(1, round(picture.shape[1] * aspect)), picture.shape[0]))
    turns = getattr(frame, "rotation", 0) // 90  # the sign: a test compares with OpenCV's own turn
    picture = np.ascontiguousarray(np.rot90(picture, k=turns))
    if max_side and max(picture.shape[:2]) > max_side:
        scale = max_side / max(picture.shape[:2])
        picture = _resized(picture, [max(1, round(s * scale)) for s in (picture.shape[1], picture.shape[0])])
    return picture


def _resized(picture, size) -> np.ndarray:
    from PIL import Image
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


# ---------------------------------------------------------------- files for a batch

def extract(path, folder, step=0.1, max_side=None) -> Path:
    """Write the frames of a video as PNG and frames.jsonl {index, time, pts, dup_of, file}; returns the
    folder.

    A duplicate gets a line that names the file of the frame it repeats, and no file: a batch need not do it
    twice. Killed in between it goes on where it was; finished (frames.jsonl is written last) it does nothing.
    Refused: the folder holds the frames, or some frames, of another video, step or size.
    """
    from PIL import Image
    folder, rows = Path(folder), []
    source = {"video": Path(path).name, "bytes": Path(path).stat().st_size if Path(path).is_file() else -1,
              "step": float(step), "max_side": max_side}
    listing, begun = folder / "frames.jsonl", folder / "frames.part.jsonl"
    head = next((read_rows(path)[:1] for path in (listing, begun) if path.is_file()), [])
    if head and head[0] != source:
        raise Refused(f"{folder} holds frames of another video, step or size; give a new folder.")
    if listing.is_file():
        begun.unlink(missing_ok=True)
        return folder
    for frame in frames(path, step, max_side):
        if not rows:  # it is a video: now something may be written
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(begun, (json.dumps(source) + "\n").encode())
        name = f"frame{frame.index if frame.dup_of is None else frame.dup_of:06d}.png"
        rows.append({"index": frame.index, "time": frame.time, "pts": frame.pts, "dup_of": frame.dup_of,
                     "file": name})
        if frame.dup_of is None and not (head and (folder / name).exists()):
            buffer = io.BytesIO()
            Image.fromarray(frame.image).save(buffer, "PNG", compress_level=3)
            write_atomic(folder / name, buffer.getvalue())
    write_atomic(listing, "".join(json.dumps(row) + "\n" for row in [source, *rows]).encode())
    begun.unlink(missing_ok=True)
    return folder


def read_frames(folder) -> list[dict]:
    """The rows of frames.jsonl: one for each grid time."""
    return read_rows(Path(folder) / "frames.jsonl")[1:]


# ---------------------------------------------------------------- writing

def write(path, images, times, bit_depth=8, options=None):
    """Encode uint8 frames (H, W, 3) shown at `times` (seconds, increasing; the rate may vary) as H.264,
    atomically.

    Height and width must be even. Used for the course's sample and for tests; bit_depth=10 writes yuv420p10.
    """
    import av
    path, base = Path(path), Fraction(1, 90_000)
    temp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        with av.open(str(temp), "w") as container:
            stream = container.add_stream("libx264", rate=30, options=options or {"crf": "20"})
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "yuv420p" if bit_depth == 8 else "yuv420p10le"
            stream.codec_context.time_base = base
            for image, time in zip(images, times):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = round(Fraction(str(time)) / base), base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)
    return path


def walk(seconds=5.0, fps=12, size=(240, 320)):
    """A camera that rises through a room of the Miniature like a crane: (frames uint8, times).
    Deterministic."""
    from dataclasses import replace

    from lib import scenes, show
    scene, count = scenes.sample(scenes.EXAMPLE), round(seconds * fps)
    images = []
    for k in range(count):
        s = k / max(1, count - 1)
        camera = replace(scene.camera, **_path(scene.camera, s))
        images.append(show.to_uint8(scenes.render(replace(scene, camera=camera), size, samples=3).rgb))
    return images, [k / fps for k in range(count)]


def walk_depth(folder, seconds=5.0) -> Path:
    """Beside the sample's extracted frames, their exact depth in metres as .npy, from the renderer; returns
    the folder.

    Home video has no such thing; the sample has, so that a lesson's edits can be right or wrong by the edit
    alone.
    """
    from dataclasses import replace

    from PIL import Image

    from lib import scenes
    folder, scene = Path(folder), scenes.sample(scenes.EXAMPLE)
    for row in read_frames(folder):
        path = (folder / row["file"]).with_suffix(".npy")
        if not path.exists():
            with Image.open(folder / row["file"]) as frame:
                size = frame.size[::-1]
            camera = replace(scene.camera,
                             **_path(scene.camera, min(1.0, row["pts"] * 12 / (seconds * 12 - 1))))
            buffer = io.BytesIO()
            np.save(buffer, scenes.render(replace(scene, camera=camera), size, samples=1).depth[0, 0].numpy())
            write_atomic(path, buffer.getvalue())
    return folder


def _path(camera, s) -> dict:
    """Where the camera is after a share s of the walk: fields of scenes.Camera."""
    s = s * s * (3 - 2 * s)                                       # starts and stops gently
    return {"height": 1.0 + 1.0 * s, "pitch": 5.0 + 16.0 * s, "fov": camera.fov - 4 * s}


def make_sample(path=None) -> Path:
    """Draw data/scenes/walk.mp4 again (some seconds)."""
    from lib import setup
    path = Path(path or setup.data_dir() / "scenes" / "walk.mp4")
    return write(path, *walk(), options={"crf": "19", "preset": "slow"})


if __name__ == "__main__":
    import sys
    print(make_sample(*sys.argv[1:2]))
