"""Bad input raises what torch.nn raises, with a message that names the argument, what was given and what was due."""

import re

import pytest
import torch
from helpers import same
from torch.nn.utils.rnn import PackedSequence

import fastcells.nn

I, H, N, T = 3, 4, 2, 5  # noqa: E741
KINDS = {
    "RNN": {},
    "LSTM": {},
    "LSTM projected": {"proj_size": 2},
    "GRU": {},
    "LSTM stacked": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "RNN stacked": {"num_layers": 2, "bidirectional": True},
}
CELLS = ["RNNCell", "LSTMCell", "GRUCell"]
DTYPE = torch.float32


@pytest.fixture(autouse=True)
def _default_seed():
    torch.manual_seed(0)


def pair(name):
    """Our module and torch.nn's."""
    options = KINDS.get(name, {})
    return [getattr(nn, name.split()[0])(I, H, **options, dtype=DTYPE) for nn in (fastcells.nn, torch.nn)]


def zeros(*shape, dtype=DTYPE, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


class Make:
    """Good data for one kind of module, to be spoilt."""

    def __init__(self, name):
        self.lstm, self.cell = name.startswith("LSTM"), name.endswith("Cell")
        options = KINDS.get(name, {})
        self.rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        self.out = options.get("proj_size", H)
        self.shape = (N, I) if self.cell else (N, T, I) if options.get("batch_first") else (T, N, I)
        self.time = self.shape.index(T) if T in self.shape else None

    def x(self, **options):
        return zeros(*self.shape, **options)

    def wrap(self, h, c):
        return (h, c) if self.lstm else h

    def hx(self, extra=(), features=0, batch=N, rows=0, **options):
        """Default shapes, with other sizes where told."""
        leading = (*extra, batch) if self.cell else (*extra, rows or self.rows, batch)
        return self.wrap(zeros(*leading, self.out + features, **options), zeros(*leading, H + features, **options))

    def packed(self, batch_sizes, rows=5, features=I, indices=(None, None), dtype=torch.int64):
        sizes = torch.tensor(batch_sizes, dtype=dtype) if isinstance(batch_sizes, list) else batch_sizes
        order = [None if i is None else torch.tensor(i) for i in indices]
        return PackedSequence(zeros(rows, features), sizes, *order)


# what is wrong -> (the call's arguments, what the message must say), for layers and cells alike
COMMON = {
    "input of 4 dimensions": (lambda m: (m.x()[None, None],), r"input must have \d dimensions.* got shape \(1, 1, "),
    "input of 0 dimensions": (lambda m: (zeros(),), r"input must have \d dimensions.* got shape \(\)"),
    "input features": (lambda m: (m.x()[..., :2],), r"input must have input_size = 3 features, got 2"),
    "input features, given states": (lambda m: (m.x()[..., :2], m.hx()), r"input_size = 3 features, got 2"),
    "input is a string": (lambda m: ("x",), r"input must be a Tensor.* got str"),
    "input is None": (lambda m: (None,), r"input must be a Tensor.* got NoneType"),
    "input is a list": (lambda m: ([m.x()],), r"input must be a Tensor.* got list"),
    "input is an array": (lambda m: (m.x().numpy(),), r"input must be a Tensor.* got ndarray"),
    "input dtype": (
        lambda m: (m.x(dtype=torch.float64),),
        r"weight_ih\w* .*dtype of input, torch.float64, got torch.float32",
    ),
    "input integers": (
        lambda m: (m.x(dtype=torch.int64),),
        r"weight_ih\w* .*dtype of input, torch.int64, got torch.float32",
    ),
    "input device": (lambda m: (m.x(device="meta"),), r"weight_ih\w* .*device of input, meta, got cpu"),
    "state batch": (lambda m: (m.x(), m.hx(batch=N + 1)), r"h_0|hx.* must have shape .*2, \d\).* got .*3, \d\)"),
    "state features": (
        lambda m: (m.x(), m.hx(features=1)),
        r"hx \(h_0\) must have shape \(.*\) to go with input, got \(",
    ),
    "state of too many dimensions": (lambda m: (m.x(), m.hx(extra=(1,))), r"hx \(h_0\) must have shape .* got \(1, "),
    "state dtype": (
        lambda m: (m.x(), m.hx(dtype=torch.float64)),
        r"h_0 .*dtype of input, torch.float32, got torch.float64",
    ),
    "state device": (lambda m: (m.x(), m.hx(device="meta")), r"h_0 .*device of input, cpu, got meta"),
    "state is a string": (lambda m: (m.x(), "state"), r"hx .*must be a .*Tensor.* got str"),
    "state is a number": (lambda m: (m.x(), 0.0), r"hx .*must be a .*Tensor.* got float"),
    "state holds strings": (lambda m: (m.x(), m.wrap("h", "c")), r"hx \(h_0\) must be a Tensor, got str"),
    "a tuple for a tensor, or the reverse": (
        lambda m: (m.x(), m.hx()[0] if m.lstm else (m.hx(),)),
        r"hx .*must be a .*Tensor.*, got (Tensor|tuple)",
    ),
    "three states": (lambda m: (m.x(), (m.hx()[0] if m.lstm else m.hx(),) * 3), r"hx .*must be a .*, got (3|tuple)"),
    "a stack of states": (lambda m: (m.x(), torch.stack([zeros(N, H)] * 2)), r"hx .*(must be|must have shape) .*got "),
}
ONLY_LAYERS = {
    "no steps": (lambda m: (m.x().narrow(m.time, 0, 0),), r"sequence length of at least 1, got 0 in shape \("),
    "no steps, unbatched": (lambda m: (zeros(0, I),), r"sequence length of at least 1, got 0 in shape \(0, 3\)"),
    "state rows": (lambda m: (m.x(), m.hx(rows=3)), r"h_0\) must have shape \(\d, 2, \d\) to go with input, got \(3, "),
    "unbatched state, batched input": (
        lambda m: (m.x(), m.wrap(zeros(m.rows, m.out), zeros(m.rows, H))),
        r"h_0\) must have shape \(\d, 2, \d\) .*got \(\d, \d\)",
    ),
    "batched state, unbatched input": (
        lambda m: (zeros(T, I), m.hx(batch=1)),
        r"h_0\) must have shape \(\d, \d\) .*got \(\d, 1, ",
    ),
    "packed features": (lambda m: (m.packed([2, 2, 1], features=2),), r"input_size = 3 features, got 2"),
    "packed and a state for other sequences": (
        lambda m: (m.packed([2, 2, 1]), m.hx(batch=3)),
        r"h_0\) must have shape .* got .*3, ",
    ),
    "packed and a state without batch": (
        lambda m: (m.packed([2, 2, 1]), m.wrap(zeros(1, H), zeros(1, H))),
        r"h_0\) must have shape .* got \(1, 4\)",
    ),
    "batch_sizes that increase": (
        lambda m: (m.packed([1, 2, 2]),),
        r"batch_sizes .*never increase.*got \[1, 2, 2\] with sum 5",
    ),
    "batch_sizes that increase to 4": (lambda m: (m.packed([1, 4]),), r"batch_sizes .*never increase.*got \[1, 4\]"),
    "batch_sizes, too few rows": (
        lambda m: (m.packed([3, 3]),),
        r"sum to the 5 rows of input.data, got \[3, 3\] with sum 6",
    ),
    "batch_sizes, negative": (lambda m: (m.packed([3, -1, 3]),), r"batch_sizes must be positive.*got \[3, -1, 3\]"),
    "batch_sizes, zero first": (lambda m: (m.packed([0, 5]),), r"batch_sizes must be positive.*got \[0, 5\]"),
    "batch_sizes, empty": (lambda m: (m.packed([], rows=0),), r"batch_sizes must be positive.*got \[\]"),
    "batch_sizes of int32": (
        lambda m: (m.packed([2, 2, 1], dtype=torch.int32),),
        r"batch_sizes must be an int64 .*got torch.int32",
    ),
    "batch_sizes of 2 dimensions": (
        lambda m: (m.packed([[2, 2, 1]]),),
        r"batch_sizes must be .*1 dimension, got torch.int64 of shape \(1, 3\)",
    ),
    "packed data of 3 dimensions": (
        lambda m: (PackedSequence(zeros(5, 1, I), torch.tensor([2, 2, 1])),),
        r"input.data must .*2 dimensions.*got shape \(5, 1, 3\)",
    ),
    "sorted_indices, too many": (
        lambda m: (m.packed([2, 2, 1], indices=([0, 1, 0], [0, 1, 0])), m.hx()),
        r"sorted_indices must have shape \(2,\).*got \(3,\)",
    ),
    "sorted_indices, out of range": (
        lambda m: (m.packed([2, 2, 1], indices=([0, 7], [0, 1])), m.hx()),
        r"\.sorted_indices .*0 to 1, got 0 to 7",
    ),
    "unsorted_indices, out of range": (
        lambda m: (m.packed([2, 2, 1], indices=([0, 1], [0, 7])), m.hx()),
        r"unsorted_indices .*0 to 1, got 0 to 7",
    ),
}
ONLY_CELLS = {
    "packed": (lambda m: (m.packed([2, 2, 1]),), r"input must be a Tensor, got PackedSequence"),
    "state of one sequence": (lambda m: (m.x(), m.hx(batch=1)), r"h_0\) must have shape \(2, 4\) .*got \(1, 4\)"),
    "batched state, unbatched input": (
        lambda m: (zeros(I), m.hx(batch=1)),
        r"h_0\) must have shape \(4,\) .*got \(1, 4\)",
    ),
}
CASES = [
    pytest.param(name, *case, id=f"{name}: {what}")
    for names, table in (([*KINDS, *CELLS], COMMON), (KINDS, ONLY_LAYERS), (CELLS, ONLY_CELLS))
    for name in names
    for what, case in table.items()
]


def attempt(module, arguments):
    """The result, or the exception."""
    try:
        return module(*arguments)
    except Exception as error:
        return error


@pytest.mark.parametrize(("name", "spoilt", "message"), CASES)
def test_same_exception_and_a_clear_message(name, spoilt, message):
    ours, theirs = pair(name)
    arguments = spoilt(Make(name))
    expected, got = attempt(theirs, arguments), attempt(ours, arguments)
    assert isinstance(expected, Exception), "torch.nn takes it: no case of bad input"
    assert type(got) is type(expected), f"{got!r}, torch.nn raises {expected!r}"
    assert re.search(message, str(got)), str(got)


# Odd, but taken by torch.nn: the same result
TAKEN = {
    "states in a list": lambda m: (m.x(), list(m.hx()) if m.lstm else m.hx()),
    "batch of 0": lambda m: (m.x().narrow(0 if m.cell or m.time else 1, 0, 0),),
    "batch_sizes with steps of nobody": lambda m: (m.packed([2, 2, 1, 0]),),
    "batch_sizes that leave rows unused": lambda m: (m.packed([2, 2]),),
    "state of more sequences than asked for": lambda m: (m.packed([2, 2, 1], indices=([1, 0], [1, 0])), m.hx(batch=3)),
}


@pytest.mark.parametrize(
    ("name", "what"), [(n, w) for n in [*KINDS, *CELLS] for w in TAKEN if n in KINDS or "batch_sizes" not in w]
)
def test_odd_input_is_treated_as_torch_does(name, what):
    ours, theirs = pair(name)
    theirs.load_state_dict(ours.state_dict())
    arguments = TAKEN[what](Make(name))
    expected, got = attempt(theirs, arguments), attempt(ours, arguments)
    if isinstance(expected, Exception):
        assert type(got) is type(expected)
    elif ours._route(*arguments) is None:
        assert [type(t) for t in got] == [type(t) for t in expected]
    else:
        assert same(got, expected)


@pytest.mark.parametrize("name", [*KINDS, *CELLS])
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("spoil", ["rows", "missing", "none", "dtype", "device"])
def test_bad_weights(name, weight, spoil):
    """The engine reads the weights' memory by their expected shape, so a wrong one must not reach it."""
    arguments = (Make(name).x(),)
    results = []
    for module in pair(name):
        full = next(n for n, _ in module.named_parameters() if n.startswith(weight))
        parameter = getattr(module, full)
        if spoil == "missing":
            delattr(module, full)
        elif spoil == "none":
            setattr(module, full, None)
        else:
            value = {"rows": parameter[:-1], "dtype": parameter.double(), "device": parameter.to("meta")}[spoil]
            setattr(module, full, torch.nn.Parameter(value.detach()))
        results.append(attempt(module, arguments))
    got, expected = results
    assert isinstance(expected, Exception) == isinstance(got, Exception)
    if isinstance(expected, Exception):
        assert type(got) is type(expected), f"{got!r}, torch.nn raises {expected!r}"
        assert full in str(got)


def test_the_cause_is_torchs_own_exception():
    ours, theirs = pair("GRU")
    expected, got = (attempt(m, (zeros(T, N, I + 1),)) for m in (theirs, ours))
    assert str(got) == "GRU: input must have input_size = 3 features, got 4"
    assert type(got.__cause__) is type(expected)
    assert str(got.__cause__) == str(expected)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
@pytest.mark.parametrize(
    "options",
    [
        {"input_size": 0},
        {"hidden_size": -1},
        {"input_size": 2.0},
        {"num_layers": 0},
        {"dropout": 2},
        {"bias": 1},
        {"proj_size": 9},
        {"proj_size": -1},
        {"nonlinearity": "sigmoid"},
        {"batch_first": None},
        {"dtype": "float32"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_constructor_raises_as_torch_does(kind, options):
    arguments = {"input_size": 3, "hidden_size": 4, **options}
    expected, got = (attempt(lambda nn=nn: getattr(nn, kind)(**arguments), ()) for nn in (torch.nn, fastcells.nn))
    assert type(got) is type(expected) or isinstance(got, type(expected))
    if isinstance(expected, Exception):
        assert str(got).replace("fastcells.nn", "torch.nn") == str(expected)
