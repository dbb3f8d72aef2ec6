"""Programs on tensors: frames, panels and launches. Shapes, dtypes and strides are the caller's promise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..expression import leaf
from ..plan import AHEAD_BYTES, ROW_BLOCK, depth_part, share
from ..program import Place, Program, Segment, Stage, Weights
from . import store, team
from .frame import DIGEST_BYTES, HEADER, LINE, SEGMENT_WORDS, STAGE_WORDS, WORD, Layout, agenda_bytes, rows_bytes
from .geometry import UNROLL, Family, asking, dotted, family_of, halved, is_direct, rides, tiling_of
from .host import host
from .script import KEEPS, MEMORY, Address, At, Script, zeros

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


class Times(NamedTuple):
    """Positions of the time steps in processing order, and how many sequences each one has.

    Padded: position first + step * delta, all rows at every step. Packed: addresses of tables of int64.
    """

    steps: Address
    rows: Address
    first: int = 0
    delta: int = 1
    positions: Address = 0
    counts: Address | None = None


@dataclass(frozen=True)
class Buffer:
    """A tensor as scripts know it: where it begins, its sizes, and the bytes from one index to the next."""

    at: Address
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int

    @staticmethod
    def new(at: Address, shape: Sequence[int], item: int) -> Buffer:
        """One without gaps."""
        strides = [item]
        for size in reversed(shape[1:]):
            strides.append(strides[-1] * size)
        return Buffer(at, tuple(shape), tuple(reversed(strides)), item)

    def __getitem__(self, k: int) -> Buffer:
        return Buffer(self.at + k * self.strides[0], self.shape[1:], self.strides[1:], self.item)

    def narrow(self, dim: int, begin: int, length: int) -> Buffer:
        """`length` indices of a dimension, from `begin` on."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, at=self.at + begin * self.strides[dim], shape=shape)

    def columns(self, begin: int, length: int) -> Buffer:
        """The same of the last dimension."""
        return self.narrow(len(self.shape) - 1, begin, length)

    def turned(self) -> Buffer:
        """Rows and columns exchanged."""
        return replace(self, shape=self.shape[::-1], strides=self.strides[::-1])

    def by_time(self, leading: Sequence[int] = ()) -> Buffer:
        """[T, N, width] where `leading` is T, N; rows of all steps as one step else."""
        if len(self.shape) == 3:
            return self
        (rows, width), (row, column) = self.shape, self.strides
        steps, count = leading if len(leading) == 2 else (1, rows)
        return replace(self, shape=(steps, count, width), strides=(count * row, row, column))

    def flattened(self) -> Any:
        """[rows of all steps, width], or None where the distances do not allow it."""
        if len(self.shape) == 2:
            return self
        (steps, rows, width), (step, row, column) = self.shape, self.strides
        if steps > 1 and rows > 1 and step != rows * row:
            return None
        return replace(self, shape=(steps * rows, width), strides=(step if rows == 1 else row, column))


class View(NamedTuple):
    """A buffer as a frame sees it: address, bytes from position to position and from row to row; then address, and
    bytes from row to row, of the rows that stand for the step before a sequence's first or after its last."""

    address: Address
    step: int = 0
    row: int = 0
    initial: Address = 0
    initial_row: int = 0


class Product(NamedTuple):
    """The weights of a segment: the words of a frame that say how a tile finds them."""

    depth: int
    weights: Address = 0
    vector: int = 0
    line: int = 0
    grow: int = 0
    k: int = 0

    @property
    def packed(self) -> bool:
        """Whether a panel follows on the one before."""
        return self.line == 0


assert Product._fields == SEGMENT_WORDS


