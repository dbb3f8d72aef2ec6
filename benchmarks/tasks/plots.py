"""The look of all plots, large enough to be read at half width, and the two panels that most of them share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

if TYPE_CHECKING:
    from benchmarks.tasks.lab import Run

COLORS = {"torch": "#f5a962", "fastcells": "#1f4e79", "reference": "#4f9d69"}
CELL_COLORS = {"rnn": "#c8553d", "gru": "#4f9d69", "lstm": "#1f4e79"}
GREY = "#8a8a8a"
DASHED: Any = (0, (2, 1.2))
# torch below, wide and pale; fastcells above, thin and dark: where the curves agree, both are seen.
WIDTHS = {"torch": 7, "fastcells": 2}


def formats() -> set[str]:
    """File name endings that `save` can write."""
    return set(Figure().canvas.get_supported_filetypes())


def new(title: str, width: float = 13, height: float = 6) -> Figure:
    """An empty figure with its title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=20)
    return figure


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def style(
    axes: Axes, title: str, x: str, y: str, legend: bool | dict[str, Any] = True, dashes: str | None = None
) -> None:
    """Title, labels with their units, and the legend of a panel.

    ``legend``: matplotlib's options for it, or none. ``dashes``: what they mean, where only solid lines have labels.
    """
    axes.set_title(title, fontsize=18)
    axes.set_xlabel(x, fontsize=17)
    axes.set_ylabel(y, fontsize=17)
    axes.tick_params(labelsize=15)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend is not False:
        handles, _ = axes.get_legend_handles_labels()
        if dashes:
            handles.append(Line2D([], [], color=GREY, linestyle=DASHED, linewidth=2.5, label=f"dashes: {dashes}"))
        options = legend if isinstance(legend, dict) else {}
        axes.legend(handles=handles, **{"fontsize": 15, "frameon": False, **options})


def logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, also where it spans less than a decade. Call it after drawing."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    some, many = (1.0, 2.0, 3.0, 5.0), (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 50 * low else some if high > 6 * low else many))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def heat(figure: Figure, axes: Axes, values: Any, title: str, x: str, y: str, unit: str, **options: Any) -> None:
    """A heat map [rows, columns] with its scale; ``options``: matplotlib's, for imshow."""
    image = axes.imshow(np.asarray(values), aspect="auto", interpolation="nearest", **options)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(unit, fontsize=15)
    bar.ax.tick_params(labelsize=13)
    style(axes, title, x, y, legend=False)
    axes.grid(False)


def whole_epochs(axes: Axes, count: int) -> None:
    """An axis of epochs 1 to ``count`` without fractions."""
    axes.set_xlim(0.4, count + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def losses(axes: Axes, runs: Sequence[Run], log: bool = False) -> None:
    """Loss by epoch of training and validation."""
    from benchmarks.tasks import lab

    few = len(runs[0].epochs) <= 20  # epochs: each gets a marker
    for run in runs:
        color, width = COLORS.get(run.name, GREY), WIDTHS.get(run.name, 2)
        for part, line in ("training", "solid"), ("validation", DASHED):
            values = [getattr(epoch, f"{part}_loss") for epoch in run.epochs]
            marker: dict[str, Any] = {"marker": "o", "markersize": width + 3} if few else {}
            if run.name not in WIDTHS:  # crosses on top of the lines
                line, marker = "none", {"marker": "x", "markersize": 10, "markeredgewidth": 2.5}
            label = run.name if part == "training" else None
            axes.plot(
                range(1, len(values) + 1), values, label=label, color=color, linestyle=line, linewidth=width, **marker
            )
    axes.set_yscale("log" if log else "linear")
    low, high = axes.get_ylim()
    room = 0.09 * (len(runs) + 1)  # for the legend above the curves
    axes.set_ylim(low, high * (high / low) ** room if log else high + (high - low) * room)
    if log:
        logarithmic(axes)
    apart = f": apart by at most {max(lab.loss_differences(*runs[:2])):.0e}" if len(runs) > 1 else ""
    unit, legend = runs[0].task.loss_unit, {"handlelength": 3, "loc": "upper right"}
    style(axes, "Loss" + apart, "epoch", f"mean loss ({unit})", legend, "validation")
    whole_epochs(axes, len(runs[0].epochs))


def metrics(axes: Axes, runs: Sequence[Run], label: str | None = None) -> None:
    """The metric by epoch, with the simple answers as lines across. ``label``: its name, if not the tables' own."""
    task, count = runs[0].task, len(runs[0].epochs)
    for run in runs:
        values = [epoch.metric for epoch in run.epochs]
        look: dict[str, Any] = {"color": COLORS.get(run.name, GREY), "linewidth": WIDTHS.get(run.name, 2)}
        axes.plot(range(1, count + 1), values, label=run.name, **look)
    for (name, value), line in zip(task.baselines.items(), ("dashed", "dotted", "dashdot"), strict=False):
        axes.axhline(value, color=GREY, linestyle=line, linewidth=2, label=name)
    if task.metric_format.endswith("%"):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    label = label or task.metric_name
    style(axes, f"Validation: {label}", "epoch", label)
    whole_epochs(axes, count)


def times(axes: Axes, runs: Sequence[Run]) -> None:
    """Seconds of training by epoch, as bars side by side."""
    from benchmarks.tasks import lab

    width = 0.8 / len(runs)
    for place, run in enumerate(runs):
        middles = [number + 1 + width * (place - (len(runs) - 1) / 2) for number in range(len(run.epochs))]
        color = COLORS.get(run.name, GREY)
        seconds = [epoch.seconds for epoch in run.epochs]
        axes.bar(middles, seconds, width=width, color=color, label=f"{run.name}, median {run.seconds:.2g} s")
    axes.margins(y=0.3)  # room for the legend
    ratio = f": {median(lab.speedups(*runs[:2])):.2f}x speed-up" if len(runs) > 1 else ""
    style(axes, "Time" + ratio, "epoch", "training epoch (seconds)", legend={"handlelength": 3})
    whole_epochs(axes, len(runs[0].epochs))
