"""What all code of a program's stages has in common: where things are, and what is computed of a vector's sums.

All addresses come from the frame (see frame.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

from llvmlite import ir

from ..expression import OPERATIONS, Node
from ..program import Place, Program
from .frame import BUFFER_WORDS, SEGMENT_WORDS, WORD, Layout
from .geometry import TOGETHER, Tiling
from .order import Fused, Part, ordered
from .simd import FORMATS, I1, I64, Vector, i64

CONTEXT = (
    "frame",
    "variant",
    "row",  # the first
    "unit",  # in vectors
    "now",
    "before",
    "after",
    "is_first",  # 1 at the first processed step of these rows
    "is_last",
    "sums",  # address of what products leave of these rows and units
)


@contextmanager
def switch(module: ir.Module, name: str, arguments: tuple[str, ...], stride: int = 1) -> Iterator[tuple]:
    """Add a function that is to be inlined where it is called, and does one of several cases by "variant" / stride.

    Gives a builder, the arguments by name, and `case(number, name)`, after which the builder adds to that case."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * len(arguments)), name)
    function.attributes.add("alwaysinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    given = dict(zip(arguments, function.args, strict=True))
    done = function.append_basic_block("done")
    chosen = builder.switch(builder.udiv(given["variant"], i64(stride)), done)

    def case(number: int, label: str) -> None:
        if builder.block is not function.entry_basic_block:
            builder.branch(done)
        block = function.append_basic_block(label)
        chosen.add_case(i64(number), block)
        builder.position_at_end(block)

    yield builder, given, case
    if builder.block is not function.entry_basic_block:
        builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()


def frame_word(b: ir.IRBuilder, frame, number: int):
    """A word of the frame."""
    value = b.load(b.inttoptr(b.add(frame, i64(8 * number)), I64.as_pointer()))
    value.set_metadata("invariant.load", b.module.add_metadata([]))
    return value


def joined(b: ir.IRBuilder, *incoming):
    """A value that comes from one of several blocks: (value, block) of each."""
    node = b.phi(incoming[0][0].type)
    for value, block in incoming:
        node.add_incoming(value, block)
    return node


def counted(b: ir.IRBuilder, begin, end, stride: int, values: Sequence, body: Callable):
    """values = body(k, values) for k from begin on in strides that fit below end; (where it ended, values)."""
    before, loop, done = b.block, b.append_basic_block("k"), b.append_basic_block("k.done")
    last = b.sub(end, i64(stride))
    b.cbranch(b.icmp_signed("<=", begin, last), loop, done)
    b.position_at_end(loop)
    k = b.phi(I64)
    current = [b.phi(x.type) for x in values]
    new = body(k, current)
    k_next = b.add(k, i64(stride))
    for node, first, again in zip([k, *current], [begin, *values], [k_next, *new], strict=True):
        node.add_incoming(first, before)
        node.add_incoming(again, b.block)
    end_of_loop = b.block
    b.cbranch(b.icmp_signed("<=", k_next, last), loop, done)
    b.position_at_end(done)
    after = [
        joined(b, (first, before), (again, end_of_loop))
        for first, again in zip([begin, *values], [k_next, *new], strict=True)
    ]
    return after[0], after[1:]


class Emitter:
    """Emits what a function of `CONTEXT`, and perhaps more arguments, does for one stage."""

    def __init__(
        self,
        builder: ir.IRBuilder,
        layout: Layout,
        dtype: str,
        index: int,
        program: Program,
        tiling: Tiling,
        rows: int,
        width: int,
        arguments: dict,
    ) -> None:
        self.b, self.layout, self.index, self.stage = builder, layout, index, program.stages[index]
        self.v = Vector(builder, FORMATS[dtype], tiling.lanes)
        self.rows, self.width, self.arg = rows, width, arguments
        self.program, self.tiling = program, tiling
        self.bytes = self.v.fmt.bytes
        self.vector_bytes = tiling.lanes * self.bytes
        self.count = len(self.stage.accumulators)
        self.unit_bytes = builder.mul(arguments["unit"], i64(self.vector_bytes))
        self.mask = None  # of the lanes of the last vector that exist, where not all do
        self.origins: dict[Place, tuple] = {}
        self.addresses: dict[Place, list] = {}  # of all rows

    # ---- addresses ----
    def word(self, number: int):
        """A word of the frame."""
        return frame_word(self.b, self.arg["frame"], number)

    def segment_words(self, j: int) -> dict:
        """What the frame says of a segment, by SEGMENT_WORDS."""
        at = self.layout.segment[self.index, j]
        return {name: self.word(at + k) for k, name in enumerate(SEGMENT_WORDS)}

    def origin(self, place: Place) -> tuple:
        """Address of the first unit of `place` in the first row, and bytes from row to row."""
        if place not in self.origins:
            b = self.b
            address, step, row_stride, initial, initial_row = (
                self.word(self.layout.buffer[place.buffer] + k) for k in range(len(BUFFER_WORDS))
            )
            if place.when in ("now", "before", "after"):
                address = b.add(address, b.mul(self.arg[place.when], step))
            edge = {"before": "is_first", "first": "is_first", "after": "is_last"}.get(place.when)
            if edge is not None:
                address = b.select(self.true(self.arg[edge]), initial, address)
                row_stride = b.select(self.true(self.arg[edge]), initial_row, row_stride)
            address = b.add(address, b.mul(self.arg["row"], row_stride))
            if place.slot:
                address = b.add(address, b.mul(i64(place.slot), self.word(WORD["slot"])))
            if place.number:
                address = b.add(address, i64(place.number * self.bytes))
            self.origins[place] = address, row_stride
        return self.origins[place]

    def row_addresses(self, place: Place) -> list:
        """Address of the first unit of `place` in every row."""
        if place not in self.addresses:
            address, row_stride = self.origin(place)
            addresses = [address]
            for _ in range(self.rows - 1):
                addresses.append(self.b.add(addresses[-1], row_stride))
            self.addresses[place] = addresses
        return self.addresses[place]

    def at(self, place: Place, row: int, vector: int):
        return self.b.add(self.row_addresses(place)[row], self.b.add(self.unit_bytes, i64(vector * self.vector_bytes)))

    def load(self, place: Place, row: int, vector: int):
        if place.uniform:
            return self.v.splat(self.b.load(self.v.pointer(self.row_addresses(place)[row], self.v.fmt.scalar)))
        return self.v.load(self.at(place, row, vector), self.lanes_of(vector))

    def existing(self):
        """How many units there are from the last vector's first on; the mask is of them from now on."""
        units, lanes = self.word(self.layout.stage[self.index]), self.vector_bytes // self.bytes
        last = self.b.add(self.arg["unit"], i64(self.width - 1))
        count = self.b.sub(units, self.b.mul(last, i64(lanes)))
        self.mask = self.v.first_lanes(count)
        return count

    def lanes_of(self, vector: int):
        """The mask of a vector, if it has one."""
        return self.mask if vector == self.width - 1 else None

    def part_of(self, depth, offset) -> tuple:
        """Where the part of the depth that a tile multiplies begins and ends in a segment, which begins at `offset`."""
        return tuple(self._within(self.b.sub(self.arg[n], offset), depth) for n in ("begin", "end"))

    def _within(self, x, high):
        x = self.b.select(self.b.icmp_signed("<", x, i64(0)), i64(0), x)
        return self.b.select(self.b.icmp_signed(">", x, high), high, x)

    def asked(self) -> list[tuple]:
        """(Whether, place) of what an epilogue of several rows will load and store of this step, and is asked for while
        there are products to wait for: nobody has used it lately, and it lies in as many pieces as there are rows and
        slots. A row that stands for all is near; what is kept for training is asked for, as a line that is written is
        fetched first, unless the input is projected ahead: those are lines that are read as well."""
        kept, found = self.true(self.word(WORD["training"])), list[tuple]()
        for place in dict.fromkeys([*self.starts, *self.stage.loads.values()]):
            if place.when == "now" and not place.uniform:
                found.append((self._apart(place.buffer), place))
        for buffer in dict.fromkeys(p.buffer for p in self.starts):
            kept = self.b.and_(kept, self.b.not_(self._apart(buffer)))
        return found + [(kept, p) for _, p, training in self.stage.outputs if training and p.when == "now"]

    def _apart(self, buffer: str):
        """Whether a buffer has a row for each row of the batch."""
        stride = self.word(self.layout.buffer[buffer] + BUFFER_WORDS.index("row"))
        return self.b.icmp_signed("!=", stride, i64(0))

    def sum_at(self, row: int, vector: int, accumulator: int):
        """Where products leave a sum."""
        number = self.tiling.number_of_sum(row, vector, accumulator, self.count)
        return self.b.add(self.arg["sums"], i64(number * self.vector_bytes))

    def true(self, word):
        return self.b.trunc(word, I1)

    # ---- the epilogue ----
    @cached_property
    def summed(self) -> set[int]:
        """The accumulators that take up products."""
        return {a for segment in self.stage.segments for a in segment.targets}

    @property
    def reached(self) -> list[Place]:
        """All that an epilogue loads and stores."""
        places = [*self.starts, *self.stage.loads.values(), *(p for _, p, _ in self.stage.outputs)]
        return list(dict.fromkeys(places))

    @property
    def starts(self) -> list[Place]:
        """What accumulators start from."""
        return [place for _, start in self.stage.accumulators for place in start]

    def started(self, value, places, row: int, vector: int):
        """A sum of products, or None, with what its accumulator starts from: added last, which loses less to rounding,
        and nothing waits for."""
        for place in places:
            start = self.v.load(self.at(place, row, vector), self.lanes_of(vector))
            value = start if value is None else self.b.fadd(value, start)
        return self.v.const(0.0) if value is None else value

    def epilogue(self, sum_of: Callable, part: str = "whole") -> None:
        """A part of the epilogue of all vectors, TOGETHER of them at a time. sum_of: row, vector and accumulator."""
        columns, does = [(m, w) for m in range(self.rows) for w in range(self.width)], ordered(self.stage, part)
        for k in range(0, len(columns), TOGETHER):
            some = columns[k : k + TOGETHER]
            self.finish(some, {(*c, a): sum_of(*c, a) for c in some for a in self.summed}, part, does)

    def finish(self, columns: list[tuple[int, int]], sums: dict, part: str, does: Part) -> None:
        """A part of the epilogue of some vectors (row, vector), one operation of all of them after the other: a
        processor looks only so far ahead, and the operations of one vector wait for each other. sums: by row, vector
        and accumulator.
        """
        order, fused, made = does
        values = {
            (m, w): {
                node: self.started(sums.get((m, w, a)), places, m, w)
                for a, (node, places) in enumerate(self.stage.accumulators)
            }
            for m, w in columns
        }
        for node, place in self.stage.loads.items():
            for m, w in columns:
                values[m, w][node] = self.load(place, m, w)
        if part == "late":
            for node, a in made.items():
                for m, w in columns:
                    values[m, w][node] = self.v.load(self.sum_at(m, w, a))
        for node in order:
            for column in columns:
                if node not in values[column]:
                    values[column][node] = self.compute(node, values[column], fused)
        if part == "early":
            for node, a in made.items():
                for m, w in columns:
                    self.v.store(values[m, w][node], self.sum_at(m, w, a))
            return

        def store(training: bool) -> None:
            for m, w in columns:
                for node, place, training_only in self.stage.outputs:
                    if training_only == training:
                        self.v.store(values[m, w][node], self.at(place, m, w), self.lanes_of(w))

        store(False)
        if any(training_only for *_, training_only in self.stage.outputs):
            with self.b.if_then(self.true(self.word(WORD["training"]))):
                store(True)

    def compute(self, node: Node, values: dict, fused: Fused):
        """A node, of its arguments' values."""
        if node.op == "constant":
            return self.v.const(node.value)
        if node in fused:
            k = fused[node]
            x, y = (values[a] for a in node.args[k].args)
            other = values[node.args[1 - k]]
            if node.op == "sub":
                x, other = (x, self.v.neg(other)) if k == 0 else (self.v.neg(x), other)
            return self.v.fma(x, y, other)
        if node.op not in OPERATIONS:
            raise AssertionError(f"{node!r} is neither loaded nor accumulated in stage {self.index}")
        return getattr(self.v, node.op)(*(values[a] for a in node.args))
