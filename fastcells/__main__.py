"""The command line: ``python -m fastcells profile | info | warmup | clear-cache``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, cells, nn, roof, warmup
from .cell import Cell
from .cpu import store, team
from .cpu.engine import DTYPES
from .cpu.host import host
from .profile.layer import profile_layer
from .profile.picture import roofline
from .profile.words import compiled, quantity, table
from .terminal import give_up
from .warmup import CELLS, find_cell

DTYPE = {name: dtype for dtype, name in DTYPES.items()}
LAYERS: dict[str, tuple[Callable[..., nn.DropIn], Cell]] = {
    "lstm": (nn.LSTM, cells.lstm),
    "gru": (nn.GRU, cells.gru),
    "rnn": (nn.RNN, cells.rnn_tanh),
    "rnn_relu": (partial(nn.RNN, nonlinearity="relu"), cells.rnn_relu),
    "lstm_cell": (nn.LSTMCell, cells.lstm),
    "gru_cell": (nn.GRUCell, cells.gru),
    "rnn_cell": (nn.RNNCell, cells.rnn_tanh),
}
"""Modules by name, each with its cell."""
STEPS = ("lstm_cell", "gru_cell", "rnn_cell")
"""Those that take one step."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows what there is)\n")


def whole(most: int) -> Callable[[str], int]:
    """An argument type: a whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argument type: a number greater than 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number greater than 0, got {text!r}")
    return number


# ---- profile ----
def add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="throughput of a layer, share of the machine's limits, and where the time goes",
        description="Throughput of a layer, share of the machine's limits, and where the time goes.",
    )
    names = f"{', '.join(LAYERS)}; a cell of fastcells.cells; or MODULE:NAME for a cell of your own"
    parser.add_argument("cell", metavar="CELL", type=profiled, help=names)
    size = whole(1 << 20)
    parser.add_argument("--hidden", type=size, default=128, metavar="H", help="hidden size; default: 128")
    parser.add_argument("--batch", type=size, default=32, metavar="N", help="sequences; default: 32")
    parser.add_argument("--steps", type=size, metavar="T", help="sequence length; default: 100")
    parser.add_argument("--input", type=size, metavar="I", help="input size; default: the hidden size")
    parser.add_argument("--layers", type=whole(64), metavar="L", help="default: 1")
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--proj-size", type=size, metavar="P", help="projection of the hidden state; default: none")
    parser.add_argument("--packed", action="store_true", help="a PackedSequence of lengths from T/4 to T")
    parser.add_argument("--lengths", action="store_true", help="the same lengths, padded and given as lengths=")
    parser.add_argument("--dtype", choices=list(DTYPE), default="float32", help="default: float32")
    parser.add_argument("--threads", type=whole(1024), metavar="N", help="default: as many as torch would use")
    parser.add_argument("--train", action="store_true", help="forward and backward; default: inference")
    parser.add_argument("--rate", type=positive, metavar="HZ", help="time steps of the signal a second")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a roofline plot (PNG, SVG, PDF)")
    parser.set_defaults(run=run_profile, fail=parser.error)


def run_profile(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        check_plot(arguments)
    name, make, _ = arguments.cell
    options = layer_options(arguments)
    steps = 1 if name in STEPS else arguments.steps or 100
    needed, there_is = memory_needed(arguments, steps), roof.memory()
    if there_is is not None and needed > there_is:
        of, most = quantity(needed, 1024), quantity(there_is, 1024)
        arguments.fail(f"these sizes need about {of}B of memory, and there is {most}B")
    with roof.using_threads(arguments.threads or torch.get_num_threads()):
        torch.manual_seed(0)
        dtype = DTYPE[arguments.dtype]
        inputs = arguments.input or arguments.hidden
        try:
            module = make(inputs, arguments.hidden, dtype=dtype, **options)
        except (ValueError, TypeError) as error:  # such as a projection that the cell cannot have
            arguments.fail(str(error).partition("\n")[0])
        x: Any = torch.randn(steps, arguments.batch, inputs, dtype=dtype)
        lengths = torch.randint(max(1, steps // 4), steps + 1, (arguments.batch,))
        lengths[0] = steps
        if name in STEPS:
            x = x[0]
        if arguments.packed:
            x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        given: dict[str, Any] = {"lengths": lengths} if arguments.lengths else {}
        found = profile_layer(module, x, train=arguments.train, rate=arguments.rate, **given)
    if arguments.plot is not None:
        roofline([found], arguments.plot)
    if arguments.json:
        print(json.dumps({"machine": machine(), "cache": cache(), **found.to_dict()}, indent=2))
        return
    print(found)
    print(f"  cache: {cache_line()}")
    if arguments.plot is not None:
        print(f"plot: {arguments.plot}")


def profiled(text: str) -> tuple[str, Callable[..., nn.DropIn], Cell]:
    """An argument type: (name, its class, its cell) of a module to profile."""
    if text in LAYERS:
        return text, *LAYERS[text]
    try:
        cell = find_cell(text, tuple(dict.fromkeys((*LAYERS, *CELLS))))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text, partial(nn.Recurrent, cell), cell


def layer_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the module is made with besides its sizes; ends the program where it has no such option."""
    if arguments.packed and arguments.lengths:
        arguments.fail("argument --lengths: is for padded sequences, --packed has lengths of its own")
    if arguments.cell[0] not in STEPS:
        options = {"num_layers": arguments.layers or 1, "bidirectional": arguments.bidirectional}
        return options | ({"proj_size": arguments.proj_size} if arguments.proj_size else {})
    for name in ("steps", "layers", "bidirectional", "proj_size", "packed", "lengths"):
        if getattr(arguments, name):
            arguments.fail(f"argument --{name.replace('_', '-')}: {arguments.cell[0]} takes one step of one layer")
    return {}


def memory_needed(arguments: argparse.Namespace, steps: int) -> int:
    """Bytes, about: weights, their panels and gradients; input, and what every layer leaves at each time step."""
    gates = len(arguments.cell[2].gates)
    hidden, directions = arguments.hidden, 1 + arguments.bidirectional
    weights = values = 0
    inputs = arguments.input or hidden
    for _ in range(arguments.layers or 1):
        weights += directions * gates * hidden * (inputs + hidden)
        values += inputs + directions * hidden * (2 + gates * arguments.train)
        inputs = directions * hidden
    numbers = weights * (3 if arguments.train else 2) + steps * arguments.batch * values
    return numbers * DTYPE[arguments.dtype].itemsize


def check_plot(arguments: argparse.Namespace) -> None:
    """Before the measuring: can this file be written?"""
    from matplotlib.backend_bases import FigureCanvasBase

    plot, endings = arguments.plot, FigureCanvasBase.get_supported_filetypes()
    if plot.suffix[1:].lower() not in endings:
        arguments.fail(f"argument --plot: cannot write {str(plot)!r}; endings: {', '.join(sorted(endings))}")
    try:
        plot.parent.mkdir(parents=True, exist_ok=True)
        there = plot.exists()
        plot.open("ab").close()
        if not there:
            plot.unlink()
    except OSError as error:
        arguments.fail(f"argument --plot: cannot write {str(plot)!r}: {error.strerror}")


# ---- info ----
def add_info(commands: Any) -> None:
    text = "the processor and its limits, threads, kernel cache, versions, and torch's own routes"
    parser = commands.add_parser("info", help=text, description=f"Show {text}.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_info)


def machine() -> dict[str, Any]:
    """What results depend on, in words and numbers."""
    h = host()
    return {
        "processor": processor(),
        "cpu": h.cpu,
        "features": sorted(f[1:] for f in h.features.split(",") if f.startswith("+")),
        "vector_bytes": h.vector_bytes,
        "vector_registers": h.registers,
        "cores": os.cpu_count(),
        "threads": team.size(),
        "team_library": team.library(),
        "versions": {
            "fastcells": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numba", "llvmlite", "numpy")},
        },
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cache() -> dict[str, Any]:
    """State of the kernel cache."""
    files = store.stored()
    try:
        folder, refused = store.place(), None
    except OSError as error:
        folder, refused = store.folders()[0], str(error)
    return {
        "folder": str(next((f.parent for f in files), folder)),
        "kernels": len([f for f in files if f.suffix == ".o"]),
        "bytes": sum(files.values()),
        "refused": refused,  # why no more is kept
    }


def cache_line() -> str:
    """The same in words."""
    state = cache()
    line = f"{state['folder']}: {state['kernels']} kernels, {quantity(state['bytes'], 1024)}B"
    return line if state["refused"] is None else f"{line}; nothing more is kept ({state['refused']})"


def run_info(arguments: argparse.Namespace) -> None:
    threads = team.size()
    levels = [*roof.caches()]
    sizes = [(name, size // 2) for name, size in levels] + [
        ("memory", 4 * max([s for _, s in levels], default=1 << 25))
    ]
    facts = {
        **machine(),
        "peak_flops": {name: roof.peak_flops(dtype, threads) for name, dtype in DTYPE.items()},
        "bandwidth": {name: roof.bandwidth(min(size, 1 << 28), threads) for name, size in sizes},
        "cache": cache(),
        "torch_routes": torch_routes(),
    }
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    widths = {name: host().lanes(dtype.itemsize) for name, dtype in DTYPE.items()}
    rows = [
        ("processor", f"{facts['processor']} ({facts['cpu']}), {facts['cores']} cores"),
        ("features", " ".join(facts["features"])),
        ("vectors", f"{8 * host().vector_bytes} bits ({', '.join(f'{n} {k}' for k, n in widths.items())}), "
         f"{host().registers} registers"),
        ("multiply-adds", ", ".join(f"{quantity(v)}FLOP/s {k}" for k, v in facts["peak_flops"].items())),
        ("bandwidth", ", ".join(f"{quantity(v)}B/s {k}" for k, v in facts["bandwidth"].items())),
        ("threads", f"{threads}, of {facts['team_library'] or 'no OpenMP library: kernels run on the calling thread'}"),
        ("cache", cache_line()),
        ("versions", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())),
    ]  # fmt: skip
    print("\n".join(table(rows)))
    print("\nwhat torch.nn does for each kind of layer (inference)")
    print("\n".join(table([(f"  {kind}", route) for kind, route in facts["torch_routes"].items()])))


def torch_routes() -> dict[str, str]:
    """How torch.nn runs each kind of layer here, by the operators that it calls."""
    from torch.nn.modules import rnn
    from torch.nn.utils.rnn import pack_padded_sequence
    from torch.utils._python_dispatch import TorchDispatchMode

    layers: list[tuple[str, Callable[..., torch.nn.Module], torch.dtype, bool]] = [
        (f"{kind.__name__} {name}", kind, dtype, False)
        for kind in (rnn.LSTM, rnn.GRU, rnn.RNN)
        for name, dtype in DTYPE.items()
    ]
    layers.append(("LSTM float32, proj_size", lambda *a, **k: rnn.LSTM(*a, proj_size=4, **k), torch.float32, False))
    layers += [(f"{k.__name__} float32, packed", k, torch.float32, True) for k in (rnn.LSTM, rnn.GRU, rnn.RNN)]

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(function.name())
            return function(*args, **(kwargs or {}))

    def calls(module: torch.nn.Module, input: Any) -> list[str]:
        with warnings.catch_warnings(), torch.no_grad(), Calls() as seen:
            warnings.simplefilter("ignore")
            module(input)
        return seen.names

    found = {}
    for name, kind, dtype, packed in layers:
        module = kind(8, 8, dtype=dtype)
        counts = []
        for steps in (2, 12):
            x: Any = torch.zeros(steps, 3, 8, dtype=dtype)
            if packed:
                x = pack_padded_sequence(x, torch.tensor([steps, steps, 1]))
            counts.append(calls(module, x))
        fused = [key for key in counts[0] if "mkldnn_rnn" in key]
        each = (len(counts[1]) - len(counts[0])) / 10
        found[name] = f"oneDNN ({fused[0]})" if fused else f"step by step, {each:.0f} operator calls each"
    for cell in (rnn.LSTMCell, rnn.GRUCell, rnn.RNNCell):
        count = len(calls(cell(8, 8), torch.zeros(3, 8)))
        found[f"{cell.__name__} float32"] = f"{count} operator calls"
    return found


# ---- the kernel cache ----
def add_warmup(commands: Any) -> None:
    parser = commands.add_parser(
        "warmup",
        help="compile kernels ahead of their use",
        description="Compile kernels ahead of their use, and keep them. A process that loads them needs no compiler.",
        epilog=f"cells: {', '.join(CELLS)}, or MODULE:NAME for a cell of your own",
    )
    default = [cell.name for cell in (cells.lstm, cells.gru, cells.rnn_tanh, cells.rnn_relu)]
    parser.add_argument("cells", nargs="*", metavar="CELL", default=default, help=f"default: {' '.join(default)}")
    parser.add_argument("--dtype", action="append", choices=list(DTYPE), help="may be repeated; default: float32")
    sizes = "hidden size of the layers; may be repeated. Up to 24 units, some processors have kernels of their own"
    parser.add_argument("--hidden", type=whole(1 << 20), action="append", metavar="H", default=[], help=sizes)
    parser.add_argument("--projection", action="store_true", help="of layers with proj_size")
    parser.set_defaults(run=run_warmup, fail=parser.error)


def run_warmup(arguments: argparse.Namespace) -> None:
    for name in arguments.cells:
        try:
            find_cell(name)
        except ValueError as error:
            arguments.fail(f"argument CELL: {error}")
    os.environ.setdefault("FASTCELLS_QUIET", "1")  # each kernel has a line of its own
    dtypes = [DTYPE[name] for name in arguments.dtype or ["float32"]]
    wants = warmup.wanted(arguments.cells, dtypes, arguments.projection, arguments.hidden)
    for name, seconds in warmup.run(wants):
        print(f"{name:36} {compiled(seconds)}", flush=True)
        if seconds:
            check_kept()
    print(f"kept in {cache()['folder']}")


def check_kept() -> None:
    """Ends the program where nothing that is compiled is kept."""
    try:
        store.place()
    except OSError as error:
        sys.exit(f"no kernel is kept: {error}")


def add_clear(commands: Any) -> None:
    text = "delete all stored kernels"
    parser = commands.add_parser("clear-cache", help=text, description=f"{text.capitalize()}.")
    parser.set_defaults(run=run_clear)


def run_clear(arguments: argparse.Namespace) -> None:
    if (folder := store.folders()[0]).exists() and not folder.is_dir():
        sys.exit(f"{folder} is no folder")
    try:
        gone = store.clear()
    except OSError as error:
        sys.exit(f"cannot delete {error.filename}: {error.strerror}")
    where = ", ".join(sorted({str(f.parent) for f in gone})) or str(store.folders()[0])
    print(f"deleted {len(gone)} files of kernels, {sum(gone.values()) / 1024:.0f} KiB, in {where}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit status 2 where the arguments are bad, 1 where a package is missing."""
    parser = Parser(prog="python -m fastcells", description="Fused recurrent layers: profiler and kernel cache.")
    parser.add_argument("--version", action="version", version=f"fastcells {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (add_profile, add_info, add_warmup, add_clear):
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        sys.exit("matplotlib is not installed: pip install matplotlib")
    except OSError as error:
        give_up(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
