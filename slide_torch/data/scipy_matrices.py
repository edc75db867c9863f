"""Sparse matrices of scipy as arrays and back. scipy is optional: it is imported where it is needed."""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 1 << 31
"""Columns at most: indices are kept as int32."""


def scipy_sparse(where: str) -> Any:
    """The module ``scipy.sparse``."""
    try:
        import scipy.sparse
    except ImportError as error:
        raise ImportError(
            f"{where}: expected scipy to be installed, got none: pip install scipy"
        ) from error
    return scipy.sparse


def row_arrays(where: str, matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row pointers (int64), indices (int32) and values of a matrix, in the order in which CSR has them;
    the values in its dtype and, unlike the others, perhaps in its memory.

    Raises:
        ValueError: if it is no sparse matrix of real numbers, or its arrays do not fit together.
    """
    if not scipy_sparse(where).issparse(matrix) or matrix.ndim != 2:
        shape = getattr(matrix, "shape", None)
        of_shape = "" if shape is None else f" of shape {shape}"
        raise ValueError(
            f"{where}: expected a sparse matrix of scipy with two dimensions, got "
            f"{type(matrix).__name__}{of_shape}: make one by scipy.sparse.csr_array"
        )
    if matrix.dtype.kind not in "buif":
        raise ValueError(f"{where}: expected real numbers, got dtype {matrix.dtype}")
    num_rows, num_columns = matrix.shape
    if num_columns > LARGEST:
        raise ValueError(
            f"{where}: expected at most {LARGEST} columns, got {num_columns}: "
            "indices are kept as int32"
        )
    matrix = matrix.tocsr()
    indptr, indices, values = matrix.indptr, matrix.indices, matrix.data
    count = min(len(indices), len(values))
    if len(indptr) != num_rows + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"{where}: indptr: expected {num_rows + 1} row pointers that begin with 0 and do not "
            "fall: the matrix is damaged"
        )
    if indptr[-1] > count:
        raise ValueError(
            f"{where}: indptr: expected {count} entries at most, got {indptr[-1]}: "
            "the matrix is damaged"
        )
    indices, values = indices[: indptr[-1]], values[: indptr[-1]]  # there may be room for more
    check_indices(where, indices, num_columns)
    return indptr.astype(np.int64), indices.astype(np.int32), values


def check_indices(where: str, indices: np.ndarray, count: int) -> None:
    """Raises a ValueError unless all indices are in [0, count)."""
    if len(indices) and (indices.min() < 0 or indices.max() >= count):
        got = f"{indices.min()} to {indices.max()}"
        raise ValueError(f"{where}: expected indices in [0, {count}), got {got}")


def without_zeros(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row pointers and indices of the entries that are not 0."""
    kept = values != 0
    if kept.all():
        return indptr, indices
    before = np.concatenate([[0], np.cumsum(kept)])
    return before[indptr].astype(np.int64), indices[kept]
