"""Families of cells with options: functions that make a cell, the same one for the same arguments.

    layer = nn.Recurrent(variants.lstm(activation="relu"), 32, 64)

An activation is one of Keras's names ("relu", "hard_sigmoid", ...: `fastcells.activations.KERAS`) or a function of one
value, written as those in a cell are; a function at the top of a module lets the cell be pickled. Weights are in the
order of gates of torch.nn. `clip` keeps the pre-activations of all gates within [-clip, clip], as ONNX does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from numbers import Real
from typing import Any

from torch import Tensor

from . import cells
from .activations import activation as named
from .cell import Cell, cell
from .expression import clip as within
from .expression import tanh


def family(make: Callable[..., Cell]) -> Callable[..., Cell]:
    """A function that makes cells, as one that always gives the same cell for the same arguments."""
    signature = inspect.signature(make)
    made: dict[tuple, Cell] = {}

    @wraps(make)
    def get(*args: Any, **kwargs: Any) -> Cell:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if type(value).__hash__ is None:
                raise TypeError(f"{name} must be a name, a number or a function, got {value!r}")
        key = tuple(bound.arguments.values())
        known = made.get(key)
        if known is None or (known.outside is not None and known.outside.changed()):  # of a function that reads others
            found = make(*key)
            if found.made_by is None and found not in vars(cells).values():
                found.made_by = (get, key)
            made[key] = found
        return made[key]

    return get


@family
def lstm(
    activation: str | Callable = "tanh",
    recurrent_activation: str | Callable = "sigmoid",
    output_activation: str | Callable | None = None,
    peepholes: bool = False,
    coupled: bool = False,
    clip: float | None = None,
) -> Cell:
    """Long short-term memory with any activations: of the candidate, of the gates, and of the cell state on its way out
    (default: the candidate's). Keras's LSTM; ONNX's with f, g, h for recurrent_activation, activation and
    output_activation.

    peepholes: the gates see the cell state, by weights peephole_i, _f, _o (Gers et al. 2002). coupled: the forget gate
    is what the input gate leaves, and has no weights (Greff et al. 2017; ONNX's input_forget).
    """
    squash, gate = named(activation), named(recurrent_activation)
    out = squash if output_activation is None else named(output_activation)
    bound = _bound(clip)
    plain = (squash, gate, out, clip) == (named("tanh"), named("sigmoid"), named("tanh"), None)
    if plain and not (peepholes and coupled):
        return cells.peephole_lstm if peepholes else cells.coupled_lstm if coupled else cells.lstm
    gates, seeing = ("i g o", "i o") if coupled else ("i f g o", "i f o")

    @cell(
        gates=gates,
        states="h c",
        parameters=" ".join(f"peephole_{g}" for g in seeing.split()) if peepholes else "",
        name=_name("lstm", activation, recurrent_activation),
    )
    def step(x, u, s, p=None):
        def opened(g, c):
            v = getattr(x, g) + getattr(u, g)
            return gate(bound(v + getattr(p, f"peephole_{g}") * c if peepholes else v))

        i = opened("i", s.c)
        f = 1 - i if coupled else opened("f", s.c)
        c = f * s.c + i * squash(bound(x.g + u.g))
        return opened("o", c) * out(c), c

    return step


@family
def gru(
    activation: str | Callable = "tanh",
    recurrent_activation: str | Callable = "sigmoid",
    reset_after: bool = True,
    clip: float | None = None,
) -> Cell:
    """Gated recurrent unit with any activations: of the candidate and of the gates. Keras's GRU; reset_after is ONNX's
    linear_before_reset.
    """
    squash, gate, bound = named(activation), named(recurrent_activation), _bound(clip)
    if (squash, gate, clip) == (named("tanh"), named("sigmoid"), None):
        return cells.gru if reset_after else cells.gru_reset_before

    @cell(gates="r z n", name=_name("gru" if reset_after else "gru_reset_before", activation, recurrent_activation))
    def step(x, u, s):
        r = gate(bound(x.r + u.r))
        z = gate(bound(x.z + u.z))
        n = squash(bound(x.n + (r * u.n if reset_after else u.n(r * s.h))))
        return n + z * (s.h - n)

    return step


@family
def rnn(activation: str | Callable = "tanh", clip: float | None = None) -> Cell:
    """Simple recurrent network with any activation: Keras's SimpleRNN, ONNX's RNN."""
    squash, bound = named(activation), _bound(clip)
    if clip is None and squash in (named("tanh"), named("relu")):
        return cells.rnn_tanh if squash == named("tanh") else cells.rnn_relu

    @cell(gates="h", name=_name("rnn", activation))
    def step(x, u, s):
        return squash(bound(x.h + u.h))

    return step


def antisymmetric(weight: Tensor) -> Tensor:
    """U - U^T for each gate's block U of weight_hh [G * H, H]."""
    blocks = weight.unflatten(0, (-1, weight.shape[1]))
    return (blocks - blocks.mT).flatten(0, 1)


@family
def antisymmetric_rnn(step_size: float = 0.1, damping: float = 0.01) -> Cell:
    """AntisymmetricRNN (Chang, Chen, Haber & Chi 2019), explicit Euler on a stable system: epsilon, gamma.

    The recurrent weights are U - U^T - damping * I; `nn.Recurrent` takes the difference, `functional.layer` takes
    weight_hh as it is given.
    """

    @cell(gates="h", name="antisymmetric_rnn")
    def step(x, u, s):
        return s.h + step_size * tanh(x.h + u.h - damping * s.h)

    step.recurrent_weight = antisymmetric
    return step


def _bound(limit: float | None) -> Callable:
    if limit is None:
        return lambda v: v
    if not (isinstance(limit, Real) and limit > 0):
        raise ValueError(f"clip must be a positive number, got {limit}")
    return partial(within, low=-limit, high=limit)


def _name(base: str, *activations: str | Callable) -> str:
    """A cell's name, by which its kernels' files go: identifiers only."""
    words = [a if isinstance(a, str) else getattr(getattr(a, "function", a), "__name__", "") for a in activations]
    return "_".join([base, *(w for w in words if w.isidentifier())])
