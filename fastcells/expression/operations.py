"""The table of operations: how NumPy and torch compute each, its derivative, and what folds when a node is made."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np
import torch

from .functions import cos, equal, exp, less, less_equal, mean, sigmoid, sin, where
from .graph import ONE, OPERATIONS, ZERO, Node, Operation, apply, is_condition, known


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
    flag = known(condition)
    if flag is not None:  # a Python flag, or a comparison of numbers
        return a if flag else b
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


OPERATIONS |= {
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
