"""What the machine can do: the peak of multiply-adds, and the bandwidth of its levels of cache, as measured here."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .cpu import store, team
from .cpu.engine import DTYPES
from .cpu.frame import LINE
from .cpu.host import host

UNROLLED = 8  # of the loops of the kernels in `cpu.peaks`


def memory() -> int | None:
    """Bytes of the machine's memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Operations a second of `threads` threads together that do multiply-adds from register to register."""
    return max(_peak_flops(dtype, n) for n in {1, threads})  # on a busy machine one thread may do more than a team


def _peak_flops(dtype: torch.dtype, threads: int) -> float:
    name, lanes = DTYPES[dtype], host().lanes(dtype.itemsize)
    chains = min(12, host().registers - 4)  # more than any core's latency times its throughput

    def make() -> Callable:
        from .cpu.peaks import make_multiply_add

        return make_multiply_add(name, chains, UNROLLED, lanes)

    rounds = 1 << 13
    seconds = _best(store.kernel(f"multiply_add_{name}", [f"{chains} {UNROLLED}"], make), threads, rounds)
    return 2 * rounds * UNROLLED * chains * lanes * threads / seconds


def bandwidth(size: int, threads: int) -> float:
    """Bytes a second that `threads` threads together read, each going through `size` bytes again and again."""
    return max(_bandwidth(size, n) for n in {1, threads})


def _bandwidth(size: int, threads: int) -> float:
    lanes = host().lanes(4)

    def make() -> Callable:
        from .cpu.peaks import make_read

        return make_read("float32", UNROLLED, lanes)

    line = UNROLLED * lanes * 4
    rounds = max(1, size // line)
    own = rounds * line  # of each thread
    times = max(1, (1 << 24) // own)
    data = torch.ones(threads * own // 4 + LINE)
    address = -(-data.data_ptr() // LINE) * LINE
    return (
        threads
        * times
        * own
        / _best(store.kernel("read_float32", [str(UNROLLED)], make), threads, address, own, rounds, times)
    )


def _best(kernel: store.Kernel, threads: int, *words: int) -> float:
    """The shortest of several runs of a kernel of `peaks` on a frame of these words, in seconds."""
    sums = torch.zeros(threads + 1, LINE, dtype=torch.uint8)
    frame = array("q", [*words, sums.data_ptr()]).tobytes()
    return best(lambda: team.run(kernel, frame, threads), 0.06)


def best(function: Callable[[], Any], budget: float, least: int = 4) -> float:
    """The shortest of several runs, in seconds; the first is not counted."""
    function()
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


@lru_cache
def caches() -> tuple[tuple[str, int], ...]:
    """(name, bytes) of the levels of data cache that a core sees, smallest first; empty where the system hides them."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in "KMG":
            found.append((f"L{level}", int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]))
    return tuple(sorted(found, key=lambda c: c[1]))


def level(size: int) -> str:
    """The smallest level of cache that holds so many bytes."""
    names = [name for name, capacity in caches() if size <= capacity]
    return names[0] if names else "memory" if caches() else "its level"


@contextmanager
def using_threads(threads: int) -> Iterator[None]:
    """Torch's number of threads within the block."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)
