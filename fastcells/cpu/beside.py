"""Input projections of steps to come, made beside the recurrence of a single sequence.

A step of one sequence reads all recurrent weights to use each once: multiply-adds wait for them. Meanwhile a tile of
the recurrence can multiply some rows of the input, of later steps, by one vector of columns of the weights of the
input: BESIDE_ROWS rows at a time, one vector a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from .emitter import counted, frame_word
from .frame import BUFFER_WORDS, WORD, Layout
from .geometry import BESIDE_ROWS
from .simd import FORMATS, I64, Vector, i64

BESIDE = "fastcells_beside"
BESIDE_ARGUMENTS = (
    "later",  # position of the first of the rows
    "vector",  # which of the columns; -1: nothing is to be done
    "panel",  # its address,
    "line",  # and bytes from k to k + 1
)


class Beside:
    """The product of one vector of columns."""

    def __init__(self, b: ir.IRBuilder, v: Vector, layout: Layout, arguments: dict) -> None:
        self.b, self.v, self.layout, self.arg = b, v, layout, arguments
        self.wanted = b.icmp_signed(">=", arguments["vector"], i64(0))
        self.zeros = [v.const(0.0)] * BESIDE_ROWS

    def begin(self) -> None:
        """What follows is the code of a product that is wanted."""
        self.depth = self._word(WORD["beside_depth"])
        self.rows = self._rows(self.layout.buffer["x"])

    def _word(self, number: int):
        return frame_word(self.b, self.arg["frame"], number)

    def _rows(self, buffer: int) -> list:
        """Addresses of the rows in a buffer."""
        b = self.b
        address, step = (self._word(buffer + BUFFER_WORDS.index(n)) for n in ("address", "step"))
        addresses = [b.add(address, b.mul(self.arg["later"], step))]
        apart = b.mul(step, self._word(WORD["delta"]))
        for _ in range(BESIDE_ROWS - 1):
            addresses.append(b.add(addresses[-1], apart))
        return addresses

    def add(self, k, sums: Sequence) -> list:
        """The sums with what step k of the depth adds."""
        b, v = self.b, self.v
        weight = v.load(b.add(self.arg["panel"], b.mul(k, self.arg["line"])))
        at = b.mul(k, i64(v.fmt.bytes))
        numbers = [v.splat(b.load(v.pointer(b.add(row, at), v.fmt.scalar))) for row in self.rows]
        return [v.fma(x, weight, s) for x, s in zip(numbers, sums, strict=True)]

    def finish(self, begin, sums: Sequence) -> None:
        """Add what is left of the depth, and store the results."""
        b, v = self.b, self.v
        _, sums = counted(b, begin, self.depth, 1, sums, self.add)
        first = b.mul(self.arg["vector"], i64(v.lanes))
        mask = v.first_lanes(b.sub(self._word(WORD["beside_units"]), first))
        at = b.mul(first, i64(v.fmt.bytes))
        start = v.load(b.add(self._word(WORD["beside_start"]), at), mask)
        for target, value in zip(self._rows(self.layout.buffer["start"]), sums, strict=True):
            v.store(b.fadd(value, start), b.add(target, at), mask)


def emit_beside(module: ir.Module, dtype: str, lanes: int, layout: Layout, rides: bool) -> None:
    """Add the function `BESIDE` of a frame and `BESIDE_ARGUMENTS`, for what no tile of the recurrence took along."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * (1 + len(BESIDE_ARGUMENTS))), BESIDE)
    b = ir.IRBuilder(function.append_basic_block("entry"))
    if rides:
        arguments = dict(zip(("frame", *BESIDE_ARGUMENTS), function.args, strict=True))
        beside = Beside(b, Vector(b, FORMATS[dtype], lanes), layout, arguments)
        beside.begin()
        beside.finish(i64(0), beside.zeros)
    b.ret_void()
