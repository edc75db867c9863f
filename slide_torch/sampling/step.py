"""What one training step decides before it computes: labels, upkeep of the tables, active set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..active_set import ActiveSet, Labels
from ..inference_mode import version_of
from ..randomness import draw_seed
from ..tables import HashTables
from .draw import draw_active_set
from .negatives import padded_lists
from .targets import as_labels, weighted


class StepRequest(NamedTuple):
    """A step's question to the tables: which neurons are active for these inputs and targets.

    Attributes:
        tables: of the layer, and kept fresh by the step.
        input: (B, d), without gradient, of the dtype that is computed in.
        weight, bias: of the layer, without gradient.
        target: any form that the losses take, of inputs of shape (\\*leading, d), or labels.
        leading: the shape that the B inputs had.
        negatives: int64 (M) or (\\*leading, M), neurons that are active beside labels, or None.
        class_weight: (N), a factor of each label's probability, or None.
        ignore_index: class index that counts as no label.
        moving: whether the active rows are about to change: a training step.
        sparse: whether only active rows change.
        generator: source of the step's one seed; torch's global generator if None.
        name: of the function whose errors these are.
    """

    tables: HashTables
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | Labels
    leading: torch.Size
    negatives: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    moving: bool
    sparse: bool
    generator: torch.Generator | None
    name: str

    @staticmethod
    def of(
        name: str,
        tables: HashTables,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor | Labels | None = None,
        *,
        training: bool,
        sparse: bool,
        leading: torch.Size | None = None,
        negatives: Tensor | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        generator: torch.Generator | None = None,
    ) -> StepRequest:
        """The request of a call that may be a ``training`` step, with parameters and ``input`` as they take
        part in autograd; without a ``target`` no sample has labels."""
        if target is None:
            target = input.new_empty((input.shape[0], 0), dtype=torch.int64)
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return StepRequest(
            tables,
            input.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            target,
            input.shape[:1] if leading is None else leading,
            negatives,
            class_weight,
            ignore_index,
            training and torch.is_grad_enabled() and trained,
            sparse,
            generator,
            name,
        )


@torch.compiler.disable
def draw_step(request: StepRequest) -> tuple[Labels, ActiveSet]:
    """Labels from the request's target, upkeep of the tables, and the active set of its inputs."""
    tables, weight, moving = request.tables, request.weight, request.moving
    neurons = weight.shape[0]
    labels = as_labels(
        request.target,
        request.leading,
        neurons,
        request.input.dtype,
        request.ignore_index,
        request.name,
    )
    if request.class_weight is not None:
        labels = weighted(labels, request.class_weight, neurons, request.name)
    negatives = None
    if request.negatives is not None:
        negatives = padded_lists(
            request.negatives,
            request.leading,
            neurons,
            request.name,
            "negatives",
            whole_batch=True,
        )
    tables.check_tail(request.name)
    # One draw a step, whatever upkeep it brings: a recomputation (activation checkpointing) then finds the
    # random state in step, draws the same set, and is known by its seed.
    source = torch.default_generator if request.generator is None else request.generator
    before = source.get_state()
    seed = 0 if tables.exact else draw_seed(source)
    upkeep = None
    if tables.uses_tables:
        upkeep = tables.meet(seed, version_of(weight), moving=moving)

    def maintain() -> None:
        try:
            tables.maintain(
                weight,
                request.bias,
                advance=moving,
                all_rows_move=not request.sparse,
                generator=torch.Generator().manual_seed(seed ^ 1),
            )
        except ValueError:
            source.set_state(before)
            raise

    if upkeep == "before":
        maintain()
    active = draw_active_set(
        tables,
        request.input,
        labels,
        negatives=negatives,
        weight=weight,
        bias=request.bias,
        seed=seed,
    )
    if moving:
        tables.mark_dirty(active.rows, version_of(weight))
        tables.record(active)
    if upkeep == "after":
        maintain()
    return labels, active
