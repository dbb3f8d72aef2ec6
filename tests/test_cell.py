"""Cells as functions: one definition on NumPy, torch and symbols; the derived graphs; what a cell may not do."""

import inspect
import math
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastcells import cell, cells, nn
from fastcells import expression as ex
from fastcells.derivation import build
from fastcells.expression import Node, constant, gradients, leaf, substitute, tanh, topological

BUILT_IN = [cells.lstm, cells.gru, cells.gru_reset_before, cells.rnn_tanh, cells.rnn_relu]

UNARY = {
    "sigmoid": ex.sigmoid,
    "tanh": ex.tanh,
    "exp": ex.exp,
    "sqrt": lambda v: ex.sqrt(ex.exp(v)),
    "relu": ex.relu,
    "abs": abs,
    "neg": lambda v: -v,
    "expm1": ex.expm1,
    "log": lambda v: ex.log(abs(v)),
    "softplus": ex.softplus,
    "sin": ex.sin,
    "cos": ex.cos,
    "erf": ex.erf,
    "silu": ex.silu,
    "gelu": ex.gelu,
    "gelu_tanh": lambda v: ex.gelu(v, approximate="tanh"),
    "softsign": ex.softsign,
    "leaky_relu": ex.leaky_relu,
    "elu": ex.elu,
    "selu": ex.selu,
    "hard_sigmoid": ex.hard_sigmoid,
    "cube": lambda v: v**3,
}
BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: 2.0 - (a - b),
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (2.5 + abs(b)),
    "maximum": ex.maximum,
    "minimum": ex.minimum,
    "where": lambda a, b: ex.where(a < b, a * 2.0, b),
    "clip": lambda a, b: ex.clip(a + b, -0.5, 0.5),
}


