"""Label smoothing over active sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, Labels, SharedActiveSet
from ..ops import fused_update
from ..tables import HashTables
from .step import DrawnStep

_NAME = "lsh_linear_cross_entropy"


def check_smoothing(
    label_smoothing: float, tables: HashTables, weight: Tensor, sparse: bool, *, decoupled: bool
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"{_NAME}: label_smoothing: expected a number from 0 to 1, got {label_smoothing}"
        )
    if label_smoothing > 0 and decoupled:
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0 with decoupled=True, got {label_smoothing}: labels that "
            "do not compete with each other have no common softmax to smooth: use decoupled=False"
        )
    options = tables.options
    own_sets = options.pattern == "per_sample" and options.correction == "none"
    if label_smoothing > 0 and own_sets and options.budget < tables.out_features:
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0 with pattern='per_sample' and correction='none', got "
            f"{label_smoothing}: use correction='importance', or pattern='shared'"
        )
    if label_smoothing == 0:
        return
    if torch.compiler.is_compiling():
        if sparse or (options.pattern == "per_sample" and not tables.exact):
            raise NotImplementedError(
                f"{_NAME}: label_smoothing: expected 0.0 under torch.compile with sparse=True or "
                f"pattern='per_sample', got {label_smoothing}: use sparse=False and pattern='shared', or "
                "leave the loss out of the graph"
            )
    elif sparse and weight.requires_grad and fused_update.optimizer_of(weight) is not None:
        raise NotImplementedError(
            f"{_NAME}: label_smoothing: expected 0.0 with an optimizer that updates the weight inside "
            f"backward, got {label_smoothing}: smoothing has a gradient of its own, which would be a second "
            "step: set fuse_backward=False"
        )


class Smoothing(NamedTuple):
    """How much is smoothed, over which classes.

    Attributes:
        share: of each target, spread over all classes.
        class_weight: (N), of the layer's classes, or None.
        mean_weight: mean weight of all classes.
        counts: int64 (B), the number of labels of each sample.
        portion: the layer's share of all classes: 1, unless it holds a shard of them.
    """

    share: float
    class_weight: Tensor | None
    mean_weight: Tensor | float
    counts: Tensor
    portion: float = 1.0

    @staticmethod
    def of(share: float, labels: Labels, class_weight: Tensor | None) -> Smoothing:
        """That of a layer which has all classes."""
        return Smoothing(share, class_weight, mean_weight(class_weight), labels.offsets.diff())


def mean_weight(class_weight: Tensor | None) -> Tensor | float:
    return 1.0 if class_weight is None else class_weight.mean()


def smoothed(
    step: DrawnStep,
    smoothing: Smoothing,
    scale: float,
    *,
    neurons: int,
    copied: bool,
    tail_varies: bool,
) -> tuple[Labels, Tensor]:
    """Labels, and an addition to the losses (B), that make the cross entropy of ``step`` label-smoothed.

    With p the probabilities of a sample's labels (weighted, any sum), c the classes' mean weight, n the log
    normaliser, and s the smoothing, the loss is ``(1 - s) sum p (n - z) + s mean over classes of c (n - z)``.
    Labels of ``(1 - s) p + s c q``, q one over their number, bring in all of n, and too much of their own
    logits: what is left to add, ``s c sum q z - s mean(c z)``, is linear in the input, so that the mean takes
    one vector. Of a shard of the classes it is the shard's part of that sum.

    Args:
        neurons: number N of the layer's neurons.
        copied: whether the layer of ``step`` holds copies of the active rows, not all N.
        tail_varies: whether neurons of the tail differ in importance weight.
    """
    input, labels, active, layer = step
    batch, dtype, count = input.shape[0], input.dtype, smoothing.counts
    sample = torch.arange(batch).repeat_interleave(
        labels.offsets.diff(), output_size=labels.ids.shape[0]
    )
    own = (smoothing.share * smoothing.mean_weight / count.to(dtype))[sample]
    probabilities = labels.probabilities * (1 - smoothing.share) + own

    # products and sums, no matrix products: their order must not depend on the number of threads
    label_rows, label_bias = _scaled_rows(layer, active, labels.ids, own, copied)
    pulls = (label_rows * input[sample]).sum(1) + label_bias
    rows, share = _class_shares(active, smoothing, dtype, neurons, tail_varies)
    mean_rows, mean_bias = _scaled_rows(layer, active, rows, share, copied)
    mean = (input * mean_rows.sum(0)).sum(1)
    mean = mean + (mean_bias.sum() if isinstance(mean_bias, Tensor) else mean_bias)
    addition = torch.zeros(batch, dtype=dtype).index_add(0, sample, pulls) - smoothing.share * mean
    addition = torch.where(count > 0, addition, 0.0) * scale
    return Labels(labels.offsets, labels.ids, probabilities), addition


def _class_shares(
    active: ActiveSet,
    smoothing: Smoothing,
    dtype: torch.dtype,
    neurons: int,
    tail_varies: bool,
) -> tuple[Tensor, Tensor]:
    """Active rows and the share of each in an estimate of the mean over all classes. Where each sample has an
    active set of its own, any one estimates that mean: the first sample's is taken."""
    if isinstance(active, SharedActiveSet):
        rows, log_weight = active.rows, active.log_weight
    else:
        first = slice(int(active.offsets[:2][-1]))  # of an empty batch: none
        rows, log_weight = active.active[first].long(), active.log_weight
        log_weight = None if log_weight is None else log_weight[first]
    share = torch.ones(rows.shape[0], dtype=dtype) if log_weight is None else log_weight.exp()
    # for a uniform tail the shares sum to N exactly; others are unbiased with N, not with their sum
    share = share / (neurons if tail_varies else share.sum())
    if smoothing.portion != 1.0:
        share = share * smoothing.portion
    if smoothing.class_weight is not None:
        share = share * smoothing.class_weight[rows]
    return rows, share


def _scaled_rows(
    layer: ActiveLayer, active: ActiveSet, ids: Tensor, factors: Tensor, copied: bool
) -> tuple[Tensor, Tensor | float]:
    """Weight rows and biases of the neurons ``ids`` int64 (n), each times its factor; differentiable."""
    weight, bias, _, sparse = layer
    if copied:
        places = torch.searchsorted(active.rows, ids)
        of_bias = 0.0 if bias is None else bias.index_select(0, places) * factors
        return weight.index_select(0, places) * factors[:, None], of_bias
    of_bias = 0.0 if bias is None else bias.gather(0, ids, sparse_grad=sparse) * factors
    return F.embedding(ids, weight, sparse=sparse) * factors[:, None], of_bias
