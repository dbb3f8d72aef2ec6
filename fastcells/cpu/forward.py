"""The forward pass of one layer, all its directions: buffers, the time loop and the input projection before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..plan import Plan
from .call import Call
from .direction import TOTAL, Direction, Ready, Sequences, fixed, planned, view
from .engine import Buffer, View, add, plain, product
from .geometry import BESIDE_ROWS
from .script import Address, At, zeros


@dataclass
class Saved:
    """What forward leaves to backward, tensors for each direction."""

    slots: list[Tensor]  # [total, Programs.width]
    series: list[Tensor]  # [total, H], of each state but the hidden one
    plan: Plan


class Forward(Call):
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
        super().__init__(r.dtype)
        p, item, dtype = r.programs, r.item, r.dtype
        self.cell = r.cell
        self.plan = schedule = planned(r.cell, parameters[0], sequences, len(parameters))
        operands, many = self.operands, sequences.most if sequences.packed else None
        x_, given = operands.given(x, many), [operands.given(s) for s in states or ()]
        fed = [operands.given(t) for t in inputs]
        directions = [Direction(r, [operands.given(t) for t in q], fed, k) for k, q in enumerate(parameters)]
        marks = operands.address() if sequences.ending else None
        count, rows, total = len(directions), sequences.rows, sequences.most
        for d in directions:
            d.share(schedule, schedule.forward, total)
        width, hidden = directions[0].depth, directions[0].hidden
        # A unit's state is read and then written by the same tile, so that states may be kept in place.
        in_place = not training and len(p.forward.stages) == 1
        leading = (TOTAL,) if sequences.packed else x.shape[:-1]
        self.y = (*leading, count * width)
        self.finals = [(count, rows, hidden if j else width) for j in range(len(r.cell.states))]
        self.slots = (TOTAL if sequences.packed else total, p.width(hidden))
        self.series = (self.slots[0], hidden)
        # Other states are kept at every step for the backward pass, and for products.
        kinds = [j for j, name in enumerate(p.states) if j and (name in p.streams or not in_place)]
        self.many = len(kinds)
        y, finals = operands.made(self.y, total), [operands.made(s, total) for s in self.finals]
        kept = [operands.made(self.slots, total) for _ in directions] if training else []
        series = [{j: operands.made(self.series, total) for j in kinds} for _ in directions]
        if sequences.ending:  # zero where no step is run
            add(self.script, dtype, y.flattened(), None, threads=directions[0].team, wait=False)
        nothing = zeros(max(width, hidden) * item)
        starts = []
        launches = []
        for k, d in enumerate(directions):
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
            launches.append(d.products(self.script, r.forward, unused))
        beside: list[Sequence[Address]] = []
        for k, d in enumerate(directions):
            start, views = starts[k]
            if not schedule.project_ahead:
                views["start"], views["x"] = View(start), view(x_, sequences)
                continue
            units = len(p.start_gates) * hidden
            ahead = kept[k] if training else Buffer.new(self.script.take(total * units * item), (total, units), item)
            views["start"], views["x"] = view(ahead, sequences), view(x_, sequences) if schedule.beside else View(0)
            into = ahead.columns(0, units).by_time(x_.shape[:-1])
            beside.append(self._project(d, sequences, x_.by_time(), into, start))
        for k, d in enumerate(directions):
            options: dict[str, Any] = {"skip_first": states is None, "training": training, "marks": marks}
            options["number"] = self.number
            options["dot"] = schedule.in_place
            if beside:
                options["beside"] = beside[k]
            views = starts[k][1]
            d.launch(self.script, r.forward, sequences, views, launches[k], descending=d.reverse, **options)
        for k, d in enumerate(directions):
            for j in (0, *(j for j in kinds if j < len(finals))):
                source = series[k][j] if j else y.columns(k * width, width)
                self._final(d, sequences, marks, source, finals[j], wait=k == 0 and j == 0)
        kept_shapes = [*[self.slots] * (count if training else 0), *[self.series] * count * self.many]
        self.makes([self.y, *self.finals, *kept_shapes], own=1 + len(self.finals))
        self._end = 1 + len(self.finals), 1 + len(self.finals) + (count if training else 0)

    def _final(
        self, d: Direction, sequences: Sequences, marks: At | None, source: Buffer, out: Buffer, wait: bool
    ) -> None:
        """A state after the last step that a direction takes, of what it was after every step."""
        if not sequences.packed and (d.reverse or marks is None):
            edge = source.by_time((sequences.steps, sequences.rows))[0 if d.reverse else sequences.steps - 1]
            add(self.script, self.dtype, out[d.index], edge, wait=wait)
            return
        series: Any = source.at
        final: Any = out.at
        column, size = series.offset // source.item, source.shape[-1]
        here = self.number(lambda s: s) if marks is None else marks

        def copy(operands):
            every, given = operands[series.operand - 1], operands[here.operand - 1]
            if marks is None:
                edge = given.edge(every, last=not d.reverse)
            else:
                edge = every.flatten(0, -2).index_select(0, sequences.last(given))
            operands[final.operand - 1].select(0, d.index).copy_(edge[:, column : column + size])

        self.then(copy)

    def _project(self, d: Direction, sequences: Sequences, x: Buffer, out: Buffer, start: Address) -> Sequence[Address]:
        """Add the input projections before the time loop; the words of a frame on those that are made within."""
        weight: Any = d.rows_of(self.script, d.w_ih, d.r.programs.start_gates)
        steps, _, units = out.shape
        parts = [(0, steps)]
        words: Sequence[Address] = (0,) * 5
        if d.schedule.beside:
            weight = plain(self.dtype)[0].panel(self.script, weight, 0, False, [0], units, d.inputs, d.team)
            times = steps // BESIDE_ROWS - 1
            begin, end = BESIDE_ROWS, BESIDE_ROWS * (times + 1)  # in the order of the loop
            parts = [(0, begin), (end, steps - end)] if not d.reverse else [(steps - begin, begin), (0, steps - end)]
            words = times, units, d.inputs, weight.weights, start
        for first, count in parts:
            if count:
                rows, into = x.narrow(0, first, count), out.narrow(0, first, count)
                options: dict[str, Any] = {"threads": d.team, "wait": first == parts[0][0], "label": "input projection"}
                if sequences.packed:
                    options["count"] = self.number(lambda s: s.total)
                product(self.script, self.dtype, rows, weight, into, start, **options)
        return words

    def start(self, tensors: Sequence[Tensor | None], sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
        """(y, final states, what backward needs) of the tensors in the order of `prepared`."""
        made = self.begin(tensors, sequences)
        finals, slots = self._end
        return made[0], tuple(made[1:finals]), Saved(made[finals:slots], made[slots:], self.plan)
