"""The machine: what it is, how a process is pinned to some of its cores, and its measured roof.

The compute roof is the best of several `torch.mm` of 1024 x 1024: a little below the FMA peak of the cores. The memory
roof is a compiled sum over arrays that half fill each level of cache, read again and again, by one thread a core.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from benchmarks.cases import Case

VERSIONS = ("fastcells", "torch", "numpy", "numba", "onnxruntime", "openvino", "jax")


def cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def idlest(count: int, seconds: float = 0.3) -> list[int]:
    """Those cores of this process on which the least else is running."""

    def idle() -> dict[int, int]:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line[:4] > "cpu "]
        return {int(line[0][3:]): int(line[4]) for line in lines if line[0].startswith("cpu")}

    if not Path("/proc/stat").exists():
        return cores()[:count]
    before = idle()
    sleep(seconds)
    after = idle()
    return sorted(cores(), key=lambda core: before.get(core, 0) - after.get(core, 0))[:count]


def pin(threads: int) -> None:
    """Give this process that many cores and threads. To be called before anything that starts threads is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, idlest(threads))
    for library in "OMP", "MKL", "OPENBLAS":
        os.environ[f"{library}_NUM_THREADS"] = str(threads)
    if threads == 1:  # JAX has no other way to say so; with more it takes one thread a core
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    import torch

    torch.set_num_threads(threads)


def describe(threads: int) -> dict[str, Any]:
    """The machine line, as fields."""
    from fastcells.cpu.host import host

    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    wanted = ("avx", "avx2", "fma", "avx512f", "avx512bf16", "amx-tile", "neon", "sve")
    has = set(host().features.split(","))
    return {
        "cpu": cpu_name(),
        "features": [feature for feature in wanted if f"+{feature}" in has],
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_name() -> str:
    from fastcells.cpu.host import host

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({host().cpu})"


def line(machine: dict[str, Any]) -> str:
    """The machine line, to be read."""
    roof = machine["roof"]
    levels = ", ".join(f"{level['name']} {level['gigabytes_per_s']:.0f}" for level in roof["levels"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return (
        f"{machine['cpu']}, {' '.join(machine['features'])}; {threads} of {machine['cores']} cores, "
        f"load {machine['load']}; Python {machine['python']}, {versions}; measured: float32 products "
        f"{roof['gigaflops']['float32']:.0f} GFLOP/s, reading GB/s: {levels}"
    )


def roof(threads: int) -> dict[str, Any]:
    """Peaks of `threads` cores together: gigaflops by dtype, and levels of memory with size and bandwidth."""
    return {"gigaflops": {name: gigaflops(name) for name in ("float32", "float64")}, "levels": levels(threads)}


def gigaflops(dtype: str) -> float:
    import torch

    size = 1024
    a, out = torch.ones(size, size, dtype=getattr(torch, dtype)), torch.empty(size, size, dtype=getattr(torch, dtype))
    torch.mm(a, a, out=out)
    return 2e-9 * size**3 / min(seconds(lambda: torch.mm(a, a, out=out)) for _ in range(7))


def seconds(call: Any) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def levels(threads: int) -> list[dict[str, Any]]:
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath=True)
    def read(array: np.ndarray, times: int) -> float:
        total = np.float32(0)
        for _ in range(times):
            for k in range(array.size):
                total += array[k]
            total *= np.float32(0.5)  # or the sums of all the times are one sum to the compiler
        return total  # type: ignore[return-value]

    found = []
    with ThreadPoolExecutor(threads) as pool:
        for name, size in caches():
            half = 4 * size if name == "memory" else size // 2
            arrays = [np.ones(half // 4, np.float32) for _ in range(threads)]
            times = max(1, (1 << 27) // half)
            read(arrays[0], 1)
            best = min(seconds(lambda a=arrays, n=times: list(pool.map(read, a, [n] * threads))) for _ in range(4))
            rate = 1e-9 * threads * times * arrays[0].nbytes / best
            found.append({"name": name, "bytes": size, "gigabytes_per_s": rate})
    return found


def caches() -> Iterable[tuple[str, int]]:
    """Name and size of each data cache that one core reaches, then "memory" with the size of the last."""
    sizes = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}  # where the system does not say
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "type").read_text().strip() != "Instruction":
            sizes[f"L{(index / 'level').read_text().strip()}"] = int((index / "size").read_text().strip()[:-1]) << 10
    return [*sorted(sizes.items()), ("memory", min(sizes["L3"], 64 << 20))]


def bound(case: Case, flops: float, peaks: dict[str, Any]) -> tuple[float, str]:
    """Seconds that the case must take, and which roof says so: "compute" or a level of memory.

    Every step reads the recurrent weights once at least, each core its share, from the first level that holds it.
    """
    compute = 1e-9 * flops / peaks["gigaflops"][case.dtype]
    share = case.recurrent_bytes / case.threads
    level = next((level for level in peaks["levels"][:-1] if share <= level["bytes"]), peaks["levels"][-1])
    mode = case.how
    reads = {"forward": 1, "training": 2, "backward": 1}[mode.call] * case.T * mode.layers * mode.directions
    memory = 1e-9 * reads * case.recurrent_bytes / level["gigabytes_per_s"]
    return (compute, "compute") if compute >= memory else (memory, level["name"])
