"""Lengths and resets against a loop that takes a sequence at a time, one step at a time, in the cell's torch form."""

import pytest
import torch
from helpers import cotangents, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import everything, invented, problem
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastcells import cells, explain, functional, nn, plan, replay, roof, unrolled
from fastcells.cpu import again, gradients, layer, team
from fastcells.cpu.backward import Backward
from fastcells.cpu.forward import Forward


def by_steps(cell, x, states, parameters, lengths=None, reset=None, reset_to=None, reverse=False):
    """What `functional.layer` is to compute, reset_to being states and return_cell_states true."""
    steps, size, _ = x.shape
    lengths = [steps] * size if lengths is None else lengths
    reset = torch.zeros(steps, size, dtype=torch.bool) if reset is None else reset
    outputs, finals = [], []
    for d, weights in enumerate(parameters):
        columns, last = [], []
        for n in range(size):
            initial, returned = ([s[d : d + 1, n : n + 1] for s in given] for given in (states, reset_to))
            padding = [x.new_zeros(1, 1, s.shape[-1]) for s in states]
            current, after = initial, [padding] * steps
            backward = d == 1 or reverse
            for t in reversed(range(lengths[n])) if backward else range(lengths[n]):
                if reset[t, n] if not backward else t + 1 < lengths[n] and reset[t + 1, n]:
                    current = returned
                _, current = unrolled.layer(cell, x[t : t + 1, n : n + 1], tuple(current), [weights])
                after[t] = current
            columns.append([torch.cat(s) for s in zip(*after, strict=True)])
            last.append(current)
        outputs.append([torch.cat(s, 1) for s in zip(*columns, strict=True)])
        finals.append([torch.cat(s, 1) for s in zip(*last, strict=True)])
    y, *others = (torch.cat(s, -1) for s in zip(*outputs, strict=True))
    return y, tuple(torch.cat(s) for s in zip(*finals, strict=True)), tuple(others)


def keep_some(y, probability, training):
    """In place of dropout: whether a number is dropped depends on it alone, so that every layout drops the same."""
    return y * ((y.detach() * 1e3).frac().abs() > probability) / (1 - probability)


def module_by_steps(
    module, input, hx=None, lengths=None, reset=None, reset_to=None, reverse=False, return_cell_states=False
):
    """What a module of ours is to compute."""
    cell = module._cell()
    directions = 2 if module.bidirectional else 1
    batched = input.dim() == 3
    if not batched:
        input, lengths = input.unsqueeze(1), None if lengths is None else [lengths]
        reset = None if reset is None else reset.unsqueeze(1)
    elif module.batch_first:
        input, reset = input.transpose(0, 1), None if reset is None else reset.t()
    size = input.shape[1]
    leading = directions * module.num_layers, size

    def states(given):
        features = [module.proj_size or module.hidden_size] + [module.hidden_size] * (len(cell.states) - 1)
        if given is None or isinstance(given, int):
            return [input.new_zeros(*leading, f) for f in features]
        return [s.view(*leading, -1) for s in (given if isinstance(given, tuple) else (given,))]

    initial = states(hx)
    returned = initial if reset_to is None else states(reset_to)
    finals, y = [], input
    for k in range(module.num_layers):
        names = [f"_l{k}" + "_reverse" * d for d in range(directions)]
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        parameters = [
            (
                *(getattr(module, kind + name, None) for kind in kinds),
                tuple(getattr(module, o + name) for o in cell.own),
            )
            for name in names
        ]
        if k and module.dropout:
            y = keep_some(y, module.dropout, True)
        own = slice(k * directions, (k + 1) * directions)
        y, final, others = by_steps(
            cell, y, [s[own] for s in initial], parameters, lengths, reset, [s[own] for s in returned], reverse
        )
        finals.append(final)
    result = tuple(torch.cat(s) for s in zip(*finals, strict=True))
    y = [y, *others]
    if not batched:
        y, result = [t.squeeze(1) for t in y], tuple(s.squeeze(1) for s in result)
    elif module.batch_first:
        y = [t.transpose(0, 1) for t in y]
    result = result if len(result) > 1 else result[0]
    if not return_cell_states:
        return y[0], result
    return y[0], result, y[1] if len(y) == 2 else tuple(y[1:])


def leaves_of(module, input, **states):
    """Input, states and parameters by name."""
    named = {"input": input}
    for name, value in states.items():
        for j, s in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(s, torch.Tensor):
                named[f"{name}[{j}]"] = s
    return named | dict(module.named_parameters())


