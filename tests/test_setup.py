"""lib.setup: places, settings, report, the notebook runner; and the setup cell in the kinds of places it meets."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
import torch

from lib import setup

REPO = Path(__file__).resolve().parents[1]


# --- places and settings --------------------------------------------------------------------------------------------


def test_where(monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert setup.where() == "local"
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert setup.where() == "colab"
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")  # Kaggle's image is built on Colab's
    assert setup.where() == "kaggle"


def test_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("LAYERS_DATA", raising=False)
    assert setup.root() == REPO
    assert setup.data_dir() == REPO / "data" and setup.figures_dir() == REPO / "figures"
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    assert setup.data_dir() == tmp_path
    monkeypatch.setenv("LAYERS_CACHE", str(tmp_path / "a" / "b"))
    assert setup.cache_dir() == tmp_path / "a" / "b" and setup.cache_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERS_CACHE", str(tmp_path / "file" / "below"))  # cannot be made: falls back
    assert setup.cache_dir().is_dir() and tmp_path not in setup.cache_dir().parents


def model_folder(folder, sample_size=16, blocks=4):
    for part, config in (("unet", {"sample_size": sample_size}), ("vae", {"block_out_channels": [8] * blocks})):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_configure(tmp_path):
    run = setup.configure(model_folder(tmp_path / "own"), seed=3, smoke=True)
    assert (run.seed, run.smoke, run.size) == (3, True, 128)
    assert setup.configure(model_folder(tmp_path / "big", sample_size=64)).size == 512
    if run.device == "cpu":
        assert run.dtype == torch.float32
    same = [torch.randn(4, generator=run.generator(1)) for _ in range(2)]
    assert torch.equal(*same) and run.generator().device.type == "cpu"
    assert not torch.equal(same[0], torch.randn(4, generator=run.generator(2)))


def test_configure_seeds_new_layers(tmp_path):
    folder = model_folder(tmp_path / "own")
    weights = []
    for _ in range(2):
        setup.configure(folder, seed=5)
        weights.append(torch.nn.Linear(3, 3).weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("wrong, words", [
    ({"model": "minny"}, "minny.*neither a known model nor a folder.*Known:.*mini"),
    ({"model": "dpt"}, "dpt.*neither a known model nor a folder.*sd15-inpaint.$"),
    ({"model": ""}, "MODEL must be a name"),
    ({"seed": -1}, "SEED must be a whole number"),
    ({"seed": 1.5}, "SEED must be a whole number"),
    ({"seed": True}, "SEED must be a whole number"),
    ({"smoke": "yes"}, "SMOKE must be True or False"),
])
def test_configure_says_what_is_wrong(wrong, words):
    with pytest.raises(ValueError, match=words):
        setup.configure(**wrong)


def test_configure_knows_no_other_name():
    with pytest.raises(TypeError, match="colour"):
        setup.configure("mini", colour="red")


def test_half_precision_on_cuda_for_the_big_models_only(monkeypatch, tmp_path):
    monkeypatch.setattr(setup, "_device", lambda: "cuda")
    assert setup.configure(model_folder(tmp_path / "sd15")).dtype == torch.float16
    assert setup.configure(model_folder(tmp_path / "mini")).dtype == torch.float32


def test_a_gpu_that_cannot_compute_is_not_used(monkeypatch, capsys):
    def dies(*_, **__):
        raise RuntimeError("no kernel image is available\nmore")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", dies)
    assert setup._device() in ("cpu", "mps")
    assert "no kernel image is available" in capsys.readouterr().out


def test_begin(capsys):
    setup.begin("07")
    line = capsys.readouterr().out.strip()
    assert "lesson 07" in line and f"torch {setup._installed('torch')}" in line and "\n" not in line
    with pytest.raises(ValueError, match="as text"):
        setup.begin(7)


def test_cpus_respects_the_control_group(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for quota, count in (("150000 100000", 2), ("max 100000", 64), ("5000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self, text=quota: text)
        assert setup.cpus() == count


# --- report ---------------------------------------------------------------------------------------------------------


def test_report_names_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    (tmp_path / "models" / "judge").mkdir(parents=True)
    (tmp_path / "models" / "judge" / "model.safetensors").write_bytes(b"x" * 2000)
    rows = {row.name: row for row in setup.report()}
    text = capsys.readouterr().out
    assert rows["python"].ok and rows["torch"].ok and rows["torch + torchvision"].ok
    assert not rows["model mini"].ok and rows["model judge"].ok
    assert "FAIL  model mini " in text and "OK    model judge" in text and "checks failed" in text


def test_report_fails_on_old_and_absent_packages(monkeypatch):
    from packaging.requirements import Requirement
    needs = [Requirement("torch>=99"), Requirement("no-such-package-here>=1"), Requirement("numpy>=1")]
    monkeypatch.setattr(setup, "requirements", lambda: needs)
    rows = {row.name: row for row in setup.report(show=False)}
    assert [rows[n.name].ok for n in needs] == [False, False, True]
    assert rows["no-such-package-here"].found == "missing" and rows["torch"].wanted == ">=99"
    assert setup.missing_packages() == ["no-such-package-here>=1"]


def test_missing_packages_are_asked_for_with_the_installed_ones_held(monkeypatch, capsys):
    from packaging.requirements import Requirement
    monkeypatch.setattr(setup, "requirements", lambda: [Requirement("no-such-package-here>=1")])
    asked = {}

    def pip(command, **_):
        asked["keep"] = Path(command[command.index("-c") + 1]).read_text().splitlines()
        asked["what"] = command[-1]
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
    monkeypatch.setattr(subprocess, "run", pip)
    assert setup.add_missing_packages() == ["no-such-package-here>=1"] == [asked["what"]]
    assert f"torch=={setup._installed('torch')}" in asked["keep"]
    assert "Not installed: no-such-package-here>=1 (ERROR: no network)" in capsys.readouterr().out


@pytest.mark.parametrize("place, steps", [("kaggle", ["wheels", "pip"]), ("colab", ["pip"]), ("local", [])])
def test_what_is_attached_is_installed_before_the_network_is_asked(monkeypatch, place, steps):
    from lib import kaggle
    done = []
    monkeypatch.setattr(setup, "where", lambda: place)
    monkeypatch.setattr(kaggle, "add_wheels", lambda: done.append("wheels"))
    monkeypatch.setattr(setup, "add_missing_packages", lambda: done.append("pip"))
    setup.begin("15")
    assert done == steps


# --- the notebook runner --------------------------------------------------------------------------------------------


def write_notebook(path, *sources, parameters="N = 2\nNAME = 'a'\nFLAG = False\nWIDE = 1.5"):
    """A notebook with a parameters cell and then these code cells."""
    cell = nbformat.v4.new_code_cell
    cells = [cell(parameters, metadata={"tags": ["parameters"]}), *(cell(source) for source in sources)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_run_notebook(tmp_path):
    source = "import os, sys\nprint(N, NAME, os.path.basename(os.getcwd()), sys.executable)"
    (tmp_path / "in").mkdir()
    path = write_notebook(tmp_path / "in" / "a.ipynb", source)
    out = setup.run_notebook(path, tmp_path / "out" / "b.ipynb", {"N": 7})
    printed = "".join(o.text for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if "text" in o)
    assert printed.split() == ["7", "a", "in", sys.executable]  # in its own folder, in this Python
    assert left(tmp_path / "out") == ["b.ipynb"]


def test_prepare_only_runs_nothing(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "1 / 0")
    out = setup.run_notebook(path, tmp_path / "b.ipynb", {"FLAG": True}, prepare_only=True)
    cells = nbformat.read(out, 4).cells
    assert any("injected-parameters" in c.metadata.get("tags", []) and "FLAG = True" in c.source for c in cells)
    assert not any(c.get("outputs") for c in cells)


def test_an_unknown_parameter_is_an_error(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)")
    with pytest.raises(ValueError, match="no parameter SED. It has: N, NAME, FLAG, WIDE"):
        setup.run_notebook(path, tmp_path / "b.ipynb", {"SED": 1})
    assert left(tmp_path) == ["a.ipynb"]


@pytest.mark.parametrize("source, words", [
    ("raise ValueError('the picture is empty')", "a.ipynb: ValueError: the picture is empty$"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the kernel died"),
    ("import time\ntime.sleep(30)", "took longer than the time allowed"),
    ("from ipywidgets import interact\ndef f(n):\n    raise ValueError('in f')\ninteract(f, n=(1, 3))",
     "inside a widget: ValueError: in f"),
])
def test_a_failure_is_one_sentence_and_leaves_only_the_log(tmp_path, source, words):
    path = write_notebook(tmp_path / "a.ipynb", source)
    with pytest.raises(setup.NotebookFailed, match=words) as caught:
        setup.run_notebook(path, tmp_path / "b.ipynb", timeout=5 if "sleep" in source else 120)
    assert "\n" not in str(caught.value) and caught.value.log.stat().st_size > 0
    assert left(tmp_path) == ["a.ipynb", "b.log"]


@pytest.mark.parametrize("parameters, words", [
    ("N = 2\nM = N + 1", "literal` lines only, not: M = N \\+ 1"),
    ("import os", "literal` lines only"),
    ("a, b = 1, 2", "literal` lines only"),
])
def test_parameters_are_plain_literals(tmp_path, parameters, words):
    path = write_notebook(tmp_path / "a.ipynb", parameters=parameters)
    with pytest.raises(ValueError, match=words):
        setup.notebook_parameters(path)


def test_notebook_parameters(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", parameters='"""why"""\nN = -2  # a # b\nL = [1, "x#y"]\nS = "#"')
    assert setup.notebook_parameters(path) == {"N": -2, "L": [1, "x#y"], "S": "#"}
    with pytest.raises(FileNotFoundError, match="no notebook"):
        setup.notebook_parameters(tmp_path / "none.ipynb")
    (tmp_path / "junk.ipynb").write_text("{")
    with pytest.raises(ValueError, match="not a readable notebook"):
        setup.notebook_parameters(tmp_path / "junk.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "bare.ipynb")
    with pytest.raises(ValueError, match="exactly one code cell tagged `parameters`; it has 0"):
        setup.notebook_parameters(tmp_path / "bare.ipynb")


def test_command_line_types_and_paths(tmp_path, monkeypatch, capsys):
    path = write_notebook(tmp_path / "a.ipynb", "print(1)")
    seen = {}
    monkeypatch.setattr(setup, "run_notebook", lambda nb, out, given, timeout: seen.update(given) or out)
    monkeypatch.setenv("NAME", "a b'c.png")
    words = ["run", str(path), "out.ipynb", "-p", "N", "7", "-p", "FLAG", "true", "-p", "WIDE", "2.4m"]
    assert setup.main([*words, "--env", "NAME", "--paths", "NAME", "--at", "/far"]) == 0
    assert seen == {"N": 7, "FLAG": True, "WIDE": "2.4m", "NAME": str(Path("/far/a b'c.png"))}
    assert "executed copy: out.ipynb" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)  # the notebook runs in its own folder, so a path must not depend on this one
    assert setup.main(["run", str(path), "out.ipynb", "-p", "NAME", "b.png", "--paths", "NAME"]) == 0
    assert seen["NAME"] == str(tmp_path / "b.png")


def test_a_message_of_several_lines_is_kept(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "raise RuntimeError('no such model. Tried:\\n- here\\n- there')")
    with pytest.raises(setup.NotebookFailed, match="RuntimeError: no such model. Tried:\n- here\n- there$"):
        setup.run_notebook(path, tmp_path / "b.ipynb")


def test_command_line_failure_is_short(tmp_path, capsys):
    path = write_notebook(tmp_path / "a.ipynb", "def f():\n    raise ValueError('no such picture')\nf()")
    assert setup.main(["run", str(path), str(tmp_path / "b.ipynb")]) == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == "error: a.ipynb: ValueError: no such picture" and second.endswith("b.log")
    assert "in f()" in (tmp_path / "b.log").read_text().replace("in f\n", "in f()")
    assert setup.main(["run", str(path), str(tmp_path / "b.ipynb"), "-p", "NOPE", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: a.ipynb has no parameter NOPE")


def test_prepare_replaces_what_lay_there(tmp_path, monkeypatch):
    (tmp_path / "old.ipynb").write_text("{}")
    made = write_notebook(tmp_path / "source.ipynb", parameters="SMOKE = False")
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "gone.ipynb").write_text("{}")
    monkeypatch.setattr(setup, "notebooks", lambda: [made])
    assert setup.prepare(folder, {"SMOKE": True}) == [folder / "source.ipynb"] and left(folder) == ["source.ipynb"]


def test_times_are_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    assert setup.times() == {}
    lesson = write_notebook(tmp_path / "03_x.ipynb", "import time\ntime.sleep(0.5)")
    monkeypatch.setattr(setup, "lessons", lambda: [lesson])
    setup.measure_times()
    row = setup.times()["lessons"]["03"]
    assert 0.5 < row["seconds"] < 60 and 0.01 < row["memory_gb"] < 4
    assert setup.times()["machine"]["torch"] == setup._installed("torch")


def test_lesson_table(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERS_DATA", str(tmp_path))
    paths = [tmp_path / "03_x.ipynb", tmp_path / "04_y.ipynb"]
    for path in paths:
        cells = [nbformat.v4.new_markdown_cell(f"# About {path.stem}\n\nText")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    monkeypatch.setattr(setup, "lessons", lambda: paths)
    row = {"seconds": 41.4, "memory_gb": 1.26}
    (tmp_path / "times.json").write_text(json.dumps({"machine": {"cpu_cores": 2}, "lessons": {"03": row}}))
    (tmp_path / "R.md").write_text("a\n<!-- lessons:begin -->\nold\n<!-- lessons:end -->\nb\n")
    setup.write_lesson_table(tmp_path / "R.md")
    setup.write_lesson_table(tmp_path / "R.md")  # again: the same
    text = (tmp_path / "R.md").read_text()
    assert "old" not in text and text.startswith("a\n") and text.endswith("<!-- lessons:end -->\nb\n")
    assert "| 03 | [About 03_x](notebooks/03_x.ipynb) | 41 s | 1.3 GB |" in text and "2 CPU cores" in text
    assert "| 04 | [About 04_y](notebooks/04_y.ipynb) | – | – |" in text and text.count("| lesson |") == 1
    (tmp_path / "R.md").write_text("no marks")
    with pytest.raises(ValueError, match="lessons:begin"):
        setup.write_lesson_table(tmp_path / "R.md")


# --- the setup cell -------------------------------------------------------------------------------------------------


def test_setup_cell_names_the_repository_once():
    assert setup.SETUP_CELL.count(setup.REPOSITORY) == 1
    assert setup.setup_cell("03").endswith('\nsetup.begin("03")')
    compile(setup.setup_cell("03"), "cell", "exec")


def test_badges():
    text = setup.badges("03_diffusion.ipynb")
    owner = setup.REPOSITORY.removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{owner}/main/notebooks/03_diffusion.ipynb"
    assert f"(https://kaggle.com/kernels/welcome?src={raw})" in text
    assert f"(https://colab.research.google.com/github/{owner}/blob/main/notebooks/03_diffusion.ipynb)" in text


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """An interpreter with all packages but no course: a new environment that looks into this one's packages.

    A path that arrives through a .pth file does not have its own .pth files read, so an editable install stays unseen.
    """
    folder = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder)})
    Path(site, "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return str(python)


def project_copy(folder):
    """lib, the project file and a small data folder: what a Kaggle dataset or a git repository of the course holds."""
    shutil.copytree(REPO / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__", "data", "figures"))
    for name in ("pyproject.toml", "README.md"):
        if (REPO / name).is_file():
            shutil.copy(REPO / name, folder)
    for name in ("data/models/mini", "figures"):
        (folder / name).mkdir(parents=True)
        (folder / name / "mark.txt").write_text("here")
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    source = project_copy(folder / "source")
    (source / "README.md").touch()
    build = ["wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation", str(source), "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    return next(folder.glob("*.whl"))


def run_cell(python, cwd, **environment):
    """Run the setup cell as a kernel in `cwd` would; returns (status, stdout, stderr)."""
    tell = "\nimport lib\nprint(lib.__file__, setup.data_dir(), (setup.figures_dir() / 'mark.txt').exists(), sep='|')"
    hide = ("KAGGLE", "COLAB", "LAYERS", "PYTHON", "PIP")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hide)}
    # pip of this environment counts as installed what it sees there, this very course too
    clean |= {"PIP_IGNORE_INSTALLED": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = python if isinstance(python, list) else [python]
    done = subprocess.run([*words, "-c", setup.setup_cell("00") + tell], cwd=cwd, env=clean | environment,
                          capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def found(result):
    """(lib's file, data folder, is there a figure) that the cell printed, after checking that it began the lesson."""
    status, out, err = result
    assert status == 0, err
    assert "lesson 00" in out
    module, data, figure = out.strip().splitlines()[-1].split("|")
    return Path(module), Path(data), figure == "True"


def read_only(folder, python):
    """The command that runs `python` while `folder` is mounted read-only, where mounting is allowed."""
    if shutil.which("unshare") is None:
        return [python]
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
    words = ["unshare", "-m", "sh", "-c", mount, str(folder)]
    allowed = subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return [*words, python] if allowed else [python]


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_cell_in_the_repository(bare_python):
    module, data, _ = found(run_cell(bare_python, REPO / "tests"))  # a folder below the project, nothing installed
    assert module == REPO / "lib" / "__init__.py" and data == REPO / "data"


@pytest.mark.parametrize("mount", ["layers", "datasets/someone/layers", "datasets/someone/layers/layers-in-depth-main"])
def test_cell_on_kaggle_with_the_folder(tmp_path, bare_python, mount):
    attached, working = tmp_path / "input", tmp_path / "working"
    working.mkdir()
    (attached / mount).mkdir(parents=True)
    project_copy(attached / mount)
    before = tree(attached)
    result = run_cell(read_only(attached, bare_python), working, LAYERS_KAGGLE_INPUT=str(attached),
                      KAGGLE_KERNEL_RUN_TYPE="Interactive", PYTHONDONTWRITEBYTECODE="1")
    module, data, figure = found(result)
    assert module == attached / mount / "lib" / "__init__.py" and data == attached / mount / "data" and figure
    assert "· kaggle ·" in result[1]
    assert tree(attached) == before and not list(working.iterdir())


def test_cell_on_kaggle_with_a_wheel(tmp_path, bare_python, wheel):
    attached = tmp_path / "input" / "datasets" / "someone" / "wheels"
    attached.mkdir(parents=True)
    shutil.copy(wheel, attached)
    command = read_only(tmp_path / "input", bare_python)
    result = run_cell(command, tmp_path, LAYERS_KAGGLE_INPUT=str(tmp_path / "input"), KAGGLE_KERNEL_RUN_TYPE="Batch")
    check_installed(found(result), bare_python)


def check_installed(result, python):
    """The course was installed into this environment, with its data, and alone: no torch, no numpy beside it."""
    module, data, figure = result
    site = module.parents[1]
    assert Path(python).parents[1] in module.parents
    assert data == module.parent / "data" and (data / "models" / "mini" / "mark.txt").is_file() and figure
    added = {p.name for p in site.iterdir()} - {"__pycache__", "packages.pth"}
    assert {name.split("-")[0] for name in added} == {"lib", "layers_in_depth"}
    for folder in [site / "lib", *site.glob("layers_in_depth-*")]:  # leave it bare for the next test
        shutil.rmtree(folder)


def test_cell_on_colab_with_a_wheel_address(tmp_path, bare_python, wheel):
    result = run_cell(bare_python, tmp_path, LAYERS_REPOSITORY=str(wheel), COLAB_RELEASE_TAG="r",
                      LAYERS_KAGGLE_INPUT=str(tmp_path / "none"))
    assert "· colab ·" in result[1]
    check_installed(found(result), bare_python)


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_cell_on_colab_with_a_git_address(tmp_path, bare_python):
    pytest.importorskip("hatchling", reason="building the wheel without a network needs hatchling")
    source = tmp_path / "source"
    project_copy(source)
    (source / "README.md").touch()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(source)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "content").mkdir()
    result = run_cell(bare_python, tmp_path / "content", LAYERS_REPOSITORY=f"file://{source}", COLAB_RELEASE_TAG="r",
                      LAYERS_KAGGLE_INPUT=str(tmp_path / "none"), PIP_NO_BUILD_ISOLATION="0")
    check_installed(found(result), bare_python)


