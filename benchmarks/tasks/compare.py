"""The same forecast by the three layers of the course: simple RNN, GRU and LSTM, one layer each of 32 units.

The GRU's step costs three, the LSTM's four times the products of the simple one, and has as many times the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from matplotlib.figure import Figure

from benchmarks.tasks import lab, plots, series
from benchmarks.tasks.forecast import Forecast

GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def formula(cell: str, inputs: int, hidden: int) -> int:
    """Parameters of a layer: for each gate a row of W, one of U and two biases for each unit, G H (I + H + 2)."""
    return GATES[cell] * hidden * (inputs + hidden + 2)


class Compare(lab.Study):
    options: ClassVar = {"data": series.NAMES}

    tasks: dict[str, Forecast]  # type: ignore[assignment]

    def __init__(self, seed: int = 0, cell: str | None = None, data: str = "sunspots") -> None:
        cells = [cell] if cell else list(GATES)
        self.tasks = {name.upper(): Forecast(seed, name, data, layers=1) for name in cells}
        self.headline = list(self.tasks)[-1]
        self.data_name = self.tasks[self.headline].data_name

    def plot(self, figure: Figure, runs: Mapping[str, Sequence[lab.Run]]) -> None:
        (losses, errors), (bars, sizes) = figure.subplots(2, 2)
        figure.set_size_inches(13, 10)
        colors = {label: plots.CELL_COLORS[task.cell] for label, task in self.tasks.items()}
        for label, (*_, run) in runs.items():
            for axes, what in (losses, "validation_loss"), (errors, "metric"):
                values = [getattr(epoch, what) for epoch in run.epochs]
                axes.plot(range(1, len(values) + 1), values, color=colors[label], label=label, linewidth=2.5)
        task = next(iter(self.tasks.values()))
        name, simple = next(iter(task.baselines.items()))
        errors.axhline(simple, color=plots.GREY, linestyle="dashed", label=name)
        errors.set_ylim(0)
        plots.logarithmic(losses)
        plots.style(losses, "Validation loss", "epoch", "mean squared error, scaled")
        plots.style(errors, "Validation error", "epoch", f"mean abs. error\n({task.series.unit})")
        for axes in losses, errors:
            plots.whole_epochs(axes, len(run.epochs))
        layers = [run.name for run in next(iter(runs.values()))]
        width = 0.8 / len(layers)
        for place, layer in enumerate(layers):
            milliseconds = [of_label[place].seconds * 1e3 for of_label in runs.values()]
            at = [k + width * (place - (len(layers) - 1) / 2) for k in range(len(runs))]
            drawn = bars.bar(at, milliseconds, width=width, color=plots.COLORS[layer], label=layer)
            bars.bar_label(drawn, fmt="%.0f", fontsize=14)
        counts = [counted(of_label[0]) for of_label in runs.values()]
        sizes.bar_label(sizes.bar(list(runs), counts, width=0.5, color=list(colors.values())), fontsize=15)
        bars.set_xticks(range(len(runs)), list(runs))
        bars.margins(y=0.3)
        sizes.margins(y=0.15)
        plots.style(bars, "Time of an epoch", "", "milliseconds (median)")
        plots.style(sizes, "Size: G H (I + H + 2)", "", "parameters of the layer", legend=False)

    def remarks(self, runs: Mapping[str, Sequence[lab.Run]]) -> list[str]:
        lines = []
        for label, (run, *_) in runs.items():
            inputs, hidden = 2, run.model.get_parameter("output.weight").shape[1]
            gates, said = GATES[run.task.cell], formula(run.task.cell, inputs, hidden)
            lines.append(
                f"{label}: G H (I + H + 2) = {gates} * {hidden} * ({inputs} + {hidden} + 2) = "
                f"{said:,} parameters in the recurrent layer, {counted(run):,} counted"
            )
        return lines


def counted(run: lab.Run) -> int:
    """Parameters of the recurrent layer."""
    return sum(weight.numel() for weight in run.model.get_submodule("recurrent").parameters())
