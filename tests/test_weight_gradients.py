"""Gradients of weights, which are products over all time steps: as large ones are taken."""

import pytest
import torch
from problems import agree, problem, regularised

from fastcells import cells
from fastcells.cpu import gradients, layer


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("way", ["packed", "copied", "there"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("c", "options"),
    [
        (cells.lstm, {"directions": 2}),
        (cells.lstm, {"given": False, "project": 5}),
        (cells.gru, {"lengths": [9, 7, 7, 2, 1], "directions": 2}),
        (regularised, {"directions": 2}),
    ],
    ids=["lstm", "projected", "packed", "own"],
)
def test_gradients_of_weights_a_stretch_at_a_time(monkeypatch, c, options, threads, way, turned):
    """As for large ones: some rows at a time, in stretches that begin and end within time steps. packed: and columns of
    the gradients are turned, what meets them is packed. copied: and what meets them is copied first, since its rows are
    no whole lines of a cache. turned: and less than a vector of a target's columns comes about turned."""
    monkeypatch.setattr(gradients, "TURNED", 0 if turned else 1 << 30)
    monkeypatch.setattr(gradients, "NEAR_BYTES", 0)
    monkeypatch.setattr(gradients, "PIECE_BYTES", 1)
    monkeypatch.setattr(gradients, "TURNED_WIDTH", 0 if way == "packed" else 1 << 30)
    monkeypatch.setattr(gradients, "WIDE_BYTES", 0 if way == "copied" else 1 << 30)
    for name in ("STRETCH", "COPIED_STRETCH", "TURNED_STRETCH"):
        monkeypatch.setattr(gradients, name, 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    layer.forget()
    try:
        agree(*problem(c, 9, 5, 4, 13, **options))
    finally:
        torch.set_num_threads(before)
        layer.forget()


@pytest.mark.parametrize("width", [0, 1 << 30], ids=["packed", "there"])
def test_gradients_of_weights_where_input_comes_in_batches(monkeypatch, width):
    """Rows of all time steps are then at two distances: copied, some whole steps at a time."""
    monkeypatch.setattr(gradients, "TURNED", 0)
    monkeypatch.setattr(gradients, "NEAR_BYTES", 0)
    for name, value in {"STRETCH": 7, "TURNED_STRETCH": 7, "TURNED_WIDTH": width}.items():
        monkeypatch.setattr(gradients, name, value)
    layer.forget()
    (c, x, *rest), leaves, names = problem(cells.lstm, 9, 3, 4, 13)
    batches = x.detach().transpose(0, 1).contiguous().requires_grad_()
    agree((c, batches.transpose(0, 1), *rest), [batches, *leaves[1:]], names)
    layer.forget()


def test_gradients_of_weights_where_gates_have_blocks_of_their_own(monkeypatch):
    """All blocks have the last columns of what they meet, however many rows a block has."""
    monkeypatch.setattr(gradients, "TURNED", 27 * 13 + 1)  # more than one gate has, and less than two
    layer.forget()
    agree(*problem(cells.gru, 9, 3, 4, 13))
    layer.forget()
