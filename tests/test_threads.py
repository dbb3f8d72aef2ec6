"""What one thread of a team does must not depend on what another one does before they next wait for each other."""

import ctypes

import pytest
import torch

import fastcells
from fastcells import cells
from fastcells.cpu import gradients
from fastcells.cpu import layer as cpu
from fastcells.cpu.frame import WORD
from fastcells.cpu.script import KEEPS, KEPT, MEMORY, At, Script, arena
from fastcells.roof import using_threads

STEPS, ROWS, INPUTS, HIDDEN = 4, 6, 75, 70  # no whole vectors; enough for threads to share the packing of weights


def one_thread_after_the_other(order):
    """A `Script.run` in which, from one barrier to the next, one thread does all that it has to before another begins:
    where it needed what that does, it does not find it."""

    def run(script, operands):
        memory = arena.take(script.size + script.kept)
        bases = {MEMORY: memory, KEPT: memory + script.size, KEEPS: 0} | dict(enumerate(operands, 1))
        frames, groups = [], []
        for launch in script.launches:
            words = [bases[w.operand] + w.offset if isinstance(w, At) else int(w) for w in launch.frame]
            frames.append((ctypes.c_int64 * len(words))(*words))
            if launch.threads > 1 and not launch.kernel.name.startswith(("pack", "turn")):
                assert not words[WORD["arrivals"]], "these threads wait for each other"
            if launch.wait or not groups:
                groups.append([])
            groups[-1].append((launch, frames[-1]))
        for group in groups:
            for thread in order:
                for launch, frame in group:
                    if launch.first <= thread < launch.first + launch.threads:
                        launch.kernel.call(frame, thread - launch.first, launch.threads)

    return run


def results(layer, x, **options):
    """y, final states and all gradients, by name."""
    x = x.detach().requires_grad_()
    y, finals = layer(x, **options)
    found = {"y": y} | {f"final {k}": t for k, t in enumerate([finals] if isinstance(finals, torch.Tensor) else finals)}
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.rand(t.shape, generator=generator, dtype=t.dtype)).sum() for t in found.values())
    names, leaves = zip(("x", x), *layer.named_parameters(), strict=True)
    return found | dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))


LAYERS = {
    "LSTM": lambda **o: fastcells.nn.LSTM(INPUTS, HIDDEN, **o),
    "GRU": lambda **o: fastcells.nn.GRU(INPUTS, HIDDEN, **o),
    "RNN": lambda **o: fastcells.nn.RNN(INPUTS, HIDDEN, **o),
    "projected": lambda **o: fastcells.nn.LSTM(INPUTS, HIDDEN, proj_size=20, **o),
    **{
        cell.name: lambda cell=cell, **o: fastcells.nn.Recurrent(cell, INPUTS, HIDDEN, **o)
        for cell in (cells.gru_reset_before, cells.layer_norm_lstm, cells.peephole_lstm, cells.mgu, cells.slstm)
    },
}


ORDERS = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)


def same_in_any_order(monkeypatch, layer, x, order):
    """One thread gives what two give that do their parts in that order."""
    monkeypatch.setattr("fastcells.plan.THREAD_FLOPS", 0)
    for given in ({}, {"lengths": torch.tensor([4, 3, 1, 4, 2, 4])}):
        found = []
        for count in (1, 2):
            with using_threads(count), monkeypatch.context() as patch:
                cpu.forget()
                if count == 2:
                    patch.setattr(Script, "run", one_thread_after_the_other(order))
                found.append(results(layer, x, **given))
        for name, alone in found[0].items():
            assert torch.equal(alone, found[1][name]), name
    cpu.forget()


@ORDERS
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str
)
@pytest.mark.parametrize("kind", LAYERS)
def test_threads_in_any_order(kind, options, order, monkeypatch):
    layer = LAYERS[kind](dtype=torch.float64, **options)
    x = torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64)
    same_in_any_order(monkeypatch, layer, x.transpose(0, 1).contiguous() if "batch_first" in options else x, order)


@ORDERS
@pytest.mark.parametrize(
    ("width", "wide"), [(0, 0), (1 << 30, 0), (1 << 30, 1 << 30)], ids=["packed", "copied", "there"]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_threads_in_any_order_where_gradients_are_large(kind, width, wide, order, monkeypatch):
    """What they meet is read where it is, copied, or packed: by all threads, before any reads it and after all
    have read what was there. Of whole vectors, since packing the last one has threads wait."""
    for name, value in {"NEAR_BYTES": 0, "TURNED_WIDTH": width, "WIDE_BYTES": wide}.items():
        monkeypatch.setattr(gradients, name, value)
    for name in ("STRETCH", "COPIED_STRETCH", "TURNED_STRETCH"):
        monkeypatch.setattr(gradients, name, 7)
    layer = getattr(fastcells.nn, kind)(72, 72, dtype=torch.float64)
    x = torch.randn(STEPS, ROWS, INPUTS, dtype=torch.float64)[..., :72]
    same_in_any_order(monkeypatch, layer, x, order)
