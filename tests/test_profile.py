"""The profiler and the command line."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastcells
from fastcells import cells, roof, warmup
from fastcells.__main__ import main
from fastcells.cpu import again, engine, script, store, team
from fastcells.cpu.host import Host
from fastcells.derivation import build
from fastcells.profile import layer as one_layer
from fastcells.profile import timing as timings
from fastcells.roof import using_threads


@pytest.fixture
def quick(monkeypatch):
    """The machine's limits are taken as given, to save the time of measuring them."""
    for module in (one_layer, roof):
        monkeypatch.setattr(module, "peak_flops", lambda dtype, threads: 1e11)
        monkeypatch.setattr(module, "bandwidth", lambda size, threads: 1e11)


# ---- where the time goes ----
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_are_told_apart_exactly(monkeypatch, threads):
    """On a clock that moves only where the engine works, every part is known."""
    now = [0.0]
    program = build(cells.lstm, False).forward
    cost = {"pack": 0.25, "ahead": 4.0, "pointwise": 1.0, "s.h": 8.0, "x": 2.0, "weights": 3.0, "torch": 1.5}
    wait = 0.75 if threads > 1 else 0.0

    def spend(seconds):
        now[0] += seconds

    def launch(label, seconds):
        if script.observer is None:
            spend(seconds)
        else:
            script.observer(SimpleNamespace(label=label), lambda: spend(seconds))

    def recurrence(self, _script, times, views, products):
        buffers = [s.rows.buffer for stage in program.stages for s in stage.segments]
        depths = [p.depth for row in products for p in row]
        work = cost["pointwise"] + sum(cost[b] for b, d in zip(buffers, depths, strict=True) if d)
        used = torch.get_num_threads()
        launch("lstm_forward_float32", work / used + (wait if used > 1 else 0))

    monkeypatch.setattr(timings, "clock", lambda: now[0])
    monkeypatch.setattr(engine.Runner, "launch", recurrence)

    def call():
        spend(cost["torch"])
        launch("pack_float32", cost["pack"])
        launch("input projection", cost["ahead"])
        products = [[engine.Product(1) for _ in stage.segments] for stage in program.stages]
        engine.Runner.launch(SimpleNamespace(program=program), None, None, None, products)
        launch("weight gradients", cost["weights"])
        launch("input gradient", cost["ahead"])
        launch("sum_float32", cost["pack"])

    with roof.using_threads(threads):
        timing = timings.take_apart(call, units_shared=threads > 1)
    expected = {
        timings.INPUT: cost["ahead"] + cost["x"] / threads,
        timings.PRODUCT: cost["s.h"] / threads,
        timings.POINTWISE: cost["pointwise"] / threads,
        timings.BARRIER: wait,
        timings.INPUT_GRADIENT: cost["ahead"],
        timings.WEIGHT_GRADIENTS: cost["weights"],
        timings.PACKING: cost["pack"],
        timings.COPIES: cost["pack"],
        timings.REST: cost["torch"],
    }
    assert timing.parts == pytest.approx({k: v for k, v in expected.items() if v})
    assert timing.best == pytest.approx(sum(expected.values()))


@pytest.mark.parametrize(("kind", "train"), [("LSTM", True), ("GRU", False), ("RNN", True)])
def test_sum_of_parts_is_the_whole(quick, kind, train):
    layer = getattr(fastcells.nn, kind)(16, 32)
    timing = one_layer.profile_layer(layer, torch.randn(40, 8, 16), train=train, budget=0.3).timing
    assert timing.sum_of_parts == pytest.approx(timing.best)
    expected = {timings.INPUT, timings.PRODUCT, timings.POINTWISE, timings.PACKING, timings.COPIES, timings.REST}
    if train:
        expected |= {timings.BACK_PRODUCT, timings.BACK_POINTWISE}
        expected |= {timings.INPUT_GRADIENT, timings.WEIGHT_GRADIENTS}
    assert set(timing.parts) <= expected
    kernels = [{timings.INPUT, timings.PRODUCT, timings.POINTWISE}, {timings.BACK_PRODUCT, timings.BACK_POINTWISE}]
    noise = {timings.REST} if not train else set()  # a compiled call has a microsecond or two besides its parts
    assert set(timing.parts) >= expected - noise - set.union(*kernels)
    assert all(kernel & set(timing.parts) for kernel in kernels[: 1 + train])  # how it splits may drown in the noise


