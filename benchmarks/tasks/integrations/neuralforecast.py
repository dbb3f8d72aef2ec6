"""neuralforecast's GRU. A model may be converted before `NeuralForecast` gets it, too: that copies what it is given."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from neuralforecast import NeuralForecast
from neuralforecast.models import GRU

from benchmarks.tasks import series
from benchmarks.tasks.integrations.lightning_loop import OPTIONS, Recorder
from benchmarks.tasks.integrations.training import Epoch, Integration


class Watch(Recorder, pl.Callback):
    pass


class Model(Integration):
    model_name = "GRU, two layers"

    def __init__(self, seed: int, hidden: int = 128, points: int | None = None, steps: int = 16) -> None:
        values = series.load("co2").values[:points].astype(np.float32)
        self.table = pd.DataFrame({"unique_id": "Mauna Loa", "ds": range(len(values)), "y": values})
        model = GRU(
            h=12, input_size=48, encoder_n_layers=2, encoder_hidden_size=hidden, windows_batch_size=64, max_steps=steps,
            scaler_type="robust", random_seed=seed, callbacks=[Watch()], **OPTIONS,
        )  # fmt: skip
        self.forecast = NeuralForecast(models=[model], freq=1)
        self.module = self.forecast.models[0]  # a copy, and so is its callback
        self.watch = self.forecast.models[0].trainer_kwargs["callbacks"][0]

    def epoch(self) -> Epoch:
        self.forecast.fit(self.table)
        return self.watch.epoch
