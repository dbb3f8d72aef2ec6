"""A picture of profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .layer import LayerProfile
from .words import quantity


def roofline(profiles: Sequence[LayerProfile], path: str | Path) -> None:
    """Write a roofline plot with a point a profile; the ending of `path` says the format. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, p in enumerate(profiles):
        roof, colour = p.roof, f"C{k}"
        point, ridge = (roof.flops / roof.bytes, p.flops_per_second / 1e9), roof.peak / roof.bandwidth
        low, high = min(point[0], ridge) / 8, max(point[0], ridge) * 8
        axes.plot([low, ridge, high], [low * roof.bandwidth / 1e9, roof.peak / 1e9, roof.peak / 1e9], color=colour)
        axes.plot(*point, "o", color=colour, label=f"{p.layer}: {p.share_of_roof:.0%} of the roof")
        axes.vlines(point[0], point[1], point[1] / p.share_of_roof, colors=colour, linestyles=":")
        for text, at, shift, side in (
            (f"multiply-adds, {quantity(roof.peak)}FLOP/s", (high, roof.peak / 1e9), (0, 4), "right"),
            (f"{roof.level}, {quantity(roof.bandwidth)}B/s", (low, low * roof.bandwidth / 1e9), (14, 0), "left"),
        ):
            axes.annotate(text, at, xytext=shift, textcoords="offset points", ha=side, fontsize=9)
    axes.legend(loc="lower right", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights read", ylabel="GFLOP/s")
    figure.savefig(path, dpi=150)
