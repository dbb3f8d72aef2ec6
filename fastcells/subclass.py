"""A user's subclass of a torch.nn recurrent class, over the fastcells one: it keeps what it says, not what it inherits.

`class Own(torch.nn.LSTM)` gets a class with the bases `Own` and `fastcells.nn.LSTM`. In its order of methods Own's come
first, as before, and where Own says `super().forward(...)`, that is now the fused one, which gives the same results.
Own is left alone where that would not be so, or would change nothing: `obstacle` says why.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType
from typing import Any

import torch

#: What torch.nn's classes define that their forward, and ours, do not rely on.
FREE = {"forward", "extra_repr", "reset_parameters", "flatten_parameters"}


@cache
def over(own: Any, ours: Any) -> type:
    """The class `own` over the fastcells class `ours`, under own's name."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # The new class has no name to be found by: what is pickled, and copied, is how to make it.
        reduced = own.__reduce_ex__(self, max(int(protocol), 2))
        if isinstance(reduced, str) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return _new, (own, ours, *reduced[1][1:]), *reduced[2:]

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (own, ours), {**names, "__reduce_ex__": __reduce_ex__, "_parts_of": (own, ours)})


def _new(own: Any, ours: Any, *arguments: Any) -> Any:
    kind: Any = over(own, ours)
    return kind.__new__(kind, *arguments)


def parts(kind: type) -> tuple[type, type] | None:
    """`(own, ours)` if `over` made this class."""
    return vars(kind).get("_parts_of")


def obstacle(module: torch.nn.Module, own: type, ours: type) -> str | None:
    """Why `module`, of the class `own`, cannot have `over(own, ours)`, or None."""
    theirs = ours.__bases__[1]
    classes = [kind for kind in own.__mro__ if not issubclass(theirs, kind)]
    inherited = [kind for kind in ours.__mro__ if not issubclass(torch.nn.Module, kind)]
    relied = {name for kind in inherited for name in vars(kind) if not name.startswith("__")} - FREE
    replaced = relied & {*vars(module), *(name for kind in classes for name in vars(kind))}
    if replaced:
        return f"it has a {min(replaced)} of its own, which the layers rely on"
    for kind in classes:
        for name, value in vars(kind).items():
            mentioned = {word for function in _functions(value) for word in _mentioned(function)}
            if "_flat_weights" in mentioned:
                return f"its {name} uses _flat_weights, torch's list of the weights, which fastcells does not read"
            if name == "forward" and not {"super", "forward"} <= mentioned:
                return "its forward does not call super().forward: nothing of it would change"
    return None


def _functions(value: Any) -> Iterator[Any]:
    """The functions behind what a class has under a name."""
    if isinstance(value, property):
        yield from filter(inspect.isfunction, (value.fget, value.fset, value.fdel))
    value = inspect.unwrap(getattr(value, "__func__", value))  # of static and class methods, of decorators
    if inspect.isfunction(value):
        yield value


def _mentioned(function: Any) -> Iterator[str]:
    """The names of attributes and globals in a function's code, and in that of functions within."""
    codes: list[CodeType] = [function.__code__]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
