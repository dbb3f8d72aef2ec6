"""Recurrent layers for PyTorch: fused kernels over time, compiled by Numba, from cells written as one function.

layer = fastcells.nn.LSTM(32, 64)        # torch.nn.LSTM's constructor, parameters, results
fastcells.convert(model)                 # swaps the recurrent layers of an existing model in place
print(fastcells.explain(layer, x))       # which path a call takes, and why
"""

from . import activations, cells, expression, functional, importers, nn, onnx, ops, reference, rl, variants
from .cell import Cell, cell
from .convert import convert, revert
from .explain import Explanation, explain
from .profile import Report, profile

__all__ = [
    "Cell",
    "Explanation",
    "Report",
    "activations",
    "cell",
    "cells",
    "convert",
    "explain",
    "expression",
    "functional",
    "importers",
    "nn",
    "onnx",
    "ops",
    "profile",
    "reference",
    "revert",
    "rl",
    "variants",
]
__version__ = "0.1.0"
