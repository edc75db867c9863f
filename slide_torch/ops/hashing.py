"""Operators that hash rows and queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import operators, register_fake

# Of all families: `bias` appends one more coordinate; `rows` int64 picks and orders rows; `center` (d, or
# d + 1 with bias) is subtracted; `norm_bound` appends a coordinate that brings each row's norm up to it, None
# appends none; `probes` gives the best codes of each row and table: row t * probes + p of the result is table
# t's p-th best, -1 where there are fewer. Codes are int16 up to 15 bits, else int32; that of a row with NaN
# or Inf is -1.


def simhash_hadamard(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    signs: Tensor,
    extra_projection: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """SimHash codes (L * probes, n) by rotations H S3 H S2 H S1; ``signs`` int8 (rotations, 3, 2^k >= d),
    ``extra_projection`` float32 (2, rotations, 2^k) of the bias and the norm's coordinate."""
    return operators.simhash_hadamard(
        input, bias, rows, center, signs, extra_projection, K, L, norm_bound, probes
    )


def simhash_dense(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    projection: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """SimHash codes (L * probes, n) by an explicit float32 ``projection`` (K * L, width)."""
    return operators.simhash_dense(input, bias, rows, center, projection, K, L, norm_bound, probes)


def dwta(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    coordinates: Tensor,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Winner-take-all codes (L * probes, n); ``coordinates`` int32 (K * L, bin), bin a power of two."""
    return operators.dwta(input, bias, rows, center, coordinates, K, L, norm_bound, probes)


def minhash(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    coordinates: Tensor,
    K: int,
    L: int,
) -> Tensor:
    """MinHash codes (L, n) of the sets of positive coordinates; ``coordinates`` as for :func:`dwta`."""
    return operators.minhash(input, bias, rows, center, coordinates, K, L)


def cross_polytope(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    signs: Tensor,
    extra_projection: Tensor,
    bin: int,
    K: int,
    L: int,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Cross-polytope codes (L * probes, n), each hash of ``bin`` (a power of two) rotated coordinates;
    ``signs`` and ``extra_projection`` as for :func:`simhash_hadamard`."""
    return operators.cross_polytope(
        input, bias, rows, center, signs, extra_projection, bin, K, L, norm_bound, probes
    )


def nearest_centroids(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    centroids: Tensor,
    norm_bound: float | None = None,
    probes: int = 1,
) -> Tensor:
    """Places (L * probes, n) of the centroids with the largest inner products; ``centroids`` float32
    (L, 2^bits, width)."""
    return operators.nearest_centroids(input, bias, rows, center, centroids, norm_bound, probes)


def nearest_in_groups(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    centroids: Tensor,
    group_centroids: Tensor,
    offsets: Tensor,
    members: Tensor,
    looked: int,
    norm_bound: float | None = None,
) -> Tensor:
    """As :func:`nearest_centroids` for one table, (1, n), among the centroids of each row's nearest groups.

    Args:
        centroids: float32 (2^bits, width).
        group_centroids: float32 (groups, width).
        offsets, members: int64 (groups + 1) into int32 (2^bits), the centroids of each group, at least one.
        looked: groups that a row looks into.
    """
    return operators.nearest_in_groups(
        input,
        bias,
        rows,
        center,
        centroids,
        group_centroids,
        offsets,
        members,
        looked,
        norm_bound,
    )


def hashed_rows(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    norm_bound: float | None = None,
) -> Tensor:
    """What the families hash of each row, as a matrix (n, width)."""
    return operators.hashed_rows(input, bias, rows, center, norm_bound)


def group_means(values: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (count, width) of the rows of ``values`` (n, width) by ``groups`` int64 (n), -1 for none; zero
    where a group is empty; and their sizes int64 (count)."""
    return operators.group_means(values, groups, count)


def mean_row(weight: Tensor, bias: Tensor | None, most: int) -> Tensor:
    """Mean (d, or d + 1 with the bias appended) of at most ``most`` evenly spaced rows."""
    return operators.mean_row(weight, bias, most)


@register_fake("slide_torch::mean_row")
def _(weight: Any, bias: Any, most: Any) -> Any:
    return weight.new_empty((weight.shape[1] + int(bias is not None),))


@register_fake("slide_torch::nearest_in_groups")
def _(input: Any, bias: Any, rows: Any, center: Any, centroids: Any, *rest: Any) -> Any:
    return _fake_codes(input, rows, centroids.shape[0].bit_length() - 1, 1)


def _fake_codes(input: Tensor, rows: Tensor | None, bits: int, L: int, probes: int = 1) -> Tensor:
    count = input.shape[0] if rows is None else rows.shape[0]
    return input.new_empty((L * probes, count), dtype=torch.int16 if bits <= 15 else torch.int32)


@register_fake("slide_torch::simhash_hadamard")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    signs: Any,
    extra_projection: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K, L, probes)


@register_fake("slide_torch::simhash_dense")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    projection: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K, L, probes)


@register_fake("slide_torch::minhash")
@register_fake("slide_torch::dwta")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    coordinates: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K * (coordinates.shape[1].bit_length() - 1), L, probes)


@register_fake("slide_torch::cross_polytope")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    signs: Any,
    extra_projection: Any,
    bin: Any,
    K: Any,
    L: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    return _fake_codes(input, rows, K * bin.bit_length(), L, probes)


@register_fake("slide_torch::nearest_centroids")
def _(
    input: Any,
    bias: Any,
    rows: Any,
    center: Any,
    centroids: Any,
    norm_bound: Any = None,
    probes: Any = 1,
) -> Any:
    tables, size, _ = centroids.shape
    return _fake_codes(input, rows, size.bit_length() - 1, tables, probes)


@register_fake("slide_torch::hashed_rows")
def _(input: Any, bias: Any, rows: Any, center: Any, norm_bound: Any) -> Any:
    count = input.shape[0] if rows is None else rows.shape[0]
    extras = (bias is not None) + (norm_bound is not None)
    return input.new_empty((count, input.shape[1] + extras))


@register_fake("slide_torch::group_means")
def _(values: Any, groups: Any, count: Any) -> Any:
    return values.new_empty((count, values.shape[1])), groups.new_empty((count,))
