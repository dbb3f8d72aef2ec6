"""`nn.Recurrent`, the layer of any cell: shipped cells against their own torch form, what the module promises."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import Loop, compare, loop, outputs, pairwise, same
from torch.nn.utils.rnn import pack_padded_sequence

import fastcells
from fastcells import Cell, activations, cell, cells, nn, variants
from fastcells.expression import sigmoid, tanh

ON_THE_PAGE = [c for c in vars(cells).values() if isinstance(c, Cell)]
VARIANTS = [
    variants.lstm("relu", "hard_sigmoid"),
    variants.gru("elu", "softsign", reset_after=False, clip=0.5),
    variants.rnn("leaky_relu"),
    variants.lstm(peepholes=True, coupled=True, clip=0.5),
    variants.antisymmetric_rnn(),
]
SHIPPED = ON_THE_PAGE + VARIANTS
DTYPES = (torch.float64, torch.float32)
T, N, I, H = 5, 3, 4, 9  # noqa: E741


def data(layer, layout="padded", states=True, steps=T, batch=N):
    """Input and hx, the same values for every dtype."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(layer.parameters()).dtype

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    leading = (layer.num_layers * (1 + layer.bidirectional), *([] if layout == "unbatched" else [batch]))
    hx = tuple(draw(*leading, H if k else layer.proj_size or H) for k in range(len(layer.cell.states)))
    hx = tuple(h.abs() + 1 if name == "n" else h for name, h in zip(layer.cell.states, hx, strict=True))  # a divisor
    hx = (hx if len(hx) > 1 else hx[0]) if states else None
    if layout == "unbatched":
        return draw(steps, I), hx
    x = draw(batch, steps, I) if layer.batch_first else draw(steps, batch, I)
    if layout == "packed":
        lengths = [1 + 3 * n % steps for n in range(batch)]
        x = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    return x, hx