def outputs_and_gradients(function, named):
    """Outputs, and the gradients of all leaves for random cotangents on all outputs."""
    y, states, *others = (t if isinstance(t, tuple) else (t,) for t in function())
    outputs = {"output": y[0]} | {f"state {k}": t for k, t in enumerate(states)}
    outputs |= {f"state {k} of every step": t for k, t in enumerate(*others, start=1)} if others else {}
    weights = cotangents(outputs)
    reached = [n for n, t in outputs.items() if t.requires_grad]  # all but where no sequence has a step
    gradients = [None] * len(named)
    if reached:
        gradients = torch.autograd.grad(
            [outputs[n] for n in reached], list(named.values()), [weights[n] for n in reached], allow_unused=True
        )
    zeros = (torch.zeros_like(t) if g is None else g for t, g in zip(named.values(), gradients, strict=True))
    return outputs | {f"gradient of {n}": g for n, g in zip(named, zeros, strict=True)}


CELLS = [cells.gru_reset_before, cells.peephole_lstm, cells.layer_norm_lstm, cells.indrnn]
"""A product of a computed vector, parameters of the cell's own, sums over the units, no recurrent product."""


@st.composite
def calls(draw):
    """A module, and arguments for a call of it."""
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN", "Recurrent", "Recurrent"]))
    cell = [draw(st.sampled_from(CELLS))] * (kind == "Recurrent")
    dtype = draw(st.sampled_from([torch.float64, torch.float64, *[torch.float32] * (kind != "Recurrent")]))
    batched, steps, size = draw(st.sampled_from([True, True, False])), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = size if batched else 1
    layers = draw(st.integers(1, 2))
    options = {"bidirectional": draw(st.booleans()), "batch_first": draw(st.booleans()), "num_layers": layers}
    if layers > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.3]))
    if kind == "LSTM":
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    inputs, hidden = draw(st.integers(1, 3)), draw(st.integers(3, 9))
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 9)))
        module = getattr(nn, kind)(*cell, inputs, hidden, **options, dtype=dtype)
        count = len(module._cell().states)
        shape = ((size, steps) if options["batch_first"] else (steps, size)) if batched else (steps,)
        input = torch.randn(*shape, inputs, dtype=dtype, requires_grad=True)
        rows = (layers * (2 if options["bidirectional"] else 1), *((size,) if batched else ()))

        def states():
            sizes = [options.get("proj_size") or hidden] + [hidden] * (count - 1)
            made = tuple(torch.randn(*rows, s, dtype=dtype, requires_grad=True) for s in sizes)
            return made if len(made) > 1 else made[0]

        hx = states() if draw(st.booleans()) else None
        arguments: dict = {"reverse": not options["bidirectional"] and draw(st.booleans())}
        arguments["return_cell_states"] = count > 1 and draw(st.booleans())
        if draw(st.booleans()):
            lengths = draw(st.lists(st.integers(0, steps), min_size=size, max_size=size))
            arguments["lengths"] = lengths if batched else lengths[0]
        if draw(st.booleans()):
            arguments["reset"] = torch.rand(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))
            arguments["reset_to"] = draw(st.sampled_from([None, 0, "states"]))
            if arguments["reset_to"] == "states":
                arguments["reset_to"] = states()
    return module, input, hx, arguments


