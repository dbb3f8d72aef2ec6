"""What this processor can do: read once, nothing hard-coded to one vector width."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Host:
    """cpu, features: LLVM's names. vector_bytes, registers: of the widest vectors. halves: these take as long as two of
    half the width. distant: weights come from a third-level cache more slowly than a tile multiplies by them.
    Everything that code depends on."""

    triple: str
    cpu: str
    features: str
    vector_bytes: int
    registers: int
    halves: bool = False
    distant: bool = False

    def lanes(self, item_bytes: int, units: int | None = None) -> int:
        """Numbers in the widest vectors, or in those that take so many units in the least time."""
        lanes = self.vector_bytes // item_bytes
        if units is None or not self.halves:
            return lanes
        whole, half = (-(-units // n) * n for n in (lanes, lanes // 2))
        return lanes // 2 if half <= 0.75 * whole else lanes  # twice as many instructions cost something, too


# Intel's for servers: 7 to 30 GB/s a core from the third-level cache, as measured on two, where AMD's have 75 to 115.
MESHED = ("skylake-avx512", "cascadelake", "cooperlake", "icelake-server", "sapphirerapids", "emeraldrapids")


@lru_cache
def host() -> Host:
    """The processor that kernels are compiled for. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES override what is found."""
    cpu = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if cpu == "generic" else llvm.get_host_cpu_features().flatten()
    triple = llvm.get_process_triple()
    has = set(features.split(","))
    if "+avx512f" in has:
        vector_bytes, registers = 64, 32
    elif "+avx" in has:
        vector_bytes, registers = 32, 16
    elif triple.startswith(("aarch64", "arm64")):
        vector_bytes, registers = 16, 32
    else:
        vector_bytes, registers = 16, 16
    wide = vector_bytes == 64
    return Host(
        triple, cpu, features, vector_bytes, registers, halves=wide and cpu == "znver4", distant=wide and cpu in MESHED
    )
