"""How much one call adds to the memory of the process at its peak. Linux only: its kernel keeps that mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Mapping
from pathlib import Path

from benchmarks.providers import Prepared
from fastcells.cpu.layer import forget

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Unmeasurable(Exception):
    """Why there is no high-water mark."""


def field(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak(prepared: Prepared) -> int:
    """Resident bytes at the peak of one call less those before it."""
    gc.collect()
    forget()  # which fastcells would use again
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # what earlier calls freed goes back to the system, so that this call has to ask for it
        trim(0)
    try:
        CLEAR.write_text("5")  # the high-water mark starts again
        before = field("VmRSS")
    except (OSError, StopIteration) as error:
        raise Unmeasurable("needs /proc/self/clear_refs of Linux") from error
    with prepared.within():
        result = prepared.call()
    after = field("VmHWM")
    del result
    return max(after - before, 4096)  # a page at least


def peaks(prepared: Mapping[str, Prepared], rounds: int = 5) -> dict[str, list[float]]:
    """Samples of each provider, in turn."""
    found: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds):
        for name, provider in prepared.items():
            found[name].append(float(peak(provider)))
    return found
