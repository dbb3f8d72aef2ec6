"""The method: check each provider's answer, then time them in turn, round by round, in one process.

A turn begins when the threads of the one before sleep, with calls that are not timed, until the provider has its
caches, branch history and threads as its own use would leave them; then come those that are. All have the same number
of seconds of either kind.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import get_native_id
from time import perf_counter, sleep

from benchmarks import memory
from benchmarks.cases import Case, left_out
from benchmarks.machine import bound, cores
from benchmarks.problem import Problem
from benchmarks.providers import OURS, PLAIN_LAYER, Prepared, Provider, Unsupported
from benchmarks.results import Row

LOOK = 1e-3  # seconds from one look at other threads to the next
PATIENCE = 0.3  # seconds to wait for them to sleep; ONNX Runtime's spin for up to 80 ms after a call
WARM = 10e-3  # seconds of calls that a turn begins with, not timed
SAMPLE = 4e-3  # seconds that a sample takes at least, by repeating the call
LEAST_ROUNDS, MOST_ROUNDS = 3, 25
SLOW = 3.0  # times the fastest provider's time, from which one round is enough where there is no time for more


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
        with prepared.within():
            if prepared.setup is not None:
                prepared.setup()
            result = prepared.call()
            row.prepare_s = perf_counter() - start
            result = result if prepared.checked is None else prepared.checked()
        mistake = (prepared.problem or problem).mistake(prepared.answer(result))
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
    call, setup = prepared.call, prepared.setup
    with prepared.within():
        if setup is None:
            start = perf_counter()
            for _ in range(calls):
                call()
            return (perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            setup()
            start = perf_counter()
            call()
            total += perf_counter() - start
        return total / calls


def settle() -> None:
    """Wait until no other thread of this process runs: it would take a processor from the next in turn."""
    begin = perf_counter()
    while busy() and perf_counter() - begin < PATIENCE:
        sleep(LOOK)


def busy() -> bool:
    """Whether another thread of this process runs, or waits for a processor, where the system says so. Clocks of the
    time that it used go on in steps of up to 10 ms."""
    own = get_native_id()
    for thread in Path("/proc/self/task").glob("*"):
        try:
            state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended
            continue
        if state == "R" and int(thread.name) != own:
            return True
    return False


def expected(prepared: Prepared) -> float:
    """Seconds a call, the fastest of two at least within some turns' time: with the first one's, which may compile what
    repeated calls need, a turn would be too few calls."""
    settle()
    begin, least = perf_counter(), sample(prepared, 1)
    while True:
        least = min(least, sample(prepared, 1))
        if perf_counter() - begin > 3 * WARM:
            return least


def turn(prepared: Prepared, estimate: float) -> float:
    """Seconds a call, which takes about `estimate`, after others that are not timed."""
    if (warm := min(2000, round(WARM / max(estimate, 1e-7)))) > 0:
        sample(prepared, warm)
    return sample(prepared, max(1, min(4000, round(SAMPLE / max(estimate, 1e-7)))))


def rounds(prepared: Mapping[str, Prepared], seconds: float) -> dict[str, list[float]]:
    """Samples of each provider, in step. All have the first rounds, but for slow ones when time is short; then those
    that used up their share of `seconds` leave."""
    begin = perf_counter()
    share = seconds / max(1, len(prepared))
    estimates = {name: expected(provider) for name, provider in prepared.items()}
    fastest = min(estimates.values(), default=0.0)
    least = {
        name: LEAST_ROUNDS if estimate < SLOW * fastest or estimate * LEAST_ROUNDS < max(share, 0.3) else 1
        for name, estimate in estimates.items()
    }
    spent = dict.fromkeys(prepared, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(MOST_ROUNDS):
            late = perf_counter() - begin > seconds
            names = [
                name
                for name in prepared
                if number < least[name] or (not late and (spent[name] < share or name == OURS))
            ]
            if not names or (number >= LEAST_ROUNDS and names == [OURS] != list(prepared)):
                break  # no one is left to compare with
            for name in names if number % 2 else reversed(names):
                settle()
                start = perf_counter()
                samples[name].append(turn(prepared[name], estimates[name]))
                spent[name] += perf_counter() - start
    finally:
        if collecting:
            gc.enable()
    return samples


def measure(
    case: Case, providers: Mapping[str, Provider], suite: str = "", seconds: float = 5.0, peaks: dict | None = None
) -> list[Row]:
    """One row a provider. seconds: about how long it may take altogether. peaks: see `machine.roof`."""
    begin, mode = perf_counter(), case.how
    if case.plain is None:  # nothing to set beside it
        providers = {name: provider for name, provider in providers.items() if name != PLAIN_LAYER}
    rows = {name: Row(case, name, "ok", peer=p.peer, unit=mode.unit) for name, p in providers.items()}
    problem = Problem(case)
    ready: dict[str, Prepared] = {}
    for name, provider in providers.items():
        if case.threads > len(cores()):
            rows[name].status, rows[name].reason = "unsupported", f"only {len(cores())} core(s) to run on"
        elif (reason := left_out(suite, case, name)) is not None:
            rows[name].status, rows[name].reason = "unsupported", reason
        elif (found := prepare(provider, problem, rows[name])) is not None:
            ready[name] = found
    seconds = max(0.3 * seconds, seconds - (perf_counter() - begin))
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
            if peaks is not None and providers[name].device == "cpu":
                least, row.roof = bound(case, problem.flops, peaks)
                row.share = least / row.median
    return list(rows.values())


def late(case: Case, providers: Mapping[str, Provider]) -> list[Row]:
    """Rows that say that there was no time for a case."""
    reason = "the time of the suite was over"
    return [Row(case, name, "late", reason, peer=p.peer, unit=case.how.unit) for name, p in providers.items()]


def run(
    cases: Sequence[Case], providers: Sequence[str] | None, suite: str, minutes: float, done: Callable[[Case], None]
) -> Iterator[str]:
    """Lines of results, from one process for each thread count, which is pinned to as many cores.

    providers: names, None for all. minutes: for each thread count; twice that is the limit. done: called when a case
    is done. Raises Broken.
    """
    for threads in sorted({case.threads for case in cases}):
        group = [case for case in cases if case.threads == threads]
        order = {"suite": suite, "minutes": minutes, "threads": threads, "providers": providers}
        order["cases"] = [case.fields() for case in group]
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(order)]
        root = Path(__file__).parents[1]
        left = iter(group)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            try:
                for text in process.stdout:
                    if text.startswith("{") and text.endswith("\n"):
                        yield text
                    elif text.startswith("done"):
                        done(next(left))
            except BaseException:  # Ctrl-C here, or a reader that has enough
                process.terminate()
                raise
        if process.returncode:
            raise Broken(f"the process that measures ended with status {process.returncode}")
