"""Losses over active sets, with the backward passes that an optimizer may be fused with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused_update
from .library import differentiable_once, operators, register_fake
from .rows import as_gradient
from .transforms import refuse_transforms


def shared_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    log_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_probabilities: Tensor,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B) of a softmax over one active set for the whole batch; differentiable.

    Args:
        input: (B, d); weight: (N, d); bias: (N) or None; one dtype, float32 or float64.
        rows: int64 (U).
        log_weight: (U), added to the logits, or None.
        label_offsets: int64 (B + 1) into the two next.
        label_places: int64, a label's place in ``rows``; label_probabilities: its share of the target.
        scale: what logits (not ``log_weight``) are multiplied by.
        sparse: whether backward gives ``weight`` and ``bias`` row-sparse gradients.
    """
    refuse_transforms("shared_cross_entropy", input, weight, bias)
    return operators.shared_cross_entropy(
        input,
        weight,
        bias,
        rows,
        log_weight,
        label_offsets,
        label_places,
        label_probabilities,
        scale,
        sparse,
    )[0]


def sample_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    log_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_probabilities: Tensor,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B) of a softmax over each sample's own active set; differentiable.

    As :func:`shared_cross_entropy`, with ``rows`` to ``pair_samples`` as :func:`transpose_active` gives
    them; ``log_weight`` (pairs) and ``label_places`` refer to the sample-major list of pairs.
    """
    refuse_transforms("sample_cross_entropy", input, weight, bias)
    return operators.sample_cross_entropy(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        log_weight,
        label_offsets,
        label_places,
        label_probabilities,
        scale,
        sparse,
    )[0]


@register_fake("slide_torch::shared_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    log_weight: Any,
    offsets: Any,
    places: Any,
    probabilities: Any,
    scale: Any,
    sparse: Any,
) -> Any:
    batch = input.shape[0]
    return (
        input.new_empty((batch,)),
        input.new_empty((rows.shape[0], batch)),
        input.new_empty((batch,)),
    )


@register_fake("slide_torch::sample_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    pair_samples: Any,
    *rest: Any,
) -> Any:
    batch = input.shape[0]
    return (
        input.new_empty((batch,)),
        input.new_empty((pair_positions.shape[0],)),
        input.new_empty((batch,)),
    )


@register_fake("slide_torch::shared_cross_entropy_backward")
@register_fake("slide_torch::sample_cross_entropy_backward")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_rows, has_bias = rest[-2:]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0] if has_rows else 0, input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


@register_fake("slide_torch::shared_cross_entropy_backward_adam_")
@register_fake("slide_torch::sample_cross_entropy_backward_adam_")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_bias = rest[-10]
    return torch.empty_like(input), input.new_empty((rows.shape[0] if has_bias else 0,))


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.sparse = inputs
    _, logits, log_normalizer = output
    ctx.mark_non_differentiable(logits, log_normalizer)
    # weight and input are saved as such, so that torch notices in-place changes before backward
    del tensors[2]
    ctx.save_for_backward(*tensors, logits, log_normalizer)


def _gradients(
    ctx: Any, op: Any, fused_op: Any, grad_loss: Tensor, saved: tuple, *between: Tensor
) -> tuple:
    """Gradients of input, weight and bias. What an optimizer fuses with backward is updated at once, and
    has no gradient then; where the loss has no ``fused_op``, or the gradient is a result of
    ``torch.autograd.grad``, it is handed over all the same."""
    input, weight, rows = saved[:3]
    grad_loss = (grad_loss * ctx.scale).contiguous()
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    neurons = weight.shape[0]
    optimizer = (
        fused_update.optimizer_of(weight) if fused_op and ctx.sparse and need_weight else None
    )
    if optimizer is not None:
        # needs_input_grad is of the forward; like torch, do not train what is not asked for or frozen since
        accumulates = fused_update.accumulates(ctx.next_functions[1][0])
        if accumulates is False or not weight.requires_grad:
            need_weight = False
        if not accumulates or not weight.requires_grad:
            optimizer = None
    if optimizer is None:
        grad_input, grad_rows, grad_bias = op(
            grad_loss, input, weight, rows, *between, need_weight, need_bias
        )
        grad_weight = as_gradient(rows, grad_rows, neurons, ctx.sparse) if need_weight else None
    else:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "slide_torch.optim.Adam: fuse_backward: expected create_graph=False, got True: gradients of "
                "a backward that updates the weight cannot be differentiated: set fuse_backward=False"
            )
        grad_weight = None
        with torch.no_grad(), optimizer.fused_step(weight) as step:
            grad_input, grad_bias = fused_op(
                grad_loss, input, weight, rows, *between, need_bias, **step
            )
            torch.autograd.graph.increment_version((weight, step["exp_avg"], step["exp_avg_sq"]))
    return (
        grad_input if need_input else None,
        grad_weight,
        as_gradient(rows, grad_bias, neurons, ctx.sparse) if need_bias else None,
    )


def _shared_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    # saved: input, weight, rows, log_weight, label_*(3), logits, log_normalizer
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes for it, and only once
    found = _gradients(
        ctx,
        operators.shared_cross_entropy_backward,
        operators.shared_cross_entropy_backward_adam_,
        grad_loss,
        saved,
        *saved[4:],
    )
    return (*found, *[None] * 7)


def _sample_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    # saved: input, weight, rows, offsets, pair_*(3), log_weight, label_*(3), logits, log_normalizer
    saved = ctx.saved_tensors
    found = _gradients(
        ctx,
        operators.sample_cross_entropy_backward,
        operators.sample_cross_entropy_backward_adam_,
        grad_loss,
        saved,
        *saved[3:7],
        *saved[8:],
    )
    return (*found, *[None] * 11)


torch.library.register_autograd(
    "slide_torch::shared_cross_entropy", _shared_backward, setup_context=_save
)


torch.library.register_autograd(
    "slide_torch::sample_cross_entropy", _sample_backward, setup_context=_save
)


def shared_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    row_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_values: Tensor,
    label_extra: Tensor | None,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Losses (B): over one active set for the whole batch the sum of ``row_weight * softplus(logit)``, over
    a sample's labels that of ``label_extra * softplus(logit) - label_values * logit``; differentiable.

    Args:
        row_weight: (U), what an active neuron counts, or None for 1.
        label_values: (labels), targets; label_extra: (labels) or None for 0.
        input, weight, bias, rows, label_offsets, label_places, scale, sparse: as for
            :func:`shared_cross_entropy`.
    """
    refuse_transforms("shared_binary_cross_entropy", input, weight, bias)
    return operators.shared_binary_cross_entropy(
        input,
        weight,
        bias,
        rows,
        row_weight,
        label_offsets,
        label_places,
        label_values,
        label_extra,
        scale,
        sparse,
    )[0]