def make(cell, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return nn.Recurrent(cell, I, H, **options, dtype=dtype)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from a team, and torch's own stalls where test processes share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Values and gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", SHIPPED, ids=lambda c: c.name)
def test_every_cell_against_its_torch_form(cell, dtype):
    layer = make(cell, dtype)
    compare(layer, loop(layer), *data(layer))


OPTIONS = pairwise(
    cell=SHIPPED,
    num_layers=(1, 2),
    bidirectional=(False, True),
    batch_first=(False, True),
    bias=(True, False),
    layout=("padded", "unbatched", "packed"),
    states=(False, True),
)


@pytest.mark.parametrize("row", OPTIONS, ids=lambda row: " ".join(str(getattr(v, "name", v)) for v in row.values()))
def test_every_cell_with_every_option(row):
    row = dict(row)
    layout, states = row.pop("layout"), row.pop("states")
    layer = make(**row)
    compare(layer, loop(layer), *data(layer, layout, states))


@pytest.mark.parametrize("cell", SHIPPED, ids=lambda c: c.name)
def test_gradcheck(cell):
    torch.manual_seed(0)
    layer = nn.Recurrent(cell, 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    hx = tuple(torch.rand(2, 2, 3, dtype=torch.float64) + 0.5 for _ in cell.states)
    names = list(dict(layer.named_parameters()))

    def run(x, *rest):
        states, weights = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        result = torch.func.functional_call(layer, weights, (x, states if len(states) > 1 else states[0]))
        return tuple(outputs(layer, result).values())

    inputs = [t.detach().requires_grad_() for t in (x, *hx, *layer.parameters())]
    assert layer._route(x) is None
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


@pytest.mark.parametrize(
    ("cell", "theirs", "options"),
    [
        (cells.lstm, torch.nn.LSTM, {}),
        (cells.lstm, torch.nn.LSTM, {"proj_size": 4}),
        (cells.gru, torch.nn.GRU, {}),
        (cells.rnn_tanh, torch.nn.RNN, {}),
        (cells.rnn_relu, torch.nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_torchs_cells_are_torchs_layers(cell, theirs, options):
    """Same parameters from the same seed, same results, same dropout between the layers."""
    shared = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "dtype": torch.float64}
    torch.manual_seed(0)
    theirs = theirs(I, H, **shared, **options)
    options.pop("nonlinearity", None)
    ours = make(cell, **shared, **options)
    assert {n: p.tolist() for n, p in ours.named_parameters()} == {n: p.tolist() for n, p in theirs.named_parameters()}
    compare(ours, theirs, *data(ours))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("cell", "rates"),
    [
        (cells.lstm, {"recurrent_dropout": 0.3}),
        (cells.lstm, {"recurrent_dropout": 0.3, "zoneout": (0.1, 0.5), "weight_dropout": 0.5}),
        (cells.gru_reset_before, {"recurrent_dropout": 0.3, "zoneout": 0.2}),
        (cells.peephole_lstm, {"zoneout": (0.0, 0.5)}),
    ],
)
def test_regularised_cells_against_their_torch_form(cell, rates, layout):
    """The same draws from the same seed, and every gradient through them."""
    layer = make(cell, num_layers=2, bidirectional=True, **rates)
    compare(layer, loop(layer), *data(layer, layout))


ALL_RATES = {"recurrent_dropout": 0.4, "zoneout": 0.3, "weight_dropout": 0.2}


def test_regularisation_is_off_in_eval():
    layer, plain = make(cells.gru, **ALL_RATES), make(cells.gru)
    x, hx = data(layer)
    assert same(layer.eval()(x, hx), plain(x, hx))
    assert repr(layer) == "Recurrent(gru, 4, 9, recurrent_dropout=0.4, weight_dropout=0.2, zoneout=(0.3,))"


@pytest.mark.parametrize("rate", ALL_RATES.items(), ids=str)
def test_regularisation_is_seeded_by_torch(rate):
    layer = make(cells.gru, **dict([rate]))
    x, hx = data(layer)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(x, hx))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


TORCHS_KINDS = {
    "LSTM": (cells.lstm, {"recurrent_dropout": 0.3, "zoneout": (0.1, 0.5), "weight_dropout": 0.5}),
    "GRU": (cells.gru, ALL_RATES),
    "RNN": (cells.rnn_tanh, {"weight_dropout": 0.5}),
}


@pytest.mark.parametrize("kind", TORCHS_KINDS)
def test_torchs_layers_drop_as_the_layer_of_their_cell_does(kind, monkeypatch):
    cell, rates = TORCHS_KINDS[kind]
    general = make(cell, num_layers=2, bidirectional=True, **rates)
    layer = getattr(nn, kind)(I, H, 2, bidirectional=True, dtype=torch.float64, **rates)
    layer.load_state_dict(general.state_dict())
    assert repr(layer) == repr(general).replace("Recurrent", kind).replace(f"{cell.name}, ", "")
    x, hx = data(general)
    results = []
    for module in (general, layer, pickle.loads(pickle.dumps(layer)), torch.compile(layer, backend="eager")):
        torch.manual_seed(5)
        results.append(module(x, hx))
    assert all(same(other, results[0]) for other in results[1:])
    monkeypatch.setattr(nn.DropIn, "_read", Loop._read)  # the engine refuses: the cell's torch form drops the same
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x, hx), results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TORCHS_KINDS)
def test_torchs_layers_drop_nothing_in_eval(kind):
    cell, rates = TORCHS_KINDS[kind]
    layer, plain = (getattr(m, kind)(I, H, dtype=torch.float64, **r) for m, r in ((nn, rates), (torch.nn, {})))
    plain.load_state_dict(layer.state_dict())
    x, hx = data(make(cell))
    for _ in range(3):  # the third call without gradients would be made like the one before
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x, hx), plain(x, hx), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert not same(layer.train()(x, hx), layer(x, hx))


@pytest.mark.parametrize("kind", TORCHS_KINDS)
def test_convert_and_revert_keep_what_is_dropped(kind):
    model = torch.nn.Sequential(getattr(nn, kind)(I, H, weight_dropout=0.5), getattr(torch.nn, kind)(I, H))
    fastcells.convert(model)
    assert fastcells.revert(model).left == {"0": "torch.nn has no recurrent_dropout, zoneout or weight_dropout"}
    assert type(model[1]) is getattr(torch.nn, kind)
    assert repr(model[1]) == f"{kind}({I}, {H})"
    with pytest.raises(ValueError, match=r"recurrent_dropout must be a number in range \[0, 1\], got 1.5"):
        getattr(nn, kind)(I, H, recurrent_dropout=1.5)
    with pytest.raises(ValueError, match="must be 0 with a projection, got proj_size 3"):
        nn.LSTM(I, H, proj_size=3, zoneout=0.1)


