"""The commands of the suite: list, run, compare and report. `add` gives each its arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import CELLS, MODES, SUITES, Case


def add(commands: Any) -> None:
    """Add the four commands to a parser's subcommands."""
    parser = commands.add_parser("list", help="suites, cases, modes and providers")
    parser.add_argument("suite", metavar="SUITE", nargs="?", choices=list(SUITES), help="only the cases of this one")
    parser.set_defaults(run=run_list)

    parser = commands.add_parser("run", help="measure fastcells and its peers", description=MEASURED)
    parser.add_argument(
        "suite", metavar="SUITE", nargs="?", choices=list(SUITES), help="core (default), quick, scaling"
    )
    parser.add_argument("--quick", action="store_true", help="the suite quick, which ends within a minute")
    parser.add_argument("--cell", choices=CELLS, action="append", help="only this cell; may be repeated")
    parser.add_argument("--mode", choices=list(MODES), action="append", help="only this mode; may be repeated")
    parser.add_argument("--shape", metavar="N,T,I,H", action="append", help="only this shape; may be repeated")
    parser.add_argument("--provider", metavar="NAME", action="append", help="only this one and fastcells; see list")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="for every case (default: the case's own)")
    parser.add_argument("--seconds", type=number(float, 0), metavar="S", help="of samples, about, for each case")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/SUITE.jsonl")
    parser.add_argument("--gate", action="store_true", help="exit status 1 for a wrong answer or under a threshold")
    parser.add_argument("--geomean", type=number(float, 0), metavar="X", help="least geometric mean of the ratios")
    parser.add_argument("--worst", type=number(float, 0), metavar="Y", help="least of the ratios to the best peer")
    parser.set_defaults(run=run_run, fail=parser.error)

    parser = commands.add_parser("compare", help="what moved between two files of results, beyond the noise of both")
    parser.add_argument("before", type=Path, metavar="A")
    parser.add_argument("after", type=Path, metavar="B")
    parser.add_argument("--all", action="store_true", help="also what did not move")
    parser.set_defaults(run=run_compare, fail=parser.error)

    parser = commands.add_parser("report", help="Markdown and plots of a file of results")
    parser.add_argument("results", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: that of FILE, named like it")
    parser.set_defaults(run=run_report, fail=parser.error)


MEASURED = (
    "Each provider's answer is checked against float64, then all are timed in turn, round by round, in a process "
    "that is pinned to as many cores as the case has threads. Ratios are taken round by round, more than 1 where "
    "fastcells is better. The results grow line by line; Ctrl-C leaves those that are done."
)


def number(kind: type, least: float) -> Callable[[str], Any]:
    """An argument type: a number of at least `least`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} of at least {least}, got {text!r}")
        return value

    return parse


def run_list(arguments: argparse.Namespace) -> None:
    if arguments.suite is not None:
        for case in SUITES[arguments.suite]():
            print(case)
        return
    from benchmarks import providers

    for name, cases in SUITES.items():
        print(f"suite     {name:24} {len(cases())} cases")
    for name, mode in MODES.items():
        print(f"mode      {name:24} {mode.what}")
    for name, provider in providers.load().items():
        print(f"provider  {name:24} {provider.available() or 'ready'}")


def chosen(arguments: argparse.Namespace, suite: str) -> list[Case]:
    """The cases of a suite that the arguments leave, with their thread count. Ends the program if there are none."""
    from dataclasses import replace

    cases = SUITES[suite]()
    shapes = [text.replace(" ", "") for text in arguments.shape or []]
    for name, values in ("cell", arguments.cell), ("mode", arguments.mode), ("shape", shapes):
        if values:
            cases = [case for case in cases if getattr(case, name) in values]
    if not cases:
        arguments.fail(f"no case of the suite {suite} has this cell, mode and shape")
    if arguments.threads is not None:
        from benchmarks.machine import cores

        if arguments.threads > len(cores()):
            arguments.fail(
                f"argument --threads: expected at most the {len(cores())} cores here, got {arguments.threads}"
            )
        cases = list(dict.fromkeys(replace(case, threads=arguments.threads) for case in cases))
    return cases


def run_run(arguments: argparse.Namespace) -> int | None:
    if arguments.quick and arguments.suite not in (None, "quick"):
        arguments.fail(f"argument --quick: is the suite quick, got the suite {arguments.suite} too")
    suite = "quick" if arguments.quick else arguments.suite or "core"
    if not arguments.gate and (arguments.geomean is not None or arguments.worst is not None):
        arguments.fail("arguments --geomean and --worst: are thresholds of --gate, which is missing")
    cases = chosen(arguments, suite)
    from benchmarks import providers, results, runner, show

    names = None
    if arguments.provider:
        known = providers.load()
        unknown = [name for name in arguments.provider if name not in known]
        if unknown:
            arguments.fail(f"argument --provider: expected one of {', '.join(known)}, got {unknown[0]!r}")
        names = [name for name in known if name == providers.OURS or name in arguments.provider]
    out = arguments.out or Path("results") / f"{suite}.jsonl"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("w")
    except OSError as error:
        arguments.fail(f"argument --out: cannot write {str(out)!r}: {error.strerror}")
    seconds = (1.0 if suite == "quick" else 3.0) if arguments.seconds is None else arguments.seconds
    measured = results.Results({}, [])
    stopped = False
    with file, show.Progress(len(cases)) as progress:
        try:
            for text in runner.run(cases, names, suite, seconds, progress.done):
                file.write(text)
                file.flush()
                row = measured.add(text)
                if row is not None:
                    progress.now(row.case)
        except KeyboardInterrupt:
            stopped = True
        except runner.Broken as error:
            sys.exit(f"{error}; what was measured before is in {os.fspath(out)}")
    show.results(measured)
    print(f"results: {os.fspath(out)}" + (", up to where it was stopped" if stopped else ""))
    if stopped:
        return 130
    if arguments.gate:
        found = results.gate(measured, arguments.geomean, arguments.worst)
        print("\n".join(f"gate: {reason}" for reason in found) or "gate: passed")
        return 1 if found else 0
    return None


def read(arguments: argparse.Namespace, path: Path) -> Any:
    from benchmarks import results

    try:
        return results.read(path)
    except OSError as error:
        arguments.fail(f"cannot read {str(path)!r}: {error.strerror}")
    except ValueError as error:
        arguments.fail(str(error))


def run_compare(arguments: argparse.Namespace) -> None:
    from benchmarks import results, show

    moves = results.compare(read(arguments, arguments.before), read(arguments, arguments.after))
    if not moves:
        arguments.fail("the two files have no measurement in common")
    show.moves(moves, everything=arguments.all)


def run_report(arguments: argparse.Namespace) -> None:
    from benchmarks import report

    measured = read(arguments, arguments.results)
    folder = arguments.out or arguments.results.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in report.write(measured, folder):
            print(path)
    except OSError as error:
        arguments.fail(f"cannot write {str(folder)!r}: {error.strerror}")
