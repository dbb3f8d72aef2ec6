"""Small real trainings, each run with torch.nn and with fastcells.nn from the same weights and the same batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.tasks.lab import Study, Task

#: Name of a module here, which holds the Task or Study of that name capitalised, and what it shows.
TASKS = {
    "sum": "an RNN that adds up the numbers of a sequence, and of longer ones than it was trained on",
    "forecast": "the next value of a series, and the ones after: two layers, against repeating the last value",
    "compare": "RNN, GRU and LSTM on one series: error by epoch, numbers of parameters, time",
    "sentiment": "movie-review snippets, positive or negative: embedding, bidirectional layer, pooling over time",
    "chargen": "the next character of movie reviews: truncated backpropagation, clipping, sampling",
    "seq2seq": "dates as people write them into ISO 8601: encoder and decoder with attention",
    "memory": "adding two marked numbers further and further back: where the plain RNN fails and the LSTM does not",
    "gradients": "vanishing and exploding gradients through time, with and without clipping",
    "states": "hidden states and gates, word by word, of a small layer that reads a review",
    "classify": "who speaks? Utterances of unequal length by nine men, bidirectional GRU",
    "scratch": "the NumPy reference and its own optimizer trained end to end beside the fast layers",
    "parallel": "the sentiment model in two processes under DistributedDataParallel, and in one",
}


def load(name: str) -> type[Task] | type[Study]:
    """The task of this name; imported only now, so that the command line starts fast."""
    return getattr(import_module(f"{__name__}.{name}"), name.capitalize())
