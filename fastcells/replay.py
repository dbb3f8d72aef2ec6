"""A call like the one before: where a layer is called again with tensors laid out the same way, one compiled method
(`cpu.again`) compares them with that call's, and what was prepared for it runs on the new addresses.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.nn.modules import module as module_of_torch
from torch.nn.utils.rnn import PackedSequence

from .cpu import again, script
from .cpu import layer as cpu
from .cpu.blocks import is_large
from .functional import Invocation, flat, same_memory, split
from .ragged import Ragged, reordered

if TYPE_CHECKING:
    from .cell import Cell
    from .dropin import Batch, Call, DropIn

SAME = again.Same(
    entries=[(vars(forward_ad), "_current_level"), (vars(script), "observer")],
    empty=[],
)
KEPT = 64  # calls of packed sequences
BRIEF = 1 << 18  # multiplications of a call that takes less time than other threads take to go on
OPTIONS = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"]
HOOKS = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
MODULE, CALL = torch.nn.Module, torch.nn.Module.__call__


class Replay:
    """A call of a module, ready to be made again. Each of `forward`, of (module, input), or with states, gives the
    result of the module's `forward`, or None where it is another call, or one for the next of them; `straight` does so
    in place of the module's call, where this does nothing but call `forward`. Each of `within` is the same of a call
    with lengths or `resets`, of (module, input, states or None) and, by name, these. There may be none: then it cannot
    be made again."""

    def __init__(self, module: DropIn, input: Tensor, hx: Any, call: Call, resets: bool) -> None:
        self.forward: tuple[Callable, ...] = ()
        self.straight: tuple[Callable, ...] = ()
        self.within: tuple[Callable, ...] = ()
        held = {id(t): name for name, t in module._parameters.items() if t is not None}
        used = [t for directions in call.parameters for t in flat(directions) if t is not None]
        names = [held.get(id(t), "") for t in used]
        packed, within = call.batch.batch_sizes is not None, call.batch.tokens is not None
        given = [t for t in input if t is not None] if packed and not within else [input]
        tensors = [*given, *(hx if type(hx) is tuple else () if hx is None else (hx,)), *used]
        training = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
        draws = len(call.parameters) > 1 and module.dropout and module.training
        stack = None if resets else Stack(call, tensors, training)
        whole = all([cpu.usable(t) is t for t in tensors]) if stack is None else stack.whole
        once = len({*map(id, used)}) == len(used)  # else what is put in one's place would be put in the other's
        own = module.__dict__  # where __setattr__ puts options; elsewhere they may change unseen
        elsewhere = any([name not in own and hasattr(module, name) for name in OPTIONS])
        if not (whole and all(names) and once) or elsewhere or (draws and not training):
            return
        taken = again.Taken(input, hx, module._parameters, names, tensors, 2 if within else 0)
        made = [None] if training or packed or stack is None else stack.made(module)
        finish: Callable | None = None
        if stack is None:
            finish = InLoop(call, 1, training)
        elif within:
            finish = InBatch(call, 1, training)
        elif packed:
            finish = Packed(call, len(given), training)
        elif training:
            finish = Training(input, call, stack.forwards)
        outside = call.cell.outside
        same = SAME._replace(entries=SAME.entries + ([r[:2] for r in outside.reads] if outside else []))
        methods = [again.method(same, taken, m) for m in made]
        if within or resets:
            self.within = _then(methods, finish)
            return
        self.forward = _then(methods, finish)
        plain = MODULE.__call__ is CALL and "forward" not in own and "_compiled_call_impl" not in own
        if type(module).forward in _beginning and plain:
            entries = [*same.entries, *_looked_up(type(module), "forward"), (own, "forward")]
            entries += [*_looked_up(MODULE, "__call__"), *_looked_up(MODULE, "_call_impl")]
            hooks = [own[name] for name in HOOKS] + [vars(module_of_torch)[f"_global{name}"] for name in HOOKS]
            straight = same._replace(entries=entries, empty=hooks)
            self.straight = _then([again.method(straight, taken, m) for m in made], finish)


class Stack:
    """The layers of a call, each prepared. whole: whether they take the tensors as the caller and the module hold them,
    with nothing made from them, and, of padded sequences, whether scripts are all of it.

    tensors: those of the input, the states, and all parameters that there are.
    """

    def __init__(self, call: Call, tensors: list[Tensor], training: bool) -> None:
        self.call, self.dtype = call, tensors[0].dtype
        cell, batch, states, layers, _ = call
        self.taken = len(tensors)
        rows = tensors[0].shape[:-1].numel()
        self.brief = rows * sum([t.numel() for t in tensors[1:]]) < BRIEF
        self.forwards: list[cpu.Forward] = []
        self.operands: list[list[again.Operand | None]] = []  # of each layer's script: states and parameters
        self.whole = True
        directions, x = len(layers[0]), batch.x
        sequences = whole = cpu.Sequences(x, batch.batch_sizes, tokens=batch.tokens)
        numbers = {id(t): k for k, t in enumerate(tensors)}
        for k, parameters in enumerate(layers):
            part = None if states is None else tuple([s[k * directions : (k + 1) * directions] for s in states])
            if batch.tokens is not None:
                sequences = whole.lying(k == 0, k == len(layers) - 1)
            forward, given = cpu.prepared(cell, x, part, parameters, sequences, training)
            used = flat(parameters)
            known: list[Tensor | None] = [x, *(part or ()), *used]
            self.whole &= len(given) == len(known) and all(map(same_memory, given, known))
            if not sequences.packed:
                # What Python makes otherwise is large, and slow in any case.
                self.whole &= forward.whole and not is_large(forward.y, self.dtype)
                at: list[again.Operand | None] = [
                    again.Operand(j, t.data_ptr() - tensors[j].data_ptr()) for j, t in enumerate(part or (), 1)
                ]
                self.operands.append([*at, *[None if t is None else again.Operand(numbers[id(t)]) for t in used]])
            self.forwards.append(forward)
            if k + 1 < len(layers):
                x = x.new_empty(*([sequences.total] if sequences.packed else x.shape[:-1]), forward.y[-1])

    def made(self, module: DropIn) -> list[again.Made]:
        """What the call makes, and how; and how while another thread's call has the memory that is kept."""
        cell, batch, _, layers, _ = self.call
        states = len(cell.states)

        def example(shape: Sequence[int]) -> Tensor:
            return torch.empty(shape, device="meta", dtype=self.dtype)

        rows = len(layers) * len(layers[0])
        examples = [example(self.forwards[-1].y), *(example((rows, *s[1:])) for s in self.forwards[-1].finals)]
        scripts: list[tuple[script.Script, list[again.Operand | None], script.Memory | None]] = []
        x = again.Operand(0)
        for k, (forward, at) in enumerate(zip(self.forwards, self.operands, strict=True)):
            y = again.Operand(self.taken)
            if k + 1 < len(layers):  # nobody sees it
                y = again.Operand(self.taken + len(examples))
                examples.append(example(forward.y))
            operands: list[again.Operand | None] = [x, *at, y]
            for j, shape in enumerate(forward.finals, 1):
                operands.append(again.Operand(self.taken + j, k * torch.Size(shape).numel() * self.dtype.itemsize))
            for shape in forward.shapes[1 + states :]:
                operands.append(again.Operand(self.taken + len(examples)))
                examples.append(example(shape))
            scripts.append((forward.script, operands, forward.script.memory()))
            x = y
        result = module._laid_out(None, batch, examples[0], tuple(examples[1 : 1 + states]))
        made = again.Made(scripts, examples, result, self.dtype, self.brief)
        return [made, made.keeping_nothing()] if made.keeps and not made.brief else [made]


