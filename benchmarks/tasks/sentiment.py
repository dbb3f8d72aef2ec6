"""Is this line of a movie review praise or blame? Embedding, bidirectional recurrent layer, mean over time, one logit.

The snippets are those of Pang & Lee (2004) with the ratings that Hutto & Gilbert (2014) had people give; see data/.
Those rated within half a point of neutral, on the scale of -4 to 4, are left out: their sign says little.
"""

from __future__ import annotations

import csv
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.rnn import pad_sequence

from benchmarks.tasks import lab

DATA = Path(__file__).parent / "data" / "movie_reviews.tsv.xz"
NEUTRAL = 0.5
VALIDATION = 0.15
BATCH = 64
PAD, UNKNOWN = 0, 1


def reviews() -> list[tuple[str, float]]:
    """All snippets, each with its mean rating from -4 to 4."""
    with lzma.open(DATA, "rt", encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["text"], float(row["rating"])) for row in rows]


def tokens(text: str) -> list[str]:
    """Words in lower case, and each punctuation mark."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


class Classifier(nn.Module):
    """Padded token numbers (batch, length) to logits of praise (batch,)."""

    def __init__(self, layer: Callable[..., nn.Module], words: int, embedding: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD)
        self.recurrent = layer(embedding, hidden, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * hidden, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, numbers: Tensor) -> Tensor:
        # Padded, not packed: torch.nn is far slower on a PackedSequence, and the lengths in a batch hardly differ.
        hidden, _ = self.recurrent(self.dropout(self.embedding(numbers)))
        # The mean, not the maximum: which step is largest may turn on the last bit, and from there two layers that
        # differ in rounding alone part ways.
        read = (numbers != PAD).unsqueeze(2)
        pooled = (hidden * read).sum(dim=1) / read.sum(dim=1)
        return self.output(self.dropout(pooled)).squeeze(1)


class Sentiment(lab.Task):
    """``limit`` keeps only so many snippets, for a quick look."""

    epochs = 6
    learning_rate = 3e-3
    metric_name = "accuracy"
    metric_format = ".1%"
    baseline_name = "majority baseline"

    def __init__(self, seed: int, limit: int | None = None) -> None:
        examples = [(tokens(text), float(rating > 0)) for text, rating in reviews() if abs(rating) > NEUTRAL]
        random.Random(seed).shuffle(examples)
        examples = examples[:limit]
        split = round(VALIDATION * len(examples))
        # A word seen once in training teaches only what an unknown word means.
        counts = Counter(word for words, _ in examples[split:] for word in words)
        known = [word for word, count in counts.items() if count > 1]
        self.vocabulary = {word: number for number, word in enumerate(known, start=UNKNOWN + 1)}
        numbered = [(torch.tensor([self.vocabulary.get(w, UNKNOWN) for w in words]), y) for words, y in examples]
        self._validation, self._training = numbered[:split], numbered[split:]
        praise = sum(y for _, y in self._validation) / split
        self.baseline = max(praise, 1 - praise)
        self.facts = (
            f"{len(self._training):,} snippets to train on, {split:,} to validate, {len(self.vocabulary):,} known words"
        )

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Classifier(layer, len(self.vocabulary) + 2)

    def training(self, seed: int) -> list[lab.Batch]:
        draw = random.Random(seed)
        batches = _batches(draw.sample(self._training, len(self._training)))
        draw.shuffle(batches)
        return batches

    def validation(self) -> list[lab.Batch]:
        return _batches(self._validation)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(output, targets)

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        return ((output > 0) == (targets > 0)).float().mean()


def _batches(examples: Sequence[tuple[Tensor, float]]) -> list[lab.Batch]:
    """Neighbours in length share a batch, so that there is next to no padding; equal lengths keep the given order."""
    examples = sorted(examples, key=lambda example: len(example[0]))
    chunks = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return [
        (pad_sequence([x for x, _ in chunk], batch_first=True, padding_value=PAD), torch.tensor([y for _, y in chunk]))
        for chunk in chunks
    ]
