"""Layers that keep nothing for the backward pass."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastcells
from fastcells import cells

OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    {"batch_first": True, "recurrent_dropout": 0.3, "zoneout": 0.2},
]


def pair(kind, **options):
    """The layer with recompute, and without."""
    made = []
    for recompute in (True, False):
        torch.manual_seed(0)
        module = kind(5, 7, dtype=torch.float64, recompute=recompute, **options)
        assert module.recompute is recompute
        made.append(module)
    return made


def gradients(module, x, cotangents, **options):
    x = x.detach().requires_grad_()
    torch.manual_seed(1)
    y, states, *others = module(x, **options)
    states = states if isinstance(states, tuple) else (states,)
    loss = sum((t * c).sum() for t, c in zip((y, *states, *others), cotangents, strict=False))
    return torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)


def of_any(*arguments, **options):
    return fastcells.nn.Recurrent(cells.gru_reset_before, *arguments, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [fastcells.nn.LSTM, fastcells.nn.GRU, fastcells.nn.RNN, of_any])
def test_the_same_gradients(kind, options):
    cotangents = [1.5, 0.5, -0.7]
    for extra in ({}, {"lengths": torch.tensor([4, 0, 3])}):
        for x in torch.randn(3, *((3, 4, 5) if options.get("batch_first") else (4, 3, 5)), dtype=torch.float64):
            ours, plain = pair(kind, **options)
            for a, b in zip(*(gradients(m, x, cotangents, **extra) for m in (ours, plain)), strict=True):
                assert torch.equal(a, b)


def test_cell_states_and_packed_sequences():
    ours, plain = pair(fastcells.nn.LSTM)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for a, b in zip(*(gradients(m, x, [1, 2, 3, 4], return_cell_states=True) for m in (ours, plain)), strict=True):
        assert torch.equal(a, b)
    found = []
    for module in (ours, plain):
        y, _ = module(pack_padded_sequence(x, [4, 2, 1]))
        found.append(torch.autograd.grad(y.data.square().sum(), list(module.parameters())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [fastcells.nn.LSTM, fastcells.nn.GRU, fastcells.nn.RNN, of_any])
def test_nothing_is_kept_but_the_arguments(kind):
    ours, plain = pair(kind)
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    kept = []
    for module in (ours, plain):
        known = {t.data_ptr() for t in (x, *module.parameters())}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
            module(x)
        kept.append(sum(t.numel() for t in saved if t is not None and t.data_ptr() not in known))
    assert kept[0] == 0
    assert kept[1] > 0


def test_again_and_second_derivatives():
    ours, plain = pair(fastcells.nn.GRU)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    found = []
    for module in (ours, plain):
        weights = list(module.parameters())
        y, _ = module(x)
        first = torch.autograd.grad(y.sum(), weights, retain_graph=True)
        again = torch.autograd.grad(y.sum(), weights, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in again), weights)
        found.append([*first, *again, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_layers_that_were_torchs():
    torch.manual_seed(0)
    module = torch.nn.LSTM(5, 7)
    x = torch.randn(4, 3, 5)
    fastcells.convert(module)
    before = gradients(module, x, [1, 2, 3])
    module.recompute = True
    for a, b in zip(gradients(module, x, [1, 2, 3]), before, strict=True):
        assert torch.equal(a, b)