def test_watching_costs_no_part_anything(monkeypatch):
    """Calls that are watched take longer; the engine's share is what it was, and so is the rest."""
    now = [0.0]
    watched = timings.Watch.reset

    def spend(seconds):
        now[0] += seconds

    def reset(self, on):
        watched(self, on)
        burden[0] = 5.0 if on else 0.0

    burden = [0.0]
    monkeypatch.setattr(timings, "clock", lambda: now[0])
    monkeypatch.setattr(timings.Watch, "reset", reset)

    def call():
        spend(1.0 + burden[0])
        if script.observer is None:
            spend(2.0)
        else:
            script.observer(SimpleNamespace(label="pack_float32"), lambda: spend(2.0))

    timing = timings.take_apart(call, units_shared=False)
    assert timing.parts == pytest.approx({timings.PACKING: 2.0, timings.REST: 1.0})
    assert timing.best == pytest.approx(3.0)


def test_calls_within_calls_are_counted_once():
    """Of the engine's calls, those inside others too, no more than the whole is seen."""
    watch = timings.Watch()
    inner = watch.wrap(lambda: sum(range(20_000)), lambda: "inner")
    outer = watch.wrap(lambda: (inner(), sum(range(20_000)), inner()), lambda: "outer")
    watch.on = True
    began = timings.clock()
    outer()
    whole = timings.clock() - began
    assert set(watch.seconds) == {"inner", "outer"}
    assert 0 < sum(watch.seconds.values()) <= whole


def test_the_engine_is_left_as_it_was(quick):
    def engine_functions():
        return script.observer, engine.Runner.launch

    before = engine_functions()
    with pytest.raises(ZeroDivisionError), timings.watching(timings.Watch()):
        raise ZeroDivisionError
    one_layer.profile_layer(fastcells.nn.RNN(3, 4), torch.randn(5, 2, 3), train=True, budget=0.01)
    assert engine_functions() == before


def test_rates_follow_from_the_counts(quick):
    layer = fastcells.nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4)
    lengths = torch.tensor([9, 5, 2])
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(9, 3, 6), lengths)
    for train in (False, True):
        p = one_layer.profile_layer(layer, packed, train=train, rate=100.0, budget=0.01)
        t = p.timing.best
        assert (p.steps, p.sequences, p.tokens, p.cells) == (9, 3, 16, 4)
        weights = sum(w.numel() for w in layer.parameters() if w.dim() == 2)
        assert p.roof.flops == 2 * 16 * weights * (3 if train else 1)
        assert p.flops_per_second == pytest.approx(p.roof.flops / t)
        assert p.cell_steps_per_second == pytest.approx(16 * 4 / t)
        assert p.sequences_per_second == pytest.approx(3 / t)
        assert p.times_real_time == pytest.approx(9 / 100 / t)
        assert p.share_of_roof == pytest.approx(max(p.roof.flops / 1e11, p.roof.bytes / 1e11) / t)
        assert p.route == "engine"
        assert {"lstm_projected_forward_float32", "pack_float32"} & set(p.kernels)


def test_limits_are_measured():
    assert roof.peak_flops(torch.float64, 1) > 0
    assert roof.bandwidth(1 << 14, 1) > 0
    capacities = [size for _, size in roof.caches()]
    assert capacities == sorted(capacities)
    for name, size in roof.caches():
        assert roof.level(size) == name


