"""The recurrent layers that the tasks train, called alike: torch.nn's, fastcells', and the NumPy reference's.

All have torch.nn's constructors, parameters and results, and take ``lengths``, an int64 tensor [N] of the sequences'
lengths in a padded batch: past its end a sequence's output is zero, and its final state is that of its true end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastcells.nn
from fastcells import reference, variants

LAYERS = ("torch", "fastcells", "reference")
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
RELU_LSTM = "relu-lstm"  # of torch, by a loop, and of fastcells
WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Packing(nn.RNNBase):
    """``lengths`` for torch.nn's layers, by way of a PackedSequence."""

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, state)
        packed = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        packed_output, state = super().forward(packed, state)
        steps = x.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(packed_output, self.batch_first, total_length=steps)[0], state


class ReluLSTM(nn.LSTM):
    """The LSTM with relu in place of tanh, Keras's LSTM(activation="relu"): torch.nn has none, so a loop over time.

    One direction, batch_first, from a state of zeros.
    """

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:  # type: ignore[override]
        if state is not None or lengths is not None or not self.batch_first or self.bidirectional:
            raise NotImplementedError("state, lengths, time first, bidirectional: this loop has none of them")
        finals = []
        for k in range(self.num_layers):
            w_ih, w_hh, b_ih, b_hh = (getattr(self, f"{name}_l{k}") for name in WEIGHTS)
            h = c = x.new_zeros(len(x), self.hidden_size)
            outputs = []
            for x_t in x.unbind(1):
                i, f, g, o = (x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.relu()
                h = o.sigmoid() * c.relu()
                outputs.append(h)
            x = torch.stack(outputs, dim=1)
            finals.append((h, c))
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))


class Reference(nn.RNNBase):
    """The layer in NumPy and float64, as one node of autograd's graph."""

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        if self.dropout:
            raise ValueError(f"dropout: got {self.dropout}, expected 0: the reference has none between its layers")
        states = () if state is None else state if isinstance(state, tuple) else (state,)
        weights = [getattr(self, name) for name in self._flat_weights_names]
        y, *final = _Bptt.apply(self, lengths, len(states), x, *states, *weights)
        return y, tuple(final) if len(final) > 1 else final[0]

    def numpy_layer(self) -> reference.Layer:
        """The same layer and weights in NumPy."""
        options: dict[str, Any] = {"nonlinearity": self.nonlinearity} if isinstance(self, nn.RNN) else {}
        layer = getattr(reference, type(self).__name__)(
            self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
            bidirectional=self.bidirectional, proj_size=self.proj_size, **options,
        )  # fmt: skip
        layer.load_state_dict({name: getattr(self, name).detach().numpy() for name in self._flat_weights_names})
        return layer


class _Bptt(torch.autograd.Function):
    """Forward and backward of `Reference`."""

    @staticmethod
    def forward(ctx, module, lengths, given, x, *rest):
        layer = module.numpy_layer()
        states = [state.detach().numpy() for state in rest[:given]]
        state = None if not states else tuple(states) if len(states) > 1 else states[0]
        y, final = layer.forward(x.detach().numpy(), state, None if lengths is None else lengths.numpy())
        ctx.layer, ctx.names, ctx.dtype = layer, module._flat_weights_names, x.dtype
        ctx.states = ("h_0", "c_0")[:given]
        return tuple(torch.from_numpy(a).to(x.dtype) for a in (y, *(final if isinstance(final, tuple) else (final,))))

    @staticmethod
    def backward(ctx, *cotangents):
        gradients = ctx.layer.backward(*(d.numpy() for d in cotangents))
        names = ("x", *ctx.states, *ctx.names)
        return None, None, None, *(torch.from_numpy(gradients[name].copy()).to(ctx.dtype) for name in names)


@cache
def layer_class(layer: str, cell: str) -> Callable[..., Any]:
    """The class of a name in LAYERS and a name in CELLS, or RELU_LSTM."""
    if cell == RELU_LSTM:
        if layer == "torch":
            return ReluLSTM
        return partial(fastcells.nn.Recurrent, variants.lstm(activation="relu"))
    name = CELLS[cell]
    if layer == "fastcells":
        return getattr(fastcells.nn, name)
    return type(name, ({"torch": Packing, "reference": Reference}[layer], getattr(nn, name)), {})
