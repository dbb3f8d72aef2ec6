"""One layer, all its directions, on the CPU engine: buffers, time loops and the large products around them."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cell import Cell
from ..expression import Node, apply, leaf
from ..plan import Plan, Shape, plan
from ..program import Programs, Weights, build, runs
from . import team
from .engine import Buffer, Product, Runner, Times, View, add, product
from .script import Address, At, Script, ones, zeros

Parameters = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]

APART_FLOPS = 20_000_000  # of a product, worth a team of its own
FEW_ROWS = 16  # that read weights where they are: packing them first would cost more
LARGE_PRODUCT = 1 << 26  # multiplications, from which torch packs both operands to its advantage


class Ready:
    """A cell with its programs and their runners for one number format."""

    def __init__(self, cell: Cell, project: bool, dtype: torch.dtype, feed: bool, each: bool) -> None:
        self.cell, self.dtype, self.item = cell, dtype, dtype.itemsize
        self.programs: Programs = build(cell, project, feed, each)
        self.forward = Runner(self.programs.forward, dtype)
        self.backward = Runner(self.programs.backward, dtype)
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
def ready(cell: Cell, project: bool, dtype: torch.dtype, feed: bool = False, each: bool = False) -> Ready:
    """The same object for the same cell; nothing is compiled before a kernel first runs. feed, each: see `build`."""
    return Ready(cell, project, dtype, feed, each)


class Sequences:
    """How time steps and sequences are laid out: padded [T, N], or packed [total] with the number of rows of each step.

    steps: T; rows: N, of the fullest step; total: rows of all steps; counts: of each step, None if padded.
    """

    def __init__(self, x: Tensor, batch_sizes: Tensor | None) -> None:
        self.counts = None if batch_sizes is None else batch_sizes.contiguous()
        if batch_sizes is None:
            self.steps, self.rows = x.shape[0], x.shape[1]
            self.total = self.steps * self.rows
        else:
            self.steps, self.rows, self.total = batch_sizes.shape[0], int(batch_sizes[0]), x.shape[0]

    def _packed(self) -> Tensor:
        assert self.counts is not None, "padded sequences have no table of counts"
        return self.counts

    @cached_property
    def offsets(self) -> Tensor:
        """Row at which each step begins (packed)."""
        counts = self._packed()
        return counts.cumsum(0) - counts

    @cached_property
    def lengths(self) -> Tensor:
        """Of the sequences, longest first (packed)."""
        ascending = self._packed().flip(0)
        return self.steps - torch.searchsorted(ascending, torch.arange(self.rows), right=True)

    def times(self, descending: bool) -> Times:
        """Steps from the first to the last, or from the last to the first."""
        if self.counts is None:
            return Times(self.steps, self.rows, self.steps - 1, -1) if descending else Times(self.steps, self.rows)
        if descending:
            return Times(self.steps, self.rows, positions=self.offsets.flip(0), counts=self.counts.flip(0))
        return Times(self.steps, self.rows, positions=self.offsets, counts=self.counts)

    def edge(self, t: Tensor, last: bool) -> Tensor:
        """[N, ...]: rows of `t` ([T, N, ...] or [total, ...]) at the last or first step of every sequence."""
        if self.counts is None:
            time = t if t.dim() == 3 else t.view(self.steps, self.rows, t.shape[1])
            return time.select(0, self.steps - 1 if last else 0)
        return t[self.offsets[self.lengths - 1] + torch.arange(self.rows)] if last else t[: self.rows]

    def previous(self, reverse: bool) -> tuple[Tensor, Tensor]:
        """(row of the step before, row of the sequence) for every packed row; the former is -1 at a first step."""
        counts = self._packed()
        row = torch.arange(self.total) - self.offsets.repeat_interleave(counts)
        step = torch.arange(self.steps).repeat_interleave(counts)
        if reverse:
            other = (step + 1).clamp(max=self.steps - 1)
            exists = (step + 1 < self.steps) & (row < counts[other])
        else:
            other = (step - 1).clamp(min=0)
            exists = step > 0
        return torch.where(exists, self.offsets[other] + row, -1), row

    def shares(self, threads: int) -> array | None:
        """Rows at which threads' shares begin, so that each has as many time steps to do; None for even shares."""
        if self.counts is None or threads == 1:
            return None
        done = self.lengths.cumsum(0)
        goals = torch.arange(1, threads) * (self.total / threads)
        ends = torch.searchsorted(done, goals).add(1).clamp(max=self.rows).tolist()
        return array("q", [0, *ends, self.rows])


def view(t: Buffer, sequences: Sequences, initial: Buffer | int = 0) -> View:
    """[T, N, width] or [total, width]; initial: [N, width], or the address of one zero row."""
    if len(t.shape) == 3:
        step, row = t.strides[:2]
    else:
        step = row = t.strides[0]
        if sequences.counts is None:
            step *= sequences.rows
    return View(t.at, step, row, *_rows(initial))


def fixed(t: Buffer, initial: Buffer | int = 0) -> View:
    """[N, width], the same at all steps; initial: as for `view`."""
    return View(t.at, 0, t.strides[0], *_rows(initial))


