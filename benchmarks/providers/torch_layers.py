"""Everything that is called like a layer of torch.nn: fastcells, torch.nn on CPU and GPU, and Python loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import fastcells
from benchmarks.cases import Case
from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider


class TorchLike(Provider):
    """A provider whose layers have torch.nn's constructors, parameters and results."""

    torch_device = "cpu"
    note = ""

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        """A new layer. options: torch.nn's."""
        raise NotImplementedError

    def prepare(self, problem: Problem) -> Prepared:
        return self.at(problem, getattr(torch, problem.case.dtype))

    def at(self, problem: Problem, dtype: torch.dtype) -> Prepared:
        """The case in `dtype`, which is another than its own for the truth alone."""
        case, mode = problem.case, problem.case.kind
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

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array).to(self.torch_device, dtype)

        x = tensor(problem.x)
        given: Any = problem.packed(problem.x, x) if mode.packed else x
        states = [tensor(value) for value in problem.states.values()]
        hx: Any = None if not states else tuple(states) if case.cell == "lstm" else states[0]
        cotangents = [tensor(value) for value in problem.cotangents.values()]
        if mode.packed:
            cotangents[0] = problem.packed(problem.cotangents["y"], x).data
        training = mode.call != "forward"
        leaf = given.data if mode.packed else given
        leaf.requires_grad_(training)
        wanted = [leaf, *layer.parameters()]
        names = ["dx", *(f"d{name}" for name, _ in layer.named_parameters())]

        def forward() -> Any:
            y, final = layer(given, hx)
            return y, *(final if case.cell == "lstm" else (final,))

        def backward(outputs: Any) -> Any:
            y, *finals = outputs
            return torch.autograd.grad([y.data if mode.packed else y, *finals], wanted, cotangents)

        def infer() -> Any:
            with torch.inference_mode():
                return forward()

        def padded(value: Any) -> np.ndarray:
            if isinstance(value, PackedSequence):
                value, _ = pad_packed_sequence(value, total_length=case.T)
            return value.detach().cpu().numpy()

        def outputs(result: Any) -> dict[str, np.ndarray]:
            return dict(zip(("y", "h_n", "c_n"), map(padded, result), strict=False))

        def gradients(result: Any) -> dict[str, np.ndarray]:
            dx, *others = result
            dx = padded(given._replace(data=dx) if mode.packed else dx)
            return dict(zip(names, (dx, *(g.cpu().numpy() for g in others)), strict=True))

        def held() -> int:
            return kept_bytes(forward, wanted)

        if not training:
            return Prepared(self.waiting(infer), outputs, note=self.note)
        if mode.call == "training":
            return Prepared(self.waiting(lambda: backward(forward())), gradients, held=held, note=self.note)
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

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        return getattr(fastcells.nn, case.cell.upper())(**options)


class TorchCPU(TorchLike):
    name = "torch.nn"

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        return getattr(torch.nn, case.cell.upper())(**options)


class TorchCUDA(TorchCPU):
    name = "torch.nn CUDA"
    device = torch_device = "cuda"

    def available(self) -> str | None:
        return None if torch.cuda.is_available() else "no GPU that torch can use"

    def waiting(self, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = call()
            torch.cuda.synchronize()
            return result

        return run


class Loop(TorchLike):
    """The cell's own Python function over torch tensors, step by step."""

    name = "torch loop"

    def layer(self, case: Case, **options: Any) -> torch.nn.Module:
        layer = getattr(torch.nn, case.cell.upper())(**options)
        layer.forward = self.loop(layer, {"rnn": "rnn_tanh"}.get(case.cell, case.cell))
        return layer

    def loop(self, layer: Any, cell_name: str) -> Callable:
        """`layer.forward` as a loop over time."""
        cell = getattr(fastcells.cells, cell_name)
        directions = 2 if layer.bidirectional else 1

        def forward(given: Any, hx: Any = None) -> Any:
            packed = isinstance(given, PackedSequence)
            x, batch_sizes = (given.data, given.batch_sizes) if packed else (given, None)
            states = None if hx is None else hx if isinstance(hx, tuple) else (hx,)
            finals = []
            for k, weights in enumerate(batched(layer.all_weights, directions)):
                rows = slice(k * directions, (k + 1) * directions)
                given_k = None if states is None else tuple(s[rows] for s in states)
                parameters = [(*w, None) for w in weights]
                x, final = fastcells.unrolled.layer(cell, x, given_k, parameters, batch_sizes)
                finals.append(final)
            stacked = tuple(torch.cat(s) for s in zip(*finals, strict=True))
            y = given._replace(data=x) if packed else x
            return y, stacked if len(stacked) > 1 else stacked[0]

        return forward


def batched(items: list, size: int) -> list[list]:
    return [items[k : k + size] for k in range(0, len(items), size)]
