"""The one differentiable call: a recurrent layer, all its directions, as one node of autograd's graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.profiler import record_function

from . import unrolled
from .cell import Cell
from .cpu import layer as cpu
from .cpu import script
from .cpu.engine import DTYPES
from .cpu.lengths import Tokens
from .derivation import build
from .ragged import Lengths, Ragged, backward_in_time, check_reset_to

Parameters = tuple[Any, ...]
"""(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) and, of a cell that has some, a tuple of its own tensors."""


ROUNDED = (torch.bfloat16, torch.float16)
"""What the modules compute in float32: stored in these, results rounded once."""

TRACED = (FakeTensor, FunctionalTensor)
"""What stands for a Tensor while something traces."""


def observer() -> str | None:
    """What looks on at this call, so that it has to be the registered operation (`fastcells.ops`), or None."""
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing"
    if torch._C._is_tracing():
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return None


def refusal(*tensors: Tensor) -> str | None:
    """Why neither the engine nor the registered operation takes these tensors, or None where they do."""
    if torch.jit.is_tracing():
        return "torch.jit.trace is recording"
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter and not isinstance(t, TRACED):
            return f"tensor subclass {type(t).__name__}"
        if not t.is_cpu:
            return f"device {t.device}"
        if t.dtype not in DTYPES and t.dtype not in ROUNDED:
            return f"dtype {t.dtype}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}"
    return None


def flat(parameters: Sequence[Parameters]) -> list[Tensor | None]:
    """All tensors of all directions."""
    return [t for p in parameters for t in (*p[:5], *(p[5] if len(p) > 5 else ()))]


def layer(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    batch_sizes: Tensor | None = None,
    inputs: Sequence[Tensor] = (),
    *,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
    reset_to: tuple[Tensor, ...] | Literal[0] | None = None,
    reverse: bool = False,
    return_cell_states: bool = False,
) -> tuple[Any, ...]:
    """Run a recurrent layer over time, differentiably.

    cell: the recurrent cell. x: [T, N, I], any strides, or packed rows [total, I] with batch_sizes, an int64 tensor [T]
    that does not increase. states: None for zeros, or [D, N, H] for each of the cell's states (the first one [D, N, P]
    with a projection). parameters: (weight_ih [G * H, I], weight_hh [G * H, H or P], bias_ih, bias_hh [G * H] or None,
    weight_hr [P, H] or None, the cell's own tensors) for each of the D directions; the second one runs backward in
    time. weight_hh may be None if the cell has no recurrent product; its own tensors, `cell.own`, are [H] each, or []
    if scalars, and may be left out if there are none. inputs: the cell's extra inputs, `cell.fed`: [D, N, H] each, or
    [D, T, N, H] ([D, total, H] for packed rows) for those of every step.

    For padded x: lengths: steps of each sequence, [N] integers from 0 to T. reset: bool [T, N], true where the state
    returns to reset_to (states like `states`; 0 for zeros; None for `states` themselves) before that step. It cuts the
    sequence between the steps t - 1 and t for both directions: backward in time, the state returns before step t - 1.

    reverse: the only direction there is runs backward in time.

    Returns y, [T, N, D * H] or [total, D * H], zero past the end of a sequence, and the final states, shaped as the
    initial ones, at each sequence's true end (which is step 0 backward in time). With return_cell_states also what the
    cell's other states were after every step, a tuple of tensors laid out as y.

    Raises TypeError, ValueError for arguments that do not fit together, RuntimeError for tensors that the engine does
    not take (see `refusal`): float32 or float64 throughout, on the CPU.
    """
    check(cell, x, states, parameters, batch_sizes, inputs)
    check_reset_to(reset, reset_to)
    run = partial(unchecked_layer, return_cell_states=return_cell_states)
    if lengths is None and reset is None and not reverse:
        return run(cell, x, states, parameters, batch_sizes, inputs)
    directions = len(parameters)
    if reverse and directions > 1:
        raise ValueError("reverse must be False with the parameters of 2 directions, the second of which is reverse")
    if batch_sizes is not None:
        if lengths is not None or reset is not None:
            raise ValueError("lengths and reset must be None with batch_sizes: packed rows have lengths of their own")
        turn = partial(backward_in_time, batch_sizes=batch_sizes)
        each = [name in cell.step_inputs for name in cell.fed]
        fed = [torch.stack([turn(d) for d in t]) if e else t for t, e in zip(inputs, each, strict=True)]
        y, finals, *others = run(cell, turn(x), states, parameters, batch_sizes, fed)
        return turn(y), finals, *(tuple(map(turn, t)) for t in others)
    if isinstance(reset_to, tuple):
        check(cell, x, reset_to, parameters, batch_sizes, inputs, "reset_to")
    ragged = Ragged(x.shape[0], x.shape[1], lengths, reset, reverse=reverse)
    entered = ragged.enter(states, reset_to, directions)
    if ragged.whole:
        return run(cell, x, entered, parameters, inputs=inputs)
    fed = [ragged.spread(t) if t.dim() == 3 else torch.stack([ragged.pack(d) for d in t]) for t in inputs]
    if ragged.tokens and not return_cell_states:
        y, finals = run(cell, x, entered, parameters, ragged.batch_sizes, fed, tokens=ragged.layout)
        return y, ragged.leave(finals, states, directions)
    y, finals, *others = run(cell, ragged.pack(x), entered, parameters, ragged.batch_sizes, fed)
    finals = ragged.leave(finals, states, directions)
    return ragged.unpack(y), finals, *(tuple(map(ragged.unpack, t)) for t in others)


def registered_gradients(
    call: tuple, feed: bool, kept: Sequence[Tensor], cotangents: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Of x, each state, input and parameter, where it `needs` one, by the registered operation: differentiable.

    call: the arguments of the operation `layer`.
    """
    groups = [[call[1]], *call[2:5]]
    flags, wanted = iter(needs), []
    for group in groups:
        wanted.append(any([next(flags) for _ in group]))
    found = iter(torch.ops.fastcells.layer_backward(*call, feed, kept, cotangents, wanted))
    given = [
        next(found) if want and t is not None else None
        for group, want in zip(groups, wanted, strict=True)
        for t in group
    ]
    return [g if need else None for g, need in zip(given, needs, strict=True)]


def unchecked_layer(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    batch_sizes: Tensor | None = None,
    inputs: Sequence[Tensor] = (),
    return_cell_states: bool = False,
    recompute: bool = False,
    tokens: Tokens | None = None,
) -> tuple[Any, ...]:
    """`layer` for callers that have checked the arguments themselves: kernels go by raw addresses.

    tokens: where the packed rows lie in a padded batch, which x is, or y, or both, and which has no tokens but theirs.
    It does not go with return_cell_states.
    recompute: keep only the arguments for the backward pass, which runs forward once more.
    Under torch.profiler it is named after the cell, fastcells::lstm, and its backward fastcells::lstm_backward.
    """
    if observer() is not None:
        if tokens is not None:
            x = tokens.owner.pack(x) if tokens.takes else x
            y, finals = unchecked_layer(cell, x, states, parameters, batch_sizes, inputs)
            return tokens.owner.unpack(y) if tokens.gives else y, finals
        if return_cell_states:
            return unrolled.layer(cell, x, states, parameters, batch_sizes, inputs, True)
        call = cell.key, x, list(states or ()), list(inputs), flat(parameters), batch_sizes, len(parameters)
        y, *finals = torch.ops.fastcells.layer(*call)
        return y, tuple(finals)
    if torch.autograd._profiler_enabled():
        with record_function(f"fastcells::{cell.name}"):
            return _run(cell, x, states, parameters, batch_sizes, inputs, return_cell_states, recompute, tokens)
    return _run(cell, x, states, parameters, batch_sizes, inputs, return_cell_states, recompute, tokens)


class Witness(threading.local):
    """Who is told of a thread's layers in place of running them, if anyone. Gives what they would."""

    told: Callable[..., tuple[Any, ...]] | None = None


witness = Witness()


def _run(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    batch_sizes: Tensor | None,
    inputs: Sequence[Tensor],
    return_cell_states: bool,
    recompute: bool,
    tokens: Tokens | None,
) -> tuple[Any, ...]:
    tensors = [x, *(states or ()), *inputs, *flat(parameters)]
    graph = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    if witness.told is not None:
        return witness.told(cell, x, parameters, batch_sizes, return_cell_states, recompute, graph)
    _with_memory(tensors)
    sequences = cpu.Sequences(x, batch_sizes, tokens=tokens)
    if graph:
        call = Invocation(cell, len(parameters), states is not None, return_cell_states, recompute)
        y, *more = call(tensors, sequences)
        count = len(cell.states)
        return (y, tuple(more[:count]), tuple(more[count:])) if return_cell_states else (y, tuple(more))
    y, finals, saved = cpu.forward(cell, x, states, parameters, sequences, training=return_cell_states, inputs=inputs)
    return (y, finals, _others(cell, y, saved)) if return_cell_states else (y, finals)


def _others(cell: Cell, y: Tensor, saved: cpu.Saved) -> tuple[Tensor, ...]:
    """The states of every step but the hidden ones, the directions side by side; laid out as y."""
    directions = len(saved.slots)
    each = len(saved.series) // directions
    return tuple(torch.cat(saved.series[j::each], -1).view(*y.shape[:-1], -1) for j in range(len(cell.states) - 1))


def check(
    cell: Any,
    x: Any,
    states: Any,
    parameters: Sequence[Any],
    batch_sizes: Any,
    inputs: Sequence[Any],
    states_name: str = "states",
) -> None:
    """Raise for the first argument of `layer` that does not fit."""

    def want(condition: bool, name: str, expected: str, given: object, error: type[Exception] = ValueError) -> None:
        if not condition:
            raise error(f"{name} must be {expected}, got {given}")

    def want_tensor(t: object, name: str, shape: Sequence[int | None]) -> None:
        want(isinstance(t, Tensor), name, "a Tensor", type(t).__name__, TypeError)
        given = tuple(t.shape)  # type: ignore[attr-defined]
        fits = len(given) == len(shape) and all(b is None or a == b for a, b in zip(given, shape, strict=True))
        want(fits, name, "of shape [" + ", ".join("any" if n is None else str(n) for n in shape) + "]", given)

    want(isinstance(cell, Cell), "cell", "a Cell", type(cell).__name__, TypeError)
    cell.unchanged()
    want_tensor(x, "x", [None] * (3 if batch_sizes is None else 2))
    want(0 not in x.shape, "x", "of sizes of at least 1", tuple(x.shape))
    rows = x.shape[1]
    if batch_sizes is not None:
        want_tensor(batch_sizes, "batch_sizes", [None])
        want(
            batch_sizes.dtype is torch.int64 and batch_sizes.is_cpu,
            "batch_sizes",
            "int64 on the CPU",
            batch_sizes.dtype,
        )
        counts = batch_sizes.tolist()
        fits = counts and counts[-1] > 0 and counts == sorted(counts, reverse=True) and sum(counts) == len(x)
        want(fits, "batch_sizes", f"positive, never increasing, with sum {len(x)}", counts)
        rows = counts[0]
    want(len(parameters) in (1, 2), "parameters", "those of 1 or 2 directions", len(parameters))
    tensors = [x]
    for k, given in enumerate(parameters):
        name = f"parameters[{k}]"
        kinds = "(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, the cell's own tensors)"
        want(len(given) in (5, 6), name, kinds, f"{len(given)} items")
        w_ih, w_hh, b_ih, b_hh, w_hr = given[:5]
        own = given[5] if len(given) > 5 else ()
        want_tensor(w_ih, f"{name}: weight_ih", [None, x.shape[-1]])
        total, gates = w_ih.shape[0], len(cell.gates)
        want(total > 0 and total % gates == 0, f"{name}: weight_ih", f"of {gates} gates' rows", tuple(w_ih.shape))
        hidden = total // gates
        if k == 0:
            first, size = hidden, hidden if w_hr is None else len(w_hr)
        want(hidden == first, f"{name}: weight_ih", f"of hidden size {first}, as the first direction's", hidden)
        programs = build(cell, w_hr is not None)
        if w_hh is not None or programs.gradients.u:
            want_tensor(w_hh, f"{name}: weight_hh", [total, size])
        square = w_hr is None or size == hidden or not programs.square
        want(
            square, f"{name}: weight_hr", f"of {hidden} rows, as cell {cell.name} does not only multiply h_(t-1)", size
        )
        want(len(own) == len(cell.own), f"{name}[5]", f"one Tensor each for {cell.own}", f"{len(own)} items")
        for tensor, own_name in zip(own, cell.own, strict=True):
            shape = [] if own_name in cell.scalars else [hidden]
            want_tensor(tensor, f"{name}: {own_name}", shape)
        want((b_ih is None) == (b_hh is None), f"{name}: bias_ih, bias_hh", "both given or both None", (b_ih, b_hh))
        if b_ih is not None:
            want_tensor(b_ih, f"{name}: bias_ih", [total])
            want_tensor(b_hh, f"{name}: bias_hh", [total])
        want((w_hr is None) == (parameters[0][4] is None), f"{name}: weight_hr", "as the first direction's", w_hr)
        if w_hr is not None:
            want_tensor(w_hr, f"{name}: weight_hr", [size, hidden])
        tensors += [t for t in (*given[:5], *own) if t is not None]
    if states is not None:
        want(len(states) == len(cell.states), states_name, f"one Tensor each for {cell.states}", f"{len(states)} items")
        for j, (s, name) in enumerate(zip(states, cell.states, strict=True)):
            want_tensor(s, f"{states_name}[{j}] ({name})", [len(parameters), rows, hidden if j else size])
            tensors.append(s)
    want(len(inputs) == len(cell.fed), "inputs", f"one Tensor each for {cell.fed}", f"{len(inputs)} items")
    for t, name in zip(inputs, cell.fed, strict=True):
        steps = x.shape[:-1] if name in cell.step_inputs else [rows]
        want_tensor(t, f"inputs: {name}", [len(parameters), *steps, 1 if name in cell.marks else first])
        tensors.append(t)
    reason = refusal(*tensors)
    want(reason is None, "the call", "one that the engine takes", reason, RuntimeError)
    want(x.dtype in DTYPES, "x", "of dtype float32 or float64", x.dtype, RuntimeError)
    dtypes = {t.dtype for t in tensors}
    want(len(dtypes) == 1, "all tensors", f"of x's dtype {x.dtype}", sorted(map(str, dtypes)))


def split(cell: Cell, directions: int, given: bool, tensors: Sequence) -> tuple:
    """x, states or None, inputs, parameters"""
    x, *rest = tensors
    count = len(cell.states) if given else 0
    states, inputs, flat = rest[:count], rest[count : count + len(cell.fed)], rest[count + len(cell.fed) :]
    each = 5 + len(cell.own)
    parameters = [(*flat[k : k + 5], tuple(flat[k + 5 : k + each])) for k in range(0, directions * each, each)]
    return x, tuple(states) if given else None, tuple(inputs), parameters


class Invocation:
    """A differentiable call of a layer but for its tensors: x, states, extra inputs, parameters of each direction.

    again: the forward call, where this is made again and again with tensors that have been found to be laid out alike;
    then both passes are made without Python where they can be, the backward one for each kind of cotangents.
    """

    def __init__(
        self,
        cell: Cell,
        directions: int,
        given: bool,
        return_cell_states: bool = False,
        recompute: bool = False,
        again: cpu.Forward | None = None,
    ) -> None:
        self.cell, self.directions, self.given = cell, directions, given
        self.return_cell_states, self.recompute, self.again = return_cell_states, recompute, again
        self._start: Callable[..., Any] | None = None
        self._kinds: Kinds | None = None
        self._finish: list[tuple[tuple, Callable[..., Any]]] = []  # of the kinds that were asked for

    def __call__(self, tensors: Sequence[Tensor | None], sequences: cpu.Sequences) -> tuple[Tensor, ...]:
        """y, the final states, and the other states of every step if they are wanted."""
        return _Layer.apply(self, sequences, *tensors)

    def split(self, tensors: Sequence) -> tuple:
        return split(self.cell, self.directions, self.given, tensors)

    def forward(self, ctx: Any, sequences: cpu.Sequences, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        ctx.call, ctx.sequences, ctx.inputs = self, sequences, len(tensors)
        if self.again is not None and sequences.tables is not None:
            ctx.plan, ctx.feed = self.again.plan, False
            y, finals, saved = self.again.start(tensors, sequences)
            _save(ctx, tensors, [saved.y, *saved.slots, *saved.series])
            return y, *finals
        if self.again is not None:
            ctx.plan, ctx.feed = self.again.plan, False
            self._start = self._start or self.again.again(tensors, None, tuple)
            made = self._start(*[t for t in tensors if t is not None]) or self.again.begin(tensors)
            results = 1 + len(self.cell.states)
            self._kinds = _save(ctx, tensors, [made[0], *made[results:]], self._kinds)
            return tuple(made[:results])
        x, states, inputs, parameters = self.split(tensors)
        ctx.feed = any([t.requires_grad for t in inputs])
        training = self.return_cell_states or not self.recompute
        arguments = self.cell, x, states, parameters, sequences, training, inputs, ctx.feed
        forward, whole = cpu.prepared(*arguments)
        y, finals, saved = forward.start(whole, sequences)
        ctx.plan = saved.plan
        _save(ctx, tensors, [] if self.recompute else [saved.y, *saved.slots, *saved.series])
        return y, *finals, *(_others(self.cell, y, saved) if self.return_cell_states else ())

    def backward(self, ctx: Any, cotangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        graph = torch.is_grad_enabled()  # create_graph: the derivative must itself be differentiable
        keeps = _keeps_graph() and not self.recompute
        repeats = self.again is not None and script.observer is None and not graph
        if repeats:
            cotangents = [cpu.usable(t) for t in cotangents]
            taken = (*tensors, *cotangents)
            present = [t for t in taken if t is not None]
            kind = keeps, needs, cpu.threads(), *[t is None for t in cotangents]
            told = {"sequences": ctx.sequences} if ctx.sequences.packed else {}
            for known, finish in self._finish:
                if known == kind and (found := finish(*present, **told)) is not None:
                    return found
        _check_kinds(tensors, ctx.kinds)
        if graph or not _plain([*tensors, *cotangents]):
            return self._differentiable(ctx.sequences, tensors[: ctx.inputs], needs, cotangents, tensors[ctx.inputs :])
        _with_memory([*tensors, *cotangents])
        if self.recompute:
            x, states, inputs, parameters = self.split(tensors)
            with torch.no_grad():
                _, _, saved = cpu.forward(self.cell, x, states, parameters, ctx.sequences, True, inputs, ctx.feed)
            tensors = *tensors, saved.y, *saved.slots, *saved.series
        call, given = self._prepared(ctx, tensors, needs, cotangents, not keeps)
        if repeats and len(given) == len(taken) and all(map(same_memory, given, taken)):
            if len(self._finish) >= KINDS:
                self._finish.clear()
            finish = call.again(given, present, lambda made: tuple(self._needed(call.gradients(made), needs)))
            self._finish.append((kind, finish))
        return self._needed(call.finish(given, ctx.sequences), needs)

    def _prepared(self, ctx, tensors, needs, cotangents, overwrite) -> tuple[cpu.Backward, list[Tensor | None]]:
        y, *rest = tensors[ctx.inputs :]
        x, states, fed, parameters = self.split(tensors[: ctx.inputs])
        count = len(states or ())
        wanted = cpu.Wanted(needs[0], any(needs[1 : 1 + count]), any(needs[1 + count + len(fed) :]))
        saved = cpu.Saved(y, rest[: self.directions], rest[self.directions :], ctx.plan)
        (dy, *dfinals), dothers = cotangents[: 1 + len(self.cell.states)], cotangents[1 + len(self.cell.states) :]
        arguments = self.cell, x, states, y, parameters, ctx.sequences, saved, dy, dfinals, wanted, overwrite, fed
        return cpu.prepared_backward(*arguments, ctx.feed, dothers)

    def _needed(self, found: cpu.Gradients, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """In the order of the tensors."""
        states = found.states if self.given else ()
        every = [found.x, *states, *found.inputs, *[g for p in found.parameters for g in p]]
        return [g if need else None for g, need in zip(every, needs, strict=True)]

    def _differentiable(self, sequences: cpu.Sequences, inputs, needs, cotangents, kept) -> Sequence[Tensor | None]:
        """The gradients as functions of inputs and cotangents; those of a padded batch by way of packed rows."""
        tokens, (x, *rest), (dy, *others) = sequences.tokens, inputs, cotangents
        if tokens is not None and tokens.takes:
            x = tokens.owner.pack(x)
        if tokens is not None and tokens.gives and dy is not None:
            dy = tokens.owner.pack(dy)
        dx, *more = self._of_rows(sequences.counts, [x, *rest], needs, [dy, *others], kept)
        if tokens is not None and tokens.takes and dx is not None:
            dx = tokens.owner.unpack(dx)
        return dx, *more

    def _of_rows(self, counts: Tensor | None, inputs, needs, cotangents, kept) -> Sequence[Tensor | None]:
        """The same by the registered operation or, with cotangents of every step's states or in batches that it does
        not know, by autograd through the cell's torch form."""
        x, states, fed, parameters = self.split(inputs)
        count = 1 + len(self.cell.states)
        if len(cotangents) == count and not any([t is not None and _in_batches(t) for t in cotangents]):
            call = self.cell.key, x, list(states or ()), fed, flat(parameters), counts, self.directions
            if self.recompute:
                with torch.no_grad():
                    made = torch.ops.fastcells.layer(*call, True)
                kept = [made[0], *made[count:]]
            feed = any([t.requires_grad for t in fed])
            return registered_gradients(call, feed, kept, cotangents, needs)
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            y, finals, *others = unrolled.layer(self.cell, x, states, parameters, counts, fed, self.return_cell_states)
            results = (y, *finals, *(others[0] if others else ()))
            outputs = [(o, d) for o, d in zip(results, cotangents, strict=True) if d is not None]
            asked = [t for t, need in zip(inputs, needs, strict=True) if need]
            grads = iter(
                torch.autograd.grad(
                    [o for o, _ in outputs], asked, [d for _, d in outputs], create_graph=graph, allow_unused=True
                )
            )
        return [next(grads) if need else None for need in needs]


Kinds = list[tuple[torch.Size, torch.dtype] | None]


def _save(ctx: Any, taken: Sequence[Tensor | None], made: Sequence[Tensor], kinds: Kinds | None = None) -> Kinds:
    """Save what a call took and made, and what kind of tensors these are, if that is not known, which is returned: by
    the time of the backward pass, hooks may have put others in their place, and parameters may have been given other
    data, which kernels would read as these."""
    tensors = *taken, *made
    ctx.save_for_backward(*tensors)
    ctx.kinds = kinds = kinds or [None if t is None else _kind(t) for t in tensors]
    return kinds


def _check_kinds(tensors: Sequence[Tensor | None], kinds: Kinds) -> None:
    """Raise where saved tensors are of other kinds by now."""
    for tensor, kind in zip(tensors, kinds, strict=True):
        if tensor is not None and kind is not None and (found := _kind(tensor)) != kind:
            raise RuntimeError(
                f"what backward needs must be as in the forward pass, {_text(*kind)}, got {_text(*found)}: "
                "saved_tensors_hooks gave another tensor, or a parameter or input was given other data meanwhile, as "
                "by module.to()"
            )


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype]:
    return t.shape, t.dtype


def _text(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"a {dtype} Tensor of shape {tuple(shape)}"


_in_batches = torch._C._functorch.is_legacy_batchedtensor  # as is_grads_batched has them


def _plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are what kernels may read: in the backward pass there may be others than in the forward one."""
    given = [t for t in tensors if t is not None]
    odd = observer() or refusal(*given) or any([isinstance(t, TRACED) or _in_batches(t) for t in given])
    return not odd


def _with_memory(tensors: Sequence[Tensor | None]) -> None:
    """Raise for a tensor whose memory was let go, where torch's layers raise or crash."""
    for t in tensors:
        if t is not None and not t.data_ptr() and t.numel() and not t._is_zerotensor():
            raise RuntimeError(f"a Tensor of shape {tuple(t.shape)} has no memory: its storage was resized to 0 bytes")


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr())


KINDS = 8  # of cotangents that one call is made ready for


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Invocation, sequences: cpu.Sequences, *tensors):
        ctx.set_materialize_grads(False)
        return call.forward(ctx, sequences, tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        if torch.autograd._profiler_enabled():
            with record_function(f"fastcells::{ctx.call.cell.name}_backward"):
                return _backward(ctx, cotangents)
        return _backward(ctx, cotangents)


def _backward(ctx, cotangents):
    if torch.is_autocast_enabled("cpu"):  # products are to stay in the format of the tensors
        with torch.autocast("cpu", enabled=False):
            return _backward(ctx, cotangents)
    return None, None, *ctx.call.backward(ctx, cotangents)


def _keeps_graph() -> bool:
    """Whether this graph may be asked again (retain_graph=True), so that what was saved must survive."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()