def evaluate(node: Node, values: dict):
    """A graph on torch tensors."""
    done = dict(values)
    for n in topological([node]):
        if n not in done:
            done[n] = (
                torch.tensor(n.value, dtype=torch.float64)
                if n.op == "constant"
                else ex.OPERATIONS[n.op].torch(*(done[a] for a in n.args))
            )
    return done[node]


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_operation_means_the_same_on_numpy_torch_and_symbols(name):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=40) for _ in range(1 if name in UNARY else 2)]
    function = (UNARY | BINARY)[name]
    symbols = [leaf("v", str(k)) for k in range(len(arrays))]
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = function(*arrays)
    by_torch = function(*tensors)
    graph = function(*symbols)
    np.testing.assert_allclose(by_torch.detach().numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(evaluate(graph, dict(zip(symbols, tensors, strict=True))).detach(), expected, rtol=1e-12)

    grad = torch.tensor(rng.normal(size=40))
    derived = gradients([graph], [leaf("d")], lambda node, g: [])
    values = {**dict(zip(symbols, tensors, strict=True)), leaf("d"): grad}
    for symbol, wanted in zip(symbols, torch.autograd.grad(by_torch, tensors, grad), strict=True):
        torch.testing.assert_close(evaluate(derived[symbol], values), wanted, rtol=1e-12, atol=1e-12)


TORCHS = ["softplus", "silu", "gelu", "softsign", "leaky_relu", "elu", "selu", "hardsigmoid", "relu", "sigmoid", "tanh"]


@pytest.mark.parametrize("name", TORCHS)
def test_activations_are_torchs(name):
    v = torch.linspace(-60, 60, 1001, dtype=torch.float64).requires_grad_()
    # torch rounds softplus from 20 on, and takes 1 / 6 in float32 for the gradient of hardsigmoid
    ours = ex.FUNCTIONS[name.replace("hards", "hard_s")](v)
    theirs = getattr(torch.nn.functional, name)(v)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-15)
    for a, b in zip(*(torch.autograd.grad(t.sum(), v) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-15)


def test_functions_of_torch_and_numpy_mean_this_packages_in_a_cell():
    a, b = leaf("v", "a"), leaf("v", "b")
    assert torch.sigmoid(a) is ex.sigmoid(a)
    assert torch.nn.functional.gelu(a, approximate="tanh") is ex.gelu(a, approximate="tanh")
    assert torch.nn.functional.relu(a) is ex.relu(a)
    assert torch.clamp(a, -1.0, 1.0) is np.clip(a, -1.0, 1.0) is ex.clip(a, -1.0, 1.0)
    assert torch.where(a < b, a, b) is ex.where(a < b, a, b)
    assert np.tanh(a) is ex.tanh(a)
    assert np.maximum(a, 2.0) is ex.maximum(a, 2.0)
    assert np.float64(2.0) * a is 2.0 * a
    assert np.clip(a, None, 1.0) is torch.clamp(a, max=1.0) is ex.clip(a, high=1.0)
    assert torch.max(a, b) is ex.maximum(a, b)
    assert torch.square(a) is np.square(a) is a**2 is a * a
    assert np.greater(a, 0.5) is torch.gt(a, 0.5) is (a > 0.5)
    assert (np.float64(2.0) > a) is (a < 2.0)
    assert torch.lerp(a, b, 0.5) is a + 0.5 * (b - a)
    assert np.clip(a, a_min=-1.0, a_max=1.0) is ex.clip(a, -1.0, 1.0)
    assert torch.where(condition=a < b, input=a, other=b) is ex.where(a < b, a, b)
    assert torch.add(a, b, alpha=2.0) is a + 2.0 * b
    assert torch.sub(a, b) is np.subtract(a, b) is a - b
    assert torch.nn.functional.softplus(a, beta=2.0) is ex.softplus(2.0 * a) / 2.0
    assert 2.0**a is np.power(2.0, a) is ex.exp(a * math.log(2.0))
    assert a**0.5 is torch.sqrt(a)


def test_conditions():
    """Comparisons meet in &, | and ~, count as 1 and 0, and Python's own booleans choose when the cell is declared."""
    a, b = leaf("v", "a"), leaf("v", "b")
    assert ex.where(True, a, b) is a
    assert ex.where(constant(2.0) < 1.0, a, b) is b
    assert (a < b) * a is ex.where(a < b, 1.0, 0.0) * a
    assert a != b
    assert a == a
    with ex.comparing():
        assert (a == b) is ex.equal(a, b)
        assert torch.ne(a, b) is (a != b) is ~ex.equal(a, b)
        assert torch.logical_and(a < b, a > 0.0) is (a < b) & (a > 0.0)
    with pytest.raises(TypeError, match="the condition must be a comparison"):
        ex.where(a, a, b)
    v, w = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0])
    for left, right in ((v, w), (v.numpy(), w.numpy())):  # and on values as they stand
        chosen = ex.where((left < right) | (left == 2.0), 1.0, 0.0)
        assert chosen.tolist() == [1.0, 0.0, 1.0]


def test_a_product_is_compared_by_its_value_on_tensors_too():
    @cell(gates="a")
    def compared(x, u, s):
        return ex.where(u.a == x.a, 1.0, 2.0) * ex.where(u.a != x.a, 3.0, 4.0)

    values = torch.tensor([1.0, 2.0])
    (h,) = compared.step({"a": torch.tensor([1.0, 1.0])}, lambda g, v: v, {"h": values})
    assert h.tolist() == [4.0, 6.0]
    assert compared.trace()[0].op == "mul"


def test_equal_expressions_are_one_node_and_trivial_ones_fold():
    a, b = leaf("v", "a"), leaf("v", "b")
    assert a * b + ex.tanh(a * b) is a * b + ex.tanh(a * b)
    assert a + 0.0 is a
    assert a * 1.0 is a
    assert a * 0.0 is constant(0.0)
    assert a - a is constant(0.0)
    assert 0.0 - (0.0 - a) is a
    assert a + -b is a - b
    assert constant(2.0) * 3.0 is constant(6.0)
    assert substitute([ex.tanh(a + b)], {b: constant(0.0)})[0] is ex.tanh(a)


def test_constants_are_told_apart_by_their_bits():
    assert constant(math.nan) is constant(-(math.inf - math.inf))
    assert constant(0.0) is not constant(-0.0)
    assert math.copysign(1.0, constant(-0.0).value) == -1.0


