"""Switching the recurrent layers of an existing model between torch.nn and fastcells, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn.utils.parametrize import is_parametrized

from .nn import DROP_IN, DropIn, OverTime, Recurrent

BACK = {ours: theirs for theirs, ours in DROP_IN.items()}


@dataclass
class Conversion:
    """What became of the recurrent layers and cells of a model, by module name ("" is the model itself).

    swapped: the class that each switched module now has. left: why each of the others was left as it is.
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
    and a module that is used in several places is switched once. Left as they are, with a reason in the report: user
    subclasses, modules whose `forward` was replaced, and modules compiled by TorchScript. `revert` is the way back.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _switch(model, DROP_IN)


def revert(model: torch.nn.Module) -> Conversion:
    """Make every fastcells layer and cell of `model` the torch.nn one again, in place: the inverse of `convert`.

    Raises TypeError if `model` is not a torch.nn.Module.
    """
    return _switch(model, BACK)


def _switch(model: torch.nn.Module, classes: Mapping[type, type]) -> Conversion:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Conversion()
    for name, module in model.named_modules():
        reason = _obstacle(module, classes)
        kind = _kind(module)
        if reason is not None:
            report.left[name] = reason
        elif kind in classes:
            module.__class__ = classes[kind] if kind is type(module) else _rebased(type(module), classes[kind])
            report.swapped[name] = _qualified(classes[kind])
    return report


def _kind(module: torch.nn.Module) -> type:
    """The class of a module, without what parametrize puts on top of it: a generated subclass with the properties."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _rebased(generated: type, base: type) -> type:
    """A parametrized module's generated class over another base. A new one, since copies of a module share theirs."""
    own = {k: v for k, v in vars(generated).items() if k not in ("__dict__", "__weakref__")}
    return type(generated.__name__, (base,), own)


def _obstacle(module: torch.nn.Module, classes: Mapping[type, type]) -> str | None:
    """Why a recurrent module stays as it is, or None: it can be switched, or is none of our business."""
    kind = _kind(module)
    if isinstance(module, torch.jit.ScriptModule):
        recurrent = getattr(module, "original_name", None) in {c.__name__ for c in classes}
        return "compiled by TorchScript: its code no longer comes from its class" if recurrent else None
    if isinstance(module, Recurrent):
        return f"already {_qualified(kind)}" if classes is DROP_IN else "torch.nn has no layer of any cell"
    if not isinstance(module, tuple(DROP_IN)):
        return None
    if classes is BACK and isinstance(module, OverTime) and module._random():
        return "torch.nn has no recurrent_dropout, zoneout or weight_dropout"
    if kind in classes.values():
        return f"already {_qualified(kind)}"
    if kind not in classes:
        family = "fastcells" if issubclass(kind, DropIn) else "torch.nn"
        return f"{_qualified(kind)} is a subclass of a {family} class, which may count on what that one does"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _qualified(kind: type) -> str:
    module = "torch.nn" if kind in DROP_IN else kind.__module__
    return f"{module}.{kind.__qualname__}"
