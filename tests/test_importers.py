"""Layers of Keras and ONNX: our module of their weights against what Keras and ONNX Runtime gave for them.

The vectors come from tests/scripts/make_vectors.py.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import check, loop

import fastcells
from fastcells import cells, importers, nn


def vectors(file):
    """{case: (specification, arrays)}"""
    found = {}
    with np.load(Path(__file__).parent / "vectors" / f"{file}.npz") as stored:
        for key in stored.files:
            case, _, name = key.partition("/")
            if name:
                spec, arrays = found.setdefault(case, ({}, {}))
                spec.update(json.loads(str(stored[key]))) if name == "spec" else arrays.update({name: stored[key]})
    return found


KERAS, ONNX = vectors("keras"), vectors("onnxruntime")


def numbered(arrays, name):
    """The tensors name0, name1, ..."""
    found = [k for k in arrays if k.startswith(name) and k[len(name) :].isdigit()]
    return [torch.from_numpy(arrays[f"{name}{k}"]) for k in range(len(found))]


def stacked(states, directions):
    """Keras's list of states, forward direction first, as our hx."""
    count = len(states) // directions
    hx = tuple(torch.stack(states[k::count]) for k in range(count))
    return hx if count > 1 else hx[0]


def without_kernels(layer):
    """The torch form of the one-gate layers: there is one for each activation, and kernels take seconds to compile."""
    return loop(layer) if isinstance(layer, nn.Recurrent) and len(layer.cell.gates) == 1 else layer


@pytest.mark.parametrize("case", KERAS)
def test_keras(case):
    """Outputs, states and gradients, in float64."""
    spec, arrays = KERAS[case]
    weights = numbered(arrays, "weight")
    layer = importers.from_keras(spec["layer"], [w.numpy() for w in weights])
    assert layer.batch_first
    layer = without_kernels(layer)
    directions = 1 + layer.bidirectional
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    given = [s.requires_grad_() for s in numbered(arrays, "state")]
    y, finals = layer(x, stacked(given, directions), lengths=spec["lengths"])
    finals = [f[d] for d in range(directions) for f in (finals if isinstance(finals, tuple) else (finals,))]
    outputs = numbered(arrays, "output")
    check(
        {f"output {k}": o.detach() for k, o in enumerate([y, *finals])},
        {f"output {k}": o for k, o in enumerate(outputs)},
    )

    torch.autograd.backward([y, *finals], numbered(arrays, "cotangent"))
    ours = {"x": x.grad, **{f"state {k}": s.grad for k, s in enumerate(given)}}
    truth = {"x": torch.from_numpy(arrays["dx"])}
    truth |= {f"state {k}": g for k, g in enumerate(numbered(arrays, "dstate"))}
    # Keras's gradients, taken the way of its weights, are those of ours (of both biases, where it has the sum alone).
    imported = importers.from_keras(spec["layer"], [g.numpy() for g in numbered(arrays, "dweight")])
    for name, weight in layer.named_parameters():
        if name.startswith("bias_hh") and spec_of(spec)["class_name"] != "GRU":
            name_of_sum = name.replace("hh", "ih")
            torch.testing.assert_close(weight.grad, layer.get_parameter(name_of_sum).grad)
        elif name.startswith("bias_hh") and not spec_of(spec)["config"]["reset_after"]:
            torch.testing.assert_close(weight.grad, layer.get_parameter(name.replace("hh", "ih")).grad)
        else:
            ours[name], truth[name] = weight.grad, imported.get_parameter(name).detach()
    check(ours, truth)


def spec_of(spec):
    layer = spec["layer"]
    return layer["config"]["layer"] if layer["class_name"] == "Bidirectional" else layer


@pytest.mark.parametrize("case", ONNX)
def test_onnx(case):
    """Within the rounding of float32, in which ONNX Runtime computes."""
    spec, arrays = ONNX[case]
    layer = importers.from_onnx_arrays(
        spec["op_type"], **{k: arrays[k] for k in "WRBP" if k in arrays}, **spec["attributes"]
    )
    layer = without_kernels(layer)
    x, h, *c = (torch.from_numpy(arrays[k]) for k in ("X", "initial_h", "initial_c") if k in arrays)
    lengths = torch.from_numpy(arrays["sequence_lens"]).long() if "sequence_lens" in arrays else None
    y, finals = layer(x, (h, *c) if c else h, lengths=lengths)
    steps, batch, _ = x.shape
    finals = finals if isinstance(finals, tuple) else (finals,)
    ours = {"Y": y.view(steps, batch, len(h), -1).transpose(1, 2), "Y_h": finals[0]}
    ours |= {"Y_c": finals[1]} if c else {}
    for name, value in ours.items():
        torch.testing.assert_close(value.detach(), torch.from_numpy(arrays[name]), rtol=2e-5, atol=2e-6)


