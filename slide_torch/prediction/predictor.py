"""Prediction with a linear layer: exact and approximate top k, log-probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..precision import computed_dtype, topk_linear
from ..randomness import draw_seed
from .calibration import Calibration, calibrate, state_of
from .partition import RowPartition


def exact_topk(input: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each input (n, d), and their neurons: (n, k) each."""
    return topk_linear(input, *_contiguous(weight, bias), k)


def approximate_topk(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    calibration: Calibration | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`exact_topk`, among the neurons of the lists that ``calibration`` found to be enough.

    Raises:
        RuntimeError: there is no calibration, or it was made for other weights.
    """
    calibration = valid("LSHLinear.predict", calibration, weight, bias)
    return calibration.partition.topk(
        input,
        *_contiguous(weight, bias),
        k,
        calibration.probes,
        calibration.radius_weight,
        calibration.rescored,
    )


def valid(
    where: str, calibration: Calibration | None, weight: Tensor, bias: Tensor | None
) -> Calibration:
    """The ``calibration``, if there is one and it was made for these weights."""
    if calibration is None:
        raise RuntimeError(
            f"{where}: approximate prediction needs to know how far to look: call "
            "layer.calibrate(inputs, k, recall=0.95) first"
        )
    if calibration.state != state_of(weight, bias):
        raise RuntimeError(
            f"{where}: the weights have changed since layer.calibrate, whose recall is "
            "not known to hold any more: call it again, or predict(..., exact=True)"
        )
    return calibration


def recalibrated(
    old: Calibration | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    recall: float,
    generator: torch.Generator | None,
) -> Calibration:
    """A calibration for ``input`` (n, d). It keeps the partition of the ``old`` one while the weights are the
    same.

    Raises:
        ValueError: rows hold NaN or Inf.
    """
    state = state_of(weight, bias)
    own = _contiguous(weight, bias)
    if old is not None and old.state == state:
        partition = old.partition
    else:
        partition = RowPartition.build(*own, seed=draw_seed(generator))
    return calibrate(input, *own, k, recall, partition, state)


def log_prob(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Log-probabilities of all neurons for ``input`` (\\*, d): (\\*, N); differentiable."""
    with torch.autocast("cpu", enabled=False):
        logits = F.linear(input.to(weight.dtype), weight, bias)
        return F.log_softmax(logits, dim=-1, dtype=computed_dtype(logits.dtype))


def _contiguous(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.contiguous(), None if bias is None else bias.contiguous()
