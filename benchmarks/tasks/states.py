"""What a small layer does while it reads: hidden states, gates and the verdict so far, word by word.

The sentiment task with one direction of 16 units. Trained, it reads the sentence given with ``--text``; its verdict is
taken after every word. The gates come from `fastcells.reference`, which keeps each step's for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.tasks import lab, plots
from benchmarks.tasks.sentiment import Classifier, Sentiment, tokens
from fastcells import reference

TEXT = "it starts as a dull and tired comedy, but turns into a moving and wonderful film"
PARAMETERS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
CELLS = {"rnn": reference.TanhCell, "gru": reference.GRUCell, "lstm": reference.LSTMCell}
#: Where each gate lies in what a cell of the reference saves, and its name.
GATES = {
    "rnn": {},
    "gru": {"reset gate r": 2, "update gate z": 3},
    "lstm": {"input gate i": 3, "forget gate f": 4, "output gate o": 6},
}


class States(Sentiment):
    """``text``: what is read at the end. Raises ValueError where that is nothing."""

    epochs = 8
    options: ClassVar = {"text": ()}

    def __init__(self, seed: int = 0, cell: str | None = None, text: str = TEXT, limit: int = 4000) -> None:
        if not tokens(text):
            raise ValueError(f"text must have a word to read, got {text!r}")
        super().__init__(seed, cell, pooling="last", limit=limit)
        self.text = text

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        words = len(self.vocabulary) + 2
        return Classifier(layer, words, embedding=32, hidden=16, bidirectional=False, pooling="last", dropout=0.3)

    @torch.no_grad()
    def read(self, run: lab.Run) -> dict[str, NDArray[np.float64]]:
        """Of each word of the text: "hidden state" [T, 16], the gates [T, 16], "verdict" [T], probability of praise."""
        model = run.model.eval()
        assert isinstance(model, Classifier)
        embedded = model.embedding(self.numbers(tokens(self.text)))[None]
        hidden, _ = model.recurrent(embedded)
        steps = self.steps(model.recurrent.state_dict(), embedded[0])
        found = {"hidden state": hidden[0].double().numpy(), "verdict": model.output(hidden[0])[:, 0].sigmoid().numpy()}
        if self.cell == "lstm":
            found["cell state"] = np.stack([saved[7][0] for saved in steps])
        return found | {name: np.stack([saved[at][0] for saved in steps]) for name, at in GATES[self.cell].items()}

    def steps(self, weights: dict[str, Tensor], x: Tensor) -> list[tuple[NDArray[np.float64], ...]]:
        """What the reference's cell saves at each step of x [T, 32], each value [1, 16]."""
        w_ih, w_hh, b_ih, b_hh = (weights[f"{name}_l0"].double().numpy() for name in PARAMETERS)
        cell = CELLS[self.cell](reference.Affine(w_ih, b_ih), reference.Affine(w_hh, b_hh))
        state = tuple(np.zeros((1, w_hh.shape[1])) for _ in cell.state_names)
        tape = []
        for word in x.double().numpy():
            state, saved = cell.forward(word[None], state)
            tape.append(saved)
        return tape

    def plot(self, figure: Figure, runs: Sequence[lab.Run]) -> None:
        found, words = self.read(runs[-1]), tokens(self.text)
        gates = list(GATES[self.cell])
        figure.set_size_inches(13, 13 if gates else 9)
        panels = figure.subplots(3 if gates else 2, 1, sharex=True)
        state = "cell state" if self.cell == "lstm" else "hidden state"
        order = np.argsort(found[state][-1])  # units that end alike lie side by side
        shown = found[state][:, order].T
        bound = float(np.abs(shown).max())
        colors = {"cmap": "RdBu", "vmin": -bound, "vmax": bound}
        plots.heat(figure, panels[0], shown, f"{state.capitalize()} of each unit", "", "unit", "value", **colors)
        panels[0].set_yticks([])
        panels[1].plot(found["verdict"], "o-", color="black", linewidth=2.5, label="verdict so far")
        panels[1].axhline(0.5, color=plots.GREY, linestyle="dashed", label="undecided")
        plots.style(panels[1], "Blame or praise?", "", "probability of praise")
        for name, color in zip(gates, ("#c8553d", "#1f4e79", "#4f9d69"), strict=False):
            panels[2].plot(found[name].mean(axis=1), "o-", color=color, linewidth=2.5, label=name)
        if gates:
            plots.style(panels[2], "Gates, mean over the units", "", "0 closed, 1 open", {"ncols": 3, "fontsize": 15})
        for panel in panels[1:]:
            panel.set_ylim(0, 1)
        panels[-1].set_xticks(range(len(words)), words, rotation=50, ha="right", rotation_mode="anchor", fontsize=17)
        panels[-1].set_xlim(-0.5, len(words) - 0.5)

    def remarks(self, runs: Sequence[lab.Run]) -> list[str]:
        verdicts = self.read(runs[-1])["verdict"]
        said = " ".join(f"{word} {p:.0%}" for word, p in zip(tokens(self.text), verdicts, strict=True))
        return [f"probability of praise after each word: {said}"]
