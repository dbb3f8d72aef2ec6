"""A call like the one before: where a layer is called again with tensors laid out the same way, all checks come down to
one comparison with that call's tensors, and what was prepared for it runs on the new addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack as function_modes
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.nn.modules import module as module_of_torch

from . import guards
from .cpu import layer as cpu
from .functional import Invocation, flat

if TYPE_CHECKING:
    from .dropin import Call, DropIn


class Replay:
    """A call of a module, ready to be made again. `whole` is false where that cannot be."""

    def __init__(self, module: DropIn, input: Tensor, hx: Any, call: Call) -> None:
        cell, batch, states, (parameters,), *_ = call
        used = flat(parameters)
        tensors: list[Tensor | None] = [batch.x, *(states or ()), *used]
        training = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
        sequences = cpu.Sequences(batch.x, None)
        forward, given = cpu.prepared(cell, batch.x, states, parameters, sequences, training)
        names = {id(t): name for name, t in module._parameters.items() if t is not None}
        self.names = [names.get(id(t), "") for t in used if t is not None]
        # Tensors that the script takes as the caller and the module hold them, nothing made from them.
        same = len(given) == len(tensors) and all(map(guards.same_memory, given, tensors))
        self.whole = same and forward.whole and all(self.names)
        self.same = guards.alike([input, *_listed(hx), *(t for t in used if t is not None)])
        self.absent = [1 + len(states or ()) + k for k, t in enumerate(used) if t is None]
        self.states, self.threads, self.script, self.end = type(hx), cpu.threads(), forward.script, 1 + len(cell.states)
        self.invocation = None
        if training:
            self.invocation = Invocation(cell, None, len(parameters), states is not None, again=forward)
        sample = torch.empty(1, 1, 0)
        result = module._result(None, batch, sample, sample)
        self.as_made = isinstance(result, tuple) and len(result) == 2 and result[0] is result[1] is sample
        self.batch, self.views = batch._replace(x=batch.x[:0]), list[torch.Size]()
        self.make = list(forward.make)
        if training:  # what is given and what is made are seen through views, where they are not as the caller's
            self.views = [] if batch.x is input else [t.shape for t in (batch.x, *(states or ()))]
        else:  # only their memory counts
            shapes = [(*batch.leading, s[-1]) for s in forward.finals]
            self.make[1 : 1 + len(shapes)] = [cpu.maker(s, input.dtype) for s in shapes]

    def __call__(self, module: DropIn, input: Any, hx: Any) -> Any:
        """The result of the call, or None where it is another one."""
        if type(hx) is not self.states:
            return None
        given = [input, *_listed(hx), *map(module._parameters.get, self.names)]
        if not self.same(*given) or cpu.threads() != self.threads:
            return None
        if function_modes() or profiled() or forward_ad._current_level >= 0:  # which leave no mark on tensors
            return None
        if self.views:
            given[0] = module._batch(input).x
            given[1 : len(self.views)] = [t.view(v) for t, v in zip(given[1:], self.views[1:], strict=False)]
        if self.invocation is None:
            made = [make() for make in self.make]
            addresses = [*map(data_ptr, given)]
            for k in self.absent:
                addresses.insert(k, 0)
            self.script.run([*addresses, *map(data_ptr, made)])
            y, finals = made[0], tuple(made[1 : self.end])
        else:
            for k in self.absent:
                given.insert(k, None)
            y, *results = self.invocation(given)
            finals = tuple(results)
            if len(self.batch.leading) != 2:
                finals = tuple([t.view(*self.batch.leading, t.shape[-1]) for t in finals])
        last = finals if len(finals) > 1 else finals[0]
        return (y, last) if self.as_made else module._result(None, self.batch, y, last)


data_ptr = Tensor.data_ptr


def _listed(hx: Any) -> Sequence[Any]:
    return hx if type(hx) is tuple else () if hx is None else (hx,)


_replays: WeakKeyDictionary[torch.nn.Module, dict[bool, Replay | torch.Size]] = WeakKeyDictionary()


def attempt(module: DropIn, input: Any, hx: Any) -> Any:
    """The result of the call if it is like one before, with gradients or without, else None."""
    replays = _replays.get(module)
    replay = None if replays is None else replays.get(torch.is_grad_enabled())
    return replay(module, input, hx) if type(replay) is Replay else None


def forget(module: DropIn) -> None:
    """Make the module's next calls as if they were its first."""
    _replays.pop(module, None)


_beginning: set[Callable] = set()


def begins(forward: Callable) -> Callable:
    """Note a class's `forward` as one that begins with an `attempt`, so that this may be made in its place."""
    _beginning.add(forward)
    return forward


MODULE, CALL = module_of_torch.Module, module_of_torch.Module.__call__


def straight(module: DropIn, input: Any, hx: Any = None, /) -> Any:
    """An `attempt` in place of the module's call, where this does nothing but call a `forward` that begins with one."""
    if type(module).forward not in _beginning:
        return None
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    if "forward" in own or "_compiled_call_impl" in own or MODULE.__call__ is not CALL:
        return None
    return None if module_of_torch._has_any_global_hook() else attempt(module, input, hx)


def remember(module: DropIn, input: Any, hx: Any, call: Call) -> None:
    """Make the call ready to be made again, at its second time."""
    if not guards.AVAILABLE or call.batch.batch_sizes is not None:
        return
    if len(call.parameters) > 1 or not (hx is None or type(hx) in (Tensor, tuple)):
        return
    replays = _replays.setdefault(module, {})
    kind = torch.is_grad_enabled()
    if replays.get(kind) != input.shape:
        replays[kind] = input.shape
        return
    replay = Replay(module, input, hx, call)
    if replay.whole:
        replays[kind] = replay
