"""Expression graphs: the operations that a cell may use, and reverse-mode differentiation on them.

Every operation works on NumPy values, on torch tensors and on `Node`s. Nodes are hash-consed: equal expressions are one
object, so common subexpressions are shared by construction; zeros and ones fold when a node is made.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, partial
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
            return sqrt(self)
        if not isinstance(exponent, int | float) or exponent != int(exponent) or exponent == 0:
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
        return exp(self * math.log(base))

    def __matmul__(self, other: Any) -> Any:
        raise TypeError(f"@: a cell's values are numbers per unit.{_hint('matmul')}")

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
        return less(0.0, where(self, other, 0.0))

    def __or__(self, other: Any) -> Any:
        return less(0.0, where(self, 1.0, other))

    def __invert__(self) -> Any:
        return equal(where(self, 1.0, 0.0), 0.0)

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
        raise AttributeError(f"a cell's value is no tensor and has no attribute {name!r}.{_hint(name)}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return _foreign("numpy", ufunc if method == "__call__" else getattr(ufunc, method), inputs, options)

    def __array_function__(self, function: Callable, types: Any, inputs: Sequence, options: dict) -> Any:
        return _foreign("numpy", function, inputs, options)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, inputs: Sequence = (), options: Any = None) -> Any:
        return _foreign("torch", function, inputs, options or {})


_compares: ContextVar[bool] = ContextVar("compares", default=False)


@contextmanager
def comparing() -> Iterator[None]:
    """While a cell's function runs, == compares values; at all other times nodes are told apart by identity."""
    token = _compares.set(True)
    try:
        yield
    finally:
        _compares.reset(token)


class Node(Operators):
    """One value of an expression graph. Make nodes through `leaf`, `constant` and the operations, never directly."""

    __slots__ = ("__weakref__", "args", "op", "value")
    _pool: ClassVar[WeakValueDictionary[tuple, Node]] = WeakValueDictionary()

    op: str
    args: tuple[Node, ...]
    value: Any

    def __new__(cls, op: str, args: tuple[Node, ...] = (), value: Any = None) -> Node:
        key = (op, *map(id, args), value)  # a node keeps its arguments alive, so their ids stay theirs
        node = cls._pool.get(key)
        if node is None:
            node = object.__new__(cls)
            node.op, node.args, node.value = op, args, value
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


@lru_cache(maxsize=1 << 14)
def is_uniform(node: Node) -> bool:
    """Whether the node is the same for all units of a sequence because it comes from sums over them."""
    if node.op == "leaf":
        return node.value[0] == "row"
    if node.op not in OPERATIONS or is_reduction(node):
        return node.op in OPERATIONS
    others = [a for a in node.args if a.op != "constant" and not (a.op == "leaf" and a.value[0] == "scalar")]
    return bool(others) and all(map(is_uniform, others))


def _number(node: Node) -> float | None:
    return node.value if node.op == "constant" else None


def _fold_add(a: Node, b: Node) -> Node | None:
    if a is ZERO or b is ZERO:
        return b if a is ZERO else a
    return apply("sub", a, b.args[0]) if b.op == "neg" else apply("sub", b, a.args[0]) if a.op == "neg" else None


def _fold_sub(a: Node, b: Node) -> Node | None:
    return a if b is ZERO else apply("neg", b) if a is ZERO else ZERO if a is b else None


def _fold_mul(a: Node, b: Node) -> Node | None:
    if a is ZERO or b is ZERO:
        return ZERO
    return b if a is ONE else a if b is ONE else None


def _fold_where(condition: Node, a: Node, b: Node) -> Node | None:
    known = _number(condition)
    if known is not None:  # a Python flag, or a comparison of numbers
        return a if known else b
    if not is_condition(condition):
        raise TypeError(f"where: the condition must be a comparison, such as a < b, got {condition!r}")
    return a if a is b else None


def _select_gradient(node: Node, grad: Node) -> tuple:
    condition = node.args[0]
    return None, where(condition, grad, 0.0), where(condition, 0.0, grad)


def _extremum_gradient(first_loses: Callable) -> Callable:
    def gradient(node: Node, grad: Node) -> tuple:
        a, b = node.args  # as in torch: a tie shares the gradient, and NaN gives it to both
        given = where(equal(a, b), 0.5 * grad, grad)
        return where(first_loses(a, b), 0.0, given), where(first_loses(b, a), 0.0, given)

    return gradient


def _np_sigmoid(x):
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-x))


def _units_mean(*values):
    """Over the last dimension, and over the values."""
    total = sum(values[1:], values[0])
    total = total.mean(-1, keepdims=True) if isinstance(total, np.ndarray) else total.mean(-1, keepdim=True)
    return total / len(values)