def test_cell_nowhere_says_what_to_do(tmp_path, bare_python):
    status, _, err = run_cell(bare_python, tmp_path, LAYERS_KAGGLE_INPUT=str(tmp_path / "none"))
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("RuntimeError: The course's `lib` folder was not found around")
    assert "make lab" in last and "On Kaggle: add the course" in last and "On Colab" in last


def test_cell_shows_why_pip_failed(tmp_path, bare_python):
    status, out, err = run_cell(bare_python, tmp_path, COLAB_RELEASE_TAG="r", LAYERS_REPOSITORY="file:///no/such/repo",
                                LAYERS_KAGGLE_INPUT=str(tmp_path / "none"))
    assert status == 1 and "no/such/repo" in out and "RuntimeError: The course's" in err


def test_cell_is_not_fooled_by_another_lib(tmp_path, bare_python):
    (tmp_path / "working" / "lib").mkdir(parents=True)
    (tmp_path / "working" / "lib" / "__init__.py").write_text("COURSE = 'another'")
    project_copy(tmp_path / "input" / "layers")
    module, _, _ = found(run_cell(bare_python, tmp_path / "working", LAYERS_KAGGLE_INPUT=str(tmp_path / "input")))
    assert module == tmp_path / "input" / "layers" / "lib" / "__init__.py"
