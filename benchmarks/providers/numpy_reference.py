"""Plain NumPy: `fastcells.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider, refuse_variants


class NumPy(Provider):
    name = "NumPy"

    def prepare(self, problem: Problem) -> Prepared:
        from fastcells import reference

        case, mode = problem.case, problem.case.how
        refuse_variants(problem.case)
        kind = {"lstm": reference.LSTM, "gru": reference.GRU, "rnn": reference.RNN}[case.cell]
        layer = kind(case.I, case.H, mode.layers, bidirectional=mode.directions == 2)
        layer.load_state_dict(problem.weights)
        states: Any = tuple(problem.states.values())
        states = None if not states else states if case.cell == "lstm" else states[0]
        lengths = problem.lengths if mode.ragged else None
        cotangents = {f"d{name}": value for name, value in problem.cotangents.items()}
        note = "" if case.dtype == "float64" else "in float64"

        def forward() -> Any:
            return layer.forward(problem.x, states, lengths)

        def backward() -> Any:
            return layer.backward(**cotangents)

        def outputs(result: Any) -> dict[str, np.ndarray]:
            y, final = result
            return dict(zip(("y", "h_n", "c_n"), (y, *(final if case.cell == "lstm" else (final,))), strict=False))

        def gradients(result: Any) -> dict[str, np.ndarray]:
            return {f"d{name}": value for name, value in result.items() if name == "x" or name in problem.weights}

        if mode.call == "forward":
            return Prepared(forward, outputs, note=note)
        if mode.call == "backward":
            return Prepared(backward, gradients, setup=forward, note=note)
        return Prepared(lambda: (forward(), backward())[1], gradients, note=note)
