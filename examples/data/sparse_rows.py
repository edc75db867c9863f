"""Rows of the Extreme Classification Repository made ready for training."""

from __future__ import annotations

import numpy as np

from slide_torch.data import SparseRows

__all__ = ["split", "with_unit_rows"]


def split(rows: SparseRows, share: float, seed: int) -> tuple[SparseRows, SparseRows]:
    """(training, validation) rows; at least one of each."""
    order = np.random.default_rng(seed).permutation(len(rows))
    count = min(len(rows) - 1, max(1, int(share * len(rows))))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def with_unit_rows(rows: SparseRows) -> SparseRows:
    """Rows with L2-normalised features."""
    values = rows.feature_values.astype(np.float64)
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
    norms = np.sqrt(np.bincount(row_of, values * values, minlength=len(rows)))
    scaled = values / np.maximum(norms, 1e-12)[row_of]
    return SparseRows(
        rows.feature_indptr,
        rows.feature_indices,
        scaled.astype(np.float32),
        rows.label_indptr,
        rows.label_indices,
    )