@cell(gates="h")
def additive(x, u, s):
    return x.h + u.h


def carrying(units, **rates):
    """A layer that hands on its state, so that what is dropped can be counted."""
    layer = nn.Recurrent(additive, 1, units, bias=False, **rates)
    torch.nn.init.zeros_(layer.weight_ih_l0)
    torch.nn.init.eye_(layer.weight_hh_l0)
    return layer


def within(share, rate, count):
    """The share of a draw of so many is as near to the rate as in all but one of a million."""
    assert abs(share - rate) < 5 * (rate * (1 - rate) / count) ** 0.5


def test_recurrent_dropout_drops_the_same_units_of_a_sequence_at_all_steps():
    torch.manual_seed(0)
    layer = carrying(64, recurrent_dropout=0.25)
    y, _ = layer(torch.zeros(3, 50, 1), torch.ones(1, 50, 64))
    kept = y[0] != 0
    within(kept.float().mean().item(), 0.75, kept.numel())
    for t in range(3):
        torch.testing.assert_close(y[t], kept / 0.75 ** (t + 1))
    assert not torch.equal(kept[0], kept[1])


def test_zoneout_keeps_units_of_the_step_before():
    torch.manual_seed(0)
    layer = nn.Recurrent(cells.lstm, 5, 64, zoneout=(0.1, 0.4))
    x = torch.randn(40, 10, 5)
    y, _ = layer(x)
    kept = y[1:] == y[:-1]
    within(kept.float().mean().item(), 0.1, kept.numel())
    assert len({tuple(step.flatten().tolist()) for step in kept}) == len(kept)
    states = [torch.zeros(2, 1, 10, 64)]
    for t in range(10):
        states.append(torch.stack(layer(x[t : t + 1], tuple(states[-1]))[1]))
    for name, rate in enumerate((0.1, 0.4)):
        c = torch.stack([s[name] for s in states[1:]])
        within((c[1:] == c[:-1]).float().mean().item(), rate, c[1:].numel())


def test_weight_dropout_drops_the_same_weights_of_all_sequences():
    torch.manual_seed(0)
    layer = carrying(2000, weight_dropout=0.25)
    y, _ = layer(torch.zeros(2, 3, 1), torch.ones(1, 3, 2000))
    kept = y[0, 0] != 0
    within(kept.float().mean().item(), 0.75, kept.numel())
    torch.testing.assert_close(y, torch.stack([kept / 0.75, kept / 0.75**2]).unsqueeze(1).expand_as(y))


@pytest.mark.parametrize("cell", [cells.layer_norm_lstm, cells.layer_norm_gru], ids=lambda c: c.name)
def test_layer_norm_against_torchs(cell):
    """As the paper has it, by torch.nn.functional.layer_norm."""
    layer = make(cell, bias=False)
    for weight in layer.parameters():
        torch.nn.init.uniform_(weight, -1, 1)
    x, hx = data(layer)
    w = {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters()}

    def norm(v, gates, kind):
        gain = torch.cat([w[f"{kind}_gain_{g}"] for g in gates])
        return torch.nn.functional.layer_norm(v, v.shape[-1:], gain)

    def offsets(gates):
        return torch.cat([w[f"offset_{g}"] for g in gates])

    h, *c = (state[0] for state in (hx if isinstance(hx, tuple) else (hx,)))
    for t in range(T):
        a, b = x[t] @ w["weight_ih"].T, h @ w["weight_hh"].T
        if c:
            both = norm(a, "ifgo", "input") + norm(b, "ifgo", "recurrent") + offsets("ifgo")
            i, f, g, o = both.chunk(4, -1)
            c = [f.sigmoid() * c[0] + i.sigmoid() * g.tanh()]
            out = torch.nn.functional.layer_norm(c[0], (H,), w["cell_gain"], w["cell_offset"])
            h = o.sigmoid() * out.tanh()
        else:
            both = norm(a[:, : 2 * H], "rz", "input") + norm(b[:, : 2 * H], "rz", "recurrent") + offsets("rz")
            r, z = both.sigmoid().chunk(2, -1)
            proposed = norm(b[:, 2 * H :], "n", "recurrent") + w["recurrent_offset_n"]
            n = (norm(a[:, 2 * H :], "n", "input") + w["input_offset_n"] + r * proposed).tanh()
            h = (1 - z) * n + z * h
        torch.testing.assert_close(layer(x, hx)[0][t].detach(), h, rtol=1e-9, atol=1e-9)


