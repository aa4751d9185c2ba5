"""A job over thousands of pictures that may be killed at any moment, and continues anywhere.

    python -m lib.batch run FOLDER --input PICTURES     start, or continue
    python -m lib.batch status | retry | report | bench (`--help` explains each)

One picture: decode -> check -> infer -> finite? -> encode -> temp file, fsync, rename -> manifest row, fsync.
A picture that is done twice gets the same bytes, because its seed comes from its id. That, and the order of
the two writes, is all that makes the job safe (lib.jobs has the files); everything else here makes it fast or
clear.

No torch at the top: a worker starts as fast as its processor (lib.processors) allows.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lib.jobs import (FINAL, LEASE, BadInput, Claim, Job, Lost, OutputError, Part, Refused, Shard, adopt,
                      digest, gone, open_job, open_or_create, seed_of, sweep, sync_folder, write_atomic, writing)

DONE, BROKEN, USAGE, STOPPED, NO_OUTPUT, NO_START = 0, 1, 2, 3, 4, 5  # exit codes; the last two of workers
PLACES = ("root", "depth", "processor")  # facts of a job that a run may find elsewhere than its maker did
SUSPECT, GUILTY = 2, 3  # deaths in flight before an input is run alone; deaths alone before it is given up


class Poisoned(RuntimeError):
    """The device's state is lost (a CUDA error that is no lack of memory): only a new process helps."""


# ---------------------------------------------------------------- working on a shard

@dataclass
class Options:
    """How to run, which never changes what comes out: see `run --help`."""
    batch: int = 0              # pictures a step; 0: what the processor likes
    loaders: int = 2            # decoding threads of each worker
    lease: float = LEASE
    deadline: float = 0.0       # time.time() at which no new batch is started
    stop_file: str = ""
    parent: int = 0             # process to outlive by one batch at most

    def late(self) -> bool:
        """Is the deadline over?"""
        return 0 < self.deadline < time.time()


