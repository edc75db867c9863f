"""Built tables: the buckets that rows' codes put them into, and what is kept beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops, precision
from ..hashing.base import HashFamily
from ..options import ResolvedOptions

# Bytes from which tables are refused that have far more buckets than there are neurons.
LARGE_TABLES = 1 << 30


class SQ8Rows(NamedTuple):
    """Rows as codes of a byte, bucket by bucket, so that a search reads a quarter of the bytes, in order.

    Attributes:
        codes: uint8 (blocks, (d + 7) // 8 * 2, 16, 4), blocks of 16 rows of one bucket.
        terms: float32 (blocks, 2, 16), the scale and the bias of each row.
        places: int32 (N), the place of each row among those of all blocks.
    """

    codes: Tensor
    terms: Tensor
    places: Tensor

    @staticmethod
    def for_buckets(weight: Tensor, offsets: Tensor) -> SQ8Rows:
        """Room for the rows of ``weight`` (N, d) in as many buckets as ``offsets`` (2^bits + 1) has, however
        the rows are spread over them."""
        return SQ8Rows(*ops.empty_codes(weight, offsets, room=True))

    def write_buckets_(
        self, weight: Tensor, bias: Tensor | None, offsets: Tensor, ids: Tensor
    ) -> None:
        """Writes all rows."""
        precision.code_lists_(*self, weight, bias, offsets.long(), ids)

    def move_rows_(
        self, weight: Tensor, bias: Tensor | None, offsets: Tensor, ids: Tensor, rehashed: Rehashed
    ) -> None:
        """Moves all rows into these buckets and writes only those that were rehashed."""
        old, new = rehashed.old_offsets[0].long(), offsets.long()
        ops.move_codes_(*self, old, new, ids, rehashed.rows)
        self.rewrite_rows_(weight, bias, rehashed.rows)

    def rewrite_rows_(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> None:
        """Writes ``rows`` (int64, increasing) anew, in their old places."""
        precision.recode_rows_(*self, weight, bias, rows)


class Rehashed(NamedTuple):
    """What a rehash of some rows started from.

    Attributes:
        rows: int64 (n), increasing: those that have been hashed anew.
        old_offsets: int32 (L, 2^bits + 1), where buckets began.
    """

    rows: Tensor
    old_offsets: Tensor


class BuiltTables(NamedTuple):
    """L tables over N rows, in packed (CSR) buckets.

    Attributes:
        family: the functions that the codes are of.
        codes: int16 or int32 (L, N), the bucket of each row in each table.
        offsets: int32 (L, 2^bits + 1), where each bucket begins in ``ids``.
        ids: int32 (L, N), rows by bucket.
        dirty: bool (N), the rows that may have changed since they were hashed.
        sq8: the rows as codes, where one table is searched.
    """

    family: HashFamily
    codes: Tensor
    offsets: Tensor
    ids: Tensor
    dirty: Tensor
    sq8: SQ8Rows | None

    @staticmethod
    def of_codes(family: HashFamily, codes: Tensor, sq8: SQ8Rows | None) -> BuiltTables:
        """Puts rows into the buckets of their ``codes``."""
        dirty = torch.zeros(codes.shape[1], dtype=torch.bool)
        return BuiltTables(family, codes, *ops.build_tables(codes, family.bits), dirty, sq8)

    def described(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        searched: bool,
        rehashed: Rehashed | None = None,
    ) -> BuiltTables:
        """These tables with what is read off the rows in their buckets: their codes if they are ``searched``,
        and what the family wants to know of each bucket. ``rehashed``: the codes of other rows are right."""
        rows = weight.detach(), None if bias is None else bias.detach()
        if searched:
            sq8 = self.sq8
            if sq8 is None:
                sq8, rehashed = SQ8Rows.for_buckets(rows[0], self.offsets[0]), None
            if rehashed is None:
                sq8.write_buckets_(*rows, self.offsets[0], self.ids[0])
            else:
                sq8.move_rows_(*rows, self.offsets[0], self.ids[0], rehashed)
            if self.family.describes:
                shape = weight.shape[1], bias is not None
                means = ops.coded_centers(sq8.codes, sq8.terms, self.offsets[0].long(), *shape)
                self.family.describe([means], self.offsets)
            return self._replace(sq8=sq8)
        if self.family.describes:
            tables = zip(self.offsets, self.ids, strict=True)
            means_of_tables = [
                precision.list_centers(*rows, offsets.long(), ids) for offsets, ids in tables
            ]
            self.family.describe(means_of_tables, self.offsets)
        return self


def check_size(
    options: ResolvedOptions, out_features: int, in_features: int, *, has_bias: bool
) -> None:
    """Refuses tables that would take much memory for buckets most of which can hold nothing.

    Raises:
        ValueError: there are far more buckets than neurons, and they take over 1 GiB.
    """
    per_bucket, useful = 4, 16 * out_features
    if options.family == "kmeans":  # a centroid, a mean row and its spread
        per_bucket += 4 * (2 * (in_features + has_bias) + options.augment_norms + 1)
        useful = out_features
    size = (per_bucket * options.L) << options.code_bits
    if size > LARGE_TABLES and 1 << options.code_bits > useful:
        fitting = max(LARGE_TABLES // (per_bucket * options.L), useful, 2).bit_length() - 1
        raise ValueError(
            f"HashTables: options.K: expected at most {max(1, fitting // options.bits_per_hash)} for "
            f"{out_features} neurons in {options.L} tables, got {options.K}: a table would have "
            f"2^{options.code_bits} buckets, {size:,} bytes for all tables"
        )


def finite_codes(codes: Tensor, rows: Tensor | None = None) -> Tensor:
    """``codes`` (L, n) of ``rows``, or of all.

    Raises:
        ValueError: some are of rows that hold NaN or Inf.
    """
    broken = (codes[0] < 0).nonzero().flatten()  # all tables mark the same rows
    if broken.numel():
        names = (broken if rows is None else rows[broken]).tolist()
        shown = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"HashTables: weight: expected finite rows, got NaN or Inf in {len(names)} of them "
            f"({shown}). Training has diverged or the weights were overwritten: restore them, or "
            "lower the learning rate."
        )
    return codes
