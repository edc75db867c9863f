"""The operator that reads rows of text: see :func:`slide_torch.data.read_xmc`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .library import fake, operators


def parse_xmc(
    text: Tensor, num_features: int, num_labels: int, first_line: int = 1
) -> tuple[Tensor, ...]:
    """``text`` (uint8), whole lines of an XMC file's rows -> row pointers int32, indices int32 and values
    float32 of the features, row pointers and indices int32 of the labels. Errors count lines from
    ``first_line``."""
    found: tuple[Tensor, ...] = operators.parse_xmc(text, num_features, num_labels, first_line)
    return found


@fake("parse_xmc")
def _(a: SimpleNamespace) -> Any:
    context = torch.library.get_ctx()
    indptr = context.new_dynamic_size(min=1)
    features, labels = context.new_dynamic_size(), context.new_dynamic_size()
    return (
        a.text.new_empty(indptr, dtype=torch.int32),
        a.text.new_empty(features, dtype=torch.int32),
        a.text.new_empty(features, dtype=torch.float32),
        a.text.new_empty(indptr, dtype=torch.int32),
        a.text.new_empty(labels, dtype=torch.int32),
    )
