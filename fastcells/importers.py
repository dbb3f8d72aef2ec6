"""Recurrent layers of Keras and ONNX as modules: gate order, layout of weights and biases, activations.

Neither library is needed for arrays; `from_keras` also takes a layer of Keras, `from_onnx` a whole model.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cells, nn, variants
from .activations import ONNX, Activation
from .cell import Cell

# The gates of a cell by the letters of ours, in the order of the other library's blocks.
KERAS_ORDER = {"LSTM": "ifgo", "GRU": "zrn", "SimpleRNN": "h"}
ONNX_ORDER = {"LSTM": "iofg", "GRU": "zrn", "RNN": "h"}
ONNX_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}

TORCHS: dict[Cell, tuple[type[torch.nn.Module], dict[str, Any]]] = {
    cells.lstm: (nn.LSTM, {}),
    cells.gru: (nn.GRU, {}),
    cells.rnn_tanh: (nn.RNN, {"nonlinearity": "tanh"}),
    cells.rnn_relu: (nn.RNN, {"nonlinearity": "relu"}),
}
"""Cells that torch.nn has a layer of."""


def from_keras(layer: Any, weights: Sequence[Any] | None = None) -> torch.nn.Module:
    """The module of a Keras LSTM, GRU or SimpleRNN layer, or of one in Bidirectional(merge_mode="concat").

    layer: the Keras layer; or what `keras.layers.serialize` makes of it, {"class_name": ..., "config": {...}}, and
    weights, the arrays of its `get_weights()`: kernel [I, G * H], recurrent kernel [H, G * H] and, with use_bias, bias
    [G * H] ([2, G * H] for a GRU with reset_after), those of the backward layer after those of the forward one.

    Returns a layer of `fastcells.nn`: LSTM, GRU or RNN where torch.nn has the cell, else Recurrent; batch_first, unless
    time_major, in the format of the weights. It always gives (output [N, T, D * H], final states), whatever
    return_sequences and return_state say, and begins from the states that it is given, whatever stateful says. A
    `recurrent_dropout` is taken over, which makes it a Recurrent.

    Activations are those of Keras 3. In Keras 2, hard_sigmoid was another function, 0.2 v + 0.5: a layer of Keras 2
    that has it is refused, of a dict nobody can tell.

    Raises ValueError for other layers, for arrays that do not fit, and for options that no module here has, with the
    option's name; TypeError for what is no layer at all. A `dropout` of the inputs is left out, with a warning.
    """
    if not isinstance(layer, Mapping):
        if not hasattr(layer, "get_config"):
            raise TypeError(f"layer must be a Keras layer, or a dict of class_name and config, got {layer!r}")
        weights = layer.get_weights() if weights is None else weights
        keras = sys.modules.get(type(layer).__module__.partition(".")[0])
        if getattr(keras, "__version__", "").startswith("2.") and "hard_sigmoid" in repr(layer.get_config()):
            raise ValueError("activation hard_sigmoid must be Keras 3's: that of Keras 2 is another function")
        layer = {"class_name": type(layer).__name__, "config": layer.get_config()}
    if not {"class_name", "config"} <= layer.keys():
        raise ValueError(f"layer must have class_name and config, got {', '.join(map(str, layer))}")
    if weights is None:
        raise TypeError("weights must be the arrays of get_weights() where layer is a dict, got None")
    arrays = list(weights)
    kind, config = layer["class_name"], layer["config"]
    directions = 1
    if kind == "Bidirectional":
        if config.get("merge_mode", "concat") != "concat":
            raise ValueError(f"merge_mode must be 'concat', got {config['merge_mode']!r}")
        directions, inner = 2, config["layer"]
        _same_backward(inner["config"], config.get("backward_layer"))
        kind, config = inner["class_name"], inner["config"]
    if kind not in KERAS_ORDER:
        raise ValueError(f"layer must be one of {', '.join(KERAS_ORDER)} or Bidirectional, got {kind}")
    if config.get("go_backwards"):
        raise ValueError("go_backwards must be False: flip the input in time instead")
    if config.get("dropout"):
        warnings.warn(f"{kind}: dropout={config['dropout']} of the inputs is left out", stacklevel=2)

    order, hidden, bias = KERAS_ORDER[kind], config["units"], config.get("use_bias", True)
    count = (3 if bias else 2) * directions
    if len(arrays) != count:
        raise ValueError(f"weights must be {count} arrays for {kind} with {directions} direction(s), got {len(arrays)}")
    activation, gates = (
        _activation(config, "activation", "tanh"),
        _activation(config, "recurrent_activation", "sigmoid"),
    )
    reset_after = config.get("reset_after", True)
    if kind == "LSTM":
        cell = variants.lstm(activation, gates)
    elif kind == "GRU":
        cell = variants.gru(activation, gates, reset_after)
    else:
        cell = variants.rnn(activation)

    state: dict[str, Any] = {}
    for d, suffix in enumerate(("_l0", "_l0_reverse")[:directions]):
        kernel, recurrent, *own = arrays[d * count // directions : (d + 1) * count // directions]
        rows = len(order) * hidden
        state[f"weight_ih{suffix}"] = _ordered(_array("kernel", kernel, None, rows).T, cell, order)
        state[f"weight_hh{suffix}"] = _ordered(_array("recurrent kernel", recurrent, hidden, rows).T, cell, order)
        if own:
            name, several = ("bias", False) if kind != "GRU" else (f"bias with {reset_after=}", reset_after)
            both = _array(name, own[0], *([2, rows] if several else [rows]))
            both = both if both.ndim == 2 else np.stack([both, np.zeros_like(both)])
            state[f"bias_ih{suffix}"], state[f"bias_hh{suffix}"] = (_ordered(b, cell, order) for b in both)
    options = {"batch_first": not config.get("time_major"), "bidirectional": directions == 2}
    if config.get("recurrent_dropout"):
        options["recurrent_dropout"] = config["recurrent_dropout"]
    return _module(cell, hidden, state, bias, **options)


def _activation(config: dict, option: str, default: str) -> str:
    """The name of an activation."""
    found = config.get(option, default) or "linear"
    if not isinstance(found, str):
        raise ValueError(f"{option} must be a name, got {found}")
    return found


def _same_backward(config: dict, other: dict | None) -> None:
    """Raise ValueError for a backward layer of a Bidirectional's own whose options are not the forward one's."""
    theirs = config if other is None else other["config"]
    differ = [k for k in {**config, **theirs} if k not in ("name", "go_backwards") and config.get(k) != theirs.get(k)]
    if differ:
        raise ValueError(f"backward_layer must have the options of layer, got another {differ[0]}")


def from_onnx(model: Any) -> dict[str, torch.nn.Module]:
    """The modules of all LSTM, GRU and RNN nodes of an ONNX model's graph, by the node's name (or that of its first
    output, also where another node has the name). Initial states are for the caller to give, also constant ones.

    model: an `onnx.ModelProto`, or the path of one. Needs the package onnx. Raises as `from_onnx_arrays`, TypeError for
    what is no model, and ValueError for a node whose weights are computed by the model.
    """
    import onnx

    if isinstance(model, (str, os.PathLike)):
        model = onnx.load(model)
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model must be an onnx.ModelProto or the path of one, got {type(model).__name__}")
    known = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.name == "value":  # of a tensor
                known[node.output[0]] = onnx.numpy_helper.to_array(attribute.t)
    found = {}
    for node in model.graph.node:
        if node.op_type not in ONNX_ORDER:
            continue
        first = next((o for o in node.output if o), "")
        name = node.name if node.name and node.name not in found else first
        inputs = dict(
            zip(("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"), node.input, strict=False)
        )
        arrays = {}
        for key in ("W", "R", "B", "P"):
            if inputs.get(key) or key in "WR":
                if inputs.get(key) not in known:
                    given = inputs.get(key)
                    raise ValueError(f"node {name}: {key} must be an initializer of the model, got {given!r}")
                arrays[key] = known[inputs[key]]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        found[name] = from_onnx_arrays(node.op_type, **arrays, **attributes)
    return found


def from_onnx_arrays(op_type: str, W: Any, R: Any, B: Any = None, P: Any = None, **attributes: Any) -> torch.nn.Module:
    """The module of one ONNX LSTM, GRU or RNN node, D = 2 for direction="bidirectional", else 1.

    W [D, G * H, I], R [D, G * H, H], B [D, 2 * G * H] or None, P (an LSTM's peepholes) [D, 3 * H] or None; attributes:
    those of the ONNX operator, with its defaults (activations, activation_alpha, activation_beta, clip, direction,
    hidden_size, input_forget, layout, linear_before_reset).

    Returns a layer of `fastcells.nn`: LSTM, GRU or RNN where torch.nn has the cell, else Recurrent; batch_first for
    layout=1. Its output is [T, N, D * H] where ONNX's Y is [T, D, N, H]; sequence_lens are its `lengths`.

    Raises ValueError for an unknown operator or activation, for attributes and arrays that do not fit together, for
    directions of unequal activations, and for direction="reverse" (flip the input in time instead).
    """
    if op_type not in ONNX_ORDER:
        raise ValueError(f"op_type must be one of {', '.join(ONNX_ORDER)}, got {op_type!r}")
    text = {k: v.decode() if isinstance(v, bytes) else v for k, v in attributes.items()}
    direction = text.pop("direction", "forward")
    if direction not in ("forward", "bidirectional"):
        raise ValueError(f"direction must be 'forward' or 'bidirectional', got {direction!r}: flip the input in time")
    functions = _onnx_activations(op_type, 2 if direction == "bidirectional" else 1, text)
    limit = text.pop("clip", None) or None
    layout, hidden = text.pop("layout", 0), text.pop("hidden_size", None)
    count = 2 if direction == "bidirectional" else 1
    order = ONNX_ORDER[op_type]
    units = _array("R", R, count, None, None).shape[-1]
    if hidden not in (None, units):
        raise ValueError(f"hidden_size must be that of R, {units}, got {hidden}")
    rows = len(order) * units
    w, r = _array("W", W, count, rows, None), _array("R", R, count, rows, units)
    b = None if B is None else _array("B", B, count, 2 * rows)
    p = None if P is None else _array("P", P, count, 3 * units)
    if op_type == "LSTM":
        opening, squash, out = functions
        coupled = bool(text.pop("input_forget", 0))
        cell = variants.lstm(squash, opening, out, P is not None, coupled, limit)
    elif P is not None:
        raise ValueError(f"P must be None for {op_type}: only an LSTM has peepholes")
    elif op_type == "GRU":
        cell = variants.gru(functions[1], functions[0], bool(text.pop("linear_before_reset", 0)), limit)
    else:
        cell = variants.rnn(functions[0], limit)
    if text:
        raise ValueError(f"attributes must be those of ONNX's {op_type}, got {', '.join(text)}")

    state: dict[str, Any] = {}
    for d, suffix in enumerate(("_l0", "_l0_reverse")[:count]):
        state[f"weight_ih{suffix}"] = _ordered(w[d], cell, order)
        state[f"weight_hh{suffix}"] = _ordered(r[d], cell, order)
        if b is not None:
            for name, one in zip(("bias_ih", "bias_hh"), np.split(b[d], 2), strict=True):
                state[name + suffix] = _ordered(one, cell, order)
        if p is not None:
            for gate, weights in zip("iof", np.split(p[d], 3), strict=True):
                if f"peephole_{gate}" in cell.parameters:
                    state[f"peephole_{gate}{suffix}"] = torch.from_numpy(weights.copy())
    return _module(cell, units, state, B is not None, batch_first=bool(layout), bidirectional=count == 2)


def _onnx_activations(op_type: str, directions: int, attributes: dict[str, Any]) -> list[Activation]:
    """The activations of a node, which names them for each direction, and gives constants to those that take some."""
    names = attributes.pop("activations", None) or ONNX_ACTIVATIONS[op_type] * directions
    names = [n.decode() if isinstance(n, bytes) else n for n in names]
    given = [attributes.pop(f"activation_{k}", None) for k in ("alpha", "beta")]
    constants = [[] if numbers is None else list(numbers) for numbers in given]
    each = len(ONNX_ACTIVATIONS[op_type])
    if len(names) != each * directions:
        raise ValueError(f"activations must be {each} names for each of {directions} direction(s), got {names}")
    known = {k.lower(): v for k, v in ONNX.items()}
    found = []
    for name in names:
        if not isinstance(name, str) or name.lower() not in known:
            raise ValueError(f"activations must be of {', '.join(ONNX)}, got {name!r}")
        function, defaults = known[name.lower()]
        own = [values.pop(0) if values else default for values, default in zip(constants, defaults, strict=False)]
        found.append(Activation(function, tuple(own)))
    if found[:each] * directions != found:
        raise ValueError(f"activations must be the same for both directions, got {names}")
    return found[:each]


def _array(name: str, value: Any, *shape: int | None) -> np.ndarray:
    """A value of floating point as an array of that shape; None: any size. Raises ValueError for others."""
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    if array.ndim != len(shape) or any(n not in (None, size) for n, size in zip(shape, array.shape, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({sizes}{',' * (len(shape) == 1)}), got {array.shape}")
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must be numbers of floating point, got {array.dtype}")
    return array


def _ordered(rows: np.ndarray, cell: Cell, order: str) -> Tensor:
    """Blocks of rows in the order of the cell's gates."""
    blocks = dict(zip(order, np.split(rows, len(order)), strict=True))
    return torch.from_numpy(np.concatenate([blocks[g] for g in cell.gates]))


def _module(cell: Cell, hidden: int, state: Mapping[str, Tensor], bias: bool, **options: Any) -> torch.nn.Module:
    inputs, dtype = state["weight_ih_l0"].shape[1], state["weight_ih_l0"].dtype
    make: Any = nn.Recurrent
    extra: dict[str, Any] = {"cell": cell}
    if cell in TORCHS and "recurrent_dropout" not in options:
        make, extra = TORCHS[cell]
    module = make(input_size=inputs, hidden_size=hidden, bias=bias, dtype=dtype, **extra, **options)
    module.load_state_dict(state)
    return module
