"""Where kernels and their callers find things: in arrays of 64-bit words. Free of Numba, so that stored kernels run
without it.

A frame has everything that a call needs; an agenda says what a thread does at a time step.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..program import Program, Stage
from .geometry import PARTS, Tiling, is_direct

LINE = 64  # bytes of a line of cache


def _lines(words: int) -> int:
    """Bytes of so many words, in whole lines."""
    return -(-8 * words // LINE) * LINE


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
    "tall",  # address of the kernel of `tall` that makes the sums of several rows, unless these are results
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
    "variant",  # of a tile, to which its rows are added, or an epilogue; of what has no variants the stage's first
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
ITEM_BYTES = _lines(len(ITEM))
# An item for a kernel of `tall` goes on with these words; the number of segments up to the end of each group, which are
# those that go into the same accumulators; and WEIGHTS_WORDS of each segment.
TALL = (
    "kernel",  # address
    "bytes",  # of the item
    "units",  # from the tile's first on
)
WEIGHTS_WORDS = ("weights", "vector", "line", "grow", "begin", "end")  # see SEGMENT_WORDS, but at the tile's first unit
# Before such items of a stage a table is made of where the rows of this step are: these words; ROWS_WORDS of each
# segment, and then of all that is asked for ahead.
ROWS = ("asks", "asks_end")  # addresses of the first of the latter, and after the last
ROWS_WORDS = ("address", "row")  # of the first row, and bytes to the next


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


def agenda_bytes(
    program: Program, tilings: Sequence[Tiling], sizes: Sequence[tuple[int, int]], groups: int, dot: bool
) -> int:
    """Room for any agenda: what one takes is no more. sizes: units, and how many parts the depth is in, of each stage;
    groups: of rows that differ in whether they have a step before or after; dot: see STAGE_WORDS."""
    items, tall = 2, 0
    for stage, tiling, (units, parts) in zip(program.stages, tilings, sizes, strict=True):
        vectors = -(-units // tiling.lanes)
        tiles = groups * (vectors if dot else parts * (vectors // tiling.block + len(tiling.widths)))
        items += 2 + groups * (1 + PARTS * vectors * (dot or not is_direct(stage)))
        tall += tiles * tall_bytes(stage) * bool(stage.segments)
    return items * ITEM_BYTES + tall


def tall_bytes(stage: Stage) -> int:
    """Of an item for a kernel of `tall`."""
    return ITEM_BYTES + _lines(len(TALL) + len(stage.segments) * (1 + len(WEIGHTS_WORDS)))


def rows_bytes(program: Program) -> int:
    """Room for a table of rows, whatever the stage."""

    def words(stage: Stage) -> int:
        asked = 1 + len(stage.loads) + len(stage.outputs) + sum(len(start) for _, start in stage.accumulators)
        return len(ROWS) + len(ROWS_WORDS) * (len(stage.segments) + asked)

    return max(_lines(words(stage)) for stage in program.stages)


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
DIGEST_BYTES = _lines(DIGEST)
