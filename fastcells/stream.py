"""Streaming: one time step after the other, with the state kept inside and every buffer made once."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .cpu import layer as cpu
from .cpu.engine import DTYPES
from .cpu.geometry import SCRIPT
from .cpu.script import Memory, driver
from .dropin import NotTaken
from .functional import flat

if TYPE_CHECKING:
    from .nn import OverTime


class Stream:
    """A layer, or stack of layers, that takes one time step at a time. Made by `layer.stream()`.

    `stream(x)` with x, [N, I], a NumPy array or a Tensor of the layer's format, gives the step's output, [N, H], in
    kind; its memory is used again by the next step. `state` is the state after the last step, shaped as the layer's
    initial states; assigning it, or `reset()`, begins anew. No gradients flow, nothing is dropped. Weights are the
    layer's own, read at every step where they are: changes in place are seen, tensors put in their place are not; after
    `share_memory()` of the layer make another stream.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(self, layer: OverTime, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if layer.bidirectional:
            raise ValueError("bidirectional must be False for a stream: its second direction begins at the end")
        weight = layer.weight_ih_l0
        assert isinstance(weight, Tensor)
        if weight.dtype not in DTYPES:
            names = " or ".join(str(d) for d in DTYPES)
            raise ValueError(f"a layer that is streamed must have weights of {names}, got {weight.dtype}")
        x = torch.zeros(1, batch_size, layer.input_size, dtype=weight.dtype, device=weight.device)
        try:
            call = layer._read(x, None)
        except NotTaken as reason:
            raise ValueError(f"the layer cannot be streamed: the engine does not take {reason}") from None
        if not layer._as_held():
            raise ValueError(f"cell {call.cell.name} cannot be streamed: its weights are made anew at every call")
        self._sizes = batch_size, layer.input_size
        self._input, self._dtype = x[0], weight.dtype
        self._states: list[list[Tensor]] = []
        self._kept: list[Any] = []
        self._frames: list[int] = []
        for (parameters,) in call.parameters:
            y = self._add(call.cell, x, parameters)
            x = y
        self._output = x[0]
        self._input_at = self._input.data_ptr()
        self._output_at = self._output.data_ptr()
        self._output_end = self._output_at + self._output.nbytes
        self._input_numpy, self._output_numpy = self._input.numpy(), self._output.numpy()
        self._run = driver().call

    def _add(self, cell: Any, x: Tensor, parameters: Any) -> Tensor:
        """One more layer of the stack, which reads x; its output."""
        hidden = parameters[0].shape[0] // len(cell.gates)
        width = hidden if parameters[4] is None else parameters[4].shape[0]
        states = [x.new_zeros(1, x.shape[1], width if j == 0 else hidden) for j in range(len(cell.states))]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a step is too little to share
        try:
            forward, tensors = cpu.prepared(cell, x, tuple(states), [parameters], cpu.Sequences(x, None))
        finally:
            torch.set_num_threads(threads)
        # What is made from the state or the weights once, before the first step, would be stale at the second.
        if not forward.whole or len(tensors) != 1 + len(states) + len(flat([parameters])):
            raise ValueError(f"cell {cell.name} cannot be streamed: its states need more than a kernel")
        y = x.new_empty(forward.y)
        series = [x.new_empty(forward.series) for _ in range(forward.many)]
        # Final states are written over the initial ones, which by then have been read.
        # Detached, since a parameter lets go of its memory when its data are replaced.
        operands = [None if t is None else t.detach() for t in (*tensors, y, *states, *series)]
        memory = Memory(forward.script.size)
        addresses = [0 if t is None else t.data_ptr() for t in operands]
        kept = forward.script.memory()
        frame = array("q", forward.script.frame(addresses, memory.address, kept))
        if not self._frames:
            self._first, self._x_at = frame, len(SCRIPT)
        self._kept += [operands, memory, kept, frame, forward]
        self._frames.append(frame.buffer_info()[0])
        self._states.append(states)
        return y

    def __call__(self, x: Any) -> Any:
        """The output of one more step."""
        if type(x) is np.ndarray:
            if x.shape != self._sizes or x.dtype != self._input_numpy.dtype:
                self._refuse(x.shape, x.dtype)
            self._input_numpy[...] = x
            output: Any = self._output_numpy
            address = self._input_at
        elif isinstance(x, Tensor):
            if x.shape != self._sizes or x.dtype is not self._dtype or not x.is_cpu:
                self._refuse(tuple(x.shape), f"{x.dtype} on {x.device}")
            x = x.contiguous() if not x.is_neg() else x.resolve_neg()
            address, output = x.data_ptr(), self._output
            if self._output_at <= address < self._output_end:  # the last step's, which this one overwrites
                self._input.copy_(x)
                address = self._input_at
        else:
            raise TypeError(f"x must be a Tensor or a NumPy array, got {type(x).__name__}")
        self._first[self._x_at] = address
        for frame in self._frames:
            self._run(frame, 0, 1)
        return output

    def _refuse(self, shape: Any, kind: Any) -> None:
        raise ValueError(f"x must be of shape {self._sizes} and {self._dtype} on the CPU, got shape {shape}, {kind}")

    @property
    def state(self) -> Any:
        """Copies of the states, [num_layers, N, H] each: a Tensor, or a tuple where the cell has several."""
        states = tuple(torch.cat(layers) for layers in zip(*self._states, strict=True))
        return states if len(states) > 1 else states[0]

    @state.setter
    def state(self, value: Any) -> None:
        given = value if isinstance(value, tuple | list) else (value,)
        shapes = [tuple(t.shape) for t in (self.state if isinstance(self.state, tuple) else (self.state,))]
        if [tuple(getattr(t, "shape", ())) for t in given] != shapes:
            got = [tuple(getattr(t, "shape", ())) for t in given]
            raise ValueError(f"state must be of shapes {shapes}, got {got}")
        with torch.no_grad():
            for j, state in enumerate(given):
                for k, layer in enumerate(self._states):
                    layer[j].copy_(state[k : k + 1])

    def reset(self, which: Any = None) -> None:
        """Back to states of zero: of all sequences, or of those where `which` is true, bool [N].

        Raises ValueError for which of another kind or shape.
        """
        rows = slice(None) if which is None else torch.as_tensor(which)
        if isinstance(rows, Tensor) and (rows.dtype is not torch.bool or rows.shape != self._sizes[:1]):
            raise ValueError(f"which must be bool of shape {self._sizes[:1]}, got {rows.dtype} of {tuple(rows.shape)}")
        for layer in self._states:
            for state in layer:
                state[:, rows] = 0
