"""Epilogues: what becomes of the sums that products leave, some vectors of units at a time, or a row at a time.

`epilogues` of a stage (geometry.py) lists the variants: vectors of one row or of several, so that enough of them are
under way at once to fill the pipeline.
"""

from __future__ import annotations

from contextlib import nullcontext

from llvmlite import ir

from ..expression import Node, is_reduction
from ..program import Outputs, Pass, Program
from .emitter import CONTEXT, Emitter, joined, switch
from .frame import WORD, Layout
from .geometry import Epilogue, Tiling, epilogues
from .order import Fused, between, fuse
from .simd import I64, i64

EPILOGUE = "fastcells_epilogue"


def emit_epilogues(module: ir.Module, program: Program, dtype: str, tilings: list[Tiling]) -> None:
    """Add the function `EPILOGUE` of `CONTEXT`, which is to be inlined where it is called."""
    layout = Layout(program)
    with switch(module, EPILOGUE, CONTEXT) as (builder, arguments, case):
        for k, (stage, tiling) in enumerate(zip(program.stages, tilings, strict=True)):
            kind = Row if stage.passes else Vectors
            for variant in epilogues(stage, tiling, k):
                case(variant.number, f"epilogue.{k}.{variant.rows}x{variant.width}")
                emitter = kind(builder, layout, dtype, k, program, tiling, variant.rows, variant.width, arguments)
                emitter.emit(variant)


class Vectors(Emitter):
    """Emits the epilogue of some vectors of hidden units."""

    def emit(self, variant: Epilogue) -> None:
        if variant.partial:
            self.existing()
        for place in self.reached:  # before the branches below, whose blocks all use them
            self.row_addresses(place)
        self.epilogue(lambda *key: self.v.load(self.sum_at(*key)), variant.part)


class Row(Emitter):
    """Emits the passes over one row: in each a loop over its vectors, then what its sums give."""

    def emit(self, variant: Epilogue) -> None:
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
            self.known[node] = self.compute(node, {a: self.uniform(a) for a in node.args}, {})
        return self.known[node]

    def run(self, part: Pass) -> None:
        b, v = self.b, self.v
        roots = [*(n for n, _, _ in part.outputs), *(a for n in part.reductions for a in n.args)]
        order = between(lambda n: n in part.loads or n in self.stage.loads or n.uniform, roots)
        for n in dict.fromkeys([*roots, *(a for m in order for a in m.args)]):
            if n.uniform:
                self.uniform(n)
        before = b.block
        body, done = b.append_basic_block("vectors"), b.append_basic_block("vectors.done")
        zeros = [v.const(0.0) for _ in part.reductions]
        b.cbranch(b.icmp_signed(">", self.whole, i64(0)), body, done)
        b.position_at_end(body)
        k = b.phi(I64)
        sums = [b.phi(v.type) for _ in part.reductions]
        self.unit_bytes = b.mul(k, i64(self.vector_bytes))
        ordered = fuse(order, roots)
        new = self.vector(part, ordered, sums)
        k_next, end = b.add(k, i64(1)), b.block
        for phi, first, then in zip([k, *sums], [i64(0), *zeros], [k_next, *new], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, end)
        b.cbranch(b.icmp_signed("<", k_next, self.whole), body, done)
        b.position_at_end(done)
        sums = [joined(b, (zero, before), (s, end)) for zero, s in zip(zeros, new, strict=True)]
        tail, after = b.append_basic_block("tail"), b.append_basic_block("tail.done")
        b.cbranch(b.icmp_signed(">", self.rest, i64(0)), tail, after)
        b.position_at_end(tail)
        self.unit_bytes = b.mul(self.whole, i64(self.vector_bytes))
        self.mask = v.first_lanes(self.rest)
        new, end = self.vector(part, ordered, sums), b.block
        self.mask = None
        b.branch(after)
        b.position_at_end(after)
        totals = [joined(b, (s, done), (then, end)) for s, then in zip(sums, new, strict=True)]
        for node, total in zip(part.reductions, totals, strict=True):
            count = len(node.args) - (node.op == "variance")
            self.known[node] = b.fmul(v.sum(total), b.fmul(self.share, v.const(1 / count)))

    def vector(self, part: Pass, ordered: tuple[list[Node], Fused], sums: list) -> list:
        """One vector of a pass; the sums with it."""
        b, v = self.b, self.v
        values = dict(self.known)
        for node, place in part.loads.items():
            values[node] = self.load(place, 0, 0)
        order, fused = ordered
        for node in order:
            if node not in values:
                values[node] = self.compute(node, values, fused)
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
