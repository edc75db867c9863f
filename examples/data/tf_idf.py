"""Tokens of texts as features: weighted by tf-idf, of unit length."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Features", "tf_idf"]


class Features(NamedTuple):
    """Rows of features in compressed sparse row form, sorted within a row.

    Attributes:
        indptr: ``(n + 1)`` int64.
        indices: int32.
        values: float32.
        count: how many features there are.
        token_of: ``(count)`` int64, the token behind each.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    count: int
    token_of: np.ndarray


def tf_idf(
    row_of: np.ndarray, token_of: np.ndarray, tokens: int, part: np.ndarray, min_rows: int
) -> Features:
    """The features of rows that hold tokens.

    Args:
        row_of: int64, the row of each occurrence of a token.
        token_of: int64, the token, in [0, tokens).
        tokens: how many tokens there are.
        part: ``(n)``, the part of each row; 0 for training.
        min_rows: a token is a feature if this many training rows hold it.
    """
    pairs, counts = np.unique(row_of * tokens + token_of, return_counts=True)
    row_of, token_of = np.divmod(pairs, tokens)
    training_rows = np.bincount(token_of[part[row_of] == 0], minlength=tokens)
    kept = training_rows >= min_rows
    idf = np.log((1 + np.count_nonzero(part == 0)) / (1 + training_rows[kept])) + 1
    column_of = np.cumsum(kept) - 1
    used = kept[token_of]
    row_of, indices, counts = row_of[used], column_of[token_of[used]], counts[used]
    values = counts * idf[indices]
    values /= np.sqrt(np.bincount(row_of, values * values, minlength=len(part)))[row_of]
    return Features(
        np.searchsorted(row_of, np.arange(len(part) + 1)),
        indices.astype(np.int32),
        values.astype(np.float32),
        int(kept.sum()),
        np.flatnonzero(kept),
    )
