"""K-means: an inverted file over the layer's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..precision import computed_dtype
from .base import HashFamily, hashed_rows

# How much the spread of a bucket's logits, as against their mean, says for probing it: of 0.1, 0.2, 0.3 the
# one that found most of the top 10 in a hundredth of the rows, in one trial that is not kept.
_SPREAD_WEIGHT = 0.2


_NOT_WORTH_PROBING = -1e9  # the spread of a bucket that holds nothing


# From so many centroids on, rows look only into so many of about sqrt(centroids) groups of them.
_GROUPED = 512


_LOOKED = 4


_GROUP_ROUNDS = 3


class KMeans(HashFamily):
    """The nearest, by angle, of 2^K centroids that are learnt from the rows: spherical k-means (Dhillon &
    Modha 2001) as an inverted file's coarse quantizer (Jégou et al. 2011). A further probe takes the next
    nearest.

    Rows are assigned by angle, but a query ranks buckets by what logits they may hold: the mean of its
    logits with a bucket's rows, and their spread, ``<mean row, x> + 0.2 |x| * root mean square distance
    from the mean``.

    A rehash of dirty rows first moves each centroid to the mean of the rows that have its code, then
    assigns the dirty ones: one round of k-means that leaves the other rows where they are (mini-batch
    k-means: Sculley 2010). A rebuild assigns every row, after ``refinements`` rounds from the old centroids.
    Each of L tables starts from other rows. Before :meth:`fit` centroids are random directions.

    Args:
        points: rows that k-means looks at, for each centroid.
        iterations: rounds of the first k-means.
        refinements: rounds of later ones.
    """

    centroids: Tensor
    fitted: Tensor
    buckets: Tensor | None
    sizes: Tensor | None
    group_offsets: Tensor | None
    group_members: Tensor | None
    describes = True

    def __init__(
        self,
        in_features: int,
        K: int,
        L: int,
        *,
        points: int = 16,
        iterations: int = 6,
        refinements: int = 1,
        **common: Any,
    ) -> None:
        self.points = points
        self.iterations = iterations
        self.refinements = refinements
        super().__init__(in_features, K, L, **common)

    def _draw(self, generator: torch.Generator) -> None:
        self.register_buffer("fitted", torch.tensor(False), persistent=False)
        centroids = torch.randn(self.L, 1 << self.K, self.width, generator=generator)
        self.register_buffer("centroids", F.normalize(centroids, dim=2), persistent=False)
        # (L, 2^K, d [+ 1] + 1): the mean row of each bucket, and the spread of its rows; (L, 2^K) their sizes
        self.register_buffer("buckets", None, persistent=False)
        self.register_buffer("sizes", None, persistent=False)
        # of many centroids: int64 (L, groups + 1) into int32 (L, 2^K), like ones together
        self.register_buffer("group_offsets", None, persistent=False)
        self.register_buffer("group_members", None, persistent=False)

    def adapt(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.fitted:
            self.follow(weight, bias)
        else:
            super().adapt(weight, bias)

    @torch.no_grad()
    def fit(self, weight: Tensor, bias: Tensor | None, previous: HashFamily | None = None) -> None:
        super().adapt(weight, bias)
        generator = torch.Generator().manual_seed(self.seed)
        start = previous.centroids if isinstance(previous, KMeans) and previous.fitted else None
        self.centroids = torch.stack(
            [
                self._learn(weight, bias, generator, None if start is None else start[table])
                for table in range(self.L)
            ]
        )
        self.fitted = torch.tensor(True)
        if group_count(1 << self.K):
            groups = [in_groups(own) for own in self.centroids]
            self.group_offsets, self.group_members = map(torch.stack, zip(*groups, strict=True))

    @torch.no_grad()
    def follow(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.buckets is None or self.sizes is None:
            return super().adapt(weight, bias)
        means, spread = self.buckets[..., :-1], self.buckets[..., -1:]
        if self.centers:
            share = self.sizes[0].unsqueeze(1) / self.sizes[0].sum()
            self.center = (means[0] * share).sum(0).to(computed_dtype(weight.dtype))
            means = means - self.center.float()
        if self.augment_norms:
            self.norm_bound = self._norm_bound(weight, bias)
            squares = means.square().sum(2, keepdim=True) + spread.square()
            missing = (self.norm_bound.float().square() - squares).clamp_(min=0).sqrt_()
            means = torch.cat([means, missing], 2)
        # an empty bucket's centroid stays
        usable = (spread >= 0) & means.isfinite().all(2, keepdim=True)
        self.centroids = torch.where(usable, F.normalize(means, dim=2), self.centroids)

    def describe(self, centers: Sequence[Sequence[Tensor]], offsets: Tensor) -> None:
        self.sizes = offsets.diff()
        spread = torch.stack([radius for _, radius in centers]).unsqueeze(2)
        spread.masked_fill_(self.sizes.unsqueeze(2) == 0, _NOT_WORTH_PROBING)
        self.buckets = torch.cat([torch.stack([mean for mean, _ in centers]), spread], 2).float()

    def query_codes(self, input: Tensor, probes: int = 1) -> Tensor:
        if self.buckets is None:
            return super().query_codes(input, probes)
        query = input.detach()
        if self.has_bias:
            query = torch.cat([query, query.new_ones(query.shape[0], 1)], 1)
        length = query.square().sum(1, keepdim=True).sqrt_()
        query = torch.cat([query, length.mul_(_SPREAD_WEIGHT)], 1)
        return ops.nearest_centroids(query, None, None, None, self.buckets, None, probes)

    def _sample(self, weight: Tensor, bias: Tensor | None, picked: Tensor) -> Tensor:
        """What is hashed of the rows ``picked``, at length 1."""
        bound = None if self.norm_bound is None else float(self.norm_bound)
        bias = None if bias is None else bias.detach()
        rows = hashed_rows(weight.detach(), bias, picked, self.center, bound).float()
        return F.normalize(rows, dim=1)

    def _learn(
        self, weight: Tensor, bias: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        count = 1 << self.K
        picked = torch.randperm(weight.shape[0], generator=generator)[: self.points * count]
        sample = self._sample(weight, bias, picked)
        centroids = (
            sample[torch.arange(count) % sample.shape[0]] if start is None else start.float()
        )
        for _ in range(self.iterations if start is None else self.refinements):
            codes = _nearest((sample, None, None, None), centroids, in_groups(centroids))[0]
            means, sizes = ops.group_means(sample, codes.long(), count)
            # one that has lost its rows starts again from a row
            again = sample[torch.randint(sample.shape[0], (count,), generator=generator)]
            means = torch.where((sizes == 0)[:, None], again, means)
            centroids = F.normalize(means, dim=1)
        return centroids

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        of = (input, bias, rows, center)
        centroids = self.centroids.float()
        if probes > 1 or self.group_offsets is None or self.group_members is None:
            return ops.nearest_centroids(*of, centroids, norm_bound, probes)
        groups = zip(self.group_offsets, self.group_members, strict=True)
        codes = [
            _nearest(of, own, group, norm_bound)
            for own, group in zip(centroids, groups, strict=True)
        ]
        return codes[0] if len(codes) == 1 else torch.cat(codes)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}"


def group_count(centroids: int) -> int:
    """Groups of so many centroids: about their square root; 0 where they are few, and stay alone."""
    return 0 if centroids < _GROUPED else 1 << (centroids.bit_length() // 2)


def in_groups(centroids: Tensor) -> tuple[Tensor, Tensor] | None:
    """About sqrt(n) groups of ``centroids`` (n, width) by a few rounds of k-means: offsets int64 (groups + 1)
    into members int32 (n). None where there are few."""
    count = centroids.shape[0]
    size = group_count(count)
    if size == 0:
        return None
    groups = centroids[:: count // size].contiguous()
    offsets = members = torch.empty(0)
    for _ in range(_GROUP_ROUNDS):
        assigned = ops.nearest_centroids(centroids, None, None, None, groups.unsqueeze(0))[0]
        offsets = F.pad(torch.bincount(assigned, minlength=size).cumsum(0), (1, 0))
        members = assigned.argsort(stable=True).to(torch.int32)
        means, _ = ops.list_centers(centroids, None, offsets, members)
        groups = torch.where(offsets.diff().unsqueeze(1) > 0, F.normalize(means, dim=1), groups)
    return offsets, members


def _nearest(
    rows: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    centroids: Tensor,
    groups: tuple[Tensor, Tensor] | None,
    norm_bound: float | None = None,
) -> Tensor:
    """Codes (1, n) of ``rows`` (input, bias, rows, center) by ``centroids`` (2^bits, width): the nearest of
    those in the nearest groups."""
    if groups is None:
        return ops.nearest_centroids(*rows, centroids.unsqueeze(0), norm_bound)
    means = F.normalize(ops.list_centers(centroids, None, *groups)[0], dim=1)
    return ops.nearest_in_groups(*rows, centroids, means, *groups, _LOOKED, norm_bound)
