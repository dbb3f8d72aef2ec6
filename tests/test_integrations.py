"""Models of other libraries give the same results and losses after `convert`, and can be copied, saved and loaded."""

import copy
import pickle
import sys

import pytest
import torch

pytest.importorskip("rich", reason="the tasks need pip install .[tasks]")
pytest.importorskip("matplotlib", reason="the tasks need pip install .[tasks]")

import fastcells
from benchmarks.__main__ import main
from benchmarks.tasks import integrations, show
from benchmarks.tasks.integrations.training import Epoch, Integration, compare
from fastcells.nn import DropIn

#: Each library's model in a size that trains in a second.
SMALL = {
    "sb3_contrib": {"hidden": 16, "steps": 64},
    "darts": {"hidden": 8, "points": 120},
    "pytorch_forecasting": {"hidden": 8, "points": 120},
    "neuralforecast": {"hidden": 8, "points": 120, "steps": 4},
    "speechbrain": {"hidden": 8, "limit": 60},
}

#: What each model says of its data, as a user of the library asks.
ANSWERS = {
    "sb3_contrib": lambda model: values(model.module),
    "darts": lambda model: torch.from_numpy(model.model.predict(6, verbose=False).values()),
    "pytorch_forecasting": lambda model: model.module.predict(model.batches, trainer_kwargs={"logger": False}),
    "neuralforecast": lambda model: torch.from_numpy(model.forecast.predict()["GRU"].to_numpy()),
    "speechbrain": lambda model: model.brain.compute_forward(next(iter(model.batches)), None).detach(),
}


def values(policy):
    """Of observations in which episodes begin at some steps."""
    generator = torch.Generator().manual_seed(0)
    starts = (torch.rand(20, generator=generator) < 0.2).float()
    state = torch.zeros(1, 1, policy.lstm_actor.hidden_size)
    return policy.predict_values(torch.randn(20, 4, generator=generator), (state, state), starts).detach()


@pytest.fixture(params=integrations.LIBRARIES)
def small(request):
    """The name of a library that is there, and the class of its model."""
    # torchaudio, of speechbrain, raises OSError where it was compiled for another build of torch.
    pytest.importorskip(request.param, exc_type=(ImportError, OSError))
    if request.param == "darts":
        pytest.importorskip("pytorch_lightning")
    pytest.importorskip("statsmodels", reason="the tasks need pip install .[tasks]")
    kind = integrations.load(request.param)

    class Small(kind):
        def __init__(self, seed):
            super().__init__(seed, **SMALL[request.param])
            made.append(self)

    made = []
    Small.made = made
    return request.param, Small


@pytest.mark.filterwarnings("ignore")
def test_training_and_answers_are_unchanged(small):
    name, kind = small
    *_, comparison = compare(name, kind, epochs=2)
    before, after = kind.made
    layers = [m for m in after.module.modules() if isinstance(m, (torch.nn.RNNBase, torch.nn.RNNCellBase))]
    assert len(layers) == len(comparison.conversion.swapped) > 0
    assert all(isinstance(layer, DropIn) for layer in layers)
    assert not comparison.conversion.left
    assert not any(isinstance(module, DropIn) for module in before.module.modules())
    assert sum(len(epoch.losses) for epoch in comparison.after) >= 2
    assert comparison.difference() < 1e-5
    assert list(before.module.state_dict()) == list(after.module.state_dict())
    answers = []
    for model in (before, after):
        model.module.eval()
        torch.manual_seed(0)
        answers.append(ANSWERS[name](model))
    assert answers[0].isfinite().all()
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_copies_are_converted_too(small):
    _, kind = small
    torch.manual_seed(0)
    model = kind(0)
    model.convert()
    types = [type(module) for module in model.module.modules()]
    assert [type(module) for module in copy.deepcopy(model.module).modules()] == types
    weights = model.module.state_dict()
    fastcells.revert(model.module)
    assert not any(isinstance(module, DropIn) for module in model.module.modules())
    model.module.load_state_dict(weights, strict=True)


# Lightning


@pytest.fixture
def lightning():
    return pytest.importorskip("pytorch_lightning")


@pytest.fixture
def forecaster(lightning):
    class Forecaster(lightning.LightningModule):
        def __init__(self, hidden=6):
            super().__init__()
            self.save_hyperparameters()
            self.rnn = torch.nn.GRU(3, hidden, batch_first=True)
            self.output = torch.nn.Linear(hidden, 3)

        def forward(self, x):
            return self.output(self.rnn(x)[0])

        def training_step(self, batch, _):
            loss = (self(batch[:, :-1]) - batch[:, 1:]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Forecaster


@pytest.fixture
def fit(lightning, tmp_path):
    """Trains until an epoch, from a checkpoint if one is given; returns the last loss and a checkpoint."""

    def fit(module, epochs, checkpoint=None):
        generator = torch.Generator().manual_seed(0)
        batches = torch.utils.data.DataLoader(torch.randn(16, 8, 3, generator=generator), batch_size=4)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, batches, ckpt_path=checkpoint)
        path = tmp_path / f"{type(module.rnn).__module__}-{epochs}.ckpt"
        trainer.save_checkpoint(path)
        return trainer.callback_metrics["loss"].item(), path

    return fit


