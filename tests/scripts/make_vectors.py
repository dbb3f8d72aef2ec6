"""Makes tests/vectors: what Keras and ONNX Runtime give for small layers, for tests of the importers and of lengths.

    python -m venv keras && keras/bin/pip install keras jax onnx onnxruntime
    keras/bin/python tests/scripts/make_vectors.py

Each case is a few arrays of an .npz file, named case/array, with its specification as JSON in case/spec. Keras runs on
JAX in float64, with gradients of sum(output * cotangent); ONNX Runtime computes in float32 alone.
"""

import json
import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import keras
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

FOLDER = Path(__file__).parent.parent / "vectors"
N, T, I, H = 3, 5, 2, 4  # noqa: E741
LENGTHS = [5, 2, 3]

KERAS = {
    "lstm": ("LSTM", {}),
    "lstm no bias": ("LSTM", {"use_bias": False}),
    "lstm relu": ("LSTM", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
    "lstm lengths": ("LSTM", {"lengths": True}),
    "lstm bidirectional": ("LSTM", {"bidirectional": True}),
    "lstm bidirectional lengths": ("LSTM", {"bidirectional": True, "lengths": True}),
    "gru": ("GRU", {}),
    "gru no bias": ("GRU", {"use_bias": False}),
    "gru reset before": ("GRU", {"reset_after": False}),
    "gru reset before softsign": ("GRU", {"reset_after": False, "activation": "softsign"}),
    "gru elu": ("GRU", {"activation": "elu", "recurrent_activation": "hard_sigmoid"}),
    "gru bidirectional lengths": ("GRU", {"bidirectional": True, "lengths": True}),
    "rnn": ("SimpleRNN", {}),
    "rnn relu": ("SimpleRNN", {"activation": "relu"}),
    "rnn gelu": ("SimpleRNN", {"activation": "gelu"}),
    "rnn linear": ("SimpleRNN", {"activation": None}),
    "rnn selu": ("SimpleRNN", {"activation": "selu"}),
    "rnn silu": ("SimpleRNN", {"activation": "silu"}),
    "rnn softplus": ("SimpleRNN", {"activation": "softplus"}),
    "rnn mish": ("SimpleRNN", {"activation": "mish"}),
    "rnn leaky relu": ("SimpleRNN", {"activation": "leaky_relu"}),
    "rnn relu6": ("SimpleRNN", {"activation": "relu6"}),
    "rnn log sigmoid": ("SimpleRNN", {"activation": "log_sigmoid"}),
    "rnn hard silu": ("SimpleRNN", {"activation": "hard_silu"}),
    "rnn hard tanh": ("SimpleRNN", {"activation": "hard_tanh"}),
    # Its states are exponentials of exponentials: with other draws than these they overflow within the five steps.
    "rnn exponential": ("SimpleRNN", {"activation": "exponential"}),
}

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ONNX = {
    "lstm": ("LSTM", {}),
    "lstm lengths": ("LSTM", {"lengths": True, "direction": "bidirectional"}),
    "lstm peepholes": ("LSTM", {"peepholes": True, "direction": "bidirectional"}),
    "lstm coupled": ("LSTM", {"input_forget": 1}),
    "lstm coupled peepholes": ("LSTM", {"input_forget": 1, "peepholes": True, "lengths": True}),
    "lstm clip": ("LSTM", {"clip": 0.3}),
    "lstm hard sigmoid": ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Tanh"]}),
    "lstm constants": (
        "LSTM",
        {"activations": ["HardSigmoid", "ScaledTanh", "Elu"], "activation_alpha": [0.3, 1.7, 0.5],
         "activation_beta": [0.4, 0.6], "peepholes": True, "clip": 0.8},
    ),
    "gru reset before": ("GRU", {"direction": "bidirectional"}),
    "gru": ("GRU", {"linear_before_reset": 1, "direction": "bidirectional", "lengths": True}),
    "gru no bias": ("GRU", {"bias": False}),
    "gru clip": ("GRU", {"clip": 0.3, "linear_before_reset": 1}),
    "gru hard sigmoid": ("GRU", {"activations": ["HardSigmoid", "LeakyRelu"], "activation_alpha": [0.25, 0.1]}),
    "rnn": ("RNN", {"direction": "bidirectional", "lengths": True}),
    "rnn relu": ("RNN", {"activations": ["Relu"]}),
    "rnn affine": ("RNN", {"activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.1]}),
    "rnn thresholded": ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.2]}),
    "rnn softplus": ("RNN", {"activations": ["Softplus"], "clip": 0.5}),
}  # fmt: skip


