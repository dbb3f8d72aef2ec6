"""Compiling kernels ahead of their use, as many at a time as there are processors."""

from __future__ import annotations

import importlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import NamedTuple

import torch

from . import cells
from .cell import Cell
from .cpu import again, engine, lengths, script, store, team
from .cpu import layer as cpu
from .cpu.geometry import Family
from .cpu.host import host
from .derivation import build

CELLS = {name: cell for name, cell in vars(cells).items() if isinstance(cell, Cell)}


def find_cell(name: str, names: Sequence[str] = tuple(CELLS)) -> Cell:
    """A built-in cell by name, or another one by MODULE:NAME. names: to choose from, for the message. Raises ValueError
    where there is none, or one that is wrong."""
    if name in CELLS:
        return CELLS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"invalid choice: {name!r} (choose from {', '.join(names)}, or give MODULE:NAME)")
    if module.startswith("."):
        raise ValueError(f"{name!r} must have the whole name of a module, as in package.module:NAME")
    sys.path.insert(0, "")  # as python -c: modules of the current folder
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever somebody's module does
        raise ValueError(f"cannot import {module!r}: {_in_a_line(error)}") from error
    finally:
        sys.path.remove("")
    if found is None:
        raise ValueError(f"{name!r} must name a Cell, but there is no {attribute!r} in {module}")
    if not isinstance(found, Cell):
        raise ValueError(f"{name!r} must name a Cell, got {type(found).__name__}")
    try:
        build(found, False)
    except Exception as error:  # whatever somebody's function does
        raise ValueError(_in_a_line(error)) from error
    return found


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Wanted(NamedTuple):
    """A kernel by what it takes to find it in another process: the part "forward" or "backward" of a cell by name, or
    one of `ONCE` and `EACH` (for each dtype), which all cells use, or of a family of tiles, "tall". lanes: numbers in a
    vector of those of a cell."""

    part: str
    dtype: torch.dtype
    lanes: int
    cell: str = ""
    project: bool = False
    family: Family | None = None


ONCE: dict[str, Callable[[Wanted], store.Kernel]] = {
    "driver": lambda _: script.driver(),
    **({"recall": lambda _: again.kernel()} if again.interface() else {}),
    **{name: lambda want: lengths.kernel(want.part) for name in lengths.KERNELS},
    **({"lead": lambda _: team.leader()} if team.library() else {}),
}
EACH: dict[str, Callable[[Wanted], store.Kernel]] = {
    "pack": lambda want: engine.copying(want.part, want.dtype, want.lanes),
    "turn": lambda want: engine.copying(want.part, want.dtype, want.lanes),
    "sum": lambda want: engine.plain(want.dtype)[1].kernel,
    "product": lambda want: engine.plain(want.dtype)[0].kernel,
}


def wanted(
    names: Sequence[str], dtypes: Sequence[torch.dtype], project: bool, sizes: Sequence[int] = ()
) -> list[Wanted]:
    """Every kernel of layers of these cells, those that take longest to compile first: but after the first of them
    those of `ONCE`. They have no loops over time, which are lowered meanwhile, once for all that have. sizes: the
    hidden sizes, where they are known."""
    widest = {dtype: host().lanes(dtype.itemsize) for dtype in dtypes}
    widths = {dtype: {host().lanes(dtype.itemsize, size) for size in sizes} or {widest[dtype]} for dtype in dtypes}
    of_cells = [
        Wanted(part, dtype, lanes, name, project)
        for dtype in dtypes
        for lanes in sorted(widths[dtype])
        for name in names
        for part in ("backward", "forward")
    ]
    runners = [*map(_runner, of_cells), *(engine.plain(dtype)[0] for dtype in dtypes)]
    families = dict.fromkeys(Wanted("tall", r.dtype, r.lanes, family=f) for r in runners for f in r.families())
    each = [
        Wanted(part, dtype, lanes)
        for dtype in dtypes
        for part in reversed(EACH)
        for lanes in (sorted(widths[dtype] | {widest[dtype]}) if part == "pack" else [widest[dtype]])
    ]
    once = [Wanted(part, dtypes[0], widest[dtypes[0]]) for part in reversed(ONCE)]
    return [*of_cells[:1], *once, *each, *of_cells[1:], *families]


def _runner(want: Wanted) -> engine.Runner:
    return getattr(cpu.ready(find_cell(want.cell), want.project, want.dtype, want.lanes), want.part)


def obtain(want: Wanted) -> tuple[str, float]:
    """Compile a kernel or load it: its name, and the seconds it took to compile, 0 if it was stored."""
    if want.cell:
        kernel = _runner(want).kernel
    elif want.family is not None:
        kernel = engine.tall(want.family, want.dtype, want.lanes)
    else:
        kernel = (ONCE | EACH)[want.part](want)
    return kernel.name, kernel.compiled


def run(wants: Sequence[Wanted]) -> Iterator[tuple[str, float]]:
    """`obtain` of each, as they are done."""
    processors = team.processors()
    if processors == 1:
        yield from map(obtain, wants)
        return
    import numba  # noqa: F401  # once, where processes are copies of this one

    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(min(processors, len(wants)), context) as pool:
        futures = [pool.submit(obtain, want) for want in wants]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:  # whoever has enough does not wait for the rest
            pool.shutdown(cancel_futures=True)
