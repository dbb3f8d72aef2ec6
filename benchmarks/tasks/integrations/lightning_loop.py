"""Training by Lightning, the loop of several libraries: what they tell its trainer, and a callback that records it."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from benchmarks.tasks.integrations.training import Epoch

#: A trainer on the CPU that writes nothing.
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Recorder:
    """To be mixed into a Callback: Lightning is two packages, each of which wants its own class."""

    epoch: Epoch  # the last training

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.losses: list[float] = []
        self.began = perf_counter()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.epoch = Epoch(self.losses, perf_counter() - self.began)
