"""Where am I, which device, which settings: the first thing every lesson imports.

The module imports only the standard library until a function needs more, so that `python -m lib.setup report`
can still explain what is missing on a machine where torch does not import.

Command line: `python -m lib.setup report | run | prepare | times | table | floors | keep` (`--help` explains each).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

from lib import COURSE, __version__

REPOSITORY = "https://github.com/layers-in-depth/layers-in-depth"

# The first code cell of every notebook, the same text but for the last line. It must run where `lib` cannot be
# imported yet, so it is kept here as text; tests compare it with the notebooks and run it in four kinds of places.
SETUP_CELL = '''\
# @title Setup: run this cell first. It finds the course on a laptop, Kaggle or Colab; torch and numpy stay as they are.
import importlib
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = os.environ.get("LAYERS_REPOSITORY", "https://github.com/layers-in-depth/layers-in-depth")
KAGGLE_INPUT = Path(os.environ.get("LAYERS_KAGGLE_INPUT", "/kaggle/input"))
HOSTED = any(v in os.environ for v in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG", "LAYERS_REPOSITORY"))


def ready():
    """Does `import lib` give this course, and not another folder called lib?"""
    importlib.invalidate_caches()
    if getattr(sys.modules.get("lib"), "COURSE", "") != "layers-in-depth":
        sys.modules.pop("lib", None)
    try:
        return getattr(importlib.import_module("lib"), "COURSE", "") == "layers-in-depth"
    except ImportError:
        return False


def use_folder(folders):
    """Put the first folder that holds the course on the import path."""
    for folder in map(Path, folders):
        if (folder / "lib" / "setup.py").is_file() and (folder / "pyproject.toml").is_file():
            sys.path.insert(0, str(folder))
            return ready()
    return False


def install(*what):
    """pip, which adds the course alone and changes no other package."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True)
    return ready() if done.returncode == 0 else print(done.stderr.strip()[-600:])


def find_course():
    here = Path.cwd()
    if use_folder([here, *here.parents]) or ready():  # a clone of the course; an installed course
        return True
    attached, wheels = [], []
    for at, below, files in os.walk(KAGGLE_INPUT):  # mounted as <slug>/ or as datasets/<owner>/<slug>/
        attached.append(at)
        wheels += [Path(at, f) for f in files if f.startswith("layers_in_depth-") and f.endswith(".whl")]
        if len(Path(at).relative_to(KAGGLE_INPUT).parts) >= 5:
            below.clear()
    if use_folder(attached):  # Kaggle: the course's folder as a dataset
        return True
    if wheels and install("--no-index", sorted(wheels)[-1]):  # Kaggle: the course's wheel as a dataset
        return True
    local = Path(REPOSITORY).exists()
    return HOSTED and install(REPOSITORY if local else f"git+{REPOSITORY}")  # Kaggle or Colab with internet


if not find_course():
    raise RuntimeError(
        f"The course's `lib` folder was not found around {Path.cwd()} nor under {KAGGLE_INPUT}. On a laptop: "
        f"git clone {REPOSITORY}, then `make lab` in that folder. On Kaggle: add the course as a dataset, or turn "
        "the internet on in the notebook's settings. On Colab: run this cell again when you are online."
    )

from lib import setup

