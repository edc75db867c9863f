"""What makes an active set: labels, candidates from the tables, a random tail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import ops
from .bfloat16 import topk_linear, widened
from .proposals import QUERIES
from .tables import HashTables, draw_seed

# Rows scored exactly for each one wanted of a search, whose first look is at rounded rows.
_RESCORED = 2


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


@dataclass(frozen=True)
class Tail:
    """What was drawn at random.

    Attributes:
        ids: int32 (n), increasing.
        inclusion: float64 (n), each one's probability to be in the tail; None where every set of n classes
            was as likely as any other: then that of those outside the certain part follows from how
            many of them there are and were drawn.
    """

    ids: Tensor
    inclusion: Tensor | None

    def log_weight(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """-log(inclusion) of ``ids``; of those that are not in the tail, any number."""
        assert self.inclusion is not None
        # numpy runs on one thread: torch's logarithm rounds by how threads share the work
        own = torch.from_numpy(-np.log(self.inclusion.numpy())).to(dtype)
        if own.numel() == 0:
            return torch.zeros(ids.shape, dtype=dtype)
        places = torch.searchsorted(self.ids, ids.to(torch.int32))
        return own[places.clamp_(max=own.shape[0] - 1)]


def draw_tail(
    tables: HashTables, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: int
) -> Tail:
    """The tail of a batch ``input`` (B, d), from the distributions that ``tables.options`` names."""
    count, parts = tables.options.tail, tables.options.tail_parts
    assert isinstance(count, int)
    if parts == ("uniform",):
        return Tail(ops.sample_tail(count, tables.out_features, seed), None)
    if not tables.uses_kernel:
        fixed = tables.fixed_proposal(count)
        ids = fixed.draw(seed)
        return Tail(ids, fixed.inclusion[ids.long()])
    assert weight is not None and tables.kernel_sums is not None
    own = count // len(parts)
    ids, inclusion = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.float64)
    if own < count:
        fixed = tables.fixed_proposal(count - own)
        ids = fixed.draw(seed)
        inclusion = fixed.inclusion
    # the samples that the kernel's distribution is the mean over
    batch = input.shape[0]
    asking = ops.sample_tail(min(QUERIES, batch), max(1, batch), seed ^ 4).long()
    drawn, of_drawn, of_fixed = ops.kernel_draw(
        tables.kernel_sums,
        weight.detach(),
        None if bias is None else widened(bias.detach()),
        input.detach()[asking].contiguous(),
        float(tables.options.kernel_alpha),
        own,
        ids,
        seed ^ 3,
    )
    if own == count:
        return Tail(drawn, of_drawn)
    both, place = torch.cat([ids, drawn]).unique(return_inverse=True)
    of_kernel = torch.empty(both.shape, dtype=torch.float64)
    of_kernel[place] = torch.cat([of_fixed, of_drawn])
    return Tail(both, 1 - (1 - inclusion[both.long()]) * (1 - of_kernel))


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
        input: (B, d), of the dtype that is computed in.
        labels: always active.
        weight, bias: of the layer, needed where candidates are re-ranked or exact, or the tail is drawn from
            the quadratic kernel.
        generator: where the seed of tail and ties comes from; torch's global one if None.
        seed: that seed itself, instead.
    """
    options = tables.options
    neurons = tables.out_features
    if tables.exact:
        return every_neuron(neurons, labels)
    if seed is None:
        seed = draw_seed(generator)
    tail = draw_tail(tables, input, weight, bias, seed)
    label_ids = labels.ids.to(torch.int32)
    shared = options.pattern == "shared"
    if shared and options.budget == 0:
        return _share(label_ids, tail, labels, tables, input.dtype, 0)
    if shared and tables.searches:
        _, best, searched = _search(tables, input, weight, bias, seed)
        if options.batch_budget:
            best = _most_retrieved(best, options.batch_budget, neurons)  # type: ignore[arg-type]
        certain = torch.cat([label_ids, best])
        return _share(certain, tail, labels, tables, input.dtype, searched)
    own_tail = tail.ids[:0] if shared else tail.ids
    offsets, active, tail_starts, label_positions, ids_read = _retrieve(
        tables, input, weight, bias, labels.offsets, label_ids, own_tail, seed
    )
    if shared:
        if options.batch_budget:
            kept = _most_retrieved(active, options.batch_budget, neurons)  # type: ignore[arg-type]
            active = torch.cat([kept, label_ids])
        return _share(active, tail, labels, tables, input.dtype, int(ids_read))
    lengths = offsets.diff()
    log_weight = None
    if options.correction == "importance":
        if tail.inclusion is None:
            drawn = lengths - tail_starts
            stands_for = ((neurons - tail_starts).to(input.dtype) / drawn.clamp(min=1)).log()
            stands_for = stands_for.repeat_interleave(lengths)
        else:
            stands_for = tail.log_weight(active, input.dtype)
        place = torch.arange(active.shape[0]) - offsets[:-1].repeat_interleave(lengths)
        in_tail = place >= tail_starts.repeat_interleave(lengths)
        log_weight = torch.where(in_tail, stands_for, 0)
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
    if tables.searches:
        offsets, active, _ = _search(tables, input, weight, bias, seed=0)
        return offsets, active.to(torch.int64)
    labels = Labels.none(input.shape[0], input.dtype)
    none = torch.empty(0, dtype=torch.int32)
    offsets, active, *_ = _retrieve(tables, input, weight, bias, labels.offsets, none, none, seed=0)
    return offsets, active.to(torch.int64)


