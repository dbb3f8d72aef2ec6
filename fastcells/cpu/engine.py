"""Running programs on tensors: frames, panels and kernel calls. Shapes, dtypes and strides are the caller's promise."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..expression import leaf
from ..plan import ROW_BLOCK, depth_block, share
from ..program import Place, Program, Segment, Stage, Weights
from . import store, team
from .geometry import HEADER, Layout, scratch_row_bytes, tile_shape
from .host import host

DTYPES = {torch.float32: "float32", torch.float64: "float64"}
LINE = 64  # bytes of a line of cache


class Times(NamedTuple):
    """Positions of the time steps in processing order, and how many sequences each one has.

    Padded: position first + step * delta, all rows at every step. Packed: tables of int64.
    """

    steps: int
    rows: int
    first: int = 0
    delta: int = 1
    positions: Tensor | None = None
    counts: Tensor | None = None


class View(NamedTuple):
    """A buffer as a frame sees it: address, bytes from position to position and from row to row; then address, and
    bytes from row to row, of the rows that stand for the step before a sequence's first or after its last."""

    address: int
    step: int = 0
    row: int = 0
    initial: int = 0
    initial_row: int = 0


class Arena(threading.local):
    """Memory that lives only as long as a call (panels, partial sums): one block a thread, kept for the next call."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._full: list[Tensor] = []  # blocks that this call has outgrown
        self._used = 0

    def reset(self) -> None:
        """Begin a call: all that was taken is free again."""
        if self._full:
            self._full.append(self._block)
            size = sum(b.shape[0] for b in self._full)
            self._full, self._block = [], torch.empty(0, dtype=torch.uint8)  # first free, then take
            self._block = torch.empty(size, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> int:
        """Address of `size` bytes, aligned to a line of cache and a line apart from others."""
        begin = self._used
        self._used += (size + 2 * LINE - 1) // LINE * LINE
        if self._used + LINE > self._block.shape[0]:
            self._full.append(self._block)
            self._block = torch.empty(max(self._used + LINE, 1 << 16), dtype=torch.uint8)
            begin, self._used = 0, (size + 2 * LINE - 1) // LINE * LINE
        return -(-self._block.data_ptr() // LINE) * LINE + begin

    def zeros(self, size: int) -> int:
        """The same, filled with zero bytes."""
        address = self.take(size)
        ctypes.memset(address, 0, size)
        return address


arena = Arena()
_zeros = [torch.zeros(1 << 14, dtype=torch.uint8)]


def zeros(size: int) -> int:
    """Address of at least `size` zero bytes, to be read only."""
    if size > _zeros[-1].shape[0]:
        _zeros.append(torch.zeros(2 * size, dtype=torch.uint8))  # the shorter ones may be in use, and are half as long
    return _zeros[-1].data_ptr()


class Runner:
    """A program for one number format, with its kernel loaded when first run."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.program, self.dtype = program, dtype
        self.item = dtype.itemsize
        self.lanes = host().lanes(self.item)
        self.layout = Layout(program)
        self.blank = [0] * self.layout.size
        self.before = [[s.rows.when == "before" for s in stage.segments] for stage in program.stages]
        self.shapes = [tile_shape(s, host().registers, self.lanes) for s in program.stages]
        vector = self.lanes * self.item
        self.scratch_row = max(scratch_row_bytes(program, s, k, vector) for k, s in enumerate(self.shapes))
        self.line = max(
            [
                len(segment.targets) * shape.block * vector
                for stage, shape in zip(program.stages, self.shapes, strict=True)
                for segment in stage.segments
            ],
            default=vector,
        )
        self._kernel: store.Kernel | None = None

    @property
    def kernel(self) -> store.Kernel:
        if self._kernel is None:
            name = f"{self.program.name}_{DTYPES[self.dtype]}"
            self._kernel = store.kernel(name, [self.program.describe()], self._make)
        return self._kernel

    def _make(self):
        from .loops import make_recurrence

        return make_recurrence(self.program, DTYPES[self.dtype], host().registers, self.lanes)

    def run(
        self,
        times: Times,
        views: Mapping[str, View],
        segments: Sequence[Sequence[tuple[int, int]]],
        units: Sequence[int],
        *,
        slot: int = 0,
        skip_first: bool = False,
        training: bool = False,
        threads: int = 1,
        split: str = "rows",
        row_block: int | None = None,
        shares: Sequence[int] | None = None,
    ) -> None:
        """Run the program over the time steps.

        views: of every buffer. segments: (depth, address of the panel), by stage. units: of every stage. slot: units
        between slots. skip_first: at a first step, products of "before" rows are zero.
        """
        row_block = row_block or times.rows
        block = depth_block(row_block, self.line)
        words = self.blank.copy()
        at, deepest = self.layout.stage[0], 0
        for parts, before, unit in zip(segments, self.before, units, strict=True):
            depth = sum([d for d, _ in parts])
            deepest = max(deepest, depth)
            skip = sum([d for (d, _), b in zip(parts, before, strict=True) if b]) if skip_first else 0
            words[at : at + 3] = unit, skip, depth
            at += 3
        for name, at in self.layout.buffer.items():
            words[at : at + 5] = views[name]
        at = self.layout.segments
        for parts in segments:
            for part in parts:
                words[at : at + 2] = part
                at += 2
        scratch = row_block * self.scratch_row + LINE if deepest > block else 0
        tables = barrier = give_way = 0
        if threads > 1:
            barrier, give_way = arena.zeros(8), team.give_way()
            if shares is not None:
                owner = array("q", shares)
                tables = owner.buffer_info()[0]
        steps, rows, first, delta, positions, counts = times
        words[: len(HEADER)] = (
            steps,
            rows,
            tables,
            threads,
            0 if positions is None else positions.data_ptr(),
            first,
            delta,
            0 if counts is None else counts.data_ptr(),
            split == "units",
            barrier,
            give_way,
            row_block,
            block,
            arena.take(scratch * threads) if scratch else 0,
            scratch,
            slot * self.item,
            training,
        )
        frame = array("q", words)
        team.run(self.kernel, frame.buffer_info()[0], threads)

    def panel(
        self,
        weight: Tensor,
        stage: int,
        transposed: bool,
        offsets: Sequence[int],
        units: int,
        depth: int,
        threads: int = 1,
    ) -> int:
        """Address, in the arena, of weights packed for a segment of a stage.

        weight: [rows, columns] with unit column stride. Forward, units are rows from `offsets` (one for each gate) on
        and depth runs over columns; transposed, the other way round.
        """
        count = -(-units // self.lanes) * depth * len(offsets) * self.lanes
        address = arena.take(count * self.item)
        row = weight.stride(0) * self.item
        strides = (self.item, row) if transposed else (row, self.item)
        words = [address, weight.data_ptr(), units, depth, *strides, self.shapes[stage].block, len(offsets)]
        words += [o * row for o in offsets]
        frame = array("q", words)
        team.run(_pack(self.dtype), frame.buffer_info()[0], threads if count > 1 << 17 else 1)
        return address


@lru_cache
def _pack(dtype: torch.dtype) -> store.Kernel:
    def make():
        from .loops import make_pack

        return make_pack(DTYPES[dtype], host().lanes(dtype.itemsize))

    return store.kernel(f"pack_{DTYPES[dtype]}", [], make)


# y = start + x W for any rows: the input projection, and gradients with respect to inputs.
_RESULT = leaf("product")
PRODUCT = Program(
    "product",
    (
        Stage(
            "H",
            ((_RESULT, (Place("start"),)),),
            (Segment(Place("x"), Weights("w", ("all",)), (0,)),),
            ((_RESULT, Place("out"), False),),
            {},
        ),
    ),
)


@lru_cache
def _product(dtype: torch.dtype) -> Runner:
    return Runner(PRODUCT, dtype)


def product(
    x: Tensor, weight: Tensor, out: Tensor, start: int | None, *, transposed: bool = False, threads: int = 1
) -> None:
    """out = start + x @ weight.T, or start + x @ weight if transposed, over the last dimension.

    x: [A, B, depth] and out: [A, B, units], any strides but 1 in the last dimension. start: address of [units], or None
    to add to what `out` holds. weight: [rows, columns].
    """
    run = _product(x.dtype)
    units, depth = out.shape[-1], x.shape[-1]
    steps, rows = x.shape[:2]
    x_strides, out_strides = x.stride(), out.stride()
    if x_strides[0] == x_strides[1] * rows and out_strides[0] == out_strides[1] * rows:
        steps, rows = 1, steps * rows
    elif rows < steps:
        steps, rows = rows, steps
        x_strides, out_strides = (x_strides[1], x_strides[0]), (out_strides[1], out_strides[0])
    item = run.item
    target = View(out.data_ptr(), out_strides[0] * item, out_strides[1] * item)
    views = {
        "x": View(x.data_ptr(), x_strides[0] * item, x_strides[1] * item),
        "out": target,
        "start": target if start is None else View(start),
    }
    flops = 2 * rows * units * depth
    team_size, split = share(rows, flops * steps, flops, threads)
    panel = run.panel(weight, 0, transposed, [0], units, depth, team_size)
    run.run(
        Times(steps, rows),
        views,
        [[(depth, panel)]],
        [units],
        threads=team_size,
        split=split,
        row_block=min(rows, ROW_BLOCK),
    )
