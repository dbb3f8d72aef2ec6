"""torch.nn's recurrent layers and cells over the engine: torch's constructors, names, state_dict and results.

Each class is a subclass of its torch.nn namesake and replaces `forward` alone, so initialisation, `repr`, pickling,
hooks and `.to()` are torch's own. A call that the engine does not take (`fastcells.functional.refusal`, an empty batch)
runs torch's implementation with the same weights. A wrong call raises the exception that torch.nn raises, with a
message that names the argument, what was given and what was expected. `Recurrent`, the layer of any cell, has no
namesake: it runs the cell's own torch form where the engine does not take the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import rnn as original  # the classes themselves: torch.nn.LSTM may be one of ours by now
from torch.nn.utils.rnn import PackedSequence

from . import cells, regularise, replay, unrolled
from .cell import Cell
from .derivation import build
from .dropin import (
    Batch,
    Call,
    DropIn,
    Mistake,
    NotExported,
    NotTaken,
    elman,
    packed_size,
    reordered,
    taken_strided,
    weight_shapes,
)
from .dynamo import admit
from .functional import Parameters, flat, observer, unchecked_layer
from .marked import Marked
from .plan import worth_packing
from .ragged import Lengths, Ragged, backward_in_time, check_reset_to, cut_within, ends_and_resets
from .stream import Stream

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Recurrent"]


class OverTime(regularise.Dropping, DropIn):
    """What the layers over whole sequences have to themselves."""

    num_layers: int
    bias: bool
    batch_first: bool
    bidirectional: bool
    proj_size: int
    recompute: bool = False  # on the class, for layers that were torch.nn's

    def _steady(self) -> bool:
        return super()._steady() and not (self.recompute and torch.is_grad_enabled())

    def _run(self, input: Any, call: Call, layer: Callable = unchecked_layer, return_cell_states: bool = False) -> Any:
        if self.recompute and layer is unchecked_layer:
            layer = partial(unchecked_layer, recompute=True)
        return super()._run(input, call, layer, return_cell_states)

    @replay.begins
    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        reverse: bool = False,
        return_cell_states: bool = False,
    ) -> Any:
        """As torch.nn's layers: same arguments, results and exceptions; and:

        lengths, for padded input: steps of each sequence, N integers from 0 to T in any order. Output past the end is
        zero, final states are those at each sequence's true end, and time is spent on real steps only.

        reset, for padded input: bool [T, N] ([N, T] with batch_first, [T] without a batch), true where before that step
        the state returns to reset_to: states shaped as hx, 0 for zeros, None for hx itself (which at step 0 changes
        nothing). Between the steps t - 1 and t a reset cuts the sequence for both directions: backward in time, the
        state returns before step t - 1. Final states are those after the last step that a direction takes.

        reverse: all layers, of one direction, run backward in time, from each sequence's end to its step 0.

        return_cell_states: return a third result, what the last layer's states besides the hidden one (which is the
        output) were after every step: one Tensor, laid out as the output with H for its features, or a tuple of them.

        Raises TypeError, ValueError for lengths, reset or reset_to of another kind, shape or range; ValueError for
        reverse with bidirectional layers, and for return_cell_states of a cell that has but a hidden state; under
        torch.export NotExported, a RuntimeError, for what it cannot take in: reset, reverse, a PackedSequence.
        """
        ragged = _says_anything(lengths, reset, reset_to, reverse)
        if type(input) is Tensor and not ragged and not return_cell_states:
            return super().forward(input, hx)
        # How many steps and stretches there are is in the data.
        unknown = (ragged or isinstance(input, PackedSequence)) and not torch.compiler.is_exporting()
        between = torch.compiler.is_dynamo_compiling() and (unknown or return_cell_states)
        if not ragged and not return_cell_states and not between:
            return super().forward(input, hx)
        options = {"lengths": lengths, "reset": reset, "reset_to": reset_to, "reverse": reverse}
        if isinstance(input, torch.fx.Proxy):
            return self._leaf(input, hx, **options, return_cell_states=return_cell_states)
        if ragged and torch.compiler.is_exporting():
            if lengths is None or reset is not None or reverse or return_cell_states:
                what = "reset, reverse, and return_cell_states with lengths,"
                raise NotExported(f"{type(self).__name__}: {what} cannot be exported")
            return self._exported(input, hx, lengths)
        if between:
            call = partial(OverTime.forward, self, **options, return_cell_states=return_cell_states)
            return _between_graphs(call, input, hx)
        if not (reverse or return_cell_states):
            for again in self._replays.within:
                result = again(self, input, hx, lengths=lengths, reset=reset, reset_to=reset_to)
                if result is not None:
                    return super().forward(input, hx) if result is replay.PLAIN else result
        input, hx, within, finish = self._resolved(input, hx, **options, return_cell_states=return_cell_states)
        if within is not None:
            return finish(self._run(input, *within))
        return finish(self._with_cell_states(input, hx) if return_cell_states else super().forward(input, hx))

    def _resolved(
        self, input: Any, hx: Any, *, return_cell_states: bool = False, **options: Any
    ) -> tuple[Any, Any, tuple | None, Callable]:
        """What a call with these options comes to: input and states of one without; or the arguments of `_run` after
        the input, where the engine does it; and what makes of the results those of the call."""
        if return_cell_states and len((cell := self._cell()).states) == 1:
            raise ValueError(f"return_cell_states must be False: cell {cell.name} has but its hidden state, the output")
        if not _says_anything(**options):
            return input, hx, None, _same
        return self._ragged(input, hx, **options, third=return_cell_states)

    def _with_cell_states(self, input: Any, hx: Any) -> Any:
        """`DropIn.forward` with the last layer's other states as a third result."""
        try:
            return self._run(input, self._read(input, hx), return_cell_states=True)
        except NotTaken:
            try:
                call, _, _ = self._parts(input, hx)
            except Mistake:
                super().forward(input, hx)  # raises what torch.nn raises
                raise
            return self._run(input, call, unrolled.layer, return_cell_states=True)

    def _exported(self, input: Any, hx: Any, lengths: Any) -> Any:
        """The call with lengths in an exported program, where they are not known yet."""
        try:
            call = self._read(input, hx)
        except NotTaken as reason:
            raise NotExported(f"{type(self).__name__}: a call with lengths is not exported: {reason}") from None
        ends = torch.as_tensor(lengths).reshape(-1)
        if ends.shape != (call.batch.size,) or ends.is_floating_point() or ends.dtype is torch.bool:
            raise ValueError(
                f"lengths must be integers of shape ({call.batch.size},), one for each sequence, "
                f"got {ends.dtype} of shape {tuple(ends.shape)}"
            )

        def layer(cell: Cell, x: Tensor, states: Any, parameters: Sequence, batch_sizes: None) -> tuple:
            given = cell.key, x, list(states or ()), flat(parameters), ends, len(parameters)
            y, *finals = torch.ops.fastcells.layer_of_lengths(*given)
            return y, tuple(finals)

        return self._run(input, call, layer)

    def stream(self, batch_size: int = 1) -> Stream:
        """The layers as a `Stream`: one time step of `batch_size` sequences at a time, the state kept inside.

        Raises ValueError for bidirectional layers, for a batch_size under 1 and for what the engine does not take.
        """
        return Stream(self, batch_size)

    def _ragged(
        self,
        input: Any,
        hx: Any,
        lengths: Lengths | None = None,
        reset: Tensor | None = None,
        reset_to: Any = None,
        reverse: bool = False,
        third: bool = False,
    ) -> tuple[Any, Any, tuple | None, Callable]:
        """`_resolved` of a call with any of these arguments. third: return_cell_states."""
        check_reset_to(reset, reset_to)
        if reverse and self.bidirectional:
            raise ValueError("reverse must be False with bidirectional=True, where the second direction is reverse")
        if isinstance(input, PackedSequence) and not (lengths is None and reset is None):
            raise ValueError("lengths and reset must be None with a PackedSequence, which has lengths of its own")
        cell, out = self._cell(), self._out()

        def fail(mistake: Mistake, result: Any = None) -> Any:
            raise mistake.error(f"{type(self).__name__}: {mistake}") from None

        try:
            batch = self._batch(input)
            states = None if hx is None else self._states(cell, input, batch, hx, out)
        except Mistake as mistake:
            return input, hx, None, partial(fail, mistake)  # after torch.nn's own error, if it raises one
        if isinstance(input, PackedSequence):

            def turned(packed: PackedSequence) -> PackedSequence:
                return PackedSequence(backward_in_time(packed.data, packed.batch_sizes), *packed[1:])

            return turned(input), hx, None, lambda result: (turned(result[0]), result[1], *_each(turned, result[2:]))
        if isinstance(reset_to, (tuple, list, Tensor)):
            try:
                reset_to = self._states(cell, input, batch, reset_to, out, "reset_to")
            except Mistake as mistake:
                fail(mistake)
        steps, size, _ = batch.x.shape
        batched, directions = input.dim() == 3, 2 if self.bidirectional else 1
        reset, batch_first = _with_batch(reset, batched), self.batch_first and batched
        call = None if third else self._by_engine(input, hx)
        if call is not None and reset is not None and not reverse:
            marked = self._marked(call, lengths, reset, reset_to, batch_first)
            if marked is not None:
                if batched and self._steady():
                    replay.remember(self, input, hx, call, resets=True)
                return input, hx, (call, marked), _same
        ragged = Ragged(steps, size, lengths, reset, batch_first=batch_first, reverse=reverse, device=batch.x.device)
        entered = ragged.enter(states, reset_to, directions)
        if ragged.whole:
            return input, _as_given(entered, batched), None, _same
        x = input if batched else batch.x

        def finish(result: Any) -> Any:
            y, finals, *others = result
            finals = ragged.leave(finals if isinstance(finals, tuple) else (finals,), states, directions)

            def padded(y: Any) -> Tensor:
                y = ragged.unpack(y.data) if isinstance(y, PackedSequence) else y
                return y if batched else y.squeeze(1)

            return padded(y), _as_given(finals, batched), *_each(padded, others)

        if call is None or not ragged.tokens:
            return PackedSequence(ragged.pack(x), ragged.batch_sizes), _as_given(entered), None, finish
        leading = self.num_layers * directions, ragged.stretches
        batch = Batch(x, *leading[1:], leading, ragged.batch_sizes, ragged.layout)
        call = call._replace(batch=batch, states=entered)
        if reset is None and batched and not reverse and self._steady():
            replay.remember(self, input, hx, call)
        return input, hx, (call,), finish

    def _by_engine(self, input: Any, hx: Any) -> Call | None:
        """The call without lengths and resets, where the engine takes it with them."""
        masks = self.training and self._random()  # as long as packed rows
        if masks or observer() is not None:
            return None
        try:
            call = self._read(input, hx)
        except NotTaken:
            return None
        return call if call.dtype is None else None

    def _marked(
        self, call: Call, lengths: Lengths | None, reset: Tensor, reset_to: Any, batch_first: bool
    ) -> Marked | None:
        """What runs the layers of a call with resets inside the time loop, where this is the quicker way."""
        steps, size, inputs = call.batch.x.shape
        ends, resets = ends_and_resets(steps, size, lengths, reset, batch_first)
        assert resets is not None, "there is a reset"
        draws = self.training and self.dropout and self.num_layers > 1  # as of a packed sequence
        known = reset_to is None or isinstance(reset_to, tuple) or (isinstance(reset_to, int) and reset_to == 0)
        if not known or draws or self.proj_size or not cut_within(ends, resets):
            return None
        each = 2 * len(call.cell.gates) * self.hidden_size * (inputs + self.hidden_size)
        tokens = steps * size if ends is None else int(ends.sum())
        if worth_packing(size, tokens * each, (steps * size - tokens) * each):
            return None
        to = call.states if reset_to is None else None if reset_to == 0 else reset_to
        layer = partial(unchecked_layer, recompute=True) if self.recompute else unchecked_layer
        directions, dtype = 2 if self.bidirectional else 1, call.batch.x.dtype
        return Marked(resets, ends, to, directions, dtype, layer)

    def _in_torch_form(self) -> bool:
        return self.training and self._random()  # which torch.nn's layers have no notion of

    def _forward_in_torch(self, input: Any, hx: Any) -> Any:
        if self._in_torch_form():
            return self._run(input, self._parts(input, hx)[0], unrolled.layer)
        run = super()._forward_in_torch
        return _between_graphs(run, input, hx) if torch.compiler.is_dynamo_compiling() else run(input, hx)

    def _out(self) -> int:
        return self.proj_size or self.hidden_size

    def _batch(self, input: Any) -> Batch:
        rows = self.num_layers * (2 if self.bidirectional else 1)
        if isinstance(input, PackedSequence):
            if torch.compiler.is_exporting():
                raise NotExported(f"{type(self).__name__}: a PackedSequence cannot be exported: pad it, give lengths=")
            size = packed_size(input)
            return Batch(input.data, size, (rows, size), input.batch_sizes)
        if not isinstance(input, Tensor):
            raise Mistake(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}", TypeError)
        rank = input.dim()
        if rank == 3:
            x = input.transpose(0, 1) if self.batch_first else input
        elif rank == 2:
            x = input.unsqueeze(1)
        else:
            got = tuple(input.shape)
            raise Mistake(f"input must have 3 dimensions, or 2 without a batch, got shape {got}", ValueError)
        steps, size, _ = x.shape
        if not steps:
            raise Mistake(f"input must have a sequence length of at least 1, got 0 in shape {tuple(input.shape)}")
        return Batch(x, size, (rows, size) if rank == 3 else (rows,))

    def _weight_shapes(self, gates: int) -> tuple:
        sizes = self.input_size, self.hidden_size, self.proj_size
        shapes = weight_shapes.__wrapped__ if torch.compiler.is_dynamo_compiling() else weight_shapes  # else it warns
        return shapes(gates, *sizes, self.bias, self.num_layers, 2 if self.bidirectional else 1)

    def _result(self, input: Any, batch: Batch, y: Tensor, states: Any) -> Any:
        if batch.tokens is not None:
            return y, states
        if batch.batch_sizes is not None:
            return PackedSequence(y, *input[1:]), reordered(states, input.unsorted_indices)
        if len(batch.leading) == 1:
            return y.squeeze(1), states
        return y.transpose(0, 1) if self.batch_first else y, states