def test_threads_that_trace_at_once_get_the_same_nodes():
    interval, wait = sys.getswitchinterval(), threading.Barrier(4)

    def make():
        wait.wait()
        return [leaf("x", f"thread{k}") + 1.5 for k in range(2000)]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = [f.result() for f in [pool.submit(make) for _ in range(4)]]
    finally:
        sys.setswitchinterval(interval)
    assert all(len({*map(id, nodes)}) == 1 for nodes in zip(*found, strict=True))


def test_a_number_that_is_none_beside_a_list_that_may_change():
    """Both make it necessary to look at what the cell computes anew, in each call."""
    limits = [0.0]

    @cell(gates="h")
    def odd(x, u, s):
        return ex.where(s.h < limits[0] - 9.0, float("nan"), tanh(x.h + u.h))

    layer = nn.Recurrent(odd, 2, 3)
    for _ in range(3):
        assert layer(torch.zeros(4, 1, 2))[0].isfinite().all()
    limits[0] = 1.0
    with pytest.raises(RuntimeError, match="what it reads of limits was another"):
        layer(torch.zeros(4, 1, 2))


def test_a_graph_may_be_deeper_than_python_calls_functions():
    first = last = leaf("v")
    for _ in range(5000):
        last = ex.tanh(last)
    order = topological([last])
    assert (len(order), order[0], order[-1]) == (5001, first, last)
    assert first in gradients([last], [constant(1.0)], lambda node, grad: [])


@pytest.mark.parametrize("c", BUILT_IN, ids=lambda c: c.name)
def test_cell_is_callable_on_arrays_and_tensors_alike(c):
    rng = np.random.default_rng(1)
    x = {g: rng.normal(size=(3, 4)) for g in c.gates}
    weights = {g: rng.normal(size=(4, 4)) for g in c.gates}
    states = {s: rng.normal(size=(3, 4)) for s in c.states}
    by_numpy = c.step(x, lambda g, v: v @ weights[g], states)
    as_torch = lambda d: {k: torch.tensor(v) for k, v in d.items()}  # noqa: E731
    tensors = as_torch(weights)
    by_torch = c.step(as_torch(x), lambda g, v: v @ tensors[g], as_torch(states))
    for a, b in zip(by_numpy, by_torch, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-12)


def test_cell_called_as_the_function_it_was_declared_from():
    arrays = {g: np.full(2, 0.1) for g in "ifgo"}
    h, c = cells.lstm(SimpleNamespace(**arrays), SimpleNamespace(**arrays), SimpleNamespace(h=0.0, c=np.ones(2)))
    gate = 1 / (1 + np.exp(-0.2))
    np.testing.assert_allclose(c, gate * 1 + gate * np.tanh(0.2))
    np.testing.assert_allclose(h, gate * np.tanh(c))


# What training keeps for a step, in vectors of the hidden size besides the states, read off the graph.
KEPT = [(cells.lstm, 4, 1), (cells.gru, 4, 1), (cells.gru_reset_before, 4, 2), (cells.rnn_tanh, 1, 1)]


@pytest.mark.parametrize(("c", "slots", "stages"), KEPT, ids=lambda v: getattr(v, "name", str(v)))
def test_derived_programs_keep_no_more_than_a_hand_written_pass(c, slots, stages):
    programs = build(c, project=False)
    assert programs.slots == slots
    assert len(programs.forward.stages) == len(programs.backward.stages) == stages


def test_gates_that_only_appear_summed_share_one_accumulator():
    assert build(cells.lstm, False).shared == frozenset("ifgo")
    assert build(cells.gru, False).shared == frozenset("rz")
    assert len(build(cells.gru, False).forward.stages[0].accumulators) == 4


def test_lstm_recomputes_tanh_of_the_cell_state_and_keeps_the_gates():
    backward = build(cells.lstm, False).backward.stages[0]
    loads = {place.buffer for place in backward.loads.values()}
    assert loads == {"saved", "s.c", "carry.c"}
    assert any(n.op == "tanh" for n in topological([o for o, _, _ in backward.outputs]))


def test_built_in_cells_pickle_to_themselves():
    for c in BUILT_IN:
        assert pickle.loads(pickle.dumps(c)) is c


