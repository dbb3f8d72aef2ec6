"""The tables and plots that are kept: benchmarks/figures/NAME*.md and .png, and the README's parts that show them.

A part of the README lies between the lines <!-- NAME --> and <!-- /NAME -->, and is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import machine, report, show
from benchmarks.cases import FIGURES, PLAIN, Case
from benchmarks.providers import OURS, PLAIN_LAYER
from benchmarks.results import Results, best_peer, over_plain, ratios

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "figures"


#: The plots that the README shows, with what they show.
SHOWN = {
    "core": ("speedup", "Speed-up over the best peer by shape and cell"),
    "scaling": ("scaling", "Time against T, N, H and threads"),
    "variants": ("plain", "Time of each variant over the plain layer's"),
}


def write(name: str, results: Results, root: Path = ROOT) -> Iterator[Path]:
    """Write what belongs to one of `FIGURES`; yields each path."""
    suite, within = FIGURES[name].suite, FOLDER.relative_to(ROOT)
    (root / within).mkdir(exist_ok=True, parents=True)
    written = list(report.write(results, root / within, name))
    yield from written
    parts = [{"core": core, "variants": variants}[suite](results)] if suite != "scaling" else []
    plot, what = SHOWN[suite]
    if root / within / f"{name}_{plot}.png" in written:
        parts.append(f"![{what}]({within}/{name}_{plot}.png)")
    parts += [f"{machine.line(facts)}." for facts in results.machines.values()]
    parts.append(f"[Every case and provider, and what could not be measured]({within}/{name}.md)")
    if include(root / "README.md", name, "\n\n".join(parts)):
        yield root / "README.md"


def include(readme: Path, name: str, text: str) -> bool:
    """Put `text` between the lines of a README that name it; whether there are such lines."""
    whole = readme.read_text() if readme.exists() else ""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in whole or end not in whole:
        return False
    before, _, rest = whole.partition(begin)
    readme.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")
    return True


def core(results: Results) -> str:
    """A line a shape: how many times faster than the best peer; below, the means over all of them."""
    against = ratios(results)
    calls = ("inference", "training")
    cases = [case for case in against if case.mode in calls and case.dtype == "float32"]
    columns = [(call, cell) for call in calls for cell in PLAIN]
    head = ["N, T, I, H", *(f"{call}: {cell.upper()}" if cell == PLAIN[0] else cell.upper() for call, cell in columns)]
    lines = []
    for shape in dict.fromkeys(case.shape for case in cases):
        found = {(case.mode, case.cell): show.heading(against[case]) for case in cases if case.shape == shape}
        lines.append([shape.replace(",", ", "), *(found.get(column, "") for column in columns)])
    groups = {column: [against[c] for c in cases if (c.mode, c.cell) == column] for column in columns}
    lines.append(["geometric mean", *(show.mean(groups[column]) for column in columns)])
    for name in ("torch.nn", "NumPy"):
        rows = [found[name] for found in results.by_case.values() if name in found]
        own = {
            column: [r.ratio for r in rows if r.case in cases and (r.case.mode, r.case.cell) == column and r.ratio]
            for column in columns
        }
        lines.append([f"mean, {name}", *(show.mean(own[column]) for column in columns)])
    return report.table(head, lines)


def variants(results: Results) -> str:
    """A line a variant: its time, over the plain layer's, and how many times faster than each way to write it."""
    peers = [name for name in show.columns(results) if name not in (OURS, PLAIN_LAYER)]
    lines = []
    for case, rows in results.by_case.items():
        ours, over = rows.get(OURS), over_plain(rows)
        line = [label(case), show.amount(ours) if ours else "", f"{over:.2f}x" if over else ""]
        for name in peers:
            row = rows.get(name)
            line.append(f"{row.ratio:.1f}x" if row is not None and row.ratio else "-")
        peer = best_peer(rows)
        line.append(show.heading(peer.ratio) if peer is not None and peer.ratio else "")
        lines.append(line)
    times = [f"faster than {name}" if k == 0 else name for k, name in enumerate(peers)]
    return report.table(["variant", "microseconds", "over the plain layer", *times, "best of them"], lines)


def label(case: Case) -> str:
    return str(case).replace(case.shape, f"({case.shape})")
