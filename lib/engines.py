"""Who calls lib.batch.one_shard, and where: processes of this machine (`local`), or tasks of Ray (`ray`).

Both only hand out work. What makes a lost worker harmless is on disk (lib.jobs), so both are short.
"""
from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from lib import batch
from lib.batch import BROKEN, DONE, NO_OUTPUT, NO_START, STOPPED, USAGE
from lib.jobs import (FINAL, Job, OutputError, Refused, gone, is_manifest_row, open_job, parse_rows, temp_name,
                      write_atomic, writing)

NO_USE = (NO_START, USAGE)  # exit codes of a worker that would end the same way again
BAD = (BROKEN, *NO_USE)


class Card(NamedTuple):
    """One GPU: its name for CUDA_VISIBLE_DEVICES, what it is called, and its memory."""
    index: str
    name: str
    memory_mb: float


def cards() -> list[Card]:
    """The GPUs that this process may use, from nvidia-smi: no torch, no memory on the cards."""
    found, lines = [], []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
        listed = subprocess.run(query, capture_output=True, text=True)
        lines = [x for x in listed.stdout.splitlines() if x.count(",") >= 3]  # or "No devices were found"
    for line in lines:
        index, uuid, *name, memory = [word.strip() for word in line.split(",")]
        found.append((index, uuid, ", ".join(name),
                      float(memory) if memory.replace(".", "").isdigit() else 0.0))
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is None:
        return [Card(index, name, memory) for index, _, name, memory in found]
    by_name = {key: (name, memory) for index, uuid, name, memory in found for key in (index, uuid)}
    chosen = [key.strip() for key in allowed.split(",") if key.strip() not in ("", "-1")]
    return [Card(key, *by_name.get(key, ("GPU", 0.0))) for key in chosen]


def gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one a GPU, without importing torch."""
    return [card.index for card in cards()]


class Worker:
    """One worker process that is started again when it dies."""
    TRIES = 8                   # deaths in a row without one new row of its own

    def __init__(self, job, plan, index, count, cards):
        self.job, self.plan, self.index, self.count = job, plan, index, count
        self.card = cards[index % len(cards)] if cards else None
        self.deaths, self.wake, self.code, self.process, self.watched = 0, 0.0, None, None, 0.0
        self.log = job.folder / "log" / f"worker-{socket.gethostname()}-{index}.log"

    def environment(self) -> dict:
        from lib import setup
        here, threads = str(Path(__file__).resolve().parent.parent), max(1, setup.cpus() // self.count)
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "OMP_NUM_THREADS": "1" if self.plan.pin else str(threads), "PYTHONPATH": path,
               "TOKENIZERS_PARALLELISM": "false"}
        return env | on_card(self.card)

    def start(self):
        best = "cpu" if self.card is None else "cuda"
        device = best if self.plan.device == "auto" else self.plan.device
        command = [sys.executable, "-m", "lib.batch", "worker", os.path.abspath(self.job.folder), "--index",
                   str(self.index),
                   "--of", str(self.count), "--device", device, "--parent", str(os.getpid()),
                   "--pin", str(self.index if self.plan.pin else -1)]
        command += [f"--{name}={value}" for name, value in places_of(self.job).items()]
        for name, value in asdict(self.plan.options).items():
            command += [] if name == "parent" else [f"--{name.replace('_', '-')}", str(value)]
        with writing(self.log):
            self.log.parent.mkdir(exist_ok=True)
            self.log.touch()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=self.environment(), stdin=subprocess.DEVNULL,
                                            stdout=log,
                                            stderr=log, start_new_session=True)

    def poll(self, progress) -> bool:
        """True while it runs, or will run again. progress.made: rows by process, to tell a mishap from a
        habit."""
        if self.process is None:
            if time.monotonic() >= self.wake:
                self.start()
            return True
        code, pid = self.process.poll(), self.process.pid
        if code is None:
            return True
        self.process = None
        if code in (DONE, STOPPED, NO_OUTPUT, *NO_USE):
            self.code = code
            return False
        self.deaths = 1 if progress.made[f"{socket.gethostname()}-{pid}"] else self.deaths + 1
        if self.deaths >= self.TRIES:
            self.code = BROKEN
            return False
        self.wake = time.monotonic() + min(30, 0.1 * 2 ** self.deaths)
        return True

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace").strip()[-800:]
        return ""

    def signal(self, number):
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)


def places_of(job) -> dict:
    """Where this run has found what the job needs (its maker may have found it elsewhere)."""
    return {name: job.facts.get(name, "") for name in batch.PLACES}


def on_card(card) -> dict:
    """Environment in which a process sees this card alone. nvidia-smi counts cards by their place on the bus,
    CUDA by their speed unless it is told otherwise."""
    if card is None:
        return {}
    order = {} if "CUDA_VISIBLE_DEVICES" in os.environ else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return order | {"CUDA_VISIBLE_DEVICES": card}


def local(job, plan, progress, stopped) -> int:
    """One process a device. A worker that dies is started again; the others do not notice."""
    cards = gpus() if plan.device in ("auto", "cuda") else []
    count = plan.workers or max(1, len(cards))
    crew = [Worker(job, plan, index, count, cards) for index in range(count)]
    running, told, end = list(crew), 0, time.monotonic() + (plan.max_seconds or 1e12)
    try:
        while running:
            if time.monotonic() > end and not stopped:  # the workers look at the clock, which may be set back
                stopped.append(signal.SIGTERM)
            if len(stopped) > told:
                told = len(stopped)
                for worker in running:
                    worker.signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
            progress.poll()
            running = _still_running(job, plan, crew, running, progress, stopped)
            if any(w.code == NO_OUTPUT for w in crew):            # no worker will do better
                for worker in running:
                    worker.signal(signal.SIGTERM)
                _wait_for(running)
                raise OutputError(next(w for w in crew if w.code == NO_OUTPUT).last_words())
            time.sleep(0.25)
    finally:
        for worker in running:                                    # an exception here: leave no orphans
            worker.signal(signal.SIGTERM)
    return _outcome(crew)


def _still_running(job, plan, crew, running, progress, stopped) -> list:
    """The workers that are not over; a word about those that end badly where others do not."""
    left = [w for w in running if not (stopped and w.process is None) and w.poll(progress)]
    for worker in running:
        if worker not in left and worker.code in BAD and not all(w.code in BAD for w in crew):
            print(f"worker {worker.index} is of no use ({worker.log}); the others go on. Its last words:\n"
                  f"{worker.last_words()}", file=sys.stderr)
    for worker in left:
        _watch(job, worker, plan.options.lease)
    return left


def _outcome(crew) -> int:
    """The exit code of a run whose workers are all over. Refused: none of them could even start."""
    if all(w.code in NO_USE for w in crew):
        raise Refused(crew[0].last_words())
    if all(w.code in BAD for w in crew):
        broken = next(w for w in crew if w.code == BROKEN)
        print(f"every worker died {Worker.TRIES} times in a row; the last words of one ({broken.log}):\n"
              f"{broken.last_words()}", file=sys.stderr)
    return BROKEN if any(w.code in BAD for w in crew) else DONE


def _wait_for(workers, seconds=30):
    end = time.monotonic() + seconds
    while any(w.process and w.process.poll() is None for w in workers) and time.monotonic() < end:
        time.sleep(0.1)


def _watch(job, worker, lease):
    """Kill a worker that holds a claim without a sign of life: it hangs."""
    if not worker.process or time.monotonic() - worker.watched < 5:
        return
    worker.watched = time.monotonic()
    for path in (job.folder / "claims").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            mine = path.read_text().split()[1] == str(worker.process.pid)
            if mine and time.time() - path.stat().st_mtime > lease:
                print(f"worker {worker.index} has given no sign of life for {lease:.0f} s and is started "
                      f"again. Where one picture, or one pass of its model, may take so long, say --lease.", file=sys.stderr)
                worker.signal(signal.SIGKILL)


def ray(job, plan, progress, stopped) -> int:
    """One Ray task a shard, on one machine or on the cluster at plan.address (FOLDER must be shared storage
    there).

    Ray's own retries are off: a task whose node died is handed out again here, with the right to take the
    dead worker's claim at once. A shard that runs twice is harmless. On GPUs Ray ends a process after each
    task, so that the card's memory is free again: the model is loaded once a shard there.
    """
    try:
        import ray as cluster
    except ImportError:
        raise Refused("The engine 'ray' wants the package ray: pip install ray, or take the engine 'local'.") from None
    task, width, device = _ray_task(cluster, plan)
    options = asdict(plan.options) | {"parent": 0, "stop_file": str(job.folder.resolve() / temp_name("stop"))}
    places = places_of(job)
    waiting, running, tries = deque(job.pending()), {}, Counter()
    end = time.monotonic() + (plan.max_seconds or 1e12)
    try:
        while (waiting or running) and not (stopped and not running):
            if time.monotonic() > end and not stopped:
                stopped.append(signal.SIGTERM)
            while waiting and len(running) < width and not stopped:
                number = waiting.popleft()
                running[task.remote(str(job.folder.resolve()), places, number, options, device,
                                    tries[number] > 0)] = number
            if stopped:
                Path(options["stop_file"]).touch()
            ready, _ = cluster.wait(list(running), num_returns=1, timeout=0.5)
            progress.poll()
            for ref in ready:
                number = running.pop(ref)
                if not _ray_result(cluster, ref, tries, number) and not plan.options.late():
                    waiting.append(number)
    finally:
        Path(options["stop_file"]).unlink(missing_ok=True)
    return DONE


def _ray_task(cluster, plan):
    """(the remote function, how many of them at once, their device), connected to the plan's cluster."""
    if not cluster.is_initialized():
        alone = {"include_dashboard": False, "num_cpus": plan.workers or None} if not plan.address else {}
        cluster.init(address=plan.address or None, log_to_driver=False, **alone)
    have = cluster.cluster_resources()
    cards = int(have.get("GPU", 0)) if plan.device in ("auto", "cuda") else 0
    if plan.device == "cuda" and not cards:
        raise Refused("This Ray cluster has no GPU; --device cpu works without.")
    width = plan.workers or cards or max(1, int(have.get("CPU", 1)))
    where = {"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}}
    task = cluster.remote(num_cpus=1, num_gpus=share_of_card(width, cards), max_retries=0, runtime_env=where)
    return task(ray_shard), width, "cuda" if cards else "cpu"


def share_of_card(workers, cards) -> float:
    """What Ray gives each worker: so much that all of them fit (3 workers on 2 cards: halves, for 2/3 fits
    once)."""
    return 1 / max(1, -(-workers // cards)) if cards else 0


@contextlib.contextmanager
def loopback_cluster(nodes=2, tries=3):
    """A Ray cluster inside this machine, to learn and to test with: a head that does no work, nodes of one
    CPU each.

    Yields (cluster, nodes) with this process connected to it; `cluster.remove_node(nodes[0],
    allow_graceful=False)` is a machine that dies. Ray gives a node 30 s to come up, which a busy machine may
    miss: then all of it is tried again. A dead node is missed after five checks, here a second apart (Ray's
    own: three); a slow one has a minute to answer.
    """
    import ray as cluster
    from ray.cluster_utils import Cluster
    small = {"object_store_memory": 80_000_000, "node_ip_address": "127.0.0.2"}    # Ray replaces 127.0.0.1
    bare = {"num_cpus": 0, "include_dashboard": False, "no_monitor": True, "include_log_monitor": False}
    others = _below()
    with _patient_ray():
        try:
            for left in reversed(range(tries)):
                made = Cluster()
                try:
                    made.add_node(**bare, **small)
                    workers = [made.add_node(num_cpus=1, **small) for _ in range(nodes)]
                    made.wait_for_nodes(timeout=60)
                    cluster.init(address=made.address, log_to_driver=False, logging_level="ERROR")
                    break
                except Exception:
                    if not left:
                        raise
                    _shut(cluster, made, others)
            yield made, workers
        finally:
            _shut(cluster, made, others)


@contextlib.contextmanager
def _patient_ray():
    """Ray's own settings for a busy machine, and no pages of print about a node that dies."""
    patience = {"RAY_gcs_server_request_timeout_seconds": "120", "RAY_health_check_timeout_ms": "60000",
                "RAY_health_check_period_ms": "1000", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    held, driver = {name: os.environ.get(name) for name in patience}, sys.modules["ray._private.worker"]
    loud, driver.print_to_stdstream = driver.print_to_stdstream, lambda *_, **__: None
    os.environ.update(patience)
    try:
        yield
    finally:
        driver.print_to_stdstream = loud
        for name, value in held.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _below():
    import psutil
    return set(psutil.Process().children(recursive=True))


def _shut(cluster, made, others):
    """End a cluster, also one that came up by half: Ray forgets the processes of a node that did not answer
    in time."""
    cluster.shutdown()
    with contextlib.suppress(Exception):
        made.shutdown()
    for process in _below() - others:
        with contextlib.suppress(Exception):
            process.kill()


def _ray_result(cluster, ref, tries, number) -> bool:
    """Is the shard done? A lost worker or node counts as "not yet"; what no other node can mend is raised."""
    try:
        return cluster.get(ref)
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, (OutputError, Refused)):
            raise cause from error
        if not any(node["Alive"] for node in cluster.nodes()):
            raise RuntimeError("Ray has lost its last node. Nothing that was done is lost: run the same "
                               "command again.") from error
        tries[number] += 1
        if tries[number] >= Worker.TRIES:
            what = batch.explain(cause)
            raise RuntimeError(f"shard {number} failed {Worker.TRIES} times: {what}") from error
        time.sleep(min(2, 0.1 * 2 ** tries[number]))  # a node that has just died is still asked for a while
        return False


_RUNNERS = {}  # in a Ray worker process: the model stays loaded from task to task (on the CPU: see `ray`)


def ray_shard(folder, places, number, options, device, steal) -> bool:
    """One shard, in a Ray worker process; True when it is done."""
    job, options = open_job(folder), batch.Options(**options)
    job.facts |= places
    if missing := gone(job.facts):
        raise Refused(missing)
    key = (folder, json.dumps([asdict(options), job.facts["fingerprint"], places], sort_keys=True), device)
    if key not in _RUNNERS:
        for old in [_RUNNERS.pop(k) for k in list(_RUNNERS)]:
            old.close()
        name = f"{socket.gethostname()}-{os.getpid()}"
        _RUNNERS[key] = batch.Runner(job.processor(device), options, batch.stopper(options), name)
    try:
        batch.one_shard(job, number, _RUNNERS[key], steal)
    except batch.Poisoned:
        os._exit(1)                                               # Ray starts a fresh process
    done = job.shard(number).done.exists()
    if not done and not _RUNNERS[key].stop():
        time.sleep(0.2)                                           # somebody else holds it
    return done


# ---------------------------------------------------------------- progress: one bar, from the manifests

class Progress:
    """Counts final rows by reading only what is new in the manifests; draws one bar; writes status.json."""

    def __init__(self, job: Job, quiet=False):
        self.job, self.done, self.open, self.read = job, {}, defaultdict(dict), {}
        self.made, self.written, self.samples = Counter(), -9.0, deque(maxlen=120)
        self.total, self.seen = len(job.items), -9.0
        self.poll(first=True)
        self.bar = None
        if not quiet:
            from tqdm.auto import tqdm
            shown = sys.stderr.isatty() or "ipykernel" in sys.modules
            self.bar = tqdm(total=self.total, initial=self.rows(), unit="image", mininterval=1,
                            disable=not shown)

    def rows(self) -> int:
        return sum(self.done.values()) + sum(final for best in self.open.values()
                                             for _, final in best.values())

    def poll(self, first=False) -> int:
        """Look at most once a second; returns the number of inputs with a final row."""
        if time.monotonic() - self.seen < 1 and not first:
            return self.rows()
        self.seen = time.monotonic()                              # the clock may be set while it runs
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.job.folder / "manifest"):
                with contextlib.suppress(OSError, ValueError, KeyError):  # half-written, or swept meanwhile
                    self._look(entry, first)
        self.samples.append((self.seen, self.rows()))
        if not first:
            self._show()
        return self.rows()

    def _look(self, entry, first):
        shard = entry.name.split(".")[0]
        if entry.name.endswith(".done.json"):
            if shard not in self.done:
                self.done[shard] = json.loads(Path(entry.path).read_bytes())["count"]
                if not first and shard not in self.open:          # begun and done since the last look
                    self.made.update(row.get("worker") for row in self.job.shard(int(shard)).final_rows())
                self.open.pop(shard, None)
        elif entry.name.endswith(".jsonl") and shard not in self.done:
            key = entry.name.replace(".closed.", ".")
            if entry.stat().st_size > self.read.get(key, 0):
                with open(entry.path, "rb") as file:
                    file.seek(self.read.get(key, 0))
                    new = file.read()
                whole = new[:new.rfind(b"\n") + 1]
                self.read[key] = self.read.get(key, 0) + len(whole)
                best = self.open[shard]
                for row in filter(is_manifest_row, parse_rows(whole)):
                    if row["status"] != "start":
                        now = (row["attempt"], row["status"] in FINAL)
                        best[row["id"]] = max(best.get(row["id"], now), now)
                        if row.get("seconds") and not first:      # not what it gave up unseen
                            self.made[row.get("worker")] += 1

    def rate(self) -> float:
        """Images a second over the last two minutes."""
        (t0, n0), (t1, n1) = self.samples[0], self.samples[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def _show(self):
        rows, rate = self.rows(), self.rate()
        if self.bar is not None:
            self.bar.update(rows - self.bar.n)
        if self.seen - self.written > 5:
            self.written = self.seen
            left = (self.total - rows) / rate if rate else None
            state = {"done": rows, "total": self.total, "images_per_second": round(rate, 3),
                     "seconds_left": left,
                     "time": time.time()}
            with contextlib.suppress(OutputError):                # the workers will say so
                write_atomic(self.job.folder / "status.json", json.dumps(state).encode())

    def close(self):
        self.seen = self.written = -9.0
        self.poll()
        if self.bar is not None:
            self.bar.close()
