"""Who is measured: fastcells and its peers. Adding a provider is adding an entry to `PROVIDERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.problem import Problem


class Unsupported(Exception):
    """Why a provider cannot run a case."""


def refuse_variants(case: Case, *, resets: bool = False, training: bool = True) -> None:
    """For providers that have torch's cells alone. resets, training: whether they do these. Raises Unsupported."""
    if case.kind.plain is not None:
        raise Unsupported("has torch's cells alone")
    if case.how.resets and not resets:
        raise Unsupported("does not reset states within a sequence")
    if case.how.call != "forward" and not training:
        raise Unsupported("inference only")
    if case.random:
        raise Unsupported("has no recurrent dropout or zoneout")


@dataclass(frozen=True)
class Prepared:
    """A case ready to run.

    call: what is timed. within: what its caller is in for any number of calls, as a program for all of its inference.
    answer: its result as arrays by name (see `Problem.truth`). setup: run before each call and not timed. held: bytes
    that the forward pass keeps for the backward pass. note: what a reader of the time should know. checked: a call to
    check in place of one that draws at random or goes on from a state. problem: whose truth the answer is to match,
    where it is not the case's own.
    """

    call: Callable[[], Any]
    answer: Callable[[Any], Mapping[str, np.ndarray]]
    within: Callable[[], AbstractContextManager] = nullcontext
    setup: Callable[[], Any] | None = None
    held: Callable[[], int] | None = None
    note: str = ""
    checked: Callable[[], Any] | None = None
    problem: Problem | None = None


class Provider:
    """One implementation of recurrent layers.

    name: in results. packages: that it needs. device: where it runs. peer: to be faster than; others are shown.
    """

    name: str
    packages: tuple[str, ...] = ()
    device = "cpu"
    peer = True

    def available(self) -> str | None:
        """Why this provider cannot run here, or None."""
        missing = [package for package in self.packages if find_spec(package) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def prepare(self, problem: Problem) -> Prepared:
        """Build, load the weights, compile. Raises Unsupported."""
        raise NotImplementedError


def load() -> dict[str, Provider]:
    """All providers by name, fastcells first. Imports torch; each peer's own package is imported when it prepares."""
    from . import jax_scan, loops, numpy_reference, onnx_runtimes, torch_layers

    providers: list[Provider] = [
        torch_layers.Fastcells(),
        torch_layers.PlainLayer(),
        torch_layers.TorchCPU(),
        torch_layers.TorchCUDA(),
        loops.Loop(),
        loops.CompiledLoop(),
        numpy_reference.NumPy(),
        onnx_runtimes.OnnxRuntime(),
        onnx_runtimes.OpenVINO(),
        jax_scan.Jax(),
    ]
    return {provider.name: provider for provider in providers}


#: The provider that all ratios are against.
OURS = "fastcells"
#: fastcells' plain layer at the shape of a variant: what the variant's time is set beside.
PLAIN_LAYER = "plain layer"
