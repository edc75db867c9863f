"""A classifier of sparse rows with an LSH head or a dense one: the model, its loss, exact evaluation."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from slide_torch import LSHLinear, SampledLogits
from slide_torch.data import IGNORE_INDEX, SparseRows, batches
from slide_torch.ops import topk_linear

__all__ = [
    "Classifier",
    "candidate_recall",
    "labels_of",
    "loss_of",
    "precision_at_1",
    "predict",
]


class Classifier(nn.Module):
    """Weighted bag of features -> one logit a label, without an activation in between: rows of a warm start
    (:mod:`common.recipe`) lose half of it to a ReLU."""

    def __init__(self, num_features: int, hidden: int, head: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(
            num_features, hidden, mode="sum", include_last_offset=True, sparse=True
        )
        self.head = head

    def hidden(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return self.embedding(indices, offsets, per_sample_weights=values)

    def forward(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor | SampledLogits:
        return self.head(self.hidden(indices, offsets, values))


def loss_of(logits: Tensor | SampledLogits, labels: Tensor) -> Tensor:
    """Decoupled softmax: the mean over each row's labels, (B, M) padded with IGNORE_INDEX, of the cross
    entropy of that label among the row's negatives."""
    if isinstance(logits, SampledLogits):
        return logits.cross_entropy(labels, ignore_index=IGNORE_INDEX, decoupled=True)
    kept = labels != IGNORE_INDEX
    count = kept.sum(1)
    # a place that holds no label repeats the row's first one
    places = torch.where(kept, labels, labels[:, :1]).clamp(min=0)
    negatives = logits.scatter(1, places, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(negatives - logits.gather(1, places)) * kept
    return (losses.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


@torch.no_grad()
def predict(model: Classifier, rows: SparseRows, k: int, *, progress: str | None = None) -> Tensor:
    """The k best labels of each row by the exact logits, int64 (n, k), without holding these."""
    head = model.head
    assert isinstance(head, nn.Linear | LSHLinear)
    k = min(k, head.out_features)
    found = []
    bar = tqdm(total=len(rows), desc=progress, disable=progress is None, unit=" rows", leave=False)
    for indices, offsets, values, _ in batches(rows, 512):
        hidden = model.hidden(indices, offsets, values)
        found.append(topk_linear(hidden, head.weight, head.bias, k)[1])
        bar.update(len(hidden))
    bar.close()
    return torch.cat(found)


def labels_of(rows: SparseRows) -> Tensor:
    """All rows' labels as (n, M), padded with IGNORE_INDEX."""
    counts = np.diff(rows.label_indptr)
    padded = np.full((len(rows), max(1, counts.max(initial=0))), IGNORE_INDEX, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < counts[:, None]] = rows.label_indices
    return torch.from_numpy(padded)


def precision_at_1(predicted: Tensor, labels: Tensor) -> float:
    return (labels == predicted[:, :1]).any(1).float().mean().item()


@torch.no_grad()
def candidate_recall(model: Classifier, rows: SparseRows) -> float:
    """Share of each row's exact top 10 that the LSH head's tables return within its budget."""
    assert isinstance(model.head, LSHLinear)
    shares = [
        model.head.recall(model.hidden(indices, offsets, values), 10)
        for indices, offsets, values, _ in batches(rows, 256)
    ]
    return float(np.mean(shares))
