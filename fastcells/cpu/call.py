"""Calls of a layer made ready: scripts with what is done between them, kept for the next call of the same sizes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from . import again, blocks
from .direction import Operands, Sequences
from .engine import Buffer
from .script import At, Script, arena

SMALL = 1 << 10  # numbers in a tensor, up to which one is kept to make others like it


class Prepared:
    """A call made ready: scripts and functions of the call's tensors, in order."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.script = Script()
        self.parts: list[Script | Callable[[Sequence[Tensor | None]], None]] = [self.script]
        self.operands = Operands(dtype.itemsize)
        self.shapes: list[Any] = []
        self.make: list[Callable[..., Any]] = []
        self.numbers: list[Callable[[Sequences], Any]] = []

    def makes(self, shapes: Sequence[Any], own: int) -> None:
        """Note what the call makes, tensors of these shapes, or None for none; from number `own` on no caller sees
        them. A shape begins with TOTAL where it has as many rows as a call's packed sequences, with BATCH where these
        lie in a batch."""
        self.shapes = list(shapes)
        self.make = [maker(s, self.dtype, k >= own) for k, s in enumerate(shapes)]

    def number(self, of: Callable[[Sequences], Any]) -> At:
        """One more operand, after all tensors: a number that the script is told of the sequences of a call."""
        self.numbers.append(of)
        return self.operands.address()

    def collected(self, mover: Any, tokens: Buffer) -> Buffer:
        """Memory for the rows of packed sequences, to which their tokens are copied."""
        shape = tokens.shape[0], tokens.shape[-1]
        rows = Buffer.new(self.script.take(shape[0] * shape[1] * tokens.item), shape, tokens.item)
        mover.collect(tokens, rows, wait=False)
        return rows

    def then(self, function: Callable[[Sequence[Tensor | None]], None]) -> None:
        """Go on with a function of the operands, by number less 1."""
        self.script = Script()
        self.parts += [function, self.script]

    @property
    def whole(self) -> bool:
        """Whether the script is all of it, and is told of tensors alone."""
        return len(self.parts) == 1 and not self.numbers

    def again(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor] | None, result: Callable[[list], Any]
    ) -> Callable[..., Any]:
        """A function that makes the call, of those of its tensors that there are, and of `sequences` as in `begin`; it
        returns None if the tensors are not `like` these. Without Python, where that can be. result: what it returns, of
        all that the call makes."""
        if self.whole and not any(blocks.is_large(s, self.dtype) for s in self.shapes if s is not None):
            made = [None if s is None else torch.empty(s, device="meta", dtype=self.dtype) for s in self.shapes]
            numbers = count()
            operands = [None if t is None else again.Operand(next(numbers)) for t in (*tensors, *made)]
            examples = [t for t in made if t is not None]
            does = again.Made([(self.script, operands, None)], examples, result(made), self.dtype)
            taken = next(numbers) - len(examples)
            if (function := again.function(taken, like, does)) is not None:
                return function
        there = [t is not None for t in tensors]
        present = [number for number, t in enumerate(tensors, 1) if t is not None]
        free = {k: self.operands.free.get(number, 0) for k, number in enumerate(present)}
        batches = [k for k, sizes in free.items() if sizes > 1]
        alike = None if like is None else again.function(len(like), like, None, free) or (lambda *_: None)

        def in_python(*given: Tensor, sequences: Sequences | None = None) -> Any:
            if alike is not None and alike(*given) is None:
                return None
            if not all([given[k].is_contiguous() for k in batches]):
                return None
            rest = iter(given)
            return result(self.begin([next(rest) if t else None for t in there], sequences))

        return in_python

    def begin(self, tensors: Sequence[Tensor | None], sequences: Sequences | None = None) -> list[Any]:
        """Make the call of the tensors in the order of `prepared`: all that it makes. sequences: of other lengths."""
        if sequences is None or sequences.tables is None:
            made = [make() for make in self.make]
            self.run([*tensors, *made])
            return made
        made = [
            make(sequences.leading(shape)) if shape and shape[0] < 0 else make()
            for make, shape in zip(self.make, self.shapes, strict=True)
        ]
        self.run([*tensors, *made, *[of(sequences) for of in self.numbers]])
        return made

    def run(self, operands: Sequence[Any]) -> None:
        addresses = [t.data_ptr() if isinstance(t, Tensor) else t if isinstance(t, int) else 0 for t in operands]
        for part in self.parts:
            if not isinstance(part, Script):
                part(operands)
            elif part.launches:
                part.run(addresses)


def maker(shape: Sequence[int] | None, dtype: torch.dtype, own: bool = False) -> Callable[..., Any]:
    """A function that makes a tensor of that shape, or None for no shape: for a small one, from another like it, which
    is the quickest way. own: no caller sees it. A shape that begins with TOTAL or BATCH takes the sizes that there are.
    """
    if shape is None:
        return _nothing
    if shape and shape[0] < 0:
        empty = blocks.empty if own else blocks.result
        return lambda leading: empty((*leading, *shape[1:]), dtype)
    if torch.Size(shape).numel() <= SMALL:
        return partial(torch.empty_like, torch.empty(tuple(shape), dtype=dtype))
    if not own and not blocks.is_large(shape, dtype):
        return partial(torch.empty, *shape, dtype=dtype)
    return partial(blocks.empty if own else blocks.result, tuple(shape), dtype)


def _nothing() -> None:
    return None


_calls: OrderedDict[tuple, Prepared] = OrderedDict()
KEPT_CALLS = 256
_lock = threading.Lock()


def kept(key: tuple | None, make: Callable[[], Prepared]) -> Any:
    """The call of this key, made now or earlier; the least recently used ones are forgotten."""
    if key is None:
        return make()
    with _lock:
        call = _calls.get(key)
        if call is not None:
            _calls.move_to_end(key)
            return call
    call = make()
    with _lock:
        _calls[key] = call
        while len(_calls) > KEPT_CALLS:
            _calls.popitem(last=False)
    return call


forgetting: list[Callable[[], None]] = []
"""What else has prepared calls, and drops them."""


def forget() -> None:
    """Drop all prepared calls, and the memory that is kept for the next ones."""
    with _lock:
        _calls.clear()
    for others in forgetting:
        others()
    blocks.pool.release()
    arena.release()
