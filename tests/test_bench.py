"""lib.bench: memory from the manifests, counted operations against a real edit, a watched card, and all of it
in small."""
import os
import stat
import time
from datetime import datetime

import numpy as np
import pytest

from lib import bench, processors, show


def test_memory_of_each_worker_from_its_rows():
    rows = [{"worker": "a", "peak_mb": 50.0 + (n > 200)}
            for n in range(400)] + [{"worker": "b", "peak_mb": float(n)} for n in range(1, 10)]
    assert bench.memory(rows) == [[(100, 50.0), (400, 51.0)], [(3, 3.0), (9, 9.0)]]
    said = []
    bench.show_memory(rows[:400], said.append, "cheap")
    assert said == ["memory      cheap, one worker: 50.0 MB at image 100, 51.0 MB at image 400 (+2.0%)"]


def test_memory_is_flat_over_a_long_run_with_a_cheap_processor():
    """In small what `python -m lib.batch bench --memory 25000` does."""
    said = []
    bench.run(images=0, memory_images=1200, say=said.append)
    (line,) = [text for text in said if text.startswith("memory")]
    grown = float(line.rsplit("(", 1)[1].rstrip("%)"))
    assert "at image 100," in line and "at image 1,000," in line and "at image 1,200 (" in line and grown < 3


def test_operations_of_sd15():
    small, large = bench.operations("sd15", 256), bench.operations("sd15", 512)
    assert 0.7 < large.unet < 0.9 and large.decode > large.encode > 0.5 and 0.3 < large.depth < 0.8
    # attention grows faster than the picture
    assert large.unet > 4 * small.unet and 3.9 < large.decode / small.decode < 4.6
    assert large.image(10) == pytest.approx(10 * large.unet + 2 * large.encode + 3 * large.decode
                                            + 2 * large.depth)


def test_counted_operations_are_those_of_a_real_edit(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode
    editor = processors.Edit({"steps": 2, "insert": "red chair", "max_side": 128})
    picture = np.random.default_rng(0).random((12, 12, 3), np.float32).repeat(12, 0).repeat(12, 1)
    show.save_image(show.to_tensor(picture), tmp_path / "a.png")
    entry = editor.decode({"id": "a.png", "path": str(tmp_path / "a.png")})
    with FlopCounterMode(display=False) as counter:
        (output,) = editor.infer([entry], [1])
    formula = bench.operations("mini", 128).image(output.metrics["passes"])
    assert counter.get_total_flops() / 1e12 == pytest.approx(formula, rel=0.03)


def test_a_card_is_watched(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    lines = [f"2026/11/25 21:30:{at:06.3f}, {busy}, {used}" for at, busy, used in
             ((1.0, 0, 400), (2.0, 0, 400), (3.0, 90, 9000), (4.5, 80, 8000), (9.0, 10, 400))]
    tool.write_text("#!/bin/sh\n"
                    + "".join(f"echo '{line}'\n" for line in (*lines, "No devices were found", "x, [N/A], 1"))
                    + "exec sleep 30\n")
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with bench.Watch("0") as watch:
        time.sleep(1)
    assert watch.words() == "device busy 36 % of the time (nvidia-smi), at most 9,000 MB on it"
    begin = datetime(2026, 11, 25, 21, 30).timestamp()
    rows = [{"time": begin + 3.1, "seconds": {"infer": 0.3}}, {"time": begin + 5.0, "seconds": {}}]
    assert watch.words(rows).startswith("device busy 85 %")       # loading and the end do not count
    with bench.Watch(None) as watch:
        pass
    assert "not measured" in watch.words()


def test_only_one_card_is_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    with bench._only("4"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,4"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with bench._only("0"), bench._only(None):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


@pytest.mark.slow
def test_the_real_pipeline_with_random_weights(monkeypatch):
    """The command for a GPU, on the CPU with a tiny model."""
    said = []
    assert bench.run(images=0, edits=3, steps=2, device="cpu", model="random-tiny", say=said.append) == 0
    text = "\n".join(said)
    assert "128 x 128, 1 process on cpu" in text and "3 of 3 ok" in text and "TFLOP/s; in inference" in text
    assert "device busy: not measured" in text and "commits" in text and "memory      real pipeline" in text


def test_the_rate_of_one_batch_says_what_is_in_it(monkeypatch):
    """From its first commit to its last one batch takes no time, so its rate is 0: never printed as such."""
    row = {"time": 1.0, "worker": "a", "peak_mb": 9.0, "status": "ok", "metrics": {"passes": 4}}
    found = {"code": 0, "rate": 0.0, "parent": 0, "wall": 4.0, "rows": [row], "busy": 1, "commit": 0, "wait": 0}
    monkeypatch.setattr(bench, "timed_run", lambda *a, **k: found)
    monkeypatch.setattr(bench.batch, "status", lambda job: {"ok": 1})
    monkeypatch.setattr(bench.jobs, "open_or_create", lambda *a, **k: None)
    said = []
    bench._edits("", 1, 2, "cpu", "mini", "auto", said.append)
    assert "0.25 images/s (the start of the process included" in said[0]
