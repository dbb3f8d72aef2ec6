"""The differentiable call on the engine against the cell's own torch form: cells, shape edges, layouts, options."""

import ctypes
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    BUILT_IN,
    NORMED,
    OWN,
    additive,
    agree,
    everything,
    independent,
    invented,
    minimal,
    normed,
    peephole,
    problem,
    regularised,
)

import fastcells
from fastcells import cell, cells, functional, plan, unrolled
from fastcells.cpu import call, frame, layer, loops, script, team
from fastcells.cpu.host import host
from fastcells.expression import (
    cos,
    erf,
    exp,
    expm1,
    log,
    mean,
    norm,
    sigmoid,
    sin,
    softplus,
    tanh,
    where,
)


@pytest.mark.parametrize("c", BUILT_IN, ids=lambda c: c.name)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": 2, "bias": False},
        {"given": False, "directions": 2},
        {"lengths": [6, 6, 4, 3, 1], "directions": 2},
        {"lengths": [3, 1], "given": False},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_outputs_and_gradients(c, options):
    agree(*problem(c, 6, 5, 4, 13, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (5, {}),
        (5, {"directions": 2, "bias": False}),
        (5, {"lengths": [5, 3, 3, *[1] * 14]}),
        (1, {}),
        (1, {"given": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("c", [cells.lstm, cells.gru, cells.rnn_tanh, normed, additive], ids=lambda c: c.name)
def test_few_columns_of_a_wide_input(c, steps, options, dtype):
    """Whose input projections are dot products, of a depth that is no whole vectors."""
    agree(*problem(c, steps, 17, 203, 3, dtype=dtype, **options), tolerance=1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("lengths", [None, [5, 4, 4, 1]])
@pytest.mark.parametrize("c", [invented, minimal], ids=lambda c: c.name)
def test_a_users_own_cell(c, lengths):
    agree(*problem(c, 5, 4, 3, 11, directions=2, lengths=lengths))


@pytest.mark.parametrize("options", [{}, {"lengths": [5, 4, 4, 1]}, {"given": False, "directions": 1}], ids=str)
@pytest.mark.parametrize("c", OWN, ids=lambda c: c.name)
def test_a_cells_own_parameters_and_inputs(c, options):
    agree(*problem(c, 5, 4, 3, 11, **{"directions": 2, **options}))


@pytest.mark.parametrize("c", OWN, ids=lambda c: c.name)
def test_a_cells_own_parameters_and_inputs_in_float32_where_inputs_need_no_gradient(c):
    arguments, leaves, names = problem(c, 9, 33, 3, 24, dtype=torch.float32)
    kept = [(t, n) for t, n in zip(leaves, names, strict=True) if n not in c.fed]
    for t, n in zip(leaves, names, strict=True):
        t.requires_grad_(n not in c.fed)
    agree(arguments, [t for t, _ in kept], [n for _, n in kept], tolerance=1e-4)


def test_a_cells_own_inputs_with_lengths_and_resets():
    """Each stretch between resets takes its sequence's inputs along: as one sequence after the other."""
    (c, x, states, parameters, _, fed), _, _ = problem(regularised, 7, 3, 4, 5, directions=2)
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[3, 1] = reset[2, 2] = True
    y, _ = functional.layer(c, x, states, parameters, inputs=fed, lengths=[4, 7, 5], reset=reset)
    pieces = {0: [(0, 4)], 1: [(0, 3), (3, 7)], 2: [(0, 2), (2, 5)]}
    for n, stretches in pieces.items():
        for begin, end in stretches:
            at = slice(n, n + 1)
            inputs = [t[:, at] if t.dim() == 3 else t[:, begin:end, at] for t in fed]
            part, _ = unrolled.layer(c, x[begin:end, at], [s[:, at] for s in states], parameters, None, inputs)
            torch.testing.assert_close(y[begin:end, at], part, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "hidden", "options"),
    [(3, 11, {"directions": 2}), (4, 16, {"lengths": [4, 4, 3, 1]}), (1, 5, {"given": False})],
    ids=str,
)
@pytest.mark.parametrize("c", NORMED, ids=lambda c: c.name)
def test_sums_over_the_units(c, rows, hidden, options):
    agree(*problem(c, 4, rows, 3, hidden, **options))


def test_no_weights_where_there_is_no_product():
    (c, x, states, [(w_ih, _, *rest)], *_), _, _ = problem(independent, 5, 4, 3, 11)
    arguments = (c, x, states, [(w_ih, None, *rest)], None)
    leaves = [x, *states, w_ih, *rest[3]]
    agree(arguments, leaves, ["x", "h_0", "weight_ih", "u"])
    with pytest.raises(TypeError, match="weight_hh must be a Tensor"):
        functional.layer(**_changed(weights={1: None}))


@cell(gates="r n", parameters="gain")
def scaled(x, u, s, p):
    """A GRU's proposal with the reset before the product, and a gain on its input, which waits for the product."""
    r = sigmoid(x.r + u.r)
    return tanh(p.gain * x.n + u.n(r * s.h))


@pytest.mark.parametrize(("rows", "steps"), [(2, 3), (5, 12), (16, 12)], ids=["in place", "ahead", "fused"])
def test_an_input_projection_that_a_later_stage_needs(rows, steps):
    agree(*problem(scaled, steps, rows, 3, 8))


@cell(gates="a b", states="h c", parameters="w")
def of_its_own(x, u, s, p):
    """A product of the cell's own tensors alone."""
    return tanh(x.a + u.a(p.w * p.w)), s.c + u.b(p.w) * x.b


@cell(gates="a", states="h c m")
def overwritten(x, u, s):
    """Whose gradient of m comes from the step after, and is needed by a pass that follows those that write it."""
    v = tanh(x.a)
    return v, u.a(norm(sigmoid(s.h))), v


@cell(gates="a", states="h c")
def read_late(x, u, s):
    """Whose last pass needs what c was before the first one."""
    return norm(x.a) * s.c + s.h * 0.5, tanh(x.a + s.c)


@cell(gates="a")
def of_signs(x, u, s):
    """A product of what has no gradient."""
    return tanh(x.a + u.a(where(s.h > 0.0, 1.0, -1.0)))


@cell(gates="a b", states="h c k w", parameters="p", scalars="q")
def same_for_many(x, u, s, p):
    """States that are the same for all units, or for all sequences, or both, and a product that nothing comes of."""
    tanh(u.b)
    return tanh(x.a + u.a) * s.c * s.k + s.w, mean(x.b), p.q * 2.0, p.p * p.p


@cell(gates="a")
def normed_product(x, u, s):
    """A projection that is multiplied, and read by passes after the one that keeps a copy of it."""
    return tanh(norm(x.a + u.a(x.a)))


@cell(gates="a", states="h c")
def read_again(x, u, s):
    """The same by another stage."""
    return tanh(s.h * mean(x.a)), tanh(u.a(x.a) + x.a)


@cell(gates="a b", states="h c d")
def handed_on(x, u, s):
    """A projection that is a state, and read by the stage after the one that makes it."""
    return tanh(x.a + u.a(x.b * s.h)), x.a, s.d + x.a


LATE = [of_its_own, overwritten, read_late, same_for_many, of_signs, normed_product, read_again, handed_on]


@pytest.mark.parametrize("options", [{}, {"given": False}, {"lengths": [5, 4, 4, 1]}, {"directions": 2}], ids=str)
@pytest.mark.parametrize("c", LATE, ids=lambda c: c.name)
def test_what_is_needed_late_or_made_of_little(c, options):
    agree(*problem(c, 5, 4, 3, 7, **options))


def test_second_derivatives_reach_a_cells_own_parameters():
    arguments, leaves, _ = problem(peephole, 3, 2, 2, 3)

    def loss(*leaves):
        y, _ = functional.layer(*arguments)
        return y.square().sum()

    first = torch.autograd.grad(loss(), leaves, create_graph=True)
    ours = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    y, _ = unrolled.layer(*arguments)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    truth = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


PROJECTED = [(cells.lstm, 7), (cells.lstm, 18), (cells.gru, 18), (cells.gru_reset_before, 18), (peephole, 18)]


@pytest.mark.parametrize("lengths", [None, [4, 2, 2]])
@pytest.mark.parametrize(("c", "size"), PROJECTED, ids=lambda v: getattr(v, "name", v))
def test_projection(c, size, lengths):
    agree(*problem(c, 4, 3, 5, 18, project=size, directions=2, lengths=lengths))


def test_a_projection_has_to_keep_the_size_that_a_cell_uses_its_hidden_state_with():
    arguments, _, _ = problem(cells.gru, 4, 3, 5, 18, project=7)
    with pytest.raises(ValueError, match="weight_hr must be of 18 rows, as cell gru does not only multiply"):
        functional.layer(*arguments)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.sampled_from(BUILT_IN),
    steps=st.integers(1, 5),
    rows=st.integers(1, 14),
    inputs=st.integers(1, 40),
    hidden=st.integers(1, 130),
    directions=st.integers(1, 2),
    given_states=st.booleans(),
)
def test_any_shape(which, steps, rows, inputs, hidden, directions, given_states):
    agree(*problem(which, steps, rows, inputs, hidden, directions=directions, given=given_states))


@pytest.mark.parametrize("given_states", [False, True])
@pytest.mark.parametrize("rows", [1, 31, 32, 40])
@pytest.mark.parametrize("c", BUILT_IN, ids=lambda c: c.name)
def test_a_single_step(c, rows, given_states):
    """Weights are read as they are for a few sequences, packed for more."""
    agree(*problem(c, 1, rows, 4, 13, directions=2, given=given_states))
    agree(*problem(c, 1, rows, 4, 13, given=given_states, lengths=[1] * rows))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("c", BUILT_IN, ids=lambda c: c.name)
def test_outputs_share_no_memory(c, steps):
    """y and the final states are tensors of their own, as torch's are: changing one does not change another."""
    arguments, _, _ = problem(c, steps, 2, 4, 5)
    y, finals = functional.layer(*arguments)
    before = [f.detach().clone() for f in finals]
    with torch.no_grad():
        y.zero_()
    for final, value in zip(finals, before, strict=True):
        assert torch.equal(final, value)


EDGES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 23, 24, 25, 31, 32, 33, 36, 63, 64, 65, 100, 127, 128, 129, 130]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", EDGES)
def test_hidden_sizes_around_the_edges_of_tiles(hidden, dtype):
    """A single row has tiles of its own; five rows are cut into tiles of three and two, or four and one."""
    for c, rows in ((cells.lstm, 1), (cells.gru, 5), (cells.rnn_tanh, 4)):
        agree(*problem(c, 2, rows, 3, hidden, dtype=dtype), tolerance=1e-11 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize(("rows", "hidden"), [(24, 200), (9, 400), (130, 40), (200, 7)])
def test_sizes_that_are_taken_in_blocks(rows, hidden):
    """Depth beyond a panel, rows beyond a block."""
    agree(*problem(cells.lstm, 3, rows, 30, hidden))
    agree(*problem(cells.gru, 2, rows, 300, hidden))


@pytest.mark.parametrize("c", [*BUILT_IN, peephole, normed], ids=lambda c: c.name)
def test_float32_is_as_exact_as_torchs_own_operations(c):
    arguments, leaves, names = problem(c, 20, 7, 30, 50, dtype=torch.float32)
    c, x, states, parameters, _ = arguments
    double = lambda t: t.detach().double().requires_grad_()  # noqa: E731
    doubles = {id(t): double(t) for t in leaves}
    pick = lambda t: tuple(map(pick, t)) if isinstance(t, tuple) else doubles.get(id(t))  # noqa: E731
    exact_arguments = (c, pick(x), tuple(map(pick, states)), [tuple(map(pick, p)) for p in parameters], None)
    exact = [t for part in everything(unrolled.layer, exact_arguments, [pick(t) for t in leaves]) for t in part]
    ours = [t for part in everything(functional.layer, arguments, leaves) for t in part]
    torchs = [t for part in everything(unrolled.layer, arguments, leaves) for t in part]
    labels = ["y", *(f"{s}_n" for s in c.states), *(f"gradient of {n}" for n in names)]
    for name, a, b, truth in zip(labels, ours, torchs, exact, strict=True):
        scale = truth.abs().max()
        error, reference = ((t.double() - truth).abs().max() / scale for t in (a, b))
        assert error <= 2 * reference + 4 * torch.finfo(torch.float32).eps, (
            f"{name}: {error:.1e}, torch {reference:.1e}"
        )


@pytest.mark.parametrize("c", BUILT_IN, ids=lambda c: c.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_reach_what_torch_lets_them_reach(c, value):
    arguments, _, _ = problem(c, 4, 7, 5, 19)
    _, x, states, parameters, _ = arguments
    with torch.no_grad():
        clean, _ = functional.layer(c, x, states, parameters)
        x[1, 3, 2] = value
        y, finals = functional.layer(c, x, states, parameters)
        expected, expected_finals = unrolled.layer(c, x, states, parameters)
    others = [n for n in range(7) if n != 3]
    assert torch.equal(y[:, others], clean[:, others])
    for a, b in zip((y, *finals), (expected, *expected_finals), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_saturated_gates_are_exact():
    """sigmoid and tanh at the ends of the range, through a cell that returns them."""
    ends = cell(gates="a b", name="ends")(_ends)
    for dtype in (torch.float32, torch.float64):
        v = torch.tensor([-1e4, -200.0, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 1e4], dtype=dtype)
        x = v.view(-1, 1, 1)
        weight = torch.tensor([[1.0], [0.0]], dtype=dtype)
        recurrent = torch.zeros(2, 1, dtype=dtype)
        y, _ = functional.layer(ends, x, None, [(weight, recurrent, None, None, None)])
        expected = torch.sigmoid(v.double()) + 4 * torch.tanh(v.double())
        torch.testing.assert_close(y.flatten().double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-37)


def _ends(x, u, s):
    return sigmoid(x.a) + 4.0 * tanh(x.a) + 0.0 * (x.b + u.b + u.a)


KERNEL_FUNCTIONS = {
    "exp": (exp, math.exp, (-80, 80)),
    "expm1": (expm1, math.expm1, (-5, 5)),
    "log": (log, math.log, (1e-3, 2)),
    "sin": (sin, math.sin, (-8000, 8000)),
    "cos": (cos, math.cos, (-10, 10)),
    "erf": (erf, math.erf, (-7, 7)),
    "softplus": (softplus, lambda v: max(v, 0.0) + math.log1p(math.exp(-abs(v))), (-60, 60)),
    "tanh": (tanh, math.tanh, (-4, 4)),
    "sigmoid": (sigmoid, lambda v: 1 / (1 + math.exp(-v)), (-30, 30)),
}


ODD = [0.0, -1.0, 1e-30, 1e-310, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_in_kernels(dtype):
    """Relative error of a few ulp; infinities and NaN as torch has them, and subnormal numbers as it has zeros."""
    names = list(KERNEL_FUNCTIONS)

    def every(x, u, s):
        return tuple(KERNEL_FUNCTIONS[n][0](getattr(x, n)) + 0.0 * u.exp for n in names)

    c = cell(gates=" ".join(names), states=" ".join(names), name="functions")(every)
    inputs = torch.stack([torch.linspace(*KERNEL_FUNCTIONS[n][2], 1000, dtype=dtype) for n in names], 1)
    odd = torch.tensor(ODD, dtype=dtype)
    inputs = torch.cat([inputs, odd[:, None].expand(-1, len(names))]).unsqueeze(0)
    weights = torch.eye(len(names), dtype=dtype), torch.zeros(len(names), 1, dtype=dtype)
    results = []
    for k in range(len(names)):  # at each feature its function, the others zero
        alone = torch.where(torch.arange(len(names)) == k, inputs, torch.zeros((), dtype=dtype))
        results.append(functional.layer(c, alone, None, [(*weights, None, None, None)])[1][k].flatten())
    flushed = torch.where(odd.abs() < torch.finfo(dtype).tiny, torch.zeros((), dtype=dtype), odd)
    odd = flushed if host().triple.startswith("x86_64") else odd
    for k, name in enumerate(names):
        function, exact, _ = KERNEL_FUNCTIONS[name]
        ours, v = results[k], inputs[0, :, k]
        truth = torch.tensor([exact(number) for number in v[:1000].tolist()], dtype=torch.float64)
        error = ((ours[:1000].double() - truth).abs() / truth.abs().clamp(min=1e-300)).max()
        assert error <= 10 * torch.finfo(dtype).eps, f"{name}: {error:.1e}"
        torch.testing.assert_close(ours[1000:], function(odd), equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    which=st.sampled_from([cells.lstm, additive, normed]),
    lengths=st.one_of(st.lists(st.integers(1, 4), min_size=1, max_size=40), st.integers(1, 3), st.integers(4, 33)),
    steps=st.integers(1, 3),
    inputs=st.integers(1, 70),
    hidden=st.one_of(st.integers(1, 130), st.integers(500, 520)),
    threads=st.sampled_from([1, 3]),
)
def test_agendas_have_the_room_that_they_take(which, lengths, steps, inputs, hidden, threads):
    """Kernels write them, as long as they get, into memory that was taken for them before."""
    rows, options = lengths, {}
    if isinstance(lengths, list):
        rows, options = len(lengths), {"lengths": sorted(lengths, reverse=True)}
    item, bytes_at, written = frame.ITEM_BYTES // 8, loops.BYTES, 0

    def look(launch, run):
        nonlocal written
        if launch.kernel.name.startswith(("entering", "leaving", "pack", "turn")):  # which have none
            run()
            return
        scratch, each, agenda = (launch.frame[frame.WORD[n]] for n in ("scratch", "scratch_thread", "agenda"))
        memory = (ctypes.c_int64 * (each * launch.threads // 8)).from_address(script.arena._words[0] + scratch.offset)
        words = np.frombuffer(memory, np.int64)
        words[:] = -1
        run()
        for of_thread in words.reshape(launch.threads, -1):
            for part in np.split(of_thread[: 2 * agenda // 8], 2):
                if part[0] >= 0:
                    at = item
                    while part[at] != loops.DONE:
                        at += part[at + bytes_at] // 8 if part[at] == loops.TALL_TILES else item
                    assert at + item <= part.size
                    written += 1

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(team, "processors", lambda: 3)
        patch.setattr(plan, "THREAD_FLOPS", 0)
        torch.set_num_threads(threads)
        plan.plan.cache_clear()
        patch.setattr(script, "observer", look)
        try:
            arguments, leaves, _ = problem(which, steps, rows, inputs, hidden, dtype=torch.float32, **options)
            everything(functional.layer, arguments, leaves)
        finally:
            torch.set_num_threads(before)
            plan.plan.cache_clear()
            layer.forget()
    assert written


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        ("guard_pages.py", {}),
        ("forked.py", {}),
        ("page_faults.py", {}),
        ("plain_processor.py", {"NUMBA_CPU_NAME": "generic"}),
        ("far_weights.py", {}),
        pytest.param(
            "far_weights.py",
            {"NUMBA_CPU_NAME": "znver5" if host().distant else "cascadelake"},
            marks=pytest.mark.skipif(host().vector_bytes != 64, reason="code with vectors of 64 bytes"),
        ),
        pytest.param(
            "half_vectors.py",
            {"NUMBA_CPU_NAME": "znver4"},
            marks=pytest.mark.skipif(host().vector_bytes != 64, reason="code with vectors of 64 bytes"),
        ),
    ],
)
def test_in_a_process_of_its_own(script, environment):
    """Buffers that end at an unreadable page; layers in forked workers after the parent ran one with a thread team;
    pages taken from the system; a processor without wide vectors or fused multiply-adds; weights that are asked for
    ahead, here and on a processor that does so in another way; one whose wide vectors pass in halves."""
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "scripts" / script)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "FASTCELLS_QUIET": "1", **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split()[-1] == "done"


def _changed(**changes):
    """Arguments of functional.layer with some replaced: by name, or `weights` for items of the first direction."""
    (c, x, states, parameters, _), _, _ = problem(cells.lstm, 3, 2, 4, 5)
    weights = list(parameters[0])
    for index, value in changes.pop("weights", {}).items():
        weights[index] = value
    arguments = {"cell": c, "x": x, "states": states, "parameters": [tuple(weights)], "batch_sizes": None}
    return arguments | changes


f64 = {"dtype": torch.float64}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"cell": "lstm"}, TypeError, "cell must be a Cell, got str"),
        ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
        ({"x": torch.ones(3, 4, **f64)}, ValueError, "x must be of shape"),
        ({"x": torch.ones(0, 2, 4, **f64)}, ValueError, "sizes of at least 1"),
        ({"x": torch.ones(3, 2, 7, **f64)}, ValueError, r"weight_ih must be of shape \[any, 7\], got \(20, 4\)"),
        ({"x": torch.ones(3, 2, 4)}, ValueError, "all tensors must be of x's dtype torch.float32"),
        ({"weights": {0: torch.ones(18, 4, **f64)}}, ValueError, "weight_ih must be of 4 gates' rows"),
        ({"weights": {1: torch.ones(20, 6, **f64)}}, ValueError, r"weight_hh must be of shape \[20, 5\]"),
        ({"weights": {2: None}}, ValueError, "both given or both None"),
        ({"weights": {3: torch.ones(19, **f64)}}, ValueError, r"bias_hh must be of shape \[20\]"),
        ({"weights": {4: torch.ones(3, 9, **f64)}}, ValueError, "weight_hh must be of shape"),
        ({"states": (torch.ones(1, 2, 5, **f64),)}, ValueError, "states must be one Tensor each"),
        ({"states": (torch.ones(1, 3, 5, **f64),) * 2}, ValueError, r"states\[0\] \(h\) must be of shape \[1, 2, 5\]"),
        ({"parameters": []}, ValueError, "parameters must be those of 1 or 2 directions, got 0"),
        ({"x": torch.ones(3, 4, **f64), "batch_sizes": torch.tensor([1, 2])}, ValueError, "never increasing"),
        ({"x": torch.ones(3, 4, **f64), "batch_sizes": torch.tensor([2, 1]).int()}, ValueError, "int64"),
        ({"x": torch.ones(3, 2, 4, dtype=torch.float16)}, RuntimeError, "x must be of dtype float32 or float64"),
        ({"reset_to": 0}, ValueError, "reset_to must be None without reset"),
    ],
)
def test_arguments_are_checked_before_any_kernel_runs(changes, error, words):
    with pytest.raises(error, match=words):
        functional.layer(**_changed(**changes))


def test_calls_that_are_used_most_stay_prepared(monkeypatch):
    """The least recently used one is forgotten."""
    layer.forget()
    monkeypatch.setattr(call, "KEPT_CALLS", 3)
    made = []
    for name in "abcadaeab":
        call.kept((name,), lambda name=name: made.append(name) or name)
    assert "".join(made) == "abcdeb"
    layer.forget()


def test_numbers_below_the_normal_range_are_flushed_in_kernels_alone():
    """Kernels take and give zeros for them; outside, torch on the same thread computes with them as before."""
    tiny = torch.finfo(torch.float32).tiny
    layer, x = fastcells.nn.RNN(4, 9, nonlinearity="relu", bias=False), torch.full((3, 2, 4), tiny / 64)
    with torch.no_grad():
        y, _ = layer(x)
    if host().triple.startswith("x86_64"):
        assert not y.any()
    assert (x[0, 0] * 0.5).tolist() == [tiny / 128] * 4
