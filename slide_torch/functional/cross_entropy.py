"""Softmax cross entropy of a linear layer, over an active set."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops import fused_update
from ..precision import active_layer, widened
from ..sampling.step import StepRequest
from ..sampling.targets import is_probabilities
from ..sampling.traced_step import draw
from ..tables import HashTables
from .checks import checked_input
from .smoothing import _smooth, check_smoothing

_NAME = "lsh_linear_cross_entropy"


def lsh_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    sparse: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Softmax cross entropy of a linear layer, over the neurons that matter for this batch.

    ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``, computed over an active set:
    the labels, the neurons that the hash ``tables`` return for the inputs, and a random tail (see
    :class:`slide_torch.LSHOptions`). With every neuron active it is the same function.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: class indices, int64 (\\*); several labels a row, int64 (\\*, M), M < N, padded with
            ``ignore_index`` (the target is uniform over a row's labels); probabilities, a sparse CSR
            tensor (B, N) or a dense floating-point (B, N), for a two-dimensional input.
        linear_bias: (N) or None.
        tables: over ``linear_weight``; built at the first use and kept fresh as they are used.
        weight: (N), a factor for each class, as in ``F.cross_entropy``.
        ignore_index: class indices that count as no label.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.cross_entropy``. The mean is over rows
            that have a label, weighted by ``weight`` (over all rows for probabilities).
        label_smoothing: share of each target that is spread evenly over the classes, 0 to 1. The mean of
            all N logits, which it pulls on, is estimated without bias from active rows and tail with
            ``correction="importance"``; with ``"none"`` it is that of the active set, over which the softmax
            is taken (refused for ``pattern="per_sample"``). A row without a label (of probabilities, with
            zeros only) stays without loss.
        scale: factor of the logits, positive (an inverse temperature).
        sparse: whether ``linear_weight`` and ``linear_bias`` get row-sparse gradients
            (``torch.sparse_coo``, coalesced) instead of dense ones.
        training: whether this call counts as a training step for the tables' schedule.
        generator: source of the tail and of ties; torch's global generator if None.

    Returns:
        A scalar, or (\\*) for ``reduction="none"``; float32 where parameters are bfloat16: of these the
        active rows are computed in float32, and their gradient rounded to bfloat16.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; nothing has been changed.
        NotImplementedError: something of ``F.cross_entropy`` that sampling cannot honour.

    The tables are discrete: no gradient flows through the choice of neurons. Differentiable once, by
    backward: forward-mode differentiation and the transforms of ``torch.func`` are refused.
    """
    input = checked_input(
        _NAME, input, linear_weight, linear_bias, tables, scale=scale, sparse=sparse
    )
    if sparse and fused_update.is_replica():
        fused_update.refuse_in_replicas(f"{_NAME}: linear_weight", linear_weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{_NAME}: reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    check_smoothing(label_smoothing, tables, linear_weight, sparse)
    leading = input.shape[:-1]
    input = widened(input)
    flat = input.reshape(-1, input.shape[-1])
    labels, active = draw(
        StepRequest.of(
            _NAME,
            tables,
            flat,
            linear_weight,
            linear_bias,
            target,
            training=training,
            sparse=sparse,
            leading=leading,
            class_weight=weight,
            ignore_index=ignore_index,
            generator=generator,
        )
    )
    flat = flat.contiguous()
    total = labels.probabilities.sum()
    layer = active_layer(linear_weight, linear_bias, active.rows, sparse)
    smoothed = None
    if label_smoothing > 0:
        total = torch.where(total == 0, torch.nan, total)  # as torch has it, not inf
        labels, smoothed = _smooth(
            labels,
            label_smoothing,
            active,
            flat,
            layer,
            weight,
            scale,
            neurons=linear_weight.shape[0],
            copied=layer.weight is not linear_weight,
            tail_varies=active.log_weight is not None and tables.options.tail_parts != ("uniform",),
        )
    losses = ops.cross_entropy(flat, layer, active, labels, scale)
    if smoothed is not None:
        losses = losses + smoothed
    if reduction == "none":
        return losses.reshape(leading)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if is_probabilities(target) else losses.sum() / total
