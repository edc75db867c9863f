"""The interface of all hash families."""

from __future__ import annotations

import abc
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..precision import ROWS_AT_ONCE, blocks, some_rows

# Rows that stand for all where a mean or a quantile is wanted.
SAMPLED_ROWS = 8192


class HashFamily(nn.Module, abc.ABC):
    """K hashes packed into one code, for each of L tables. A seed determines the functions; those of
    :class:`KMeans` also depend on the rows that it is fitted to.

    A row is prepared in steps before it is hashed: its bias is appended (``has_bias``; queries append 1); the
    mean row is subtracted (``center``, rows only); a last coordinate brings its norm up to a common bound
    (``augment_norms``; 0 for queries). The length of a vector plays no part: no family's code changes when a
    vector is multiplied by a positive number.

    Functions are integer or float buffers that are not part of a state dict.

    Args:
        in_features: width d of rows and inputs.
        K, L: hashes per table, and tables.
        has_bias: whether rows come with a bias.
        seed: what the functions are drawn from.
        center: whether rows are hashed relative to their mean.
        augment_norms: whether rows get the coordinate above (Neyshabur & Srebro 2015).

    Attributes:
        bits: bits of a code.
        seed: what the functions were drawn from.
        mean_row: (d, or d + 1 with bias), what is subtracted from rows, or None.
        norm_bound: float64 scalar, what norms are brought up to, or None.
        describes: whether :meth:`describe` is to be called once rows lie in their buckets.
    """

    mean_row: Tensor | None
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
        self.center = center
        self.augment_norms = augment_norms
        self.register_buffer("mean_row", None, persistent=False)
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

    def copied(self) -> HashFamily:
        """Another family with the same functions: one of the two can change while the other stays as it is.
        The tensors are shared, since methods replace buffers and never write into them."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        return other

    @abc.abstractmethod
    def _draw(self, generator: torch.Generator) -> None: ...

    @abc.abstractmethod
    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        mean_row: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor: ...

    def fit(self, weight: Tensor, bias: Tensor | None, previous: HashFamily | None = None) -> None:
        """Prepares for the rows of ``weight`` (N, d) with ``bias`` (N) or None: :meth:`adapt`, and what a
        data-dependent family learns from them, starting from a ``previous`` one of the same shape."""
        self.adapt(weight, bias)

    def adapt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Before all rows are hashed again: follows rows that have moved, by their mean and by the 90th
        percentile of their norms about it, of up to 8,192 of them.

        Centering shifts a query's inner products with all rows alike, so their order stays; but rows that
        training has pushed in one common direction no longer share a bucket.
        """
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if self.center:
            self.mean_row = mean_row_of(weight, bias)
        if self.augment_norms:
            self.norm_bound = self._norm_bound(weight, bias)

    def follow(self, weight: Tensor, bias: Tensor | None) -> None:
        """Before some rows are hashed again: moves the functions that may move while the other rows keep
        their codes. Functions that a seed determines may not."""

    def describe(self, buckets: Sequence[Sequence[Tensor]], offsets: Tensor) -> None:
        """After rows have been hashed: records what lies in the buckets.

        Args:
            buckets: for each table mean rows and radii, as of :func:`slide_torch.ops.list_centers`.
            offsets: (L, 2^bits + 1), where buckets begin.
        """

    def _norm_bound(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = hashed_rows(weight.detach(), bias, evenly_spaced_rows(weight), self.mean_row)
        norms: Tensor = rows.double().norm(dim=1)
        return norms.quantile(0.9)

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
            parts = blocks(weight.shape[0]) if rows is None else torch.split(rows, ROWS_AT_ONCE)
            found = [self.row_codes(*some_rows(weight, bias, part)) for part in parts]
            return torch.cat(found, 1)
        mean_row = None if self.mean_row is None else self.mean_row.to(weight.dtype)
        norm_bound = None
        if self.augment_norms:
            norm_bound = 1.0 if self.norm_bound is None else float(self.norm_bound)
        return self._codes(weight, bias, rows, mean_row, norm_bound)

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


def evenly_spaced_rows(weight: Tensor) -> Tensor:
    """Indices of up to 8,192 rows that stand for all."""
    return torch.arange(0, weight.shape[0], -(-weight.shape[0] // SAMPLED_ROWS))


def mean_row_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The mean of up to 8,192 rows, with their bias appended."""
    if weight.dtype == torch.bfloat16:
        weight, bias = some_rows(weight, bias, evenly_spaced_rows(weight))
    return ops.mean_row(weight, bias, SAMPLED_ROWS)


def hashed_rows(
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    mean_row: Tensor | None,
    norm_bound: float | None = None,
) -> Tensor:
    """:func:`slide_torch.ops.hashed_rows`, of bfloat16 parameters too."""
    if weight.dtype != torch.bfloat16:
        return ops.hashed_rows(weight, bias, rows, mean_row, norm_bound)
    return ops.hashed_rows(*some_rows(weight, bias, rows), None, mean_row, norm_bound)
