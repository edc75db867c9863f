"""K-means: an inverted file over the layer's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..precision import computed_dtype
from .base import HashFamily, hashed_rows

# How much the spread of a bucket's logits counts, beside their mean, when a query ranks buckets.
SPREAD_WEIGHT = 0.2

# The spread of an empty bucket: no query ranks it before one that holds rows.
EMPTY_SPREAD = -1e9

# From this many centroids on, a row compares itself, as small integers, only with those of a few groups: the
# centroids are themselves clustered, into about sqrt(centroids) groups by some rounds of k-means.
GROUPED_FROM = 512
GROUPS_SEARCHED = 4
GROUP_ROUNDS = 3


class KMeans(HashFamily):
    """The nearest, by angle, of 2^K centroids that are learnt from the rows: spherical k-means (Dhillon &
    Modha 2001) as an inverted file's coarse quantizer (Jégou et al. 2011). A further probe takes the next
    nearest.

    Rows are assigned by angle, but a query ranks buckets by what logits they may hold: the mean of its
    logits with a bucket's rows, and their spread, ``<mean row, x> + 0.2 |x| * root mean square distance
    from the mean``, with mean rows and queries rounded to seven bits.

    A rehash of dirty rows first moves each centroid to the mean of the rows that have its code, then
    assigns the dirty ones: one round of k-means that leaves the other rows where they are (mini-batch
    k-means: Sculley 2010). A rebuild assigns every row, after ``refinements`` rounds from the old centroids.
    Each of L tables starts from other rows. Before :meth:`fit` centroids are random directions.

    Args:
        points: rows that k-means looks at, for each centroid.
        iterations: rounds of the first k-means.
        refinements: rounds of later ones.

    Attributes:
        centroids: float32 (L, 2^K, width), of length 1.
        fitted: whether centroids have been learnt from rows.
        buckets: float32 (L, 2^K, d [+ 1] + 1), each bucket's mean row and the spread of its rows about it;
            None before :meth:`describe`.
        sizes: int32 (L, 2^K), rows in each bucket.
        group_offsets, group_members: :class:`CentroidGroups` of each table; None where centroids are few.
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
        centroids = torch.randn(self.L, 1 << self.K, self.width, generator=generator)
        self.register_buffer("fitted", torch.tensor(False), persistent=False)
        self.register_buffer("centroids", F.normalize(centroids, dim=2), persistent=False)
        for name in ("buckets", "sizes", "group_offsets", "group_members"):
            self.register_buffer(name, None, persistent=False)
        self._coded: CodedBuckets | None = None

    @torch.no_grad()
    def fit(self, weight: Tensor, bias: Tensor | None, previous: HashFamily | None = None) -> None:
        super().adapt(weight, bias)
        generator = torch.Generator().manual_seed(self.seed)
        learnt = []
        for table in range(self.L):
            start = None
            if isinstance(previous, KMeans) and previous.fitted:
                start = previous.centroids[table].float()
            learnt.append(self._learn(weight, bias, generator, start))
        self.centroids = torch.stack(learnt)
        self.fitted = torch.tensor(True)
        groups = [found for found in map(group_centroids, learnt) if found is not None]
        if groups:
            self.group_offsets = torch.stack([found.offsets for found in groups])
            self.group_members = torch.stack([found.members for found in groups])

    def _learn(
        self, weight: Tensor, bias: Tensor | None, generator: torch.Generator, start: Tensor | None
    ) -> Tensor:
        """Centroids (2^K, width) of one table, from ``start``, those of its previous functions, or anew."""
        count = 1 << self.K
        picked = torch.randperm(weight.shape[0], generator=generator)[: self.points * count]
        sample = self._directions(weight, bias, picked)
        if start is None:
            start = sample[torch.arange(count) % sample.shape[0]]
            return spherical_kmeans(sample, start, self.iterations, generator)
        return spherical_kmeans(sample, start, self.refinements, generator)

    def _directions(self, weight: Tensor, bias: Tensor | None, picked: Tensor) -> Tensor:
        """What is hashed of the rows ``picked``, scaled to length 1."""
        bound = None if self.norm_bound is None else float(self.norm_bound)
        bias = None if bias is None else bias.detach()
        rows = hashed_rows(weight.detach(), bias, picked, self.mean_row, bound).float()
        return F.normalize(rows, dim=1)

    def adapt(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.fitted:
            self.follow(weight, bias)
        else:
            super().adapt(weight, bias)

    @torch.no_grad()
    def follow(self, weight: Tensor, bias: Tensor | None) -> None:
        if self.buckets is None or self.sizes is None:
            return super().adapt(weight, bias)
        means, spread = self.buckets[..., :-1], self.buckets[..., -1:]
        if self.center:
            share = self.sizes[0].unsqueeze(1) / self.sizes[0].sum()
            self.mean_row = (means[0] * share).sum(0).to(computed_dtype(weight.dtype))
            means = means - self.mean_row.float()
        if self.augment_norms:
            self.norm_bound = self._norm_bound(weight, bias)
            squares = means.square().sum(2, keepdim=True) + spread.square()
            missing = (self.norm_bound.float().square() - squares).clamp_(min=0).sqrt_()
            means = torch.cat([means, missing], 2)
        # an empty bucket's centroid stays
        usable = (spread >= 0) & means.isfinite().all(2, keepdim=True)
        self.centroids = torch.where(usable, F.normalize(means, dim=2), self.centroids)

    def describe(self, buckets: Sequence[Sequence[Tensor]], offsets: Tensor) -> None:
        self.sizes = offsets.diff()
        means = torch.stack([mean for mean, _ in buckets])
        spread = torch.stack([radius for _, radius in buckets]).unsqueeze(2)
        spread.masked_fill_(self.sizes.unsqueeze(2) == 0, EMPTY_SPREAD)
        self.buckets = torch.cat([means, spread], 2).float()

    def query_codes(self, input: Tensor, probes: int = 1) -> Tensor:
        if self.buckets is None:
            return super().query_codes(input, probes)
        input = input.detach().contiguous()
        length = input.square().sum(1).add_(float(self.has_bias)).sqrt_()
        if self._coded is None or self._coded.buckets is not self.buckets:
            self._coded = CodedBuckets.of(self.buckets, self.in_features)
        _, codes, terms = self._coded
        weight = length.mul_(SPREAD_WEIGHT).float()
        return ops.rank_centers(input, weight, codes, terms, self.buckets.shape[1], probes)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        mean_row: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        hashed = (input, bias, rows, mean_row)
        centroids = self.centroids.float()
        if probes > 1 or self.group_offsets is None or self.group_members is None:
            return ops.nearest_centroids(*hashed, centroids, norm_bound, probes)
        codes = [
            nearest_centroid(hashed, own, CentroidGroups(offsets, members), norm_bound)
            for own, offsets, members in zip(
                centroids, self.group_offsets, self.group_members, strict=True
            )
        ]
        return codes[0] if len(codes) == 1 else torch.cat(codes)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}"


