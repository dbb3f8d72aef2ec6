"""Calls made again by a compiled method: what it holds and lets go, and when it leaves a call to Python."""

import copy
import gc
import pickle
import sys
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastcells
from fastcells import cells
from fastcells.cpu import again
from fastcells.cpu import layer as cpu
from fastcells.cpu.script import arena
from fastcells.roof import using_threads

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
pytestmark = pytest.mark.skipif(again.interface() is None, reason="Python or torch without the interfaces for C")


def made(kind, **options):
    """A layer or cell, an input, and states."""
    module = getattr(fastcells.nn, kind)(6, 5, **options)
    one = kind.endswith("Cell")
    x, shape = torch.randn((3, 6) if one else (4, 3, 6)), (3, 5) if one else (1, 3, 5)
    h = torch.randn(shape)
    return module, x, (h, torch.randn(shape)) if kind.startswith("LSTM") else h


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def of_torch(module, *given):
    """What the class that the module stands in for makes of it."""
    theirs = getattr(torch.nn, type(module).__name__)
    return theirs.forward(module, *given)


def settled(module, *given):
    """The result of a call that has been made before."""
    for _ in range(2):
        module(*given)
    assert module._replays.straight
    return module(*given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_holds_and_keeps_nothing(kind, mode):
    module, x, hx = made(kind)
    held = [x, *tensors(hx), *module.parameters(), module, module._parameters, type(hx), True]
    with mode():
        result = settled(module, x, hx)
        gc.collect()
        before, nothing = [*map(sys.getrefcount, held)], sys.getrefcount(None)
        for _ in range(1000):
            module(x, hx)
            assert module._replays.straight[0](module, hx, hx) is None
        assert [*map(sys.getrefcount, held)] == before
        assert abs(sys.getrefcount(None) - nothing) < 100
    assert all(t.is_inference() == (mode is torch.inference_mode) for t in tensors(result))
    gone = [weakref.ref(t) for t in tensors(result)]
    del result
    assert [r() for r in gone] == [None] * len(gone)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}, {"bidirectional": True}])
