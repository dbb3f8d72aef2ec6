"""Kernels that do nothing but keep the multiply-adds busy, or read memory: what a core can do at best."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .intrinsics import peek
from .simd import FORMATS, I64, Vector, i64


def _loop(b: ir.IRBuilder, rounds: Any, start: list, body: Callable[[Any, list], list]) -> list:
    """Values after `rounds` (at least 1) of body(round, values)."""
    before, loop, done = b.block, b.append_basic_block("peak.loop"), b.append_basic_block("peak.done")
    b.branch(loop)
    b.position_at_end(loop)
    count = b.phi(I64)
    count.add_incoming(i64(0), before)
    values = [b.phi(v.type) for v in start]
    for value, first in zip(values, start, strict=True):
        value.add_incoming(first, before)
    new = body(count, values)
    more = b.add(count, i64(1))
    for value, after in zip((count, *values), (more, *new), strict=True):
        value.add_incoming(after, loop)
    b.cbranch(b.icmp_signed("<", more, rounds), loop, done)
    b.position_at_end(done)
    return new


def _store_sum(v: Vector, values: list, address: Any) -> None:
    """So that no compiler leaves the work out."""
    total = values[0]
    for value in values[1:]:
        total = v.b.fadd(total, value)
    v.store(total, address)


def make_multiply_add(dtype: str, chains: int, unrolled: int, lanes: int) -> Callable:
    """The kernel of multiply-adds: in each round `unrolled` on each of `chains` vectors.

    Frame: rounds, address of 64 bytes for each thread's sum.
    """

    @intrinsic
    def run(typingctx, rounds, out):
        def emit(context, b, signature, args):
            v = Vector(b, FORMATS[dtype], lanes)
            factor, term = v.const(0.5), v.const(1.0)

            def body(_: Any, values: list) -> list:
                for _ in range(unrolled):
                    values = [v.fma(value, factor, term) for value in values]
                return values

            start = [v.const(float(k)) for k in range(chains)]
            _store_sum(v, _loop(b, args[0], start, body), args[1])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    def member(frame, thread, team):
        run(peek(frame, 0), peek(frame, 1) + thread * 64)

    return member


def make_read(dtype: str, unrolled: int, lanes: int) -> Callable:
    """The kernel that reads: in each round `unrolled` vectors.

    Frame: address, bytes from thread to thread, rounds, how many times all of them, address of 64 bytes for each
    thread's sum.
    """
    size = lanes * FORMATS[dtype].bytes

    @intrinsic
    def run(typingctx, address, rounds, out):
        def emit(context, b, signature, args):
            v = Vector(b, FORMATS[dtype], lanes)

            def body(number: Any, values: list) -> list:
                at = b.add(args[0], b.mul(number, i64(unrolled * size)))
                return [b.fadd(value, v.load(b.add(at, i64(k * size)))) for k, value in enumerate(values)]

            _store_sum(v, _loop(b, args[1], [v.const(0.0)] * unrolled, body), args[2])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    def member(frame, thread, team):
        for _ in range(peek(frame, 3)):
            run(peek(frame, 0) + thread * peek(frame, 1), peek(frame, 2), peek(frame, 4) + thread * 64)

    return member
