"""lib.video: the frame shown at each grid time, against the frames' own timestamps and against OpenCV."""
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lib import jobs, setup, video

av = pytest.importorskip("av")


def numbered(n, size=(64, 96)):
    """A frame that shows its number as 8 wide stripes of black and white, which survive compression."""
    bits = [(n >> k) & 1 for k in range(8)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None] * 235 + 10, size[0], 0), size[1] // 8,
                     1).repeat(3, 2)


def number(image):
    means = image.mean((0, 2)).reshape(8, -1).mean(1)
    return int(sum((m > 128) << k for k, m in enumerate(means)))


def variable():
    """30 fps, then a hole of 0.42 s, then 12 fps, then 60 fps: timestamps in seconds."""
    times = [k / 30 for k in range(30)]
    times += [times[-1] + 0.42 + k / 12 for k in range(12)]
    return times + [times[-1] + (k + 1) / 60 for k in range(60)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    times = variable()
    path = tmp_path_factory.mktemp("video") / "vfr.mp4"
    return video.write(path, [numbered(k) for k in range(len(times))], times), times


def test_shown_frames_of_a_variable_rate(clip):
    path, times = clip
    got = list(video.frames(path, 0.1))
    for k, frame in enumerate(got):
        shown = max(n for n, t in enumerate(times) if t - times[0] <= k * 0.1 + 1e-4)
        assert frame.index == k and frame.time == pytest.approx(k * 0.1)
        assert number(frame.image) == shown
        assert frame.pts == pytest.approx(times[shown], abs=1e-4)
    assert len(got) == int(times[-1] / 0.1 + 1e-6) + 1


def test_index_times_rate_would_be_wrong_there(clip):
    """What the module's docstring warns of: frame k * 0.1 * (mean rate) is another frame."""
    path, times = clip
    rate = (len(times) - 1) / times[-1]
    wrong = sum(number(f.image) != round(f.time * rate) for f in video.frames(path))
    assert wrong > 10


def test_duplicates_point_to_the_first_of_them(clip):
    got = list(video.frames(clip[0], 0.1))
    repeats = [f for f in got if f.dup_of is not None]
    assert len(repeats) >= 3                               # the hole of 0.42 s
    for f in repeats:
        first = got[f.dup_of]
        assert first.dup_of is None and first.pts == f.pts and np.array_equal(first.image, f.image)


def test_grid_rule_is_the_same_as_in_frames(clip):
    path, _ = clip
    times = [t for t, _ in video.decoded(path)]
    got = [(f.index, f.pts) for f in video.frames(path, 0.1)]
    assert got == [(k, float(times[n])) for k, n in video.on_grid(times, Fraction(1, 10))]
    assert video.on_grid([]) == [] and video.on_grid([Fraction(3)]) == [(0, 0)]


def test_negative_first_timestamp(clip, monkeypatch):
    """The grid starts at the first frame, wherever its clock stands."""
    plain = list(video.frames(clip[0]))
    real = video.decoded
    monkeypatch.setattr(video, "decoded",
                        lambda path: ((t - Fraction(1, 4), frame) for t, frame in real(path)))
    early = list(video.frames(clip[0]))
    assert early[0].pts == -0.25 and early[0].time == 0
    assert [number(f.image) for f in early] == [number(f.image) for f in plain]


def test_an_edit_list_hides_what_lies_before_it(tmp_path):
    """mp4 writes frames with negative timestamps behind an edit list: players do not show them, and neither
    do we."""
    path = video.write(tmp_path / "early.mp4", [numbered(k) for k in range(8)],
                       [k / 10 - 0.3 for k in range(8)])
    got = list(video.frames(path))
    assert [number(f.image) for f in got] == [3, 4, 5, 6, 7] and got[0].time == got[0].pts == 0


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotation_is_applied_as_opencv_does(tmp_path, turn):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (4, 6, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    plain = video.write(tmp_path / "plain.mp4", [picture] * 3, [0, 0.1, 0.2])
    turned = rotate_metadata(plain, tmp_path / "turned.mp4", turn)
    ours = next(video.frames(turned)).image
    capture = cv2.VideoCapture(str(turned))
    theirs = capture.read()[1][..., ::-1]
    assert ours.shape == theirs.shape == ((64, 96, 3) if turn == 180 else (96, 64, 3))
    assert np.abs(ours.astype(int) - theirs).mean() < 3    # decoders may round colours differently
    assert np.abs(np.rot90(ours, 2).astype(int) - theirs).mean() > 20


def rotate_metadata(path, out, degrees):
    """Write the display matrix of an mp4's track header (tkhd), as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix starts 40 bytes after the name
    one = 1 << 16
    a, b, c, d = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    data[at:at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in matrix)
    out.write_bytes(bytes(data))
    return out


def test_pixels_that_are_not_square(tmp_path):
    """Stored at half its width, as some cameras do: given as a player shows it."""
    path = tmp_path / "squeezed.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        for k in range(3):
            frame = av.VideoFrame.from_ndarray(numbered(5 + k), format="rgb24")
            frame.pts = k
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    assert [(f.image.shape, number(f.image)) for f in video.frames(path)] == [((64, 192, 3), 5 + k)
                                                                              for k in range(3)]
    assert next(video.frames(path, max_side=48)).image.shape == (16, 48, 3)
    assert video.pixel_aspect(tmp_path / "nothing.mp4") == 1


def test_ten_bits(tmp_path):
    ramp = np.linspace(0, 255, 128).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    got = next(video.frames(video.write(tmp_path / "deep.mp4", [ramp] * 2, [0, 0.1], bit_depth=10)))
    assert got.image.dtype == np.uint8 and np.abs(got.image.astype(int) - ramp).mean() < 3


def test_a_cut_end_gives_what_comes_before_it(tmp_path, clip):
    times = [k / 10 for k in range(60)]
    whole = video.write(tmp_path / "whole.mkv", [numbered(k) for k in range(60)], times)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[:int(whole.stat().st_size * 0.6)])
    got = [number(f.image) for f in video.frames(cut)]
    assert 5 < len(got) < 60 and got[:-2] == list(range(len(got) - 2))   # the last ones may be concealed


@pytest.mark.parametrize("make, words", [
    (lambda p: p.write_bytes(b""), "cannot be opened"),
    (lambda p: p.write_bytes(b"no video at all" * 50), "cannot be opened"),
    (lambda p: p.mkdir(), "no video file"),
    (lambda p: None, "no video file"),
])
def test_what_is_no_video_is_said(tmp_path, make, words):
    path = tmp_path / "x.mp4"
    make(path)
    with pytest.raises(ValueError, match=words):
        list(video.frames(path))


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 8000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(ValueError, match="no picture track"):
        list(video.frames(path))


def test_step_must_be_positive(clip):
    with pytest.raises(ValueError, match="more than 0"):
        list(video.frames(clip[0], 0))


def test_smaller_frames(clip):
    assert next(video.frames(clip[0], max_side=48)).image.shape == (32, 48, 3)


def test_extract_writes_each_source_frame_once_and_goes_on(tmp_path, clip):
    from PIL import Image
    folder = video.extract(clip[0], tmp_path / "frames")
    rows, files = video.read_frames(folder), sorted(folder.glob("*.png"))
    assert [r["index"] for r in rows] == list(range(len(rows)))
    assert {r["file"] for r in rows} == {p.name for p in files} and len(files) < len(rows)
    for row in rows[::7]:
        shown = list(video.frames(clip[0]))[row["index"]].image
        assert number(np.asarray(Image.open(folder / row["file"]))) == number(shown)
    before = {p.name: p.stat().st_mtime_ns for p in files}
    (folder / "frames.jsonl").rename(folder / "frames.part.jsonl")
    files[3].unlink()
    video.extract(clip[0], folder)
    after = {p.name: p.stat().st_mtime_ns for p in sorted(folder.glob("*.png"))}
    assert after.keys() == before.keys() and sum(after[n] != before[n] for n in after) == 1
    with pytest.raises(jobs.Refused, match="another video, step or size"):
        video.extract(clip[0], folder, step=0.2)


def test_half_of_the_frames_of_another_step_are_not_taken_for_this_one_s(tmp_path, clip, monkeypatch):
    """Killed at step 0.1 and begun again at 0.5: frame000001.png would be the wrong one."""
    real, calls = video.write_atomic, []

    def killed(path, data):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        real(path, data)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(video, "write_atomic", killed)
        video.extract(clip[0], tmp_path / "f")
    with pytest.raises(jobs.Refused, match="another video, step or size"):
        video.extract(clip[0], tmp_path / "f", step=0.5)
    (tmp_path / "f" / "frame000001.png").write_bytes(b"kept")       # the same step goes on where it was
    video.extract(clip[0], tmp_path / "f")
    assert (tmp_path / "f" / "frame000001.png").read_bytes() == b"kept"
    assert not (tmp_path / "f" / "frames.part.jsonl").exists() and video.read_frames(tmp_path / "f")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "frame000001.png").write_bytes(b"whose?")     # nobody says of what video it is
    video.extract(clip[0], tmp_path / "g", step=0.5)
    assert (tmp_path / "g" / "frame000001.png").read_bytes() != b"whose?"


def test_memory_does_not_grow_with_the_length(tmp_path):
    """600 frames of 640 x 480 would be 0.55 GB in memory. (ru_maxrss would be this process's own: a child
    inherits it.)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak memory from /proc (Linux)")
    code = ("import re\nfrom lib import video\n"
            f"n = sum(1 for _ in video.frames(r'{tmp_path / 'long.mp4'}', 0.1))\n"
            "print(n, int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3)")
    image = np.zeros((480, 640, 3), np.uint8)
    video.write(tmp_path / "long.mp4", [image] * 600, [k / 10 for k in range(600)],
                options={"preset": "ultrafast"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=setup.root(),
                          check=True)
    count, megabytes = map(float, done.stdout.split())
    assert count == 600 and megabytes < 350


def test_the_sample(tmp_path):
    path = setup.data_dir() / "scenes" / "walk.mp4"
    assert path.stat().st_size <= 400_000
    got = list(video.frames(path))
    assert len(got) >= 35 and all(f.image.shape == got[0].image.shape for f in got)
    assert np.abs(got[0].image.astype(int) - got[-1].image).mean() > 10          # the camera does move
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def test_the_sample_s_exact_depth(tmp_path):
    """Metres beside each frame, of the very camera that drew it: the table is where the picture has it."""
    from lib import scenes
    folder = video.walk_depth(video.extract(setup.data_dir() / "scenes" / "walk.mp4", tmp_path / "f", 2.5))
    frames = sorted(folder.glob("*.png"))
    depths = [np.load(path.with_suffix(".npy")) for path in frames]
    assert len(depths) == 2 and all(scenes.NEAR / 2 < z.min() < z.max() < 2 * scenes.FAR for z in depths)
    from dataclasses import replace

    from PIL import Image
    scene = scenes.sample(scenes.EXAMPLE)
    for path, z, share in zip(frames, depths, (0, 30 / 59)):
        camera = replace(scene.camera, **video._path(scene.camera, share))  # of `walk`, which drew the film
        drawn = 255 * scenes.render(replace(scene, camera=camera), z.shape,
                                    samples=1).rgb[0].permute(1, 2, 0).numpy()
        # H.264 and fewer samples, nothing else
        assert np.abs(np.asarray(Image.open(path)) - drawn).mean() < 6
    items, others = jobs.list_inputs(folder, folder)
    assert others == 0 and all(Path(item["depth"]).suffix == ".npy" for item in items)
    assert jobs.list_inputs(folder)[1] == 2                       # without --depth they are named as left out
