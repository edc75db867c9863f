"""Operators that find the largest logits: among all rows, or among the rows of some lists."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .library import fake, operators
from .rows import advise_hugepages_


def topk_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest of ``input @ weight.T + bias`` for each row of ``input`` (B, d), in blocks.

    Returns:
        values (B, k), descending, equal ones by index, NaN first; indices int64 (B, k).
    """
    return operators.topk_linear(input, weight, bias, k)


@fake("topk_linear")
def _(a: SimpleNamespace) -> Any:
    return _best(a)


def code_lists_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    list_offsets: Tensor,
    list_rows: Tensor,
) -> None:
    """The rows of some lists as integers from -63 to 63, each row scaled by its largest magnitude, for
    :func:`topk_lists`. Blocks of 16 rows belong to one list; missing ones are zero.

    Args:
        codes: uint8 (any, (d + 7) // 8 * 2, 16, 4), receives the integers plus 64, four features next to each
            other.
        terms: float32 (any, 2, 16), receives the scale and the bias of each row.
        places: int32 (N), receives that of each row among the rows of all blocks, -1 for those in no list.
        list_offsets: int64 (lists + 1) into ``list_rows``, int32.
    """
    operators.code_lists_(codes, terms, places, weight, bias, list_offsets, list_rows)


@fake("code_lists_")
def _(a: SimpleNamespace) -> Any:
    return None


