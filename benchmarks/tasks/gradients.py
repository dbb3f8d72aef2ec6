"""Vanishing and exploding gradients (Bengio, Simard & Frasconi 1994), and what clipping does about the second kind.

The gradient of an answer at the end with respect to the input of an early step is a product with one Jacobian for each
step in between. Measured here for layers as they start out: the plain RNN's shrinks by some factor at each step, or
grows where the recurrent weights are large; the gated layers', whose gates start out open, stays. Then each cell, its
recurrent weights scaled up, learns the adding problem with its gradients as they are, and with their norm clipped to 1
(Pascanu, Mikolov & Bengio 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tasks import lab, plots
from benchmarks.tasks.layers import layer_class
from benchmarks.tasks.memory import Adding, Marked, adding

LENGTH = 20
GAIN = 2.0  # of the recurrent weights that start out large


class Large(Adding):
    """The adding problem with large recurrent weights; ``clip`` None leaves the gradients alone."""

    epochs = 12
    learning_rate = 2e-2

    def __init__(self, seed: int, cell: str, clip: float | None, batches: int = 25) -> None:
        super().__init__(seed, cell, LENGTH, batches)
        self.clip = inf if clip is None else clip

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        model = Marked(layer, self.length)
        with torch.no_grad():
            model.recurrent.get_parameter("weight_hh_l0").mul_(GAIN)
        return model


class Gradients(lab.Study):
    data_name = f"adding problem, {LENGTH} steps"
    headline = "GRU, clipped"

    def __init__(self, seed: int = 0, cell: str | None = None, batches: int = 25) -> None:
        self.seed = seed
        self.tasks = {
            f"{c.upper()}, {name}": Large(seed, c, clip, batches)
            for c in ([cell] if cell else plots.CELL_COLORS)
            for name, clip in (("clipped", 1.0), ("not clipped", None))
        }
        if cell:
            self.headline = f"{cell.upper()}, clipped"

    def plot(self, figure: Figure, runs: Mapping[str, Sequence[lab.Run]]) -> None:
        (through, norms), (without, clipped) = figure.subplots(2, 2)
        figure.set_size_inches(13, 11)
        layer = next(iter(runs.values()))[-1].name
        steps = torch.arange(LENGTH).flip(0)
        for cell, color in plots.CELL_COLORS.items():
            for gain, line in (1.0, "solid"), (GAIN, plots.DASHED):
                found = through_time(layer, cell, gain, self.seed)
                name = cell.upper() if gain == 1 else None
                through.plot(steps, found, linestyle=line, color=color, label=name, linewidth=2.5)
        plots.logarithmic(through)
        through.invert_xaxis()
        title, weights = "Before training", f"weights x {GAIN:g}"
        plots.style(through, title, "steps back from the answer", "gradient norm by input", dashes=weights)
        for label, (*_, run) in runs.items():
            color, name = plots.CELL_COLORS[run.task.cell], run.task.cell.upper()
            if "not" in label:
                norms.plot(run.norms, color=color, label=name, linewidth=1.5)
            axes = without if "not" in label else clipped
            for part, style in ("training", "solid"), ("validation", plots.DASHED):
                values = [getattr(epoch, f"{part}_loss") for epoch in run.epochs]
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    linestyle=style,
                    color=color,
                    label=name if part == "training" else None,
                    linewidth=2.5,
                )
        norms.axhline(1, color="black", linestyle="dashed", label="clipping cuts to this")
        plots.logarithmic(norms)
        plots.style(
            norms,
            "Not clipped: the norm, step by step",
            "step of training",
            "norm of all gradients",
            {"ncols": 2},
        )
        for axes, title in (without, "Not clipped"), (clipped, "Clipped to a norm of 1"):
            axes.axhline(1 / 6, color=plots.GREY, linestyle="dashdot", label="always 1")
            plots.logarithmic(axes)
            plots.style(axes, title, "epoch", "mean squared error", dashes="validation")
            plots.whole_epochs(axes, len(run.epochs))
        lowest, highest = (f(f(a.get_ylim()) for a in (without, clipped)) for f in (min, max))
        for axes in without, clipped:
            axes.set_ylim(lowest, highest)

    def remarks(self, runs: Mapping[str, Sequence[lab.Run]]) -> list[str]:
        lines = []
        for label, (*_, run) in runs.items():
            norms = torch.tensor(run.norms)
            lines.append(f"{label}: gradient norm {norms.median():.2g} (median), {norms.max():.2g} at most")
        layer = next(iter(runs.values()))[-1].name
        for cell in plots.CELL_COLORS:
            for gain in 1.0, GAIN:
                found = through_time(layer, cell, gain, self.seed)
                lines.append(
                    f"{cell.upper()}, recurrent weights x {gain:g}: gradient by the first input is "
                    f"{found[0] / found[-1]:.1e} of that by the last"
                )
        return lines


def through_time(layer: str, cell: str, gain: float, seed: int) -> list[float]:
    """Norm of the gradient of the last hidden state's sum by the input of each step, mean over a batch."""
    torch.manual_seed(seed)
    recurrent = Marked(layer_class(layer, cell), LENGTH).recurrent
    with torch.no_grad():
        recurrent.get_parameter("weight_hh_l0").mul_(gain)
    ((steps,), _) = adding(torch.Generator().manual_seed(seed), 64, LENGTH)
    steps.requires_grad_()
    hidden, _ = recurrent(steps)
    (found,) = torch.autograd.grad(hidden[:, -1].sum(), steps)
    return found.norm(dim=2).mean(dim=0).tolist()
