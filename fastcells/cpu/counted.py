"""Kernels for sequences of different lengths (see `lengths`), `member(frame, thread, team)`."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .frame import BUFFER_WORDS, HEADER
from .intrinsics import least, peek, poke
from .lengths import CUTS, FOUND, ROWS, TABLES, TARGET_WORDS, TOKENS, TOLD
from .loops import COUNTS, SHARES, STEPS, THREADS, position
from .routine import routine
from .simd import I64, i64


@intrinsic
def copy_bytes(typingctx, to, source, count):
    """Set so many bytes to those at another address."""

    def emit(context, b, signature, args):
        byte = ir.IntType(8).as_pointer()
        to, source = (b.inttoptr(a, byte) for a in args[:2])
        cgutils.raw_memcpy(b, to, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


MOVED = 32  # bytes at a time


@intrinsic
def copy_row(typingctx, to, source, count):
    """The same of a row, which is short: without a call."""

    def emit(context, b, signature, args):
        to, source, count = args
        kinds = ir.VectorType(ir.IntType(32), MOVED // 4), ir.IntType(32)

        def move(at, kind):
            pointers = [b.inttoptr(b.add(a, at), kind.as_pointer()) for a in (source, to)]
            b.store(b.load(pointers[0], align=4), pointers[1], align=4)

        at = i64(0)
        for kind, size in zip(kinds, (MOVED, 4), strict=True):  # numbers have 4 or 8 bytes
            end = b.and_(count, i64(-size))
            start, before = at, b.block
            loop, done = b.append_basic_block("move"), b.append_basic_block("moved")
            b.cbranch(b.icmp_signed("<", start, end), loop, done)
            b.position_at_end(loop)
            here = b.phi(I64)
            move(here, kind)
            after = b.add(here, i64(size))
            here.add_incoming(start, before)
            here.add_incoming(after, loop)
            b.cbranch(b.icmp_signed("<", after, end), loop, done)
            b.position_at_end(done)
            at = b.phi(I64)
            at.add_incoming(start, before)
            at.add_incoming(after, loop)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def clear_bytes(typingctx, to, count):
    """Set so many bytes to zero."""

    def emit(context, b, signature, args):
        cgutils.memset(b, b.inttoptr(args[0], ir.IntType(8).as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def is_set(typingctx, address):
    """Whether a byte is."""

    def emit(context, b, signature, args):
        byte = b.load(b.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return b.zext(byte, I64)

    return types.int64(types.int64), emit


@routine
def copy_rows(to, to_row, source, row, count, size):
    """Copy so many rows, of so many bytes each."""
    if row == size and to_row == size:
        copy_bytes(to, source, size * count)
    else:
        for k in range(count):
            copy_row(to + k * to_row, source + k * row, size)


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


STRETCHES, ALONG, ALL, TOKEN, PACKED, PACKED_ROW, SIZE, ENDS, BATCH, LENGTH, TIME, SEQUENCE = map(
    TOKENS.index, TOKENS[len(HEADER) :]
)


@routine
def token(frame, k, r):
    """The address of a token, by its step and row."""
    number = peek(peek(frame, STRETCHES), r) + k * peek(frame, ALONG)
    return peek(frame, ALL) + number * peek(frame, TOKEN)


@routine
def packed(frame, k):
    """The address of the first row of a step."""
    return peek(frame, PACKED) + position(frame, k) * peek(frame, PACKED_ROW)


@routine
def begin_of(frame, k, thread, team):
    """The first row of a step that a thread takes: as the time loop shares rows, or all of a step."""
    shares, count = peek(frame, SHARES), peek(peek(frame, COUNTS), k)
    if shares != 0 and peek(frame, THREADS) == team:
        return least(peek(shares, thread), count)
    return 0 if k % team >= thread else count


def make_collecting() -> Callable:
    """The kernel that copies tokens to rows."""

    def member(frame, thread, team):
        for k in range(peek(frame, STEPS)):
            rows, row = packed(frame, k), peek(frame, PACKED_ROW)
            for r in range(begin_of(frame, k, thread, team), begin_of(frame, k, thread + 1, team)):
                copy_row(rows + r * row, token(frame, k, r), peek(frame, SIZE))

    return member


def make_spreading() -> Callable:
    """The kernel that copies rows to tokens, and makes those zero that are none's."""

    @routine
    def cleared(frame, n):
        """Make what is past the end of one of the batch's sequences zero."""
        end, length, size = peek(peek(frame, ENDS), n), peek(frame, LENGTH), peek(frame, TOKEN)
        first = peek(frame, ALL) + n * peek(frame, SEQUENCE) * size
        if peek(frame, TIME) == 1:
            clear_bytes(first + end * size, (length - end) * size)
        else:
            for t in range(end, length):
                clear_bytes(first + t * peek(frame, TIME) * size, size)

    def member(frame, thread, team):
        for k in range(peek(frame, STEPS)):
            rows, row = packed(frame, k), peek(frame, PACKED_ROW)
            for r in range(begin_of(frame, k, thread, team), begin_of(frame, k, thread + 1, team)):
                copy_row(token(frame, k, r), rows + r * row, peek(frame, SIZE))
        n = thread
        while n < peek(frame, BATCH):
            cleared(frame, n)
            n += team

    return member


