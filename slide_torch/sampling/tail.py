"""The random tail of an active set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..precision import widened
from ..tables import HashTables
from ..tails.proposals import QUERIES


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


def draw_tail(
    tables: HashTables, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: int
) -> Tail:
    """The tail of a batch ``input`` (B, d), from the distributions that ``tables.options`` names."""
    count, parts = tables.options.tail, tables.options.tail_parts
    if parts == ("uniform",):
        return Tail(ops.sample_tail(count, tables.out_features, seed), None)
    if not tables.uses_kernel:
        fixed = tables.tail.fixed_proposal(count)
        ids = fixed.draw(seed)
        return Tail(ids, fixed.inclusion[ids.long()])
    assert weight is not None and tables.tail.kernel_sums is not None
    own = count // len(parts)
    ids, inclusion = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.float64)
    if own < count:
        fixed = tables.tail.fixed_proposal(count - own)
        ids = fixed.draw(seed)
        inclusion = fixed.inclusion
    # the samples that the kernel's distribution is the mean over
    batch = input.shape[0]
    asking = ops.sample_tail(min(QUERIES, batch), max(1, batch), seed ^ 4).long()
    drawn, of_drawn, of_fixed = ops.kernel_draw(
        tables.tail.kernel_sums,
        weight.detach(),
        None if bias is None else widened(bias.detach()),
        input.detach()[asking].contiguous(),
        float(tables.options.kernel_alpha),
        own,
        ids,
        seed ^ 3,
    )
    if own == count:
        return Tail(drawn, of_drawn)
    both, place = torch.unique(torch.cat([ids, drawn]), return_inverse=True)
    of_kernel = torch.empty(both.shape, dtype=torch.float64)
    of_kernel[place] = torch.cat([of_fixed, of_drawn])
    return Tail(both, 1 - (1 - inclusion[both.long()]) * (1 - of_kernel))
