"""lib.batch and lib.jobs: nothing lost, nothing twice, whatever happens in between. (tests/drill.py does it
at length.)"""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bad_inputs
import drill
from lib import batch, engines, jobs, processors
from lib.jobs import BadInput, Claim, OutputError, Refused
from lib.processors import Output, Tint

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def pictures(folder, count, size=12):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"im{n:03d}.png")
    return folder


@pytest.fixture
def source(tmp_path):
    return pictures(tmp_path / "in", 20)


def new(tmp_path, source, name="job", process="tint", **options):
    return jobs.open_or_create(tmp_path / name, source, process, shard_size=options.pop("shard_size", 8),
                               **options)


def cli(*words, **options):
    return subprocess.run([sys.executable, "-m", "lib.batch", *map(str, words)], env=ENV, capture_output=True,
                          text=True,
                          timeout=120, **options)


def hashes(job):
    return {row["id"]: (row["status"], row.get("sha")) for row in job.rows()}


def check_whole(job):
    """Exactly one final row for each input, outputs that match their hashes, and no other file."""
    rows = [row for n in job.shards for row in jobs.read_rows(job.shard(n).final)]
    assert [row["id"] for row in rows] == [item["id"] for item in job.items]
    assert batch.status(job, verify=True)["damaged"] == []
    jobs.sweep(job)
    assert drill.strays(job, rows) == []
    return rows


# ---------------------------------------------------------------- the ordinary way

def test_a_run_and_a_run_with_nothing_to_do(tmp_path, source):
    words = ("run", tmp_path / "job", "--input", source, "--process", "tint", "--workers", "2",
             "--shard-size", "4")
    first = cli(*words)
    assert first.returncode == 0, first.stderr
    assert "20 of 20 inputs have a final row" in first.stdout
    check_whole(jobs.open_job(tmp_path / "job"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "job").rglob("*")}
    begin = time.time()
    assert cli(*words).returncode == 0
    assert time.time() - begin < 5                         # a second on an idle machine
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "job").rglob("*")}


def test_no_torch_for_a_cheap_processor():
    code = "import sys, lib.batch, lib.engines; from lib import jobs; jobs.load_processor('tint');" \
           "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENV).returncode == 0


def test_the_order_of_work_changes_nothing(tmp_path, source):
    jobs_made = [new(tmp_path, source, "a"), new(tmp_path, source, "b"),
                 new(tmp_path, source, "c", shard_size=3)]
    options = [batch.Options(batch=1, loaders=1), batch.Options(batch=7, loaders=4), batch.Options(batch=32)]
    for job, option in zip(jobs_made, options):
        assert batch.work(job, option) == batch.DONE
    assert hashes(jobs_made[0]) == hashes(jobs_made[1]) == hashes(jobs_made[2])
    for job in jobs_made:
        check_whole(job)


def test_seeds_come_from_the_id():
    assert jobs.seed_of("a/b.png") == 729880306520526963
    many = {jobs.seed_of(f"im{n}.png", base) for n in range(500) for base in (0, 1)}
    assert len(many) == 1000 and all(0 <= s < 2 ** 63 for s in many)


def test_a_row_says_what_happened(tmp_path, source):
    job = new(tmp_path, source)
    batch.work(job)
    row = job.rows()[3]
    assert row["id"] == "im003.png" and row["status"] == "ok" and row["attempt"] == 1
    assert set(row["seconds"]) == {"load", "infer",
                                   "encode"} and row["peak_mb"] > 10 and row["metrics"]["rmse"] > 0
    timing = json.loads(job.shard(0).done.read_bytes())["timing"]
    assert timing["images"] == 8 and 0 < timing["commit"] < timing["wall"] * 2


# ---------------------------------------------------------------- what must not change

@pytest.mark.parametrize("change, words", [
    ({"settings": {"amount": 0.5}}, r"settings.amount: the job has 0.25, now it would be 0.5"),
    ({"settings": {"nonsense": 1}}, "No setting 'nonsense'; known: seed, size, amount"),
    ({"settings": {"amount": "much"}}, "Setting amount is of type float"),
    ({"shard_size": 4}, "shard_size: the job has 8, now it would be 4"),
    ({"pack": "tar"}, "pack: the job has 'files', now it would be 'tar'"),
    ({"process": "no:thing"}, "No processor 'no:thing'"),
])
def test_other_settings_are_refused(tmp_path, source, change, words):
    new(tmp_path, source)
    with pytest.raises(Refused, match=words):
        jobs.open_or_create(tmp_path / "job", source, **{"process": "tint", **change})


def test_what_is_not_said_is_kept(tmp_path, source):
    new(tmp_path, source, settings={"amount": "0.5"})
    assert jobs.open_or_create(tmp_path / "job").facts["settings"]["amount"] == 0.5
    assert cli("run", tmp_path / "job", "--set", "amount=0.5").returncode == 0


def test_the_list_is_frozen_and_may_move(tmp_path, source):
    job = new(tmp_path, source)
    (source / "zz.png").write_bytes((source / "im000.png").read_bytes())
    assert len(jobs.open_or_create(tmp_path / "job", source).items) == 20
    moved = shutil.copytree(source, tmp_path / "moved")
    with pytest.raises(Refused, match="inputs: the job has"):
        jobs.open_or_create(tmp_path / "job", moved)
    (moved / "zz.png").unlink()
    shutil.rmtree(source)
    assert batch.work(jobs.open_or_create(tmp_path / "job", moved)) == batch.DONE
    assert {row["status"] for row in job.rows()} == {"ok"}


def test_a_file_that_changed_is_named(tmp_path, source):
    job = new(tmp_path, source)
    with open(source / "im004.png", "ab") as file:
        file.write(b"x")
    (source / "im005.png").unlink()
    batch.work(job)
    rows = {row["id"]: row for row in job.rows()}
    assert "changed since the list was frozen" in rows["im004.png"]["message"]
    assert "the file is gone" in rows["im005.png"]["message"]


@pytest.mark.parametrize("make, words", [
    (lambda p: p.mkdir(), "No pictures"), (lambda p: None, "There is no input"),
    (lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")), "No pictures"),
])
def test_no_input_is_said(tmp_path, make, words):
    make(tmp_path / "in")
    with pytest.raises(Refused, match=words):
        new(tmp_path, tmp_path / "in")


def test_a_folder_of_something_else_is_not_touched(tmp_path, source):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "thesis.tex").write_text("x")
    with pytest.raises(Refused, match="holds no job"):
        new(tmp_path, source)
    assert [p.name for p in (tmp_path / "job").iterdir()] == ["thesis.tex"]


def test_a_list_of_paths(tmp_path, source):
    (source / "list.txt").write_text("im004.png\nim002.png\n\nim004.png\n")
    job = new(tmp_path, source / "list.txt")
    assert [item["id"] for item in job.items] == ["im002.png", "im004.png"]
    assert batch.work(job) == batch.DONE and hashes(job)["im002.png"][0] == "ok"


def test_frames_of_a_video(tmp_path):
    pytest.importorskip("av")
    job = new(tmp_path, ROOT / "data" / "scenes" / "walk.mp4", step=1.0)
    assert batch.work(job) == batch.DONE
    assert [item["id"] for item in job.items][:2] == ["frame000000.png", "frame000001.png"]
    assert all(row["status"] == "ok" for row in job.rows())