def _units_variance(mean, *values):
    return _units_mean(*((v - mean) * (v - mean) for v in values))


_np_erf = np.vectorize(math.erf, otypes=[float])  # NumPy has none


OPERATIONS: dict[str, Operation] = {
    "add": Operation(operator.add, operator.add, lambda y, g: (g, g), fold=_fold_add),
    "sub": Operation(operator.sub, operator.sub, lambda y, g: (g, -g), fold=_fold_sub),
    "mul": Operation(operator.mul, operator.mul, lambda y, g: (g * y.args[1], g * y.args[0]), fold=_fold_mul),
    "div": Operation(
        operator.truediv,
        operator.truediv,
        lambda y, g: (g / y.args[1], -g * y / y.args[1]),
        cost=1,
        fold=lambda a, b: a if b is ONE else None,
    ),
    "neg": Operation(
        operator.neg, operator.neg, lambda y, g: (-g,), fold=lambda a: a.args[0] if a.op == "neg" else None
    ),
    "sigmoid": Operation(_np_sigmoid, torch.sigmoid, lambda y, g: (g * (y * (1.0 - y)),), cost=2),
    "tanh": Operation(np.tanh, torch.tanh, lambda y, g: (g * (1.0 - y * y),), cost=2),
    "exp": Operation(np.exp, torch.exp, lambda y, g: (g * y,), cost=2),
    "expm1": Operation(np.expm1, torch.expm1, lambda y, g: (g * (y + 1.0),), cost=2),
    "log": Operation(np.log, torch.log, lambda y, g: (g / y.args[0],), cost=2),
    "softplus": Operation(
        lambda x: np.logaddexp(0.0, x),
        lambda x: torch.nn.functional.softplus(x, threshold=40.0),  # beyond that the exact result is x in both formats
        lambda y, g: (g * sigmoid(y.args[0]),),
        cost=4,
    ),
    "sin": Operation(np.sin, torch.sin, lambda y, g: (g * cos(y.args[0]),), cost=2),
    "cos": Operation(np.cos, torch.cos, lambda y, g: (-g * sin(y.args[0]),), cost=2),
    "erf": Operation(
        _np_erf, torch.erf, lambda y, g: (g * (2 / math.sqrt(math.pi)) * exp(-y.args[0] * y.args[0]),), cost=4
    ),
    "sqrt": Operation(np.sqrt, torch.sqrt, lambda y, g: (g / (2.0 * y),), cost=1),
    "rsqrt": Operation(lambda x: 1.0 / np.sqrt(x), torch.rsqrt, lambda y, g: (g * (-0.5 * (y * y * y)),), cost=2),
    "relu": Operation(
        lambda x: np.where(x <= 0, 0.0, x), torch.relu, lambda y, g: (where(less_equal(y, 0.0), 0.0, g),)
    ),
    "abs": Operation(
        np.abs,
        torch.abs,
        lambda y, g: (where(less(0.0, y.args[0]), g, where(less(y.args[0], 0.0), -g, 0.0)),),
    ),
    "maximum": Operation(np.maximum, torch.maximum, _extremum_gradient(lambda a, b: less(a, b))),
    "minimum": Operation(np.minimum, torch.minimum, _extremum_gradient(lambda a, b: less(b, a))),
    # The mean of its arguments over the units is its own derivative.
    "mean": Operation(
        _units_mean,
        _units_mean,
        lambda y, g: (mean(g) * (1 / len(y.args)),) * len(y.args),
        cost=math.inf,
        reduces=True,
    ),
    # Of all but the first argument, which is their mean; changing the mean alone changes nothing to first order.
    "variance": Operation(
        _units_variance,
        _units_variance,
        lambda y, g: (None, *((v - y.args[0]) * (mean(g) * (2 / (len(y.args) - 1))) for v in y.args[1:])),
        cost=math.inf,
        reduces=True,
    ),
    "less": Operation(operator.lt, operator.lt, None),
    "less_equal": Operation(operator.le, operator.le, None),
    "equal": Operation(operator.eq, operator.eq, None),
    "where": Operation(np.where, torch.where, _select_gradient, fold=_fold_where),
}


def apply(name: str, *args: Any) -> Any:
    """Compute operation `name` on values of one kind; numbers mix with any kind."""
    args = tuple(getattr(a, "__fastcells_value__", a) for a in args)
    operation = OPERATIONS[name]
    if any(isinstance(a, Node) for a in args):
        nodes = tuple(_as_node(name, a) if name == "where" and not k else number(name, a) for k, a in enumerate(args))
        numbers = [_number(n) for n in nodes]
        if all(n is not None for n in numbers) and name != "where" and not operation.reduces:
            return constant(float(operation.numpy(*numbers)))
        folded = operation.fold(*nodes)
        return Node(name, nodes) if folded is None else folded
    if any(isinstance(a, torch.Tensor) for a in args):
        like = next((a for a in args if isinstance(a, torch.Tensor) and a.dtype != torch.bool), None)
        if like is not None:
            args = tuple(a if isinstance(a, torch.Tensor) else like.new_tensor(a) for a in args)
        return operation.torch(*args)
    return operation.numpy(*args)


