"""A partition of weight rows into lists of like direction: an inverted file."""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..inference_mode import keeps_normal_tensors
from ..precision import blocks, code_lists_, computed_dtype, some_rows, widened

# benchmarks/speed/prediction_sweep.py tries them on trained weights of the quickstart.
LISTS_PER_ROOT = 4  # lists: this times the square root of the number of rows
SAMPLE_PER_LIST = 64  # rows that k-means learns from, at most
ITERATIONS = 10

INPUTS_AT_ONCE = 4096


@dataclass(frozen=True)
class Search:
    """How far to look.

    Attributes:
        k: number of the best rows to find.
        probes: number of lists to search for each input.
        enough: number of lists that hold k rows, whichever they are: up to so many are searched for an input
            whose best ``probes`` lists hold fewer.
        radius_weight: weight of a list's spread in the choice of lists.
        rescored: number of the best rows by their codes that are scored exactly, if it is above k.
    """

    k: int
    probes: int
    enough: int
    radius_weight: float
    rescored: int


@dataclass(frozen=True)
class RowPartition:
    """Rows of a weight matrix in lists of like direction (an inverted file), by spherical k-means.

    A list is worth probing for an input x where the score of its mean row, and the spread of its rows,
    are large: ``<mean row, x> + mean bias + radius_weight |(x, 1)| radius``.

    Lists are ranked, and rows first scored, by codes, a fourth of the bytes, list by list; the best rows then
    exactly, where they stand. Memory: d + 12 bytes a row (and blocks of 16 rows begin with a list), d + 4
    numbers and d + 12 bytes a list.

    Attributes:
        offsets: int64 (lists + 1), where each list begins in ``rows``.
        rows: int32 (N), every row once.
        centers: (lists, d + 1), mean rows, and the radius.
        center_bias: (lists), the mean biases.
        rows_in_smallest: int64 (lists), rows in the n + 1 smallest lists together.
        codes, terms: of the rows, see :func:`slide_torch.ops.code_lists_`.
        center_codes, center_terms: of the lists, see :func:`slide_torch.ops.code_centers`.
    """

    offsets: Tensor
    rows: Tensor
    centers: Tensor
    center_bias: Tensor
    rows_in_smallest: Tensor
    codes: Tensor
    terms: Tensor
    center_codes: Tensor
    center_terms: Tensor

    @staticmethod
    @keeps_normal_tensors
    def build(weight: Tensor, bias: Tensor | None, *, seed: int) -> RowPartition:
        """Partitions the rows of ``weight`` (N, d) with ``bias`` (N) as one more coordinate; the same for
        the same seed at any number of threads.

        Raises:
            ValueError: rows hold NaN or Inf.
        """
        neurons = weight.shape[0]
        generator = torch.Generator().manual_seed(seed)
        lists = max(1, min(neurons // 4, round(LISTS_PER_ROOT * math.sqrt(neurons))))
        count = min(neurons, SAMPLE_PER_LIST * lists)
        sample = torch.randperm(neurons, generator=generator)[:count]
        points, shift = some_rows(weight, bias, sample)
        centers = F.normalize(_with_bias(points[:lists], None if shift is None else shift[:lists]))
        if not bool(torch.isfinite(weight.sum(1) if bias is None else weight.sum(1) + bias).all()):
            raise ValueError(
                "LSHLinear.calibrate: weight: expected finite rows, got NaN or Inf: restore the weights"
            )
        for _ in range(ITERATIONS):
            offsets, rows = _lists_of(_nearest(points, shift, centers), lists)
            fresh, _ = ops.list_centers(points, shift, offsets, rows)
            # a center without rows stays where it is
            centers = torch.where(offsets.diff().unsqueeze(1) > 0, F.normalize(fresh), centers)
        offsets, rows = _lists_of(_nearest(weight, bias, centers), lists)
        offsets = torch.cat([offsets[:1], offsets[1:][offsets.diff() > 0]])
        codes, terms, places = ops.empty_codes(weight, offsets, room=False)
        code_lists_(codes, terms, places, weight, bias, offsets, rows)
        centers, radius = (
            found.to(computed_dtype(weight.dtype))
            for found in ops.coded_centers(codes, terms, offsets, weight.shape[1], bias is not None)
        )
        center_bias = radius.new_zeros(radius.shape) if bias is None else centers[:, -1].clone()
        centers = torch.cat([centers[:, : weight.shape[1]], radius.unsqueeze(1)], 1)
        return RowPartition(
            offsets,
            rows,
            centers,
            center_bias,
            offsets.diff().sort().values.cumsum(0),
            codes,
            terms,
            *codes_of_centers(centers, center_bias),
        )

    @property
    def lists(self) -> int:
        return self.center_bias.shape[0]

    def probes(self, input: Tensor, count: int, radius_weight: float) -> Tensor:
        """The best ``count`` lists of each input (B, d), best first: int64 (B, count)."""
        weight = input.square().sum(1).add_(1).sqrt_().mul_(radius_weight).float()
        coded = self.center_codes, self.center_terms
        return ops.rank_centers(input, weight, *coded, self.lists, count).T.long()

    def lists_holding(self, k: int) -> int:
        """How many lists hold k rows, whichever they are."""
        return bisect.bisect_left(self._rows_in_smallest, k) + 1

    @functools.cached_property
    def _rows_in_smallest(self) -> list[int]:
        found: list[int] = self.rows_in_smallest.tolist()  # a query is faster than a call of torch
        return found

    def held(self, input: Tensor, rows: Tensor, radius_weight: float) -> tuple[Tensor, Tensor]:
        """What probing so many lists, from 1 on, means for ``input`` (n, d): of its ``rows`` (n, k) the share
        that they hold, and the number of rows that they have, in the mean. Both float64 (lists)."""
        sizes, count = self.offsets.diff(), input.shape[0]
        list_of = torch.empty_like(self.rows, dtype=torch.int64)
        list_of[self.rows.long()] = torch.arange(self.lists).repeat_interleave(sizes)
        found = torch.zeros(self.lists, dtype=torch.int64)
        read = torch.zeros(self.lists, dtype=torch.int64)
        for some, own in zip(input.split(INPUTS_AT_ONCE), rows.split(INPUTS_AT_ONCE), strict=True):
            order = self.probes(some, self.lists, radius_weight)
            place = torch.empty_like(order)
            place.scatter_(1, order, torch.arange(self.lists).expand_as(order))
            found += torch.bincount(place.gather(1, list_of[own]).flatten(), minlength=self.lists)
            read += sizes[order].sum(0)
        return found.cumsum(0) / rows.numel(), read.cumsum(0) / count

    def topk(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        probes: int,
        radius_weight: float,
        rescored: int,
    ) -> tuple[Tensor, Tensor]:
        """The best k (at most N) among the rows of each input's best ``probes`` lists, or of more lists
        where an input's hold fewer than k rows; of these the ``rescored`` best by their codes are scored."""

        search = Search(k, probes, self.lists_holding(k), radius_weight, rescored)
        return self.best(input, weight, bias, search)

    def best(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, search: Search
    ) -> tuple[Tensor, Tensor]:
        """:meth:`topk` by a ``search``, by one operator."""
        return ops.search_lists(
            input,
            weight,
            widened(bias),
            self.offsets,
            self.rows,
            self.codes,
            self.terms,
            self.center_codes,
            self.center_terms,
            search.radius_weight,
            search.probes,
            search.enough,
            search.k,
            max(search.k, search.rescored),
        )

    def memory_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def codes_of_centers(centers: Tensor, center_bias: Tensor) -> tuple[Tensor, Tensor]:
    """What lists are ranked by: ``center_codes`` and ``center_terms`` of a :class:`RowPartition`."""
    means, radius = centers[None, :, :-1].float(), centers[None, :, -1].float()
    return ops.code_centers(means.contiguous(), center_bias[None].float(), radius.contiguous())


def _with_bias(rows: Tensor, bias: Tensor | None) -> Tensor:
    return rows if bias is None else torch.cat([rows, bias.unsqueeze(1)], 1)


def _nearest(points: Tensor, bias: Tensor | None, centers: Tensor) -> Tensor:
    """Index of the center, of length 1, at the smallest angle to each point, int64 (n)."""
    found = []
    for part in blocks(points.shape[0]):
        block = _with_bias(*some_rows(points, bias, part))
        found.append(ops.topk_linear(block, centers, None, 1)[1].flatten())
    return torch.cat(found)


def _lists_of(assigned: Tensor, lists: int) -> tuple[Tensor, Tensor]:
    """Members of each list in increasing order: offsets int64 (lists + 1), rows int32."""
    offsets = torch.zeros(lists + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(assigned, minlength=lists), 0, out=offsets[1:])
    return offsets, assigned.argsort(stable=True).to(torch.int32)
