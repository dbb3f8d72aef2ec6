"""Schedules: what is chosen, and that `explain` says what a call does."""

import re

import pytest
import torch

import fastcells
from fastcells.cpu import layer
from fastcells.plan import ROW_BLOCK, Shape, plan


def shape(**changes):
    sizes = {
        "steps": 100,
        "rows": 32,
        "inputs": 64,
        "hidden": 128,
        "depth": 128,
        "gates": 4,
        "item": 4,
        "threads": 2,
    } | changes
    return Shape(total=sizes["steps"] * sizes["rows"], **sizes)


def test_many_sequences_are_shared_without_a_barrier():
    chosen = plan(shape(rows=32))
    assert chosen.forward == (2, "rows")


def test_one_sequence_shares_its_units():
    chosen = plan(shape(rows=1, hidden=512, depth=512))
    assert chosen.forward == (2, "units")


def test_one_sequence_makes_input_projections_beside_its_recurrence_where_that_pays():
    one = {"rows": 1, "rides": True}
    assert plan(shape(**one)).beside
    for changes in (
        {"rows": 2},
        {"steps": 8},
        {"hidden": 16, "depth": 16},
        {"hidden": 512, "depth": 512},
        {"inputs": 8},
    ):
        assert not plan(shape(**one | changes)).beside
    assert not plan(shape(rows=1)).beside
    wide = {"steps": 32, "inputs": 4000, "hidden": 256, "depth": 256}
    assert plan(shape(**one | wide, training=True)).in_place, "dot products are not made beside"
    assert not plan(shape(**one | wide, training=True)).beside


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({"inputs": 512, "hidden": 24}, True),
        ({"inputs": 24, "hidden": 24}, False),  # too few for it to be worth storing
        ({"inputs": 512, "hidden": 24, "lanes": 8}, False),  # no units are missing
        ({"inputs": 512, "hidden": 30, "gates": 1}, False),  # nobody is beside it
        ({"inputs": 512, "hidden": 24, "steps": 1}, False),
    ],
)
def test_gates_of_few_units_meet_a_wide_input_side_by_side(changes, ahead):
    sizes = {"lanes": 16} | changes
    assert plan(shape(**sizes, depth=sizes["hidden"])).project_ahead == ahead


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({}, True),
        ({"distant": False}, False),
        ({"rows": 48}, False),  # as many for each weight as it takes to fetch it
        ({"hidden": 100, "depth": 100}, False),  # near, all of them
    ],
)
def test_weights_of_the_input_that_are_slow_to_come_are_not_fetched_at_each_step(changes, ahead):
    sizes = {"inputs": 600, "hidden": 600, "depth": 600, "gates": 1, "distant": True} | changes
    assert plan(shape(**sizes)).project_ahead == ahead


@pytest.mark.parametrize(
    ("changes", "dots"),
    [
        ({"inputs": 512, "hidden": 3}, True),
        ({"inputs": 512, "hidden": 3, "steps": 1}, True),
        ({"inputs": 512, "hidden": 4}, False),  # one vector of all gates' columns
        ({"inputs": 512, "hidden": 4, "gates": 1}, True),
        ({"inputs": 48, "hidden": 12, "gates": 1}, False),  # as long as folding takes
        ({"inputs": 4000, "hidden": 22, "gates": 1}, False),  # weights that are read again for every four rows
    ],
)
def test_few_columns_of_a_wide_input_are_dot_products(changes, dots):
    sizes = {"lanes": 16} | changes
    chosen = plan(shape(**sizes, depth=sizes["hidden"]))
    assert (chosen.dots, chosen.in_place) == (dots, False)
    assert chosen.project_ahead or not dots


@pytest.mark.parametrize(
    ("rows", "steps", "hidden", "inference", "training"),
    [
        (1, 1, 8, True, True),
        (4, 1, 256, True, True),
        (32, 1, 256, False, True),  # what is packed for training is packed at each call
        (64, 1, 64, False, False),  # so few weights are looked at in no time
        (1, 2, 512, True, True),
        (1, 100, 512, False, False),
        (2, 4, 512, True, True),
        (4, 8, 512, False, True),
    ],
)
def test_weights_are_read_as_they_are_where_packed_ones_do_not_pay(rows, steps, hidden, inference, training):
    sizes = {"rows": rows, "steps": steps, "inputs": hidden, "hidden": hidden, "depth": hidden}
    for trains, expected in ((False, inference), (True, training)):
        chosen = plan(shape(**sizes, training=trains))
        assert (chosen.in_place, chosen.project_ahead) == (expected, steps > 1 and rows < 12)
    assert not plan(shape(**sizes, apart=True)).in_place


