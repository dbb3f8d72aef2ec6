"""`@cell`: a recurrent cell is one pure function of its gates' pre-activations and its state."""

from __future__ import annotations

import importlib
import inspect
import pickle
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

from .expression import (
    SINGLE,
    Node,
    Value,
    bare,
    comparing,
    is_condition,
    is_reduction,
    leaf,
    number,
    reached,
    topological,
)
from .outside import Outside

MISTAKES = TypeError, AttributeError, ValueError, ArithmeticError, NameError, RecursionError


class Recurrent(Value):
    """`u.g`: as a value the recurrent product U_g h + b'_g; `u.g(v)`: that of another vector, U_g v + b'_g."""

    def __init__(self, product: Callable[[Any], Any], hidden: Any) -> None:
        self._product, self._like, self._value = product, bare(hidden), None

    @property
    def __fastcells_value__(self) -> Any:
        if self._value is None:  # not computed where the cell only uses u.g(v)
            self._value = bare(self._product(self._like))
        return self._value

    def __call__(self, vector: Any) -> Any:
        return self._product(bare(vector))


class Names(SimpleNamespace):
    """x, u, s or p: one attribute per name."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no {name!r}, only {', '.join(self.__dict__)}")

    def _is_no_value(self, *_: Any) -> Any:
        raise TypeError(
            f"x, u, s and p are no values: write x.g, u.g, s.h or p.w. Here there are {', '.join(self.__dict__)}"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __iter__ = __getitem__ = _is_no_value


class Cell:
    """A recurrent cell, callable as the function that it was declared from. Made by the decorator `cell`.

    Attributes: `name`, `gates` (order of the blocks in weight_ih and weight_hh), `states` (the first one, the hidden
    state, is the layer's output and enters the recurrent products), `parameters` (tensors of its own, [H] each),
    `scalars` (numbers of its own), `inputs` ([N, H] each, the same at all steps), `step_inputs` ([T, N, H] each, or
    [T, N, 1] for those that are `marks`, which have no gradients), and `key`, which stands for the cell in compiled and
    exported programs (`registered`).
    """

    initial: Mapping[str, float] = MappingProxyType({})  # first values of parameters and scalars that have one
    made_by: tuple[Callable, tuple] | None = None  # the function, and its arguments, of a cell with options
    recurrent_weight: Callable | None = None  # what nn.Recurrent makes of weight_hh before the cell uses it

    def __init__(
        self,
        function: Callable,
        name: str,
        gates: Sequence[str],
        states: Sequence[str],
        parameters: Sequence[str] = (),
        scalars: Sequence[str] = (),
        inputs: Sequence[str] = (),
        step_inputs: Sequence[str] = (),
        marks: Sequence[str] = (),
    ) -> None:
        self.function, self.name, self.gates, self.states = function, name, tuple(gates), tuple(states)
        self.parameters, self.scalars = tuple(parameters), tuple(scalars)
        self.inputs, self.step_inputs = tuple(inputs), (*step_inputs, *marks)
        self.marks = tuple(marks)
        self._traced: tuple[Node, ...] | None = None
        self.outside: Outside | None = None  # what the function reads, once kernels were derived
        self.__doc__ = function.__doc__
        self.__wrapped__ = function
        self.key = _register(self)

    def __repr__(self) -> str:
        lists = ("gates", "states", "parameters", "scalars", "inputs", "step_inputs")
        said = [f"{n.replace('_', ' ')} {' '.join(getattr(self, n))}" for n in lists if getattr(self, n)]
        return f"<cell {self.name}: {'; '.join(said)}>"

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the cell's own parameters, then scalars: the order of its tensors in `functional.layer`."""
        return self.parameters + self.scalars

    @property
    def fed(self) -> tuple[str, ...]:
        """Names of its extra inputs, then step inputs: the order of its `inputs` in `functional.layer`."""
        return self.inputs + self.step_inputs

    def __reduce__(self):
        """Pickled as functions are: by name, or as the call that makes it."""
        if self.made_by is not None:
            return self.made_by
        where = self.function.__module__, self.function.__qualname__
        try:
            found = _lookup(*where)
        except (ImportError, AttributeError):
            found = None
        if found is not self:
            raise pickle.PicklingError(
                f"cell {self.name}: it is pickled by its name, but {'.'.join(map(str, where))} is "
                f"{'not to be found' if found is None else 'another object by now'}. Declare it at the top of a module."
            )
        return _lookup, where

    def __copy__(self) -> Cell:
        return self

    def __deepcopy__(self, memo: dict) -> Cell:
        return self  # as functions do: a cell never changes

    def __call__(self, x: Any, u: Any, s: Any, *p: Any) -> Any:
        """The declared function itself: new state(s) from `x`, `u`, `s` (and `p`), each with an attribute per name."""
        return self.function(x, u, s, *p)

    def step(
        self,
        x: Mapping[str, Any],
        product: Callable[[str, Any], Any],
        states: Mapping[str, Any],
        own: Mapping[str, Any] | None = None,
    ) -> tuple:
        """One time step on values of any one kind.

        x: pre-activations W_g x + b_g by gate; product(g, v) gives U_g v + b'_g; states, and the cell's own parameters,
        scalars and extra inputs, by name. Returns the new states in the order of `self.states`.
        """
        hidden = states[self.states[0]]
        u = {g: Recurrent(partial(product, g), hidden) for g in self.gates}

        def values(named: Mapping[str, Any]) -> dict[str, Any]:
            return {n: v if isinstance(v, Node) else Value(v, hidden) for n, v in named.items()}

        p = (Names(**values(own or {})),) if self.own or self.fed else ()
        result = self.function(Names(**values(x)), Names(**u), Names(**values(states)), *p)
        result = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if len(result) != len(self.states):
            raise TypeError(
                f"cell {self.name}: expected {len(self.states)} returned state(s) ({', '.join(self.states)}), "
                f"got {len(result)}"
            )
        return tuple(map(bare, result))

    def trace(self) -> tuple[Node, ...]:
        """The new states as expression graphs: over leaves ("x", gate), ("s", state), ("p", parameter),
        ("scalar", ...), ("input", ...), ("step_input", ...), ("mark", ...), and nodes "product"."""
        if self._traced is None:
            self.outside, self._traced = Outside(self.function), self._trace()
        else:
            self.unchanged()
        return self._traced

    def unchanged(self) -> Cell:
        """The cell itself. Raises RuntimeError where its function, by what it reads from outside of it, by now computes
        another thing than what kernels were derived from, which would be stale."""
        if self.outside is None or self.outside.same():
            return self
        if self._trace() != self._traced:
            changed = self.outside.changed()
            name = changed[0].name if changed else self.outside.loose[0]
            what = f"{name} was {changed[0].value!r}" if changed else f"what it reads of {name} was another"
            raise RuntimeError(
                f"cell {self.name}: {what} when its kernels were derived"
                + (f", and is {changed[0].now()!r} now" if changed else "")
                + f". Declare the cell anew, or make {name} one of its scalars or inputs."
            )
        if not self.outside.loose:
            self.outside = Outside(self.function)
        return self

    def _trace(self) -> tuple[Node, ...]:
        try:
            return self._states()
        except MISTAKES as error:
            raise type(error)(f"cell {self.name}: {error}\n  {self._place(inspect.trace())}") from error

    def _place(self, trace: list[inspect.FrameInfo]) -> str:
        """Where in the cell's function an error came up: file, line and, as far as there is a source, its text."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        for frame in reversed(trace):
            if frame.frame.f_code is code:
                text = f": {frame.code_context[0].strip()}" if frame.code_context else ""
                return f"{frame.filename}:{frame.lineno}{text}"
        return f"{code.co_filename}:{code.co_firstlineno}" if code else "(no source)"

    def _states(self) -> tuple[Node, ...]:
        x = {g: leaf("x", g) for g in self.gates}
        kinds = {"p": self.parameters, "scalar": self.scalars, "input": self.inputs, "mark": self.marks}
        kinds["step_input"] = tuple([name for name in self.step_inputs if name not in self.marks])
        with comparing():
            states = self.step(
                x,
                _traced_product,
                {s: leaf("s", s) for s in self.states},
                {n: leaf(kind, n) for kind, names in kinds.items() for n in names},
            )
        for name, new in zip(self.states, states, strict=True):
            if not isinstance(new, Node) or new.op == "constant":
                got = repr(new.value if isinstance(new, Node) else new)
                raise TypeError(f"state {name} must be made of the cell's values, got {got}")
            if is_condition(new):
                raise TypeError(f"state {name} must be a number, got a comparison. Write where(condition, 1.0, 0.0).")
        taken: dict[str, Node] = {}
        for n in topological(states):
            if n.op == "product" and taken.setdefault(n.value[1], n.args[0]) is not n.args[0]:
                raise TypeError(f"u.{n.value[1]} must be of one vector, got two: write another gate for the other")
        if not any(n.op == "product" or n in x.values() for n in topological(states)):
            raise TypeError(f"at least one of the gates {', '.join(self.gates)} must be used")
        return states


def _traced_product(gate: str, vector: Any) -> Node:
    operand = number(f"u.{gate}(v)", vector)
    if not _by_unit(operand):
        raise TypeError(f"u.{gate}(v): v must have a number for each unit, got {operand!r}, the same for all")
    return Node("product", (operand,), ("hh", gate))


def _by_unit(node: Node) -> bool:
    """Whether the units have numbers of their own."""
    found = reached([node], lambda n: n.op == "product" or is_reduction(n))
    return any([n.op == "product" or (n.op == "leaf" and n.value[0] not in SINGLE) for n in found])


_REGISTERED: dict[str, Cell] = {}


def _register(cell: Cell) -> str:
    """The key of a new cell: where to import it from, or what no other cell has if that does not tell which it is."""
    function = cell.function
    key = f"{function.__module__}:{function.__qualname__}"
    if key in _REGISTERED or "<" in key:  # declared once more, or in a function
        key = f"{key}#{uuid.uuid4().hex}"
    _REGISTERED[key] = cell
    return key


def registered(key: str) -> Cell:
    """The cell with this key, imported if need be. Raises LookupError."""
    if key not in _REGISTERED and "#" not in key:
        with suppress(ImportError, AttributeError):
            _lookup(*key.split(":"))
    if key not in _REGISTERED:
        raise LookupError(f"no cell {key} here: declare it at the top of a module that can be imported")
    return _REGISTERED[key]


def _lookup(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _first_value(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"cell: a first value is written name=number, without spaces, got {word!r}") from None


def cell(
    gates: str,
    states: str = "h",
    name: str | None = None,
    *,
    parameters: str = "",
    scalars: str = "",
    inputs: str = "",
    step_inputs: str = "",
) -> Callable[[Callable], Cell]:
    """Declare a recurrent cell.

    gates: names of the gates, in the order of their blocks of rows in weight_ih [gates * H, I] and weight_hh.
    states: names of the states; the first is the hidden state h.
    parameters, scalars: names of learned tensors of the cell's own, one number per unit [H] each, or a single number;
    with "gain=1" `nn.Recurrent` begins with that value, otherwise it draws as it does weights.
    inputs, step_inputs: names of extra inputs, given with each call: [N, H] each, the same at all steps (the mask of
    variational dropout), or [T, N, H] (that of zoneout).

    The function takes (x, u, s): `x.g` = W_g x_t + b_g and `u.g` = U_g h_{t-1} + b'_g for each gate g, `u.g(v)` the
    recurrent product of another vector, `s.h` the states of the step before; where the cell has parameters, scalars or
    extra inputs, a fourth argument p has them, `p.beta`. It returns the new states in order. It may use arithmetic,
    comparisons (with &, |, ~) for `where`, and the functions of `fastcells.expression`, also under torch's and NumPy's
    names; it runs on NumPy arrays, torch tensors and symbols, and forward and backward kernels are derived from it.
    Numbers and functions that it reads from outside are part of it: to change them, declare it anew.

    Raises TypeError for lists of names that are not text, and for what is no function; ValueError for names that are no
    identifiers, or repeated, and a `name` that is not text of one line.
    """
    given = {"gates": gates, "states": states, "parameters": parameters, "scalars": scalars}
    for what, text in (given | {"inputs": inputs, "step_inputs": step_inputs}).items():
        if not isinstance(text, str):
            got = f'{text!r}. Write @cell(gates="...")' if callable(text) else repr(text)
            raise TypeError(f"cell: {what} must be a str of names separated by spaces, got {got}")
    if name is not None and not (isinstance(name, str) and name.isprintable()):
        raise ValueError(f"cell: name must be printable text of one line, got {name!r}")
    initial = dict(_first_value(word) for word in f"{parameters} {scalars}".split() if "=" in word)
    parameters, scalars = (re.sub(r"=\S*", "", names) for names in (parameters, scalars))
    extra = {"parameters": parameters, "scalars": scalars, "inputs": inputs, "step_inputs": step_inputs}
    lists = {what: names.split() for what, names in {"gates": gates, "states": states, **extra}.items()}
    lists["names of the fourth argument"] = [n for what in extra for n in lists[what]]
    for what, names in lists.items():
        if len(set(names)) != len(names) or not all(re.fullmatch(r"[A-Za-z]\w*", n) for n in names):
            raise ValueError(f"cell: {what} must be different identifiers separated by spaces, got {names}")
    for what in ("gates", "states"):
        if not lists[what]:
            raise ValueError(f"cell: {what} must be different identifiers separated by spaces, at least one, got none")

    def declare(function: Callable) -> Cell:
        if not callable(function) or not hasattr(function, "__qualname__") or isinstance(function, type):
            raise TypeError(f"cell: what is declared must be a function, got {function!r}")
        made = Cell(function, name or function.__name__, *(lists[what] for what in ("gates", "states", *extra)))
        made.initial = initial
        return made

    return declare
