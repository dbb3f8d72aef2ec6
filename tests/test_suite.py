"""The suite of benchmarks: no time without a right answer, fair rounds, results that say what was lost."""

import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest

pytest.importorskip("rich", reason="the suite needs pip install .[bench]")
pytest.importorskip("matplotlib", reason="the suite needs pip install .[bench]")

from benchmarks import commands, figures, machine, memory, providers, report, results, runner, show, worker
from benchmarks.__main__ import main
from benchmarks.cases import CELLS, FIGURES, MODES, PLAIN, SHAPES, SUITES, Case, left_out
from benchmarks.problem import Problem
from benchmarks.providers import OURS, Prepared, Provider, Unsupported
from benchmarks.results import Results, Row

PROVIDERS = providers.load()
SMALL = Case("gru", 2, 3, 4, 5)
PEAKS = {
    "gigaflops": {"float32": 100.0, "float64": 50.0},
    "levels": [
        {"name": "L1", "bytes": 1 << 15, "gigabytes_per_s": 80.0},
        {"name": "memory", "bytes": 1 << 15, "gigabytes_per_s": 20.0},
    ],
}


class OffByOnePercent(type(PROVIDERS["torch.nn"])):
    """torch.nn with one of its results made wrong by 1 %."""

    def __init__(self, name, place):
        self.name, self.place = name, place

    def prepare(self, problem):
        prepared = super().prepare(problem)

        def answer(result):
            given = dict(prepared.answer(result))
            name = list(given)[self.place]
            return given | {name: given[name] * 1.01}

        return replace(prepared, answer=answer)


def row(provider, samples, case=SMALL, ours=None, **more):
    made = Row(case, provider, "ok", samples=list(samples), **more)
    made.summarise(samples if ours is None else ours)
    return made


def two(ratio, case=SMALL):
    """fastcells and one peer that takes `ratio` times as long."""
    ours = [1e-3, 1.1e-3, 1.2e-3]
    return [row(OURS, ours, case), row("torch.nn", [ratio * s for s in ours], case, ours)]


def measured(*rows):
    facts = machine.describe(1) | {"roof": PEAKS}
    return Results({1: facts}, list(rows))


def save(path, found):
    lines = [json.dumps({"kind": "machine", **facts}) for facts in found.machines.values()]
    path.write_text("\n".join([*lines, *(r.to_json() for r in found.rows)]) + "\n")
    return path


# Cases ----------------------------------------------------------------------------------------------------------------


def test_core_has_every_shape_for_every_cell_and_every_mode():
    core = SUITES["core"].cases()
    found = {(case.cell, case.N, case.T, case.I, case.H, case.mode) for case in core}
    assert {(c, *shape, mode) for c in PLAIN for shape in SHAPES for mode in ("inference", "training")} <= found
    assert {case.mode for case in core} | {case.mode for case in SUITES["variants"].cases()} == set(MODES)


@pytest.mark.parametrize("suite", SUITES)
def test_no_suite_has_a_case_twice(suite):
    cases = SUITES[suite].cases()
    assert len(cases) == len(set(cases))


def test_the_scaling_suite_changes_one_thing_at_a_time():
    for mode in ("inference", "training"):
        cases = [case.fields() for case in SUITES["scaling"].cases() if case.mode == mode]
        base = max(cases, key=lambda a: sum(sum(a[n] != b[n] for n in a) <= 1 for b in cases))
        assert all(sum(case[name] != base[name] for name in case) <= 1 for case in cases)


@pytest.mark.parametrize(
    ("name", "value"), [("cell", "tree"), ("mode", "fast"), ("dtype", "int8"), ("N", 0), ("T", 1.5)]
)
def test_a_wrong_case_says_which_field(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value!r}"):
        Case(**(SMALL.fields() | {name: value}))


# Answers --------------------------------------------------------------------------------------------------------------


CALLS = ("inference", "training")
RANDOM = ("dropout-training", "zoneout-training")
#: (provider, training, resets) -> why not
REFUSED = {(n, t, True): "does not reset" for n in ("NumPy", "ONNX Runtime", "OpenVINO") for t in (False, True)}
REFUSED |= {(n, True, False): "inference only" for n in ("ONNX Runtime", "OpenVINO")}
FAST = ("fastcells", "torch.nn", "torch loop", "NumPy", "ONNX Runtime", "OpenVINO")
ANSWERS = [(name, cell, mode) for name in FAST for cell in PLAIN for mode in MODES if mode not in RANDOM]
ANSWERS += [(name, "lstm", mode) for name in FAST for mode in RANDOM]
VARIANTS = [cell for cell in CELLS if cell not in PLAIN]
ANSWERS += [(name, cell, mode) for name in ("fastcells", "torch loop") for cell in VARIANTS for mode in CALLS]
# JAX compiles for a second a case: its cells are an expression each, and share all modes.
ANSWERS += [("JAX scan", cell, "inference") for cell in PLAIN]
ANSWERS += [
    ("JAX scan", "gru", mode)
    for mode in ("backward", "streaming", "lengths-training", "resets-training", "bidirectional")
]


