"""lib.report: made of any job at any moment, right in its numbers, and readable without a network."""
import csv
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import drill
from lib import batch, bench, jobs, report
from lib.processors import Tint


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A finished job with every status but "error"."""
    base = tmp_path_factory.mktemp("report")
    drill.make_inputs(base / "in", 120, 16)
    made = jobs.open_or_create(base / "job", base / "in", drill.SPEC, shard_size=32)
    assert batch.work(made, batch.Options(batch=8)) == batch.DONE
    return made


def test_the_files(job):
    page = report.make(job)
    names = {p.name for p in page.parent.iterdir()}
    assert names == {"report.html", "metrics.csv", "summary.json", "status.png", "over_time.png",
                     "histogram.png",
                     "ecdf.png", "throughput.png", "worst.png", "best.png", "random.png"}
    for name in names:
        if name.endswith(".png"):
            picture = Image.open(page.parent / name)
            assert np.asarray(picture.convert("L")).std() > 5 and picture.width > 300
    report.make(job)                                       # again, over the old one


def test_it_reads_without_a_network(job):
    text = report.make(job).read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)",
                          text) and "<script" not in text and "http" not in text
    assert text.count("data:image/png;base64,") == 8


def test_the_numbers(job):
    lines = report.table(job)
    facts = report.summary(job, lines)
    rows = job.rows()
    values = np.array([row["metrics"]["rmse"] for row in rows if row["status"] == "ok"])
    assert facts["counts"] == {"ok": 117, "bad_input": 1, "nan": 1, "oom": 1, "error": 0, "left": 0}
    assert facts["pooled"]["mean of the images' RMSE"] == pytest.approx(values.mean(), abs=1e-5)
    assert facts["pooled"]["root of the mean square"] == pytest.approx(np.sqrt((values ** 2).mean()),
                                                                       abs=1e-5)
    assert facts["pooled"]["root of the mean square"] >= facts["pooled"]["mean of the images' RMSE"]
    assert facts["oom_events"] == sum(row["oom"] for row in rows) > 0
    assert facts["in_full_precision"] == sum(row["precise"] for row in rows) == 2
    assert json.loads((job.folder / "report" / "summary.json").read_text())["counts"] == facts["counts"]


def test_the_csv_has_a_line_for_each_input(job):
    table = list(csv.DictReader(io.StringIO(report.as_csv(report.table(job)).decode())))
    assert [row["id"] for row in table] == [item["id"] for item in job.items]
    assert {"status", "message", "metric_rmse", "seconds_infer", "peak_mb", "sha"} <= set(table[0])


def test_worst_best_random(job):
    lines = report.table(job)
    chosen = report.choose(lines, "rmse")
    values = sorted(line["metric_rmse"] for line in lines if line["status"] == "ok")
    assert [line["metric_rmse"] for line in chosen["worst"]] == values[::-1][:12]
    assert [line["metric_rmse"] for line in chosen["best"]] == values[:12]
    assert chosen["random"] == report.choose(lines, "rmse")["random"] != report.choose(lines, "rmse",
                                                                                       seed=1)["random"]


@pytest.mark.parametrize("state", ["untouched", "one row", "half", "pictures gone", "inputs gone", "all bad"])
def test_any_moment(tmp_path, state):
    drill.make_inputs(tmp_path / "in", 40, 16)
    if state == "all bad":
        for path in (tmp_path / "in").iterdir():
            path.write_bytes(b"x")
    made = jobs.open_or_create(tmp_path / "job", tmp_path / "in", "tint", shard_size=16)
    if state != "untouched":
        stop = {"one row": 1, "half": 21}.get(state, 99)
        options, seen = batch.Options(batch=1), []

        class Counting(Tint):
            def infer(self, *a):
                seen.append(1)
                options.deadline = 1.0 if len(seen) >= stop else 0.0
                return super().infer(*a)
        batch.work(made, options, processor=Counting(made.facts["settings"]))
    if state == "pictures gone":
        shutil.rmtree(tmp_path / "job" / "out")
    if state == "inputs gone":
        shutil.rmtree(tmp_path / "in")
    page = report.make(made, tmp_path / "elsewhere")
    text = page.read_text()
    done = len(made.rows())
    assert f"{done} of 40 inputs" in text
    assert ("left when this report was made" in text) == (done < 40)
    assert not (tmp_path / "job" / "report").exists()


def test_names_are_escaped(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "<script>alert(1)<!-- .png").write_bytes(b"no picture")
    made = jobs.open_or_create(tmp_path / "job", tmp_path / "in", "tint")
    batch.work(made)
    assert "<script" not in report.make(made).read_text()


def test_pauses_between_sessions_are_no_work():
    lines = [{"time": t, "batch": 4, "worker": "a", "oom": 0}
             for t in (*range(100, 200), *range(90_000, 90_100))]
    flow = report.throughput(lines)
    assert flow["seconds"] == pytest.approx(198 + report.GAP)
    assert sum(flow["rates"]) * (flow["times"][1] - flow["times"][0]) == pytest.approx(200)


def test_the_command(job, tmp_path):
    done = subprocess.run([sys.executable, "-m", "lib.batch", "report", str(job.folder), "--to",
                           str(tmp_path / "r")],
                          capture_output=True, text=True, cwd=drill.ROOT)
    assert done.returncode == 0 and (tmp_path / "r" / "report.html").is_file()
    assert str(tmp_path / "r" / "report.html") in done.stdout


def test_the_bench_in_small():
    said = []
    assert bench.run(images=24, say=said.append) == 0
    text = "\n".join(said)
    assert re.search(r"two workers +\d+\.\d images/s: +\d+\.\d\d x", text)
    assert "of a core while two workers run" in text and "one worker: " in text and "commits" in text


def test_one_batch_has_no_speed(tmp_path):
    drill.make_inputs(tmp_path / "in", 4, 16)
    made = jobs.open_or_create(tmp_path / "job", tmp_path / "in", "tint")
    assert batch.work(made, batch.Options(batch=8)) == batch.DONE
    page = report.make(made)
    assert "Too few batches to tell a speed, 1 worker" in page.read_text()
    assert not (page.parent / "throughput.png").exists() and (page.parent / "ecdf.png").exists()
