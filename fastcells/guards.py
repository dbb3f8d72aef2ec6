"""Whether tensors are laid out as others were, told in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:  # compares kinds, formats, devices, sizes and strides of many tensors at once
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # then no call is like another one
    TensorGuards = None  # type: ignore[assignment, misc]

AVAILABLE = TensorGuards is not None


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many arguments: whether they are tensors of the same kinds, formats, devices, sizes and
    strides, each wanting a gradient as these do now, and torch dispatches on them as it would now: dispatch modes,
    transforms, traces, autocast and inference mode make the answer False where they were not on, too."""
    if TensorGuards is None:
        return lambda *_: False
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    guards: Any = TensorGuards
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())
