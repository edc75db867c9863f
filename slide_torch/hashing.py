"""Hash families: rows of a matrix -> one code per table."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .bfloat16 import ROWS_AT_ONCE, blocks, computed_dtype, some_rows
from .options import LSHOptions

# How much the spread of a bucket's logits, as against their mean, says for probing it: of 0.1, 0.2, 0.3 the
# one that found most of the top 10 in a hundredth of the rows, in one trial that is not kept.
_SPREAD_WEIGHT = 0.2
_NOT_WORTH_PROBING = -1e9  # the spread of a bucket that holds nothing

# From so many centroids on, rows look only into so many of about sqrt(centroids) groups of them.
_GROUPED = 512
_LOOKED = 4
_GROUP_ROUNDS = 3

_SAMPLE = 8192  # rows that stand for all where a mean or a quantile is wanted


class HashFamily(nn.Module, abc.ABC):
    """K hashes packed into one code, for each of L tables; the functions are determined by a seed (and,
    for :class:`KMeans`, by the rows that it is fitted to).

    What is hashed of a row comes about in steps: its bias is appended (``has_bias``; queries append 1);
    the mean row is subtracted (``center``, rows only); a last coordinate brings its norm up to a common
    bound (``augment_norms``; 0 for queries). Length itself plays no part: no family's code changes when a
    vector is multiplied by a positive number.

    Functions are integer or float buffers that no state dict holds.

    Args:
        in_features: width d of rows and inputs.
        K, L: hashes per table, and tables.
        has_bias: whether rows come with a bias.
        seed: what the functions are drawn from.
        center: whether :meth:`fit` and :meth:`adapt` center.
        augment_norms: whether rows get the coordinate above (Neyshabur & Srebro 2015).

    Attributes:
        bits: bits of a code.
        seed: what the functions were drawn from.
        center: (d, or d + 1 with bias), what is subtracted from rows, or None.
        norm_bound: float64 scalar, what norms are brought up to, or None.
    """

    center: Tensor | None
    norm_bound: Tensor | None
    describes = False

    def __init__(
        self,
        in_features: int,
        K: int,
        L: int,
        *,
        has_bias: bool,
        seed: int,
        center: bool = False,
        augment_norms: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.K = K
        self.L = L
        self.has_bias = has_bias
        self.centers = center
        self.augment_norms = augment_norms
        self.register_buffer("center", None, persistent=False)
        self.register_buffer("norm_bound", None, persistent=False)
        self.bits = K
        self.draw(seed)

    @property
    def width(self) -> int:
        """Coordinates of what is hashed."""
        return self.in_features + self.has_bias + self.augment_norms

    def draw(self, seed: int) -> None:
        """Replaces the hash functions by those of ``seed``."""
        self.seed = seed
        self._draw(torch.Generator().manual_seed(seed))

    @abc.abstractmethod
    def _draw(self, generator: torch.Generator) -> None: ...

    @abc.abstractmethod
    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor: ...

    def fit(self, weight: Tensor, bias: Tensor | None, previous: HashFamily | None = None) -> None:
        """Makes ready for the rows of ``weight`` (N, d) with ``bias`` (N) or None: :meth:`adapt`, and what
        a data-dependent family learns from them, setting out from a ``previous`` one of the same shape."""
        self.adapt(weight, bias)

    def follow(self, weight: Tensor, bias: Tensor | None) -> None:
        """Before some rows are hashed anew: moves functions that may move while the other rows keep their
        codes. Those that a seed determines may not."""

    def describe(self, centers: Sequence[Sequence[Tensor]], offsets: Tensor) -> None:
        """After rows have been hashed: takes note of what lies in the buckets, where ``describes`` says that
        it is wanted: for each table mean rows and radius as of :func:`slide_torch.ops.list_centers`;
        ``offsets`` (L, 2^bits + 1)."""

    def adapt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Follows rows that have moved: their mean, and the 90th percentile of their norms about it, of
        up to 8,192 of them.

        Centering shifts a query's inner products with all rows alike, so their order stays; but rows that
        training has pushed in one common direction no longer share a bucket.
        """
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.centers:
            self.center = _mean_row(weight, bias)
        if self.augment_norms:
            self.norm_bound = self._norm_bound(weight, bias)

    def _norm_bound(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = _hashed_rows(weight.detach(), bias, _evenly(weight), self.center)
        return rows.double().norm(dim=1).quantile(0.9)

    def row_codes(
        self, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Codes of neurons: the rows of ``weight``, the bias appended as one more coordinate.

        Args:
            weight: float32, float64 or bfloat16 (N, d).
            bias: the same dtype, (N), or None for a family made without one.
            rows: int64 (n), the rows to hash; None for all.

        Returns:
            int16 (up to 15 bits) or int32 (L, n). The code of a row that holds NaN or Inf is -1.
        """
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if weight.dtype == torch.bfloat16:
            parts = blocks(weight.shape[0]) if rows is None else rows.split(ROWS_AT_ONCE)
            found = [self.row_codes(*some_rows(weight, bias, part)) for part in parts]
            return torch.cat(found, 1)
        center = None if self.center is None else self.center.to(weight.dtype)
        norm_bound = None
        if self.augment_norms:
            norm_bound = 1.0 if self.norm_bound is None else float(self.norm_bound)
        return self._codes(weight, bias, rows, center, norm_bound)

    def query_codes(self, input: Tensor, probes: int = 1) -> Tensor:
        """Codes of inputs: a 1 is appended where rows append their bias.

        Args:
            input: float32 or float64 (B, d).
            probes: how many codes a table, the best first.

        Returns:
            (L * probes, B), dtype as :meth:`row_codes`: row ``t * probes + p`` has the p-th best codes of
            table t, all different; -1 where there are fewer, and for inputs that hold NaN or Inf.
        """
        input = input.detach()
        bias = input.new_ones(input.shape[0]) if self.has_bias else None
        norm_bound = 0.0 if self.augment_norms else None
        return self._codes(input, bias, norm_bound=norm_bound, probes=probes)


def _evenly(weight: Tensor) -> Tensor:
    """Rows, up to 8,192, that stand for all."""
    return torch.arange(0, weight.shape[0], -(-weight.shape[0] // _SAMPLE))


def _mean_row(weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dtype == torch.bfloat16:
        weight, bias = some_rows(weight, bias, _evenly(weight))
    return ops.mean_row(weight, bias, _SAMPLE)


def _hashed_rows(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    center: Tensor | None,
    norm_bound: float | None = None,
) -> Tensor:
    """:func:`slide_torch.ops.hashed_rows`, of bfloat16 parameters too."""
    if weight.dtype != torch.bfloat16:
        return ops.hashed_rows(weight, bias, rows, center, norm_bound)
    return ops.hashed_rows(*some_rows(weight, bias, rows), None, center, norm_bound)


def _rotations(
    in_features: int, coordinates: int, smallest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Signs int8 (rotations, 3, size) and projections of appended coordinates (2, rotations, size), for as
    many rotations as give that many ``coordinates``."""
    size = max(smallest, 1 << max(0, in_features - 1).bit_length())
    rotations = -(-coordinates // size)
    signs = torch.randint(0, 2, (rotations, 3, size), generator=generator) * 2 - 1
    bias, norm = (torch.randn(rotations, size, generator=generator) for _ in range(2))
    return signs.to(torch.int8), torch.stack([bias, norm])


class SimHash(HashFamily):
    """Signs of random projections (Charikar 2002): two vectors at angle t agree in a hash with
    probability 1 - t / pi. A further probe flips the signs of the projections nearest to zero.

    ``projection``: ``"hadamard"``, ``"gaussian"`` or ``"sparse"``, see :class:`LSHOptions`. The sparse one
    is multiplied as a dense matrix.
    """

    signs: Tensor
    extra_projection: Tensor
    matrix: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, projection: str = "hadamard", **common: Any
    ) -> None:
        self._projection = projection
        super().__init__(in_features, K, L, **common)

    def _draw(self, generator: torch.Generator) -> None:
        hashes = self.K * self.L
        if self._projection == "hadamard":
            signs, extra = _rotations(self.in_features, hashes, 1, generator)
            self.register_buffer("signs", signs, persistent=False)
            self.register_buffer("extra_projection", extra, persistent=False)
            return
        shape = (hashes, self.width)
        if self._projection == "gaussian":
            matrix = torch.randn(shape, generator=generator)
        else:
            matrix = torch.randint(0, 6, shape, generator=generator).float()
            matrix = (matrix == 0).float() - (matrix == 1).float()
        self.register_buffer("matrix", matrix, persistent=False)

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
        if self._projection == "hadamard":
            extra = self.extra_projection.float()
            return ops.simhash_hadamard(*of, self.signs, extra, self.K, self.L, norm_bound, probes)
        return ops.simhash_dense(*of, self.matrix.float(), self.K, self.L, norm_bound, probes)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, projection={self._projection!r}"


class CrossPolytope(HashFamily):
    """The signed coordinate, of ``bin_size`` coordinates of a rotated vector, that is largest in absolute
    value (Andoni et al. 2015), by the pseudo-random rotations H S3 H S2 H S1. A further probe takes the
    next largest.

    A ``bin_size`` of the rotation's own size is the cross-polytope hash proper; a smaller one is that of
    a random projection, of which a rotation gives several.
    """

    signs: Tensor
    extra_projection: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, bin_size: int = 8, **common: Any
    ) -> None:
        self.bin_size = bin_size
        super().__init__(in_features, K, L, **common)
        self.bits = K * bin_size.bit_length()

    def _draw(self, generator: torch.Generator) -> None:
        # at least 32 coordinates: the rotations of fewer are not random enough
        coordinates = self.K * self.L * self.bin_size
        smallest = max(32, self.bin_size)
        signs, extra = _rotations(self.in_features, coordinates, smallest, generator)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("extra_projection", extra, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        return ops.cross_polytope(
            input,
            bias,
            rows,
            center,
            self.signs,
            self.extra_projection.float(),
            self.bin_size,
            self.K,
            self.L,
            norm_bound,
            probes,
        )

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, bin_size={self.bin_size}"


class _Bins(HashFamily):
    """Hashes by bins of ``bin_size`` randomly chosen coordinates."""

    coordinates: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, bin_size: int = 8, **common: Any
    ) -> None:
        self.bin_size = bin_size
        super().__init__(in_features, K, L, **common)
        self.bits = K * (bin_size.bit_length() - 1)

    def _draw(self, generator: torch.Generator) -> None:
        needed = self.K * self.L * self.bin_size
        # whole permutations, cut into bins: within one permutation no coordinate is seen twice
        permutations = -(-needed // self.width)
        order = torch.rand(permutations, self.width, generator=generator).argsort(dim=1).flatten()
        coordinates = order[:needed].view(-1, self.bin_size).to(torch.int32).contiguous()
        self.register_buffer("coordinates", coordinates, persistent=False)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, bin_size={self.bin_size}"


class DWTA(_Bins):
    """Densified winner-take-all (Yagnik et al. 2011; Chen & Shrivastava 2018): a hash is the place of the
    largest of ``bin_size`` randomly chosen coordinates. A further probe takes the second largest.

    Coordinates that are zero count as absent, so sparse vectors (a ReLU's output) hash by what they
    have; a hash whose coordinates are all absent borrows that of another bin. On vectors without zeros
    this is winner-take-all hashing itself.
    """

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        return ops.dwta(
            input, bias, rows, center, self.coordinates, self.K, self.L, norm_bound, probes
        )


class MinHash(_Bins):
    """One-permutation MinHash (Li et al. 2012) with optimal densification (Shrivastava 2017) of the set of
    a vector's positive coordinates: two vectors agree in a hash with a probability of their sets'
    Jaccard similarity (and 1 / ``bin_size`` of the rest, where a bin is empty).

    For sparse or binary vectors. A hash is the first place of a bin, in a random order of coordinates,
    that is in the set; an empty bin borrows from another. It has no further probes.
    """

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        center: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        if probes != 1 or norm_bound is not None:
            raise ValueError("MinHash: expected one probe, and no augmented norms")
        return ops.minhash(input, bias, rows, center, self.coordinates, self.K, self.L)


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
            groups = [_group(own) for own in self.centroids]
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
        rows = _hashed_rows(weight.detach(), bias, picked, self.center, bound).float()
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
            codes = _nearest((sample, None, None, None), centroids, _group(centroids))[0]
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


def _group(centroids: Tensor) -> tuple[Tensor, Tensor] | None:
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


def make_family(options: LSHOptions, in_features: int, *, has_bias: bool, seed: int) -> HashFamily:
    """The family that resolved ``options`` name."""
    assert options.K != "auto" and options.L != "auto"
    own: dict[str, Any] = {}
    if options.family == "simhash":
        own["projection"] = options.projection
    elif options.family != "kmeans":
        own["bin_size"] = options.bin_size
    return _FAMILIES[options.family](
        in_features,
        options.K,
        options.L,
        has_bias=has_bias,
        seed=seed,
        center=options.center,
        augment_norms=options.augment_norms,
        **own,
    )


_FAMILIES: dict[str, Any] = {
    "simhash": SimHash,
    "dwta": DWTA,
    "minhash": MinHash,
    "cross_polytope": CrossPolytope,
    "kmeans": KMeans,
}
