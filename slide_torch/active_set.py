"""Labels and active sets: data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """Targets as CSR over samples.

    Attributes:
        offsets: int64 (B + 1), where each sample's labels begin.
        ids: int64 (labels), classes in [0, N).
        probabilities: (labels), each label's share of its sample's target.
    """

    offsets: Tensor
    ids: Tensor
    probabilities: Tensor

    @staticmethod
    def none(batch: int, dtype: torch.dtype) -> Labels:
        """No labels for any sample: only candidates and tail are active."""
        return Labels(
            torch.zeros(batch + 1, dtype=torch.int64),
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=dtype),
        )

    def operands(self, active: ActiveSet) -> tuple[Tensor, Tensor, Tensor]:
        """What the operators take of them: offsets, each label's place in ``active``, probabilities."""
        return self.offsets, active.label_places, self.probabilities


@dataclass(frozen=True)
class SharedActiveSet:
    """One active set for the whole batch.

    Attributes:
        rows: int64 (U), increasing.
        log_weight: (U), what importance correction adds to the logits, or None.
        label_places: int64 (labels), each label's place in ``rows``.
        active_per_sample: mean number of neurons that a sample computes.
        ids_read: neurons read from buckets, for all samples together.
    """

    rows: Tensor
    log_weight: Tensor | None
    label_places: Tensor
    active_per_sample: float
    ids_read: int

    def operands(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the operators take of it, with ``rows`` as those of an :class:`ActiveLayer`."""
        return (rows,)


@dataclass(frozen=True)
class SampleActiveSets:
    """One active set a sample, and its transpose (see :func:`slide_torch.ops.transpose_active`).

    ``offsets`` int64 (B + 1) and ``active`` int32 (pairs) are sample-major; ``log_weight`` (pairs) or
    None and ``label_places`` int64 (labels) refer to that order. The rest is neuron-major.
    """

    rows: Tensor
    offsets: Tensor
    active: Tensor
    pair_offsets: Tensor
    pair_positions: Tensor
    pair_samples: Tensor
    log_weight: Tensor | None
    label_places: Tensor
    active_per_sample: float
    ids_read: int

    def operands(self, rows: Tensor) -> tuple[Tensor, ...]:
        """What the operators take of them, with ``rows`` as those of an :class:`ActiveLayer`."""
        return rows, self.offsets, self.pair_offsets, self.pair_positions, self.pair_samples


ActiveSet = SharedActiveSet | SampleActiveSets


class ActiveLayer(NamedTuple):
    """A layer as the operators over active sets take it.

    Attributes:
        weight: (N, d), float32 or float64.
        bias: (N) or None.
        rows: int64 (U), the active neurons' rows of these two.
        sparse: whether they get row-sparse gradients.
    """

    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    sparse: bool

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias
