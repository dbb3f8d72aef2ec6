"""Exported models: ONNX Runtime computes what torch does."""

import subprocess
import sys

import pytest
import torch
from helpers import Case, cast, loop, tensors
from test_recurrent import SHIPPED

import fastcells
from fastcells import cell, cells, functional, importers, nn, unrolled
from fastcells.expression import OPERATIONS, tanh

pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")
DEEP = {"num_layers": 2, "bidirectional": True}


def export(module, *args, **options):
    """What ONNX Runtime computes of these, and the kinds of nodes there are."""
    program = fastcells.onnx.export(module.eval(), args, verbose=False, **options)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]

    def run(*given):
        results = session.run(None, dict(zip(names, (t.numpy() for t in tensors(given)), strict=True)))
        return tuple(map(torch.from_numpy, results))

    return run, {node.op_type for node in program.model.graph}


def check(results, expected):
    for got, truth in zip(results, tensors(expected), strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)


CASES = [
    Case(cell, dtype=torch.float32, **options)
    for cell in ("lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu")
    for options in ({"bias": False}, {"states": True, "batch_first": True, **DEEP})
] + [Case("lstm", layout="unbatched", dtype=torch.float32, states=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_layers(case):
    x, hx = case.data()
    args = (x,) if hx is None else (x, hx)
    run, nodes = export(case.module(nn), *args)
    check(run(*args), case.module(torch.nn)(*args))
    assert ("Scan" if "proj" in case.cell else case.cell.partition("_")[0].upper()) in nodes


class Side(torch.nn.ModuleDict):
    """Layers by side, since an export takes its second."""

    def forward(self, x):
        return [layer(x)[0] for layer in self.values()]


def test_every_cell():
    torch.manual_seed(0)
    layers = {c.name: nn.Recurrent(c, 4, 6, bidirectional=True) for c in SHIPPED}
    x = torch.randn(5, 3, 4)
    run, nodes = export(Side(layers), x)
    for (name, layer), y in zip(layers.items(), run(x), strict=True):
        torch.testing.assert_close(y, loop(layer)(x)[0], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert {"LSTM", "GRU", "RNN", "Scan"} <= nodes


def test_every_operation_has_a_translation():
    assert {*fastcells.onnx.POINTWISE, *fastcells.onnx.COMPOSED} == set(OPERATIONS)


class WithLengths(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, *hx):
        return self.layer(x, hx if len(hx) > 1 else hx[0] if hx else None, lengths=lengths)


@pytest.mark.parametrize(
    ("cell", "states"), [("lstm", False), ("lstm", True), ("lstm_proj", True), ("gru", True), ("mgu", False)]
)
def test_lengths_are_an_input(cell, states):
    """sequence_lens of ONNX's operators, a condition in the body of a Scan; a sequence of length 0 keeps its state."""
    if cell == "mgu":
        torch.manual_seed(0)
        layer, x, hx = nn.Recurrent(cells.mgu, 4, 6, bidirectional=True), torch.randn(5, 3, 4), torch.randn(2, 3, 6)
        truth = loop(layer)
    else:
        case = Case(cell, dtype=torch.float32, states=True, **DEEP)
        layer, truth, (x, hx) = case.module(nn), case.module(nn), case.data()
    hx = tuple(tensors(hx)) if states else ()
    run, _ = export(WithLengths(layer), x, torch.tensor([5, 5, 5]), *hx)
    for lengths in ([5, 2, 3], [0, 5, 1]):
        args = x, torch.tensor(lengths), *hx
        check(run(*args), WithLengths(truth)(*args))


def test_any_number_of_steps_and_sequences():
    case = Case("gru", num_layers=2, dtype=torch.float32)
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    run, _ = export(case.module(nn), case.data()[0], dynamic_shapes=({0: steps, 1: batch},))
    x = torch.randn(9, 2, 4)
    check(run(x), case.module(torch.nn)(x))


@cell(gates="h", inputs="mask", step_inputs="shift")
def fed(x, u, s, p):
    return tanh(x.h + u.h(p.mask * s.h)) + p.shift


class Fed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.u = (torch.nn.Parameter(torch.randn(2, 6, n)) for n in (4, 6))

    def forward(self, x, mask, shift):
        parameters = [(w, u, None, None, None) for w, u in zip(self.w, self.u, strict=True)]
        return functional.layer(fed, x, None, parameters, inputs=[mask, shift])


def test_a_cell_with_inputs_of_its_own():
    torch.manual_seed(0)
    module, args = Fed(), (torch.randn(5, 3, 4), torch.rand(2, 3, 6), torch.randn(2, 5, 3, 6))
    run, _ = export(module, *args)
    x, *inputs = args
    parameters = [(w, u, None, None, None) for w, u in zip(module.w, module.u, strict=True)]
    y, finals = unrolled.layer(fed, x, None, parameters, None, inputs)
    check(run(*args), (y, *finals))


def test_which_exporter_may_be_said():
    layer, x = nn.GRU(4, 6), torch.randn(5, 3, 4)
    run, _ = export(layer, x, dynamo=True)
    check(run(x), layer(x))
    with pytest.raises(ValueError, match="dynamo must be True"):
        fastcells.onnx.export(layer, (x,), dynamo=False)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_single_steps(kind):
    torch.manual_seed(0)
    module, x = getattr(nn, kind)(4, 6), torch.randn(3, 4)
    run, _ = export(module, x)
    check(run(x), module(x))


def test_half_precision_is_float32_inside():
    case = Case("gru", dtype=torch.float16)
    x = cast(case.data()[0], torch.float16)
    run, _ = export(case.module(nn).half(), x)
    torch.testing.assert_close(run(x)[0], case.module(torch.nn).double()(x.double())[0].half(), rtol=2e-3, atol=2e-3)


def test_there_and_back():
    case = Case("lstm", bidirectional=True, dtype=torch.float32)
    model = fastcells.onnx.export(case.module(nn), (case.data()[0],), verbose=False).model_proto
    (layer,) = importers.from_onnx(model).values()
    for name, weight in case.module(nn).named_parameters():
        torch.testing.assert_close(layer.get_parameter(name), weight)


def test_with_torchs_own_function(tmp_path):
    case = Case("rnn_relu", dtype=torch.float32)
    x, table = case.data()[0], fastcells.onnx.translation_table()
    torch.onnx.export(case.module(nn), (x,), tmp_path / "model.onnx", custom_translation_table=table, verbose=False)
    (y, h) = runtime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": x.numpy()})
    check(map(torch.from_numpy, (y, h)), case.module(torch.nn)(x))


class Packed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.layer(packed)[0].data


class Reset(Packed):
    def forward(self, x, lengths):
        return self.layer(x, reset=torch.arange(5)[:, None] == lengths)


@pytest.mark.parametrize(("kind", "words"), [(Packed, "pad it, give lengths="), (Reset, "reset, reverse")])
def test_what_cannot_be_exported_is_said(kind, words):
    args = torch.randn(5, 3, 4), torch.tensor([5, 2, 3])
    with pytest.raises(nn.NotExported, match=words):
        fastcells.onnx.export(kind(nn.GRU(4, 6)), args, verbose=False)


def test_packages_are_imported_by_a_call_alone():
    code = "import sys, fastcells; sys.exit(any(n.startswith('onnx') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