def empty_codes(
    weight: Tensor, list_offsets: Tensor, *, room: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, terms and places for :func:`code_lists_` to write to, of rows of ``weight`` (N, d).

    ``room``: for as many lists of any lengths.
    """
    neurons, d = weight.shape
    if room:
        blocks = neurons // 16 + min(neurons, list_offsets.shape[0] - 1)
    else:
        blocks = int(list_offsets.diff().add_(15).div_(16, rounding_mode="floor").sum())
    codes = torch.empty((blocks, (d + 7) // 8 * 2, 16, 4), dtype=torch.uint8)
    terms = torch.empty((blocks, 2, 16), dtype=torch.float32)
    places = torch.empty(neurons, dtype=torch.int32)
    for tensor in (codes, terms, places):  # zeros: what lists do not fill may be saved with them
        advise_hugepages_(tensor).zero_()
    return codes, terms, places


def recode_rows_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
) -> None:
    """Renews what :func:`code_lists_` wrote of ``rows``, int64 (n), strictly increasing, that have changed
    since."""
    operators.recode_rows_(codes, terms, places, weight, bias, rows)


@fake("recode_rows_")
def _(a: SimpleNamespace) -> Any:
    return None


def move_codes_(
    codes: Tensor,
    terms: Tensor,
    places: Tensor,
    old_offsets: Tensor,
    list_offsets: Tensor,
    list_rows: Tensor,
    rows: Tensor,
) -> None:
    """Moves what :func:`code_lists_` wrote to where rows stand in new lists, without reading the rows.

    Args:
        old_offsets: int64 (lists + 1), of the lists that codes, terms and places are of.
        list_offsets, list_rows: as many new lists.
        rows: int64 (n), strictly increasing: all that are in another list than before, or in none, and any
            others; they receive places and no codes, for :func:`recode_rows_` to give.
    """
    operators.move_codes_(codes, terms, places, old_offsets, list_offsets, list_rows, rows)


@fake("move_codes_")
def _(a: SimpleNamespace) -> Any:
    return None


def coded_centers(
    codes: Tensor, terms: Tensor, list_offsets: Tensor, features: int, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`list_centers` finds, of the rows as :func:`code_lists_` has rounded them: float32. The
    radius comes of a difference, of mean squared lengths, and is no better than their rounding."""
    return operators.coded_centers(codes, terms, list_offsets, features, has_bias)


@fake("coded_centers")
def _(a: SimpleNamespace) -> Any:
    lists, width = a.list_offsets.shape[0] - 1, a.features + int(a.has_bias)
    return a.terms.new_empty((lists, width)), a.terms.new_empty((lists,))


def topk_lists(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    list_offsets: Tensor,
    list_rows: Tensor,
    codes: Tensor,
    terms: Tensor,
    probes: Tensor,
    k: int,
    rescored: int,
    list_cap: int = 2**31 - 1,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """As :func:`topk_linear`, among the rows of some lists only: the k best, scored exactly, of the
    ``rescored`` rows that score best by their codes, for inputs rounded as :func:`rank_centers` rounds them.
    Where a sample's lists hold fewer than k rows, the last values are -inf and their indices -1.

    Args:
        list_offsets: int64 (lists + 1) into ``list_rows``, int32, in which no row stands twice.
        codes, terms: of :func:`code_lists_`.
        probes: int64 (B, any), distinct lists of each sample; -1 is none.
        rescored: at least k.
        list_cap: most rows looked at of a list, rounded up to blocks of 16, from a block on that ``seed``
            determines.
        weight: may be bfloat16 beside float32 ``input`` and ``bias``.
    """
    return operators.topk_lists(
        input,
        weight,
        bias,
        list_offsets,
        list_rows,
        codes,
        terms,
        probes,
        k,
        rescored,
        list_cap,
        seed,
    )


@fake("topk_lists", "search_lists")
def _(a: SimpleNamespace) -> Any:
    return _best(a)


def search_lists(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    list_offsets: Tensor,
    list_rows: Tensor,
    codes: Tensor,
    terms: Tensor,
    center_codes: Tensor,
    center_terms: Tensor,
    radius_weight: float,
    probes: int,
    enough: int,
    k: int,
    rescored: int,
) -> tuple[Tensor, Tensor]:
    """As :func:`topk_lists`, among the rows of the ``probes`` lists that score best, ``<center, x> + bias +
    radius_weight |(x, 1)| spread``, for each input; where these hold fewer than k rows, of more lists, up to
    ``enough``.

    Args:
        center_codes, center_terms: of :func:`code_centers`, one table.
    """
    return operators.search_lists(
        input,
        weight,
        bias,
        list_offsets,
        list_rows,
        codes,
        terms,
        center_codes,
        center_terms,
        radius_weight,
        probes,
        enough,
        k,
        rescored,
    )


def list_centers(
    weight: Tensor, bias: Tensor | None, list_offsets: Tensor, list_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean row of each list, (lists, d, or d + 1 with the bias appended), and the root mean square
    distance (lists) of its rows from it; zeros for an empty list."""
    return operators.list_centers(weight, bias, list_offsets, list_rows)


@fake("list_centers")
def _(a: SimpleNamespace) -> Any:
    return _centers(a)


def code_centers(centers: Tensor, bias: Tensor | None, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Centers of lists as integers from -63 to 63, each scaled by its largest magnitude, for
    :func:`rank_centers`.

    Args:
        centers: float32 (tables, lists, d).
        bias, spread: float32 (tables, lists).

    Returns:
        codes uint8 (tables, blocks of 16 lists, (d + 7) // 8 * 2, 16, 4), the integers plus 64, four features
        next to each other, and terms float32 (tables, blocks, 3, 16), the scale, the bias and the spread of
        each center.
    """
    return operators.code_centers(centers, bias, spread)


@fake("code_centers")
def _(a: SimpleNamespace) -> Any:
    tables, lists, d = a.centers.shape
    blocks = (lists + 15) // 16
    codes = a.centers.new_empty((tables, blocks, (d + 7) // 8 * 2, 16, 4), dtype=torch.uint8)
    return codes, a.centers.new_empty((tables, blocks, 3, 16))


def rank_centers(
    input: Tensor, spread_weight: Tensor, codes: Tensor, terms: Tensor, lists: int, probes: int
) -> Tensor:
    """The lists of each table that score best, ``<center, x> + bias + spread_weight * spread``, for each
    row of ``input`` (B, d), which is rounded to integers from -63 to 63 times its scale.

    Args:
        spread_weight: float32 (B).
        codes, terms: of :func:`code_centers`, of tables with ``lists`` lists.
        probes: how many of each table; of several tables at most 254 together.

    Returns:
        int16 (up to 2^15 lists) or int32 (tables * probes, B): row ``t * probes + p`` has the p-th best of
        table t, of equal ones the smaller; -1 where there are fewer, and for inputs that hold NaN or Inf.
    """
    return operators.rank_centers(input, spread_weight, codes, terms, lists, probes)


@fake("rank_centers")
def _(a: SimpleNamespace) -> Any:
    dtype = torch.int16 if a.lists <= 1 << 15 else torch.int32
    return a.input.new_empty((a.codes.shape[0] * a.probes, a.input.shape[0]), dtype=dtype)


def _best(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    shape = (a.input.shape[0], a.k)
    return a.input.new_empty(shape), a.input.new_empty(shape, dtype=torch.int64)


def _centers(a: SimpleNamespace) -> tuple[Tensor, Tensor]:
    lists, width = a.list_offsets.shape[0] - 1, a.weight.shape[1] + int(a.bias is not None)
    return a.weight.new_empty((lists, width)), a.weight.new_empty((lists,))
