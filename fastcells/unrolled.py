"""A layer as a plain Python loop over torch tensors: the cell's own function, differentiated by autograd.

The oracle of the tests, and the path for derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cell import Cell


def layer(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[tuple],
    batch_sizes: Tensor | None = None,
    fed: Sequence[Tensor] = (),
    return_cell_states: bool = False,
) -> tuple[Any, ...]:
    """The same call as `functional.layer`, one step of torch operations at a time."""
    counts = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    inputs = x.unbind(0) if batch_sizes is None else x.split(counts)
    results = [
        _direction(
            cell, inputs, counts, None if states is None else [s[k] for s in states], p, [t[k] for t in fed], bool(k)
        )
        for k, p in enumerate(parameters)
    ]
    join = torch.stack if batch_sizes is None else torch.cat
    y, *others = (  # of every step: all directions side by side
        join(
            [torch.cat([new[j] for new in step], -1) for step in zip(*(outputs for outputs, _ in results), strict=True)]
        )
        for j in range(len(cell.states) if return_cell_states else 1)
    )
    finals = tuple(torch.stack(s) for s in zip(*(final for _, final in results), strict=True))
    return (y, finals, tuple(others)) if return_cell_states else (y, finals)


def _direction(cell, inputs, counts, states, parameters, fed, reverse) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    """The new states of every step, and the final ones."""
    w_ih, w_hh, b_ih, b_hh, w_hr = parameters[:5]
    own = dict(zip(cell.own, parameters[5] if len(parameters) > 5 else (), strict=True))
    fixed = dict(zip(cell.inputs, fed, strict=False))
    by_step = {
        name: t.unbind(0) if t.dim() == 3 else t.split(counts)
        for name, t in zip(cell.step_inputs, fed[len(cell.inputs) :], strict=True)
    }
    gates = {g: k for k, g in enumerate(cell.gates)}
    h = w_ih.shape[0] // len(gates)
    rows = max(counts)
    if states is None:
        states = [w_ih.new_zeros(rows, h if w_hr is None else len(w_hr))] + [w_ih.new_zeros(rows, h)] * (
            len(cell.states) - 1
        )

    kind = states[0].dtype  # numbers that a condition chooses have torch's default one

    def affine(v: Tensor, weight: Tensor | None, bias: Tensor | None, gate: str) -> Tensor:
        if weight is None:  # of a product that nothing comes of
            return v.new_zeros(len(v), h)
        block = slice(gates[gate] * h, (gates[gate] + 1) * h)
        return torch.nn.functional.linear(v, weight[block], None if bias is None else bias[block])

    outputs: list[tuple[Tensor, ...]] = [()] * len(counts)
    for t in reversed(range(len(counts))) if reverse else range(len(counts)):
        n = counts[t]  # sequences that have this step are the first ones
        active = {name: s[:n] for name, s in zip(cell.states, states, strict=True)}
        new = cell.step(
            {g: affine(inputs[t], w_ih, b_ih, g) for g in gates},
            lambda g, v: affine(v.to(kind), w_hh, b_hh, g),
            active,
            {**own, **{name: v[:n] for name, v in fixed.items()}, **{name: v[t] for name, v in by_step.items()}},
        )
        new = tuple(_row_each(v, states[0].new_empty(()), n, h) for v in new)
        if w_hr is not None:
            new = (torch.nn.functional.linear(new[0], w_hr), *new[1:])
        outputs[t] = new
        states = [s if n == 0 else torch.cat([a, s[n:]]) for a, s in zip(new, states, strict=True)]
    return outputs, states


def _row_each(value: Any, like: Tensor, rows: int, hidden: int) -> Tensor:
    """What a cell gives for a state, the same for all units or sequences, or a number, as [rows, hidden]."""
    value = value if isinstance(value, Tensor) else torch.full_like(like, value)
    return value if value.shape == (rows, hidden) else value.expand(rows, hidden)
