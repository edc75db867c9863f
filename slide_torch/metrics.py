"""Metrics of extreme classification: precision, nDCG, recall and propensity scored precision at k.

All take ranked label indices ``predicted (B, >= k)`` and padded labels ``targets (B, M)``, tensors or numpy
arrays; they return a Python float. They follow the Extreme Classification Repository: a row without labels
counts as zero; it is not left out (select the other rows beforehand if you want that). A negative
entry of ``targets`` is padding; a negative entry of ``predicted`` means that nothing was found for
this rank, which is a miss. A label listed twice in a row of ``targets`` counts once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checks import as_int

__all__ = [
    "PROPENSITY_CONSTANTS",
    "ndcg_at_k",
    "precision_at_k",
    "propensities",
    "psp_at_k",
    "recall_at_k",
]

_DEFAULT_CONSTANTS = (0.55, 1.5)

PROPENSITY_CONSTANTS: dict[str, tuple[float, float]] = {
    "Amazon-670K": (0.6, 2.6),
    "Amazon-3M": (0.6, 2.6),
    "WikiLSHTC-325K": (0.5, 0.4),
    "Wiki-500K": (0.5, 0.4),
    "Wikipedia-500K": (0.5, 0.4),
    "WikipediaLarge-500K": (0.5, 0.4),
    "EURLex-4K": _DEFAULT_CONSTANTS,
    "Wiki10-31K": _DEFAULT_CONSTANTS,
    "AmazonCat-13K": _DEFAULT_CONSTANTS,
    "Delicious-200K": _DEFAULT_CONSTANTS,
}
"""The published ``(A, B)`` of the propensity model, by dataset; all others use ``(0.55, 1.5)``."""


def precision_at_k(predicted: Tensor, targets: Tensor, k: int) -> float:
    """The share of the first k predicted labels that are correct.

    The divisor is k even for rows with fewer than k labels, so that 1 may be out of reach.

    Args:
        predicted: ``(B, >= k)`` integer, label indices, best first, distinct in a row.
        targets: ``(B, M)`` integer, the correct labels, padded with negative values.
        k: How many predicted labels count.

    Raises:
        TypeError: if a tensor is none, or not of an integer dtype, or k is no int.
        ValueError: if shapes do not fit, k is out of range, or a label is predicted twice in a row.
    """
    hits, *_ = _hits("precision_at_k", predicted, targets, k)
    return hits.double().mean().item()


def recall_at_k(predicted: Tensor, targets: Tensor, k: int) -> float:
    """The share of a row's labels that are among its first k predicted labels.

    Arguments and errors as in :func:`precision_at_k`. The divisor is the number of the row's
    labels, so that 1 is out of reach for rows with more than k. A row without labels counts as
    zero.
    """
    hits, labels, _ = _hits("recall_at_k", predicted, targets, k)
    counts = (labels >= 0).sum(dim=1)
    return (hits.sum(dim=1).double() / counts.clamp(min=1)).mean().item()


def ndcg_at_k(predicted: Tensor, targets: Tensor, k: int) -> float:
    """Normalised discounted cumulative gain: a hit at rank r (from 1) gains 1 / log2(r + 1).

    Arguments and errors as in :func:`precision_at_k`. The divisor is the gain of the best ranking,
    which has all of the row's labels, or k of them, in front. A row without labels counts as zero.
    """
    hits, labels, _ = _hits("ndcg_at_k", predicted, targets, k)
    gains = 1 / torch.arange(2, k + 2, dtype=torch.float64, device=hits.device).log2()
    counts = (labels >= 0).sum(dim=1).clamp(1, k)
    best = gains.cumsum(0)[counts - 1]
    return ((hits * gains).sum(dim=1) / best).mean().item()


def psp_at_k(predicted: Tensor, targets: Tensor, k: int, label_propensities: Tensor) -> float:
    """Propensity scored precision: each hit counts 1 / propensity, so that rare labels weigh more.

    As in the Extreme Classification Repository it is the sum over all rows divided by the best sum
    that any prediction could attain. It is a ratio of sums and not a mean over rows: the values of
    several batches cannot be averaged; concatenate the predictions. Zero if no row has a label.

    Args:
        predicted: ``(B, >= k)`` integer, label indices, best first, distinct in a row.
        targets: ``(B, M)`` integer, the correct labels, padded with negative values.
        k: How many predicted labels count.
        label_propensities: ``(N)`` floating point, positive, as made by :func:`propensities` from
            the label counts of the training rows.

    Raises:
        TypeError: if a tensor has a dtype of the wrong kind, or k is no int.
        ValueError: as in :func:`precision_at_k`, or if propensities are not positive or too few.
    """
    hits, labels, ranked = _hits("psp_at_k", predicted, targets, k)
    label_propensities = _tensor("psp_at_k", "label_propensities", label_propensities)
    if not label_propensities.is_floating_point():
        raise TypeError(
            "psp_at_k: label_propensities: expected a floating-point dtype, got "
            f"{label_propensities.dtype}: make it with propensities(label_counts, num_rows)"
        )
    if label_propensities.dim() != 1 or not bool((label_propensities > 0).all()):
        raise ValueError(
            "psp_at_k: label_propensities: expected (N) positive numbers, got shape "
            f"{tuple(label_propensities.shape)}: make it with propensities(label_counts, num_rows)"
        )
    largest = max(int(ranked.max()), int(labels.max()) if labels.numel() else -1)
    if largest >= len(label_propensities):
        raise ValueError(
            "psp_at_k: label_propensities: expected an entry for each label, got "
            f"{len(label_propensities)} entries and label {largest}: count the labels with "
            "torch.bincount(..., minlength=num_labels)"
        )
    if largest < 0:
        return 0.0
    scores = label_propensities.to(hits.device, torch.float64).reciprocal()
    attained = (scores[ranked.clamp(min=0)] * hits).sum()
    label_scores = torch.where(labels >= 0, scores[labels.clamp(min=0)], 0.0)
    best = label_scores.topk(min(k, labels.shape[1]), dim=1).values.sum()
    return (attained / best).item() if best > 0 else 0.0


def propensities(
    label_counts: Tensor,
    num_rows: int,
    A: float = _DEFAULT_CONSTANTS[0],
    B: float = _DEFAULT_CONSTANTS[1],
) -> Tensor:
    """The probability that a label is noted where it is relevant, by its frequency in training.

    The model of Jain, Prabhu and Varma, "Extreme multi-label loss functions for recommendation,
    tagging, ranking & other missing label applications" (KDD 2016), with the natural logarithm:

        p = 1 / (1 + C (count + B) ** -A),    C = (log(num_rows) - 1) (B + 1) ** A

    Args:
        label_counts: ``(N)``, in how many training rows each label occurs.
        num_rows: The number of training rows, at least 3 (for fewer, C is negative).
        A: Constant of the dataset, see ``PROPENSITY_CONSTANTS``.
        B: Constant of the dataset, see ``PROPENSITY_CONSTANTS``.

    Returns:
        ``(N)`` float64, in (0, 1).

    Raises:
        ValueError: if counts are negative or not (N), num_rows is too small, or B is not positive.
    """
    label_counts = _tensor("propensities", "label_counts", label_counts)
    if label_counts.dim() != 1 or bool((label_counts < 0).any()):
        raise ValueError(
            "propensities: label_counts: expected (N) numbers of at least 0, got shape "
            f"{tuple(label_counts.shape)}: count with torch.bincount(..., minlength=num_labels)"
        )
    if num_rows < 3:
        raise ValueError(
            f"propensities: num_rows: expected at least 3, got {num_rows}: "
            "give the number of training rows"
        )
    if B <= 0:
        raise ValueError(
            f"propensities: B: expected a number above 0, got {B}: take it from PROPENSITY_CONSTANTS"
        )
    scale = (math.log(num_rows) - 1) * (B + 1) ** A
    result: Tensor = 1 / (1 + scale * (label_counts.double() + B) ** -A)
    return result


def _hits(
    function: str, predicted: Tensor, targets: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks the arguments; which of the first k predictions are correct, the labels, the predictions.

    Returns:
        ``(B, k)`` bool; ``(B, M)`` int64, the labels sorted, with all padding and repeats -1; ``(B, k)``
        int64.
    """
    predicted = _tensor(function, "predicted", predicted)
    targets = _tensor(function, "targets", targets)
    k = _check(function, predicted, targets, k)
    ranked = predicted[:, :k].long().contiguous()
    in_order = ranked.sort(dim=1).values
    if bool(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)).any()):
        raise ValueError(
            f"{function}: predicted: expected distinct labels among the first {k} of a row, got "
            "repeats: take the indices of one topk over distinct labels"
        )
    if targets.shape[1] == 0:
        return torch.zeros_like(ranked, dtype=torch.bool), targets.long(), ranked
    # A search in sorted labels needs memory for (B, k), where comparing all pairs needs (B, k, M).
    labels = targets.long().clamp(min=-1).sort(dim=1).values
    position = torch.searchsorted(labels, ranked).clamp(max=labels.shape[1] - 1)
    hits = (labels.gather(1, position) == ranked) & (ranked >= 0)
    repeat = torch.zeros_like(labels, dtype=torch.bool)
    repeat[:, 1:] = labels[:, 1:] == labels[:, :-1]
    return hits, labels.masked_fill(repeat, -1), ranked


