"""Single steps: a call like the one before, and streams."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.overrides
import torch.utils._python_dispatch

import fastcells
from fastcells import cell, cells, functional, variants
from fastcells.cpu import again
from fastcells.expression import tanh

KINDS = ["LSTM", "GRU", "RNN"]


def listed(states):
    return states if isinstance(states, tuple) else (states,)


def everything(result):
    return [result[0], *listed(result[1])]


def layers(kind, dtype=torch.float64, **options):
    ours = getattr(fastcells.nn, kind)(5, 7, dtype=dtype, **options)
    theirs = getattr(torch.nn, kind)(5, 7, dtype=dtype, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def initial(kind, rows, directions=1, dtype=torch.float64, batched=True):
    states = [torch.randn(directions, rows, 7, dtype=dtype) for _ in range(1 + (kind == "LSTM"))]
    states = states if batched else [s[:, 0] for s in states]
    return tuple(states) if len(states) > 1 else states[0]


# ---- a call like the one before ----
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}, {"num_layers": 2}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_calls_with_other_numbers(kind, options, given, steps):
    ours, theirs = layers(kind, **options)
    directions = (1 + ours.bidirectional) * ours.num_layers
    seen = []
    for _ in range(5):
        x = torch.randn((4, steps, 5) if ours.batch_first else (steps, 4, 5), dtype=torch.float64)
        hx = initial(kind, 4, directions) if given else None
        with torch.no_grad():
            seen.append(everything(ours(x, hx)))
            for a, b in zip(seen[-1], everything(theirs(x, hx)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    pointers = [t.data_ptr() for result in seen for t in result]
    assert len(set(pointers)) == len(pointers), "every result is memory of its own"
    if (known := ours.__dict__.get("_replays")) is not None:
        assert known.seen[False, False, False].replay.forward is not None


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_equal_calls_of_cells_and_without_a_batch(kind, shape):
    ours, theirs = layers(kind)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(shape, dtype=torch.float64)
            for a, b in zip(listed(ours(x)), listed(theirs(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_whatever_changes_between_calls_is_seen():
    """After calls that are alike, each kind of change gives what a layer that never saw them gives."""
    ours, theirs = layers("LSTM")
    x, hx = torch.randn(1, 2, 5, dtype=torch.float64), initial("LSTM", 2)

    def agree(x, hx=None):
        for a, b in zip(everything(ours(x, hx)), everything(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    def settle():
        for _ in range(3):
            agree(x, hx)
        assert ours._replays.seen[False, False, False].replay.forward is not None

    def both(change):
        for module in (ours, theirs):
            change(module)

    def new(shape):
        torch.manual_seed(3)
        return torch.randn(shape, dtype=torch.float64)

    with torch.no_grad():
        settle()
        agree(x)
        agree(x.expand(4, 2, 5).contiguous(), hx)
        agree(torch.randn(5, 2, 1, dtype=torch.float64).transpose(0, 2), hx)
        agree(x, tuple(s.transpose(0, 1).contiguous().transpose(0, 1) for s in hx))
        settle()
        both(lambda m: m.weight_hh_l0.mul_(0.5))
        agree(x, hx)
        both(lambda m: setattr(m.weight_ih_l0, "data", new((28, 5))))
        agree(x, hx)
        both(lambda m: setattr(m, "bias_hh_l0", torch.nn.Parameter(new(28))))
        agree(x, hx)
        both(lambda m: setattr(m.weight_ih_l0, "data", new((5, 28)).t()))
        agree(x, hx)
        both(lambda m: setattr(m.weight_ih_l0, "data", new((28, 5))))
        settle()
        with pytest.raises(RuntimeError, match="input_size"):
            ours(torch.randn(1, 2, 6, dtype=torch.float64), hx)
        with pytest.raises((RuntimeError, ValueError), match="dtype"):
            ours(x.float(), hx)
        ours.weight_ih_l0.data = torch.randn(27, 5, dtype=torch.float64)
        with pytest.raises((RuntimeError, ValueError)):
            ours(x, hx)
        ours.weight_ih_l0.data = theirs.weight_ih_l0.data
        settle()
    y, _ = ours(x.requires_grad_(), hx)
    (grad,) = torch.autograd.grad(y.sum(), x)
    (truth,) = torch.autograd.grad(theirs(x, hx)[0].sum(), x)
    torch.testing.assert_close(grad, truth, rtol=0, atol=1e-12)


def trained(module, x, hx, chosen, cotangent=torch.ones_like, **options):
    """Gradients of some of the results with respect to input, states and parameters."""
    x = x.detach().requires_grad_()
    states = [s.detach().requires_grad_() for s in ([] if hx is None else listed(hx))]
    given = None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0]
    result = module(x, given)
    results = everything(result) if isinstance(module, torch.nn.RNNBase) else listed(result)
    results = [results[k] for k in chosen]
    leaves = [x, *states, *module.parameters()]
    return torch.autograd.grad(results, leaves, list(map(cotangent, results)), allow_unused=True, **options)


def expanded(t):
    return torch.tensor(0.5, dtype=t.dtype).expand(t.shape)


def apart(t):
    return torch.ones(*t.shape, 2, dtype=t.dtype)[..., 0]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"batch_first": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_calls_in_training(kind, options):
    """Whatever differs between them: the results that are used, their cotangents, whether the graph is kept."""
    ours, theirs = layers(kind, **options)
    last = 1 + (kind == "LSTM")
    kinds = [((0,), torch.ones_like), ((0, last), torch.ones_like), ((last,), torch.ones_like), ((0,), expanded)]
    kinds += [(tuple(range(last + 1)), apart), ((0,), torch.ones_like)]
    for chosen, cotangent in kinds:
        for keep in (False, False, True, False):
            x, hx = torch.randn(3, 3, 5, dtype=torch.float64), initial(kind, 3, 1 + ours.bidirectional)
            pairs = zip(*(trained(m, x, hx, chosen, cotangent, retain_graph=keep) for m in (ours, theirs)), strict=True)
            for a, b in pairs:
                a, b = (torch.zeros(1) if t is None else t for t in (a, b))
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12, check_dtype=False)
    assert ours._replays.seen[True, False, False].replay.forward is not None


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "LSTM"])
@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_equal_calls_in_training_of_cells_and_without_a_batch(kind, shape):
    ours, theirs = layers(kind)
    hidden = {"LSTM": (1, 7), "LSTMCell": (*shape[:-1], 7), "GRUCell": (*shape[:-1], 7)}[kind]
    shape = (4, 5) if kind == "LSTM" else shape
    for _ in range(5):
        states = [torch.randn(hidden, dtype=torch.float64) for _ in range(1 + (kind != "GRUCell"))]
        x, hx = torch.randn(shape, dtype=torch.float64), tuple(states) if len(states) > 1 else states[0]
        for a, b in zip(trained(ours, x, hx, (0,)), trained(theirs, x, hx, (0,)), strict=True):
            a, b = (torch.zeros(1) if t is None else t for t in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12, check_dtype=False)
    assert ours._replays.seen[True, False, False].replay.forward is not None


@pytest.mark.skipif(again.interface() is None, reason="Python or torch without the interfaces for C")
def test_equal_backward_passes_are_prepared_once(monkeypatch):
    made = []
    prepared = functional.Invocation._prepared
    monkeypatch.setattr(functional.Invocation, "_prepared", lambda *given: made.append(1) or prepared(*given))
    layer, reset = layers("GRU")[0], torch.zeros(4, 3, dtype=torch.bool)
    reset[2, 1] = True
    for options in ({}, {"reset": reset, "reset_to": 0}, {"lengths": [4, 1, 2]}):
        counts = []
        for _ in range(8):
            made.clear()
            layer(torch.randn(4, 3, 5, dtype=torch.float64), **options)[0].sum().backward()
            counts.append(len(made))
        assert counts[0] == 1
        assert counts[-4:] == [0, 0, 0, 0]


def test_a_graph_is_asked_twice_after_equal_calls():
    """What was saved is still there, although the call was made ready for graphs that are asked once."""
    ours, theirs = layers("LSTM")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for _ in range(4):
        trained(ours, x, None, (0,))
    found = []
    for module in (ours, theirs):
        y, _ = module(x)
        first = torch.autograd.grad(y.sum(), list(module.parameters()), retain_graph=True)
        found.append([*first, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_wants_gradients_may_change_between_calls():
    ours, theirs = layers("GRU")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for frozen in (False, False, False, True, True, True, False):
        ours.weight_hh_l0.requires_grad_(not frozen)
        ours.zero_grad()
        theirs.zero_grad()
        for module in (ours, theirs):
            module(x)[0].square().sum().backward()
        assert (ours.weight_hh_l0.grad is None) == frozen
        torch.testing.assert_close(ours.weight_ih_l0.grad, theirs.weight_ih_l0.grad, rtol=0, atol=1e-12)


def test_saved_tensors_may_come_back_as_others():
    """Hooks on saved tensors give what is laid out otherwise, after calls where they did not."""
    ours, theirs = layers("LSTM")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    truth = trained(theirs, x, None, (0,))
    for _ in range(3):
        trained(ours, x, None, (0,))

    def unpack(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        for _ in range(3):
            for a, b in zip(trained(ours, x, None, (0,)), truth, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_layer_that_was_called_is_let_go():
    ours, _ = layers("LSTM")
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    for _ in range(3):
        trained(ours, x, None, (0,))
        with torch.no_grad():
            ours(x)
    gone = weakref.ref(ours)
    del ours, _
    gc.collect()
    assert gone() is None


def test_a_layer_that_was_called_copies_and_pickles():
    ours, _ = layers("GRU")
    x = torch.randn(1, 2, 5, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            y, _ = ours(x)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(other(x)[0], y)


def test_hooks_and_function_modes_are_not_passed_over():
    ours, _ = layers("GRU")
    x, seen = torch.randn(1, 2, 5, dtype=torch.float64), []

    class Count(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        for _ in range(3):
            ours(x)
        with Count():
            ours(x)
    assert seen


# ---- streams ----
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layer_count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_layer_step_by_step(kind, dtype, layer_count, rows):
    ours, _ = layers(kind, dtype, num_layers=layer_count)
    xs = torch.randn(6, rows, 5, dtype=dtype)
    begin = initial(kind, rows, layer_count, dtype)
    with torch.no_grad():
        wanted = everything(ours(xs, begin))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype is torch.float32 else 1e-13}
    stream = ours.stream(rows)
    for take in (torch.Tensor.clone, lambda x: x.t().contiguous().t(), torch.Tensor.numpy):
        stream.state = begin
        y = [torch.as_tensor(stream(take(x))).clone() for x in xs]
        torch.testing.assert_close(torch.stack(y), wanted[0], **tolerance)
        for a, b in zip(listed(stream.state), wanted[1:], strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    stream.reset()
    with torch.no_grad():
        torch.testing.assert_close(stream(xs[0]), ours(xs[:1])[0][0], **tolerance)


def test_a_stream_sees_weights_that_change_in_place():
    ours, _ = layers("GRU")
    stream, x = ours.stream(), torch.randn(1, 5, dtype=torch.float64)
    stream(x)
    with torch.no_grad():
        ours.weight_ih_l0.mul_(0.5)
    stream.reset()
    with torch.no_grad():
        torch.testing.assert_close(stream(x), ours(x[None])[0][0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_stream_sees_weights_that_move_to_shared_memory(compiled, monkeypatch):
    """What they were in before is let go of, and others write there."""
    if not compiled:
        monkeypatch.setattr(again, "interface", lambda: None)
    layer, x = fastcells.nn.LSTM(64, 64), torch.randn(3, 64)
    stream = layer.stream(3)
    stream(x)
    places = [p.data_ptr() for p in layer.parameters()]
    layer.share_memory()
    assert not {*places} & {p.data_ptr() for p in layer.parameters()}
    with torch.no_grad():
        layer.weight_ih_l0.mul_(0.5)
        others = [torch.full((256, 64), torch.nan) for _ in range(50)]
        stream.reset()
        torch.testing.assert_close(stream(x), layer(x[None])[0][0], rtol=0, atol=1e-6)
    del others


def test_a_stream_goes_on_with_weights_whose_place_others_take():
    """Which are its own then: nobody else may get their memory."""
    layer, x = fastcells.nn.LSTM(64, 64), torch.randn(3, 64)
    stream = layer.stream(3)
    expected = stream(x).clone()
    stream.reset()
    for p in layer.parameters():
        p.data = torch.zeros(1)  # as a move to another device or format does
    others = [torch.full((256, 64), torch.nan) for _ in range(50)]
    assert torch.equal(stream(x), expected)
    del others


def test_a_stream_takes_what_it_gave():
    """Whose memory the step writes to while it reads."""
    layer = fastcells.nn.GRU(64, 64)
    stream, other = layer.stream(3), layer.stream(3)
    y = x = torch.randn(3, 64)
    for _ in range(3):
        y, x = stream(y), other(x).clone()
        assert torch.equal(y, x)


def test_a_stream_made_in_inference_mode_is_used_outside():
    layer, x = fastcells.nn.GRU(5, 7), torch.randn(2, 5)
    with torch.inference_mode():
        stream = layer.stream(2)
    first = stream(x).clone()
    stream.reset()
    assert torch.equal(stream(x), first)
    stream.state = torch.zeros(1, 2, 7).numpy()
    assert torch.equal(stream(torch._neg_view(-x)), first)


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: torch._neg_view(-x),
        lambda x: torch._neg_view(-x.t().contiguous()).t(),
        torch.nn.Parameter,
        lambda x: x.numpy()[::-1].copy()[::-1],
    ],
    ids=["across", "negated", "negated across", "a parameter", "backwards"],
)
def test_a_stream_takes_a_step_however_it_is_laid_out(odd):
    layer, x = fastcells.nn.GRU(5, 7), torch.randn(2, 5)
    assert torch.equal(torch.as_tensor(layer.stream(2)(odd(x))), layer.stream(2)(x))


def test_a_stream_takes_zeros_that_have_no_memory():
    layer = fastcells.nn.GRU(5, 7)
    assert torch.equal(layer.stream(2)(torch._efficientzerotensor(2, 5)), layer.stream(2)(torch.zeros(2, 5)))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: fastcells.nn.Recurrent(cells.gru_reset_before, 5, 7),
        lambda: fastcells.nn.Recurrent(cells.indrnn, 5, 7, num_layers=2),
        lambda: fastcells.nn.Recurrent(cells.indrnn, 5, 7, bias=False),
        lambda: fastcells.nn.LSTM(5, 7, proj_size=3),
        lambda: fastcells.nn.GRU(5, 7, num_layers=2, batch_first=True),
    ],
    ids=["gru_reset_before", "no recurrent weights", "nor biases", "projection", "batch_first"],
)
def test_a_stream_of_any_layer(make, compiled, monkeypatch):
    """By the compiled method, and where there is none."""
    if not compiled:
        monkeypatch.setattr(again, "interface", lambda: None)
    layer, xs = make(), torch.randn(4, 3, 5)
    stream = layer.stream(3)
    y = torch.stack([stream(x).clone() for x in xs])
    with torch.no_grad():
        wanted = layer(xs.transpose(0, 1))[0].transpose(0, 1) if layer.batch_first else layer(xs)[0]
        torch.testing.assert_close(y, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_resets_the_sequences_that_end(kind):
    """As the layer does with `reset`, for each sequence at its own step."""
    ours, _ = layers(kind, num_layers=2)
    xs, done = torch.randn(6, 3, 5, dtype=torch.float64), torch.rand(6, 3) < 0.4
    stream = ours.stream(3)
    y = []
    for t, x in enumerate(xs):
        stream.reset(done[t] if t % 2 else done[t].numpy())
        y.append(stream(x).clone())
    with torch.no_grad():
        wanted, *states = everything(ours(xs, reset=done, reset_to=0))
    torch.testing.assert_close(torch.stack(y), wanted, rtol=0, atol=1e-13)
    for a, b in zip(listed(stream.state), states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert done.any()
    assert not done.all()


def test_a_stream_drops_nothing():
    ours = fastcells.nn.GRU(5, 7, recurrent_dropout=0.5, zoneout=0.5, weight_dropout=0.5, dtype=torch.float64)
    xs, stream = torch.randn(4, 1, 5, dtype=torch.float64), ours.train().stream()
    y = torch.stack([stream(x).clone() for x in xs])
    with torch.no_grad():
        torch.testing.assert_close(y, ours.eval()(xs)[0], rtol=0, atol=1e-13)


def test_a_stream_takes_one_step_at_a_time():
    """Whatever another thread does, each step is taken as a whole or refused."""
    units, size, interval = 512, 8, sys.getswitchinterval()
    layer = fastcells.nn.RNN(64, units, nonlinearity="relu", bias=False)
    with torch.no_grad():  # the state counts the steps
        layer.weight_hh_l0.copy_(torch.eye(units))
        layer.weight_ih_l0.fill_(1 / 64)
    stream, x, refused = layer.stream(size), torch.ones(size, 64), []

    def go():
        for _ in range(200):
            try:
                stream(x)
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=go) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert set(refused) <= {"a stream takes one step at a time, and another thread's is under way"}
    assert stream.state.min() == stream.state.max() == 400 - len(refused)


def test_wrong_use_of_a_stream():
    layer = fastcells.nn.LSTM(5, 7)
    for size in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {size}"):
            layer.stream(size)
    with pytest.raises(ValueError, match="bidirectional must be False"):
        fastcells.nn.GRU(5, 7, bidirectional=True).stream()
    with pytest.raises(ValueError, match="cannot be streamed: the engine does not take device meta"):
        fastcells.nn.GRU(5, 7, device="meta").stream()
    with pytest.raises(ValueError, match=r"weights of torch.float32 or torch.float64, got torch.bfloat16"):
        fastcells.nn.Recurrent(cells.mgu, 5, 7, dtype=torch.bfloat16).stream()
    stream = layer.stream()
    for x in (torch.randn(2, 5), np.zeros((1, 6), np.float32), torch.randn(1, 5).double(), np.zeros((1, 5))):
        with pytest.raises(ValueError, match=r"x must be of shape \(1, 5\)"):
            stream(x)
    with pytest.raises(TypeError, match="got list"):
        stream([0.0] * 5)
    with pytest.raises(ValueError, match="state must be of shapes"):
        stream.state = torch.zeros(1, 1, 7)
    stream._step = lambda *_: None  # as where it is under way
    with pytest.raises(RuntimeError, match="a stream takes one step at a time"):
        stream(torch.randn(1, 5))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a stream cannot be copied or pickled"):
            copied(stream)
    with pytest.raises(ValueError, match=r"which must be bool of shape \(1,\), got torch.int64 of \(2,\)"):
        stream.reset([0, 1])


@cell(gates="h")
def halved(x, u, s):
    return tanh(x.h + u.h(0.5 * s.h))


def across(layer):
    layer.weight_ih_l0.data = torch.randn(5, 28).t()
    return layer


NOT_STREAMED = {
    "vectors of products": (lambda: fastcells.nn.Recurrent(halved, 5, 7), "its states need more than a kernel"),
    "weights by a function": (lambda: fastcells.nn.Recurrent(variants.antisymmetric_rnn(), 5, 7), "as they are held"),
    "parametrized weights": (
        lambda: torch.nn.utils.parametrizations.weight_norm(fastcells.nn.LSTM(5, 7), "weight_hh_l0"),
        "as they are held",
    ),
    "rows that are apart": (lambda: across(fastcells.nn.LSTM(5, 7)), "as they are held"),
}


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_what_is_made_from_states_or_weights_is_not_streamed(name):
    """It would be made once, and stale at the second step."""
    make, reason = NOT_STREAMED[name]
    with pytest.raises(ValueError, match=f"cannot be streamed: .*{reason}"):
        make().stream()


class Modes(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def dual(x, call):
    with torch.autograd.forward_ad.dual_level():
        return call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def within(context):
    def look(x, call):
        with context():
            return call(x)

    return look


LOOKS = {
    "autocast": within(lambda: torch.autocast("cpu")),
    "dispatch mode": within(Modes),
    "function mode": within(Functions),
    "profiler": within(torch.profiler.profile),
    "inference mode": within(torch.inference_mode),
    "forward mode": dual,
    "vmap": lambda x, call: torch.func.vmap(lambda one: call(one))(x[None]),
    "jit.trace": lambda x, call: torch.jit.trace(call, x, check_trace=False),
    "make_fx": lambda x, call: torch.fx.experimental.proxy_tensor.make_fx(lambda given: call(given)[0])(x),
}


@pytest.mark.parametrize("look", LOOKS)
def test_calls_that_something_looks_at_are_not_replayed(look):
    layer, x = fastcells.nn.GRU(4, 3), torch.randn(2, 1, 4)
    replayed = []

    def noted(call):
        return lambda *given: replayed.append(call(*given)) or replayed[-1]

    with torch.no_grad():
        for _ in range(2):
            layer(x)
        for way in ("forward", "straight"):
            setattr(layer._replays, way, tuple(map(noted, getattr(layer._replays, way))))
        layer(x)
        assert replayed[-1] is not None
        replayed.clear()
        LOOKS[look](x, layer)
        assert [result for result in replayed if result is not None] == []


def test_calls_first_made_while_something_looks_at_them_are_not_replayed_past_it(monkeypatch):
    layer, x = fastcells.nn.GRU(4, 3), torch.randn(2, 1, 4)
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            for _ in range(5):
                layer(x)
        assert [e.name for e in profile.events()].count("fastcells::gru") == 5
        seen, call = [], torch.nn.Module.__call__
        monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *a: seen.append(self) or call(self, *a))
        for _ in range(5):
            layer(x)
        assert seen == [layer] * 5


def test_hooks_and_other_forwards_run_although_calls_are_alike():
    class Doubled(fastcells.nn.GRU):
        def forward(self, x, hx=None):
            y, h = super().forward(2 * x, hx)
            return y, h + 1

    def of(layer):
        with torch.no_grad():
            for _ in range(3):
                result = layer(x)[1]
            return result

    layer, x = fastcells.nn.GRU(4, 3), torch.randn(2, 1, 4)
    doubled = Doubled(4, 3)
    doubled.load_state_dict(layer.state_dict())
    plain, twice = of(layer), of(doubled)
    torch.testing.assert_close(twice, layer(2 * x)[1] + 1)
    handle = layer.register_forward_hook(lambda module, given, result: (result[0], result[1] + 5))
    torch.testing.assert_close(of(layer), plain + 5)
    handle.remove()
    handle = layer.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    torch.testing.assert_close(of(layer), twice - 1)
    handle.remove()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(module))
    of(layer)
    handle.remove()
    assert seen == [layer] * 3
    torch.testing.assert_close(of(layer), plain)
    layer.forward = lambda given: (given, plain + 7)
    torch.testing.assert_close(of(layer), plain + 7)


@pytest.mark.parametrize("where", ["its class", "a base of it", "torch's"])
def test_what_a_class_is_given_later_runs_although_calls_are_alike(where, monkeypatch):
    class Mine(fastcells.nn.GRU):
        pass

    layer, x = Mine(4, 3), torch.randn(2, 1, 4)
    with torch.no_grad():
        for _ in range(3):
            plain = layer(x)[0]
        assert layer._replays.straight
        if where == "torch's":
            call = torch.nn.Module.__call__
            monkeypatch.setattr(torch.nn.Module, "__call__", lambda *given: (call(*given)[0] + 1, None))
        else:
            kind = Mine if where == "its class" else fastcells.nn.GRU
            monkeypatch.setattr(kind, "forward", lambda self, x, hx=None: (plain + 1, None), raising=False)
        assert torch.equal(layer(x)[0], plain + 1)
        monkeypatch.undo()
        assert torch.equal(layer(x)[0], plain)


@pytest.mark.parametrize("grad", [True, False])
def test_attributes_that_are_set_between_calls_hold(grad):
    layer, x = fastcells.nn.LSTM(4, 4), torch.randn(3, 3, 4)

    def settle():
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                y = layer(x)[0]
        assert layer._replays.seen[grad, False, False].replay.forward is not None
        return y

    plain = settle()
    layer.batch_first = True
    torch.testing.assert_close(settle(), fastcells.nn.LSTM.forward(layer, x)[0])
    assert not torch.equal(settle(), plain)
    layer.batch_first = False
    layer.train(False).train()
    assert torch.equal(settle(), plain)
    layer.recurrent_dropout = 0.5
    with torch.set_grad_enabled(grad):
        assert not torch.equal(layer(x)[0], layer(x)[0]), "drawn anew"
        layer.recurrent_dropout, layer.recompute = 0.0, grad
        y = layer(x)[0]
    assert bool(layer._replays.seen) != grad
    assert torch.equal(y, plain)
