"""Gradients of weights: products over all time steps and sequences."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..plan import share
from ..program import spread
from .call import Call
from .direction import Direction
from .engine import Buffer, Product, add, plain, product, turn
from .geometry import LINE
from .host import host
from .script import Address, ones, zeros

LABEL = "weight gradients"
STRETCH = 256  # rows of all steps taken at a time, which stay in the second-level cache,
COPIED_STRETCH = 768  # where copies are made of their lines,
TURNED_STRETCH = 512  # and where rows become columns, and what meets them is packed:
TURNED_WIDTH = 192 if host().distant else sys.maxsize  # columns of either, from which on that pays,
PIECE_BYTES = 1 << 19  # and half of such a cache, which what is turned fills
NEAR_BYTES = 1 << 19  # of gradients, which are there as they are
TURNED = 1 << 14  # numbers of gradients, from which on it pays to turn what is less than a vector
WIDE_BYTES = 1 << 10  # of a row, from which on it pays to copy what is torn


def shifted(d: Direction, rows: int, series: Buffer, initial: Buffer | None) -> list[tuple[int, Buffer]]:
    """A state before every step, in parts: (the row of all steps at which a part begins, [rows, width]).

    series: [total, width], after every step; initial: [N, width], before the first; rows: N.
    """
    later = series.shape[0] - rows
    parts = [(0 if d.reverse else rows, series.narrow(0, rows if d.reverse else 0, later))] if later else []
    if initial is not None:
        parts.append((later if d.reverse else 0, initial))
    return parts


def torn(rows: Buffer) -> bool:
    """Whether rows are wide, and vectors of most of them lie in two lines of a cache each."""
    return rows.strides[-2] >= WIDE_BYTES and rows.strides[-2] % LINE != 0


class OverTime:
    """Products of `grad`.T, which is gradients [total, width], with what was there at the same rows.

    A large `grad` is taken some rows at a time, with all products of these, which read a few columns of every row: its
    rows are `spread`, so that these lie in all sets of a cache; so are those of copies.
    """

    def __init__(self, call: Call, packed: bool, d: Direction, grad: Buffer) -> None:
        """packed: of packed sequences, which have as many rows as `grad` says, or fewer, as is told at each call."""
        self.call, self.packed, self.script, self.d, self.grad = call, packed, call.script, d, grad
        self.run, _ = plain(d.r.dtype)
        self.lanes = self.run.lanes
        self.threads, self.wait = 1, True  # of the next launch
        self.begun: set[Buffer] = set()  # targets that are set
        # (first column, columns, first row, [rows, width] or [steps, rows, width], target)
        self.terms: list[tuple[int, int, int, Buffer, Buffer]] = []

    def weights(
        self,
        x: Buffer,
        before: dict[str, list[tuple[int, Buffer]]],
        slots: Buffer,
        dw_ih: Buffer,
        dw_hh: Any,
        db_ih: Any,
        db_hh: Any,
    ) -> None:
        """Of the input and recurrent weights and of the biases. before: of each state in recurrent products, `shifted`;
        slots: what forward kept."""
        d, p = self.d, self.d.r.programs
        slot_x, slot_u = p.gradients.x, p.gradients.u
        flat = x.flattened()
        self._blocks(dw_ih, p.start_gates, slot_x, [(0, x if flat is None else flat)])
        for run, _, operand in d.r.recurrent:
            if isinstance(operand, int):
                self._blocks(dw_hh, run, slot_u, [(0, slots.columns(operand * d.hidden, d.hidden))])
            else:
                self._blocks(dw_hh, run, slot_u, before[operand])
        sums = None
        if db_ih is not None:
            sums = self._scratch(1, 0, d.r.used_slots * d.hidden)
        self._run(sums)
        for target, slot in ((dw_ih, slot_x), (dw_hh, slot_u)):
            for gate, row in d.r.gates.items():
                if gate not in slot and target is not None:
                    add(self.script, d.r.dtype, target.narrow(0, row * d.hidden, d.hidden), None)
        if sums is not None:
            self._biases(sums, ((db_ih, slot_x), (db_hh, slot_u)))

    def projection(self, slots: Buffer, dw_hr: Buffer) -> None:
        """Of the projection's weights; `grad` is that of its result."""
        slot, hidden = self.d.r.programs.gradients.projected, self.d.hidden
        assert slot is not None
        self.terms.append((0, self.d.depth, 0, slots.columns(slot * hidden, hidden), dw_hr))
        self._run()

    def _blocks(
        self, target: Buffer, gates: Sequence[str], slot: dict[str, int], parts: Sequence[tuple[int, Buffer]]
    ) -> None:
        h = self.d.hidden
        for k, row, count in self.d.blocks(gates, slot):
            rows = target.narrow(0, row * h, count * h)
            self.terms += [(slot[gates[k]] * h, count * h, first, other, rows) for first, other in parts]
            if not parts:
                add(self.script, self.d.r.dtype, rows, None)

    def _run(self, sums: Buffer | None = None) -> None:
        """Compute all terms; sums: what becomes the sum of the first columns over all rows, [1, columns]."""
        script, dtype, item, lanes = self.script, self.d.r.dtype, self.grad.item, self.lanes
        total, used = self.grad.shape[0], max([begin + count for begin, count, *_ in self.terms], default=0)
        shares = self._shares(used)
        self.threads, self.wait = len(shares) - 1, True
        large = used > 0 and total * self.grad.strides[0] > NEAR_BYTES
        # Whether columns of `grad` are turned, and what meets them is packed: either is read as often as the other is
        # wide.
        turns = large and used >= TURNED_WIDTH and self._work() >= TURNED_WIDTH * used * total
        # What is copied before it is read: rows that are apart by two distances, or torn.
        copies = large and not turns
        copied = {o: first for *_, first, o, _ in self.terms if len(o.shape) == 3 or (copies and torn(o))}
        most = TURNED_STRETCH if turns else COPIED_STRETCH if any(map(torn, copied)) else STRETCH
        length = self._length(copied, most) if large else total
        near = {o: self._room(length, o.shape[-1]) for o in copied}
        # The last columns of a target, fewer than a vector, come about turned: as rows as wide as `grad`, whose vectors
        # are full.
        turned = {
            target: (self._scratch(target.shape[1] % lanes, begin, count), begin, count)
            for begin, count, *_, target in self.terms
            if target.shape[1] % lanes and total * used > TURNED
        }
        rests = {o: self._room(o.shape[-1] % lanes, length) for *_, o, target in self.terms if target in turned}
        direct = {o: o.shape[-1] // lanes * lanes if o in rests else o.shape[-1] for *_, o, _ in self.terms}
        packed = {o: n for o, n in direct.items() if turns or n % lanes}
        panels = {o: script.take(self.run.panel_size(n, length) * item) for o, n in packed.items()}
        # A thread's share are columns of `grad`, of which it takes some at a time.
        pieces = list(self._pieces(shares, length if turns else 1))
        widest = max([count for *_, count in pieces], default=0)
        rows_of = [self._room(widest, length) for _ in range(self.threads)] if turns else []
        options = {"row_block": widest} if turns else {}
        for begin in range(0, total, length):
            end = min(begin + length, total)
            told = self._told(begin, end)
            stretch = self.grad.narrow(0, begin, end - begin)
            shared = bool(near or panels or rests)  # memory that all threads read, and have read before it is written
            self.wait = self.wait or shared
            self._copy(near, copied, begin, end, told)
            read = {}
            for _, _, first, other, _ in self.terms:
                low, high = self._part(begin, end, first, other)
                if low < high and other not in read:
                    source, at = (near[other], begin) if other in near else (other, first)
                    x = source.narrow(0, low - at, high - low)
                    read[other] = self._weights(x, direct[other], panels.get(other), rests.get(other), told)
            self.wait = self.wait or shared
            for thread, column, count in pieces:
                rows = stretch.columns(column, count)
                rows = self._turned(rows, rows_of[thread], told, thread) if turns else rows.turned()
                for first_column, columns, first, other, target in self.terms:
                    low, high = self._part(begin, end, first, other)
                    left, right = max(column, first_column), min(column + count, first_column + columns)
                    if low < high and left < right and direct[other]:
                        part = rows.narrow(0, left - column, right - left).columns(low - begin, high - low)
                        into = target.narrow(0, left - first_column, right - left).columns(0, direct[other])
                        self._product(part, read[other], into, told, threads=1, first=thread, **options)
            for first_column, _, first, other, target in self.terms:
                low, high = self._part(begin, end, first, other)
                if low < high and target in turned:
                    here = turned[target][0]
                    units = stretch.narrow(0, low - begin, high - low).columns(first_column, here.shape[1])
                    self._units(rests[other].columns(0, high - low), units, here, shares, first_column, told, 1)
            if sums is not None:
                unit = Buffer.new(ones(end - begin, dtype), (1, end - begin), item)
                self._units(unit, stretch.columns(0, sums.shape[1]), sums, shares, 0, told)
        for target, (here, _, count) in turned.items():
            self._put(here.columns(0, count), target.columns(target.shape[1] - here.shape[0], here.shape[0]))

    def _pieces(self, shares: Sequence[int], length: int) -> Iterator[tuple[int, int, int]]:
        """(thread, first column, columns) of so many rows of `grad` that are taken at a time."""
        most = max(PIECE_BYTES // (length * self.grad.item) // self.lanes, 1) * self.lanes
        for thread, (begin, end) in enumerate(pairwise(shares)):
            for column in range(begin, end, most):
                yield thread, column, min(most, end - column)

    def _room(self, rows: int, width: int) -> Buffer:
        """Memory of the call for rows that are `spread`, with room for whole vectors."""
        item, row = self.grad.item, spread(-(-width // self.lanes) * self.lanes)
        return Buffer.new(self.script.take(rows * row * item), (rows, row), item).columns(0, width)

    def _waited(self) -> bool:
        wait, self.wait = self.wait, False
        return wait

    def _weights(
        self, x: Buffer, direct: int, panel: Address | None, rest: Buffer | None, told: Address | None
    ) -> Buffer | Product:
        """What rows of `grad`, turned, are multiplied by: the first columns of x, in place, or packed where there is
        memory for that; rest: memory for the last ones, turned."""
        if rest is not None:
            last = x.columns(direct, rest.shape[0])
            into = rest.columns(0, x.shape[0])
            turn(self.script, self.d.r.dtype, into, last, told, wait=self._waited(), label=LABEL)
        weights = x.columns(0, direct)
        if panel is None or not direct:
            return weights
        return self.run.panel(
            self.script, weights, 0, True, [0], direct, x.shape[0], self.threads, told=told, at=panel,
            wait=self._waited(), label=LABEL,
        )  # fmt: skip

    def _turned(self, grad: Buffer, rows: Buffer, told: Address | None, thread: int) -> Buffer:
        """Columns of `grad` as rows that lie together."""
        out = rows.narrow(0, 0, grad.shape[1]).columns(0, grad.shape[0])
        turn(self.script, self.d.r.dtype, out, grad, told, first=thread, wait=self._waited(), label=LABEL)
        return out

    def _length(self, copied: Iterable[Buffer], most: int) -> int:
        """Rows of a large `grad` that are taken at a time: whole time steps, if there are two distances."""
        total, whole = self.grad.shape[0], max([o.shape[1] for o in copied if len(o.shape) == 3], default=1)
        return -(-total // -(-total // most) // whole) * whole

    def _work(self) -> int:
        """Multiply-adds of all terms."""
        return sum([count * self._rows(other) * other.shape[-1] for _, count, _, other, _ in self.terms])

    def _scratch(self, rows: int, begin: int, count: int) -> Buffer:
        """Memory of the call for rows of so many columns, those of `grad` from `begin` on: whole vectors of them, where
        its rows go on."""
        item, full = self.grad.item, -(-count // self.lanes) * self.lanes
        columns = full if (begin + full) * item <= self.grad.strides[0] else count
        return Buffer.new(self.script.take(rows * columns * item), (rows, columns), item)

    def _copy(
        self, near: dict[Buffer, Buffer], copied: dict[Buffer, int], begin: int, end: int, told: Address | None
    ) -> None:
        """Make the copies of rows from `begin` to `end`, for which what comes next waits."""
        for other, here in near.items():
            low, high = self._part(begin, end, copied[other], other)
            if low < high:
                part = self._narrowed(other, low - copied[other], high - low)
                into = here.narrow(0, low - begin, high - low).by_time(part.shape[:-1])
                options: dict[str, Any] = {"threads": self.threads, "wait": self._waited(), "label": LABEL}
                add(self.script, self.d.r.dtype, into, part, count=told, **options)
        self.wait = self.wait or bool(near)

    def _product(
        self, x: Buffer, weight: Buffer | Product, target: Buffer, told: Address | None, **options: Any
    ) -> None:
        """Add x @ weight to a target, whose first product sets it."""
        start = None if target in self.begun else zeros(target.shape[1] * target.item)
        product(
            self.script, self.d.r.dtype, x.by_time(), weight, target.by_time(), start,
            transposed=True, pack=False, wait=self._waited(), told=told, label=LABEL, **options,
        )  # fmt: skip
        self.begun.add(target)

    def _units(
        self,
        x: Buffer,
        weight: Buffer,
        target: Buffer,
        shares: list[int],
        begin: int,
        told: Address | None,
        most: int = 0,
    ) -> None:
        """The same where units, which are columns of `grad` from `begin` on, are shared: in whole tiles, for sums to be
        the same. most: 1 if what is no whole tile is the earlier thread's."""
        widths = self.run.shapes[0].widths
        tile, whole = widths[0 if target.shape[0] == 1 else 1], target.shape[1] // self.lanes
        vectors = [max(c - begin, 0) // self.lanes + most * (tile - 1) for c in shares[:-1]]
        cuts = [min(k // tile * tile, whole) for k in vectors]
        whole *= self.lanes
        for first, count, table in (
            (0, whole, [*cuts, whole // self.lanes]),
            (whole, target.shape[1] - whole, [*[0] * self.threads, 1]),
        ):
            if count:
                part = target.columns(first, count)
                self._product(
                    x, weight.columns(first, count), part, told, threads=self.threads, shares=self.script.table(table),
                    split="units",
                )  # fmt: skip

    def _put(self, turned: Buffer, target: Buffer) -> None:
        """Put in a target's place what came about turned."""
        back = self._room(turned.shape[1], turned.shape[0])
        turn(self.script, self.d.r.dtype, back, turned, threads=self.threads, label=LABEL)
        add(self.script, self.d.r.dtype, target, back, threads=self.threads, label=LABEL)

    def _shares(self, columns: int) -> list[int]:
        """Whole vectors of columns of `grad` at which the threads' shares begin, and the end: as much for each."""
        lanes = self.lanes
        costs = [0] * -(-columns // lanes)
        for begin, count, _, other, _ in self.terms:
            for k in range(begin // lanes, -(-(begin + count) // lanes)):
                costs[k] += self._rows(other) * other.shape[-1]
        done = list(accumulate(costs, initial=0))
        threads = min(share(columns, 2 * lanes * done[-1], self.d.team).threads, len(costs))
        goals = [done[-1] * k / threads for k in range(1, threads)]
        return [0, *(bisect_left(done, goal) * lanes for goal in goals), columns]

    def _told(self, begin: int, end: int) -> Address | None:
        """How many of the rows there are, where that is told."""
        if not self.packed:
            return None
        return self.call.number(lambda s: min(max(s.total - begin, 0), end - begin))

    def _part(self, begin: int, end: int, first: int, other: Buffer) -> tuple[int, int]:
        """Which rows of all steps from `begin` to `end` there are of what begins at row `first`."""
        return max(begin, first), min(end, first + self._rows(other))

    @staticmethod
    def _narrowed(other: Buffer, begin: int, count: int) -> Buffer:
        """`count` rows of all steps, from one on."""
        if len(other.shape) == 2:
            return other.narrow(0, begin, count)
        return other.narrow(0, begin // other.shape[1], count // other.shape[1])

    @staticmethod
    def _rows(other: Buffer) -> int:
        return other.shape[0] if len(other.shape) == 2 else other.shape[0] * other.shape[1]

    def _biases(self, sums: Buffer, targets: Sequence[tuple[Buffer, dict[str, int]]]) -> None:
        """Gradients of biases out of the sums over all rows."""
        d, h = self.d, self.d.hidden
        for whole, slot in targets:
            target = Buffer(whole.at, (1, *whole.shape), (0, *whole.strides), whole.item)
            gates = [g for g in d.r.gates if g in slot]
            for k, row, count in d.blocks(gates, slot):
                part = sums.columns(slot[gates[k]] * h, count * h)
                add(self.script, d.r.dtype, target.columns(row * h, count * h), part)
            for row in [n for g, n in d.r.gates.items() if g not in slot]:
                add(self.script, d.r.dtype, target.columns(row * h, h), None)
