"""Losses over active sets, differentiable once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, Labels, SharedActiveSet
from .autograd import Backward, register_backward
from .library import fake, operators
from .transforms import refuse_transforms


def cross_entropy(
    input: Tensor,
    layer: ActiveLayer,
    active: ActiveSet,
    labels: Labels,
    scale: float,
    *,
    decoupled: bool = False,
) -> Tensor:
    """Losses (B) of a softmax over the batch's active set, or over each sample's own; differentiable.

    Args:
        input: (B, d), of the layer's dtype, float32 or float64, contiguous.
        active: its ``log_weight`` is added to the logits.
        labels: ``probabilities`` are each label's share of its sample's target.
        scale: what logits (not ``log_weight``) are multiplied by.
        decoupled: whether the labels of a sample compete with its negatives only, not with each other.
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
        decoupled,
        layer.sparse,
    )[0]


def partial_cross_entropy(
    input: Tensor, layer: ActiveLayer, active: ActiveSet, labels: Labels, scale: float
) -> tuple[Tensor, Tensor]:
    """What a softmax over more classes than the layer's needs of its active set: each sample's log normaliser
    (-inf where nothing is active) and the sum of its labels' logits times their probabilities, (B) each;
    differentiable. :func:`cross_entropy` is ``total * log_normalizer - label_logits``, with ``total`` the sum
    of a sample's label probabilities.

    The arguments are those of :func:`cross_entropy`.
    """
    refuse_transforms("partial_cross_entropy", input, *layer.parameters)
    pattern = "shared" if isinstance(active, SharedActiveSet) else "sample"
    function: Any = _PartialCrossEntropy
    found: tuple[Tensor, Tensor] = function.apply(
        pattern,
        input,
        *layer.parameters,
        *active.operands(layer.rows),
        active.log_weight,
        *labels.operands(active),
        scale,
        False,  # decoupled
        layer.sparse,
    )
    return found


class _PartialCrossEntropy(torch.autograd.Function):
    """The operators of :func:`cross_entropy`, differentiated by two of the things that they compute."""

    @staticmethod
    def forward(ctx: Any, pattern: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        operator: Any = getattr(operators, f"{pattern}_cross_entropy")
        losses, logits, log_normalizer = operator(*arguments)
        ctx.pattern = pattern
        _BACKWARDS[pattern].save(ctx, arguments, (losses, logits, log_normalizer))
        offsets, places, probabilities = arguments[-6:-3]
        sample = torch.arange(losses.shape[0]).repeat_interleave(offsets.diff())
        own = logits[places, sample] if pattern == "shared" else logits[places]
        # a copy: the normaliser is saved, and what is returned may be written to
        return log_normalizer.clone(), torch.zeros_like(losses).index_add_(
            0, sample, own * probabilities
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_normalizer, by_label_logits = grads
        found = _BACKWARDS[ctx.pattern].gradients(
            ctx, ctx.needs_input_grad[1:], -by_label_logits, grad_log_normalizer=by_normalizer
        )
        return None, *found


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


_BACKWARDS = {
    pattern: Backward(f"{pattern}_cross_entropy", fusable=True) for pattern in ("shared", "sample")
}
for _pattern in ("shared", "sample"):
    register_backward(f"{_pattern}_cross_entropy", fusable=True)
    register_backward(f"{_pattern}_binary_cross_entropy")
