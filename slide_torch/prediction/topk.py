"""What a prediction returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class TopK(NamedTuple):
    """The k largest logits of each input and their neurons, as ``torch.topk`` returns them.

    Attributes:
        values: (\\*, k), in descending order.
        indices: int64 (\\*, k).
    """

    # no torch.return_types.topk: torch.export.save does not know that type
    values: Tensor
    indices: Tensor


def as_topk(flat: tuple[Tensor, Tensor], input: Tensor) -> TopK:
    """Results (n, k) for ``input`` (\\*, d), flattened to (n, d), as those of (\\*, k)."""
    if input.dim() == 2:
        return TopK(*flat)
    shape = (*input.shape[:-1], flat[0].shape[1])
    return TopK(*(result.view(shape) for result in flat))


_pytree._register_namedtuple(TopK, serialized_type_name="slide_torch.TopK")
