"""Large memory: on large pages, and what training keeps between its passes lent again and again.

The system clears the pages of large memory each time it gives them out, one by one as they are first written to, which
takes longer than the kernels take to fill them; large pages (MADV_HUGEPAGE) it gives out many times faster. What one
backward pass lets go is what the next forward pass needs: blocks that come back are kept, no more of them than were in
use at one time, and their pages are offered to the system (MADV_FREE), which takes them when it runs short, and till
then leaves them as they are.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 25  # bytes, up to which the C library keeps memory for the next request itself
torch.empty(LARGE - (1 << 16), dtype=torch.uint8)  # let go at once, untouched: from then on it does (malloc's dynamic
# thresholds); before, what is freed last goes back to the system from a few blocks' bytes on, to be cleared again
HUGE = getattr(mmap, "MADV_HUGEPAGE", None)
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Pool:
    """Blocks of memory: those that are lent, by their bytes, and those that came back, oldest first."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a block may come back whenever Python collects
        self._spare: list[mmap.mmap] = []
        self._lent = self._most = 0  # bytes now, and at most so far

    @property
    def spare(self) -> int:
        """Bytes of the blocks that came back."""
        return sum(map(len, self._spare))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty: the block comes back when the tensor's memory is let go."""
        count, item = torch.Size(shape).numel(), dtype.itemsize
        block = self._take(count * item)
        numbers = np.frombuffer(block, NUMPY[dtype], count)
        weakref.finalize(numbers, self._give, block).atexit = False
        return torch.from_numpy(numbers).view(shape)

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            fitting = [block for block in self._spare if size <= len(block) <= size + size // 2]
            block = min(fitting, key=len, default=None)
            if block is not None:
                self._spare.remove(block)
            self._lent += size if block is None else len(block)
            self._most = max(self._most, self._lent)
            self._limit()
        if block is None:
            try:
                block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:
                with self._lock:
                    self._lent -= size
                raise
            if HUGE is not None:
                with suppress(OSError):  # a system without them
                    block.madvise(HUGE)
        return block

    def _give(self, block: mmap.mmap) -> None:
        block.madvise(mmap.MADV_FREE)
        with self._lock:
            self._lent -= len(block)
            self._spare.append(block)
            self._limit()

    def _limit(self) -> None:
        while self._spare and self._lent + self.spare > self._most:
            del self._spare[0]

    def release(self) -> None:
        """Let go of what is not lent."""
        with self._lock:
            self._spare.clear()
            self._most = self._lent


pool = Pool()


def is_large(shape: Sequence[int], dtype: torch.dtype) -> bool:
    return torch.Size(shape).numel() * dtype.itemsize >= LARGE


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that no caller ever sees: from the pool, if it is large."""
    if not is_large(shape, dtype) or not hasattr(mmap, "MADV_FREE"):
        return torch.empty(shape, dtype=dtype)
    return pool.empty(shape, dtype)


def result(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor for a caller: as torch makes it, on large pages, if it is large."""
    tensor = torch.empty(shape, dtype=dtype)
    if HUGE is not None and is_large(shape, dtype):
        page, begin = mmap.PAGESIZE, tensor.data_ptr()
        first, end = -(-begin // page) * page, (begin + tensor.nbytes) // page * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), HUGE)  # or not, on any error
    return tensor
