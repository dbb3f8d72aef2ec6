"""Programs derived from cells, also of cells that nobody would write: interpreted, they are what autograd computes."""

import random

import pytest
import torch
from interpreter import Interpreter
from problems import problem

from fastcells import cell, cells, unrolled
from fastcells.cell import Cell
from fastcells.expression import sigmoid, softplus, tanh, where

OF_ONE = [tanh, sigmoid, torch.sin, softplus, lambda v: -v, lambda v: 0.5 * v, lambda v: 1.0 - v, lambda v: v * v]
OF_TWO = [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / (1.0 + b * b)]
WITHOUT_SUMS = [c for c in vars(cells).values() if isinstance(c, Cell) and "norm" not in c.name]


def invented_cell(seed):
    """A cell of random operations on its gates, states, and own tensors, each product of any vector."""
    draw = random.Random(seed)
    gates, states = ([f"{kind}{k}" for k in range(draw.randint(1, 4))] for kind in "gs")
    parameters, scalars = ([f"{kind}{k}" for k in range(draw.choice([0, 0, 1]))] for kind in "pq")
    count, seed = draw.randint(3, 12), draw.random()

    def step(x, u, s, p=None):
        draw = random.Random(seed)
        there = [
            *(getattr(s, n) for n in states),
            *(getattr(x, n) for n in gates),
            *(getattr(p, n) for n in parameters),
        ]
        left = draw.sample(gates, len(gates))
        one = lambda: draw.choice(there if draw.random() < 0.5 else there[-3:])  # noqa: E731
        for _ in range(count):
            kind = draw.random()
            if kind < 0.25 and left:
                gate = left.pop()
                product = getattr(u, gate)(one() if draw.random() < 0.6 else getattr(s, states[0]))
                there.append(product + getattr(x, gate) if draw.random() < 0.6 else sigmoid(product))
            elif kind < 0.55:
                there.append(draw.choice(OF_ONE)(one()))
            elif kind < 0.62:
                there.append(where((one() > one()) | ~(one() < 0.1), one(), one()))
            elif kind < 0.7 and scalars:
                there.append(one() * getattr(p, scalars[0]))
            else:
                there.append(draw.choice(OF_TWO)(one(), one()))
        given = len(states) + len(gates)
        kept = [draw.choice(there[:given]) if draw.random() < 0.3 else one() for _ in states]
        return [v if draw.random() < 0.25 else tanh(v) + 0.3 * getattr(s, n) for v, n in zip(kept, states, strict=True)]

    lists = {"states": states, "parameters": parameters, "scalars": scalars}
    return cell(" ".join(gates), name=f"invented{seed}", **{n: " ".join(names) for n, names in lists.items()})(step)


def check(c, each):
    (_, x, states, (parameters,), *_), leaves, names = problem(c, 4, 3, 2, 5)
    y, finals, others = unrolled.layer(c, x, states, [parameters], None, (), True)
    outputs = [y, *finals, *(others if each else ())]
    cotangents = [torch.randn_like(t) for t in outputs]
    expected = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True, materialize_grads=True)
    if not all(t.isfinite().all() and t.abs().max() < 1e3 for t in (*outputs, *expected)):
        return
    with torch.no_grad():
        directions = [t if t is None or isinstance(t, tuple) else t.detach() for t in parameters]
        run = Interpreter(c, x, [s[0] for s in states], directions, each)
        found = run.forward()
        dy, *rest = cotangents
        dfinals = [t[0] for t in rest[: len(c.states)]]
        grads = run.backward(dy, dfinals, rest[len(c.states) :] if each else [None] * (len(c.states) - 1))
    for a, b in zip((found[0], *found[1], *found[2]), (y, *(t[0] for t in finals), *others), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)
    for name, a, b in zip(names, grads, expected, strict=True):
        torch.testing.assert_close(
            a.view_as(b), b, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{c.name}: {n}: {text}"
        )


@pytest.mark.parametrize("each", [False, True], ids=["", "every state's cotangents"])
@pytest.mark.parametrize("c", [c for c in WITHOUT_SUMS if not c.fed], ids=lambda c: c.name)
def test_cells_of_the_page(c, each):
    if c in (cells.indrnn,):
        pytest.skip("has no recurrent weights")
    check(c, each and len(c.states) > 1)


@pytest.mark.parametrize("seed", range(8))
def test_invented_cells(seed):
    """Some are no cells, as they use no gate, or a product of what is the same for all units."""
    done = 0
    for k in range(60):
        c = invented_cell(100 * seed + k)
        try:
            c.trace()
        except TypeError:
            continue
        check(c, k % 2 == 1 and len(c.states) > 1)
        done += 1
    assert done > 20
