"""speechbrain's GRU, a module around torch.nn's that takes lengths as shares of the longest, trained by its Brain."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

try:
    import speechbrain
    from speechbrain.nnet.linear import Linear
    from speechbrain.nnet.pooling import StatisticsPooling
    from speechbrain.nnet.RNN import GRU
except OSError as error:  # torchaudio's library, compiled for another build of torch than the one that is here
    raise ImportError(f"speechbrain needs torchaudio, which does not load: {error}") from error

from benchmarks.tasks.classify import BATCH, SPEAKERS, Utterance, utterances
from benchmarks.tasks.integrations.training import Epoch, Integration


class Model(Integration):
    model_name = "bidirectional GRU, statistics pooling"

    def __init__(self, seed: int, hidden: int = 128, limit: int | None = None) -> None:
        modules = {
            "recurrent": GRU(hidden_size=hidden, input_size=12, bidirectional=True),
            "pooling": StatisticsPooling(return_std=False),
            "output": Linear(n_neurons=SPEAKERS, input_size=2 * hidden),
        }
        self.brain = Speaker(modules, opt_class=torch.optim.Adam)
        self.module = self.brain.modules
        self.batches: Any = DataLoader(utterances("train")[:limit], BATCH, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]

    def epoch(self) -> Epoch:
        self.brain.losses = []
        began = perf_counter()
        self.brain.fit(range(1), self.batches, progressbar=False)
        return Epoch(self.brain.losses, perf_counter() - began)


class Speaker(speechbrain.Brain):
    losses: list[float]

    def compute_forward(self, batch: Any, stage: Any) -> Any:
        frames, lengths, _ = batch
        hidden, _ = self.modules.recurrent(frames, lengths=lengths)
        return self.modules.output(self.modules.pooling(hidden, lengths)).squeeze(1)

    def compute_objectives(self, predictions: Any, batch: Any, stage: Any) -> Any:
        return cross_entropy(predictions, batch[-1])

    def on_fit_batch_end(self, batch: Any, outputs: Any, loss: Any, should_step: bool) -> None:
        self.losses.append(loss.item())


def collate(chosen: list[Utterance]) -> tuple[torch.Tensor, ...]:
    """Frames [N, T, 12], lengths as shares of the longest [N], speakers [N]."""
    frames = pad_sequence([frames for frames, _ in chosen], batch_first=True)
    lengths = torch.tensor([len(frames) for frames, _ in chosen]) / frames.shape[1]
    return frames, lengths, torch.tensor([speaker for _, speaker in chosen])
