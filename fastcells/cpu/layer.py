"""One layer, all its directions, on the CPU engine: buffers, time loops and the large products around them."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
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
from .engine import Runner, Times, View, arena, product, zeros

Parameters = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]

SMALL_PRODUCT = 1 << 16  # multiplications, below which torch's product costs less than a kernel's preparation


class Ready:
    """A cell with its programs and their runners for one number format."""

    def __init__(self, cell: Cell, project: bool, dtype: torch.dtype, feed: bool) -> None:
        self.cell = cell
        self.programs: Programs = build(cell, project, feed)
        self.forward = Runner(self.programs.forward, dtype)
        self.backward = Runner(self.programs.backward, dtype)
        self.gates = {g: k for k, g in enumerate(cell.gates)}  # the order of the weights' rows
        self._spans: dict[tuple[str, ...], slice | None] = {}
        p, g = self.programs, self.programs.gradients
        # Blocks of adjacent slots, one product each: (gates, first slot, slot of the operand or name of the state).
        self.recurrent = [
            (run, g.u[run[0]], operand)
            for operand in dict.fromkeys(g.operands.values())
            for run in runs([u for u, o in g.operands.items() if o == operand], g.u)
        ]
        # Gates whose projection starts from both biases, in runs: (gates, first slot).
        self.both_biases = [(run, g.x[run[0]]) for run in runs([n for n in p.start_gates if n in p.shared], g.x)]
        self.used_slots = max([*g.x.values(), *g.u.values()]) + 1
        # Slot of each gate's bias gradient, None where the gates' slots are 0, 1, 2...
        natural = {n: k for k, n in enumerate(cell.gates)}
        self.bias_slots = [None if slots == natural else slots for slots in (g.x, g.u)]

    def span(self, gates: tuple[str, ...]) -> slice | None:
        """The gates' blocks of rows, if they follow each other."""
        if gates not in self._spans:
            first = self.gates[gates[0]]
            adjacent = [self.gates[g] for g in gates] == list(range(first, first + len(gates)))
            self._spans[gates] = slice(first, first + len(gates)) if adjacent else None
        return self._spans[gates]


@lru_cache(maxsize=256)
def ready(cell: Cell, project: bool, dtype: torch.dtype, feed: bool = False) -> Ready:
    """The same object for the same cell; nothing is compiled before a kernel first runs. feed: see `program.build`."""
    return Ready(cell, project, dtype, feed)


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

    def shares(self, threads: int) -> list[int] | None:
        """Rows at which threads' shares begin, so that each has as many time steps to do; None for even shares."""
        if self.counts is None or threads == 1:
            return None
        done = self.lengths.cumsum(0)
        goals = torch.arange(1, threads) * (self.total / threads)
        return [0, *torch.searchsorted(done, goals).add(1).clamp(max=self.rows).tolist(), self.rows]


def view(t: Tensor, sequences: Sequences, column: int = 0, initial: Tensor | int = 0) -> View:
    """[T, N, width] or [total, width] from a column on; initial: [N, width], or the address of one zero row."""
    item = t.element_size()
    strides = t.stride()
    if len(strides) == 3:
        step, row = strides[:2]
    else:
        step = row = strides[0]
        if sequences.counts is None:
            step *= sequences.rows
    return View(t.data_ptr() + column * item, step * item, row * item, *_rows(initial))


def fixed(t: Tensor, initial: Tensor | int = 0) -> View:
    """[N, width], the same at all steps; initial: as for `view`."""
    return View(t.data_ptr(), 0, t.stride(0) * t.element_size(), *_rows(initial))


def _rows(initial: Tensor | int) -> tuple[int, int]:
    """Address, and bytes from row to row, of [N, width] or of one zero row given by its address."""
    if isinstance(initial, int):
        return initial, 0
    return initial.data_ptr(), initial.stride(0) * initial.element_size()


def by_time(t: Tensor) -> Tensor:
    """[T, N, width], or packed rows as one step."""
    return t if t.dim() == 3 else t.unsqueeze(0)


def usable(t: Tensor) -> Tensor:
    """The tensor itself if the numbers of a row are adjacent, else a copy."""
    return t if t.dim() == 0 or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@dataclass
