"""ONNX Runtime and OpenVINO, both from one ONNX model with the operators LSTM, GRU and RNN. Inference only."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.problem import Problem
from benchmarks.providers import Prepared, Provider, Unsupported, refuse_variants

#: Where ONNX's blocks of rows are found in torch's: ONNX has i o f c and z r h, torch i f g o and r z n.
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def model(problem: Problem) -> bytes:
    """The case as a serialised model: inputs x and what the mode gives, outputs y, h_n and for an LSTM c_n."""
    onnx: Any = import_module("onnx")
    helper, case, mode = onnx.helper, problem.case, problem.case.how
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def stacked(name: str, k: int) -> np.ndarray:
        """Of both directions, rows in ONNX's order"""
        found = [problem.weights[f"{name}_l{k}{suffix}"] for suffix in ("", "_reverse")[: mode.directions]]
        blocks = [np.split(weight, case.kind.gates) for weight in found]
        return np.stack([np.concatenate([block[g] for g in ORDER[case.cell]]) for block in blocks])

    letters = "hc" if case.cell == "lstm" else "h"
    merged = constant("merged", np.array([case.T, case.N, -1], dtype=np.int64))
    splits = constant("splits", np.full(mode.layers, mode.directions, dtype=np.int64))
    for state in problem.states:
        nodes.append(helper.make_node("Split", [state, splits], [f"{state}_l{k}" for k in range(mode.layers)], axis=0))
    y = "x"
    for k in range(mode.layers):
        bias = np.concatenate([stacked("bias_ih", k), stacked("bias_hh", k)], axis=1)
        weights = [constant(f"W{k}", stacked("weight_ih", k)), constant(f"R{k}", stacked("weight_hh", k))]
        given = [y, *weights, constant(f"B{k}", bias), "lengths" if mode.ragged else ""]
        given += [f"{state}_l{k}" for state in problem.states]
        outputs = [f"raw{k}", *(f"{letter}{k}" for letter in letters)]
        options = {"linear_before_reset": 1} if case.cell == "gru" else {}
        direction = "bidirectional" if mode.directions == 2 else "forward"
        node = helper.make_node(case.cell.upper(), given, outputs, hidden_size=case.H, direction=direction, **options)
        y = f"y{k}" if k < mode.layers - 1 else "y"
        nodes += [node, helper.make_node("Transpose", [f"raw{k}"], [f"turned{k}"], perm=[0, 2, 1, 3])]
        nodes += [helper.make_node("Reshape", [f"turned{k}", merged], [y])]
    for letter in letters:
        parts = [f"{letter}{k}" for k in range(mode.layers)]
        nodes.append(helper.make_node("Concat", parts, [f"{letter}_n"], axis=0))

    shape = (mode.layers * mode.directions, case.N, case.H)
    inputs = [helper.make_tensor_value_info("x", kind, problem.x.shape)]
    inputs += [helper.make_tensor_value_info(state, kind, shape) for state in problem.states]
    if mode.ragged:
        inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, [case.N]))
    results = [helper.make_tensor_value_info("y", kind, (case.T, case.N, mode.directions * case.H))]
    results += [helper.make_tensor_value_info(f"{letter}_n", kind, shape) for letter in letters]
    graph = helper.make_graph(nodes, "layer", inputs, results, constants)
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


def feeds(problem: Problem) -> dict[str, np.ndarray]:
    given = {"x": problem.x, **problem.states}
    return given | ({"lengths": problem.lengths.astype(np.int32)} if problem.case.how.ragged else {})


class OnnxRuntime(Provider):
    name = "ONNX Runtime"
    packages = ("onnx", "onnxruntime")

    def prepare(self, problem: Problem) -> Prepared:
        refuse_variants(problem.case, training=False)
        if problem.case.dtype != "float32":
            raise Unsupported("has no recurrent kernels for float64")
        runtime: Any = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = problem.case.threads
        options.inter_op_num_threads = 1
        session = runtime.InferenceSession(model(problem), options, providers=["CPUExecutionProvider"])
        names, given = [output.name for output in session.get_outputs()], feeds(problem)
        return Prepared(lambda: session.run(None, given), lambda result: dict(zip(names, result, strict=True)))


class OpenVINO(Provider):
    name = "OpenVINO"
    packages = ("onnx", "openvino")

    def prepare(self, problem: Problem) -> Prepared:
        refuse_variants(problem.case, training=False)
        if problem.case.dtype != "float32":
            raise Unsupported("computes in float32")
        os.environ.setdefault("OPENVINO_TELEMETRY", "0")
        openvino: Any = import_module("openvino")
        hints = {
            "INFERENCE_NUM_THREADS": problem.case.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model(problem), b""), "CPU", hints)
        request, given = compiled.create_infer_request(), feeds(problem)

        def call() -> Any:
            return request.infer(given, share_inputs=True, share_outputs=True)

        def answer(result: Any) -> dict[str, np.ndarray]:
            names = ("y", "h_n", "c_n")  # in order, since an output may lose its name where its operator is removed
            return {name: np.array(result[k]) for k, name in enumerate(names[: len(compiled.outputs)])}

        return Prepared(call, answer)
