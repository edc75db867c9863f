"""Binary cross entropy of a linear layer, over an active set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..active_set import ActiveSet, Labels, SharedActiveSet
from ..precision import widened
from ..sampling.targets import INDEX_DTYPES, class_factors, is_probabilities
from ..tables import HashTables
from .checks import checked_input
from .exclusion import Excluded, LeftOut, labels_and_excluded
from .step import DrawnStep, check_reduction, draw_for_loss, reduced

_NAME = "lsh_linear_binary_cross_entropy"


def lsh_linear_binary_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    tables: HashTables,
    negatives: Tensor | None = None,
    exclude: Tensor | None = None,
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
    tail is weighted by the inverse of its inclusion probability (``(N - |S|) / n`` for n uniform draws and
    |S| neurons that are active for certain), so that loss and gradients are unbiased estimates of the dense
    ones. With ``"none"`` inactive neurons count 0. With every neuron active it equals
    ``F.binary_cross_entropy_with_logits``.

    Args:
        input: (\\*, d), float32, float64 or bfloat16.
        linear_weight: (N, d), the same dtype, contiguous.
        target: one of: targets, a sparse CSR tensor (B, N) or a dense floating-point tensor (B, N), for a
            two-dimensional input; the classes whose target is 1, int64 (\\*, M), M < N, padded with
            ``ignore_index``; or one class a row, int64 (\\*).
        linear_bias: (N) or None.
        tables: hash tables over ``linear_weight``, as for :func:`lsh_linear_cross_entropy`.
        negatives: int64 (M) or (\\*, M), neurons that are always active, as for
            :func:`lsh_linear_cross_entropy`.
        exclude: int64 (\\*, M), a list a row, padded with -100: classes that count 0 in that row's loss (the
            mean is still over all B N elements); none has a target in the row. Not available under
            ``torch.compile``.
        weight: (N), a factor for each class's loss.
        pos_weight: (N), or a tensor of one number, a factor for the positive targets.
        ignore_index: class index that counts as no label.
        reduction: ``"mean"``, over all B N elements, or ``"sum"``.
        scale: positive factor of the logits.
        sparse: whether ``linear_weight`` and ``linear_bias`` get row-sparse gradients.
        training: whether this call counts as a training step in the schedule of the tables.
        generator: random generator for the tail and for ties; torch's global generator if None.

    Returns:
        A scalar; float32 for bfloat16 parameters, see :func:`lsh_linear_cross_entropy`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value; nothing has been changed.
        NotImplementedError: ``reduction="none"``, whose result would have N columns.
    """
    input = checked_input(
        _NAME, input, linear_weight, linear_bias, tables, scale=scale, sparse=sparse
    )
    if reduction == "none":
        raise NotImplementedError(
            f"{_NAME}: reduction: expected 'mean' or 'sum', got 'none', which is a loss for each of all "
            "classes; only those of active ones are computed"
        )
    check_reduction(_NAME, reduction, ("mean", "sum"))
    neurons = linear_weight.shape[0]
    factors = ClassFactors.of(weight, pos_weight, neurons, widened(input))
    if isinstance(target, Tensor) and target.dim() == input.dim():
        target = without_repeats(target, ignore_index)
    drawn_for: Tensor | Labels = target
    excluded = None
    if exclude is not None:
        drawn_for, excluded = labels_and_excluded(
            _NAME, target, exclude, input, neurons, ignore_index
        )
    step = draw_for_loss(
        _NAME,
        input,
        linear_weight,
        linear_bias,
        drawn_for,
        tables,
        negatives=negatives,
        ignore_index=ignore_index,
        sparse=sparse,
        training=training,
        generator=generator,
    )
    losses = losses_of(step, factors, scale, ones=not is_probabilities(target), excluded=excluded)
    # as in torch, the mean over no elements is NaN
    return reduced(losses, reduction, input.shape[:-1], losses.shape[0] * neurons)


class ClassFactors(NamedTuple):
    """Factors of the classes, (N) each or None.

    Attributes:
        weight: of a class's loss.
        positive: of its positive targets.
    """

    weight: Tensor | None
    positive: Tensor | None

    @staticmethod
    def of(
        weight: Tensor | None, pos_weight: Tensor | None, neurons: int, input: Tensor
    ) -> ClassFactors:
        """Those of ``neurons`` classes, in the dtype of ``input``.

        Raises:
            ValueError: shape or type is wrong.
        """
        class_weight = None if weight is None else class_factors(weight, neurons, input, _NAME)
        if pos_weight is None:
            return ClassFactors(class_weight, None)
        if isinstance(pos_weight, Tensor) and pos_weight.numel() == 1:
            pos_weight = pos_weight.reshape(1).expand(neurons)
        positive = class_factors(pos_weight, neurons, input, _NAME, "pos_weight")
        return ClassFactors(class_weight, positive)

    def of_classes(self, first: int, last: int) -> ClassFactors:
        """Those of classes ``first`` to ``last`` - 1."""
        return ClassFactors(*(None if f is None else f[first:last] for f in self))


def losses_of(
    step: DrawnStep,
    factors: ClassFactors,
    scale: float,
    *,
    ones: bool,
    excluded: Excluded | None = None,
) -> Tensor:
    """The losses (B) of a step's samples, over its active set.

    Args:
        ones: whether targets are 1 for each label, instead of its probability.
        excluded: what does not count.
    """
    active, row_weight = step.active, _row_weight(step.active, factors.weight)
    labels, extra = _label_values(step.labels, *factors, ones=ones)
    if excluded is not None:
        own = torch.zeros_like(labels.probabilities) if extra is None else extra
        labels, active, places, order = LeftOut.of(labels, active, excluded)
        whole = own.new_ones(places.shape) if row_weight is None else row_weight[places]
        extra = torch.cat([own, -whole])[order]
    return ops.binary_cross_entropy(
        step.input, step.layer, active, row_weight, labels, extra, scale
    )


def _label_values(
    labels: Labels, class_weight: Tensor | None, positive: Tensor | None, *, ones: bool
) -> tuple[Labels, Tensor | None]:
    """Labels with the factors of their logits, and what ``pos_weight`` adds to the factors of their softplus.

    Args:
        ones: whether targets are 1 for each label, instead of its probability.
    """
    values = labels.probabilities
    if ones:
        values = torch.ones_like(values)
    extra = None
    if positive is not None:
        factor = positive[labels.ids]
        extra, values = values * (factor - 1), values * factor
    if class_weight is not None:
        values = values * class_weight[labels.ids]
        extra = None if extra is None else extra * class_weight[labels.ids]
    return Labels(labels.offsets, labels.ids, values), extra


def _row_weight(active: ActiveSet, class_weight: Tensor | None) -> Tensor | None:
    """The factor of each active neuron's loss: importance correction and class weight."""
    row_weight = None if active.log_weight is None else active.log_weight.exp()
    if class_weight is None:
        return row_weight
    classes = active.rows if isinstance(active, SharedActiveSet) else active.active.long()
    own = class_weight[classes]
    return own if row_weight is None else row_weight * own


def without_repeats(target: Tensor, ignore_index: int) -> Tensor:
    """Padded lists of classes (\\*, M), in which a class that is listed again is ignored; other targets
    unchanged."""
    if target.layout != torch.strided or target.dtype not in INDEX_DTYPES or target.shape[-1] < 2:
        return target
    ordered = target.to(torch.int64).sort(dim=-1).values
    again = ordered[..., 1:] == ordered[..., :-1]
    return torch.cat([ordered[..., :1], ordered[..., 1:].masked_fill(again, ignore_index)], -1)