# ---- a model ----
class Model(torch.nn.Module):
    """A layer, a cell in a loop, a subclass that stays as it is, and a layer that is not run."""

    class Own(torch.nn.RNN):
        def forward(self, *arguments):
            state = torch.zeros(1, 2, 2)
            return torch._VF.rnn_tanh(*arguments, state, self._flat_weights, True, 1, 0.0, self.training, False, False)

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(3, 4)
        self.cell = torch.nn.GRUCell(4, 4)
        self.own = self.Own(4, 2)
        self.idle = torch.nn.GRU(3, 3)
        self.converted = fastcells.nn.GRU(4, 4)
        self.any = fastcells.nn.Recurrent(cells.gru_reset_before, 4, 4)

    def forward(self, x):
        y, _ = self.encoder(x)
        y, _ = self.converted(input=y, hx=None)
        y, _ = self.any(y, lengths=[6, 3])
        h = None
        for step in y:
            h = self.cell(step, h)
        return {"sequence": self.own(y)[0], "last": h}


@pytest.mark.parametrize("train", [False, True])
def test_a_row_for_every_layer_of_a_model(quick, train):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 2, 3)
    classes = {n: type(m) for n, m in model.named_modules()}
    state = torch.get_rng_state()
    report = fastcells.profile(model, x, train=train, budget=0.02)
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    rows = {r.name: r for r in report.rows}
    assert {n: r.calls for n, r in rows.items()} == {"encoder": 1, "converted": 1, "any": 1, "cell": 6, "own": 1}
    assert rows["any"].before is rows["any"].ratio is None
    assert rows["any"].after.tokens == 9
    assert rows["own"].after is None
    assert "subclass" in rows["own"].note
    assert rows["encoder"].after.layer == "LSTM(3, 4)"
    assert rows["encoder"].after.route == rows["converted"].after.route == "engine"
    assert rows["encoder"].ratio == pytest.approx(rows["encoder"].before / rows["encoder"].after.timing.best)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["name"] == "encoder"
    assert [line.split()[0] for line in str(report).splitlines()][1:-1] == list(rows)


def test_profile_says_what_it_cannot_take():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastcells.profile(3)
    with pytest.raises(ValueError, match="at least one recurrent layer"):
        fastcells.profile(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"layer or cell of fastcells\.nn, got LSTM"):
        one_layer.profile_layer(torch.nn.LSTM(2, 2), torch.zeros(1, 1, 2))
    model = Model()
    with pytest.raises(RuntimeError):
        fastcells.profile(model, torch.zeros(2, 2, 5))
    assert type(model.encoder) is torch.nn.LSTM


