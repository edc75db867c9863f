"""A start for the embedding of sparse features: the labels that each occurs with."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..checks import as_number, checked_int
from .scipy_matrices import check_indices
from .sparse_rows import SparseRows

__all__ = ["label_embedding"]

# Columns computed at a time: those of the codes and of the rows stay small beside the result.
COLUMNS = 32


@torch.no_grad()
def label_embedding(
    rows: SparseRows,
    dim: int,
    *,
    num_features: int | None = None,
    rms: float = 0.1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Initial weights for an ``nn.EmbeddingBag`` of the features of ``rows``: features that occur with the
    same labels start close to each other.

    Each label :math:`l` has a random code :math:`C_l \sim N(0, I)`. Feature :math:`f` starts at the mean code
    of the labels that it occurs with, weighted by its values:

    .. math:: E_f = \sum_i x_{if} \sum_{l \in y_i} C_l \Big/ \sum_i |x_{if}|

    This is a random projection (Johnson & Lindenstrauss 1984) of the feature-label co-occurrence matrix,
    scaled as a whole. The head's own start, from the rows so embedded, is
    :meth:`LSHLinear.init_from_class_means_`.

    The result is the same, bit for bit, at any number of threads. Beside it memory is taken for the
    features in the order of their columns and for 32 columns of rows and labels.

    Args:
        rows: training rows. A row without labels counts with a code of 0.
        dim: width of the embedding.
        num_features: rows of the embedding; those of :class:`XMCData` if None.
        rms: root mean square of the result's rows of features that occur. Others are 0.
        generator: random generator of the codes; torch's global generator if None.
        progress: whether to show a progress bar.

    Returns:
        (num_features, dim), float32.

    Raises:
        ValueError: an argument is wrong, an index of ``rows`` is out of range, or a value is not finite.

    Examples:
        >>> embedding = nn.EmbeddingBag(train.num_features, 256, mode="sum", include_last_offset=True)
        >>> with torch.no_grad():
        ...     embedding.weight.copy_(label_embedding(train, 256))
    """
    where = "label_embedding"
    if not isinstance(rows, SparseRows):
        raise ValueError(f"{where}: rows: expected SparseRows, got {type(rows).__name__}")
    dim = checked_int(dim, 1, None, f"{where}: dim")
    if num_features is None:
        num_features = getattr(rows, "num_features", None)
        if num_features is None:
            raise ValueError(
                f"{where}: num_features: expected an int for rows that do not tell it, got None: "
                "give the number of rows of the embedding"
            )
    num_features = checked_int(num_features, 0, None, f"{where}: num_features")
    size = as_number(rms)
    if size is None or not 0 < size < math.inf:
        raise ValueError(f"{where}: rms: expected a positive finite number, got {rms!r}")
    num_labels = int(rows.label_indices.max(initial=-1)) + 1
    check_indices(f"{where}: rows: features", rows.feature_indices, num_features)
    check_indices(f"{where}: rows: labels", rows.label_indices, num_labels)
    if not np.isfinite(rows.feature_values).all():
        raise ValueError(f"{where}: rows: feature_values: expected finite numbers, got NaN or Inf")

    starts, row_of, shares = _by_feature(rows, num_features)
    labels = torch.from_numpy(rows.label_indices)
    label_starts = torch.from_numpy(rows.label_indptr).to(labels.dtype)
    result = torch.empty(num_features, dim)
    squares = torch.zeros(num_features, dtype=torch.float64)
    with tqdm(total=dim, desc="Label embedding", unit=" columns", disable=not progress) as bar:
        for begin in range(0, dim, COLUMNS):
            width = min(COLUMNS, dim - begin)
            codes = torch.randn(num_labels, width, generator=generator)
            sums = _bags(labels, codes, label_starts)
            block = _bags(row_of, sums, starts, shares)
            squares += block.double().square_().sum(1)
            result[:, begin : begin + width] = block
            bar.update(width)
    # numpy's sum knows no threads
    total, count = float(squares.numpy().sum()), int((starts.diff() > 0).sum()) * dim
    return result.mul_(size / math.sqrt(total / count)) if total > 0 else result


def _by_feature(rows: SparseRows, num_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """The features' columns one after the other: where each begins, int32 or int64 (num_features + 1), the
    rows that have the feature, and their values as shares of the feature's sum."""
    features = torch.from_numpy(rows.feature_indices)
    weights = np.abs(rows.feature_values)
    sums = np.bincount(rows.feature_indices, weights, minlength=num_features)
    shares = rows.feature_values / np.where(sums > 0, sums, 1)[rows.feature_indices]
    index = torch.int32 if max(len(features), len(rows)) < 2**31 else torch.int64
    order = torch.sort(features, stable=True).indices
    row_of = torch.repeat_interleave(
        torch.arange(len(rows), dtype=index), torch.from_numpy(np.diff(rows.feature_indptr))
    )
    starts = torch.zeros(num_features + 1, dtype=index)
    torch.cumsum(torch.bincount(features, minlength=num_features), 0, out=starts[1:])
    return starts, row_of[order], torch.from_numpy(shares.astype(np.float32))[order]


def _bags(entries: Tensor, table: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums of rows of ``table``, each by one thread in the order of ``entries``."""
    if len(table) == 0 or len(entries) == 0:
        return table.new_zeros(len(starts) - 1, table.shape[1])
    return F.embedding_bag(
        entries, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
