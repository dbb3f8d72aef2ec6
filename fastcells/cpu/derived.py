"""States that the engine derives from a cell's own: their values before the first step, and what their gradients are
of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..expression import Node, apply, leaf
from .direction import Ready, usable


def derive(r: Ready, states: Sequence[Tensor], own: dict[str, Tensor], fed: dict[str, Tensor]) -> list[Tensor]:
    """The derived states, [N, H] each, before the first step. own, fed: of one direction."""
    p = r.programs
    known: dict[Node, Any] = {leaf("s", n): t for n, t in zip(p.states, states, strict=False)}
    known |= {leaf(kind, n): t for n, t in {**own, **fed}.items() for kind in ("p", "scalar", "input")}

    def value(node: Node) -> Any:
        if node not in known:
            constant = node.op == "constant"
            known[node] = node.value if constant else apply(node.op, *map(value, node.args))
        return known[node]

    like = states[0]  # some are made of the cell's own tensors alone, or of numbers that a condition chooses
    return [value(n).to(like.dtype).expand(len(like), -1) for n in p.derived]


def hand_on(
    r: Ready, states: Sequence[Tensor], own: dict[str, Tensor], grads: Sequence[Tensor], totals: dict[str, Tensor]
) -> None:
    """Hand the derived states' gradients before the first step on to what they were made from.

    states, grads: [N, width] of all states, to which is added; own: the cell's own tensors and extra inputs; totals:
    their gradients, [N, H] each, to which is added.
    """
    count = len(r.cell.states)
    with torch.inference_mode(False), torch.enable_grad():  # the former: also within a registered operation
        given = [s.detach().requires_grad_() for s in states[:count]]
        wide = {n: (t.detach().expand(totals[n].shape) if n in totals else t.detach()) for n, t in own.items()}
        wide = {n: t.requires_grad_() for n, t in wide.items()}
        leaves = [*zip(given, grads, strict=False), *((wide[n], t) for n, t in totals.items())]
        derived = [(t, g) for t, g in zip(derive(r, given, wide, {}), grads[count:], strict=True) if t.requires_grad]
        if not derived:
            return
        outputs, cotangents = zip(*derived, strict=True)
        found = torch.autograd.grad(outputs, [t for t, _ in leaves], cotangents, allow_unused=True)
    for (_, total), grad in zip(leaves, found, strict=True):
        if grad is not None:
            total += grad


def all_states(
    r: Ready, states: Sequence[Tensor] | None, parameters: Sequence[Sequence[Any]], inputs: Sequence[Tensor], rows: int
) -> list[Tensor] | None:
    """[D, N, width] of each state before the first step, the derived ones among them; None: all zero."""
    if not r.programs.derived:
        return None if states is None else [usable(s) for s in states]
    if states is None:
        w_ih = parameters[0][0]
        hidden = w_ih.shape[0] // len(r.gates)
        states = [w_ih.new_zeros(len(parameters), rows, hidden)] * len(r.cell.states)
    derived = []
    for k, q in enumerate(parameters):
        own = dict(zip(r.cell.own, q[5:], strict=True))
        fed = {n: t[k] for n, t in zip(r.cell.fed, inputs, strict=True)}
        derived.append(derive(r, [s[k] for s in states], own, fed))
    return [usable(t) for t in (*states, *map(torch.stack, zip(*derived, strict=True)))]
