"""Programs: one time step of a cell, forward and backward, as stages that an engine can run (made by `derivation`).

A stage is a matrix product with a pointwise epilogue. Its accumulators start from stored vectors, take up products of
rows with weights, and the epilogue turns them, with other stored vectors, into what is stored. Most cells have one
stage; a product of a computed vector (reset-before GRU, projection) starts another, since it needs all units of it.
Sums over the units (layer normalisation) make passes over a row, which follow each other in a stage without products.

What training stores, time step by time step, is one buffer of `slots` vectors of the hidden size: on the way up the
input projection of a gate is replaced by what the backward pass needs, on the way down that by the gate's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from .expression import Node, topological


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

    def blocks(self, gates: tuple[str, ...]) -> tuple[int, ...]:
        """The numbers of the blocks of rows that give a result each, of all gates' in this order."""
        return () if self.transposed else tuple([gates.index(g) if g in gates else 0 for g in self.gates])


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
        return spread(self.slots * hidden + -(-self.numbers[0] // 16) * 16)

    def cross_width(self, hidden: int) -> int:
        """Numbers of one row of what the backward pass hands on."""
        return self.cross * hidden + -(-self.numbers[1] // 16) * 16


def spread(numbers: int) -> int:
    """Numbers from one row to the next of so many: where they are many an odd number of lines of a cache (of float32),
    so that a few columns of many rows lie in all sets of it."""
    return numbers if numbers < 256 else (-(-numbers // 16) | 1) * 16
