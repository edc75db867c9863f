"""Hidden layers over active sets, step by step: draw a set, compute its neurons, go on from them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..active_set import ActiveSet, SharedActiveSet
from ..functional.checks import check_layer, check_leaves
from ..precision import active_layer, widened
from ..sampling import traced_step
from ..sampling.step import StepRequest
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
    _, active = traced_step.draw(
        StepRequest.of(
            "LSHLinear",
            tables,
            widened(input),
            weight,
            bias,
            training=training,
            sparse=sparse,
            generator=torch.Generator().manual_seed(0) if fixed else None,
        )
    )
    return active


def into_active(
    input: Tensor, weight: Tensor, bias: Tensor | None, active: ActiveSet, *, sparse: bool
) -> Tensor:
    """``input @ weight.T + bias`` for the active neurons of each sample: (U, B) where the batch shares its
    active set, else sample-major (pairs). Differentiable. Of the weight's dtype; bfloat16 is computed in
    float32."""
    layer = active_layer(weight, bias, active.rows, sparse)
    values = ops.into_active(widened(input), layer, active)
    return values.to(weight.dtype)


def out_of_active(values: Tensor, weight: Tensor, active: ActiveSet, *, sparse: bool) -> Tensor:
    """``dense @ weight`` (B, d_out), where ``dense`` (B, N) is :func:`to_dense` of ``values``; ``weight``
    (N, d_out). Differentiable; dtypes as for :func:`into_active`."""
    layer = active_layer(weight, None, active.rows, sparse)
    output = ops.out_of_active(widened(values).contiguous(), layer, active)
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
