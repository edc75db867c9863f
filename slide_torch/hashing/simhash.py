"""SimHash: signs of random projections (Charikar, STOC 2002)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import HashFamily


class SimHash(HashFamily):
    """Signs of random projections (Charikar 2002): two vectors at angle t agree in a hash with
    probability 1 - t / pi. A further probe flips the signs of the projections nearest to zero.

    ``projection``: ``"hadamard"`` or ``"gaussian"``, see :class:`LSHOptions`.
    """

    signs: Tensor
    extra_projection: Tensor
    matrix: Tensor

    def __init__(
        self, in_features: int, K: int, L: int, *, projection: str = "hadamard", **common: Any
    ) -> None:
        self._projection = projection
        super().__init__(in_features, K, L, **common)

    def _draw(self, generator: torch.Generator) -> None:
        hashes = self.K * self.L
        if self._projection == "hadamard":
            signs, extra = _rotations(self.in_features, hashes, generator)
            self.register_buffer("signs", signs, persistent=False)
            self.register_buffer("extra_projection", extra, persistent=False)
            return
        matrix = torch.randn(hashes, self.width, generator=generator)
        self.register_buffer("matrix", matrix, persistent=False)

    def _codes(
        self,
        input: Tensor,
        bias: Tensor | None,
        rows: Tensor | None = None,
        mean_row: Tensor | None = None,
        norm_bound: float | None = None,
        probes: int = 1,
    ) -> Tensor:
        of = (input, bias, rows, mean_row)
        if self._projection == "hadamard":
            extra = self.extra_projection.float()
            return ops.simhash_hadamard(*of, self.signs, extra, self.K, self.L, norm_bound, probes)
        return ops.simhash_dense(*of, self.matrix.float(), self.K, self.L, norm_bound, probes)

    def extra_repr(self) -> str:
        return f"K={self.K}, L={self.L}, projection={self._projection!r}"


def _rotations(
    in_features: int, coordinates: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """As many pseudo-random rotations H S3 H S2 H S1 as give that many ``coordinates``: random signs, int8
    (rotations, 3, size), and projections of appended coordinates, (2, rotations, size)."""
    size = 1 << max(0, in_features - 1).bit_length()
    rotations = -(-coordinates // size)
    signs = torch.randint(0, 2, (rotations, 3, size), generator=generator) * 2 - 1
    bias, norm = (torch.randn(rotations, size, generator=generator) for _ in range(2))
    return signs.to(torch.int8), torch.stack([bias, norm])
