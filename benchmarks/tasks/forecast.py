"""The next value of a series, and the values after it: two stacked layers that read a window of the past.

The network says how far the next value lies from the last one, so that it has to beat persistence, the forecast that
nothing changes, rather than learn it. The scale, 0 to 1, is fitted to the training part alone. Several steps ahead, the
network reads its own forecasts. ``--cell relu-lstm`` is the LSTM with relu for tanh, as Keras's users like it here: a
variant that torch.nn has not, and has to run as a loop over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.tasks import lab, plots, series
from benchmarks.tasks.layers import CELLS, RELU_LSTM

BATCH = 32
HORIZON = 12


class Forecaster(nn.Module):
    """Windows [N, T, 1] to the value that follows each [N]. ``change``: how far values typically are from the last."""

    def __init__(self, layer: Callable[..., nn.Module], change: float, hidden: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.change = change
        self.recurrent = layer(2, hidden, num_layers=layers, batch_first=True)
        self.output = nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        changes = windows.diff(dim=1, prepend=windows[:, :1]) / self.change
        hidden, _ = self.recurrent(torch.cat([windows, changes], dim=2))
        return windows[:, -1, 0] + self.change * self.output(hidden[:, -1]).squeeze(1)


class Forecast(lab.Task):
    """``layers``: how many are stacked."""

    epochs = 60
    learning_rate = 3e-3
    decay = True
    clip: float | None = 1.0
    loss_unit = "scaled, squared"
    metric_name = "MAE"
    metric_format = ".2f"
    lower_is_better = True
    cells = (*CELLS, RELU_LSTM)
    options: ClassVar = {"data": series.NAMES}

    def __init__(self, seed: int = 0, cell: str | None = None, data: str = "sunspots", layers: int = 2) -> None:
        super().__init__(seed, cell)
        self.layers_stacked = layers
        self.series = series.load(data, seed)
        self.data_name = self.series.source
        self.windows = windows = series.Windows(self.series)
        _, steps = self.persistence(1)
        self.baselines = {"persistence": float(np.abs(steps[0]).mean())}
        self.facts = (
            f"{self.series.name}: {windows.training} windows of {self.series.window} to train on, "
            f"{len(windows.targets) - windows.training} to validate; errors in {self.series.unit}"
        )

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        change = self.windows.inputs[: self.windows.training, :, 0].diff(dim=1).std().item()
        return Forecaster(layer, change, layers=self.layers_stacked)

    def training(self, seed: int) -> list[lab.Batch]:
        order = torch.randperm(self.windows.training, generator=torch.Generator().manual_seed(seed))
        return [((self.windows.inputs[chosen],), self.windows.targets[chosen]) for chosen in order.split(BATCH)]

    def validation(self) -> list[lab.Batch]:
        return [((self.windows.inputs[self.windows.training :],), self.windows.targets[self.windows.training :])]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(output, targets)

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean absolute error in the unit of the series."""
        return (output - targets).abs().mean() * self.windows.scale

    @torch.no_grad()
    def ahead(self, run: lab.Run, horizon: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Forecasts and errors 1 to ``horizon`` steps ahead, [horizon, windows of the validation part].

        Each starts from measured values alone. Later steps read the forecasts before them.
        """
        run.model.eval()
        past = self.windows.inputs[self.windows.training :]
        forecasts = []
        for _ in range(horizon):
            forecasts.append(run.output((past,)).to(past.dtype))
            past = torch.cat([past[:, 1:], forecasts[-1][:, None, None]], dim=1)
        return self._with_errors(self.windows.in_unit(torch.stack(forecasts)))

    def persistence(self, horizon: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The same for the forecast that the last value stays."""
        last = self.windows.inputs[self.windows.training :, -1, 0]
        return self._with_errors(self.windows.in_unit(last.expand(horizon, -1)))

    def _with_errors(self, forecasts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Errors are NaN past the end of the series."""
        measured = self.series.values[self.windows.split :]
        horizon, count = forecasts.shape
        padded = np.append(measured, np.full(horizon, np.nan))
        return forecasts, forecasts - np.stack([padded[step : step + count] for step in range(horizon)])

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.1])
        losses, errors, course = (figure.add_subplot(place) for place in (grid[1, 0], grid[1, 1], grid[0, :]))
        figure.set_size_inches(13, 9.5)
        run, split = runs[-1], self.windows.split
        unit, step = self.series.unit, self.series.step
        forecasts, far = self.ahead(run, HORIZON)
        shown = slice(max(0, split - 2 * self.series.window), None)
        course.plot(self.series.times[shown], self.series.values[shown], color="black", linewidth=2, label="measured")
        course.plot(self.series.times[split:], forecasts[0], color="#c8553d", linewidth=2, label=f"one {step} ahead")
        every = range(0, forecasts.shape[1] - HORIZON, 2 * HORIZON)
        for start in every:
            at = slice(split + start, split + start + HORIZON)
            label = f"1 to {HORIZON} {step}s ahead" if start == 0 else None
            course.plot(self.series.times[at], forecasts[:, start], "o-", markersize=4, color="#3f8fd2", label=label)
        course.axvline(self.series.times[split], color=plots.GREY, linestyle="dotted")
        plots.style(course, f"{self.series.name}; validation right of the dots", "", unit, legend={"ncols": 3})
        course.margins(y=0.2)
        plots.losses(losses, runs, log=True)
        steps = range(1, HORIZON + 1)
        simple = np.nanmean(np.abs(self.persistence(HORIZON)[1]), axis=1)
        errors.plot(steps, simple, "o--", color=plots.GREY, label="persistence")
        errors.plot(steps, np.nanmean(np.abs(far), axis=1), "o-", color="#c8553d", label=f"{self.cell.upper()}")
        plots.style(errors, "The further ahead, the harder", f"{step}s ahead", f"mean abs. error\n({unit})")
        errors.set_ylim(0)

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        lines = []
        for name, (_, error) in {
            self.cell.upper(): self.ahead(runs[-1], HORIZON),
            "persistence": self.persistence(HORIZON),
        }.items():
            mse, mae = np.nanmean(error**2, axis=1), np.nanmean(np.abs(error), axis=1)
            said = "; ".join(f"{at}: MSE {mse[at - 1]:.4g}, MAE {mae[at - 1]:.3g}" for at in (1, 3, 6, HORIZON))
            lines.append(f"{name}, by {self.series.step}s ahead, in {self.series.unit}: {said}")
        return lines
