"""The inputs of a prediction: checks, and the form in which they are computed with."""

from __future__ import annotations

from torch import Tensor

from ..functional.checks import autocast_input
from ..precision import DTYPES, widened
from ..storage import check_in_memory


def flat_inputs(where: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The inputs (\\*, d) of a prediction by ``weight`` (N, d) as contiguous (n, d); bfloat16 as float32.

    Raises:
        ValueError: they are not of the weight's width and dtype.
    """
    width = weight.shape[1]
    if not isinstance(input, Tensor) or input.dim() < 1 or input.shape[-1] != width:
        got = tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(
            f"{where}: input: expected a tensor with last dimension {width} (in_features), got {got}"
        )
    check_in_memory(where, weight=weight, bias=bias)
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{where}: weight: expected float32, float64 or bfloat16, got "
            f"{weight.dtype}: convert the layer with .float()"
        )
    flat = widened(cast_input(where, input, weight))
    return (flat if flat.dim() == 2 else flat.reshape(-1, width)).contiguous()


def cast_input(where: str, input: Tensor, weight: Tensor) -> Tensor:
    """``input``, under autocast in the dtype of ``weight``."""
    input = autocast_input(input, weight)
    if input.dtype != weight.dtype or input.device != weight.device:
        raise ValueError(
            f"{where}: input: expected {weight.dtype} on {weight.device}, the weight's, "
            f"got {input.dtype} on {input.device}"
        )
    return input