def branching(x, u, s):
    return x.a + u.a if x.a > 0 else s.h


def foreign(x, u, s):
    return x.a + u.a * torch.ones(3)


def of_numpy(x, u, s):
    return np.ones(3) * (x.a + u.a)


def not_a_function(x, u, s):
    return torch.cumsum(x.a + u.a, 0)


def a_tensors_method(x, u, s):
    return (x.a + u.a).tanh()


def of_math(x, u, s):
    return math.exp(x.a + u.a)


def branching_on_a_product(x, u, s):
    return x.a if u.a else s.h


def an_element(x, u, s):
    return x.a[0] + u.a


def unknown_gate(x, u, s):
    return x.a + u.b


def unknown_state(x, u, s):
    return s.c + x.a + u.a


def branching_on_equality(x, u, s):
    return s.h if x.a == 0.0 else u.a


def the_larger(x, u, s):
    return max(x.a, u.a)


def several_in_one(x, u, s):
    return torch.cat([x.a, u.a])


def over_the_units(x, u, s):
    return torch.nn.functional.layer_norm(x.a + u.a, (3,))


def a_sum(x, u, s):
    return (x.a + u.a).sum()


def a_function_of_names(x, u, s):
    return torch.tanh(x + u)


def with_an_option(x, u, s):
    return np.absolute(x.a) + np.tanh(u.a, where=True)


def a_matrix(x, u, s):
    return x.a @ torch.ones(3, 3)


def a_product_of_a_tensor(x, u, s):
    return x.a + u.a(torch.ones(3))


def a_product_of_a_number(x, u, s):
    return x.a + u.a(0.5)


def a_product_of_a_mean(x, u, s):
    return x.a + u.a(2.0 * ex.mean(s.h))


def an_odd_power(x, u, s):
    return (x.a + u.a) ** 1.5


def not_a_condition(x, u, s):
    return torch.where(x.a, u.a, s.h)


def in_place(x, u, s):
    return torch.relu_(x.a + u.a)


def in_place_by_option(x, u, s):
    return torch.nn.functional.relu(x.a + u.a, inplace=True)


def over_a_dimension(x, u, s):
    return torch.max(x.a + u.a, 0)


def both_of_numbers(x, u, s):
    return torch.where((x.a > 0.0) & u.a, x.a, u.a)


def a_power_of_a_negative_number(x, u, s):
    return x.a + (-2.0) ** u.a


def an_infinite_power(x, u, s):
    return x.a + u.a**math.inf


def by_zero(x, u, s):
    return x.a + u.a + 1.0 / (s.h - s.h)


def without_end(x, u, s):
    return without_end(x, u, s)


