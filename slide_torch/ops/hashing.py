"""Operators that hash rows and queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .library import fake, operators

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


@fake("simhash_hadamard")
def _(a: SimpleNamespace) -> Any:
    return _codes(a, bits=a.K)


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


@fake("simhash_dense")
def _(a: SimpleNamespace) -> Any:
    return _codes(a, bits=a.K)


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


@fake("dwta")
def _(a: SimpleNamespace) -> Any:
    return _codes(a, bits=a.K * (a.coordinates.shape[1].bit_length() - 1))


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


@fake("nearest_centroids")
def _(a: SimpleNamespace) -> Any:
    tables, size, _ = a.centroids.shape
    return _codes(a, bits=size.bit_length() - 1, tables=tables)


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

    Features of rows and centroids are compared as integers of seven bits, times a scale of each: among
    centroids that are nearly equally near, another than the nearest may be found, the same at every
    instruction set. A bias and an augmented coordinate, which may be larger, are integers of fifteen bits.

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


@fake("nearest_in_groups")
def _(a: SimpleNamespace) -> Any:
    return _codes(a, bits=a.centroids.shape[0].bit_length() - 1, tables=1)


def hashed_rows(
    input: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    center: Tensor | None,
    norm_bound: float | None = None,
) -> Tensor:
    """What the families hash of each row, as a matrix (n, width)."""
    return operators.hashed_rows(input, bias, rows, center, norm_bound)


@fake("hashed_rows")
def _(a: SimpleNamespace) -> Any:
    extras = (a.bias is not None) + (a.norm_bound is not None)
    return a.input.new_empty((_count(a), a.input.shape[1] + extras))


def group_means(values: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means (count, width) of the rows of ``values`` (n, width) by ``groups`` int64 (n), -1 for none; zero
    where a group is empty; and their sizes int64 (count)."""
    return operators.group_means(values, groups, count)


@fake("group_means")
def _(a: SimpleNamespace) -> Any:
    return a.values.new_empty((a.count, a.values.shape[1])), a.groups.new_empty((a.count,))


def mean_row(weight: Tensor, bias: Tensor | None, most: int) -> Tensor:
    """Mean (d, or d + 1 with the bias appended) of at most ``most`` evenly spaced rows."""
    return operators.mean_row(weight, bias, most)


@fake("mean_row")
def _(a: SimpleNamespace) -> Any:
    return a.weight.new_empty((a.weight.shape[1] + int(a.bias is not None),))


def _count(a: SimpleNamespace) -> Any:
    return a.input.shape[0] if a.rows is None else a.rows.shape[0]


def _codes(a: SimpleNamespace, *, bits: int, tables: int | None = None) -> Tensor:
    codes = (a.L if tables is None else tables) * getattr(a, "probes", 1)
    dtype = torch.int16 if bits <= 15 else torch.int32
    return a.input.new_empty((codes, _count(a)), dtype=dtype)
