"""Derived programs, run by torch: what kernels compute of them, without compiling any."""

import torch

from fastcells.derivation import build
from fastcells.expression import OPERATIONS, leaf


def value(root, known):
    """A node, of those that are known."""
    waiting = [root]
    while waiting:
        node = waiting[-1]
        missing = [a for a in node.args if a not in known]
        if node in known or not missing:
            waiting.pop()
        if node in known:
            continue
        if missing:
            waiting += missing
        elif node.op == "constant":
            known[node] = torch.tensor(node.value, dtype=torch.float64)
        else:
            assert node.op in OPERATIONS, f"{node!r} is not there"
            known[node] = OPERATIONS[node.op].torch(*(known[a] for a in node.args))
    return known[root]


class Interpreter:
    """Both passes of a layer of one direction, with biases, initial states, and input projections made ahead.

    Of a cell without sums over the units. What nobody has written is not a number. each: the other states have
    cotangents at every step.
    """

    def __init__(self, cell, x, states, parameters, each):
        self.cell, self.programs, self.x = cell, build(cell, False, False, each), x
        w_ih, w_hh, b_ih, b_hh, _, *own = parameters
        self.own = dict(zip(cell.own, own[0] if own else (), strict=True))
        self.hidden = w_hh.shape[1]
        self.blocks = {g: slice(k * self.hidden, (k + 1) * self.hidden) for k, g in enumerate(cell.gates)}
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = (
            {g: t[rows] for g, rows in self.blocks.items()} for t in (w_ih, w_hh, b_ih, b_hh)
        )
        p, (steps, size, _) = self.programs, x.shape
        self.kept = torch.full((steps, p.slots, size, self.hidden), torch.nan, dtype=x.dtype)
        for k, g in enumerate(p.start_gates):
            self.kept[:, k] = x @ self.w_ih[g].T + self.b_ih[g] + (self.b_hh[g] if g in p.shared else 0.0)
        self.initial = dict(zip(cell.states, states, strict=True))
        known = self.leaves(self.initial)
        derived = zip(p.states[len(cell.states) :], p.derived, strict=True)
        self.initial |= {name: value(node, known).expand(size, self.hidden) for name, node in derived}
        self.series = {name: torch.full((steps, *states[0].shape), torch.nan, dtype=x.dtype) for name in p.states}
        self.static, self.given = {}, {}

    def leaves(self, states):
        """What expressions of states and of the cell's own tensors begin with."""
        known = {leaf("s", name): t for name, t in states.items()}
        return known | {leaf("scalar" if n in self.cell.scalars else "p", n): t for n, t in self.own.items()}

    # Processed steps are numbered by `t`; `since` is the one processed before, if there is one.
    def read(self, place, t, since):
        kind, _, name = place.buffer.partition(".")
        if kind in ("start", "saved", "grad"):
            if place.when != "before":
                return self.kept[t, place.slot]
            return torch.zeros_like(self.kept[0, 0]) if since is None else self.kept[since, place.slot]
        if kind == "bias":
            return self.b_hh[self.programs.bias_gates[place.slot]]
        if kind == "s":
            if place.when == "now":
                return self.series[name][t]
            return self.initial[name] if t == 0 else self.series[name][t - 1]  # forward before, and backward after
        if kind == "own":
            return self.own[name]
        if kind in ("dy", "each"):
            return self.given[place.buffer][t]
        if place.when == "first" and since is not None:
            return torch.zeros_like(self.kept[0, 0])
        return self.static[place.buffer, place.slot]

    def write(self, place, t, new):
        kind, _, name = place.buffer.partition(".")
        new = new.expand(self.kept.shape[2:]).clone()
        if kind in ("start", "saved", "grad"):
            self.kept[t, place.slot] = new
        elif kind == "s":
            self.series[name][t] = new
        else:
            self.static[place.buffer, place.slot] = new

    def step(self, program, t, since):
        for stage in program.stages:
            sums = [sum((self.read(p, t, since) for p in start), start=0.0) for _, start in stage.accumulators]
            for segment in stage.segments:
                rows, weights = segment.rows, segment.weights
                if rows.buffer == "x":  # in the input projections already
                    continue
                for k, gate in enumerate(weights.gates):
                    if weights.transposed:
                        place = type(rows)(rows.buffer, rows.slot + k, rows.when)
                        target, product = segment.targets[0], self.read(place, t, since) @ self.w_hh[gate]
                    else:
                        target, product = segment.targets[k], self.read(rows, t, since) @ self.w_hh[gate].T
                    sums[target] = sums[target] + product
            known = {node: s for (node, _), s in zip(stage.accumulators, sums, strict=True)}
            known |= {node: self.read(place, t, since) for node, place in stage.loads.items()}
            made = [(place, value(node, known)) for node, place, _ in stage.outputs]
            for place, new in made:
                self.write(place, t, new)

    def forward(self):
        """The output, the final states, and the other states of every step."""
        for t in range(len(self.x)):
            self.step(self.programs.forward, t, t - 1 if t else None)
        first, *others = self.cell.states
        finals = [self.series[name][-1] for name in self.cell.states]
        return self.series[first], finals, [self.series[name] for name in others]

    def backward(self, dy, dfinals, dothers):
        """Gradients of x, the states, the weights and biases, and the cell's own tensors."""
        p, cell, nothing = self.programs, self.cell, torch.zeros_like(self.kept[0, 0])
        self.given = {"dy": dy} | {f"each.{n}": t for n, t in zip(cell.states[1:], dothers, strict=True)}
        self.static = {(f"carry.{name}", 0): nothing for name in p.states}
        self.static |= {(f"carry.{name}", 0): t for name, t in zip(cell.states, dfinals, strict=True)}
        self.static |= {(f"total.{name}", 0): nothing for name in cell.own}
        last = len(self.x) - 1
        for t in range(last, -1, -1):
            self.step(p.backward, t, t + 1 if t < last else None)
        found = {n: torch.zeros_like(t) for n, t in self.of_weights().items()}
        for g, rows in self.blocks.items():
            if g in p.gradients.x:
                grad = self.kept[:, p.gradients.x[g]]
                found["w_ih"][rows], found["b_ih"][rows] = torch.einsum("tnh,tni->hi", grad, self.x), grad.sum((0, 1))
                found["x"] += grad @ self.w_ih[g]
            if g in p.gradients.u:
                grad, operand = self.kept[:, p.gradients.u[g]], p.gradients.operands[g]
                if isinstance(operand, str):
                    before = torch.cat([self.initial[operand][None], self.series[operand][:-1]])
                else:
                    before = self.kept[:, operand]
                found["w_hh"][rows], found["b_hh"][rows] = torch.einsum("tnh,tni->hi", grad, before), grad.sum((0, 1))
        of_states = {}
        for name in p.states:
            carried = name in cell.states and (name in p.carried or name != cell.states[0])
            of_states[name] = self.static[f"carry.{name}", 0] if carried else nothing
            for g, operand in p.gradients.operands.items():
                if operand == name:
                    of_states[name] = of_states[name] + self.kept[0, p.gradients.u[g]] @ self.w_hh[g]
        totals = {n: self.static[f"total.{n}", 0] for n in cell.own}
        of_own = {n: t.sum() if n in cell.scalars else t.sum(0) for n, t in totals.items()}
        self.through_derived(of_states, of_own)
        weights = [found[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
        return [found["x"], *(of_states[n] for n in cell.states), *weights, *of_own.values()]

    def of_weights(self):
        stacked = {n: torch.cat([*getattr(self, n).values()]) for n in ("w_ih", "w_hh", "b_ih", "b_hh")}
        return {"x": self.x} | stacked

    def through_derived(self, of_states, of_own):
        """Add what the first values of derived states owe to the initial states and the cell's own tensors."""
        if not self.programs.derived:
            return
        with torch.enable_grad():
            states = {n: self.initial[n].clone().requires_grad_() for n in self.cell.states}
            self.own, own = {n: t.clone().requires_grad_() for n, t in self.own.items()}, self.own
            known, sources = self.leaves(states), [*states.values(), *self.own.values()]
            made = [value(node, known).expand(self.kept.shape[2:]) for node in self.programs.derived]
            cotangents = [of_states[n] for n in self.programs.states[len(self.cell.states) :]]
            grads = torch.autograd.grad(made, sources, cotangents, allow_unused=True, materialize_grads=True)
        self.own = own
        for k, name in enumerate(states):
            of_states[name] = of_states[name] + grads[k]
        for k, name in enumerate(own, len(states)):
            of_own[name] = of_own[name] + grads[k]
