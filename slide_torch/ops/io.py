"""Operators that read files."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .library import fake, operators


def parse_xmc(
    text: Tensor, num_features: int, num_labels: int, first_line: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows of the Extreme Classification Repository's format, uint8 ``text`` of whole lines, as CSR.

    Returns:
        feature_indptr (rows + 1), feature_indices, feature_values, label_indptr (rows + 1), label_indices;
        int32, the values float32.

    Raises:
        RuntimeError: a line is not of the format; ``first_line`` is the number of the first.
    """
    return operators.parse_xmc(text, num_features, num_labels, first_line)


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
