"""Sequences of different lengths, longest first, as the number of them that each time step has: tables made of that,
and copies of the rows that enter or leave each step. The kernels are in `counted`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from . import store, team
from .engine import Buffer, Times, View
from .frame import BUFFER_WORDS, HEADER
from .script import Address, Script

TABLES = (  # the frame of what fills tables in
    "counts",  # address of the number of sequences at every step
    "steps",
    "most",  # rows of all steps
    "orders",  # address of (address, length) of orders of the sequences, whose numbers are those of sequences
    "orders_end",
    "threads",  # of the largest team whose shares are wanted
    "out",  # address of `TOLD` words and the tables
)
CUTS = (  # the frame of what cuts a padded batch into stretches
    "ends",  # address of the steps of each sequence,
    "batch",  # how many sequences these are,
    "length",  # and their steps, at most
    "resets",  # address of bytes: whether a sequence is cut before a step; 0: none is
    "reset_time",  # bytes from step to step,
    "reset_sequence",  # and from sequence to sequence
    "time",  # tokens from step to step,
    "sequence",  # and from sequence to sequence
    "reverse",  # 1: stretches begin at their last steps
    "most",  # stretches that there is room for
    "out",  # address of `FOUND` and the tables
)
FOUND = (
    "stretches",
    "tokens",
    "longest",  # steps of the longest stretch
    "wrong",  # sequences whose steps are not 0 to `length`: then nothing else is told
    "empty",  # sequences of no steps
    "resets",  # 1: stretches begin after one,
    "cuts",  # 1: or at a sequence's own
)
TOLD = 3  # sequences, or -1 where any of this is not so; rows of all steps; steps that have any
TARGET_WORDS = (
    "target",  # address,
    "target_step",  # bytes from position to position
    "target_row",  # and from row to row,
    "bytes",  # of which so many are copied
)
ROWS = (*HEADER, *BUFFER_WORDS, *TARGET_WORDS)  # the frame of what copies rows
TOKENS = (  # the frame of what copies rows to tokens, and back
    *HEADER,
    "stretches",  # address of the first token of each sequence,
    "along",  # tokens from step to step
    "tokens",  # address,
    "token",  # bytes from token to token
    "packed",  # likewise of rows, which follow each other
    "packed_row",
    "bytes",  # of which so many are copied
    "ends",  # address of the steps of each sequence of the batch, past which tokens are to be zero,
    "batch",  # how many sequences these are; 0: tokens are only read
    "length",  # their steps,
    "time",  # and tokens from step to step
    "sequence",  # and from sequence to sequence
)


KERNELS = ("tables", "cutting", "entering", "leaving", "collecting", "spreading")


@lru_cache
def kernel(name: str) -> store.Kernel:
    """One of those."""

    def make() -> Callable:
        from . import counted

        return getattr(counted, f"make_{name}")()

    return store.kernel(name, [], make)


class Tokens(NamedTuple):
    """Where the rows of packed sequences lie in a padded batch.

    first: address of the token of each sequence's first row; step: tokens from there to the next row. ends: address of
    the steps of each of the batch's sequences, past which tokens are none's. int64; owner: has what these point to, and
    moves rows by torch's operations. leading: sizes of the batch, [T, N] or [N, T]; batch, length: N and T; time,
    sequence: tokens from step to step and from sequence to sequence. takes: the input of a layer is such a batch;
    gives: its output is.
    """

    first: int
    step: int
    ends: int
    owner: Any
    leading: tuple[int, int]
    batch: int
    length: int
    time: int
    sequence: int
    takes: bool = True
    gives: bool = True


class Stretches:
    """The stretches of a padded batch between resets, longest first; of equally long ones those of earlier sequences,
    then earlier ones.

    ends: [N], int64; resets: bool [N, T], or None; time, sequence: tokens from step to step and from sequence to
    sequence; reverse: stretches are run from their ends. A sequence without steps has none; where no sequence has any,
    the first one has a step, which nobody sees. What `FOUND` names, and NumPy tables, int64: counts: of each step;
    column: each one's sequence; first: its first token; after: which ones are entered after a reset, forward and
    backward; leaves: the last one of each sequence, likewise.
    """

    def __init__(
        self, ends: np.ndarray, resets: np.ndarray | None, steps: int, time: int, sequence: int, reverse: bool
    ) -> None:
        size = len(ends)
        most = max(size, 1) + (0 if resets is None else int(np.count_nonzero(resets)))
        sizes = (len(FOUND), steps + 1, steps + 1, most, most, most, most, size, size)
        words = np.zeros(sum(sizes), np.int64)
        reset = (0, 0, 0) if resets is None else (address(resets), *resets.strides[::-1])
        frame = address(ends), size, steps, *reset, time, sequence, reverse, most, address(words)
        kernel("cutting").call(_cuts_frame(*frame), 0, 1)
        self.found = dict(zip(FOUND, words[: len(FOUND)].tolist(), strict=True))
        tables = [words[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
        count = self.found["stretches"]
        self.counts = tables[1][: self.found["longest"]]
        self.column, self.first, *self.after = [t[:count] for t in tables[3:7]]
        self.leaves = tables[7:]


def address(array: np.ndarray) -> int:
    """Of an array's first number: its `ctypes` take a microsecond."""
    return array.__array_interface__["data"][0]


