"""Tables of a layer that gains or loses rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference_mode import keeps_normal_tensors
from ..options import LSHOptions
from .built_tables import BuiltTables, finite_codes
from .hash_tables import HashTables
from .saved_state import same_functions
from .schedule import drift_sample


@keeps_normal_tensors
@torch.no_grad()
def resized(
    tables: HashTables, options: LSHOptions, kept: Tensor, weight: Tensor, bias: Tensor | None
) -> HashTables:
    """What ``tables`` are to :meth:`~HashTables.become`, which do not change here, over a ``weight`` (N, d)
    and ``bias`` (N) whose first rows are the rows ``kept`` (int64, increasing) of the old ones.

    ``options`` are resolved for N. Where that leaves the hash functions alone, they stay, and so do the codes
    of rows: only added rows are hashed. Else new functions are drawn at the next use.

    Raises:
        ValueError: the options do not fit N, or added rows hold NaN or Inf.
    """
    neurons = weight.shape[0]
    found = HashTables(options, neurons, tables.in_features, has_bias=tables.has_bias)
    found.schedule.take_up(tables.schedule.counters(), None)
    found.last_step = dict(tables.last_step)
    shares = tables.tail.frequencies
    if shares is not None:
        added = shares.min().expand(neurons - len(kept))
        found.tail.frequencies = torch.cat([shares[kept], added])
    family = tables.family
    if family is None or not found.uses_tables or not same_functions(tables.options, found.options):
        return found
    found.family = family.copied()
    if tables.built:
        with found.schedule.upkeep():
            built = _resized_buckets(tables.require_built(), found, kept, weight, bias)
        found.install(built)
        if tables.schedule.drift_sample_codes is not None:
            sample = drift_sample(found.family, neurons)
            found.schedule.drift_sample_codes = built.codes[:, sample]
    return found


def _resized_buckets(
    old: BuiltTables, tables: HashTables, kept: Tensor, weight: Tensor, bias: Tensor | None
) -> BuiltTables:
    assert tables.family is not None
    added = torch.arange(len(kept), weight.shape[0])
    fresh = finite_codes(tables.family.row_codes(weight, bias, added), added)
    codes = torch.cat([old.codes[:, kept], fresh], 1)
    dirty = torch.cat([old.dirty[kept], torch.zeros(len(added), dtype=torch.bool)])
    built = BuiltTables.of_codes(tables.family, codes, None)._replace(dirty=dirty)
    return built.described(weight, bias, searched=tables.searches)
