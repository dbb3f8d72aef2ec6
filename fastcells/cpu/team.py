"""Running a kernel on torch's own threads.

torch's intra-op threads are an OpenMP team; `GOMP_parallel` of the library that torch loaded runs a function on it, so
there is no second pool and no oversubscription. Where there is no such library, and in a forked child of a process that
had a team (which the library does not survive), kernels run on the calling thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from . import store
from .frame import TEAM
from .store import Kernel, _target_machine

# Nanoseconds: what a team may lose that did well until then, what it may at first and after a pause, and a pause.
MOST_CREDIT, CREDIT, ALONE = 100_000_000, 20_000_000, 200_000_000

_used = _lost = False  # a team was started; a fork took it away


def _after_fork() -> None:
    global _lost
    _lost = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def size() -> int:
    """Threads that a kernel may use now: torch's setting, but no more than there are processors, which would wait for
    each other's turns; or 1 where no team can be had."""
    threads = torch.get_num_threads()
    return min(threads, processors()) if threads > 1 and not _lost and _openmp() is not None else 1


def processors() -> int:
    """How many of them this process may keep busy: those that it may run on, or what its container is granted."""
    if (openmp := _openmp()) is not None:
        allowed = openmp[-1][0].omp_get_num_procs()  # knows of all, also where it has bound this thread to one of them
    else:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _granted(allowed))


@lru_cache
def _granted(most: int, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """By the container's quota of time, in either version of Linux's control groups, rounded up."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join([(groups / file).read_text() for file in files]).split()
            if int(quota) > 0:
                return max(1, min(most, -(-int(quota) // int(period))))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return most


def run(kernel: Kernel, frame: bytes, threads: int) -> None:
    """Run `kernel` on a frame with a team of `threads`, which write in a copy of theirs."""
    if threads <= 1:
        kernel.call(frame, 0, 1)
        return
    words = _shared(frame)
    parallel, member, functions, _ = _openmp()  # type: ignore[misc]
    arguments = (ctypes.c_int64 * 4)(kernel.address, words.buffer_info()[0], *functions)
    parallel(member, ctypes.addressof(arguments), threads, 0)


def lead(driver: Kernel, frame: bytes) -> None:
    """Run a script's frame on the team, or on the caller's thread while others have lost theirs (see lead.py)."""
    words = _shared(frame)
    kernel, team = leading()
    kernel.call(words.buffer_info()[0], ctypes.addressof(team), driver.address)


def _shared(frame: bytes) -> array:
    """A copy of a frame for a team."""
    global _used
    _used = True
    return array("q", frame)


@lru_cache
def leader() -> Kernel:
    """The kernel that runs scripts on the team."""

    def make() -> Callable:
        from .lead import make_lead

        return make_lead()

    return store.kernel("lead", [], make)


@lru_cache
def leading() -> tuple[Kernel, ctypes.Array]:
    """That kernel, and what it has to know of the team."""
    parallel, member, functions, _ = _openmp()  # type: ignore[misc]
    clock = _address(ctypes.CDLL(None).clock_gettime)
    return leader(), (ctypes.c_int64 * len(TEAM))(_address(parallel), member, *functions, clock, CREDIT)


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@lru_cache
def give_way() -> int:
    """Address of the function with which a waiting thread offers its processor to others."""
    if sys.platform == "win32":
        return _address(ctypes.windll.kernel32.SwitchToThread)
    return _address(ctypes.CDLL(None).sched_yield)


def library() -> str | None:
    """Path of the OpenMP library whose team torch uses, if it was found."""
    for path in _loaded_libraries():
        if "omp" in path.rsplit("/", 1)[-1]:
            try:
                if hasattr(ctypes.CDLL(path), "GOMP_parallel"):
                    return path
            except OSError:
                continue
    return None


def _loaded_libraries() -> list[str]:
    try:
        with open("/proc/self/maps") as maps:
            paths = _mapped(maps)
    except OSError:  # no such file system: look beside torch's own libraries
        folder = Path(torch.__file__).parent / "lib"
        paths = {str(p) for p in folder.glob("*omp*")}
    # gomp first: where several are loaded, it is the one that torch's wheels link
    return sorted(paths, key=lambda p: ("gomp" not in p, p))


def _mapped(lines: Iterable[str]) -> set[str]:
    """Paths of such libraries, which may have spaces: what follows address, permissions, offset, device and inode."""
    return {line.split(maxsplit=5)[-1].rstrip("\n") for line in lines if "omp" in line and ".so" in line}


@lru_cache
def _openmp() -> tuple | None:
    """GOMP_parallel, the address of the function that each thread runs, the addresses that it needs, their owners."""
    path = library()
    if path is None:
        return None
    openmp = ctypes.CDLL(path)
    parallel = openmp.GOMP_parallel
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    functions = [
        ctypes.cast(getattr(openmp, n), ctypes.c_void_p).value for n in ("omp_get_thread_num", "omp_get_num_threads")
    ]
    # Called as member(arguments): [kernel, frame, omp_get_thread_num, omp_get_num_threads]
    module = llvm.parse_assembly(
        """
        define void @member(ptr %arguments) {
            %kernel = load ptr, ptr %arguments
            %at1 = getelementptr i64, ptr %arguments, i64 1
            %frame = load i64, ptr %at1
            %at2 = getelementptr i64, ptr %arguments, i64 2
            %thread_num = load ptr, ptr %at2
            %at3 = getelementptr i64, ptr %arguments, i64 3
            %num_threads = load ptr, ptr %at3
            %thread = call i32 %thread_num()
            %team = call i32 %num_threads()
            %thread64 = sext i32 %thread to i64
            %team64 = sext i32 %team to i64
            call void %kernel(i64 %frame, i64 %thread64, i64 %team64)
            ret void
        }"""
    )
    engine = llvm.create_mcjit_compiler(module, _target_machine())
    engine.finalize_object()
    return parallel, engine.get_function_address("member"), functions, (openmp, engine)
