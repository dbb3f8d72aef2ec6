"""Libraries that build models out of torch.nn's recurrent layers, trained before and after `fastcells.convert`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.tasks.integrations.training import Integration

#: Name of a module here, which is that of the library and holds an Integration named Model, and what it trains.
LIBRARIES = {
    "sb3_contrib": "RecurrentPPO balances a pole: rollouts and updates, episodes that begin in mid-sequence",
    "darts": "RNNModel forecasts CO2 a month ahead",
    "pytorch_forecasting": "DeepAR forecasts the distribution of CO2 over a year",
    "neuralforecast": "GRU encodes four years of CO2, a perceptron decodes the next",
    "speechbrain": "who speaks? A bidirectional GRU over utterances of unequal length, in speechbrain's Brain",
}
ALL = "integrations"  # the name that stands for all of them


def load(name: str) -> type[Integration]:
    """The integration of this library. Raises ImportError where the library, or a part of it, cannot be imported."""
    return import_module(f"{__name__}.{name}").Model
