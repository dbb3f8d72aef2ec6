"""Gradients of weights: products over all time steps and sequences."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from ..plan import share
from ..program import spread
from .call import Call
from .direction import Direction
from .engine import Buffer, add, plain, product
from .geometry import LINE
from .host import host
from .script import Address, ones, zeros

LABEL = "weight gradients"
STRETCH = 256  # rows of all steps taken at a time, which stay in the second-level cache
COPIED_STRETCH = 768  # and where copies are made of their lines
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
        self.lanes = host().lanes(grad.item)
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
        # What is copied before it is read: rows that are apart by two distances, or torn.
        copied = {o: first for *_, first, o, _ in self.terms if len(o.shape) == 3 or (large and torn(o))}
        length = self._length(copied) if large else total
        near = {}
        for other in copied:
            width, row = other.shape[-1], spread(other.shape[-1])
            near[other] = Buffer.new(script.take(length * row * item), (length, row), item).columns(0, width)
        # The last columns of a target, fewer than a vector, come about turned: as rows as wide as `grad`, whose vectors
        # are full.
        turned = {
            target: (self._scratch(target.shape[1] % lanes, begin, count), begin, count)
            for begin, count, *_, target in self.terms
            if target.shape[1] % lanes and total * count > TURNED
        }
        # A thread's share are columns of `grad`: no thread needs what another one does, but for copies that all read.
        shares_of = {
            target: [script.table([min(max(c - begin, 0), count) for c in shares])]
            for begin, count, *_, target in self.terms
        }
        for here, begin, _ in turned.values():
            shares_of[here] = self._vectors(shares, begin, here, most=1)  # sums leave it to the later one
        if sums is not None:
            shares_of[sums] = self._vectors(shares, 0, sums)
        for begin in range(0, total, length):
            end = min(begin + length, total)
            told = self._told(begin, end)
            stretch = self.grad.narrow(0, begin, end - begin)
            self._copy(near, copied, begin, end, told)
            for column, count, first, other, target in self.terms:
                low, high = self._part(begin, end, first, other)
                if low >= high:
                    continue
                grad = stretch.narrow(0, low - begin, high - low)
                source, at = (near[other], begin) if other in near else (other, first)
                x = source.narrow(0, low - at, high - low)
                rest = turned[target][0] if target in turned else None
                direct = target.shape[1] - (0 if rest is None else rest.shape[0])
                if direct:
                    rows, into = grad.columns(column, count).turned(), target.columns(0, direct)
                    self._product(rows, x.columns(0, direct), into, shares_of[target], "rows", told)
                if rest is not None:
                    rows, units = x.columns(direct, rest.shape[0]).turned(), grad.columns(column, rest.shape[1])
                    self._product(rows, units, rest, shares_of[rest], "units", told)
            if sums is not None:
                unit = Buffer.new(ones(end - begin, dtype), (1, end - begin), item)
                self._product(unit, stretch.columns(0, sums.shape[1]), sums, shares_of[sums], "units", told)
        for target, (here, _, count) in turned.items():
            self._put(here.columns(0, count), target.columns(target.shape[1] - here.shape[0], here.shape[0]))

    def _length(self, copied: Iterable[Buffer]) -> int:
        """Rows of a large `grad` that are taken at a time: whole time steps, if there are two distances."""
        total, whole = self.grad.shape[0], max([o.shape[1] for o in copied if len(o.shape) == 3], default=1)
        most = COPIED_STRETCH if any(map(torn, copied)) else STRETCH
        return -(-total // -(-total // most) // whole) * whole

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
        waited = True
        for other, here in near.items():
            low, high = self._part(begin, end, copied[other], other)
            if low < high:
                part = self._narrowed(other, low - copied[other], high - low)
                into = here.narrow(0, low - begin, high - low).by_time(part.shape[:-1])
                options: dict[str, Any] = {"threads": self.threads, "wait": waited, "label": LABEL}
                add(self.script, self.d.r.dtype, into, part, count=told, **options)
                waited, self.wait = False, True

    def _product(
        self, x: Buffer, weight: Buffer, target: Buffer, shares: list[int], split: str, told: Address | None
    ) -> None:
        """Add x @ weight to a target, whose first product sets it. shares: tables for whole vectors of it, which read
        weights where they are, and for what is left."""
        whole, item = target.shape[1] // self.lanes * self.lanes, target.item
        for first, count, table in ((0, whole, shares[0]), (whole, target.shape[1] - whole, shares[-1])):
            if count:
                product(
                    self.script, self.d.r.dtype, x.by_time(), weight.columns(first, count),
                    target.columns(first, count).by_time(), None if target in self.begun else zeros(count * item),
                    transposed=True, pack=False, threads=self.threads, shares=table, split=split, wait=self.wait,
                    told=told, label=LABEL,
                )  # fmt: skip
                self.wait = False
        self.begun.add(target)

    def _put(self, turned: Buffer, target: Buffer) -> None:
        """Put in a target's place what came about turned, by way of a panel of packed weights, which is turned, too."""
        dtype, (rest, count) = self.d.r.dtype, turned.shape
        panel = plain(dtype)[0].panel(self.script, turned, 0, False, [0], rest, count, self.threads)
        back = Buffer(panel.weights, (count, rest), (panel.grow, turned.item), turned.item)
        add(self.script, dtype, target, back, threads=self.threads, label=LABEL)

    def _vectors(self, shares: list[int], begin: int, target: Buffer, most: int = 0) -> list[int]:
        """Tables of the threads' shares of a target's columns, which are those of `grad` from `begin` on, as units: of
        whole tiles, for sums to be the same. most: 1 if what is no whole tile is the earlier thread's."""
        widths = plain(self.d.r.dtype)[0].shapes[0].widths
        tile, whole = widths[0 if target.shape[0] == 1 else 1], target.shape[1] // self.lanes
        vectors = [max(c - begin, 0) // self.lanes + most * (tile - 1) for c in shares[:-1]]
        cuts = [min(k // tile * tile, whole) for k in vectors]
        return [self.script.table([*cuts, whole]), self.script.table([*[0] * self.threads, 1])]

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
