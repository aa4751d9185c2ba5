"""The top level: commands, dependencies, packaging, licences, and what may be tracked."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lib import setup

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf8"))
NEEDS = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
CLUSTER = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["cluster"]]
make_only = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(*words, cwd=REPO, **environment):
    """`make -n`: what would be run, as one text."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in setup_names()} | environment
    return subprocess.run(["make", "-n", *words], cwd=cwd, env=env, capture_output=True, text=True)


def setup_names():
    """Variables of `make edit` and `make`, which a caller's environment might hold."""
    return {"PYTHON", "ARGS", "JOBS", "PART", "IMAGE", "DEPTH", "AT", "INSERT", "PROMPT", "OUTPUT", "MODEL", "SEED"}


def test_the_top_level_is_complete():
    wanted = ["README.md", "LICENSE", "LICENSE-text", "Makefile", "environment.yml", "pyproject.toml",
              "constraints.txt", "notebooks", "lib", "data", "figures", "tests", ".ci/run"]
    assert [name for name in wanted if not (REPO / name).exists()] == []
    assert os.access(REPO / ".ci" / "run", os.X_OK)


def test_readme_names_the_two_commands():
    text = (REPO / "README.md").read_text(encoding="utf8")
    for words in ("make lab", "make test", "MIT", "CC BY 4.0"):
        assert words in text, f"README.md does not name {words}"
    assert setup.lesson_table() in text, "the lesson table is out of date: python -m lib.setup table"
    board = json.loads((REPO / "data" / "benchmark" / "mini-100.json").read_text())["settings"]
    again = f"python -m lib.benchmark --scenes {board['scenes']} --steps {board['steps']}"
    assert again in text, "the README does not say how its table was made"


@make_only
def test_make_test_runs_all_tests_and_all_notebooks_in_one_run():
    text = make("-W", "pyproject.toml", "test").stdout
    assert "-m venv .venv" in text and "pip install" in text  # sets up by itself
    assert "lib.setup prepare build/notebooks" in text
    (line,) = [line for line in text.replace("\\\n", " ").splitlines() if "-m pytest" in line]
    for words in ("tests build/notebooks", "-n 2 --dist loadfile", "--nbval-lax", "--nbval-current-env",
                  "--nbval-cell-timeout=300"):
        assert words in line
    assert "-n 0 --dist" in make("test", "JOBS=0").stdout


@make_only
def test_make_lab_opens_lesson_00():
    text = make("lab").stdout
    assert re.search(r"-m jupyterlab .*notebooks/00_\w+\.ipynb", text)


@make_only
def test_every_make_target_is_explained():
    targets = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.M).group(1).split()
    shown = make("help").stdout
    for target in targets:
        assert target == "help" or f"make {target} " in shown
        assert make(target, "IMAGE=x.png").returncode == 0, f"make {target} is not a target"


@make_only
def test_make_edit_hands_over_only_what_was_given():
    text = make("edit", "IMAGE=a b.jpg", "AT=2.4m", "PYTHON=python3", "SEEED=1", SEED="9").stdout
    assert re.search(r"--env AT IMAGE SEEED\s", text) and "a b.jpg" not in text  # the value goes through the environment
    assert "runs/edit/report.html" in text and '"pictures and report: $OUTPUT/report.html"' in make(
        "edit", "IMAGE=a.jpg", "OUTPUT=it's").stdout
    assert "which picture" not in text and "which picture" in make("edit").stdout


@make_only
def test_make_batch_repeats_its_output_as_a_shell_would_read_it(tmp_path):
    """A name with quotes or backticks is a name, and no command."""
    for name in ("it's", 'a "b"', "`touch oops`", "a b"):
        said = make("batch", "INPUT=film.mp4", f"OUTPUT={name}").stdout
        line = next(line for line in said.splitlines() if "follow it" in line).removesuffix("\\")
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, "OUTPUT": name}, capture_output=True,
                              text=True)
        assert shlex.split(done.stdout)[-1] == name and not list(tmp_path.iterdir())


