"""The tasks learn, treat all layers alike, and their command line answers bad arguments in one line."""

import sys
from collections import Counter
from dataclasses import replace
from functools import partial, partialmethod
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("rich", reason="the tasks need pip install .[tasks]")
pytest.importorskip("matplotlib", reason="the tasks need pip install .[tasks]")
pytest.importorskip("sklearn", reason="the tasks need pip install .[tasks]")
pytest.importorskip("statsmodels", reason="the tasks need pip install .[tasks]")

from benchmarks import tasks
from benchmarks.__main__ import main
from benchmarks.tasks import integrations, lab, layers, parallel, series, show
from benchmarks.tasks.chargen import Chargen
from benchmarks.tasks.classify import Classify, utterances
from benchmarks.tasks.compare import Compare, counted, formula
from benchmarks.tasks.forecast import Forecast
from benchmarks.tasks.gradients import Gradients, through_time
from benchmarks.tasks.memory import Adding, Memory
from benchmarks.tasks.parallel import Parallel
from benchmarks.tasks.scratch import Scratch
from benchmarks.tasks.sentiment import PAD, UNKNOWN, Classifier, Sentiment, reviews, tokens
from benchmarks.tasks.seq2seq import Seq2seq
from benchmarks.tasks.states import States
from benchmarks.tasks.sum import Sum


class Small(Sentiment):
    """The same task with a model that trains in a second."""

    learning_rate = 1e-2

    def model(self, layer):
        words = len(self.vocabulary) + 2
        return Classifier(layer, words, embedding=16, hidden=16, pooling=self.pooling)