# As the papers write them. x: W x + b by gate; u: the product U v + b' of any vector; p: parameters of the cell's own.
def peephole_lstm(x, u, p, h, c):
    i, f = (torch.sigmoid(x[g] + u(g, h) + p[f"peephole_{g}"] * c) for g in "if")
    new = f * c + i * torch.tanh(x["g"] + u("g", h))
    return torch.sigmoid(x["o"] + u("o", h) + p["peephole_o"] * new) * torch.tanh(new), new


def coupled_lstm(x, u, p, h, c):
    i, o = (torch.sigmoid(x[g] + u(g, h)) for g in "io")
    new = (1 - i) * c + i * torch.tanh(x["g"] + u("g", h))
    return o * torch.tanh(new), new


def mgu(x, u, p, h):
    f = torch.sigmoid(x["f"] + u("f", h))
    return ((1 - f) * h + f * torch.tanh(x["n"] + u("n", f * h)),)


def ligru(x, u, p, h):
    z = torch.sigmoid(x["z"] + u("z", h))
    return (z * h + (1 - z) * torch.relu(x["n"] + u("n", h)),)


def janet(x, u, p, h):
    s = x["f"] + u("f", h)
    return (torch.sigmoid(s) * h + (1 - torch.sigmoid(s - 1)) * torch.tanh(x["g"] + u("g", h)),)


def ugrnn(x, u, p, h):
    g = torch.sigmoid(x["g"] + u("g", h))
    return (g * h + (1 - g) * torch.tanh(x["c"] + u("c", h)),)


def minimal_rnn(x, u, p, h):
    z = torch.tanh(x["z"])
    gate = torch.sigmoid(u("u", h) + u("z", z))
    return (gate * h + (1 - gate) * z,)


def indrnn(x, u, p, h):
    return (torch.relu(x["h"] + p["recurrent"] * h),)


def antisymmetric_rnn(x, u, p, h):
    return (h + 0.1 * torch.tanh(x["h"] + u("h", h) - 0.01 * h),)


def slstm(x, u, p, h, c, n, m):
    """Without the stabiliser, which changes nothing but the scale of c and n: exp(m)."""
    i, f = torch.exp(x["i"] + u("i", h)), torch.sigmoid(x["f"] + u("f", h))
    c, n = (i * v + f * state * torch.exp(m) for v, state in ((torch.tanh(x["z"] + u("z", h)), c), (1.0, n)))
    return torch.sigmoid(x["o"] + u("o", h)) * c / n, c, n, torch.zeros_like(m)


PAPERS = {cell: globals()[cell.name] for cell in [*ON_THE_PAGE, VARIANTS[-1]] if cell.name in globals()}


@pytest.mark.parametrize("cell", PAPERS, ids=lambda c: c.name)
def test_equations_are_the_papers(cell):
    layer = make(cell)
    x, hx = data(layer)
    w = {name.removesuffix("_l0"): p.detach() for name, p in layer.named_parameters()}
    matrices = {kind: w[kind] for kind in KINDS if kind in w}
    parts = {kind: dict(zip(cell.gates, v.chunk(len(cell.gates)), strict=True)) for kind, v in matrices.items()}
    recurrent = parts.get("weight_hh", {})
    if cell.name == "antisymmetric_rnn":
        recurrent = {g: m - m.T for g, m in recurrent.items()}

    def biased(kind, g, v):
        return v + parts[kind][g] if kind in parts else v

    def product(g, v):
        return biased("bias_hh", g, v @ recurrent[g].T)

    states = [s[0] for s in (hx if isinstance(hx, tuple) else (hx,))]
    y, finals = layer(x, hx)
    for t in range(T):
        inputs = {g: biased("bias_ih", g, x[t] @ m.T) for g, m in parts["weight_ih"].items()}
        states = PAPERS[cell](inputs, product, w, *states)
        torch.testing.assert_close(y[t].detach(), states[0], rtol=1e-9, atol=1e-9)
    if cell is not cells.slstm:
        for final, state in zip(finals if isinstance(finals, tuple) else (finals,), states, strict=True):
            torch.testing.assert_close(final[0].detach(), state, rtol=1e-9, atol=1e-9)


