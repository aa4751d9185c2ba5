"""A graphics card that is not there: the rules of CUDA, with the numbers of the CPU.

`with plugged_in() as card:` makes "cuda" a device on a machine without one. A tensor moved there is a `Card`,
computed on by the CPU's kernels in its own dtype (half precision included), and it keeps what CUDA demands:
no operation with a tensor of the CPU unless that has no dimension, no NumPy, no generator of the other
device. So a test finds the forgotten `.to(device)`, `.cpu()` and `.float()` that else wait for the first run
on a rented card. It says nothing about time, memory or the rounding of the card's own kernels. `card` counts:
`moved_in`, `moved_out` (tensors with a dimension), `waits` (synchronisations asked for), `emptied`.
"""
import contextlib
import re
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode

T = torch.Tensor
CUDA = torch.device("cuda", 0)
BOTH = ("copy_", "__setitem__", "_has_compatible_shallow_copy_type")  # what may have tensors of both devices
_count = Counter()


def on_card(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Card(torch.Tensor):
    """A tensor "on the card": the CPU's memory, and the rules of CUDA."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is T.device:
            return CUDA
        if name == "__get__" and owner is T.is_cuda:
            return True
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func is T.cpu:
            return leave(args[0])
        if func is T.to:
            return move(args[0], *args[1:], **kwargs)
        check(func, name, [*flat(args), *flat(kwargs.values())], kwargs)
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except RuntimeError as error:                     # a kernel that only the card has in half precision
            if not re.search(r"not (implemented|supported).*Half", str(error)):
                raise
            wide = lambda x: x.float() if isinstance(x, T) and x.dtype == torch.float16 else x
            answer = super().__torch_function__(func, types, tuple(map(wide, args)),
                                                {k: wide(v) for k, v in kwargs.items()})
            return answer.half() if isinstance(answer, T) and answer.dtype == torch.float32 else answer


def flat(values):
    """Tensors in arguments, also inside lists and tuples."""
    for value in values:
        if isinstance(value, T):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from flat(value)


def check(func, name, tensors, kwargs):
    here = [x for x in tensors if not isinstance(x, Card)]
    if name in (*BOTH, "__getitem__"):
        if name == "__getitem__" and not isinstance(tensors[0], Card) and any(x.dim() for x in tensors[1:]):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
        return
    strict = name in ("cat", "stack", "concat")
    if any(x.dim() or strict for x in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, "
                           f"cuda:0 and cpu! (in {name}, shapes {[tuple(x.shape) for x in tensors]})")
    if kwargs.get("generator") is not None and kwargs["generator"].device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def arrive(x):
    _count["moved_in"] += bool(x.dim())
    return x if isinstance(x, Card) else x.as_subclass(Card)


def leave(x):
    _count["moved_out"] += bool(x.dim())
    return x.as_subclass(T)


def move(x, *args, **kwargs):
    """Tensor.to in all its forms."""
    args = list(args)
    target = kwargs.pop("device", None)
    if args and isinstance(args[0], T):
        other = args.pop(0)
        target, kwargs["dtype"] = ("cuda" if isinstance(other, Card) else "cpu"), other.dtype
    elif args and isinstance(args[0], (str, torch.device, int)):
        target = args.pop(0)
    elif args and args[0] is None:
        args.pop(0)
    kwargs.pop("non_blocking", None)
    args = [a for a in args if isinstance(a, torch.dtype)]        # the rest: non_blocking, copy
    plain = x.as_subclass(T) if isinstance(x, Card) else x
    with torch._C.DisableTorchFunction():
        moved = T.to(plain, *args,
                     **{k: v for k, v in kwargs.items() if v is not None}) if args or kwargs else plain
    there = isinstance(x, Card) if target is None else on_card(target)
    if there and not isinstance(x, Card):
        return arrive(moved if moved is not x else moved.detach().requires_grad_(moved.requires_grad))
    return leave(moved) if isinstance(x, Card) and not there else moved.as_subclass(Card) if there else moved


class _Driver(TorchFunctionMode):
    """What plain functions do when they are told device="cuda"."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is T.to and not isinstance(args[0], Card):
            return move(*args, **kwargs)
        if on_card(kwargs.get("device")) and not any(isinstance(x, Card) for x in flat(args)):
            if kwargs.get("generator") is not None and kwargs["generator"].device.type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            return arrive(func(*args, **{k: v for k, v in kwargs.items() if k != "device"}))
        return func(*args, **kwargs)


@contextlib.contextmanager
def plugged_in():
    """See above; yields the counts."""
    _count.clear()
    counted = lambda name: lambda *_, **__: _count.update([name])
    false = {"is_available": lambda: True, "synchronize": counted("waits"), "empty_cache": counted("emptied"),
             "reset_peak_memory_stats": lambda *_: None, "max_memory_allocated": lambda *_: 123_000_000,
             "get_device_name": lambda *_: "a card that is not there"}
    kept = {name: getattr(torch.cuda, name) for name in false}
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)      # else a moved weight keeps its type
    for name, value in false.items():
        setattr(torch.cuda, name, value)
    try:
        with _Driver():
            yield _count
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for name, value in kept.items():
            setattr(torch.cuda, name, value)