def _rows(initial: Buffer | int) -> tuple[Address, int]:
    """Address, and bytes from row to row, of [N, width] or of one zero row given by its address."""
    return (initial, 0) if isinstance(initial, int) else (initial.at, initial.strides[0])


def usable(t: Tensor) -> Tensor:
    """The tensor itself if the numbers of a row are adjacent, else a copy."""
    return t if t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


class Operands:
    """The tensors of a call by number, the first of them 1: those that are given, then those that it makes."""

    def __init__(self, item: int) -> None:
        self.item, self.count = item, 1

    def given(self, t: Tensor | None) -> Any:
        """A tensor of the caller's as a Buffer; None, and a number skipped, where there is none."""
        at = At(self._next())
        return None if t is None else Buffer(at, tuple(t.shape), tuple([s * self.item for s in t.stride()]), self.item)

    def made(self, shape: Sequence[int]) -> Any:
        """A tensor that the call makes."""
        return Buffer.new(At(self._next()), shape, self.item)

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

    def share(self, schedule: Plan, total: int) -> None:
        """Choose the threads of the products around the time loop: where that runs on one thread, another that waits
        for it slows it down, so that only large products are worth it."""
        flops = 2 * total * len(self.r.gates) * self.hidden * self.inputs
        shared = schedule.threads > 1 or schedule.side_by_side or flops > APART_FLOPS
        self.team = team.size() if shared else 1

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

    def products(
        self, script: Script, run: Runner, schedule: Plan, first: int, unused: Container[str] = ()
    ) -> list[list[Product]]:
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
                    row.append(self.weights(script, run, k, segment.weights, self.units(stage.size), schedule, first))
            found.append(row)
        return found

    def depth_of(self, weights: Weights) -> int:
        if weights.matrix == "hr":
            return self.depth if weights.transposed else self.hidden
        if weights.transposed:
            return len(weights.gates) * self.hidden
        return self.inputs if weights.matrix == "ih" else self.depth

    def weights(
        self, script: Script, run: Runner, stage: int, weights: Weights, units: int, schedule: Plan, first: int
    ) -> Product:
        depth = self.depth_of(weights)
        matrix = {"ih": self.w_ih, "hh": self.w_hh, "hr": self.w_hr}[weights.matrix]
        if weights.transposed and weights.matrix != "hr":
            matrix = self.rows_of(script, matrix, weights.gates)
        if schedule.in_place and run.readable(weights.transposed, units):
            return run.in_place(matrix, weights.transposed, self.hidden, depth)
        one = weights.transposed or weights.matrix == "hr"
        offsets = [0] if one else [self.r.gates[g] * self.hidden for g in weights.gates]
        threads = schedule.threads
        return run.panel(script, matrix, stage, weights.transposed, offsets, units, depth, threads, first)

    def units(self, size: str) -> int:
        return self.depth if size == "P" else self.hidden


def planned(cell: Cell, weights: Sequence[Any], sequences: Sequences, directions: int = 1) -> Plan:
    """The schedule that a direction with these weights (weight_ih, weight_hh) takes now."""
    w_ih, w_hh = weights[:2]
    gates = len(cell.gates)
    rows, inputs = w_ih.shape
    return plan(
        Shape(
            sequences.steps,
            sequences.rows,
            sequences.total,
            inputs,
            rows // gates,
            0 if w_hh is None else w_hh.shape[1],
            gates,
            w_ih.element_size(),
            team.size(),
            directions,
            build(cell, False).ahead,
        )
    )


@dataclass
class Saved:
    """What forward leaves to backward, tensors for each direction."""

    slots: list[Tensor]  # [total, Programs.width]
    series: list[Tensor]  # [total, H], of each state but the hidden one
    plan: Plan


class Call:
    """A call made ready: scripts and functions of the call's tensors, in order."""

    def __init__(self) -> None:
        self.script = Script()
        self.parts: list[Script | Callable[[Sequence[Tensor | None]], None]] = [self.script]

    def then(self, function: Callable[[Sequence[Tensor | None]], None]) -> None:
        """Go on with a function of the operands, by number less 1."""
        self.script = Script()
        self.parts += [function, self.script]

    @property
    def whole(self) -> bool:
        """Whether the script is all of it."""
        return len(self.parts) == 1

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        for part in self.parts:
            if not isinstance(part, Script):
                part(tensors)
            elif part.launches:
                part.run(addresses)


