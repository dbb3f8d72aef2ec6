"""A recurrent network that adds up the numbers of a sequence, trained on short ones and asked for longer ones.

After each number the network is to say the sum so far. With rectified units there is an exact answer for sequences of
any length: one unit that adds up, h_t = relu(x_t + h_{t-1}), and one for the negative part. Training on 20 numbers
comes close enough to it that 100 are added with a small error. (Try ``--cell lstm``, which learns no more than the
range it has seen.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.tasks import lab, plots

TRAINED = 20  # numbers in a sequence of training
ASKED = (1, 5, 10, 15, 20, 30, 40, 60, 80, 100)
BATCH = 64


class Adder(nn.Module):
    """Numbers [N, T, 1] to the sums so far [N, T]."""

    def __init__(self, layer: Callable[..., nn.Module], hidden: int = 16) -> None:
        super().__init__()
        simple = isinstance(layer, type) and issubclass(layer, nn.RNN)
        self.recurrent = layer(1, hidden, batch_first=True, **({"nonlinearity": "relu"} if simple else {}))
        self.output = nn.Linear(hidden, 1)

    def forward(self, numbers: Tensor) -> Tensor:
        hidden, _ = self.recurrent(numbers)
        return self.output(hidden).squeeze(2)


class Sum(lab.Task):
    """``batches``: of one epoch."""

    cell = "rnn"
    epochs = 20
    learning_rate = 3e-3
    decay = True
    clip = 1.0
    loss_unit = "squared error"
    metric_name = "MAE"
    metric_format = ".3f"
    lower_is_better = True
    data_name = "random numbers, 20 at a time"

    def __init__(self, seed: int = 0, cell: str | None = None, batches: int = 50) -> None:
        super().__init__(seed, cell)
        self.batches = batches
        _, sums = self._validation = _batch(torch.Generator().manual_seed(seed), 1000)
        self.baselines = {"zero": sums[:, -1].abs().mean().item()}
        self.facts = f"{batches * BATCH:,} new sequences an epoch, each of {TRAINED} numbers from -1/2 to 1/2"

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Adder(layer)

    def training(self, seed: int) -> list[lab.Batch]:
        draw = torch.Generator().manual_seed(seed + 1)
        return [_batch(draw, BATCH) for _ in range(self.batches)]

    def validation(self) -> list[lab.Batch]:
        return [self._validation]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(output, targets)

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        """Mean absolute error of the whole sum."""
        return (output - targets)[:, -1].abs().mean()

    def errors(self, run: lab.Run) -> dict[int, float]:
        """Mean absolute error by length, also of sequences longer than any in training."""
        batches = {length: _batch(torch.Generator().manual_seed(length), 500, length) for length in ASKED}
        return {length: run.validate([batch])[1] for length, batch in batches.items()}

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        losses, errors = figure.subplots(1, 2)
        plots.losses(losses, runs, log=True)
        errors.axvspan(0, TRAINED, color=plots.GREY, alpha=0.15, label="lengths seen in training")
        simple = [_error_of_zero(length) for length in ASKED]
        errors.plot(ASKED, simple, color=plots.GREY, linestyle="dashed", label="answer: zero")
        for run in runs:
            look = {"color": plots.COLORS[run.name], "linewidth": plots.WIDTHS.get(run.name, 2), "marker": "o"}
            errors.plot(ASKED, list(self.errors(run).values()), label=run.name, **look)
        plots.logarithmic(errors)
        plots.style(errors, "Longer than in training", "numbers in the sequence", "mean absolute error of the sum")

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        errors = self.errors(runs[-1])
        said = ", ".join(f"{length}: {errors[length]:.3f}" for length in ASKED if length >= TRAINED)
        return [f"MAE by length, trained on {TRAINED} numbers: {said} (of the answer zero: {_error_of_zero(100):.2f})"]


def _batch(draw: torch.Generator, size: int, length: int = TRAINED) -> lab.Batch:
    numbers = torch.rand(size, length, 1, generator=draw) - 0.5
    return (numbers,), numbers.squeeze(2).cumsum(dim=1)


def _error_of_zero(length: int) -> float:
    """Expected absolute value of the sum: it is about normal, with variance length / 12."""
    return (length / 12 * 2 / torch.pi) ** 0.5