def number(name: str, value: Any) -> Node:
    """What a cell gave to operation `name`, as a node that is a number: 1 or 0 for a condition. Raises TypeError."""
    node = _as_node(name, value)
    return where(node, 1.0, 0.0) if is_condition(node) else node


def _as_node(name: str, value: Any) -> Node:
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


def _named(name: str) -> Callable | None:
    """What NumPy or torch has under a name, as a function of this module."""
    if name in INSTEAD:
        return None
    return FOREIGN.get(name) or FUNCTIONS.get(name) or (partial(apply, name) if name in OPERATIONS else None)


def _foreign(library: str, function: Callable, inputs: Sequence, options: dict) -> Any:
    """A function of NumPy or torch on values of which some belong to a cell."""
    name = getattr(function, "__name__", str(function)).strip("_")
    values = [getattr(v, "__fastcells_value__", v) for v in inputs]
    options = {key: getattr(v, "__fastcells_value__", v) for key, v in options.items()}
    if any(v is not given for v, given in zip(values, inputs, strict=True)) and not any(map(_is_node, values)):
        return function(*values, **options)  # a product, of arrays or tensors
    ours = _named(name)
    if ours is None or not any(map(_is_node, [*values, *options.values()])):
        allowed = ", ".join(FUNCTIONS)
        raise TypeError(f"a cell cannot use {library}'s {name}; it may use operators and {allowed}.{_hint(name)}")
    for k, v in enumerate(values):
        if not isinstance(v, Node | str | None):
            values[k] = _as_node(name, v).value  # a plain number, so that no operator comes back here
    options.pop("inplace", None)
    return ours(*values, **options)


def _is_node(value: Any) -> bool:
    return isinstance(value, Node)


def _hint(name: str) -> str:
    """What to write instead of NumPy's or torch's function or a tensor's method of this name, if anything."""
    if name in INSTEAD:
        return f" Write {INSTEAD[name]} instead."
    if _named(name) is None:
        return ""
    return (
        f" Write {name}(v), of fastcells.expression, instead."
        if name in FUNCTIONS
        else f" Write torch.{name}(v) instead."
    )


def sigmoid(v):
    """1 / (1 + exp(-v))"""
    return apply("sigmoid", v)


def tanh(v):
    """Hyperbolic tangent."""
    return apply("tanh", v)


def exp(v):
    """Exponential."""
    return apply("exp", v)


def expm1(v):
    """exp(v) - 1, exact near zero too."""
    return apply("expm1", v)


def log(v):
    """Natural logarithm."""
    return apply("log", v)


def sin(v):
    """Sine; kernels reduce |v| up to some 1e4 in float32, 1e6 in float64, accurately."""
    return apply("sin", v)


def cos(v):
    """Cosine; see `sin` for its range."""
    return apply("cos", v)


def erf(v):
    """Error function."""
    return apply("erf", v)


def softplus(v):
    """log(1 + exp(v))"""
    return apply("softplus", v)


def sqrt(v):
    """Square root."""
    return apply("sqrt", v)


def rsqrt(v):
    """1 / sqrt(v)"""
    return apply("rsqrt", v)


def mean(v):
    """The mean over the units, one number for each sequence."""
    return apply("mean", v)


def norm(*values, eps=1e-5):
    """(v - mean) / sqrt(variance + eps) over the units, the core of layer normalisation (Ba, Kiros & Hinton 2016).

    Of several values, all are normalised together, by one mean and variance, and a tuple is returned.
    """
    centre = apply("mean", *values)
    scale = rsqrt(apply("variance", centre, *values) + eps)
    results = tuple((v - centre) * scale for v in values)
    return results if len(results) > 1 else results[0]


def relu(v):
    """max(v, 0); NaN stays NaN"""
    return apply("relu", v)


def maximum(a, b):
    """The larger value, unit by unit."""
    return apply("maximum", a, b)


def minimum(a, b):
    """The smaller value, unit by unit."""
    return apply("minimum", a, b)


def clip(v, low=None, high=None):
    """v kept within [low, high], as far as given. NaN stays NaN; as in torch, the gradient passes at the bounds too."""
    v = v if low is None else where(less(v, low), low, v)
    return v if high is None else where(less(high, v), high, v)


def where(condition, a, b):
    """a where the condition holds, else b. Conditions are comparisons, also under &, | and ~, or Python's booleans."""
    if isinstance(condition, bool):
        return a if condition else b
    return apply("where", condition, a, b)


