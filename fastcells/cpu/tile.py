"""Products: tiles of rows of the batch x vectors of hidden units, whose sums are in vector registers.

A tile leaves its sums in memory, for the epilogue of all rows (epilogue.py). Where nothing else is to be done with them
they are its results; and of a single row, whose steps wait for each other, it is the epilogue, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from ..plan import DOT_UNITS
from ..program import Program
from .beside import BESIDE_ARGUMENTS, Beside
from .emitter import CONTEXT, Emitter, counted, joined, switch
from .geometry import (
    BESIDE_WIDTHS,
    BUFFER_WORDS,
    LATENCY_CHAINS,
    LINE,
    SEGMENT_WORDS,
    UNROLL,
    UNROLLED_ROWS,
    WORD,
    Layout,
    Tiling,
    Variant,
    asking,
    is_direct,
    rides,
    variants,
)
from .simd import Vector, i64

TILE = "fastcells_tile"
TILE_ARGUMENTS = (
    *CONTEXT,
    "begin",  # of the depth to multiply
    "end",
    "fresh",  # 1: the first part of the depth, 0: there are sums of the parts before
    "last",  # 1: no part follows
    "next",  # vectors of units to those whose weights are multiplied next,
    "number",  # and which of the tiles that multiply these weights this is
    *BESIDE_ARGUMENTS,
)

ALONG_ROW = 4  # vectors of a row that a dot product reads one after the other, before those of the next row
AHEAD = 4096  # bytes of weights that a tile asks for ahead: a page, where a processor that looks ahead itself stops


def emit_tiles(module: ir.Module, program: Program, dtype: str, tilings: list[Tiling]) -> None:
    """Add the function `TILE` of `TILE_ARGUMENTS`, which is to be inlined where it is called."""
    layout = Layout(program)
    with switch(module, TILE, TILE_ARGUMENTS) as (builder, arguments, case):
        for k, (stage, tiling) in enumerate(zip(program.stages, tilings, strict=True)):
            for variant in variants(stage, tiling, k):
                case(variant.number, f"tile.{k}.{variant.kind}.{variant.rows}x{variant.width}")
                Tile(builder, layout, dtype, k, program, tiling, variant, arguments).emit()


class Tile(Emitter):
    """Emits one variant:

    sums = sum over segments of  rows[k] * panel[k]
    """

    def __init__(
        self, builder, layout, dtype, index, program: Program, tiling: Tiling, variant: Variant, arguments
    ) -> None:
        super().__init__(builder, layout, dtype, index, program, tiling, variant.rows, variant.width, arguments)
        self.kind, self.partial = variant.kind, variant.partial
        if self.kind == "half":
            self.v = Vector(builder, self.v.fmt, tiling.lanes // 2)
        self.gates = program.gates  # in the order of the weights' blocks of rows
        whole = self.width >= self.block and self.kind != "rest"
        self.panel = self.block if whole else 1  # vectors side by side in it
        self.unrolled = self.kind in ("rows", "far") and variant.rows >= min(UNROLLED_ROWS, tiling.rows)
        self.several = self.kind not in ("single", "dot")
        self.direct = is_direct(self.stage) or not self.several
        beside = self.kind == "single" and self.width in tiling.widths[:BESIDE_WIDTHS] and not self.partial
        self.rides = beside and index == 0 and rides(program, tiling)
        self.tallest = tiling.rows if self.several else 1

    def emit(self) -> None:
        b = self.b
        self.last_unit = b.sub(self.existing(), i64(1)) if self.partial or self.kind == "dots" else None
        self.columns = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in sorted(self.summed)]
        for place in [*(s.rows for s in self.stage.segments), *(self.reached if self.direct else [])]:
            self.row_addresses(place)  # before the branches below, whose blocks all use them
        self.look_ahead()
        self.look_ahead_to_write()
        sums = dict.fromkeys(self.columns, self.v.const(0.0))
        offset, parts = i64(0), list[tuple]()
        beside = Beside(b, self.v, self.layout, self.arg) if self.rides else None
        for j, segment in enumerate(self.stage.segments):
            depth = self.word(self.layout.segment[self.index, j])
            clip = lambda x, depth=depth, offset=offset: self.clamp(b.sub(x, offset), depth)  # noqa: E731
            parts.append((j, segment, clip(self.arg["begin"]), clip(self.arg["end"])))
            offset = b.add(offset, depth)
        if self.kind == "dot":
            sums = self.dots(sums, parts)
        elif self.kind == "dots":
            sums = self.dots_of_rows(sums, parts)
        else:
            for j, segment, begin, end in parts:
                chained = segment.rows.when == "before"
                sums = self.product(sums, j, segment, begin, end, beside if chained else None)
                beside = None if chained else beside
        sums = self.add_partial_sums(sums)
        if not self.direct:
            self.keep(sums)
            return
        epilogue, keep, done = (b.append_basic_block(n) for n in ("epilogue", "keep", "variant.done"))
        b.cbranch(self.true(self.arg["last"]), epilogue, keep)
        b.position_at_end(keep)
        self.keep(sums)
        b.branch(done)
        b.position_at_end(epilogue)
        self.epilogue(lambda *key: sums[key])
        b.branch(done)
        b.position_at_end(done)

    def keep(self, sums: dict) -> None:
        """Leave the sums for the next part of the depth, or for the epilogue."""
        for key in self.columns:
            self.v.store(sums[key], self.sum_at(*key))

    def look_ahead(self) -> None:
        """Ask for what the epilogue loads of this step, while there are products to wait for: nobody has used it
        lately, and it lies in as many pieces as there are rows and slots. A row that stands for all is near."""
        places = [p for p in dict.fromkeys([*self.starts, *self.stage.loads.values()]) if p.when == "now"]
        places = [p for p in places if not p.uniform] if self.several else []
        lines = [*range(0, self.width * self.vector_bytes, LINE), self.width * self.vector_bytes - 1]  # from anywhere
        for buffer in dict.fromkeys(p.buffer for p in places):
            with self.b.if_then(self.b.and_(self.apart(buffer), self.true(self.arg["last"]))):
                for place in places:
                    if place.buffer == buffer:
                        for m in range(self.rows):
                            for byte in lines:
                                self.v.prefetch(self.b.add(self.at(place, m, 0), i64(byte)))

    def look_ahead_to_write(self) -> None:
        """The same of what the epilogue keeps for training: a line that is written is fetched first. Where the input is
        projected ahead, those are lines that are read as well."""
        kept = [p for _, p, training in self.stage.outputs if training and p.when == "now"] if self.several else []
        if not kept:
            return
        b, wanted = self.b, self.b.and_(self.true(self.word(WORD["training"])), self.true(self.arg["last"]))
        for buffer in dict.fromkeys(p.buffer for p in self.starts):
            wanted = b.and_(wanted, b.not_(self.apart(buffer)))
        with b.if_then(wanted):
            for place in kept:
                for m in range(self.rows):
                    for w in range(self.width):
                        self.v.prefetch(self.at(place, m, w))

    def apart(self, buffer: str):
        """Whether a buffer has a row for each row of the batch."""
        stride = self.word(self.layout.buffer[buffer] + BUFFER_WORDS.index("row"))
        return self.b.icmp_signed("!=", stride, i64(0))

    def clamp(self, x, high):
        x = self.b.select(self.b.icmp_signed("<", x, i64(0)), i64(0), x)
        return self.b.select(self.b.icmp_signed(">", x, high), high, x)

    def add_partial_sums(self, sums: dict) -> dict:
        """Each part of the depth is summed by itself, which loses less to rounding than one long sum."""
        b = self.b
        before, more, go = b.block, b.append_basic_block("more"), b.append_basic_block("go")
        b.cbranch(self.true(self.arg["fresh"]), go, more)
        b.position_at_end(more)
        totals = {key: b.fadd(sums[key], self.v.load(self.sum_at(*key))) for key in self.columns}
        b.branch(go)
        b.position_at_end(go)
        return {key: joined(b, (sums[key], before), (totals[key], more)) for key in self.columns}

    def segment_word(self, j: int, name: str):
        return self.word(self.layout.segment[self.index, j] + SEGMENT_WORDS.index(name))

    def product(self, sums: dict, j: int, segment, begin, end, beside: Beside | None = None) -> dict:
        """sums + rows[begin:end] @ weights[begin:end]; beside: another product, to be done on the way.

        Several rows: the rows' broadcasts stay in registers and the weights pass one vector at a time. A single row, or
        a rest, may have too few independent sums to hide the latency of the multiply-adds: its depth is interleaved
        over several, as many for few rows as for all, so that sums are the same.
        """
        chains = self.tallest * self.width * len(segment.targets)
        interleave = 1
        while self.kind in ("single", "rest", "half") and chains * interleave < LATENCY_CHAINS and interleave < 4:
            interleave *= 2
        b = self.b
        keys = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in segment.targets]
        chain = [{key: sums[key] if i == 0 else self.v.const(0.0) for key in keys} for i in range(interleave)]
        vector, line, grow = (self.segment_word(j, n) for n in ("vector", "line", "grow"))
        line = b.add(line, b.mul(grow, i64(self.panel)))
        address = b.add(self.segment_word(j, "weights"), b.mul(self.arg["unit"], vector))
        panels = [b.add(address, b.mul(vector, i64(p * self.panel))) for p in range(self.width // self.panel)]
        step = self.segment_word(j, "k") if segment.strided else i64(self.bytes)
        stride = UNROLL if self.unrolled else interleave
        asked = None
        if self.kind == "far" and asking().shared:
            asked = self.share_of_next(b.add(panels[0], b.mul(self.arg["next"], vector)), begin, end, line)
        add = self.multiplied(segment, panels, line, step, asked)
        if beside is not None:
            begin, chain = self.together(beside, add, chain, keys, begin, end, stride)
        begin, chain, _ = self.loop(add, chain, keys, begin, end, stride)
        rest = chain[:1]
        if stride > 1 and asked is None:  # depths are even where the next weights are asked for
            _, rest, _ = self.loop(add, rest, keys, begin, end, 1)
        total = rest + chain[1:]
        while len(total) > 1:
            half = len(total) // 2
            total = [
                {key: b.fadd(x[key], y[key]) for key in keys} for x, y in zip(total[:half], total[half:], strict=True)
            ]
        return {**sums, **total[0]}

    def dots(self, sums: dict, parts: list) -> dict:
        """sums + rows @ weights for one row and one vector of units, by dot products with the weight matrices'
        own rows. parts: of the depth, (number of a segment, segment, begin, end)."""
        v = self.v

        def found(number) -> list:
            lanes = [v.const(0.0)] * v.lanes
            for j, segment, begin, end in parts:
                pointers, end = self.weight_rows(number, j, segment, [i64(i) for i in range(v.lanes)], begin, end)
                lanes = self.dot(self.row_addresses(segment.rows)[0], pointers, begin, end, lanes)
            return [v.sums(lanes)]

        return self.with_each_gate(sums, found)

    def with_each_gate(self, sums: dict, found: Callable) -> dict:
        """sums + what `found` returns for each accumulator's number, a list of a sum for each row. A loop: code for
        each of them would be half of a kernel."""
        b, numbers = self.b, i64(len(self.summed))
        with b.goto_entry_block():
            more = b.alloca(ir.ArrayType(ir.ArrayType(self.v.type, self.rows), len(self.summed)))

        def some(number, _):
            for m, x in enumerate(found(number)):
                b.store(x, b.gep(more, [i64(0), number, i64(m)]))
            return []

        counted(b, i64(0), numbers, 1, [], some)
        places = {(m, 0, a): (i64(n), i64(m)) for n, a in enumerate(sorted(self.summed)) for m in range(self.rows)}
        return {key: b.fadd(sums[key], b.load(b.gep(more, [i64(0), *place]))) for key, place in places.items()}

    def weight_rows(self, number, j: int, segment, units: list, begin, end) -> tuple:
        """Where the rows of a weight matrix begin that an accumulator, by its number, takes up from a segment, for some
        of a vector's units, and where the depth ends. Units that do not exist repeat the last one that does, and nobody
        stores their results; an accumulator may take up nothing."""
        b = self.b
        blocks = list[int]()
        for a in sorted(self.summed):
            gate = segment.weights.gates[segment.targets.index(a)] if a in segment.targets else None
            blocks.append(-1 if gate is None else self.gates.index(gate) if gate in self.gates else 0)
        block = i64(blocks[-1])
        for n, one in enumerate(blocks[:-1]):
            block = b.select(b.icmp_signed("==", number, i64(n)), i64(one), block)
        if -1 in blocks:
            end = b.select(b.icmp_signed("<", block, i64(0)), begin, end)
        weights, vector, line, grow = (self.segment_word(j, n) for n in ("weights", "vector", "line", "grow"))
        base = b.add(b.add(weights, b.mul(self.arg["unit"], vector)), b.mul(grow, block))
        if self.last_unit is not None:
            units = [b.select(b.icmp_signed("<", i, self.last_unit), i, self.last_unit) for i in units]
        return [b.add(base, b.mul(unit, line)) for unit in units], end

    def dots_of_rows(self, sums: dict, parts: list) -> dict:
        """The same for several rows, of a few units at a time: of the weights, each number is read for all rows."""
        b, v = self.b, self.v
        count, rows = min(DOT_UNITS, v.lanes), range(self.rows)
        groups = v.lanes // count
        with b.goto_entry_block():
            folded = b.alloca(ir.ArrayType(v.type, self.rows * groups))

        def place(m: int, group):
            return b.gep(folded, [i64(0), b.add(group, i64(m * groups))])

        there = i64(groups)
        if self.partial:  # groups of units that do not exist are left out: nobody stores what comes of their places
            there = b.udiv(b.add(self.last_unit, i64(count)), i64(count))

        def found(number) -> list:
            def some(group, _, ahead=False):
                units = [b.add(b.mul(group, i64(count)), i64(i)) for i in range(count)]
                keys = [(m, i) for m in rows for i in range(count)]
                dots = dict.fromkeys(keys, v.const(0.0))
                for j, segment, begin, end in parts:
                    pointers, end = self.weight_rows(number, j, segment, units, begin, end)
                    dots = self.dots_along(self.row_addresses(segment.rows), pointers, begin, end, dots, ahead)
                for m in rows:
                    b.store(v.sums([dots[m, i] for i in range(count)]), place(m, group))
                return []

            if self.partial:  # an input of few columns may be far; a first group reads it, others find it near
                some(i64(0), [], ahead=True)
            counted(b, i64(int(self.partial)), there, 1, [], some)
            return [v.sums([b.load(place(m, i64(group))) for group in range(groups)], count) for m in rows]

        return self.with_each_gate(sums, found)

    def dots_along(self, rows: list, pointers: list, begin, end, sums: dict, ahead: bool) -> dict:
        """sums, by row and pointer, + row[begin:end] * the numbers that the pointer points to. ahead: the rows of the
        next tile are asked for."""
        b, v, keys = self.b, self.v, list(sums)
        height = b.mul(b.sub(rows[-1], rows[-2]), i64(len(rows))) if len(rows) > 1 else i64(0)

        def add(k, values, mask=None):
            at, out = b.mul(k, i64(self.bytes)), dict(zip(keys, values, strict=True))
            xs = [v.load(b.add(row, at), mask) for row in rows]
            if ahead and mask is None:
                for row in rows:
                    v.prefetch(b.add(row, b.add(at, height)))
            for i, p in enumerate(pointers):
                weight = v.load(b.add(p, at), mask)
                for m, x in enumerate(xs):
                    out[m, i] = v.fma(weight, x, out[m, i])
            return [out[key] for key in keys]

        whole, values = counted(b, begin, end, v.lanes, [sums[key] for key in keys], add)
        return dict(zip(keys, self.with_rest(add, whole, end, values), strict=True))

    def dot(self, row, pointers: list, begin, end, sums: list) -> list:
        """sums + row[begin:end] * the numbers that each of the pointers points to."""
        b, v = self.b, self.v

        def add(k, sums, mask=None, vectors=1):
            places = [b.mul(b.add(k, i64(i * v.lanes)), i64(self.bytes)) for i in range(vectors)]
            xs, out = [v.load(b.add(row, at), mask) for at in places], []
            for p, s in zip(pointers, sums, strict=True):
                for at, x in zip(places, xs, strict=True):
                    s = v.fma(v.load(b.add(p, at), mask), x, s)
                out.append(s)
            return out

        whole, sums = counted(b, begin, end, ALONG_ROW * v.lanes, sums, partial(add, vectors=ALONG_ROW))
        whole, sums = counted(b, whole, end, v.lanes, sums, add)
        return self.with_rest(add, whole, end, sums)

    def with_rest(self, add: Callable, whole, end, sums: list) -> list:
        """Sums with what a last vector adds, of which not all lanes exist, if there is one."""
        b = self.b
        rest = b.sub(end, whole)
        before, tail, done = b.block, b.append_basic_block("tail"), b.append_basic_block("tail.done")
        b.cbranch(b.icmp_signed(">", rest, i64(0)), tail, done)
        b.position_at_end(tail)
        more = add(whole, sums, self.v.first_lanes(rest))
        end_of_tail = b.block
        b.branch(done)
        b.position_at_end(done)
        return [joined(b, (x, before), (y, end_of_tail)) for x, y in zip(sums, more, strict=True)]

    def together(self, beside: Beside, add: Callable, sums: list[dict], keys, begin, end, stride: int):
        """A product as far as another one goes, and all of that, if it is wanted; (where it ended, sums)."""
        b = self.b
        before, wanted, done = b.block, b.append_basic_block("beside"), b.append_basic_block("beside.done")
        b.cbranch(beside.wanted, wanted, done)
        b.position_at_end(wanted)
        beside.begin()
        both = b.add(begin, beside.depth)
        both = b.select(b.icmp_signed("<", both, end), both, end)
        reached, new, others = self.loop(add, sums, keys, begin, both, stride, beside)
        beside.finish(b.sub(reached, begin), others)
        after = b.block
        b.branch(done)
        b.position_at_end(done)
        new = [
            {key: joined(b, (x[key], before), (y[key], after)) for key in keys} for x, y in zip(sums, new, strict=True)
        ]
        return joined(b, (begin, before), (reached, after)), new

    def loop(
        self, add: Callable, sums: list[dict], keys, begin, end, stride: int, beside: Beside | None = None
    ) -> tuple:
        """`stride` steps of the depth at a time, each added to the next of the sums in turn, and to those of a product
        beside; (where it ended, sums, sums beside)."""
        b = self.b
        size = len(keys) * len(sums)

        def body(k, values):
            new = [dict(zip(keys, values[i * len(keys) :], strict=False)) for i in range(len(sums))]
            others = values[size:]
            for i in range(stride):
                at_k = b.add(k, i64(i))
                new[i % len(sums)] = add(at_k, new[i % len(sums)])
                if beside is not None:
                    others = beside.add(b.sub(at_k, begin), others)
            return [*(part[key] for part in new for key in keys), *others]

        others = [] if beside is None else beside.zeros
        reached, values = counted(b, begin, end, stride, [*(p[key] for p in sums for key in keys), *others], body)
        new = [dict(zip(keys, values[i * len(keys) :], strict=False)) for i in range(len(sums))]
        return reached, new, values[size:]

    def opaque(self, value):
        """A number of which LLVM does not know what it is made of, and keeps it in a register: it would make the
        address of each row from the one before, with an instruction more, and lay sums on the stack meanwhile."""
        return self.b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)

    def share_of_next(self, panel, begin, end, line) -> tuple:
        """Of the same depth of the panel that is multiplied next, by its address: where step 0's line of what this tile
        asks for would be, and bytes to the next step's."""
        b = self.b
        first = b.sub(b.mul(self.arg["number"], b.sub(end, begin)), begin)
        at = b.add(panel, b.add(b.mul(begin, line), b.mul(first, i64(LINE))))
        return self.opaque(at), self.opaque(i64(LINE))

    def multiplied(self, segment, panels, line, step, asked: tuple | None) -> Callable:
        """A function of k and sums: these with what step k of the depth adds. asked: see share_of_next."""
        b, v = self.b, self.v
        rows = self.row_addresses(segment.rows)
        if not segment.strided:
            first, *others = rows
            rows = [first, *(b.add(first, self.opaque(b.sub(r, first))) for r in others)]

        def add(k, sums: dict) -> dict:
            at = b.mul(k, step)
            if asked is not None:
                v.prefetch(b.add(asked[0], b.mul(k, asked[1])), level=2)
            scalar = [v.splat(b.load(v.pointer(b.add(r, at), v.fmt.scalar))) for r in rows]
            out = {}
            for w in range(self.width):
                base = b.add(panels[w // self.panel], b.mul(k, line))
                for t, a in enumerate(segment.targets):
                    inner = ((w % self.panel) * len(segment.targets) + t) * self.vector_bytes
                    weight = v.load(b.add(base, i64(inner)))
                    if self.kind == "far" and asked is None:
                        for byte in range(0, self.vector_bytes, LINE):
                            v.prefetch(b.add(base, i64(inner + AHEAD + byte)))
                    for m in range(self.rows):
                        out[m, w, a] = v.fma(scalar[m], weight, sums[m, w, a])
            return out

        return add
