"""What all tasks share: one set of weights for all layers, and training them epoch by epoch in turn.

A `Task` is a data set, a model, a loss, a metric with its baselines, and a plot. A `Study` is several tasks trained one
after another, such as the same one with three cells, and one plot over all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import cos, inf, pi
from statistics import median
from time import perf_counter
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.tasks import plots
from benchmarks.tasks.layers import CELLS, layer_class

Batch = tuple[tuple[Tensor, ...], Tensor]  # the model's inputs, the targets


class Lesson(ABC):
    """What a task and a study have in common: what the command line needs to know, and what it shows at the end."""

    cell: str = "lstm"
    cells: ClassVar[tuple[str, ...]] = tuple(CELLS)
    #: The layers compared where the command line names none.
    layers: ClassVar[tuple[str, ...]] = ("torch", "fastcells")
    #: Whether the reference joins in for an epoch when all tasks run.
    with_reference: ClassVar[bool] = True
    #: The task's own options, each with its choices, the first one the default; without choices: any text.
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    data_name: str  # a few words for the table of all tasks

    def __init__(self, seed: int = 0, cell: str | None = None) -> None:
        """``cell``: in place of the task's own."""
        self.seed = seed
        self.cell = cell or self.cell


class Task(Lesson):
    """One training. ``Task(seed, cell, **options)`` loads the data and splits it."""

    epochs: ClassVar[int] = 8
    learning_rate: ClassVar[float] = 1e-3
    decay: ClassVar[bool] = False  # lower the learning rate from epoch to epoch, along a cosine towards zero
    clip: float | None = None  # largest norm of all gradients together; inf measures it only
    dtype: ClassVar[torch.dtype] = torch.float32
    loss_unit: ClassVar[str] = "nats"
    metric_name: ClassVar[str]
    metric_format: ClassVar[str] = ".4f"
    lower_is_better: ClassVar[bool] = False
    baselines: dict[str, float]  # the metric, on the validation part, of simple answers: the first is the one to beat
    facts: str  # a line on the data

    @abstractmethod
    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        """The model around ``layer``, a recurrent layer's class with torch.nn's constructor."""

    @abstractmethod
    def training(self, seed: int) -> list[Batch]:
        """The batches of one training epoch, in an order drawn from ``seed``."""

    @abstractmethod
    def validation(self) -> list[Batch]:
        """The batches of the validation part, always the same."""

    @abstractmethod
    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch: a scalar."""

    @abstractmethod
    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean of what a reader wants to know, such as accuracy, over the batch: a scalar."""

    def start(self, model: nn.Module) -> None:
        """Called before each pass over training or validation: forget a state carried from batch to batch."""

    def run(self, layer: str) -> Run:
        """The model with the layer of this name, ready to train."""
        return Run(layer, self, self.model(layer_class(layer, self.cell)))

    def plot(self, figure: Figure, runs: Sequence[Run]) -> None:
        """Draw what was learned; by default loss and time by epoch."""
        losses, times = figure.subplots(1, 2)
        plots.losses(losses, runs)
        plots.times(times, runs)

    def remarks(self, runs: Sequence[Run]) -> list[str]:
        """Lines to end with, on what the metric does not say."""
        return []


class Study(Lesson):
    """Several tasks, by label, trained one after another. ``Study(seed, cell, **options)``."""

    tasks: dict[str, Task]
    headline: str  # label of the task that speaks for all

    @abstractmethod
    def plot(self, figure: Figure, runs: Mapping[str, Sequence[Run]]) -> None:
        """Draw what was learned; ``runs`` by label."""

    def remarks(self, runs: Mapping[str, Sequence[Run]]) -> list[str]:
        """Lines to end with."""
        return []


@dataclass(frozen=True)
class Epoch:
    """One epoch of one run."""

    seconds: float  # of its training steps: forward, backward and optimizer of the whole model
    training_loss: float
    validation_loss: float
    metric: float