class _Forward(Call):
    """The forward call for tensors laid out like these."""

    def __init__(
        self,
        r: Ready,
        x: Tensor,
        states: Sequence[Tensor] | None,
        parameters: Sequence[Sequence[Tensor | None]],
        inputs: Sequence[Tensor],
        sequences: Sequences,
        training: bool,
    ) -> None:
        super().__init__()
        p, item, dtype = r.programs, r.item, r.dtype
        self.plan = schedule = planned(r.cell, parameters[0], sequences, len(parameters))
        operands = Operands(item)
        x_, given = operands.given(x), [operands.given(s) for s in states or ()]
        fed = [operands.given(t) for t in inputs]
        directions = [Direction(r, [operands.given(t) for t in q], fed, k) for k, q in enumerate(parameters)]
        count, rows, total = len(directions), sequences.rows, sequences.total
        for d in directions:
            d.share(schedule, total)
        width, hidden = directions[0].depth, directions[0].hidden
        # A unit's state is read and then written by the same tile, so that states may be kept in place.
        in_place = not training and len(p.forward.stages) == 1
        self.y = (*x.shape[:-1], count * width)
        self.finals = [(count, rows, hidden if j else width) for j in range(len(r.cell.states))]
        self.slots = (total, p.width(hidden))
        self.series = (total, hidden)
        # Other states are kept at every step for the backward pass, and for products.
        kinds = [j for j, name in enumerate(p.states) if j and (name in p.streams or not in_place)]
        self.many = len(kinds)
        y, finals = operands.made(self.y), [operands.made(s) for s in self.finals]
        kept = [operands.made(self.slots) for _ in directions] if training else []
        series = [{j: operands.made(self.series) for j in kinds} for _ in directions]
        nothing = zeros(max(width, hidden) * item)
        starts = []
        launches = []
        for k, d in enumerate(directions):
            first = k * schedule.threads if schedule.side_by_side else 0
            start, own = d.biases(self.script)
            initial: list[Buffer | int] = [nothing] * len(p.states) if states is None else [s[k] for s in given]
            views = {"s." + p.states[0]: view(y.columns(k * width, width), sequences, initial[0]), "bias": View(own)}
            views |= d.own_views(sequences)
            for j, name in enumerate(p.states[1:], 1):
                kept_series = series[k].get(j)
                if kept_series is None:
                    views["s." + name] = fixed(finals[j][k], initial[j])
                else:
                    views["s." + name] = view(kept_series, sequences, initial[j])
            if training:
                views["saved"] = view(kept[k], sequences)
            elif in_place:
                views["saved"] = View(0)
            else:  # a later stage reads here what an earlier one left, at the same step
                shape = rows, p.width(hidden)
                views["saved"] = fixed(Buffer.new(self.script.take(shape[0] * shape[1] * item), shape, item))
            starts.append((start, views))
            unused = (
                "x" if schedule.project_ahead else "",
                "before" if states is None and sequences.steps == 1 else "",
            )
            launches.append(d.products(self.script, r.forward, schedule, first, unused))
        for k, d in enumerate(directions):
            start, views = starts[k]
            if not schedule.project_ahead:
                views["start"], views["x"] = View(start), view(x_, sequences)
                continue
            units = len(p.start_gates) * hidden
            ahead = kept[k] if training else Buffer.new(self.script.take(total * units * item), (total, units), item)
            views["start"], views["x"] = view(ahead, sequences), View(0)
            out = ahead.columns(0, units).by_time(x.shape[:-1])
            weight = d.rows_of(self.script, d.w_ih, p.start_gates)
            product(self.script, dtype, x_.by_time(), weight, out, start, threads=d.team, label="input projection")
        self.owned = []
        for k, d in enumerate(directions):
            first = k * schedule.threads if schedule.side_by_side else 0
            times = sequences.times(descending=d.reverse)
            shares = sequences.shares(schedule.threads)
            self.owned += [times, shares]
            r.forward.launch(
                self.script,
                times,
                starts[k][1],
                launches[k],
                [d.units(s.size) for s in p.forward.stages],
                slot=hidden,
                skip_first=states is None,
                training=training,
                threads=schedule.threads,
                first=first,
                wait=k == 0 or not schedule.side_by_side,
                split=schedule.split,
                row_block=schedule.row_block,
                shares=0 if shares is None else shares.buffer_info()[0],
                dot=schedule.in_place,
            )
        for k, d in enumerate(directions):
            for j in (0, *(j for j in kinds if j < len(finals))):
                source = series[k][j] if j else y.columns(k * width, width)
                if sequences.counts is None:
                    edge = source.by_time((sequences.steps, rows))[0 if d.reverse else sequences.steps - 1]
                    add(self.script, dtype, finals[j][k], edge, wait=k == 0 and j == 0)
                    continue
                operand: Any = source.at
                at = operand.operand - 1, finals[j].at.operand - 1, k * width if not j else 0, k

                def copy(tensors, at=at, size=source.shape[-1], last=not d.reverse):
                    source, final, column, k = at
                    edge = sequences.edge(tensors[source], last=last)
                    tensors[final].select(0, k).copy_(edge[:, column : column + size])

                self.then(copy)


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    states: bool
    weights: bool


