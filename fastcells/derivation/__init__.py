"""From a cell to its programs: one time step as a graph with its gradient (`step`), which stage computes what
(`staging`), and what training keeps of it, and where (`keeping`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from ..expression import SINGLE, ZERO, Node, leaf, substitute
from ..program import Gradients, Outputs, Pass, Place, Program, Programs, Segment, Stage, Weights
from .keeping import assign_slots, choose_saved, forward_values
from .staging import Staging
from .step import Step, is_state

if TYPE_CHECKING:
    from ..cell import Cell

__all__ = ["build", "runs"]


@lru_cache(maxsize=256)
def build(cell: Cell, project: bool, feed: bool = False, each: bool = False) -> Programs:
    """Derive both programs. project: a linear projection of the hidden state follows the cell (LSTM's proj_size).
    feed: the backward pass yields gradients of the cell's extra inputs too. each: it takes cotangents of all states at
    every step, in buffers "each.<state>"."""
    return _build(cell.name, cell.states, cell.gates, cell.trace(), project, feed, each)


@lru_cache(maxsize=256)
def _build(
    name: str,
    states: tuple[str, ...],
    gates: tuple[str, ...],
    traced: tuple[Node, ...],
    project: bool,
    feed: bool,
    each: bool,
) -> Programs:
    given = states[1:] if each else ()  # states with a cotangent at every step, besides the first, which has dy
    return Derivation(Step(states, gates, traced, project, feed), given).programs(name, gates, project)


class Derivation:
    """Both passes of one time step. given: states with a cotangent of their own at every step."""

    def __init__(self, step: Step, given: tuple[str, ...]) -> None:
        self.step, self.given = step, given
        self.forward = Staging(step.outputs, step.forward_accumulators)
        self.x_slot = {g: k for k, g in enumerate(step.x_gates)}
        self.u_slot = {
            g: self.x_slot[g] if g in step.shared else len(self.x_slot) + step.bias_gates.index(g) for g in step.u_gates
        }
        # An input projection that is made ahead lies in its slot: kept for nothing too.
        self.in_slots = {leaf("x", g) for g in step.x_gates if step.ahead and g not in step.shared} - step.operands
        saved = self._saved()
        self.number_of = {n: j for j, n in enumerate(n for n in saved if n.uniform)}
        self.saved = [n for n in saved if n not in self.number_of]
        self._backward()
        self._slots()

    def _saved(self) -> list[Node]:
        """What training keeps of the forward pass."""
        step, forward = self.step, self.forward
        # States are kept at every step anyway, so the backward pass has them for nothing.
        stored = set(step.new_state)
        forced = {n for n in forward.crossing if n not in step.new_state} | step.operands
        wanted = forward_values(step.backward_roots, set(forward.nodes))
        while True:  # until whatever a stage stores can be had there
            saved = choose_saved(forward.nodes, wanted, stored, forced, self.in_slots)
            missing = {
                m
                for k in range(forward.depth)
                for n in forward.needs(k, [n for n in saved if forward.stage(n) == k])
                for m in (forward.inherited(n, k) if n.uniform else [n])
                if m.op != "leaf" and m not in saved and m not in stored
            }
            if not missing:
                return saved
            forced |= missing

    def _backward(self) -> None:
        """The graph of the backward pass over what is kept, and its stages."""
        step = self.step
        available = {n: leaf("now", s) for n, s in step.new_state.items()}
        available |= {n: leaf("saved", k) for k, n in enumerate(self.saved)}
        available |= {n: leaf("row", j) for n, j in self.number_of.items()}
        roots = dict(zip(step.backward, substitute(step.backward_roots, available), strict=True))
        # States that products take in, and their gradients.
        self.reached = {step.hidden: leaf("d", step.states[0])}
        self.reached |= {n: leaf("d", n.value[1]) for n in step.operand_of.values() if is_state(n)}
        gradients = self.reached.values()
        added = {leaf("d", s): leaf("d", s) + leaf("each", s) for s in self.given if leaf("d", s) not in gradients}
        self.roots = dict(zip(roots, substitute(list(roots.values()), added), strict=True))
        carries = {leaf("d", s): self.roots["s", s] for s in step.states}
        self.backward = Staging(list(self.roots.values()), dict.fromkeys(gradients, 0), carries)
        self.carried = frozenset(s for s in step.states if self.roots["s", s] is not ZERO)
        # What one stage hands to a later one, vectors and single numbers.
        crossing = self.backward.crossing
        self.cross = {n: j for j, n in enumerate(n for n in crossing if not n.uniform)}
        self.handed = {n: j for j, n in enumerate(n for n in crossing if n.uniform)}

    def _slots(self) -> None:
        """Where what is kept lies, and the gradients that take its place."""
        step, forward, backward = self.step, self.forward, self.backward
        self.grad_slot = {("x", g): self.x_slot[g] for g in step.x_gates} | {
            ("u", g): self.u_slot[g] for g in step.u_gates
        }
        written = {slot: backward.stage(self.roots[key]) for key, slot in self.grad_slot.items()}
        used = {
            int(n.value[1]): k
            for k in range(backward.depth)
            for n in backward.needs(k)
            if n.op == "leaf" and n.value[0] == "saved"
        }
        slots = assign_slots(
            [(forward.stage(n), used.get(k, -1), n in step.operands) for k, n in enumerate(self.saved)],
            written,
            {self.x_slot[g]: self._start_read(g) for g in step.x_gates},
            [self.x_slot[n.value[1]] if n in self.in_slots else None for n in self.saved],
        )
        self.slot_of = dict(zip(self.saved, slots, strict=True))
        self.slots = max([len(written), *(s + 1 for s in slots)])
        self.stays = {n for n in self.in_slots if self.slot_of.get(n) == self.x_slot[n.value[1]]}

    def _start_read(self, gate: str) -> int:
        """The last stage that reads a gate's input projection."""
        forward = self.forward
        if not self.step.ahead or gate in self.step.shared:
            return forward.stage(self.step.start_of[gate])
        stages = range(forward.depth)
        kept = [[n for n in self.saved if forward.stage(n) == k] for k in stages]
        return max(k for k in stages if leaf("x", gate) in forward.needs(k) + forward.needs(k, kept[k]))

    def _number(self, n: Node) -> Place:
        """Of a uniform value of the forward pass that training keeps, or a stage hands to another group."""
        return Place("saved", self.slots, uniform=True, number=self.number_of[n])

    def _number_back(self, n: Node) -> Place:
        """The same in the backward pass, which hands on some of its own."""
        if n in self.handed:
            return Place("cross", len(self.cross), "static", uniform=True, number=self.handed[n])
        return Place("saved", self.slots, uniform=True, number=n.value[1])

    def _forward_stage(self, k: int) -> Stage:
        step, forward = self.step, self.forward
        accumulators: list[tuple[Node, tuple[Place, ...]]] = []
        targets: dict[Place, list[tuple[str, str, int]]] = {}  # operand -> (matrix, gate, accumulator)
        for node in forward.accumulators(k):
            start: tuple[Place, ...] = ()
            index = len(accumulators)
            matrix, gate = node.value[:2] if node.op == "product" else ("ih", node.value[1])
            if node.op == "product":
                operand = node.args[0]
                if is_state(operand):
                    rows = Place("s." + operand.value[1], 0, "before")
                else:
                    rows = Place("saved", self.slot_of[operand])
                targets.setdefault(rows, []).append((matrix, gate, index))
                if matrix == "hh" and gate not in step.shared:
                    start = (Place("bias", step.bias_gates.index(gate), "static"),)
            if matrix == "ih" or gate in step.shared:
                start = (Place("start", self.x_slot[gate]),)
                targets.setdefault(Place("x"), []).append(("ih", gate, index))
            accumulators.append((node, start))
        x_rows = targets.pop(Place("x"), None)  # last, so that the products of one time step's state come first
        if x_rows:
            targets[Place("x")] = x_rows
        segments = [
            Segment(rows, Weights(t[0][0], tuple(g for _, g, _ in t)), tuple(i for _, _, i in t))
            for rows, t in targets.items()
        ]
        states = zip(step.outputs, step.states, strict=True)
        outputs = [(n, Place("s." + s), False) for n, s in states if forward.stage(n) == k]
        outputs += [
            (n, Place("saved", self.slot_of[n]), n not in forward.crossing and n not in step.operands)
            for n in self.saved
            if forward.stage(n) == k and n not in self.stays
        ]
        loads = {n: self._load(n) for n in forward.needs(k, [n for n, _, _ in outputs])}
        size = "P" if any(n.op == "product" and n.value[0] == "hr" for n, _ in accumulators) else "H"
        return Stage(size, tuple(accumulators), tuple(segments), tuple(outputs), loads)

    def _load(self, n: Node) -> Place:
        """Where a stage of the forward pass finds what it does not compute."""
        if n.uniform:
            return self._number(n) if n in self.number_of else _UNPLACED
        if n.op == "leaf" and n.value[0] == "x":  # where it is not made ahead, a product of this step, handed on
            if self.step.ahead:
                return Place("start", self.x_slot[n.value[1]])
        elif n.op == "leaf":
            return Place("s." + n.value[1], 0, "before") if is_state(n) else _own_place(n)
        return Place("saved", self.slot_of[n]) if n in self.slot_of else Place("s." + self.step.new_state[n])

    def _backward_stage(self, k: int, project: bool) -> Stage:
        step, backward, roots, first = self.step, self.backward, self.roots, self.step.states[0]
        accumulators: list[tuple[Node, tuple[Place, ...]]] = []
        segments = []
        for state, gradient in self.reached.items() if k == 0 else ():
            start: tuple[Place, ...] = ()  # nothing but products reaches a derived state
            if state is step.hidden:
                start = (Place("dy"), Place("carry." + first, 0, "static" if first in self.carried else "first"))
            elif state.value[1] not in step.derived:
                start = (Place("carry." + state.value[1], 0, "static"),)
                start += (Place("each." + state.value[1]),) if state.value[1] in self.given else ()
            for run in runs([g for g in step.u_gates if step.operand_of[g] is state], self.u_slot):
                weights = Weights("hh", run, transposed=True)
                segments.append(Segment(Place("grad", self.u_slot[run[0]], "before"), weights, (len(accumulators),)))
            accumulators.append((gradient, start))
        for node in backward.accumulators(k):
            if node not in self.reached.values():
                matrix, gate = node.value
                rows = Place("projected") if matrix == "hr" else Place("grad", self.u_slot[gate])
                segments.append(Segment(rows, Weights(matrix, (gate,), transposed=True), (len(accumulators),)))
                accumulators.append((node, ()))
        outputs = [
            (roots[key], Place("projected") if key[0] == "hr" else Place("grad", self.grad_slot[key]), False)
            for key in roots
            if key[0] in ("x", "u", "hr") and not (key[0] == "u" and key[1] in step.shared)
        ]
        outputs += [
            (roots["s", s], Place("carry." + s, 0, "static"), False)
            for s in step.states
            if s not in step.derived and (s in self.carried or s != first)
        ]
        outputs += [(roots["own", n], _total_place(n), False) for n in step.own]
        outputs = [o for o in outputs if backward.stage(o[0]) == k]
        outputs += [(n, Place("cross", j, "static"), False) for n, j in self.cross.items() if backward.stage(n) == k]
        loads = {n: self._load_back(n, k) for n in backward.needs(k, [n for n, _, _ in outputs])}
        size = "P" if project and k == 0 else "H"
        return Stage(size, tuple(accumulators), tuple(segments), tuple(outputs), loads)

    def _load_back(self, n: Node, k: int) -> Place:
        """Where stage k of the backward pass finds what it does not compute."""
        if n.uniform:
            return self._number_back(n) if n.op == "leaf" or n in self.handed else _UNPLACED
        if n in self.cross and self.backward.stage(n) < k:
            return Place("cross", self.cross[n], "static")
        kind, name = n.value
        if kind == "saved":
            return Place("saved", self.slot_of[self.saved[name]])
        if kind in ("d", "total"):
            return Place({"d": "carry.", "total": "total."}[kind] + name, 0, "static")
        if kind == "each":
            return Place("each." + name)
        if kind in ("s", "now"):
            return Place("s." + name, 0, "now" if kind == "now" else "after")
        return _own_place(n)

    def programs(self, name: str, gates: tuple[str, ...], project: bool) -> Programs:
        """Both programs, and where they leave what."""
        step, forward, backward = self.step, self.forward, self.backward
        label = name + ("_projected" if project else "")
        numbers = tuple((n, self._number(n), n not in forward.crossing) for n in self.number_of)
        handed = tuple((n, self._number_back(n), False) for n in self.handed)
        stages = [self._forward_stage(k) for k in range(forward.depth)]
        stages_back = [self._backward_stage(k, project) for k in range(backward.depth)]
        return Programs(
            Program(label + "_forward", _grouped(forward, stages, numbers, self._number), gates),
            Program(label + "_backward", _grouped(backward, stages_back, handed, self._number_back), gates),
            slots=self.slots,
            gradients=Gradients(
                self.x_slot,
                self.u_slot,
                {g: v.value[1] if is_state(v) else self.slot_of[v] for g, v in step.operand_of.items()},
                self.slot_of[step.outputs[0].args[0]] if project else None,
                step.own,
            ),
            states=step.states,
            derived=tuple(step.derived.values()),
            streams=frozenset(n.value[1] for n in self.reached if n is not step.hidden),
            square=step.square,
            start_gates=step.x_gates,
            bias_gates=step.bias_gates,
            shared=frozenset(step.shared),
            carried=self.carried,
            cross=len(self.cross),
            numbers=(len(self.number_of), len(self.handed)),
            ahead=step.ahead,
        )


_UNPLACED = Place("", uniform=True)  # a uniform value that the group computes itself


def _grouped(
    staging: Staging, stages: list[Stage], kept: Outputs, number: Callable[[Node], Place]
) -> tuple[Stage, ...]:
    """Stages that are passes over a row put together; kept: uniform values that are stored, number: their places."""
    found: list[Stage] = []
    for group in range(staging.group[-1] + 1):
        levels = [k for k in range(staging.depth) if staging.group[k] == group]
        if not staging.is_pass[levels[0]]:
            found.append(stages[levels[0]])
            continue
        outputs = tuple(o for o in kept if staging.group_of(o[0]) == group)
        loads: dict[Node, Place] = {}
        passes = []
        for k in levels:
            single = {n: place for n, place in stages[k].loads.items() if place.uniform}
            vectors = {n: place for n, place in stages[k].loads.items() if n not in single}
            for n in single:
                given = staging.inherited(n, k) if n.uniform else [n]
                loads |= {m: _own_place(m) if m.value and m.value[0] in SINGLE else number(m) for m in given}
            passes.append(Pass(tuple(staging.reductions(k)), stages[k].outputs, vectors))
        for n, _, _ in outputs:
            given = staging.inherited(n, levels[-1])
            loads |= {m: _own_place(m) if m.value and m.value[0] in SINGLE else number(m) for m in given}
        found.append(Stage("H", (), (), outputs, loads, tuple(passes)))
    return tuple(found)


def _own_place(n: Node) -> Place:
    kind, name = n.value
    return Place("own." + name, 0, "now" if kind in ("step_input", "mark") else "static", uniform=kind in SINGLE)


def _total_place(n: Node) -> Place:
    return Place("total." + n.value[1], 0, "now" if n.value[0] == "step_input" else "static")


def runs(gates: list[str], slot: dict[str, int]) -> list[tuple[str, ...]]:
    """Gates grouped so that within a group the slots follow each other: one product each."""
    found: list[tuple[str, ...]] = []
    for g in gates:
        if found and slot[g] == slot[found[-1][-1]] + 1:
            found[-1] += (g,)
        else:
            found.append((g,))
    return found