def test_another_list_limit_or_step_is_refused(tmp_path, source):
    (source / "some.txt").write_text("im001.png\nim002.png\n")
    (source / "others.txt").write_text("im001.png\nim003.png\n")
    new(tmp_path, source / "some.txt", "listed")
    assert len(new(tmp_path, source / "some.txt", "listed").items) == 2
    with pytest.raises(Refused, match="inputs: the job has"):
        new(tmp_path, source / "others.txt", "listed")
    new(tmp_path, source)
    with pytest.raises(Refused, match="limit: the job has 20, now it would be 5"):
        new(tmp_path, source, limit=5)
    pytest.importorskip("av")
    walk = ROOT / "data" / "scenes" / "walk.mp4"
    new(tmp_path, walk, "film", step=2.5)
    assert new(tmp_path, walk, "film").items == new(tmp_path, walk, "film", step=2.5).items
    with pytest.raises(Refused, match="frames.step: the job has 2.5, now it would be 1"):
        new(tmp_path, walk, "film", step=1.0)
    other = tmp_path / "run.mp4"
    other.write_bytes(walk.read_bytes() + b"x")
    with pytest.raises(Refused, match="frames.video: the job has 'walk.mp4', now it would be 'run.mp4'"):
        new(tmp_path, other, "film")


def test_a_film_s_frames_are_no_larger_than_they_are_worked_on(tmp_path):
    pytest.importorskip("av")
    walk = ROOT / "data" / "scenes" / "walk.mp4"
    small = new(tmp_path, walk, "small", "layers", step=2.5, settings={"max_side": 64})
    with Image.open(Path(small.facts["root"]) / small.items[0]["id"]) as frame:
        assert max(frame.size) == 64
    with Image.open(Path(new(tmp_path, walk, "plain", step=2.5).facts["root"]) / small.items[0]["id"]) as frame:
        assert max(frame.size) > 64


def test_a_list_from_windows(tmp_path, source):
    (source / "list.txt").write_bytes("\ufeffim004.png\r\nim002.png\r\n\r\n".encode("utf8"))
    assert [item["id"] for item in new(tmp_path, source / "list.txt").items] == ["im002.png", "im004.png"]


def test_a_damaged_list_is_refused(tmp_path, source):
    listed = new(tmp_path, source).folder / "inputs.jsonl"
    whole = listed.read_bytes()
    for damaged in (whole[:400], whole.replace(b"im004", b"im044"), b"5\n{}\n" + whole, b""):
        listed.write_bytes(damaged)
        with pytest.raises(Refused, match="no more the list of 20 inputs"):
            jobs.open_job(tmp_path / "job")
    listed.write_bytes(whole)
    assert batch.work(jobs.open_job(tmp_path / "job")) == batch.DONE


def test_no_video_leaves_nothing_behind(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "x.mp4").write_bytes(b"no film")
    done = cli("run", tmp_path / "job", "--input", tmp_path / "x.mp4", "--process", "tint")
    assert done.returncode == batch.USAGE and "cannot be opened as a video" in done.stderr
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize("amounts", [(0.25, 0.25), (0.25, 0.5)])
def test_two_that_start_at_once(tmp_path, source, amounts):
    """One makes the job; the other goes on with it, or is refused: never half of each."""
    words = [sys.executable, "-m", "lib.batch", "run", str(tmp_path / "job"), "--input", str(source),
             "--process", "tint",
             "--shard-size", "4", "--quiet"]
    pair = [subprocess.Popen([*words, "--set", f"amount={a}"], env=ENV, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
            for a in amounts]
    for process in pair:
        process.communicate(timeout=120)
    same = len(set(amounts)) == 1
    assert sorted(p.returncode for p in pair) == [batch.DONE, batch.DONE if same else batch.USAGE]
    job = jobs.open_job(tmp_path / "job")
    check_whole(job)
    assert hashes(job) == hashes_of(tmp_path, source, job.facts["settings"]["amount"])


def hashes_of(tmp_path, source, amount):
    job = new(tmp_path, source, "undisturbed", settings={"amount": amount})
    batch.work(job)
    return hashes(job)


def claim_and_die(path):
    code = f"from lib.jobs import Claim; from pathlib import Path; Claim.take(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", code], env=ENV, check=True)


def test_a_job_whose_maker_was_killed(tmp_path, source):
    """Its claim lies there, and no run.json: the next one takes over."""
    (tmp_path / "job").mkdir()
    claim_and_die(tmp_path / "job" / "claims" / "00000")
    (tmp_path / "job" / "inputs.jsonl").write_bytes(b"half")
    job = new(tmp_path, source)
    assert batch.work(job) == batch.DONE
    check_whole(job)


# ---------------------------------------------------------------- claims

def test_one_of_many_gets_a_claim(tmp_path):
    path, got = tmp_path / "00001", []
    threads = [threading.Thread(target=lambda: got.append(Claim.take(path))) for _ in range(16)]
    [t.start() for t in threads], [t.join() for t in threads]
    (winner,) = [c for c in got if c]
    assert winner.mine() and Claim.take(path) is None
    winner.release()
    assert not path.exists() and Claim.take(path)


def test_a_dead_worker_s_claim_is_taken_at_once(tmp_path):
    claim_and_die(tmp_path / "00001")
    assert (tmp_path / "00001").exists() and Claim.take(tmp_path / "00001")


def test_another_machine_s_claim_is_taken_after_its_lease(tmp_path):
    path = tmp_path / "00001"
    path.write_text("elsewhere 1 2 3")
    assert Claim.take(path, lease=60) is None
    os.utime(path, (time.time() - 61,) * 2)
    assert Claim.take(path, lease=60)


def test_a_claim_that_was_never_written_is_not_for_ever(tmp_path):
    path = tmp_path / "00001"
    path.touch()
    assert Claim.take(path) is None
    os.utime(path, (time.time() - 6,) * 2)
    assert Claim.take(path)


def test_who_lost_the_claim_commits_nothing_more(tmp_path, source):
    job = new(tmp_path, source)

    class Slow(Tint):
        def infer(self, *a):
            if claim.mine():
                Claim.take(job.folder / "claims" / "00000", steal=True)
            return super().infer(*a)
    (job.folder / "claims").mkdir()
    claim = Claim.take(job.folder / "claims" / "00000")
    runner = batch.Runner(Slow(job.facts["settings"]), batch.Options(batch=4))
    with pytest.raises(jobs.Lost):
        runner.shard(job.shard(0), claim)
    runner.close()
    assert job.shard(0).final_rows() == [] and not job.shard(0).done.exists()


# ---------------------------------------------------------------- interrupted

class Crash(BaseException):
    """Like a kill: no `except Exception` sees it."""


