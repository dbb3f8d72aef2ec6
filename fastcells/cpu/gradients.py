"""Gradients of weights: products over all time steps and sequences."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

from ..plan import share
from ..program import spread
from .call import Prepared
from .direction import Direction
from .engine import Buffer, Product, add, plain, product, turn
from .frame import LINE
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


class Operand:
    """Rows that meet those of gradients, and how products read them."""

    def __init__(self, first: int, matrix: Buffer) -> None:
        """matrix: [rows, width] or [steps, rows, width]. first: the row of all steps at which it begins."""
        self.first, self.matrix = first, matrix
        *steps, self.width = matrix.shape
        self.rows = prod(steps)
        self.direct = self.width  # columns that are read as rows; the others, fewer than a vector, are turned
        self.near: Buffer | None = None  # memory for a copy of some rows,
        self.panel: Address | None = None  # for these packed,
        self.rest: Buffer | None = None  # and for what is turned

    def part(self, begin: int, end: int) -> tuple[int, int]:
        """Which rows of all steps from `begin` to `end` there are."""
        return max(begin, self.first), min(end, self.first + self.rows)

    def narrow(self, low: int, high: int) -> Buffer:
        """Rows of all steps, from one to another: whole steps, if rows are apart by two distances."""
        whole = self.matrix.shape[1] if len(self.matrix.shape) == 3 else 1
        return self.matrix.narrow(0, (low - self.first) // whole, (high - low) // whole)


class Term(NamedTuple):
    """A product to be added to a target: of columns of gradients, which become its rows."""

    column: int
    columns: int
    operand: Operand
    target: Buffer  # [columns, the operand's width]

    @property
    def end(self) -> int:
        return self.column + self.columns


class Units(NamedTuple):
    """Columns of a target whose units threads share, and where each one's begin."""

    column: int
    columns: int
    shares: Address


class Rest(NamedTuple):
    """The last columns of a term's target, fewer than a vector, which come about turned. rows: memory for that."""

    term: Term
    rows: Buffer
    units: list[Units]