def keras_case(name, kind, options, draw):
    options = dict(options)
    bidirectional, lengths = options.pop("bidirectional", False), options.pop("lengths", False)
    layer = getattr(keras.layers, kind)(
        H, return_sequences=True, return_state=True, zero_output_for_mask=lengths, **options
    )
    if bidirectional:
        layer = keras.layers.Bidirectional(layer)
    layer.build((N, T, I))
    weights = [draw(*w.shape) for w in layer.get_weights()]
    layer.set_weights(weights)
    x = draw(N, T, I)
    per_direction = 2 if kind == "LSTM" else 1
    states = [draw(N, H) for _ in range(per_direction * (1 + bidirectional))]
    mask = np.arange(T) < np.array(LENGTHS)[:, None] if lengths else None

    def run(trainable, x, states):
        results, _ = layer.stateless_call(
            trainable, [v.value for v in layer.non_trainable_variables], x, mask=mask, initial_state=states
        )
        return results

    outputs = [np.asarray(r) for r in run(weights, x, states)]
    cotangents = [draw(*o.shape) for o in outputs]
    total = lambda *inputs: sum((r * d).sum() for r, d in zip(run(*inputs), cotangents, strict=True))  # noqa: E731
    dweights, dx, dstates = jax.grad(total, (0, 1, 2))(weights, x, states)
    spec = {"layer": keras.layers.serialize(layer), "lengths": LENGTHS if lengths else None}
    arrays = {"x": x, "dx": dx}
    for key, values in {
        "weight": weights, "state": states, "output": outputs, "cotangent": cotangents, "dweight": dweights,
        "dstate": dstates,
    }.items():  # fmt: skip
        arrays |= {f"{key}{k}": v for k, v in enumerate(values)}
    return spec, arrays


def onnx_case(name, kind, options, draw):
    attributes = dict(options)
    bias, peepholes = attributes.pop("bias", True), attributes.pop("peepholes", False)
    lengths = attributes.pop("lengths", False)
    d, g = 2 if attributes.get("direction") == "bidirectional" else 1, GATES[kind]
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * d
    arrays = {"X": draw(T, N, I), "W": draw(d, g * H, I), "R": draw(d, g * H, H)}
    if bias:
        arrays["B"] = draw(d, 2 * g * H)
    if lengths:
        arrays["sequence_lens"] = np.array(LENGTHS, np.int32)
    arrays["initial_h"] = draw(d, N, H)
    if kind == "LSTM":
        arrays["initial_c"] = draw(d, N, H)
    if peepholes:
        arrays["P"] = draw(d, 3 * H)
    arrays = {k: a if a.dtype == np.int32 else a.astype(np.float32) for k, a in arrays.items()}
    slots = ["X", "W", "R", "B", "sequence_lens", "initial_h"] + ["initial_c", "P"] * (kind == "LSTM")
    results = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, [s if s in arrays else "" for s in slots], results, hidden_size=H, **attributes)
    kinds = {k: TensorProto.INT32 if a.dtype == np.int32 else TensorProto.FLOAT for k, a in arrays.items()}
    graph = helper.make_graph(
        [node],
        name,
        [helper.make_tensor_value_info(k, kinds[k], a.shape) for k, a in arrays.items()],
        [helper.make_tensor_value_info(r, TensorProto.FLOAT, None) for r in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = dict(zip(results, session.run(results, arrays), strict=True))
    return {"op_type": kind, "attributes": {"hidden_size": H, **attributes}}, arrays | outputs


def main():
    # Keras computes tanh and others in float32, whatever they are given, but for this table.
    keras.src.backend.common.dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    versions = {"keras": keras.__version__, "onnxruntime": onnxruntime.__version__}
    for file, cases, make in (("keras", KERAS, keras_case), ("onnxruntime", ONNX, onnx_case)):
        stored = {"version": np.array(versions[file])}
        for name, (kind, options) in cases.items():
            rng = np.random.default_rng(list(name.encode()))
            draw = lambda *shape, rng=rng: rng.uniform(-1, 1, shape).round(3)  # noqa: E731  # few digits: small files
            spec, arrays = make(name, kind, options, draw)
            stored[f"{name}/spec"] = np.array(json.dumps(spec))
            stored |= {f"{name}/{key}": np.asarray(a) for key, a in arrays.items()}
        np.savez_compressed(FOLDER / f"{file}.npz", **stored)


if __name__ == "__main__":
    main()