def crash_at(monkeypatch, target, name, call, before=True):
    """Raise Crash at the so-manieth call of a function, before or after it has done its work."""
    real, seen = getattr(target, name), []

    def wrapped(*a, **k):
        seen.append(1)
        if before and len(seen) == call:
            raise Crash
        result = real(*a, **k)
        if len(seen) == call:
            raise Crash
        return result
    monkeypatch.setattr(target, name, wrapped)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("target, name", [
    (jobs.os, "replace"), (jobs.os, "fsync"), (jobs.Part, "append"), (jobs, "write_atomic"),
    (batch, "write_atomic"),
    (jobs.Shard, "finish"), (jobs.Shard, "clear"), (jobs.Claim, "beat"), (jobs.Claim, "release"),
    (jobs.Shard, "_pack"),
])
@pytest.mark.parametrize("pack", ["files", "tar"])
def test_a_crash_at_any_step_changes_nothing(tmp_path, source, monkeypatch, target, name, before, pack):
    clean = new(tmp_path, source, "clean", pack=pack)
    batch.work(clean)
    job = new(tmp_path, source, pack=pack)
    for call in (1, 2, 3, 5, 9, 14):
        with monkeypatch.context() as patch:
            crash_at(patch, target, name, call, before)
            try:
                batch.work(job, batch.Options(batch=3))
            except Crash:
                pass
        for claim in (job.folder / "claims").glob("*"):  # this process lives, so nobody would take its claims
            claim.unlink()
    assert batch.work(job) == batch.DONE
    assert hashes(job) == hashes(clean)
    check_whole(job)
    if pack == "tar":
        assert [job.shard(n).tar.read_bytes() for n in job.shards] == [clean.shard(n).tar.read_bytes()
                                                                       for n in job.shards]


def test_a_torn_last_line_is_dropped(tmp_path, source):
    job = new(tmp_path, source)
    batch.work(job)
    shard = job.shard(0)
    lines = shard.final.read_bytes().splitlines(keepends=True)
    shard.done.unlink(), shard.final.unlink()
    (shard.manifest / "00000.x.part.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert len(shard.final_rows()) == 3
    assert batch.work(job) == batch.DONE
    check_whole(job)


def test_damaged_lines_in_a_manifest_are_passed_over(tmp_path, source):
    job = new(tmp_path, source)
    batch.work(job)
    shard = job.shard(0)
    shard.done.unlink()
    (shard.manifest / "00000.x.part.jsonl").write_bytes(b"\0\0\0\n[]\n5\n{}\n" + b'{"id": "im001.png"}\n')
    assert len(job.rows()) == 20 and engines.Progress(job, quiet=True).rows() == 20
    assert batch.work(job) == batch.DONE
    check_whole(job)


def test_temp_files_of_the_dead_are_swept_and_of_another_machine_when_old(tmp_path, source):
    job = new(tmp_path, source)
    batch.work(job)
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True,
                          text=True)
    mine, dead = (jobs.temp_name("a.png"),
                  jobs.temp_name("b.png").replace(str(os.getpid()), gone.stdout.strip()))
    old, young = ".c.png.elsewhere.1.tmp", f".d.png.elsewhere.{gone.stdout.strip()}.tmp"
    for name in (mine, dead, old, young):
        (job.folder / "manifest" / name).touch()
    os.utime(job.folder / "manifest" / old, (time.time() - jobs.LEASE - 5,) * 2)
    jobs.sweep(job)
    assert {p.name for p in (job.folder / "manifest").glob(".*")} == {mine, young}


def test_a_missing_picture_is_made_again(tmp_path, source):
    job = new(tmp_path, source)
    batch.work(job)
    shard, row = job.shard(1), job.rows()[9]
    (shard.out / row["output"]).unlink()
    assert batch.status(job, verify=True)["damaged"] == [row["id"]]
    shard.done.unlink()
    batch.work(job)
    check_whole(job)


def test_stop_in_good_order_and_go_on(tmp_path, source):
    job, runs = new(tmp_path, source), []
    options = batch.Options(batch=2, deadline=time.time() - 1)
    assert batch.work(job, options) == batch.STOPPED and not job.rows()

    class Counting(Tint):
        def infer(self, inputs, *a):
            runs.append(len(inputs))
            if sum(runs) >= 10:
                options.deadline = time.time() - 1
            return super().infer(inputs, *a)
    options.deadline = 0
    assert batch.work(job, options, processor=Counting(job.facts["settings"])) == batch.STOPPED
    assert sum(runs) == 10 == len(job.rows())
    assert job.shard(1).deaths() == ({}, {})               # stopping is nobody's death
    assert not list((job.folder / "claims").iterdir())
    assert batch.work(job) == batch.DONE
    check_whole(job)


# ---------------------------------------------------------------- faults of one picture

class Trouble(Tint):
    """Fails by name: `trouble` maps an id to what infer does with it."""
    half, trouble, calls = True, {}, []

    def decode(self, item):
        return item["id"], super().decode(item)

    def infer(self, inputs, seeds, precise=False):
        self.calls.append(([name for name, _ in inputs], precise))
        out = super().infer([picture for _, picture in inputs], seeds)
        for k, (name, _) in enumerate(inputs):
            out[k] = self.trouble.get(name, lambda out, n, precise: out)(out[k], len(inputs), precise)
        return out


def trouble(tmp_path, source, table, **options):
    job = new(tmp_path, source)
    kind = type("Now", (Trouble,), {"trouble": table, "calls": []})
    assert batch.work(job, batch.Options(**options), processor=kind(job.facts["settings"])) == batch.DONE
    return {row["id"]: row for row in check_whole(job)}, kind.calls


def raising(error, when=lambda n, precise: True):
    def act(out, n, precise):
        if when(n, precise):
            raise error
        return out
    return act


def test_out_of_memory_halves_the_batch_and_loses_nobody(tmp_path, source):
    oom = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB")
    rows, calls = trouble(tmp_path, source, {"im002.png": raising(oom, lambda n, p: n > 2)}, batch=8)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert [len(names) for names, _ in calls[:6]] == [8, 4, 2, 2, 2, 2]
    assert rows["im007.png"]["oom"] == 2 and sum(row["oom"] for row in rows.values()) == 2
    rows, _ = trouble(tmp_path / "b", source, {"im002.png": raising(MemoryError())}, batch=8)
    assert rows["im002.png"]["status"] == "oom" and [r["status"] for r in rows.values()].count("ok") == 19


def test_the_batch_grows_again(tmp_path):
    source = pictures(tmp_path / "in", 60)
    once = []

    def first(out, n, precise):
        if not once:
            once.append(1)
            raise MemoryError
        return out
    kind = type("Now", (Trouble,), {"trouble": {"im000.png": first}, "calls": []})
    job = new(tmp_path, source, shard_size=60)
    batch.work(job, batch.Options(batch=4), processor=kind(job.facts["settings"]))
    sizes = [len(names) for names, _ in kind.calls]
    assert sizes[:3] == [4, 2, 2] and sizes.index(4, 1) in range(21, 25)  # what was decoded ahead stays small


def nan(out, n, precise):
    return Output(np.full_like(out.picture, np.nan), {})


def test_nan_in_half_precision_gets_one_try_in_full(tmp_path, source):
    table = {"im001.png": lambda out, n, precise: out if precise else nan(out, n, precise), "im002.png": nan}
    rows, calls = trouble(tmp_path, source, table, batch=8)
    assert rows["im001.png"]["status"] == "ok" and rows["im001.png"]["precise"]
    assert rows["im002.png"]["status"] == "nan" and "NaN" in rows["im002.png"]["message"]
    assert [names for names, precise in calls if precise] == [["im001.png"], ["im002.png"]]


