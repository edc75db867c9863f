"""The random tail of an active set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..tables import HashTables


@dataclass(frozen=True)
class Tail:
    """What was drawn at random.

    Attributes:
        ids: int32 (n), increasing.
        inclusion: float64 (n), each one's probability to be in the tail; None where every set of n classes
            was as likely as any other: then that of those outside the certain part follows from how
            many of them there are and were drawn.
    """

    ids: Tensor
    inclusion: Tensor | None

    def log_weight(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """-log(inclusion) of ``ids``; of those that are not in the tail, any number."""
        assert self.inclusion is not None
        # numpy runs on one thread: torch's logarithm rounds by how threads share the work
        own = torch.from_numpy(-np.log(self.inclusion.numpy())).to(dtype)
        if own.numel() == 0:
            return torch.zeros(ids.shape, dtype=dtype)
        places = torch.searchsorted(self.ids, ids.to(torch.int32))
        return own[places.clamp_(max=own.shape[0] - 1)]


def draw_tail(tables: HashTables, seed: int) -> Tail:
    """The tail of a batch, from the distributions that ``tables.options`` names."""
    count = tables.options.tail
    if tables.options.tail_parts == ("uniform",):
        return Tail(ops.sample_tail(count, tables.out_features, seed), None)
    proposal = tables.tail.fixed_proposal(count)
    ids = proposal.draw(seed)
    return Tail(ids, proposal.inclusion[ids.long()])