@pytest.mark.parametrize(("name", "cell", "mode"), ANSWERS)
def test_every_provider_is_right_or_says_why_not(name, cell, mode):
    if (absent := PROVIDERS[name].available()) is not None:
        pytest.skip(absent)
    problem = Problem(Case(cell, 3, 1 if MODES[mode].stateful else 40 if MODES[mode].resets else 5, 4, 6, mode))
    assert problem.resets.any() == bool(MODES[mode].resets)
    key = name, MODES[mode].call != "forward", bool(MODES[mode].resets)
    reason = "no recurrent dropout" if mode in RANDOM and name in ("NumPy", "torch.nn") else REFUSED.get(key)
    if reason is not None:
        with pytest.raises(Unsupported, match=reason):
            PROVIDERS[name].prepare(problem)
        return
    prepared = PROVIDERS[name].prepare(problem)
    for _ in range(2):  # a call leaves nothing behind that changes the next
        if prepared.setup is not None:
            prepared.setup()
        result = prepared.call()
        if prepared.checked is not None:
            assert mode not in RANDOM or problem.mistake(prepared.answer(result)) is not None
            result = prepared.checked()
        assert problem.mistake(prepared.answer(result)) is None


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_provider_wrong_by_one_percent_has_no_time_and_fails_the_gate(mode, place):
    case = replace(SMALL, mode=mode)
    chosen = {OURS: PROVIDERS[OURS], "wrong": OffByOnePercent("wrong", place), "torch.nn": PROVIDERS["torch.nn"]}
    rows = runner.measure(case, chosen, seconds=0.01, peaks=PEAKS)
    status = {r.provider: r.status for r in rows}
    assert status == {OURS: "ok", "wrong": "wrong", "torch.nn": "ok"}
    wrong = next(r for r in rows if r.provider == "wrong")
    assert wrong.samples == []
    assert wrong.median is wrong.ratio is wrong.gigaflops is None
    found = results.gate(measured(*rows), None, None)
    assert len(found) == 1
    assert "wrong is wrong" in found[0]
    assert "wrong" in show.cells(measured(*rows))[1]


def test_the_command_line_fails_the_gate_when_fastcells_is_wrong(monkeypatch, tmp_path, capsys):
    chosen = {OURS: OffByOnePercent(OURS, 0), "torch.nn": PROVIDERS["torch.nn"]}

    def run(cases, names, suite, minutes, done):
        yield json.dumps({"kind": "machine", **machine.describe(1), "roof": PEAKS}) + "\n"
        for found in runner.measure(SMALL, chosen, seconds=0.01):
            yield found.to_json() + "\n"

    monkeypatch.setattr(runner, "run", run)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--quick", "--gate", "--out", str(tmp_path / "a.jsonl")])
    assert ended.value.code == 1
    assert "gate: gru 2,3,4,5 inference: fastcells is wrong: y is off by" in capsys.readouterr().out


def test_a_missing_or_misshapen_or_infinite_result_is_a_mistake():
    problem = Problem(SMALL)
    right = problem.truth
    assert problem.mistake(right) is None
    assert "expected h_n, y, got y" in problem.mistake({"y": right["y"]})
    assert "shape" in problem.mistake(right | {"y": right["y"][:1]})
    assert "y is off" in problem.mistake(right | {"y": right["y"] * float("nan")})


class Peer(Provider):
    name = "peer"

    def __init__(self, error=None, absent=None):
        self.error, self.absent = error, absent

    def available(self):
        return self.absent

    def prepare(self, problem):
        raise self.error


@pytest.mark.parametrize(
    ("peer", "status", "reason"),
    [
        (Peer(absent="not installed: peer"), "absent", "not installed: peer"),
        (Peer(Unsupported("no kernel")), "unsupported", "no kernel"),
        (Peer(RuntimeError("broke\nmore")), "failed", "RuntimeError: broke"),
    ],
)
def test_a_provider_without_a_time_is_named_with_its_reason(peer, status, reason):
    rows = runner.measure(SMALL, {OURS: PROVIDERS[OURS], "peer": peer}, seconds=0.01)
    assert (rows[1].status, rows[1].reason) == (status, reason)
    assert f"peer: {status}: {reason} (1 case)" in show.summary(measured(*rows))