class Saved:
    """What forward leaves to backward, tensors for each direction."""

    slots: list[Tensor]  # [total, slots * H]
    series: list[Tensor]  # [total, H], of each state but the hidden one
    plans: list[Plan]


class Direction:
    """One direction of a layer: its weights as the programs want them."""

    def __init__(self, r: Ready, parameters: Parameters, inputs: Sequence[Tensor], k: int) -> None:
        self.r, self.reverse = r, bool(k)
        w_ih, w_hh, self.b_ih, self.b_hh, w_hr, own = parameters
        self.w_ih = usable(w_ih)
        self.w_hh = None if w_hh is None else usable(w_hh)
        self.w_hr = None if w_hr is None else usable(w_hr)
        self.hidden = w_ih.shape[0] // len(r.gates)
        self.depth = self.hidden if w_hr is None else w_hr.shape[0]
        self.own = dict(zip(r.cell.own, map(usable, own), strict=True))
        self.fed = {name: usable(t[k]) for name, t in zip(r.cell.fed, inputs, strict=True)}

    def own_views(self, sequences: Sequences) -> dict[str, View]:
        """Of the cell's own tensors, and of its extra inputs."""
        steps = self.r.cell.step_inputs
        return {
            **{"own." + n: View(t.data_ptr()) for n, t in self.own.items()},
            **{"own." + n: view(t, sequences) if n in steps else fixed(t) for n, t in self.fed.items()},
        }

    def derive(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The derived states, [N, H] each, before the first step."""
        p = self.r.programs
        known = {leaf("s", n): t for n, t in zip(p.states, states, strict=False)}
        known |= {leaf(kind, n): t for n, t in {**self.own, **self.fed}.items() for kind in ("p", "scalar", "input")}

        def value(node: Node) -> Any:
            if node not in known:
                constant = node.op == "constant"
                known[node] = node.value if constant else apply(node.op, *map(value, node.args))
            return known[node]

        return [value(n) for n in p.derived]

    def rows_of(self, weight: Tensor, gates: tuple[str, ...]) -> Tensor:
        """The gates' rows of a weight or bias, without a copy where they follow each other."""
        span, h = self.r.span(gates), self.hidden
        if span is None:
            return torch.cat([weight[k * h : (k + 1) * h] for k in (self.r.gates[g] for g in gates)])
        if len(gates) == len(self.r.gates):
            return weight
        return weight[span.start * h : span.stop * h]

    def biases(self) -> tuple[int, int]:
        """Addresses of what the input projections, and the recurrent products with a bias of their own, start from."""
        p, h = self.r.programs, self.hidden
        if self.b_ih is None or self.b_hh is None:
            zero = zeros(max(len(p.start_gates), len(p.bias_gates)) * h * self.w_ih.element_size())
            return zero, zero
        start = self.rows_of(self.b_ih, p.start_gates)
        if len(p.shared) == len(p.start_gates):
            start = torch.add(start, self.rows_of(self.b_hh, p.start_gates))
        else:
            start = start.clone()
            for run, first in self.r.both_biases:
                start[first * h : (first + len(run)) * h] += self.rows_of(self.b_hh, run)
        own = self.rows_of(self.b_hh, p.bias_gates).contiguous() if p.bias_gates else start
        self._alive = start, own
        return start.data_ptr(), own.data_ptr()

    def segments(self, run: Runner, threads: int, unused: Container[str] = ()) -> list[list[tuple[int, int]]]:
        """(depth, address of the panel) of every segment of every stage; nothing is packed for those `unused`.

        unused: "x" where the input is projected ahead; "before" where the only step is every sequence's first.
        """
        found = []
        for k, stage in enumerate(run.program.stages):
            row = []
            for segment in stage.segments:
                if segment.rows.buffer in unused:
                    row.append((0, 0))
                elif segment.rows.when in unused:
                    row.append((self.depth_of(segment.weights), 0))
                else:
                    row.append(self.pack(run, k, segment.weights, self.units(stage.size), threads))
            found.append(row)
        return found

    def depth_of(self, weights: Weights) -> int:
        if weights.matrix == "hr":
            return self.depth if weights.transposed else self.hidden
        if weights.transposed:
            return len(weights.gates) * self.hidden
        return self.w_ih.shape[1] if weights.matrix == "ih" else self.depth

    def pack(self, run: Runner, stage: int, weights: Weights, units: int, threads: int) -> tuple[int, int]:
        """(depth, address of the panel)"""
        depth = self.depth_of(weights)
        weight = {"ih": self.w_ih, "hh": self.w_hh, "hr": self.w_hr}[weights.matrix]
        assert weight is not None, "a product has weights"
        offsets = [0] if weights.matrix == "hr" else [self.r.gates[g] * self.hidden for g in weights.gates]
        if weights.transposed:
            rows = weight if weights.matrix == "hr" else self.rows_of(weight, weights.gates)
            return depth, run.panel(rows, stage, True, [0], units, depth, threads)
        return depth, run.panel(weight, stage, False, offsets, units, depth, threads)

    def units(self, size: str) -> int:
        return self.depth if size == "P" else self.hidden

    def plan(self, sequences: Sequences) -> Plan:
        return planned(self.r.cell, (self.w_ih, self.w_hh), sequences)


def planned(cell: Cell, weights: Sequence[Tensor | None], sequences: Sequences) -> Plan:
    """The schedule that a direction with these weights (weight_ih, weight_hh) takes now."""
    w_ih, w_hh = weights[:2]
    assert w_ih is not None
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
        )
    )


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
    arena.reset()
    x, dtype = usable(x), x.dtype
    r = ready(cell, parameters[0][4] is not None, dtype, feed)
    p = r.programs
    in_place = not training and len(p.forward.stages) == 1  # a unit's state is read and then written by the same tile
    directions = [Direction(r, q, inputs, k) for k, q in enumerate(parameters)]
    count, rows, total = len(directions), sequences.rows, sequences.total
    width, hidden = directions[0].depth, directions[0].hidden
    states = _all_states(directions, states, rows)
    y = torch.empty((*x.shape[:-1], count * width), dtype=dtype)
    finals = tuple([torch.empty((count, rows, hidden if j else width), dtype=dtype) for j in range(len(p.states))])
    nothing = zeros(max(width, hidden) * r.forward.item)
    saved = Saved([], [], [])
    for k, d in enumerate(directions):
        schedule = d.plan(sequences)
        threads = schedule.threads
        start, own = d.biases()
        initial = _initial(states, k, len(p.states), nothing)
        views = {"s." + p.states[0]: view(y, sequences, k * width, initial[0]), "bias": View(own)}
        views |= d.own_views(sequences)
        series: list[Tensor | None] = []
        for j, name in enumerate(p.states[1:], 1):
            if in_place and name not in p.streams:
                series.append(None)
                views["s." + name] = fixed(finals[j][k], initial[j])
            else:
                made = torch.empty((total, hidden), dtype=dtype)
                series.append(made)
                views["s." + name] = view(made, sequences, 0, initial[j])
        if in_place:
            slots, views["saved"] = y, View(0)
        elif training:
            slots = torch.empty((total, p.slots * hidden), dtype=dtype)
            views["saved"] = view(slots, sequences)
        else:  # a later stage reads here what an earlier one left, at the same step
            slots = torch.empty((rows, p.slots * hidden), dtype=dtype)
            views["saved"] = fixed(slots)
        if schedule.project_ahead:
            units = len(p.start_gates) * hidden
            ahead = slots if training else torch.empty((total, units), dtype=dtype)
            shaped = ahead if x.dim() == 2 else ahead.view(*x.shape[:2], -1)
            product(
                by_time(x),
                d.rows_of(d.w_ih, p.start_gates),
                by_time(shaped)[..., :units],
                start,
                threads=team.size(),
            )
            views["start"], views["x"] = view(ahead, sequences), View(0)
        else:
            views["start"], views["x"] = View(start), view(x, sequences)
        unused = ("x" if schedule.project_ahead else "", "before" if states is None and sequences.steps == 1 else "")
        r.forward.run(
            sequences.times(descending=d.reverse),
            views,
            d.segments(r.forward, threads, unused),
            [d.units(s.size) for s in p.forward.stages],
            slot=hidden,
            skip_first=states is None,
            training=training,
            threads=threads,
            split=schedule.split,
            row_block=schedule.row_block,
            shares=sequences.shares(threads),
        )
        for j, t in ((j, t) for j, t in enumerate([y, *series]) if t is not None):
            final = sequences.edge(t, last=not d.reverse)
            finals[j].select(0, k).copy_(final if j or count == 1 else final[:, k * width : (k + 1) * width])
        saved.slots.append(slots)
        saved.series += [t for t in series if t is not None]
        saved.plans.append(schedule)
    return y, finals[: len(cell.states)], saved


