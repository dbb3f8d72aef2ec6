"""Parts of kernels that are lowered by themselves, once, and put together by LLVM.

Numba itself inlines a function before it looks at types: for each call it works through the whole caller again, which
takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    parameters = list(signature(function).parameters.values())

    def called(typingctx, *arguments):
        def emit(context, b, signature, args):
            kind = ir.FunctionType(I64, [I64] * len(args))
            return b.call(cgutils.get_or_insert_function(b.module, kind, symbol), args)

        return types.int64(*[types.int64] * len(parameters)), emit

    first = Parameter("typingctx", Parameter.POSITIONAL_OR_KEYWORD)
    called.__signature__ = Signature([first, *parameters])  # type: ignore[attr-defined]  # Numba asks for it
    return intrinsic(called)


def seldom(function: Callable) -> Any:
    """The same of what is called now and then, and long: it takes no registers from what is done all the time."""
    return routine(function, "noinline")


def linked(b: ir.IRBuilder, name: str, arguments: Sequence[Any]) -> None:
    """Call a function of integers by name, which is linked in later."""
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
    b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)
