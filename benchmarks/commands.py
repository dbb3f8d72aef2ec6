"""The commands of the suite: list, run, compare, report and figures. `add` gives each its arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import CELLS, FIGURES, MODES, PLAIN, SUITES, Case


def add(commands: Any) -> None:
    """Add the commands to a parser's subcommands."""
    parser = commands.add_parser("list", help="suites, cases, modes and providers")
    parser.add_argument("suite", metavar="SUITE", nargs="?", choices=list(SUITES), help="only the cases of this one")
    parser.set_defaults(run=run_list)

    parser = commands.add_parser("run", help="measure fastcells and its peers", description=MEASURED)
    parser.add_argument(
        "suite", metavar="SUITE", nargs="?", choices=list(SUITES), help=f"{', '.join(SUITES)}; default: core"
    )
    parser.add_argument("--quick", action="store_true", help="the suite quick, which ends within a minute")
    parser.add_argument("--cell", choices=list(CELLS), action="append", help="only this cell; may be repeated")
    parser.add_argument("--mode", choices=list(MODES), action="append", help="only this mode; may be repeated")
    parser.add_argument(
        "--shape", type=shape, metavar="N,T,I,H", action="append", help="only this one, or a new one; may be repeated"
    )
    parser.add_argument("--provider", metavar="NAME", action="append", help="only this one and fastcells; see list")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="for every case (default: the case's own)")
    parser.add_argument("--dtype", choices=["float32", "float64"], help="only this one")
    parser.add_argument("--minutes", type=number(float, 0), metavar="M", help="to take; default: the suite's own")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/SUITE.jsonl")
    parser.add_argument("--gate", action="store_true", help="exit status 1 for a wrong answer or under a threshold")
    parser.add_argument("--geomean", type=number(float, 0), metavar="X", help="least geometric mean of the ratios")
    parser.add_argument("--worst", type=number(float, 0), metavar="Y", help="least of the ratios to the best peer")
    parser.set_defaults(run=run_run, fail=parser.error)

    parser = commands.add_parser("compare", help="what moved between two files of results, beyond the noise of both")
    parser.add_argument("before", type=Path, metavar="A", help="results of run, before a change")
    parser.add_argument("after", type=Path, metavar="B", help="and after it")
    parser.add_argument("--all", action="store_true", help="also what did not move")
    steady = "provider by whose time all others are divided, so that the machine's own drift cancels out"
    parser.add_argument("--reference", metavar="NAME", default="torch.nn", help=f"{steady}; default: torch.nn")
    parser.add_argument("--absolute", action="store_true", help="times as they are, with the machine's drift")
    parser.set_defaults(run=run_compare, fail=parser.error)

    parser = commands.add_parser("report", help="Markdown and plots of a file of results")
    parser.add_argument("results", type=Path, metavar="FILE", help="results of run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: that of FILE, named like it")
    parser.set_defaults(run=run_report, fail=parser.error)

    parser = commands.add_parser("figures", help="measure anew, and renew the tables and plots that the README shows")
    parser.add_argument("name", metavar="NAME", choices=FIGURES, help=f"one of {', '.join(FIGURES)}")
    parser.add_argument("--results", type=Path, metavar="FILE", help="draw these results instead of measuring")
    parser.set_defaults(run=run_figures, fail=parser.error)


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
        for case in SUITES[arguments.suite].cases():
            print(case)
        return
    from benchmarks import providers

    for name, suite in SUITES.items():
        print(f"suite     {name:24} {suite.what}: {len(suite.cases())} cases, some {suite.minutes:g} minutes")
    for name, kind in CELLS.items():
        print(f"cell      {name:24} {'torch.nn has it' if kind.plain is None else 'a variant of ' + kind.plain}")
    for name, mode in MODES.items():
        print(f"mode      {name:24} {mode.what}")
    for name, provider in providers.load().items():
        print(f"provider  {name:24} {provider.available() or 'ready'}")


def shape(text: str) -> tuple[int, ...]:
    """An argument type: N,T,I,H."""
    parts = text.replace(" ", "").split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected N,T,I,H, four whole numbers of at least 1, got {text!r}")
    return tuple(map(int, parts))


def chosen(arguments: argparse.Namespace, suite: str) -> list[Case]:
    """The cases of a suite that the arguments leave, with their thread count. Ends the program if there are none."""
    cases = SUITES[suite].cases()
    if arguments.shape:
        new = [shape for shape in arguments.shape if shape not in {(c.N, c.T, c.I, c.H) for c in cases}]
        modes, cells = arguments.mode or ("inference", "training"), arguments.cell or PLAIN
        cases = [case for case in cases if (case.N, case.T, case.I, case.H) in arguments.shape]
        dtype = arguments.dtype or "float32"
        cases += [Case(cell, n, t, i, h, mode, dtype) for mode in modes for n, t, i, h in new for cell in cells]
    dtypes = [arguments.dtype] if arguments.dtype else []
    for name, values in ("cell", arguments.cell), ("mode", arguments.mode), ("dtype", dtypes):
        if values:
            cases = [case for case in cases if getattr(case, name) in values]
    if not cases:
        arguments.fail(f"no case of the suite {suite} has this cell, mode, dtype and shape")
    return at_threads(list(dict.fromkeys(cases)), arguments)


def at_threads(cases: list[Case], arguments: argparse.Namespace) -> list[Case]:
    """The cases with the thread count that the arguments give."""
    from dataclasses import replace

    if arguments.threads is None:
        return cases
    from benchmarks.machine import cores

    if arguments.threads > len(cores()):
        arguments.fail(f"argument --threads: expected at most the {len(cores())} cores here, got {arguments.threads}")
    return list(dict.fromkeys(replace(case, threads=arguments.threads) for case in cases))


