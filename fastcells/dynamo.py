"""Lets torch.compile trace the layers: its tracer breaks the graph at every torch.nn.RNN, LSTM or GRU and subclass.

torch has a switch for that, `torch._dynamo.config.allow_rnn`, but that would also have torch.nn's own layers taken
apart, time step by time step. So it is on only while the tracer meets one of ours.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRACER = "torch._dynamo.variables.builder"


def admit(layers: type) -> None:
    """Let torch.compile trace modules of class `layers`; takes effect when its tracer, slow to import, is imported.

    Where the tracer is not as known here, nothing changes: graphs break at the layers, as they do at torch.nn's.
    """
    if TRACER in sys.modules:
        _open(sys.modules[TRACER], layers)
    else:
        sys.meta_path.insert(0, _WhenImported(layers))


def constant(function: Callable) -> Callable:
    """Let torch.compile call the function while it traces, and keep the result.

    As torch.compiler.assume_constant_result, which imports the tracer.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _open(tracer: ModuleType, layers: type) -> None:
    builder: Any = getattr(tracer, "VariableBuilder", None)
    original: Any = getattr(builder, "wrap_module", None)
    config: Any = getattr(tracer, "config", None)
    if original is None or not hasattr(config, "allow_rnn"):
        return

    @wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, layers):
            return original(self, value)
        with config.patch(allow_rnn=True):
            return original(self, value)

    builder.wrap_module = wrap_module


class _WhenImported(MetaPathFinder):
    """Once: opens the tracer after it was imported."""

    def __init__(self, layers: type) -> None:
        self.layers = layers

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRACER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _open(module, self.layers)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
