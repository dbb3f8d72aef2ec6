"""Comparison of a module with torch.nn in float64: outputs and every gradient, by name, with random cotangents."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from fastcells.nn import NotTaken, Recurrent

TOLERANCE = 1e-9  # float64, relative to the largest magnitude of the true tensor
SLACK = 4.0  # float32: at most so many times torch.nn's own error, a matter of luck where sums cancel ...
FLOOR = (
    4 * torch.finfo(torch.float32).eps
)  # ... plus 4 ulps of the largest magnitude, as torch's error may be 0 by luck


@dataclass(frozen=True)
class Case:
    """A layer, its options and the kind and sizes of its input."""

    cell: str = "lstm"  # lstm, lstm_proj, gru, rnn_tanh, rnn_relu
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    bias: bool = True
    layout: str = "padded"  # padded, strided, unbatched, packed (sorted by length), shuffled (packed, not sorted)
    states: bool = False  # given, or default
    dtype: torch.dtype = torch.float64
    steps: int = 5
    batch: int = 3
    inputs: int = 4
    hidden: int = 6
    dropout: float = 0.0

    def __str__(self) -> str:
        flags = [f for f in ("bidirectional", "batch_first", "bias", "states") if getattr(self, f)]
        sizes = f"L{self.num_layers} T{self.steps} N{self.batch} I{self.inputs} H{self.hidden}"
        return " ".join([self.cell, self.layout, *flags, str(self.dtype).removeprefix("torch."), sizes])

    @property
    def proj_size(self) -> int:
        return (self.hidden + 1) // 2 if self.cell == "lstm_proj" and self.hidden > 1 else 0

    def module(self, nn: Any) -> torch.nn.Module:
        """The layer from `nn` (torch.nn or fastcells.nn), the same weights at each call."""
        kind, _, variant = self.cell.partition("_")
        extra = {"rnn": {"nonlinearity": variant}, "lstm": {"proj_size": self.proj_size}}.get(kind, {})
        options = {o: getattr(self, o) for o in ("num_layers", "bidirectional", "batch_first", "bias", "dropout")}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return getattr(nn, kind.upper())(self.inputs, self.hidden, **options, **extra, dtype=self.dtype)

    def data(self) -> tuple[Tensor | PackedSequence, Any]:
        """Input and hx (None for default states)."""
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        rows = self.num_layers * (2 if self.bidirectional else 1)
        leading = (rows,) if self.layout == "unbatched" else (rows, self.batch)
        hx: Any = None
        if self.states:
            hx = draw(*leading, self.proj_size or self.hidden)
            if self.cell.startswith("lstm"):
                hx = (hx, draw(*leading, self.hidden))
        if self.layout == "unbatched":
            return draw(self.steps, self.inputs), hx
        shape = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        if self.layout == "strided":  # every other feature of every other element, from the end of the storage
            return draw(shape[0], 2 * shape[1], 2 * self.inputs + 1)[:, 1::2, 1::2], hx
        x = draw(*shape, self.inputs)
        if self.layout == "padded":
            return x, hx
        lengths = [1 + 3 * n % self.steps for n in range(self.batch)]  # unequal, of 1 and more, some of them the same
        lengths[self.batch // 2] = self.steps
        if self.layout == "packed":
            lengths.sort(reverse=True)
        return pack_padded_sequence(
            x, lengths, batch_first=self.batch_first, enforce_sorted=self.layout == "packed"
        ), hx


class Loop(Recurrent):
    """The oracle of any cell: its own function as a loop of torch operations, differentiated by autograd."""

    def _read(self, *args: Any, **options: Any) -> Any:
        raise NotTaken("this is the oracle")


def loop(layer: Recurrent) -> Loop:
    """The oracle with a layer's own weights."""
    oracle = copy.deepcopy(layer)
    oracle.__class__ = Loop
    return oracle  # type: ignore[return-value]


def pairwise(**options: Sequence) -> list[dict[str, Any]]:
    """A small selection from the cross of the options in which every two values of two options meet. Greedy, seeded."""
    pick = random.Random(0)
    names = list(options)
    missing = {
        frozenset({(a, i), (b, j)})
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for name in pick.sample(names, len(names)):
            if name not in row:
                gains = [
                    sum(frozenset({(name, i), other}) in missing for other in row.items())
                    for i in range(len(options[name]))
                ]
                row[name] = pick.choice([i for i, gain in enumerate(gains) if gain == max(gains)])
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: options[name][row[name]] for name in names})
    return rows


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, PackedSequence, tuple of these or None in another dtype."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(cast(v, dtype) for v in value)
    return value if value is None else value.to(dtype)


