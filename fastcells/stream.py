"""Streaming: one time step after the other, with the state kept inside and every buffer made once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .cpu import again
from .cpu import layer as cpu
from .cpu.engine import DTYPES
from .cpu.script import Memory, Script, arena, driver
from .dropin import NotTaken
from .functional import flat
from .replay import BRIEF

if TYPE_CHECKING:
    from .nn import OverTime


class Stream:
    """A layer, or stack of layers, that takes one time step at a time. Made by `layer.stream()`.

    `stream(x)` with x, [N, I], a NumPy array or a Tensor of the layer's format, gives the step's output, [N, H], in
    kind; its memory is used again by the next step. `state` is the state after the last step, shaped as the layer's
    initial states; assigning it, or `reset()`, begins anew. No gradients flow, nothing is dropped. Weights are the
    layer's own, read at every step where they are then: changes in place are seen, also after `share_memory()`; tensors
    put in their place are not. There is one step at a time, and no copies.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(self, layer: OverTime, batch_size: int = 1) -> None:
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
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
        held = set(map(id, layer._parameters.values()))
        weights = [t for directions in call.parameters for t in flat(directions) if t is not None]
        if not layer._as_held() or any(id(t) not in held or cpu.usable(t) is not t for t in weights):
            raise ValueError(
                f"{type(layer).__name__} of cell {call.cell.name} cannot be streamed: not all of its weights are used "
                "as they are held, and what is made of the others at every call would be stale at the second step"
            )
        outside = call.cell.outside
        self._watched = call.cell if outside and (outside.reads or outside.loose) else None
        self._sizes = batch_size, layer.input_size
        self._input, self._dtype = x[0], weight.dtype
        self._states: list[list[Tensor]] = []
        self._tensors: list[Tensor] = []
        scripts: list[tuple[Script, list[again.Operand | None], Memory | None]] = []
        for (parameters,) in call.parameters:
            x = self._add(scripts, call.cell, x, layer._used(parameters))
        self._output = x[0]
        self._output_at = self._output.data_ptr()
        self._output_end = self._output_at + self._output.nbytes
        self._input_numpy, self._output_numpy = self._input.numpy(), self._output.numpy()
        brief = batch_size * sum([t.numel() for t in weights]) < BRIEF
        made = again.Made(scripts, [], (None,), weight.dtype, brief, alone=True)
        self._step = again.function(len(self._tensors), None, made) or partial(_step, scripts)
        del self._tensors[0]  # which each step brings

    def _add(self, scripts: list, cell: Any, x: Tensor, parameters: Any) -> Tensor:
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
        # What is made from the state once, before the first step, would be stale at the second.
        if not forward.whole or len(tensors) != 1 + len(states) + len(flat([parameters])):
            raise ValueError(f"cell {cell.name} cannot be streamed: its states need more than a kernel")
        y = x.new_empty(forward.y)
        series = [x.new_empty(forward.series) for _ in range(forward.many)]
        number = count(len(self._tensors))
        # Final states are written over the initial ones, which by then have been read.
        taken = [*tensors, y, *states, *series]
        operands = [None if t is None else again.Operand(next(number)) for t in taken]
        scripts.append((forward.script, operands, forward.script.memory()))
        # Detached, since a parameter lets go of its memory when its data are replaced.
        self._tensors += [t.detach() for t in taken if t is not None]
        self._states.append(states)
        return y

    def __call__(self, x: Any) -> Any:
        """The output of one more step."""
        if self._watched is not None:
            self._watched.unchanged()
        if type(x) is np.ndarray:
            if x.shape != self._sizes or x.dtype != self._input_numpy.dtype:
                self._refuse(x.shape, x.dtype)
            self._input_numpy[...] = x
            given = self._input
            output: Any = self._output_numpy
        elif isinstance(x, Tensor):
            if x.shape != self._sizes or x.dtype is not self._dtype or not x.is_cpu:
                self._refuse(tuple(x.shape), f"{x.dtype} on {x.device}")
            given, output = x.resolve_neg().contiguous(), self._output
            address = given.data_ptr()
            # The last step's output, which this one overwrites; or zeros that have no memory.
            if self._output_at <= address < self._output_end or not address:
                given = self._input.copy_(x.detach())
        else:
            raise TypeError(f"x must be a Tensor or a NumPy array, got {type(x).__name__}")
        if not self._step(given, *self._tensors):
            raise RuntimeError("a stream takes one step at a time, and another thread's is under way")
        return output

    def __reduce__(self) -> Any:
        raise TypeError("a stream cannot be copied or pickled: make another one of the layer, and assign its state")

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
                    layer[j].copy_(torch.as_tensor(state)[k : k + 1])

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


def _step(scripts: Sequence[tuple[Script, list[again.Operand | None], Memory | None]], *tensors: Tensor) -> bool:
    """What a compiled method does in one, where there is none."""
    addresses = [t.data_ptr() for t in tensors]
    for script, operands, kept in scripts:
        given = [0 if operand is None else addresses[operand.tensor] for operand in operands]
        driver().call(script.frame(given, arena.take(script.size), kept), 0, 1)
    return True
