"""Nothing is fetched and nothing is written into the course: lesson 00 as on Kaggle without internet.

The network namespace has only the loopback device.
"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import setup
from test_setup import bare_python, read_only, tree  # noqa: F401 (bare_python is a fixture)

REPO = Path(__file__).resolve().parents[1]

# Jupyter's kernel talks over 127.0.0.1, and a new namespace starts with its loopback down. `ip link set lo up` would
# do, but iproute2 is not everywhere: SIOCGIFFLAGS, set IFF_UP, SIOCSIFFLAGS.
LOOPBACK_UP = """
import fcntl, os, socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
flags = struct.unpack("16sh", fcntl.ioctl(s, 0x8913, struct.pack("16sh", b"lo", 0)))[1]
fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", flags | 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def offline():
    """The words that run a command with loopback only; skips where this machine does not allow a new namespace."""
    if shutil.which("unshare") is None:
        pytest.skip("needs util-linux's unshare (Linux)")
    for way in (["unshare", "-n"], ["unshare", "-rn"]):  # as root, or as a user where user namespaces are allowed
        words = [*way, sys.executable, "-c", LOOPBACK_UP]
        if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    pytest.skip("this machine does not allow new network namespaces")


def fresh_environment(folder):
    """The environment without offline switches and proxies, its caches in an empty folder."""
    hide = ("HF_", "TRANSFORMERS_", "TORCH_HOME", "HTTP", "http", "ALL_PROXY", "all_proxy", "KAGGLE", "COLAB",
            "LAYERS", "PYTHON")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(hide)}
    return clean | {"HF_HOME": str(folder / "hf"), "TORCH_HOME": str(folder / "torch"),
                    "XDG_CACHE_HOME": str(folder / "cache")}


def test_the_namespace_has_loopback_and_nothing_else(offline):
    """The test below proves something only if addresses outside cannot be reached and 127.0.0.1 can."""
    probe = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=5)
try:
    socket.create_connection(("192.0.2.1", 443), timeout=5)
except OSError as error:
    print(type(error).__name__, error.errno)
"""
    done = subprocess.run([*offline, sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == ["OSError", "101"], done.stdout + done.stderr  # ENETUNREACH


@pytest.mark.slow
def test_lesson_00_on_kaggle_without_internet(offline, tmp_path, bare_python):
    """The course attached as a read-only dataset, not installed; the notebook elsewhere; empty caches; no network."""
    (lesson,) = [path for path in setup.lessons() if path.name.startswith("00")]
    course, working = tmp_path / "input" / "datasets" / "someone" / "layers-in-depth", tmp_path / "working"
    working.mkdir()
    for name in ("lib", "data", "figures"):
        shutil.copytree(REPO / name, course / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", course)
    shutil.copy(lesson, working)
    subprocess.run([bare_python, "-m", "ipykernel", "install", "--sys-prefix", "--name", "python3"], check=True,
                   capture_output=True)
    run = ["-m", "papermill", lesson.name, "done.ipynb", "-p", "SMOKE", "True", "-k", "python3",
           "--execution-timeout", "300", "--no-progress-bar"]
    place = {"LAYERS_KAGGLE_INPUT": str(tmp_path / "input"), "KAGGLE_KERNEL_RUN_TYPE": "Batch",
             "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    before = tree(course)
    done = subprocess.run([*offline, *read_only(tmp_path / "input", bare_python), *run], cwd=working,
                          env=fresh_environment(tmp_path) | place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert tree(course) == before, "the lesson wrote into the course's folder"
    text = (working / "done.ipynb").read_text(encoding="utf8")
    assert "\u00b7 kaggle \u00b7" in text or "· kaggle ·" in text
    assert not list((tmp_path / "hf").rglob("*.safetensors")), "weights were fetched"
