"""Each cell as its users write it in torch, and as fastcells has it.

In torch: (W x + b [N, G * H], states, U [G * H, H], b', the cell's own vectors [H]) -> states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import fastcells
from fastcells import cells
from fastcells.expression import relu, sigmoid

States = tuple[Tensor, ...]


class Written(NamedTuple):
    """gathered: the cell's own vectors as its user in torch has them, once a call."""

    torch: Callable[..., States]
    fastcells: fastcells.Cell
    gathered: Callable[[States], States] = tuple


def lstm(x: Tensor, states: States, w: Tensor, b: Tensor) -> States:
    h, c = states
    i, f, g, o = (x + linear(h, w, b)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x: Tensor, states: States, w: Tensor, b: Tensor) -> States:
    (h,) = states
    (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, 1), linear(h, w, b).chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
    return (n + torch.sigmoid(x_z + u_z) * (h - n),)


def rnn(x: Tensor, states: States, w: Tensor, b: Tensor) -> States:
    return (torch.tanh(x + linear(states[0], w, b)),)


def lstm_peephole(x: Tensor, states: States, w: Tensor, b: Tensor, p_i: Tensor, p_f: Tensor, p_o: Tensor) -> States:
    h, c = states
    i, f, g, o = (x + linear(h, w, b)).chunk(4, 1)
    new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * new) * torch.tanh(new), new


def lstm_layer_norm(
    x: Tensor,
    states: States,
    w: Tensor,
    b: Tensor,
    gain: Tensor,
    recurrent_gain: Tensor,
    offset: Tensor,
    cell_gain: Tensor,
    cell_offset: Tensor,
) -> States:
    h, c = states
    u = linear(h, w, b)
    i, f, g, o = (layer_norm(x, x.shape[1:], gain, offset) + layer_norm(u, u.shape[1:], recurrent_gain)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(layer_norm(c, c.shape[1:], cell_gain, cell_offset)), c


def of_all_gates(vectors: States) -> States:
    """The three kinds [4 * H] from those [H] of each gate; the cell's two as they are."""
    return *(torch.cat(vectors[k:12:3]) for k in range(3)), *vectors[12:]


def lstm_relu(x: Tensor, states: States, w: Tensor, b: Tensor) -> States:
    """Keras's LSTM with activation="relu"."""
    h, c = states
    i, f, g, o = (x + linear(h, w, b)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.relu(g)
    return torch.sigmoid(o) * torch.relu(c), c


@fastcells.cell(gates="i f g o", states="h c")
def own_lstm_relu(x, u, s):
    c = sigmoid(x.f + u.f) * s.c + sigmoid(x.i + u.i) * relu(x.g + u.g)
    return sigmoid(x.o + u.o) * relu(c), c


def gru_reset_before(x: Tensor, states: States, w: Tensor, b: Tensor) -> States:
    """Of the textbooks; Keras's GRU with reset_after=False."""
    (h,) = states
    gates = 2 * h.shape[1]
    r, z = torch.sigmoid(x[:, :gates] + linear(h, w[:gates], b[:gates])).chunk(2, 1)
    n = torch.tanh(x[:, gates:] + linear(r * h, w[gates:], b[gates:]))
    return (n + z * (h - n),)


CELLS = {
    "lstm": Written(lstm, cells.lstm),
    "gru": Written(gru, cells.gru),
    "rnn": Written(rnn, cells.rnn_tanh),
    "lstm-peephole": Written(lstm_peephole, cells.peephole_lstm),
    "lstm-layer-norm": Written(lstm_layer_norm, cells.layer_norm_lstm, of_all_gates),
    "lstm-relu": Written(lstm_relu, own_lstm_relu),
    "gru-reset-before": Written(gru_reset_before, cells.gru_reset_before),
}
