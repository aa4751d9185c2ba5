"""Lesson 00: its form beyond the common one, its pictures, its exercises, and its promises."""
import re
from pathlib import Path

import nbformat
import torch

from lib import checks, scenes, setup, show, widgets

PATH = Path(__file__).resolve().parents[1] / "notebooks" / "00_start_here.ipynb"
LESSON = nbformat.read(PATH, as_version=4)
CODE = {c.id: c.source for c in LESSON.cells if c.cell_type == "code"}
WORDS = "\n".join(c.source for c in LESSON.cells if c.cell_type == "markdown")
ANSWERS = {"metres_to_depth": "return ((z - near) / (far - near)).clamp(0, 1)",
           "foreground_mask": "return (depth < d).float()",
           "paste_at_depth": "a = layer[:, 3:] * (depth >= at)\n"
                             "    return layer[:, :3] * a + image * (1 - a)"}
GLOSSARY = {"zero-shot": "không cần huấn luyện lại", "diffusion model": "mô hình khuếch tán",
            "depth-aware": "nhận biết độ sâu", "occlusion": "sự che khuất",
            "inpainting / image completion": "vẽ bù, điền khuyết", "latent space": "không gian tiềm ẩn",
            "self-attention": "cơ chế tự chú ý", "feature injection": "tiêm đặc trưng",
            "data parallelism": "song song dữ liệu",
            "foreground / background layer": "lớp tiền cảnh / hậu cảnh"}


def test_glossary_is_complete_in_both_languages():
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+\S \|$", WORDS, re.M))
    assert {k: rows.get(k) for k in GLOSSARY} == GLOSSARY


def test_the_parts_of_a_lesson_are_there():
    order = ["**You will be able to**", "**Before this**", "**Minutes**", "**On a GPU**", "Settings",
             "Meet the Miniature", "One depth-aware edit", "one threshold", "Your turn",
             "Words of this course", "Recap", "The same with Stable Diffusion", "Further reading",
             "**Errata.**"]
    places = [WORDS.index(part) for part in order]
    assert places == sorted(places)
    assert len(re.findall(r"<details><summary>.+?</summary>.+?</details>", WORDS, re.S)) == 3
    assert "**(!)**" in WORDS


def test_the_figures_show_the_lessons_own_case():
    parameters = setup.notebook_parameters(PATH)
    assert {k: parameters[k] for k in widgets.EXAMPLE} == widgets.EXAMPLE
    assert scenes.split_of(parameters["SCENE"]) == "test"
    thing = re.search(r"scenes\.Thing\((.+?)\)", CODE["scene"]).group(0)
    here, stored = eval(thing, {"scenes": scenes}), widgets.example()[1].things[-1]
    assert here.__dict__ | {"z": 0} == stored.__dict__ | {"z": 0}


def test_the_case_keeps_its_promises():
    """A chair behind the table: partly hidden, a shadow of at least 4 % of the picture, other light given."""
    room, whole, index, cutout = widgets.example()
    r = scenes.render([room, whole])
    assert "table in front of a red chair" in whole.caption()
    visible = r.ids[1:] == index
    alone = scenes.only(whole, index)
    hidden = (alone[:, 3:] > 0.5) & ~visible
    assert 0.1 < hidden.sum() / (alone[:, 3:] > 0.5).sum() < 0.5
    shadow = ((r.rgb[1:] - r.rgb[:1]).abs().mean(1, keepdim=True) > 0.03) & ~visible
    assert shadow.float().mean() >= 0.04
    solid = (alone[:, 3:] == 1).expand(-1, 3, -1, -1)
    assert (cutout[:, :3] - alone[:, :3])[solid].abs().mean() > 0.05


def run_cell(name, **names):
    space = {"check": checks.check, "hint": checks.hint, "reveal": checks.reveal, **names}
    exec(CODE[name], space)
    return space


def test_the_d_of_the_text_separates_table_and_chair():
    """At 0.33 nearly all of the table is foreground and the chair is not; at 0.38 the chair is cut."""
    _, whole, index, _ = widgets.example()
    r = scenes.render(whole)
    share = lambda d, i: (scenes.to_depth01(r.depth) < d)[r.ids == i].float().mean()
    assert share(0.33, 1 - index) > 0.9 and share(0.33, index) < 0.01
    assert share(0.38, 1 - index) > 0.99 and 0.3 < share(0.38, index) < 0.8


def test_edit_strip_runs_on_any_pipeline():
    from lib import train
    images, labels = widgets.edit_strip(train.tiny_pipeline(), steps=2)
    assert len(images) == len(labels) == 6 and all(x.shape[-2:] == (128, 128) for x in images)
    assert all(torch.isfinite(x).all() for x in images)


def test_map_links_only_lessons_that_exist():
    for name in re.findall(r"\]\((.+?)\)", show.course_map().data):
        assert (PATH.parent / name).is_file()
