"""What the tables of one setting find, and its cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import ResolvedOptions
from ..sampling.candidates import candidates
from ..sampling.recall import Exact, found_among, softmax_mass
from ..tables import HashTables

_BLOCK = 64  # inputs looked up together; the median block gives the time


def measure(
    tables: HashTables, weight: Tensor, bias: Tensor | None, input: Tensor, exact: Exact
) -> dict[str, float]:
    """Recall, softmax mass, ids read, rows touched and time of built ``tables`` on ``input`` (n, d), as in
    :class:`Measurement`."""
    options = tables.options
    hits = mass = ids = touched = 0.0
    times = []
    for first in range(0, input.shape[0], _BLOCK):
        block = slice(first, first + _BLOCK)
        some = input[block]
        started = time.perf_counter()
        found = candidates(tables, weight, bias, some)
        times.append((time.perf_counter() - started) / some.shape[0])
        assert found is not None  # tune refuses options with every neuron active
        hits += found_among(exact.top[block], *found, weight.shape[0]).float().mean(1).sum().item()
        mass += softmax_mass(weight, bias, some, exact.log_normalizer[block], *found).sum().item()
        ids += ids_read(tables, some)
        touched += _rows_scored(tables, weight, bias, some) if options.rerank else len(found[1])
    n = input.shape[0]
    return {
        "recall": hits / n,
        "softmax_mass": mass / n,
        "ids_read": ids / n,
        "rows_touched": touched / n,
        "us_query": statistics.median(times) * 1e6,
    }


def _rows_scored(tables: HashTables, weight: Tensor, bias: Tensor | None, input: Tensor) -> int:
    """How many rows re-ranking scores for ``input`` (n, d)."""
    options = tables.options
    budget = min(options.rerank, weight.shape[0] - 1)
    by_counts = dataclasses.replace(options, budget=budget, rerank=0)
    found = candidates(tables.read_with(by_counts), weight, bias, input)
    assert found is not None
    return len(found[1])


class BuiltTables(NamedTuple):
    """Tables, and the seconds that their build and a rehash of all rows took."""

    tables: HashTables
    build_seconds: float
    rehash_seconds: float


def build(
    options: ResolvedOptions, weight: Tensor, bias: Tensor | None, generator: torch.Generator
) -> BuiltTables:
    """Tables over the rows of ``weight``, rehashed once."""
    tables = HashTables(options, *weight.shape, has_bias=bias is not None)
    tables.rebuild(weight, bias, generator=generator)
    build_seconds = tables.schedule.upkeep_seconds
    tables.rehash(weight, bias)
    return BuiltTables(tables, build_seconds, tables.schedule.upkeep_seconds - build_seconds)


def ids_read(tables: HashTables, input: Tensor) -> int:
    """The ids in the buckets of all inputs together, of each bucket at most the cap."""
    options = tables.options
    assert tables.family is not None and tables.offsets is not None
    codes = tables.family.query_codes(input, options.probes).long()
    lengths = tables.offsets.diff(dim=1).repeat_interleave(options.probes, dim=0)
    read = lengths.gather(1, codes.clamp(min=0)).clamp(max=options.bucket_cap)
    return int(read[codes >= 0].sum())
