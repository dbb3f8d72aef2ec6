"""One layer, all its directions, on the CPU engine: buffers, time loops and the large products around them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cell import Cell
from ..expression import Node, apply, leaf
from ..plan import Plan
from . import again, blocks, team
from .direction import Direction, Operands, Ready, Sequences, fixed, planned, ready, rows_of_initial, usable, view
from .engine import Buffer, View, add, product
from .gradients import OverTime, shifted
from .script import Script, arena, zeros

__all__ = ["Saved", "Sequences", "Wanted", "backward", "forget", "forward", "planned", "prepared", "ready"]

Parameters = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]

SMALL = 1 << 10  # numbers in a tensor, up to which one is kept to make others like it
FEW_ROWS = 16  # that read weights where they are: packing them first would cost more


@dataclass
class Saved:
    """What forward leaves to backward, tensors for each direction."""

    slots: list[Tensor]  # [total, Programs.width]
    series: list[Tensor]  # [total, H], of each state but the hidden one
    plan: Plan


class Call:
    """A call made ready: scripts and functions of the call's tensors, in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.script = Script()
        self.parts: list[Script | Callable[[Sequence[Tensor | None]], None]] = [self.script]
        self.shapes: list[Any] = []
        self.make: list[Callable[[], Any]] = []

    def makes(self, shapes: Sequence[Any], own: int) -> None:
        """Note what the call makes, tensors of these shapes, or None for none; from number `own` on no caller sees
        them."""
        self.shapes = list(shapes)
        self.make = [maker(s, self.dtype, k >= own) for k, s in enumerate(shapes)]

    def then(self, function: Callable[[Sequence[Tensor | None]], None]) -> None:
        """Go on with a function of the operands, by number less 1."""
        self.script = Script()
        self.parts += [function, self.script]

    @property
    def whole(self) -> bool:
        """Whether the script is all of it."""
        return len(self.parts) == 1

    def again(
        self, tensors: Sequence[Tensor | None], check: Callable[..., bool] | None, result: Callable[[list], Any]
    ) -> Callable[..., Any]:
        """A function that makes the call, of those of its tensors that there are; it returns None if `check` of them is
        not true. Without Python, where that can be. result: what it returns, of all that the call makes."""
        sizes = [torch.Size(s).numel() * self.dtype.itemsize for s in self.shapes if s is not None]
        if self.whole and max(sizes) < blocks.LARGE:
            made = [None if s is None else torch.empty(s, device="meta", dtype=self.dtype) for s in self.shapes]
            numbers = count()
            operands = [None if t is None else again.Operand(next(numbers)) for t in (*tensors, *made)]
            examples = [t for t in made if t is not None]
            does = again.Made([(self.script, operands, None)], examples, result(made), self.dtype)
            taken = next(numbers) - len(examples)
            if (function := again.function(taken, check, does)) is not None:
                return function
        there = [t is not None for t in tensors]

        def in_python(*given: Tensor) -> Any:
            if check is not None and not check(*given):
                return None
            rest = iter(given)
            return result(self.begin([next(rest) if t else None for t in there]))

        return in_python

    def begin(self, tensors: Sequence[Tensor | None]) -> list[Any]:
        """Make the call of the tensors in the order of `prepared`: all that it makes."""
        made = [make() for make in self.make]
        self.run([*tensors, *made])
        return made

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        for part in self.parts:
            if not isinstance(part, Script):
                part(tensors)
            elif part.launches:
                part.run(addresses)


def maker(shape: Sequence[int] | None, dtype: torch.dtype, own: bool = False) -> Callable[[], Any]:
    """A function that makes a tensor of that shape, or None for no shape: for a small one, from another like it, which
    is the quickest way. own: no caller sees it."""
    if shape is None:
        return _nothing
    if torch.Size(shape).numel() <= SMALL:
        return partial(torch.empty_like, torch.empty(tuple(shape), dtype=dtype))
    return partial(blocks.empty, tuple(shape), dtype) if own else partial(torch.empty, *shape, dtype=dtype)


