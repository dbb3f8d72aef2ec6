"""Vector arithmetic over an LLVM builder: what a cell's operations become on a CPU.

Everything here emits instructions for one vector of `lanes` numbers. Nothing assumes a vector width or an instruction
set; NaN and infinities come through as in IEEE arithmetic (no fast-math), except that products and sums may fuse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
BYTE = ir.IntType(8)


def i64(n: int) -> ir.Constant:
    """A 64-bit constant."""
    return ir.Constant(I64, n)


@dataclass(frozen=True)
class Format:
    """A floating-point format: its LLVM type and the constants of its exponential."""

    name: str
    scalar: ir.Type
    integer: ir.Type
    bytes: int
    mantissa: int  # stored bits
    bias: int
    ln2_high: float  # has trailing zeros, so that n * ln2_high is exact for every exponent n
    degree: int  # of the polynomial for (exp(r) - 1) / r
    tanh_limit: float  # where tanh rounds to 1


FLOAT = Format("f32", ir.FloatType(), I32, 4, 23, 127, 0.693359375, 5, 9.5)
DOUBLE = Format("f64", ir.DoubleType(), I64, 8, 52, 1023, 0.693147180369123816490, 10, 20.0)
FORMATS = {"float32": FLOAT, "float64": DOUBLE}


@lru_cache
def expm1_polynomial(degree: int) -> tuple[float, ...]:
    """Coefficients, lowest first, of (exp(r) - 1) / r on |r| <= ln(2) / 2, by interpolation at Chebyshev nodes."""

    def target(r):
        safe = np.where(r == 0, 1.0, r)
        return np.where(r == 0, 1.0, np.expm1(safe) / safe)

    edge = math.log(2) / 2
    fit = np.polynomial.Chebyshev.interpolate(target, degree, domain=[-edge, edge])
    return tuple(fit.convert(kind=np.polynomial.Polynomial).coef)


class Vector:
    """Operations on vectors of one format and width; those of `fastcells.expression` under the same names."""

    def __init__(self, builder: ir.IRBuilder, fmt: Format, lanes: int) -> None:
        self.b, self.fmt, self.lanes = builder, fmt, lanes
        self.type = ir.VectorType(fmt.scalar, lanes)
        self.int_type = ir.VectorType(fmt.integer, lanes)

    # ---- values and memory ----
    def const(self, x: float) -> ir.Constant:
        return ir.Constant(self.type, [float(np.float32(x)) if self.fmt is FLOAT else float(x)] * self.lanes)

    def int_const(self, n: int) -> ir.Constant:
        return ir.Constant(self.int_type, [n] * self.lanes)

    def intrinsic(self, name: str, *args, result=None):
        # llvmlite's declare_intrinsic does not know vector types: name the overload.
        kind = ir.FunctionType(result or self.type, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"{name}.v{self.lanes}{self.fmt.name}")
        return self.b.call(function, args)

    def splat(self, scalar):
        one = self.b.insert_element(ir.Constant(self.type, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, a, b, lanes: list[int]):
        """The given lanes of a (0 to lanes - 1) and b (from `lanes` on)."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def pointer(self, address, element):
        return self.b.inttoptr(address, element.as_pointer())

    def load(self, address, mask=None):
        pointer = self.pointer(address, self.type)
        if mask is None:
            return self.b.load(pointer, align=self.fmt.bytes)
        kind = ir.FunctionType(self.type, [pointer.type, I32, mask.type, self.type])
        name = f"llvm.masked.load.v{self.lanes}{self.fmt.name}.p0"
        function = cgutils.get_or_insert_function(self.b.module, kind, name)
        return self.b.call(function, [pointer, ir.Constant(I32, self.fmt.bytes), mask, self.const(0.0)])

    def store(self, value, address, mask=None):
        pointer = self.pointer(address, self.type)
        if mask is None:
            self.b.store(value, pointer, align=self.fmt.bytes)
            return
        kind = ir.FunctionType(ir.VoidType(), [self.type, pointer.type, I32, mask.type])
        name = f"llvm.masked.store.v{self.lanes}{self.fmt.name}.p0"
        function = cgutils.get_or_insert_function(self.b.module, kind, name)
        self.b.call(function, [value, pointer, ir.Constant(I32, self.fmt.bytes), mask])

    def first_lanes(self, count):
        """A mask of the lanes below `count` (i64)."""
        lanes = ir.VectorType(I64, self.lanes)
        one = self.b.insert_element(ir.Constant(lanes, ir.Undefined), count, ir.Constant(I32, 0))
        all_lanes = self.shuffle(one, one, [0] * self.lanes)
        return self.b.icmp_signed("<", ir.Constant(lanes, list(range(self.lanes))), all_lanes)

    # ---- arithmetic ----
    def fma(self, a, b, c):
        # fmuladd, not fma: on a host without FMA the latter is a library call per lane.
        return self.intrinsic("llvm.fmuladd", a, b, c)

    def add(self, a, b):
        return self.b.fadd(a, b, flags=("contract",))

    def sub(self, a, b):
        return self.b.fsub(a, b, flags=("contract",))

    def mul(self, a, b):
        return self.b.fmul(a, b, flags=("contract",))

    def div(self, a, b):
        return self.b.fdiv(a, b)

    def neg(self, a):
        return self.b.fneg(a)

    def abs(self, a):
        return self.intrinsic("llvm.fabs", a)

    def sqrt(self, a):
        return self.intrinsic("llvm.sqrt", a)

    def less(self, a, b):
        return self.b.fcmp_ordered("<", a, b)

    def less_equal(self, a, b):
        return self.b.fcmp_ordered("<=", a, b)

    def equal(self, a, b):
        return self.b.fcmp_ordered("==", a, b)

    def where(self, condition, a, b):
        return self.b.select(condition, a, b)

    def relu(self, a):
        return self.where(self.less_equal(a, self.const(0.0)), self.const(0.0), a)

    def maximum(self, a, b):
        larger = self.where(self.less(a, b), b, a)  # NaN in a stays; NaN in b:
        return self.where(self.b.fcmp_unordered("uno", b, b), b, larger)

    def minimum(self, a, b):
        smaller = self.where(self.less(b, a), b, a)
        return self.where(self.b.fcmp_unordered("uno", b, b), b, smaller)

    # ---- exponentials ----
    def _at_most(self, a, limit: float):
        bound = self.const(limit)
        return self.where(self.b.fcmp_ordered(">", a, bound), bound, a)  # NaN stays

    def _at_least(self, a, limit: float):
        bound = self.const(limit)
        return self.where(self.b.fcmp_ordered("<", a, bound), bound, a)

    def _reduce(self, x, exponent_shift: int = 0):
        """s, r, h with exp(x) * 2**-exponent_shift = s * (1 + r * h); s is a power of two.

        Adding 1.5 * 2**mantissa rounds x / ln 2 to a whole number n and leaves n in the low bits, so that the power of
        two needs neither a rounding nor a conversion instruction, and NaN needs no care.
        """
        fmt = self.fmt
        magic = self.const(1.5 * 2.0**fmt.mantissa)
        shifted = self.fma(x, self.const(1 / math.log(2)), magic)
        n = self.b.fsub(shifted, magic)
        r = self.fma(n, self.const(-fmt.ln2_high), x)
        r = self.fma(n, self.const(fmt.ln2_high - math.log(2) if fmt is FLOAT else -1.90821492927058770002e-10), r)
        bits = self.b.add(self.b.bitcast(shifted, self.int_type), self.int_const(fmt.bias - exponent_shift))
        s = self.b.bitcast(self.b.shl(bits, self.int_const(fmt.mantissa)), self.type)
        *low, h = expm1_polynomial(fmt.degree)
        h = self.const(h)
        for c in reversed(low):
            h = self.fma(h, r, self.const(c))
        return s, r, h

    def _bounded(self, x, exponent_shift: int = 0):
        # At these bounds the result overflows to infinity and the power of two is 0: both ends are exact.
        low, high = self.fmt.bias - exponent_shift + 0.49, self.fmt.bias + 1.49
        return self._at_least(self._at_most(x, high * math.log(2)), -low * math.log(2))

    def exp(self, x):
        s, r, h = self._reduce(self._bounded(x, 1), 1)
        half = self.b.fmul(s, self.fma(r, h, self.const(1.0)))
        return self.b.fadd(half, half)  # so that the largest finite results do not overflow on the way

    def sigmoid(self, x):
        s, r, h = self._reduce(self._bounded(self.b.fneg(x)))
        return self.b.fdiv(self.const(1.0), self.fma(s, self.fma(r, h, self.const(1.0)), self.const(1.0)))

    def tanh(self, x):
        # t / (t + 2) with t = exp(2|x|) - 1: no cancellation, so tiny x keep their relative accuracy.
        magnitude = self.abs(x)
        s, r, h = self._reduce(self._at_most(self.b.fadd(magnitude, magnitude), 2 * self.fmt.tanh_limit))
        t = self.fma(s, self.b.fmul(r, h), self.b.fsub(s, self.const(1.0)))
        return self.intrinsic("llvm.copysign", self.b.fdiv(t, self.b.fadd(t, self.const(2.0))), x)
