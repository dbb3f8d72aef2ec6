"""The one differentiable call: a recurrent layer, all its directions, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import unrolled
from .cell import Cell
from .cpu import layer as cpu
from .cpu.engine import DTYPES

Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def refusal(*tensors: Tensor) -> str | None:
    """Why the engine does not take these tensors here and now, or None where it does."""
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.jit.is_tracing():
        return "torch.jit.trace is recording"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch dispatch or function mode is active"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return f"tensor subclass {type(t).__name__}"
        if not t.is_cpu:
            return f"device {t.device}"
        if t.dtype not in DTYPES:
            return f"dtype {t.dtype}"
        if t.layout is not torch.strided:
            return f"layout {t.layout}"
    return None


def layer(
    cell: Cell,
    x: Tensor,
    states: tuple[Tensor, ...] | None,
    parameters: Sequence[Parameters],
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a layer over time.

    cell: the recurrent cell. x: [T, N, I], any strides, or packed rows [total, I] with batch_sizes, an int64 tensor [T]
    that does not increase. states: None for zeros, or [D, N, H] for each of the cell's states (the first one [D, N, P]
    with a projection). parameters: (weight_ih [G * H, I], weight_hh [G * H, H or P], bias_ih, bias_hh [G * H] or None,
    weight_hr [P, H] or None) for each of the D directions; the second one runs backward in time.

    Returns y, [T, N, D * H] or [total, D * H], and the final states, shaped as the initial ones. Everything must be of
    one dtype, float32 or float64, on the CPU: see `refusal`. T and N must be at least 1.
    """
    flat = [w for p in parameters for w in p]
    tensors = [x, *(states or ()), *flat]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, *finals = _Layer.apply(cell, batch_sizes, len(parameters), states is not None, x, *(states or ()), *flat)
        return y, tuple(finals)
    sequences = cpu.Sequences(x, batch_sizes)
    y, finals, _ = cpu.forward(cell, x, states, parameters, sequences, training=False)
    return y, finals


def _split(cell: Cell, directions: int, given: bool, tensors: Sequence) -> tuple:
    """x, states or None, parameters"""
    x, *rest = tensors
    count = len(cell.states) if given else 0
    states, flat = rest[:count], rest[count:]
    return x, tuple(states) if given else None, [tuple(flat[5 * k : 5 * k + 5]) for k in range(directions)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, batch_sizes, directions, given, *tensors):
        x, states, parameters = _split(cell, directions, given, tensors)
        sequences = cpu.Sequences(x, batch_sizes)
        y, finals, saved = cpu.forward(cell, x, states, parameters, sequences, training=True)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.sequences, ctx.batch_sizes, ctx.plans = cell, sequences, batch_sizes, saved.plans
        ctx.directions, ctx.given, ctx.inputs = directions, given, len(tensors)
        ctx.save_for_backward(*tensors, y, *saved.slots, *saved.series)
        return y, *finals

    @staticmethod
    def backward(ctx, dy, *dstates):
        tensors = ctx.saved_tensors
        inputs, (y, *rest) = tensors[: ctx.inputs], tensors[ctx.inputs :]
        needs = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():  # create_graph: the derivative must itself be differentiable
            return None, None, None, None, *_differentiable(ctx, inputs, needs, dy, dstates)
        x, states, parameters = _split(ctx.cell, ctx.directions, ctx.given, inputs)
        count = len(states or ())
        wanted = cpu.Wanted(needs[0], any(needs[1 : 1 + count]), any(needs[1 + count :]))
        dx, d0, dparameters = cpu.backward(
            ctx.cell,
            x,
            states,
            y,
            parameters,
            ctx.sequences,
            cpu.Saved(rest[: ctx.directions], rest[ctx.directions :], ctx.plans),
            dy,
            dstates,
            wanted,
            overwrite=not _keeps_graph(),
        )
        found = [dx, *(d0 if ctx.given else ()), *(g for p in dparameters for g in p)]
        return None, None, None, None, *(g if need else None for g, need in zip(found, needs, strict=True))


def _keeps_graph() -> bool:
    """Whether this graph may be asked again (retain_graph=True), so that what was saved must survive."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _differentiable(ctx, inputs, needs, dy, dstates) -> list[Tensor | None]:
    """The gradients as functions of inputs and cotangents, by autograd through the cell's torch form."""
    with torch.enable_grad():
        x, states, parameters = _split(ctx.cell, ctx.directions, ctx.given, inputs)
        y, finals = unrolled.layer(ctx.cell, x, states, parameters, ctx.batch_sizes)
        outputs = [(o, d) for o, d in zip((y, *finals), (dy, *dstates), strict=True) if d is not None]
        asked = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in outputs], asked, [d for _, d in outputs], create_graph=True, allow_unused=True
            )
        )
    return [next(grads) if need else None for need in needs]