# ---- torch.profiler ----
@pytest.mark.parametrize(("kind", "name"), [("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn_tanh")])
def test_layers_have_names_in_torch_profiler(kind, name):
    layer, x = getattr(fastcells.nn, kind)(3, 4), torch.randn(5, 2, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        with torch.no_grad():
            layer(x)
        layer(x)[0].sum().backward()
    count = {e.key: e.count for e in seen.key_averages() if e.key.startswith("fastcells::")}
    assert count == {f"fastcells::{name}": 2, f"fastcells::{name}_backward": 1}


# ---- the command line ----
SCHEMA = {
    "machine": dict, "cache": dict, "layer": str, "dtype": str, "threads": int, "train": bool, "steps": int,
    "sequences": int, "tokens": int, "cells": int, "first_call": float, "route": str, "reasons": list, "kernels": dict,
    "rate": float, "seconds": float, "median_seconds": float, "rounds": int, "parts": dict, "sum_of_parts": float,
    "cell_steps_per_second": float, "sequences_per_second": float, "flops_per_second": float, "share_of_roof": float,
    "times_real_time": float, "roof": dict,
}  # fmt: skip


def test_json(quick, capsys, tmp_path):
    plot = tmp_path / "plots" / "roofline.png"
    main(
        "profile gru --hidden 8 --batch 3 --steps 7 --input 5 --layers 2 --bidirectional --dtype float64 --threads 1 "
        f"--train --rate 50 --json --plot {plot}".split()
    )
    found = json.loads(capsys.readouterr().out)
    assert {k: type(v) for k, v in found.items()} == SCHEMA
    assert found["layer"] == "GRU(5, 8, num_layers=2, bidirectional=True)"
    assert (found["steps"], found["sequences"], found["dtype"], found["threads"]) == (7, 3, "float64", 1)
    assert set(found["parts"]) <= set(timings.PARTS)
    assert sum(found["parts"].values()) == pytest.approx(found["sum_of_parts"])
    assert set(found["roof"]) == {"flops", "bytes", "peak", "bandwidth", "working_set", "level", "seconds", "binds"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "layer", "tokens"),
    [
        ("lstm --proj-size 3", "LSTM(8, 8, proj_size=3)", 21),
        ("gru --packed", "GRU(8, 8)", None),
        ("lstm --lengths --train", "LSTM(8, 8)", None),
        ("lstm_cell", "LSTMCell(8, 8)", 3),
        ("gru_reset_before --layers 2", "Recurrent(gru_reset_before, 8, 8, num_layers=2)", 21),
        ("peephole_lstm --train", "Recurrent(peephole_lstm, 8, 8)", 21),
        ("indrnn", "Recurrent(indrnn, 8, 8)", 21),
        ("fastcells.cells:rnn_relu", "Recurrent(rnn_relu, 8, 8)", 21),
    ],
)
def test_what_can_be_profiled(quick, capsys, line, layer, tokens):
    steps = "" if "_cell" in line else " --steps 7"
    main(f"profile {line} --hidden 8 --batch 3{steps} --threads 1 --json".split())
    found = json.loads(capsys.readouterr().out)
    assert found["layer"] == layer
    assert found["tokens"] == tokens or (tokens is None and 7 < found["tokens"] < 21)
    assert found["sum_of_parts"] == pytest.approx(found["seconds"])


def test_what_is_profiled_is_what_runs(quick):
    """Sequences with resets go through the time loop as they are, those with lengths are packed."""
    layer, x = fastcells.nn.LSTM(16, 32), torch.randn(20, 8, 16)
    reset = torch.zeros(20, 8, dtype=torch.bool)
    reset[3, 2] = True
    found = one_layer.profile_layer(layer, x, reset=reset, reset_to=0, budget=0.1)
    assert (found.steps, found.sequences, found.tokens) == (20, 8, 160)
    assert "resets inside the time loop: no packing" in found.reasons
    found = one_layer.profile_layer(layer, x, lengths=[20, 10, 10, 10, 5, 5, 5, 5], budget=0.1)
    assert (found.steps, found.sequences, found.tokens) == (20, 8, 70)
    with torch.no_grad():
        assert found.reasons == fastcells.explain(layer, x, lengths=[20, 10, 10, 10, 5, 5, 5, 5]).reasons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_computed_in_float32_has_its_limits(quick, dtype):
    found = one_layer.profile_layer(
        fastcells.nn.GRU(16, 32, dtype=dtype), torch.randn(20, 8, 16, dtype=dtype), budget=0.1
    )
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.share_of_roof > 0


def test_without_a_team(quick, monkeypatch):
    """Where no library of threads is found, all is on one."""
    monkeypatch.setattr(team, "_openmp", lambda: None)
    with using_threads(2):
        found = one_layer.profile_layer(fastcells.nn.GRU(16, 32), torch.randn(20, 8, 16), budget=0.1)
    assert found.roof.peak > 0
    assert any("one thread" in reason for reason in found.reasons)