def test_torchs_own_cells_become_torchs_layers():
    kinds = {name: type(importers.from_keras(spec["layer"], [w.numpy() for w in numbered(arrays, "weight")]))
             for name, (spec, arrays) in KERAS.items()}  # fmt: skip
    assert kinds["lstm"] is nn.LSTM
    assert kinds["gru bidirectional lengths"] is nn.GRU
    assert kinds["rnn relu"] is nn.RNN
    assert kinds["gru reset before"] is kinds["lstm relu"] is nn.Recurrent


class Layer:
    """What `from_keras` asks a Keras layer."""

    def __init__(self, spec, weights):
        self.get_config = lambda: spec["config"]
        self.get_weights = lambda: weights


def test_a_keras_layer_itself():
    spec, arrays = KERAS["gru reset before"]
    weights = [w.numpy() for w in numbered(arrays, "weight")]
    kind = type("GRU", (Layer,), {})
    layer = importers.from_keras(kind(spec["layer"], weights))
    assert layer.cell is cells.gru_reset_before
    assert layer(torch.from_numpy(arrays["x"]))[0].shape == (3, 5, 4)


def test_a_whole_onnx_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    spec, arrays = ONNX["gru hard sigmoid"]
    constants = [onnx.numpy_helper.from_array(arrays[k], k) for k in "WRB"]
    nodes = [
        onnx.helper.make_node("Constant", [], ["R"], value=constants.pop(1)),
        onnx.helper.make_node(spec["op_type"], ["X", "W", "R", "B", "", "h"], ["Y", "last"], **spec["attributes"]),
    ]
    kinds = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in ("X", "h", "Y", "last")]
    graph = onnx.helper.make_graph(nodes, "model", kinds[:2], kinds[2:], initializer=constants)
    graph.node.append(onnx.helper.make_node("Constant", [], ["numbers"], value_floats=[1.0]))
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    (found,) = importers.from_onnx(str(tmp_path / "model.onnx")).items()
    assert found[0] == "Y"
    _, last = found[1](torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["initial_h"]))
    torch.testing.assert_close(last.detach(), torch.from_numpy(arrays["Y_h"]), rtol=2e-5, atol=2e-6)
    graph.node.extend([onnx.NodeProto.FromString(graph.node[1].SerializeToString()) for _ in range(2)])
    for name, node in zip(("one", "two", "more"), [graph.node[1], *graph.node[3:]], strict=True):
        node.name, node.output[0] = "alike", name
    assert [*importers.from_onnx(onnx.helper.make_model(graph))] == ["alike", "two", "more"]
    graph.node[1].name, graph.node[1].output[0] = "", "Y"
    del graph.initializer[:]
    with pytest.raises(ValueError, match="node Y: W must be an initializer"):
        importers.from_onnx(onnx.helper.make_model(graph))


def keras_spec(**changes):
    spec, arrays = KERAS["lstm"]
    config = {**spec["layer"]["config"], **changes}
    return {"class_name": "LSTM", "config": config}, [w.numpy() for w in numbered(arrays, "weight")]


def onnx_arrays(**changes):
    spec, arrays = ONNX["lstm"]
    return {"op_type": "LSTM", **{k: arrays[k] for k in "WRB"}, **spec["attributes"], **changes}


WRONG = {
    "keras layer": (lambda: importers.from_keras({"class_name": "Dense", "config": {}}, []), "got Dense"),
    "go_backwards": (lambda: importers.from_keras(*keras_spec(go_backwards=True)), "go_backwards must be False"),
    "keras weights": (lambda: importers.from_keras(*keras_spec(use_bias=False)), "must be 2 arrays .* got 3"),
    "keras activation": (lambda: importers.from_keras(*keras_spec(activation="softmax")), "got 'softmax'"),
    "merge_mode": (
        lambda: importers.from_keras({"class_name": "Bidirectional", "config": {"merge_mode": "sum"}}, []),
        "merge_mode must be 'concat', got 'sum'",
    ),
    "op_type": (lambda: importers.from_onnx_arrays("Gemm", 0, 0), "got 'Gemm'"),
    "direction": (lambda: importers.from_onnx_arrays(**onnx_arrays(direction="reverse")), "flip the input in time"),
    "hidden_size": (lambda: importers.from_onnx_arrays(**onnx_arrays(hidden_size=7)), "hidden_size .* 4, got 7"),
    "onnx shape": (lambda: importers.from_onnx_arrays(**onnx_arrays(B=np.zeros((1, 4)))), r"B must .* \(1, 32\)"),
    "onnx activation": (
        lambda: importers.from_onnx_arrays(**onnx_arrays(activations=["Sigmoid", "Cosh", "Tanh"])),
        "got 'Cosh'",
    ),
    "onnx activations": (lambda: importers.from_onnx_arrays(**onnx_arrays(activations=["Tanh"])), "must be 3 names"),
    "units": (lambda: importers.from_keras(*keras_spec(units=7)), r"kernel must have shape \(any, 28\)"),
    "serialized layer": (lambda: importers.from_keras({"class_name": "LSTM"}, []), "got class_name"),
    "whole numbers": (lambda: importers.from_onnx_arrays(**onnx_arrays(W=np.ones((1, 16, 3), int))), "got int64"),
    "onnx dimensions": (lambda: importers.from_onnx_arrays(**onnx_arrays(R=3)), r"\(1, any, any\), got \(\)"),
    "names of activations": (lambda: importers.from_onnx_arrays(**onnx_arrays(activations=[1, 2, 3])), "got 1"),
    "attribute": (lambda: importers.from_onnx_arrays(**onnx_arrays(linear_before_reset=1)), "got linear_before_reset"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_taken_is_said(what):
    function, words = WRONG[what]
    with pytest.raises(ValueError, match=words):
        function()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: importers.from_keras("LSTM"), "layer must be a Keras layer, or a dict .* got 'LSTM'"),
        (lambda: importers.from_keras(keras_spec()[0]), "weights must be the arrays of get_weights"),
        (lambda: importers.from_onnx(b"a model"), "model must be an onnx.ModelProto or the path of one, got bytes"),
    ],
)
def test_what_is_no_layer_is_said(function, words):
    pytest.importorskip("onnx")
    with pytest.raises(TypeError, match=words):
        function()


