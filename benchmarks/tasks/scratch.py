"""A layer, its output and its optimizer from scratch in NumPy, trained beside the same model with the fast layers.

`fastcells.reference` is the layer, forward and backpropagation through time, written to be read. The model on top, the
loss's gradient and Adam (Kingma & Ba 2015) are below. All run in float64 from one set of weights, so the losses of all
three agree to the last digits, and what remains to compare is the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.tasks import lab
from benchmarks.tasks.forecast import Forecast, Forecaster
from benchmarks.tasks.layers import CELLS, Reference

Array = NDArray[np.float64]


class Adam:
    """Adaptive moment estimation, on arrays changed in place."""

    def __init__(self, parameters: dict[str, Array], rate: float) -> None:
        self.parameters, self.rate, self.steps = parameters, rate, 0
        self.mean = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.square = {name: np.zeros_like(p) for name, p in parameters.items()}

    def step(self, gradients: dict[str, Array]) -> None:
        self.steps += 1
        for name, parameter in self.parameters.items():
            g, m, v = gradients[name], self.mean[name], self.square[name]
            m += (1 - 0.9) * (g - m)
            v += (1 - 0.999) * (g**2 - v)
            m_hat, v_hat = m / (1 - 0.9**self.steps), v / (1 - 0.999**self.steps)
            parameter -= self.rate * m_hat / (np.sqrt(v_hat) + 1e-8)


class FromScratch(lab.Run):
    """`Forecaster` and its training without torch: only validation borrows the weights."""

    def start(self) -> None:
        """Take over the weights. Later they are this object's own."""
        recurrent = self.model.get_submodule("recurrent")
        assert isinstance(recurrent, Reference)
        self.layer = recurrent.numpy_layer()
        output = {f"output.{name}": p.detach().numpy().copy() for name, p in self.model.output.named_parameters()}  # type: ignore[union-attr]
        self.adam = Adam(self.layer.parameters | output, self.task.learning_rate)

    def train(self, batches: Sequence[lab.Batch], tick: Callable[[], None]) -> tuple[float, float]:
        if not hasattr(self, "adam"):
            self.start()
        total, seconds, size = 0.0, 0.0, 0
        self.adam.rate = self.optimizer.param_groups[0]["lr"]
        for (windows,), targets in batches:
            began = perf_counter()
            loss, gradients = self.loss_and_gradients(windows.double().numpy(), targets.double().numpy())
            self.adam.step(gradients)
            seconds += perf_counter() - began
            total, size = total + loss * len(targets), size + len(targets)
            tick()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.from_numpy(self.adam.parameters[name.removeprefix("recurrent.")]))
        return total / size, seconds

    def loss_and_gradients(self, windows: Array, targets: Array) -> tuple[float, dict[str, Array]]:
        """Windows [N, T, 1] and the values that follow [N]: mean squared error, its gradient by every weight."""
        assert isinstance(self.model, Forecaster)
        change = self.model.change
        weight, bias = self.adam.parameters["output.weight"], self.adam.parameters["output.bias"]  # [1, H], [1]
        # forward
        changes = np.diff(windows, axis=1, prepend=windows[:, :1]) / change
        hidden, _ = self.layer.forward(np.concatenate([windows, changes], axis=2))
        last = hidden[:, -1]  # [N, H]
        error = windows[:, -1, 0] + change * (last @ weight[0] + bias) - targets
        # backward
        d_output = 2 * error / len(error) * change  # [N]
        d_hidden = np.zeros_like(hidden)
        d_hidden[:, -1] = d_output[:, None] * weight
        gradients = self.layer.backward(d_hidden)
        gradients |= {"output.weight": (d_output @ last)[None], "output.bias": d_output.sum(keepdims=True)}
        return float(np.mean(error**2)), gradients


class Scratch(Forecast):
    """`Forecast` with one layer, in float64, and a reference that is NumPy from end to end."""

    epochs = 20
    cells = tuple(CELLS)
    clip = None  # the optimizer below does not
    dtype = torch.float64
    layers = ("torch", "fastcells", "reference")

    def __init__(self, seed: int = 0, cell: str | None = None, data: str = "sunspots") -> None:
        super().__init__(seed, cell, data, layers=1)

    def run(self, layer: str) -> lab.Run:
        run = super().run(layer)
        return FromScratch(run.name, self, run.model) if layer == "reference" else run

    def plot(self, figure, runs) -> None:
        lab.Task.plot(self, figure, runs)

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        return [f"float64 throughout; {run.name}: {run.seconds * 1e3:.0f} ms an epoch" for run in runs]
