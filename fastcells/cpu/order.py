"""What an epilogue computes: in which order, what goes into multiply-adds, and what is computed of all rows first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import NamedTuple

from ..expression import OPERATIONS, Node, topological
from ..program import Stage

LONG = 2  # cost of an operation, from which on it is a chain of many that wait for each other


def between(given: Callable[[Node], bool], roots: list[Node]) -> list[Node]:
    """What is to be computed to get from the given nodes to the roots, arguments first."""
    order = topological(roots)
    needed = set(roots)
    for node in reversed(order):  # users first
        if node in needed:
            if given(node):
                needed.remove(node)
            else:
                needed.update(node.args)
    return [n for n in order if n in needed]


Fused = Mapping[Node, int]
"""Sums and differences that take up a product which nothing else uses, and which of their arguments it is."""


def fuse(order: list[Node], roots: Iterable[Node]) -> tuple[list[Node], Fused]:
    """What is left to compute where products go into sums. Decided here: a compiler may decide otherwise from one
    variant of an epilogue to the next, and results would depend on which rows a thread has."""
    uses = Counter(chain((a for n in order for a in n.args), roots))
    alone = {n for n in order if n.op == "mul" and uses[n] == 1}
    fused = {n: min(map(n.args.index, found)) for n in order if n.op in ("add", "sub") and (found := alone & {*n.args})}
    gone = {n.args[k] for n, k in fused.items()}
    return [n for n in order if n not in gone], fused


class Part(NamedTuple):
    """What a part of an epilogue computes, arguments first. made: what the early part leaves for the late one."""

    order: list[Node]
    fused: Fused
    made: dict[Node, int]


def ordered(stage: Stage, part: str = "whole") -> Part:
    """What the "whole" of a stage's epilogue computes, or the "early" or "late" part of it."""
    given = {n for n, _ in stage.accumulators} | set(stage.loads)
    roots = [n for n, _, _ in stage.outputs]
    order, fused = fuse(between(given.__contains__, roots), roots)  # of the whole, for results to be the same
    if part == "whole":
        return Part(order, fused, {})
    made = early(stage)
    if part == "early":
        wanted = between(given.__contains__, list(made))
    else:
        wanted = between(lambda n: n in given or n in made, roots)
    some = set(wanted)
    return Part([n for n in order if n in some], fused, made)


def early(stage: Stage) -> dict[Node, int]:
    """Long functions of sums, where other long ones follow: each with the accumulator whose sum nothing else needs, and
    whose place its result may take. Computed of all rows first, they wait for nothing, and what follows waits for
    nothing either; one vector after the other, a processor would have little to do while it waits for the second ones.
    """
    if not stage.segments:
        return {}
    sums = [n for n, _ in stage.accumulators]
    given = {*sums, *stage.loads}
    roots = [n for n, _, _ in stage.outputs]
    order = between(given.__contains__, roots)
    depth: dict[Node, int] = dict.fromkeys(given, 0)  # long functions on the way
    for n in order:
        depth[n] = max([depth.get(a, 0) for a in n.args], default=0) + is_long(n)
    if max(depth.values()) < 2:
        return {}
    ends: dict[Node, set[Node | None]] = {n: set() for n in [*given, *order]}  # the first long ones that need it
    for n in roots:
        ends[n].add(None)
    for n in reversed(order):
        for a in n.args:
            if a in ends:
                ends[a] |= {n} if is_long(n) else ends[n]
    found: dict[Node, int] = {}
    for k, n in enumerate(sums):
        if len(ends[n]) == 1:
            (end,) = ends[n]
            if end is not None and depth[end] == 1:
                found.setdefault(end, k)
    return found


def is_long(n: Node) -> bool:
    return n.op in OPERATIONS and OPERATIONS[n.op].cost >= LONG
