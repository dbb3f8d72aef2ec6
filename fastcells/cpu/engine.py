"""Running programs on tensors: frames, panels and kernel calls. Shapes, dtypes and strides are the caller's promise."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..expression import leaf
from ..plan import ROW_BLOCK, depth_block, share
from ..program import Place, Program, Segment, Stage, Weights
from . import store, team
from .geometry import HEADER, STAGE_WORDS, Layout, scratch_row_bytes, tile_shape
from .host import host

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class Times:
    """Positions of the time steps in processing order, and how many sequences each one has.

    Padded: position first + step * delta, all rows at every step. Packed: tables of int64 (kept alive by the tensors).
    initial: position of the initial rows.
    """

    steps: int
    rows: int
    initial: int
    first: int = 0
    delta: int = 1
    positions: Tensor | None = None
    counts: Tensor | None = None


@dataclass(frozen=True)
class View:
    """A buffer as a frame sees it: address, bytes from position to position and from row to row."""

    address: int
    step: int = 0
    row: int = 0


# y = x W^T + b for any rows: the input projection, and gradients with respect to inputs.
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


class Runner:
    """A program for one number format, with its kernel loaded when first run."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.program, self.dtype = program, dtype
        self.item = dtype.itemsize
        self.lanes = host().lanes(self.item)
        self.layout = Layout(program)
        self.shapes = [tile_shape(s, host().registers, self.lanes) for s in program.stages]
        vector = self.lanes * self.item
        self.scratch_row = max(scratch_row_bytes(program, s, k, vector) for k, s in enumerate(self.shapes))
        self.line = max(
            len(seg.targets) * shape.block * vector
            for stage, shape in zip(program.stages, self.shapes, strict=True)
            for seg in stage.segments
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
        views: Mapping[str, View | tuple[View, View]],
        segments: Sequence[Sequence[tuple[int, Tensor]]],
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

        views: of every buffer (two for a "first" one: later steps', first step's). segments: (depth, panel) by stage.
        units: of every stage. slot: units between slots. skip_first: a first step's products of "before" rows are zero.
        """
        row_block = row_block or times.rows
        block = depth_block(row_block, self.line)
        depths = [sum(d for d, _ in stage) for stage in segments]
        # A team's barrier counter and partial sums, one line of cache apart.
        scratch_bytes = row_block * self.scratch_row if max(depths) > block else 0
        workspace = torch.zeros(8 + threads * (scratch_bytes // 8 + 8), dtype=torch.int64)
        tables = torch.tensor(shares, dtype=torch.int64) if shares is not None and threads > 1 else None
        words = [0] * self.layout.size
        header = (
            times.steps,
            times.rows,
            0 if tables is None else tables.data_ptr(),
            threads,
            0 if times.positions is None else times.positions.data_ptr(),
            times.first,
            times.delta,
            times.initial,
            0 if times.counts is None else times.counts.data_ptr(),
            int(split == "units"),
            workspace.data_ptr(),
            team.give_way() if threads > 1 else 0,
            row_block,
            block,
            workspace.data_ptr() + 64,
            scratch_bytes + 64,
            slot * self.item,
            int(training),
        )
        words[: len(HEADER)] = header
        for k, stage in enumerate(self.program.stages):
            skip = 0
            if skip_first:
                skip = sum(d for (d, _), s in zip(segments[k], stage.segments, strict=True) if s.rows.when == "before")
            at = self.layout.stage[k]
            words[at : at + len(STAGE_WORDS)] = units[k], skip, depths[k]
            for j, (depth, panel) in enumerate(segments[k]):
                at = self.layout.segment[k, j]
                words[at : at + 2] = depth, panel.data_ptr()
        for name, at in self.layout.buffer.items():
            view = views[name]
            for one in view if isinstance(view, tuple) else (view,):
                words[at : at + 3] = one.address, one.step, one.row
                at += 3
        frame = (ctypes.c_int64 * len(words))(*words)
        team.run(self.kernel, ctypes.addressof(frame), threads)

    def panel(
        self, weight: Tensor, stage: int, transposed: bool, offsets: Sequence[int], units: int, depth: int
    ) -> Tensor:
        """Weights packed for a segment of a stage.

        weight: [rows, columns] with unit column stride. Forward, units are rows from `offsets` (one for each gate) on
        and depth runs over columns; transposed, the other way round.
        """
        vectors = -(-units // self.lanes)
        panel = torch.empty(vectors * depth * len(offsets) * self.lanes, dtype=self.dtype)
        row = weight.stride(0) * self.item
        strides = (self.item, row) if transposed else (row, self.item)
        block = self.shapes[stage].block
        words = [panel.data_ptr(), weight.data_ptr(), units, depth, *strides, block, len(offsets)]
        words += [o * row for o in offsets]
        frame = (ctypes.c_int64 * len(words))(*words)
        _pack(self.dtype).call(ctypes.addressof(frame), 0, 1)
        return panel


@lru_cache
def _pack(dtype: torch.dtype) -> store.Kernel:
    def make():
        from .loops import make_pack

        return make_pack(DTYPES[dtype], host().lanes(dtype.itemsize))

    return store.kernel(f"pack_{DTYPES[dtype]}", [], make)


@lru_cache
def _product(dtype: torch.dtype) -> Runner:
    return Runner(PRODUCT, dtype)


def product(
    x: Tensor, weight: Tensor, out: Tensor, start: Tensor | None, *, transposed: bool = False, threads: int = 1
) -> None:
    """out = start + x @ weight.T, or start + x @ weight if transposed, over the last dimension.

    x: [A, B, depth] and out: [A, B, units], any strides but 1 in the last dimension. start: [units], `out` itself to
    add to what it holds, or None for zero. weight: [rows, columns].
    """
    run = _product(x.dtype)
    units, depth = out.shape[-1], x.shape[-1]
    steps, rows = x.shape[:2]
    strides = [(t.stride(0), t.stride(1)) for t in (x, out)]
    if all(a == b * rows for a, b in strides):
        steps, rows = 1, steps * rows
    elif rows < steps:
        steps, rows = rows, steps
        strides = [(b, a) for a, b in strides]
    views = {
        name: View(t.data_ptr(), a * run.item, b * run.item)
        for name, t, (a, b) in zip(("x", "out"), (x, out), strides, strict=True)
    }
    if start is out:
        views["start"] = views["out"]
    else:
        start = x.new_zeros(units) if start is None else start
        views["start"] = View(start.data_ptr())
    panel = run.panel(weight, 0, transposed, [0], units, depth)
    flops = 2 * rows * units * depth
    team_size, split = share(rows, flops * steps, flops, threads)
    block = min(rows, ROW_BLOCK)
    run.run(
        Times(steps, rows, 0), views, [[(depth, panel)]], [units], threads=team_size, split=split, row_block=block
    )
