"""One layer, all its directions, on the CPU engine: buffers, time loops and the large products around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..cell import Cell
from ..plan import Plan, Shape, plan
from ..program import Programs, Weights, build, runs
from . import team
from .engine import Runner, Times, View, product

Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Ready:
    """A cell with its programs and their runners for one number format."""

    def __init__(self, cell: Cell, project: bool, dtype: torch.dtype) -> None:
        self.cell = cell
        self.programs: Programs = build(cell, project)
        self.forward = Runner(self.programs.forward, dtype)
        self.backward = Runner(self.programs.backward, dtype)
        self.gates = {g: k for k, g in enumerate(cell.gates)}  # the order of the weights' rows


@lru_cache(maxsize=256)
def ready(cell: Cell, project: bool, dtype: torch.dtype) -> Ready:
    """The same object for the same cell; nothing is compiled before a kernel first runs."""
    return Ready(cell, project, dtype)


@dataclass(frozen=True)
class Sequences:
    """How time steps and sequences are laid out: padded [T, N], or packed [total] with the number of rows of each step."""

    steps: int
    rows: int
    total: int
    counts: Tensor | None = None

    @staticmethod
    def of(x: Tensor, batch_sizes: Tensor | None) -> Sequences:
        if batch_sizes is None:
            return Sequences(x.shape[0], x.shape[1], x.shape[0] * x.shape[1])
        return Sequences(len(batch_sizes), int(batch_sizes[0]), x.shape[0], batch_sizes.contiguous())

    @cached_property
    def offsets(self) -> Tensor:
        """Row at which each step begins (packed)."""
        return self.counts.cumsum(0) - self.counts  # type: ignore[union-attr]

    @cached_property
    def lengths(self) -> Tensor:
        """Of the sequences, longest first (packed)."""
        ascending = self.counts.flip(0)  # type: ignore[union-attr]
        return self.steps - torch.searchsorted(ascending, torch.arange(self.rows), right=True)

    def times(self, descending: bool, reverse: bool) -> Times:
        """Steps from the first to the last or `descending`; `reverse`: the direction whose initial rows are at the end."""
        if self.counts is None:
            initial = self.steps if reverse else -1
            return Times(self.steps, self.rows, initial, self.steps - 1 if descending else 0, -1 if descending else 1)
        order = (lambda t: t.flip(0)) if descending else (lambda t: t)
        return Times(
            self.steps, self.rows, self.total, positions=order(self.offsets), counts=order(self.counts)
        )

    def edge(self, last: bool) -> Tensor | None:
        """Rows of the sequences' last or first steps in packed order; None for padded ones."""
        rows = torch.arange(self.rows)
        return self.offsets[self.lengths - 1] + rows if last else rows

    def shares(self, threads: int) -> list[int] | None:
        """Rows at which threads' shares begin, so that each has as many time steps to do; None for even shares."""
        if self.counts is None or threads == 1:
            return None
        done = self.lengths.cumsum(0)
        goals = torch.arange(1, threads) * (self.total / threads)
        return [0, *torch.searchsorted(done, goals).add(1).clamp(max=self.rows).tolist(), self.rows]


