"""Regularised recurrence: cells that take masks, made of any cell, and the masks themselves.

All draws are torch's, from its default generator.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, Names, Recurrent, cell
from .dynamo import constant
from .expression import less, where


@constant
def masked(base: Cell, dropped: bool, zoned: tuple[str, ...]) -> Cell:
    """The cell whose products take in `recurrent_mask` times their vector (Gal & Ghahramani 2016), if dropped, and
    whose states named in zoned stay as they were where `zoneout_<state>` is 1 (Krueger et al. 2017).
    """
    return _masked(base, dropped, zoned)


@lru_cache(maxsize=256)
def _masked(base: Cell, dropped: bool, zoned: tuple[str, ...]) -> Cell:

    @cell(
        " ".join(base.gates),
        " ".join(base.states),
        f"{base.name}_masked",
        parameters=" ".join(base.parameters),
        scalars=" ".join(base.scalars),
        inputs="recurrent_mask" if dropped else "",
        step_inputs=" ".join(f"zoneout_{state}" for state in zoned),
    )
    def step(x: Any, u: Any, s: Any, p: Any) -> tuple:
        if dropped:
            hidden = getattr(s, base.states[0])
            u = Names(
                **{g: Recurrent(partial(_dropped, product, p.recurrent_mask), hidden) for g, product in vars(u).items()}
            )
        new = base(x, u, s, *([p] if base.own else []))
        new = new if isinstance(new, tuple) else (new,)
        return tuple(_zoned(p, n, getattr(s, n), v) if n in zoned else v for n, v in zip(base.states, new, strict=True))

    return step


def _dropped(product: Any, mask: Any, vector: Any) -> Any:
    return product(mask * vector)


def _zoned(p: Any, name: str, old: Any, new: Any) -> Any:
    return where(less(0.5, getattr(p, f"zoneout_{name}")), old, new)


def masks(like: Tensor, sizes: tuple[int, int, int], dropout: float, zoneout: tuple[float, ...]) -> list[Tensor]:
    """What a masked cell takes for one layer, in its order: with (D, N, H) = sizes, a mask [D, N, H] that is the same
    at all steps, scaled as torch.dropout does, and for each rate of zoneout 0s and 1s [D, T, N, H] ([D, total, H]).

    like: the layer's input, [T, N, I] or packed rows [total, I].
    """
    directions, rows, hidden = sizes
    dropped = [torch.dropout(like.new_ones(directions, rows, hidden), dropout, True)] if dropout else []
    every = directions, *like.shape[:-1], hidden
    return dropped + [torch.bernoulli(like.new_full(every, rate)) for rate in zoneout]
