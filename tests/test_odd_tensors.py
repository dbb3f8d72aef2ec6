"""Tensors whose numbers are not what their memory says, or that have none, in either pass: as torch.nn takes them."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import fastcells
from fastcells import nn

KINDS = ["LSTM", "GRU", "RNN", "GRUCell"]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def modules(kind, inputs=4, hidden=6, **options):
    """Ours, torch's with the same weights, an input."""
    ours, theirs = (
        getattr(nn, kind)(inputs, hidden, dtype=torch.float64, **options) for nn in (fastcells.nn, torch.nn)
    )
    theirs.load_state_dict(ours.state_dict())
    shape = (3, inputs) if kind.endswith("Cell") else (5, 3, inputs)
    return ours, theirs, torch.randn(shape, dtype=torch.float64)


def first(module, *given):
    """Of a module's results, the first."""
    result = module(*given)
    while isinstance(result, tuple):
        result = result[0]
    return result


def negated(t):
    """The same numbers, in memory with the other sign."""
    return torch._neg_view(-t)


@pytest.mark.parametrize("hidden", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_negated_views(kind, hidden):
    ours, theirs, x = modules(kind, hidden=hidden)
    h = torch.randn(*((3,) if kind == "GRUCell" else (1, 3)), hidden, dtype=torch.float64)
    states = (h, h) if kind == "LSTM" else h
    turned = (negated(h), negated(h)) if kind == "LSTM" else negated(h)
    for _ in range(3):
        a, b = first(ours, negated(x), turned), first(theirs, x, states)
        torch.testing.assert_close(a, b, **TOLERANCE)
        cotangent = torch.randn_like(a)
        grads = torch.autograd.grad(a, [*ours.parameters()], negated(cotangent))
        torch.testing.assert_close(grads, torch.autograd.grad(b, [*theirs.parameters()], cotangent), **TOLERANCE)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            setattr(ours, name, torch.nn.Parameter(negated(p)))
        torch.testing.assert_close(first(ours, x), first(theirs, x), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_zeros_alone(kind):
    ours, theirs, x = modules(kind)
    zeros = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    y = first(ours, zeros)
    torch.testing.assert_close(y, first(theirs, zeros), **TOLERANCE)
    grads = torch.autograd.grad(y, [*ours.parameters()], torch._efficientzerotensor(y.shape, dtype=y.dtype))
    assert all(not g.any() for g in grads)


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_backward_under_a_mode_of_fakes(kind, options, calls):
    ours, _, x = modules(kind)
    ours = getattr(fastcells.nn, kind)(4, 6, dtype=torch.float64, **options)
    x.requires_grad_()
    for _ in range(calls):
        y = first(ours, x)
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (found,) = torch.autograd.grad(y.sum(), x)
    assert isinstance(found, FakeTensor)
    assert found.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_cotangent_with_a_tangent(kind):
    """Forward over reverse: what is linear has the tangent's own gradient."""
    ours, _, x = modules(kind)
    y = first(ours, x.requires_grad_())
    cotangent, tangent = torch.randn_like(y), torch.randn_like(y)
    (right,) = torch.autograd.grad(y, x, tangent, retain_graph=True)
    with forward_ad.dual_level():
        (found,) = torch.autograd.grad(y, x, forward_ad.make_dual(cotangent, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, right, **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_in_batches(kind, options):
    if options and kind == "GRUCell":
        options = {}
    ours = getattr(fastcells.nn, kind)(4, 6, dtype=torch.float64, **options)
    x = modules(kind)[2].requires_grad_()
    for _ in range(3):
        y = first(ours, x)
        many = torch.randn(2, *y.shape, dtype=y.dtype)
        right = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many]
        (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True)
        torch.testing.assert_close(found, torch.stack(right), **TOLERANCE)
    jacobian = torch.autograd.functional.jacobian(lambda x: first(ours, x).sum(-1), x, vectorize=True)
    right = torch.autograd.functional.jacobian(lambda x: first(ours, x).sum(-1), x)
    torch.testing.assert_close(jacobian, right, **TOLERANCE)


def test_saved_tensors_that_come_back_elsewhere():
    ours, _, x = modules("GRU")
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.to("meta")):
        y, _ = ours(x)
    with pytest.raises(RuntimeError, match="device"):
        torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.double()], ids=["shape", "dtype"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_hooks_that_give_back_others(packed, change):
    """In the first call, and in those that are made like it."""
    layer, x = nn.GRU(4, 8), torch.randn(20, 3, 4)
    given = pack_padded_sequence(x, [20, 17, 3]) if packed else x
    for _ in range(4):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
            y, _ = layer(given)
        with pytest.raises(RuntimeError, match="what backward needs must be as in the forward pass, a torch"):
            (y.data if packed else y).sum().backward()


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNNCell"])
def test_parameters_that_are_given_other_data_before_backward(kind, calls):
    """Which autograd does not see. Kernels would read them as what they were."""
    changes = {
        "torch.float64": lambda layer: layer.double(),
        "torch.bfloat16": lambda layer: layer.bfloat16(),
        r"\(1,\)": lambda layer: [setattr(p, "data", torch.zeros(1)) for p in layer.parameters()],
    }
    for got, change in changes.items():
        layer, x = getattr(nn, kind)(4, 64), torch.randn(*(() if "Cell" in kind else (5,)), 2, 4)
        for _ in range(calls):
            y = first(layer, x)
            y.sum().backward() if calls > 1 else None
        y = first(layer, x)
        change(layer)
        with pytest.raises(RuntimeError, match=f"must be as in the forward pass, a torch.float32 .*, got .*{got}"):
            y.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("calls", [0, 4])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_tensors_whose_memory_was_let_go(kind, calls, grad):
    with torch.set_grad_enabled(grad):
        for which in ("input", "weight_hh_l0"):
            layer, x = getattr(nn, kind)(4, 64), torch.randn(5, 2, 4)
            for _ in range(calls):
                layer(x)
            y, _ = layer(x)
            (x if which == "input" else getattr(layer, which)).untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="has no memory: its storage was resized to 0 bytes"):
                layer(x)
            if grad:
                with pytest.raises(RuntimeError, match="has no memory: its storage was resized to 0 bytes"):
                    y.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_states_of_cells_are_detached_in_place(kind, grad):
    """As truncated backpropagation does: they are no views."""
    cell = getattr(nn, kind)(4, 6)
    with torch.set_grad_enabled(grad):
        for shape in ((3, 4), (4,)):
            for _ in range(4):
                made = cell(torch.randn(shape))
                for state in made if isinstance(made, tuple) else (made,):
                    assert state.requires_grad == grad
                    assert not state.detach_().requires_grad


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_of_no_sequences_and_of_other_layouts(kind):
    ours, theirs, x = modules(kind)
    h = torch.randn(3, 6, dtype=torch.float64)
    for given, state in ((x[:0], h[:0]), (x.to_sparse_csr(), h)):
        states = (state, state) if kind == "LSTMCell" else state
        torch.testing.assert_close(first(ours, given, states), first(theirs, given, states), **TOLERANCE)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_forward_mode_beside_what_has_a_tangent(backend):
    ours, _, x = modules("GRU", hidden=4)
    v = torch.randn_like(x)

    def run(x, v):
        return torch.func.jvp(lambda x: ours(x)[0] + 0.1 * x, (x,), (v,))[1]

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, backend=backend)(x, v), run(x, v), **TOLERANCE)


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_results_in_half_the_bits_have_whole_numbers_beside(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, x = fastcells.nn.GRU(4, 5, dtype=dtype), torch.randn(3, 2, 4, dtype=dtype)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [1, 3], enforce_sorted=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, _ = layer(packed)
    for ours, given in zip(y[1:], packed[1:], strict=True):
        assert torch.equal(ours, given)
        assert ours.dtype is torch.int64