class CodedBuckets(NamedTuple):
    """What queries rank ``buckets`` by: ``codes`` and ``terms`` of :func:`slide_torch.ops.code_centers`."""

    buckets: Tensor
    codes: Tensor
    terms: Tensor

    @staticmethod
    def of(buckets: Tensor, in_features: int) -> CodedBuckets:
        means, spread = buckets[..., :in_features].contiguous(), buckets[..., -1].contiguous()
        has_bias = buckets.shape[2] > in_features + 1
        bias = buckets[..., in_features].contiguous() if has_bias else None
        return CodedBuckets(buckets, *ops.code_centers(means, bias, spread))


class CentroidGroups(NamedTuple):
    """Centroids that lie together: ``offsets`` int64 (groups + 1) into ``members`` int32 (centroids)."""

    offsets: Tensor
    members: Tensor


def group_count(centroids: int) -> int:
    """Groups of a number of centroids: about its square root; 0 where they are too few to be grouped."""
    return 0 if centroids < GROUPED_FROM else 1 << (centroids.bit_length() // 2)


def group_centroids(centroids: Tensor) -> CentroidGroups | None:
    """Groups of ``centroids`` (n, width) by a few rounds of k-means, or None where there are few."""
    count = centroids.shape[0]
    size = group_count(count)
    if size == 0:
        return None
    means = centroids[:: count // size].contiguous()
    offsets = members = torch.empty(0)
    for _ in range(GROUP_ROUNDS):
        assigned = ops.nearest_centroids(centroids, None, None, None, means.unsqueeze(0))[0]
        offsets = F.pad(torch.bincount(assigned, minlength=size).cumsum(0), (1, 0))
        members = assigned.argsort(stable=True).to(torch.int32)
        moved, _ = ops.list_centers(centroids, None, offsets, members)
        means = torch.where(offsets.diff().unsqueeze(1) > 0, F.normalize(moved, dim=1), means)
    return CentroidGroups(offsets, members)


def spherical_kmeans(
    sample: Tensor, centroids: Tensor, rounds: int, generator: torch.Generator
) -> Tensor:
    """``centroids`` (n, width) after some rounds of k-means over ``sample``, rows of length 1. A centroid
    that loses all its rows starts again from a row that ``generator`` picks."""
    count = centroids.shape[0]
    for _ in range(rounds):
        codes = nearest_centroid((sample, None, None, None), centroids, group_centroids(centroids))
        means, sizes = ops.group_means(sample, codes[0].long(), count)
        restarts = sample[torch.randint(sample.shape[0], (count,), generator=generator)]
        means = torch.where((sizes == 0)[:, None], restarts, means)
        centroids = F.normalize(means, dim=1)
    return centroids


def nearest_centroid(
    hashed: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    centroids: Tensor,
    groups: CentroidGroups | None,
    norm_bound: float | None = None,
) -> Tensor:
    """Codes (1, n) of what is ``hashed`` (input, bias, rows, mean row) by ``centroids`` (2^bits, width): the
    nearest of all, or with ``groups`` the nearest of those in the nearest groups."""
    if groups is None:
        return ops.nearest_centroids(*hashed, centroids.unsqueeze(0), norm_bound)
    means = F.normalize(ops.list_centers(centroids, None, *groups)[0], dim=1)
    return ops.nearest_in_groups(*hashed, centroids, means, *groups, GROUPS_SEARCHED, norm_bound)
