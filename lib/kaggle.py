"""What is special about a Kaggle session: which GPUs must be there, where things lie, when it ends.

Elsewhere these functions do what one would expect: a path is a path, any device will do, time is not short.
"""
from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lib import engines, setup
from lib.jobs import FINAL, VIDEOS, Refused

SESSION = 12 * 3600.0           # seconds after which Kaggle ends a session with a CPU or with GPUs
MARGIN = 42 * 60.0              # what the last batch, the report and saving may take
OUTPUT = 20e9                   # bytes that /kaggle/working may keep
SWITCH_ON = ("On Kaggle: in the notebook's settings, Accelerator, choose 'GPU T4 x2' (with "
             '`kaggle kernels push`: "machine_shape": "NvidiaTeslaT4"). GPUS = 0 goes on with what is here.')


def here() -> bool:
    return setup.where() == "kaggle"


def inputs() -> Path:
    """Where Kaggle mounts what is attached, read-only (LAYERS_KAGGLE_INPUT overrides it, for tests)."""
    return Path(os.environ.get("LAYERS_KAGGLE_INPUT", "/kaggle/input"))


# ---------------------------------------------------------------- parameters

CHOICES = {"ENGINE": ("local", "ray"), "PACK": ("", "files", "tar"), "DEVICE": ("auto", "cuda", "cpu", "mps"),
           "DEPTH_NEAR": ("", "low", "high")}
LEAST = {"STEPS": 1, "MAX_SIDE": 32, "LIMIT": 0, "SHARD": 0, "WORKERS": 0, "LOADERS": 1, "BATCH": 0,
         "GPUS": -1}


def check_parameters(given: dict):
    """ValueError, a line for each, when parameters of lesson 15 cannot be used.

    given: values by name; other names are passed over. A job keeps its settings, so a slip of the pen that
    began one would have to be thrown away; and a worker's own words about it would stand in a log.
    """
    wrong = [f"{name} is one of {', '.join(map(repr, known))}; it is {given[name]!r}."
             for name, known in CHOICES.items() if name in given and given[name] not in known]
    wrong += [f"{name} is a whole number of {least} or more; it is {given[name]!r}."
              for name, least in LEAST.items()
              if name in given and (type(given[name]) is not int or given[name] < least)]
    for name, above in (("STEP", True), ("MAX_SECONDS", False)):
        value = given.get(name, 1)
        if type(value) not in (int, float) or not (value > 0 if above else value >= 0):
            words = "more than 0" if above else "0 or more"
            wrong.append(f"{name} is a number of seconds, {words}; it is {value!r}.")
    wrong += [f"RETRY names statuses ({', '.join(FINAL)}), with commas between; {word!r} is none."
              for word in filter(None, str(given.get("RETRY", "")).split(",")) if word not in FINAL]
    if given.get("PROCESS", "edit") in ("edit", "layers"):
        wrong += _wrong_words(given)
    if wrong:
        raise ValueError("\n".join(wrong))


def _wrong_words(given) -> list[str]:
    """What the course says of the words that name a depth, a place, an object, before there is a picture."""
    from lib import depth, edit
    tests, insert = [lambda: given.get("AT") and depth.parse_at(given["AT"]), lambda: _depth_model(given)], ""
    if given.get("PROCESS", "edit") == "edit":
        insert = str(given.get("INSERT", ""))
        tests += [lambda: edit.check_settings("", given.get("MECHANISM", "inject")),
                  lambda: edit._where(given.get("WHERE", "")), lambda: _height(given.get("HEIGHT", ""))]
    if insert and not Path(insert).suffix and Path(str(given.get("MODEL", "mini"))).name.startswith("mini"):
        tests.append(lambda: edit._words(edit.words_of(insert)))
    return [said for said in map(_words_of_error, tests) if said]


def _words_of_error(test) -> str:
    try:
        test()
    except ValueError as error:
        return str(error)
    return ""


def _height(text):
    from lib import depth
    try:
        good = str(text).strip().lower() in ("", "auto") or depth.parse_at(text)[0] > 0
    except ValueError:
        good = False
    if not good:
        raise ValueError(f"HEIGHT={text!r} is no height; write metres (0.9m), or a part of the picture (0.3).")


def _depth_model(given):
    from lib import models
    if not given.get("DEPTH"):
        models.check_name(str(given.get("DEPTH_MODEL", "mini")), "depth")


# ---------------------------------------------------------------- devices

def check_devices(wanted: int = -1) -> list[str]:
    """The GPUs that work with this torch, as text. RuntimeError says what is missing and what to switch on.

    wanted: how many must be there; -1: two on Kaggle, elsewhere whatever there is. Each card does one small
    sum, in another process (so that this one holds no memory on them): a card too old for this torch says it
    is available.
    """
    wanted = (2 if here() else 0) if wanted < 0 else wanted
    found = engines.cards()
    if len(found) < wanted:
        names = ", ".join(card.name for card in found) or "none"
        raise RuntimeError(f"{wanted} GPUs are wanted, and there are {len(found)} ({names}). {SWITCH_ON}")
    if found and wanted:
        _try_cards(found)
    return [f"{card.name}, {card.memory_mb / 1024:.0f} GB" for card in found]


