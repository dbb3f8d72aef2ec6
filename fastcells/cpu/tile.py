"""Tiles of a program's own kernel: products whose sums go on in registers.

Of a single row, whose steps wait for each other, a tile is the epilogue, too; and where nothing is to be done with the
sums, they are results, of several rows as well. Other tiles of several rows are those of `tall`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llvmlite import ir

from ..program import Program
from .beside import BESIDE_ARGUMENTS, Beside
from .emitter import CONTEXT, Emitter, switch
from .frame import Layout
from .geometry import BESIDE_WIDTHS, Tiling, Variant, rides, variants
from .products import Operand, Products
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
        self.variant = variant
        if variant.kind == "half":
            self.v = Vector(builder, self.v.fmt, tiling.lanes // 2)
        beside = variant.kind == "single" and self.width in tiling.widths[:BESIDE_WIDTHS] and not variant.partial
        self.rides = beside and index == 0 and rides(program, tiling)

    def emit(self) -> None:
        b = self.b
        units = self.existing() if self.variant.partial else None
        for place in [*(s.rows for s in self.stage.segments), *self.reached]:
            self.row_addresses(place)  # before the branches below, whose blocks all use them
        self.look_ahead()
        ahead = self.arg["next"], self.arg["number"]
        products = Products(b, self.v, self.tiling, self.variant, self.summed, self.sum_at, units, ahead)
        operands = list(self.operands())

        def each(add: Callable, values: list) -> list:
            for operand in operands:
                values = add(operand, values)
            return values

        sums = products.sums(each, self.true(self.arg["fresh"]))
        epilogue, keep, done = (b.append_basic_block(n) for n in ("epilogue", "keep", "variant.done"))
        b.cbranch(self.true(self.arg["last"]), epilogue, keep)
        b.position_at_end(keep)
        products.keep(sums)
        b.branch(done)
        b.position_at_end(epilogue)
        self.epilogue(lambda *key: sums[key])
        b.branch(done)
        b.position_at_end(done)

    def operands(self) -> Iterator[Operand]:
        """The segments. Depths follow one another; the tile's part of them may begin and end in any."""
        b, offset = self.b, i64(0)
        beside = Beside(b, self.v, self.layout, self.arg) if self.rides else None
        for j, segment in enumerate(self.stage.segments):
            word = self.segment_words(j)
            begin, end = self.part_of(word["depth"], offset)
            chained = segment.rows.when == "before"
            yield Operand(
                targets=segment.targets,
                blocks=segment.weights.blocks(self.program.gates),
                rows=self.row_addresses(segment.rows),
                weights=b.add(word["weights"], b.mul(self.arg["unit"], word["vector"])),
                vector=word["vector"],
                line=word["line"],
                grow=word["grow"],
                step=word["k"] if segment.strided else None,
                begin=begin,
                end=end,
                beside=beside if chained else None,
            )
            beside = None if chained else beside
            offset = b.add(offset, word["depth"])

    def look_ahead(self) -> None:
        """Ask for what is `asked`."""
        for wanted, place in self.asked() if self.variant.kind not in ("single", "dot") else []:
            with self.b.if_then(self.b.and_(wanted, self.true(self.arg["last"]))):
                for m in range(self.rows):
                    self.v.prefetch_all(self.at(place, m, 0), self.width * self.vector_bytes)
