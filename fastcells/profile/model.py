"""The profile of a model: every recurrent layer that it runs, before and after `fastcells.convert`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn as original

from ..convert import convert, revert
from ..dropin import DropIn
from ..roof import best
from .calls import map_tensors, step
from .layer import LayerProfile, profile_layer
from .words import duration, table


@dataclass(frozen=True)
class Row:
    """A recurrent layer of a model. calls: in one run of the model; seconds are of one call, with what the first one
    was given. before: with torch.nn, None where it has no such layer. after: with fastcells, None where the layer stays
    as it is, which `note` tells."""

    name: str
    calls: int
    before: float | None
    after: LayerProfile | None
    note: str

    @property
    def ratio(self) -> float | None:
        return None if self.after is None or self.before is None else self.before / self.after.timing.best


@dataclass(frozen=True)
class Report:
    """Profile of a model: a row for each recurrent layer that it runs; seconds of the whole before and after."""

    rows: tuple[Row, ...]
    before: float
    after: float
    train: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything, as numbers and strings."""
        rows = [
            {
                **{k: getattr(r, k) for k in ("name", "calls", "before", "note", "ratio")},
                "after": r.after and r.after.to_dict(),
            }
            for r in self.rows
        ]
        return {"rows": rows, "before": self.before, "after": self.after, "train": self.train}

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "calls", "torch.nn", "fastcells", "ratio", "roof", "most time in")]
        for r in self.rows:
            name = r.name or "(the model)"
            before = "-" if r.before is None else duration(r.before)
            if r.after is None:
                lines.append((name, str(r.calls), before, "-", "-", "-", r.note))
                continue
            parts = r.after.timing.parts
            most = max(parts, key=lambda p: parts[p])
            lines.append(
                (
                    name,
                    str(r.calls),
                    before,
                    duration(r.after.timing.best),
                    "-" if r.ratio is None else f"{r.ratio:.2f}",
                    f"{r.after.share_of_roof:.0%}",
                    f"{most}, {parts[most] / r.after.timing.sum_of_parts:.0%}" if not r.note else r.note,
                )
            )
        ratio = f"{self.before / self.after:.2f}"
        lines.append(("the model", "1", duration(self.before), duration(self.after), ratio, "", ""))
        return "\n".join(line.rstrip() for line in table(lines))


def profile(model: torch.nn.Module, *inputs: Any, train: bool = False, budget: float = 1.0) -> Report:
    """Profile every recurrent layer that `model(*inputs)` runs, before and after `fastcells.convert`.

    train: forward and backward, else forward without gradients. budget: seconds of measuring for each layer, about.
    The model runs several times in the mode it is in (buffers such as running means move on); its layers' classes and
    the random generator are afterwards as they were. Raises TypeError if `model` is not a torch.nn.Module, ValueError
    if it runs no recurrent layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kinds = original.RNNBase, original.RNNCellBase, DropIn
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    classes = {name: module.__class__ for name, module in layers.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            revert(model)
            theirs = {name: module.__class__ for name, module in layers.items()}
            seen = _calls(layers, step(model, inputs, {}, train))
            if not seen:
                raise ValueError("model must run at least one recurrent layer of torch.nn or fastcells")
            left = convert(model).left
            ours = {name: module.__class__ for name, module in layers.items()}
            rows = []
            for name, (calls, args, kwargs) in seen.items():
                module = layers[name]
                own = theirs[name] is ours[name]  # no other layer to set it beside
                if not isinstance(module, DropIn):
                    before = best(step(module, args, kwargs, train), budget / 4)
                    rows.append(Row(name, calls, before, None, left.get(name, "not a layer that convert knows")))
                    continue
                times = []
                for moment in range(2):  # before and after, as other load comes and goes
                    if not own:
                        set_class(module, theirs[name])
                        times.append(best(step(module, args, kwargs, train), budget / 8))
                        set_class(module, ours[name])
                    if moment == 0:
                        after = profile_layer(module, *args, train=train, budget=budget, **kwargs)
                note = after.reasons[0] if after.route == "torch" else ""
                rows.append(Row(name, calls, min(times, default=None), after, note))
            whole: dict[str, float] = {}
            call = step(model, inputs, {}, train)
            for _ in range(2):
                for kind, chosen in (("before", theirs), ("after", ours)):
                    for name, module in layers.items():
                        set_class(module, chosen[name])
                    whole[kind] = min(whole.get(kind, math.inf), best(call, budget / 8, least=2))
        finally:
            for name, module in layers.items():
                set_class(module, classes[name])
    return Report(tuple(rows), whole["before"], whole["after"], train)


def set_class(module: torch.nn.Module, kind: type) -> None:
    """What `convert` and `revert` do to a layer."""
    module.__class__ = kind


def _calls(layers: Mapping[str, torch.nn.Module], call: Callable[[], Any]) -> dict[str, tuple[int, tuple, dict]]:
    """(calls, arguments of the first one) of every layer that `call` runs."""
    seen: dict[str, tuple[int, tuple, dict]] = {}

    def hook(name: str) -> Callable:
        def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            calls, *first = seen.get(name, (0, *map_tensors(Tensor.detach, (args, kwargs))))
            seen[name] = (calls + 1, *first)

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen
