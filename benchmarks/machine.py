"""The machine: what it is, how a process is pinned to some of its cores, and its roof, as `fastcells.roof` measures
it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import sleep
from typing import Any

from benchmarks.cases import Case

PART = 16 << 20  # bytes that a process may find room for in a large cache of many cores
VERSIONS = ("fastcells", "torch", "numpy", "numba", "onnxruntime", "openvino", "jax")


def cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def idlest(count: int, seconds: float = 0.3) -> list[int]:
    """Those cores of this process on which the least else is running."""

    def idle() -> dict[int, int]:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if re.match(r"cpu\d", line)]
        return {int(line[0][3:]): int(line[4]) for line in lines}

    if not Path("/proc/stat").exists():
        return cores()[:count]
    before = idle()
    sleep(seconds)
    after = idle()
    return sorted(cores(), key=lambda core: before.get(core, 0) - after.get(core, 0))[:count]


def pin(threads: int) -> None:
    """Give this process that many cores and threads. Libraries see the number only if they are imported later."""
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
        f"load {machine['load']}; Python {machine['python']}, {versions}; measured: float32 multiply-adds "
        f"{roof['gigaflops']['float32']:.0f} GFLOP/s, reading GB/s: {levels}"
    )


def roof(threads: int) -> dict[str, Any]:
    """Peaks of `threads` cores together: gigaflops by dtype, and levels of memory with size and bandwidth.

    A level is measured on what half fills it, or a process's part of it, memory on four times the last cache.
    """
    import torch

    from fastcells import roof

    caches = roof.caches() or (("L1", 32 << 10), ("L2", 1 << 20), ("L3", 32 << 20))  # where the system does not say
    sizes = [(name, size, min(size // 2, PART)) for name, size in caches]
    last = min(caches[-1][1], 64 << 20)
    levels = [
        {"name": name, "bytes": size, "gigabytes_per_s": 1e-9 * roof.bandwidth(measured, threads)}
        for name, size, measured in [*sizes, ("memory", last, 4 * last)]
    ]
    dtypes = {"float32": torch.float32, "float64": torch.float64}
    return {"gigaflops": {n: 1e-9 * roof.peak_flops(d, threads) for n, d in dtypes.items()}, "levels": levels}


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