def _looked_up(kind: type, name: str) -> list[tuple[dict, str]]:
    """Where Python looks for an attribute of a class, up to where it is found: dicts, of which `vars` shows a view."""
    found = list[tuple[dict, str]]()
    for base in kind.__mro__:
        if found and found[-1][1] in found[-1][0]:
            break
        found += [(names, name) for names in gc.get_referents(vars(base))]
    return found


def _then(methods: list[Callable | None], finish: Callable | None) -> tuple[Callable, ...]:
    """The methods that there are, and what their results go through that are not None."""
    there = [method for method in methods if method is not None]
    return tuple(there if finish is None else [partial(_both, method, finish) for method in there])


def _both(method: Callable, finish: Callable, module: DropIn, *given: Any, **options: Any) -> Any:
    tensors = method(module, *given)
    return None if tensors is None else finish(module, given[0], tensors, **options)


class Rest:
    """The rest of a call, of its tensors: those of the input, which are `first`, the states, and all parameters that
    there are."""

    def __init__(self, call: Call, first: int) -> None:
        _, batch, states, layers, _ = call
        self.call = call._replace(batch=batch._replace(x=torch.empty(0)), states=None, parameters=[])
        self.first, self.shapes = first, [s.shape for s in states or ()]
        each = count(first + len(self.shapes))
        self.numbers = [[[None if t is None else next(each) for t in flat([p])] for p in layer] for layer in layers]

    def states(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """As the engine takes them."""
        return tuple([tensors[k].view(shape) for k, shape in enumerate(self.shapes, self.first)]) or None

    def run(
        self, module: DropIn, input: Any, batch: Batch, x: Tensor, states: Any, tensors: Sequence[Tensor], run: Layer
    ) -> Any:
        """The result of the module's `forward`. run: gives what a layer makes, by its number, of its tensors."""
        parameters: Any = [
            [[None if k is None else tensors[k] for k in numbers] for numbers in layer] for layer in self.numbers
        ]
        each = count()

        def layer(
            _: Any, x: Tensor, states: Any, directions: Any, *others: Any, **tokens: Any
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            y, *finals = run(next(each), [x, *(states or ()), *(t for p in directions for t in p)])
            return y, tuple(finals)

        if len(parameters) == 1:
            return module._laid_out(input, batch, *layer(None, x, states, parameters[0]))
        call = self.call._replace(batch=batch._replace(x=x), states=states, parameters=parameters)
        return module._run(input, call, layer)


Layer = Callable[[int, list[Tensor | None]], Sequence[Tensor]]


class Training(Rest):
    """Of padded sequences, with gradients."""

    def __init__(self, input: Tensor, call: Call, forwards: list[cpu.Forward]) -> None:
        super().__init__(call, 1)
        self.same, given = call.batch.x is input, call.states is not None
        self.sequences = cpu.Sequences(call.batch.x, None)
        self.layers = [
            Invocation(call.cell, len(p), given, again=f) for p, f in zip(call.parameters, forwards, strict=True)
        ]

    def __call__(self, module: DropIn, input: Tensor, tensors: tuple[Tensor, ...]) -> Any:
        batch = self.call.batch if self.same else module._batch(input)
        run = lambda k, given: self.layers[k](given, self.sequences)  # noqa: E731
        return self.run(module, input, batch, input if self.same else batch.x, self.states(tensors), tensors, run)


def _ready(
    cell: Any, directions: int, given: bool, tensors: list, sequences: cpu.Sequences, training: bool
) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor | None], Sequence[Tensor]]:
    """A layer's call made ready for such tensors, those that it is given, and which are inputs besides x. given:
    whether there are states."""
    x, states, inputs, parameters = split(cell, directions, given, tensors)
    forward, whole = cpu.prepared(cell, x, states, parameters, sequences, training, inputs)
    return Invocation(cell, directions, given, again=forward) if training else forward.results, whole, inputs


