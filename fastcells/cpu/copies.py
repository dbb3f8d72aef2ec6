"""Kernels that copy matrices into the order in which products read them. A kernel is `member(frame, thread, team)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emitter import joined
from .frame import DIGEST, DIGEST_BYTES, LINE, PACK, TURN
from .intrinsics import least, peek, poke
from .routine import routine
from .simd import FORMATS, I64, Vector, i64

AHEAD = 256  # bytes along a row that is read by squares, to be fetched early: rows are too many to be foreseen


def moves(dtype: str, lanes: int) -> tuple[Any, Any]:
    """Vectors moved as they are, and a square of them turned."""
    fmt = FORMATS[dtype]

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
    def transpose(typingctx, target, target_stride, source, source_stride, rows, columns):
        """Copy a square of `lanes` rows, turned, of which so many rows and columns are there; else numbers are zero."""

        def emit(context, b, signature, args):
            v = Vector(b, fmt, lanes)
            target, target_stride, source, source_stride, count, columns = args
            at = [b.add(source, b.mul(source_stride, i64(k))) for k in range(lanes)]
            whole = b.and_(b.icmp_signed("==", count, i64(lanes)), b.icmp_signed("==", columns, i64(lanes)))
            with b.if_else(whole) as (then, otherwise):
                with then:
                    full, all_there = [v.load(address) for address in at], b.block
                with otherwise:
                    there = [b.select(b.icmp_signed("<", i64(k), count), columns, i64(0)) for k in range(lanes)]
                    some = [v.load(address, v.first_lanes(n)) for address, n in zip(at, there, strict=True)]
                    some_there = b.block
            rows = [joined(b, (x, all_there), (y, some_there)) for x, y in zip(full, some, strict=True)]
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
            into = [b.add(target, b.mul(target_stride, i64(k))) for k in range(lanes)]
            with b.if_else(b.icmp_signed("==", columns, i64(lanes))) as (then, otherwise):
                with then:
                    for row, address in zip(rows, into, strict=True):
                        v.store(row, address)
                with otherwise:
                    for k, (row, address) in enumerate(zip(rows, into, strict=True)):
                        with b.if_then(b.icmp_signed("<", i64(k), columns)):
                            v.store(row, address)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), emit

    return copy, transpose


STREAMS = 4  # that are read side by side: memory that is far has more under way so, 30 GB/s instead of 23
SPREAD, TURNED = 0x9E3779B97F4A7C15 - (1 << 64), 29  # an odd number, and bits by which its products are rotated


def digesting(dtype: str, lanes: int) -> tuple[Any, Any]:
    """Digests of numbers by their bits. If one number differs, so does the digest; if several do, there is a chance of
    one in 2**64 that it does not, where all of them meet the same lane of the same chain."""
    fmt = FORMATS[dtype]
    size = fmt.bytes
    chains = (DIGEST - 1) * 8 // (lanes * size)  # that do not wait for each other
    each = chains // STREAMS  # of a stream

    words = lanes * size // 8
    kind = ir.VectorType(I64, words)

    def mixed(b, chain, numbers):
        rotate = ir.FunctionType(kind, [kind] * 3)
        rotate = cgutils.get_or_insert_function(b.module, rotate, f"llvm.fshl.v{words}i64")
        spread, turned = (ir.Constant(kind, [n] * words) for n in (SPREAD, TURNED))
        product = b.mul(b.xor(chain, b.bitcast(numbers, kind)), spread)
        return b.call(rotate, [product, product, turned])

    def at(b, state, k=0):
        return b.inttoptr(b.add(state, i64(8 * words * k)), kind.as_pointer())

    @intrinsic
    def room(typingctx):
        """The address of a digest that lasts as long as the kernel runs."""

        def emit(context, b, signature, args):
            with b.goto_entry_block():
                place = b.alloca(ir.ArrayType(I64, DIGEST))
                place.align = LINE
                return b.ptrtoint(place, I64)

        return types.int64(), emit

    @intrinsic
    def mix(typingctx, chain, source, count):
        """Go on with a chain of a digest by `count` (0 to lanes) adjacent numbers."""

        def emit(context, b, signature, args):
            v, place = Vector(b, fmt, lanes), at(b, args[0])
            b.store(mixed(b, b.load(place, align=8), v.load(args[1], v.first_lanes(args[2]))), place, align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @intrinsic
    def mix_all(typingctx, state, source, times):
        """Go on with all chains, so many times each by a vector; streams of adjacent numbers follow each other."""

        def emit(context, b, signature, args):
            v = Vector(b, fmt, lanes)
            state, source, times = args
            apart = b.mul(times, i64(8 * words * each))  # the streams
            first = [b.load(at(b, state, k), align=8) for k in range(chains)]
            before, loop, done = b.block, b.append_basic_block("mix"), b.append_basic_block("mix.done")
            b.cbranch(b.icmp_signed(">", times, i64(0)), loop, done)
            b.position_at_end(loop)
            n, address, *current = (b.phi(t) for t in (I64, I64, *[kind] * chains))
            streams = [b.add(address, b.mul(apart, i64(k))) for k in range(STREAMS)]
            new = [
                mixed(b, c, v.load(b.add(streams[k // each], i64(8 * words * (k % each)))))
                for k, c in enumerate(current)
            ]
            new = [b.add(n, i64(1)), b.add(address, i64(8 * words * each)), *new]
            for node, x, y in zip([n, address, *current], [i64(0), source, *first], new, strict=True):
                node.add_incoming(x, before)
                node.add_incoming(y, loop)
            b.cbranch(b.icmp_signed("<", new[0], times), loop, done)
            b.position_at_end(done)
            for k, (x, y) in enumerate(zip(first, new[2:], strict=True)):
                node = b.phi(kind)
                node.add_incoming(x, before)
                node.add_incoming(y, loop)
                first[k] = node
            for k, node in enumerate(first):
                b.store(node, at(b, state, k), align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @routine
    def digest(state, source, length):
        """Go on with a digest by so many adjacent numbers."""
        k = length // (lanes * chains) * (lanes * chains)
        mix_all(state, source, k // (lanes * chains))
        chain = 0
        while k < length:
            mix(state + chain * lanes * size, source + k * size, least(lanes, length - k))
            chain += 1
            k += lanes

    return room, digest


def make_pack(dtype: str, lanes: int) -> Callable:
    """The kernel that copies a weight matrix (or blocks of it) into panels, unless they hold what they would.

    A panel holds, for each block of vectors of units: [depth, vectors in the block, gates, lanes], so that a tile reads
    it front to back; then, for each vector of the rest, [depth, gates, lanes]. Lanes past the last unit are zero.
    """
    fmt = FORMATS[dtype]
    size = fmt.bytes
    panel_at, source_at, units_at, depth_at, room_at, unit_stride_at, depth_stride_at, *rest = range(len(PACK))
    block_at, gates_at, shares_at, digests_at, keeps_at = rest
    offsets = len(PACK)

    copy, transpose = moves(dtype, lanes)
    room, digest = digesting(dtype, lanes)

    @routine
    def piece(frame, unit, width, begin, stop):
        """Some k of one block of vectors of units."""
        panel, source = peek(frame, panel_at), peek(frame, source_at)
        units, room, gates = peek(frame, units_at), peek(frame, room_at), peek(frame, gates_at)
        unit_stride, depth_stride = peek(frame, unit_stride_at), peek(frame, depth_stride_at)
        line = width * gates * lanes * size
        for w in range(width):
            first = (unit + w) * lanes
            number = least(lanes, units - first)
            for g in range(gates):
                origin = source + peek(frame, offsets + g) + first * unit_stride
                target = panel + unit * room * gates * lanes * size + (w * gates + g) * lanes * size
                k = begin
                while k < stop:
                    into, out_of = target + k * line, origin + k * depth_stride
                    if unit_stride == size:
                        copy(into, out_of, number)
                        k += 1
                    else:
                        transpose(into, line, out_of, unit_stride, number, least(lanes, stop - k))
                        k += lanes

    @routine
    def known(frame, first, last, begin, end, kept):
        """Whether a panel was made of what the source holds: of the units from `first` to `last`, and of the depth from
        `begin` to `end`; noted for next time."""
        state = room()
        for w in range(DIGEST - 1):
            poke(state, w, (w + 1) * SPREAD)
        unit_stride, depth_stride = peek(frame, unit_stride_at), peek(frame, depth_stride_at)
        start = peek(frame, source_at) + first * unit_stride + begin * depth_stride
        for g in range(peek(frame, gates_at)):
            origin = start + peek(frame, offsets + g)
            if depth_stride != size:
                for k in range(end - begin):
                    digest(state, origin + k * depth_stride, last - first)
            elif unit_stride == (end - begin) * size:
                digest(state, origin, (last - first) * (end - begin))
            else:
                for unit in range(last - first):
                    digest(state, origin + unit * unit_stride, end - begin)
        same = peek(kept, DIGEST - 1) == 1
        for w in range(DIGEST - 1):
            same = same and peek(state, w) == peek(kept, w)
        if not same:
            poke(kept, DIGEST - 1, 0)  # until it is packed
            for w in range(DIGEST - 1):
                poke(kept, w, peek(state, w))
        return same

    def member(frame, thread, team):
        units, depth = peek(frame, units_at), peek(frame, depth_at)
        block, full = peek(frame, block_at), units // lanes
        along = peek(frame, depth_stride_at) == size  # rows of the source are read from end to end
        keeps = peek(frame, keeps_at) == 1
        share, shares = thread, peek(frame, shares_at)
        length = depth if along else LINE // size
        blocks = (units + block * lanes - 1) // (block * lanes)
        while share < shares:  # the same ones whatever the team, since each has a digest: what lies together
            kept = peek(frame, digests_at) + share * DIGEST_BYTES
            first, last, begin, end = 0, units, 0, depth
            if along:
                first = blocks * share // shares * block * lanes
                last = least(units, blocks * (share + 1) // shares * block * lanes)
            else:
                begin, end = depth * share // shares, depth * (share + 1) // shares
            packs = not (keeps and known(frame, first, last, begin, end, kept))
            done = begin if packs else end
            while done < end:  # else a line of cache of every row at a time
                stop = least(done + length, end)
                unit = first // lanes
                while unit * lanes < last:
                    width = block if block <= full - unit else 1
                    k = done
                    while k < stop:
                        piece(frame, unit, width, k, least(k + 64, stop))
                        k += 64
                    unit += width
                done = stop
            if keeps and packs:  # and was not written to meanwhile
                poke(kept, DIGEST - 1, 1)
                known(frame, first, last, begin, end, kept)
            share += team

    return member


def make_turn(dtype: str, lanes: int) -> Callable:
    """The kernel that exchanges the rows and the columns of a matrix. Threads share its columns."""
    size = FORMATS[dtype].bytes
    target_at, target_row_at, source_at, source_row_at, rows_at, columns_at = range(len(TURN))
    _, transpose = moves(dtype, lanes)

    def member(frame, thread, team):
        target, target_row = peek(frame, target_at), peek(frame, target_row_at)
        source, source_row = peek(frame, source_at), peek(frame, source_row_at)
        rows, columns = peek(frame, rows_at), peek(frame, columns_at)
        squares = (columns + lanes - 1) // lanes
        begin, end = squares * thread // team * lanes, least(squares * (thread + 1) // team * lanes, columns)
        row = 0
        while row < rows:
            column = begin
            while column < end:
                into, out_of = target + column * target_row + row * size, source + row * source_row + column * size
                transpose(into, target_row, out_of, source_row, least(lanes, rows - row), least(lanes, end - column))
                column += lanes
            row += lanes

    return member
