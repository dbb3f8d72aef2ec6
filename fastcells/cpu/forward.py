"""The forward pass of one layer, all its directions: buffers, the time loop and the input projection before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..plan import Plan
from .call import Prepared
from .direction import BATCH, TOTAL, Direction, Ready, Sequences, fixed, planned, view
from .engine import Buffer, View, add, plain, product
from .geometry import BESIDE_ROWS
from .lengths import leave
from .script import Address, zeros


@dataclass
class Saved:
    """What forward leaves to backward: the output, packed if its sequences are, and tensors for each direction."""

    y: Tensor
    slots: list[Tensor]  # [total, Programs.width]
    series: list[Tensor]  # [total, H], of each state but the hidden one
    plan: Plan


class Made(NamedTuple):
    """Buffers of what a call makes: the output, the final states, and by direction what training keeps of every step
    and the states of every step, by number."""

    y: Buffer
    finals: list[Buffer]
    kept: list[Buffer]
    series: list[dict[int, Buffer]]


class Forward(Prepared):
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
        self.r, self.sequences, self.training = r, sequences, training
        self.plan = schedule = planned(r.cell, parameters[0], sequences, len(parameters), training)
        operands, many = self.operands, sequences.most if sequences.packed else None
        x_, given = operands.given(x, many, sequences.takes), [operands.given(s) for s in states or ()]
        fed = [operands.given(t) for t in inputs]
        directions = [Direction(r, [operands.given(t) for t in q], fed, k) for k, q in enumerate(parameters)]
        for d in directions:
            d.share(schedule, schedule.forward, sequences.most)
        self.made = self._results(x, directions)
        mover = None if sequences.tokens is None else directions[0].mover(self, sequences)
        if sequences.takes:
            x_ = self.collected(mover, x_)
        unused = ("x" if schedule.project_ahead else "", "before" if not given and sequences.steps == 1 else "")
        launches = []
        for d in directions:
            start, own = d.biases(self.script)
            launches.append((start, self._views(d, own, given), d.products(self.script, r.forward, unused)))
        beside = [self._input(d, x_, start, views) for d, (start, views, _) in zip(directions, launches, strict=True)]
        for d, (_, views, products), words in zip(directions, launches, beside, strict=True):
            options: dict[str, Any] = {"skip_first": not given, "training": training, "beside": words}
            options |= {"number": self.number, "dot": schedule.in_place, "descending": d.reverse}
            d.launch(self.script, r.forward, sequences, views, products, **options)
        for d in directions:
            width = d.depth
            sources = {0: self.made.y.columns(d.index * width, width)} | self.made.series[d.index]
            for j, source in sources.items():
                if j < len(self.made.finals):
                    self._final(d, source, self.made.finals[j], wait=d.index == 0 and j == 0)
        if mover is not None and sequences.gives:
            mover.spread(self.made.y, self.padded, wait=False)

    def _results(self, x: Tensor, directions: Sequence[Direction]) -> Made:
        """All that the call makes, by shapes that are the call's from now on."""
        p, operands, sequences, training = self.r.programs, self.operands, self.sequences, self.training
        count, rows, most = len(directions), sequences.rows, sequences.most
        width, hidden = directions[0].depth, directions[0].hidden
        total = TOTAL if sequences.packed else most
        rows_of_y = (*((TOTAL,) if sequences.packed else x.shape[:-1]), count * width)
        self.y = (BATCH, count * width) if sequences.gives else rows_of_y
        self.finals = [(count, rows, hidden if j else width) for j in range(len(self.r.cell.states))]
        self.slots, self.series = (total, p.width(hidden)), (total, hidden)
        # Other states are kept at every step for the backward pass, and for products.
        kinds = [j for j, name in enumerate(p.states) if j and (name in p.streams or not self.in_place)]
        self.many, slots = len(kinds), [self.slots] * (count if training else 0)
        own = 1 + len(self.finals)
        packed = [rows_of_y] * sequences.gives
        self._end = own, own + len(packed), own + len(packed) + len(slots)
        self.makes([self.y, *self.finals, *packed, *slots, *[self.series] * count * self.many], own=own)
        y = operands.made(self.y, most)
        finals = [operands.made(s, most) for s in self.finals]
        if sequences.gives:
            self.padded, y = y, operands.made(rows_of_y, most)
        return Made(
            y,
            finals,
            [operands.made(s, most) for s in slots],
            [{j: operands.made(self.series, most) for j in kinds} for _ in directions],
        )

    @property
    def in_place(self) -> bool:
        """Whether states are kept in place: a unit's is read and then written by the same tile, or the same pass over
        all of them, and by no other."""
        first, *others = self.r.programs.forward.stages
        return not (self.training or others) and len(first.passes) < 2

    def _views(self, d: Direction, own: Address, given: Sequence[Buffer]) -> dict[str, View]:
        """What the time loop of a direction reads and writes, but for the input. own: of what the cell's gates start
        from; given: the initial states."""
        p, sequences, item, k = self.r.programs, self.sequences, self.r.item, d.index
        width, hidden = d.depth, d.hidden
        nothing = zeros(max(width, hidden) * item)
        initial: list[Buffer | int] = [s[k] for s in given] or [nothing] * len(p.states)
        y = self.made.y.columns(k * width, width)
        views = {"s." + p.states[0]: view(y, sequences, initial[0]), "bias": View(own)}
        views |= d.own_views(sequences)
        for j, name in enumerate(p.states[1:], 1):
            kept = self.made.series[k].get(j)
            if kept is None:
                views["s." + name] = fixed(self.made.finals[j][k], initial[j])
            else:
                views["s." + name] = view(kept, sequences, initial[j])
        if self.training:
            views["saved"] = view(self.made.kept[k], sequences)
        elif self.in_place:
            views["saved"] = View(0)
        else:  # a later stage reads here what an earlier one left, at the same step
            shape = sequences.rows, p.width(hidden)
            views["saved"] = fixed(Buffer.new(self.script.take(shape[0] * shape[1] * item), shape, item))
        return views

    def _input(self, d: Direction, x: Buffer, start: Address, views: dict[str, View]) -> Sequence[Address]:
        """How the time loop meets the input, for its views; with what is done before it. The words of a frame on what
        is done within."""
        if not self.plan.project_ahead:
            views["start"], views["x"] = View(start), view(x, self.sequences)
            return (0,) * 5
        units, most, item = len(self.r.programs.start_gates) * d.hidden, self.sequences.most, self.r.item
        if self.training:
            ahead = self.made.kept[d.index]
        else:
            ahead = Buffer.new(self.script.take(most * units * item), (most, units), item)
        views["start"] = view(ahead, self.sequences)
        views["x"] = view(x, self.sequences) if self.plan.beside else View(0)
        return self._project(d, x.by_time(), ahead.columns(0, units).by_time(x.shape[:-1]), start)

    def _final(self, d: Direction, source: Buffer, out: Buffer, wait: bool) -> None:
        """A state after the last step that a direction takes, of what it was after every step."""
        sequences = self.sequences
        if sequences.tables is None or d.reverse:
            edge = source.by_time((sequences.steps, sequences.rows))[0 if d.reverse else sequences.steps - 1]
            add(self.script, self.dtype, out[d.index], edge, wait=wait)
        else:
            leave(self.script, sequences.times(False, self.number), view(source, sequences), out[d.index], wait=wait)

    def _project(self, d: Direction, x: Buffer, out: Buffer, start: Address) -> Sequence[Address]:
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
                options["pack"] = not d.schedule.dots
                if self.sequences.packed:
                    options["count"] = self.number(lambda s: s.total)
                product(self.script, self.dtype, rows, weight, into, start, **options)
        return words

    def start(self, tensors: Sequence[Tensor | None], sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
        """(y, final states, what backward needs) of the tensors in the order of `prepared`."""
        made = self.begin(tensors, sequences)
        finals, packed, slots = self._end
        y = made[0] if packed == finals else made[finals]
        return made[0], tuple(made[1:finals]), Saved(y, made[packed:slots], made[slots:], self.plan)

    def results(self, tensors: Sequence[Tensor | None], sequences: Sequences) -> list[Tensor]:
        """y and the final states, likewise."""
        return self.begin(tensors, sequences)[: self._end[0]]