@pytest.mark.parametrize("changes", [{"threads": 1}, {"rows": 1, "hidden": 8, "depth": 8, "inputs": 8}])
def test_little_work_stays_on_one_thread(changes):
    assert plan(shape(**changes)).forward.threads == 1


def test_rows_are_taken_in_even_blocks():
    chosen = plan(shape(rows=ROW_BLOCK + 4))
    assert chosen.row_block == (ROW_BLOCK + 4) // 2


def test_what_is_computed_does_not_depend_on_the_threads():
    for rows in (1, 3, 16, 200):
        one, two = (plan(shape(rows=rows, threads=n)) for n in (1, 2))
        assert (one.project_ahead, one.row_block) == (two.project_ahead, two.row_block)


def test_every_choice_has_a_reason():
    assert len(plan(shape()).reasons) == 2
    assert all(len(r.split()) > 4 for r in plan(shape()).reasons)


class OwnLoop(torch.nn.GRU):
    def forward(self, x):
        return x.cumsum(0)


def test_explain_names_the_engine_and_its_schedule():
    layer, x = fastcells.nn.LSTM(16, 32, num_layers=2, bidirectional=True), torch.randn(5, 3, 16)
    told = fastcells.explain(layer, x)
    assert told.route == "engine"
    assert "cell lstm" in str(told)
    assert "a gradient is wanted" in str(told)
    with torch.no_grad():
        assert "nothing is kept" in str(fastcells.explain(layer, x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (fastcells.nn.GRU(4, 5).to("meta"), torch.randn(3, 2, 4, device="meta")), "meta"),
        (lambda: (torch.nn.GRU(4, 5), torch.randn(3, 2, 4)), "fastcells.convert would change that"),
        (lambda: (OwnLoop(4, 5), torch.randn(3, 2, 4)), "fastcells.convert leaves it, as .* does not call super"),
        (
            lambda: (fastcells.nn.GRU(4, 5), torch.randn(3, 2, 7)),
            "if the call is no mistake: input must have input_size",
        ),
        (
            lambda: (fastcells.nn.GRU(4, 5, zoneout=0.1), torch.randn(3, 0, 4)),
            "as a loop of torch operations: batch size 0",
        ),
    ],
)
def test_explain_says_why_torchs_own_is_taken(make, reason):
    told = fastcells.explain(*make())
    assert told.route == "torch"
    assert re.search(reason, str(told))


