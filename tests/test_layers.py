"""The drop-in layers and cells against torch.nn in float64: outputs and every gradient, and what torch.nn promises."""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from helpers import Case, check, compare, cotangents, leaves, outputs, pairwise, record, relative_error, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence, unpack_sequence

import fastcells.functional
import fastcells.nn

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

CELLS = ("lstm", "lstm_proj", "gru", "rnn_tanh", "rnn_relu")
LAYOUTS = ("padded", "strided", "unbatched", "packed", "shuffled")
DTYPES = (torch.float32, torch.float64)
CASES = [
    Case(**row)
    for row in pairwise(
        cell=CELLS,
        num_layers=(1, 2, 3),
        bidirectional=(False, True),
        batch_first=(False, True),
        bias=(False, True),
        layout=LAYOUTS,
        states=(False, True),
        dtype=DTYPES,
        steps=(1, 2, 7, 33),
        batch=(1, 2, 3, 4, 5, 17),
        inputs=(1, 3, 16, 65),
        hidden=(1, 2, 8, 31, 64, 130),
    )
]
SMALL = [
    Case(cell, num_layers=2, bidirectional=True, layout=layout, states=True) for cell in CELLS for layout in LAYOUTS
]
KINDS = [("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {})]
CELL_KINDS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("LSTMCell", {}), ("GRUCell", {})]


def pair(case: Case):
    """Our layer and torch.nn's, with the same weights, and the data."""
    return case.module(fastcells.nn), case.module(torch.nn), *case.data()


def cell_pair(kind, options, dtype=torch.float64, inputs=5, hidden=7, bias=True):
    modules = []
    for nn in (fastcells.nn, torch.nn):
        torch.manual_seed(0)
        modules.append(getattr(nn, kind)(inputs, hidden, bias, **options, dtype=dtype))
    return modules


def cell_data(kind, *leading, dtype=torch.float64, inputs=5, hidden=7):
    x, h, c = (torch.randn(*leading, size).to(dtype) for size in (inputs, hidden, hidden))
    return x, (h, c) if kind == "LSTMCell" else h


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from a team, and torch's own stalls where test processes share the cores."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Values and gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case):
    compare(*pair(case))


@pytest.mark.parametrize(
    "case", [Case(cell, steps=400, states=True, dtype=d) for cell in CELLS for d in DTYPES], ids=str
)
def test_long_sequence(case):
    compare(*pair(case))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (1,), (2,), (3,), (7,), (40,)])
@pytest.mark.parametrize(("kind", "options"), CELL_KINDS)
def test_cell(kind, options, leading, bias, dtype):
    """Weights are read as they are for a few rows, packed for more."""
    ours, theirs = cell_pair(kind, options, dtype, bias=bias)
    x, hx = cell_data(kind, *leading, dtype=dtype)
    compare(ours, theirs, x, hx)
    compare(ours, theirs, x)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        cell=st.sampled_from(CELLS),
        num_layers=st.integers(1, 2),
        bidirectional=st.booleans(),
        batch_first=st.booleans(),
        bias=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        states=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        steps=st.integers(1, 9),
        batch=st.integers(1, 9),
        inputs=st.integers(1, 9),
        hidden=st.integers(1, 130),
    )
)
def test_any_shape(case):
    compare(*pair(case))


