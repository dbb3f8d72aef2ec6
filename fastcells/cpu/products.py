"""Products: sums, in vector registers, of rows of the batch x vectors of hidden units, over the depth of weights.

They know nothing of cells: what is multiplied is said by operands, and what becomes of the sums is others' work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llvmlite import ir

from ..plan import DOT_UNITS
from .beside import Beside
from .emitter import counted, joined
from .frame import LINE
from .geometry import LATENCY_CHAINS, UNROLL, UNROLLED_ROWS, Tiling, Variant, asking
from .simd import I64, Vector, i64

ALONG_ROW = 4  # vectors of a row that a dot product reads one after the other, before those of the next row
AHEAD = 4096  # bytes of weights that a tile asks for ahead: a page, where a processor that looks ahead itself stops


@dataclass(frozen=True)
class Operand:
    """Rows and the weights that they meet, as values of LLVM; sizes in bytes, but for the depth, from `begin` to `end`.

    targets: the accumulators that take up their product. blocks: the weights' blocks of rows for these, if products may
    be dot products. rows: addresses. weights: address of the tile's first unit's; vector, line, grow: see frame's
    SEGMENT_WORDS. step: from number to number of a row; None: these are adjacent. beside: another product, to be done
    on the way.
    """

    targets: tuple[int, ...]
    blocks: tuple[int, ...]
    rows: list[Any]
    weights: Any
    vector: Any
    line: Any
    grow: Any
    begin: Any
    end: Any
    step: Any = None
    beside: Beside | None = None


class Products:
    """Emits the products of one variant of a tile. v: whole vectors, or halves. sum_at: address of a sum in memory.
    units: of a vector, that exist, if not all do. ahead: vectors of units to those whose weights are multiplied next,
    and which of the tiles that multiply these weights this is."""

    def __init__(
        self,
        b: ir.IRBuilder,
        v: Vector,
        tiling: Tiling,
        variant: Variant,
        summed: Iterable[int],
        sum_at: Callable,
        units: Any,
        ahead: tuple,
    ) -> None:
        self.b, self.v, self.sum_at, self.ahead = b, v, sum_at, ahead
        self.kind, self.rows, self.width = variant.kind, variant.rows, variant.width
        self.bytes = v.fmt.bytes
        self.vector_bytes = tiling.lanes * self.bytes
        self.summed = sorted(summed)
        self.columns = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in self.summed]
        self.last_unit = None if units is None else b.sub(units, i64(1))
        alone = self.kind == "dots" and len(self.summed) == 1
        self.narrow = b.icmp_signed("<", units, i64(v.lanes)) if alone else None  # whether few columns are all
        whole = self.width >= tiling.block and self.kind != "rest"
        self.panel = tiling.block if whole else 1  # vectors side by side in it
        self.unrolled = self.kind in ("rows", "far") and self.rows >= min(UNROLLED_ROWS, tiling.rows)
        self.tallest = 1 if self.kind in ("single", "dot") else tiling.rows

    def sums(self, each: Callable, fresh) -> dict:
        """The sums by row, vector and accumulator, with those of earlier parts of the depth, unless it is `fresh`.

        each: calls a function of an operand and values, which returns new ones, for each operand, in turn."""
        sums = dict.fromkeys(self.columns, self.v.const(0.0))
        if self.kind == "dot":
            sums = self.dots(each, sums)
        elif self.kind == "dots":
            sums = self.dots_of_rows(each, sums)
        else:

            def add(operand: Operand, values: list) -> list:
                return list(self.product(operand, dict(zip(self.columns, values, strict=True))).values())

            sums = dict(zip(self.columns, each(add, list(sums.values())), strict=True))
        return self.add_partial_sums(sums, fresh)

    def keep(self, sums: dict) -> None:
        """Leave the sums for the next part of the depth, or for the epilogue."""
        for key in self.columns:
            self.v.store(sums[key], self.sum_at(*key))

    def add_partial_sums(self, sums: dict, fresh) -> dict:
        """Each part of the depth is summed by itself, which loses less to rounding than one long sum."""
        b = self.b
        before, more, go = b.block, b.append_basic_block("more"), b.append_basic_block("go")
        b.cbranch(fresh, go, more)
        b.position_at_end(more)
        totals = {key: b.fadd(sums[key], self.v.load(self.sum_at(*key))) for key in self.columns}
        b.branch(go)
        b.position_at_end(go)
        return {key: joined(b, (sums[key], before), (totals[key], more)) for key in self.columns}

    def product(self, operand: Operand, sums: dict) -> dict:
        """sums + rows[begin:end] @ weights[begin:end].

        Several rows: the rows' broadcasts stay in registers and the weights pass one vector at a time. A single row, or
        a rest, may have too few independent sums to hide the latency of the multiply-adds: its depth is interleaved
        over several, as many for few rows as for all, so that sums are the same.
        """
        chains = self.tallest * self.width * len(operand.targets)
        interleave = 1
        while self.kind in ("single", "rest", "half") and chains * interleave < LATENCY_CHAINS and interleave < 4:
            interleave *= 2
        b, begin, end = self.b, operand.begin, operand.end
        keys = [(m, w, a) for m in range(self.rows) for w in range(self.width) for a in operand.targets]
        chain = [{key: sums[key] if i == 0 else self.v.const(0.0) for key in keys} for i in range(interleave)]
        line = b.add(operand.line, b.mul(operand.grow, i64(self.panel)))
        apart = b.mul(operand.vector, i64(self.panel))
        panels = [b.add(operand.weights, b.mul(apart, i64(p))) for p in range(self.width // self.panel)]
        stride = UNROLL if self.unrolled else interleave
        asked = self.share_of_next(operand, line) if self.kind == "far" and asking().shared else None
        add = self.multiplied(operand, panels, line, asked)
        if operand.beside is not None:
            begin, chain = self.together(operand.beside, add, chain, keys, begin, end, stride)
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

    def dots(self, each: Callable, sums: dict) -> dict:
        """sums + rows @ weights for one row and one vector of units, by dot products with the weight matrices'
        own rows."""
        v = self.v

        def found(number) -> list:
            def add(operand: Operand, lanes: list) -> list:
                pointers, end = self.weight_rows(number, operand, [i64(i) for i in range(v.lanes)])
                return self.dot(operand.rows[0], pointers, operand.begin, end, lanes)

            return [v.sums(each(add, [v.const(0.0)] * v.lanes))]

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
        places = {(m, 0, a): (i64(n), i64(m)) for n, a in enumerate(self.summed) for m in range(self.rows)}
        return {key: b.fadd(sums[key], b.load(b.gep(more, [i64(0), *place]))) for key, place in places.items()}

    def weight_rows(self, number, operand: Operand, units: list) -> tuple:
        """Where the rows of a weight matrix begin that an accumulator, by its number, takes up from an operand, for
        some of a vector's units, and where the depth ends. Units that do not exist repeat the last one that does, and
        nobody stores their results; an accumulator may take up nothing."""
        b, end, blocks = self.b, operand.end, dict(zip(operand.targets, operand.blocks, strict=True))
        *others, last = (blocks.get(a, -1) for a in self.summed)
        block = i64(last)
        for n, one in enumerate(others):
            block = b.select(b.icmp_signed("==", number, i64(n)), i64(one), block)
        if len(blocks) < len(self.summed):
            end = b.select(b.icmp_signed("<", block, i64(0)), operand.begin, end)
        base = b.add(operand.weights, b.mul(operand.grow, block))
        if self.last_unit is not None:
            units = [b.select(b.icmp_signed("<", i, self.last_unit), i, self.last_unit) for i in units]
        return [b.add(base, b.mul(unit, operand.line)) for unit in units], end

    def dots_of_rows(self, each: Callable, sums: dict) -> dict:
        """The same for several rows, of a few units at a time: of the weights, each number is read for all rows."""
        b, v = self.b, self.v
        count, rows = min(DOT_UNITS, v.lanes), range(self.rows)
        groups = v.lanes // count
        with b.goto_entry_block():
            folded = b.alloca(ir.ArrayType(v.type, self.rows * groups))

        def place(m: int, group):
            return b.gep(folded, [i64(0), b.add(group, i64(m * groups))])

        # Groups of units that do not exist are left out: nobody stores what comes of their places.
        there = b.udiv(b.add(self.last_unit, i64(count)), i64(count))
        there = b.select(b.icmp_signed("<", there, i64(groups)), there, i64(groups))

        def found(number) -> list:
            def some(group, _, ahead=False):
                units = [b.add(b.mul(group, i64(count)), i64(i)) for i in range(count)]
                keys = [(m, i) for m in rows for i in range(count)]

                def add(operand: Operand, values: list) -> list:
                    pointers, end = self.weight_rows(number, operand, units)
                    return self.dots_along(operand.rows, pointers, operand.begin, end, values, ahead)

                dots = dict(zip(keys, each(add, [v.const(0.0)] * len(keys)), strict=True))
                for m in rows:
                    b.store(v.sums([dots[m, i] for i in range(count)]), place(m, group))
                return []

            first = i64(0)
            if (
                self.narrow is not None
            ):  # the rows of an input may be far: a first group reads them, others find them near
                with b.if_then(self.narrow):
                    some(first, [], ahead=True)
                first = b.zext(self.narrow, I64)
            counted(b, first, there, 1, [], some)
            return [v.sums([b.load(place(m, i64(group))) for group in range(groups)], count) for m in rows]

        return self.with_each_gate(sums, found)

    def dots_along(self, rows: list, pointers: list, begin, end, sums: list, ahead: bool) -> list:
        """sums, of each row with each pointer, + row[begin:end] * the numbers that the pointer points to. ahead: the
        rows of the next tile are asked for."""
        b, v, keys = self.b, self.v, [(m, i) for m in range(len(rows)) for i in range(len(pointers))]
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

        whole, values = counted(b, begin, end, v.lanes, sums, add)
        return self.with_rest(add, whole, end, values)

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

    def share_of_next(self, operand: Operand, line) -> tuple:
        """Of the same depth of the panel that is multiplied next: where step 0's line of what this tile asks for would
        be, and bytes to the next step's."""
        b, begin, end = self.b, operand.begin, operand.end
        following, number = self.ahead
        panel = b.add(operand.weights, b.mul(following, operand.vector))
        first = b.sub(b.mul(number, b.sub(end, begin)), begin)
        at = b.add(panel, b.add(b.mul(begin, line), b.mul(first, i64(LINE))))
        return self.opaque(at), self.opaque(i64(LINE))

    def multiplied(self, operand: Operand, panels: list, line, asked: tuple | None) -> Callable:
        """A function of k and sums: these with what step k of the depth adds. asked: see share_of_next."""
        b, v = self.b, self.v
        rows, step = operand.rows, operand.step
        if step is None:
            step = i64(self.bytes)
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
                for t, a in enumerate(operand.targets):
                    inner = ((w % self.panel) * len(operand.targets) + t) * self.vector_bytes
                    weight = v.load(b.add(base, i64(inner)))
                    if self.kind == "far" and asked is None:
                        for byte in range(0, self.vector_bytes, LINE):
                            v.prefetch(b.add(base, i64(inner + AHEAD + byte)))
                    for m in range(self.rows):
                        out[m, w, a] = v.fma(scalar[m], weight, sums[m, w, a])
            return out

        return add
