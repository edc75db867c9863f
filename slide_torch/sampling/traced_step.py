"""The draw of an active set as one operator, so that ``torch.compile`` traces a loss in one graph.

Upkeep and sampling are Python whose every step depends on data. Compiled graphs call it as a whole: it
takes and gives tensors, finds the tables by their handle, and draws from torch's global generator just as
in eager mode, so that losses and gradients are those of eager mode. Each call takes a ticket of its own, a
counter that the graph advances: compilers merge calls of equal arguments, and two draws are not one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..active_set import ActiveSet, Labels, SampleActiveSets, SharedActiveSet
from ..tables import HashTables
from . import step

# Names and dtypes (None: the input's). Those that a kind of active set lacks are empty.
_OUTPUTS = {
    "label_offsets": torch.int64,
    "label_ids": torch.int64,
    "probabilities": None,
    "label_places": torch.int64,
    "rows": torch.int64,
    "log_weight": None,
    "offsets": torch.int64,
    "active": torch.int32,
    "pair_offsets": torch.int64,
    "pair_positions": torch.int32,
    "pair_samples": torch.int32,
}


torch.library.define(
    "slide_torch::draw_step",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor target, SymInt[] leading, Tensor? class_weight, "
    "int ignore_index, bool moving, bool sparse, int tables, Tensor ticket, str name) -> ("
    + ", ".join(f"Tensor {name}" for name in _OUTPUTS)
    + ")",
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
    name: str,
) -> tuple[Labels, ActiveSet]:
    """As :func:`slide_torch.step.draw_step`, for tracing; statistics stay in the tables."""
    tables.draws.add_(1)
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
        tables.draws.clone(),
        name,
    )
    label_offsets, label_ids, probabilities, label_places, rows, log_weight = found[:6]
    labels = Labels(label_offsets, label_ids, probabilities)
    if not _has_log_weight(tables):
        log_weight = None
    # 0: what the step counted is in tables.stats() already
    if _is_shared(tables):
        return labels, SharedActiveSet(rows, log_weight, label_places, 0.0, 0)
    offsets, active, pair_offsets, positions, samples = found[6:]
    return labels, SampleActiveSets(
        rows,
        offsets,
        active,
        pair_offsets,
        positions,
        samples,
        log_weight,
        label_places,
        0.0,
        0,
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
    ticket: Tensor,
    name: str,
) -> tuple[Tensor, ...]:
    labels, active = step.draw_step(
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
        name=name,
    )
    # The graph may reuse the memory of what it is given, so it gets nothing that the tables keep (rows),
    # nor one tensor twice (ids and places, where every neuron is active).
    found = {
        "label_offsets": labels.offsets,
        "label_ids": labels.ids.clone(),
        "probabilities": labels.probabilities,
        "label_places": active.label_places,
        "rows": active.rows.clone(),
        "log_weight": active.log_weight,
    }
    if isinstance(active, SampleActiveSets):
        for name in ("offsets", "active", "pair_offsets", "pair_positions", "pair_samples"):
            found[name] = getattr(active, name)
    return tuple(
        found[name] if found.get(name) is not None else input.new_empty(0, dtype=dtype)
        for name, dtype in _OUTPUTS.items()
    )


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
    ticket: Any,
    name: Any,
) -> Any:
    tables = HashTables.of_handle(handle)
    context = torch.library.get_ctx()
    labels, rows = context.new_dynamic_size(), context.new_dynamic_size()

    batch = input.shape[0]
    shared = _is_shared(tables)
    pairs = 0 if shared else context.new_dynamic_size()
    weighted = rows if shared else pairs

    sizes = {
        "label_offsets": batch + 1,
        "label_ids": labels,
        "probabilities": labels,
        "label_places": labels,
        "rows": rows,
        "log_weight": weighted if _has_log_weight(tables) else 0,
        "offsets": 0 if shared else batch + 1,
        "active": pairs,
        "pair_offsets": 0 if shared else rows + 1,
        "pair_positions": pairs,
        "pair_samples": pairs,
    }
    return tuple(input.new_empty((sizes[name],), dtype=dtype) for name, dtype in _OUTPUTS.items())


def draw_for(
    tables: HashTables,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    leading: torch.Size,
    weight: Tensor | None,
    ignore_index: int,
    *,
    training: bool,
    sparse: bool,
    generator: torch.Generator | None,
    name: str,
) -> tuple[Labels, ActiveSet]:
    """:func:`draw_step` of one training step, or its operator where a compiler traces."""
    trained = linear_weight.requires_grad or (linear_bias is not None and linear_bias.requires_grad)
    draw = draw_step
    if torch.compiler.is_compiling():
        _check_traceable(target, generator, name)
        draw = draw_step
    return draw(
        tables,
        input.detach(),
        linear_weight.detach(),
        None if linear_bias is None else linear_bias.detach(),
        target,
        leading,
        weight,
        ignore_index,
        moving=training and torch.is_grad_enabled() and trained,
        sparse=sparse,
        generator=generator,
        name=name,
    )


def _check_traceable(target: Tensor, generator: torch.Generator | None, name: str) -> None:
    if generator is not None:
        raise NotImplementedError(
            f"{name}: generator: expected None under torch.compile, whose graphs take no generator"
        )
    if target.layout != torch.strided:
        raise NotImplementedError(
            f"{name}: target: expected a strided tensor under torch.compile, got {target.layout}: "
            "give lists of labels, (B, M) padded with ignore_index"
        )
