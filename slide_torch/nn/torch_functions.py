"""Which of torch's functions take a SampledLogits, and what they do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .sampled_logits import SampledLogits


def _cross_entropy(
    input: SampledLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if size_average is not None or reduce is not None:
        raise NotImplementedError(
            "SampledLogits: cross_entropy: size_average and reduce are deprecated: use reduction"
        )
    return input.cross_entropy(
        target,
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def _binary_cross_entropy(
    input: SampledLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    if size_average is not None or reduce is not None:
        raise NotImplementedError(
            "SampledLogits: binary_cross_entropy_with_logits: size_average and reduce are deprecated: "
            "use reduction"
        )
    return input.binary_cross_entropy_with_logits(
        target, weight=weight, pos_weight=pos_weight, reduction=reduction
    )


def _nll_loss(
    input: SampledLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if not input._call.normalised:
        input._refuse(
            "nll_loss of logits", "call F.log_softmax(logits, -1) first, or F.cross_entropy"
        )
    return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction)


def _log_softmax(
    input: SampledLogits, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> SampledLogits:
    return input.log_softmax(dim, dtype)


def _softmax(
    input: SampledLogits, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    return input.softmax(dim, dtype)


HANDLERS: dict[Any, Any] = {
    F.cross_entropy: _cross_entropy,
    F.binary_cross_entropy_with_logits: _binary_cross_entropy,
    F.nll_loss: _nll_loss,
    F.log_softmax: _log_softmax,
    torch.log_softmax: "log_softmax",
    F.softmax: _softmax,
    torch.softmax: "softmax",
    torch.topk: "topk",
    torch.argmax: "argmax",
    torch.reshape: "reshape",
    torch.flatten: "flatten",
    torch.unsqueeze: "unsqueeze",
    torch.mul: "__mul__",
    torch.div: "__truediv__",
    torch.numel: "numel",
}
