"""Results on a terminal: progress, the table with its losses marked, what moved."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean, median

import rich.progress
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.cases import CELLS, Case
from benchmarks.providers import OURS
from benchmarks.results import SINGLE_STEP, Move, Results, Row, best_peer, over_plain, ratios, single_step

NOTE = (
    "medians in microseconds (memory: in all, and kept for the backward pass); "
    "speed-up and over plain: medians of the ratios round by round"
)

console = Console(highlight=False, soft_wrap=True)


class Progress:
    """A bar with the time left, by the cases' efforts. Drawn only between cases: a thread of its own would run inside
    the time measured."""

    def __init__(self, cases: Sequence[Case]) -> None:
        columns = (rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn())
        columns += (rich.progress.TextColumn("{task.fields[count]}"),)  # type: ignore[assignment]
        columns += (rich.progress.TimeRemainingColumn(elapsed_when_finished=True),)  # type: ignore[assignment]
        options = {"auto_refresh": False, "transient": True, "speed_estimate_period": 1800}
        self.bar = rich.progress.Progress(*columns, console=console, **options)  # type: ignore[arg-type]
        self.cases, self.count = len(cases), 0
        total = sum(case.effort for case in cases)
        self.task = self.bar.add_task("measuring", total=total, count=f"0/{self.cases}")

    def __enter__(self) -> Progress:
        self.bar.start()
        self.bar.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def now(self, case: Case) -> None:
        self.bar.update(self.task, description=str(case))

    def done(self, case: Case) -> None:
        self.count += 1
        self.bar.update(self.task, advance=case.effort, count=f"{self.count}/{self.cases}")
        self.bar.refresh()


def amount(row: Row) -> str:
    """The median, in microseconds where no unit says otherwise, or what there is in its place."""
    if row.median is None:
        return "-" if row.status in ("unsupported", "late") else row.status
    value = row.median * (1e6 if row.unit == "s" else 1 / 1024)
    text = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + (" KiB" if row.unit == "bytes" else "")
    return text if row.held_bytes is None else f"{text} ({row.held_bytes / 1024:,.0f} kept)"


def heading(ratio: float) -> str:
    """A ratio to the best peer, losses marked in words so that a file shows them too."""
    return f"{ratio:.2f}x" + ("" if ratio >= 1 else " LOSS")


def columns(results: Results) -> list[str]:
    """The providers that have at least one measurement or wrong answer, fastcells first."""
    without = ("absent", "unsupported", "late")
    return list(dict.fromkeys(row.provider for row in results.rows if row.status not in without))


def cells(results: Results) -> list[list[str]]:
    """The table, with its heading: a row a case."""
    names = columns(results)
    plain = any(over_plain(rows) for rows in results.by_case.values())
    lines = [["case", *names, "best peer", "speed-up", *(["over plain"] if plain else []), "of roof"]]
    for case, rows in results.by_case.items():
        peer, ours = best_peer(rows), rows.get(OURS)
        line = [str(case), *(amount(rows[name]) if name in rows else "" for name in names)]
        line += [peer.provider, heading(peer.ratio)] if peer is not None and peer.ratio is not None else ["", ""]
        if plain:
            over = over_plain(rows)
            line.append("" if over is None else f"{over:.2f}x")
        line.append(f"{ours.share:.0%} {ours.roof}" if ours is not None and ours.share is not None else "")
        lines.append(line)
    return lines


def mean(found: Sequence[float]) -> str:
    return f"{geometric_mean(found):.2f}x" if found else "-"


def group(case: Case) -> str:
    """The heading under which a case's ratio is averaged."""
    return case.mode + ("" if case.dtype == "float32" else f" {case.dtype}")


def summary(results: Results) -> list[str]:
    """The machine lines, the means, and each reason why something has no number."""
    lines = [machine.line(facts) for facts in results.machines.values()]
    against = ratios(results)
    if against:
        lines.append(f"against the best peer of each case: {spread(against)}")
        for name in dict.fromkeys(group(case) for case in against):
            own = {case: ratio for case, ratio in against.items() if group(case) == name}
            if len(own) < len(against):
                lines.append(f"against the best peer, {name}: {spread(own)}")
        if any(single_step(case) for case in against):
            lines.append(SINGLE_STEP)
    for name in columns(results):
        found = [row for row in results.rows if row.provider == name != OURS and row.ratio and row.unit == "s"]
        if found and found[0].peer:
            for calls, what in ((("forward",), ""), (("training", "backward"), " in training")):
                by_cell = {
                    cell: [r.ratio or 0.0 for r in found if r.case.cell == cell and r.case.how.call in calls]
                    for cell in CELLS
                }
                every = [ratio for values in by_cell.values() for ratio in values]
                if every:
                    parts = ", ".join(f"{cell} {mean(values)}" for cell, values in by_cell.items() if values)
                    lines.append(f"against {name}{what}: geometric mean {mean(every)} over {len(every)} ({parts})")
    prepared: dict[str, list[float]] = {}
    for row in results.rows:
        if row.prepare_s:
            prepared.setdefault(row.provider, []).append(row.prepare_s)
    if prepared:
        parts = ", ".join(f"{name} {median(times):.2g} and {max(times):.2g}" for name, times in prepared.items())
        lines.append(f"seconds to build, compile and call once, the median and the most of all cases: {parts}")
    reasons: dict[tuple[str, str, str], int] = {}
    for row in results.rows:
        if row.reason:
            key = (row.provider, row.status, row.reason)
            reasons[key] = reasons.get(key, 0) + 1
    for (name, status, reason), count in reasons.items():
        lines.append(f"{name}: {'' if status == 'ok' else status + ': '}{reason} ({count} case{'s' * (count > 1)})")
    return lines


def spread(against: dict[Case, float]) -> str:
    worst, least = min(against.items(), key=lambda item: item[1])
    lost = sum(ratio < 1 for ratio in against.values())
    average = mean(list(against.values()))
    return f"geometric mean {average} over {len(against)}, worst {least:.2f}x ({worst}), {lost} lost"


def results(measured: Results) -> None:
    """Print the table and what belongs to it."""
    head, *lines = cells(measured)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, justify="left" if name in ("case", "best peer", "of roof") else "right", no_wrap=True)
    for line in lines:
        style = "red" if any("LOSS" in cell or cell in ("wrong", "failed") for cell in line) else None
        table.add_row(*line, style=style)
    # As wide as it is: better wrapped by the terminal than cut.
    width = sum(max(map(len, column)) + 2 for column in zip(head, *lines, strict=True))
    Console(highlight=False, width=max(width, console.width)).print(table)
    console.print(f"\n{NOTE}")
    for text in summary(measured):
        console.print(text, markup=False)


def moves(found: Sequence[Move], reference: str | None, everything: bool) -> None:
    """Print what changed, the largest gain first, and how the machine drifted."""
    drift = [move for move in found if move.provider == reference]
    found = [move for move in found if move.provider != reference] or found
    shown = [move for move in found if everything or move.moved]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("case", "provider", "B / A", ""):
        table.add_column(name, no_wrap=True)
    for move in shown:
        verdict = "within the noise" if not move.moved else "better" if move.change < 1 else "worse"
        style = "red" if verdict == "worse" else "green" if verdict == "better" else None
        table.add_row(str(move.case), move.provider, f"{move.change:.2f}", verdict, style=style)
    if shown:
        console.print(table)
    moved = sum(move.moved for move in found)
    console.print(f"{moved} of {len(found)} measurements moved beyond the noise of both files")
    if drift:
        by = mean([move.change for move in drift])
        console.print(f"each against {reference} in the same case; its own times changed by {by} (geometric mean)")
