"""What makes an active set: labels, candidates from the tables, a uniform tail."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .tables import HashTables, draw_seed


@dataclass(frozen=True)
class Labels:
    """Targets as CSR over samples.

    Attributes:
        offsets: int64 (B + 1), where each sample's labels begin.
        ids: int64 (labels), classes in [0, N).
        probabilities: (labels), each label's share of its sample's target.
    """

    offsets: Tensor
    ids: Tensor
    probabilities: Tensor

    @staticmethod
    def none(batch: int, dtype: torch.dtype) -> Labels:
        """No labels for any sample: only candidates and tail are active."""
        return Labels(
            torch.zeros(batch + 1, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=dtype),
        )


@dataclass(frozen=True)
class SharedActiveSet:
    """One active set for the whole batch.

    Attributes:
        rows: int64 (U), increasing.
        log_weight: (U), what importance correction adds to the logits, or None.
        label_places: int64 (labels), each label's place in ``rows``.
        active_per_sample: mean number of neurons that a sample computes.
        ids_read: neurons read from buckets, for all samples together.
    """

    rows: Tensor
    log_weight: Tensor | None
    label_places: Tensor
    active_per_sample: float
    ids_read: int


@dataclass(frozen=True)
class SampleActiveSets:
    """One active set a sample, and its transpose (see :func:`slide_torch.ops.transpose_active`).

    ``offsets`` int64 (B + 1) and ``active`` int32 (pairs) are sample-major; ``log_weight`` (pairs) or
    None and ``label_places`` int64 (labels) refer to that order. The rest is neuron-major.
    """

    rows: Tensor
    offsets: Tensor
    active: Tensor
    pair_offsets: Tensor
    pair_positions: Tensor
    pair_samples: Tensor
    log_weight: Tensor | None
    label_places: Tensor
    active_per_sample: float
    ids_read: int


ActiveSet = SharedActiveSet | SampleActiveSets


def every_neuron(neurons: int, labels: Labels) -> SharedActiveSet:
    """The active set of an exact softmax."""
    return SharedActiveSet(torch.arange(neurons), None, labels.ids, float(neurons), 0)


def draw_active_set(
    tables: HashTables,
    input: Tensor,
    labels: Labels,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> ActiveSet:
    """The active set of a batch, in the pattern that ``tables.options`` names.

    Args:
        tables: built, unless its budget is 0.
        input: (B, d).
        labels: always active.
        weight, bias: of the layer, needed where ``tables.options.rerank`` is not 0.
        generator: where the seed of tail and ties comes from; torch's global one if None.
        seed: that seed itself, instead.
    """
    options = tables.options
    neurons = tables.out_features
    assert isinstance(options.tail, int)
    if tables.exact:
        return every_neuron(neurons, labels)
    if seed is None:
        seed = draw_seed(generator)
    tail = ops.sample_tail(options.tail, neurons, seed)
    label_ids = labels.ids.to(torch.int32)
    shared = options.pattern == "shared"
    if shared and options.budget == 0:
        return _share(label_ids, tail, labels, tables, input.dtype, 0)
    offsets, active, tail_starts, label_positions, ids_read = _retrieve(
        tables, input, weight, bias, labels.offsets, label_ids, tail[:0] if shared else tail, seed
    )
    if shared:
        if options.batch_budget:
            kept = _most_retrieved(active, options.batch_budget, neurons)  # type: ignore[arg-type]
            active = torch.cat([kept, label_ids])
        return _share(active, tail, labels, tables, input.dtype, int(ids_read))
    lengths = offsets.diff()
    log_weight = None
    if options.correction == "importance":
        drawn = lengths - tail_starts
        stands_for = ((neurons - tail_starts).to(input.dtype) / drawn.clamp(min=1)).log()
        place = torch.arange(active.shape[0]) - offsets[:-1].repeat_interleave(lengths)
        in_tail = place >= tail_starts.repeat_interleave(lengths)
        log_weight = torch.where(in_tail, stands_for.repeat_interleave(lengths), 0)
    starts = offsets[:-1].repeat_interleave(labels.offsets.diff())
    rows, pair_offsets, pair_positions, pair_samples = ops.transpose_active(
        offsets, active, neurons
    )
    return SampleActiveSets(
        rows,
        offsets,
        active,
        pair_offsets,
        pair_positions,
        pair_samples,
        log_weight,
        starts + label_positions,
        active.shape[0] / max(1, input.shape[0]),
        int(ids_read),
    )


def candidates(
    tables: HashTables, weight: Tensor, bias: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What the tables return for ``input`` (B, d) within the budget, without labels or tail: offsets
    int64 (B + 1) into ids int64 (pairs); None if every neuron is active. Builds the tables if need be."""
    if tables.exact:
        return None
    if tables.uses_tables:
        tables.maintain(weight, bias, advance=False, all_rows_move=False)
    labels = Labels.none(input.shape[0], input.dtype)
    none = torch.empty(0, dtype=torch.int32)
    offsets, active, *_ = _retrieve(tables, input, weight, bias, labels.offsets, none, none, seed=0)
    return offsets, active.to(torch.int64)


def _retrieve(
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
    assert isinstance(options.budget, int) and isinstance(options.bucket_cap, int)
    assert isinstance(options.probes, int) and isinstance(options.rerank, int)
    rerank = options.rerank if options.budget > 0 else 0
    if options.budget == 0:  # no tables to ask
        codes = torch.empty((0, input.shape[0]), dtype=torch.int16)
        table_offsets = torch.empty((0, 2), dtype=torch.int32)
        table_ids = torch.empty((0, tables.out_features), dtype=torch.int32)
    else:
        assert tables.family is not None and tables.offsets is not None and tables.ids is not None
        codes = tables.family.query_codes(input, options.probes)
        table_offsets, table_ids = tables.offsets, tables.ids
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
            None if bias is None else bias.detach(),
            options.budget,
        )
    return offsets, active, tail_starts, label_positions, ids_read


def _most_retrieved(active: Tensor, count: int, neurons: int) -> Tensor:
    """The ``count`` ids that stand most often in ``active`` (int32), equal ones by smaller id."""
    times = torch.bincount(active, minlength=neurons)
    # no two keys are equal, so that the choice is the same wherever topk begins
    keys = times * neurons + torch.arange(neurons - 1, -1, -1)
    found = min(count, int((times > 0).sum()))
    return keys.topk(found, sorted=False).indices.to(torch.int32)


def _share(
    certain: Tensor,
    tail: Tensor,
    labels: Labels,
    tables: HashTables,
    dtype: torch.dtype,
    ids_read: int,
) -> SharedActiveSet:
    neurons = tables.out_features
    rows, from_tail = ops.union_active(certain, tail, neurons)
    log_weight = None
    if tables.options.correction == "importance":
        drawn = int(from_tail.sum())
        included = rows.shape[0] - drawn
        weight = torch.tensor((neurons - included) / max(1, drawn), dtype=dtype).log()
        log_weight = torch.where(from_tail, weight, 0)
    places = torch.searchsorted(rows, labels.ids)
    return SharedActiveSet(rows, log_weight, places, float(rows.shape[0]), ids_read)
