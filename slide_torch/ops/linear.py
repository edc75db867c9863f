"""Linear maps into and out of active neurons, differentiable once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, SharedActiveSet
from .autograd import register_backward
from .library import fake, operators
from .transforms import refuse_transforms


def into_active(input: Tensor, layer: ActiveLayer, active: ActiveSet) -> Tensor:
    """``input @ weight.T + bias`` of ``input`` (B, d) for active neurons only: values (U, B) where the batch
    shares its active set, else sample-major (pairs); differentiable."""
    refuse_transforms("into_active", input, *layer.parameters)
    shared = isinstance(active, SharedActiveSet)
    operator = operators.shared_linear if shared else operators.sample_linear
    return operator(input, *layer.parameters, *active.operands(layer.rows), layer.sparse)


def out_of_active(values: Tensor, layer: ActiveLayer, active: ActiveSet) -> Tensor:
    """For each sample the sum of its active neurons' rows of the weight, each times its value of ``values``,
    as :func:`into_active` gives them: (B, d); differentiable."""
    refuse_transforms("out_of_active", values, layer.weight)
    shared = isinstance(active, SharedActiveSet)
    operator = operators.shared_weighted_rows if shared else operators.sample_weighted_rows
    return operator(values, layer.weight, *active.operands(layer.rows), layer.sparse)


@fake("shared_linear")
def _(a: SimpleNamespace) -> Any:
    return a.input.new_empty((a.rows.shape[0], a.input.shape[0]))


@fake("sample_linear")
def _(a: SimpleNamespace) -> Any:
    return a.input.new_empty((a.pair_positions.shape[0],))


@fake("shared_weighted_rows")
def _(a: SimpleNamespace) -> Any:
    return a.values.new_empty((a.values.shape[1], a.weight.shape[1]))


@fake("sample_weighted_rows")
def _(a: SimpleNamespace) -> Any:
    return a.values.new_empty((a.offsets.shape[0] - 1, a.weight.shape[1]))


@fake("shared_linear_backward", "sample_linear_backward")
def _(a: SimpleNamespace) -> Any:
    return (
        torch.empty_like(a.input),
        a.input.new_empty((a.rows.shape[0], a.input.shape[1])),
        a.input.new_empty((a.rows.shape[0] if a.has_bias else 0,)),
    )


@fake("shared_weighted_rows_backward", "sample_weighted_rows_backward")
def _(a: SimpleNamespace) -> Any:
    grad_rows = a.values.new_empty((a.rows.shape[0], a.weight.shape[1]))
    return torch.empty_like(a.values), grad_rows


for _name in ("linear", "weighted_rows"):
    for _pattern in ("shared", "sample"):
        register_backward(f"{_pattern}_{_name}")
