"""Data of a case, and its answer in float64, against which every provider is checked before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import Case

Array = NDArray[np.floating]

#: Largest error allowed in an array, relative to the largest number of the true one.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


class Problem:
    """Arrays of one case, by torch's names and in torch's layout, the same for every provider.

    x [T, N, I]; weights by name; states h_0 (and c_0) [layers * D, N, H], empty unless the mode gives them; lengths
    [N], falling where packed, in any order where padded, all T unless the mode is ragged; resets [T, N]: before which
    steps a sequence's state returns to zero; cotangents: gradients of the loss with respect to y, h_n (and c_n).
    """

    def __init__(self, case: Case) -> None:
        mode, rng = case.how, np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(case.dtype)

        def uniform(*shape: int) -> Array:
            return (rng.uniform(-1, 1, shape) / np.sqrt(case.H)).astype(case.dtype)

        self.case = case
        self.x = normal(case.T, case.N, case.I)
        self.lengths = np.full(case.N, case.T)
        if mode.ragged:
            self.lengths = rng.integers(max(1, case.T // 4), case.T + 1, case.N)
            self.lengths[case.N // 2] = case.T
            if mode.ragged == "packed":
                self.lengths = np.sort(self.lengths)[::-1].copy()
            self.x[~self.alive] = 0
        self.resets = rng.random((case.T, case.N)) < mode.resets
        self.weights: dict[str, Array] = {}
        rows = case.kind.gates * case.H
        for k in range(mode.layers):
            width = case.I if k == 0 else mode.directions * case.H
            for suffix in [f"_l{k}", f"_l{k}_reverse"][: mode.directions]:
                self.weights |= {
                    "weight_ih" + suffix: uniform(rows, width),
                    "weight_hh" + suffix: uniform(rows, case.H),
                }
                self.weights |= {"bias_ih" + suffix: uniform(rows), "bias_hh" + suffix: uniform(rows)}
                self.weights |= {name + suffix: uniform(case.H) for name in case.kind.vectors}
        letters = case.kind.states
        shape = (mode.layers * mode.directions, case.N, case.H)
        self.states = {f"{letter}_0": normal(*shape) for letter in letters} if mode.stateful else {}
        self.cotangents = {"y": normal(case.T, case.N, mode.directions * case.H)}
        self.cotangents["y"][~self.alive] = 0
        self.cotangents |= {f"{letter}_n": normal(*shape) for letter in letters}

    @property
    def alive(self) -> NDArray[np.bool_]:
        """[T, N]: whether a sequence has that step."""
        return np.arange(self.case.T)[:, None] < self.lengths

    @property
    def flops(self) -> float:
        return self.case.flops(int(self.lengths.sum()))

    @cached_property
    def truth(self) -> dict[str, Array]:
        """The answer in float64 of torch.nn, or of the loop over time where torch.nn has no such layer: outputs by
        name, or gradients as "dx", "dweight_ih_l0" and so on."""
        from benchmarks.providers.loops import Loop
        from benchmarks.providers.torch_layers import TorchCPU  # both read problems

        known = self.case.kind.plain is None and not self.case.how.resets and not self.case.random
        run = (TorchCPU() if known else Loop()).at(self, torch.float64)
        if run.setup is not None:
            run.setup()
        return dict(run.answer((run.checked or run.call)()))

    def mistake(self, answer: Mapping[str, Array]) -> str | None:
        """What is wrong with an answer, or None."""
        if set(answer) != set(self.truth):
            return f"expected {', '.join(sorted(self.truth))}, got {', '.join(sorted(answer))}"
        for name, true in self.truth.items():
            given = np.asarray(answer[name], dtype=np.float64)
            if given.shape != true.shape:
                return f"{name}: expected shape {true.shape}, got {given.shape}"
            error = float(np.max(np.abs(given - true)) / max(float(np.max(np.abs(true))), 1e-30))
            if not error <= TOLERANCE[self.case.dtype]:  # NaN too
                return f"{name} is off by {error:.1e} of its largest number"
        return None
