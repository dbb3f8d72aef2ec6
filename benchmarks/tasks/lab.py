"""What all tasks share: building the models from one set of weights, and training them epoch by epoch in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import ClassVar

import torch
from torch import Tensor, nn

LAYERS = {"torch": "torch.nn", "fastcells": "fastcells.nn"}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}

Batch = tuple[Tensor, Tensor]  # inputs, targets


class Task(ABC):
    """Data, model and loss of one training; ``Task(seed)`` loads the data and splits it."""

    epochs: ClassVar[int] = 8
    learning_rate: ClassVar[float] = 1e-3
    metric_name: ClassVar[str]
    metric_format: ClassVar[str] = ".4f"
    baseline_name: ClassVar[str]
    baseline: float  # the metric, on the validation part, of the best answer that ignores the input
    facts: str  # one line on the data

    @abstractmethod
    def __init__(self, seed: int) -> None: ...

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
    epochs: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.task.learning_rate, fused=True)

    @property
    def seconds(self) -> float:
        """Median time of an epoch."""
        return median(epoch.seconds for epoch in self.epochs)

    def train(self, batches: Sequence[Batch], tick: Callable[[], None]) -> tuple[float, float]:
        """One epoch; returns mean loss and seconds. The clock stands while ``tick`` shows the progress."""
        self.model.train()
        total = seconds = 0.0
        for inputs, targets in batches:
            began = perf_counter()
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(inputs), targets)
            loss.backward()
            self.optimizer.step()
            seconds += perf_counter() - began
            total += loss.item() * len(targets)
            tick()
        return total / _size(batches), seconds

    @torch.no_grad()
    def validate(self, batches: Sequence[Batch]) -> tuple[float, float]:
        """Mean loss and metric, without dropout."""
        self.model.eval()
        loss = metric = 0.0
        for inputs, targets in batches:
            output = self.model(inputs)
            loss += self.task.loss(output, targets).item() * len(targets)
            metric += self.task.metric(output, targets).item() * len(targets)
        return loss / _size(batches), metric / _size(batches)


def prepare(task: Task, layers: Sequence[str], cell: str, seed: int) -> list[Run]:
    """One run for each of ``layers`` (keys of LAYERS), all from the same weights, compiled and ready to be timed."""
    runs: list[Run] = []
    batches = task.training(seed)[:1]
    for name in layers:
        began = perf_counter()
        torch.manual_seed(seed)
        run = Run(name, task, task.model(getattr(import_module(LAYERS[name]), CELLS[cell])))
        if runs:
            run.model.load_state_dict(runs[0].model.state_dict())
        # Forward and backward once, and once without gradients: what compiles does so before the clock runs.
        for inputs, targets in batches:
            task.loss(run.model(inputs), targets).backward()
        run.validate(batches)
        run.startup = perf_counter() - began
        runs.append(run)
    return runs


def train(runs: Sequence[Run], epochs: int, seed: int, tick: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Train all runs, one epoch each in turn, so that a machine that speeds up or slows down does so for all.

    Yields the number of the epoch that all have finished.
    """
    task = runs[0].task
    validation = task.validation()
    for number in range(1, epochs + 1):
        draw = seed * 1_000_003 + number
        batches = task.training(draw)
        for run in runs:
            torch.manual_seed(draw)  # dropout draws the same masks for each
            training_loss, seconds = run.train(batches, tick)
            run.epochs.append(Epoch(seconds, training_loss, *run.validate(validation)))
        yield number


def loss_differences(a: Run, b: Run) -> list[float]:
    """By epoch, how far apart the losses of two runs are: the larger of training and validation."""
    return [
        max(abs(p.training_loss - q.training_loss), abs(p.validation_loss - q.validation_loss))
        for p, q in zip(a.epochs, b.epochs, strict=True)
    ]


def speedups(a: Run, b: Run) -> list[float]:
    """By epoch, how many times faster ``b`` is than ``a``."""
    return [p.seconds / q.seconds for p, q in zip(a.epochs, b.epochs, strict=True)]


def _size(batches: Sequence[Batch]) -> int:
    return sum(len(targets) for _, targets in batches)
