"""The profile of one layer: its speed, its limits, and where its time goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..cpu import layer as cpu
from ..cpu import script, store
from ..dropin import DropIn
from ..explain import examined
from ..functional import DTYPES
from ..plan import Plan
from ..roof import bandwidth, level, peak_flops
from .calls import step
from .timing import Timing, clock, take_apart
from .words import compiled, duration, plural, quantity, table


@dataclass(frozen=True)
class Roof:
    """What a call could take at best.

    flops: of all products of the call. bytes: of weights that the time steps read. peak: operations a second.
    bandwidth: bytes a second. working_set: bytes that a thread goes through at each step, which live in `level`.
    """

    flops: float
    bytes: float
    peak: float
    bandwidth: float
    working_set: int
    level: str

    @property
    def seconds(self) -> float:
        return max(self.flops / self.peak, self.bytes / self.bandwidth)

    @property
    def binds(self) -> str:
        return "peak" if self.flops / self.peak >= self.bytes / self.bandwidth else "bandwidth"


@dataclass(frozen=True)
class LayerProfile:
    """One recurrent layer (or stack of layers, as its module is) called with one input."""

    layer: str
    dtype: str
    threads: int
    train: bool
    steps: int
    sequences: int
    tokens: int  # time steps of all sequences
    cells: int  # layers times directions
    timing: Timing
    first_call: float  # seconds, with the compiling or loading of kernels
    roof: Roof
    route: str
    reasons: tuple[str, ...]
    kernels: dict[str, float]  # seconds that each took this process to compile, 0 where it was stored
    rate: float | None  # time steps of the signal a second

    @property
    def cell_steps_per_second(self) -> float:
        """Updates of one cell for one sequence."""
        return self.tokens * self.cells / self.timing.best

    @property
    def sequences_per_second(self) -> float:
        return self.sequences / self.timing.best

    @property
    def flops_per_second(self) -> float:
        return self.roof.flops / self.timing.best

    @property
    def share_of_roof(self) -> float:
        return self.roof.seconds / self.timing.best

    @property
    def times_real_time(self) -> float | None:
        """Seconds of signal, in each of the sequences, that a second of computing takes in."""
        return None if self.rate is None else self.steps / self.rate / self.timing.best

    def to_dict(self) -> dict[str, Any]:
        """Everything, as numbers and strings: seconds, bytes, operations."""
        return {
            **{k: v for k, v in asdict(self).items() if k not in ("timing", "roof")},
            "reasons": list(self.reasons),
            "seconds": self.timing.best,
            "median_seconds": self.timing.median,
            "rounds": self.timing.rounds,
            "parts": dict(self.timing.parts),
            "sum_of_parts": self.timing.sum_of_parts,
            "cell_steps_per_second": self.cell_steps_per_second,
            "sequences_per_second": self.sequences_per_second,
            "flops_per_second": self.flops_per_second,
            "share_of_roof": self.share_of_roof,
            "times_real_time": self.times_real_time,
            "roof": {**asdict(self.roof), "seconds": self.roof.seconds, "binds": self.roof.binds},
        }

    def __str__(self) -> str:
        t = self.timing
        mode = "forward and backward" if self.train else "inference"
        lines = [
            f"{self.layer}, {plural(self.steps, 'step')}, {plural(self.sequences, 'sequence')}, {self.dtype}, "
            f"{plural(self.threads, 'thread')}, {mode}",
            "",
            *table(
                [
                    ("time", f"{duration(t.best)} best, {duration(t.median)} median of {t.rounds}"),
                    ("cell steps", f"{quantity(self.cell_steps_per_second)}/s"),
                    ("sequences", f"{quantity(self.sequences_per_second)}/s"),
                    ("operations", f"{quantity(self.flops_per_second)}FLOP/s"),
                    ("share of the roof", f"{self.share_of_roof:.0%}, {self._limit()}"),
                    *([("real time", f"{self.times_real_time:,.1f} times, at {self.rate:g} Hz")] if self.rate else []),
                ]
            ),
            "",
            "where the time goes",
            *table(
                [(f"  {name}", f"{duration(s):>10}", f"{s / t.sum_of_parts:5.1%}") for name, s in t.parts.items()]
                + [("  sum", f"{duration(t.sum_of_parts):>10}", f"{t.sum_of_parts / t.best:.1%} of the whole")]
            ),
            "",
            f"schedule: {self.route}",
            *(f"  {reason}" for reason in self.reasons),
            "",
            f"kernels (first call {duration(self.first_call)})",
            *([] if self.kernels else ["  none"]),
            *table([(f"  {name}", compiled(seconds)) for name, seconds in self.kernels.items()]),
        ]
        return "\n".join(lines)

    def _limit(self) -> str:
        busy = " (the machine was too busy to measure it well)" if self.share_of_roof > 1 else ""
        if self.roof.binds == "peak":
            return f"which is the peak of multiply-adds, {quantity(self.roof.peak)}FLOP/s{busy}"
        return (
            f"which is the bandwidth of {self.roof.level}, {quantity(self.roof.bandwidth)}B/s{busy}, "
            f"where {quantity(self.roof.working_set, 1024)}B of weights are read at every step"
        )


def profile_layer(
    module: DropIn,
    input: Any,
    hx: Any = None,
    *,
    train: bool = False,
    rate: float | None = None,
    budget: float = 1.5,
    **options: Any,
) -> LayerProfile:
    """Profile `module(input, hx, **options)`, a layer or cell of `fastcells.nn`, on torch's current number of threads.

    train: forward and backward, with gradients of the parameters and the input. rate: time steps of the signal a
    second. budget: seconds for measuring (at least five rounds are taken). options: of the module's call, such as
    lengths. Raises TypeError for other modules.
    """
    if not isinstance(module, DropIn):
        raise TypeError(f"module must be a layer or cell of fastcells.nn, got {type(module).__name__}")
    call = step(module, (input,) if hx is None else (input, hx), options, train)
    began = clock()
    call()
    first_call = clock() - began
    with torch.set_grad_enabled(train):
        explained = examined(module, input, hx, options)
    batch = module._batch(explained.input)
    sequences = explained.layers[0].sequences if explained.layers else cpu.Sequences(batch.x, batch.batch_sizes)
    dtype = batch.x.dtype
    computed = dtype if dtype in DTYPES else torch.float32  # as halves are
    schedule, before = _roof(module, computed, sequences, train)
    timing = take_apart(call, schedule.forward.split == "units", budget)
    _, roof = _roof(module, computed, sequences, train)  # both sides of the timing, as other load comes and goes
    roof = replace(roof, peak=max(before.peak, roof.peak), bandwidth=max(before.bandwidth, roof.bandwidth))
    return LayerProfile(
        layer=repr(module),
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        train=train,
        steps=sequences.steps,
        sequences=sequences.rows,
        tokens=sequences.total,
        cells=sum(len(directions) for directions in _shapes(module)),
        timing=timing,
        first_call=first_call,
        roof=roof,
        route=explained.route,
        reasons=explained.reasons,
        kernels={k.name: k.compiled for k in _kernels(call)},
        rate=rate,
    )


def _shapes(module: DropIn) -> tuple:
    return module._weight_shapes(len(module._cell().gates))


def _kernels(call: Callable[[], Any]) -> list[store.Kernel]:
    """The kernels that a call runs."""
    used: dict[str, store.Kernel] = {}

    def note(launch: script.Launch, run: Callable[[], None]) -> None:
        used.update({kernel.name: kernel for kernel in (launch.kernel, *launch.calls)})
        run()

    script.observer = note
    try:
        call()
    finally:
        script.observer = None
    return list(used.values())


def _roof(module: DropIn, dtype: torch.dtype, sequences: cpu.Sequences, train: bool) -> tuple[Plan, Roof]:
    """The schedule of the first layer, and the limits of a call."""
    cell, item = module._cell(), dtype.itemsize
    flops = moved = 0.0
    working_set, schedules = 0, []
    for directions in _shapes(module):
        for (_, ih), recurrent, _, _, hr, *_ in directions:
            hh = recurrent[1] if recurrent else None  # a cell may have no recurrent products
            weights = tuple(None if s is None else torch.empty(s, dtype=dtype, device="meta") for s in (ih, hh))
            schedule = cpu.planned(cell, weights, sequences, len(directions), train)
            schedules.append(schedule)
            input_weights, own = math.prod(ih), sum(math.prod(s) for s in (hh, hr and hr[1]) if s)
            flops += 2 * sequences.total * (input_weights + own)
            step = (own if schedule.project_ahead else own + input_weights) * item
            once = input_weights * item if schedule.project_ahead else 0
            # Threads that share the rows each read all weights, once for every block of rows.
            threads, split = schedule.forward
            readers = threads if split == "rows" else 1
            blocks = math.ceil(sequences.rows / readers / schedule.row_block)
            moved += once + sequences.steps * step * readers * blocks
            working_set = max(working_set, step if split == "rows" else step // threads)
    if train:  # backward has each product twice: for the gradient of its rows and of its weights
        flops, moved = 3 * flops, 2 * moved
    threads = cpu.threads()
    return schedules[0], Roof(
        flops,
        moved,
        peak_flops(dtype, threads),
        bandwidth(working_set, schedules[0].forward.threads),
        working_set,
        level(working_set),
    )