def test_threads_call_one_layer_each_with_memory_of_its_own(options):
    module = fastcells.nn.LSTM(6, 5, **options)
    inputs = [torch.randn(40, 40, 6) for _ in range(8)]
    with torch.no_grad():
        expected = [of_torch(module, x) for x in inputs]

        def many(k):
            with torch.no_grad():  # which each thread has for itself
                return [module(inputs[k]) for _ in range(30)]

        with ThreadPoolExecutor(4) as pool:
            for results, right in zip(pool.map(many, range(8)), expected, strict=True):
                for result in results:
                    for a, b in zip(tensors(result), tensors(right), strict=True):
                        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_was_let_go_is_taken_anew(kind):
    module, x, hx = made(kind)
    with torch.no_grad():
        right = tensors(settled(module, x, hx))
        (call,) = module._replays.straight
        for let_go in (arena.release, lambda: None, arena.release):
            let_go()
            for a, b in zip(tensors(call(module, x, hx)), right, strict=True):
                assert torch.equal(a, b)
        for _ in range(3):
            cpu.forget()
            assert not module._replays.straight
            for a, b in zip(tensors(module(x, hx)), right, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_fake_where_fakes_are_made(kind):
    """Also of tensors that are real."""
    module, x, hx = made(kind)
    with torch.no_grad():
        real = settled(module, x, hx)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = module(x, hx)
        assert all(isinstance(t, FakeTensor) for t in tensors(fake))
        assert all(map(torch.equal, tensors(module(x, hx)), tensors(real)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_there_where_they_are_wanted(kind):
    """After calls without gradients, and then with, the other kind is another call."""
    module, x, hx = made(kind)
    for _ in range(2):
        with torch.no_grad():
            assert not any(t.requires_grad for t in tensors(settled(module, x, hx)))
        assert all(t.requires_grad for t in tensors(settled(module, x, hx)))


def test_threads_that_come_and_go_make_the_call_again():
    module, x, hx = made("GRU")
    with torch.no_grad():
        right = tensors(settled(module, x, hx))
        (call,) = module._replays.straight

        def once(_):
            with torch.no_grad():
                return call(module, x, hx)

        for _ in range(5):
            with ThreadPoolExecutor(1) as pool:
                for a, b in zip(tensors(pool.submit(once, 0).result()), right, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_collections_that_call_layers_do_no_harm(kind):
    module, x, hx = made(kind)
    other, others_x, others_hx = made(kind)
    with torch.no_grad():
        right = tensors(settled(module, x, hx))
        settled(other, others_x, others_hx)

        def call(phase, _):
            if phase == "start":
                other(others_x, others_hx)

        before = gc.get_threshold()
        gc.callbacks.append(call)
        gc.set_threshold(1, 1, 1)
        try:
            for _ in range(50):
                for a, b in zip(tensors(module(x, hx)), right, strict=True):
                    assert torch.equal(a, b)
        finally:
            gc.callbacks.remove(call)
            gc.set_threshold(*before)


@pytest.mark.parametrize("what", ["interface", "ROOM"])
def test_without_it_calls_are_the_same(what, monkeypatch):
    monkeypatch.setattr(again, what, {"interface": lambda: None, "ROOM": 2}[what])
    module, x, hx = made("LSTM")
    with torch.no_grad():
        for _ in range(4):
            for a, b in zip(tensors(module(x, hx)), tensors(of_torch(module, x, hx)), strict=True):
                torch.testing.assert_close(a, b)
    assert not module._replays.straight


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_of_training_hold_and_keep_nothing(kind):
    module, x, hx = made(kind)
    parameters = [*module.parameters()]
    cotangents = [torch.randn_like(t) for t in tensors(module(x, hx))]
    held = [x, *tensors(hx), *parameters, *cotangents, module, True]

    def step():
        results = tensors(module(x, hx))
        return [*results, *torch.autograd.grad(results, parameters, cotangents)]

    for _ in range(4):
        found = step()
    gc.collect()
    before, nothing = [*map(sys.getrefcount, held)], sys.getrefcount(None)
    for _ in range(300):
        step()
    assert [*map(sys.getrefcount, held)] == before
    assert abs(sys.getrefcount(None) - nothing) < 100
    gone = [weakref.ref(t) for t in found]
    del found
    assert [r() for r in gone] == [None] * len(gone)


COTANGENTS = {  # of some results, (y, h_n, c_n)
    "all": lambda y, *finals: [torch.randn_like(t) for t in (y, *finals)],
    "y alone": lambda y, *finals: [torch.randn_like(y)],
    "final states": lambda y, *finals: [None, *(torch.randn_like(t) for t in finals)],
    "a single number": lambda y, *finals: [y.new_ones(()).expand(y.shape)],
    "turned": lambda y, *finals: [torch.randn_like(y.transpose(0, 2)).transpose(0, 2)],
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}, {"proj_size": 3}],
    ids=str,
)
def test_backward_calls_one_after_the_other(options, threads, compiled, monkeypatch):
    """Of all kinds of cotangents in turn, with weights that change, some of them frozen, and graphs asked twice."""
    if not compiled:
        function = again.function
        monkeypatch.setattr(again, "function", lambda n, like, made, *f: None if made else function(n, like, made, *f))
    monkeypatch.setattr("fastcells.plan.THREAD_FLOPS", 0)
    set_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = fastcells.nn.LSTM(6, 5, dtype=torch.float64, **options)
        reference = torch.nn.LSTM(6, 5, dtype=torch.float64, **options)
        x = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
        for turn in range(4):
            frozen = turn == 3
            module.weight_ih_l0.requires_grad_(not frozen)
            with torch.no_grad():
                for p in module.parameters():
                    p.mul_(1.1)
            reference.load_state_dict(module.state_dict())
            names = [n for n, p in module.named_parameters() if p.requires_grad]
            for make in COTANGENTS.values():
                grads = []
                for layer in (module, reference):
                    outputs = tensors(layer(x))
                    if layer is module:
                        given = make(*outputs)
                    asked = [(o, d) for o, d in zip(outputs, given, strict=False) if d is not None]
                    inputs = [x, *(dict(layer.named_parameters())[n] for n in names)]
                    results, cotangents = zip(*asked, strict=True)
                    once = torch.autograd.grad(results, inputs, cotangents, retain_graph=True)
                    twice = torch.autograd.grad(results, inputs, cotangents)
                    assert layer is reference or all(map(torch.equal, once, twice))
                    grads.append(once)
                for name, a, b in zip(["x", *names], *grads, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        torch.set_num_threads(set_before)


def test_copies_begin_anew_and_what_is_reverted_has_none():
    module, x, hx = made("GRU")
    with torch.no_grad():
        right = tensors(settled(module, x, hx))
        for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            for a, b in zip(tensors(settled(other, x, hx)), right, strict=True):
                assert torch.equal(a, b)
    model = torch.nn.Sequential(module)
    fastcells.revert(model)
    assert type(module) is torch.nn.GRU
    assert "_replays" not in module.__dict__


def test_other_arguments_are_left_to_python():
    module, x, hx = made("LSTM")
    with torch.no_grad():
        settled(module, x, hx)
        for call in module._replays.straight + module._replays.forward:
            others = [
                (),
                (x, hx, hx),
                (x, None),
                (x, hx[0]),
                (x, [*hx]),
                (x, hx[:1]),
                (x, (*hx, x)),
                (None, hx),
                (x, (x, 1)),
            ]
            assert [call(module, *given) for given in others] == [None] * len(others)
            assert call() is None
        with pytest.raises(RuntimeError, match="input_size"):
            module(x[..., :2], hx)
        with pytest.raises(TypeError):
            module(x, hx, hx, hx)


CHANGES = {
    "one number": lambda w: w.view(-1)[7].add_(1e-3),
    "one sign": lambda w: w.view(-1)[-1].neg_(),
    "all signs": lambda w: w.neg_(),
    "two rows exchanged": lambda w: w.copy_(torch.cat([w[1:2], w[:1], w[2:]])),
    "columns turned around": lambda w: w.copy_(w.flip(-1)),
    "two numbers exchanged": lambda w: w.view(-1).__setitem__([3, 67], w.view(-1)[[67, 3]]),  # of one lane
    "scaled by powers of two": lambda w: w.mul_(2.0),
    "by NumPy": lambda w: w.numpy().__setitem__(slice(1, 3), 0.25),
    "nothing": lambda w: None,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", [(37, 30), (64, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_changed_without_a_trace_are_packed_anew(change, threads, sizes, dtype):
    """Packed weights are kept from call to call: whatever changes the weights, the next call has to see it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module, x = fastcells.nn.LSTM(*sizes, num_layers=2, dtype=dtype), torch.randn(40, 3, sizes[0], dtype=dtype)
        with torch.no_grad():
            settled(module, x)
            for weight in [*module.parameters(), *module.parameters()]:
                CHANGES[change](weight.data)  # leaves no trace in the parameter
                for a, b in zip(tensors(module(x)), tensors(of_torch(module, x)), strict=True):
                    torch.testing.assert_close(a, b)
                for a, b in zip(tensors(module(x)), tensors(of_torch(module, x)), strict=True):
                    torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_number_that_changes_is_seen_by_whichever_thread_compares_it(threads):
    """Large weights are compared, and packed, in shares of the threads; none of them may lack a row or a column."""
    module, x = fastcells.nn.GRU(150, 130), torch.randn(30, 4, 150)
    cpu.forget()
    with using_threads(threads), torch.no_grad():
        settled(module, x)
        for weight in (module.weight_ih_l0, module.weight_hh_l0):
            rows, columns = weight.shape
            for row in (0, 63, 64, 129, 130, 200, 259, 260, rows - 1):
                weight.data[row, (7 * row) % columns] += 1.0
                for a, b in zip(tensors(module(x)), tensors(of_torch(module, x)), strict=True):
                    torch.testing.assert_close(a, b)
    cpu.forget()


def test_weights_put_in_place_of_others_are_seen():
    module, x = fastcells.nn.GRU(20, 48), torch.randn(30, 4, 20)
    with torch.no_grad():
        settled(module, x)
        for _ in range(3):
            module.weight_hh_l0.data = torch.randn(144, 48) / 7
            module._parameters["weight_ih_l0"] = torch.nn.Parameter(torch.randn(144, 20) / 7)
            for a, b in zip(tensors(module(x)), tensors(of_torch(module, x)), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}], ids=str
)
@pytest.mark.parametrize("cell", [cells.gru_reset_before, cells.peephole_lstm, cells.mgu], ids=lambda c: c.name)
def test_training_of_any_cell_again(cell, options, given):
    """The same gradients as of the first call, which is made in Python."""
    layer = fastcells.nn.Recurrent(cell, 6, 5, **options, dtype=torch.float64)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    hx = tuple(torch.randn(rows, 3, 5, dtype=torch.float64, requires_grad=True) for _ in cell.states) if given else ()
    x = torch.randn((3, 4, 6) if layer.batch_first else (4, 3, 6), dtype=torch.float64, requires_grad=True)
    leaves, found = [x, *hx, *layer.parameters()], []
    for _ in range(4):
        results = tensors(layer(x, (hx if len(hx) > 1 else hx[0]) if given else None))
        weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view(t.shape) for t in results]
        found.append([*results, *torch.autograd.grad(results, leaves, weights)])
    assert layer._replays.forward
    for again_ in found[1:]:
        for a, b in zip(again_, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Other(torch.Tensor):
    """Any class of tensors but torch's."""


DIFFERENT = {
    "sizes": lambda: torch.randn(4, 4),
    "dimensions": lambda: torch.randn(3, 4, 1),
    "strides": lambda: torch.randn(4, 3).t(),
    "rows apart": lambda: torch.randn(3, 5)[:, :4],
    "format": lambda: torch.randn(3, 4, dtype=torch.float64),
    "a gradient is wanted": lambda: torch.randn(3, 4, requires_grad=True),
    "negated when read": lambda: torch.randn(3, 4, dtype=torch.complex64).conj().imag,
    "device": lambda: torch.randn(3, 4, device="meta"),
    "sparse": lambda: torch.randn(3, 4).to_sparse(),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(3, 4), requires_grad=False),
    "class": lambda: torch.randn(3, 4).as_subclass(Other),
    "nothing": lambda: None,
    "no tensor": lambda: torch.randn(3, 4).numpy(),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_tensors_are_compared_with_those_of_the_call_before(what):
    first, second = torch.randn(3, 4), torch.randn(2, 5).t()
    like = again.function(2, [first, second], None)
    given = torch.randn(3, 4), torch.randn(2, 5).t()
    assert all(a is b for a, b in zip(like(*given), given, strict=True))
    assert like(DIFFERENT[what](), second) is None
    assert like(first, DIFFERENT[what]()) is None
    assert like(first) is like(second, first) is None


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu"), Passing, FakeTensorMode])
def test_tensors_are_others_where_torch_does_otherwise(mode):
    tensors = [torch.randn(3, 4)]
    outside = again.function(1, tensors, None)
    with mode():
        inside = again.function(1, tensors, None)
        assert outside(*tensors) is None
        assert inside(*tensors) is not None
    assert outside(*tensors) is not None
    assert inside(*tensors) is None
    vmapped = []
    torch.func.vmap(lambda t: vmapped.append(outside(t)) or t)(torch.randn(2, 3, 4))
    assert vmapped == [None]


def test_a_call_under_way_keeps_its_weights():
    """Those of another thread's call are packed elsewhere."""
    layer, x = fastcells.nn.GRU(256, 256), torch.randn(100, 8, 256)
    other = {n: torch.nn.Parameter(torch.randn_like(p) * 0.05) for n, p in layer.named_parameters()}

    def call(weights=None):
        with torch.no_grad():
            return layer(x)[0] if weights is None else torch.func.functional_call(layer, weights, x)[0]

    with using_threads(1), ThreadPoolExecutor(2) as pool:
        truth, changed = call(), call(other)
        for _ in range(3):
            call()
        assert len(layer._replays.straight) == 2
        for _ in range(15):
            there, here = pool.submit(call), call(other)
            assert torch.equal(here, changed)
            found = there.result()  # of the weights that it met
            assert torch.equal(found, truth) or torch.equal(found, changed)


def test_weights_that_are_written_to_while_they_are_packed_are_packed_anew():
    layer, x = fastcells.nn.GRU(700, 700), torch.randn(20, 4, 700)
    good = [p.detach().clone() for p in layer.parameters()]

    def call():
        with torch.no_grad():
            return layer(x)[0]

    def put(scale):
        with torch.no_grad():
            for p, g in zip(layer.parameters(), good, strict=True):
                torch.mul(g, scale, out=p)

    with using_threads(1), ThreadPoolExecutor(1) as pool:
        put(0.25)
        truth = [call() for _ in range(3)][-1]
        for _ in range(15):
            put(0.5)
            call()
            put(1)
            meanwhile = pool.submit(call)
            put(0.5)
            put(0.25)  # not what they were: a digest before and one after tell them apart from what was packed between
            meanwhile.result()
            assert torch.equal(call(), truth)


def test_nothing_is_borrowed_while_python_runs():
    """A thread's first call asks for memory; what a collection frees meanwhile is not used."""
    layer, x, let_go = fastcells.nn.GRU(64, 64), torch.randn(2, 3, 64), []
    with torch.no_grad():
        settled(layer, x)
    kept = []

    def collecting(phase, info):  # as any finalizer may
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._getframe())]
        if not let_go and phase == "start" and "take" in frames:
            let_go.append(1)
            layer.register_parameter("weight_hh_l0", torch.nn.Parameter(torch.zeros(192, 64)))
            kept.extend(torch.full((192, 64), torch.nan) for _ in range(3))

    def run():
        gc.set_threshold(1, 1, 1)
        with torch.no_grad():
            return layer(x)[0]

    thresholds = gc.get_threshold()
    gc.callbacks.append(collecting)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run).result().isfinite().all()
    finally:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*thresholds)
    assert let_go