def test_every_cell_of_the_page_is_compared_with_something_else():
    """With torch's own, its paper's equations or, in other tests, torch's layer_norm and NumPy's reference."""
    elsewhere = {"lstm", "gru", "rnn_tanh", "rnn_relu", "gru_reset_before", "layer_norm_lstm", "layer_norm_gru"}
    assert {c.name for c in ON_THE_PAGE} == elsewhere | {c.name for c in PAPERS} - {"antisymmetric_rnn"}


# The module


def test_what_torch_promises_of_a_module(tmp_path):
    layer = make(cells.gru_reset_before, torch.float32, num_layers=2, bidirectional=True)
    x, hx = data(layer)
    expected = layer(x, hx)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.cell is layer.cell
        assert same(twin(x, hx), expected)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(5)
    other = nn.Recurrent(cells.gru_reset_before, I, H, 2, bidirectional=True)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert same(other(x, hx), expected)
    assert repr(layer) == "Recurrent(gru_reset_before, 4, 9, num_layers=2, bidirectional=True)"
    names = [f"{kind}_l{k}{d}" for k in (0, 1) for d in ("", "_reverse") for kind in KINDS]
    assert list(layer.state_dict()) == names


KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def test_calls_the_engine_does_not_take_run_the_cells_torch_form():
    layer = make(cells.gru_reset_before, num_layers=2, bidirectional=True)
    x, hx = data(layer)
    y, h = layer(x, hx)
    half = copy.deepcopy(layer).bfloat16()
    torch.testing.assert_close(half(x.bfloat16(), hx.bfloat16())[0].double(), y, rtol=0.1, atol=0.1)
    assert "torch.bfloat16" in str(fastcells.explain(half, x.bfloat16()))
    torch.testing.assert_close(
        torch.vmap(layer, in_dims=(2, None), out_dims=2)(x.unsqueeze(2), None)[0], layer(x)[0].unsqueeze(2)
    )
    empty, last = layer(x[:, :0], hx[:, :0])
    assert empty.shape == (T, 0, 2 * H)
    assert last.shape == (4, 0, H)
    meta = nn.Recurrent(cells.lstm, I, H, device="meta")
    assert meta.weight_ih_l0.is_meta
    y, (h, c) = meta(x.to("meta", torch.float32))
    assert (y.shape, h.shape, c.shape) == ((T, N, H), (1, N, H), (1, N, H))


def test_explain_convert_and_revert_know_it():
    layer = make(cells.gru_reset_before)
    assert fastcells.explain(layer, data(layer)[0]).route == "engine"
    assert fastcells.convert(layer).left == {"": "already fastcells.nn.Recurrent"}
    assert fastcells.revert(layer).left == {"": "torch.nn has no layer of any cell"}


WRONG = {
    "cell": (lambda: nn.Recurrent("lstm", I, H), TypeError, "cell must be a Cell, .* got str"),
    "hidden_size": (lambda: nn.Recurrent(cells.lstm, I, 0), ValueError, "hidden_size must be greater than zero"),
    "dropout": (lambda: nn.Recurrent(cells.lstm, I, H, dropout=2), ValueError, "dropout should be a number"),
    "zoneout": (lambda: nn.Recurrent(cells.gru, I, H, zoneout=(0.1, 0.2)), ValueError, "one for each of h, got"),
    "rate": (lambda: nn.Recurrent(cells.gru, I, H, weight_dropout=1.5), ValueError, "weight_dropout must be a number"),
    "projection": (
        lambda: nn.Recurrent(cells.gru, I, H, proj_size=2),
        ValueError,
        "proj_size must be 0 or hidden_size",
    ),
    "input kind": (lambda: call("x"), TypeError, "Recurrent: input must be a Tensor or a PackedSequence, got str"),
    "input rank": (lambda: call(torch.zeros(1, T, N, I)), ValueError, "must have 3 dimensions, .* shape"),
    "features": (lambda: call(torch.zeros(T, N, I + 1)), RuntimeError, "input_size = 4 features, got 5"),
    "no steps": (lambda: call(torch.zeros(0, N, I)), RuntimeError, "sequence length of at least 1, got 0"),
    "dtype": (lambda: call(torch.zeros(T, N, I).double()), RuntimeError, "weight_ih_l0 must have the dtype of input"),
    "one state": (lambda: call(torch.zeros(T, N, I), torch.zeros(1, N, H)), TypeError, r"tuple of 2 .*\(h_0, c_0\)"),
    "state": (
        lambda: call(torch.zeros(T, N, I), (torch.zeros(1, N, H), torch.zeros(1, N, I))),
        RuntimeError,
        r"hx \(c_0\) must have shape \(1, 3, 9\) to go with input, got \(1, 3, 4\)",
    ),
}


