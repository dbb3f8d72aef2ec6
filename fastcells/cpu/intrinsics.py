"""Words at addresses and other primitives that Numba does not have, for the loops of kernels."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import I64, i64


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
def tell(typingctx, address, number):
    """Set a word that other threads look at, after all that was written before."""

    def emit(context, b, signature, args):
        b.store_atomic(args[1], b.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def told(typingctx, address):
    """A word that another thread sets, before all that is read after."""

    def emit(context, b, signature, args):
        return b.load_atomic(b.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.int64(types.int64), emit


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop, where the architecture has such a hint."""

    def emit(context, b, signature, args):
        triple = b.module.triple
        void = ir.FunctionType(ir.VoidType(), [])
        if triple.startswith(("x86", "i686", "amd64")):
            b.call(cgutils.get_or_insert_function(b.module, void, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            hint = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            name = "llvm.aarch64.hint"
            b.call(cgutils.get_or_insert_function(b.module, hint, name), [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def give_way(typingctx, function):
    """Offer the processor to others, by the address of the function that does so."""

    def emit(context, b, signature, args):
        b.call(b.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def poke(typingctx, address, index, value):
    """Set the 64-bit word `index` at an address."""

    def emit(context, b, signature, args):
        b.store(args[2], b.inttoptr(b.add(args[0], b.mul(args[1], i64(8))), I64.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), emit


@intrinsic
def copy_words(typingctx, to, source, count):
    """Set so many 64-bit words to those at another address."""

    def emit(context, b, signature, args):
        to, source = (b.inttoptr(a, I64.as_pointer()) for a in args[:2])
        cgutils.raw_memcpy(b, to, source, args[2], 8)
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
