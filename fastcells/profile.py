"""How fast a recurrent layer runs, how near it comes to what the machine can do, and where its time goes.

Measured in one process: runs of the layer alternate with runs in which the engine's calls are timed one by one, and
with runs that leave out a product, which say what it costs inside a fused kernel. The best run of each kind counts,
since on a shared machine noise only ever adds. What the whole takes beyond the engine's calls is torch and Python: so
the parts sum to the whole, and what the watching costs is in none of them. Two limits make the roof (Williams, Waterman
& Patterson 2009): the peak of fused multiply-adds, and the bandwidth of the level of cache that holds the recurrent
weights, which every time step reads.

The engine's functions are replaced while the calls are timed, so nothing else should run layers at that time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn as original
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

from .convert import convert, revert
from .cpu import engine, script, store
from .cpu import layer as cpu
from .dropin import DropIn
from .explain import explain
from .plan import Plan
from .ragged import Ragged
from .roof import bandwidth, best, level, peak_flops, using_threads

INPUT, PRODUCT, POINTWISE, BARRIER = "input projection", "recurrent product", "pointwise", "barrier"
BACK_PRODUCT, BACK_POINTWISE = "backward recurrent product", "backward pointwise"
INPUT_GRADIENT, WEIGHT_GRADIENTS = "input gradient", "weight gradients"
PACKING, COPIES, REST = "packing of weights", "biases and final states", "torch and Python"
PARTS = (
    INPUT,
    PRODUCT,
    POINTWISE,
    BACK_PRODUCT,
    BACK_POINTWISE,
    BARRIER,
    INPUT_GRADIENT,
    WEIGHT_GRADIENTS,
    PACKING,
    COPIES,
    REST,
)

SAMPLE = 1e-3  # seconds that a sample takes at least; shorter calls are repeated
ROUNDS = 5  # at least

clock = time.perf_counter


# ---- where the time goes ----
class Watch:
    """Seconds inside wrapped functions by label, each without those of wrapped functions that it calls.

    Functions stay wrapped whether the watch is on or off: to exchange them at every sample would undo what Python's
    interpreter has specialised, and cost more than is measured.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.on = False
        self.leave_out: Callable[[str], bool] | None = None  # the buffers whose products the time loops do not take
        self._open: list[tuple[str, list[float]]] = []  # label, seconds of each inner call

    def wrap(self, function: Callable, label: Callable[..., str]) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            name, inner = frame = label(*args), list[float]()
            self._open.append(frame)
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                took = clock() - began
                self._open.pop()
                self.seconds[name] += took - sum(inner)
                if self._open:
                    self._open[-1][1].append(took)

        return timed

    def take(self, leave_out: Callable[[str], bool] | None) -> bool:
        """Choose the products that are left out; whether that is a change, so that calls are prepared anew."""
        changed = leave_out is not self.leave_out
        if changed:
            cpu.forget()
        self.leave_out = leave_out
        return changed

    def reset(self, on: bool) -> None:
        self.seconds.clear()
        self.on = on
        script.observer = self.launch if on else None

    def launch(self, launch: script.Launch, run: Callable[[], None]) -> None:
        """Run a launch, timed as the part that it belongs to."""
        self.wrap(run, lambda: self._part(launch))()

    @staticmethod
    def _part(launch: script.Launch) -> str:
        if launch.label in PARTS:
            return launch.label
        if launch.label.startswith("pack_"):
            return PACKING
        if "_forward_" in launch.label:
            return PRODUCT
        return BACK_PRODUCT if "_backward_" in launch.label else COPIES


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """The engine's functions are wrapped within the block."""
    launch = engine.Runner.launch

    def without(self: engine.Runner, script: Any, times: Any, views: Any, products: Any, *args: Any, **kw: Any) -> None:
        leave_out = watch.leave_out
        if leave_out is not None and self.program is not engine.PRODUCT:
            products = [
                [engine.Product(0) if leave_out(s.rows.buffer) else p for p, s in zip(row, of.segments, strict=True)]
                for row, of in zip(products, self.program.stages, strict=True)
            ]
        launch(self, script, times, views, products, *args, **kw)

    engine.Runner.launch = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.Runner.launch = launch  # type: ignore[method-assign]
        script.observer = None
        cpu.forget()


@dataclass(frozen=True)
class Timing:
    """best, median: seconds of a call, of `rounds` samples. parts: seconds by part, in the order of `PARTS`, which sum
    to the best."""

    best: float
    median: float
    rounds: int
    parts: dict[str, float]

    @property
    def sum_of_parts(self) -> float:
        return sum(self.parts.values())