@pytest.mark.parametrize(
    ("function", "states", "error", "words"),
    [
        (branching, "h", TypeError, r"cannot branch .* Write where\(condition, a, b\)"),
        (branching_on_a_product, "h", TypeError, "cannot branch"),
        (branching_on_equality, "h", TypeError, "cannot branch"),
        (the_larger, "h", TypeError, r"cannot branch .* minimum\(a, b\)"),
        (foreign, "h", TypeError, "tensors cannot be part of a cell"),
        (of_numpy, "h", TypeError, "tensors cannot be part of a cell"),
        (a_product_of_a_tensor, "h", TypeError, "tensors cannot be part of a cell"),
        (a_product_of_a_number, "h", TypeError, r"u.a\(v\): v must have a number for each unit, got 0.5"),
        (a_product_of_a_mean, "h", TypeError, r"v must have a number for each unit, got mul\(2.0, mean\(s.h\)\)"),
        (not_a_function, "h", TypeError, "cannot use torch's cumsum; it may use operators and sigmoid, tanh"),
        (several_in_one, "h", TypeError, "cannot use torch's cat.* Write a gate or state of its own for each part"),
        (over_the_units, "h", TypeError, r"cannot use torch's layer_norm.* Write fastcells.expression.norm\(v\)"),
        (a_function_of_names, "h", TypeError, "x, u, s and p are no values: write x.g, .* Here there are a"),
        (with_an_option, "h", TypeError, "tanh: a cell cannot use it with where. Write what that does with operators"),
        (a_matrix, "h", TypeError, r"@: .* Write u.g\(v\), the recurrent product"),
        (an_odd_power, "h", TypeError, r"whole exponents and 0.5, got 1.5. Write exp\(1.5 \* log\(v\)\)"),
        (not_a_condition, "h", TypeError, "the condition must be a comparison"),
        (a_tensors_method, "h", AttributeError, r"Write tanh\(v\)"),
        (a_sum, "h", AttributeError, r"no attribute 'sum'. Write fastcells.expression.mean\(v\)"),
        (of_math, "h", TypeError, "instead of math's functions"),
        (an_element, "h", TypeError, "cannot be iterated over, unpacked or indexed"),
        (unknown_gate, "h", AttributeError, "there is no 'b', only a"),
        (unknown_state, "h", AttributeError, "there is no 'c', only h"),
        (in_place, "h", TypeError, r"relu_: .* cannot change in place. Write v = torch.relu\(v\)"),
        (in_place_by_option, "h", TypeError, r"cannot change in place. Write v = torch.relu\(v\)"),
        (over_a_dimension, "h", TypeError, r"without dimensions. Write maximum\(a, b\)"),
        (both_of_numbers, "h", TypeError, "&: conditions are comparisons, such as a < b, got product"),
        (a_power_of_a_negative_number, "h", TypeError, "must be one of a positive number, got -2.0"),
        (an_infinite_power, "h", TypeError, "whole exponents and 0.5, got inf"),
        (by_zero, "h", ZeroDivisionError, "division by zero"),
        (without_end, "h", RecursionError, "recursion"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_cell_may_not_do_is_said_with_the_line(function, states, error, words):
    c = cell(gates="a", states=states)(function)
    with pytest.raises(error, match=words) as raised:
        c.trace()
    *_, line = str(raised.value).splitlines()
    text, first = inspect.getsourcelines(function)
    assert str(raised.value).startswith(f"cell {function.__name__}: ")
    assert line == f"  {__file__}:{first + 1}: {text[1].strip()}"
    with pytest.raises(error, match=words):  # so does a layer of it, when it is made
        nn.Recurrent(c, 2, 3)


def of_parts(x, u, s):
    h = s.h
    h *= 0.5  # of its own name: the state stays what it was
    count = (x.a > 0.0) + (u.a > 0.0)
    return tanh(x.a + u.a) * torch.where(s.h > 0.0, 0.1, 0.3) + h * count * 0.1 + u.a * (x.a < 0.0)


def test_torchs_form_is_what_the_engine_computes():
    """Also of what torch has otherwise: sums of conditions, numbers chosen by one, assignments with an operator."""
    torch.manual_seed(0)
    layer = nn.Recurrent(cell(gates="a")(of_parts), 2, 3, dtype=torch.float64)
    x, h = torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(1, 3, 3, dtype=torch.float64)
    given = h.clone()
    ours, theirs = layer(x, h), layer._forward_in_torch(x, h)
    assert h.equal(given)
    for a, b in zip(ours, theirs, strict=True):
        assert b.dtype is torch.float64
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_a_long_chain_of_operations():
    """Longer than calls may be nested."""

    def deep(x, u, s):
        v = x.a + u.a
        for _ in range(400):
            v = 0.9 * v + 0.1 * x.a
        return v

    build(cell(gates="a")(deep), False)


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: cell(of_parts), r'gates must be a str .*, got <function of_parts.*>. Write @cell\(gates="..."\)'),
        (lambda: cell(gates=["a", "b"]), r"gates must be a str of names separated by spaces, got \['a', 'b'\]"),
        (lambda: cell(gates="a", inputs=None), "inputs must be a str of names separated by spaces, got None"),
        (lambda: cell(gates="a")(cells.lstm), "what is declared must be a function, got <cell lstm"),
        (lambda: cell(gates="a")(partial(of_parts)), "what is declared must be a function, got functools.partial"),
    ],
)
def test_what_is_declared_is_checked(declare, words):
    with pytest.raises(TypeError, match=f"^cell: {words}"):
        declare()


def nothing(x, u, s):
    tanh(x.a + u.a)


def forgets_a_state(x, u, s):
    return x.a + u.a


