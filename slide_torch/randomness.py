"""Seeds, drawn from a generator of torch."""

from __future__ import annotations

import torch


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed from ``generator``, or from torch's global one (so ``torch.manual_seed`` governs it)."""
    return int(torch.randint(2**63 - 1, (), generator=generator))
