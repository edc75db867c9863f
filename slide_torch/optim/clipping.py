"""Gradient clipping for row-sparse and dense gradients together."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..shards import shard_of


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """:func:`torch.nn.utils.clip_grad_norm_` with support for row-sparse gradients, for which the result is
    the same as for dense ones. Gradients are scaled in place. The norm of a sharded layer is that of all its
    rows, for which every rank must call this.

    Args:
        parameters: the parameters whose gradients are clipped by their total norm.
        max_norm: largest norm afterwards, not negative.
        norm_type: p of the p-norm, not negative; ``inf``, or ``"inf"``, for the largest absolute value.
        error_if_nonfinite: whether a norm of NaN or Inf raises an error.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: ``max_norm`` or ``norm_type`` is negative or no number; nothing is changed.
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; nothing is changed.
    """
    max_norm, norm_type = _norm("max_norm", max_norm), _norm("norm_type", norm_type)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    values = [_values(p) for p in parameters if p.grad is not None]
    norms = _norms(parameters, norm_type)
    total = (
        torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]), norm_type)
        if norms
        else torch.tensor(0.0)
    )
    if error_if_nonfinite and not math.isfinite(total):
        raise RuntimeError(
            f"clip_grad_norm_: parameters: expected gradients of a finite norm, got {total.item()}: pass "
            "error_if_nonfinite=False to scale them all the same"
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(factor.to(value))
    return total


def _norms(parameters: list[Tensor], norm_type: float) -> list[Tensor]:
    """The norms of the gradients; those of a sharded layer's rows from all ranks that have some."""
    norms, of_shards = [], []
    for parameter in parameters:
        shard, norm = shard_of(parameter), torch.tensor(0.0)
        if parameter.grad is not None:
            norm = torch.linalg.vector_norm(_values(parameter), norm_type)
        if shard is not None:
            of_shards.append((norm.to(torch.float32), shard))
        elif parameter.grad is not None and parameter.grad.numel():
            norms.append(norm)
    for norm, shard in of_shards:
        found = [torch.empty_like(norm) for _ in range(shard.ranks)]
        torch.distributed.all_gather(found, norm, group=shard.group)
        norms.extend(found)
    return norms


def _norm(name: str, value: Any) -> float:
    try:
        number = float(value)  # a string too, as in torch
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    # (the norm of a negative p depends on entries that are zero, which row-sparse gradients have not)
    if not number >= 0:
        raise ValueError(f"clip_grad_norm_: {name}: expected a number of at least 0, got {value!r}")
    return number


def _values(parameter: Tensor) -> Tensor:
    """The values of a gradient, every entry once; a view."""
    grad = parameter.grad
    assert grad is not None
    if grad.layout != torch.sparse_coo:
        return grad
    if not grad.is_coalesced():  # accumulated over batches: a row may stand in it twice
        parameter.grad = grad = grad.coalesce()
    return grad._values()
