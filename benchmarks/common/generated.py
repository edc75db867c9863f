"""A generated problem of Amazon-670K's shape."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["FEATURES", "HIDDEN", "LABELS", "generate_batches", "random_rows"]

FEATURES, LABELS = 135_909, 670_091  # Amazon-670K's shape
HIDDEN = 128


def generate_batches(
    count: int, batch: int, *, seed: int, labels: int = LABELS
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches of Amazon-670K's shape: about 76 of 135,909 features and 5.5 labels a row.

    Labels fall into clusters of 64 neighbours; clusters and the labels within them follow a long
    tail (rank ^ -0.8), features are drawn by cluster for two thirds, else by the tail alone. Each is
    (indices int64, offsets int64 (B + 1), values float32, labels (B, M) int64 padded with -100).
    """
    random = np.random.default_rng(seed)
    clusters = max(1, labels // 64)

    def by_rank(limit: int, size: int) -> np.ndarray:  # density ~ rank^-0.8 by inversion
        return np.minimum((limit * random.random(size) ** 5).astype(np.int64), limit - 1)

    scatter = np.random.default_rng(0).permutation(labels)
    made = []
    for _ in range(count):
        cluster = by_rank(clusters, batch)
        number = np.maximum(1, random.poisson(5.5, batch))
        padded = np.full((batch, number.max()), -100, dtype=np.int64)
        for row in range(batch):
            own = np.unique(cluster[row] * 64 + by_rank(64, number[row]))
            padded[row, : len(own)] = scatter[np.minimum(own, labels - 1)]
        length = np.maximum(1, random.poisson(76, batch))
        total = int(length.sum())
        of_cluster = np.repeat(cluster, length) * 31 + by_rank(400, total)
        features = np.where(random.random(total) < 2 / 3, of_cluster, by_rank(FEATURES, total))
        values = random.random(total).astype(np.float32) + 0.1
        row_of = np.repeat(np.arange(batch), length)
        values /= np.sqrt(np.bincount(row_of, values**2))[row_of]
        made.append(
            (
                torch.from_numpy(features % FEATURES),
                torch.from_numpy(np.concatenate([[0], length.cumsum()])),
                torch.from_numpy(values.astype(np.float32)),
                torch.from_numpy(padded),
            )
        )
    return made


def random_rows(neurons: int, count: int) -> Tensor:
    """``count`` random rows, increasing."""
    return torch.randperm(neurons)[:count].sort().values