def take_apart(call: Callable[[], Any], units_shared: bool, budget: float = 1.5) -> Timing:
    """Time `call` and its parts. units_shared: threads wait for each other at every step."""
    call()
    began = clock()
    call()
    repeats = max(1, math.ceil(SAMPLE / max(clock() - began, 1e-9)))
    threads = torch.get_num_threads()
    alone = 1 if units_shared else threads  # what a product costs is seen without waiting

    watch = Watch()

    def sample(
        threads: int, on: bool, leave_out: Callable[[str], bool] | None = None
    ) -> tuple[float, dict[str, float]]:
        """Seconds of a call, and of the engine's calls within."""
        with using_threads(threads):
            if watch.take(leave_out):
                watch.reset(on=False)
                for _ in range(3):  # from then on it is made again
                    call()
            watch.reset(on)
            began = clock()
            for _ in range(repeats):
                call()
            took = clock() - began
        return took / repeats, {name: s / repeats for name, s in watch.seconds.items()}

    whole: list[float] = []
    found: list[dict[str, float]] = []
    left_out: dict[str, Callable[[str], bool] | None] = {
        "all": None,
        "no x": lambda b: b == "x",
        "none": lambda b: True,
    }
    ablated: dict[str, list[dict[str, float]]] = {name: [] for name in left_out}
    begin = clock()
    with watching(watch):
        while len(whole) < ROUNDS or clock() - begin < budget:
            whole.append(sample(threads, on=False)[0])
            found.append(sample(threads, on=True)[1])
            for name, leave_out in left_out.items():
                if len(whole) <= 2 * ROUNDS:  # then known well enough
                    ablated[name].append(sample(alone, True, leave_out)[1])

    parts = min(found, key=lambda f: sum(f.values()))
    inside = sum(parts.values())
    total = max(min(whole), inside)  # a whole that is less than its parts is one of a quieter moment
    seconds = defaultdict(float, parts)
    seconds[REST] = total - inside
    least = {
        name: {label: min(p.get(label, 0.0) for p in found) for label in (PRODUCT, BACK_PRODUCT)}
        for name, found in ablated.items()
    }
    for label, pointwise in ((PRODUCT, POINTWISE), (BACK_PRODUCT, BACK_POINTWISE)):
        kernel, full = seconds.pop(label, 0.0), least["all"][label]
        if not full:
            continue
        if units_shared:
            waiting = min(max(0.0, kernel - full / threads), kernel)
            seconds[BARRIER] += waiting
            kernel -= waiting
        epilogue = min(1.0, least["none"][label] / full)
        fused = min(max(0.0, 1 - least["no x"][label] / full), 1 - epilogue)
        seconds[pointwise] += epilogue * kernel
        seconds[INPUT] += fused * kernel
        seconds[label] += (1 - epilogue - fused) * kernel
    parts = {name: seconds[name] for name in PARTS if seconds[name] > 0}
    return Timing(total, max(total, statistics.median(whole)), len(whole), parts)


