"""Sequences of different lengths, longest first, as the number of them that each time step has: tables made of that,
and copies of the rows that enter or leave each step. The kernels are in `counted`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from struct import Struct
from typing import Any

from torch import Tensor

from . import store, team
from .engine import Buffer, Times, View
from .geometry import BUFFER_WORDS, HEADER
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
TOLD = 3  # sequences, or -1 where any of this is not so; rows of all steps; steps that have any
TARGET_WORDS = (
    "target",  # address,
    "target_step",  # bytes from position to position
    "target_row",  # and from row to row,
    "bytes",  # of which so many are copied
)
ROWS = (*HEADER, *BUFFER_WORDS, *TARGET_WORDS)  # the frame of what copies rows


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
        filling().call(_frame(*frame), 0, 1)
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


_frame = Struct(f"{len(TABLES)}q").pack


@lru_cache(maxsize=1)
def filling() -> store.Kernel:
    """The kernel that fills tables in."""

    def make() -> Callable:
        from .counted import make_tables

        return make_tables()

    return store.kernel("tables", [], make)


@lru_cache(maxsize=1)
def entering() -> store.Kernel:
    """The kernel that copies, to the place of each step's rows, what these are before it."""

    def make() -> Callable:
        from .counted import make_entering

        return make_entering()

    return store.kernel("entering", [], make)


@lru_cache(maxsize=1)
def leaving() -> store.Kernel:
    """The kernel that copies, to each sequence's place, its row of the last step that it has."""

    def make() -> Callable:
        from .counted import make_leaving

        return make_leaving()

    return store.kernel("leaving", [], make)


def _rows(times: Times, source: View, target: View, size: int) -> list[Address]:
    steps, rows, first, delta, positions, counts = times
    assert counts is not None, "steps have different numbers of rows"
    known = {"steps": steps, "rows": rows, "first": first, "delta": delta, "positions": positions, "counts": counts}
    return [*[known.get(name, 0) for name in HEADER], *source, *target[:3], size]


def enter(script: Script, times: Times, source: View, out: View, size: int, **options: Any) -> None:
    """Add to a script: copy, to the place of each step's rows, what these are before it, `size` bytes of each."""
    script.launch(entering(), _rows(times, source, out, size), **options)


def leave(script: Script, times: Times, source: View, out: Buffer, **options: Any) -> None:
    """Add to a script: copy, to `out`, [N, width], each sequence's row of the last step that it has."""
    target = View(out.at, 0, out.strides[0])
    script.launch(leaving(), _rows(times, source, target, out.shape[1] * out.item), **options)
