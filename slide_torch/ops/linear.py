"""Linear maps into and out of active neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import differentiable_once, operators, register_fake
from .rows import as_gradient
from .transforms import refuse_transforms


def shared_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, sparse: bool
) -> Tensor:
    """``(input @ weight[rows].T + bias[rows]).T``: values (U, B) of one active set for the whole batch;
    differentiable.

    Args:
        input: (B, d); weight: (N, d); bias: (N) or None; one dtype, float32 or float64.
        rows: int64 (U).
        sparse: whether backward gives ``weight`` and ``bias`` row-sparse gradients.
    """
    refuse_transforms("shared_linear", input, weight, bias)
    return operators.shared_linear(input, weight, bias, rows, sparse)


def shared_weighted_rows(values: Tensor, weight: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """``values.T @ weight[rows]``, (B, d), of ``values`` (U, B) as :func:`shared_linear` gives them;
    differentiable."""
    refuse_transforms("shared_weighted_rows", values, weight)
    return operators.shared_weighted_rows(values, weight, rows, sparse)


def sample_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    sparse: bool,
) -> Tensor:
    """Values (pairs), sample-major, of each sample's own active set; differentiable.

    As :func:`shared_linear`, with ``rows`` to ``pair_samples`` as :func:`transpose_active` gives them.
    """
    refuse_transforms("sample_linear", input, weight, bias)
    return operators.sample_linear(
        input,
        weight,
        bias,
        rows,
        offsets,
        pair_offsets,
        pair_positions,
        pair_samples,
        sparse,
    )


def sample_weighted_rows(
    values: Tensor,
    weight: Tensor,
    rows: Tensor,
    offsets: Tensor,
    pair_offsets: Tensor,
    pair_positions: Tensor,
    pair_samples: Tensor,
    sparse: bool,
) -> Tensor:
    """For each sample the sum of its active neurons' rows of ``weight`` (N, d), each times its value of
    ``values`` (pairs), as :func:`sample_linear` gives them: (B, d); differentiable."""
    refuse_transforms("sample_weighted_rows", values, weight)
    return operators.sample_weighted_rows(
        values, weight, rows, offsets, pair_offsets, pair_positions, pair_samples, sparse
    )


@register_fake("slide_torch::shared_linear")
def _(input: Any, weight: Any, bias: Any, rows: Any, sparse: Any) -> Any:
    return input.new_empty((rows.shape[0], input.shape[0]))


@register_fake("slide_torch::shared_weighted_rows")
def _(values: Any, weight: Any, rows: Any, sparse: Any) -> Any:
    return values.new_empty((values.shape[1], weight.shape[1]))


@register_fake("slide_torch::sample_linear")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    rows: Any,
    offsets: Any,
    pair_offsets: Any,
    pair_positions: Any,
    pair_samples: Any,
    sparse: Any,
) -> Any:
    return input.new_empty((pair_positions.shape[0],))


@register_fake("slide_torch::sample_weighted_rows")
def _(values: Any, weight: Any, rows: Any, offsets: Any, *rest: Any) -> Any:
    return values.new_empty((offsets.shape[0] - 1, weight.shape[1]))


@register_fake("slide_torch::shared_linear_backward")
@register_fake("slide_torch::sample_linear_backward")
def _(grad_values: Any, input: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    has_bias = rest[-1]
    return (
        torch.empty_like(input),
        input.new_empty((rows.shape[0], input.shape[1])),
        input.new_empty((rows.shape[0] if has_bias else 0,)),
    )


@register_fake("slide_torch::shared_weighted_rows_backward")
@register_fake("slide_torch::sample_weighted_rows_backward")
def _(grad_output: Any, values: Any, weight: Any, rows: Any, *rest: Any) -> Any:
    return torch.empty_like(values), values.new_empty((rows.shape[0], weight.shape[1]))


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, weight, _, *active, ctx.sparse = inputs
    ctx.save_for_backward(input, weight, *active)


def _linear_backward(op: Any) -> Any:
    def backward(ctx: Any, grad_values: Tensor) -> tuple:
        input, weight, *active = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        neurons, rows = weight.shape[0], active[0]
        grad_input, grad_rows, grad_bias = op(
            grad_values.contiguous(), input, weight, *active, need_bias
        )
        return (
            grad_input if need_input else None,
            as_gradient(rows, grad_rows, neurons, ctx.sparse) if need_weight else None,
            as_gradient(rows, grad_bias, neurons, ctx.sparse) if need_bias else None,
            *[None] * (len(active) + 1),
        )

    return backward


def _save_weighted_rows(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.sparse = inputs
    ctx.save_for_backward(*tensors)


def _weighted_rows_backward(op: Any) -> Any:
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        values, weight, *active = ctx.saved_tensors
        need_values, need_weight = ctx.needs_input_grad[:2]
        grad_values, grad_rows = op(grad_output.contiguous(), values, weight, *active)
        grad_weight = as_gradient(active[0], grad_rows, weight.shape[0], ctx.sparse)
        return (
            grad_values if need_values else None,
            grad_weight if need_weight else None,
            *[None] * (len(active) + 1),
        )

    return backward


for _pattern in ("shared", "sample"):
    for _name, _backward, _setup in (
        ("linear", _linear_backward, _save_linear),
        ("weighted_rows", _weighted_rows_backward, _save_weighted_rows),
    ):
        torch.library.register_autograd(
            f"slide_torch::{_pattern}_{_name}",
            _backward(getattr(operators, f"{_pattern}_{_name}_backward")),
            setup_context=_setup,
        )

for _name in ("linear", "weighted_rows"):
    differentiable_once(f"shared_{_name}_backward", f"sample_{_name}_backward")
