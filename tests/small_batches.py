"""Batches and losses for the small model of helpers.py."""

import torch
import torch.nn.functional as F

N, D, B = 60, 8, 5
PATTERNS = ["shared", "per_sample"]


def batch(seed=1):
    data = torch.Generator().manual_seed(seed)
    return torch.randn(B, D, generator=data), torch.randint(N, (B,), generator=data)


def loss_of(model, seed=1):
    x, y = batch(seed)
    torch.manual_seed(seed)
    return F.cross_entropy(model(x), y)


def stale_unmarked(layer):
    """Rows whose codes are not those of the weights, and that are not marked as such."""
    tables = layer.tables
    moved = (tables.family.row_codes(layer.weight, layer.bias) != tables.codes).any(0)
    return moved & ~tables.dirty