def test_whatever_breaks_in_half_precision_gets_one_try_in_full(tmp_path, source):
    """Numbers beyond half precision may show as an exception (a check in the pipeline) as well as in the
    picture."""
    half = lambda n, precise: not precise
    table = {"im001.png": raising(BadInput("holds NaN"), half),
             "im002.png": raising(ZeroDivisionError("x"), half),
             "im003.png": raising(BadInput("nothing is nearer")), "im004.png": raising(MemoryError())}
    rows, calls = trouble(tmp_path, source, table, batch=4)
    assert [rows[f"im00{n}.png"]["status"] for n in range(6)] == ["ok", "ok", "ok", "bad_input", "oom", "ok"]
    assert [rows[f"im00{n}.png"]["precise"] for n in range(6)] == [False, True, True, True, False, False]
    assert rows["im003.png"]["message"] == "nothing is nearer"
    assert [names for names, precise in calls if precise] == [["im001.png"], ["im002.png"], ["im003.png"]]


def test_a_picture_that_is_too_large_is_done_with_less_memory(tmp_path, source):
    """`spare` is asked only for a picture alone, and again only while it finds something."""
    asked = []

    class Sparing(Trouble):
        def spare(self):
            asked.append(1)
            return len(asked) == 1
    table = {"im005.png": raising(MemoryError(), lambda n, precise: not asked),
             "im006.png": raising(MemoryError())}
    job = new(tmp_path, source)
    kind = type("Now", (Sparing,), {"trouble": table, "calls": []})
    batch.work(job, batch.Options(batch=4), processor=kind(job.facts["settings"]))
    rows = {row["id"]: row for row in check_whole(job)}
    assert rows["im005.png"]["status"] == "ok" and rows["im006.png"]["status"] == "oom" and len(asked) == 2
    assert sum(row["status"] == "ok" for row in rows.values()) == 19