#: Each task in a size that trains in a second.
SMALL = {
    "sum": partial(Sum, batches=10),
    "forecast": Forecast,
    "compare": Compare,
    "sentiment": partial(Small, limit=200),
    "chargen": partial(Chargen, limit=100, streams=8),
    "seq2seq": partial(Seq2seq, size=128),
    "memory": partial(Memory, lengths=(5, 10), batches=5),
    "gradients": partial(Gradients, batches=5),
    "states": partial(States, limit=200),
    "classify": Classify,
    "scratch": Scratch,
    "parallel": partial(Parallel, limit=300),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(task, layers, epochs):
    runs = lab.prepare(task, layers)
    assert list(lab.train(runs, epochs)) == list(range(1, epochs + 1))
    return runs


# Learning


@pytest.mark.parametrize(
    ("make", "epochs", "share"),
    [
        (partial(Sum, batches=25), 8, 0.3),
        (partial(Forecast, layers=1), 20, 0.7),
        (partial(Forecast, cell="rnn", layers=1), 20, 0.7),
        (partial(Forecast, cell="gru", layers=1), 20, 0.7),
        (partial(Forecast, cell="relu-lstm"), 20, 0.85),
        (partial(Forecast, data="co2", layers=1), 6, 0.5),
        (partial(Chargen, limit=600), 3, 0.55),
        (partial(Adding, cell="lstm", length=20), 12, 0.25),
        (partial(Scratch), 20, 0.7),
    ],
    ids=["sum", "forecast", "compare-rnn", "compare-gru", "relu", "co2", "chargen", "memory", "scratch"],
)
def test_error_falls_below_a_share_of_the_simple_answers(make, epochs, share):
    (run,) = trained(make(), ["fastcells"], epochs)
    assert run.epochs[-1].metric < share * next(iter(run.task.baselines.values()))


@pytest.mark.parametrize(
    ("make", "epochs", "margin"),
    [
        (partial(Small, limit=3000), 8, 0.15),  # guessing has a standard deviation of 0.024
        (partial(Seq2seq, size=2000), 4, 0.4),
        (Classify, 10, 0.5),
        (partial(States, limit=3000), 8, 0.1),
    ],
    ids=["sentiment", "seq2seq", "classify", "states"],
)
def test_accuracy_beats_the_simple_answer(make, epochs, margin):
    (run,) = trained(make(), ["fastcells"], epochs)
    assert run.epochs[-1].metric > next(iter(run.task.baselines.values())) + margin


def test_the_plain_rnn_forgets_what_the_lstm_keeps():
    """The gradient by the first input, against that by the last: it would have to teach the layer to remember."""
    rnn, lstm = (through_time("fastcells", cell, 1.0, seed=0) for cell in ("rnn", "lstm"))
    assert rnn[0] < 1e-3 * rnn[-1]
    assert lstm[0] > 1e-2 * lstm[-1]


# All layers alike

ALIKE = {
    "sum": partial(Sum, batches=5),
    "forecast": Forecast,
    "forecast-relu": partial(Forecast, cell="relu-lstm"),
    "sentiment": partial(Small, limit=200),
    "sentiment-last": partial(Small, limit=200, pooling="last"),
    "sentiment-attention": partial(Small, limit=200, pooling="attention"),
    "chargen": partial(Chargen, limit=60, streams=8),
    "seq2seq": partial(Seq2seq, size=128),
    "memory": partial(Adding, cell="lstm", length=20, batches=5),
    "gradients": lambda: Gradients(batches=5).tasks["GRU, clipped"],
    "states": partial(States, limit=200),
    "classify": Classify,
}


@pytest.mark.parametrize("name", ALIKE)
def test_layers_train_alike(name):
    """In float64 to rounding; in float32 as close to that as torch.nn gets, give or take a factor.

    A step of training multiplies the rounding of those before it, by a factor that is the task's own, so that no fixed
    tolerance fits all: torch.nn's own distance from float64 is the measure, over the same few steps.
    """

    def exact():
        task = ALIKE[name]()
        task.dtype = torch.float64
        return task

    names = ["torch", "fastcells"] if "relu" in name else ["torch", "fastcells", "reference"]
    torch64, *others = trained(exact(), names, epochs=2)
    for other in others:
        assert max(lab.loss_differences(torch64, other)) < 1e-9
    torch32, fast32 = trained(ALIKE[name](), ["torch", "fastcells"], epochs=2)
    assert type(torch32.model) is type(fast32.model)
    assert fast32.epochs[-1].training_loss < fast32.epochs[0].training_loss
    allowed = 10 * max(lab.loss_differences(torch32, torch64)) + 1e-6
    assert max(lab.loss_differences(fast32, torch64)) < allowed


@pytest.mark.parametrize("cell", layers.CELLS)
@pytest.mark.parametrize("lengths", [None, [3, 1, 5, 4]], ids=["padded", "lengths"])
def test_layers_are_called_alike(cell, lengths):
    """Same state_dict, results and gradients from torch.nn, fastcells and the reference, stacked and bidirectional."""
    torch.manual_seed(0)
    x, found = torch.randn(4, 5, 3, dtype=torch.float64), {}
    weights = None
    for name in layers.LAYERS:
        layer = layers.layer_class(name, cell)(3, 6, num_layers=2, batch_first=True, bidirectional=True).double()
        weights = weights or layer.state_dict()
        layer.load_state_dict(weights)
        given = x.clone().requires_grad_()
        y, state = layer(given, lengths=None if lengths is None else torch.tensor(lengths))
        states = state if isinstance(state, tuple) else (state,)
        sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in (y, *states)).backward()
        found[name] = [y, *states, given.grad, *(p.grad for p in layer.parameters())]
    for name in "fastcells", "reference":
        for ours, theirs in zip(found[name], found["torch"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_scratch_needs_no_torch_and_agrees():
    """Layer, loss and optimizer in NumPy: the losses of 10 epochs agree to 1e-6, and by far."""
    torch_run, fast, scratch = trained(Scratch(), Scratch.layers, epochs=10)
    assert isinstance(scratch.adam.parameters["weight_hh_l0"], np.ndarray)
    assert max(lab.loss_differences(torch_run, scratch)) < 1e-9
    assert max(lab.loss_differences(torch_run, fast)) < 1e-9


def test_two_processes_train_as_one():
    task = Parallel(limit=300)
    runs = two, one = lab.prepare(task, ["fastcells", "one process"])
    try:
        for _ in lab.train(runs, 2):
            pass
        assert max(lab.loss_differences(two, one)) < 1e-5
        batch = task.training(0)[0]
        together, alone = parallel.gradients(two, batch), parallel.gradients(one, batch)
        assert set(together) == set(alone) == {name for name, _ in one.model.named_parameters()}
        assert parallel.difference(together, alone) < 1e-4
    finally:
        for run in runs:
            run.close()
    assert not any(worker.is_alive() for worker in two.workers)


def test_a_process_that_fails_is_reported():
    (run,) = lab.prepare(Parallel(limit=100), ["fastcells"])
    try:
        with pytest.raises(RuntimeError, match=r"parallel: a process failed\n.*Traceback"):
            run.ask("train", [((torch.zeros(2, 3), torch.zeros(2)), torch.zeros(2))])
    finally:
        run.close()


# Data


def test_reviews_are_all_there():
    rated = reviews()
    assert len(rated) == 10_605
    assert all(text.strip() and -4 <= rating <= 4 for text, rating in rated)


def test_utterances_are_all_there():
    for part, count in ("train", 270), ("test", 370):
        found = utterances(part)
        assert len(found) == count
        assert {speaker for _, speaker in found} == set(range(9))
        assert all(frames.shape[1] == 12 and 7 <= len(frames) <= 29 for frames, _ in found)


@pytest.mark.parametrize("name", series.NAMES)
def test_windows_know_nothing_of_the_validation_part(name):
    given = series.load(name)
    windows = series.Windows(given)
    training = windows.inputs[: windows.training]
    assert training.min() == 0
    assert training.max() <= 1
    np.testing.assert_allclose(windows.in_unit(windows.targets), given.values[given.window :], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        windows.in_unit(windows.inputs[3, :, 0]), given.values[3 : 3 + given.window], rtol=1e-5, atol=1e-4
    )
    later = replace(given, values=given.values.copy())
    later.values[windows.split :] *= 10
    assert torch.equal(series.Windows(later).inputs[: windows.training], training)


def test_forecasts_further_ahead_read_forecasts():
    task = Forecast(layers=1)
    (run,) = trained(task, ["fastcells"], 1)
    forecasts, errors = task.ahead(run, 3)
    one, error = task.ahead(run, 1)
    np.testing.assert_array_equal(forecasts[:1], one)
    np.testing.assert_allclose(np.abs(error).mean(), run.epochs[-1].metric, rtol=1e-5)
    assert np.isnan(errors[2, -2:]).all()
    assert not np.isnan(errors[2, :-2]).any()
    assert not np.allclose(forecasts[1, :-1], one[0, 1:])  # which read the measured value in between


def test_tokens_are_lower_case_words_and_marks():
    assert tokens("It's GOOD, isn't it?") == ["it", "'", "s", "good", ",", "isn", "'", "t", "it", "?"]


def test_vocabulary_comes_from_the_training_part():
    task = Sentiment(seed=0, limit=500)
    counts = Counter(number for (inputs, _), _ in task.training(0) for number in inputs.flatten().tolist())
    assert set(task.vocabulary.values()) == set(counts) - {PAD, UNKNOWN}
    assert all(counts[number] > 1 for number in task.vocabulary.values())
    assert any((inputs == UNKNOWN).any() for (inputs, _), _ in task.validation())


def test_an_epoch_has_every_snippet_once_in_an_order_of_its_seed():
    task = Sentiment(seed=0, limit=500)
    rows = [
        [tuple(row[:n].tolist()) for (x, lengths), _ in task.training(seed) for row, n in zip(x, lengths, strict=True)]
        for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len(rows[0]) == 425
    assert Counter(rows[0]) == Counter(rows[2])


def test_stretches_go_on_where_the_ones_before_ended():
    task = Chargen(limit=100, streams=8)
    batches = task.training(0)
    for ((_,), targets), ((inputs,), _) in pairwise(batches):
        assert torch.equal(targets[:, -1], inputs[:, 0])


def test_a_carried_state_is_that_of_one_long_call():
    task = Chargen(limit=100, streams=8)
    model = task.model(layers.layer_class("fastcells", "lstm")).eval()
    with torch.no_grad():
        stretches = [inputs for (inputs,), _ in task.training(0)[:3]]
        pieces = torch.cat([model(inputs) for inputs in stretches], dim=1)
        task.start(model)
        torch.testing.assert_close(pieces, model(torch.cat(stretches, dim=1)), rtol=1e-5, atol=1e-5)


def test_an_answer_right_in_every_character_is_what_the_decoder_writes():
    (run,) = trained(Seq2seq(size=512), ["fastcells"], 2)
    run.model.eval()
    ((inputs, targets),) = run.task.validation()
    written, _ = run.model.translate(*inputs[:2])
    right = (run.output(inputs).argmax(dim=2) == targets).all(dim=1)
    assert torch.equal(right, (written == targets).all(dim=1))


@pytest.mark.parametrize("cell", layers.CELLS)
def test_parameters_are_as_many_as_the_formula_says(cell):
    (run,) = lab.prepare(Compare(cell=cell).tasks[cell.upper()], ["fastcells"])
    assert counted(run) == formula(cell, inputs=2, hidden=32)


@pytest.mark.parametrize("cell", layers.CELLS)
def test_the_reference_steps_through_the_states_that_the_layer_shows(cell):
    task = States(limit=100, cell=cell)
    (run,) = trained(task, ["fastcells"], 1)
    found = task.read(run)
    count = len(tokens(task.text))
    assert all(len(values) == count for values in found.values())
    if cell == "lstm":
        gated = found["output gate o"] * np.tanh(found["cell state"])
        np.testing.assert_allclose(gated, found["hidden state"], rtol=1e-4, atol=1e-6)


# The mechanism


def test_two_runs_of_one_layer_are_the_same():
    """Weights, batches and dropout are equal, so that what differs between two layers is the layers'."""
    a, b = trained(Small(limit=400), ["torch", "torch"], 2)
    assert lab.loss_differences(a, b) == [0, 0]


def test_epochs_alternate(monkeypatch):
    order = []
    train = lab.Run.train
    monkeypatch.setattr(lab.Run, "train", lambda run, *rest: (order.append(id(run)), train(run, *rest))[1])
    a, b = trained(Small(limit=100), ["torch", "torch"], 2)
    assert order == [id(a), id(b), id(a), id(b)]


def test_a_run_with_a_limit_stops_early():
    a, b = lab.prepare(Small(limit=100), ["torch", "torch"])
    b.limit = 1
    for _ in lab.train([a, b], 3):
        pass
    assert [len(run.epochs) for run in (a, b)] == [3, 1]
    assert lab.loss_differences(a, b) == [0]


def pair(*seconds_loss_metric, task):
    """Two runs whose epochs are given."""
    runs = [lab.Run(name, task, torch.nn.Linear(1, 1)) for name in ("torch", "fastcells")]
    for run, epochs in zip(runs, seconds_loss_metric, strict=True):
        run.epochs = [lab.Epoch(*epoch) for epoch in epochs]
    return runs


def test_differences_and_speedups_pair_the_epochs():
    a, b = pair(
        [(6.0, 0.5, 0.7, 0.5), (4.0, 0.5, 0.75, 0.5)],
        [(3.0, 0.75, 0.7, 0.5), (1.0, 0.5, 0.25, 0.5)],
        task=Small(limit=20),
    )
    assert lab.loss_differences(a, b) == [0.25, 0.5]
    assert lab.speedups(a, b) == [2, 4]
    assert "3.00x" in "\n".join(show.summary([a, b]))


@pytest.mark.parametrize(
    ("make", "metrics", "expected"),
    [
        (partial(Small, limit=20), ((0.6, 0.9), (0.7, 0.8)), (0.8, 6, 4)),
        (partial(Sum, batches=1), ((0.6, 0.3), (0.7, 0.4)), (0.4, 6, 4)),
    ],
    ids=["higher", "lower"],
)
def test_time_to_the_same_metric_is_to_the_best_that_both_reach(make, metrics, expected):
    a, b = pair(*([(s, 0.5, 0.5, m) for m in ms] for s, ms in zip((3.0, 2.0), metrics, strict=True)), task=make())
    assert lab.seconds_to_same(a, b) == expected


# The command line


@pytest.fixture
def quick(monkeypatch):
    """Each task in its small size: the class, with the arguments that make it small filled in."""
    load = tasks.load

    def small(name):
        made = SMALL[name]
        given = made.keywords if isinstance(made, partial) else {}
        kind = made.func if isinstance(made, partial) else made
        assert issubclass(kind, load(name))

        class Little(kind):
            __init__ = partialmethod(kind.__init__, **given)

        return Little

    monkeypatch.setattr(tasks, "load", small)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "parallel"])
def test_command_shows_tables_and_plot(name, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["tasks", name, "--epochs", "2"])
    said = capsys.readouterr().out
    assert "of simple answers" in said
    assert "speed-up" in said
    assert f"results/{name}.png" in said
    assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "cell"), [("memory", "gru"), ("states", "gru"), ("states", "rnn"), ("seq2seq", "lstm"), ("chargen", "gru")]
)
def test_other_cells(name, cell, quick, tmp_path):
    main(["tasks", name, "--epochs", "1", "--cell", cell, "--layer", "fastcells", "--plot", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 0


def test_command_runs_two_processes(quick, tmp_path, capsys):
    main(["tasks", "parallel", "--epochs", "1", "--layer", "fastcells", "--plot", str(tmp_path / "a.png")])
    assert "2 processes" in capsys.readouterr().out
    assert (tmp_path / "a.png").stat().st_size > 0


def test_one_layer_is_compared_to_none(quick, tmp_path, capsys):
    main(["tasks", "sentiment", "--epochs", "2", "--layer", "torch", "--plot", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "speed-up" not in said
    assert "fastcells" not in said


def test_table_fits_the_screen(quick, tmp_path, capsys):
    main(["tasks", "sentiment", "--epochs", "2", "--plot", str(tmp_path / "a.png")])
    assert all(len(line) <= 80 for line in capsys.readouterr().out.split("\n\n")[1].splitlines())


def test_all_writes_one_table(quick, tmp_path, monkeypatch, capsys):
    few = ["sum", "memory"]
    monkeypatch.setattr(tasks, "TASKS", {name: tasks.TASKS[name] for name in few})
    main(["tasks", "all", "--epochs", "1", "--plot", str(tmp_path), "--table", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == few
    assert all(len(line.split("|")) == len(show.HEADINGS) + 2 for line in lines)
    assert "reference" in capsys.readouterr().out
    assert all((tmp_path / f"{name}.png").exists() for name in few)


@pytest.mark.parametrize("name", ["forecast", "compare"])
@pytest.mark.parametrize(("data", "named"), [("co2", "CO2"), ("sine", "sine"), ("sunspots", "sunspots")])
def test_table_names_the_series(name, data, named, tmp_path):
    table = tmp_path / "new" / "table.md"
    given = {"data": data, "plot": tmp_path / "a.png", "table": table, "epochs": 1, "layer": "torch"}
    main(["tasks", name, *(word for option, value in given.items() for word in (f"--{option}", str(value)))])
    assert named in table.read_text().splitlines()[-1].split("|")[2]


def test_a_table_is_not_written_into_what_is_no_text(tmp_path, capsys):
    path = tmp_path / "table.md"
    path.write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["tasks", "sum", "--plot", str(tmp_path / "a.png"), "--table", str(path)])
    assert "is no text in UTF-8" in capsys.readouterr().err
    assert path.read_bytes() == b"\x89PNG"


def test_a_layer_named_twice_trains_once(quick, tmp_path, capsys):
    main(["tasks", "sum", "--epochs", "1", *["--layer", "torch"] * 2, "--plot", str(tmp_path / "a.png")])
    assert "speed-up" not in capsys.readouterr().out


def test_table_goes_between_its_marks(tmp_path):
    path = tmp_path / "README.md"
    other = "".join(show.marks("other"))
    begin, end = show.marks("lab")
    path.write_text(f"{other}before\n{begin}old\n{end}\nafter\n")
    for _ in range(2):
        show.write_table("| new |\n", path)
    assert path.read_text() == f"{other}before\n{begin}\n| new |\n\n{end}\nafter\n"


def test_without_a_name_the_tasks_are_listed(capsys):
    main(["tasks"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*tasks.TASKS, *integrations.LIBRARIES]
    assert list(tasks.TASKS) == list(SMALL)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["tasks", "nonsense"], "nonsense"),
        (["tasks", "sentiment", "--layer", "keras"], "--layer"),
        (["tasks", "sentiment", "--cell", "mgu"], "--cell"),
        (["tasks", "sentiment", "--cell", "relu-lstm"], "relu-lstm"),
        (["tasks", "forecast", "--cell", "relu-lstm", "--layer", "reference"], "relu-lstm"),
        (["tasks", "sentiment", "--epochs", "0"], "--epochs"),
        (["tasks", "sentiment", "--epochs", "many"], "--epochs"),
        (["tasks", "sentiment", "--seed", "-1"], "--seed"),
        (["tasks", "sentiment", "--threads", "0"], "--threads"),
        (["tasks", "sentiment", "--threads", "100000"], "--threads"),
        (["tasks", "sentiment", "--colour"], "--colour"),
        (["tasks", "sentiment", "--plot", "curve.tsv"], "--plot"),
        (["tasks", "sentiment", "--plot", "/dev/null/curve.png"], "--plot"),
        (["tasks", "sentiment", "--data", "sine"], "--data"),
        (["tasks", "forecast", "--data", "cosine"], "cosine"),
        (["tasks", "all", "--data", "sine"], "--data"),
        (["tasks", "states", "--text", " "], "--text"),
        (["tasks", "sum", "--table", "/dev/null/table.md"], "--table"),
        (["tasks", "sum", "--table", "."], "--table"),
        (["tasks", "integrations", "--table", "/dev/null/table.md"], "--table"),
    ],
    ids=" ".join,
)
def test_bad_arguments_get_one_line(arguments, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert named in said.err


@pytest.mark.parametrize(
    ("module", "task", "extra"),
    [("rich.console", "sentiment", "bench"), ("sklearn.preprocessing", "forecast", "tasks")],
    ids=["rich", "sklearn"],
)
def test_missing_package_names_the_extra(module, task, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(SystemExit, match=rf"^{package} is not installed: pip install \.\[{extra}\]$"):
        main(["tasks", task])
