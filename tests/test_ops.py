"""The registered operations: torch's own checks of them, torch.compile, half precision and autocast."""

import copy
import re

import pytest
import torch
from helpers import Case, cast, check, compare, cotangents, leaves, outputs, record, relative_error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import fastcells
from fastcells import cell, cells
from fastcells.cell import registered
from fastcells.expression import sigmoid, tanh

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CELLS = ["lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu"]
DEEP = {"num_layers": 2, "bidirectional": True}
CASES = [
    Case(cell, states=states, batch_first=states, layout=layout, dtype=dtype, **options)
    for cell in CELLS
    for states, layout, dtype, options in (
        (False, "padded", torch.float64, {}),
        (True, "padded", torch.float32, DEEP),
    )
] + [Case("gru", layout="strided", bias=False, **DEEP), Case("lstm", layout="unbatched", states=True)]


def call_of(case, requires_grad=True):
    """The arguments of the operation `layer` for the first layer of a case."""
    module, (x, hx) = case.module(fastcells.nn), case.data()
    call, *_ = module._parts(x, hx)
    directions = call.parameters[0]
    flat = [w for p in directions for w in p]
    states = [s[: len(directions)].detach().clone().requires_grad_(requires_grad) for s in call.states or ()]
    x = call.batch.x.detach().clone().requires_grad_(requires_grad)
    return call.cell.key, x, states, [], flat, call.batch.batch_sizes, len(directions)


OP_CASES = [Case("lstm_proj", states=True), Case("gru", layout="packed", states=True), Case("rnn_tanh")]


@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck(case):
    call = call_of(case)
    torch.library.opcheck(torch.ops.fastcells.layer.default, call)
    call = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, call)  # its gradient: test_func
    with torch.no_grad():
        count = 1 + len(registered(call[0]).states)
        y, *results = torch.ops.fastcells.layer(*call, True)
    cotangents = [torch.randn_like(y), None, *(torch.randn_like(s) for s in results[1 : count - 1])]
    arguments = *call, False, [y, *results[count - 1 :]], cotangents, [True, bool(call[2]), False, True]
    torch.library.opcheck(torch.ops.fastcells.layer_backward.default, arguments)


def test_operation_checks_its_arguments():
    """Kernels go by raw addresses."""
    key, x, states, inputs, flat, sizes, count = call_of(Case("lstm"), requires_grad=False)
    with torch.no_grad():
        with pytest.raises(ValueError, match="weight_ih must be of shape"):
            torch.ops.fastcells.layer(key, x[..., :2], states, inputs, flat, sizes, count)
        with pytest.raises(LookupError, match="no cell nowhere:cell"):
            torch.ops.fastcells.layer("nowhere:cell", x, states, inputs, flat, sizes, count)
        y, h, c, *kept = torch.ops.fastcells.layer(key, x, states, inputs, flat, sizes, count, True)
        for wrong in ([y, kept[0][:1], *kept[1:]], [y], [y.float(), *kept]):
            with pytest.raises(ValueError, match="kept"):
                torch.ops.fastcells.layer_backward(
                    key, x, states, inputs, flat, sizes, count, False, wrong, [y, h, c], [True, False, False, True]
                )
        with pytest.raises(ValueError, match=re.escape("cotangents[0]")):
            torch.ops.fastcells.layer_backward(
                key, x, states, inputs, flat, sizes, count, False, [y, *kept], [y[1:], h, c], [True, False, False, True]
            )


def test_every_cell_has_a_key_of_its_own():
    assert registered(cells.lstm.key) is cells.lstm

    def declare():
        @fastcells.cell(gates="h")
        def leaky(x, u, s):
            return s.h + x.h + u.h

        return leaky

    first, second = declare(), declare()
    assert first.key != second.key
    assert registered(first.key) is first


