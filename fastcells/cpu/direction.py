"""One direction of a layer as the engine sees it: programs, steps and sequences, the tensors of a call, its weights."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..cell import Cell
from ..derivation import build, runs
from ..plan import Plan, Shape, Share, plan
from ..program import Programs, Weights
from . import team
from .engine import Buffer, Product, Runner, Times, View, add
from .host import host
from .lengths import Mover, Tables, Tokens
from .script import Address, At, Script, zeros

TOTAL = -1  # first in a shape: as many rows as all steps of a call's packed sequences have,
BATCH = -2  # and in place of the two first sizes of the batch that these lie in
APART_FLOPS = 20_000_000  # of a product, worth a team of its own


class Ready:
    """A cell with its programs and their runners for one number format."""

    def __init__(self, cell: Cell, project: bool, dtype: torch.dtype, lanes: int, feed: bool, each: bool) -> None:
        self.cell, self.dtype, self.item = cell, dtype, dtype.itemsize
        self.programs: Programs = build(cell, project, feed, each)
        self.forward = Runner(self.programs.forward, dtype, lanes)
        self.backward = Runner(self.programs.backward, dtype, lanes)
        self.gates = {g: k for k, g in enumerate(cell.gates)}  # the order of the weights' rows
        g = self.programs.gradients
        # Blocks of adjacent slots, one product each: (gates, first slot, slot of the operand or name of the state).
        self.recurrent = [
            (run, g.u[run[0]], operand)
            for operand in dict.fromkeys(g.operands.values())
            for run in runs([u for u, o in g.operands.items() if o == operand], g.u)
        ]
        self.used_slots = max([*g.x.values(), *g.u.values()]) + 1


@lru_cache(maxsize=256)
def ready(cell: Cell, project: bool, dtype: torch.dtype, lanes: int, feed: bool = False, each: bool = False) -> Ready:
    """The same object for the same cell; nothing is compiled before a kernel first runs. lanes: numbers in a vector.
    feed, each: see `build`."""
    return Ready(cell, project, dtype, lanes, feed, each)


def suited(cell: Cell, weights: Sequence[Any], feed: bool = False, each: bool = False) -> Ready:
    """`ready` for a direction with these weights (weight_ih, weight_hh, ...): their dtype, projection and units."""
    w_ih = weights[0]
    project = len(weights) > 4 and weights[4] is not None
    lanes = host().lanes(w_ih.dtype.itemsize, w_ih.shape[0] // len(cell.gates))
    return ready(cell, project, w_ih.dtype, lanes, feed, each)


Number = Callable[[Callable[[Any], Any]], At]
"""`Prepared.number`: an operand, by a function of the `Sequences` of a call."""


def roomy(count: int) -> int:
    """As many or somewhat more, so that there are few such numbers."""
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step


class Sequences:
    """How time steps and sequences are laid out: padded [T, N], or packed [total] with the number of rows of each step.

    steps: T; rows: N, of the fullest step; total: rows of all steps; counts: of each step, None if all have as many,
    and `Tables` of them, and of orders of the sequences, if there are any. most: rows of all steps that a call is made
    ready for: of packed sequences somewhat more than there are, so that the same call does for others; what differs
    from one to the next is told at each call (`Prepared.number`). tokens: where packed rows lie in a padded batch,
    which is the input, the output, or both.
    """

    def __init__(
        self, x: Tensor, counts: Tensor | None, orders: Sequence[Tensor] = (), tokens: Tokens | None = None
    ) -> None:
        self.counts, self.tokens = counts, tokens
        self.tables = None if counts is None else Tables(counts, x.shape[:-1].numel(), orders)
        self.packed = self.tables is not None
        if self.tables is not None:
            self.steps, self.rows, self.total = self.tables.steps, self.tables.rows, self.tables.total
            self.most = roomy(self.total)
        else:
            self.steps, self.rows = x.shape[0], x.shape[1]
            self.most = self.total = self.steps * self.rows

    def fit(self, x: Tensor) -> bool:
        """Whether packed rows have the counts and orders that they have to have."""
        assert self.tables is not None, "packed sequences have counts"
        return self.rows > 0 and (self.total, self.steps) == (x.shape[0], self.tables.given.shape[0])

    @property
    def takes(self) -> bool:
        """Whether the input is a padded batch, with packed rows somewhere in it."""
        return self.tokens is not None and self.tokens.takes

    @property
    def gives(self) -> bool:
        """Whether the output is."""
        return self.tokens is not None and self.tokens.gives

    @property
    def few(self) -> tuple[int, int, bool, bool, bool]:
        """What packed sequences that the same call does for have in common."""
        return self.most, self.rows, self.steps == 1, self.takes, self.gives

    def lying(self, takes: bool, gives: bool) -> Sequences:
        """The same with the input, the output, or both in the batch."""
        assert self.tokens is not None, "there is no batch"
        other = copy(self)
        other.tokens = self.tokens._replace(takes=takes, gives=gives)
        return other

    def leading(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The first sizes of what begins with TOTAL or BATCH."""
        return self.tokens.leading if shape[0] == BATCH and self.tokens is not None else (self.total,)

    def times(self, descending: bool, number: Number) -> Times:
        """Steps from the first to the last, or from the last to the first. number: `Prepared.number`."""
        if self.packed:
            counts = number(lambda s: s.tables.counts(descending))
            positions = number(lambda s: s.tables.positions(descending))
            return Times(number(lambda s: s.steps), self.rows, positions=positions, counts=counts)
        first, delta = (self.steps - 1, -1) if descending else (0, 1)
        return Times(self.steps, self.rows, first, delta)

    def shares(self, threads: int, number: Number) -> Address:
        """Address of the threads' bounds; 0 for even shares."""
        if self.tables is None or threads == 1:
            return 0
        return number(lambda s: s.tables.bounds(threads))