def call(*arguments):
    return nn.Recurrent(cells.lstm, I, H)(*arguments)


@pytest.mark.parametrize("what", WRONG)
def test_wrong_options_and_calls_name_what_is_wrong(what):
    function, error, words = WRONG[what]
    with pytest.raises(error, match=words):
        function()


# Cells of one's own


def scaled(names):
    """A cell with parameters of these names."""

    @cell(gates="a", parameters=" ".join(names))
    def step(x, u, s, p):
        h = tanh(x.a + u.a)
        for name in names:
            h = h * getattr(p, name)
        return h

    return step


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"])
def test_an_own_parameter_with_the_name_of_the_layers_is_refused(name):
    with pytest.raises(ValueError, match=f"may be named as the layer's, got {name}_l0"):
        make(scaled([name]), proj_size=2)


def test_any_other_name_is_free_for_an_own_parameter():
    """Also those of what lengths, resets, zoneout and dropout feed to the cell."""
    names = ["mark", "first_h", "from_h", "mask", "recurrent_mask", "zoneout_h"]
    x, hx = data(make(scaled("abcdef")))
    reset = torch.arange(T)[:, None] == torch.tensor([2, 0, 4])
    calls = [{}, {"lengths": [5, 2, 3]}, {"reset": reset, "reset_to": 0}, {"reset": reset, "lengths": [5, 2, 3]}]
    found = []
    for layer in (make(scaled(own), recurrent_dropout=0.3, zoneout=0.3) for own in ("abcdef", names)):
        torch.manual_seed(1)
        found.append([layer(x, hx, **call) for call in calls] + [layer.eval()(x, hx, **call) for call in calls])
    torch.testing.assert_close(*found, rtol=0, atol=0)


@cell(gates="f z")
def own(x, u, s):
    f = sigmoid(x.f + u.f)
    return s.h + f * (tanh(x.z + u.z(f * s.h)) - s.h)


def test_an_own_cell_pickles_by_name():
    layer = make(own)
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.cell is own
    assert same(twin(*data(twin)), layer(*data(layer)))


@pytest.mark.parametrize("made", VARIANTS, ids=lambda c: c.name)
def test_variants_are_the_same_cell_for_the_same_options_and_pickle(made):
    assert made not in ON_THE_PAGE
    assert pickle.loads(pickle.dumps(made)) is made
    make_again, options = made.made_by
    assert make_again(*options) is made


def test_zoneout_of_a_state_that_the_cell_gives_another_value():
    @cell(gates="a", states="h c")
    def assigned(x, u, s):
        s.c = 0.5 * s.c + tanh(x.a + u.a)
        return tanh(s.c), s.c

    layer, zeros = nn.Recurrent(assigned, 2, 3, zoneout=(0.0, 1.0)), torch.zeros(1, 2, 3)
    _, (_, c) = layer(torch.randn(4, 2, 2), (zeros, zeros))
    assert torch.equal(c, zeros)


@pytest.mark.parametrize("given", ["a", torch.tensor(0.1), (0.1, None)], ids=str)
def test_what_is_no_rate_is_said(given):
    with pytest.raises(ValueError, match="zoneout must be "):
        nn.LSTM(2, 3, zoneout=given)