def test_text(quick, capsys):
    threads = torch.get_num_threads()
    main(["profile", "lstm", *["--hidden", "8", "--batch", "3", "--steps", "7", "--threads", "2"]])
    out = capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert out.startswith("LSTM(8, 8), 7 steps, 3 sequences, float32, 2 threads, inference\n")
    for words in (
        "cell steps",
        "share of the roof",
        "where the time goes",
        "of the whole",
        "schedule: engine",
        "cache:",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "COMMAND"),
        ("unknown", "COMMAND"),
        ("profile", "cell"),
        ("profile transformer", "cell"),
        ("profile lstm --hidden 0", "--hidden"),
        ("profile lstm --batch many", "--batch"),
        ("profile lstm --steps -3", "--steps"),
        ("profile lstm --dtype float16", "--dtype"),
        ("profile lstm --rate nan", "--rate"),
        ("profile lstm --plot roofline.unknown", "--plot"),
        ("profile lstm --plot /dev/null/roofline.png", "--plot"),
        ("profile lstm --bogus", "--bogus"),
        ("profile lstm_cell --layers 2", "--layers"),
        ("profile gru_cell --packed", "--packed"),
        ("profile lstm --packed --lengths", "--lengths"),
        ("profile gru --proj-size 3", "proj_size"),
        ("profile lstm --hidden 4 --proj-size 5", "proj_size"),
        ("profile no_such_module:mine", "no_such_module"),
        ("profile fastcells.cells:sigmoid", "Cell"),
        ("profile fastcells.cells:nothing", "no 'nothing' in fastcells.cells"),
        ("profile .cells:lstm", "the whole name of a module"),
        ("warmup .cells:lstm", "the whole name of a module"),
        ("profile lstm --hidden 1000000 --batch 1000000", "memory"),
        ("warmup lstm transformer", "CELL"),
        ("warmup no_such_module:mine", "no_such_module"),
        ("warmup fastcells.cells:sigmoid", "Cell"),
        ("warmup --dtype float16", "--dtype"),
        ("clear-cache now", "now"),
    ],
)
def test_bad_arguments_get_one_line_and_status_2(capsys, line, named):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert named in err