def test_a_case_with_more_threads_than_cores_is_not_measured(monkeypatch):
    monkeypatch.setattr(runner, "cores", lambda: [0])
    (found,) = runner.measure(replace(SMALL, threads=2), {OURS: PROVIDERS[OURS]})
    assert (found.status, found.samples) == ("unsupported", [])


def test_what_a_suite_leaves_out_is_named():
    case = SUITES["quick"].cases()[0]
    rows = runner.measure(case, {"torch.compile": PROVIDERS["torch.compile"]}, suite="quick")
    assert rows[0].reason == left_out("quick", case, "torch.compile") or rows[0].status == "absent"


# Method ---------------------------------------------------------------------------------------------------------------


def test_providers_alternate_and_setup_comes_before_each_call():
    log = []

    def prepared(name):
        return Prepared(lambda: log.append(name), dict, setup=lambda: log.append(f"setup {name}"))

    samples = runner.rounds({OURS: prepared(OURS), "peer": prepared("peer")}, seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys((OURS, "peer"), runner.LEAST_ROUNDS)
    assert log[::2] == [f"setup {name}" for name in log[1::2]]
    turns = [name for name, before in zip(log[1::2], [None, *log[1::2]], strict=False) if name != before]
    assert len(turns) >= runner.LEAST_ROUNDS  # none has all its rounds at once


def test_a_turn_begins_with_calls_that_are_not_timed(monkeypatch):
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 1e-3 if len(calls) <= 2 else 0.5e-3  # cold caches at first

    monkeypatch.setattr(runner, "perf_counter", lambda: now[0])
    assert runner.turn(Prepared(call, dict), 1e-3) == pytest.approx(0.5e-3)
    assert len(calls) == round(runner.WARM / 1e-3) + round(runner.SAMPLE / 1e-3)
    assert runner.turn(Prepared(lambda: calls.append(0), dict), 1.0) == 0  # a long call warms itself
    assert len(calls) == round(runner.WARM / 1e-3) + round(runner.SAMPLE / 1e-3) + 1


def test_what_a_call_takes_is_not_taken_from_calls_that_were_disturbed(monkeypatch):
    now, calls = [0.0], []

    def call():
        calls.append(now[0])
        now[0] += 20e-3 if len(calls) == 1 else 0.5e-3

    monkeypatch.setattr(runner, "perf_counter", lambda: now[0])
    assert runner.expected(Prepared(call, dict)) == pytest.approx(0.5e-3)
    assert runner.expected(Prepared(lambda: now.__setitem__(0, now[0] + 1.0), dict)) == pytest.approx(1.0)


@pytest.mark.parametrize(("until", "waited"), [(0.0, 0.0), (0.05, 0.05), (1e9, runner.PATIENCE)])
def test_a_turn_waits_for_threads_that_spin(monkeypatch, until, waited):
    now = [0.0]
    monkeypatch.setattr(runner, "perf_counter", lambda: now[0])
    monkeypatch.setattr(runner, "busy", lambda: now[0] < until)
    monkeypatch.setattr(runner, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    runner.settle()
    assert waited <= now[0] <= waited + 2 * runner.LOOK


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc of Linux")
def test_a_thread_that_spins_is_busy():
    spinning, end = threading.Event(), threading.Event()

    def spin():
        spinning.set()
        while not end.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    thread.start()
    spinning.wait()
    found = any(runner.busy() for _ in range(100))  # between two looks it may wait for Python's lock
    end.set()
    thread.join()
    assert found


def test_a_slow_provider_has_one_round_where_time_is_short(monkeypatch):
    now = [0.0]

    def prepared(seconds):
        return Prepared(lambda: now.__setitem__(0, now[0] + seconds), dict)

    monkeypatch.setattr(runner, "perf_counter", lambda: now[0])
    chosen = {OURS: prepared(0.1), "peer": prepared(0.2), "slow": prepared(10.0)}
    samples = runner.rounds(chosen, seconds=1.0)
    assert {name: len(values) for name, values in samples.items()} == {OURS: 3, "peer": 3, "slow": 1}
    samples = runner.rounds(chosen, seconds=100.0)
    assert len(samples["slow"]) == 4  # until its share of 33 seconds is used up
    assert len(samples[OURS]) == runner.MOST_ROUNDS


def test_when_the_time_is_over_the_other_cases_are_named(monkeypatch, capsys):
    """Each case has its share of the time that is left, and after twice the time none begins."""
    cases, now, shares = SUITES["quick"].cases()[:4], [0.0], []

    def measure(case, chosen, suite, seconds, peaks):
        shares.append(seconds)
        now[0] += 50.0
        return [Row(case, OURS, "ok")]

    order = {"suite": "quick", "minutes": 1.0, "threads": 1, "providers": [OURS]}
    order["cases"] = [case.fields() for case in cases]
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(order)])
    monkeypatch.setattr(worker, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker.machine, "pin", lambda threads: None)
    monkeypatch.setattr(worker.machine, "roof", lambda threads: PEAKS)
    monkeypatch.setattr(runner, "measure", measure)
    worker.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line.get("status") for line in lines] == [None, "ok", "ok", "ok", "late"]
    assert lines[-1]["reason"] == "the time of the suite was over"
    efforts = [case.effort for case in cases]
    assert shares == pytest.approx([60 * efforts[0] / sum(efforts), 10 * efforts[1] / sum(efforts[1:]), 0])


