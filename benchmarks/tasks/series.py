"""Series of real measurements, and a synthetic one, cut into windows with the value that follows each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NAMES = ("sunspots", "co2", "sine")
VALIDATION = 0.25  # the last part of the series


@dataclass(frozen=True)
class Series:
    """Values in their own unit at equal steps of time."""

    name: str
    source: str  # in a few words, for a table
    values: NDArray[np.float64]  # [T]
    times: NDArray[np.float64]  # [T]
    step: str  # what one step of time is
    unit: str
    period: str  # the length of a window, in words
    window: int


def load(name: str, seed: int = 0) -> Series:
    """One of NAMES. The data of both real series come with statsmodels and are in the public domain."""
    if name == "sine":
        times = np.arange(600.0)
        noise = np.random.default_rng(seed).normal(scale=0.1, size=len(times))
        return Series(
            "noisy sine", "a noisy sine", np.sin(2 * np.pi * times / 25) + noise, times, "step", "1", "2 periods", 50
        )
    from statsmodels.datasets import co2, sunspots

    if name == "sunspots":
        table = sunspots.load_pandas().data
        values, years = table["SUNACTIVITY"].to_numpy(float), table["YEAR"].to_numpy(float)
        name, source = "sunspots, yearly, 1700 to 2008", "sunspots (statsmodels), yearly"
        return Series(name, source, values, years, "year", "sunspot number", "about 2 cycles", 24)
    table = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    months = table.index.year + (table.index.month - 0.5) / 12
    name, source = "CO2 at Mauna Loa, monthly, 1958 to 2001", "CO2 (statsmodels), monthly"
    return Series(name, source, table.to_numpy(float), months.to_numpy(float), "month", "ppm", "2 years", 24)


class Windows:
    """Windows of a series scaled to 0..1 by the training part alone, and the value that follows each."""

    def __init__(self, series: Series) -> None:
        from sklearn.preprocessing import MinMaxScaler

        self.series = series
        self.split = round(len(series.values) * (1 - VALIDATION))  # the first time of the validation part
        scaler = MinMaxScaler().fit(series.values[: self.split, None])
        self.scale = float(scaler.data_range_[0])  # of one in the unit of the series
        self._lowest = float(scaler.data_min_[0])
        scaled = torch.from_numpy(scaler.transform(series.values[:, None])).float()  # [T, 1]
        #: [count, window, 1] and [count]: item i is followed by the value at time window + i.
        self.inputs = scaled.unfold(0, series.window, 1)[:-1].transpose(1, 2).contiguous()
        self.targets = scaled[series.window :, 0].contiguous()
        #: How many windows belong to training: those whose target does.
        self.training = self.split - series.window

    def in_unit(self, scaled: Tensor) -> NDArray[np.float64]:
        """Back to the unit of the series."""
        return scaled.double().numpy() * self.scale + self._lowest
