"""Regularised recurrence: what layers drop in training, cells that take masks, made of any cell, and the masks.

All draws are torch's, from its default generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase

from .cell import Cell, Names, Recurrent, registered
from .dynamo import constant
from .expression import less, where
from .functional import Parameters, unchecked_layer

if TYPE_CHECKING:
    from .dropin import DropIn as Base
else:
    Base = object


class Dropping(Base):
    """What layers drop in training, before any of it in a class of `nn.DropIn`: see `nn.Recurrent`."""

    proj_size: int
    # On the class, for layers that were torch.nn's; rates of zoneout are one for each state of the cell.
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: tuple[float, ...] = ()

    def _regularise(self, recurrent_dropout: Any, zoneout: Any, weight_dropout: Any) -> None:
        """Set the rates of what training drops."""
        states = self._cell().states
        rates = list(zoneout) if isinstance(zoneout, Sequence) else [zoneout] * len(states)
        if len(rates) != len(states):
            raise ValueError(f"zoneout must be one number or one for each of {', '.join(states)}, got {zoneout}")
        rates = [_rate("zoneout", rate) for rate in rates]
        given = _rate("recurrent_dropout", recurrent_dropout), _rate("weight_dropout", weight_dropout)
        self.recurrent_dropout, self.weight_dropout = given
        self.zoneout = tuple(rates) if any(rates) else ()
        if self.proj_size and (recurrent_dropout or self.zoneout):
            raise ValueError(
                f"recurrent_dropout and zoneout must be 0 with a projection, got proj_size {self.proj_size}"
            )

    def _random(self) -> bool:
        """Whether training drops anything."""
        return bool(self.recurrent_dropout or self.weight_dropout or self.zoneout)

    def _steady(self) -> bool:
        return not self._random()

    def extra_repr(self) -> str:
        """As torch.nn's layers, and the rates of what is dropped."""
        rates = {name: getattr(self, name) for name in ("recurrent_dropout", "weight_dropout", "zoneout")}
        dropped = "".join(f", {name}={rate}" for name, rate in rates.items() if rate)
        return RNNBase.extra_repr(self) + dropped  # type: ignore[arg-type]

    def _run(self, input: Any, call: Any, layer: Callable = unchecked_layer, return_cell_states: bool = False) -> Any:
        if not (self.training and self._random()):
            return super()._run(input, call, layer, return_cell_states)
        if self.weight_dropout:
            call = call._replace(parameters=[tuple(map(self._thinned, given)) for given in call.parameters])
        zoned = tuple(state for state, rate in zip(call.cell.states, self.zoneout, strict=False) if rate)
        if not (self.recurrent_dropout or zoned):
            return super()._run(input, call, layer, return_cell_states)
        rates = self.recurrent_dropout, tuple(filter(None, self.zoneout))

        def regularised(
            cell: Cell, x: Tensor, states: Any, parameters: Sequence, batch_sizes: Tensor | None, **options: Any
        ) -> tuple:
            sizes = len(parameters), call.batch.size, self.hidden_size
            return layer(cell, x, states, parameters, batch_sizes, masks(x, sizes, *rates), **options)

        call = call._replace(cell=masked(call.cell.key, bool(self.recurrent_dropout), zoned))
        return super()._run(input, call, regularised, return_cell_states)

    def _thinned(self, parameters: Parameters) -> Parameters:
        """The parameters of a direction with elements of weight_hh dropped."""
        w_ih, w_hh, *rest = parameters
        return w_ih, None if w_hh is None else torch.dropout(w_hh, self.weight_dropout, True), *rest


def _rate(name: str, rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate <= 1:
        raise ValueError(f"{name} must be a number in range [0, 1], got {rate!r}")
    return float(rate)


@constant
def masked(key: str, dropped: bool, zoned: tuple[str, ...]) -> Cell:
    """The cell of that key, whose products, if dropped, take in an input `_mask` times their vector (Gal & Ghahramani
    2016), and whose states named in zoned stay as they were where `_zoneout_<state>` is 1 (Krueger et al. 2017).
    """
    return _masked(registered(key), dropped, zoned)


@lru_cache(maxsize=256)
def _masked(base: Cell, dropped: bool, zoned: tuple[str, ...]) -> Cell:
    def step(x: Any, u: Any, s: Any, p: Any) -> tuple:
        if dropped:
            hidden = getattr(s, base.states[0])
            u = Names(**{g: Recurrent(partial(_dropped, product, p._mask), hidden) for g, product in vars(u).items()})
        old = {n: getattr(s, n) for n in zoned}  # a cell may give its attributes other values
        new = base(x, u, s, *([p] if base.own else []))
        new = new if isinstance(new, (tuple, list)) else (new,)
        return tuple(_zoned(p, n, old[n], v) if n in zoned else v for n, v in zip(base.states, new, strict=True))

    # No name that a declared cell may give to anything begins so.
    inputs, step_inputs = ("_mask",) if dropped else (), [f"_zoneout_{state}" for state in zoned]
    own = base.parameters, base.scalars
    return Cell(step, f"{base.name}_masked", base.gates, base.states, *own, inputs, step_inputs)


def _dropped(product: Any, mask: Any, vector: Any) -> Any:
    return product(mask * vector)


def _zoned(p: Any, name: str, old: Any, new: Any) -> Any:
    return where(less(0.5, getattr(p, f"_zoneout_{name}")), old, new)


def masks(like: Tensor, sizes: tuple[int, int, int], dropout: float, zoneout: tuple[float, ...]) -> list[Tensor]:
    """What a masked cell takes for one layer, in its order: with (D, N, H) = sizes, a mask [D, N, H] that is the same
    at all steps, scaled as torch.dropout does, and for each rate of zoneout 0s and 1s [D, T, N, H] ([D, total, H]).

    like: the layer's input, [T, N, I] or packed rows [total, I].
    """
    directions, rows, hidden = sizes
    dropped = [torch.dropout(like.new_ones(directions, rows, hidden), dropout, True)] if dropout else []
    every = directions, *like.shape[:-1], hidden
    return dropped + [_ones_at(rate, every, like) for rate in zoneout]


BITS = 16  # of chance for each number: a rate is rounded to 1/65536


def _ones_at(rate: float, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros, and with probability `rate` ones: torch.bernoulli spends a draw of 64 bits on each, four times as many."""
    count, share, low, high = math.prod(shape), round(rate * 2**BITS), -(2**63), 2**63 - 1
    if share == 2**BITS:
        return like.new_ones(shape)
    draws = torch.randint(low, high, (-(-count * BITS // 64),), dtype=torch.int64, device=like.device)
    chances = draws.view(torch.int16)[:count].view(shape)
    return torch.lt(chances, share - 2 ** (BITS - 1), out=like.new_empty(shape))
