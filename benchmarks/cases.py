"""What is measured: cells, modes, cases, and the suites that hold them. Adding any is adding an entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class Kind:
    """A cell. gates: blocks of rows of its weights. states: their letters. vectors: names of its own parameters, each
    [H] for every layer and direction. plain: the cell of torch.nn that it varies, None for those of torch.nn."""

    gates: int
    states: str = "h"
    vectors: tuple[str, ...] = ()
    plain: str | None = None


LAYER_NORM = tuple(f"{kind}_{gate}" for gate in "ifgo" for kind in ("input_gain", "recurrent_gain", "offset"))
CELLS = {
    "lstm": Kind(4, "hc"),
    "gru": Kind(3),
    "rnn": Kind(1),
    "lstm-peephole": Kind(4, "hc", ("peephole_i", "peephole_f", "peephole_o"), plain="lstm"),
    "lstm-layer-norm": Kind(4, "hc", (*LAYER_NORM, "cell_gain", "cell_offset"), plain="lstm"),
    "lstm-relu": Kind(4, "hc", plain="lstm"),
    "gru-reset-before": Kind(3, plain="gru"),
}
#: Those that torch.nn has.
PLAIN = tuple(name for name, kind in CELLS.items() if kind.plain is None)


@dataclass(frozen=True)
class Mode:
    """What a call does, and to which kind of layer.

    call: "forward" without gradients, "training" (forward and backward, gradients of x and of all parameters) or
    "backward" alone. unit: of what is measured. stateful: an initial state is given. ragged: sequences of lengths
    between T/4 and T, as a PackedSequence or padded with their lengths. resets: the share of steps before which a
    sequence's state returns to zero. dropout: the rate of units that a sequence's recurrent products do not see.
    zoneout: the rate at which a unit keeps its state. plain: the mode of the plain layer, which the variant's time is
    compared with.
    """

    what: str
    call: Literal["forward", "training", "backward"] = "forward"
    unit: Literal["s", "bytes"] = "s"
    layers: int = 1
    directions: int = 1
    stateful: bool = False
    stream: bool = False
    ragged: Literal["", "packed", "lengths"] = ""
    resets: float = 0.0
    dropout: float = 0.0
    zoneout: float = 0.0
    plain: str | None = None


MODES = {
    "inference": Mode("forward, no gradients"),
    "training": Mode("forward and backward", "training"),
    "backward": Mode("backward alone, its forward not timed", "backward"),
    "streaming": Mode("one step with a given state, through the public layer", stateful=True),
    "stream": Mode("one step of a stream, its state kept inside", stateful=True, stream=True, plain="streaming"),
    "packed": Mode("forward over a PackedSequence", ragged="packed", plain="inference"),
    "packed-training": Mode(
        "forward and backward over a PackedSequence", "training", ragged="packed", plain="training"
    ),
    "bidirectional": Mode("forward through two layers of two directions", layers=2, directions=2),
    "bidirectional-training": Mode("forward and backward, two layers of two directions", "training", "s", 2, 2),
    "lengths": Mode("forward over padded sequences with lengths", ragged="lengths", plain="inference"),
    "lengths-training": Mode(
        "forward and backward over padded sequences with lengths", "training", ragged="lengths", plain="training"
    ),
    "resets": Mode("forward, states reset before 3 % of the steps", resets=0.03, plain="inference"),
    "resets-training": Mode(
        "forward and backward, states reset before 3 % of the steps", "training", resets=0.03, plain="training"
    ),
    "dropout-training": Mode(
        "forward and backward with variational recurrent dropout", "training", dropout=0.25, plain="training"
    ),
    "zoneout-training": Mode("forward and backward with zoneout", "training", zoneout=0.1, plain="training"),
    "memory": Mode("what one training step adds to the memory of the process, at its peak", "training", "bytes"),
}


@dataclass(frozen=True, order=True)
class Case:
    """One measurement: a cell, a shape (N sequences of T steps, I inputs, H units), a mode, dtype and thread count."""

    cell: str
    N: int
    T: int
    I: int  # noqa: E741 - the field's name
    H: int
    mode: str = "inference"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        allowed: dict[str, Any] = {"cell": tuple(CELLS), "mode": tuple(MODES), "dtype": ("float32", "float64")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}")
        for name in ("N", "T", "I", "H", "threads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")

    def __str__(self) -> str:
        more = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"{self.cell} {self.shape} {self.mode}{more}" + (f" x{self.threads}" if self.threads > 1 else "")

    @property
    def kind(self) -> Kind:
        return CELLS[self.cell]

    @property
    def how(self) -> Mode:
        return MODES[self.mode]

    @property
    def plain(self) -> Case | None:
        """The plain layer's case at the same shape, None where this is one."""
        cell, mode = self.kind.plain or self.cell, self.how.plain or self.mode
        return None if (cell, mode) == (self.cell, self.mode) else replace(self, cell=cell, mode=mode)

    @property
    def random(self) -> bool:
        """Whether the answer depends on draws."""
        return bool(self.how.dropout or self.how.zoneout)

    @property
    def shape(self) -> str:
        return f"{self.N},{self.T},{self.I},{self.H}"

    @property
    def item_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 8

    @property
    def recurrent_bytes(self) -> int:
        """Recurrent weights of one direction of one layer."""
        return self.kind.gates * self.H * self.H * self.item_bytes

    def flops(self, steps: int) -> float:
        """Floating-point operations of the matrix products, `steps` being the sequence lengths summed.

        The backward pass has two products for each of the forward pass: for the inputs' and the weights' gradients.
        """
        mode = self.how
        width = sum(self.I if k == 0 else mode.directions * self.H for k in range(mode.layers)) + mode.layers * self.H
        forward = 2.0 * steps * mode.directions * self.kind.gates * self.H * width
        return forward * {"forward": 1, "training": 3, "backward": 2}[mode.call]

    def bytes(self, providers: int) -> int:
        """About what its arrays take: inputs, weights, and gates and states of all steps, of every provider and once in
        float64, to check against; as much again for gradients."""
        mode, kind = self.how, self.kind
        layers = mode.layers * mode.directions
        weights = layers * kind.gates * self.H * (self.I + self.H)
        steps = self.N * self.T * (self.I + layers * self.H * (kind.gates + len(kind.states)))
        numbers = (weights + steps) * (1 if mode.call == "forward" else 2)
        return numbers * (8 + providers * self.item_bytes)

    @property
    def effort(self) -> float:
        """About how much of a suite's time the case needs: a part for compiling, and one that grows with the work."""
        return 3.0 + 0.7e-9 * self.flops(self.N * self.T)

    def fields(self) -> dict[str, Any]:
        return asdict(self)


