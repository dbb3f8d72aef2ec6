"""What training keeps of a time step for the backward pass, and where."""

from __future__ import annotations

import math

from ..expression import OPERATIONS, Node, is_condition, reached
from .step import OWN

SAVE_COST = 4.0  # of keeping a value for the backward pass; Operation.cost has the other side of the scale
SAVE_NUMBER = 0.05  # of keeping a single number for all units


def forward_values(roots: list[Node], forward: set[Node]) -> set[Node]:
    """Forward numbers that the backward graph uses directly (a condition is had from what it compares)."""

    def used(node: Node) -> bool:
        return node in forward and not is_condition(node)

    return {n for n in reached(roots, used) if used(n) and not _is_kept(n)}


def _is_kept(node: Node) -> bool:
    """Whether the backward pass has the value anyway: a state, or a tensor of the cell's own."""
    return node.op == "leaf" and node.value[0] in ("s", *OWN)


def choose_saved(
    nodes: list[Node], wanted: set[Node], stored: set[Node], forced: set[Node], in_slots: set[Node]
) -> list[Node]:
    """Which of the forward nodes to keep: the cheapest set from which all wanted ones can be had.

    in_slots: what is kept for nothing if it is wanted.

    Starts from keeping all that is wanted and takes every improving step: drop a value, or keep its arguments instead.
    """

    def recompute_cost(saved: frozenset[Node]) -> float:
        total = sum(SAVE_NUMBER if n.uniform else SAVE_COST for n in saved if n not in in_slots)

        def known(node: Node) -> bool:
            return node in saved or node in stored or _is_kept(node)

        redone = [n for n in reached([n for n in order if n in wanted], known) if not known(n)]
        # An input projection or a recurrent product is gone after the step.
        return total + sum([OPERATIONS[n.op].cost if n.op in OPERATIONS else math.inf for n in redone])

    order = [n for n in nodes if n not in stored or n in forced]
    saved = frozenset(n for n in wanted if n not in stored) | forced
    best = recompute_cost(saved)
    improved = True
    while improved:
        improved = False
        for node in order:
            if node not in saved or node in forced:
                continue
            args = {b for a in node.args for b in (a.args if is_condition(a) else (a,))}
            args -= {a for a in args if a.op == "constant" or a in stored or _is_kept(a)}
            for trial in (saved - {node}, (saved - {node}) | args):
                cost = recompute_cost(trial)
                if cost < best:
                    saved, best, improved = trial, cost, True
                    break
    return [n for n in order if n in saved]


def assign_slots(
    saved: list[tuple[int, int, bool]], written: dict[int, int], x_level: dict[int, int], lies: list[int | None]
) -> list[int]:
    """A slot for every saved value (level stored at, level last used at, kept for good).

    lies: the slot that a value is in to begin with, if it is.

    A value may take a gate's slot if it is stored no earlier than the gate's input projection is read, and last used no
    later than the gate's gradient is written.
    """
    extra = len(written) + len(saved)

    def fits(k: int, slot: int) -> bool:
        stored_at, used_at, kept = saved[k]
        if slot in written and (kept or used_at > written[slot]):
            return False
        return slot == lies[k] or stored_at >= x_level.get(slot, 0)

    def place(k: int, limit: int, holder: dict[int, int], seen: set[int]) -> bool:
        """Find a slot for value k, moving others if need be (an augmenting path of bipartite matching)."""
        for slot in sorted(range(limit), key=lambda s: s != lies[k]):
            if slot not in seen and fits(k, slot):
                seen.add(slot)
                if slot not in holder or place(holder[slot], limit, holder, seen):
                    holder[slot] = k
                    return True
        return False

    for limit in range(max(len(written), len(saved)), extra + 1):
        holder: dict[int, int] = {}
        if all(place(k, limit, holder, set()) for k in range(len(saved))):
            slot_of = {k: slot for slot, k in holder.items()}
            return [slot_of[k] for k in range(len(saved))]
    raise AssertionError("every saved value fits a slot of its own")
