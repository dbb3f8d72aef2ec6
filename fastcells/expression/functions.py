"""The functions that a cell may use, on NumPy values, torch tensors and nodes alike."""

from __future__ import annotations

import math
from collections.abc import Callable

from .graph import apply


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
