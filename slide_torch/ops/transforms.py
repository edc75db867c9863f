"""What operators over active sets refuse: other ways to differentiate than backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Refuses what differentiates in other ways than backward.

    Operators with a backward of their own drop forward-mode tangents without a word, and know no transform
    of ``torch.func``.

    Raises:
        NotImplementedError: inside such a transform, or where one of ``tensors`` has a tangent.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        got = "a transform of torch.func (grad, jvp, vmap, ...)"
    elif any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        got = "a tensor with a forward-mode tangent (torch.autograd.forward_ad)"
    else:
        return
    raise NotImplementedError(
        f"{name}: expected backward() or torch.autograd.grad, got {got}: what is computed over active sets "
        "is differentiable by these only; the output of a layer in eval mode, all logits, by every other"
    )
