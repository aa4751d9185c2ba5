"""What every lesson has in common, beyond the form of every notebook (tests/test_notebooks.py)."""
import importlib
import re

import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib import checks, setup, show

LESSONS = setup.lessons()
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=[path.name[:2] for path in LESSONS])
LINES, WIDTH = {"00": 13, "01": 14, "02": 15, "03": 15, "04": 16, "14": 17, "15": 15}, {"02": 122, "04": 122}   # of a code cell
PARAMETERS = {"15": 32}    # a batch has many: one line each
RESULT = r"show\.(pictures|depth|table)\(|plt\.subplots|_explorer\(|depth_threshold\("


def cells_of(path, kind=None):
    return [c for c in nbformat.read(path, as_version=4).cells if kind in (None, c.cell_type)]


def words_of(path):
    return "\n".join(c.source for c in cells_of(path, "markdown"))


@each_lesson
def test_every_result_has_a_line_on_what_to_notice(path):
    """Each code cell that shows pictures is followed by such a line before the next section."""
    cells = cells_of(path)
    for i, cell in enumerate(cells):
        if cell.cell_type == "code" and re.search(RESULT, cell.source):
            rest = []
            for later in cells[i + 1:]:
                if later.cell_type == "markdown" and re.match(r"## ", later.source):
                    break
                rest.append(later.source)
            assert any("What to notice" in text for text in rest), f"cell {cell.id} has no line on what to notice"


@each_lesson
def test_cells_are_short_and_named(path):
    number = path.name[:2]
    for cell in cells_of(path, "code"):
        assert re.fullmatch(r"[a-z][a-z0-9-]+", cell.id)
        if cell.id != "setup":
            lines = cell.source.splitlines()
            most = PARAMETERS.get(number) if cell.id == "parameters" else None
            assert len(lines) <= (most or LINES.get(number, 14)), f"cell {cell.id} is long"
            assert max(map(len, lines)) <= WIDTH.get(number, 126), f"cell {cell.id} has a long line"


@each_lesson
def test_stored_pictures_exist_have_words_and_are_small(path):
    code = "\n".join(c.source for c in cells_of(path, "code"))
    names = re.findall(r'show\.figure\("(.+?)", alt="', code)
    assert names and len(names) == code.count("show.figure("), "a picture has no words (alt) for who cannot see it"
    for name in names:
        assert name.startswith(path.name[:2])
        picture = setup.figures_dir() / f"{name}.png"
        assert picture.is_file(), f"{picture.name} is missing: make figures"
        assert picture.stat().st_size <= show.MAX_FIGURE_BYTES


@each_lesson
def test_exercises_and_questions(path):
    words = words_of(path)
    heads = re.findall(r"^### Exercise (\d) · .+\((\d+) minutes, (easy|medium|hard).*\)$", words, re.M)
    assert [head[0] for head in heads] == [str(k + 1) for k in range(len(heads))] and 3 <= len(heads) <= 5
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", words, re.S)) >= 3
    assert "**Errata.**" in words and "**(!)**" in words


# ---------------------------------------------------------------- exercises (wrong answers: tests/test_checks.py)
def exercises():
    """(path, cell, name, right answer) of all lessons; the right ones stand in ANSWERS of tests/test_lessonNN.py."""
    for path in LESSONS:
        answers = importlib.import_module(f"test_lesson{path.name[:2]}").ANSWERS
        cells = {c.id: c.source for c in cells_of(path, "code")}
        for number, (name, answer) in enumerate(answers.items(), 1):
            right = answer if isinstance(answer, str) else answer[0]
            yield pytest.param(cells[f"ex{number}-code"], name, right, id=f"{path.name[:2]}-{name}")


each_exercise = pytest.mark.parametrize("cell, name, right", exercises())
GIVEN = dict(check=checks.check, hint=checks.hint, reveal=checks.reveal, torch=torch, np=np, F=F)


@each_lesson
def test_every_exercise_has_a_right_answer_here(path):
    answers = importlib.import_module(f"test_lesson{path.name[:2]}").ANSWERS
    cells = [c for c in cells_of(path, "code") if re.fullmatch(r"ex\d-code", c.id)]
    assert len(cells) == len(answers)


@each_exercise
def test_untouched_exercise_says_not_attempted_yet(cell, name, right, capsys):
    exec(cell, dict(GIVEN))
    assert f"[todo] {name}: not attempted yet" in capsys.readouterr().out
    assert checks.RESULTS[name].status == "todo"


@each_exercise
def test_a_right_answer_written_into_the_cell_passes(cell, name, right, capsys):
    assert cell.count("    ...\n") == 1
    exec(cell.replace("    ...\n", f"    {right}\n"), dict(GIVEN))
    assert f"[ok] {name}" in capsys.readouterr().out