@pytest.mark.parametrize("name", ["output", "h_n", "c_n"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_through_one_output(cell, name):
    if name == "c_n" and not cell.startswith("lstm"):
        name = "h_n"
    compare(*pair(Case(cell, bidirectional=True, states=True)), through=[name])


@pytest.mark.parametrize("layout", ["padded", "shuffled"])
@pytest.mark.parametrize("cell", CELLS)
def test_any_subset_requires_grad(cell, layout):
    case = Case(cell, num_layers=2, states=True, layout=layout)
    ours, theirs, x, hx = pair(case)
    truth = record(theirs, x, hx)
    ours.requires_grad_(False)
    x, hx, named = leaves(ours, x, hx)
    names = list(named)
    subsets = [[n] for n in names] + [[n for n in names if "weight" in n], [n for n in names if "_l1" in n], names[:2]]
    for chosen in subsets:
        for name, leaf in named.items():
            leaf.requires_grad_(name in chosen)
        result = outputs(ours, ours(x, hx))
        weights = cotangents(result)
        reached = [n for n in result if result[n].requires_grad]
        gradients = torch.autograd.grad(
            [result[n] for n in reached], [named[n] for n in chosen], [weights[n] for n in reached]
        )
        for name, gradient in zip(chosen, gradients, strict=True):
            assert relative_error(gradient, truth[f"gradient of {name}"]) < 1e-9, (chosen, name)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_without_grad(case, guard):
    ours, theirs, x, hx = pair(case)
    with guard():
        got, expected = outputs(ours, ours(x, hx)), outputs(theirs, theirs(x, hx))
        check(got, expected)
    assert not any(t.requires_grad for t in got.values())


@pytest.mark.parametrize("layout", ["padded", "shuffled"])
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, layout):
    case = Case(cell, bidirectional=True, layout=layout, states=True, steps=3, batch=2, inputs=2, hidden=3)
    ours, _, x, hx = pair(case)
    x, hx, named = leaves(ours, x, hx)
    assert torch.autograd.gradcheck(lambda *_: tuple(outputs(ours, ours(x, hx)).values()), list(named.values()))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_double_backward(case):
    ours, theirs, x, hx = pair(case)
    assert ours._route(x, hx) is None

    def second(module):
        module_x, module_hx, named = leaves(module, x, hx)
        result = outputs(module, module(module_x, module_hx))
        weights = {n: w.requires_grad_() for n, w in cotangents(result).items()}
        wrt = [*named.values(), *weights.values()]
        names = [*named, *(f"cotangent of {n}" for n in weights)]
        first = torch.autograd.grad(
            list(result.values()), list(named.values()), list(weights.values()), create_graph=True
        )
        first = dict(zip(named, first, strict=True))
        values = torch.autograd.grad(
            list(first.values()), wrt, list(cotangents(first, seed=5).values()), allow_unused=True
        )
        return {n: v for n, v in zip(names, values, strict=True) if v is not None and v.any()}

    check(second(ours), second(theirs))


# Rows and steps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", ["input", "h_0"])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_stay_in_their_row(cell, where, dtype, value):
    row, step = 2, 3
    case = Case(cell, bidirectional=True, states=True, dtype=dtype, steps=6, batch=7, hidden=21)
    ours, theirs, x, hx = pair(case)
    clean = record(ours, x, hx)
    if where == "input":
        x[step, row, 1] = value
    else:
        (hx[0] if isinstance(hx, tuple) else hx)[1, row, 2] = value
    assert ours._route(x, hx) is None
    got, truth = record(ours, x, hx), record(theirs, x, hx)
    for name in ("output", "h_n", "c_n", "gradient of input", "gradient of h_0", "gradient of c_0"):
        if name in truth:
            others = [n for n in range(case.batch) if n != row]
            assert torch.equal(got[name][:, others], clean[name][:, others]), f"{name}: another row changed"
            # The derivative of a rounded, saturated or infinite value is not compared: its values, not its place.
            tolerance = 1e-9 if dtype == torch.float64 else 1e-5
            assert relative_error(got[name][:, row], truth[name][:, row]) < tolerance, name


@pytest.mark.parametrize("cell", CELLS)
def test_nan_in_one_cotangent_stays_in_its_row(cell):
    row = 2
    ours, theirs, x, hx = pair(Case(cell, states=True, steps=6, batch=7, hidden=21))
    gradients = {}
    for module, poison in itertools.product((ours, theirs), (0.0, float("nan"))):
        module_x, module_hx, named = leaves(module, x, hx)
        result = module(module_x, module_hx)[0]
        cotangent = cotangents({"output": result})["output"]
        cotangent[3, row] += poison
        gradients[module, poison == 0] = torch.autograd.grad(result, [named["input"], named["h_0"]], cotangent)
    others = [n for n in range(7) if n != row]
    for got, clean, truth in zip(gradients[ours, False], gradients[ours, True], gradients[theirs, False], strict=True):
        assert torch.equal(got[:, others], clean[:, others])
        assert truth[:, row].isnan().any()
        assert torch.equal(got.isnan(), truth.isnan())


@pytest.mark.parametrize("cell", CELLS)
def test_steps_one_by_one(cell):
    ours, _, x, hx = pair(Case(cell, num_layers=2, states=True, dtype=torch.float64, steps=9))
    whole = outputs(ours, ours(x, hx))
    steps = []
    for t in range(len(x)):
        y, hx = ours(x[t : t + 1], hx)
        steps.append(y)
    check(outputs(ours, (torch.cat(steps), hx)), whole)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_is_each_sequence_alone(cell, bidirectional):
    case = Case(cell, bidirectional=bidirectional, batch=6, steps=8, layout="shuffled", states=True)
    ours, _, packed, hx = pair(case)
    y, states = ours(packed, hx)
    assert isinstance(y, PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(y, name) is getattr(packed, name)
    states = states if isinstance(states, tuple) else (states,)
    padded, lengths = pad_packed_sequence(y)
    for n, sequence in enumerate(unpack_sequence(packed)):
        alone_hx = tuple(h[:, n] for h in hx) if isinstance(hx, tuple) else hx[:, n]
        alone_y, alone_states = ours(sequence, alone_hx)
        alone_states = alone_states if isinstance(alone_states, tuple) else (alone_states,)
        assert relative_error(padded[: lengths[n], n], alone_y) < 1e-9
        assert not padded[lengths[n] :, n].any()
        for a, b in zip(states, alone_states, strict=True):
            assert relative_error(a[:, n], b) < 1e-9


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_repeatable_to_the_bit(case):
    ours, _, x, hx = pair(case)
    first, second = record(ours, x, hx), record(ours, x, hx)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("case", SMALL[:: len(LAYOUTS) - 1], ids=str)
def test_threads(case, threads):
    torch.set_num_threads(threads)
    compare(*pair(case))


# Autograd's rules


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice(cell, dtype):
    ours, _, x, hx = pair(Case(cell, num_layers=2, states=True, dtype=dtype))
    x, hx, named = leaves(ours, x, hx)
    result = list(outputs(ours, ours(x, hx)).values())
    weights = [torch.randn_like(r) for r in result]
    first = torch.autograd.grad(result, list(named.values()), weights, retain_graph=True)
    second = torch.autograd.grad(result, list(named.values()), weights)
    for name, a, b in zip(named, first, second, strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(result, list(named.values()), weights)


@pytest.mark.parametrize("cell", CELLS)
def test_change_in_place_before_backward(cell):
    """Where torch.nn raises, so do we; elsewhere we raise or are right, never silently wrong."""
    ours, theirs, x, hx = pair(Case(cell, bidirectional=True, states=True))

    def gradients(module, changed):
        module = copy.deepcopy(module)
        module_x, module_hx, named = leaves(module, x.clone(), copy.deepcopy(hx))
        result = outputs(module, module(module_x, module_hx))
        weights = cotangents(result)
        with torch.no_grad():
            {**named, **result}[changed].add_(1)
        values = torch.autograd.grad(list(result.values()), list(named.values()), list(weights.values()))
        return dict(zip(named, values, strict=True))

    def attempt(module, changed):
        try:
            return gradients(module, changed)
        except RuntimeError as error:
            return str(error)

    truth = {n.removeprefix("gradient of "): g for n, g in record(theirs, x, hx).items() if n.startswith("gradient")}
    raised = set()
    for changed in [*truth, *outputs(theirs, theirs(x, hx))]:
        expected, got = attempt(theirs, changed), attempt(ours, changed)
        if isinstance(expected, str):
            raised.add(changed)
        if isinstance(expected, str) or isinstance(got, str):
            assert isinstance(got, str), f"{changed}: torch.nn raises {expected}"
            assert re.search("modified (by an )?inplace", got)
        else:
            check(got, truth)
    assert {"input", "weight_ih_l0", "weight_hh_l0_reverse"} <= raised


def test_gradients_accumulate_and_train():
    """A few steps of SGD with momentum and weight decay end at torch.nn's weights."""
    case = Case("gru", num_layers=2, bidirectional=True)
    ends = []
    for nn in (fastcells.nn, torch.nn):
        module, (x, _) = case.module(nn), case.data()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(5):
            optimizer.zero_grad(set_to_none=False)
            for part in x.split(1, dim=1):
                module(part)[0].square().sum().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
        ends.append({n: p.detach() for n, p in module.named_parameters()})
    check(*ends)


# Dropout


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_draws_as_torch_does(cell, batch_first, layout, dtype, p):
    case = Case(cell, num_layers=3, bidirectional=True, batch_first=batch_first, layout=layout, dtype=dtype, dropout=p)
    ours, theirs, x, hx = pair(case)
    compare(ours, theirs, x, hx)
    torch.manual_seed(7)
    ours(x)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    theirs(x)
    assert torch.equal(state, torch.get_rng_state())
    if p < 1:
        assert not torch.equal(*(next(iter(outputs(ours, ours(x)).values())) for _ in range(2)))
    ours.eval(), theirs.eval()
    compare(ours, theirs, x, hx)


# What torch.nn promises of a module


@pytest.mark.parametrize(("kind", "options"), KINDS + CELL_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_module_is_torchs(kind, options, dtype):
    made = []
    for nn in (fastcells.nn, torch.nn):
        torch.manual_seed(0)
        extra = {} if kind.endswith("Cell") else {"num_layers": 2, "bidirectional": True, "batch_first": True}
        made.append(getattr(nn, kind)(3, 4, **extra, **options, dtype=dtype))
    ours, theirs = made
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    assert torch.equal(torch.rand(3), (torch.manual_seed(0), theirs.reset_parameters(), torch.rand(3))[-1])
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.reset_parameters()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert all(a is not b and torch.equal(a, b) for a, b in zip(other.parameters(), ours.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert repr(torch.load(buffer, weights_only=False)) == repr(ours)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_and_are_independent(copied):
    ours, theirs, x, hx = pair(Case("lstm", num_layers=2, states=True))
    ours(x, hx)
    other = copied(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    compare(other, theirs, x, hx)


def test_to_another_dtype():
    ours, theirs, x, _ = pair(Case("gru", num_layers=2))
    for dtype in (torch.float32, torch.float64):
        compare(ours.to(dtype), theirs.to(dtype), x.to(dtype))


def test_originals_are_bound_at_import(monkeypatch):
    for kind in (theirs.__name__ for theirs in fastcells.nn.DROP_IN):
        monkeypatch.setattr(torch.nn, kind, getattr(fastcells.nn, kind))
        monkeypatch.setattr(torch.nn.modules.rnn, kind, getattr(fastcells.nn, kind))
    for case in SMALL:
        ours = case.module(torch.nn)
        assert type(ours).__module__ == "fastcells.nn"
        x, hx = case.data()
        assert ours._route(x, hx) is None
        ours(x, hx)
        ours(x[:, :0]) if case.layout == "padded" else None  # to torch's own forward
        assert type(copy.deepcopy(ours)) is type(ours)


def test_hooks_run():
    ours, _, x, _ = pair(Case("gru"))
    x.requires_grad_()
    seen = []
    ours.register_forward_pre_hook(lambda *_: seen.append("pre"))
    ours.register_forward_hook(lambda *_: seen.append("post"))
    ours.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours(x)[0].sum().backward()
    assert seen == ["pre", "post", "backward"]


# Weights are read at the time of the call


def _optimizer_step(module):
    module.zero_grad()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _data_copy(module):
    for parameter in module.parameters():
        parameter.data.copy_(parameter.data * 0.5)  # leaves parameter._version as it is


def _data_replaced(module):
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def _parameter_replaced(module):
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(parameter.detach() * 0.5))


def _numpy_view(module):
    for parameter in module.parameters():
        view = parameter.detach().numpy()
        view *= 0.5


def _loaded(module):
    module.load_state_dict({n: p * 0.5 for n, p in module.state_dict().items()})


def _assigned(module):
    module.load_state_dict({n: p * 0.5 for n, p in module.state_dict().items()}, assign=True)


CHANGES = [_optimizer_step, _data_copy, _data_replaced, _parameter_replaced, _numpy_view, _loaded, _assigned]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_changed_weights_are_seen(cell, change):
    ours, theirs, x, hx = pair(Case(cell, num_layers=2, states=True))
    with torch.no_grad():
        for _ in range(3):  # anything kept from one call to the next is kept by now
            check(outputs(ours, ours(x, hx)), outputs(theirs, theirs(x, hx)))
    change(ours), change(theirs)
    with torch.no_grad():
        check(outputs(ours, ours(x, hx)), outputs(theirs, theirs(x, hx)))
    compare(ours, theirs, x, hx)


@pytest.mark.parametrize("cell", CELLS)
def test_functional_call(cell):
    ours, theirs, x, hx = pair(Case(cell, num_layers=2, states=True))
    replaced = {n: (p.detach() * 0.5).requires_grad_() for n, p in theirs.named_parameters()}
    named = [outputs(m, torch.func.functional_call(m, replaced, (x, hx))) for m in (ours, theirs)]
    check(*named)
    weights = cotangents(named[0])
    gradients = [
        dict(
            zip(
                replaced,
                torch.autograd.grad(list(n.values()), list(replaced.values()), list(weights.values())),
                strict=True,
            )
        )
        for n in named
    ]
    check(*gradients)
    compare(ours, theirs, x, hx)


class Half(torch.nn.Module):
    def forward(self, weight):
        return weight * 0.5


@pytest.mark.parametrize("cell", CELLS)
def test_parametrized(cell):
    ours, theirs, x, hx = pair(Case(cell, num_layers=2, states=True))
    for module in (ours, theirs):
        torch.manual_seed(0)  # spectral_norm draws
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrizations.spectral_norm(module, "weight_ih_l1").eval()
        parametrize.register_parametrization(module, "bias_ih_l0", Half())
    compare(ours, theirs, x, hx)
    with parametrize.cached():
        compare(ours, theirs, x, hx)
    for module in (ours, theirs):
        parametrize.remove_parametrizations(module, "bias_ih_l0")
    compare(ours, theirs, x, hx)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_set_by_a_hook():
    ours, theirs, x, hx = pair(Case("lstm", states=True))
    for module in (ours, theirs):
        torch.nn.utils.weight_norm(module, "weight_hh_l0")
    compare(ours, theirs, x, hx)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_tied_weights(cell):
    ours, theirs, x, hx = pair(Case(cell, num_layers=2, inputs=6, states=True))
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
    compare(ours, theirs, x, hx)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_weights_that_are_not_contiguous(cell):
    ours, theirs, x, hx = pair(Case(cell, states=True))
    for module in (ours, theirs):
        for name, parameter in list(module.named_parameters()):
            wide = torch.zeros(*parameter.shape, 2, dtype=parameter.dtype)
            wide[..., 1] = parameter.detach()
            setattr(module, name, torch.nn.Parameter(wide[..., 1]))
    compare(ours, theirs, x, hx)


def test_states_that_are_expanded_or_the_same_tensor():
    ours, theirs, x, _ = pair(Case("lstm"))
    h = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 3, 6)
    check(outputs(ours, ours(x, (h, h))), outputs(theirs, theirs(x, (h, h))))
    check(outputs(ours, ours(x.expand_as(x), [h, h])), outputs(theirs, theirs(x, [h, h])))


# What goes to torch's own implementation gives torch's own results, to the bit


def _traced(module, x, hx):
    return torch.jit.trace(module, (x,) if hx is None else (x, hx))(x + 1, *([] if hx is None else [hx]))


class Tagged(torch.Tensor):
    pass


def _tensor_subclass(module, x, hx):
    return module(x.as_subclass(Tagged), hx)


def _no_batch(module, x, hx):
    return module(x[:, :0])


ELSEWHERE = [_traced, _tensor_subclass, _no_batch]


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("use", ELSEWHERE)
@pytest.mark.parametrize("cell", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
@pytest.mark.filterwarnings("ignore")
def test_same_as_torch_where_the_engine_does_not_go(cell, use, states):
    ours, theirs, x, hx = pair(Case(cell, num_layers=2, states=states, dtype=torch.float32))
    try:
        expected = use(theirs, x, hx)
    except Exception as error:
        with pytest.raises(type(error)):
            use(ours, x, hx)
    else:
        assert same(use(ours, x, hx), expected)


@pytest.mark.parametrize("use", [_traced, _tensor_subclass])
@pytest.mark.parametrize(("kind", "options"), CELL_KINDS)
@pytest.mark.filterwarnings("ignore")
def test_cell_same_as_torch_where_the_engine_does_not_go(kind, options, use):
    ours, theirs = cell_pair(kind, options, torch.float32)
    x, hx = cell_data(kind, 3, dtype=torch.float32)
    assert same(use(ours, x, hx), use(theirs, x, hx))


@pytest.mark.filterwarnings("ignore")
def test_compiled_cell_is_one_graph():
    torch._dynamo.reset()
    module, x = fastcells.nn.LSTMCell(3, 4), torch.randn(2, 3)
    assert relative_error(torch.compile(module, backend="eager", fullgraph=True)(x)[0], module(x)[0]) < 1e-6


def test_route_says_who_computes():
    ours, _, x, _ = pair(Case("gru"))
    assert ours._route(x) is None
    assert "batch size 0" in ours._route(x[:, :0])
    assert "float32" in ours._route(x.float())
    assert "features" in ours._route(x[..., :1])
    assert "subclass" in ours._route(x.as_subclass(Tagged))


@pytest.mark.parametrize(("kind", "options"), CELL_KINDS)
def test_cell_loop_is_the_layer(kind, options):
    cell, _ = cell_pair(kind, options)
    layer = getattr(fastcells.nn, kind.removesuffix("Cell"))(5, 7, dtype=torch.float64, **options)
    layer.load_state_dict({f"{n}_l0": p for n, p in cell.state_dict().items()})
    x, _ = cell_data(kind, 6, 3)
    hx, steps = None, []
    for t in range(6):
        hx = cell(x[t], hx)
        steps.append(hx[0] if isinstance(hx, tuple) else hx)
    assert relative_error(torch.stack(steps), layer(x)[0]) < 1e-9
