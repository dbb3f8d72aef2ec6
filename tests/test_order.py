"""What is computed of all rows first: long functions of sums, where other long ones follow."""

import pytest

from fastcells import cell, cells
from fastcells.cpu.order import early, ordered
from fastcells.derivation import build
from fastcells.expression import sigmoid, tanh


def first_stage(given):
    return build(given, False, False, False).forward.stages[0]


@cell(gates="a b")
def twice(x, u, s):
    """The sum of the first gate is needed once more, after its activation."""
    first = x.a + u.a
    return tanh(sigmoid(first) * first + sigmoid(x.b + u.b))


@cell(gates="a b")
def together(x, u, s):
    """Two sums meet before the first activation."""
    return tanh(sigmoid(x.a + u.a + x.b + u.b) - s.h)


@cell(gates="a b")
def halfway(x, u, s):
    """A product of loaded states is needed early and late."""
    square = s.h * s.h
    return tanh(sigmoid(x.a + u.a + square) + (x.b + u.b) + square)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (cells.lstm, {"sigmoid": 3, "tanh": 1}),
        (cells.peephole_lstm, {"sigmoid": 2, "tanh": 1}),  # the output gate sees the new cell state
        (cells.gru, {"sigmoid": 2}),
        (cells.rnn_tanh, {}),  # nothing long follows
        (cells.ligru, {}),
        (twice, {"sigmoid": 1}),
        (together, {"sigmoid": 1}),
        (halfway, {"sigmoid": 1}),
    ],
    ids=lambda g: getattr(g, "name", ""),
)
def test_long_functions_of_sums_that_nothing_else_needs_come_first(given, expected):
    stage = first_stage(given)
    found = early(stage)
    ops = [n.op for n in found]
    assert {op: ops.count(op) for op in ops} == expected
    assert len(set(found.values())) == len(found), "each takes the place of another sum"


@pytest.mark.parametrize("given", [cells.lstm, cells.gru, cells.peephole_lstm, halfway], ids=lambda c: c.name)
def test_the_parts_of_an_epilogue_are_its_whole(given):
    stage = first_stage(given)
    whole, first, rest = (ordered(stage, part) for part in ("whole", "early", "late"))
    assert set(whole.order) == {*first.order, *rest.order}
    assert first.fused == rest.fused == whole.fused, "what goes into multiply-adds differs, and so would results"
    assert not set(first.made) & set(rest.order), "computed twice"
    assert set(first.made) == set(rest.made) <= set(first.order)