class Packed(Rest):
    """Of packed sequences: there is a call made ready for each layer and each `Sequences.few`."""

    def __init__(self, call: Call, first: int, training: bool) -> None:
        super().__init__(call, first)
        self.training = training
        self.known: dict[tuple, Callable[..., Sequence[Tensor]]] = {}

    def __call__(self, module: DropIn, input: PackedSequence, tensors: tuple[Tensor, ...]) -> Any:
        rows, counts, *orders = tensors[: self.first]
        sequences = cpu.Sequences(rows, counts, orders)
        if not sequences.fit(rows):
            return None

        states = self.states(tensors)
        if states is not None:
            if states[0].shape[1] != sequences.rows:  # which is wrong
                return None
            states = reordered(states, input.sorted_indices)
        return self.of_layers(module, input, rows, states, tensors, sequences)

    def of_layers(
        self, module: DropIn, input: Any, x: Tensor, states: Any, tensors: Sequence[Tensor], sequences: cpu.Sequences
    ) -> Any:
        """The result of the module's `forward`."""
        whole, last = sequences, len(self.numbers) - 1

        def run(k: int, given: list[Tensor | None]) -> Sequence[Tensor]:
            sequences = whole if whole.tokens is None else whole.lying(k == 0, k == last)
            known = self.known.get((k, *sequences.few))
            return (known or self._made(k, given, sequences))(given, sequences)

        leading = self.call.batch.leading[0], whole.rows
        batch = self.call.batch._replace(
            size=whole.rows, leading=leading, batch_sizes=whole.counts, tokens=whole.tokens
        )
        return self.run(module, input, batch, x, states, tensors, run)

    def _made(self, k: int, given: list[Tensor | None], sequences: cpu.Sequences) -> Callable[..., Sequence[Tensor]]:
        """Make a layer's call ready."""
        made, *_ = _ready(self.call.cell, len(self.numbers[k]), bool(self.shapes), given, sequences, self.training)
        if len(self.known) >= KEPT:
            self.known.clear()
        self.known[(k, *sequences.few)] = made
        return made