'''


def setup_cell(lesson: str) -> str:
    """The source of the setup cell of lesson `lesson` ("00", "07", "edit")."""
    return f'{SETUP_CELL}setup.begin("{lesson}")'


def badges(name: str) -> str:
    """Markdown of the Kaggle and Colab badges of `notebooks/<name>`; stands in the first cell, under the title."""
    path = f"notebooks/{name}"
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + f"/main/{path}"
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github") + f"/blob/main/{path}"
    return (
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src={raw})\n"
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})"
    )


# --- places ---------------------------------------------------------------------------------------------------------


def where() -> str:
    """"kaggle", "colab" or "local". Kaggle is asked first: its image is built on Colab's."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or Path("/kaggle/input").is_dir():
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "local"


def root() -> Path:
    """The project's folder; where the course was installed from a wheel, the installed `lib` folder."""
    package = Path(__file__).resolve().parent
    return package.parent if (package.parent / "pyproject.toml").is_file() else package


def data_dir() -> Path:
    """The folder that holds models/ and scenes/. The environment variable LAYERS_DATA overrides it."""
    return Path(os.environ.get("LAYERS_DATA") or root() / "data")


def figures_dir() -> Path:
    """The folder of the stored pictures (`make figures` writes them)."""
    return root() / "figures"


def cache_dir() -> Path:
    """A folder for large files that can be made again; LAYERS_CACHE overrides it. It is created when missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("LAYERS_CACHE") or Path(base) / COURSE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        folder = Path(tempfile.gettempdir()) / COURSE
        folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- a lesson begins ------------------------------------------------------------------------------------------------


def begin(lesson: str) -> None:
    """Print the lesson, the place and the versions in one line; on Kaggle and Colab add the packages still missing.

    lesson: its number as in the file name, "00" … "15", or the name of a job such as "edit".
    """
    if not isinstance(lesson, str) or not lesson:
        raise ValueError(f'begin() wants the lesson as text, like setup.begin("00"); it got {lesson!r}.')
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer warns after a fork otherwise
    if where() == "kaggle":
        from lib import kaggle

        kaggle.add_wheels()  # without internet they are all there is
    if where() != "local":
        add_missing_packages()
    versions = " · ".join(f"{name} {_installed(name) or 'missing'}" for name in ("torch", "diffusers", "transformers"))
    title = f"lesson {lesson}" if lesson[0].isdigit() else lesson
    print(f"Layers in Depth {__version__} · {title} · {where()} · Python {platform.python_version()} · {versions}")


@dataclass(frozen=True)
class Run:
    """The settings of one run of a notebook, chosen once.

    model: a name in `lib.models.REGISTRY` or a local pipeline folder; seed: of every generator; smoke: small sizes,
    for tests; device: "cuda", "mps" or "cpu"; dtype: of the model's weights; size: the model's picture size, pixels.
    """

    model: str
    seed: int
    smoke: bool
    device: str
    dtype: torch.dtype
    size: int

    def generator(self, offset: int = 0) -> torch.Generator:
        """A fresh CPU generator seeded with seed + offset: the same noise on CPU, CUDA and MPS."""
        import torch

        return torch.Generator("cpu").manual_seed(self.seed + offset)


def configure(model: str = "mini", seed: int = 0, smoke: bool = False) -> Run:
    """Choose device, number format and threads once, and check the three standard parameters.

    ValueError names what is wrong: a model that is neither in the registry nor a folder, a seed that is not a whole
    number >= 0, a `smoke` that is not True or False. An unknown keyword is a TypeError.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"SEED must be a whole number >= 0; it is {seed!r}.")
    if not isinstance(smoke, bool):
        raise ValueError(f"SMOKE must be True or False; it is {smoke!r}.")
    _check_model(model)
    import torch

    device = _device()
    if torch.get_num_threads() > cpus():  # torch counts the machine's cores, not the container's share of them
        torch.set_num_threads(cpus())
    torch.manual_seed(seed)  # for layers made without a generator; sampling always takes an explicit one
    half = device == "cuda" and not Path(model).name.startswith("mini")
    return Run(model, seed, smoke, device, torch.float16 if half else torch.float32, _picture_size(model))


def cpus() -> int:
    """CPU cores this process may use: the smaller of its affinity and its control group's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no such file or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        try:  # a card too old for this torch says it is available and dies at its first operation
            torch.ones(2, device="cuda").sum().item()
            return "cuda"
        except RuntimeError as error:
            print(f"The GPU is not usable with this torch ({str(error).splitlines()[0]}): going on with the CPU.")
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_model(model: str) -> None:
    if not isinstance(model, str) or not model:
        raise ValueError(f'MODEL must be a name like "mini" or a pipeline folder; it is {model!r}.')
    if Path(model).is_dir():
        return
    from lib import models

    known = [name for name, spec in models.REGISTRY.items() if spec.kind == "pipeline"]
    if model not in known:
        raise ValueError(f"MODEL = {model!r} is neither a known model nor a folder. Known: {', '.join(known)}.")


def _picture_size(model: str) -> int:
    """The side of the pictures the pipeline makes: latent size times the VAE's factor; 512 for a model not here yet."""
    folder = Path(model) if Path(model).is_dir() else data_dir() / "models" / model
    try:
        latent = json.loads((folder / "unet" / "config.json").read_text())["sample_size"]
        blocks = json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]
    except (OSError, KeyError, ValueError):
        return 128 if model.startswith("mini") else 512
    return int(latent) * 2 ** (len(blocks) - 1)


# --- packages and the environment report ----------------------------------------------------------------------------

# import name, where it is not the package's name
_MODULES = {"scikit-image": "skimage", "opencv-python-headless": "cv2", "pillow": "PIL"}
# needed on one's own machine only; Kaggle and Colab have their own notebook server
_OWN_MACHINE = {"jupyterlab", "ipykernel", "nbval", "pytest"}


def requirements() -> list:
    """The project's dependencies as `packaging` requirements, from pyproject.toml or from the installed wheel."""
    from packaging.requirements import Requirement

    project = root() / "pyproject.toml"
    if project.is_file():
        import tomllib

        lines = tomllib.loads(project.read_text(encoding="utf8"))["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires(COURSE) or []
    wanted = [Requirement(line) for line in lines]
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def _installed(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _module(name: str) -> str:
    return _MODULES.get(name, name.replace("-", "_"))


def missing_packages() -> list[str]:
    """Requirements that a lesson may import and that are not installed, as pip writes them."""
    names = [r for r in requirements() if r.name not in _OWN_MACHINE]
    return [str(r) for r in names if importlib.util.find_spec(_module(r.name)) is None]


def add_missing_packages() -> list[str]:
    """pip-install what is missing while every installed package keeps its version. Returns what is still missing."""
    missing = missing_packages()
    if not missing:
        return []
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder) / "keep.txt"
        keep.write_text("\n".join(_installed_pins()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(keep), *missing]
        done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    missing = missing_packages()
    if missing:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        print(f"Not installed: {', '.join(missing)} ({reason}). Lessons that need them will stop there.")
    return missing


def _installed_pins(only: tuple[str, ...] = ()) -> list[str]:
    """`name==version` of the installed packages, for pip's -c."""
    pins = {}
    for found in importlib.metadata.distributions():
        name, version = found.metadata["Name"], found.version
        if name and re.match(r"\d[\w.+!]*$", version or "") and (not only or name.lower() in only):
            pins.setdefault(name.lower(), f"{name}=={version}")
    return sorted(pins.values())


def floors() -> list[str]:
    """`name==floor.*` of every requirement: the oldest series that must work (`make test-floor`)."""
    lows = []
    for need in requirements():
        low = [s.version for s in need.specifier if s.operator == ">="]
        lows += [f"{need.name}=={low[0]}.*"] if low else []
    return lows


class Row(NamedTuple):
    """One line of the environment report."""

    name: str
    found: str
    wanted: str
    ok: bool


def report(show: bool = True) -> list[Row]:
    """Check this machine and print an OK/FAIL table (with show=False only return its rows).

    Rows: Python, each package against its floor, torch and torchvision as a pair, device, memory, disk, the shipped
    models. Nothing is fetched. A FAIL says what is wanted; `ok` of every row is True on a good machine.
    """
    rows = [Row("python", platform.python_version(), ">=3.11", sys.version_info >= (3, 11))]
    rows += [_package_row(need) for need in requirements() if where() == "local" or need.name not in _OWN_MACHINE]
    rows += [_pair_row(), _device_row(), _memory_row(), _disk_row(), *_model_rows()]
    if show:
        print_table(rows)
    return rows


def print_table(rows: list[Row]) -> None:
    """Print report rows in columns, then the sum."""
    width = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        cells = "  ".join(row[i].ljust(width[i]) for i in range(3))
        print(f"{'OK  ' if row.ok else 'FAIL'}  {cells}".rstrip())
    bad = sum(not row.ok for row in rows)
    print("All is well." if not bad else f"{bad} of {len(rows)} checks failed: the third column says what is wanted.")


def _package_row(need) -> Row:
    found = _installed(need.name)
    if found is None and importlib.util.find_spec(_module(need.name)):
        # opencv-python in place of opencv-python-headless: another package with the same module
        found = str(getattr(importlib.import_module(_module(need.name)), "__version__", "")) or None
    ok = found is not None and need.specifier.contains(found, prereleases=True)
    return Row(need.name, found or "missing", str(need.specifier) or "any", ok)


def _pair_row() -> Row:
    wanted = "built for each other: install both together from one place"
    try:
        import torch  # noqa: F401
        import torchvision

        torchvision.ops.nms  # a torchvision built for another torch fails at import: "torchvision::nms does not exist"
        return Row("torch + torchvision", "a pair", wanted, True)
    except Exception as error:
        return Row("torch + torchvision", str(error).splitlines()[0][:60], wanted, False)


def _device_row() -> Row:
    try:
        import torch

        device = _device()
        name = torch.cuda.get_device_name() if device == "cuda" else f"{cpus()} CPU cores"
        return Row("device", f"{device} ({name})", "cpu is enough", True)
    except Exception as error:
        return Row("device", str(error).splitlines()[0][:60], "a torch that imports", False)


def _memory_row() -> Row:
    import psutil

    free, total = (getattr(psutil.virtual_memory(), k) / 2**30 for k in ("available", "total"))
    return Row("memory", f"{free:.1f} GB free of {total:.1f}", ">=3 GB free (a lesson uses up to 4)", free >= 3)


def _disk_row() -> Row:
    free = shutil.disk_usage(cache_dir()).free / 2**30
    return Row("disk", f"{free:.1f} GB free", ">=1 GB free", free >= 1)


def _model_rows() -> list[Row]:
    rows = []
    for name in ("mini", "mini-inpaint", "mini-depth", "judge"):
        weights = list((data_dir() / "models" / name).rglob("*.safetensors"))
        size = sum(f.stat().st_size for f in weights) / 1e6
        rows.append(Row(f"model {name}", f"{size:.1f} MB" if weights else "missing", "shipped in data/models", size > 0))
    return rows


# --- running notebooks ----------------------------------------------------------------------------------------------


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error. `log` is the file with the full trace."""

    log: Path | None = None


def notebook_parameters(path) -> dict:
    """Names and defaults of the notebook's `parameters` cell.

    ValueError: there is no such cell, or it holds more than `NAME = literal` lines. (papermill.inspect_notebook reads
    the cell with regular expressions and papermill only logs an unknown name, so the cell is parsed here.)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no notebook {path}.")
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:
        raise ValueError(f"{path} is not a readable notebook: {str(error).splitlines()[0]}") from None
    tagged = [c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{path} needs exactly one code cell tagged `parameters`; it has {len(tagged)}.")
    return _literals(tagged[0].source, path)


def _literals(source: str, path: Path) -> dict:
    found = {}
    for line in ast.parse(source).body:
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            continue  # a string that explains
        try:
            (target,) = line.targets
            found[target.id] = ast.literal_eval(line.value)
        except (AttributeError, TypeError, ValueError):
            text = ast.unparse(line)
            raise ValueError(f"{path}: the parameters cell may hold `NAME = literal` lines only, not: {text}") from None
    return found


def run_notebook(path, out, parameters: dict | None = None, timeout: float = 900, prepare_only: bool = False) -> Path:
    """Run a notebook with parameters through papermill and keep the executed copy. Returns the path of the copy.

    path: the notebook; out: the executed copy, written only when the run ends well; parameters: name -> plain value;
    timeout: seconds for one cell; prepare_only: inject the parameters, run nothing.
    The notebook runs in its own folder, in this very Python. JOB_ONLY=True leaves out its cells tagged "teaching".
    ValueError: an unknown parameter (the known ones are named). NotebookFailed: a cell failed, took too long, lost
    its kernel, or an error hides in a widget's output; the full trace is then in `<out>.log`.
    """
    path, out, parameters = Path(path).resolve(), Path(out).resolve(), dict(parameters or {})
    known = notebook_parameters(path)
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(f"{path.name} has no parameter {', '.join(unknown)}. It has: {', '.join(known)}.")
    import logging

    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # this environment's kernel, not one in the home folder
    out.parent.mkdir(parents=True, exist_ok=True)
    part, log = out.with_name(f".{out.stem}.part.ipynb"), out.with_suffix(".log")
    short = out.with_name(f".{out.stem}.short.ipynb")
    log.unlink(missing_ok=True)
    try:
        source = _without_teaching(path, short) if parameters.get("JOB_ONLY") else path
        quiet = {"extra_arguments": ["--IPKernelApp.log_level=ERROR"]}  # no line about TCP on every start
        with _papermill_words():
            papermill.execute_notebook(
                str(source), str(part), parameters, kernel_name="python3", cwd=str(path.parent), progress_bar=False,
                execution_timeout=math.ceil(timeout), prepare_only=prepare_only, **quiet,
            )
        if not prepare_only:
            _raise_widget_errors(part)
        os.replace(part, out)
    except Exception as error:
        raise _failed(path, error, log) from None
    finally:
        part.unlink(missing_ok=True)
        short.unlink(missing_ok=True)
    return out


def _without_teaching(path: Path, to: Path) -> Path:
    notebook = json.loads(path.read_text(encoding="utf8"))
    notebook["cells"] = [c for c in notebook["cells"] if "teaching" not in c["metadata"].get("tags", [])]
    to.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf8")
    return to


@contextlib.contextmanager
def _papermill_words():
    """Keep papermill's and tqdm's own warnings about the front end out of a plain run."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _failed(path: Path, error: Exception, log: Path) -> NotebookFailed:
    """The message of whatever papermill raised, without its trace; the full trace goes to the log."""
    colours = re.compile(r"\x1b\[[0-9;]*m")
    log.write_text(colours.sub("", str(error)), encoding="utf8")
    kind = getattr(error, "ename", type(error).__name__)
    text = getattr(error, "evalue", None) or str(error).strip() or "no message"
    if kind == "CellTimeoutError":
        text = "a cell took longer than the time allowed"
    if kind in ("DeadKernelError", "RuntimeError") and "ernel died" in text:
        text = "the kernel died; most often the memory ran out"
    message = "\n".join(colours.sub("", text).strip().splitlines()[:12])  # `models` lists what it tried, line by line
    failure = NotebookFailed(f"{path.name}: {kind}: {message}")
    failure.log = log
    return failure


def _raise_widget_errors(path: Path) -> None:
    """An error inside `interact` goes to the widget's output and papermill reports success: look there."""
    notebook = json.loads(path.read_text(encoding="utf8"))
    widgets = notebook["metadata"].get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    for state in widgets.get("state", {}).values():
        for output in state.get("state", {}).get("outputs", []):
            if output.get("output_type") == "error":
                raise RuntimeError(f"inside a widget: {output.get('ename')}: {output.get('evalue')}")


def lessons() -> list[Path]:
    """The lesson notebooks, in order."""
    return sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def notebooks() -> list[Path]:
    """All notebooks of the course, jobs such as edit.ipynb too."""
    return sorted((root() / "notebooks").glob("*.ipynb"))


def prepare(folder, parameters: dict) -> list[Path]:
    """Write every notebook with these parameters injected into `folder`, unexecuted, and remove older ones there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ipynb"):
        old.unlink()
    return [run_notebook(path, folder / path.name, parameters, prepare_only=True) for path in notebooks()]


def times() -> dict:
    """Measured run times: {"machine": …, "lessons": {"00": {"seconds": …, "memory_gb": …}}}; {} before any measure."""
    path = data_dir() / "times.json"
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}


def measure_times(out: Path | None = None, numbers: tuple = ()) -> dict:
    """Run lessons at full size, one process each, and write seconds and peak memory to data/times.json.

    numbers: "06", "07", ... for those alone (the other rows stay); () = all."""
    out = Path(out or data_dir() / "times.json")
    rows = dict(times().get("lessons", {})) if numbers else {}
    for path in [p for p in lessons() if not numbers or p.name[:2] in numbers]:
        copy = root() / "build" / "times" / path.name
        before = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-m", "lib.setup", "run", str(path), str(copy)], cwd=root())
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise NotebookFailed(f"{path.name} failed; its log is {copy.with_suffix('.log')}.")
        unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes on macOS, kilobytes on Linux
        memory = usage.ru_maxrss / unit
        rows[path.name[:2]] = {"seconds": round(time.perf_counter() - before, 1), "memory_gb": round(memory, 2)}
        print(f"{path.name}: {rows[path.name[:2]]['seconds']} s, at most {memory:.2f} GB", flush=True)
    machine = {"cpu_cores": cpus(), "device": _device(), "python": platform.python_version()}
    machine |= {name: _installed(name) for name in ("torch", "diffusers", "transformers")}
    result = {"machine": machine, "lessons": dict(sorted(rows.items()))}
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    os.replace(part, out)
    return result


def lesson_table() -> str:
    """The README's lesson table: each notebook's title, measured seconds and memory (a dash where not measured)."""
    import nbformat

    measured = times()
    cores = measured.get("machine", {}).get("cpu_cores")
    lines = [f"| | lesson | run time{f', {cores} CPU cores' if cores else ''} | memory |", "|---|---|---|---|"]
    for path in lessons():
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0]
        title = re.sub(r"^#\s*(\d\d\W+)?", "", title)
        row = measured.get("lessons", {}).get(path.name[:2])
        cost = f"{row['seconds']:.0f} s | {row['memory_gb']:.1f} GB" if row else "– | –"
        lines.append(f"| {path.name[:2]} | [{title}](notebooks/{path.name}) | {cost} |")
    return "\n".join(lines)


def write_lesson_table(readme: Path | None = None) -> None:
    """Put the lesson table between the README's markers <!-- lessons:begin --> and <!-- lessons:end -->."""
    readme = Path(readme or root() / "README.md")
    text = readme.read_text(encoding="utf8")
    marked = re.compile(r"(<!-- lessons:begin -->\n).*?(<!-- lessons:end -->)", re.DOTALL)
    if len(marked.findall(text)) != 1:
        raise ValueError(f"{readme.name} needs the lines <!-- lessons:begin --> and <!-- lessons:end -->, once.")
    part = readme.with_name(readme.name + ".part")
    part.write_text(marked.sub(lambda m: f"{m[1]}{lesson_table()}\n{m[2]}", text), encoding="utf8")
    os.replace(part, readme)


# --- command line ---------------------------------------------------------------------------------------------------


def _typed(text: str, default):
    """A command-line word as the type of the parameter's default: text stays text, the rest is read as a literal."""
    if isinstance(default, str):
        return text
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(default, bool) and text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _given(args, known: dict) -> dict:
    """Parameters from `-p NAME VALUE` and from `--env NAME`; names in `--paths` become absolute from `--at`."""
    words = dict(args.parameter) | {name: os.environ[name] for name in args.env if os.environ.get(name)}
    for name in args.paths:
        if words.get(name):
            words[name] = str(Path(args.at, Path(words[name]).expanduser()).absolute())
    return {name: _typed(text, known.get(name, "")) for name, text in words.items()}


def _run_command(args) -> None:
    known = notebook_parameters(args.notebook)
    out = run_notebook(args.notebook, args.out, _given(args, known), timeout=args.timeout)
    if args.say:
        print(f"{args.say}{out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib.setup", description="Environment and notebooks of the course.")
    add = parser.add_subparsers(dest="command", required=True).add_parser
    add("report", help="OK/FAIL table of this machine")
    run = add("run", help="run one notebook with parameters and keep the executed copy")
    run.add_argument("notebook")
    run.add_argument("out")
    run.add_argument("-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("--env", nargs="*", default=[], metavar="NAME", help="parameters to take from the environment")
    run.add_argument("--paths", nargs="*", default=[], metavar="NAME", help="parameters that are paths")
    run.add_argument("--at", default=".", metavar="FOLDER", help="the folder that relative paths start from")
    run.add_argument("--timeout", type=float, default=900, help="seconds for one cell")
    run.add_argument("--say", default="executed copy: ", help="words before the copy's path")
    ready = add("prepare", help="write all notebooks with SMOKE set, unexecuted, for the notebook tests")
    ready.add_argument("folder")
    timing = add("times", help="run lessons at full size, write data/times.json and the README's table")
    timing.add_argument("numbers", nargs="*", help="06 07 ...: these alone (default: all)")
    add("table", help="write the README's lesson table from data/times.json")
    add("floors", help="print the oldest versions that must work")
    add("keep", help="print constraints that keep this Python's torch, torchvision and numpy")
    return parser


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status. A failure prints one line, the full trace is in the log it names."""
    args = _parser().parse_args(words)
    try:
        if args.command == "report":
            return 0 if all(row.ok for row in report()) else 1
        if args.command == "run":
            _run_command(args)
        if args.command == "prepare":
            for path in prepare(args.folder, {"SMOKE": True}):
                print(path)
        if args.command == "times":
            measure_times(numbers=tuple(args.numbers))
            write_lesson_table()
        if args.command == "table":
            write_lesson_table()
        if args.command == "floors":
            print("\n".join(floors()))
        if args.command == "keep":
            print("\n".join(_installed_pins(("torch", "torchvision", "numpy"))))
    except (ValueError, FileNotFoundError, NotebookFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        log = getattr(error, "log", None)
        if log:
            print(f"the full trace: {log}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