# ---- one layer ----
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
        explained = explain(module, as_run(module, input, **options), None if options else hx)
    batch = module._batch(as_run(module, input, **options))
    sequences = cpu.Sequences(batch.x, batch.batch_sizes)
    schedule, before = _roof(module, batch.x.dtype, sequences, train)
    timing = take_apart(call, schedule.forward.split == "units", budget)
    _, roof = _roof(module, batch.x.dtype, sequences, train)  # both sides of the timing, as other load comes and goes
    roof = replace(roof, peak=max(before.peak, roof.peak), bandwidth=max(before.bandwidth, roof.bandwidth))
    return LayerProfile(
        layer=repr(module),
        dtype=str(batch.x.dtype).removeprefix("torch."),
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


def as_run(module: DropIn, input: Any, lengths: Any = None, reset: Any = None, **_: Any) -> Any:
    """The input as the engine is given it: padded sequences with lengths or resets are packed first."""
    if lengths is None and reset is None:
        return input
    first = bool(module.batch_first)
    steps, size = (input.shape[1], input.shape[0]) if first else input.shape[:2]
    ragged = Ragged(steps, size, lengths, reset, batch_first=first)
    return input if ragged.whole else PackedSequence(ragged.pack(input), ragged.batch_sizes)


def _shapes(module: DropIn) -> tuple:
    return module._weight_shapes(len(module._cell().gates))


def _kernels(call: Callable[[], Any]) -> list[store.Kernel]:
    """The kernels that a call runs."""
    used: dict[str, store.Kernel] = {}

    def note(launch: script.Launch, run: Callable[[], None]) -> None:
        used[launch.kernel.name] = launch.kernel
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
            schedule = cpu.planned(cell, weights, sequences, len(directions))
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
    threads = torch.get_num_threads()
    return schedules[0], Roof(
        flops,
        moved,
        peak_flops(dtype, threads),
        bandwidth(working_set, schedules[0].forward.threads),
        working_set,
        level(working_set),
    )


def step(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: bool) -> Callable[[], Any]:
    """A function that runs the module once: forward without gradients, or forward and backward from random ones."""
    if not train:

        def infer() -> Any:
            with torch.no_grad():
                return module(*args, **kwargs)

        return infer

    def leaf(value: Tensor) -> Tensor:
        return value.detach().requires_grad_() if value.is_floating_point() else value

    args, kwargs = _map(leaf, tuple(args)), _map(leaf, dict(kwargs))
    leaves = [t for t in _tensors((args, kwargs)) if t.requires_grad]
    cotangents: list[Tensor] = []

    def train_step() -> Any:
        with torch.enable_grad():
            found = module(*args, **kwargs)
            outputs = [t for t in _tensors(found) if t.requires_grad]
            if len(cotangents) != len(outputs):
                cotangents[:] = [torch.randn_like(t) for t in outputs]
            wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
            return torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)

    return train_step


def _map(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """The same structure with each tensor replaced; of packed sequences, the data."""

    def leaf(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            return PackedSequence(function(value.data), *value[1:])
        return function(value) if isinstance(value, Tensor) else value

    return tree_map(leaf, values, is_leaf=lambda v: isinstance(v, PackedSequence))


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in a structure; of packed sequences, the data."""
    leaves = tree_leaves(values, is_leaf=lambda v: isinstance(v, PackedSequence))
    return [t for t in (v.data if isinstance(v, PackedSequence) else v for v in leaves) if isinstance(t, Tensor)]


# ---- a model ----
@dataclass(frozen=True)
class Row:
    """A recurrent layer of a model. calls: in one run of the model; seconds are of one call, with what the first one
    was given. before: with torch.nn, None where it has no such layer. after: with fastcells, None where the layer stays
    as it is, which `note` tells."""

    name: str
    calls: int
    before: float | None
    after: LayerProfile | None
    note: str

    @property
    def ratio(self) -> float | None:
        return None if self.after is None or self.before is None else self.before / self.after.timing.best


@dataclass(frozen=True)
class Report:
    """Profile of a model: a row for each recurrent layer that it runs; seconds of the whole before and after."""

    rows: tuple[Row, ...]
    before: float
    after: float
    train: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything, as numbers and strings."""
        rows = [
            {
                **{k: getattr(r, k) for k in ("name", "calls", "before", "note", "ratio")},
                "after": r.after and r.after.to_dict(),
            }
            for r in self.rows
        ]
        return {"rows": rows, "before": self.before, "after": self.after, "train": self.train}

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "calls", "torch.nn", "fastcells", "ratio", "roof", "most time in")]
        for r in self.rows:
            name = r.name or "(the model)"
            before = "-" if r.before is None else duration(r.before)
            if r.after is None:
                lines.append((name, str(r.calls), before, "-", "-", "-", r.note))
                continue
            parts = r.after.timing.parts
            most = max(parts, key=lambda p: parts[p])
            lines.append(
                (
                    name,
                    str(r.calls),
                    before,
                    duration(r.after.timing.best),
                    "-" if r.ratio is None else f"{r.ratio:.2f}",
                    f"{r.after.share_of_roof:.0%}",
                    f"{most}, {parts[most] / r.after.timing.sum_of_parts:.0%}" if not r.note else r.note,
                )
            )
        ratio = f"{self.before / self.after:.2f}"
        lines.append(("the model", "1", duration(self.before), duration(self.after), ratio, "", ""))
        return "\n".join(line.rstrip() for line in table(lines))


