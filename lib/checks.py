"""Exercise checks: `check.<name>(your_function)`, `hint(name, k)`, `reveal(name)`.

A check runs the reader's function on fresh inputs beside a reference. It says *what* differs (shape, dtype, range,
sign, scale, NaN) and names the usual mistake when it recognises one. It never raises: an untouched stub is "todo".

How a lesson adds an exercise (lessons keep theirs in lib/checks_<lesson>.py, which is found by its name):

    register(Check(
        name="double",
        reference=lambda x: 2 * x,                       # the answer
        cases=lambda g: [(torch.rand(1, 3, 4, 4, generator=g),)],   # fresh, seeded argument tuples
        wrongs=[Wrong("halved", lambda x: x / 2, "You halve the picture; the task is to double it.")],
        hints=["What is x + x?"],
        source="lib.show:over",                          # what reveal() shows; several: "a:b c:d"
        praise="The picture is twice as bright."))

A `Wrong` is recognised when its `answer` gives what the reader's function gave, on every case.
"""
import dis
import importlib
import inspect
import math
import pkgutil
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import torch

SIGNS = {"pass": "[ok]", "fail": "[not yet]", "todo": "[todo]"}
REGISTRY = {}       # name -> Check
RESULTS = {}        # name -> the last Result, so that progress() and tests can read it


class NotAttempted(Exception):
    """Raise it in a stub to say "not attempted yet"."""


@dataclass(frozen=True)
class Result:
    """Outcome of one check: status is "pass", "fail" or "todo"; mistake is the recognised Wrong's name, or ""."""
    name: str
    status: str
    message: str
    mistake: str = ""

    def __str__(self):
        body = f"{SIGNS[self.status]} {self.name}: {self.message}"
        return textwrap.fill(body, 110, subsequent_indent="    ", break_long_words=False)

    def _ipython_display_(self):
        """The check has printed its message already: a notebook should not show it twice."""


@dataclass(frozen=True)
class Wrong:
    """One usual mistake: `answer` is the mistaken implementation, `message` says what is wrong and what to look at."""
    name: str
    answer: Callable
    message: str


@dataclass(frozen=True)
class Check:
    """One exercise: see the module's docstring. Right is |answer - expected| <= tolerance * (1 + |expected|)."""
    name: str
    reference: Callable
    cases: Callable
    wrongs: Sequence[Wrong] = field(default_factory=tuple)
    hints: Sequence[str] = field(default_factory=tuple)
    source: str = ""
    praise: str = "Right."
    tolerance: float = 1e-4

    def __call__(self, function):
        """Check the reader's function; print and return a Result. Never raises."""
        RESULTS[self.name] = result = self.run(function)
        print(result)
        return result

    def run(self, function):
        """As __call__, without printing or recording."""
        if function is None or function is ...:
            return self._todo()
        if not callable(function):
            return self._fail(f"give the function itself, without calling it: check.{self.name}(your_function).")
        pairs = []
        for case in self.cases(torch.Generator().manual_seed(2024)):
            expected = self.reference(*_copy(case))
            given = _copy(case)
            try:
                answer = function(*given)
            except Exception as error:
                if isinstance(error, NotAttempted) or _raises_not_implemented(function, error):
                    return self._todo()
                return self._fail(_describe_error(error, function, self.reference))
            if answer is ... or (answer is None and _is_stub(function)):
                return self._todo()
            if not _same(given, case):
                return self._fail("your function changes its input in place, so the caller's picture is spoilt: "
                                  "work on a new tensor (avoid x *= ..., x[...] = ..., clamp_).", "in-place")
            pairs.append((case, answer, expected))
        return self._judge(pairs)

    def _judge(self, pairs):
        if all(_matches(answer, expected, self.tolerance) for _, answer, expected in pairs):
            return Result(self.name, "pass", self.praise)
        for wrong in self.wrongs:
            if all(_matches(answer, _attempt(wrong.answer, case), self.tolerance) for case, answer, _ in pairs):
                return self._fail(wrong.message, wrong.name)
        return self._fail(*next(said for _, answer, expected in pairs
                                if (said := difference(answer, expected, self.tolerance))))

    def _todo(self):
        return Result(self.name, "todo", f'not attempted yet. hint("{self.name}") helps; nothing later depends on it.')

    def _fail(self, message, mistake=""):
        return Result(self.name, "fail", message, mistake)


# ---------------------------------------------------------------- what differs

@dataclass(frozen=True)
class FittingCheck(Check):
    """A Check that also names mistakes whose shapes do not fit: they run only where all sizes are alike.

    fitting: cases of such sizes; misfits: the mistakes, tried there when no usual one was recognised.
    """
    fitting: Callable = lambda g: []
    misfits: Sequence[Wrong] = ()

    def run(self, function):
        result = super().run(function)
        if result.status != "fail" or result.mistake:
            return result
        cases = self.fitting(torch.Generator().manual_seed(7))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                             # k.T of three axes warns
            answers = [_attempt(function, case) for case in cases]
            for wrong in self.misfits:
                if all(_matches(answer, _attempt(wrong.answer, case), self.tolerance)
                       for answer, case in zip(answers, cases)):
                    return self._fail(wrong.message, wrong.name)
        return result


