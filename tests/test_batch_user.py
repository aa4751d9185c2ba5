"""lib.batch in the hands of a user: slips on the command line, things that move or go, a processor of one's own."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import batch, engines, jobs, report
from lib.jobs import Claim, OutputError, Refused
from lib.processors import Output, Tint
from test_batch import ENV, ROOT, begin, check_whole, cli, new, pictures, slow_job, wait_for


@pytest.fixture
def source(tmp_path):
    return pictures(tmp_path / "in", 6)


# ---------------------------------------------------------------- the list

def test_one_file_under_many_names_is_one_input(tmp_path, source):
    (source / "list.txt").write_text(f"im001.png\n./im001.png\n../in/im001.png\n{source}/im001.png\nim000.png\n")
    job = new(tmp_path, source / "list.txt", shard_size=1)
    assert [item["id"] for item in job.items] == ["im000.png", "im001.png"]
    assert batch.work(job) == batch.DONE
    check_whole(job)


def test_a_list_as_windows_writes_it(tmp_path, source):
    (source / "list.txt").write_text("im004.png\r\nim002.png\r\n", encoding="utf-16", newline="")
    assert [item["id"] for item in new(tmp_path, source / "list.txt").items] == ["im002.png", "im004.png"]


@pytest.mark.parametrize("name", ["im001.png", "pack.zip"])
def test_a_file_that_is_no_list(tmp_path, source, name):
    (source / "pack.zip").write_bytes(b"PK\0\0\n")
    with pytest.raises(Refused, match="is no list of paths: give a folder of pictures"):
        new(tmp_path, source / name)
    assert not (tmp_path / "job").exists()


def test_a_job_among_its_inputs_is_no_input(tmp_path, source):
    job = new(tmp_path, source, "in/job")
    assert batch.work(job) == batch.DONE
    assert [item["id"] for item in new(tmp_path, source, "in/again").items] == [f"im{n:03d}.png" for n in range(6)]
    moved = shutil.move(source, tmp_path / "moved")
    assert new(tmp_path, moved, "moved/job").pending() == []


def test_a_folder_that_cannot_be_read_is_named(tmp_path, source, monkeypatch, capsys):
    (source / "locked").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    new(tmp_path, source)
    assert f"Left out: the folder {source / 'locked'} cannot be read" in capsys.readouterr().out


# ---------------------------------------------------------------- what moves, what goes

def test_a_film_s_job_may_move(tmp_path):
    pytest.importorskip("av")
    new(tmp_path, ROOT / "data" / "scenes" / "walk.mp4", step=1.0)
    (tmp_path / "job").rename(tmp_path / "elsewhere")
    job = jobs.open_or_create(tmp_path / "elsewhere")
    assert batch.work(job) == batch.DONE and {row["status"] for row in job.rows()} == {"ok"}


def test_inputs_that_are_not_here_are_not_blamed(tmp_path, source):
    job = new(tmp_path, source)
    moved = source.rename(tmp_path / "moved")
    for words in (["run", job.folder], ["worker", job.folder]):
        done = cli(*words)
        assert done.returncode in (batch.USAGE, batch.NO_START)
        assert "say where it is with --input" in done.stdout + done.stderr and job.rows() == []
    with pytest.raises(Refused, match="say where it is with --input"):
        engines.ray_shard(str(job.folder), engines.places_of(job), 0, {}, "cpu", False)
    assert cli("run", job.folder, "--input", moved).returncode == batch.DONE
    assert {row["status"] for row in check_whole(job)} == {"ok"}


def test_a_drive_that_goes_in_the_middle_stops_the_job(tmp_path, source):
    job = new(tmp_path, source, shard_size=2)

    class Unplugged(Tint):
        def decode(self, item):
            if item["id"] == "im003.png":
                source.rename(tmp_path / "away")
            return super().decode(item)
    with pytest.raises(OutputError, match="not mounted"):
        batch.work(job, batch.Options(loaders=1), processor=Unplugged({}))
    assert {row["status"] for row in job.rows()} == {"ok"} and len(job.rows()) < 6
    (tmp_path / "away").rename(source)
    assert batch.work(job) == batch.DONE
    assert {row["status"] for row in check_whole(job)} == {"ok"}


def test_a_limit_and_a_depth_folder_are_kept_when_inputs_move(tmp_path, source):
    depth = shutil.copytree(source, tmp_path / "depth")
    new(tmp_path, source, limit=4, depth=depth)
    moved = source.rename(tmp_path / "moved")
    assert len(new(tmp_path, moved).items) == 4
    with pytest.raises(Refused, match="limit: the job has 4, now it would be 5"):
        new(tmp_path, moved, limit=5)
    assert len(new(tmp_path, moved, limit=4).items) == 4


def test_depth_files_that_are_not_there_are_said_at_once(tmp_path, source, capsys):
    with pytest.raises(Refused, match="no folder of depth files at"):
        new(tmp_path, source, depth=tmp_path / "typo")
    (tmp_path / "depth").mkdir()
    with pytest.raises(Refused, match="No picture has a depth file in"):
        new(tmp_path, source, depth=tmp_path / "depth")
    shutil.copy(source / "im000.png", tmp_path / "depth")
    new(tmp_path, source, depth=tmp_path / "depth")
    assert "5 of 6 pictures" in capsys.readouterr().out


# ---------------------------------------------------------------- a processor of one's own

def own(tmp_path, body, name="own.py"):
    (tmp_path / name).write_text("import json, numpy as np\nfrom lib.processors import Output, Processor, Tint\n" + body)
    return f"{tmp_path / name}:Own"


@pytest.mark.parametrize("body, words", [
    ("class Own(:", "SyntaxError"), ("1/0", "ZeroDivisionError: division by zero, line 3"),
    ("Own = json.dumps", "must be a subclass of lib.processors.Processor"),
    ("class Own: pass", "must be a subclass of lib.processors.Processor"),
    ("class Own(Processor): pass", "it lacks decode, infer"), ("class Other(Tint): pass", "has no attribute 'Own'"),
])
def test_a_processor_that_is_none(tmp_path, source, body, words):
    with pytest.raises(Refused, match=words):
        new(tmp_path, source, process=own(tmp_path, body))
    assert not (tmp_path / "job").exists()


def test_a_processor_s_file_may_be_called_anything(tmp_path, source):
    new(tmp_path, source, process=own(tmp_path, "dumps = None\nclass Own(Tint): pass\n", "json.py"))
    assert json.dumps(1) == "1"


def test_a_processor_s_file_is_found_from_everywhere(tmp_path, source):
    own(tmp_path, "class Own(Tint): pass\n")
    (tmp_path / "there").mkdir()
    assert cli("run", "there/-job", "--input", "in", "--process", "own.py:Own", "--max-seconds", "0.01",
               cwd=tmp_path).returncode == batch.STOPPED
    done = cli("run", "./-job", cwd=tmp_path / "there")
    assert done.returncode == batch.DONE, done.stderr
    check_whole(jobs.open_job(tmp_path / "there" / "-job"))


def test_a_processor_s_file_may_move(tmp_path, source):
    job = new(tmp_path, source, process=own(tmp_path, "class Own(Tint): pass\n"))
    (tmp_path / "code").mkdir()
    (tmp_path / "own.py").rename(tmp_path / "code" / "own.py")
    done = cli("run", job.folder, "--process", tmp_path / "code" / "own.py:Own")
    assert done.returncode == batch.DONE, done.stderr


@pytest.mark.parametrize("method, words", [
    ("def infer(self, inputs, seeds, precise=False): return list(inputs)", "infer gave ndarray, not Output"),
    ("def infer(self, inputs, seeds, precise=False): return [Output(p, 0.5) for p in inputs]", "not a dict of numbers"),
    ("def infer(self, inputs, seeds, precise=False): return [Output('none', {}) for p in inputs]", "isfinite"),
    ("def infer(self, inputs, seeds, precise=False): return [Output(p, {'x': self}) for p in inputs]", "JSON"),
    ("def infer(self, inputs, seeds, precise=False): return [Output((p * 255).astype(np.uint8), {}) for p in inputs]",
     "the picture is uint8"),
    ("def infer(self, inputs, seeds, precise=False): return [Output(p * 255, {}) for p in inputs]",
     "floats in .0, 1. are wanted"),
    ("def check(self, output, decoded): raise KeyError('x')", "KeyError"),
    ("def encode(self, picture): return None", "encode gave NoneType, not bytes"),
    ("def encode(self, picture): return 'abc'", "encode gave str, not bytes"),
])
def test_what_a_processor_does_wrong_stands_in_the_rows(tmp_path, source, method, words):
    job = new(tmp_path, source, process=own(tmp_path, f"class Own(Tint):\n    {method}\n"))
    assert batch.work(job) == batch.DONE
    rows = check_whole(job)
    assert {row["status"] for row in rows} == {"error"}
    assert all(re.search(words, row["message"]) for row in rows), rows[0]["message"]
    report.make(job)


def test_numbers_of_numpy_and_numbers_that_are_none(tmp_path, source):
    job = new(tmp_path, source)

    class Measured(Tint):
        def infer(self, inputs, seeds, precise=False):
            scores = [np.float32("nan"), float("inf"), np.float32(0.5), np.float64(0.25), "low", 1]
            return [Output(p, {"rmse": s, "n": np.int64(3)}) for p, s in zip(inputs, scores)]
    assert batch.work(job, processor=Measured({})) == batch.DONE
    assert [row["metrics"]["rmse"] for row in check_whole(job)] == [None, None, 0.5, 0.25, "low", 1]
    assert {row["metrics"]["n"] for row in job.rows()} == {3}
    report.make(job)
    assert json.loads((job.folder / "report" / "summary.json").read_text())["pooled"]["images"] == 3


# ---------------------------------------------------------------- settings

@pytest.mark.parametrize("process, setting, words", [
    ("tint", "amount=nan", "Setting amount is of type float"), ("tint", "amount=inf", "Setting amount is of type float"),
    ("layers", "at=near", "is not a depth"), ("layers", "max_side=8", "MAX_SIDE is a whole number of 32 or more"),
    ("layers", "near_is=left", "DEPTH_NEAR is one of"), ("edit", "steps=0", "STEPS is a whole number of 1 or more"),
    ("edit", "mechanism=magic", "Unknown MECHANISM"), ("edit", "where=2", "is not a place"),
    ("edit", "insert=/nowhere/chair.png", "no cut-out file at"), ("edit", "model=sd16", "Unknown pipeline model"),
])
def test_a_setting_that_cannot_be_used_makes_no_job(tmp_path, source, process, setting, words):
    name, _, value = setting.partition("=")
    with pytest.raises(Refused, match=words):
        new(tmp_path, source, process=process, settings={name: value})
    assert not (tmp_path / "job").exists()


# ---------------------------------------------------------------- several at once

def test_retry_waits_until_nobody_works_on_it(tmp_path):
    job = slow_job(tmp_path, 30, 0.1)
    process = begin(job, "--batch", "1", workers=1)
    wait_for(lambda: len(job.rows()) > 2)
    done = cli("retry", job.folder, "--status", "ok")
    assert done.returncode == batch.USAGE and "being worked on" in done.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert "inputs get another attempt" in cli("retry", job.folder, "--status", "nan, ok").stdout
    assert not list((job.folder / "claims").iterdir())


def test_an_earlier_session_is_not_laid_over_work_in_progress(tmp_path, source):
    first, second = new(tmp_path, source, "first", shard_size=3), new(tmp_path, source, "second", shard_size=3)
    assert batch.work(first) == batch.DONE
    claim = Claim.take(second.folder / "claims" / "00000")
    assert jobs.adopt(second, [first.folder]) == 3 and second.pending() == [0]
    claim.release()
    assert jobs.adopt(second, [first.folder]) == 3 and not list((second.folder / "claims").iterdir())


def test_rows_are_there_while_a_shard_ends(tmp_path, source, monkeypatch):
    """A reader that finds no final manifest, and then no parts, because the shard was finished in between."""
    job = new(tmp_path, source, shard_size=6)
    shard, read = job.shard(0), jobs.read_rows

    def late(path):
        monkeypatch.setattr(jobs, "read_rows", read)
        found = read(path)
        assert batch.work(job) == batch.DONE
        return found
    monkeypatch.setattr(jobs, "read_rows", late)
    assert len(shard.final_rows()) == 6


def test_a_claim_whose_folder_goes_meanwhile_is_asked_for_again(tmp_path, monkeypatch):
    """Whoever is refused takes the folder of claims away when it is empty."""
    def gone(*_):
        raise FileNotFoundError(2, "No such file or directory")
    monkeypatch.setattr(os, "open", gone)
    assert Claim.take(tmp_path / "claims" / "00000") is None


def test_a_task_of_ray_knows_a_new_job_in_an_old_folder(tmp_path, source):
    """Its process keeps the model from task to task, but not that of other settings."""
    for amount in (0.25, 0.5):
        job = new(tmp_path, source, settings={"amount": amount})
        for number in job.shards:
            assert engines.ray_shard(str(job.folder), engines.places_of(job), number, {}, "cpu", False)
        made = {row["id"]: row["sha"] for row in job.rows()}
        shutil.rmtree(job.folder)
        plain = new(tmp_path, source, f"plain{amount}", settings={"amount": amount})
        batch.work(plain)
        assert made == {row["id"]: row["sha"] for row in plain.rows()}
    for runner in [engines._RUNNERS.pop(key) for key in list(engines._RUNNERS)]:
        runner.close()


@pytest.mark.parametrize("pack", ["files", "tar"])
def test_damaged_outputs_are_made_again(tmp_path, source, pack):
    job = new(tmp_path, source, pack=pack, shard_size=3)
    batch.work(job)
    before = {row["id"]: row["sha"] for row in job.rows()}
    if pack == "tar":
        data = bytearray(job.shard(0).tar.read_bytes())
        data[600:604] = b"oops"                                   # in the first of its pictures
        job.shard(0).tar.write_bytes(data)
    else:
        path = job.folder / "out" / "00000" / job.rows()[0]["output"]
        path.write_bytes(b"oops" + path.read_bytes()[4:])         # as long as it was
    said = cli("status", job.folder, "--verify")
    assert said.returncode == batch.BROKEN and "im000.png; `retry --status damaged`" in said.stdout
    assert batch.retry(job, ["damaged"]) == 1 and batch.work(job) == batch.DONE
    assert {row["id"]: row["sha"] for row in check_whole(job)} == before


# ---------------------------------------------------------------- words

def test_an_empty_folder_of_one_s_own_is_left(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "job").mkdir()
    with pytest.raises(Refused, match="No pictures"):
        new(tmp_path, tmp_path / "in")
    assert list((tmp_path / "job").iterdir()) == []


def test_a_run_json_of_something_else(tmp_path):
    for text in ('{"x": 1}', "[1]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(Refused, match="holds no job"):
            jobs.open_job(tmp_path)


def test_a_lease_that_no_batch_can_keep(tmp_path):
    done = cli("run", tmp_path / "job", "--lease", "0")
    assert done.returncode == batch.USAGE and "1 second is the least" in done.stderr


def test_ctrl_c_while_the_list_is_made(tmp_path, source, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(jobs, "list_inputs", interrupted)
    assert batch.main(["run", str(tmp_path / "job"), "--input", str(source), "--process", "tint"]) == batch.STOPPED
    assert "the same command continues" in capsys.readouterr().err and not (tmp_path / "job").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such names")
def test_a_name_that_is_no_text_can_be_said(tmp_path, source):
    os.rename(source / "im000.png", os.fsencode(source) + b"/caf\xe9.png")
    job = new(tmp_path, source)
    assert batch.work(job) == batch.DONE
    shutil.rmtree(job.folder / "out")
    done = subprocess.run([sys.executable, "-m", "lib.batch", "status", str(job.folder), "--verify"], capture_output=True,
                          text=True, env={**ENV, "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == batch.BROKEN and r"caf\udce9.png" in done.stdout, done.stderr


def test_a_folder_that_nothing_can_be_written_to(tmp_path, source, monkeypatch, capsys):
    job, real = new(tmp_path, source), Path.mkdir

    def mkdir(self, *a, **k):
        if self.name == "log":
            raise OSError(30, "Read-only file system", str(self))
        return real(self, *a, **k)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert batch.main(["run", str(job.folder), "--quiet"]) == batch.BROKEN
    assert "make the folder writable" in capsys.readouterr().err
