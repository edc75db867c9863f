"""What one training step decides before it computes: labels, upkeep of the tables, active set."""

from __future__ import annotations

import torch
from torch import Tensor

from ..active_set import ActiveSet, Labels
from ..inference_mode import version_of
from ..randomness import draw_seed
from ..tables import HashTables
from .draw import draw_active_set
from .targets import as_labels, weighted


@torch.compiler.disable
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
    generator: torch.Generator | None,
    name: str,
) -> tuple[Labels, ActiveSet]:
    """What one step of the loss ``name`` decides before it computes: labels from ``target``, upkeep of the
    tables, the active set of ``input`` (B, d); ``moving`` says that its rows are about to change."""
    neurons = linear_weight.shape[0]
    labels = as_labels(target, leading, neurons, input.dtype, ignore_index, name)
    if weight is not None:
        labels = weighted(labels, weight, neurons, name)
    tables.check_tail(name)
    # One draw a step, whatever upkeep it brings: a recomputation (activation checkpointing) then finds the
    # random state in step, draws the same set, and is known by its seed.
    source = torch.default_generator if generator is None else generator
    before = source.get_state()
    seed = 0 if tables.exact else draw_seed(source)
    upkeep = None
    if tables.has_upkeep:
        upkeep = tables.meet(seed, version_of(linear_weight), moving=moving)

    def maintain() -> None:
        try:
            tables.maintain(
                linear_weight,
                linear_bias,
                advance=moving,
                all_rows_move=not sparse,
                generator=torch.Generator().manual_seed(seed ^ 1),
            )
        except ValueError:
            source.set_state(before)
            raise

    if upkeep == "before":
        maintain()
    active = draw_active_set(
        tables, input, labels, weight=linear_weight, bias=linear_bias, seed=seed
    )
    if moving:
        tables.mark_dirty(active.rows, version_of(linear_weight))
        tables.record(active)
    if upkeep == "after":
        maintain()
    return labels, active