@settings(max_examples=160, deadline=None, derandomize=True)
@given(call=calls(), packing=st.booleans())
def test_options_cross(call, packing):
    module, input, hx, arguments = call
    named = leaves_of(module, input, hx=hx, reset_to=arguments.get("reset_to"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "dropout", keep_some)
        patch.setattr(plan, "PACKED_FLOPS", -1 if packing else plan.PACKED_FLOPS)
        ours = outputs_and_gradients(lambda: module(input, hx, **arguments), named)
        truth = outputs_and_gradients(lambda: module_by_steps(module, input, hx, **arguments), named)
    for name, value in truth.items():
        assert ours[name].shape == value.shape, name
        assert relative_error(ours[name], value) <= (1e-9 if input.dtype == torch.float64 else 1e-5), name


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("c", [cells.lstm, cells.gru_reset_before, invented], ids=lambda c: c.name)
def test_any_cell(c, directions):
    (_, x, states, parameters, _), leaves, names = problem(c, 5, 4, 3, 11, directions=directions)
    generator = torch.Generator().manual_seed(3)
    lengths, reset = [5, 0, 3, 5], torch.rand(5, 4, generator=generator) < 0.3
    to = tuple(torch.randn(s.shape, dtype=s.dtype, generator=generator).requires_grad_() for s in states)
    leaves, names = [*leaves, *to], [*names, *(f"{s} after a reset" for s in c.states)]
    arguments = {"lengths": lengths, "reset": reset, "reset_to": to}

    def all_of(function, **more):
        y, finals, others = function(c, x, states, parameters, **arguments, **more)
        return y, (*finals, *others)

    ours = everything(lambda: all_of(functional.layer, return_cell_states=True), (), leaves)
    truth = everything(lambda: all_of(by_steps), (), leaves)
    labels = ["y", *c.states, *(f"{s} of every step" for s in c.states[1:]), *(f"gradient of {n}" for n in names)]
    for name, a, b in zip(labels, *([*outputs, *grads] for outputs, grads in (ours, truth)), strict=True):
        assert relative_error(a, b) < 1e-11, name


@pytest.mark.parametrize("lengths", [None, [4, 4, 2, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("c", [cells.lstm, invented], ids=lambda c: c.name)
def test_cell_states_of_every_step(c, lengths):
    """With a cotangent on any subset of the results, with and without gradients, and differentiated again."""
    (c, x, states, parameters, sizes), leaves, names = problem(c, 4, 4, 3, 9, directions=2, lengths=lengths)
    arguments = c, x, states, parameters, sizes, ()

    def flat(y, finals, others):
        return [y, *finals, *others]

    ours = flat(*functional.layer(*arguments, return_cell_states=True))
    truth = flat(*unrolled.layer(*arguments, return_cell_states=True))
    with torch.no_grad():
        without = flat(*functional.layer(*arguments, return_cell_states=True))
    weights = [torch.randn_like(t) for t in truth]
    for a, b, w in zip(ours, truth, without, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert torch.equal(a, w)
    for used in ([len(truth) - 1], [0, len(truth) - 1], range(len(truth))):
        pairs = [
            torch.autograd.grad(
                [o[k] for k in used], leaves, [weights[k] for k in used], retain_graph=True, allow_unused=True
            )
            for o in (ours, truth)
        ]
        for name, a, b in zip(names, *pairs, strict=True):
            assert (a is None or not a.any()) if b is None else relative_error(a, b) < 1e-10, (list(used), name)
    second = [
        torch.autograd.grad(torch.autograd.grad(o[-1].square().sum(), x, create_graph=True)[0].square().sum(), x)[0]
        for o in (ours, truth)
    ]
    assert relative_error(*second) < 1e-9


@pytest.mark.parametrize("layout", ["packed", "autocast", "bfloat16"])
def test_cell_states_of_layers(layout):
    layer, x = nn.LSTM(3, 6, num_layers=2, bidirectional=True), torch.randn(5, 3, 3)
    _, (_, c), states = layer(x, lengths=[5, 3, 4], return_cell_states=True)
    assert states.shape == (5, 3, 12)
    assert torch.equal(states[[4, 2, 3], range(3), :6], c[2])  # the last step of the forward direction
    assert torch.equal(states[0, :, 6:], c[3])
    if layout == "packed":
        packed = pack_padded_sequence(x, [5, 3, 4], enforce_sorted=False)
        for arguments in ({}, {"reverse": True}):
            if arguments:
                layer = nn.LSTM(3, 6)
                _, _, states = layer(x, lengths=[5, 3, 4], return_cell_states=True, **arguments)
            ours, _, other = layer(packed, return_cell_states=True, **arguments)
            assert torch.equal(other.batch_sizes, ours.batch_sizes)
            assert torch.equal(pad_packed_sequence(other)[0], states)
    elif layout == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            _, _, other = layer(x, lengths=[5, 3, 4], return_cell_states=True)
        torch.testing.assert_close(other.float(), states, rtol=0, atol=3e-2)
    else:
        _, _, other = layer.bfloat16()(x.bfloat16(), lengths=[5, 3, 4], return_cell_states=True)
        torch.testing.assert_close(other.float(), states, rtol=0, atol=3e-2)
    with pytest.raises(ValueError, match="return_cell_states must be False: cell gru"):
        nn.GRU(3, 6)(x, return_cell_states=True)
    with pytest.raises(RuntimeError, match="input must have input_size = 3 features, got 2"):
        nn.LSTM(3, 6)(x[..., :2], return_cell_states=True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_lengths_are_what_torch_computes_from_a_packed_sequence(kind):
    """Dropout included: the same numbers are drawn for the same tokens."""
    ours, theirs = (
        getattr(m, kind)(3, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5).double()
        for m in (nn, torch.nn)
    )
    theirs.load_state_dict(ours.state_dict())
    lengths = [7, 5, 4, 1]  # pack_padded_sequence need not keep the order of sequences of the same length
    x = torch.randn(4, 7, 3, dtype=torch.float64)

    class Packing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = theirs

        def forward(self, x, hx=None):
            y, states = self.layer(pack_padded_sequence(x, lengths, batch_first=True), hx)
            return pad_packed_sequence(y, batch_first=True)[0], states

    def run(module, *arguments, **options):
        torch.manual_seed(4)
        y, states = module(*arguments, **options)
        return y, *(states if isinstance(states, tuple) else (states,))

    for a, b in zip(run(ours, x, lengths=torch.tensor(lengths)), run(Packing(), x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"batch_first": True}], ids=str)
def test_whole_sequences_cost_nothing(options):
    """All of the full length, no reset: the same bits as without."""
    layer = nn.LSTM(5, 9, **options)
    x = torch.randn(6, 6, 5)
    expected = layer(x)
    for arguments in (
        {"lengths": [6] * 6},
        {"reset": torch.zeros(6, 6, dtype=torch.bool)},
        {"lengths": torch.full((6,), 6), "reset": torch.zeros(6, 6, dtype=torch.bool), "reset_to": 0},
    ):
        y, states = layer(x, **arguments)
        assert torch.equal(y, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(states, expected[1], strict=True))


def test_time_follows_the_tokens(monkeypatch):
    """No step is computed for padding: neither in the loop nor in the products over time."""
    seen = []
    prepared = functional.cpu.prepared

    def spy(cell, x, states, parameters, sequences, *rest, **options):
        seen.append((tuple(x.shape), sequences.total))
        return prepared(cell, x, states, parameters, sequences, *rest, **options)

    monkeypatch.setattr(functional.cpu, "prepared", spy)
    layer = nn.GRU(3, 4, num_layers=3)
    layer(torch.randn(9, 4, 3), lengths=[2, 9, 0, 1])
    assert seen == [((9, 4, 3), 12), ((12, 4), 12), ((12, 4), 12)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("resets", [None, "none", "at the beginning"])
@pytest.mark.parametrize("order", ["longest first", "any", "no empty ones"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {"nonlinearity": "relu"}),
        ("GRU", {"num_layers": 2, "batch_first": True}),
        ("GRU", {"bidirectional": True, "num_layers": 3}),
        ("LSTM", {"batch_first": True}),
        ("LSTM", {"bidirectional": True}),
    ],
    ids=str,
)
def test_lengths_with_and_without_gradients(kind, options, given, order, resets, threads, monkeypatch):
    """In calls that are like those before; what no longer belongs to a sequence, which may be no number, is nowhere."""
    monkeypatch.setattr(plan, "THREAD_FLOPS", 0)
    monkeypatch.setattr(team, "processors", lambda: 3)
    layer = getattr(nn, kind)(3, 20, **options, dtype=torch.float64)
    rows, size = layer.num_layers * (2 if layer.bidirectional else 1), 10
    with roof.using_threads(threads):
        for k in range(4):
            steps = 8 + k % 3
            lengths = torch.randint(steps + 1, (size,))
            lengths[:3] = torch.tensor([1, 0, steps])
            lengths = lengths.clamp(min=1) if order == "no empty ones" else lengths
            lengths = lengths.sort(descending=True).values if order == "longest first" else lengths
            x, hx = torch.randn(steps, size, 3, dtype=torch.float64), torch.randn(rows, size, 20, dtype=torch.float64)
            x[torch.arange(steps)[:, None] >= lengths] = float("nan")
            x = (x.transpose(0, 1).contiguous() if layer.batch_first else x).requires_grad_()
            arguments = {"hx": (hx, hx.flip(0)) if kind == "LSTM" else hx} if given else {}
            if resets is not None:
                arguments["reset"] = torch.zeros(x.shape[:2], dtype=torch.bool)
                first = arguments["reset"][:, 0] if layer.batch_first else arguments["reset"][0]
                first[:] = resets == "at the beginning"
                arguments["reset_to"] = 0
            leaves = [x, *layer.parameters()]
            y, last = layer(x, lengths=lengths, **arguments)
            outputs = [y, *(last if isinstance(last, tuple) else (last,))]
            cotangents = [torch.randn_like(t) for t in outputs]
            grads = torch.autograd.grad(outputs, leaves, cotangents)
            with torch.no_grad():
                same, state = layer(x, lengths=lengths, **arguments)
            torch.testing.assert_close((same, state), (y, last), rtol=0, atol=1e-12)
        truth, end = module_by_steps(layer, x, lengths=lengths.tolist(), **arguments)
        outputs = [truth, *(end if isinstance(end, tuple) else (end,))]
        torch.testing.assert_close((y, last), (truth, end), rtol=0, atol=1e-11)
        torch.testing.assert_close(grads, torch.autograd.grad(outputs, leaves, cotangents), rtol=0, atol=1e-9)
    assert bool(layer._replays.within) == (resets is None and again.interface() is not None)


@pytest.mark.parametrize("to", ["zeros", "the initial states"])
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("learned", [False, True], ids=["", "learned states"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("RNN", {}),
        ("GRU", {"num_layers": 2, "batch_first": True}),
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("LSTM", {"bias": False}),
    ],
    ids=str,
)
def test_resets_again_and_again(kind, options, learned, cut, to):
    """In calls like those before, with and without gradients, whatever is marked."""
    layer = getattr(nn, kind)(3, 20, **options, dtype=torch.float64)
    rows, size, steps, again_ = layer.num_layers * (2 if layer.bidirectional else 1), 6, 9, 0
    for k in range(8):
        x = torch.randn(steps, size, 3, dtype=torch.float64)
        x = (x.transpose(0, 1).contiguous() if layer.batch_first else x).requires_grad_()
        hx = [torch.randn(rows, size, 20, dtype=torch.float64, requires_grad=learned) for _ in layer._cell().states]
        reset = torch.rand(steps, size) < 0.3
        reset[1, 0] = True  # of a whole sequence: there is something to do
        reset = reset.T if layer.batch_first else reset
        arguments = {"hx": tuple(hx) if len(hx) > 1 else hx[0], "reset": reset}
        if cut and k % 2:
            arguments["lengths"] = [steps, *torch.randint(steps + 1, (size - 1,)).tolist()]
        if to == "zeros":
            arguments["reset_to"] = 0
        again_ += any(isinstance(f.args[-1], replay.InLoop) for f in layer._replays.within)
        leaves = [x, *layer.parameters(), *(hx if learned else ())]
        y, last = layer(x, **arguments)
        outputs = [y, *(last if isinstance(last, tuple) else (last,))]
        cotangents = [torch.randn_like(t) for t in outputs]
        grads = torch.autograd.grad(outputs, leaves, cotangents)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, **arguments), (y, last), rtol=0, atol=1e-12)
        truth, end = module_by_steps(layer, x, **arguments)
        outputs = [truth, *(end if isinstance(end, tuple) else (end,))]
        torch.testing.assert_close((y, last), (truth, end), rtol=0, atol=1e-11)
        torch.testing.assert_close(grads, torch.autograd.grad(outputs, leaves, cotangents), rtol=0, atol=1e-9)
    assert again_ == 6 * (again.interface() is not None), "from the third call on there is one to be made again"
    with pytest.raises(ValueError, match="reset must have shape"):
        layer(x, **(arguments | {"reset": arguments["reset"][:2]}))
    with pytest.raises(TypeError, match="reset must be a bool Tensor"):
        layer(x, **(arguments | {"reset": arguments["reset"].int()}))
    with pytest.raises(ValueError, match="lengths must be between 0 and 9"):
        layer(x, **(arguments | {"lengths": [10] * size}))


def test_lengths_that_change_between_calls():
    """Wrong ones meet the errors that they met before; other layouts, sizes and weights are seen."""
    layer, x = nn.GRU(3, 8, dtype=torch.float64), torch.randn(9, 4, 3, dtype=torch.float64)
    right, wrong = torch.tensor([2, 9, 0, 1]), ([2, 10, 0, 1], [2, 9, 0], [2.0, 9, 0, 1], [2, -9, 0, 1])

    def errors():
        for lengths in wrong:
            with pytest.raises((TypeError, ValueError)) as error:
                layer(x, lengths=lengths)
            yield str(error.value)

    def check(x, lengths):
        y, last = layer(x, lengths=lengths)
        torch.testing.assert_close((y, last), module_by_steps(layer, x, lengths=list(map(int, lengths))))

    with torch.no_grad():
        before = [*errors()]
        for _ in range(3):
            check(x, right)
        assert [*errors()] == before
        check(x.transpose(0, 1).contiguous().transpose(0, 1), right)  # not contiguous
        check(torch.randn(9, 8, 3, dtype=torch.float64)[:, ::2], right)
        check(torch.randn(5, 6, 3, dtype=torch.float64), [5, 0, 0, 1, 4, 4])
        check(x, [0] * 4)
        check(x, [9] * 4)
        layer.weight_hh_l0.mul_(0.5)
        check(x, right)
        layer.weight_hh_l0 = torch.nn.Parameter(torch.randn(24, 8, dtype=torch.float64))
        check(x, right)
        assert [*errors()] == before


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradcheck(kind):
    layer = getattr(nn, kind)(2, 3, bidirectional=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in layer._cell().states)
    reset = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.bool)

    def call(x, *hx):
        y, states = layer(x, hx if len(hx) > 1 else hx[0], lengths=[3, 2], reset=reset)
        return y, *(states if isinstance(states, tuple) else (states,))

    assert torch.autograd.gradcheck(call, (x, *hx))
    assert torch.autograd.gradgradcheck(call, (x, *hx))


def test_where_no_sequence_has_a_step_gradients_are_zero():
    layer, x = nn.LSTM(3, 4).requires_grad_(False), torch.randn(5, 2, 3, requires_grad=True)
    y, (h, c) = layer(x, lengths=[0, 0])
    (y.sum() + h.sum() + c.sum()).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_truncated_backpropagation_through_resets():
    """A sequence taken in parts, the state carried and detached, gives what it gives as a whole."""
    layer = nn.LSTM(3, 8)
    x, reset = torch.randn(12, 5, 3), torch.rand(12, 5) < 0.2
    whole, last = layer(x, reset=reset, reset_to=0)
    parts, carry = [], None
    for k in range(0, 12, 4):
        y, carry = layer(x[k : k + 4], carry, reset=reset[k : k + 4], reset_to=0)
        y.sum().backward()
        parts.append(y.detach())
        carry = tuple(s.detach() for s in carry)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(carry, last, rtol=0, atol=1e-6)


def test_streaming_by_single_steps():
    layer = nn.GRU(3, 8)
    x, reset, lengths = torch.randn(6, 5, 3), torch.rand(6, 5) < 0.3, torch.tensor([6, 2, 0, 5, 1])
    with torch.no_grad():
        whole, last = layer(x, lengths=lengths, reset=reset, reset_to=0)
        carry, steps = torch.zeros(1, 5, 8), []
        for t in range(6):
            y, carry = layer(x[t : t + 1], carry, lengths=(lengths > t).long(), reset=reset[t : t + 1], reset_to=0)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(carry, last, rtol=0, atol=1e-6)


def test_a_learnable_initial_state_is_what_a_reset_leads_to():
    layer = nn.GRU(3, 8)
    first = torch.nn.Parameter(torch.randn(1, 1, 8))
    x, reset = torch.randn(6, 5, 3), torch.zeros(6, 5, dtype=torch.bool)
    reset[3] = True
    y, _ = layer(x, first.expand(1, 5, 8), reset=reset)
    halves = torch.cat([layer(part, first.expand(1, 5, 8))[0] for part in (x[:3], x[3:])])
    torch.testing.assert_close(y, halves)
    (got,), (expected,) = (torch.autograd.grad(out.square().sum(), first) for out in (y, halves))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("where", ["autocast", "bfloat16", "torch.nn's"])
def test_what_the_engine_does_not_take(where):
    """Runs torch's own layers, with the same lengths and resets."""
    layer = nn.LSTM(3, 8, bidirectional=True)
    x, lengths, reset = torch.randn(6, 5, 3), [6, 2, 0, 5, 1], torch.rand(6, 5) < 0.3
    expected, _ = layer(x, lengths=lengths, reset=reset)
    if where == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = layer(x, lengths=lengths, reset=reset)
    elif where == "bfloat16":
        y, _ = layer.bfloat16()(x.bfloat16(), lengths=lengths, reset=reset)
    else:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                return function(*args, **(kwargs or {}))

        with Mode():
            y, _ = layer(x, lengths=lengths, reset=reset)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-6 if where == "torch.nn's" else 3e-2)


mask = torch.zeros(4, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths must be integers .*, got list of float64"),
        ({"lengths": torch.ones(3)}, TypeError, "lengths must be integers .*, got torch.float32"),
        ({"lengths": torch.ones(3, dtype=torch.bool)}, TypeError, "got torch.bool"),
        ({"lengths": [1, 2]}, ValueError, r"lengths must have shape \(3,\), one for each sequence, got \(2,\)"),
        ({"lengths": 2}, ValueError, r"lengths must have shape \(3,\)"),
        ({"lengths": [1, 5, 2]}, ValueError, "lengths must be between 0 and 4, the input's time steps, got 5"),
        ({"lengths": [1, -1, 2]}, ValueError, "got -1"),
        ({"reset": torch.zeros(4, 3)}, TypeError, "reset must be a bool Tensor, got a Tensor of torch.float32"),
        ({"reset": [True]}, TypeError, "reset must be a bool Tensor, got list"),
        ({"reset": mask.t()}, ValueError, r"reset must have shape \(4, 3\).*, got \(3, 4\)"),
        ({"reset_to": 0}, ValueError, "reset_to must be None without reset"),
        ({"reset": mask, "reset_to": 1}, TypeError, "reset_to must be None, 0 or states"),
        ({"reset": mask, "reset_to": torch.zeros(1, 3, 5)}, TypeError, "reset_to must be a tuple of 2 Tensors"),
        ({"reset": mask, "reset_to": (torch.zeros(1, 3, 5),) * 2}, RuntimeError, r"reset_to \(h_0\) must have shape"),
        ({"reset": mask, "hx": (torch.zeros(1, 2, 6),) * 2}, RuntimeError, r"hx \(h_0\) must have shape"),
    ],
)
def test_mistakes(arguments, error, words):
    with pytest.raises(error, match=words):
        nn.LSTM(2, 6)(torch.randn(4, 3, 2), **arguments)


