"""torch.func: functional_call, grad, vmap over inputs and stacked parameters, jvp, and derivatives of derivatives."""

import copy

import pytest
import torch
from helpers import Case, check, relative_error
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import fastcells
from fastcells import cell
from fastcells.expression import sigmoid, tanh

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp uses it

CELLS = ["lstm", "lstm_proj", "gru", "rnn_tanh"]


@cell(gates="f z")
def minimal(x, u, s):
    """Minimal gated unit (Zhou et al. 2016)."""
    f = sigmoid(x.f + u.f)
    return s.h + f * (tanh(x.z + u.z(f * s.h)) - s.h)


def layers(name, **options):
    """Ours, torch's with the same weights, an input [T, N, I]."""
    case = Case(name, num_layers=2, bidirectional=True, **options)
    return case.module(fastcells.nn), case.module(torch.nn), case.data()[0]


def parameters(module):
    return {n: p.detach() for n, p in module.named_parameters()}


def total(module, weights, x):
    y, states = functional_call(module, weights, (x,))
    return y.square().sum() + sum(s.sin().sum() for s in (states if isinstance(states, tuple) else (states,)))


@pytest.fixture
def ran(monkeypatch):
    """How often the operations computed, so that no other implementation passes for them."""
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        original = getattr(fastcells.cpu.layer, name)

        def counted(*args, _name=name, _original=original, **options):
            counts[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(fastcells.cpu.layer, name, counted)
    return counts


@pytest.mark.parametrize("name", CELLS)
def test_grad(name, ran):
    ours, theirs, x = layers(name)
    check(grad(lambda w: total(ours, w, x))(parameters(ours)), grad(lambda w: total(theirs, w, x))(parameters(theirs)))
    assert ran == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("name", CELLS)
def test_vmap_over_inputs_is_one_batch(name, in_dim, ran):
    ours, theirs, x = layers(name)
    inputs = torch.stack([x, x + 1, x * 2])
    got = vmap(ours, in_dims=in_dim)(inputs.movedim(0, in_dim))
    for k, expected in enumerate(map(theirs, inputs)):
        assert relative_error(got[0][k], expected[0]) < 1e-9
    assert ran["forward"] == 2  # one for each layer


@pytest.mark.parametrize("name", CELLS)
def test_vmap_over_states_and_packed_input(name):
    ours, _, _ = layers(name)
    x, _ = Case(name, layout="packed").data()
    rows = int(x.batch_sizes[0])
    sizes = (ours.proj_size or 6, 6) if name.startswith("lstm") else (6,)
    states = tuple(torch.randn(3, 4, rows, size, dtype=torch.float64) for size in sizes)

    def run(data, *hx):
        packed = torch.nn.utils.rnn.PackedSequence(data, *x[1:])
        return ours(packed, hx if len(hx) > 1 else hx[0])[0].data

    got = vmap(run, in_dims=(None, *[0] * len(states)))(x.data, *states)
    for k in range(3):
        assert relative_error(got[k], run(x.data, *(s[k] for s in states))) < 1e-9


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_each_sample(name):
    ours, theirs, x = layers(name)
    inputs = torch.stack([x, x + 1, x * 2])
    got = vmap(grad(total, argnums=1), in_dims=(None, None, 0))(ours, parameters(ours), inputs)
    for k in range(3):
        check({n: g[k] for n, g in got.items()}, grad(total, argnums=1)(theirs, parameters(theirs), inputs[k]))


@pytest.mark.parametrize("name", CELLS)
def test_gradient_through_vmap(name):
    ours, theirs, x = layers(name)
    inputs = torch.stack([x, x + 1])
    got = grad(lambda i: vmap(lambda x: total(ours, parameters(ours), x))(i).sum())(inputs)
    expected = torch.stack([grad(total, argnums=2)(theirs, parameters(theirs), i) for i in inputs])
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("name", CELLS)
def test_ensemble(name):
    ours, _, x = layers(name)
    models = [ours, *(copy.deepcopy(ours) for _ in range(2))]
    for k, model in enumerate(models):
        for p in model.parameters():
            p.data.mul_(1 + k / 2)
    stacked, _ = stack_module_state(models)
    got = vmap(grad(total, argnums=1), in_dims=(None, 0, None))(ours, stacked, x)
    for k, model in enumerate(models):
        check({n: g[k] for n, g in got.items()}, grad(total, argnums=1)(model, parameters(model), x))


@pytest.mark.parametrize("name", CELLS)
def test_jvp(name):
    """Along all inputs and weights at once: <u, J v> = <J' u, v>."""
    ours, _, x = layers(name)
    weights = parameters(ours)
    v = {n: torch.randn_like(w) for n, w in weights.items()}, torch.randn_like(x)
    y, tangent = jvp(lambda w, x: functional_call(ours, w, (x,))[0], (weights, x), v)
    plain, pull_back = vjp(lambda w, x: functional_call(ours, w, (x,))[0], weights, x)
    assert relative_error(y, plain) < 1e-12
    u = torch.randn_like(y)
    back = pull_back(u)
    expected = sum((back[0][n] * v[0][n]).sum() for n in weights) + (back[1] * v[1]).sum()
    assert relative_error((u * tangent).sum(), expected) < 1e-9
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v[1])
        got = torch.autograd.forward_ad.unpack_dual(ours(dual)[0]).tangent
    assert relative_error(got, jvp(lambda x: ours(x)[0], (x,), (v[1],))[1]) < 1e-12


ORDERS = {
    "forward over reverse": hessian,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "reverse over grad": lambda f: jacrev(grad(f)),
    "forward over forward": lambda f: jacfwd(jacfwd(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CELLS)
def test_hessian(name, order):
    ours, theirs, _ = layers(name)
    x = torch.randn(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.functional.hessian(lambda x: total(theirs, dict(theirs.named_parameters()), x), x)
    assert relative_error(ORDERS[order](lambda x: total(ours, parameters(ours), x))(x), expected) < 1e-9


def test_cell_of_ones_own():
    module = fastcells.nn.Recurrent(minimal, 4, 6, dtype=torch.float64)
    x = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    got = vmap(grad(total, argnums=1), in_dims=(None, None, 0))(module, parameters(module), x)
    for k in range(3):
        leaves = {n: p.requires_grad_() for n, p in parameters(module).items()}
        expected = torch.autograd.grad(total(module, leaves, x[k]), list(leaves.values()))
        check({n: g[k] for n, g in got.items()}, dict(zip(got, expected, strict=True)))
    tangent = jvp(lambda x: module(x)[0], (x[0],), (x[1],))[1]
    step = 1e-6 * x[1]
    difference = (module(x[0] + step)[0] - module(x[0] - step)[0]) / 2e-6
    assert relative_error(tangent, difference) < 1e-8
