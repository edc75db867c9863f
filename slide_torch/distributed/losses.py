"""The losses of a layer whose rows lie on several ranks.

Each rank draws an active set among its own rows. The softmax's normaliser is the sum of theirs: a maximum
and a sum over ranks of two numbers a sample. The gradient of a rank's rows needs no communication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..active_set import Labels
from ..functional.binary_cross_entropy import ClassFactors, losses_of, without_repeats
from ..functional.checks import checked_input
from ..functional.smoothing import Smoothing, check_smoothing, mean_weight, smoothed
from ..functional.step import DrawnStep, check_reduction, draw_for_loss, reduced
from ..ops import fused_update
from ..precision import widened
from ..randomness import draw_seed
from ..sampling.targets import as_labels, class_factors, is_probabilities, weighted
from ..shards import Shard
from ..tables import HashTables
from . import collectives
from .batch import Batch


class Rows(NamedTuple):
    """This rank's rows of a layer.

    Attributes:
        weight: (n, d).
        bias: (n), or None.
        tables: over these rows.
        sparse: whether they get row-sparse gradients.
        shard: which of all rows they are.
    """

    weight: Tensor
    bias: Tensor | None
    tables: HashTables
    sparse: bool
    shard: Shard


def sharded_cross_entropy(
    input: Tensor,
    rows: Rows,
    target: Tensor,
    *,
    scale: float,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    decoupled: bool = False,
    margin: float | None = None,
) -> Tensor:
    """As :func:`slide_torch.functional.lsh_linear_cross_entropy`, of rank's own ``rows``; ``target`` and
    ``weight`` are of all N classes. Every rank must call it, and backward. ``decoupled`` and ``margin`` are
    refused."""
    name, shard = "lsh_linear_cross_entropy", rows.shard
    if decoupled:
        raise NotImplementedError(
            f"{name}: decoupled: expected False on a sharded layer, got True: a rank does not know whether "
            "a label of its own is its row's only one: use decoupled=False"
        )
    if margin is not None:
        raise NotImplementedError(
            f"{name}: margin: expected None on a sharded layer, got {margin!r}: a rank does not know the "
            "logits of labels that others hold: leave it out"
        )
    input = checked_input(
        name, input, rows.weight, rows.bias, rows.tables, scale=scale, sparse=rows.sparse
    )
    if shard.replicas is not None and rows.sparse:
        fused_update.refuse_in_replicas(f"{name}: linear_weight", rows.weight)
    check_reduction(name, reduction, ("mean", "sum", "none"))
    check_smoothing(label_smoothing, rows.tables, rows.weight, rows.sparse, decoupled=False)
    leading, flat = input.shape[:-1], widened(input).reshape(-1, input.shape[-1])
    labels = as_labels(target, leading, shard.neurons, flat.dtype, ignore_index, name)
    if weight is not None:
        weight = class_factors(weight, shard.neurons, flat, name)
        labels = weighted(labels, weight, shard.neurons, name)
    batch = Batch.of(name, shard, flat, labels)
    step = _draw(name, rows, batch, batch.own_labels())
    total, own, addition = batch.totals(), step.labels, None
    counts = batch.labels.offsets.diff()
    if label_smoothing > 0:
        smoothing = _smoothing_of(label_smoothing, weight, counts, shard)
        total = (1 - label_smoothing) * total + label_smoothing * smoothing.mean_weight * (
            counts > 0
        )
        own, addition = _smoothed(step, smoothing, scale, rows)
    log_normalizer, pulls = ops.partial_cross_entropy(
        step.input, step.layer, step.active, own, scale
    )
    if addition is not None:
        pulls = pulls - addition
    log_normalizer, pulls = _over_shards(log_normalizer, pulls, shard)
    # a sample without a label has no loss, and no gradient even if the mean over none is NaN
    losses = batch.own(torch.where(counts > 0, total * log_normalizer - pulls, 0.0))
    divisor = None
    if not is_probabilities(target):
        divisor = labels.probabilities.sum()
        if label_smoothing > 0:
            divisor = torch.where(divisor == 0, torch.nan, divisor)
    return reduced(losses, reduction, leading, divisor)


def sharded_binary_cross_entropy(
    input: Tensor,
    rows: Rows,
    target: Tensor,
    *,
    scale: float,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """As :func:`slide_torch.functional.lsh_linear_binary_cross_entropy`, of rank's own ``rows``; the other
    arguments are of all N classes. Every rank must call it, and backward."""
    name, shard = "lsh_linear_binary_cross_entropy", rows.shard
    input = checked_input(
        name, input, rows.weight, rows.bias, rows.tables, scale=scale, sparse=rows.sparse
    )
    if reduction == "none":
        raise NotImplementedError(
            f"{name}: reduction: expected 'mean' or 'sum', got 'none', which is a loss for each of all "
            "classes; only those of active ones are computed"
        )
    check_reduction(name, reduction, ("mean", "sum"))
    leading, flat = input.shape[:-1], widened(input).reshape(-1, input.shape[-1])
    factors = ClassFactors.of(weight, pos_weight, shard.neurons, flat)
    if isinstance(target, Tensor) and target.dim() == input.dim():
        target = without_repeats(target, ignore_index)
    labels = as_labels(target, leading, shard.neurons, flat.dtype, ignore_index, name)
    batch = Batch.of(name, shard, flat, labels)
    step = _draw(name, rows, batch, batch.own_labels())
    own = losses_of(
        step,
        factors.of_classes(shard.first, shard.last),
        scale,
        ones=not is_probabilities(target),
    )
    losses = batch.own(collectives.summed(own, shard.group))
    return reduced(losses, reduction, leading, losses.shape[0] * shard.neurons)


def _draw(name: str, rows: Rows, batch: Batch, labels: Labels) -> DrawnStep:
    """Draws this rank's active set. Ranks that seed alike draw alike from torch's global generator, and each
    makes another seed of it: tails must not have equal places in all shards."""
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed((draw_seed() + rows.shard.rank) % 2**63)
    try:
        return draw_for_loss(
            name,
            batch.input,
            rows.weight,
            rows.bias,
            labels,
            rows.tables,
            ignore_index=-100,
            sparse=rows.sparse,
            training=True,
            generator=generator,
        )
    except ValueError:
        torch.set_rng_state(before)
        raise


def _over_shards(log_normalizer: Tensor, pulls: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """The log of the normalisers' sum over ranks, and the sum of ``pulls``, (B) each."""
    top = collectives.largest(log_normalizer, shard.group)
    top = torch.where(top == -torch.inf, 0.0, top)  # nothing is active anywhere: without labels
    both = torch.stack([(log_normalizer - top).exp(), pulls])
    mass, pulls = collectives.summed(both, shard.group)
    return top + mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), pulls


def _smoothing_of(
    share: float, class_weight: Tensor | None, counts: Tensor, shard: Shard
) -> Smoothing:
    own = None if class_weight is None else class_weight[shard.first : shard.last]
    portion = (shard.last - shard.first) / shard.neurons
    return Smoothing(share, own, mean_weight(class_weight), counts, portion)


def _smoothed(
    step: DrawnStep, smoothing: Smoothing, scale: float, rows: Rows
) -> tuple[Labels, Tensor]:
    return smoothed(
        step,
        smoothing,
        scale,
        neurons=rows.weight.shape[0],
        copied=step.layer.weight is not rows.weight,
        tail_varies=step.active.log_weight is not None
        and rows.tables.options.tail_parts != ("uniform",),
    )
