"""The backward pass of one layer, all its directions: the time loop and the products after it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plan import Plan
from ..program import spread
from .call import Call
from .derived import hand_on
from .direction import Direction, Operands, Ready, Sequences, fixed, rows_of_initial, view
from .engine import Buffer, View, add, product
from .forward import Saved
from .gradients import OverTime, shifted
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


class Backward(Call):
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
        assert not sequences.ending, "what is past an end has no gradients"
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
            d.share(schedule, schedule.back, total)
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
        self.projected = (total, spread(width)) if directions[0].w_hr is not None else None
        projected = [operands.made(self.projected) if self.projected else operands.given(None) for _ in directions]
        # Packed sequences: the states that entered each recurrent product, row by row.
        wide = {p.states[0]: width}
        self.previous = {
            o: (total, wide.get(o, hidden)) for _, _, o in r.recurrent if isinstance(o, str) and wanted.weights
        }
        packed = sequences.packed
        previous = [{n: operands.made(s) if packed else None for n, s in self.previous.items()} for _ in directions]
        nothing = zeros(max(width, hidden) * item)
        others = len(p.states) - 1
        launches, totals = [], []
        for k, d in enumerate(directions):
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
                    views["carry." + name] = View(nothing, 0, 0, *rows_of_initial(nothing if final is None else final))
            if projected[k] is not None:
                views["projected"] = view(projected[k], sequences)
            unused = ("before",) if sequences.steps == 1 else ()
            launches.append((views, d.products(self.script, r.backward, unused)))
        for k, d in enumerate(directions):
            d.launch(self.script, r.backward, sequences, *launches[k], descending=not d.reverse, skip_first=True)
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
                entered = {n: given[j][k] if given else None for j, n in enumerate(p.states)}
                before: dict[str, list[tuple[int, Buffer]]] = {}
                for name, out in previous[k].items():
                    if sequences.packed:
                        before[name] = [(0, self._previous(d, sequences, known[name], entered[name], out))]
                    else:
                        before[name] = shifted(d, rows, known[name], entered[name])
                products = OverTime(self.script, d, grads[k])
                products.weights(x_, before, kept[k], *dparameters[k][:4])
                if projected[k] is not None:
                    OverTime(self.script, d, projected[k]).projection(kept[k], dparameters[k][4])
                self._own(d, totals[k], dparameters[k][5:])

        groups: list[Sequence[Any]] = [[self.dx], self.dstates, self.dinputs, *self.dparameters]
        self._groups = [len(group) for group in groups]
        shapes = list(chain.from_iterable(groups))
        more = [*self.totals * count, *[self.grad] * (0 if overwrite else count), *[self.projected] * count]
        more += list(self.previous.values()) * (count if packed else 0)
        self.makes([*shapes, *more], own=len(shapes))
        self._states = len(cell.states)

    def finish(self, tensors: Sequence[Tensor | None]) -> Gradients:
        """The gradients, of tensors in the order of `prepared_backward`."""
        return self.gradients(self.begin(tensors))

    def gradients(self, made: Sequence[Any]) -> Gradients:
        """Those among all that the call makes."""
        rest = iter(made)
        (dx,), dstates, dinputs, *dparameters = ([next(rest) for _ in range(size)] for size in self._groups)
        return Gradients(dx, dstates[: self._states], dinputs, dparameters)

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
            hand_on(
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
            if sequences.packed:
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

    def _previous(self, d: Direction, sequences: Sequences, state: Buffer, initial: Buffer | None, out: Any) -> Buffer:
        """What a state was before every step of packed sequences, gathered into `out`, [total, width]."""
        at, column, target = state.at.operand - 1, state.at.offset // state.item, out.at.operand - 1  # type: ignore[union-attr]
        entered, k, width = None if initial is None else initial.at.operand - 1, d.index, state.shape[1]  # type: ignore[union-attr]

        def gather(tensors):
            index, row = sequences.previous(d.reverse)
            series = tensors[at].view(sequences.total, -1)[:, column : column + width]
            torch.index_select(series, 0, index.clamp(min=0), out=tensors[target])
            first = index < 0
            tensors[target][first] = 0 if entered is None else tensors[entered][k][row[first]]

        self.then(gather)
        return out
