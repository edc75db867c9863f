"""Hidden layers over active sets, step by step: draw one, go into its neurons, go out of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..active_set import ActiveSet, SampleActiveSets, SharedActiveSet
from ..functional.checks import check_layer, check_leaves
from ..precision import active_rows, widened
from ..sampling.traced_step import draw_for
from ..tables import HashTables


def draw(
    tables: HashTables,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    sparse: bool,
    training: bool,
) -> ActiveSet:
    """The active set of ``input`` (B, d), contiguous: what the tables return, and the tail, without labels.

    In training it counts as a step for the tables, whose active rows are about to change; the seed comes
    from torch's global generator. In eval the seed is always the same (in compiled graphs, which take no
    generator of their own, the global one's).

    Raises:
        ValueError: shape, dtype or device do not fit; nothing has been changed.
    """
    check_layer(input, weight, bias, tables, "LSHLinear")
    if sparse:
        check_leaves(weight, bias, "LSHLinear")
    fixed = not training and not torch.compiler.is_compiling()
    _, active = draw_for(
        tables,
        widened(input),
        weight,
        bias,
        input.new_empty((input.shape[0], 0), dtype=torch.int64),  # lists of no labels
        input.shape[:1],
        None,
        -100,
        training=training,
        sparse=sparse,
        generator=torch.Generator().manual_seed(0) if fixed else None,
        name="LSHLinear",
    )
    return active


def into_active(
    input: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, sparse: bool
) -> Tensor:
    """``input @ weight.T + bias`` for the active neurons of each sample: (U, B) where the batch shares its
    active set, else sample-major (pairs). Differentiable. Of the weight's dtype; bfloat16 is computed in
    float32."""
    own_weight, own_bias, rows, sparse = active_rows(weight, bias, active.rows, sparse)
    layer = (widened(input), own_weight, own_bias, rows)
    if isinstance(active, SharedActiveSet):
        values = ops.shared_linear(*layer, sparse)
    else:
        values = ops.sample_linear(*layer, *_pairs(active), sparse)
    return values.to(weight.dtype)


def out_of_active(values: Tensor, weight: Tensor, active: ActiveSet, *, sparse: bool) -> Tensor:
    """``dense @ weight`` (B, d_out), where ``dense`` (B, N) is :func:`to_dense` of ``values``; ``weight``
    (N, d_out). Differentiable; dtypes as for :func:`into_active`."""
    own_weight, _, rows, sparse = active_rows(weight, None, active.rows, sparse)
    layer = (widened(values).contiguous(), own_weight, rows)
    if isinstance(active, SharedActiveSet):
        output = ops.shared_weighted_rows(*layer, sparse)
    else:
        output = ops.sample_weighted_rows(*layer, *_pairs(active), sparse)
    return output.to(weight.dtype)


def to_dense(values: Tensor, active: ActiveSet, batch: int, neurons: int) -> Tensor:
    """A tensor (batch, neurons) with the ``values`` of :func:`into_active` in their places, zero elsewhere.
    Differentiable."""
    zeros = values.new_zeros((batch, neurons))
    if isinstance(active, SharedActiveSet):
        return zeros.index_copy(1, active.rows, values.T)
    sample = torch.arange(batch).repeat_interleave(
        active.offsets.diff(), output_size=active.active.shape[0]
    )
    return zeros.view(-1).index_copy(0, sample * neurons + active.active, values).view_as(zeros)


def _pairs(active: SampleActiveSets) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        active.offsets,
        active.pair_offsets,
        active.pair_positions,
        active.pair_samples,
    )
