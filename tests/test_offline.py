"""Nothing is fetched: lesson 00 in a network namespace that has only the loopback device, with empty caches."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib import setup

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
    hide = ("HF_", "TRANSFORMERS_", "TORCH_HOME", "HTTP", "http", "ALL_PROXY", "all_proxy", "KAGGLE", "COLAB", "LAYERS")
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
def test_lesson_00_needs_no_network(offline, tmp_path):
    (lesson,) = [path for path in setup.lessons() if path.name.startswith("00")]
    out = tmp_path / "00.ipynb"
    run = ["-m", "lib.setup", "run", str(lesson), str(out), "-p", "SMOKE", "True", "--timeout", "300"]
    done = subprocess.run([*offline, sys.executable, *run], cwd=REPO, env=fresh_environment(tmp_path),
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.is_file()
    fetched = [p for p in (tmp_path / "hf").rglob("*.safetensors")] if (tmp_path / "hf").exists() else []
    assert fetched == []
