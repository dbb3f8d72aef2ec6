"""Switching a model's layers in place, and back."""

import copy
import pickle

import pytest
import torch
from helpers import Case, check, compare, outputs, record
from torch.nn.utils import parametrizations, parametrize

from fastcells import nn
from fastcells.convert import Conversion, convert, revert

LAYERS = ["RNN", "LSTM", "GRU"]
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]


class Custom(torch.nn.LSTM):
    pass


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


def test_subclasses_are_left():
    model = torch.nn.ModuleDict({"torchs": Custom(3, 4), "ours": CustomOurs(3, 4), "plain": torch.nn.LSTM(3, 4)})
    report = convert(model)
    assert list(report.swapped) == ["plain"]
    assert type(model["torchs"]) is Custom
    assert "test_convert.Custom is a subclass of a torch.nn class" in report.left["torchs"]
    assert "test_convert.CustomOurs is a subclass of a fastcells class" in report.left["ours"]
    report = revert(model)
    assert list(report.swapped) == ["plain"]
    assert set(report.left) == {"torchs", "ours"}


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


def test_parametrized_subclass_is_left():
    model = Custom(3, 4)
    parametrizations.weight_norm(model, "weight_hh_l0")
    kind = type(model)
    assert "subclass" in convert(model).left[""]
    assert type(model) is kind


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
    model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(3, 4), "decoder": Custom(3, 4)})
    lines = str(convert(model)).splitlines()
    assert lines[:3] == ["swapped 1", "  encoder: fastcells.nn.LSTM", "left 1"]
    assert lines[3].startswith("  decoder: ")
    assert str(convert(torch.nn.Linear(3, 4))) == "no recurrent layers found"


@pytest.mark.parametrize("switch", [convert, revert])
@pytest.mark.parametrize("bad", [None, "model", torch.nn.LSTM, [torch.nn.LSTM(3, 4)], torch.zeros(3)])
def test_only_modules(switch, bad):
    with pytest.raises(TypeError, match=rf"model must be a torch.nn.Module, got {type(bad).__name__}"):
        switch(bad)