def make_cutting() -> Callable:
    """The kernel that cuts a batch into stretches."""
    ends_at, batch_at, length_at, resets_at, reset_time_at, reset_sequence_at, time_at, *rest = range(len(CUTS))
    sequence_at, reverse_at, most_at, out_at = rest
    stretches, tokens, longest, wrong, empty, after_reset, cut = range(len(FOUND))

    @routine
    def reset(frame, n, t):
        at = peek(frame, resets_at)
        return 0 if at == 0 else is_set(at + t * peek(frame, reset_time_at) + n * peek(frame, reset_sequence_at))

    @routine
    def steps_of(frame, n):
        """Of a sequence: where there are none at all, the first one has a step."""
        only = n == 0 and peek(peek(frame, out_at), tokens) == 0
        return 1 if only else peek(peek(frame, ends_at), n)

    @routine
    def place(frame, n, start, stop, follows):
        """Note a stretch where those of its length go on."""
        out, length, most, batch = (
            peek(frame, out_at),
            peek(frame, length_at),
            peek(frame, most_at),
            peek(frame, batch_at),
        )
        free = out + 8 * (len(FOUND) + length + 1 + stop - start)
        column = out + 8 * (len(FOUND) + 2 * (length + 1))
        leaves = column + 8 * 4 * most
        at = peek(free, 0)
        poke(free, 0, at + 1)
        poke(column, at, n)
        first = stop - 1 if peek(frame, reverse_at) == 1 else start
        poke(column, most + at, first * peek(frame, time_at) + n * peek(frame, sequence_at))
        entered = reset(frame, n, start)
        poke(column, 2 * most + at, entered)
        poke(column, 3 * most + at, follows)
        poke(out, after_reset, peek(out, after_reset) | entered)
        poke(out, cut, peek(out, cut) | follows)
        if follows == 0:
            poke(leaves, n, at)
        if start == 0:
            poke(leaves, batch + n, at)

    @routine
    def cuts(frame, n, placing):
        """Go through the stretches of a sequence: count them by length, or note them."""
        counts = peek(frame, out_at) + 8 * len(FOUND)
        start, end = 0, steps_of(frame, n)
        for t in range(1, end + 1):
            if t == end or reset(frame, n, t) != 0:
                if placing:
                    place(frame, n, start, t, 1 if t < end else 0)
                else:
                    poke(counts, t - start, peek(counts, t - start) + 1)
                start = t

    def member(frame, thread, team):
        out, batch, length = peek(frame, out_at), peek(frame, batch_at), peek(frame, length_at)
        for n in range(batch):
            end = peek(peek(frame, ends_at), n)
            poke(out, wrong, peek(out, wrong) + (1 if end < 0 or end > length else 0))
            poke(out, empty, peek(out, empty) + (1 if end == 0 else 0))
            poke(out, tokens, peek(out, tokens) + end)
        if peek(out, wrong) != 0:
            return
        for n in range(batch):
            cuts(frame, n, 0)
        counts = out + 8 * len(FOUND)
        longer, k = 0, length
        while k >= 0:  # so many stretches have more than k steps
            same = peek(counts, k)
            poke(counts, k, longer)
            poke(counts, length + 1 + k, longer)
            longer += same
            if longer > 0 and peek(out, longest) == 0:
                poke(out, longest, k)
            k -= 1
        poke(out, stretches, longer)
        for n in range(batch):
            cuts(frame, n, 1)

    return member
