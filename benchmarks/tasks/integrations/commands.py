"""The part of the command ``tasks`` that trains libraries' models, and the table of what came of it."""

from __future__ import annotations

import argparse
import sys
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks import extras
from benchmarks.tasks import integrations
from benchmarks.tasks.commands import check_table

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.tasks.integrations.training import Comparison, Integration

EPOCHS = 6
HEADINGS = ["library", "model", "loss: torch.nn", "converted", "difference", "an epoch: torch.nn, s", "converted, s"]
HEADINGS += ["speed-up"]


def run(arguments: argparse.Namespace) -> int | None:
    """Train one library's model, or those of all; exit status 1 where one of them cannot be imported."""
    for option in ("layer", "cell", "plot", "data", "pooling", "text"):
        if getattr(arguments, option) is not None:
            arguments.fail(f"argument --{option}: {arguments.name} has no such option")
    check_table(arguments)

    import torch
    from rich.console import Console

    from benchmarks.tasks import show

    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(arguments.threads)
    names = list(integrations.LIBRARIES) if arguments.name == integrations.ALL else [arguments.name]
    began, comparisons, missing = perf_counter(), [], 0
    for name in names:
        try:
            kind = integrations.load(name)
        except ImportError as error:
            said = extras.hint(error) or f"cannot be imported: {error}"
            print(f"{name}: {said}\n", file=sys.stderr)
            missing = 1
            continue
        comparisons.append(run_one(console, name, kind, arguments.epochs or EPOCHS, arguments.seed))
    if not comparisons:
        return missing
    table = show.markdown(map(row, comparisons), HEADINGS, words=2)
    console.print(table, markup=False)
    console.print(f"in all: {(perf_counter() - began) / 60:.1f} minutes")
    if arguments.table:
        show.write_table(table, arguments.table, "integrations")
        console.print(f"table: {arguments.table}")
    return missing


def run_one(console: Console, name: str, kind: type[Integration], epochs: int, seed: int) -> Comparison:
    """Train a library's model without and with fastcells, and show it by epoch."""
    from benchmarks.tasks.integrations.training import compare

    console.print(f"[bold]{name}[/]: {integrations.LIBRARIES[name]}")
    for number, comparison in enumerate(compare(name, kind, epochs, seed), start=1):
        if number == 1:
            console.print(str(comparison.conversion), markup=False)
        (before, after), p, q = comparison.losses(), comparison.before[-1], comparison.after[-1]
        compiled = " (the first: kernels are compiled)" if number == 1 else ""
        console.print(
            f"epoch {number}: loss {before:.6g}, converted {after:.6g}; "
            f"{p.seconds:.2f} s, converted {q.seconds:.2f} s{compiled}"
        )
    console.print(f"largest difference of a step's losses, relative: {comparison.difference():.0e}\n")
    return comparison


def row(comparison: Comparison) -> list[str]:
    """A line of the table: the losses of the last epoch, the times of the usual one."""
    (before, after), (slow, fast) = comparison.losses(), comparison.seconds()
    losses = [f"{before:.6g}", f"{after:.6g}", f"{comparison.difference():.0e}"]
    return [f"`{comparison.name}`", comparison.model_name, *losses, f"{slow:.3g}", f"{fast:.3g}", f"{slow / fast:.2f}"]
