"""The loops around tiles and epilogues: time, stages, units, depth, rows. Compiled by Numba; both are inlined.

A kernel is `member(frame, thread, team)`: what one thread of a team does of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..program import Program
from .beside import BESIDE, BESIDE_ARGUMENTS, emit_beside
from .emitter import CONTEXT
from .epilogue import EPILOGUE, emit_epilogues
from .frame import ITEM, ITEM_BYTES, LAUNCH, LINE, SCRIPT, STAGE_WORDS, TALL, WORD, Layout, rows_bytes
from .geometry import (
    ALONG,
    BESIDE_ROWS,
    BESIDE_WIDTHS,
    DOT,
    DOTS,
    EPILOGUES,
    FAR,
    HALF_ROWS,
    LATE,
    MAX_ROWS,
    MAX_WIDTHS,
    PARTIAL,
    REST_WIDTH,
    SEVERAL,
    TOGETHER,
    WIDEST,
    epilogue_parts,
    halved,
    is_direct,
    rest_of_block,
    rides,
    tiling_of,
)
from .host import host
from .intrinsics import call, copy_words, float_control, give_way, least, pause, peek, poke, tell, told
from .routine import linked, routine, seldom
from .simd import FORMATS, I64, i64
from .store import Linked
from .tall import (
    AFTER,
    STAGE_VARIANTS,
    WEIGHTS,
    WEIGHTS_ARGUMENTS,
    WHERE,
    WHERE_ARGUMENTS,
    emit_operands,
    height,
    shares,
)
from .tile import TILE, TILE_ARGUMENTS, emit_tiles

STEPS, ROWS, SHARES, THREADS = WORD["steps"], WORD["rows"], WORD["shares"], WORD["threads"]
POSITIONS, FIRST, DELTA = WORD["positions"], WORD["first"], WORD["delta"]
COUNTS, SPLIT, ARRIVALS, YIELD = WORD["counts"], WORD["split"], WORD["arrivals"], WORD["yield"]
ROW_BLOCK, FAR_AT, SEVERAL_ROWS = WORD["row_block"], WORD["far"], WORD["several"]
BESIDE_AT, COLUMNS = WORD["beside"], WORD["beside_units"]
BESIDE_DEPTH, PANEL = WORD["beside_depth"], WORD["beside_weights"]
SCRATCH, SCRATCH_THREAD, AGENDA_BYTES = WORD["scratch"], WORD["scratch_thread"], WORD["agenda"]
KIND, VARIANT, MOST, ROW, ROW_END, NEXT, TAKES_ALONG = (
    ITEM.index(name) for name in ("kind", "variant", "most", "row", "row_end", "next", "along")
)
KERNEL, BYTES = (AFTER + TALL.index(name) for name in ("kernel", "bytes"))
DONE, TILES, WHERE_ROWS, TALL_TILES, EPILOGUES_OF, REST, BARRIER = range(7)

# Of the program, read from tables that are linked in: numbers, then one for each stage (widths: MAX_WIDTHS for each).
TABLES = (
    "stages",
    "lanes",
    "looks_ahead",
    "stage_word",
    "by_row",
    "multiplies",  # 1: there are products
    "direct",  # 1: their tiles are results, but for several rows' dot products
    "finishes",  # the parts of an epilogue
    "max_rows",
    "dot_rows",
    "widths",
    "partial_width",
    "whole_rest",  # see geometry.rest_of_block
    "half",  # of a vector, for which there are tiles of several rows, or 0
    "row_sums",  # bytes of the sums of a row,
    "vector_sums",  # and of a vector of units
    "vector_bytes",
    "takes_along",  # 1: tiles of the first stage take input projections of later steps along
    "rows_room",  # bytes of a table of rows
)

SPINS = 4000  # of a waiting thread, some 20 us, before it offers the processor to others


@routine
def barrier(arrivals, thread, team, times, yielding):
    """Wait until all of the team have arrived so many times. Each notes its own arrivals, on a line of cache of its
    own, so that none waits for another one to note its; after a bounded spin it offers the processor to others."""
    tell(arrivals + LINE * thread, times)
    spins = 0
    for other in range(team):
        while told(arrivals + LINE * other) < times:
            if spins < SPINS:
                spins += 1
                pause()
            else:
                give_way(yielding)


def make_driver() -> Callable:
    """The kernel that runs a script: fills in the frames, then each thread does its part of every launch."""
    launches_at, table_at, threads_at, _, yield_at, _, arrivals_at, operands_at = range(len(SCRIPT))
    kernel_at, words_at, length_at, relocations_at, count_at, frame_at, first_at, team_at, wait_at = range(len(LAUNCH))
    entry = 8 * len(LAUNCH)

    def member(script, thread, team):
        asked = peek(script, threads_at)
        if thread >= asked:
            return
        team = least(team, asked)
        launches, table = peek(script, launches_at), peek(script, table_at)
        operands = script + 8 * operands_at
        memory = peek(operands, 0)
        if thread == 0:
            for k in range(launches):
                launch = table + k * entry
                frame = memory + peek(launch, frame_at)
                copy_words(frame, peek(launch, words_at), peek(launch, length_at))
                relocation = peek(launch, relocations_at)
                for _ in range(peek(launch, count_at)):
                    poke(frame, peek(relocation, 0), peek(operands, peek(relocation, 1)) + peek(relocation, 2))
                    relocation += 24
        control = float_control(-1)
        arrivals, times = script + peek(script, arrivals_at), 0
        for k in range(launches):
            launch = table + k * entry
            if team > 1 and (k == 0 or peek(launch, wait_at) == 1):
                times += 1
                barrier(arrivals, thread, team, times, peek(script, yield_at))
            first, threads = peek(launch, first_at), peek(launch, team_at)
            if team < asked:  # fewer threads than asked for: all of it on the first
                first, threads = 0, 1
            if first <= thread < first + threads:
                call(peek(launch, kernel_at), memory + peek(launch, frame_at), thread - first, threads)
        float_control(control)

    return member


UNITS_AT, SKIP_AT, DEPTH_AT, PART_AT, DOT_AT, _ = range(len(STAGE_WORDS))


def _table(name: str) -> Any:
    """An intrinsic that reads a number of a table of the program's, by its index."""

    @intrinsic
    def read(typingctx, index):
        def emit(context, b, signature, args):
            symbol = TABLE.format(name)
            if (table := b.module.globals.get(symbol)) is None:
                table = ir.GlobalVariable(b.module, ir.ArrayType(I64, 1), symbol)
                table.global_constant = True
            return b.load(b.gep(table, [i64(0), args[0]]))

        return types.int64(types.int64), emit

    return read