class Series:
    """A vector of `width` for every step and sequence, with room for the initial rows of both directions."""

    def __init__(self, like: Tensor, sequences: Sequences, width: int, storage: Tensor | None = None) -> None:
        self.sequences, self.width = sequences, width
        shape = (
            (sequences.steps + 2, sequences.rows, width)
            if sequences.counts is None
            else (sequences.total + sequences.rows, width)
        )
        self.tensor = like.new_empty(shape) if storage is None else storage.view(shape)

    @property
    def padded(self) -> bool:
        return self.sequences.counts is None

    def initial(self, reverse: bool) -> Tensor:
        if self.padded:
            return self.tensor[-1 if reverse else 0]
        return self.tensor[self.sequences.total :]

    @property
    def body(self) -> Tensor:
        return self.tensor[1:-1] if self.padded else self.tensor[: self.sequences.total]

    def view(self, column: int = 0) -> View:
        return view(self.body, column)

    def previous(self, reverse: bool) -> Tensor:
        """[total, width]: for every row that of the step before it in its direction, initial rows included."""
        s = self.sequences
        if self.padded:
            return (self.tensor[2:] if reverse else self.tensor[:-2]).view(s.total, self.width)
        row = torch.arange(s.total) - s.offsets.repeat_interleave(s.counts)
        step = torch.arange(s.steps).repeat_interleave(s.counts)
        if reverse:
            following = (step + 1).clamp(max=s.steps - 1)
            inside = (step + 1 < s.steps) & (row < s.counts[following])  # type: ignore[index]
            index = torch.where(inside, s.offsets[following] + row, s.total + row)
        else:
            index = torch.where(step > 0, s.offsets[(step - 1).clamp(min=0)] + row, s.total + row)
        return self.tensor[index]

    def final(self, reverse: bool) -> Tensor:
        """[N, width]: the rows of the last step of every sequence in this direction."""
        if self.padded:
            return self.body[0 if reverse else -1]
        return self.body[self.sequences.edge(last=not reverse)]


def view(t: Tensor, column: int = 0) -> View:
    """A tensor [T, N, width] or [rows, width] as a frame sees it, from a column on."""
    item = t.element_size()
    address = t.data_ptr() + column * item
    if t.dim() == 2:
        return View(address, t.stride(0) * item, t.stride(0) * item)
    return View(address, t.stride(0) * item, t.stride(1) * item)


def fixed(t: Tensor) -> View:
    """A tensor [N, width], the same at all steps."""
    return View(t.data_ptr(), 0, t.stride(0) * t.element_size())


def constant(t: Tensor) -> View:
    """A tensor [width], the same at all steps and rows."""
    return View(t.data_ptr())


def by_time(t: Tensor) -> Tensor:
    """[T, N, width], or packed rows as one step."""
    return t if t.dim() == 3 else t.unsqueeze(0)


def usable(t: Tensor) -> Tensor:
    """The tensor itself if the numbers of a row are adjacent, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@dataclass
class Saved:
    """What forward leaves to backward, a tensor of each kind a direction."""

    slots: list[Tensor]  # [total, slots * H]
    series: list[Tensor]  # of the states other than the hidden one


class Direction:
    """One direction of a layer: its weights as the programs want them."""

    def __init__(self, r: Ready, parameters: Parameters, reverse: bool) -> None:
        self.r, self.reverse = r, reverse
        self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr = parameters
        self.w_ih, self.w_hh = usable(self.w_ih), usable(self.w_hh)
        self.w_hr = None if self.w_hr is None else usable(self.w_hr)
        self.hidden = self.w_ih.shape[0] // len(r.gates)
        self.depth = self.w_hh.shape[1]

    def rows_of(self, weight: Tensor, gates: Sequence[str]) -> Tensor:
        """The gates' rows of a weight or bias, without a copy where they follow each other."""
        index = [self.r.gates[g] for g in gates]
        h = self.hidden
        if index == list(range(index[0], index[0] + len(index))):
            return weight[index[0] * h : (index[-1] + 1) * h]
        return torch.cat([weight[k * h : (k + 1) * h] for k in index])

    def biases(self) -> tuple[Tensor, Tensor]:
        """Where the input projections, and the recurrent products with a bias of their own, start from."""
        p, zero = self.r.programs, self.w_ih.new_zeros
        start = zero(len(p.start_gates) * self.hidden)
        own = zero(max(1, len(p.bias_gates)) * self.hidden)
        if self.b_ih is not None and self.b_hh is not None:
            start = self.rows_of(self.b_ih, p.start_gates)
            shared = [g for g in p.start_gates if g in p.shared]
            if len(shared) == len(p.start_gates):
                start = start + self.rows_of(self.b_hh, p.start_gates)
            else:
                start = start.clone()
                for g in shared:
                    k = p.start_gates.index(g) * self.hidden
                    start[k : k + self.hidden] += self.rows_of(self.b_hh, [g])
            if p.bias_gates:
                own = self.rows_of(self.b_hh, p.bias_gates).contiguous()
        return start.contiguous(), own

    def segments(self, run: Runner, with_input: bool) -> list[list[tuple[int, Tensor]]]:
        """(depth, panel) of every segment of every stage."""
        result = []
        for k, stage in enumerate(run.program.stages):
            units = self.units(stage.size)
            row = []
            for segment in stage.segments:
                weights = segment.weights
                if weights.matrix == "ih" and not with_input:
                    row.append((0, self.w_ih))
                    continue
                row.append(self.pack(run, k, weights, units))
            result.append(row)
        return result

    def pack(self, run: Runner, stage: int, weights: Weights, units: int) -> tuple[int, Tensor]:
        if weights.matrix == "hr":
            assert self.w_hr is not None
            weight, offsets = self.w_hr, [0]
        else:
            weight = self.w_ih if weights.matrix == "ih" else self.w_hh
            offsets = [self.r.gates[g] * self.hidden for g in weights.gates]
        if weights.transposed:
            rows = weight if weights.matrix == "hr" else self.rows_of(weight, weights.gates)
            return rows.shape[0], run.panel(rows, stage, True, [0], units, rows.shape[0])
        return weight.shape[1], run.panel(weight, stage, False, offsets, units, weight.shape[1])

    def units(self, size: str) -> int:
        return self.depth if size == "P" else self.hidden

    def plan(self, sequences: Sequences) -> Plan:
        return planned(self.r.cell, (self.w_ih, self.w_hh), sequences)


