"""What the machine can do: the peak of multiply-adds, and the bandwidth of its levels of cache, as measured here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .cpu import engine, team


def peak_flops(dtype: torch.dtype, threads: int) -> float:
    """Floating-point operations a second in large matrix products: the better of torch's and the engine's."""
    return max(_peak_flops(dtype, n) for n in {1, threads})  # on a busy machine one thread may do more than a team


def _peak_flops(dtype: torch.dtype, threads: int) -> float:
    n = 384
    with using_threads(threads):
        a, b, out = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype), torch.empty(n, n, dtype=dtype)

        def ours() -> None:
            engine.arena.reset()
            start = engine.zeros(n * out.element_size())
            engine.product(a[None], b, out[None], start, threads=team.size())

        candidates: list[Callable[[], Any]] = [lambda: torch.mm(a, b, out=out)]
        if dtype in engine.DTYPES:
            candidates.append(ours)
        return 2 * n**3 / min(best(f, 0.06) for f in candidates)


def bandwidth(size: int, threads: int) -> float:
    """Bytes a second that `threads` threads together read, each going through `size` bytes again and again."""
    return max(_bandwidth(size, n) for n in {1, threads})


def _bandwidth(size: int, threads: int) -> float:
    numbers = max(size, 4096) // 4
    passes = max(8 * threads, (1 << 24) // (4 * numbers))
    with using_threads(threads):
        again = torch.zeros(numbers).expand(passes, -1)  # the same memory at each pass
        sums = torch.empty(passes)
        return 4 * numbers * passes / best(lambda: torch.sum(again, 1, out=sums), 0.06)


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
