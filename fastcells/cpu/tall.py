"""Tiles of several rows that leave sums, as kernels of their own, which programs share: they depend on how many
accumulators a stage has, and not on what becomes of these, so that a new cell needs no new ones.

A program's kernel says in an item of its agenda what a tile multiplies, and in a table where the rows of a step are
(`Operands`); the kernel here goes through the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from itertools import accumulate
from typing import Any

from llvmlite import ir

from ..program import Program
from .emitter import CONTEXT, Emitter, counted, frame_word, switch
from .frame import ITEM, ITEM_BYTES, ROWS, ROWS_WORDS, STAGE_WORDS, TALL, WEIGHTS_WORDS, Layout, tall_bytes
from .geometry import FAR, Family, Tiling, Variant, asking, leaves_sums, number_of, runs, tiled
from .intrinsics import peek
from .products import Operand, Products
from .routine import linked, routine
from .simd import FORMATS, I1, I64, Vector, i64
from .store import Linked

ASKING, LACKING, _ = asking()
VARIANT, MOST, ROW, ROW_END, NEXT = (ITEM.index(name) for name in ("variant", "most", "row", "row_end", "next"))
AFTER = ITEM_BYTES // 8  # the words of TALL
STAGE_VARIANTS = number_of(0, 0, 1)

TILE = "fastcells_tall_tile"
TILE_ARGUMENTS = (
    "variant",
    "item",
    "table",
    "row",  # the first of the tile, counted from the item's first
    "number",  # which of the tiles that multiply these weights this is
)


def make_tall(family: Family, dtype: str, registers: int, lanes: int) -> Linked:
    """The kernel of a family: `call(item, table, 0)`."""
    module, tiling = ir.Module("tall"), tiled(family.accumulators, registers, lanes)
    with switch(module, TILE, TILE_ARGUMENTS) as (builder, arguments, case):
        for variant in family.variants(registers, lanes):
            case(variant.number, f"tall.{variant.kind}.{variant.rows}x{variant.width}")
            Tall(builder, dtype, family, tiling, variant, arguments).emit()
    return Linked(all_rows, str(module))


class Tall:
    """Emits one variant."""

    def __init__(
        self, builder: ir.IRBuilder, dtype: str, family: Family, tiling: Tiling, variant: Variant, arguments: dict
    ) -> None:
        self.b, self.arg, self.family, self.tiling, self.variant = builder, arguments, family, tiling, variant
        self.whole = Vector(builder, FORMATS[dtype], tiling.lanes)

    def emit(self) -> None:
        self.ask()
        half, units = self.variant.kind == "half", self.word("units") if self.variant.kind == "dots" else None
        v = Vector(self.b, self.whole.fmt, self.tiling.lanes // 2) if half else self.whole
        self.sums = self.b.add(self.word("sums"), self.b.mul(self.arg["row"], self.word("row_bytes")))
        summed = {a for targets, *_ in self.family.groups for a in targets}
        ahead = self.word("next"), self.arg["number"]
        products = Products(self.b, v, self.tiling, self.variant, summed, self.sum_at, units, ahead)
        products.keep(products.sums(self.each, self.b.trunc(self.word("fresh"), I1)))

    def ask(self) -> None:
        """Ask for what is to be read or written of the rows once there are their sums."""
        b, vector = self.b, self.tiling.lanes * self.whole.fmt.bytes
        unit = b.mul(self.word("unit"), i64(vector))
        asks, end = (frame_word(b, self.arg["table"], k) for k in range(len(ROWS)))

        def some(at, _):
            address, row = (frame_word(b, at, k) for k in range(len(ROWS_WORDS)))
            address = b.add(b.add(address, unit), b.mul(self.arg["row"], row))
            for _ in range(self.variant.rows):
                self.whole.prefetch_all(address, self.variant.width * vector)
                address = b.add(address, row)
            return []

        with b.if_then(b.trunc(self.word("last"), I1)):
            counted(b, asks, end, 8 * len(ROWS_WORDS), [], some)

    def word(self, name: str):
        """Of the item."""
        number = ITEM.index(name) if name in ITEM else AFTER + TALL.index(name)
        return frame_word(self.b, self.arg["item"], number)

    def sum_at(self, row: int, vector: int, accumulator: int):
        number = self.tiling.number_of_sum(row, vector, accumulator, self.family.accumulators)
        return self.b.add(self.sums, i64(number * self.tiling.lanes * self.whole.fmt.bytes))

    def each(self, add: Callable, values: list) -> list:
        """values = add(operand, values) for one operand after the other: a loop over those of a group, since code for
        each would be as much again. Dot products have it: theirs are inside of loops."""
        begin, first = i64(0), 0
        for g, (targets, blocks, count) in enumerate(self.family.groups):

            def some(number, current, targets=targets, blocks=blocks):
                return add(self.operand(number, targets, blocks), current)

            if self.family.dot:
                for k in range(first, first + count):
                    values = some(i64(k), values)
                first += count
            else:
                end = frame_word(self.b, self.arg["item"], AFTER + len(TALL) + g)
                _, values = counted(self.b, begin, end, 1, values, some)
                begin = end
        return values

    def operand(self, number, targets: tuple[int, ...], blocks: tuple[int, ...]) -> Operand:
        b, first = self.b, AFTER + len(TALL) + len(self.family.groups)
        word = self._entry("item", first, WEIGHTS_WORDS, number) | self._entry("table", len(ROWS), ROWS_WORDS, number)
        address, row = word.pop("address"), word.pop("row")
        rows = [b.add(address, b.mul(self.arg["row"], row))]
        for _ in range(self.variant.rows - 1):
            rows.append(b.add(rows[-1], row))
        return Operand(targets=targets, blocks=blocks, rows=rows, **word)

    def _entry(self, where: str, first: int, names: tuple[str, ...], number) -> dict:
        """One of the entries that begin with word `first`, by its number."""
        at = self.b.add(self.arg[where], self.b.mul(number, i64(8 * len(names))))
        return {name: frame_word(self.b, at, first + k) for k, name in enumerate(names)}


tile = linked(TILE, TILE_ARGUMENTS)


@routine
def height(rows, most):
    """Of the next tile, of so many rows that are left."""
    if rows >= 2 * most:
        return most
    return (rows + 1) >> 1 if rows > most else rows  # even: 4 rows are 2 + 2, not 3 + 1


@routine
def shares(number, rows, most):
    """Whether a tile of so many rows is one that asks for weights ahead; number: of those that multiply the same."""
    return number < ASKING and rows + LACKING >= most


def all_rows(item, table, _):
    """Sums of all rows. Lowered once for all families; the tile is linked in."""
    n, number, end, most = 0, 0, peek(item, ROW_END) - peek(item, ROW), peek(item, MOST)
    variant, looks_ahead = peek(item, VARIANT) % STAGE_VARIANTS, peek(item, NEXT) != 0
    while n < end:
        rows = height(end - n, most)
        far = looks_ahead and shares(number, rows, most)
        tile(variant + (FAR + rows if far else rows), item, table, n, number)
        n += rows
        number += 1


# ---- what programs say ----
WEIGHTS, WHERE = "fastcells_weights", "fastcells_rows"
WEIGHTS_ARGUMENTS = ("frame", "variant", "unit", "begin", "end", "item")
WHERE_ARGUMENTS = (*CONTEXT, "table")


def emit_operands(module: ir.Module, program: Program, dtype: str, tilings: list[Tiling]) -> None:
    """Add the functions `WEIGHTS` of `WEIGHTS_ARGUMENTS` and `WHERE` of `WHERE_ARGUMENTS`, which go on with an item and
    fill in a table. "variant" is the number of a tile."""
    layout = Layout(program)
    for name, names, emit in (
        (WEIGHTS, WEIGHTS_ARGUMENTS, Operands.emit_weights),
        (WHERE, WHERE_ARGUMENTS, Operands.emit_rows),
    ):
        with switch(module, name, names, STAGE_VARIANTS) as (builder, arguments, case):
            for k, (stage, tiling) in enumerate(zip(program.stages, tilings, strict=True)):
                if leaves_sums(stage):
                    case(k, f"{name}.{k}")
                    emit(Operands(builder, layout, dtype, k, program, tiling, 1, 1, arguments))


class Operands(Emitter):
    """Emits what tells a kernel of `tall` of a stage."""

    def emit_weights(self) -> None:
        b, arg, offset, words = self.b, self.arg, i64(0), list[Any]()
        for j in range(len(self.stage.segments)):
            word = self.segment_words(j)
            part = self.part_of(word["depth"], offset)
            offset = b.add(offset, word["depth"])
            weights = b.add(word["weights"], b.mul(arg["unit"], word["vector"]))
            words += [weights, word["vector"], word["line"], word["grow"], *part]
        at, ends = self.layout.stage[self.index], accumulate(n for *_, n in runs(self.stage, self.program.gates))
        units = b.sub(self.word(at), b.mul(arg["unit"], i64(self.v.lanes)))
        kernel = self.word(at + STAGE_WORDS.index("tall"))
        self.put(
            b.add(arg["item"], i64(ITEM_BYTES)),
            [kernel, i64(tall_bytes(self.stage)), units, *map(i64, ends), *words],
        )

    def emit_rows(self) -> None:
        b = self.b
        words = [word for segment in self.stage.segments for word in self.origin(segment.rows)]
        asks = b.add(self.arg["table"], i64(8 * (len(ROWS) + len(words))))
        self.put(self.arg["table"], [asks, asks, *words])
        asked = self.asked()
        with b.if_then(reduce(b.or_, [wanted for wanted, _ in asked], self.true(i64(0)))):
            at = asks
            for wanted, place in asked:
                self.put(at, self.origin(place))
                at = b.select(wanted, b.add(at, i64(8 * len(ROWS_WORDS))), at)
            self.put(b.add(self.arg["table"], i64(8)), [at])

    def put(self, at, values: Iterable) -> None:
        """Set words."""
        for k, value in enumerate(values):
            self.b.store(value, self.b.inttoptr(self.b.add(at, i64(8 * k)), I64.as_pointer()))
