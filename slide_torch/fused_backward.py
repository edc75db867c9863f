"""Which optimizer updates a parameter inside backward (``optim.Adam(..., fuse_backward=True)``)."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class FusingOptimizer(Protocol):
    """An optimizer whose step on row-sparse gradients can run inside backward."""

    def fused_step(self, param: Tensor) -> AbstractContextManager[dict[str, Any]]:
        """States and scalars of this step of ``param``, which counts unless the block raises."""


_optimizers: Any = WeakIdKeyDictionary()  # parameter -> weak reference to its optimizer


def register(param: Tensor, optimizer: FusingOptimizer, *, fuse: bool) -> None:
    """Says whether the backward of a loss over active sets updates ``param`` by ``optimizer``."""
    if fuse:
        _optimizers[param] = weakref.ref(optimizer)
    elif optimizer_of(param) is optimizer:
        del _optimizers[param]


def optimizer_of(param: Tensor) -> FusingOptimizer | None:
    """The optimizer that updates ``param`` inside backward, if there is one and it still lives."""
    reference = _optimizers.get(param)
    return None if reference is None else reference()


def accumulates(leaf: Any) -> bool | None:
    """Whether the backward that runs adds to the gradient of a parameter, by its node ``leaf`` of the graph.

    False where it was asked for other gradients only, as by ``torch.autograd.grad(loss, input)``; None where
    the gradient is a result, as of ``torch.autograd.grad(loss, weight)``.
    """
    try:
        return torch._C._will_engine_execute_node(leaf)  # type: ignore[attr-defined]
    except RuntimeError:  # torch does not say it of a leaf whose gradient is a result
        return None
