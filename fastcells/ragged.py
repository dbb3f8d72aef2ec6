"""Ragged batches: padded sequences of any lengths, cut where their state is reset, as one packed batch.

Each stretch between two resets is a sequence of its own. Sorted by length and packed, the stretches are what layers run
as they run any PackedSequence: time follows the real tokens, in the products over time as well, and more rows go side
by side. What is left to do is index tables: from tokens to packed rows and back, from states to stretches and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .cpu.lengths import Stretches, Tokens, address

Lengths = Tensor | Sequence[int] | int
States = tuple[Tensor, ...]


class Ragged:
    """The stretches of a padded batch, longest first, and the way of tokens and states to them and back.

    steps: T; size: N; lengths: [N], each 0 to T, or None for T; reset: bool [T, N] ([N, T] with batch_first) or None;
    reverse: stretches run from their last step to their first. Raises TypeError, ValueError for lengths or reset of
    another kind, shape or range.

    `whole`: every sequence is one stretch of T steps, in order, so that tokens need no packing. `batch_sizes`, if not:
    int64 [steps of the longest], how many stretches have each step.
    """

    def __init__(
        self,
        steps: int,
        size: int,
        lengths: Lengths | None,
        reset: Tensor | None,
        *,
        batch_first: bool = False,
        reverse: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (size, steps) if batch_first else (steps, size)
        self._device = device
        ends, resets = ends_and_resets(steps, size, lengths, reset, batch_first)
        ends = np.full(size, steps) if ends is None else ends
        # From a token to the next, in time and in sequences.
        self._sizes, self._strides = (size, steps), (1, steps) if batch_first else (size, 1)
        self._ends, self._cut = ends, Stretches(ends, resets, steps, *self._strides, reverse)
        cut = self._cut
        if cut.found["wrong"]:
            _check_range(ends, steps)
        self.tokens, self._empty = cut.found["tokens"], ends == 0 if cut.found["empty"] else None
        self.whole = self.tokens == size * steps and not cut.found["cuts"] and not (reverse and size)
        self.batch_sizes, self.stretches = torch.from_numpy(cut.counts), len(cut.column)
        # Which stretches a direction enters after a reset, and the one that it leaves each sequence from.
        entered = [t if cut.found[name] else None for t, name in zip(cut.after, ("resets", "cuts"), strict=True)]
        self._after_reset, self._leaves, self._step = entered, [*map(self._table, cut.leaves)], self._strides[0]
        if reverse:
            self._step, self._after_reset, self._leaves = -self._step, entered[1:], self._leaves[1:]

    def _table(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)

    @cached_property
    def _tokens(self) -> np.ndarray:
        """[rows]: which token each packed row is."""
        counts = self._cut.counts
        begin = np.cumsum(counts) - counts
        # The rows of a step are the first stretches, each as many steps on.
        stretch = np.arange(counts.sum()) - np.repeat(begin, counts)
        return self._cut.first[stretch] + np.repeat(np.arange(len(counts)) * self._step, counts)

    @cached_property
    def _token(self) -> Tensor:
        return self._table(self._tokens[: self.tokens])

    @cached_property
    def _row(self) -> Tensor:
        """[tokens of T steps]: which packed row each token is; past the end of a sequence, a row after the last."""
        row = np.full(self._shape[0] * self._shape[1], self.tokens)
        row[self._tokens[: self.tokens]] = np.arange(self.tokens)
        return self._table(row)

    @cached_property
    def _columns(self) -> Tensor:
        return self._table(self._cut.column)

    @property  # not kept: it would be a cycle
    def layout(self) -> Tokens:
        """Where packed rows lie in the batch, for layers that take it or give it as it is."""
        sizes = self._shape, *self._sizes, *self._strides
        return Tokens(address(self._cut.first), self._step, address(self._ends), self, *sizes)

    def pack(self, x: Tensor) -> Tensor:
        """Tokens [T, N, F] ([N, T, F] with batch_first) -> packed rows [rows, F]."""
        if not self.tokens:  # a row of zeros, which still has to do with x
            return torch.cat([x.reshape(-1, x.shape[-1])[:0], x.new_zeros(1, x.shape[-1])])
        return _rows(x.reshape(-1, x.shape[-1]), self._token, self._row)

    def spread(self, t: Tensor) -> Tensor:
        """What belongs to each sequence, [R, N, F] -> to each of its stretches, [R, stretches, F]."""
        return t if self.whole else t.index_select(1, self._columns)

    def unpack(self, y: Tensor) -> Tensor:
        """Packed rows [rows, F] -> tokens [T, N, F] ([N, T, F]), zero past the end of a sequence."""
        real = y if self.tokens else y[:0]  # a slice, even of all, would copy gradients
        return _rows(real, self._row, self._token).view(*self._shape, -1)

    def enter(self, states: States | None, reset_to: States | Literal[0] | None, directions: int) -> States | None:
        """Initial states of the sequences, [R, N, F] each -> those of the stretches, [R, stretches, F].

        R: layers x directions. reset_to: the states after a reset: tensors like these, 0 for zeros, None for `states`.
        """
        if not (reset_to is None or isinstance(reset_to, tuple) or (isinstance(reset_to, int) and reset_to == 0)):
            raise TypeError(f"reset_to must be None, 0 or states like the initial ones, got {reset_to!r}")
        if states is None:
            if not isinstance(reset_to, tuple):
                return None
            states = tuple(torch.zeros_like(t) for t in reset_to)
        entered = tuple(map(self.spread, states))
        if reset_to is None or not any([t is not None for t in self._after_reset[:directions]]):
            return entered
        none = np.zeros(self.stretches)
        after = np.stack([none if t is None else t for t in self._after_reset[:directions]]) != 0
        replaced = self._table(np.tile(after, (len(states[0]) // directions, 1))).unsqueeze(-1)
        if not isinstance(reset_to, tuple):
            return tuple(s.masked_fill(replaced, 0) for s in entered)
        others = tuple(map(self.spread, reset_to))
        return tuple(torch.where(replaced, t, s) for s, t in zip(entered, others, strict=True))

    def leave(self, finals: States, states: States | None, directions: int) -> States:
        """Final states of the stretches, [R, stretches, F] each -> those of the sequences, [R, N, F].

        states: the initial ones, which a sequence of length 0 keeps; None for zeros.
        """
        if self.whole:
            return finals
        chosen = []
        for j, final in enumerate(finals):
            parts = [final[d::directions].index_select(1, self._leaves[d]) for d in range(directions)]
            result = parts[0] if directions == 1 else torch.stack(parts, 1).flatten(0, 1)
            if self._empty is not None:
                empty = self._table(self._empty).unsqueeze(-1)
                result = left(result, empty, None if states is None else states[j])
            chosen.append(result)
        return tuple(chosen)


def left(final: Tensor, empty: Tensor, initial: Tensor | None) -> Tensor:
    """Final states, [..., N, F]; a sequence of length 0, empty [N, 1], keeps the initial one, None for zeros."""
    return final.masked_fill(empty, 0) if initial is None else torch.where(empty, initial, final)


def reordered(states: Any, order: Tensor | None) -> Any:
    """The sequences of one state, or of each in a tuple, in the order asked for."""
    if order is None:
        return states
    if isinstance(states, Tensor):
        return states.index_select(1, order)
    return tuple(state.index_select(1, order) for state in states)


def backward_in_time(rows: Tensor, batch_sizes: Tensor) -> Tensor:
    """Packed rows [total, F] with the steps of every sequence in the opposite order."""
    counts = _numpy(batch_sizes)
    steps, begin = np.arange(len(counts)), np.cumsum(counts) - counts
    sequence = np.arange(len(rows)) - np.repeat(begin, counts)
    lengths = len(counts) - np.searchsorted(counts[::-1], np.arange(counts[0]), side="right")
    other = torch.from_numpy(begin[lengths[sequence] - 1 - np.repeat(steps, counts)] + sequence).to(rows.device)
    return _rows(rows, other, other)


def _rows(source: Tensor, row: Tensor, inverse: Tensor) -> Tensor:
    """`_Rows`, whose way through autograd takes longer than a small table."""
    wanted = torch.is_grad_enabled() and source.requires_grad
    return _Rows.apply(source, row, inverse) if wanted else _Rows.forward(source, row, inverse)


class _Rows(torch.autograd.Function):
    """Rows of a table, zero where the number is that of the row after the last. Each table has its inverse beside it:
    what undoes it is its derivative, so that no gradient is summed up row by row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(source: Tensor, row: Tensor, inverse: Tensor) -> Tensor:
        if len(row) > len(inverse):
            source = torch.cat([source, source.new_zeros(1, source.shape[1])])
        return source.index_select(0, row)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx, grad):
        row, inverse = ctx.saved_tensors
        return _rows(grad, inverse, row), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _Rows.apply(tangent, *ctx.saved_tensors)