PLAIN = object()  # in place of a result: that of the call without lengths


class InBatch(Packed):
    """Of padded sequences with lengths, which the layers pack."""

    def __call__(  # type: ignore[override]
        self, module: Any, input: Any, tensors: tuple[Tensor, ...], lengths: Any, reset: Any, reset_to: Any
    ) -> Any:
        if lengths is None or not (reset is None and reset_to is None and input.is_contiguous()):
            return None
        steps, size = input.shape[1::-1] if module.batch_first else input.shape[:2]
        ragged = Ragged(steps, size, lengths, None, batch_first=module.batch_first)
        if ragged.whole:
            return PLAIN
        if not ragged.tokens:
            return None
        states, directions = tensors[self.first : self.first + len(self.shapes)] or None, len(self.numbers[0])
        if states is not None and states[0].shape[1] != size:  # which is wrong
            return None
        sequences = cpu.Sequences(input, ragged.batch_sizes, tokens=ragged.layout)
        entered = ragged.enter(states, None, directions)
        y, finals = self.of_layers(module, input, input, entered, tensors, sequences)
        finals = ragged.leave(finals if isinstance(finals, tuple) else (finals,), states, directions)
        return y, finals if len(finals) > 1 else finals[0]


class InLoop(Rest):
    """Of padded sequences with resets, perhaps lengths, that the time loop does. There is a call made ready for each
    layer and each cell and kind of `Marked`, or None where it cannot be."""

    def __init__(self, call: Call, first: int, training: bool) -> None:
        super().__init__(call, first)
        self.training, self.sequences = training, cpu.Sequences(call.batch.x, None)
        self.known: dict[tuple, Callable[..., Sequence[Tensor]] | None] = {}

    def __call__(
        self, module: Any, input: Any, tensors: tuple[Tensor, ...], lengths: Any, reset: Any, reset_to: Any
    ) -> Any:
        if reset is None or isinstance(reset_to, (tuple, list, Tensor)):  # states that nobody has compared
            return None
        batch, states = module._batch(input), self.states(tensors)
        call = self.call._replace(batch=batch, states=states)
        marked = module._marked(call, lengths, reset, reset_to, module.batch_first)
        if marked is None:
            return None

        def run(k: int, given: list[Tensor | None]) -> Sequence[Tensor]:
            count = len(states or ())
            cell, x, entering, fed = marked.arguments(call.cell, given[0], tuple(given[1 : 1 + count]) or None)
            taken = [x, *(entering or ()), *fed, *given[1 + count :]]
            key = k, cell, marked.kind
            if key not in self.known:
                self.known[key] = self._made(k, cell, entering is not None, taken)
            made = self.known[key]
            if made is None:
                raise NotAgain
            y, _, *finals = made(taken, self.sequences)
            return y, *finals

        try:
            return self.run(module, input, batch, batch.x, states, tensors, run)
        except NotAgain:
            return None

    def _made(self, k: int, cell: Cell, given: bool, taken: list) -> Callable[..., Sequence[Tensor]] | None:
        """Make a layer's call ready. given: whether there are states."""
        directions = len(self.numbers[k])
        made, whole, inputs = _ready(cell, directions, given, taken, self.sequences, self.training)
        if len(whole) != len(taken) or not all(map(same_memory, whole, taken)):
            return None
        return None if self.training and any([t.requires_grad for t in inputs]) else made