def planned(cell: Cell, weights: Sequence[Tensor], sequences: Sequences) -> Plan:
    """The schedule that a direction with these weights (weight_ih, weight_hh) takes now."""
    w_ih, w_hh = weights[:2]
    return plan(
        Shape(
            steps=sequences.steps,
            rows=sequences.rows,
            total=sequences.total,
            inputs=w_ih.shape[1],
            hidden=w_ih.shape[0] // len(cell.gates),
            depth=w_hh.shape[1],
            gates=len(cell.gates),
            item=w_ih.element_size(),
            threads=team.size(),
        )
    )


def forward(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...] | None, parameters: Sequence[Parameters], sequences: Sequences,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...], Saved]:  # fmt: skip
    """(y, final states, what backward needs). Shapes as `functional.layer`; nothing is saved unless training."""
    x = usable(x)
    project = parameters[0][4] is not None
    r = ready(cell, project, x.dtype)
    p = r.programs
    single_stage = len(p.forward.stages) == 1
    directions = [Direction(r, q, bool(k)) for k, q in enumerate(parameters)]
    width, rows = directions[0].depth, sequences.rows
    hidden = directions[0].hidden
    hs = Series(x, sequences, len(directions) * width)
    finals = [x.new_empty(len(directions), rows, width if k == 0 else hidden) for k in range(len(p.states))]
    saved = Saved([], [])
    for k, d in enumerate(directions):
        plan_ = d.plan(sequences)
        start, own = d.biases()
        column = slice(k * width, (k + 1) * width)
        first = hs.initial(d.reverse)[:, column]
        _ = first.zero_() if states is None else first.copy_(states[0][k])
        views: dict[str, View | tuple[View, View]] = {"s." + p.states[0]: hs.view(k * width), "bias": constant(own)}
        kept = []
        for j, name in enumerate(p.states[1:], 1):
            if training or not single_stage:
                series = Series(x, sequences, hidden)
                first = series.initial(d.reverse)
                views["s." + name] = series.view()
                kept.append((j, series))
            else:  # in place: each unit's state is read and then written by the same tile
                first = finals[j][k]
                views["s." + name] = fixed(first)
            _ = first.zero_() if states is None else first.copy_(states[j][k])
        slots = x.new_empty(0)
        if training:
            slots = x.new_empty(sequences.total, p.slots * hidden)
            views["saved"] = _shaped(slots, sequences)
        elif not single_stage:  # later stages read what earlier ones leave here, a step at a time
            slots = x.new_empty(rows, p.slots * hidden)
            views["saved"] = fixed(slots)
        else:
            views["saved"] = View(0)
        ahead = x.new_empty(0)
        if plan_.project_ahead:
            units = len(p.start_gates) * hidden
            ahead = slots if training else x.new_empty(sequences.total, units)
            weight = d.rows_of(d.w_ih, p.start_gates)
            target = ahead if x.dim() == 2 else ahead.view(*x.shape[:2], -1)
            product(by_time(x), weight, by_time(target[..., :units]), start, threads=team.size())
            views["start"] = _shaped(ahead, sequences)
            views["x"] = View(0)
        else:
            views["start"] = constant(start)
            views["x"] = view(x)
        r.forward.run(
            sequences.times(d.reverse, d.reverse),
            views,
            d.segments(r.forward, not plan_.project_ahead),
            [d.units(s.size) for s in p.forward.stages],
            slot=hidden,
            skip_first=states is None,
            training=training,
            threads=plan_.threads,
            split=plan_.split,
            row_block=plan_.row_block,
            shares=sequences.shares(plan_.threads),
        )
        finals[0][k] = hs.final(d.reverse)[:, column]
        for j, series in kept:
            finals[j][k] = series.final(d.reverse)
        saved.slots.append(slots)
        saved.series += [series.tensor for _, series in kept]
    return hs.body, tuple(finals), saved


