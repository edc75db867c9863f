"""The draw of an active set as one operator, so that ``torch.compile`` traces a loss in one graph.

Upkeep and sampling are Python whose every step depends on data. Compiled graphs call it as a whole: it
takes and gives tensors, finds the tables by their handle, and draws from torch's global generator just as
in eager mode, so that losses and gradients are those of eager mode, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional
from .sampling import ActiveSet, Labels, SampleActiveSets, SharedActiveSet
from .tables import HashTables

torch.library.define(
    "slide_torch::draw_step",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor target, int[] leading, Tensor? class_weight, "
    "int ignore_index, bool moving, bool sparse, int tables) -> Tensor[]",
    # it draws random numbers: two equal calls are not one, and none is moved before another
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def draw_step(
    tables: HashTables,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    leading: torch.Size,
    weight: Tensor | None,
    ignore_index: int,
    *,
    moving: bool,
    sparse: bool,
    generator: None,
) -> tuple[Labels, ActiveSet]:
    """As :func:`slide_torch.functional.draw_step`, for tracing; statistics stay in the tables."""
    found = torch.ops.slide_torch.draw_step(
        input,
        linear_weight,
        linear_bias,
        target,
        leading,
        weight,
        ignore_index,
        moving,
        sparse,
        tables.handle,
    )
    label_offsets, label_ids, probabilities, label_places, *rest = found
    labels = Labels(label_offsets, label_ids, probabilities)
    log_weight = rest.pop() if _has_log_weight(tables) else None
    # what the step counted is in tables.stats() already
    kind = SharedActiveSet if _is_shared(tables) else SampleActiveSets
    return labels, kind(
        *rest,
        log_weight=log_weight,
        label_places=label_places,
        active_per_sample=0.0,
        ids_read=0,
    )


def _is_shared(tables: HashTables) -> bool:
    return tables.exact or tables.options.pattern == "shared"


def _has_log_weight(tables: HashTables) -> bool:
    return not tables.exact and tables.options.correction == "importance"


@torch.library.impl("slide_torch::draw_step", "CPU")
def _draw_step(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    leading: list[int],
    class_weight: Tensor | None,
    ignore_index: int,
    moving: bool,
    sparse: bool,
    handle: int,
) -> list[Tensor]:
    labels, active = functional.draw_step(
        HashTables.of_handle(handle),
        input,
        weight,
        bias,
        target,
        torch.Size(leading),
        class_weight,
        ignore_index,
        moving=moving,
        sparse=sparse,
        generator=None,
    )
    # The graph may reuse the memory of what it is given, so it gets nothing that the tables keep (rows),
    # nor one tensor twice (ids and places, where every neuron is active).
    tensors = [labels.offsets, labels.ids.clone(), labels.probabilities, active.label_places]
    tensors.append(active.rows.clone())
    if isinstance(active, SampleActiveSets):
        tensors += [active.offsets, active.active]
        tensors += [active.pair_offsets, active.pair_positions, active.pair_samples]
    if active.log_weight is not None:
        tensors.append(active.log_weight)
    return tensors


@torch.library.register_fake("slide_torch::draw_step")
def _(
    input: Any,
    weight: Any,
    bias: Any,
    target: Any,
    leading: Any,
    class_weight: Any,
    ignore_index: Any,
    moving: Any,
    sparse: Any,
    handle: Any,
) -> Any:
    tables = HashTables.of_handle(handle)
    context = torch.library.get_ctx()
    labels, rows = context.new_dynamic_size(), context.new_dynamic_size()

    def made(size: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return input.new_empty((size,), dtype=dtype)

    offsets = input.shape[0] + 1
    tensors = [made(offsets), made(labels), made(labels, input.dtype), made(labels), made(rows)]
    weighted = rows
    if not _is_shared(tables):
        weighted = pairs = context.new_dynamic_size()
        tensors += [made(offsets), made(pairs, torch.int32), made(rows + 1)]
        tensors += [made(pairs, torch.int32), made(pairs, torch.int32)]
    if _has_log_weight(tables):
        tensors.append(made(weighted, input.dtype))
    return tensors
