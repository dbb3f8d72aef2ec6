"""Kernels that copy matrices into the order in which products read them. A kernel is `member(frame, thread, team)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from .geometry import PACK, TURN
from .loops import least, peek
from .simd import FORMATS, Vector, i64

AHEAD = 256  # bytes along a row that is read by squares, to be fetched early: rows are too many to be foreseen


def moves(dtype: str, lanes: int) -> tuple[Any, Any, Any]:
    """Vectors moved as they are, gathered, and a square of them turned."""
    fmt = FORMATS[dtype]
    size = fmt.bytes

    @intrinsic
    def copy(typingctx, target, source, count):
        """Copy `count` (0 to lanes) adjacent numbers; the rest of the vector is zero."""

        def emit(context, b, signature, args):
            v = Vector(b, fmt, lanes)
            v.prefetch(b.add(args[1], i64(AHEAD)))
            whole = b.icmp_signed("==", args[2], i64(lanes))
            with b.if_else(whole) as (then, otherwise):
                with then:
                    v.store(v.load(args[1]), args[0])
                with otherwise:
                    v.store(v.load(args[1], v.first_lanes(args[2])), args[0])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @intrinsic
    def gather(typingctx, target, source, stride, count):
        """Copy `count` (0 to lanes) numbers `stride` bytes apart; the rest of the vector is zero."""

        def emit(context, b, signature, args):
            v = Vector(b, fmt, lanes)
            target, source, stride, count = args
            v.store(v.const(0.0), target)
            for k in range(lanes):
                with b.if_then(b.icmp_signed("<", i64(k), count)):
                    number = b.load(v.pointer(b.add(source, b.mul(stride, i64(k))), fmt.scalar))
                    b.store(number, v.pointer(b.add(target, i64(k * size)), fmt.scalar))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), emit

    @intrinsic
    def transpose(typingctx, target, target_stride, source, source_stride):
        """Copy a square of `lanes` rows, turned."""

        def emit(context, b, signature, args):
            v = Vector(b, fmt, lanes)
            target, target_stride, source, source_stride = args
            at = [b.add(source, b.mul(source_stride, i64(k))) for k in range(lanes)]
            rows = [v.load(address) for address in at]
            for address in at:
                v.prefetch(b.add(address, i64(AHEAD)))
            distance = lanes // 2
            while distance:  # swap the off-diagonal squares, ever smaller ones
                for i in (k for k in range(lanes) if not k & distance):
                    upper, lower = rows[i], rows[i + distance]
                    low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
                    high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
                    rows[i], rows[i + distance] = v.shuffle(upper, lower, low), v.shuffle(upper, lower, high)
                distance //= 2
            for k, row in enumerate(rows):
                v.store(row, b.add(target, b.mul(target_stride, i64(k))))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, types.int64), emit

    return copy, gather, transpose


def make_pack(dtype: str, lanes: int) -> Callable:
    """The kernel that copies a weight matrix (or blocks of it) into panels.

    A panel holds, for each block of vectors of units: [depth, vectors in the block, gates, lanes], so that a tile reads
    it front to back. Lanes past the last unit are zero. The blocks' widths are those that `sweep` takes.
    """
    fmt = FORMATS[dtype]
    size = fmt.bytes
    panel_at, source_at, units_at, depth_at, unit_stride_at, depth_stride_at, block_at, gates_at = range(len(PACK))
    offsets = len(PACK)

    copy, gather, transpose = moves(dtype, lanes)

    @njit(inline="always")
    def piece(frame, unit, width, begin, stop):
        """Some k of one block of vectors of units."""
        panel, source = peek(frame, panel_at), peek(frame, source_at)
        units, depth, gates = peek(frame, units_at), peek(frame, depth_at), peek(frame, gates_at)
        unit_stride, depth_stride = peek(frame, unit_stride_at), peek(frame, depth_stride_at)
        line = width * gates * lanes * size
        for w in range(width):
            first = (unit + w) * lanes
            number = least(lanes, units - first)
            for g in range(gates):
                origin = source + peek(frame, offsets + g) + first * unit_stride
                target = panel + unit * depth * gates * lanes * size + (w * gates + g) * lanes * size
                k = begin
                while k < stop:
                    into, out_of = target + k * line, origin + k * depth_stride
                    if unit_stride == size:
                        copy(into, out_of, number)
                        k += 1
                    elif number == lanes and k + lanes <= stop and depth_stride == size:
                        transpose(into, line, out_of, unit_stride)
                        k += lanes
                    else:
                        gather(into, out_of, unit_stride, number)
                        k += 1

    def member(frame, thread, team):
        units, depth = peek(frame, units_at), peek(frame, depth_at)
        block, full = peek(frame, block_at), units // lanes
        begin, end = depth * thread // team, depth * (thread + 1) // team
        along = peek(frame, depth_stride_at) == size  # rows of the source are read from end to end
        length = end - begin if along else 64 // size
        while begin < end:  # else a line of cache of every row at a time
            stop = least(begin + length, end)
            unit = 0
            while unit * lanes < units:
                width = block
                while width > 1 and width > full - unit:
                    width //= 2
                k = begin
                while k < stop:
                    piece(frame, unit, width, k, least(k + 64, stop))
                    k += 64
                unit += width
            begin = stop

    return member


def make_turn(dtype: str, lanes: int) -> Callable:
    """The kernel that copies a matrix with rows and columns exchanged. Rows of the target hold whole vectors."""
    size = FORMATS[dtype].bytes
    target_at, target_row_at, source_at, source_row_at, rows_at, columns_at = range(len(TURN))
    _, gather, transpose = moves(dtype, lanes)

    def member(frame, thread, team):
        target, target_row = peek(frame, target_at), peek(frame, target_row_at)
        source, source_row = peek(frame, source_at), peek(frame, source_row_at)
        rows, columns = peek(frame, rows_at), peek(frame, columns_at)
        squares = (columns + lanes - 1) // lanes
        begin, end = squares * thread // team * lanes, least(squares * (thread + 1) // team * lanes, columns)
        row = 0
        while row < rows:
            count = least(lanes, rows - row)
            from_row, column = source + row * source_row, begin
            while column < end:
                into, out_of = target + column * target_row + row * size, from_row + column * size
                if count == lanes and column + lanes <= end:
                    transpose(into, target_row, out_of, source_row)
                    column += lanes
                else:
                    gather(into, out_of, source_row, count)
                    column += 1
            row += lanes

    return member
