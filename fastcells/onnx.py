"""Models with these layers as ONNX: `export`, which is torch.onnx.export with what it does not know of itself.

LSTM, GRU and RNN become ONNX's operators of these names. Any other cell, and a projection, becomes a Scan over time
whose body is the cell's graph. Needs the packages onnx and onnxscript, which are imported by a call alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from . import cells, functional, nn
from .cell import Cell, registered
from .expression import Node, topological
from .importers import ONNX_ORDER

NATIVE: dict[Cell, tuple[str, dict[str, Any]]] = {
    cells.lstm: ("LSTM", {}),
    cells.gru: ("GRU", {"linear_before_reset": 1}),
    cells.rnn_tanh: ("RNN", {"activations": ["Tanh"]}),
    cells.rnn_relu: ("RNN", {"activations": ["Relu"]}),
}
"""Cells that ONNX has an operator of, and its attributes (activations: of one direction)."""

POINTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "neg": "Neg", "abs": "Abs", "maximum": "Max",
    "minimum": "Min", "sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "softplus": "Softplus", "exp": "Exp",
    "log": "Log", "sin": "Sin", "cos": "Cos", "erf": "Erf", "sqrt": "Sqrt", "less": "Less",
    "less_equal": "LessOrEqual", "equal": "Equal", "where": "Where",
}  # fmt: skip
"""Operations of a cell's graph that are one operator of ONNX."""

GATES, ALIVE = "of the input", "not past the end"
"""What a Scan goes over besides the cell's own step inputs, whose names are identifiers."""

_SCANS = itertools.count()


def export(model: torch.nn.Module, args: tuple = (), f: Any = None, **options: Any) -> Any:
    """`torch.onnx.export(model, args, f, **options)` for a model that has layers of fastcells: same arguments, results.

    args: the model's example inputs; f: the path to write to, or None; options: those of torch's dynamo exporter, such
    as dynamic_shapes, input_names, opset_version. Returns the `torch.onnx.ONNXProgram`. Layers called with `lengths`
    keep them as an input; a padded input of any number of steps and sequences needs dynamic_shapes, as ever.

    Raises ModuleNotFoundError without the packages onnx and onnxscript, ValueError for dynamo=False, and torch's own
    errors; `nn.NotExported`, a RuntimeError, for a layer called with a PackedSequence, reset or reverse.
    """
    if not options.pop("dynamo", True):
        raise ValueError("dynamo must be True: torch's older exporter has no notion of the layers' operation")
    table = {**translation_table(), **(options.pop("custom_translation_table", None) or {})}
    try:
        return torch.onnx.export(model, args, f, custom_translation_table=table, dynamo=True, **options)
    except Exception as error:  # the exporter wraps a model's own in pages of advice
        cause: BaseException | None = error
        while not (cause is None or isinstance(cause, nn.NotExported)):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def translation_table() -> dict[Callable, Callable]:
    """The `custom_translation_table` with which torch.onnx.export takes the layers, where `export` does not fit."""
    operations: Any = torch.ops.fastcells
    return {operations.layer.default: _layer, operations.layer_of_lengths.default: _layer_of_lengths}


# The names of these arguments are those of the operations. Values of the ONNX graph stand where Tensors do there.


def _layer(cell, x, states, inputs, parameters, batch_sizes, directions, training=False):
    return _translated(registered(cell), x, states, inputs, parameters, directions, None)


def _layer_of_lengths(cell, x, states, parameters, lengths, directions):
    return _translated(registered(cell), x, states, [], parameters, directions, lengths)


def _translated(cell: Cell, x, states, inputs, parameters, directions: int, lengths) -> Sequence[Any]:
    from onnxscript import evaluator

    tensors = [x, *states, *inputs, *parameters]
    x, given, inputs, each = functional.split(cell, directions, bool(states), tensors)
    graph = Nodes(x.dtype)
    if cell in NATIVE and each[0][4] is None:
        results = _native(graph, cell, x, given or (), each, lengths)
    else:
        parts = []
        for d, p in enumerate(each):
            own_states, own_inputs = ([graph.item(t, d) for t in tensors] for tensors in (given or (), inputs))
            parts.append(_scan(graph, cell, x, own_states, own_inputs, p, lengths, d))
        y, *finals = zip(*parts, strict=True)
        results = [graph("Concat", *y, axis=-1), *(graph.stacked(f) for f in finals)]
    recorder: Any = evaluator.default()  # the exporter's, while it translates
    recorder.nodes.extend(graph.tape.nodes)
    return results


