"""What a cell reads from outside of its function: kernels are never those of what it read before."""

import functools
import time
import types

import numpy as np
import pytest
import torch
from helpers import same

from fastcells import cell, functional, nn, variants
from fastcells.cpu import again
from fastcells.expression import sigmoid, tanh
from fastcells.roof import using_threads

one_by_name, one_of_numpy, one_in_a_tuple, one_nested, one_of_a_decorator, one_of_another, one_for_an_option = (
    1.0,
) * 7
one_within = 1.0
one_of_numpy, one_in_a_tuple, squash, torchs, one_in_a_list = np.float32(1), (1.0,), tanh, torch.tanh, [1.0]
module, thing = types.ModuleType("module"), types.SimpleNamespace(one=1.0)
module.one = 1.0


@cell(gates="a")
def by_name(x, u, s):
    return tanh(x.a + u.a) * one_by_name


@cell(gates="a")
def of_numpy(x, u, s):
    return tanh(x.a + u.a) * one_of_numpy


@cell(gates="a")
def in_a_tuple(x, u, s):
    return tanh(x.a + u.a) * one_in_a_tuple[0]


@cell(gates="a")
def of_a_module(x, u, s):
    return tanh(x.a + u.a) * module.one


@cell(gates="a")
def own_name_of_a_function(x, u, s):
    return squash(x.a + u.a)


@cell(gates="a")
def own_name_of_torchs(x, u, s):
    return torchs(x.a + u.a)


def scaled(v):
    return v * one_nested


@cell(gates="a")
def nested(x, u, s):
    def again(v):
        return scaled(v)

    return again(tanh(x.a + u.a))


def by_one(function):
    @functools.wraps(function)
    def wrapper(x, u, s):
        return function(x, u, s) * one_of_a_decorator

    return wrapper


@cell(gates="a")
@by_one
def decorated(x, u, s):
    return tanh(x.a + u.a)


@cell(gates="a")
def inner(x, u, s):
    return tanh(x.a + u.a) * one_of_another


@cell(gates="a")
def of_another(x, u, s):
    return inner(x, u, s) + 0.1 * s.h


@cell(gates="a")
def of_a_list(x, u, s):
    return tanh(x.a + u.a) * one_in_a_list[0]


@cell(gates="a")
def of_an_object(x, u, s):
    return tanh(x.a + u.a) * thing.one


@torch.compiler.disable
def around_by_torch(v):
    return tanh(v) * one_within


@cell(gates="a")
def by_torchs_decorator(x, u, s):
    return around_by_torch(x.a + u.a)


def settings():
    """A function that has an attribute."""


settings.one = 1.0


@cell(gates="a")
def of_an_attribute(x, u, s):
    return tanh(x.a + u.a) * settings.one


def activation(v):
    return tanh(v) * one_for_an_option


CHANGES = [  # a cell, where it reads, what, another value, and what the error names
    (by_name, globals(), "one_by_name", 2.0, "one_by_name"),
    (of_numpy, globals(), "one_of_numpy", np.float32(2), "one_of_numpy"),
    (in_a_tuple, globals(), "one_in_a_tuple", (2.0,), "one_in_a_tuple"),
    (of_a_module, vars(module), "one", 2.0, "one"),
    (own_name_of_a_function, globals(), "squash", sigmoid, "squash"),
    (own_name_of_torchs, globals(), "torchs", torch.sigmoid, "torchs"),
    (nested, globals(), "one_nested", 2.0, "one_nested"),
    (nested, globals(), "scaled", lambda v: v * 3.0, "scaled"),
    (decorated, globals(), "one_of_a_decorator", 2.0, "one_of_a_decorator"),
    (of_another, globals(), "one_of_another", 2.0, "one_of_another"),
    (variants.rnn(activation), globals(), "one_for_an_option", 2.0, "one_for_an_option"),
    (by_torchs_decorator, globals(), "one_within", 2.0, "one_within"),
    (of_an_attribute, vars(settings), "one", 2.0, "one"),
    (of_a_list, one_in_a_list, 0, 2.0, "one_in_a_list"),
    (of_an_object, vars(thing), "one", 2.0, "thing"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    with using_threads(1):
        yield


@pytest.mark.parametrize(("made", "holder", "name", "other", "named"), CHANGES)
@pytest.mark.parametrize("grad", [False, True])
def test_a_cell_that_computes_another_thing_by_now_is_an_error(made, holder, name, other, named, grad):
    layer, x, before = nn.Recurrent(made, 2, 3), torch.randn(4, 2, 2), holder[name]
    stream = layer.stream(2)
    with torch.set_grad_enabled(grad):
        expected = [layer(x) for _ in range(3)][-1]
        try:
            holder[name] = other
            with pytest.raises(RuntimeError, match=rf"^cell {made.name}: .*{named} .* Declare the cell anew, or make"):
                layer(x)
            with pytest.raises(RuntimeError, match=named):
                functional.layer(made, x, None, [(*layer.parameters(), None)])
            with pytest.raises(RuntimeError, match=named):
                stream(x[0])
        finally:
            holder[name] = before
        assert same(layer(x), expected)


@pytest.mark.parametrize("draw", [lambda: float(torch.randn(())), lambda: torch.rand(()).item(), time.time])
def test_a_cell_that_draws_numbers_is_an_error(draw):
    """They would be drawn once, for all steps and calls."""

    @cell(gates="a")
    def drawing(x, u, s):
        return tanh(x.a + u.a) + draw()

    with pytest.raises(RuntimeError, match=r"cell drawing: what it reads of .* was another"):
        nn.Recurrent(drawing, 2, 3)(torch.randn(4, 2, 2))


def with_a_variable(value):
    """A cell that reads a variable of a function, and what sets that."""

    @cell(gates="a")
    def made(x, u, s):
        return tanh(x.a + u.a) * value

    def change(to):
        nonlocal value
        value = to

    return made, change


@pytest.mark.skipif(again.interface() is None, reason="Python or torch without the interfaces for C")
def test_calls_made_again_see_a_variable_of_an_enclosing_function():
    made, change = with_a_variable(1.0)
    layer, x = nn.Recurrent(made, 2, 3), torch.randn(4, 2, 2)
    with torch.no_grad():
        expected = [layer(x) for _ in range(3)][-1]
        assert layer._replays.straight
        change(2.0)
        with pytest.raises(RuntimeError, match=r"cell made: value was 1\.0 when .* and is 2\.0 now"):
            layer(x)
        change(float("1"))  # another object, and the same number
        assert same(layer(x), expected)
        change(2.0)
        with pytest.raises(RuntimeError, match="value was 1"):
            layer(x)


@pytest.mark.parametrize(
    "made", [by_name, of_numpy, of_a_module, nested, decorated, of_another, with_a_variable(1.0)[0]]
)
def test_cells_that_read_numbers_and_functions_are_as_quick_as_others(made):
    assert not made.trace() or not made.outside.loose


@pytest.mark.parametrize("made", [of_a_list, of_an_object])
def test_what_may_change_by_itself_is_looked_at_in_every_call(made):
    layer, x = nn.Recurrent(made, 2, 3), torch.randn(4, 2, 2)
    for _ in range(3):
        layer(x)
    assert made.outside.loose
    assert not layer._replays.straight
