"""Activation functions by the names that Keras and ONNX know them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import expression as ex


@dataclass(frozen=True)
class Activation:
    """A function of a cell's value with its constants filled in. Equal ones make the same cell, and can be pickled."""

    function: Callable
    constants: tuple[float, ...] = ()

    def __call__(self, v: Any) -> Any:
        return self.function(v, *self.constants)


def linear(v, slope=1.0, offset=0.0):
    """slope * v + offset"""
    return v * slope + offset


def hard_sigmoid(v, slope=0.2, offset=0.5):
    """clip(slope * v + offset, 0, 1)"""
    return ex.clip(v * slope + offset, 0.0, 1.0)


def thresholded_relu(v, threshold=1.0):
    """v above the threshold, else 0"""
    return ex.where(ex.less(threshold, v), v, 0.0)


def scaled_tanh(v, scale, slope):
    """scale * tanh(slope * v)"""
    return ex.tanh(v * slope) * scale


def mish(v):
    """v * tanh(softplus(v)) (Misra 2019)"""
    return v * ex.tanh(ex.softplus(v))


def log_sigmoid(v):
    """log(sigmoid(v))"""
    return -ex.softplus(-v)


KERAS: dict[str, Activation] = {
    "elu": Activation(ex.elu),
    "exponential": Activation(ex.exp),
    "gelu": Activation(ex.gelu),
    "hard_sigmoid": Activation(ex.hard_sigmoid),
    "hard_silu": Activation(lambda v: v * ex.hard_sigmoid(v)),
    "hard_tanh": Activation(ex.clip, (-1.0, 1.0)),
    "leaky_relu": Activation(ex.leaky_relu, (0.2,)),
    "linear": Activation(linear),
    "log_sigmoid": Activation(log_sigmoid),
    "mish": Activation(mish),
    "relu": Activation(ex.relu),
    "relu6": Activation(ex.clip, (0.0, 6.0)),
    "selu": Activation(ex.selu),
    "sigmoid": Activation(ex.sigmoid),
    "silu": Activation(ex.silu),
    "softplus": Activation(ex.softplus),
    "softsign": Activation(ex.softsign),
    "swish": Activation(ex.silu),
    "tanh": Activation(ex.tanh),
}
"""As Keras 3 defines them."""

ONNX: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "Affine": (linear, (1.0, 0.0)),
    "Elu": (ex.elu, (1.0,)),
    "HardSigmoid": (hard_sigmoid, (0.2, 0.5)),
    "LeakyRelu": (ex.leaky_relu, (0.01,)),
    "Relu": (ex.relu, ()),
    "ScaledTanh": (scaled_tanh, (1.0, 1.0)),
    "Sigmoid": (ex.sigmoid, ()),
    "Softplus": (ex.softplus, ()),
    "Softsign": (ex.softsign, ()),
    "Tanh": (ex.tanh, ()),
    "ThresholdedRelu": (thresholded_relu, (1.0,)),
}
"""The function, and the defaults of its alpha and beta, as far as it has them."""


def activation(given: str | Callable) -> Callable:
    """The function of one of Keras's names, or the given function itself. Raises ValueError for other names."""
    if callable(given):
        return given
    if given not in KERAS:
        raise ValueError(f"activation must be a function or one of {', '.join(KERAS)}, got {given!r}")
    return KERAS[given]