class _Backward(Call):
    """The backward call for tensors laid out like these."""

    def __init__(
        self,
        r: Ready,
        schedule: Plan,
        x: Tensor,
        states: Sequence[Tensor] | None,
        y: Tensor,
        parameters: Sequence[Sequence[Tensor | None]],
        inputs: Sequence[Tensor],
        sequences: Sequences,
        saved: Saved,
        dy: Tensor | None,
        dfinals: Sequence[Tensor | None],
        dothers: Sequence[Tensor | None],
        wanted: Wanted,
        overwrite: bool,
        feed: bool,
    ) -> None:
        super().__init__()
        p, item, dtype, cell = r.programs, r.item, r.dtype, r.cell
        operands = Operands(item)
        x_, given = operands.given(x), [operands.given(s) for s in states or ()]
        fed = [operands.given(t) for t in inputs]
        directions = [Direction(r, [operands.given(t) for t in q], fed, k) for k, q in enumerate(parameters)]
        y_ = operands.given(y)
        kept = [operands.given(t) for t in saved.slots]
        series = [operands.given(t) for t in saved.series]
        dy_, dfinals_ = operands.given(dy), [operands.given(t) for t in dfinals]
        dothers_ = [operands.given(t) for t in dothers]
        count, rows, total = len(directions), sequences.rows, sequences.total
        for d in directions:
            d.share(schedule, total)
        width, hidden = directions[0].depth, directions[0].hidden
        # What it makes: the gradients, and those of the pre-activations.
        self.dx = tuple(x.shape) if wanted.x else None
        states_wanted = wanted.states or bool(p.derived and (wanted.weights or feed))
        self.dstates = [(count, rows, hidden if j else width) if states_wanted else None for j in range(len(p.states))]
        self.dinputs = [tuple(t.shape) if feed else None for t in inputs]
        self.dparameters = [
            [None if t is None or not wanted.weights else tuple(t.shape) for t in q] for q in parameters
        ]
        dx = operands.made(self.dx) if self.dx else operands.given(None)
        dstates = [operands.made(s) if s else operands.given(None) for s in self.dstates]
        dinputs = [operands.made(s) if s else operands.given(None) for s in self.dinputs]
        dparameters = [[operands.given(None) if s is None else operands.made(s) for s in q] for q in self.dparameters]
        self.totals = [(rows, hidden) for _ in cell.own]  # gradients of the cell's own tensors, by sequence
        own_totals = [[operands.made(t) for t in self.totals] for _ in directions]
        self.grad = None if overwrite else tuple(saved.slots[0].shape)
        grads = [operands.made(self.grad) for _ in directions] if self.grad else kept
        self.projected = (total, width) if directions[0].w_hr is not None else None
        projected = [operands.made(self.projected) if self.projected else operands.given(None) for _ in directions]
        nothing = zeros(max(width, hidden) * item)
        others = len(p.states) - 1
        launches, totals, self.owned = [], [], []
        for k, d in enumerate(directions):
            first = k * schedule.threads if schedule.side_by_side else 0
            initial: list[Buffer | int] = [nothing] * len(p.states) if states is None else [s[k] for s in given]
            views = {
                "dy": View(nothing) if dy_ is None else view(dy_.columns(k * width, width), sequences),
                "saved": view(kept[k], sequences),
                "grad": view(grads[k], sequences),
                "s." + p.states[0]: view(y_.columns(k * width, width), sequences, initial[0]),
            }
            if p.cross_width(hidden):
                size = p.cross_width(hidden) * item
                views["cross"] = View(self.script.take(rows * size), 0, size)
            views |= d.own_views(sequences)
            totals.append({n: t[k] for n, t in zip(cell.fed, dinputs, strict=True) if t is not None})
            totals[k] |= dict(zip(cell.own, own_totals[k], strict=True))
            for name, total in totals[k].items():
                add(self.script, dtype, total.flattened(), None, wait=False)
                views["total." + name] = view(total, sequences) if name in cell.step_inputs else fixed(total)
            for j, name in enumerate(p.states):
                if j > 0:
                    views["s." + name] = view(series[k * others + j - 1], sequences, initial[j])
                if j >= len(cell.states):
                    continue
                if j > 0 and dothers_:
                    each = dothers_[j - 1]
                    views["each." + name] = (
                        View(nothing) if each is None else view(each.columns(k * hidden, hidden), sequences)
                    )
                final = None if dfinals_[j] is None else dfinals_[j][k]
                if j > 0 or name in p.carried:
                    total_carry, size = dstates[j], hidden if j else width
                    if total_carry is None:  # nobody asks for the state's gradient
                        carry = Buffer.new(self.script.take(rows * size * item), (rows, size), item)
                    else:
                        carry = total_carry[k]
                    add(self.script, dtype, carry, final, wait=False)
                    views["carry." + name] = fixed(carry)
                else:
                    views["carry." + name] = View(nothing, 0, 0, *_rows(nothing if final is None else final))
            if projected[k] is not None:
                views["projected"] = view(projected[k], sequences)
            unused = ("before",) if sequences.steps == 1 else ()
            launches.append((views, d.products(self.script, r.backward, schedule, first, unused)))
        for k, d in enumerate(directions):
            times, shares = sequences.times(descending=not d.reverse), sequences.shares(schedule.threads)
            self.owned += [times, shares]
            r.backward.launch(
                self.script,
                times,
                *launches[k],
                [d.units(s.size) for s in p.backward.stages],
                slot=hidden,
                skip_first=True,
                threads=schedule.threads,
                first=k * schedule.threads if schedule.side_by_side else 0,
                wait=k == 0 or not schedule.side_by_side,
                split=schedule.split,
                row_block=schedule.row_block,
                shares=0 if shares is None else shares.buffer_info()[0],
            )
        for k, d in enumerate(directions):
            if dx is not None:
                self._input(d, x_, dx, grads[k])
            if states_wanted:
                for name, out in zip(p.states, dstates, strict=True):
                    self._initial(d, sequences, name, out[k], grads[k])
            if states_wanted and p.derived:
                self._derived(d, given, fed, dstates, totals[k])
            if wanted.weights:
                known = {p.states[0]: y_.flattened().columns(k * width, width)}
                known |= {name: series[k * others + j] for j, name in enumerate(p.states[1:])}
                before = {n: (known[n], given[j][k] if given else None) for j, n in enumerate(p.states) if n in known}
                self._weights(d, sequences, x_, before, grads[k], kept[k], projected[k], dparameters[k])
                self._own(d, totals[k], dparameters[k][5:])

    def _own(self, d: Direction, totals: dict[str, Any], out: Sequence[Any]) -> None:
        """The gradients of the cell's own tensors: sums over the sequences, and over the units of a scalar."""
        pairs = [(totals[n].at.operand - 1, t.at.operand - 1) for n, t in zip(d.own, out, strict=True)]

        def own(tensors):
            for total, target in pairs:
                torch.sum(tensors[total], list(range(2 - tensors[target].dim())), out=tensors[target])

        if pairs:
            self.then(own)

    def _derived(
        self, d: Direction, states: Sequence[Any], fed: Sequence[Any], dstates: Sequence[Any], totals: dict[str, Any]
    ) -> None:
        """Hand the derived states' gradients before the first step on to what they were made from."""
        k, cell, places = d.index, d.r.cell, {n: t.at.operand - 1 for n, t in d.own.items()}
        fed_at = {n: t.at.operand - 1 for n, t in zip(cell.fed, fed, strict=True)}
        states_at, grads_at = ([t.at.operand - 1 for t in group] for group in (states, dstates))
        totals_at = {n: t.at.operand - 1 for n, t in totals.items()}

        def derived(tensors):
            _derived_gradients(
                d.r,
                [tensors[n][k] for n in states_at],
                {**{n: tensors[at] for n, at in places.items()}, **{n: tensors[at][k] for n, at in fed_at.items()}},
                [tensors[n][k] for n in grads_at],
                {n: tensors[at] if n in places else tensors[at][k] for n, at in totals_at.items()},
            )

        self.then(derived)

    def _input(self, d: Direction, x: Buffer, dx: Buffer, grad: Buffer) -> None:
        """The gradient of the input; added to the other direction's."""
        gates = d.r.programs.start_gates
        weight = d.rows_of(self.script, d.w_ih, gates)
        rows = grad.columns(0, len(gates) * d.hidden).by_time(x.shape[:-1])
        start = None if d.index else zeros(d.inputs * grad.item)
        pack = grad.shape[0] > FEW_ROWS
        options: dict[str, Any] = {"transposed": True, "pack": pack, "threads": d.team, "label": "input gradient"}
        product(self.script, d.r.dtype, rows, weight, dx.by_time(), start, **options)

    def _initial(self, d: Direction, sequences: Sequences, name: str, out: Buffer, grad: Buffer) -> None:
        """A state's gradient before the first step: its direct path's is in `out`, its products' are added."""
        p, h = d.r.programs, d.hidden
        start = None if name in p.carried else zeros(out.shape[-1] * grad.item)
        for run, first, operand in d.r.recurrent:
            if operand != name:
                continue
            if sequences.counts is not None:
                self._initial_packed(d, sequences, out, grad, run, first, start is not None)
            else:
                edge = grad.by_time((sequences.steps, sequences.rows))[sequences.steps - 1 if d.reverse else 0]
                edge = edge.columns(first * h, len(run) * h).by_time()
                weight = d.rows_of(self.script, d.w_hh, run)
                pack = edge.shape[1] > FEW_ROWS
                options: dict[str, Any] = {"transposed": True, "pack": pack, "threads": d.team}
                product(self.script, d.r.dtype, edge, weight, out.by_time(), start, **options)
            start = None
        if start is not None:
            add(self.script, d.r.dtype, out, None)

    def _initial_packed(self, d, sequences, out, grad, run, first, fresh) -> None:
        h, gates = d.hidden, [d.r.gates[g] for g in run]
        number, at, source = out.at.operand - 1, d.index, grad.at.operand - 1
        weights = d.w_hh.at.operand - 1

        def initial(tensors):
            total = tensors[number].select(0, at)
            if fresh:
                total.zero_()
            edge = sequences.edge(tensors[source], last=d.reverse)
            for k, gate in enumerate(gates):
                slot = (first + k) * h
                total.addmm_(edge[:, slot : slot + h], tensors[weights][gate * h : (gate + 1) * h])

        self.then(initial)

    def _weights(
        self,
        d: Direction,
        sequences: Sequences,
        x: Buffer,
        before: dict[str, tuple[Buffer, Buffer | None]],
        grad: Buffer,
        slots: Buffer,
        projected: Any,
        out: Sequence[Any],
    ) -> None:
        """The gradients of a direction's parameters: products over all time steps and sequences.

        before: of every state, its series, [total, width], and the initial rows, if any.
        """
        p, h = d.r.programs, d.hidden
        dw_ih, dw_hh, db_ih, db_hh, dw_hr = out[:5]
        rows, total = sequences.rows, sequences.total
        flat = x.flattened()
        if (
            sequences.counts is not None
            or flat is None
            or total * dw_ih.shape[0] * (d.inputs + d.depth) > LARGE_PRODUCT
        ):
            self._weights_by_torch(d, sequences, x, before, grad, slots, projected, out[:5])
            return
        slot_x, slot_u = p.gradients.x, p.gradients.u
        self._unused_rows(d, dw_ih, slot_x)
        for k, row, count in d.blocks(p.start_gates, slot_x):
            columns = grad.columns(slot_x[p.start_gates[k]] * h, count * h)
            self._outer(d, columns, flat, dw_ih.narrow(0, row * h, count * h))
        if dw_hh is not None:
            self._unused_rows(d, dw_hh, slot_u)
        for run, _, operand in d.r.recurrent:
            for k, row, count in d.blocks(run, slot_u):
                columns = grad.columns(slot_u[run[k]] * h, count * h)
                target = dw_hh.narrow(0, row * h, count * h)
                if isinstance(operand, int):
                    self._outer(d, columns, slots.columns(operand * h, h), target)
                    continue
                series, initial = before[operand]
                now, then = (0, rows) if d.reverse else (rows, 0)
                later = total - rows
                if later:
                    self._outer(d, columns.narrow(0, now, later), series.narrow(0, then, later), target)
                if initial is not None:
                    first = columns.narrow(0, later if d.reverse else 0, rows)
                    self._outer(d, first, initial, target, more=later > 0)
                elif not later:
                    add(self.script, d.r.dtype, target, None)
        if dw_hr is not None:
            self._outer(d, projected, slots.columns(p.gradients.projected * h, h), dw_hr)
        if db_ih is not None:
            width = d.r.used_slots * h
            sums = Buffer.new(self.script.take(width * grad.item), (1, width), grad.item)
            unit = Buffer(ones(total, d.r.dtype), (total, 1), (grad.item, grad.item), grad.item)
            self._outer(d, unit, grad.columns(0, width), sums)
            for whole, slot in ((db_ih, slot_x), (db_hh, slot_u)):
                target = Buffer(whole.at, (1, *whole.shape), (0, *whole.strides), whole.item)
                gates = [g for g in d.r.gates if g in slot]
                for k, row, count in d.blocks(gates, slot):
                    add(
                        self.script,
                        d.r.dtype,
                        target.columns(row * h, count * h),
                        sums.columns(slot[gates[k]] * h, count * h),
                    )
                for row in [n for g, n in d.r.gates.items() if g not in slot]:
                    add(self.script, d.r.dtype, target.columns(row * h, h), None)

    def _unused_rows(self, d: Direction, weight: Buffer, slots: dict[str, int]) -> None:
        """Zeros for the gates that make no use of a weight."""
        for gate, row in d.r.gates.items():
            if gate not in slots:
                add(self.script, d.r.dtype, weight.narrow(0, row * d.hidden, d.hidden), None)

    def _outer(self, d: Direction, a: Buffer, b: Buffer, out: Buffer, more: bool = False) -> None:
        """out = a.T @ b, or `more` of it."""
        start = None if more else zeros(b.shape[1] * b.item)
        options: dict[str, Any] = {
            "transposed": True,
            "pack": False,
            "threads": d.team,
            "label": "weight gradients",
        }
        product(self.script, d.r.dtype, a.turned().by_time(), b, out.by_time(), start, **options)

    def _weights_by_torch(self, d, sequences, x, before, grad, slots, projected, out) -> None:
        """The same by torch's products, which are as fast where they are large."""
        number = [None if t is None else t.at.operand - 1 for t in (x, grad, slots, projected, *out)]
        item, k = d.r.item, d.index
        wanted = {operand for _, _, operand in d.r.recurrent}
        # (tensor, first column, columns, tensor of the initial rows)
        places = {
            name: (t.at.operand - 1, t.at.offset // item, t.shape[1], None if i is None else i.at.operand - 1)
            for name, (t, i) in before.items()
            if name in wanted
        }

        def weights(tensors):
            found: list[Any] = [None if n is None else tensors[n] for n in number]
            x, grad, slots, projected, *out = found
            previous = {}
            for name, (at, column, width, initial) in places.items():
                series = tensors[at].view(sequences.total, -1)[:, column : column + width]
                previous[name] = _previous(series, d, sequences, None if initial is None else tensors[initial][k])
            _parameter_gradients(d, x, previous, grad, slots, projected, out)

        self.then(weights)


_calls: OrderedDict[tuple, Call] = OrderedDict()
KEPT_CALLS = 256
_lock = threading.Lock()


def _prepared(key: tuple | None, make: Callable[[], Call]) -> Any:
    """The call of this key, made now or earlier; the least recently used ones are forgotten."""
    if key is None:
        return make()
    call = _calls.get(key)
    if call is None:
        call = make()
        with _lock:
            _calls[key] = call
            while len(_calls) > KEPT_CALLS:
                _calls.popitem(last=False)
    return call


def forget() -> None:
    """Drop all prepared calls."""
    with _lock:
        _calls.clear()


def _flat(parameters: Sequence[Parameters]) -> list[list[Tensor | None]]:
    """The tensors of each direction in one list, the cell's own at the end."""
    return [[t if t is None else usable(t) for t in (*q[:5], *(q[5] if len(q) > 5 else ()))] for q in parameters]


def _laid_out(tensors: Sequence[Tensor | None]) -> tuple:
    return tuple([None if t is None else (t.shape, t.stride()) for t in tensors])


def prepared(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    training: bool = False,
    inputs: Sequence[Tensor] = (),
    feed: bool = False,
) -> tuple[_Forward, list[Tensor | None]]:
    """The forward call, and the tensors that it is given: x, the states, inputs, and parameters."""
    r = ready(cell, parameters[0][4] is not None, x.dtype, feed)
    x, weights, inputs = usable(x), _flat(parameters), [usable(t) for t in inputs]
    given = _all_states(r, states, weights, inputs, sequences.rows)
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    key = None
    if sequences.counts is None:
        key = r, len(parameters), training, team.size(), given is None, *_laid_out(tensors)
    return _prepared(key, lambda: _Forward(r, x, given, weights, inputs, sequences, training)), tensors


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
    dtype, directions = x.dtype, len(parameters)
    call, tensors = prepared(cell, x, states, parameters, sequences, training, inputs, feed)
    y = torch.empty(call.y, dtype=dtype)
    finals = [torch.empty(s, dtype=dtype) for s in call.finals]
    slots = [torch.empty(call.slots, dtype=dtype) for _ in range(directions if training else 0)]
    series = [torch.empty(call.series, dtype=dtype) for _ in range(directions * call.many)]
    call.run([*tensors, y, *finals, *slots, *series])
    return y, tuple(finals), Saved(slots, series, call.plan)


def backward(
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
) -> tuple[Tensor | None, list[Tensor | None], list[list[Tensor | None]], list[Tensor | None]]:
    """Gradients of x, the states (if wanted), a list for each direction of the parameters (the cell's own at the end),
    and the inputs (if forward was told so).

    overwrite: what forward saved is not needed again. dothers: cotangents of the other states at every step, laid out
    as y.
    """
    dtype, directions = x.dtype, len(parameters)
    each = any([t is not None for t in dothers])
    dothers = [None if t is None else usable(t) for t in dothers] if each else []
    r = ready(cell, parameters[0][4] is not None, dtype, feed, each)
    x, weights, inputs = usable(x), _flat(parameters), [usable(t) for t in inputs]
    given = _all_states(r, states, weights, inputs, sequences.rows)
    y = y.contiguous()  # as it was made; a saved-tensor hook may have returned another
    dy = None if dy is None else usable(dy)
    dfinals = [None if t is None else usable(t) for t in dfinals]
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    tensors += [y, *saved.slots, *saved.series, dy, *dfinals, *dothers]
    key = None
    if sequences.counts is None:
        key = r, directions, saved.plan, team.size(), given is None, wanted, overwrite, *_laid_out(tensors)
    call: _Backward = _prepared(
        key,
        lambda: _Backward(
            r, saved.plan, x, given, y, weights, inputs, sequences, saved, dy, dfinals, dothers, wanted, overwrite, feed
        ),
    )

    def made(shape: tuple[int, ...] | None) -> Tensor | None:
        return None if shape is None else torch.empty(shape, dtype=dtype)

    dx, dstates, dinputs = made(call.dx), [made(s) for s in call.dstates], [made(s) for s in call.dinputs]
    dparameters = [[made(s) for s in q] for q in call.dparameters]
    totals = [made(s) for s in call.totals * directions]
    grads = [] if call.grad is None else [made(call.grad) for _ in range(directions)]
    projected = [made(call.projected) for _ in range(directions)]
    call.run([*tensors, dx, *dstates, *dinputs, *[t for q in dparameters for t in q], *totals, *grads, *projected])
    return dx, dstates[: len(cell.states)], dparameters, dinputs


def derive(r: Ready, states: Sequence[Tensor], own: dict[str, Tensor], fed: dict[str, Tensor]) -> list[Tensor]:
    """The derived states, [N, H] each, before the first step. own, fed: of one direction."""
    p = r.programs
    known: dict[Node, Any] = {leaf("s", n): t for n, t in zip(p.states, states, strict=False)}
    known |= {leaf(kind, n): t for n, t in {**own, **fed}.items() for kind in ("p", "scalar", "input")}

    def value(node: Node) -> Any:
        if node not in known:
            constant = node.op == "constant"
            known[node] = node.value if constant else apply(node.op, *map(value, node.args))
        return known[node]

    return [value(n) for n in p.derived]


def _derived_gradients(
    r: Ready, states: Sequence[Tensor], own: dict[str, Tensor], grads: Sequence[Tensor], totals: dict[str, Tensor]
) -> None:
    """Hand the derived states' gradients before the first step on to what they were made from.

    states, grads: [N, width] of all states, to which is added; own: the cell's own tensors and extra inputs; totals:
    their gradients, [N, H] each, to which is added.
    """
    count = len(r.cell.states)
    with torch.inference_mode(False), torch.enable_grad():  # the former: also within a registered operation
        given = [s.detach().requires_grad_() for s in states[:count]]
        wide = {n: (t.detach().expand(totals[n].shape) if n in totals else t.detach()) for n, t in own.items()}
        wide = {n: t.requires_grad_() for n, t in wide.items()}
        leaves = [*zip(given, grads, strict=False), *((wide[n], t) for n, t in totals.items())]
        derived = derive(r, given, wide, {})
        found = torch.autograd.grad(derived, [t for t, _ in leaves], list(grads[count:]), allow_unused=True)
    for (_, total), grad in zip(leaves, found, strict=True):
        if grad is not None:
            total += grad


def _all_states(
    r: Ready, states: Sequence[Tensor] | None, parameters: Sequence[Sequence[Any]], inputs: Sequence[Tensor], rows: int
) -> list[Tensor] | None:
    """[D, N, width] of each state before the first step, the derived ones among them; None: all zero."""
    if not r.programs.derived:
        return None if states is None else [usable(s) for s in states]
    if states is None:
        w_ih = parameters[0][0]
        hidden = w_ih.shape[0] // len(r.gates)
        states = [w_ih.new_zeros(len(parameters), rows, hidden)] * len(r.cell.states)
    derived = []
    for k, q in enumerate(parameters):
        own = dict(zip(r.cell.own, q[5:], strict=True))
        fed = {n: t[k] for n, t in zip(r.cell.fed, inputs, strict=True)}
        derived.append(derive(r, [s[k] for s in states], own, fed))
    return [usable(t) for t in (*states, *map(torch.stack, zip(*derived, strict=True)))]


def _over_time(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a.T @ b, a large product over all steps and sequences.

    Where b has few columns, torch's product is one long sum for each element, so it is taken in parts.
    """
    if b.shape[1] >= 16 or a.shape[0] < 64:
        torch.mm(a.t(), b, out=out)
        return
    length = max(32, a.shape[0] // 64)
    parts = a.shape[0] // length
    cut = parts * length
    whole = torch.bmm(a[:cut].unflatten(0, (parts, length)).transpose(1, 2), b[:cut].unflatten(0, (parts, length)))
    torch.addmm(whole.sum(0), a[cut:].t(), b[cut:], out=out)


def _previous(flat: Tensor, d: Direction, sequences: Sequences, initial: Tensor | None) -> list[tuple[slice, Tensor]]:
    """The states that entered the recurrent products: (rows of the time steps, [rows, width]) in parts.

    flat: [total, width], the states of all steps.
    """
    if sequences.steps == 1 and initial is None:
        return []
    rows = sequences.rows
    if sequences.counts is not None:
        index, row = sequences.previous(d.reverse)
        values = flat[index]
        first = index < 0
        values[first] = 0 if initial is None else initial[row[first]]
        return [(slice(None), values)]
    parts = [(slice(None, -rows), flat[rows:]) if d.reverse else (slice(rows, None), flat[:-rows])]
    if initial is not None:
        parts.append((slice(-rows, None) if d.reverse else slice(rows), initial))
    return [(at, values) for at, values in parts if values.shape[0]]


def _parameter_gradients(
    d: Direction,
    x: Tensor,
    previous: dict[str, list[tuple[slice, Tensor]]],
    grad: Tensor,
    slots: Tensor,
    projected: Tensor,
    out: Sequence[Tensor],
) -> None:
    """In the order of the parameters, into `out`: large products over all steps and sequences."""
    p, h = d.r.programs, d.hidden
    dw_ih, dw_hh, db_ih, db_hh, dw_hr = out
    every = slice(None)

    def fill(target: Tensor, gates: Sequence[str], slot: dict[str, int], operand: list[tuple[slice, Tensor]]) -> None:
        for k, row, count in d.blocks(gates, slot):
            rows = target[row * h : (row + count) * h]
            columns = grad[:, slot[gates[k]] * h : (slot[gates[k]] + count) * h]
            if not operand:
                rows.zero_()
                continue
            (at, values), *more = operand
            _over_time(columns[at], values, rows)
            for at, values in more:
                rows.addmm_(columns[at].t(), values)

    for target, slot in ((dw_ih, p.gradients.x), (dw_hh, p.gradients.u)):
        for gate, row in d.r.gates.items():
            if gate not in slot and target is not None:
                target[row * h : (row + 1) * h] = 0
    fill(dw_ih, p.start_gates, p.gradients.x, [(every, x.reshape(-1, x.shape[-1]))])
    for run, _, operand in d.r.recurrent:
        if isinstance(operand, str):
            fill(dw_hh, run, p.gradients.u, previous[operand])
        else:
            fill(dw_hh, run, p.gradients.u, [(every, slots[:, operand * h : (operand + 1) * h])])
    if dw_hr is not None:
        assert p.gradients.projected is not None
        torch.mm(projected.t(), slots[:, p.gradients.projected * h : (p.gradients.projected + 1) * h], out=dw_hr)
    if db_ih is not None:
        sums = grad[:, : d.r.used_slots * h].sum(0)
        for target, slot in ((db_ih, p.gradients.x), (db_hh, p.gradients.u)):
            for gate, row in d.r.gates.items():
                at = slot.get(gate)
                target[row * h : (row + 1) * h] = 0 if at is None else sums[at * h : (at + 1) * h]
