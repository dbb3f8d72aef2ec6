"""The command line: ``python -m benchmarks run`` measures, ``python -m benchmarks tasks NAME`` trains; see --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import commands as suite
from benchmarks import tasks


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows what there is)\n")


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


def add_tasks(commands: argparse._SubParsersAction[Parser]) -> None:
    """``tasks``: real training runs."""
    parser = commands.add_parser(
        "tasks",
        help="train a small real model with torch.nn and with fastcells",
        description=tasks.__doc__,
        epilog="tasks: " + "; ".join(f"{name}: {what}" for name, what in tasks.TASKS.items()),
    )
    parser.add_argument("name", metavar="NAME", nargs="?", choices=list(tasks.TASKS), help="without it: list the tasks")
    parser.add_argument("--layer", choices=["torch", "fastcells"], help="only this one (default: both, in turn)")
    parser.add_argument("--cell", choices=["lstm", "gru", "rnn"], default="lstm", help="default: lstm")
    parser.add_argument("--epochs", type=whole(1, 10_000), metavar="N", help="default: the task's own")
    seeded = "of split, weights, batches and dropout; default: 0"
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, metavar="N", help=seeded)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="default: results/NAME.png")
    # One by default: a team of threads waits for its slowest, and on a busy machine that makes any time possible.
    parser.add_argument("--threads", type=whole(1, 1024), default=1, metavar="N", help="of either layer; default: 1")
    parser.set_defaults(run=run_tasks, fail=parser.error)


def run_tasks(arguments: argparse.Namespace) -> None:
    """Train, and show table, closing lines and plot."""
    if arguments.name is None:
        for name, what in tasks.TASKS.items():
            print(f"{name:12} {what}")
        return

    import torch
    from rich.console import Console

    from benchmarks.tasks import lab, show

    plot = arguments.plot or Path("results") / f"{arguments.name}.png"
    if plot.suffix[1:].lower() not in show.formats():
        arguments.fail(f"argument --plot: cannot write {str(plot)!r}; endings: {', '.join(sorted(show.formats()))}")
    try:  # now, rather than after the training
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.open("ab").close()
    except OSError as error:
        arguments.fail(f"argument --plot: cannot write {str(plot)!r}: {error.strerror}")
    torch.set_num_threads(arguments.threads)

    console = Console(highlight=False, soft_wrap=True)
    task = tasks.load(arguments.name)(arguments.seed)
    epochs = arguments.epochs or task.epochs
    threads = "1 thread" if arguments.threads == 1 else f"{arguments.threads} threads"
    console.print(f"{arguments.name}: {tasks.TASKS[arguments.name]}\n{task.facts}")
    console.print(f"epochs: {epochs}, cell: {arguments.cell}, seed: {arguments.seed}, {threads}\n")
    layers = [arguments.layer] if arguments.layer else list(lab.LAYERS)
    runs = lab.prepare(task, layers, arguments.cell, arguments.seed)
    show.progress(console, runs, epochs, arguments.seed)
    show.plot(runs, f"{arguments.name}: {arguments.cell.upper()}, {threads}", plot)
    console.print(f"\n{show.summary(runs)}\nplot: {plot}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit status 2 where the arguments are bad, 1 where a package is missing."""
    parser = Parser(prog="python -m benchmarks", description="Training runs and measurements of fastcells.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    suite.add(commands)
    add_tasks(commands)
    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in {"torch", "numpy", "numba", "matplotlib", "rich"}:
            raise
        sys.exit(f"{package} is not installed: pip install .[bench]")
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
