"""The classifier of the records: a cold start, a ReLU, labels that compete with each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.classifier import Classifier
from slide_torch import SampledLogits
from slide_torch.data import IGNORE_INDEX

__all__ = ["ReLUClassifier", "loss_of"]


class ReLUClassifier(Classifier):
    """Weighted bag of features -> ReLU -> one logit a label."""

    def __init__(self, num_features: int, hidden: int, head: nn.Module) -> None:
        super().__init__(num_features, hidden, head)
        nn.init.normal_(self.embedding.weight, std=0.3)

    def hidden(self, indices: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
        return torch.relu(super().hidden(indices, offsets, values))


def loss_of(logits: Tensor | SampledLogits, labels: Tensor) -> Tensor:
    """Cross entropy against targets uniform over each row's labels, (B, M) padded with IGNORE_INDEX."""
    if isinstance(logits, SampledLogits):
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    kept = labels != IGNORE_INDEX
    count = kept.sum(1)
    own = F.log_softmax(logits, dim=1).gather(1, labels.clamp(min=0)) * kept
    return -(own.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)
