"""The drill: a job of many small pictures is killed again and again, and must end as if nothing had happened.

    python tests/drill.py --images 25000 --kills 50            (a few minutes; a folder in memory makes it
    quicker)

Every kill is a `kill -9` of a worker, or of the parent, at a random moment. In between the disk is full, the
output is read-only, memory runs out, results are NaN, one picture kills every process that touches it, and
each restart has another number of workers and another engine. At the end: every input has exactly one final
row, no file is torn or left over, and every picture is bit for bit that of a second, undisturbed run.
"""
import argparse
import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lib import batch, jobs  # noqa: E402
from lib.processors import Output, Tint  # noqa: E402

SPEC = f"{Path(__file__).resolve()}:Troubled"


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def number_of(name) -> int:
    return int(re.search(r"(\d+)", Path(name).name).group(1))


class Troubled(Tint):
    """Tint, with trouble that depends on the picture's number (and, for a full or read-only disk, on
    DRILL)."""
    defaults = {"seed": 0, "size": 0, "amount": 0.25, "slow": 0.0}
    batch, half = 16, True

    def __init__(self, settings, device="cpu"):
        super().__init__(settings, device)
        if os.environ.get("DRILL") in ("full", "readonly"):
            after = random.Random(os.getpid()).randrange(2, 40)
            number = errno.ENOSPC if os.environ["DRILL"] == "full" else errno.EROFS
            self._break_disk(number, after)

    @staticmethod
    def _break_disk(number, after):
        """From the `after`-th rename on, none works; what was written of the file stays behind as in real
        life."""
        real, calls = os.replace, []

        def replace(a, b):
            calls.append(1)
            if len(calls) > after:
                raise OSError(number, os.strerror(number), str(b))
            return real(a, b)
        os.replace = replace

    def decode(self, item):
        return number_of(item["id"]), super().decode(item)

    def infer(self, inputs, seeds, precise=False):
        numbers = [number for number, _ in inputs]
        time.sleep(self.settings["slow"] * len(numbers))
        if any(n % 5003 == 500 for n in numbers):                 # a decoder or a driver that crashes
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(5)
        if any(n % 97 == 10 for n in numbers) and len(numbers) > 4 or any(n % 997 == 11 for n in numbers):
            raise OutOfMemoryError("CUDA out of memory (a drill)")
        out = super().infer([picture for _, picture in inputs], seeds)
        for k, n in enumerate(numbers):
            if n % 499 == 20 or (n % 101 == 21 and not precise):
                out[k] = Output(np.full_like(out[k].picture, np.nan), {})
        return out


def make_inputs(folder: Path, count: int, size=24):
    """Small pictures of noise; a few are empty, cut short, or no picture at all."""
    folder.mkdir(parents=True)
    for n in range(count):
        path = folder / f"frame{n:06d}.png"
        if n % 211 == 30:
            path.write_bytes([b"", b"no picture", b"\x89PNG\r\n\x1a\n"][n % 3])
            continue
        pixels = np.random.default_rng(n).integers(0, 255, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)


def expected(n: int) -> str:
    """The final status of picture n."""
    rules = [(n % 211 == 30, "bad_input"), (n % 5003 == 500, "error"), (n % 997 == 11, "oom"),
             (n % 499 == 20, "nan")]
    return next((status for is_so, status in rules if is_so), "ok")


def faults(folder, clean=None) -> list[str]:
    """Everything that is wrong with a finished job, as sentences; [] when nothing is. clean: an undisturbed
    run."""
    job, found = jobs.open_job(folder), []
    lines = [line for n in job.shards for line in job.shard(n).final.read_bytes().splitlines(keepends=True)]
    rows = [row for n in job.shards for row in jobs.read_rows(job.shard(n).final)]
    ids = Counter(row["id"] for row in rows)
    found += [f"{len(lines) - len(rows)} torn rows"] if len(lines) != len(rows) else []
    found += [f"{i} has no final row" for i in {i["id"] for i in job.items} - set(ids)]
    found += [f"{i} has {n} rows" for i, n in ids.items() if n > 1]
    found += [f"{row['id']} ended as {row['status']}: {row['message']}" for row in rows
              if row["status"] != expected(number_of(row["id"]))]
    found += [f"output of {i} is missing or damaged" for i in batch.status(job, verify=True)["damaged"]]
    found += [f"stray file {path}" for path in strays(job, rows)]
    if clean:
        other = {row["id"]: row for row in jobs.open_job(clean).rows()}
        found += [f"{row['id']} differs from the undisturbed run" for row in rows
                  if (row["status"], row.get("sha")) != (other[row["id"]]["status"],
                                                         other[row["id"]].get("sha"))]
    return found


def strays(job, rows):
    """Files in the job's folder that nothing refers to."""
    wanted = {job.folder / name for name in ("run.json", "inputs.jsonl", "status.json")}
    for n in job.shards:
        shard = job.shard(n)
        wanted |= {shard.final, shard.done, *([shard.tar] if shard.packed else [])}
    if not job.shard(0).packed:
        wanted |= {job.shard(row["shard"]).out / row["output"] for row in rows if row["status"] == "ok"}
    return sorted(p for p in job.folder.rglob("*") if p.is_file() and p not in wanted
                  and p.parent.name not in ("log", "report", "frames"))


# ---------------------------------------------------------------- disturbing it

def command(folder, source, workers, engine, pack, slow, shard_size):
    """How this start is done: the parent with an engine, or bare workers as in a Slurm array."""
    if engine == "array":
        return [sys.executable, "-m", "lib.batch", "worker", str(folder), "--index", str(workers), "--of",
                "3"]
    return [sys.executable, "-m", "lib.batch", "run", str(folder), "--input", str(source), "--process", SPEC,
            "--set",
            f"slow={slow}", "--workers", str(workers), "--engine", engine, "--pack", pack, "--shard-size",
            str(shard_size),
            "--quiet", "--device", "cpu"]