def test_a_variant_of_a_function_that_changed_is_made_anew():
    scope = {"tanh": tanh, "gain": 1.0}
    exec("def act(v):\n    return gain * tanh(v)", scope)
    x = torch.randn(3, 1, 2)
    old = nn.Recurrent(variants.rnn(scope["act"]), 2, 3)
    y, _ = old(x)
    assert variants.rnn(scope["act"]) is old.cell
    scope["gain"] = 2.0
    with pytest.raises(RuntimeError, match=r"gain was 1\.0 when its kernels were derived, and is 2\.0 now"):
        old(x)
    new = nn.Recurrent(variants.rnn(scope["act"]), 2, 3)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new(x)[0][0], 2 * y[0])


def test_variants_without_options_are_the_cells_of_the_page():
    assert variants.lstm() is variants.lstm("tanh", recurrent_activation="sigmoid") is cells.lstm
    assert variants.lstm(peepholes=True) is cells.peephole_lstm
    assert variants.lstm(coupled=True) is cells.coupled_lstm
    assert variants.gru(reset_after=False) is cells.gru_reset_before
    assert variants.rnn(activations.KERAS["relu"]) is cells.rnn_relu
    with pytest.raises(ValueError, match=r"activation must be a function or one of .* got 'cosh'"):
        variants.rnn("cosh")
    with pytest.raises(ValueError, match="clip must be a positive number, got -1"):
        variants.gru(clip=-1)
    with pytest.raises(ValueError, match="clip must be a positive number, got 1"):
        variants.lstm(clip="1")
    with pytest.raises(TypeError, match=r"activation must be a name, a number or a function, got \['relu'\]"):
        variants.lstm(activation=["relu"])


def edited(body):
    """A cell as a notebook declares it anew: always the same name."""
    scope = {"cell": cell, "tanh": tanh, "__name__": "__main__"}
    exec(f"@cell(gates='h')\ndef mine(x, u, s):\n    return {body}", scope)
    return scope["mine"]


def test_an_edited_cell_is_never_served_stale():
    first = make(edited("tanh(x.h + u.h)"))
    second = make(edited("tanh(x.h + u.h) + s.h"))
    assert first.cell.name == second.cell.name
    for layer in (first, second, first):
        compare(layer, loop(layer), *data(layer))
    assert copy.deepcopy(first).cell is first.cell
    with pytest.raises(pickle.PicklingError, match=r"cell mine: .* by its name, but __main__\.mine is not"):
        pickle.dumps(first)


def test_cells_of_one_line_have_constants_of_their_own():
    one, two = (cell(gates="h")(lambda x, u, s, k=k: tanh(x.h + k * u.h)) for k in (1, 2))
    assert one.trace() != two.trace()
    assert one.key != two.key


def test_a_file_that_is_edited_between_two_processes(tmp_path):
    """Same name, same cache folder: the second process compiles the new equations."""
    script = tmp_path / "script.py"
    found = []
    for factor in (1.0, 3.0):
        script.write_text(
            textwrap.dedent(f"""
                import torch, fastcells

                @fastcells.cell(gates="h")
                def mine(x, u, s):
                    return {factor} * (x.h + u.h)

                layer = fastcells.nn.Recurrent(mine, 1, 1)
                torch.nn.init.ones_(layer.weight_ih_l0), torch.nn.init.zeros_(layer.weight_hh_l0)
                torch.nn.init.zeros_(layer.bias_ih_l0), torch.nn.init.zeros_(layer.bias_hh_l0)
                with torch.no_grad():
                    print(layer(torch.ones(1, 1, 1))[0].item())
            """)
        )
        environment = {**os.environ, "FASTCELLS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, env=environment)
        found.append(float(done.stdout))
    assert found == [1.0, 3.0]
    assert len(list((tmp_path / "cache").glob("mine_forward*"))) == 2


def test_a_cell_of_a_script_pickles_and_one_declared_anew_does_not(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
            import pickle, torch, fastcells

            def declare(power):
                @fastcells.cell(gates="h", name="mine")
                def mine(x, u, s):
                    return x.h + u.h ** power
                mine.function.__qualname__ = "mine"
                return mine

            mine = declare(1)
            layer = fastcells.nn.Recurrent(mine, 2, 3)
            assert pickle.loads(pickle.dumps(layer)).cell is mine
            mine = declare(2)
            try:
                pickle.dumps(layer)
            except pickle.PicklingError as error:
                print(error)
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert "__main__.mine is another object by now" in done.stdout
