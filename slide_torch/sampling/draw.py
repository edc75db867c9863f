"""The active set of a batch: labels, candidates from the tables, a random tail."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..active_set import ActiveSet, Labels, SampleActiveSets, SharedActiveSet
from ..randomness import draw_seed
from ..tables import HashTables
from .candidates import find, search
from .negatives import PADDING, with_negatives
from .tail import Tail, draw_tail


def every_neuron(neurons: int, labels: Labels) -> SharedActiveSet:
    """The active set of an exact softmax."""
    return SharedActiveSet(torch.arange(neurons), None, labels.ids, float(neurons), 0)


def draw_active_set(
    tables: HashTables,
    input: Tensor,
    labels: Labels,
    *,
    negatives: Tensor | None = None,
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
        negatives: (B, M), or (1, M) for the whole batch: always active too, padded, all checked.
        weight, bias: of the layer, needed where candidates are re-ranked or exact.
        generator: where the seed of tail and ties comes from; torch's global one if None.
        seed: that seed itself, instead.
    """
    options = tables.options
    neurons = tables.out_features
    if tables.exact:
        return every_neuron(neurons, labels)
    if seed is None:
        seed = draw_seed(generator)
    tail = draw_tail(tables, seed)
    label_ids = labels.ids.to(torch.int32)
    shared = options.pattern == "shared"
    named = label_ids  # active whatever the tables return
    if negatives is not None:
        named = torch.cat([label_ids, negatives[negatives != PADDING].to(torch.int32)])
    if shared and options.budget == 0:
        return _share(named, tail, labels, tables, input.dtype, 0)
    if shared and tables.searches:
        found, searched = search(tables, input, weight, bias, seed)
        best = found[found >= 0].to(torch.int32)
        if options.batch_budget:
            best = _most_retrieved(best, options.batch_budget, neurons)
        return _share(torch.cat([named, best]), tail, labels, tables, input.dtype, searched)
    own_tail = tail.ids[:0] if shared or negatives is not None else tail.ids
    offsets, active, tail_starts, label_positions, ids_read = find(
        tables, input, weight, bias, labels.offsets, label_ids, own_tail, seed
    )
    if shared:
        if options.batch_budget:
            active = _most_retrieved(active, options.batch_budget, neurons)
        if options.batch_budget or negatives is not None:
            active = torch.cat([active, named])
        return _share(active, tail, labels, tables, input.dtype, int(ids_read))
    if negatives is not None:
        offsets, active, tail_starts = with_negatives(offsets, active, negatives, tail.ids, neurons)
    log_weight = None
    if options.correction == "importance":
        log_weight = _log_weight(offsets, active, tail_starts, tail, neurons, input.dtype)
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


def _log_weight(
    offsets: Tensor,
    active: Tensor,
    tail_starts: Tensor,
    tail: Tail,
    neurons: int,
    dtype: torch.dtype,
) -> Tensor:
    """What importance correction adds to the logits of each sample's active set, the tail at its end."""
    lengths = offsets.diff()
    if tail.inclusion is None:
        drawn = lengths - tail_starts
        stands_for = ((neurons - tail_starts).to(dtype) / drawn.clamp(min=1)).log()
        stands_for = stands_for.repeat_interleave(lengths)
    else:
        stands_for = tail.log_weight(active, dtype)
    place = torch.arange(active.shape[0]) - offsets[:-1].repeat_interleave(lengths)
    in_tail = place >= tail_starts.repeat_interleave(lengths)
    return torch.where(in_tail, stands_for, 0)


@torch.no_grad()
def to_look_at(tables: HashTables, weight: Tensor, bias: Tensor | None) -> HashTables:
    """``tables``, or where they have never been built others like them, built without torch's random state:
    looking at what tables return changes no bit of the training that comes after."""
    if tables.family is not None or not tables.uses_tables:
        return tables
    others = HashTables(
        tables.options, tables.out_features, tables.in_features, has_bias=tables.has_bias
    )
    others.tail.frequencies = tables.tail.frequencies
    others.rebuild(weight, bias, generator=torch.Generator().manual_seed(0))
    return others


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
