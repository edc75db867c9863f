"""DWTA: densified winner-take-all hashing (Chen & Shrivastava 2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import HashFamily


class DWTA(HashFamily):
    """Densified winner-take-all (Yagnik et al. 2011; Chen & Shrivastava 2018): a hash is the place of the
    largest of ``bin_size`` randomly chosen coordinates. A further probe takes the second largest.

    Coordinates that are zero count as absent, so sparse vectors (a ReLU's output) hash by what they
    have; a hash whose coordinates are all absent borrows that of another bin. On vectors without zeros
    this is winner-take-all hashing itself.
    """

    coordinates: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, bin_size: int = 8, **common: Any
    ) -> None:
        self.bin_size = bin_size
        super().__init__(in_features, K, L, **common)
        self.bits = K * (bin_size.bit_length() - 1)

    def _draw(self, generator: torch.Generator) -> None:
        needed = self.K * self.L * self.bin_size
        # whole permutations, cut into bins: within one permutation no coordinate is seen twice
        permutations = -(-needed // self.width)
        order = torch.rand(permutations, self.width, generator=generator).argsort(dim=1).flatten()
        coordinates = order[:needed].view(-1, self.bin_size).to(torch.int32).contiguous()
        self.register_buffer("coordinates", coordinates, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        mean_row: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        return ops.dwta(
            input, bias, rows, mean_row, self.coordinates, self.K, self.L, norm_bound, probes
        )

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, bin_size={self.bin_size}"