def _says_anything(
    lengths: Lengths | None = None, reset: Tensor | None = None, reset_to: Any = None, reverse: bool = False
) -> bool:
    """Whether these options of a call do."""
    return lengths is not None or reset is not None or reset_to is not None or reverse


def _same(result: Any) -> Any:
    return result


def _with_batch(reset: Any, batched: bool) -> Any:
    """A reset as [T, 1] where input has no batch, and it has the shape that goes with that."""
    return reset.unsqueeze(1) if isinstance(reset, Tensor) and not batched and reset.dim() == 1 else reset


def _each(function: Callable, results: Sequence[Any]) -> list[Any]:
    """The function's value for each result, for each part of one that is a tuple of several."""
    several = lambda t: isinstance(t, tuple) and not isinstance(t, PackedSequence)  # noqa: E731
    return [tuple(map(function, t)) if several(t) else function(t) for t in results]


def _as_given(states: tuple[Tensor, ...] | None, batched: bool = True) -> Any:
    """States as a caller has them: one Tensor or a tuple of several."""
    if states is None:
        return None
    states = states if batched else tuple(state.squeeze(1) for state in states)
    return states if len(states) > 1 else states[0]


class LayerModule(OverTime, original.RNNBase):
    """What torch.nn's layers over whole sequences have to themselves."""

    def __init__(
        self,
        *args: Any,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        """torch.nn's arguments, and by name those of `Recurrent` for what training drops and keeps. Raises what
        torch.nn raises, and ValueError for rates out of range and for recurrent_dropout or zoneout with a projection.
        """
        super().__init__(*args, **kwargs)
        if recurrent_dropout or zoneout or weight_dropout:
            self._regularise(recurrent_dropout, zoneout, weight_dropout)
        self.recompute = bool(recompute)


@torch._disable_dynamo
def _between_graphs(run: Callable, input: Any, hx: Any) -> Any:
    """What torch.compile leaves as it is: its graph breaks here."""
    return run(input, hx)


class CellModule(DropIn, original.RNNCellBase):
    """What the cells have to themselves: they are layers over one step."""

    def _read(self, input: Any, hx: Any) -> Call:
        if torch.compiler.is_compiling():
            raise NotTaken("torch.compile or torch.export is tracing, which fuses a single step itself")
        return super()._read(input, hx)

    def _batch(self, input: Any) -> Batch:
        if not isinstance(input, Tensor):
            raise Mistake(f"input must be a Tensor, got {type(input).__name__}")
        taken_strided(input)
        rank = input.dim()
        if rank == 2:
            return Batch(input.unsqueeze(0), len(input), (len(input),))
        if rank == 1:
            return Batch(input.view(1, 1, -1), 1, ())
        raise Mistake(f"input must have 2 dimensions, or 1 without a batch, got shape {tuple(input.shape)}")

    def _weight_shapes(self, gates: int) -> tuple:
        return weight_shapes(gates, self.input_size, self.hidden_size, 0, self.bias, 0, 1)

    def _result(self, input: Any, batch: Batch, y: Tensor, states: Any) -> Any:
        return states


class RNN(LayerModule, original.RNN):
    """Simple recurrent layers (Elman 1990): h_t = tanh or relu (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    As `torch.nn.RNN`: input [T, N, I] ([N, T, I] with batch_first, [T, I] without a batch, or a PackedSequence) and h_0
    [num_layers * D, N, H] give (output [T, N, D * H], h_n [num_layers * D, N, H]), D = 2 if bidirectional, else 1.
    Raises what torch.nn.RNN raises.
    """

    def _cell(self) -> Cell:
        return elman(self.mode)


class LSTM(LayerModule, original.LSTM):
    """Long short-term memory layers (Hochreiter & Schmidhuber 1997, forget gate: Gers et al. 2000).

    As `torch.nn.LSTM`: input [T, N, I] ([N, T, I] with batch_first, [T, I] without a batch, or a PackedSequence) and
    (h_0 [num_layers * D, N, P], c_0 [num_layers * D, N, H]) give (output [T, N, D * P], (h_n, c_n)), where P is
    proj_size (Sak, Senior & Beaufays 2014) or else H, D = 2 if bidirectional, else 1. Raises what torch.nn.LSTM raises.
    """

    def _cell(self) -> Cell:
        return cells.lstm


class GRU(LayerModule, original.GRU):
    """Gated recurrent unit layers (Cho et al. 2014), reset applied after the recurrent product.

    As `torch.nn.GRU`: input [T, N, I] ([N, T, I] with batch_first, [T, I] without a batch, or a PackedSequence) and h_0
    [num_layers * D, N, H] give (output [T, N, D * H], h_n [num_layers * D, N, H]), D = 2 if bidirectional, else 1.
    Raises what torch.nn.GRU raises.
    """

    def _cell(self) -> Cell:
        return cells.gru


class RNNCell(CellModule, original.RNNCell):
    """One step of `RNN`. As `torch.nn.RNNCell`: input [N, I] or [I] and h [N, H] or [H] give the next h."""

    def _cell(self) -> Cell:
        return elman(self.nonlinearity)


class LSTMCell(CellModule, original.LSTMCell):
    """One step of `LSTM`. As `torch.nn.LSTMCell`: input [N, I] or [I] and (h, c), each [N, H] or [H], give the next."""

    def _cell(self) -> Cell:
        return cells.lstm


class GRUCell(CellModule, original.GRUCell):
    """One step of `GRU`. As `torch.nn.GRUCell`: input [N, I] or [I] and h [N, H] or [H] give the next h."""

    def _cell(self) -> Cell:
        return cells.gru


class Recurrent(OverTime):
    """Layers of any cell: one shipped in `fastcells.cells`, or your own function under `@fastcells.cell`.

    The arguments after `cell` are those of `torch.nn.LSTM`, with the same meaning and defaults. For a cell of G gates:

    - parameters: weight_ih_l{k} [G * H, I] (I = D * H, or D * proj_size, from the second layer on), weight_hh_l{k}
      [G * H, H], bias_ih_l{k} and bias_hh_l{k} [G * H], in blocks in the order of `cell.gates`, weight_hr_l{k}
      [proj_size, H] with a projection, those of the cell's own, {name}_l{k} [H] or [] (scalars), and the same with
      _reverse; a cell without recurrent products has no weight_hh and bias_hh. All start as torch's, uniform within
      1 / sqrt(H), but for those of the cell's own that it declares with a first value;
    - call: input [T, N, I] ([N, T, I] with batch_first, [T, I] without a batch, or a PackedSequence) and initial
      states, one [num_layers * D, N, H] for each of `cell.states` (a Tensor where there is one state, else a tuple; the
      hidden state has proj_size features with a projection; default: zeros) give (output [T, N, D * H], final states),
      D = 2 if bidirectional, else 1.

    In training, with draws from torch's generator, and not in eval:

    - recurrent_dropout: the rate at which units of the hidden state are dropped where it enters the recurrent products,
      the same ones at all steps of a sequence (variational dropout, Gal & Ghahramani 2016); the rest is scaled up;
    - zoneout: the rate at which a unit keeps its state of the step before (Krueger et al. 2017), for all of the cell's
      states or one for each. In eval every unit moves on; the paper's blend by the rates is not taken there;
    - weight_dropout: the rate at which elements of weight_hh are dropped, for the whole call (DropConnect, as in
      AWD-LSTM: Merity, Keskar & Socher 2018); the rest is scaled up.

    After a `reset` the masks are those of a new sequence.

    recompute: keep nothing but the arguments of a call for the backward pass, which runs forward once more (Chen et al.
    2016): between the passes there is nothing in memory besides the output. May be set at any time; what compiles the
    layers decides for itself.

    The layer runs on the engine, and where that does not take the call (other devices and formats, torch.func,
    torch.compile) as a loop of torch operations over the cell's function.

    Raises TypeError if `cell` is no Cell; ValueError or TypeError for a cell that cannot be differentiated and for
    wrong options; in a call RuntimeError, ValueError or TypeError as torch.nn's layers do.
    """

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_dropout: float = 0.0,
        zoneout: float | Sequence[float] = 0.0,
        weight_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        if not isinstance(cell, Cell):
            raise TypeError(f"cell must be a Cell, as the decorator fastcells.cell makes, got {type(cell).__name__}")
        super().__init__()
        options = num_layers, bias, batch_first, dropout, bidirectional, proj_size
        original.LSTM(input_size, hidden_size, *options, device="meta")  # raises what torch.nn raises for wrong options
        self.cell, self.input_size, self.hidden_size = cell, input_size, hidden_size
        self.num_layers, self.bias, self.batch_first, self.dropout, self.bidirectional, self.proj_size = options
        self.recompute = bool(recompute)
        self._regularise(recurrent_dropout, zoneout, weight_dropout)
        programs = build(cell, bool(proj_size))  # raises for a cell that is wrong
        if cell.fed:
            raise ValueError(f"cell must have no inputs of its own, which functional.layer takes, got {cell}")
        if programs.square and proj_size not in (0, hidden_size):
            raise ValueError(
                f"proj_size must be 0 or hidden_size {hidden_size} for cell {cell.name}, which does not only multiply "
                f"its {cell.states[0]} with weight_hh, got {proj_size}"
            )
        sizes = input_size, hidden_size, proj_size
        own = tuple((name, (hidden_size,) if name in cell.parameters else ()) for name in cell.own)
        recurrent = bool(programs.gradients.u)
        self._shapes = weight_shapes(len(cell.gates), *sizes, bias, num_layers, 1 + bool(bidirectional), recurrent, own)
        for directions in self._shapes:
            for name, shape in (item for items in directions for item in items if item):
                if name in self._parameters:
                    raise ValueError(
                        f"cell {cell.name}: no parameter of its own may be named as the layer's, got {name}"
                    )
                self.register_parameter(name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, uniform within 1 / sqrt(hidden_size), as torch.nn's layers do, or set the first
        value that the cell declares."""
        bound = self.hidden_size**-0.5
        for name, weight in self.named_parameters():
            value = self.cell.initial.get(name.rpartition("_l")[0])
            if value is None:
                torch.nn.init.uniform_(weight, -bound, bound)
            else:
                torch.nn.init.constant_(weight, value)

    def extra_repr(self) -> str:
        """The cell's name, torch.nn's layers' arguments, and the rates of what is dropped."""
        return f"{self.cell.name}, {super().extra_repr()}"

    def _cell(self) -> Cell:
        if torch.compiler.is_dynamo_compiling():
            return self.cell  # the registered operation asks
        return self.cell.unchanged()

    def _weight_shapes(self, gates: int) -> tuple:
        return self._shapes

    def _run(self, input: Any, call: Call, layer: Callable = unchecked_layer, return_cell_states: bool = False) -> Any:
        call = call._replace(parameters=[tuple(map(self._used, directions)) for directions in call.parameters])
        return super()._run(input, call, layer, return_cell_states)

    def _steady(self) -> bool:
        recurrent, outside = self._shapes[0][0][1] is not None, self.cell.outside
        return super()._steady() and self._as_held() and recurrent and not (outside and outside.loose)

    def _as_held(self) -> bool:
        return self.cell.recurrent_weight is None

    def _used(self, parameters: Parameters) -> Parameters:
        w_ih, w_hh, b_ih, b_hh, *rest = parameters
        if w_hh is None:  # the cell has no recurrent product, and the layer no weights and bias of it
            return w_ih, w_hh, b_ih, None if b_ih is None else torch.zeros_like(b_ih), *rest
        if self.cell.recurrent_weight is not None:
            w_hh = self.cell.recurrent_weight(w_hh)
        return w_ih, w_hh, b_ih, b_hh, *rest

    def _in_torch_form(self) -> bool:
        return True


DROP_IN: dict[type, type] = {kind.__bases__[1]: kind for kind in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
"""Torch's class -> ours."""

admit(LayerModule)