def sample_binary_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    row_weight: Tensor | None,
    label_offsets: Tensor,
    label_places: Tensor,
    label_values: Tensor,
    label_extra: Tensor | None,
    scale: float,
    sparse: bool,
) -> Tensor:
    """As :func:`shared_binary_cross_entropy`, over each sample's own active set; ``row_weight`` (pairs) and
    ``label_places`` refer to the sample-major list of pairs, as in :func:`sample_cross_entropy`."""
    refuse_transforms("sample_binary_cross_entropy", input, weight, bias)
    return operators.sample_binary_cross_entropy(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        row_weight,
        label_offsets,
        label_places,
        label_values,
        label_extra,
        scale,
        sparse,
    )[0]


@register_fake("slide_torch::shared_binary_cross_entropy")
def _(input: Any, weight: Any, bias: Any, rows: Any, *rest: Any) -> Any:
    batch = input.shape[0]
    return input.new_empty((batch,)), input.new_empty((rows.shape[0], batch))


@register_fake("slide_torch::sample_binary_cross_entropy")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    *rest: Any,
) -> Any:
    return input.new_empty((input.shape[0],)), input.new_empty((pair_positions.shape[0],))


@register_fake("slide_torch::shared_binary_cross_entropy_backward")
@register_fake("slide_torch::sample_binary_cross_entropy_backward")
def _(grad_loss: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_rows, has_bias = rest[-2:]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0] if has_rows else 0, input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


def _save_binary(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.sparse = inputs
    _, logits = output
    ctx.mark_non_differentiable(logits)
    del tensors[2]
    ctx.save_for_backward(*tensors, logits)


def _binary_backward(ctx: Any, op: Any, grad_loss: Tensor) -> tuple:
    # saved: input, weight, rows, (per-sample: offsets, pair_*(3),) row_weight, label_*(4), logits
    saved = ctx.saved_tensors
    between = saved[3:]
    found = _gradients(ctx, op, None, grad_loss, saved, *between)
    return (*found, *[None] * (len(between) + 2))


def _shared_binary_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    return _binary_backward(ctx, operators.shared_binary_cross_entropy_backward, grad_loss)


def _sample_binary_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple:
    return _binary_backward(ctx, operators.sample_binary_cross_entropy_backward, grad_loss)


torch.library.register_autograd(
    "slide_torch::shared_binary_cross_entropy", _shared_binary_backward, setup_context=_save_binary
)


torch.library.register_autograd(
    "slide_torch::sample_binary_cross_entropy", _sample_binary_backward, setup_context=_save_binary
)


for _name in ("cross_entropy", "binary_cross_entropy"):
    differentiable_once(f"shared_{_name}_backward", f"sample_{_name}_backward")