def _shaped(rows: Tensor, sequences: Sequences) -> View:
    """[total, width] by steps and rows."""
    return view(rows if sequences.counts is not None else rows.view(sequences.steps, sequences.rows, -1))


@dataclass
class Wanted:
    """Which gradients are asked for."""

    x: bool
    states: bool
    weights: bool


def backward(
    cell: Cell,
    x: Tensor,
    hs_storage: Tensor,
    parameters: Sequence[Parameters],
    sequences: Sequences,
    saved: Saved,
    dy: Tensor | None,
    dstates: Sequence[Tensor | None],
    wanted: Wanted,
    in_place: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[list[Tensor | None]]]:
    """Gradients of x, of the states and, a list for each direction, of the parameters.

    hs_storage: the tensor of the Series that forward made. in_place: what forward saved may be overwritten.
    """
    x = usable(x)
    project = parameters[0][4] is not None
    r = ready(cell, project, x.dtype)
    p = r.programs
    directions = [Direction(r, q, bool(k)) for k, q in enumerate(parameters)]
    width, rows, hidden = directions[0].depth, sequences.rows, directions[0].hidden
    hs = Series(x, sequences, len(directions) * width, hs_storage)
    dy = None if dy is None else usable(dy)
    dx = None
    d0 = [x.new_empty(len(directions), rows, width if k == 0 else hidden) for k in range(len(p.states))]
    dparameters: list[list[Tensor | None]] = []
    nothing = x.new_zeros(max(width, hidden))
    others = len(p.states) - 1
    for k, d in enumerate(directions):
        plan_ = d.plan(sequences)
        slots = saved.slots[k]
        grad = slots if in_place else torch.empty_like(slots)
        views: dict[str, View | tuple[View, View]] = {
            "dy": constant(nothing) if dy is None else view(dy, k * width),
            "saved": _shaped(slots, sequences),
            "grad": _shaped(grad, sequences),
            "s." + p.states[0]: hs.view(k * width),
        }
        carry = {}
        for j, name in enumerate(p.states):
            given = dstates[j]
            if j > 0:
                series = Series(x, sequences, hidden, saved.series[k * others + j - 1])
                views["s." + name] = series.view()
            if j > 0 or name in p.carried:
                carry[name] = d0[j][k]
                _ = carry[name].zero_() if given is None else carry[name].copy_(given[k])
                views["carry." + name] = fixed(carry[name])
            else:
                first = constant(nothing) if given is None else fixed(given[k].contiguous())
                views["carry." + name] = constant(nothing), first
                last_given = given  # noqa: F841  keeps the memory
        cross = x.new_empty(rows, max(1, p.cross) * hidden)
        views["cross"] = fixed(cross)
        projected = x.new_empty(sequences.total, width) if project else x.new_empty(0)
        if project:
            views["projected"] = _shaped(projected, sequences)
        r.backward.run(
            sequences.times(not d.reverse, d.reverse),
            views,
            d.segments(r.backward, True),
            [d.units(s.size) for s in p.backward.stages],
            slot=hidden,
            skip_first=True,
            threads=plan_.threads,
            split=plan_.split,
            row_block=plan_.row_block,
            shares=sequences.shares(plan_.threads),
        )
        gx = grad[:, : len(p.start_gates) * hidden]
        if wanted.x:
            begins = dx is None
            if dx is None:
                dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            into = by_time(dx)
            rows_of_time = by_time(gx if x.dim() == 2 else gx.unflatten(0, x.shape[:2]))
            weight = d.rows_of(d.w_ih, p.start_gates)
            product(rows_of_time, weight, into, None if begins else into, transposed=True, threads=team.size())
        if wanted.states:
            _initial_gradient(d, d0[0][k], grad, sequences, carry.get(p.states[0]))
        dparameters.append(_parameter_gradients(d, x, hs, k, grad, slots, projected) if wanted.weights else [None] * 5)
    return dx, list(d0), dparameters


