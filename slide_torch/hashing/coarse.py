"""Buckets by groups, so that a query need not be compared with every bucket."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops

# How much the spread of a group's buckets counts, beside their mean, when a query ranks groups.
GROUP_SPREAD_WEIGHT = 0.3

# A query looks into a quarter of the groups; into more where these hold fewer than so many buckets for each
# one that it wants.
SHARE_LOOKED_AT = 4
BUCKETS_PER_PROBE = 4


class CoarseLists(NamedTuple):
    """The buckets of one table in lists, one a group: an inverted file over buckets, as the buckets are one
    over rows.

    A query ranks groups by the mean and the spread of their buckets, scores the int8 copies of the buckets of
    the best groups, and orders those that score best exactly.

    Attributes:
        source: what the lists were made of, to be recognised.
        buckets: float32 (n, width), mean rows and spreads.
        means: float32 (groups, width + 1), the mean bucket of each group, and the spread of its buckets.
        offsets: int64 (groups + 1) into ``members``.
        members: int32 (n), buckets by group.
        codes, terms: ``buckets`` as int8, see :func:`slide_torch.ops.code_lists_`.
    """

    source: Tensor
    buckets: Tensor
    means: Tensor
    offsets: Tensor
    members: Tensor
    codes: Tensor
    terms: Tensor

    @staticmethod
    def of(source: Tensor, buckets: Tensor, offsets: Tensor, members: Tensor) -> CoarseLists:
        """Lists of ``buckets`` (n, width), a table of ``source``, whose last column is their spread."""
        codes, terms, places = ops.empty_codes(buckets, offsets, room=False)
        ops.code_lists_(codes, terms, places, buckets, None, offsets, members)
        spread = buckets[:, -1:].clamp(min=0)  # that of empty buckets would hide their neighbours
        means, radius = ops.list_centers(
            torch.cat([buckets[:, :-1], spread], 1), None, offsets, members
        )
        means = torch.cat([means, radius.unsqueeze(1)], 1)
        return CoarseLists(source, buckets, means, offsets, members, codes, terms)

    @property
    def groups(self) -> int:
        return self.means.shape[0]

    def looked_at(self, probes: int) -> int:
        """How many groups are looked into for so many buckets."""
        buckets = self.buckets.shape[0]
        enough = -(-BUCKETS_PER_PROBE * probes * self.groups // buckets)
        return min(self.groups, max(self.groups // SHARE_LOOKED_AT, enough))

    def best(self, query: Tensor, length: Tensor, probes: int) -> Tensor:
        """The best buckets of each ``query`` (B, width) with ``length`` (B, 1), best first: int64
        (probes, B); -1 for what holds NaN or Inf."""
        query, length = query.float(), length.float()
        ranking = torch.cat([query, length * GROUP_SPREAD_WEIGHT], 1)
        groups = ops.topk_linear(ranking, self.means, None, self.looked_at(probes))[1]
        _, found = ops.topk_lists(
            query,
            self.buckets,
            None,
            self.offsets,
            self.members,
            self.codes,
            self.terms,
            groups,
            probes,
            probes,
        )
        return found.masked_fill_(~length.isfinite(), -1).T
