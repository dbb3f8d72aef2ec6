"""What all integrations share: two equal models in training by the library's own loop, one of them converted."""

from __future__ import annotations

import logging
import random
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import ClassVar

import numpy as np
import torch

import fastcells
from fastcells.convert import Conversion


@dataclass(frozen=True)
class Epoch:
    """One epoch of training."""

    losses: list[float]  # of each step, or of the whole where the library gives no other
    seconds: float  # of all that the library does in it, its data loading too


class Integration(ABC):
    """A library's model and the data it learns. ``Model(seed, ...)`` builds both, with sizes that have defaults."""

    model_name: ClassVar[str]  # a few words for the table
    module: torch.nn.Module  # of the model, with the recurrent layers somewhere inside

    @abstractmethod
    def epoch(self) -> Epoch:
        """Train for one epoch, as a user of the library would. Random numbers come from the global generators."""

    def convert(self) -> Conversion:
        """What it takes to have fastcells' layers in the model."""
        return fastcells.convert(self.module)


@dataclass
class Comparison:
    """One model in training with torch.nn's layers, and the same with fastcells'."""

    name: str
    model_name: str
    conversion: Conversion
    before: list[Epoch] = field(default_factory=list)
    after: list[Epoch] = field(default_factory=list)

    def losses(self, number: int = -1) -> tuple[float, float]:
        """Mean loss of an epoch, before and after."""
        return fmean(self.before[number].losses), fmean(self.after[number].losses)

    def difference(self) -> float:
        """The largest difference between the losses of the same step, relative to the largest loss of its epoch."""
        return max(
            max(abs(a - b) for a, b in zip(p.losses, q.losses, strict=True)) / max(map(abs, p.losses))
            for p, q in zip(self.before, self.after, strict=True)
        )

    def seconds(self) -> tuple[float, float]:
        """Of an epoch, before and after: the median of those after the first, in which kernels are compiled."""
        before, after = (median(e.seconds for e in side[1:] or side) for side in (self.before, self.after))
        return before, after


def compare(name: str, kind: type[Integration], epochs: int, seed: int = 0) -> Iterator[Comparison]:
    """Train two models from one seed in turn, one of them converted; yields the comparison after every epoch.

    Raises RuntimeError if the model has no recurrent layer that could be converted.
    """
    sides = []
    with _quiet():
        for _ in range(2):
            _seed(seed)
            sides.append(kind(seed))  # type: ignore[call-arg]
        conversion = sides[1].convert()
    if not conversion.swapped:
        raise RuntimeError(f"{name}: nothing to convert\n{conversion}")
    comparison = Comparison(name, kind.model_name, conversion)
    for number in range(1, epochs + 1):
        for side, done in zip(sides, (comparison.before, comparison.after), strict=True):
            _seed(seed * 1_000_003 + number)
            with _quiet():
                done.append(side.epoch())
        yield comparison


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 the generator that libraries draw from
    random.seed(seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' advice on devices, workers and loggers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
