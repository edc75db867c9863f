"""The next word as a problem of time_to_accuracy.py: a GRU over windows of text, judged by perplexity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.generated import HIDDEN
from examples.common.likelihood import log_frequency, perplexity
from examples.data.wikipedia import UNKNOWN, Corpus, windows_of

from .problems import Problem

__all__ = ["NextWord"]

CONTEXT = 32  # words of a window, each of which is a row


class GRUBody(nn.Module):
    """Words (B, T) -> what is known after each, (B * T, hidden)."""

    def __init__(self, words: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, hidden, sparse=True)
        nn.init.normal_(self.embedding.weight, std=hidden**-0.5)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        return self.gru(self.embedding(words))[0].flatten(0, 1)


class NextWord(Problem):
    """Windows of a text, each read from a blank state.

    Args:
        corpus: the text; its words are numbered by falling frequency.
        classes: the vocabulary is the so many most frequent words, the others are one unknown word; 0: all.
        validation_rows: so many words of the validation text, from its beginning.

    Raises:
        ValueError: a part of the text is shorter than a window, or ``classes`` has no unknown word.
    """

    name = "words"
    metric = "perplexity"
    larger_is_better = False
    hidden = HIDDEN

    def __init__(self, corpus: Corpus, *, classes: int = 0, validation_rows: int = 5_000) -> None:
        self.num_labels = min(classes or corpus.num_words, corpus.num_words)
        unknown = corpus.words.index(UNKNOWN)
        if unknown >= self.num_labels:
            raise ValueError(
                f"NextWord: classes: expected more than {unknown}, the number of {UNKNOWN}, got {classes}"
            )
        texts = {part: getattr(corpus, part) for part in ("train", "validation", "test")}
        texts["validation"] = texts["validation"][: max(CONTEXT, validation_rows) + 1]
        self.windows = {
            part: windows_of(np.where(text < self.num_labels, text, unknown), CONTEXT)
            for part, text in texts.items()
        }
        for part, windows in self.windows.items():
            if not len(windows):
                raise ValueError(f"NextWord: corpus.{part}: expected over {CONTEXT} words")
        counts = np.bincount(self.windows["train"].flatten(), minlength=self.num_labels)
        self.log_frequency = log_frequency(counts)
        self.train_rows = len(self.windows["train"]) * CONTEXT

    def body(self) -> nn.Module:
        return GRUBody(self.num_labels, self.hidden)

    def start_(self, body: nn.Module, linear: nn.Linear, seed: int) -> None:
        """Biases begin at the words' log frequency."""
        with torch.no_grad():
            linear.bias.copy_(self.log_frequency)

    def batches(
        self, size: int, *, seed: int, skip: int = 0
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        windows = self.windows["train"]
        count = max(1, size // CONTEXT)
        order = np.random.default_rng(seed).permutation(len(windows))
        for start in range(skip * count, len(windows), count):
            words = torch.from_numpy(windows[order[start : start + count]])
            yield (words[:, :-1],), words[:, 1:].reshape(-1, 1)

    def evaluate(
        self, body: nn.Module, weight: Tensor, bias: Tensor, part: str
    ) -> dict[str, float]:
        return {"perplexity": perplexity(body, self.windows[part], weight, bias)}

    def description(self) -> dict[str, Any]:
        held_out = {f"{part}_rows": len(self.windows[part]) * CONTEXT for part in self.windows}
        return super().description() | held_out
