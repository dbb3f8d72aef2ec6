"""Words for numbers."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def quantity(value: float, base: int = 1000) -> str:
    """With a prefix: 12.3 G; the unit follows."""
    prefixes = ("", "k", "M", "G", "T") if base == 1000 else ("", "Ki", "Mi", "Gi", "Ti")
    k = 0
    while value >= base and k < len(prefixes) - 1:
        value, k = value / base, k + 1
    return f"{value:.3g} {prefixes[k]}" if value < 1000 else f"{value:.0f} {prefixes[k]}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def compiled(seconds: float) -> str:
    return f"compiled in {duration(seconds)}" if seconds else "stored"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of even width."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
