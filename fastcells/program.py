"""From a cell to programs: one time step, forward and backward, as stages that an engine can run.

A stage is a matrix product with a pointwise epilogue. Its accumulators start from stored vectors, take up products of
rows with weights, and the epilogue turns them, with other stored vectors, into what is stored. Most cells have one
stage; a product of a computed vector (reset-before GRU, projection) starts another, since it needs all units of it.
Sums over the units (layer normalisation) make passes over a row, which follow each other in a stage without products.

What training stores, time step by time step, is one buffer of `slots` vectors of the hidden size: on the way up the
input projection of a gate is replaced by what the backward pass needs, on the way down that by the gate's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .expression import (
    OPERATIONS,
    ZERO,
    Node,
    gradients,
    is_condition,
    is_reduction,
    is_uniform,
    leaf,
    substitute,
    topological,
)

if TYPE_CHECKING:
    from .cell import Cell

SAVE_COST = 4.0  # of keeping a value for the backward pass; Operation.cost has the other side of the scale
SAVE_NUMBER = 0.05  # of keeping a single number for all units


@dataclass(frozen=True)
class Place:
    """Where one row's vector is stored: `slot` vectors of the hidden size into the row of a buffer.

    when: "now" at this time step; "before" at the step that was processed before it, "after" at the one processed next
    (the buffer's initial rows where a sequence has no such step); "static" the same at all steps; "first" like static,
    but the initial rows at a sequence's first processed step. uniform: a single number that stands for all units, the
    one `number` numbers further.
    """

    buffer: str
    slot: int = 0
    when: str = "now"
    uniform: bool = False
    number: int = 0


@dataclass(frozen=True)
class Weights:
    """Rows or columns of a weight matrix as a product uses them.

    matrix: "ih", "hh" or "hr". gates: the blocks used. transposed: rows of the operand meet the matrix's rows (a
    backward product, all gates summed) rather than its columns (forward, one result a gate).
    """

    matrix: str
    gates: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Segment:
    """Adds rows @ weights to the accumulators `targets`. strided: numbers of a row need not be adjacent."""

    rows: Place
    weights: Weights
    targets: tuple[int, ...]
    strided: bool = False


Outputs = tuple[tuple[Node, Place, bool], ...]


@dataclass(frozen=True)
class Pass:
    """Once over all units of a row: computes and stores the outputs, and takes the sums that reductions are made of."""

    reductions: tuple[Node, ...]
    outputs: Outputs
    loads: dict[Node, Place]


@dataclass(frozen=True)
class Stage:
    """accumulators: (the node that each one computes, the places summed to start from); outputs: (value, place,
    whether only training stores it); loads: stored vectors by the leaf that stands for them. passes: of a stage that
    takes a row at a time, then without accumulators, with outputs and loads of single numbers only."""

    size: str  # "H" hidden units or "P" projected ones
    accumulators: tuple[tuple[Node, tuple[Place, ...]], ...]
    segments: tuple[Segment, ...]
    outputs: Outputs
    loads: dict[Node, Place]
    passes: tuple[Pass, ...] = ()

    @property
    def parts(self) -> tuple[Stage | Pass, ...]:
        """The stage and its passes: all that has outputs and loads."""
        return self, *self.passes


@dataclass(frozen=True)
class Program:
    """What an engine runs at each time step, stage by stage. gates: the order of the weights' blocks of rows."""

    name: str
    stages: tuple[Stage, ...]
    gates: tuple[str, ...]

    def buffers(self) -> list[str]:
        """The names of all buffers read or written."""
        found: dict[str, None] = {}
        for stage in self.stages:
            used = [p for _, start in stage.accumulators for p in start] + [s.rows for s in stage.segments]
            used += [p for part in stage.parts for p in [*(p for _, p, _ in part.outputs), *part.loads.values()]]
            found |= dict.fromkeys(p.buffer for p in used)
        return list(found)

    def describe(self) -> str:
        """All of the program in one string: equal strings, equal kernels."""
        number: dict[Node, int] = {}
        lines = [repr(self.gates)]
        roots = [n for s in self.stages for n, _ in s.accumulators]
        for s in self.stages:
            roots += [n for part in s.parts for n in [*(o for o, _, _ in part.outputs), *part.loads]]
            roots += [n for part in s.passes for n in part.reductions]
        for node in topological(roots):
            number[node] = len(number)
            lines.append(f"{node.op} {node.value!r} {[number[a] for a in node.args]}")
        for s in self.stages:
            accumulators = [(number[n], places) for n, places in s.accumulators]
            lines.append(f"{s.size} {accumulators} {s.segments}")
            for part in s.parts:
                outputs = [(number[n], *rest) for n, *rest in part.outputs]
                loads = [(number[n], place) for n, place in part.loads.items()]
                reductions = [number[n] for n in part.reductions] if isinstance(part, Pass) else []
                lines.append(f"{outputs} {loads} {reductions}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Gradients:
    """Where the backward pass leaves the gradients of the pre-activations: slot by gate, and the products' operands."""

    x: dict[str, int]  # W_g x_t + b_g
    u: dict[str, int]  # U_g v + b'_g
    operands: dict[str, str | int]  # for each u gate the state that v is, or v's slot
    projected: int | None  # slot of the vector that is projected, if there is a projection
    own: tuple[Node, ...]  # leaves of the cell's parameters, scalars and inputs that buffers "d.<name>" are for


@dataclass(frozen=True)
class Programs:
    """A cell made ready: its programs and the layout of what training keeps."""

    forward: Program
    backward: Program
    slots: int
    gradients: Gradients
    states: tuple[str, ...]  # the cell's, then the derived ones
    derived: tuple[Node, ...]  # what the derived states are, over leaves of the cell's states
    streams: frozenset[str]  # states other than the first that enter recurrent products
    square: bool  # a projection has to keep the hidden size
    start_gates: tuple[str, ...]  # x gates in the order of their slots
    bias_gates: tuple[str, ...]  # gates whose recurrent product starts from its own bias
    shared: frozenset[str]  # gates where x.g and u.g share one accumulator and one bias
    carried: frozenset[str]  # states whose gradient reaches the step before not only through the products
    cross: int  # vectors that the backward pass hands from one of its stages to a later one
    numbers: tuple[int, int]  # single numbers a row: that training keeps, and that the backward pass hands on
    ahead: bool  # input projections have to be made before the time loop

    def width(self, hidden: int) -> int:
        """Numbers of one row of what training keeps."""
        return self.slots * hidden + -(-self.numbers[0] // 16) * 16

    def cross_width(self, hidden: int) -> int:
        """Numbers of one row of what the backward pass hands on."""
        return self.cross * hidden + -(-self.numbers[1] // 16) * 16


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
    step = _Step(states, gates, traced, project, feed)
    states = step.states
    forward = _Staging(step.outputs, step.forward_accumulators)
    x_slot = {g: k for k, g in enumerate(step.x_gates)}
    u_slot = {g: x_slot[g] if g in step.shared else len(x_slot) + step.bias_gates.index(g) for g in step.u_gates}

    # States are kept at every step anyway, so the backward pass has them for nothing.
    stored = {n: leaf("now", s) for n, s in step.new_state.items()}
    forced = {n for n in forward.crossing if n not in step.new_state} | step.operands
    wanted = _forward_values(step.backward_roots, set(forward.nodes))
    # An input projection that is made ahead lies in its slot: kept for nothing too.
    in_slots = {leaf("x", g) for g in step.x_gates if step.ahead and g not in step.shared} - step.operands
    while True:  # until whatever a stage stores can be had there
        saved = _choose_saved(forward.nodes, wanted, set(stored), forced, in_slots)
        missing = {
            m
            for k in range(forward.depth)
            for n in forward.needs(k, [n for n in saved if forward.stage(n) == k])
            for m in (forward.inherited(n, k) if is_uniform(n) else [n])
            if m.op != "leaf" and m not in saved and m not in stored
        }
        if not missing:
            break
        forced |= missing
    number_of = {n: j for j, n in enumerate(n for n in saved if is_uniform(n))}
    saved = [n for n in saved if n not in number_of]
    available = {**stored, **{n: leaf("saved", k) for k, n in enumerate(saved)}}
    available |= {n: leaf("row", j) for n, j in number_of.items()}
    roots = dict(zip(step.backward, substitute(step.backward_roots, available), strict=True))
    reached = {step.hidden: leaf("d", states[0])}  # states that products take in, and their gradients
    reached |= {n: leaf("d", n.value[1]) for n in step.operand_of.values() if step.is_state(n)}
    added = {leaf("d", s): leaf("d", s) + leaf("each", s) for s in given if leaf("d", s) not in reached.values()}
    roots = dict(zip(roots, substitute(list(roots.values()), added), strict=True))
    carries = {leaf("d", s): roots["s", s] for s in states}
    backward = _Staging(list(roots.values()), dict.fromkeys(reached.values(), 0), carries)

    grad_slot = {("x", g): x_slot[g] for g in step.x_gates} | {("u", g): u_slot[g] for g in step.u_gates}
    written = {slot: backward.stage(roots[key]) for key, slot in grad_slot.items()}
    used = {
        int(n.value[1]): k
        for k in range(backward.depth)
        for n in backward.needs(k)
        if n.op == "leaf" and n.value[0] == "saved"
    }

    def start_read(gate: str) -> int:
        """The last stage that reads a gate's input projection."""
        if leaf("x", gate) not in in_slots:
            return forward.stage(step.start_of[gate])
        stages = range(forward.depth)
        kept = [[n for n in saved if forward.stage(n) == k] for k in stages]
        return max(k for k in stages if leaf("x", gate) in forward.needs(k) + forward.needs(k, kept[k]))

    slot_of = dict(
        zip(
            saved,
            _assign_slots(
                [(forward.stage(n), used.get(k, -1), n in step.operands) for k, n in enumerate(saved)],
                written,
                {x_slot[g]: start_read(g) for g in step.x_gates},
                [x_slot[n.value[1]] if n in in_slots else None for n in saved],
            ),
            strict=True,
        )
    )
    slots = max([len(written), *(s + 1 for s in slot_of.values())])
    stays = {n for n in in_slots if n in slot_of and slot_of[n] == x_slot[n.value[1]]}

    def number(n: Node) -> Place:
        """Of a uniform value that training keeps, or a stage hands to another group."""
        return Place("saved", slots, uniform=True, number=number_of[n])

    def kept_number(n: Node) -> Place:
        """The same in the backward pass, which hands on some of its own."""
        if n in handed:
            return Place("cross", len(cross), "static", uniform=True, number=handed[n])
        return Place("saved", slots, uniform=True, number=n.value[1])

    stages = []
    for k in range(forward.depth):
        accumulators: list[tuple[Node, tuple[Place, ...]]] = []
        targets: dict[Place, list[tuple[str, str, int]]] = {}  # operand -> (matrix, gate, accumulator)
        for node in forward.accumulators(k):
            start: tuple[Place, ...] = ()
            index = len(accumulators)
            matrix, gate = node.value[:2] if node.op == "product" else ("ih", node.value[1])
            if node.op == "product":
                operand = node.args[0]
                if step.is_state(operand):
                    rows = Place("s." + operand.value[1], 0, "before")
                else:
                    rows = Place("saved", slot_of[operand])
                targets.setdefault(rows, []).append((matrix, gate, index))
                if matrix == "hh" and gate not in step.shared:
                    start = (Place("bias", step.bias_gates.index(gate), "static"),)
            if matrix == "ih" or gate in step.shared:
                start = (Place("start", x_slot[gate]),)
                targets.setdefault(Place("x"), []).append(("ih", gate, index))
            accumulators.append((node, start))
        x_rows = targets.pop(Place("x"), None)  # last, so that the products of one time step's state come first
        if x_rows:
            targets[Place("x")] = x_rows
        segments = [
            Segment(rows, Weights(t[0][0], tuple(g for _, g, _ in t)), tuple(i for _, _, i in t))
            for rows, t in targets.items()
        ]
        outputs = [
            (n, Place("s." + s), False) for n, s in zip(step.outputs, states, strict=True) if forward.stage(n) == k
        ]
        outputs += [
            (n, Place("saved", slot_of[n]), n not in forward.crossing and n not in step.operands)
            for n in saved
            if forward.stage(n) == k and n not in stays
        ]
        loads = {}
        for n in forward.needs(k, [n for n, _, _ in outputs]):
            if is_uniform(n):
                loads[n] = number(n) if n in number_of else _UNPLACED
            elif n.op == "leaf" and n.value[0] == "x":
                loads[n] = Place("start", x_slot[n.value[1]])
            elif n.op == "leaf":
                loads[n] = Place("s." + n.value[1], 0, "before") if n.value[0] == "s" else _own_place(n)
            else:
                loads[n] = Place("saved", slot_of[n]) if n in slot_of else Place("s." + step.new_state[n])
        size = "P" if any(n.op == "product" and n.value[0] == "hr" for n, _ in accumulators) else "H"
        stages.append(Stage(size, tuple(accumulators), tuple(segments), tuple(outputs), loads))
    label = name + ("_projected" if project else "")
    kept = [(n, number(n), n not in forward.crossing) for n in number_of]
    forward_program = Program(label + "_forward", _grouped(forward, stages, kept, number), gates)

    carried = frozenset(s for s in states if roots["s", s] is not ZERO)
    cross = {n: j for j, n in enumerate(n for n in backward.crossing if not is_uniform(n))}
    handed = {n: j for j, n in enumerate(n for n in backward.crossing if is_uniform(n))}
    stages = []
    for k in range(backward.depth):
        accumulators, segments = [], []
        for state, gradient in reached.items() if k == 0 else ():
            start = ()  # nothing but products reaches a derived state
            if state is step.hidden:
                start = (Place("dy"), Place("carry." + states[0], 0, "static" if states[0] in carried else "first"))
            elif state.value[1] not in step.derived:
                start = (Place("carry." + state.value[1], 0, "static"),)
                start += (Place("each." + state.value[1]),) if state.value[1] in given else ()
            for run in runs([g for g in step.u_gates if step.operand_of[g] is state], u_slot):
                weights = Weights("hh", run, transposed=True)
                segments.append(Segment(Place("grad", u_slot[run[0]], "before"), weights, (len(accumulators),)))
            accumulators.append((gradient, start))
        for node in backward.accumulators(k):
            if node not in reached.values():
                matrix, gate = node.value
                rows = Place("projected") if matrix == "hr" else Place("grad", u_slot[gate])
                segments.append(Segment(rows, Weights(matrix, (gate,), transposed=True), (len(accumulators),)))
                accumulators.append((node, ()))
        results = [
            (roots[key], Place("projected") if key[0] == "hr" else Place("grad", grad_slot[key]), False)
            for key in roots
            if key[0] in ("x", "u", "hr") and not (key[0] == "u" and key[1] in step.shared)
        ]
        results += [
            (roots["s", s], Place("carry." + s, 0, "static"), False)
            for s in states
            if s not in step.derived and (s in carried or s != states[0])
        ]
        results += [(roots["own", n], _total_place(n), False) for n in step.own]
        results = [r for r in results if backward.stage(r[0]) == k]
        results += [(n, Place("cross", j, "static"), False) for n, j in cross.items() if backward.stage(n) == k]
        loads = {}
        for n in backward.needs(k, [n for n, _, _ in results]):
            if is_uniform(n):
                loads[n] = kept_number(n) if n.op == "leaf" or n in handed else _UNPLACED
            elif n in cross and backward.stage(n) < k:
                loads[n] = Place("cross", cross[n], "static")
            elif n.value[0] == "saved":
                loads[n] = Place("saved", slot_of[saved[n.value[1]]])
            elif n.value[0] == "d":
                loads[n] = Place("carry." + n.value[1], 0, "static")
            elif n.value[0] == "each":
                loads[n] = Place("each." + n.value[1])
            elif n.value[0] == "total":
                loads[n] = Place("total." + n.value[1], 0, "static")
            elif n.value[0] not in ("s", "now"):
                loads[n] = _own_place(n)
            else:
                loads[n] = Place("s." + n.value[1], 0, "now" if n.value[0] == "now" else "after")
        size = "P" if project and k == 0 else "H"
        stages.append(Stage(size, tuple(accumulators), tuple(segments), tuple(results), loads))

    return Programs(
        forward_program,
        Program(
            label + "_backward",
            _grouped(backward, stages, [(n, kept_number(n), False) for n in handed], kept_number),
            gates,
        ),
        slots=slots,
        gradients=Gradients(
            x_slot,
            u_slot,
            {g: v.value[1] if step.is_state(v) else slot_of[v] for g, v in step.operand_of.items()},
            slot_of[step.outputs[0].args[0]] if project else None,
            step.own,
        ),
        states=states,
        derived=tuple(step.derived.values()),
        streams=frozenset(n.value[1] for n in reached if n is not step.hidden),
        square=step.square,
        start_gates=step.x_gates,
        bias_gates=step.bias_gates,
        shared=frozenset(step.shared),
        carried=carried,
        cross=len(cross),
        numbers=(len(number_of), len(handed)),
        ahead=step.ahead,
    )


_UNPLACED = Place("", uniform=True)  # a uniform value that the group computes itself


def _grouped(
    staging: _Staging, stages: list[Stage], kept: list[tuple[Node, Place, bool]], number: Callable[[Node], Place]
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
                given = staging.inherited(n, k) if is_uniform(n) else [n]
                loads |= {m: _own_place(m) if m.value and m.value[0] == "scalar" else number(m) for m in given}
            passes.append(Pass(tuple(staging.reductions(k)), stages[k].outputs, vectors))
        for n, _, _ in outputs:
            given = staging.inherited(n, levels[-1])
            loads |= {m: _own_place(m) if m.value and m.value[0] == "scalar" else number(m) for m in given}
        found.append(Stage("H", (), (), outputs, loads, tuple(passes)))
    return tuple(found)


OWN = ("p", "scalar", "input", "step_input")  # kinds of leaves that are a cell's own tensors


def _own_place(n: Node) -> Place:
    kind, name = n.value
    return Place("own." + name, 0, "now" if kind == "step_input" else "static", uniform=kind == "scalar")


def _total_place(n: Node) -> Place:
    return Place("total." + n.value[1], 0, "now" if n.value[0] == "step_input" else "static")


def _derive(outputs: list[Node], states: tuple[str, ...]) -> tuple[list[Node], dict[str, Node]]:
    """Operands of products that only need the step before, such as p.mask * s.h, become states, made in that step.

    Returns the outputs with those of the new states, and what the new states are over leaves of the given ones.
    """

    def early(node: Node) -> bool:
        leaves = [n for n in topological([node]) if n.op == "leaf" or n.op == "product"]
        return all(n.op == "leaf" and n.value[0] not in ("x", "step_input") for n in leaves)

    products = [n for n in topological(outputs) if n.op == "product" and n.value[0] == "hh"]
    operands = [n.args[0] for n in products if not _Step.is_state(n.args[0]) and early(n.args[0])]
    derived = {f"{states[0]}+{k}": v for k, v in enumerate(dict.fromkeys(operands))}
    state_of = {v: leaf("s", name) for name, v in derived.items()}
    replace = {n: Node("product", (state_of[n.args[0]],), n.value) for n in products if n.args[0] in state_of}
    outputs = substitute(outputs, replace)
    new = dict(zip([leaf("s", s) for s in states], outputs, strict=True))
    return outputs + substitute(list(derived.values()), new), derived


class _Step:
    """One time step of a cell as a graph, with the gradients of its pre-activations and states."""

    def __init__(
        self, states: tuple[str, ...], gates: tuple[str, ...], traced: tuple[Node, ...], project: bool, feed: bool
    ):
        outputs = list(traced)
        self.hidden = leaf("s", states[0])
        # Where h is not only what u.g multiplies, or u.g multiplies another vector, sizes have to agree.
        self.square = any(
            self.hidden in n.args if n.op != "product" else n.args[0] is not self.hidden for n in topological(outputs)
        )
        if project:
            outputs[0] = Node("product", (outputs[0],), ("hr", states[0]))
        outputs, self.derived = _derive(outputs, states)
        self.states = states = states + tuple(self.derived)
        self.outputs, self.shared = _share(outputs)
        nodes = topological(self.outputs)
        products = sorted(
            (n for n in nodes if n.op == "product"), key=lambda n: gates.index(n.value[1]) if n.value[0] == "hh" else -1
        )
        x_leaves = [leaf("x", g) for g in gates if leaf("x", g) in nodes]
        self.new_state = dict(zip(self.outputs, states, strict=True))
        self.operand_of = {n.value[1]: n.args[0] for n in products if n.value[0] == "hh"}
        self.operands = {n.args[0] for n in products if not self.is_state(n.args[0])}
        self.u_gates = tuple(self.operand_of)
        self.bias_gates = tuple(g for g in self.u_gates if g not in self.shared)
        self.x_gates = tuple(g for g in gates if g in self.shared or leaf("x", g) in x_leaves)
        self.start_of = {n.value[1]: n for n in [*x_leaves, *products] if n.op == "leaf" or n.value[1] in self.shared}

        # A product of a computed vector needs all of that vector: it begins a stage. Nodes that need no stage get -1.
        self.forward_accumulators = {n: 0 if self.is_state(n.args[0]) else None for n in products}
        # Input projections that are summed over the units have to be there before.
        self.ahead = any(map(is_reduction, nodes))
        if not self.ahead:
            self.forward_accumulators |= dict.fromkeys(x_leaves, -1)

        found: dict[tuple[str, str], Node] = {}

        def other(node: Node, grad: Node):
            if node.op == "product":
                matrix, gate = node.value[:2]
                found["hr" if matrix == "hr" else "u", gate] = grad
                if gate in self.shared and matrix == "hh":
                    found["x", gate] = grad
                if not self.is_state(node.args[0]):
                    yield node.args[0], Node("transposed", (grad,), (matrix, gate))
            elif node.value[0] == "x":
                found["x", node.value[1]] = grad

        grads = gradients(self.outputs, [leaf("d", s) for s in states], other)
        keys = [("x", g) for g in self.x_gates] + [("u", g) for g in self.u_gates]
        self.backward = {k: found.get(k, ZERO) for k in keys}
        self.backward |= {k: v for k, v in found.items() if k[0] == "hr"}
        self.backward |= {("s", s): grads.get(leaf("s", s), ZERO) for s in states}
        kinds = OWN if feed else OWN[:2]
        self.own = tuple(n for n in topological(self.outputs) if n.op == "leaf" and n.value[0] in kinds and n in grads)
        for n in self.own:  # sums over the steps, but for an input of every step
            before = ZERO if n.value[0] == "step_input" else leaf("total", n.value[1])
            self.backward["own", n] = before + grads[n]
        self.backward_roots = list(self.backward.values())

    @staticmethod
    def is_state(node: Node) -> bool:
        return node.op == "leaf" and node.value[0] == "s"


class _Staging:
    """Which stage computes which node.

    accumulators: nodes that only a stage's product makes: its number, None for one stage after its operand, -1 for the
    stage that first uses it; "transposed" products come one stage after their operand too. overwritten: leaves whose
    place a stage writes, and what it writes there. Whatever depends on none of
    these is computed in each stage that wants it. Here a pass over a row counts as a stage: a reduction takes its sum
    in the first one that has its arguments and no products, and is known from the next one on.
    """

    def __init__(
        self, roots: list[Node], accumulators: dict[Node, int | None], overwritten: dict[Node, Node] | None = None
    ) -> None:
        self.nodes = topological(roots)
        self._level: dict[Node, int] = {}
        self._accumulators = [n for n in accumulators if n in self.nodes]
        self._accumulators += [n for n in self.nodes if n.op == "transposed"]
        operands = {a for n in self._accumulators if n.op in ("product", "transposed") for a in n.args}
        self._reductions = [n for n in self.nodes if is_reduction(n)]
        products: set[int] = set()  # stages that have some
        made_by_products = set(self._accumulators)
        while True:
            for n in self.nodes:
                # Where there are passes, whatever follows a product is left to the next one: there is one row at a time
                # in it, where tiles come in many shapes, each with an epilogue of its own to compile.
                late = made_by_products if self._reductions else ()
                level = max((self._level[a] + (a in late) for a in n.args), default=-1)
                if n in accumulators and accumulators[n] is not None:
                    level = accumulators[n]  # type: ignore[assignment]
                elif n in accumulators or n.op == "transposed":
                    level = max((self._level[a] for a in n.args), default=-1) + 1
                elif is_reduction(n):
                    level = max(level, 0)
                    while level in products:
                        level += 1
                    level += 1
                self._level[n] = max(level, 0) if n in operands and not _Step.is_state(n) else level
            for n in accumulators:
                if n in self._level and self._level[n] == -1:
                    self._level[n] = max(0, min((self._level[m] for m in self.nodes if n in m.args), default=0))
            found = {self._level[n] for n in self._accumulators}
            if not self._reductions or found <= products:
                break
            products |= found
        self.depth = max((self.stage(n) for n in self.nodes), default=0) + 1
        self._roots = roots
        # Passes that follow each other are one group; every other stage is one by itself.
        self.group, self.is_pass = (
            [0] * self.depth,
            [bool(self._reductions) and k not in products for k in range(self.depth)],
        )
        for k in range(1, self.depth):
            self.group[k] = self.group[k - 1] + (not (self.is_pass[k] and self.is_pass[k - 1]))
        self.crossing: dict[Node, None] = {}
        for n, by in (overwritten or {}).items():  # whoever needs it later has to be handed it
            last = self.stage(by)
            if n not in accumulators and any(n in self.needs(k) for k in range(last + 1, self.depth)):
                self._level[n] = last
        made = [*roots, *(n for n in self.nodes if n in operands)]
        for k in reversed(range(self.depth)):  # a later stage needs it, and cannot compute it from stored vectors
            for n in self.needs(k, [r for r in [*made, *self.crossing] if self.stage(r) == k]):
                for m in self.inherited(n, k) if is_uniform(n) else [n]:
                    if self._level[m] >= 0 and self._level[m] < k + is_uniform(m):
                        self.crossing[m] = None

    def group_of(self, node: Node) -> int:
        """The group that computes a node: a uniform one after the pass in which its last sum was taken."""
        return self.group[max(self._level[node] - is_uniform(node), 0)]

    def inherited(self, uniform: Node, stage: int) -> list[Node]:
        """What a stage's group has to load for a uniform value: leaves, and uniform values of earlier groups."""
        if uniform.op == "constant":
            return []
        if uniform.op == "leaf":
            return [uniform]
        if self._level[uniform] >= 0 and self.group_of(uniform) != self.group[stage] and not is_condition(uniform):
            return [uniform]
        if is_reduction(uniform):
            return []
        return [m for a in uniform.args for m in self.inherited(a, stage)]

    def _is_redone(self, node: Node) -> bool:
        """Whether a pass had better compute a value of an earlier one again, from the one argument that it loads."""
        if not self._reductions or node.op not in OPERATIONS or is_uniform(node) or OPERATIONS[node.op].cost > 0.25:
            return False
        free = [a.op == "constant" or is_uniform(a) or (a.op == "leaf" and a.value[0] != "d") for a in node.args]
        return free.count(False) <= 1

    def reductions(self, stage: int) -> list[Node]:
        """Whose sums a pass takes."""
        return [n for n in self._reductions if self._level[n] == stage + 1]

    def stage(self, node: Node) -> int:
        """The stage that computes this node, if it is asked to."""
        return max(self._level.get(node, 0), 0)

    def accumulators(self, stage: int) -> list[Node]:
        return [n for n in self._accumulators if self._level[n] == stage]

    def needs(self, stage: int, roots: list[Node] | None = None) -> list[Node]:
        """What a stage loads to compute the roots (or all that it has to): leaves, and values of earlier stages."""
        if roots is None:
            roots = [n for n in [*self._roots, *self.crossing] if self.stage(n) == stage]
        found: dict[Node, None] = {}
        seen: set[Node] = set(self.accumulators(stage))

        def visit(node: Node) -> None:
            if node in seen or node.op == "constant":
                return
            seen.add(node)
            level = self._level.get(node, -1)
            there = 0 <= level < stage + is_uniform(node) and not is_condition(node) and not self._is_redone(node)
            if there or node.op == "leaf" or (is_uniform(node) and self.is_pass[stage]):
                found[node] = None
            else:
                for a in node.args:
                    visit(a)

        for r in roots:
            visit(r)
        for n in self.reductions(stage):
            for a in n.args:
                visit(a)
        return list(found)


def _share(outputs: list[Node]) -> tuple[list[Node], set[str]]:
    """Where x.g and u.g only ever appear as x.g + u.g, make that sum one product node that starts from x.g."""
    nodes = topological(outputs)
    users: dict[Node, set[Node]] = {}
    for n in nodes:
        for a in n.args:
            users.setdefault(a, set()).add(n)
    replace, shared = {}, set()
    for n in nodes:
        if n.op != "add":
            continue
        for x, u in (n.args, n.args[::-1]):
            both = x.op == "leaf" and x.value[0] == "x" and u.op == "product" and u.value[1] == x.value[1]
            if both and users[x] == {n} and users[u] == {n} and x not in outputs and u not in outputs:
                replace[n] = (u, x.value[1])
                shared.add(x.value[1])
    # innermost first, so that a product's operand is itself already replaced
    done: dict[Node, Node] = {}
    for n in nodes:
        if n in replace:
            u, gate = replace[n]
            (operand,) = substitute([u.args[0]], done)
            done[n] = Node("product", (operand,), ("hh", gate, "shared"))
    return substitute(outputs, done), shared


def _forward_values(roots: list[Node], forward: set[Node]) -> set[Node]:
    """Forward numbers that the backward graph uses directly (a condition is had from what it compares)."""
    found: set[Node] = set()
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen or node.op == "constant":
            return
        seen.add(node)
        if node in forward and not is_condition(node):
            found.add(node)
        else:
            for a in node.args:
                visit(a)

    for r in roots:
        visit(r)
    return {n for n in found if not _is_kept(n)}


def _is_kept(node: Node) -> bool:
    """Whether the backward pass has the value anyway: a state, or a tensor of the cell's own."""
    return node.op == "leaf" and node.value[0] in ("s", *OWN)


def _choose_saved(
    nodes: list[Node], wanted: set[Node], stored: set[Node], forced: set[Node], in_slots: set[Node]
) -> list[Node]:
    """Which of the forward nodes to keep: the cheapest set from which all wanted ones can be had.

    in_slots: what is kept for nothing if it is wanted.

    Starts from keeping all that is wanted and takes every improving step: drop a value, or keep its arguments instead.
    """

    def recompute_cost(saved: frozenset[Node]) -> float:
        total = sum(SAVE_NUMBER if is_uniform(n) else SAVE_COST for n in saved if n not in in_slots)
        seen = set()

        def visit(node: Node) -> float:
            if node in seen or node in saved or node in stored or node.op == "constant":
                return 0.0
            seen.add(node)
            if _is_kept(node):
                return 0.0
            if node.op not in OPERATIONS:
                return float("inf")  # an input projection or a recurrent product is gone after the step
            return OPERATIONS[node.op].cost + sum(visit(a) for a in node.args)

        return total + sum(visit(n) for n in order if n in wanted)

    order = [n for n in nodes if n not in stored or n in forced]
    saved = frozenset(n for n in wanted if n not in stored) | forced
    best = recompute_cost(saved)
    improved = True
    while improved:
        improved = False
        for node in order:
            if node not in saved or node in forced:
                continue
            args = {b for a in node.args for b in (a.args if is_condition(a) else (a,))}
            args -= {a for a in args if a.op == "constant" or a in stored or _is_kept(a)}
            for trial in (saved - {node}, (saved - {node}) | args):
                cost = recompute_cost(trial)
                if cost < best:
                    saved, best, improved = trial, cost, True
                    break
    return [n for n in order if n in saved]


def _assign_slots(
    saved: list[tuple[int, int, bool]], written: dict[int, int], x_level: dict[int, int], lies: list[int | None]
) -> list[int]:
    """A slot for every saved value (level stored at, level last used at, kept for good).

    lies: the slot that a value is in to begin with, if it is.

    A value may take a gate's slot if it is stored no earlier than the gate's input projection is read, and last used no
    later than the gate's gradient is written.
    """
    extra = len(written) + len(saved)

    def fits(k: int, slot: int) -> bool:
        stored_at, used_at, kept = saved[k]
        if slot in written and (kept or used_at > written[slot]):
            return False
        return slot == lies[k] or stored_at >= x_level.get(slot, 0)

    def place(k: int, limit: int, holder: dict[int, int], seen: set[int]) -> bool:
        """Find a slot for value k, moving others if need be (an augmenting path of bipartite matching)."""
        for slot in sorted(range(limit), key=lambda s: s != lies[k]):
            if slot not in seen and fits(k, slot):
                seen.add(slot)
                if slot not in holder or place(holder[slot], limit, holder, seen):
                    holder[slot] = k
                    return True
        return False

    for limit in range(len(written), extra + 1):
        holder: dict[int, int] = {}
        if all(place(k, limit, holder, set()) for k in range(len(saved))):
            slot_of = {k: slot for slot, k in holder.items()}
            return [slot_of[k] for k in range(len(saved))]
    raise AssertionError("every saved value fits a slot of its own")


def runs(gates: list[str], slot: dict[str, int]) -> list[tuple[str, ...]]:
    """Gates grouped so that within a group the slots follow each other: one product each."""
    found: list[tuple[str, ...]] = []
    for g in gates:
        if found and slot[g] == slot[found[-1][-1]] + 1:
            found[-1] += (g,)
        else:
            found.append((g,))
    return found