class Runner:
    """A program for one number format, with its kernel loaded when first launched."""

    def __init__(self, program: Program, dtype: torch.dtype, lanes: int) -> None:
        self.program, self.dtype = program, dtype
        self.item, self.lanes = dtype.itemsize, lanes
        self.vector = self.lanes * self.item  # bytes
        self.layout = Layout(program)
        self.before = [[s.rows.when == "before" for s in stage.segments] for stage in program.stages]
        self.tilings = [tiling_of(s, host().registers, self.lanes) for s in program.stages]
        self.direct = [is_direct(s) for s in program.stages]
        # Units to whose multiples tiles of several rows fill up each gate.
        self.grain = lanes // 2 if program.stages[0].segments and halved(self.tilings[0]) else lanes
        self.rides = rides(program, self.tilings[0]) and lanes == host().lanes(self.item)
        # Whether what one unit takes is made of others.
        self.chained = len(program.stages) > 1 or any(s.rows.when != "now" for s in program.stages[0].segments)
        self._kernel: store.Kernel | None = None

    @property
    def kernel(self) -> store.Kernel:
        if self._kernel is None:
            name = f"{self.program.name}_{DTYPES[self.dtype]}"
            self._kernel = store.kernel(name, [self.program.describe(), str(self.lanes)], self._make)
        return self._kernel

    def _make(self):
        from .loops import make_recurrence

        return make_recurrence(self.program, DTYPES[self.dtype], host().registers, self.lanes)

    def family(self, stage: int, dot: bool) -> Family | None:
        """Of a stage's tiles of several rows, where they are not this program's own."""
        of, own = self.program.stages[stage], self.direct[stage] and not dot
        return family_of(of, self.program.gates, dot) if of.segments and not own else None

    def families(self) -> list[Family]:
        """All that its stages may need."""
        found = [
            self.family(k, dot)
            for k, stage in enumerate(self.program.stages)
            for dot in (False, True)[: 1 + dotted(stage)]
        ]
        return [family for family in found if family is not None]

    def _far(self, products: Sequence[Sequence[Product]], units: Sequence[int], told: bool) -> bool:
        """Whether tiles ask for weights ahead: those of a step are more than a near cache holds. Where tiles share the
        asking, the next ones have to lie side by side, and steps of the depth to pass in pairs."""
        weight_bytes = self.item * sum(
            part.depth * len(segment.targets) * unit
            for stage, parts, unit in zip(self.program.stages, products, units, strict=True)
            for segment, part in zip(stage.segments, parts, strict=True)
        )
        pairs = all(part.packed and part.depth % UNROLL == 0 for parts in products for part in parts)
        return weight_bytes > AHEAD_BYTES and (not asking().shared or (pairs and not told))

    def _sums(self, stage: int, rows: int) -> int:
        """Bytes of the sums that products may leave."""
        tiling, count = self.tilings[stage], len(self.program.stages[stage].accumulators)
        vectors = max(rows * tiling.block, tiling.widths[0])
        return -(-vectors * count * self.vector // LINE) * LINE

    def launch(
        self,
        script: Script,
        times: Times,
        views: Mapping[str, View],
        products: Sequence[Sequence[Product]],
        units: Sequence[int],
        *,
        slot: int = 0,
        skip_first: bool = False,
        training: bool = False,
        threads: int = 1,
        first: int = 0,
        wait: bool = True,
        split: str = "rows",
        row_block: int,
        shares: Address = 0,
        dot: bool = False,
        beside: Sequence[Address] = (0,) * 5,
        depth: Address | None = None,
        several: bool = False,
        label: str = "",
    ) -> None:
        """Add to a script: the program over the time steps.

        views: of every buffer. products: of every stage. units: of every stage. slot: units between slots. skip_first:
        at a first step, products of "before" rows are zero. threads, from number `first` on, share by `split`; shares:
        address of the rows, or vectors of units, at which their shares begin, if not even. dot: weights are read as
        they are. beside: the words of HEADER on input projections of later steps, for a program that `rides`. depth: of
        the only product, where it is told at each call; no more than the product says. several: see HEADER.
        """
        assert self.rides or not beside[0], "this program's tiles do not make input projections"
        steps, rows, start, delta, positions, counts = times
        words: list[Address] = [0] * self.layout.size
        at, sums, sizes, calls = self.layout.stage[0], 0, list[tuple[int, int]](), list[store.Kernel]()
        for k, (parts, before, unit) in enumerate(zip(products, self.before, units, strict=True)):
            whole = sum([p.depth for p in parts])
            piece = whole if dot else depth_part(whole, row_block + several)
            if parts and (whole > piece or (row_block > 1 and (dot or not self.direct[k]))):
                sums = max(sums, self._sums(k, row_block))
            sizes.append((unit, -(-whole // piece) if whole else 1))
            skip = sum([p.depth for p, b in zip(parts, before, strict=True) if b]) if skip_first else 0
            family = None if rows == 1 and not several else self.family(k, dot)
            address = 0
            if family is not None:
                calls.append(tall(family, self.dtype, self.lanes))
                address = calls[-1].address
            words[at : at + len(STAGE_WORDS)] = unit, skip, whole if depth is None else depth, piece, dot, address
            at += len(STAGE_WORDS)
        for name, at in self.layout.buffer.items():
            words[at : at + 5] = views[name]
        at = self.layout.segments
        for parts in products:
            for part in parts:
                words[at : at + len(part)] = part if depth is None else (depth, *part[1:])
                at += len(part)
        agenda = agenda_bytes(self.program, self.tilings, sizes, 1 if counts is None else 3, dot)
        scratch = 2 * agenda + rows_bytes(self.program) + sums
        words[: len(HEADER)] = (
            steps,
            rows,
            shares if threads > 1 else 0,
            threads,
            positions,
            start,
            delta,
            counts or 0,
            split == "units",
            0,
            team.give_way(),
            row_block,
            script.take(scratch * threads),
            scratch,
            agenda,
            slot * self.item,
            training,
            self._far(products, units, depth is not None),
            several,
            *beside,
        )
        arrivals = WORD["arrivals"] if split == "units" and threads > 1 and self.chained else None
        script.launch(
            self.kernel, words, threads=threads, first=first, wait=wait, arrivals=arrivals, label=label, calls=calls
        )

    def panel(
        self,
        script: Script,
        weight: Buffer,
        stage: int,
        transposed: bool,
        offsets: Sequence[int],
        units: int,
        depth: int,
        threads: int = 1,
        first: int = 0,
        told: Address | None = None,
        at: Address | None = None,
        wait: bool = False,
        label: str = "",
    ) -> Product:
        """Weights packed for a segment of a stage, once whoever makes a copy of the call's own is done.

        weight: [rows, columns] with adjacent columns. Forward, units are rows from `offsets` (one for each gate) on
        and depth runs over columns; transposed, the other way round. told: the depth that there is, where that is
        told at each call; no more than `depth`. at: where to, of what is packed anew each time. wait: in any case.
        """
        gates, keeps = len(offsets), at is None
        count = self.panel_size(units, depth, gates)
        threads = threads if count > 1 << 14 else 1
        address = script.keep(count * self.item) if at is None else at
        digests = script.keep(threads * DIGEST_BYTES) if keeps else 0
        row = weight.strides[0]
        strides = (self.item, row) if transposed else (row, self.item)
        words: list[Address] = [
            address,
            weight.at,
            units,
            depth if told is None else told,
            depth,
            *strides,
            self.tilings[stage].block,
            gates,
        ]
        words += [threads, digests, At(KEEPS) if keeps else 0, *(o * row for o in offsets)]
        wait = wait or (isinstance(weight.at, At) and weight.at.operand == MEMORY)
        kernel = copying("pack", self.dtype, self.lanes)
        script.launch(kernel, words, threads=threads, first=first, wait=wait, label=label)
        return Product(depth, address, depth * gates * self.vector, 0, gates * self.vector)

    def panel_size(self, units: int, depth: int, gates: int = 1) -> int:
        """Numbers in a panel."""
        return -(-units // self.lanes) * depth * gates * self.lanes

    def readable(self, transposed: bool, units: int) -> bool:
        """Whether a tile may read such weights where they are: whole vectors of units, or dot products."""
        return not transposed or units % self.lanes == 0

    def in_place(self, weight: Buffer, transposed: bool, block: int, depth: int, k: int = 0) -> Product:
        """Weights read where they are. weight: [units of all gates, depth], or [depth, units] if transposed. block:
        units of a gate. k: bytes between the numbers of a row that meets them, where the segment is strided."""
        row = weight.strides[0]
        if transposed:
            return Product(depth, weight.at, self.vector, row, 0, k)
        return Product(depth, weight.at, self.lanes * row, row, block * row, k)


@lru_cache
def tall(family: Family, dtype: torch.dtype, lanes: int) -> store.Kernel:
    """The kernel of a family of tiles."""

    def make():
        from .tall import make_tall

        return make_tall(family, DTYPES[dtype], host().registers, lanes)

    return store.kernel(f"{family.name}_{DTYPES[dtype]}", [repr(family), str(lanes)], make)


@lru_cache
def copying(name: str, dtype: torch.dtype, lanes: int) -> store.Kernel:
    """A kernel of `copies`: "pack" or "turn"."""

    def make():
        from . import copies

        return getattr(copies, f"make_{name}")(DTYPES[dtype], lanes)

    return store.kernel(f"{name}_{DTYPES[dtype]}", [str(lanes)], make)


# ---- plain linear algebra, of the same tiles ----
_RESULT = leaf("product")
PRODUCT = Program(
    "product",
    (
        Stage(
            "H",
            ((_RESULT, (Place("start"),)),),
            (Segment(Place("x"), Weights("w", ("all",)), (0,), strided=True),),
            ((_RESULT, Place("out"), False),),
            {},
        ),
    ),
    ("all",),
)
_SUM = leaf("sum")
SUM = Program("sum", (Stage("H", ((_SUM, (Place("a"), Place("b"))),), (), ((_SUM, Place("out"), False),), {}),), ())


@lru_cache
def plain(dtype: torch.dtype) -> tuple[Runner, Runner]:
    """The runners of PRODUCT and SUM."""
    lanes = host().lanes(dtype.itemsize)
    return Runner(PRODUCT, dtype, lanes), Runner(SUM, dtype, lanes)


def add(
    script: Script,
    dtype: torch.dtype,
    out: Buffer,
    a: Buffer | None,
    b: Buffer | None = None,
    count: Address | None = None,
    **options: Any,
) -> None:
    """out = a + b over [rows, units] or [steps, rows, units]; None stands for zeros. count: rows of the only step,
    where it is told at each call."""
    _, run = plain(dtype)
    steps, rows, units = out.by_time().shape

    def view(t: Buffer | None) -> View:
        return View(zeros(units * run.item)) if t is None else View(t.at, *t.by_time().strides[:2])

    views = {"a": view(a), "b": view(b), "out": view(out)}
    times = Times(steps, rows if count is None else count)
    run.launch(script, times, views, [[]], [units], row_block=rows, **options)


def turn(
    script: Script, dtype: torch.dtype, out: Buffer, source: Buffer, told: Address | None = None, **options: Any
) -> None:
    """out = source.T. out: rows with room for whole vectors. told: rows of the source, where that is told at each
    call."""
    rows, columns = source.shape
    words = [out.at, out.strides[0], source.at, source.strides[0], rows if told is None else told, columns]
    script.launch(copying("turn", dtype, host().lanes(dtype.itemsize)), words, **options)


def product(
    script: Script,
    dtype: torch.dtype,
    x: Buffer,
    weight: Buffer | Product,
    out: Buffer,
    start: Address | None,
    *,
    transposed: bool = False,
    threads: int = 1,
    shares: Address = 0,
    split: str = "rows",
    pack: bool = True,
    wait: bool = True,
    first: int = 0,
    row_block: int = ROW_BLOCK,
    count: Address | None = None,
    told: Address | None = None,
    several: bool = False,
    label: str = "",
) -> None:
    """out = start + x @ weight.T, or start + x @ weight if transposed, over the last dimension.

    x: [A, B, depth], any strides. out: [A, B, units] with adjacent units. start: address of [units], or None to add to
    what `out` holds. weight: [rows, columns] with adjacent columns, or what `panel` made of it. threads: at most; with
    `shares` so many, and they share by `split` (see `launch`). pack: whether the weights are packed first; not to needs
    `transposed`, or adjacent numbers in rows of x, for dot products. wait: for what earlier launches do. count, told:
    rows of x and out, which have one step then, and depth, where they are told at each call: no more than the buffers
    say. several: see `launch`.
    """
    run, _ = plain(dtype)
    units, depth = out.shape[-1], x.shape[-1]
    (steps, rows), x_strides, out_strides = x.shape[:2], x.strides, out.strides
    if x_strides[0] == x_strides[1] * rows and out_strides[0] == out_strides[1] * rows:
        steps, rows = 1, steps * rows
    elif rows < steps:
        steps, rows = rows, steps
        x_strides, out_strides = (x_strides[1], x_strides[0], x_strides[2]), (out_strides[1], out_strides[0])
    target = View(out.at, *out_strides[:2])
    views = {
        "x": View(x.at, *x_strides[:2]),
        "out": target,
        "start": target if start is None else View(start),
    }
    if not shares:
        flops, weight_bytes = 2 * rows * units * depth * steps, units * depth * dtype.itemsize
        threads, split = share(rows, flops, threads, units=units, weight_bytes=weight_bytes)
    dot = False
    if isinstance(weight, Product):
        weights = weight
    elif pack or not run.readable(transposed, units):
        weights, wait = run.panel(script, weight, 0, transposed, [0], units, depth, threads, told=told), True
    else:
        weights, dot = run.in_place(weight, transposed, units, depth), not transposed
    run.launch(
        script,
        Times(steps, rows if count is None else count),
        views,
        [[weights._replace(k=x_strides[2])]],
        [units],
        depth=told,
        threads=threads,
        first=first,
        split=split,
        shares=shares,
        row_block=min(rows, row_block),
        dot=dot,
        wait=wait,
        several=several,
        label=label,
    )
