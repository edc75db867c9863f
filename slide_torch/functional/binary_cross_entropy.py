"""Binary cross entropy of a linear layer, over an active set."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..active_set import Labels, SharedActiveSet
from ..precision import active_layer, widened
from ..sampling.step import StepRequest
from ..sampling.targets import INDEX_DTYPES, class_factors, is_probabilities
from ..sampling.traced_step import draw
from ..tables import HashTables
from .checks import checked_input


def lsh_linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    sparse: bool = False,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Binary cross entropy of a linear layer's logits, over the neurons that matter for this batch.

    ``F.binary_cross_entropy_with_logits(F.linear(input, linear_weight, linear_bias), target)``, computed over
    an active set (see :func:`lsh_linear_cross_entropy`). With ``correction="importance"`` each neuron of the
    tail counts the inverse of its inclusion probability (``(N - |S|) / n`` for n uniform ones, |S| active for
    certain), so that loss and gradients are unbiased estimates of the dense ones. With ``"none"``
    neurons that are not active count 0.
    With every neuron active it is the same function.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: targets, a sparse CSR tensor (B, N) or a dense floating-point (B, N), for a
            two-dimensional input; classes whose target is 1, int64 (\\*, M), M < N, padded with
            ``ignore_index``, or one each, int64 (\\*).
        weight: (N), a factor of each class's loss.
        pos_weight: (N), or a tensor of one number, a factor of the positive targets.
        reduction: ``"mean"``, over all B N elements, or ``"sum"``.
        linear_bias, tables, ignore_index, scale, sparse, training, generator: as for
            :func:`lsh_linear_cross_entropy`.

    Returns:
        A scalar; of bfloat16 parameters as :func:`lsh_linear_cross_entropy` has it.

    Raises:
        ValueError: an argument's shape, dtype, device or value is wrong; nothing has been changed.
        NotImplementedError: ``reduction="none"``, whose result would have N columns.
    """
    name = "lsh_linear_binary_cross_entropy"
    input = checked_input(
        name, input, linear_weight, linear_bias, tables, scale=scale, sparse=sparse
    )
    if reduction == "none":
        raise NotImplementedError(
            f"{name}: reduction: expected 'mean' or 'sum', got 'none', which is a loss for each of all "
            "classes; only those of active ones are computed"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction: expected 'mean' or 'sum', got {reduction!r}")
    leading, neurons = input.shape[:-1], linear_weight.shape[0]
    input = widened(input)
    flat = input.reshape(-1, input.shape[-1])
    class_weight = None if weight is None else class_factors(weight, neurons, input, name)
    positive = None
    if pos_weight is not None:
        if isinstance(pos_weight, Tensor) and pos_weight.numel() == 1:
            pos_weight = pos_weight.reshape(1).expand(neurons)
        positive = class_factors(pos_weight, neurons, input, name, "pos_weight")
    if isinstance(target, Tensor) and target.dim() == len(leading) + 1:
        target = _without_repeats(target, ignore_index)
    labels, active = draw(
        StepRequest.of(
            name,
            tables,
            flat,
            linear_weight,
            linear_bias,
            target,
            training=training,
            sparse=sparse,
            leading=leading,
            ignore_index=ignore_index,
            generator=generator,
        )
    )
    values = labels.probabilities
    if not is_probabilities(target):
        values = torch.ones_like(values)
    extra = None
    if positive is not None:
        factor = positive[labels.ids]
        extra, values = values * (factor - 1), values * factor
    if class_weight is not None:
        values = values * class_weight[labels.ids]
        extra = None if extra is None else extra * class_weight[labels.ids]
    row_weight = None if active.log_weight is None else active.log_weight.exp()
    if class_weight is not None:
        classes = active.rows if isinstance(active, SharedActiveSet) else active.active.long()
        own = class_weight[classes]
        row_weight = own if row_weight is None else row_weight * own
    flat = flat.contiguous()
    layer = active_layer(linear_weight, linear_bias, active.rows, sparse)
    labels = Labels(labels.offsets, labels.ids, values)
    losses = ops.binary_cross_entropy(flat, layer, active, row_weight, labels, extra, scale)
    # as torch, the mean over no elements is NaN
    return losses.sum() if reduction == "sum" else losses.sum() / (losses.shape[0] * neurons)


def _without_repeats(target: Tensor, ignore_index: int) -> Tensor:
    """Padded lists of classes (\\*, M) with a class that is listed again ignored; other targets as such."""
    if target.layout != torch.strided or target.dtype not in INDEX_DTYPES or target.shape[-1] < 2:
        return target
    ordered = target.to(torch.int64).sort(dim=-1).values
    again = ordered[..., 1:] == ordered[..., :-1]
    return torch.cat([ordered[..., :1], ordered[..., 1:].masked_fill(again, ignore_index)], -1)