def _tensor(function: str, name: str, value: Any) -> Tensor:
    """A tensor as such, a numpy array of numbers as a tensor."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.tensor(value)
    if not isinstance(value, Tensor):
        kind = (
            f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise TypeError(
            f"{function}: {name}: expected a tensor or a numpy array of numbers, got {kind}: "
            "make it with torch.tensor"
        )
    return value


def _check(function: str, predicted: Tensor, targets: Tensor, k: Any) -> int:
    """Refuses arguments that do not fit; returns k."""
    for name, tensor in (("predicted", predicted), ("targets", targets)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(
                f"{function}: {name}: expected an integer dtype, got {tensor.dtype}: "
                "give label indices, not scores or masks"
            )
        if tensor.dim() != 2:
            raise ValueError(
                f"{function}: {name}: expected 2 dimensions, got shape {tuple(tensor.shape)}: "
                "for a single label a row use unsqueeze(1)"
            )
    if len(predicted) != len(targets) or len(predicted) == 0:
        raise ValueError(
            f"{function}: targets: expected as many rows as predicted, at least 1, got "
            f"{len(targets)} and {len(predicted)}: give both for the same rows"
        )
    number = as_int(k)
    if number is None:
        raise TypeError(
            f"{function}: k: expected an int, got {type(k).__name__}: give one k a call"
        )
    if not 1 <= number <= predicted.shape[1]:
        raise ValueError(
            f"{function}: k: expected 1 to {predicted.shape[1]}, the predictions a row, got "
            f"{k}: predict at least k labels"
        )
    return number
