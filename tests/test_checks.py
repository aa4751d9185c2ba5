"""The check machinery: references pass, every typical wrong answer gets its own message, stubs are "todo"."""
import math
import re

import numpy as np
import pytest
import torch

from lib import checks
from lib.checks import Check, NotAttempted, Wrong, check, difference, hint, reveal

checks._load()
NAMES = sorted(checks.REGISTRY)
WRONGS = [(name, wrong) for name in NAMES for wrong in checks.REGISTRY[name].wrongs]


@pytest.mark.parametrize("name", NAMES)
def test_reference_passes(name, capsys):
    item = checks.find(name)
    result = getattr(check, name)(item.reference)
    assert result.status == "pass" and result.message == item.praise
    assert "[ok]" in capsys.readouterr().out and checks.RESULTS[name] is result


@pytest.mark.parametrize("name, wrong", WRONGS, ids=[f"{n}-{w.name}" for n, w in WRONGS])
def test_each_wrong_answer_gets_its_own_message(name, wrong, capsys):
    result = getattr(check, name)(wrong.answer)
    assert (result.status, result.mistake, result.message) == ("fail", wrong.name, wrong.message)
    assert "[not yet]" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_every_check_is_complete(name):
    item = checks.find(name)
    assert len(item.wrongs) >= 4 and len({w.message for w in item.wrongs}) == len(item.wrongs)
    assert len(item.hints) == 3 and item.praise.endswith(".")
    assert "def " in checks.source_of(name)


def docstring_only(x):
    """Your turn."""


def dots(x):
    ...


def passes(x):
    pass


def returns_dots(x):
    answer = ...
    return answer


def raises_not_attempted(x):
    raise NotAttempted


def raises_not_implemented(x):
    raise NotImplementedError("exercise")


@pytest.mark.parametrize("stub", [docstring_only, dots, passes, returns_dots, raises_not_attempted,
                                  raises_not_implemented, lambda x: None, lambda x: ..., None, ...])
@pytest.mark.parametrize("name", NAMES)
def test_untouched_stub_is_todo(name, stub):
    count = checks.find(name).reference.__code__.co_argcount
    if callable(stub):
        one = stub
        stub = type(one)(one.__code__, {"NotAttempted": NotAttempted})       # a fresh copy, whatever its arguments
        result = Check("t", lambda x: x, lambda g: [(torch.ones(1),)]).run(stub)
    else:
        result = checks.find(name).run(stub)
    assert count >= 1 and result.status == "todo" and "not attempted yet" in result.message


def simple(reference=lambda x: x * 0.5, **options):
    """A check of one tensor with values in [0.05, 1.05)."""
    return Check("simple", reference, lambda g: [(torch.rand(1, 3, 4, 6, generator=g) + 0.05,)], **options)


@pytest.mark.parametrize("function, mistake, words", [
    (lambda x: (x * 0.5).numpy(), "type", "numpy.ndarray"),
    (lambda x: 3, "type", "int"),
    (lambda x: (x * 0.5)[0], "shape", r"\(3, 4, 6\), it should be \(1, 3, 4, 6\)"),
    (lambda x: (x * 0.5).transpose(-1, -2), "shape", "height and width are swapped"),
    (lambda x: (x * 0.5).flatten(), "shape", "wrong arrangement"),
    (lambda x: (x * 0.5).double(), "dtype", "float64"),
    (lambda x: x > 0.5, "dtype", "float"),
    (lambda x: x / 0, "nan", "division by zero"),
    (lambda x: -x * 0.5, "sign", "wrong sign"),
    (lambda x: 1 - x * 0.5, "flipped", "1 minus"),
    (lambda x: x * 127.5, "scale", "255 times"),
    (lambda x: x * 0.5 + 0.25, "offset", r"\+0.25"),
    (lambda x: (x - 0.6) ** 3 * 9, "range", r"\[0, 1\]"),
    (lambda x: x * x * 0.5, "value", "of the values differ; most at"),
])
def test_generic_differences_are_named(function, mistake, words):
    result = simple().run(function)
    assert result.status == "fail" and result.mistake == mistake
    assert re.search(words, result.message), result.message


def test_errors_in_the_answer_are_reported_not_raised():
    assert "should take (x)" in simple().run(lambda: 1).message
    def broken(x):
        return x.no_such_method()
    message = simple().run(broken).message
    assert "AttributeError" in message and "no_such_method" in message
    def wrong_shapes(x):
        return x @ torch.ones(5, 5)
    assert "RuntimeError" in simple().run(wrong_shapes).message
    def forgot(x):
        y = x * 0.5
        y + 1
    assert "return" in simple().run(forgot).message
    assert "without calling it" in simple().run(torch.ones(1)).message


def test_torch_not_implemented_is_not_a_stub():
    result = simple().run(lambda x: 1 - (x > 0.5))               # torch refuses to subtract a bool tensor
    assert result.status == "fail" and "bool" in result.message


def test_changing_the_input_in_place_is_refused():
    result = simple().run(lambda x: x.mul_(0.5))
    assert result.status == "fail" and result.mistake == "in-place"


def test_inputs_of_every_kind_are_copied_for_each_call():
    """Reference and reader see the same numbers, also from a generator, a list, a dictionary or an array."""
    def case(g):
        return [(torch.Generator().manual_seed(1), [torch.ones(2)], {"w": np.ones(2)})]

    def right(g, tensors, arrays):
        return torch.rand(2, generator=g) + tensors[0] + float(arrays["w"].sum())
    assert Check("c", right, case).run(right).status == "pass"

    def spoils_the_list(g, tensors, arrays):
        tensors[0] += 1
        return right(g, tensors, arrays)

    def spoils_the_array(g, tensors, arrays):
        arrays["w"] *= 2
        return right(g, tensors, arrays)
    for spoils in (spoils_the_list, spoils_the_array):
        assert Check("c", right, case).run(spoils).mistake == "in-place"


