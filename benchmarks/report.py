"""Results as Markdown and as plots."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import show
from benchmarks.cases import Case
from benchmarks.providers import OURS
from benchmarks.results import Results, ratios

COLORS = {"lstm": "#1f4e79", "gru": "#e07b39", "rnn": "#5a9e6f"}
AXES = ("T", "N", "H", "threads")


def write(results: Results, folder: Path) -> Iterator[Path]:
    """Write report.md and the plots that the results have data for; yields each path."""
    plots = {"speedup": speedup(results), "roof": roof(results), "scaling": scaling(results)}
    for name, figure in plots.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110)
            yield folder / f"{name}.png"
    names = [name for name, figure in plots.items() if figure is not None]
    (folder / "report.md").write_text(markdown(results, names))
    yield folder / "report.md"


def markdown(results: Results, plots: list[str]) -> str:
    """The table, losses in bold, the lines below it and links to the plots."""
    head, *lines = show.cells(results)
    rows = ["| " + " | ".join(head) + " |", "|" + "|".join([" :-- ", *[" --: "] * (len(head) - 1)]) + "|"]
    for line in lines:
        marked = [f"**{cell}**" if "LOSS" in cell or cell in ("wrong", "failed") else cell for cell in line]
        rows.append("| " + " | ".join(marked) + " |")
    notes = [f"- {text}" for text in show.summary(results)]
    pictures = [f"![{name}]({name}.png)" for name in plots]
    return "\n".join(
        [
            *rows,
            "",
            "Medians in microseconds; a speed-up is the median of the ratios round by round.",
            "",
            *notes,
            "",
            *pictures,
            "",
        ]
    )


def panels(results: Results) -> dict[str, list[Case]]:
    """The timed cases by mode."""
    found: dict[str, list[Case]] = {}
    for case in results.by_case:
        if case.kind.unit == "s":
            found.setdefault(case.mode, []).append(case)
    return found


def bars(title: str, values: dict[Case, float], label: str, start: float) -> Figure | None:
    """A panel for each mode with a bar for each case, drawn from `start` and labelled with its value."""
    modes: dict[str, list[Case]] = {}
    for case in values:
        modes.setdefault(case.mode, []).append(case)
    if not values:
        return None
    heights = [len(cases) for cases in modes.values()]
    figure = Figure(figsize=(9, 1.5 + 0.22 * sum(heights) + 0.7 * len(heights)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(modes), 1, squeeze=False, height_ratios=[n + 1 for n in heights], sharex=True)[:, 0]
    for panel, (mode, cases) in zip(axes, modes.items(), strict=True):
        names = [f"{case.cell} {case.shape}" + ("" if case.dtype == "float32" else " f64") for case in cases]
        names = [
            f"{name} x{case.threads}" if case.threads > 1 else name for name, case in zip(names, cases, strict=True)
        ]
        colors = [COLORS[case.cell] for case in cases]
        drawn = panel.barh(names, [values[case] - start for case in cases], left=start, color=colors)
        panel.bar_label(drawn, [f"{values[case]:.2f}" for case in cases], fontsize=7, padding=2)
        panel.axvline(1.0, color="black", linewidth=1)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.set_title(mode, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(label)
    return figure


def speedup(results: Results) -> Figure | None:
    figure = bars("Speed-up over the best peer", ratios(results), "times faster (log scale; N,T,I,H)", 1.0)
    if figure is not None:
        figure.axes[0].set_xscale("log")
        for axis in figure.axes[0].xaxis, figure.axes[-1].xaxis:
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    return figure


def roof(results: Results) -> Figure | None:
    shares = {case: rows[OURS].share for case, rows in results.by_case.items() if OURS in rows}
    known = {case: share for case, share in shares.items() if share is not None}
    return bars("fastcells' share of the measured roof", known, "share", 0.0)


def scaling(results: Results) -> Figure | None:
    """Time against T, N, H and threads, each where at least three cases (two for threads) differ in that alone."""
    drawn: list[tuple[str, str, list[Case]]] = []
    for mode, cases in panels(results).items():
        for axis in AXES:
            groups: dict[tuple, list[Case]] = {}
            for case in cases:
                rest = tuple(value for name, value in case.fields().items() if name != axis)
                groups.setdefault(rest, []).append(case)
            largest = max(groups.values(), key=len)
            if len(largest) >= (2 if axis == "threads" else 4):
                drawn.append((mode, axis, sorted(largest, key=attrgetter(axis))))
    if not any(axis != "threads" for _, axis, _ in drawn):
        return None
    modes = list(dict.fromkeys(mode for mode, _, _ in drawn))
    figure = Figure(figsize=(4 * len(AXES), 3.6 * len(modes) + 0.8), layout="constrained")
    grid = figure.subplots(len(modes), len(AXES), squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    by_case, names = results.by_case, show.columns(results)
    for mode, axis, cases in drawn:
        panel = grid[modes.index(mode)][AXES.index(axis)]
        panel.set_visible(True)
        for name in names:
            rows = [(getattr(case, axis), by_case[case][name]) for case in cases if name in by_case[case]]
            points = [(at, row.median * 1e6) for at, row in rows if row.median is not None]
            if points:
                width = 2.5 if name == OURS else 1.2
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yscale("log")
        panel.set_title(f"{mode}, {cases[0].cell}: {axis}", fontsize=10)
        panel.set_xlabel(axis)
        panel.set_ylabel("microseconds")
        panel.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
