"""Python loops over time, as users of torch write them for any cell: as they are, and by torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental import _config as symbolic_shapes
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from benchmarks.cases import Case
from benchmarks.providers.torch_layers import TorchLike
from benchmarks.providers.variants import CELLS, States


class Masks(NamedTuple):
    """What a step is told besides its input; None for nothing. alive, reset: [N, 1] bool, of the sequences. dropped:
    [N, H], what the hidden state is multiplied by where it enters the recurrent product. kept: [N, H] bool for each
    state, the units that keep it. With a leading T where they are of all steps."""

    alive: Tensor | None = None
    reset: Tensor | None = None
    dropped: Tensor | None = None
    kept: States | None = None


def step(
    cell: Callable[..., States], x: Tensor, states: States, w_hh: Tensor, b_hh: Tensor, vectors: States, masks: Masks
) -> tuple[Tensor, States]:
    """(output, states) of one step. x [N, G * H], projected."""
    alive, reset, dropped, kept = masks
    if reset is not None:
        states = tuple(torch.where(reset, 0.0, state) for state in states)
    seen = states if dropped is None else (states[0] * dropped, *states[1:])
    new = cell(x, seen, w_hh, b_hh, *vectors)
    if kept is not None:
        new = tuple(torch.where(keep, a, b) for keep, a, b in zip(kept, states, new, strict=True))
    if alive is None:
        return new[0], new
    return torch.where(alive, new[0], 0.0), tuple(torch.where(alive, a, b) for a, b in zip(new, states, strict=True))


def direction(
    one: Callable, x: Tensor, states: States, weights: States, backwards: bool, masks: Masks
) -> tuple[Tensor, States]:
    """One direction of one layer: all steps' inputs projected at once, then step by step."""
    w_ih, w_hh, b_ih, b_hh, *vectors = weights
    projected = linear(x, w_ih, b_ih).unbind(0)
    alive, reset, dropped, kept = masks
    outputs = []
    for t in reversed(range(len(projected))) if backwards else range(len(projected)):
        now = Masks(
            None if alive is None else alive[t],
            None if reset is None else reset[t],
            dropped,
            None if kept is None else tuple(keep[t] for keep in kept),
        )
        y, states = one(projected[t], states, w_hh, b_hh, tuple(vectors), now)
        outputs.append(y)
    return torch.stack(outputs[::-1] if backwards else outputs), states


class LoopLayer(torch.nn.Module):
    """Parameters as torch.nn's layers have them, besides the cell's own vectors."""

    def __init__(
        self,
        case: Case,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bidirectional: bool,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        super().__init__()
        self.case, self.hidden_size = case, hidden_size
        rows, directions = case.kind.gates * hidden_size, 2 if bidirectional else 1
        self.names: list[list[str]] = []  # of each direction's parameters
        for k in range(num_layers):
            inputs = input_size if k == 0 else directions * hidden_size
            for suffix in [f"_l{k}", f"_l{k}_reverse"][:directions]:
                shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, hidden_size)}
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
                shapes |= {name: (hidden_size,) for name in case.kind.vectors}
                for name, shape in shapes.items():
                    parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
                    self.register_parameter(name + suffix, parameter)
                self.names.append([name + suffix for name in shapes])
        self.directions = directions

    def drawn(self, x: Tensor) -> tuple[Tensor | None, States | None]:
        """Masks of variational dropout (Gal & Ghahramani 2016) and of zoneout (Krueger et al. 2017), in training."""
        dropout, zoneout = self.case.how.dropout, self.case.how.zoneout
        steps, size = x.shape[0], (x.shape[1], self.hidden_size)
        dropped = torch.nn.functional.dropout(x.new_ones(size), dropout) if dropout and self.training else None
        if not zoneout or not self.training:
            return dropped, None
        return dropped, tuple(torch.rand(steps, *size, device=x.device) < zoneout for _ in self.case.kind.states)

    def forward(self, one: Callable, x: Tensor, hx: Any, lengths: Any, resets: Any) -> Any:
        """one: a step."""
        given = hx if isinstance(hx, tuple) else (hx,) * len(self.case.kind.states)
        time = torch.arange(x.shape[0], device=x.device)[:, None]
        alive = None if lengths is None else (time < lengths.to(x.device)).unsqueeze(2)
        resets = None if resets is None else resets.unsqueeze(2)
        outputs: list[Tensor] = []
        finals: list[States] = []
        for row, names in enumerate(self.names):
            zero = x.new_zeros(x.shape[1], self.hidden_size)
            states = tuple(zero if s is None else s[row] for s in given)
            matrices, vectors = (tuple(map(self.get_parameter, part)) for part in (names[:4], names[4:]))
            weights = matrices + CELLS[self.case.cell].gathered(vectors)
            masks = Masks(alive, resets, *self.drawn(x))
            y, final = direction(one, x, states, weights, row % self.directions == 1, masks)
            outputs.append(y)
            finals.append(final)
            if len(outputs) == self.directions:
                x, outputs = torch.cat(outputs, -1), []
        stacked = tuple(torch.stack(s) for s in zip(*finals, strict=True))
        return x, stacked if len(stacked) > 1 else stacked[0]


class Loop(TorchLike):
    """The cell as a Python function over torch tensors, step by step."""

    name = "torch loop"

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        return LoopLayer(case, **options)

    def step(self, case: Case) -> Callable:
        return partial(step, CELLS[case.cell].torch)

    def bound(self, layer: Any, x: Any, hx: Any, lengths: Tensor | None, resets: Any) -> Callable[[], Any]:
        one = self.step(layer.case)
        if isinstance(x, PackedSequence):
            return partial(padded, partial(layer, one), x, hx, resets)
        return partial(layer, one, x, hx, lengths, resets)


def padded(layer: Callable, x: PackedSequence, hx: Any, resets: Any) -> Any:
    """A layer of padded input, from packed to packed."""
    whole, lengths = pad_packed_sequence(x)
    y, final = layer(whole, hx, lengths, resets)
    return pack_padded_sequence(y, lengths), final


class CompiledLoop(Loop):
    name = "torch.compile"
    note = "one step compiled, for any N and H, in a Python loop: unrolled, T steps would compile for minutes"

    def available(self) -> str | None:
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            return None if get_cpp_compiler() else "no C++ compiler"
        except Exception as error:
            return f"no C++ compiler: {str(error).strip().splitlines()[0]}"

    def step(self, case: Case) -> Callable:
        return compiled_step(case.cell)


@lru_cache
def compiled_step(cell: str) -> Callable:
    """Compiled once for all shapes: a shape of its own would cost more time than there is for a case."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000  # masks, gradients
    torch._inductor.config.compile_threads = 1  # others would wait for the same core
    symbolic_shapes.backed_size_oblivious = True  # or N = 1 compiles anew
    return torch.compile(partial(step, CELLS[cell].torch), dynamic=True)