SHAPES = (
    (1, 1, 64, 64),
    (1, 100, 32, 32),
    (1, 100, 128, 128),
    (1, 100, 512, 512),
    (8, 64, 64, 64),
    (16, 128, 128, 128),
    (32, 100, 256, 256),
    (64, 50, 512, 512),
    (128, 100, 64, 64),
    (256, 28, 28, 128),
    (1, 1000, 16, 16),
    (64, 200, 1, 32),
    (20, 35, 650, 650),
    (16, 1, 512, 512),
    (4, 2, 300, 600),
)


def core() -> list[Case]:
    """Every shape for every cell, inference and training; then each other mode at a shape typical of it, but for those
    that belong to the suite of variants alone."""
    cases = [Case(cell, *shape, mode) for mode in ("inference", "training") for shape in SHAPES for cell in PLAIN]
    typical = {
        "streaming": (1, 1, 64, 64),
        "stream": (1, 1, 64, 64),
        "backward": (16, 128, 128, 128),
        "packed": (32, 100, 64, 64),
        "packed-training": (32, 100, 64, 64),
        "lengths": (32, 100, 64, 64),
        "lengths-training": (32, 100, 64, 64),
        "resets": (16, 64, 64, 64),
        "resets-training": (16, 64, 64, 64),
        "bidirectional": (16, 64, 64, 64),
        "bidirectional-training": (16, 64, 64, 64),
        "memory": (32, 200, 128, 128),
    }
    cases += [Case(cell, *shape, mode) for mode, shape in typical.items() for cell in PLAIN]
    return cases + [Case(cell, 16, 64, 64, 64, "training", "float64") for cell in PLAIN]


