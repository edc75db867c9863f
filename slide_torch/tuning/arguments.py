"""Checks of what tune is given."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checks import as_int, as_number
from ..nn.linear import LSHLinear
from ..nn.linear_checks import check_parameters
from ..shards import shard_of


class TuneCall(NamedTuple):
    """The arguments of :func:`tune`, checked; ``inputs`` are (n, d), contiguous."""

    inputs: Tensor
    recall: float
    k: int
    queries: int
    batch: int
    seconds: float
    seed: int


def refuse(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"tune: {name}: expected {expected}, got {got}")


def checked_call(
    layer: LSHLinear,
    inputs: Tensor,
    recall: float,
    k: int,
    queries: int,
    batch: int,
    seconds: float,
    seed: int,
) -> TuneCall:
    """Checks the layer, its inputs and the numbers.

    Raises:
        ValueError: one is wrong.
    """
    _check_layer_and_inputs(layer, inputs)
    share = as_number(recall)
    if share is None or not 0 < share <= 1:
        refuse("recall", "a number above 0 and at most 1", repr(recall))
    neurons = layer.out_features
    wanted = as_int(k)
    if wanted is None or not 1 <= wanted <= neurons:
        refuse("k", f"an int from 1 to {neurons} (out_features)", repr(k))
    limit = as_number(seconds)
    if limit is None or not limit > 0:
        refuse("seconds", "a number above 0", repr(seconds))
    number = as_int(seed)
    if number is None:
        refuse("seed", "an int", repr(seed))
    return TuneCall(
        inputs.detach().reshape(-1, layer.in_features).contiguous(),
        float(share),
        wanted,
        _at_least_one("queries", queries),
        _at_least_one("batch", batch),
        float(limit),
        number,
    )


def _at_least_one(name: str, value: object) -> int:
    number = as_int(value)
    if number is None or number < 1:
        refuse(name, "an int of at least 1", repr(value))
    return number


def _check_layer_and_inputs(layer: LSHLinear, inputs: Tensor) -> None:
    if not isinstance(layer, LSHLinear):
        refuse("layer", "an LSHLinear (the output layer itself)", type(layer).__name__)
    if shard_of(layer.weight) is not None and layer.out_features != layer.weight.shape[0]:
        refuse("layer", "a whole layer", "a sharded one: call tune(layer.local, ...) on each rank")
    check_parameters("tune: layer", layer, layer.tables, called=False)
    features, dtype = layer.in_features, layer.weight.dtype
    if not isinstance(inputs, Tensor) or inputs.dim() < 1 or inputs.shape[-1] != features:
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        refuse("inputs", f"a tensor with last dimension {features} (in_features)", got)
    if dtype == torch.bfloat16:
        refuse("layer", "float32 or float64 parameters", f"{dtype}: tune a copy.float()")
    if inputs.dtype != dtype:
        refuse("inputs", f"{dtype}, the weight's dtype", inputs.dtype)
    if inputs.numel() == 0:
        refuse("inputs", "at least one", "none")
    if not bool(torch.isfinite(inputs).all()):
        refuse("inputs", "finite numbers", "NaN or Inf")