@pytest.mark.filterwarnings("ignore")
def test_lightning_checkpoints_go_both_ways(forecaster, fit):
    torch.manual_seed(0)
    theirs = forecaster(hidden=6)
    ours = copy.deepcopy(theirs)
    assert fastcells.convert(ours).swapped == {"rnn": "fastcells.nn.GRU"}
    (their_loss, their_path), (our_loss, our_path) = fit(theirs, 2), fit(ours, 2)
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    # What was saved of one kind is loaded as the other; constructors make torch.nn's layers, as ever.
    loaded = forecaster.load_from_checkpoint(our_path)
    assert type(loaded.rnn) is torch.nn.GRU
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(loaded(x), ours(x))
    # Training goes on from the other's checkpoint, optimizer and all.
    losses = []
    for checkpoint, convert in [(their_path, True), (our_path, False), (our_path, True), (their_path, False)]:
        module = forecaster(hidden=6)
        if convert:
            fastcells.convert(module)
        losses.append(fit(module, 4, checkpoint)[0])
        assert isinstance(module.rnn, DropIn) is convert
    assert losses == pytest.approx([losses[-1]] * 4, rel=1e-5)
    assert losses[0] < their_loss


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_is_converted_between_trainings(forecaster, fit):
    """Which keep the module, and the trainer that it refers to."""
    torch.manual_seed(0)
    theirs = forecaster(hidden=6)
    ours = copy.deepcopy(theirs)
    for module in (theirs, ours):
        fit(module, 1)
    fastcells.convert(ours)
    losses = [fit(module, 1)[0] for module in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert type(copy.deepcopy(ours).rnn) is fastcells.nn.GRU


@pytest.mark.filterwarnings("ignore")
def test_the_subclass_of_a_library_is_saved_as_a_whole(tmp_path):
    deepar = pytest.importorskip("pytorch_forecasting")
    layer = deepar.get_rnn("LSTM")(3, 6, batch_first=True)
    x, lengths = torch.randn(3, 5, 3), torch.tensor([5, 2, 0])
    expected = layer(x, lengths=lengths)
    fastcells.convert(layer)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (layer, torch.load(tmp_path / "layer.pt", weights_only=False), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, DropIn)
        torch.testing.assert_close(other(x, lengths=lengths), expected)


# The command


class Own(Integration):
    """As a library's, with nothing to install."""

    model_name = "a GRU"

    def __init__(self, seed):
        self.module = torch.nn.Sequential(torch.nn.GRU(3, 6))
        self.optimizer = torch.optim.Adam(self.module.parameters())

    def epoch(self):
        losses = []
        for _ in range(3):
            self.optimizer.zero_grad()
            loss = self.module(torch.randn(5, 2, 3))[0].square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return Epoch(losses, 0.5)


class Wrong(Own):
    """Something else in its second epoch."""

    epochs = 0

    def epoch(self):
        self.epochs += 1
        if self.epochs == 2 and isinstance(self.module[0], DropIn):
            return Epoch([1.0, 2.0, 3.0], 0.25)
        return Epoch([1.0, 2.0, 4.0], 0.25)


def test_difference_is_relative_to_the_largest_loss_of_the_epoch():
    *_, same = compare("own", Own, epochs=2)
    assert same.difference() < 1e-6
    assert same.losses(0) != same.losses(1)  # other draws in each epoch
    *_, other = compare("wrong", Wrong, epochs=3)
    assert other.difference() == 0.25
    assert other.losses(1) == (7 / 3, 2)


def test_a_model_without_recurrent_layers_is_an_error():
    class Without(Own):
        def __init__(self, seed):
            self.module = torch.nn.Linear(3, 3)

    with pytest.raises(RuntimeError, match="without: nothing to convert\nno recurrent layers found"):
        next(compare("without", Without, epochs=1))


def test_command_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(integrations, "LIBRARIES", {"own": "a test"})
    monkeypatch.setattr(integrations, "load", lambda name: Own)
    path = tmp_path / "README.md"
    path.write_text("before\n" + "".join(show.marks("integrations")) + "\nafter\n")
    main(["tasks", integrations.ALL, "--epochs", "2", "--table", str(path)])
    said = capsys.readouterr().out
    assert "swapped 1\n  0: fastcells.nn.GRU" in said
    assert "epoch 2: loss " in said
    heading, rule, line = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert len(heading.split("|")) == len(rule.split("|")) == len(line.split("|"))
    name, model, before, after, _, slow, fast, ratio = [cell.strip() for cell in line.strip("|").split("|")]
    assert (name, model, slow, fast, ratio) == ("`own`", "a GRU", "0.5", "0.5", "1.00")
    assert float(before) == pytest.approx(float(after), rel=1e-5)


@pytest.mark.parametrize(("name", "package"), [("darts", "pytorch_lightning"), ("sb3_contrib", "sb3_contrib")])
def test_missing_library_names_the_extra(name, package, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"benchmarks.tasks.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        main(["tasks", name])
    assert stop.value.code == 1
    assert capsys.readouterr().err.strip() == f"{name}: {package} is not installed: pip install .[integrations]"


def test_the_others_are_trained_where_one_is_missing(monkeypatch, capsys):
    def load(name):
        if name == "broken":
            raise ImportError("broken needs something that does not load")
        return Own

    monkeypatch.setattr(integrations, "LIBRARIES", {"broken": "a test", "own": "another"})
    monkeypatch.setattr(integrations, "load", load)
    with pytest.raises(SystemExit) as stop:
        main(["tasks", integrations.ALL, "--epochs", "1"])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert said.err.strip() == "broken: cannot be imported: broken needs something that does not load"
    assert "| `own` |" in said.out


@pytest.mark.parametrize("option", ["layer", "cell", "plot", "data"])
def test_options_of_the_tasks_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tasks", "darts", f"--{option}", "torch"])
    assert stop.value.code == 2
    assert f"argument --{option}: darts has no such option" in capsys.readouterr().err
