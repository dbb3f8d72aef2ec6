"""Is this line of a movie review praise or blame? Embedding, bidirectional layer, pooling over time, one logit.

The snippets are those of Pang & Lee (2004) with the ratings that Hutto & Gilbert (2014) had people give; see data/.
Those rated within half a point of neutral, on the scale of -4 to 4, are left out: their sign says little.

A batch mixes short and long snippets, and ``lengths=`` tells the layer where each one ends: the reverse direction then
starts at the last word rather than in the padding, and the last state is that of the last word.
"""

from __future__ import annotations

import csv
import lzma
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

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
    """Padded token numbers [N, T] and lengths [N] to logits of praise [N]."""

    def __init__(
        self,
        layer: Callable[..., nn.Module],
        words: int,
        embedding: int = 64,
        hidden: int = 64,
        bidirectional: bool = True,
        pooling: str = "mean",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        width = 2 * hidden if bidirectional else hidden
        self.pooling = pooling
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD)
        self.recurrent = layer(embedding, hidden, batch_first=True, bidirectional=bidirectional)
        if pooling == "attention":
            self.score = nn.Linear(width, 1)
        self.output = nn.Linear(width, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, numbers: Tensor, lengths: Tensor) -> Tensor:
        hidden, state = self.recurrent(self.dropout(self.embedding(numbers)), lengths=lengths)
        return self.output(self.dropout(self.pool(hidden, state, lengths))).squeeze(1)

    def pool(self, hidden: Tensor, state: Tensor | tuple[Tensor, ...], lengths: Tensor) -> Tensor:
        """Hidden states of all steps [N, T, D*H] and the final ones to one vector for each sequence."""
        if self.pooling == "last":
            last = state[0] if isinstance(state, tuple) else state
            return last.transpose(0, 1).flatten(1)  # both directions side by side
        read = (torch.arange(hidden.shape[1]) < lengths[:, None]).unsqueeze(2)
        if self.pooling == "attention":
            weights = self.score(hidden).masked_fill(~read, float("-inf")).softmax(dim=1)
            return (weights * hidden).sum(dim=1)
        return hidden.sum(dim=1) / lengths[:, None]  # the mean: past the end all is zero


class Sentiment(lab.Task):
    """``limit`` keeps only so many snippets, for a quick look."""

    epochs = 6
    learning_rate = 3e-3
    metric_name = "accuracy"
    metric_format = ".1%"
    options: ClassVar = {"pooling": ("mean", "last", "attention")}

    def __init__(self, seed: int = 0, cell: str | None = None, pooling: str = "mean", limit: int | None = None) -> None:
        super().__init__(seed, cell)
        self.pooling = pooling
        examples = [(tokens(text), float(rating > 0)) for text, rating in reviews() if abs(rating) > NEUTRAL]
        random.Random(seed).shuffle(examples)
        examples = examples[:limit]
        self.data_name = f"{len(examples):,} movie-review snippets"
        split = round(VALIDATION * len(examples))
        # A word seen once in training teaches only what an unknown word means.
        counts = Counter(word for words, _ in examples[split:] for word in words)
        known = [word for word, count in counts.items() if count > 1]
        self.vocabulary = {word: number for number, word in enumerate(known, start=UNKNOWN + 1)}
        numbered = [(self.numbers(words), y) for words, y in examples]
        self._validation, self._training = numbered[:split], numbered[split:]
        praise = sum(y for _, y in self._validation) / split
        self.baselines = {"majority": max(praise, 1 - praise), "bag of words": bag_of_words(examples, split)}
        self.facts = (
            f"{len(self._training):,} snippets to train on, {split:,} to validate, {len(self.vocabulary):,} known words"
        )

    def numbers(self, words: Sequence[str]) -> Tensor:
        return torch.tensor([self.vocabulary.get(word, UNKNOWN) for word in words])

    def model(self, layer: Callable[..., nn.Module]) -> nn.Module:
        return Classifier(layer, len(self.vocabulary) + 2, pooling=self.pooling)

    def training(self, seed: int) -> list[lab.Batch]:
        return _batches(random.Random(seed).sample(self._training, len(self._training)))

    def validation(self) -> list[lab.Batch]:
        return _batches(self._validation)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(output, targets)

    def metric(self, output: Tensor, targets: Tensor) -> Tensor:
        return ((output > 0) == (targets > 0)).float().mean()


def bag_of_words(examples: Sequence[tuple[list[str], float]], split: int) -> float:
    """Accuracy, on the first ``split`` examples, of logistic regression on the words alone, trained on the others."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words, labels = [words for words, _ in examples], [y for _, y in examples]
    pipeline = make_pipeline(CountVectorizer(analyzer=list, min_df=2), LogisticRegression(max_iter=1000))
    return float(pipeline.fit(words[split:], labels[split:]).score(words[:split], labels[:split]))


def _batches(examples: Sequence[tuple[Tensor, float]]) -> list[lab.Batch]:
    chunks = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    return [
        (
            (
                pad_sequence([x for x, _ in chunk], batch_first=True, padding_value=PAD),
                torch.tensor([len(x) for x, _ in chunk]),
            ),
            torch.tensor([y for _, y in chunk]),
        )
        for chunk in chunks
    ]
