"""The draw of an active set, in compiled graphs as one operator, so that ``torch.compile`` traces a loss.

Upkeep and sampling are Python whose every step depends on data. Compiled graphs call it as a whole: it
takes and gives tensors, finds the tables by their handle, and draws from torch's global generator just as
in eager mode, so that losses and gradients are those of eager mode. Each call takes a ticket of its own, a
counter that the graph advances: compilers merge calls with equal arguments, and two draws must stay two.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..active_set import ActiveSet, Labels, SampleActiveSets, SharedActiveSet
from ..ops.library import fake
from ..tables import HashTables
from ..tables.handles import tables_of
from .step import StepRequest, draw_step

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
    "(Tensor input, Tensor weight, Tensor? bias, Tensor target, SymInt[] leading, Tensor? negatives, "
    "Tensor? class_weight, int ignore_index, bool moving, bool sparse, int tables, Tensor ticket, "
    "str name) -> (" + ", ".join(f"Tensor {name}" for name in _OUTPUTS) + ")",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def draw(request: StepRequest) -> tuple[Labels, ActiveSet]:
    """:func:`draw_step`, as its operator where a compiler traces; statistics then stay in the tables."""
    if not torch.compiler.is_compiling():
        drawn: tuple[Labels, ActiveSet] = draw_step(request)
        return drawn
    _check_traceable(request)
    tables = request.tables
    tables.draws.add_(1)
    found = torch.ops.slide_torch.draw_step(
        request.input,
        request.weight,
        request.bias,
        request.target,
        request.leading,
        request.negatives,
        request.class_weight,
        request.ignore_index,
        request.moving,
        request.sparse,
        tables.handle,
        tables.draws.clone(),
        request.name,
    )
    label_offsets, label_ids, probabilities, label_places, rows, log_weight = found[:6]
    labels = Labels(label_offsets, label_ids, probabilities)
    if not _has_log_weight(tables):
        log_weight = None
    # 0: what the step counted is in tables.stats() already
    if _is_shared(tables):
        return labels, SharedActiveSet(rows, log_weight, label_places, 0.0, 0)
    offsets, active, pair_offsets, positions, samples = found[6:]
    pairs = (offsets, active, pair_offsets, positions, samples)
    return labels, SampleActiveSets(rows, *pairs, log_weight, label_places, 0.0, 0)


def _check_traceable(request: StepRequest) -> None:
    if request.generator is not None:
        raise NotImplementedError(
            f"{request.name}: generator: expected None under torch.compile, whose graphs take no generator"
        )
    if isinstance(request.target, Labels):
        raise NotImplementedError(
            f"{request.name}: target: expected a tensor under torch.compile, got labels"
        )
    if request.target.layout != torch.strided:
        raise NotImplementedError(
            f"{request.name}: target: expected a strided tensor under torch.compile, got "
            f"{request.target.layout}: give lists of labels, (B, M) padded with ignore_index"
        )


def _is_shared(tables: HashTables) -> bool:
    return tables.exact or tables.options.pattern == "shared"


def _has_log_weight(tables: HashTables) -> bool:
    return not tables.exact and tables.options.correction == "importance"


@torch.library.impl("slide_torch::draw_step", "CPU")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    leading: list[int],
    negatives: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    moving: bool,
    sparse: bool,
    handle: int,
    ticket: Tensor,
    name: str,
) -> tuple[Tensor, ...]:
    labels, active = draw_step(
        StepRequest(
            tables_of(handle),
            input,
            weight,
            bias,
            target,
            torch.Size(leading),
            negatives,
            class_weight,
            ignore_index,
            moving,
            sparse,
            None,
            name,
        )
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
        for output in ("offsets", "active", "pair_offsets", "pair_positions", "pair_samples"):
            found[output] = getattr(active, output)

    def given(output: str, dtype: torch.dtype | None) -> Tensor:
        tensor = found.get(output)
        return input.new_empty(0, dtype=dtype) if tensor is None else tensor

    return tuple(given(output, dtype) for output, dtype in _OUTPUTS.items())


@fake("draw_step")
def _(a: SimpleNamespace) -> Any:
    tables = tables_of(a.tables)
    context = torch.library.get_ctx()
    labels, rows = context.new_dynamic_size(), context.new_dynamic_size()

    batch = a.input.shape[0]
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
    return tuple(a.input.new_empty((sizes[name],), dtype=dtype) for name, dtype in _OUTPUTS.items())