def _all_states(
    directions: Sequence[Direction], states: Sequence[Tensor] | None, rows: int
) -> tuple[Tensor, ...] | None:
    """[D, N, width] of each state before the first step, the derived ones among them; None: all zero."""
    first = directions[0]
    count = len(first.r.cell.states)
    if not first.r.programs.derived:
        return None if states is None else tuple(usable(s) for s in states)
    if states is None:
        states = [first.w_ih.new_zeros(len(directions), rows, first.hidden)] * count
    derived = zip(*(d.derive([s[k] for s in states]) for k, d in enumerate(directions)), strict=True)
    return (*map(usable, states), *map(torch.stack, derived))


def _initial(states: tuple[Tensor, ...] | None, k: int, count: int, nothing: int) -> Sequence[Tensor | int]:
    """[N, width] of each state for a direction, or the address of a zero row."""
    return [nothing] * count if states is None else [s[k] for s in states]


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    states: bool
    weights: bool


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
) -> tuple[Tensor | None, list[Tensor | None], list[list[Tensor | None]], list[Tensor | None]]:
    """Gradients of x, the states (if wanted), a list for each direction of the parameters (the cell's own at the end),
    and the inputs (if forward was told so).

    overwrite: what forward saved is not needed again.
    """
    arena.reset()
    x, dtype = usable(x), x.dtype
    y = y.contiguous()  # as it was made; a saved-tensor hook may have returned another
    r = ready(cell, parameters[0][4] is not None, dtype, feed)
    p, item = r.programs, r.backward.item
    directions = [Direction(r, q, inputs, k) for k, q in enumerate(parameters)]
    count, rows, total = len(directions), sequences.rows, sequences.total
    width, hidden = directions[0].depth, directions[0].hidden
    states = _all_states(directions, states, rows)
    dfinals = [*dfinals, *[None] * len(p.derived)]
    dy = None if dy is None else usable(dy)
    dfinals = [None if t is None else usable(t) for t in dfinals]
    dx = None
    wanted = wanted._replace(states=wanted.states or bool(p.derived and (wanted.weights or feed)))
    dstates = [
        torch.empty((count, rows, hidden if j else width), dtype=dtype) if wanted.states or given is not None else None
        for j, given in enumerate(dfinals)
    ]
    dinputs = [torch.zeros_like(t, memory_format=torch.contiguous_format) if feed else None for t in inputs]
    dparameters: list[list[Tensor | None]] = []
    nothing = zeros(max(width, hidden) * item)
    others, g = len(p.states) - 1, p.gradients
    for k, d in enumerate(directions):
        schedule = saved.plans[k]
        threads = schedule.threads
        slots = saved.slots[k]
        grad = slots if overwrite else torch.empty_like(slots)
        initial = _initial(states, k, len(p.states), nothing)
        views = {
            "dy": View(nothing) if dy is None else view(dy, sequences, k * width),
            "saved": view(slots, sequences),
            "grad": view(grad, sequences),
            "s." + p.states[0]: view(y, sequences, k * width, initial[0]),
            "cross": View(arena.take(p.cross * rows * hidden * item), 0, p.cross * hidden * item),
            **d.own_views(sequences),
        }
        totals = {n: torch.zeros((rows, hidden), dtype=dtype) for n in cell.own}
        totals |= {n: t[k] for n, t in zip(cell.fed, dinputs, strict=True) if t is not None}
        steps = cell.step_inputs
        views |= {"total." + n: view(t, sequences) if n in steps else fixed(t) for n, t in totals.items()}
        for j, name in enumerate(p.states):
            given = dfinals[j]
            if j > 0:
                views["s." + name] = view(saved.series[k * others + j - 1], sequences, 0, initial[j])
            if j >= len(cell.states):
                continue
            if j > 0 or name in p.carried:
                total_carry = dstates[j]
                if total_carry is None:  # nobody asks for the state's gradient, at either end
                    size = (hidden if j else width) * item
                    views["carry." + name] = View(arena.zeros(rows * size), 0, size)
                else:
                    carry = total_carry[k]
                    _ = carry.zero_() if given is None else carry.copy_(given[k])
                    views["carry." + name] = fixed(carry)
            elif given is None:
                views["carry." + name] = View(nothing, 0, 0, nothing, 0)
            else:
                views["carry." + name] = View(nothing, 0, 0, given[k].data_ptr(), given.stride(1) * item)
        projected = y
        if d.w_hr is not None:
            projected = torch.empty((total, width), dtype=dtype)
            views["projected"] = view(projected, sequences)
        r.backward.run(
            sequences.times(descending=not d.reverse),
            views,
            d.segments(r.backward, threads, ("before",) if sequences.steps == 1 else ()),
            [d.units(s.size) for s in p.backward.stages],
            slot=hidden,
            skip_first=True,
            threads=threads,
            split=schedule.split,
            row_block=schedule.row_block,
            shares=sequences.shares(threads),
        )
        if wanted.x:
            dx = _input_gradient(d, x.shape, dx, grad[:, : len(p.start_gates) * hidden])
        if wanted.states:
            _initial_gradients(d, [None if t is None else t[k] for t in dstates], sequences.edge(grad, last=d.reverse))
        if p.derived and wanted.states:
            assert states is not None
            _derived_gradients(d, [s[k] for s in states], [None if t is None else t[k] for t in dstates], totals)
        if wanted.weights:
            previous = {}
            for j, name in enumerate(p.states):
                if name in g.operands.values():
                    series = saved.series[k * others + j - 1] if j else y
                    begins = None if states is None else states[j][k]
                    previous[name] = _previous(series, 0 if j else k * width, d, sequences, begins)
            own = [totals[n].sum() if n in cell.scalars else totals[n].sum(0) for n in cell.own]
            dparameters.append([*_parameter_gradients(d, x, previous, grad, slots, projected), *own])
        else:
            dparameters.append([None] * (5 + len(cell.own)))
    return dx, dstates[: len(cell.states)], dparameters, dinputs