class Nodes:
    """Operators of ONNX applied to values, and the nodes that this makes. Numbers are of the given dtype, lists of
    whole numbers int64."""

    def __init__(self, dtype: Any) -> None:
        import onnx_ir as ir

        self.ir, self.dtype, self.tape = ir, dtype, ir.tape.Tape()

    def __call__(self, operator: str, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
        values = [v if v is None or isinstance(v, self.ir.Value) else self.constant(v) for v in inputs]
        if outputs == 1:
            return self.tape.op(operator, values, attributes)
        return self.tape.op_multi_out(operator, values, attributes, num_outputs=outputs)

    def constant(self, number: float | int | list[int]) -> Any:
        whole = isinstance(number, (int, list))
        tensor = self.ir.tensor(number, dtype=self.ir.DataType.INT64 if whole else self.dtype)
        return self.tape.op("Constant", [], {"value": tensor})

    def item(self, value: Any, index: int) -> Any:
        """value[index]"""
        return self("Gather", value, index, axis=0)

    def rows(self, value: Any, first: int, count: int) -> Any:
        """value[first : first + count]"""
        return self("Slice", value, [first], [first + count], [0])

    def stacked(self, values: Sequence[Any]) -> Any:
        """Along a new first dimension."""
        return self("Concat", *(self("Unsqueeze", v, [0]) for v in values), axis=0)


def _native(graph: Nodes, cell: Cell, x, states, parameters, lengths) -> Sequence[Any]:
    operator, attributes = NATIVE[cell]
    directions, hidden = len(parameters), parameters[0][1].shape[1]
    order = [cell.gates.index(g) * hidden + k for g in ONNX_ORDER[operator] for k in range(hidden)]

    def arranged(rows: Any) -> Any:
        return graph("Gather", rows, order, axis=0)

    w, r = (graph.stacked([arranged(p[k]) for p in parameters]) for k in (0, 1))
    biases = [graph("Concat", arranged(p[2]), arranged(p[3]), axis=0) for p in parameters if p[2] is not None]
    y, *finals = graph(
        operator,
        x,
        w,
        r,
        graph.stacked(biases) if biases else None,
        None if lengths is None else graph("Cast", lengths, to=graph.ir.DataType.INT32),
        *(states or [None]),
        outputs=1 + len(cell.states),
        hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **{k: v * directions if k == "activations" else v for k, v in attributes.items()},
    )
    if lengths is not None and states:  # which sequences of length 0 keep
        empty = graph("Unsqueeze", graph("Equal", graph("Cast", lengths, to=graph.ir.DataType.INT64), 0), [1])
        finals = [graph("Where", empty, old, new) for old, new in zip(states, finals, strict=True)]
    # [T, D, N, H] -> [T, N, D * H]
    return [graph("Reshape", graph("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, -1]), *finals]


def _scan(graph: Nodes, cell: Cell, x, states, inputs, parameters, lengths, reverse: int) -> list[Any]:
    """y and the final states of one direction: what goes in, the body of the loop over time, the loop."""
    ir, count = graph.ir, len(cell.gates)
    w_ih, w_hh, b_ih, b_hh, w_hr, *own = parameters
    hidden = w_ih.shape[0] // count
    out = hidden if w_hr is None else w_hr.shape[0]
    sizes = [out] + [hidden] * (len(cell.states) - 1)
    rows = graph("Shape", x, start=1, end=2)
    if not states:
        states = [graph("Expand", 0.0, graph("Concat", rows, [n], axis=0)) for n in sizes]
    fixed = dict(zip(cell.inputs, inputs, strict=False))
    by_step = dict(zip(cell.step_inputs, inputs[len(cell.inputs) :], strict=True))
    gates = graph("MatMul", x, graph("Transpose", w_ih, perm=[1, 0]))  # of all steps
    recurrent = {
        g: [None if w is None else graph.rows(w, k * hidden, hidden) for w in (w_hh, b_hh)]
        for k, g in enumerate(cell.gates)
    }
    over = {GATES: gates if b_ih is None else graph("Add", gates, b_ih), **by_step}
    if lengths is not None:
        steps = graph("Range", 0, graph("Squeeze", graph("Shape", x, start=0, end=1)), 1)
        ends = graph("Unsqueeze", graph("Cast", lengths, to=ir.DataType.INT64), [1])
        over[ALIVE] = graph("Less", graph("Unsqueeze", steps, [1, 2]), ends)

    def symbol(name: str, width: int | None) -> Any:
        kind = ir.DataType.BOOL if name == ALIVE else graph.dtype
        return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([None, width]))

    body = Nodes(graph.dtype)
    before = [symbol(name, n) for name, n in zip(cell.states, sizes, strict=True)]
    step = {name: symbol(name, None) for name in over}
    x_gates = [step[GATES]]
    if count > 1:
        x_gates = body("Split", step[GATES], axis=-1, num_outputs=count, outputs=count)
    values: dict[tuple, Any] = {("x", g): v for g, v in zip(cell.gates, x_gates, strict=True)}
    values |= {("s", name): v for name, v in zip(cell.states, before, strict=True)}
    for kind, names in (("p", cell.parameters), ("scalar", cell.scalars)):
        values |= {(kind, n): t for n, t in zip(cell.own, *own or [()], strict=True) if n in names}
    values |= {("input", n): v for n, v in fixed.items()} | {("step_input", n): step[n] for n in by_step}
    after = _new_states(body, cell, values, recurrent)
    if w_hr is not None:
        after[0] = body("Gemm", after[0], w_hr, transB=1)
    y = after[0]
    if lengths is not None:
        after = [body("Where", step[ALIVE], new, old) for new, old in zip(after, before, strict=True)]
        y = body("Where", step[ALIVE], y, 0.0)
    outputs = [body("Identity", v) for v in (*after, y)]
    for value, n in zip(outputs, (*sizes, out), strict=True):
        value.type, value.shape = ir.TensorType(graph.dtype), ir.Shape([None, n])
    scan = f"{cell.name}_{next(_SCANS)}"
    inside = [*before, *step.values(), *(v for node in body.tape.nodes for v in node.outputs)]
    for k, value in enumerate(inside):  # names in a body must differ from all others of the model
        value.name = f"{scan}_{k}"
    *finals, y = graph(
        "Scan",
        *states,
        *over.values(),
        outputs=len(outputs),
        body=ir.Graph([*before, *step.values()], outputs, nodes=body.tape.nodes, name=scan),
        num_scan_inputs=len(over),
        scan_input_directions=[reverse] * len(over),
        scan_output_directions=[reverse],
    )
    return [y, *finals]


def _new_states(
    graph: Nodes, cell: Cell, leaves: Mapping[tuple, Any], recurrent: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """One step of the cell; recurrent: U_g and b'_g of each gate."""
    new = cell.trace()
    values: dict[Node, Any] = {}
    for node in topological(new):
        args = [values[a] for a in node.args]
        if node.op == "leaf":
            values[node] = leaves[node.value]
        elif node.op == "constant":
            values[node] = graph.constant(node.value)
        elif node.op == "product":
            values[node] = graph("Gemm", *args, *recurrent[node.value[1]], transB=1)
        elif node.op in POINTWISE:
            values[node] = graph(POINTWISE[node.op], *args)
        else:
            values[node] = COMPOSED[node.op](graph, *args)
    return [values[node] for node in new]


def _mean(graph: Nodes, *values: Any) -> Any:
    total = graph("ReduceMean", reduce(lambda a, b: graph("Add", a, b), values), [-1], keepdims=1)
    return graph("Div", total, float(len(values)))


def _variance(graph: Nodes, centre: Any, *values: Any) -> Any:
    deviations = [graph("Sub", v, centre) for v in values]
    return _mean(graph, *(graph("Mul", d, d) for d in deviations))


COMPOSED: dict[str, Callable] = {
    "expm1": lambda graph, v: graph("Sub", graph("Exp", v), 1.0),
    "rsqrt": lambda graph, v: graph("Reciprocal", graph("Sqrt", v)),
    "mean": _mean,
    "variance": _variance,
}
"""The others."""