def a_comparison(x, u, s):
    return x.a < u.a


def no_gate(x, u, s):
    return 0.5 * s.h


@pytest.mark.parametrize(
    ("function", "states", "words"),
    [
        (nothing, "h", "state h must be made of the cell's values, got None"),
        (lambda x, u, s: (s.h * 0.0) + 1.0, "h", "state h must be made of the cell's values, got 1.0"),
        (lambda x, u, s: x.a + u.a + u.a(0.5 * s.h), "h", "u.a must be of one vector, got two"),
        (forgets_a_state, "h c", r"expected 2 returned state\(s\) \(h, c\), got 1"),
        (a_comparison, "h", r"state h must be a number, got a comparison. Write where\(condition, 1.0, 0.0\)"),
        (no_gate, "h", "at least one of the gates a must be used"),
        (lambda x, u: x.a, "h", "takes 2 positional arguments but 3 were given"),
    ],
)
def test_what_a_cell_has_to_return_is_said_with_the_place(function, states, words):
    c = cell(gates="a", states=states)(function)
    with pytest.raises(TypeError, match=words) as raised:
        c.trace()
    assert str(raised.value).endswith(f"{__file__}:{function.__code__.co_firstlineno}")


def test_without_a_source_the_line_has_its_number():
    """As in an interactive session, where no file has the text."""
    scope = {"cell": cell}
    exec("@cell(gates='a')\ndef typed(x, u, s):\n    y = x.a + u.a\n    return y if y > 0 else s.h", scope)
    with pytest.raises(TypeError, match=r"(?s)cell typed: a cell cannot branch .* where.*<string>:4$"):
        scope["typed"].trace()


def test_the_line_of_a_helper_is_that_of_its_call():
    def helper(v):
        return v if v > 0 else 0.0

    def calls(x, u, s):
        return helper(x.a + u.a)

    with pytest.raises(TypeError, match=r"return helper\(x.a \+ u.a\)$"):
        cell(gates="a")(calls).trace()


def test_states_in_a_list_are_as_good_as_in_a_tuple():
    listed = cell(gates="a", states="h c")(lambda x, u, s: [x.a + u.a, s.c])
    assert len(listed.trace()) == 2


@pytest.mark.parametrize("gates", ["", "a a", "a-b", "1a"])
def test_gate_names_are_checked(gates):
    with pytest.raises(ValueError, match="gates must be different identifiers"):
        cell(gates=gates)
    with pytest.raises(ValueError, match="states must be different identifiers"):
        cell(gates="a", states=gates)


def test_what_only_needs_the_step_before_becomes_a_state():
    """The operand p.mask * s.h is made at the end of the step before: no stage of its own."""

    @cell(gates="r z n", inputs="mask")
    def dropped(x, u, s, p):
        h = p.mask * s.h
        r = ex.sigmoid(x.r + u.r(h))
        z = ex.sigmoid(x.z + u.z(h))
        n = ex.tanh(x.n + r * u.n(h))
        return n + z * (s.h - n)

    programs = build(dropped, False)
    assert len(programs.forward.stages) == len(programs.backward.stages) == 1
    assert programs.states == ("h", "h+0")
    assert repr(programs.derived[0]) == "mul(input.mask, s.h)"


def test_only_a_projection_that_keeps_the_size_fits_a_cell_that_uses_its_hidden_state():
    assert build(cells.gru, True).square
    assert not build(cells.lstm, True).square


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"parameters": "a a"}, "parameters must be different"),
        ({"parameters": "a", "inputs": "a"}, "names of the fourth argument must be different"),
        ({"scalars": "1"}, "scalars must be different identifiers"),
        ({"scalars": "a = 1"}, "a first value is written name=number, without spaces, got '='"),
    ],
)
def test_names_of_a_cells_own_tensors_are_checked(names, words):
    with pytest.raises(ValueError, match=words):
        cell(gates="a", **names)


@pytest.mark.parametrize("name", ["two\nlines", "null\0", "\ud800", 5])
def test_a_name_is_text_of_one_line(name):
    with pytest.raises(ValueError, match="name must be printable text of one line, got "):
        cell(gates="a", name=name)
