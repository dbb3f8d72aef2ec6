"""What a training looks like: a table that grows by epoch, a few closing lines, and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.tasks import lab

COLORS = {"torch": "#f5a962", "fastcells": "#1f4e79"}
# torch below, wide and pale; fastcells above, thin and dark: where the curves agree, both are seen.
WIDTHS = {"torch": 7, "fastcells": 2}


def formats() -> set[str]:
    """File name endings that ``plot`` can write."""
    return set(Figure().canvas.get_supported_filetypes())


def table(runs: Sequence[lab.Run]) -> Table:
    """One row an epoch; for each quantity, the runs side by side. Fits 80 columns."""
    task = runs[0].task
    quantities: dict[str, Callable[[lab.Epoch], str]] = {
        "training\nloss": lambda epoch: f"{epoch.training_loss:.4f}",
        "valid.\nloss": lambda epoch: f"{epoch.validation_loss:.4f}",
        f"valid.\n{task.metric_name}": lambda epoch: f"{epoch.metric:{task.metric_format}}",
        "time,\nseconds": lambda epoch: f"{epoch.seconds:.2f}",
    }
    grid = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    headings = ["\n\n#"]
    # The name of a quantity stands over the last of its columns, which is the widest.
    headings += [f"{quantity if run is runs[-1] else chr(10)}\n{run.name}" for quantity in quantities for run in runs]
    columns = [[str(number) for number in range(1, len(runs[-1].epochs) + 1)]]
    columns += [[show(epoch) for epoch in run.epochs] for show in quantities.values() for run in runs]
    if len(runs) == 2:
        headings += ["\nspeed\nratio", "\nloss\ndiff."]
        columns += [[f"{ratio:.2f}x" for ratio in lab.speedups(*runs)]]
        columns += [[f"{difference:.0e}" for difference in lab.loss_differences(*runs)]]
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in zip(*columns, strict=True):
        grid.add_row(*row)
    return grid


def summary(runs: Sequence[lab.Run]) -> str:
    """The closing lines."""
    task = runs[0].task
    metric = f"{{:{task.metric_format}}}".format
    lines = [f"{task.metric_name}: {task.baseline_name} {metric(task.baseline)}"]
    for run in runs:
        lines[0] += f", {run.name} {metric(run.epochs[-1].metric)}"
        startup = f"import, compilation and first call before that: {run.startup:.1f} s"
        lines.append(f"{run.name}: {run.seconds:.2f} s an epoch (median); {startup}")
    if len(runs) == 2:
        ratios = lab.speedups(*runs)
        lines.append(
            f"speed-up of the whole training step: {median(ratios):.2f}x, median of {len(ratios)} pairs of epochs "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
        lines.append(f"largest difference of the losses: {max(lab.loss_differences(*runs)):.1e}")
    return "\n".join(lines)


def progress(console: Console, runs: Sequence[lab.Run], epochs: int, seed: int) -> None:
    """Train, with the table growing over a progress bar."""
    steps = epochs * len(runs) * len(runs[0].task.training(seed))
    bar = Progress(TextColumn("training"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    step = bar.add_task("", total=steps)
    shown = perf_counter()

    # Drawn only between steps, never by a thread of its own: that would run inside the time measured.
    with Live(bar, console=console, auto_refresh=False, transient=True) as live:

        def tick() -> None:
            nonlocal shown
            bar.advance(step)
            if perf_counter() - shown > 0.25:
                live.refresh()
                shown = perf_counter()

        for _ in lab.train(runs, epochs, seed, tick):
            live.update(Group(table(runs), "", bar), refresh=True)
    console.print(table(runs))


def plot(runs: Sequence[lab.Run], title: str, path: Path) -> None:
    """Loss and time by epoch, in two panels."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(title, fontsize=20)
    losses, times = figure.subplots(1, 2)
    numbers = range(1, len(runs[0].epochs) + 1)
    for place, run in enumerate(runs):
        color, width = COLORS[run.name], WIDTHS[run.name]
        for part, line in ("training", "solid"), ("validation", (0, (2, 1.2))):
            values = [getattr(epoch, f"{part}_loss") for epoch in run.epochs]
            look = {"linestyle": line, "linewidth": width, "marker": "o", "markersize": width + 3}
            losses.plot(numbers, values, label=f"{run.name}, {part}", color=color, **look)
        middles = [number + 0.4 * (place - (len(runs) - 1) / 2) for number in numbers]
        seconds = [epoch.seconds for epoch in run.epochs]
        times.bar(middles, seconds, width=0.4, color=color, label=f"{run.name}, median {run.seconds:.2f} s")
    losses.set_title("Loss" + (f": apart by at most {max(lab.loss_differences(*runs)):.0e}" if len(runs) == 2 else ""))
    losses.set_ylabel("mean loss (nats)")
    times.set_title("Time" + (f": {median(lab.speedups(*runs)):.2f}x speed-up" if len(runs) == 2 else ""))
    times.set_ylabel("training epoch (seconds)")
    times.margins(y=0.3)  # room for the legend
    for panel in losses, times:
        panel.title.set_fontsize(19)
        panel.set_xlabel("epoch", fontsize=17)
        panel.yaxis.label.set_fontsize(17)
        panel.tick_params(labelsize=15)
        panel.set_xlim(0.4, len(numbers) + 0.6)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=15, frameon=False, handlelength=3)
    figure.savefig(path, dpi=100)