def test_weights_may_be_tensors():
    layer, weights = keras_spec()
    ours = importers.from_keras(layer, [torch.from_numpy(w).requires_grad_() for w in weights])
    assert torch.equal(ours.weight_hh_l0, importers.from_keras(layer, weights).weight_hh_l0)


def test_activations_may_have_constants_in_an_array():
    given = [
        importers.from_onnx_arrays(
            **onnx_arrays(activations=["HardSigmoid", "Tanh", "Tanh"], activation_alpha=values, activation_beta=values)
        )
        for values in (np.array([0.3, 0.4]), [0.3, 0.4])
    ]
    assert given[0].cell is given[1].cell


def test_time_comes_first_where_keras_says_so():
    assert not importers.from_keras(*keras_spec(time_major=True)).batch_first


def test_a_dropout_of_inputs_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"dropout=0\.5 of the inputs is left out"):
        importers.from_keras(*keras_spec(dropout=0.5))


def test_a_recurrent_dropout_is_taken_over():
    layer = importers.from_keras(*keras_spec(recurrent_dropout=0.5))
    assert layer.recurrent_dropout == 0.5
    assert layer.cell is cells.lstm


def test_explains_itself():
    layer = importers.from_keras(*keras_spec(activation="relu"))
    assert "lstm_relu_sigmoid" in str(fastcells.explain(layer, torch.zeros(1, 5, 2, dtype=torch.float64)))


def test_keras_options_that_are_not_named_are_its_defaults():
    arrays = [np.ones(s, np.float32) for s in ((4, 12), (3, 12), (12,))]
    layer = importers.from_keras({"class_name": "LSTM", "config": {"units": 3}}, arrays)
    assert type(layer) is nn.LSTM


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": {"class_name": "ReLU"}}, "activation must be a name"),
        ({"other": {"activation": "relu", "go_backwards": True}}, "backward_layer must have the options of layer"),
    ],
)
def test_keras_layers_that_none_here_is_like(config, message):
    arrays = [np.ones(s, np.float32) for s in ((4, 12), (3, 12), (12,))] * (2 if "other" in config else 1)
    inner = {"class_name": "LSTM", "config": {"units": 3, **config}}
    if "other" in config:
        other = {"class_name": "LSTM", "config": {"units": 3, **inner["config"].pop("other")}}
        inner = {"class_name": "Bidirectional", "config": {"layer": inner, "backward_layer": other}}
    with pytest.raises(ValueError, match=message):
        importers.from_keras(inner, arrays)


@pytest.mark.parametrize("version", ["2.15.0", "3.3.3"])
def test_a_hard_sigmoid_of_keras_2_is_refused(version, monkeypatch):
    """It was another function there."""
    library = ModuleType("imagined")
    library.__version__ = version
    monkeypatch.setitem(sys.modules, "imagined", library)
    arrays = [np.ones(s, np.float32) for s in ((4, 12), (3, 12), (12,))]
    config = {"units": 3, "recurrent_activation": "hard_sigmoid"}
    methods = {"get_config": lambda self: config, "get_weights": lambda self: arrays, "__module__": "imagined.layers"}
    layer = type("LSTM", (), methods)()
    if version > "3":
        assert isinstance(importers.from_keras(layer), nn.Recurrent)
    else:
        with pytest.raises(ValueError, match="hard_sigmoid must be Keras 3's"):
            importers.from_keras(layer)


def test_a_bias_of_another_kind_of_gru_is_refused():
    arrays = [np.ones(s, np.float32) for s in ((4, 9), (3, 9), (9,))]
    with pytest.raises(ValueError, match=r"bias with reset_after=True must have shape \(2, 9\), got \(9,\)"):
        importers.from_keras({"class_name": "GRU", "config": {"units": 3, "reset_after": True}}, arrays)
