"""Checks of a layer and its input, for the functional losses."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..precision import DTYPES
from ..storage import check_in_memory
from ..tables import HashTables


def checked_input(
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tables: HashTables,
    *,
    scale: float,
    sparse: bool,
) -> Tensor:
    """Checks what the loss ``name`` is given, except the target; returns the ``input`` to compute with."""
    input = autocast_input(input, weight)
    check_layer(input, weight, bias, tables, name)
    if sparse:
        check_leaves(weight, bias, name)
    if not scale > 0 or scale == float("inf"):
        raise ValueError(f"{name}: scale: expected a positive finite number, got {scale}")
    return input


def autocast_input(input: Tensor, weight: Tensor) -> Tensor:
    """Under autocast, ``input`` in the dtype of ``weight``: earlier layers return bfloat16, while sampled
    losses are computed at full precision. The gradient of ``input`` keeps its dtype."""
    if torch.is_autocast_enabled("cpu") and input.is_floating_point():
        return input.to(weight.dtype)
    return input


def check_leaves(weight: Tensor, bias: Tensor | None, name: str) -> None:
    for which, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.requires_grad and not tensor.is_leaf:
            raise ValueError(
                f"{name}: {which}: expected a leaf (a Parameter) for sparse=True, got the result of a "
                "computation (a parametrization?), through which row-sparse gradients do not flow: use "
                "sparse=False"
            )


def check_layer(
    input: Tensor, weight: Tensor, bias: Tensor | None, tables: HashTables, name: str
) -> None:
    if not isinstance(tables, HashTables):
        raise ValueError(f"{name}: tables: expected HashTables, got {type(tables).__name__}")
    check_in_memory(name, linear_weight=weight, linear_bias=bias)
    shape = (tables.out_features, tables.in_features)
    if weight.dim() != 2 or tuple(weight.shape) != shape:
        raise ValueError(
            f"{name}: linear_weight: expected shape {shape}, that of its tables, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: linear_weight: expected float32, float64 or bfloat16, got {weight.dtype}: "
            "convert the layer with .float()"
        )
    if input.dim() < 1 or input.shape[-1] != shape[1]:
        raise ValueError(
            f"{name}: input: expected last dimension {shape[1]} (in_features), "
            f"got shape {tuple(input.shape)}"
        )
    given = (input, weight) if bias is None else (input, weight, bias)
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    for which, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None:
            continue
        if records and not torch.compiler.is_compiling() and tensor.is_inference():
            raise ValueError(
                f"{name}: {which}: expected a normal tensor, got one made in torch.inference_mode(), which "
                "autograd cannot save for backward: make it outside, or give tensor.clone()"
            )
        if tensor.device.type != "cpu":
            raise ValueError(f"{name}: {which}: expected a CPU tensor, got {tensor.device}")
        if tensor.dtype != weight.dtype:
            raise ValueError(
                f"{name}: {which}: expected {weight.dtype}, the weight's dtype, got {tensor.dtype}"
            )
        if tensor is not input and not tensor.is_contiguous():
            raise ValueError(f"{name}: {which}: expected a contiguous tensor: call .contiguous()")
    ops.refuse_transforms(name, input, weight, bias)
    if (bias is not None) != tables.has_bias or (bias is not None and bias.shape != shape[:1]):
        raise ValueError(
            f"{name}: linear_bias: expected {'shape ' + str(shape[:1]) if tables.has_bias else None}"
            f", as its tables, got {None if bias is None else 'shape ' + str(tuple(bias.shape))}"
        )
