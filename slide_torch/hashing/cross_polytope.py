"""Cross-polytope hashing (Andoni et al., NeurIPS 2015)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import HashFamily
from .rotations import rotations


class CrossPolytope(HashFamily):
    """The signed coordinate, of ``bin_size`` coordinates of a rotated vector, that is largest in absolute
    value (Andoni et al. 2015), by the pseudo-random rotations H S3 H S2 H S1. A further probe takes the
    next largest.

    A ``bin_size`` of the rotation's own size is the cross-polytope hash proper; a smaller one is that of
    a random projection, of which a rotation gives several.
    """

    signs: Tensor
    extra_projection: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, bin_size: int = 8, **common: Any
    ) -> None:
        self.bin_size = bin_size
        super().__init__(in_features, K, L, **common)
        self.bits = K * bin_size.bit_length()

    def _draw(self, generator: torch.Generator) -> None:
        # at least 32 coordinates: the rotations of fewer are not random enough
        coordinates = self.K * self.L * self.bin_size
        smallest = max(32, self.bin_size)
        signs, extra = rotations(self.in_features, coordinates, smallest, generator)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("extra_projection", extra, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        mean_row: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        return ops.cross_polytope(
            input,
            bias,
            rows,
            mean_row,
            self.signs,
            self.extra_projection.float(),
            self.bin_size,
            self.K,
            self.L,
            norm_bound,
            probes,
        )

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, bin_size={self.bin_size}"
