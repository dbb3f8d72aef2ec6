"""What a training looks like: a table that grows by epoch, a table of results, a few closing lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.tasks import lab

#: Rows of the growing table: of longer trainings, the first epoch and then every so many.
ROWS = 10


def number(value: float, task: lab.Task) -> str:
    """The task's metric as it is read."""
    return f"{value:{task.metric_format}}"


def table(runs: Sequence[lab.Run], epochs: int) -> Table:
    """One row an epoch; for each quantity, the runs side by side. Fits 80 columns."""
    task = runs[0].task
    runs = [run for run in runs if run.limit >= epochs][:2]
    quantities: dict[str, Callable[[lab.Epoch], str]] = {
        "training\nloss": lambda epoch: _short(epoch.training_loss),
        "valid.\nloss": lambda epoch: _short(epoch.validation_loss),
        f"valid.\n{task.metric_name}": lambda epoch: number(epoch.metric, task),
        "time,\nseconds": lambda epoch: f"{epoch.seconds:.2f}",
    }
    grid = _grid()
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
    every = max(1, epochs // ROWS)
    for at, row in enumerate(zip(*columns, strict=True), start=1):
        if at == 1 or at % every == 0 or at == epochs:
            grid.add_row(*row)
    return grid


def results(runs: Mapping[str, Sequence[lab.Run]]) -> Table:
    """One row for each run of each part: what it reached, in what time, and how far from the first run's losses."""
    grid = _grid()
    task = next(iter(runs.values()))[0].task
    headings = [*([""] if len(runs) > 1 else []), "layer", "parameters", "epochs", "valid.\nloss"]
    headings += [f"valid.\n{task.metric_name}", "seconds\nan epoch", "speed\nratio", "loss\ndiff."]
    for at, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if at < len(headings) - 7 else "right", no_wrap=True)
    for label, part in runs.items():
        first = part[0]
        for run in part:
            last = run.epochs[-1]
            row = [label if run is first else ""] if len(runs) > 1 else []
            row += [run.name, f"{parameter_count(run):,}", str(len(run.epochs)), f"{last.validation_loss:.3g}"]
            row += [number(last.metric, run.task), f"{run.seconds:.3g}"]
            if run is first:
                row += ["", ""]
            else:
                row += [f"{median(lab.speedups(first, run)):.2f}x", f"{max(lab.loss_differences(first, run)):.0e}"]
            grid.add_row(*row)
    return grid


def parameter_count(run: lab.Run) -> int:
    """Of the whole model."""
    return sum(parameter.numel() for parameter in run.model.parameters())


def summary(runs: Sequence[lab.Run]) -> list[str]:
    """The closing lines on one task."""
    task = runs[0].task
    simple = ", ".join(f"{name} {number(value, task)}" for name, value in task.baselines.items())
    lines = [f"{task.metric_name} of simple answers: {simple}"]
    startups = ", ".join(f"{run.name} {run.startup:.1f} s" for run in runs)
    lines.append(f"import, compilation and first call, before the times above: {startups}")
    full = [run for run in runs if len(run.epochs) == len(runs[0].epochs)]
    for run in full[1:]:
        ratios = lab.speedups(full[0], run)
        lines.append(
            f"speed-up of the whole training step, {run.name} over {full[0].name}: {median(ratios):.2f}x, median of "
            f"{len(ratios)} pairs of epochs ({min(ratios):.2f} to {max(ratios):.2f})"
        )
        target, a, b = lab.seconds_to_same(full[0], run)
        lines.append(
            f"{task.metric_name} {number(target, task)} is reached after {a:.3g} s with {full[0].name}, "
            f"{b:.3g} s with {run.name}"
        )
    for run in runs[1:]:
        differences = lab.loss_differences(runs[0], run)
        lines.append(
            f"largest difference of the losses, {run.name} to {runs[0].name}: {max(differences):.1e} "
            f"over {len(differences)} epochs"
        )
    return lines


def progress(console: Console, runs: Sequence[lab.Run], epochs: int, by_epoch: bool = True) -> None:
    """Train, with the table growing over a progress bar."""
    passes = sum(int(min(run.limit, epochs)) for run in runs)
    bar = Progress(TextColumn("training"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    step = bar.add_task("", total=passes * len(runs[0].task.training(0)))
    shown = perf_counter()

    # Drawn only between steps, never by a thread of its own: that would run inside the time measured.
    with Live(bar, console=console, auto_refresh=False, transient=True) as live:

        def tick() -> None:
            nonlocal shown
            bar.advance(step)
            if perf_counter() - shown > 0.25:
                live.refresh()
                shown = perf_counter()

        for _ in lab.train(runs, epochs, tick):
            if by_epoch:
                live.update(Group(table(runs, epochs), "", bar), refresh=perf_counter() - shown > 0.25)
    if by_epoch:
        console.print(table(runs, epochs), "")


@dataclass(frozen=True)
class Row:
    """A line of the table of all tasks."""

    name: str
    data: str
    task: lab.Task
    runs: Sequence[lab.Run]  # those of the part that speaks for the metric
    seconds: Mapping[str, float]  # of training, by layer, over all parts

    def cells(self) -> list[str]:
        by_name = {run.name: run for run in self.runs}
        name, value = next(iter(self.task.baselines.items()))
        reached = " / ".join(number(by_name[layer].epochs[-1].metric, self.task) for layer in self.seconds)
        times = [f"{self.seconds[layer]:.3g}" if layer in self.seconds else "" for layer in ("torch", "fastcells")]
        ratio = f"{self.seconds['torch'] / self.seconds['fastcells']:.2f}" if all(times) else ""
        metric = f"{self.task.metric_name} {reached}"
        return [f"`{self.name}`", self.data, metric, f"{name} {number(value, self.task)}", *times, ratio]


HEADINGS = ["task", "data", "metric: torch.nn / fastcells", "to beat", "torch.nn, s", "fastcells, s", "speed-up"]


def markdown(rows: Iterable[Sequence[str]], headings: Sequence[str] = HEADINGS, words: int = 4) -> str:
    """A table for a README, by default that of all tasks; the columns after the first ``words`` have numbers."""
    lines = [headings, ["---"] * words + ["--:"] * (len(headings) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def marks(name: str) -> tuple[str, str]:
    """The lines of a file between which the table of this name belongs."""
    return f"<!-- {name} table -->\n", f"<!-- end of {name} table -->"


def write_table(text: str, path: Path, name: str = "lab") -> None:
    """Write the table to a file of its own, or between its two marks where the file has them, such as a README."""
    first, last = marks(name)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    before, begin, rest = old.partition(first)
    _, end, after = rest.partition(last)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}" if end else text, encoding="utf-8")


def _short(loss: float) -> str:
    """In five characters, so that the table fits."""
    return f"{loss:.3f}" if loss >= 0.01 else f"{loss:.0e}"


def _grid() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