def test_statistics_are_of_the_samples_and_ratios_of_pairs():
    made = row("peer", [2.0, 4.0, 9.0, 8.0, 5.0], ours=[1.0, 4.0, 3.0, 2.0, 2.0])
    assert (made.minimum, made.quartile_1, made.median, made.quartile_3) == (2.0, 4.0, 5.0, 8.0)
    assert (made.ratio_quartile_1, made.ratio, made.ratio_quartile_3) == (2.0, 2.5, 3.0)


def test_the_roof_is_the_slower_of_products_and_reading_the_weights():
    wide, narrow = Case("lstm", 64, 10, 64, 64), Case("lstm", 1, 10, 64, 64)
    seconds, name = machine.bound(wide, wide.flops(640), PEAKS)
    assert (name, seconds) == ("compute", pytest.approx(2 * 640 * 4 * 64 * 128 / 100e9))
    seconds, name = machine.bound(narrow, narrow.flops(10), PEAKS)
    assert (name, seconds) == ("memory", pytest.approx(10 * 4 * 64 * 64 * 4 / 20e9))


def test_the_best_peer_is_a_peer():
    ours, slow = two(2.0)
    other = row("torch.nn CUDA", [1e-5] * 3, ours=ours.samples, peer=False)
    assert results.best_peer({r.provider: r for r in (ours, slow, other)}) is slow


@pytest.mark.skipif(not memory.CLEAR.exists(), reason="needs /proc of Linux")
def test_memory_sees_what_a_call_holds_at_its_peak():
    size = 64 << 20
    prepared = Prepared(lambda: sum(bytearray(b"1") * size) and None, dict)
    assert 0.9 * size < memory.peak(prepared) < 3 * size  # the kernel counts pages in batches


def test_memory_rows_have_bytes():
    rows = runner.measure(replace(SMALL, mode="memory"), {n: PROVIDERS[n] for n in (OURS, "torch.nn")})
    assert all(r.unit == "bytes" and r.status == "ok" and r.held_bytes > 0 and r.gigaflops is None for r in rows)


# Results --------------------------------------------------------------------------------------------------------------


def test_results_survive_the_file(tmp_path):
    found = measured(*two(0.5), Row(SMALL, "absent one", "absent", "not installed"))
    assert results.read(save(tmp_path / "a.jsonl", found)) == found