def outputs(module: torch.nn.Module, result: Any) -> dict[str, Tensor]:
    """The tensors in what a layer or cell module returned, by name."""
    named = {}
    if isinstance(module, (torch.nn.RNNBase, Recurrent)):
        y, result = result
        named["output"] = y.data if isinstance(y, PackedSequence) else y
    states = result if isinstance(result, tuple) else (result,)
    return {**named, **{f"{name}_n": state for name, state in zip(state_names(module), states, strict=False)}}


def state_names(module: torch.nn.Module) -> tuple[str, ...]:
    """Of the states of a layer or cell module, or more."""
    return module.cell.states if isinstance(module, Recurrent) else ("h", "c")


def leaves(module: torch.nn.Module, input: Any, hx: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """Input and hx made of fresh leaves that require grad, and all leaves with the parameters, by name."""
    named = {}

    def fresh(name: str, tensor: Tensor) -> Tensor:
        named[name] = tensor.detach().requires_grad_()
        return named[name]

    if isinstance(input, PackedSequence):
        input = PackedSequence(fresh("input", input.data), *input[1:])
    else:
        input = fresh("input", input)
    if isinstance(hx, tuple):
        hx = tuple(fresh(f"{name}_0", h) for name, h in zip(state_names(module), hx, strict=True))
    elif hx is not None:
        hx = fresh("h_0", hx)
    return input, hx, {**named, **dict(module.named_parameters())}


def cotangents(named: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """Random cotangents, the same values for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=generator).to(t.dtype) for name, t in named.items()}


def record(
    module: torch.nn.Module, input: Any, hx: Any = None, through: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Outputs, and the gradient of each leaf for random cotangents on all outputs (or on those named in `through`)."""
    input, hx, leaf = leaves(module, input, hx)
    with torch.random.fork_rng():
        torch.manual_seed(4)  # dropout between layers
        named = outputs(module, module(input, hx))
    weights = cotangents(named)
    used = list(named) if through is None else list(through)
    gradients = torch.autograd.grad(
        [named[n] for n in used], list(leaf.values()), [weights[n] for n in used], allow_unused=True
    )
    named.update({f"gradient of {n}": g for n, g in zip(leaf, gradients, strict=True) if g is not None})
    return {name: tensor.detach() for name, tensor in named.items()}


def relative_error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest magnitude of the true tensor; inf where they disagree on NaN and infinity."""
    ours, truth = ours.double(), truth.double()
    finite = truth.isfinite()
    kinds = [t[~finite].nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0) for t in (ours, truth)]
    if not torch.equal(finite, ours.isfinite()) or not torch.equal(*kinds):
        return float("inf")
    difference, scale = (t[finite].abs().max().item() if finite.any() else 0.0 for t in (ours - truth, truth))
    return difference / (scale or 1.0)


def check(
    ours: dict[str, Tensor], truth: dict[str, Tensor], baseline: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Relative error of each named tensor. Raises AssertionError naming the first one that is off.

    The bound is TOLERANCE, or with a baseline SLACK times the error of the baseline, plus FLOOR.
    """
    assert list(ours) == list(truth), f"expected {list(truth)}, got {list(ours)}"
    errors = {}
    for name, expected in truth.items():
        assert ours[name].shape == expected.shape, f"{name}: shape {ours[name].shape}, expected {expected.shape}"
        errors[name] = relative_error(ours[name], expected)
        bound = TOLERANCE if baseline is None else SLACK * relative_error(baseline[name], expected) + FLOOR
        assert errors[name] <= bound, f"{name}: relative error {errors[name]:.2e}, at most {bound:.2e} expected"
    return errors


def compare(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    input: Any,
    hx: Any = None,
    through: Sequence[str] | None = None,
    engine: bool = True,
) -> dict[str, float]:
    """Check outputs and all gradients of `ours` against `theirs`, torch.nn's module with the same weights, in float64.

    Both are given in the dtype under test; in float32, torch's own error there sets the bound. Also checks that the
    engine ran, or did not where `engine` is False. Raises AssertionError with the name of the first tensor that is off
    and its relative error.
    """
    route = ours._route(input, hx)
    assert (route is None) == engine, f"route: {route or 'engine'}"
    dtype = next(ours.parameters()).dtype
    got = record(ours, input, hx, through)
    assert {t.dtype for t in got.values()} == {dtype}
    native = record(theirs, input, hx, through)
    if dtype == torch.float64:
        return check(got, native)
    double = copy.deepcopy(theirs).double()
    truth = record(double, cast(input, torch.float64), cast(hx, torch.float64), through)
    return check(got, truth, baseline=native)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for v in value:
            yield from tensors(v)


def same(ours: Any, theirs: Any) -> bool:
    """Equal structure, types, dtypes and bits."""
    a, b = list(tensors(ours)), list(tensors(theirs))
    return len(a) == len(b) and all(
        type(s) is type(t) and s.dtype == t.dtype and s.shape == t.shape and torch.equal(s, t)
        for s, t in zip(a, b, strict=True)
    )
