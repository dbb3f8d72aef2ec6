"""The backward pass of one layer, all its directions: the time loop and the products after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import Plan
from ..program import spread
from .call import Prepared
from .derived import hand_on
from .direction import BATCH, TOTAL, Direction, Operands, Ready, Sequences, fixed, rows_of_initial, view
from .engine import Buffer, View, add, product
from .forward import Saved
from .gradients import LABEL, WeightGradients, shifted
from .lengths import enter, leave
from .script import zeros

FEW_ROWS = 16  # that read weights where they are: packing them first would cost more


class Gradients(NamedTuple):
    """Of x, of the states (if wanted), of the inputs (if forward was told so), and a list for each direction of the
    parameters, the cell's own at the end."""

    x: Tensor | None
    states: list[Tensor | None]
    inputs: list[Tensor | None]
    parameters: list[list[Tensor | None]]


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    states: bool
    weights: bool


class Given(NamedTuple):
    """What the call is given, as its script knows it. slots, series: see `Saved`; dothers: of the states of every step
    but the hidden one."""

    x: Buffer
    states: list[Buffer]
    inputs: list[Buffer]
    y: Buffer
    slots: list[Buffer]
    series: list[Buffer]
    dy: Buffer | None
    dfinals: list[Buffer | None]
    dothers: list[Buffer | None]


class Made(NamedTuple):
    """What it makes, likewise: the gradients, None where they are not wanted, and for each direction what no caller
    sees. totals: gradients of the cell's own tensors by sequence; grads: of the pre-activations; projected: of the
    projection's result; previous: the states that entered each recurrent product of packed sequences, row by row."""

    dx: Buffer | None
    dstates: list[Buffer | None]
    dinputs: list[Buffer | None]
    dparameters: list[list[Buffer | None]]
    totals: list[list[Buffer]]
    grads: list[Buffer]
    projected: list[Buffer | None]
    previous: list[dict[str, Buffer | None]]


