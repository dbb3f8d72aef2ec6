"""How kernels and their callers agree on tiles and on the frame; free of Numba, so that stored kernels run without it.

A frame is one array of 64-bit words with everything that a call needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..plan import DOT_UNITS
from ..program import Program, Stage
from .host import host
from .order import early

LINE = 64  # bytes of a line of cache

HEADER = (
    "steps",  # time steps
    "rows",  # sequences at the fullest step
    "shares",  # address of the row, or vector of units, that each thread's share begins at, and the end; 0: even ones
    "threads",  # that the shares were made for
    "positions",  # address of the position of every step, 0 where positions are first + step * delta
    "first",
    "delta",
    "counts",  # address of the number of sequences at every step, 0 where it is always `rows`
    "split",  # 0: threads share the rows, 1: the units
    "arrivals",  # address of lines of cache, by which they wait for each other after every stage; 0: they do not
    "yield",  # address of the function that gives up the processor
    "row_block",  # rows that go through all time steps together
    "scratch",  # address of agendas and partial sums
    "scratch_thread",  # bytes of them a thread,
    "agenda",  # and of an agenda, of which it has two
    "slot",  # bytes of one vector of the hidden size
    "training",  # 1: store what only training needs
    "far",  # 1: tiles ask for weights ahead
    "several",  # 1: a single row is one of several that are elsewhere, and its sums are made as theirs
    "beside",  # how often BESIDE_ROWS rows of later steps are multiplied by the input's weights on the way,
    "beside_units",  # columns,
    "beside_depth",
    "beside_weights",  # address of the panel,
    "beside_start",  # and of what their products start from
)
STAGE_WORDS = (
    "units",
    "skip",  # depth that is not multiplied at a sequence's first processed step
    "depth",
    "part",  # of it that is multiplied at a time
    "dot",  # 1: products read weight matrices as they are, rows along the depth
)
BUFFER_WORDS = (
    "address",
    "step",  # bytes from position to position
    "row",  # bytes from row to row
    "initial",  # address of the rows that stand for the step before a sequence's first or after its last
    "initial_row",
)
SEGMENT_WORDS = (
    "depth",
    "weights",  # address
    "vector",  # bytes from one vector of units to the next
    "line",  # bytes from k to k + 1, and so many more for each vector of units in the tile's block;
    "grow",  # "dot": bytes from unit to unit, and from one gate's block of rows to the next
    "k",  # bytes from k to k + 1 of the rows that meet the weights, where a segment is `strided`
)
BESIDE_ROWS = 8  # as many as a vector of weights has to meet to be read seldom
BESIDE_WIDTHS = 2  # of a single row's tiles, the widest so many take input projections along
WORD = {name: k for k, name in enumerate(HEADER)}

# The frame of a script, from its last word on the addresses of the operands; the first is the call's own memory.
SCRIPT = (
    "launches",
    "table",
    "threads",  # that have something to do,
    "team",  # and that it runs on: all that torch has, since those that a team lacks end, and are made anew
    "yield",
    "fastest",  # address of the nanoseconds of its fastest runs, on a team and on one thread, 0 before the first
    "arrivals",  # offset of lines of cache, one for each thread, by which threads wait for each other between launches
    "operands",
)
LAUNCH = (
    "kernel",  # address
    "words",  # address of the frame, in which addresses are still missing
    "length",
    "relocations",  # address of (word, operand, offset)
    "count",
    "frame",  # offset in the call's memory where the frame is filled in
    "first",  # thread of the team
    "threads",
    "wait",
)
TEAM = (  # of the process, for scripts that run on its threads
    "parallel",  # functions: of the library that has the threads,
    "member",  # what each of them runs, of [driver, script, thread_num, num_threads],
    "thread_num",  # and what it asks the library;
    "num_threads",
    "clock",  # the system's
    "credit",  # nanoseconds that the team may lose until scripts run on one thread,
    "alone",  # and until when they do, by the clock
)


# An item of an agenda, which says what one thread does at a time step. In place of the first are the numbers of rows
# that there are at that step, the one before and the next.
ITEM = (
    "kind",
    "variant",  # of a tile, to which its rows are added, or an epilogue
    "most",  # rows at a time; 0: a single one, by variants of its own
    "row",  # the first,
    "row_end",  # and the end
    *("unit", "is_first", "is_last"),  # see emitter.CONTEXT
    "sums",  # of the first row,
    "row_bytes",  # and to the next row's
    *("begin", "end", "fresh", "last"),  # see tile.TILE_ARGUMENTS
    "next",  # vectors of units to those whose weights are multiplied next; 0: these are not asked for ahead
    "along",  # 1: a single row's tile takes input projections of later steps along
)
ITEM_BYTES = -(-8 * len(ITEM) // LINE) * LINE


class Layout:
    """Numbers the words of a program's frame: header, stages, buffers, segments."""

    def __init__(self, program: Program) -> None:
        stages, buffers = len(program.stages), program.buffers()
        self.stage = [len(HEADER) + len(STAGE_WORDS) * k for k in range(stages)]
        end = len(HEADER) + len(STAGE_WORDS) * stages
        self.buffer = {name: end + len(BUFFER_WORDS) * k for k, name in enumerate(buffers)}
        end += len(BUFFER_WORDS) * len(buffers)
        self.segments = end  # of all stages, one after the other
        self.segment: dict[tuple[int, int], int] = {}
        for k, stage in enumerate(program.stages):
            for j in range(len(stage.segments)):
                self.segment[k, j] = end
                end += len(SEGMENT_WORDS)
        self.size = end


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
    """Accumulators fill the registers, leaving room for a weight vector and the rows' broadcasts."""
    if stage.passes:
        return Tiling(registers, lanes, 1, (1, 1, 0))
    count = max(1, len(stage.accumulators))
    block = WIDEST if count == 1 else 2 if count == 2 else 1
    rows = max(1, min(6, (registers - 4) // (count * block)))
    return Tiling(registers, lanes, rows, (2 * block, *(w for w in (WIDEST, REST_WIDTH, 1) if w <= block), 0))


def agenda_bytes(
    program: Program, tilings: Sequence[Tiling], sizes: Sequence[tuple[int, int]], groups: int, dot: bool
) -> int:
    """Room for any agenda: what one takes is no more. sizes: units, and how many parts the depth is in, of each stage;
    groups: of rows that differ in whether they have a step before or after; dot: see STAGE_WORDS."""
    items = 2
    for stage, tiling, (units, parts) in zip(program.stages, tilings, sizes, strict=True):
        vectors = -(-units // tiling.lanes)
        tiles = vectors if dot else parts * (vectors // tiling.block + len(tiling.widths))
        items += groups * (tiles * bool(stage.segments) + PARTS * vectors * (not is_direct(stage))) + 2
    return items * ITEM_BYTES


MAX_ROWS = 16  # variants are numbered ((stage * MAX_WIDTHS) + width) * MAX_ROWS + rows; rows 0 is a single row,
DOT = 7  # this a single row whose products are dot products with the rows of a weight matrix as it is,
FAR = 8  # and this + rows a tile that asks for weights ahead
MAX_WIDTHS = 8
DOTS = 6  # in place of a width: several rows' dot products; one more where not all lanes exist, and it matters


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
    """Whether all tiles store their sums as results: nothing else is to be done with them."""
    sums = {node for node, _ in stage.accumulators}
    return bool(stage.segments) and not stage.passes and all(node in sums for node, _, _ in stage.outputs)


def halved(stage: Stage, tiling: Tiling) -> bool:
    """Whether there are tiles of several rows and half a vector, for a last vector of which no more exists: where wide
    vectors pass in halves, these take half the time."""
    return host().halves and bool(stage.segments) and tiling.rows >= HALF_ROWS


def variants(stage: Stage, tiling: Tiling, index: int) -> list[Variant]:
    """Every tile of a stage. Those of several rows that leave sums need not know of units that do not exist."""
    if not stage.segments:
        return []
    block, direct, after = tiling.block, is_direct(stage), len(tiling.widths)

    def number(width: int, rows: int) -> int:
        return (index * MAX_WIDTHS + width) * MAX_ROWS + rows

    def tall(width: int, vectors: int, kind: str, partial: bool = False, least: int = 1) -> list[Variant]:
        return [Variant(number(width, r), r, vectors, kind, partial) for r in range(least, tiling.rows + 1)]

    assert max(tiling.rows - DOT, FAR + tiling.rows - MAX_ROWS, after - DOTS) < 0, "variants would share a number"
    found = [Variant(number(w, 0), 1, n or 1, "single", n == 0) for w, n in enumerate(tiling.widths)]
    found += tall(1, block, "rows")
    for width, vectors in enumerate(tiling.widths[1:-1], 1):
        if vectors < block or (vectors <= REST_WIDTH and rest_of_block(stage, tiling) == 0):
            found += tall(width if vectors < block else 0, vectors, "rest", direct)
    if halved(stage, tiling):  # heights of tiles that HALF_ROWS and more are cut into
        found += tall(after, 1, "half", direct, 2 if tiling.rows < 5 else 3)
    least = max(1, tiling.rows - asking().lacking)
    found += [Variant(number(1, FAR + r), r, block, "far") for r in range(least, tiling.rows + 1)]
    if any(not s.weights.transposed for s in stage.segments):
        found += [Variant(number(w, DOT), 1, 1, "dot", n == 0) for w, n in enumerate(tiling.widths) if n <= 1]
        for odd in (False, True) if direct else (False,):
            found += [Variant(number(DOTS + odd, r), r, 1, "dots", odd) for r in range(1, tiling.dot_rows + 1)]
    return found


def rest_of_block(stage: Stage, tiling: Tiling) -> int:
    """The number among the widths of a rest of as many vectors as a block has: that of a block, whose tiles do where a
    vector is packed as a block is, and leave sums; else 0, which only a single row has."""
    return 1 if tiling.block == 1 and not is_direct(stage) else 0


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
    if is_direct(stage):
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
    return () if is_direct(stage) else ("early", "late") if early(stage) else ("whole",)


# The frame of a packing kernel; then the offset in bytes of each gate. room: the depth that the panel has room for.
# keeps: 1 where it is what an earlier run left of it; then `digests` has for each of so many shares, of the units or of
# the depth, what it was packed from, and whether it was.
PACK = (
    *("panel", "source", "units", "depth", "room", "unit_stride", "depth_stride", "block", "gates"),
    *("shares", "digests", "keeps"),
)
TURN = ("target", "target_row", "source", "source_row", "rows", "columns")  # of what exchanges rows and columns: of the
# source, whose columns become rows of the target, with room for whole vectors; strides in bytes
DIGEST = 65  # words of a digest; the last is 1 once the panel is whole
DIGEST_BYTES = -(-8 * DIGEST // LINE) * LINE