def view(t: Buffer, sequences: Sequences, initial: Buffer | int = 0) -> View:
    """[T, N, width] or [total, width]; initial: [N, width], or the address of one zero row."""
    if len(t.shape) == 3:
        step, row = t.strides[:2]
    else:
        step = row = t.strides[0]
        if not sequences.packed:
            step *= sequences.rows
    return View(t.at, step, row, *rows_of_initial(initial))


def fixed(t: Buffer, initial: Buffer | int = 0) -> View:
    """[N, width], the same at all steps; initial: as for `view`."""
    return View(t.at, 0, t.strides[0], *rows_of_initial(initial))


def rows_of_initial(initial: Buffer | int) -> tuple[Address, int]:
    """Address, and bytes from row to row, of [N, width] or of one zero row given by its address."""
    return (initial, 0) if isinstance(initial, int) else (initial.at, initial.strides[0])


def usable(t: Any) -> Any:
    """The tensor itself (or None) if it has its numbers in memory, those of a row adjacent, else a copy."""
    if t is not None and (t.is_neg() or t._is_zerotensor()):  # what is read has another sign, or is not there
        t = t.clone()
    return t if t is None or t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


class Operands:
    """The tensors of a call by number, the first of them 1: those that are given, then those that it makes. free: how
    many first sizes of a given one may be others in other calls, by number."""

    def __init__(self, item: int) -> None:
        self.item, self.count, self.free = item, 1, dict[int, int]()

    def given(self, t: Tensor | None, most: int | None = None, whole: bool = False) -> Any:
        """A tensor of the caller's as a Buffer; None, and a number skipped, where there is none. most: its rows, where
        those of other calls may be others, and no more. whole: these follow each other, by however many sizes."""
        at = At(self._next())
        if t is None:
            return None
        shape = tuple(t.shape)
        if whole and most is not None:
            self.free[at.operand] = len(shape) - 1
            return Buffer.new(at, (most, shape[-1]), self.item)
        if most is not None:
            self.free[at.operand] = 1
            shape = most, *shape[1:]
        return Buffer(at, shape, tuple([s * self.item for s in t.stride()]), self.item)

    def made(self, shape: Sequence[int], most: int) -> Any:
        """A tensor that the call makes. most: rows in the place of TOTAL and BATCH."""
        return Buffer.new(At(self._next()), [most if n in (TOTAL, BATCH) else n for n in shape], self.item)

    def address(self) -> At:
        """One that is an address, or a number."""
        return At(self._next())

    def _next(self) -> int:
        self.count += 1
        return self.count - 1


