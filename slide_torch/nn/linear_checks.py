"""What LSHLinear checks of its arguments."""

from __future__ import annotations

from typing import Any

import torch

from ..checks import checked_int
from ..options import LSHOptions
from ..precision import DTYPES

MOST_FEATURES = 2**24


MOST_NEURONS = 2**31 - 2


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
    in_features: Any, out_features: Any, options: Any, device: Any, dtype: torch.dtype | None
) -> tuple[int, int]:
    """Checks what a layer is made with; returns the sizes as ints."""
    sizes = (
        checked_int(in_features, 1, MOST_FEATURES, "LSHLinear: in_features"),
        checked_int(out_features, 1, MOST_NEURONS, "LSHLinear: out_features"),
    )
    if options is not None and not isinstance(options, LSHOptions):
        raise ValueError(f"LSHLinear: options: expected LSHOptions, got {type(options).__name__}")
    where = torch.device(device) if device is not None else torch.get_default_device()
    if where.type not in ("cpu", "meta"):
        raise ValueError(f"LSHLinear: device: expected the CPU, got {where}")
    what = torch.get_default_dtype() if dtype is None else dtype
    if what not in DTYPES:
        raise ValueError(f"LSHLinear: dtype: expected float32, float64 or bfloat16, got {what}")
    return sizes
