"""The method: check each provider's answer, then time them in turn, round by round, in one process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from benchmarks import memory
from benchmarks.cases import Case, left_out
from benchmarks.machine import bound, cores
from benchmarks.problem import Problem
from benchmarks.providers import OURS, Prepared, Provider, Unsupported
from benchmarks.results import Row

LEAST_ROUNDS, MOST_ROUNDS = 3, 15
SAMPLE = 2e-3  # seconds that one sample takes at least, by repeating the call


class Broken(Exception):
    """The process that measures did not come to its end."""


def prepare(provider: Provider, problem: Problem, row: Row) -> Prepared | None:
    """A provider ready to be timed, its answer checked; or None, and `row` says why."""
    if (reason := provider.available()) is not None:
        row.status, row.reason = "absent", reason
        return None
    start = perf_counter()
    try:
        prepared = provider.prepare(problem)
        if prepared.setup is not None:
            prepared.setup()
        result = prepared.call()
        row.prepare_s = perf_counter() - start
        mistake = problem.mistake(prepared.answer(result))
    except Unsupported as reason:
        row.status, row.reason = "unsupported", str(reason)
        return None
    except Exception as error:  # a peer that breaks is a row, not the end of the run
        row.status, row.reason = "failed", f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        return None
    if mistake is not None:
        row.status, row.reason = "wrong", mistake
        return None
    row.reason = prepared.note
    return prepared


def sample(prepared: Prepared, calls: int) -> float:
    """Seconds a call."""
    if prepared.setup is None:
        start = perf_counter()
        for _ in range(calls):
            prepared.call()
        return (perf_counter() - start) / calls
    total = 0.0
    for _ in range(calls):
        prepared.setup()
        start = perf_counter()
        prepared.call()
        total += perf_counter() - start
    return total / calls


def rounds(prepared: Mapping[str, Prepared], seconds: float) -> dict[str, list[float]]:
    """Samples of each provider. All have the first rounds; then those that used up their share of `seconds` leave."""
    calls, spent = {}, dict.fromkeys(prepared, 0.0)
    for name, provider in prepared.items():
        estimate = min(sample(provider, 1) for _ in range(2))
        calls[name] = max(1, min(2000, round(SAMPLE / max(estimate, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    share = seconds / max(1, len(prepared))
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(MOST_ROUNDS):
            names = [name for name in prepared if number < LEAST_ROUNDS or spent[name] < share or name == OURS]
            if number >= LEAST_ROUNDS and names == [OURS] and (len(prepared) > 1 or spent[OURS] >= share):
                break  # no one is left to compare with
            for name in names if number % 2 else reversed(names):
                start = perf_counter()
                samples[name].append(sample(prepared[name], calls[name]))
                spent[name] += perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    case: Case, providers: Mapping[str, Provider], suite: str = "", seconds: float = 3.0, peaks: dict | None = None
) -> list[Row]:
    """One row a provider. seconds: about how long all samples together may take. peaks: see `machine.roof`."""
    mode = case.kind
    rows = {name: Row(case, name, "ok", device=p.device, unit=mode.unit) for name, p in providers.items()}
    problem = Problem(case)
    ready: dict[str, Prepared] = {}
    for name, provider in providers.items():
        if case.threads > len(cores()):
            rows[name].status, rows[name].reason = "unsupported", f"only {len(cores())} core(s) to run on"
        elif (reason := left_out(suite, case, name)) is not None:
            rows[name].status, rows[name].reason = "unsupported", reason
        elif (found := prepare(provider, problem, rows[name])) is not None:
            ready[name] = found
    try:
        samples = rounds(ready, seconds) if mode.unit == "s" else memory.peaks(ready)
    except memory.Unmeasurable as reason:
        for name in ready:
            rows[name].status, rows[name].reason = "unsupported", str(reason)
        return list(rows.values())
    for name, values in samples.items():
        row = rows[name]
        row.samples = values
        row.summarise(samples.get(OURS, []))
        if mode.unit == "bytes" and (held := ready[name].held) is not None:
            row.held_bytes = held()
        elif mode.unit == "s" and row.median is not None:
            row.gigaflops = 1e-9 * problem.flops / row.median
            if peaks is not None and row.device == "cpu":
                least, row.roof = bound(case, problem.flops, peaks)
                row.share = least / row.median
    return list(rows.values())


def run(
    cases: Sequence[Case], providers: Sequence[str] | None, suite: str, seconds: float, done: Callable[[], None]
) -> Iterator[str]:
    """Lines of results, from one process for each thread count, which is pinned to as many cores.

    providers: names, None for all. done: called when a case is done. Raises Broken.
    """
    for threads in sorted({case.threads for case in cases}):
        group = [case for case in cases if case.threads == threads]
        order = {"suite": suite, "seconds": seconds, "threads": threads, "providers": providers}
        order["cases"] = [case.fields() for case in group]
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(order)]
        root = Path(__file__).parents[1]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    if text.startswith("{") and text.endswith("\n"):
                        yield text
                    elif text.startswith("done"):
                        done()
            except BaseException:  # Ctrl-C here, or a reader that has enough
                process.terminate()
                raise
        if process.returncode:
            raise Broken(f"the process that measures ended with status {process.returncode}")