def quick() -> list[Case]:
    """A few small shapes: within a minute."""
    cases = [Case(cell, *shape, "inference") for cell in PLAIN for shape in ((1, 100, 32, 32), (16, 32, 64, 64))]
    cases += [Case(cell, 16, 32, 64, 64, "training") for cell in PLAIN]
    return [*cases, Case("lstm", 1, 1, 64, 64, "streaming"), Case("gru", 16, 32, 32, 32, "packed")]


def scaling() -> list[Case]:
    """T, N, H and the thread count, one at a time around one shape."""
    base = Case("lstm", 16, 64, 128, 128)
    values: dict[str, tuple[int, ...]] = {
        "T": (1, 4, 16, 64, 256),
        "N": (1, 2, 4, 8, 16, 32, 64),
        "H": (16, 32, 64, 128, 256, 512),
        "threads": (1, 2),
    }
    sweep = [
        replace(base, mode=mode, **{axis: v})  # type: ignore[arg-type]
        for mode in ("inference", "training")
        for axis in values
        for v in values[axis]
    ]
    return list(dict.fromkeys(sweep))


def variants() -> list[Case]:
    """What leaves the fast path elsewhere, each beside the plain layer at its shape and what is written today."""
    usual, long, policy = (32, 100, 64, 128), (32, 1000, 64, 128), (128, 128, 64, 256)
    calls = ("inference", "training")
    cases = [Case(cell, *usual, call) for cell, kind in CELLS.items() if kind.plain for call in calls]
    for mode in ("lengths", "packed"):
        cases += [Case(cell, *usual, m) for cell in ("lstm", "gru") for m in (mode, f"{mode}-training")]
        cases += [Case("lstm", *long, m) for m in (mode, f"{mode}-training")]
    cases += [Case(cell, *policy, m) for cell in ("lstm", "gru") for m in ("resets", "resets-training")]
    cases += [Case("lstm", *usual, mode) for mode in ("dropout-training", "zoneout-training")]
    return cases + [Case(cell, *usual, call, "float64") for cell in ("lstm", "gru") for call in calls]


class Suite(NamedTuple):
    """cases: made when asked for. minutes: how long they are to take with every provider there, for each thread count
    apart; on a busy machine it may be more, but after twice that time no further case begins."""

    what: str
    cases: Callable[[], list[Case]]
    minutes: float


SUITES = {
    "core": Suite("every shape and cell, inference and training; each other mode", core, 10.5),
    "quick": Suite("a few small shapes, within a minute", quick, 0.4),
    "variants": Suite("cells, lengths, resets, dropout, float64 beside the plain layer", variants, 4.2),
    "scaling": Suite("how time grows with T, N, H and threads", scaling, 2.4),
}


class Kept(NamedTuple):
    """Results whose tables and plots are kept beside the code. threads: for every case, None for the case's own."""

    suite: str
    threads: int | None

    def cases(self) -> list[Case]:
        """Those that are shown."""
        cases = SUITES[self.suite].cases()
        return cases if self.threads is None else [replace(case, threads=self.threads) for case in cases]


FIGURES = {
    "core_one_thread": Kept("core", 1),
    "core_two_threads": Kept("core", 2),
    "scaling": Kept("scaling", None),
    "variants": Kept("variants", 1),
}


def left_out(suite: str, case: Case, provider: str) -> str | None:
    """Why a suite leaves a provider out of a case, which its results then say, or None."""
    if provider == "torch.compile":  # compiles some 15 s for each cell, call, dtype and kind of mask
        if suite == "quick":
            return "compiles for longer than the suite quick can wait"
        if case.dtype == "float64":
            return "compiled for float32 alone, to save time"
        if case.how.ragged or (case.how.resets and suite != "variants"):
            return "compiled with masks for resets in the suite variants alone, to save time"
    return None
