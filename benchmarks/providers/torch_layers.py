"""Everything that is called like a layer of torch.nn: fastcells, and torch.nn on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastcells
from benchmarks.cases import Case
from benchmarks.problem import Problem
from benchmarks.providers import PLAIN_LAYER, Prepared, Provider, Unsupported, refuse_variants
from benchmarks.providers.variants import CELLS

SOBER = "checked without its random draws, timed with them"


class TorchLike(Provider):
    """A provider whose layers have torch.nn's constructors, parameters and results."""

    torch_device = "cpu"
    note = ""

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        """A new layer. options: torch.nn's. Raises Unsupported."""
        raise NotImplementedError

    def bound(
        self, layer: torch.nn.Module, x: Any, hx: Any, lengths: torch.Tensor | None, resets: Any
    ) -> Callable[[], Any]:
        """A function that gives (y, final states) of a layer, with nothing around the layer's call that is not needed.

        x: padded, or a PackedSequence. lengths, resets: None where the case has none.
        """
        raise NotImplementedError

    def prepare(self, problem: Problem) -> Prepared:
        return self.at(problem, getattr(torch, problem.case.dtype))

    def built(self, problem: Problem, dtype: torch.dtype) -> Any:
        """The layer with the case's weights."""
        case, mode = problem.case, problem.case.how
        layer = self.layer(
            case,
            input_size=case.I,
            hidden_size=case.H,
            num_layers=mode.layers,
            bidirectional=mode.directions == 2,
            dtype=dtype,
            device=self.torch_device,
        )
        layer.load_state_dict({name: torch.as_tensor(value) for name, value in problem.weights.items()})
        return layer

    def at(self, problem: Problem, dtype: torch.dtype) -> Prepared:
        """The case in `dtype`, which is another than its own for the truth alone."""
        case, mode = problem.case, problem.case.how
        layer = self.built(problem, dtype)

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array).to(self.torch_device, dtype)

        def packed(array: np.ndarray) -> PackedSequence:
            return pack_padded_sequence(tensor(array), lengths)

        lengths = torch.as_tensor(problem.lengths)
        resets = torch.as_tensor(problem.resets).to(self.torch_device) if mode.resets else None
        whole = mode.ragged == "packed"
        given: Any = packed(problem.x) if whole else tensor(problem.x)
        states = [tensor(value) for value in problem.states.values()]
        hx: Any = None if not states else tuple(states) if len(states) > 1 else states[0]
        cotangents = [tensor(value) for value in problem.cotangents.values()]
        if whole:
            cotangents[0] = packed(problem.cotangents["y"]).data
        training = mode.call != "forward"
        leaf = given.data if whole else given
        leaf.requires_grad_(training)
        wanted = [leaf, *layer.parameters()]
        names = ["dx", *(f"d{name}" for name, _ in layer.named_parameters())]

        call = self.bound(layer, given, hx, lengths if mode.ragged == "lengths" else None, resets)

        def flat(result: Any) -> tuple:
            y, final = result
            return y, *(final if isinstance(final, tuple) else (final,))

        def forward() -> tuple:
            return flat(call())

        def backward(outputs: Any) -> Any:
            y, *finals = outputs
            return torch.autograd.grad([y.data if whole else y, *finals], wanted, cotangents)

        def padded(value: Any) -> np.ndarray:
            if isinstance(value, PackedSequence):
                value, _ = pad_packed_sequence(value, total_length=case.T)
            return value.detach().cpu().numpy()

        def outputs(result: Any) -> dict[str, np.ndarray]:
            return dict(zip(problem.cotangents, map(padded, flat(result)), strict=True))

        def gradients(result: Any) -> dict[str, np.ndarray]:
            dx, *others = result
            dx = padded(given._replace(data=dx) if whole else dx)
            return dict(zip(names, (dx, *(g.cpu().numpy() for g in others)), strict=True))

        def sober() -> Any:
            layer.eval()
            result = backward(forward())
            layer.train()
            return result

        def held() -> int:
            return kept_bytes(forward, wanted)

        if not training:
            return Prepared(self.waiting(call), outputs, within=torch.inference_mode, note=self.note)
        if mode.call == "training":
            step = self.waiting(lambda: backward(forward()))
            checked, note = (sober, "; ".join(filter(None, (self.note, SOBER)))) if case.random else (None, self.note)
            return Prepared(step, gradients, held=held, note=note, checked=checked)
        graph: list[Any] = []
        setup = self.waiting(lambda: graph.append(forward()))
        return Prepared(self.waiting(lambda: backward(graph.pop())), gradients, setup=setup, note=self.note)

    def waiting(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """`call`, returning once its result is there."""
        return call


def kept_bytes(forward: Callable[[], Any], wanted: list[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves during `forward`, those of inputs and parameters apart."""
    storages: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.layout is torch.strided:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        _graph = forward()  # held on to, so that no address is used twice
    own = {tensor.untyped_storage().data_ptr() for tensor in wanted}
    return sum(size for address, size in storages.items() if address not in own)


class Fastcells(TorchLike):
    name = "fastcells"

    def prepare(self, problem: Problem) -> Prepared:
        return self.streamed(problem) if problem.case.how.stream else super().prepare(problem)

    def streamed(self, problem: Problem) -> Prepared:
        stream = self.built(problem, getattr(torch, problem.case.dtype)).stream(problem.case.N)
        x, states = problem.x[0], tuple(torch.as_tensor(value) for value in problem.states.values())

        def checked() -> Any:
            """From the given state; the timed steps go on from each other's."""
            stream.state = states if len(states) > 1 else states[0]
            y = stream(x)[None].copy()
            final = stream.state
            return y, *(final if isinstance(final, tuple) else (final,))

        def answer(result: Any) -> dict[str, np.ndarray]:
            return dict(zip(problem.cotangents, map(np.asarray, result), strict=True))

        return Prepared(lambda: stream(x), answer, checked=checked)

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        if case.kind.plain is not None or case.random:
            if case.random:
                options |= {"recurrent_dropout": case.how.dropout, "zoneout": case.how.zoneout}
            return fastcells.nn.Recurrent(CELLS[case.cell].fastcells, **options)
        return getattr(fastcells.nn, case.cell.upper())(**options)

    def bound(
        self, layer: torch.nn.Module, x: Any, hx: Any, lengths: torch.Tensor | None, resets: Any
    ) -> Callable[[], Any]:
        options = {"lengths": lengths, "reset": resets}
        return partial(layer, x, hx, **{name: value for name, value in options.items() if value is not None})


class PlainLayer(Fastcells):
    """fastcells' plain layer at the shape of a variant: what the variant's time is compared with."""

    name = PLAIN_LAYER
    peer = False

    def prepare(self, problem: Problem) -> Prepared:
        plain = problem.case.plain
        if plain is None:
            raise Unsupported("only beside variants of a layer")
        own = Problem(plain)
        return replace(super().prepare(own), problem=own)


class TorchCPU(TorchLike):
    name = "torch.nn"

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        refuse_variants(case, resets=True)
        return getattr(torch.nn, case.cell.upper())(**options)

    def bound(
        self, layer: torch.nn.Module, x: Any, hx: Any, lengths: torch.Tensor | None, resets: Any
    ) -> Callable[[], Any]:
        if lengths is not None:
            return partial(through_packed, layer, x, hx, lengths)
        return partial(layer, x, hx) if resets is None else partial(steps, layer, x, resets)


def through_packed(layer: Any, x: torch.Tensor, hx: Any, lengths: torch.Tensor) -> Any:
    """The way through a PackedSequence, from padded to padded."""
    y, final = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    return pad_packed_sequence(y, total_length=x.shape[0])[0], final


def steps(layer: Any, x: torch.Tensor, resets: torch.Tensor) -> Any:
    """A step at a time, the states set to zero where a sequence begins anew: recurrent PPO of stable-baselines3-contrib
    (`_process_sequence`)."""
    keep = (~resets).to(x.dtype)[:, None, :, None]
    zero = x.new_zeros(layer.num_layers, x.shape[1], layer.hidden_size)
    states = (zero, zero) if isinstance(layer, torch.nn.LSTM) else (zero,)
    outputs = []
    for step, kept in zip(x.unsqueeze(1), keep, strict=True):
        states = tuple(kept * state for state in states)
        y, states = layer(step, states if len(states) > 1 else states[0])
        states = states if isinstance(states, tuple) else (states,)
        outputs.append(y)
    return torch.cat(outputs), states


class TorchCUDA(TorchCPU):
    name = "torch.nn CUDA"
    device = torch_device = "cuda"
    peer = False
    note = "without TF32, whose products have 11 bits"

    def at(self, problem: Problem, dtype: torch.dtype) -> Prepared:
        torch.backends.cudnn.allow_tf32 = False  # else, as torch has it, the answer is not float32's
        return super().at(problem, dtype)

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else "no GPU that torch can use"

    def waiting(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = call()
            torch.cuda.synchronize()
            return result

        return run