def less(a, b):
    """a < b, as a condition for `where`"""
    return apply("less", a, b)


def less_equal(a, b):
    """a <= b, as a condition for `where`"""
    return apply("less_equal", a, b)


def equal(a, b):
    """a == b, as a condition for `where`"""
    return apply("equal", a, b)


def silu(v):
    """v * sigmoid(v)"""
    return v * sigmoid(v)


def hard_sigmoid(v):
    """clip(v / 6 + 1/2, 0, 1), as torch's; clip(0.2 * v + 0.5, 0, 1) is that of ONNX and older Keras"""
    return where(less_equal(v, -3.0), 0.0, where(less_equal(3.0, v), 1.0, v * (1 / 6) + 0.5))


def gelu(v, approximate="none"):
    """v times the normal distribution's probability of less than v; approximate="tanh" for the form with tanh."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if approximate == "tanh":
        return 0.5 * v * (1.0 + tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * (v * v * v))))
    return 0.5 * v * (1.0 + erf(v * math.sqrt(0.5)))


def softsign(v):
    """v / (1 + |v|)"""
    return v / (1.0 + apply("abs", v))


def leaky_relu(v, negative_slope=0.01):
    """v where it is positive, else negative_slope * v"""
    return where(less(0.0, v), v, negative_slope * v)


def elu(v, alpha=1.0):
    """v where it is positive, else alpha * (exp(v) - 1)"""
    negative = less_equal(v, 0.0)
    return where(negative, alpha * expm1(where(negative, v, 0.0)), v)  # no infinity in the part not taken


def selu(v):
    """Scaled exponential linear unit (Klambauer et al. 2017)."""
    return 1.0507009873554804934193349852946 * elu(v, 1.6732632423543772848170429916717)


FUNCTIONS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        sigmoid, tanh, exp, expm1, log, sin, cos, erf, softplus, sqrt, rsqrt, relu, maximum, minimum, clip, where,
        silu, hard_sigmoid, gelu, softsign, leaky_relu, elu, selu, mean, norm,
    )
}  # fmt: skip
"""What a cell may use besides Python's operators, by name."""


def _clamp(v, low=None, high=None, *, min=None, max=None):  # with torch's and NumPy's names
    return clip(v, low if min is None else min, high if max is None else max)


FOREIGN: dict[str, Callable] = {
    "absolute": abs,
    "clamp": _clamp,
    "clamp_max": lambda v, max: _clamp(v, max=max),
    "clamp_min": lambda v, min: _clamp(v, min=min),
    "clip": _clamp,
    "divide": operator.truediv,
    "eq": operator.eq,
    "ge": operator.ge,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "gt": operator.gt,
    "hardsigmoid": hard_sigmoid,
    "hardtanh": lambda v, min_val=-1.0, max_val=1.0: clip(v, min_val, max_val),
    "invert": operator.invert,
    "le": operator.le,
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "logical_and": operator.and_,
    "logical_not": operator.invert,
    "logical_or": operator.or_,
    "lt": operator.lt,
    "max": maximum,
    "min": minimum,
    "multiply": operator.mul,
    "ne": operator.ne,
    "negative": operator.neg,
    "not_equal": operator.ne,
    "pow": operator.pow,
    "power": operator.pow,
    "reciprocal": lambda v: 1.0 / v,
    "square": lambda v: v * v,
    "subtract": operator.sub,
    "true_divide": operator.truediv,
}
"""What NumPy or torch has under a name, or with arguments, of its own."""

_PRODUCT, _PARTS = "u.g(v), the recurrent product of any vector,", "a gate or state of its own for each part"
INSTEAD = {
    **dict.fromkeys(("mean", "sum"), "fastcells.expression.mean(v), over the units,"),
    **dict.fromkeys(("norm", "layer_norm"), "fastcells.expression.norm(v), over the units,"),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "zeros", "ones"), "a plain number"),
    "dropout": "recurrent_dropout, zoneout or weight_dropout, of the layer,",
    **dict.fromkeys(("linear", "matmul", "mm", "dot", "einsum", "rmatmul"), _PRODUCT),
    **dict.fromkeys(("cat", "stack", "concat", "concatenate", "chunk", "split"), _PARTS),
}
"""What to write where NumPy's or torch's function means another thing, or is none for a cell."""


def topological(outputs: Iterable[Node]) -> list[Node]:
    """All nodes that the outputs depend on, arguments before their users."""
    seen: set[Node] = set()
    order: list[Node] = []

    def visit(node: Node) -> None:
        if node not in seen:
            seen.add(node)
            for a in node.args:
                visit(a)
            order.append(node)

    for output in outputs:
        visit(output)
    return order


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
