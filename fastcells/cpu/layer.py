"""One layer, all its directions, on the CPU engine: its calls, made ready for tensors laid out like these, and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..cell import Cell
from . import team
from .backward import Backward, Gradients, Wanted
from .call import forget, forgetting, kept
from .derived import all_states
from .direction import Ready, Sequences, planned, ready, suited, usable
from .forward import Forward, Saved

__all__ = [
    "Backward",
    "Forward",
    "Gradients",
    "Saved",
    "Sequences",
    "Wanted",
    "backward",
    "forget",
    "forgetting",
    "forward",
    "planned",
    "prepared",
    "prepared_backward",
    "ready",
    "suited",
    "threads",
]

Parameters = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]

threads = team.size
"""Threads that a call prepared now is for."""


def _flat(parameters: Sequence[Parameters]) -> list[list[Tensor | None]]:
    """The tensors of each direction in one list, the cell's own at the end."""
    return [[usable(t) for t in (*q[:5], *(q[5] if len(q) > 5 else ()))] for q in parameters]


def _laid_out(tensors: Sequence[Tensor | None]) -> tuple:
    return tuple([None if t is None else (t.shape, t.stride()) for t in tensors])


def _key(
    r: Ready, sequences: Sequences, rows: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> tuple | None:
    """What calls that are made alike have in common, by their tensors; None: nothing. rows: the tensors that have rows
    of all steps, of packed sequences as many as these have."""
    if not sequences.packed:
        return _laid_out([*rows, *others])
    if r.cell.step_inputs:  # whose directions are so many rows apart
        return None
    return sequences.few, tuple([t if t is None else (t.shape[-1], t.stride(-2)) for t in rows]), _laid_out(others)


def _usable(t: Any, batch: bool) -> Any:
    """`usable`; of a batch in which packed rows lie, tokens follow each other."""
    t = usable(t)
    return t.contiguous() if batch and t is not None else t


def prepared(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    training: bool = False,
    inputs: Sequence[Tensor] = (),
    feed: bool = False,
) -> tuple[Forward, list[Tensor | None]]:
    """The forward call, and the tensors that it is given: x, the states, inputs, and parameters."""
    r = suited(cell, parameters[0], feed)
    x, weights, inputs = _usable(x, sequences.takes), _flat(parameters), [usable(t) for t in inputs]
    given = all_states(r, states, weights, inputs, sequences.rows)
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    key = _key(r, sequences, [x], tensors[1:])
    if key is not None:
        key = r, len(parameters), training, team.size(), given is None, key
    return kept(key, lambda: Forward(r, x, given, weights, inputs, sequences, training)), tensors


def forward(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    training: bool,
    inputs: Sequence[Tensor] = (),
    feed: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
    """(y, final states, what backward needs). Shapes as `functional.layer`; nothing is saved unless training.

    feed: backward will be asked for gradients of the inputs.
    """
    call, tensors = prepared(cell, x, states, parameters, sequences, training, inputs, feed)
    return call.start(tensors, sequences)


def prepared_backward(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    y: Tensor,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    saved: Saved,
    dy: Tensor | None,
    dfinals: Sequence[Tensor | None],
    wanted: Wanted,
    overwrite: bool,
    inputs: Sequence[Tensor] = (),
    feed: bool = False,
    dothers: Sequence[Tensor | None] = (),
) -> tuple[Backward, list[Tensor | None]]:
    """The backward call, and the tensors that it is given: those of forward, what that left, and the cotangents.

    overwrite: what forward saved is not needed again. feed: gradients of the inputs are wanted, and forward was told
    so. dothers: cotangents of the other states at every step, laid out as y.
    """
    directions = len(parameters)
    each = any([t is not None for t in dothers])
    dothers = [usable(t) for t in dothers] if each else []
    r = suited(cell, parameters[0], feed, each)
    x, weights, inputs = _usable(x, sequences.takes), _flat(parameters), [usable(t) for t in inputs]
    given = all_states(r, states, weights, inputs, sequences.rows)
    # As they were made; a saved-tensor hook may have returned others.
    y = y.contiguous()
    saved = Saved(y, [t.contiguous() for t in saved.slots], [t.contiguous() for t in saved.series], saved.plan)
    dy, dfinals = _usable(dy, sequences.gives), [usable(t) for t in dfinals]
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    rows = [y, *saved.slots, *saved.series, dy]
    key = _key(r, sequences, [x, *rows, *dothers], [*tensors[1:], *dfinals])
    if key is not None:
        key = r, directions, saved.plan.schedule, team.size(), given is None, wanted, overwrite, feed, key
    tensors += [*rows, *dfinals, *dothers]
    call = kept(
        key,
        lambda: Backward(
            r, saved.plan, x, given, y, weights, inputs, sequences, saved, dy, dfinals, dothers, wanted, overwrite, feed
        ),
    )
    return call, tensors


def backward(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    y: Tensor,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    *rest: Any,
    **options: Any,
) -> Gradients:
    """Run the call that `prepared_backward` makes of the same arguments."""
    call, tensors = prepared_backward(cell, x, states, y, parameters, sequences, *rest, **options)
    return call.finish(tensors, sequences)
