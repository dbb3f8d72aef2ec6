"""From a cell to programs: one time step, forward and backward, as stages that an engine can run.

A stage is a matrix product with a pointwise epilogue. Its accumulators start from stored vectors, take up products of
rows with weights, and the epilogue turns them, with other stored vectors, into what is stored. Most cells have one
stage; a product of a computed vector (reset-before GRU, projection) starts another, since it needs all units of it.

What training stores, time step by time step, is one buffer of `slots` vectors of the hidden size: on the way up the
input projection of a gate is replaced by what the backward pass needs, on the way down that by the gate's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .expression import OPERATIONS, ZERO, Node, gradients, is_condition, leaf, substitute, topological

if TYPE_CHECKING:
    from .cell import Cell

SAVE_COST = 4.0  # of keeping a value for the backward pass; Operation.cost has the other side of the scale


@dataclass(frozen=True)
class Place:
    """Where one row's vector is stored: `slot` vectors of the hidden size into the row of a buffer.

    when: "now" at this time step; "before" at the step that was processed before it, "after" at the one processed next
    (the buffer's initial rows where a sequence has no such step); "static" the same at all steps; "first" like static,
    but the initial rows at a sequence's first processed step. uniform: a single number that stands for all units.
    """

    buffer: str
    slot: int = 0
    when: str = "now"
    uniform: bool = False


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


@dataclass(frozen=True)
class Stage:
    """accumulators: (the node that each one computes, the places summed to start from); outputs: (value, place,
    whether only training stores it); loads: stored vectors by the leaf that stands for them."""

    size: str  # "H" hidden units or "P" projected ones
    accumulators: tuple[tuple[Node, tuple[Place, ...]], ...]
    segments: tuple[Segment, ...]
    outputs: tuple[tuple[Node, Place, bool], ...]
    loads: dict[Node, Place]


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
            used = [p for _, start in stage.accumulators for p in start]
            used += [s.rows for s in stage.segments] + [p for _, p, _ in stage.outputs] + list(stage.loads.values())
            found |= dict.fromkeys(p.buffer for p in used)
        return list(found)

    def describe(self) -> str:
        """All of the program in one string: equal strings, equal kernels."""
        number: dict[Node, int] = {}
        lines = [repr(self.gates)]
        roots = [
            n for s in self.stages for n in [*(a for a, _ in s.accumulators), *(o for o, _, _ in s.outputs), *s.loads]
        ]
        for node in topological(roots):
            number[node] = len(number)
            lines.append(f"{node.op} {node.value!r} {[number[a] for a in node.args]}")
        for s in self.stages:
            accumulators = [(number[n], places) for n, places in s.accumulators]
            outputs = [(number[n], *rest) for n, *rest in s.outputs]
            loads = [(number[n], place) for n, place in s.loads.items()]
            lines.append(f"{s.size} {accumulators} {s.segments} {outputs} {loads}")
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


@lru_cache(maxsize=256)
def build(cell: Cell, project: bool, feed: bool = False) -> Programs:
    """Derive both programs. project: a linear projection of the hidden state follows the cell (LSTM's proj_size).
    feed: the backward pass yields gradients of the cell's extra inputs too."""
    return _build(cell.name, cell.states, cell.gates, cell.trace(), project, feed)


@lru_cache(maxsize=256)
def _build(
    name: str, states: tuple[str, ...], gates: tuple[str, ...], traced: tuple[Node, ...], project: bool, feed: bool
) -> Programs:
    step = _Step(states, gates, traced, project, feed)
    states = step.states
    forward = _Staging(step.outputs, step.forward_accumulators)
    x_slot = {g: k for k, g in enumerate(step.x_gates)}
    u_slot = {g: x_slot[g] if g in step.shared else len(x_slot) + step.bias_gates.index(g) for g in step.u_gates}

    # States are kept at every step anyway, so the backward pass has them for nothing.
    stored = {n: leaf("now", s) for n, s in step.new_state.items()}
    forced = {n for n in forward.crossing if n not in step.new_state} | step.operands
    wanted = _forward_values(step.backward_roots, set(forward.nodes))
    while True:  # until whatever a stage stores can be had there
        saved = _choose_saved(forward.nodes, wanted, set(stored), forced)
        parts = [forward.needs(k, [n for n in saved if forward.stage(n) == k]) for k in range(forward.depth)]
        missing = {n for part in parts for n in part if n.op != "leaf" and n not in saved and n not in stored}
        if not missing:
            break
        forced |= missing
    available = {**stored, **{n: leaf("saved", k) for k, n in enumerate(saved)}}
    roots = dict(zip(step.backward, substitute(step.backward_roots, available), strict=True))
    reached = {step.hidden: leaf("d", states[0])}  # states that products take in, and their gradients
    reached |= {n: leaf("d", n.value[1]) for n in step.operand_of.values() if step.is_state(n)}
    backward = _Staging(list(roots.values()), dict.fromkeys(reached.values(), 0))

    grad_slot = {("x", g): x_slot[g] for g in step.x_gates} | {("u", g): u_slot[g] for g in step.u_gates}
    written = {slot: backward.stage(roots[key]) for key, slot in grad_slot.items()}
    used = {
        int(n.value[1]): k
        for k in range(backward.depth)
        for n in backward.needs(k)
        if n.op == "leaf" and n.value[0] == "saved"
    }
    slot_of = dict(
        zip(
            saved,
            _assign_slots(
                [(forward.stage(n), used.get(k, -1), n in step.operands) for k, n in enumerate(saved)],
                written,
                {x_slot[g]: forward.stage(step.start_of[g]) for g in step.x_gates},
            ),
            strict=True,
        )
    )

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
        outputs = [(n, Place("s." + step.new_state[n]), False) for n in step.outputs if forward.stage(n) == k]
        outputs += [
            (n, Place("saved", slot_of[n]), n not in forward.crossing and n not in step.operands)
            for n in saved
            if forward.stage(n) == k
        ]
        loads = {}
        for n in forward.needs(k, [n for n, _, _ in outputs]):
            if n.op == "leaf":
                loads[n] = Place("s." + n.value[1], 0, "before") if n.value[0] == "s" else _own_place(n)
            else:
                loads[n] = Place("saved", slot_of[n]) if n in slot_of else Place("s." + step.new_state[n])
        size = "P" if any(n.op == "product" and n.value[0] == "hr" for n, _ in accumulators) else "H"
        stages.append(Stage(size, tuple(accumulators), tuple(segments), tuple(outputs), loads))
    label = name + ("_projected" if project else "")
    forward_program = Program(label + "_forward", tuple(stages), gates)

    carried = frozenset(s for s in states if roots["s", s] is not ZERO)
    cross = {n: j for j, n in enumerate(backward.crossing)}
    stages = []
    for k in range(backward.depth):
        accumulators, segments = [], []
        for state, gradient in reached.items() if k == 0 else ():
            start = ()  # nothing but products reaches a derived state
            if state is step.hidden:
                start = (Place("dy"), Place("carry." + states[0], 0, "static" if states[0] in carried else "first"))
            elif state.value[1] not in step.derived:
                start = (Place("carry." + state.value[1], 0, "static"),)
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
            if n in cross:
                loads[n] = Place("cross", cross[n], "static")
            elif n.value[0] == "saved":
                loads[n] = Place("saved", slot_of[saved[n.value[1]]])
            elif n.value[0] == "d":
                loads[n] = Place("carry." + n.value[1], 0, "static")
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
        Program(label + "_backward", tuple(stages), gates),
        slots=max([len(written), *(s + 1 for s in slot_of.values())]),
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
    )


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
    stage that first uses it; "transposed" products come one stage after their operand too. Whatever depends on none of
    these is computed in each stage that wants it.
    """

    def __init__(self, roots: list[Node], accumulators: dict[Node, int | None]) -> None:
        self.nodes = topological(roots)
        self._level: dict[Node, int] = {}
        self._accumulators = [n for n in accumulators if n in self.nodes]
        self._accumulators += [n for n in self.nodes if n.op == "transposed"]
        operands = {a for n in self._accumulators if n.op in ("product", "transposed") for a in n.args}
        for n in self.nodes:
            level = max((self._level[a] for a in n.args), default=-1)
            if n in accumulators and accumulators[n] is not None:
                level = accumulators[n]  # type: ignore[assignment]
            elif n in accumulators or n.op == "transposed":
                level += 1
            self._level[n] = max(level, 0) if n in operands and not _Step.is_state(n) else level
        for n in accumulators:
            if n in self._level and self._level[n] == -1:
                self._level[n] = max(0, min((self._level[m] for m in self.nodes if n in m.args), default=0))
        self.depth = max((self.stage(n) for n in self.nodes), default=0) + 1
        self._roots = roots
        self.crossing: dict[Node, None] = {}
        made = [*roots, *(n for n in self.nodes if n in operands)]
        for k in range(self.depth):  # a later stage needs it, and it cannot be computed from stored vectors there
            for n in self.needs(k, [r for r in made if self.stage(r) == k]):
                if self._level[n] >= 0 and self._level[n] < k:
                    self.crossing[n] = None

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
            if node.op == "leaf" or (0 <= self._level[node] < stage and not is_condition(node)):
                found[node] = None
            else:
                for a in node.args:
                    visit(a)

        for r in roots:
            visit(r)
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


def _choose_saved(nodes: list[Node], wanted: set[Node], stored: set[Node], forced: set[Node]) -> list[Node]:
    """Which of the forward nodes to keep: the cheapest set from which all wanted ones can be had.

    Starts from keeping all that is wanted and takes every improving step: drop a value, or keep its arguments instead.
    """

    def recompute_cost(saved: frozenset[Node]) -> float:
        total, seen = SAVE_COST * len(saved), set()

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


def _assign_slots(saved: list[tuple[int, int, bool]], written: dict[int, int], x_level: dict[int, int]) -> list[int]:
    """A slot for every saved value (level stored at, level last used at, kept for good).

    A value may take a gate's slot if it is stored no earlier than the gate's input projection is read, and last used no
    later than the gate's gradient is written.
    """
    extra = len(written) + len(saved)

    def fits(value: tuple[int, int, bool], slot: int) -> bool:
        stored_at, used_at, kept = value
        if slot in written and (kept or used_at > written[slot]):
            return False
        return stored_at >= x_level.get(slot, 0)

    def search(k: int, taken: tuple[int, ...], limit: int) -> tuple[int, ...] | None:
        if k == len(saved):
            return taken
        for slot in range(limit):
            if slot not in taken and fits(saved[k], slot):
                found = search(k + 1, (*taken, slot), limit)
                if found is not None:
                    return found
        return None

    for limit in range(len(written), extra + 1):
        found = search(0, (), limit)
        if found is not None:
            return list(found)
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