class WeightGradients:
    """Products of `grad`.T, which is gradients [total, width], with what was there at the same rows.

    A large `grad` is taken a stretch of rows at a time, with all products of these, which read a few columns of every
    row: its rows are `spread`, so that these lie in all sets of a cache; so are those of copies.
    """

    def __init__(self, call: Prepared, packed: bool, d: Direction, grad: Buffer) -> None:
        """packed: of packed sequences, which have as many rows as `grad` says, or fewer, as is told at each call."""
        self.call, self.packed, self.script, self.d, self.grad = call, packed, call.script, d, grad
        self.run, _ = plain(d.r.dtype)
        self.lanes = self.run.lanes
        self.wait = True  # the next launch
        self.begun: set[Buffer] = set()  # targets that are set
        self.terms: list[Term] = []
        self.operands: dict[Buffer, Operand] = {}

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
        self._multiply(sums)
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
        self._term(0, self.d.depth, 0, slots.columns(slot * hidden, hidden), dw_hr)
        self._multiply()

    def _blocks(
        self, target: Buffer, gates: Sequence[str], slot: dict[str, int], parts: Sequence[tuple[int, Buffer]]
    ) -> None:
        h = self.d.hidden
        for k, row, count in self.d.blocks(gates, slot):
            rows = target.narrow(0, row * h, count * h)
            for first, matrix in parts:
                self._term(slot[gates[k]] * h, count * h, first, matrix, rows)
            if not parts:
                add(self.script, self.d.r.dtype, rows, None)

    def _term(self, column: int, columns: int, first: int, matrix: Buffer, target: Buffer) -> None:
        operand = self.operands.setdefault(matrix, Operand(first, matrix))
        self.terms.append(Term(column, columns, operand, target))

    def _multiply(self, sums: Buffer | None = None) -> None:
        """Compute all terms; sums: what becomes the sum of the first columns over all rows, [1, columns]."""
        self._lay_out()
        sum_units = [] if sums is None else self._units(sums, 0)
        for begin in range(0, self.grad.shape[0], self.length):
            end = min(begin + self.length, self.grad.shape[0])
            rows, told = self.grad.narrow(0, begin, end - begin), self._told(begin, end)
            read = self._read(begin, end, told)
            self._rows(begin, end, rows, read, told)
            for t in self.terms:
                low, high = t.operand.part(begin, end)
                if t.operand.rest is not None and low < high:
                    rest = self.rests[t.target]
                    columns = rows.narrow(0, low - begin, high - low).columns(t.column, rest.rows.shape[1])
                    self._shared(t.operand.rest.columns(0, high - low), columns, rest.rows, rest.units, told)
            if sums is not None:
                unit = Buffer.new(ones(end - begin, self.d.r.dtype), (1, end - begin), rows.item)
                self._shared(unit, rows.columns(0, sums.shape[1]), sums, sum_units, told)
        for rest in self.rests.values():
            self._put(rest)

    def _lay_out(self) -> None:
        """Decide how the terms are computed, and take the memory for it."""
        item, lanes, operands = self.grad.item, self.lanes, self.operands.values()
        total, used = self.grad.shape[0], max([t.end for t in self.terms], default=0)
        self.shares = self._shares(used)
        self.threads = len(self.shares) - 1
        large = used > 0 and total * self.grad.strides[0] > NEAR_BYTES
        # Whether columns of `grad` are turned, and what meets them is packed: either is read as often as the other is
        # wide.
        work = sum([t.columns * t.operand.rows * t.operand.width for t in self.terms])
        self.turns = large and used >= TURNED_WIDTH and work >= TURNED_WIDTH * used * total
        # What is copied before it is read: rows that are apart by two distances, or torn.
        tears = large and not self.turns
        copied = [o for o in operands if len(o.matrix.shape) == 3 or (tears and torn(o.matrix))]
        most = COPIED_STRETCH if any(torn(o.matrix) for o in copied) else STRETCH
        self.length = self._length(copied, TURNED_STRETCH if self.turns else most) if large else total
        for o in copied:
            o.near = self._room(self.length, o.width)
        # Where gradients are few, what is no whole vector is packed, with the whole ones.
        self.rests = dict[Buffer, Rest]()
        if total * used > TURNED:
            for o in operands:
                o.direct = o.width // lanes * lanes
                o.rest = self._room(o.width - o.direct, self.length) if o.direct < o.width else None
            for t in self.terms:
                if t.operand.rest is not None and t.target not in self.rests:
                    rows = self._scratch(t.operand.width - t.operand.direct, t.column, t.columns)
                    self.rests[t.target] = Rest(t, rows, self._units(rows, t.column, later=True))
        for o in operands:
            if self.turns or o.direct % lanes:
                o.panel = self.script.take(self.run.panel_size(o.direct, self.length) * item)
        # A thread's share are columns of `grad`, of which it takes some at a time.
        self.pieces = list(self._pieces())
        self.widest = max([count for *_, count in self.pieces], default=0)
        self.turned = [self._room(self.widest, self.length) for _ in range(self.threads)] if self.turns else []
        # Memory that all threads read, and have read before it is written.
        self.common = any(o.near or o.panel or o.rest for o in operands)

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        """(thread, first column, columns) of a stretch that are taken at a time."""
        length = self.length if self.turns else 1
        most = max(PIECE_BYTES // (length * self.grad.item) // self.lanes, 1) * self.lanes
        for thread, (begin, end) in enumerate(pairwise(self.shares)):
            for column in range(begin, end, most):
                yield thread, column, min(most, end - column)

    def _room(self, rows: int, width: int) -> Buffer:
        """Memory of the call for rows that are `spread`, with room for whole vectors."""
        item, row = self.grad.item, spread(-(-width // self.lanes) * self.lanes)
        return Buffer.new(self.script.take(rows * row * item), (rows, row), item).columns(0, width)

    def _waited(self) -> bool:
        wait, self.wait = self.wait, False
        return wait

    def _read(self, begin: int, end: int, told: Address | None) -> dict[Operand, Buffer | Product]:
        """What a stretch of rows, turned, is multiplied by: columns in place, or packed. Others are turned."""
        dtype, options = self.d.r.dtype, dict[str, Any](threads=self.threads, label=LABEL)
        there = [(o, low, high) for o in self.operands.values() for low, high in [o.part(begin, end)] if low < high]
        self.wait = self.wait or self.common
        for o, low, high in there:
            if o.near is not None:
                part = o.narrow(low, high)
                into = o.near.narrow(0, low - begin, high - low).by_time(part.shape[:-1])
                add(self.script, dtype, into, part, count=told, wait=self._waited(), **options)
        self.wait = self.wait or any(o.near is not None for o, *_ in there)
        read = dict[Operand, Buffer | Product]()
        for o, low, high in there:
            x = o.narrow(low, high) if o.near is None else o.near.narrow(0, low - begin, high - low)
            if o.rest is not None:
                into, last = o.rest.columns(0, high - low), x.columns(o.direct, o.width - o.direct)
                turn(self.script, dtype, into, last, told, wait=self._waited(), label=LABEL)
            if o.direct:
                columns = read[o] = x.columns(0, o.direct)
                if o.panel is not None:
                    read[o] = self.run.panel(
                        self.script, columns, 0, True, [0], o.direct, high - low, told=told, at=o.panel,
                        wait=self._waited(), **options,
                    )  # fmt: skip
        self.wait = self.wait or self.common
        return read

    def _rows(
        self, begin: int, end: int, grad: Buffer, read: dict[Operand, Buffer | Product], told: Address | None
    ) -> None:
        """Add to all targets what a stretch of rows, from `begin` to `end`, adds: each thread to its own."""
        options: dict[str, Any] = {"row_block": self.widest} if self.turns else {}
        for thread, column, count in self.pieces:
            columns = grad.columns(column, count)
            units = columns.turned()
            if self.turns:
                units, wait = self.turned[thread].narrow(0, 0, count).columns(0, end - begin), self._waited()
                turn(self.script, self.d.r.dtype, units, columns, told, first=thread, wait=wait, label=LABEL)
            for t in self.terms:
                low, high = t.operand.part(begin, end)
                left, right = max(column, t.column), min(column + count, t.end)
                if t.operand in read and left < right:
                    part = units.narrow(0, left - column, right - left).columns(low - begin, high - low)
                    into = t.target.narrow(0, left - t.column, right - left).columns(0, t.operand.direct)
                    options["several"] = t.columns > 1  # however few of them this is
                    self._product(part, read[t.operand], into, told, threads=1, first=thread, **options)

    def _length(self, copied: Iterable[Operand], most: int) -> int:
        """Rows of a large `grad` that are taken at a time: whole time steps, if there are two distances."""
        total = self.grad.shape[0]
        whole = max([o.matrix.shape[1] for o in copied if len(o.matrix.shape) == 3], default=1)
        return -(-total // -(-total // most) // whole) * whole

    def _scratch(self, rows: int, begin: int, count: int) -> Buffer:
        """Memory of the call for rows of so many columns, those of `grad` from `begin` on: whole vectors of them, where
        its rows go on."""
        item, full = self.grad.item, -(-count // self.lanes) * self.lanes
        columns = full if (begin + full) * item <= self.grad.strides[0] else count
        return Buffer.new(self.script.take(rows * columns * item), (rows, columns), item)

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

    def _units(self, target: Buffer, begin: int, later: bool = False) -> list[Units]:
        """How units, which are columns of `grad` from `begin` on, are shared: in whole tiles, for sums to be the same,
        of which a thread has those that begin in its share of `grad`, or end there, if later."""
        widths = self.run.tilings[0].widths
        tile, whole = widths[0 if target.shape[0] == 1 else 1], target.shape[1] // self.lanes
        vectors = [max(c - begin, 0) // self.lanes + later * (tile - 1) for c in self.shares[:-1]]
        cuts = [min(k // tile * tile, whole) for k in vectors]
        full = whole * self.lanes
        parts = (0, full, [*cuts, whole]), (full, target.shape[1] - full, [*[0] * self.threads, 1])
        return [Units(column, columns, self.script.table(table)) for column, columns, table in parts if columns]

    def _shared(self, x: Buffer, weight: Buffer, target: Buffer, units: list[Units], told: Address | None) -> None:
        """Add x @ weight to a target, with units shared."""
        options = {"threads": self.threads, "split": "units"}
        for column, columns, shares in units:
            part = weight.columns(column, columns)
            self._product(x, part, target.columns(column, columns), told, shares=shares, **options)

    def _put(self, rest: Rest) -> None:
        """Put in a target's place what came about turned."""
        operand, target, dtype = rest.term.operand, rest.term.target, self.d.r.dtype
        rows = rest.rows.columns(0, rest.term.columns)
        back = self._room(rest.term.columns, rows.shape[0])
        turn(self.script, dtype, back, rows, threads=self.threads, label=LABEL)
        add(self.script, dtype, target.columns(operand.direct, rows.shape[0]), back, threads=self.threads, label=LABEL)

    def _shares(self, columns: int) -> list[int]:
        """Whole vectors of columns of `grad` at which the threads' shares begin, and the end: as much for each."""
        lanes = self.lanes
        costs = [0] * -(-columns // lanes)
        for t in self.terms:
            for k in range(t.column // lanes, -(-t.end // lanes)):
                costs[k] += t.operand.rows * t.operand.width
        done = list(accumulate(costs, initial=0))
        threads = min(share(columns, 2 * lanes * done[-1], self.d.team).threads, len(costs))
        goals = [done[-1] * k / threads for k in range(1, threads)]
        return [0, *(bisect_left(done, goal) * lanes for goal in goals), columns]

    def _told(self, begin: int, end: int) -> Address | None:
        """How many of the rows there are, where that is told."""
        if not self.packed:
            return None
        return self.call.number(lambda s: min(max(s.total - begin, 0), end - begin))

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
