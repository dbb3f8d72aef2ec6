"""What all layers and cells that stand in for torch.nn's have in common: reading a call, and running it or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules import rnn as original  # the classes themselves: torch.nn.LSTM may be one of ours by now
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from . import cells, replay
from .cell import Cell
from .cpu.direction import Sequences
from .cpu.engine import DTYPES
from .cpu.lengths import Tokens
from .functional import Parameters, observer, refusal, unchecked_layer
from .ragged import reordered

Shape = tuple[int, ...]


class NotTaken(Exception):
    """Why the engine does not take a call."""


class Mistake(NotTaken):
    """The call looks wrong. Where torch has an implementation, that decides whether it is, and with which exception;
    else it is an `error`."""

    def __init__(self, text: str, error: type[Exception] = RuntimeError) -> None:
        super().__init__(text)
        self.error = error


class NotExported(RuntimeError):
    """What torch.export cannot take in."""


class Batch(NamedTuple):
    """An input as the engine takes it."""

    x: Tensor  # [T, N, I], or [total, I] with batch_sizes
    size: int  # N
    leading: Shape  # of the caller's states, before their features: (num_layers * D, N) or, without batch, (N,) etc.
    batch_sizes: Tensor | None = None
    tokens: Tokens | None = None  # where packed rows lie in x, which then has them as the caller holds them


class Call(NamedTuple):
    """A whole call as the engine takes it.

    dtype: of the results, where they are to be computed in float32 and then rounded.
    """

    cell: Cell
    batch: Batch
    states: tuple[Tensor, ...] | None  # each [num_layers * D, N, features]
    parameters: list[tuple[Parameters, ...]]  # per layer and direction
    dtype: torch.dtype | None = None


@lru_cache(maxsize=1024)
def weight_shapes(
    gates: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    bias: bool,
    num_layers: int,
    directions: int,
    recurrent: bool = True,
    own: tuple[tuple[str, Shape], ...] = (),
) -> tuple[tuple[tuple[tuple[str, Shape] | None, ...], ...], ...]:
    """Name and shape of each parameter, per layer and direction; None where a layer has none of that kind.

    `num_layers=0` stands for a cell module: one set of parameters, whose names carry no layer. recurrent: whether the
    cell has recurrent products; own: names and shapes of its own parameters.
    """
    rows, out = gates * hidden_size, proj_size or hidden_size

    def direction(k: int, suffix: str) -> tuple[tuple[str, Shape] | None, ...]:
        return (
            (f"weight_ih{suffix}", (rows, out * directions if k else input_size)),
            (f"weight_hh{suffix}", (rows, out)) if recurrent else None,
            (f"bias_ih{suffix}", (rows,)) if bias else None,
            (f"bias_hh{suffix}", (rows,)) if bias and recurrent else None,
            (f"weight_hr{suffix}", (proj_size, hidden_size)) if proj_size else None,
            *((name + suffix, shape) for name, shape in own),
        )

    if not num_layers:
        return ((direction(0, ""),),)
    return tuple(tuple(direction(k, f"_l{k}" + "_reverse" * d) for d in range(directions)) for k in range(num_layers))


class DropIn(torch.nn.Module):
    """The one mechanism of all layers and cells: read the call, then run it on the engine or leave it to torch."""

    input_size: int
    hidden_size: int
    dropout: float  # of layers: cells have no layer to drop between
    _replays = replay.NONE

    def __call__(self, input: Any = ..., hx: Any = ..., /, *args: Any, **kwargs: Any) -> Any:
        """As torch's modules, hooks and all; a call like one before is made without the way through these."""
        if not (args or kwargs or is_dynamo_compiling()):
            for again in self._replays.straight:
                result = again(self, input) if hx is ... else again(self, input, hx)
                if result is not None:
                    return result
        given = () if input is ... else (input,) if hx is ... else (input, hx)  # hooks see what the caller wrote
        return super().__call__(*given, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" or self.__dict__.get("dropout"):  # without, that changes no call that is made again
            replay.forget(self)
        super().__setattr__(name, value)

    @replay.begins
    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the torch.nn class of the same name: same arguments, results and exceptions."""
        if not is_compiling():
            for again in self._replays.forward:
                if (result := again(self, input, hx)) is not None:
                    return result
        try:
            call = self._read(input, hx)
        except NotTaken as caught:
            reason = caught
        else:
            if observer() is None and call.dtype is None and self._steady():
                replay.remember(self, input, hx, call)
            return self._run(input, call)
        if isinstance(input, torch.fx.Proxy):
            return self._leaf(input, hx)
        try:
            return self._forward_in_torch(input, hx)
        except Mistake as wrong:
            raise wrong.error(f"{type(self).__name__}: {wrong}") from None
        except Exception as error:
            mistake = reason if isinstance(reason, Mistake) else self._mistake(input, hx)
            if mistake is not None:
                raise type(error)(f"{type(self).__name__}: {mistake}") from error
            raise

    def _in_torch_form(self) -> bool:
        """Whether what the engine does not take runs as a loop over the cell's torch form, unknown to torch.nn."""
        return False

    def _forward_in_torch(self, input: Any, hx: Any) -> Any:
        """The call as torch runs it."""
        return super().forward(input, hx)

    def _leaf(self, input: torch.fx.Proxy, hx: Any, **options: Any) -> Any:
        """The call in a graph of torch.fx, which keeps modules whole that are torch's own."""
        tracer: Any = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), options)

    def __prepare_scriptable__(self) -> Any:
        """Where torch.jit.script begins."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__module__}.{type(self).__name__}: use torch.compile or "
            "torch.export, or make the model's layers torch.nn's own by fastcells.revert(model)"
        )

    def _mistake(self, input: Any, hx: Any) -> Mistake | None:
        """What is wrong with a call that torch refused, if that can be told."""
        try:
            self._read(input, hx)
        except NotTaken as reason:
            return reason if isinstance(reason, Mistake) else None
        return None

    def _route(self, input: Any, hx: Any = None) -> str | None:
        """Why `forward(input, hx)` is left to torch's own implementation, or None where the engine runs it."""
        try:
            self._read(input, hx)
        except NotTaken as reason:
            return str(reason)
        return None

    def _read(self, input: Any, hx: Any) -> Call:
        """The call as the engine takes it. Raises NotTaken. Every call comes here, so each check is a cheap one."""
        call, layers, tensors = self._parts(input, hx)
        cell, batch, states, *_ = call
        if not batch.size:
            raise NotTaken("batch size 0")
        reason = refusal(*tensors)
        dtype = batch.x.dtype
        if reason is None:
            if torch.is_autocast_enabled("cpu") and all([tensor.dtype in AUTOCAST for tensor in tensors]):
                by_onednn = isinstance(self, original.LSTM) and batch.batch_sizes is None
                return call._replace(dtype=_autocast_dtype(cell, states or (batch.x,), by_onednn))
            if all([tensor.dtype is dtype for tensor in tensors]):
                return call if dtype in DTYPES else call._replace(dtype=dtype)
        names = ["input", *(initial_names(cell) if states else ())]
        names += [item[0] for directions in layers for items in directions for item in items if item]
        for kind in ("device", "dtype"):
            expected, *others = (getattr(tensor, kind) for tensor in tensors)
            for name, given in zip(names[1:], others, strict=True):
                if given != expected:
                    raise Mistake(f"{name} must have the {kind} of input, {expected}, got {given}")
        raise NotTaken(reason)

    def _parts(self, input: Any, hx: Any) -> tuple[Call, tuple, list[Tensor]]:
        """The call, names and shapes of its parameters, and all its tensors. Raises Mistake for shapes that are off."""
        cell = self._cell()
        batch = self._batch(input)
        if batch.x.shape[-1] != self.input_size:
            raise Mistake(f"input must have input_size = {self.input_size} features, got {batch.x.shape[-1]}")
        layers = self._weight_shapes(len(cell.gates))
        parameters, weights = self._weights(layers)
        states = None if hx is None else self._states(cell, input, batch, hx, out=self._out())
        return Call(cell, batch, states, parameters), layers, [batch.x, *(states or ()), *weights]

    def _weights(self, layers: tuple) -> tuple[list[tuple[Parameters, ...]], list[Tensor]]:
        """The parameters per layer and direction, and in one list. Read at each call, since they may be replaced."""
        registered = self._parameters  # Module.__getattr__ takes ten times as long
        parameters: list[tuple[Any, ...]] = []
        weights: list[Tensor] = []
        for directions in layers:
            sets = []
            for items in directions:
                row: list[Any] = []
                for item in items:
                    if item is None:
                        row.append(None)
                        continue
                    name, shape = item
                    weight: Any = registered.get(name)
                    if weight is None:  # parametrized, or set as a plain tensor
                        weight = getattr(self, name, None)
                        if not isinstance(weight, Tensor):
                            got = type(weight).__name__
                            raise Mistake(f"{name} must be a Tensor of shape {shape}, got {got}", TypeError)
                    if weight.shape != shape:
                        raise Mistake(f"{name} must have shape {shape}, got {tuple(weight.shape)}")
                    row.append(weight)
                    weights.append(weight)
                sets.append(tuple(row) if len(row) == 5 else (*row[:5], tuple(row[5:])))
            parameters.append(tuple(sets))
        return parameters, weights

    def _states(
        self, cell: Cell, input: Any, batch: Batch, hx: Any, out: int, argument: str = "hx"
    ) -> tuple[Tensor, ...]:
        """The given states as the engine takes them. `out`: features of the hidden state."""
        count = len(cell.states)
        given = hx if count > 1 else (hx,)
        if not isinstance(given, (tuple, list)) or len(given) != count:
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            names = ", ".join(initial_names(cell))
            raise Mistake(f"{argument} must be a tuple of {count} Tensors ({names}), got {got}", TypeError)
        states = []
        for i, state in enumerate(given):
            if not isinstance(state, Tensor):
                raise Mistake(
                    f"{argument} ({initial_names(cell)[i]}) must be a Tensor, got {type(state).__name__}", TypeError
                )
            shape = (*batch.leading, self.hidden_size if i else out)
            if state.shape != shape:
                name = f"{argument} ({initial_names(cell)[i]})"
                raise Mistake(f"{name} must have shape {shape} to go with input, got {tuple(state.shape)}")
            if len(shape) < 3:
                taken_strided(state)
                state = state.view(-1 if batch.size else 1, batch.size, shape[-1])
            states.append(state)
        return reordered(tuple(states), input.sorted_indices if batch.batch_sizes is not None else None)

    def _run(self, input: Any, call: Call, layer: Callable = unchecked_layer, return_cell_states: bool = False) -> Any:
        """The stack of layers, each with all its directions in one call of `layer`."""
        if call.dtype is not None:
            return self._run_rounded(input, call, layer, return_cell_states)
        cell, batch, states, parameters, _ = call
        count = len(parameters)
        given: list = [states] * count
        if states is not None and count > 1:
            given = list(zip(*(state.split(len(parameters[0])) for state in states), strict=True))
        y, finals = batch.x, []
        for k, directions in enumerate(parameters):
            if k and self.dropout and self.training:
                y = torch.dropout(y, self.dropout, True)  # as torch.nn does: same draws from the same generator
            last: dict[str, Any] = {"return_cell_states": True} if return_cell_states and k == count - 1 else {}
            if batch.tokens is not None:
                last["tokens"] = batch.tokens._replace(takes=k == 0, gives=k == count - 1)
            y, final, *others = layer(cell, y, given[k], directions, batch.batch_sizes, **last)
            finals.append(final)
        if count > 1:
            final = tuple(torch.cat(state) for state in zip(*finals, strict=True))
        result = self._laid_out(input, batch, y, final)
        if not return_cell_states:
            return result
        laid_out = tuple(self._result(input, batch, t, ())[0] for t in others[0])
        return *result, laid_out if len(laid_out) > 1 else laid_out[0]

    def _laid_out(self, input: Any, batch: Batch, y: Tensor, states: tuple[Tensor, ...]) -> Any:
        """What the module returns of the last layer's output and all final states."""
        if len(batch.leading) != 2:
            states = tuple([UNSHARED(state, [*batch.leading, state.shape[-1]]) for state in states])
        return self._result(input, batch, y, states if len(states) > 1 else states[0])

    def _run_rounded(self, input: Any, call: Call, layer: Callable, return_cell_states: bool) -> Any:
        """The same in float32, with one rounding of the results."""
        batch, states = call.batch._replace(x=call.batch.x.float()), call.states
        parameters: Any = tree_map(lambda w: None if w is None else w.float(), call.parameters)
        wide = Call(call.cell, batch, None if states is None else tuple(s.float() for s in states), parameters)
        with torch.autocast("cpu", enabled=False):
            results = DropIn._run(self, input, wide, layer, return_cell_states)
        return tree_map(lambda t: t.to(call.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, results)

    # What layers and cells each say for themselves:

    def _steady(self) -> bool:
        """Whether equal calls without gradients do the same, with the parameters as they are."""
        return True

    def _as_held(self) -> bool:
        """Whether the cell uses the parameters as the module holds them, nothing made from them."""
        return True

    def _used(self, parameters: Parameters) -> Parameters:
        """The parameters of a direction as the cell uses them."""
        return parameters

    def _cell(self) -> Cell:
        raise NotImplementedError

    def _out(self) -> int:
        """Features of the hidden state."""
        return self.hidden_size

    def _batch(self, input: Any) -> Batch:
        raise NotImplementedError

    def _weight_shapes(self, gates: int) -> tuple:
        raise NotImplementedError

    def _result(self, input: Any, batch: Batch, y: Tensor, states: Any) -> Any:
        """What the module returns. `states`: one Tensor or a tuple of them, in the caller's shape."""
        raise NotImplementedError


UNSHARED = torch.ops.aten._unsafe_view.default
"""What nobody else has, in another shape: no view of it, which could not be detached in place."""


def taken_strided(t: Tensor) -> None:
    """Raise NotTaken for a tensor whose numbers are not in rows, before anything is made of it."""
    if t.layout is not torch.strided or t.is_nested:
        raise NotTaken("nested tensors" if t.is_nested else f"layout {t.layout}")


AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)  # the formats that autocast takes part in


