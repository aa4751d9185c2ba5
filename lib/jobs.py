"""What a batch job keeps on disk, and why a `kill -9` at any moment cannot hurt it (lib.batch does the work).

    inputs.jsonl            the frozen list: one input a line, its place in the list decides its shard
    run.json                what must not change: processor, settings, weights, hash of the list (the
    fingerprint) claims/00012            who works on shard 12 now; touched as a sign of life
    manifest/00012.*.part.jsonl   rows as they come, one file for each try, so that nobody repairs another's
    file manifest/00012.jsonl    exactly one final row for each input of the shard, in order
    manifest/00012.done.json      the done mark, written last
    out/00012/000345-name.png, or shards/00012.tar

A picture is there before its row, so a crash may cost a repeat and never a false "ok". After img2dataset (a
row for each input, the done mark last) and rename(2), fsync(2) for the commit.
"""
from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import sys
import tarfile
import time
import traceback
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

FINAL = ("ok", "bad_input", "nan", "oom", "error")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
DEPTHS = (".png", ".npy", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
STEP = 0.1                  # seconds between the frames of a video, where nobody says
LEASE = 600.0               # seconds without a sign of life before another machine takes a claim over


class Refused(ValueError):
    """The job does not fit what was asked: other settings, no such job, not a usable folder."""


class BadInput(ValueError):
    """This input cannot be processed; the message says why."""


class OutputError(RuntimeError):
    """Nothing can be written (disk full, read-only): the worker stops, and no picture is blamed for it."""


class Lost(RuntimeError):
    """Another worker has taken this shard over."""


# ---------------------------------------------------------------- files

@contextlib.contextmanager
def writing(path):
    """Turn an error of the file system into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "make room there" if full else "make the folder writable"
        raise OutputError(f"cannot write {path} ({error.strerror or error}): {what} and run the same command "
                          f"again; nothing finished is lost.") from error


def temp_name(name: str) -> str:
    """Of a file that is being written: host and process are in it, so that `sweep` knows whose it is."""
    return f".{name[-60:]}.{socket.gethostname()}.{os.getpid()}.tmp"


def write_atomic(path: Path | str, data: bytes):
    """The whole file or nothing: temp file beside it, fsync, rename. OutputError when that is impossible."""
    folder, name = os.path.split(path)
    temp = os.path.join(folder, temp_name(name))
    with writing(path):
        try:
            with open(temp, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp)
            raise


def digest(data: bytes) -> str:
    """The hash of a picture's file, as its row keeps it."""
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def sync_folder(folder):
    """Make renames in it last through a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file; a last line torn by a crash is dropped. No file: no rows."""
    try:
        return parse_rows(Path(path).read_bytes())
    except FileNotFoundError:
        return []


def parse_rows(data: bytes) -> list[dict]:
    """Rows from the text of a .jsonl file; what a crash or a power cut has damaged is dropped."""
    rows = []
    for line in data.split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def is_manifest_row(row: dict) -> bool:
    return row.keys() >= {"id", "status", "attempt"}


def _lines(rows) -> bytes:
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()


def read_json(path: Path):
    """What a JSON file holds; None for one that is not there or torn."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _alive(pid: int, started: str) -> bool:
    """Does this very process (not another that got its number) still run?"""
    return _started(pid) == started != ""


def _started(pid: int) -> str:
    """When a process began, as text; "" for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if os.path.isdir("/proc/self"):
            return ""
    import psutil
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    return ""


# ---------------------------------------------------------------- the job

def list_inputs(source, depth="", limit=0) -> tuple[list[dict], int]:
    """Freeze what is to be done: [{id, path, bytes, depth?, depth_bytes?}] in order, and how many other files
    were left out.

    source: a folder (searched with its subfolders; symbolic links to folders are not followed), or a text
    file with one path a line. Everything *named* like a picture is an input, readable or not: what is wrong
    with it will be in its row. depth: a folder with one depth file for each picture, of the same name but for
    the suffix.
    """
    source, found, others = Path(source), [], 0
    if source.is_dir():
        root = source
        for at, folders, files in os.walk(source, onerror=_unreadable):
            folders[:] = sorted(name for name in folders if not _holds_job(at, name))
            for name in files + folders:
                if Path(name).suffix.lower() in PICTURES:
                    found.append(Path(at, name))
                elif name in files and name != "frames.jsonl":
                    others += not (depth and Path(name).suffix.lower() in DEPTHS)
    elif source.is_file():
        root = source.parent
        found = [root / line for line in _listed(source)]
    else:
        _refuse_no_source(source)
    by_id = {}
    for path in sorted(set(found), key=str):
        item = _item(path, root, depth)
        by_id.setdefault(item["id"], item)                        # a.png, ./a.png and /its/place/a.png are one
    items = [by_id[name] for name in sorted(by_id)]
    if not items:
        raise Refused(f"No pictures in {source} (names ending in {', '.join(PICTURES)}).")
    return items[:limit] if limit else items, others


def _unreadable(error):
    print(f"Left out: the folder {error.filename} cannot be read ({error.strerror}).")


def _holds_job(at, name) -> bool:
    """A job's folder among the pictures: what lies in it are outputs, not inputs."""
    return all(os.path.isfile(os.path.join(at, name, file)) for file in ("run.json", "inputs.jsonl"))


def _listed(source) -> list[str]:
    """The lines of a text file of paths (UTF-8, or UTF-16 as Windows writes it). Refused: it is no text."""
    with open(source, "rb") as file:
        data = file.read(1 << 16)
        utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        if source.suffix.lower() in PICTURES or (b"\0" in data and not utf16):
            raise Refused(f"{source} is no list of paths: give a folder of pictures, a text file with one path a "
                          f"line, or a video ({', '.join(VIDEOS)}).")
        data += file.read()
    text = data.decode("utf-16", "replace") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    return [line.rstrip("\r") for line in text.split("\n") if line.strip() and "\0" not in line]


def _item(path, root, depth) -> dict:
    name = os.path.relpath(path, root).replace(os.sep, "/")
    item = {"id": name, "path": name, "bytes": -1}
    with contextlib.suppress(OSError):
        item["bytes"] = os.stat(path).st_size
    return item | _depth_of(name, path, depth) if depth else item


def _depth_of(name, path, depth) -> dict:
    """The depth file of a picture, relative to the folder `depth` ("": there is none), and its size."""
    own = os.path.abspath(path)                                   # the depth files may lie among the pictures
    for place in (os.path.splitext(name)[0] + suffix for suffix in DEPTHS):
        full = os.path.join(depth, place)
        if os.path.exists(full) and os.path.abspath(full) != own:
            return {"depth": place, "depth_bytes": os.stat(full).st_size}
    return {"depth": "", "depth_bytes": -1}


def seed_of(name: str, base: int = 0) -> int:
    """The seed of one input: from its id alone, so that no worker, order or restart changes it."""
    digest = hashlib.blake2b(f"{base}:{name}".encode("utf8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def load_processor(spec: str):
    """The class behind "edit", "layers", "tint", "module:Class" or "file.py:Class". Refused: no such
    thing, or it is no processor."""
    from lib import processors
    if spec in processors.KNOWN:
        return processors.KNOWN[spec]
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):                                 # under a name of its own: it may be called copy.py
            found = importlib.util.spec_from_file_location(f"{Path(place).stem} ({os.path.realpath(place)})", place)
            module = sys.modules.setdefault(found.name, importlib.util.module_from_spec(found))
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        kind = getattr(module, name)
    except Exception as error:                                    # whatever the code of a file raises
        known, last = ", ".join(processors.KNOWN), traceback.extract_tb(error.__traceback__)[-1]
        line = f", line {last.lineno}" if last.filename == place else ""
        raise Refused(f"No processor '{spec}' ({type(error).__name__}: {error}{line}); known: {known}, or "
                      "module:Class.") from None
    if not (isinstance(kind, type) and issubclass(kind, processors.Processor)):
        raise Refused(f"'{spec}' is no processor: it must be a subclass of lib.processors.Processor.")
    if kind.__abstractmethods__:
        raise Refused(f"'{spec}' is no whole processor: it lacks {', '.join(sorted(kind.__abstractmethods__))}.")
    return kind


@dataclass
class Job:
    """One folder: its frozen inputs, its fingerprint, and where its files lie."""
    folder: Path
    facts: dict
    items: list[dict] = field(repr=False)

    def placed(self, item) -> dict:
        """The item with whole paths, as a processor's `decode` wants it."""
        found = {**item, "path": os.path.join(self.facts["root"], item["path"])}
        if item.get("depth"):
            found["depth"] = os.path.join(self.facts.get("depth", ""), item["depth"])
        return found

    @property
    def shards(self) -> range:
        return range(-(-len(self.items) // self.facts["fingerprint"]["shard_size"]))

    def shard(self, number: int) -> Shard:
        return Shard(self, number)

    def processor(self, device="cpu"):
        return load_processor(self.facts["processor"])(self.facts["settings"], device)

    def pending(self) -> list[int]:
        """Numbers of the shards without a done mark."""
        with contextlib.suppress(FileNotFoundError):
            done = {name.split(".")[0] for name in os.listdir(self.folder / "manifest")
                    if name.endswith(".done.json")}
            return [n for n in self.shards if f"{n:05d}" not in done]
        return list(self.shards)

    def rows(self) -> list[dict]:
        """The final row of every input that has one, at this moment, in the order of the list."""
        return [row for n in self.shards for row in self.shard(n).final_rows()]


def open_job(folder) -> Job:
    """The job in a folder; Refused when there is none."""
    folder = Path(folder)
    facts = read_json(folder / "run.json")
    if not isinstance(facts, dict) or "fingerprint" not in facts:
        raise Refused(f"{folder} holds no job (no run.json): start one with `run {folder} --input ...`.")
    facts |= {name: os.path.join(os.path.realpath(folder), facts[name]) for name in ("root", "depth")
              if facts.get(name)}
    job = Job(folder, facts, read_rows(folder / "inputs.jsonl"))
    if _list_hash(job.items) != facts["fingerprint"]["inputs"]:
        raise Refused(f"{folder / 'inputs.jsonl'} is damaged: it is no more the list of {facts['count']:,} "
                      f"inputs that this job began with. Put the file back, or start again in a new folder.")
    return job


def gone(facts) -> str:
    """Where the inputs' or the depth files' folder is not here: what to do, in words; else "". Not one picture is to
    blame for that."""
    for name, option, what in (("root", "input", "inputs"), ("depth", "depth", "depth files")):
        if facts.get(name) and not os.path.isdir(facts[name]):
            return (f"The folder of the {what}, {facts[name]}, is not here (moved, or on a drive that is not mounted): "
                    f"say where it is with --{option}. Nothing finished is lost.")
    return ""


def open_or_create(folder, source="", process="", settings=None, shard_size=0, pack="", depth="", limit=0,
                   step=0.0) -> Job:
    """Continue the job in `folder`, or start one there.

    Only what is given is compared with the job; what differs is refused, with both values. `source` may have
    moved: the list of its files must still be the same. step: seconds between frames of a video; 0: 0.1.
    """
    folder, settings = Path(folder), settings or {}
    for name, number in (("shard size", shard_size), ("limit", limit), ("step", step)):
        if number < 0:
            raise Refused(f"The {name} is {number}; it must not be negative (0: the usual).")
    if folder.exists() and not folder.is_dir():
        raise Refused(f"{folder} is no folder.")
    if depth and not os.path.isdir(depth):
        raise Refused(f"There is no folder of depth files at {depth}.")
    if not (folder / "run.json").is_file():
        if not str(source):
            raise Refused(f"{folder} holds no job yet: say what to work on with --input.")
        made = _create(folder, source, process or "edit", settings, shard_size, pack, depth, limit, step)
        if made:
            return made
    return _continued(open_job(folder), source, process, settings, shard_size, pack, depth, limit, step)


def _create(folder, source, process, settings, shard_size, pack, depth, limit, step) -> Job | None:
    """A new job; None when somebody else made one here meanwhile."""
    ours = ("frames", "inputs.jsonl", "claims")
    if folder.is_dir() and any(p.name not in ours and not p.name.endswith(".tmp") for p in folder.iterdir()):
        if (folder / "run.json").is_file():
            return None
        raise Refused(f"{folder} is not empty and holds no job: give a new folder.")
    kind = load_processor(process)
    settings = kind.complete(settings)
    _refuse_no_source(source)
    found = folder.is_dir()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    claim = None
    while claim is None:  # the first shard's claim is the right to make the job: two may start at once
        claim = Claim.take(folder / "claims" / "00000")
        if (folder / "run.json").is_file():
            if claim:
                claim.release()
            return None
        time.sleep(0 if claim else 0.2)
    try:
        root, items = _frozen(folder, source, depth, limit, step, settings.get("max_side"))
        shard_size = shard_size or (128 if len(items) >= 2048 else max(8, -(-len(items) // 16)))
        fingerprint = {"processor": process.rpartition("/")[2], "inputs": _list_hash(items),
                       "shard_size": shard_size,
                       "pack": pack or "files", **kind.identity(settings),
                       **{f"settings.{k}": v for k, v in settings.items()}}
        facts = {"processor": _from_anywhere(process), "settings": settings, "fingerprint": fingerprint,
                 "root": _kept(root, folder), "depth": _kept(depth, folder) if depth else "", "limit": limit,
                 "created": time.strftime("%Y-%m-%d %H:%M:%S"), "count": len(items)}
        write_atomic(folder / "inputs.jsonl", _lines(items))
        write_atomic(folder / "run.json", json.dumps(facts, indent=1).encode())
    finally:
        claim.release()
        for emptied in [folder / "claims", *([] if found else [folder])]:    # a refusal leaves and takes nothing
            with contextlib.suppress(OSError):
                emptied.rmdir()
    return open_job(folder)


def _from_anywhere(process) -> str:
    """The name of a processor, also from another folder: that of a file with its whole path."""
    place, colon, name = process.rpartition(":")
    return os.path.abspath(place) + colon + name if place.endswith(".py") else process


def _kept(place, folder) -> str:
    """A folder as run.json keeps it: by its whole path, but inside the job's folder, which may move, from there."""
    place, home = os.path.realpath(place), os.path.realpath(folder)
    return os.path.relpath(place, home) if place.startswith(home + os.sep) else place


def _refuse_no_source(source):
    if not Path(source).exists():
        raise Refused(f"There is no input at {source}: give a folder of pictures, a list of paths, or a "
                      "video.")


def _is_video(source) -> bool:
    return Path(source).suffix.lower() in VIDEOS and not Path(source).is_dir()


def _frozen(folder, source, depth, limit, step, max_side):
    """(root, items); of a video, its frames, which are written into the job's folder first, no larger than they are
    worked on (with depth maps beside them: as they are)."""
    path = Path(source)
    if _is_video(path):
        from lib import video
        try:
            path = video.extract(path, folder / "frames", step or STEP, None if depth else max_side)
        except ValueError as error:
            raise Refused(str(error)) from error
    items, others = list_inputs(path, depth, limit)
    if others:
        print(f"Left out in {path}, because not named like pictures: {others}.")
    without = sum(not item["depth"] for item in items) if depth else 0
    if without == len(items):
        raise Refused(f"No picture has a depth file in {depth}: each wants one of its own name, ending in "
                      f"{', '.join(DEPTHS)}.")
    if without:
        print(f"Without a depth file in {depth}: {without} of {len(items)} pictures.")
    return (path if path.is_dir() else path.parent).resolve(), items


def _list_hash(items) -> str:
    text = "".join(f"{item.get('id')}\0{item.get('bytes')}\0{item.get('depth_bytes', 'depth' in item)}\n"
                   for item in items)
    return hashlib.sha256(text.encode("utf8", "surrogateescape")).hexdigest()[:16]


def _continued(job, source, process, settings, shard_size, pack, depth, limit, step):
    old, kind = dict(job.facts["fingerprint"]), load_processor(process or job.facts["processor"])
    same = (process or job.facts["processor"]).rpartition("/")[2] == old["processor"]
    chosen = kind.complete({**job.facts["settings"], **settings} if same else settings)
    new = {**{k: v for k, v in old.items() if not k.startswith("settings.")}, **kind.identity(chosen)}
    new |= {f"settings.{k}": v for k, v in chosen.items()}
    new |= {"processor": (process or job.facts["processor"]).rpartition("/")[2]}
    new |= {"shard_size": shard_size or old["shard_size"], "pack": pack or old["pack"]}
    root, was = job.facts["root"], job.facts.get("limit", 0)
    if str(source) and _is_video(source):
        _compare_video(job, Path(source), step, old, new)
    elif str(source):
        root = _compare_inputs(job, Path(source), depth or job.facts.get("depth", ""), limit or was, new)
    if depth:
        _compare_depth(job, depth, root, old, new)
    if 0 < limit < len(job.items) or (limit > len(job.items) == was):
        old["limit"], new["limit"] = len(job.items), limit
    refuse_difference(old, new, job.folder)
    job.facts |= {"root": root, "processor": _from_anywhere(process) or job.facts["processor"],
                  "depth": os.path.realpath(depth) if depth else job.facts.get("depth", "")}
    return job                                                    # the same files may lie elsewhere today


def _compare_depth(job, depth, root, old, new):
    """The depth files may have moved; for each picture it must still be the same one."""
    if not any("depth" in item for item in job.items):
        old["depth"], new["depth"] = "", str(depth)
        return
    for item in job.items:
        found = _depth_of(item["id"], os.path.join(root, item["path"]), depth)
        was = {name: item.get(name) for name in found}
        if was != found:
            old[f"depth of {item['id']}"], new[f"depth of {item['id']}"] = (
                f"{d['depth']} ({d['depth_bytes']} bytes)" if d["depth"] else "none" for d in (was, found))
            return                                                # one is enough to see what is wrong


def _compare_video(job, path, step, old, new):
    """A video, if it is still here, and the step, if it is given, are those of the frames."""
    was = (read_rows(job.folder / "frames" / "frames.jsonl") or [{}])[0]
    now = {"video": path.name, "bytes": path.stat().st_size if path.is_file() else was.get("bytes"),
           "step": step or was.get("step")}
    for name, value in now.items():
        if was.get(name) != value:
            old[f"frames.{name}"], new[f"frames.{name}"] = was.get(name), value


def _compare_inputs(job, path, depth, limit, new) -> str:
    """Where the inputs lie now. A folder that has not moved is not searched again: the list is frozen."""
    root = str((path if path.is_dir() else path.parent).resolve())
    moved = root != job.facts["root"]
    if moved or path.is_file() or not path.exists():
        items = list_inputs(path, depth, limit)[0]
        if moved or [i["id"] for i in items] != [i["id"] for i in job.items]:
            new["inputs"] = _list_hash(items)
    return root


def refuse_difference(old: dict, new: dict, where):
    """Refused, with one line for each key whose value changed."""
    wrong = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if wrong:
        lines = [f"  {k}: the job has {old.get(k)!r}, now it would be {new.get(k)!r}" for k in wrong]
        raise Refused(f"{where} was started with other settings, and half a job of each would be worth "
                      "nothing:\n"
                      + "\n".join(lines) + "\nGive a new folder, or the old settings.")


# ---------------------------------------------------------------- claims

class Claim:
    """The right to work on one shard: a file that only one process can create.

    It names host, process and the process's start, so that a dead worker's claim is taken over at once on the
    same machine, and after `lease` seconds without a sign of life (`beat`) from another. Two workers on one
    shard can still happen (a worker slept through its lease); it wastes work and harms nothing, and the first
    one notices (`check`).
    """

    def __init__(self, path: Path, lease=LEASE):
        me, pid = socket.gethostname(), os.getpid()
        self.path, self.token = path, f"{me} {pid} {_started(pid)} {uuid.uuid4().hex}"
        self.beaten, self.pause = time.monotonic(), min(5.0, lease / 4)

    @classmethod
    def take(cls, path: Path, lease=LEASE, steal=False) -> Claim | None:
        """A claim on `path`, or None when somebody who lives holds it. steal: its holder is known to be
        dead."""
        claim = cls(path, lease)
        if not claim._create() and not ((steal or _abandoned(path, lease)) and claim._remove_old()
                                        and claim._create()):
            return None
        return claim

    def _create(self) -> bool:
        with writing(self.path):
            self.path.parent.mkdir(exist_ok=True)  # whoever comes first: a worker, or a task of Ray
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except (FileExistsError, FileNotFoundError):          # or the folder went with its last claim meanwhile
                return False
            try:
                os.write(handle, self.token.encode())
            finally:
                os.close(handle)
        return True

    def _remove_old(self) -> bool:
        """Only one of several thieves can rename it."""
        tomb = self.path.with_name(temp_name(self.path.name))
        try:
            os.rename(self.path, tomb)
        except FileNotFoundError:
            return True                 # released meanwhile
        except OSError:
            return False
        tomb.unlink(missing_ok=True)
        return True

    def beat(self):
        with contextlib.suppress(OSError):
            os.utime(self.path)
        self.beaten = time.monotonic()

    def alive(self):
        """`beat`, as often as one likes: few of them reach the disk, and none keeps a thief's claim alive."""
        if time.monotonic() - self.beaten > self.pause and self.mine():
            self.beat()

    def mine(self) -> bool:
        try:
            return self.path.read_text() == self.token
        except OSError:
            return False

    def check(self):
        if not self.mine():
            raise Lost(f"another worker has taken shard {self.path.name} over")

    def release(self):
        if self.mine():
            with contextlib.suppress(OSError):
                self.path.unlink()


def _abandoned(path: Path, lease: float) -> bool:
    try:
        words, age = path.read_text().split(), time.time() - path.stat().st_mtime
    except OSError:
        return False
    if len(words) != 4:                 # killed between creating the file and writing into it
        return age > 5
    host, pid, started, _ = words
    return age > lease or (host == socket.gethostname() and not _alive(int(pid), started))


# ---------------------------------------------------------------- one shard's files

class Shard:
    """Some inputs in a row, and their files: parts, final manifest, done mark, pictures."""

    def __init__(self, job: Job, number: int):
        size = job.facts["fingerprint"]["shard_size"]
        self.job, self.number, self.name = job, number, f"{number:05d}"
        self.first = number * size
        self.items = job.items[self.first:self.first + size]
        self.manifest = job.folder / "manifest"
        self.final, self.done = self.manifest / f"{self.name}.jsonl", self.manifest / f"{self.name}.done.json"
        self.out, self.tar = job.folder / "out" / self.name, job.folder / "shards" / f"{self.name}.tar"
        self.packed = job.facts["fingerprint"]["pack"] == "tar"

    def parts(self) -> list[Path]:
        return sorted(self.manifest.glob(f"{self.name}.*.part.jsonl"))

    def output_name(self, position: int, suffix: str) -> str:
        """A safe, unique file name: place in the whole list + what is plain in the input's name."""
        stem = os.path.splitext(os.path.basename(self.items[position]["id"]))[0]
        plain = re.sub(r"[^A-Za-z0-9_.]+", "_", stem)[:40].strip("._") or "input"
        return f"{self.first + position:06d}-{plain}{suffix}"

    def all_rows(self) -> list[dict]:
        done = self.done.exists()
        files = [self.final] if done else [self.final, *self.parts()]
        rows = [row for path in files for row in read_rows(path) if is_manifest_row(row)]
        if not done and self.done.exists():                       # finished, and its parts swept, while we read
            rows = [row for row in read_rows(self.final) if is_manifest_row(row)]
        return rows

    def final_rows(self) -> list[dict]:
        """At most one row for each input, in order: its latest attempt's."""
        best = {}
        for row in self.all_rows():
            key = lambda r: (r["attempt"], r["status"] in FINAL)
            if row["status"] in (*FINAL, "retry") and (row["id"] not in best
                                                       or key(row) > key(best[row["id"]])):
                best[row["id"]] = row
        return [best[i["id"]] for i in self.items if best.get(i["id"], {}).get("status") in FINAL]

    def attempts(self) -> dict:
        """id -> number of the attempt that is due now (1, and one more for each `retry`)."""
        found = {}
        for row in self.all_rows():
            found[row["id"]] = max(found.get(row["id"], 1), row["attempt"])
        return found

    def deaths(self) -> tuple[Counter, Counter]:
        """How often a worker died while an input was in flight: with others, alone. (A part closed in good
        order has "closed" in its name; what another one has started and not finished, its worker took into
        its death.)"""
        many, alone, due = Counter(), Counter(), self.attempts()
        for path in self.parts():
            for row in [] if ".closed." in path.name else filter(is_manifest_row, read_rows(path)):
                if row["status"] == "start" and row["attempt"] == due[row["id"]]:
                    (alone if row["alone"] else many)[row["id"]] += 1
        return many, alone

    def whole(self, row) -> bool:
        """Is the picture of an "ok" row where the row says?"""
        if row["status"] != "ok" or "root" in row:
            return True
        try:
            return (self.out / row["output"]).stat().st_size == row["bytes"]
        except OSError:
            return False

    def prepare(self) -> dict:
        """id -> final row of what is done already. Clears what a crash left behind."""
        with writing(self.job.folder):
            for folder in (self.manifest, self.out, self.tar.parent if self.packed else self.out):
                folder.mkdir(parents=True, exist_ok=True)
            for temp in self.out.glob(".*.tmp"):
                temp.unlink(missing_ok=True)
        return {row["id"]: row for row in self.final_rows() if self.whole(row)}

    def finish(self, claim: Claim, rows: dict, timing: dict):
        """Check the count, write the final manifest, then the done mark, then clear away what is not
        needed."""
        claim.check()
        ordered = [rows[item["id"]] for item in self.items]  # KeyError: one without a row, which must not be
        kept = {row["output"] for row in ordered if row["status"] == "ok" and "root" not in row}
        for name in set(os.listdir(self.out)) - kept:
            os.unlink(os.path.join(self.out, name))
        if self.packed:
            self._pack(sorted(kept))
        write_atomic(self.final, _lines(ordered))
        counts = Counter(row["status"] for row in ordered)
        write_atomic(self.done, json.dumps({"count": len(ordered), **counts, "timing": timing}).encode())
        sync_folder(self.manifest)
        self.clear()

    def _pack(self, names):
        """One tar of the shard's pictures, the same bytes whoever makes it."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name in names:
                entry, path = tarfile.TarInfo(name), os.path.join(self.out, name)
                entry.size = os.path.getsize(path)
                with open(path, "rb") as file:
                    tar.addfile(entry, file)
        write_atomic(self.tar, buffer.getvalue())
        sync_folder(self.tar.parent)

    def clear(self):
        """What a finished shard needs no more (also after a crash between done mark and here)."""
        for path in self.parts():
            path.unlink(missing_ok=True)
        if self.packed:
            shutil.rmtree(self.out, ignore_errors=True)

    def read_output(self, row) -> bytes | None:
        """The picture of a row, from its file, its tar, or the earlier job it came from."""
        base = Path(row["root"]) if "root" in row else self.job.folder
        with contextlib.suppress(OSError):
            return (base / "out" / self.name / row["output"]).read_bytes()
        packed = base / "shards" / f"{self.name}.tar"
        with contextlib.suppress(OSError, KeyError, tarfile.TarError), tarfile.open(packed) as tar:
            return tar.extractfile(row["output"]).read()
        return None

    def damaged(self, row) -> bool:
        """Is the picture of an "ok" row missing, or not what was written?"""
        if row["status"] != "ok":
            return False
        data = self.read_output(row)
        return data is None or digest(data) != row["sha"]

    def names_in(self, base: Path) -> set:
        """Names of this shard's pictures in a job's folder, single or packed."""
        names = set()
        with contextlib.suppress(OSError):
            names |= set(os.listdir(base / "out" / self.name))
        packed = base / "shards" / f"{self.name}.tar"
        with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(packed) as tar:
            names |= set(tar.getnames())
        return names

    def reopen(self, statuses) -> int:
        """Give inputs with these statuses ("damaged": `damaged`) another attempt; returns how many. Safe to kill:
        done mark goes last."""
        rows = self.final_rows()
        again = [row for row in rows if row["status"] in statuses or ("damaged" in statuses and self.damaged(row))]
        if not again:
            return 0
        if self.packed and self.done.exists():
            with writing(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            for row in rows:
                data = self.read_output(row) if row["status"] == "ok" and "root" not in row else None
                if data is not None:                              # else it is damaged, and will be made again
                    write_atomic(self.out / row["output"], data)
        marks = [{"id": row["id"], "status": "retry", "attempt": row["attempt"] + 1} for row in again]
        write_atomic(self.manifest / f"{self.name}.{uuid.uuid4().hex[:12]}.part.jsonl", _lines(marks))
        with writing(self.done):
            self.done.unlink(missing_ok=True)
        return len(again)


class Part:
    """The rows of one try at one shard, appended; each append is one write, so only the last line can be
    torn."""

    def __init__(self, shard: Shard):
        self.path = shard.manifest / f"{shard.name}.{uuid.uuid4().hex[:12]}.part.jsonl"
        with writing(self.path):
            self.handle = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def append(self, rows, sync=False):
        data = _lines(rows)
        with writing(self.path):
            if os.write(self.handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if sync:
                os.fsync(self.handle)

    def close(self, calm: bool):
        """calm: nobody died; the inputs in flight are not to blame for anything."""
        os.close(self.handle)
        if calm:
            with contextlib.suppress(OSError):
                os.rename(self.path, self.path.with_name(self.path.name.replace(".part.", ".closed.part.")))


# ---------------------------------------------------------------- earlier sessions

def adopt(job: Job, roots) -> int:
    """Take over what earlier sessions (read-only copies of their folders) finished; returns how many inputs.

    Their whole shards are pointed to, not copied; of half-done ones the pictures are copied, so that every
    shard lies in one place. Refused when a session had other settings or inputs.
    """
    earlier = [open_job(root) for root in roots]
    for other in earlier:
        refuse_difference(job.facts["fingerprint"], other.facts["fingerprint"], other.folder)
    taken = 0
    for number in job.pending():
        shard = job.shard(number)
        claim = Claim.take(job.folder / "claims" / shard.name)
        if claim is None:                                         # somebody works on it already
            continue
        try:
            taken += 0 if shard.done.exists() else _adopt_shard(shard, earlier, roots)
        finally:
            claim.release()
    return taken


def _adopt_shard(shard, earlier, roots) -> int:
    taken, have = 0, {row["id"]: row for row in shard.final_rows() if shard.whole(row)}
    for other in earlier:
        theirs = other.shard(shard.number)
        rows = [row for row in theirs.final_rows() if row["id"] not in have]
        homes = _homes(theirs, rows, roots) if theirs.done.exists() else {}
        if len(homes) == len(shard.items):
            return taken + _point_to(shard, rows, homes)
        copied = _copy_rows(shard, theirs, rows)
        taken += len(copied)
        have |= {row["id"]: row for row in copied}
    return taken


def _homes(theirs, rows, roots) -> dict:
    """id -> the session that holds its picture: this one, or (in a third session) one that this one pointed
    to.

    Refused where that one is not here; without an entry where the picture itself is lost."""
    home, names, homes = theirs.job.folder.resolve(), {}, {}
    for row in rows:
        own = "root" not in row
        places = [home] if own else [Path(row["root"]), home, *(Path(root).resolve() for root in roots)]
        for place in places:
            names[place] = names[place] if place in names else theirs.names_in(place)
        held = [place for place in places if row["status"] != "ok" or row["output"] in names[place]]
        if not held and not own:
            raise Refused(f"{row['output']} of {home} lies in {row['root']}, which is not here: give that "
                          f"session too with --done-root.")
        homes |= {row["id"]: held[0]} if held else {}
    return homes


def _point_to(shard, rows, homes) -> int:
    with writing(shard.manifest):
        shard.manifest.mkdir(parents=True, exist_ok=True)
    write_atomic(shard.final, _lines({**row, "root": str(homes[row["id"]])} for row in rows))
    counts = Counter(row["status"] for row in rows)
    write_atomic(shard.done, json.dumps({"count": len(rows), **counts, "timing": {}}).encode())
    shard.clear()
    return len(rows)


def _copy_rows(shard, theirs, rows) -> list[dict]:
    """Copy what is whole of a shard's rows and their pictures; returns the rows that came over."""
    copied = []
    shard.prepare()
    for row in rows:
        data = theirs.read_output(row) if row["status"] == "ok" else b""
        if row["status"] == "ok":
            if data is None or digest(data) != row["sha"]:
                continue
            write_atomic(shard.out / row["output"], data)
        copied.append({key: value for key, value in row.items() if key != "root"})
    if copied:
        part = Part(shard)
        part.append(copied, sync=True)
        part.close(calm=True)
    return copied


def sweep(job: Job):
    """Remove temp files whose process is gone, and what finished shards left behind."""
    for path in [*job.folder.glob(".*.tmp"), *job.folder.glob("*/.*.tmp"), *job.folder.glob("*/*/.*.tmp")]:
        if _left_behind(path):
            path.unlink(missing_ok=True)
    waiting = {f"{number:05d}" for number in job.pending()}
    for path in job.folder.glob("claims/[0-9]*"):
        if path.name not in waiting:  # killed between the done mark and its release
            path.unlink(missing_ok=True)
    left_over = [*job.folder.glob("manifest/*.part.jsonl")]
    left_over += job.folder.glob("out/*") if job.facts["fingerprint"]["pack"] == "tar" else []
    for path in left_over:
        name = path.name.split(".")[0]
        if name not in waiting and name.isdigit():
            job.shard(int(name)).clear()


def _left_behind(temp: Path) -> bool:
    """Has the writer of this temp file died? Of another machine's nobody here knows: then it is a matter of
    age."""
    pid = temp.name.split(".")[-2]
    if temp.name.endswith(f".{socket.gethostname()}.{pid}.tmp"):
        return not (pid.isdigit() and _started(int(pid)))
    with contextlib.suppress(OSError):
        return time.time() - temp.stat().st_mtime > LEASE
    return False
