"""What the tail is drawn from: distributions over classes that know their inclusion probabilities.

A row's share of the probability is an interval of [0, n), n the number of draws: intervals lie in order of
ids, and one point is drawn, uniformly, in each stratum [t, t + 1). A row is drawn if a point falls into its
interval, so that its inclusion probability follows from the interval alone: its length l where it lies in
one stratum, ``1 - (1 - f) (1 - g)`` where a boundary cuts it into f and g. So no two draws compete for
one part of the distribution, and the tail's length hardly varies. (The stratified resampling of Kitagawa
1996, with Horvitz & Thompson's probabilities.)

Arithmetic over all N is numpy's, on one thread: elementwise functions of torch may round by how threads
share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..inference_mode import keeps_normal_tensors


@dataclass(frozen=True)
class FixedProposal:
    """A distribution that does not change, prepared for a number of draws.

    Rows whose share would be over one draw are in every tail, and the others share the remaining draws.

    Attributes:
        count: draws, those of ``certain`` included.
        certain: int32, increasing: rows with inclusion probability 1.
        edges: float64 (N + 1), where each row's interval begins; in [0, count - len(certain)].
        inclusion: float64 (N), of each row.
    """

    count: int
    certain: Tensor
    edges: Tensor
    inclusion: Tensor

    @staticmethod
    @keeps_normal_tensors
    def of_shares(shares: np.ndarray, count: int) -> FixedProposal:
        """Prepares ``count`` (below N) draws in proportion to ``shares``, float64 (N), positive."""
        neurons = len(shares)
        order = np.argsort(-shares, kind="stable")
        falling = shares[order]
        rest = falling[::-1].cumsum()[::-1]  # of a row and all that have smaller shares
        too_large = (count - np.arange(neurons)) * falling >= rest
        most = int(too_large.argmin())  # the first that is not
        strata = count - most
        lengths = shares * (strata / rest[most])
        lengths[order[:most]] = 0.0
        edges = np.concatenate([[0.0], lengths.cumsum()])
        edges *= strata / edges[-1] if strata else 0.0
        begin, end = edges[:-1], edges[1:]
        boundary = np.floor(begin) + 1
        first = np.minimum(end, boundary) - begin
        second = np.clip(end - boundary, 0.0, 1.0)
        inclusion = 1 - (1 - first) * (1 - second)
        # lengths far below 1 keep their digits
        inclusion = np.where(second == 0, first, inclusion)
        inclusion[order[:most]] = 1.0
        return FixedProposal(
            count,
            torch.from_numpy(np.sort(order[:most]).astype(np.int32)),
            torch.from_numpy(edges),
            torch.from_numpy(inclusion),
        )

    def draw(self, seed: int) -> Tensor:
        """Distinct ids, increasing, int32."""
        strata = self.count - self.certain.shape[0]
        generator = torch.Generator().manual_seed(seed ^ 2)
        points = torch.rand(strata, dtype=torch.float64, generator=generator)
        points += torch.arange(strata)
        # a sum that was rounded up to the end belongs to the last interval that has a length
        points.clamp_(max=float(np.nextafter(strata, 0)))
        drawn = torch.searchsorted(self.edges, points, right=True).sub_(1).to(torch.int32)
        ids: Tensor = torch.unique(torch.cat([self.certain, drawn]))
        return ids


def log_uniform_shares(neurons: int) -> np.ndarray:
    """log((i + 2) / (i + 1)) for class i: nearly Zipf's law, for ids sorted by decreasing frequency."""
    return np.log1p(1 / np.arange(1.0, neurons + 1))


@keeps_normal_tensors
def power_of_counts(counts: Tensor, power: float, neurons: int) -> Tensor:
    """``counts ** power``, float64 (N).

    Raises:
        ValueError: shape or values are wrong.
    """
    where = "LSHLinear.set_frequencies"
    if not isinstance(counts, Tensor) or tuple(counts.shape) != (neurons,):
        got = tuple(counts.shape) if isinstance(counts, Tensor) else type(counts).__name__
        raise ValueError(f"{where}: counts: expected a tensor of shape ({neurons},), got {got}")
    if isinstance(power, bool) or not isinstance(power, (int, float)) or not 0 <= power <= 1:
        raise ValueError(f"{where}: power: expected a number from 0 to 1, got {power!r}")
    values = counts.detach().to(device="cpu", dtype=torch.float64).numpy()
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        first = int(wrong.argmax())
        raise ValueError(
            f"{where}: counts: expected positive finite numbers, got {values[first]} for class {first} "
            f"({int(wrong.sum())} such): a class that is never drawn cannot be corrected for, so give "
            "counts.clamp(min=1)"
        )
    return torch.from_numpy((values / values.max()) ** power)
