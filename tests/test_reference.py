"""The NumPy reference against torch.nn in float64, and where torch has no such layer, against finite differences."""

import ast
import doctest
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcells import reference

T, N, F, H, P = 5, 3, 2, 4, 3
LENGTHS = [3, 5, 1]  # not sorted; one sequence of full and one of minimal length
CELLS = {
    "rnn_tanh": (reference.RNN, torch.nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (reference.RNN, torch.nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (reference.LSTM, torch.nn.LSTM, {}),
    "lstm_proj": (reference.LSTM, torch.nn.LSTM, {"proj_size": P}),
    "gru": (reference.GRU, torch.nn.GRU, {}),
}


def close(name, got, expected, tol=1e-10):
    np.testing.assert_allclose(got, expected, rtol=tol, atol=tol, err_msg=name, strict=True)


def pair(cell, **options):
    """The reference and torch's layer with the same random parameters."""
    ours, theirs, extra = CELLS[cell]
    layer, oracle = ours(F, H, **extra, **options, seed=1), theirs(F, H, **extra, **options).double()
    oracle.load_state_dict({name: torch.tensor(p) for name, p in layer.parameters.items()})
    return layer, oracle


def run_oracle(oracle, x, states, lengths, cotangents):
    """Outputs and gradients by name, for the scalar sum of cotangent * output over y, h_n and c_n."""
    x = torch.tensor(x, requires_grad=True)
    states = {name: torch.tensor(s, requires_grad=True) for name, s in states.items()}
    hx = tuple(states.values()) if "c_0" in states else states["h_0"]
    if lengths is None:
        y, final = oracle(x, hx)
    else:
        layout = {"batch_first": oracle.batch_first}
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False, **layout)
        y, final = oracle(packed, hx)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=T, **layout)
    outputs = [y, *final] if isinstance(final, tuple) else [y, final]
    sum((torch.tensor(d) * out).sum() for d, out in zip(cotangents, outputs, strict=True)).backward()
    leaves = {"x": x, **states, **dict(oracle.named_parameters())}
    return [out.detach().numpy() for out in outputs], {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def flat(result):
    """(y, h_n) or (y, (h_n, c_n)) as a list."""
    y, final = result
    return [y, *final] if isinstance(final, tuple) else [y, final]


def draw(layer, *, batched=True, lengths=None):
    """Input (NaN in the padding), initial states by name, and a cotangent for each output."""
    rng = np.random.default_rng(2)
    batch = (N,) if batched else ()
    x = rng.normal(size=(T, *batch, F))
    for n, length in enumerate(lengths or []):
        x[length:, n] = np.nan
    directions = layer.num_layers * layer.directions
    sizes = {"h_0": layer.output_size, "c_0": layer.hidden_size}
    names = ["h_0", "c_0"] if isinstance(layer, reference.LSTM) else ["h_0"]
    states = {name: rng.normal(size=(directions, *batch, sizes[name])) for name in names}
    y = rng.normal(size=(T, *batch, layer.directions * layer.output_size))
    if layer.batch_first and batched:
        x, y = x.swapaxes(0, 1), y.swapaxes(0, 1)
    return x, states, [y, *(rng.normal(size=s.shape) for s in states.values())]


def state_argument(states):
    return tuple(states.values()) if "c_0" in states else states["h_0"]


def check(layer, oracle, x, states, lengths, cotangents):
    outputs = flat(layer.forward(x, state_argument(states), lengths))
    gradients = layer.backward(*cotangents)
    expected_outputs, expected_gradients = run_oracle(oracle, x, states, lengths, cotangents)
    for name, got, expected in zip(("y", "h_n", "c_n"), outputs, expected_outputs, strict=False):
        close(name, got, expected)
    assert list(gradients) == list(expected_gradients)
    for name, expected in expected_gradients.items():
        close(name, gradients[name], expected)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_major", "batch_first"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["uni", "bi"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_all_gradients_equal_torch(cell, num_layers, bidirectional, batch_first, bias, lengths):
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    layer, oracle = pair(cell, **options)
    x, states, cotangents = draw(layer, lengths=lengths)
    check(layer, oracle, x, states, lengths, cotangents)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_one_sequence_without_batch_axis(cell, batch_first):
    layer, oracle = pair(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, states, cotangents = draw(layer, batched=False)
    check(layer, oracle, x, states, None, cotangents)


@pytest.mark.parametrize("cell", CELLS)
def test_state_and_cotangents_default_to_zeros(cell):
    layer, _ = pair(cell)
    x, states, cotangents = draw(layer)
    given = flat(layer.forward(x, state_argument({name: 0 * s for name, s in states.items()})))
    expected = layer.backward(*(d if k == 1 else 0 * d for k, d in enumerate(cotangents)))
    for got, want in zip(flat(layer.forward(x)), given, strict=True):
        close("output", got, want, 0)
    gradients = layer.backward(dh_n=cotangents[1])
    for name, want in expected.items():
        close(name, gradients[name], want, 0)


def test_backward_is_repeatable_and_ignores_later_changes_of_what_was_given():
    layer, _ = pair("lstm")
    x, states, cotangents = draw(layer)
    layer.forward(x, state_argument(states))
    first = layer.backward(*cotangents)
    for array in (x, *states.values()):
        array[...] = 7.0
    for name, gradient in layer.backward(*cotangents).items():
        close(name, gradient, first[name], 0)


# The GRU with the reset before the product, which torch.nn does not have ---------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_reset_before_gru_equals_an_autograd_loop(bias):
    layer = reference.GRU(F, H, bias=bias, reset_after=False, seed=1)
    x, states, (dy, dh_n) = draw(layer)
    leaves = {"x": x, "h_0": states["h_0"], **layer.parameters}
    leaves = {name: torch.tensor(a, requires_grad=True) for name, a in leaves.items()}
    nothing = torch.zeros(3 * H, dtype=torch.float64)
    w_r, w_z, w_n = leaves["weight_ih_l0"].chunk(3)
    u_r, u_z, u_n = leaves["weight_hh_l0"].chunk(3)
    b_r, b_z, b_n = (leaves.get("bias_ih_l0", nothing) + leaves.get("bias_hh_l0", nothing)).chunk(3)

    h, ys = leaves["h_0"][0], []
    for v in leaves["x"]:
        r = torch.sigmoid(v @ w_r.T + h @ u_r.T + b_r)
        z = torch.sigmoid(v @ w_z.T + h @ u_z.T + b_z)
        n = torch.tanh(torch.cat([r * h, v], dim=1) @ torch.cat([u_n, w_n], dim=1).T + b_n)
        h = (1 - z) * n + z * h
        ys.append(h)
    y = torch.stack(ys)
    ((torch.tensor(dy) * y).sum() + (torch.tensor(dh_n[0]) * h).sum()).backward()

    got_y, got_h = layer.forward(x, states["h_0"])
    close("y", got_y, y.detach().numpy())
    close("h_n", got_h[0], h.detach().numpy())
    gradients = layer.backward(dy, dh_n)
    assert list(gradients) == list(leaves)
    for name, leaf in leaves.items():
        close(name, gradients[name], leaf.grad.numpy())


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
def test_reset_before_gru_gradients_equal_central_differences(lengths):
    layer = reference.GRU(F, H, 2, bidirectional=True, reset_after=False, seed=1)
    x, states, cotangents = draw(layer)
    point = {"x": x, **states, **layer.parameters}

    def loss():
        outputs = layer.forward(x, state_argument(states), lengths)
        return sum(np.sum(d * out) for d, out in zip(cotangents, outputs, strict=True))

    loss()
    gradients = layer.backward(*cotangents)
    assert list(gradients) == list(point)
    step = 1e-5
    for name, array in point.items():
        differences = np.zeros_like(array)
        for index in np.random.default_rng(3).permutation(list(np.ndindex(array.shape)))[:4]:
            index = tuple(index)
            centre = array[index]
            array[index] = centre + step
            above = loss()
            array[index] = centre - step
            differences[index] = (above - loss()) / (2 * step)
            array[index] = centre
            close(f"{name}{list(index)}", gradients[name][index], differences[index], 1e-8)


def test_the_two_resets_differ_only_through_the_recurrent_product():
    after, before = (reference.GRU(F, H, reset_after=flag, seed=1) for flag in (True, False))
    x, states, _ = draw(after)
    assert np.abs(after.forward(x)[0] - before.forward(x)[0]).max() > 1e-3
    for layer in (after, before):  # without U_n and its bias the reset gate has nothing to act on
        layer.parameters["weight_hh_l0"][2 * H :] = 0
        layer.parameters["bias_hh_l0"][2 * H :] = 0
    close("y", after.forward(x, states["h_0"])[0], before.forward(x, states["h_0"])[0])


# Parameters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_parameters_have_torch_names_order_and_shapes(cell, bias):
    layer, oracle = pair(cell, num_layers=2, bidirectional=True, bias=bias)
    expected = {name: tuple(p.shape) for name, p in oracle.state_dict().items()}
    assert {name: p.shape for name, p in layer.parameters.items()} == expected
    assert list(layer.parameters) == list(expected)
    assert {p.dtype for p in layer.parameters.values()} == {np.dtype(np.float64)}


def test_initialisation_is_seeded_and_fills_the_bounds():
    first, again, other = (reference.LSTM(16, 25, seed=seed) for seed in (0, 0, np.random.default_rng(1)))
    for name, p in first.parameters.items():
        assert np.array_equal(p, again.parameters[name])
        assert not np.array_equal(p, other.parameters[name])
        assert 0.18 < p.max() <= 0.2
        assert -0.2 <= p.min() < -0.18


def test_load_state_dict_copies_from_torch_in_any_dtype():
    layer, oracle = pair("gru")
    oracle = torch.nn.GRU(F, H)
    layer.load_state_dict(oracle.state_dict())
    before = {name: p.copy() for name, p in layer.parameters.items()}
    for name, p in oracle.state_dict().items():
        close(name, before[name], p.double().numpy(), 0)
        p.zero_()
        close(name, layer.parameters[name], before[name], 0)
        assert layer.parameters[name].dtype == np.float64


# Errors ---------------------------------------------------------------------------------------------------------------

ZEROS = np.zeros
GOOD_X = ZEROS((T, N, F))


def lstm(**options):
    return reference.LSTM(F, H, **options, seed=0)


def forwarded(kind=reference.LSTM):
    layer = kind(F, H, seed=0)
    layer.forward(GOOD_X)
    return layer


BAD_CALLS = {
    "input_size": (lambda: reference.RNN(0, H), r"input_size: got 0, expected .* at least 1"),
    "hidden_size": (lambda: reference.GRU(F, 2.5), r"hidden_size: got 2.5, expected an integer"),
    "num_layers": (lambda: reference.GRU(F, H, 0), r"num_layers: got 0, expected .* at least 1"),
    "proj_size large": (lambda: lstm(proj_size=H), r"proj_size: got 4, expected .* to 3"),
    "proj_size negative": (lambda: lstm(proj_size=-1), r"proj_size: got -1, expected"),
    "proj_size of a GRU": (lambda: reference.GRU(F, H, proj_size=2), r"proj_size: got 2, expected 0: only an LSTM"),
    "nonlinearity": (lambda: reference.RNN(F, H, nonlinearity="elu"), r"nonlinearity: got 'elu', expected 'tanh'"),
    "state_dict names": (lambda: lstm().load_state_dict({"w": 0}), r"state_dict: got the names \['w'\], expected"),
    "state_dict shape": (
        lambda: lstm().load_state_dict({**lstm().parameters, "bias_hh_l0": ZEROS(3)}),
        r"state_dict\['bias_hh_l0'\]: got shape \(3,\), expected \(16,\)",
    ),
    "x rank": (lambda: lstm().forward(ZEROS(F)), r"x: got shape \(2,\), expected \(T, N, I\) or \(T, I\) with I = 2"),
    "x width": (lambda: lstm().forward(ZEROS((T, N, 7))), r"x: got shape \(5, 3, 7\), expected"),
    "x layout": (lambda: lstm(batch_first=True).forward(ZEROS(F)), r"x: got shape \(2,\), expected \(N, T, I\)"),
    "x empty": (lambda: lstm().forward(ZEROS((0, N, F))), r"x: got a sequence length of 0, expected at least 1"),
    "h_0": (
        lambda: reference.GRU(F, H).forward(GOOD_X, ZEROS((1, H))),
        r"h_0: got shape \(1, 4\), expected \(1, 3, 4\)",
    ),
    "h_0 one sequence": (
        lambda: reference.GRU(F, H).forward(GOOD_X[:, 0], ZEROS((1, 1, H))),
        r"h_0: got shape \(1, 1, 4\), expected \(1, 4\)",
    ),
    "c_0": (
        lambda: lstm(proj_size=P).forward(GOOD_X, (ZEROS((1, N, P)), ZEROS((1, N, P)))),
        r"c_0: got shape \(1, 3, 3\), expected \(1, 3, 4\)",
    ),
    "no pair": (lambda: lstm().forward(GOOD_X, ZEROS((2, N, H))), r"state: got ndarray, expected .*\(h_0, c_0\)"),
    "lengths zero": (
        lambda: lstm().forward(GOOD_X, lengths=[0, 1, 2]),
        r"lengths: got \[0, 1, 2\], expected .* 1 to 5",
    ),
    "lengths long": (lambda: lstm().forward(GOOD_X, lengths=[1, 2, 6]), r"lengths: got \[1, 2, 6\], expected"),
    "lengths count": (lambda: lstm().forward(GOOD_X, lengths=[1, 2]), r"lengths: got \[1, 2\], expected .*\(3,\)"),
    "lengths kind": (lambda: lstm().forward(GOOD_X, lengths=[1.0, 2.0, 3.0]), r"lengths: .* expected integers"),
    "dy": (lambda: forwarded().backward(ZEROS((T, N, F))), r"dy: got shape \(5, 3, 2\), expected \(5, 3, 4\)"),
    "dh_n": (lambda: forwarded().backward(None, ZEROS((N, H))), r"dh_n: got shape \(3, 4\), expected \(1, 3, 4\)"),
    "dc_n": (lambda: forwarded().backward(dc_n=ZEROS((N, H))), r"dc_n: got shape \(3, 4\), expected \(1, 3, 4\)"),
    "no dc_n": (
        lambda: forwarded(reference.GRU).backward(dc_n=ZEROS((1, N, H))),
        r"dc_n: got an array, expected None",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    call, message = BAD_CALLS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_backward_needs_a_forward():
    with pytest.raises(RuntimeError, match="before forward"):
        lstm().backward(ZEROS((T, N, H)))


# The file itself ------------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring_runs():
    failed, attempted = doctest.testmod(reference)
    assert attempted > 0
    assert failed == 0


def test_numpy_is_the_only_library():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules |= {"." * node.level + (node.module or "") for node in imports if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} == {"collections", "typing", "numpy"}
