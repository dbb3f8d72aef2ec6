"""The loops around the tile: time, stages, units, depth, rows. Compiled by Numba; the tile is inlined.

A kernel is `member(frame, thread, team)`: what one thread of a team does of a call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from ..program import Program
from .geometry import (
    DOT,
    LAUNCH,
    MAX_ROWS,
    MAX_WIDTHS,
    SCRIPT,
    STAGE_WORDS,
    WORD,
    Layout,
    scratch_row_bytes,
    tile_shape,
)
from .simd import FORMATS, I64, i64
from .tile import make_tile

STEPS, ROWS, SHARES, THREADS = WORD["steps"], WORD["rows"], WORD["shares"], WORD["threads"]
POSITIONS, FIRST, DELTA = WORD["positions"], WORD["first"], WORD["delta"]
COUNTS, SPLIT, BARRIER, YIELD = WORD["counts"], WORD["split"], WORD["barrier"], WORD["yield"]
ROW_BLOCK, DEPTH_BLOCK = WORD["row_block"], WORD["depth_block"]
SCRATCH, SCRATCH_THREAD = WORD["scratch"], WORD["scratch_thread"]

SPINS = 4000  # of a waiting thread, some 20 us, before it offers the processor to others


@intrinsic
def peek(typingctx, address, index):
    """The 64-bit word `index` at an address."""

    def emit(context, b, signature, args):
        return b.load(b.inttoptr(b.add(args[0], b.mul(args[1], i64(8))), I64.as_pointer()))

    return types.int64(types.int64, types.int64), emit


@intrinsic
def least(typingctx, a, b):
    """The smaller of two integers."""

    def emit(context, b, signature, args):
        return b.select(b.icmp_signed("<", *args), *args)

    return types.int64(types.int64, types.int64), emit


@intrinsic
def barrier(typingctx, counter, target, give_way):
    """Arrive, then wait until `target` threads have; the processor is offered to others after a bounded spin."""

    def emit(context, b, signature, args):
        counter, target, give_way = args
        address = b.inttoptr(counter, I64.as_pointer())
        b.atomic_rmw("add", address, i64(1), "acq_rel")
        before, spin, patience, yielding, done = (
            b.block,
            *(b.append_basic_block(f"barrier.{n}") for n in ("spin", "patience", "yield", "done")),
        )
        b.branch(spin)
        b.position_at_end(spin)
        spins = b.phi(I64)
        spins.add_incoming(i64(0), before)
        arrived = b.load_atomic(address, "acquire", 8)
        b.cbranch(b.icmp_signed("<", arrived, target), patience, done)
        b.position_at_end(patience)
        _pause(b)
        more = b.add(spins, i64(1))
        spins.add_incoming(more, patience)
        b.cbranch(b.icmp_signed("<", more, i64(SPINS)), spin, yielding)
        b.position_at_end(yielding)
        b.call(b.inttoptr(give_way, ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        spins.add_incoming(i64(SPINS), yielding)  # from now on, yield at every look
        b.branch(spin)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


def _pause(b) -> None:
    """Tell the core that this is a spin loop, where the architecture has such a hint."""
    triple = b.module.triple
    void = ir.FunctionType(ir.VoidType(), [])
    if triple.startswith(("x86", "i686", "amd64")):
        b.call(cgutils.get_or_insert_function(b.module, void, "llvm.x86.sse2.pause"), [])
    elif triple.startswith(("aarch64", "arm64")):
        hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
        b.call(cgutils.get_or_insert_function(b.module, hint, "llvm.aarch64.hint"), [ir.Constant(ir.IntType(32), 1)])


@intrinsic
def poke(typingctx, address, index, value):
    """Set the 64-bit word `index` at an address."""

    def emit(context, b, signature, args):
        b.store(args[2], b.inttoptr(b.add(args[0], b.mul(args[1], i64(8))), I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def call(typingctx, kernel, frame, thread, team):
    """Call a kernel by its address."""

    def emit(context, b, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), emit


FLUSH = 0x8040  # bits of MXCSR: results and operands below the normal range are zeros


@intrinsic
def float_control(typingctx, wanted):
    """Set how tiny numbers are treated, and return how they were: -1 flushes them to zero, as states that decay would
    otherwise slow every operation down; anything else is what an earlier call returned."""

    def emit(context, b, signature, args):
        if not b.module.triple.startswith("x86_64"):
            return i64(0)
        word = cgutils.alloca_once(b, ir.IntType(32))
        at = b.bitcast(word, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [at.type])
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse.stmxcsr"), [at])
        before = b.load(word)
        given = b.trunc(args[0], ir.IntType(32))
        flushing = b.or_(before, ir.Constant(ir.IntType(32), FLUSH))
        b.store(b.select(b.icmp_signed("==", args[0], i64(-1)), flushing, given), word)
        b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse.ldmxcsr"), [at])
        return b.zext(before, I64)

    return types.int64(types.int64), emit


def make_driver() -> Callable:
    """The kernel that runs a script: fills in the frames, then each thread does its part of every launch."""
    launches_at, table_at, threads_at, yield_at, counter_at, operands_at = range(len(SCRIPT))
    kernel_at, words_at, length_at, relocations_at, count_at, frame_at, first_at, team_at, wait_at = range(len(LAUNCH))
    entry = 8 * len(LAUNCH)

    def member(script, thread, team):
        launches, table = peek(script, launches_at), peek(script, table_at)
        operands = script + 8 * operands_at
        memory = peek(operands, 0)
        if thread == 0:
            for k in range(launches):
                launch = table + k * entry
                words, frame = peek(launch, words_at), memory + peek(launch, frame_at)
                for w in range(peek(launch, length_at)):
                    poke(frame, w, peek(words, w))
                relocation = peek(launch, relocations_at)
                for _ in range(peek(launch, count_at)):
                    poke(frame, peek(relocation, 0), peek(operands, peek(relocation, 1)) + peek(relocation, 2))
                    relocation += 24
        control = float_control(-1)
        counter, arrivals = script + 8 * counter_at, 0
        for k in range(launches):
            launch = table + k * entry
            if team > 1 and (k == 0 or peek(launch, wait_at) == 1):
                arrivals += team
                barrier(counter, arrivals, peek(script, yield_at))
            first, threads = peek(launch, first_at), peek(launch, team_at)
            if team < peek(script, threads_at):  # fewer threads than asked for: all of it on the first
                first, threads = 0, 1
            if first <= thread < first + threads:
                call(peek(launch, kernel_at), memory + peek(launch, frame_at), thread - first, threads)
        float_control(control)

    return member


def make_recurrence(program: Program, dtype: str, registers: int, lanes: int) -> Callable:
    """The kernel that runs a program over time."""
    shapes = [tile_shape(s, registers, lanes) for s in program.stages]
    tile = make_tile(program, dtype, shapes)
    stages = len(shapes)
    looks_ahead = any(p.when == "after" for s in program.stages for part in s.parts for p in part.loads.values())
    vector_bytes = lanes * FORMATS[dtype].bytes
    stage_word = np.array(Layout(program).stage)
    max_rows = np.array([s.rows for s in shapes])
    widths = np.zeros((stages, MAX_WIDTHS), np.int64)
    for k, s in enumerate(shapes):
        widths[k, : len(s.widths)] = s.widths
    advance = np.maximum(widths, 1)  # the last width, 0, is a vector of which not all lanes exist
    partial_width = np.array([len(s.widths) - 1 for s in shapes])
    by_row = np.array([bool(s.passes) for s in program.stages])  # all units of a row at once, as if they were a vector
    row_scratch = np.array([scratch_row_bytes(program, s, k, vector_bytes) for k, s in enumerate(shapes)])
    units_at, skip_at, depth_at, dot_at = (STAGE_WORDS.index(n) for n in ("units", "skip", "depth", "dot"))

    @njit(inline="always")
    def sweep(frame, stage, unit, unit_end, row, row_end, back, single, is_first, is_last, now, before, after, scratch):
        """One stage at one step for some units and rows. back: from the last units to the first, as every other step
        does: the weights that were read last are still in the cache."""
        words = stage_word[stage]
        full = 1 if by_row[stage] else peek(frame, words + units_at) // lanes
        start = peek(frame, words + skip_at) if is_first else 0
        depth, depth_block = peek(frame, words + depth_at), peek(frame, DEPTH_BLOCK)
        dot = peek(frame, words + dot_at) == 1
        if dot:
            depth_block = depth
        piece = widths[stage, 0] if single else widths[stage, 1]
        pieces = (unit_end - unit + piece - 1) // piece
        for p in range(pieces):
            at = unit + (pieces - 1 - p if back else p) * piece
            stop = least(at + piece, unit_end)
            while at < stop:
                width = partial_width[stage] - 1 if dot else 0 if single else 1
                left = least(full, stop) - at
                if left <= 0:
                    width = partial_width[stage]
                else:
                    while widths[stage, width] > left:
                        width += 1
                base = (stage * MAX_WIDTHS + width) * MAX_ROWS
                begin = start
                while True:
                    end = least(begin + depth_block, depth)
                    ends = end >= depth
                    n = row
                    while n < row_end:
                        rows = 1 if dot else row_end - n
                        if rows >= 2 * max_rows[stage]:
                            rows = max_rows[stage]
                        elif rows > max_rows[stage]:
                            rows = (rows + 1) >> 1  # even: 4 rows are 2 + 2, not 3 + 1
                        variant = base + DOT if dot else base if single else base + rows
                        sums = scratch + (n - row) * row_scratch[stage]
                        tile(
                            frame, variant, n, at, now, before, after, is_first, is_last,
                            begin, end, begin == start, ends, sums,
                        )  # fmt: skip
                        n += rows
                    if ends:
                        break
                    begin = end
                at += advance[stage, width]

    @njit(inline="always")
    def position(frame, step):
        table = peek(frame, POSITIONS)
        return peek(table, step) if table != 0 else peek(frame, FIRST) + step * peek(frame, DELTA)

    @njit(inline="always")
    def count(frame, step):
        table = peek(frame, COUNTS)
        return peek(table, step) if table != 0 else peek(frame, ROWS)

    def member(frame, thread, team):
        steps, rows = peek(frame, STEPS), peek(frame, ROWS)
        by_units = peek(frame, SPLIT) == 1
        scratch = peek(frame, SCRATCH) + thread * peek(frame, SCRATCH_THREAD)
        row_begin, row_end = 0, rows
        if not by_units:
            shares = peek(frame, SHARES)
            if shares != 0 and peek(frame, THREADS) == team:
                row_begin, row_end = peek(shares, thread), peek(shares, thread + 1)
            else:
                row_begin, row_end = rows * thread // team, rows * (thread + 1) // team
        arrivals = 0
        block = row_begin
        while block < row_end:
            block_end = least(block + peek(frame, ROW_BLOCK), row_end)
            carried, before = 0, 0
            for step in range(steps):
                now, active = position(frame, step), count(frame, step)
                continuing, after = active, 0
                if looks_ahead:
                    continuing = 0
                    if step + 1 < steps:
                        continuing, after = least(active, count(frame, step + 1)), position(frame, step + 1)
                for stage in range(stages):
                    unit, units = 0, (peek(frame, stage_word[stage] + units_at) + lanes - 1) // lanes
                    if by_row[stage]:
                        units = 1
                    if by_units:  # in pieces that do not change which tiles there are, so that sums stay the same
                        piece = widths[stage, 0] if active == 1 else widths[stage, 1]
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
                        sweep(
                            frame, stage, unit, units, n, group_end, step & 1, active == 1,
                            is_first, is_last, now, before, after, scratch,
                        )  # fmt: skip
                        n = group_end
                    if by_units and team > 1:
                        arrivals += team
                        barrier(peek(frame, BARRIER), arrivals, peek(frame, YIELD))
                carried, before = active, now
                if step + 1 < steps:
                    carried = least(active, count(frame, step + 1))
            block = block_end

    return member