@torch.no_grad()
def to_look_at(tables: HashTables, weight: Tensor, bias: Tensor | None) -> HashTables:
    """``tables``, or where they have never been built others like them, built without torch's random state:
    looking at what tables return changes no bit of the training that comes after."""
    if tables.family is not None or not tables.uses_tables:
        return tables
    others = HashTables(
        tables.options, tables.out_features, tables.in_features, has_bias=tables.has_bias
    )
    others.frequencies = tables.frequencies
    others.rebuild(weight, bias, generator=torch.Generator().manual_seed(0))
    return others


def _search(
    tables: HashTables, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, int]:
    """The best of what each input's buckets hold: offsets int64 (B + 1) into ids int32 (pairs), the largest
    logit first, and how many ids the buckets have for all inputs."""
    options = tables.options
    assert isinstance(options.budget, int) and isinstance(options.bucket_cap, int)
    assert isinstance(options.probes, int) and weight is not None
    assert tables.family is not None and tables.offsets is not None and tables.ids is not None
    assert tables.row_codes is not None and tables.row_terms is not None
    probes = tables.family.query_codes(input, options.probes).T.long().contiguous()
    offsets = tables.offsets[0].long()
    _, found = ops.topk_lists(
        input.detach().contiguous(),
        weight.detach(),
        None if bias is None else widened(bias.detach()),
        offsets,
        tables.ids[0],
        tables.row_codes,
        tables.row_terms,
        probes,
        options.budget,
        _RESCORED * options.budget,
        options.bucket_cap,
        seed,
    )
    read = offsets.diff().clamp_(max=options.bucket_cap)[probes].masked_fill_(probes < 0, 0).sum()
    given = found >= 0
    starts = torch.zeros(input.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(given.sum(1), 0, out=starts[1:])
    return starts, found[given].to(torch.int32), int(read)


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
    if options.family == "exact" and options.budget > 0:
        assert weight is not None
        return _best(input, weight, bias, label_offsets, label_ids, tail, options.budget)
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
    """As :func:`_retrieve`, with the largest logits as candidates."""
    input, weight = input.detach().contiguous(), weight.detach()
    bias = None if bias is None else widened(bias.detach())
    batch, neurons = input.shape[0], weight.shape[0]
    offsets, active, _, label_positions, ids_read = ops.retrieve(
        torch.empty((0, batch), dtype=torch.int16),
        torch.empty((0, 2), dtype=torch.int32),
        torch.empty((0, neurons), dtype=torch.int32),
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


def _most_retrieved(active: Tensor, count: int, neurons: int) -> Tensor:
    """The ``count`` ids that stand most often in ``active`` (int32), equal ones by smaller id."""
    times = torch.bincount(active, minlength=neurons)
    # no two keys are equal, so that the choice is the same wherever topk begins
    keys = times * neurons + torch.arange(neurons - 1, -1, -1)
    found = min(count, int((times > 0).sum()))
    return keys.topk(found, sorted=False).indices.to(torch.int32)


def _share(
    certain: Tensor,
    tail: Tail,
    labels: Labels,
    tables: HashTables,
    dtype: torch.dtype,
    ids_read: int,
) -> SharedActiveSet:
    neurons = tables.out_features
    rows, from_tail = ops.union_active(certain, tail.ids, neurons)
    log_weight = None
    if tables.options.correction == "none":
        pass
    elif tail.inclusion is not None:
        log_weight = torch.where(from_tail, tail.log_weight(rows, dtype), 0)
    else:
        drawn = int(from_tail.sum())
        included = rows.shape[0] - drawn
        weight = torch.tensor((neurons - included) / max(1, drawn), dtype=dtype).log()
        log_weight = torch.where(from_tail, weight, 0)
    places = torch.searchsorted(rows, labels.ids)
    return SharedActiveSet(rows, log_weight, places, float(rows.shape[0]), ids_read)