@make_only
def test_make_edit_reads_paths_from_the_callers_folder(tmp_path):
    text = make("-C", str(REPO), "edit", "IMAGE=a.jpg", cwd=tmp_path, PWD=str(tmp_path)).stdout
    assert f'--at "{tmp_path}"' in text


def test_ci_runs_the_readmes_test_command():
    lines = (REPO / ".ci" / "run").read_text().strip().splitlines()
    assert lines[-1] == "make test" and "set -euo pipefail" in lines
    assert subprocess.run(["bash", "-n", str(REPO / ".ci" / "run")]).returncode == 0


def test_constraints_hold_an_exact_version_within_each_floor():
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    for need in [*NEEDS, *CLUSTER]:
        assert need.name in pins, f"{need.name} has no tested version in constraints.txt"
        assert need.specifier.contains(pins.pop(need.name)), f"{need.name}: tested version below its floor"
    assert not pins, f"constraints.txt names what is no dependency: {', '.join(pins)}"


def test_every_dependency_has_a_floor_and_no_pin():
    assert len(setup.floors()) == len(NEEDS)
    for need in NEEDS:
        operators = {s.operator for s in need.specifier}
        assert ">=" in operators and "==" not in operators and "~=" not in operators


def test_conda_gets_the_same():
    parts = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    (pip,) = [p["pip"] for p in parts if isinstance(p, dict)]
    assert "-e .[test]" in pip and "-c constraints.txt" in pip  # as the Makefile installs it
    assert '-e ".[test]"' in (REPO / "Makefile").read_text()
    assert any(str(p).startswith("python >=3.11") for p in parts) and "pip" in parts


def test_wheel_carries_the_data(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling")
    from zipfile import ZipFile
    build = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", str(REPO), "-w", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "pip", *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    for folder in ("data", "figures"):
        ours = {str(p.relative_to(REPO)) for p in (REPO / folder).rglob("*") if p.is_file()}
        ours = {name for name in ours if "__pycache__" not in name} & tracked_or(ours)
        assert ours and {f"lib/{name}" for name in ours} <= names
    assert "lib/setup.py" in names and not any(n.startswith(("tests/", "notebooks/", "build/")) for n in names)


def tracked_or(names):
    """Tracked files; `names` themselves outside a git checkout."""
    return set(tracked()) or set(names)


def tracked():
    """Paths that git tracks, as text; [] outside a checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    names = done.stdout.split("\0") if done.returncode == 0 else []
    return [name for name in names if name and (REPO / name).is_file()]


@pytest.fixture(scope="module")
def files():
    names = tracked()
    if not names:
        pytest.skip("not a git checkout")
    return names


def test_sizes(files):
    size = {name: (REPO / name).stat().st_size for name in files}
    assert sum(size.values()) < 55e6
    models = sum(v for k, v in size.items() if k.startswith("data/models/"))
    assert models <= 45e6
    figures = {k: v for k, v in size.items() if k.startswith("figures/")}
    assert sum(figures.values()) <= 6e6
    assert [k for k, v in figures.items() if v > 150e3] == []


def test_weights_are_safetensors(files):
    assert [name for name in files if name.endswith((".pt", ".pth", ".ckpt", ".pkl", ".bin"))] == []
    assert not any(line.strip().rstrip("/") in ("lib", "/lib") for line in (REPO / ".gitignore").read_text().splitlines())


def test_no_path_of_one_machine(files):
    path = re.compile(r"(?<![\w.])/(?:work|root|home|farm)/\w")
    text = [name for name in files if name.endswith((".py", ".md", ".ipynb", ".toml", ".txt", ".yml", ".json"))]
    hits = [name for name in text if path.search((REPO / name).read_text(encoding="utf8"))]
    assert hits == []


def test_lib_is_flat_and_imports_nothing_heavy_at_the_top():
    assert [p.name for p in (REPO / "lib").iterdir() if p.is_dir() and (p / "__init__.py").exists()] == []
    probe = "import sys, lib, lib.setup; print([m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
