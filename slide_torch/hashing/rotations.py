"""Random signs of the pseudo-random rotations H S3 H S2 H S1."""

from __future__ import annotations

import torch
from torch import Tensor


def rotations(
    in_features: int, coordinates: int, smallest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Signs int8 (rotations, 3, size) and projections of appended coordinates (2, rotations, size), for as
    many rotations as give that many ``coordinates``."""
    size = max(smallest, 1 << max(0, in_features - 1).bit_length())
    rotations = -(-coordinates // size)
    signs = torch.randint(0, 2, (rotations, 3, size), generator=generator) * 2 - 1
    bias, norm = (torch.randn(rotations, size, generator=generator) for _ in range(2))
    return signs.to(torch.int8), torch.stack([bias, norm])
