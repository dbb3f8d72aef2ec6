"""The command ``tasks``: train one task, or all of them, and show tables, closing lines and plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks import extras, tasks
from benchmarks.machine import cores
from benchmarks.tasks import integrations

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.tasks import lab, show

#: Layers that `all` compares. The reference takes minutes for what the others do in seconds: it trains one epoch.
ALL_LAYERS = ("torch", "fastcells", "reference")


def add(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser = commands.add_parser(
        "tasks",
        help="train small real models with torch.nn and with fastcells",
        description=tasks.__doc__,
        epilog=f"tasks: {_listed(tasks.TASKS)}. Libraries' models, before and after fastcells.convert: "
        f"{_listed(integrations.LIBRARIES)}.",
    )
    listed = f"one of those below; all: of the tasks; {integrations.ALL}: of the libraries; without it: list them"
    names = [*tasks.TASKS, "all", *integrations.LIBRARIES, integrations.ALL]
    parser.add_argument("name", metavar="NAME", nargs="?", choices=names, help=listed)
    layers = (
        "only this one; may be repeated; beside others the reference trains one epoch (default: torch and fastcells)"
    )
    parser.add_argument("--layer", choices=ALL_LAYERS, action="append", help=layers)
    cells = "lstm, gru or rnn, for forecast also relu-lstm (default: the task's own)"
    parser.add_argument("--cell", metavar="NAME", help=cells)
    parser.add_argument("--epochs", type=whole(1, 10_000), metavar="N", help="default: the task's own")
    seeded = "of split, weights, batches and dropout; default: 0"
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help=seeded)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: results/NAME.png; for all: a folder")
    # One by default: a team of threads waits for its slowest, and on a busy machine that makes any time possible.
    parser.add_argument("--threads", type=whole(1, 1 << 20), default=1, metavar="N", help="of either layer; default: 1")
    table = "write the Markdown table of results to it, or between its marks where it has them"
    parser.add_argument("--table", type=Path, metavar="FILE", help=table)
    for name, what in OPTIONS.items():
        parser.add_argument(f"--{name}", help=what)
    parser.set_defaults(run=run, fail=parser.error)


def _listed(names: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {what}" for name, what in names.items())


#: Options that only some tasks have; each task says which, and what they may be.
OPTIONS = {
    "data": "the series of forecast and compare: sunspots, co2 or sine",
    "pooling": "over time, of sentiment: mean, last or attention",
    "text": "what states reads",
}


def whole(least: int, most: int) -> Callable[[str], int]:
    """An argument type: a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r}")
        return number

    return parse


def run(arguments: argparse.Namespace) -> int | None:
    """Train what is asked for; exit status 1 where a task of `all` lacks a package."""
    if arguments.name is None:
        for name, what in (tasks.TASKS | integrations.LIBRARIES).items():
            print(f"{name:20} {what}")
        return None
    if arguments.threads > len(cores()):  # which would wait for each other
        arguments.fail(f"argument --threads: expected at most the {len(cores())} cores here, got {arguments.threads}")
    if arguments.name in (*integrations.LIBRARIES, integrations.ALL):
        from benchmarks.tasks.integrations import commands

        return commands.run(arguments)

    import torch
    from rich.console import Console

    from benchmarks.tasks import show

    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(arguments.threads)
    everything = arguments.name == "all"
    names = list(tasks.TASKS) if everything else [arguments.name]
    folder = (arguments.plot or Path("results")) if everything else None
    files = {
        name: folder / f"{name}.png" if folder else arguments.plot or Path(f"results/{name}.png") for name in names
    }
    for path in files.values():
        check_plot(arguments, path)
    check_table(arguments)
    options = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    if everything and options:
        arguments.fail(f"argument --{next(iter(options))}: not for all tasks")
    if not everything or arguments.cell is not None:
        for name in names:
            _check_options(arguments, name, options)
    began, rows, missing = perf_counter(), [], 0
    for name in names:
        try:
            rows.append(run_one(console, name, arguments, options, files[name]))
        except ModuleNotFoundError as error:
            if not everything:
                raise
            print(f"{name}: {extras.hint(error) or error}\n", file=sys.stderr)
            missing = 1
    table = show.markdown([row.cells() for row in rows])
    if everything:
        console.print(table)
        console.print(f"all tasks: {(perf_counter() - began) / 60:.1f} minutes")
    if arguments.table:
        show.write_table(table, arguments.table)
        console.print(f"table: {arguments.table}")
    return missing