def _initial_gradient(d: Direction, out: Tensor, grad: Tensor, sequences: Sequences, carry: Tensor | None) -> None:
    """The hidden state's gradient before the first step: what its products and its direct path hand down."""
    g, h = d.r.programs.gradients, d.hidden
    if sequences.counts is None:
        rows = grad.view(sequences.steps, sequences.rows, -1)[-1 if d.reverse else 0]
    else:
        rows = grad[sequences.edge(last=d.reverse)]
    if carry is None:
        out.zero_()
    for run in runs([u for u, operand in g.operands.items() if operand is None], g.u):
        out.addmm_(rows[:, g.u[run[0]] * h : (g.u[run[-1]] + 1) * h], d.rows_of(d.w_hh, run))


def _parameter_gradients(
    d: Direction, x: Tensor, hs: Series, k: int, grad: Tensor, slots: Tensor, projected: Tensor
) -> list[Tensor | None]:
    """In the order of the parameters: one large product over all steps and sequences for each block of weights."""
    p, g, h = d.r.programs, d.r.programs.gradients, d.hidden
    rows = x.reshape(-1, x.shape[-1])
    columns = lambda t, first, last: t[:, first * h : (last + 1) * h]  # noqa: E731

    def assemble(like: Tensor, blocks: list[tuple[tuple[str, ...], int, Tensor]]) -> Tensor:
        """blocks: (gates, first slot, operand rows); gates of a block have adjacent slots."""
        if len(blocks) == 1 and blocks[0][0] == tuple(d.r.gates):
            gates, slot, operand = blocks[0]
            return columns(grad, slot, slot + len(gates) - 1).t() @ operand
        whole = torch.zeros_like(like)
        for gates, slot, operand in blocks:
            part = columns(grad, slot, slot + len(gates) - 1).t() @ operand
            for j, gate in enumerate(gates):
                at = d.r.gates[gate] * h
                whole[at : at + h] = part[j * h : (j + 1) * h]
        return whole

    dw_ih = assemble(d.w_ih, [(p.start_gates, 0, rows)])
    previous = None
    blocks = []
    for operand in dict.fromkeys(g.operands.values()):
        if operand is None:
            previous = hs.previous(d.reverse)[:, k * d.depth : (k + 1) * d.depth]
            vectors = previous
        else:
            vectors = columns(slots, operand, operand)
        blocks += [
            (run, g.u[run[0]], vectors) for run in runs([u for u, o in g.operands.items() if o == operand], g.u)
        ]
    dw_hh = assemble(d.w_hh, blocks)
    dw_hr = None
    if d.w_hr is not None:
        assert g.projected is not None
        dw_hr = projected.t() @ columns(slots, g.projected, g.projected)
    db_ih = db_hh = None
    if d.b_ih is not None:
        used = max(*g.x.values(), *g.u.values()) + 1
        sums = grad[:, : used * h].sum(0).view(used, h)
        zero = sums.new_zeros(h)
        db_ih = torch.cat([sums[g.x[n]] if n in g.x else zero for n in d.r.gates])
        db_hh = torch.cat([sums[g.u[n]] if n in g.u else zero for n in d.r.gates])
    return [dw_ih, dw_hh, db_ih, db_hh, dw_hr]
