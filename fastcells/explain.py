"""Which path a call takes, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import rnn as original

from .cell import Cell
from .convert import left
from .cpu.layer import Sequences, planned, suited
from .dropin import Call, DropIn, Mistake, NotTaken
from .functional import Parameters, observer, witness
from .nn import OverTime


@dataclass(frozen=True)
class Explanation:
    """route: "engine" or "torch". reasons: sentences, most general first; `str()` prints them."""

    module: str
    route: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.module}: {self.route}", *(f"  {r}" for r in self.reasons)])


def explain(module: torch.nn.Module, input: Any, hx: Any = None, **options: Any) -> Explanation:
    """Which path `module(input, hx, **options)` would take now, and why; no layer is run.

    module: a layer or cell of `fastcells.nn` (or of torch.nn, which always takes torch's). options: those of a layer's
    forward: lengths, reset, and so on. Raises TypeError for other modules and options, and what the call raises for
    options that are wrong.
    """
    name = f"{type(module).__name__}({module.extra_repr()})"
    if isinstance(module, (original.RNNBase, original.RNNCellBase)) and not isinstance(module, DropIn):
        reason = left(module)
        change = (
            "fastcells.convert would change that" if reason is None else f"fastcells.convert leaves it, as {reason}"
        )
        return Explanation(name, "torch", (f"a torch.nn module: {change}",))
    if not isinstance(module, DropIn):
        raise TypeError(f"explain: module must be a recurrent layer or cell, got {type(module).__name__}")
    found = examined(module, input, hx, options)
    return Explanation(name, found.route, found.reasons)


class Examined(NamedTuple):
    """What an `Explanation` says. input: what the layers take, packed where they are not told of lengths; layers: those
    that the engine runs."""

    route: str
    reasons: tuple[str, ...]
    input: Any
    layers: Sequence[Layer] = ()


def examined(module: DropIn, input: Any, hx: Any, options: dict[str, Any]) -> Examined:
    """`explain` of a module of ours."""
    known = signature(OverTime.forward if isinstance(module, OverTime) else DropIn.forward).parameters
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"explain: options must be arguments of {type(module).__name__}'s calls, got {unknown[0]}")
    with torch.random.fork_rng(devices=[]):  # masks are drawn as in a call
        return _examined(module, input, hx, options)


def _examined(module: DropIn, input: Any, hx: Any, options: dict[str, Any]) -> Examined:
    within, third = None, bool(options.get("return_cell_states"))
    if isinstance(module, OverTime):
        input, hx, within, _ = module._resolved(input, hx, **options)
    form = "the cell as a loop of torch operations"
    try:
        call, *runner = within or (module._read(input, hx),)
    except NotTaken as reason:
        if not (third or module._in_torch_form()):
            form = "torch's own implementation"
        wrong = isinstance(reason, Mistake)
        text = f"{form}, if the call is no mistake: {reason}" if wrong else f"{form}: {reason}"
        return Examined("torch", (text,), input)
    with nullcontext() if call.dtype is None else torch.autocast("cpu", enabled=False):  # as it runs then
        observed = observer()
    if observed is not None:
        way = ("torch", form) if third else ("engine", "the registered operation fastcells::layer")
        return Examined(way[0], (f"{way[1]}: {observed}",), input)
    run: Any = partial(module._run, return_cell_states=True) if third else module._run
    layers = _layers(partial(run, input, call, *runner))
    return Examined("engine", tuple(_reasons(call, layers, bool(runner))), input, layers)


class Layer(NamedTuple):
    """A layer that a call runs. graph: whether a gradient is wanted; keeps: and the gates and states kept."""

    cell: Cell
    x: Tensor
    parameters: list[Parameters]
    counts: Tensor | None
    recompute: bool
    graph: bool
    keeps: bool

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.x, self.counts)

    def kept(self) -> str:
        if not self.graph:
            return "no gradient is wanted: nothing is kept"
        if self.recompute:
            return "a gradient is wanted, with recompute: the arguments alone are kept, and forward is run once more"
        return "a gradient is wanted: the activated gates and the states of every step are kept for it"


def _layers(run: Callable) -> list[Layer]:
    """The layers that a call runs, which it does not run."""
    found: list[Layer] = []

    def told(cell, x, parameters, counts, return_cell_states, recompute, graph) -> tuple[Any, ...]:
        keeps = return_cell_states or (graph and not recompute)
        layer = Layer(cell, x, parameters, counts, recompute, graph, keeps)
        found.append(layer)
        w_ih, w_hr, directions = parameters[0][0], parameters[0][4], len(parameters)
        hidden = len(w_ih) // len(cell.gates)
        out, others = hidden if w_hr is None else len(w_hr), len(cell.states) - 1
        y = x.new_empty(*x.shape[:-1], directions * out).requires_grad_(graph)
        finals = tuple(x.new_empty(directions, layer.sequences.rows, n) for n in [out] + [hidden] * others)
        if not return_cell_states:
            return y, finals
        return y, finals, (x.new_empty(*x.shape[:-1], directions * hidden),) * others

    witness.told = told
    try:
        run()
    finally:
        witness.told = None
    return found


def _reasons(call: Call, layers: list[Layer], within: bool) -> list[str]:
    first, *_ = layers
    sequences = first.sequences
    layout = "packed" if sequences.packed else "padded"
    vector = suited(first.cell, first.parameters[0]).forward.vector
    reasons = [
        f"kernels of cell {first.cell.name}, {first.x.dtype}, vectors of {vector} bytes; "
        f"{layout} input, {sequences.steps} steps, {sequences.rows} sequences, {sequences.total} tokens"
    ]
    if call.dtype is not None:
        reasons.append(f"results are rounded to {call.dtype}, once")
    if within:
        reasons.append("resets inside the time loop: no packing")
    if call.batch.tokens is not None:
        reasons.append("sequences are packed, and results unpacked, by the kernels of the call")
    previous: tuple[str, ...] = ()
    for k, layer in enumerate(layers):
        plan = planned(layer.cell, layer.parameters[0], layer.sequences, len(layer.parameters), layer.keeps)
        if plan.reasons != previous:
            reasons += [f"layer {k}: {r}" for r in plan.reasons]
        previous = plan.reasons
    kept = [layer.kept() for layer in layers]
    return reasons + (kept[:1] if len({*kept}) == 1 else [f"layer {k}: {text}" for k, text in enumerate(kept)])
