"""What a cell's function reads from outside of it, and whether that is what it was when kernels were derived."""

from __future__ import annotations

import builtins
import dis
import re
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np

PACKAGE = __name__.partition(".")[0]
LIBRARIES = {"_operator", "builtins", "math", "numpy", "torch"}  # whose functions do not change,
DRAWN = re.compile(r"rand|bernoulli|binomial|multinomial|normal|poisson|empty")  # but for what they draw
PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
HARMLESS = {abs, all, any, bool, dict, divmod, enumerate, float, int, isinstance, len, list, map, max, min, pow, print}
HARMLESS |= {range, repr, reversed, round, set, sorted, str, sum, tuple, zip}
MISSING = object()


class Read(NamedTuple):
    """A name that stood for this value: in a dict, or, without a dict, in the variable of an enclosing function."""

    holder: dict | CellType
    name: str
    value: Any = None

    def now(self) -> Any:
        """What it stands for now."""
        if isinstance(self.holder, dict):
            return self.holder.get(self.name, MISSING)
        return getattr(self.holder, "cell_contents", MISSING)


class Outside:
    """What a function reads. reads: what names stood for that it may reach. loose: names of what may change by itself,
    an object or a list; without any, the function does the same as long as the other names stand for the same."""

    def __init__(self, function: Any) -> None:
        self.reads: list[Read] = []
        self.loose: list[str] = []
        self._seen: set[Any] = set()
        self._value("the function", function, set())

    def same(self) -> bool:
        """Whether the function is known to do what it did."""
        return not self.loose and not self.changed()

    def changed(self) -> list[Read]:
        """The reads that are of other values by now."""
        return [read for read in self.reads if read.now() is not read.value]

    def _function(self, function: FunctionType) -> None:
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        code, ours = function.__code__, _library(function) == PACKAGE
        names, attributes = set[str](), set[str]()
        for instruction in _instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names.add(instruction.argval)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                attributes.add(instruction.argval)
            elif instruction.opname in ("IMPORT_NAME", "STORE_GLOBAL"):
                self.loose.append(instruction.argval)
        for name in () if ours else sorted(names):  # this package's own stand for what they did
            if name in function.__globals__:
                self._read(function.__globals__, name, attributes)
            elif getattr(builtins, name, None) not in HARMLESS:
                self.loose.append(name)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if not ours:
                self._read(cell, name, attributes)
            else:
                self._value(name, Read(cell, name).now(), attributes)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._value(f"a default of {function.__name__}", value, attributes)

    def _read(self, holder: dict | CellType, name: str, attributes: set[str]) -> None:
        value = Read(holder, name).now()
        self.reads.append(Read(holder, name, value))
        self._value(name, value, attributes)

    def _value(self, name: str, value: Any, attributes: set[str]) -> None:
        """What may be reached by the value of a name, of which these attributes may be read."""
        from .cell import Cell  # which needs this module

        if isinstance(value, PLAIN):
            return
        if isinstance(value, Cell):
            self._value(name, value.function, attributes)
        elif isinstance(value, tuple):
            for item in value:
                self._value(name, item, attributes)
        elif isinstance(value, ModuleType):
            seen = id(value), frozenset(attributes)
            if seen not in self._seen:
                self._seen.add(seen)
                for attribute in sorted(attributes & vars(value).keys()):
                    self._read(vars(value), attribute, attributes)
        elif isinstance(value, FunctionType):
            for attribute in sorted(attributes & vars(value).keys()):
                self._read(vars(value), attribute, attributes)
            if _library(value) not in LIBRARIES:
                self._function(value)
            elif id(value) not in self._seen:  # which may be around another: torch's decorators
                self._seen.add(id(value))
                for cell in value.__closure__ or ():
                    if isinstance(inner := Read(cell, name).now(), FunctionType | Cell):
                        self._value(name, inner, attributes)
        elif not _is_fixed(value):
            self.loose.append(name)


def _is_fixed(value: Any) -> bool:
    """Whether a function or class that is not written in Python, or a library's, does what it always did."""
    if isinstance(value, BuiltinFunctionType):
        owner = value.__self__
        if not isinstance(owner, ModuleType | type | None):
            return False
        library = owner.__name__ if isinstance(owner, ModuleType) else (owner or value).__module__
        return str(library).partition(".")[0] in LIBRARIES and not DRAWN.match(value.__name__)
    if isinstance(value, type):
        return value.__module__.partition(".")[0] in LIBRARIES
    return isinstance(value, np.ufunc | type(np.where)) and not DRAWN.match(value.__name__)


def _library(function: FunctionType) -> str:
    """Where the names are that a function reads: not what a decorator says."""
    return str(function.__globals__.get("__name__")).partition(".")[0]


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """Those of nested functions too."""
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
