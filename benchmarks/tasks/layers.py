"""The recurrent layers that the tasks train, called alike: torch.nn's, fastcells', and the NumPy reference's.

All have torch.nn's constructors, parameters and results, and take ``lengths``, an int64 tensor [N] of the sequences'
lengths in a padded batch: past its end a sequence's output is zero, and its final state is that of its true end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastcells.nn
from fastcells import reference

LAYERS = ("torch", "fastcells", "reference")
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


class Packing(nn.RNNBase):
    """``lengths`` for torch.nn's layers, by way of a PackedSequence."""

    def forward(self, x: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return super().forward(x, state)
        packed = pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False)
        packed_output, state = super().forward(packed, state)
        steps = x.shape[1 if self.batch_first else 0]
        return pad_packed_sequence(packed_output, self.batch_first, total_length=steps)[0], state


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
def layer_class(layer: str, cell: str) -> type[nn.RNNBase]:
    """The class of a name in LAYERS and a name in CELLS."""
    name = CELLS[cell]
    if layer == "fastcells":
        return getattr(fastcells.nn, name)
    return type(name, ({"torch": Packing, "reference": Reference}[layer], getattr(nn, name)), {})
