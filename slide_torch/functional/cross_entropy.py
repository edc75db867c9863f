"""Softmax cross entropy of a linear layer, over an active set."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..active_set import Labels
from ..ops import fused_update
from ..sampling.targets import class_factors, is_probabilities
from ..tables import HashTables
from .checks import checked_input
from .exclusion import Excluded, LeftOut, check_exclusion, check_margin, labels_and_excluded
from .smoothing import Smoothing, check_smoothing, smoothed
from .step import check_reduction, draw_for_loss, reduced

_NAME = "lsh_linear_cross_entropy"


def lsh_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    negatives: Tensor | None = None,
    exclude: Tensor | None = None,
    margin: float | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    scale: float = 1.0,
    sparse: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Softmax cross entropy of a linear layer, over the neurons that matter for this batch.

    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``, computed over an active set:
    the labels, the neurons that the hash ``tables`` return for the inputs, and a random tail (see
    :class:`slide_torch.LSHOptions`). With every neuron active it equals ``F.cross_entropy``.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: one of: class indices, int64 (\\*); several labels a row, int64 (\\*, M), M < N, padded with
            ``ignore_index`` (the target is uniform over a row's labels); for a two-dimensional input also
            probabilities, a sparse CSR tensor (B, N) or a dense floating-point tensor (B, N).
        linear_bias: (N) or None.
        tables: hash tables over ``linear_weight``. They are built at the first use and updated as
            training goes on.
        negatives: neurons that are always active, on top of what the tables find: int64 (M), for the whole
            batch, or (\\*, M), a list a row, padded with -100. With ``pattern="shared"`` every row competes
            with the union of the lists, with ``"per_sample"`` each with its own list. A negative that is a
            label of a row stays its label there.
        exclude: known false negatives, int64 (\\*, M), a list a row, padded with -100: they do not compete in
            the loss of that row, even if they are among ``negatives``, and none is a label of the row. With
            ``correction="importance"`` the sum over other neurons is an unbiased estimate of that over all
            classes that are not excluded. A row with several labels needs ``decoupled=True``. Not available
            with ``label_smoothing`` and under ``torch.compile``.
        margin: excludes further neurons, a row's probable false negatives: those whose logit (times
            ``scale``) exceeds that of the row's best label by more than this (as the margin of GISTEmbed:
            Solatorio 2024, arXiv 2402.16829, with the layer itself as the guide). None: none. Limits as for
            ``exclude``. Costs a second product with the active neurons.
        weight: (N), a factor for each class, as in ``F.cross_entropy``.
        ignore_index: class index that counts as no label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.cross_entropy``. The mean is over rows
            with a label, weighted by ``weight`` (over all rows for probabilities).
        label_smoothing: share of each target that is spread evenly over all classes, from 0 to 1. With
            ``correction="importance"`` the mean of all N logits is estimated without bias from active rows
            and tail; with ``"none"`` it is the mean over the active set, like the softmax (not available
            for ``pattern="per_sample"``). A row without a label (for probabilities: of zeros only) has no
            loss.
        decoupled: whether each label of a row competes with the row's negatives only, not with its other
            labels: the decoupled softmax of Gupta et al., "Dual-Encoders for Extreme Multi-Label
            Classification" (ICLR 2024, arXiv 2310.10636). With p the target's probabilities (times
            ``weight``) and z the logits, the loss of a row is the sum over its labels of
            ``p[l] * (log(exp(z[l]) + sum of exp(z[n]) over its negatives) - z[l])``. Its negatives are the
            active neurons that are no label of the row: neither listed in a padded target nor stored in a
            sparse one (even with a probability of 0), nor positive in a dense one. With
            ``correction="importance"`` the sum over negatives is an unbiased estimate of the sum over those
            of all classes. A row with one label has the loss and gradient of ``decoupled=False``, bit for
            bit. Not available with ``label_smoothing``.
        scale: positive factor of the logits (an inverse temperature).
        sparse: whether ``linear_weight`` and ``linear_bias`` get row-sparse gradients
            (``torch.sparse_coo``, coalesced) instead of dense ones.
        training: whether this call counts as a training step in the schedule of the tables.
        generator: random generator for the tail and for ties; torch's global generator if None.

    Returns:
        A scalar, or (\\*) for ``reduction="none"``; float32 for bfloat16 parameters, whose active rows are
        computed in float32 and whose gradient is rounded to bfloat16.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; nothing has been changed.
        NotImplementedError: an option of ``F.cross_entropy`` that sampling does not support.

    No gradient flows through the choice of active neurons. The loss can be differentiated once, by backward;
    forward-mode differentiation and the transforms of ``torch.func`` raise an error.
    """
    input = checked_input(
        _NAME, input, linear_weight, linear_bias, tables, scale=scale, sparse=sparse
    )
    if sparse and fused_update.is_replica():
        fused_update.refuse_in_replicas(f"{_NAME}: linear_weight", linear_weight)
    check_reduction(_NAME, reduction, ("mean", "sum", "none"))
    check_smoothing(label_smoothing, tables, linear_weight, sparse, decoupled=decoupled)
    neurons = linear_weight.shape[0]
    drawn_for: Tensor | Labels = target
    check_margin(_NAME, margin)
    excludes = exclude is not None or margin is not None
    if excludes:
        drawn_for, excluded = labels_and_excluded(
            _NAME, target, exclude, input, neurons, ignore_index
        )
        check_exclusion(_NAME, drawn_for, label_smoothing, decoupled=decoupled)
    step = draw_for_loss(
        _NAME,
        input,
        linear_weight,
        linear_bias,
        drawn_for,
        tables,
        negatives=negatives,
        class_weight=weight,
        ignore_index=ignore_index,
        sparse=sparse,
        training=training,
        generator=generator,
    )
    labels, active, addition = step.labels, step.active, None
    total = labels.probabilities.sum()
    if label_smoothing > 0:
        total = torch.where(total == 0, torch.nan, total)  # NaN as in torch, not inf
        if weight is not None:
            weight = class_factors(weight, neurons, step.input, _NAME)
        labels, addition = smoothed(
            step,
            Smoothing.of(label_smoothing, labels, weight),
            scale,
            neurons=neurons,
            copied=step.layer.weight is not linear_weight,
            tail_varies=step.active.log_weight is not None
            and tables.options.tail_parts != ("uniform",),
        )
    if margin is not None:
        excluded = excluded.joined(Excluded.above_labels(step, scale, margin, neurons))
    if excludes:  # rows without a label have no loss
        labelled = excluded.of_rows(labels.offsets.diff() > 0)
        labels, active, *_ = LeftOut.of(labels, active, labelled)
        decoupled = True
    losses = ops.cross_entropy(step.input, step.layer, active, labels, scale, decoupled=decoupled)
    if addition is not None:
        losses = losses + addition
    return reduced(losses, reduction, input.shape[:-1], None if is_probabilities(target) else total)
