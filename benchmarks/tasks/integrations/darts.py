"""darts' RNNModel, which makes its layer by name, `getattr(torch.nn, "LSTM")`, when it first sees a series."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
from darts import TimeSeries
from darts.models import RNNModel

from benchmarks.tasks import series
from benchmarks.tasks.integrations.lightning_loop import OPTIONS, Recorder
from benchmarks.tasks.integrations.training import Epoch, Integration


class Watch(Recorder, pl.Callback):
    pass


class Model(Integration):
    model_name = "RNNModel, two layers of LSTM"

    def __init__(self, seed: int, hidden: int = 64, points: int | None = None) -> None:
        values = series.load("co2").values[:points].astype(np.float32)
        self.series = TimeSeries.from_values((values - values.mean()) / values.std())
        self.watch = Watch()
        self.model = RNNModel(
            model="LSTM", input_chunk_length=48, training_length=60, hidden_dim=hidden, n_rnn_layers=2, dropout=0.1,
            n_epochs=0, random_state=seed, pl_trainer_kwargs={**OPTIONS, "callbacks": [self.watch]},
        )  # fmt: skip
        self.model.fit(self.series)  # for no epochs: only now there is a module
        self.module = self.model.model

    def epoch(self) -> Epoch:
        self.model.fit(self.series, epochs=1)
        return self.watch.epoch