def test_a_line_that_is_no_result_is_named(tmp_path):
    path = save(tmp_path / "a.jsonl", measured(*two(2.0)))
    path.write_text(path.read_text() + '{"kind": "measurement"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not a result"):
        results.read(path)


@pytest.mark.parametrize(("geomean", "worst", "passes"), [(0.9, 0.4, True), (1.1, 0.4, False), (0.9, 0.6, False)])
def test_the_gate_has_both_thresholds(geomean, worst, passes):
    found = measured(*two(0.5), *two(2.0, replace(SMALL, T=7)))  # geometric mean 1
    assert (results.gate(found, geomean, worst) == []) is passes


def test_bytes_do_not_count_as_speed():
    case = replace(SMALL, mode="memory")
    found = measured(*two(2.0), *two(0.1, case))
    assert list(results.ratios(found)) == [SMALL]
    assert "0.10x LOSS" in show.cells(found)[2]


def test_the_gate_does_not_pass_without_a_comparison():
    assert results.gate(measured(two(2.0)[0]), None, None) == ["no case has both fastcells and a peer to compare"]


def test_compare_tells_a_move_from_noise():
    other = replace(SMALL, T=9)
    before = measured(row(OURS, [1.0, 1.1, 1.2]), row(OURS, [1.0, 1.5, 2.0], other))
    after = measured(row(OURS, [0.5, 0.6, 0.7]), row(OURS, [1.2, 1.6, 1.9], other))
    assert [(m.case, m.moved, m.change < 1) for m in results.compare(before, after)] == [
        (SMALL, True, True),
        (other, False, False),
    ]


def test_compare_is_free_of_the_machine_s_drift():
    """A machine twice as slow moves nothing; a provider twice as slow beside a steady one does."""
    before = measured(*two(2.0))
    slower = [replace(r, samples=[2 * s for s in r.samples]) for r in two(2.0)]
    worse = [replace(r, samples=[2 * s for s in r.samples]) if r.provider == OURS else r for r in two(2.0)]
    changes = {m.provider: (round(m.change, 6), m.moved) for m in results.compare(before, measured(*slower))}
    assert changes == {OURS: (1.0, False), "torch.nn": (2.0, True)}
    changes = {m.provider: (round(m.change, 6), m.moved) for m in results.compare(before, measured(*worse))}
    assert changes == {OURS: (2.0, True), "torch.nn": (1.0, False)}
    absolute = results.compare(before, measured(*slower), reference=None)
    assert {m.provider: m.moved for m in absolute} == {OURS: True, "torch.nn": True}


def test_training_a_single_step_is_compared_with_torch_alone():
    for mode, name in (("training", "torch.nn"), ("inference", "JAX scan")):
        case = replace(SMALL, T=1, mode=mode)
        rows = [*two(2.0, case), row("JAX scan", [0.5e-3] * 3, case, [1e-3] * 3)]
        assert results.best_peer({r.provider: r for r in rows}).provider == name
        assert (results.SINGLE_STEP in show.summary(measured(*rows))) is (mode == "training")


def test_the_report_marks_losses_and_has_plots(tmp_path):
    sweep = [replace(SMALL, T=t) for t in (2, 4, 8, 16)]
    rows = [r for k, case in enumerate(sweep) for r in two(0.5 + k, case)]
    for r in rows:
        r.share, r.roof = 0.5, "compute"
    paths = list(report.write(measured(*rows), tmp_path))
    assert {path.name for path in paths} == {"report.md", "speedup.png", "roof.png", "scaling.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths if path.suffix == ".png")
    text = (tmp_path / "report.md").read_text()
    assert text.count("LOSS") == 1
    assert "**0.50x LOSS**" in text
    assert "![scaling](scaling.png)" in text


def test_a_provider_has_one_colour_in_all_plots_of_growth():
    rows = []
    for mode, others in (("inference", ("torch.nn", "ONNX Runtime", "JAX scan")), ("training", ("JAX scan",))):
        for case in [replace(SMALL, T=t, mode=mode) for t in (2, 4, 8, 16)]:
            rows += [row(OURS, [1e-3], case), *(row(name, [2e-3], case) for name in others)]
    lines = [line for panel in report.scaling(measured(*rows)).axes for line in panel.lines]
    seen = {(line.get_label(), line.get_color()) for line in lines}
    assert len(lines) == 4 + 2
    assert len(seen) == len(dict(seen)) == 4


@pytest.mark.parametrize("name", FIGURES)
def test_figures_renew_the_readme(tmp_path, name):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n")
    cases = [replace(SMALL, T=t, cell=cell, mode=m) for cell in PLAIN for t in (2, 4, 8, 16) for m in CALLS]
    cases += [replace(SMALL, mode="lengths")]
    rows = [r for case in cases for r in two(2.0, case)]
    rows.append(row("plain layer", [0.9e-3] * 3, cases[-1], [1e-3] * 3, peer=False))
    for _ in range(2):  # the second time as well
        paths = list(figures.write(name, measured(*rows), tmp_path))
        text = readme.read_text()
        assert paths[-1] == readme
        assert text.startswith("before\n<!--")
        assert text.endswith("-->\nafter\n")
        assert "old" not in text
        assert text.count("measured: float32 multiply-adds") == 1
    shown = re.findall(r"\]\((.*?)\)", text)
    assert len(shown) == 2
    assert all((tmp_path / path).exists() for path in shown)
    if name != "scaling":
        assert "2.00x" in text
    assert ("1.11x" in text) is (name == "variants")


# Command line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "run huge",
        "run core --quick",
        "run --threads 0",
        "run --threads 100000",
        "run --provider nobody",
        "run --shape 9,9,9",
        "run --shape 9,9,9,0",
        "run --shape 99999999999,1,1,1",
        "run --shape 1,1,1,99999999 --mode inference --provider torch.nn",
        "run --mode memory --shape 1,1,64,64 --quick --dtype float64 --cell tree",
        "run --cell tree",
        "run --geomean 1.0",
        "run --gate --worst much",
        "run --quick --out /dev",
        "compare a.jsonl",
        "compare /nowhere/a.jsonl /nowhere/b.jsonl",
        "report /nowhere/a.jsonl",
        "list huge",
        "figures core",
        "figures scaling --results /nowhere/a.jsonl",
    ],
)
def test_bad_arguments_get_one_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_figures_take_no_results_of_other_cases(tmp_path, capsys):
    path = save(tmp_path / "a.jsonl", measured(*two(2.0)))
    with pytest.raises(SystemExit) as ended:
        main(["figures", "core_two_threads", "--results", str(path)])
    assert ended.value.code == 2
    count = len(FIGURES["core_two_threads"].cases())
    assert f"{count} cases of core_two_threads are not in" in capsys.readouterr().err


