"""Kernels for sequences of different lengths (see `lengths`), `member(frame, thread, team)`."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .geometry import BUFFER_WORDS
from .lengths import ROWS, TABLES, TARGET_WORDS, TOLD
from .loops import COUNTS, STEPS, least, peek, poke, position
from .routine import routine


@intrinsic
def copy_bytes(typingctx, to, source, count):
    """Set so many bytes to those at another address."""

    def emit(context, b, signature, args):
        byte = ir.IntType(8).as_pointer()
        to, source = (b.inttoptr(a, byte) for a in args[:2])
        cgutils.raw_memcpy(b, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@routine
def copy_rows(to, to_row, source, row, count, size):
    """Copy so many rows, of so many bytes each."""
    if row == size and to_row == size:
        copy_bytes(to, source, size * count)
    else:
        for k in range(count):
            copy_bytes(to + k * to_row, source + k * row, size)


def make_tables() -> Callable:
    """The kernel that fills tables in."""
    counts_at, steps_at, most_at, orders_at, orders_end_at, threads_at, out_at = range(len(TABLES))

    @routine
    def is_order(entry, rows):
        order, length = peek(entry, 0), peek(entry, 1)
        n = 0
        while n < length and 0 <= peek(order, n) < rows:
            n += 1
        return n == length == rows

    @routine
    def shared(out, shares, counts, steps, rows, total):
        """Note the rows at which so many shares begin, and the end."""
        row, done, last = 0, 0, steps - 1  # the next sequence, the steps of those before it, and its own last one
        for share in range(shares):
            poke(out, share, row)
            while row < rows and done * shares < (share + 1) * total:
                while peek(counts, last) <= row:
                    last -= 1
                done += last + 1
                row += 1
        poke(out, shares, rows)

    def member(frame, thread, team):
        counts, steps, out = peek(frame, counts_at), peek(frame, steps_at), peek(frame, out_at)
        poke(out, 0, -1)
        tables = out + 8 * TOLD
        total = busy = 0
        for t in range(steps):
            count, end = peek(counts, t), steps - 1 - t
            if not 0 <= count <= peek(counts, 0 if t == 0 else t - 1) or count > peek(frame, most_at) - total:
                return
            poke(tables, t, total)
            poke(tables, steps + end, total)
            poke(tables, 2 * steps + end, count)
            total += count
            busy += count > 0
        if total == 0:
            return
        rows = peek(counts, 0)
        entry = peek(frame, orders_at)
        while entry < peek(frame, orders_end_at):
            if not is_order(entry, rows):
                return
            entry += 16
        tables += 24 * steps
        for shares in range(2, peek(frame, threads_at) + 1):
            shared(tables, shares, counts, steps, rows, total)
            tables += 8 * (shares + 1)
        poke(out, 0, rows)
        poke(out, 1, total)
        poke(out, 2, busy)

    return member


ADDRESS, STEP, ROW, INITIAL, INITIAL_ROW, TARGET, TARGET_STEP, TARGET_ROW, BYTES = map(
    ROWS.index, (*BUFFER_WORDS, *TARGET_WORDS)
)


def make_entering() -> Callable:
    """The kernel that copies, to the place of each step's rows, what these are before it."""

    def member(frame, thread, team):
        counts, row, to_row, size = peek(frame, COUNTS), peek(frame, ROW), peek(frame, TARGET_ROW), peek(frame, BYTES)
        k, steps = thread, peek(frame, STEPS)
        while k < steps:
            count, known = peek(counts, k), 0
            to = peek(frame, TARGET) + position(frame, k) * peek(frame, TARGET_STEP)
            if k > 0:
                known = least(peek(counts, k - 1), count)
                source = peek(frame, ADDRESS) + position(frame, k - 1) * peek(frame, STEP)
                copy_rows(to, to_row, source, row, known, size)
            initial_row = peek(frame, INITIAL_ROW)
            initial = peek(frame, INITIAL) + known * initial_row
            copy_rows(to + known * to_row, to_row, initial, initial_row, count - known, size)
            k += team

    return member


def make_leaving() -> Callable:
    """The kernel that copies, to each sequence's place, its row of the last step that it has."""

    def member(frame, thread, team):
        counts, row, to_row, size = peek(frame, COUNTS), peek(frame, ROW), peek(frame, TARGET_ROW), peek(frame, BYTES)
        k, steps = thread, peek(frame, STEPS)
        while k < steps:
            count = peek(counts, k)
            there = least(peek(counts, k + 1), count) if k + 1 < steps else 0
            source = peek(frame, ADDRESS) + position(frame, k) * peek(frame, STEP) + there * row
            copy_rows(peek(frame, TARGET) + there * to_row, to_row, source, row, count - there, size)
            k += team

    return member