class Direction:
    """One direction of a layer: its weights as the programs want them."""

    def __init__(self, r: Ready, parameters: Sequence[Any], inputs: Sequence[Any], index: int) -> None:
        self.r, self.index = r, index
        self.reverse = bool(index)
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr, *own = parameters
        self.hidden = self.w_ih.shape[0] // len(r.gates)
        self.depth = self.hidden if self.w_hr is None else self.w_hr.shape[0]
        self.own = dict(zip(r.cell.own, own, strict=True))
        self.fed = {name: t[index] for name, t in zip(r.cell.fed, inputs, strict=True)}
        self.inputs = self.w_ih.shape[1]

    def share(self, schedule: Plan, share: Share, total: int) -> None:
        """Take this direction's part of a pass, and choose the threads of the products around the time loop: where that
        runs on one thread, another that waits for it slows it down, so that only large products are worth it."""
        self.schedule, self.threads, self.split = schedule, share.threads, share.split
        self.first = self.index * share.threads if schedule.side_by_side else 0
        flops = 2 * total * len(self.r.gates) * self.hidden * self.inputs
        shared = max(schedule.forward.threads, schedule.back.threads) > 1 or schedule.side_by_side
        self.team = team.size() if shared or flops > APART_FLOPS else 1

    def mover(self, call: Any, sequences: Sequences) -> Mover:
        """What moves packed rows in a call."""
        shares = sequences.shares(self.threads, call.number) if self.split == "rows" else 0
        return Mover(call.script, sequences.times(False, call.number), call.number, shares, self.threads, self.team)

    def own_views(self, sequences: Sequences) -> dict[str, View]:
        """Of the cell's own tensors, and of its extra inputs."""
        steps = self.r.cell.step_inputs
        return {
            **{"own." + n: View(t.at) for n, t in self.own.items()},
            **{"own." + n: view(t, sequences) if n in steps else fixed(t) for n, t in self.fed.items()},
        }

    def blocks(self, gates: Sequence[str], slots: dict[str, int] | None = None) -> list[tuple[int, int, int]]:
        """Gates grouped so that within a group rows of the weights follow each other, and slots too if given:
        (first of the gates, first block of rows, number of gates)."""
        found: list[tuple[int, int, int]] = []
        for k, gate in enumerate(gates):
            if found:
                first, row, count = found[-1]
                follows = slots is None or slots[gate] == slots[gates[first]] + count
                if self.r.gates[gate] == row + count and follows:
                    found[-1] = first, row, count + 1
                    continue
            found.append((k, self.r.gates[gate], 1))
        return found

    def rows_of(self, script: Script, weight: Buffer, gates: Sequence[str]) -> Buffer:
        """The gates' rows of a weight or bias in their order, without a copy where they follow each other."""
        h, blocks = self.hidden, self.blocks(gates)
        if len(blocks) == 1:
            return weight.narrow(0, blocks[0][1] * h, len(gates) * h)
        shape = (len(gates) * h, *weight.shape[1:])
        copy = Buffer.new(script.take(shape[0] * (shape[1] if len(shape) > 1 else 1) * weight.item), shape, weight.item)
        matrix = (lambda t: t) if len(shape) > 1 else (lambda t: Buffer(t.at, (1, *t.shape), (0, *t.strides), t.item))
        for k, row, count in blocks:
            add(
                script, self.r.dtype, matrix(copy.narrow(0, k * h, count * h)),
                matrix(weight.narrow(0, row * h, count * h)), wait=False,
            )  # fmt: skip
        return copy

    def biases(self, script: Script) -> tuple[Address, Address]:
        """Addresses of what the input projections, and the recurrent products with a bias of their own, start from."""
        p, h = self.r.programs, self.hidden
        if self.b_ih is None or self.b_hh is None:
            zero = zeros(max(len(p.start_gates), len(p.bias_gates)) * h * self.w_ih.item)
            return zero, zero
        item = self.w_ih.item
        start = script.take(len(p.start_gates) * h * item)
        for shared in (True, False):
            gates = [g for g in p.start_gates if (g in p.shared) == shared]
            for k, row, count in self.blocks(gates, {g: n for n, g in enumerate(p.start_gates)}):
                at = p.start_gates.index(gates[k]) * h
                out = Buffer.new(start + at * item, (1, count * h), item)
                a, b = (Buffer(t.at + row * h * item, out.shape, out.strides, item) for t in (self.b_ih, self.b_hh))
                add(script, self.r.dtype, out, a, b if shared else None, wait=False)
        return start, self.rows_of(script, self.b_hh, p.bias_gates).at if p.bias_gates else 0

    def launch(
        self,
        script: Script,
        run: Runner,
        sequences: Sequences,
        views: Mapping[str, View],
        products: Sequence[Sequence[Product]],
        *,
        descending: bool,
        number: Number,
        **options: Any,
    ) -> None:
        """Add a pass's program over the time steps, from the last one if descending. number: `Prepared.number`."""
        run.launch(
            script,
            sequences.times(descending, number),
            views,
            products,
            [self.units(s.size) for s in run.program.stages],
            slot=self.hidden,
            threads=self.threads,
            first=self.first,
            wait=self.index == 0 or not self.schedule.side_by_side,
            split=self.split,
            row_block=self.schedule.row_block,
            shares=sequences.shares(self.threads, number) if self.split == "rows" else 0,
            **options,
        )

    def products(self, script: Script, run: Runner, unused: Container[str] = ()) -> list[list[Product]]:
        """The weights of every segment of every stage; nothing is packed for those `unused`.

        unused: "x" where the input is projected ahead; "before" where the only step is every sequence's first.
        """
        found = []
        for k, stage in enumerate(run.program.stages):
            row = []
            for segment in stage.segments:
                if segment.rows.buffer in unused:
                    row.append(Product(0))
                elif segment.rows.when in unused:
                    row.append(Product(self.depth_of(segment.weights)))
                else:
                    row.append(self.weights(script, run, k, segment.weights, self.units(stage.size)))
            found.append(row)
        return found

    def depth_of(self, weights: Weights) -> int:
        if weights.matrix == "hr":
            return self.depth if weights.transposed else self.hidden
        if weights.transposed:
            return len(weights.gates) * self.hidden
        return self.inputs if weights.matrix == "ih" else self.depth

    def weights(self, script: Script, run: Runner, stage: int, weights: Weights, units: int) -> Product:
        depth = self.depth_of(weights)
        matrix = {"ih": self.w_ih, "hh": self.w_hh, "hr": self.w_hr}[weights.matrix]
        if weights.transposed and weights.matrix != "hr":
            matrix = self.rows_of(script, matrix, weights.gates)
        if self.schedule.in_place and run.readable(weights.transposed, units):
            return run.in_place(matrix, weights.transposed, self.hidden, depth)
        one = weights.transposed or weights.matrix == "hr"
        offsets = [0] if one else [self.r.gates[g] * self.hidden for g in weights.gates]
        threads = self.threads
        return run.panel(script, matrix, stage, weights.transposed, offsets, units, depth, threads, self.first)

    def units(self, size: str) -> int:
        return self.depth if size == "P" else self.hidden


def planned(
    cell: Cell, weights: Sequence[Any], sequences: Sequences, directions: int = 1, training: bool = False
) -> Plan:
    """The schedule that a direction with these weights (weight_ih, weight_hh) takes now."""
    w_ih, w_hh = weights[:2]
    gates = len(cell.gates)
    rows, inputs = w_ih.shape
    r = suited(cell, weights)
    return plan(
        Shape(
            sequences.steps,
            sequences.rows,
            sequences.most,
            inputs,
            rows // gates,
            0 if w_hh is None else w_hh.shape[1],
            gates,
            r.item,
            team.size(),
            directions,
            training,
            r.programs.ahead,
            sequences.tables is None and r.forward.rides,
            r.forward.grain,
            host().distant,
        )
    )