class Backward(Prepared):
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
        super().__init__(r.dtype)
        self.r, self.sequences = r, sequences
        operands, many = self.operands, sequences.most if sequences.packed else None

        def all_of(tensors: Sequence[Tensor | None], many: int | None = None) -> list[Any]:
            return [operands.given(t, many) for t in tensors]

        first = operands.given(x, many, sequences.takes), all_of(states or ()), all_of(inputs)
        directions = [Direction(r, all_of(q), first[2], k) for k, q in enumerate(parameters)]
        kept = operands.given(y, many), all_of(saved.slots, many), all_of(saved.series, many)
        dy_ = operands.given(dy, many, sequences.gives)
        self.given = Given(*first, *kept, dy_, all_of(dfinals), all_of(dothers, many))
        for d in directions:
            d.share(schedule, schedule.back, sequences.most)
        self.made = self._results(operands, directions[0], x, parameters, inputs, saved, wanted, overwrite, feed)
        mover = None if sequences.tokens is None else directions[0].mover(self, sequences)
        if sequences.takes and wanted.weights:
            self.given = self.given._replace(x=self.collected(mover, self.given.x))
        if sequences.gives and dy_ is not None:
            self.given = self.given._replace(dy=self.collected(mover, dy_))
        padded = self.made.dx
        if sequences.takes and padded is not None:
            rows = self.script.take(sequences.most * padded.shape[1] * r.item)
            self.made = self.made._replace(dx=Buffer.new(rows, padded.shape, r.item))
        totals = [self._totals(d) for d in directions]
        launches = []
        for d, own in zip(directions, totals, strict=True):
            unused = ("before",) if sequences.steps == 1 else ()
            launches.append((self._views(d, own), d.products(self.script, r.backward, unused)))
        for d, launch in zip(directions, launches, strict=True):
            options: dict[str, Any] = {"descending": not d.reverse, "number": self.number, "skip_first": True}
            d.launch(self.script, r.backward, sequences, *launch, **options)
        for d in directions:
            if self.made.dx is not None:
                self._input(d)
            if wanted.weights:
                self._weights(d)
        if mover is not None and sequences.takes and padded is not None and self.made.dx is not None:
            mover.spread(self.made.dx, padded)
        for d, own in zip(directions, totals, strict=True):  # last, since these go on with another script
            if any(t is not None for t in self.made.dstates):
                edge = self._edge(d)
                for name, out in zip(r.programs.states, self.made.dstates, strict=True):
                    self._initial(d, name, edge, out[d.index])  # type: ignore[index]
                if r.programs.derived:
                    self._derived(d, own)
            if wanted.weights:
                self._own(d, own)

    def _results(
        self,
        operands: Operands,
        d: Direction,
        x: Tensor,
        parameters: Sequence[Sequence[Tensor | None]],
        inputs: Sequence[Tensor],
        saved: Saved,
        wanted: Wanted,
        overwrite: bool,
        feed: bool,
    ) -> Made:
        """All that the call makes, by the sizes that its directions have in common."""
        p, sequences, count = self.r.programs, self.sequences, len(parameters)
        rows, total, width, hidden = sequences.rows, sequences.total, d.depth, d.hidden
        if sequences.packed:
            total = TOTAL

        def made(shape: tuple[int, ...] | None) -> Any:
            return operands.given(None) if shape is None else operands.made(shape, sequences.most)

        leading = (BATCH,) if sequences.takes else (total,) if sequences.packed else tuple(x.shape[:-1])
        dx = (*leading, x.shape[-1]) if wanted.x else None
        states_wanted = wanted.states or bool(p.derived and (wanted.weights or feed))
        dstates = [(count, rows, hidden if j else width) if states_wanted else None for j in range(len(p.states))]
        dinputs = [tuple(t.shape) if feed else None for t in inputs]
        dparameters = [[None if t is None or not wanted.weights else tuple(t.shape) for t in q] for q in parameters]
        totals = [(rows, hidden) for _ in self.r.cell.own]
        grad = None if overwrite else (total, *saved.slots[0].shape[1:])
        projected = (total, spread(width)) if d.w_hr is not None else None
        wide = {p.states[0]: width}
        entering = {o for _, _, o in self.r.recurrent if isinstance(o, str) and wanted.weights}
        previous = {o: (total, wide.get(o, hidden)) if sequences.packed else None for o in sorted(entering)}

        groups: list[Sequence[Any]] = [[dx], dstates, dinputs, *dparameters]
        self._groups, self._states = [len(group) for group in groups], len(self.r.cell.states)
        shapes = list(chain.from_iterable(groups))
        unseen = [*totals * count, *[grad] * (0 if overwrite else count), *[projected] * count]
        unseen += list(previous.values()) * count if sequences.packed else []
        self.makes([*shapes, *unseen], own=len(shapes))
        return Made(
            made(dx),
            [made(s) for s in dstates],
            [made(s) for s in dinputs],
            [[made(s) for s in q] for q in dparameters],
            [[made(s) for s in totals] for _ in parameters],
            self.given.slots if grad is None else [made(grad) for _ in parameters],
            [made(projected) for _ in parameters],
            [{n: s and made(s) for n, s in previous.items()} for _ in parameters],
        )

    def _totals(self, d: Direction) -> dict[str, Buffer]:
        """Gradients that a direction sums up over its steps, of the inputs and of the cell's own tensors; zero."""
        cell, made = self.r.cell, self.made
        totals = {n: t[d.index] for n, t in zip(cell.fed, made.dinputs, strict=True) if t is not None}
        totals |= dict(zip(cell.own, made.totals[d.index], strict=True))
        for total in totals.values():
            add(self.script, self.dtype, total.flattened(), None, wait=False)
        return totals

    def _views(self, d: Direction, totals: dict[str, Buffer]) -> dict[str, View]:
        """What the time loop of a direction reads and writes."""
        p, cell, given, sequences, k = self.r.programs, self.r.cell, self.given, self.sequences, d.index
        width, hidden = d.depth, d.hidden
        nothing = zeros(max(width, hidden) * self.r.item)
        initial: list[Buffer | int] = [s[k] for s in given.states] or [nothing] * len(p.states)
        views = {
            "dy": View(nothing) if given.dy is None else view(given.dy.columns(k * width, width), sequences),
            "saved": view(given.slots[k], sequences),
            "grad": view(self.made.grads[k], sequences),
            "s." + p.states[0]: view(given.y.columns(k * width, width), sequences, initial[0]),
        }
        if p.cross_width(hidden):
            size = p.cross_width(hidden) * self.r.item
            views["cross"] = View(self.script.take(sequences.rows * size), 0, size)
        views |= d.own_views(sequences)
        for name, total in totals.items():
            views["total." + name] = view(total, sequences) if name in cell.step_inputs else fixed(total)
        for j, name in enumerate(p.states):
            if j > 0:
                views["s." + name] = view(self._series(d)[j - 1], sequences, initial[j])
            if j >= len(cell.states):
                continue
            if j > 0 and given.dothers:
                each = given.dothers[j - 1]
                views["each." + name] = (
                    View(nothing) if each is None else view(each.columns(k * hidden, hidden), sequences)
                )
            views["carry." + name] = self._carry(d, j, nothing)
        if (projected := self.made.projected[k]) is not None:
            views["projected"] = view(projected, sequences)
        return views

    def _series(self, d: Direction) -> list[Buffer]:
        """Every state but the hidden one, at every step of a direction."""
        others = len(self.r.programs.states) - 1
        return self.given.series[d.index * others : (d.index + 1) * others]

    def _carry(self, d: Direction, j: int, nothing: int) -> View:
        """What hands a state's gradient on from step to step, or else is that of the final one."""
        dfinals, total = self.given.dfinals[j], self.made.dstates[j]
        final = None if dfinals is None else dfinals[d.index]
        if j == 0 and self.r.programs.states[0] not in self.r.programs.carried:
            return View(nothing, 0, 0, *rows_of_initial(nothing if final is None else final))
        if total is None:  # nobody asks for the state's gradient
            shape, item = (self.sequences.rows, d.hidden if j else d.depth), self.r.item
            carry = Buffer.new(self.script.take(shape[0] * shape[1] * item), shape, item)
        else:
            carry = total[d.index]
        add(self.script, self.dtype, carry, final, wait=False)
        return fixed(carry)

    def _weights(self, d: Direction) -> None:
        """The gradients of the weights and of the biases: products over time."""
        given, made, sequences, k = self.given, self.made, self.sequences, d.index
        states = self.r.programs.states
        known = {states[0]: given.y.flattened().columns(k * d.depth, d.depth)}
        known |= dict(zip(states[1:], self._series(d), strict=True))
        entered = {n: given.states[j][k] if given.states else None for j, n in enumerate(states)}
        before: dict[str, list[tuple[int, Buffer]]] = {}
        for name, out in made.previous[k].items():
            if out is not None:
                before[name] = [(0, self._previous(d, known[name], entered[name], out))]
            else:
                before[name] = shifted(d, sequences.rows, known[name], entered[name])
        dw_ih, dw_hh, db_ih, db_hh, dw_hr = made.dparameters[k][:5]
        assert dw_ih is not None
        WeightGradients(self, sequences.packed, d, made.grads[k]).weights(
            given.x, before, given.slots[k], dw_ih, dw_hh, db_ih, db_hh
        )
        if (projected := made.projected[k]) is not None:
            assert dw_hr is not None
            WeightGradients(self, sequences.packed, d, projected).projection(given.slots[k], dw_hr)

    def finish(self, tensors: Sequence[Tensor | None], sequences: Sequences) -> Gradients:
        """The gradients, of tensors in the order of `prepared_backward`."""
        return self.gradients(self.begin(tensors, sequences))

    def gradients(self, made: Sequence[Any]) -> Gradients:
        """Those among all that the call makes."""
        rest = iter(made)
        (dx,), dstates, dinputs, *dparameters = ([next(rest) for _ in range(size)] for size in self._groups)
        return Gradients(dx, dstates[: self._states], dinputs, dparameters)

    def _own(self, d: Direction, totals: dict[str, Any]) -> None:
        """The gradients of the cell's own tensors: sums over the sequences, and over the units of a scalar."""
        out: list[Any] = self.made.dparameters[d.index][5:]
        pairs = [(totals[n].at.operand - 1, t.at.operand - 1) for n, t in zip(d.own, out, strict=True)]

        def own(tensors):
            for total, target in pairs:
                torch.sum(tensors[total], list(range(2 - tensors[target].dim())), out=tensors[target])

        if pairs:
            self.then(own)

    def _derived(self, d: Direction, totals: dict[str, Any]) -> None:
        """Hand the derived states' gradients before the first step on to what they were made from."""
        k, cell, places = d.index, d.r.cell, {n: t.at.operand - 1 for n, t in d.own.items()}
        inputs: list[Any] = self.given.inputs
        fed_at = {n: t.at.operand - 1 for n, t in zip(cell.fed, inputs, strict=True)}
        groups: tuple[list[Any], ...] = self.given.states, self.made.dstates
        states_at, grads_at = ([t.at.operand - 1 for t in group] for group in groups)
        totals_at = {n: t.at.operand - 1 for n, t in totals.items()}

        def derived(tensors):
            hand_on(
                d.r,
                [tensors[n][k] for n in states_at],
                {**{n: tensors[at] for n, at in places.items()}, **{n: tensors[at][k] for n, at in fed_at.items()}},
                [tensors[n][k] for n in grads_at],
                {n: tensors[at] if n in places else tensors[at][k] for n, at in totals_at.items()},
            )

        self.then(derived)

    def _input(self, d: Direction) -> None:
        """The gradient of the input; added to the other direction's."""
        gates, grad, dx = d.r.programs.start_gates, self.made.grads[d.index], self.made.dx
        assert dx is not None
        weight = d.rows_of(self.script, d.w_ih, gates)
        rows = grad.columns(0, len(gates) * d.hidden).by_time(dx.shape[:-1])
        start = None if d.index else zeros(d.inputs * grad.item)
        pack = grad.shape[0] > FEW_ROWS
        options: dict[str, Any] = {"transposed": True, "pack": pack, "threads": d.team, "label": "input gradient"}
        if self.sequences.packed:
            options["count"] = self.number(lambda s: s.total)
        product(self.script, d.r.dtype, rows, weight, dx.by_time(), start, **options)

    def _edge(self, d: Direction) -> Buffer:
        """[N, columns of `grad`]: gradients at every sequence's step next to its initial state."""
        grad, sequences = self.made.grads[d.index], self.sequences
        if not (d.reverse and sequences.packed):
            return grad.by_time((sequences.steps, sequences.rows))[sequences.steps - 1 if d.reverse else 0]
        shape = sequences.rows, grad.shape[1]
        out = Buffer.new(self.script.take(shape[0] * shape[1] * grad.item), shape, grad.item)
        leave(self.script, sequences.times(False, self.number), view(grad, sequences), out)
        return out

    def _initial(self, d: Direction, name: str, edge: Buffer, out: Buffer) -> None:
        """A state's gradient before the first step: its direct path's is in `out`, its products' are added."""
        p, h = self.r.programs, d.hidden
        start = None if name in p.carried else zeros(out.shape[-1] * edge.item)
        for run, first, operand in d.r.recurrent:
            if operand != name:
                continue
            rows = edge.columns(first * h, len(run) * h).by_time()
            weight = d.rows_of(self.script, d.w_hh, run)
            pack = edge.shape[0] > FEW_ROWS
            options: dict[str, Any] = {"transposed": True, "pack": pack, "threads": d.team}
            product(self.script, d.r.dtype, rows, weight, out.by_time(), start, **options)
            start = None
        if start is not None:
            add(self.script, d.r.dtype, out, None)

    def _previous(self, d: Direction, state: Buffer, initial: Buffer | None, out: Buffer) -> Buffer:
        """What a state was before every step of packed sequences, copied to `out`, [total, width]."""
        sequences, size = self.sequences, state.shape[1] * state.item
        source = view(state, sequences, zeros(size) if initial is None else initial)
        times = sequences.times(d.reverse, self.number)
        enter(self.script, times, source, view(out, sequences), size, threads=d.team, label=LABEL)
        return out
