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


_pytree._register_namedtuple(TopK, serialized_type_name="slide_torch.TopK")