class Runner:
    """Takes one shard's inputs through decode, infer, check and commit.

    Loader threads decode ahead, one writer thread encodes and commits behind, so that the device waits for
    neither; at most `AHEAD` batches are decoded and `BEHIND` wait to be written, so memory does not grow with
    the job. (Names of pictures are strings here and never `Path`s: pathlib interns the parts of each, in a
    table that grows by megabytes.)
    """
    AHEAD, BEHIND, GROW_AFTER = 2, 2, 20

    def __init__(self, processor, options: Options, stop=lambda: False, name=""):
        self.processor, self.options, self.stop, self.name = processor, options, stop, name
        self.largest = self.batch = max(1, options.batch or processor.batch)
        self.good = 0
        self.loaders = ThreadPoolExecutor(max(1, options.loaders), "loader")
        self.writer = ThreadPoolExecutor(1, "writer")

    def close(self):
        self.loaders.shutdown(cancel_futures=True)
        self.writer.shutdown()

    def shard(self, shard: Shard, claim: Claim) -> bool:
        """Do what is left of a shard; True when it is done, False when stopped in good order."""
        self.at, self.claim, begin = shard, claim, time.perf_counter()
        self.processor.alive = claim.alive
        self.timing = Counter()
        self.rows = shard.prepare()
        self.due = shard.attempts()
        many, alone = shard.deaths()
        left = [item for item in shard.items if item["id"] not in self.rows]
        if left:
            self.place = {item["id"]: k for k, item in enumerate(shard.items)}
            self.part, calm = Part(shard), False
            try:
                self._all(left, many, alone)
                calm = True
            except (OutputError, Lost):
                calm = True
                raise
            finally:
                self.part.close(calm)
            if len(self.rows) < len(shard.items):
                return False
        self.timing.update(wall=time.perf_counter() - begin, images=len(left))
        shard.finish(claim, self.rows, {k: round(v, 4) for k, v in self.timing.items()})
        return True

    def _all(self, left, many, alone):
        """Most inputs in batches; then, one by one, those that were in flight when workers died."""
        suspects = [i for i in left if many[i["id"]] >= SUSPECT or alone[i["id"]]]
        shy = {i["id"] for i in suspects}
        self._stream([i for i in left if i["id"] not in shy])
        for item in suspects:
            if alone[item["id"]] >= GUILTY:
                text = f"the worker died {GUILTY} times while it worked on this input alone"
                self._commit([(item, {}, Outcome("error", message=text))])
            else:
                self._stream([item], alone=True)

    def _stream(self, items, alone=False):
        """Run items in batches: decoded ahead, committed behind, in order."""
        waiting, ahead, behind = deque(items), deque(), deque()
        try:
            while (waiting or ahead) and not self.stop():
                while waiting and len(ahead) < (1 if alone else self.AHEAD):
                    group = [waiting.popleft() for _ in range(min(self.batch, len(waiting)))]
                    self.part.append([{"id": i["id"], "status": "start", "attempt": self.due.get(i["id"], 1),
                                       "alone": alone} for i in group])
                    ahead.append([(item, self.loaders.submit(self._decode, item)) for item in group])
                begin = time.perf_counter()
                loaded = [(item, *future.result()) for item, future in ahead.popleft()]
                self.timing["wait_load"] += time.perf_counter() - begin
                results = self._infer(loaded)
                begin = time.perf_counter()
                behind.append(self.writer.submit(self._commit, results))
                while len(behind) >= self.BEHIND:
                    behind.popleft().result()
                self.timing["wait_commit"] += time.perf_counter() - begin
        finally:
            begin = time.perf_counter()
            while behind:
                behind.popleft().result()
            self.timing["wait_commit"] += time.perf_counter() - begin

    def _decode(self, item):
        """(decoded, Outcome or None, seconds); whatever a damaged file makes a decoder raise is bad_input."""
        begin, facts = time.perf_counter(), self.at.job.facts
        found = self.at.job.placed(item)
        path = found["path"]
        try:
            _unchanged(path, item["bytes"], "the file")
            if item.get("depth"):
                _unchanged(found["depth"], item.get("depth_bytes", -1), "its depth file")
            return self.processor.decode(found), None, time.perf_counter() - begin
        except Exception as error:
            if missing := gone(facts):                            # a drive has gone, and all that lay on it
                raise OutputError(missing) from None
            text = explain(error).replace(path, "the file")  # the same words for the same fault: countable
            return None, Outcome("bad_input", message=text), time.perf_counter() - begin

    def _infer(self, loaded):
        """[(item, decoded, outcome, seconds)] -> [(item, seconds, Outcome)]; each exactly once."""
        done = [(item, {"load": seconds}, bad) for item, _, bad, seconds in loaded if bad]
        left, singles, ooms = [entry for entry in loaded if not entry[2]], 0, 0
        while left:
            group = left[:1 if singles else self.batch]
            begin = time.perf_counter()
            kind, answer = self._try(group)  # the exception, and the memory it holds, is gone here
            seconds = time.perf_counter() - begin
            if kind == "oom":
                self.processor.free()
                ooms += 1
                self.batch = max(1, len(group) // 2)
            if kind and len(group) > 1:
                singles = 0 if kind == "oom" else len(group)      # one at a time finds the one that fails
                continue
            if kind:
                outcomes = [self._again(group[0], kind, answer)]
            else:
                outcomes = [self._checked(entry, output) for entry, output in zip(group, answer)]
            self.timing["infer"] += seconds
            done += [(e[0], {"load": e[3], "infer": seconds / len(group)}, o)
                     for e, o in zip(group, outcomes)]
            left, singles = left[len(group):], max(0, singles - 1)
            self._grow(kind)
        done[-1][2].oom = ooms                                    # the batch's last row tells of it
        return done

    def _grow(self, kind):
        self.good = 0 if kind else self.good + 1
        if self.good >= self.GROW_AFTER and self.batch < self.largest:
            self.batch, self.good = min(self.largest, self.batch * 2), 0

    def _try(self, group, precise=False):
        """(None, outputs) or (status, message). A picture alone for which memory is too small gets another
        chance where the processor knows how to do with less."""
        kind, answer = self._once(group, precise)
        while kind == "oom" and len(group) == 1 and self.processor.spare():
            self.processor.free()
            kind, answer = self._once(group, precise)
        return kind, answer

    def _once(self, group, precise):
        seeds = [seed_of(item["id"], self.at.job.facts["settings"].get("seed", 0)) for item, *_ in group]
        try:
            outputs = self.processor.infer([entry[1] for entry in group], seeds, precise)
            if len(outputs) != len(group):
                raise RuntimeError(f"the processor gave {len(outputs)} pictures for {len(group)}")
            return None, [whole_output(output) for output in outputs]
        except Exception as error:
            return _kind(error)

    def _checked(self, entry, output):
        """The finite check; a picture that fails in half precision gets one more try in full."""
        kind, wrong = self._wrong(entry, output)
        return self._again(entry, kind, wrong) if kind else Outcome("ok", *output)

    def _wrong(self, entry, output):
        """(status, message) of what is wrong with a result, or (None, "")."""
        try:
            wrong = self.processor.check(output, entry[1])
        except Exception as error:                                # a picture that is none, say
            return _kind(error)
        return ("nan", wrong) if wrong else (None, "")

    def _again(self, entry, kind, message):
        """What a failed picture ends as: numbers beyond half precision may be why, whatever it was that they
        broke."""
        if kind == "oom" or not self.processor.half:
            return Outcome(kind, message=message)
        kind, answer = self._try([entry], precise=True)
        self.processor.free()
        if kind:
            return Outcome(kind, message=answer, precise=True)
        kind, wrong = self._wrong(entry, answer[0])
        if kind:
            return Outcome(kind, message=wrong, precise=True)
        return Outcome("ok", *answer[0], precise=True)

    def _commit(self, results):
        """Pictures first, then their rows (writer thread)."""
        self.claim.check()
        rows, begin = [], time.perf_counter()
        for item, seconds, outcome in results:
            row = {"id": item["id"], "shard": self.at.number, "status": outcome.status,
                   "attempt": self.due.get(item["id"], 1), "message": outcome.message[:200]}
            if outcome.status == "ok":
                start = time.perf_counter()
                data = self._encode(outcome, row)
                seconds["encode"] = time.perf_counter() - start
                self.timing["encode"] += seconds["encode"]
                if data is not None:
                    self._write(item, row, data)
            row |= {"seconds": {k: round(v, 5) for k, v in seconds.items()},
                    "batch": self.batch, "oom": outcome.oom, "precise": outcome.precise, "worker": self.name,
                    "peak_mb": peak_mb(), "metrics": outcome.metrics or {}}
            self.timing["load"] += seconds.get("load", 0)
            rows.append(row)
        sync_folder(self.at.out)
        now = round(time.time(), 3)  # one for the whole batch, which was worked on as one
        rows = [row | {"time": now} for row in rows]
        self.part.append(rows, sync=True)
        self.rows |= {row["id"]: row for row in rows}
        self.claim.beat()
        self.timing["commit"] += time.perf_counter() - begin - sum(s.get("encode", 0) for _, s, _ in results)

    def _encode(self, outcome, row):
        try:
            data = self.processor.encode(outcome.picture)
            if not isinstance(data, bytes):
                raise TypeError(f"encode gave {type(data).__name__}, not bytes")
            return data
        except Exception as error:
            row |= {"status": "error", "message": f"could not be encoded: {explain(error)}"}

    def _write(self, item, row, data):
        name = self.at.output_name(self.place[item["id"]], self.processor.suffix)
        try:
            write_atomic(os.path.join(self.at.out, name), data)
        except OutputError:
            self.claim.check()  # a thief sweeps temp files: then this is not our disk
            raise
        row |= {"output": name, "bytes": len(data), "sha": digest(data)}


def _unchanged(path, size, name):
    """BadInput where a file is gone, or not as large as when the list was frozen (-1: unknown then)."""
    if not os.path.exists(path):
        raise BadInput(f"{name} is gone, or it is a link that leads nowhere")
    if size >= 0 and os.path.isfile(path) and os.path.getsize(path) != size:
        raise BadInput(f"{name} has changed since the list was frozen ({size} bytes then)")


@dataclass
class Outcome:
    """What became of one input."""
    status: str
    picture: object = None
    metrics: dict | None = None
    message: str = ""
    precise: bool = False
    oom: int = 0


def whole_output(output):
    """What `infer` gave for one picture, its metrics as a row keeps them: plain numbers, and None for one that is not
    finite. TypeError: it is no Output."""
    if not (isinstance(output, tuple) and hasattr(output, "metrics")):
        raise TypeError(f"infer gave {type(output).__name__}, not Output(picture, metrics)")
    if not isinstance(output.metrics, dict):
        raise TypeError(f"the metrics are {type(output.metrics).__name__}, not a dict of numbers")
    metrics = {name: value.item() if hasattr(value, "item") else value for name, value in output.metrics.items()}
    metrics = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in metrics.items()}
    json.dumps(metrics)
    return output._replace(metrics=metrics)


NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory|"
                       "cu(blas|dnn|solver)_status_alloc_failed|unable to find a valid cudnn algorithm")
LOST = re.compile("device-side assert|illegal memory access|unspecified launch failure|cuda (driver )?error|"
                  "cu(blas|dnn|solver|sparse)_status|cufft")


def classify(error) -> str:
    """"oom", "poisoned", "bad_input" or "error" for what a processor raised.

    After a CUDA error that is no lack of memory every later call fails too, so of two readings the graver is
    taken: a new process costs seconds."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(text):
        return "oom"
    if isinstance(error, RuntimeError) and LOST.search(text):
        return "poisoned"
    return "bad_input" if isinstance(error, BadInput) else "error"


def _kind(error) -> tuple[str, str]:
    """(status, message) of what a processor raised; what only a new process can mend is raised again."""
    kind = classify(error)
    if kind == "poisoned":
        raise Poisoned(explain(error)) from error
    return kind, explain(error)


def explain(error) -> str:
    """One line for a row: what was raised."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def peak_mb() -> float:
    """The most memory this process has had, in MB (0 where the system does not say).

    From /proc on Linux: what `resource` says there begins at the peak of whoever started this process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1e3, 1)
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return 0.0
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# ---------------------------------------------------------------- a worker

_STOP = []          # signals that this process has received


def stopper(options: Options):
    """A function that says whether to begin another batch."""
    def stop():
        return bool(_STOP or options.late() or (options.parent and os.getppid() != options.parent)
                    or (options.stop_file and os.path.exists(options.stop_file)))
    return stop


def work(job: Job, options: Options | None = None, device="cpu", index=0, workers=1, processor=None) -> int:
    """Take shards until none is left; returns an exit code. One of these runs in each worker process."""
    options = options or Options()
    stop, name = stopper(options), f"{socket.gethostname()}-{os.getpid()}"
    runner = Runner(processor or job.processor(device), options, stop, name)
    try:
        while not stop():
            left = job.pending()
            if not left:
                return DONE
            turn = len(left) * index // max(1, workers)           # workers begin apart, and meet at the end
            if not any(one_shard(job, n, runner) for n in left[turn:] + left[:turn] if not stop()):
                time.sleep(0.2)                                   # the rest is in other hands: they may die
        return STOPPED if job.pending() else DONE
    finally:
        runner.close()


def one_shard(job: Job, number: int, runner: Runner, steal=False) -> bool:
    """Work on this shard unless somebody else does; True when something was done."""
    shard = job.shard(number)
    if shard.done.exists():
        return False
    claim = Claim.take(job.folder / "claims" / shard.name, runner.options.lease, steal)
    if claim is None:
        return False
    try:
        if not shard.done.exists():
            runner.shard(shard, claim)
        return True
    except Lost:
        return True
    finally:
        claim.release()


def _worker_command(args) -> int:
    if args.pin >= 0 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[args.pin % len(cores)]})
    signal.signal(signal.SIGTERM, lambda *_: _STOP.append(1))
    signal.signal(signal.SIGINT, lambda *_: _STOP.append(1))
    options = Options(args.batch, args.loaders, args.lease, args.deadline, args.stop_file, args.parent)
    try:
        job = open_job(args.folder)
        job.facts |= {name: getattr(args, name) for name in PLACES if getattr(args, name)}
        if missing := gone(job.facts):
            raise Refused(missing)
        processor = job.processor(args.device)
    except Exception as error:
        no_card = args.device == "cuda" and not isinstance(error, ValueError)
        print(f"cannot start: {explain(error)}" + " (--device cpu works without a GPU)" * no_card, flush=True)
        return NO_START
    try:
        return work(job, options, args.device, args.index, args.of, processor)
    except OutputError as error:
        print(error, flush=True)
        return NO_OUTPUT
    except Poisoned as error:
        print(f"this process is of no use any more: {error}", flush=True)
        os._exit(BROKEN)  # a lost CUDA context can hang an ordinary exit


# ---------------------------------------------------------------- a run

@dataclass
class Plan:
    """What an engine needs to know beside the job: see `run --help`."""
    options: Options
    workers: int = 0            # 0: one for each GPU; without a GPU, one
    max_seconds: float = 0.0
    engine: str = "local"
    address: str = ""           # of a Ray cluster
    pin: bool = False           # worker i on core i only
    quiet: bool = False
    device: str = "auto"


def run(job: Job, plan: Plan) -> int:
    """Work on a job with an engine until it is done or stopped in good order; returns an exit code.

    May be called again at any time, with any other plan. OutputError: nothing could be written.
    """
    from lib import engines
    with writing(job.folder):
        sweep(job)
    if not job.pending():
        return DONE
    if missing := gone(job.facts):
        raise Refused(missing)
    progress = engines.Progress(job, plan.quiet)
    if plan.max_seconds:
        plan.options.deadline = time.time() + plan.max_seconds
    stopped = []
    with _signals(stopped), contextlib.closing(progress):
        engine = engines.ray if plan.engine == "ray" else engines.local
        code = engine(job, plan, progress, stopped)
    sweep(job)
    if not job.pending():
        return DONE
    return STOPPED if code == DONE or stopped or plan.options.late() else code


@contextlib.contextmanager
def _signals(stopped):
    """Ctrl-C and SIGTERM ask for a stop in good order (where this is the main thread)."""
    old = {}
    with contextlib.suppress(ValueError):
        for name in (signal.SIGINT, signal.SIGTERM):
            old[name] = signal.signal(name, lambda number, frame: stopped.append(number))
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


# ---------------------------------------------------------------- looking at a job

def status(job: Job, verify=False) -> dict:
    """Counts by status, the commonest messages, and with verify=True the outputs that are missing or
    damaged."""
    rows = job.rows()
    counts = Counter(row["status"] for row in rows)
    messages = Counter(f"{row['status']}: {row['message']}" for row in rows if row["status"] != "ok")
    bad = [row["id"] for row in rows if verify and job.shard(row["shard"]).damaged(row)]
    return {"inputs": len(job.items), "finished": len(rows), "left": len(job.items) - len(rows),
            **{name: counts[name] for name in FINAL}, "shards": len(job.shards),
            "shards_left": len(job.pending()),
            "messages": messages.most_common(5), **({"damaged": bad} if verify else {})}


def retry(job: Job, statuses) -> int:
    """Give the inputs with these statuses ("damaged": those whose outputs are) another attempt at the next `run`;
    returns how many."""
    known = (*FINAL, "damaged")
    wrong = set(statuses) - set(known)
    if wrong:
        raise Refused(f"No status '{sorted(wrong)[0]}'; known: {', '.join(known)}.")
    claims = [Claim.take(job.folder / "claims" / job.shard(number).name) for number in job.shards]
    try:
        if not all(claims):                                       # its last step would forget what is asked here
            raise Refused(f"{claims.count(None)} shards are being worked on: stop the run (Ctrl-C) or let it end, then "
                          "retry.")
        return sum(job.shard(number).reopen(statuses) for number in job.shards)
    finally:
        for claim in filter(None, claims):
            claim.release()


def describe(facts: dict) -> str:
    """`status` in words."""
    lines = [f"{facts['finished']:,} of {facts['inputs']:,} inputs have a final row; {facts['shards_left']} "
             f"of {facts['shards']} shards are left",
             "  " + "   ".join(f"{name} {facts[name]:,}" for name in FINAL)]
    lines += [f"  {count:6,} x {text}" for text, count in facts["messages"]]
    if "damaged" in facts:
        lines += [f"  {len(facts['damaged'])} outputs are missing or damaged"
                  + (": " if facts["damaged"] else "")
                  + ", ".join(facts["damaged"][:5])
                  + ("; `retry --status damaged`, then run the job again" if facts["damaged"] else "")]
    return "\n".join(lines)


# ---------------------------------------------------------------- command line

def _count(text) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def _seconds(text) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds from 0 on")
    return float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m lib.batch",
                                     description="A resumable job over thousands of pictures.",
                                     epilog="Exit codes of run: 0 all inputs have a final row; 1 it could "
                                            "not go on (the message says why); 2 refused, nothing was "
                                            "touched; 3 stopped in good order, the same command continues.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="run|status|retry|report|bench")
    for fill in (_run_options, _look_options, _bench_options, _worker_options):
        fill(commands)
    return parser


def _lease(text) -> float:
    if not 1 <= _seconds(text):
        raise argparse.ArgumentTypeError(f"{text} is too short: 1 second is the least")
    return float(text)


def _run_options(commands):
    add = commands.add_parser("run",
                              help="start a job, or continue it (only what you give is compared with it)",
                              formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add.add_argument("folder", type=Path, help="the job's folder; everything is kept here")
    add.add_argument("--input", default="", help="a folder of pictures, a text file of paths, or a video")
    add.add_argument("--process", default="",
                     help="edit, layers, tint, or your own as module:Class (default: edit)")
    add.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                     help="a setting of the processor")
    add.add_argument("--depth", default="", help="a folder with a depth file for each picture")
    add.add_argument("--step", type=_seconds, default=0, help="seconds between the frames of a video; 0: 0.1")
    add.add_argument("--limit", type=_count, default=0, help="only the first N inputs; 0: all")
    add.add_argument("--shard-size", type=_count, default=0,
                     help="inputs a shard; 0: 128, less for small jobs")
    add.add_argument("--pack", choices=("", "files", "tar"), default="",
                     help="single files, or one tar a shard")
    add.add_argument("--engine", choices=("local", "ray"), default="local", help="processes here, or Ray")
    add.add_argument("--address", default="", help="a Ray cluster's address")
    add.add_argument("--workers", type=_count, default=0, help="0: one for each GPU, else one")
    add.add_argument("--device", default="auto", help="auto, cuda, cpu or mps")
    add.add_argument("--batch", type=_count, default=0, help="pictures a step; 0: what the processor likes")
    add.add_argument("--loaders", type=_count, default=2, help="decoding threads of each worker")
    add.add_argument("--lease", type=_lease, default=LEASE,
                     help="seconds after which a silent worker counts as dead: more than a picture, or a pass of its model, "
                          "takes")
    add.add_argument("--max-seconds", type=_seconds, default=0,
                     help="stop in good order after so long; 0: never")
    add.add_argument("--done-root", action="append", default=[],
                     help="an earlier session's folder; may be repeated")
    add.add_argument("--pin", action="store_true", help="worker i on core i only, one thread")
    add.add_argument("--report", action="store_true", help="make the report at the end")
    add.add_argument("--quiet", action="store_true", help="no progress bar")


def _look_options(commands):
    add = commands.add_parser("status",
                              help="counts by status, the commonest messages; exit code 3 while work is left")
    add.add_argument("folder", type=Path)
    add.add_argument("--verify", action="store_true", help="read every output and compare its hash")
    add.add_argument("--json", action="store_true")
    add = commands.add_parser("retry", help="give inputs another attempt at the next run")
    add.add_argument("folder", type=Path)
    add.add_argument("--status", default="nan,oom,error",
                     help="which ones, by status; damaged: ok, but the output is missing or damaged (default: "
                          "%(default)s)")
    add = commands.add_parser("report", help="HTML that reads offline, CSV and PNG, of the job as it is now")
    add.add_argument("folder", type=Path)
    add.add_argument("--to", type=Path, help="another folder than FOLDER/report")


def _bench_options(commands):
    add = commands.add_parser("bench", help="scaling, cost of the commits, memory; on this machine")
    add.add_argument("--images", type=_count, default=600,
                     help="of the scaling run (default: %(default)s; 0: skip it)")
    add.add_argument("--memory", type=_count, default=0, help="also watch memory over so many cheap pictures")
    add.add_argument("--edits", type=_count, default=0, help="also run the real pipeline on so many frames")
    add.add_argument("--steps", type=_count, default=50,
                     help="denoising steps of its edits (default: %(default)s)")
    add.add_argument("--device", default="cpu", help="of its edits; cuda: one process, then two on one card")
    add.add_argument("--model", default="mini", help="of its edits; random-sd15 needs no download")
    add.add_argument("--dtype", default="auto", help="of its edits: float16 or float32, to compare them")


def _worker_options(commands):
    add = commands.add_parser("worker")  # what run starts; also a line of a Slurm array
    add.add_argument("folder", type=Path)
    for name, kind, default in (("index", int, 0), ("of", int, 1), ("batch", int, 0), ("loaders", int, 2),
                                ("pin", int, -1), ("lease", float, LEASE), ("deadline", float, 0),
                                ("parent", int, 0)):
        add.add_argument(f"--{name}", type=kind, default=default)
    for name, default in (("device", "cpu"), ("stop-file", ""), *((place, "") for place in PLACES)):
        add.add_argument(f"--{name}", default=default)


def _run_command(args) -> int:
    pairs = [text.partition("=") for text in args.set]
    if not all(mark for _, mark, _ in pairs):
        raise Refused("--set wants NAME=VALUE.")
    job = open_or_create(args.folder, args.input, args.process, {name: value for name, _, value in pairs},
                         args.shard_size, args.pack, args.depth, args.limit, args.step)
    if args.done_root:
        print(f"{adopt(job, args.done_root):,} inputs were finished in earlier sessions")
    options = Options(args.batch, args.loaders, args.lease)
    plan = Plan(options, args.workers, args.max_seconds, args.engine, args.address, args.pin, args.quiet,
                args.device)
    code = run(job, plan)
    print(describe(status(job)))
    if args.report:
        code = max(code, _report(args.folder, None))
    if code == STOPPED:
        print("stopped in good order; the same command continues")
    return code


def _report(folder, to) -> int:
    from lib import report
    print(report.make(open_job(folder), to))
    return DONE


def main(words=None) -> int:
    with contextlib.suppress(AttributeError):                     # names of files may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(words)
    try:
        if args.command == "run":
            return _run_command(args)
        if args.command == "worker":
            return _worker_command(args)
        if args.command == "bench":
            from lib import bench
            return bench.run(args.images, args.edits, args.steps, args.memory, args.device, args.model,
                             args.dtype)
        job = open_job(args.folder)
        if args.command == "report":
            return _report(args.folder, args.to)
        if args.command == "retry":
            again = retry(job, [word.strip() for word in args.status.split(",")])
            print(f"{again:,} inputs get another attempt: run the job again")
            return DONE
        facts = status(job, args.verify)
        print(json.dumps(facts, indent=1) if args.json else describe(facts))
        return BROKEN if facts.get("damaged") else STOPPED if facts["left"] else DONE
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        return USAGE
    except (RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BROKEN
    except KeyboardInterrupt:                                     # before or after the work, which stops in order
        print("stopped; the same command continues", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    from lib import batch  # the importable module, not its twin called __main__: Ray pickles by name
    sys.exit(batch.main())
