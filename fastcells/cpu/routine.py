"""Parts of kernels that are lowered by themselves, once, and put together by LLVM.

Numba itself inlines a function before it looks at types: for each call it works through the whole caller again, which
takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import I64

ROUTINES: dict[str, tuple[Callable, str]] = {}  # by symbol: the function, and `calls`


def routine(function: Callable, calls: str = "alwaysinline") -> Any:
    """A function of integers, which returns an integer, a truth value or nothing, for kernels to call: LLVM inlines it.

    calls: the attribute that tells LLVM what to do about calls."""
    symbol = f"fastcells_{function.__name__}_{len(ROUTINES)}"
    ROUTINES[symbol] = function, calls
    names = tuple(signature(function).parameters)
    return of_integers(names, lambda b, given: _call(b, symbol, I64, given.values()), types.int64)


def seldom(function: Callable) -> Any:
    """The same of what is called now and then, and long: it takes no registers from what is done all the time."""
    return routine(function, "noinline")


def linked(symbol: str, arguments: Sequence[str], given: Sequence[str] = (), also: Callable | None = None) -> Any:
    """A function that is linked in later, for kernels to call. given: what they say, if not all of the arguments; then
    also(builder, what they said by name) returns the others by name."""

    def emit(b: ir.IRBuilder, said: dict) -> None:
        known = also(b, said) | said if also is not None else said
        _call(b, symbol, ir.VoidType(), [known[name] for name in arguments])

    return of_integers(given or arguments, emit)


def of_integers(names: Sequence[str], emit: Callable, returns: types.Type = types.void) -> Any:
    """An intrinsic of so many integers: emit(builder, the integers by name)."""

    def called(typingctx, *arguments):
        def generate(context, b, signature, args):
            result = emit(b, dict(zip(names, args, strict=True)))
            return context.get_dummy_value() if returns == types.void else result

        return returns(*[types.int64] * len(names)), generate

    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("typingctx", *names)]
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # Numba asks for it
    return intrinsic(called)


def _call(b: ir.IRBuilder, symbol: str, returns: ir.Type, arguments: Iterable[Any]) -> Any:
    """Call a function of integers by name."""
    arguments = list(arguments)
    kind = ir.FunctionType(returns, [I64] * len(arguments))
    return b.call(cgutils.get_or_insert_function(b.module, kind, symbol), arguments)