BFLOAT16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported() if torch.backends.mkldnn.is_available() else False
"""Whether oneDNN computes in bfloat16 on this processor."""


def _autocast_dtype(cell: Cell, states: tuple[Tensor, ...], by_onednn: bool) -> torch.dtype:
    """Of the results under autocast, as torch's operations give it: they round products, and take up the states in
    their own format, where there are such terms; oneDNN's LSTM rounds the states, too, on processors with bfloat16."""
    dtype = torch.get_autocast_dtype("cpu")
    by_onednn = by_onednn and dtype is torch.bfloat16 and all([s.dtype is not torch.float16 for s in states])
    enabled = torch.backends.mkldnn.enabled or torch.compiler.is_exporting()  # which turns it off for itself alone
    if by_onednn and enabled and BFLOAT16:
        return dtype
    return dtype if cell in ELMAN.values() else reduce(torch.promote_types, [s.dtype for s in states], dtype)


def initial_names(cell: Cell) -> list[str]:
    return [f"{state}_0" for state in cell.states]


def packed_size(packed: PackedSequence) -> int:
    """N of a packed sequence. Raises Mistake where its parts do not fit together, because the engine relies on them."""
    data, sizes, *orders = packed
    if not isinstance(data, Tensor) or data.dim() != 2:
        got = f"shape {tuple(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise Mistake(f"input.data must be a Tensor of 2 dimensions (all steps, features), got {got}")
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64 or sizes.dim() != 1 or sizes.device.type != "cpu":
        got = f"{sizes.dtype} of shape {tuple(sizes.shape)}" if isinstance(sizes, Tensor) else type(sizes).__name__
        raise Mistake(f"input.batch_sizes must be an int64 CPU Tensor of 1 dimension, got {got}")
    given = [t for t in orders if t is not None]
    if all([t.dtype is torch.int64 and t.is_cpu and t.dim() == 1 and t.is_contiguous() for t in given]):
        sequences = Sequences(data, sizes, given)
        if sequences.fit(data):
            return sequences.rows
    steps = sizes.tolist()  # slower, to say what is wrong
    if not steps or steps[-1] < 1 or steps != sorted(steps, reverse=True) or sum(steps) != len(data):
        got = ", ".join(map(str, steps[:8])) + ", ..." * (len(steps) > 8)
        raise Mistake(
            f"input.batch_sizes must be positive, never increase and sum to the {len(data)} rows of input.data, "
            f"got [{got}] with sum {sum(steps)}"
        )
    for name, order in zip(("sorted_indices", "unsorted_indices"), orders, strict=True):
        if order is None:
            continue
        if order.shape != (steps[0],):
            raise Mistake(f"input.{name} must have shape ({steps[0]},), one per sequence, got {tuple(order.shape)}")
        low, high = (bound.item() for bound in order.aminmax())
        if low < 0 or high >= steps[0]:
            raise Mistake(f"input.{name} must hold a permutation of 0 to {steps[0] - 1}, got {low} to {high}")
    return steps[0]


ELMAN = {"RNN_TANH": cells.rnn_tanh, "RNN_RELU": cells.rnn_relu, "tanh": cells.rnn_tanh, "relu": cells.rnn_relu}


def elman(kind: str) -> Cell:
    if kind not in ELMAN:
        raise NotTaken(f"nonlinearity {kind}")
    return ELMAN[kind]