def profile(model: torch.nn.Module, *inputs: Any, train: bool = False, budget: float = 1.0) -> Report:
    """Profile every recurrent layer that `model(*inputs)` runs, before and after `fastcells.convert`.

    train: forward and backward, else forward without gradients. budget: seconds of measuring for each layer, about.
    The model runs several times in the mode it is in (buffers such as running means move on); its layers' classes and
    the random generator are afterwards as they were. Raises TypeError if `model` is not a torch.nn.Module, ValueError
    if it runs no recurrent layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kinds = original.RNNBase, original.RNNCellBase, DropIn
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    classes = {name: module.__class__ for name, module in layers.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            revert(model)
            theirs = {name: module.__class__ for name, module in layers.items()}
            seen = _calls(layers, step(model, inputs, {}, train))
            if not seen:
                raise ValueError("model must run at least one recurrent layer of torch.nn or fastcells")
            left = convert(model).left
            ours = {name: module.__class__ for name, module in layers.items()}
            rows = []
            for name, (calls, args, kwargs) in seen.items():
                module = layers[name]
                own = theirs[name] is ours[name]  # no other layer to set it beside
                if not isinstance(module, DropIn):
                    before = best(step(module, args, kwargs, train), budget / 4)
                    rows.append(Row(name, calls, before, None, left.get(name, "not a layer that convert knows")))
                    continue
                times = []
                for moment in range(2):  # before and after, as other load comes and goes
                    if not own:
                        set_class(module, theirs[name])
                        times.append(best(step(module, args, kwargs, train), budget / 8))
                        set_class(module, ours[name])
                    if moment == 0:
                        after = profile_layer(module, *args, train=train, budget=budget, **kwargs)
                note = after.reasons[0] if after.route == "torch" else ""
                rows.append(Row(name, calls, min(times, default=None), after, note))
            whole: dict[str, float] = {}
            call = step(model, inputs, {}, train)
            for _ in range(2):
                for kind, chosen in (("before", theirs), ("after", ours)):
                    for name, module in layers.items():
                        set_class(module, chosen[name])
                    whole[kind] = min(whole.get(kind, math.inf), best(call, budget / 8, least=2))
        finally:
            for name, module in layers.items():
                set_class(module, classes[name])
    return Report(tuple(rows), whole["before"], whole["after"], train)


def set_class(module: torch.nn.Module, kind: type) -> None:
    """What `convert` and `revert` do to a layer."""
    module.__class__ = kind


def _calls(layers: Mapping[str, torch.nn.Module], call: Callable[[], Any]) -> dict[str, tuple[int, tuple, dict]]:
    """(calls, arguments of the first one) of every layer that `call` runs."""
    seen: dict[str, tuple[int, tuple, dict]] = {}

    def hook(name: str) -> Callable:
        def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            calls, *first = seen.get(name, (0, *_map(Tensor.detach, (args, kwargs))))
            seen[name] = (calls + 1, *first)

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


# ---- words for numbers ----
def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def quantity(value: float, base: int = 1000) -> str:
    """With a prefix: 12.3 G; the unit follows."""
    prefixes = ("", "k", "M", "G", "T") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    k = 0
    while value >= base and k < len(prefixes) - 1:
        value, k = value / base, k + 1
    return f"{value:.3g} {prefixes[k]}" if value < 1000 else f"{value:.0f} {prefixes[k]}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def compiled(seconds: float) -> str:
    return f"compiled in {duration(seconds)}" if seconds else "stored"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of even width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# ---- a picture ----
def roofline(profiles: Sequence[LayerProfile], path: str | Path) -> None:
    """Write a roofline plot with a point a profile; the ending of `path` says the format. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, p in enumerate(profiles):
        roof, colour = p.roof, f"C{k}"
        point, ridge = (roof.flops / roof.bytes, p.flops_per_second / 1e9), roof.peak / roof.bandwidth
        low, high = min(point[0], ridge) / 8, max(point[0], ridge) * 8
        axes.plot([low, ridge, high], [low * roof.bandwidth / 1e9, roof.peak / 1e9, roof.peak / 1e9], color=colour)
        axes.plot(*point, "o", color=colour, label=f"{p.layer}: {p.share_of_roof:.0%} of the roof")
        axes.vlines(point[0], point[1], point[1] / p.share_of_roof, colors=colour, linestyles=":")
        for text, at, shift, side in (
            (f"multiply-adds, {quantity(roof.peak)}FLOP/s", (high, roof.peak / 1e9), (0, 4), "right"),
            (f"{roof.level}, {quantity(roof.bandwidth)}B/s", (low, low * roof.bandwidth / 1e9), (14, 0), "left"),
        ):
            axes.annotate(text, at, xytext=shift, textcoords="offset points", ha=side, fontsize=9)
    axes.legend(loc="lower right", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights read", ylabel="GFLOP/s")
    figure.savefig(path, dpi=150)
