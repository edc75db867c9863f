"""Sparse rows with several labels each, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["IGNORE_INDEX", "SparseRows", "XMCData", "batches"]

IGNORE_INDEX = -100
"""The padding of labels, as in ``F.cross_entropy``."""

_Rows = TypeVar("_Rows", bound="SparseRows")


@dataclass(frozen=True)
class SparseRows:
    """Rows of features and of labels, both in compressed sparse row form.

    Row ``i`` has the features ``feature_indices[feature_indptr[i]:feature_indptr[i + 1]]`` with
    their ``feature_values``, and likewise its labels; it may be without either.

    Attributes:
        feature_indptr: ``(n + 1)`` int64.
        feature_indices: ``(number of non-zero features)`` int32.
        feature_values: ``(number of non-zero features)`` float32.
        label_indptr: ``(n + 1)`` int64.
        label_indices: ``(number of labels)`` int32.
    """

    feature_indptr: np.ndarray
    feature_indices: np.ndarray
    feature_values: np.ndarray
    label_indptr: np.ndarray
    label_indices: np.ndarray

    def __len__(self) -> int:
        return len(self.feature_indptr) - 1

    def select(self: _Rows, rows: np.ndarray) -> _Rows:
        """The given rows, in the given order, as a copy.

        Args:
            rows: Integer, one-dimensional, each in [0, n).

        Raises:
            ValueError: if rows are anything else.
        """
        rows = _checked_rows(rows, len(self))
        features, feature_indptr = _positions(self.feature_indptr, rows)
        labels, label_indptr = _positions(self.label_indptr, rows)
        return dataclasses.replace(
            self,
            feature_indptr=feature_indptr,
            feature_indices=self.feature_indices[features],
            feature_values=self.feature_values[features],
            label_indptr=label_indptr,
            label_indices=self.label_indices[labels],
        )


@dataclass(frozen=True)
class XMCData(SparseRows):
    """The rows of one file, as they stand there: neither sorted nor merged.

    Attributes:
        num_features: How many features there are: the rows of the embedding.
        num_labels: How many labels there are: the rows of the output layer.
    """

    num_features: int
    num_labels: int

    def label_counts(self) -> Tensor:
        """How often each label occurs, ``(num_labels)`` int64; what ``metrics.propensities`` takes.

        A label that a row lists twice counts twice.
        """
        return torch.from_numpy(np.bincount(self.label_indices, minlength=self.num_labels))


def batches(
    data: SparseRows,
    batch_size: int,
    *,
    seed: int | None = None,
    drop_last: bool = False,
    normalise: bool = False,
    skip: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Iterates over all rows once.

    Args:
        data: The rows.
        batch_size: Rows a batch, B.
        seed: Shuffles the rows; None takes them in order.
        drop_last: Whether to leave out a last batch of fewer rows.
        normalise: Whether to scale each row's values to unit Euclidean length; a row whose values
            are all zero stays as it is.
        skip: Batches to leave out at the beginning, as when training resumes in the middle.

    Yields:
        ``(indices, offsets, values, labels)``: what ``nn.EmbeddingBag(mode="sum",
        include_last_offset=True)`` takes as input, offsets ``(B + 1)`` (both int64) and
        per_sample_weights (float32), and labels ``(B, M)`` int64, padded with -100, where M is the
        largest number of labels of a row of this batch, possibly 0.

    Raises:
        ValueError: if batch_size is less than 1 or skip is negative, or either is no integer.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("skip", skip, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(
                f"batches: {name}: expected an integer of at least {least}, got {value!r}"
            )
    num_rows = len(data)
    order = np.arange(num_rows)
    if seed is not None:
        np.random.default_rng(seed).shuffle(order)
    end = num_rows - batch_size + 1 if drop_last else num_rows
    for start in range(skip * batch_size, end, batch_size):
        batch = data.select(order[start : start + batch_size])
        counts = np.diff(batch.label_indptr)
        labels = np.full((len(batch), counts.max()), IGNORE_INDEX, dtype=np.int64)
        labels[np.arange(labels.shape[1]) < counts[:, None]] = batch.label_indices
        values = _unit_rows(batch) if normalise else batch.feature_values
        yield (
            torch.from_numpy(batch.feature_indices.astype(np.int64)),
            torch.from_numpy(batch.feature_indptr),
            torch.from_numpy(values),
            torch.from_numpy(labels),
        )


def _positions(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the entries of the given rows lie, and the row pointers once they are gathered."""
    starts = indptr[rows]
    lengths = indptr[rows + 1] - starts
    new_indptr = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=new_indptr[1:])
    return np.arange(new_indptr[-1]) + np.repeat(starts - new_indptr[:-1], lengths), new_indptr


def _checked_rows(rows: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.size and not np.issubdtype(rows.dtype, np.integer)):
        advice = "; of a mask give np.flatnonzero(mask)" if rows.dtype == bool else ""
        raise ValueError(
            "SparseRows.select: rows: expected integers of one dimension, got "
            f"{rows.dtype} of shape {rows.shape}{advice}"
        )
    wrong = rows[(rows < 0) | (rows >= count)] if rows.size else rows
    if wrong.size:
        raise ValueError(
            f"SparseRows.select: rows: expected values in [0, {count}), got {wrong[0]} "
            f"({wrong.size} such)"
        )
    return rows.astype(np.int64)


def _unit_rows(rows: SparseRows) -> np.ndarray:
    """The values, each row scaled to unit length."""
    values = rows.feature_values.astype(np.float64)
    row_of = np.repeat(np.arange(len(rows)), np.diff(rows.feature_indptr))
    lengths = np.sqrt(np.bincount(row_of, weights=values * values, minlength=len(rows)))
    return (values / np.where(lengths > 0, lengths, 1)[row_of]).astype(np.float32)
