"""One time step of a cell as a graph, and what the backward pass makes of it."""

from __future__ import annotations

from ..expression import ZERO, Node, gradients, is_reduction, leaf, substitute, topological

OWN = ("p", "scalar", "input", "step_input", "mark")  # kinds of leaves that are a cell's own tensors


def is_state(node: Node) -> bool:
    """Whether it is what a state was before the step."""
    return node.op == "leaf" and node.value[0] == "s"


class Step:
    """One time step of a cell as a graph, with the gradients of its pre-activations and states."""

    def __init__(
        self, states: tuple[str, ...], gates: tuple[str, ...], traced: tuple[Node, ...], project: bool, feed: bool
    ):
        outputs = list(traced)
        self.hidden = leaf("s", states[0])
        # Where h is not only what u.g multiplies, or u.g multiplies another vector, sizes have to agree.
        self.square = any(
            self.hidden in n.args if n.op != "product" else n.args[0] is not self.hidden for n in topological(outputs)
        )
        if project:
            outputs[0] = Node("product", (outputs[0],), ("hr", states[0]))
        outputs, self.derived = _derive(outputs, states)
        self.states = states = states + tuple(self.derived)
        self.outputs, self.shared = _share(outputs)
        nodes = topological(self.outputs)
        products = sorted(
            (n for n in nodes if n.op == "product"), key=lambda n: gates.index(n.value[1]) if n.value[0] == "hh" else -1
        )
        x_leaves = [leaf("x", g) for g in gates if leaf("x", g) in nodes]
        self.new_state = dict(zip(self.outputs, states, strict=True))
        self.operand_of = {n.value[1]: n.args[0] for n in products if n.value[0] == "hh"}
        self.operands = {n.args[0] for n in products if not is_state(n.args[0])}
        self.u_gates = tuple(self.operand_of)
        self.bias_gates = tuple(g for g in self.u_gates if g not in self.shared)
        self.x_gates = tuple(g for g in gates if g in self.shared or leaf("x", g) in x_leaves)
        self.start_of = {n.value[1]: n for n in [*x_leaves, *products] if n.op == "leaf" or n.value[1] in self.shared}

        # A product of a computed vector needs all of that vector: it begins a stage. Nodes that need no stage get -1.
        self.forward_accumulators = {n: 0 if is_state(n.args[0]) else None for n in products}
        # Input projections that are summed over the units have to be there before.
        self.ahead = any(map(is_reduction, nodes))
        if not self.ahead:
            self.forward_accumulators |= dict.fromkeys(x_leaves, -1)

        found: dict[tuple[str, str], Node] = {}

        def other(node: Node, grad: Node):
            if node.op == "product":
                matrix, gate = node.value[:2]
                found["hr" if matrix == "hr" else "u", gate] = grad
                if gate in self.shared and matrix == "hh":
                    found["x", gate] = grad
                if not is_state(node.args[0]):
                    yield node.args[0], Node("transposed", (grad,), (matrix, gate))
            elif node.value[0] == "x":
                found["x", node.value[1]] = grad

        grads = gradients(self.outputs, [leaf("d", s) for s in states], other)
        keys = [("x", g) for g in self.x_gates] + [("u", g) for g in self.u_gates]
        self.backward = {k: found.get(k, ZERO) for k in keys}
        self.backward |= {k: v for k, v in found.items() if k[0] == "hr"}
        self.backward |= {("s", s): grads.get(leaf("s", s), ZERO) for s in states}
        kinds = OWN[:4] if feed else OWN[:2]
        self.own = tuple(n for n in topological(self.outputs) if n.op == "leaf" and n.value[0] in kinds and n in grads)
        for n in self.own:  # sums over the steps, but for an input of every step
            before = ZERO if n.value[0] == "step_input" else leaf("total", n.value[1])
            self.backward["own", n] = before + grads[n]
        self.backward_roots = list(self.backward.values())


def _derive(outputs: list[Node], states: tuple[str, ...]) -> tuple[list[Node], dict[str, Node]]:
    """Operands of products that only need the step before, such as p.mask * s.h, become states, made in that step.

    Returns the outputs with those of the new states, and what the new states are over leaves of the given ones.
    """

    def early(node: Node) -> bool:
        leaves = [n for n in topological([node]) if n.op == "leaf" or n.op == "product"]
        return all(n.op == "leaf" and n.value[0] not in ("x", "step_input", "mark") for n in leaves)

    products = [n for n in topological(outputs) if n.op == "product" and n.value[0] == "hh"]
    operands = [n.args[0] for n in products if not is_state(n.args[0]) and early(n.args[0])]
    derived = {f"{states[0]}+{k}": v for k, v in enumerate(dict.fromkeys(operands))}
    state_of = {v: leaf("s", name) for name, v in derived.items()}
    replace = {n: Node("product", (state_of[n.args[0]],), n.value) for n in products if n.args[0] in state_of}
    outputs = substitute(outputs, replace)
    new = dict(zip([leaf("s", s) for s in states], outputs, strict=True))
    return outputs + substitute(list(derived.values()), new), derived


def _share(outputs: list[Node]) -> tuple[list[Node], set[str]]:
    """Where x.g and u.g only ever appear as x.g + u.g, make that sum one product node that starts from x.g."""
    nodes = topological(outputs)
    users: dict[Node, set[Node]] = {}
    for n in nodes:
        for a in n.args:
            users.setdefault(a, set()).add(n)
    replace, shared = {}, set()
    for n in nodes:
        if n.op != "add":
            continue
        for x, u in (n.args, n.args[::-1]):
            both = x.op == "leaf" and x.value[0] == "x" and u.op == "product" and u.value[1] == x.value[1]
            if both and users[x] == {n} and users[u] == {n} and x not in outputs and u not in outputs:
                replace[n] = (u, x.value[1])
                shared.add(x.value[1])
    # innermost first, so that a product's operand is itself already replaced
    done: dict[Node, Node] = {}
    for n in nodes:
        if n in replace:
            u, gate = replace[n]
            (operand,) = substitute([u.args[0]], done)
            done[n] = Node("product", (operand,), ("hh", gate, "shared"))
    return substitute(outputs, done), shared
