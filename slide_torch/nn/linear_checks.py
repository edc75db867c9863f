"""What LSHLinear checks of its arguments."""

from __future__ import annotations

from typing import Any

import torch

from ..options import LSHOptions
from ..precision import DTYPES


def options_of(
    options: LSHOptions | None, out_features: int, output: Any, eval_active: Any
) -> LSHOptions:
    """The options of a layer, once it is known what it is for."""
    if output not in ("sampled", "dense"):
        raise ValueError(f"LSHLinear: output: expected 'sampled' or 'dense', got {output!r}")
    if eval_active not in ("all", "budget"):
        raise ValueError(f"LSHLinear: eval_active: expected 'all' or 'budget', got {eval_active!r}")
    if output == "dense":
        return (options or LSHOptions(pattern="per_sample")).for_hidden_layer(out_features)
    if eval_active != "all":
        raise ValueError(
            f"LSHLinear: eval_active: expected 'all' with output='sampled', got {eval_active!r}: for "
            "prediction within a budget see LSHLinear.predict(exact=False)"
        )
    return options or LSHOptions()


def check_arguments(
    in_features: int, out_features: int, options: Any, device: Any, dtype: torch.dtype | None
) -> None:
    for name, value, limit in (
        ("in_features", in_features, 2**24),
        ("out_features", out_features, 2**31 - 2),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ValueError(f"LSHLinear: {name}: expected an int from 1 to {limit}, got {value!r}")
    if options is not None and not isinstance(options, LSHOptions):
        raise ValueError(f"LSHLinear: options: expected LSHOptions, got {type(options).__name__}")
    where = torch.device(device) if device is not None else torch.get_default_device()
    if where.type not in ("cpu", "meta"):
        raise ValueError(f"LSHLinear: device: expected the CPU, got {where}")
    what = torch.get_default_dtype() if dtype is None else dtype
    if what not in DTYPES:
        raise ValueError(f"LSHLinear: dtype: expected float32, float64 or bfloat16, got {what}")
