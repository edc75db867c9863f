"""Sparse rows with several labels each, and batches of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .scipy_matrices import check_indices, row_arrays, scipy_sparse, without_zeros

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

    @staticmethod
    def from_scipy(features: Any, labels: Any = None) -> XMCData:
        """A copy of sparse matrices of scipy, which scikit-learn's vectorizers and binarizers return.

        Entries of CSR matrices stay as they stand there: neither sorted nor merged. Matrices in other
        formats are converted to CSR first.

        Args:
            features: Sparse ``(n, num_features)`` of any real dtype. Values are rounded to float32.
            labels: Sparse ``(n, num_labels)`` of any real dtype: a row has the labels whose entries are
                not 0. None: no row has any, and ``num_labels`` is 0.

        Raises:
            ImportError: if scipy is not installed.
            ValueError: if a matrix is no sparse matrix of two dimensions, its dtype is not real, it has
                more than 2^31 columns or is damaged, a value is not finite as float32, or the
                numbers of rows differ.

        Examples:
            >>> features = TfidfVectorizer().fit_transform(documents)
            >>> labels = MultiLabelBinarizer(sparse_output=True).fit_transform(tags)
            >>> train = SparseRows.from_scipy(features, labels)
        """
        where = "SparseRows.from_scipy"
        indptr, indices, values = row_arrays(f"{where}: features", features)
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{where}: features: expected values that are finite as float32, got NaN or Inf"
            )
        if labels is None:
            label_indptr, label_indices = np.zeros_like(indptr), np.empty(0, np.int32)
        else:
            found = row_arrays(f"{where}: labels", labels)
            label_indptr, label_indices = without_zeros(*found)
        if len(label_indptr) != len(indptr):
            raise ValueError(
                f"{where}: labels: expected {len(indptr) - 1} rows, as many as of features, got "
                f"{len(label_indptr) - 1}"
            )
        return XMCData(
            feature_indptr=indptr,
            feature_indices=indices,
            feature_values=values,
            label_indptr=label_indptr,
            label_indices=label_indices,
            num_features=features.shape[1],
            num_labels=0 if labels is None else labels.shape[1],
        )

    def to_scipy(self) -> tuple[Any, Any]:
        """Features and labels as two ``scipy.sparse.csr_array``, as a copy.

        Entries stay as they stand here: neither sorted nor merged.

        Returns:
            ``(n, num_features)`` and ``(n, num_labels)``, both float32; each label is a 1. Where the
            rows do not tell these numbers (:class:`XMCData` does) they are the largest index plus 1.

        Raises:
            ImportError: if scipy is not installed.
            ValueError: if an index is out of range.
        """
        where = "SparseRows.to_scipy"
        sparse = scipy_sparse(where)
        ones = np.ones(len(self.label_indices), np.float32)
        matrices = []
        for kind, values, indices, indptr in (
            ("feature", self.feature_values, self.feature_indices, self.feature_indptr),
            ("label", ones, self.label_indices, self.label_indptr),
        ):
            count = getattr(self, f"num_{kind}s", None)
            if count is None:
                count = int(indices.max(initial=-1)) + 1
            check_indices(f"{where}: {kind}_indices", indices, count)
            arrays = (values, indices, indptr)  # a copy: scipy sorts and merges in place
            matrices.append(sparse.csr_array(arrays, shape=(len(self), count), copy=True))
        return matrices[0], matrices[1]

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
    """The rows of one file or of matrices, as they stand there: neither sorted nor merged.

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