TABLE = "fastcells_{}"
(
    stages, lanes, looks_ahead, stage_word, by_row, multiplies, direct, finishes,
    max_rows, dot_rows, widths, partial_width, whole_rest, half, row_sums, vector_sums, vector_bytes,
    takes_along, rows_room,
) = map(_table, TABLES)  # fmt: skip


def make_recurrence(program: Program, dtype: str, registers: int, vector_lanes: int) -> Linked:
    """The kernel that runs a program over time."""
    tilings = [tiling_of(s, registers, vector_lanes) for s in program.stages]
    ahead = any(p.when == "after" for s in program.stages for part in s.parts for p in part.loads.values())
    sums = [len(s.accumulators) * vector_lanes * FORMATS[dtype].bytes for s in program.stages]
    tables: tuple[Sequence[int], ...] = (
        [len(tilings)],
        [vector_lanes],
        [ahead],
        Layout(program).stage,
        [bool(s.passes) for s in program.stages],  # all units of a row at once, as if they were a vector
        [bool(s.segments) for s in program.stages],
        [is_direct(s) for s in program.stages],
        [len(epilogue_parts(s)) for s in program.stages],
        [s.rows for s in tilings],
        [s.dot_rows for s in tilings],
        [w for s in tilings for w in (*s.widths, *[0] * (MAX_WIDTHS - len(s.widths)))],
        [len(s.widths) - 1 for s in tilings],
        [rest_of_block(tiling, is_direct(s)) for s, tiling in zip(program.stages, tilings, strict=True)],
        [vector_lanes // 2 * halved(tiling) for tiling in tilings],
        [s.block * n for s, n in zip(tilings, sums, strict=True)],
        sums,
        [vector_lanes * FORMATS[dtype].bytes],
        [rides(program, tilings[0])],
        [rows_bytes(program)],
    )
    module = ir.Module(program.name)
    module.triple = host().triple  # the loops are linked to it, and bring the layout of data
    emit_tiles(module, program, dtype, tilings)
    emit_operands(module, program, dtype, tilings)
    emit_epilogues(module, program, dtype, tilings)
    emit_beside(module, dtype, vector_lanes, Layout(program), rides(program, tilings[0]))
    for name, numbers in zip(TABLES, tables, strict=True):
        kind = ir.ArrayType(I64, len(numbers))
        table = ir.GlobalVariable(module, kind, TABLE.format(name))
        table.global_constant, table.initializer = True, ir.Constant(kind, [int(n) for n in numbers])
    return Linked(over_time, str(module))


def _of_item(b, said: dict) -> dict:
    """What an item says, by ITEM: of all its rows, or from the row on that is said."""
    item = said["item"]
    known = {name: b.load(b.inttoptr(b.add(item, i64(8 * k)), I64.as_pointer())) for k, name in enumerate(ITEM)}
    if "row" in said:
        known["sums"] = b.add(known["sums"], b.mul(b.sub(said["row"], known["row"]), known["row_bytes"]))
    return known


_OF_STEP = ("now", "before", "after")
tile = linked(
    TILE, TILE_ARGUMENTS, ("frame", "item", "variant", "row", *_OF_STEP, "number", *BESIDE_ARGUMENTS), _of_item
)
weights_of = linked(WEIGHTS, WEIGHTS_ARGUMENTS, ("frame", "item"), _of_item)
where_rows = linked(WHERE, WHERE_ARGUMENTS, ("frame", "item", *_OF_STEP, "table"), _of_item)
epilogue = linked(EPILOGUE, CONTEXT, ("frame", "item", "variant", "row", *_OF_STEP), _of_item)
project = linked(BESIDE, ("frame", *BESIDE_ARGUMENTS))


@routine
def piece_of(frame, stage, single):
    """Vectors of units whose sums stay near. Of a single row there is an even number of such pieces, so that two
    threads have as much to do; whatever the threads, for the sums to be the same."""
    piece = widths(stage * MAX_WIDTHS + (0 if single else 1))
    units = (peek(frame, stage_word(stage) + UNITS_AT) + lanes(0) - 1) // lanes(0)
    if single and piece > 2 and ((units + piece - 1) // piece) & 1:
        return piece >> 1
    return piece


@routine
def panel_width(frame, vector):
    """Vectors in the panel of the input's weights that has a vector of their columns."""
    whole = peek(frame, COLUMNS) // lanes(0)
    return WIDEST if (vector // WIDEST + 1) * WIDEST <= whole else 1


@routine
def panel_of(frame, vector, width):
    """Where a vector of the input's weights begins in its panel."""
    first = vector // width * width
    return peek(frame, PANEL) + (first * peek(frame, BESIDE_DEPTH) + vector - first) * vector_bytes(0)


@intrinsic
def note(
    typingctx, item,
    kind, variant, most, row, row_end, unit, is_first, is_last, sums, row_bytes, begin, end, fresh, last, next_, along,
):  # fmt: skip
    """Put an ITEM on an agenda; where the next one goes."""

    def emit(context, b, signature, args):
        for k, value in enumerate(args[1:]):
            b.store(value, b.inttoptr(b.add(args[0], i64(8 * k)), I64.as_pointer()))
        return b.add(args[0], i64(ITEM_BYTES))

    return types.int64(*[types.int64] * (1 + len(ITEM))), emit


@routine
def sweep(frame, item, stage, unit, unit_end, row, row_end, back, single, is_first, is_last, scratch):
    """Put on an agenda one stage of a step for some units and rows: products of a few units, whose sums stay near, then
    what is made of them; of a single row, tiles do both. back: from the last units to the first, as every other step
    does: the weights that were read last are still in the cache."""
    words = stage_word(stage)
    full = 1 if by_row(stage) == 1 else peek(frame, words + UNITS_AT) // lanes(0)
    start = peek(frame, words + SKIP_AT) if is_first else 0
    depth, part = peek(frame, words + DEPTH_AT), peek(frame, words + PART_AT)
    dot = peek(frame, words + DOT_AT) == 1
    by_rows, dots = not (single or dot), dot and not single
    most = max_rows(stage) if by_rows else dot_rows(stage) if dots else 0
    alone = peek(frame, words + UNITS_AT) - full * lanes(0) <= half(stage)  # the last vector, whatever rows there are
    narrow = alone and row_end - row >= HALF_ROWS
    tall = multiplies(stage) == 1 and (dots or (by_rows and direct(stage) == 0))
    if tall:
        item = note(
            item, WHERE_ROWS, stage * STAGE_VARIANTS, 0, row, row_end, 0, is_first, is_last, 0, 0, 0, 0, 0, 0, 0, 0
        )
    piece, following = piece_of(frame, stage, single), 0
    if by_rows and peek(frame, FAR_AT) == 1:
        following = -piece if back else piece
    pieces = (unit_end - unit + piece - 1) // piece
    for p in range(pieces):
        begin_unit = unit + (pieces - 1 - p if back else p) * piece
        stop = least(begin_unit + piece, unit_end)
        at = begin_unit if multiplies(stage) == 1 else stop
        while at < stop:
            width = partial_width(stage) - 1 if dot else 0 if single else 1
            left, vectors = least(full, stop) - at, 1
            rest = by_rows and left < piece
            if rest:  # a vector of which not all lanes exist may be beside another one; half of one never is
                left = least(left if narrow or (alone and left > 0) else stop - at, REST_WIDTH)
            if left <= 0:
                width = partial_width(stage) + (1 if by_rows else 0)
            else:
                while widths(stage * MAX_WIDTHS + width) > left:
                    width += 1
                vectors = widths(stage * MAX_WIDTHS + width)
                if rest and width == 1:
                    width = whole_rest(stage)
            if dots:
                width = DOTS
            variant = (stage * MAX_WIDTHS + width) * MAX_ROWS + (DOT if dot and single else 0)
            sums = scratch + (at - begin_unit) * vector_sums(stage)
            begin = start
            while True:
                end = least(begin + part, depth)
                takes = takes_along(0) == 1 and stage == 0 and single and not dot and width < BESIDE_WIDTHS
                noted = note(
                    item, TALL_TILES if tall else TILES, variant, most, row, row_end, at, is_first, is_last, sums,
                    row_sums(stage), begin, end, begin == start, end >= depth,
                    following if width == 1 else 0, takes and begin == start,
                )  # fmt: skip
                if tall:
                    weights_of(frame, item)
                    noted = item + peek(item, BYTES)
                item = noted
                if end >= depth:
                    break
                begin = end
            at += vectors
        for late in range(finishes(stage) if tall or multiplies(stage) == 0 else 0):
            at = begin_unit
            while at < stop:
                left = least(full, stop) - at
                along = left >= TOGETHER
                variant = stage * EPILOGUES + late * LATE + (ALONG if along else PARTIAL if left <= 0 else 0)
                item = note(
                    item, EPILOGUES_OF, variant, 1 if by_row(stage) == 1 else TOGETHER, row, row_end, at,
                    is_first, is_last, scratch + (at - begin_unit) * vector_sums(stage), row_sums(stage),
                    0, 0, 0, 0, 0, 0,
                )  # fmt: skip
                at += TOGETHER if along else 1
    return item


@seldom
def set_agenda(frame, item, thread, team, block, block_end, active, carried, continuing, back, scratch):
    """Write down what a thread does at a step, of the rows from `block` to `block_end`; carried, continuing: how many
    rows were there at the step before, and will be at the next one."""
    by_units = peek(frame, SPLIT) == 1
    shares, single = peek(frame, SHARES), active == 1 and peek(frame, SEVERAL_ROWS) == 0
    for stage in range(stages(0)):
        unit, units = 0, (peek(frame, stage_word(stage) + UNITS_AT) + lanes(0) - 1) // lanes(0)
        if by_row(stage) == 1:
            units = 1
        if by_units and shares != 0 and peek(frame, THREADS) == team:
            unit, units = peek(shares, thread), peek(shares, thread + 1)
        elif by_units:  # in pieces that do not change which tiles there are, so that sums stay the same
            piece = piece_of(frame, stage, single)
            pieces = (units + piece - 1) // piece
            unit = pieces * thread // team * piece
            units = least(units, pieces * (thread + 1) // team * piece)
        n, end = block, least(block_end, active)
        while n < end:  # rows that begin, go on or end here differ in where they find the other steps
            is_first, is_last = n >= carried, n >= continuing
            group_end = end
            if not is_first:
                group_end = least(group_end, carried)
            if not is_last:
                group_end = least(group_end, continuing)
            item = sweep(
                frame, item, stage, unit, units, n, group_end, back, single, is_first, is_last, scratch
            )  # fmt: skip
            n = group_end
        if takes_along(0) == 1 and stage == 0:
            poke(item, KIND, REST)
            item += ITEM_BYTES
        if team > 1 and peek(frame, ARRIVALS) != 0:
            poke(item, KIND, BARRIER)
            item += ITEM_BYTES
    poke(item, KIND, DONE)


@routine
def position(frame, step):
    table = peek(frame, POSITIONS)
    return peek(table, step) if table != 0 else peek(frame, FIRST) + step * peek(frame, DELTA)


@intrinsic
def count(typingctx, frame, step):
    """Sequences at a time step: of a table, if there is one, or always as many."""

    def emit(context, b, signature, args):
        word = lambda address: b.inttoptr(address, I64.as_pointer())  # noqa: E731
        table, always = (b.add(args[0], i64(8 * k)) for k in (COUNTS, ROWS))
        numbers = b.load(word(table))
        found = b.select(b.icmp_signed("!=", numbers, i64(0)), b.add(numbers, b.mul(args[1], i64(8))), always)
        return b.load(word(found))

    return types.int64(types.int64, types.int64), emit


@routine
def do_tiles(frame, item, now, before, after, later, vector, vectors):
    """The tiles of an item. Those that take input projections of later steps along begin with column `vector`, and the
    first that none has taken is returned."""
    n, end, most, number = peek(item, ROW), peek(item, ROW_END), peek(item, MOST), 0
    while n < end:
        variant, tall = peek(item, VARIANT), 1
        if most > 0:
            tall = height(end - n, most)
            variant += FAR + tall if peek(item, NEXT) != 0 and shares(number, tall, most) else tall
        other, panel, line = -1, 0, 0
        if takes_along(0) == 1 and peek(item, TAKES_ALONG) == 1 and vector < vectors:
            other, width = vector, panel_width(frame, vector)
            panel, line = panel_of(frame, vector, width), width * vector_bytes(0)
            vector += 1
        tile(frame, item, variant, n, now, before, after, number, later, other, panel, line)
        n += tall
        number += 1
    return vector


@routine
def do_epilogues(frame, item, now, before, after):
    """The epilogues of an item."""
    n, end = peek(item, ROW), peek(item, ROW_END)
    while n < end:
        several = end - n >= TOGETHER and peek(item, MOST) == TOGETHER
        variant = peek(item, VARIANT) + (SEVERAL if several else 0)
        epilogue(frame, item, variant, n, now, before, after)
        n += TOGETHER if several else 1


@routine
def do_projections(frame, later, vector, vectors):
    """The input projections of later steps that no tile took along."""
    while vector < vectors:
        width = panel_width(frame, vector)
        project(frame, later, vector, panel_of(frame, vector, width), width * vector_bytes(0))
        vector += 1


def over_time(frame, thread, team):
    """What one thread does of a recurrence. Lowered once for all programs; the tables and the tile are linked in.

    What there is to do at a step is written down once, and done again as long as the next steps have as many rows."""
    steps, rows = peek(frame, STEPS), peek(frame, ROWS)
    by_units = peek(frame, SPLIT) == 1
    agendas = peek(frame, SCRATCH) + thread * peek(frame, SCRATCH_THREAD)
    table = agendas + 2 * peek(frame, AGENDA_BYTES)
    scratch = table + rows_room(0)
    row_begin, row_end = 0, rows
    shares = peek(frame, SHARES)
    if not by_units:
        if shares != 0 and peek(frame, THREADS) == team:
            row_begin, row_end = peek(shares, thread), peek(shares, thread + 1)
        else:
            row_begin, row_end = rows * thread // team, rows * (thread + 1) // team
    times = 0
    columns = (peek(frame, COLUMNS) + lanes(0) - 1) // lanes(0)
    vector, vectors, later = 0, 0, 0  # the next of the thread's vectors of columns, their end, and for which rows
    block = row_begin
    while block < row_end:
        block_end = least(block + peek(frame, ROW_BLOCK), row_end)
        for k in range(2):  # nothing is written down
            poke(agendas + k * peek(frame, AGENDA_BYTES), 0, -1)
        carried, before = 0, 0
        for step in range(steps):
            now, active = position(frame, step), count(frame, step)
            continuing, after = active, 0
            if looks_ahead(0) == 1:
                continuing = 0
                if step + 1 < steps:
                    continuing, after = least(active, count(frame, step + 1)), position(frame, step + 1)
            if takes_along(0) == 1 and step % BESIDE_ROWS == 0:
                vector = vectors = 0
                if step // BESIDE_ROWS < peek(frame, BESIDE_AT):
                    later, vectors = position(frame, step + BESIDE_ROWS), columns
                    if by_units:
                        vector, vectors = columns * thread // team, columns * (thread + 1) // team
            agenda = agendas + (step & 1) * peek(frame, AGENDA_BYTES)
            item = agenda + ITEM_BYTES
            if peek(agenda, 0) != active or peek(agenda, 1) != carried or peek(agenda, 2) != continuing:
                poke(agenda, 0, active)
                poke(agenda, 1, carried)
                poke(agenda, 2, continuing)
                set_agenda(
                    frame, item, thread, team, block, block_end, active, carried, continuing, step & 1, scratch
                )  # fmt: skip
            while True:
                kind = peek(item, KIND)
                if kind == TILES:
                    vector = do_tiles(frame, item, now, before, after, later, vector, vectors)
                elif kind == WHERE_ROWS:
                    where_rows(frame, item, now, before, after, table)
                elif kind == TALL_TILES:
                    call(peek(item, KERNEL), item, table, 0)
                    item += peek(item, BYTES) - ITEM_BYTES
                elif kind == EPILOGUES_OF:
                    do_epilogues(frame, item, now, before, after)
                elif kind == REST:
                    if (step + 1) % BESIDE_ROWS == 0:
                        do_projections(frame, later, vector, vectors)
                elif kind == BARRIER:
                    times += 1
                    barrier(peek(frame, ARRIVALS), thread, team, times, peek(frame, YIELD))
                else:
                    break
                item += ITEM_BYTES
            carried, before = active, now
            if step + 1 < steps:
                carried = least(active, count(frame, step + 1))
        block = block_end