LENGTHS = [5, 1, 3]
CALLS = {
    "plain": ({}, {}),
    "recompute": ({"recompute": True}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "zoneout": ({"zoneout": 0.1}, {}),
    "recurrent_dropout": ({"recurrent_dropout": 0.1, "num_layers": 2, "dropout": 0.1}, {}),
    "weight_dropout": ({"weight_dropout": 0.1}, {}),
    "projection": ({"proj_size": 4, "num_layers": 2}, {}),
    "lengths": ({"bidirectional": True}, {"lengths": LENGTHS}),
    "lengths and masks": ({"zoneout": 0.1}, {"lengths": LENGTHS}),
    "reset": ({"recompute": True}, {"reset": torch.eye(5, 3) > 0, "reset_to": 0}),
    "reverse": ({}, {"reverse": True}),
    "cell states": ({}, {"return_cell_states": True}),
    "cell states of some steps": ({"zoneout": 0.1, "num_layers": 2}, {"return_cell_states": True, "lengths": LENGTHS}),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_explain_tells_of_what_runs(name, grad, monkeypatch):
    """Set beside a call: the cell, format and steps of its kernels, and the memory that its results hold on to."""
    made, options = CALLS[name]
    module, x = fastcells.nn.LSTM(8, 6, **made), torch.randn(5, 3, 8).to(made.get("dtype"))
    prepared, ran, saved = layer.prepared, [], []

    def noted(cell, x, states, parameters, sequences, *rest):
        ran.append(f"kernels of cell {cell.name}, {x.dtype}, vectors of")
        steps = f"{sequences.steps} steps, {sequences.rows} sequences"
        ran.append(f"{'packed' if sequences.packed else 'padded'} input, {steps}")
        return prepared(cell, x, states, parameters, sequences, *rest)

    with torch.set_grad_enabled(grad):
        generator = torch.get_rng_state()
        told = fastcells.explain(module, x, **options)
        assert torch.equal(torch.get_rng_state(), generator)
        monkeypatch.setattr(layer, "prepared", noted)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            module(x, **options)
    assert told.route == "engine"
    assert ran
    assert all(line in told.reasons[0] for line in ran)
    kept = "nothing" if not saved else "arguments alone" if made.get("recompute") else "gates and the states"
    assert kept in told.reasons[-1]
    assert ("rounded to torch.bfloat16" in str(told)) == (name == "bfloat16")


def test_explain_tells_of_each_layer_whether_a_gradient_is_wanted():
    module = fastcells.nn.GRU(4, 5, num_layers=2)
    for name, weight in module.named_parameters():
        weight.requires_grad_("l1" in name)
    told = fastcells.explain(module, torch.randn(3, 2, 4)).reasons
    assert told[-2] == "layer 0: no gradient is wanted: nothing is kept"
    assert told[-1].startswith("layer 1: a gradient is wanted")


def test_explain_tells_what_looks_on():
    module, x = fastcells.nn.LSTM(4, 5, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    with torch.autocast("cpu"):
        assert fastcells.explain(module, x).reasons == ("the registered operation fastcells::layer: autocast is on",)
        assert "rounded to torch.bfloat16" in str(fastcells.explain(module.float(), x.float()))


def test_explain_raises_what_the_call_does():
    x = torch.randn(3, 2, 4)
    with pytest.raises(ValueError, match="return_cell_states must be False"):
        fastcells.explain(fastcells.nn.GRU(4, 5), x, return_cell_states=True)
    with pytest.raises(ValueError, match="lengths must be between 0 and 3"):
        fastcells.explain(fastcells.nn.GRU(4, 5), x, lengths=[3, 4])
    with pytest.raises(TypeError, match="options must be arguments of GRUCell's calls, got lengths"):
        fastcells.explain(fastcells.nn.GRUCell(4, 5), x[0], lengths=[3, 3])


def test_explain_wants_a_recurrent_module():
    with pytest.raises(TypeError, match="module must be a recurrent layer or cell, got Linear"):
        fastcells.explain(torch.nn.Linear(2, 3), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("rows", "hidden", "threads", "forward", "back"),
    [
        (40, 512, 2, "rows", "rows"),
        (32, 512, 2, "units", "rows"),  # gradients of four gates pass between threads, and only one state
        (8, 512, 2, "units", "units"),
        (8, 256, 2, "rows", "rows"),  # a near cache holds what they read
        (4, 256, 2, "units", "units"),  # which takes longer than to multiply two rows by it
        (4, 32, 2, "rows", "rows"),  # a barrier takes as long
        (64, 512, 4, "units", "rows"),
        (60, 512, 8, "units", "units"),
        (128, 512, 16, "units", "rows"),  # more gradients than weights
        (64, 64, 16, "rows", "rows"),
    ],
)
def test_threads_do_not_all_read_weights_that_are_many_for_few_rows(rows, hidden, threads, forward, back):
    chosen = plan(shape(rows=rows, hidden=hidden, depth=hidden, inputs=hidden, threads=threads))
    assert (chosen.forward, chosen.back) == ((threads, forward), (threads, back))


@pytest.mark.parametrize(
    ("rows", "hidden", "chosen"),
    [
        (1, 128, (4, "units")),
        (1, 512, (16, "units")),
        (4, 256, (16, "units")),
        (8, 64, (8, "rows")),
        (16, 128, (16, "rows")),
        (3, 8, (1, "rows")),
    ],
)
def test_no_more_threads_than_a_barrier_or_the_rows_pay_for(rows, hidden, chosen):
    sizes = {"rows": rows, "hidden": hidden, "depth": hidden, "inputs": hidden}
    assert plan(shape(**sizes, threads=16)).forward == chosen