def _input_gradient(d: Direction, shape: torch.Size, dx: Tensor | None, grad: Tensor) -> Tensor:
    """Of the input, from that of its projections, [total, gates * H]; added to the other direction's, if given."""
    weight, inputs = d.rows_of(d.w_ih, d.r.programs.start_gates), shape[-1]
    if grad.numel() * inputs < SMALL_PRODUCT:
        return torch.mm(grad, weight).view(shape) if dx is None else dx.add_(torch.mm(grad, weight).view(shape))
    start = None
    if dx is None:
        dx, start = torch.empty(shape, dtype=grad.dtype), zeros(inputs * grad.element_size())
    steps = by_time(grad if len(shape) == 2 else grad.unflatten(0, shape[:2]))
    product(steps, weight, by_time(dx), start, transposed=True, threads=team.size())
    return dx


def _over_time(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b, a large product over all steps and sequences.

    Where b has few columns, torch's product is one long sum for each element, so it is taken in parts.
    """
    if b.shape[1] >= 16 or a.shape[0] < 64:
        return a.t() @ b
    length = max(32, a.shape[0] // 64)
    parts = a.shape[0] // length
    cut = parts * length
    whole = torch.bmm(a[:cut].unflatten(0, (parts, length)).transpose(1, 2), b[:cut].unflatten(0, (parts, length)))
    return whole.sum(0).addmm_(a[cut:].t(), b[cut:])


def _initial_gradients(d: Direction, out: Sequence[Tensor | None], grad: Tensor) -> None:
    """The states' gradients before the first step: their direct paths' are in `out`, their products' are added.

    out: [N, width] each; grad: [N, slots * H], of the first step.
    """
    p, h = d.r.programs, d.hidden
    for name, total in zip(p.states, out, strict=True):
        if total is None:
            continue
        if name not in p.carried:
            total.zero_()
        for run, first, operand in d.r.recurrent:
            if operand == name:
                assert d.w_hh is not None
                total.addmm_(grad[:, first * h : (first + len(run)) * h], d.rows_of(d.w_hh, run))


def _derived_gradients(
    d: Direction, states: Sequence[Tensor], grads: Sequence[Tensor | None], totals: dict[str, Tensor]
) -> None:
    """Hand the derived states' gradients before the first step on to what they were made from.

    states, grads: [N, width] of all states, to which is added; totals: the same of the cell's own tensors.
    """
    count = len(d.r.cell.states)
    again = copy.copy(d)
    with torch.enable_grad():
        given = [s.detach().requires_grad_() for s in states[:count]]
        again.own = {n: t.detach().expand(totals[n].shape).requires_grad_() for n, t in d.own.items()}
        again.fed = {n: t.detach().requires_grad_() for n, t in d.fed.items()}
        leaves = [(t, g) for t, g in zip(given, grads, strict=False) if g is not None]
        leaves += [(t, totals[n]) for n, t in {**again.own, **again.fed}.items() if n in totals]
        found = torch.autograd.grad(again.derive(given), [t for t, _ in leaves], list(grads[count:]), allow_unused=True)
    for (_, total), grad in zip(leaves, found, strict=True):
        if grad is not None:
            total += grad


def _previous(
    y: Tensor, column: int, d: Direction, sequences: Sequences, initial: Tensor | None
) -> list[tuple[slice, Tensor]]:
    """The hidden states that entered the recurrent products: (rows of the time steps, [rows, width]) in parts."""
    if sequences.steps == 1 and initial is None:
        return []
    flat = y.view(sequences.total, -1)[:, column : column + d.depth]
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
) -> list[Tensor | None]:
    """In the order of the parameters: large products over all steps and sequences."""
    p, h = d.r.programs, d.hidden
    g = p.gradients
    every = slice(None)

    def block(gates: Sequence[str], first: int, operand: list[tuple[slice, Tensor]]) -> Tensor:
        """Gradient of the rows of gates whose slots follow each other from `first` on."""
        columns = grad[:, first * h : (first + len(gates)) * h]
        if not operand:
            return columns.new_zeros(len(gates) * h, d.depth)
        (at, values), *more = operand
        total = _over_time(columns[at], values)
        for at, values in more:
            total.addmm_(columns[at].t(), values)
        return total

    def assemble(like: Tensor, blocks: list[tuple[tuple[str, ...], int, list[tuple[slice, Tensor]]]]) -> Tensor:
        if blocks and blocks[0][0] == d.r.cell.gates:
            return block(*blocks[0])
        whole = like.new_zeros(like.shape)
        for gates, first, operand in blocks:
            part = block(gates, first, operand)
            for j, gate in enumerate(gates):
                at = d.r.gates[gate] * h
                whole[at : at + h] = part[j * h : (j + 1) * h]
        return whole

    dw_ih = assemble(d.w_ih, [(p.start_gates, 0, [(every, x.reshape(-1, x.shape[-1]))])])
    dw_hh = None
    if d.w_hh is not None:
        dw_hh = assemble(
            d.w_hh,
            [
                (
                    run,
                    first,
                    previous[operand]
                    if isinstance(operand, str)
                    else [(every, slots[:, operand * h : (operand + 1) * h])],
                )
                for run, first, operand in d.r.recurrent
            ],
        )
    dw_hr = None
    if d.w_hr is not None:
        assert g.projected is not None
        dw_hr = projected.t() @ slots[:, g.projected * h : (g.projected + 1) * h]
    db_ih = db_hh = None
    if d.b_ih is not None:
        sums = grad[:, : d.r.used_slots * h].sum(0)

        def pick(slot: dict[str, int] | None) -> Tensor:
            if slot is None:
                return sums[: len(d.r.gates) * h]
            rows = [sums[slot[n] * h : (slot[n] + 1) * h] if n in slot else sums.new_zeros(h) for n in d.r.gates]
            return torch.cat(rows)

        db_ih, db_hh = pick(d.r.bias_slots[0]), pick(d.r.bias_slots[1]).clone()
    return [dw_ih, dw_hh, db_ih, db_hh, dw_hr]
