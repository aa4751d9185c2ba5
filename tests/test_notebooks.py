"""The form of every notebook, and a run of lesson 00 with other parameters.

`make test` also runs each notebook untouched, in build/notebooks, where every cell is a test of its own (nbval).
"""
import copy
import re

import nbformat
import pytest

from lib import setup

NOTEBOOKS = setup.notebooks()
IDS = [path.name for path in NOTEBOOKS]


def faults(notebook, name):
    """What is wrong with the form of this notebook, as sentences; [] when nothing is."""
    code = [c for c in notebook.cells if c.cell_type == "code"]
    lesson = name[:2] if name[:2].isdigit() else name.removesuffix(".ipynb")
    head = notebook.cells[0]
    title, _, below = head.source.partition("\n")
    known, after = parameters(notebook)
    ids = [c.get("id") for c in notebook.cells]
    checks = {
        "nbformat is not 4.5": (notebook.nbformat, notebook.nbformat_minor) == (4, 5),
        "kernelspec is not python3": notebook.metadata.get("kernelspec", {}).get("name") == "python3",
        "papermill finds no language": notebook.metadata.get("kernelspec", {}).get("language") == "python",
        "cell ids are missing or repeated": None not in ids and len(set(ids)) == len(ids),
        "a cell keeps outputs": not any(c.get("outputs") or c.get("execution_count") for c in code),
        "widget state is kept": "widgets" not in notebook.metadata,
        "the first cell is no title": head.cell_type == "markdown" and re.match(r"# \S", title),
        "the badges do not follow the title": below.lstrip("\n").startswith(setup.badges(name)),
        "the first code cell is not the setup cell": code and code[0].source == setup.setup_cell(lesson),
        "the setup cell is not folded": code and code[0].metadata.get("jupyter", {}).get("source_hidden"),
        "MODEL, SEED, SMOKE do not stand at the top of the parameters": list(known or {})[:3] == ["MODEL", "SEED", "SMOKE"],
        "SMOKE is not False": (known or {}).get("SMOKE", True) is False,
        "setup.configure(MODEL, SEED, SMOKE) does not follow the parameters": "setup.configure(MODEL, SEED, SMOKE" in after,
        "the device is chosen by hand": not any(re.search(r"\.cuda\(|to\(.cuda", c.source) for c in code),
        "a picture is linked by its path": not any("](figures/" in c.source or "](../figures/" in c.source
                                                   for c in notebook.cells),
    }
    return [fault for fault, fine in checks.items() if not fine]


def parameters(notebook):
    """(the parameters, the source of the next code cell); (None, "") without a usable parameters cell."""
    code = [c for c in notebook.cells if c.cell_type == "code"]
    at = [i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", [])]
    if len(at) != 1 or at[0] + 1 >= len(code):
        return None, ""
    try:
        return setup._literals(code[at[0]].source, setup.Path("notebook")), code[at[0] + 1].source
    except ValueError:
        return None, ""


def test_lesson_00_is_there():
    assert [path.name[:2] for path in setup.lessons()][:1] == ["00"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook, path.name) == []
    assert path.stat().st_size < 900_000, "Kaggle takes notebooks of less than 1 MB"


def good():
    """A small notebook in good form."""
    cell = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n" + setup.badges("03_x.ipynb") + "\n\nPromise."),
        cell(setup.setup_cell("03"), metadata={"jupyter": {"source_hidden": True}}),
        cell('MODEL = "mini"\nSEED = 0\nSMOKE = False\nDEPTH = 0.5', metadata={"tags": ["parameters"]}),
        cell("run = setup.configure(MODEL, SEED, SMOKE)"),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})


def edit(path, value):
    """A change of one place of a notebook, for the list below: 'cells.1.source' and so on."""
    def change(notebook):
        *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        place = notebook
        for step in way:
            place = place[step]
        place[last] = value(place[last]) if callable(value) else value
    return change


@pytest.mark.parametrize("fault, change", [
    ("nbformat is not 4.5", edit("nbformat_minor", 4)),
    ("kernelspec is not python3", edit("metadata.kernelspec.name", "my-env")),
    ("papermill finds no language", lambda n: n.metadata.kernelspec.pop("language")),
    ("cell ids are missing or repeated", lambda n: n.cells[1].update(id=n.cells[0].id)),
    ("a cell keeps outputs", edit("cells.3.execution_count", 4)),
    ("a cell keeps outputs", edit("cells.3.outputs", [nbformat.v4.new_output("stream", text="x")])),
    ("widget state is kept", lambda n: n.metadata.update(widgets={})),
    ("the first cell is no title", edit("cells.0.source", lambda s: s[1:])),
    ("the badges do not follow the title", edit("cells.0.source", lambda s: s.replace("03_x", "04_x"))),
    ("the badges do not follow the title", edit("cells.0.source", lambda s: s.replace("\n\n", "\n\nText.\n\n", 1))),
    ("the first code cell is not the setup cell", edit("cells.1.source", lambda s: s.replace('"03"', '"04"'))),
    ("the first code cell is not the setup cell", edit("cells.1.source", lambda s: s.replace("Kaggle", "kaggle", 1))),
    ("the setup cell is not folded", edit("cells.1.metadata", nbformat.NotebookNode())),
    ("MODEL, SEED, SMOKE do not stand at the top of the parameters", edit("cells.2.source", "SMOKE = False")),
    ("MODEL, SEED, SMOKE do not stand at the top of the parameters", edit("cells.2.metadata.tags", [])),
    ("SMOKE is not False", edit("cells.2.source", lambda s: s.replace("False", "True"))),
    ("setup.configure(MODEL, SEED, SMOKE) does not follow the parameters", edit("cells.3.source", "x = 1")),
    ("the device is chosen by hand", edit("cells.3.source", lambda s: s + "\nx.cuda()")),
    ("a picture is linked by its path", edit("cells.0.source", lambda s: s + "\n![x](../figures/a.png)")),
])
def test_a_fault_in_the_form_is_found(fault, change):
    notebook = good()
    assert faults(notebook, "03_x.ipynb") == []
    broken = copy.deepcopy(notebook)
    change(broken)
    assert fault in faults(broken, "03_x.ipynb")


def test_setup_cells_are_one_text():
    texts = {nbformat.read(path, 4).cells[1].source.split("setup.begin")[0] for path in NOTEBOOKS}
    assert texts == {setup.SETUP_CELL}


@pytest.mark.slow
def test_lesson_00_runs_with_other_parameters(tmp_path):
    (lesson,) = [path for path in setup.lessons() if path.name.startswith("00")]
    out = setup.run_notebook(lesson, tmp_path / "00.ipynb", {"SMOKE": True, "SEED": 3}, timeout=300)
    cells = nbformat.read(out, 4).cells
    (injected,) = [c for c in cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "SEED = 3" in injected.source and "SMOKE = True" in injected.source
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures, "the executed lesson shows no picture"
    with pytest.raises(ValueError, match="has no parameter SEEED"):
        setup.run_notebook(lesson, tmp_path / "x.ipynb", {"SEEED": 3})
