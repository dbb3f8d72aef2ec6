"""The adding problem (Hochreiter & Schmidhuber 1997) over longer and longer sequences.

Each step gives a number from 0 to 1 and a mark. Two steps are marked, one in each half of the sequence, and the answer
asked for at the end is the sum of their two numbers: whatever learns it has carried the first one over half the
sequence or more. Always answering 1 has a mean squared error of 1/6. In the plain RNN the gradient that would teach it
to remember vanishes on its way; the LSTM's cell state passes it on, all the more as its gates start out open for about
as long as the sequence is (Tallec & Ollivier 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from benchmarks.tasks import lab, plots

LENGTHS = (10, 30, 100)
CELLS = ("rnn", "lstm")
BATCH = 64


class Marked(nn.Module):
    """Numbers and marks [N, T, 2] to the sum of the marked numbers [N]."""

    def __init__(self, layer: Callable[..., nn.Module], length: int, hidden: int = 32) -> None:
        super().__init__()
        self.recurrent = layer(2, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)
        times = torch.empty(hidden).uniform_(1, length - 1)  # after about so many steps each unit is to forget
        with torch.no_grad():
            bias = self.recurrent.get_parameter("bias_ih_l0")
            if isinstance(self.recurrent, nn.LSTM):  # of the gates i, f, g, o in turn
                bias[: 2 * hidden] = torch.cat([-times.log(), times.log()])
            elif isinstance(self.recurrent, nn.GRU):  # of r, z, n; an open z keeps
                bias[hidden : 2 * hidden] = times.log()

    def forward(self, steps: Tensor) -> Tensor:
        hidden, _ = self.recurrent(steps)
        return self.output(hidden[:, -1]).squeeze(1)


class Adding(lab.Task):
    """``length``: T; ``batches``: of one epoch."""

    epochs = 20
    learning_rate = 2e-2
    decay = True
    clip = 1.0
    loss_unit = "squared error"
    metric_name = "MSE"
    lower_is_better = True

    def __init__(self, seed: int = 0, cell: str | None = None, length: int = 30, batches: int = 40) -> None:
        super().__init__(seed, cell)
        self.length, self.batches = length, batches
        self._validation = adding(torch.Generator().manual_seed(seed), 1000, length)
        self.baselines = {"always 1": ((self._validation[1] - 1) ** 2).mean().item()}
        self.facts = f"two of {length} numbers are marked; {batches * BATCH:,} new sequences an epoch"

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Marked(layer, self.length)

    def training(self, seed: int) -> list[lab.Batch]:
        draw = torch.Generator().manual_seed(seed + 1)
        return [adding(draw, BATCH, self.length) for _ in range(self.batches)]

    def validation(self) -> list[lab.Batch]:
        return [self._validation]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(output, targets)

    metric = loss


class Memory(lab.Study):
    data_name = "adding problem, 100 steps"
    headline = "LSTM, 100 steps"

    def __init__(
        self, seed: int = 0, cell: str | None = None, lengths: Sequence[int] = LENGTHS, batches: int = 40
    ) -> None:
        cells = [cell] if cell else CELLS
        self.lengths = lengths
        self.tasks = {f"{c.upper()}, {t} steps": Adding(seed, c, t, batches) for t in lengths for c in cells}
        self.headline = list(self.tasks)[-1]

    def plot(self, figure: Figure, runs: Mapping[str, Sequence[lab.Run]]) -> None:
        curves, final = figure.subplots(1, 2)
        found: dict[str, list[float]] = {}
        styles = dict(zip(self.lengths, ("dotted", "dashed", "solid"), strict=False))
        for label, of_label in runs.items():
            run, task = of_label[-1], self.tasks[label]
            assert isinstance(task, Adding)
            values = [epoch.metric for epoch in run.epochs]
            look = {"color": plots.CELL_COLORS[task.cell], "linestyle": styles[task.length], "linewidth": 2.5}
            curves.plot(range(1, len(values) + 1), values, label=label, **look)
            found.setdefault(task.cell, []).append(run.best)
        for cell, values in found.items():
            final.plot(self.lengths, values, "o-", color=plots.CELL_COLORS[cell], linewidth=2.5, label=cell.upper())
        for axes in curves, final:
            axes.axhline(1 / 6, color=plots.GREY, linestyle="dashdot", label="always 1")
            plots.logarithmic(axes)
        final.set_xscale("log")
        final.set_xticks(self.lengths, [str(length) for length in self.lengths])
        plots.style(
            curves, "Learning", "epoch", "mean squared error", {"ncols": 2, "fontsize": 13, "loc": "lower center"}
        )
        plots.whole_epochs(curves, len(run.epochs))
        low, high = curves.get_ylim()
        curves.set_ylim(low / 20, high)  # room for the legend
        plots.style(final, "The longer, the harder", "steps in the sequence", "mean squared error, best epoch")


def adding(draw: torch.Generator, size: int, length: int) -> lab.Batch:
    """Numbers and marks [size, length, 2], and sums [size]."""
    numbers = torch.rand(size, length, generator=draw)
    half = length // 2
    first = torch.randint(0, half, (size, 1), generator=draw)
    second = torch.randint(half, length, (size, 1), generator=draw)
    marks = torch.zeros(size, length).scatter(1, first, 1.0).scatter(1, second, 1.0)
    return (torch.stack([numbers, marks], dim=2),), (numbers * marks).sum(dim=1)
