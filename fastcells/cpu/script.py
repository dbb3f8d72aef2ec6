"""Scripts: what a call of a layer does, written down once for its sizes and replayed with other tensors.

A script is a list of launches, each a kernel with a frame. Addresses in frames are relative to operands: the tensors of
the call, and the memory that lives only as long as the call. A replay hands the operands' addresses to one compiled
function, which fills in the frames and runs the launches, all on one team of threads.
"""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import store, team
from .frame import LAUNCH, LINE, SCRIPT


class At(NamedTuple):
    """An address: so many bytes into an operand."""

    operand: int
    offset: int = 0

    def __add__(self, offset: int) -> At:  # type: ignore[override]
        return At(self.operand, self.offset + offset)


Address = int | At
MEMORY = 0  # the operand that stands for the call's own memory
KEPT = -1  # for memory that may be kept from call to call,
KEEPS = -2  # and 1 if it is, else 0


class Arena(threading.local):
    """The memory of calls: one block a thread, kept for the next call."""

    def __init__(self) -> None:
        self._words = array("q", [0, 0])
        own = ctypes.cast(_thread_dict(), ctypes.py_object).value  # a borrowed reference
        own[KEY] = self._words.buffer_info()[0]
        self.release()

    def release(self) -> None:
        """Let go of the block."""
        self._words[0] = self._words[1] = 0
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> int:
        """Address of `size` bytes, aligned to a line of cache."""
        if size > self._words[1]:
            self.release()  # first free, then take
            self._block = torch.empty(size + LINE, dtype=torch.uint8)
            self._words[0], self._words[1] = -(-self._block.data_ptr() // LINE) * LINE, size
        return self._words[0]


KEY = "fastcells.arena"
"""Where the thread's own dict, in which Python keeps what is local to it, has the address of (address, size)."""

_thread_dict = ctypes.pythonapi.PyThreadState_GetDict
_thread_dict.restype = ctypes.c_void_p

arena = Arena()


class Memory:
    """Zeros at first, from a line of cache on; not torch's, whose threads a forked process has lost."""

    def __init__(self, size: int) -> None:
        self._block = np.zeros(size + LINE, np.uint8)
        self.address = -(-self._block.ctypes.data // LINE) * LINE


class Launch(NamedTuple):
    """label: what it is for. threads: from `first` on, so many of the team take part. wait: for what earlier launches
    do. calls: kernels that this one calls."""

    label: str
    kernel: store.Kernel
    frame: Sequence[Address]
    at: At
    first: int
    threads: int
    wait: bool
    calls: Sequence[store.Kernel]


observer: Callable[[Launch, Callable[[], None]], None] | None = None
"""Where set, launches run one by one, each handed to it with the function that runs it."""


class Script:
    """Launches in order. Built once, then run any number of times, by several threads at a time."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.threads = 1
        self._memory = self._kept = 0  # bytes
        self._keeping: Memory | None = None
        self._pack: Callable[..., bytes] | None = None
        self._owned: list[array] = []  # what the launches' frames point to

    def table(self, words: Iterable[int]) -> int:
        """Address of words that last as long as the script."""
        table = array("q", words)
        self._owned.append(table)
        return table.buffer_info()[0]

    def take(self, size: int) -> Address:
        """`size` bytes of the call's memory, on lines of cache of their own."""
        return self._take(size)

    def _take(self, size: int) -> At:
        begin = self._memory
        self._memory += -(-size // LINE) * LINE + LINE  # a line apart: large blocks do not share their sets of a cache
        return At(MEMORY, begin)

    def keep(self, size: int) -> Address:
        """The same of memory that may be kept from call to call."""
        begin = self._kept
        self._kept += -(-size // LINE) * LINE + LINE
        return At(KEPT, begin)

    def launch(
        self,
        kernel: store.Kernel,
        frame: list[Address],
        *,
        threads: int = 1,
        first: int = 0,
        wait: bool = True,
        arrivals: int | None = None,
        label: str = "",
        calls: Sequence[store.Kernel] = (),
    ) -> None:
        """Add a kernel with its frame. arrivals: the word that is to be the address of a line of zeros a thread."""
        if arrivals is not None:
            lines = -(-8 * len(frame) // LINE)
            frame = frame + [0] * ((lines + threads) * LINE // 8 - len(frame))
        at = self._take(8 * len(frame))
        if arrivals is not None:
            frame[arrivals] = at + lines * LINE
        self.launches.append(Launch(label or kernel.name, kernel, frame, at, first, threads, wait, calls))
        self.threads = max(self.threads, first + threads)

    def _finish(self, operands: int) -> Callable[..., bytes]:
        """A function that makes the driver's frame of the words that differ from call to call: the address of the
        call's memory, so many others, and KEPT and KEEPS."""
        table, count = list[int](), len(SCRIPT) + operands + 2
        kept = {KEPT: operands + 1, KEEPS: operands + 2}
        for launch in self.launches:
            words = self.table(0 if isinstance(a, At) else int(a) for a in launch.frame)
            relative = [
                (k, kept.get(a.operand, a.operand), a.offset) for k, a in enumerate(launch.frame) if isinstance(a, At)
            ]
            relocations = self.table(n for entry in relative for n in entry)
            table += [launch.kernel.address, words, len(launch.frame), relocations, len(relative), launch.at.offset]
            table += [launch.first, launch.threads, launch.wait]
        self._driver = driver()
        header: dict[str, int] = dict.fromkeys(SCRIPT[:-1], 0) | {
            "launches": len(self.launches),
            "table": self.table(table),
            "threads": self.threads,
            "team": team.size() if self.threads > 1 else 1,
            "yield": team.give_way(),
            "fastest": self.table([0, 0]),
            "arrivals": 8 * count + LINE,  # apart from what is before them
        }
        lines = LINE * (1 + self.threads) if self.threads > 1 else 0
        return partial(Struct(f"{count}q{lines}x").pack, *[header[name] for name in SCRIPT[:-1]])

    @property
    def size(self) -> int:
        """Bytes of the call's memory."""
        return self._memory

    @property
    def kept(self) -> int:
        """Bytes of what may be kept from call to call."""
        return self._kept

    def memory(self) -> Memory:
        """Memory to keep from call to call: what was made of equal tensors is then not made again."""
        return Memory(self._kept)

    def frame(self, operands: Sequence[int], memory: int, kept: Memory | None) -> bytes:
        """What the driver runs on: the addresses of the operands from number 1 on, and of `size` bytes of memory;
        where none are kept, of `kept` bytes more."""
        memories = (memory + self._memory, 0) if kept is None else (kept.address, 1)
        return self._packed(len(operands))(memory, *operands, *memories)

    def _packed(self, operands: int) -> Callable[..., bytes]:
        if self._pack is None:
            self._pack = self._finish(operands)
        return self._pack

    def run(self, operands: Sequence[int]) -> None:
        """Run on the addresses of the operands from number 1 on."""
        pack = self._packed(len(operands))
        if observer is not None:
            self._observed(pack, operands)
            return
        self._keeping = None
        memory = arena.take(self._memory + self._kept)
        frame = self.frame(operands, memory, None)
        if self.threads == 1:
            self._driver.call(frame, 0, 1)
        else:
            team.lead(self._driver, frame)

    def _observed(self, pack: Callable[..., bytes], operands: Sequence[int]) -> None:
        self._keeping = self._keeping or self.memory()  # as a call that is made again does
        frame = pack(arena.take(self._memory), *operands, self._keeping.address, 1)
        words = Struct(f"{len(frame) // 8}q")
        _, table, _, *rest = words.unpack(frame)
        for launch in self.launches:
            threads = launch.first + launch.threads
            one = words.pack(1, table, threads, *rest)
            observer(launch, lambda one=one, n=threads: team.run(self._driver, one, n))  # type: ignore[misc]
            table += 8 * len(LAUNCH)


@lru_cache(maxsize=1)
def driver() -> store.Kernel:
    """The kernel that runs a script."""

    def make():
        from .loops import make_driver

        return make_driver()

    return store.kernel("driver", [], make)


_zeros = [torch.zeros(1 << 14, dtype=torch.uint8)]


def zeros(size: int) -> int:
    """Address of at least `size` zero bytes, to be read only."""
    block = _zeros[-1]  # of this moment: another thread may make a shorter one
    if size > block.shape[0]:
        block = torch.zeros(2 * size, dtype=torch.uint8)
        _zeros.append(block)  # the shorter ones may be in use, and are half as long
    return block.data_ptr()


_ones: dict[torch.dtype, list[Tensor]] = {}


def ones(count: int, dtype: torch.dtype) -> int:
    """Address of at least `count` ones, to be read only."""
    known = _ones.setdefault(dtype, [])
    block = known[-1] if known else None
    if block is None or count > block.shape[0]:
        block = torch.ones(2 * count, dtype=dtype)
        known.append(block)
    return block.data_ptr()