def _copy(thing):
    """The same inputs again: tensors, arrays, generators and containers are copied, models and the rest are shared."""
    if isinstance(thing, torch.Tensor):
        return thing.clone()
    if isinstance(thing, np.ndarray):
        return thing.copy()
    if isinstance(thing, torch.Generator):
        return torch.Generator(thing.device).set_state(thing.get_state())
    if isinstance(thing, dict):
        return {name: _copy(x) for name, x in thing.items()}
    if type(thing) in (list, tuple):
        return type(thing)(_copy(x) for x in thing)
    return thing


def _same(a, b):
    """Whether inputs are as they were (a generator may have moved on)."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return True


def _attempt(function, case):
    """A mistaken implementation's answer; None where it cannot run on this case."""
    try:
        return function(*_copy(case))
    except Exception:
        return None


def _matches(answer, expected, tolerance):
    """Same kind, shape and dtype, and values within tolerance (tuples part by part)."""
    if isinstance(expected, (tuple, list)):
        return (isinstance(answer, (tuple, list)) and len(answer) == len(expected)
                and all(_matches(a, e, tolerance) for a, e in zip(answer, expected)))
    if isinstance(expected, torch.Tensor):
        return (isinstance(answer, torch.Tensor) and answer.shape == expected.shape and answer.dtype == expected.dtype
                and torch.allclose(answer.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True))
    if isinstance(expected, (bool, str)) or expected is None:
        return type(answer) is type(expected) and answer == expected
    try:
        return abs(float(answer) - float(expected)) <= tolerance * (1 + abs(float(expected)))
    except (TypeError, ValueError):
        return False


def difference(answer, expected, tolerance=1e-4):
    """(sentence, short name) for the first thing that differs between an answer and the expected value, or None."""
    if _matches(answer, expected, tolerance):
        return None
    if isinstance(expected, (tuple, list)):
        return _tuple_difference(answer, expected, tolerance)
    if answer is None:
        return "your function returns None: is `return` missing?", "no return"
    if isinstance(answer, torch.Tensor) and answer.numel() != 1 and isinstance(expected, (int, float)):
        return f"your function gives a tensor of shape {tuple(answer.shape)}; it should give one number.", "shape"
    if not isinstance(expected, torch.Tensor):
        return f"your function gives {answer!r}, the reference {expected!r}.", "value"
    if not isinstance(answer, torch.Tensor):
        return f"your function returns {_kind(answer)}; it should return a torch tensor.", "type"
    if answer.shape != expected.shape:
        return _shape_difference(answer, expected)
    if answer.dtype != expected.dtype:
        return f"the dtype is {answer.dtype}, it should be {expected.dtype}{_dtype_help(answer)}.", "dtype"
    return _value_difference(answer.double(), expected.double(), tolerance)


def _kind(value):
    return f"{type(value).__module__.split('.')[0]}.{type(value).__name__}".removeprefix("builtins.")


def _tuple_difference(answer, expected, tolerance):
    if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
        count = f"{len(answer)} values" if isinstance(answer, (tuple, list)) else _kind(answer)
        pair = ", as in `return a, b`" if len(expected) == 2 else ""
        return f"your function returns {count}; it should return {len(expected)} values{pair}.", "count"
    for i, (a, e) in enumerate(zip(answer, expected)):
        if said := difference(a, e, tolerance):
            return f"value {i + 1} of {len(expected)}: {said[0]}", said[1]


def _dtype_help(answer):
    return ": a mask in this course is float, so end with .float()" if answer.dtype == torch.bool else ""


def _shape_difference(answer, expected):
    a, e = tuple(answer.shape), tuple(expected.shape)
    if len(a) == len(e) and a == e[:-2] + (e[-1], e[-2]):
        return f"the shape is {a}, it should be {e}: height and width are swapped.", "shape"
    if answer.numel() == expected.numel():
        return f"the shape is {a}, it should be {e}: the right number of values, in the wrong arrangement.", "shape"
    return f"the shape is {a}, it should be {e}: check which axis is which (B, C, H, W).", "shape"


