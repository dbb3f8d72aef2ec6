"""Dates as people write them, "3rd of March 2021", to ISO 8601, "2021-03-03": an encoder, a decoder and attention.

A bidirectional encoder reads the characters to their end (``lengths=``); the decoder starts from what it kept, and at
each step looks back at the encoder's states, weighted by how well they answer its own (Luong, Pham & Manning 2015). In
training it reads the right answer so far; asked for a date, it reads its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import date, timedelta

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from benchmarks.tasks import lab, plots

FIRST, DAYS = date(1950, 1, 1), 36525
READ = "\0 ,./-0123456789abcdefghijklmnopqrstuvwxyz"  # number 0 pads
WRITTEN = "^-0123456789"  # number 0 begins
STEPS = 10  # of an answer
BATCH = 64


def spell(day: date, draw: random.Random) -> str:
    """One of the ways to write a date."""
    ending = "th" if 10 < day.day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    month, short = f"{day:%B}".lower(), f"{day:%b}".lower()
    return draw.choice(
        [
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day}{ending} of {month} {day.year}",
            f"{day.day} {short} {day.year}",
            f"{short} {day.day} {day.year}",
            f"{day.day}.{day.month}.{day.year}",
            f"{day.day:02}/{day.month:02}/{day.year}",
            f"{day:%A}, {month} {day.day}, {day.year}".lower(),
        ]
    )


class Translator(nn.Module):
    """Characters [N, S], their lengths [N] and the answers so far [N, T] to logits of the next ones [N, T, kinds]."""

    def __init__(self, layer: Callable[..., nn.Module], hidden: int = 64) -> None:
        super().__init__()
        self.read = nn.Embedding(len(READ), 32)
        self.encoder = layer(32, hidden // 2, batch_first=True, bidirectional=True)
        self.written = nn.Embedding(len(WRITTEN), 32)
        self.decoder = layer(32, hidden, batch_first=True)
        self.ask = nn.Linear(hidden, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, len(WRITTEN))

    def forward(self, source: Tensor, lengths: Tensor, answer: Tensor) -> Tensor:
        return self.attend(source, lengths, answer)[0]

    def attend(self, source: Tensor, lengths: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and the weights of attention [N, T, S]."""
        seen, state = self.encoder(self.read(source), lengths=lengths)
        # The final states of both directions, side by side, are the decoder's first.
        joined = [s.transpose(0, 1).flatten(1)[None] for s in (state if isinstance(state, tuple) else (state,))]
        hidden, _ = self.decoder(self.written(answer), tuple(joined) if len(joined) > 1 else joined[0])
        scores = self.ask(hidden) @ seen.transpose(1, 2)  # [N, T, S]
        past_the_end = torch.arange(source.shape[1]) >= lengths[:, None]
        weights = scores.masked_fill(past_the_end[:, None], float("-inf")).softmax(dim=2)
        context = weights @ seen
        return self.output(self.combine(torch.cat([context, hidden], dim=2)).tanh()), weights

    @torch.no_grad()
    def translate(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest answer, character by character [N, STEPS], and the weights of attention."""
        answer = torch.zeros(len(source), 1, dtype=torch.long)
        for _ in range(STEPS):
            logits, weights = self.attend(source, lengths, answer)
            answer = torch.cat([answer, logits[:, -1:].argmax(dim=2)], dim=1)
        return answer[:, 1:], weights


class Seq2seq(lab.Task):
    """``size``: dates to train on."""

    cell = "gru"
    epochs = 6
    learning_rate = 5e-3
    decay = True
    clip = 1.0
    metric_name = "exact"
    metric_format = ".1%"
    data_name = "4,000 dates in eight ways of writing"

    def __init__(self, seed: int = 0, cell: str | None = None, size: int = 4000) -> None:
        super().__init__(seed, cell)
        draw = random.Random(seed)
        days = [FIRST + timedelta(days=number) for number in draw.choices(range(DAYS), k=size + 500)]
        examples = [(spell(day, draw), day.isoformat()) for day in days]
        self._training, self.kept = examples[:size], examples[size:]
        self.baselines = {"nearest example": nearest(self._training, self.kept)}
        self.facts = f"{size:,} dates from {FIRST.year} on to train on, {len(self.kept)} to validate"

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Translator(layer)

    def training(self, seed: int) -> list[lab.Batch]:
        shuffled = random.Random(seed).sample(self._training, len(self._training))
        return [_batch(shuffled[i : i + BATCH]) for i in range(0, len(shuffled), BATCH)]

    def validation(self) -> list[lab.Batch]:
        return [_batch(self.kept)]

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, 1), targets.flatten())

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        """Answers right in every character. (Where each is the likeliest after the right ones before it, the network
        left to itself writes just that.)"""
        return (output.argmax(dim=2) == targets).all(dim=1).float().mean()

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        matches, attention = figure.subplots(1, 2, width_ratios=[1, 1.5])
        figure.set_size_inches(15, 6.5)
        plots.metrics(matches, runs, "exact answers")
        source, answer, weights = self.example(runs[-1])
        title = f"Attention: {source!r}"
        plots.heat(figure, attention, weights, title, "read", "written", "weight", cmap="Blues", vmin=0, vmax=1)
        attention.set_xticks(range(len(source)), list(source.replace(" ", "␣")))
        attention.set_yticks(range(STEPS), list(answer))

    def example(self, run: lab.Run) -> tuple[str, str, Tensor]:
        """A date of the validation part as written, the network's answer, its attention [STEPS, characters]."""
        model = run.model.eval()
        assert isinstance(model, Translator)
        source, _ = max(self.kept[:50], key=lambda example: len(example[0]))
        ((numbers, lengths, _), _) = _batch([(source, FIRST.isoformat())])
        answer, weights = model.translate(numbers, lengths)
        return source, "".join(WRITTEN[number] for number in answer[0].tolist()), weights[0]

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        source, answer, _ = self.example(runs[-1])
        return [f"{source!r} becomes {answer!r}"]


def nearest(training: Sequence[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> float:
    """Exact matches of the answer to the training example with the most alike groups of one to three characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectors = TfidfVectorizer(analyzer="char", ngram_range=(1, 3))
    known = NearestNeighbors(n_neighbors=1).fit(vectors.fit_transform([source for source, _ in training]))
    found = known.kneighbors(vectors.transform([source for source, _ in asked]), return_distance=False)[:, 0]
    return sum(training[at][1] == answer for at, (_, answer) in zip(found, asked, strict=True)) / len(asked)


def _batch(examples: Sequence[tuple[str, str]]) -> lab.Batch:
    sources = [torch.tensor([READ.index(c) for c in source]) for source, _ in examples]
    targets = torch.tensor([[WRITTEN.index(c) for c in answer] for _, answer in examples])
    so_far = torch.cat([torch.zeros(len(examples), 1, dtype=torch.long), targets[:, :-1]], dim=1)
    return (pad_sequence(sources, batch_first=True), torch.tensor([len(s) for s in sources]), so_far), targets
