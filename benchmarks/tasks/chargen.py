"""The next character of movie reviews: a language model that then writes some itself.

The text is cut into parallel streams, and each stream into stretches of 64 characters. The state at the end of one
stretch starts the next, but gradients stop there: backpropagation through time, truncated (Williams & Peng 1990).
Gradients are clipped to a norm of 5. To write, the layer is called with one character at a time and the state it
returned before; the temperature divides the logits: near 0 it takes the likeliest, at 1 it draws as the model believes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from math import exp
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks import lab, plots
from benchmarks.tasks.sentiment import reviews

STRETCH = 64
VALIDATION = 0.1
COMMON = 100  # of a character, fewer times and it is left out
TEMPERATURES = (0.3, 0.7, 1.0)


class Writer(nn.Module):
    """Characters [N, T] to logits of the next ones [N, T, characters]; carries its state from call to call."""

    def __init__(self, layer: Callable[..., nn.Module], characters: int, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.recurrent = layer(32, hidden, batch_first=True)
        self.output = nn.Linear(hidden, characters)
        self.state: Any = None

    def forward(self, numbers: Tensor) -> Tensor:
        hidden, state = self.recurrent(self.embedding(numbers), self.state)
        # Detached: the next stretch starts from these values, and its gradients end there.
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return self.output(hidden)

    def forget(self) -> None:
        self.state = None


class Chargen(lab.Task):
    """``limit`` keeps only so many reviews, and ``streams`` run side by side."""

    epochs = 6
    learning_rate = 5e-3
    clip = 5.0
    metric_name = "perplexity"
    metric_format = ".2f"
    lower_is_better = True
    data_name = "characters of 3,000 review snippets"

    def __init__(self, seed: int = 0, cell: str | None = None, limit: int = 3000, streams: int = 32) -> None:
        super().__init__(seed, cell)
        texts = [text for text, _ in reviews()]
        random.Random(seed).shuffle(texts)
        text = "\n".join(texts[:limit]).lower()
        self.characters = sorted(c for c in set(text) if text.count(c) >= COMMON)
        self.numbers = {character: number for number, character in enumerate(self.characters)}
        data = torch.tensor([self.numbers[c] for c in text if c in self.numbers])
        split = round(len(data) * (1 - VALIDATION))
        self._training, self._validation = _stretches(data[:split], streams), _stretches(data[split:], streams)
        counts = torch.bincount(data[:split], minlength=len(self.characters)).double()
        seen = torch.cat([targets.flatten() for _, targets in self._validation])
        surprise = -(counts / counts.sum()).log()[seen].mean().item()
        self.baselines = {"frequencies": exp(surprise)}
        self.facts = (
            f"{split:,} characters to train on, {len(data) - split:,} to validate, {len(self.characters)} kinds"
        )

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Writer(layer, len(self.characters))

    def start(self, model: nn.Module) -> None:
        assert isinstance(model, Writer)
        model.forget()

    def training(self, seed: int) -> list[lab.Batch]:
        return self._training  # in the order of the text: the state is carried on

    def validation(self) -> list[lab.Batch]:
        return self._validation

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(output.flatten(0, 1), targets.flatten())

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        """Per batch: exp of the mean surprise. (Their mean differs little from the perplexity of all.)"""
        return self.loss(output, targets).exp()

    @torch.no_grad()
    def write(self, run: lab.Run, temperature: float, count: int, begin: str = "the film ") -> tuple[str, float]:
        """A text of ``count`` more characters, and how many of them a second."""
        model = run.model.eval()
        self.start(model)
        draw = torch.Generator().manual_seed(self.seed)
        logits = model(torch.tensor([[self.numbers[c] for c in begin]]))[0, -1]
        written, began = [], perf_counter()
        for _ in range(count):
            number = torch.multinomial((logits / temperature).softmax(0), 1, generator=draw)
            written.append(self.characters[int(number)])
            logits = model(number[None])[0, -1]  # T = 1: one step from the carried state
        return begin + "".join(written), count / (perf_counter() - began)

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        grid = figure.add_gridspec(2, 2, height_ratios=[3.2, 1])
        figure.set_size_inches(13, 8.5)
        perplexity, norms, text = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
        plots.metrics(perplexity, runs)
        run = runs[-1]
        norms.plot(run.norms, color=plots.COLORS[run.name], linewidth=1)
        norms.axhline(self.clip or 0, color="#c8553d", linestyle="dashed", label="clipped to this")
        plots.logarithmic(norms)
        plots.style(norms, "Gradients before clipping", "step of training", "norm of all gradients")
        samples = [f"{t}:  {' '.join(self.write(run, t, 80)[0].split())}…" for t in TEMPERATURES]
        text.text(
            -0.03,
            1.0,
            "temperature\n" + "\n".join(samples),
            family="monospace",
            fontsize=14.5,
            va="top",
            linespacing=1.9,
        )
        text.axis("off")

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        lines = []
        for run in runs:
            self.write(run, 1.0, 50)  # compiles what is still to compile
            _, speed = self.write(run, 1.0, 300)
            lines.append(f"{run.name} writes {speed:,.0f} characters a second, one step each")
        return lines + [f"temperature {t}: {self.write(runs[-1], t, 150)[0]!r}" for t in TEMPERATURES]


def _stretches(data: Tensor, streams: int) -> list[lab.Batch]:
    """Streams side by side, cut into batches of STRETCH characters [streams, STRETCH] and the ones after each."""
    steps = (len(data) - 1) // streams // STRETCH * STRETCH
    now, after = (data[shift : shift + streams * steps].view(streams, steps) for shift in (0, 1))
    return [((x,), y) for x, y in zip(now.split(STRETCH, dim=1), after.split(STRETCH, dim=1), strict=True)]