class Tables:
    """Tables of the number of sequences at every step, [T], which never increases. int64, as all that these point to.

    most: rows of all steps, at most. orders: index tables of the sequences, [N]. rows: N, or -1 where any of these is
    not what it has to be; total: rows of all steps; steps: those that have any.
    """

    def __init__(self, counts: Tensor, most: int, orders: Sequence[Tensor] = ()) -> None:
        self.given = counts = counts.contiguous()
        self._length, threads = counts.shape[0], team.size()
        # Positions of rows at every step, where steps follow each other; these and counts from the last step on; and of
        # each team of several threads the rows at which their shares begin, for each to have as many steps to do.
        words = TOLD + 3 * self._length + (threads + 4) * (threads - 1) // 2
        self._words = array("q", bytes(8 * words))
        self._at = self._words.buffer_info()[0]
        given = array("q", [word for t in orders for word in (t.data_ptr(), t.shape[0])])
        at = given.buffer_info()[0]
        frame = counts.data_ptr(), self._length, most, at, at + 8 * len(given), threads, self._at
        kernel("tables").call(_frame(*frame), 0, 1)
        self.rows, self.total, self.steps = self._words[:TOLD]

    def positions(self, descending: bool) -> int:
        """Address of the first row of every step; from the last step to the first if descending."""
        return self._at + 8 * (TOLD + descending * self._length)

    def counts(self, descending: bool) -> int:
        """Address of the rows of every step; from the last step to the first if descending."""
        return self._at + 8 * (TOLD + 2 * self._length) if descending else self.given.data_ptr()

    def bounds(self, threads: int) -> int:
        """Address of the rows at which the shares of so many threads begin, and the end."""
        return self._at + 8 * (TOLD + 3 * self._length + (threads + 3) * (threads - 2) // 2)


_frame, _cuts_frame = Struct(f"{len(TABLES)}q").pack, Struct(f"{len(CUTS)}q").pack


def _header(times: Times, shares: Address = 0, threads: int = 1) -> list[Address]:
    steps, rows, first, delta, positions, counts = times
    assert counts is not None, "steps have different numbers of rows"
    known = {"steps": steps, "rows": rows, "first": first, "delta": delta, "positions": positions, "counts": counts}
    known |= {"shares": shares, "threads": threads}
    return [known.get(name, 0) for name in HEADER]


LABEL = "packing of sequences"


class Mover:
    """Adds to a script what moves the rows of all steps to tokens of a batch, which follow each other, and back.

    number: `Prepared.number`. shares: address of the rows at which the shares of so many threads begin in the time
    loop, or 0; team: threads that move rows, the same ones if they are as many.
    """

    def __init__(
        self, script: Script, times: Times, number: Any, shares: Address = 0, threads: int = 1, team: int = 1
    ) -> None:
        self.script, self.number, self.team = script, number, team
        self.header = _header(times, shares, threads)

    def collect(self, tokens: Buffer, rows: Buffer, **options: Any) -> None:
        """Copy tokens to rows."""
        frame = [*self._frame(tokens, rows), 0, 0, 0, 0, 0]
        self.script.launch(kernel("collecting"), frame, threads=self.team, label=LABEL, **options)

    def spread(self, rows: Buffer, tokens: Buffer, **options: Any) -> None:
        """Copy rows to tokens, and make the others zero."""
        batch = [
            self.number(lambda s: s.tokens.ends),
            self.number(lambda s: s.tokens.batch),
            self.number(lambda s: s.tokens.length),
            self.number(lambda s: s.tokens.time),
            self.number(lambda s: s.tokens.sequence),
        ]
        frame = [*self._frame(tokens, rows), *batch]
        self.script.launch(kernel("spreading"), frame, threads=self.team, label=LABEL, **options)

    def _frame(self, tokens: Buffer, rows: Buffer) -> list[Address]:
        size = rows.shape[1] * rows.item
        where = [self.number(lambda s: s.tokens.first), self.number(lambda s: s.tokens.step)]
        return [*self.header, *where, tokens.at, size, rows.at, rows.strides[0], size]


def _rows(times: Times, source: View, target: View, size: int) -> list[Address]:
    return [*_header(times), *source, *target[:3], size]


def enter(script: Script, times: Times, source: View, out: View, size: int, **options: Any) -> None:
    """Add to a script: copy, to the place of each step's rows, what these are before it, `size` bytes of each."""
    script.launch(kernel("entering"), _rows(times, source, out, size), **options)


def leave(script: Script, times: Times, source: View, out: Buffer, **options: Any) -> None:
    """Add to a script: copy, to `out`, [N, width], each sequence's row of the last step that it has."""
    target = View(out.at, 0, out.strides[0])
    script.launch(kernel("leaving"), _rows(times, source, target, out.shape[1] * out.item), **options)
