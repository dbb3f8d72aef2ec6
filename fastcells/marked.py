"""Resets inside the time loop: of any cell one that does what marks at each step say.

Every step of every sequence is run, also those past an end, so that nothing has to be cut up and packed (`ragged`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cell import Cell, Names, Recurrent
from .expression import less, where
from .functional import Parameters, unchecked_layer

States = tuple[Tensor, ...]
GO_ON, RETURN, PAST_END = 1.0, 0.0, -1.0


@lru_cache(maxsize=256)
def marked(base: Cell, zero: bool, padded: bool) -> Cell:
    """The cell that begins a step from its states `_from_h` and so on, and leaves there what the next one begins from:
    as the `_mark` says, what the base's step led to, or what is given as `_first_h` and so on (zero: zeros), or, past a
    sequence's end (padded), what was there. The hidden state is the base's, and zero past the end."""
    # No name that a declared cell may give to anything begins so.
    entering, first = ([f"_{kind}_{name}" for name in base.states] for kind in ("from", "first"))

    def step(x: Any, u: Any, s: Any, p: Any) -> tuple:
        before = [getattr(s, name) for name in entering]
        u = Names(**{g: Recurrent(product, before[0]) for g, product in vars(u).items()})
        s = Names(**dict(zip(base.states, before, strict=True)))
        new = base(x, u, s, *([p] if base.own or base.fed else []))
        new = new if isinstance(new, (tuple, list)) else (new,)
        to = [0.0 if zero else getattr(p, name) for name in first]
        goes_on, there = less((GO_ON + RETURN) / 2, p._mark), less((RETURN + PAST_END) / 2, p._mark)
        if padded:
            to = [where(there, t, old) for t, old in zip(to, before, strict=True)]
        return where(there, new[0], 0.0) if padded else new[0], *map(where, [goes_on] * len(to), new, to)

    states, inputs = (base.states[0], *entering), (*base.inputs, *([] if zero else first))
    own = base.parameters, base.scalars
    return Cell(step, f"{base.name}_marked", base.gates, states, *own, inputs, base.step_inputs, ("_mark",))


class Marked:
    """What runs the layers of a stack one after the other, in place of `unchecked_layer`, for padded input.

    resets: bool [N, T]; ends: steps of each sequence, [N], None for T; to: the states of all layers that a reset leads
    to, None for zeros. A reset cuts a sequence for both directions.
    """

    def __init__(
        self,
        resets: np.ndarray,
        ends: np.ndarray | None,
        to: States | None,
        directions: int,
        dtype: torch.dtype,
        layer: Callable = unchecked_layer,
    ) -> None:
        cuts = resets.T
        steps, size = cuts.shape
        self.layer, self.padded = layer, False
        self._marks = torch.full((directions, steps, size, 1), GO_ON, dtype=dtype, device="cpu")
        marks = self._marks.numpy()[..., 0]
        if ends is not None and int(ends.min()) < steps:
            self.padded, there = True, np.arange(steps)[:, None] < ends  # [T, N]
            cuts = cuts & there
            self._past_end = torch.from_numpy(~there[..., None])
        np.copyto(marks[0, :-1], RETURN, where=cuts[1:])
        marks[1:, 1:] = marks[0, :-1]
        if self.padded:
            marks[:, ~there] = PAST_END
        self._begins = torch.from_numpy(cuts[0, :, None]) if cuts[0].any() else None
        self._to: Iterator[States] | None = None
        if to is not None:
            self._to = zip(*(state.split(directions) for state in to), strict=True)

    def __call__(
        self,
        base: Cell,
        x: Tensor,
        states: States | None,
        parameters: Sequence[Parameters],
        batch_sizes: None = None,
        inputs: Sequence[Tensor] = (),
    ) -> tuple[Any, ...]:
        """As `unchecked_layer`."""
        cell, x, states, inputs = self.arguments(base, x, states, inputs)
        y, (_, *finals) = self.layer(cell, x, states, parameters, None, inputs)
        return y, tuple(finals)

    @property
    def kind(self) -> tuple[bool, bool]:
        """What may make a difference to how the arguments of a layer are laid out: whether some are made here."""
        return self.padded, self._begins is None

    def arguments(
        self, base: Cell, x: Tensor, states: States | None, inputs: Sequence[Tensor] = ()
    ) -> tuple[Cell, Tensor, States | None, list[Tensor]]:
        """The cell, input, states and extra inputs of the next layer."""
        cell, to = marked(base, self._to is None, self.padded), None if self._to is None else next(self._to)
        if states is None and to is not None:
            states = tuple(map(torch.zeros_like, to))
        if states is not None:
            entering = states if self._begins is None else tuple(self._entered(states, to))
            states = (entering[0], *entering)
        fixed = len(base.inputs)
        fed = [*inputs[:fixed], *(to or ()), *inputs[fixed:], self._marks]
        if self.padded:
            x = x.masked_fill(self._past_end, 0)  # whatever is there, also what is no number
        return cell, x, states, fed

    def _entered(self, states: States, to: States | None) -> Iterator[Tensor]:
        """The states before the first step, which a reset may come before in the first direction."""
        assert self._begins is not None
        for k, state in enumerate(states):
            forward = state[:1].masked_fill(self._begins, 0)
            if to is not None:
                forward = torch.where(self._begins, to[k][:1], state[:1])
            yield torch.cat([forward, state[1:]]) if len(state) > 1 else forward
