"""The graph: nodes, Python's operators on them, and reverse-mode differentiation.

Nodes are hash-consed: equal expressions are one object, so common subexpressions are shared by construction; zeros and
ones fold when a node is made.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch


class Operators:
    """Python's arithmetic and comparison operators over `apply`."""

    __slots__ = ()

    def __add__(self, other: Any) -> Any:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return apply("div", other, self)

    def __pow__(self, exponent: float) -> Any:
        if isinstance(exponent, int | float) and exponent == 0.5:
            return apply("sqrt", self)
        if not isinstance(exponent, int | float) or not float(exponent).is_integer() or exponent == 0:
            raise TypeError(
                f"**: a cell's values take whole exponents and 0.5, got {exponent!r}. Write exp({exponent!r} * log(v)) "
                f"for another power of positive values."
            )
        factor: Any = self if exponent > 0 else 1.0 / self
        result = factor
        for _ in range(abs(int(exponent)) - 1):
            result = result * factor
        return result

    def __rpow__(self, base: float) -> Any:
        if not isinstance(base, int | float) or base <= 0:
            raise TypeError(f"**: a power of a cell's values must be one of a positive number, got {base!r}")
        return apply("exp", self * math.log(base))

    def __matmul__(self, other: Any) -> Any:
        raise TypeError(f"@: a cell's values are numbers per unit.{_foreign().hint('matmul')}")

    __rmatmul__ = __matmul__

    def __neg__(self) -> Any:
        return apply("neg", self)

    def __abs__(self) -> Any:
        return apply("abs", self)

    def __lt__(self, other: Any) -> Any:
        return apply("less", self, other)

    def __gt__(self, other: Any) -> Any:
        return apply("less", other, self)

    def __le__(self, other: Any) -> Any:
        return apply("less_equal", self, other)

    def __ge__(self, other: Any) -> Any:
        return apply("less_equal", other, self)

    def __eq__(self, other: Any) -> Any:
        return apply("equal", self, other)

    def __ne__(self, other: Any) -> Any:
        return ~apply("equal", self, other)

    # Conditions are true or false alone; combined, they go through numbers, which is good enough for what is rare.
    def __and__(self, other: Any) -> Any:
        return apply("less", 0.0, apply("where", _condition("&", self), _condition("&", other), 0.0))

    def __or__(self, other: Any) -> Any:
        return apply("less", 0.0, apply("where", _condition("|", self), 1.0, _condition("|", other)))

    def __invert__(self) -> Any:
        return apply("equal", apply("where", _condition("~", self), 1.0, 0.0), 0.0)

    __rand__, __ror__ = __and__, __or__

    def __bool__(self) -> bool:
        raise TypeError(
            "a cell cannot branch on a value (if, and, or, not, while, min, max, chained comparison): every unit of "
            "every sequence has its own value. Write where(condition, a, b), &, |, ~, minimum(a, b) instead."
        )

    def __iter__(self) -> Any:
        raise TypeError("a cell's value is one number per unit and cannot be iterated over, unpacked or indexed")

    def __getitem__(self, index: Any) -> Any:
        return self.__iter__()

    def __float__(self) -> float:
        raise TypeError(
            "a cell's value is one number per unit, not a single number: instead of math's functions and float() write "
            "those of fastcells.expression, exp(v), log(v), ..."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        name = name.rstrip("_")
        raise AttributeError(f"a cell's value is no tensor and has no attribute {name!r}.{_foreign().hint(name)}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _foreign().call("numpy", ufunc if method == "__call__" else getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Callable, types: Any, inputs: Sequence, options: dict) -> Any:
        return _foreign().call("numpy", function, inputs, options)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, inputs: Sequence = (), options: Any = None) -> Any:
        return _foreign().call("torch", function, inputs, options or {})


def _foreign() -> Any:
    from . import foreign  # which needs this module

    return foreign


_compares: ContextVar[bool] = ContextVar("compares", default=False)


@contextmanager
def comparing() -> Iterator[None]:
    """While a cell's function runs, == compares values; at all other times nodes are told apart by identity."""
    token = _compares.set(True)
    try:
        yield
    finally:
        _compares.reset(token)


OPERATIONS: dict[str, Operation] = {}
"""By name, of the module `operations`."""


class Node(Operators):
    """One value of an expression graph. Make nodes through `leaf`, `constant` and the operations, never directly."""

    __slots__ = ("__weakref__", "args", "op", "uniform", "value")
    _pool: ClassVar[WeakValueDictionary[tuple, Node]] = WeakValueDictionary()
    _lock: ClassVar = threading.RLock()  # threads that trace at once get the same nodes

    op: str
    args: tuple[Node, ...]
    value: Any
    uniform: bool  # the same for all units of a sequence because it comes from sums over them

    def __new__(cls, op: str, args: tuple[Node, ...] = (), value: Any = None) -> Node:
        bits = value.hex() if isinstance(value, float) else value  # 0.0 is -0.0, and no NaN is another
        key = (op, *map(id, args), bits)  # a node keeps its arguments alive, so their ids stay theirs
        node = cls._pool.get(key)
        if node is not None:
            return node
        with cls._lock:
            node = cls._pool.get(key)
            if node is None:
                node = object.__new__(cls)
                node.op, node.args, node.value = op, args, value
                node.uniform = _is_uniform(node)
                cls._pool[key] = node
        return node

    def __reduce__(self):
        return Node, (self.op, self.args, self.value)

    def __repr__(self) -> str:
        if self.op == "constant":
            return repr(self.value)
        if self.op == "leaf":
            return ".".join(map(str, self.value))
        tag = "" if self.value is None else f"[{self.value}]"
        return f"{self.op}{tag}({', '.join(map(repr, self.args))})"

    def __eq__(self, other: Any) -> Any:
        return super().__eq__(other) if _compares.get() else self is other

    def __ne__(self, other: Any) -> Any:
        return super().__ne__(other) if _compares.get() else self is not other

    __hash__ = object.__hash__


SINGLE = ("scalar", "mark")  # kinds of leaves that are one number for all units


def _is_uniform(node: Node) -> bool:
    if node.op == "leaf":
        return node.value[0] == "row"
    if node.op not in OPERATIONS or is_reduction(node):
        return node.op in OPERATIONS
    others = [a for a in node.args if a.op != "constant" and not (a.op == "leaf" and a.value[0] in SINGLE)]
    return bool(others) and all([a.uniform for a in others])


class Value(Operators):
    """An array or tensor as a cell's function sees it: operations give new ones and change none, and what they make of
    conditions and numbers alone is in the layer's format, that of the array or tensor `like`."""

    __slots__ = ("__fastcells_value__", "_like")

    def __init__(self, value: Any, like: Any) -> None:
        self.__fastcells_value__, self._like = value, like


def bare(value: Any) -> Any:
    """What a Value is of, or any other value as it is."""
    return value.__fastcells_value__ if isinstance(value, Value) else value


def leaf(*name: str | int) -> Node:
    """A named input of the graph."""
    return Node("leaf", value=name)


def constant(x: float) -> Node:
    """A number, the same for every unit."""
    return Node("constant", value=float(x))


ZERO, ONE = constant(0.0), constant(1.0)


@dataclass(frozen=True)
class Operation:
    """An operation: how each kind of value computes it, and its derivative as a graph. Pointwise, unless it reduces:
    then its result is one number for all units."""

    numpy: Callable
    torch: Callable
    gradient: Callable | None  # (node, grad) -> gradients of the arguments
    cost: float = 0.25  # of computing it again, where keeping one value for the backward pass costs 4
    fold: Callable[..., Node | None] = lambda *args: None
    reduces: bool = False

    @property
    def is_condition(self) -> bool:
        """True or false, not a number: it lives in the registers only and is never stored."""
        return self.gradient is None


def is_condition(node: Node) -> bool:
    """Whether the node is true or false rather than a number."""
    return node.op in OPERATIONS and OPERATIONS[node.op].is_condition


def is_reduction(node: Node) -> bool:
    """Whether the node takes a sum over all units."""
    return node.op in OPERATIONS and OPERATIONS[node.op].reduces


def known(node: Node) -> float | None:
    """The number that a node is, if it is a constant."""
    return node.value if node.op == "constant" else None


def apply(name: str, *given: Any) -> Any:
    """Compute operation `name` on values of one kind; numbers mix with any kind."""
    args, operation = tuple(map(bare, given)), OPERATIONS[name]
    if any(isinstance(a, Node) for a in args):
        nodes = tuple(as_node(name, a) if name == "where" and not k else number(name, a) for k, a in enumerate(args))
        numbers = [known(n) for n in nodes]
        if all(n is not None for n in numbers) and name != "where" and not operation.reduces:
            return constant(float(operation.numpy(*numbers)))
        folded = operation.fold(*nodes)
        return Node(name, nodes) if folded is None else folded
    values = [v for v in given if isinstance(v, Value)]
    like = next((a for a in [*args, *(v._like for v in values)] if _is_number(a)), None)
    if like is not None:
        args = tuple(a if name == "where" and not k else _formatted(a, like) for k, a in enumerate(args))
    by_torch = any(isinstance(a, torch.Tensor) for a in args)
    result = (operation.torch if by_torch else operation.numpy)(*args)
    return Value(result, values[0]._like) if values else result


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.dtype not in (torch.bool, np.bool_)


def _formatted(value: Any, like: Any) -> Any:
    """A number or condition as a number in the format of `like`; others as they are."""
    if isinstance(like, torch.Tensor):
        tensor = value if isinstance(value, torch.Tensor) else like.new_tensor(value)
        return tensor.to(like.dtype) if tensor.dtype is torch.bool else tensor
    return value.astype(like.dtype) if getattr(value, "dtype", None) == np.bool_ else value


def number(name: str, value: Any) -> Node:
    """What a cell gave to operation `name`, as a node that is a number: 1 or 0 for a condition. Raises TypeError."""
    node = as_node(name, value)
    return apply("where", node, 1.0, 0.0) if is_condition(node) else node


def _condition(name: str, value: Any) -> Any:
    """What was combined with another condition. Raises TypeError for numbers."""
    if isinstance(bare(value), bool) or not isinstance(bare(value), Node) or is_condition(bare(value)):
        return value
    raise TypeError(f"{name}: conditions are comparisons, such as a < b, got {bare(value)!r}")


def as_node(name: str, value: Any) -> Node:
    """What a cell gave to operation `name`, as a node. Raises TypeError."""
    if isinstance(value, Node):
        return value
    if isinstance(value, int | float | np.floating | np.integer) or (type(value) is np.ndarray and not value.shape):
        return constant(float(value))
    hint = ""
    if isinstance(value, np.ndarray | torch.Tensor):
        hint = " Arrays and tensors cannot be part of a cell: declare them, as its parameters or its inputs."
    raise TypeError(
        f"{name}: a cell computes with its gates, states, parameters, inputs and plain numbers, got "
        f"{type(value).__name__}.{hint}"
    )


def topological(outputs: Iterable[Node]) -> list[Node]:
    """All nodes that the outputs depend on, arguments before their users."""
    order: dict[Node, None] = {}
    waiting = [*reversed(list(outputs))]
    while waiting:  # rather than recursion, which long chains would exceed
        node = waiting.pop()
        if node in order:
            continue
        missing = [a for a in node.args if a not in order]
        if missing:
            waiting += [node, *reversed(missing)]
        else:
            order[node] = None
    return list(order)


def reached(roots: Iterable[Node], ends: Callable[[Node], bool]) -> list[Node]:
    """The roots and what they depend on, without constants, each at its first use; nothing of what a node depends on
    that ends the search."""
    found: dict[Node, None] = {}
    waiting = [*reversed(list(roots))]
    while waiting:
        node = waiting.pop()
        if node not in found and node.op != "constant":
            found[node] = None
            if not ends(node):
                waiting += reversed(node.args)
    return list(found)


def substitute(outputs: Sequence[Node], replace: dict[Node, Node]) -> list[Node]:
    """The same graph with some nodes replaced (a replacement's own arguments are kept as they are)."""
    done = dict(replace)
    for node in topological(outputs):
        if node not in done:
            args = tuple(done[a] for a in node.args)
            if all(map(operator.is_, args, node.args)):
                done[node] = node
            elif node.op in OPERATIONS:
                done[node] = apply(node.op, *args)
            else:
                done[node] = Node(node.op, args, node.value)
    return [done[o] for o in outputs]


def gradients(
    outputs: Sequence[Node], cotangents: Sequence[Node], other: Callable[[Node, Node], Iterable[tuple[Node, Node]]]
) -> dict[Node, Node]:
    """Reverse mode: the gradient of sum(output * cotangent) with respect to every node that it reaches.

    `other(node, grad)` is asked for operations that are not pointwise: it yields (argument, its gradient).
    """
    grads: dict[Node, Node] = {}

    def give(node: Node, grad: Node | None) -> None:
        if grad is not None and grad is not ZERO:
            grads[node] = grads[node] + grad if node in grads else grad

    for output, cotangent in zip(outputs, cotangents, strict=True):
        give(output, cotangent)
    for node in reversed(topological(outputs)):
        if node not in grads:
            continue
        operation = OPERATIONS.get(node.op)
        if operation is None:
            for arg, grad in other(node, grads[node]):
                give(arg, grad)
        elif operation.gradient is not None:
            for arg, grad in zip(node.args, operation.gradient(node, grads[node]), strict=True):
                if arg.op != "constant":
                    give(arg, grad)
    return grads
