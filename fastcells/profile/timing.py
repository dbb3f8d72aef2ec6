"""Where the time of a call goes."""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..cpu import engine, script
from ..cpu import layer as cpu
from ..roof import using_threads

INPUT, PRODUCT, POINTWISE, BARRIER = "input projection", "recurrent product", "pointwise", "barrier"
BACK_PRODUCT, BACK_POINTWISE = "backward recurrent product", "backward pointwise"
INPUT_GRADIENT, WEIGHT_GRADIENTS = "input gradient", "weight gradients"
PACKING, TOKENS, COPIES = "packing of weights", "packing of sequences", "biases and final states"
REST = "torch and Python"
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
    TOKENS,
    COPIES,
    REST,
)

SAMPLE = 1e-3  # seconds that a sample takes at least; shorter calls are repeated
ROUNDS = 5  # at least

clock = time.perf_counter


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
