"""Switching a model's layers in place, and back."""

import copy
import pickle

import pytest
import torch
from helpers import Case, check, compare, outputs, record
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastcells import nn
from fastcells.convert import Conversion, convert, revert

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]


class Custom(torch.nn.LSTM):
    pass


class Packing(torch.nn.RNNBase):
    """An argument more, as libraries add it: what torch.nn's forward says is reached by way of super."""

    def forward(self, x, hx=None, lengths=None):
        if lengths is None:
            return super().forward(x, hx=hx)
        packed, state = super().forward(pack_padded_sequence(x, lengths), hx=hx)
        return pad_packed_sequence(packed)[0], state


class PackingLSTM(Packing, torch.nn.LSTM):
    def halved(self, x):
        return self(x)[0] / 2


class PackingGRU(Packing, torch.nn.GRU):
    pass


class OwnCell(torch.nn.LSTMCell):
    """Keeps its state."""

    def forward(self, x):
        self.state = super().forward(x, getattr(self, "state", None))
        return self.state[0]


class OwnLoop(torch.nn.GRU):
    def forward(self, x):
        return x.cumsum(0)


class ByName(torch.nn.GRU):
    def forward(self, x):
        return torch.nn.GRU.forward(self, x.flip(0))


class OwnWeights(torch.nn.LSTM):
    def forward(self, x):
        self._flat_weights = [w * 2 for w in self._flat_weights]
        return super().forward(x)


class OwnKind(torch.nn.RNNCellBase):
    pass


class OwnCheck(torch.nn.LSTM):
    def check_forward_args(self, *_):
        pass


class OwnRun(torch.nn.LSTM):
    def _run(self):
        pass


class OwnAttribute(torch.nn.LSTM):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.stream = "a name that fastcells' layers have"


class CustomOurs(nn.LSTM):
    pass