# torch.compile


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def operations(monkeypatch):
    """The forward calls of the engine."""
    calls = []
    original = fastcells.cpu.layer.Forward.start

    def counted(call, *given):
        calls.append(call.r.cell.name)
        return original(call, *given)

    monkeypatch.setattr(fastcells.cpu.layer.Forward, "start", counted)
    return calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case, operations):
    """One graph, forward and backward, with the results of the eager layer: the same kernels compute them."""
    module, (x, hx) = case.module(fastcells.nn), case.data()
    expected = record(module, x, hx)
    operations.clear()
    got = record(Compiled(module, backend="aot_eager"), x, hx)
    assert len(operations) == case.num_layers
    got = {name.replace("module.", ""): t for name, t in got.items()}
    if case.dtype == torch.float64:
        check(got, expected)
    else:
        compare(module, case.module(torch.nn), x, hx)
        for name, t in expected.items():
            assert relative_error(got[name], t) < 1e-6, name


@cell(gates="f z", parameters="slope=1", scalars="beta=0.5")
def own(x, u, s, p):
    """A minimal gated unit with parameters."""
    f = sigmoid(x.f + u.f)
    return s.h + p.beta * f * (tanh(p.slope * x.z + u.z(f * s.h)) - s.h)


def recurrent(cell, **options):
    torch.manual_seed(0)
    return fastcells.nn.Recurrent(cell, 4, 6, **options, dtype=torch.float64)


OPTIONS = {
    **{f"{name} {layout}": Case(name, bias=False, layout=layout, states=True, **DEEP)
       for name in ("lstm", "lstm_proj", "gru", "rnn_tanh") for layout in ("padded", "strided", "unbatched")},
    "batch_first": Case("gru", num_layers=3, batch_first=True, states=True),
    "dropout": Case("lstm", num_layers=3, bidirectional=True, dropout=0.4),
    "own cell": lambda: recurrent(own),
    "own cell, deep": lambda: recurrent(own, batch_first=True, bias=False, **DEEP),
    "own cell, dropout": lambda: recurrent(own, num_layers=2, dropout=0.4),
    "own cell, projected": lambda: recurrent(cells.lstm, proj_size=3, **DEEP),
    "weight dropout": lambda: recurrent(own, weight_dropout=0.4),
    "recurrent dropout, zoneout": lambda: recurrent(cells.gru_reset_before, recurrent_dropout=0.3, zoneout=0.2),
    "zoneout": lambda: recurrent(cells.peephole_lstm, zoneout=(0.0, 0.5)),
}  # fmt: skip
"""What changes a gradient, and is not above."""


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_option(option, operations):
    """With the same draws from the same seed."""
    made = OPTIONS[option]
    module, (x, hx) = (made.module(fastcells.nn), made.data()) if isinstance(made, Case) else (made(), Case().data())
    expected = record(module, x, hx)
    operations.clear()
    got = record(Compiled(module, backend="aot_eager"), x, hx)
    assert len(operations) == module.num_layers
    check({name.replace("module.", ""): t for name, t in got.items()}, expected)


@pytest.mark.parametrize("name", ["output", "h_n", "c_n", "input", "weight_hh_l0", "bias_ih_l1_reverse", "c_0"])
def test_compiled_for_one_output_or_gradient(name):
    """As one loss uses one output; as all but one leaf are frozen."""
    module, (x, hx) = (case := Case("lstm", states=True, **DEEP)).module(fastcells.nn), case.data()
    if name in ("output", "h_n", "c_n"):
        got = record(Compiled(module, backend="aot_eager"), x, hx, [name])
        check({name.replace("module.", ""): t for name, t in got.items()}, record(module, x, hx, [name]))
        return
    module.requires_grad_(False)
    x, hx, named = leaves(module, x, hx)
    for other, leaf in named.items():
        leaf.requires_grad_(other == name)
    results = []
    for run in (torch.compile(module, backend="aot_eager", fullgraph=True), module):
        y, (h, c) = run(x, hx)
        (gradient,) = torch.autograd.grad(y.square().sum() + h.sin().sum() + c.cos().sum(), named[name])
        results.append({name: gradient})
    check(*results)


BETWEEN = {
    "lengths": {"lengths": torch.tensor([5, 2, 3])},
    "reset": {"reset": torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) < 0.3, "reset_to": 0},
    "reverse": {"reverse": True},
    "cell states": {"return_cell_states": True},
    "cell states, lengths": {"return_cell_states": True, "lengths": torch.tensor([5, 2, 3])},
}


