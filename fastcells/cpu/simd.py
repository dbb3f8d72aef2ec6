"""Vector arithmetic over an LLVM builder: what a cell's operations become on a CPU.

Everything here emits instructions for one vector of `lanes` numbers. Nothing assumes a vector width or an instruction
set; all results are those of IEEE arithmetic (no fast-math), NaN and infinities too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from .frame import LINE

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


# Constants are kept, with their text: to write them out again and again was half the time that it took to emit code.
@lru_cache(maxsize=4096)
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
    ln2_low: float  # ln2_high + ln2_low is ln 2
    log_degree: int  # of the polynomial for log
    half_pi: tuple[float, ...]  # sums to pi / 2; all but the last have trailing zeros
    sine_degree: int  # of the polynomials for sin and cos
    erf_degrees: tuple[int, int]  # of the polynomials for erf up to 1 and beyond
    erf_limit: float  # where erf rounds to 1


FLOAT = Format(
    "f32", ir.FloatType(), I32, 4, 23, 127, 0.693359375, 5, 9.5, -2.12194440e-4, 4,
    (1.5703125, 4.8375129699707031250e-4, 7.54978995489188216e-8), 3, (6, 6), 4.0,
)  # fmt: skip
DOUBLE = Format(
    "f64", ir.DoubleType(), I64, 8, 52, 1023, 0.693147180369123816490, 10, 20.0, 1.90821492927058770002e-10, 7,
    (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21), 6, (10, 14), 6.0,
)  # fmt: skip
FORMATS = {"float32": FLOAT, "float64": DOUBLE}

POLYNOMIALS: dict[str, tuple[Callable[[float], float], float, float]] = {
    "expm1": (lambda r: math.expm1(r) / r if r else 1.0, -math.log(2) / 2, math.log(2) / 2),  # / r
    # The next three are what is left of a series when its first terms are taken out, as functions of the square.
    "log": (lambda z: sum(2 * z**k / (2 * k + 3) for k in range(24)), 0.0, 0.0295),
    "sin": (lambda z: sum((-1) ** (k + 1) * z**k / math.factorial(2 * k + 3) for k in range(12)), 0.0, 0.62),
    "cos": (lambda z: sum((-1) ** k * z**k / math.factorial(2 * k + 4) for k in range(12)), 0.0, 0.62),
    "erf": (lambda z: math.erf(math.sqrt(z)) / math.sqrt(z) if z else 2 / math.sqrt(math.pi), 0.0, 1.0),
    "erfc": (lambda t: math.erfc(1 / t - 2) * math.exp((1 / t - 2) ** 2), 1 / 8, 1 / 3),  # of t = 1 / (x + 2)
}
"""Functions that polynomials stand for, and where."""


@lru_cache
def polynomial(name: str, degree: int, centred: bool = False) -> tuple[float, ...]:
    """Coefficients, lowest first, by interpolation at Chebyshev nodes. centred: of the argument mapped to [-1, 1]."""
    function, low, high = POLYNOMIALS[name]
    fit = np.polynomial.Chebyshev.interpolate(np.vectorize(function, otypes=[float]), degree, domain=[low, high])
    if centred:
        return tuple(np.polynomial.chebyshev.cheb2poly(fit.coef))
    return tuple(fit.convert(kind=np.polynomial.Polynomial).coef)


@lru_cache(maxsize=4096)
def _splat(scalar: ir.Type, lanes: int, number: float, negative: bool) -> ir.Constant:
    """The same number in all lanes. negative: its sign, which tells the zeros apart."""
    return ir.Constant(ir.VectorType(scalar, lanes), [ir.Constant(scalar, number)] * lanes)


@lru_cache(maxsize=4096)
def _lanes(*lanes: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


@lru_cache
def _undefined(kind: ir.Type) -> ir.Constant:
    return ir.Constant(kind, ir.Undefined)


class Vector:
    """Operations on vectors of one format and width; those of `fastcells.expression` under the same names."""

    def __init__(self, builder: ir.IRBuilder, fmt: Format, lanes: int) -> None:
        self.b, self.fmt, self.lanes = builder, fmt, lanes
        self.type = ir.VectorType(fmt.scalar, lanes)
        self.int_type = ir.VectorType(fmt.integer, lanes)

    # ---- values and memory ----
    def const(self, x: float) -> ir.Constant:
        number = float(np.float32(x)) if self.fmt is FLOAT else float(x)
        return _splat(self.fmt.scalar, self.lanes, number, math.copysign(1.0, number) < 0)

    def int_const(self, n: int) -> ir.Constant:
        return _splat(self.fmt.integer, self.lanes, n, n < 0)

    def intrinsic(self, name: str, *args, result=None):
        # llvmlite's declare_intrinsic does not know vector types: name the overload.
        kind = ir.FunctionType(result or self.type, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"{name}.v{self.lanes}{self.fmt.name}")
        return self.b.call(function, args)

    def splat(self, scalar):
        one = self.b.insert_element(_undefined(self.type), scalar, ir.Constant(I32, 0))
        return self.shuffle(one, one, [0] * self.lanes)

    def shuffle(self, a, b, lanes: list[int]):
        """The given lanes of a (0 to lanes - 1) and b (from `lanes` on)."""
        return self.b.shuffle_vector(a, b, _lanes(*lanes))

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

    def prefetch(self, address, level: int = 1):
        """Ask for the line of cache at an address, which need not be one of this process, for a level of cache."""
        byte, one = ir.IntType(8).as_pointer(), ir.Constant(I32, 1)
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.b.module, kind, "llvm.prefetch.p0")
        self.b.call(function, [self.b.inttoptr(address, byte), ir.Constant(I32, 0), ir.Constant(I32, 4 - level), one])

    def prefetch_all(self, address, size: int) -> None:
        """Ask for so many bytes, from anywhere in a line of cache on."""
        for byte in (*range(0, size, LINE), size - 1):
            self.prefetch(self.b.add(address, i64(byte)))

    def first_lanes(self, count):
        """A mask of the lanes below `count` (i64)."""
        lanes = ir.VectorType(I64, self.lanes)
        one = self.b.insert_element(ir.Constant(lanes, ir.Undefined), count, ir.Constant(I32, 0))
        all_lanes = self.shuffle(one, one, [0] * self.lanes)
        return self.b.icmp_signed("<", ir.Constant(lanes, list(range(self.lanes))), all_lanes)

    def sums(self, vectors: list, distance: int = 1):
        """The sum of each of `lanes` vectors, as one vector. Of fewer, which follow each other: their part of that, of
        which `lanes` / `distance` parts give the whole, if each is of `distance` vectors."""
        while len(vectors) > 1:  # halves of two vectors fold into one, whose lanes alternate between them
            low = [k if not k & distance else k - distance + self.lanes for k in range(self.lanes)]
            high = [k + distance if not k & distance else k + self.lanes for k in range(self.lanes)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.b.fadd(self.shuffle(x, y, low), self.shuffle(x, y, high)) for x, y in pairs]
            distance *= 2
        return vectors[0]

    def sum(self, a):
        """The sum of all lanes, in all lanes."""
        distance = self.lanes // 2
        while distance:
            a = self.b.fadd(a, self.shuffle(a, a, [k ^ distance for k in range(self.lanes)]))
            distance //= 2
        return a

    # ---- arithmetic ----
    def fma(self, a, b, c):
        # fmuladd, not fma: on a host without FMA the latter is a library call per lane.
        return self.intrinsic("llvm.fmuladd", a, b, c)

    def add(self, a, b):
        return self.b.fadd(a, b)

    def sub(self, a, b):
        return self.b.fsub(a, b)

    def mul(self, a, b):
        return self.b.fmul(a, b)

    def div(self, a, b):
        return self.b.fdiv(a, b)

    def neg(self, a):
        return self.b.fneg(a)

    def abs(self, a):
        return self.intrinsic("llvm.fabs", a)

    def sqrt(self, a):
        return self.intrinsic("llvm.sqrt", a)

    def rsqrt(self, a):
        return self.b.fdiv(self.const(1.0), self.sqrt(a))

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

    def _power(self, x, unit: float, shift: int = 0):
        """n, x / unit as a whole number, and 2**(n - shift).

        Adding 1.5 * 2**mantissa rounds to a whole number and leaves it in the low bits, so that the power of two needs
        neither a rounding nor a conversion instruction, and NaN needs no care.
        """
        fmt = self.fmt
        magic = self.const(1.5 * 2.0**fmt.mantissa)
        shifted = self.fma(x, self.const(1 / unit), magic)
        bits = self.b.add(self.b.bitcast(shifted, self.int_type), self.int_const(fmt.bias - shift))
        power = self.b.bitcast(self.b.shl(bits, self.int_const(fmt.mantissa)), self.type)
        return self.b.fsub(shifted, magic), power

    def _reduce(self, x, shift: int = 0):
        """s, r, h with exp(x) * 2**-shift = s * (1 + r * h); s is a power of two."""
        n, s = self._power(x, math.log(2), shift)
        r = self.fma(n, self.const(-self.fmt.ln2_high), x)
        r = self.fma(n, self.const(-self.fmt.ln2_low), r)
        return s, r, self.horner(r, polynomial("expm1", self.fmt.degree))

    def horner(self, x, coefficients: tuple[float, ...]):
        *low, h = coefficients
        h = self.const(h)
        for c in reversed(low):
            h = self.fma(h, x, self.const(c))
        return h

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
        # t / (t + 2) with t = exp(2|x|) - 1: no cancellation, so tiny x keep their relative accuracy. That n times half
        # ln 2 is not exact matters less than the result's rounding: where n is large, tanh hardly changes.
        magnitude = self._at_most(self.abs(x), self.fmt.tanh_limit)
        n, s = self._power(magnitude, math.log(2) / 2)
        r = self.fma(n, self.const(-math.log(2) / 2), magnitude)
        h = self.horner(r, tuple(c * 2.0 ** (k + 1) for k, c in enumerate(polynomial("expm1", self.fmt.degree))))
        t = self.fma(self.b.fmul(s, r), h, self.b.fsub(s, self.const(1.0)))
        return self.intrinsic("llvm.copysign", self.b.fdiv(t, self.b.fadd(t, self.const(2.0))), x)

    def expm1(self, x):
        s, r, h = self._reduce(self._bounded(x, 1), 1)
        half = self.fma(s, self.b.fmul(r, h), self.b.fsub(s, self.const(0.5)))
        return self.b.fadd(half, half)

    # ---- logarithms ----
    def log(self, x):
        """x = 2**n * m with m between sqrt(1/2) and sqrt(2); log(m) by the series of atanh, as in FreeBSD's libm."""
        fmt = self.fmt
        tiny = self.less(x, self.const(2.0 ** (1 - fmt.bias)))  # subnormal
        lift = fmt.mantissa + 1
        lifted = self.where(tiny, self.b.fmul(x, self.const(2.0**lift)), x)
        edge = self.b.bitcast(self.const(math.sqrt(0.5)), self.int_type)
        bits = self.b.bitcast(lifted, self.int_type)
        n = self.b.ashr(self.b.sub(bits, edge), self.int_const(fmt.mantissa))
        f = self.b.bitcast(self.b.sub(bits, self.b.shl(n, self.int_const(fmt.mantissa))), self.type)
        f = self.b.fsub(f, self.const(1.0))
        magic = self.const(1.5 * 2.0**fmt.mantissa)
        n = self.b.bitcast(self.b.add(n, self.b.bitcast(magic, self.int_type)), self.type)
        n = self.b.fsub(self.b.fsub(n, magic), self.where(tiny, self.const(lift), self.const(0.0)))
        s = self.b.fdiv(f, self.b.fadd(f, self.const(2.0)))
        z = self.b.fmul(s, s)
        half = self.b.fmul(self.const(0.5), self.b.fmul(f, f))
        rest = self.fma(z, self.horner(z, polynomial("log", fmt.log_degree)), half)
        low = self.fma(s, rest, self.b.fmul(n, self.const(fmt.ln2_low)))
        result = self.fma(n, self.const(fmt.ln2_high), self.b.fsub(f, self.b.fsub(half, low)))
        zero, infinity = self.const(0.0), self.const(math.inf)
        result = self.where(self.less(x, infinity), result, infinity)
        special = self.where(self.equal(x, zero), self.const(-math.inf), self.const(math.nan))
        return self.where(self.less(zero, x), result, special)

    def softplus(self, x):
        """max(x, 0) + log(1 + e) with e = exp(-|x|), and what rounding 1 + e loses put back."""
        e = self.exp(self.b.fneg(self.abs(x)))
        one = self.const(1.0)
        u = self.b.fadd(one, e)
        lost = self.b.fdiv(self.b.fsub(e, self.b.fsub(u, one)), u)
        return self.b.fadd(self.relu(x), self.b.fadd(self.log(u), lost))

    # ---- circular functions ----
    def sin(self, x):
        return self._sine(x, 0)

    def cos(self, x):
        return self._sine(x, 1)

    def _sine(self, x, quarters: int):
        """sin(x + quarters * pi / 2): x = n * pi / 2 + r, and n has the quadrant."""
        fmt = self.fmt
        magic = self.const(1.5 * 2.0**fmt.mantissa)
        shifted = self.fma(x, self.const(2 / math.pi), magic)
        n = self.b.fsub(shifted, magic)
        r = x
        for part in fmt.half_pi:
            r = self.fma(n, self.const(-part), r)
        r = self._at_least(self._at_most(r, 0.79), -0.79)  # far out, where no digit of r is right, still a sine
        z = self.b.fmul(r, r)
        sine = self.fma(self.b.fmul(r, z), self.horner(z, polynomial("sin", fmt.sine_degree)), r)
        cosine = self.fma(z, self.horner(z, polynomial("cos", fmt.sine_degree)), self.const(-0.5))
        cosine = self.fma(z, cosine, self.const(1.0))
        quadrant = self.b.add(self.b.bitcast(shifted, self.int_type), self.int_const(quarters))
        bit = lambda k: self.b.icmp_signed("!=", self.b.and_(quadrant, self.int_const(k)), self.int_const(0))  # noqa: E731
        result = self.where(bit(1), cosine, sine)
        return self.where(bit(2), self.b.fneg(result), result)

    def erf(self, x):
        """x times a polynomial of its square up to 1; beyond, 1 - exp(-x**2) times a polynomial of 1 / (|x| + 2)."""
        fmt = self.fmt
        z = self.abs(x)
        square = self.b.fmul(x, x)
        inner = self.b.fmul(x, self.horner(self._at_most(square, 1.0), polynomial("erf", fmt.erf_degrees[0])))
        far = self._at_least(self._at_most(z, fmt.erf_limit), 1.0)
        t = self.b.fdiv(self.const(48 / 5), self.b.fadd(far, self.const(2.0)))  # [1/8, 1/3] becomes [-1, 1]
        t = self.b.fsub(t, self.const(11 / 5))
        tail = self.b.fmul(
            self.exp(self.b.fneg(self.b.fmul(far, far))), self.horner(t, polynomial("erfc", fmt.erf_degrees[1], True))
        )
        outer = self.intrinsic("llvm.copysign", self.b.fsub(self.const(1.0), tail), x)
        return self.where(self.less(z, self.const(1.0)), inner, outer)
