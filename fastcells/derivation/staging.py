"""Which stage of a time step computes what."""

from __future__ import annotations

from ..expression import OPERATIONS, Node, is_condition, is_reduction, reached, topological
from .step import is_state


class Staging:
    """Which stage computes which node.

    accumulators: nodes that only a stage's product makes: its number, None for one stage after its operand, -1 for the
    stage that first uses it; "transposed" products come one stage after their operand too. overwritten: leaves whose
    place a stage writes, and what it writes there. Whatever depends on none of
    these is computed in each stage that wants it. Here a pass over a row counts as a stage: a reduction takes its sum
    in the first one that has its arguments and no products, and is known from the next one on.
    """

    def __init__(
        self, roots: list[Node], accumulators: dict[Node, int | None], overwritten: dict[Node, Node] | None = None
    ) -> None:
        self.nodes = topological(roots)
        self._level: dict[Node, int] = {}
        self._accumulators = [n for n in accumulators if n in self.nodes]
        self._accumulators += [n for n in self.nodes if n.op == "transposed"]
        operands = {a for n in self._accumulators if n.op in ("product", "transposed") for a in n.args}
        self._reductions = [n for n in self.nodes if is_reduction(n)]
        products: set[int] = set()  # stages that have some
        made_by_products = set(self._accumulators)
        while True:
            for n in self.nodes:
                # Where there are passes, whatever follows a product is left to the next one: there is one row at a time
                # in it, where tiles come in many shapes, each with an epilogue of its own to compile.
                late = made_by_products if self._reductions else ()
                level = max((self._level[a] + (a in late) for a in n.args), default=-1)
                if n in accumulators and accumulators[n] is not None:
                    level = accumulators[n]  # type: ignore[assignment]
                elif n in accumulators or n.op == "transposed":
                    level = max((self._level[a] for a in n.args), default=-1) + 1
                elif is_reduction(n):
                    level = max(level, 0)
                    while level in products:
                        level += 1
                    level += 1
                self._level[n] = max(level, 0) if n in operands and not is_state(n) else level
            for n in accumulators:
                if n in self._level and self._level[n] == -1:
                    self._level[n] = max(0, min((self._level[m] for m in self.nodes if n in m.args), default=0))
            found = {self._level[n] for n in self._accumulators}
            if not self._reductions or found <= products:
                break
            products |= found
        self.depth = max((self.stage(n) for n in self.nodes), default=0) + 1
        self._roots = roots
        # Passes that follow each other are one group; every other stage is one by itself.
        self.group, self.is_pass = (
            [0] * self.depth,
            [bool(self._reductions) and k not in products for k in range(self.depth)],
        )
        for k in range(1, self.depth):
            self.group[k] = self.group[k - 1] + (not (self.is_pass[k] and self.is_pass[k - 1]))
        self.crossing: dict[Node, None] = {}
        made = [*roots, *(n for n in self.nodes if n in operands)]
        while True:
            for k in reversed(range(self.depth)):  # a later stage needs it, and cannot compute it from stored vectors
                for n in self.needs(k, [r for r in [*made, *self.crossing] if self.stage(r) == k]):
                    for m in self.inherited(n, k) if n.uniform else [n]:
                        if self._level[m] >= 0 and self._level[m] < k + m.uniform:
                            self.crossing[m] = None
            lost = [
                (n, self.stage(by))
                for n, by in (overwritten or {}).items()
                if n not in accumulators and self._level.get(n, -1) < 0
                and any(n in self.needs(k) for k in range(self.stage(by) + 1, self.depth))
            ]  # fmt: skip
            if not lost:
                break
            self._level |= dict(lost)  # whoever needs it after it is overwritten has to be handed it

    def group_of(self, node: Node) -> int:
        """The group that computes a node: a uniform one after the pass in which its last sum was taken."""
        return self.group[max(self._level[node] - node.uniform, 0)]

    def inherited(self, uniform: Node, stage: int) -> list[Node]:
        """What a stage's group has to load for a uniform value: leaves, and uniform values of earlier groups."""
        if uniform.op == "constant":
            return []
        if uniform.op == "leaf":
            return [uniform]
        if self._level[uniform] >= 0 and self.group_of(uniform) != self.group[stage] and not is_condition(uniform):
            return [uniform]
        if is_reduction(uniform):
            return []
        return [m for a in uniform.args for m in self.inherited(a, stage)]

    def _is_redone(self, node: Node) -> bool:
        """Whether a pass had better compute a value of an earlier one again, from the one argument that it loads."""
        if not self._reductions or node.op not in OPERATIONS or node.uniform or OPERATIONS[node.op].cost > 0.25:
            return False
        free = [a.op == "constant" or a.uniform or (a.op == "leaf" and a.value[0] != "d") for a in node.args]
        return free.count(False) <= 1

    def reductions(self, stage: int) -> list[Node]:
        """Whose sums a pass takes."""
        return [n for n in self._reductions if self._level[n] == stage + 1]

    def stage(self, node: Node) -> int:
        """The stage that computes this node, if it is asked to."""
        return max(self._level.get(node, 0), 0)

    def accumulators(self, stage: int) -> list[Node]:
        return [n for n in self._accumulators if self._level[n] == stage]

    def needs(self, stage: int, roots: list[Node] | None = None) -> list[Node]:
        """What a stage loads to compute the roots (or all that it has to): leaves, and values of earlier stages."""
        if roots is None:
            roots = [n for n in [*self._roots, *self.crossing] if self.stage(n) == stage]
        made = set(self.accumulators(stage))

        def loaded(node: Node) -> bool:
            level = self._level.get(node, -1)
            there = 0 <= level < stage + node.uniform and not is_condition(node) and not self._is_redone(node)
            return there or node.op == "leaf" or (node.uniform and self.is_pass[stage])

        roots = [*roots, *(a for n in self.reductions(stage) for a in n.args)]
        return [n for n in reached(roots, lambda n: n in made or loaded(n)) if n not in made and loaded(n)]
