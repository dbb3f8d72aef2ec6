"""Calls of packed sequences made again, of any lengths."""

import gc
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastcells
from fastcells.cpu import again
from fastcells.roof import using_threads

pytestmark = pytest.mark.skipif(again.interface() is None, reason="Python or torch without the interfaces for C")
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}


def batch(size, in_order, steps=9):
    lengths = torch.randint(1, steps + 1, (size,))
    lengths = lengths.sort(descending=True).values if in_order else lengths
    x = torch.randn(steps, size, 4, dtype=torch.float64)
    return pack_padded_sequence(x, lengths, enforce_sorted=in_order)


def states(module, size):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    grad = torch.is_grad_enabled()
    h, c = (torch.randn(rows, size, 6, dtype=torch.float64, requires_grad=grad) for _ in range(2))
    return (h, c) if isinstance(module, torch.nn.LSTM) else h


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


def is_made_again(module, *given):
    return any(method(module, *given) is not None for method in module._replays.straight)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("RNN", {}), ("GRU", {"num_layers": 2}), ("LSTM", {"bidirectional": True, "num_layers": 2}), ("LSTM", {})],
    ids=str,
)
def test_as_torch_does(kind, options, grad, in_order, given, threads):
    ours = getattr(fastcells.nn, kind)(4, 6, **options, dtype=torch.float64)
    theirs = getattr(torch.nn, kind)(4, 6, **options, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    repeated = 0
    with using_threads(threads), torch.set_grad_enabled(grad):
        for k in range(14):
            size = 5 if k < 9 else 3
            packed = batch(size, in_order)
            hx = (states(ours, size),) if given else ()
            repeated += is_made_again(ours, packed, *hx)
            results = []
            for module in (ours, theirs):
                for t in tensors(hx):
                    t.grad = None
                module.zero_grad()
                result = module(packed, *hx)
                kept = [result[0].data, *tensors(result[1])]
                if grad:
                    torch.manual_seed(k)
                    torch.autograd.backward(kept, [torch.randn_like(t) for t in kept])
                    kept += [p.grad for p in module.parameters()] + [t.grad for t in tensors(hx)]
                results.append(kept)
                assert all(a is b for a, b in zip(result[0][1:], packed[1:], strict=True))
            torch.testing.assert_close(*results, **TOLERANCE)
    assert repeated >= 7, "most calls are made again, of whatever lengths"


def outcome(module, *given):
    """An error, or what torch makes of it."""
    try:
        return [t.tolist() for t in module(*given)[0] if t is not None]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("batch_sizes", lambda t: t.flip(0)),
        ("batch_sizes", lambda t: t - 1),
        ("batch_sizes", lambda t: t[1:]),
        ("batch_sizes", lambda t: t.int()),
        ("data", lambda t: t[:-1]),
        ("data", lambda t: t[:, :-1]),
        ("unsorted_indices", lambda t: t + 1),
        ("sorted_indices", lambda t: t - 1),
        ("sorted_indices", lambda t: t[1:]),
    ],
)
def test_wrong_ones_are_what_they_were(part, change, grad):
    module = fastcells.nn.GRU(4, 6, dtype=torch.float64)
    packed = pack_padded_sequence(torch.randn(9, 5, 4, dtype=torch.float64), [2, 9, 4, 6, 3], enforce_sorted=False)
    wrong = PackedSequence(*packed)._replace(**{part: change(getattr(packed, part))})
    with torch.set_grad_enabled(grad):
        first = outcome(module, wrong)
        for _ in range(3):
            module(packed)
        assert is_made_again(module, packed)
        assert not is_made_again(module, wrong)
        assert outcome(module, wrong) == first


@pytest.mark.parametrize("grad", [True, False])
def test_states_of_another_batch_are_an_error(grad):
    """Also where the tensors are those of a call before, one by one."""
    module = fastcells.nn.GRU(4, 6, dtype=torch.float64)
    x, hx = torch.randn(9, 5, 4, dtype=torch.float64), torch.randn(1, 5, 6, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            module(pack_padded_sequence(x, [9, 7, 4, 2, 1]), hx)
            module(x, hx, lengths=[9, 7, 4, 2, 1])
        assert is_made_again(module, pack_padded_sequence(x, [9, 9, 4, 2, 1]), hx)
        assert module._replays.within
        with pytest.raises(RuntimeError, match="hx"):
            module(pack_padded_sequence(x[:, :3], [9, 7, 4]), hx)
        with pytest.raises(RuntimeError, match="hx"):
            module(x[:, :3].contiguous(), hx, lengths=[9, 7, 4])


def test_other_calls_between():
    """Padded input, lengths in order or not, weights that change: each result is torch's; a hook sees each call."""
    module, x = fastcells.nn.LSTM(4, 6, dtype=torch.float64), torch.randn(9, 5, 4, dtype=torch.float64)

    def check(given):
        (y, ours), (z, theirs) = module(given), torch.nn.LSTM.forward(module, given)
        torch.testing.assert_close((y[0], *ours), (z[0], *theirs), **TOLERANCE)

    with torch.no_grad():
        for _ in range(3):
            for given in (batch(5, True), x, batch(5, False), batch(2, True)):
                for _ in range(3):
                    check(given)
            assert is_made_again(module, given)
            module.weight_hh_l0.mul_(0.5)
            check(given)
    assert "packed input" in str(fastcells.explain(module, given))
    seen = []
    module.register_forward_hook(lambda *given: seen.append(given))
    module(given)
    assert len(seen) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_it_holds_and_keeps_nothing(grad):
    module, packed = fastcells.nn.GRU(4, 6, dtype=torch.float64), batch(5, False)
    held = [packed, *packed, *module.parameters(), module]
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            module(packed)
        assert is_made_again(module, packed)
        gc.collect()
        before, nothing = [*map(sys.getrefcount, held)], sys.getrefcount(None)
        for _ in range(300):
            module(packed)
        gc.collect()
        assert [*map(sys.getrefcount, held)] == before
        assert abs(sys.getrefcount(None) - nothing) < 100


def test_calls_that_are_kept_are_few(monkeypatch):
    """However many sizes are seen."""
    monkeypatch.setattr(fastcells.replay, "KEPT", 5)
    module = fastcells.nn.RNN(4, 6, dtype=torch.float64)
    with torch.no_grad():
        for size in range(2, 40):
            packed = pack_padded_sequence(torch.randn(3, size, 4, dtype=torch.float64), [3] * size)
            for _ in range(3):
                module(packed)
        assert is_made_again(module, packed)
    (method,) = module._replays.straight
    assert 0 < len(method.args[1].known) <= 5
