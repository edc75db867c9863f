"""Candidates: what the tables return for an input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..active_set import Labels
from ..precision import topk_linear, widened
from ..tables import HashTables

# Rows scored exactly for each one wanted of a search, whose first look is at rounded rows.
_RESCORED = 2


def candidates(
    tables: HashTables, weight: Tensor, bias: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What the tables return for ``input`` (B, d) within the budget, without labels or tail: offsets
    int64 (B + 1) into ids int64 (pairs); None if every neuron is active. Builds the tables if need be."""
    if tables.exact:
        return None
    if tables.uses_tables:
        tables.maintain(weight, bias, advance=False, all_rows_move=False)
    if tables.searches:
        found, _ = search(tables, input, weight, bias, seed=0)
        given = found >= 0
        offsets = torch.zeros(input.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(given.sum(1), 0, out=offsets[1:])
        return offsets, found[given]
    labels = Labels.none(input.shape[0], input.dtype)
    none = torch.empty(0, dtype=torch.int32)
    offsets, active, *_ = find(tables, input, weight, bias, labels.offsets, none, none, seed=0)
    return offsets, active.to(torch.int64)


def search(
    tables: HashTables, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: int
) -> tuple[Tensor, int]:
    """The best of what each input's buckets hold, int64 (B, budget), the largest logit first and -1 where
    there are fewer, and how many ids the buckets have for all inputs."""
    options = tables.options
    built = tables.require_built()
    assert weight is not None and built.sq8 is not None
    probes = built.family.query_codes(input, options.probes).T.long().contiguous()
    offsets = built.offsets[0].long()
    _, found = ops.topk_lists(
        input.detach().contiguous(),
        weight.detach(),
        None if bias is None else widened(bias.detach()),
        offsets,
        built.ids[0],
        built.sq8.codes,
        built.sq8.terms,
        probes,
        options.budget,
        _RESCORED * options.budget,
        options.bucket_cap,
        seed,
    )
    lengths = F.pad(offsets.diff().clamp_(max=options.bucket_cap), (0, 1))  # 0 for -1, the last
    return found, int(lengths[probes].sum())


def no_tables(batch: int, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, offsets and ids of no tables, as ``ops.retrieve`` takes them."""
    return (
        torch.empty((0, batch), dtype=torch.int16),
        torch.empty((0, 2), dtype=torch.int32),
        torch.empty((0, neurons), dtype=torch.int32),
    )


def find(
    tables: HashTables,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    label_offsets: Tensor,
    label_ids: Tensor,
    tail: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = tables.options
    if options.family == "exact" and options.budget > 0:
        assert weight is not None
        return _best(input, weight, bias, label_offsets, label_ids, tail, options.budget)
    rerank = options.rerank if options.budget > 0 else 0
    if options.budget == 0:  # no tables to ask
        codes, table_offsets, table_ids = no_tables(input.shape[0], tables.out_features)
    else:
        built = tables.require_built()
        codes = built.family.query_codes(input, options.probes)
        table_offsets, table_ids = built.offsets, built.ids
    offsets, active, tail_starts, label_positions, ids_read = ops.retrieve(
        codes,
        table_offsets,
        table_ids,
        label_offsets,
        label_ids,
        tail[:0] if rerank else tail,
        rerank or options.budget,
        options.bucket_cap,
        seed,
    )
    if rerank:
        assert weight is not None
        offsets, active, tail_starts = ops.rerank(
            offsets,
            active,
            label_offsets,
            label_positions,
            tail,
            input.detach().contiguous(),
            weight.detach(),
            None if bias is None else widened(bias.detach()),
            options.budget,
        )
    return offsets, active, tail_starts, label_positions, ids_read


def _best(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label_offsets: Tensor,
    label_ids: Tensor,
    tail: Tensor,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`find`, with the largest logits as candidates."""
    input, weight = input.detach().contiguous(), weight.detach()
    bias = None if bias is None else widened(bias.detach())
    batch, neurons = input.shape[0], weight.shape[0]
    offsets, active, _, label_positions, ids_read = ops.retrieve(
        *no_tables(batch, neurons),
        label_offsets,
        label_ids,
        tail[:0],
        0,
        0,
        0,
    )
    found = topk_linear(input, weight, bias, budget)[1]
    sample, lengths = torch.arange(batch), offsets.diff()
    sample_of_label = sample.repeat_interleave(lengths)
    fresh = ~torch.isin(sample.unsqueeze(1) * neurons + found, sample_of_label * neurons + active)
    both = torch.zeros(batch + 1, dtype=torch.int64)
    torch.cumsum(lengths + fresh.sum(1), 0, out=both[1:])
    merged = torch.empty(int(both[-1]), dtype=torch.int32)
    shift = (both - offsets)[:-1]
    merged[torch.arange(active.shape[0]) + shift[sample_of_label]] = active
    places = (both[:-1] + lengths).unsqueeze(1) + fresh.cumsum(1) - 1
    merged[places[fresh]] = found[fresh].to(torch.int32)
    offsets, active, tail_starts = ops.rerank(
        both, merged, label_offsets, label_positions, tail, input, weight, bias, budget
    )
    return offsets, active, tail_starts, label_positions, ids_read