class NotAgain(Exception):
    """The call has to be made as if for the first time."""


class Seen(NamedTuple):
    """The last calls of a module that were made as if for the first time: the shape of their input, of packed ones
    sequences and features, of those with lengths features; how many there were; and how to make them again."""

    shape: tuple[int, ...]
    calls: int = 1
    replay: Replay | None = None


Kind = tuple[bool, bool, bool]  # of calls: by grad mode, and whether there are lengths, or resets


class Replays:
    """The calls of one module that can be made again. A copy of a module begins with none."""

    def __init__(self) -> None:
        self.clear()
        _all.add(self)

    def clear(self) -> None:
        """Let go of all of them."""
        self.seen: dict[Kind, Seen] = {}
        self.forward: tuple[Callable, ...] = ()
        self.straight: tuple[Callable, ...] = ()
        self.within: tuple[Callable, ...] = ()

    def __reduce__(self) -> tuple:
        return Replays, ()

    def __setitem__(self, kind: Kind, seen: Seen) -> None:
        self.seen[kind] = seen
        replays = [seen.replay for seen in self.seen.values() if seen.replay is not None]
        self.forward = tuple([method for r in replays for method in r.forward])
        self.straight = tuple([method for r in replays for method in r.straight])
        self.within = tuple([method for r in replays for method in r.within])


_all: WeakSet[Replays] = WeakSet()
NONE = Replays()


def _forget_all() -> None:
    for replays in list(_all):
        replays.clear()


cpu.forgetting.append(_forget_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)  # where there are no threads to run on


def forget(module: DropIn) -> None:
    """Make the module's next calls as if they were its first."""
    module.__dict__.pop("_replays", None)


_beginning: set[Callable] = set()


def begins(forward: Callable) -> Callable:
    """Note a class's `forward` as one that begins with the module's replays, so that these may be made in its place."""
    _beginning.add(forward)
    return forward


def remember(module: DropIn, input: Any, hx: Any, call: Call, resets: bool = False) -> None:
    """Make the call ready to be made again, at its second time. resets: it is of padded sequences with these."""
    if again.interface() is None or script.observer is not None:
        return
    if profiled() or not (hx is None or type(hx) in (Tensor, tuple)):
        return
    replays = module._replays
    if replays is NONE:
        replays = module.__dict__["_replays"] = Replays()
    within = call.batch.tokens is not None
    kind = torch.is_grad_enabled(), within, resets
    seen = replays.seen.get(kind)
    shape: tuple[int, ...] = input.shape if call.batch.batch_sizes is None else call.batch.x.shape[-1:]
    if call.batch.batch_sizes is not None and not within:
        shape = call.batch.size, *shape
    if seen is None or seen.shape != shape or seen.replay is not None:
        replays[kind] = Seen(shape)
        return
    calls, replay = seen.calls + 1, None
    if not calls & (calls - 1):  # what cannot be made again is tried ever more rarely
        replay = Replay(module, input, hx, call, resets)
    replays[kind] = Seen(shape, calls, replay if replay is not None and (replay.forward or replay.within) else None)
