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

    def awaits_step(self, param: Tensor) -> bool:
        """Whether backward has updated ``param`` since the last step."""


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
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:  # torch does not say it of a leaf whose gradient is a result
        return None


def refuse_in_replicas(name: str, param: Tensor) -> None:
    """Raises a RuntimeError, which begins with ``name``, if a cross entropy over rows of ``param`` updates it
    inside backward: before gradients can be averaged, so that replicas would part."""
    handed_over = param.dtype == torch.bfloat16 or not param.requires_grad
    if not handed_over and optimizer_of(param) is not None:
        raise RuntimeError(
            f"{name}: expected an optimizer that steps after gradients are averaged, got one with "
            "fuse_backward=True, which updates each replica by its own gradient inside backward: set "
            "fuse_backward=False"
        )


def is_replica() -> bool:
    """Whether this runs in the forward of a ``DistributedDataParallel``."""
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return False
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module() is not None
