"""The functions of torch that accept a SampledLogits, and what they do with it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Logits(Protocol):
    """The methods of a SampledLogits that torch's functions call here."""

    def cross_entropy(self, target: Tensor, **options: Any) -> Tensor: ...
    def binary_cross_entropy_with_logits(self, target: Tensor, **options: Any) -> Tensor: ...
    def log_softmax(self, dim: int, dtype: torch.dtype | None) -> Logits: ...
    def softmax(self, dim: int, dtype: torch.dtype | None) -> Tensor: ...
    def _check_normalised(self, name: str) -> None: ...


def _cross_entropy(
    input: Logits,
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
    input: Logits,
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
    input: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    input._check_normalised("nll_loss")
    return _cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction)


def _log_softmax(
    input: Logits, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Logits:
    return input.log_softmax(dim, dtype)


def _softmax(
    input: Logits, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
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