def ends_and_resets(
    steps: int, size: int, lengths: Lengths | None, reset: Tensor | None, batch_first: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Steps of each sequence, [N], int64, of which that they are 0 to T has not been seen, or None for T, and bool
    [N, T] or None. Raises as `Ragged`."""
    ends = None if lengths is None else _checked_lengths(lengths, size)
    if reset is None:
        return ends, None
    resets = _checked_reset(reset, (size, steps) if batch_first else (steps, size))
    return ends, resets if batch_first else resets.T


def check_reset_to(reset: Tensor | None, reset_to: Any) -> None:
    """Raise ValueError for what a reset leads to where there is none."""
    if reset is None and reset_to is not None:
        raise ValueError("reset_to must be None without reset: it is what a reset leads to")


def cut_within(ends: np.ndarray | None, resets: np.ndarray) -> bool:
    """Whether there is a reset within a sequence. Raises as `Ragged`."""
    if ends is None:
        return bool(resets[:, 1:].any())
    _check_range(ends, steps := resets.shape[1])
    return bool((resets & (np.arange(steps) < ends[:, None]))[:, 1:].any())


def _check_range(ends: np.ndarray, steps: int) -> None:
    wrong = ends[(ends < 0) | (ends > steps)]
    if len(wrong):
        raise ValueError(f"lengths must be between 0 and {steps}, the input's time steps, got {wrong[0]}")


def _checked_lengths(lengths: Lengths, size: int) -> np.ndarray:
    """[N], int64"""
    if isinstance(lengths, Tensor):
        kind, given = str(lengths.dtype), _numpy(lengths)
    else:
        given = np.asarray(lengths)
        given = given.astype(np.int64) if given.size == 0 else given  # of no sequences
        kind = type(lengths).__name__ + ("" if given.ndim == 0 else f" of {given.dtype}")
    if given.dtype.kind not in "iu":
        raise TypeError(f"lengths must be integers (an int64 Tensor or a list), got {kind}")
    if given.ndim == 0 and size == 1:
        given = given[None]
    if given.shape != (size,):
        raise ValueError(f"lengths must have shape ({size},), one for each sequence, got {given.shape}")
    return np.ascontiguousarray(given, np.int64)


def _checked_reset(reset: Tensor, shape: tuple[int, int]) -> np.ndarray:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        given = f"a Tensor of {reset.dtype}" if isinstance(reset, Tensor) else type(reset).__name__
        raise TypeError(f"reset must be a bool Tensor, got {given}")
    if reset.shape != shape:
        raise ValueError(f"reset must have shape {shape}, as the input's sequences and steps, got {tuple(reset.shape)}")
    return _numpy(reset)


def _numpy(t: Tensor) -> np.ndarray:
    with torch._C._DisableFuncTorch():  # within its transforms, an operation even on a plain tensor has no numbers
        return t.cpu().numpy()