def check_memory(cases: list[Case], providers: int, arguments: argparse.Namespace) -> None:
    """Ends the program where the arrays of a case are larger than the machine's memory."""
    from fastcells import roof
    from fastcells.profile.words import quantity

    there_is = roof.memory()
    largest = max(cases, key=lambda case: case.bytes(providers))
    needed = largest.bytes(providers)
    if there_is is not None and needed > there_is:
        of, most = quantity(needed, 1024), quantity(there_is, 1024)
        arguments.fail(f"argument --shape: {largest} needs about {of}B of memory, and there is {most}B")


def minutes(cases: list[Case], suite: str) -> float:
    """What some cases may take of a suite's time, and a few seconds to begin."""
    whole = SUITES[suite]
    return 0.1 + whole.minutes * sum(c.effort for c in cases) / sum(c.effort for c in whole.cases())


def execute(
    cases: list[Case], names: list[str] | None, suite: str, limit: float, out: Path, arguments: argparse.Namespace
) -> tuple[Any, bool]:
    """(results, whether Ctrl-C stopped it) of measuring the cases, which are written to `out` line by line. What is
    there before stays until there is a measurement."""
    from benchmarks import results, runner, show

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a")
    except OSError as error:
        arguments.fail(f"argument --out: cannot write {str(out)!r}: {error.strerror}")
    measured, waiting = results.Results({}, []), list[str]()
    begun = stopped = False
    with file, show.Progress(cases) as progress:
        try:
            for text in runner.run(cases, names, suite, limit, progress.done):
                row = measured.add(text)
                waiting.append(text)
                if not begun and row is not None and row.status != "late":
                    begun = True
                    if out.stat().st_size:
                        file.truncate(0)
                if begun:
                    file.writelines(waiting)
                    file.flush()
                    waiting.clear()
                if row is not None:
                    progress.now(row.case)
        except KeyboardInterrupt:
            stopped = True
        except runner.Broken as error:
            sys.exit(f"{error}; what was measured before is in {os.fspath(out)}")
    show.results(measured)
    if begun:
        print(f"results: {os.fspath(out)}" + (", up to where it was stopped" if stopped else ""))
    else:
        print(f"nothing was measured: {os.fspath(out)} is as it was")
    return measured, stopped


def run_run(arguments: argparse.Namespace) -> int | None:
    if arguments.quick and arguments.suite not in (None, "quick"):
        arguments.fail(f"argument --quick: is the suite quick, got the suite {arguments.suite} too")
    suite = "quick" if arguments.quick else arguments.suite or "core"
    if not arguments.gate and (arguments.geomean is not None or arguments.worst is not None):
        arguments.fail("arguments --geomean and --worst: are thresholds of --gate, which is missing")
    cases = chosen(arguments, suite)
    from benchmarks import providers, results

    names = None
    if arguments.provider:
        known = providers.load()
        unknown = [name for name in arguments.provider if name not in known]
        if unknown:
            arguments.fail(f"argument --provider: expected one of {', '.join(known)}, got {unknown[0]!r}")
        names = [name for name in known if name == providers.OURS or name in arguments.provider]
    check_memory(cases, len(names or providers.load()), arguments)
    out = arguments.out or Path("results") / f"{suite}.jsonl"
    limit = minutes(cases, suite) if arguments.minutes is None else arguments.minutes
    measured, stopped = execute(cases, names, suite, limit, out, arguments)
    if stopped:
        return 130
    if arguments.gate:
        found = results.gate(measured, arguments.geomean, arguments.worst)
        print("\n".join(f"gate: {reason}" for reason in found) or "gate: passed")
        return 1 if found else 0
    return None


def run_figures(arguments: argparse.Namespace) -> int | None:
    """Measure anew (or read `arguments.results`), then write the tables and plots that are kept."""
    from benchmarks import figures

    kept = FIGURES[arguments.name]
    if arguments.results is not None:
        measured = read(arguments, arguments.results)
        if missing := set(kept.cases()) - measured.by_case.keys():
            arguments.fail(
                f"argument --results: {len(missing)} cases of {arguments.name} are not in {str(arguments.results)!r}, "
                f"such as {min(map(str, missing))}"
            )
    else:
        arguments.threads = kept.threads
        cases = at_threads(kept.cases(), arguments)
        out = Path("results") / f"{arguments.name}.jsonl"
        measured, stopped = execute(cases, None, kept.suite, SUITES[kept.suite].minutes, out, arguments)
        if stopped:
            return 130
    try:
        for path in figures.write(arguments.name, measured):
            print(path)
    except OSError as error:
        arguments.fail(f"cannot write {error.filename!r}: {error.strerror}")
    return None


def read(arguments: argparse.Namespace, path: Path) -> Any:
    from benchmarks import results

    try:
        found = results.read(path)
    except OSError as error:
        arguments.fail(f"cannot read {str(path)!r}: {error.strerror}")
    except ValueError as error:
        arguments.fail(str(error))
    if not found.rows:
        arguments.fail(f"there is no measurement in {str(path)!r}")
    return found


def run_compare(arguments: argparse.Namespace) -> None:
    from benchmarks import results, show

    reference = None if arguments.absolute else arguments.reference
    files = read(arguments, arguments.before), read(arguments, arguments.after)
    for path, found in zip((arguments.before, arguments.after), files, strict=True):
        if reference not in (None, *(row.provider for row in found.rows)):
            arguments.fail(f"argument --reference: there is no {reference} in {str(path)!r}; --absolute needs none")
    moves = results.compare(*files, reference)
    if not moves:
        arguments.fail("the two files have no measurement in common")
    show.moves(moves, reference, everything=arguments.all)


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
