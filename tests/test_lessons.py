"""What every lesson has in common, beyond the form of every notebook (tests/test_notebooks.py)."""
import re

import nbformat
import pytest

from lib import setup, show

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
