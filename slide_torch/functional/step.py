"""What the two losses share: draw a step's active set, reduce the losses of its samples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..active_set import ActiveLayer, ActiveSet, Labels
from ..precision import active_layer, widened
from ..sampling.step import StepRequest
from ..sampling.traced_step import draw
from ..tables import HashTables


class DrawnStep(NamedTuple):
    """What a loss is computed from.

    Attributes:
        input: (B, d), contiguous, in the dtype that is computed in.
        labels: the labels of each sample.
        active: the active neurons.
        layer: weight and bias as the operators over active sets take them.
    """

    input: Tensor
    labels: Labels
    active: ActiveSet
    layer: ActiveLayer


def draw_for_loss(
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | Labels,
    tables: HashTables,
    *,
    negatives: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int,
    sparse: bool,
    training: bool,
    generator: torch.Generator | None,
) -> DrawnStep:
    """Draws the active set of ``input`` (\\*, d) and ``target`` for the loss ``name``, with the upkeep of the
    tables. Input and layer have passed :func:`checked_input`; the target is checked here."""
    flat = widened(input).reshape(-1, input.shape[-1]).contiguous()
    labels, active = draw(
        StepRequest.of(
            name,
            tables,
            flat,
            weight,
            bias,
            target,
            training=training,
            sparse=sparse,
            leading=input.shape[:-1],
            negatives=negatives,
            class_weight=class_weight,
            ignore_index=ignore_index,
            generator=generator,
        )
    )
    layer = active_layer(weight, bias, active.rows, sparse)
    return DrawnStep(flat, labels, active, layer)


def check_reduction(name: str, reduction: str, choices: tuple[str, ...]) -> None:
    if reduction not in choices:
        *most, last = map(repr, choices)
        raise ValueError(
            f"{name}: reduction: expected {', '.join(most)} or {last}, got {reduction!r}"
        )


def reduced(
    losses: Tensor, reduction: str, leading: torch.Size, total: Tensor | int | None
) -> Tensor:
    """The losses (B) of samples of shape ``leading``, reduced as ``reduction`` says.

    Args:
        total: what the mean divides the sum by; None for the number of samples.
    """
    if reduction == "none":
        return losses.reshape(leading)
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if total is None else losses.sum() / total
