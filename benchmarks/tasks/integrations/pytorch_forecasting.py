"""pytorch-forecasting's DeepAR, whose layer is a subclass of torch.nn.LSTM that also takes lengths, zero among them."""

from __future__ import annotations

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_forecasting import DeepAR, TimeSeriesDataSet

from benchmarks.tasks import series
from benchmarks.tasks.integrations.lightning_loop import OPTIONS, Recorder
from benchmarks.tasks.integrations.training import Epoch, Integration


class Watch(Recorder, pl.Callback):
    pass


class Model(Integration):
    model_name = "DeepAR, two layers of LSTM"

    def __init__(self, seed: int, hidden: int = 64, points: int | None = None) -> None:
        values = series.load("co2").values[:points].astype(np.float32)
        table = pd.DataFrame({"value": values, "month": range(len(values)), "station": "Mauna Loa"})
        windows = TimeSeriesDataSet(
            table, time_idx="month", target="value", group_ids=["station"], time_varying_unknown_reals=["value"],
            min_encoder_length=24, max_encoder_length=48, max_prediction_length=12,
        )  # fmt: skip
        self.batches = windows.to_dataloader(train=True, batch_size=32)
        self.module = DeepAR.from_dataset(windows, hidden_size=hidden, rnn_layers=2, optimizer="adam", log_interval=-1)

    def epoch(self) -> Epoch:
        watch = Watch()
        pl.Trainer(**OPTIONS, max_epochs=1, callbacks=[watch]).fit(self.module, self.batches)
        return watch.epoch