def start(words, log, trouble=""):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DRILL": trouble}
    with open(log, "ab") as file:
        return subprocess.Popen(words, env=env, stdout=file, stderr=file, start_new_session=True)


def program(process) -> str:
    """The name of what it runs; "" for one that is dead."""
    try:
        return Path((process.cmdline() or [""])[0]).name
    except psutil.Error:
        return ""


def kill_one(process, rng) -> str:
    """kill -9 of the parent or of one of its workers; what was hit, or ""."""
    try:
        family = psutil.Process(process.pid)
        crew = family.children()
        # Ray: of its many processes, those that matter here
        if any(program(child) == "gcs_server" for child in crew):
            crew = [child for child in family.children(recursive=True)
                    if program(child) == "raylet" or program(child).startswith("ray::ray_shard")]
        target = family if not crew or rng.random() < 0.3 else rng.choice(crew)
        target.send_signal(signal.SIGKILL)
        return "parent" if target.pid == process.pid else "worker"
    except psutil.Error:
        return ""


def await_work(process, folder, since, most=120):
    """Wait until somebody works on a shard since then, or the process is over: a kill before that tests the
    start of Python only."""
    while process.poll() is None and time.time() < since + most:
        for path in (folder / "claims").glob("[0-9]*"):
            with contextlib.suppress(OSError):                    # released meanwhile
                if path.stat().st_mtime >= since:
                    return
        time.sleep(0.02)


def disturb(folder, source, kills, rng, pack, slow, shard_size, log, pause, engines):
    """Start, kill, start again, until so many kills have hit. Returns what happened, counted."""
    seen, process, jobs_left = Counter(), None, True
    while seen["worker"] + seen["parent"] < kills and jobs_left:
        if process is None or process.poll() is not None:
            jobs_left = not (folder / "run.json").exists() or bool(jobs.open_job(folder).pending())
            engine = rng.choice(engines) if (folder / "run.json").exists() else "local"
            trouble = rng.choices(("", "full", "readonly"), (8, 1, 1))[0] if engine != "ray" else ""
            workers = rng.randrange(1, 4)
            since = time.time()
            process = start(command(folder, source, workers, engine, pack, slow, shard_size), log, trouble)
            if rng.random() < 0.9:                                # one in ten dies young
                await_work(process, folder, since)
            seen[f"starts of {engine}"] += 1
            seen[f"disk {trouble}"] += bool(trouble)
        time.sleep(rng.uniform(*pause))
        hit = kill_one(process, rng)
        seen[hit] += bool(hit)
        if hit == "parent":
            process.wait()
    if process and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    return seen


def drill(images=600, kills=6, folder=None, seed=0, pack="files", slow=0.002, shard_size=0, pause=(0.4, 1.6),
          say=print):
    """The whole drill; returns (faults, what happened). The folder is removed when nothing was wrong."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    rng, base = random.Random(seed), Path(tempfile.mkdtemp(prefix="drill-", dir=folder))
    source, clean, disturbed = base / "in", base / "clean", base / "job"
    begin = time.time()
    make_inputs(source, images)
    say(f"{images} pictures made in {time.time() - begin:.0f} s; the undisturbed run")
    begin = time.time()
    start(command(clean, source, 2, "local", pack, 0.0, shard_size), base / "clean.log").wait()
    say(f"done in {time.time() - begin:.0f} s; now {kills} kills")
    begin, engines = time.time(), ["local"] * 4 + ["array"] * 2 + (["ray"] if has_ray() else [])
    seen = disturb(disturbed, source, kills, rng, pack, slow, shard_size, base / "job.log", pause, engines)
    for _ in range(3):                                            # orphans may still hold a claim or two
        last = start(command(disturbed, source, 2, "local", pack, slow, shard_size), base / "job.log")
        if last.wait() == 0:
            break
    say(f"{dict(sorted(seen.items()))} in {time.time() - begin:.0f} s; exit code of the last run: "
        f"{last.returncode}")
    wrong = faults(disturbed, clean) + ([] if last.returncode == 0 else ["the last run did not end well"])
    if kills >= 20:                                               # else chance may well leave one out
        wrong += [f"the drill itself was too mild: no {what}" for what in
                  ("worker", "parent", "disk full", "disk readonly",
                   *(f"starts of {e}" for e in set(engines)))
                  if not seen[what]]
        wrong += [f"only {seen['worker'] + seen['parent']} kills hit: the job was done too soon (--slow, "
                  "--pause)"
                  ] * (seen["worker"] + seen["parent"] < kills)
    if not wrong:
        shutil.rmtree(base)
    return wrong, seen


def has_ray() -> bool:
    import importlib.util
    return importlib.util.find_spec("ray") is not None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", default=None, help="where to work; /dev/shm is quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pack", choices=("files", "tar"), default="files")
    parser.add_argument("--slow", type=float, default=0.002,
                        help="seconds of pretended work for each picture")
    parser.add_argument("--shard-size", type=int, default=0)
    parser.add_argument("--pause", type=float, nargs=2, default=(0.4, 1.6),
                        help="seconds between kills, from and to")
    args = parser.parse_args()
    wrong, _ = drill(args.images, args.kills, args.folder, args.seed, args.pack, args.slow, args.shard_size,
                     args.pause, lambda text: print(text, flush=True))
    print("\n".join(wrong[:20]) or "nothing lost, nothing twice, nothing torn, nothing left over, every "
                                   "picture the same")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
