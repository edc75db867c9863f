"""Row-sparse gradients, as the integrations find them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def any_row_sparse(parameters: Iterable[Tensor]) -> bool:
    """Whether a parameter has a row-sparse gradient, which torch's clipping does not take."""
    return any(p.grad is not None and p.grad.is_sparse for p in parameters)
