"""Rows that the next optimizer step is about to change."""

from __future__ import annotations

import torch
from torch import Tensor

# Batches of rows that are kept apart; more are merged.
MOST_BATCHES = 64


class PendingRows:
    """The active rows of batches at one version of the weight.

    They change together, once the optimizer steps and the version moves on. Until then their marks outlive
    a rehash, as when gradients are accumulated over several batches.
    """

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._version = -1

    def add(self, rows: Tensor, version: int) -> None:
        """Adds ``rows`` (int64 (n)) that change when the weight is no longer of ``version``."""
        if self.have_changed(version):
            self._batches, self._version = [], version
        elif len(self._batches) == MOST_BATCHES:  # fully_shard keeps the version as it was
            self._batches = [torch.unique(torch.cat(self._batches))]
        self._batches.append(rows)

    def have_changed(self, version: int) -> bool:
        """Whether the change is in the past, now that the weight is of ``version``."""
        return version != self._version

    def clear(self) -> None:
        self._batches = []

    def rows(self) -> Tensor | None:
        """The rows of all batches, int64, in the order in which they came; None if there are none."""
        return torch.cat(self._batches) if self._batches else None

    def mark(self, dirty: Tensor) -> None:
        """Sets the rows in ``dirty`` (bool (N))."""
        for rows in self._batches:
            dirty[rows] = True