def run_one(
    console: Console, name: str, arguments: argparse.Namespace, options: dict[str, str], path: Path
) -> show.Row:
    """Train one task or study with every layer, and show what came of it."""
    from benchmarks.tasks import lab, plots, show

    try:
        lesson = tasks.load(name)(seed=arguments.seed, cell=arguments.cell, **options)
    except ValueError as error:  # an option that is no choice of a few
        arguments.fail(f"argument --{error}")
    parts = lesson.tasks if isinstance(lesson, lab.Study) else {"": lesson}
    layers = list(dict.fromkeys(arguments.layer or ())) or (
        ALL_LAYERS if arguments.name == "all" and lesson.with_reference else lesson.layers
    )
    first = next(iter(parts.values()))
    epochs = arguments.epochs or first.epochs
    threads = "1 thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    console.print(f"[bold]{name}[/]: {tasks.TASKS[name]}\n{first.facts}")
    cells = "cell: " + first.cell if len(parts) == 1 else "parts: " + ", ".join(parts)
    console.print(f"epochs: {epochs}, {cells}, seed: {arguments.seed}, {threads}\n")
    runs: dict[str, Sequence[lab.Run]] = {}
    try:
        for label, task in parts.items():
            runs[label] = lab.prepare(task, layers)
            for run in runs[label]:
                if run.name == "reference" and len(layers) > 1 and "reference" not in lesson.layers:
                    run.limit = 1
            show.progress(console, runs[label], epochs, by_epoch=len(parts) == 1)
        console.print(show.results(runs), "")
        figure = plots.new(f"{name}: {'' if len(parts) > 1 else first.cell.upper() + ', '}{threads}")
        # What stopped early has learned too little to be shown.
        full = {label: [run for run in part if len(run.epochs) == epochs] for label, part in runs.items()}
        if isinstance(lesson, lab.Study):
            remarks = lesson.remarks(full)
            lesson.plot(figure, full)
        else:
            remarks = lesson.remarks(full[""])
            lesson.plot(figure, full[""])
    finally:
        for part in runs.values():
            for run in part:
                run.close()
    plots.save(figure, path)
    headline = lesson.headline if isinstance(lesson, lab.Study) else ""
    lines = [*show.summary(runs[headline]), *remarks, f"plot: {path}"]
    console.print("\n".join(lines) + "\n", markup=False)
    seconds = {
        run.name: sum(epoch.seconds for part in runs.values() for r in part if r.name == run.name for epoch in r.epochs)
        for run in runs[headline]
        if run.name in ("torch", "fastcells")
    }
    return show.Row(name, lesson.data_name, parts[headline], runs[headline], seconds)


def check_plot(arguments: argparse.Namespace, path: Path) -> None:
    """Refuse a file that cannot be written now, rather than after the training."""
    from benchmarks.tasks import plots

    if path.suffix[1:].lower() not in plots.formats():
        arguments.fail(f"argument --plot: cannot write {str(path)!r}; endings: {', '.join(sorted(plots.formats()))}")
    _check_writable(arguments, "plot", path)


def check_table(arguments: argparse.Namespace) -> None:
    """The same for the table's file, which may have text around it."""
    if arguments.table is None:
        return
    _check_writable(arguments, "table", arguments.table)
    try:
        arguments.table.read_text(encoding="utf-8")
    except ValueError:
        arguments.fail(f"argument --table: {str(arguments.table)!r} is no text in UTF-8")


def _check_writable(arguments: argparse.Namespace, option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        arguments.fail(f"argument --{option}: cannot write {str(path)!r}: {error.strerror}")


def _check_options(arguments: argparse.Namespace, name: str, options: dict[str, str]) -> None:
    """Refuse an option that the task does not have, or a value that is none of its choices."""
    lesson = tasks.load(name)
    if arguments.cell is not None and arguments.cell not in lesson.cells:
        arguments.fail(f"argument --cell: invalid choice: {arguments.cell!r} (choose from {', '.join(lesson.cells)})")
    if arguments.cell not in (None, "lstm", "gru", "rnn") and "reference" in (arguments.layer or ()):
        arguments.fail(f"argument --layer: the reference has no {arguments.cell}")
    known = lesson.options
    for option, value in options.items():
        if option not in known:
            arguments.fail(f"argument --{option}: {name} has no such option")
        if known[option] and value not in known[option]:
            arguments.fail(f"argument --{option}: invalid choice: {value!r} (choose from {', '.join(known[option])})")