class Model(torch.nn.Module):
    """One of everything, some of it nested and shared."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Linear(4, 6)
        self.layers = torch.nn.ModuleDict({kind: getattr(torch.nn, kind)(6, 6) for kind in LAYERS})
        self.cells = torch.nn.ModuleDict({kind: getattr(torch.nn, kind)(6, 6) for kind in CELLS})
        self.again = self.layers["GRU"]

    def forward(self, x):
        x = self.embed(x)
        for layer in [*self.layers.values(), self.again]:
            x = layer(x)[0]
        states = [cell(x.sum(0)) for cell in self.cells.values()]
        return torch.stack([s[0] if isinstance(s, tuple) else s for s in states])


def tensors(model, x):
    y = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y.square().sum(), parameters)
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def test_converts_every_layer_and_back():
    model = Model().double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = tensors(model, x)
    identities = {name: id(m) for name, m in model.named_modules()}
    parameters = list(map(id, model.parameters()))
    report = convert(model)
    names = [f"layers.{k}" for k in LAYERS] + [f"cells.{k}" for k in CELLS]
    assert report == Conversion(swapped={n: f"fastcells.nn.{n.split('.')[1]}" for n in names})
    assert all(type(model.get_submodule(n)).__module__ == "fastcells.nn" for n in names)
    assert model.again is model.layers["GRU"]
    assert {name: id(m) for name, m in model.named_modules()} == identities
    assert list(map(id, model.parameters())) == parameters
    assert model.layers["LSTM"]._route(torch.randn(5, 3, 6, dtype=torch.float64)) is None
    check(tensors(model, x), expected)
    again = convert(model)
    assert not again.swapped
    assert again.left == {n: f"already fastcells.nn.{n.split('.')[1]}" for n in names}
    back = revert(model)
    assert back.swapped == {n: f"torch.nn.{n.split('.')[1]}" for n in names}
    assert all(type(model.get_submodule(n)) is getattr(torch.nn, n.split(".")[1]) for n in names)
    assert all(torch.equal(t, expected[n]) for n, t in tensors(model, x).items())
    assert set(revert(model).left) == set(names)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_root_module(kind):
    model = getattr(torch.nn, kind)(3, 4)
    report = convert(model)
    assert type(model) is getattr(nn, kind)
    assert report.swapped == {"": f"fastcells.nn.{kind}"}
    assert "(the model)" in str(report)
    revert(model)
    assert type(model) is getattr(torch.nn, kind)


def test_optimizer_hooks_and_references_stay():
    case = Case("lstm", num_layers=2)
    models, ends = [case.module(torch.nn) for _ in range(2)], []
    x, _ = case.data()
    for model, switch in zip(models, (True, False), strict=True):
        calls = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if switch:
                (convert if step % 2 else revert)(model)
            optimizer.zero_grad()
            model(x)[0].square().sum().backward()
            optimizer.step()
        assert len(calls) == 4
        ends.append({n: p.detach() for n, p in model.named_parameters()})
    check(*ends)


@pytest.mark.parametrize("kind", [Custom, PackingLSTM, PackingGRU], ids=lambda kind: kind.__name__)
def test_subclasses_keep_what_is_theirs(kind):
    torch.manual_seed(0)
    ours = torch.nn.ModuleDict({"layer": kind(3, 6).double()})
    theirs = copy.deepcopy(ours)
    base = "GRU" if issubclass(kind, torch.nn.GRU) else "LSTM"
    report = convert(ours)
    assert report.swapped == {"layer": f"fastcells.nn.{base} under test_convert.{kind.__name__}"}
    assert isinstance(ours["layer"], kind)
    assert isinstance(ours["layer"], getattr(nn, base))
    assert repr(ours) == repr(theirs)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), pickle.loads(pickle.dumps(ours, 0))]
    for model in (ours, *copies):
        assert type(model["layer"]) is type(ours["layer"])
        assert model["layer"]._route(x) is None
        model.load_state_dict(theirs.state_dict(), strict=True)
        for options in [{}, {"lengths": torch.tensor([5, 3])}] if issubclass(kind, Packing) else [{}]:
            results = []
            for layer in (model["layer"], theirs["layer"]):
                layer.zero_grad()
                y, _ = layer(x, **options)
                y.square().sum().backward()
                results.append({"y": y.detach(), **{name: p.grad for name, p in layer.named_parameters()}})
            check(*results)
    assert convert(ours).left == {"layer": f"already fastcells.nn.{base} under test_convert.{kind.__name__}"}
    assert revert(ours).swapped == {"layer": f"test_convert.{kind.__name__}"}
    assert type(ours["layer"]) is kind
    assert revert(ours).left == {"layer": f"already test_convert.{kind.__name__}"}


def test_a_subclass_is_compiled_as_one_graph():
    model, x = PackingLSTM(3, 6), torch.randn(5, 2, 3)
    convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_a_subclass_of_a_cell():
    ours, x = OwnCell(3, 6), torch.randn(4, 2, 3)
    theirs = copy.deepcopy(ours)
    assert convert(ours).swapped == {"": "fastcells.nn.LSTMCell under test_convert.OwnCell"}
    for x_t in x:
        torch.testing.assert_close(ours(x_t), theirs(x_t))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OwnLoop, "a subclass of torch.nn.GRU, and its forward does not call super().forward"),
        (ByName, "its forward does not call super().forward"),
        (OwnWeights, "its forward uses _flat_weights"),
        (OwnCheck, "it has a check_forward_args of its own"),
        (OwnRun, "it has a _run of its own"),
        (OwnAttribute, "it has a stream of its own"),
        (CustomOurs, "a subclass of a fastcells class"),
    ],
    ids=lambda given: given.__name__ if isinstance(given, type) else "",
)
def test_subclasses_that_are_left(kind, reason):
    model = torch.nn.ModuleDict({"own": kind(3, 4), "plain": torch.nn.LSTM(3, 4)})
    report = convert(model)
    assert list(report.swapped) == ["plain"]
    assert type(model["own"]) is kind
    assert f"test_convert.{kind.__name__} is" in report.left["own"]
    assert reason in report.left["own"]
    report = revert(model)
    assert list(report.swapped) == ["plain"]
    assert list(report.left) == ["own"]


def test_recurrent_modules_of_other_kinds_are_left():
    model = torch.nn.Sequential(torch.nn.RNNBase("LSTM", 3, 4), OwnKind(3, 4, True, 1))
    for switch in (convert, revert):
        report = switch(model)
        assert not report.swapped
        assert report.left["0"].startswith("torch.nn.modules.rnn.RNNBase is none of torch.nn's RNN, LSTM, GRU")
        assert report.left["1"].startswith("test_convert.OwnKind is none of")


def test_replaced_forward_is_left():
    model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    original = model[0].forward
    model[0].forward = lambda *args: original(*args)
    report = convert(model)
    assert type(model[0]) is torch.nn.GRU
    assert report.left == {"0": "its forward was replaced on the instance"}


class Last(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4)

    def forward(self, x):
        return self.rnn(x)[0][-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_module_is_left():
    model = torch.nn.Sequential(torch.nn.LSTM(4, 4), torch.nn.Linear(4, 4))
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, torch.qint8)
    for switch in (convert, revert):
        report = switch(model)
        assert not report.swapped
        assert "weights of whole numbers" in report.left["0"]


def test_scripted_module_is_left():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.jit.script(Last()))
    x = torch.randn(5, 2, 3)
    expected = model(x)
    report = convert(model)
    assert not report.swapped
    assert list(report.left) == ["1.rnn"]
    assert "TorchScript" in report.left["1.rnn"]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_parametrized_modules(cell):
    case = Case(cell, num_layers=2, states=True)
    ours, theirs = case.module(torch.nn), case.module(torch.nn)
    x, hx = case.data()
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
    twin = copy.deepcopy(ours)  # shares the class that parametrize generated
    report = convert(ours)
    kind = type(theirs).__bases__[0].__name__
    assert report.swapped == {"": f"fastcells.nn.{kind}"}
    assert not isinstance(twin, nn.DropIn)
    assert type(ours).__name__ == type(theirs).__name__
    compare(ours, theirs, x, hx)
    compare(copy.deepcopy(ours), theirs, x, hx)
    assert convert(ours).left == {"": f"already fastcells.nn.{kind}"}
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_ih_l1")
    compare(ours, theirs, x, hx)
    reverted = copy.deepcopy(ours)
    assert revert(reverted).swapped == {"": f"torch.nn.{kind}"}
    assert not isinstance(reverted, nn.DropIn)
    check(record(reverted, x, hx), record(theirs, x, hx))
    for name in ("weight_hh_l0", "weight_ih_l1"):
        for module in (ours, theirs):
            parametrize.remove_parametrizations(module, name)
    assert type(ours) is getattr(nn, kind)
    compare(ours, theirs, x, hx)


def test_parametrized_after_conversion():
    case = Case("gru")
    ours, theirs = case.module(torch.nn), case.module(torch.nn)
    x, hx = case.data()
    convert(ours)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
    compare(ours, theirs, x, hx)
    assert revert(ours).swapped == {"": "torch.nn.GRU"}


def test_parametrized_subclasses():
    model, left = PackingLSTM(3, 4), OwnLoop(3, 4)
    for module in (model, left):
        parametrizations.weight_norm(module, "weight_hh_l0")
    x, lengths, kind = torch.randn(5, 2, 3), torch.tensor([5, 3]), type(left)
    with torch.no_grad():  # else torch keeps what it made of the weights, and that cannot be copied
        expected = model(x, lengths=lengths)[0]
    assert convert(model).swapped == {"": "fastcells.nn.LSTM under test_convert.PackingLSTM"}
    for module in (model, copy.deepcopy(model)):
        assert isinstance(module, nn.LSTM)
        torch.testing.assert_close(module(x, lengths=lengths)[0], expected)
    assert revert(model).swapped == {"": "test_convert.PackingLSTM"}
    assert not isinstance(model, nn.LSTM)
    assert "subclass" in convert(left).left[""]
    assert type(left) is kind


def test_with_torch_nn_patched(monkeypatch):
    originals = {kind: getattr(torch.nn, kind) for kind in LAYERS + CELLS}
    plain = Model()
    for kind in originals:
        monkeypatch.setattr(torch.nn, kind, getattr(nn, kind))
    patched = Model()
    assert len(convert(plain).swapped) == 6
    assert len(convert(patched).left) == 6
    for model in (plain, patched):
        assert len(revert(model).swapped) == 6
        assert all(type(model.layers[kind]) is originals[kind] for kind in LAYERS)


def test_converted_model_is_copied_pickled_and_loaded():
    model = Model()
    before = pickle.loads(pickle.dumps(model))
    convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.layers["LSTM"]) is nn.LSTM
        before.load_state_dict(other.state_dict(), strict=True)
    model.load_state_dict(before.state_dict(), strict=True)


def test_options_survive():
    model = torch.nn.LSTM(3, 6, 2, batch_first=True, bidirectional=True, dropout=0.5, proj_size=2, bias=False).eval()
    text, x = repr(model), torch.randn(2, 5, 3)
    expected = outputs(model, model(x))
    convert(model)
    assert repr(model) == text
    assert not model.training
    got = outputs(model, model(x))
    assert all(torch.allclose(got[name], expected[name], atol=1e-6) for name in expected)


def test_report_reads_well():
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 4), "decoder": OwnLoop(3, 4)})
    lines = str(convert(model)).splitlines()
    assert lines[:3] == ["swapped 1", "  encoder: fastcells.nn.LSTM", "left 1"]
    assert lines[3].startswith("  decoder: ")
    assert str(convert(torch.nn.Linear(3, 4))) == "no recurrent layers found"


@pytest.mark.parametrize("switch", [convert, revert])
@pytest.mark.parametrize("bad", [None, "model", torch.nn.LSTM, [torch.nn.LSTM(3, 4)], torch.zeros(3)])
def test_only_modules(switch, bad):
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, got {type(bad).__name__}"):
        switch(bad)
