"""Running a script on the team of the process, unless this takes longer than one thread does, since others are not
given their turn.

A team is as slow as its last thread, and one whose processor runs something else can come many milliseconds late. An
account is kept of what runs on the team saved over runs on one thread, and of what late ones lost. Once there is
nothing left of it, scripts run on the caller's thread for a while. That takes a lasting reason: threads of other
libraries that spin on for some milliseconds after their work are none. Results are the same: nothing depends on how
many threads there are.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .frame import SCRIPT, TEAM
from .intrinsics import call, least, peek, poke
from .simd import I64, i64
from .team import ALONE, CREDIT, MOST_CREDIT

STATUS = ir.IntType(32)


@intrinsic
def now(typingctx, clock):
    """Nanoseconds since some moment, by the address of `clock_gettime`."""

    def emit(context, b, signature, args):
        with b.goto_entry_block():
            place = b.alloca(ir.ArrayType(I64, 2))
        kind = ir.FunctionType(STATUS, [STATUS, place.type])
        b.call(b.inttoptr(args[0], kind.as_pointer()), [STATUS(time.CLOCK_MONOTONIC), place])
        seconds, rest = (b.load(b.gep(place, [i64(0), i64(k)])) for k in range(2))
        return b.add(b.mul(seconds, i64(10**9)), rest)

    return types.int64(types.int64), emit


@intrinsic
def fork(typingctx, parallel, member, driver, script, thread_num, num_threads, threads):
    """Run member([driver, script, thread_num, num_threads]) on so many threads."""

    def emit(context, b, signature, args):
        parallel, member, *given, threads = args
        with b.goto_entry_block():
            place = b.alloca(ir.ArrayType(I64, len(given)))
        for k, word in enumerate(given):
            b.store(word, b.gep(place, [i64(0), i64(k)]))
        kind = ir.FunctionType(ir.VoidType(), [I64, place.type, STATUS, STATUS])
        b.call(b.inttoptr(parallel, kind.as_pointer()), [member, place, b.trunc(threads, STATUS), STATUS(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7), emit


def make_lead() -> Callable:
    """The kernel that runs a script by its driver: (script, the team, driver)."""
    parallel_at, member_at, *functions_at, clock_at, credit_at, alone_at = range(len(TEAM))
    thread_num_at, num_threads_at = functions_at
    threads_at, team_at, fastest_at = (SCRIPT.index(name) for name in ("threads", "team", "fastest"))

    def lead(script, team, driver):
        fastest = peek(script, fastest_at)
        begin = now(peek(team, clock_at))
        shared, single = peek(fastest, 0), peek(fastest, 1)
        if begin < peek(team, alone_at):
            call(driver, script, 0, 1)
            took = now(peek(team, clock_at)) - begin
            poke(fastest, 1, took if single == 0 else least(took, single))
            return
        member, thread_num, num_threads = peek(team, member_at), peek(team, thread_num_at), peek(team, num_threads_at)
        fork(peek(team, parallel_at), member, driver, script, thread_num, num_threads, peek(script, team_at))
        end = now(peek(team, clock_at))
        took = end - begin
        shared = took if shared == 0 else least(took, shared)
        poke(fastest, 0, shared)
        saved = (peek(script, threads_at) * shared if single == 0 else single) - took  # at most, where not known
        credit = least(peek(team, credit_at) + saved, MOST_CREDIT)
        if credit < 0:
            credit = CREDIT
            poke(team, alone_at, end + ALONE)
        poke(team, credit_at, credit)

    return lead
