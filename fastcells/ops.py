"""The differentiable call as registered operations, for all that looks at calls: compile, export, torch.func, modes.

`fastcells::layer` is `functional.layer` with flat arguments, `fastcells::layer_backward` its gradient. Plain eager
calls do not come here; both ways end in the same kernels. Under forward-mode differentiation, and for derivatives of
derivatives, the layer is taken apart into torch's operations (`unrolled`).

`fastcells::layer_of_lengths` is the call with lengths in exported programs: how many tokens there are is in the data.
Its gradient runs the layer anew, and is not itself differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.utils import _pytree as pytree

from . import functional, unrolled
from .cell import Cell, registered
from .cpu import layer as cpu
from .derivation import build

LIBRARY = torch.library.Library("fastcells", "DEF")
"""Holds the registrations for as long as the package is loaded."""

CALL = "str cell, Tensor x, Tensor[] states, Tensor[] inputs, Tensor?[] parameters, Tensor? batch_sizes, int directions"
"""The arguments of a call. cell: its `Cell.key`. states: none of them for zeros. parameters: `functional.flat`."""

LIBRARY.define(f"layer({CALL}, bool training=False) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    f"layer_backward({CALL}, bool feed, Tensor[] kept, Tensor?[] cotangents, bool[] wanted) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
OF_LENGTHS = "str cell, Tensor x, Tensor[] states, Tensor?[] parameters, Tensor lengths, int directions"
LIBRARY.define(f"layer_of_lengths({OF_LENGTHS}) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
LIBRARY.define(
    f"layer_of_lengths_backward({OF_LENGTHS}, Tensor?[] cotangents) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag
)
OPS: Any = torch.ops.fastcells


class OpCall:
    """The arguments of an operation, as `functional.layer` has them."""

    def __init__(
        self,
        cell: str,
        x: Tensor,
        states: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor | None],
        batch_sizes: Tensor | None,
        directions: int,
    ) -> None:
        self.cell: Cell = registered(cell)
        self.batch_sizes = batch_sizes
        tensors = [x, *states, *inputs, *parameters]
        self.x, self.states, self.inputs, self.parameters = functional.split(
            self.cell, directions, bool(states), tensors
        )
        self.feed = bool(inputs)  # whether what is kept has room for the gradients of inputs

    def check(self) -> None:
        functional.check(self.cell, self.x, self.states, self.parameters, self.batch_sizes, self.inputs)

    def results(self) -> Iterator[Tensor]:
        """Empty tensors like y and the final states."""
        hidden, projection = self.hidden, self.parameters[0][4]
        width = hidden if projection is None else projection.shape[0]
        count, rows = len(self.parameters), self._rows()
        yield self.x.new_empty(*self.x.shape[:-1], count * width)
        for j in range(len(self.cell.states)):
            yield self.x.new_empty(count, rows, hidden if j else width)

    def kept(self, feed: bool) -> Iterator[Tensor]:
        """Empty tensors like those that the forward pass keeps for the backward pass, besides y."""
        programs = build(self.cell, self.parameters[0][4] is not None, feed)
        total = self.x.shape[0] if self.batch_sizes is not None else self.x.shape[0] * self.x.shape[1]
        for _ in self.parameters:
            yield self.x.new_empty(total, programs.width(self.hidden))
        for _ in range(len(self.parameters) * (len(programs.states) - 1)):
            yield self.x.new_empty(total, self.hidden)

    @property
    def hidden(self) -> Any:
        """H"""
        return self.parameters[0][0].shape[0] // len(self.cell.gates)

    def unrolled(self) -> tuple[Tensor, ...]:
        """y and the final states by torch's operations, which may be differentiated in every way."""
        y, finals = unrolled.layer(self.cell, self.x, self.states, self.parameters, self.batch_sizes, self.inputs)
        return y, *finals

    def unrolled_gradients(self, cotangents: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
        """What `layer_backward` gives, likewise."""
        states, flat = self.states or (), functional.flat(self.parameters)
        tensors = [self.x, *states, *self.inputs, *flat]
        split = _Split(1, len(states), len(self.inputs), len(flat))
        given = [k for k, d in enumerate(cotangents) if d is not None]

        def results(*values: Tensor) -> tuple[Tensor, ...]:
            there = iter(values)
            (x,), states, inputs, flat = split([None if t is None else next(there) for t in tensors])
            made = OpCall(self.cell.key, x, states, inputs, flat, self.batch_sizes, len(self.parameters)).unrolled()
            return tuple(made[k] for k in given)

        pull_back: Any = torch.func.vjp(results, *(t for t in tensors if t is not None))[1]
        found = iter(pull_back(tuple(cotangents[k] for k in given)))
        return _chosen(wanted, *split([None if t is None else next(found) for t in tensors]))

    def _rows(self) -> Any:
        """N"""
        if self.batch_sizes is None:
            return self.x.shape[1]
        if self.states is not None:
            return self.states[0].shape[1]
        if self.batch_sizes.device.type == "meta" or type(self.batch_sizes) is not Tensor:
            return torch.library.get_ctx().new_dynamic_size()  # in the data, which a fake has not
        return int(self.batch_sizes[0])


# What computes


def _layer(cell, x, states, inputs, parameters, batch_sizes, directions, training=False) -> list[Tensor]:
    call = OpCall(cell, x, states, inputs, parameters, batch_sizes, directions)
    call.check()
    sequences = cpu.Sequences(x, batch_sizes)
    if not training:
        y, finals, _ = cpu.forward(call.cell, x, call.states, call.parameters, sequences, False, inputs)
        return [y, *finals]
    y, finals, saved = cpu.forward(call.cell, x, call.states, call.parameters, sequences, True, inputs, call.feed)
    return [y, *finals, *saved.slots, *saved.series]


def _layer_backward(
    cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
) -> list[Tensor]:
    call = OpCall(cell, x, states, inputs, parameters, batch_sizes, directions)
    call.check()
    y, *finals = call.results()
    _check_like("cotangents", cotangents, [y, *finals], optional=True)
    _check_like("kept", kept, [y, *call.kept(feed)])
    sequences = cpu.Sequences(x, batch_sizes)
    plan = cpu.planned(call.cell, call.parameters[0], sequences, directions, training=True)
    saved = cpu.Saved(kept[0], kept[1 : 1 + directions], kept[1 + directions :], plan)
    found = cpu.backward(
        call.cell,
        x,
        call.states,
        kept[0],
        call.parameters,
        sequences,
        saved,
        cotangents[0],
        cotangents[1:],
        cpu.Wanted(wanted[0], wanted[1], wanted[3]),
        overwrite=False,
        inputs=inputs,
        feed=feed,
    )
    given = [g for g, p in zip([g for p in found.parameters for g in p], parameters, strict=True) if p is not None]
    return _chosen(wanted, [found.x], found.states if call.states else [], found.inputs, given)


def _check_like(name: str, given: Sequence[Tensor | None], expected: Sequence[Tensor], optional: bool = False) -> None:
    """Kernels go by raw addresses."""
    if len(given) != len(expected):
        raise ValueError(f"{name} must be {len(expected)} Tensors, got {len(given)}")
    for k, (t, like) in enumerate(zip(given, expected, strict=True)):
        if t is None and optional:
            continue
        if t is None or t.shape != like.shape or t.dtype != like.dtype or t.device != like.device:
            want = f"a {like.dtype} Tensor of shape {tuple(like.shape)}"
            got = "None" if t is None else f"{t.dtype} of shape {tuple(t.shape)}"
            raise ValueError(f"{name}[{k}] must be {want} on {like.device}, got {got}")


def _chosen(wanted: Sequence[bool], *groups: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that an operation returns: of x, states, inputs, parameters, where wanted and there are any."""
    return [g for group, want in zip(groups, wanted, strict=True) if want for g in group if g is not None]


def _layer_of_lengths(cell, x, states, parameters, lengths, directions) -> list[Tensor]:
    call = OpCall(cell, x, states, [], parameters, None, directions)
    y, finals = functional.layer(call.cell, call.x, call.states, call.parameters, lengths=lengths)
    return [y, *finals]


def _layer_of_lengths_backward(cell, x, states, parameters, lengths, directions, cotangents) -> list[Tensor]:
    """Of x, states and those parameters that are given."""
    split = _Split(1, len(states), len(parameters))
    tensors = [None if t is None else t.detach().requires_grad_() for t in (x, *states, *parameters)]
    (x,), states, parameters = split(tensors)
    with torch.inference_mode(False), torch.enable_grad():  # the former: although within an operation
        results = _layer_of_lengths(cell, x, states, parameters, lengths, directions)
    given = [k for k, d in enumerate(cotangents) if d is not None]
    inputs = [t for t in tensors if t is not None]
    return list(torch.autograd.grad([results[k] for k in given], inputs, [cotangents[k] for k in given]))


LIBRARY.impl("layer", _layer, "CPU")
LIBRARY.impl("layer_backward", _layer_backward, "CPU")
LIBRARY.impl("layer_of_lengths", _layer_of_lengths, "CPU")
LIBRARY.impl("layer_of_lengths_backward", _layer_of_lengths_backward, "CPU")


# What stands in for them while something traces


@torch.library.register_fake("fastcells::layer", lib=LIBRARY)
def _(cell, x, states, inputs, parameters, batch_sizes, directions, training=False):
    call = OpCall(cell, x, states, inputs, parameters, batch_sizes, directions)
    return [*call.results(), *(call.kept(call.feed) if training else ())]


@torch.library.register_fake("fastcells::layer_backward", lib=LIBRARY)
def _(cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted):
    def like(t):
        return None if t is None else t.new_empty(t.shape)

    return _chosen(wanted, *([like(t) for t in group] for group in ([x], states, inputs, parameters)))


@torch.library.register_fake("fastcells::layer_of_lengths", lib=LIBRARY)
def _(cell, x, states, parameters, lengths, directions):
    return [*OpCall(cell, x, states, [], parameters, None, directions).results()]


@torch.library.register_fake("fastcells::layer_of_lengths_backward", lib=LIBRARY)
def _(cell, x, states, parameters, lengths, directions, cotangents):
    return [t.new_empty(t.shape) for t in (x, *states, *parameters) if t is not None]


# Differentiation


def _below_autograd(op: Any, *args: Any) -> Any:
    """The operation without this level's differentiation; those of torch.func around it, if any, go on."""
    forward_mode = torch.autograd.forward_ad._set_fwd_grad_enabled(True)
    with torch.enable_grad(), forward_mode, torch._C._AutoDispatchBelowAutograd():
        return op(*args)


Function: Any = torch.autograd.function._SingleLevelFunction
"""torch.autograd.Function, but applied beneath the dispatcher, where torch.func has taken its levels apart already."""


def _apply(function: Any, *args: Any) -> list[Tensor]:
    with enable_single_level_autograd_function():
        return list(function.apply(*args))


def _differentiable(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward_mode(tensors: Sequence[Tensor | None]) -> bool:
    """Whether there are tangents; graphs that torch.compile makes do not enter a level in Python."""
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return any(t is not None and torch._VF._unpack_dual(t, level=0).tangent is not None for t in tensors)


class _Split:
    """How the tensors of a call lie in one list, by the number of each kind: x, states, inputs, parameters and so on,
    as the operation has them."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def __call__(self, tensors: Sequence) -> Any:
        rest = list(tensors)
        return [[rest.pop(0) for _ in range(n)] for n in self.counts]


class _Layer(Function):
    @staticmethod
    def forward(ctx, cell, batch_sizes, directions, training, split, *tensors):
        (x,), states, inputs, parameters = split(tensors)
        results = _below_autograd(OPS.layer, cell, x, states, inputs, parameters, batch_sizes, directions, True)
        count = 1 + len(registered(cell).states)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.directions, ctx.split = cell, directions, split
        ctx.save_for_backward(batch_sizes, *tensors, results[0], *results[count:])
        if not training:
            return tuple(results[:count])
        ctx.mark_non_differentiable(*results[count:])  # the gradient's own derivative does not go through them
        return tuple(results)

    @staticmethod
    def backward(ctx, *cotangents):
        batch_sizes, *saved = ctx.saved_tensors
        count = sum(ctx.split.counts)
        needs = ctx.needs_input_grad[5:]
        cotangents = cotangents[: 1 + len(registered(ctx.cell).states)]
        (x,), states, inputs, parameters = ctx.split(saved)
        call = ctx.cell, x, states, inputs, parameters, batch_sizes, ctx.directions
        grads = functional.registered_gradients(call, bool(inputs), saved[count:], list(cotangents), needs)
        return None, None, None, None, None, *grads


class _LayerOfLengths(Function):
    @staticmethod
    def forward(ctx, cell, lengths, directions, split, *tensors):
        (x,), states, parameters = split(tensors)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.directions, ctx.split = cell, directions, split
        ctx.save_for_backward(lengths, *tensors)
        return tuple(_below_autograd(OPS.layer_of_lengths, cell, x, states, parameters, lengths, directions))

    @staticmethod
    def backward(ctx, *cotangents):
        lengths, *tensors = ctx.saved_tensors
        (x,), states, parameters = ctx.split(tensors)
        call = ctx.cell, x, states, parameters, lengths, ctx.directions
        found = iter(OPS.layer_of_lengths_backward(*call, cotangents))
        grads = [None if t is None else next(found) for t in tensors]
        return None, None, None, None, *(g if n else None for g, n in zip(grads, ctx.needs_input_grad[4:], strict=True))


class _Gradient(Function):
    @staticmethod
    def forward(ctx, cell, batch_sizes, directions, feed, wanted, split, *tensors):
        (x,), states, inputs, parameters, kept, cotangents = split(tensors)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.directions, ctx.wanted, ctx.split = cell, directions, wanted, split
        ctx.save_for_backward(batch_sizes, *tensors)
        args = cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
        return tuple(_below_autograd(OPS.layer_backward, *args))

    @staticmethod
    def backward(ctx, *second):
        batch_sizes, *tensors = ctx.saved_tensors
        *_, kept, _ = ctx.split(range(len(tensors)))
        asked = [i for i, need in enumerate(ctx.needs_input_grad[6:]) if need and i not in kept]
        given = [k for k, s in enumerate(second) if s is not None]
        if not given or not asked:
            return (None,) * len(ctx.needs_input_grad)

        def first(*values: Tensor) -> tuple[Tensor, ...]:
            changed = dict(zip(asked, values, strict=True))
            (x,), states, inputs, parameters, _, cotangents = ctx.split(
                [changed.get(i, t) for i, t in enumerate(tensors)]
            )
            call = OpCall(ctx.cell, x, states, inputs, parameters, batch_sizes, ctx.directions)
            grads = call.unrolled_gradients(cotangents, ctx.wanted)
            return tuple(grads[k] for k in given)

        pull_back: Any = torch.func.vjp(first, *(tensors[i] for i in asked))[1]
        found = dict(zip(asked, pull_back(tuple(second[k] for k in given)), strict=True))
        return None, None, None, None, None, None, *(found.get(i) for i in range(len(tensors)))


def _layer_autograd(cell, x, states, inputs, parameters, batch_sizes, directions, training=False):
    states, inputs = states or (), inputs or ()  # a package of AOTInductor has None for what is empty
    tensors = [x, *states, *inputs, *parameters]
    if _forward_mode(tensors):
        return [*OpCall(cell, x, states, inputs, parameters, batch_sizes, directions).unrolled()]
    if _differentiable(tensors):
        split = _Split(1, len(states), len(inputs), len(parameters))
        return _apply(_Layer, cell, batch_sizes, directions, training, split, *tensors)
    return _below_autograd(OPS.layer, cell, x, states, inputs, parameters, batch_sizes, directions, training)


def _layer_backward_autograd(
    cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
):
    states, inputs = states or (), inputs or ()
    tensors = [x, *states, *inputs, *parameters, *kept, *cotangents]
    if _forward_mode(tensors):
        return OpCall(cell, x, states, inputs, parameters, batch_sizes, directions).unrolled_gradients(
            cotangents, wanted
        )
    if _differentiable(tensors):
        split = _Split(1, len(states), len(inputs), len(parameters), len(kept), len(cotangents))
        return _apply(_Gradient, cell, batch_sizes, directions, feed, wanted, split, *tensors)
    args = cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
    return _below_autograd(OPS.layer_backward, *args)


def _layer_of_lengths_autograd(cell, x, states, parameters, lengths, directions):
    states = states or ()
    tensors = [x, *states, *parameters]
    if _differentiable(tensors):
        split = _Split(1, len(states), len(parameters))
        return _apply(_LayerOfLengths, cell, lengths, directions, split, *tensors)
    return _below_autograd(OPS.layer_of_lengths, cell, x, states, parameters, lengths, directions)


def _layer_of_lengths_backward_autograd(cell, x, states, parameters, lengths, directions, cotangents):
    if _differentiable([x, *states, *parameters, *cotangents]):
        raise RuntimeError("an exported program has no second derivatives of layers with lengths")
    args = cell, x, states, parameters, lengths, directions, cotangents
    return _below_autograd(OPS.layer_of_lengths_backward, *args)


LIBRARY.impl("layer", _layer_autograd, "Autograd")
LIBRARY.impl("layer_backward", _layer_backward_autograd, "Autograd")
LIBRARY.impl("layer_of_lengths", _layer_of_lengths_autograd, "Autograd")
LIBRARY.impl("layer_of_lengths_backward", _layer_of_lengths_backward_autograd, "Autograd")


# Autocast: computed in float32 (or float64), whatever autocast would have its products be

for _name in ("layer", "layer_backward", "layer_of_lengths", "layer_of_lengths_backward"):
    torch.library.register_autocast(f"fastcells::{_name}", "cpu", torch.float32, lib=LIBRARY)


# vmap


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[..., rows, features] with a mapped dimension -> [..., rows * B, features], the mapped one the faster."""
    if t is None:
        return None
    mapped = t.movedim(dim, -2) if dim is not None else t.unsqueeze(-2).expand(*t.shape[:-1], size, t.shape[-1])
    return mapped.flatten(-3, -2)


def _folds(tensors: Sequence[Tensor | None], dims: Sequence[int | None], size: int) -> list[Tensor | None]:
    return [_fold(t, d, size) for t, d in zip(tensors, dims, strict=True)]


def _unfold(t: Tensor, size: int) -> tuple[Tensor, int]:
    """The way back: the tensor and its mapped dimension."""
    return t.unflatten(-2, (-1, size)), t.dim() - 1


def _one_by_one(op: Callable, size: int, in_dims: Any, args: Sequence) -> tuple[list[Tensor], list[int]]:
    """The operation for each index of the mapped dimension."""
    flat, spec = pytree.tree_flatten(list(args))
    dims = pytree.tree_leaves(list(in_dims), is_leaf=lambda d: d is None)
    results = []
    for i in range(size):
        chosen = [v if d is None else v.select(d, i) for v, d in zip(flat, dims, strict=True)]
        results.append(op(*pytree.tree_unflatten(chosen, spec)))
    return [torch.stack(r) for r in zip(*results, strict=True)], [0] * len(results[0])


def _any_mapped(dims: Any) -> bool:
    return any(d is not None for d in pytree.tree_leaves(dims))


def _layer_vmap(info, in_dims, cell, x, states, inputs, parameters, batch_sizes, directions, training=False):
    size = info.batch_size
    dims = (*in_dims, None)[:8]
    if _any_mapped(dims[4:6]):
        args = cell, x, states, inputs, parameters, batch_sizes, directions, training
        return _one_by_one(OPS.layer, size, dims, args)
    counts = None if batch_sizes is None else batch_sizes * size
    results = OPS.layer(
        cell,
        _fold(x, dims[1], size),
        _folds(states, dims[2], size),
        _folds(inputs, dims[3], size),
        parameters,
        counts,
        directions,
        training,
    )
    unfolded = [_unfold(r, size) for r in results]
    return [r for r, _ in unfolded], [d for _, d in unfolded]


def _layer_backward_vmap(
    info, in_dims, cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
):
    size = info.batch_size
    if wanted[3] or _any_mapped(in_dims[4:6]):  # weights have a gradient for each index
        args = cell, x, states, inputs, parameters, batch_sizes, directions, feed, kept, cotangents, wanted
        return _one_by_one(OPS.layer_backward, size, in_dims, args)
    counts = None if batch_sizes is None else batch_sizes * size

    results = OPS.layer_backward(
        cell,
        _fold(x, in_dims[1], size),
        _folds(states, in_dims[2], size),
        _folds(inputs, in_dims[3], size),
        parameters,
        counts,
        directions,
        feed,
        _folds(kept, in_dims[8], size),
        _folds(cotangents, in_dims[9], size),
        wanted,
    )
    unfolded = [_unfold(r, size) for r in results]
    return [r for r, _ in unfolded], [d for _, d in unfolded]


torch.library.register_vmap("fastcells::layer", _layer_vmap, lib=LIBRARY)
torch.library.register_vmap("fastcells::layer_backward", _layer_backward_vmap, lib=LIBRARY)
