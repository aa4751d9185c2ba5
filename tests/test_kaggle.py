"""lib.kaggle and the folder kaggle/: mounts, devices, the clock, and what `kaggle kernels push` will be given.

What needs an account is not tried here: the push itself, how Kaggle mounts models, and its GPUs.
"""
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from test_setup import bare_python, project_copy, read_only, tree  # noqa: F401  (a fixture and helpers)

from lib import engines, kaggle, setup
from lib.jobs import Refused

REPO = Path(__file__).resolve().parents[1]
HOME = REPO / "kaggle"
LESSON = REPO / "notebooks" / "15_two_gpus_on_kaggle.ipynb"


def maker():
    spec = importlib.util.spec_from_file_location("kaggle_make", HOME / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- parameters

def test_the_lesson_s_own_parameters_are_good():
    kaggle.check_parameters(setup.notebook_parameters(LESSON))
    kaggle.check_parameters({"AT": "2.4m", "HEIGHT": "0.9m", "WHERE": "0.4,0.8", "INSERT": "chair.png", "RETRY": "nan,oom", "MAX_SECONDS": 0.5})
    kaggle.check_parameters({"INSERT": "a small dragon", "MODEL": "sd15"})        # it paints what the mini cannot
    kaggle.check_parameters({"AT": "behind", "PROCESS": "tint"})                  # which asks for no depth


@pytest.mark.parametrize("name, value, words", [
    ("ENGINE", "slurm", r"ENGINE is one of 'local', 'ray'; it is 'slurm'"), ("PACK", "zip", "'files', 'tar'"),
    ("DEVICE", "tpu", "DEVICE is one of"), ("WORKERS", "two", "WORKERS is a whole number of 0 or more; it is 'two'"),
    ("STEPS", 0, "STEPS is a whole number of 1 or more; it is 0"), ("BATCH", -1, "BATCH is"), ("LIMIT", 1.5, "LIMIT is"),
    ("LOADERS", 0, "1 or more"), ("GPUS", True, "GPUS is"), ("STEP", 0, "STEP is a number of seconds, more than 0; it is 0"),
    ("MAX_SECONDS", -4, "0 or more; it is -4"), ("RETRY", "nan,foo", r"RETRY names statuses \(ok, .*'foo' is none"),
    ("AT", "behind", "'behind' is not a depth"), ("WHERE", "left", "'left' is not a place"),
    ("DEPTH_MODEL", "foo", "Unknown depth model 'foo'; known: mini, .*dpt.*, or the path of a model folder"),
    ("HEIGHT", "tall", "HEIGHT='tall' is no height"), ("HEIGHT", "-1m", "is no height"),
    ("MECHANISM", "magic", "Unknown MECHANISM 'magic'; known: "), ("INSERT", "purple dragon", "colours: .*things: "),
])
def test_a_parameter_that_cannot_be_used_is_named_at_once(name, value, words):
    with pytest.raises(ValueError, match=words) as raised:
        kaggle.check_parameters({"ENGINE": "local", "STEPS": 3, name: value})
    assert str(raised.value).count("\n") == 0
    with pytest.raises(ValueError, match=f"{words}(.|\n)*LEAST|LEAST(.|\n)*{words}".replace("LEAST", "SHARD is a whole number")):
        kaggle.check_parameters({"SHARD": -2, name: value})


# ---------------------------------------------------------------- devices

@pytest.fixture
def smi(tmp_path, monkeypatch):
    """smi(*lines): an nvidia-smi that lists these cards."""
    def make(*lines):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text("#!/bin/sh\ncat <<'E'\n" + "\n".join(lines) + "\nE\n")
        tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


T4S = ("0, GPU-aa, Tesla T4, 15360", "1, GPU-bb, Tesla T4, 15360")


def test_cards_are_read_without_torch(smi, monkeypatch):
    smi(*T4S)
    assert engines.cards() == [("0", "Tesla T4", 15360.0), ("1", "Tesla T4", 15360.0)] and engines.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert engines.cards() == [("1", "Tesla T4", 15360.0)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, 7")
    assert [card.name for card in engines.cards()] == ["Tesla T4", "GPU"]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert engines.gpus() == []


def test_what_is_missing_is_said_with_what_to_switch_on(smi, monkeypatch):
    monkeypatch.setattr(kaggle, "here", lambda: True)
    monkeypatch.setattr(kaggle, "_try_cards", lambda found: None)
    smi()
    with pytest.raises(RuntimeError, match=r"2 GPUs are wanted, and there are 0 \(none\).*'GPU T4 x2'.*NvidiaTeslaT4.*GPUS = 0"):
        kaggle.check_devices()
    smi("0, GPU-aa, Tesla P100-PCIE-16GB, 16280")
    with pytest.raises(RuntimeError, match=r"there are 1 \(Tesla P100"):
        kaggle.check_devices()
    smi(*T4S)
    assert kaggle.check_devices() == ["Tesla T4, 15 GB"] * 2
    with pytest.raises(RuntimeError, match="4 GPUs are wanted, and there are 2"):
        kaggle.check_devices(4)
    monkeypatch.setattr(kaggle, "here", lambda: False)
    smi()
    assert kaggle.check_devices() == kaggle.check_devices(0) == []


@pytest.mark.skipif(bool(engines.gpus()), reason="the cards here are real")
def test_a_card_that_this_torch_cannot_use_is_found_by_a_small_sum(smi):
    smi(*T4S)                                              # listed, but there is no such card
    with pytest.raises(RuntimeError, match=r"There are 2 GPUs \(Tesla T4\), and this torch cannot use them: "):
        kaggle.check_devices(2)


# ---------------------------------------------------------------- mounts

@pytest.mark.parametrize("mount, names", [
    ("frames", ["frames", "someone/frames", "frames/day1", "someone/frames/day1"]),
    ("datasets/someone/frames", ["frames", "someone/frames", "frames/day1", "someone/frames/day1",
                                 "datasets/someone/frames"]),
    ("notebooks/someone/frames", ["frames", "someone/frames"]),
])
def test_both_mounts_are_found_by_name(tmp_path, mount, names):
    place = tmp_path / "input" / mount
    (place / "day1").mkdir(parents=True)
    for name in names:
        wanted = place / "day1" if name.endswith("day1") else place
        assert kaggle.attached(name, tmp_path / "input") == wanted, name


def test_a_path_is_a_path_and_what_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "input" / "datasets" / "me" / "walk").mkdir(parents=True)
    (tmp_path / "film.mp4").touch()
    assert kaggle.attached(tmp_path / "film.mp4", tmp_path / "input") == tmp_path / "film.mp4"
    with pytest.raises(Refused, match="no 'wlak' here, nor is it attached under .*holds: datasets, datasets/me/walk"):
        kaggle.attached("wlak", tmp_path / "input")
    with pytest.raises(Refused, match="which holds nothing"):
        kaggle.attached(str(tmp_path / "no" / "such.mp4"), tmp_path / "none")
    monkeypatch.setenv("LAYERS_KAGGLE_INPUT", str(tmp_path / "none"))
    with pytest.raises(Refused, match="There is no 'such.mp4' here.$"):           # on a laptop nothing can be attached
        kaggle.attached("such.mp4")
    monkeypatch.setenv("LAYERS_KAGGLE_INPUT", str(tmp_path / "input"))
    assert kaggle.attached("me/walk").is_dir()


def test_earlier_sessions_are_found_wherever_they_are_mounted(tmp_path):
    for place in ("two-gpus/batch", "notebooks/me/two-gpus-2/batch", "frames"):
        (tmp_path / place).mkdir(parents=True)
        if place != "frames":
            for name in ("run.json", "inputs.jsonl"):
                (tmp_path / place / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in kaggle.sessions(tmp_path)] == [
        "notebooks/me/two-gpus-2/batch", "two-gpus/batch"]
    assert kaggle.sessions(tmp_path / "none") == []


def test_frames_of_a_film_are_small_and_outside_what_kaggle_keeps(tmp_path, monkeypatch):
    from PIL import Image

    from lib import jobs, video
    film = video.write(tmp_path / "film.mp4", [np.full((48, 64, 3), 9 * k, np.uint8) for k in range(4)], [0, 0.1, 0.2, 0.3])
    side = lambda folder: {Image.open(path).size for path in folder.glob("*.png")}
    made = kaggle.frames(film, tmp_path / "job", 0.1, 32)
    assert made == tmp_path / "job" / "frames" and side(made) == {(32, 24)}
    jobs.open_or_create(tmp_path / "job", made, "tint", {})
    assert kaggle.frames(film, tmp_path / "job", 0.1, 16) == film                 # there is a job: lib.jobs compares
    jobs.open_or_create(tmp_path / "job", film, "tint", {}, step=0.1)
    with pytest.raises(Refused, match="step"):
        jobs.open_or_create(tmp_path / "job", film, "tint", {}, step=0.2)
    monkeypatch.setattr(kaggle, "here", lambda: True)
    monkeypatch.setattr(kaggle.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    made = kaggle.frames(film, tmp_path / "job", 0.1)
    assert made.parent == tmp_path / "scratch" and side(made) == {(64, 48)} and len(list(made.glob("*.png"))) == 4
    assert kaggle.frames(tmp_path, tmp_path / "job") == tmp_path                  # a folder is a folder


def test_only_wheels_of_what_is_not_here_are_installed(tmp_path, monkeypatch):
    (tmp_path / "wheels").mkdir()
    for name in ("torch-2.99.0-py3-none-any.whl", "no_such_thing-1.0-py3-none-any.whl", "Pillow-99-py3-none-any.whl"):
        (tmp_path / "wheels" / name).touch()
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or subprocess.CompletedProcess(command, 0))
    assert kaggle.add_wheels(tmp_path) == ["no-such-thing"]
    (command,) = asked
    assert {"--no-index", "--no-deps"} <= set(command) and command[-1].endswith("no_such_thing-1.0-py3-none-any.whl")
    assert "torch-2.99.0-py3-none-any.whl" not in " ".join(command)
    assert kaggle.add_wheels(tmp_path / "none") == []


# ---------------------------------------------------------------- the clock

def test_the_job_stops_before_the_session_does(monkeypatch):
    assert kaggle.session_age() > 0
    monkeypatch.setattr(kaggle, "here", lambda: False)
    assert kaggle.working_seconds() == 0 and kaggle.working_seconds(50) == 50
    monkeypatch.setattr(kaggle, "here", lambda: True)
    monkeypatch.setattr(kaggle, "session_age", lambda: 600.0)
    assert kaggle.working_seconds() == 43200 - 2520 - 600 and kaggle.working_seconds(50) == 50
    monkeypatch.setattr(kaggle, "session_age", lambda: 43000.0)
    with pytest.raises(Refused, match="This session is 11.9 h old and ends at 12 h: start a new one"):
        kaggle.working_seconds()


# ---------------------------------------------------------------- what is pushed

FIELDS = {"id": str, "title": str, "code_file": str, "language": str, "kernel_type": str, "is_private": bool, "enable_gpu": bool,
          "enable_internet": bool, "machine_shape": str, "dataset_sources": list, "competition_sources": list,
          "kernel_sources": list, "model_sources": list}


def check_kernel(folder):
    """A folder for `kaggle kernels push`, as far as its rules are known."""
    meta = json.loads((folder / "kernel-metadata.json").read_text())
    assert {name: type(value) for name, value in meta.items()} == FIELDS
    owner, slug = meta["id"].split("/")
    assert slug == re.sub(r"[^a-z0-9]+", "-", meta["title"].lower()).strip("-") and 5 <= len(meta["title"]) <= 50
    assert meta["language"] == "python" and meta["kernel_type"] == "notebook"
    assert meta["machine_shape"] == "NvidiaTeslaT4" and meta["enable_gpu"] is True
    for name in ("dataset_sources", "kernel_sources"):
        assert all(re.fullmatch(r"[\w-]+/[\w-]+", source) for source in meta[name])
    return meta, owner


def test_the_templates_have_the_fields_that_kaggle_wants():
    meta, owner = check_kernel(HOME)
    assert owner == "USER" and (REPO / "notebooks" / meta["code_file"]).is_file() and meta["enable_internet"] is False
    data = json.loads((HOME / "dataset-metadata.json").read_text())
    assert data["id"] in meta["dataset_sources"] and 6 <= len(data["title"]) <= 50 and 20 <= len(data["subtitle"]) <= 80
    assert data["licenses"] == [{"name": "other"}]


def test_wheels_never_touch_what_the_image_has():
    names = [line for line in (HOME / "wheels.txt").read_text().splitlines() if line and line[0] != "#"]
    ours = {need.name for need in setup.requirements()}
    assert not {"torch", "torchvision", "numpy"} & set(names)
    assert set(names) - ours <= {"psygnal", "lightning-utilities"}                # what two of ours need, and --no-deps leaves out


def test_make_writes_what_push_needs(tmp_path, capsys):
    words = ["someone", "--no-dataset", "--to", str(tmp_path), "--data", "someone/frames", "-p", "INPUT", "frames", "-p", "STEPS",
             "9", "-p", "MODEL", "sd15", "--internet"]
    assert maker().main(words) == 0
    meta, _ = check_kernel(tmp_path / "kernel")
    assert meta["id"] == "someone/layers-in-depth-two-gpus" and meta["enable_internet"] is True
    assert meta["dataset_sources"] == ["someone/layers-in-depth", "someone/frames"] and meta["kernel_sources"] == []
    notebook = nbformat.read(tmp_path / "kernel" / meta["code_file"], 4)
    assert notebook.metadata.kernelspec.name == "python3"                         # push runs papermill, which wants it
    (given,) = [c.source for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert 'INPUT = "frames"' in given and "STEPS = 9" in given and "JOB_ONLY = True" in given
    assert (tmp_path / "kernel" / meta["code_file"]).stat().st_size < 900_000
    assert not any("teaching" in c.metadata.get("tags", []) for c in notebook.cells)
    said = capsys.readouterr().out
    assert f"kaggle kernels push -p {tmp_path / 'kernel'}" in said and "datasets create" not in said
    assert maker().main([*words, "--session", "3"]) == 0
    meta, _ = check_kernel(tmp_path / "kernel")
    assert meta["id"].endswith("two-gpus-3") and meta["kernel_sources"] == [
        "someone/layers-in-depth-two-gpus", "someone/layers-in-depth-two-gpus-2"]
    for wrong, said in (("STEPPS 9", "no parameter STEPPS"), ("STEPS none", "STEPS is a whole number of 1 or more")):
        assert maker().main([*words, "-p", *wrong.split()]) == 1
        assert said in capsys.readouterr().err
    for wrong, said in ((["--session", "0"], "counts from 1"), (["--data", "frames"], "OWNER/SLUG")):
        assert maker().main([*words, *wrong]) == 1
        assert said in capsys.readouterr().err
    assert maker().main(["someone/else", *words[1:]]) == 1 and "your name in Kaggle's" in capsys.readouterr().err


@pytest.mark.slow
def test_the_offline_dataset_holds_the_course(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling")
    from zipfile import ZipFile
    folder = maker().dataset(tmp_path / "dataset", "someone")
    (wheel,) = folder.glob("layers_in_depth-*.whl")
    names = set(ZipFile(wheel).namelist())
    assert {"lib/kaggle.py", "lib/engines.py", "lib/data/scenes/walk.mp4"} <= names
    assert json.loads((folder / "dataset-metadata.json").read_text())["id"] == "someone/layers-in-depth"


# ---------------------------------------------------------------- in a layout like Kaggle's

def whole_course(folder):
    """The course as a dataset, with all its data (a link: nothing there is written)."""
    shutil.rmtree(project_copy(folder) / "data")
    (folder / "data").symlink_to(REPO / "data")


def session(python, attached, working, parameters):
    """Run the lesson's cells as a Kaggle session would: inputs mounted read-only, in an empty working folder."""
    given = nbformat.read(setup.run_notebook(LESSON, working.parent / "given.ipynb", parameters, prepare_only=True), 4)
    script = working.parent / "session.ipynb"
    nbformat.write(given, script)
    hide = ("KAGGLE", "COLAB", "LAYERS", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hide)}
    clean |= {"LAYERS_KAGGLE_INPUT": str(attached), "KAGGLE_KERNEL_RUN_TYPE": "Batch", "PYTHONDONTWRITEBYTECODE": "1",
              "MPLBACKEND": "agg"}
    command = read_only(attached, python)
    return subprocess.run([*command, "-m", "IPython", "--no-banner", "--colors=NoColor", str(script)], cwd=working, env=clean,
                          capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("mount", ["{}", "datasets/someone/{}"])
def test_two_sessions_with_read_only_inputs(tmp_path, bare_python, mount):  # noqa: F811
    """The course and the pictures are attached; the second session is shown the first one's output, and finishes."""
    from PIL import Image
    attached = tmp_path / "input"
    whole_course(attached / mount.format("layers-in-depth"))
    frames = attached / mount.format("frames")
    frames.mkdir(parents=True)
    for n in range(12):
        Image.new("RGB", (40, 40), (20 * n, 90, 90)).save(frames / f"{n:02d}.png")
    common = {"INPUT": "frames", "PROCESS": "tint", "JOB_ONLY": True, "GPUS": 0, "SHARD": 4,
              "MAX_SECONDS": 300}                                    # given: this machine may be older than a session
    first = tmp_path / "one" / "working"
    first.mkdir(parents=True)
    done = session(bare_python, attached, first, {**common, "LIMIT": 0, "MAX_SECONDS": 0.01})
    assert "12 inputs in 3 shards" in done.stdout and "· kaggle ·" in done.stdout, done.stdout + done.stderr
    assert "inputs are left" in done.stdout and (first / "batch" / "report" / "report.html").is_file()
    output = attached / mount.format("two-gpus").replace("datasets", "notebooks")
    output.parent.mkdir(parents=True, exist_ok=True)
    (first / "batch").rename(output)
    before = tree(attached)
    second = tmp_path / "two" / "working"
    second.mkdir(parents=True)
    done = session(bare_python, attached, second, common)
    assert "done in 1 earlier sessions" in done.stdout and "12 of 12 inputs have a final row" in done.stdout, done.stdout + done.stderr
    assert tree(attached) == before and sorted(p.name for p in (second / "batch").iterdir() if p.name == "shards")


@pytest.mark.slow
def test_on_kaggle_without_gpus_it_stops_and_says_what_to_switch_on(tmp_path, bare_python):  # noqa: F811
    if engines.gpus():
        pytest.skip("there are GPUs here")
    whole_course(tmp_path / "input" / "layers-in-depth")
    (tmp_path / "a" / "working").mkdir(parents=True)
    done = session(bare_python, tmp_path / "input", tmp_path / "a" / "working", {"JOB_ONLY": True})
    assert "2 GPUs are wanted, and there are 0" in done.stdout + done.stderr
    assert not (tmp_path / "a" / "working" / "batch").exists()