@pytest.mark.parametrize("grad", [False, True])
def test_a_parameter_of_two_names_may_become_two(grad):
    layer, x = fastcells.nn.LSTM(8, 8, bidirectional=True), torch.randn(4, 3, 8)
    layer.weight_hh_l0_reverse = layer.weight_hh_l0
    new = torch.nn.Parameter(torch.randn(32, 8))
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            layer(x)
        layer.register_parameter("weight_hh_l0", new)
        y, _ = layer(x)
        torch.testing.assert_close(y, of_torch(copy.deepcopy(layer), x)[0])
    if grad:
        y.sum().backward()
        assert new.grad is not None


def test_options_that_a_class_has_are_read_at_each_call():
    class Layer(fastcells.nn.GRU):
        batch_first = property(lambda self: first[-1], lambda self, value: None)

    first, x = [False], torch.randn(4, 4, 8)
    layer, other = Layer(8, 8), fastcells.nn.GRU(8, 8, batch_first=True)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        first.append(True)
        assert torch.equal(layer(x)[0], other(x)[0])


def test_a_call_that_is_replaced_is_not_passed_over(monkeypatch):
    layer, x = fastcells.nn.GRU(8, 8), torch.randn(4, 4, 8)
    with torch.no_grad():
        settled(layer, x)
        vars(layer)["forward"] = lambda *_: "mine"
        assert layer(x) == "mine"
        del vars(layer)["forward"]
        settled(layer, x)
        monkeypatch.setattr(torch.nn.Module, "_call_impl", lambda *_: "patched")
        assert layer(x) == "patched"