def test_reverse_alone_is_the_second_direction():
    lengths = [2, 5, 3]
    both, alone = nn.GRU(3, 6, bidirectional=True).double(), nn.GRU(3, 6).double()
    alone.load_state_dict({n.removesuffix("_reverse"): w for n, w in both.state_dict().items() if "_reverse" in n})
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for input, arguments in ((x, {}), (x, {"lengths": lengths}), (packed, {})):
        (y, h), (expected, expected_h) = alone(input, reverse=True, **arguments), both(input, **arguments)
        if input is packed:
            y, expected = (pad_packed_sequence(t)[0] for t in (y, expected))
        torch.testing.assert_close(y, expected[..., 6:], rtol=0, atol=1e-12)
        torch.testing.assert_close(h, expected_h[1:], rtol=0, atol=1e-12)
    (c, x, states, parameters, sizes), _, _ = problem(cells.lstm, 3, 2, 3, 4, lengths=[3, 1], directions=2)
    y, finals = functional.layer(c, x, states, parameters, sizes)
    ours, ours_finals = functional.layer(c, x, tuple(s[1:] for s in states), parameters[1:], sizes, reverse=True)
    torch.testing.assert_close(ours, y[:, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours_finals, tuple(s[1:] for s in finals), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="reverse must be False"):
        both(x, reverse=True)
    with pytest.raises(ValueError, match="reverse must be False"):
        functional.layer(c, x, states, parameters, sizes, reverse=True)


def test_packed_sequences_have_lengths_of_their_own():
    packed = pack_padded_sequence(torch.randn(4, 3, 2), [4, 2, 1])
    with pytest.raises(ValueError, match="lengths and reset must be None with a PackedSequence"):
        nn.GRU(2, 6)(packed, lengths=[4, 2, 1])
    (c, x, states, parameters, sizes), _, _ = problem(cells.gru, 3, 2, 3, 4, lengths=[3, 1])
    with pytest.raises(ValueError, match="must be None with batch_sizes"):
        functional.layer(c, x, states, parameters, sizes, lengths=[3, 1])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_what_lies_past_an_end_is_never_read(kind, packing, monkeypatch):
    monkeypatch.setattr(plan, "PACKED_FLOPS", -1 if packing else plan.PACKED_FLOPS)
    layer = getattr(nn, kind)(3, 4, bidirectional=True)
    x, lengths = torch.randn(5, 3, 3), torch.tensor([5, 2, 0])
    other = torch.where(torch.arange(5)[:, None] < lengths, 0.0, float("nan"))[..., None] + x
    x, other = x.requires_grad_(), other.detach().requires_grad_()
    results = []
    reset = torch.zeros(5, 3, dtype=torch.bool)
    reset[2] = True
    for side in (x, other):
        y, states = layer(side, lengths=lengths, reset=reset)
        outputs = [y, *(states if isinstance(states, tuple) else (states,))]
        grads = torch.autograd.grad([t.square().sum() for t in outputs], [side, *layer.parameters()])
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_explain_counts_the_tokens(monkeypatch):
    layer, x = nn.LSTM(2, 6), torch.randn(9, 3, 2)
    assert "packed input, 9 steps, 3 sequences, 13 tokens" in str(explain(layer, x, lengths=[1, 9, 3]))
    assert "by the kernels of the call" in str(explain(layer, x, lengths=[1, 9, 3]))
    assert "by the kernels of the call" not in str(explain(layer, x, lengths=[9, 9, 9]))
    reset = torch.zeros(9, 3, dtype=torch.bool)
    assert "padded input, 9 steps, 3 sequences, 27 tokens" in str(explain(layer, x, reset=reset))
    reset[3] = True
    assert "resets inside the time loop: no packing" in str(explain(layer, x, reset=reset))
    monkeypatch.setattr(plan, "PACKED_FLOPS", -1)
    assert "packed input, 6 steps, 6 sequences, 27 tokens" in str(explain(layer, x, reset=reset))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {"bidirectional": True}), ("LSTM", {"proj_size": 5}), ("GRU", {"num_layers": 2}), ("RNN", {})],
    ids=str,
)
@pytest.mark.parametrize("turned", [0, 1 << 30], ids=["turned", "copied"])
def test_packed_batches_of_other_lengths_share_what_was_made_ready(
    kind, options, training, threads, turned, monkeypatch
):
    """Of as many sequences and about as many steps of all of them: told at each call, they give what torch.nn gives,
    also where gradients of weights are summed up some rows at a time, of which the last ones may not be there: turned,
    or what meets them copied."""
    for module, name, value in (
        (plan, "THREAD_FLOPS", 0),
        (gradients, "NEAR_BYTES", 0),
        (gradients, "STRETCH", 7),
        (gradients, "COPIED_STRETCH", 7),
        (gradients, "WIDE_BYTES", 0),
        (gradients, "TURNED_STRETCH", 7),
        (gradients, "TURNED_WIDTH", turned),
    ):
        monkeypatch.setattr(module, name, value)
    made = []
    for one in (Forward, Backward):
        original = one.__init__
        monkeypatch.setattr(one, "__init__", lambda *a, f=original, **o: (made.append(type(a[0])), f(*a, **o))[1])
    ours, theirs = (getattr(m, kind)(3, 13, **options, dtype=torch.float64) for m in (nn, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    counts = []
    with roof.using_threads(threads), torch.set_grad_enabled(training):
        layer.forget()
        for lengths in ([10, 9, 8, 6, 1], [9, 3, 9, 7, 8], [10, 2, 1, 10, 10], [7, 7, 7, 7, 6]):  # 33 to 36 in all
            batch = pack_padded_sequence(torch.randn(10, 5, 3).double(), lengths, enforce_sorted=False)
            found = []
            for module in (theirs, ours):
                x = batch.data.clone().requires_grad_(training)
                y, last = module(type(batch)(x, *batch[1:]))
                results = [y.data, *(last if isinstance(last, tuple) else (last,))]
                generator = torch.Generator().manual_seed(len(counts))
                given = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in results]
                leaves = [x, *module.parameters()]
                found.append(results + list(torch.autograd.grad(results, leaves, given) if training else ()))
            for theirs_is, ours_is in zip(*found, strict=True):
                torch.testing.assert_close(ours_is, theirs_is, rtol=1e-9, atol=1e-9)
            counts.append(len(made))
        layer.forget()
    assert counts[0] > 0
    assert counts == counts[:1] * 4


def test_lengths_of_no_sequences():
    layer, x = nn.GRU(3, 5), torch.zeros(4, 0, 3)
    assert layer(x, lengths=[])[0].shape == (4, 0, 5)
