"""Results have the same bits, whatever threads there are, and whichever sequences and calls are beside."""

import threading

import pytest
import torch
from problems import BUILT_IN, everything, normed, peephole, problem, same_bits

import fastcells
from fastcells import cells, functional, plan
from fastcells.cpu import gradients, layer, team
from fastcells.cpu.host import host


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("c", [cells.lstm, cells.gru, cells.gru_reset_before, normed], ids=lambda c: c.name)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("split", ["", "rows", "units"])
def test_bitwise_the_same_run_to_run_and_on_any_number_of_threads(c, rows, split, packed, monkeypatch):
    """Gradients of 16 rows' weights are taken a stretch at a time. split: what threads share in any case."""
    options = {"lengths": [20 - k for k in range(rows)]} if packed else {}
    arguments, leaves, _ = problem(c, 20, rows, 40, 120, dtype=torch.float32, directions=1 if split else 2, **options)
    monkeypatch.setattr(team, "processors", lambda: 5)  # whatever there are
    if split:
        monkeypatch.setattr(plan, "share", lambda rows, flops, most, **_: plan.Share(most, split))
    assert same_bits(arguments, leaves, threads=(1, 2, 5, 3, 2, 1))


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float64, 75), (torch.float32, 64)], ids=str)
def test_gradients_of_initial_states_of_packed_sequences(dtype, hidden, monkeypatch):
    """Either direction's, whose sequences begin at their ends in the other one."""
    arguments, leaves, _ = problem(
        cells.gru, 9, 7, 40, hidden, dtype=dtype, directions=2, lengths=[9, 9, 8, 6, 5, 3, 1]
    )
    monkeypatch.setattr(team, "processors", lambda: 5)  # whatever there are
    assert same_bits(arguments, leaves)


@pytest.mark.parametrize("more", [1, -1])
@pytest.mark.parametrize("c", [cells.rnn_tanh, cells.gru, cells.mgu], ids=lambda c: c.name)
def test_a_single_column_of_gradients_that_is_left_for_a_thread(c, more, monkeypatch):
    """Where a gate's units are one more or less than whole vectors, and threads begin with whole ones."""
    lanes = host().lanes(4)
    for hidden in (lanes + more, 2 * lanes + more, 3 * lanes + more):
        arguments, leaves, _ = problem(c, 40, 16, 64, hidden, dtype=torch.float32)
        monkeypatch.setattr(team, "processors", lambda: 5)  # whatever there are
        monkeypatch.setattr(gradients, "share", lambda columns, flops, most, **_: plan.Share(most, "rows"))
        assert same_bits(arguments, leaves, threads=(1, 2, 3, 5))


@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("c", [cells.lstm, cells.gru, cells.slstm, peephole, normed], ids=lambda c: c.name)
def test_a_sequence_has_the_same_bits_whichever_others_are_beside_it(c, reset):
    """Groups of rows that are computed together fall elsewhere without the first two sequences."""
    sequences = fastcells.nn.Recurrent(c, 6, 96)
    x, at = torch.randn(12, 33, 6), torch.rand(12, 33) < 0.2
    found = []
    for first in (0, 2):
        part = x[:, first:].clone().requires_grad_()
        options = {"reset": at[:, first:], "reset_to": 0} if reset else {}
        y, finals = sequences(part, **options)
        (dx,) = torch.autograd.grad(y.square().sum(), part)
        finals = finals if isinstance(finals, tuple) else (finals,)
        found.append([t[:, 2 - first :] for t in (y, *finals, dx)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not host().halves, reason="done where the widest vectors take as long as two of half the width")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("c", [*BUILT_IN, peephole, normed], ids=lambda c: c.name)
def test_input_projections_beside_the_recurrence_are_those_made_before_it(c, dtype, monkeypatch):
    """Of one sequence: whole and partial vectors of units, on one thread and on more, from either end."""
    tolerance = 200 * torch.finfo(dtype).eps
    sizes = [(37, 20, 33, {}), (40, 150, 96, {"directions": 2}), (24, 9, 40, {"given": False}), (33, 70, 64, {})]
    threads, found = torch.get_num_threads(), {}
    monkeypatch.setattr(team, "processors", lambda: 3)
    monkeypatch.setattr(plan, "NEAR_BYTES", 0)
    monkeypatch.setattr(plan, "WAIT_FLOPS", 0)
    monkeypatch.setattr(plan, "THREAD_FLOPS", 0)
    try:
        for beside, number in ((1 << 30, 1), (16, 1), (16, 3)):
            monkeypatch.setattr(plan, "BESIDE_STEPS", beside)
            torch.set_num_threads(number)
            plan.plan.cache_clear()
            layer.forget()
            found[beside, number] = []
            for steps, inputs, hidden, options in sizes:
                arguments, leaves, _ = problem(c, steps, 1, inputs, hidden, dtype=dtype, **options)
                outputs, grads = everything(functional.layer, arguments, leaves)
                found[beside, number] += [*outputs, *grads]
    finally:
        torch.set_num_threads(threads)
        plan.plan.cache_clear()
        layer.forget()
    for before, one, several in zip(*found.values(), strict=True):
        assert torch.equal(one, several)
        torch.testing.assert_close(
            one, before, rtol=tolerance, atol=tolerance
        )  # what is left of the steps may be summed in another order


def test_python_threads_at_once():
    cases = [problem(c, 12, rows, 9, 33, seed=k) for k, (c, rows) in enumerate([(cells.lstm, 5), (cells.gru, 1)] * 3)]
    expected = [everything(functional.layer, a, leaves) for a, leaves, _ in cases]
    found: dict = {}

    def work(k):
        for _ in range(5):
            found[k] = everything(functional.layer, *cases[k][:2])

    workers = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for k, (outputs, grads) in enumerate(expected):
        for a, b in zip([*outputs, *grads], [*found[k][0], *found[k][1]], strict=True):
            assert torch.equal(a, b)
