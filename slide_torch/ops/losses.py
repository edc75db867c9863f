"""Losses over active sets, differentiable once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, Labels, SharedActiveSet
from .autograd import register_backward
from .library import fake, operators
from .transforms import refuse_transforms


def cross_entropy(
    input: Tensor, layer: ActiveLayer, active: ActiveSet, labels: Labels, scale: float
) -> Tensor:
    """Losses (B) of a softmax over the batch's active set, or over each sample's own; differentiable.

    Args:
        input: (B, d), of the layer's dtype, float32 or float64, contiguous.
        active: its ``log_weight`` is added to the logits.
        labels: ``probabilities`` are each label's share of its sample's target.
        scale: what logits (not ``log_weight``) are multiplied by.
    """
    refuse_transforms("cross_entropy", input, *layer.parameters)
    shared = isinstance(active, SharedActiveSet)
    operator = operators.shared_cross_entropy if shared else operators.sample_cross_entropy
    return operator(
        input,
        *layer.parameters,
        *active.operands(layer.rows),
        active.log_weight,
        *labels.operands(active),
        scale,
        layer.sparse,
    )[0]


def binary_cross_entropy(
    input: Tensor,
    layer: ActiveLayer,
    active: ActiveSet,
    row_weight: Tensor | None,
    labels: Labels,
    label_extra: Tensor | None,
    scale: float,
) -> Tensor:
    """Losses (B): over the active set the sum of ``row_weight * softplus(logit)``, over a sample's labels
    that of ``label_extra * softplus(logit) - target * logit``; differentiable.

    Args:
        row_weight: what an active neuron counts, (U) where the batch shares its active set, else (pairs);
            None for 1.
        labels: ``probabilities`` are the targets.
        label_extra: (labels), or None for 0.
        input, layer, active, scale: as for :func:`cross_entropy`.
    """
    refuse_transforms("binary_cross_entropy", input, *layer.parameters)
    shared = isinstance(active, SharedActiveSet)
    operator = (
        operators.shared_binary_cross_entropy if shared else operators.sample_binary_cross_entropy
    )
    return operator(
        input,
        *layer.parameters,
        *active.operands(layer.rows),
        row_weight,
        *labels.operands(active),
        label_extra,
        scale,
        layer.sparse,
    )[0]


@fake("shared_cross_entropy", "shared_binary_cross_entropy")
def _(a: SimpleNamespace) -> Any:
    batch = a.input.shape[0]
    losses, logits = a.input.new_empty((batch,)), a.input.new_empty((a.rows.shape[0], batch))
    return (losses, logits) if hasattr(a, "row_weight") else (losses, logits, losses.clone())


@fake("sample_cross_entropy", "sample_binary_cross_entropy")
def _(a: SimpleNamespace) -> Any:
    losses = a.input.new_empty((a.input.shape[0],))
    logits = a.input.new_empty((a.pair_positions.shape[0],))
    return (losses, logits) if hasattr(a, "row_weight") else (losses, logits, losses.clone())


@fake(
    "shared_cross_entropy_backward",
    "sample_cross_entropy_backward",
    "shared_binary_cross_entropy_backward",
    "sample_binary_cross_entropy_backward",
)
def _(a: SimpleNamespace) -> Any:
    active, d = a.rows.shape[0], a.input.shape[1]
    return (
        torch.empty_like(a.input),
        a.input.new_empty((active if a.has_rows else 0, d)),
        a.input.new_empty((active if a.has_bias else 0,)),
    )


@fake("shared_cross_entropy_backward_adam_", "sample_cross_entropy_backward_adam_")
def _(a: SimpleNamespace) -> Any:
    grad_bias = a.input.new_empty((a.rows.shape[0] if a.has_bias else 0,))
    return torch.empty_like(a.input), grad_bias


for _pattern in ("shared", "sample"):
    register_backward(f"{_pattern}_cross_entropy", fusable=True)
    register_backward(f"{_pattern}_binary_cross_entropy")
