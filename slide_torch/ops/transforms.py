"""Errors for ``torch.func`` and forward mode: operators over active sets have a backward only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transform_of(*tensors: Tensor | None) -> str | None:
    """What differentiates a computation of ``tensors`` in other ways than backward, if anything does."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func (grad, jvp, vmap, ...)"
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return "a tensor with a forward-mode tangent (torch.autograd.forward_ad)"
    return None


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Refuses what differentiates in other ways than backward.

    Operators with a backward of their own drop forward-mode tangents without a word, and know no transform
    of ``torch.func``.

    Raises:
        NotImplementedError: inside such a transform, or where one of ``tensors`` has a tangent.
    """
    got = transform_of(*tensors)
    if got is not None:
        raise NotImplementedError(
            f"{name}: expected backward() or torch.autograd.grad, got {got}: what is computed over "
            "active sets is differentiable by these only; the output of a layer in eval mode, all logits, by "
            "every other"
        )
