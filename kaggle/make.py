"""Write what the Kaggle command line needs into build/kaggle: one folder to push, one to upload.

    python kaggle/make.py USER                                 the lesson as it is, on the course's own film
    python kaggle/make.py USER --data me/frames -p INPUT frames -p MODEL sd15 --internet
    python kaggle/make.py USER --data me/frames -p INPUT frames --session 2     the same job goes on
    python kaggle/make.py USER --wheels              also fetch wheels.txt (needs a network here, not there)

It prints the commands to type next. Nothing is sent from here.
"""
from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from lib import kaggle as lessons  # noqa: E402
from lib import setup  # noqa: E402


def kernel(folder: Path, user: str, parameters=(), data=(), session=1, internet=False, models=()) -> Path:
    """The folder for `kaggle kernels push`: the lesson with its parameters, and its metadata."""
    _check_names(user, data, session)
    meta = json.loads((HERE / "kernel-metadata.json").read_text())
    notebook = ROOT / "notebooks" / meta["code_file"]
    known = setup.notebook_parameters(notebook)
    given = {name: setup._typed(value, known.get(name, "")) for name, value in parameters}
    given = {"JOB_ONLY": True, **given}
    lessons.check_parameters(known | given)                       # here, and not after a push and a wait
    slug = meta["id"].split("/")[1]
    meta["id"], meta["title"] = f"{user}/{_numbered(slug, session)}", _numbered(meta["title"], session, " ")
    meta["kernel_sources"] = [f"{user}/{_numbered(slug, n)}" for n in range(1, session)]
    meta["dataset_sources"] = [s.replace("USER", user) for s in meta["dataset_sources"]] + list(data)
    meta["model_sources"], meta["enable_internet"] = list(models), internet
    folder.mkdir(parents=True, exist_ok=True)
    setup.run_notebook(notebook, folder / notebook.name, given, prepare_only=True)
    (folder / "kernel-metadata.json").write_text(json.dumps(meta, indent=1) + "\n")
    return folder


def _check_names(user, data, session):
    """ValueError for names that `push` would refuse, or read as others."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", user):
        raise ValueError(f"USER is your name in Kaggle's addresses (letters, digits, -), not {user!r}.")
    for name in data:
        if name.count("/") != 1:
            raise ValueError(f"--data wants OWNER/SLUG, as in the dataset's address; it got {name!r}.")
    if session < 1:
        raise ValueError(f"--session counts from 1; it is {session}.")


def _numbered(name, session, gap="-"):
    return name if session == 1 else f"{name}{gap}{session}"


def dataset(folder: Path, user: str, wheels=False) -> Path:
    """The folder for `kaggle datasets create`: the course as one wheel (lib, models, figures), and wheels of
    what the image may lack. Without internet on Kaggle this is how the course gets there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT), "-w", str(folder)]
    subprocess.run(build, check=True)
    if wheels:
        target = ["--only-binary=:all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64",
                  "--platform", "manylinux2014_x86_64"]
        wanted = ["-r", str(HERE / "wheels.txt"), "-d", str(folder)]
        subprocess.run([*pip, "download", "--quiet", "--no-deps", *target, *wanted], check=True)
    text = (HERE / "dataset-metadata.json").read_text().replace("USER", user)
    (folder / "dataset-metadata.json").write_text(text)
    return folder


def main(words=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("user", help="your name on Kaggle, as in its addresses")
    parser.add_argument("-p", dest="parameter", nargs=2, action="append", default=[],
                        metavar=("NAME", "VALUE"))
    attach = dict(action="append", default=[], metavar="OWNER/SLUG")
    parser.add_argument("--data", **attach, help="a dataset to attach; may be repeated")
    parser.add_argument("--model", **attach, help="a Kaggle model to attach, by its whole name")
    parser.add_argument("--session", type=int, default=1, help="2: attach session 1's output and go on")
    parser.add_argument("--internet", action="store_true", help="let the notebook use it, for weights (sd15)")
    parser.add_argument("--wheels", action="store_true", help="put wheels of wheels.txt into the dataset")
    parser.add_argument("--no-dataset", action="store_true", help="the dataset is there already")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "kaggle")
    args = parser.parse_args(words)
    try:
        pushed = kernel(args.to / "kernel", args.user, args.parameter, args.data, args.session, args.internet,
                        args.model)
        if not args.no_dataset:
            folder = dataset(args.to / "dataset", args.user, args.wheels)
            print(f"kaggle datasets create -p {folder}"
                  f"      # again: kaggle datasets version -m new -p {folder}")
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    name = json.loads((pushed / "kernel-metadata.json").read_text())["id"]
    print(f"kaggle kernels push -p {pushed}", f"kaggle kernels status {name}",
          f"kaggle kernels output {name} -p out", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