def test_results_stay_until_there_are_others(tmp_path, capsys):
    path = save(tmp_path / "a.jsonl", measured(*two(2.0)))
    before = path.read_text()
    main(["run", "--shape", "1,1,4,4", "--cell", "rnn", "--mode", "inference", "--minutes", "0", "--out", str(path)])
    assert "nothing was measured" in capsys.readouterr().out
    assert path.read_text() == before


def test_a_reader_that_has_enough_gets_no_traceback(tmp_path):
    command = f"{sys.executable} -m benchmarks list core | head -1; {sys.executable} -m benchmarks list > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "cannot write: No space left on device"


def test_list_names_suites_modes_and_providers(capsys):
    main(["list"])
    text = capsys.readouterr().out
    assert all(f" {name} " in text for name in (*SUITES, *MODES, *PROVIDERS))


def test_compare_and_report_from_the_command_line(tmp_path, capsys):
    a, b = save(tmp_path / "a.jsonl", measured(*two(2.0))), save(tmp_path / "b.jsonl", measured(*two(9.0)))
    main(["compare", str(a), str(b)])
    assert "1 of 1 measurements moved" in capsys.readouterr().out
    main(["report", str(a), "--out", str(tmp_path / "folder")])
    assert str(tmp_path / "folder" / "report.md") in capsys.readouterr().out


@pytest.mark.parametrize(("content", "named"), [(b"", "no measurement"), (b"\xff\n", "line 1: not a result")])
def test_what_has_no_results_is_not_reported(content, named, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["report", str(path)])
    assert re.search(f"{named}.*{path}|{path}.*{named}", capsys.readouterr().err)
    assert [*tmp_path.iterdir()] == [path]


def test_compare_needs_the_reference_in_both_files(tmp_path, capsys):
    path = str(save(tmp_path / "a.jsonl", measured(*two(2.0))))
    with pytest.raises(SystemExit):
        main(["compare", path, path, "--reference", "nobody"])
    assert f"there is no nobody in {path!r}" in capsys.readouterr().err
    main(["compare", path, path, "--reference", "nobody", "--absolute"])


def test_a_case_that_is_asked_for_twice_is_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(commands, "execute", lambda cases, *_: seen.extend(cases) or (None, True))
    with pytest.raises(SystemExit):
        main(
            ["run", "--shape", "2,1,1,1", "--shape", "2,1,1,1", "--cell", "rnn", "--cell", "rnn", "--mode", "inference"]
        )
    assert len(seen) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is a signal on POSIX")
def test_a_run_that_is_stopped_leaves_valid_results(tmp_path):
    path = tmp_path / "a.jsonl"
    command = [sys.executable, "-m", "benchmarks", "run", "--quick", "--provider", "torch.nn", "--out", str(path)]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background
    )
    end = monotonic() + 100
    while process.poll() is None and monotonic() < end and not (path.exists() and path.read_text().count("\n") > 2):
        sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "up to where it was stopped" in output
    found = results.read(path)
    assert found.machines.keys() == {1}
    assert 2 <= len(found.rows) < 2 * len(SUITES["quick"].cases())
    assert found.rows[0].status == "ok"
