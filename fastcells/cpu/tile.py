"""The tile: rows of the batch x vectors of hidden units, with product, cell and stores, all in vector registers.

`tile_module` turns a `Program` into one function: a switch over variants (stage, rows, width), each of them

    accumulators = start + sum over segments of  rows[k] * panel[k]
    epilogue on the accumulators and on loaded vectors; stores

All addresses come from the frame (see geometry.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property

from llvmlite import ir

from ..expression import OPERATIONS, Node, is_reduction, is_uniform, topological
from ..program import Outputs, Pass, Place, Program
from .geometry import BUFFER_WORDS, LATENCY_CHAINS, LINE, SEGMENT_WORDS, WORD, Layout, Shape, Variant, variants
from .host import host
from .simd import FORMATS, I1, I64, Vector, i64

TILE_ARGUMENTS = (
    "frame",
    "variant",
    "row",
    "unit",  # in vectors
    "now",
    "before",
    "after",
    "is_first",  # 1 at the first processed step of these rows
    "is_last",
    "begin",  # of the depth to multiply
    "end",
    "fresh",  # 1: the first part of the depth, 0: partial sums of the parts before are in scratch
    "last",  # 1: the epilogue follows, 0: partial sums are kept
    "scratch",  # address of these rows' partial sums
)


TILE = "fastcells_tile"
TILE_TYPE = ir.FunctionType(ir.VoidType(), [I64] * len(TILE_ARGUMENTS))


def tile_module(program: Program, dtype: str, shapes: list[Shape]) -> ir.Module:
    """A module with the function `TILE` of `TILE_ARGUMENTS`, which is to be inlined where it is called."""
    layout, module = Layout(program), ir.Module("tile")
    module.triple = host().triple  # the loops are linked to it, and bring the layout of data
    function = ir.Function(module, TILE_TYPE, TILE)
    function.attributes.add("alwaysinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    arguments = dict(zip(TILE_ARGUMENTS, function.args, strict=True))
    cases = []
    for k, (stage, shape) in enumerate(zip(program.stages, shapes, strict=True)):
        numbers = variants(stage, shape, k)
        for variant in numbers[1:2] if stage.passes else numbers:
            block = function.append_basic_block(f"tile.{k}.{variant.kind}.{variant.rows}x{variant.width}")
            builder.position_at_end(block)
            emitter = _Row if stage.passes else _Tile
            emitter(builder, layout, dtype, k, program, shape, variant, arguments).emit()
            builder.ret_void()
            cases += [(v.number, block) for v in (numbers if stage.passes else [variant])]
    builder.position_at_end(function.entry_basic_block)
    switch = builder.switch(arguments["variant"], cases[0][1])
    for number, block in cases[1:]:
        switch.add_case(i64(number), block)
    return module


UNROLL = 2  # steps of the depth in one turn of the inner loop of full tiles, whose loads and multiply-adds alone almost
# fill the pipeline; the others are used less than they take to compile


TOGETHER = 4  # vectors, at most, whose epilogues are interleaved


class _Tile:
    """Emits one variant."""

    def __init__(
        self, builder, layout, dtype, index, program: Program, shape: Shape, variant: Variant, arguments
    ) -> None:
        self.b, self.layout, self.index, self.stage = builder, layout, index, program.stages[index]
        self.gates = program.gates
        self.v = Vector(builder, FORMATS[dtype], shape.lanes)
        self.rows, self.kind, self.arg = variant.rows, variant.kind, arguments
        self.partial = shape.widths[variant.width] == 0
        self.width = shape.widths[variant.width] or 1
        self.block = min(self.width, shape.block)  # of the panels
        self.full = variant.rows == shape.rows and self.width == shape.block and not self.partial
        self.bytes = self.v.fmt.bytes
        self.vector_bytes = shape.lanes * self.bytes
        self.count = len(self.stage.accumulators)
        self._rows_cache: dict[Place, list] = {}

    # ---- addresses ----
    def word(self, number: int):
        """A word of the frame."""
        value = self.b.load(self.b.inttoptr(self.b.add(self.arg["frame"], i64(8 * number)), I64.as_pointer()))
        value.set_metadata("invariant.load", self.b.module.add_metadata([]))
        return value

    def row_addresses(self, place: Place) -> list:
        """Address of the first unit of `place` in every row of the tile."""
        if place not in self._rows_cache:
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
            addresses = [address]
            for _ in range(self.rows - 1):
                addresses.append(b.add(addresses[-1], row_stride))
            self._rows_cache[place] = addresses
        return self._rows_cache[place]

    def at(self, place: Place, row: int, vector: int):
        return self.b.add(self.row_addresses(place)[row], self.b.add(self.unit_bytes, i64(vector * self.vector_bytes)))

    def load(self, place: Place, row: int, vector: int):
        if place.uniform:
            return self.v.splat(self.b.load(self.v.pointer(self.row_addresses(place)[row], self.v.fmt.scalar)))
        return self.v.load(self.at(place, row, vector), self.mask)

    # ---- the variant ----
    def emit(self) -> None:
        b = self.b
        self.unit_bytes = b.mul(self.arg["unit"], i64(self.vector_bytes))
        self.mask = None
        if self.partial:
            units = self.word(self.layout.stage[self.index])
            valid = b.sub(units, b.mul(self.arg["unit"], i64(self.v.lanes)))
            self.mask = self.v.first_lanes(valid)
        self.columns = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in range(self.count)]
        # Addresses are computed before the branches below, whose blocks all use them.
        for _, places in self.stage.accumulators:
            for p in places:
                self.row_addresses(p)
        for segment in self.stage.segments:
            self.row_addresses(segment.rows)
        for p in [*self.stage.loads.values(), *(p for _, p, _ in self.stage.outputs)]:
            self.row_addresses(p)
        self.look_ahead()
        accumulators = dict.fromkeys(self.columns, self.v.const(0.0))
        offset, parts = i64(0), list[tuple]()
        for j, segment in enumerate(self.stage.segments):
            depth = self.word(self.layout.segment[self.index, j])
            clip = lambda x, depth=depth, offset=offset: self.clamp(b.sub(x, offset), depth)  # noqa: E731
            parts.append((j, segment, clip(self.arg["begin"]), clip(self.arg["end"])))
            offset = b.add(offset, depth)
        if self.kind == "dot":
            accumulators = self.dots(accumulators, parts)
        else:
            for part in parts:
                accumulators = self.product(accumulators, *part)
        accumulators = self.add_partial_sums(accumulators)
        epilogue, keep, done = (b.append_basic_block(n) for n in ("epilogue", "keep", "variant.done"))
        b.cbranch(self.true(self.arg["last"]), epilogue, keep)
        b.position_at_end(keep)
        for key in self.columns:
            self.v.store(accumulators[key], self.partial_sum(key))
        b.branch(done)
        b.position_at_end(epilogue)
        self.epilogue(accumulators)
        b.branch(done)
        b.position_at_end(done)

    def look_ahead(self) -> None:
        """Ask for what the epilogue loads of this step, while there are products to wait for: nobody has used it
        lately, and it lies in as many pieces as there are rows and slots."""
        places = [*(p for _, start in self.stage.accumulators for p in start), *self.stage.loads.values()]
        places = [p for p in dict.fromkeys(places) if p.when == "now" and not p.uniform]
        if self.kind == "rows" and self.stage.segments and places:
            with self.b.if_then(self.true(self.arg["last"])):
                for place in places:
                    for m in range(self.rows):
                        for byte in range(0, self.width * self.vector_bytes, LINE):
                            self.v.prefetch(self.b.add(self.at(place, m, 0), i64(byte)))

    def partial_sum(self, key):
        return self.b.add(self.arg["scratch"], i64(self.columns.index(key) * self.vector_bytes))

    def true(self, word):
        return self.b.trunc(word, I1)

    def clamp(self, x, high):
        x = self.b.select(self.b.icmp_signed("<", x, i64(0)), i64(0), x)
        return self.b.select(self.b.icmp_signed(">", x, high), high, x)

    def add_partial_sums(self, accumulators: dict) -> dict:
        """Each part of the depth is summed by itself, which loses less to rounding than one long sum."""
        plain = lambda: accumulators  # noqa: E731
        summed = lambda: {k: self.b.fadd(a, self.v.load(self.partial_sum(k))) for k, a in accumulators.items()}  # noqa: E731
        return self.either("fresh", plain, summed)

    def either(self, flag: str, then, otherwise) -> dict:
        """Vectors by key from one of two functions (or constants), by an argument of the tile."""
        b = self.b
        yes, no, go = (b.append_basic_block(n) for n in (flag, f"not.{flag}", "go"))
        b.cbranch(self.true(self.arg[flag]), yes, no)
        results = []
        for block, make in ((yes, then), (no, otherwise)):
            b.position_at_end(block)
            values = make() if callable(make) else make
            results.append((values, b.block))
            b.branch(go)
        b.position_at_end(go)
        (first, at_first), (second, at_second) = results
        return {key: self.phi((first[key], at_first), (second[key], at_second)) for key in self.columns}

    def phi(self, *incoming):
        node = self.b.phi(incoming[0][0].type)
        for value, block in incoming:
            node.add_incoming(value, block)
        return node

    def segment_word(self, j: int, name: str):
        return self.word(self.layout.segment[self.index, j] + SEGMENT_WORDS.index(name))

    def product(self, accumulators: dict, j: int, segment, begin, end) -> dict:
        """accumulators + rows[begin:end] @ weights[begin:end].

        Several rows: the rows' broadcasts stay in registers and the weights pass one vector at a time. A single row has
        too few independent sums to hide the latency of the multiply-adds: its depth is interleaved over several.
        """
        chains = self.rows * self.width * len(segment.targets)
        interleave = 1
        while self.kind == "single" and chains * interleave < LATENCY_CHAINS and interleave < 4:
            interleave *= 2
        b = self.b
        keys = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in segment.targets]
        sums = [{key: accumulators[key] if i == 0 else self.v.const(0.0) for key in keys} for i in range(interleave)]
        vector, line, grow = (self.segment_word(j, n) for n in ("vector", "line", "grow"))
        line = b.add(line, b.mul(grow, i64(self.block)))
        address = b.add(self.segment_word(j, "weights"), b.mul(self.arg["unit"], vector))
        panels = [b.add(address, b.mul(vector, i64(p * self.block))) for p in range(self.width // self.block)]
        step = self.segment_word(j, "k") if segment.strided else i64(self.bytes)
        stride = interleave if self.kind == "single" else UNROLL if self.full else 1
        begin, sums = self.loop(segment, sums, keys, panels, line, step, begin, end, stride)
        rest = sums[:1]
        if stride > 1:
            _, rest = self.loop(segment, rest, keys, panels, line, step, begin, end, 1)
        total = rest + sums[1:]
        while len(total) > 1:
            half = len(total) // 2
            total = [
                {key: b.fadd(x[key], y[key]) for key in keys} for x, y in zip(total[:half], total[half:], strict=True)
            ]
        return {**accumulators, **total[0]}

    def dots(self, accumulators: dict, parts: list) -> dict:
        """accumulators + rows @ weights for one row and one vector of units, by dot products with the weight matrices'
        own rows. parts: of the depth, (number of a segment, segment, begin, end)."""
        b, v = self.b, self.v
        units = [i64(i) for i in range(v.lanes)]
        if self.partial:  # units that do not exist repeat the last one that does; nobody stores their results
            end = b.sub(self.word(self.layout.stage[self.index]), b.mul(self.arg["unit"], i64(v.lanes)))
            last = b.sub(end, i64(1))
            units = [b.select(b.icmp_signed("<", i, last), i, last) for i in units]
        found = dict(accumulators)
        for a in range(self.count):
            sums = [v.const(0.0)] * v.lanes
            for j, segment, begin, end in parts:
                if a not in segment.targets:
                    continue
                gate = segment.weights.gates[segment.targets.index(a)]
                block = self.gates.index(gate) if gate in self.gates else 0
                weights, vector, line, grow = (self.segment_word(j, n) for n in ("weights", "vector", "line", "grow"))
                base = b.add(b.add(weights, b.mul(self.arg["unit"], vector)), b.mul(grow, i64(block)))
                pointers = [b.add(base, b.mul(unit, line)) for unit in units]
                sums = self.dot(self.row_addresses(segment.rows)[0], pointers, begin, end, sums)
            if any(a in segment.targets for _, segment, *_ in parts):
                found[0, 0, a] = b.fadd(found[0, 0, a], v.sums(sums))
        return found

    def dot(self, row, pointers: list, begin, end, sums: list) -> list:
        """sums + row[begin:end] * the numbers that each of the pointers points to."""
        b, v = self.b, self.v

        def add(k, sums, mask=None):
            at = b.mul(k, i64(self.bytes))
            x = v.load(b.add(row, at), mask)
            return [v.fma(v.load(b.add(p, at), mask), x, s) for p, s in zip(pointers, sums, strict=True)]

        whole, sums = self.counted(begin, end, v.lanes, sums, add)
        rest = b.sub(end, whole)
        before, tail, done = b.block, b.append_basic_block("tail"), b.append_basic_block("tail.done")
        b.cbranch(b.icmp_signed(">", rest, i64(0)), tail, done)
        b.position_at_end(tail)
        more = add(whole, sums, v.first_lanes(rest))
        end_of_tail = b.block
        b.branch(done)
        b.position_at_end(done)
        return [self.phi((x, before), (y, end_of_tail)) for x, y in zip(sums, more, strict=True)]

    def counted(self, begin, end, stride: int, values: list, body):
        """values = body(k, values) for k from begin on in strides that fit below end; (where it ended, values)."""
        b = self.b
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
            self.phi((first, before), (again, end_of_loop))
            for first, again in zip([begin, *values], [k_next, *new], strict=True)
        ]
        return after[0], after[1:]

    def loop(self, segment, sums: list[dict], keys, panels, line, step, begin, end, stride: int):
        """`stride` steps of the depth at a time, each added to the next of the sums in turn; (where it ended, sums)."""
        b, v = self.b, self.v
        rows = self.row_addresses(segment.rows)

        def body(k, values):
            new = [dict(zip(keys, values[i * len(keys) :], strict=False)) for i in range(len(sums))]
            for i in range(stride):
                at_k = b.add(k, i64(i))
                at = b.mul(at_k, step)
                scalar = [v.splat(b.load(v.pointer(b.add(r, at), v.fmt.scalar))) for r in rows]
                out = {}
                for w in range(self.width):
                    base = b.add(panels[w // self.block], b.mul(at_k, line))
                    for t, a in enumerate(segment.targets):
                        inner = ((w % self.block) * len(segment.targets) + t) * self.vector_bytes
                        weight = v.load(b.add(base, i64(inner)))
                        for m in range(self.rows):
                            out[m, w, a] = v.fma(scalar[m], weight, new[i % len(sums)][m, w, a])
                new[i % len(sums)] = out
            return [part[key] for part in new for key in keys]

        begin, values = self.counted(begin, end, stride, [part[key] for part in sums for key in keys], body)
        return begin, [dict(zip(keys, values[i * len(keys) :], strict=False)) for i in range(len(sums))]

    def started(self, value, places, row: int, vector: int):
        """An accumulator with what it starts from: added last, which loses less to rounding, and nothing waits for."""
        for place in places:
            value = self.b.fadd(value, self.v.load(self.at(place, row, vector), self.mask))
        return value

    def epilogue(self, accumulators: dict) -> None:
        columns = [(m, w) for m in range(self.rows) for w in range(self.width)]
        groups = -(-len(columns) // TOGETHER)
        for k in range(groups):
            self.finish(columns[len(columns) * k // groups : len(columns) * (k + 1) // groups], accumulators)

    def finish(self, columns: list[tuple[int, int]], accumulators: dict) -> None:
        """The epilogue of some vectors, one operation of all of them after the other: a processor looks only so far
        ahead, and the operations of one vector wait for each other."""
        values = {
            (m, w): {
                node: self.started(accumulators[m, w, a], places, m, w)
                for a, (node, places) in enumerate(self.stage.accumulators)
            }
            for m, w in columns
        }
        for node, place in self.stage.loads.items():
            for m, w in columns:
                values[m, w][node] = self.load(place, m, w)
        for node in self.order:
            for column in columns:
                if node not in values[column]:
                    values[column][node] = self.compute(node, values[column])

        def store(training: bool) -> None:
            for m, w in columns:
                for node, place, training_only in self.stage.outputs:
                    if training_only == training:
                        self.v.store(values[m, w][node], self.at(place, m, w), self.mask)

        store(False)
        if any(training_only for *_, training_only in self.stage.outputs):
            with self.b.if_then(self.true(self.word(WORD["training"]))):
                store(True)

    @cached_property
    def order(self) -> list[Node]:
        """What the epilogue computes, arguments first."""
        given = {n for n, _ in self.stage.accumulators} | set(self.stage.loads)
        return _between(given.__contains__, [n for n, _, _ in self.stage.outputs])

    def compute(self, node: Node, values: dict):
        if node.op == "constant":
            return self.v.const(node.value)
        if node.op not in OPERATIONS:
            raise AssertionError(f"{node!r} is neither loaded nor accumulated in stage {self.index}")
        return getattr(self.v, node.op)(*(values[a] for a in node.args))


def _between(given: Callable[[Node], bool], roots: list[Node]) -> list[Node]:
    """What is to be computed to get from the given nodes to the roots, arguments first."""
    needed: set[Node] = set()

    def visit(node: Node) -> None:
        if node not in needed and not given(node):
            needed.add(node)
            for a in node.args:
                visit(a)

    for r in roots:
        visit(r)
    return [n for n in topological(roots) if n in needed]


class _Row(_Tile):
    """Emits the passes over one row: in each a loop over its vectors, then what its sums give."""

    def emit(self) -> None:
        b = self.b
        for part in self.stage.parts:  # before the loops, whose blocks all use them
            for place in [*(p for _, p, _ in part.outputs), *part.loads.values()]:
                self.row_addresses(place)
        self.units = self.word(self.layout.stage[self.index])
        self.whole = b.sdiv(self.units, i64(self.v.lanes))  # vectors
        self.rest = b.srem(self.units, i64(self.v.lanes))
        self.training = self.true(self.word(WORD["training"]))
        one = self.v.splat(b.sitofp(self.units, self.v.fmt.scalar))
        self.share = b.fdiv(self.v.const(1.0), one)
        self.mask = None
        self.known = {node: self.load(place, 0, 0) for node, place in self.stage.loads.items()}
        for part in self.stage.passes:
            self.run(part)
        for node, place, training_only in self.stage.outputs:
            value = b.extract_element(self.uniform(node), i64(0))
            with b.if_then(self.training) if training_only else nullcontext():
                b.store(value, self.v.pointer(self.row_addresses(place)[0], self.v.fmt.scalar))

    def uniform(self, node: Node):
        """A value that is the same for all units, in all lanes."""
        if node not in self.known:
            if is_reduction(node):
                raise AssertionError(f"{node!r} has not been summed yet in stage {self.index}")
            self.known[node] = self.compute(node, {a: self.uniform(a) for a in node.args})
        return self.known[node]

    def run(self, part: Pass) -> None:
        b, v = self.b, self.v
        roots = [*(n for n, _, _ in part.outputs), *(a for n in part.reductions for a in n.args)]
        order = _between(lambda n: n in part.loads or n in self.stage.loads or is_uniform(n), roots)
        for n in dict.fromkeys([*roots, *(a for m in order for a in m.args)]):
            if is_uniform(n):
                self.uniform(n)
        before = b.block
        body, done = b.append_basic_block("vectors"), b.append_basic_block("vectors.done")
        zeros = [v.const(0.0) for _ in part.reductions]
        b.cbranch(b.icmp_signed(">", self.whole, i64(0)), body, done)
        b.position_at_end(body)
        k = b.phi(I64)
        sums = [b.phi(v.type) for _ in part.reductions]
        self.unit_bytes = b.mul(k, i64(self.vector_bytes))
        new = self.vector(part, order, sums)
        k_next, end = b.add(k, i64(1)), b.block
        for phi, first, then in zip([k, *sums], [i64(0), *zeros], [k_next, *new], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, end)
        b.cbranch(b.icmp_signed("<", k_next, self.whole), body, done)
        b.position_at_end(done)
        sums = [self.phi((zero, before), (s, end)) for zero, s in zip(zeros, new, strict=True)]
        tail, after = b.append_basic_block("tail"), b.append_basic_block("tail.done")
        b.cbranch(b.icmp_signed(">", self.rest, i64(0)), tail, after)
        b.position_at_end(tail)
        self.unit_bytes = b.mul(self.whole, i64(self.vector_bytes))
        self.mask = v.first_lanes(self.rest)
        new, end = self.vector(part, order, sums), b.block
        self.mask = None
        b.branch(after)
        b.position_at_end(after)
        totals = [self.phi((s, done), (then, end)) for s, then in zip(sums, new, strict=True)]
        for node, total in zip(part.reductions, totals, strict=True):
            count = len(node.args) - (node.op == "variance")
            self.known[node] = b.fmul(v.sum(total), b.fmul(self.share, v.const(1 / count)))

    def vector(self, part: Pass, order: list[Node], sums: list) -> list:
        """One vector of a pass; the sums with it."""
        b, v = self.b, self.v
        values = dict(self.known)
        for node, place in part.loads.items():
            values[node] = self.load(place, 0, 0)
        for node in order:
            if node not in values:
                values[node] = self.compute(node, values)
        new = []
        for node, s in zip(part.reductions, sums, strict=True):
            terms = [values[a] for a in node.args]
            if node.op == "variance":
                away = [b.fsub(t, terms[0]) for t in terms[1:]]
                term = b.fmul(away[0], away[0])
                for a in away[1:]:
                    term = v.fma(a, a, term)
            else:
                term = terms[0]
                for t in terms[1:]:
                    term = b.fadd(term, t)
            new.append(b.fadd(s, term if self.mask is None else b.select(self.mask, term, v.const(0.0))))
        self.store_outputs(part.outputs, values)
        return new

    def store_outputs(self, outputs: Outputs, values: dict) -> None:
        always, training = ([o for o in outputs if o[2] == only] for only in (False, True))
        for node, place, _ in always:
            self.v.store(values[node], self.at(place, 0, 0), self.mask)
        if training:
            with self.b.if_then(self.training):
                for node, place, _ in training:
                    self.v.store(values[node], self.at(place, 0, 0), self.mask)
