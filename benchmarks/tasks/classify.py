"""Who speaks? Nine men say the vowels /ae/, in utterances of 7 to 29 frames of 12 cepstrum coefficients each.

The data are the Japanese Vowels of Kudo, Toyama & Shimbo (1999), see data/, in their own division into training and
test. A bidirectional GRU reads each utterance to its own end (``lengths=``), and the mean of its hidden states decides.
"""

from __future__ import annotations

import csv
import lzma
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from benchmarks.tasks import lab, plots

DATA = Path(__file__).parent / "data" / "japanese_vowels.tsv.xz"
SPEAKERS = 9
BATCH = 27

Utterance = tuple[Tensor, int]  # frames [T, 12], speaker from 0


def utterances(part: str) -> list[Utterance]:
    """Those of a part, "train" or "test"."""
    frames: dict[str, list[list[float]]] = {}
    speakers = {}
    with lzma.open(DATA, "rt", encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t")
        next(rows)
        for given, speaker, utterance, *coefficients in rows:
            if given == part:
                frames.setdefault(utterance, []).append([float(c) for c in coefficients])
                speakers[utterance] = int(speaker) - 1
    return [(torch.tensor(rows), speakers[utterance]) for utterance, rows in frames.items()]


class Speaker(nn.Module):
    """Padded frames [N, T, 12] and lengths [N] to logits of the speakers [N, 9]."""

    def __init__(self, layer: Callable[..., nn.Module], hidden: int = 32) -> None:
        super().__init__()
        self.recurrent = layer(12, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(2 * hidden, SPEAKERS)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = self.recurrent(frames, lengths=lengths)
        mean = hidden.sum(dim=1) / lengths[:, None]  # past the end all is zero
        return self.output(self.dropout(mean))


class Classify(lab.Task):
    cell = "gru"
    epochs = 40
    learning_rate = 4e-3
    decay = True
    clip = 1.0
    metric_name = "accuracy"
    metric_format = ".1%"
    data_name = "Japanese Vowels, 640 utterances"

    def __init__(self, seed: int = 0, cell: str | None = None) -> None:
        super().__init__(seed, cell)
        self._training, self._test = utterances("train"), utterances("test")
        speakers = Counter(speaker for _, speaker in self._test)
        self.baselines = {
            "majority": max(speakers.values()) / len(self._test),
            "mean frame": mean_frame(self._training, self._test),
        }
        self.facts = (
            f"{len(self._training)} utterances to train on, {len(self._test)} to validate, by {SPEAKERS} speakers"
        )

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Speaker(layer)

    def training(self, seed: int) -> list[lab.Batch]:
        order = torch.randperm(len(self._training), generator=torch.Generator().manual_seed(seed))
        return [_batch([self._training[i] for i in chosen.tolist()]) for chosen in order.split(BATCH)]

    def validation(self) -> list[lab.Batch]:
        return [_batch(self._test)]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(output, targets)

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(dim=1) == targets).float().mean()

    @torch.no_grad()
    def confusion(self, run: lab.Run) -> Tensor:
        """How often each speaker [9] was taken for each [9], in utterances of the test."""
        run.model.eval()
        ((inputs, targets),) = self.validation()
        taken = run.output(inputs).argmax(dim=1)
        return torch.bincount(targets * SPEAKERS + taken, minlength=SPEAKERS**2).view(SPEAKERS, SPEAKERS)

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        accuracies, confusion = figure.subplots(1, 2)
        plots.metrics(accuracies, runs)
        counts = self.confusion(runs[-1])
        title = f"Test: {counts.diagonal().sum() / counts.sum():.1%} right"
        plots.heat(figure, confusion, counts, title, "taken for speaker", "speaker", "utterances", cmap="Blues")
        numbers = range(SPEAKERS)
        for axis in confusion.xaxis, confusion.yaxis:
            axis.set_ticks(numbers, [str(n + 1) for n in numbers])
        for row in numbers:
            for column in numbers:
                if count := int(counts[row, column]):
                    color = "white" if count > counts.max() / 2 else "black"
                    confusion.text(column, row, count, ha="center", va="center", fontsize=13, color=color)


def mean_frame(training: Sequence[Utterance], test: Sequence[Utterance]) -> float:
    """Accuracy of logistic regression on the mean of an utterance's frames: no order, no time."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (test_x, test_y) = (
        ([frames.mean(dim=0).tolist() for frames, _ in part], [speaker for _, speaker in part])
        for part in (training, test)
    )
    return float(LogisticRegression(max_iter=1000).fit(x, y).score(test_x, test_y))


def _batch(chosen: Sequence[Utterance]) -> lab.Batch:
    lengths = torch.tensor([len(frames) for frames, _ in chosen])
    padded = pad_sequence([frames for frames, _ in chosen], batch_first=True)
    return (padded, lengths), torch.tensor([speaker for _, speaker in chosen])