def _try_cards(found):
    code = ("import sys, torch\n"
            "for n in range(int(sys.argv[1])): torch.ones(2, device=f'cuda:{n}').sum().item()")
    done = subprocess.run([sys.executable, "-c", code, str(len(found))], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"There are {len(found)} GPUs ({found[0].name}), and this torch cannot use them: "
                           f"{last}. {SWITCH_ON}")


# ---------------------------------------------------------------- what is attached

def attached(name, base=None) -> Path:
    """A path as it is; else what is attached to the notebook under this name. Refused: neither.

    name: "slug", "owner/slug", or a file or folder inside ("owner/slug/frames"). Both mounts are known:
    <slug>/, and since 2026 <kind>/<owner>/<slug>/ with kind "datasets", "notebooks" and so on.
    """
    elsewhere, base, path = not base and not here(), Path(base or inputs()), Path(name)
    if path.exists():
        return path
    if not path.is_absolute():
        parts = path.parts
        below = [place for stars in ("*", "*/*") for place in sorted(base.glob("/".join([stars, *parts])))]
        places = [base.joinpath(*parts), *below]
        if len(parts) > 1:                                        # the older mount does not name the owner
            places.append(base.joinpath(*parts[1:]))
        for place in places:
            if place.exists():
                return place
    places = [p for p in [*base.glob("*"), *base.glob("*/*/*")] if p.is_dir()]
    there = sorted({str(p.relative_to(base)) for p in places})[:20]
    if elsewhere and not base.exists():
        raise Refused(f"There is no {name!r} here.")
    raise Refused(f"There is no {name!r} here, nor is it attached under {base}"
                  + (f", which holds: {', '.join(there)}." if there else ", which holds nothing."))


def frames(source, folder, step=0.1, max_side=None) -> Path:
    """What a job in `folder` works on: of a film its frames, none larger than max_side; all else as it is.

    25,000 frames of 4K are hundreds of GB as PNG, so they are made no larger than they are worked on. On
    Kaggle they lie outside /kaggle/working, which keeps OUTPUT bytes: each session makes them again, with the
    same bytes. Elsewhere they are made once, in the job's folder; after that lib.jobs compares the film with
    them.
    """
    from lib import video
    source, folder = Path(source), Path(folder)
    if source.suffix.lower() not in VIDEOS or source.is_dir():
        return source
    if here():
        scratch = Path(tempfile.gettempdir()) / f"frames-{source.stem}-{step:g}-{max_side or 'full'}"
        return video.extract(source, scratch, step, max_side)
    if (folder / "run.json").is_file():
        return source
    return video.extract(source, folder / "frames", step, max_side)


def sessions(base=None, deep=5) -> list[Path]:
    """Folders under `base` that hold a job: the outputs of earlier sessions, attached to this one."""
    base, found = Path(base or inputs()), []
    for at, below, files in os.walk(base):
        if "run.json" in files and "inputs.jsonl" in files:
            found.append(Path(at))
            below.clear()
        if len(Path(at).relative_to(base).parts) >= deep:
            below.clear()
    return sorted(found)


def add_wheels(base=None) -> list[str]:
    """Install attached wheels of packages that are not here at all, without a network; returns their names.

    What is installed stays as it is (torch above all): a wheel of it is passed over.
    """
    wanted = {}
    for wheel in sorted(Path(base or inputs()).rglob("*.whl")):
        name = re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        if not _is_installed(name):
            wanted[name] = wheel
    if wanted:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        done = subprocess.run([*command, *map(str, wanted.values())], capture_output=True, text=True)
        if done.returncode:
            print(f"The attached wheels could not be installed: {done.stderr.strip()[-300:]}")
            return []
        importlib.invalidate_caches()
    return sorted(wanted)


def _is_installed(name) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


# ---------------------------------------------------------------- the clock

def session_age() -> float:
    """Seconds since this session began: the age of its first process (older than its notebook)."""
    import psutil
    return time.time() - psutil.Process(1).create_time()


def working_seconds(given: float = 0, limit=SESSION, margin=MARGIN) -> float:
    """For --max-seconds: what is given; else, on Kaggle, what is left of the session less MARGIN; else 0.

    Refused when nothing is left."""
    if given or not here():
        return float(given)
    left = limit - margin - session_age()
    if left <= 0:
        raise Refused(f"This session is {session_age() / 3600:.1f} h old and ends at {limit / 3600:.0f} h: "
                      "start a new one, attach this one's output, and the job goes on.")
    return left