@pytest.mark.parametrize("options", BETWEEN)
def test_compiled_around(options, operations):
    """Calls that run between the graphs, with something to compile before and after."""
    module, x = Case("lstm", num_layers=2).module(fastcells.nn), Case().data()[0]

    def loss(x):
        results = module(x * 2, **BETWEEN[options])
        y, (h, c), *series = results
        return (y.sin() * 3).sum() + h.square().sum() + c.cos().sum() + sum(t.square().sum() for t in series)

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager")):
        operations.clear()
        given = x.clone().requires_grad_()
        value = run(given)
        found.append(dict(zip(["x", *dict(module.named_parameters())],
                              torch.autograd.grad(value, [given, *module.parameters()]), strict=True)))  # fmt: skip
        found[-1]["loss"] = value.detach()
        assert len(operations) == 2
    check(*found)


def test_compiled_packed():
    """Torch's own packing breaks the graph; the results are those of the eager layer."""
    module, (x, hx) = (case := Case("gru", layout="shuffled", states=True, **DEEP)).module(fastcells.nn), case.data()
    compiled = Compiled(module, backend="aot_eager")
    compiled.run = torch.compile(module, backend="aot_eager")
    got = record(compiled, x, hx)
    check({name.replace("module.", ""): t for name, t in got.items()}, record(module, x, hx))


class Compiled(torch.nn.RNNBase):
    """A module compiled with fullgraph=True, as `record` takes it."""

    def __init__(self, module, **options):
        torch.nn.Module.__init__(self)
        self.module = module
        self.run = torch.compile(module, fullgraph=True, **options)

    def forward(self, input, hx=None):
        return self.run(input, hx)


class Model(torch.nn.Module):
    """A layer with dense ones around it, and a single step."""

    def __init__(self, nn, kind="GRU", **options):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.layer, self.cell = (
            torch.nn.Linear(4, 3),
            getattr(nn, kind)(3, 5, **options),
            nn.LSTMCell(5, 2),
        )

    def forward(self, x):
        return self.cell(self.layer(self.before(x).relu())[0].sum(0))[0] * 2


@pytest.mark.parametrize("training", [False, True])
def test_compiled_by_inductor(training):
    x = torch.randn(6, 3, 4)
    ours, theirs = Model(fastcells.nn), Model(torch.nn)
    with torch.set_grad_enabled(training):
        got, expected = torch.compile(ours, fullgraph=True)(x), theirs(x)
    assert relative_error(got, expected) < 1e-5
    if training:
        for result in (got, expected):
            result.sum().backward()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert relative_error(a.grad, b.grad) < 1e-4, name


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compiled_once_for_all_sizes(kind):
    module = Model(fastcells.nn, kind)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps, batch in ((5, 3), (9, 2), (2, 7)):
            x = torch.randn(steps, batch, 4)
            got, expected = (
                torch.autograd.grad(m(x).square().sum(), list(module.parameters())) for m in (compiled, module)
            )
            for a, b in zip(got, expected, strict=True):
                assert relative_error(a, b) < 1e-5


