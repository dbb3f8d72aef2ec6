"""Results as Markdown and as plots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from benchmarks import show
from benchmarks.cases import Case
from benchmarks.providers import OURS
from benchmarks.results import Results, over_plain, ratios

COLORS = {"lstm": "#1f4e79", "gru": "#e07b39", "rnn": "#5a9e6f"}
OTHERS = ("#8e5ea2", "#c0504d", "#7f7f7f", "#3cba9f", "#b8860b", "#d36fae")  # of variants, in order
AXES = ("T", "N", "H", "threads")
DPI = 160  # sizes below are those of a page; lettering stays legible at half of it


def write(results: Results, folder: Path, name: str = "") -> Iterator[Path]:
    """Write the report and the plots that the results have data for; yields each path.

    They are report.md, speedup.png, roof.png..., or with a name NAME.md, NAME_speedup.png, NAME_roof.png...
    """
    plots = {"speedup": speedup(results), "roof": roof(results), "scaling": scaling(results), "plain": plain(results)}
    drawn = {f"{name}_{kind}" if name else kind: figure for kind, figure in plots.items() if figure is not None}
    for kind, figure in drawn.items():
        figure.savefig(folder / f"{kind}.png", dpi=DPI)
        yield folder / f"{kind}.png"
    path = folder / f"{name or 'report'}.md"
    path.write_text(markdown(results, list(drawn)))
    yield path


def table(head: list[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown, the first `left` columns to the left, losses and failures in bold."""
    rows = ["| " + " | ".join(head) + " |", "|" + "|".join([":--"] * left + ["--:"] * (len(head) - left)) + "|"]
    for line in lines:
        marked = [f"**{cell}**" if "LOSS" in cell or cell in ("wrong", "failed") else cell for cell in line]
        rows.append("| " + " | ".join(marked) + " |")
    return "\n".join(rows)


def markdown(results: Results, plots: list[str]) -> str:
    """The table, the lines below it and links to the plots."""
    head, *lines = show.cells(results)
    notes = "\n".join(f"- {text}" for text in show.summary(results))
    pictures = "\n".join(f"![{name}]({name}.png)" for name in plots)
    note = f"{show.NOTE[0].upper()}{show.NOTE[1:]}."
    return "\n\n".join([table(head, lines), note, notes, pictures]).rstrip() + "\n"


