"""Recall of the exact top k, and its cost."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import ResolvedOptions
from ..sampling.candidates import candidates
from ..tables import HashTables

_BLOCK = 64  # inputs looked up together; the median block tells the time


_ROWS_AT_ONCE = 16  # inputs whose logits over all neurons are held together


class Exact:
    """The exact answers for some inputs: the neurons of the k largest logits, and the softmax's normaliser.

    Attributes:
        top: int64 (n, k).
        log_normalizer: (n).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, input: Tensor, k: int) -> None:
        tops, normalizers = [], []
        for some in input.split(_ROWS_AT_ONCE):  # no inputs are one empty part
            logits = F.linear(some, weight, bias)
            tops.append(logits.topk(k, dim=1).indices)
            normalizers.append(logits.logsumexp(1))
        self.top = torch.cat(tops)
        self.log_normalizer = torch.cat(normalizers)


def measure(
    tables: HashTables, weight: Tensor, bias: Tensor | None, input: Tensor, exact: Exact
) -> dict[str, float]:
    """Recall, softmax mass, ids read, rows touched and time of built ``tables`` on ``input`` (n, d), as in
    :class:`Measurement`."""
    options = tables.options
    neurons = weight.shape[0]
    hits = mass = ids = touched = 0.0
    times = []
    for first in range(0, input.shape[0], _BLOCK):
        some = input[first : first + _BLOCK]
        started = time.perf_counter()
        found = candidates(tables, weight, bias, some)
        times.append((time.perf_counter() - started) / some.shape[0])
        assert found is not None  # not every neuron is active
        offsets, active = found
        sample = torch.arange(some.shape[0]).repeat_interleave(offsets.diff())
        top = exact.top[first : first + _BLOCK]
        wanted = torch.arange(some.shape[0]).unsqueeze(1) * neurons + top
        hits += torch.isin(wanted, sample * neurons + active).float().mean(1).sum().item()
        logits = (weight[active] * some[sample]).sum(1)
        if bias is not None:
            logits += bias[active]
        mass += (logits - exact.log_normalizer[first + sample]).exp().sum().item()
        ids += ids_read(tables, some)
        if options.rerank:
            by_counts = dataclasses.replace(
                options, budget=min(options.rerank, neurons - 1), rerank=0
            )
            scored = candidates(tables.read_with(by_counts), weight, bias, some)
            assert scored is not None
            active = scored[1]
        touched += active.shape[0]
    n = input.shape[0]
    return {
        "recall": hits / n,
        "softmax_mass": mass / n,
        "ids_read": ids / n,
        "rows_touched": touched / n,
        "us_query": statistics.median(times) * 1e6,
    }


def build(
    options: ResolvedOptions, weight: Tensor, bias: Tensor | None, generator: torch.Generator
) -> tuple[HashTables, float, float]:
    """Tables over the rows, and the seconds of their build and of a rehash of all rows."""
    tables = HashTables(options, *weight.shape, has_bias=bias is not None)
    tables.rebuild(weight, bias, generator=generator)
    built = tables.upkeep_seconds
    tables.rehash(weight, bias)
    return tables, built, tables.upkeep_seconds - built


def ids_read(tables: HashTables, input: Tensor) -> int:
    """Lengths of all the buckets of all inputs, each up to the cap."""
    options = tables.options
    assert tables.family is not None and tables.offsets is not None
    codes = tables.family.query_codes(input, options.probes).long()
    lengths = tables.offsets.diff(dim=1).repeat_interleave(options.probes, dim=0)
    read = lengths.gather(1, codes.clamp(min=0)).clamp(max=options.bucket_cap)
    return int(read[codes >= 0].sum())
