"""How a stage is cut into tiles and epilogues. Free of Numba, so that stored kernels run without it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from ..plan import DOT_UNITS
from ..program import Program, Stage
from .host import host
from .order import early

BESIDE_ROWS = 8  # as many as a vector of weights has to meet to be read seldom
BESIDE_WIDTHS = 2  # of a single row's tiles, the widest so many take input projections along


@dataclass(frozen=True)
class Tiling:
    """How a stage is cut into tiles, for so many registers of `lanes` numbers.

    widths: vectors of units in a tile, widest first; the first is for a single row, which needs the independent
    chains; the second is a block, in which weights are packed, and the narrower ones are for the rest, whose vectors
    are packed each by itself; the last, 0, is one vector of which not all lanes exist. rows: at most so many in a tile.
    """

    registers: int
    lanes: int
    rows: int
    widths: tuple[int, ...]

    @property
    def block(self) -> int:
        """The widest tile for several rows."""
        return self.widths[1]

    def number_of_sum(self, row: int, vector: int, accumulator: int, accumulators: int) -> int:
        """In which order products leave their sums, a vector each."""
        return (row * self.block + vector) * accumulators + accumulator

    @property
    def dot_rows(self) -> int:
        """At most so many in a tile of dot products, whose vectors stay in registers, too."""
        return min(DOT_ROWS, (self.registers - 1) // (DOT_UNITS + 1))


HALF_ROWS = 3  # from which on half a vector takes less time than a whole one; fewer wait for the weights
WIDEST = 4  # vectors of units in a tile for several rows,
REST_WIDTH = 2  # and at most in one for the rest
DOT_ROWS = 4  # in a tile of dot products: enough for each number of the weights to be multiplied while others are read
UNROLL = 2  # steps of the depth in one turn of the inner loop, whose loads and multiply-adds almost fill the pipeline,
UNROLLED_ROWS = 4  # of tiles of so many rows and more; lower ones are used less than they take to compile
LATENCY_CHAINS = 8  # independent sums that hide the latency of a fused multiply-add: 4 cycles x 2 units


def tiling_of(stage: Stage, registers: int, lanes: int) -> Tiling:
    """The tiling of a stage, which may take a row at a time."""
    return Tiling(registers, lanes, 1, (1, 1, 0)) if stage.passes else tiled(len(stage.accumulators), registers, lanes)


def tiled(accumulators: int, registers: int, lanes: int) -> Tiling:
    """Accumulators fill the registers, leaving room for a weight vector and the rows' broadcasts."""
    count = max(1, accumulators)
    block = WIDEST if count == 1 else 2 if count == 2 else 1
    rows = max(1, min(6, (registers - 4) // (count * block)))
    return Tiling(registers, lanes, rows, (2 * block, *(w for w in (WIDEST, REST_WIDTH, 1) if w <= block), 0))


MAX_ROWS = 16  # variants are numbered ((stage * MAX_WIDTHS) + width) * MAX_ROWS + rows; rows 0 is a single row,
DOT = 7  # this a single row whose products are dot products with the rows of a weight matrix as it is,
FAR = 8  # and this + rows a tile that asks for weights ahead
MAX_WIDTHS = 8
DOTS = 6  # in place of a width: several rows' dot products


class Asking(NamedTuple):
    """Which tiles ask for weights that are far: the first `tiles` of those that multiply the same ones, if they have no
    more than `lacking` rows less than a full one. shared: each asks for a share of the next weights, a line for each
    step of the depth; else for its own, a page ahead."""

    tiles: int
    lacking: int
    shared: bool


def asking() -> Asking:
    """Where weights come slowly, a tile would wait for its own most of the time."""
    return Asking(4, 2, True) if host().distant else Asking(1, 0, False)


class Variant(NamedTuple):
    """A tile of a stage: rows x vectors of units. kind: "rows" or "far", of a block; "rest", of what follows blocks;
    "half", of no more than half a vector, numbered as a width after all others; "single" or "dot", of one row; "dots",
    of several. partial: whether lanes of the last vector may not exist, and it matters."""

    number: int
    rows: int
    width: int
    kind: str
    partial: bool = False


def rides(program: Program, tiling: Tiling) -> bool:
    """Whether a row's tiles take input projections of later steps along (see beside.py): there are registers to spare,
    and vectors that pass in halves take longer to multiply and add than to read."""
    (stage, *_), buffers = program.stages, program.buffers()
    recurrent = any(s.rows.when == "before" for s in stage.segments) and {"x", "start"} <= set(buffers)
    sums = tiling.widths[0] * len(stage.accumulators)
    return host().halves and recurrent and sums + BESIDE_ROWS + 4 <= tiling.registers


def is_direct(stage: Stage) -> bool:
    """Whether tiles store their sums as results, since nothing else is to be done with them; not of dot products of
    several rows."""
    sums = {node for node, _ in stage.accumulators}
    return bool(stage.segments) and not stage.passes and all(node in sums for node, _, _ in stage.outputs)


def dotted(stage: Stage) -> bool:
    """Whether its products may be dot products."""
    return any(not s.weights.transposed for s in stage.segments)


def leaves_sums(stage: Stage) -> bool:
    """Whether there are tiles of several rows that do."""
    return dotted(stage) or (bool(stage.segments) and not is_direct(stage))


def halved(tiling: Tiling) -> bool:
    """Whether there are tiles of several rows and half a vector, for a last vector of which no more exists: where wide
    vectors pass in halves, these take half the time."""
    return host().halves and tiling.rows >= HALF_ROWS


def number_of(width: int, rows: int, stage: int = 0) -> int:
    return (stage * MAX_WIDTHS + width) * MAX_ROWS + rows


def variants(stage: Stage, tiling: Tiling, index: int) -> list[Variant]:
    """The tiles of a stage that its program's kernel has."""
    if not stage.segments:
        return []
    found = [Variant(number_of(w, 0, index), 1, n or 1, "single", n == 0) for w, n in enumerate(tiling.widths)]
    if dotted(stage):
        found += [Variant(number_of(w, DOT, index), 1, 1, "dot", n == 0) for w, n in enumerate(tiling.widths) if n <= 1]
    return found + (tall(tiling, index, True) if is_direct(stage) else [])


def tall(tiling: Tiling, index: int = 0, direct: bool = False) -> list[Variant]:
    """Tiles of several rows. Those that leave sums need not know of units that do not exist."""
    block, after = tiling.block, len(tiling.widths)

    def heights(width: int, vectors: int, kind: str, least: int = 1, more: int = 0) -> list[Variant]:
        partial = direct and kind in ("rest", "half")
        rows = range(least, tiling.rows + 1)
        return [Variant(number_of(width, more + r, index), r, vectors, kind, partial) for r in rows]

    assert max(tiling.rows - DOT, FAR + tiling.rows - MAX_ROWS, after - DOTS) < 0, "variants would share a number"
    found = heights(1, block, "rows")
    for width, vectors in enumerate(tiling.widths[1:-1], 1):
        if vectors < block or (vectors <= REST_WIDTH and rest_of_block(tiling, direct) == 0):
            found += heights(width if vectors < block else 0, vectors, "rest")
    if halved(tiling):  # heights of tiles that HALF_ROWS and more are cut into
        found += heights(after, 1, "half", 2 if tiling.rows < 5 else 3)
    return found + heights(1, block, "far", max(1, tiling.rows - asking().lacking), FAR)


def dots(tiling: Tiling) -> list[Variant]:
    """Tiles of dot products of several rows."""
    return [Variant(number_of(DOTS, r), r, 1, "dots") for r in range(1, tiling.dot_rows + 1)]


class Family(NamedTuple):
    """What the tiles of several rows that leave sums depend on, of all stages that have so many accumulators. groups:
    the targets of segments that follow each other, with the same ones; for dot products, which read weights as they
    are, also these' blocks of rows, and how many segments there are."""

    accumulators: int
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    dot: bool

    @property
    def name(self) -> str:
        segments = [targets for targets, _, count in self.groups for _ in range(max(count, 1))]
        return "_".join(["dots" if self.dot else "tall", *("".join(map(str, targets)) for targets in segments)])

    def variants(self, registers: int, lanes: int) -> list[Variant]:
        tiling = tiled(self.accumulators, registers, lanes)
        return dots(tiling) if self.dot else tall(tiling)


def runs(stage: Stage, gates: tuple[str, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Targets and blocks of rows of the stage's segments, and how many follow each other that have the same."""
    found = groupby(stage.segments, lambda s: (s.targets, s.weights.blocks(gates)))
    return [(*key, len(list(some))) for key, some in found]


def family_of(stage: Stage, gates: tuple[str, ...], dot: bool) -> Family:
    """The family of a stage's tiles."""
    found = [run if dot else (run[0], (), 0) for run in runs(stage, gates)]
    return Family(len(stage.accumulators), tuple(found), dot)


def rest_of_block(tiling: Tiling, direct: bool) -> int:
    """The number among the widths of a rest of as many vectors as a block has: that of a block, whose tiles do where a
    vector is packed as a block is, and leave sums; else 0, which only a single row has."""
    return 1 if tiling.block == 1 and not direct else 0


TOGETHER = 4  # vectors whose epilogues are interleaved
EPILOGUES = 12  # a stage's are numbered stage * EPILOGUES + SEVERAL rows, if so, + PARTIAL or ALONG, + its LATE part
SEVERAL, PARTIAL, ALONG, LATE = 1, 2, 4, 6
PARTS = 2  # of an epilogue, at most


class Epilogue(NamedTuple):
    """What follows a stage's products, of one row or of TOGETHER: of one vector, of one of which not all lanes exist,
    or of TOGETHER beside each other. part: see order.py."""

    number: int
    rows: int
    width: int
    partial: bool = False
    part: str = "whole"


def epilogues(stage: Stage, tiling: Tiling, index: int) -> list[Epilogue]:
    """Every epilogue of a stage."""
    if stage.segments and not leaves_sums(stage):
        return []
    if stage.passes:  # all units of a row
        return [Epilogue(index * EPILOGUES, 1, 1)]
    widths = {0: 1, PARTIAL: 1} | ({ALONG: TOGETHER} if tiling.block >= TOGETHER else {})
    return [
        Epilogue(
            index * EPILOGUES + kind + several + k * LATE, TOGETHER if several else 1, width, kind == PARTIAL, part
        )
        for k, part in enumerate(epilogue_parts(stage))
        for kind, width in widths.items()
        for several in (0, SEVERAL)
    ]


def epilogue_parts(stage: Stage) -> tuple[str, ...]:
    """What all rows go through, one after the other, once their products are there."""
    return ("early", "late") if early(stage) else ("whole",)