@pytest.mark.parametrize("words, kind", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB", "oom"), ("CUDA error: out of memory", "oom"),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "oom"),
    ("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
     "oom"),
    ("MPS backend out of memory", "oom"),
    ("Unable to find a valid cuDNN algorithm to run convolution", "oom"),
    ("CUDA error: device-side assert triggered", "poisoned"),
    ("CUDA error: an illegal memory access", "poisoned"),
    ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(`", "poisoned"),
    ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", "poisoned"),
    ("CUDA driver error: unknown error", "poisoned"),
    ("unspecified launch failure", "poisoned"),
    ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", "error"),
])
def test_errors_of_a_card_are_told_apart(words, kind):
    assert batch.classify(RuntimeError(words)) == kind


def test_torch_s_own_errors_are_told_apart():
    torch = pytest.importorskip("torch")
    assert batch.classify(torch.OutOfMemoryError("anything")) == "oom"
    assert batch.classify(getattr(torch, "AcceleratorError",
                                  RuntimeError)("CUDA error: misaligned address")) == "poisoned"
    assert batch.classify(BadInput("the file is named 'cuda error.png'")) == "bad_input"


def test_one_bad_picture_does_not_spoil_its_batch(tmp_path, source):
    table = {"im003.png": raising(ZeroDivisionError("by zero")),
             "im004.png": raising(BadInput("nothing is nearer"))}
    rows, _ = trouble(tmp_path, source, table, batch=8)
    assert (rows["im003.png"]["status"],
            rows["im003.png"]["message"]) == ("error", "ZeroDivisionError: by zero")
    assert (rows["im004.png"]["status"], rows["im004.png"]["message"]) == ("bad_input", "nothing is nearer")
    assert [r["status"] for r in rows.values()].count("ok") == 18


def test_a_lost_device_ends_the_process_and_blames_nobody_yet(tmp_path, source):
    job = new(tmp_path, source)
    kind = type("Now", (Trouble,),
                {"trouble": {"im009.png": raising(RuntimeError("CUDA error: device-side assert"))}})
    with pytest.raises(batch.Poisoned):
        batch.work(job, processor=kind(job.facts["settings"]))
    assert len(job.rows()) == 8
    assert job.shard(1).deaths()[0]["im009.png"] == 1


def test_a_picture_that_kills_every_worker_is_found(tmp_path):
    source = tmp_path / "in"
    drill.make_inputs(source, 520)
    for n in range(490):
        (source / f"frame{n:06d}.png").unlink()
    done = cli("run", tmp_path / "job", "--input", source, "--process", drill.SPEC, "--shard-size", "16",
               "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["id"]: row for row in check_whole(jobs.open_job(tmp_path / "job"))}
    assert rows["frame000500.png"]["message"].startswith("the worker died 3 times")
    assert all(row["status"] == drill.expected(drill.number_of(name)) for name, row in rows.items())


def test_an_unreadable_file(tmp_path, source, monkeypatch):
    """As root every file can be read, so the error comes from here."""
    def refuse(self, item):
        raise PermissionError(errno.EACCES, "Permission denied", item["path"])
    monkeypatch.setattr(Tint, "decode", refuse)
    job = new(tmp_path, source)
    assert batch.work(job) == batch.DONE
    assert {(r["status"], r["message"]) for r in job.rows()} == {
        ("bad_input", "PermissionError: [Errno 13] Permission denied: 'the file'")}


def test_every_bad_input_gets_a_name(tmp_path):
    torch = pytest.importorskip("torch")
    from lib.depth import DepthMap
    expected = bad_inputs.make(tmp_path / "in")
    job = new(tmp_path, tmp_path / "in", process="layers", shard_size=16)
    processor = job.processor()
    ramp = lambda x: torch.linspace(0, 1, x.shape[-1]).expand(1, 1, *x.shape[-2:]).clone()
    processor.estimate = lambda image: DepthMap(ramp(image), "relative", 0.0, 1.0)
    assert batch.work(job, processor=processor) == batch.DONE
    rows = {row["id"]: row for row in check_whole(job)}
    assert {name: rows[name]["status"] for name in rows} == expected
    assert all(len(row["message"]) > 15 for row in rows.values() if row["status"] != "ok")
    depth = bad_inputs.make_depth(tmp_path / "d")
    job = new(tmp_path, tmp_path / "d" / "rgb", "depth", process="layers",
              depth=str(tmp_path / "d" / "depth"))
    assert batch.work(job) == batch.DONE
    assert {row["id"]: row["status"] for row in check_whole(job)} == depth
    assert len(expected) + len(depth) >= 75


@pytest.mark.parametrize("at, words", [("0.0", "nearer"), ("20m", "outside the scene")])
def test_an_empty_or_full_mask_is_said(tmp_path, at, words):
    bad_inputs.make_depth(tmp_path / "d")
    job = jobs.open_or_create(tmp_path / "job", tmp_path / "d" / "rgb", "layers", {"at": at},
                              depth=str(tmp_path / "d" / "depth"))
    assert batch.work(job) == batch.DONE
    row = next(row for row in job.rows() if row["id"] == "depth_good.png")
    assert row["status"] == "bad_input" and words in row["message"]


@pytest.fixture
def with_depth(tmp_path):
    """Four pictures, and a depth file for all but the last."""
    source = pictures(tmp_path / "rgb", 4, size=64)
    (tmp_path / "depth").mkdir()
    for n in range(3):
        np.save(tmp_path / "depth" / f"im{n:03d}.npy", np.linspace(1, 5 + n, 64 * 64, dtype=np.float32).reshape(64, 64))
    return source, tmp_path / "depth"


def test_depth_files_may_move_but_not_change(tmp_path, with_depth):
    source, depth = with_depth
    words = {"settings": {"at": "0.5"}, "process": "layers"}
    jobs.open_or_create(tmp_path / "job", source, depth=depth, **words)
    moved = depth.rename(tmp_path / "moved")
    job = jobs.open_or_create(tmp_path / "job", source, depth=moved, **words)
    assert cli("run", tmp_path / "job", "--depth", moved, "--quiet").returncode == 0
    rows = {row["id"]: (row["status"], row["message"]) for row in check_whole(job)}
    assert [rows[f"im{n:03d}.png"][0] for n in range(3)] == ["ok"] * 3
    assert rows["im003.png"] == ("bad_input", "there is no depth file for this picture")
    (moved / "im001.npy").unlink()
    with pytest.raises(Refused, match=r"depth of im001.png: the job has 'im001.npy \(\d+ bytes\)', now .* 'none'"):
        jobs.open_or_create(tmp_path / "job", depth=moved)
    jobs.open_or_create(tmp_path / "without", source, **words)
    with pytest.raises(Refused, match="depth: the job has '', now it would be"):
        jobs.open_or_create(tmp_path / "without", source, depth=moved, **words)


def test_a_depth_file_that_is_gone_or_another_is_said(tmp_path, with_depth):
    source, depth = with_depth
    job = jobs.open_or_create(tmp_path / "job", source, "layers", depth=depth)
    (depth / "im000.npy").unlink()
    np.save(depth / "im001.npy", np.ones((64, 64)))
    assert batch.work(job) == batch.DONE
    said = {row["id"]: row["message"] for row in check_whole(job)}
    assert said["im000.png"].startswith("its depth file is gone")
    assert said["im001.png"].startswith("its depth file has changed since the list was frozen")
    assert said["im002.png"] == ""


# ---------------------------------------------------------------- faults of the disk

@pytest.mark.parametrize("number, words",
                         [(errno.ENOSPC, "make room"), (errno.EROFS, "make the folder writable")])
def test_a_disk_that_refuses_stops_the_job_and_blames_no_picture(tmp_path, source, monkeypatch, number,
                                                                 words):
    clean = new(tmp_path, source, "clean")
    batch.work(clean)
    job, real, calls = new(tmp_path, source), os.replace, []

    def replace(a, b):
        calls.append(1)
        if len(calls) % 7 == 0:
            raise OSError(number, os.strerror(number))
        return real(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(jobs.os, "replace", replace)
        for tries in range(9):  # as often as one likes: no picture becomes a suspect
            try:
                assert batch.work(job, batch.Options(batch=4)) == batch.DONE
                break
            except OutputError as error:
                assert words in str(error)
    assert tries >= 2 and sum(map(len, (job.shard(n).deaths()[0] for n in job.shards))) == 0
    assert batch.work(job) == batch.DONE and hashes(job) == hashes(clean)
    check_whole(job)


def test_a_file_size_limit_as_a_full_disk(tmp_path):
    source = pictures(tmp_path / "in", 24, size=64)
    words = (f"ulimit -f 8; exec {sys.executable} -m lib.batch run {tmp_path / 'job'} --input {source} "
             f"--process tint --quiet")
    done = subprocess.run(["bash", "-c", words], env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == batch.BROKEN and "make room" in done.stderr, done.stderr
    assert cli("run", tmp_path / "job").returncode == 0
    assert {row["status"] for row in check_whole(jobs.open_job(tmp_path / "job"))} == {"ok"}


@pytest.mark.skipif(not shutil.which("unshare") or os.name != "posix" or os.geteuid() != 0,
                    reason="needs root")
def test_a_really_full_disk(tmp_path):
    source = pictures(tmp_path / "in", 40, size=64)
    job, small = tmp_path / "job", tmp_path / "small"
    small.mkdir()
    run = f"{sys.executable} -m lib.batch run {small}/job --input {source} --process tint --workers 2 --quiet"
    script = (f"mount -t tmpfs -o size=200k tmpfs {small} || exit 77; {run}; first=$?; mount -o "
              f"remount,size=9m {small}; {run} && cp -a {small}/job {job}; exit $first")
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], env=ENV, capture_output=True, text=True,
                          timeout=100)
    if done.returncode in (77, 1) and "unshare" in done.stderr:
        pytest.skip("no namespaces here")
    assert done.returncode == batch.BROKEN and "No space left" in done.stderr, done.stderr
    assert {row["status"] for row in check_whole(jobs.open_job(job))} == {"ok"}


# ---------------------------------------------------------------- again, and from elsewhere

@pytest.mark.parametrize("pack", ["files", "tar"])
def test_retry_by_status(tmp_path, source, pack):
    job = new(tmp_path, source, pack=pack)
    kind = type("Now", (Trouble,), {"trouble": {"im002.png": nan, "im009.png": raising(ValueError("odd"))}})
    batch.work(job, processor=kind(job.facts["settings"]))
    before = hashes(job)
    assert batch.retry(job, ["oom"]) == 0 and not job.pending()
    assert batch.retry(job, ["nan", "error"]) == 2 and job.pending() == [0, 1]
    assert len(job.rows()) == 18
    assert batch.work(job) == batch.DONE
    rows = {row["id"]: row for row in check_whole(job)}
    assert rows["im002.png"]["status"] == rows["im009.png"]["status"] == "ok"
    assert rows["im002.png"]["attempt"] == 2 and rows["im003.png"]["attempt"] == 1
    assert {n: h for n, h in hashes(job).items() if n not in ("im002.png", "im009.png")} == \
        {n: h for n, h in before.items() if n not in ("im002.png", "im009.png")}
    with pytest.raises(Refused, match="No status 'bad'"):
        batch.retry(job, ["bad"])


@pytest.mark.parametrize("pack", ["files", "tar"])
def test_a_second_and_a_third_session(tmp_path, source, pack):
    clean, first = new(tmp_path, source, "clean", pack=pack), new(tmp_path, source, "first", pack=pack)
    batch.work(clean)
    stop_after(first, 10)
    second = new(tmp_path, source, "second", pack=pack)
    assert jobs.adopt(second, [first.folder]) == 10
    assert hashes(second) == {n: h for n, h in hashes(clean).items() if n in hashes(second)}
    stop_after(second, 7)
    third = new(tmp_path, source, "third", pack=pack)
    assert jobs.adopt(third, [second.folder, first.folder]) == 17
    assert batch.work(third) == batch.DONE
    assert hashes(third) == hashes(clean) and batch.status(third, verify=True)["damaged"] == []
    assert not (third.shard(0).out.exists() or third.shard(0).tar.exists())    # pointed to, not copied
    other = new(tmp_path, source, "other", settings={"amount": 0.9}, pack=pack)
    with pytest.raises(Refused, match="settings.amount"):
        jobs.adopt(other, [first.folder])


@pytest.mark.parametrize("pack", ["files", "tar"])
def test_retry_of_what_an_earlier_session_did(tmp_path, source, pack):
    """The new picture lies here, the others still there; a third session finds both, and copies stand
    alone."""
    clean, first = new(tmp_path, source, "clean", pack=pack), new(tmp_path, source, "first", pack=pack)
    batch.work(clean)
    kind = type("Now", (Trouble,), {"trouble": {"im002.png": nan}, "calls": []})
    batch.work(first, processor=kind(first.facts["settings"]))
    second = new(tmp_path, source, "second", pack=pack)
    assert jobs.adopt(second, [first.folder]) == 20 and batch.retry(second, ["nan"]) == 1
    assert batch.work(second) == batch.DONE
    third = new(tmp_path, source, "third", pack=pack)
    assert jobs.adopt(third, [second.folder, first.folder]) == 20
    begun = new(tmp_path, source, "begun", pack=pack)
    stop_after(begun, 1)
    assert jobs.adopt(begun, [second.folder, first.folder]) == 19
    for job in (second, third, begun):
        assert hashes(job) == hashes(clean) and batch.status(job, verify=True)["damaged"] == []
    for other in (first, second):
        shutil.move(other.folder, tmp_path / f"{other.folder.name}-away")
    assert batch.status(begun, verify=True)["damaged"] == [f"im{n:03d}.png" for n in range(8, 20)]


@pytest.mark.parametrize("pack", ["files", "tar"])
def test_a_picture_that_an_earlier_session_lost_is_made_again(tmp_path, source, pack):
    first, second = new(tmp_path, source, "1", pack=pack), new(tmp_path, source, "2", pack=pack)
    batch.work(first)
    if pack == "tar":
        first.shard(0).tar.write_bytes(first.shard(0).tar.read_bytes()[:2000])
    else:
        (first.shard(0).out / first.rows()[3]["output"]).unlink()
    taken = jobs.adopt(second, [first.folder])
    assert 12 <= taken < 20 and batch.work(second) == batch.DONE
    assert hashes(second) == hashes(first) and batch.status(second, verify=True)["damaged"] == []


def test_retry_where_a_tar_is_gone(tmp_path, source):
    job = new(tmp_path, source, pack="tar")
    kind = type("Now", (Trouble,), {"trouble": {"im002.png": nan}, "calls": []})
    batch.work(job, processor=kind(job.facts["settings"]))
    job.shard(0).tar.unlink()
    assert batch.retry(job, ["nan"]) == 1 and batch.work(job) == batch.DONE
    assert {row["status"] for row in check_whole(job)} == {"ok"}


def stop_after(job, count):
    options, seen = batch.Options(batch=1), []

    class Counting(Tint):
        def infer(self, inputs, *a):
            seen.append(1)
            if len(seen) >= count:
                options.deadline = time.time() - 1
            return super().infer(inputs, *a)
    assert batch.work(job, options, processor=Counting(job.facts["settings"])) == batch.STOPPED


def test_a_session_that_is_missing_is_named(tmp_path, source):
    first, second, third = (new(tmp_path, source, name) for name in ("1", "2", "3"))
    stop_after(first, 10)
    jobs.adopt(second, [first.folder])
    shutil.move(first.folder, tmp_path / "away")
    with pytest.raises(Refused, match="give that session too"):
        jobs.adopt(third, [second.folder])


# ---------------------------------------------------------------- processes

def slow_job(tmp_path, count=60, seconds=0.02):
    source = pictures(tmp_path / "in", count)
    return jobs.open_or_create(tmp_path / "job", source, drill.SPEC, {"slow": seconds}, shard_size=10)


def begin(job, *words, workers=2):
    command = [sys.executable, "-m", "lib.batch", "run", str(job.folder), "--workers", str(workers),
               "--quiet", *words]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it took too long"
        time.sleep(0.05)


def crew(process):
    import psutil
    return psutil.Process(process.pid).children()


def workers_of(job):
    return {row["worker"] for row in job.rows()}


def test_a_killed_worker_is_started_again_and_the_other_goes_on(tmp_path):
    job = slow_job(tmp_path)
    process = begin(job, "--batch", "1")
    wait_for(lambda: len(workers_of(job)) == 2)
    first, second = crew(process)
    first.kill()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    check_whole(job)
    pids = {int(name.rsplit("-", 1)[1]) for name in workers_of(job)}
    assert second.pid in pids                              # untouched
    assert len(pids) <= 3


def test_sigterm_stops_in_good_order(tmp_path):
    job = slow_job(tmp_path)
    process = begin(job, "--batch", "1")
    wait_for(lambda: len(job.rows()) > 5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == batch.STOPPED and "the same command continues" in out
    assert not list((job.folder / "claims").iterdir()) and 5 < len(job.rows()) < 60
    assert cli("run", job.folder, "--workers", "3", "--engine", "local").returncode == 0
    check_whole(job)


def test_max_seconds(tmp_path):
    job = slow_job(tmp_path, 40, 0.2)
    done = cli("run", job.folder, "--max-seconds", "3", "--batch", "1")
    assert done.returncode == batch.STOPPED and len(job.rows()) < 40


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    job = slow_job(tmp_path, 60, 0.05)
    process = begin(job, "--batch", "1")
    wait_for(lambda: len(workers_of(job)) == 2)
    orphans = crew(process)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(jobs._started(o.pid) for o in orphans), 20)
    assert len(job.rows()) < 60
    assert cli("run", job.folder).returncode == 0
    check_whole(job)


def test_a_worker_that_hangs_is_killed(tmp_path, source):
    (tmp_path / "hang.py").write_text(
        "import os, time\nfrom lib.processors import Tint\n"
        "class Hang(Tint):\n"
        "    def infer(self, *a):\n"
        f"        flag = {str(tmp_path / 'once')!r}\n"
        "        if not os.path.exists(flag):\n"
        "            open(flag, 'w').close()\n"
        "            time.sleep(1000)\n"
        "        return super().infer(*a)\n")
    done = cli("run", tmp_path / "job", "--input", source, "--process", f"{tmp_path / 'hang.py'}:Hang",
               "--lease", "3",
               "--quiet")
    assert done.returncode == 0, done.stderr
    check_whole(jobs.open_job(tmp_path / "job"))


def test_a_worker_that_is_slow_and_gets_on_is_left_alone(tmp_path, source):
    """One batch takes twice the lease; what tells it from one that hangs is its signs of life."""
    (tmp_path / "slow.py").write_text(
        "import time\nfrom lib.processors import Tint\n"
        "class Slow(Tint):\n"
        "    def infer(self, *a):\n"
        "        for _ in range(16):\n"
        "            time.sleep(0.25)\n"
        "            self.alive()\n"
        "        return super().infer(*a)\n")
    done = cli("run", tmp_path / "job", "--input", source, "--process", f"{tmp_path / 'slow.py'}:Slow",
               "--lease", "2", "--limit", "6", "--quiet")
    assert done.returncode == 0 and "sign of life" not in done.stderr, done.stderr
    assert {row["attempt"] for row in check_whole(jobs.open_job(tmp_path / "job"))} == {1}


def test_an_edit_gives_signs_of_life(tmp_path):
    edit = processors.Edit({"steps": 6})
    lived = []
    edit.alive = lambda: lived.append(1)
    picture = processors.Layers.decode(edit, {"id": "room.png", "path": str(ROOT / "data" / "scenes" / "room.png")})
    edit.infer([picture], [1])
    assert len(lived) > 6                                         # the passes of the model, not only the picture


class Halves(processors.Layers):
    """Its model does not end before the next picture is being prepared."""

    def infer(self, inputs, *a):
        self.begun = {entry: threading.Event() for entry in inputs}
        return super().infer(inputs, *a)

    def prepare(self, entry):
        self.begun[entry].set()
        if entry == "bad":
            raise ValueError("nothing is nearer")
        return entry

    def one(self, prepared, seed, precise):
        following = {"a": "b", "b": "c"}.get(prepared)
        assert following not in self.begun or self.begun[following].wait(20), f"{following} waits for {prepared}"
        return Output(np.zeros((2, 2, 3)), {"entry": prepared, "seed": seed})


def test_the_next_picture_is_prepared_while_the_model_works():
    made = Halves({}).infer(list("abc"), [1, 2, 3])
    assert [out.metrics for out in made] == [{"entry": e, "seed": k + 1} for k, e in enumerate("abc")]
    with pytest.raises(BadInput, match="nothing is nearer"):
        Halves({}).infer(["a", "bad", "c"], [1, 2, 3])


def test_a_worker_that_cannot_start_ends_the_run_at_once(tmp_path, source):
    (tmp_path / "never.py").write_text("from lib.processors import Tint\nclass Never(Tint):\n"
                                       "    def __init__(self, *a): raise RuntimeError('the model is not "
                                       "here')\n")
    done = cli("run", tmp_path / "job", "--input", source, "--process", f"{tmp_path / 'never.py'}:Never",
               "--workers", "2")
    assert done.returncode == batch.USAGE
    assert "cannot start: RuntimeError: the model is not here" in done.stderr


def test_one_worker_that_cannot_start_does_not_stop_the_other(tmp_path, source):
    taken = tmp_path / "taken"
    (tmp_path / "one.py").write_text(
        "from lib.processors import Tint\n"
        "class One(Tint):\n"
        "    def __init__(self, *a):\n"
        "        super().__init__(*a)\n"
        "        try:\n"
        f"            open({str(taken)!r}, 'x').close()\n"
        "        except FileExistsError:\n"
        "            return\n"
        "        raise RuntimeError('this card is full')\n")
    spec = f"{tmp_path / 'one.py'}:One"
    done = cli("run", tmp_path / "job", "--input", source, "--process", spec, "--workers", "2", "--quiet")
    assert done.returncode == batch.DONE, done.stderr
    assert "is of no use" in done.stderr and "this card is full" in done.stderr
    check_whole(jobs.open_job(tmp_path / "job"))


def test_a_worker_is_given_up_for_its_own_deaths_alone(tmp_path, source, monkeypatch):
    """A card that fails each time, beside one that works well: the rows of the other one are no sign of its
    health."""
    monkeypatch.setattr(engines.Worker, "start", lambda self: setattr(self, "process", SimpleNamespace(
        poll=lambda: -9, pid=4711)))
    worker = engines.Worker(new(tmp_path, source), batch.Plan(batch.Options()), 0, 2, [])
    progress = SimpleNamespace(made={f"{jobs.socket.gethostname()}-4711": 0}, rows=lambda: 500)
    for death in range(worker.TRIES):
        worker.wake = 0.0
        assert worker.poll(progress)                       # starts it again
        assert worker.poll(progress) == (death < worker.TRIES - 1)
    assert worker.code == batch.BROKEN
    worker.deaths, progress.made = worker.TRIES - 1, {f"{jobs.socket.gethostname()}-4711": 1}
    worker.start()
    assert worker.poll(progress) and worker.deaths == 1


def test_a_clock_that_is_set_back(tmp_path, source, monkeypatch):
    job, real = new(tmp_path, source), time.time
    progress = engines.Progress(job, quiet=True)
    worker = engines.Worker(job, batch.Plan(batch.Options()), 0, 1, [])
    worker.wake, started = time.monotonic() + 0.5, []
    monkeypatch.setattr(worker, "start", lambda: started.append(1))
    batch.work(job)
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    time.sleep(1.1)
    assert progress.poll() == 20 and worker.poll(progress) and started
    slow = slow_job(tmp_path / "slow", 40, 0.2)
    plan = batch.Plan(batch.Options(batch=1, lease=1e6), 1, max_seconds=3, quiet=True, device="cpu")
    # when the deadline is set; the worker's clock is right
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    begin = time.monotonic()
    assert batch.run(slow, plan) == batch.STOPPED and 2 < time.monotonic() - begin < 30 and slow.pending()


def test_cards_are_shared_out(monkeypatch):
    shares = {(2, 2): 1, (1, 2): 1, (3, 2): 1 / 2, (4, 2): 1 / 2, (5, 2): 1 / 3, (2, 1): 1 / 2, (2, 0): 0}
    assert {key: engines.share_of_card(*key) for key in shares} == shares
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engines.on_card(None) == {}
    assert engines.on_card("1") == {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")      # whoever chose them chose their order too
    assert engines.on_card("1") == {"CUDA_VISIBLE_DEVICES": "1"}


@pytest.mark.parametrize("workers, each", [(0, 1), (4, 2)])
def test_every_card_gets_its_workers(tmp_path, source, monkeypatch, workers, each):
    """Two cards that nvidia-smi lists (they are not there, and a tint needs none): who sees which."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '0, GPU-aa, Tesla T4, 15360'\necho '1, GPU-bb, Tesla T4, 15360'\n")
    tool.chmod(0o755)
    (tmp_path / "seen.py").write_text(
        "import os, time\nfrom lib.processors import Tint\nclass Seen(Tint):\n    batch = 1\n"
        "    def __init__(self, settings, device):\n        super().__init__(settings, device)\n"
        "        place = os.environ['CUDA_VISIBLE_DEVICES'], device, os.environ['CUDA_DEVICE_ORDER']\n"
        f"        open({str(tmp_path / 'seen')!r}, 'a').write(' '.join(place) + chr(10))\n")
    monkeypatch.setitem(ENV, "PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delitem(ENV, "CUDA_VISIBLE_DEVICES", raising=False)
    spec = f"{tmp_path / 'seen.py'}:Seen"
    done = cli("run", tmp_path / "job", "--input", source, "--process", spec, "--quiet", "--workers", workers)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert sorted(seen) == ["0 cuda PCI_BUS_ID"] * each + ["1 cuda PCI_BUS_ID"] * each


def test_bare_workers_as_in_a_slurm_array(tmp_path):
    job = slow_job(tmp_path, 30, 0.0)
    crew = [subprocess.Popen([sys.executable, "-m", "lib.batch", "worker", str(job.folder), "--index", str(i),
                              "--of", "3"],
                             env=ENV) for i in range(3)]
    assert [process.wait(60) for process in crew] == [0, 0, 0]
    check_whole(job)


@pytest.mark.parametrize("words, code, text", [
    (["run", "nowhere"], 2, "holds no job yet: say what to work on with --input"),
    (["status", "nowhere"], 2, "holds no job"), (["retry", "nowhere"], 2, "holds no job"),
    (["run", "x", "--set", "amount"], 2, "--set wants NAME=VALUE"), (["fly"], 2, "invalid choice"),
    (["run", "x", "--input", "nothing-there"], 2, "There is no input"),
    (["run", "x", "--shard-size", "-3"], 2, "-3 is below 0"),
    (["run", "x", "--workers", "-1"], 2, "-1 is below 0"),
    (["run", "x", "--max-seconds", "nan"], 2, "no number of seconds"),
    (["run", "x", "--limit", "two"], 2, "two"),
    (["run", __file__, "--input", "."], 2, "is no folder"),
])
def test_exit_codes_and_words(tmp_path, words, code, text):
    done = cli(*words, cwd=tmp_path)
    assert done.returncode == code and text in done.stderr


def test_help_is_there():
    assert "start a job, or continue it" in cli("--help").stdout
    text = cli("run", "--help").stdout
    for option in ("--input", "--done-root", "--max-seconds", "--engine", "--set", "--pack"):
        assert option in text


def test_status_in_words_and_in_json(tmp_path, source):
    job = new(tmp_path, source)
    assert cli("status", job.folder).returncode == batch.STOPPED
    batch.work(job)
    done = cli("status", job.folder, "--json", "--verify")
    assert done.returncode == 0 and json.loads(done.stdout)["ok"] == 20
    row = job.rows()[0]
    (job.shard(0).out / row["output"]).write_bytes(b"x" * row["bytes"])
    done = cli("status", job.folder, "--verify")
    assert done.returncode == batch.BROKEN and "1 outputs are missing or damaged: im000.png" in done.stdout


def test_progress_knows_who_made_what(tmp_path, source):
    """Also in a shard that was begun and done between two looks."""
    job = new(tmp_path, source)
    progress = engines.Progress(job, quiet=True)
    batch.work(job)
    progress.close()
    assert dict(progress.made) == {f"{jobs.socket.gethostname()}-{os.getpid()}": 20}


def test_progress_counts_as_the_rows_do(tmp_path, source):
    job = new(tmp_path, source)
    stop_after(job, 11)
    assert engines.Progress(job, quiet=True).rows() == 11
    batch.retry(job, ["ok"])
    assert engines.Progress(job, quiet=True).rows() == 0
    batch.work(job)
    progress = engines.Progress(job, quiet=True)
    progress.close()
    assert progress.rows() == 20 and not progress.made     # of earlier runs
    assert json.loads((job.folder / "status.json").read_text())["done"] == 20


# ---------------------------------------------------------------- the drill, and the real thing

def test_metric_depth_is_compared_with_inverse_depth_as_depth():
    """The same ramp in metres and, unknown in scale, as inverse depth: no error. Aligned as they are, there
    is a large one."""
    import torch

    from lib import depth
    metres = torch.linspace(1, 6, 64).view(1, 1, 64, 1).expand(1, 1, 64, 64).contiguous()
    given = depth.from_metric(metres, near=0.5, far=8.0)
    nothing = torch.zeros(1, 4, 64, 64)
    shot = SimpleNamespace(result=torch.rand(1, 3, 64, 64), object_layer=nothing, hidden_by=nothing[:, :1],
                           photo=SimpleNamespace(depth=given), place=SimpleNamespace(at=0.5))
    score = lambda found: processors.Edit.depth_error(SimpleNamespace(estimate=lambda image: found),
                                                      shot)["depth_rmse"]
    assert score(depth.from_inverse(7 / metres)) < 0.005 and score(given) < 1e-4
    straight = depth.align_scale_shift(depth.from_inverse(7 / metres).values, given.values)[0]
    assert float((straight - given.values).square().mean().sqrt()) > 0.03
    assert score(depth.from_inverse(torch.rand(1, 1, 64, 64) + 0.1)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("pack", ["files", "tar"])
def test_the_drill_in_small(tmp_path, pack):
    wrong, seen = drill.drill(700, 5, tmp_path, seed=4, pack=pack, slow=0.012, shard_size=32,
                              pause=(0.2, 0.8))
    assert wrong == [] and seen["worker"] + seen["parent"] >= 4


@pytest.mark.slow
def test_the_real_pipeline_whatever_the_batch(tmp_path):
    """Depth, DeGLaD and FeatGLaC on the mini: within 2/255 from run to run, with a score for each frame."""
    pytest.importorskip("torch")
    settings = {"steps": 2, "at": "0.55", "insert": "red chair", "max_side": 128}
    made = []
    for name, size in (("a", 1), ("b", 3)):
        job = jobs.open_or_create(tmp_path / name, ROOT / "data" / "scenes" / "walk.mp4", "edit", settings,
                                  limit=3, step=1.0)
        assert batch.work(job, batch.Options(batch=size)) == batch.DONE
        rows = check_whole(job)
        assert {row["status"] for row in rows} == {"ok"}, [row["message"] for row in rows]
        assert all(0 <= row["metrics"]["depth_rmse"] < 1 for row in rows)
        assert processors.unpack_map(rows[0]["metrics"]["error_map"]).shape == (24, 24)
        made.append([np.asarray(Image.open(job.shard(r["shard"]).out / r["output"])).astype(int)
                     for r in rows])
    for one, other in zip(*made):
        assert np.abs(one - other).max() <= 2


def test_the_real_pipeline_names_what_is_wrong(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(Refused, match="No setting 'step'"):
        processors.Edit.complete({"step": 2})
    with pytest.raises(Refused, match="Unknown depth model 'dpth'; known: mini, "):
        processors.Edit.complete({"depth_model": "dpth"})
    with pytest.raises(Refused, match="dtype is auto, float16 or float32"):
        processors.Edit.complete({"dtype": "int8"})
    assert len(processors.Edit.identity(processors.Edit.complete({}))["weights.model"]) == 16
    flat = Output(np.full((8, 8, 3), 0.5, np.float32), {})
    import torch
    assert "one colour" in object.__new__(processors.Edit).check(flat, {"image": torch.rand(1, 3, 8, 8)})


def test_a_task_of_ray_on_a_job_that_no_other_engine_has_touched(tmp_path, source):
    """(Ray itself is not needed: a task is a plain function.) The first one makes the folders it needs."""
    from dataclasses import asdict
    job = new(tmp_path, source)
    options = asdict(batch.Options(batch=4, loaders=1))
    assert all(engines.ray_shard(str(job.folder), {"root": job.facts["root"], "depth": ""}, n, options, "cpu", False)
               for n in job.shards)
    for runner in [engines._RUNNERS.pop(key) for key in list(engines._RUNNERS)]:
        runner.close()
    check_whole(job)


@pytest.mark.slow
def test_ray_with_a_node_that_dies(tmp_path):
    pytest.importorskip("ray")
    job = slow_job(tmp_path, 80, 0.1)                      # 8 s of work
    clean = jobs.open_or_create(tmp_path / "clean", tmp_path / "in", drill.SPEC, {"slow": 0.1}, shard_size=10)
    batch.work(clean)
    with engines.loopback_cluster(2) as (cluster, nodes):
        fell = []

        def fall():
            wait_for(lambda: len(job.rows()) > 12, 300)
            cluster.remove_node(nodes[0], allow_graceful=False)
            fell.append(len(job.rows()))
        thread = threading.Thread(target=fall)
        thread.start()
        plan = batch.Plan(batch.Options(batch=2), workers=2, engine="ray", quiet=True, device="cpu")
        assert batch.run(job, plan) == batch.DONE
        thread.join()
    assert fell and fell[0] < 80                           # it died in mid-run
    assert hashes(job) == hashes(clean)
    check_whole(job)