def _nothing() -> None:
    return None


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
            first = k * schedule.forward.threads if schedule.side_by_side else 0
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
            threads, in_place_ = schedule.forward.threads, schedule.in_place
            launches.append(d.products(self.script, r.forward, threads, first, in_place_, unused))
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
            times, (threads, split) = sequences.times(descending=d.reverse), schedule.forward
            self.owned.append(times)
            r.forward.launch(
                self.script,
                times,
                starts[k][1],
                launches[k],
                [d.units(s.size) for s in p.forward.stages],
                slot=hidden,
                skip_first=states is None,
                training=training,
                threads=threads,
                first=k * threads if schedule.side_by_side else 0,
                wait=k == 0 or not schedule.side_by_side,
                split=split,
                row_block=schedule.row_block,
                shares=sequences.shares(self.script, threads),
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
        kept_shapes = [*[self.slots] * (count if training else 0), *[self.series] * count * self.many]
        self.makes([self.y, *self.finals, *kept_shapes], own=1 + len(self.finals))
        self._end = 1 + len(self.finals), 1 + len(self.finals) + (count if training else 0)

    def start(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
        """(y, final states, what backward needs) of the tensors in the order of `prepared`."""
        return self.results(self.begin(tensors))

    def results(self, made: Sequence[Any]) -> tuple[Tensor, tuple[Tensor, ...], Saved]:
        """Those among all that the call makes."""
        finals, slots = self._end
        return made[0], tuple(made[1:finals]), Saved(list(made[finals:slots]), list(made[slots:]), self.plan)


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
        # Packed sequences: the states that entered each recurrent product, row by row.
        wide = {p.states[0]: width}
        self.previous = {
            o: (total, wide.get(o, hidden)) for _, _, o in r.recurrent if isinstance(o, str) and wanted.weights
        }
        packed = sequences.counts is not None
        previous = [{n: operands.made(s) if packed else None for n, s in self.previous.items()} for _ in directions]
        nothing = zeros(max(width, hidden) * item)
        others = len(p.states) - 1
        launches, totals, self.owned = [], [], []
        for k, d in enumerate(directions):
            first = k * schedule.back.threads if schedule.side_by_side else 0
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
            weights = d.products(self.script, r.backward, schedule.back.threads, first, schedule.in_place, unused)
            launches.append((views, weights))
        for k, d in enumerate(directions):
            times, (threads, split) = sequences.times(descending=not d.reverse), schedule.back
            self.owned.append(times)
            r.backward.launch(
                self.script,
                times,
                *launches[k],
                [d.units(s.size) for s in p.backward.stages],
                slot=hidden,
                skip_first=True,
                threads=threads,
                first=k * threads if schedule.side_by_side else 0,
                wait=k == 0 or not schedule.side_by_side,
                split=split,
                row_block=schedule.row_block,
                shares=sequences.shares(self.script, threads),
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
                entered = {n: given[j][k] if given else None for j, n in enumerate(p.states)}
                before: dict[str, list[tuple[int, Buffer]]] = {}
                for name, out in previous[k].items():
                    if sequences.counts is not None:
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


threads = team.size
"""Threads that a call prepared now is for."""


forgetting: list[Callable[[], None]] = []
"""What else has prepared calls, and drops them."""


def forget() -> None:
    """Drop all prepared calls, and the memory that is kept for the next ones."""
    with _lock:
        _calls.clear()
    for others in forgetting:
        others()
    blocks.pool.release()
    arena.release()


def _flat(parameters: Sequence[Parameters]) -> list[list[Tensor | None]]:
    """The tensors of each direction in one list, the cell's own at the end."""
    return [[usable(t) for t in (*q[:5], *(q[5] if len(q) > 5 else ()))] for q in parameters]


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
) -> tuple[Forward, list[Tensor | None]]:
    """The forward call, and the tensors that it is given: x, the states, inputs, and parameters."""
    r = ready(cell, parameters[0][4] is not None, x.dtype, feed)
    x, weights, inputs = usable(x), _flat(parameters), [usable(t) for t in inputs]
    given = _all_states(r, states, weights, inputs, sequences.rows)
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    key = None
    if sequences.counts is None:
        key = r, len(parameters), training, team.size(), given is None, *_laid_out(tensors)
    return _prepared(key, lambda: Forward(r, x, given, weights, inputs, sequences, training)), tensors


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
    call, tensors = prepared(cell, x, states, parameters, sequences, training, inputs, feed)
    return call.start(tensors)


def prepared_backward(
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
) -> tuple[Backward, list[Tensor | None]]:
    """The backward call, and the tensors that it is given: those of forward, what that left, and the cotangents.

    overwrite: what forward saved is not needed again. feed: gradients of the inputs are wanted, and forward was told
    so. dothers: cotangents of the other states at every step, laid out as y.
    """
    directions = len(parameters)
    each = any([t is not None for t in dothers])
    dothers = [usable(t) for t in dothers] if each else []
    r = ready(cell, parameters[0][4] is not None, x.dtype, feed, each)
    x, weights, inputs = usable(x), _flat(parameters), [usable(t) for t in inputs]
    given = _all_states(r, states, weights, inputs, sequences.rows)
    # As they were made; a saved-tensor hook may have returned others.
    y = y.contiguous()
    saved = Saved([t.contiguous() for t in saved.slots], [t.contiguous() for t in saved.series], saved.plan)
    dy, dfinals = usable(dy), [usable(t) for t in dfinals]
    tensors = [x, *(given or ()), *inputs, *[t for q in weights for t in q]]
    tensors += [y, *saved.slots, *saved.series, dy, *dfinals, *dothers]
    key = None
    if sequences.counts is None:
        key = r, directions, saved.plan, team.size(), given is None, wanted, overwrite, *_laid_out(tensors)
    call = _prepared(
        key,
        lambda: Backward(
            r, saved.plan, x, given, y, weights, inputs, sequences, saved, dy, dfinals, dothers, wanted, overwrite, feed
        ),
    )
    return call, tensors


def backward(*args: Any, **options: Any) -> Gradients:
    """Run the call that `prepared_backward` makes of the same arguments."""
    call, tensors = prepared_backward(*args, **options)
    return call.finish(tensors)


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
