"""Small real trainings, each run with torch.nn and with fastcells.nn from the same weights and the same batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.tasks.lab import Task

#: Name of a module here, which holds the Task subclass of that name capitalised, and what it trains.
TASKS = {
    "sentiment": "movie-review snippets, positive or negative: embedding, bidirectional layer, mean over time",
}


def load(name: str) -> type[Task]:
    """The task of this name; imported only now, so that the command line starts fast."""
    return getattr(import_module(f"{__name__}.{name}"), name.capitalize())
