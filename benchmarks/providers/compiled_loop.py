"""torch.compile of a Python loop over time, with the cells written out as their users write them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Unsupported
from benchmarks.providers.torch_layers import Loop

States = tuple[Tensor, ...]

#: The compiler unrolls the loop, so that its time grows with T: beyond, one step is compiled, and the loop is Python's.
WHOLE = 8


def lstm(x: Tensor, u: Tensor, states: States) -> States:
    i, f, g, o = (x + u).chunk(4, 1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(x: Tensor, u: Tensor, states: States) -> States:
    (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, 1), u.chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n)
    return (n + torch.sigmoid(x_z + u_z) * (states[0] - n),)


def rnn(x: Tensor, u: Tensor, states: States) -> States:
    return (torch.tanh(x + u),)


CELLS = {"lstm": lstm, "gru": gru, "rnn": rnn}


class CompiledLoop(Loop):
    name = "torch.compile"

    def available(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            return None if get_cpp_compiler() else "no C++ compiler"
        except Exception as error:
            return f"no C++ compiler: {str(error).strip().splitlines()[0]}"

    def prepare(self, problem: Problem) -> Prepared:
        if problem.case.kind.packed:
            raise Unsupported("lengths depend on data, which breaks the graph")
        return super().prepare(problem)

    @property
    def note(self) -> str:  # type: ignore[override]
        return f"whole loop compiled up to T = {WHOLE}, one step beyond"

    def loop(self, layer: Any, cell_name: str) -> Callable:
        directions = 2 if layer.bidirectional else 1
        count = 2 if cell_name == "lstm" else 1
        cell = CELLS[cell_name.partition("_")[0]]

        def step(x: Tensor, states: States, w_hh: Tensor, b_hh: Tensor) -> States:
            return cell(x, linear(states[0], w_hh, b_hh), states)

        def direction(x: Tensor, states: States, weights: Any, reverse: bool, one: Callable) -> tuple[Tensor, States]:
            w_ih, w_hh, b_ih, b_hh = weights
            steps = list(linear(x, w_ih, b_ih).unbind(0))
            outputs = []
            for u in reversed(steps) if reverse else steps:
                states = one(u, states, w_hh, b_hh)
                outputs.append(states[0])
            return torch.stack(outputs[::-1] if reverse else outputs), states

        torch._dynamo.reset()  # or the shapes of earlier cases count towards its limit of recompilations
        whole = torch.compile(partial(direction, one=step), dynamic=False)
        compiled_step = torch.compile(step, dynamic=False)

        def forward(x: Tensor, hx: Any = None) -> Any:
            given = hx if isinstance(hx, tuple) else (hx,) * count
            finals: list[States] = []
            for k in range(layer.num_layers):
                outputs = []
                for d in range(directions):
                    row = k * directions + d
                    zero = x.new_zeros(x.shape[1], layer.hidden_size)
                    states = tuple(zero if s is None else s[row] for s in given)
                    weights = layer.all_weights[row]
                    if x.shape[0] <= WHOLE:
                        y, final = whole(x, states, weights, bool(d))
                    else:
                        y, final = direction(x, states, weights, bool(d), compiled_step)
                    outputs.append(y)
                    finals.append(final)
                x = torch.cat(outputs, -1)
            stacked = tuple(torch.stack(s) for s in zip(*finals, strict=True))
            return x, stacked if count > 1 else stacked[0]

        return forward
