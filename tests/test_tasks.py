"""The tasks learn, treat both layers alike, and their command line answers bad arguments in one line."""

import sys
from collections import Counter
from functools import partial

import pytest
import torch

pytest.importorskip("rich", reason="the tasks need pip install .[bench]")
pytest.importorskip("matplotlib", reason="the tasks need pip install .[bench]")

from benchmarks import tasks
from benchmarks.__main__ import main
from benchmarks.tasks import lab, show
from benchmarks.tasks.sentiment import PAD, UNKNOWN, Classifier, Sentiment, reviews, tokens


class Small(Sentiment):
    """The same task with a model that trains in a second."""

    learning_rate = 1e-2

    def model(self, layer):
        return Classifier(layer, len(self.vocabulary) + 2, embedding=16, hidden=16)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(layers, limit, epochs, cell="lstm"):
    runs = lab.prepare(Small(seed=0, limit=limit), layers, cell, seed=0)
    assert list(lab.train(runs, epochs, seed=0)) == list(range(1, epochs + 1))
    return runs


def test_reviews_are_all_there():
    rated = reviews()
    assert len(rated) == 10_605
    assert all(text.strip() and -4 <= rating <= 4 for text, rating in rated)


def test_tokens_are_lower_case_words_and_marks():
    assert tokens("It's GOOD, isn't it?") == ["it", "'", "s", "good", ",", "isn", "'", "t", "it", "?"]


def test_vocabulary_comes_from_the_training_part():
    task = Sentiment(seed=0, limit=500)
    counts = Counter(number for inputs, _ in task.training(0) for number in inputs.flatten().tolist())
    assert set(task.vocabulary.values()) == set(counts) - {PAD, UNKNOWN}
    assert all(counts[number] > 1 for number in task.vocabulary.values())
    assert any((inputs == UNKNOWN).any() for inputs, _ in task.validation())


def test_an_epoch_has_every_snippet_once_in_an_order_of_its_seed():
    task = Sentiment(seed=0, limit=500)
    rows = [
        [tuple(row[row != PAD].tolist()) for inputs, _ in task.training(seed) for row in inputs] for seed in (1, 1, 2)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len(rows[0]) == 425
    assert Counter(rows[0]) == Counter(rows[2])


def test_padding_is_small():
    inputs = [inputs for inputs, _ in Sentiment(seed=0).training(0)]
    assert sum(int((x == PAD).sum()) for x in inputs) < 0.02 * sum(x.numel() for x in inputs)


def test_it_learns():
    """On 3,000 snippets: 15 points of accuracy above the majority, where guessing has a standard deviation of 2.4."""
    (run,) = trained(["torch"], limit=3000, epochs=8)
    assert run.epochs[-1].metric > run.task.baseline + 0.15
    assert run.epochs[-1].training_loss < run.epochs[0].training_loss - 0.2


def test_two_runs_of_one_layer_are_the_same():
    """Weights, batches and dropout are equal, so that what differs between two layers is the layers'."""
    a, b = trained(["torch", "torch"], limit=400, epochs=2)
    assert lab.loss_differences(a, b) == [0, 0]


@pytest.mark.parametrize("cell", lab.CELLS)
def test_fastcells_trains_like_torch(cell):
    pytest.importorskip("fastcells.nn")
    a, b = trained(["torch", "fastcells"], limit=400, epochs=3, cell=cell)
    assert type(a.model.recurrent) is not type(b.model.recurrent)
    assert a.epochs[-1].training_loss < a.epochs[0].training_loss
    assert max(lab.loss_differences(a, b)) < 1e-5


def test_epochs_alternate(monkeypatch):
    order = []
    train = lab.Run.train
    monkeypatch.setattr(lab.Run, "train", lambda run, *rest: (order.append(id(run)), train(run, *rest))[1])
    a, b = trained(["torch", "torch"], limit=100, epochs=2)
    assert order == [id(a), id(b), id(a), id(b)]


def test_differences_and_speedups_pair_the_epochs():
    a, b = (lab.Run(name, Sentiment(0, limit=20), torch.nn.Linear(1, 1)) for name in lab.LAYERS)
    a.epochs = [lab.Epoch(6.0, 0.5, 0.7, 0.5), lab.Epoch(4.0, 0.5, 0.75, 0.5)]
    b.epochs = [lab.Epoch(3.0, 0.75, 0.7, 0.5), lab.Epoch(1.0, 0.5, 0.25, 0.5)]
    assert lab.loss_differences(a, b) == [0.25, 0.5]
    assert lab.speedups(a, b) == [2, 4]
    assert "3.00x" in show.summary([a, b])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tasks, "load", lambda name: partial(Small, limit=200))


@pytest.mark.parametrize("layers", [[], ["--layer", "torch"]], ids=["both", "one"])
def test_command_shows_table_and_plot(layers, quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["tasks", "sentiment", "--epochs", "2", *layers])
    said = capsys.readouterr().out
    assert "majority baseline" in said
    assert ("speed-up" in said) == (not layers)
    assert "results/sentiment.png" in said
    assert all(len(line) <= 80 for line in said.split("\n\n")[1].splitlines())
    assert (tmp_path / "results" / "sentiment.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_name_the_tasks_are_listed(capsys):
    main(["tasks"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(tasks.TASKS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["tasks", "nonsense"], "nonsense"),
        (["tasks", "sentiment", "--layer", "keras"], "--layer"),
        (["tasks", "sentiment", "--cell", "mgu"], "--cell"),
        (["tasks", "sentiment", "--epochs", "0"], "--epochs"),
        (["tasks", "sentiment", "--epochs", "many"], "--epochs"),
        (["tasks", "sentiment", "--seed", "-1"], "--seed"),
        (["tasks", "sentiment", "--threads", "0"], "--threads"),
        (["tasks", "sentiment", "--colour"], "--colour"),
        (["tasks", "sentiment", "--plot", "curve.tsv"], "--plot"),
        (["tasks", "sentiment", "--plot", "/dev/null/curve.png"], "--plot"),
    ],
    ids=" ".join,
)
def test_bad_arguments_get_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert named in said.err


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(SystemExit, match=r"^rich is not installed: pip install \.\[bench\]$"):
        main(["tasks", "sentiment"])
