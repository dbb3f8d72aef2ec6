"""A call like the one before: where a layer is called again with tensors laid out the same way, one compiled method
(`cpu.again`) compares them with that call's, and what was prepared for it runs on the new addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack as function_modes
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.nn.modules import module as module_of_torch

from . import guards
from .cpu import again, script, team
from .cpu import layer as cpu
from .functional import Invocation, flat

if TYPE_CHECKING:
    from .dropin import Call, DropIn

SAME = again.Same(
    answers=[torch.is_grad_enabled, torch.get_num_threads, function_modes, profiled],  # the last two leave no mark
    attributes=[(forward_ad, "_current_level"), (script, "observer"), (team, "_lost")],
    empty=[],
    own=[],
)
HOOKS = [
    hooks for name, hooks in vars(module_of_torch).items() if name.startswith("_global_") and isinstance(hooks, dict)
]
OWN_HOOKS = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
MODULE, CALL = torch.nn.Module, torch.nn.Module.__call__


class Replay:
    """A call of a module, ready to be made again. `forward(module, input)`, or with states, gives the result of the
    module's `forward`, or None where it is another call; `straight` does so in place of the module's call, where this
    does nothing but call `forward`. Either may be None: then it cannot be made again."""

    def __init__(self, module: DropIn, input: Tensor, hx: Any, call: Call) -> None:
        self.forward = self.straight = None
        cell, batch, states, (parameters,), *_ = call
        used = flat(parameters)
        tensors: list[Tensor | None] = [batch.x, *(states or ()), *used]
        training = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
        sequences = cpu.Sequences(batch.x, None)
        forward, given = cpu.prepared(cell, batch.x, states, parameters, sequences, training)
        registered = {id(t): name for name, t in module._parameters.items() if t is not None}
        names = [registered.get(id(t), "") for t in used if t is not None]
        # Tensors that the script takes as the caller and the module hold them, nothing made from them.
        same = len(given) == len(tensors) and all(map(guards.same_memory, given, tensors))
        if not (same and forward.whole and all(names)):
            return
        listed = hx if type(hx) is tuple else () if hx is None else (hx,)
        alike = guards.alike([input, *listed, *(t for t in used if t is not None)])
        places = [k for k, t in enumerate(tensors) if t is not None]
        taken = again.Taken(hx, names, alike, places, len(tensors))
        if training:
            made, finish = None, Training(module, input, call, forward).__call__
        else:
            examples = [torch.empty(shape, device="meta") for shape in forward.shapes]
            finals = tuple([t.view(*batch.leading, t.shape[-1]) for t in examples[1 : 1 + len(cell.states)]])
            result = module._result(None, batch, examples[0], finals if len(finals) > 1 else finals[0])
            made, finish = again.Made(forward.script, examples, result, input.dtype), None
        self.forward = _then(again.method(SAME, taken, made), finish)
        own = module.__dict__
        if type(module).forward in _beginning and "forward" not in own and "_compiled_call_impl" not in own:
            attributes = [*SAME.attributes, (type(module), "forward"), (MODULE, "__call__")]
            straight = SAME._replace(attributes=attributes, empty=HOOKS, own=OWN_HOOKS)
            self.straight = _then(again.method(straight, taken, made), finish)


def _then(method: Callable | None, finish: Callable | None) -> Callable | None:
    """The method, and what its results go through that are not None."""
    if method is None or finish is None:
        return method

    def both(module: DropIn, *given: Any) -> Any:
        tensors = method(module, *given)
        return None if tensors is None else finish(module, given[0], tensors)

    return both


class Training:
    """The rest of a call with gradients, of its operands."""

    def __init__(self, module: DropIn, input: Tensor, call: Call, forward: cpu.Forward) -> None:
        cell, batch, states, parameters, _ = call
        self.invocation = Invocation(cell, None, len(parameters[0]), states is not None, again=forward)
        # What is given is seen through views, where these are not as the caller's.
        self.views = [] if batch.x is input else [t.shape for t in (batch.x, *(states or ()))]
        self.batch = batch._replace(x=batch.x[:0])

    def __call__(self, module: DropIn, input: Tensor, tensors: tuple[Tensor | None, ...]) -> Any:
        given = list(tensors)
        if self.views:
            given[0] = module._batch(input).x
            given[1 : len(self.views)] = [t.view(v) for t, v in zip(given[1:], self.views[1:], strict=False)]
        y, *finals = self.invocation(given)
        if len(self.batch.leading) != 2:
            finals = [t.view(*self.batch.leading, t.shape[-1]) for t in finals]
        return module._result(None, self.batch, y, tuple(finals) if len(finals) > 1 else finals[0])


class Replays:
    """The calls of one module that can be made again. A copy of a module begins with none."""

    def __init__(self) -> None:
        self.known: dict[bool, Replay | torch.Size] = {}  # by grad mode; the shape of the input if seen but once
        self.forward: tuple[Callable, ...] = ()
        self.straight: tuple[Callable, ...] = ()

    def __reduce__(self) -> tuple:
        return Replays, ()

    def __setitem__(self, kind: bool, replay: Replay | torch.Size) -> None:
        self.known[kind] = replay
        replays = [r for r in self.known.values() if type(r) is Replay]
        self.forward = tuple([r.forward for r in replays if r.forward is not None])
        self.straight = tuple([r.straight for r in replays if r.straight is not None])


NONE = Replays()


def forget(module: DropIn) -> None:
    """Make the module's next calls as if they were its first."""
    module.__dict__.pop("_replays", None)


_beginning: set[Callable] = set()


def begins(forward: Callable) -> Callable:
    """Note a class's `forward` as one that begins with the module's replays, so that these may be made in its place."""
    _beginning.add(forward)
    return forward


def remember(module: DropIn, input: Any, hx: Any, call: Call) -> None:
    """Make the call ready to be made again, at its second time."""
    if not guards.AVAILABLE or call.batch.batch_sizes is not None:
        return
    if len(call.parameters) > 1 or not (hx is None or type(hx) in (Tensor, tuple)):
        return
    replays = module.__dict__.setdefault("_replays", Replays())
    kind = torch.is_grad_enabled()
    if replays.known.get(kind) != input.shape:
        replays[kind] = input.shape
        return
    replay = Replay(module, input, hx, call)
    if replay.forward is not None:
        replays[kind] = replay
