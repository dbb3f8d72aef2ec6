"""A cell written with NumPy's or torch's functions: what they stand for, and what to write where they do not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .functions import FUNCTIONS, clip, hard_sigmoid, less_equal, maximum, minimum, softplus, where
from .graph import OPERATIONS, Operators, apply, as_node


def _clamp(v, low=None, high=None, *, min=None, max=None, a_min=None, a_max=None):  # with torch's and NumPy's names
    low, high = (next((b for b in bounds if b is not None), None) for bounds in ((low, min, a_min), (high, max, a_max)))
    return clip(v, low, high)


def _where(condition, input, other):
    return where(condition, input, other)


def _softplus(input, beta=1.0, threshold=20.0):  # from which on torch takes the input itself, which is the same
    return softplus(input) if beta == 1 else softplus(beta * input) / beta


def _hardtanh(v, min_val=-1.0, max_val=1.0):  # without a gradient at its bounds, unlike clamp
    return where(less_equal(v, min_val), min_val, where(less_equal(max_val, v), max_val, v))


def _of_two(function, input, other=None):  # with one value, or a number, it is over a dimension
    if not isinstance(other, Operators):
        raise TypeError(f"a cell's values are numbers per unit, without dimensions. Write {function.__name__}(a, b).")
    return function(input, other)


FOREIGN: dict[str, Callable] = {
    "absolute": abs,
    "add": lambda input, other, alpha=1.0: input + (other if alpha == 1 else alpha * other),
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
    "hardtanh": _hardtanh,
    "invert": operator.invert,
    "le": operator.le,
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "logical_and": operator.and_,
    "logical_not": operator.invert,
    "logical_or": operator.or_,
    "lt": operator.lt,
    "max": partial(_of_two, maximum),
    "min": partial(_of_two, minimum),
    "multiply": operator.mul,
    "ne": operator.ne,
    "negative": operator.neg,
    "not_equal": operator.ne,
    "pow": operator.pow,
    "power": operator.pow,
    "reciprocal": lambda v: 1.0 / v,
    "softplus": _softplus,
    "square": lambda v: v * v,
    **dict.fromkeys(
        ("sub", "subtract"), lambda input, other, alpha=1.0: input - (other if alpha == 1 else alpha * other)
    ),
    "true_divide": operator.truediv,
    "where": _where,
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


def _named(name: str) -> Callable | None:
    """What NumPy or torch has under a name, as a function of this module."""
    if name in INSTEAD:
        return None
    return FOREIGN.get(name) or FUNCTIONS.get(name) or (partial(apply, name) if name in OPERATIONS else None)


def call(library: str, function: Callable, inputs: Sequence, options: dict) -> Any:
    """A function of NumPy or torch on values of which some belong to a cell."""
    written = getattr(function, "__name__", str(function))
    name = written.strip("_")
    ours, options = _named(name), dict(options)
    in_place = options.pop("inplace", False) or (library == "torch" and written == f"{name}_")
    if ours is None:
        allowed = ", ".join(FUNCTIONS)
        raise TypeError(f"a cell cannot use {library}'s {name}; it may use operators and {allowed}.{hint(name)}")
    if in_place:
        raise TypeError(f"{written}: a cell's values cannot change in place. Write v = {library}.{name}(v) instead.")
    # Plain numbers, so that no operator comes back here.
    values = [v if isinstance(v, Operators | str | None) else as_node(name, v).value for v in inputs]
    try:
        return ours(*values, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        given = ", ".join(options)
        raise TypeError(f"{name}: a cell cannot use it with {given}. Write what that does with operators.") from None


def hint(name: str) -> str:
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
