"""Which path a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import rnn as original

from .cpu.layer import Sequences, planned, suited
from .dropin import DropIn
from .functional import flat
from .nn import OverTime, Recurrent


@dataclass(frozen=True)
class Explanation:
    """route: "engine" or "torch". reasons: sentences, most general first; `str()` prints them."""

    module: str
    route: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.module}: {self.route}", *(f"  {r}" for r in self.reasons)])


def explain(module: torch.nn.Module, input: Any, hx: Any = None, **options: Any) -> Explanation:
    """Which path `module(input, hx, **options)` would take now, and why; no layer is run.

    module: a layer or cell of `fastcells.nn` (or of torch.nn, which always takes torch's). Raises TypeError for others.
    options: lengths, reset, reset_to of a layer.
    """
    name = repr(module)
    if isinstance(module, (original.RNNBase, original.RNNCellBase)) and not isinstance(module, DropIn):
        return Explanation(name, "torch", ("a torch.nn module: fastcells.convert would change that",))
    if not isinstance(module, DropIn):
        raise TypeError(f"explain: module must be a recurrent layer or cell, got {type(module).__name__}")
    within = module._within(input, hx, **options) if isinstance(module, OverTime) and options else None
    if isinstance(module, OverTime) and options and within is None:
        input, hx, _ = module._ragged(input, hx, **options)
    reason = module._route(input, hx)
    if reason is not None:
        form = (
            "the cell as a loop of torch operations" if isinstance(module, Recurrent) else "torch's own implementation"
        )
        return Explanation(name, "torch", (f"{form}: {reason}",))
    call = module._read(input, hx) if within is None else within[0]
    batch = call.batch
    layout = "packed" if batch.batch_sizes is not None else "padded"
    sequences = Sequences(batch.x, batch.batch_sizes)
    vector = suited(call.cell, call.parameters[0][0]).forward.vector
    reasons = [
        f"kernels of cell {call.cell.name}, {batch.x.dtype}, vectors of {vector} bytes; "
        f"{layout} input, {sequences.steps} steps, {sequences.rows} sequences, {sequences.total} tokens"
    ]
    if within is not None:
        reasons.append(f"lengths and resets inside the time loop, by cell {within[1].cell(call.cell).name}: no packing")
    previous: tuple[str, ...] = ()
    for k, directions in enumerate(call.parameters):
        plan = planned(call.cell, directions[0], sequences, len(directions))
        if plan.reasons != previous:
            reasons += [f"layer {k}: {r}" for r in plan.reasons]
        previous = plan.reasons
    weights = [t for directions in call.parameters for t in flat(directions) if t is not None]
    tensors = [batch.x, *(call.states or ()), *weights]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        reasons.append("a gradient is wanted: the activated gates and the states of every step are kept for it")
    else:
        reasons.append("no gradient is wanted: nothing is kept")
    return Explanation(name, "engine", tuple(reasons))