OWN = """
from fastcells import cell

@cell(gates="a")
def branching(x, u, s):
    return x.a if x.a > 0 else u.a
"""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (OWN, r"cell branching: .*/own\.py:6: return x\.a if"),
        ("1 / 0", "import 'own': ZeroDivisionError"),
        ("(", r"\(own\.py, line 1\)"),
    ],
    ids=["branching", "failing", "no Python"],
)
@pytest.mark.parametrize("command", ["profile", "warmup"])
def test_a_module_or_cell_that_is_wrong_gets_one_line(command, text, named, tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises(SystemExit) as stop:
        main([command, "own:branching"])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.count("\n") == 1
    assert re.search(named, err)


def test_a_reader_that_has_enough_gets_no_traceback(tmp_path):
    command, env = [sys.executable, "-m", "fastcells", "clear-cache"], os.environ | {"FASTCELLS_CACHE": str(tmp_path)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_plot_without_matplotlib(capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stop:
        main(["profile", "lstm", "--plot", "roofline.png"])
    assert stop.value.code == "matplotlib is not installed: pip install matplotlib"


@pytest.mark.parametrize("halves", [False, True])
def test_warmup_has_the_kernels_of_the_hidden_sizes(halves, monkeypatch):
    monkeypatch.setattr(warmup, "host", lambda: Host("", "", "", 64, 32, halves))

    def lanes(sizes, part):
        return sorted(w.lanes for w in warmup.wanted(["lstm"], [torch.float32], False, sizes) if w.part == part)

    few = [8] if halves else [16]
    assert (lanes([], "forward"), lanes([64], "forward"), lanes([8], "forward")) == ([16], [16], few)
    assert lanes([8], "pack") == sorted({*few, 16})
    assert lanes([8], "product") == [16]


def test_the_life_of_a_cache(tmp_path, monkeypatch, capsys, quick):
    env = {k: v for k, v in os.environ.items() if k != "FASTCELLS_QUIET"} | {"FASTCELLS_CACHE": str(tmp_path)}

    def warmup():
        command = [sys.executable, "-m", "fastcells", "warmup", "fastcells.cells:rnn_relu", "--dtype", "float32"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        *kernels, folder = done.stdout.splitlines()
        assert folder == f"kept in {tmp_path}"
        return dict(line.split(maxsplit=1) for line in kernels)

    names = {
        "driver",
        "tables",
        "entering",
        "leaving",
        "cutting",
        "collecting",
        "spreading",
        "pack_float32",
        "turn_float32",
        "product_float32",
        "sum_float32",
        "rnn_relu_forward_float32",
        "rnn_relu_backward_float32",
        "tall_0_float32",
        "dots_0_0_float32",
        "dots_0_float32",
        *(["recall"] if again.interface() else []),
        *(["lead"] if team.library() else []),
    }
    first, second = warmup(), warmup()
    assert set(first) == names
    assert all(re.fullmatch(r"compiled in \d.* m?s", what) for what in first.values())
    assert second == dict.fromkeys(names, "stored")

    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path))
    other = tmp_path / "other.o"
    other.write_bytes(b"not a kernel")
    main(["info", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["cache"]["kernels"] == len(names)
    assert facts["cache"]["folder"] == str(tmp_path)
    assert facts["cache"]["bytes"] == sum(f.stat().st_size for f in store.stored())
    assert facts["vector_bytes"] == store.host().vector_bytes
    assert facts["torch_routes"]["GRU float32"].startswith("step by step")
    assert set(facts["versions"]) == {"fastcells", "python", "torch", "numba", "llvmlite", "numpy"}
    main(["info"])
    assert f"{tmp_path}: {len(names)} kernels" in capsys.readouterr().out

    main(["clear-cache"])
    common = 2  # what is lowered once for the kernels of all programs, and of all families of tiles
    assert capsys.readouterr().out.startswith(f"deleted {len(names) + common} files")
    assert list(tmp_path.iterdir()) == [other]
    main(["clear-cache"])
    assert capsys.readouterr().out.startswith("deleted 0 files")


UNFIT = {
    "of others": lambda path: (path.mkdir(), path.chmod(0o775)),
    "a file": lambda path: path.touch(),
    "in a file": lambda path: path.parent.joinpath("cache").symlink_to("/dev/null/cache"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_cache_that_keeps_nothing_is_said_to(what, quick, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    UNFIT[what](cache)
    monkeypatch.setenv("FASTCELLS_CACHE", str(cache))
    monkeypatch.setattr(warmup, "run", lambda wants: iter([("driver", 0.1)]))
    with pytest.raises(SystemExit, match=rf"^no kernel is kept: {cache}: [^:]+$"):
        main(["warmup", "lstm"])
    capsys.readouterr()
    main(["info"])
    assert re.search(rf"{cache}: 0 kernels, 0 B; nothing more is kept \({cache}: [^:]+\)\n", capsys.readouterr().out)


def test_kernels_that_are_there_need_no_folder_to_write_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTCELLS_CACHE", "/dev/null/cache")
    monkeypatch.setattr(warmup, "run", lambda wants: iter([("driver", 0)]))
    main(["warmup", "lstm"])
    assert "stored" in capsys.readouterr().out


def test_clearing_what_is_no_folder(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    monkeypatch.setenv("FASTCELLS_CACHE", str(file))
    with pytest.raises(SystemExit) as ended:
        main(["clear-cache"])
    assert ended.value.code == f"{file} is no folder"
    assert file.read_text() == "mine"


def test_clearing_leaves_folders_that_others_may_write_to(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path))
    file = tmp_path / f"kernel-{'0' * 32}.o"
    file.write_bytes(b"")
    tmp_path.chmod(0o777)
    assert store.clear() == {}
    tmp_path.chmod(0o700)
    assert [*store.clear()] == [file]


def test_what_is_profiled_computes_the_same_afterwards():
    """Parts are told from calls that leave something out: none of these may be made again later."""
    module, x = fastcells.nn.LSTM(8, 16), torch.randn(5, 3, 8)
    with torch.no_grad():
        before = module(x)[0]
        fastcells.profile(torch.nn.Sequential(module), x)
        for _ in range(4):
            assert torch.equal(module(x)[0], before)
