"""Label smoothing over active sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, Labels, SharedActiveSet
from ..ops import fused_update
from ..tables import HashTables
from .step import DrawnStep

_NAME = "lsh_linear_cross_entropy"


def check_smoothing(
    label_smoothing: float, tables: HashTables, weight: Tensor, sparse: bool
) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"{_NAME}: label_smoothing: expected a number from 0 to 1, got {label_smoothing}"
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


def smoothed(
    step: DrawnStep,
    smoothing: float,
    class_weight: Tensor | None,
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
    one vector.

    Args:
        neurons: number N of all neurons.
        copied: whether the layer of ``step`` holds copies of the active rows, not all N.
        tail_varies: whether neurons of the tail differ in importance weight.
    """
    input, labels, active, layer = step
    batch, dtype = input.shape[0], input.dtype
    count = labels.offsets.diff()
    sample = torch.arange(batch).repeat_interleave(count, output_size=labels.ids.shape[0])
    mean_weight = 1.0 if class_weight is None else class_weight.to(dtype).mean()
    own = (smoothing * mean_weight / count.to(dtype))[sample]
    probabilities = labels.probabilities * (1 - smoothing) + own

    # products and sums, no matrix products: their order must not depend on the number of threads
    label_rows, label_bias = _scaled_rows(layer, active, labels.ids, own, copied)
    pulls = (label_rows * input[sample]).sum(1) + label_bias
    rows, share = _class_shares(active, class_weight, dtype, neurons, tail_varies)
    mean_rows, mean_bias = _scaled_rows(layer, active, rows, share, copied)
    mean = (input * mean_rows.sum(0)).sum(1)
    mean = mean + (mean_bias.sum() if isinstance(mean_bias, Tensor) else mean_bias)
    addition = torch.zeros(batch, dtype=dtype).index_add(0, sample, pulls) - smoothing * mean
    addition = torch.where(count > 0, addition, 0.0) * scale
    return Labels(labels.offsets, labels.ids, probabilities), addition


def _class_shares(
    active: ActiveSet,
    class_weight: Tensor | None,
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
    if class_weight is not None:
        share = share * class_weight.detach().to(dtype)[rows]
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