def dots(title: str, values: Mapping[Case, float], label: str, parity: bool) -> Figure | None:
    """A point for each case, a colour for each cell: a panel with a line a shape for each mode of many shapes, and one
    with a line a mode for the others. parity: values are ratios, drawn to a log scale about 1."""
    if not values:
        return None
    shapes: dict[str, dict[str, list[Case]]] = {}  # by panel and line
    for case in values:
        threads = f" x{case.threads}" if case.threads > 1 else ""
        shapes.setdefault(show.group(case) + threads, {}).setdefault(case.shape, []).append(case)
    few = {mode: lines for mode, lines in shapes.items() if len(lines) == 1}
    panels = {mode: lines for mode, lines in shapes.items() if mode not in few}
    if few:
        panels["other modes" if panels else "all modes"] = {
            f"{mode}\n{shape}": cases for mode, lines in few.items() for shape, cases in lines.items()
        }
    cells = list(dict.fromkeys(case.cell for case in values))
    spare = iter(OTHERS * len(cells))
    colors = {cell: COLORS.get(cell) or next(spare) for cell in cells}
    wide = min(2, len(panels))
    grid = [list(panels)[k : k + wide] for k in range(0, len(panels), wide)]
    heights = [max(0.27 * sum(1 + line.count("\n") for line in panels[mode]) for mode in row) + 0.9 for row in grid]
    figure = Figure(figsize=((6.5, 9.2)[wide - 1], sum(heights) + 1.2), layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(grid), wide, squeeze=False, height_ratios=heights, sharex=True)
    for panel in axes.flat:
        panel.set_visible(False)
    for k, row in enumerate(grid):
        for panel, mode in zip(axes[k], row, strict=False):
            panel.set_visible(True)
            lines = panels[mode]
            for y, cases in enumerate(lines.values()):
                for case in cases:
                    panel.plot(values[case], y, "o", color=colors[case.cell], markersize=7, alpha=0.85, label=case.cell)
            panel.set_yticks(range(len(lines)), list(lines), fontsize=10)
            panel.set_ylim(len(lines) - 0.4, -0.6)
            panel.set_title(mode, fontsize=12)
            panel.grid(axis="y", alpha=0.3)
            panel.grid(axis="x", which="both", alpha=0.15)
            panel.tick_params(axis="x", labelsize=10, labelbottom=True)
            panel.spines[["top", "right"]].set_visible(False)
            panel.axvline(1.0, color="black", linewidth=1.4)
    panel = axes[0][0]
    if parity:
        panel.set_xscale("log")
        low, high = min(*values.values(), 0.9) / 1.1, max(*values.values(), 1.1) * 1.1
        ticks = [t for t in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
        for panel in axes.flat:
            panel.set_xlim(low, high)
            panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
            panel.set_xticks([], minor=True)
            panel.axvspan(low, 1.0, color="#c0392b", alpha=0.08, linewidth=0)
    else:
        panel.set_xlim(0, max(1.05, *(1.05 * v for v in values.values())))
    handles = [Line2D([], [], color=colors[cell], marker="o", linestyle="", markersize=8) for cell in cells]
    look = {"ncols": min(4, len(cells)), "frameon": False, "fontsize": 11}
    figure.legend(handles, cells, loc="outside lower center", title=label, title_fontsize=11, **look)
    return figure


def speedup(results: Results) -> Figure | None:
    label = "times faster than the best peer (N,T,I,H; shaded: slower)"
    return dots("Speed-up over the best peer", ratios(results), label, parity=True)


def roof(results: Results) -> Figure | None:
    shares = {case: rows[OURS].share for case, rows in results.by_case.items() if OURS in rows}
    known = {case: share for case, share in shares.items() if share is not None}
    return dots("Share of the roof", known, "share of the measured roof (N,T,I,H)", parity=False)


def plain(results: Results) -> Figure | None:
    """What the variants cost over the plain layer."""
    found = {case: over for case, rows in results.by_case.items() if (over := over_plain(rows)) is not None}
    if not found:
        return None
    usual = Counter(case.shape for case in found).most_common(1)[0][0]
    names = [f"{case.cell} {case.mode}" + f" ({case.shape})" * (case.shape != usual) for case in found]
    figure = Figure(figsize=(8, 1.4 + 0.29 * len(names)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(
        names, list(found.values()), color=["#1f4e79" if v <= 1.15 else "#e07b39" for v in found.values()]
    )
    labels = axes.bar_label(drawn, [f"{v:.2f}" for v in found.values()], fontsize=10, padding=3)
    for text in labels:
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        text.set_zorder(3)
    axes.axvline(1.0, color="black", linewidth=1.4)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Time over the plain layer's (N,T,I,H = {usual}; orange: over 1.15)", fontsize=12)
    return figure


def scaling(results: Results) -> Figure | None:
    """Time against T, N, H and threads, each where at least four cases (two for threads) differ in that alone."""
    drawn: list[tuple[str, str, list[Case]]] = []
    modes: dict[str, list[Case]] = {}
    for case in results.by_case:
        if case.how.unit == "s":
            modes.setdefault(case.mode, []).append(case)
    for mode, cases in modes.items():
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
    rows = list(dict.fromkeys(mode for mode, _, _ in drawn))
    columns = [axis for axis in AXES if any(axis == a for _, a, _ in drawn)]
    figure = Figure(figsize=(2.7 * len(columns), 2.9 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for panel in grid.flat:
        panel.set_visible(False)
    by_case, names = results.by_case, show.columns(results)
    colors = {name: f"C{k}" for k, name in enumerate(names)}
    for mode, axis, cases in drawn:
        panel = grid[rows.index(mode)][columns.index(axis)]
        panel.set_visible(True)
        for name in names:
            found = [(getattr(case, axis), by_case[case][name]) for case in cases if name in by_case[case]]
            points = [(at, row.median * 1e6) for at, row in found if row.median is not None]
            if points:
                width, color = 2.5 if name == OURS else 1.2, colors[name]
                panel.plot(*zip(*points, strict=True), "o-", color=color, markersize=3, linewidth=width, label=name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yscale("log")
        panel.yaxis.set_minor_formatter(NullFormatter())
        fixed = ", ".join(f"{a} {getattr(cases[0], a)}" for a in ("N", "T", "H") if a != axis)
        panel.set_title(f"{cases[0].cell} {mode}\n{fixed}", fontsize=11)
        panel.set_xlabel(axis, fontsize=11)
        if axis == columns[0]:
            panel.set_ylabel("microseconds", fontsize=11)
        panel.tick_params(labelsize=9.5)
        panel.grid(alpha=0.3)
    handles, labels = grid[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    return figure
