"""Switching the recurrent layers of an existing model between torch.nn and fastcells, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import rnn as original  # the classes themselves: torch.nn.LSTM may be one of ours by now
from torch.nn.utils.parametrize import is_parametrized

from . import subclass
from .dropin import DropIn
from .nn import DROP_IN, OverTime, Recurrent

BACK = {ours: theirs for theirs, ours in DROP_IN.items()}


@dataclass
class Conversion:
    """What became of the recurrent layers and cells of a model, by module name ("" is the model itself).

    swapped: the class that each switched module now has, or under which of the user's own classes. left: why each of
    the others was left as it is.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return "no recurrent layers found"
        lines = []
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            lines += [f"{title} {len(entries)}"] * bool(entries)
            lines += [f"  {name or '(the model)'}: {text}" for name, text in entries.items()]
        return "\n".join(lines)


def convert(model: torch.nn.Module) -> Conversion:
    """Make every torch.nn recurrent layer and cell of `model` the fastcells one of the same name, in place.

    Only the class of each module changes: parameters, hooks, optimizer state and references to the module stay valid,
    `state_dict` is the same, and a module that is used in several places is switched once. A subclass of the user's
    keeps all that it defines; what it inherits, or calls by `super().forward(...)`, becomes fastcells'. Left as they
    are, with a reason in the report: subclasses that never call it or replace what it relies on, modules whose
    `forward` was replaced on the instance, and modules compiled by TorchScript. `revert` is the way back.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _switch(model, DROP_IN)


def revert(model: torch.nn.Module) -> Conversion:
    """Make every fastcells layer and cell of `model` the torch.nn one again, in place: the inverse of `convert`.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _switch(model, BACK)


def left(module: torch.nn.Module) -> str | None:
    """Why `convert` would leave a recurrent module as it is, or None where it would not."""
    return _obstacle(module, _kind(module), DROP_IN)


def _switch(model: torch.nn.Module, classes: Mapping[type, type]) -> Conversion:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Conversion()
    for name, module in model.named_modules():
        kind = _kind(module)
        reason = _obstacle(module, kind, classes)
        if reason is not None:
            report.left[name] = reason
        elif (target := _target(kind, classes)) is not None:
            module.__class__ = target if kind is type(module) else _rebased(type(module), target)
            report.swapped[name] = _described(target)
    return report


def _target(kind: Any, classes: Mapping[type, type]) -> type | None:
    """The class that a module of class `kind` gets, if nothing stands in the way; None if it is no recurrent one."""
    if kind in classes:
        return classes[kind]
    if classes is BACK:
        parts = subclass.parts(kind)
        return parts[0] if parts else None
    return next((subclass.over(kind, ours) for theirs, ours in classes.items() if issubclass(kind, theirs)), None)


def _kind(module: torch.nn.Module) -> type:
    """The class of a module, without what parametrize puts on top of it: a generated subclass with the properties."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _rebased(generated: type, base: type) -> type:
    """A parametrized module's generated class over another base. A new one, since copies of a module share theirs."""
    own = {k: v for k, v in vars(generated).items() if k not in ("__dict__", "__weakref__")}
    return type(generated.__name__, (base,), own)


def _obstacle(module: torch.nn.Module, kind: type, classes: Mapping[type, type]) -> str | None:
    """Why a recurrent module stays as it is, or None: it can be switched, or is none of our business."""
    if isinstance(module, torch.jit.ScriptModule):
        recurrent = getattr(module, "original_name", None) in {c.__name__ for c in classes}
        return "compiled by TorchScript: its code no longer comes from its class" if recurrent else None
    if kind.__module__.startswith("torch.ao.nn.quant") and kind.__name__ in {c.__name__ for c in classes}:
        return f"{_described(kind)} has weights of whole numbers"
    if isinstance(module, Recurrent):
        return f"already {_described(kind)}" if classes is DROP_IN else "torch.nn has no layer of any cell"
    if not isinstance(module, tuple(DROP_IN)):
        known = ", ".join(kind.__name__ for kind in DROP_IN)
        recurrent = isinstance(module, (original.RNNBase, original.RNNCellBase))
        return f"{_described(kind)} is none of torch.nn's {known}, nor a subclass" if recurrent else None
    if classes is BACK and isinstance(module, OverTime) and module._random():
        return "torch.nn has no recurrent_dropout, zoneout or weight_dropout"
    ours = issubclass(kind, DropIn)
    if ours and kind not in BACK and not subclass.parts(kind):
        return f"{_described(kind)} is a subclass of a fastcells class, which may count on what that one does"
    if ours is (classes is DROP_IN):
        return f"already {_described(kind)}"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if ours or kind in DROP_IN:
        return None
    base = next(base for theirs, base in DROP_IN.items() if issubclass(kind, theirs))
    reason = subclass.obstacle(module, kind, base)
    return reason and f"{_described(kind)} is a subclass of {_described(base.__bases__[1])}, and {reason}"


def _described(kind: type) -> str:
    if parts := subclass.parts(kind):
        return f"{_described(parts[1])} under {_described(parts[0])}"
    module = "torch.nn" if kind in DROP_IN else kind.__module__
    return f"{module}.{kind.__qualname__}"