def test_six_layers_are_six_calls():
    """Torch's own layer would be taken apart, step by step: minutes."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    module = fastcells.nn.LSTM(8, 16, num_layers=6)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(100, 4, 8))
    assert sum("fastcells.layer" in str(n.target) for n in graphs[0].graph.nodes) == 6


def test_torchs_own_layers_are_compiled_as_ever():
    """The graph breaks there. What we say to the tracer is about our layers only."""
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(torch.nn.GRU(3, 4), backend="eager", fullgraph=True)(torch.randn(5, 2, 3))


class Packed(torch.nn.Module):
    """Packs and unpacks by itself, as models of libraries do."""

    def __init__(self, nn):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.GRU(3, 5)

    def forward(self, x, lengths):
        y, h = self.layer(pack_padded_sequence(x * 2, lengths))
        return pad_packed_sequence(y)[0].square().sum() + h.sum()


def test_packed_sequences_run_between_the_graphs(operations):
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 3, 1])
    ours, theirs = Packed(fastcells.nn), Packed(torch.nn)
    got, expected = torch.compile(ours, backend="eager")(x, lengths), theirs(x, lengths)
    assert operations == ["gru"]
    assert relative_error(got, expected) < 1e-5
    for result in (got, expected):
        result.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-4, name


def test_parametrized_layer_compiled():
    module, x = fastcells.nn.GRU(4, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert relative_error(torch.compile(module, backend="eager", fullgraph=True)(x)[0], module(x)[0]) < 1e-9


def test_mistakes_are_told_when_compiled():
    compiled = torch.compile(fastcells.nn.GRU(4, 5), backend="eager")
    with pytest.raises(RuntimeError, match=r"input_size|input.size"):
        compiled(torch.randn(6, 3, 7))


# torch.export


class WithLengths(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, hx=None):
        return self.layer(x, hx, lengths=lengths)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_exported_and_loaded(cell, strict, tmp_path):
    module, (x, hx) = (case := Case(cell, states=True, **DEEP)).module(fastcells.nn), case.data()
    torch.export.save(torch.export.export(module, (x, hx), strict=strict), tmp_path / "model.pt2")
    loaded = Compiled(module, backend="eager")
    loaded.module = loaded.run = torch.export.load(tmp_path / "model.pt2").module()
    got = {name.replace("module.", ""): t for name, t in record(loaded, x, hx).items()}
    expected = record(module, x, hx)
    check({name: got[name] for name in expected}, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_exported_with_lengths(cell):
    """Lengths of any kind afterwards; gradients too, and those of the compiled program."""
    module, (x, hx) = (case := Case(cell, states=True, **DEEP)).module(fastcells.nn), case.data()
    program = torch.export.export(WithLengths(module), (x, torch.tensor([5, 5, 5]), hx)).module()
    program.load_state_dict(WithLengths(module).state_dict())
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)

    def gradients(run, owner, lengths):
        given_x, given_hx, _ = leaves(module, x, hx)
        result = outputs(module, run(given_x, torch.tensor(lengths), given_hx))
        states = given_hx if isinstance(given_hx, tuple) else (given_hx,)
        wanted = [given_x, *states, *owner.parameters()]
        found = torch.autograd.grad(list(result.values()), wanted, list(cotangents(result).values()))
        return {**result, **{f"gradient {k}": g for k, g in enumerate(found)}}

    for lengths in ([5, 2, 3], [0, 5, 1]):
        expected = gradients(WithLengths(module), module, lengths)
        check(gradients(program, program, lengths), expected)
        check(gradients(compiled, program, lengths), expected)
    with pytest.raises(ValueError, match="lengths must be between 0 and 5"):
        program(x, torch.tensor([6, 1, 1]), hx)
    y = program(x, torch.tensor([5, 2, 3]), hx)[0]
    with pytest.raises(RuntimeError, match="no second derivatives of layers with lengths"):
        torch.autograd.grad(y.sum(), list(program.parameters()), create_graph=True)


@pytest.mark.parametrize("lengths", [[5, 2], [5.0, 2.0, 1.0]])
def test_exported_with_wrong_lengths(lengths):
    with pytest.raises(ValueError, match=r"lengths must be integers of shape \(3,\), .* got torch"):
        torch.export.export(WithLengths(fastcells.nn.GRU(4, 6)), (torch.randn(5, 3, 4), torch.tensor(lengths)))


# Modes that look at operations


def test_fake_tensors_and_modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module, x = fastcells.nn.LSTM(4, 5), torch.randn(6, 3, 4)
    with Looking():
        y, _ = module(x)
    assert torch.equal(y, module(x)[0])
    assert any("fastcells.layer" in name for name in seen)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = fastcells.nn.LSTM(4, 5, bidirectional=True)
        y, (h, _) = fake(mode.from_tensor(x))
    assert (tuple(y.shape), tuple(h.shape)) == ((6, 3, 10), (2, 3, 5))
    with torch.device("cpu"):
        assert torch.equal(module(x)[0], module(x)[0])


# Half precision and autocast: float32 inside, one rounding


def rounded(theirs, x, hx, dtype):
    """Outputs and gradients of torch's layer with these values, in float64."""
    return record(copy.deepcopy(theirs).double(), cast(x, torch.float64), cast(hx, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["padded", "shuffled"])
@pytest.mark.parametrize("cell", CELLS)
def test_half(cell, layout, dtype, operations):
    case = Case(cell, layout=layout, states=True, **DEEP)
    ours, theirs = (case.module(nn).to(dtype) for nn in (fastcells.nn, torch.nn))
    x, hx = case.data()
    x, hx = cast(x, dtype), cast(hx, dtype)
    got, truth = record(ours, x, hx), rounded(theirs, x, hx, dtype)
    assert len(operations) == 2
    for name, t in truth.items():
        assert got[name].dtype == dtype, name
        assert relative_error(got[name], t) < 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast(kind, autocast, given, operations):
    """The format that torch gives, where it runs at all (its LSTM refuses float32 input); float32 inside."""
    torch.manual_seed(0)
    ours, theirs = (getattr(nn, kind)(4, 6, num_layers=2) for nn in (fastcells.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4, dtype=given)
    with torch.autocast("cpu", autocast):
        y, h = ours(x)
        y.float().square().sum().backward()
        try:
            expected = theirs(x)[0].dtype
        except RuntimeError:
            expected = torch.promote_types(given, autocast)
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
    states = h if isinstance(h, tuple) else (h,)
    assert {y.dtype, *(s.dtype for s in states)} == {expected}
    assert compiled[0].dtype == expected
    assert torch.equal(compiled[0], y)
    assert set(operations) == {ours._cell().name}
    truth = copy.deepcopy(theirs).double()
    result = truth(x.double())[0]
    assert relative_error(y, result) < 2 * torch.finfo(expected).eps
    result.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), truth.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert relative_error(a.grad, b.grad) < 4 * torch.finfo(expected).eps, name


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_exported_under_autocast(kind):
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = getattr(fastcells.nn, kind)(4, 6)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.layer(x)[0]

    model, x = Inside(), torch.randn(5, 3, 4)
    exported = torch.export.export(model, (x,)).module()(x)
    assert exported.dtype is model(x).dtype
    assert torch.equal(exported, model(x))


def test_exported_with_lengths_and_called_under_autocast():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = torch.nn.Linear(3, 4), fastcells.nn.LSTM(4, 6)

        def forward(self, x, lengths):
            return self.layer(self.embed(x), lengths=lengths)[0]

    model, x, lengths = Model(), torch.randn(5, 3, 3), torch.tensor([5, 0, 2])
    program = torch.export.export(model, (x, lengths)).module()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = program(x, lengths), model(x, lengths)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=0, atol=0.01)
    assert (found - model(x, lengths)).abs().max() > 0, "the embedding was rounded"
    found.sum().backward()
    assert all(p.grad is not None for p in program.parameters())


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cell_under_autocast(kind):
    torch.manual_seed(0)
    ours, theirs = (getattr(nn, kind)(4, 6) for nn in (fastcells.nn, torch.nn))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(40, 4)
    with torch.autocast("cpu"):
        got, expected = (r if isinstance(r, tuple) else (r,) for r in (ours(x), theirs(x)))
    for a, b, truth in zip(got, expected, (r if isinstance(r := theirs(x), tuple) else (r,)), strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, truth) < torch.finfo(a.dtype).eps


def test_functional_under_autocast():
    module, x = fastcells.nn.GRU(4, 6), torch.randn(5, 3, 4, requires_grad=True)
    p = [(module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0, None)]
    expected = fastcells.functional.layer(cells.gru, x, None, p)[0]
    (grad,) = torch.autograd.grad(expected.sum(), x)
    with torch.autocast("cpu"):
        y = fastcells.functional.layer(cells.gru, x, None, p)[0]
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)
    assert torch.equal(y, expected)
    for module_call in (lambda: module(x)[0],):
        y = module_call()
        with torch.autocast("cpu"):  # backward alone
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)
