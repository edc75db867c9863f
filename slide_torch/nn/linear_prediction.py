"""Prediction with an LSHLinear: checks the arguments and calls ``prediction/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..prediction import predictor
from ..prediction.calibration import Calibration
from ..prediction.module import Predictor
from ..prediction.topk import TopK, as_topk
from ..sampling.candidates import candidates
from ..sampling.draw import to_look_at
from ..sampling.recall import found_among
from . import linear_checks as checks

if TYPE_CHECKING:
    from .linear import LSHLinear


def recall(layer: LSHLinear, input: Tensor, k: int) -> float:
    """See :meth:`LSHLinear.recall`."""
    where, weight, bias = "LSHLinear.recall", layer.weight, layer.bias
    k = checks.checked_k(where, k, layer.out_features)
    flat = checks.some_inputs(where, input, layer, layer.tables)
    found = candidates(to_look_at(layer.tables, weight, bias), weight, bias, flat)
    if found is None:
        return 1.0
    _, best = predictor.exact_topk(flat, weight, bias, k)
    return found_among(best, *found, layer.out_features).float().mean().item()


def predict(layer: LSHLinear, input: Tensor, k: int, *, exact: bool) -> TopK:
    """See :meth:`LSHLinear.predict`."""
    where, weight, bias = "LSHLinear.predict", layer.weight, layer.bias
    k = checks.checked_k(where, k, layer.out_features)
    flat = checks.flat_inputs(where, input, layer, layer.tables)
    if exact:
        best = predictor.exact_topk(flat, weight, bias, k)
    else:
        best = predictor.approximate_topk(flat, weight, bias, k, layer.calibration)
    return as_topk(best, input)


def calibrated(
    layer: LSHLinear, input: Tensor, k: int, recall: float, generator: torch.Generator | None
) -> Calibration:
    """The calibration that :meth:`LSHLinear.calibrate` describes."""
    where = "LSHLinear.calibrate"
    k = checks.checked_k(where, k, layer.out_features)
    flat = checks.some_inputs(where, input, layer, layer.tables)
    share = checks.checked_share(f"{where}: recall", recall)
    checks.check_not_parametrized(where, layer)
    return predictor.recalibrated(
        layer.calibration, flat, layer.weight, layer.bias, k, share, generator
    )


def predictor_of(layer: LSHLinear) -> Predictor:
    """See :meth:`LSHLinear.predictor`."""
    weight, bias = layer.weight, layer.bias
    calibration = predictor.valid("LSHLinear.predictor", layer.calibration, weight, bias)
    return Predictor.of(weight, bias, calibration)


def log_prob(layer: LSHLinear, input: Tensor) -> Tensor:
    """See :meth:`LSHLinear.log_prob`."""
    if isinstance(input, Tensor) and input.dtype == torch.bfloat16:
        input = input.to(layer.weight.dtype)
    checks.flat_inputs("LSHLinear.log_prob", input, layer, layer.tables)
    return predictor.log_prob(input, layer.weight, layer.bias)