def _value_difference(a, e, tolerance):
    """Sentence for two tensors of the same shape: NaN, sign, flip, scale, offset, range, else the worst place."""
    if not torch.isfinite(a).all() and torch.isfinite(e).all():
        count = int((~torch.isfinite(a)).sum())
        return (f"{count} of {a.numel()} values are NaN or infinite: is there a division by zero, or the root or "
                "logarithm of a negative number?"), "nan"
    largest = float(e[torch.isfinite(e)].abs().max()) if torch.isfinite(e).any() else 1.0    # infinity is no scale
    close = lambda x: torch.allclose(x, e, rtol=0, atol=max(tolerance, 1e-3) * max(1.0, largest))
    if close(-a):
        return "every value has the wrong sign.", "sign"
    if e.min() >= 0 and e.max() <= 1 and close(1 - a):
        return "your answer is 1 minus the right one: near and far, or inside and outside, are swapped.", "flipped"
    ratio = float((a * e).sum() / (a * a).sum().clamp_min(1e-30))
    alike = close(a)                                     # too near to tell a scale or an offset from anything else
    if not alike and ratio != 0 and close(a * ratio):
        return f"the scale is wrong: your values are {1 / ratio:.6g} times the right ones.", "scale"
    offset = float((a - e).mean())
    if not alike and close(a - offset):
        return f"your values are all {offset:+.4g} off.", "offset"
    if e.min() >= 0 and e.max() <= 1 and (a.min() < -tolerance or a.max() > 1 + tolerance):
        return f"the range is [{a.min():.3g}, {a.max():.3g}], it should stay in [0, 1].", "range"
    gap = torch.where(a == e, 0.0, (a - e).abs())        # an infinity where one belongs is right
    worst = int(gap.nan_to_num(nan=math.inf).argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
    share = float((~(gap <= tolerance)).double().mean())
    return (f"{share:.0%} of the values differ; most at {place}: yours {a.flatten()[worst]:.4g}, "
            f"right {e.flatten()[worst]:.4g}."), "value"


# ---------------------------------------------------------------- the reader's function

def _is_stub(function):
    """True when the body is only a docstring, `...`, `pass` or `return None`."""
    try:
        code = inspect.unwrap(function).__code__
        operations = {i.opname for i in dis.get_instructions(code)}
    except (AttributeError, TypeError):
        return False
    return operations <= {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP", "POP_TOP", "CACHE", "COPY_FREE_VARS"}


def _raises_not_implemented(function, error):
    """True for a stub's own `raise NotImplementedError`; torch raises that type too, for example on bool - bool."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return isinstance(error, NotImplementedError) and "NotImplementedError" in names


def _describe_error(error, function, reference):
    """One sentence about an exception in the reader's function, with the line it came from."""
    wanted = f"({', '.join(inspect.signature(reference).parameters)})"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames[1:] if f.filename == getattr(getattr(function, "__code__", None), "co_filename", "")]
    if isinstance(error, TypeError) and not inside:
        return f"your function should take {wanted} ({error})."
    where = f' in the line "{inside[-1].line}"' if inside and inside[-1].line else ""
    return f"your function stops{where} with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


# ---------------------------------------------------------------- what the lessons call

def register(item):
    """Add a Check to the registry. Raises ValueError when the name is taken."""
    if item.name in REGISTRY and REGISTRY[item.name].source != item.source:
        raise ValueError(f"There already is a check called {item.name!r}.")
    REGISTRY[item.name] = item
    return item


def _load():
    """Import lib.checks_<lesson> modules once; each registers its exercises."""
    import lib
    for module in pkgutil.iter_modules(lib.__path__, "lib."):
        if module.name.startswith("lib.checks_"):
            importlib.import_module(module.name)


def find(name):
    """The Check called `name`. Raises ValueError that lists the known names."""
    _load()
    if name not in REGISTRY:
        raise ValueError(f"No exercise is called {name!r}. Known: {', '.join(sorted(REGISTRY))}.")
    return REGISTRY[name]


class _Checks:
    """`check.<name>(function)`; Tab completes the names."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return find(name)
        except ValueError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self):
        _load()
        return sorted(REGISTRY)


check = _Checks()


def hint(name, k=1):
    """Print hint k (1, 2, ...) of an exercise."""
    item = find(name)
    if not 1 <= k <= len(item.hints):
        print(f"{name} has hints 1 to {len(item.hints)}.")
        return
    more = f'  (hint("{name}", {k + 1}) says more)' if k < len(item.hints) else f'  (reveal("{name}") shows the answer)'
    print(textwrap.fill(f"Hint {k} of {len(item.hints)}: {item.hints[k - 1]}{more}", 100, break_long_words=False))


def source_of(name):
    """The source text of the functions that answer an exercise: the answer, then where the library uses it."""
    parts = []
    for place in find(name).source.split():
        module, _, function = place.partition(":")
        text = inspect.getsource(attrgetter(function)(importlib.import_module(module)))
        parts.append(f"# {place.replace(':', '.')}\n{textwrap.dedent(text)}")
    return "\n\n".join(parts)


def reveal(name):
    """Show the library's own source for an exercise."""
    text = source_of(name)
    try:
        from IPython import get_ipython
        from IPython.display import Code, display
    except ImportError:
        get_ipython = lambda: None
    if get_ipython() is None:
        print(text)
    else:
        display(Code(text, language="python"))


def progress():
    """Print one line for each exercise tried in this session."""
    for name, result in RESULTS.items():
        print(f"{SIGNS[result.status]:<10} {name}")
    done = sum(result.status == "pass" for result in RESULTS.values())
    print(f"{done} of {len(RESULTS)} exercises solved in this session.")
