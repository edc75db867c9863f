"""The logits of active neurons where no labels are given: tables and tail alone choose the neurons."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..active_set import ActiveSet, Labels, SampleActiveSets
from ..functional.exclusion import Excluded
from ..inference_mode import version_of
from ..precision import active_layer, widened
from ..sampling.draw import draw_active_set, to_look_at
from ..sampling.negatives import padded_lists
from .forward_call import ForwardCall, joined


@torch.compiler.disable  # every step of it depends on data
def active_logits(
    call: ForwardCall, graph: Tensor | None, *, with_graph: bool, trains: bool
) -> tuple[Tensor, Tensor]:
    """Active rows (U) and their logits (B, U), -inf where a row is not active for a sample.

    Args:
        graph: the stand-in of the call in the autograd graph.
        with_graph: whether gradients flow.
        trains: whether a loss may be computed from them.
    """
    tables, sparse = call.tables, call.sparse
    input, weight, bias = call.tensors("SampledLogits", with_graph=with_graph)
    flat = widened(input.reshape(-1, input.shape[-1])).contiguous()
    moving = trains and torch.is_grad_enabled() and weight.requires_grad
    negatives = call.negatives
    if negatives is not None:
        negatives = padded_lists(
            negatives,
            input.shape[:-1],
            call.out_features,
            "SampledLogits",
            "negatives",
            whole_batch=True,
        )
    labels = Labels.none(flat.shape[0], flat.dtype)
    excluded = None
    if call.exclude is not None:
        excluded = Excluded.of(
            "SampledLogits", call.exclude, labels, input.shape[:-1], call.out_features
        )
    tables.check_tail("SampledLogits")
    if not trains:
        tables = to_look_at(tables, weight, bias)
    if tables.uses_tables:
        tables.maintain(weight, bias, advance=moving, all_rows_move=not sparse)
    active = draw_active_set(
        tables,
        flat,
        labels,
        negatives=negatives,
        weight=weight,
        bias=bias,
        seed=None if trains else 0,
    )
    if moving:
        tables.mark_dirty(active.rows, version_of(weight))
    weight, bias, rows, sparse = active_layer(weight, bias, active.rows, sparse)
    weight = F.embedding(rows, weight, sparse=sparse)
    with torch.autocast("cpu", enabled=False):
        values = flat @ weight.T
    if bias is not None:
        values = values + bias.gather(0, rows, sparse_grad=sparse)
    values, log_weight = _of_each_sample(joined(values * call.scale, graph), active)
    if excluded is not None:
        values = values.masked_fill(_mask(excluded, active.rows, values), -math.inf)
    if call.normalised:
        weighted = values if log_weight is None else values + log_weight
        values = values - weighted.logsumexp(1, keepdim=True)
    return active.rows, values


def _mask(excluded: Excluded, rows: Tensor, values: Tensor) -> Tensor:
    """Which of the ``values`` (B, U) of active ``rows`` (U) are of excluded neurons."""
    mask = torch.zeros(values.shape, dtype=torch.bool)
    found = torch.isin(excluded.ids, rows)
    mask[excluded.sample[found], torch.searchsorted(rows, excluded.ids[found])] = True
    return mask


def _of_each_sample(values: Tensor, active: ActiveSet) -> tuple[Tensor, Tensor | None]:
    """Logits (B, U), -inf where a row is not active for a sample, and what importance correction adds."""
    log_weight = active.log_weight
    if not isinstance(active, SampleActiveSets):
        return values, log_weight
    owns = torch.zeros(values.shape, dtype=torch.bool)
    place = torch.searchsorted(active.rows, active.active.to(torch.int64))
    sample = torch.arange(values.shape[0]).repeat_interleave(active.offsets.diff())
    owns[sample, place] = True
    values = values.masked_fill(~owns, -math.inf)
    if log_weight is not None:
        log_weight = torch.zeros_like(values).index_put((sample, place), log_weight)
    return values, log_weight