def test_tolerance_grows_with_the_value():
    big = Check("b", lambda x: x * 1e6, lambda g: [(torch.rand(4, generator=g),)])
    assert big.run(lambda x: x * (1e6 + 1)).status == "pass" and big.run(lambda x: x * 1.01e6).status == "fail"


def test_a_wrong_answer_must_match_on_every_case():
    item = Check("two", lambda x: x + 1, lambda g: [(torch.zeros(3),), (torch.rand(3, generator=g),)],
                 wrongs=[Wrong("double", lambda x: 2 * x + 2, "You doubled it.")])
    assert item.run(lambda x: 2 * x + 2).mistake == "double"
    halved = item.run(lambda x: x / 2 + 2)                      # equals 2 * x + 2 on the first case only
    assert halved.status == "fail" and halved.mistake != "double"


def test_a_mistake_that_cannot_run_is_skipped():
    item = simple(wrongs=[Wrong("impossible", lambda x: x.nothing(), "Never said.")])
    assert item.run(lambda x: x).mistake == "scale"


def test_tuples_and_numbers():
    assert difference((torch.ones(2), 1.0), (torch.ones(2), 1.0)) is None
    assert "value 2 of 2" in difference((torch.ones(2), 3.0), (torch.ones(2), 1.0))[0]
    assert "2 values" in difference(torch.ones(2), (torch.ones(2), 1.0))[0]
    assert difference(torch.tensor(0.5), 0.5) is None and difference(np.float64(0.5), 0.5) is None
    assert difference("near", 0.5)[1] == "value" and difference(True, False)[1] == "value"
    assert difference(torch.ones(2, 3), 0.5) == ("your function gives a tensor of shape (2, 3); it should give one number.", "shape")


def test_a_small_difference_is_not_called_a_scale():
    right = torch.linspace(-2, 2, 50)
    assert difference(right + 1e-3 * torch.sin(9 * right), right)[1] == "value"
    assert difference(1.01 * right, right)[1] == "scale" and difference(right + 0.01, right)[1] == "offset"


def test_an_infinity_where_one_belongs_is_right():
    right = torch.tensor([math.inf, 1.0, 2.0])
    said, _ = difference(torch.tensor([math.inf, 1.0, 3.0]), right)
    assert said.startswith("33%") and "(2,): yours 3, right 2" in said
    assert "(0,): yours 5, right inf" in difference(torch.tensor([5.0, 1.0, 2.0]), right)[0]
    assert "(0,): yours -inf, right inf" in difference(torch.tensor([-math.inf, 1.0, 2.0]), right)[0]    # no sign


def test_hints_and_reveal(capsys):
    hint("foreground_mask")
    assert "Hint 1 of 3" in capsys.readouterr().out
    hint("foreground_mask", 3)
    assert "reveal" in capsys.readouterr().out
    hint("foreground_mask", 9)
    assert "hints 1 to 3" in capsys.readouterr().out
    reveal("foreground_mask")
    assert "depth < d" in capsys.readouterr().out


def test_unknown_names_list_the_known_ones():
    with pytest.raises(AttributeError, match="foreground_mask"):
        check.nonsense
    with pytest.raises(ValueError, match="Known: "):
        hint("nonsense")
    assert "foreground_mask" in dir(check)


def test_a_name_is_taken_only_once():
    with pytest.raises(ValueError, match="already"):
        checks.register(Check("foreground_mask", lambda: 1, lambda g: [], source="lib.other:thing"))


def test_progress_counts(capsys):
    checks.RESULTS.clear()
    check.foreground_mask(checks.find("foreground_mask").reference)
    check.metres_to_depth(None)
    capsys.readouterr()
    checks.progress()
    assert "1 of 2 exercises solved" in capsys.readouterr().out


def test_a_result_is_shown_once_in_a_notebook():
    from IPython.core.formatters import DisplayFormatter
    from IPython.core.interactiveshell import InteractiveShell
    formatter = InteractiveShell.instance().display_formatter
    assert isinstance(formatter, DisplayFormatter)
    assert formatter.format(checks.Result("a", "pass", "Right.")) == ({}, {})


def test_the_answers_agree_with_the_library():
    """Lesson 00's answers are the library's own conventions."""
    from lib import scenes
    from lib import deglad, depth, featglac, train
    g = torch.Generator().manual_seed(3)
    z = torch.rand(1, 1, 128, 128, generator=g) * 12 + 0.1
    ours = checks.find("metres_to_depth").reference(z, scenes.NEAR, scenes.FAR)
    theirs = depth.from_metric(z, near=scenes.NEAR, far=scenes.FAR)
    assert torch.allclose(ours, scenes.to_depth01(z)) and torch.allclose(ours, theirs.values, atol=1e-6)
    assert torch.equal(checks.find("foreground_mask").reference(ours, 0.5), deglad.nearer(theirs, 0.5))
    image, layer = (torch.rand(1, c, 128, 128, generator=g) for c in (3, 4))
    edit = featglac.insert_object(train.tiny_pipeline(), image, theirs, layer, "", 0.5, mechanism="alpha")
    ours = checks.find("paste_at_depth").reference(image, theirs.values, layer, 0.5)
    assert torch.allclose(ours, edit.image, atol=1e-6)