@dataclass
class Run:
    """One model in training, with its history."""

    name: str
    task: Task
    model: nn.Module
    startup: float = 0.0  # seconds for import, construction and compilation
    limit: float = inf  # epochs after which it stops, while others may go on
    epochs: list[Epoch] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of the gradients at each step, before clipping, if task.clip

    def __post_init__(self) -> None:
        self.model.to(self.task.dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.task.learning_rate, fused=True)

    @property
    def seconds(self) -> float:
        """Median time of an epoch."""
        return median(epoch.seconds for epoch in self.epochs)

    @property
    def best(self) -> float:
        """The best metric of all epochs."""
        values = [epoch.metric for epoch in self.epochs]
        return min(values) if self.task.lower_is_better else max(values)

    def output(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The model's answer."""
        return self.model(*(self._cast(x) for x in inputs))

    def train(self, batches: Sequence[Batch], tick: Callable[[], None]) -> tuple[float, float]:
        """One epoch; returns mean loss and seconds. The clock stands while ``tick`` shows the progress."""
        self.model.train()
        self.task.start(self.model)
        total = seconds = 0.0
        for inputs, targets in batches:
            began = perf_counter()
            self.optimizer.zero_grad()
            loss = self.task.loss(self.output(inputs), self._cast(targets))
            loss.backward()
            if self.task.clip is not None:
                self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip).item())
            self.optimizer.step()
            seconds += perf_counter() - began
            total += loss.item() * len(targets)
            tick()
        return total / _size(batches), seconds

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Mean loss and metric, without dropout."""
        self.model.eval()
        self.task.start(self.model)
        loss = metric = 0.0
        for inputs, targets in batches:
            output, targets = self.output(inputs), self._cast(targets)
            loss += self.task.loss(output, targets).item() * len(targets)
            metric += self.task.metric(output, targets).item() * len(targets)
        return loss / _size(batches), metric / _size(batches)

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Forward and backward once, and once without gradients: what compiles does so before the clock runs."""
        for inputs, targets in batches:
            self.task.loss(self.output(inputs), self._cast(targets)).backward()
        self.validate(batches)

    def close(self) -> None:
        """Called when all is done, also where it failed."""

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.task.dtype) if tensor.is_floating_point() else tensor


def prepare(task: Task, layers: Sequence[str]) -> list[Run]:
    """One run for each of ``layers`` (see LAYERS), all from the same weights, compiled and ready to be timed."""
    runs: list[Run] = []
    batches = task.training(task.seed)[:1]
    for name in layers:
        began = perf_counter()
        torch.manual_seed(task.seed)
        run = task.run(name)
        if runs:
            run.model.load_state_dict(runs[0].model.state_dict())
        run.warm_up(batches)
        run.startup = perf_counter() - began
        runs.append(run)
    return runs


def train(runs: Sequence[Run], epochs: int, tick: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Train all runs, one epoch each in turn, so that a machine that speeds up or slows down does so for all.

    Yields the number of the epoch that all have finished.
    """
    task = runs[0].task
    validation = task.validation()
    for number in range(1, epochs + 1):
        draw = task.seed * 1_000_003 + number
        batches = task.training(draw)
        for run in runs:
            if number > run.limit:
                continue
            if task.decay:
                rate = task.learning_rate * (1 + cos(pi * (number - 1) / epochs)) / 2
                run.optimizer.param_groups[0]["lr"] = rate
            torch.manual_seed(draw)  # dropout draws the same masks for each
            training_loss, seconds = run.train(batches, tick)
            run.epochs.append(Epoch(seconds, training_loss, *run.validate(validation)))
        yield number


def loss_differences(a: Run, b: Run) -> list[float]:
    """By epoch that both have done, how far apart their losses are: the larger of training and validation."""
    return [
        max(abs(p.training_loss - q.training_loss), abs(p.validation_loss - q.validation_loss))
        for p, q in zip(a.epochs, b.epochs, strict=False)
    ]


def speedups(a: Run, b: Run) -> list[float]:
    """By epoch that both have done, how many times faster ``b`` is than ``a``."""
    return [p.seconds / q.seconds for p, q in zip(a.epochs, b.epochs, strict=False)]


def seconds_to_same(a: Run, b: Run) -> tuple[float, float, float]:
    """The metric that both reach, and the seconds of training that each takes to reach it."""
    lower = a.task.lower_is_better
    target = (max if lower else min)(a.best, b.best)

    def until(run: Run) -> float:
        spent = accumulate(epoch.seconds for epoch in run.epochs)
        met = ((e.metric <= target if lower else e.metric >= target) for e in run.epochs)
        return next(seconds for seconds, there in zip(spent, met, strict=True) if there)

    return target, until(a), until(b)


def _size(batches: Sequence[Batch]) -> int:
    return sum(len(targets) for _, targets in batches)
