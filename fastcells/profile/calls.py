"""Calls of a module, to be timed again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map


def step(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool) -> Callable[[], Any]:
    """A function that runs the module once: forward without gradients, or forward and backward from random ones."""
    if not train:

        def infer() -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        return infer

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    args, kwargs = map_tensors(leaf, tuple(args)), map_tensors(leaf, dict(kwargs))
    leaves = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    cotangents: list[Tensor] = []

    def train_step() -> Any:
        with torch.enable_grad():
            found = module(*args, **kwargs)
            outputs = [t for t in _tensors(found) if t.requires_grad]
            if len(cotangents) != len(outputs):
                cotangents[:] = [torch.randn_like(t) for t in outputs]
            wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
            return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)

    return train_step


def map_tensors(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """The same structure with each tensor replaced; of packed sequences, the data."""

    def leaf(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return PackedSequence(function(value.data), *value[1:])
        return function(value) if isinstance(value, Tensor) else value

    return tree_map(leaf, values, is_leaf=lambda v: isinstance(v, PackedSequence))


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in a structure; of packed sequences, the data."""
    leaves = tree_leaves(values, is_leaf=lambda v: isinstance(v, PackedSequence))
    return [t for t in (v.data if isinstance(v, PackedSequence) else v for v in leaves) if isinstance(t, Tensor)]
